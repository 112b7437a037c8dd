"""Exports held in memory: a complete device in few lines, for tests, benchmarks and first trials.

It shows what a ``BlockDevice`` has to do, and answers everything inside ``submit``. Nothing of it
is durable. Read replies show the live memory, so a client that overlaps a read with a write of the
same range may read either.
"""

from __future__ import annotations

from torus_actors.errors import NotExist
from torus_actors.nbd.protocol import STATE_HOLE, STATE_ZERO, Errno
from torus_actors.nbd.requests import BlockDevice, ExportInfo, Hole, Op, Replies, Reply, Request

CHUNK_BYTES = 64 << 10
"""Grain in which a range is known to be a hole."""

_READ, _WRITE, _BLOCK_STATUS = Op.READ, Op.WRITE, Op.BLOCK_STATUS


class MemoryDevice:
    """A sparse disk of ``size`` bytes in memory."""

    def __init__(self, size: int) -> None:
        self.data = memoryview(bytearray(size))
        self._used = bytearray(-(-size // CHUNK_BYTES))
        self.flushes = 0
        """FLUSH and FUA requests seen."""

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """Answer all requests at once."""
        replies = []
        data = self.data
        for request in requests:
            op, offset = request.op, request.offset
            end = offset + request.length
            if op is _READ:
                if self._used.find(1, offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)) < 0:
                    replies.append(Reply(request, 0, "", (Hole(request.length),)))
                else:
                    replies.append(Reply(request, 0, "", (data[offset:end],)))
            elif op is _WRITE:
                assert request.data is not None
                data[offset:end] = request.data
                self._mark(offset, end)
                self.flushes += request.fua
                replies.append(Reply(request))
            else:
                replies.append(self._other(request))
        conn.reply(replies)

    def _mark(self, offset: int, end: int) -> None:
        first, last = offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        if first == last:
            self._used[first] = 1
        else:
            self._used[first : last + 1] = b"\1" * (last + 1 - first)

    def _other(self, request: Request) -> Reply:
        op = request.op
        self.flushes += op is Op.FLUSH or request.fua
        if op is _BLOCK_STATUS:
            return Reply(request, extents=self._extents(request.offset, request.length))
        if op is Op.WRITE_ZEROES or op is Op.TRIM:
            if request.fast_zero and request.length % CHUNK_BYTES:
                return Reply(request, Errno.ENOTSUP, "only whole chunks are zeroed fast")
            self._clear(request.offset, request.offset + request.length, request.no_hole)
        return Reply(request)

    def _clear(self, offset: int, end: int, keep: bool) -> None:
        for start in range(offset, end, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, end)
            self.data[start:stop] = bytes(stop - start)
        if keep:
            self._mark(offset, end)
            return
        first, last = -(-offset // CHUNK_BYTES), end // CHUNK_BYTES
        if end == len(self.data):
            last = len(self._used)
        if first < last:
            self._used[first:last] = bytes(last - first)

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        extents = []
        end = offset + length
        while offset < end:
            chunk = offset // CHUNK_BYTES
            used = self._used[chunk]
            other = self._used.find(1 - used, chunk)
            stop = end if other < 0 else min(other * CHUNK_BYTES, end)
            extents.append((stop - offset, 0 if used else STATE_HOLE | STATE_ZERO))
            offset = stop
        return extents


class MemoryExports:
    """A fixed set of exports; the first one is also the default export."""

    def __init__(self, exports: dict[str, tuple[ExportInfo, BlockDevice]]) -> None:
        self.exports = exports
        self.opened: dict[str, int] = {}
        """How often each name is open at present, by the name the client gave."""

    @classmethod
    def single(cls, size: int, name: str = "memory", read_only: bool = False) -> MemoryExports:
        """One device of ``size`` bytes."""
        info = ExportInfo(name, size, f"{size} bytes of memory", read_only)
        return cls({name: (info, MemoryDevice(size))})

    async def list(self) -> list[str]:
        """All names."""
        return list(self.exports)

    async def open(self, name: str) -> tuple[ExportInfo, BlockDevice]:
        """Open an export by name, or the first one by the empty name."""
        key = name or next(iter(self.exports), "")
        if key not in self.exports:
            raise NotExist(f"there is no export {name!r}")
        self.opened[name] = self.opened.get(name, 0) + 1
        return self.exports[key]

    async def release(self, name: str) -> None:
        """Undo one ``open``."""
        self.opened[name] -= 1
