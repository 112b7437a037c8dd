"""Replies on their way to the wire: from ``Reply`` objects to buffers to write.

Payload is never copied here: what a device put into ``Reply.buffers`` goes out as it is, between
packed headers. Quotations are from doc/proto.md of https://github.com/NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from torus_actors.nbd import protocol as p
from torus_actors.nbd.protocol import Chunk, Errno
from torus_actors.nbd.requests import Hole, Op, Piece, Reply, Request

Buffer = bytes | bytearray | memoryview

ZEROES = memoryview(bytes(1 << 20))
"""What holes are written from, to clients that cannot be told of holes; shared by all."""

_READ, _WRITE, _BLOCK_STATUS = Op.READ, Op.WRITE, Op.BLOCK_STATUS
_NONE, _DATA, _HOLE = int(Chunk.NONE), int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)
_ERROR, _STATUS = int(Chunk.ERROR), int(Chunk.BLOCK_STATUS)
_EIO = int(Errno.EIO)
_DATA_EXTRA = p.CHUNK_DATA.size - p.CHUNK.size
_HOLE_EXTRA = p.CHUNK_HOLE.size - p.CHUNK.size
_ERROR_EXTRA = p.CHUNK_ERROR.size - p.CHUNK.size


class Encoder:
    """Encodes the replies of one connection.

    Args:
        structured: structured replies were negotiated: all replies are, so that the stream can be
            read without knowing the requests.
    """

    __slots__ = ("_structured",)

    def __init__(self, structured: bool) -> None:
        self._structured = structured

    def encode(self, replies: Sequence[Reply]) -> tuple[list[Buffer], int]:
        """Buffers to write, in order, and the READ and WRITE payload that the requests had."""
        out: list[Buffer] = []
        append = out.append
        structured = self._structured
        simple_pack, data_pack, chunk_pack = p.SIMPLE_REPLY.pack, p.CHUNK_DATA.pack, p.CHUNK.pack
        payload = 0
        for reply in replies:
            request = reply.request
            op = request.op
            if op is _READ or op is _WRITE:
                payload += request.length
            if reply.error:
                self._error(out, request, reply.error, reply.message)
            elif op is _READ:
                buffers = reply.buffers
                length = request.length
                if len(buffers) == 1 and len(buffers[0]) == length and length:
                    piece = buffers[0]
                    if type(piece) is Hole:
                        self._pieces(out, request, buffers)
                        continue
                    if structured:
                        # "MUST NOT [set DONE] for a content chunk if it would still be possible
                        # to detect an error while transmitting": all data is in memory here.
                        append(
                            data_pack(
                                p.STRUCTURED_REPLY_MAGIC,
                                p.CHUNK_DONE,
                                _DATA,
                                request.cookie,
                                length + _DATA_EXTRA,
                                request.offset,
                            )
                        )
                    else:
                        append(simple_pack(p.SIMPLE_REPLY_MAGIC, 0, request.cookie))
                    append(piece)  # type: ignore[arg-type]
                else:
                    self._pieces(out, request, buffers)
            elif op is _BLOCK_STATUS:
                self._extents(out, request, reply.extents)
            elif structured:
                append(chunk_pack(p.STRUCTURED_REPLY_MAGIC, p.CHUNK_DONE, _NONE, request.cookie, 0))
            else:
                append(simple_pack(p.SIMPLE_REPLY_MAGIC, 0, request.cookie))
        return out, payload

    def _error(self, out: list[Buffer], request: Request, error: int, message: str) -> None:
        if not self._structured:
            # "it MUST NOT send any payload for this request"
            out.append(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, request.cookie))
            return
        text = p.message_bytes(message)
        out.append(
            p.CHUNK_ERROR.pack(
                p.STRUCTURED_REPLY_MAGIC,
                p.CHUNK_DONE,
                _ERROR,
                request.cookie,
                _ERROR_EXTRA + len(text),
                error,
                len(text),
            )
            + text
        )

    def _pieces(self, out: list[Buffer], request: Request, pieces: Sequence[Piece]) -> None:
        """READ data in several pieces, some of which may be holes."""
        total = sum(map(len, pieces))
        if total != request.length:
            # Sent as it is, it would put the client out of step with the stream for good.
            message = f"the device returned {total} bytes of {request.length}"
            self._error(out, request, _EIO, message)
            return
        if not self._structured:
            out.append(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, request.cookie))
            for piece in pieces:
                _append_plain(out, piece)
            return
        # "If the area being read contains both data and a hole, the server MUST use
        # NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present" under NBD_CMD_FLAG_DF.
        runs = [list(pieces)] if request.df and len(pieces) > 1 else _runs(pieces)
        if not runs:
            # "each chunk MUST describe at least one byte"
            out.append(
                p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, p.CHUNK_DONE, _NONE, request.cookie, 0)
            )
            return
        offset = request.offset
        for i, run in enumerate(runs):
            flags = p.CHUNK_DONE if i == len(runs) - 1 else 0
            length = sum(map(len, run))
            if len(run) == 1 and isinstance(run[0], Hole):
                fields = (flags, _HOLE, request.cookie, _HOLE_EXTRA, offset, length)
                out.append(p.CHUNK_HOLE.pack(p.STRUCTURED_REPLY_MAGIC, *fields))
            else:
                head = (flags, _DATA, request.cookie, length + _DATA_EXTRA, offset)
                out.append(p.CHUNK_DATA.pack(p.STRUCTURED_REPLY_MAGIC, *head))
                for piece in run:
                    _append_plain(out, piece)
            offset += length

    def _extents(
        self, out: list[Buffer], request: Request, extents: Sequence[tuple[int, int]]
    ) -> None:
        fields: list[int] = []
        left = request.length
        # "If the client used the NBD_CMD_FLAG_REQ_ONE flag in the request, then every reply chunk
        # MUST contain exactly one descriptor", not longer than the request.
        for length, state in extents[: 1 if request.req_one else p.MAX_EXTENTS]:
            clipped = min(length, left)
            if clipped <= 0:
                break
            left -= clipped
            fields += (clipped, state)
        if not fields:
            # "the server MUST return at least one status descriptor"; and it "MAY always safely
            # report a status of 0 for any block".
            fields = [request.length, 0]
        size = 4 + 4 * len(fields)
        head = (p.CHUNK_DONE, _STATUS, request.cookie, size)
        out.append(
            p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, *head)
            + struct.pack(f">I{len(fields)}I", p.BASE_ALLOCATION_ID, *fields)
        )


def _append_plain(out: list[Buffer], piece: Piece) -> None:
    if not isinstance(piece, Hole):
        out.append(piece)
        return
    left = piece.length
    while left > 0:
        part = ZEROES[: min(left, len(ZEROES))]
        out.append(part)
        left -= len(part)


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbouring data together, each stretch of holes as one Hole; nothing empty."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if not len(piece):
            continue
        last = runs[-1] if runs else None
        if isinstance(piece, Hole):
            if last is not None and isinstance(last[0], Hole):
                last[0] = Hole(last[0].length + piece.length)
            else:
                runs.append([piece])
        elif last is not None and not isinstance(last[0], Hole):
            last.append(piece)
        else:
            runs.append([piece])
    return runs
