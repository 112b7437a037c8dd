"""Auditing a volume: are all copies of all its blocks where they should be, and right?

Walks the INode trees of the volume's head and of its snapshots, and asks every member of the ring
which blocks it has, and under which checksum; a block that several of them share is counted once.
It reads only; what it finds wrong, rebalancer and scrubber put right. What a client flushed since
the last commit is in the volume's journal: of that it asks each member whether it has all of it,
and has it read where copies are read too; the blocks that the records name are checked like others.
A lost member is put right by the session that uses the volume, or by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from torus_actors.actors.block_messages import CHECK_STATUS, Status, split_answer
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import TRANSIENT, BlockUnavailable, NoPeer, NotExist, TorusError
from torus_actors.metadata.records import Head, Journal, Snapshot
from torus_actors.metadata.service import MetadataService
from torus_actors.model.blocksets import unmarshal_blockset
from torus_actors.model.inode_tree import depth_of
from torus_actors.model.inode_tree_pages import FANOUT_BITS, decode_page
from torus_actors.model.ref_set import RefSet
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef, BlockType
from torus_actors.runtime import ActorSystem
from torus_actors.volume.opening import kept_head, kept_newest
from torus_actors.volume.recovery import is_unreplayed, lost_members, unreadable_members
from torus_actors.volume.snapshots import split_name

BATCH = 1024
"""Refs in one question where a node need only look into its index."""

BATCH_DEEP = 32
"""And where it must read every byte: 16 MiB of the default block size, a fraction of a second."""

CHECK_TIMEOUT_S = 60.0

ATTEMPTS = 3
RETRY_S = 0.5
"""A node that does not answer is asked again: it may just be restarting."""

Progress = Callable[[int], None]
"""Called with the number of blocks looked at so far."""


@dataclass(slots=True)
class Audit:
    """What was found; counts are of blocks, INode pages among them.

    Attributes:
        wanted: copies that a data block should have.
        expected: copies that it can have: no more than there are members.
        snapshots: how many of them were looked at, beside the volume itself.
        pages: blocks that are INode pages.
        exact: with just as many good copies as wanted.
        more: with more.
        fewer: with fewer, but at least one.
        missing: without any good copy.
        corrupt: with a copy that is damaged, or is of other content.
        misplaced: of which an owner has no good copy, while a node that is no owner has one.
        scarce: with fewer, or none, because the ring has too few members.
        journal: members of the journal with what the last commit lacks; none if it lacks nothing.
        journal_lost: of these, those that do not answer, or have lost or damaged records.
        silent: members that could not be asked; what they have is not counted.
        unsafe: members whose disk failed: what they have is not counted, for some of it may be gone
            when they are restarted.
        examples: some of the blocks with too few copies.
    """

    volume: str
    deep: bool
    wanted: int
    expected: int
    snapshots: int = 0
    blocks: int = 0
    pages: int = 0
    exact: int = 0
    more: int = 0
    fewer: int = 0
    missing: int = 0
    corrupt: int = 0
    misplaced: int = 0
    scarce: int = 0
    journal: list[str] = field(default_factory=list)
    journal_lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every block has as many good copies as are wanted, and so has the journal."""
        return not self.fewer and not self.missing and not self.journal_lost

    @property
    def is_journal_lost(self) -> bool:
        """Whether nobody has what was flushed since the last commit."""
        return bool(self.journal) and len(self.journal_lost) == len(self.journal)


EXAMPLES_MAX = 5

Entry = tuple[BlockRef, int | None]
"""A block, and the root of its checksums if the volume keeps them."""


async def audit_volume(
    system: ActorSystem,
    meta: MetadataService,
    view: ClusterView,
    name: str,
    *,
    deep: bool = False,
    progress: Progress | None = None,
) -> Audit:
    """Audit the volume of that name with its snapshots, or one snapshot, ``VOLUME@NAME``.

    Args:
        system: of a client, whose ``inode_store`` fetches pages.
        meta: the metadata service.
        view: ring and members.
        name: of the volume.
        deep: have every copy read and verified, instead of looked up.
        progress: told how far it is.

    Raises:
        NotExist: there is no such volume or snapshot.
        NoPeer: the ring is empty.
        BlockUnavailable, Corruption: a page of the INode cannot be had, or the journal not read, so
            what they lead to is not known; nothing could be said of the volume.
    """
    volume, only = split_name(name)
    record = await meta.volume(volume)
    audit = Audit(name, deep, view.ring.replication, 0)
    auditor = Auditor(system, view, audit)
    async with contextlib.AsyncExitStack() as kept:

        async def keep(snapshot: Snapshot | None = None) -> Head | None:
            holding = kept_head(system, meta, record.id, "volume check", snapshot)
            return await kept.enter_async_context(holding)

        heads: list[Head | None] = []
        named: list[tuple[BlockRef | None, int]] = []
        if only is not None:
            heads.append(await keep(await meta.snapshot(record.id, only)))
            audit.snapshots = 1
        else:
            # The journal before the head, which lacks nothing if it is newer.
            journal, _ = await meta.journal(record.id)
            # The head before them: a snapshot that is made of it meanwhile has no other blocks.
            heads.append(await keep())
            if journal is not None and is_unreplayed(journal, heads[0]):
                await _audit_journal(audit, system, meta, record.id, journal, heads[0])
                if not audit.is_journal_lost:
                    newest = kept_newest(system, meta, record.id, "volume check")
                    head, replay = await kept.enter_async_context(newest)
                    heads += [head, replay.head]
                    named = [block[:2] for block in replay.blocks.values()]
            for snapshot in await meta.snapshots(record.id):
                with contextlib.suppress(NotExist):  # it was deleted just now
                    heads.append(await keep(snapshot))
                    audit.snapshots += 1
        found = [head for head in heads if head is not None]
        await _audit(auditor, found, named, progress)
    return audit


