"""What only the store on a disk has: its files, their damage, growth, and errors of the medium."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from pathlib import Path

import pytest

from torus_actors.errors import Closed, Corruption, Invalid, OutOfSpace
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.refs import BlockRef
from torus_actors.storage import mfile, mfile_open
from torus_actors.storage.disk import Disk, RealDisk
from torus_actors.storage.index import (
    DATA_OFFSET,
    ENTRIES_OFFSET,
    ENTRY_SIZE,
    HEADER_COPIES,
    VERSION,
    Layout,
)
from torus_actors.storage.mfile import MFileStore
from torus_actors.storage.mfile_open import DATA_PATH, INDEX_PATH
from torus_actors.storage.simdisk import PowerCut, SimDisk

BLOCK_SIZE = 8192
LAYOUT = Layout(BLOCK_SIZE)


def ref(index: int) -> BlockRef:
    """A ref per number."""
    return BlockRef.of(1, 2, index)


def block(index: int, length: int = BLOCK_SIZE) -> bytes:
    """The bytes of a block per number."""
    return random.Random(index).randbytes(length)


def size_for(slots: int) -> int:
    """The size that gives just so many slots."""
    return 4 * 4096 + slots * (LAYOUT.slot_size + ENTRY_SIZE)


def new_disk(**options: int) -> SimDisk:
    """An empty simulated disk."""
    return SimDisk(random.Random(1), **options)


def start(disk: Disk, slots: int | None = None, block_size: int = BLOCK_SIZE) -> MFileStore:
    """Open or make a store."""
    size_bytes = None if slots is None else size_for(slots)
    return MFileStore.open(disk, block_size=block_size, size_bytes=size_bytes, rng=random.Random(2))


def filled(disk: Disk, slots: int = 20, blocks: int = 10) -> MFileStore:
    """A store with flushed blocks 1 to ``blocks``."""
    store = start(disk, slots)
    for index in range(1, blocks + 1):
        store.put(ref(index), block(index))
    store.flush()
    return store


def test_reopened(tmp_path: Path) -> None:
    """On a real disk, closed in order: all blocks are there, under a higher incarnation."""
    disk = RealDisk(tmp_path)
    store = filled(disk)
    assert store.incarnation == 1
    store.delete([ref(3)])
    store.flush()
    store.close()
    store.close()
    again = start(RealDisk(tmp_path))
    assert again.incarnation == 2
    assert again.damaged_entries == 0
    assert not again.has(ref(3))
    for index in (1, 2, *range(4, 11)):
        assert again.get(ref(index)) == block(index)
    again.put(ref(11), block(11))
    assert again.locate(ref(11)).slot == 2
    again.close()


def test_incarnation_id_tells_from_all_other_openings() -> None:
    """Of the same store, and of any other, which counts its incarnations from 1 as well."""
    found = []
    for seed in range(3):
        disk = new_disk()
        for incarnation in (1, 2, 3):
            store = MFileStore.open(
                disk, block_size=BLOCK_SIZE, size_bytes=size_for(4), rng=random.Random(seed)
            )
            assert store.incarnation == incarnation
            found.append(store.incarnation_id)
            disk = disk.crash()
    assert len(set(found)) == len(found)
    assert all(0 <= each < 1 << 63 for each in found)


def test_left_without_closing(tmp_path: Path) -> None:
    """On a real disk, not closed: flushed blocks are there, unflushed ones are not."""
    store = filled(RealDisk(tmp_path))
    store.put(ref(11), block(11))
    again = start(RealDisk(tmp_path))
    assert [again.has(ref(index)) for index in (1, 10, 11)] == [True, True, False]
    again.close()


def test_size_is_kept_within(tmp_path: Path) -> None:
    """Both files together take no more room than was given, and nearly all of it."""
    given = 10 << 20
    store = MFileStore.open(
        RealDisk(tmp_path), block_size=BLOCK_SIZE, size_bytes=given, rng=random.Random(1)
    )
    taken = sum((tmp_path / path).stat().st_size for path in (DATA_PATH, INDEX_PATH))
    assert given - 2 * LAYOUT.slot_size < taken <= given
    assert store.stats().total == LAYOUT.slots_in(given)
    # The room is reserved, not only promised.
    assert (tmp_path / DATA_PATH).stat().st_blocks * 512 >= LAYOUT.data_size(store.stats().total)
    store.close()


def test_room_is_checked_first() -> None:
    """A store that does not fit its disk is refused by name of both sizes, and leaves no file."""
    disk = new_disk(capacity_bytes=1 << 20)
    with pytest.raises(OutOfSpace, match="needs 11 MiB more, and the disk has 1 MiB free"):
        start(disk, 1000)
    assert disk.listdir() == []


@pytest.mark.parametrize("skip", [0, 1])
def test_disk_fills_while_making(skip: int) -> None:
    """If the room goes while the files are made, none is left, and a later try succeeds."""
    disk = new_disk()
    disk.inject("allocate", errno.ENOSPC, skip=skip)
    with pytest.raises(OutOfSpace):
        start(disk, 20)
    assert disk.listdir() == []
    assert start(disk, 20).stats().total == 20


def test_other_block_size() -> None:
    """A data directory with other blocks is refused, in a line that names both sizes."""
    disk = new_disk()
    filled(disk).close()
    with pytest.raises(Invalid, match="blocks of 8192 bytes, not 4096"):
        start(disk, block_size=4096)


def test_not_an_index() -> None:
    """Foreign or damaged files are refused and not touched."""
    disk = new_disk()
    disk.open(INDEX_PATH, create=True).pwrite(b"my thesis, do not delete", 0)
    with pytest.raises(Corruption, match=r"blocks\.index is not a block index"):
        start(disk, 20)
    assert disk.open(INDEX_PATH).pread(9, 0) == b"my thesis"


def test_one_header_may_rot() -> None:
    """The header is there twice: any one copy may be lost."""
    for copy in (0, 4096):
        disk = new_disk()
        filled(disk).close()
        disk.rot(INDEX_PATH, copy + 20)
        store = start(disk)
        assert store.get(ref(1)) == block(1)
        store.close()
    disk.rot(INDEX_PATH, 20)
    disk.rot(INDEX_PATH, 4096 + 20)
    with pytest.raises(Corruption, match="header is damaged"):
        start(disk)


def test_newer_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of another format version is refused by number."""
    disk = new_disk()
    with monkeypatch.context() as patch:
        patch.setattr("torus_actors.storage.index.VERSION", VERSION + 1)
        filled(disk).close()
    with pytest.raises(Corruption, match=f"format {VERSION + 1}; this program reads {VERSION}"):
        start(disk)


