"""What must hold for the cluster as a whole, looked at from outside: by reading its memory.

While a scenario runs: epochs, heads and rings only grow, and a lock is never of an epoch that is
over. After a flush every member of the journal that runs has the last record on its disk. What a
new head leads to is on a disk, would be there after a power cut, and could not be taken for garbage
before. No block that a head or snapshot leads to is deleted by one of its owners, nor by another
node before good copies are safe elsewhere; the latter holds for a while after no head leads to it
any more. When its faults are over: every such block has all its copies, right to the last byte, on
its owners, where a power cut leaves them; and nothing else is stored anywhere: no other block, no
record of a journal, no slot that nobody uses or can use, no lock or request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from crc32c import crc32c

from torus_actors.actors.collector import GRACE_S
from torus_actors.errors import Corruption, NotExist, TorusError
from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import Keys
from torus_actors.metadata.kv import Delete, DeletePrefix, Operation, Put
from torus_actors.metadata.records import Epoch, Head, Journal, Lock, RingRecord, Snapshot
from torus_actors.model import rings
from torus_actors.model.blocksets import unmarshal_blockset
from torus_actors.model.checksums import root_of, sums_of, sums_size
from torus_actors.model.inode_tree_pages import ENTRY_SIZE
from torus_actors.model.inode_tree_walk import PageNeeded, PageVisit
from torus_actors.model.refs import BLOCK_REF_SIZE, ZERO_BLOCK, BlockRef, BlockType
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.storage import index
from torus_actors.storage.journal_format import segment_name
from torus_actors.storage.mfile_open import DATA_PATH, INDEX_PATH
from torus_actors.storage.store import BlockStore
from torus_actors.volume.change_log import read_record

RING_LAG_S = 60.0
"""A node knows a new ring after this time at the latest."""


OF_VOLUMES = (table.MINT, table.HEAD, table.EPOCH, table.JOURNAL, table.SNAPSHOT)
"""Keys that go with their volume."""


class Unreadable(Exception):
    """A page of a committed tree cannot be read from any node that is up."""


class Excess(NamedTuple):
    """A block that should not be where it is."""

    ref: BlockRef
    host: str
    why: str

    def __str__(self) -> str:
        return f"{BlockRef(self.ref)} on {self.host} {self.why}"


class Checker:
    """Looks at a cluster.

    Args:
        cluster: which.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.deletions = 0
        self.copies_min = 1
        """Durable copies of what a new head leads to."""
        self.copies_left_min = 1
        """Durable copies elsewhere when a node deletes one that is not its own."""
        self.nothing_rots = False
        """No fault damages what is on a disk: then no node starts with a bad copy of anything."""
        self._keys = Keys()
        self._epochs: dict[str, int] = {}
        self._holders: dict[tuple[str, int], str] = {}
        """Whose session each epoch of a lock is."""
        self._rewritten: dict[str, float] = {}
        """When an epoch was last written as it was before."""
        self._heads: dict[str, Head] = {}
        self._oldest_open: dict[str, int] = {}
        """The INode number that began with the last head that could be followed."""
        self._told: dict[tuple[int, int], int] = {}
        """Last record of each session whose blocks were looked at."""
        self._named: set[BlockRef] = set()
        """All that such heads have led to."""
        self._snapshots: dict[str, Head] = {}
        self._rings: list[tuple[float, rings.Ring]] = []
        """Since when; the last one is in force."""
        self._members: set[str] = set()
        self._pages: dict[BlockRef, bytes] = {}
        self._reachable: dict[BlockRef, int] | None = None
        self._changed_at = 0.0
        """When it was right for the last time."""
        self._safe: set[BlockRef] = set()
        """Blocks that were found durable when a head first led to them."""
        self._before: dict[BlockRef, int] = {}
        self._dead: dict[BlockRef, tuple[int, float]] = {}
        """Root of each block that was reachable once, and until when it was."""
        cluster.store.watchers.append(self._on_change)
        cluster.node_watchers.append(self._watch_node)
        cluster.flush_watchers.append(self._on_flush)

    # -- while it runs -----------------------------------------------------------------------------

    def _watch_node(self, host: Host) -> None:
        """Look at what a node that has just started has, and at what it deletes."""
        if self.nothing_rots and self.damaged(host):
            self.cluster.fail(f"{host.name} starts with an entry of a block that is not there")
        for store in host.tree.stores.stores:
            self._watch_store(host, store)

    def _watch_store(self, host: Host, store: Any) -> None:
        delete = store.delete

        def checked(refs: Iterable[BlockRef]) -> int:
            refs = list(refs)
            self._on_delete(host, refs)
            count: int = delete(refs)
            return count

        store.delete = checked

    def _on_delete(self, host: Host, refs: list[BlockRef]) -> None:
        self.deletions += len(refs)
        if not refs:
            return
        try:
            reachable = self.reachable()
        except Unreadable:
            return  # with so many nodes down nothing can be said
        now = self.cluster.loop.time()
        for ref in refs:
            root, died_at = reachable.get(ref), now
            if root is None:
                root, died_at = self._dead.get(ref, (None, 0.0))
            if root is None or now - died_at >= GRACE_S:
                continue
            # What a node has that is just being started cannot be told.
            others = [h for h in self.cluster.nodes if h is not host and not h.is_starting]
            unknown = len(self.cluster.nodes) - 1 - len(others)
            copies = sum(is_durable(other, ref, root) for other in others)
            if copies + unknown < self.copies_left_min:
                what = "alive" if died_at == now else f"dead for {now - died_at:.3f} s only"
                self.cluster.fail(
                    f"{host.name} deletes {ref}, which is {what}: {copies} good copies are left"
                )
            elif died_at == now and self._is_owner(host, ref):
                self.cluster.fail(f"{host.name} deletes its copy of {ref}, which is alive")
            elif died_at == now:
                names = [each.name for each in others if _good(each, ref, root)]
                if len(names) + unknown < self.cluster.shape.replication:
                    self.cluster.fail(f"{host.name} deletes {ref}, which is alive; {names} have it")

    def _is_owner(self, host: Host, ref: BlockRef) -> bool:
        """Whether a node owns a block by every ring that it may go by."""
        now = self.cluster.loop.time()
        copies = self.cluster.shape.replication
        ends = [since for since, _ in self._rings[1:]] + [now]
        return all(
            host.node_id in owners_of(ring, ref, copies)
            for (_, ring), end in zip(self._rings, ends, strict=True)
            if end > now - RING_LAG_S
        )

    def begin(self) -> None:
        """All nodes are up, and know the ring."""
        del self._rings[:-1]

    def _on_change(self, operation: Operation) -> None:
        row = None
        if isinstance(operation, (Put, Delete)):
            row = self._keys.row_of(operation.key)
        if isinstance(operation, DeletePrefix):
            self._roots_changed()
            gone = [key for key in self._snapshots if key.startswith(operation.prefix)]
            for key in gone:
                del self._snapshots[key]
        elif isinstance(operation, Delete):
            if row in (table.HEAD, table.SNAPSHOT):
                self._roots_changed()
                self._heads.pop(operation.key, None)
                self._snapshots.pop(operation.key, None)
        elif row is table.EPOCH:
            epoch = Epoch.decode(operation.value).epoch
            before = self._epochs.get(operation.key, -1)
            if epoch < before:
                self.cluster.fail(f"{operation.key} goes from {self._epochs} to {epoch}")
            if epoch == before:  # as when a lock is given up; but see `_on_lock`
                self._rewritten[operation.key] = self.cluster.loop.time()
            else:
                self._rewritten.pop(operation.key, None)
            self._epochs[operation.key] = epoch
        elif row is table.LOCK:
            self._on_lock(operation.key, Lock.decode(operation.value))
        elif row is table.HEAD:
            self._on_head(operation.key, Head.decode(operation.value))
        elif row is table.SNAPSHOT:
            snapshot = Snapshot.decode(operation.value)
            self._roots_changed()
            if snapshot.head:
                self._snapshots[operation.key] = Head.decode(snapshot.head)
        elif row is table.RING:
            self._on_ring(RingRecord.decode(operation.value))

    def _on_ring(self, record: RingRecord) -> None:
        cluster, ring = self.cluster, rings.unmarshal(record.data)
        version = ring.version
        if self._rings and version <= self._rings[-1][1].version:
            before = self._rings[-1][1].version
            cluster.fail(f"the ring goes from version {before} to {version}")
        self._rings.append((cluster.loop.time(), ring))
        members = set(ring.members)
        gone = self._members - members
        if gone - cluster.may_leave:
            cluster.fail(f"ring {version} has lost {sorted(gone)}, which nobody wanted out of it")
        if gone and len(members) < cluster.shape.replication:
            cluster.fail(f"ring {version} has only {len(members)} members")
        self._members = members

    def _on_lock(self, key: str, lock: Lock) -> None:
        epoch_key = self._keys.under(table.EPOCH) + key.removeprefix(self._keys.under(table.LOCK))
        newest = self._epochs.get(epoch_key)
        if self._rewritten.get(epoch_key) == self.cluster.loop.time():
            self.cluster.fail(f"{key}: a session begins in epoch {lock.epoch}, which was there")
        if lock.epoch != newest:
            self.cluster.fail(f"{key} is of epoch {lock.epoch}, the newest is {newest}")
        first = self._holders.setdefault((key, lock.epoch), lock.holder)
        if first != lock.holder:
            self.cluster.fail(f"{key}: epoch {lock.epoch} is of {first} and of {lock.holder}")

    def _on_head(self, key: str, head: Head) -> None:
        self._roots_changed()
        before = self._heads.get(key)
        if before is not None and head.epoch < before.epoch:
            self.cluster.fail(f"{key}: a head of epoch {head.epoch} after one of {before.epoch}")
        self._heads[key] = head
        oldest_open = self._oldest_open.get(key, 0)
        try:
            reachable = self.reachable()
        except Unreadable:
            return  # what this head leads to is looked at with the next one
        volume = int(key.removeprefix(self._keys.under(table.HEAD)), 16)
        # What a node has that is just being started cannot be told: it is looked at with the next.
        unknown = sum(host.is_starting for host in self.cluster.nodes)
        for ref, root in reachable.items():
            if ref.volume == volume and ref.inode < oldest_open and ref not in self._named:
                self.cluster.fail(f"{key} leads to {ref}, dead by head {oldest_open}")
                return
            if ref not in self._safe:
                copies = sum(is_durable(host, ref, root) for host in self.cluster.nodes)
                if copies + unknown < self.copies_min:
                    self.cluster.fail(f"{key} leads to {ref}: {copies} copies are durable")
                    return
                if copies >= self.copies_min:
                    self._safe.add(ref)
        self._named.update(reachable)
        self._oldest_open[key] = head.inode

    def _on_flush(self, client: Host, name: str) -> None:
        """Look whether all members that run have the last record that counts as stored."""
        session = client.tree.system.heirlooms["sessions"].get(name)
        if session is None or not session.journal.active:
            return
        seq, homes = session.journal.stored, session.journal.homes
        if len(homes) < self.cluster.shape.replication:
            self.cluster.fail(f"the journal of {name} has only {len(homes)} members")
        for host in self.cluster.nodes:
            home = homes.get(host.node_id) if host.up else None
            if home is None or host.tree.journal.store.identity != home.identity:
                continue
            if seq <= session.covered_seq:
                continue  # a head has all that it says
            if not _has_record(host, session.volume_id, session.epoch, seq):
                self.cluster.fail(f"{host.name} lacks record {seq} of {name} after a flush")
            self._check_told(host, session, name)

    def _check_told(self, host: Host, session: Any, name: str) -> None:
        """Look whether the blocks are durable that records name which came since the last flush.

        Args:
            host: a member that has them.
            session: whose journal it is.
            name: of its volume.
        """
        key, last = (session.volume_id, session.epoch), session.journal.stored
        first = max(session.covered_seq, self._told.get(key, 0)) + 1
        told: dict[int, tuple[BlockRef, int]] = {}
        try:
            for seq in range(first, last + 1):
                record = _record(host, *key, seq)
                if record is None:
                    return
                for index, ref, root, _ in read_record(record)[0]:
                    told.pop(index, None)
                    if ref is not None:
                        told[index] = ref, root
        except TorusError:
            return  # cut meanwhile, or damaged
        self._told[key] = last
        unknown = sum(each.is_starting for each in self.cluster.nodes)
        for ref, root in told.values():
            if ref in self._safe:
                continue
            copies = sum(is_durable(each, ref, root) for each in self.cluster.nodes)
            if copies + unknown < self.copies_min:
                self.cluster.fail(f"a flush of {name} told of {ref}: {copies} copies are durable")
                return
            if copies >= self.copies_min:
                self._safe.add(ref)

    # -- reachable blocks --------------------------------------------------------------------------

    def _roots_changed(self) -> None:
        if self._reachable is not None:
            self._reachable = None
            self._changed_at = self.cluster.loop.time()

    def reachable(self) -> dict[BlockRef, int]:
        """Every block that a head or a snapshot leads to, with its root checksum.

        Raises:
            Unreadable: a page is on no node that is up.
        """
        if self._reachable is None:
            found: dict[BlockRef, int] = {}
            for head in [*self._heads.values(), *self._snapshots.values()]:
                self._walk(head, found)
            self._reachable = found
            gone = {
                ref: (root, self._changed_at)
                for ref, root in self._before.items()
                if ref not in found
            }
            self._dead.update(gone)
            self._before = found
        return self._reachable

    def _walk(self, head: Head, found: dict[BlockRef, int]) -> None:
        blockset = unmarshal_blockset(head.extra)
        root = blockset.block_map.root
        if root.ref == ZERO_BLOCK:
            return
        found[root.ref] = root.crc
        walk = blockset.walk()
        try:
            step = next(walk)
            while True:
                if isinstance(step, PageVisit):
                    packed = step.packed
                    for at in range(0, len(packed), ENTRY_SIZE):
                        ref = BlockRef(packed[at : at + BLOCK_REF_SIZE])
                        crc = packed[at + BLOCK_REF_SIZE : at + ENTRY_SIZE]
                        found[ref] = int.from_bytes(crc, "little")
                    step = next(walk)
                else:
                    step = walk.send(self._page(step))
        except StopIteration:
            return

    def _page(self, need: PageNeeded) -> bytes:
        page = self._pages.get(need.ref)
        if page is not None:
            return page
        for host in self.cluster.nodes:
            if not host.up:
                continue
            try:
                page = _store_of(host, need.ref).get(need.ref)
            except (TorusError, OSError):
                continue
            self._pages[need.ref] = page
            return page
        raise Unreadable(f"page {need.ref}")

    # -- in the end --------------------------------------------------------------------------------

    async def lacking(self, deep: bool = True) -> list[str]:
        """Copies that are missing or bad: of every reachable block, on each of its owners."""
        ring = await self.cluster.ring()
        by_id = {host.node_id: host for host in self.cluster.nodes if host.up}
        try:
            reachable = self.reachable()
        except Unreadable as error:
            return [str(error)]
        lacking = []
        for ref, root in reachable.items():
            for owner in owners_of(ring, ref, self.cluster.shape.replication):
                host = by_id.get(owner)
                if host is None:
                    lacking.append(f"{ref} on {owner[:8]}, which is not up")
                elif problem := _problem(host, ref, root, deep):
                    lacking.append(f"{ref} on {host.name}: {problem}")
                elif deep and not is_durable(host, ref, root):
                    lacking.append(f"{ref} on {host.name}: it is not on the disk")
        return lacking

    def damaged(self, host: Host) -> bool:
        """Whether a copy of any block on a node is bad, also of one that no head leads to yet."""
        for store in host.tree.stores.stores:
            refs, _ = store.refs_from(0, 1 << 20)
            if any(_problem(host, ref, store.root_of(ref), True) for ref in map(BlockRef, refs)):
                return True
        return False

    async def garbage(self) -> list[Excess | str]:
        """Blocks that are stored and not reachable, or stored by a node that does not own them."""
        ring = await self.cluster.ring()
        try:
            reachable = self.reachable()
        except Unreadable as error:
            return [str(error)]
        found: list[Excess | str] = []
        replication = self.cluster.shape.replication
        for host in self.cluster.nodes:
            if not host.up:
                continue
            for store in host.tree.stores.stores:
                refs, _ = store.refs_from(0, 1 << 30)
                for ref in refs:
                    if ref not in reachable:
                        found.append(Excess(ref, host.name, "is garbage"))
                    elif host.node_id not in owners_of(ring, ref, replication):
                        found.append(Excess(ref, host.name, "is not its own"))
        return found

    async def leavings(self) -> list[str]:
        """What clients that are gone have left behind, other than blocks."""
        found = []
        items = (await self.cluster.store.range(""))[0]
        there = {each.key for each in items}
        for item in items:
            row = self._keys.row_of(item.key)
            if row in OF_VOLUMES and item.key != self._keys.before_global:
                volume = item.key.removeprefix(self._keys.under(row)).partition("/")[0]
                if self._keys.under(table.VOLUME) + volume not in there:
                    found.append(f"{item.key} is there, and its volume is not")
            if row in (table.LOCK, table.READER, table.SNAPSHOT_REQUEST):
                found.append(f"{item.key} is there, and nobody uses it")
            elif row is table.JOURNAL and Journal.decode(item.value).ensemble:
                found.append(f"{item.key} has members, and its volume was closed in order")
        for host in self.cluster.nodes:
            if not host.up:
                continue
            if records := host.tree.journal.store.stats().records:
                found.append(f"the journal of {host.name} keeps {records} records")
            for store in host.tree.stores.stores:
                stats = store.stats()
                for what in ("reserved", "limbo", "pending"):
                    if count := getattr(stats, what):
                        found.append(f"{count} slots on {host.name} are {what}")
        return found


