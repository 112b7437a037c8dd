"""The oracle and the checker: what they allow, and what they do not."""

# ruff: noqa: D102, D103 - what is no test needs none

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import Keys
from torus_actors.metadata.kv import Delete, Put
from torus_actors.metadata.records import Epoch, Lock
from torus_actors.scenarios.checks import Checker
from torus_actors.scenarios.oracle import SECTOR, Session, VolumeOracle, stamp

SIZE = 16 * SECTOR


class Judged:
    """An oracle with one volume, and what it complained of."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.oracle = VolumeOracle(3, SIZE, self.complaints.append)

    def open(self, name: str, content: bytes = bytes(SIZE), epoch: int = 0) -> Session:
        session = self.oracle.open(name, epoch)
        session.verify(0, content)
        return session


@pytest.fixture
def judged() -> Judged:
    return Judged()


def write(session: Session, sector: int, done: bool = True) -> bytes:
    begun = session.begin_write(sector * SECTOR, SECTOR)
    if done:
        session.write_done(begun)
    return begun.data


def flush(session: Session) -> None:
    session.flush_done(session.begin_flush())


def content(**sectors: bytes) -> bytes:
    data = bytearray(SIZE)
    for name, sector in sectors.items():
        at = int(name[1:]) * SECTOR
        data[at : at + SECTOR] = sector
    return bytes(data)


def test_what_was_written_last_is_read(judged: Judged) -> None:
    """The acknowledged write is right, the one before it is not, nor is a torn sector."""
    session = judged.open("a")
    old, new = write(session, 1), write(session, 1)
    session.check_read(SECTOR, new)
    assert judged.complaints == []
    session.check_read(SECTOR, old)
    session.check_read(SECTOR, new[:256] + old[256:])
    session.check_read(0, new)
    assert len(judged.complaints) == 3 and "torn" in judged.complaints[1]


def test_a_write_without_answer_may_or_may_not_be_there(judged: Judged) -> None:
    """Both the value before and the attempted one are right, until the next acknowledged one."""
    session = judged.open("a")
    first = write(session, 1)
    lost = write(session, 1, done=False)
    session.check_read(SECTOR, first)
    session.check_read(SECTOR, lost)
    write(session, 1)
    assert judged.complaints == []
    session.check_read(SECTOR, lost)
    assert len(judged.complaints) == 1


def test_zeros_are_a_value_like_others(judged: Judged) -> None:
    """After an acknowledged trim zeros are read and nothing else."""
    session = judged.open("a")
    data = write(session, 1)
    session.write_done(session.begin_write(SECTOR, SECTOR, zeros=True))
    session.check_read(SECTOR, bytes(SECTOR))
    assert judged.complaints == []
    session.check_read(SECTOR, data)
    assert len(judged.complaints) == 1


def test_after_a_crash_the_flushed_value_or_a_later_one(judged: Judged) -> None:
    """The next client may find any value since the flush; what was before it is lost data."""
    session = judged.open("a")
    before = write(session, 1)
    flushed = write(session, 1)
    flush(session)
    later = [write(session, 1) for _ in range(3)]
    for value in (flushed, *later):
        assert judged.oracle.after_crash(1)[0] == 2
        judged.oracle.check(SECTOR, value, judged.oracle.after_crash, "b")
    assert judged.complaints == []
    judged.oracle.check(SECTOR, before, judged.oracle.after_crash, "b")
    judged.oracle.check(SECTOR, bytes(SECTOR), judged.oracle.after_crash, "b")
    assert len(judged.complaints) == 2


def test_what_the_next_client_finds_becomes_the_truth(judged: Judged) -> None:
    """Of the values that were possible only the one found is right from then on."""
    session = judged.open("a")
    values = [write(session, 1) for _ in range(3)]
    second = judged.open("b", content(s1=values[1]))
    second.check_read(SECTOR, values[1])
    assert judged.complaints == []
    second.check_read(SECTOR, values[2])
    assert len(judged.complaints) == 1


def test_a_flush_covers_what_was_acknowledged_when_it_was_asked_for(judged: Judged) -> None:
    """A write acknowledged while the flush was under way may still be lost."""
    session = judged.open("a")
    covered = write(session, 1)
    begun = session.begin_flush()
    write(session, 1)
    unanswered = write(session, 2, done=False)
    session.flush_done(begun)
    judged.open("b", content(s1=covered))
    assert judged.complaints == []
    assert unanswered != bytes(SECTOR)


def test_a_fenced_client_changes_nothing(judged: Judged) -> None:
    """What it writes after another client came may not be seen, and its flush may not succeed."""
    first = judged.open("a")
    second = judged.open("b")
    data = write(first, 1)
    begun = first.begin_flush()
    second.check_read(SECTOR, data)
    assert len(judged.complaints) == 1
    first.flush_done(begun)
    assert len(judged.complaints) == 2 and "fenced" in judged.complaints[1]


def test_a_late_answer_to_a_flush_must_be_true(judged: Judged) -> None:
    """A flush answered after another client came: that one must have found what it covers."""
    for found, complaints in ((1, 0), (0, 1)):
        judged = Judged()
        first = judged.open("a")
        values = [write(first, 1)]
        begun = first.begin_flush()
        judged.open("b", content(s1=values[0]) if found else content())
        first.flush_done(begun)
        assert len(judged.complaints) == complaints


@pytest.mark.parametrize("way", ["opened", "cut"])
def test_an_answer_to_a_flush_must_be_true_also_before_somebody_looks(way: str) -> None:
    """The client was fenced when the flush was answered; the next one reads the volume later."""
    for found, complaints in ((1, 0), (0, 1)):
        judged = Judged()
        first = judged.open("a")
        value = write(first, 1)
        begun = first.begin_flush()
        if way == "cut":
            judged.oracle.resize(SIZE // 2, 1)
            first.flush_done(begun)
        second = judged.oracle.open("b", 2)
        if way == "opened":
            first.flush_done(begun)
        assert judged.complaints == []
        second.verify(0, content(s1=value)[: second.size] if found else bytes(second.size))
        assert len(judged.complaints) == complaints


def test_stamps_differ_by_volume_sector_and_write() -> None:
    """A sector in the wrong place, or of another volume, is not taken for the right one."""
    made = {stamp(v, s, n) for v in range(3) for s in range(3) for n in range(1, 4)}
    assert len(made) == 27 and all(len(data) == SECTOR for data in made)


def test_who_slept_while_it_opened_is_fenced_from_the_start(judged: Judged) -> None:
    """It may see old data, for a later session has written since; and a flush of it must fail."""
    first = judged.oracle.open("first", 3)
    first.verify(0, bytes(SIZE))
    new = write(first, 1)
    flush(first)
    slow = judged.oracle.open("slow", 2)
    slow.verify(0, bytes(SIZE))
    slow.check_read(SECTOR, bytes(SECTOR))
    assert slow.fenced and not first.fenced
    first.check_read(SECTOR, new)
    assert judged.complaints == []
    write(slow, 1)
    flush(slow)
    assert len(judged.complaints) == 1 and "fenced" in judged.complaints[0]
    first.check_read(SECTOR, new)
    assert len(judged.complaints) == 1


def test_what_was_read_is_not_taken_back(judged: Judged) -> None:
    """After a write without an answer: once the new value was read, the old one is wrong."""
    session = judged.open("a")
    old = write(session, 1)
    lost, later = (write(session, 1, done=False) for _ in range(2))
    session.check_read(SECTOR, old)
    session.check_read(SECTOR, lost)
    session.check_read(SECTOR, later)
    assert judged.complaints == []
    session.check_read(SECTOR, lost)
    session.check_read(SECTOR, old)
    assert len(judged.complaints) == 2
    flush(session)
    session.check_read(SECTOR, later)
    session.check_read(SECTOR, write(session, 1))
    flush(session)
    assert len(judged.complaints) == 2
    judged.open("b", content(s1=later))
    assert len(judged.complaints) == 3, "it was overwritten, and that was flushed"


def test_a_crash_may_take_back_what_was_read(judged: Judged) -> None:
    """It was not flushed."""
    session = judged.open("a")
    old = write(session, 1)
    flush(session)
    lost = write(session, 1, done=False)
    session.check_read(SECTOR, lost)
    judged.open("b", content(s1=old)).check_read(SECTOR, old)
    assert judged.complaints == []


@pytest.mark.parametrize("found", [False, True])
def test_a_flush_of_a_fenced_client_stands_for_what_it_wrote_before(found: bool) -> None:
    """Asked for after another client came, it succeeds only if that one has found all of it."""
    judged = Judged()
    first = judged.open("a")
    value = write(first, 1)
    judged.open("b", content(s1=value) if found else content())
    flush(first)
    assert len(judged.complaints) == (not found)


def test_a_late_answer_counts_where_nobody_has_looked_yet(judged: Judged) -> None:
    """A flush answered while the next client reads what it has opened: that one must find it."""
    first = judged.open("a")
    value = write(first, 1)
    begun = first.begin_flush()
    second = judged.oracle.open("b")
    first.flush_done(begun)
    second.verify(0, content())
    assert len(judged.complaints) == 1 and "sector 1 read by b" in judged.complaints[0]
    second.check_read(SECTOR, bytes(SECTOR))
    assert value != bytes(SECTOR)


def test_a_late_answer_must_be_true_for_the_client_after_the_next(judged: Judged) -> None:
    """The next one died before it had looked: what the one after it finds counts."""
    first = judged.open("a")
    write(first, 1)
    begun = first.begin_flush()
    judged.oracle.open("b")
    judged.open("c")
    assert judged.complaints == []
    first.flush_done(begun)
    assert len(judged.complaints) == 1


def test_zeros_over_zeros_are_the_newest(judged: Judged) -> None:
    """A trim that is told late to be durable, of what was zeros before, is no complaint."""
    first = judged.open("a")
    first.write_done(first.begin_write(SECTOR, SECTOR, zeros=True))
    begun = first.begin_flush()
    judged.open("b")
    first.flush_done(begun)
    assert judged.complaints == []


# -- readers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [2, 3, 4])
def test_a_reader_has_what_was_durable_or_anything_later(judged: Judged, sequence: int) -> None:
    """Acknowledged before it began to open the volume, or begun before it had done so."""
    session = judged.open("a")
    write(session, 1)
    write(session, 1)
    flush(session)
    write(session, 1)
    reading = judged.oracle.begin_reading()
    write(session, 1, done=False)
    judged.oracle.end_reading(reading)
    judged.oracle.end_reading(reading)
    write(session, 1)
    reading.check(SECTOR, stamp(3, 1, sequence), "r")
    assert judged.complaints == []


@pytest.mark.parametrize("sequence", [1, 4, 5])
def test_a_reader_has_nothing_else(judged: Judged, sequence: int) -> None:
    """Neither what was overwritten and flushed, nor what was begun later, nor anything else."""
    session = judged.open("a")
    write(session, 1)
    write(session, 1)
    flush(session)
    reading = judged.oracle.begin_reading()
    judged.oracle.end_reading(reading)
    write(session, 2)
    write(session, 1)
    reading.check(SECTOR, stamp(3, 1, sequence), "r")
    assert len(judged.complaints) == 1 and "allowed are [2]" in judged.complaints[0]


def test_what_a_reader_reads_stays(judged: Judged) -> None:
    """Also where it might have been another value in the beginning."""
    session = judged.open("a")
    values = [write(session, 1) for _ in range(2)]
    reading = judged.oracle.begin_reading()
    judged.oracle.end_reading(reading)
    reading.check(0, bytes(SECTOR) + values[0], "r")
    reading.check(SECTOR, values[0], "r")
    assert judged.complaints == []
    reading.check(SECTOR, values[1], "r")
    assert len(judged.complaints) == 1 and "and was write 1" in judged.complaints[0]


@pytest.mark.parametrize("later_first", [False, True])
def test_what_a_reader_reads_is_of_one_moment(later_first: bool) -> None:
    """With a write it has all that was durable when that was begun, in whatever order it reads."""
    for older in (False, True):
        judged = Judged()
        session = judged.open("a")
        reading = judged.oracle.begin_reading()
        first = write(session, 1)
        flush(session)
        second = write(session, 2)
        judged.oracle.end_reading(reading)
        parts = [(1, bytes(SECTOR) if older else first), (2, second)]
        for sector, data in reversed(parts) if later_first else parts:
            reading.check(sector * SECTOR, data, "r")
        assert len(judged.complaints) == older


def test_a_reader_may_have_any_part_of_what_was_not_durable(judged: Judged) -> None:
    """A write without an earlier one; and zeros, which do not say whose they are."""
    session = judged.open("a")
    reading = judged.oracle.begin_reading()
    write(session, 1)
    second = write(session, 2)
    begun = session.begin_write(3 * SECTOR, SECTOR, zeros=True)
    session.write_done(begun)
    flush(session)
    judged.oracle.end_reading(reading)
    reading.check(0, content(s2=second), "r")
    assert judged.complaints == []


def test_of_two_clients_nobody_knows_what_was_durable_in_between(judged: Judged) -> None:
    """A reader that opened the volume meanwhile may have seen either; but nothing else."""
    session = judged.open("a")
    first = write(session, 1)
    reading = judged.oracle.begin_reading()
    second = judged.open("b", content(s1=first))
    flush(second)
    later = write(second, 2)
    judged.oracle.end_reading(reading)
    reading.check(0, content(s2=later), "r")
    assert judged.complaints == []
    reading.check(SECTOR, later, "r")
    assert len(judged.complaints) == 1


# -- sizes -----------------------------------------------------------------------------------------


def test_what_is_cut_off_is_gone_and_nothing_else(judged: Judged) -> None:
    """When the volume has grown again there are zeros, of what was durable and of what was not."""
    session = judged.open("a")
    kept, gone = write(session, 1), write(session, 12)
    flush(session)
    write(session, 13)
    judged.oracle.resize(SIZE // 2, 1)
    judged.oracle.resize(SIZE, 1)
    assert judged.oracle.sizes == [SIZE, SIZE // 2, SIZE]
    judged.open("b", content(s1=kept), epoch=2)
    assert judged.complaints == []
    judged.open("c", content(s1=kept, s12=gone), epoch=3)
    assert len(judged.complaints) == 1
    judged.open("d", content(), epoch=4)
    assert len(judged.complaints) == 2


def test_who_had_a_volume_open_that_was_cut_is_fenced(judged: Judged) -> None:
    """And whoever opened it before that, and looks at it only now."""
    session = judged.oracle.open("a", 1)
    session.verify(0, bytes(SIZE))
    judged.oracle.resize(SIZE // 2, 3)
    late = judged.oracle.open("b", 2, SIZE)
    assert session.fenced and late.fenced
    write(session, 1)
    flush(session)
    assert len(judged.complaints) == 1 and "fenced" in judged.complaints[0]
    assert not judged.oracle.open("c", 4).fenced


def test_a_session_has_the_size_that_the_volume_had(judged: Judged) -> None:
    """It grows while somebody has it open, who sees that only when they open it again."""
    session = judged.oracle.open("a", 1)
    judged.oracle.resize(2 * SIZE, 0)
    session.verify(0, bytes(SIZE))
    assert session.verified and not session.fenced
    data = write(session, 1)
    flush(session)
    again = judged.oracle.open("b", 2)
    again.verify(0, content(s1=data) + bytes(SIZE))
    assert again.verified and judged.complaints == []


def test_a_snapshot_during_a_cut_may_have_zeros_behind_it(judged: Judged) -> None:
    """Made before or after the volume was cut and grew again; before the cut nothing changes."""
    session = judged.open("a", epoch=1)
    for sector in (3, 9):
        write(session, sector)
    flush(session)
    taking = judged.oracle.begin_snapshot()
    before = {sector: taking.loose(sector) for sector in (3, 9)}
    judged.oracle.resize(8 * SECTOR, 2)
    judged.oracle.resize(SIZE, 2)
    assert taking.crossed
    assert taking.loose(3) == before[3] and 0 not in before[3]
    assert taking.loose(9) == [*before[9], 0]


def test_a_volume_that_went_back_has_what_the_snapshot_had(judged: Judged) -> None:
    """What came later is gone, flushed or not; and who had it open then is fenced."""
    session = judged.open("a", epoch=1)
    old = write(session, 1)
    flush(session)
    then = content(s1=old)
    new, _ = write(session, 1), write(session, 2)
    flush(session)
    late = write(session, 3)
    judged.oracle.restore(then, 2)
    assert session.fenced and judged.oracle.open("b", 1).fenced
    judged.open("c", then, epoch=3)
    assert judged.complaints == []
    judged.open("d", content(s1=new), epoch=4)
    judged.open("e", content(s3=late), epoch=5)
    assert len(judged.complaints) == 2
    write(session, 4)
    flush(session)
    assert len(judged.complaints) == 3 and "fenced" in judged.complaints[2]


def test_a_reader_beside_a_restore_has_what_was_there_before_or_after(judged: Judged) -> None:
    """And nothing that was gone before it opened the volume."""
    session = judged.open("a", epoch=1)
    old = write(session, 1)
    flush(session)
    gone = write(session, 1)
    flush(session)
    new = write(session, 1)
    flush(session)
    for found, complaints in ((old, 0), (new, 0), (gone, 1)):
        reading = judged.oracle.begin_reading()
        judged.oracle.restore(content(s1=old), 2)
        reading.check(0, content(s1=found), "reader")
        assert len(judged.complaints) == complaints
        judged.oracle.end_reading(reading)
        judged.oracle.restore(content(s1=new), 3)


# -- epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [5, 6])
def test_no_two_sessions_have_the_same_epoch(epoch: int) -> None:
    """Not those of one client either, and though it is written anew when a lock is given up."""
    now, complaints = 1.0, list[str]()
    cluster: Any = SimpleNamespace(
        store=SimpleNamespace(watchers=[]),
        node_watchers=[],
        flush_watchers=[],
        loop=SimpleNamespace(time=lambda: now),
        fail=complaints.append,
    )
    Checker(cluster)
    (happens,) = cluster.store.watchers
    keys = Keys()
    epoch_key, lock_key = keys.of(table.EPOCH, 1), keys.of(table.LOCK, 1)

    def begins(epoch: int) -> None:
        happens(Put(epoch_key, Epoch(epoch).encode()))
        happens(Put(lock_key, Lock("host:1", epoch, now, str(now)).encode()))

    begins(5)
    now = 2.0
    happens(Put(lock_key, Lock("host:1", 5, now, "under another lease").encode()))
    now = 3.0
    happens(Delete(lock_key))
    happens(Put(epoch_key, Epoch(5).encode()))
    now = 4.0
    happens(Put(lock_key, Lock("host:1", 5, now, "which is late").encode()))
    assert complaints == []
    now = 5.0
    begins(epoch)
    assert len(complaints) == (epoch == 5)
