"""What nodes and clients have in common: bridge, metadata, the view of the cluster, services.

A tree starts in two steps. First what needs no cluster: bridge and metadata. Then, once the
cluster's metadata and ring are known (a node may be started before ``torusctl init``), the
services.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

from torus_actors import __version__
from torus_actors.actors.aoe_server import NAME as AOE_SERVER
from torus_actors.actors.aoe_server import AoeServer
from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.actors.inode_store import INodeStore
from torus_actors.actors.metadata import CONCURRENCY, ActorStore, MetadataActor
from torus_actors.actors.nbd_server import NbdAddress, NbdServer
from torus_actors.actors.replicator import CONCURRENCY as REPLICATOR_CONCURRENCY
from torus_actors.actors.replicator import ReadLevel, Replicator, WriteLevel
from torus_actors.actors.ring_watcher import ClusterView, RingWatcher
from torus_actors.actors.volumes import CONCURRENCY as VOLUMES_CONCURRENCY
from torus_actors.actors.volumes import NOT_CLOSED, Volumes
from torus_actors.aoe.port import Port
from torus_actors.errors import (
    Again,
    Invalid,
    NoGlobalMetadata,
    TorusError,
)
from torus_actors.machine import REAL_MACHINE, Machine
from torus_actors.metadata import opening
from torus_actors.metadata.kv import KeyValueStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.patience import Backoff, patiently, refusal
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.nbd.connection import TlsSettings
from torus_actors.runtime import ActorSystem, ChildSpec, SupervisorSpec
from torus_actors.volume.session import CacheSizes
from torus_actors.wire.hello import Identity, Role, is_other_cluster, shut_out

log = logging.getLogger(__name__)

DEFAULT_METADATA = "torus://127.0.0.1:40000"

LEASE_RETURN_S = 1.0
"""A lease that cannot be given back by then ends by itself."""

METADATA_STOP_S = 0.5
"""Transactions are done long before; what takes longer is watchers waiting for news."""

METADATA_CLOSE_S = 10.0
"""A disk may stall under the last transaction. What is then not closed is let go of by the end of
the process, and loses nothing."""

QUIET_WAIT_S = 3.0
"""Nodes of a cluster are started together: one that waits no longer than this need not say so."""

ADMITTED_S_MAX = 1.0
"""How long a process that starts waits to learn whether nodes let it in."""

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

    async def check_admitted(self, view: ClusterView, patience_s: float | None) -> None:
        """See that the nodes let this process in, before it takes locks, or a place in the ring.

        One that refuses may be the one with the wrong secret, and so may one that does not: where
        some let it in, most of the ring must refuse. Where none does, those that are down count as
        well, for they may be on their way up.

        Args:
            view: of the cluster; gets the nodes that are registered.
            patience_s: how long to wait for the metadata; None for as long as it takes.

        Raises:
            Again: the metadata did not answer in time.
            Unauthenticated: the nodes do not let this process in.
        """
        bridge, loop = self.system.actor("bridge"), self.system.loop
        # A node need not be where it was when it entered the ring, and another cluster's may be.
        found = await patiently(self.meta.peers, give_up_s=patience_s, rng=self.system.rng)
        view.peers = {info.peer_id: info for info in found}
        await bridge.set_peers.remote(view.addresses())
        ring = set(view.ring.members)
        refusals: list[str] = []
        up = down = 0
        end = loop.time() + ADMITTED_S_MAX
        while ring and loop.time() < end:
            peers = [peer for peer in await bridge.peers.remote() if peer["node"] in ring]
            up = sum(peer["up"] for peer in peers)
            refusals = [peer["reason"] for peer in peers if peer["refused"]]
            down = len(peers) - up - len(refusals)
            silent = any(not peer["reason"] for peer in peers if not peer["up"])
            if 2 * up >= len(peers) or not down or (not silent and (up or not refusals)):
                break  # half of them let it in, or nobody is waited for
            await asyncio.sleep(ADMITTED_LOOK_S)
        if up:
            # Where a node is down, one of another cluster may have its address.
            refusals = [each for each in refusals if not is_other_cluster(each)]
            if 2 * len(refusals) > len(ring):
                raise shut_out("most nodes do not talk to this process", refusals)
        elif refusals and len(refusals) >= down:
            raise shut_out("no node talks to this process", refusals)

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
        # From now on it is told by the process's end: servers stop first, and give volumes back.
        lost = self.system.heirlooms.setdefault(NOT_CLOSED, [])
        services = self.system.cells.get("services")
        if services is not None:
            await services.stop(final=True)
        for name, volume in self.system.heirlooms.pop("open_volumes", {}).items():
            # Whose work it is was not to be had any more.
            if volume.session.epoch and not volume.session.closed:
                lost.append(f"volume {name} was not closed: what was not flushed before is lost")
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
