"""What every ring has in common: its fields, how it is changed, and the registry of types.

A ring is an immutable value. Peers are kept sorted by id, so that two rings with the same peers are
equal, and place blocks alike, whatever order the peers came in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, TypeVar

from torus_actors.errors import Invalid
from torus_actors.model.peers import Peer, PeerList

REPLICATION_MAX = 16
"""Most copies of a block; more is surely a slip, and every write waits for all of them."""

MEMBERS_MAX = 256
"""Most peers of one ring: the sizes for which building it and asking it were measured."""

VERSION_MAX = 1 << 62

GROWN_KIND = "ketama"
"""What an empty or single ring becomes when it is given another peer."""


class Ring(ABC):
    """Maps a block ref to the peers that should hold it, in order of preference.

    Args:
        version: counts changes; metadata accepts only the successor of what it has.
        replication: how many of a permutation's first peers should hold a block. A ring may have
            fewer members: its permutations are then shorter, and that is not an error.
        peers: the members, in any order.

    Raises:
        Invalid: a value is out of range, or a peer is listed twice.
    """

    kind: ClassVar[str]
    __slots__ = ("_members", "_peers", "_replication", "_version")

    def __init__(self, version: int, replication: int, peers: Iterable[Peer] = ()) -> None:
        if type(version) is not int or not 0 <= version <= VERSION_MAX:
            raise Invalid(f"ring version {version!r} is out of range")
        if type(replication) is not int or not 1 <= replication <= REPLICATION_MAX:
            raise Invalid(f"replication must be 1 to {REPLICATION_MAX}, not {replication!r}")
        self._version = version
        self._replication = replication
        self._peers = tuple(sorted(peers, key=lambda peer: peer.peer_id))
        self._members = PeerList(peer.peer_id for peer in self._peers)
        if len(self._peers) > MEMBERS_MAX:
            raise Invalid(f"a ring has at most {MEMBERS_MAX} peers, not {len(self._peers)}")
        if len(set(self._members)) != len(self._members):
            raise Invalid("a peer is listed twice in the ring")

    # --- what it is -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of this ring in the sequence of changes."""
        return self._version

    @property
    def replication(self) -> int:
        """Wanted copies of each block."""
        return self._replication

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The members as peers, sorted by id."""
        return self._peers

    @property
    def members(self) -> PeerList:
        """The members' ids, sorted."""
        return self._members

    @abstractmethod
    def permutation(self, ref: bytes) -> PeerList:
        """All members, each once, in the order in which they should hold or be asked for ``ref``.

        Args:
            ref: the block ref, 24 bytes.

        Returns:
            A shared tuple: the same object for every ref that is placed alike.
        """

    def owners(self, ref: bytes) -> PeerList:
        """The peers that should hold ``ref``: the permutation's first ``replication``."""
        return PeerList(self.permutation(ref)[: self._replication])

    def prepare(self) -> None:  # noqa: B027 - most types have nothing to prepare
        """Compute now what the first ``permutation`` would otherwise compute.

        For a large ring that can take a quarter of a second. It may run in another thread than
        the one that will use the ring, as long as nobody uses the ring before it is done.
        """

    def describe(self) -> str:
        """Several lines for a person."""
        lines = [f"{self.kind} ring, version {self.version}, replication {self.replication}"]
        for peer in self._peers:
            zone = f", zone {peer.zone}" if peer.zone else ""
            address = f" at {peer.address}" if peer.address else ""
            lines.append(f"  {peer.peer_id}{address}, {peer.weight_bytes} bytes{zone}")
        if not self._peers:
            lines.append("  no peers")
        return "\n".join(lines)

    # --- changes --------------------------------------------------------------------------------

    def with_replication(self, replication: int) -> Ring:
        """The next version, with another replication."""
        return self._next(replication=replication)

    def with_peer(self, peer: Peer) -> Ring:
        """The next version, with ``peer`` added, or replaced if its id is a member."""
        others = [old for old in self._peers if old.peer_id != peer.peer_id]
        return self._next(peers=[*others, peer])

    def without_peer(self, peer_id: str) -> Ring:
        """The next version, without that peer.

        Raises:
            Invalid: it is not a member.
        """
        if peer_id not in self._members:
            raise Invalid(f"peer {peer_id} is not in the ring")
        return self._next(peers=[peer for peer in self._peers if peer.peer_id != peer_id])

    def with_type(self, kind: str) -> Ring:
        """The next version, as a ring of another type over the same peers."""
        return ring_class(kind).build(self.version + 1, self.replication, self._peers, {})

    def _next(self, *, replication: int | None = None, peers: Iterable[Peer] | None = None) -> Ring:
        return type(self).build(
            self.version + 1,
            self.replication if replication is None else replication,
            self._peers if peers is None else peers,
            self.params(),
        )

    # --- as data --------------------------------------------------------------------------------

    def params(self) -> dict[str, object]:
        """What this type needs to be rebuilt beside version, replication and peers."""
        return {}

    @classmethod
    def build(
        cls,
        version: int,
        replication: int,
        peers: Iterable[Peer],
        params: Mapping[str, object],
    ) -> Ring:
        """Make a ring of this type; the reverse of reading its fields and ``params``.

        Raises:
            Invalid: the values do not make such a ring.
        """
        _no_params(cls.kind, params)
        return cls(version, replication, peers)

    def _identity(self) -> tuple[object, ...]:
        params = tuple(sorted(self.params().items()))
        return (self.kind, self.version, self.replication, self._peers, params)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ring):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(version={self.version}, replication={self.replication},"
            f" peers={len(self._peers)})"
        )


RING_TYPES: dict[str, type[Ring]] = {}
"""Every known type by its name; ``register_ring`` adds one."""

_R = TypeVar("_R", bound=type[Ring])


def register_ring(kind: str) -> Callable[[_R], _R]:
    """Class decorator: make a ring type known under ``kind``.

    Raises:
        Invalid: the name is taken.
    """

    def add(cls: _R) -> _R:
        if kind in RING_TYPES:
            raise Invalid(f"ring type {kind} is already registered")
        cls.kind = kind
        RING_TYPES[kind] = cls
        return cls

    return add


def ring_class(kind: str) -> type[Ring]:
    """The type of that name.

    Raises:
        Invalid: there is none.
    """
    try:
        return RING_TYPES[kind]
    except (KeyError, TypeError):
        known = ", ".join(sorted(RING_TYPES))
        raise Invalid(f"no ring type {kind!r}; there are {known}") from None


def _no_params(kind: str, params: Mapping[str, object]) -> None:
    if params:
        raise Invalid(f"a {kind} ring does not take {', '.join(sorted(map(str, params)))}")
