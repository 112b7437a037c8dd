"""One suite for every kind of block store."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from torus_actors.errors import (
    BlockNotExist,
    Closed,
    Corruption,
    Exists,
    Invalid,
    OutOfSpace,
    Overloaded,
)
from torus_actors.model.checksums import root_of, sums_of, verify_range
from torus_actors.model.refs import ZERO_BLOCK, BlockRef
from torus_actors.storage import BLOCK_STORES, BlockStore
from torus_actors.storage.disk import Disk, RealDisk
from torus_actors.storage.simdisk import SimDisk
from torus_actors.storage.store import Level, Ticket

BLOCK_SIZE = 16384
SIZE_BYTES = 1 << 20


def ref(index: int) -> BlockRef:
    """A ref per number."""
    return BlockRef.of(1, 2, index)


def block(index: int, length: int = BLOCK_SIZE) -> bytes:
    """The bytes of a block per number."""
    return random.Random(index).randbytes(length)


@pytest.fixture(params=["mfile on a simulated disk", "mfile on a real disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlockStore:
    """A new store of each kind, with room for about fifty blocks."""
    disk: Disk = SimDisk(random.Random(1))
    if "real" in request.param:
        disk = RealDisk(tmp_path)
    return BLOCK_STORES[request.param.split()[0]].open(
        disk, block_size=BLOCK_SIZE, size_bytes=SIZE_BYTES, rng=random.Random(2)
    )


def reserve(store: BlockStore, index: int, data: bytes) -> Ticket:
    """Begin a put that must be new."""
    ticket = store.reserve(ref(index), root_of(sums_of(data)))
    assert ticket is not None
    return ticket


def fill(store: BlockStore) -> int:
    """Put blocks until one more does not fit; their number."""
    count = store.stats().total
    for index in range(1, count + 1):
        store.put(ref(index), block(index, 100))
    return count


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 9000, BLOCK_SIZE])
def test_blocks_come_back(store: BlockStore, length: int) -> None:
    """A block of any length comes back whole, with its root and list."""
    data = block(1, length)
    assert store.put(ref(1), data)
    assert store.has(ref(1))
    assert store.get(ref(1)) == data
    assert store.root_of(ref(1)) == root_of(sums_of(data))
    store.verify(ref(1))
    location = store.locate(ref(1))
    assert location.length == length
    sums, view = store.read(location, 0, length, True)
    assert sums == sums_of(data)
    assert bytes(view) == data


def test_every_page_range(store: BlockStore) -> None:
    """Each range of whole pages is read and verified without the rest of the block."""
    data = block(1, 3 * 4096 + 1000)
    store.put(ref(1), data)
    location = store.locate(ref(1))
    for first in range(4):
        for last in range(first, 4):
            offset, end = first * 4096, min(len(data), (last + 1) * 4096)
            for want_sums in (True, False):
                got = store.read_nowait(location, offset, end - offset, want_sums)
                if got is None:
                    got = store.read(location, offset, end - offset, want_sums)
                sums, view = got
                assert bytes(view) == data[offset:end]
                if want_sums:
                    verify_range(sums, location.root, offset, view)
                else:
                    assert sums == b""


def test_bad_ranges(store: BlockStore) -> None:
    """Ranges that whole pages cannot verify are refused."""
    store.put(ref(1), block(1, 10000))
    location = store.locate(ref(1))
    for offset, length in ((0, 0), (0, 100), (100, 3996), (0, 10001), (12288, 1), (-4096, 4096)):
        with pytest.raises(Invalid):
            store.read(location, offset, length, False)
        with pytest.raises(Invalid):
            store.read_nowait(location, offset, length, False)


def test_reads_fill_the_callers_buffers() -> None:
    """Every kind takes its buffers from the injected allocator."""
    for kind in BLOCK_STORES.values():
        given: list[memoryview] = []

        def allocate(size: int, given: list[memoryview] = given) -> memoryview:
            given.append(memoryview(bytearray(size)))
            return given[-1]

        store = kind.open(
            SimDisk(random.Random(1)),
            block_size=BLOCK_SIZE,
            size_bytes=SIZE_BYTES,
            rng=random.Random(2),
            allocate=allocate,
        )
        store.put(ref(1), block(1))
        _, view = store.read(store.locate(ref(1)), 4096, 8192, True)
        assert [len(buffer) for buffer in given] == [8192]
        assert view is given[0]


def test_unknown_block(store: BlockStore) -> None:
    """A block that was never put is not there, in every way of asking."""
    assert not store.has(ref(1))
    assert store.delete([ref(1)]) == 0
    assert not store.mark_corrupt(ref(1))
    for ask in (store.get, store.locate, store.root_of, store.verify):
        with pytest.raises(BlockNotExist):
            ask(ref(1))


def test_second_put_does_nothing(store: BlockStore) -> None:
    """A put of a stored block is a no-op; one with other content is refused."""
    data = block(1)
    assert store.put(ref(1), data)
    before = store.stats()
    assert not store.put(ref(1), data)
    with pytest.raises(Exists):
        store.put(ref(1), block(2))
    assert store.stats() == before
    assert store.get(ref(1)) == data


def test_two_puts_of_one_block_at_once(store: BlockStore) -> None:
    """Of two puts under way the first to commit stays, and the other's slot is free again."""
    data = block(1)
    sums = sums_of(data)
    first, second = reserve(store, 1, data), reserve(store, 1, data)
    other = reserve(store, 1, block(2))
    assert first.slot != second.slot
    for ticket in (second, first):
        store.write(ticket, sums, data)
    store.write(other, sums_of(block(2)), block(2))
    assert store.commit(second)
    assert not store.commit(first)
    with pytest.raises(Exists):
        store.commit(other)
    assert store.get(ref(1)) == data
    stats = store.stats()
    assert (stats.used, stats.reserved, stats.free) == (1, 0, stats.total - 1)


