"""Metadata of the cluster as a whole: global metadata, ring, peers."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torus_actors.errors import (
    BlockUnavailable,
    CompareFailed,
    Corruption,
    Exists,
    Fenced,
    NoGlobalMetadata,
    NonSequentialRing,
)
from torus_actors.metadata import base
from torus_actors.metadata import keys as table
from torus_actors.metadata.base import MetadataBase
from torus_actors.metadata.kv import Compare, Delete, DeletePrefix, KeyValue, Put
from torus_actors.metadata.records import (
    Counter,
    Epoch,
    GlobalMetadata,
    Head,
    Journal,
    Lock,
    PeerInfo,
    Reader,
    Record,
    RingRecord,
    Snapshot,
    VolumeRecord,
)
from torus_actors.metadata.watching import Follow

if TYPE_CHECKING:
    from pyroaring import BitMap64

FIRST_RING_VERSION = 1

BATCH = 256
"""Records decoded in one turn of the loop, which serves the blocks too: a few milliseconds."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Everything that says which blocks are alive, read at one revision; maps are by volume id.

    ``deleted`` are the ids of the volumes that have a marker.
    """

    revision: int
    volumes: dict[int, VolumeRecord]
    heads: dict[int, Head]
    epochs: dict[int, int]
    locks: dict[int, Lock]
    journals: dict[int, Journal]
    snapshots: list[Snapshot]
    readers: list[Reader]
    deleted: set[int]


@dataclass(frozen=True, slots=True)
class Registrations:
    """Who is registered, read at one revision.

    ``unread`` says by id what is wrong with a record that cannot be read, of another version for
    one: that node may be up as well, and counts neither as gone nor as there. ``revisions`` are
    those of all records.
    """

    peers: list[PeerInfo]
    unread: dict[str, str]
    revisions: dict[str, int]


class ClusterOperations(MetadataBase):
    """Global metadata, ring and peers."""

    @functools.cached_property
    def _markers_read(self) -> BitMap64:
        """Deleted volumes whose markers have been read: they never change, and are ever more."""
        from pyroaring import BitMap64  # commands need not load it

        return BitMap64()

    @functools.cached_property
    def _deleted(self) -> str:
        return self.keys.under(table.DELETED)

    async def init(self, metadata: GlobalMetadata, ring: bytes) -> None:
        """Make the cluster: its global metadata, and its first ring at version 1.

        Args:
            metadata: with a fresh cluster id; ``created`` is filled in if it is 0.
            ring: opaque.

        Raises:
            Exists: it was made before.
        """
        if metadata.created == 0.0:
            metadata = dataclasses.replace(metadata, created=self._now())
        then = [
            Put(self.keys.global_, metadata.encode()),
            Put(self.keys.ring, RingRecord(FIRST_RING_VERSION, ring).encode()),
            Put(self.keys.volume_counter, Counter(0).encode()),
        ]

        async def mine() -> int | None:
            stored, revision = await self._read(self.keys.global_, GlobalMetadata)
            return revision if stored == metadata else None

        attempts = self._attempts("make the cluster")
        while await self.store.get(self.keys.global_) is None:
            await attempts.next()
            compare = [
                Compare(self.keys.global_, mod_revision=0),
                Compare(self.keys.before_global, mod_revision=await self._before_global()),
            ]
            if await self._settle(compare, then, mine) is not None:
                return
        if await mine() is None:
            raise Exists("the cluster is initialised already")

    async def _before_global(self) -> int:
        """The revision of the key that a cluster has all its life, and that is made before it.

        Without it a copy of the request for a cluster that arrives when that one has been wiped
        would make it again: with the same id, and no volumes, so that its nodes, which still have
        blocks of those, would take new ones with the same refs.
        """
        key = self.keys.before_global

        async def mine() -> int | None:
            return (await self._read(key, Counter))[1] or None

        while (revision := await mine()) is None:
            put = Put(key, Counter(0).encode())
            await self._settle([Compare(key, mod_revision=0)], [put], mine)
        return revision

    async def wipe(self) -> None:
        """Remove everything of this cluster; fine if there is nothing (torus#267)."""
        attempts = self._attempts("wipe the metadata")
        begun, wanted = False, None
        while True:
            await attempts.next()
            found = await self.store.get(self.keys.global_)
            revision = 0 if found is None else found.mod_revision
            value = None if found is None else found.value
            if begun and value not in (None, wanted):
                return  # that one is gone, and another was made in its place
            begun, wanted = True, value

            async def gone() -> int | None:
                items, now = await self.store.range(self.keys.prefix, limit=1)
                return None if items else now

            # The compare keeps a wipe that was delayed on its way from hitting a later cluster.
            compare = [Compare(self.keys.global_, mod_revision=revision)]
            if await self._settle(compare, [DeletePrefix(self.keys.prefix)], gone) is not None:
                return

    async def global_metadata(self) -> GlobalMetadata:
        """What holds for the whole cluster.

        Raises:
            NoGlobalMetadata: `init` was never called.
        """
        found, _ = await self._read(self.keys.global_, GlobalMetadata)
        if found is None:
            raise NoGlobalMetadata("the cluster is not initialised: run torusctl init")
        return found

    async def ring(self) -> tuple[bytes, int]:
        """The ring and its version.

        Raises:
            NoGlobalMetadata: `init` was never called.
        """
        stored, _ = await self._ring()
        return stored.data, stored.version

    async def ring_revision(self, version: int) -> int:
        """The revision of the ring's record.

        Args:
            version: of the ring that the caller knows.

        Raises:
            BlockUnavailable: the ring has another version by now.
            NoGlobalMetadata: `init` was never called.
        """
        stored, revision = await self._ring()
        if stored.version != version:
            raise BlockUnavailable(f"the ring has version {stored.version}, and not {version}")
        return revision

    async def set_ring(
        self,
        data: bytes,
        version: int,
        *,
        absent: Sequence[str] = (),
        witnesses: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Replace the ring by its successor.

        Args:
            data: opaque.
            version: one more than the version that it was made from.
            absent: peers that must not be registered in the moment of the change.
            witnesses: peers that must be, by the record of a revision.

        Raises:
            NonSequentialRing: the stored version is further behind.
            CompareFailed: somebody else changed the ring first, or one of those is registered, or
                not.
        """
        new = RingRecord(version, data)
        stored, revision = await self._ring()
        if version > stored.version + 1:
            raise NonSequentialRing(f"ring {version} does not follow {stored.version}")
        raced = CompareFailed(f"ring {version} came too late: others, or a peer, were faster")
        if version <= stored.version:
            raise raced

        async def mine() -> int | None:
            now, at = await self._read(self.keys.ring, RingRecord)
            return at if now == new else None

        compare = [Compare(self.keys.ring, mod_revision=revision)]
        registered = [*((each, 0) for each in absent), *witnesses]
        compare += [Compare(self.keys.peer(each), mod_revision=at) for each, at in registered]
        if await self._settle(compare, [Put(self.keys.ring, new.encode())], mine) is None:
            raise raced

    def ring_watch(self) -> AsyncIterator[tuple[bytes, int]]:
        """The ring and its version: at present, then after every change; nothing while wiped."""

        def view(found: list[RingRecord]) -> tuple[bytes, int] | None:
            return (found[0].data, found[0].version) if found else None

        key = self.keys.ring
        return Follow(self.watch(key), RingRecord, view, key=key)

    async def register_peer(self, info: PeerInfo, lease: int) -> None:
        """Say that a storage node is up, for as long as the lease lives.

        May be repeated under the same or another lease: above all after one was lost (torus#132).

        Raises:
            Exists: a later incarnation of the node is registered, or one of a copy of its data:
                this process must not serve.
            Corruption: some process keeps a record of the node that cannot be read here.
            LeaseNotFound: the lease has ended.
        """
        key = self.keys.peer(info.peer_id)
        attempts = self._attempts("register the peer")
        while True:
            await attempts.next()
            found = await self.store.get(key)
            revision = 0 if found is None else found.mod_revision
            stored = None
            if found is not None:
                try:
                    stored = PeerInfo.decode(found.value, key)
                except Corruption:
                    if found.lease not in (0, lease):
                        raise
                    # It is what became of our own, or no process has written it: then none would
                    # ever take it away.
            if stored is not None and _is_another(stored, info):
                raise Exists(
                    f"peer {info.peer_id} runs already, started later, at {stored.address}: "
                    "two nodes must not share a data directory, or have copies of one"
                )

            async def mine() -> int | None:
                now = await self.store.get(key)
                same = now is not None and (now.value, now.lease) == (info.encode(), lease)
                return now.mod_revision if now is not None and same else None

            put = Put(key, info.encode(), lease)
            if await self._settle([Compare(key, mod_revision=revision)], [put], mine) is not None:
                return

    async def unregister_peer(self, peer_id: str) -> None:
        """Say that a storage node leaves in good order; fine if it is not registered."""
        await self.store.txn([], [Delete(self.keys.peer(peer_id))])

    async def forget_peer(self, peer_id: str, revision: int) -> None:
        """Remove a registration that cannot be read, if it still is the one of that revision.

        Its node, if it runs, registers anew.
        """
        key = self.keys.peer(peer_id)
        await self.store.txn([Compare(key, mod_revision=revision)], [Delete(key)])

    async def peers(self) -> list[PeerInfo]:
        """Storage nodes that are up, by id, of which the records can be read."""
        return (await self.registrations()).peers

    async def registrations(self) -> Registrations:
        """The same, and which records cannot be read."""
        under = self.keys.under(table.PEER)
        found, _ = await self.store.range(under)
        seen = Registrations([], {}, {})
        for item in found:
            peer_id = item.key.removeprefix(under)
            seen.revisions[peer_id] = item.mod_revision
            try:
                info = PeerInfo.decode(item.value, item.key)
                if info.peer_id != peer_id:
                    raise Corruption(f"{item.key}: stored PeerInfo is of {info.peer_id}")
                seen.peers.append(info)
            except Corruption as error:
                seen.unread[peer_id] = str(error)
        return seen

    def peers_watch(self) -> AsyncIterator[list[PeerInfo]]:
        """Storage nodes that are up, by id: at present, then after every change.

        One whose record cannot be read any more stays as it was.
        """
        return Follow(self.watch(self.keys.under(table.PEER)), PeerInfo, list)

    async def state(self) -> ClusterState:
        """All that refers to blocks, as of one revision: what a collector's pass starts from.

        But for the markers of deleted volumes, some of which may be missing.

        Raises:
            Corruption: any record cannot be read; nothing is left out.
            Fenced: the cluster was wiped, or it is another one's.
        """
        items, revision = await self._everything()
        stored = next((item.value for item in items if item.key == self.keys.global_), None)
        if not self._is_ours(stored):
            raise Fenced("this is not the metadata of the cluster to which this process belongs")
        state = ClusterState(revision, {}, {}, {}, {}, {}, [], [], set())
        for number, item in enumerate(items, 1):
            if number % BATCH == 0:
                await asyncio.sleep(0)
            known = self._known_marker(item.key)
            if known is not None:
                state.deleted.add(known)
                continue
            row = self.keys.row_of(item.key)
            if row is None:
                raise Corruption(f"unknown metadata key {item.key}")
            record = row.record.decode(item.value, item.key)
            volume_id = item.key.removeprefix(self.keys.under(row)).partition("/")[0]
            match record:
                case Head():
                    state.heads[int(volume_id, 16)] = record
                case Epoch():
                    state.epochs[int(volume_id, 16)] = record.epoch
                case Lock():
                    state.locks[int(volume_id, 16)] = record
                case Journal():
                    state.journals[int(volume_id, 16)] = record
                case Snapshot():
                    state.snapshots.append(record)
                case Reader():
                    state.readers.append(record)
                case VolumeRecord() if row is table.VOLUME:
                    state.volumes[record.id] = record
                case VolumeRecord():
                    state.deleted.add(record.id)
                    if record.id == int(volume_id, 16):
                        self._markers_read.add(record.id)
        return state

    def _known_marker(self, key: str) -> int | None:
        """The volume of which that is the marker, if it has been read before."""
        if not key.startswith(self._deleted):
            return None
        digits = key[len(self._deleted) :]
        try:
            volume = int(digits, 16)
        except ValueError:
            return None
        return volume if f"{volume:010x}" == digits and volume in self._markers_read else None

    async def _everything(self) -> tuple[list[KeyValue], int]:
        """Every key, and the revision at which that is so.

        The markers of deleted volumes come first, and in pages: they are ever more. So they are of
        some earlier moment, which is safe, since none of them goes: a volume whose marker came
        after that is one of which nothing is collected yet.
        """
        items: list[KeyValue] = []
        after, limit = "", base.PAGE_KEYS
        while True:
            page, revision = await self.store.range(self.keys.prefix, after=after, limit=limit)
            if not limit or len(page) < limit:
                return items + page, revision
            markers = [item for item in page if item.key < self.keys.behind_deleted]
            items += markers
            after = markers[-1].key if markers else after
            if len(markers) < len(page):
                limit = 0  # all the rest, at one revision

    async def dump(self) -> list[tuple[str, Record | bytes]]:
        """Every key and its record, for a person; what cannot be read is given as it is."""
        items = await self._in_pages(self.keys.prefix)
        return [(item.key, self._decoded(item.key, item.value)) for item in items]

    def _decoded(self, key: str, value: bytes) -> Record | bytes:
        row = self.keys.row_of(key)
        if row is None:
            return value
        try:
            return row.record.decode(value)
        except Corruption:
            return value

    async def _ring(self) -> tuple[RingRecord, int]:
        stored, revision = await self._read(self.keys.ring, RingRecord)
        if stored is None:
            raise NoGlobalMetadata("the cluster is not initialised: run torusctl init")
        return stored, revision


def _is_another(stored: PeerInfo, info: PeerInfo) -> bool:
    """Whether the process that is registered is not this one, nor one before it.

    Each start of a node on its data has a higher incarnation than the one before. Two that have
    copies of the same data have the same one.
    """
    if stored.incarnation == info.incarnation:
        return stored.address != info.address
    return stored.incarnation > info.incarnation
