"""The paged INode, one property at a time; the random model is in tests/property."""

from __future__ import annotations

import tracemalloc

import pytest

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.checksums import sums_of, verify_range
from torus_actors.model.inode_tree import (
    HOLE,
    NBLOCKS_MAX,
    BlockMap,
    CommitPlan,
    TreeRoot,
    depth_of,
    empty_root,
)
from torus_actors.model.inode_tree_pages import (
    FANOUT,
    PAGE_SIZE_MAX,
    Page,
    decode_page,
    pack_entry,
    page_root,
)
from torus_actors.model.inode_tree_walk import PageNeeded, visits
from torus_actors.model.refs import ZERO_BLOCK, BlockRef, BlockType

TIB_BLOCKS = 1 << 21
"""1 TiB in blocks of 512 KiB."""


def ref(number: int) -> BlockRef:
    """Some data block."""
    return BlockRef.of(1, 2, number)


class Store:
    """A page store that counts reads."""

    def __init__(self) -> None:
        self.blocks: dict[BlockRef, bytes] = {}
        self.reads: list[tuple[int, int]] = []
        self.minted = 0

    def mint(self) -> BlockRef:
        """A fresh page ref."""
        self.minted += 1
        return BlockRef.of(1, 9, self.minted, BlockType.INODE)

    def load(self, block_map: BlockMap, need: PageNeeded) -> None:
        """Answer one request."""
        self.reads.append((need.level, need.page_number))
        block_map.load(need, self.blocks[need.ref])

    def get(self, block_map: BlockMap, index: int) -> object:
        """Get, loading what is needed."""
        while True:
            try:
                return block_map.get(index)
            except PageNeeded as need:
                self.load(block_map, need)

    def set(self, block_map: BlockMap, index: int, number: int) -> None:
        """Set, loading what is needed."""
        while True:
            try:
                return block_map.set(index, ref(number), number)
            except PageNeeded as need:
                self.load(block_map, need)

    def commit(self, block_map: BlockMap) -> CommitPlan:
        """A commit that succeeds."""
        plan = block_map.plan_commit(self.mint)
        self.blocks.update(plan.blocks)
        block_map.commit_done(plan)
        return plan


@pytest.mark.parametrize(
    ("nblocks", "depth"),
    [
        (0, 1), (1, 1), (1024, 1), (1025, 2), (1 << 20, 2), ((1 << 20) + 1, 3), (1 << 30, 3),
        ((1 << 30) + 1, 4), (NBLOCKS_MAX, 4),
    ],
)  # fmt: skip
def test_depth_follows_from_the_length(nblocks: int, depth: int) -> None:
    """A tree is just as deep as its length needs."""
    assert depth_of(nblocks) == depth


def test_holes_need_no_pages() -> None:
    """An empty volume of any length has no pages, reads as holes, and commits to the zero root."""
    block_map = BlockMap(empty_root(NBLOCKS_MAX))
    assert block_map.get(NBLOCKS_MAX - 1) is HOLE
    assert block_map.pages_loaded == 0
    plan = block_map.plan_commit(Store().mint)
    assert plan.blocks == []
    assert plan.root == (ZERO_BLOCK, 0, NBLOCKS_MAX)