async def _audit_journal(
    audit: Audit,
    system: ActorSystem,
    meta: MetadataService,
    volume_id: int,
    journal: Journal,
    head: Head | None,
) -> None:
    """Ask the journal's members for what they have of it."""
    for _ in range(ATTEMPTS):
        audit.journal = list(journal.ensemble)
        _, newest_epoch = await meta.lock_status(volume_id)
        lost = await lost_members(system, volume_id, journal, newest_epoch)
        if audit.deep:
            there = [each for each in journal.ensemble if each not in lost]
            lost += await unreadable_members(system, volume_id, journal, newest_epoch, head, there)
        audit.journal_lost = [each for each in journal.ensemble if each in lost]
        if not audit.journal_lost:
            return
        # A session may have cut what was just asked for, or have found itself another member.
        await asyncio.sleep(RETRY_S)
        newest, _ = await meta.journal(volume_id)
        head, _ = await meta.head(volume_id)
        if newest is None or not is_unreplayed(newest, head):
            audit.journal, audit.journal_lost = [], []
            return
        journal = newest


async def _audit(
    auditor: Auditor,
    heads: list[Head],
    named: list[tuple[BlockRef | None, int]],
    progress: Progress | None,
) -> None:
    """Check all blocks that these lead to, and those that the journal names beside them."""
    audit = auditor.audit
    members = auditor.view.ring.members
    if not members:
        raise NoPeer("no node is in the ring")
    blockset = unmarshal_blockset(heads[0].extra) if heads else None
    if blockset is not None and blockset.replication is not None:
        audit.wanted = max(audit.wanted, blockset.replication)
    audit.expected = min(audit.wanted, len(members))
    if blockset is None:
        return
    await auditor.find_unsafe()
    batch: list[Entry] = []
    size = BATCH_DEEP if audit.deep else BATCH
    async for ref, root in _entries(auditor.system, heads, named):
        keeps = blockset.keeps_sums or ref.block_type == BlockType.INODE
        batch.append((ref, root if keeps else None))
        if len(batch) >= size:
            await auditor.check(batch)
            batch = []
            if progress is not None:
                progress(audit.blocks)
    if batch:
        await auditor.check(batch)
    if progress is not None:
        progress(audit.blocks)


async def _entries(
    system: ActorSystem, heads: list[Head], named: list[tuple[BlockRef | None, int]]
) -> AsyncIterator[tuple[BlockRef, int]]:
    """Every block that is named or that these heads refer to, once, with its checksum root.

    Pages come before what they lead to.
    """
    store = system.actor("inode_store")
    seen = RefSet()
    for block, root_crc in named:
        if block is not None:
            seen.add_all([block])
            yield block, root_crc
    todo: list[tuple[int, int, BlockRef, int]] = []
    for head in heads:
        root = unmarshal_blockset(head.extra).block_map.root
        if not root.ref.is_zero:
            todo.append((depth_of(root.nblocks) - 1, 0, root.ref, root.crc))
    while todo:
        level, number, ref, crc = todo.pop()
        if ref in seen:
            continue  # a page never changes, so all that lies under it was seen too
        seen.add_all([ref])
        yield ref, crc
        page = decode_page(level, number, crc, await store.get_page.remote(ref, crc))
        if level:
            base = number << FANOUT_BITS
            for slot, entry in page.items():
                todo.append((level - 1, base + slot, entry.ref, entry.root))
            continue
        new = [(entry.ref, entry.root) for _, entry in page.items() if entry.ref not in seen]
        seen.add_all(each for each, _ in new)
        for each, root_crc in new:
            yield each, root_crc


