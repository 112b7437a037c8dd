from __future__ import annotations

from typing import Any, Literal

import pytest

from torus_actors.errors import Invalid, ProtocolError, TorusError, Unauthenticated
from torus_actors.wire.codec import pack, unpack
from torus_actors.wire.frames import Buffer, Frame, FrameDecoder, Kind, encode
from torus_actors.wire.hello import Hello, Identity, Role, shut_out
from torus_actors.wire.limits import HELLO_MAX

SECRET = b"sixteen or more bytes"
OTHER_SECRET = b"another secret of 16+"
NONCES = {"dial": b"d" * 32, "accept": b"a" * 32}


def make(
    side: Literal["dial", "accept"],
    *,
    secret: bytes | None = SECRET,
    cluster: str | None = "blue",
    nonce: bytes | None = None,
    versions: tuple[int, int] = (1, 1),
) -> Hello:
    """One side of a handshake."""
    role = Role.CLIENT if side == "dial" else Role.NODE
    identity = Identity(cluster, f"{side}-1", role, 7, "0.1.0")
    return Hello(side, identity, secret, nonce or NONCES.get(side, b"x" * 32), versions=versions)


def framed(buffers: list[Buffer]) -> Frame:
    """What the other side receives."""
    (frame,) = FrameDecoder().feed(b"".join(buffers))
    return frame


def shake(dial: Hello, accept: Hello) -> tuple[TorusError | None, TorusError | None]:
    """Run a handshake to its end; what each side raised."""
    sides, turn = (accept, dial), 0
    result: list[TorusError | None] = [None, None]
    assert accept.start() == []
    out = dial.start()
    while out:
        try:
            out = sides[turn].receive(framed(out))
        except (ProtocolError, Unauthenticated) as error:
            result[turn] = error
            out = sides[turn].refusal(error)
        turn = 1 - turn
    return result[1], result[0]


@pytest.mark.parametrize("secret", [SECRET, None])
@pytest.mark.parametrize("dialer", ["blue", None])
@pytest.mark.parametrize("accepter", ["blue", None])
def test_friends_meet(secret: bytes | None, dialer: str | None, accepter: str | None) -> None:
    """Sides with the same secret, or both without, and no two different clusters, meet."""
    dial, accept = (
        make("dial", secret=secret, cluster=dialer),
        make("accept", secret=secret, cluster=accepter),
    )
    assert shake(dial, accept) == (None, None)
    assert dial.done and accept.done
    for hello, them, cluster, role in (
        (dial, "accept-1", accepter, Role.NODE),
        (accept, "dial-1", dialer, Role.CLIENT),
    ):
        peer = hello.peer
        assert (peer.node, peer.cluster, peer.role) == (them, cluster, role)
        assert (peer.incarnation, peer.software, peer.version) == (7, "0.1.0", 1)
        assert peer.authenticated is (secret is not None)


@pytest.mark.parametrize(
    ("dial_secret", "accept_secret", "reason"),
    [
        (SECRET, OTHER_SECRET, "node accept-1 does not know the secret of this cluster"),
        (SECRET, None, "client dial-1 has a cluster secret, node accept-1 has none"),
        (None, SECRET, "client dial-1 has no cluster secret, node accept-1 has one"),
    ],
)
def test_secrets_must_be_equal(
    dial_secret: bytes | None, accept_secret: bytes | None, reason: str
) -> None:
    """Without the same secret nobody gets in, and both sides learn why."""
    dial, accept = make("dial", secret=dial_secret), make("accept", secret=accept_secret)
    failures = shake(dial, accept)
    for failure in failures:
        assert type(failure) is Unauthenticated
        assert reason in str(failure)
    assert not dial.done and not accept.done


def test_another_cluster_is_refused() -> None:
    """Two different clusters never mix, and both sides say which they are."""
    failures = shake(make("dial", cluster="blue"), make("accept", cluster="red"))
    for failure in failures:
        assert type(failure) is Unauthenticated
        assert "client dial-1 belongs to cluster blue, not red" in str(failure)
    assert "refused by the other side" in str(failures[0])