def test_lost_files() -> None:
    """One file without the other is never taken for an empty store."""
    disk = new_disk()
    filled(disk).close()
    disk.rename(INDEX_PATH, "elsewhere")
    with pytest.raises(Corruption, match=r"blocks\.index is missing"):
        start(disk, 20)
    disk.rename("elsewhere", INDEX_PATH)
    disk.rename(DATA_PATH, "elsewhere")
    with pytest.raises(Corruption, match=r"blocks\.data is missing"):
        start(disk, 20)
    disk.rename("elsewhere", DATA_PATH)
    assert start(disk).get(ref(5)) == block(5)


def test_files_of_two_stores() -> None:
    """A data file is tied to its own index."""
    disk = new_disk()
    filled(disk).close()
    disk.rename(INDEX_PATH, "index of the first")
    disk.unlink(DATA_PATH)
    MFileStore.open(
        disk, block_size=BLOCK_SIZE, size_bytes=size_for(20), rng=random.Random(99)
    ).close()
    disk.rename("index of the first", INDEX_PATH)
    with pytest.raises(Corruption, match="does not belong to"):
        start(disk)


@pytest.mark.parametrize("path", [DATA_PATH, INDEX_PATH])
def test_file_cut_short(path: str) -> None:
    """A file that somebody cut is refused by name."""
    disk = new_disk()
    filled(disk).close()
    file = disk.open(path)
    file.truncate(file.size() - 4096)
    with pytest.raises(Corruption, match=f"{path} is cut short"):
        start(disk)


