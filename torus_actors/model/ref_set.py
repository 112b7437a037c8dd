"""A compact set of block refs: what a collector or an audit has seen of millions of blocks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from pyroaring import BitMap64

from torus_actors.model.inode_tree_pages import ENTRY_SIZE
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

_REF = struct.Struct("<16sQ")
"""Volume and INode of a ref, and its index."""


def compact(entries: bytes) -> bytes:
    """The refs of packed leaf entries, in a fifth of the room or less; see `RefSet.add_compact`."""
    # Without the checksums, which are all that is different everywhere.
    starts = range(0, len(entries), ENTRY_SIZE)
    return zlib.compress(b"".join([entries[at : at + BLOCK_REF_SIZE] for at in starts]), 1)


class RefSet:
    """For each INode that was written, a roaring bitmap of the indexes under it."""

    def __init__(self) -> None:
        self._bitmaps: dict[bytes, BitMap64] = {}

    def add_all(self, refs: Iterable[BlockRef]) -> None:
        """Add refs."""
        self._add(b"".join(refs))

    def add_compact(self, packed: bytes) -> None:
        """Add what `compact` made."""
        self._add(zlib.decompress(packed))

    def _add(self, refs: bytes) -> None:
        grouped: dict[bytes, list[int]] = {}
        for key, index in _REF.iter_unpack(refs):
            grouped.setdefault(key, []).append(index)
        for key, indexes in grouped.items():
            bitmap = self._bitmaps.get(key)
            if bitmap is None:
                bitmap = self._bitmaps[key] = BitMap64()
            bitmap.update(indexes)

    def __contains__(self, ref: BlockRef) -> bool:
        bitmap = self._bitmaps.get(ref[:16])
        return bitmap is not None and int.from_bytes(ref[16:], "little") in bitmap

    def __len__(self) -> int:
        return sum(len(bitmap) for bitmap in self._bitmaps.values())
