"""The two-level block checksum.

``sums``: one little-endian CRC-32C for every 4 KiB page of a block (the last page may be short),
concatenated. ``root``: the CRC-32C of ``sums``. A blockset keeps the root; the store keeps the sums
beside the block and sends them with every range read, so that any page range is verified end to end
without reading the rest of the block. CRC-32C is RFC 3720's (Castagnoli).
"""

from __future__ import annotations

import struct

from crc32c import crc32c

from torus_actors.errors import Corruption

PAGE_SIZE = 4096

Buffer = bytes | bytearray | memoryview


def sums_size(block_size: int) -> int:
    """Bytes of the checksum list of a block of ``block_size`` bytes."""
    return -(-block_size // PAGE_SIZE) * 4


def sums_of(data: Buffer) -> bytes:
    """Checksum list of a whole block."""
    view = memoryview(data)
    crcs = [crc32c(view[i : i + PAGE_SIZE]) for i in range(0, len(view), PAGE_SIZE)]
    return struct.pack(f"<{len(crcs)}I", *crcs)


def root_of(sums: Buffer) -> int:
    """The checksum that stands for a whole block: CRC-32C of its list."""
    return crc32c(sums)


def verify_range(sums: Buffer, root: int, offset: int, data: Buffer) -> None:
    """Check page-aligned bytes of a block against its root.

    Args:
        sums: the whole checksum list of the block.
        root: what the blockset says of the block.
        offset: where ``data`` starts in the block, bytes, a multiple of 4096.
        data: one buffer; ends on a page boundary or at the end of the block.

    Raises:
        Corruption: the list does not match the root, or a page does not match the list.
    """
    if crc32c(sums) != root:
        raise Corruption("checksum list does not match the block's checksum")
    first = offset // PAGE_SIZE
    if len(data) <= PAGE_SIZE:
        # One page, the commonest read of all.
        want = sums[first * 4 : first * 4 + 4]
        if len(want) != 4:
            raise Corruption("range ends behind the checksum list")
        if crc32c(data) != int.from_bytes(want, "little"):
            raise Corruption(f"page {first} does not match its checksum")
        return
    view = memoryview(data)
    count = -(-len(view) // PAGE_SIZE)
    if (first + count) * 4 > len(sums):
        raise Corruption("range ends behind the checksum list")
    expected = struct.unpack_from(f"<{count}I", sums, first * 4)
    for i, want in enumerate(expected):
        if crc32c(view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) != want:
            raise Corruption(f"page {first + i} does not match its checksum")