def test_rotten_entry_is_absent() -> None:
    """A damaged index entry costs its own block, is counted once, and its slot is used again."""
    disk = new_disk()
    filled(disk).close()
    disk.rot(INDEX_PATH, ENTRIES_OFFSET + 4 * ENTRY_SIZE + 30)
    store = start(disk)
    assert store.damaged_entries == 1
    assert not store.has(ref(5))
    assert store.stats().used == 9
    store.put(ref(11), block(11))
    assert store.locate(ref(11)).slot == 4
    store.close()
    assert start(disk).damaged_entries == 0


def test_entry_in_another_place_is_absent() -> None:
    """A valid entry copied to another slot, or from another store, is not believed."""
    disk = new_disk()
    filled(disk).close()
    index = disk.open(INDEX_PATH)
    entry = index.pread(ENTRY_SIZE, ENTRIES_OFFSET)
    index.pwrite(entry, ENTRIES_OFFSET + 15 * ENTRY_SIZE)
    store = start(disk)
    assert store.damaged_entries == 1
    assert store.stats().used == 10
    store.close()
    other = new_disk()
    other_store = MFileStore.open(
        other, block_size=BLOCK_SIZE, size_bytes=size_for(20), rng=random.Random(99)
    )
    other_store.close()
    other.open(INDEX_PATH).pwrite(entry, ENTRIES_OFFSET)
    assert start(other).damaged_entries == 1


def test_newer_of_two_copies_counts() -> None:
    """After a power cut between replacing a copy and zeroing the old one, the new one is used."""
    disk = new_disk()
    store = filled(disk, blocks=3)
    old_entry = disk.open(INDEX_PATH).pread(ENTRY_SIZE, ENTRIES_OFFSET)
    assert store.mark_corrupt(ref(1))
    store.put(ref(1), block(1))
    store.flush()
    store.close()
    disk.open(INDEX_PATH).pwrite(old_entry, ENTRIES_OFFSET)
    disk.rot(DATA_PATH, LAYOUT.slot_offset(0) + LAYOUT.sums_room)
    for _ in range(2):
        store = start(disk)
        assert store.stats().used == 3
        assert store.locate(ref(1)).slot == 3
        assert store.get(ref(1)) == block(1)
        store.close()
    assert disk.open(INDEX_PATH).pread(ENTRY_SIZE, ENTRIES_OFFSET) == bytes(ENTRY_SIZE)


def test_growing() -> None:
    """A larger size appends slots; blocks, and the room asked for, are as they should be."""
    disk = new_disk()
    filled(disk, slots=10).close()
    store = start(disk, 200)
    assert (store.stats().total, store.stats().free) == (200, 190)
    for index in range(11, 201):
        store.put(ref(index), block(index, 10))
    store.flush()
    store.close()
    store = start(disk)
    assert store.stats().used == 200
    assert store.get(ref(3)) == block(3)
    assert store.get(ref(200)) == block(200, 10)


@pytest.mark.parametrize("copy", range(HEADER_COPIES))
@pytest.mark.parametrize("closed", [False, True])
def test_either_header_tells_of_growth(copy: int, closed: bool) -> None:
    """A store that grew keeps the blocks beyond its old end, whichever header rots afterwards."""
    disk = new_disk()
    start(disk, 4).close()
    store = filled(disk, slots=20, blocks=10)
    if closed:
        store.close()
    disk = disk.crash()
    disk.rot(INDEX_PATH, copy * 4096 + 20)
    again = start(disk)
    assert (again.stats().total, again.damaged_entries) == (20, 0)
    for index in range(1, 11):
        assert again.get(ref(index)) == block(index)


@pytest.mark.parametrize("copy", range(HEADER_COPIES))
def test_no_incarnation_comes_twice(copy: int) -> None:
    """Whichever header rots: what one opening took and lost, no flush of the next confirms."""
    disk = new_disk()
    filled(disk).close()
    store = start(disk)
    store.put(ref(11), block(11))
    disk = disk.crash()
    disk.rot(INDEX_PATH, copy * 4096 + 20)
    again = start(disk)
    assert not again.has(ref(11))
    assert again.incarnation > store.incarnation


