"""The paged INode: a volume's map from block index to block, as a radix tree of small pages.

The tree is named by its root page's ref and checksum and the number of blocks, which gives its
depth. Pages with nothing in them do not exist, so a thin volume costs what was written to it. Pages
are loaded when they are needed, and a commit writes only those that changed and their ancestors.

No I/O happens here. A call that meets a page which is not in memory raises ``PageNeeded`` before it
has changed anything; the caller reads that block, hands it to ``load``, and calls again::

    while True:
        try:
            entry = block_map.get(index)
            break
        except PageNeeded as need:
            block_map.load(need, await read_block(need.ref))
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import NamedTuple

from torus_actors.errors import Invalid
from torus_actors.model.inode_tree_pages import (
    FANOUT,
    FANOUT_BITS,
    SLOT_MASK,
    UINT32_MAX,
    BlockEntry,
    Page,
    decode_page,
    pack_entry,
    page_root,
)
from torus_actors.model.inode_tree_walk import PageNeeded, PageVisit, walk_pages
from torus_actors.model.refs import ZERO_BLOCK, BlockRef

DEPTH_MAX = 4
NBLOCKS_MAX = 1 << (FANOUT_BITS * DEPTH_MAX)
"""Most blocks of one volume: 512 PiB with 512 KiB blocks."""

HOLE = None
"""What ``get`` returns where nothing was written."""

_ROOT = struct.Struct("<24sIQ")


class TreeRoot(NamedTuple):
    """The name of a whole stored tree; 36 bytes in the volume's record."""

    ref: BlockRef
    """The root page's block; all zero when the tree is empty."""

    crc: int
    """Checksum of the root page, see ``page_root``."""

    nblocks: int
    """Length of the volume in blocks."""

    def pack(self) -> bytes:
        """The root as 36 bytes."""
        return _ROOT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> TreeRoot:
        """Read what ``pack`` made.

        Raises:
            Invalid: another length, or too many blocks.
        """
        if len(data) != _ROOT.size:
            raise Invalid(f"a tree root has {_ROOT.size} bytes, not {len(data)}")
        ref, crc, nblocks = _ROOT.unpack(data)
        _check_nblocks(nblocks)
        return cls(BlockRef(ref), crc, nblocks)


def empty_root(nblocks: int = 0) -> TreeRoot:
    """The root of a volume of that many blocks in which nothing was written."""
    return TreeRoot(ZERO_BLOCK, 0, nblocks)


class CommitPlan:
    """One consistent cut of the map, to be written.

    Attributes:
        blocks: refs and bytes of the pages to write, children before their parents.
        root: name of the tree once all of them are written.
    """

    __slots__ = ("blocks", "pages", "root")

    def __init__(
        self, blocks: list[tuple[BlockRef, bytes]], root: TreeRoot, pages: list[Page]
    ) -> None:
        self.blocks = blocks
        self.root = root
        self.pages = pages


