"""What the journal knows in memory: its segments, and the log of each volume.

All of it is changed by one thread only, the owner of the store. It is rebuilt when opening.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torus_actors.model.checksums import Buffer
from torus_actors.storage.disk import File
from torus_actors.storage.journal_format import ENTRY_SIZE, START, Position

NOWHERE = -1


class Stored(NamedTuple):
    """Where a durable record lies.

    Attributes:
        segment: index.
        offset: of the payload in the segment.
        length: of the payload.
        crc: CRC-32C of the payload.
        first: whether none of its epoch came before it.
    """

    segment: int
    offset: int
    length: int
    crc: int
    first: bool


@dataclasses.dataclass(slots=True)
class Segment:
    """A segment file in use, or ready for it.

    Attributes:
        index: its number, and place in the store's list.
        file: open as long as the store.
        size: bytes.
        generation: of its present use.
        end: where the next group goes.
        live_records: records in it that are the ones the logs name.
        live_bytes: what they would take elsewhere.
        volumes: all that have an entry in it, live or not.
        reading: reads under way: it is not reused meanwhile.
        damaged: something in it cannot be read, so it cannot be moved.
    """

    index: int
    file: File
    size: int
    generation: int
    end: int
    live_records: int = 0
    live_bytes: int = 0
    volumes: set[int] = dataclasses.field(default_factory=set)
    reading: int = 0
    damaged: bool = False

    def add(self, stored: Stored) -> None:
        """Count a record as live."""
        self.live_records += 1
        self.live_bytes += stored.length + ENTRY_SIZE

    def remove(self, stored: Stored) -> None:
        """Count a record as live no longer."""
        self.live_records -= 1
        self.live_bytes -= stored.length + ENTRY_SIZE


@dataclasses.dataclass(slots=True)
class Run:
    """The durable records of one epoch, without gaps; None stands for one that was lost."""

    first: int
    records: list[Stored | None]

    @property
    def last(self) -> int:
        """Sequence number of the last."""
        return self.first + len(self.records) - 1

    def cut(self, upto: int) -> list[Stored]:
        """Forget records up to a number; returns those that were there."""
        count = min(max(0, upto + 1 - self.first), len(self.records))
        gone = self.records[:count]
        del self.records[:count]
        self.first += count
        return [stored for stored in gone if stored is not None]


@dataclasses.dataclass(slots=True, eq=False)
class Log:
    """What is kept of one volume.

    Attributes:
        volume: its id.
        promised: no append below this epoch is taken.
        durable_promise: what of that is on the disk.
        cut: records up to here are no longer needed.
        cut_seen: whether there were records of the epoch that it is in.
        durable_cut: what of that the newest entry that carries the volume's state says.
        dropped: number in the journal before which the volume's entries are void.
        anchor: segment of the entry that carries the volume's state; NOWHERE before the first.
        runs: durable records by epoch.
        tail: last record that was taken in, durable or not; START where none is known.
        waiting: records taken in that are not durable.
        promise: the fence that is not durable.
        drop_pending: its predecessor's drop is not durable.
        gone: dropped: what is still under way for it is void.
        lost_tail: damage may have taken records of epochs up to this; None without damage.
        unknown: the last promise, if damage may have taken one as high with all its records, or all
            that was known of the volume; None if it has not, or if a record has come since: its
            number shows what is missing before it. No cut tells that.
    """

    volume: int
    promised: int = 0
    durable_promise: int = 0
    cut: Position = START
    cut_seen: bool = False
    durable_cut: Position = START
    dropped: int = 0
    anchor: int = NOWHERE
    runs: dict[int, Run] = dataclasses.field(default_factory=dict)
    tail: Position = START
    waiting: dict[Position, Ticket] = dataclasses.field(default_factory=dict)
    promise: Ticket | None = None
    drop_pending: bool = False
    gone: bool = False
    lost_tail: int | None = None
    unknown: int | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to know but that it was dropped."""
        return not (self.promised or self.runs or self.waiting or self.drop_pending)

    def expected(self, epoch: int) -> int | None:
        """Number of the epoch's next record; None where any will do."""
        if self.tail.epoch == epoch:
            return self.tail.seq + 1
        return None

    def settled_tail(self) -> Position:
        """What ``tail`` is when nothing is waiting."""
        tails = [Position(epoch, run.last) for epoch, run in self.runs.items()]
        if self.cut_seen:
            tails.append(self.cut)
        return max(tails, default=START)

    def cut_to(self, position: Position) -> list[Stored]:
        """Move the cut; returns the durable records that it took."""
        gone: list[Stored] = []
        self.cut = position
        self.cut_seen = self.tail.epoch == position.epoch
        if self.cut_seen:
            self.tail = max(self.tail, position)
        for epoch in [e for e in self.runs if e <= position.epoch]:
            run = self.runs[epoch]
            gone += run.cut(run.last if epoch < position.epoch else position.seq)
            if not run.records:
                del self.runs[epoch]
        if self.lost_tail is not None and position.epoch > self.lost_tail:
            self.lost_tail = None
        return gone

    def live(self) -> Iterator[tuple[Position, Stored]]:
        """All durable records that are still needed."""
        for epoch, run in self.runs.items():
            for seq, stored in enumerate(run.records, run.first):
                if stored is not None:
                    yield Position(epoch, seq), stored

    def find(self, at: Position) -> Stored | None:
        """A durable record."""
        run = self.runs.get(at.epoch)
        if run is None or not run.first <= at.seq <= run.last:
            return None
        return run.records[at.seq - run.first]

    def add(self, at: Position, stored: Stored) -> None:
        """Take in a durable record: the next one of its epoch."""
        run = self.runs.get(at.epoch)
        if run is None:
            run = self.runs[at.epoch] = Run(at.seq, [])
        assert at.seq == run.last + 1, (at, run.last)
        run.records.append(stored)

    def replace(self, at: Position, stored: Stored) -> None:
        """A record has another place."""
        run = self.runs[at.epoch]
        run.records[at.seq - run.first] = stored

    @property
    def is_suspect(self) -> bool:
        """Whether records of any epoch may be lost that is promised before a record comes."""
        lost = self.lost_tail is not None and self.tail.epoch <= self.lost_tail
        return lost or self.unknown is not None

    def damaged(self, epoch: int) -> bool:
        """Whether a record of this epoch, or of a later one, that was here cannot be given.

        What an earlier session has lost says nothing of what a later one has put here since.
        """
        lost = self.lost_tail is not None and epoch <= self.lost_tail
        return (
            lost
            or self.unknown is not None
            or any(None in run.records for each, run in self.runs.items() if each >= epoch)
        )


