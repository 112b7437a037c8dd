"""The mfile store against power cuts, kills and disk errors at every point, on the simulated disk.

A run is a seeded workload; a model keeps, for each ref, whether it must, may, or must not be there
after the next start. Mutants, that is stores with one rule of safety broken, show that the runs can
fail at all.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Self
from unittest import mock

import pytest

from torus_actors.errors import Closed, Corruption, OutOfSpace
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.model.refs import BlockRef
from torus_actors.storage import mfile_open
from torus_actors.storage import slots as states
from torus_actors.storage.index import ENTRY_SIZE, HEADER_COPIES, Layout
from torus_actors.storage.mfile import MFileBatch, MFileStore
from torus_actors.storage.simdisk import Operation, PowerCut, SimDisk
from torus_actors.storage.store import FlushBatch, Location

BLOCK_SIZE = 8192
SIZE_BYTES = 3 * 4096 + 4096 + 9 * (4096 + BLOCK_SIZE + 64)
REFS = [BlockRef.of(7, 1 + i // 4, 1 + i) for i in range(16)]
LENGTHS = (1, 4096, 5000, BLOCK_SIZE)


def content_of(ref: BlockRef) -> bytes:
    """The bytes that belong to a ref, always the same: blocks are immutable."""
    return random.Random(ref.index).randbytes(LENGTHS[ref.index % len(LENGTHS)])


CONTENT = {ref: content_of(ref) for ref in REFS}


class Violated(AssertionError):
    """A promise of the store was broken."""


def promise(kept: bool, text: str) -> None:
    """Fail with Violated unless ``kept``."""
    if not kept:
        raise Violated(text)


@dataclasses.dataclass(slots=True)
class Expected:
    """What is known of one ref."""

    live: bool = False
    after: str = "absent"
    """After the next start: "present", "absent" or "either"."""
    changes: int = 0


class Run:
    """One store through a workload, with any number of cuts and kills on the way."""

    def __init__(self, seed: int, store_class: type[MFileStore], *, faults: bool = False) -> None:
        self.rng = random.Random(f"workload {seed}")
        self.disk = SimDisk(random.Random(f"disk {seed}"))
        self.store_class = store_class
        self.faults = faults
        self.store: MFileStore | None = None
        self.expected = {ref: Expected() for ref in REFS}
        self.pinned: list[tuple[BlockRef, Location]] = []
        self.nested = False
        self.two_headers = False

    # Starting and stopping.

    def start(self) -> None:
        """Open the store, and hold it to what is expected."""
        self.pinned = []
        self.two_headers = False
        store = self.store_class.open(
            self.disk, block_size=BLOCK_SIZE, size_bytes=SIZE_BYTES, rng=random.Random(1)
        )
        self.disk.on_operation = self.interleave
        self.store = store
        self.two_headers = True
        listed, end = store.refs_from(0, 1000)
        promise(end is None and len(set(listed)) == len(listed), "listing repeats a block")
        promise(set(listed) <= set(REFS), "a block that was never put")
        for ref, expected in self.expected.items():
            there = store.has(ref)
            promise(there or expected.after != "present", f"flushed block {ref} is lost")
            promise(not there or expected.after != "absent", f"deleted block {ref} is back")
            if there:
                try:
                    promise(store.get(ref) == CONTENT[ref], f"{ref} has the bytes of another")
                except Corruption as error:
                    raise Violated(f"{ref}: {error}") from error
            # What an open store shows, it has made durable.
            self.expected[ref] = Expected(there, "present" if there else "absent")
        stats = store.stats()
        promise(stats.used == len(listed), "counts")

    def lose_power(self) -> None:
        """Power cut, and back."""
        self.disk = self.disk.crash()

    def lose_process(self) -> None:
        """Kill -9: the page cache stays."""
        self.disk = self.disk.kill()

    def close(self) -> None:
        """Close in order."""
        self.two_headers = False
        self.open_store().close()
        self.two_headers = True

    def lose_header(self) -> None:
        """One header rots; the other is enough, unless an error met it while it was written."""
        if self.two_headers:
            page = self.rng.randrange(HEADER_COPIES)
            self.disk.rot(mfile_open.INDEX_PATH, page * PAGE_SIZE)

    # The workload.

    def work(self, steps: int) -> None:
        """Take random steps; stops early when the store has failed."""
        for _ in range(steps):
            if self.open_store().failure:
                return
            if self.faults and self.rng.random() < 0.08:
                self.inject()
            step = self.rng.choice(
                [self.put, self.put, self.put, self.delete, self.replace, self.read, self.flush]
            )
            step()

    def inject(self) -> None:
        """Make some coming operation fail; most often the second entry that a flush writes."""
        if self.rng.random() < 0.5:
            self.disk.inject("write", path=mfile_open.INDEX_PATH, skip=1)
        else:
            kind = self.rng.choice(["sync", "sync", "write"])
            path = self.rng.choice([mfile_open.DATA_PATH, mfile_open.INDEX_PATH])
            self.disk.inject(kind, path=path)

    def open_store(self) -> MFileStore:
        """The store, which is open."""
        assert self.store is not None
        return self.store

    def changed(self, ref: BlockRef, live: bool) -> None:
        """Note that the store's answer to a ref is another one now."""
        expected = self.expected[ref]
        expected.live = live
        expected.after = "either"
        expected.changes += 1

    def put(self) -> None:
        """Put a block, new or not; sometimes give up half-way."""
        self.put_ref(self.rng.choice(REFS))

    def put_ref(self, ref: BlockRef) -> None:
        """Put this block."""
        store = self.open_store()
        expected = self.expected[ref]
        try:
            if store.put(ref, CONTENT[ref]):
                promise(not expected.live, "an existing block was put again")
                self.changed(ref, True)
        except OutOfSpace:
            promise(store.stats().free == 0, "out of space with free slots")
        except OSError:
            promise(self.faults, "an error out of nowhere")

    def delete(self) -> None:
        """Delete a few blocks, there or not."""
        refs = self.rng.sample(REFS, self.rng.randrange(1, 4))
        live = [ref for ref in refs if self.expected[ref].live]
        promise(self.open_store().delete(refs) == len(live), "count of deleted blocks")
        for ref in live:
            self.changed(ref, False)

    def replace(self) -> None:
        """Declare a copy bad, and put it anew."""
        ref = self.rng.choice(REFS)
        # Slots set aside are lost until the next start: leave some.
        if self.expected[ref].live and self.open_store().stats().quarantined < 3:
            promise(self.open_store().mark_corrupt(ref), "a live block was not there")
            self.changed(ref, False)
            self.put_ref(ref)

    def read(self) -> None:
        """End an earlier read, or begin one and let others go first."""
        store = self.open_store()
        if self.pinned and self.rng.random() < 0.6:
            ref, location = self.pinned.pop(self.rng.randrange(len(self.pinned)))
            try:
                promise(bytes(store.check(location)) == CONTENT[ref], "a pinned block changed")
            except Corruption as error:
                raise Violated(f"pinned {ref}: {error}") from error
            store.unpin(location)
            return
        live = [ref for ref in REFS if self.expected[ref].live]
        if live and len(self.pinned) < 3:
            ref = self.rng.choice(live)
            location = store.locate(ref)
            store.pin(location)
            self.pinned.append((ref, location))

    def flush(self) -> None:
        """Flush, with other steps between its phases and between its disk operations."""
        store = self.open_store()
        batch = store.begin_flush()
        before = {ref: expected.changes for ref, expected in self.expected.items()}
        self.nested = True
        try:
            batch.write()
        except OSError:
            promise(self.faults, "an error out of nowhere")
            store.fail_flush(batch)
            return
        finally:
            self.nested = False
        store.end_flush(batch)
        for ref, expected in self.expected.items():
            if expected.changes == before[ref]:
                expected.after = "present" if expected.live else "absent"

    def interleave(self, operation: Operation) -> None:
        """What others do while a flush is in a worker."""
        if self.nested and self.rng.random() < 0.5:
            self.nested = False
            self.rng.choice([self.put, self.delete, self.replace, self.read])()
            self.nested = True


