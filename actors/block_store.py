"""The block store of a node: keeps blocks on its disk and gives them to whoever asks.

Messages in, from any node: ``put_block``, ``read_ranges``, ``check_blocks``, ``flush``,
``list_blocks``, ``stats``; from this node also ``delete_blocks``. Messages out: to the disk
workers. What is stored, and what is under way, lives in ``OpenStores``, which outlives the actor:
its death costs callers nothing, since all its messages may be done twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torus_actors.actors.block_messages import (
    CHECK_STATUS,
    INODE_BLOCK_SIZE,
    RANGE,
    RANGE_STATUS,
    Status,
    split_refs,
)
from torus_actors.actors.disk import READERS
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import (
    ActorCrashed,
    ActorNotFound,
    Again,
    BlockNotExist,
    BlockUnavailable,
    Closed,
    Corruption,
    DeadlineExceeded,
    Exists,
    Invalid,
    OutOfSpace,
    TorusError,
)
from torus_actors.model.buffers import BufferPool
from torus_actors.model.checksums import Buffer, sums_size
from torus_actors.model.ref_set import RefSet
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef, BlockType
from torus_actors.runtime import ActorHandle, ActorSystem, LoopActor, Reply, expose
from torus_actors.runtime.cell import LONG_CALL_S, Cell
from torus_actors.storage.aio import READ, AioQueue, Transfer
from torus_actors.storage.disk import Disk, RealDisk
from torus_actors.storage.mfile import MFileStore
from torus_actors.storage.mfile_open import INDEX_PATH
from torus_actors.storage.store import BlockStore, DirectRead, FlushBatch, Level, Location
from torus_actors.wire.limits import PAYLOAD_MAX

log = logging.getLogger(__name__)

INODE_SHARE = 16
"""One part in this many of a node's size is for INode pages."""

INODE_ROOM_MIN = 16 << 20

POOLED_READ_MIN = 64 << 10
"""Reads from this size on come from the buffer pool; small ones are cheaper to allocate."""

POOLED_READ_BYTES = 16 << 20
"""Memory for reads that is kept while none are under way."""

READS_MAX = 256
"""Small reads that the disk works on at once; more go by threads."""

IDLE_FLUSH_S = 2.0
"""Blocks that nobody flushed are made durable once none came for this long."""

UNFLUSHED_MAX_S = 30.0
"""And after this long in any case."""

PRESSED_FLUSH_S = 0.1
"""And after this long when the store is nearly full: what was deleted is free only then."""

DISK_PATIENCE_S = 3600.0
"""How long a disk may take. What it was asked cannot be taken back, so nobody may think it over
before it is: callers have deadlines of their own."""

CONCURRENCY = 4096
"""Messages in work at once: more than many clients put, so that reads do not wait for puts whose
disk hangs in writes alone. What waits holds as much memory as what is in work."""

CHECK_REFS_MAX = 4096
"""Blocks of one check."""

VOUCH_S = 60.0
"""How long a copy that was vouched for is kept; who asked has to drop its own copy well before."""

DEAD_S = 4 * 3600.0
"""What the collector deleted is known as dead for this long, and up to twice as long: other nodes
may have it until their collectors have made two passes, with pauses of five times as long between
them. This suffices for passes of twenty minutes."""

DATA, INODES = 0, 1

STORE_NAMES = ("blocks", "inodes")
"""Their directories, in that order."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where and how much a node stores.

    Attributes:
        directory: of the data; made if it is not there.
        size_bytes: how much disk to take in all; None keeps what is there.
        block_size: bytes of a data block.
        open_disk: gives the disk with a directory.
    """

    directory: Path
    size_bytes: int | None
    block_size: int
    open_disk: Callable[[Path], Disk] = RealDisk


