"""The disk work of the journal: steps that a worker runs while the owner of the store goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from crc32c import crc32c

from torus_actors.errors import Corruption
from torus_actors.model.checksums import Buffer
from torus_actors.storage.disk import Disk, File
from torus_actors.storage.journal_format import (
    Position,
    SegmentHeader,
    pack_segment_header,
    segment_name,
)
from torus_actors.storage.journal_index import Log, Segment, Stored, Ticket
from torus_actors.storage.step import Step

FILL_BYTES = 512 << 10
"""Zeros written in one step: commits go between, and wait a millisecond or two at most."""

_ZEROS = bytes(FILL_BYTES)


class Placed(NamedTuple):
    """A ticket in a group.

    Attributes:
        ticket: what is written.
        offset: of its payload in the segment.
        cut: of its volume, as the entry says it.
    """

    ticket: Ticket
    offset: int
    cut: Position


class Commit(Step):
    """Write one group and make it durable.

    Args:
        segment: where to.
        buffers: the group, whole pages in all.
        placed: what is in it.
        offset: of the group.
        length: of the group.
        with_table: whether it has a table.
    """

    def __init__(
        self,
        lock: threading.Lock,
        segment: Segment,
        buffers: Sequence[Buffer],
        placed: list[Placed],
        offset: int,
        length: int,
        with_table: bool,
    ) -> None:
        super().__init__(lock)
        self.segment = segment
        self.buffers = buffers
        self.placed = placed
        self.offset = offset
        self.length = length
        self.with_table = with_table

    def _work(self) -> None:
        self.segment.file.pwritev(self.buffers, self.offset)
        self.sync()

    def sync(self) -> None:
        """Make it durable: nothing in it may be acknowledged before."""
        self.segment.file.fdatasync()


class MakeSegment(Step):
    """Fill a part of a new segment file with zeros; the last step gives it its name.

    The zeros are written, not only reserved: a commit into them changes no metadata of the file
    system, which a sync would have to wait for.

    Args:
        disk: the journal's directory.
        header: of the segment to be.
        first: the first of the journal; None if this one will be.
        file: from the step before; None at first.
        filled: bytes filled so far.
    """

    def __init__(
        self,
        lock: threading.Lock,
        disk: Disk,
        header: SegmentHeader,
        first: Segment | None,
        file: File | None = None,
        filled: int = 0,
    ) -> None:
        super().__init__(lock)
        self.disk = disk
        self.header = header
        self.first = first
        self.file = file
        self.filled = filled

    @property
    def complete(self) -> bool:
        """Whether this was the last step."""
        return self.filled == self.header.size

    @property
    def path(self) -> str:
        """Name of the file until it is complete."""
        return f"{segment_name(self.header.segment)}.new"

    def following(self) -> MakeSegment:
        """The next step."""
        return MakeSegment(self._lock, self.disk, self.header, self.first, self.file, self.filled)

    def _work(self) -> None:
        if self.file is None:
            self.file = self.disk.open(self.path, create=True)
        size = min(FILL_BYTES, self.header.size - self.filled)
        self.file.pwrite(memoryview(_ZEROS)[:size], self.filled)
        self.filled += size
        if self.complete:
            self.file.pwrite(pack_segment_header(self.header), 0)
        self.file.fdatasync()
        if self.complete:
            self.disk.rename(self.path, segment_name(self.header.segment))
            self.disk.fsync_dir()
            if self.first is not None:
                tell_count(self.first, self.header.store_id, self.header.segments)


def tell_count(first: Segment, store_id: bytes, count: int) -> None:
    """Have the first segment tell how many there are, durably: before the newest one is used.

    Its loss would show in no name, and what was acknowledged in it would be missing unnoticed.
    """
    header = SegmentHeader(first.index, store_id, first.generation, first.size, count)
    write_header(first, header)


def write_header(segment: Segment, header: SegmentHeader) -> None:
    """Write both copies of a header, durably."""
    # Each copy lies in one sector: wherever the power goes, both are whole, the old or the new one.
    segment.file.pwrite(pack_segment_header(header), 0)
    segment.file.fdatasync()


class Reuse(Step):
    """Begin a new generation of a segment in which nothing is needed.

    Args:
        segment: which.
        header: its new one.
    """

    def __init__(self, lock: threading.Lock, segment: Segment, header: SegmentHeader) -> None:
        super().__init__(lock)
        self.segment = segment
        self.header = header

    def _work(self) -> None:
        write_header(self.segment, self.header)


class ReadRecords(Step):
    """Read records and verify them.

    Args:
        lock: of the store, or one of its own where the segments are kept from being reused.
        items: the records with the file that each is in.
    """

    def __init__(
        self, lock: threading.Lock, items: list[tuple[Log, Position, Stored, Segment]]
    ) -> None:
        super().__init__(lock)
        self.items = items
        self.payloads: list[bytearray] = []

    def _work(self) -> None:
        self.payloads = [read_record(segment, stored) for _, _, stored, segment in self.items]


def read_record(segment: Segment, stored: Stored) -> bytearray:
    """Read one record and verify it.

    Raises:
        Corruption: it is damaged, or cannot be read.
    """
    data = bytearray(stored.length)
    try:
        count = segment.file.preadv([data], stored.offset) if data else 0
    except OSError as error:
        raise Corruption(f"{segment_name(segment.index)} cannot be read: {error}") from error
    if count != stored.length or crc32c(data) != stored.crc:
        raise Corruption(f"{segment_name(segment.index)}: the record at {stored.offset} is damaged")
    return data
