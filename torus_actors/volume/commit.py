"""What a flush does: everything written before it becomes durable and reachable.

The rule: a head is recorded only when every block it leads to, data and pages alike, was confirmed
durable by the very incarnations of the stores that took it. In steps:

1. write out the layers that are there now (later writes may ride along);
2. cut the map: serialise its changed pages, and note which blocks no flush covers yet;
3. put the pages on the ring;
4. flush every peer that took one of those blocks, and place anew what a restarted one lost;
5. record the new head, if the epoch is still ours.

A crash before step 5 leaves the old head, all of whose blocks still exist; after it, the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from torus_actors.errors import (
    Again,
    BlockUnavailable,
    OutcomeUnknown,
    OutOfSpace,
    TorusError,
    anew,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.model.checksums import Buffer, sums_of
from torus_actors.model.inode_tree import CommitPlan
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ActorSystem
from torus_actors.volume.file import File
from torus_actors.volume.room import RoomToCome
from torus_actors.volume.stored import Stored

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""How long a flush waits for peers to take the next block, or to make it durable, before it fails;
the data stays in the cache, and a later flush may succeed."""

LOOK_S = 1.0
"""Who waits for one of many blocks looks this often whether others have ended."""

HEAD_PAUSE_S = 5.0
"""A full cluster: so long after the metadata took no head, none is made to gain room. Each try puts
pages of the map."""

PAGES_TOGETHER = 128
PAGES_TIMEOUT_S = 60.0
"""So many pages of the map are put in one call, which has that time. Small writes all over a large
volume change thousands."""

SYNC_AHEAD_SHARE = 0.5
"""Of the blocks that are kept until they are durable: with so many, a commit has them synced while
it puts more. Of those that come when all are kept, a flush beside the commit would wait for a sync.
"""

PLACED_AT_ONCE_MAX = 8
"""Blocks placed anew at the same time: each is held in memory whole."""

SUPERSEDED_MAX = 5
"""Plans made anew because a block of the last one was both lost and overwritten meanwhile."""


class Superseded(Exception):
    """A lost block that the map does not name any more: the next plan does without it."""


