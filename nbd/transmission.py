"""The server's side of the transmission phase, without I/O.

Bytes come in through ``get_buffer`` and ``received`` (so that large payloads land where they stay),
``requests`` hands out what has arrived whole and may run, ``encode`` turns answers into buffers to
write. The machine also keeps the count of what is in flight, and hands out no more than its limits.

This is the hot path: one call of ``requests`` for each wake-up, and a handful of operations for
each request. Quotations are from doc/proto.md of https://github.com/NetworkBlockDevice/nbd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torus_actors.model.buffers import BufferPool, aligned
from torus_actors.nbd import protocol as p
from torus_actors.nbd.protocol import Cmd, CmdFlag, Errno
from torus_actors.nbd.replies import Buffer, Encoder
from torus_actors.nbd.requests import ExportInfo, Op, Reply, Request

RECEIVE_BYTES = 256 << 10
"""Size of the receive buffer: holds the largest payload that is not received in place, and the
requests of a client that writes 4 KiB at depth 32 in one go. Untouched parts cost no memory."""

BULK_BYTES = 64 << 10
"""WRITE payloads from here on are received into a buffer of their own; shorter ones cost less to
copy than the extra system call."""

BULK_WINDOW_BYTES = 4 << 10
"""How much is asked for at once between two bulk payloads: little, since what arrives behind the
next header in the same call has to be copied into the payload's buffer."""

INFLIGHT_REQUESTS_MAX = 1024
"""Requests of one connection that its device holds. The kernel's client has 128, qemu 16, fio
whatever one asks for; beyond this the client waits in its socket."""

INFLIGHT_BYTES_MAX = 64 << 20
"""Payload, arrived or asked for, of one connection's requests in flight. Twice the largest
request, so that even those overlap. May be exceeded by one request."""

ALL_BYTES_MAX = 128 << 20
"""The same of all connections of a server: its memory must not grow with the number of clients
while a slow or a full cluster keeps their writes waiting, or clients do not read what they asked
for: it would be killed with what nobody has flushed."""

EACH_BYTES_MIN = 4 << 20
"""What each connection may have in flight in any case: others may hold all of that for minutes, and
what is small needs its depth. May be exceeded by one request."""