def test_commit_and_lazy_reload() -> None:
    """A reopened map loads only the path to what is asked, top down."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    for index in (0, 5000, TIB_BLOCKS - 1):
        store.set(block_map, index, index + 1)
    plan = store.commit(block_map)
    assert len(plan.blocks) == 3 + 2 + 1
    again = BlockMap(plan.root)
    assert store.get(again, 5000) == (ref(5001), 5001)
    assert store.reads == [(2, 0), (1, 0), (0, 4)]
    assert store.get(again, 5001) is HOLE
    assert store.get(again, 900_000) is HOLE
    assert len(store.reads) == 3
    assert not again.is_dirty


def test_commit_writes_only_what_changed() -> None:
    """One changed block of a full GiB costs its leaf and its ancestors."""
    store, block_map = Store(), BlockMap(empty_root(2 * FANOUT))
    for index in range(2 * FANOUT):
        block_map.set(index, ref(index), 1)
    assert len(store.commit(block_map).blocks) == 3
    block_map.set(7, ref(77), 2)
    assert block_map.pages_dirty == 2
    plan = store.commit(block_map)
    assert len(plan.blocks) == 2
    assert store.commit(block_map).blocks == []


def test_cost_does_not_follow_the_volume() -> None:
    """The same few writes cost 1 TiB as many page bytes, and about as much memory, as 1 GiB."""
    costs = []
    for nblocks in (2048, TIB_BLOCKS):
        store = Store()
        tracemalloc.start()
        block_map = BlockMap(empty_root(nblocks))
        for number in range(10):
            store.set(block_map, number * (nblocks // 10), number + 1)
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        plan = store.commit(block_map)
        costs.append((memory, sum(len(data) for _, data in plan.blocks), len(plan.blocks)))
    assert costs[1][0] < 20_000
    assert costs[1][1] < 2_000
    assert costs[1][2] <= 10 + 2 + 1


def test_sparse_pages_are_small() -> None:
    """Three entries take a hundred bytes, not a full page; a full page has no slot list."""
    page = Page(0, 0)
    for slot in (1, 500, 1023):
        page.put(slot, pack_entry(ref(slot), slot))
    assert len(page.encode()) == 20 + 3 * 30
    sizes = []
    for slot in range(FANOUT):
        page.put(slot, pack_entry(ref(slot), slot))
        sizes.append(len(page.encode()))
    assert max(sizes) <= PAGE_SIZE_MAX
    assert sizes[-1] == 20 + FANOUT * 28


def test_changes_during_a_commit_belong_to_the_next() -> None:
    """A plan is a consistent cut; what changes afterwards is dirty and is written next time."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    block_map.set(1, ref(1), 1)
    block_map.set(2000, ref(2), 2)
    plan = block_map.plan_commit(store.mint)
    block_map.set(1, ref(11), 11)
    with pytest.raises(Invalid):
        block_map.plan_commit(store.mint)
    store.blocks.update(plan.blocks)
    block_map.commit_done(plan)
    assert block_map.is_dirty
    assert store.get(BlockMap(plan.root), 1) == (ref(1), 1)
    second = store.commit(block_map)
    assert len(second.blocks) == 2
    assert store.get(BlockMap(second.root), 1) == (ref(11), 11)
    assert store.get(BlockMap(second.root), 2000) == (ref(2), 2)


def test_failed_commit_is_repeated_under_new_refs() -> None:
    """After a failure everything is dirty again, and no lost page is ever referred to."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    block_map.set(1, ref(1), 1)
    block_map.set(2000, ref(2), 2)
    lost = block_map.plan_commit(store.mint)
    assert block_map.drop_clean_pages(0) == 0
    block_map.commit_failed(lost)
    plan = store.commit(block_map)
    assert not {r for r, _ in lost.blocks} & {r for r, _ in plan.blocks}
    again = BlockMap(plan.root)
    assert store.get(again, 1) == (ref(1), 1)
    assert store.get(again, 2000) == (ref(2), 2)
    for finish in (block_map.commit_done, block_map.commit_failed):
        with pytest.raises(Invalid):
            finish(lost)


def test_allocate_that_fails_loses_nothing() -> None:
    """An error from the allocator leaves all changes to be committed later."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    for index in (1, 1500, 2500):
        block_map.set(index, ref(index), 1)
    store.commit(block_map)
    block_map.clear(1500)
    block_map.set(2500, ref(9), 9)
    given = 0

    def allocate() -> BlockRef:
        nonlocal given
        given += 1
        if given == 2:
            raise Invalid("no more refs")
        return store.mint()

    with pytest.raises(Invalid):
        block_map.plan_commit(allocate)
    again = BlockMap(store.commit(block_map).root)
    assert [store.get(again, i) for i in (1, 1500, 2500)] == [(ref(1), 1), None, (ref(9), 9)]