def owners_of(ring: rings.Ring, ref: BlockRef, inode_replication: int) -> list[str]:
    """Who should hold a block."""
    owners = list(ring.owners(ref))
    if BlockRef(ref).block_type == BlockType.INODE and inode_replication > len(owners):
        return list(ring.permutation(ref)[:inode_replication])
    return owners


def _store_of(host: Host, ref: BlockRef) -> BlockStore:
    stores = host.tree.stores
    store: BlockStore = stores.stores[stores.kind_of(BlockRef(ref))]
    return store


def _stored(host: Host, ref: BlockRef) -> bool:
    """Whether a node has a block, or had it when it died."""
    return host.tree is not None and host.tree.stores is not None and _store_of(host, ref).has(ref)


def _good(host: Host, ref: BlockRef, root: int) -> bool:
    """Whether a node that runs has a copy, or one that does not had one when it died.

    No byte of it is read: the disk may be one that fails to, just now.
    """
    return not _problem(host, ref, root, False) if host.up else _stored(host, ref)


def is_durable(host: Host, ref: BlockRef, root: int) -> bool:
    """Whether a node has a good copy, up or down, that a power cut would leave it."""
    if not _stored(host, ref):
        return False
    store: Any = _store_of(host, ref)
    kind = "inodes" if ref.block_type == BlockType.INODE else "blocks"
    disk = host.disks.get(f"/{host.name}/{kind}")
    if disk is None:
        return False
    location = store.locate(ref)
    entry = disk.durable(
        INDEX_PATH, index.ENTRIES_OFFSET + location.slot * index.ENTRY_SIZE, len(ref)
    )
    layout = index.Layout(store.block_size)
    start = layout.slot_offset(location.slot)
    sums = disk.durable(DATA_PATH, start, sums_size(location.length))
    data = disk.durable(DATA_PATH, start + layout.sums_room, location.length)
    return entry == ref and root_of(sums) == root and sums_of(data) == sums


def _has_record(host: Host, volume: int, epoch: int, seq: int) -> bool:
    """Whether a journal has a record where a power cut leaves it, or needs it no more."""
    try:
        return _record(host, volume, epoch, seq) is not None
    except NotExist:
        return True  # cut
    except Corruption:
        return False


def _record(host: Host, volume: int, epoch: int, seq: int) -> bytes | None:
    """A record of a journal as a power cut leaves it; None if it is not there.

    Raises:
        NotExist, Corruption: as the journal says it.
    """
    journal = host.tree.journal.store
    _, step = journal.locate(volume, epoch, seq, 1)
    journal.release(step)
    if not step.items:
        return None
    _, _, stored, segment = step.items[0]
    disk = host.disks[f"/{host.name}/journal"]
    data: bytes = disk.durable(segment_name(segment.index), stored.offset, stored.length)
    return data if crc32c(data) == stored.crc else None


def _problem(host: Host, ref: BlockRef, root: int, deep: bool) -> str:
    store = _store_of(host, ref)
    try:
        if not store.has(ref):
            return "missing"
        if store.root_of(ref) != root:
            return "other content"
        if deep:
            store.get(ref)
    except (TorusError, OSError) as error:
        return str(error)
    return ""
