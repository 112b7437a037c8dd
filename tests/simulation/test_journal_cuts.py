"""The journal against power cuts, kills and disk errors at every point, on the simulated disk.

A run is a seeded workload on a few volumes; a model keeps what was acknowledged, what was only
asked for, and what is no longer needed. Mutants, that is stores with one rule of safety broken,
show that the runs can fail at all.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import pytest

from torus_actors.errors import (
    Closed,
    Fenced,
    Invalid,
    OutcomeUnknown,
    OutOfSpace,
    TorusError,
)
from torus_actors.storage import journal, journal_format, journal_open, journal_steps
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import START, Position, SegmentHeader
from torus_actors.storage.journal_index import Log, Segment, Ticket
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.journal_steps import Commit, Reuse
from torus_actors.storage.simdisk import Operation, PowerCut, SimDisk
from torus_actors.storage.step import Step

LIMITS = JournalLimits(segment_bytes=64 << 10, journal_bytes_max=5 * (64 << 10))
VOLUMES = (3, 5, 7, 11)
LENGTHS = (0, 1, 100, 1000, 4096, 6000, 16384)


class Violated(AssertionError):
    """A promise of the journal was broken."""


def promise(kept: bool, text: str) -> None:
    """Fail with Violated unless ``kept``."""
    if not kept:
        raise Violated(text)


@dataclasses.dataclass(slots=True)
class Expected:
    """What is known of one volume.

    Attributes:
        epoch: the one that its session works under.
        promised: the highest that was acknowledged as promised.
        following: number of the next record of the epoch; None where any will do.
        acked: records that must be there unless they were cut.
        asked: all that may be there.
        cut: what is no longer needed.
        drops: how many were asked for.
    """

    epoch: int = 0
    promised: int = 0
    following: int | None = None
    acked: dict[Position, bytes] = dataclasses.field(default_factory=dict)
    asked: dict[Position, bytes] = dataclasses.field(default_factory=dict)
    cut: Position = START
    drops: int = 0
    before_drop: list[dict[Position, bytes]] = dataclasses.field(default_factory=list)
    """What a drop that was not acknowledged may leave behind."""

    def needed(self) -> dict[Position, bytes]:
        """What must be there."""
        return {at: data for at, data in self.acked.items() if at > self.cut}


class Run:
    """One journal through a workload, with any number of cuts and kills on the way."""

    def __init__(self, seed: int, store_class: type[JournalStore], faults: bool = False) -> None:
        self.rng = random.Random(f"workload {seed}")
        self.disk = SimDisk(random.Random(f"disk {seed}"))
        self.store_class = store_class
        self.faults = faults
        self.store: JournalStore | None = None
        self.expected = {volume: Expected() for volume in VOLUMES}
        self.inside = False
        self.reused = self.copied = 0

    # Starting and stopping.

    def start(self) -> None:
        """Open the journal, and hold it to what is expected."""
        self.inside = True
        self.store = self.store_class.open(self.disk, limits=LIMITS, rng=random.Random(1))
        self.disk.on_operation = self.interleave
        for volume, expected in self.expected.items():
            self.check(volume, expected)
        self.inside = False

    def check(self, volume: int, expected: Expected) -> None:
        """Compare a volume after a start, and go on from what is there."""
        store = self.the_store()
        found = store.fenced(volume)
        promise(not found.damaged, f"volume {volume}: damage out of nowhere")
        there = self.everything(volume, expected)
        for old in expected.before_drop:
            # The drop may not have happened.
            if there and all(old.get(at) == data for at, data in there.items()):
                expected.asked = dict(old)
        for at, data in expected.needed().items():
            promise(there.get(at) == data, f"volume {volume}: acknowledged {at} is lost")
        for at, data in there.items():
            promise(at in expected.asked, f"volume {volume}: {at} was never written, or is dropped")
            promise(expected.asked[at] == data, f"volume {volume}: {at} has other bytes")
        for at in there:
            if at.epoch == found.epoch:
                promise(found.first <= at.seq <= found.last, "range of the newest epoch")
        log = store._logs.get(volume)
        promised = 0 if log is None else log.promised
        promise(promised >= expected.promised, f"volume {volume}: promise is forgotten")
        if expected.promised > 1:
            try:
                store.append(volume, expected.promised - 1, 1, [b""])
                promise(False, f"volume {volume}: a fenced epoch writes")
            except Fenced:
                pass
        # What it shows once it is open, it has made durable.
        expected.acked = dict(there)
        expected.asked = dict(there)
        expected.before_drop = []
        expected.promised = promised
        expected.epoch = max(expected.epoch, promised)
        expected.following = None if log is None else log.expected(expected.epoch)
        last = max((at for at in there if at.epoch == expected.epoch), default=None)
        promise(last is None or expected.following is None or expected.following > last.seq, "next")
        cut = Position(0, 0) if log is None else log.cut
        promise(cut <= expected.cut or bool(expected.drops), "more is cut than was asked for")
        expected.cut = cut

    def everything(self, volume: int, expected: Expected) -> dict[Position, bytes]:
        """All records of a volume, read through the front door."""
        there: dict[Position, bytes] = {}
        log = self.the_store()._logs.get(volume)
        for epoch, run in ({} if log is None else log.runs).items():
            seq = run.first
            while batch := self.tail(volume, epoch, seq):
                promise(batch[0][0] == seq, "a record was skipped")
                for number, data in batch:
                    promise(number == seq, "a record was skipped")
                    there[Position(epoch, number)] = data
                    seq += 1
            promise(seq == run.last + 1, "the log ends early")
        return there

    def tail(self, volume: int, epoch: int, seq: int) -> list[tuple[int, bytes]]:
        """Some records from this one on."""
        try:
            return self.the_store().read(volume, epoch, seq, 20_000)
        except TorusError as error:
            raise Violated(f"volume {volume}: {error}") from error

    def the_store(self) -> JournalStore:
        """The store, which is open."""
        assert self.store is not None
        return self.store

    # The workload.

    def work(self, steps: int) -> None:
        """Take random steps; stops early when the store has failed."""
        for _ in range(steps):
            if self.the_store().failure:
                return
            if self.faults and self.rng.random() < 0.04:
                self.disk.inject(self.rng.choice(["sync", "write"]))
            if self.rng.random() < 0.5:
                self.change()
            else:
                self.pump(self.rng.randrange(1, 4))
        store = self.the_store()
        self.reused += store.stats().reused
        self.copied += store.stats().copied

    def pump(self, count: int) -> None:
        """Do disk work, as a worker would, while others change things."""
        store = self.the_store()
        for _ in range(count):
            step = store.next_step()
            if step is None:
                return
            try:
                step.run()
            except (OSError, TorusError) as error:
                promise(self.faults, f"an error out of nowhere: {error}")
                store.fail_step(step, error)
            else:
                store.end_step(step)

    def interleave(self, operation: Operation) -> None:
        """What others do while a worker is on the disk."""
        if not self.inside and self.rng.random() < 0.3:
            self.inside = True
            self.change()
            self.inside = False

    def change(self) -> None:
        """One call on the store."""
        volume = self.rng.choice(VOLUMES)
        expected = self.expected[volume]
        roll = self.rng.random()
        if expected.epoch == 0 or roll < 0.06:
            self.fence(volume, expected)
        elif roll < 0.10:
            self.new_epoch(volume, expected)
        elif roll < 0.24:
            self.cut(volume, expected)
        elif roll < 0.26:
            self.drop(volume, expected)
        elif roll < 0.32:
            self.wrong(volume, expected)
        elif roll < 0.38:
            self.read(volume, expected)
        else:
            self.append(volume, expected)

    def submit(self, make: Callable[[], Ticket | None], acked: Callable[[], None]) -> bool:
        """Ask for something; False if there was no room for it."""
        try:
            ticket = make()
        except OutOfSpace:
            live = self.the_store().stats().live_bytes + self.the_store()._waiting_bytes
            promise(live > LIMITS.live_bytes_max - 20_000, "out of space with room left")
            return False

        def settled(error: Exception | None) -> None:
            if error is None:
                acked()
            else:
                promise(isinstance(error, (Closed, OutcomeUnknown, Fenced)), repr(error))
                promise(self.faults or isinstance(error, Fenced), repr(error))

        if ticket is None:
            acked()
        else:
            ticket.waiters.append(settled)
        return True

    def append(self, volume: int, expected: Expected) -> None:
        """Write the next record, or an earlier one again."""
        epoch = expected.epoch
        seq = expected.following
        again = [at for at in expected.asked if at.epoch == epoch and at > expected.cut]
        if again and self.rng.random() < 0.1:
            at = self.rng.choice(again)
            data = expected.asked[at]
        else:
            at = Position(epoch, self.rng.randrange(1, 50) if seq is None else seq)
            data = self.rng.randbytes(self.rng.choice(LENGTHS))
        drops = expected.drops

        def acked() -> None:
            if expected.drops == drops:
                expected.acked[at] = data
                expected.promised = max(expected.promised, epoch)

        store = self.the_store()
        before = expected.asked.get(at)
        expected.asked[at] = data
        if not self.submit(lambda: store.append(volume, *at, [data]), acked):
            if before is None:
                del expected.asked[at]
            # Somebody has to make room.
            for other, theirs in self.expected.items():
                self.cut(other, theirs)
            return
        if before is None:
            expected.following = at.seq + 1

    def fence(self, volume: int, expected: Expected) -> None:
        """Begin a session: fence, then find what the old one left."""
        epoch = expected.epoch + self.rng.randrange(0, 3)
        if epoch == 0:
            return
        drops = expected.drops
        needed: dict[Position, bytes] = {}

        def acked() -> None:
            if expected.drops != drops:
                return
            found = self.the_store().fenced(volume)
            expected.promised = max(expected.promised, epoch)
            needed.update(expected.needed())
            older = [at for at in needed if at.epoch < epoch]
            newest = max(older, default=None)
            if newest is not None and found.epoch < epoch:
                promise(found.epoch == newest.epoch, "a fence overlooks an epoch")
                promise(found.last >= newest.seq, "a fence overlooks a record")

        store = self.the_store()
        self.submit(lambda: store.fence(volume, epoch), acked)
        if epoch != expected.epoch:
            expected.epoch, expected.following = epoch, None

    def new_epoch(self, volume: int, expected: Expected) -> None:
        """Write under a higher epoch without asking first."""
        expected.epoch += 1
        expected.following = None
        self.append(volume, expected)

    def cut(self, volume: int, expected: Expected) -> None:
        """Cut what was acknowledged, or part of it."""
        if not expected.acked:
            return
        at = self.rng.choice(sorted(expected.acked)[-6:])
        if at <= expected.cut:
            return
        self.the_store().cut(volume, *at)
        expected.cut = at

    def drop(self, volume: int, expected: Expected) -> None:
        """Delete a volume; its successor begins anew."""
        old = dict(expected.asked)
        expected.drops += 1
        drops = expected.drops

        def acked() -> None:
            if expected.drops == drops:
                expected.before_drop.clear()

        expected.before_drop.append(old)
        expected.epoch = expected.promised = 0
        expected.following = None
        expected.acked, expected.asked = {}, {}
        expected.cut = Position(0, 0)
        store = self.the_store()
        self.submit(lambda: store.drop(volume), acked)

    def wrong(self, volume: int, expected: Expected) -> None:
        """Calls that must be refused."""
        store = self.the_store()
        epoch = expected.epoch
        log = store._logs.get(volume)
        if log is None or log.promised != epoch:
            return
        if epoch > 1:
            for call in (
                lambda: store.append(volume, epoch - 1, 1, [b"late"]),
                lambda: store.fence(volume, epoch - 1),
            ):
                try:
                    call()
                    promise(False, "a lower epoch was let in")
                except Fenced:
                    pass
        if expected.following is not None:
            gap = Position(epoch, expected.following + self.rng.randrange(1, 3))
            try:
                store.append(volume, *gap, [b"gap"])
                promise(False, "a gap was let in")
            except Invalid:
                pass
        waiting = [at for at in expected.asked if at.epoch == epoch and at > expected.cut]
        if waiting:
            at = self.rng.choice(waiting)
            try:
                store.append(volume, *at, [expected.asked[at] + b"!"])
                promise(False, "a record was replaced")
            except Invalid:
                pass

    def read(self, volume: int, expected: Expected) -> None:
        """Read some record that must be there."""
        needed = expected.needed()
        if not needed:
            return
        at = self.rng.choice(sorted(needed))
        batch = self.tail(volume, *at)
        promise(bool(batch) and batch[0] == (at.seq, needed[at]), f"{at} reads wrong")


def run_with_cut(seed: int, cut: int, store_class: type[JournalStore] = JournalStore) -> Run | None:
    """A workload cut before its n-th operation, a start, a second workload and a second cut.

    Returns:
        None if there was no n-th operation to cut.
    """
    run = Run(seed, store_class)
    run.disk.cut_before(cut)
    was_cut = False
    try:
        run.start()
        run.work(260)
    except PowerCut:
        was_cut = True
    # The seed of the first part must not depend on the cut; that of the rest must.
    run.rng = random.Random(f"after {seed} {cut}")
    for _ in range(2):
        run.disk.rng.seed(f"loss {seed} {cut}")
        run.disk = run.disk.crash()
        run.disk.cut_before(run.rng.choice([3, 10, 60]))
        try:
            run.start()
            run.work(60)
        except PowerCut:
            pass
    run.disk = run.disk.crash()
    run.start()
    return run if was_cut else None


def run_with_faults(seed: int, store_class: type[JournalStore] = JournalStore) -> Run:
    """Several lives of a journal: disk errors, kills and power cuts in any order."""
    run = Run(seed, store_class, faults=True)
    for _ in range(6):
        try:
            run.disk.cut_before(run.rng.choice([8, 40, 200]) - run.rng.randrange(8))
            run.start()
            run.work(100)
            if run.rng.random() < 0.3:
                run.inside = True
                run.the_store().close()
        except PowerCut:
            pass
        except OSError:
            # An injected error met the opening or closing: the next life begins where it left off.
            pass
        run.disk = run.disk.kill() if run.rng.random() < 0.6 else run.disk.crash()
        run.disk.heal()
    run.start()
    return run


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))]
)
def test_power_cut_before_every_operation(seed: int) -> None:
    """Wherever the power goes: acknowledged records and promises are there, none was made up."""
    cut = reused = copied = 0
    while (run := run_with_cut(seed, cut)) is not None:
        cut += 1
        reused, copied = reused + run.reused, copied + run.copied
    assert cut > 150
    assert reused > cut // 10
    assert copied


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (200, 400))]
)
def test_errors_kills_and_cuts(first: int) -> None:
    """The same promises hold through failed writes and syncs, kill -9, closing, and restarts."""
    for seed in range(first, first + 200):
        run_with_faults(seed)


def test_runs_are_deterministic() -> None:
    """One seed, one course of events: else no failure could be replayed."""

    def trace() -> list[Operation]:
        run = Run(3, JournalStore)
        operations: list[Operation] = []
        run.start()

        def note(operation: Operation) -> None:
            operations.append(operation)
            run.interleave(operation)

        run.disk.on_operation = note
        run.work(200)
        return operations

    first = trace()
    assert len(first) > 50
    assert trace() == first


# Mutants: each breaks one rule, and must be found.


class ForgetsPromises(JournalStore):
    """Answers a fence from memory."""

    def fence(self, volume: int, epoch: int) -> Ticket | None:
        """Nothing is written."""
        ticket = super().fence(volume, epoch)
        if ticket is not None and ticket in self._queue:
            self._queue.remove(ticket)
            self._waiting_bytes -= ticket.size
            ticket.log.promise = None
        return None


class ReusesEarly(JournalStore):
    """Reuses a segment while what is needed of it is still to be written elsewhere."""

    def _empty(self, victim: Segment) -> Step | None:
        step = super()._empty(victim)
        if step is None and not self._moving and self._emptying is victim:
            header = SegmentHeader(victim.index, self._store_id, victim.generation + 1, victim.size)
            return Reuse(self._lock, victim, header)
        return step


class ForgetsStates(JournalStore):
    """Reuses a segment with the last word on a volume."""

    def _states_in(self, victim: Segment) -> list[Log]:
        return []


class GoesOnAfterFailedSync(JournalStore):
    """Believes the sync that succeeds after one that failed."""

    def fail_step(self, step: Step, error: Exception) -> None:
        """Say that all is well."""
        if isinstance(step, Commit):
            self.end_step(step)
        else:
            super().fail_step(step, error)


def every_cut(
    store_class: type[JournalStore] = JournalStore, seeds: Iterable[int] = range(4)
) -> None:
    """The runs with cuts."""
    for seed in seeds:
        cut = 0
        while run_with_cut(seed, cut, store_class) is not None:
            cut += 1


def every_fault(store_class: type[JournalStore] = JournalStore) -> None:
    """The runs with faults."""
    for seed in range(400):
        run_with_faults(seed, store_class)


@pytest.mark.parametrize("mutant", [ForgetsPromises, ReusesEarly, ForgetsStates])
def test_cuts_find_mutant(mutant: type[JournalStore]) -> None:
    """A store that breaks a rule of ordering is found out by the cuts."""
    with pytest.raises(Violated):
        every_cut(mutant)


def test_faults_find_mutant() -> None:
    """A store that goes on after a failed sync is found out."""
    with pytest.raises(Violated):
        every_fault(GoesOnAfterFailedSync)


def _ignored(*args: Any) -> None:
    """Do nothing."""


def _same(written: int, present: int) -> bool:
    """Take every generation for the present one."""
    return True


def _trust(segment: Segment, group: journal_format.Group) -> bool:
    """Take the newest group for whole and durable."""
    return True


def _sees_whole(segment: Segment, group: journal_format.Group) -> bool:
    """Tell a torn group, but leave a whole one in the page cache, if that is where it is."""
    with mock.patch.object(segment.file, "pwrite", _ignored):
        return SETTLE(segment, group)


def _leaves_torn(segment: Segment, group: journal_format.Group) -> bool:
    """Tell a torn group, and leave it where it is."""
    write = segment.file.pwrite

    def pwrite(data: bytes, offset: int) -> None:
        if any(data):
            write(data, offset)

    with mock.patch.object(segment.file, "pwrite", pwrite):
        return SETTLE(segment, group)


SETTLE = journal_open.settle_newest

RARELY = range(12, 52)
"""Seeds for what shows once in a thousand cuts; the first one of them finds it as things are."""


@pytest.mark.parametrize(
    ("where", "name", "broken", "runs"),
    [
        (journal_steps.Commit, "sync", _ignored, every_cut),
        (journal_steps.Reuse, "_work", _ignored, every_cut),
        (journal_format, "same_generation", _same, every_cut),
        (journal, "check_gap", _ignored, every_cut),
        (journal_open, "settle_newest", _trust, every_cut),
        (journal_open, "settle_newest", _leaves_torn, partial(every_cut, seeds=RARELY)),
        (journal_open, "settle_newest", _sees_whole, every_fault),
    ],
    ids=[
        "no sync before the answer",
        "new generation not durable",
        "generation not checked",
        "gap accepted",
        "torn group accepted",
        "torn group left",
        "page cache trusted",
    ],
)
def test_patched_mutant(where: Any, name: str, broken: Any, runs: Callable[[], None]) -> None:
    """A journal with one rule patched away is found out."""
    with mock.patch.object(where, name, broken), pytest.raises(Violated):
        runs()
