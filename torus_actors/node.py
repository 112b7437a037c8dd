"""The supervision trees: of a storage node, and of a client.

A tree starts in two steps. First what needs no cluster: bridge and metadata. Then, once the
cluster's metadata and ring are known (a node may be started before ``torusctl init``), the
services.

Storage node::

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

A client is the same without what concerns stored blocks. One that serves a volume over AoE has an
aoe_server in the place of the nbd_server.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from torus_actors import __version__
from torus_actors.actors.aoe_server import NAME as AOE_SERVER
from torus_actors.actors.aoe_server import AoeServer
from torus_actors.actors.block_store import STORE_NAMES, BlockStoreActor, OpenStores, StoreConfig
from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.actors.collector import Collector
from torus_actors.actors.control import Control
from torus_actors.actors.disk import disk_workers
from torus_actors.actors.disk_watch import DiskWatch
from torus_actors.actors.evictor import REMOVE_AFTER_S, Evictor
from torus_actors.actors.heartbeat import LEASE_TTL_S, Heartbeat
from torus_actors.actors.inode_store import INodeStore
from torus_actors.actors.journal import JournalActor, JournalDisk, OpenJournal
from torus_actors.actors.metadata import CONCURRENCY, ActorStore, MetadataActor
from torus_actors.actors.nbd_server import NbdAddress, NbdServer
from torus_actors.actors.rebalancer import RATE_BYTES_S, Rebalancer
from torus_actors.actors.replicator import CONCURRENCY as REPLICATOR_CONCURRENCY
from torus_actors.actors.replicator import ReadLevel, Replicator, WriteLevel
from torus_actors.actors.ring_watcher import ClusterView, RingWatcher
from torus_actors.actors.scrubber import Scrubber
from torus_actors.actors.volumes import CONCURRENCY as VOLUMES_CONCURRENCY
from torus_actors.actors.volumes import Volumes
from torus_actors.aoe.port import Port
from torus_actors.errors import (
    Again,
    Corruption,
    Exists,
    Invalid,
    NoGlobalMetadata,
    TorusError,
    Unauthenticated,
)
from torus_actors.machine import REAL_MACHINE, Machine
from torus_actors.metadata import opening
from torus_actors.metadata.kv import KeyValueStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.patience import Backoff, patiently, refusal
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.ring_changes import join_ring
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.nbd.connection import TlsSettings
from torus_actors.runtime import ActorSystem, ChildSpec, Strategy, SupervisorSpec
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.mfile_open import INDEX_PATH
from torus_actors.storage.scrub_place import ScrubPlace
from torus_actors.volume.session import CacheSizes
from torus_actors.wire.hello import Identity, Role

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 512 << 10
DEFAULT_BLOCK_SPEC = "crc,base"
DEFAULT_ADDRESS = ("127.0.0.1", 40000)
DEFAULT_METADATA = "torus://127.0.0.1:40000"

LEASE_RETURN_S = 1.0
"""A lease that cannot be given back by then ends by itself."""

METADATA_STOP_S = 0.5
"""Transactions are done long before; what takes longer is watchers waiting for news."""

METADATA_CLOSE_S = 10.0
"""A disk may stall under the last transaction. What is then not closed is let go of by the end of
the process, and loses nothing."""

METADATA_FILE = "metadata.sqlite"
"""In the data directory of the node that keeps the metadata."""

NODE_FILE = "node.json"
"""In the data directory: the node's id, and the cluster whose blocks are there."""

QUIET_WAIT_S = 3.0
"""Nodes of a cluster are started together: one that waits no longer than this need not say so."""

ADMITTED_S_MAX = 1.0
"""How long a client waits to learn whether nodes let it in; one that answers is enough."""

ADMITTED_LOOK_S = 0.01

STOP_S_MAX = 120.0
"""For all services together: a volume's last flush may take a minute when a peer is down."""

Addr = tuple[str, int]


@dataclass(frozen=True, slots=True)
class NbdConfig:
    """Serving volumes over NBD.

    Attributes:
        listen: addresses.
        only: serve just this volume, also as the default export.
        default: what the default export is where every volume is served.
        caches: bounds of memory.
    """

    listen: tuple[NbdAddress, ...]
    only: str | None = None
    default: str | None = None
    read_only: bool = False
    caches: CacheSizes = field(default_factory=CacheSizes)
    tls: TlsSettings | None = None


