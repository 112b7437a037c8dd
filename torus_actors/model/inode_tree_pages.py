"""Pages of the INode tree, in memory and as stored.

A page has up to 1024 entries of 28 bytes: a block ref and the root of that block's checksums. In a
leaf (level 0) an entry is a data block, in an inner page the block that holds a child page. Memory
holds a page packed, as it is stored, so that it costs what it holds, and loading or storing it is a
copy.

Stored page, little-endian::

    magic 4s | format u8 | level u8 | count u16 | page number u64 | crc u32
    count x slot u16        left out when count is 1024
    count x (ref 24s | crc u32)

``crc`` is the CRC-32C of everything else in the page.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from crc32c import crc32c

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

FANOUT_BITS = 10
FANOUT = 1 << FANOUT_BITS
"""Entries of a page. A leaf maps 512 MiB of 512 KiB blocks, and 1 TiB takes 2049 pages."""

SLOT_MASK = FANOUT - 1

_HEADER = struct.Struct("<4sBBHQI")
_ENTRY = struct.Struct("<24sI")
ENTRY_SIZE = _ENTRY.size

PAGE_SIZE_MAX = _HEADER.size + (FANOUT - 1) * (2 + ENTRY_SIZE)
"""Bytes of the largest stored page; a block must have room for it."""

_MAGIC = b"TIPg"
_FORMAT = 1
_CRC_OFFSET = _HEADER.size - 4
UINT32_MAX = 0xFFFF_FFFF


class BlockEntry(NamedTuple):
    """What the map says of one block."""

    ref: BlockRef
    """Where it is stored."""

    root: int
    """The checksum that stands for it: the root of a data block, or of the block of a page."""


def pack_entry(ref: bytes, root: int) -> bytes:
    """An entry's 28 bytes.

    Raises:
        Invalid: not a ref of 24 bytes, or a root that does not fit 32 bits.
    """
    if len(ref) != BLOCK_REF_SIZE or not 0 <= root <= UINT32_MAX:
        raise Invalid(f"not a block entry: ref of {len(ref)} bytes, root {root}")
    return _ENTRY.pack(ref, root)


class Page:
    """One page in memory.

    Args:
        level: 0 for a leaf.
        number: which page of its level, from the left.
    """

    __slots__ = ("dirty", "entries", "level", "number", "slots", "used", "writing")

    def __init__(self, level: int, number: int) -> None:
        self.level = level
        self.number = number
        self.slots = array("H")
        """Slots in use, ascending; entry i of ``entries`` is that of ``slots[i]``."""
        self.entries = bytearray()
        self.dirty = False
        """Changed since it was last serialised."""
        self.writing = False
        """Serialised by a commit of which it is not known yet whether it will succeed."""
        self.used = 0
        """When it was last used, in lookups of its map."""

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.slots)

    def _find(self, slot: int) -> int:
        """Position of a slot, or where it would be inserted."""
        slots = self.slots
        # A page that was filled from the left, which is the usual one, needs no search.
        if slot < len(slots) and slots[slot] == slot:
            return slot
        return bisect_left(slots, slot)

    def get(self, slot: int) -> BlockEntry | None:
        """The entry at a slot, 0 to 1023, or ``None``."""
        slots = self.slots
        if slot < len(slots) and slots[slot] == slot:
            at = slot
        else:
            at = bisect_left(slots, slot)
            if at == len(slots) or slots[at] != slot:
                return None
        ref, root = _ENTRY.unpack_from(self.entries, at * ENTRY_SIZE)
        return BlockEntry(BlockRef(ref), root)

    def put(self, slot: int, packed: bytes) -> None:
        """Set the entry at a slot to 28 packed bytes."""
        slots = self.slots
        at = self._find(slot)
        start = at * ENTRY_SIZE
        if at < len(slots) and slots[at] == slot:
            self.entries[start : start + ENTRY_SIZE] = packed
        else:
            slots.insert(at, slot)
            self.entries[start:start] = packed

    def has_any(self, first: int, stop: int) -> bool:
        """Whether some slot from ``first`` up to, not including, ``stop`` is in use."""
        at = self._find(first)
        return at < len(self.slots) and self.slots[at] < stop

    def remove(self, first: int, stop: int) -> None:
        """Free the slots from ``first`` up to, not including, ``stop``."""
        low, high = self._find(first), bisect_left(self.slots, stop)
        del self.slots[low:high]
        del self.entries[low * ENTRY_SIZE : high * ENTRY_SIZE]

    def items(self) -> Iterator[tuple[int, BlockEntry]]:
        """Slots in use with their entries, ascending."""
        unpacked = _ENTRY.iter_unpack(bytes(self.entries))
        for slot, (ref, root) in zip(list(self.slots), unpacked, strict=True):
            yield slot, BlockEntry(BlockRef(ref), root)

    def run_end(self, slot: int) -> tuple[int, bool]:
        """How far from ``slot`` on slots are alike.

        Returns:
            The first slot that differs, at most 1024, and whether those before it are in use.
        """
        slots = self.slots
        at = self._find(slot)
        if at == len(slots):
            return FANOUT, False
        if slots[at] != slot:
            return slots[at], False
        # Slots ascend, so a stretch without a gap is one in which slot - position is constant.
        low, high = at, len(slots)
        while low < high:
            middle = (low + high) // 2
            if slots[middle] - slot == middle - at:
                low = middle + 1
            else:
                high = middle
        return slot + low - at, True

    def encode(self) -> bytes:
        """The page as it is stored."""
        count = len(self.slots)
        body = bytes(self.entries) if count == FANOUT else _slot_bytes(self.slots) + self.entries
        head = _HEADER.pack(_MAGIC, _FORMAT, self.level, count, self.number, 0)[:_CRC_OFFSET]
        crc = crc32c(body, crc32c(head))
        return b"".join((head, crc.to_bytes(4, "little"), body))


def page_root(data: bytes | memoryview) -> int:
    """The checksum by which a page's parent knows it: its root checksum as a stored block.

    So a page is verified, and repaired, on its way from a peer like any other block.
    """
    return root_of(sums_of(data))


def decode_page(level: int, number: int, crc: int, data: bytes | memoryview) -> Page:
    """Read a stored page.

    Args:
        level: which level it must be of.
        number: which page it must be.
        crc: root checksum that its bytes must have, see ``page_root``.
        data: the block it is in; bytes behind the page are ignored.

    Raises:
        Corruption: it is another page, or not one, or damaged.
    """
    where = f"INode page {number} of level {level}"
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise Corruption(f"{where} is cut off")
    magic, version, its_level, count, its_number, _ = _HEADER.unpack_from(view)
    slots_size = 0 if count == FANOUT else 2 * count
    start = _HEADER.size + slots_size
    end = start + count * ENTRY_SIZE
    if magic != _MAGIC or count > FANOUT or end > len(view) or page_root(view[:end]) != crc:
        raise Corruption(f"{where} does not match its checksum")
    if version != _FORMAT or (its_level, its_number) != (level, number):
        raise Corruption(f"{where}: found page {its_number} of level {its_level} in its place")
    page = Page(level, number)
    if count == FANOUT:
        page.slots = array("H", range(FANOUT))
    else:
        page.slots = _slots_from(view[_HEADER.size : start])
        ascending = list(page.slots)
        if ascending != sorted(set(ascending)) or (ascending and ascending[-1] >= FANOUT):
            raise Corruption(f"{where} has slots out of order")
    page.entries = bytearray(view[start:end])
    return page


def _slot_bytes(slots: array[int]) -> bytes:
    if sys.byteorder == "big":
        slots = array("H", slots)
        slots.byteswap()
    return slots.tobytes()


def _slots_from(data: memoryview) -> array[int]:
    slots = array("H", data.tobytes())
    if sys.byteorder == "big":
        slots.byteswap()
    return slots
