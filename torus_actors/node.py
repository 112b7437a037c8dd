"""A storage node.

Its supervision tree::

    node
    |-- bridge                 calls to and from other nodes
    |-- metadata               etcd, or the file that this node keeps for all
    `-- services
        |-- ring_watcher       what the cluster looks like
        |-- storage (rest for one)
        |   |-- disk_writer, disk_reader (two), disk_flusher
        |   |-- block_store
        |   |-- journal_disk
        |   `-- journal        records of volume sessions
        |-- replicator, inode_store, rebalancer, collector, scrubber
        |-- heartbeat          lease and registration
        |-- evictor            takes members out of the ring that are gone for too long
        |-- control            questions and orders from torusctl
        `-- volumes, nbd_server   with --nbd: volumes for NBD clients

How it starts is in `torus_actors.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from torus_actors import __version__
from torus_actors.actors.block_store import CONCURRENCY as BLOCK_STORE_CONCURRENCY
from torus_actors.actors.block_store import STORE_NAMES, BlockStoreActor, OpenStores, StoreConfig
from torus_actors.actors.collector import Collector
from torus_actors.actors.control import Control
from torus_actors.actors.disk import disk_workers
from torus_actors.actors.disk_watch import DiskWatch
from torus_actors.actors.evictor import REMOVE_AFTER_S, Evictor
from torus_actors.actors.heartbeat import LEASE_TTL_S, Heartbeat
from torus_actors.actors.journal import JournalActor, JournalDisk, OpenJournal
from torus_actors.actors.rebalancer import RATE_BYTES_S, Rebalancer
from torus_actors.actors.replicator import ReadLevel, WriteLevel
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.actors.scrubber import Scrubber
from torus_actors.errors import (
    Corruption,
    Exists,
    Invalid,
    TorusError,
)
from torus_actors.machine import REAL_MACHINE, Machine
from torus_actors.metadata.kv import KeyValueStore
from torus_actors.metadata.patience import patiently
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.ring_changes import join_ring
from torus_actors.model import rings
from torus_actors.model.addresses import check_free, format_address
from torus_actors.model.peers import Peer
from torus_actors.process import (
    ADMITTED_LOOK_S,
    ADMITTED_S_MAX,
    DEFAULT_METADATA,
    Addr,
    NbdConfig,
    Process,
    store_opener,
)
from torus_actors.runtime import ChildSpec, Strategy, SupervisorSpec
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.mfile_open import INDEX_PATH
from torus_actors.storage.scrub_place import ScrubPlace
from torus_actors.wire.hello import Role

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 512 << 10

DEFAULT_BLOCK_SPEC = "crc,base"

DEFAULT_ADDRESS = ("127.0.0.1", 40000)

METADATA_FILE = "metadata.sqlite"
"""In the data directory of the node that keeps the metadata."""

NODE_FILE = "node.json"
"""In the data directory: the node's id, and the cluster whose blocks are there."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A storage node.

    Attributes:
        data_dir: everything it keeps.
        size_bytes: how much disk to take; None keeps what an existing store has.
        listen: where peers and tools connect.
        advertise: where they are told to; None for the address listened on.
        metadata: URL. A ``torus://`` one that names this node's own address makes it keep the
            metadata for all.
        auto_join: enter the ring by itself.
        zone: failure domain.
        secret: of the cluster, at least 16 bytes, or None.
        http: where to serve metrics and health; None for nowhere.
        remove_after_s: members that are gone for so long leave the ring; None for never.
        rebalance_rate_bytes_s: bound of what it sends to other nodes when blocks move.
        machine: what it runs on.
    """

    data_dir: Path
    size_bytes: int | None = None
    listen: Addr = DEFAULT_ADDRESS
    advertise: Addr | None = None
    metadata: str = DEFAULT_METADATA
    auto_join: bool = False
    zone: str = ""
    secret: bytes | None = None
    nbd: NbdConfig | None = None
    http: Addr | None = None
    lease_ttl_s: int = LEASE_TTL_S
    remove_after_s: float | None = REMOVE_AFTER_S
    rebalance_rate_bytes_s: int = RATE_BYTES_S
    machine: Machine = REAL_MACHINE


def is_embedded(metadata: str, listen: Addr) -> bool:
    """Whether a metadata URL names the node that listens there."""
    return metadata.removesuffix("/") == f"torus://{format_address(listen)}"


class StorageNode(Process):
    """A running storage node; made by ``start_node``."""

    def __init__(self, config: NodeConfig, node_id: str, rng: random.Random) -> None:
        self.config = config
        own = (config.listen, config.advertise or config.listen)
        self.embedded = any(is_embedded(config.metadata, address) for address in own)
        self.stores: OpenStores | None = None
        self.journal: OpenJournal | None = None
        super().__init__(node_id, Role.NODE, config.metadata, config.secret, rng, config.machine)

    def peer_info(self) -> PeerInfo:
        """This node as the others see it."""
        assert self.stores is not None
        return PeerInfo(
            peer_id=self.system.node_id,
            address=format_address(self.config.advertise or self.config.listen),
            zone=self.config.zone,
            capacity_bytes=self.capacity_bytes,
            version=__version__,
            incarnation=self.stores.incarnation,
        )

    @property
    def capacity_bytes(self) -> int:
        """Room for data blocks: its weight in the ring."""
        assert self.stores is not None
        return sum(store.stats().total * store.block_size for store in self.stores.stores[:1])

    async def start(self) -> None:
        """Start everything."""
        config = self.config
        await self.start_base(config.listen, self._opener())
        if self.embedded:
            await self._init_if_fresh()
        view = await self.load_view(None)
        claim_data_dir(config.machine.open_disk(config.data_dir), view.gmd.cluster_id)
        stores = OpenStores.open(
            self.system,
            StoreConfig(
                config.data_dir, config.size_bytes, view.block_size, config.machine.open_disk
            ),
            self.system.rng,
        )
        self.stores = stores
        where = config.data_dir / "journal"
        try:
            journal = OpenJournal.open(
                self.system,
                config.machine.open_disk(where),
                self.system.rng,
                JournalLimits.of_node(config.size_bytes or stores.size_bytes),
            )
        except (Corruption, Invalid) as error:
            # Each node of a machine has files of these names.
            raise type(error)(f"in {where}: {error}") from error
        self.journal = journal
        watch = DiskWatch(self.system, stores, journal, config.machine.wall_clock)
        scrub_place = ScrubPlace.load(config.machine.open_disk(config.data_dir))
        self._check_addresses()
        if config.auto_join or (self.embedded and not view.ring.members):
            if self.system.node_id not in view.ring.members:
                await self.check_admitted(view, None)
                await self._check_address_is_ours(view)
            await self._join()
        storage = SupervisorSpec(
            "storage",
            (
                *disk_workers(stores.stores),
                ChildSpec(
                    "block_store",
                    lambda: BlockStoreActor(stores, view),
                    max_concurrency=BLOCK_STORE_CONCURRENCY,
                ),
                ChildSpec("journal_disk", JournalDisk),
                ChildSpec("journal", lambda: JournalActor(journal), max_concurrency=64),
            ),
            strategy=Strategy.ONE_FOR_ONE,
        )
        services = self.common_services(ReadLevel.BLOCK, WriteLevel.ALL, True)
        await self.start_services(
            [
                *services[:1],
                storage,
                *services[1:],
                ChildSpec("rebalancer", lambda: Rebalancer(view, config.rebalance_rate_bytes_s)),
                ChildSpec("collector", lambda: Collector(self.meta)),
                ChildSpec("scrubber", lambda: Scrubber(view.block_size, place=scrub_place)),
                ChildSpec(
                    "heartbeat",
                    lambda: Heartbeat(self.meta, self.peer_info, config.lease_ttl_s),
                    max_concurrency=64,
                ),
                ChildSpec("evictor", lambda: self._evictor(view)),
                ChildSpec("control", lambda: Control(view, "node", watch), max_concurrency=16),
                *self.nbd_services(config.nbd),
                *self._http_services(),
            ]
        )

    def _check_addresses(self) -> None:
        """See that nobody else serves where this node is to: it would join, and then end.

        Raises:
            Exists: somebody does, or this machine has no such address.
        """
        config = self.config
        wanted = [(config.http, "--http")]
        if config.nbd is not None:
            wanted += [(each.tcp, "--nbd") for each in config.nbd.listen]
        for address, option in wanted:
            if address is not None:
                check_free(address, option)

    async def _check_address_is_ours(self, view: ClusterView) -> None:
        """See that no other node answers where this one is to be reached.

        Raises:
            Exists: one does.
        """
        bridge, loop = self.system.actor("bridge"), self.system.loop
        own, end = self.peer_info().address, loop.time() + ADMITTED_S_MAX
        others = {each for each, address in view.addresses().items() if address == own}
        others.discard(self.system.node_id)
        # Of one that has lost its disk only the name is there, for a while: nobody answers to it.
        while others and loop.time() < end:
            for each in await bridge.peers.remote():
                if each["node"] in others and each["up"]:
                    raise Exists(
                        f"node {each['node'][:8]} answers at {own}: choose another address with "
                        "--advertise"
                    )
            await asyncio.sleep(ADMITTED_LOOK_S)

    def _http_services(self) -> list[ChildSpec | SupervisorSpec]:
        address = self.config.http
        if address is None:
            return []
        # Only here: most nodes need no web server.
        from torus_actors.actors.http import HttpServer

        return [ChildSpec("http", lambda: HttpServer(address))]

    def _opener(self) -> Callable[[], Awaitable[KeyValueStore]] | None:
        if self.embedded:
            from torus_actors.metadata.sqlite import SqliteStore

            path = self.config.data_dir / METADATA_FILE
            self._check_not_lost(path)
            return lambda: SqliteStore.open(path)
        return store_opener(self.metadata_url)

    def _check_not_lost(self, path: Path) -> None:
        """Refuse to keep the metadata of another cluster where the blocks of one are.

        Raises:
            Invalid: there are blocks, and the metadata that leads to them is not there.
        """
        owner = _read_node_file(self.config.machine.open_disk(self.config.data_dir)).get("cluster")
        if owner is not None and not (path.exists() and path.stat().st_size):
            raise Invalid(
                f"{path} with the metadata of cluster {owner[:8]}, whose blocks are beside it, is "
                "not there: put it back, or say with -C where the metadata is"
            )

    async def _init_if_fresh(self) -> None:
        """A node that keeps the metadata for itself needs no ``torusctl init``."""
        ring = rings.make_ring("ketama", version=1, replication=1, peers=())
        with contextlib.suppress(Exists):
            await self.meta.init(new_global_metadata(), rings.marshal(ring))
            log.info("new cluster, replication 1")

    async def _join(self) -> None:
        """Enter the ring, unless this node is in it."""
        assert self.view is not None
        rng = self.system.rng
        # However long the metadata is away: until now it was waited for as well.
        join = join_ring, self.meta, self._as_member(), rng
        self.view.ring = await patiently(*join, give_up_s=None, rng=rng)

    def _as_member(self) -> Peer:
        """This node as the ring has it."""
        info = self.peer_info()
        return Peer(info.peer_id, max(info.capacity_bytes, 1), info.zone, info.address)

    def _evictor(self, view: ClusterView) -> Evictor:
        config = self.config
        rejoin = self._as_member if config.auto_join else None
        return Evictor(self.meta, view, config.lease_ttl_s, config.remove_after_s, rejoin)

    async def stop(self) -> None:
        """Flush the block store and close everything."""
        store = self.system.cells.get("block_store")
        if self.stores is not None and store is not None and store.actor is not None:
            with contextlib.suppress(Exception):
                await self.system.actor("block_store").flush.remote(timeout_s=30.0)
        await super().stop()
        if self.journal is not None:
            with contextlib.suppress(OSError, TorusError):
                self.journal.close()
        if self.stores is not None:
            self.stores.close()


def new_global_metadata(
    block_size: int = DEFAULT_BLOCK_SIZE,
    block_spec: str = DEFAULT_BLOCK_SPEC,
    inode_replication: int = 1,
) -> GlobalMetadata:
    """Global metadata of a new cluster."""
    return GlobalMetadata(
        block_size=block_size,
        block_spec=block_spec,
        inode_replication=inode_replication,
        cluster_id=str(uuid.uuid4()),
        created=time.time(),
    )


def load_node_id(disk: Disk, rng: random.Random) -> str:
    """The id in a data directory, made on first use.

    Raises:
        Corruption: the file is damaged, or gone from beside blocks.
    """
    if disk.exists(NODE_FILE):
        return _read_node_file(disk)["id"]
    for name in STORE_NAMES:
        if disk.exists(f"{name}/{INDEX_PATH}"):
            # Whose they are, and of which cluster, only that file says.
            raise Corruption(
                f"the data directory has {name}, and no {NODE_FILE} that says whose they are: put "
                "it back, or move blocks, inodes and journal away to start empty"
            )
    node_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    _write_node_file(disk, {"id": node_id})
    return node_id


def claim_data_dir(disk: Disk, cluster_id: str) -> None:
    """Bind a data directory to its cluster.

    Block refs of two clusters look alike: blocks left from another one would stand in the way of
    new ones, or be taken for them.

    Raises:
        Invalid: it belongs to another cluster.
        Corruption: the file is damaged.
    """
    fields = _read_node_file(disk)
    owner = fields.get("cluster")
    if owner is None:
        _write_node_file(disk, {**fields, "cluster": cluster_id})
    elif owner != cluster_id:
        raise Invalid(
            f"the data directory has blocks of cluster {owner[:8]}, and this is cluster "
            f"{cluster_id[:8]}: give another --data-dir, or remove its blocks, inodes, journal "
            f"and {NODE_FILE} to start empty"
        )


def _read_node_file(disk: Disk) -> dict[str, str]:
    file = disk.open(NODE_FILE)
    try:
        fields: dict[str, str] = json.loads(file.pread(file.size(), 0))
        return {**fields, "id": str(uuid.UUID(fields["id"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise Corruption(
            f"{NODE_FILE} in the data directory is damaged ({error}): put it back, or move it away "
            "with blocks, inodes and journal to start empty"
        ) from error
    finally:
        file.close()


def _write_node_file(disk: Disk, fields: dict[str, str]) -> None:
    temporary = f"{NODE_FILE}.new"
    file = disk.open(temporary, create=True)
    try:
        file.truncate(0)
        file.pwrite(json.dumps(fields).encode(), 0)
        file.fdatasync()
    finally:
        file.close()
    disk.rename(temporary, NODE_FILE)
    disk.fsync_dir()


async def start_node(config: NodeConfig, rng: random.Random | None = None) -> StorageNode:
    """Start a storage node on the running loop.

    Raises:
        TorusError: it cannot start; nothing keeps running.
    """
    rng = rng or random.Random()
    disk = config.machine.open_disk(config.data_dir)
    lock = disk.lock()
    try:
        node = StorageNode(config, load_node_id(disk, rng), rng)
        node.system.heirlooms["disk_lock"] = lock
        try:
            await node.start()
        except BaseException:
            await node.stop()
            raise
    except BaseException:
        lock.release()
        raise
    return node