@dataclass(frozen=True, slots=True)
class AoeConfig:
    """Serving one volume over AoE.

    Attributes:
        port: the interface; open.
        major: shelf.
        minor: slot.
        volume: what to serve, or ``VOLUME@SNAPSHOT``.
        read_only: open it without a lock, and refuse writes.
        accept: hardware addresses that may use it; empty for all.
        caches: bounds of memory.
    """

    port: Port
    major: int
    minor: int
    volume: str
    read_only: bool = False
    accept: frozenset[bytes] = frozenset()
    caches: CacheSizes = field(default_factory=CacheSizes)


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


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """A process that uses the cluster and stores nothing.

    Attributes:
        metadata: URL.
        listen: where ``torusctl`` may ask it; None for nowhere.
        machine: what it runs on.
    """

    metadata: str = DEFAULT_METADATA
    secret: bytes | None = None
    nbd: NbdConfig | None = None
    aoe: AoeConfig | None = None
    listen: Addr | None = None
    read_level: ReadLevel = ReadLevel.BLOCK
    write_level: WriteLevel = WriteLevel.ALL
    lease_ttl_s: int = LEASE_TTL_S
    machine: Machine = REAL_MACHINE


def is_embedded(metadata: str, listen: Addr) -> bool:
    """Whether a metadata URL names the node that listens there."""
    host, port = listen
    host = f"[{host}]" if ":" in host else host
    return metadata in (f"torus://{host}:{port}", f"torus://{host}:{port}/")