def test_uncommitted_put_is_invisible(store: BlockStore) -> None:
    """Until commit a block is not there; given up, it leaves nothing behind."""
    before = store.stats()
    data = block(1)
    ticket = reserve(store, 1, data)
    assert store.stats().reserved == 1
    store.write(ticket, sums_of(data), data)
    assert not store.has(ref(1))
    assert store.refs_from(0, 10) == ([], None)
    store.abandon(ticket)
    assert not store.has(ref(1))
    assert store.stats() == before
    for late in (store.commit, store.abandon):
        with pytest.raises(Invalid):
            late(ticket)


def test_unwritten_put_cannot_be_committed(store: BlockStore) -> None:
    """A commit without a write is refused, and its slot is free again."""
    with pytest.raises(Invalid, match="not written"):
        store.commit(reserve(store, 1, block(1)))
    assert not store.has(ref(1))
    assert store.stats().reserved == 0


def test_bad_puts_are_refused(store: BlockStore) -> None:
    """What could only be found bad later is not taken: lengths, list, root, data, zero ref."""
    data = block(1)
    sums = sums_of(data)
    ticket = reserve(store, 1, data)
    for bad_sums, bad_data, error in (
        (b"", b"", Invalid),
        (sums_of(bytes(BLOCK_SIZE + 1)), bytes(BLOCK_SIZE + 1), Invalid),
        (sums[:-4], data, Invalid),
        (sums, data[:-1] + b"?", Corruption),
        (sums[:-1] + b"?", data, Corruption),
        (sums_of(block(2)), block(2), Corruption),
    ):
        with pytest.raises(error):
            store.write(ticket, bad_sums, bad_data)
    store.write(ticket, sums, data)
    assert store.commit(ticket)
    with pytest.raises(Invalid):
        store.put(ZERO_BLOCK, data)


@pytest.mark.parametrize("ending", ["commit", "abandon"])
def test_a_put_that_has_ended_is_not_written(store: BlockStore, ending: str) -> None:
    """A writer that was killed before its turn has no slot any more when the turn comes."""
    data = block(1)
    ticket = reserve(store, 1, data)
    store.write(ticket, sums_of(data), data)
    getattr(store, ending)(ticket)
    with pytest.raises(Invalid, match="has ended"):
        store.write(ticket, sums_of(data), data)


