"""The transmission machine, command by command, against doc/proto.md."""

from __future__ import annotations

import struct

import pytest

from torus_actors.errors import BlockUnavailable, Closed, Fenced, Invalid, OutOfSpace
from torus_actors.model.buffers import BufferPool
from torus_actors.nbd import protocol as p
from torus_actors.nbd import transmission as tr
from torus_actors.nbd.protocol import Chunk, Cmd, CmdFlag, Errno
from torus_actors.nbd.requests import ExportInfo, Hole, Op, Reply, Request
from torus_actors.nbd.transmission import Transmission

SIZE = 1 << 30


def machine(
    structured: bool = True, allocation: bool = True, read_only: bool = False, leftover: bytes = b""
) -> Transmission:
    """A machine for an export of SIZE bytes."""
    info = ExportInfo("vol", SIZE, "", read_only)
    return Transmission(info, structured, allocation, BufferPool(), leftover)


def command(
    cmd: int, offset: int = 0, length: int = 0, flags: int = 0, cookie: int = 7, data: bytes = b""
) -> bytes:
    """A request as sent."""
    return p.REQUEST.pack(p.REQUEST_MAGIC, flags, cmd, cookie, offset, length) + data


def feed(tx: Transmission, data: bytes, piece: int = 1 << 30) -> list[Request]:
    """Put bytes in, in pieces of at most ``piece``; all requests that came out."""
    out = []
    view = memoryview(data)
    while view:
        room = tx.get_buffer()
        count = min(len(view), len(room), piece)
        room[:count] = view[:count]
        view = view[count:]
        tx.received(count)
        out += tx.requests()
    return out


def wire(tx: Transmission, replies: list[Reply]) -> bytes:
    """Replies as sent."""
    return b"".join(tx.encode(replies))


def chunks(raw: bytes) -> list[tuple[int, int, int, bytes]]:
    """(flags, type, cookie, payload) of every structured reply chunk."""
    out = []
    while raw:
        magic, flags, kind, cookie, length = p.CHUNK.unpack_from(raw)
        assert magic == p.STRUCTURED_REPLY_MAGIC
        out.append((flags, kind, cookie, raw[20 : 20 + length]))
        raw = raw[20 + length :]
    return out


def refusal(tx: Transmission) -> tuple[int, str]:
    """Errno and text of the only refused request, read from the wire."""
    raw = wire(tx, tx.take_refused())
    ((flags, kind, cookie, payload),) = chunks(raw)
    assert (flags, kind, cookie) == (p.CHUNK_DONE, Chunk.ERROR, 7)
    error, length = struct.unpack_from(">IH", payload)
    assert len(payload) == 6 + length
    assert tx.inflight == tx.inflight_bytes == 0
    return error, payload[6:].decode()


def read(length: int, tx: Transmission, flags: int = 0, offset: int = 4096) -> Request:
    """Send a READ; the request that comes out."""
    (request,) = feed(tx, command(Cmd.READ, offset, length, flags))
    return request


# --- requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 13, 28, 5000, 1 << 30])
@pytest.mark.parametrize("length", [1, 4096, tr.BULK_BYTES - 1, tr.BULK_BYTES, 200_000])
def test_write_payload_arrives_whole(piece: int, length: int) -> None:
    """However the stream is cut, each WRITE carries exactly its payload, and order is kept."""
    tx = machine()
    payload = bytes(i * 7 & 255 for i in range(length))
    stream = command(Cmd.WRITE, 512, length, data=payload) + command(Cmd.READ, 1, 2, cookie=8)
    first, second, third = feed(tx, stream + stream[: 28 + length], piece)
    for write in (first, third):
        assert (write.op, write.offset, write.length, write.fua) == (Op.WRITE, 512, length, False)
        assert write.data == payload
    assert (second.op, second.offset, second.length, second.cookie) == (Op.READ, 1, 2, 8)
    assert tx.inflight == 3
    assert tx.inflight_bytes == 2 * length + 2


def test_one_wake_up_gives_one_batch() -> None:
    """Everything that arrived together comes out together."""
    tx = machine()
    stream = b"".join(command(Cmd.READ, i * 4096, 4096, cookie=i) for i in range(16))
    assert [request.cookie for request in feed(tx, stream)] == list(range(16))


