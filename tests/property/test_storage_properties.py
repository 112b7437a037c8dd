"""Properties of the disk model, the slot table and the index, on generated input."""

from __future__ import annotations

import random
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.model.refs import BlockRef
from torus_actors.storage.disk import Disk, File, RealDisk
from torus_actors.storage.index import Header, Layout, pack_entry, parse_entries, parse_header
from torus_actors.storage.simdisk import SimDisk
from torus_actors.storage.slots import FREE, LIMBO, RESERVED, STORED, SlotTable

OFFSETS = st.integers(0, 20_000)
ACTIONS = st.one_of(
    st.tuples(st.just("write"), OFFSETS, st.binary(max_size=9000)),
    st.tuples(st.just("truncate"), OFFSETS, st.just(b"")),
    st.tuples(st.just("allocate"), OFFSETS, st.just(b"")),
    st.tuples(st.just("sync"), st.just(0), st.just(b"")),
)


def act(file: File, kind: str, number: int, data: bytes) -> None:
    """One generated action."""
    if kind == "write":
        file.pwritev([data[:100], data[100:]], number)
    elif kind == "truncate":
        file.truncate(number)
    elif kind == "allocate":
        file.allocate(number)
    else:
        file.fdatasync()


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=12))
def test_simulated_disk_reads_like_a_real_one(actions: list[tuple[str, int, bytes]]) -> None:
    """After the same calls both disks show the same bytes; after a sync, also after a crash."""
    with tempfile.TemporaryDirectory() as root:
        sim = SimDisk(random.Random(1))
        disks: list[Disk] = [RealDisk(root), sim]
        real, simulated = (disk.open("f", create=True) for disk in disks)
        for action in actions:
            act(real, *action)
            act(simulated, *action)
            assert real.size() == simulated.size()
            assert real.pread(40_000, 0) == simulated.pread(40_000, 0)
        simulated.fdatasync()
        sim.fsync_dir()
        assert sim.crash().open("f").pread(40_000, 0) == real.pread(40_000, 0)
        real.close()


WRITES = st.lists(st.tuples(OFFSETS, st.binary(min_size=1, max_size=9000)), max_size=5)


@settings(deadline=None)
@given(WRITES, WRITES, st.integers(0, 1000))
def test_crash_shows_old_or_new_sectors(
    synced: list[tuple[int, bytes]], unsynced: list[tuple[int, bytes]], seed: int
) -> None:
    """Each sector of the crashed file is one that the file showed at the sync or later."""
    disk = SimDisk(random.Random(seed))
    file = disk.open("f", create=True, size=32_768)
    for offset, data in synced:
        file.pwrite(data, offset)
    file.fdatasync()
    disk.fsync_dir()
    shown = [file.pread(32_768, 0)]
    for offset, data in unsynced:
        file.pwrite(data, offset)
        shown.append(file.pread(32_768, 0))
    crashed = disk.crash().open("f").pread(32_768, 0)
    assert len(crashed) == 32_768
    for at in range(0, len(crashed), 512):
        assert crashed[at : at + 512] in {image[at : at + 512] for image in shown}


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=200), st.integers(1, 30))
def test_slot_table_is_a_dict(actions: list[tuple[int, bool]], slots: int) -> None:
    """The compact table answers as a dict does, through any inserts and removals."""
    table = SlotTable(slots)
    model: dict[bytes, int] = {}
    for number, insert in actions:
        ref = BlockRef.of(1, number % 3, number)
        if not insert:
            slot = model.pop(ref, None)
            assert table.find(ref) == (-1 if slot is None else slot)
            if slot is not None:
                table.remove(slot, FREE)
        elif ref not in model:
            slot = table.lowest_free()
            free = [at for at in range(slots) if at not in model.values()]
            assert slot == (free[0] if free else -1)
            if free:
                table.insert(slot, ref, number, number + 1, number + 2)
                model[ref] = slot
    for number in range(1, 41):
        ref = BlockRef.of(1, number % 3, number)
        slot = table.find(ref)
        assert slot == model.get(ref, -1)
        if slot >= 0:
            assert (table.roots[slot], table.lengths[slot]) == (number, number + 1)
            assert table.generations[slot] == number + 2
    assert list(table.stored_from(0)) == sorted((slot, ref) for ref, slot in model.items())
    assert table.counts[STORED] == len(model)
    assert table.counts[FREE] == slots - len(model)
    assert table.highest_used() == max(model.values(), default=-1)


def test_slot_states_are_counted() -> None:
    """Counts follow every change of state, and freed slots are found again, lowest first."""
    table = SlotTable(4)
    for expected in range(4):
        assert table.lowest_free() == expected
        table.set_state(expected, RESERVED)
    assert table.lowest_free() == -1
    table.set_state(2, LIMBO)
    assert table.counts == [0, 3, 0, 1, 0, 0]
    table.set_state(2, FREE)
    table.set_state(1, FREE)
    assert table.lowest_free() == 1


@given(
    st.integers(0, 255),
    st.integers(0, 63),
    st.integers(0, 2**32 - 1),
    st.integers(1, 8192),
    st.integers(0, 2**64 - 1),
)
def test_any_damage_to_an_entry_is_seen(
    flip: int, at: int, root: int, length: int, generation: int
) -> None:
    """An entry reads back as it was packed, and with one byte changed not at all."""
    ref = BlockRef.of(1, 2, 3)
    entry = bytearray(pack_entry(ref, root, length, generation, 9, 77))
    assert list(parse_entries(memoryview(entry), 9, 8192, 77)) == [
        (9, ref, root, length, generation)
    ]
    assert all(not e[2] and not e[3] for e in parse_entries(memoryview(entry), 10, 8192, 77))
    assert all(not e[3] for e in parse_entries(memoryview(entry), 9, 8192, 78))
    if flip:
        entry[at] ^= flip
        assert all(not e[3] for e in parse_entries(memoryview(entry), 9, 8192, 77))


@given(st.integers(1, 2**40), st.integers(0, 2**60), st.booleans())
def test_header_round_trip(slots: int, sequence: int, clean: bool) -> None:
    """A header reads back as written; of two valid ones the later counts."""
    header = Header(4096, slots, sequence, 5, clean, b"i" * 16)
    later = header.successor(clean=not clean)
    for pages in (header.pack() + later.pack(), later.pack() + header.pack()):
        assert parse_header(pages, "x") == later
    assert parse_header(header.pack() + bytes(4096), "x") == header


@given(st.integers(1, 4096).map(lambda n: n * 4096), st.integers(0, 1 << 40))
def test_layout_stays_within_its_size(block_size: int, size_bytes: int) -> None:
    """As many slots as fit, but for one, and never a byte more than given."""
    layout = Layout(block_size)
    slots = layout.slots_in(size_bytes)
    if slots:
        assert layout.data_size(slots) + layout.index_size(slots) <= size_bytes
    assert layout.data_size(slots + 2) + layout.index_size(slots + 2) > size_bytes
    assert layout.slot_offset(slots) == layout.data_size(slots)
    assert layout.sums_room >= block_size // 4096 * 4
