"""The journal against a dictionary: any calls in any order, with restarts between them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torus_actors.errors import Corruption, Fenced, Invalid, NotExist, OutOfSpace
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import (
    COPY,
    FIRST,
    GROUP_MAGIC,
    HEADER_SIZE,
    RECORD,
    SEEN,
    STATE,
    Entry,
    Position,
    SegmentEnd,
    SegmentHeader,
    groups_of,
    pack_directory,
    pack_segment_header,
    pack_table,
    pages,
    parse_group,
    parse_segment_header,
    parse_table,
)
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.simdisk import SimDisk

LIMITS = JournalLimits(segment_bytes=64 << 10, journal_bytes_max=4 * (64 << 10))

volumes = st.integers(1, 3)
epochs = st.integers(1, 5)


class Model:
    """One volume, as a dictionary would keep it."""

    def __init__(self) -> None:
        self.promised = 0
        self.cut = Position(0, 0)
        self.records: dict[Position, bytes] = {}
        self.following: dict[int, int] = {}

    def cut_to(self, at: Position) -> None:
        """Forget up to here."""
        if at > self.cut:
            self.cut = at
            if at.epoch in self.following:
                self.following[at.epoch] = max(self.following[at.epoch], at.seq + 1)
            self.records = {key: data for key, data in self.records.items() if key > at}


class JournalMachine(RuleBasedStateMachine):
    """Every call is made durable before the next: the model then knows all answers exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimDisk(random.Random(1))
        self.store = self.opened()
        self.models = {volume: Model() for volume in range(1, 4)}

    def opened(self) -> JournalStore:
        """The journal of the disk."""
        return JournalStore.open(self.disk, limits=LIMITS, rng=random.Random(1))

    @rule(volume=volumes, epoch=epochs, skip=st.integers(0, 3), size=st.integers(0, 12_000))
    def append(self, volume: int, epoch: int, skip: int, size: int) -> None:
        """Append the next record, or one too far on."""
        model = self.models[volume]
        following = model.following.get(epoch)
        at = Position(epoch, skip if following is None else following + skip // 3)
        data = random.Random(size).randbytes(size)
        try:
            self.store.append(volume, *at, [data])
        except Fenced:
            assert epoch < model.promised
            return
        except Invalid:
            assert following is not None and at.seq != following
            return
        except OutOfSpace:
            assert self.store.stats().live_bytes + size + 64 > LIMITS.live_bytes_max
            return
        self.store.settle()
        assert epoch >= model.promised
        assert following is None or at.seq == following or at <= model.cut
        model.promised = epoch
        if at > model.cut:
            model.records[at] = data
            model.following[epoch] = at.seq + 1

    @rule(volume=volumes, epoch=epochs)
    def fence(self, volume: int, epoch: int) -> None:
        """Begin a session."""
        model = self.models[volume]
        try:
            self.store.fence(volume, epoch)
        except Fenced:
            assert epoch < model.promised
            return
        assert epoch >= model.promised
        self.store.settle()
        model.promised = epoch

    @rule(volume=volumes, epoch=epochs, upto=st.integers(0, 12))
    def cut(self, volume: int, epoch: int, upto: int) -> None:
        """Cut anywhere, also beyond the end."""
        model = self.models[volume]
        at = Position(epoch, upto)
        if epoch > model.promised:
            if model.promised and at > model.cut:
                with pytest.raises(Invalid):
                    self.store.cut(volume, *at)
            return
        self.store.cut(volume, *at)
        model.cut_to(at)

    @rule(volume=volumes)
    def drop(self, volume: int) -> None:
        """Delete a volume."""
        self.store.drop(volume)
        self.store.settle()
        self.models[volume] = Model()

    @rule(data=st.data())
    @precondition(lambda self: any(model.records for model in self.models.values()))
    def repeat(self, data: st.DataObject) -> None:
        """An answer was lost: the same record comes again, or another in its place."""
        volume = data.draw(st.sampled_from([v for v, m in self.models.items() if m.records]))
        model = self.models[volume]
        at = data.draw(st.sampled_from(sorted(model.records)))
        if at.epoch == model.promised:
            assert self.store.append(volume, *at, [model.records[at]]) is None
            with pytest.raises(Invalid):
                self.store.append(volume, *at, [model.records[at] + b"!"])
        else:
            with pytest.raises(Fenced):
                self.store.append(volume, *at, [model.records[at]])

    @rule(how=st.sampled_from(["close", "kill", "crash"]))
    def restart(self, how: str) -> None:
        """End, in one way or another, and begin again; what was cut may be back."""
        if how == "close":
            self.store.close()
        self.disk = self.disk.crash() if how == "crash" else self.disk.kill()
        cuts = {volume: model.cut for volume, model in self.models.items()}
        self.store = self.opened()
        for volume, model in self.models.items():
            log = self.store._logs.get(volume)
            there = dict(log.live()) if log is not None else {}
            assert set(model.records) <= set(there)
            assert all(at <= cuts[volume] for at in set(there) - set(model.records))
            # Cut again, as the next checkpoint of its session would.
            if log is not None and cuts[volume] > log.cut:
                self.store.cut(volume, *cuts[volume])
            known = log is not None and log.tail.epoch == model.promised
            for epoch in list(model.following):
                if epoch != model.promised or not known:
                    del model.following[epoch]

    @invariant()
    def same(self) -> None:
        """The store reads as the model does."""
        for volume, model in self.models.items():
            found = self.store.fenced(volume)
            assert not found.damaged
            newest = max((at.epoch for at in model.records), default=0)
            numbers = sorted(at.seq for at in model.records if at.epoch == newest)
            if not numbers:
                assert found == (0, 0, 0, False)
            else:
                assert found == (newest, numbers[0], numbers[-1], False)
            for at, data in model.records.items():
                assert self.store.read(volume, *at, 1)[0] == (at.seq, data)
            if model.cut > (0, 0):
                with pytest.raises(NotExist):
                    self.store.read(volume, *model.cut, 1)
        stats = self.store.stats()
        assert stats.records == sum(len(model.records) for model in self.models.values())
        needed = sum(len(d) + 64 for model in self.models.values() for d in model.records.values())
        assert stats.live_bytes == needed
        assert stats.waiting == 0
        assert stats.segments <= stats.segments_max


TestJournalModel = JournalMachine.TestCase
TestJournalModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
entries = st.builds(
    Entry,
    kind=st.sampled_from([RECORD, COPY, STATE]),
    flags=st.sampled_from([0, FIRST, SEEN, FIRST | SEEN]),
    volume=u64,
    epoch=u64,
    seq=u64,
    cut=st.builds(Position, u64, u64),
    dropped=u64,
    crc=u32,
    offset=u32,
    length=u32,
)


@given(st.lists(entries, max_size=80), u32, u32, u64, u64, st.data())
def test_directory_round_trip(
    rows: list[Entry], seed: int, segment: int, generation: int, first: int, data: Any
) -> None:
    """A group's directory reads as written, and with any one byte changed not at all."""
    length = pages(64 + 64 * len(rows))
    packed = pack_directory(seed, segment, generation, first, length, rows)
    whole = bytearray(bytes(HEADER_SIZE) + packed.ljust(length, b"\0"))
    group = parse_group(whole, HEADER_SIZE, seed, generation)
    assert group == (HEADER_SIZE, length, first, rows)
    assert parse_group(whole, HEADER_SIZE, seed, generation ^ 1) is None
    assert parse_group(whole, HEADER_SIZE, seed ^ 1, generation) is None
    whole[HEADER_SIZE + data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(
        st.integers(1, 255)
    )
    assert parse_group(whole, HEADER_SIZE, seed, generation) is None
    assert list(groups_of(whole, seed, generation)) == []


@given(st.binary(max_size=3 * 4096), u32, u64)
def test_junk_is_no_group(junk: bytes, seed: int, generation: int) -> None:
    """Bytes of anybody's choice are never taken for a group, and harm nobody."""
    for data in (junk, bytes(HEADER_SIZE) + GROUP_MAGIC + generation.to_bytes(8, "little") + junk):
        assert list(groups_of(data, seed, generation)) == []


@given(u32, st.binary(min_size=16, max_size=16), u64, u64, u32, st.data())
def test_header_round_trip(
    segment: int, store_id: bytes, generation: int, size: int, segments: int, data: Any
) -> None:
    """A segment's header reads as written with either half of its page gone, but not with both."""
    header = SegmentHeader(segment, store_id, generation, size, segments)
    page = bytearray(pack_segment_header(header))
    assert parse_segment_header(page, "x") == header
    half = data.draw(st.sampled_from([0, 2048]))
    page[half : half + 2048] = data.draw(st.binary(min_size=1, max_size=1)) * 2048
    assert parse_segment_header(page, "x") == header
    page[2048 - half : 4096 - half] = bytes(2048)
    with pytest.raises(Corruption):
        parse_segment_header(page, "x")


@given(st.lists(st.builds(SegmentEnd, u32, u64, u64)))
def test_table_round_trip(ends: list[SegmentEnd]) -> None:
    """A table of segments reads as written."""
    assert parse_table(pack_table(ends)) == ends