@pytest.mark.parametrize("skip", [None, 0, 1])
def test_growing_without_room(skip: int | None) -> None:
    """Growth that does not fit is refused; the store opens at its old size as before."""
    disk = new_disk(capacity_bytes=size_for(20) if skip is None else 1 << 30)
    filled(disk, slots=10).close()
    if skip is not None:
        disk.inject("allocate", errno.ENOSPC, skip=skip)
    with pytest.raises(OutOfSpace):
        start(disk, 200)
    store = start(disk)
    assert store.stats().total == 10
    assert store.get(ref(10)) == block(10)
    assert disk.open(DATA_PATH).size() == LAYOUT.data_size(10)


def test_growing_beyond_all_disks() -> None:
    """The room is looked at before memory is taken for so many slots."""
    disk = new_disk()
    block_size = 512 << 10
    start(disk, 100, block_size).close()
    with pytest.raises(OutOfSpace, match="choose a smaller size"):
        MFileStore.open(disk, block_size=block_size, size_bytes=1 << 50, rng=random.Random(1))
    assert start(disk, None, block_size).stats().used == 0


def test_shrinking() -> None:
    """A smaller size is refused while a block lies beyond it, and taken when none does."""
    disk = new_disk()
    store = filled(disk, slots=300, blocks=10)
    store.close()
    with pytest.raises(Invalid, match="cannot shrink to 9 blocks: block 10 of 300 is in use"):
        start(disk, 9)
    store = start(disk, 10)
    assert store.stats().total == 10
    assert store.get(ref(10)) == block(10)
    store.close()
    assert disk.open(DATA_PATH).size() == LAYOUT.data_size(10)
    assert disk.open(INDEX_PATH).size() == LAYOUT.index_size(10)
    store = start(disk, 300)
    assert (store.stats().total, store.stats().used) == (300, 10)


def test_entries_that_rotted_are_told_where_the_store_shrinks() -> None:
    """It is opened twice for that, and the first time puts them right."""
    disk = new_disk()
    filled(disk, slots=300, blocks=10).close()
    disk.rot(INDEX_PATH, ENTRIES_OFFSET + 4 * ENTRY_SIZE + 30)
    store = start(disk, 100)
    assert (store.stats().total, store.stats().used, store.damaged_entries) == (100, 9, 1)


@pytest.mark.parametrize(("old", "new"), [(10, 200), (200, 10)])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("ending", ["kill", "crash"])
def test_a_resize_that_was_cut_off_keeps_no_room(
    old: int, new: int, again: bool, ending: str
) -> None:
    """The next opening goes on with it if told to, else gives back what its size has not."""
    step, cut = 0, True
    while cut:
        disk = new_disk(capacity_bytes=size_for(200))
        filled(disk, slots=old).close()
        disk.cut_before(step)
        try:
            start(disk, new)
            cut = False
        except PowerCut:
            pass
        disk = disk.kill() if ending == "kill" else disk.crash()
        slots = start(disk, new if again else None).stats().total
        assert slots == new or (slots == old and not again)
        assert disk.open(DATA_PATH).size() == LAYOUT.data_size(slots)
        assert disk.open(INDEX_PATH).size() == LAYOUT.index_size(slots)
        step += 1
    assert step > 5


def test_read_misses_the_cache() -> None:
    """What is not in memory is left to a worker, which gets it."""
    disk = new_disk(miss_percent=100)
    store = filled(disk)
    location = store.locate(ref(1))
    assert store.read_nowait(location, 0, BLOCK_SIZE, True) is None
    store.pin(location)
    assert bytes(store.read(location, 0, BLOCK_SIZE, True)[1]) == block(1)
    store.unpin(location)


def test_bit_rot_is_found() -> None:
    """Rot anywhere in the list or the data of a block is found by verifying it."""
    disk = new_disk()
    store = filled(disk)
    start_of_block = LAYOUT.slot_offset(store.locate(ref(1)).slot)
    disk.rot(DATA_PATH, start_of_block + 5)
    with pytest.raises(Corruption, match="list does not match"):
        store.verify(ref(1))
    disk.rot(DATA_PATH, LAYOUT.slot_offset(1) + LAYOUT.sums_room + 5000)
    with pytest.raises(Corruption, match="data does not match"):
        store.get(ref(2))
    store.verify(ref(3))
    assert store.mark_corrupt(ref(1))
    assert store.put(ref(1), block(1))
    store.verify(ref(1))
    store.flush()
    assert start(disk.crash()).get(ref(1)) == block(1)


