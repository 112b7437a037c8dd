from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from crc32c import crc32c

from torus_actors.errors import Invalid, ProtocolError
from torus_actors.wire.frames import HEADER_SIZE, Buffer, Frame, FrameDecoder, Kind, encode
from torus_actors.wire.limits import (
    DIRECT_PAYLOAD_MIN,
    HELLO_MAX,
    METADATA_MAX,
    PAYLOAD_MAX,
    PEEK_BYTES,
    RECEIVE_BUFFER_SIZE,
)


def joined(buffers: list[Buffer]) -> bytes:
    """What the socket would carry."""
    return b"".join(buffers)


def opened(allocate: Callable[[int], memoryview] | None = None) -> FrameDecoder:
    """A decoder behind its handshake."""
    if allocate is None:
        return FrameDecoder(restricted=False)
    return FrameDecoder(allocate, restricted=False)


def test_header_layout() -> None:
    """The header is what docs/wire.md says, byte for byte."""
    frame = joined(encode(Kind.CALL, 0x0102030405060708, b"meta", [b"pay", b"load"]))
    assert frame == (
        b"TrsA"
        + struct.pack("<I", crc32c(frame[8:36]))
        + struct.pack("<BBHIII", 1, 2, 1, 4, 7, crc32c(b"payload"))
        + bytes([8, 7, 6, 5, 4, 3, 2, 1])
        + b"metapayload"
    )
    assert [k.value for k in Kind] == [1, 2, 3, 4, 5, 6, 7]


def test_payload_is_neither_copied_nor_joined() -> None:
    """The payload's own buffers are handed on to be sent."""
    parts: list[Buffer] = [bytearray(10), memoryview(bytes(20)), b"x" * 30]
    sent = encode(Kind.REPLY, 1, b"", parts)
    assert len(sent) == 4
    assert all(a is b for a, b in zip(sent[1:], parts, strict=True))


def test_wide_memoryviews_count_in_bytes() -> None:
    """A view of larger items counts by its bytes, not by its items."""
    view = memoryview(bytearray(range(16))).cast("I")
    (frame,) = opened().feed(joined(encode(Kind.CALL, 1, b"", [view])))
    assert frame.payload == bytes(range(16))


@pytest.mark.parametrize("size", [1, 4096, DIRECT_PAYLOAD_MIN, 300_000])
@pytest.mark.parametrize("meta_size", [0, 5, 200_000])
def test_round_trip(size: int, meta_size: int) -> None:
    """What is sent arrives, whether it fits the receive buffer or not."""
    payload = bytes(range(251)) * (size // 251 + 1)
    meta = b"m" * meta_size
    (frame,) = opened().feed(joined(encode(Kind.REPLY, 9, meta, [payload[:size]])))
    assert (frame.kind, frame.request_id, bytes(frame.meta)) == (Kind.REPLY, 9, meta)
    assert frame.payload == payload[:size]
    assert frame.kind is Kind.REPLY


def test_no_payload_and_an_empty_one_are_told_apart() -> None:
    """None where no payload was sent, an empty buffer where an empty one was."""
    for meta in (b"", b"m" * 200_000):
        none, empty = opened().feed(
            joined(encode(Kind.CALL, 1, meta)) + joined(encode(Kind.CALL, 2, meta, [b""]))
        )
        assert none.payload is None
        assert empty.payload is not None
        assert len(empty.payload) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (Kind.CALL, 1 << 64),
        (Kind.CALL, -1),
        (Kind.CALL, 0, bytes(METADATA_MAX + 1)),
        (Kind.CALL, 0, b"", [bytes(PAYLOAD_MAX), b"x"]),
    ],
    ids=["id too large", "id negative", "metadata", "payload"],
)
def test_the_sender_keeps_the_limits(arguments: tuple[object, ...]) -> None:
    """What is over a limit is refused before it is sent."""
    with pytest.raises(Invalid):
        encode(*arguments)  # type: ignore[arg-type]