_HEADER_BYTES = p.REQUEST.size
_READ, _WRITE, _FLUSH, _CACHE = Op.READ, Op.WRITE, Op.FLUSH, Op.CACHE
_DISC = int(Cmd.DISC)
_OPS: dict[int, Op] = {int(op): op for op in Op}
_WRITING = frozenset((Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES))
_FLAGS_ALLOWED: dict[int, int] = {
    # "NBD_CMD_FLAG_FUA; This flag is valid for all commands"
    Cmd.READ: int(CmdFlag.FUA | CmdFlag.DF),
    Cmd.WRITE: int(CmdFlag.FUA),
    Cmd.FLUSH: int(CmdFlag.FUA),
    Cmd.TRIM: int(CmdFlag.FUA),
    Cmd.CACHE: int(CmdFlag.FUA),
    Cmd.WRITE_ZEROES: int(CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
    Cmd.BLOCK_STATUS: int(CmdFlag.FUA | CmdFlag.REQ_ONE),
}
_FUA, _DF = int(CmdFlag.FUA), int(CmdFlag.DF)
_NO_HOLE, _FAST_ZERO = int(CmdFlag.NO_HOLE), int(CmdFlag.FAST_ZERO)
_REQ_ONE = int(CmdFlag.REQ_ONE)


class Load:
    """Payload in flight on all connections of a server.

    Attributes:
        bytes: so much: arrived or asked for, or answered and not read.
        waiting: connections that take nothing more until it is less.
    """

    __slots__ = ("bytes", "waiting")

    def __init__(self) -> None:
        self.bytes = 0
        self.waiting: dict[Any, None] = {}

    @property
    def relaxed(self) -> bool:
        """Whether it is little enough to go on; half, so as not to flap."""
        return self.bytes <= ALL_BYTES_MAX // 2


class Transmission:
    """One connection's transmission phase.

    Args:
        info: the export.
        structured: structured replies were negotiated.
        allocation: the base:allocation context was selected; implies ``structured``.
        pool: where buffers for large payloads come from.
        leftover: bytes that arrived behind the handshake.
        load: of the whole server.
    """

    __slots__ = (
        "_allocation",
        "_body",
        "_body_filled",
        "_bulk",
        "_drop",
        "_dropped",
        "_encoder",
        "_end",
        "_load",
        "_pool",
        "_read_only",
        "_size",
        "_start",
        "_structured",
        "_view",
        "disconnecting",
        "failure",
        "inflight",
        "inflight_bytes",
        "limited",
        "refused",
        "shutting_down",
    )

    def __init__(
        self,
        info: ExportInfo,
        structured: bool,
        allocation: bool,
        pool: BufferPool,
        leftover: bytes = b"",
        load: Load | None = None,
    ) -> None:
        self._size = info.size
        self._read_only = info.read_only
        self._structured = structured
        self._allocation = allocation
        self._encoder = Encoder(structured)
        self._pool = pool
        self._load = load if load is not None else Load()
        self._view = aligned(max(RECEIVE_BYTES, 2 * len(leftover)))
        self._view[: len(leftover)] = leftover
        self._start = 0
        self._end = len(leftover)
        self._body: Request | None = None
        self._body_filled = 0
        self._bulk = False
        self._drop = 0
        self._dropped: Reply | None = None
        self.refused: list[Reply] = []
        """Replies to requests that no device has to see; see ``take_refused``."""
        self.limited = False
        """Whether the last batch ended because of the limits, not of what had arrived."""
        self.inflight = 0
        """Requests handed out and not answered."""
        self.inflight_bytes = 0
        """Their READ and WRITE payload."""
        self.disconnecting = False
        """The client sent DISC: end the connection when nothing is in flight any more."""
        self.failure = ""
        """Why the connection has to be ended at once; empty while all is well."""
        self.shutting_down = False
        """Set it to answer every further request ESHUTDOWN."""

    # --- receiving -------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether the limits let nothing more through, so that nothing more should be read."""
        return (
            self.inflight >= INFLIGHT_REQUESTS_MAX
            or self.inflight_bytes >= INFLIGHT_BYTES_MAX
            or (self._load.bytes >= ALL_BYTES_MAX and self.inflight_bytes >= EACH_BYTES_MIN)
        )

    @property
    def relaxed(self) -> bool:
        """Whether enough was answered to go on after ``full``; half, so as not to flap."""
        return (
            self.inflight <= INFLIGHT_REQUESTS_MAX // 2
            and self.inflight_bytes <= INFLIGHT_BYTES_MAX // 2
            and (self._load.relaxed or self.inflight_bytes <= EACH_BYTES_MIN // 2)
        )

    def get_buffer(self) -> memoryview:
        """Where the next bytes have to go. Not to be asked for while ``full``: it may be empty."""
        body = self._body
        if body is not None:
            return body.data[self._body_filled :]  # type: ignore[index, return-value]
        view, start = self._view, self._start
        if start:
            self._end -= start
            self._start = 0
            if self._end:
                # Seldom much: the beginning of a request that has not arrived whole.
                view[: self._end] = view[start : start + self._end]
        end = self._end
        if self._bulk:
            return view[end : end + BULK_WINDOW_BYTES]
        return view[end:] if end else view

    def received(self, count: int) -> None:
        """``count`` bytes were put into what ``get_buffer`` returned."""
        if self._body is not None:
            self._body_filled += count
        else:
            self._end += count

    def requests(self) -> list[Request]:
        """The next batch: what arrived whole, passed all checks, and is within the limits.

        Afterwards ``refused`` holds replies for what did not pass, and ``limited`` tells whether
        there may be more. Both parts count as in flight until they went through ``encode``.
        """
        batch: list[Request] = []
        body = self._body
        if body is not None:
            if self._body_filled == body.length:
                self._body = None
                self.inflight += 1
                self.inflight_bytes += body.length
                self._load.bytes += body.length
                batch.append(body)
            return batch
        if self.disconnecting or self.failure:
            self._start = self._end = 0
            return batch
        append, unpack = batch.append, p.REQUEST.unpack_from
        memory, size, plain = self._view, self._size, not self.shutting_down
        writable = plain and not self._read_only
        pos, end = self._start, self._end
        room = INFLIGHT_REQUESTS_MAX - self.inflight
        room_bytes = min(
            INFLIGHT_BYTES_MAX - self.inflight_bytes,
            max(ALL_BYTES_MAX - self._load.bytes, EACH_BYTES_MIN - self.inflight_bytes),
        )
        full_room, full_room_bytes = room, room_bytes
        self.limited = False
        while True:
            if self._drop:
                pos = self._drop_payload(pos, end)
            after = pos + _HEADER_BYTES
            if after > end or self._drop:
                break
            if room <= 0 or room_bytes <= 0:
                self.limited = True
                break
            magic, flags, command, cookie, offset, length = unpack(memory, pos)
            if magic != p.REQUEST_MAGIC:
                self.failure = "a request does not begin with its magic number"
                break
            # The two commands of nearly all traffic, when nothing is odd about them.
            if 0 < length <= p.MAX_PAYLOAD_BYTES and offset + length <= size:
                if command == 0 and not flags and plain:
                    append(Request(_READ, offset, length, cookie))
                    pos = after
                    room -= 1
                    room_bytes -= length
                    continue
                if command == 1 and flags <= _FUA and writable:
                    pos = after + length
                    if length < BULK_BYTES:
                        if pos > end:
                            pos = after - _HEADER_BYTES
                            break
                        data = self._view[after:pos].tobytes()
                        append(Request(_WRITE, offset, length, cookie, data, flags == _FUA))
                    else:
                        body = self._take_bulk(offset, length, cookie, flags == _FUA, after, end)
                        if pos > end:
                            self._body = body
                            pos = end
                            break
                        append(body)
                    room -= 1
                    room_bytes -= length
                    continue
            pos = after
            if command == _DISC:
                # "A client MUST NOT send anything to the server after sending an NBD_CMD_DISC"
                self.disconnecting = True
                pos = end
                break
            request = self._judge(flags, command, cookie, offset, length)
            room -= 1
            if request is not None:
                append(request)
                if request.op is _READ or request.op is _WRITE:
                    room_bytes -= length
        self.inflight += full_room - room
        self.inflight_bytes += full_room_bytes - room_bytes
        self._load.bytes += full_room_bytes - room_bytes
        if pos != self._start:
            self._bulk = self._body is not None
        self._start, self._end = pos, end
        return batch

    def take_refused(self) -> list[Reply]:
        """Replies to requests that no device has to see: errors, and those of length zero."""
        refused, self.refused = self.refused, []
        return refused

    def encode(self, replies: Sequence[Reply]) -> list[Buffer]:
        """Buffers to write for these replies, whose requests are in flight no more."""
        out, payload = self._encoder.encode(replies)
        self.inflight -= len(replies)
        self.inflight_bytes -= payload
        self._load.bytes -= payload
        return out

    def write_off(self) -> None:
        """What is in flight may never be answered: no other connection is to wait for it."""
        self._load.bytes -= self.inflight_bytes
        self._load = Load()

    def cut_off(self) -> None:
        """No more will arrive: a refused WRITE whose payload has not gone by gets no answer."""
        if self._drop:
            self._drop, self._dropped = 0, None
            self.inflight -= 1

    # --- inside ----------------------------------------------------------------------------

    def _take_bulk(
        self, offset: int, length: int, cookie: int, fua: bool, start: int, end: int
    ) -> Request:
        """A large WRITE; what of its payload has arrived is copied, the rest is awaited."""
        data = self._pool.take(length)
        present = min(length, end - start)
        data[:present] = self._view[start : start + present]
        self._body_filled = present
        return Request(_WRITE, offset, length, cookie, data, fua)

    def _drop_payload(self, pos: int, end: int) -> int:
        """Skip the payload of a refused WRITE; its answer is due when all of it has gone by."""
        dropped = min(self._drop, end - pos)
        self._drop -= dropped
        if not self._drop and self._dropped is not None:
            self.refused.append(self._dropped)
            self._dropped = None
        return pos + dropped

    def _judge(
        self, flags: int, command: int, cookie: int, offset: int, length: int
    ) -> Request | None:
        """Everything but plain READ and WRITE: a request for the device, or a refusal."""
        error, message = self._fault(flags, command, offset, length)
        if error or not (length or command == _FLUSH):
            # As a CACHE, which has the plainest answer of all, and counts for no payload.
            reply = Reply(Request(_CACHE, offset, length, cookie), error, message)
            if command == _WRITE and length:
                self._drop, self._dropped = length, reply
            else:
                self.refused.append(reply)
            return None
        return Request(
            _OPS[command],
            offset,
            length,
            cookie,
            None,
            bool(flags & _FUA),
            bool(flags & _DF),
            bool(flags & _NO_HOLE),
            bool(flags & _FAST_ZERO),
            bool(flags & _REQ_ONE),
        )

    def _fault(self, flags: int, command: int, offset: int, length: int) -> tuple[int, str]:
        """What is wrong with a request, as errno and text; 0 when nothing is."""
        if self.shutting_down:
            return Errno.ESHUTDOWN, "the server is shutting down"
        if command not in _FLAGS_ALLOWED:
            # "The server SHOULD return NBD_EINVAL if it receives an unknown command."
            return Errno.EINVAL, f"unknown command {command}"
        if flags & ~_FLAGS_ALLOWED[command] or (flags & _DF and not self._structured):
            # "... or a request with a flag not explicitly documented as applicable to the given
            # request"; DF only where "the transmission flags include NBD_FLAG_SEND_DF".
            return Errno.EINVAL, f"flags {flags:#x} do not fit command {command}"
        if command == Cmd.FLUSH:
            # "For a flush request, length and offset are reserved, and MUST be set to all-zero."
            return (Errno.EINVAL, "a flush has no range") if offset or length else (0, "")
        if self._read_only and command in _WRITING:
            # "it SHOULD return NBD_EPERM if it receives a write or trim request on a read-only
            # export"
            return Errno.EPERM, "the export is read-only"
        if command == Cmd.BLOCK_STATUS and not (self._allocation and length):
            # "Servers SHOULD reply with NBD_EINVAL to clients sending NBD_CMD_BLOCK_STATUS
            # without selecting at least one metadata context."
            return Errno.EINVAL, "no meta context was selected, or the range is empty"
        if offset + length > self._size:
            # "The server SHOULD return NBD_ENOSPC if it receives a write request including one or
            # more sectors beyond the size of the device. ... NBD_EINVAL if it receives a read or
            # trim request including one or more sectors beyond the size of the device"
            beyond = command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
            return Errno.ENOSPC if beyond else Errno.EINVAL, "the range ends beyond the export"
        if length > p.MAX_PAYLOAD_BYTES and command in (Cmd.READ, Cmd.WRITE):
            # "The server SHOULD report an NBD_EINVAL error if the client's request is ... larger
            # than the advertised maximum block size."
            return Errno.EINVAL, f"a payload is limited to {p.MAX_PAYLOAD_BYTES} bytes"
        return 0, ""