def test_a_copy_is_replaced_whole_wherever_the_power_goes() -> None:
    """The old one, or what is right of it, is in the index until the new one is.

    Found by review: the power could go when the old entry was zeroed and the new one not written.
    """
    for cut in range(8):
        for seed in range(12):
            disk = SimDisk(random.Random(seed))
            store = filled(disk)
            sums = sums_of(block(1))
            bad = store.locate(ref(1))
            ticket = store.reserve(ref(1), root_of(sums), bad)
            assert ticket is not None
            store.write(ticket, sums, block(1))
            store.mark_corrupt(ref(1), bad)
            store.commit(ticket)
            store.delete([ref(2)])
            disk.cut_before(cut)
            with contextlib.suppress(PowerCut):
                store.flush()
                assert store.stats().pending == 0
            store = start(disk.crash())
            assert store.get(ref(1)) == block(1)
            assert store.stats().used == (9 if not store.has(ref(2)) else 10)


def test_a_copy_that_was_replaced_is_not_back_after_a_flush() -> None:
    """Its entry is zeroed by the flush that enters the new one, or by the next if that failed."""
    for failing in (None, 0, 1, 2):
        disk = new_disk()
        store = filled(disk)
        bad = store.locate(ref(1))
        store.mark_corrupt(ref(1), bad)
        assert store.put(ref(1), block(1))
        if failing is not None:
            disk.inject("write", path=INDEX_PATH, skip=failing)
            with contextlib.suppress(OSError):
                store.flush()
            disk.heal()
        store.flush()
        entry = disk.durable(INDEX_PATH, ENTRIES_OFFSET + bad.slot * ENTRY_SIZE, ENTRY_SIZE)
        assert entry == bytes(ENTRY_SIZE)
        store = start(disk.crash())
        assert store.locate(ref(1)).slot != bad.slot
        assert store.get(ref(1)) == block(1)


@pytest.mark.parametrize("at", [5, LAYOUT.sums_room + 5000])
def test_rot_under_the_page_cache_is_found(at: int) -> None:
    """Reads may go on to find what the cache has; who verifies a copy asks what the disk has.

    Found by review: a page that is read often never left the cache, and the rot of its disk was
    found only after the next start, when the other copies may have gone.
    """
    disk = new_disk()
    store = filled(disk)
    location = store.locate(ref(1))
    disk.rot(DATA_PATH, LAYOUT.slot_offset(location.slot) + at, cached=True)
    assert bytes(store.read(location, 0, BLOCK_SIZE, True)[1]) == block(1)
    with pytest.raises(Corruption):
        store.verify(ref(1))


def test_what_is_not_synced_can_be_verified() -> None:
    """It is on its way to the disk, and no less right for that."""
    disk = new_disk()
    store = filled(disk)
    assert store.put(ref(15), block(15))
    store.verify(ref(15))
    store.flush()
    store.verify(ref(15))


def test_a_checksum_list_read_wrong_is_not_kept() -> None:
    """A cable or a controller spoils one read: the next one is right again, without a repair.

    Whether the list came with a read of the owner, or of a worker.
    """
    disk = new_disk()
    store = filled(disk)
    location = store.locate(ref(1))
    for by_worker in (False, True):
        disk.rot(DATA_PATH, LAYOUT.slot_offset(location.slot), 4)
        found = store.read_nowait(location, 4096, 4096, True)
        assert found is not None and found[0] != sums_of(block(1))
        if by_worker:
            store.keep_sums(location, found[0])
        disk.rot(DATA_PATH, LAYOUT.slot_offset(location.slot), 4)
        found = store.read_nowait(location, 4096, 4096, True)
        assert found is not None and found[0] == sums_of(block(1))
        store = start(disk)


