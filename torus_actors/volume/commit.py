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
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from torus_actors.errors import (
    BlockUnavailable,
    OutOfSpace,
    TorusError,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.model.inode_tree import CommitPlan
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ActorSystem
from torus_actors.volume.file import File

log = logging.getLogger(__name__)

WRITE_OUT_PATIENCE_S = 20.0
"""How long a flush waits for peers that do not take blocks before it fails; the data stays in the
cache, and a later flush may succeed."""

PLACE_AGAIN_MAX = 8
"""Rounds of flushing and placing anew before a flush fails: every round needs a node to crash."""


class Committer:
    """Flushes one file.

    Args:
        file: what to flush.
        next_inode_ref: names for pages.
        next_inode: ends the present INode number and returns it: blocks put from now on get
            another, so that what a head's number or an older one marks is in that head or dead.
        record: stores the new head of that INode number; retries by itself while the metadata
            cannot be reached.
    """

    def __init__(
        self,
        system: ActorSystem,
        file: File,
        next_inode_ref: Callable[[], BlockRef],
        next_inode: Callable[[], int],
        record: Callable[[CommitPlan, int], Awaitable[None]],
    ) -> None:
        self._system = system
        self._file = file
        self._next_inode_ref = next_inode_ref
        self._next_inode = next_inode
        self._record = record

    @property
    def clean(self) -> bool:
        """Whether there is nothing to do."""
        file = self._file
        return not (file.layers.dirty or file.layers.frozen or file.unsynced or file.map.is_dirty)

    async def commit(self) -> None:
        """Run all the steps.

        Raises:
            OutOfSpace, BlockUnavailable: what was written could not be stored; it is still cached.
            Fenced: another session has taken over.
        """
        file = self._file
        if file.failure is not None:
            raise file.failure
        if self.clean:
            return
        await self._write_out()
        await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Commit the map as it is: steps 2 to 5."""
        file = self._file
        plan = file.map.plan_commit(self._next_inode_ref)
        inode = self._next_inode()
        file.fresh.clear()  # from here on a head may name them
        # The same synchronous step as the plan: exactly what the plan may name.
        covered = dict(file.unsynced)
        try:
            pages = await self._system.actor("inode_store").put_pages.remote(
                [list(page) for page in plan.blocks], timeout_s=60.0
            )
            for (ref, _), (root, placed) in zip(plan.blocks, pages, strict=True):
                covered[ref] = (root, placed)
            await self._make_durable(covered)
            await self._record(plan, inode)
        except BaseException:
            file.map.commit_failed(plan)
            raise
        file.map.commit_done(plan)

    async def _write_out(self) -> None:
        """Wait until the layers that are there now are in the map."""
        file = self._file
        layers = file.layers
        targets = {
            index: {id(layer) for layer in (layers.dirty.get(index), layers.frozen.get(index))}
            for index in layers.indexes()
        }
        # The layers themselves are kept alive here, so that no other can take over their id.
        keep = [*layers.dirty.values(), *layers.frozen.values()]
        for index in targets:
            file.want(index)
        file.put_error = None
        file.retry_now()
        file.pump()
        end = self._system.loop.time() + WRITE_OUT_PATIENCE_S
        while targets:
            for index in list(targets):
                present = {id(layers.dirty.get(index)), id(layers.frozen.get(index))}
                present.discard(id(None))
                if not present & targets[index]:
                    del targets[index]
                elif index in layers.dirty and id(layers.dirty[index]) in targets[index]:
                    file.want(index)
            if not targets:
                break
            if file.failure is not None:
                raise file.failure
            if isinstance(file.put_error, OutOfSpace):
                raise file.put_error
            left = end - self._system.loop.time()
            if left <= 0:
                raise BlockUnavailable(
                    f"{len(targets)} blocks could not be stored in time: {file.put_error}"
                )
            if file.reclaiming and (file.unsynced or file.map.is_dirty):
                # The cluster is full, and what these blocks replace becomes garbage only once a
                # head names them: that may be the very room that is missing.
                await self._checkpoint()
            file.pump()
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await file.progress()
            except TimeoutError:
                pass
        del keep

    async def _make_durable(self, covered: dict[BlockRef, tuple[int, list[list[Any]]]]) -> None:
        """Flush the peers that hold these blocks until all of them have confirmed."""
        replicator = self._system.actor("replicator")
        pending = covered
        backoff = Backoff(self._system.rng, first_s=0.02, max_s=0.5)
        for _ in range(PLACE_AGAIN_MAX):
            peers = sorted({peer for _, placed in pending.values() for peer, _ in placed})
            if not peers:
                break
            confirmed = await replicator.flush.remote(peers, timeout_s=120.0)
            lost: dict[BlockRef, tuple[int, list[list[Any]]]] = {}
            for ref, (root, placed) in pending.items():
                gone = [peer for peer, inc in placed if confirmed.get(peer) != inc]
                if not gone:
                    self._file.unsynced.pop(ref, None)
                    continue
                try:
                    again = await replicator.place_again.remote(ref, root, gone, 0)
                except TorusError as error:
                    raise BlockUnavailable(
                        f"block {ref} was lost by a node before it was durable: {error}"
                    ) from error
                lost[ref] = (root, again)
                if ref in self._file.unsynced:
                    self._file.unsynced[ref] = (root, again)
            if not lost:
                return
            log.info("%d blocks placed anew after a node was lost", len(lost))
            pending = lost
            await backoff.wait()
        if pending:
            raise BlockUnavailable("peers restart faster than blocks can be made durable")