def test_who_is_shut_out_learns_what_to_do() -> None:
    """The nodes' secret helps where secrets differ, and nowhere else.

    Found by review: a client that met nodes of another cluster was told to give their secret.
    """
    told = {}
    for case, dial, accept in (
        ("wrong", make("dial", secret=OTHER_SECRET), make("accept", secret=SECRET)),
        ("none", make("dial", secret=None), make("accept", secret=SECRET)),
        ("needless", make("dial", secret=SECRET), make("accept", secret=None)),
        ("elsewhere", make("dial", cluster="blue"), make("accept", cluster="red")),
    ):
        told[case] = str(shake(dial, accept)[0])
    wrong, none, needless, elsewhere = told.values()
    for reasons, advice in (
        ([wrong], f"{wrong}; give the --secret-file of the nodes"),
        ([none], f"{none}; give the --secret-file of the nodes"),
        ([needless], f"{needless}; leave out the --secret-file: the nodes have none"),
        ([elsewhere], elsewhere),
        ([elsewhere, none], f"{none}; give the --secret-file of the nodes"),
    ):
        assert str(shut_out("nobody answers", reasons)) == f"nobody answers: {advice}"


@pytest.mark.parametrize(
    ("dialer", "accepter", "version"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 9), (1, 4), 4), ((3, 3), (1, 9), 3)],
)
def test_the_highest_common_version_is_chosen(
    dialer: tuple[int, int], accepter: tuple[int, int], version: int
) -> None:
    """Both sides come to the same, highest version."""
    dial, accept = make("dial", versions=dialer), make("accept", versions=accepter)
    assert shake(dial, accept) == (None, None)
    assert dial.peer.version == accept.peer.version == version


@pytest.mark.parametrize(("dialer", "accepter"), [((1, 1), (2, 3)), ((4, 5), (2, 3))])
def test_no_common_version(dialer: tuple[int, int], accepter: tuple[int, int]) -> None:
    """Sides without a common version part with a plain ProtocolError on both."""
    failures = shake(make("dial", versions=dialer), make("accept", versions=accepter))
    for failure in failures:
        assert type(failure) is ProtocolError
        assert f"speaks {dialer[0]} to {dialer[1]}, node accept-1 (0.1.0) " in str(failure)


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    """The frames of a good dialer do not open a second connection."""
    dial, accept = make("dial"), make("accept")
    first = dial.start()
    last = dial.receive(framed(accept.receive(framed(first))))
    accept.receive(framed(last))
    assert accept.done
    again = make("accept", nonce=b"n" * 32)
    again.receive(framed(first))
    with pytest.raises(Unauthenticated, match="does not know the secret"):
        again.receive(framed(last))
    assert not again.done


def test_a_recorded_answer_cannot_be_replayed() -> None:
    """The frames of a good listener do not satisfy a second dialer."""
    answer = framed(make("accept").receive(framed(make("dial").start())))
    again = make("dial", nonce=b"n" * 32)
    again.start()
    with pytest.raises(Unauthenticated, match="does not know the secret"):
        again.receive(answer)


def test_a_dialer_is_not_fooled_by_its_own_words() -> None:
    """Reflection: a dialer's own hello, as it is or relabelled, is no answer."""
    dial = make("dial")
    own = framed(dial.start())
    with pytest.raises(ProtocolError, match="'dial' in the handshake, where 'accept'"):
        dial.receive(own)
    dial = make("dial")
    _, body, _ = unpack(framed(dial.start()).meta)
    with pytest.raises(Unauthenticated, match="nonce"):
        dial.receive(framed(encode(Kind.HELLO, 0, pack(["accept", body, b"x" * 32]))))


def test_a_listener_is_not_fooled_by_its_own_proof() -> None:
    """Reflection: the listener's proof, sent back, does not prove the dialer."""
    accept = make("accept")
    _, _, proof = unpack(framed(accept.receive(framed(make("dial").start()))).meta)
    with pytest.raises(Unauthenticated, match="client dial-1 does not know"):
        accept.receive(framed(encode(Kind.HELLO, 0, pack(["prove", b"", proof]))))