def test_a_kept_checksum_list_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is taken in: reads that find it there cost no checksum."""
    disk = new_disk()
    store = filled(disk)
    location = store.locate(ref(1))
    verified: list[bytes] = []

    def root_of_noted(sums: bytes) -> int:
        verified.append(sums)
        return root_of(sums)

    monkeypatch.setattr(mfile, "root_of", root_of_noted)
    for offset in (0, 4096, 0, 4096):
        assert store.read_nowait(location, offset, 4096, True) is not None
    assert verified == [sums_of(block(1))]


def test_read_error_is_corruption() -> None:
    """Bytes that the medium cannot give are a bad copy: read another replica, and repair."""
    disk = new_disk()
    store = filled(disk)
    disk.inject("read", times=2)
    with pytest.raises(Corruption, match=r"slot 0 cannot be read: .*Input/output error"):
        store.get(ref(1))
    with pytest.raises(Corruption):
        store.read_nowait(store.locate(ref(1)), 0, 4096, False)
    assert store.get(ref(1)) == block(1)
    disk.open(DATA_PATH).truncate(DATA_OFFSET)
    with pytest.raises(Corruption, match="ends before"):
        store.get(ref(1))


def test_write_error_sets_the_slot_aside() -> None:
    """A slot that cannot be written to is not tried again; the block goes to another."""
    disk = new_disk()
    store = start(disk, 5)
    disk.inject("write", path=DATA_PATH)
    with pytest.raises(OSError, match="cannot write"):
        store.put(ref(1), block(1))
    stats = store.stats()
    assert (stats.quarantined, stats.used, stats.reserved) == (1, 0, 0)
    store.put(ref(1), block(1))
    assert store.locate(ref(1)).slot == 1
    # A full disk is no fault of the slot.
    disk.inject("write", errno.ENOSPC, path=DATA_PATH)
    with pytest.raises(OutOfSpace):
        store.put(ref(2), block(2))
    assert store.stats().quarantined == 1


def test_index_write_error_is_retried() -> None:
    """A flush that could not write an entry gives the changes back, and the next one succeeds."""
    disk = new_disk()
    store = filled(disk)
    store.put(ref(11), block(11))
    store.delete([ref(1)])
    disk.inject("write", path=INDEX_PATH)
    with pytest.raises(OSError):
        store.flush()
    assert store.failure is None
    assert (store.stats().pending, store.stats().limbo) == (2, 1)
    store.flush()
    assert store.stats().limbo == 0
    after = start(disk.crash())
    assert [after.has(ref(index)) for index in (1, 2, 11)] == [False, True, True]


def test_close_after_a_failed_flush_is_unclean() -> None:
    """A store closed with an unsynced index has it made durable at the next opening."""
    disk = new_disk()
    store = filled(disk)
    store.delete([ref(1), ref(5)])
    disk.inject("write", path=INDEX_PATH, skip=1)
    with pytest.raises(OSError):
        store.flush()
    store.close()
    syncs: list[str] = []
    disk.on_operation = lambda operation: (
        syncs.append(operation.kind) if operation.path == INDEX_PATH else None
    )
    start(disk).close()
    both_headers = ["write", "sync"] * HEADER_COPIES
    assert syncs == ["write", "sync", *both_headers, "write", "sync"]
    syncs.clear()
    start(disk)
    assert syncs == both_headers


def test_neighbouring_entries_are_written_together() -> None:
    """A flush of many blocks costs one index write a run of slots, and two syncs."""
    disk = new_disk()
    store = start(disk, 20)
    kinds: list[tuple[str, str]] = []
    disk.on_operation = lambda operation: kinds.append((operation.kind, operation.path))
    for index in range(1, 11):
        store.put(ref(index), block(index))
    kinds.clear()
    store.flush()
    assert kinds == [("sync", DATA_PATH), ("write", INDEX_PATH), ("sync", INDEX_PATH)]
    kinds.clear()
    store.flush()
    assert kinds == []
    store.delete([ref(2), ref(3), ref(7)])
    store.flush()
    assert kinds == [("write", INDEX_PATH)] * 2 + [("sync", INDEX_PATH)]


def test_workers_and_owner_at_once(tmp_path: Path) -> None:
    """Writes and flushes in threads, with the owner going on meanwhile, mix up no block."""
    store = start(RealDisk(tmp_path), 200)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def put_many(first: int) -> None:
        try:
            for index in range(first, first + 30):
                data = block(index)
                sums = sums_of(data)
                # The lock stands for the owner's thread: it covers memory phases only.
                with lock:
                    ticket = store.reserve(ref(index), root_of(sums))
                assert ticket is not None
                store.write(ticket, sums, data)
                with lock:
                    store.commit(ticket)
                    location = store.locate(ref(index))
                    store.pin(location)
                    if index % 3 == 0:
                        store.delete([ref(index)])
                assert bytes(store.check(location)) == data
                with lock:
                    store.unpin(location)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=put_many, args=(1 + 100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with lock:
            batch = store.begin_flush()
        batch.write()
        with lock:
            store.end_flush(batch)
    for thread in threads:
        thread.join(30)
    assert not failures
    store.flush()
    store.close()
    store = start(RealDisk(tmp_path))
    kept = [100 * n + i for n in range(4) for i in range(1, 31) if (100 * n + i) % 3]
    assert store.stats().used == len(kept)
    for index in kept:
        assert store.get(ref(index)) == block(index)
    store.close()


def test_interrupted_making_is_finished() -> None:
    """Files left by a making that was cut before the store existed are made anew."""
    disk = new_disk()
    disk.open(DATA_PATH, create=True, size=5000)
    disk.open(mfile_open.NEW_INDEX_PATH, create=True).pwrite(b"half", 0)
    store = filled(disk)
    assert store.get(ref(1)) == block(1)
    assert disk.listdir() == [DATA_PATH, INDEX_PATH]


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("kind", ["kill", "sync"])
def test_what_a_first_opening_left_in_memory_only_is_not_lost(kind: str, flushed: bool) -> None:
    """Killed, or given up for a failed sync, anywhere: who opens it next makes it durable."""
    step, cut = 0, True
    while cut:
        for seed in range(10):
            disk = SimDisk(random.Random(seed))
            if kind == "kill":
                disk.cut_before(step)
            else:
                disk.inject("sync", skip=step)
            try:
                start(disk, 4)
                cut = False
            except (PowerCut, OSError):
                pass
            disk = disk.kill()
            disk.heal()
            store = start(disk, 4)
            if flushed:
                store.put(ref(1), block(1))
                store.flush()
            store = start(disk.crash())
            assert not flushed or store.get(ref(1)) == block(1)
        step += 1
    assert step > 5


@pytest.mark.parametrize("failed", [False, True])
def test_a_flush_that_has_ended_is_not_done_late(failed: bool) -> None:
    """A flusher that was killed before its turn touches nothing when the turn comes at last.

    Its successor has done the batch, or the store has taken it back: others stand in its slots.
    """
    disk = new_disk()
    store = start(disk, 4)
    store.put(ref(1), block(1))
    batch = store.begin_flush()
    if failed:
        store.fail_flush(batch)
        store.flush()
    else:
        batch.write()
        store.end_flush(batch)
    store.delete([ref(1)])
    store.flush()
    store.put(ref(2), block(2))
    store.flush()
    before = disk.operations
    with contextlib.suppress(Invalid):
        batch.write()
    assert disk.operations == before
    assert start(disk.crash()).get(ref(2)) == block(2)


def test_a_flush_is_done_once(tmp_path: Path) -> None:
    """Two workers at one batch: the second waits, and finds that all is done."""
    store = start(RealDisk(tmp_path), 20)
    store.put(ref(1), block(1))
    batch = store.begin_flush()
    entered, go_on = threading.Event(), threading.Event()
    syncs: list[str] = []
    sync_data = batch.sync_data

    def sync_slowly() -> None:
        syncs.append("sync")
        entered.set()
        assert go_on.wait(10)
        sync_data()

    batch.sync_data = sync_slowly  # type: ignore[method-assign]
    workers = [threading.Thread(target=batch.write) for _ in range(2)]
    workers[0].start()
    assert entered.wait(10)
    workers[1].start()
    go_on.set()
    for worker in workers:
        worker.join(10)
    assert syncs == ["sync"]
    store.end_flush(batch)
    store.close()


def test_a_late_write_of_a_put_that_has_ended_leaves_direct_io_on(tmp_path: Path) -> None:
    """It has no slot, and its place before the file's beginning is no fault of the file system."""
    size = 64 << 10
    store = MFileStore.open(
        RealDisk(tmp_path), block_size=size, size_bytes=4 << 20, rng=random.Random(1)
    )
    if not store.reads_direct:
        pytest.skip("this file system has no direct I/O")
    data = block(1, size)
    ticket = store.reserve(ref(1), root_of(sums_of(data)))
    assert ticket is not None
    store.write(ticket, sums_of(data), data)
    store.commit(ticket)
    with pytest.raises(Invalid, match="has ended"):
        store.write(ticket, sums_of(data), data)
    location = store.locate(ref(1))
    store.keep_sums(location, sums_of(data))
    assert store.plan_direct(location, 4096, 4096) is not None
    store.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_no_sync_is_tried_after_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Whatever it failed with, and whoever asks again: the kernel would report success.

    A thin volume that is full, or a quota, ends a sync with ENOSPC or EDQUOT. The worker that was
    in the sync may have been killed, and its successor does the same batch again.
    """
    store = start(RealDisk(tmp_path), 20)
    ticket = store.reserve(ref(1), root_of(sums_of(block(1))))
    assert ticket is not None
    store.write(ticket, sums_of(block(1)), block(1))
    store.commit(ticket)
    batch = store.begin_flush()

    def failing(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises((OSError, OutOfSpace)):
            batch.write()
    with pytest.raises((OSError, OutOfSpace)):
        batch.write()
    store.fail_flush(batch)
    assert store.failure is not None
    with pytest.raises(Closed):
        store.begin_flush()


@pytest.mark.parametrize("lower", [False, True])
def test_of_two_copies_the_newer_one_counts(lower: bool) -> None:
    """A bad copy was replaced, and of that flush the zeroed entry of the old one was lost.

    The new one counts, whether its slot comes first or last, and the old entry is gone for good.
    """
    disk = new_disk()
    store = filled(disk, 20, 3)
    if lower:
        store.delete([ref(1)])
        store.flush()
    old = store.locate(ref(2)).slot
    at = ENTRIES_OFFSET + old * ENTRY_SIZE
    index = disk.open(INDEX_PATH)
    entry = index.pread(ENTRY_SIZE, at)
    disk.rot(DATA_PATH, LAYOUT.slot_offset(old) + LAYOUT.sums_room)
    assert store.mark_corrupt(ref(2))
    store.put(ref(2), block(2))
    new = store.locate(ref(2)).slot
    assert (new < old) == lower
    store.flush()
    index.pwrite(entry, at)
    index.fdatasync()
    disk = disk.kill()
    for _ in range(2):
        store = start(disk)
        assert store.locate(ref(2)).slot == new
        assert store.get(ref(2)) == block(2)
        disk = disk.crash()
    assert disk.open(INDEX_PATH).pread(ENTRY_SIZE, at) == bytes(ENTRY_SIZE)


def refusing() -> tuple[SimDisk, MFileStore]:
    """A disk that refuses all writes, and a store that has tried many times."""
    disk = new_disk()
    store = start(disk, 50)
    disk.inject("write", path=DATA_PATH, times=10**9)
    for index in range(200):
        with pytest.raises(OSError, match="cannot write"):
            store.put(ref(index), block(index))
    return disk, store


def test_a_disk_that_refuses_all_writes_is_not_full_when_it_is_well_again() -> None:
    """Some slots are set aside, but not all that were tried."""
    disk, store = refusing()
    stats = store.stats()
    assert (stats.quarantined, stats.reserved) == (mfile.SET_ASIDE_MIN, 0)
    disk.heal()
    for index in range(stats.free):
        store.put(ref(index), block(index))
    store.flush()
    assert store.get(ref(0)) == block(0)


def test_a_slot_that_may_still_be_written_to_is_set_aside_in_any_case() -> None:
    """A worker that was given up is at it yet, or the one before had begun when the last failed."""
    _, store = refusing()
    sums = sums_of(block(30))
    for calls in (0, 2):
        ticket = store.reserve(ref(30), root_of(sums))
        assert ticket is not None
        for _ in range(calls):
            with pytest.raises(OSError, match="cannot write"):
                store.write(ticket, sums, block(30))
        ticket.failed = ticket.begun = True
        before = store.stats().quarantined
        store.abandon(ticket)
        assert store.stats().quarantined == before + 1