def run_with_cut(seed: int, cut: int, store_class: type[MFileStore] = MFileStore) -> bool:
    """A workload cut before its n-th operation, a start, a second workload and a second cut.

    Returns:
        Whether there was an n-th operation to cut.
    """
    run = Run(seed, store_class)
    run.disk.cut_before(cut)
    was_cut = False
    try:
        run.start()
        run.work(120)
    except PowerCut:
        was_cut = True
    # The seed of the first part must not depend on the cut; that of the rest must.
    run.rng = random.Random(f"after {seed} {cut}")
    run.nested = False
    run.disk.rng.seed(f"loss {seed} {cut}")
    run.lose_power()
    run.start()
    run.disk.cut_before(run.rng.randrange(60))
    try:
        run.work(25)
    except PowerCut:
        run.nested = False
    run.lose_power()
    run.start()
    return was_cut


def run_with_faults(seed: int, store_class: type[MFileStore] = MFileStore) -> None:
    """Several lives of a store: disk errors, kills, power cuts and lost headers in any order."""
    run = Run(seed, store_class, faults=True)
    for _ in range(5):
        try:
            run.start()
            run.disk.cut_before(run.rng.choice([8, 30, 150]) - run.rng.randrange(8))
            run.work(40)
            if run.rng.random() < 0.3:
                run.close()
        except PowerCut:
            pass
        except OSError:
            # An injected error met the opening or closing: it leaves as it is, and the next life
            # begins where this one ended.
            pass
        run.nested = False
        if run.rng.random() < 0.6:
            run.lose_process()
        else:
            run.lose_power()
        run.disk.heal()
        if run.rng.random() < 0.4:
            run.lose_header()
    run.start()


