"""The scrubber: reads every block of this node again and again, and repairs what has rotted.

Walks the stored blocks slowly, has each verified byte by byte, and replaces a damaged copy by a
good one from another peer; if none has one just now it tries again every few minutes. Messages in:
``start_pass``, ``status``; out: to the block store here, to the replicator and to a disk worker.
Its death costs nothing; that of the process, what was read in the last minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from torus_actors.actors.block_messages import (
    CHECK_STATUS,
    INODE_BLOCK_SIZE,
    Status,
    split_answer,
    split_refs,
)
from torus_actors.errors import DeadlineExceeded, TorusError
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import LoopActor, expose
from torus_actors.storage.scrub_place import ScrubPlace

log = logging.getLogger(__name__)

BATCH = 8
"""Blocks verified in one call: 4 MiB, so that reads of clients come in between."""

CHECK_S = 60.0
"""How long that may take."""

RATE_BYTES_S = 16 << 20
"""What it reads in a second: a terabyte in 18 hours, and unnoticed beside clients."""

PAUSE_S = 3600.0
"""Pause between passes."""

FIRST_PASS_AFTER_S = 60.0
"""A node that has just started has better things to do."""

SAVE_S = 60.0
"""How often the place that it has come to is written down for the next process."""

MEND_S = 30.0
MEND_S_MAX = 600.0
"""Pause before what could not be repaired is tried again: whoever has a good copy may be back, and
the next pass is hours away. It doubles."""

UNREPAIRED_MAX = 1000
"""So many blocks are tried again. More are a disk that is to be replaced."""


class Scrubber(LoopActor):
    """See the module.

    Args:
        block_size: bytes of a data block.
        rate_bytes_s: what it may read, bytes a second.
        pause_s: between passes.
        place: where the one before had come to.
    """

    def __init__(
        self,
        block_size: int,
        rate_bytes_s: int = RATE_BYTES_S,
        pause_s: float = PAUSE_S,
        place: ScrubPlace | None = None,
    ) -> None:
        super().__init__()
        self._place = place or ScrubPlace()
        self._saved_at = 0.0
        self._block_size = block_size
        self._rate = rate_bytes_s
        self._pause_s = pause_s
        self._asked = asyncio.Event()
        self._hurry = False
        names = ("passes", "checked", "damaged", "repaired", "failed", "unread")
        self._counts = dict.fromkeys(names, 0)
        self._unrepaired: dict[BlockRef, None] = {}
        """Damaged blocks of which no good copy was found."""
        self._passing = False
        self._total = 0
        self._seen = 0

    async def setup(self) -> None:
        """Start scrubbing."""
        self._saved_at = self.system.loop.time()
        self.spawn(self._work())
        self.spawn(self._mend())

    @expose(remote=True)
    def start_pass(self) -> None:
        """Run a pass now, as fast as the disk allows."""
        self._hurry = True
        self._asked.set()

    @expose(remote=True)
    def status(self) -> dict[str, Any]:
        """Counts of blocks since the start.

        ``failed`` are those that the disk did not read in time (``unread``), and damaged ones of
        which no good copy was found; ``unrepaired`` are those of the latter that are damaged still.
        ``seen`` of ``total`` are those of the pass under way, or of the last one.
        """
        return {
            **self._counts,
            "unrepaired": len(self._unrepaired),
            "running": self._passing,
            "seen": self._seen,
            "total": max(self._total, self._seen),
        }

    async def _work(self) -> None:
        wait_s = FIRST_PASS_AFTER_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._asked.wait()
            # What was asked for during a pass is asked of the next one too.
            self._hurry = self._asked.is_set()
            self._asked.clear()
            wait_s = self._pause_s
            self._passing = True
            try:
                await self._pass()
                self._counts["passes"] += 1
            except TorusError as error:
                log.warning("scrubbing: %s", error)
            finally:
                self._passing = False

    async def _pass(self) -> None:
        """Read every block, beginning where the last pass that was cut off had come to."""
        store = self.system.actor("block_store")
        stats = await store.stats.remote()
        self._seen = 0
        self._total = stats["blocks"]["used"] + stats["inodes"]["used"]
        for kind, first, end in _ways_round(self._place.kind, self._place.slot):
            slot: int | None = first
            while slot is not None and (end is None or slot < end):
                await self._come_to(kind, slot)
                packed, slot = await store.list_blocks.remote(kind, slot, BATCH)
                if packed:
                    block_size = INODE_BLOCK_SIZE if kind else self._block_size
                    await self._scrub(list(split_refs(packed)), block_size)
        self._place.kind, self._place.slot = 0, 0

    async def _come_to(self, kind: int, slot: int) -> None:
        """Take note that the pass has come so far."""
        self._place.kind, self._place.slot = kind, slot
        now = self.system.loop.time()
        if now < self._saved_at + SAVE_S:
            return
        self._saved_at = now
        try:
            # By that worker: a disk that hangs would hold up no reader.
            flusher = self.system.actor("disk_flusher")
            await flusher.keep_place.remote(self._place, kind, slot)
        except TorusError as error:
            log.debug("writing down where the scrubber is: %s", error)

    async def _scrub(self, refs: list[BlockRef], block_size: int) -> None:
        statuses = await self._check(refs)
        self._seen += len(refs)
        for ref, (status, root) in zip(refs, statuses, strict=True):
            if status == Status.FAILED:
                self._counts["failed"] += 1
                self._counts["unread"] += 1
                continue
            self._counts["checked"] += 1
            if status == Status.CORRUPT:
                await self._found_damaged(ref, root)
        if not self._hurry:
            await asyncio.sleep(len(refs) * block_size / self._rate)

    async def _check(self, refs: list[BlockRef]) -> list[tuple[int, ...]]:
        """Status and root checksum of each.

        A disk may take minutes for a sector that it cannot read, and the next pass would come no
        further: so what takes too long is left out, and what lies behind it is not.
        """
        store = self.system.actor("block_store")
        try:
            answer = await store.check_blocks.remote(b"".join(refs), True, timeout_s=CHECK_S)
            return list(split_answer(CHECK_STATUS, answer, len(refs)))
        except DeadlineExceeded as error:
            log.warning("scrubbing %d blocks: %s", len(refs), error)
            if len(refs) == 1:
                return [(Status.FAILED, 0)]
        return [status for ref in refs for status in await self._check([ref])]

    async def _found_damaged(self, ref: BlockRef, root: int) -> None:
        log.warning("block %s is damaged on this node", ref)
        self._counts["damaged"] += 1
        error = await self._repair(ref, root)
        if error is not None:
            self._counts["failed"] += 1
            log.error("block %s cannot be repaired: %s", ref, error)
            if len(self._unrepaired) < UNREPAIRED_MAX:
                self._unrepaired[ref] = None

    async def _repair(self, ref: BlockRef, root: int) -> TorusError | None:
        """Replace a damaged copy; returns why that is not possible."""
        try:
            # Its checksum is in the index, which has one of its own: so what is right is known.
            await self.system.actor("replicator").repair.remote(
                ref, root, self.system.node_id, timeout_s=30.0
            )
        except TorusError as error:
            return error
        self._counts["repaired"] += 1
        self._unrepaired.pop(ref, None)
        return None

    async def _mend(self) -> None:
        """Try again what could not be repaired."""
        pause_s = MEND_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MEND_S_MAX) if self._unrepaired else MEND_S
            for ref in list(self._unrepaired):
                try:
                    ((status, root),) = await self._check([ref])
                except TorusError as error:
                    log.debug("looking at block %s again: %s", ref, error)
                    continue
                if status == Status.CORRUPT:
                    await self._repair(ref, root)
                elif status != Status.FAILED:
                    self._unrepaired.pop(ref, None)  # it was read and repaired, or deleted


def _ways_round(kind: int, slot: int) -> list[tuple[int, int, int | None]]:
    """Stretches of slots that are all slots of both stores, from one on round to it again.

    Returns:
        The store, the first slot, and the one to stop at, None for the last, of each.
    """
    kind = min(kind, 1)  # what another version wrote must not end every pass
    other = 1 - kind
    return [(kind, slot, None), (other, 0, None), (kind, 0, slot)]
