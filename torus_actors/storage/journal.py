"""The journal of a storage node: one log of records for each volume, all in one set of segments.

Why no power cut can lose an acknowledged record, or bring back an epoch that was fenced (layout:
storage/journal_format.py; decision: docs/decisions/0004-journal.md):

1. A ticket is settled only after the `fdatasync` that covers its group; a group is begun only when
   the one before it is durable.
2. What a volume's newest entry says (promise, cut, drop) is durable before the segment with the
   entry that said it last is reused.
3. A segment is reused only when no record in it is needed; one that is moved is durable in its new
   place first, and the cut that made others needless is durable too.
4. A reused segment has a new generation, durable before anything is written to it.
5. After a failed write or sync nothing is written any more: the kernel would report success for
   lost pages.

The store does no threading. Its methods touch memory only and belong to one thread; the disk work
is in the steps that `next_step` hands out, one at a time, to be run in a worker.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Sequence

from crc32c import crc32c

from torus_actors.errors import (
    Closed,
    Corruption,
    Fenced,
    Invalid,
    NotExist,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
    TorusError,
)
from torus_actors.model.checksums import Buffer
from torus_actors.model.refs import UINT64_MAX
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_format import (
    GROUP_SIZE,
    RECORD,
    STATE,
    Position,
)
from torus_actors.storage.journal_index import Fence, JournalStats, Log, Ticket
from torus_actors.storage.journal_open import open_journal
from torus_actors.storage.journal_space import JournalLimits, JournalSpace
from torus_actors.storage.journal_steps import Commit, MakeSegment, ReadRecords, Reuse
from torus_actors.storage.step import Step

WAITING_BYTES_MAX = 64 << 20
"""Records that wait for the disk: more than it writes in a second need not be held in memory."""

ROOM_FOR_MIN = 2
"""Volumes that there is always room for: one more than are in use may come at any time."""

READ_RECORDS_MAX = 4096
"""Records in one answer, however small."""


class JournalStore(JournalSpace):
    """See the module; made by `open`.

    Attributes:
        identity: a random number as long as the journal lives: another one means that it was lost.
    """

    @classmethod
    def open(
        cls,
        disk: Disk,
        *,
        limits: JournalLimits | None = None,
        rng: random.Random,
    ) -> JournalStore:
        """Open the journal in a directory, or begin one; blocks.

        Args:
            disk: the directory; the journal's alone.
            limits: how much of it to take.
            rng: names a new journal.

        Raises:
            Corruption: a segment file is missing, or its header is damaged.
            OSError: the disk fails.
        """
        limits = limits or JournalLimits()
        return cls(disk, limits, open_journal(disk, rng))

    # Write. Each of these hands out a ticket, or None when all is durable already.

    def append(self, volume: int, epoch: int, seq: int, payload: Sequence[Buffer]) -> Ticket | None:
        """Take in a record.

        Args:
            volume: whose log.
            epoch: the session's; one that is higher than promised is promised with it.
            seq: number of the record: one more than the last of the epoch, any if it is the first.
            payload: buffers; copied, so that they may be changed afterwards.

        Raises:
            Fenced: a higher epoch was promised.
            Invalid: it leaves a gap, is too large, or is there with other content.
            OutOfSpace: the journal is full; nothing was changed.
            Overloaded: too much is waiting.
            Corruption: damage took records of this epoch: begin another.
            Closed: the journal failed or was closed.
        """
        self._check_usable()
        _check_numbers(volume, epoch, seq)
        # A copy: a caller that has given up may change its buffers, and a group with one payload
        # that does not match its checksum would count as torn, with the records of all others.
        data = b"".join(payload)
        length, crc = len(data), crc32c(data)
        at = Position(epoch, seq)
        log = self._logs.get(volume)
        expected: int | None = None
        if log is not None:
            if epoch < log.promised:
                raise _fenced(volume, epoch, log.promised)
            if at <= log.cut:
                return None
            waiting = log.waiting.get(at)
            if waiting is not None:
                _check_same(at, length, crc, waiting.length, waiting.crc)
                return waiting
            if self._is_stored(log, at, length, crc):
                return None
            expected = log.expected(epoch)
        check_gap(at, expected)
        self._check_room(length)
        log = self._log(volume, epoch)
        ticket = Ticket(RECORD, log, at, data, length, crc, expected is None)
        log.promised = epoch
        log.tail = at
        log.waiting[at] = ticket
        self._enqueue(ticket)
        return ticket

    def fence(self, volume: int, epoch: int) -> Ticket | None:
        """Promise to refuse lower epochs; when it is durable, `fenced` tells what is here.

        Raises:
            Fenced: a higher epoch was promised.
            Closed: the journal failed or was closed.
        """
        self._check_usable()
        _check_numbers(volume, epoch, 0)
        log = self._log(volume, epoch)
        if epoch < log.promised:
            raise _fenced(volume, epoch, log.promised)
        if epoch == log.durable_promise:
            return None
        if log.promise is not None and log.promise.at.epoch == epoch:
            return log.promise
        if log.is_suspect:
            # This epoch may have been promised here before, and that be lost with its records.
            log.unknown = epoch
        log.promised = epoch
        log.promise = Ticket(STATE, log, Position(epoch, 0))
        self._enqueue(log.promise)
        return log.promise

    def fenced(self, volume: int) -> Fence:
        """The newest durable records of a volume."""
        log = self._logs.get(volume)
        if log is None:
            return Fence(0, 0, 0, self._incomplete)
        if not log.runs:
            return Fence(0, 0, 0, log.damaged(0))
        epoch = max(log.runs)
        run = log.runs[epoch]
        return Fence(epoch, run.first, run.last, log.damaged(epoch))

    @property
    def room(self) -> int:
        """Bytes that one volume should keep here at most, so that those in use do not fill it."""
        used = sum(bool(log.runs) for log in self._logs.values())
        return self.limits.live_bytes_max // max(used + 1, ROOM_FOR_MIN)

    def cut(self, volume: int, epoch: int, upto_seq: int) -> None:
        """Note that records up to this one, and all of lower epochs, are no longer needed.

        After a crash some may be back. An unknown volume has none.

        Raises:
            Invalid: the epoch was never promised.
            Closed: the journal failed or was closed.
        """
        self._check_usable()
        _check_numbers(volume, max(epoch, 1), upto_seq)
        log = self._logs.get(volume)
        if log is None or Position(epoch, upto_seq) <= log.cut:
            return
        if epoch > log.promised:
            raise Invalid(f"volume {volume}: cut in epoch {epoch}, promised is {log.promised}")
        for stored in log.cut_to(Position(epoch, upto_seq)):
            self._forget(stored)

    def drop(self, volume: int) -> Ticket | None:
        """Forget a volume. What of it is waiting fails.

        Raises:
            Closed: the journal failed or was closed.
        """
        self._check_usable()
        old = self._logs.get(volume)
        if old is None or (old.empty and not old.drop_pending):
            return None
        error = Fenced(f"volume {volume} was dropped from the journal")
        self._give_up(lambda ticket: ticket.log is old and not ticket.drop, error)
        old.gone = True
        for _, stored in old.live():
            self._forget(stored)
        log = self._logs[volume] = Log(volume, dropped=old.dropped, drop_pending=True)
        ticket = Ticket(STATE, log, drop=True)
        self._urgent.append(ticket)
        return ticket

    # Read.

    def locate(
        self, volume: int, epoch: int, from_seq: int, bytes_max: int
    ) -> tuple[int, ReadRecords]:
        """Find durable records, to be read in a worker; `release` afterwards.

        Args:
            volume: whose log.
            epoch: of the records.
            from_seq: number of the first.
            bytes_max: of payload; at least one record is given in any case.

        Returns:
            The number of the first, and the step that reads and verifies as many as fit; none at
            the end of the log.

        Raises:
            NotExist: the record was cut.
            Corruption: the record was lost to damage.
        """
        log = self._logs.get(volume)
        step = ReadRecords(threading.Lock(), [])
        if log is None:
            if self._incomplete:
                raise Corruption(f"volume {volume}: all records may be lost")
            return from_seq, step
        run = log.runs.get(epoch)
        if Position(epoch, from_seq) <= log.cut or (run is not None and from_seq < run.first):
            raise NotExist(f"volume {volume}: record {from_seq} of epoch {epoch} is not here")
        seq = from_seq
        size = 0
        while run is not None and seq <= run.last and len(step.items) < READ_RECORDS_MAX:
            stored = run.records[seq - run.first]
            if stored is None:
                break
            size += stored.length
            if step.items and size > bytes_max:
                break
            step.items.append((log, Position(epoch, seq), stored, self._segments[stored.segment]))
            seq += 1
        if not step.items and (
            (run is not None and seq <= run.last)
            or (log.lost_tail is not None and epoch <= log.lost_tail)
            or (log.unknown is not None and epoch <= log.unknown)
        ):
            raise Corruption(f"volume {volume}: record {from_seq} of epoch {epoch} is lost")
        for _, _, _, segment in step.items:
            segment.reading += 1
        return from_seq, step

    def release(self, step: ReadRecords) -> None:
        """The records of a `locate` were read: their segments may be reused."""
        for _, _, _, segment in step.items:
            segment.reading -= 1

    def read(
        self, volume: int, epoch: int, from_seq: int, bytes_max: int
    ) -> list[tuple[int, bytes]]:
        """Number and payload of records; blocks. For tools and tests; errors as `locate`."""
        first, step = self.locate(volume, epoch, from_seq, bytes_max)
        try:
            step.run()
        finally:
            self.release(step)
        return [(first + i, bytes(payload)) for i, payload in enumerate(step.payloads)]

    # Disk work.

    def next_step(self) -> Step | None:
        """What is to be done on the disk; ended by `end_step` or `fail_step`.

        Returns:
            None when there is nothing to do, or a step is under way.
        """
        if self._failure is not None or self._step is not None:
            return None
        makers = [self._next_commit, self._next_job]
        if isinstance(self._last_step, Commit):
            # In turns: room must be made while there is some.
            makers.reverse()
        for make in makers * 2:  # a job may leave something to be committed first
            step = make()
            if step is not None:
                self._step = self._last_step = step
                return step
        if self._queue and not any(segment.reading for segment in self._segments):
            why = self._growth_error or ""
            error = OutOfSpace(f"the journal has no room, and cannot have more: {why}")
            self._give_up(lambda ticket: True, error)
            self._growth_refused = False
        return None

    def end_step(self, step: Step) -> None:
        """Take note that a step is done."""
        self._land(step)
        if isinstance(step, Commit):
            self._committed(step)
        elif isinstance(step, MakeSegment):
            self._filled(step)
        elif isinstance(step, ReadRecords):
            self._read_to_move(step)
        elif isinstance(step, Reuse):
            self._reused(step)

    def fail_step(self, step: Step, error: Exception) -> None:
        """Take note that a step failed: unless it can do without, the store has failed."""
        self._land(step)
        if isinstance(step, MakeSegment) and (step.file is None or isinstance(error, OutOfSpace)):
            self._no_growth(step, error)  # nothing was written, or nothing that counts
            return
        if isinstance(step, ReadRecords) and isinstance(error, Corruption):
            self._cannot_move(step)
            return
        self._failure = f"failed ({error}); restart the node to open it again"
        if isinstance(step, Commit):
            lost = OutcomeUnknown(f"the journal {self._failure}")
            for placed in step.placed:
                placed.ticket.settle(lost)
        for ticket in [*self._urgent, *self._queue]:
            ticket.settle(Closed(f"the journal {self._failure}"))
        self._urgent.clear()
        self._queue.clear()

    def settle(self) -> None:
        """Do all disk work that is to be done; blocks. For tools and tests."""
        while (step := self.next_step()) is not None:
            try:
                step.run()
            except (OSError, TorusError) as error:
                self.fail_step(step, error)
            else:
                self.end_step(step)

    def close(self) -> None:
        """Close the files; blocks. What is waiting fails."""
        try:
            if self._failure is None and self._step is None:
                closed = Closed("the journal was closed")
                self._give_up(lambda ticket: True, closed)
                self._sign_off()
                for ticket in self._urgent:
                    ticket.settle(closed)
        finally:
            self._failure = self._failure or "was closed"
            with contextlib.ExitStack() as files:
                for segment in self._segments:
                    files.callback(segment.file.close)
                if self._making is not None and self._making.file is not None:
                    files.callback(self._making.file.close)

    # Look.

    @property
    def failure(self) -> str | None:
        """Why nothing is taken in any more; None while it is."""
        return self._failure

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    @property
    def waiting(self) -> int:
        """How much is not durable yet."""
        return len(self._queue) + len(self._urgent)

    def volumes(self) -> list[int]:
        """All volumes that have a log."""
        return [volume for volume, log in self._logs.items() if not log.empty]

    def stats(self) -> JournalStats:
        """Sizes and counts."""
        no_growth = "" if self._growth_error is None else str(self._growth_error)
        if isinstance(self._growth_error, OutOfSpace):
            with contextlib.suppress(OSError):
                if self._disk.free_bytes() >= self.limits.segment_bytes:
                    no_growth = ""  # there is room by now; nothing was to be stored since
        return JournalStats(
            volumes=len(self.volumes()),
            records=sum(segment.live_records for segment in self._segments),
            live_bytes=self._live_bytes,
            live_bytes_max=self.limits.live_bytes_max,
            segments=len(self._segments),
            segments_max=self.limits.segments_max,
            segments_free=len(self._free),
            segment_bytes=self.limits.segment_bytes,
            waiting=self.waiting,
            commits=self._commits,
            committed=self._committed_tickets,
            copied=self._copied,
            reused=self._reuses,
            no_growth=no_growth,
        )

    # Inside.

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise Closed(f"the journal {self._failure}")

    def _check_room(self, length: int) -> None:
        limits = self.limits
        if length > limits.record_bytes_max:
            raise Invalid(
                f"a record of {length} bytes: at most {limits.record_bytes_max} are taken"
            )
        size = length + GROUP_SIZE
        if self._live_bytes + self._waiting_bytes + size > limits.live_bytes_max:
            raise OutOfSpace(
                f"the journal is full: {self._live_bytes} of {limits.live_bytes_max} bytes needed"
            )
        if self._waiting_bytes and self._waiting_bytes + size > WAITING_BYTES_MAX:
            raise Overloaded(f"{self._waiting_bytes} bytes wait for the journal's disk")

    def _is_stored(self, log: Log, at: Position, length: int, crc: int) -> bool:
        """Whether the record is durable; refuses another one in its place."""
        if log.lost_tail is not None and at.epoch <= log.lost_tail:
            raise Corruption(f"volume {log.volume}: records of epoch {at.epoch} are lost")
        run = log.runs.get(at.epoch)
        if run is None or not run.first <= at.seq <= run.last:
            return False
        stored = run.records[at.seq - run.first]
        if stored is None:
            raise Corruption(f"volume {log.volume}: record {at.seq} of epoch {at.epoch} is lost")
        _check_same(at, length, crc, stored.length, stored.crc)
        return True

    def _log(self, volume: int, epoch: int) -> Log:
        """The log of a volume; begun for this epoch if there is none."""
        log = self._logs.get(volume)
        if log is None:
            # Who fences it asks what was here, and that is not known.
            unknown = epoch if self._incomplete else None
            log = self._logs[volume] = Log(volume, unknown=unknown)
        return log

    def _enqueue(self, ticket: Ticket) -> None:
        self._queue.append(ticket)
        self._waiting_bytes += ticket.size

    def _land(self, step: Step) -> None:
        if self._step is not step:
            raise Invalid("this step has ended already")
        self._step = None


def check_gap(at: Position, expected: int | None) -> None:
    """Refuse a record that does not follow the last one.

    Raises:
        Invalid: it leaves a gap, or goes back.
    """
    if expected is not None and at.seq != expected:
        raise Invalid(f"record {at.seq} of epoch {at.epoch}: the next one is {expected}")


def _check_numbers(volume: int, epoch: int, seq: int) -> None:
    if not (0 < volume <= UINT64_MAX and 0 < epoch <= UINT64_MAX and 0 <= seq < UINT64_MAX):
        raise Invalid(f"volume {volume}, epoch {epoch}, record {seq}: out of range")


def _check_same(at: Position, length: int, crc: int, there: int, there_crc: int) -> None:
    if (length, crc) != (there, there_crc):
        raise Invalid(f"record {at.seq} of epoch {at.epoch} is there with other content")


def _fenced(volume: int, epoch: int, promised: int) -> Fenced:
    return Fenced(f"volume {volume}: epoch {epoch} is over, {promised} was promised")
