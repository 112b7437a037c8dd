"""The journal store, one property a test, on the simulated disk (and once on a real one)."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from torus_actors.errors import (
    Closed,
    Corruption,
    Fenced,
    Invalid,
    NotExist,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
)
from torus_actors.storage import journal
from torus_actors.storage.disk import File, RealDisk
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import (
    HEADER_COPIES,
    HEADER_SIZE,
    pack_segment_header,
    parse_segment_header,
    segment_name,
)
from torus_actors.storage.journal_index import Fence, Ticket
from torus_actors.storage.journal_space import JOURNAL_BYTES_MAX, JournalLimits
from torus_actors.storage.simdisk import Operation, PowerCut, SimDisk

SEGMENT = 64 << 10
LIMITS = JournalLimits(segment_bytes=SEGMENT, journal_bytes_max=6 * SEGMENT)


def open_store(disk: SimDisk, limits: JournalLimits = LIMITS) -> JournalStore:
    """A journal on this disk."""
    return JournalStore.open(disk, limits=limits, rng=random.Random(1))


def outcome(store: JournalStore, ticket: Ticket | None) -> Exception | None:
    """Do all disk work, and tell what became of a ticket."""
    outcomes: list[Exception | None] = []
    if ticket is None:
        return None
    ticket.waiters.append(outcomes.append)
    store.settle()
    assert len(outcomes) == 1
    return outcomes[0]


def put(store: JournalStore, volume: int, epoch: int, seq: int, payload: bytes) -> None:
    """Append a record, durably."""
    error = outcome(store, store.append(volume, epoch, seq, [payload]))
    if error is not None:
        raise error


def fence(store: JournalStore, volume: int, epoch: int) -> Fence:
    """Fence, durably."""
    assert outcome(store, store.fence(volume, epoch)) is None
    return store.fenced(volume)


def tail(store: JournalStore, volume: int, epoch: int, seq: int) -> dict[int, bytes]:
    """All records from this one on."""
    found: dict[int, bytes] = {}
    while batch := store.read(volume, epoch, seq, 10_000):
        found.update(batch)
        seq = batch[-1][0] + 1
    return found


def lives(store: JournalStore, disk: SimDisk) -> Iterator[JournalStore]:
    """This store, and then the one that comes after a power cut."""
    yield store
    yield open_store(disk.crash())


@pytest.fixture
def disk() -> SimDisk:
    """An empty disk."""
    return SimDisk(random.Random(5))


@pytest.fixture
def store(disk: SimDisk) -> JournalStore:
    """An empty journal."""
    return open_store(disk)


def test_records_come_back_in_order(store: JournalStore, disk: SimDisk) -> None:
    """What was appended is read, in order, before and after a power cut."""
    records = {seq: bytes([seq]) * (seq * 100) for seq in range(7, 40)}
    for seq, payload in records.items():
        put(store, 1, 1, seq, payload)
    assert tail(store, 1, 1, 7) == records
    again = open_store(disk.crash())
    assert tail(again, 1, 1, 7) == records
    assert again.fenced(1) == Fence(1, 7, 39, False)
    assert again.volumes() == [1]


def test_payload_of_several_buffers_and_none(store: JournalStore) -> None:
    """A record is the concatenation of its buffers, and may be empty."""
    assert outcome(store, store.append(1, 1, 1, [b"ab", bytearray(b"cd"), memoryview(b"")])) is None
    put(store, 1, 1, 2, b"")
    assert tail(store, 1, 1, 1) == {1: b"abcd", 2: b""}


def test_buffers_are_copied(store: JournalStore, disk: SimDisk) -> None:
    """A caller may change its buffer as soon as it was handed over: it may have given up."""
    buffer = bytearray(b"as it was")
    ticket = store.append(1, 1, 1, [buffer])
    put_later = store.append(2, 1, 1, [b"of another"])
    buffer[:] = b"otherwise"
    assert outcome(store, ticket) is None
    assert put_later is not None
    again = open_store(disk.crash())
    assert tail(again, 1, 1, 1) == {1: b"as it was"}
    assert tail(again, 2, 1, 1) == {1: b"of another"}


def test_gap_is_refused(store: JournalStore) -> None:
    """The next record has the next number, also while the one before is under way."""
    store.append(1, 1, 5, [b"x"])
    with pytest.raises(Invalid, match="the next one is 6"):
        store.append(1, 1, 7, [b"x"])
    with pytest.raises(Invalid, match="the next one is 6"):
        store.append(1, 1, 4, [b"x"])
    store.append(1, 1, 6, [b"x"])
    store.settle()
    with pytest.raises(Invalid, match="the next one is 7"):
        store.append(1, 1, 8, [b"x"])


def test_gap_is_refused_after_all_was_cut(store: JournalStore, disk: SimDisk) -> None:
    """The next number is known even when no record is left, also after a restart."""
    put(store, 1, 1, 5, b"x")
    store.cut(1, 1, 5)
    with pytest.raises(Invalid):
        store.append(1, 1, 7, [b"x"])
    store.close()
    again = open_store(disk.crash())
    with pytest.raises(Invalid):
        again.append(1, 1, 7, [b"x"])
    put(again, 1, 1, 6, b"y")


def test_first_record_of_an_epoch_starts_anywhere(store: JournalStore) -> None:
    """A new epoch goes on, goes back, or starts far off."""
    for epoch, seq in ((1, 5), (2, 6), (3, 0), (9, 1 << 40)):
        put(store, 1, epoch, seq, b"x")
    assert store.fenced(1) == Fence(9, 1 << 40, 1 << 40, False)


def test_member_that_was_away_goes_on_behind_a_cut(store: JournalStore, disk: SimDisk) -> None:
    """A cut beyond the last record moves the next number there."""
    put(store, 1, 1, 5, b"x")
    store.cut(1, 1, 79)
    with pytest.raises(Invalid):
        store.append(1, 1, 81, [b"x"])
    put(store, 1, 1, 80, b"y")
    again = open_store(disk.crash())
    assert again.fenced(1) == Fence(1, 80, 80, False)
    assert tail(again, 1, 1, 80) == {80: b"y"}


def test_repeat_is_acknowledged_again(store: JournalStore) -> None:
    """The same record twice is stored once: waiting, durable, or cut."""
    first = store.append(1, 1, 1, [b"same"])
    assert store.append(1, 1, 1, [b"sa", b"me"]) is first
    store.settle()
    assert store.append(1, 1, 1, [b"same"]) is None
    for payload in (b"else", b"same and more"):
        with pytest.raises(Invalid, match="other content"):
            store.append(1, 1, 1, [payload])
    store.cut(1, 1, 1)
    assert store.append(1, 1, 1, [b"same"]) is None
    assert store.stats().records == 0


def test_fenced_epoch_is_refused(store: JournalStore, disk: SimDisk) -> None:
    """After a fence nothing below it is taken, whatever happens to the node."""
    put(store, 1, 3, 1, b"old")
    assert fence(store, 1, 5) == Fence(3, 1, 1, False)
    for each in lives(store, disk):
        for epoch in (1, 3, 4):
            with pytest.raises(Fenced, match="5 was promised"):
                each.append(1, epoch, 2, [b"late"])
            with pytest.raises(Fenced):
                each.fence(1, epoch)
        assert each.fence(1, 5) is None
        assert tail(each, 1, 3, 1) == {1: b"old"}


def test_fence_holds_before_it_is_durable(store: JournalStore) -> None:
    """What comes behind a fence is refused at once, what came before it is in its answer."""
    before = store.append(1, 1, 1, [b"before"])
    ticket = store.fence(1, 2)
    assert store.fence(1, 2) is ticket
    with pytest.raises(Fenced):
        store.append(1, 1, 2, [b"behind"])
    assert before is not None
    assert outcome(store, ticket) is None
    assert store.fenced(1) == Fence(1, 1, 1, False)


def test_append_under_a_higher_epoch_promises_it(store: JournalStore, disk: SimDisk) -> None:
    """The first record of an epoch fences those below, with the same sync."""
    put(store, 1, 1, 1, b"x")
    put(store, 1, 2, 1, b"y")
    again = open_store(disk.crash())
    with pytest.raises(Fenced):
        again.append(1, 1, 2, [b"late"])
    assert again.fenced(1) == Fence(2, 1, 1, False)


def test_fence_of_an_empty_volume(store: JournalStore) -> None:
    """There is nothing to replay; the epoch is promised all the same."""
    assert fence(store, 1, 4) == Fence(0, 0, 0, False)
    with pytest.raises(Fenced):
        store.append(1, 3, 1, [b""])


def test_all_that_waits_shares_one_write_and_one_sync(store: JournalStore, disk: SimDisk) -> None:
    """Records of many volumes, fences and drops go out together, into space that is there."""
    put(store, 1, 1, 1, b"x")
    put(store, 2, 1, 1, b"x")
    operations: list[Operation] = []
    disk.on_operation = operations.append
    tickets = [store.append(10 + i, 1, 1, [bytes(100)]) for i in range(16)]
    tickets += [store.fence(1, 2), store.drop(2)]
    settled: list[object] = []
    for ticket in tickets:
        assert ticket is not None
        ticket.waiters.append(settled.append)
    store.settle()
    assert settled == [None] * 18
    assert [operation.kind for operation in operations] == ["write", "sync"]


def test_commits_change_no_sizes(store: JournalStore, disk: SimDisk) -> None:
    """Every byte of a segment was written before the first group goes into it."""
    put(store, 1, 1, 1, b"x")
    size = disk.open(segment_name(0)).size()
    kinds: list[str] = []
    disk.on_operation = lambda operation: kinds.append(operation.kind)
    for seq in range(2, 7):
        put(store, 1, 1, seq, bytes(3000))
    assert kinds == ["write", "sync"] * 5
    assert disk.open(segment_name(0)).size() == size == SEGMENT


def test_read_is_bounded(store: JournalStore) -> None:
    """At least one record, at most as many bytes as asked for."""
    for seq in range(1, 6):
        put(store, 1, 1, seq, bytes(1000))
    assert [seq for seq, _ in store.read(1, 1, 2, 0)] == [2]
    assert [seq for seq, _ in store.read(1, 1, 2, 2000)] == [2, 3]
    assert [seq for seq, _ in store.read(1, 1, 2, 2999)] == [2, 3]
    assert store.read(1, 1, 6, 1000) == []
    assert store.read(1, 2, 1, 1000) == []
    assert store.read(9, 1, 1, 1000) == []


def test_read_of_what_was_cut(store: JournalStore) -> None:
    """A reader that comes too late is told so."""
    for seq in range(1, 4):
        put(store, 1, 1, seq, b"x")
    store.cut(1, 1, 2)
    with pytest.raises(NotExist):
        store.read(1, 1, 2, 1000)
    assert tail(store, 1, 1, 3) == {3: b"x"}


def test_cut_takes_lower_epochs_along(store: JournalStore) -> None:
    """The log is ordered by epoch and number, and a cut is a place in it."""
    for epoch in (1, 2, 3):
        for seq in (1, 2):
            put(store, 1, epoch, seq, b"x")
    store.cut(1, 2, 1)
    store.cut(1, 1, 99)
    assert tail(store, 1, 2, 2) == {2: b"x"}
    assert store.stats().records == 3
    with pytest.raises(Invalid):
        store.cut(1, 4, 0)
    store.cut(99, 4, 0)


def test_cut_while_the_record_is_under_way(store: JournalStore) -> None:
    """A record that is cut before it is durable is acknowledged and not kept."""
    ticket = store.append(1, 1, 1, [b"x"])
    store.cut(1, 1, 1)
    assert outcome(store, ticket) is None
    assert store.stats().records == 0
    assert store.stats().live_bytes == 0
    put(store, 1, 1, 2, b"y")


def test_drop_forgets_a_volume(store: JournalStore, disk: SimDisk) -> None:
    """Records and promise are gone for good; another volume of that number begins anew."""
    put(store, 1, 5, 1, b"x")
    waiting = store.append(1, 5, 2, [b"y"])
    assert waiting is not None
    failures: list[Exception | None] = []
    waiting.waiters.append(failures.append)
    ticket = store.drop(1)
    assert isinstance(failures[0], Fenced)
    put(store, 1, 1, 1, b"new")
    assert outcome(store, store.drop(8)) is None
    assert ticket is not None
    for each in lives(store, disk):
        assert tail(each, 1, 1, 1) == {1: b"new"}
        assert each.read(1, 5, 1, 100) == []
    assert outcome(each, each.drop(1)) is None
    assert each.drop(1) is None
    assert each.volumes() == []


def test_drop_survives(store: JournalStore, disk: SimDisk) -> None:
    """A volume that was dropped does not come back, however often the journal is reused."""
    for seq in range(1, 15):
        put(store, 1, 5, seq, bytes(5000))
    assert outcome(store, store.drop(1)) is None
    for life in range(4):
        for seq in range(1, 20):
            put(store, 9, life + 1, seq, bytes(5000))
            store.cut(9, life + 1, seq)
        disk = disk.crash()
        store = open_store(disk)
        assert store.fenced(1) == Fence(0, 0, 0, False)
        assert store.volumes() == [9]


def test_full_journal_refuses_and_changes_nothing(store: JournalStore) -> None:
    """Out of space comes before anything is done; a cut makes room."""
    seq = 1
    with pytest.raises(OutOfSpace, match="full"):
        while True:
            put(store, 1, 1, seq, bytes(10_000))
            seq += 1
    assert store.fenced(1) == Fence(1, 1, seq - 1, False)
    assert store.stats().live_bytes <= LIMITS.live_bytes_max
    assert fence(store, 2, 1) == Fence(0, 0, 0, False)
    store.cut(1, 1, 3)
    put(store, 1, 1, seq, bytes(10_000))
    assert tail(store, 1, 1, 4) == dict.fromkeys(range(4, seq + 1), bytes(10_000))


def test_old_records_pin_no_space(store: JournalStore, disk: SimDisk) -> None:
    """Promises and records that stay are moved on, while megabytes go through."""
    fence(store, 1, 7)
    put(store, 2, 1, 1, b"stays")
    assert outcome(store, store.drop(3)) is None
    for seq in range(1, 400):
        put(store, 9, 1, seq, bytes(5000))
        if seq % 20 == 0:
            store.cut(9, 1, seq - 10)
    stats = store.stats()
    assert stats.segments <= LIMITS.segments_max
    assert stats.reused > 20
    again = open_store(disk.crash())
    assert tail(again, 2, 1, 1) == {1: b"stays"}
    with pytest.raises(Fenced):
        again.append(1, 6, 1, [b""])
    assert sorted(again.volumes()) == [1, 2, 9]


def test_damaged_record_stops_its_own_log_only(store: JournalStore, disk: SimDisk) -> None:
    """Bit rot in a record: its log gives what is before it and then says so; others go on."""
    for seq in range(1, 6):
        put(store, 1, 1, seq, bytes([seq]) * 3000)
        put(store, 2, 1, seq, bytes([seq]) * 3000)
    stored = store._logs[1].runs[1].records[2]
    assert stored is not None
    disk.rot(segment_name(0), stored.offset + 1234)
    for each in lives(store, disk):
        assert [seq for seq, _ in each.read(1, 1, 1, 6000)] == [1, 2]
        for first in (1, 3):
            with pytest.raises(Corruption):
                each.read(1, 1, first, 100_000)
        assert len(tail(each, 1, 1, 4)) == 2
        assert len(tail(each, 2, 1, 1)) == 5
    put(each, 1, 1, 6, b"goes on")
    each.cut(1, 1, 3)
    assert len(tail(each, 1, 1, 4)) == 3


def test_damaged_record_is_not_moved(store: JournalStore, disk: SimDisk) -> None:
    """A segment with a damaged record stays as it is until that record is cut."""
    put(store, 1, 1, 1, b"rots" * 500)
    put(store, 2, 1, 1, b"stays")
    stored = store._logs[1].runs[1].records[0]
    assert stored is not None
    disk.rot(segment_name(0), stored.offset)
    for seq in range(1, 300):
        put(store, 9, 1, seq, bytes(5000))
        store.cut(9, 1, seq - 1)
    with pytest.raises(Corruption):
        store.read(1, 1, 1, 10_000)
    store.cut(1, 1, 1)
    for seq in range(300, 400):
        put(store, 9, 1, seq, bytes(5000))
        store.cut(9, 1, seq - 1)
    assert tail(store, 2, 1, 1) == {1: b"stays"}


def rot_directory(store: JournalStore, disk: SimDisk, volume: int, seq: int) -> SimDisk:
    """Damage the directory of the group in which a record is."""
    stored = store._logs[volume].runs[1].records[seq - 1]
    assert stored is not None
    disk.rot(segment_name(stored.segment), stored.offset // 4096 * 4096 + 20)
    return disk.kill()


def test_damaged_directory(store: JournalStore, disk: SimDisk) -> None:
    """Whose records are lost with a directory: those with a gap, and those that might have one."""
    for seq in (1, 2, 3):
        for volume in (1, 2):
            put(store, volume, 1, seq, bytes(100))
    put(store, 3, 1, 1, b"before")
    put(store, 1, 1, 4, b"lost")
    put(store, 1, 1, 5, b"after")
    put(store, 2, 1, 4, b"after")
    again = open_store(rot_directory(store, disk, 1, 4))
    assert again.fenced(1) == Fence(1, 1, 5, True)
    assert len(again.read(1, 1, 1, 100_000)) == 3
    with pytest.raises(Corruption):
        again.read(1, 1, 4, 1000)
    with pytest.raises(Corruption):
        again.append(1, 1, 4, [b"lost"])
    # Nothing is missing between its records, and one of them came later.
    assert again.fenced(2) == Fence(1, 1, 4, False)
    assert len(tail(again, 2, 1, 1)) == 4
    put(again, 2, 1, 5, b"goes on")
    # Nobody can tell whether the lost record was one of its.
    assert again.fenced(3).damaged
    assert again.read(3, 1, 1, 1000) == [(1, b"before")]
    with pytest.raises(Corruption):
        again.read(3, 1, 2, 1000)
    with pytest.raises(Corruption):
        again.append(3, 1, 2, [b"x"])
    # What a new session has put there is whole, before a head of its own covers what was lost too.
    assert fence(again, 3, 2).damaged
    put(again, 3, 2, 1, b"a new session")
    assert again.fenced(3) == Fence(2, 1, 1, False)
    put(again, 1, 2, 1, b"a new session")
    assert again.fenced(1) == Fence(2, 1, 1, False)
    again.cut(3, 2, 1)
    assert not again.fenced(3).damaged


def test_damaged_directory_at_the_end_of_a_segment(store: JournalStore, disk: SimDisk) -> None:
    """A segment that ends before it should is noticed: a later group tells where it ends."""
    seq = 1
    while store.stats().segments - store.stats().segments_free < 2:
        put(store, 1, 1, seq, bytes(5000))
        seq += 1
    put(store, 2, 1, 1, b"later")
    last = seq - 2
    stored = store._logs[1].runs[1].records[last - 1]
    assert stored is not None and stored.segment == 0
    again = open_store(rot_directory(store, disk, 1, last))
    assert again.fenced(1).damaged
    with pytest.raises(Corruption):
        tail(again, 1, 1, 1)
    assert tail(again, 2, 1, 1) == {1: b"later"}


def test_damage_in_the_last_group_before_a_close(store: JournalStore, disk: SimDisk) -> None:
    """An orderly end tells damage in the last group from a torn write."""
    put(store, 1, 1, 1, b"x" * 100)
    stored = store._logs[1].runs[1].records[0]
    assert stored is not None
    store.close()
    disk.rot(segment_name(0), stored.offset)
    with pytest.raises(Corruption):
        open_store(disk.crash()).read(1, 1, 1, 100)


@pytest.mark.parametrize("rotten", HEADER_COPIES)
def test_a_header_with_a_rotten_copy_has_two_again_when_it_was_opened(
    store: JournalStore, disk: SimDisk, rotten: int
) -> None:
    """Else the next one that rots, years later, keeps the node from starting."""
    put(store, 1, 1, 1, b"a")
    for copy in 2 * sorted(HEADER_COPIES, key=lambda copy: copy != rotten):
        disk.rot(segment_name(0), copy + 9)
        disk = disk.crash()
        assert tail(open_store(disk), 1, 1, 1) == {1: b"a"}
        disk = disk.crash()


def test_header_has_two_copies(store: JournalStore, disk: SimDisk) -> None:
    """One rotten copy of a segment's header does no harm, two are refused."""
    put(store, 1, 1, 1, b"x")
    disk.rot(segment_name(0), HEADER_COPIES[0] + 9)
    disk = disk.crash()
    assert tail(open_store(disk), 1, 1, 1) == {1: b"x"}
    for copy in HEADER_COPIES:
        disk.rot(segment_name(0), copy + 9)
    with pytest.raises(Corruption, match="header"):
        open_store(disk.crash())


