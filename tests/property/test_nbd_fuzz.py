"""Hostile and ordinary byte streams, cut anywhere, against the NBD machines."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.errors import NotExist
from torus_actors.model.buffers import BufferPool
from torus_actors.nbd import handshake as hs
from torus_actors.nbd import protocol as p
from torus_actors.nbd.handshake import Handshake, TlsPolicy
from torus_actors.nbd.memory import MemoryDevice
from torus_actors.nbd.requests import ExportInfo, Op, Reply, Request
from torus_actors.nbd.transmission import Transmission

SIZE = 1 << 20

small_or_any = st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF))
option = st.builds(
    lambda code, data, lie: p.OPTION.pack(p.OPTION_MAGIC, code, max(0, len(data) + lie)) + data,
    st.one_of(st.integers(0, 12), st.integers(0, 0xFFFFFFFF)),
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda name, infos: (
                struct.pack(">I", len(name))
                + name
                + struct.pack(f">H{len(infos)}H", len(infos), *infos)
            ),
            st.binary(max_size=8),
            st.lists(small_or_any, max_size=4),
        ),
        st.builds(
            lambda name, queries: (
                struct.pack(f">I{len(name)}sI", len(name), name, len(queries))
                + b"".join(struct.pack(">I", len(q)) + q for q in queries)
            ),
            st.binary(max_size=8),
            st.lists(st.sampled_from([b"base:", b"base:allocation", b"x", b"\xff"]), max_size=3),
        ),
    ),
    st.sampled_from([0, 0, 0, 0, 1, -1, 100_000]),
)


def request_bytes(kind: int, flags: int, cookie: int, offset: int, length: int, fill: int) -> bytes:
    """A request, with its payload if it is a WRITE of a size worth generating."""
    payload = bytes([fill]) * length if kind == 1 and length <= 2 * SIZE else b""
    return p.REQUEST.pack(p.REQUEST_MAGIC, flags, kind, cookie, offset, length) + payload


command = st.builds(
    request_bytes,
    st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF]),
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, SIZE), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 5000), st.integers(60_000, 140_000), st.integers(0, 2**32 - 1)),
    st.integers(0, 255),
)
cuts = st.lists(st.one_of(st.integers(16, 200), st.integers(200, 70_000)), min_size=1, max_size=8)


def pieces(stream: bytes, sizes: list[int]) -> list[bytes]:
    """The stream, cut into pieces of those sizes, over and over."""
    out, i = [], 0
    while stream:
        out.append(stream[: sizes[i % len(sizes)]])
        stream = stream[len(out[-1]) :]
        i += 1
    return out


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(TlsPolicy),
    st.one_of(st.just(b"\0\0\0\3"), st.just(b"\0\0\0\0"), st.binary(max_size=4)),
    st.one_of(st.lists(option, max_size=8).map(b"".join), st.binary(max_size=300)),
    cuts,
    st.booleans(),
)
def test_handshake_survives_anything(
    tls: TlsPolicy, flags: bytes, stream: bytes, sizes: list[int], exists: bool
) -> None:
    """No stream raises; what is stored stays bounded; after Close or Enter nothing follows."""
    machine = Handshake(tls)
    over = False
    for piece in [flags, *pieces(stream, [min(s, 50) for s in sizes])]:
        machine.receive(piece)
        while (event := machine.next_event()) is not None:
            assert not over
            if isinstance(event, hs.ListExports):
                machine.listed(["a", ""])
            elif isinstance(event, hs.OpenExport):
                if exists:
                    machine.opened(ExportInfo("a", SIZE))
                else:
                    machine.refused(NotExist("no"))
            elif isinstance(event, hs.StartTls):
                machine.tls_started()
            over = over or isinstance(event, hs.Close | hs.Enter)
        assert len(machine._buffer) <= p.MAX_OPTION_BYTES + 100


class Collect:
    """Collects a device's replies."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []

    def reply(self, replies: list[Reply]) -> None:
        """Keep them."""
        self.replies += replies


def parse_replies(raw: bytes, structured: bool, reads: dict[int, int]) -> int:
    """Count whole replies in a stream; asserts that it can be followed to its end."""
    done = 0
    while raw:
        if structured:
            magic, flags, _, _, length = p.CHUNK.unpack_from(raw)
            assert magic == p.STRUCTURED_REPLY_MAGIC
            raw = raw[p.CHUNK.size :]
            assert len(raw) >= length
            raw = raw[length:]
            done += flags & p.CHUNK_DONE
        else:
            magic, error, cookie = p.SIMPLE_REPLY.unpack_from(raw)
            assert magic == p.SIMPLE_REPLY_MAGIC
            raw = raw[p.SIMPLE_REPLY.size :]
            if not error:
                raw = raw[reads.pop(cookie, 0) :]
            done += 1
    return done


@settings(max_examples=400, deadline=None)
@given(
    st.booleans(),
    st.booleans(),
    st.one_of(st.lists(command, max_size=12).map(b"".join), st.binary(max_size=300)),
    cuts,
)
def test_transmission_survives_anything(
    structured: bool, read_only: bool, stream: bytes, sizes: list[int]
) -> None:
    """No stream raises; devices see only valid requests; every request is answered once."""
    tx = Transmission(
        ExportInfo("x", SIZE, "", read_only), structured, structured, BufferPool(), b""
    )
    device = MemoryDevice(SIZE)
    out = b""
    asked = 0
    reads: dict[int, int] = {}
    for piece in pieces(stream, sizes):
        view = memoryview(piece)
        while view:
            room = tx.get_buffer()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            view = view[count:]
            tx.received(count)
            sink = Collect()
            batch = tx.requests()
            for request in batch:
                check(request, read_only)
                if request.op is Op.READ:
                    reads[request.cookie] = request.length
            device.submit(sink, batch)
            replies = sink.replies + tx.take_refused()
            asked += len(replies)
            encoded = b"".join(tx.encode(replies))
            out += encoded if structured else b""
    assert tx.inflight == (1 if tx._drop else 0)
    assert tx.inflight_bytes == 0
    assert parse_replies(out, structured, reads) == (asked if structured else 0)


def check(request: Request, read_only: bool) -> None:
    """The promises of the requests module."""
    assert request.op in Op
    assert request.offset + request.length <= SIZE
    if request.op is Op.FLUSH:
        assert request.offset == request.length == 0
    else:
        assert request.length > 0
    if request.op is Op.WRITE:
        assert request.data is not None
        assert len(request.data) == request.length
    assert not (read_only and request.op in (Op.WRITE, Op.TRIM, Op.WRITE_ZEROES))


@settings(max_examples=100, deadline=None)
@given(st.lists(command, max_size=12).map(b"".join), cuts)
def test_cuts_make_no_difference(stream: bytes, sizes: list[int]) -> None:
    """The same stream in one piece and in many gives the same requests."""

    def run(parts: list[bytes]) -> list[tuple[object, ...]]:
        tx = Transmission(ExportInfo("x", SIZE), True, True, BufferPool(), b"")
        seen: list[tuple[object, ...]] = []
        for part in parts:
            view = memoryview(part)
            while view:
                room = tx.get_buffer()
                count = min(len(room), len(view))
                room[:count] = view[:count]
                view = view[count:]
                tx.received(count)
                batch = tx.requests()
                for r in batch:
                    data = None if r.data is None else bytes(r.data)
                    seen.append((r.op, r.offset, r.length, r.cookie, r.fua, data))
                refused = tx.take_refused()
                tx.encode([Reply(r, p.Errno.EIO) for r in batch] + refused)
        return seen

    assert run([stream]) == run(pieces(stream, sizes))
