"""The bytes of one block that are known in memory: data, zero runs, and what is not known.

A volume keeps one ``ExtentMap`` for each block that has writes not yet folded into a new block. No
operation touches bytes one by one, and none copies data, except to let go of a big buffer of which
only a little is still wanted.
"""

from __future__ import annotations

import enum
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final

from torus_actors.errors import Invalid

Buffer = bytes | bytearray | memoryview


class Missing(enum.Enum):
    """Type of ``MISSING``, so that type checkers can tell it from data."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
"""In place of a buffer: nothing is known of these bytes, ask the block below."""

Piece = tuple[int, int, Buffer | Missing | None]
"""Start in the block, length, and the data; ``None`` is a zero run."""

COMPACT_RATIO = 4
"""A remainder smaller than this part of the buffer that it keeps alive is copied out of it. So each
buffer kept alive has at least one extent of a quarter of it, and the map holds at most four times
``data_bytes``; while a byte is copied only when three others are let go."""

_ZEROS = memoryview(bytes(64 * 1024))
"""Source of zeros for ``overlay``, so that a long zero run allocates nothing."""


class ExtentMap:
    """Sorted extents of one block that do not overlap.

    Buffers are kept, not copied: who writes one must not change it afterwards.
    """

    __slots__ = ("_buffers", "_ends", "_starts", "covered_bytes", "data_bytes")

    covered_bytes: int
    """Bytes of the block that are known: data and zero runs."""

    data_bytes: int
    """Bytes of data held; zero runs take no memory."""

    def __init__(self) -> None:
        # Parallel lists: bisect runs at the speed of C on plain integers.
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._buffers: list[Buffer | None] = []
        self.covered_bytes = 0
        self.data_bytes = 0

    def __len__(self) -> int:
        """Number of extents."""
        return len(self._starts)

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._starts)

    def __repr__(self) -> str:
        return (
            f"ExtentMap(extents={len(self._starts)}, covered_bytes={self.covered_bytes},"
            f" data_bytes={self.data_bytes})"
        )

    @property
    def is_all_zero(self) -> bool:
        """Whether something is known, and all of that is zero runs."""
        return self.data_bytes == 0 and self.covered_bytes > 0

    def is_full(self, block_size: int) -> bool:
        """Whether every byte of a block of that size is known, so that no read below is needed."""
        return self.covered_bytes == block_size

    # --- changes --------------------------------------------------------------------------------

    def write(self, offset: int, buffer: Buffer) -> None:
        """Put data over whatever was there.

        Args:
            offset: where it starts in the block, bytes.
            buffer: one-dimensional bytes; kept. Empty ones are ignored.

        Raises:
            Invalid: the offset is negative.
        """
        length = len(buffer)
        end = offset + length
        starts, ends = self._starts, self._ends
        at = bisect_right(ends, offset)
        if offset < 0:
            raise Invalid(f"offset {offset} is negative")
        if length == 0:
            return
        if at == len(starts) or starts[at] >= end:
            starts.insert(at, offset)
            ends.insert(at, end)
            self._buffers.insert(at, buffer)
            self.covered_bytes += length
            self.data_bytes += length
        elif starts[at] == offset and ends[at] == end:
            if self._buffers[at] is None:
                self.data_bytes += length
            self._buffers[at] = buffer
        elif starts[at] <= offset and end <= ends[at] and self._buffers[at] is not None:
            self._split(at, offset, end, buffer)
        else:
            self._replace(at, offset, end, buffer)

    def zero(self, offset: int, length: int) -> None:
        """Make a run of zeros; it holds no data, and joins the zero runs it touches.

        Raises:
            Invalid: offset or length is negative.
        """
        if offset < 0 or length < 0:
            raise Invalid(f"offset {offset} or length {length} is negative")
        if length == 0:
            return
        starts, ends, buffers = self._starts, self._ends, self._buffers
        end = offset + length
        at = bisect_left(ends, offset)
        if at < len(ends) and buffers[at] is None and starts[at] < offset:
            offset = starts[at]
        last = bisect_right(starts, end) - 1
        if last >= 0 and buffers[last] is None and ends[last] > end:
            end = ends[last]
        self._replace(bisect_right(ends, offset), offset, end, None)

    def discard(self, offset: int, length: int) -> None:
        """Forget what is known of these bytes.

        Raises:
            Invalid: offset or length is negative.
        """
        if offset < 0 or length < 0:
            raise Invalid(f"offset {offset} or length {length} is negative")
        if length:
            self._replace(bisect_right(self._ends, offset), offset, offset + length, MISSING)

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._ends.clear()
        self._buffers.clear()
        self.covered_bytes = 0
        self.data_bytes = 0

    def merge_from(self, newer: ExtentMap) -> None:
        """Put everything that ``newer`` knows over this; ``newer`` stays as it is."""
        for start, length, buffer in list(newer.items()):
            if buffer is None:
                self.zero(start, length)
            else:
                self.write(start, buffer)

    def _split(self, at: int, offset: int, end: int, new: Buffer) -> None:
        """Put ``new`` over a part of data extent ``at``: it changes neither counter."""
        old = self._buffers[at]
        start, stop = self._starts[at], self._ends[at]
        edges = [offset, end]
        buffers: list[Buffer | None] = [new]
        if start < offset:
            edges.insert(0, start)
            buffers.insert(0, _cut(old, 0, offset - start))
        if end < stop:
            edges.append(stop)
            buffers.append(_cut(old, end - start, stop - start))
        self._starts[at : at + 1] = edges[:-1]
        self._ends[at : at + 1] = edges[1:]
        self._buffers[at : at + 1] = buffers

    def _replace(self, at: int, offset: int, end: int, new: Buffer | Missing | None) -> None:
        """Cut ``offset`` to ``end`` out of the extents from number ``at`` on; put ``new`` there."""
        starts, ends, buffers = self._starts, self._ends, self._buffers
        stop = bisect_left(starts, end, at)
        removed_bytes = removed_data = 0
        for i in range(at, stop):
            size = ends[i] - starts[i]
            removed_bytes += size
            if buffers[i] is not None:
                removed_data += size
        new_starts: list[int] = []
        new_ends: list[int] = []
        new_buffers: list[Buffer | None] = []
        if at < stop and starts[at] < offset:
            new_starts.append(starts[at])
            new_ends.append(offset)
            new_buffers.append(_cut(buffers[at], 0, offset - starts[at]))
        if new is not MISSING:
            new_starts.append(offset)
            new_ends.append(end)
            new_buffers.append(new)
        if at < stop and ends[stop - 1] > end:
            start = starts[stop - 1]
            new_starts.append(end)
            new_ends.append(ends[stop - 1])
            new_buffers.append(_cut(buffers[stop - 1], end - start, ends[stop - 1] - start))
        starts[at:stop] = new_starts
        ends[at:stop] = new_ends
        buffers[at:stop] = new_buffers
        added_bytes = added_data = 0
        for i, buffer in enumerate(new_buffers):
            size = new_ends[i] - new_starts[i]
            added_bytes += size
            if buffer is not None:
                added_data += size
        self.covered_bytes += added_bytes - removed_bytes
        self.data_bytes += added_data - removed_data

    # --- reading --------------------------------------------------------------------------------

    def read(self, offset: int, length: int, pieces_max: int = sys.maxsize) -> list[Piece]:
        """What is known of a range, in order and without gaps.

        Args:
            offset: start in the block, bytes.
            length: bytes; 0 gives an empty list.
            pieces_max: end after so many pieces, at least 1.

        Returns:
            Pieces whose lengths add up to ``length``, if there are no more than wanted. Data is
            not copied: a piece is the written buffer or a view of it.

        Raises:
            Invalid: offset or length is negative.
        """
        end = offset + length
        starts, ends = self._starts, self._ends
        at = bisect_right(ends, offset)
        if at < len(starts) and starts[at] <= offset and end <= ends[at] and length > 0:
            return [(offset, length, self._view(at, offset, end))]
        if offset < 0 or length < 0:
            raise Invalid(f"offset {offset} or length {length} is negative")
        pieces: list[Piece] = []
        position = offset
        while position < end and len(pieces) < pieces_max:
            if at == len(starts) or starts[at] >= end:
                pieces.append((position, end - position, MISSING))
                break
            start = starts[at]
            if start > position:
                pieces.append((position, start - position, MISSING))
                position = start
                continue
            stop = min(ends[at], end)
            pieces.append((position, stop - position, self._view(at, position, stop)))
            position = stop
            at += 1
        return pieces

    def _view(self, at: int, start: int, end: int) -> Buffer | None:
        buffer = self._buffers[at]
        if buffer is None:
            return None
        first = self._starts[at]
        if start == first and end == self._ends[at]:
            return buffer
        return memoryview(buffer)[start - first : end - first]

    def items(self) -> Iterator[tuple[int, int, Buffer | None]]:
        """Every extent: start, length, buffer or ``None`` for zeros; in order."""
        for start, end, buffer in zip(self._starts, self._ends, self._buffers, strict=True):
            yield start, end - start, buffer

    def overlay(self, base: bytearray | memoryview, base_offset: int = 0) -> None:
        """Copy what is known into a buffer that holds the older bytes.

        Args:
            base: writable; its byte 0 is byte ``base_offset`` of the block. What lies outside it
                is left out.
            base_offset: start of ``base`` in the block, bytes.
        """
        base_end = base_offset + len(base)
        starts, ends = self._starts, self._ends
        with memoryview(base) as target:
            at = bisect_right(ends, base_offset)
            while at < len(starts) and starts[at] < base_end:
                start, end = max(starts[at], base_offset), min(ends[at], base_end)
                data = self._view(at, start, end)
                if data is not None:
                    target[start - base_offset : end - base_offset] = data
                else:
                    for run in range(start, end, len(_ZEROS)):
                        size = min(len(_ZEROS), end - run)
                        target[run - base_offset : run - base_offset + size] = _ZEROS[:size]
                at += 1


def _cut(buffer: Buffer | None, start: int, end: int) -> Buffer | None:
    """A remainder of an extent: a view, or a copy if the view would keep too much alive."""
    if buffer is None:
        return None
    if isinstance(buffer, memoryview):
        part = buffer[start:end]
        behind = buffer.obj
    else:
        part = memoryview(buffer)[start:end]
        behind = buffer
    if isinstance(behind, (bytes, bytearray)):
        kept_alive = len(behind)
    else:
        kept_alive = memoryview(behind).nbytes
    return bytes(part) if (end - start) * COMPACT_RATIO < kept_alive else part