def test_missing_segment_is_refused(store: JournalStore, disk: SimDisk) -> None:
    """A journal without one of its files does not open as if it were whole."""
    for seq in range(1, 30):
        put(store, 1, 1, seq, bytes(5000))
        store.cut(1, 1, max(0, seq - 5))
    disk.unlink(segment_name(0))
    with pytest.raises(Corruption, match="missing"):
        open_store(disk.kill())


def without_last_segment(disk: SimDisk) -> SimDisk:
    """The disk after a power cut that cost the file with the highest number."""
    disk = disk.crash()
    disk.unlink(max(disk.listdir()))
    return disk


def fill_until(store: JournalStore, ready: Callable[[], bool]) -> None:
    """Append records, of which the last six are needed, until something is so."""
    for seq in range(1, 1000):
        put(store, 1, 1, seq, bytes(12_000))
        store.cut(1, 1, max(0, seq - 6))
        if ready():
            return
    raise AssertionError("never so")


def last_segment(store: JournalStore) -> str:
    """What the segment with the highest number is, if there are several."""
    last = store._segments[-1]
    if len(store._segments) == 1:
        return "the only one"
    return "free" if last in store._free else "active" if last is store._active else "sealed"


@pytest.mark.parametrize("state", ["free", "active", "sealed"])
def test_loss_of_the_last_segment_is_refused(
    store: JournalStore, disk: SimDisk, state: str
) -> None:
    """No name shows that it was there: the first segment tells, before and after its reuse."""
    fill_until(store, lambda: last_segment(store) == state)
    assert (store._segments[0].generation > 1) == (state != "free")
    with pytest.raises(Corruption, match="missing"):
        open_store(without_last_segment(disk))


