"""The block map against a dict, through commits, failures, evictions and reloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from torus_actors.errors import Corruption
from torus_actors.model.inode_tree import BlockMap, CommitPlan, TreeRoot, empty_root
from torus_actors.model.inode_tree_pages import Page, decode_page, pack_entry, page_root
from torus_actors.model.inode_tree_walk import PageNeeded, PageVisit, visits
from torus_actors.model.refs import BlockRef, BlockType

T = TypeVar("T")

EDGES = [0, 1, 2, 1023, 1024, 1025, 2047, 2048, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
EDGES += [(1 << 21) + 5, (1 << 30) - 1, 1 << 30, (1 << 30) + 3]
sizes = st.one_of(st.sampled_from(EDGES), st.integers(0, 5000), st.integers(0, 1 << 22))
positions = st.one_of(
    st.sampled_from(EDGES), st.integers(0, 5000), st.integers(0, 1 << 22), st.integers(0, 1 << 31)
)


class Store:
    """Pages that were written, by ref."""

    def __init__(self) -> None:
        self.blocks: dict[BlockRef, bytes] = {}
        self.minted = 0

    def mint(self) -> BlockRef:
        """A fresh page ref."""
        self.minted += 1
        return BlockRef.of(1, 1000 + self.minted, self.minted, BlockType.INODE)

    def read(self, need: PageNeeded) -> bytes:
        """The block of a page, with the zeros that a block store may pad it with."""
        return self.blocks[need.ref] + bytes(self.minted % 3)

    def run(self, block_map: BlockMap, call: Callable[[], T]) -> T:
        """Call until no page is missing."""
        for _ in range(64):
            try:
                return call()
            except PageNeeded as need:
                block_map.load(need, self.read(need))
        raise AssertionError("the call asks for pages for ever")


class MapMachine(RuleBasedStateMachine):
    """Any interleaving of changes, commits that succeed or fail, evictions and reloads."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.map = BlockMap()
        self.model: dict[int, tuple[BlockRef, int]] = {}
        self.nblocks = 0
        self.plan: CommitPlan | None = None
        self.planned: dict[int, tuple[BlockRef, int]] = {}
        self.committed = empty_root()
        self.committed_model: dict[int, tuple[BlockRef, int]] = {}
        self.count = 0

    @initialize(nblocks=sizes)
    def start(self, nblocks: int) -> None:
        """Begin with some length."""
        self.resize(nblocks)

    @precondition(lambda self: self.nblocks)
    @rule(position=positions, count=st.integers(1, 5))
    def put(self, position: int, count: int) -> None:
        """Set a few neighbouring blocks."""
        for index in range(position % self.nblocks, position % self.nblocks + count):
            if index < self.nblocks:
                self.count += 1
                entry = (BlockRef.of(1, 7, self.count), self.count * 7919 % (1 << 32))
                self.store.run(self.map, lambda i=index, e=entry: self.map.set(i, *e))  # type: ignore[misc]
                self.model[index] = entry

    @precondition(lambda self: self.nblocks)
    @rule(a=positions, b=positions)
    def clear_range(self, a: int, b: int) -> None:
        """Clear a range, small or huge."""
        first, stop = sorted((a % (self.nblocks + 1), b % (self.nblocks + 1)))
        self.store.run(self.map, lambda: self.map.clear_range(first, stop))
        self.model = {i: e for i, e in self.model.items() if not first <= i < stop}

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 1 << 16))
    def clear_one(self, number: int) -> None:
        """Clear a block that is there."""
        index = sorted(self.model)[number % len(self.model)]
        self.store.run(self.map, lambda: self.map.clear(index))
        del self.model[index]

    @rule(nblocks=sizes)
    def resize(self, nblocks: int) -> None:
        """Grow or shrink."""
        self.store.run(self.map, lambda: self.map.resize(nblocks))
        self.nblocks = nblocks
        self.model = {i: e for i, e in self.model.items() if i < nblocks}

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_commit(self) -> None:
        """Take a cut."""
        self.plan = self.map.plan_commit(self.store.mint)
        self.planned = dict(self.model)
        assert not self.map.is_dirty

    @precondition(lambda self: self.plan is not None)
    @rule()
    def finish_commit(self) -> None:
        """The cut was written."""
        assert self.plan is not None
        self.store.blocks.update(self.plan.blocks)
        self.map.commit_done(self.plan)
        self.committed, self.committed_model = self.plan.root, self.planned
        self.plan = None

    @precondition(lambda self: self.plan is not None)
    @rule()
    def fail_commit(self) -> None:
        """The cut was not written: nobody may ever ask for its pages."""
        assert self.plan is not None
        self.map.commit_failed(self.plan)
        assert self.map.is_dirty
        self.plan = None

    @rule(pages_max=st.integers(0, 5))
    def evict(self, pages_max: int) -> None:
        """Drop what can be loaded again."""
        before = self.map.pages_loaded
        dropped = self.map.drop_clean_pages(pages_max)
        assert self.map.pages_loaded == before - dropped

    @rule()
    def reopen(self) -> None:
        """Crash: only what was committed is left."""
        self.map = BlockMap(TreeRoot.unpack(self.committed.pack()))
        self.plan = None
        self.model = dict(self.committed_model)
        self.nblocks = self.committed.nblocks

    @rule(position=positions)
    def look(self, position: int) -> None:
        """Any one block reads as the model says, and runs of blocks agree with it."""
        if not self.nblocks:
            return
        index = position % self.nblocks
        assert self.store.run(self.map, lambda: self.map.get(index)) == self.model.get(index)
        stop = min(self.nblocks, index + 3000)
        end, stored = self.store.run(self.map, lambda: self.map.run_end(index, stop))
        assert index < end <= stop
        assert stored == (index in self.model)
        assert all((i in self.model) == stored for i in range(index, end))

    @rule()
    def walk(self) -> None:
        """A walk of the live map finds exactly the model's entries."""
        found = {
            index: ref
            for visit in visits(self.map.walk(), self.store.read)
            if visit.level == 0
            for index, ref in visit.items()
        }
        assert found == {index: ref for index, (ref, _) in self.model.items()}

    @rule()
    def walk_committed(self) -> None:
        """A walk of the stored tree finds what was committed, and every page once."""
        seen = list(visits(BlockMap(self.committed).walk(), self.store.read))
        found = {i: ref for v in seen if v.level == 0 for i, ref in v.items()}
        assert found == {index: ref for index, (ref, _) in self.committed_model.items()}
        pages = [v.ref for v in seen]
        assert len(pages) == len(set(pages))
        assert all(v.slots for v in seen)

    @invariant()
    def everything_reads_back(self) -> None:
        """Length and all set blocks are as in the model."""
        assert self.map.nblocks == self.nblocks
        for index, entry in self.model.items():
            assert self.store.run(self.map, lambda i=index: self.map.get(i)) == entry  # type: ignore[misc]


