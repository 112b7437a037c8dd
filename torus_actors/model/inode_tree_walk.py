"""Visiting every page of an INode tree without I/O, and without keeping the pages.

The walk is a generator. It yields ``PageVisit`` for each page, parents before children, and
``PageNeeded`` where a page is not in memory: the answer, by ``send``, is the block it names::

    walk = block_map.walk()
    step = next(walk, None)
    while step is not None:
        try:
            if isinstance(step, PageNeeded):
                step = walk.send(await read_block(step.ref))
            else:
                keep(step.ref, step.data_refs())
                step = next(walk)
        except StopIteration:
            break
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from torus_actors.errors import Invalid
from torus_actors.model.inode_tree_pages import (
    ENTRY_SIZE,
    FANOUT_BITS,
    BlockEntry,
    Page,
    decode_page,
)
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef


class PageNeeded(Exception):
    """A page must be read before the call can be answered; a request, not a failure.

    Args:
        level: 0 for a leaf.
        page_number: which page of its level.
        ref: the block that holds it.
        crc: root checksum of the page, see ``page_root``.
    """

    def __init__(self, level: int, page_number: int, ref: BlockRef, crc: int) -> None:
        super().__init__(f"INode page {page_number} of level {level}, block {ref}")
        self.level = level
        self.page_number = page_number
        self.ref = ref
        self.crc = crc


@dataclass(frozen=True, slots=True)
class PageVisit:
    """One page as it was when the walk came to it.

    Attributes:
        level: 0 for a leaf, whose entries are data blocks; otherwise they are pages, each of which
            is visited too.
        number: which page of its level.
        ref: where the page was last stored, which may be an older state of it; ``None`` if never.
        slots: slots in use, ascending.
        packed: their entries, 28 bytes each.
    """

    level: int
    number: int
    ref: BlockRef | None
    slots: tuple[int, ...]
    packed: bytes

    def refs(self) -> list[BlockRef]:
        """The refs in the page: of data blocks in a leaf, of child pages otherwise."""
        packed = self.packed
        return [
            BlockRef(packed[at : at + BLOCK_REF_SIZE]) for at in range(0, len(packed), ENTRY_SIZE)
        ]

    def data_refs(self) -> list[BlockRef]:
        """The refs of data blocks in the page: none in an inner one."""
        return [] if self.level else self.refs()

    def items(self) -> Iterator[tuple[int, BlockRef]]:
        """Number of each block, or child page, with its ref."""
        base = self.number << FANOUT_BITS
        for slot, ref in zip(self.slots, self.refs(), strict=True):
            yield base + slot, ref


Walk = Generator[PageNeeded | PageVisit, bytes | memoryview | None, None]
ReadPage = Callable[[PageNeeded], bytes | memoryview]


def walk_pages(
    level: int, root: BlockEntry | None, root_page: Page | None, loaded: list[dict[int, Page]]
) -> Walk:
    """Walk a tree.

    Args:
        level: that of the root page.
        root: where the root page is stored, if it is.
        root_page: the root page, if it is in memory.
        loaded: pages in memory by number, for each level; may change during the walk.
    """
    # What is in memory now is held by the walk itself: such a page may be newer than what its
    # parent says, and may be written and dropped before the walk comes to it.
    stack: list[tuple[int, int, BlockEntry | None, Page | None]] = []
    stack.append((level, 0, root, root_page))
    while stack:
        level, number, entry, page = stack.pop()
        in_memory = page is not None
        if page is None:
            if entry is None:
                continue
            data = yield PageNeeded(level, number, entry.ref, entry.root)
            if data is None:
                raise Invalid("a walk needs the page it asked for")
            page = decode_page(level, number, entry.root, data)
        ref = None if entry is None else entry.ref
        visit = PageVisit(level, number, ref, tuple(page.slots), bytes(page.entries))
        if level:
            children: dict[int, tuple[BlockEntry | None, Page | None]] = {}
            base = number << FANOUT_BITS
            below = loaded[level - 1]
            for slot, child in page.items():
                children[base + slot] = (child, below.get(base + slot))
            if in_memory:
                # New pages are not entered into their parent before they are stored.
                for child_number, child_page in below.items():
                    if child_number >> FANOUT_BITS == number and child_number not in children:
                        children[child_number] = (None, child_page)
            for child_number in sorted(children, reverse=True):
                stack.append((level - 1, child_number, *children[child_number]))
        yield visit


def visits(walk: Walk, read: ReadPage | None = None) -> Iterator[PageVisit]:
    """Run a walk where reading a page needs no waiting.

    Args:
        walk: from ``BlockMap.walk``.
        read: gives the block that holds a page. Without it every page must be in memory.

    Raises:
        PageNeeded: a page is not in memory, and there is no ``read``.
    """
    try:
        step = next(walk)
        while True:
            if isinstance(step, PageVisit):
                yield step
                step = next(walk)
            elif read is None:
                raise step
            else:
                step = walk.send(read(step))
    except StopIteration:
        return
