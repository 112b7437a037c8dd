"""The reading half of a file: layers, then the block map, then the cache, then the ring.

A read finds what is in memory at once, and fetches the rest: pages for random reads, whole blocks
for large or sequential ones, some of them ahead of time. What lies in the write layers is taken
when the read begins, so a block that is put on the ring meanwhile hides no acknowledged write.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torus_actors.errors import BlockUnavailable, Closed, Corruption, Invalid, TorusError
from torus_actors.model.blocksets import Blockset
from torus_actors.model.checksums import PAGE_SIZE, Buffer
from torus_actors.model.extents import MISSING
from torus_actors.model.inode_tree import BlockMap
from torus_actors.model.inode_tree_walk import PageNeeded
from torus_actors.model.refs import BlockRef
from torus_actors.nbd.requests import Hole, Piece
from torus_actors.runtime import ActorSystem
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.stored import Stored
from torus_actors.volume.write_back import WriteBack

WHOLE_READ_MIN = 128 << 10
"""Reads from this size on fetch and keep whole blocks."""

REREADS_MAX = 5
"""How often a read is started anew because its block was overwritten, and deleted, under it."""

STREAMS_MAX = 16
"""Sequential readers told apart."""

SEQUENTIAL_AFTER = 2
"""Reads in a row, each beginning where one ended, that make a sequential reader."""

READAHEAD_MAX = 8
"""Blocks fetched ahead of a sequential reader."""

STREAM_COUNT_MAX = SEQUENTIAL_AFTER + READAHEAD_MAX.bit_length()
"""Reads in a row are counted so far: no more change anything."""

MAP_PAGES_MAX = 2048
"""Pages of the block map kept in memory: 56 MiB, which map 1 TiB of the default block size."""

MAP_PAGES_KEPT = 256
"""Of those, and beyond them, so many that did not change stay: what was loaded for calls that are
under way, and the pages above. Where most have changed, a call would else lose one page for the
next, and never have all that it needs."""

LAYER_PIECES = 64
"""Of a written block, looked at together when extents are told: most blocks have fewer."""

RUN_BLOCKS = 64
"""The same of stored blocks, or of holes."""

Done = Callable[[TorusError | None, Sequence[Piece]], None]

_Missing = tuple[int, int, BlockRef, int, int, int]
"""Which piece of a read, position of its block, ref, root checksum; offset and length in it."""


class _ReadOp:
    """A read of which parts are still to come.

    ``done`` gets the error of a part, if there was one: the file may read again then, because the
    block may have been overwritten and deleted meanwhile.
    """

    __slots__ = ("done", "error", "left", "pieces")

    def __init__(self, pieces: list[Any], left: int, done: Done) -> None:
        self.pieces = pieces
        self.left = left
        self.done = done
        self.error: TorusError | None = None

    def arrived(self, at: int, buffer: Buffer | None, error: TorusError | None) -> None:
        if error is not None:
            self.error = error
        else:
            self.pieces[at] = buffer
        self.left -= 1
        if not self.left:
            self.done(self.error, self.pieces if self.error is None else ())


class ReadSide:
    """See the module.

    Args:
        system: whose ``replicator`` and ``inode_store`` fetch blocks and pages.
        name: for messages.
        size: bytes.
        block_size: bytes.
        blockset: the map from position to block.
        cache: may be shared between files.
        layers: what was written and is not in blocks yet.
    """

    def __init__(
        self,
        system: ActorSystem,
        *,
        name: str,
        size: int,
        block_size: int,
        blockset: Blockset,
        cache: ReadCache,
        layers: WriteBack,
    ) -> None:
        self.system = system
        self.loop = system.loop
        self.name = name
        self.size = size
        self.block_size = block_size
        self.blockset = blockset
        self.cache = cache
        self.layers = layers
        self.unsynced: dict[BlockRef, Stored] = {}
        """Blocks in the map that no flush has made durable yet."""
        self._replicator = system.actor("replicator")
        self._fetching: dict[BlockRef, list[Callable[[Buffer | None, TorusError | None], None]]]
        self._fetching = {}
        self._loading: dict[tuple[int, int], list[Callable[[TorusError | None], None]]] = {}
        self._streams: dict[int, int] = {}

    @property
    def map(self) -> BlockMap:
        """The paged tree under the blockset."""
        return self.blockset.block_map

    def block_length(self, index: int) -> int:
        """Bytes of the file in a block; less than a block only at its end."""
        return min(self.block_size, self.size - index * self.block_size)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Invalid(f"bytes {offset} to {offset + length} are outside volume {self.name}")

    # -- reading -----------------------------------------------------------------------------------

    def read_at(self, offset: int, length: int, done: Done, attempt: int = 0) -> list[Piece] | None:
        """Read.

        Args:
            offset: bytes.
            length: bytes.
            done: called later with the pieces, unless they are returned.
            attempt: how often this read found its blocks gone already.

        Returns:
            Buffers and holes in order, if all is in memory; they must not be changed. None if
            ``done`` will be called.

        Raises:
            Invalid: outside the file.
        """
        self._check_range(offset, length)
        pieces: list[Any] = []
        missing: list[_Missing] = []
        block_size = self.block_size
        position, end = offset, offset + length
        try:
            while position < end:
                index, start = divmod(position, block_size)
                size = min(block_size - start, end - position)
                self._plan(index, start, size, pieces, missing)
                position += size
        except PageNeeded as need:
            self.load_page(need, partial(self._read_again, offset, length, done, attempt))
            return None
        sequential = self._note_stream(offset, end, length)
        if not missing:
            return pieces
        if attempt < REREADS_MAX:
            again = partial(self._reread, offset, length, done, attempt, missing)
            op = _ReadOp(pieces, len(missing), again)
        else:
            op = _ReadOp(pieces, len(missing), done)
        whole = sequential or length >= WHOLE_READ_MIN
        for at, _, ref, root, start, size in missing:
            if whole:
                self._fetch_whole(ref, root, partial(_slice_whole, op, at, start, size))
            else:
                self._fetch_pages(ref, root, start, size, op, at)
        return None

    def _read_again(
        self, offset: int, length: int, done: Done, attempt: int, error: TorusError | None
    ) -> None:
        if error is not None:
            done(error, ())
            return
        pieces = self.read_at(offset, length, done, attempt)
        if pieces is not None:
            done(None, pieces)

    def _reread(
        self,
        offset: int,
        length: int,
        done: Done,
        attempt: int,
        missing: list[_Missing],
        error: TorusError | None,
        pieces: Sequence[Piece],
    ) -> None:
        """End a read; where a block is gone because it was overwritten meanwhile, read again."""
        if isinstance(error, BlockUnavailable) and not all(
            self._is_named(index, ref) for _, index, ref, _, _, _ in missing
        ):
            found = self.read_at(offset, length, done, attempt + 1)
            if found is not None:
                done(None, found)
            return
        done(error, pieces)

    def _is_named(self, index: int, ref: BlockRef) -> bool:
        """Whether the map still has this block there; not, if that is not known."""
        try:
            entry = self.blockset.get(index)
        except PageNeeded:
            return False
        return entry is not None and entry.ref == ref

    def _plan(
        self,
        index: int,
        start: int,
        size: int,
        pieces: list[Any],
        missing: list[_Missing],
    ) -> None:
        """Find a range of one block in the layers, then the map and the cache."""
        layers = self.layers
        if index in layers.dirty or index in layers.frozen:
            for at, length, buffer in layers.read(index, start, size):
                if buffer is MISSING:
                    self._plan_below(index, at, length, pieces, missing)
                else:
                    pieces.append(Hole(length) if buffer is None else buffer)
        else:
            self._plan_below(index, start, size, pieces, missing)

    def _plan_below(
        self,
        index: int,
        start: int,
        size: int,
        pieces: list[Any],
        missing: list[_Missing],
    ) -> None:
        entry = self.blockset.get(index)
        if entry is None:
            pieces.append(Hole(size))
            return
        found = self.at_hand(entry.ref, start, size)
        if found is None:
            missing.append((len(pieces), index, entry.ref, entry.root, start, size))
        pieces.append(found)

    def at_hand(self, ref: BlockRef, start: int, size: int) -> Buffer | None:
        """Bytes of a block, if they are in the cache, or kept because no node may have them."""
        found = self.cache.get(ref, start, size)
        if found is None:
            stored = self.unsynced.get(ref)
            if stored is not None and stored.kept is not None:
                return memoryview(stored.kept)[start : start + size]
        return found

    def _fetch_pages(
        self, ref: BlockRef, root: int, start: int, size: int, op: _ReadOp, at: int
    ) -> None:
        first = start & -PAGE_SIZE
        last = min(-(-(start + size) // PAGE_SIZE) * PAGE_SIZE, self.block_size)

        def arrived(future: asyncio.Future[Any]) -> None:
            error = error_of(future)
            if error is not None:
                op.arrived(at, None, error)
                return
            data = future.result()
            if len(data) != last - first:
                op.arrived(at, None, Corruption(f"block {ref} is shorter than a block"))
                return
            self.cache.put_pages(ref, first, data)
            op.arrived(at, data[start - first : start - first + size], None)

        self._replicator.read.remote(ref, root, first, last - first).add_done_callback(arrived)

    def _fetch_whole(
        self,
        ref: BlockRef,
        root: int,
        then: Callable[[Buffer | None, TorusError | None], None],
    ) -> None:
        waiters = self._fetching.get(ref)
        if waiters is not None:
            waiters.append(then)
            return
        self._fetching[ref] = [then]

        def arrived(future: asyncio.Future[Any]) -> None:
            error = error_of(future)
            data = None if error is not None else future.result()
            if data is not None and len(data) != self.block_size:
                data, error = None, Corruption(f"block {ref} is shorter than a block")
            if data is not None:
                self.cache.put_whole(ref, data)
            for waiter in self._fetching.pop(ref, ()):
                waiter(data, error)

        self._replicator.read.remote(ref, root, 0, self.block_size).add_done_callback(arrived)

    def _note_stream(self, offset: int, end: int, length: int) -> bool:
        """Whether this read continues others; fetches ahead if it does."""
        streams = self._streams
        count = min(streams.pop(offset, -1) + 1, STREAM_COUNT_MAX)
        streams[end] = count
        if len(streams) > STREAMS_MAX:
            del streams[next(iter(streams))]
        if count < SEQUENTIAL_AFTER or self.cache.size_max < READAHEAD_MAX * self.block_size:
            return False
        index = -(-end // self.block_size)
        ahead = min(1 << (count - SEQUENTIAL_AFTER), READAHEAD_MAX)
        for following in range(index, min(index + ahead, -(-self.size // self.block_size))):
            try:
                entry = self.blockset.get(following)
            except PageNeeded as need:
                self.load_page(need, ignore)
                break
            if (
                entry is not None
                and following not in self.layers.dirty
                and following not in self.layers.frozen
                and entry.ref not in self._fetching
                and not self.cache.has_whole(entry.ref)
            ):
                self._fetch_whole(entry.ref, entry.root, ignore)
        return True

    # -- pages of the map --------------------------------------------------------------------------

    def load_page(self, need: PageNeeded, then: Callable[[TorusError | None], None]) -> None:
        """Fetch a page of the block map; several callers share one fetch."""
        key = (need.level, need.page_number)
        waiters = self._loading.get(key)
        if waiters is not None:
            waiters.append(then)
            return
        self._loading[key] = [then]

        def arrived(future: asyncio.Future[Any]) -> None:
            error = error_of(future)
            if error is None:
                try:
                    self.map.load(need, future.result())
                    self.map.drop_clean_pages(MAP_PAGES_MAX, MAP_PAGES_KEPT)
                except TorusError as broken:
                    error = broken
            elif not self.map.needs(need):
                error = None  # it was trimmed, and collected; who waits looks at what is there now
            for waiter in self._loading.pop(key, ()):
                waiter(error)

        self.system.actor("inode_store").get_page.remote(need.ref, need.crc).add_done_callback(
            arrived
        )

    async def load(self, need: PageNeeded) -> None:
        """As ``load_page``, for coroutines."""
        future: asyncio.Future[None] = self.loop.create_future()

        def then(error: TorusError | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.load_page(need, then)
        await future

    async def with_pages(self, call: Callable[[], Any]) -> Any:
        """Call something on the map, loading pages until it can be answered."""
        while True:
            try:
                return call()
            except PageNeeded as need:
                await self.load(need)

    # -- holes -------------------------------------------------------------------------------------

    def extents(
        self, offset: int, length: int, extents_max: int, pieces_max: int
    ) -> tuple[list[tuple[int, bool]], int]:
        """Which parts of a range hold data: of all of it, or of as much as the bounds allow.

        Args:
            offset: bytes.
            length: bytes, at least 1.
            extents_max: end after so many extents.
            pieces_max: end after looking at so many pieces, of which an extent may have many.

        Returns:
            Lengths in bytes, each with whether it is data; in order, neighbours differ. Then how
            many pieces that took: the cost of it.

        Raises:
            PageNeeded: a page of the map must be loaded first.
            Invalid: outside the file.
        """
        self._check_range(offset, length)
        found: list[tuple[int, bool]] = []
        pieces = 0
        try:
            for size, data in itertools.islice(self._pieces(offset, length), pieces_max):
                pieces += 1
                if found and found[-1][1] is data:
                    found[-1] = (found[-1][0] + size, data)
                elif len(found) < extents_max:
                    found.append((size, data))
                else:
                    break
        except PageNeeded:
            if not found:
                raise
        return found, pieces

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The parts of a range one by one, each at a bounded cost; neighbours may be alike."""
        layers, block_size = self.layers, self.block_size
        position, end = offset, offset + length
        blocks = -(-end // block_size)
        while position < end:
            index, start = divmod(position, block_size)
            if index in layers.dirty or index in layers.frozen:
                size = min(block_size - start, end - position)
                for _, part, buffer in layers.read(index, start, size, LAYER_PIECES):
                    below = buffer is MISSING and self.blockset.get(index) is not None
                    yield part, below or (buffer is not None and buffer is not MISSING)
                    position += part
            else:
                run, stored = self.map.run_end(index, min(index + RUN_BLOCKS, blocks))
                size = min(layers.first_index(index + 1, run) * block_size, end) - position
                yield size, stored
                position += size


def _slice_whole(
    op: _ReadOp, at: int, start: int, size: int, data: Buffer | None, error: TorusError | None
) -> None:
    op.arrived(at, None if data is None else memoryview(data)[start : start + size], error)


def ignore(*_: Any) -> None:
    """Nobody waits for this."""


def error_of(future: asyncio.Future[Any]) -> TorusError | None:
    """What a call failed with; None if it did not."""
    if future.cancelled():
        return Closed("given up")
    error = future.exception()
    if error is None or isinstance(error, TorusError):
        return error
    return TorusError(repr(error))