def test_a_second_listener_cannot_be_used_as_an_oracle() -> None:
    """Reflection between connections: what a listener proves elsewhere is of no use to a dialer."""
    victim = make("accept")
    challenge = unpack(framed(victim.receive(framed(make("dial").start()))).meta)
    oracle = make("accept", nonce=b"o" * 32)
    _, _, proof = unpack(
        framed(
            oracle.receive(framed(encode(Kind.HELLO, 0, pack(["dial", challenge[1], None]))))
        ).meta
    )
    with pytest.raises(Unauthenticated):
        victim.receive(framed(encode(Kind.HELLO, 0, pack(["prove", b"", proof]))))


FIELDS = {
    "versions": [1, 9],
    "cluster": None,
    "node": "mallory",
    "role": "node",
    "incarnation": 8,
    "software": "0.2.0",
    "nonce": b"m" * 32,
    "extra": 1,
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("step", ["dial", "accept"])
def test_nothing_can_be_changed_on_the_way(step: str, field: str) -> None:
    """With a secret, a changed field in either body fails the handshake (no downgrade either)."""
    dial, accept = make("dial"), make("accept")

    def tamper(buffers: list[Buffer]) -> Frame:
        frame = framed(buffers)
        name, body, proof = unpack(frame.meta)
        if name == step:
            changed = unpack(body) | {field: FIELDS[field]}
            if changed == unpack(body):
                changed["role"] = "client"
            body = pack(changed)
        return framed(encode(Kind.HELLO, 0, pack([name, body, proof])))

    with pytest.raises(Unauthenticated, match="does not know the secret"):
        accept.receive(tamper(dial.receive(tamper(accept.receive(tamper(dial.start()))))))
    assert not accept.done


def test_unknown_fields_are_passed_over() -> None:
    """A later version may say more of itself."""
    accept = make("accept", secret=None)
    _, body, _ = unpack(framed(make("dial", secret=None).start()).meta)
    body = pack(unpack(body) | {"later": [1, 2]})
    assert accept.receive(framed(encode(Kind.HELLO, 0, pack(["dial", body, None]))))


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.HELLO])
@pytest.mark.parametrize("side", ["dial", "accept"])
def test_other_frames_must_wait(side: Literal["dial", "accept"], kind: Kind) -> None:
    """Before the handshake is done, any other kind of frame breaks the protocol."""
    with pytest.raises(ProtocolError, match=f"{kind.name} frame before the handshake"):
        make(side).receive(Frame(kind, 1, b"", None))


def good_body(**changes: Any) -> bytes:
    """A body with some fields replaced, or left out."""
    _, body, _ = unpack(framed(make("dial").start()).meta)
    return pack({k: v for k, v in (unpack(body) | changes).items() if v != "absent"})


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"\xc1",
        pack(None),
        pack(["dial", good_body()]),
        pack(["dial", "text", None]),
        pack(["nonsense", good_body(), None]),
        pack([["dial"], good_body(), None]),
        pack(["dial", good_body(), b"short"]),
        pack(["dial", good_body(), b"x" * 32]),
        pack(["prove", b"", b"x" * 32]),
        pack(["accept", good_body(), b"x" * 32]),
        pack(["dial", b"", None]),
        pack(["dial", pack([]), None]),
        pack(["refuse", b"", None]),
        pack(["refuse", pack(["Unauthenticated"]), None]),
        *(
            pack(["dial", good_body(**{field: value}), None])
            for field, value in [
                ("versions", "absent"),
                ("versions", [2, 1]),
                ("versions", [1]),
                ("versions", [1, True]),
                ("versions", [1, 1 << 20]),
                ("cluster", ""),
                ("cluster", 5),
                ("node", "absent"),
                ("node", "x" * 65),
                ("node", "two words"),
                ("node", "line\nbreak"),
                ("node", "\u00e9"),
                ("role", "king"),
                ("role", []),
                ("incarnation", -1),
                ("incarnation", 1.5),
                ("software", None),
                ("nonce", b"short"),
                ("nonce", "x" * 32),
                ("secured", 1),
            ]
        ),
    ],
)
def test_malformed_hellos_are_protocol_errors(meta: bytes) -> None:
    """A hello of any other shape is ProtocolError, and the handshake is over."""
    accept = make("accept")
    with pytest.raises(ProtocolError):
        accept.receive(Frame(Kind.HELLO, 0, meta, None))
    with pytest.raises(ProtocolError, match="nothing more was expected"):
        accept.receive(framed(make("dial").start()))