def test_memory_is_bounded_by_dropping() -> None:
    """Clean pages go, the unused first and leaves before inner ones; dirty ones stay."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    for leaf in range(20):
        block_map.set(leaf * FANOUT, ref(leaf + 1), 1)
    store.commit(block_map)
    block_map.get(0)
    block_map.set(5 * FANOUT, ref(100), 1)
    assert block_map.pages_loaded == 22
    assert block_map.drop_clean_pages(4) == 18
    assert block_map.drop_clean_pages(4) == 0
    assert block_map.get(0) == (ref(1), 1)
    assert block_map.get(5 * FANOUT) == (ref(100), 1)
    assert block_map.drop_clean_pages(0, keep=1) == 0
    assert block_map.drop_clean_pages(0) == 1
    assert block_map.pages_loaded == block_map.pages_dirty == 3
    assert store.get(block_map, 7 * FANOUT) == (ref(8), 1)


def test_clear_range_loads_only_its_ends() -> None:
    """Discarding most of a full volume reads the pages at both ends, and drops the rest unread."""
    store, block_map = Store(), BlockMap(empty_root(50 * FANOUT))
    for leaf in range(50):
        block_map.set(leaf * FANOUT + 5, ref(leaf + 1), 1)
        block_map.set(leaf * FANOUT + 900, ref(leaf + 100), 1)
    again = BlockMap(store.commit(block_map).root)
    while True:
        try:
            again.clear_range(10 * FANOUT + 100, 40 * FANOUT + 100)
            break
        except PageNeeded as need:
            assert not again.is_dirty
            store.load(again, need)
    assert store.reads == [(1, 0), (0, 10), (0, 40)]
    left = BlockMap(store.commit(again).root)
    assert [store.get(left, leaf * FANOUT + 5) is HOLE for leaf in (10, 11, 39, 40, 41)] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert store.get(left, 40 * FANOUT + 900) == (ref(140), 1)


def test_truncate_loads_only_the_boundary() -> None:
    """Shrinking by whole pages and levels reads the new last leaf and its ancestors."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    for index in (3, 2000, 4000, 1 << 20):
        block_map.set(index, ref(index), 1)
    again = BlockMap(store.commit(block_map).root)
    while True:
        try:
            again.resize(2001)
            break
        except PageNeeded as need:
            store.load(again, need)
    assert store.reads == [(2, 0), (1, 0), (0, 1)]
    plan = store.commit(again)
    assert plan.root.nblocks == 2001
    small = BlockMap(plan.root)
    assert store.get(small, 3) == (ref(3), 1)
    assert store.get(small, 2000) == (ref(2000), 1)
    small.resize(TIB_BLOCKS)
    assert store.get(small, 4000) is HOLE
    assert store.get(small, 1 << 20) is HOLE


def test_shrinking_by_a_level_alone() -> None:
    """Where only a level goes, the unchanged child becomes the root, without being read."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    block_map.set(3, ref(3), 1)
    again = BlockMap(store.commit(block_map).root)
    while True:
        try:
            again.resize(FANOUT)
            break
        except PageNeeded as need:
            store.load(again, need)
    assert store.reads == [(2, 0), (1, 0)]
    plan = store.commit(again)
    assert plan.blocks == []
    assert plan.root.nblocks == FANOUT
    assert store.get(BlockMap(plan.root), 3) == (ref(3), 1)
    assert store.get(again, 3) == (ref(3), 1)


def test_growing_is_cheap_and_lasts() -> None:
    """Growing through levels puts one page each on top, without loading the old root."""
    store, block_map = Store(), BlockMap(empty_root(10))
    block_map.set(9, ref(9), 1)
    root = store.commit(block_map).root
    grown = BlockMap(root)
    grown.resize(TIB_BLOCKS)
    plan = store.commit(grown)
    assert store.reads == []
    assert len(plan.blocks) == 2
    assert store.get(BlockMap(plan.root), 9) == (ref(9), 1)


def test_length_alone_is_a_change() -> None:
    """A new length must reach the volume's record even if no page changed."""
    block_map = BlockMap(empty_root(10))
    assert not block_map.is_dirty
    block_map.resize(20)
    assert block_map.is_dirty
    assert block_map.plan_commit(Store().mint).root.nblocks == 20


def test_load_of_a_stale_page_is_left_out() -> None:
    """A page that the tree replaced or cut off while it was read does not come back."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    block_map.set(0, ref(1), 1)
    block_map.set(2000, ref(2), 2)
    store.commit(block_map)
    block_map.drop_clean_pages(1)
    with pytest.raises(PageNeeded) as caught:
        block_map.get(2000)
    need = caught.value
    data = store.blocks[need.ref]
    block_map.clear_range(1024, 2048)
    block_map.load(need, data)
    assert block_map.get(2000) is HOLE
    other = BlockMap(empty_root(5))
    other.load(need, data)
    assert other.pages_loaded == 0


def test_wrong_page_is_corruption() -> None:
    """A page is checked for its bytes, its level and its number before it is believed."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    block_map.set(2000, ref(2), 2)
    block_map.set(1, ref(2), 2)
    root = store.commit(block_map).root
    again = BlockMap(root)
    with pytest.raises(PageNeeded) as caught:
        again.get(1)
    data = store.blocks[root.ref]
    for bad in (data[:-1], b"", data[:5] + b"\x07" + data[6:], bytes(len(data))):
        with pytest.raises(Corruption):
            again.load(caught.value, bad)
    with pytest.raises(Corruption):
        decode_page(0, 0, page_root(data), data)
    with pytest.raises(Corruption):
        decode_page(1, 1, page_root(data), data)
    page = Page(0, 0)
    page.slots.extend((5, 3))
    page.entries.extend(bytes(56))
    with pytest.raises(Corruption):
        decode_page(0, 0, page_root(page.encode()), page.encode())


