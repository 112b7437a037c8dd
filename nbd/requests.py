"""The boundary between NBD connections and the block device behind them.

A connection hands its device one batch of requests for each wake-up of its socket; the device
answers each of them exactly once, in any order, in as many calls as it likes, by ``reply`` of the
connection. Requests arrive checked: inside the export, of allowed size, with flags that fit, and
never a writing one on a read-only export. All on one event loop.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torus_actors.errors import TorusError
from torus_actors.nbd.protocol import Cmd, TransmissionFlag, errno_of


class Op(enum.IntEnum):
    """What a request asks for; values are those of the wire."""

    READ = Cmd.READ
    WRITE = Cmd.WRITE
    FLUSH = Cmd.FLUSH
    TRIM = Cmd.TRIM
    CACHE = Cmd.CACHE
    WRITE_ZEROES = Cmd.WRITE_ZEROES
    BLOCK_STATUS = Cmd.BLOCK_STATUS


@dataclass(slots=True, eq=False)
class Request:
    """One request of a client.

    Attributes:
        op: what to do.
        offset: bytes from the start of the export.
        length: bytes; at least 1, except for FLUSH.
        cookie: the client's name for it, echoed in the reply; unique only among requests that are
            in flight on one connection.
        data: WRITE only, exactly ``length`` bytes. The device may keep it as long as it likes: the
            memory is not reused while any reference to it, or to a slice of it, lives.
        fua: do not answer before the effect of this request is durable.
        df: READ: answer in one piece. The connection sees to it.
        no_hole: WRITE_ZEROES: leave the range allocated.
        fast_zero: WRITE_ZEROES: answer ENOTSUP, and change nothing, unless it is faster than
            writing.
        req_one: BLOCK_STATUS: one extent is enough. The connection sees to it; a device that
            looks for no more saves work.
    """

    op: Op
    offset: int
    length: int
    cookie: int
    data: memoryview | bytes | None = None
    fua: bool = False
    df: bool = False
    no_hole: bool = False
    fast_zero: bool = False
    req_one: bool = False


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands in a READ reply for ``length`` zero bytes that are not stored anywhere."""

    length: int

    def __len__(self) -> int:
        return self.length


Piece = memoryview | bytes | bytearray | Hole
"""A part of READ data. Views must be of single bytes (format ``B``), and their content must not
change until the reply was written out."""


@dataclass(slots=True, eq=False)
class Reply:
    """The answer to one request.

    Attributes:
        request: the request it answers.
        error: 0, or a ``protocol.Errno``.
        message: for a person; shown to clients that negotiated structured replies.
        buffers: READ: the data in order; the lengths add up to the request's.
        extents: BLOCK_STATUS: (length in bytes, ``STATE_*`` flags) in order from the request's
            offset; at least one; what reaches beyond the request is cut off. They may end before
            it does: the client asks again from there.
    """

    request: Request
    error: int = 0
    message: str = ""
    buffers: Sequence[Piece] = ()
    extents: Sequence[tuple[int, int]] = ()

    @classmethod
    def failed(cls, request: Request, error: TorusError) -> Reply:
        """The answer to a request that failed."""
        return cls(request, error=errno_of(error), message=str(error))


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client learns of an export when it opens it.

    Attributes:
        name: canonical name.
        size: bytes.
        description: one line for a person, may be empty.
        read_only: writing requests are answered EPERM before they reach the device.
    """

    name: str
    size: int
    description: str = ""
    read_only: bool = False

    def flags(self, structured: bool) -> TransmissionFlag:
        """Transmission flags; ``structured`` tells whether structured replies were negotiated."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
            # One device serves all connections, and its FLUSH covers the writes of all of them.
            | TransmissionFlag.CAN_MULTI_CONN
        )
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= (
                TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_FAST_ZERO
            )
        if structured:
            # "MUST leave this flag clear if structured replies have not been negotiated."
            flags |= TransmissionFlag.SEND_DF
        return flags


class Replies(Protocol):
    """Where a device sends its answers: the connection, seen from the device."""

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answer requests; from inside ``submit`` or later, on the connection's event loop.

        Harmless after the connection is gone.
        """


class BlockDevice(Protocol):
    """What stands behind an export; one object may serve any number of connections."""

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """Take a batch of requests; each must be answered exactly once by ``conn.reply``.

        Raises:
            TorusError: none of the batch was taken and none will be answered; the connection
                answers all of it with the errno of that error.
        """


class Exports(Protocol):
    """Which exports there are. Called on the event loop, possibly several at once."""

    async def list(self) -> list[str]:
        """Names of all exports that a client may open."""

    async def open(self, name: str) -> tuple[ExportInfo, BlockDevice]:
        """Open an export for one connection; the empty name is the default export.

        Raises:
            TorusError: it cannot be opened; the text is shown to the client.
        """

    async def release(self, name: str) -> None:
        """The other half of one successful ``open`` with that same name.

        All requests of the connection have been answered by then.
        """