TestMapMachine = MapMachine.TestCase
TestMapMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 1023)), st.integers(0, 3), st.integers(0, 1 << 31))
def test_page_round_trip(slots: set[int], level: int, number: int) -> None:
    """A stored page decodes to the same entries, whatever follows it."""
    page = Page(level, number)
    for slot in slots:
        page.put(slot, pack_entry(BlockRef.of(1, slot, 1), slot))
    data = page.encode()
    again = decode_page(level, number, page_root(data), data + b"padding")
    assert list(again.items()) == list(page.items())
    assert [slot for slot, _ in again.items()] == sorted(slots)
    assert again.encode() == data


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 1023), max_size=20), st.data())
def test_damaged_page_is_corruption(slots: set[int], data: st.DataObject) -> None:
    """A page with any byte changed, or cut off anywhere, is Corruption."""
    page = Page(0, 5)
    for slot in slots:
        page.put(slot, pack_entry(BlockRef.of(1, slot, 1), slot))
    good = page.encode()
    crc = page_root(good)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(bad), good[:at]):
        try:
            decode_page(0, 5, crc, damaged)
        except Corruption:
            continue
        raise AssertionError("damage was not noticed")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=60), st.data())
def test_walk_while_the_map_changes(indexes: list[int], data: st.DataObject) -> None:
    """What is there from a walk's first step to its last is visited, whatever happens between."""
    store, block_map = Store(), BlockMap(empty_root(300_001))
    half = len(indexes) // 2

    def commit() -> None:
        plan = block_map.plan_commit(store.mint)
        store.blocks.update(plan.blocks)
        block_map.commit_done(plan)

    def put(index: int, number: int) -> None:
        ref = BlockRef.of(1, number, index)
        store.run(block_map, lambda: block_map.set(index, ref, 0))

    for index in indexes[:half]:
        put(index, 1)
    commit()
    block_map.drop_clean_pages(data.draw(st.integers(0, 5)))
    for index in indexes[half:]:
        put(index, 1)
    expected, changed, found = set(indexes), set(), set()
    walk = block_map.walk()
    step: PageNeeded | PageVisit | None = next(walk)
    while step is not None:
        action = data.draw(st.sampled_from(["none", "put", "commit", "drop", "clear"]))
        if action == "put":
            put(data.draw(st.sampled_from(indexes)), 2)
        elif action == "commit":
            commit()
        elif action == "drop":
            block_map.drop_clean_pages(0)
        elif action == "clear":
            index = data.draw(st.sampled_from(indexes))
            store.run(block_map, lambda i=index: block_map.clear(i))  # type: ignore[misc]
            changed.add(index)
        try:
            if isinstance(step, PageNeeded):
                step = walk.send(store.read(step))
            else:
                found.update(index for index, _ in step.items() if step.level == 0)
                step = next(walk)
        except StopIteration:
            step = None
    assert expected - changed <= found <= expected