class Process:
    """A running tree, of a node or a client.

    Args:
        node_id: of this process; a fresh one for a client.
        metadata: URL.
        rng: all randomness.
        machine: what it runs on.
    """

    def __init__(
        self,
        node_id: str,
        role: Role,
        metadata: str,
        secret: bytes | None,
        rng: random.Random,
        machine: Machine = REAL_MACHINE,
    ) -> None:
        self.system = ActorSystem(
            asyncio.get_running_loop(),
            node_id=node_id,
            rng=rng,
            blocking_delay_s=machine.blocking_delay_s,
        )
        self.machine = machine
        self.role = role
        self.metadata_url = metadata
        self.secret = secret
        self.incarnation = rng.getrandbits(63)
        self.view: ClusterView | None = None
        self.meta = MetadataService(self._store(), rng=rng, wall_clock=machine.wall_clock)
        self._opened: KeyValueStore | None = None
        """The metadata that is kept, or reached, here: what the metadata actors serve in turn."""

    def _store(self) -> KeyValueStore:
        """The metadata actor of this process, or of the node that the URL names."""
        if self.metadata_url.startswith("torus://") and not self.embedded:
            rest = self.metadata_url.removeprefix("torus://").removesuffix("/")
            if len(opening.endpoints_of(rest)) != 1:
                raise Invalid(f"{self.metadata_url!r} must name one node")
            return ActorStore(self.system.actor("metadata", node=f"@{rest}"))
        return ActorStore(self.system.actor("metadata"))

    embedded = False

    async def start_base(
        self, listen: Addr | None, open_store: Callable[[], Awaitable[KeyValueStore]] | None
    ) -> None:
        """Start bridge and metadata."""
        identity = Identity(
            None, self.system.node_id, self.role, self.incarnation, f"torus-actors/{__version__}"
        )
        machine = self.machine
        bridge = BridgeConfig(identity, listen, self.secret, machine.spin_s, machine.shortcut)
        children = [ChildSpec("bridge", lambda: Bridge(bridge))]
        if open_store is not None:
            self._opened = opened = await open_store()
            children.append(
                ChildSpec(
                    "metadata",
                    lambda: MetadataActor(opened),
                    max_concurrency=CONCURRENCY,
                    shutdown_s=METADATA_STOP_S,
                )
            )
        await self.system.start(
            SupervisorSpec("node", tuple(children), shutdown_s=STOP_S_MAX + 10.0)
        )

    async def load_view(self, patience_s: float | None) -> ClusterView:
        """Read global metadata and ring.

        Args:
            patience_s: how long to wait for the metadata to be reachable and the cluster to be
                initialised; None for as long as it takes.

        Raises:
            Again: not reachable in time.
            NoGlobalMetadata: not initialised in time.
            Unauthenticated, ProtocolError: it is not for this process, or something else.
        """
        loop = self.system.loop
        began = loop.time()
        end = None if patience_s is None else began + patience_s
        backoff = Backoff(self.system.rng, first_s=0.05, max_s=0.5)
        told = ""
        while True:
            try:
                gmd = await self.meta.bind()
                data, _ = await self.meta.ring()
                break
            except (Again, NoGlobalMetadata) as error:
                refused = refusal(error, self.metadata_url)
                if refused is not None:
                    raise refused from error
                if end is not None and not await backoff.wait(end):
                    raise
                if end is None:
                    if str(error) != told and loop.time() - began > QUIET_WAIT_S:
                        told = str(error)
                        log.warning("waiting: %s", error)
                    await backoff.wait()
        self.view = ClusterView(gmd, rings.unmarshal(data))
        await self.system.actor("bridge").set_cluster.remote(gmd.cluster_id)
        return self.view

    async def start_services(self, children: list[ChildSpec | SupervisorSpec]) -> None:
        """Start what needs the cluster."""
        spec = SupervisorSpec("services", tuple(children), shutdown_s=STOP_S_MAX)
        await self.system.actor("node").start_child.remote(spec, timeout_s=120.0)

    def common_services(
        self, read_level: ReadLevel, write_level: WriteLevel, has_store: bool
    ) -> list[ChildSpec | SupervisorSpec]:
        """Services of nodes and clients alike."""
        view = self.view
        assert view is not None
        return [
            ChildSpec("ring_watcher", lambda: RingWatcher(self.meta, view)),
            ChildSpec(
                "replicator",
                lambda: Replicator(
                    view, has_store=has_store, read_level=read_level, write_level=write_level
                ),
                max_concurrency=REPLICATOR_CONCURRENCY,
            ),
            ChildSpec("inode_store", INodeStore, max_concurrency=64),
        ]

    def nbd_services(self, nbd: NbdConfig | None) -> list[ChildSpec | SupervisorSpec]:
        """Services for NBD clients."""
        if nbd is None:
            return []
        return [
            self._volumes_service(
                nbd.caches, only=nbd.only, default=nbd.default, read_only=nbd.read_only
            ),
            ChildSpec(
                "nbd_server",
                lambda: NbdServer(nbd.listen, nbd.tls, self.machine.spin_s),
                # The kernel reads a device, and has to be answered, before it is attached.
                max_concurrency=16,
                shutdown_s=20.0,
            ),
        ]

    def aoe_services(self, aoe: AoeConfig | None) -> list[ChildSpec | SupervisorSpec]:
        """Services for AoE initiators."""
        view = self.view
        assert view is not None
        if aoe is None:
            return []
        cluster_id = view.gmd.cluster_id
        return [
            self._volumes_service(
                aoe.caches, only=aoe.volume, read_only=aoe.read_only, answers_to=AOE_SERVER
            ),
            ChildSpec(
                AOE_SERVER,
                lambda: AoeServer(aoe.port, aoe.major, aoe.minor, cluster_id, aoe.accept),
                shutdown_s=20.0,
            ),
        ]

    def _volumes_service(self, caches: CacheSizes, **options: Any) -> ChildSpec:
        """The actor that opens volumes; options are those of ``Volumes``."""
        view = self.view
        assert view is not None
        return ChildSpec(
            "volumes",
            lambda: Volumes(self.meta, view, caches, holder=self.machine.process_name(), **options),
            max_concurrency=VOLUMES_CONCURRENCY,
            shutdown_s=90.0,
        )

    async def stop(self) -> None:
        """Stop the tree and give the lease back."""
        services = self.system.cells.get("services")
        if services is not None:
            await services.stop(final=True)
        # In between: volumes are closed under the lease, and a bridge is needed to give it back.
        lease = self.system.heirlooms.pop("lease", 0)
        if lease:
            with contextlib.suppress(TorusError, TimeoutError):
                async with asyncio.timeout(LEASE_RETURN_S):
                    await self.meta.revoke_lease(lease)
        await self.system.stop()
        opened, self._opened = self._opened, None
        if opened is not None:
            try:
                async with asyncio.timeout(METADATA_CLOSE_S):
                    await opened.close()
            except (TorusError, TimeoutError) as error:
                log.warning("closing the metadata: %s", str(error) or "its disk does not answer")


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
        host, port = self.config.advertise or self.config.listen
        return PeerInfo(
            peer_id=self.system.node_id,
            address=f"{host}:{port}",
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
        if config.auto_join or (self.embedded and not view.ring.members):
            await self._join()
        storage = SupervisorSpec(
            "storage",
            (
                *disk_workers(stores.stores),
                ChildSpec(
                    "block_store", lambda: BlockStoreActor(stores, view), max_concurrency=256
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


class Client(Process):
    """A running client; made by ``start_client``."""

    def __init__(self, config: ClientConfig, rng: random.Random) -> None:
        self.config = config
        node_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        super().__init__(node_id, Role.CLIENT, config.metadata, config.secret, rng, config.machine)

    async def start(self, patience_s: float = 5.0) -> None:
        """Start what a client needs.

        Raises:
            Again, NoGlobalMetadata: no cluster there in time.
            Unauthenticated: its nodes do not let this process in.
        """
        config = self.config
        await self.start_base(config.listen, store_opener(config.metadata))
        view = await self.load_view(patience_s)
        await self._check_admitted(view, patience_s)
        await self.start_services(
            [
                *self.common_services(config.read_level, config.write_level, False),
                ChildSpec(
                    "heartbeat",
                    lambda: Heartbeat(self.meta, None, config.lease_ttl_s),
                    max_concurrency=64,
                ),
                ChildSpec("control", lambda: Control(view, "client"), max_concurrency=16),
                *self.nbd_services(config.nbd),
                *self.aoe_services(config.aoe),
            ]
        )

    async def _check_admitted(self, view: ClusterView, patience_s: float) -> None:
        """See that the nodes let this process in, or say nothing of it, before it takes locks.

        One that is connected is enough. Else it counts what most of them say: one that refuses may
        be the one with the wrong secret, and those that are down may be on their way up.
        """
        bridge, loop = self.system.actor("bridge"), self.system.loop
        # A node need not be where it was when it entered the ring, and another cluster's may be.
        with contextlib.suppress(Corruption):  # which the ring watcher tells
            found = await patiently(self.meta.peers, give_up_s=patience_s, rng=self.system.rng)
            view.peers = {info.peer_id: info for info in found}
        await bridge.set_peers.remote(view.addresses())
        refusals: list[str] = []
        others = 0
        end = loop.time() + ADMITTED_S_MAX
        while view.ring.members and loop.time() < end:
            peers = await bridge.peers.remote()
            if any(peer["up"] for peer in peers):
                return
            refusals = [peer["reason"] for peer in peers if peer["refused"]]
            others = len(peers) - len(refusals)
            if not others or not (refusals or any(not peer["reason"] for peer in peers)):
                break  # all of them refuse, or all of them are down
            await asyncio.sleep(ADMITTED_LOOK_S)
        if refusals and len(refusals) >= others:
            raise Unauthenticated(
                f"no node talks to this process: {refusals[0]}; give the --secret-file of the nodes"
            )


def store_opener(url: str) -> Callable[[], Awaitable[KeyValueStore]] | None:
    """What opens the metadata backend in this process; None where another node has it.

    Raises:
        Invalid: not a metadata URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "torus":
        return None
    if scheme == "memory":

        async def memory() -> KeyValueStore:
            return MemoryStore()

        return memory
    if scheme == "etcd":
        endpoints = opening.endpoints_of(rest.removesuffix("/"))

        async def etcd() -> KeyValueStore:
            from torus_actors.metadata.etcd import EtcdStore

            return EtcdStore(endpoints)

        return etcd
    raise Invalid(f"{url!r} is no metadata URL: {opening.USAGE}")


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


async def start_client(
    config: ClientConfig, rng: random.Random | None = None, patience_s: float = 5.0
) -> Client:
    """Start a client on the running loop.

    Args:
        config: what it shall do.
        rng: all its randomness.
        patience_s: how long to wait for metadata that does not answer.

    Raises:
        TorusError: it cannot start; nothing keeps running.
    """
    client = Client(config, rng or random.Random())
    try:
        await client.start(patience_s)
    except BaseException:
        await client.stop()
        raise
    return client


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check_exposure(
    listen: Addr,
    secured: bool,
    insecure: bool,
    lacking: str = "a cluster secret: give --secret-file",
) -> None:
    """Refuse to listen to strangers without knowing who they are.

    Args:
        listen: where.
        secured: whether what protects this address is there.
        insecure: whether that was said not to matter.
        lacking: what protects it, and how to give it.

    Raises:
        Invalid: the address is not a loopback one, and nothing protects it.
    """
    host = listen[0]
    if not is_loopback(host) and not secured and not insecure:
        raise Invalid(
            f"refusing to listen on {host} without {lacking}, "
            "or --insecure if the network is trusted"
        )