def test_bulk_payload_is_received_in_place() -> None:
    """After its header, the buffer to receive into is the one that the device gets."""
    tx = machine()
    assert feed(tx, command(Cmd.WRITE, 0, 1 << 20)) == []
    room = tx.get_buffer()
    assert len(room) == 1 << 20
    room[:] = b"z" * (1 << 20)
    tx.received(1 << 20)
    (write,) = tx.requests()
    assert isinstance(write.data, memoryview)
    assert write.data.obj is room.obj


@pytest.mark.parametrize("length", [512, 4096, tr.BULK_BYTES - 1])
def test_a_small_payload_is_the_devices_own(length: int) -> None:
    """What arrives later goes into the same memory, and the device may hold a payload for long."""
    tx = machine()
    writes = []
    for value in range(1, 6):
        data = bytes([value]) * length
        writes += feed(tx, command(Cmd.WRITE, 0, length, cookie=value, data=data))
    assert [bytes(write.data or b"") for write in writes] == [
        bytes([value]) * length for value in range(1, 6)
    ]


def test_bulk_payload_is_not_reused_while_held() -> None:
    """A device may keep a payload, or a slice of it, while later ones arrive."""
    tx = machine()
    held = []
    for i in range(20):
        data = bytes([i]) * (128 << 10)
        (write,) = feed(tx, command(Cmd.WRITE, 0, len(data), data=data))
        assert write.data is not None
        held.append(write.data[1000:2000])
        wire(tx, [Reply(write)])
    assert [bytes(part) for part in held] == [bytes([i]) * 1000 for i in range(20)]


@pytest.mark.parametrize(
    ("cmd", "flags", "expected"),
    [
        (Cmd.READ, CmdFlag.FUA | CmdFlag.DF, {"fua": True, "df": True}),
        (Cmd.TRIM, CmdFlag.FUA, {"fua": True}),
        (Cmd.WRITE_ZEROES, CmdFlag.NO_HOLE, {"no_hole": True}),
        (Cmd.WRITE_ZEROES, CmdFlag.FAST_ZERO, {"fast_zero": True}),
        (Cmd.CACHE, 0, {}),
        (Cmd.BLOCK_STATUS, CmdFlag.REQ_ONE, {"req_one": True}),
    ],
)
def test_flags_reach_the_device(cmd: Cmd, flags: int, expected: dict[str, bool]) -> None:
    """Each flag is told by name, on the commands it belongs to."""
    (request,) = feed(machine(), command(cmd, 512, 1024, flags))
    assert (request.op, request.offset, request.length) == (Op(cmd), 512, 1024)
    for name in ("fua", "df", "no_hole", "fast_zero", "req_one"):
        assert getattr(request, name) is expected.get(name, False)


def test_flush_and_fua_write() -> None:
    """FLUSH has no range; FUA is kept on a WRITE."""
    flush, write = feed(
        machine(), command(Cmd.FLUSH) + command(Cmd.WRITE, 0, 2, CmdFlag.FUA, data=b"ab")
    )
    assert (flush.op, flush.offset, flush.length) == (Op.FLUSH, 0, 0)
    assert write.fua
    assert write.data == b"ab"


def test_long_ranges_without_payload_are_fine() -> None:
    """TRIM, WRITE_ZEROES and BLOCK_STATUS are not bound by the payload limit."""
    for cmd in (Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS, Cmd.CACHE):
        (request,) = feed(machine(), command(cmd, 0, SIZE))
        assert request.length == SIZE