@pytest.mark.parametrize("seed", range(6))
def test_power_cut_before_every_operation(seed: int) -> None:
    """Wherever the power goes: flushed blocks are there, deleted ones gone, no wrong bytes."""
    cut = 0
    while run_with_cut(seed, cut):
        cut += 1
    assert cut > 60


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (500, 1000))]
)
def test_errors_kills_and_cuts(first: int) -> None:
    """The same promises hold through failed writes and syncs, kill -9, and restarts."""
    for seed in range(first, first + 500):
        run_with_faults(seed)


@pytest.mark.parametrize(("old", "new"), [(10, 200), (200, 10)])
@pytest.mark.parametrize("seed", range(8))
def test_power_cut_while_resizing(old: int, new: int, seed: int) -> None:
    """Wherever the power goes while a store grows or shrinks, it has one of both sizes after."""
    layout = Layout(BLOCK_SIZE)

    def size_for(slots: int) -> int:
        return 4 * 4096 + slots * (layout.slot_size + ENTRY_SIZE)

    def start(disk: SimDisk, slots: int | None) -> MFileStore:
        size_bytes = None if slots is None else size_for(slots)
        return MFileStore.open(
            disk, block_size=BLOCK_SIZE, size_bytes=size_bytes, rng=random.Random(1)
        )

    totals = set()
    cut = 0
    was_cut = True
    while was_cut:
        disk = SimDisk(random.Random(f"{seed} {cut}"))
        store = start(disk, old)
        for ref in REFS[:8]:
            store.put(ref, CONTENT[ref])
        store.flush()
        store.close()
        disk.cut_before(cut)
        try:
            start(disk, new)
            was_cut = False
        except PowerCut:
            pass
        store = start(disk.crash(), None)
        totals.add(store.stats().total)
        assert [ref for ref in REFS if store.has(ref)] == REFS[:8]
        for ref in REFS[:8]:
            assert store.get(ref) == CONTENT[ref]
        store.close()
        cut += 1
    assert totals == {old, new}
    assert cut > 4


def test_runs_are_deterministic() -> None:
    """One seed, one course of events: else no failure could be replayed."""

    def trace() -> list[Operation]:
        run = Run(3, MFileStore)
        run.start()
        operations: list[Operation] = []
        interleave = run.disk.on_operation
        assert interleave is not None

        def note(operation: Operation) -> None:
            operations.append(operation)
            interleave(operation)

        run.disk.on_operation = note
        run.work(120)
        return operations

    first = trace()
    assert len(first) > 50
    assert trace() == first


