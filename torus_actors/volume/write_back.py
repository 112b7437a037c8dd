"""What was written to a volume and is not in a block yet.

For each block of the file there are up to two layers of extents: ``dirty``, which takes writes,
and ``frozen``, which is being put on the ring and changes no more. A write is readable from the
moment it is in a layer; a layer is dropped only after the block that holds it is in the map.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from torus_actors.model.checksums import Buffer
from torus_actors.model.extents import MISSING, ExtentMap, Piece
from torus_actors.model.refs import BlockRef
from torus_actors.volume.change_log import ChangeLog

EXTENT_OVERHEAD_BYTES = 64
"""Bookkeeping of one extent, counted so that a flood of tiny writes cannot outgrow the bound."""


class WriteBack:
    """The layers of one volume.

    Args:
        size_max: bytes of memory to use; what exceeds it waits.

    Attributes:
        size: bytes of memory in use.
        dirty, frozen: layers by block number, the oldest first.
        log: is told of every change, for the journal.
    """

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.size = 0
        self.dirty: dict[int, ExtentMap] = {}
        self.frozen: dict[int, ExtentMap] = {}
        self.log = ChangeLog()
        self._full_dirty: dict[int, None] = {}
        self._full_frozen: dict[int, None] = {}

    def write(self, index: int, offset: int, data: Buffer) -> ExtentMap:
        """Write into the dirty layer of a block; returns the layer."""
        layer = self.dirty.get(index)
        if layer is None:
            layer = self.dirty[index] = ExtentMap()
        before = _cost(layer)
        layer.write(offset, data)
        self.size += _cost(layer) - before
        if self.log.recording:
            self.log.wrote(index, offset, data, len(data))
        return layer

    def zero(self, index: int, offset: int, length: int) -> ExtentMap:
        """Zero a range in the dirty layer of a block; returns the layer."""
        layer = self.dirty.get(index)
        if layer is None:
            layer = self.dirty[index] = ExtentMap()
        before = _cost(layer)
        layer.zero(offset, length)
        self.size += _cost(layer) - before
        if self.log.recording:
            self.log.wrote(index, offset, None, length)
        return layer

    def read(
        self, index: int, offset: int, length: int, pieces_max: int = sys.maxsize
    ) -> list[Piece]:
        """What the layers know of a range; MISSING is for the block below them.

        Ends after ``pieces_max`` pieces.
        """
        layer = self.dirty.get(index)
        below = self.frozen.get(index)
        if layer is None:
            if below is None:
                return [(offset, length, MISSING)]
            return below.read(offset, length, pieces_max)
        pieces = layer.read(offset, length, pieces_max)
        if below is None:
            return pieces
        merged: list[Piece] = []
        for piece in pieces:
            if len(merged) >= pieces_max:
                break
            if piece[2] is MISSING:
                merged += below.read(piece[0], piece[1], pieces_max - len(merged))
            else:
                merged.append(piece)
        return merged

    def freeze(self, index: int) -> ExtentMap:
        """Take the dirty layer of a block for putting it on the ring; none may be frozen."""
        assert index not in self.frozen
        layer = self.dirty.pop(index)
        self.frozen[index] = layer
        if index in self._full_dirty:
            del self._full_dirty[index]
            self._full_frozen[index] = None
        self.log.froze(index)
        return layer

    def thaw(self, index: int) -> None:
        """The put failed: the frozen layer takes writes again, below those that came since."""
        layer = self.frozen.pop(index)
        newer = self.dirty.pop(index, None)
        if newer is not None:
            before = _cost(layer) + _cost(newer)
            layer.merge_from(newer)
            self.size += _cost(layer) - before
        self.dirty[index] = layer
        if index in self._full_frozen:
            del self._full_frozen[index]
            self._full_dirty[index] = None
        self.log.thawed(index)

    def settle(self, index: int, layer: ExtentMap, ref: BlockRef | None, root: int) -> None:
        """The frozen layer is in the volume's map now, as a block or (no ref) a hole."""
        assert self.frozen.get(index) is layer
        del self.frozen[index]
        self._full_frozen.pop(index, None)
        self.size -= _cost(layer)
        self.log.settled(index, ref, root)

    def drop(self, first: int, last: int) -> None:
        """Forget both layers of blocks ``first`` to ``last`` (not included)."""
        for layers in (self.dirty, self.frozen):
            if last - first < len(layers):
                gone = [i for i in range(first, last) if i in layers]
            else:
                gone = [i for i in layers if first <= i < last]
            for index in gone:
                self.size -= _cost(layers.pop(index))
        for marks in (self._full_dirty, self._full_frozen):
            for index in [i for i in marks if first <= i < last]:
                del marks[index]
        self.log.dropped(first, last)

    def filled(self, index: int) -> None:
        """The dirty layer of a block covers all of it."""
        self._full_dirty[index] = None

    @property
    def overhead(self) -> int:
        """Of ``size``, what is not data; takes a look at each layer."""
        layers = itertools.chain(self.dirty.values(), self.frozen.values())
        return EXTENT_OVERHEAD_BYTES * sum(map(len, layers))

    @property
    def any_full(self) -> bool:
        """Whether there are blocks that are filled completely and not in the map yet."""
        return bool(self._full_dirty or self._full_frozen)

    def full(self) -> list[int]:
        """Those blocks: they are on their way."""
        return [*self._full_frozen, *self._full_dirty]

    def indexes(self) -> Iterator[int]:
        """Every block with a layer, each once."""
        yield from self.frozen
        for index in self.dirty:
            if index not in self.frozen:
                yield index

    def first_index(self, first: int, stop: int) -> int:
        """The first block from ``first`` on that has a layer; ``stop`` if none before that has."""
        dirty, frozen = self.dirty, self.frozen
        if not (dirty or frozen):
            return stop
        return next((i for i in range(first, stop) if i in dirty or i in frozen), stop)


def _cost(layer: ExtentMap) -> int:
    return layer.data_bytes + EXTENT_OVERHEAD_BYTES * len(layer)