def test_leftover_of_the_handshake_is_the_beginning() -> None:
    """Requests that came in one piece with the last option are not lost."""
    stream = command(Cmd.READ, 0, 512) + command(Cmd.FLUSH)[:10]
    tx = machine(leftover=stream)
    assert [request.op for request in tx.requests()] == [Op.READ]
    assert [request.op for request in feed(tx, command(Cmd.FLUSH)[10:])] == [Op.FLUSH]


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "errno"),
    [
        (command(Cmd.READ, SIZE - 1, 2), Errno.EINVAL),
        (command(Cmd.READ, 1 << 63, 2), Errno.EINVAL),
        (command(Cmd.READ, (1 << 64) - 1, 0xFFFFFFFF), Errno.EINVAL),
        (command(Cmd.TRIM, SIZE, 1), Errno.EINVAL),
        (command(Cmd.CACHE, SIZE, 1), Errno.EINVAL),
        (command(Cmd.BLOCK_STATUS, SIZE, 1), Errno.EINVAL),
        (command(Cmd.BLOCK_STATUS, 0, 0), Errno.EINVAL),
        (command(Cmd.WRITE_ZEROES, SIZE, 1), Errno.ENOSPC),
        (command(Cmd.READ, 0, p.MAX_PAYLOAD_BYTES + 1), Errno.EINVAL),
        (command(Cmd.FLUSH, 0, 1), Errno.EINVAL),
        (command(Cmd.FLUSH, 1, 0), Errno.EINVAL),
        (command(8), Errno.EINVAL),
        (command(0xFFFF, 1, 2, 3), Errno.EINVAL),
        (command(Cmd.READ, 0, 1, CmdFlag.NO_HOLE), Errno.EINVAL),
        (command(Cmd.READ, 0, 1, 1 << 15), Errno.EINVAL),
        (command(Cmd.TRIM, 0, 1, CmdFlag.FAST_ZERO), Errno.EINVAL),
        (command(Cmd.BLOCK_STATUS, 0, 1, CmdFlag.DF), Errno.EINVAL),
    ],
)
def test_what_is_wrong_is_refused_by_the_rules(raw: bytes, errno: Errno) -> None:
    """The device never sees it; the errno is the protocol's; the stream goes on."""
    tx = machine()
    assert feed(tx, raw) == []
    error, text = refusal(tx)
    assert error == errno
    assert text
    assert [request.op for request in feed(tx, command(Cmd.FLUSH))] == [Op.FLUSH]


@pytest.mark.parametrize("length", [1, 4096, 100_000, (1 << 25) + 512])
@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_refused_write_consumes_its_payload(length: int, piece: int) -> None:
    """A WRITE that is out of range, or too long, is answered after its payload went by."""
    tx = machine()
    offset = SIZE if length <= p.MAX_PAYLOAD_BYTES else 0
    data = bytes(length)
    assert feed(tx, command(Cmd.WRITE, offset, length, data=data[:-1]), piece) == []
    assert not tx.refused
    (flush,) = feed(tx, data[-1:] + command(Cmd.FLUSH))
    tx.encode([Reply(flush)])
    error, _ = refusal(tx)
    assert error == (Errno.ENOSPC if offset else Errno.EINVAL)


def test_read_only_export_refuses_all_writing() -> None:
    """EPERM, also for a WRITE whose payload is there; reads and flushes go on."""
    for raw in (
        command(Cmd.WRITE, 0, 3, data=b"abc"),
        command(Cmd.TRIM, 0, 512),
        command(Cmd.WRITE_ZEROES, 0, 512),
    ):
        tx = machine(read_only=True)
        assert feed(tx, raw) == []
        assert refusal(tx)[0] == Errno.EPERM
        assert len(feed(tx, command(Cmd.READ, 0, 512) + command(Cmd.FLUSH))) == 2


def test_block_status_needs_a_context_and_df_structured_replies() -> None:
    """What was not negotiated is EINVAL."""
    tx = machine(allocation=False)
    assert feed(tx, command(Cmd.BLOCK_STATUS, 0, 512)) == []
    assert refusal(tx)[0] == Errno.EINVAL
    tx = machine(structured=False, allocation=False)
    assert feed(tx, command(Cmd.READ, 0, 512, CmdFlag.DF)) == []
    assert wire(tx, tx.take_refused()) == p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, Errno.EINVAL, 7)


@pytest.mark.parametrize("cmd", [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE])
def test_empty_ranges_succeed_at_once(cmd: Cmd) -> None:
    """The protocol leaves it open, but the connection must live: it is a success."""
    tx = machine()
    assert feed(tx, command(cmd, 512, 0)) == []
    raw = wire(tx, tx.take_refused())
    assert chunks(raw) == [(p.CHUNK_DONE, Chunk.NONE, 7, b"")]
    simple = machine(structured=False)
    feed(simple, command(cmd, 512, 0))
    expected = p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, 7)
    assert wire(simple, simple.take_refused()) == expected


