"""What the journal looks like on the disk.

The journal of a node is a set of segment files of equal size. A segment begins with a page that
holds its header twice, half a page apart; behind it lie groups, one after the other::

    group:  header 64 | one entry of 64 bytes for each record | payloads | zeros to whole pages

A group is what one commit wrote, records of any volumes. Its checksum covers header and entries;
each entry has the checksum of its payload. A group counts only if its header names the segment's
present generation, which grows with each reuse: what an earlier use left behind is never read.

Pages of 4 KiB, so that no write ever shares a page, or a sector, with what is durable already.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from crc32c import crc32c

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.checksums import PAGE_SIZE, Buffer

FORMAT_VERSION = 1

HEADER_SIZE = PAGE_SIZE
"""Where the first group of a segment begins."""

HEADER_COPIES = (0, PAGE_SIZE // 2)
"""Two, in different sectors: a header is written again with each reuse, and one may rot."""

GROUP_SIZE = 64
ENTRY_SIZE = 64

GROUP_ENTRIES_MAX = 500
"""Entries in one group: with two buffers each they still go out in one vectored write."""

DIRECTORY_BYTES_MAX = GROUP_SIZE + (GROUP_ENTRIES_MAX + 1) * ENTRY_SIZE
"""Header and entries of the largest group: a table comes beside the others."""

SEGMENT_MAGIC = b"torusJS1"
GROUP_MAGIC = b"torusJG1"

NAME_PREFIX = "segment-"

_SEGMENT = struct.Struct("<8sII16sQQI")
_GROUP = struct.Struct("<8sQQIII24xI")
_ENTRY = struct.Struct("<BBHIQQQQQQII")
_TABLE = struct.Struct("<IIQQ")
_KEY = struct.Struct("<8sQ")
_CRC = struct.Struct("<I")

RECORD, COPY, STATE, TABLE = 1, 2, 3, 4
"""Kinds of entry: a record; a record written again because its segment is to be reused; what is
known of a volume; where the other segments end."""

FIRST, SEEN, INCOMPLETE = 1, 2, 4
"""Flags. FIRST: of a record, none of its epoch came before it. SEEN: there were records of the
epoch that the cut is in, so that the next one has to follow it. INCOMPLETE: damage may once
have taken all that was here of a volume: of a TABLE, of any; of a STATE, of its own."""


class SegmentHeader(NamedTuple):
    """Head of a segment file.

    Attributes:
        segment: which of the segments.
        store_id: 16 random bytes, the same in all segments of a journal.
        generation: how often it was put to use.
        size: of the file, bytes.
        segments: how many there were when it was written; 0 in an older journal. That of the first
            segment is kept up to date, to tell when the file with the highest number is lost.
    """

    segment: int
    store_id: bytes
    generation: int
    size: int
    segments: int = 0


class Position(NamedTuple):
    """A place in a volume's log; positions are ordered."""

    epoch: int
    seq: int


START = Position(0, 0)


class Entry(NamedTuple):
    """What a group's directory says of one record.

    Attributes:
        kind: RECORD, COPY, STATE or TABLE.
        flags: FIRST, SEEN, INCOMPLETE.
        volume: whose it is; 0 for a TABLE.
        epoch: of the record; of a STATE: the epoch promised.
        seq: of the record.
        cut: records of the volume up to here are no longer needed.
        dropped: entries of the volume that lie before this number in the log are void.
        crc: CRC-32C of the payload.
        offset: of the payload, from the start of the group.
        length: of the payload.
    """

    kind: int
    flags: int
    volume: int
    epoch: int
    seq: int
    cut: Position
    dropped: int
    crc: int
    offset: int
    length: int


class Group(NamedTuple):
    """One group as found on the disk.

    Attributes:
        offset: in its segment.
        length: bytes, whole pages.
        first: number of its first entry; the others follow.
        entries: its directory.
    """

    offset: int
    length: int
    first: int
    entries: list[Entry]

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.length

    @property
    def last(self) -> int:
        """Number of its last entry."""
        return self.first + len(self.entries) - 1


class SegmentEnd(NamedTuple):
    """One line of a TABLE: a sealed segment, and where its last group ends."""

    segment: int
    generation: int
    end: int


def segment_name(index: int) -> str:
    """File name of a segment."""
    return f"{NAME_PREFIX}{index:06d}"


