"""The bytes of an mfile store's two files.

Index file, all numbers little-endian:

    page 0, 1   the header, twice: written in turn, the valid one with the higher sequence counts;
                opening writes both
    page 2...   one entry of 64 bytes for each slot; zeros is a free slot

Data file:

    page 0      a mark that ties it to its index
    then slots  each: the block's checksum list, padded to whole pages; then room for one block

Every structure ends in a CRC-32C of what is before it. An entry's also covers the store's id, so
that what an earlier store left on the same disk is never taken for an entry of this one.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from crc32c import crc32c

from torus_actors.errors import Corruption
from torus_actors.model.checksums import PAGE_SIZE, sums_size
from torus_actors.model.refs import BLOCK_REF_SIZE
from torus_actors.storage.disk import File

MAGIC = b"TORUSIDX"
DATA_MAGIC = b"TORUSDAT"
VERSION = 1

HEADER_COPIES = 2
ENTRIES_OFFSET = HEADER_COPIES * PAGE_SIZE
DATA_OFFSET = PAGE_SIZE

ENTRY_SIZE = 64
STATE_STORED = 1

# magic, version, flags, block size, slots, sequence, incarnation, store id
_HEADER = struct.Struct("<8sIIQQQQ16s")
# magic, version, zero, block size, store id
_DATA_MARK = struct.Struct("<8sIIQ16s")
# ref, root, length, state, zero, generation, slot, zeros
_ENTRY = struct.Struct("<24sIIIIQQ4x")
_ENTRY_CRC = struct.Struct("<24sIIIIQQ4xI")
_CRC = struct.Struct("<I")
_ZERO_REF = bytes(BLOCK_REF_SIZE)

ZERO_ENTRY = bytes(ENTRY_SIZE)

_FLAG_CLEAN = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What an index says of its store."""

    block_size: int
    slots: int
    sequence: int
    """Grows with each header written; its last bit says which copy it goes to."""
    incarnation: int
    """How often the store was opened."""
    clean: bool
    """Closed in order: the index file is durable as it reads."""
    store_id: bytes

    def pack(self) -> bytes:
        """One page."""
        body = _HEADER.pack(
            MAGIC,
            VERSION,
            _FLAG_CLEAN if self.clean else 0,
            self.block_size,
            self.slots,
            self.sequence,
            self.incarnation,
            self.store_id,
        )
        return (body + _CRC.pack(crc32c(body))).ljust(PAGE_SIZE, b"\0")

    @classmethod
    def first(cls, block_size: int, slots: int, store_id: bytes) -> Header:
        """That of a new store."""
        return cls(block_size, slots, 1, 0, True, store_id)

    def successor(self, *, clean: bool) -> Header:
        """The one to write after this one."""
        return dataclasses.replace(self, sequence=self.sequence + 1, clean=clean)

    def write(self, index: File) -> None:
        """Put it into an index file, durably; never over its predecessor."""
        index.pwrite(self.pack(), self.sequence % HEADER_COPIES * PAGE_SIZE)
        index.fdatasync()

    @property
    def incarnation_id(self) -> int:
        """See `BlockStore`: a random start for each store, and one more for each opening."""
        return (int.from_bytes(self.store_id[:8], "little") + self.incarnation) % (1 << 63)

    @property
    def data_mark(self) -> bytes:
        """The first page of the data file."""
        body = _DATA_MARK.pack(DATA_MAGIC, VERSION, 0, self.block_size, self.store_id)
        return (body + _CRC.pack(crc32c(body))).ljust(PAGE_SIZE, b"\0")


def parse_header(pages: bytes, path: str) -> Header:
    """Read the first two pages of an index.

    Raises:
        Corruption: neither holds a header of this version.
    """
    found = []
    for at in range(0, ENTRIES_OFFSET, PAGE_SIZE):
        page = pages[at : at + PAGE_SIZE]
        body = page[: _HEADER.size]
        if len(page) < PAGE_SIZE or body[: len(MAGIC)] != MAGIC:
            continue
        if _CRC.unpack_from(page, _HEADER.size)[0] != crc32c(body):
            continue
        _, version, flags, block_size, slots, sequence, incarnation, store_id = _HEADER.unpack(body)
        if version != VERSION:
            raise Corruption(
                f"block index {path} has format {version}; this program reads {VERSION}"
            )
        found.append(
            Header(block_size, slots, sequence, incarnation, bool(flags & _FLAG_CLEAN), store_id)
        )
    if not found:
        raise Corruption(f"{path} is not a block index, or its header is damaged")
    return max(found, key=lambda header: header.sequence)


class Layout:
    """Where things lie, for one block size."""

    def __init__(self, block_size: int) -> None:
        self.sums_room = -(-sums_size(block_size) // PAGE_SIZE) * PAGE_SIZE
        """Bytes before the block in its slot."""
        self.slot_size = self.sums_room + block_size

    def slot_offset(self, slot: int) -> int:
        """Where in the data file a slot begins."""
        return DATA_OFFSET + slot * self.slot_size

    def data_size(self, slots: int) -> int:
        """Length of the data file."""
        return DATA_OFFSET + slots * self.slot_size

    @staticmethod
    def index_size(slots: int) -> int:
        """Length of the index file, whole pages."""
        return ENTRIES_OFFSET + -(-slots * ENTRY_SIZE // PAGE_SIZE) * PAGE_SIZE

    def slots_in(self, size_bytes: int) -> int:
        """How many slots fit when both files together may take so much."""
        # A page of entries is rounded up, hence the one page taken off.
        room = size_bytes - DATA_OFFSET - ENTRIES_OFFSET - PAGE_SIZE
        return max(0, room // (self.slot_size + ENTRY_SIZE))


def entry_seed(store_id: bytes) -> int:
    """What the checksums of a store's entries start from."""
    return crc32c(store_id)


def pack_entry(ref: bytes, root: int, length: int, generation: int, slot: int, seed: int) -> bytes:
    """The index entry of a stored block, 64 bytes."""
    body = _ENTRY.pack(ref, root, length, STATE_STORED, 0, generation, slot)
    return body + _CRC.pack(crc32c(body, seed))


def parse_entries(
    chunk: memoryview, first_slot: int, block_size: int, seed: int
) -> Iterator[tuple[int, bytes, int, int, int]]:
    """Read a run of entries.

    Yields:
        (slot, ref, root, length, generation) for each valid one; ref is None-like (zeros) with
        length 0 for one that is neither valid nor zeros: torn, or rotten.
    """
    slot = first_slot
    at = 0
    for ref, root, length, state, _, generation, own, crc in _ENTRY_CRC.iter_unpack(chunk):
        if crc or length or ref != _ZERO_REF:
            if (
                crc32c(chunk[at : at + 60], seed) == crc
                and own == slot
                and state == STATE_STORED
                and 0 < length <= block_size
            ):
                yield slot, ref, root, length, generation
            else:
                yield slot, _ZERO_REF, 0, 0, 0
        slot += 1
        at += ENTRY_SIZE
