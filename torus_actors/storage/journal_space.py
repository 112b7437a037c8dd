"""How the journal fills its segments, and makes room in them again.

`JournalSpace` is the lower half of the store: it forms groups of what is waiting, makes segments,
and empties old ones. Records that are still needed when their segment's turn comes are copied to
the end of the log like any other record.

One free segment is kept for that: as long as it is the last one, only copies and what else makes
room is written. What is needed is bounded (LIVE_SHARE), so the emptiest segment always fits there
with room to spare.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from crc32c import crc32c

from torus_actors.errors import Invalid, TorusError
from torus_actors.model.checksums import PAGE_SIZE, Buffer
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_format import (
    COPY,
    ENTRY_SIZE,
    FIRST,
    GROUP_ENTRIES_MAX,
    GROUP_SIZE,
    HEADER_SIZE,
    INCOMPLETE,
    RECORD,
    SEEN,
    START,
    STATE,
    TABLE,
    Entry,
    Position,
    SegmentEnd,
    SegmentHeader,
    pack_directory,
    pack_table,
    pages,
    seed_of,
)
from torus_actors.storage.journal_index import Log, Segment, Stored, Ticket
from torus_actors.storage.journal_open import Opened
from torus_actors.storage.journal_steps import (
    Commit,
    MakeSegment,
    Placed,
    ReadRecords,
    Reuse,
)
from torus_actors.storage.step import Step

SEGMENT_BYTES = 32 << 20

JOURNAL_BYTES_MAX = 2 << 30

NODE_SHARE = 8
"""A journal takes at most one part in this many of what its node has for blocks, beside it."""

SEGMENTS_MIN = 4
"""Below this there is no room to move records about."""

LIVE_SHARE = 0.4
"""Part of the journal that may be needed at one time. The rest is for what is not needed any more,
for the padding of small groups, and for moving records without doing it all the time."""

RECORD_BYTES_MAX = 8 << 20

GROUP_BYTES_MAX = 4 << 20
"""A group ends here unless one record alone is larger: the first must not wait for the last."""

COPY_BYTES = 1 << 20
"""Records moved at one time: commits go between."""

FREE_TARGET = 2
"""Free segments to have: the next one, and the one kept for copies."""

CHEAP_SHARE = 0.1
"""A segment of which less than this is needed is emptied rather than another one made."""

EMPTIED_SHARE_MAX = 0.85
"""A segment of which more is needed is not worth emptying."""

_ZERO_PAGE = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """How much disk a journal takes.

    Attributes:
        segment_bytes: size of a file; a multiple of 4096, from 64 KiB on.
        journal_bytes_max: of all files; made as they are needed.
    """

    segment_bytes: int = SEGMENT_BYTES
    journal_bytes_max: int = JOURNAL_BYTES_MAX

    def __post_init__(self) -> None:
        if self.segment_bytes % PAGE_SIZE or self.segment_bytes < 64 << 10:
            raise Invalid(f"journal segments of {self.segment_bytes} bytes are not possible")
        if self.segments_max < SEGMENTS_MIN:
            raise Invalid(f"a journal needs at least {SEGMENTS_MIN * self.segment_bytes} bytes")

    @classmethod
    def of_node(cls, size_bytes: int | None) -> JournalLimits:
        """What suits a node that stores ``size_bytes`` of blocks; None if that is not known."""
        if size_bytes is None:
            return cls()
        least = SEGMENTS_MIN * SEGMENT_BYTES
        most = min(size_bytes // NODE_SHARE, JOURNAL_BYTES_MAX)
        return cls(SEGMENT_BYTES, max(least, most))

    @property
    def segments_max(self) -> int:
        """Files at most."""
        return self.journal_bytes_max // self.segment_bytes

    @property
    def record_bytes_max(self) -> int:
        """Payload of one record: a quarter of a segment, so that at most so much is left unused."""
        return min(RECORD_BYTES_MAX, self.segment_bytes // 4)

    @property
    def live_bytes_max(self) -> int:
        """What may be needed at one time."""
        return int(self.segments_max * self.segment_bytes * LIVE_SHARE)


class JournalSpace:
    """See the module.

    Args:
        disk: the journal's directory.
        limits: how much of it to take.
        opened: what was found there.
    """

    def __init__(self, disk: Disk, limits: JournalLimits, opened: Opened) -> None:
        self.limits = limits
        self.identity = int.from_bytes(opened.store_id[:7], "little")
        self._disk = disk
        self._store_id = opened.store_id
        self._segments = opened.segments
        self._active = opened.active
        self._logs = opened.logs
        self._following = opened.following
        self._incomplete = opened.incomplete
        """Whether damage may have taken all that was here of a volume."""
        self._incomplete_told = False
        """Whether a table says so: what shows it now may be reused then."""
        self._free: deque[Segment] = deque()
        self._queue: deque[Ticket] = deque()
        """Records and fences, in order of arrival."""
        self._urgent: deque[Ticket] = deque()
        """What helps to make room: copies, drops, states. May go ahead of the queue."""
        self._waiting_bytes = 0
        self._live_bytes = sum(segment.live_bytes for segment in opened.segments)
        self._lock = threading.Lock()
        self._step: Step | None = None
        self._last_step: Step | None = None
        self._making: MakeSegment | None = None
        self._growth_refused = False
        self._growth_error: Exception | None = None
        self._emptying: Segment | None = None
        self._moving: deque[tuple[Log, Position, Stored, Segment]] = deque()
        self._failure: str | None = None
        self._commits = 0
        self._committed_tickets = 0
        self._copied = 0
        self._reuses = 0

    # Commits.

    def _next_commit(self) -> Commit | None:
        if not self._queue and not self._urgent:
            return None
        active = self._active
        # At once: until a table says it, no segment that shows it makes room.
        tell = self._incomplete and not self._incomplete_told
        if active is not None:
            # The last free segment is for copies, and so is what is left of it once it is in use.
            records = bool(self._free) or len(self._segments) == 1
            taken = self._take(active.size - active.end - tell * self._table_size(), records)
            if taken:
                return self._form(active, taken, tell)
        if not self._free:
            return None
        fresh = self._free[0]
        records = len(self._free) > 1 or active is None
        taken = self._take(fresh.size - HEADER_SIZE - self._table_size(), records)
        if not (taken or tell):
            return None
        self._free.popleft()
        self._active = fresh
        return self._form(fresh, taken, True)

    def _take(self, room: int, records: bool) -> list[Ticket]:
        """Take what goes into one group of at most ``room`` bytes."""
        taken: list[Ticket] = []
        size = GROUP_SIZE
        for lane in (self._urgent, self._queue) if records else (self._urgent,):
            while lane and len(taken) < GROUP_ENTRIES_MAX:
                ticket = lane[0]
                if not _is_needed(ticket):
                    lane.popleft()
                    continue
                more = size + ticket.size
                if pages(more) > room or (taken and more > GROUP_BYTES_MAX):
                    return taken
                size = more
                taken.append(lane.popleft())
        return taken

    def _table_size(self) -> int:
        return ENTRY_SIZE + len(pack_table([SegmentEnd(0, 0, 0)])) * len(self._segments)

    def _table(self) -> bytes:
        return pack_table(
            [
                SegmentEnd(segment.index, segment.generation, segment.end)
                for segment in self._segments
                if segment is not self._active and segment.end > HEADER_SIZE
            ]
        )

    def _form(self, segment: Segment, taken: list[Ticket], with_table: bool) -> Commit:
        """Make a group at the segment's end."""
        start, first = segment.end, self._following
        at = GROUP_SIZE + (len(taken) + with_table) * ENTRY_SIZE
        entries: list[Entry] = []
        buffers: list[Buffer] = [b""]
        placed: list[Placed] = []
        if with_table:
            table = self._table()
            flags = INCOMPLETE * self._incomplete
            entries.append(Entry(TABLE, flags, 0, 0, 0, START, 0, crc32c(table), at, len(table)))
            buffers.append(table)
            at += len(table)
        for ticket in taken:
            log = ticket.log
            if ticket.drop:
                log.dropped = first + len(entries)
            flags = FIRST * ticket.first | SEEN * log.cut_seen
            epoch, seq = ticket.at
            if ticket.kind == STATE:
                if log.unknown is not None and not any(
                    each.log is log and each.kind == RECORD for each in taken
                ):
                    flags |= INCOMPLETE
                # A state that makes room may overtake a fence in the queue: it must not promise
                # what is not yet in order with the records before the fence.
                epoch = max(epoch, log.durable_promise)
            entries.append(
                Entry(
                    ticket.kind,
                    flags,
                    log.volume,
                    epoch,
                    seq,
                    log.cut,
                    log.dropped,
                    ticket.crc,
                    at,
                    ticket.length,
                )
            )
            placed.append(Placed(ticket, start + at, log.cut))
            buffers.append(ticket.payload)
            at += ticket.length
        length = pages(at)
        buffers.append(memoryview(_ZERO_PAGE)[: length - at])
        seed = seed_of(self._store_id, segment.index)
        buffers[0] = pack_directory(seed, segment.index, segment.generation, first, length, entries)
        self._following += len(entries)
        return Commit(self._lock, segment, buffers, placed, start, length, with_table)

    def _committed(self, commit: Commit) -> None:
        segment = commit.segment
        segment.end = commit.offset + commit.length
        self._commits += 1
        self._incomplete_told |= self._incomplete and commit.with_table
        for ticket, offset, cut in commit.placed:
            log = ticket.log
            segment.volumes.add(log.volume)
            stored = Stored(segment.index, offset, ticket.length, ticket.crc, ticket.first)
            if ticket.kind == COPY:
                if _is_needed(ticket):
                    self._move(ticket, stored)
                continue
            self._committed_tickets += 1
            if ticket.at.epoch:
                self._waiting_bytes -= ticket.size
            if ticket.kind == RECORD:
                log.waiting.pop(ticket.at, None)
                log.unknown = None  # also where it was cut meanwhile
                if not log.gone and ticket.at > log.cut:
                    log.add(ticket.at, stored)
                    segment.add(stored)
                    self._live_bytes += stored.length + ENTRY_SIZE
            elif ticket is log.promise:
                log.promise = None
            elif ticket.drop:
                log.drop_pending = False
            log.anchor = segment.index
            log.durable_cut = cut
            log.durable_promise = max(log.durable_promise, ticket.at.epoch)
        for ticket, _, _ in commit.placed:
            ticket.settle(None)

    def _move(self, ticket: Ticket, stored: Stored) -> None:
        """A record is durable in its new place."""
        assert ticket.source is not None
        self._segments[ticket.source.segment].remove(ticket.source)
        ticket.log.replace(ticket.at, stored)
        self._segments[stored.segment].add(stored)
        self._copied += 1

    def _forget(self, stored: Stored) -> None:
        """A record is no longer needed."""
        self._segments[stored.segment].remove(stored)
        self._live_bytes -= stored.length + ENTRY_SIZE

    def _give_up(self, which: Callable[[Ticket], bool], error: Exception) -> None:
        """Fail what waits in the queue; none of these logs has anything under way."""
        failed = [ticket for ticket in self._queue if which(ticket)]
        self._queue = deque(ticket for ticket in self._queue if not which(ticket))
        for ticket in failed:
            log = ticket.log
            self._waiting_bytes -= ticket.size
            log.waiting.pop(ticket.at, None)
            log.promise = None
            log.promised = log.durable_promise
            log.tail = log.settled_tail()
            if log.empty and not log.dropped and self._logs.get(log.volume) is log:
                del self._logs[log.volume]
        for ticket in failed:
            ticket.settle(error)

    def _sign_off(self) -> None:
        """End with a group that acknowledges nothing, and keeps the cuts.

        Damage to the group before it can then be told from a torn write.
        """
        active = self._active
        if active is None or not self._commits:
            return
        for log in self._logs.values():
            if log.durable_cut < log.cut and not log.drop_pending:
                self._urgent.append(Ticket(STATE, log))
        taken = self._take(active.size - active.end - self._table_size(), False)
        if active.size - active.end >= pages(GROUP_SIZE + self._table_size()):
            step = self._form(active, taken, True)
            step.run()
            self._committed(step)

    # Room.

    def _next_job(self) -> Step | None:
        if self._making is not None:
            return self._making
        if len(self._free) >= FREE_TARGET or not (self._segments or self._queue or self._urgent):
            return None
        if len(self._segments) == 1 and self._active and self._active.end < self._active.size // 2:
            # Little is ever written to many a journal: it need not take more of the disk.
            return None
        if self._emptying is None:
            victim = self._choose()
            if victim is None:
                return self._grow()
            self._emptying = victim
            self._moving = deque(
                (log, at, stored, victim)
                for log in map(self._logs.get, victim.volumes)
                if log is not None
                for at, stored in log.live()
                if stored.segment == victim.index
            )
        return self._empty(self._emptying)

    def _may_grow(self) -> bool:
        # Damaged ones may be kept for what they show, and were all of them damaged, no cut and no
        # fence could be written by which that ends.
        whole, most = sum(not each.damaged for each in self._segments), self.limits.segments_max
        few = whole < most and len(self._segments) < 2 * most
        return few and not self._growth_refused

    def _grow(self) -> Step | None:
        if not self._may_grow():
            return None
        count = len(self._segments)
        header = SegmentHeader(count, self._store_id, 1, self.limits.segment_bytes, count + 1)
        first = self._segments[0] if self._segments else None
        self._making = MakeSegment(self._lock, self._disk, header, first)
        return self._making

    def _choose(self) -> Segment | None:
        """The segment to be emptied: the one with the least in it, if that is worth it."""
        # Of one of which nothing was here its own entries tell.
        suspect = any(log.lost_tail is not None for log in self._logs.values())
        suspect |= self._incomplete and not self._incomplete_told
        candidates = [
            segment
            for segment in self._segments
            if segment is not self._active
            and segment not in self._free
            and not segment.reading
            # What is damaged tells at the next start that something is missing.
            and not (segment.damaged and (suspect or segment.live_records))
        ]
        best = min(candidates, key=lambda s: (s.live_bytes, len(s.volumes)), default=None)
        if best is None:
            return None
        share = CHEAP_SHARE if self._may_grow() else EMPTIED_SHARE_MAX
        return best if best.live_bytes <= best.size * share else None

    def _empty(self, victim: Segment) -> Step | None:
        """The next step on the way to reuse a segment."""
        if victim.reading:
            return None
        if not self._urgent:
            batch = self._next_moves()
            if batch:
                return ReadRecords(self._lock, batch)
            self._urgent.extend(Ticket(STATE, log) for log in self._states_in(victim))
        if not self.may_reuse(victim):
            return None
        header = SegmentHeader(
            victim.index,
            self._store_id,
            victim.generation + 1,
            victim.size,
            len(self._segments),
        )
        return Reuse(self._lock, victim, header)

    def _next_moves(self) -> list[tuple[Log, Position, Stored, Segment]]:
        """The next records to be moved out of the segment."""
        batch: list[tuple[Log, Position, Stored, Segment]] = []
        size = 0
        while self._moving and (not batch or size + self._moving[0][2].length <= COPY_BYTES):
            item = self._moving.popleft()
            log, at, stored, _ = item
            if not log.gone and log.find(at) is stored:
                size += stored.length + ENTRY_SIZE
                batch.append(item)
        return batch

    def may_reuse(self, victim: Segment) -> bool:
        """Whether nothing in a segment is needed any more, on the disk as well."""
        drops = any(
            log.drop_pending for log in map(self._logs.get, victim.volumes) if log is not None
        )
        return not (victim.live_records or drops or self._states_in(victim))

    def _states_in(self, victim: Segment) -> list[Log]:
        """Logs of which something is to be written before the segment can be reused."""
        logs = [log for log in map(self._logs.get, victim.volumes) if log is not None]
        return [
            log
            for log in logs
            # Its drop is on its way, and in the urgent lane.
            if not log.drop_pending
            and (
                log.durable_cut < log.cut
                or (log.anchor == victim.index and not self._is_forgotten(log, victim))
            )
        ]

    def _is_forgotten(self, log: Log, victim: Segment) -> bool:
        """Whether nothing is left of a dropped volume but in this segment."""
        return log.empty and not any(
            log.volume in segment.volumes for segment in self._segments if segment is not victim
        )

    def _read_to_move(self, step: ReadRecords) -> None:
        for (log, at, stored, _), payload in zip(step.items, step.payloads, strict=True):
            self._urgent.append(
                Ticket(COPY, log, at, payload, stored.length, stored.crc, stored.first, stored)
            )

    def _cannot_move(self, step: ReadRecords) -> None:
        """A record in it is damaged: the segment stays until the record is cut."""
        step.items[0][3].damaged = True
        self._emptying = None
        self._moving.clear()

    def _reused(self, step: Reuse) -> None:
        segment = step.segment
        for log in list(map(self._logs.get, segment.volumes)):
            if log is not None and log.anchor == segment.index and log.empty:
                del self._logs[log.volume]
        segment.volumes.clear()
        segment.damaged = False
        segment.generation = step.header.generation
        segment.end = HEADER_SIZE
        self._free.append(segment)
        self._emptying = None
        self._growth_refused = False
        self._growth_error = None
        self._reuses += 1

    def _filled(self, step: MakeSegment) -> None:
        if not step.complete:
            self._making = step.following()
            return
        assert step.file is not None
        self._making = None
        index, _, generation, size, _ = step.header
        segment = Segment(index, step.file, size, generation, HEADER_SIZE)
        self._segments.append(segment)
        self._free.append(segment)
        self._growth_error = None

    def _no_growth(self, step: MakeSegment, error: Exception) -> None:
        """The disk is full, say: go on with the segments that are there."""
        self._making = None
        self._growth_refused = True
        self._growth_error = error
        if step.file is not None:
            step.file.close()
        with contextlib.suppress(OSError, TorusError):
            self._disk.unlink(step.path)


def _is_needed(ticket: Ticket) -> bool:
    """Whether something is still worth writing."""
    log = ticket.log
    if ticket.kind == COPY:
        return not log.gone and log.find(ticket.at) is ticket.source
    return ticket.drop or not log.gone
