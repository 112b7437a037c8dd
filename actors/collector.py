"""The garbage collector of a node: deletes blocks that nothing can reach any more.

A pass reads all metadata, walks the trees of all heads, snapshots and readers, and looks at each
block stored here. A block is a candidate when

- its volume has a tombstone, or it is older than its volume's head (a smaller INode number: what an
  open session has not committed yet is never older), and
- no tree of any volume names it, since clones share blocks, and
- nobody reads it: those who have no lock leave a record of what they read.

It is deleted when two complete passes, ``grace_s`` apart, both find it. The collector fails closed:
any error in a pass, in reading metadata or a page, ends the pass with nothing deleted, and a volume
that is not understood protects all its blocks. Messages in: ``start_pass``, ``status``. Its death
costs the candidates of the last pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torus_actors.errors import BlockUnavailable, Fenced, TorusError
from torus_actors.metadata.records import Head
from torus_actors.metadata.service import MetadataService
from torus_actors.model.blocksets import unmarshal_blockset
from torus_actors.model.inode_tree import depth_of
from torus_actors.model.inode_tree_pages import FANOUT_BITS, decode_page
from torus_actors.model.ref_set import RefSet, compact
from torus_actors.model.refs import ZERO_BLOCK, BlockRef
from torus_actors.runtime import LoopActor, expose
from torus_actors.volume.recovery import is_unreplayed

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Time between the two passes that must agree. Whoever reads by an old head, or makes a snapshot or
clone of it, is done or visible in the metadata by then."""

INTERVAL_S = 20.0
"""A pass runs this often; the second one comes when the grace is over."""

BATCH = 2048
"""Blocks looked at in one turn of the loop: well under a millisecond each ten."""

HEADS_BATCH = 256
"""Heads decoded in one turn: a few milliseconds. There may be tens of thousands of snapshots."""

PAGES_IN_AIR = 16
"""Pages fetched at once."""

BUSY_SHARE = 0.2
"""Share of one core that repeated passes may take: a long pass makes for a longer pause."""


@dataclass(frozen=True, slots=True)
class _Page:
    """What a page leads to; kept between passes, since a page never changes.

    Those of all volumes are, on each node: so they are kept small.
    """

    pages: tuple[tuple[int, int, BlockRef, int], ...]
    blocks: bytes
    """Compact."""


class _Roots(NamedTuple):
    """What the metadata says of blocks and journals.

    Attributes:
        oldest_open: for each volume the INode number from which on blocks may be uncommitted.
        tombs: volumes that were deleted.
        heads: of all volumes and snapshots.
        heads_read: of readers.
        read: for each volume first and last INode number of what somebody reads who has no lock.
        journals: for each volume the session that recorded its last ensemble, and whether this node
            may have what no head does.
        held: volumes that somebody has open.
    """

    oldest_open: dict[int, int]
    tombs: set[int]
    heads: list[Head]
    heads_read: list[Head]
    read: dict[int, list[tuple[int, int]]]
    journals: dict[int, tuple[int, bool]]
    held: set[int]


