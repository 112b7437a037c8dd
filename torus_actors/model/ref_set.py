"""A compact set of block refs: what a collector or an audit has seen of millions of blocks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from pyroaring import BitMap64

from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

_ENTRY = struct.Struct("<16sQ4x")
"""A leaf entry: volume and INode of the ref, its index, and the checksum, which is passed over."""

_REF = struct.Struct("<16sQ")


def compact(entries: bytes) -> bytes:
    """The refs of packed leaf entries, in a fifth of the room or less; see `RefSet.add_compact`."""
    refs = [
        entries[at : at + BLOCK_REF_SIZE] for at in range(0, len(entries), _ENTRY.size)
    ]  # without the checksums, which are all that is different everywhere
    return zlib.compress(b"".join(refs), 1)


class RefSet:
    """For each INode that was written, a roaring bitmap of the indexes under it."""

    def __init__(self) -> None:
        self._bitmaps: dict[bytes, BitMap64] = {}

    def add_all(self, refs: Iterable[BlockRef]) -> None:
        """Add refs."""
        self.add_packed(b"".join([ref + b"\0\0\0\0" for ref in refs]))

    def add_packed(self, entries: bytes) -> None:
        """Add the refs of packed leaf entries."""
        self._add(_ENTRY.iter_unpack(entries))

    def add_compact(self, packed: bytes) -> None:
        """Add what `compact` made."""
        self._add(_REF.iter_unpack(zlib.decompress(packed)))

    def _add(self, refs: Iterable[tuple[bytes, int]]) -> None:
        grouped: dict[bytes, list[int]] = {}
        for key, index in refs:
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