@pytest.mark.parametrize("state", ["active", "sealed"])
def test_loss_of_the_last_segment_of_an_older_journal(
    store: JournalStore, disk: SimDisk, state: str
) -> None:
    """Its first segment does not tell: tables name what is sealed, and opening it mends that."""
    fill_until(store, lambda: last_segment(store) == state)
    first = disk.open(segment_name(0))
    header = parse_segment_header(first.pread(HEADER_SIZE, 0), "")
    assert header.segments == len(store._segments)
    first.pwrite(pack_segment_header(header._replace(segments=0)), 0)
    first.fdatasync()
    disk = disk.crash()
    if state == "active":
        open_store(disk)
    with pytest.raises(Corruption, match="missing"):
        open_store(without_last_segment(disk))


def test_the_first_segment_tells_wherever_the_power_goes() -> None:
    """A segment that is in use is told of, however often its making was cut off."""
    cut = 0
    was_cut = True
    while was_cut:
        disk = SimDisk(random.Random(cut))
        store = open_store(disk)
        disk.cut_before(cut)
        try:
            fill_until(store, lambda store=store: len(store._segments) == 3)  # type: ignore[misc]
            was_cut = False
        except PowerCut:
            pass
        disk = disk.crash()
        again = open_store(disk)
        put(again, 2, 1, 1, b"x")
        if len(again._segments) > 1:
            with pytest.raises(Corruption, match="missing"):
                open_store(without_last_segment(disk))
        cut += 1
    assert cut > 10