def test_bad_magic_is_fatal() -> None:
    """The stream cannot be followed any more; what came before still counts."""
    tx = machine()
    got = feed(tx, command(Cmd.FLUSH) + b"x" * 28 + command(Cmd.FLUSH))
    assert [request.op for request in got] == [Op.FLUSH]
    assert tx.failure
    assert feed(tx, command(Cmd.FLUSH)) == []


def test_disconnect_ends_the_stream() -> None:
    """Nothing behind DISC is looked at; DISC itself has no answer."""
    tx = machine()
    got = feed(tx, command(Cmd.READ, 0, 1) + command(Cmd.DISC) + command(Cmd.READ, 0, 1))
    assert len(got) == 1
    assert tx.disconnecting
    assert not tx.refused
    assert feed(tx, command(Cmd.READ, 0, 1)) == []


def test_shutting_down() -> None:
    """New requests are answered ESHUTDOWN, a WRITE after its payload."""
    tx = machine()
    tx.shutting_down = True
    assert feed(tx, command(Cmd.WRITE, 0, 100_000, data=bytes(100_000))) == []
    assert refusal(tx)[0] == Errno.ESHUTDOWN


# --- limits ----------------------------------------------------------------------------------


def test_requests_in_flight_are_limited() -> None:
    """No more than the limit come out; the rest follow as answers go back."""
    tx = machine()
    count = tr.INFLIGHT_REQUESTS_MAX + 100
    got = feed(tx, command(Cmd.READ, 0, 1) * count)
    assert len(got) == tr.INFLIGHT_REQUESTS_MAX
    assert tx.full
    assert tx.limited
    assert tx.requests() == []
    wire(tx, [Reply(request, buffers=[b"x"]) for request in got])
    assert tx.relaxed
    assert len(tx.requests()) == 100
    assert not tx.limited


def test_bytes_in_flight_are_limited() -> None:
    """Few large READs reach the limit of bytes; overshoot is at most one request."""
    tx = machine()
    got = feed(tx, command(Cmd.READ, 0, 1 << 25) * 10)
    assert len(got) == 2
    assert tx.full
    wire(tx, [Reply(got[0], Errno.EIO)])
    assert not tx.full
    assert len(tx.requests()) == 1


def test_refused_payload_does_not_count_as_in_flight() -> None:
    """A gigabyte that only goes by must not stop the reading of itself."""
    tx = machine()
    feed(tx, command(Cmd.WRITE, SIZE, 1 << 31, data=bytes(1 << 20)))
    assert not tx.full
    assert tx.inflight_bytes == 0


# --- replies ---------------------------------------------------------------------------------


def test_simple_replies() -> None:
    """Without structured replies: header and data, or header and error without data."""
    tx = machine(structured=False)
    first, second, third = feed(
        tx,
        command(Cmd.READ, 0, 4) + command(Cmd.READ, 0, 4, cookie=8) + command(Cmd.FLUSH, cookie=9),
    )
    assert wire(tx, [Reply(first, buffers=[b"abcd"])]) == b"gDf\x98\0\0\0\0" + bytes(7) + b"\7abcd"
    assert wire(tx, [Reply(second, Errno.EIO, "why")]) == p.SIMPLE_REPLY.pack(
        p.SIMPLE_REPLY_MAGIC, 5, 8
    )
    assert wire(tx, [Reply(third)]) == p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, 9)
    assert tx.inflight == tx.inflight_bytes == 0


def test_simple_read_of_holes_is_zeroes() -> None:
    """A client that knows no holes gets zeroes, also more than the shared ones at once."""
    tx = machine(structured=False)
    length = (3 << 20) + 5
    request = read(length + 3, tx)
    raw = wire(tx, [Reply(request, buffers=[b"ab", Hole(length), b"c"])])
    assert raw[16:] == b"ab" + bytes(length) + b"c"


def test_structured_read() -> None:
    """One content chunk that is also the last, in pieces as the device gave them."""
    tx = machine()
    request = read(4, tx)
    raw = wire(tx, [Reply(request, buffers=[b"ab", memoryview(b"cd")])])
    data = struct.pack(">Q", 4096) + b"abcd"
    assert chunks(raw) == [(p.CHUNK_DONE, Chunk.OFFSET_DATA, 7, data)]