class Collector(LoopActor):
    """See the module.

    Args:
        meta: the metadata service.
        grace_s: time between the two passes that must agree.
        interval_s: time between passes otherwise.
    """

    def __init__(
        self, meta: MetadataService, grace_s: float = GRACE_S, interval_s: float = INTERVAL_S
    ) -> None:
        super().__init__()
        self._meta = meta
        self._grace_s = grace_s
        self._interval_s = interval_s
        self._asked = asyncio.Event()
        self._pages: dict[BlockRef, _Page] = {}
        self._suspects = RefSet()
        self._suspected_at = 0.0
        self._counts = {
            "passes": 0,
            "failed_passes": 0,
            "garbage": 0,
            "garbage_bytes": 0,
            "reclaimed": 0,
            "reclaimed_bytes": 0,
            "begun": 0,
            "journals_read": 0,
            "unreplayed": 0,
            "unreplayed_open": 0,
        }
        self._last_error = ""
        self._pass_s = 0.0

    async def setup(self) -> None:
        """Start collecting."""
        self.spawn(self._work())

    @expose(remote=True)
    def start_pass(self) -> dict[str, Any]:
        """Collect soon, because room is wanted; returns the status."""
        self._asked.set()
        return self.status()

    @expose(remote=True)
    def status(self) -> dict[str, Any]:
        """Counts of blocks, and the room that they take or took.

        ``garbage`` are the dead ones that wait for their second pass, ``reclaimed`` those that were
        deleted since this actor started. ``unreplayed`` are volumes that nobody has open, of which
        the journal here may have what no head has yet, and ``unreplayed_open`` those that somebody
        has, as pass number ``journals_read`` of ``begun`` found.
        """
        return {**self._counts, "last_error": self._last_error, "pass_s": round(self._pass_s, 3)}

    async def _work(self) -> None:
        loop = self.system.loop
        while True:
            wait_s = self._grace_s if len(self._suspects) else self._interval_s
            try:
                async with asyncio.timeout(max(wait_s, self._pass_s / BUSY_SHARE)):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            left = self._suspected_at + self._grace_s - loop.time()
            if len(self._suspects) and left > 0:
                await asyncio.sleep(left)
            before = self._counts["reclaimed"]
            try:
                await self._pass()
                self._last_error = ""
            except TorusError as error:
                # Nothing more is deleted, and what was suspected must be found dead twice again.
                self._suspects = RefSet()
                self._counts["failed_passes"] += 1
                self._counts["garbage"] = self._counts["garbage_bytes"] = 0
                self._last_error = str(error)
                deleted = self._counts["reclaimed"] - before
                log.warning("collecting ended early, with %d blocks deleted: %s", deleted, error)

    async def _pass(self) -> None:
        """One complete pass: finds the dead, deletes those the last pass found dead as well."""
        self._counts["begun"] += 1
        logs = await self._logs()  # before the metadata, which may then say of what is in them
        oldest_open, tombs, heads, heads_read, read, journals, held = await self._read_metadata()
        if logs is not None:
            kept = {
                volume
                for volume, (_, last) in logs.items()
                if last and volume not in tombs and journals.get(volume, (0, False))[1]
            }
            self._counts["unreplayed"] = len(kept - held)
            self._counts["unreplayed_open"] = len(kept & held)
            self._counts["journals_read"] = self._counts["begun"]
        # Not before: what died while the metadata was read has its whole grace too.
        began = self.system.loop.time()
        live = await self._reachable(heads, heads_read)
        suspects = RefSet()
        suspect_bytes = 0
        dead_twice: list[list[BlockRef]] = [[], []]
        store = self.system.actor("block_store")
        stats = await store.stats.remote()
        sizes = [stats[name]["block_size"] for name in ("blocks", "inodes")]
        for kind in (0, 1):
            slot: int | None = 0
            while slot is not None:
                packed, slot = await store.list_blocks.remote(kind, slot, BATCH)
                dead = []
                for at in range(0, len(packed), 24):
                    ref = BlockRef(packed[at : at + 24])
                    volume = ref.volume
                    # A volume that is not known, or has no head yet, protects all its blocks.
                    open_ended = ref.inode >= oldest_open.get(volume, 0)
                    if (
                        (volume in tombs or not open_ended)
                        and ref not in live
                        and not _is_within(ref.inode, read.get(volume, ()))
                    ):
                        dead.append(ref)
                new = [ref for ref in dead if ref not in self._suspects]
                dead_twice[kind] += [ref for ref in dead if ref in self._suspects]
                suspects.add_all(new)
                suspect_bytes += len(new) * sizes[kind]
                await asyncio.sleep(0)
        # What follows waits for disks and takes no core: one that hung for a minute must not keep
        # garbage for many more.
        self._pass_s = self.system.loop.time() - began
        for refs, size in zip(dead_twice, sizes, strict=True):
            for at in range(0, len(refs), BATCH):
                deleted = await store.delete_blocks.remote(b"".join(refs[at : at + BATCH]))
                self._counts["reclaimed"] += deleted
                self._counts["reclaimed_bytes"] += deleted * size
        if any(dead_twice):
            count = sum(map(len, dead_twice))
            try:
                await store.flush.remote(timeout_s=120.0)  # their room is free only after that
                log.info("%d dead blocks deleted", count)
            except TorusError as error:  # what is told elsewhere, and tried again
                log.warning("%d dead blocks are deleted, but not for good yet: %s", count, error)
        await self._trim_journals(logs or {}, tombs, journals)
        self._suspects = suspects
        self._suspected_at = began
        self._counts["passes"] += 1
        self._counts["garbage"] = len(suspects)
        self._counts["garbage_bytes"] = suspect_bytes

    async def _logs(self) -> dict[int, tuple[int, int]] | None:
        """Of each volume that has a log here, the newest epoch with records, and the last one.

        None if the journal does not say: blocks are still collected.
        """
        logs: dict[int, tuple[int, int]] | None = {}
        if "journal" in self.system.cells:
            try:
                logs = await self.system.actor("journal").volumes.remote()
            except TorusError as error:
                log.info("the journal does not say what it has: %s", error)
                logs = None
        return logs

    async def _trim_journals(
        self,
        logs: dict[int, tuple[int, int]],
        tombs: set[int],
        journals: dict[int, tuple[int, bool]],
    ) -> None:
        """Forget what nobody will ask the journal here for.

        Those are the logs of deleted volumes, and records of sessions before the one that recorded
        the last ensemble: it did so when a head covered them, and told its own members only. They
        are to be refused from then on too, or a record that is cut would count as stored. Likewise
        the records of that session itself that were here before it had an ensemble without this
        node; it may take this node again later, for other records.
        """
        journal = self.system.actor("journal")
        try:
            for volume, (epoch, last) in logs.items():
                if volume in tombs:
                    await journal.drop.remote(volume)
                elif volume in journals:
                    newest, is_asked = journals[volume]
                    with contextlib.suppress(Fenced):  # a still later session has been here
                        await journal.fence.remote(volume, newest)
                    upto = last if epoch == newest and not is_asked else 0
                    await journal.cut.remote(volume, newest, upto)
        except TorusError as error:
            log.info("the journal keeps what nobody needs: %s", error)  # blocks are still collected

    async def _read_metadata(self) -> _Roots:
        """All that roots blocks, as it was at one revision of the metadata.

        Whatever roots blocks later was made of what is there now, or of blocks that are protected:
        a snapshot of a head, a clone of a head, a head of a session or of a snapshot.

        Raises:
            Corruption: there is a key or a record that is not understood.
        """
        state = await self._meta.state()
        oldest_open = {
            volume: head.inode for volume, head in state.heads.items() if volume in state.volumes
        }
        heads = list(state.heads.values())
        for number, snapshot in enumerate(state.snapshots, 1):
            if number % HEADS_BATCH == 0:
                await asyncio.sleep(0)
            heads += [Head.decode(snapshot.head)] if snapshot.head else []
        heads_read: list[Head] = []
        read: dict[int, list[tuple[int, int]]] = {}
        for reader in state.readers:
            seen = Head.decode(reader.head) if reader.head else None
            first = 0 if seen is None else seen.inode
            read.setdefault(reader.volume_id, []).append((first, reader.upto))
            heads_read += [] if seen is None else [seen]
        me = self.system.node_id
        journals: dict[int, tuple[int, bool]] = {}
        for volume, journal in state.journals.items():
            unreplayed = is_unreplayed(journal, state.heads.get(volume))
            journals[volume] = journal.epoch, unreplayed and me in journal.ensemble
        tombs = state.deleted - set(state.volumes)
        held = set(state.locks)
        return _Roots(oldest_open, tombs, heads, heads_read, read, journals, held)

    async def _reachable(self, heads: list[Head], heads_read: list[Head]) -> RefSet:
        """Every block that a head leads to."""
        live = RefSet()
        seen: dict[BlockRef, None] = {}
        await self._walk(heads, False, live, seen)
        # After those that nothing may be missing of.
        await self._walk(heads_read, True, live, seen)
        self._pages = {ref: page for ref, page in self._pages.items() if ref in seen}
        return live

    async def _walk(
        self, heads: list[Head], may_be_gone: bool, live: RefSet, seen: dict[BlockRef, None]
    ) -> None:
        """Add all that these heads lead to, but for what lies under pages that were seen.

        Args:
            heads: where to begin.
            may_be_gone: whether there may be pages that no peer has any more. A reader that was cut
                off from the metadata, and whose record was not there for a while, puts it back.
            live: takes all blocks.
            seen: takes the pages.
        """
        todo: list[tuple[int, int, BlockRef, int]] = []
        for number, head in enumerate(heads, 1):
            if number % HEADS_BATCH == 0:
                await asyncio.sleep(0)
            root = unmarshal_blockset(head.extra).block_map.root
            if root.ref != ZERO_BLOCK:
                todo.append((depth_of(root.nblocks) - 1, 0, root.ref, root.crc))
        while todo:
            batch: list[tuple[int, int, BlockRef, int]] = []
            while todo and len(batch) < PAGES_IN_AIR:
                page = todo.pop()
                if page[2] not in seen:
                    seen[page[2]] = None
                    batch.append(page)
            fetched = await asyncio.gather(*[self._page(*page, may_be_gone) for page in batch])
            live.add_all(page[2] for page in batch)
            for page_content in fetched:
                todo += page_content.pages
                live.add_compact(page_content.blocks)

    async def _page(
        self, level: int, number: int, ref: BlockRef, root: int, may_be_gone: bool
    ) -> _Page:
        known = self._pages.get(ref)
        if known is not None:
            return known
        try:
            data = await self.system.actor("inode_store").get_page.remote(ref, root)
        except BlockUnavailable as error:
            if may_be_gone and error.gone:
                return _Page((), compact(b""))
            raise
        page = decode_page(level, number, root, data)
        if level:
            pages = tuple(
                (level - 1, (number << FANOUT_BITS) + slot, entry.ref, entry.root)
                for slot, entry in page.items()
            )
            known = _Page(pages, compact(b""))
        else:
            known = _Page((), compact(bytes(page.entries)))
        self._pages[ref] = known
        return known


def _is_within(inode: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first <= inode <= last for first, last in ranges)
