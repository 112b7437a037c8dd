"""Which block is in which slot: compact tables in memory.

About 50 bytes a slot. The tables are anonymous memory maps of their final size: the kernel gives a
page when it is first touched, so an empty store costs little, and no insert ever stops the event
loop to grow a table. Slots are taken lowest first, which keeps both the file and these tables
dense.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Literal

from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

SLOTS_MAX = 0xFFFF_FFFE
"""Slot numbers plus one must fit the 32 bits of the hash table."""

FREE = 0
RESERVED = 1
"""A put is writing to it."""
STORED = 2
"""Readable."""
LIMBO = 3
"""Deleted, but the index on the disk may still name it: must not be written to."""
DRAINING = 4
"""Deleted, also on the disk, but somebody is still reading it."""
QUARANTINED = 5
"""Had a bad copy."""


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _table(kind: Literal["I", "Q"], count: int) -> memoryview[int]:
    width = 4 if kind == "I" else 8
    return memoryview(_map(count * width)).cast(kind)


class SlotTable:
    """State, ref, root and length of each slot, and the way from a ref to its slot.

    Args:
        slots: how many there are.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.counts = [slots, 0, 0, 0, 0, 0]
        """How many slots are in each state."""
        self._states = bytearray(slots)
        self._refs = _map(slots * BLOCK_REF_SIZE)
        self.roots = _table("I", slots)
        self.lengths = _table("I", slots)
        self.generations = _table("Q", slots)
        """The generation the slot was last written under."""
        # At most half full, so that a probe rarely meets a second cell.
        cells = 1 << max(3, (2 * slots - 1).bit_length())
        self._mask = cells - 1
        self._cells = _table("I", cells)
        self._free_from = 0

    def state(self, slot: int) -> int:
        """The state of a slot."""
        return self._states[slot]

    def set_state(self, slot: int, state: int) -> None:
        """Move a slot to another state."""
        self.counts[self._states[slot]] -= 1
        self.counts[state] += 1
        self._states[slot] = state
        if state == FREE and slot < self._free_from:
            self._free_from = slot

    def lowest_free(self) -> int:
        """The lowest free slot; -1 if there is none."""
        if not self.counts[FREE]:
            return -1
        # All below the mark is taken; finding a byte is a memchr, 30 us for a million slots.
        slot = self._states.find(FREE, self._free_from)
        self._free_from = slot
        return slot

    def find(self, ref: bytes) -> int:
        """The slot of a ref; -1 if it has none."""
        cells, refs, mask = self._cells, self._refs, self._mask
        cell = hash(ref) & mask
        while slot := cells[cell]:
            at = slot * BLOCK_REF_SIZE
            if refs[at - BLOCK_REF_SIZE : at] == ref:
                return slot - 1
            cell = (cell + 1) & mask
        return -1

    def insert(self, slot: int, ref: bytes, root: int, length: int, generation: int) -> None:
        """Enter a block whose ref is not in the table; the slot becomes STORED."""
        at = slot * BLOCK_REF_SIZE
        self._refs[at : at + BLOCK_REF_SIZE] = ref
        self.roots[slot] = root
        self.lengths[slot] = length
        self.generations[slot] = generation
        cells, mask = self._cells, self._mask
        cell = hash(ref) & mask
        while cells[cell]:
            cell = (cell + 1) & mask
        cells[cell] = slot + 1
        self.set_state(slot, STORED)

    def remove(self, slot: int, state: int) -> None:
        """Take a stored block out of the table; the slot gets another state."""
        cells, mask = self._cells, self._mask
        hole = hash(self.ref(slot)) & mask
        while cells[hole] != slot + 1:
            hole = (hole + 1) & mask
        # Close the gap: move back each follower that the hole would cut off from its home cell.
        cell = hole
        while True:
            cell = (cell + 1) & mask
            other = cells[cell]
            if not other:
                break
            home = hash(self.ref(other - 1)) & mask
            if (cell - home) & mask >= (cell - hole) & mask:
                cells[hole] = other
                hole = cell
        cells[hole] = 0
        self.set_state(slot, state)

    def ref(self, slot: int) -> bytes:
        """The ref last stored in a slot."""
        at = slot * BLOCK_REF_SIZE
        return self._refs[at : at + BLOCK_REF_SIZE]

    def stored_from(self, slot: int) -> Iterator[tuple[int, BlockRef]]:
        """Stored blocks in slot order, from a slot on."""
        find = self._states.find
        while (slot := find(STORED, slot)) >= 0:
            yield slot, BlockRef(self.ref(slot))
            slot += 1

    def highest_used(self) -> int:
        """The highest slot that is not free; -1 if all are."""
        return len(self._states.rstrip(b"\0")) - 1
