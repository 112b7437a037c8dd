from __future__ import annotations

import contextlib
import struct
import uuid
from typing import Any

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.errors import BY_NAME, Invalid, ProtocolError, TorusError, Unauthenticated
from torus_actors.model.refs import BlockRef, INodeRef
from torus_actors.wire.codec import pack, unpack, unpack_small
from torus_actors.wire.frames import HEADER_SIZE, Frame, FrameDecoder, Kind, encode
from torus_actors.wire.hello import Hello, Identity, Role
from torus_actors.wire.limits import (
    DIRECT_PAYLOAD_MIN,
    HELLO_MAX,
    METADATA_MAX,
    PAYLOAD_MAX,
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

KEYS = (
    st.text(max_size=5)
    | st.binary(max_size=5)
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.binary(min_size=24, max_size=24).map(BlockRef)
)
SCALARS = (
    KEYS
    | st.none()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.binary(min_size=16, max_size=16).map(INodeRef)
    | st.uuids()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)

SIZES = st.sampled_from(
    [0, 1, 31, 4096, DIRECT_PAYLOAD_MIN - 1, DIRECT_PAYLOAD_MIN, 100_000, 140_000]
) | st.integers(0, 2000)
META_SIZES = st.integers(0, 200) | st.sampled_from([1000, 70_000, 140_000])


def filled(size: int, salt: int) -> bytes:
    """Bytes that differ with their position."""
    return (bytes(range(salt, 256)) * (size // (256 - salt) + 1))[:size]


FRAMES = st.lists(
    st.tuples(
        st.sampled_from(Kind),
        st.integers(0, (1 << 64) - 1),
        META_SIZES,
        st.none() | st.lists(SIZES, min_size=1, max_size=3),
        st.integers(0, 200),
    ),
    min_size=1,
    max_size=5,
)


def types_of(value: Any) -> Any:
    """The types of a nested value, which equality alone does not compare."""
    if isinstance(value, list):
        return [types_of(v) for v in value]
    if isinstance(value, dict):
        return [(type(k), types_of(v)) for k, v in value.items()]
    return type(value)


def stream_of(specs: list[tuple[Any, ...]]) -> tuple[list[Frame], bytes]:
    """Frames as they should arrive, and the bytes that carry them."""
    frames, stream = [], b""
    for kind, request_id, meta_size, payload_sizes, salt in specs:
        meta = filled(meta_size, salt)
        parts = [filled(size, salt) for size in payload_sizes or ()]
        stream += b"".join(encode(kind, request_id, meta, parts))
        payload = memoryview(b"".join(parts)) if payload_sizes else None
        frames.append(Frame(kind, request_id, meta, payload))
    return frames, stream


def receive(decoder: FrameDecoder, stream: bytes, sizes: list[int]) -> list[Frame]:
    """Receive as a socket would: reads of any size, bounded by the room given."""
    frames: list[Frame] = []
    position = turn = 0
    while position < len(stream):
        room = decoder.get_buffer(-1)
        assert len(room) > 0
        count = min(len(room), sizes[turn % len(sizes)], len(stream) - position)
        room[:count] = stream[position : position + count]
        frames += decoder.buffer_updated(count)
        position += count
        turn += 1
    return frames


class Allocator:
    """Memory that remembers how much of it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, size: int) -> memoryview:
        """Give memory."""
        assert 0 < size <= PAYLOAD_MAX
        self.asked.append(size)
        return memoryview(bytearray(size))


@given(VALUES)
def test_codec_round_trip(value: Any) -> None:
    """Any value comes back equal, with the same types."""
    found = unpack(pack(value))
    assert found == value
    assert types_of(found) == types_of(value)


@given(
    FRAMES,
    st.lists(st.sampled_from([1, 7, 31, 32, 33, 1000, 65_536, 1 << 20]), min_size=1, max_size=6),
    st.sampled_from([33, 64, 4096, 128 << 10]),
)
@settings(max_examples=150, deadline=None)
def test_frames_survive_any_split(
    specs: list[tuple[Any, ...]], sizes: list[int], buffer_size: int
) -> None:
    """Frames split at any points, with any size of buffer, come out equal and in order."""
    if max(sizes) < 1000:
        sizes = [*sizes, 50_000]
    sent, stream = stream_of(specs)
    allocator = Allocator()
    decoder = FrameDecoder(allocator, restricted=False, buffer_size=buffer_size)
    assert receive(decoder, stream, sizes) == sent


@given(FRAMES, st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_only_a_protocol_error(specs: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """Of a damaged stream the frames before the damage may arrive, nothing false ever does.

    Whatever is flipped, cut out or put in: no other exception, and no memory taken except for a
    payload that was really announced.
    """
    sent, stream = stream_of(specs)
    damaged = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "truncate"]))
        if what == "flip" and damaged:
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "cut":
            del damaged[at : at + data.draw(st.integers(1, 100))]
        elif what == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            del damaged[at:]
    allocator = Allocator()
    decoder = FrameDecoder(allocator, restricted=False)
    found: list[Frame] = []
    with contextlib.suppress(ProtocolError):
        found = receive(decoder, bytes(damaged), [50_000])
    # A frame cut out as a whole cannot be noticed here; what arrives must still be one of ours.
    for frame in found:
        assert frame in sent
    assert set(allocator.asked) <= {f.payload.nbytes for f in sent if f.payload is not None}


@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_only_a_protocol_error(garbage: bytes, restricted: bool) -> None:
    """Random bytes are never a frame, and take no memory."""
    allocator = Allocator()
    decoder = FrameDecoder(allocator, restricted=restricted)
    try:
        assert decoder.feed(garbage) == []
        assert len(garbage) < HEADER_SIZE
    except ProtocolError:
        pass
    assert allocator.asked == []


@given(
    st.integers(0, 255),
    st.integers(0, 3),
    st.integers(0, (1 << 32) - 1) | st.integers(0, 100),
    st.integers(0, (1 << 32) - 1) | st.integers(0, 1 << 24),
    st.binary(max_size=100),
    st.booleans(),
)
def test_announced_lengths_never_pass_the_limits(
    kind: int, flags: int, meta_size: int, size: int, rest: bytes, restricted: bool
) -> None:
    """A header with a right checksum and any lengths takes memory only within the limits."""
    checked = struct.pack("<BBHIIIQ", 1, kind, flags, meta_size, size, 0, 1) + rest[:meta_size]
    data = b"TrsA" + struct.pack("<I", crc32c(checked)) + checked + rest[meta_size:]
    allocator = Allocator()
    decoder = FrameDecoder(allocator, restricted=restricted)
    refused = False
    try:
        decoder.feed(data)
    except ProtocolError:
        refused = True
    meta_max, size_max = (HELLO_MAX, 0) if restricted else (METADATA_MAX, PAYLOAD_MAX)
    if meta_size > meta_max or size > size_max:
        assert refused
        assert allocator.asked == []
    assert sum(allocator.asked) <= size_max


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_metadata_garbage_is_only_a_protocol_error(garbage: bytes) -> None:
    """No metadata makes a decoder raise anything else."""
    for decode in (unpack, unpack_small, decode_call, decode_reply, decode_error):
        with contextlib.suppress(ProtocolError):
            decode(garbage)


@given(VALUES)
def test_any_value_as_metadata_is_only_a_protocol_error(value: Any) -> None:
    """Well-formed msgpack of any shape is a message, or ProtocolError."""
    packed = pack(value)
    for decode in (decode_call, decode_reply, decode_error):
        with contextlib.suppress(ProtocolError):
            decode(packed)


@given(VALUES, st.integers(0, 10_000), st.integers(0, 7))
def test_flipped_metadata_is_only_a_protocol_error(value: Any, at: int, bit: int) -> None:
    """One flipped bit in metadata gives another value or ProtocolError."""
    packed = bytearray(pack([value, "x"]))
    packed[at % len(packed)] ^= 1 << bit
    with contextlib.suppress(ProtocolError):
        unpack(packed)


@given(
    st.text(min_size=1, max_size=20),
    st.text(min_size=1, max_size=20),
    st.lists(VALUES, max_size=4),
    st.integers(0, TIMEOUT_MAX_MS),
)
def test_calls_round_trip(actor: str, method: str, args: list[Any], timeout_ms: int) -> None:
    """Any call and any result come back equal."""
    assert decode_call(encode_call(actor, method, args, timeout_ms)) == (
        actor,
        method,
        args,
        timeout_ms,
    )
    assert decode_reply(encode_reply(args)) == args


@given(
    st.sampled_from(sorted(BY_NAME)),
    st.text(max_size=50),
    st.dictionaries(st.from_regex(r"x[a-z]{0,5}", fullmatch=True), VALUES, max_size=3),
)
def test_errors_round_trip(name: str, text: str, attributes: dict[str, Any]) -> None:
    """Any error comes back as the same class, with its text and attributes."""
    error: TorusError = BY_NAME[name](text)
    vars(error).update(attributes)
    found = decode_error(encode_error(error))
    assert type(found) is type(error)
    assert str(found) == text
    assert vars(found) == attributes


def hello(dials: bool, secret: bytes | None) -> Hello:
    """One side of a handshake."""
    role = Role.CLIENT if dials else Role.NODE
    identity = Identity("blue", "d" if dials else "a", role, 1, "0.1.0")
    nonce = (b"d" if dials else b"a") * 32
    return Hello("dial" if dials else "accept", identity, secret, nonce)


@given(
    st.booleans(), st.sampled_from([None, b"s" * 16]), st.lists(st.binary(max_size=60), max_size=3)
)
def test_hello_garbage_never_opens_a_connection(
    dials: bool, secret: bytes | None, metas: list[bytes]
) -> None:
    """Random frames never complete a handshake and raise nothing but the two errors."""
    side = hello(dials, secret)
    for meta in metas:
        try:
            side.receive(Frame(Kind.HELLO, 0, meta, None))
        except (ProtocolError, Unauthenticated) as error:
            side.refusal(error)
    assert not side.done


@given(st.integers(0, 2), st.integers(0, 10_000), st.integers(0, 7))
@settings(max_examples=300)
def test_no_bit_of_a_handshake_can_be_flipped(step: int, at: int, bit: int) -> None:
    """With a secret, a changed bit in any of the three messages keeps the listener closed."""
    dial, accept = hello(True, b"s" * 16), hello(False, b"s" * 16)
    out, sides = dial.start(), [accept, dial, accept]
    try:
        for turn in range(3):
            (frame,) = FrameDecoder().feed(b"".join(out))
            meta = bytearray(frame.meta)
            if turn == step:
                meta[at % len(meta)] ^= 1 << bit
            out = sides[turn].receive(Frame(Kind.HELLO, 0, bytes(meta), None))
    except (ProtocolError, Unauthenticated):
        pass
    assert not accept.done


@given(st.uuids())
def test_uuids_of_any_variant(value: uuid.UUID) -> None:
    """A UUID arrives as a UUID."""
    assert unpack(pack(value)) == value


@given(st.integers(min_value=1 << 64) | st.integers(max_value=-(1 << 63) - 1))
def test_integers_out_of_range_are_invalid(value: int) -> None:
    """Integers over 64 bits are refused at the sender."""
    try:
        pack([value])
    except Invalid:
        return
    raise AssertionError("was sent")