def test_oversized_hellos_are_refused() -> None:
    """A hello over HELLO_MAX or with a payload is refused, whoever decoded it."""
    for frame in (
        Frame(Kind.HELLO, 0, bytes(HELLO_MAX + 1), None),
        Frame(Kind.HELLO, 0, b"", memoryview(b"")),
    ):
        with pytest.raises(ProtocolError, match="too large"):
            make("accept").receive(frame)


def test_a_late_refusal_says_why() -> None:
    """A dialer that is done already still learns why the other side ended it."""
    dial, accept = make("dial"), make("accept")
    dial.receive(framed(accept.receive(framed(dial.start()))))
    assert dial.done
    refusal = accept.refusal(Unauthenticated("node dial-1 was removed"))
    with pytest.raises(Unauthenticated, match="other side: node dial-1 was removed"):
        dial.receive(framed(refusal))


def test_refusals_are_shown_as_one_plain_line() -> None:
    """What a stranger says as its reason cannot forge lines of a log."""
    body = pack(["Fenced", "a\nb\x1b[31m\u202ec"])
    with pytest.raises(ProtocolError) as caught:
        make("dial").receive(framed(encode(Kind.HELLO, 0, pack(["refuse", body, None]))))
    assert str(caught.value) == "refused by the other side: a?b?[31m?c"


def test_no_refusal_for_a_refusal() -> None:
    """Refusing is said once, and not to a side that is in."""
    accept = make("accept")
    with pytest.raises(Unauthenticated) as caught:
        accept.receive(framed(make("dial").refusal(Unauthenticated("no"))))
    assert accept.refusal(caught.value) == []
    dial, accept = make("dial"), make("accept")
    shake(dial, accept)
    assert accept.refusal(ProtocolError("late")) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret": b"short"}, "16 or more"),
        ({"nonce": b"short"}, "nonce"),
        ({"cluster": "two words"}, "cluster"),
        ({"versions": (2, 1)}, "versions"),
    ],
)
def test_bad_arguments_are_invalid(changes: dict[str, Any], reason: str) -> None:
    """What could never succeed is refused before anything is sent."""
    with pytest.raises(Invalid, match=reason):
        make("dial", **changes)


def test_order_of_use() -> None:
    """The peer is not to be had early, and a handshake starts once."""
    dial = make("dial")
    with pytest.raises(Invalid, match="not done"):
        _ = dial.peer
    dial.start()
    with pytest.raises(Invalid, match="already"):
        dial.start()
    with pytest.raises(Invalid, match="no side"):
        make("listen")  # type: ignore[arg-type]


@pytest.mark.parametrize("proof", [None, bytes(32)])
def test_claiming_a_secret_is_not_enough(proof: bytes | None) -> None:
    """A side that says it has the secret, and sends no proof or a wrong one, stays outside."""
    dial, accept = make("dial"), make("accept")
    challenge = framed(accept.receive(framed(dial.start())))
    with pytest.raises(Unauthenticated, match="does not know the secret"):
        accept.receive(framed(encode(Kind.HELLO, 0, pack(["prove", b"", proof]))))
    _, body, _ = unpack(challenge.meta)
    with pytest.raises(Unauthenticated, match="does not know the secret"):
        dial.receive(framed(encode(Kind.HELLO, 0, pack(["accept", body, proof]))))
    assert not dial.done and not accept.done