def test_segments_of_two_journals_are_refused(disk: SimDisk) -> None:
    """A file of another journal is not taken for one of this."""
    for seed, name in ((1, 0), (2, 1)):
        other = SimDisk(random.Random(seed))
        store = JournalStore.open(other, limits=LIMITS, rng=random.Random(seed))
        put(store, 1, 1, 1, b"x")
        data = other.open(segment_name(0)).pread(SEGMENT, 0)
        disk.open(segment_name(name), create=True).pwrite(data, 0)
    with pytest.raises(Corruption, match="does not belong"):
        open_store(disk)


def test_failed_sync_is_final(store: JournalStore, disk: SimDisk) -> None:
    """After a failed sync nothing is taken, nor written, nor acknowledged any more."""
    put(store, 1, 1, 1, b"x")
    disk.inject("sync")
    ticket = store.append(1, 1, 2, [b"y"])
    assert isinstance(outcome(store, ticket), OutcomeUnknown)
    assert store.failure is not None
    for call in (
        lambda: store.append(1, 1, 3, [b"z"]),
        lambda: store.fence(2, 1),
        lambda: store.cut(1, 1, 1),
        lambda: store.drop(1),
    ):
        with pytest.raises(Closed, match="failed"):
            call()
    assert store.next_step() is None
    assert tail(store, 1, 1, 1) == {1: b"x"}
    store.close()
    again = open_store(disk.crash())
    assert tail(again, 1, 1, 1) in ({1: b"x"}, {1: b"x", 2: b"y"})


