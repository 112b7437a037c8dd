"""The handshake: who is there, which protocol version, and proof of the cluster secret. No I/O.

    dial -> accept   HELLO ["dial", body, nil]
    accept -> dial   HELLO ["accept", body, proof or nil]
    dial -> accept   HELLO ["prove", empty, proof or nil]
    either           HELLO ["refuse", [error class, text] as body, nil], then the connection ends

A body is a msgpack map in its encoded form (fields: ``_encode_body``); keys that are not known are
passed over, so that later versions can add some. A proof is HMAC-SHA256 with the cluster secret
over a label that names the prover's side and over both bodies as they were sent. So it binds both
nonces (no replay), the side (no reflection), both identities and version ranges (no downgrade).

It proves membership once. It does not encrypt, and somebody who can change bytes on the way can
take over the connection afterwards: that is what TLS is for.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from torus_actors.errors import Invalid, ProtocolError, TorusError, Unauthenticated
from torus_actors.wire.codec import pack, unpack_small
from torus_actors.wire.frames import Buffer, Frame, Kind, encode
from torus_actors.wire.limits import (
    ERROR_TEXT_MAX,
    HELLO_MAX,
    ID_MAX,
    NONCE_SIZE,
    SECRET_MIN,
)

PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
"""The range of protocol versions this code speaks; the frame layout has a version of its own."""

_PROOF_SIZE: Final = 32
_LABELS: Final = {
    "dial": b"torus-actors hello: the dialing side\0",
    "accept": b"torus-actors hello: the accepting side\0",
}
_OTHER_CLUSTER: Final = " belongs to cluster "
_HAS_SECRET: Final = " has a cluster secret, "
"""By these it is known what to do about a refusal: all that the other side sends is its text."""
_UINT64_MAX: Final = 2**64 - 1
_VERSION_MAX: Final = 2**16 - 1
_REFUSALS: Final[dict[str, type[TorusError]]] = {
    "Unauthenticated": Unauthenticated,
    "ProtocolError": ProtocolError,
}


class Role(enum.StrEnum):
    """What the one at an end of a connection is."""

    NODE = "node"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Identity:
    """What one side says of itself.

    Attributes:
        cluster: id of its cluster; None where it is not known yet.
        node: id of the node or client. Ids are 1 to ID_MAX printable ASCII characters, no spaces.
        role: node or client.
        incarnation: changes with every start of the process; 64 bits.
        software: version of its software, for logs.
    """

    cluster: str | None
    node: str
    role: Role
    incarnation: int
    software: str


@dataclass(frozen=True, slots=True)
class PeerIdentity(Identity):
    """What the handshake found out about the other side.

    Attributes:
        version: the protocol version to speak with it.
        authenticated: whether it proved to know the cluster secret.
    """

    version: int
    authenticated: bool


@dataclass(frozen=True, slots=True)
class _Body:
    identity: Identity
    version_min: int
    version_max: int
    nonce: bytes
    secured: bool


class Hello:
    """One side of a handshake.

    Args:
        side: which side opened the connection.
        identity: of this side.
        secret: of the cluster, SECRET_MIN bytes or more; None for a cluster without one.
        nonce: NONCE_SIZE fresh random bytes, never used before.
        versions: lowest and highest protocol version this side speaks.

    Attributes:
        done: the other side is known; call ``FrameDecoder.lift_limits``.

    Raises:
        Invalid: an argument is out of range.
    """

    def __init__(
        self,
        side: Literal["dial", "accept"],
        identity: Identity,
        secret: bytes | None,
        nonce: bytes,
        *,
        versions: tuple[int, int] = (PROTOCOL_MIN, PROTOCOL_MAX),
    ) -> None:
        if secret is not None and len(secret) < SECRET_MIN:
            raise Invalid(f"the cluster secret has {len(secret)} bytes: use {SECRET_MIN} or more")
        if side not in _LABELS:
            raise Invalid(f"no side {side!r}: dial or accept")
        self.done = False
        self._dials = side == "dial"
        self._versions = versions
        self._nonce = nonce
        self._identity = identity
        self._secret = secret
        self._own_body = _encode_body(
            _Body(identity, versions[0], versions[1], nonce, secret is not None)
        )
        try:
            _decode_body(self._own_body)
        except ProtocolError as error:
            raise Invalid(f"cannot say hello: {error}") from error
        self._their_body = b""
        self._peer: PeerIdentity | None = None
        # The step that may come next; None: nothing, because it is over.
        self._expected: str | None = "accept" if self._dials else "dial"
        self._started = False

    @property
    def peer(self) -> PeerIdentity:
        """The other side.

        Raises:
            Invalid: asked before it is known.
        """
        if not self.done or self._peer is None:
            raise Invalid("the handshake is not done")
        return self._peer

    def start(self) -> list[Buffer]:
        """What to send first; nothing on the accepting side."""
        if self._started:
            raise Invalid("the handshake has been started already")
        self._started = True
        return _frame("dial", self._own_body, None) if self._dials else []

    def receive(self, frame: Frame) -> list[Buffer]:
        """Take the other side's next frame.

        Returns:
            What to send; may be empty.

        Raises:
            Unauthenticated: another cluster, or not the same secret; also as the other side says.
            ProtocolError: no common version, or not a handshake; also as the other side says.
                After either, send ``refusal(error)`` and end the connection.
        """
        expected, self._expected = self._expected, None
        if frame.kind is not Kind.HELLO:
            raise ProtocolError(f"{frame.kind.name} frame before the handshake is done")
        step, body, proof = _decode_step(frame)
        if step == "refuse":
            raise _refused(body)
        if step != expected:
            wanted = repr(expected) if expected else "nothing more"
            raise ProtocolError(f"{step!r} in the handshake, where {wanted} was expected")
        if step == "dial":
            return self._on_dial(body, proof)
        if step == "accept":
            return self._on_accept(body, proof)
        return self._on_prove(body, proof)

    def refusal(self, error: TorusError) -> list[Buffer]:
        """What to send to a side that is refused, before the connection ends.

        Empty where it was the other side that refused, or the handshake is done.

        Args:
            error: what ``receive`` raised, or ProtocolError or Unauthenticated with a reason of
                the caller's own.
        """
        if self.done or getattr(error, "from_other_side", False):
            return []
        name = type(error).__name__ if type(error).__name__ in _REFUSALS else "ProtocolError"
        text = str(error).encode("ascii", "backslashreplace").decode()[:ERROR_TEXT_MAX]
        self._expected = None
        return _frame("refuse", pack([name, text]), None)

    def _on_dial(self, body: bytes, proof: bytes | None) -> list[Buffer]:
        if proof is not None:
            raise ProtocolError("a proof in the handshake before there is a challenge")
        self._meet(body)
        self._expected = "prove"
        return _frame("accept", self._own_body, self._proof("accept"))

    def _on_accept(self, body: bytes, proof: bytes | None) -> list[Buffer]:
        self._meet(body)
        self._verify("accept", proof)
        self.done = True
        return _frame("prove", b"", self._proof("dial"))

    def _on_prove(self, body: bytes, proof: bytes | None) -> list[Buffer]:
        if body:
            raise ProtocolError("the last step of the handshake has no body")
        self._verify("dial", proof)
        self.done = True
        return []

    def _meet(self, encoded: bytes) -> None:
        """Check what the other side says of itself against what this side is."""
        body = _decode_body(encoded)
        them = body.identity
        name = f"{them.role} {them.node}"
        low, high = self._versions
        if body.version_min > high or body.version_max < low:
            raise ProtocolError(
                f"no common protocol version: {name} ({them.software}) speaks"
                f" {body.version_min} to {body.version_max}, {self._identity.role}"
                f" {self._identity.node} ({self._identity.software}) {low} to {high}"
            )
        if body.nonce == self._nonce:
            raise Unauthenticated("the nonce of this side came back as the other side's")
        ours = self._identity.cluster
        if ours is not None and them.cluster is not None and ours != them.cluster:
            raise Unauthenticated(f"{name}{_OTHER_CLUSTER}{them.cluster}, not {ours}")
        if body.secured and self._secret is None:
            raise Unauthenticated(
                f"{name}{_HAS_SECRET}{self._identity.role} {self._identity.node} has none"
            )
        if self._secret is not None and not body.secured:
            raise Unauthenticated(
                f"{name} has no cluster secret, {self._identity.role} {self._identity.node} has one"
            )
        self._their_body = encoded
        self._peer = PeerIdentity(
            cluster=them.cluster,
            node=them.node,
            role=them.role,
            incarnation=them.incarnation,
            software=them.software,
            version=min(high, body.version_max),
            authenticated=self._secret is not None,
        )

    def _proof(self, prover: str) -> bytes | None:
        """The proof of one side of this handshake; None without a secret."""
        if self._secret is None:
            return None
        dialed, accepted = self._own_body, self._their_body
        if not self._dials:
            dialed, accepted = accepted, dialed
        # The lengths keep two different pairs of bodies from being one string.
        parts: Sequence[bytes] = (
            _LABELS[prover],
            len(dialed).to_bytes(4, "little"),
            dialed,
            len(accepted).to_bytes(4, "little"),
            accepted,
        )
        return hmac.digest(self._secret, b"".join(parts), "sha256")

    def _verify(self, prover: str, proof: bytes | None) -> None:
        assert self._peer is not None
        name = f"{self._peer.role} {self._peer.node}"
        expected = self._proof(prover)
        if expected is None:
            if proof is not None:
                raise ProtocolError(f"{name} sent a proof without having a cluster secret")
        elif proof is None or not hmac.compare_digest(expected, proof):
            raise Unauthenticated(f"{name} does not know the secret of this cluster")


def is_other_cluster(reason: str) -> bool:
    """Whether a handshake raised this because the other process is of another cluster."""
    return _OTHER_CLUSTER in reason


def shut_out(what: str, reasons: Sequence[str]) -> Unauthenticated:
    """What a person is told who was refused, and what to do about it.

    Args:
        what: was refused, or does not answer.
        reasons: texts of what the handshakes raised here; at least one.
    """
    # Where some nodes are of another cluster, the secret is what keeps the others away.
    reason = next((each for each in reasons if not is_other_cluster(each)), reasons[0])
    advice = "; give the --secret-file of the nodes"
    if is_other_cluster(reason):
        advice = ""
    elif _HAS_SECRET in reason:
        advice = "; leave out the --secret-file: the nodes have none"
    return Unauthenticated(f"{what}: {reason}{advice}")


def _frame(step: str, body: bytes, proof: bytes | None) -> list[Buffer]:
    return encode(Kind.HELLO, 0, pack([step, body, proof]))


def _decode_step(frame: Frame) -> tuple[str, bytes, bytes | None]:
    if len(frame.meta) > HELLO_MAX or frame.payload is not None:
        raise ProtocolError("a frame of the handshake is too large")
    fields = unpack_small(frame.meta)
    if type(fields) is list and len(fields) == 3:
        step, body, proof = fields
        if (
            step in ("dial", "accept", "prove", "refuse")
            and type(body) is bytes
            and (proof is None or (type(proof) is bytes and len(proof) == _PROOF_SIZE))
        ):
            return step, body, proof
    raise ProtocolError("a frame of the handshake is not [step, body, proof]")


def _encode_body(body: _Body) -> bytes:
    identity = body.identity
    return pack(
        {
            "versions": [body.version_min, body.version_max],
            "cluster": identity.cluster,
            "node": identity.node,
            "role": str(identity.role),
            "incarnation": identity.incarnation,
            "software": identity.software,
            "nonce": body.nonce,
            "secured": body.secured,
        }
    )


_FIELDS: Final = (
    "versions",
    "cluster",
    "node",
    "role",
    "incarnation",
    "software",
    "nonce",
    "secured",
)


def _decode_body(encoded: bytes) -> _Body:
    fields = unpack_small(encoded)
    if type(fields) is not dict:
        raise ProtocolError("a hello is not a map")
    values: list[Any] = [fields.get(name) for name in _FIELDS]
    versions, cluster, node, role, incarnation, software, nonce, secured = values
    checks = {
        "versions": type(versions) is list
        and len(versions) == 2
        and all(_is_int(v, _VERSION_MAX) for v in versions)
        and versions[0] <= versions[1],
        "cluster": cluster is None or _is_id(cluster),
        "node": _is_id(node),
        "role": type(role) is str and role in set(Role),
        "incarnation": _is_int(incarnation, _UINT64_MAX),
        "software": _is_id(software),
        "nonce": type(nonce) is bytes and len(nonce) == NONCE_SIZE,
        "secured": type(secured) is bool,
    }
    for name, good in checks.items():
        if not good:
            raise ProtocolError(f"a hello with a bad or missing {name}")
    identity = Identity(cluster, node, Role(role), incarnation, software)
    return _Body(identity, versions[0], versions[1], nonce, secured)


def _is_int(value: Any, highest: int) -> bool:
    return type(value) is int and 0 <= value <= highest


def _is_id(value: Any) -> bool:
    """Whether it can be shown in a log line as it is."""
    return (
        type(value) is str
        and 0 < len(value) <= ID_MAX
        and value.isascii()
        and value.isprintable()
        and " " not in value
    )


def _refused(body: bytes) -> TorusError:
    """The error that the other side refused with."""
    fields = unpack_small(body)
    if not (type(fields) is list and len(fields) == 2 and all(type(f) is str for f in fields)):
        return ProtocolError("a refusal in the handshake is not [error class, text]")
    name, text = fields
    # From a stranger, and meant for a log: kept to one line of plain characters.
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:ERROR_TEXT_MAX])
    error = _REFUSALS.get(name, ProtocolError)(f"refused by the other side: {shown}")
    error.from_other_side = True  # type: ignore[attr-defined]
    return error
