from __future__ import annotations

import enum
import uuid
from typing import Any, NamedTuple

import msgpack
import pytest

from torus_actors.errors import Invalid, ProtocolError
from torus_actors.model.refs import BlockRef, INodeRef
from torus_actors.wire.codec import pack, unpack, unpack_small
from torus_actors.wire.limits import ARRAY_MAX, METADATA_MAX

BLOCK = BlockRef.of(7, 8, 9)
INODE = INodeRef.of(7, 8)
ID = uuid.UUID(int=1 << 100)


class Pair(NamedTuple):
    """A tuple with names."""

    left: int
    right: int


class Colour(enum.IntEnum):
    """An int that is more than an int."""

    RED = 1


@pytest.mark.parametrize("value", [BLOCK, INODE, ID, [BLOCK, {"k": [INODE, ID]}], {BLOCK: 1}])
def test_refs_and_uuids_keep_their_types(value: Any) -> None:
    """A ref or UUID arrives as what it was, not as plain bytes, wherever it stands."""
    found = unpack(pack(value))
    assert found == value
    assert repr(found) == repr(value)


def test_plain_bytes_stay_plain() -> None:
    """Bytes of a ref's length that are no ref arrive as bytes."""
    assert type(unpack(pack(bytes(BLOCK)))) is bytes


def test_tuples_arrive_as_lists() -> None:
    """Tuples, named ones too, are arrays on the wire and lists after it."""
    assert unpack(pack((1, (2, Pair(3, 4))))) == [1, [2, [3, 4]]]


def test_buffers_arrive_as_bytes() -> None:
    """A bytearray or memoryview is sent by its content."""
    assert unpack(pack([bytearray(b"a"), memoryview(b"b")])) == [b"a", b"b"]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        Colour.RED,
        1 << 64,
        -(1 << 63) - 1,
        "\ud800",
        memoryview(b"abcd")[::2],
        bytes(METADATA_MAX + 1),
        [None] * (ARRAY_MAX + 1),
        dict.fromkeys(range(ARRAY_MAX + 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sent_is_refused_here(value: Any) -> None:
    """What the other side would end the connection for never leaves this one."""
    with pytest.raises(Invalid, match="sent"):
        pack(value)
    assert unpack(pack([1])) == [1], "the failure left nothing behind"


def test_endless_nesting_cannot_be_sent() -> None:
    """A list that contains itself is refused instead of ending the process."""
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(Invalid):
        pack(knot)


def test_the_largest_batches_can_be_sent() -> None:
    """Batches that fit METADATA_MAX and ARRAY_MAX arrive."""
    refs = [BlockRef.of(1, 2, i) for i in range(38_000)]
    assert unpack(pack(refs)) == refs
    assert unpack(pack([None] * ARRAY_MAX)) == [None] * ARRAY_MAX


def test_packing_from_within_packing() -> None:
    """The codec is reentrant: a packer in use is not taken a second time."""

    class Sneaky(tuple[Any, ...]):
        def __iter__(self) -> Any:
            yield pack(["inner"])

    assert unpack(unpack(pack(["outer", Sneaky((0,))]))[1][0]) == ["inner"]


BAD = {
    "empty": b"",
    "truncated": b"\x92\x01",
    "trailing": b"\x01\x02",
    "reserved byte": b"\xc1",
    "bad utf-8": b"\xa1\xff",
    "bad timestamp": b"\xc7\x01\xff\x00",
    "unknown ext": b"\xd4\x05\x00",
    "short block ref": b"\xd8\x01" + bytes(16),
    "long inode ref": b"\xc7\x18\x02" + bytes(24),
    "short uuid": b"\xd4\x03\x00",
    "list as key": b"\x81\x90\x01",
    "map as key": b"\x81\x80\x01",
    "float as key": b"\x81\xcb" + bytes(8) + b"\x01",
    "uuid as key": b"\x81" + pack(ID) + b"\x01",
    "same key twice": b"\x82\x01\x01\x01\x02",
    "huge array": b"\xdd\xff\xff\xff\xff",
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge string": b"\xdb\xff\xff\xff\xff",
    "huge ext": b"\xc9\xff\xff\xff\xff\x01",
    "deep": b"\x91" * 5000,
    "nested huge arrays": b"\xdd\x00\x01\x00\x00" * 5000,
    "too long": pack(bytes(METADATA_MAX - 5)) + bytes(1000),
    "array over bound": msgpack.packb([None] * (ARRAY_MAX + 1)),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_metadata_is_a_protocol_error(data: bytes) -> None:
    """Whatever is wrong with metadata, it is ProtocolError with a reason, and nothing else."""
    for decode in (unpack, unpack_small):
        with pytest.raises(ProtocolError, match="metadata"):
            decode(data)


def test_a_stranger_may_send_only_small_arrays() -> None:
    """Before the handshake is done, arrays and maps are bounded more tightly."""
    assert unpack_small(pack([0] * 64)) == [0] * 64
    for large in ([0] * 65, dict.fromkeys(range(65), 0)):
        with pytest.raises(ProtocolError):
            unpack_small(pack(large))


def test_nothing_refers_to_the_input() -> None:
    """A decoded value stays as it is when the buffer it was read from is reused."""
    buffer = bytearray(pack([b"abcdefgh", "ijklmnop", BLOCK]))
    value = unpack(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert value == [b"abcdefgh", "ijklmnop", BLOCK]