def test_the_largest_frame_arrives() -> None:
    """The limits themselves are allowed."""
    (frame,) = opened().feed(
        joined(encode(Kind.CALL, (1 << 64) - 1, bytes(METADATA_MAX), [bytes(PAYLOAD_MAX)]))
    )
    assert len(frame.meta) == METADATA_MAX
    assert frame.payload is not None
    assert frame.payload.nbytes == PAYLOAD_MAX


def test_large_payload_is_received_in_place() -> None:
    """A large payload is received into memory from ``allocate`` without a copy."""
    given: list[memoryview] = []

    def allocate(size: int) -> memoryview:
        given.append(memoryview(bytearray(size)))
        return given[-1]

    decoder = opened(allocate)
    payload = b"p" * 500_000
    data = joined(encode(Kind.CALL, 1, b"meta", [payload]))
    assert decoder.feed(data[: HEADER_SIZE + 4 + 1000]) == []
    assert [g.nbytes for g in given] == [500_000]
    room = decoder.get_buffer(-1)
    assert room.obj is given[0].obj
    assert room.nbytes == 499_000
    room[:] = payload[1000:]
    (frame,) = decoder.buffer_updated(499_000)
    assert frame.payload is given[0]


def test_behind_a_large_payload_little_is_read_at_first() -> None:
    """Of the next large payload nearly nothing is copied; then reads are large again."""
    decoder = opened()
    large = joined(encode(Kind.CALL, 1, b"meta", [bytes(500_000)]))
    small = joined(encode(Kind.CALL, 2, b"meta", [b"x" * 5000]))
    assert len(decoder.feed(large)) == 1
    room = decoder.get_buffer(-1)
    assert room.nbytes == PEEK_BYTES
    room[:] = small[:PEEK_BYTES]
    assert decoder.buffer_updated(PEEK_BYTES) == []
    assert decoder.get_buffer(-1).nbytes > RECEIVE_BUFFER_SIZE // 2
    (frame,) = decoder.feed(small[PEEK_BYTES:])
    assert frame.payload == b"x" * 5000


@pytest.mark.parametrize("size", [10, 5000, 500_000])
def test_a_payload_may_be_left_to_its_reader_to_check(size: int) -> None:
    """Of a payload that carries its own checksums the frame has none; damage then gets through."""
    data = bytearray(joined(encode(Kind.REPLY, 1, b"meta", [bytes(size)], checked=True)))
    data[-1] ^= 1
    (frame,) = opened().feed(data)
    assert frame.payload is not None
    assert frame.payload[-1] == 1
    data[HEADER_SIZE] ^= 1
    with pytest.raises(ProtocolError, match="checksum"):
        opened().feed(data)


def test_nothing_is_allocated_for_a_frame_that_is_damaged() -> None:
    """A flipped bit in a length is found before memory is taken for it."""

    def allocate(size: int) -> memoryview:
        raise AssertionError(f"asked for {size} bytes")

    data = bytearray(joined(encode(Kind.CALL, 1, b"meta", [bytes(100_000)])))
    data[18] ^= 0x02  # in the payload length: 131,072 bytes more
    with pytest.raises(ProtocolError, match="checksum"):
        opened(allocate).feed(data)


def test_frames_never_refer_to_the_reused_buffer() -> None:
    """Frames stay as they are when more is received."""
    decoder = opened()
    (first,) = decoder.feed(joined(encode(Kind.CALL, 1, b"meta", [b"payload"])))
    decoder.feed(joined(encode(Kind.CALL, 2, b"atem", [b"daolyap"])))
    assert (first.meta, first.payload) == (b"meta", b"payload")