def test_structured_read_with_holes() -> None:
    """Neighbouring holes become one chunk, neighbouring data too; only the last is DONE."""
    tx = machine()
    request = read(1000, tx)
    pieces = [Hole(100), Hole(100), b"", b"x" * 100, bytearray(b"y" * 200), Hole(500)]
    raw = wire(tx, [Reply(request, buffers=pieces)])
    assert chunks(raw) == [
        (0, Chunk.OFFSET_HOLE, 7, struct.pack(">QI", 4096, 200)),
        (0, Chunk.OFFSET_DATA, 7, struct.pack(">Q", 4296) + b"x" * 100 + b"y" * 200),
        (p.CHUNK_DONE, Chunk.OFFSET_HOLE, 7, struct.pack(">QI", 4596, 500)),
    ]


def test_df_gets_one_content_chunk() -> None:
    """Under DF data and holes go out as one chunk of data; a lone hole stays a hole."""
    tx = machine()
    request = read(12, tx, CmdFlag.DF)
    raw = wire(tx, [Reply(request, buffers=[b"abcd", Hole(8)])])
    data = struct.pack(">Q", 4096) + b"abcd" + bytes(8)
    assert chunks(raw) == [(p.CHUNK_DONE, Chunk.OFFSET_DATA, 7, data)]
    request = read(12, tx, CmdFlag.DF)
    raw = wire(tx, [Reply(request, buffers=[Hole(12)])])
    expected = (p.CHUNK_DONE, Chunk.OFFSET_HOLE, 7, struct.pack(">QI", 4096, 12))
    assert chunks(raw) == [expected]


@pytest.mark.parametrize("structured", [True, False])
def test_wrong_amount_of_data_is_an_error_not_a_broken_stream(structured: bool) -> None:
    """A device that returns too little or too much costs one EIO, not the connection."""
    tx = machine(structured, structured)
    for buffers in ([], [b"abc"], [b"abcde"], [b"ab", b"c"], [Hole(3)]):
        raw = wire(tx, [Reply(read(4, tx), buffers=buffers)])
        if structured:
            ((_, kind, _, payload),) = chunks(raw)
            assert kind == Chunk.ERROR
            assert struct.unpack_from(">I", payload) == (Errno.EIO,)
        else:
            assert raw == p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, Errno.EIO, 7)


def test_error_text_is_bounded() -> None:
    """A message is cut to 4096 bytes, never inside a character."""
    tx = machine()
    (request,) = feed(tx, command(Cmd.FLUSH))
    ((_, _, _, payload),) = chunks(wire(tx, [Reply(request, Errno.EIO, "é" * 3000 + "\0")]))
    assert payload[6:].decode() == "é" * 2048


def test_block_status() -> None:
    """Extents in order, cut at the end of the request."""
    tx = machine()
    (request,) = feed(tx, command(Cmd.BLOCK_STATUS, 0, 1000))
    raw = wire(tx, [Reply(request, extents=[(300, 0), (400, 3), (5000, 1), (1, 1)])])
    payload = struct.pack(">I6I", p.BASE_ALLOCATION_ID, 300, 0, 400, 3, 300, 1)
    assert chunks(raw) == [(p.CHUNK_DONE, Chunk.BLOCK_STATUS, 7, payload)]


def test_block_status_of_one_and_of_none() -> None:
    """REQ_ONE gets exactly one extent; a device that knows nothing says "allocated"."""
    tx = machine()
    (request,) = feed(tx, command(Cmd.BLOCK_STATUS, 0, 1000, CmdFlag.REQ_ONE))
    ((_, _, _, payload),) = chunks(wire(tx, [Reply(request, extents=[(2000, 3), (1, 0)])]))
    assert payload == struct.pack(">III", 1, 1000, 3)
    (request,) = feed(tx, command(Cmd.BLOCK_STATUS, 0, 1000))
    ((_, _, _, payload),) = chunks(wire(tx, [Reply(request)]))
    assert payload == struct.pack(">III", 1, 1000, 0)


def test_errors_have_one_errno_each() -> None:
    """The table from errors to errnos; what is not listed is EIO."""
    assert p.errno_of(OutOfSpace("full")) is Errno.ENOSPC
    assert p.errno_of(Invalid("bad")) is Errno.EINVAL
    assert p.errno_of(Closed("closed")) is Errno.ESHUTDOWN
    assert p.errno_of(Fenced("old")) is Errno.ESHUTDOWN
    assert p.errno_of(BlockUnavailable("all peers are gone")) is Errno.EIO