def depth_of(nblocks: int) -> int:
    """Levels of the tree of a volume with that many blocks; 1 is a lone leaf."""
    return max(1, -(-(nblocks - 1).bit_length() // FANOUT_BITS)) if nblocks > 1 else 1


class BlockMap:
    """The map of one volume, in memory as far as it was needed.

    Rule kept throughout: the ancestors of a changed page are in memory and marked as changed, so
    that a commit never needs to load anything.

    Args:
        root: the stored tree to start from.

    Raises:
        Invalid: the root is of a tree that cannot exist.
    """

    __slots__ = (
        "_changed",
        "_depth",
        "_dirty",
        "_leaves",
        "_nblocks",
        "_pages",
        "_plan",
        "_root",
        "_tick",
    )

    def __init__(self, root: TreeRoot | None = None) -> None:
        if root is None:
            root = empty_root()
        _check_nblocks(root.nblocks)
        if len(root.ref) != len(ZERO_BLOCK) or not 0 <= root.crc <= UINT32_MAX:
            raise Invalid("not the root of a block map")
        self._nblocks = root.nblocks
        self._depth = depth_of(root.nblocks)
        self._root: BlockEntry | None = None
        if root.ref != ZERO_BLOCK:
            self._root = BlockEntry(BlockRef(root.ref), root.crc)
        self._pages: list[dict[int, Page]] = [{} for _ in range(DEPTH_MAX)]
        self._leaves = self._pages[0]
        self._dirty: list[dict[int, Page]] = [{} for _ in range(DEPTH_MAX)]
        self._changed = False
        """Whether the length or the root changed in a way that no dirty page shows."""
        self._plan: CommitPlan | None = None
        self._tick = 0

    # --- what it holds --------------------------------------------------------------------------

    @property
    def nblocks(self) -> int:
        """Length of the volume in blocks."""
        return self._nblocks

    @property
    def is_dirty(self) -> bool:
        """Whether something changed since the last plan, or since a plan that failed."""
        return self._changed or any(self._dirty)

    @property
    def is_planned(self) -> bool:
        """Whether there is a plan that has not ended: no head is known to name what is in it."""
        return self._plan is not None

    @property
    def root(self) -> TreeRoot:
        """Name of the tree as of the last plan.

        Raises:
            Invalid: the map has changed since, so that no root names what it holds.
        """
        if self.is_dirty:
            raise Invalid("the block map has changes that are not committed")
        ref, crc = (ZERO_BLOCK, 0) if self._root is None else self._root
        return TreeRoot(ref, crc, self._nblocks)

    @property
    def pages_loaded(self) -> int:
        """Pages in memory."""
        return sum(map(len, self._pages))

    @property
    def pages_dirty(self) -> int:
        """Pages that the next commit will write."""
        return sum(map(len, self._dirty))

    def get(self, index: int) -> BlockEntry | None:
        """Where a block is stored.

        Args:
            index: position in the volume, in blocks.

        Returns:
            The entry, or ``HOLE``.

        Raises:
            PageNeeded: a page must be loaded first.
            Invalid: the index is outside the volume.
        """
        if not 0 <= index < self._nblocks:
            raise self._outside(index)
        page = self._leaves.get(index >> FANOUT_BITS)
        if page is None:
            page = self._page(0, index >> FANOUT_BITS)
            if page is None:
                return HOLE
        self._tick += 1
        page.used = self._tick
        return page.get(index & SLOT_MASK)

    def run_end(self, first: int, stop: int) -> tuple[int, bool]:
        """How far from ``first`` on the blocks are alike: stored ones, or holes.

        Returns:
            The first index that differs, at most ``stop``, and whether those before it are stored.
            Where a later page is not in memory, the run ends early.

        Raises:
            PageNeeded: the page of ``first`` must be loaded first.
            Invalid: the range is empty or not within the volume.
        """
        if not 0 <= first < stop <= self._nblocks:
            raise Invalid(f"no blocks {first} to {stop} in a volume of {self._nblocks} blocks")
        is_stored = None
        at = first
        while at < stop:
            try:
                page, span_end = self._leaf_or_span(at)
            except PageNeeded:
                if is_stored is None:
                    raise
                break
            end, stored = span_end, False
            if page is not None:
                slot, stored = page.run_end(at & SLOT_MASK)
                end = (at & ~SLOT_MASK) + slot
            if is_stored is None:
                is_stored = stored
            elif is_stored != stored:
                break
            at = end
        return min(at, stop), bool(is_stored)

    def walk(self) -> Generator[PageNeeded | PageVisit, bytes | memoryview | None, None]:
        """Visit every page in order, for audits and the collector; keeps no page in memory.

        Yields ``PageVisit``, and ``PageNeeded`` for a page that is not in memory, to be answered by
        ``send`` with its block; see ``inode_tree_walk``. The map may change between two steps:
        entries that are there from the first step to the last are visited.
        """
        level = self._depth - 1
        return walk_pages(level, self._root, self._pages[level].get(0), self._pages)

    # --- changes --------------------------------------------------------------------------------

    def set(self, index: int, ref: bytes, root: int) -> None:
        """Say where a block is stored from now on.

        Args:
            index: position in the volume, in blocks.
            ref: its block ref, 24 bytes, not all zero.
            root: checksum that stands for it, 32 bits.

        Raises:
            PageNeeded: a page must be loaded first; nothing was changed.
            Invalid: a value is out of range.
        """
        if not 0 <= index < self._nblocks:
            raise self._outside(index)
        packed = pack_entry(ref, root)
        if ref == ZERO_BLOCK:
            raise Invalid("the zero ref is a hole; clear the block instead")
        self._writable(0, index >> FANOUT_BITS).put(index & SLOT_MASK, packed)

    def clear(self, index: int) -> None:
        """Make one block a hole.

        Raises:
            PageNeeded: a page must be loaded first; nothing was changed.
            Invalid: the index is outside the volume.
        """
        self.clear_range(index, index + 1)

    def clear_range(self, first: int, stop: int) -> None:
        """Make the blocks from ``first`` up to, not including, ``stop`` holes.

        Only the pages at both ends are loaded; what lies between is cut off as whole subtrees.

        Raises:
            PageNeeded: a page must be loaded first; nothing was changed.
            Invalid: the range is not within the volume.
        """
        if not 0 <= first <= stop <= self._nblocks:
            raise Invalid(f"no blocks {first} to {stop} in a volume of {self._nblocks} blocks")
        if first == stop:
            return
        if stop == self._nblocks:
            if first == 0:
                self._forget_all()
                return
            # Nothing is stored behind the end, so that the last pages are cut off whole.
            stop = 1 << (FANOUT_BITS * self._depth)
        cut = [
            (level, number)
            for level in reversed(range(self._depth))
            for number in self._cut_pages(level, first, stop)
        ]
        # First everything that can raise PageNeeded, then the changes.
        touched: list[tuple[int, int, int, int]] = []
        for level, number in cut:
            page = self._page(level, number)
            if page is None:
                continue
            # Slots whose whole span is in the range.
            shift = FANOUT_BITS * level
            high = min((stop >> shift) - (number << FANOUT_BITS), FANOUT)
            low = max(-((-first) >> shift) - (number << FANOUT_BITS), 0)
            if low < high:
                touched.append((level, number, low, high))
                if page.has_any(low, high):
                    self._check_writable(level, number)
        for level, number, low, high in touched:
            page = self._pages[level].get(number)
            if page is not None and page.has_any(low, high):
                self._writable(level, number).remove(low, high)
            base = number << FANOUT_BITS
            self._forget(level - 1, base + low, base + high)

    def resize(self, nblocks: int) -> None:
        """Change the length of the volume; blocks behind a smaller length are gone.

        Raises:
            PageNeeded: a page must be loaded first; nothing was changed.
            Invalid: the length is out of range.
        """
        _check_nblocks(nblocks)
        depth = depth_of(nblocks)
        if nblocks < self._nblocks:
            if nblocks > 0 and depth < self._depth:
                self._entry_of(depth - 1, 0)
            self.clear_range(nblocks, self._nblocks)
            if depth < self._depth:
                self._root = self._entry_of(depth - 1, 0) if nblocks else None
                for level in range(depth, self._depth):
                    self._pages[level].clear()
                    self._dirty[level].clear()
        elif depth > self._depth:
            self._grow(depth)
        self._changed = self._changed or nblocks != self._nblocks
        self._nblocks = nblocks
        self._depth = depth

    def _grow(self, depth: int) -> None:
        """Put the present root under new ones."""
        if self._root is None and not self._pages[self._depth - 1]:
            return
        below = self._root
        for level in range(self._depth, depth):
            page = self._pages[level][0] = Page(level, 0)
            page.dirty = True
            self._dirty[level][0] = page
            if below is not None:
                page.put(0, pack_entry(*below))
            below = None
        self._root = None

    # --- pages in memory ------------------------------------------------------------------------

    def load(self, need: PageNeeded, data: bytes | memoryview) -> None:
        """Take in the page that a call asked for.

        A page that is in memory by now, or that the tree no longer has, is left out.

        Args:
            need: what was raised.
            data: the block ``need.ref``; bytes behind the page are ignored.

        Raises:
            Corruption: the block does not hold that page intact.
        """
        page = decode_page(need.level, need.page_number, need.crc, data)
        if need.level >= self._depth or need.page_number in self._pages[need.level]:
            return
        try:
            entry = self._entry_of(need.level, need.page_number)
        except PageNeeded:
            return
        # While the block was read the tree may have got another page there.
        if entry == (need.ref, need.crc):
            self._tick += 1
            page.used = self._tick
            self._pages[need.level][need.page_number] = page

    def needs(self, need: PageNeeded) -> bool:
        """Whether a page that a call asked for is still to be loaded; so too if nobody knows."""
        if need.level >= self._depth or need.page_number in self._pages[need.level]:
            return False
        try:
            return self._entry_of(need.level, need.page_number) == (need.ref, need.crc)
        except PageNeeded:
            return True

    def drop_clean_pages(self, pages_max: int, keep: int = 0) -> int:
        """Drop pages that can be loaded again until at most ``pages_max`` are in memory.

        Leaves go before inner pages, and those unused for longest first. Pages that changed, or
        that a commit is writing, stay, so that more than ``pages_max`` may remain.

        Args:
            pages_max: see above.
            keep: so many of the others stay in any case, those used last.

        Returns:
            How many were dropped.
        """
        excess = self.pages_loaded - pages_max
        if excess <= 0:
            return 0
        clean = [
            page
            for level in self._pages
            for page in level.values()
            if not page.dirty and not page.writing
        ]
        if keep:
            clean.sort(key=lambda page: page.used)
            del clean[max(0, len(clean) - keep) :]
        clean.sort(key=lambda page: (page.level, page.used))
        for page in clean[:excess]:
            del self._pages[page.level][page.number]
        return min(excess, len(clean))

    def _page(self, level: int, number: int) -> Page | None:
        """A page, or ``None`` if the tree does not have it."""
        page = self._pages[level].get(number)
        if page is None:
            entry = self._entry_of(level, number)
            if entry is not None:
                raise PageNeeded(level, number, entry.ref, entry.root)
            return None
        self._tick += 1
        page.used = self._tick
        return page

    def _entry_of(self, level: int, number: int) -> BlockEntry | None:
        """Where a page is stored, or ``None`` if it never was."""
        if level == self._depth - 1:
            return self._root
        parent = self._page(level + 1, number >> FANOUT_BITS)
        return None if parent is None else parent.get(number & SLOT_MASK)

    def _leaf_or_span(self, index: int) -> tuple[Page | None, int]:
        """The leaf of a block; or ``None``, and where the largest missing subtree ends."""
        page = self._leaves.get(index >> FANOUT_BITS)
        if page is not None:
            return page, 0
        for level in reversed(range(self._depth)):
            number = index >> (FANOUT_BITS * (level + 1))
            page = self._page(level, number)
            if page is None:
                return None, (number + 1) << (FANOUT_BITS * (level + 1))
        return page, 0

    def _check_writable(self, level: int, number: int) -> None:
        """Raise ``PageNeeded`` if a page or an ancestor is in the tree, but not in memory."""
        for up in range(level, self._depth):
            self._page(up, number >> (FANOUT_BITS * (up - level)))

    def _writable(self, level: int, number: int) -> Page:
        """A page that is about to change, marked as changed with its ancestors."""
        page = self._pages[level].get(number)
        if page is not None and page.dirty:
            return page
        self._check_writable(level, number)
        for up in range(level, self._depth):
            up_number = number >> (FANOUT_BITS * (up - level))
            ancestor = self._pages[up].get(up_number)
            if ancestor is None:
                ancestor = self._pages[up][up_number] = Page(up, up_number)
            elif ancestor.dirty:
                break
            ancestor.dirty = True
            self._dirty[up][up_number] = ancestor
        return self._pages[level][number]

    def _cut_pages(self, level: int, first: int, stop: int) -> list[int]:
        """Pages of a level of which the range covers a part only; the root always counts."""
        if level == self._depth - 1:
            return [0]
        shift = FANOUT_BITS * (level + 1)
        mask = (1 << shift) - 1
        numbers = [first >> shift] if first & mask else []
        if stop & mask and stop >> shift not in numbers:
            numbers.append(stop >> shift)
        return numbers

    def _forget(self, level: int, first: int, stop: int) -> None:
        """Remove pages ``first`` up to ``stop`` of a level, and all below them, from memory."""
        while level >= 0:
            loaded = self._pages[level]
            if stop - first < len(loaded):
                gone = [number for number in range(first, stop) if number in loaded]
            else:
                gone = [number for number in loaded if first <= number < stop]
            for number in gone:
                del loaded[number]
                self._dirty[level].pop(number, None)
            first, stop, level = first << FANOUT_BITS, stop << FANOUT_BITS, level - 1

    def _forget_all(self) -> None:
        for level in range(DEPTH_MAX):
            self._pages[level].clear()
            self._dirty[level].clear()
        self._root = None
        self._changed = True

    def _outside(self, index: int) -> Invalid:
        return Invalid(f"no block {index} in a volume of {self._nblocks} blocks")

    # --- commit ---------------------------------------------------------------------------------

    def plan_commit(self, allocate: Callable[[], BlockRef]) -> CommitPlan:
        """Serialise what changed: the changed pages and their ancestors, and nothing else.

        One call is one consistent cut. Changes made afterwards belong to the next commit. Once all
        blocks are written, and the root is recorded, ``commit_done`` must be called, otherwise
        ``commit_failed``; there can be one plan at a time.

        Args:
            allocate: gives a fresh ref for each page to write; a ref is never used again, also
                after a failure.

        Raises:
            Invalid: another plan is not finished.
        """
        if self._plan is not None:
            raise Invalid("a commit of this block map is already being written")
        blocks: list[tuple[BlockRef, bytes]] = []
        pages: list[Page] = []
        try:
            for level in range(self._depth):
                for number in sorted(self._dirty[level]):
                    self._plan_page(self._dirty[level][number], allocate, blocks, pages)
        except BaseException:
            # ``allocate`` may have run out of refs; nothing is lost, and it can be tried again.
            self._take_back(pages)
            raise
        self._changed = False
        self._plan = CommitPlan(blocks, self.root, pages)
        return self._plan

    def _plan_page(
        self,
        page: Page,
        allocate: Callable[[], BlockRef],
        blocks: list[tuple[BlockRef, bytes]],
        pages: list[Page],
    ) -> None:
        entry = None
        if len(page):
            data = page.encode()
            entry = BlockEntry(allocate(), page_root(data))
            blocks.append((entry.ref, data))
            page.writing = True
            pages.append(page)
        else:
            del self._pages[page.level][page.number]
        page.dirty = False
        del self._dirty[page.level][page.number]
        self._name(page.level, page.number, entry)

    def _take_back(self, pages: list[Page]) -> None:
        """Mark planned pages as changed again, except those that were cut off in the meantime."""
        self._changed = True
        for page in pages:
            page.writing = False
            if page.level < self._depth and self._pages[page.level].get(page.number) is page:
                self._writable(page.level, page.number)

    def _name(self, level: int, number: int, entry: BlockEntry | None) -> None:
        """Enter where a page is stored now, or that it is gone, into its parent or as the root."""
        if level == self._depth - 1:
            self._root = entry
            return
        parent = self._pages[level + 1][number >> FANOUT_BITS]
        slot = number & SLOT_MASK
        if entry is None:
            parent.remove(slot, slot + 1)
        else:
            parent.put(slot, pack_entry(*entry))

    def commit_done(self, plan: CommitPlan) -> None:
        """The plan's blocks and its root are durable: its pages can be loaded from now on.

        Raises:
            Invalid: it is not the present plan.
        """
        self._end_plan(plan)

    def commit_failed(self, plan: CommitPlan) -> None:
        """The plan came to nothing: what it held is part of the next one, under new refs.

        Raises:
            Invalid: it is not the present plan.
        """
        self._end_plan(plan)
        self._take_back(plan.pages)

    def _end_plan(self, plan: CommitPlan) -> None:
        if self._plan is not plan:
            raise Invalid("not the commit that is being written")
        self._plan = None
        for page in plan.pages:
            page.writing = False


def _check_nblocks(nblocks: int) -> None:
    if type(nblocks) is not int or not 0 <= nblocks <= NBLOCKS_MAX:
        raise Invalid(f"a volume has 0 to {NBLOCKS_MAX} blocks, not {nblocks!r}")
