from __future__ import annotations

from typing import Any

import pytest

from torus_actors.errors import (
    BY_NAME,
    BlockUnavailable,
    Corruption,
    DeadlineExceeded,
    Invalid,
    ProtocolError,
    TorusError,
)
from torus_actors.model.refs import BlockRef
from torus_actors.wire.codec import pack
from torus_actors.wire.limits import (
    ERROR_ATTRIBUTE_MAX,
    ERROR_TEXT_MAX,
    NAME_MAX,
    TIMEOUT_MAX_MS,
)
from torus_actors.wire.messages import (
    decode_call,
    decode_error,
    decode_reply,
    encode_call,
    encode_error,
    encode_reply,
)

REF = BlockRef.of(1, 2, 3)


def test_call_round_trip() -> None:
    """A call arrives with its fields and the types of its arguments."""
    call = decode_call(encode_call("block_store", "get", (REF, 0, None), 1500))
    assert call == ("block_store", "get", [REF, 0, None], 1500)
    assert type(call.args[0]) is BlockRef
    assert (call.actor, call.method, call.timeout_ms) == ("block_store", "get", 1500)


@pytest.mark.parametrize(
    "arguments",
    [
        ("", "m", (), 1),
        ("a", "", (), 1),
        ("a" * (NAME_MAX + 1), "m", (), 1),
        ("a", "m", (), -1),
        ("a", "m", (), TIMEOUT_MAX_MS + 1),
        ("a", "m", (object(),), 1),
    ],
)
def test_calls_out_of_range_are_not_sent(arguments: tuple[Any, ...]) -> None:
    """What the other side would refuse is refused at the sender."""
    with pytest.raises(Invalid):
        encode_call(*arguments)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {},
        [],
        ["a", "m", []],
        ["a", "m", [], 1, 1],
        [b"a", "m", [], 1],
        ["a", 1, [], 1],
        ["a", "m", None, 1],
        ["a", "m", {}, 1],
        ["a", "m", [], 1.0],
        ["a", "m", [], True],
        ["a", "m", [], None],
        ["a", "m", [], -1],
        ["a", "m", [], TIMEOUT_MAX_MS + 1],
        ["", "m", [], 1],
        ["a", "", [], 1],
        ["a", "m" * (NAME_MAX + 1), [], 1],
    ],
)
def test_malformed_calls_are_protocol_errors(fields: Any) -> None:
    """A call of any other shape never reaches an actor."""
    with pytest.raises(ProtocolError, match="call"):
        decode_call(pack(fields))


@pytest.mark.parametrize("result", [None, 1, [REF], {"a": [1]}, b"bytes"])
def test_reply_round_trip(result: Any) -> None:
    """A result arrives as it was."""
    assert decode_reply(encode_reply(result)) == result


@pytest.mark.parametrize("fields", [None, [], [1, 2], {"a": 1}])
def test_malformed_replies_are_protocol_errors(fields: Any) -> None:
    """A reply of any other shape is refused."""
    with pytest.raises(ProtocolError, match="reply"):
        decode_reply(pack(fields))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_error_round_trips(name: str) -> None:
    """Each class arrives as itself, with its text and its attributes."""
    error = BY_NAME[name]("what failed")
    error.block = REF  # type: ignore[attr-defined]
    found = decode_error(encode_error(error))
    assert type(found) is type(error)
    assert str(found) == "what failed"
    assert found.block is not REF  # type: ignore[attr-defined]
    assert found.block == REF  # type: ignore[attr-defined]


def test_an_unknown_error_arrives_as_the_base() -> None:
    """An error of a newer version is a TorusError that names its class."""
    found = decode_error(pack(["TooNew", "text", {}]))
    assert type(found) is TorusError
    assert str(found) == "TooNew: text"


def test_a_private_subclass_goes_as_its_known_base() -> None:
    """A class that only the sender has arrives as its nearest base that both have."""

    class Local(Corruption):
        pass

    assert type(decode_error(encode_error(Local("x")))) is Corruption


def test_a_class_with_other_arguments_is_rebuilt() -> None:
    """Errors whose constructor takes other arguments arrive by text and attributes."""

    class Odd(BlockUnavailable):
        tried: list[str] = []

        def __init__(self, ref: BlockRef, tried: list[str]) -> None:
            super().__init__(f"{ref} nowhere")
            self.tried = tried

    BY_NAME["Odd"] = Odd
    try:
        found = decode_error(encode_error(Odd(REF, ["n1"])))
    finally:
        del BY_NAME["Odd"]
    assert isinstance(found, Odd)
    assert found.tried == ["n1"]
    assert "nowhere" in str(found)


def test_attributes_cannot_replace_behaviour() -> None:
    """Attributes from the wire never touch what the class or the language defines."""
    names = ["args", "with_traceback", "__class__", "_x", "errno", "add_note", "a b", "class_ok"]
    found = decode_error(pack(["DeadlineExceeded", "late", dict.fromkeys(names, 5)]))
    assert isinstance(found, DeadlineExceeded)
    assert found.args == ("late",)
    assert vars(found) == {"class_ok": 5}
    assert callable(found.with_traceback)


def test_an_error_can_always_be_sent() -> None:
    """Attributes that cannot travel stay here; the text is clipped and made valid."""
    error = Corruption("\ud800" + "x" * 10_000)
    error.replica = "n1"  # type: ignore[attr-defined]
    error.handle = object()  # type: ignore[attr-defined]
    error.odd_map = {1.5: 1}  # type: ignore[attr-defined]
    error.large = bytes(ERROR_ATTRIBUTE_MAX)  # type: ignore[attr-defined]
    error.add_note("private")
    found = decode_error(encode_error(error))
    assert type(found) is Corruption
    assert len(str(found)) == ERROR_TEXT_MAX
    assert vars(found) == {"replica": "n1"}


@pytest.mark.parametrize(
    "fields",
    [
        None,
        ["Invalid", "x"],
        [1, "x", {}],
        ["Invalid", b"x", {}],
        ["Invalid", "x", []],
        ["", "x", {}],
        ["x" * (NAME_MAX + 1), "x", {}],
        ["Invalid", "x" * (ERROR_TEXT_MAX + 1), {}],
    ],
)
def test_malformed_errors_are_protocol_errors(fields: Any) -> None:
    """An error of any other shape is refused."""
    with pytest.raises(ProtocolError, match="error"):
        decode_error(pack(fields))