class Committer:
    """Flushes one file.

    Args:
        file: what to flush.
        next_inode_ref: names for pages.
        next_inode: ends the present INode number and returns the one that blocks put from now on
            get: what a lower one marks is in the head that is being made, or dead.
        record: stores the new head of that INode number; retries by itself while the metadata
            cannot be reached. If the head is of a part, it raises ``Again`` where none was stored,
            and ``OutcomeUnknown`` where nobody knows.
        reach: sees whether the metadata can be reached, or raises ``Again``.
    """

    def __init__(
        self,
        system: ActorSystem,
        file: File,
        next_inode_ref: Callable[[], BlockRef],
        next_inode: Callable[[], int],
        record: Callable[[CommitPlan, int], Awaitable[None]],
        reach: Callable[[], Awaitable[None]],
    ) -> None:
        self._system = system
        self._file = file
        self._next_inode_ref = next_inode_ref
        self._next_inode = next_inode
        self._record = record
        self._reach = reach
        self.complete = False
        """Whether the head being recorded has everything that was there when the commit began."""
        self.map_seq = 0
        """The last record of the journal that was cut before the last map was."""
        self.exact = False
        """Whether the last map that was cut is what the file was in one moment: every write that
        was acknowledged before, and none that was acknowledged after."""

    @property
    def clean(self) -> bool:
        """Whether there is nothing to do."""
        file = self._file
        changed = file.map.is_dirty or file.map.is_planned
        return not (file.layers.dirty or file.layers.frozen or file.unsynced or changed)

    async def commit(self, force: bool = False) -> None:
        """Run all the steps.

        Args:
            force: record a head though nothing has changed.

        Raises:
            OutOfSpace, BlockUnavailable: what was written could not be stored; it is still cached.
            Fenced: another session has taken over.
        """
        file = self._file
        if file.failure is not None:
            raise anew(file.failure)
        if self.clean and not force:
            return
        await self.write_out(list(file.layers.indexes()), self._checkpoint_of_part)
        self.complete = True
        try:
            await self._checkpoint()
        finally:
            self.complete = False

    async def _checkpoint_of_part(self) -> None:
        """The same while blocks are missing, unless the metadata are away.

        Else each attempt would leave pages that no collector may take before a later head is
        recorded; and that needs pages, for which there is no room in the end, in any volume.
        """
        await self._reach()
        await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Commit the map as it is: steps 2 to 5."""
        for _ in range(SUPERSEDED_MAX):
            try:
                await self._commit_map()
                return
            except Superseded:
                log.info("a lost block was overwritten meanwhile: committing without it")
        raise BlockUnavailable("nodes lose blocks faster than they can be made durable")

    async def _commit_map(self) -> None:
        file = self._file
        # A block put under the number that ends here, but entered in the map later, would be older
        # than the head that names it, and a collector might take it for dead: so none may be on
        # its way.
        async with file.no_puts():
            plan = file.map.plan_commit(self._next_inode_ref)
            try:
                inode = self._next_inode()
                file.fresh.clear()  # from here on a head may name them
                # The same synchronous step as the plan: exactly what the plan may name.
                covered = dict(file.unsynced)
                self.map_seq = file.layers.log.map_cut()
            except BaseException:
                file.map.commit_failed(plan)
                raise
            self.exact = file.held and not (file.layers.dirty or file.layers.frozen)
            if self.complete:
                file.release_writes()
        may_be_named = False
        try:
            for first in range(0, len(plan.blocks), PAGES_TOGETHER):
                some = plan.blocks[first : first + PAGES_TOGETHER]
                pages = await self._put_pages([list(page) for page in some])
                for (ref, data), (root, placed) in zip(some, pages, strict=True):
                    covered[ref] = Stored(root, placed, data=data)
            await self.make_durable(covered)
            if file.failure is not None:
                raise anew(file.failure)
            may_be_named = True
            await self._record(plan, inode)
        except BaseException as error:
            file.map.commit_failed(plan)
            if not may_be_named or isinstance(error, Again):
                # The next attempt names its pages anew, and these would fill those that took them.
                file.discard_tried([ref for ref, _ in plan.blocks])
            raise
        file.map.commit_done(plan)

    async def _put_pages(self, pages: list[list[Any]]) -> list[list[Any]]:
        """Put pages on the ring; where their stores are full, garbage is collected first."""
        file = self._file
        room: RoomToCome | None = None
        while True:
            try:
                placed: list[list[Any]] = await self._system.actor("inode_store").put_pages.remote(
                    pages, timeout_s=PAGES_TIMEOUT_S
                )
                return placed
            except OutOfSpace:
                room = room or file.room_to_come()
                if not await room.may_come():
                    raise
                if file.failure is not None:
                    raise anew(file.failure) from None

    async def write_out(
        self, indexes: list[int], checkpoint: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Wait until the layers that these blocks have now are in the map.

        Args:
            indexes: the blocks.
            checkpoint: commits the map as it is, if the caller may; for when the cluster is full.

        Raises:
            OutOfSpace, BlockUnavailable: they could not be stored.
        """
        file = self._file
        layers = file.layers
        both = {index: (layers.dirty.get(index), layers.frozen.get(index)) for index in indexes}
        # The layers themselves are kept alive by ``both``, so that no other takes over their id.
        targets = {index: {id(layer) for layer in pair} for index, pair in both.items()}

        def waits(index: int) -> bool:
            present = {id(layers.dirty.get(index)), id(layers.frozen.get(index))}
            return bool((present - {id(None)}) & targets[index])

        for index in targets:
            file.want(index)
        file.put_error = None
        file.retry_now()
        file.pump()
        end = self._system.loop.time() + PATIENCE_S
        # All have to end, so it is enough to look at one of them at a time.
        look_at = self._system.loop.time() + LOOK_S
        head_at = 0.0
        left = deque(targets)
        while left:
            index = left[0]
            if not waits(index):
                left.popleft()
                end = self._system.loop.time() + PATIENCE_S
                continue
            if self._system.loop.time() >= look_at:
                # That one may come last, behind others that get on.
                look_at = self._system.loop.time() + LOOK_S
                waiting = deque(filter(waits, left))
                if len(waiting) < len(left):
                    left = waiting
                    end = self._system.loop.time() + PATIENCE_S
            if file.failure is not None:
                raise anew(file.failure)
            if isinstance(file.put_error, OutOfSpace):
                raise anew(file.put_error)
            remaining = end - self._system.loop.time()
            if remaining <= 0 and not file.reclaiming:
                raise BlockUnavailable(
                    f"{len(left)} blocks could not be stored in time: {file.last_error}"
                )
            needs_head = file.reclaiming and (file.unsynced or file.map.is_dirty)
            if checkpoint and needs_head and self._system.loop.time() >= head_at:
                # The cluster is full, and what these blocks replace becomes garbage only once a
                # head names them: that may be the very room that is missing.
                try:
                    await checkpoint()
                except (Again, OutcomeUnknown) as error:
                    log.info("volume %s: no head to make room by: %s", file.name, error)
                    head_at = self._system.loop.time() + HEAD_PAUSE_S
            if len(file.unsynced) >= file.kept_max * SYNC_AHEAD_SHARE:
                # The caller sees to what cannot be.
                with contextlib.suppress(BlockUnavailable, OutOfSpace, Superseded):
                    await self.make_durable(dict(file.unsynced))
            file.want(index)
            file.pump()
            try:
                async with asyncio.timeout(min(max(remaining, 0.1), 1.0)):
                    await file.progress()
            except TimeoutError:
                pass

    async def make_durable(self, pending: dict[BlockRef, Stored]) -> None:
        """Flush the peers that hold these blocks until all of them have confirmed.

        A block that has fewer copies than peers could take now is completed before.

        Raises:
            OutOfSpace, BlockUnavailable: what a node lost can be stored nowhere else.
        """
        file = self._file
        replicator = self._system.actor("replicator")
        backoff = Backoff(self._system.rng, first_s=0.02, max_s=0.5)
        end = 0.0
        room: RoomToCome | None = None
        for rounds in itertools.count(1):
            peers = sorted({peer for stored in pending.values() for peer, _ in stored.placed})
            if not peers:
                return
            confirmed = await replicator.flush.remote(peers, timeout_s=120.0)
            wanted = file.blockset.replication or 0
            data_copies, page_copies = await replicator.copies.remote(wanted)
            lost: dict[BlockRef, Stored] = {}
            short: dict[BlockRef, Stored] = {}
            for ref, stored in pending.items():
                copies = data_copies if stored.data is None else page_copies
                if any(confirmed.get(peer) != incarnation for peer, incarnation in stored.placed):
                    lost[ref] = stored
                elif rounds == 1 and len(stored.placed) < copies:
                    short[ref] = stored
                else:
                    file.unsynced.pop(ref, None)
            if short:
                # Peers that did not take them are back. Once is enough: one that takes none again
                # is as good as down, and then fewer copies are what can be had.
                await self._place_all_again(short)
            if not lost and not short:
                return
            # A disk that has a lot to write may take longer than that for the first answer alone.
            if rounds == 1 or len(lost) < len(pending):
                end = self._system.loop.time() + PATIENCE_S
            pending = lost | short
            if not lost:
                continue
            began = self._system.loop.time()
            failure = await self._place_all_again(lost)
            if isinstance(failure, OutOfSpace):
                room = room or file.room_to_come()
                if not await room.may_come():
                    raise failure
            if failure is None or isinstance(failure, OutOfSpace):
                # All that gets on, however much there is; and how long to wait for room is bounded.
                end += self._system.loop.time() - began
            log.info("%d blocks placed anew after a node was lost", len(lost))
            pending.update(lost)
            if not await backoff.wait(end):
                told = failure or "peers restart faster than they flush"
                raise BlockUnavailable(
                    f"{len(pending)} blocks, lost by a node, cannot be made durable: {told}"
                )
            if file.failure is not None:
                raise anew(file.failure)

    async def _place_all_again(self, lost: dict[BlockRef, Stored]) -> TorusError | None:
        """Store blocks anew; returns why some of them could not be, if so."""
        room = asyncio.Semaphore(PLACED_AT_ONCE_MAX)

        async def place(ref: BlockRef, stored: Stored) -> None:
            async with room:
                again = Stored(
                    stored.root,
                    await self._place_again(ref, stored),
                    stored.index,
                    stored.data,
                    stored.kept,
                )
            lost[ref] = again
            if ref in self._file.unsynced:
                self._file.unsynced[ref] = again

        refs = list(lost)
        results = await asyncio.gather(
            *[place(ref, lost[ref]) for ref in refs], return_exceptions=True
        )
        failure: TorusError | None = None
        for ref, result in zip(refs, results, strict=True):
            if isinstance(result, (BlockUnavailable, OutOfSpace)):
                if await self._is_superseded(ref, lost[ref].index):
                    self._file.unsynced.pop(ref, None)
                    raise Superseded
                failure = result
            elif isinstance(result, TorusError):
                failure = failure or result
            elif isinstance(result, BaseException):
                raise result
        return failure

    async def _place_again(self, ref: BlockRef, stored: Stored) -> list[list[Any]]:
        file = self._file
        replicator = self._system.actor("replicator")
        copies = file.blockset.replication or 0 if stored.data is None else 0
        data: Buffer | None = stored.data
        if data is None:
            # If all its peers were lost, a copy here may be the last one.
            data = file.cache.whole(ref) if stored.kept is None else stored.kept
        placed: list[list[Any]]
        if data is not None:
            placed = await replicator.put_block.remote(
                ref, stored.root, sums_of(data), copies, payload=data
            )
        else:
            placed = await replicator.place_again.remote(ref, stored.root, copies)
        return placed

    async def _is_superseded(self, ref: BlockRef, index: int) -> bool:
        """Whether a block is named by nothing but plans that did not come to an end."""
        if index < 0:
            return False
        file = self._file
        entry = await file.with_pages(lambda: file.blockset.get(index))
        return entry is None or entry.ref != ref