def test_delete(store: BlockStore) -> None:
    """A deleted block is gone at once, may be put again, and its slot comes back with a flush."""
    for index in (1, 2, 3):
        store.put(ref(index), block(index))
    store.flush()
    assert store.delete([ref(1), ref(9), ref(3)]) == 2
    assert [store.has(ref(index)) for index in (1, 2, 3)] == [False, True, False]
    assert store.put(ref(1), block(1))
    store.flush()
    assert store.get(ref(1)) == block(1)
    stats = store.stats()
    assert (stats.used, stats.limbo, stats.free, stats.pending) == (2, 0, stats.total - 2, 0)


def test_location_of_a_deleted_block_is_refused(store: BlockStore) -> None:
    """An old location never gives the bytes of the block that has the slot now."""
    store.put(ref(1), block(1))
    old = store.locate(ref(1))
    store.delete([ref(1)])
    store.flush()
    store.put(ref(2), block(2))
    assert store.locate(ref(2)).slot == old.slot
    with pytest.raises(BlockNotExist):
        store.read_nowait(old, 0, 4096, False)
    with pytest.raises(BlockNotExist):
        store.pin(old)
    assert not store.mark_corrupt(ref(2), old)
    assert store.get(ref(2)) == block(2)


def test_pinned_block_outlives_its_deletion(store: BlockStore) -> None:
    """A read under way gets its own bytes, whatever is deleted, flushed and put meanwhile."""
    store.put(ref(1), block(1))
    store.flush()
    location = store.locate(ref(1))
    store.pin(location)
    store.pin(location)
    store.delete([ref(1)])
    store.flush()
    store.put(ref(2), block(2))
    assert bytes(store.read(location, 0, BLOCK_SIZE, False)[1]) == block(1)
    store.unpin(location)
    store.put(ref(3), block(3))
    assert bytes(store.check(location)) == block(1)
    store.unpin(location)
    stats = store.stats()
    assert (stats.used, stats.limbo, stats.free) == (2, 0, stats.total - 2)


def test_pinned_unflushed_block_outlives_its_deletion(store: BlockStore) -> None:
    """The same for a block that no flush has seen."""
    store.put(ref(1), block(1))
    location = store.locate(ref(1))
    store.pin(location)
    store.delete([ref(1)])
    store.put(ref(2), block(2))
    assert bytes(store.check(location)) == block(1)
    store.unpin(location)
    assert store.stats().free == store.stats().total - 1


def test_flush_phases(store: BlockStore) -> None:
    """A flush of nothing is known to be empty; flushes do not overlap."""
    assert store.begin_flush().empty is True
    with pytest.raises(Overloaded):
        store.begin_flush()


def test_flush_carries_what_was_pending(store: BlockStore) -> None:
    """A flush takes all pending changes; a failed one gives them back."""
    store.put(ref(1), block(1))
    assert store.stats().pending == 1
    batch = store.begin_flush()
    assert not batch.empty
    store.put(ref(2), block(2))
    store.delete([ref(1)])
    batch.write()
    store.fail_flush(batch)
    with pytest.raises(Invalid):
        store.end_flush(batch)
    assert store.stats().pending
    store.flush()
    assert store.stats().pending == 0
    assert not store.has(ref(1))
    assert store.get(ref(2)) == block(2)
    assert store.begin_flush().empty


def test_out_of_space_changes_nothing(store: BlockStore) -> None:
    """A full store refuses before anything changes, and takes blocks again after a deletion."""
    count = fill(store)
    before = store.stats()
    assert before.free == 0
    with pytest.raises(OutOfSpace, match="full"):
        store.put(ref(count + 1), block(1))
    assert store.stats() == before
    assert not store.put(ref(1), block(1, 100))
    store.flush()
    store.delete([ref(5)])
    store.flush()
    assert store.put(ref(count + 1), block(count + 1))
    assert store.get(ref(count + 1)) == block(count + 1)