class OpenStores:
    """The open stores of a node and the operations under way on them.

    Operations run as tasks of their own, so that an operation whose caller died still ends in
    order: a slot reserved is committed or given up, a flush begun is ended.
    """

    def __init__(self, system: ActorSystem, stores: list[BlockStore]) -> None:
        self.system = system
        self.stores = stores
        self.level = Level.OK
        self.aio = _make_aio(system, stores[DATA])
        self._verifying: dict[tuple[int, Location, bool], asyncio.Task[Any]] = {}
        self._flush_waiters: list[asyncio.Future[None]] = []
        self._flushing = False
        self.refusal = ""
        """Why no block is taken although no store has failed: the disk refuses what a flush writes,
        so that none would ever be confirmed. Empty while flushes go through."""
        self.requests = 0
        """Reads, and puts of new blocks, since the stores were opened: how busy clients are."""
        self._idle_flush: asyncio.TimerHandle | None = None
        self._spreading: asyncio.TimerHandle | None = None
        self._changed_at = 0.0
        self._changed_since = 0.0
        self._vouched: dict[BlockRef, float] = {}
        self._dead, self._dead_before = RefSet(), RefSet()
        self._dead_since = 0.0

    @classmethod
    def open(cls, system: ActorSystem, config: StoreConfig, rng: random.Random) -> OpenStores:
        """Open or make the stores; blocks, before the node does anything else."""
        pool = BufferPool(POOLED_READ_BYTES)

        def allocate(size: int) -> memoryview:
            if size >= POOLED_READ_MIN:
                return pool.take(size)
            return memoryview(bytearray(size))

        sizes: list[int | None] = [None, None]
        if config.size_bytes is not None:
            inodes = max(config.size_bytes // INODE_SHARE, INODE_ROOM_MIN)
            sizes = [config.size_bytes - inodes, inodes]
            if config.size_bytes < 2 * INODE_ROOM_MIN:
                raise Invalid(f"a node needs at least {2 * INODE_ROOM_MIN >> 20} MiB")
        disks = [config.open_disk(config.directory / name) for name in STORE_NAMES]
        there = {kind: disks[kind].exists(INDEX_PATH) for kind in (DATA, INODES)}
        block_sizes = (config.block_size, INODE_BLOCK_SIZE)
        opened: dict[int, MFileStore] = {}
        try:
            # What is there comes first: it tells whether the other one may be made anew.
            for kind in sorted(there, key=lambda kind: not there[kind]):
                size = sizes[kind]
                if opened and not there[kind]:
                    ((other, store),) = opened.items()
                    found = store.stats()
                    if found.used:
                        raise Invalid(
                            f"there is no block store in {config.directory / STORE_NAMES[kind]}, "
                            f"but {found.used} blocks in {STORE_NAMES[other]} beside it: is a disk "
                            "not mounted? If it is lost, move both directories away, and the node "
                            "begins with empty stores"
                        )
                    if size is None:
                        # The first start was cut off between the two.
                        size = found.total * config.block_size // (INODE_SHARE - 1)
                        size = max(size, INODE_ROOM_MIN)
                try:
                    opened[kind] = MFileStore.open(
                        disks[kind],
                        block_size=block_sizes[kind],
                        size_bytes=size,
                        rng=rng,
                        allocate=allocate,
                    )
                except (Corruption, Invalid) as error:
                    # Both have files of the same names.
                    where = config.directory / STORE_NAMES[kind]
                    raise type(error)(f"in {where}: {error}") from error
                damaged = opened[kind].damaged_entries
                if damaged:
                    where = config.directory / STORE_NAMES[kind]
                    log.error(
                        "in %s: %d entries of the index are damaged: so many blocks may be missing",
                        where,
                        damaged,
                    )
        except BaseException:
            for store in opened.values():
                store.close()
            raise
        return cls(system, [opened[DATA], opened[INODES]])

    def kind_of(self, ref: BlockRef) -> int:
        """Which of the stores a block belongs to."""
        return INODES if ref.block_type == BlockType.INODE else DATA

    @property
    def incarnation(self) -> int:
        """Of the data store; the two are opened and closed together. Grows."""
        return self.stores[DATA].incarnation

    @property
    def incarnation_id(self) -> int:
        """Likewise; what a put and the flush that covers it have in common."""
        return self.stores[DATA].incarnation_id

    @property
    def size_bytes(self) -> int:
        """Room for blocks and pages."""
        return sum(store.stats().total * store.block_size for store in self.stores)

    async def _own(self, coroutine: Any) -> Any:
        """Run to the end, whatever becomes of the one who waits."""
        return await asyncio.shield(self._begin(coroutine))

    def _begin(self, coroutine: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self.system.loop.create_task(coroutine)
        self.system.background.add(task)
        task.add_done_callback(self._owned_done)
        return task

    def _owned_done(self, task: asyncio.Task[Any]) -> None:
        self.system.background.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be left to hear of it

    async def put(
        self, ref: BlockRef, root: int, sums: bytes, replace: bool, payload: Buffer
    ) -> None:
        """Store a block; a block that is there already is left, or checked if ``replace``."""
        await self._own(self._put(ref, root, sums, replace, payload))

    async def _put(
        self, ref: BlockRef, root: int, sums: bytes, replace: bool, payload: Buffer
    ) -> None:
        kind = self.kind_of(ref)
        store = self.stores[kind]
        for each in self.stores:
            if each.failure is not None:
                # A flush is of both stores: none would ever confirm this block.
                raise Closed(f"block store {each.failure}")
        if self.refusal:
            raise Closed(f"block store {self.refusal}")
        instead: Location | None = None
        if replace and store.has(ref):
            location = store.locate(ref)
            # Somebody may have read it wrong from the page cache, and the disk have it right.
            if not await self.verify(kind, location, cached_too=True):
                instead = location
        ticket = store.reserve(ref, root, instead)
        if ticket is None:
            return
        try:
            await self.system.actor("disk_writer").write.remote(
                kind, ticket, sums, payload=payload, timeout_s=DISK_PATIENCE_S
            )
        except (ActorCrashed, DeadlineExceeded, asyncio.CancelledError):
            ticket.failed = True  # may still be written to: no other block may get this slot
            store.abandon(ticket)
            raise
        except BaseException:
            store.abandon(ticket)
            raise
        if instead is not None:
            # Only now: what of it is right may be so nowhere else.
            store.mark_corrupt(ref, instead)
        store.commit(ticket)
        self.flush_later()
        level = store.level()
        if level is not self.level and kind == DATA:
            self.level = level
            if level is not Level.OK:
                stats = store.stats()
                log.warning(
                    "the block store is %s: %d of %d blocks free",
                    "full" if level is Level.FULL else "nearly full",
                    stats.free,
                    stats.total,
                )

    @property
    def read_under_way(self) -> int | None:
        """Another number when a read without a thread has ended; None while there is none."""
        return self.aio.ended if self.aio is not None and self.aio.busy else None

    def next_reader(self) -> ActorHandle:
        """The worker that reads and has least to do; none that may be in its call for minutes."""
        name = min(READERS, key=self.system.load)
        if self._spreading is None and self.system.load(name)[1]:
            self._spreading = self.system.loop.call_later(LONG_CALL_S, self._spread)
        return self.system.actor(name)

    def _spread(self) -> None:
        """What waits for a call that has turned out to be long is for another worker."""
        self.share()
        self._spreading = None
        cells = self._readers()
        for cell in cells:
            other = min(cells, key=Cell.load)
            if cell.load()[0] and not other.load()[0]:
                cell.pass_on(other)
        if any(cell.waiting() for cell in cells):
            self._spreading = self.system.loop.call_later(LONG_CALL_S, self._spread)

    def _readers(self) -> list[Cell]:
        """The workers that read and are there: what waits for a dead one waits for a restart."""
        cells = [self.system.cells[name] for name in READERS if name in self.system.cells]
        return [cell for cell in cells if cell.actor is not None]

    def share(self) -> None:
        """Where calls wait for one worker, another has not to be idle: all may be at one now."""
        if self._spreading is None:
            return
        cells = self._readers()
        if not cells:
            return
        idle, busy = min(cells, key=Cell.load), max(cells, key=Cell.waiting)
        if idle.load() == (False, 0) and busy.waiting():
            busy.pass_on(idle, (busy.waiting() + 1) // 2)

    async def verify(self, kind: int, location: Location, cached_too: bool = False) -> bool:
        """Read a block from the disk, or both from there and from the page cache; check every byte.

        One that is under way is waited for: the disk may be at it for minutes, and another worker
        would hang beside the first.
        """
        key = kind, location, cached_too
        task = self._verifying.get(key)
        if task is None:
            store = self.stores[kind]
            store.pin(location)
            task = self._verifying[key] = self._begin(self._check(*key))

            def ended(_: asyncio.Task[Any]) -> None:
                del self._verifying[key]
                store.unpin(location)

            task.add_done_callback(ended)
        right: bool = await asyncio.shield(task)
        return right

    async def _check(self, kind: int, location: Location, cached_too: bool) -> bool:
        right: bool = await self.next_reader().check.remote(
            kind, location, cached_too, timeout_s=DISK_PATIENCE_S
        )
        return right

    async def flush(self) -> None:
        """Make durable what was put and deleted; concurrent callers share one sync."""
        waiter: asyncio.Future[None] = self.system.loop.create_future()
        self._flush_waiters.append(waiter)
        if not self._flushing:
            self._flushing = True
            task = self.system.loop.create_task(self._flush_all())
            self.system.background.add(task)
            task.add_done_callback(self.system.background.discard)
        await waiter

    def flush_later(self) -> None:
        """Flush even if nobody asks: once it is quiet, or where room is short, to free the deleted.

        Not while blocks keep coming: a disk that syncs all the time is half as fast, and who needs
        them durable says so.
        """
        self._changed_at = self.system.loop.time()
        if self._idle_flush is None:
            self._changed_since = self._changed_at
            # Where the last one was refused there is no hurry.
            hurries = self._is_pressed() and not self.refusal
            pause = PRESSED_FLUSH_S if hurries else IDLE_FLUSH_S
            self._idle_flush = self.system.loop.call_later(pause, self._flush_idle)

    def _is_pressed(self) -> bool:
        return any(store.level() is not Level.OK for store in self.stores)

    def _flush_idle(self) -> None:
        now = self.system.loop.time()
        quiet_at = self._changed_at + IDLE_FLUSH_S
        if now < min(quiet_at, self._changed_since + UNFLUSHED_MAX_S) and not self._is_pressed():
            self._idle_flush = self.system.loop.call_at(quiet_at, self._flush_idle)
            return
        self._idle_flush = None
        task = self.system.loop.create_task(self._flush_quietly())
        self.system.background.add(task)
        task.add_done_callback(self.system.background.discard)

    async def _flush_quietly(self) -> None:
        try:
            await self.flush()
        except TorusError as error:
            log.error("flush failed: %s", error)
            over = isinstance(error, ActorNotFound) or any(s.failure for s in self.stores)
            if not over and self._idle_flush is None:
                self._idle_flush = self.system.loop.call_later(IDLE_FLUSH_S, self._flush_idle)

    async def _flush_all(self) -> None:
        waiters: list[asyncio.Future[None]] = []
        try:
            while self._flush_waiters:
                waiters, self._flush_waiters = self._flush_waiters, []
                try:
                    await self._flush_once()
                except TorusError as error:
                    for waiter in waiters:
                        if not waiter.done():
                            waiter.set_exception(error)
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)
        finally:
            self._flushing = False
            for waiter in waiters:
                if not waiter.done():
                    waiter.cancel()

    async def _flush_once(self) -> None:
        begun: list[tuple[BlockStore, FlushBatch]] = []
        try:
            for store in self.stores:
                begun.append((store, store.begin_flush()))
            batches = [batch for _, batch in begun if not batch.empty]
            if batches:
                await self.system.actor("disk_flusher").sync.remote(
                    batches, timeout_s=DISK_PATIENCE_S
                )
        except BaseException as error:
            for store, batch in begun:
                store.fail_flush(batch)
            if isinstance(error, (Corruption, OutOfSpace)):
                self.refusal = f"takes no blocks: {error}"
                self.flush_later()  # nothing else comes by which it would be tried again
            raise
        for store, batch in begun:
            store.end_flush(batch)
        self.refusal = ""

    def vouch(self, ref: BlockRef) -> None:
        """Promise to keep a copy for ``VOUCH_S``: somebody may drop another one because of it."""
        now = self.system.loop.time()
        self._vouched.pop(ref, None)
        self._vouched[ref] = now + VOUCH_S
        while (oldest := next(iter(self._vouched))) and self._vouched[oldest] <= now:
            del self._vouched[oldest]

    def is_vouched(self, ref: BlockRef) -> bool:
        """Whether somebody may rely on the copy here."""
        return self._vouched.get(ref, 0.0) > self.system.loop.time()

    def bury(self, refs: Sequence[BlockRef]) -> None:
        """Remember that blocks are dead: a ref is never used again."""
        self._forget_old_dead()
        self._dead.add_all(refs)

    def _forget_old_dead(self) -> None:
        now = self.system.loop.time()
        age = now - self._dead_since
        if age > DEAD_S:
            recent = age < 2 * DEAD_S
            self._dead_before = self._dead if recent else RefSet()
            self._dead, self._dead_since = RefSet(), self._dead_since + DEAD_S if recent else now

    def is_dead(self, ref: BlockRef) -> bool:
        """Whether the collector of this node has deleted a block, not too long ago."""
        self._forget_old_dead()
        return ref in self._dead or ref in self._dead_before

    def close(self) -> None:
        """Close the files; what was not flushed is gone."""
        if self._idle_flush is not None:
            self._idle_flush.cancel()
        if self.aio is not None:
            if not self.system.loop.is_closed():
                self.system.loop.remove_reader(self.aio.notify_fd)
            self.aio.close()
        for store in self.stores:
            try:
                store.close()
            except (OSError, TorusError) as error:
                # It is as after a kill, then: nothing that was flushed is lost by it.
                log.warning("closing the block store: %s", error)


def _make_aio(system: ActorSystem, store: BlockStore) -> AioQueue | None:
    """What reads without threads; None where that is not possible, or nothing would use it."""
    if not store.reads_direct:
        return None
    try:
        queue = AioQueue(READS_MAX)
    except OSError as error:
        log.info("small reads go by threads: %s", error)
        return None
    system.loop.add_reader(queue.notify_fd, queue.reap)
    return queue


class BlockStoreActor(LoopActor):
    """See the module.

    Args:
        opened: the stores.
        view: the cluster as this node sees it; None if it does not matter.
    """

    def __init__(self, opened: OpenStores, view: ClusterView | None = None) -> None:
        super().__init__()
        self._opened = opened
        self._view = view
        self._stores = opened.stores
        self._list_bytes_max = max(sums_size(store.block_size) for store in opened.stores)

    @expose(remote=True, idempotent=True)
    async def put_block(
        self,
        ref: BlockRef,
        root: int,
        sums: bytes,
        replace: bool = False,
        ring_version: int = 0,
        *,
        payload: memoryview,
    ) -> int:
        """Store a block.

        Args:
            ref: its name.
            root: CRC-32C of ``sums``.
            sums: checksum list of the payload.
            replace: put this copy in the place of one that turns out to be damaged.
            ring_version: of the ring by which this node was chosen; 0 if it does not matter, or
                from an earlier version of this program, which does not say.
            payload: the block; its buffer is the store's until the answer.

        Returns:
            The id of the store's incarnation: a later ``flush`` that answers the same one covers
            the block; until then a crash may lose it.

        Raises:
            Again: this node has left the ring since; the block may be stored nevertheless.
        """
        if not replace:
            self._opened.requests += 1
        self._check_member(ring_version)
        try:
            await self._opened.put(ref, root, sums, replace, payload)
        except Exists:
            if replace:
                raise
            # Blocks are immutable: other content under the same ref is a damaged copy, on one side
            # or the other. It is never overwritten on a guess.
            await self._opened.put(ref, root, sums, True, payload)
        # Only now it is in the index, where a pass of the rebalancer by the later ring, after which
        # this node may be switched off, finds it.
        self._check_member(ring_version)
        return self._opened.incarnation_id

    def _check_member(self, ring_version: int) -> None:
        """Refuse what somebody sends here by a ring from which this node has been taken out.

        It may be switched off for good once its blocks are elsewhere, and is not asked about those
        that come later.
        """
        if not ring_version or self._view is None:
            return
        ring = self._view.ring
        # A node that has not heard yet that it is in the ring has an earlier one.
        if ring_version <= ring.version and self.system.node_id not in ring.members:
            raise Again(f"this node is not in the ring any more: {ring.version} is the last one")

    @expose(remote=True, idempotent=True, deferred=True)
    def read_ranges(self, reply: Any, items: bytes) -> None:
        """Read ranges of blocks.

        Args:
            reply: takes a Reply: packed RANGE_STATUS records, and for each good range its block's
                checksum list and the data.
            items: packed RANGE records.
        """
        asked = sum(length for _, _, length in RANGE.iter_unpack(_whole(items)))
        if asked + len(items) // RANGE.size * self._list_bytes_max > PAYLOAD_MAX:
            raise Invalid(f"more than {PAYLOAD_MAX >> 20} MiB asked for at once")
        self._opened.requests += 1
        answers: list[_Answer | None] = []
        cold: list[_Cold] = []
        try:
            for packed, offset, length in RANGE.iter_unpack(items):
                kind = INODES if packed[5] else DATA
                store = self._stores[kind]
                answer: _Answer | None
                try:
                    location = store.locate(packed)
                    length = min(length, location.length - offset)
                    answer = store.read_nowait(location, offset, length, True)
                    if answer is None:
                        store.pin(location)
                        cold.append((len(answers), kind, location, offset, length))
                except TorusError as error:
                    answer = error
                answers.append(answer)
            reads = _ColdReads(self._opened, answers, cold, reply) if cold else None
        except BaseException:
            # No memory, say: this actor dies of it, and what is pinned would stay so.
            for _, kind, location, _, _ in cold:
                self._stores[kind].unpin(location)
            raise
        if reads is not None:
            reads.start()
        else:
            _answer_ranges(reply, answers)

    @expose(remote=True, idempotent=True)
    async def check_blocks(
        self, refs: bytes, deep: bool = False, durable: bool = False, ring_version: int = 0
    ) -> bytes:
        """Tell which blocks are here, and under which checksum.

        Args:
            refs: packed block refs.
            deep: read each and verify every byte.
            durable: flush before answering, so that what is reported survives a crash; and keep
                the blocks for ``VOUCH_S``, so that two nodes that see different rings do not both
                drop their copies because of each other's.
            ring_version: of the ring by which who asks is to drop its copies, if ``durable``; 0
                from an earlier version of this program, which does not say.

        Returns:
            A packed CHECK_STATUS for each ref.

        Raises:
            Again: a later ring is known here, which may want more copies.
        """
        newest = self._view.ring.version if self._view is not None else 0
        if durable and 0 < ring_version < newest:
            raise Again(f"ring {ring_version} is not the last one: {newest} is")
        if len(refs) > CHECK_REFS_MAX * BLOCK_REF_SIZE:
            raise Invalid(f"more than {CHECK_REFS_MAX} blocks in one check")
        answers: list[tuple[int, int]] = []
        for ref in split_refs(refs):
            kind = self._opened.kind_of(ref)
            try:
                location = self._stores[kind].locate(ref)
                if durable:
                    self._opened.vouch(ref)
                right = not deep or await self._opened.verify(kind, location)
                answers.append((Status.OK if right else Status.CORRUPT, location.root))
            except BlockNotExist:
                dead = self._opened.is_dead(ref)
                answers.append((Status.DEAD if dead else Status.MISSING, 0))
        if durable:
            await self._opened.flush()
        return b"".join([CHECK_STATUS.pack(*answer) for answer in answers])

    @expose(remote=True, idempotent=True)
    async def flush(self) -> int:
        """Make durable all blocks put so far; returns the id of the store's incarnation."""
        await self._opened.flush()
        return self._opened.incarnation_id

    @expose(remote=True, idempotent=True)
    def list_blocks(self, kind: int, slot: int, count: int) -> list[Any]:
        """Blocks in slot order.

        Args:
            kind: 0 for data, 1 for INode pages.
            slot: where to go on; 0 at first.
            count: how many, at most 4096.

        Returns:
            Packed refs, and the slot to go on from, or None at the end.
        """
        if kind >= len(self._stores):
            raise Invalid(f"no store number {kind}")
        refs, following = self._stores[kind].refs_from(slot, min(count, 4096))
        return [b"".join(refs), following]

    @expose(remote=True, idempotent=True)
    def discard_blocks(self, refs: bytes) -> int:
        """Delete blocks that were overwritten before any head named them.

        Only the session that put them can know that, and only it may say so.

        Args:
            refs: packed block refs.

        Returns:
            How many were here.
        """
        return self._delete(refs)

    @expose()
    def delete_blocks(self, refs: bytes) -> int:
        """Delete blocks that are dead; returns how many were there. Only this node's collector may.

        Others may have them still, until their own collectors know, and would send them here.
        """
        self._opened.bury(list(split_refs(refs)))
        return self._delete(refs)

    def _delete(self, refs: bytes) -> int:
        self._opened.flush_later()
        return sum(
            self._stores[kind].delete(
                r for r in split_refs(refs) if self._opened.kind_of(r) == kind
            )
            for kind in range(len(self._stores))
        )

    @expose()
    def drop_blocks(self, refs: bytes, not_after: float) -> int:
        """Delete copies that others vouched for.

        Args:
            refs: packed block refs.
            not_after: loop time from which on their word does not hold any more.

        Returns:
            How many were deleted; those that this node itself was asked to vouch for stay.
        """
        if self.system.loop.time() > not_after:
            return 0
        return self._delete(
            b"".join(ref for ref in split_refs(refs) if not self._opened.is_vouched(ref))
        )

    @expose(remote=True)
    def stats(self) -> dict[str, Any]:
        """Sizes, use and health of the stores."""
        answer: dict[str, Any] = {
            "incarnation": self._opened.incarnation,
            "incarnation_id": self._opened.incarnation_id,
            "requests": self._opened.requests,
        }
        refusal = self._opened.refusal
        for name, store in zip(STORE_NAMES, self._stores, strict=True):
            stats = store.stats()
            failure, refusal = store.failure or refusal, ""
            answer[name] = {
                "block_size": store.block_size,
                "total": stats.total,
                "used": stats.used,
                "free": stats.free,
                "pending": stats.pending,
                "quarantined": stats.quarantined,
                "level": store.level().value,
                "failure": failure,
            }
        return answer


_Answer = tuple[bytes, memoryview] | TorusError
"""Checksum list and data of a range, or why not."""

_Cold = tuple[int, int, Location, int, int]
"""A range that the disk is needed for: number of the answer, store, location, offset, length."""


class _ColdReads:
    """The ranges of one message that need the disk: without a thread where that is possible."""

    def __init__(
        self, opened: OpenStores, answers: list[_Answer | None], cold: list[_Cold], reply: Any
    ) -> None:
        self._opened = opened
        self._answers = answers
        self._reply = reply
        self._left = len(cold)
        self._threaded = cold
        self._direct: list[_Cold] = []
        self._transfers: list[Transfer] = []
        if opened.aio is None:
            return
        self._threaded = []
        for item in cold:
            _, kind, location, offset, length = item
            plan = opened.stores[kind].plan_direct(location, offset, length)
            if plan is None:
                self._threaded.append(item)
            else:
                ended = partial(self._transferred, item, plan)
                self._transfers.append(Transfer(READ, plan.fd, plan.memory, plan.offset, ended))
                self._direct.append(item)

    def start(self) -> None:
        """Start them all; the reply is answered when the last has ended."""
        aio = self._opened.aio
        if aio is not None and self._transfers:
            started = aio.start(self._transfers)
            self._transfers = []  # which lead back here
            self._threaded += self._direct[started:]
        if self._threaded:
            self._by_thread(self._threaded)

    def _by_thread(self, items: list[_Cold]) -> None:
        ranges = [item[1:] for item in items]
        reading = self._opened.next_reader().read_many.remote(ranges)
        reading.add_done_callback(partial(self._read, items))

    def _transferred(self, item: _Cold, plan: DirectRead, result: int) -> None:
        if result >= item[4]:
            self._arrived(item, (plan.sums, plan.memory[: item[4]]))
        else:
            self._by_thread([item])  # which finds out what is wrong, if anything is

    def _read(self, items: list[_Cold], future: asyncio.Future[Any]) -> None:
        self._opened.share()
        error = None if future.cancelled() else future.exception()
        if error is None and not future.cancelled():
            found = future.result()
            for item, answer in zip(items, found, strict=True):
                if isinstance(answer, tuple):
                    self._opened.stores[item[1]].keep_sums(item[2], answer[0])
        else:
            told = error if isinstance(error, TorusError) else None
            found = [told or BlockUnavailable("the read was given up")] * len(items)
        for item, answer in zip(items, found, strict=True):
            self._arrived(item, answer)

    def _arrived(self, item: _Cold, answer: _Answer) -> None:
        number, kind, location, _, _ = item
        self._opened.stores[kind].unpin(location)
        self._answers[number] = answer
        self._left -= 1
        if not self._left:
            _answer_ranges(self._reply, self._answers)


def _whole(items: bytes) -> bytes:
    if len(items) % RANGE.size:
        raise Invalid(f"{len(items)} bytes are not a list of ranges")
    return items


def _status_of(error: TorusError | None) -> Status:
    if isinstance(error, BlockNotExist):
        return Status.MISSING
    # What the disk cannot read is as bad as what it reads wrong: whoever asked has it replaced.
    return Status.CORRUPT if isinstance(error, Corruption) else Status.FAILED


def _answer_ranges(reply: Any, answers: Sequence[_Answer | None]) -> None:
    statuses: list[bytes] = []
    buffers: list[Buffer] = []
    for answer in answers:
        if isinstance(answer, tuple):
            sums, data = answer
            statuses.append(RANGE_STATUS.pack(Status.OK, len(sums), len(data)))
            buffers.append(sums)
            buffers.append(data)
        else:
            statuses.append(RANGE_STATUS.pack(_status_of(answer), 0, 0))
    # Whoever asked verifies each range by its list.
    reply.set(Reply(b"".join(statuses), buffers or (b"",), checked=True))
