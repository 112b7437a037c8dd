"""Reading a journal from its segments.

Commits follow one another: a group is written only when the one before it is durable. So only the
newest group can be torn, and in it nothing was acknowledged. Whatever else cannot be read is
damage. It shows as a gap between two groups of a segment, or before the end that a later group
tells of it; the logs that it may have hit give Corruption instead of less than was written.

What the disk does not give is damage too, wherever a group may have been: no torn write, since
nobody can tell what is there. It may be read again one day, so nothing is written over it, nor
under the numbers that it may have, before its segment is used anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random

from crc32c import crc32c

from torus_actors.errors import Corruption, TorusError
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.storage.disk import Disk, File
from torus_actors.storage.journal_format import (
    COPY,
    DIRECTORY_BYTES_MAX,
    FIRST,
    GROUP_ENTRIES_MAX,
    HEADER_SIZE,
    INCOMPLETE,
    NAME_PREFIX,
    RECORD,
    SEEN,
    TABLE,
    Entry,
    Group,
    Position,
    begins_group,
    groups_of,
    pack_segment_header,
    parse_segment_header,
    parse_table,
    seed_of,
    segment_name,
)
from torus_actors.storage.journal_index import Log, Run, Segment, Stored
from torus_actors.storage.journal_steps import tell_count, write_header

log = logging.getLogger(__name__)

PIECE_BYTES = 256 << 10
"""Where a segment cannot be read as a whole, it is read in pieces, and those page by page."""

UNREADABLE_MAX = 256
"""Pages of a segment that may be unreadable. A disk may try each for seconds, and one that gives
nothing any more is not to be asked for all of them."""


@dataclasses.dataclass(slots=True)
class Opened:
    """A journal as it was found.

    Attributes:
        store_id: of its segments; new if there are none.
        segments: by index.
        active: the one with the newest group; None if there are no groups, or if nothing more is to
            be written there.
        logs: by volume.
        following: number of the next entry.
        incomplete: whether something is missing: of a volume that is not there, too, maybe.
    """

    store_id: bytes
    segments: list[Segment]
    active: Segment | None
    logs: dict[int, Log]
    following: int
    incomplete: bool


@dataclasses.dataclass(slots=True)
class _Found:
    """A segment and the groups in it."""

    segment: Segment
    groups: list[Group]
    gaps: list[int] = dataclasses.field(default_factory=list)
    """Something is missing that was written before these entries."""
    proven: int = 0
    """Number of the entry that tells where the segment ends."""
    unreadable: list[int] = dataclasses.field(default_factory=list)
    """Offsets of pages that the disk does not give."""
    hidden: bool = False
    """Whether there may be groups behind the last one, in such pages."""


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
            unreadable = _read_pages(file, buffer, name)
            header = parse_segment_header(buffer, name)
            store_id = store_id or header.store_id
            told = header.segments if index == 0 else told
            if (header.segment, header.store_id, header.size) != (index, store_id, size):
                raise Corruption(f"{name} does not belong to this journal")
            segment = Segment(index, file, size, header.generation, HEADER_SIZE)
            if buffer[:HEADER_SIZE] != pack_segment_header(header):
                # A copy has rotted, or the power went between the two: there is one left.
                write_header(segment, header)
            groups = list(groups_of(buffer, seed_of(store_id, index), header.generation))
            each = _Found(segment, groups, unreadable=unreadable)
            each.hidden = _may_hide_group(each, buffer)
            found.append(each)
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


def _read_pages(file: File, buffer: bytearray, name: str) -> list[int]:
    """Read a whole file; returns where zeros stand for pages that cannot be read."""
    try:
        file.preadv([buffer], 0)
        return []
    except OSError as error:
        log.warning("%s of the journal is read page by page: %s", name, error)
    unreadable: list[int] = []
    view = memoryview(buffer)
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        try:
            file.preadv([piece], start)
            continue
        except OSError:
            pass  # it is looked for below
        for at in range(0, len(piece), PAGE_SIZE):
            try:
                file.preadv([piece[at : at + PAGE_SIZE]], start + at)
            except OSError:
                piece[at : at + PAGE_SIZE] = bytes(len(piece[at : at + PAGE_SIZE]))
                unreadable.append(start + at)
                if len(unreadable) > UNREADABLE_MAX:
                    raise
    log.error("%d pages of %s of the journal cannot be read", len(unreadable), name)
    return unreadable


def _may_hide_group(each: _Found, data: bytearray) -> bool:
    """Whether a group may follow the last one of a segment that was found, and be unreadable."""
    at = each.groups[-1].end if each.groups else HEADER_SIZE
    if at in each.unreadable:
        return True
    in_directory = any(at < page < at + DIRECTORY_BYTES_MAX for page in each.unreadable)
    return in_directory and begins_group(data, at, each.segment.generation)


def _missing(index: int) -> Corruption:
    return Corruption(f"{segment_name(index)} of the journal is missing")


def _read(found: list[_Found], store_id: bytes) -> Opened:
    newest = _newest(found)
    hidden = any(each.hidden for each in found)
    lost: set[int] = set()
    if newest is None:
        pass
    elif hidden or _lies_in(newest.unreadable, newest.groups[-1].offset, newest.groups[-1].length):
        # What is not right in it need not be torn: it may be damaged, or not be the newest one.
        lost = _settle_in_part(newest)
        newest.segment.damaged = bool(lost)
    elif not settle_newest(newest.segment, newest.groups[-1]):
        newest.groups.pop()
        # Nothing followed the torn group, and the one before it was durable before it was begun.
        newest = _newest(found)
    following = 1 if newest is None else newest.groups[-1].last + 1
    if hidden:
        unreadable = sum(len(each.unreadable) for each in found)
        following += (GROUP_ENTRIES_MAX + 1) * unreadable
    incomplete = _apply_table(found)
    for each in found:
        _measure(each, following - 1)
    logs = _read_logs(found, lost)
    for each in found:
        for group in each.groups:
            each.segment.volumes.update(entry.volume for entry in group.entries if entry.volume)
    return Opened(
        store_id,
        [each.segment for each in found],
        None if newest is None or newest.hidden else newest.segment,
        logs,
        following,
        incomplete or any(each.gaps for each in found),
    )


def _newest(found: list[_Found]) -> _Found | None:
    return max(
        (each for each in found if each.groups),
        key=lambda each: each.groups[-1].first,
        default=None,
    )


def _apply_table(found: list[_Found]) -> bool:
    """Hold the sealed segments to the ends that the newest whole table gives them.

    Returns:
        Whether it says that something is missing, of which nothing else may tell any more.
    """
    newest: tuple[int, bytes] | None = None
    incomplete = False
    for each in found:
        for group in each.groups:
            for number, entry in enumerate(group.entries, group.first):
                if entry.kind == TABLE and (newest is None or number > newest[0]):
                    at = group.offset + entry.offset
                    try:
                        payload = each.segment.file.pread(entry.length, at)
                    except OSError:
                        continue  # as one that is not right
                    if crc32c(payload) == entry.crc:
                        newest = number, payload
                        incomplete = bool(entry.flags & INCOMPLETE)
    if newest is None:
        return False
    for index, generation, end in parse_table(newest[1]):
        if index >= len(found):
            # A journal whose first segment does not tell yet how many there are.
            raise _missing(index)
        each = found[index]
        if each.segment.generation != generation:
            continue  # reused since: nothing in it was needed
        each.segment.end = end
        each.proven = newest[0]
    return incomplete


def _measure(each: _Found, last: int) -> None:
    """Find where the segment ends, and what is missing in it.

    Args:
        each: the segment.
        last: a number that no entry that was found has, nor one after it.
    """
    at = HEADER_SIZE
    for group in each.groups:
        if group.offset != at:
            each.gaps.append(group.first)
        at = group.end
    if at < each.segment.end:
        each.gaps.append(each.proven)
    elif each.hidden and not each.proven:
        each.gaps.append(last)
        # What tells of the end from now on tells of it at the next start, too.
        at += PAGE_SIZE
    each.segment.end = max(at, each.segment.end)
    each.segment.damaged |= bool(each.gaps)


def _lies_in(unreadable: list[int], offset: int, length: int) -> bool:
    """Whether a part of a file is on pages that cannot be read."""
    return any(offset < page + PAGE_SIZE and page < offset + length for page in unreadable)


def _settle_in_part(newest: _Found) -> set[int]:
    """Make durable what can be read of the newest group; see `settle_newest`.

    Returns:
        Numbers of its entries whose payload is damaged. They count as lost: one that was never
        acknowledged may be sent again, and must not be taken for stored.
    """
    group, file, unreadable = newest.groups[-1], newest.segment.file, newest.unreadable
    lost: set[int] = set()
    for number, entry in enumerate(group.entries, group.first):
        at = group.offset + entry.offset
        if _lies_in(unreadable, at, entry.length) or (
            crc32c(file.pread(entry.length, at)) != entry.crc
        ):
            lost.add(number)
    for at in range(group.offset, group.end, PAGE_SIZE):
        if at not in unreadable:
            file.pwrite(file.pread(PAGE_SIZE, at), at)
    file.fdatasync()
    return lost


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


def _read_logs(found: list[_Found], lost: set[int]) -> dict[int, Log]:
    """The logs of all volumes.

    Args:
        found: where they are.
        lost: numbers of records that are damaged.
    """
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
    records: dict[int, dict[Position, tuple[Stored | None, bool]]] = {}
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
                at, place = group.offset + entry.offset, Position(entry.epoch, entry.seq)
                if number not in lost:
                    stored = Stored(segment.index, at, entry.length, entry.crc, first)
                    records[volume][place] = stored, first
                else:
                    # Of a copy the original may still be there.
                    records[volume].setdefault(place, (None, first))
            if entry.kind == RECORD:
                newest[volume] = number
    segments = [each.segment for each in found]
    for volume, log in logs.items():
        _build_runs(log, records[volume], segments)
    # Where there is a record behind the gap, the numbers show whether one before it is missing.
    gap = max((number for each in found for number in each.gaps), default=0)
    for volume, log in logs.items():
        if log.empty:
            continue  # it was dropped, and nobody asks for it: it would be suspect for ever
        if newest.get(volume, 0) < gap or newest.get(volume) in lost:
            log.lost_tail = log.promised
        known = max((at.epoch for at in records[volume]), default=0)
        if log.unknown is not None and known >= log.unknown:
            log.unknown = None
    return logs


def _take_in(log: Log, entry: Entry, segment: Segment) -> None:
    """What an entry says of its volume."""
    if entry.cut > log.cut:
        log.cut, log.cut_seen = entry.cut, bool(entry.flags & SEEN)
    if entry.epoch >= log.promised:
        log.promised = log.durable_promise = entry.epoch
    if entry.kind != COPY:
        log.anchor, log.durable_cut = segment.index, entry.cut
        log.unknown = log.promised if entry.flags & INCOMPLETE else None


def _build_runs(
    log: Log, records: dict[Position, tuple[Stored | None, bool]], segments: list[Segment]
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
        if stored is not None:
            segments[stored.segment].add(stored)
    log.tail = log.settled_tail()
