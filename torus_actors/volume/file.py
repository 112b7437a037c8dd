"""A file over immutable blocks: writes, trims, and writing back; ``read_side`` has the reads.

One ``File`` belongs to one volume actor and runs on its loop. It is a plain object on purpose: it
holds acknowledged writes, so it must outlive the actor, whose successor calls ``resume``.

Data path calls take a callback instead of being coroutines, because a task a request would cost
more than the request. ``done(error, pieces)`` is called exactly once, unless the call itself
returned the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from torus_actors.errors import (
    BlockUnavailable,
    Closed,
    Fenced,
    Invalid,
    OutOfSpace,
    Overloaded,
    TorusError,
    anew,
)
from torus_actors.model.blocksets import Blockset
from torus_actors.model.buffers import BufferPool
from torus_actors.model.checksums import Buffer, root_of, sums_of
from torus_actors.model.extents import COMPACT_RATIO, ExtentMap
from torus_actors.model.inode_tree_walk import PageNeeded
from torus_actors.model.refs import BlockRef
from torus_actors.nbd.requests import Piece
from torus_actors.runtime import ActorSystem
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.read_side import Done, ReadSide, ignore
from torus_actors.volume.room import RECLAIM_PATIENCE_S, RoomToCome
from torus_actors.volume.stored import Stored
from torus_actors.volume.write_back import EXTENT_OVERHEAD_BYTES, WriteBack

log = logging.getLogger(__name__)

PUTS_MAX = 16
"""Blocks on their way to the ring at once: 8 MiB of the default size, enough to keep two peers busy
and little enough for the slowest to finish within its time-out."""

PUTS_BESIDE_FLUSHES = 4
"""The same while small flushes come in, whose records share the disks and the processors with them:
beside 4 puts there are two to three times as many flushes a second as beside 16."""

PRESSURE = 0.5
"""Share of the write cache above which partly written blocks are put on the ring. Below it they
wait, because each costs a read of the rest of the block, and more writes may come to it."""

ASSEMBLED_BYTES_MAX = 8 << 20
"""Idle memory that is kept for blocks made of parts; those that are stored go to the read cache."""

KEPT_SHARE = 0.5
"""So much memory, as a share of the write cache, is for blocks that are on the ring and not durable
yet, the first ones since they last all were: should all nodes that took one crash, they get it from
here. What the read cache has too counts twice and is there once."""

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
"""Pause before a failed write-back is tried again."""

WAIT_FOR_ROOM_S = 60.0
"""How long a write waits for room while nothing can be put on the ring, before it fails."""

WARN_EVERY_S = 5.0
"""Pause between warnings that blocks cannot be stored: they fail by the dozen."""

DISCARD_S = 0.25
"""Blocks overwritten before any head named them are discarded in batches this often."""

CLEAR_RANGE_MIN = 64
"""Trims of this many whole blocks clear the map at once instead of block by block."""

WAITING_WRITES_MAX = 1 << 20
"""Writes that may wait for room in the cache; the NBD connections bound them too."""

Spawn = Callable[[Coroutine[Any, Any, Any]], Any]

_ZEROS = memoryview(bytes(1 << 20))


class _Zeros:
    """Zeros that are written like data, piece by piece, from ``at`` to ``end``.

    Attributes:
        waits_since: when the last piece was handed in.
        reclaims: of the file, how often it had found the cluster full by then.
        full_since: since when a piece has waited while the cluster was full; None if none has.
    """

    __slots__ = ("at", "done", "end", "full_since", "reclaims", "waits_since")

    def __init__(self, at: int, end: int, done: Done) -> None:
        self.at = at
        self.end = end
        self.done = done
        self.waits_since = 0.0
        self.reclaims = 0
        self.full_since: float | None = None


class File(ReadSide):
    """See the module.

    Args:
        system: whose ``replicator`` stores and fetches blocks.
        name: for logs.
        size: bytes.
        blockset: the map from position to block, as last committed.
        read_cache: may be shared between files.
        write_cache_bytes: bound of what is written and not yet in blocks.
        read_only: writes are refused.
    """

    def __init__(
        self,
        system: ActorSystem,
        *,
        name: str,
        size: int,
        block_size: int,
        blockset: Blockset,
        read_cache: ReadCache,
        write_cache_bytes: int,
        next_ref: Callable[[], BlockRef],
        read_only: bool = False,
    ) -> None:
        super().__init__(
            system,
            name=name,
            size=size,
            block_size=block_size,
            blockset=blockset,
            cache=read_cache,
            layers=WriteBack(write_cache_bytes),
        )
        self.next_ref = next_ref
        self.read_only = read_only
        self.failure: TorusError | None = None
        """Why the file takes no writes any more; None while it does."""
        self.kept_max = max(int(write_cache_bytes * KEPT_SHARE) // block_size, PUTS_MAX)
        """How many blocks are kept in memory until they are durable."""
        self.fresh: dict[BlockRef, None] = {}
        """Blocks in the map that no plan of a commit has named yet: once overwritten, nobody's."""
        self._discards: dict[str, list[BlockRef]] = {}
        self._tried: list[BlockRef] = []
        """To be discarded too, by whoever has them."""
        self._discard_timer: asyncio.TimerHandle | None = None
        self.reclaiming = False
        """Whether the cluster is full and garbage is being looked for."""
        self._reclaims = 0
        """How often that was begun."""
        self.written_at = -math.inf
        """When anybody last wrote to it, or made zeros, since it was opened; the loop's time."""
        self.commit_soon: Callable[[], None] = ignore
        self.yields: Callable[[], bool] = lambda: False
        """Whether puts are to leave the disks to something more urgent."""
        self.spawn: Spawn | None = None
        self._pool = BufferPool(ASSEMBLED_BYTES_MAX)
        self._ready: deque[int] = deque()
        self._wanted: set[int] = set()
        self._waiting: deque[tuple[int, Buffer | None, int, Done]] = deque()
        self._stuck_since = 0.0
        self._putting = 0
        self._holding = False
        self.held = False
        """Whether writes wait, so that a snapshot is of one moment."""
        self._failed_puts: dict[int, tuple[BlockRef, bytes]] = {}
        """By block number, under which ref what was tried and failed: some peers may have it."""
        self._retry_s = RETRY_FIRST_S
        self._retry_timer: asyncio.TimerHandle | None = None
        self._progress: asyncio.Future[None] | None = None
        self.stored = 0
        """Blocks put on the ring so far."""
        self.put_error: TorusError | None = None
        """What the last write-back failed with; None after one succeeded."""
        self._warned_at: float | None = None
        self.last_error: TorusError | None = None
        """The same, but kept: for telling why it takes so long."""

    # -- life --------------------------------------------------------------------------------------

    def resume(self, spawn: Spawn) -> None:
        """Go on under a new owner: what the old one was putting on the ring is put again."""
        self.spawn = spawn
        self._putting = 0
        self._holding = False
        self.reclaiming = False
        self._ready.clear()
        self._wanted.clear()
        for index in list(self.layers.frozen):
            self.layers.thaw(index)
        for index, layer in self.layers.dirty.items():
            if layer.is_full(self.block_length(index)):
                self.layers.filled(index)
                self._wanted.add(index)
                self._ready.append(index)
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        self.pump()
        self.release_writes()

    def fail(self, error: TorusError) -> None:
        """Take no writes from now on; what waits for room fails."""
        if self.failure is None:
            self.failure = error
            if not isinstance(error, Closed):
                log.warning("volume %s takes no more writes: %s", self.name, error)
        self._refuse_waiting(self.failure)
        self._announce_progress()

    def _refuse_waiting(self, error: TorusError) -> None:
        """Nobody can say when there will be room: tell those who wait for it.

        Where the cluster is full, zeros that waited behind writes are made, as those that come now.
        """
        waiting, self._waiting = self._waiting, deque()
        full = self.failure is None and isinstance(self.put_error, OutOfSpace)
        for offset, data, length, done in waiting:
            refused: TorusError | None = error
            if full and data is None:
                try:
                    if not self.zero_at(offset, length, False, done):
                        continue
                    refused = None
                except TorusError as failed:
                    refused = failed
            done(refused, ())

    def close(self) -> None:
        """Let go of timers; flush before."""
        self.fail(Closed(f"volume {self.name} is closed"))
        for timer in (self._retry_timer, self._discard_timer):
            if timer is not None:
                timer.cancel()
        self._send_discards()

    # -- writing -----------------------------------------------------------------------------------

    @property
    def was_written(self) -> bool:
        """Whether anybody has written to it, or made zeros, since it was opened."""
        return self.written_at > -math.inf

    def write_at(self, offset: int, data: Buffer, done: Done) -> bool:
        """Write into the cache.

        Args:
            offset: bytes.
            data: kept, and not to be changed ever after.
            done: called later, unless the write is taken at once.

        Returns:
            Whether it was taken; if not, ``done`` will be called once there is room.

        Raises:
            Invalid: outside the file.
            OutOfSpace: the cluster is full and so is the cache.
            Fenced, Closed: the file takes no writes.
        """
        self._check_range(offset, len(data))
        self._check_writable()
        self._check_room()
        self.written_at = self.loop.time()
        if self.held or self._waiting or self.layers.size + len(data) > self.layers.size_max:
            return self._wait_for_room(offset, data, len(data), done)
        self._write(offset, data)
        return True

    def _check_writable(self) -> None:
        if self.failure is not None:
            raise anew(self.failure)
        if self.read_only:
            raise Invalid(f"volume {self.name} is open read-only")

    def _check_room(self) -> None:
        if isinstance(self.put_error, OutOfSpace):
            # Whatever is taken now could not be stored: say so while the writer can still react.
            raise anew(self.put_error)

    def _wait_for_room(self, offset: int, data: Buffer | None, length: int, done: Done) -> bool:
        if data is not None and not (self.layers.size or self._waiting or self.held):
            self._write(offset, data)  # larger than the cache: let through alone
            return True
        if len(self._waiting) >= WAITING_WRITES_MAX:
            raise BlockUnavailable("too many writes wait for room in the write cache")
        if not self._waiting:
            self._stuck_since = self.loop.time()
        self._waiting.append((offset, data, length, done))
        self.pump()
        return False

    def _write(self, offset: int, data: Buffer) -> None:
        block_size = self.block_size
        index, start = divmod(offset, block_size)
        length = len(data)
        if start + length <= block_size:
            layer = self.layers.write(index, start, data)
            if layer.covered_bytes == block_size or layer.covered_bytes == self.block_length(index):
                self._now_full(index)
            elif self.layers.size > self.layers.size_max * PRESSURE:
                self.pump()
            return
        view = memoryview(data)
        at = 0
        while at < length:
            size = min(block_size - start, length - at)
            part: Buffer = view[at : at + size]
            if size < block_size and size * COMPACT_RATIO < length:
                # It may stay for long, and would keep all of the request's memory alive.
                part = bytes(part)
            layer = self.layers.write(index, start, part)
            if layer.is_full(self.block_length(index)):
                self._now_full(index)
            at += size
            index, start = index + 1, 0
        self.pump()

    def _now_full(self, index: int) -> None:
        self.layers.filled(index)
        if index not in self._wanted:
            self._wanted.add(index)
            self._ready.append(index)
        self.pump()

    def trim_at(self, offset: int, length: int, done: Done) -> bool:
        """Give a range back: it reads as zeros, and whole blocks of it take no space.

        Arguments, result and errors are those of ``zero_at``.
        """
        return self.zero_at(offset, length, False, done)

    async def truncate(self, size: int) -> None:
        """Change the size; what lies behind a smaller one is gone, what a larger one adds is zeros.

        Args:
            size: bytes.

        Raises:
            BlockUnavailable, Corruption: a page of the map cannot be loaded; nothing was changed.
        """
        before = self.size
        nblocks = -(-size // self.block_size)
        await self.with_pages(partial(self.blockset.truncate, nblocks))
        if size < before:
            self.layers.drop(nblocks, -(-before // self.block_size))
        self.size = size
        tail = -before % self.block_size
        if size > before and tail:
            # The last block may hold what was there before an earlier truncation.
            self._zero(before, min(tail, size - before))

    def zero_at(self, offset: int, length: int, keep: bool, done: Done) -> bool:
        """Make a range read as zeros.

        Args:
            offset: bytes.
            length: bytes.
            keep: leave it allocated: zeros are stored like data.
            done: as for ``write_at``.

        Returns:
            Whether it is done; if not, ``done`` will be called.

        Raises:
            Invalid, OutOfSpace, Fenced, Closed: as ``write_at``.
        """
        self._check_range(offset, length)
        self._check_writable()
        self.written_at = self.loop.time()
        if keep:
            return self._write_zeros(_Zeros(offset, offset + length, done))
        if self.held:
            return self._wait_for_room(offset, None, length, done)
        if isinstance(self.put_error, OutOfSpace):
            # Not refused where the cluster is full, since this is how room is made; but the zero
            # runs themselves must not fill the memory. Data may: a replay brings any amount.
            layers = self.layers
            if layers.size >= 2 * layers.size_max and layers.overhead >= layers.size_max:
                raise anew(self.put_error)
        elif self._waiting or self.layers.size >= self.layers.size_max:
            return self._wait_for_room(offset, None, length, done)
        return self._make_zero(offset, length, done)

    def _make_zero(self, offset: int, length: int, done: Done) -> bool:
        block_size = self.block_size
        first = -(-offset // block_size)
        end = offset + length
        last = -(-end // block_size) if end == self.size else end // block_size
        if last - first < CLEAR_RANGE_MIN:
            self._zero(offset, length)
            return True
        self._zero(offset, first * block_size - offset)
        if end > last * block_size:
            self._zero(last * block_size, end - last * block_size)
        self._clear_range(first, last, done)
        return False

    def _write_zeros(self, zeros: _Zeros) -> bool:
        """Write zeros like data, as much at a time as there is room for."""
        while zeros.at < zeros.end:
            size = min(len(_ZEROS), zeros.end - zeros.at)
            zeros.waits_since = self.loop.time()
            zeros.reclaims = self._reclaims - self.reclaiming  # one under way counts
            then = partial(self._zeros_written, zeros, size)
            if not self.write_at(zeros.at, _ZEROS[:size], then):
                return False
            zeros.at += size
        return True

    def _zeros_written(
        self, zeros: _Zeros, size: int, error: TorusError | None, _: Sequence[Piece]
    ) -> None:
        try:
            if error is not None:
                raise error
            zeros.at += size
            self._check_patience(zeros)
            if not self._write_zeros(zeros):
                return
        except TorusError as failed:
            zeros.done(failed, ())
        else:
            zeros.done(None, ())

    def _check_patience(self, zeros: _Zeros) -> None:
        """See that garbage is waited for as long as a write would, and not for each piece anew."""
        if self._reclaims == zeros.reclaims or zeros.at >= zeros.end:
            return
        if zeros.full_since is None:
            zeros.full_since = zeros.waits_since
        elif self.loop.time() - zeros.full_since > RECLAIM_PATIENCE_S:
            raise OutOfSpace("the cluster is full: it has room for a part of these zeros at a time")

    def _zero(self, offset: int, length: int) -> None:
        block_size = self.block_size
        end = offset + length
        while offset < end:
            index, start = divmod(offset, block_size)
            size = min(block_size - start, end - offset)
            layer = self.layers.zero(index, start, size)
            if layer.is_full(self.block_length(index)):
                self._now_full(index)
            offset += size
        self.pump()

    def _clear_range(self, first: int, last: int, done: Done) -> None:
        try:
            self.blockset.trim(first, last)
        except PageNeeded as need:

            def then(error: TorusError | None) -> None:
                if error is None:
                    error = self.failure
                if error is None:
                    self._clear_range(first, last, done)
                else:
                    done(error, ())

            self.load_page(need, then)
            return
        # In one step with the map: a layer must not be gone before what lies below it is.
        self.layers.drop(first, last)
        for ref in [ref for ref, each in self.unsynced.items() if first <= each.index < last]:
            self._let_go(ref)
        failed = [index for index in self._failed_puts if first <= index < last]
        self.discard_tried([self._failed_puts.pop(index)[0] for index in failed])
        self.loop.call_soon(done, None, ())
        self.loop.call_soon(self._room_made)

    # -- writing back ------------------------------------------------------------------------------

    def want(self, index: int) -> None:
        """Put this block on the ring soon, full or not."""
        if index not in self._wanted and index in self.layers.dirty:
            self._wanted.add(index)
            self._ready.append(index)

    def pump(self) -> None:
        """Start as many puts as are due and allowed."""
        layers = self.layers
        if self._holding or self._retry_timer is not None:
            return
        if self.spawn is None or self.failure is not None or self.read_only:
            return  # a reader's layers are what it found in the journal: they stay in memory
        # Nothing is more urgent than writes that wait, for room or for a snapshot.
        gently = not self._waiting and not self.held and self.yields()
        puts_max = PUTS_BESIDE_FLUSHES if gently else PUTS_MAX
        blocked: list[int] = []
        while self._ready and self._putting < puts_max and self.spawn is not None:
            index = self._ready.popleft()
            if index in layers.frozen:
                blocked.append(index)  # its older layer is still on its way
                continue
            self._wanted.discard(index)
            if index in layers.dirty:
                self._start_put(index)
        self._ready.extend(blocked)
        if self._putting < puts_max and (layers.size > layers.size_max * PRESSURE or self._waiting):
            self._relieve(puts_max - self._putting)

    def _relieve(self, count: int) -> None:
        """The cache is filling: put out the partly written blocks that free the most."""
        layers = self.layers
        oldest = []
        for index in layers.dirty:
            if index not in layers.frozen:
                oldest.append(index)
                if len(oldest) >= 4 * PUTS_MAX:
                    break
        oldest.sort(key=lambda index: -layers.dirty[index].data_bytes)
        for index in oldest[:count]:
            self._start_put(index)

    def _start_put(self, index: int) -> None:
        if self.spawn is None:
            return
        layer = self.layers.freeze(index)
        try:
            self.spawn(self._put(index, layer))
        except Closed:
            # The owner has just died: its successor begins with what is in the layers.
            self.spawn = None
            self.layers.thaw(index)
            return
        self._putting += 1

    @contextlib.asynccontextmanager
    async def no_puts(self) -> AsyncIterator[None]:
        """Start no put, and wait for those on their way; when entered, there is none."""
        self._holding = True
        try:
            while self._putting:
                await self.progress()
            yield
        finally:
            self._holding = False
            self.pump()

    async def _put(self, index: int, layer: ExtentMap) -> None:
        """Make a block of a frozen layer and enter it in the map."""
        ref: BlockRef | None = None
        block: Buffer | None = None
        try:
            if layer.is_all_zero and layer.is_full(self.block_length(index)):
                await self.with_pages(lambda: self._settle(index, layer, None))
            else:
                block = await self._assemble(index, layer)
                sums = sums_of(block)
                root = root_of(sums)
                new = ref = self._name_for(index, block)
                placed = await self._replicator.put_block.remote(
                    ref, root, sums, self.blockset.replication or 0, payload=block
                )
                self.cache.put_whole(ref, block)
                # In the same step as the map: whatever the map names, a flush must cover.
                stored = Stored(root, placed, index, kept=self._kept(ref, block))
                await self.with_pages(lambda: self._settle(index, layer, (new, stored)))
                self.stored += 1
        except TorusError as error:
            if ref is not None and block is not None:
                if self.layers.frozen.get(index) is layer:
                    self._failed_puts[index] = (ref, _digest(block))
                else:
                    self.discard_tried([ref])  # trimmed meanwhile: nobody will try it again
            self._put_failed(index, layer, error)
        else:
            self._retry_s = RETRY_FIRST_S
            failed = self._failed_puts.pop(index, None)
            if failed is not None:
                self.discard_tried([failed[0]])  # zeros took its place
            if ref is not None or not self.layers.size:
                self.put_error = None
        self._putting -= 1
        self._room_made()
        self._announce_progress()
        self.pump()

    def _kept(self, ref: BlockRef, block: Buffer) -> Buffer | None:
        """What to keep of a block until it is durable: as few are kept as the bound says."""
        if len(self.unsynced) >= self.kept_max:
            return None
        # The same memory as in the cache, if that has it.
        cached = self.cache.whole(ref)
        return block if cached is None else cached

    def _name_for(self, index: int, block: Buffer) -> BlockRef:
        """A ref for a block: that of a failed attempt to store the very same, or a fresh one.

        An attempt may fail although some peers took the block. Repeated under ever new names, it
        would fill them with copies that are nobody's.
        """
        ref = self.next_ref()
        failed = self._failed_puts.pop(index, None)
        # One of an older INode would look collectable.
        if failed is not None and failed[0].inode == ref.inode and failed[1] == _digest(block):
            return failed[0]
        if failed is not None:
            self.discard_tried([failed[0]])
        return ref

    def _settle(self, index: int, layer: ExtentMap, block: tuple[BlockRef, Stored] | None) -> None:
        """Enter a block in the map and drop its layer, in one step; may raise PageNeeded."""
        if self.layers.frozen.get(index) is not layer:
            if block is not None:
                self._discard(*block)  # trimmed meanwhile: the block is nobody's
            return
        before = self.blockset.get(index)
        if block is None:
            self.blockset.trim(index, index + 1)
        else:
            ref, stored = block
            self.blockset.put(index, ref, stored.root)
            self.unsynced[ref] = stored
            self.fresh[ref] = None
        if block is None:
            self.layers.settle(index, layer, None, 0)
        else:
            self.layers.settle(index, layer, block[0], block[1].root)
        if before is not None:
            self._let_go(before.ref)

    def _let_go(self, ref: BlockRef) -> None:
        """The map names this block no more.

        If a plan names it, that plan has its own note of it; if not, it need not last.
        """
        stored = self.unsynced.pop(ref, None)
        if ref in self.fresh:
            del self.fresh[ref]
            self._discard(ref, stored)

    def _discard(self, ref: BlockRef, stored: Stored | None) -> None:
        """Have the peers drop a block that was overwritten before any head named it."""
        for peer, _ in stored.placed if stored is not None else ():
            self._discards.setdefault(peer, []).append(ref)
        self._discard_soon()

    def discard_tried(self, refs: list[BlockRef]) -> None:
        """Have all peers drop what some may have taken though storing it failed.

        A collector may not, until a head is stored: it could be named by one that is on its way.
        No other block ever gets one of these names.
        """
        if refs:
            self._tried += refs
            self._discard_soon()

    def _discard_soon(self) -> None:
        if self._discard_timer is None:
            self._discard_timer = self.loop.call_later(DISCARD_S, self._send_discards)

    def _send_discards(self) -> None:
        self._discard_timer = None
        tried, self._tried = self._tried, []
        discards, self._discards = self._discards, {}
        # What nobody can be told now, the collectors find later.
        with contextlib.suppress(Overloaded):
            if tried:
                self._replicator.discard_everywhere.tell(b"".join(tried))
            for peer, refs in discards.items():
                self._replicator.discard.tell(peer, b"".join(refs))

    async def _assemble(self, index: int, layer: ExtentMap) -> Buffer:
        """The whole content of a block: the layer over what is stored."""
        if len(layer) == 1 and layer.is_full(self.block_size):
            ((_, _, buffer),) = layer.items()
            if buffer is not None:
                return buffer
        below: Buffer = b""
        if not layer.is_full(self.block_length(index)):
            entry = await self.with_pages(lambda: self.blockset.get(index))
            if entry is not None:
                cached = self.at_hand(entry.ref, 0, self.block_size)
                if cached is None:
                    cached = await self._replicator.read.remote(
                        entry.ref, entry.root, 0, self.block_size
                    )
                below = cached
        block = self._pool.take(self.block_size)
        block[: len(below)] = below
        if len(below) < self.block_size and not layer.is_full(self.block_size):
            block[len(below) :] = bytes(self.block_size - len(below))
        layer.overlay(block)
        return block

    def _put_failed(self, index: int, layer: ExtentMap, error: TorusError) -> None:
        if self.layers.frozen.get(index) is layer:
            self.layers.thaw(index)
            self.want(index)
        now = self.loop.time()
        if self._warned_at is None or now - self._warned_at > WARN_EVERY_S:
            self._warned_at = now
            log.warning("volume %s: block %d cannot be stored now: %s", self.name, index, error)
        self.last_error = error
        if isinstance(error, Fenced):
            self.fail(error)
        if isinstance(error, OutOfSpace) and not isinstance(self.put_error, OutOfSpace):
            if not self.reclaiming and self.spawn is not None:
                self.reclaiming = True
                self._reclaims += 1
                self.spawn(self._reclaim(error))
        else:
            self.put_error = error
            if now - self._stuck_since > WAIT_FOR_ROOM_S:
                self._refuse_waiting(error)
        if self._retry_timer is None:
            self._retry_timer = self.loop.call_later(self._retry_s, self._retry)
            self._retry_s = min(self._retry_s * 2, RETRY_MAX_S)

    def room_to_come(self) -> RoomToCome:
        """The cluster is full: whom to ask whether it stays so."""
        return RoomToCome(self.loop, self._replicator, self._send_discards)

    async def _reclaim(self, error: TorusError) -> None:
        """The cluster is full: let garbage be collected first, then tell the writers."""
        try:
            self.commit_soon()
            room = self.room_to_come()
            may_come = True
            while may_come:
                stored = self.stored
                may_come = await room.may_come()
                if self.stored != stored:
                    return
            if not self._will_put():
                return  # what could not be stored was trimmed meanwhile
            self.put_error = error
            self._refuse_waiting(error)
            self._announce_progress()
        finally:
            self.reclaiming = False

    def _will_put(self) -> bool:
        """Whether something is about to be put, or will be tried again."""
        return bool(self._putting or self._ready or self._retry_timer is not None)

    def _retry(self) -> None:
        self._retry_timer = None
        self.pump()
        if not self._will_put():
            self.put_error = None  # what could not be stored is gone: nothing will try for it

    def retry_now(self) -> None:
        """Do not wait for the retry timer: somebody asks for the result."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry()

    def hold_writes(self) -> None:
        """From now on writes wait; what was taken before can be told from what comes after."""
        self.held = True

    def release_writes(self) -> None:
        """Writes go on."""
        if self.held:
            self.held = False
            self._room_made()

    def _room_made(self) -> None:
        waiting, layers = self._waiting, self.layers
        while waiting and not self.held:
            offset, data, length, done = waiting[0]
            needed = EXTENT_OVERHEAD_BYTES if data is None else length
            if layers.size + needed > layers.size_max and layers.size:
                break
            waiting.popleft()
            self._stuck_since = self.loop.time()
            if data is not None:
                self._write(offset, data)
                done(None, ())
            elif self._make_zero(offset, length, done):
                done(None, ())

    def _announce_progress(self) -> None:
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)
        self._progress = None

    async def progress(self) -> None:
        """Wait until some put ended, well or not."""
        if self._progress is None:
            self._progress = self.loop.create_future()
        await asyncio.shield(self._progress)


def _digest(block: Buffer) -> bytes:
    return hashlib.blake2b(block, digest_size=16).digest()
