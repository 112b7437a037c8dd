"""An NBD client on asyncio, for scenarios on real processes: pipelined, and honest about errors.

Speaks fixed newstyle with structured replies over a unix socket. Any number of requests may be
under way on a connection; each ends with its own answer, in any order. A connection that is lost
ends them all with `ConnectionError`, which says nothing about what became of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

from torus_actors.nbd import protocol as p
from torus_actors.nbd.protocol import Chunk, Cmd, CmdFlag, Errno, Info, Opt, Rep

HANDSHAKE_S_MAX = 120.0
"""Opening a volume may take as long as its journal takes to be read."""

STREAM_BYTES = 1 << 20

_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")


class Refused(Exception):
    """The server does not open the export.

    Attributes:
        reply: the protocol's reason.
    """

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class NbdError(Exception):
    """A request was answered with an error.

    Attributes:
        errno: one of the protocol's.
    """

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(f"{_name(errno)}{': ' if message else ''}{message}")
        self.errno = errno


def _name(errno: int) -> str:
    try:
        return Errno(errno).name
    except ValueError:
        return f"errno {errno}"


class _Pending:
    """A request under way; ``data`` takes what a read brings."""

    __slots__ = ("data", "done", "error", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.data = bytearray(length)
        self.error: NbdError | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class NbdClient:
    """One connection in its transmission phase; made by ``connect``.

    Attributes:
        size: of the export, bytes.
        flags: transmission flags.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, flags: int
    ) -> None:
        self.size = size
        self.flags = flags
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, _Pending] = {}
        self._cookie = 0
        self._lost: ConnectionError | None = None
        self._receiving = asyncio.get_running_loop().create_task(self._receive())

    @classmethod
    async def connect(cls, path: Path, export: str) -> NbdClient:
        """Open an export.

        Args:
            path: of the server's unix socket.
            export: name.

        Raises:
            Refused: the server does not open it.
            OSError: there is no server, or it went away, or it does not speak in time.
        """
        reader, writer = await asyncio.open_unix_connection(str(path), limit=STREAM_BYTES)
        try:
            async with asyncio.timeout(HANDSHAKE_S_MAX):
                size, flags = await _handshake(reader, writer, export)
        except BaseException as error:
            writer.close()
            if isinstance(error, asyncio.IncompleteReadError):
                raise ConnectionResetError("the server ended the handshake") from error
            raise
        return cls(reader, writer, size, flags)

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost is not None

    async def read(self, offset: int, length: int) -> bytes:
        """Read a range.

        Raises:
            NbdError: the server refused, or could not.
            ConnectionError: the connection is lost.
        """
        return bytes(await self._request(Cmd.READ, offset, length))

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write a range; with ``fua`` it is durable when this returns. Errors as ``read``."""
        await self._request(Cmd.WRITE, offset, len(data), CmdFlag.FUA if fua else 0, data)

    async def zero(
        self, offset: int, length: int, *, fua: bool = False, keep: bool = False
    ) -> None:
        """Write zeros, without holes if ``keep``. Errors as ``read``."""
        flags = (CmdFlag.FUA if fua else 0) | (CmdFlag.NO_HOLE if keep else 0)
        await self._request(Cmd.WRITE_ZEROES, offset, length, flags)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give a range back. Errors as ``read``."""
        await self._request(Cmd.TRIM, offset, length, CmdFlag.FUA if fua else 0)

    async def flush(self) -> None:
        """Make durable what was acknowledged before. Errors as ``read``."""
        await self._request(Cmd.FLUSH, 0, 0)

    async def close(self) -> None:
        """Let what is under way end, and take leave; also where the connection is lost."""
        waiting = [pending.done for pending in self._pending.values()]
        if waiting:
            await asyncio.wait(waiting)
        if not self._lost:
            self._writer.write(p.REQUEST.pack(p.REQUEST_MAGIC, 0, Cmd.DISC, 0, 0, 0))
            await asyncio.wait([self._receiving])
        await self.abandon()

    async def abandon(self) -> None:
        """Drop the connection as if the client had died."""
        self._receiving.cancel()
        await asyncio.wait([self._receiving])
        self._fail(ConnectionResetError("the connection was dropped"))
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # -- inside ------------------------------------------------------------------------------------

    async def _request(
        self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b""
    ) -> bytearray:
        if self._lost is not None:
            raise self._lost
        self._cookie += 1
        pending = _Pending(offset, length if command == Cmd.READ else 0)
        self._pending[self._cookie] = pending
        header = p.REQUEST.pack(p.REQUEST_MAGIC, flags, command, self._cookie, offset, length)
        self._writer.write(header + payload)
        await pending.done
        return pending.data

    async def _receive(self) -> None:
        try:
            while True:
                await self._reply()
        except asyncio.IncompleteReadError:
            self._fail(ConnectionResetError("the server ended the connection"))
        except ConnectionError as error:
            self._fail(error)

    async def _reply(self) -> None:
        head = await self._reader.readexactly(p.SIMPLE_REPLY.size)
        magic, errno, cookie = p.SIMPLE_REPLY.unpack(head)
        if magic == p.SIMPLE_REPLY_MAGIC:
            # "A server SHOULD NOT use a simple reply to a READ"; to the others it may.
            self._answered(cookie, NbdError(errno, "") if errno else None)
            return
        if magic != p.STRUCTURED_REPLY_MAGIC:
            raise ConnectionAbortedError(f"a reply begins with {magic:#x}")
        head += await self._reader.readexactly(p.CHUNK.size - len(head))
        _, flags, kind, cookie, length = p.CHUNK.unpack(head)
        body = await self._reader.readexactly(length)
        pending = self._under_way(cookie)
        if kind == Chunk.OFFSET_DATA:
            at = _OFFSET.unpack_from(body)[0] - pending.offset
            pending.data[at : at + length - _OFFSET.size] = body[_OFFSET.size :]
        elif kind == Chunk.OFFSET_HOLE:
            offset, hole = _HOLE.unpack(body)
            pending.data[offset - pending.offset : offset - pending.offset + hole] = bytes(hole)
        elif kind == Chunk.ERROR:
            errno, size = _ERROR.unpack_from(body)
            text = body[_ERROR.size : _ERROR.size + size].decode(errors="replace")
            pending.error = NbdError(errno, text)
        elif kind != Chunk.NONE:
            raise ConnectionAbortedError(f"a reply chunk of kind {kind}")
        if flags & p.CHUNK_DONE:
            self._answered(cookie, pending.error)

    def _under_way(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise ConnectionAbortedError(f"a reply to request {cookie}, which is not under way")
        return pending

    def _answered(self, cookie: int, error: NbdError | None) -> None:
        pending = self._under_way(cookie)
        del self._pending[cookie]
        if pending.done.done():
            return  # whoever asked does not wait any more
        if error is not None:
            pending.done.set_exception(error)
        else:
            pending.done.set_result(None)

    def _fail(self, error: ConnectionError) -> None:
        if self._lost is None:
            self._lost = error
        pending, self._pending = self._pending, {}
        for each in pending.values():
            if not each.done.done():
                each.done.set_exception(self._lost)


async def _handshake(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: str
) -> tuple[int, int]:
    """Size and transmission flags of the export."""
    magic, option_magic, _ = p.GREETING.unpack(await reader.readexactly(p.GREETING.size))
    if (magic, option_magic) != (p.NBD_MAGIC, p.OPTION_MAGIC):
        raise ConnectionAbortedError("no NBD server")
    both = p.ClientFlag.FIXED_NEWSTYLE | p.ClientFlag.NO_ZEROES
    writer.write(p.CLIENT_FLAGS.pack(both))
    writer.write(p.OPTION.pack(p.OPTION_MAGIC, Opt.STRUCTURED_REPLY, 0))
    kind, data = await _option_reply(reader, Opt.STRUCTURED_REPLY)
    if kind != Rep.ACK:
        raise Refused(kind, data.decode(errors="replace"))
    name = export.encode()
    go = p.U32.pack(len(name)) + name + p.U16.pack(0)
    writer.write(p.OPTION.pack(p.OPTION_MAGIC, Opt.GO, len(go)) + go)
    size = flags = 0
    while True:
        kind, data = await _option_reply(reader, Opt.GO)
        if kind == Rep.ACK:
            return size, flags
        if kind != Rep.INFO:
            raise Refused(kind, data.decode(errors="replace"))
        if p.U16.unpack_from(data)[0] == Info.EXPORT:
            _, size, flags = p.INFO_EXPORT.unpack(data)


async def _option_reply(reader: asyncio.StreamReader, option: int) -> tuple[int, bytes]:
    magic, answered, kind, length = p.OPTION_REPLY.unpack(
        await reader.readexactly(p.OPTION_REPLY.size)
    )
    if magic != p.OPTION_REPLY_MAGIC or answered != option or length > p.MAX_OPTION_BYTES:
        raise ConnectionAbortedError("a broken reply to an option")
    return kind, await reader.readexactly(length)