def test_step_runs_once_and_fails_for_good(store: JournalStore, disk: SimDisk) -> None:
    """A worker that takes over a step learns what the one before it met."""
    put(store, 1, 1, 1, b"x")
    store.append(1, 1, 2, [b"y"])
    step = store.next_step()
    assert step is not None
    before = disk.operations
    step.run()
    step.run()
    assert disk.operations == before + 2
    assert store.next_step() is None
    store.end_step(step)
    with pytest.raises(Invalid, match="ended"):
        store.end_step(step)
    disk.inject("sync")
    store.append(1, 1, 3, [b"z"])
    step = store.next_step()
    assert step is not None
    for _ in range(2):
        with pytest.raises(OSError, match="sync"):
            step.run()


def test_full_disk_is_out_of_space() -> None:
    """A journal that cannot grow uses what it has, and then refuses; nothing is lost."""
    disk = SimDisk(random.Random(1), capacity_bytes=3 * SEGMENT)
    store = open_store(disk)
    records: dict[int, bytes] = {}
    seq = 1
    with pytest.raises(OutOfSpace, match="no room"):
        while True:
            put(store, 1, 1, seq, bytes([seq]) * 3000)
            records[seq] = bytes([seq]) * 3000
            seq += 1
    assert len(records) > 10
    assert "full" in store.stats().no_growth
    assert tail(store, 1, 1, 1) == records
    store.cut(1, 1, seq - 3)
    put(store, 1, 1, seq, b"goes on")
    assert sorted(tail(open_store(disk.crash()), 1, 1, seq - 2)) == [seq - 2, seq - 1, seq]