def test_torus_401_out_of_space_is_announced(store: BlockStore) -> None:
    """Regression, coreos/torus#401: a store warns long before it first refuses a block."""
    total = store.stats().total
    warned_at = None
    levels = []
    for index in range(1, total + 1):
        store.put(ref(index), block(index, 100))
        levels.append(store.level())
        if warned_at is None and store.level() is not Level.OK:
            warned_at = index
    with pytest.raises(OutOfSpace):
        store.put(ref(total + 1), block(1))
    assert warned_at is not None
    assert 0.85 * total < warned_at <= 0.85 * total + 1
    assert set(levels[warned_at - 1 : -1]) == {Level.WARNING}
    assert levels[-1] is Level.FULL
    store.delete([ref(index) for index in range(1, total // 2)])
    store.flush()
    assert store.level() is Level.OK


def test_corrupt_copy_is_replaced(store: BlockStore) -> None:
    """A copy marked bad is gone, its slot set aside, and the block can be put again."""
    store.put(ref(1), block(1))
    store.flush()
    bad = store.locate(ref(1))
    assert store.mark_corrupt(ref(1), bad)
    assert not store.has(ref(1))
    assert store.stats().quarantined == 1
    assert store.put(ref(1), block(1))
    assert store.locate(ref(1)).slot != bad.slot
    # A second reader of the old copy reports late: the new one must stay.
    assert not store.mark_corrupt(ref(1), bad)
    store.flush()
    assert store.get(ref(1)) == block(1)
    assert store.stats().quarantined == 1


def test_a_bad_copy_can_stay_until_the_good_one_is_written(store: BlockStore) -> None:
    """A put may begin beside it; one that comes too late finds the new copy."""
    store.put(ref(1), block(1))
    bad = store.locate(ref(1))
    sums = sums_of(block(1))
    tickets = [store.reserve(ref(1), root_of(sums), bad) for _ in range(2)]
    for ticket in tickets:
        assert ticket is not None and store.has(ref(1))
        store.write(ticket, sums, block(1))
        store.mark_corrupt(ref(1), bad)
        assert store.commit(ticket) is (ticket is tickets[0])
    assert store.reserve(ref(1), root_of(sums), bad) is None
    store.flush()
    assert store.get(ref(1)) == block(1)
    stats = store.stats()
    assert (stats.used, stats.reserved, stats.quarantined) == (1, 0, 1)


def test_listing_in_slot_order(store: BlockStore) -> None:
    """Refs are listed in batches, resumable by slot, each exactly once."""
    for index in range(1, 31):
        store.put(ref(index), block(index, 10))
    store.delete([ref(index) for index in range(3, 31, 3)])
    expected = [ref(index) for index in range(1, 31) if index % 3]
    assert store.refs_from(0, 1000) == (expected, None)
    listed: list[BlockRef] = []
    slot: int | None = 0
    while slot is not None:
        refs, slot = store.refs_from(slot, 7)
        assert len(refs) == 7 or slot is None
        listed += refs
    assert listed == expected
    assert all(isinstance(one, BlockRef) for one in listed)
    assert store.refs_from(10_000, 5) == ([], None)


def test_lowest_slot_first(store: BlockStore) -> None:
    """Free slots are taken from the front, so that files stay dense."""
    for index in range(1, 6):
        store.put(ref(index), block(index, 10))
    store.flush()
    store.delete([ref(4), ref(2)])
    store.flush()
    for index, slot in ((6, 1), (7, 3), (8, 5)):
        store.put(ref(index), block(index, 10))
        assert store.locate(ref(index)).slot == slot


def test_closed_store(store: BlockStore) -> None:
    """A closed store takes no changes, and says that it is closed."""
    store.close()
    for change in (lambda: store.put(ref(1), b"x"), store.flush, lambda: store.delete([])):
        with pytest.raises(Closed, match="closed"):
            change()
    assert store.failure == "closed"


@pytest.mark.parametrize("kind", BLOCK_STORES.values())
def test_bad_configuration(kind: type[BlockStore]) -> None:
    """Sizes that make no store are refused in one plain line."""

    def attempt(block_size: int, size_bytes: int | None) -> None:
        disk = SimDisk(random.Random(1))
        kind.open(disk, block_size=block_size, size_bytes=size_bytes, rng=random.Random(1))

    for block_size, size_bytes, text in (
        (5000, SIZE_BYTES, "block size 5000"),
        (0, SIZE_BYTES, "block size 0"),
        (32 << 20, 1 << 40, "block size 33554432"),
        (BLOCK_SIZE, 30_000, "no room for one block"),
        (BLOCK_SIZE, None, "no size was given"),
    ):
        with pytest.raises(Invalid, match=text):
            attempt(block_size, size_bytes)