# Mutants: each breaks one rule, and must be found.


class IndexBeforeDataBatch(MFileBatch):
    """Names blocks before they are durable."""

    def _work(self) -> None:
        self.write_index()
        self.sync_index()
        self.sync_data()


class NoDataSyncBatch(MFileBatch):
    """Relies on the kernel to write the blocks some time."""

    def sync_data(self) -> None:
        """Nothing."""


class NoIndexSyncBatch(MFileBatch):
    """Relies on the kernel to write the entries some time."""

    def sync_index(self) -> None:
        """Nothing."""


class IndexBeforeData(MFileStore):
    """See IndexBeforeDataBatch."""

    batch_class = IndexBeforeDataBatch


class NoDataSync(MFileStore):
    """See NoDataSyncBatch."""

    batch_class = NoDataSyncBatch


class NoIndexSync(MFileStore):
    """See NoIndexSyncBatch."""

    batch_class = NoIndexSyncBatch


class EarlyReuse(MFileStore):
    """Uses a slot again while the index on the disk still names it."""

    def _drop(self, slot: int, state: int) -> None:
        super()._drop(slot, state)
        if self._table.state(slot) == states.LIMBO:
            self._release(slot)


class ForgetsToZero(MFileStore):
    """Takes a block whose flush failed for one that was never entered."""

    def _drop(self, slot: int, state: int) -> None:
        self._touched.clear()
        super()._drop(slot, state)


class IgnoresPins(MFileStore):
    """Uses a slot again while somebody reads it."""

    def _release(self, slot: int) -> None:
        self._table.set_state(slot, states.FREE)


class GoesOnAfterFailedSync(MFileStore):
    """Believes the sync that succeeds after one that failed."""

    def fail_flush(self, batch: FlushBatch) -> None:
        """Forget that it failed."""
        super().fail_flush(batch)
        self._failure = None
        self._lost.clear()


class TrustsTheCache(MFileStore):
    """Takes an index that was left unclean as durable."""

    @classmethod
    def open(cls, *args: object, **kwargs: object) -> Self:  # type: ignore[override]
        """Open without writing the index again."""
        load = mfile_open._load

        def load_as_clean(opened: mfile_open.Opened) -> None:
            header = opened.header
            opened.header = dataclasses.replace(header, clean=True)
            load(opened)
            opened.header = header

        with mock.patch.object(mfile_open, "_load", load_as_clean):
            return super().open(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("mutant", [IndexBeforeData, NoDataSync, NoIndexSync, EarlyReuse])
def test_cuts_find_mutant(mutant: type[MFileStore]) -> None:
    """A store that breaks a rule of ordering is found out by the cuts."""
    with pytest.raises(Violated):
        for seed in range(6):
            cut = 0
            while run_with_cut(seed, cut, mutant):
                cut += 1


@pytest.mark.parametrize(
    "mutant", [EarlyReuse, ForgetsToZero, IgnoresPins, GoesOnAfterFailedSync, TrustsTheCache]
)
def test_faults_find_mutant(mutant: type[MFileStore]) -> None:
    """A store that mishandles errors, readers or restarts is found out."""
    with pytest.raises(Violated):
        for seed in range(300):
            run_with_faults(seed, mutant)


def test_failed_store_refuses_changes() -> None:
    """After a failed sync every change is refused until the store is opened anew."""
    run = Run(0, MFileStore, faults=True)
    run.start()
    store = run.open_store()
    store.put(REFS[0], CONTENT[REFS[0]])
    run.disk.inject("sync", path=mfile_open.DATA_PATH)
    with pytest.raises(OSError):
        store.flush()
    assert store.get(REFS[0]) == CONTENT[REFS[0]]
    for change in (
        store.flush,
        lambda: store.put(REFS[1], b"x"),
        lambda: store.delete([REFS[0]]),
    ):
        with pytest.raises(Closed, match=r"failed .*open it again"):
            change()
    store.close()
    run.lose_process()
    run.changed(REFS[0], True)
    run.start()
    assert run.open_store().failure is None