def test_disk_without_any_room() -> None:
    """The first record is refused as out of space, not as a broken disk."""
    disk = SimDisk(random.Random(1), capacity_bytes=SEGMENT // 2)
    store = open_store(disk)
    for _ in range(2):
        assert isinstance(outcome(store, store.append(1, 1, 1, [b"x"])), OutOfSpace)
    assert store.failure is None and "full" in store.stats().no_growth
    assert store.volumes() == []
    disk.capacity_bytes = 4 * SEGMENT
    assert not store.stats().no_growth
    put(store, 1, 1, 1, b"x")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE])
def test_a_journal_that_cannot_make_a_file_says_why(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever room there is; and its status does not end it where the disk gives an error."""
    disk = SimDisk(random.Random(1))
    store = open_store(disk)
    opened = disk.open

    def denied(path: str, **options: Any) -> Any:
        if options.get("create"):
            raise OSError(error, os.strerror(error), path)
        return opened(path, **options)

    monkeypatch.setattr(disk, "open", denied)
    assert isinstance(outcome(store, store.append(1, 1, 1, [b"x"])), OutOfSpace)
    assert os.strerror(error) in store.stats().no_growth
    monkeypatch.undo()
    put(store, 1, 1, 1, b"x")
    assert not store.stats().no_growth


def test_status_of_a_full_disk_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not end the journal."""
    disk = SimDisk(random.Random(1), capacity_bytes=SEGMENT // 2)
    store = open_store(disk)
    assert isinstance(outcome(store, store.append(1, 1, 1, [b"x"])), OutOfSpace)
    monkeypatch.setattr(disk, "free_bytes", Mock(side_effect=OSError(errno.EIO, "error")))
    assert "full" in store.stats().no_growth


def test_waiting_is_bounded(store: JournalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes faster than the disk is told so."""
    monkeypatch.setattr(journal, "WAITING_BYTES_MAX", 5000)
    store.append(1, 1, 1, [bytes(4000)])
    with pytest.raises(Overloaded):
        store.append(1, 1, 2, [bytes(4000)])
    store.settle()
    put(store, 1, 1, 2, bytes(4000))


def test_close_fails_what_waits_and_keeps_cuts(store: JournalStore, disk: SimDisk) -> None:
    """Closing acknowledges nothing that is not durable; what was cut does not come back."""
    put(store, 1, 1, 1, b"x")
    put(store, 1, 1, 2, b"y")
    store.cut(1, 1, 1)
    ticket = store.append(1, 1, 3, [b"z"])
    assert ticket is not None
    failures: list[Exception | None] = []
    ticket.waiters.append(failures.append)
    store.close()
    assert isinstance(failures[0], Closed)
    with pytest.raises(Closed, match="closed"):
        store.append(1, 1, 3, [b"z"])
    store.close()
    assert open_store(disk.crash()).fenced(1) == Fence(1, 2, 2, False)


def test_identity(disk: SimDisk) -> None:
    """A journal is the same after a restart, and another one after it was lost."""
    store = open_store(disk)
    put(store, 1, 1, 1, b"x")
    assert open_store(disk.crash()).identity == store.identity
    other = JournalStore.open(SimDisk(random.Random(1)), limits=LIMITS, rng=random.Random(2))
    assert other.identity != store.identity


def test_unfinished_segment_is_made_anew(store: JournalStore, disk: SimDisk) -> None:
    """What an interrupted making of a segment left is thrown away."""
    put(store, 1, 1, 1, b"x")
    disk.open(f"{segment_name(1)}.new", create=True).pwrite(b"half", 0)
    again = open_store(disk.kill())
    for seq in range(2, 30):
        put(again, 1, 1, seq, bytes(3000))
    assert len(tail(again, 1, 1, 1)) == 29


def test_small_journals_stay_small(store: JournalStore) -> None:
    """A journal with little in it takes one segment of the disk, an unused one takes none."""
    assert store.next_step() is None
    assert store.stats().segments == 0
    put(store, 1, 1, 1, b"x")
    assert store.stats().segments == 1


def test_numbers_are_checked(store: JournalStore) -> None:
    """What does not fit the format is refused."""
    too_large = LIMITS.record_bytes_max + 1
    for volume, epoch, seq, size in (
        (0, 1, 1, 1),
        (1, 0, 1, 1),
        (1, 1 << 64, 1, 1),
        (1, 1, (1 << 64) - 1, 1),
        (1, 1, 1, too_large),
    ):
        with pytest.raises(Invalid):
            store.append(volume, epoch, seq, [bytes(size)])
    put(store, 1, 1, 1, bytes(too_large - 1))


def test_limits() -> None:
    """What a node gives its journal is a part of its size, within bounds."""
    assert JournalLimits.of_node(None).journal_bytes_max == JOURNAL_BYTES_MAX
    assert JournalLimits.of_node(64 << 20).segments_max == 4
    assert JournalLimits.of_node(1 << 40).journal_bytes_max == JOURNAL_BYTES_MAX
    for segment, total in ((SEGMENT + 1, 10 * SEGMENT), (4096, 1 << 20), (SEGMENT, 3 * SEGMENT)):
        with pytest.raises(Invalid):
            JournalLimits(segment, total)


def test_room_is_shared_by_the_volumes_in_use() -> None:
    """Two may fill their part, and more leave less to each; what was cut counts no more."""
    store = open_store(SimDisk(random.Random(1)))
    all_of_it = LIMITS.live_bytes_max
    assert store.room == all_of_it // 2
    for volume in range(1, 4):
        put(store, volume, 1, 1, b"x")
    assert store.room == all_of_it // 4
    for volume in range(1, 4):
        store.cut(volume, 1, 1)
    assert store.room == all_of_it // 2


def test_on_a_real_disk(tmp_path: Path) -> None:
    """The same files work on the operating system's disk, from another thread too."""
    store = JournalStore.open(RealDisk(tmp_path), limits=LIMITS, rng=random.Random(1))
    for seq in range(1, 200):
        store.append(1, 1, seq, [bytes([seq]) * 3000])
        worker = threading.Thread(target=store.settle)
        worker.start()
        worker.join()
        store.cut(1, 1, max(0, seq - 10))
    store.close()
    again = JournalStore.open(RealDisk(tmp_path), limits=LIMITS, rng=random.Random(1))
    assert tail(again, 1, 1, 190) == {seq: bytes([seq]) * 3000 for seq in range(190, 200)}
    assert (tmp_path / segment_name(0)).stat().st_size == SEGMENT > HEADER_SIZE
    again.close()


def test_a_segment_that_cannot_be_made_now_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no file descriptor left: the journal goes on in the segments it has."""
    disk = SimDisk(random.Random(1))
    store = open_store(disk)
    put(store, 1, 1, 1, b"first")
    opening = disk.open

    def short(path: str, *, create: bool = False) -> File:
        if create:
            raise OSError(errno.EMFILE, "too many open files", path)
        return opening(path, create=create)

    refused = 0
    with monkeypatch.context() as patch:
        patch.setattr(disk, "open", short)
        for seq in range(2, 30):
            try:
                put(store, 1, 1, seq, bytes([seq]) * 3000)
            except OutOfSpace:
                refused += 1
                break
    assert refused and store.failure is None
    put(store, 1, 1, seq, b"goes on")
    assert tail(store, 1, 1, seq) == {seq: b"goes on"}
    assert store.failure is None