class Auditor:
    """Asks the members about one batch after the other."""

    def __init__(self, system: ActorSystem, view: ClusterView, audit: Audit) -> None:
        self.system = system
        self.view = view
        self.audit = audit

    async def find_unsafe(self) -> None:
        """Find out whose word does not count; who does not answer is asked again later."""
        members = self.view.ring.members
        stores = [self.system.actor("block_store", node=member) for member in members]
        asked = [store.stats.remote(timeout_s=CHECK_TIMEOUT_S) for store in stores]
        for member, ref in zip(members, asked, strict=True):
            with contextlib.suppress(*TRANSIENT, NoPeer):
                stats = await ref
                if any(stats[kind]["failure"] for kind in ("blocks", "inodes")):
                    self.audit.unsafe.append(member)

    async def check(self, batch: list[Entry]) -> None:
        """Count the copies of these blocks."""
        left_out = (*self.audit.silent, *self.audit.unsafe)
        members = [each for each in self.view.ring.members if each not in left_out]
        packed = b"".join(ref for ref, _ in batch)
        answers = await asyncio.gather(*[self._ask(member, packed) for member in members])
        found = dict(zip(members, answers, strict=True))
        for at, (ref, root) in enumerate(batch):
            copies = {member: answer[at] for member, answer in found.items() if answer is not None}
            self.count(ref, root, copies)

    async def _ask(self, member: str, packed: bytes) -> list[tuple[int, ...]] | None:
        """What a member has of them; None if it does not answer."""
        store = self.system.actor("block_store", node=member)
        for attempt in range(ATTEMPTS):
            try:
                answer = await store.check_blocks.remote(
                    packed, self.audit.deep, False, timeout_s=CHECK_TIMEOUT_S
                )
                return list(split_answer(CHECK_STATUS, answer, len(packed) // BLOCK_REF_SIZE))
            except TorusError as error:
                if not isinstance(error, (*TRANSIENT, NoPeer)):
                    raise
                if attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(RETRY_S)
        self.audit.silent.append(member)
        return None

    def count(self, ref: BlockRef, root: int | None, copies: dict[str, tuple[int, ...]]) -> None:
        """Judge one block by what the members said: status and checksum root."""
        audit = self.audit
        ring = self.view.ring
        wanted = audit.wanted
        if ref.block_type == BlockType.INODE:
            wanted = max(wanted, self.view.inode_replication)
            audit.pages += 1
        permutation = ring.permutation(ref)
        owners = permutation[:wanted]
        good = set()
        damaged = False
        for member, (status, stored) in copies.items():
            if status == Status.OK and (root is None or stored == root):
                good.add(member)
            elif status not in (Status.MISSING, Status.DEAD):
                damaged = True
        audit.blocks += 1
        audit.corrupt += damaged
        if good.difference(owners) and not good.issuperset(owners):
            audit.misplaced += 1
        if len(good) == wanted:
            audit.exact += 1
            return
        if len(good) > wanted:
            audit.more += 1
            return
        audit.scarce += len(owners) < wanted
        if good:
            audit.fewer += 1
        else:
            audit.missing += 1
        if len(audit.examples) < EXAMPLES_MAX:
            audit.examples.append(f"{ref}: {len(good)} of {wanted} copies")


def explain(audit: Audit) -> TorusError | None:
    """The result as an error in one line; None if all is well."""
    if audit.good:
        return None
    if audit.is_journal_lost:
        names = ", ".join(member[:8] for member in audit.journal)
        return BlockUnavailable(
            f"volume {audit.volume} cannot be opened: what was flushed last is in its journal, and "
            f"no member of that ({names}) has it and answers: start them"
        )
    few = audit.fewer + audit.missing
    if not few:
        there = len(audit.journal) - len(audit.journal_lost)
        names = ", ".join(member[:8] for member in audit.journal_lost)
        return BlockUnavailable(
            f"volume {audit.volume}: {there} of {len(audit.journal)} members of its journal have "
            f"what was flushed last; start {names}, or open the volume and close it"
        )
    text = f"volume {audit.volume}: {few} of {audit.blocks} blocks have too few good copies"
    if audit.missing:
        text += f", {audit.missing} have none"
    if audit.unsafe:
        names = ", ".join(member[:8] for member in audit.unsafe)
        text += f"; not counted, because their disk failed: restart {names}"
    if audit.silent:
        names = ", ".join(member[:8] for member in audit.silent)
        text += f"; not asked, because they do not answer: {names}"
    elif audit.scarce:
        text += "; the ring has too few members for more: add some with torusctl peer add"
    elif not audit.unsafe:
        # A rebalancer does not read the copies that there are.
        how = "scrub" if audit.corrupt else "rebalance"
        text += f"; let the cluster repair it: torusctl debug {how}"
    return BlockUnavailable(text)