def pages(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def pack_segment_header(header: SegmentHeader) -> bytes:
    """The first page of a segment."""
    body = _SEGMENT.pack(
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        header.segment,
        header.store_id,
        header.generation,
        header.size,
        header.segments,
    )
    copy = body + _CRC.pack(crc32c(body))
    return copy.ljust(HEADER_COPIES[1], b"\0") * 2


def parse_segment_header(page: Buffer, name: str) -> SegmentHeader:
    """The newest of the header's copies.

    Raises:
        Corruption: none of them is whole.
        Invalid: of a version that this program does not know.
    """
    found: list[SegmentHeader] = []
    for at in HEADER_COPIES:
        copy = bytes(page[at : at + _SEGMENT.size + _CRC.size])
        body = copy[: _SEGMENT.size]
        if len(copy) < _SEGMENT.size + _CRC.size or copy[_SEGMENT.size :] != _CRC.pack(
            crc32c(body)
        ):
            continue
        magic, version, index, store_id, generation, size, segments = _SEGMENT.unpack(body)
        if magic != SEGMENT_MAGIC:
            continue
        if version != FORMAT_VERSION:
            raise Invalid(f"{name} has format {version}, and this program knows {FORMAT_VERSION}")
        found.append(SegmentHeader(index, store_id, generation, size, segments))
    if not found:
        raise Corruption(f"{name}: the header is damaged")
    return max(found, key=lambda header: (header.generation, header.segments))


def seed_of(store_id: bytes, index: int) -> int:
    """Where the checksums of a segment's groups begin: groups of elsewhere never match."""
    return crc32c(store_id + index.to_bytes(4, "little"))


def pack_directory(
    seed: int, index: int, generation: int, first: int, length: int, entries: list[Entry]
) -> bytes:
    """Header and entries of a group."""
    rows = b"".join(
        [
            _ENTRY.pack(
                e.kind,
                e.flags,
                0,
                e.length,
                e.volume,
                e.epoch,
                e.seq,
                e.cut.epoch,
                e.cut.seq,
                e.dropped,
                e.crc,
                e.offset,
            )
            for e in entries
        ]
    )
    head = _GROUP.pack(GROUP_MAGIC, generation, first, index, length, len(entries), 0)
    crc = crc32c(rows, crc32c(head[: -_CRC.size], seed))
    return head[: -_CRC.size] + _CRC.pack(crc) + rows


def parse_group(data: Buffer, offset: int, seed: int, generation: int) -> Group | None:
    """The group that begins at ``offset`` of a segment's bytes.

    Args:
        data: the whole segment.
        offset: a multiple of 4096.
        seed: see `seed_of`.
        generation: the segment's present one.

    Returns:
        None when there is none, or its directory is damaged.
    """
    room = len(data) - offset
    if room < PAGE_SIZE:
        return None
    magic, written, first, _, length, count, crc = _GROUP.unpack_from(data, offset)
    if magic != GROUP_MAGIC or not same_generation(written, generation):
        return None
    start, end = offset + GROUP_SIZE, offset + GROUP_SIZE + count * ENTRY_SIZE
    if not end - offset <= length <= room or length % PAGE_SIZE:
        return None
    view = memoryview(data)
    if crc != crc32c(view[start:end], crc32c(view[offset : start - _CRC.size], seed)):
        return None
    entries = [
        Entry(kind, flags, volume, epoch, seq, Position(cut_epoch, cut_seq), dropped, crc, at, size)
        for (
            kind,
            flags,
            _,
            size,
            volume,
            epoch,
            seq,
            cut_epoch,
            cut_seq,
            dropped,
            crc,
            at,
        ) in _ENTRY.iter_unpack(view[start:end])
    ]
    return Group(offset, length, first, entries)


def begins_group(data: Buffer, offset: int, generation: int) -> bool:
    """Whether there is the header of a group of this generation, be the group whole or not."""
    if len(data) - offset < GROUP_SIZE:
        return False
    magic, written, *_ = _GROUP.unpack_from(data, offset)
    return magic == GROUP_MAGIC and same_generation(written, generation)


def same_generation(written: int, present: int) -> bool:
    """Whether a group belongs to the present use of its segment."""
    return written == present


def next_group(data: Buffer, offset: int, seed: int, generation: int) -> Group | None:
    """The first group at or behind ``offset``: what lies before it, if anything, is damaged."""
    key = _KEY.pack(GROUP_MAGIC, generation)
    for at in range(offset, len(data), PAGE_SIZE):
        if data[at : at + len(key)] == key:
            group = parse_group(data, at, seed, generation)
            if group is not None:
                return group
    return None


def groups_of(data: Buffer, seed: int, generation: int) -> Iterator[Group]:
    """All groups of a segment, in order; a gap between two of them is damage."""
    at = HEADER_SIZE
    while True:
        group = parse_group(data, at, seed, generation) or next_group(data, at, seed, generation)
        if group is None:
            return
        yield group
        at = group.end


def pack_table(ends: list[SegmentEnd]) -> bytes:
    """Payload of a TABLE."""
    return b"".join([_TABLE.pack(e.segment, 0, e.generation, e.end) for e in ends])


def parse_table(payload: Buffer) -> list[SegmentEnd]:
    """Read the payload of a TABLE."""
    return [
        SegmentEnd(index, generation, end)
        for index, _, generation, end in _TABLE.iter_unpack(payload)
    ]