def test_pages_verify_like_any_block() -> None:
    """A page's parent knows it by the root by which a store knows the block."""
    store, block_map = Store(), BlockMap(empty_root(3000))
    block_map.set(2000, ref(2), 2)
    plan = store.commit(block_map)
    data = store.blocks[plan.root.ref]
    verify_range(sums_of(data), plan.root.crc, 0, data)


def test_runs() -> None:
    """Runs of stored blocks and holes are found across pages and missing subtrees."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    for index in [*range(1000, 1100), 5000]:
        store.set(block_map, index, index)
    assert block_map.run_end(0, TIB_BLOCKS) == (1000, False)
    assert block_map.run_end(1000, TIB_BLOCKS) == (1100, True)
    assert block_map.run_end(1000, 1050) == (1050, True)
    block_map.clear(1010)
    assert block_map.run_end(1000, TIB_BLOCKS) == (1010, True)
    assert block_map.run_end(1010, TIB_BLOCKS) == (1011, False)
    block_map.set(1010, ref(1010), 1)
    assert block_map.run_end(1100, TIB_BLOCKS) == (5000, False)
    assert block_map.run_end(5001, TIB_BLOCKS) == (TIB_BLOCKS, False)
    again = BlockMap(store.commit(block_map).root)
    with pytest.raises(PageNeeded):
        again.run_end(1000, TIB_BLOCKS)
    store.get(again, 1000)
    assert again.run_end(1000, TIB_BLOCKS) == (1024, True)
    for first, stop in ((5, 5), (-1, 5), (0, TIB_BLOCKS + 1)):
        with pytest.raises(Invalid):
            block_map.run_end(first, stop)


def test_walk_visits_data_and_pages() -> None:
    """A walk of a stored tree names every page block and every data block."""
    store, block_map = Store(), BlockMap(empty_root(TIB_BLOCKS))
    indexes = [0, 1, 5000, 1 << 20]
    for index in indexes:
        store.set(block_map, index, index + 1)
    plan = store.commit(block_map)
    seen = list(visits(BlockMap(plan.root).walk(), lambda need: store.blocks[need.ref]))
    assert {visit.ref for visit in seen} == {r for r, _ in plan.blocks}
    assert [r for visit in seen for r in visit.data_refs()] == [ref(i + 1) for i in indexes]
    inner = [visit for visit in seen if visit.level == 1]
    assert [number for visit in inner for number, _ in visit.items()] == [0, 4, 1024]
    with pytest.raises(PageNeeded):
        list(visits(BlockMap(plan.root).walk()))
    walk = BlockMap(plan.root).walk()
    assert isinstance(next(walk), PageNeeded)
    with pytest.raises(Invalid):
        next(walk)


def test_values_are_checked() -> None:
    """Indexes, refs, roots and lengths out of range are Invalid."""
    block_map = BlockMap(empty_root(10))
    for bad in (
        lambda: block_map.get(10),
        lambda: block_map.get(-1),
        lambda: block_map.set(10, ref(1), 0),
        lambda: block_map.set(0, ref(1)[:-1], 0),
        lambda: block_map.set(0, ref(1), 1 << 32),
        lambda: block_map.set(0, ZERO_BLOCK, 0),
        lambda: block_map.clear(10),
        lambda: block_map.clear_range(5, 4),
        lambda: block_map.resize(-1),
        lambda: block_map.resize(NBLOCKS_MAX + 1),
        lambda: TreeRoot.unpack(b"short"),
        lambda: TreeRoot.unpack(TreeRoot(ref(1), 1, NBLOCKS_MAX + 1).pack()),
        lambda: BlockMap(TreeRoot(ref(1), -1, 5)),
    ):
        with pytest.raises(Invalid):
            bad()
    assert not block_map.is_dirty
    root = TreeRoot(ref(1), 7, 5)
    assert TreeRoot.unpack(root.pack()) == root