def corrupt(offset: int, fmt: str, value: object, payload: bytes = b"payload") -> bytes:
    """A frame with one header field replaced and its checksum made right again."""
    data = bytearray(joined(encode(Kind.CALL, 1, b"meta", [payload])))
    struct.pack_into(fmt, data, offset, value)
    if offset >= 8:
        struct.pack_into("<I", data, 4, crc32c(data[8:36]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (corrupt(0, "<4s", b"GET "), "not a frame"),
        (corrupt(4, "<I", 1), "header or metadata does not match"),
        (corrupt(8, "<B", 2), "version 2"),
        (corrupt(9, "<B", 0), "kind 0"),
        (corrupt(9, "<B", 8), "kind 8"),
        (corrupt(10, "<H", 2), "flags 0x2"),
        (corrupt(10, "<H", 4), "flags 0x4"),
        (corrupt(10, "<H", 0), "says it has none"),
        (corrupt(12, "<I", METADATA_MAX + 1), "metadata in a frame: the limit is 1048576"),
        (corrupt(16, "<I", PAYLOAD_MAX + 1), f"payload in a frame: the limit is {PAYLOAD_MAX}"),
        (corrupt(20, "<I", 1), "payload does not match"),
        (corrupt(20, "<I", 1, bytes(100_000)), "payload does not match"),
        (corrupt(20, "<I", 1, bytes(300_000)), "payload does not match"),
    ],
)
def test_broken_rules_are_protocol_errors(data: bytes, reason: str) -> None:
    """Each rule has a plain reason, and a decoder that failed once stays failed."""
    decoder = opened()
    with pytest.raises(ProtocolError, match=reason):
        decoder.feed(data)
    assert decoder.get_buffer(-1).nbytes > 0
    with pytest.raises(ProtocolError, match=reason):
        decoder.feed(joined(encode(Kind.PING, 1)))


def test_damaged_large_metadata() -> None:
    """Metadata larger than the receive buffer is verified too."""
    data = bytearray(joined(encode(Kind.CALL, 1, bytes(200_000))))
    data[150_000] = 1
    with pytest.raises(ProtocolError, match="header or metadata"):
        opened().feed(data)


def test_restricted_decoder_takes_only_small_frames() -> None:
    """Before the handshake is done a frame over HELLO_MAX, or with a payload, is refused."""
    assert len(FrameDecoder().feed(joined(encode(Kind.HELLO, 0, bytes(HELLO_MAX))))) == 1
    with pytest.raises(ProtocolError, match="before the handshake is done: the limit is 65536"):
        FrameDecoder().feed(joined(encode(Kind.HELLO, 0, bytes(HELLO_MAX + 1)))[:HEADER_SIZE])
    with pytest.raises(ProtocolError, match="before the handshake is done: the limit is 0"):
        FrameDecoder().feed(joined(encode(Kind.HELLO, 0, b"", [b"x"]))[:HEADER_SIZE])


@pytest.mark.parametrize("through_feed", [True, False])
@pytest.mark.parametrize("size", [10, 90_000, 600_000])
def test_calls_right_behind_the_last_hello(through_feed: bool, size: int) -> None:
    """What comes in the same read as the last hello is held back, then has the full limits."""
    call = joined(encode(Kind.CALL, 5, b"call", [bytes(size)]))
    data = joined(encode(Kind.HELLO, 0, b"hi")) + call + call
    decoder = FrameDecoder()
    frames: list[Frame]
    if through_feed:
        (hello,) = decoder.feed(data)
        frames = decoder.lift_limits()
    else:
        room = decoder.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count] = data[:count]
        (hello,) = decoder.buffer_updated(count)
        frames = decoder.lift_limits()
        frames += decoder.feed(data[count:])
    assert hello.kind is Kind.HELLO
    assert [f.payload.nbytes for f in frames if f.payload is not None] == [size, size]


def test_restricted_decoder_gives_one_frame_at_a_time() -> None:
    """Held back frames come out one by one until the limits are lifted."""
    hello = joined(encode(Kind.HELLO, 0, b"hi"))
    decoder = FrameDecoder()
    assert len(decoder.feed(hello * 3)) == 1
    assert len(decoder.feed(hello)) == 1
    assert len(decoder.lift_limits()) == 2