Waiter = Callable[[Exception | None], None]


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """Something to be written by a coming commit.

    Attributes:
        kind: RECORD, COPY or STATE.
        log: whose it is.
        at: epoch and number of a record; the promise of a fence.
        payload: its bytes; nobody else's.
        length: of the payload.
        crc: of the payload.
        first: see `Stored`.
        source: of a COPY: the record it stands for.
        drop: a STATE by which all earlier entries of the volume become void.
        waiters: called once, with None when it is durable, or with what went wrong.
    """

    kind: int
    log: Log
    at: Position = START
    payload: Buffer = b""
    length: int = 0
    crc: int = 0
    first: bool = False
    source: Stored | None = None
    drop: bool = False
    waiters: list[Waiter] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes it takes in a group."""
        return ENTRY_SIZE + self.length

    def settle(self, error: Exception | None) -> None:
        """Tell the waiters."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(error)


class Fence(NamedTuple):
    """What a fence found; all numbers 0 where there are no records.

    Attributes:
        epoch: newest that has records.
        first: number of its first record that was not cut.
        last: number of its last record.
        damaged: records of that epoch, or of a later one, were lost here: another member may have
            more.
    """

    epoch: int
    first: int
    last: int
    damaged: bool


@dataclasses.dataclass(frozen=True, slots=True)
class JournalStats:
    """Sizes in bytes, counts since the store was opened.

    Attributes:
        volumes: logs that are here.
        records: durable records that are needed.
        live_bytes: what they take.
        live_bytes_max: what they may take.
        segments: files.
        segments_max: at most so many.
        segments_free: ready to be used.
        segment_bytes: size of one.
        waiting: records, fences and drops that are not durable yet.
        commits: groups written.
        committed: records, fences and drops in them.
        copied: records moved out of a segment to reuse it.
        reused: segments put to use again.
        no_growth: why the last segment that was wanted could not be made, and cannot yet; or empty.
    """

    volumes: int
    records: int
    live_bytes: int
    live_bytes_max: int
    segments: int
    segments_max: int
    segments_free: int
    segment_bytes: int
    waiting: int
    commits: int
    committed: int
    copied: int
    reused: int
    no_growth: str
