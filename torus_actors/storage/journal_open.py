"""Reading a journal from its segments.

Commits follow one another: a group is written only when the one before it is durable. So only the
newest group can be torn, and in it nothing was acknowledged. Whatever else cannot be read is
damage. It shows as a gap between two groups of a segment, or before the end that a later group
tells of it; the logs that it may have hit give Corruption instead of less than was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random

from crc32c import crc32c

from torus_actors.errors import Corruption, TorusError
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_format import (
    COPY,
    FIRST,
    HEADER_SIZE,
    NAME_PREFIX,
    RECORD,
    SEEN,
    TABLE,
    Entry,
    Group,
    Position,
    groups_of,
    parse_segment_header,
    parse_table,
    seed_of,
    segment_name,
)
from torus_actors.storage.journal_index import Log, Run, Segment, Stored
from torus_actors.storage.journal_steps import tell_count


@dataclasses.dataclass(slots=True)
class Opened:
    """A journal as it was found.

    Attributes:
        store_id: of its segments; new if there are none.
        segments: by index.
        active: the one with the newest group; None if there are no groups.
        logs: by volume.
        following: number of the next entry.
    """

    store_id: bytes
    segments: list[Segment]
    active: Segment | None
    logs: dict[int, Log]
    following: int


@dataclasses.dataclass(slots=True)
class _Found:
    """A segment and the groups in it."""

    segment: Segment
    groups: list[Group]
    gaps: list[int] = dataclasses.field(default_factory=list)
    """Something is missing that was written before these entries."""
    proven: int = 0
    """Number of the entry that tells where the segment ends."""


def open_journal(disk: Disk, rng: random.Random) -> Opened:
    """Read all segments; repairs what an interrupted commit left.

    Raises:
        Corruption: a segment is missing, or its header is damaged.
        OSError: the disk cannot be read, or written.
    """
    names = disk.listdir()
    for name in names:
        if name.startswith(NAME_PREFIX) and name.endswith(".new"):
            disk.unlink(name)
    count = sum(name.startswith(NAME_PREFIX) and not name.endswith(".new") for name in names)
    found: list[_Found] = []
    with contextlib.ExitStack() as opened:
        store_id = b""
        told = 0
        buffer = bytearray()
        for index in range(count):
            name = segment_name(index)
            if name not in names:
                raise _missing(index)
            file = disk.open(name)
            opened.callback(file.close)
            size = file.size()
            if len(buffer) != size:
                buffer = bytearray(size)
            file.preadv([buffer], 0)
            header = parse_segment_header(buffer, name)
            store_id = store_id or header.store_id
            told = header.segments if index == 0 else told
            if (header.segment, header.store_id, header.size) != (index, store_id, size):
                raise Corruption(f"{name} does not belong to this journal")
            segment = Segment(index, file, size, header.generation, HEADER_SIZE)
            groups = list(groups_of(buffer, seed_of(store_id, index), header.generation))
            found.append(_Found(segment, groups))
        if told > count:
            raise _missing(count)
        if found:
            # A name may have been in memory only; and so may the newest group, see below.
            disk.fsync_dir()
            if told < count:
                # An older journal, or the making of the last one was cut off here.
                tell_count(found[0].segment, store_id, count)
        opened.pop_all()
    try:
        return _read(found, store_id or rng.randbytes(16))
    except (OSError, TorusError):
        for each in found:
            each.segment.file.close()
        raise


def _missing(index: int) -> Corruption:
    return Corruption(f"{segment_name(index)} of the journal is missing")


def _read(found: list[_Found], store_id: bytes) -> Opened:
    newest = _newest(found)
    if newest is not None and not settle_newest(newest.segment, newest.groups[-1]):
        newest.groups.pop()
        # Nothing followed the torn group, and the one before it was durable before it was begun.
        newest = _newest(found)
    _apply_table(found)
    for each in found:
        _measure(each)
    logs = _read_logs(found)
    for each in found:
        for group in each.groups:
            each.segment.volumes.update(entry.volume for entry in group.entries if entry.volume)
    return Opened(
        store_id,
        [each.segment for each in found],
        None if newest is None else newest.segment,
        logs,
        1 if newest is None else newest.groups[-1].last + 1,
    )


def _newest(found: list[_Found]) -> _Found | None:
    return max(
        (each for each in found if each.groups),
        key=lambda each: each.groups[-1].first,
        default=None,
    )


def _apply_table(found: list[_Found]) -> None:
    """Hold the sealed segments to the ends that the newest whole table gives them."""
    newest: tuple[int, bytes] | None = None
    for each in found:
        for group in each.groups:
            for number, entry in enumerate(group.entries, group.first):
                if entry.kind == TABLE and (newest is None or number > newest[0]):
                    at = group.offset + entry.offset
                    payload = each.segment.file.pread(entry.length, at)
                    if crc32c(payload) == entry.crc:
                        newest = number, payload
    if newest is None:
        return
    for index, generation, end in parse_table(newest[1]):
        if index >= len(found):
            # A journal whose first segment does not tell yet how many there are.
            raise _missing(index)
        each = found[index]
        if each.segment.generation != generation:
            continue  # reused since: nothing in it was needed
        each.segment.end = end
        each.proven = newest[0]


def _measure(each: _Found) -> None:
    """Find where the segment ends, and what is missing in it."""
    at = HEADER_SIZE
    for group in each.groups:
        if group.offset != at:
            each.gaps.append(group.first)
        at = group.end
    if at < each.segment.end:
        each.gaps.append(each.proven)
    each.segment.end = max(at, each.segment.end)
    each.segment.damaged = bool(each.gaps)


def settle_newest(segment: Segment, group: Group) -> bool:
    """Make the newest group durable if it is whole, else take it away.

    It may be in the page cache only, after a kill, or for good after a failed sync: the kernel
    takes such pages for clean. The same bytes in the same place harm nothing wherever they tear.

    Returns:
        False if it is torn, so that nothing in it was acknowledged.
    """
    data = segment.file.pread(group.length, group.offset)
    view = memoryview(data)
    for entry in group.entries:
        if crc32c(view[entry.offset : entry.offset + entry.length]) != entry.crc:
            # Not left to be overwritten: the next group may find its place in another segment.
            segment.file.pwrite(bytes(PAGE_SIZE), group.offset)
            segment.file.fdatasync()
            return False
    segment.file.pwrite(data, group.offset)
    segment.file.fdatasync()
    return True


def _read_logs(found: list[_Found]) -> dict[int, Log]:
    ordered = sorted(
        ((group, each.segment) for each in found for group in each.groups),
        key=lambda pair: pair[0].first,
    )
    dropped: dict[int, int] = {}
    for group, _ in ordered:
        for entry in group.entries:
            if entry.dropped > dropped.get(entry.volume, 0):
                dropped[entry.volume] = entry.dropped
    logs: dict[int, Log] = {}
    records: dict[int, dict[Position, tuple[Stored, bool]]] = {}
    newest: dict[int, int] = {}
    for group, segment in ordered:
        for number, entry in enumerate(group.entries, group.first):
            volume = entry.volume
            if entry.kind == TABLE or number < dropped.get(volume, 0):
                continue
            log = logs.get(volume)
            if log is None:
                log = logs[volume] = Log(volume, dropped=dropped.get(volume, 0))
                records[volume] = {}
            _take_in(log, entry, segment)
            if entry.kind in (RECORD, COPY):
                first = bool(entry.flags & FIRST)
                at = group.offset + entry.offset
                stored = Stored(segment.index, at, entry.length, entry.crc, first)
                records[volume][Position(entry.epoch, entry.seq)] = stored, first
            if entry.kind == RECORD:
                newest[volume] = number
    segments = [each.segment for each in found]
    for volume, log in logs.items():
        _build_runs(log, records[volume], segments)
    # Where there is a record behind the gap, the numbers show whether one before it is missing.
    gap = max((number for each in found for number in each.gaps), default=0)
    for volume, log in logs.items():
        if newest.get(volume, 0) < gap:
            log.lost_tail = log.promised
    return logs


def _take_in(log: Log, entry: Entry, segment: Segment) -> None:
    """What an entry says of its volume."""
    if entry.cut > log.cut:
        log.cut, log.cut_seen = entry.cut, bool(entry.flags & SEEN)
    if entry.epoch >= log.promised:
        log.promised = log.durable_promise = entry.epoch
    if entry.kind != COPY:
        log.anchor, log.durable_cut = segment.index, entry.cut


def _build_runs(
    log: Log, records: dict[Position, tuple[Stored, bool]], segments: list[Segment]
) -> None:
    """Order the records that are still needed, and mark what is missing between them."""
    for at in sorted(records):
        if at <= log.cut:
            continue
        stored, first = records[at]
        run = log.runs.get(at.epoch)
        if run is None:
            run = log.runs[at.epoch] = Run(at.seq, [])
            follows = log.cut.epoch == at.epoch and at.seq == log.cut.seq + 1
            if not first and not follows:
                # Its predecessor was here.
                run.first -= 1
                run.records.append(None)
        missing = at.seq - run.last - 1
        if missing:
            # However many they are, one mark is enough to stop a reader; the rest keep the place.
            run.records.extend([None] * missing)
        run.records.append(stored)
        segments[stored.segment].add(stored)
    log.tail = log.settled_tail()
