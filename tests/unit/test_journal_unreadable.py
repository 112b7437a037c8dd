"""A journal on a disk that does not give some of its pages: damage, never skipped silently."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.unit.test_journal_store import LIMITS, SEGMENT, fence, open_store, put, tail
from torus_actors.errors import Corruption
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import COPY, HEADER_SIZE, segment_name
from torus_actors.storage.journal_index import Fence
from torus_actors.storage.journal_open import UNREADABLE_MAX
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.journal_steps import Commit
from torus_actors.storage.simdisk import SimDisk

FIRST = segment_name(0)


@pytest.fixture
def disk() -> SimDisk:
    """An empty disk."""
    return SimDisk(random.Random(7))


@pytest.fixture
def store(disk: SimDisk) -> JournalStore:
    """A new journal."""
    return open_store(disk)


def place(store: JournalStore, volume: int, epoch: int, seq: int) -> int:
    """Where a record of the first segment lies."""
    run = store._logs[volume].runs[epoch]
    stored = run.records[seq - run.first]
    assert stored is not None and stored.segment == 0
    return stored.offset


def lose(disk: SimDisk, offset: int) -> SimDisk:
    """The page can be read no more; the node was killed."""
    disk.make_unreadable(FIRST, offset)
    return disk.kill()


def once_damaged(disk: SimDisk) -> JournalStore:
    """A journal that has lost a record of volume 1, which is not the last one."""
    store = open_store(disk)
    for seq in (1, 2, 3):
        put(store, 1, 1, seq, b"x")
    return open_store(lose(disk, place(store, 1, 1, 2)))


def test_an_unreadable_record_stops_its_own_log_only(store: JournalStore, disk: SimDisk) -> None:
    """The journal opens; the log gives what is before it and then says so; others go on."""
    for seq in range(1, 6):
        put(store, 1, 1, seq, bytes([seq]) * 9000)
        put(store, 2, 1, seq, bytes([seq]) * 300)
    again = open_store(lose(disk, place(store, 1, 1, 3) + 5000))
    assert [seq for seq, _ in again.read(1, 1, 1, 18_000)] == [1, 2]
    for first in (1, 3):
        with pytest.raises(Corruption):
            again.read(1, 1, first, 100_000)
    assert len(tail(again, 1, 1, 4)) == 2
    assert len(tail(again, 2, 1, 1)) == 5
    put(again, 2, 1, 6, b"goes on")


def test_an_unreadable_directory_is_a_gap(store: JournalStore, disk: SimDisk) -> None:
    """Logs with a record behind it prove by their numbers what is missing; others stop."""
    for seq in (1, 2):
        for volume in (1, 2, 3):
            put(store, volume, 1, seq, bytes(100))
    put(store, 1, 1, 3, b"lost")
    put(store, 1, 1, 4, b"after")
    put(store, 2, 1, 3, b"after")
    again = open_store(lose(disk, place(store, 1, 1, 3)))
    assert again.fenced(1) == Fence(1, 1, 4, True)
    with pytest.raises(Corruption):
        tail(again, 1, 1, 1)
    assert again.fenced(2) == Fence(1, 1, 3, False)
    assert again.fenced(3).damaged


def lose_last(store: JournalStore, disk: SimDisk) -> tuple[JournalStore, SimDisk]:
    """Three volumes, and the last group cannot be read."""
    for volume in (1, 2):
        put(store, volume, 1, 1, bytes([volume]) * 100)
    put(store, 3, 1, 1, b"all of it" * 1000)
    disk = lose(disk, place(store, 3, 1, 1))
    return open_store(disk), disk


def test_the_last_group_is_no_torn_one(store: JournalStore, disk: SimDisk) -> None:
    """It looks like the end of the log, but what was there was acknowledged, maybe: all stop.

    Also a volume of which nothing else was here.
    """
    again, disk = lose_last(store, disk)
    for _ in range(3):
        for volume in (1, 2):
            assert again.fenced(volume).damaged
            assert again.read(volume, 1, 1, 1000) == [(1, bytes([volume]) * 100)]
            with pytest.raises(Corruption):
                again.read(volume, 1, 2, 1000)
            with pytest.raises(Corruption):
                again.append(volume, 1, 2, [b"x"])
        assert again.fenced(3).damaged
        with pytest.raises(Corruption):
            again.read(3, 1, 1, 1000)
        # Others write on, and it is not forgotten.
        put(again, 4, 1, again.fenced(4).last + 1, b"other")
        disk = disk.kill()
        again = open_store(disk)
    # A new session heals its log.
    put(again, 1, 2, 1, b"new")
    again.cut(1, 2, 1)
    assert not again.fenced(1).damaged
    assert fence(again, 2, 3).damaged


@pytest.mark.parametrize("count", [1, 29])
def test_what_can_be_read_again_is_there_again(
    count: int, store: JournalStore, disk: SimDisk
) -> None:
    """Nothing was written over it, nor under its numbers."""
    again, disk = lose_last(store, disk)
    for seq in range(1, count + 1):
        put(again, 5, 1, seq, bytes([seq]) * 3000)
        again.cut(5, 1, max(0, seq - 5))
    disk.make_readable(FIRST)
    again = open_store(disk.kill())
    assert tail(again, 1, 1, 1) == {1: b"\1" * 100}
    assert tail(again, 3, 1, 1) == {1: b"all of it" * 1000}
    assert tail(again, 5, 1, count) == {count: bytes([count]) * 3000}
    put(again, 3, 1, 2, b"goes on")


def test_the_last_group_has_a_long_directory(store: JournalStore, disk: SimDisk) -> None:
    """Its first page can be read, and tells of records that cannot be found."""
    put(store, 1, 1, 1, b"x")
    at = store._segments[0].end
    for seq in range(2, 100):
        store.append(1, 1, seq, [b"x"])
    store.settle()
    assert place(store, 1, 1, 2) > at + PAGE_SIZE
    again = open_store(lose(disk, at + PAGE_SIZE))
    assert again.fenced(1) == Fence(1, 1, 1, True)
    with pytest.raises(Corruption):
        tail(again, 1, 1, 1)


def test_the_last_group_of_the_segment_before_is_not_taken_away(
    store: JournalStore, disk: SimDisk
) -> None:
    """It is the newest that can be read, and damaged; it was never torn."""
    seq = 0
    while len(store._segments) < 2 or store._active is not store._segments[1]:
        seq += 1
        put(store, 1, 1, seq, bytes(5000))
    at = place(store, 1, 1, seq - 1)
    disk.rot(FIRST, at)
    disk.make_unreadable(segment_name(1), HEADER_SIZE)
    disk = disk.kill()
    with pytest.raises(Corruption):
        tail(open_store(disk), 1, 1, 1)
    disk = disk.kill()
    disk.rot(FIRST, at)
    disk.make_readable(segment_name(1))
    assert len(tail(open_store(disk.kill()), 1, 1, 1)) == seq


def test_the_original_of_an_unreadable_copy_is_still_there(
    store: JournalStore, disk: SimDisk
) -> None:
    """A record is being moved, and its new place is damaged before its old one is used anew."""
    copied = None
    for seq in range(1, 256):
        store.append(9, 1, seq, [bytes([seq]) * 5000])
        while copied is None and (step := store.next_step()) is not None:
            step.run()
            store.end_step(step)
            if isinstance(step, Commit):
                copied = next((p for p in step.placed if p.ticket.kind == COPY), None)
                segment = step.segment.index
        if copied is not None:
            break
        store.cut(9, 1, seq - 1)
    assert copied is not None
    disk.make_unreadable(segment_name(segment), copied.offset + 4000)
    again = open_store(disk.kill())
    moved = copied.ticket.at.seq
    assert again.read(9, 1, moved, 100) == [(moved, bytes([moved]) * 5000)]


def test_a_record_of_the_last_group_that_is_unreadable_is_lost(
    store: JournalStore, disk: SimDisk
) -> None:
    """It is neither torn nor stored: who sends it again is not told that it is there."""
    put(store, 1, 1, 1, b"x" * 100)
    put(store, 1, 1, 2, bytes(9000))
    at = place(store, 1, 1, 2)
    disk = lose(disk, at + 5000)
    for _ in range(2):
        again = open_store(disk)
        assert again.read(1, 1, 1, 100) == [(1, b"x" * 100)]
        with pytest.raises(Corruption):
            again.read(1, 1, 2, 100)
        with pytest.raises(Corruption):
            again.append(1, 1, 2, [bytes(9000)])
        with pytest.raises(Corruption):
            again.append(1, 1, 3, [b"x"])
        assert again.fenced(1) == Fence(1, 1, 2, True)
        disk = disk.kill()
    disk.make_readable(FIRST)
    assert len(tail(open_store(disk.kill()), 1, 1, 1)) == 2


def test_an_unreadable_page_that_holds_nothing_costs_nothing(
    store: JournalStore, disk: SimDisk
) -> None:
    """In space that was never written to, and behind the end of a segment that is full."""
    put(store, 1, 1, 1, b"x")
    disk = lose(disk, SEGMENT - PAGE_SIZE)
    store = open_store(disk)
    put(store, 1, 1, 2, b"x")
    seq = 3
    while store._active is store._segments[0]:
        put(store, 1, 1, seq, bytes(9000))
        seq += 1
    end = store._segments[0].end
    assert HEADER_SIZE < end < SEGMENT
    disk = lose(disk, end)
    again = open_store(disk)
    assert not again.fenced(1).damaged
    assert len(tail(again, 1, 1, 1)) == seq - 1
    put(again, 1, 1, seq, b"goes on")


def test_an_unreadable_header_is_refused(store: JournalStore, disk: SimDisk) -> None:
    """As a damaged one: nobody can tell what the segment is."""
    put(store, 1, 1, 1, b"x")
    with pytest.raises(Corruption, match="header"):
        open_store(lose(disk, 0))


def test_a_disk_that_gives_nothing_is_not_asked_for_all(disk: SimDisk) -> None:
    """Each page that cannot be read may take seconds."""
    size = (UNREADABLE_MAX + 80) * PAGE_SIZE
    limits = JournalLimits(segment_bytes=size, journal_bytes_max=6 * size)
    put(open_store(disk, limits), 1, 1, 1, b"x")
    for page in range(1, UNREADABLE_MAX + 40):
        disk.make_unreadable(FIRST, page * PAGE_SIZE)
    with pytest.raises(OSError, match="read"):
        open_store(disk.kill(), limits)


def filled() -> tuple[SimDisk, JournalStore]:
    """A journal of three volumes, with records that were cut, moved, and dropped."""
    disk = SimDisk(random.Random(3))
    store = open_store(disk)
    rng = random.Random(4)
    put(store, 3, 1, 1, bytes([3, 1]) * 700)
    for seq in range(1, 60):
        for volume in (1, 2):
            put(store, volume, 1, seq, bytes([volume, seq]) * rng.choice((10, 800, 3000)))
        store.cut(1, 1, max(0, seq - 8))
        store.cut(2, 1, max(0, seq - 3))
    assert store.stats().reused > 2 and store.stats().copied
    return disk, store


def there(store: JournalStore, volume: int, epoch: int, first: int) -> tuple[list[int], bool]:
    """Numbers of the records from one on, and whether the end is one; their content is right."""
    found: list[int] = []
    while True:
        try:
            batch = store.read(volume, epoch, first + len(found), 1)
        except Corruption:
            return found, False
        if not batch:
            return found, True
        ((seq, data),) = batch
        assert data[:2] == bytes([volume, seq]) and data == data[:2] * (len(data) // 2)
        found.append(seq)


@pytest.mark.parametrize("end", [SimDisk.kill, SimDisk.crash])
def test_every_page_of_a_journal(end: Callable[[SimDisk], SimDisk]) -> None:
    """Whichever cannot be read: a log gives all, or stops with Corruption; also later on."""
    _, whole = filled()
    places = [
        (each.index, at)
        for each in whole._segments
        for at in range(HEADER_SIZE, each.size, PAGE_SIZE)
    ]
    needed = {1: 52, 2: 57, 3: 1}
    last = {1: 59, 2: 59, 3: 1}
    stopped = 0
    for index, at in places:
        disk, _ = filled()
        disk.make_unreadable(segment_name(index), at)
        for life in range(4):
            disk = end(disk)
            if life == 3:
                disk.make_readable(segment_name(index))
            again = JournalStore.open(disk, limits=LIMITS, rng=random.Random(life))
            for volume, first in needed.items():
                found, complete = there(again, volume, 1, first)
                assert found == list(range(first, first + len(found)))
                if complete:
                    assert not found or found[-1] == last[volume]
                    assert found, (index, at, life, volume)
                else:
                    stopped += 1
                    fence_ = again.fenced(volume)
                    assert fence_.damaged or fence_.last == last[volume]
            # Somebody else goes on.
            volume = 10 + life
            for seq in range(1, 6):
                put(again, volume, 1, seq, bytes([volume, seq]) * 900)
            assert there(again, volume, 1, 1) == ([1, 2, 3, 4, 5], True)
    assert stopped > 20


def test_a_fence_does_not_make_a_lost_log_an_empty_one(store: JournalStore, disk: SimDisk) -> None:
    """Of a volume of which nothing else was here; who opens it fences first, and then asks."""
    again, _ = lose_last(store, disk)
    assert fence(again, 3, 2).damaged
    with pytest.raises(Corruption):
        again.read(3, 1, 1, 1000)
    assert fence(again, 3, 4).damaged
    # Its numbers tell whoever asks for it what is missing.
    put(again, 3, 4, 7, b"new")
    assert again.fenced(3) == Fence(4, 7, 7, False)
    again.cut(3, 4, 7)
    assert not again.fenced(3).damaged
    # Of which session the lost records were nobody knows: no cut is behind them for sure.
    for epoch in (2, 3):
        assert fence(again, 6, epoch).damaged
        again.cut(6, epoch, 0)
        assert again.fenced(6).damaged
    again.cut(6, 3, 5)
    assert again.fenced(6).damaged
    put(again, 6, 3, 6, b"new")
    assert again.fenced(6) == Fence(3, 6, 6, False)


@pytest.mark.parametrize("reopened", ["never", "after the fence", "after the cut", "when reused"])
def test_no_cut_makes_a_log_whole_whose_newest_promise_may_be_lost(
    reopened: str, disk: SimDisk
) -> None:
    """A session's promise was lost with all its records, and the collector comes before who opens.

    Found by reading: it promises the session anew, and takes what earlier ones left. Then nothing
    told of the loss, and with the other member away what was flushed was gone.
    """

    def again(when: str) -> None:
        nonlocal store
        if when == reopened:
            store = open_store(store._disk.kill())

    store = open_store(disk)
    put(store, 5, 1, 1, b"of the session before")
    at = store._active.end if store._active is not None else 0
    fence(store, 5, 2)
    put(store, 5, 2, 1, b"flushed")
    put(store, 7, 1, 1, b"behind it")
    for offset in (at, at + PAGE_SIZE):
        disk.rot(FIRST, offset + 20, 8)
    store = open_store(disk.kill())
    assert store.fenced(5) == Fence(1, 1, 1, True)
    for epoch in (2, 2, 3):
        assert fence(store, 5, epoch).damaged
        again("after the fence")
        store.cut(5, epoch, 0)
        again("after the cut")
        assert store.fenced(5).damaged
        with pytest.raises(Corruption):
            store.read(5, epoch, 1, 1000)
    store.cut(7, 1, 1)
    churn(store)
    # Who finds the damage again keeps what shows it.
    pinned = reopened in ("after the fence", "after the cut")
    assert any(segment.damaged for segment in store._segments) == pinned
    again("when reused")
    assert store.fenced(5).damaged
    put(store, 5, 4, 8, b"goes on")
    again("when reused")
    assert store.fenced(5) == Fence(4, 8, 8, False)
    assert store.read(5, 4, 8, 1000) == [(8, b"goes on")]


def test_a_record_and_a_fence_that_are_written_together_tell_of_no_loss(disk: SimDisk) -> None:
    """The entry of the fence is made before its record counts."""
    store = once_damaged(disk)
    assert fence(store, 3, 1).damaged
    assert store.append(3, 1, 1, [b"new"]) is not None
    assert store.fence(3, 2) is not None
    store.settle()
    assert store.fenced(3) == Fence(1, 1, 1, False)
    store = open_store(store._disk.kill())
    assert store.fenced(3) == Fence(1, 1, 1, False)


def test_what_may_be_missing_is_not_forgotten_with_the_damage(disk: SimDisk) -> None:
    """The segment that shows it is used anew; a volume of which nothing was left is asked for."""
    store = open_store(disk)
    put(store, 1, 1, 1, b"one")
    put(store, 3, 1, 1, b"all of it")
    put(store, 1, 1, 2, b"two")
    store = open_store(lose(disk, place(store, 3, 1, 1)))
    assert not store.fenced(1).damaged
    for seq in range(3, 300):
        put(store, 1, 1, seq, bytes(5000))
        store.cut(1, 1, seq - 1)
    put(store, 4, 1, 1, b"new here")
    assert not any(segment.damaged for segment in store._segments), "it was reused"
    for epoch in (2, 2, 3, 3):
        store = open_store(store._disk.kill())
        assert not store.fenced(1).damaged and not store.fenced(4).damaged
        assert fence(store, 3, epoch).damaged
        with pytest.raises(Corruption):
            store.read(3, 1, 1, 1000)
    put(store, 3, 3, 5, b"goes on")
    store = open_store(store._disk.kill())
    assert store.fenced(3) == Fence(3, 5, 5, False)
    # What was known of a volume since is not in doubt when all of it was cut.
    assert not fence(store, 3, 4).damaged
    for volume in (1, 3, 4):
        store.cut(volume, max(1, store.fenced(volume).epoch), 1000)
    store.cut(3, 4, 0)
    churn(store)
    store = open_store(store._disk.kill())
    assert store._incomplete
    assert store.fenced(3) == Fence(0, 0, 0, False)
    assert fence(store, 6, 1).damaged


def churn(store: JournalStore) -> None:
    """Have all segments used anew; those with the fewest volumes are so first."""
    for seq in range(1, 100):
        for volume in range(10, 16):
            put(store, volume, 1, seq, bytes(5000))
            store.cut(volume, 1, seq - 1)


def test_who_asks_for_what_was_never_there_keeps_no_segment_from_reuse(disk: SimDisk) -> None:
    """The tables and the entries of the volumes say it all: the damage is not needed for that."""
    store = once_damaged(disk)
    store.cut(1, 1, 3)
    assert fence(store, 3, 1).damaged
    churn(store)
    assert not any(segment.damaged for segment in store._segments)
    store = open_store(store._disk.kill())
    assert store._incomplete and fence(store, 3, 2).damaged
    with pytest.raises(Corruption):
        store.read(3, 1, 1, 1000)


@pytest.mark.parametrize("fill", [0, 4])
def test_damage_keeps_room_from_no_journal_on_a_full_disk(fill: int, disk: SimDisk) -> None:
    """The damaged segment is needed until a table says it, and there is hardly one free."""
    store = open_store(disk)
    seq = 0
    while len(store._segments) < 3 or store._active is not store._segments[1]:
        seq += 1
        put(store, 1, 1, seq, bytes(12000))
        disk.capacity_bytes = (3 if len(store._segments) < 3 else 0) * SEGMENT
    for _ in range(fill):
        seq += 1
        put(store, 1, 1, seq, bytes(12000))
    store = open_store(lose(disk, 4 * PAGE_SIZE))
    assert store._segments[0].damaged
    store.cut(1, 1, seq)
    for later in range(seq + 1, seq + 50):
        put(store, 1, 1, later, bytes(12000))
        store.cut(1, 1, later)
    assert len(store._segments) == 3
    assert fence(open_store(store._disk.kill()), 2, 1).damaged


def test_damage_in_every_segment_keeps_no_cut_from_being_made(disk: SimDisk) -> None:
    """They are all kept as long as a log may lack records, and only a later cut ends that."""
    store = open_store(disk)
    for epoch in range(1, LIMITS.segments_max + 1):
        put(store, 1, epoch, 1, b"x" * 100)
        active, stored = store._active, store._logs[1].runs[epoch].records[0]
        assert active is not None and stored is not None and stored.segment == active.index
        disk.make_unreadable(segment_name(active.index), stored.offset)
        disk = disk.kill()
        store = open_store(disk)
    held = store._segments[: LIMITS.segments_max]
    assert all(segment.damaged for segment in held) and store.fenced(1).damaged
    fence(store, 1, 100)
    store.cut(1, 100, 0)
    put(store, 1, 100, 1, b"again")
    assert not store.fenced(1).damaged
    for seq in range(2, 200):
        put(store, 1, 100, seq, bytes(5000))
        store.cut(1, 100, seq - 1)
    # What shows the damage is used anew, and no more files are made than that takes.
    assert not any(segment.damaged for segment in store._segments)
    assert len(store._segments) <= 2 * LIMITS.segments_max


def test_a_record_that_is_cut_before_it_is_written_shows_what_is_missing_too(
    disk: SimDisk,
) -> None:
    """Found by review: the log was said to be lost for ever, with a head that covered all of it."""
    store = once_damaged(disk)
    assert fence(store, 3, 1).damaged
    assert store.append(3, 1, 1, [b""]) is not None
    store.cut(3, 1, 1)
    store.settle()
    assert store.fenced(3) == Fence(0, 0, 0, False)
    assert not fence(store, 3, 2).damaged
    store = open_store(store._disk.kill())
    assert not store.fenced(3).damaged


def test_a_dropped_volume_keeps_no_damage(disk: SimDisk) -> None:
    """Nobody asks for it: it would be suspect for ever, and keep the segment that shows why.

    Found by review: then all other volumes were suspect again after each start.
    """
    limits = JournalLimits(segment_bytes=SEGMENT, journal_bytes_max=20 * SEGMENT)
    store = open_store(disk, limits)
    put(store, 5, 1, 1, b"deleted later")
    seq = 0
    while store._active is None or store._active.index == 0:
        seq += 1
        put(store, 9, 1, seq, bytes(5000))
    assert store.drop(5) is not None
    store.settle()
    disk.rot(FIRST, place(store, 9, 1, seq - 1) // PAGE_SIZE * PAGE_SIZE + 20, 8)
    store = open_store(disk.kill(), limits)
    assert store._segments[0].damaged
    for life in range(6):
        epoch = 2 + life
        fence(store, 9, epoch)
        put(store, 9, epoch, 1, b"of a new session")
        store.cut(9, epoch, 0)
        for number in range(1, 200):
            put(store, 8, epoch, number, bytes(5000))
            store.cut(8, epoch, number)
        store.close()
        store = open_store(store._disk.kill(), limits)
    assert not any(segment.damaged for segment in store._segments)
    assert not store.fenced(8).damaged and not store.fenced(9).damaged
