"""A simulated cluster: hosts with disks, and the production trees running on them.

One host keeps the metadata (reached over the network as ``torus://``, like the store of any
cluster), some are storage nodes, some run clients. Everything random comes from generators that are
derived from one seed, each for one purpose, so that more draws for one do not change another.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torus_actors.actors.evictor import REMOVE_AFTER_S
from torus_actors.client import Client, ClientConfig, start_client
from torus_actors.errors import Invalid, TorusError
from torus_actors.machine import Machine
from torus_actors.metadata import kv
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.node import NodeConfig, StorageNode, start_node
from torus_actors.process import NbdConfig, Process
from torus_actors.scenarios.simloop import SimLoop, SimProcess
from torus_actors.scenarios.simnet import SimNetwork
from torus_actors.scenarios.trace import Trace
from torus_actors.storage.simdisk import DirectPauses, Operation, PowerCut, SimDisk
from torus_actors.volume.session import CacheSizes
from torus_actors.wire.hello import Role

log = logging.getLogger(__name__)

PORT = 40000
META_ADDRESS = "10.0.1.1"
WALL_CLOCK_START = 1_750_000_000.0

RESTART_PAUSE_S = 1.0
"""A service manager waits so long before it starts a program again that ended by itself."""

FAILURES_MAX = 10
"""The first few say what is wrong; the rest follows from them."""

START_S_MAX = 60.0
STOP_S_MAX = 150.0

DISK_S = {"write": 0.0003, "read_many": 0.0003, "check": 0.0003, "sync": 0.002}
"""Mean time of a disk worker's call; other blocking calls take ``DISK_OTHER_S``."""

DISK_OTHER_S = 0.001


@dataclass(frozen=True, slots=True)
class Shape:
    """How a cluster is made.

    Attributes:
        nodes: storage nodes.
        clients: hosts that run clients.
        spares: hosts for other programs: readers, or tools.
        replication: copies of a block.
        block_size: bytes.
        store_bytes: disk that each node takes.
        volume_bytes: sizes of the volumes, which are named v0, v1 and so on.
        write_cache_bytes: of each client.
        read_cache_bytes: of each client.
        miss_percent: reads that find nothing in a node's page cache.
        lease_ttl_s: of nodes and clients.
        remove_after_s: after which nodes take one that is gone out of the ring.
        direct_writes: whether small records of the journal are written without a thread.
    """

    nodes: int = 3
    clients: int = 1
    spares: int = 0
    replication: int = 2
    block_size: int = 16 << 10
    store_bytes: int = 32 << 20
    volume_bytes: tuple[int, ...] = (1 << 20,)
    write_cache_bytes: int = 1 << 20
    read_cache_bytes: int = 256 << 10
    miss_percent: int = 20
    lease_ttl_s: int = 6
    remove_after_s: float = REMOVE_AFTER_S
    direct_writes: bool = False


@dataclass(eq=False)
class Host:
    """One machine.

    Attributes:
        disks: by directory.
        process: the latest process; it may be dead.
        disk_factor: how much slower than usual its disk is.
        syncs_hang_until: loop time before which no sync that begins now ends.
        writes_hang: whether blocks wait behind such syncs as well, as on a real node: one writes at
            a time.
        boots: processes started so far.
        read_only: a client there only reads.
        wanted: whether the program shall run; a program that is wanted and not there is restarted.
        cut_after: so many more operations of its disks, and it dies in the next.
        cut_in: only these count: kind, and a part of the path of disk and file; None is all.
        cut_kills: the program is killed then; otherwise the power fails.
    """

    name: str
    address: str
    rng: random.Random
    disks: dict[str, SimDisk] = field(default_factory=dict)
    process: SimProcess | None = None
    tree: Any = None
    disk_factor: float = 1.0
    syncs_hang_until: float = 0.0
    writes_hang: bool = False
    boots: int = 0
    read_only: bool = False
    wanted: bool = False
    starting: bool = False
    cut_after: int | None = None
    cut_in: tuple[str, str] | None = None
    cut_kills: bool = False

    @property
    def up(self) -> bool:
        """Whether its program is running and has started."""
        return self.tree is not None and self.process is not None and self.process.alive

    def hang_s(self, now: float, method: str) -> float:
        """How long a disk worker's call hangs that begins now."""
        # The journal's worker reads and writes by turns.
        hangs = method in ("sync", "run") or (method == "write" and self.writes_hang)
        return max(self.syncs_hang_until - now, 0.0) if hangs else 0.0

    @property
    def is_starting(self) -> bool:
        """Whether it has disks that nobody can look into: those of a program that is starting."""
        return self.tree is None and bool(self.disks)

    @property
    def node_id(self) -> str:
        """Of the tree that runs there, or did last."""
        return str(self.tree.system.node_id) if self.tree is not None else ""


class Cluster:
    """See the module.

    Args:
        loop: with a network.
        seed: of everything random.
    """

    def __init__(self, loop: SimLoop, seed: int, shape: Shape, trace: Trace) -> None:
        self.loop = loop
        self.seed = seed
        self.shape = shape
        self.trace = trace
        self.network = SimNetwork(loop, self.rng("network"), trace)
        self.meta_host = Host("meta", META_ADDRESS, self.rng("meta"))
        self.nodes = [self._new_node(i) for i in range(shape.nodes)]
        self.clients = [
            Host(f"client{i}", f"10.0.2.{i + 1}", self.rng(f"client{i}"))
            for i in range(shape.clients)
        ]
        self.spares = [
            Host(f"spare{i}", f"10.0.3.{i + 1}", self.rng(f"spare{i}")) for i in range(shape.spares)
        ]
        self.store = ObservedStore(MemoryStore())
        self.served = FaultyStore(self.store)
        """The same, as the host of the metadata has it for others."""
        self.meta = MetadataService(self.store, rng=self.rng("driver"), wall_clock=self.wall_clock)
        """The driver's own way to the metadata: never down."""
        self._ring: tuple[bytes, rings.Ring] | None = None
        self.failures: list[str] = []
        self.failed: asyncio.Future[None] = loop.create_future()
        """Done with the first of them."""
        self.node_watchers: list[Callable[[Host], None]] = []
        """Called with each storage node that has started."""
        self.flush_watchers: list[Callable[[Host, str], None]] = []
        """Called with the client's host and the volume of each flush that was acknowledged."""
        self.expendable: set[str] = set()
        """Names of client processes that a fault hit, whose operations may fail, of any volume."""
        self.may_leave: set[str] = set()
        """Ids of nodes that an operator, or a fault that lasts, takes out of the ring."""

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for a purpose."""
        return random.Random(f"{self.seed}/{purpose}")

    def wall_clock(self) -> float:
        """Seconds since 1970, as everybody in the simulation has it."""
        return WALL_CLOCK_START + self.loop.time()

    def say(self, text: str) -> None:
        """Note a line in the trace."""
        self.trace.say(self.loop.time(), text)

    def fail(self, text: str) -> None:
        """Something that must not happen has happened."""
        if not self.failed.done():
            self.failed.set_result(None)
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(f"at {self.loop.time():.3f}: {text}")
            self.say(f"FAILURE {text}")

    # -- making it ---------------------------------------------------------------------------------

    def _new_node(self, number: int) -> Host:
        name = f"node{number}"
        return Host(name, f"10.0.0.{number + 1}", self.rng(name))

    def add_host(self) -> Host:
        """One more machine for a storage node."""
        host = self._new_node(len(self.nodes))
        self.nodes.append(host)
        return host

    async def start(self) -> None:
        """Initialise the metadata, and start all nodes."""
        shape = self.shape
        gmd = GlobalMetadata(
            block_size=shape.block_size,
            block_spec="crc,base",
            inode_replication=shape.replication,
            cluster_id="00000000-0000-4000-8000-000000000001",
            created=self.wall_clock(),
        )
        ring = rings.make_ring("ketama", version=1, replication=shape.replication, peers=())
        await self.meta.init(gmd, rings.marshal(ring))
        await self.start_meta()
        for i, size in enumerate(shape.volume_bytes):
            await self.meta.create_volume(f"v{i}", size)
        if not all(await asyncio.gather(*[self.start_node(host) for host in self.nodes])):
            raise Invalid("the cluster cannot be made as its shape says")

    async def ring(self) -> rings.Ring:
        """The ring as the metadata has it."""
        data, _ = await self.meta.ring()
        if self._ring is None or self._ring[0] != data:
            self._ring = (data, rings.unmarshal(data))
        return self._ring[1]

    def _machine(self, host: Host) -> Machine:
        boot = host.boots

        def open_disk(path: Path) -> SimDisk:
            disk = host.disks.get(str(path))
            if disk is None:
                disk = SimDisk(
                    random.Random(f"{self.seed}/{host.name}{path}"),
                    miss_percent=self.shape.miss_percent,
                )
                if self.shape.direct_writes:
                    disk.direct = DirectPauses(
                        random.Random(f"{self.seed}/{host.name}{path}/direct"),
                        lambda: max(
                            DISK_S["sync"] * host.disk_factor,
                            host.hang_s(self.loop.time(), "sync"),
                        ),
                    )
                self._watch_disk(host, str(path), disk)
            return disk

        def delay_s(actor: str, method: str) -> float:
            mean = DISK_S.get(method, DISK_OTHER_S) * host.disk_factor
            usual = mean * (0.2 + 1.6 * host.rng.random() * host.rng.random() * 2)
            return max(usual, host.hang_s(self.loop.time(), method))

        return Machine(
            open_disk=open_disk,
            wall_clock=self.wall_clock,
            process_name=lambda: f"{host.name} boot {boot}",
            spin_s=0.0,
            shortcut=False,
            blocking_delay_s=delay_s,
        )

    def _watch_disk(self, host: Host, path: str, disk: SimDisk) -> None:
        host.disks[path] = disk

        def seen(operation: Operation) -> None:
            self.trace.point(self.loop.time(), host.name, path, operation.kind)
            if host.cut_after is not None and _is_aimed_at(host.cut_in, path, operation):
                host.cut_after -= 1
                if host.cut_after < 0:
                    host.cut_after = None
                    how = "is killed" if host.cut_kills else "loses power"
                    self.say(f"{host.name} {how} in a {operation.kind} of {path}")
                    if host.cut_kills:
                        self.kill(host)
                    else:
                        self.power_off(host)
                    raise PowerCut

        disk.on_operation = seen

    def _new_process(self, host: Host) -> SimProcess:
        host.boots += 1
        host.process = self.loop.new_process(f"{host.name}.{host.boots}", host.address)
        host.tree = None
        return host.process

    async def start_meta(self) -> None:
        """Start the host that keeps the metadata; what it kept is still there."""
        host = self.meta_host
        host.wanted = True
        process = self._new_process(host)

        async def opened() -> kv.KeyValueStore:
            return self.served

        async def run() -> Process:
            tree = Process(
                "00000000-0000-4000-8000-0000000000aa",
                Role.NODE,
                "memory://",
                None,
                random.Random(f"{self.seed}/meta/{host.boots}"),
                self._machine(host),
            )
            await tree.start_base((host.address, PORT), opened)
            return tree

        host.tree = await self.finish(host, process.run(run()), START_S_MAX)

    async def start_node(self, host: Host) -> bool:
        """Start a storage node; whether it came up. One that fails is tried again later."""
        host.wanted = True
        if host.starting or host.up:
            return host.up
        host.starting = True
        try:
            process = self._new_process(host)
            config = NodeConfig(
                data_dir=Path(f"/{host.name}"),
                size_bytes=self.shape.store_bytes,
                listen=(host.address, PORT),
                metadata=f"torus://{META_ADDRESS}:{PORT}",
                auto_join=True,
                lease_ttl_s=self.shape.lease_ttl_s,
                remove_after_s=self.shape.remove_after_s,
                machine=self._machine(host),
            )
            rng = random.Random(f"{self.seed}/{host.name}/{host.boots}")
            tree = await self.finish(host, process.run(_started(start_node(config, rng))), None)
            if tree is None:
                return False
            if isinstance(tree, BaseException):
                self.say(f"{host.name} did not start: {tree!r}")
                if not isinstance(tree, (TorusError, OSError)):
                    self.fail(f"{host.name} did not start: {tree!r}")
                self.loop.call_later(RESTART_PAUSE_S, self._start_again, host, process)
                return False
            host.tree = tree
            for watcher in self.node_watchers:
                watcher(host)
            tree.system.fatal.add_done_callback(lambda _: self._ended(host, tree))
            self.say(f"{host.name} is up ({tree.system.node_id[:8]})")
            return True
        finally:
            host.starting = False

    def _ended(self, host: Host, tree: StorageNode | Client) -> None:
        """A root supervisor gave up: the process ends, and is started again."""
        error = tree.system.fatal.exception()
        self.say(f"{host.name} ended by itself: {error}")
        self.kill(host)
        self.loop.call_later(RESTART_PAUSE_S, self._start_again, host, host.process)

    def _start_again(self, host: Host, process: SimProcess | None) -> None:
        if host.wanted and host.process is process:
            self.loop.create_task(self.start_node(host))

    async def start_client(self, host: Host) -> Client | None:
        """Start a client that serves volumes; None if it did not come up."""
        host.wanted = True
        process = self._new_process(host)
        shape = self.shape
        # What a reader has in its cache would hide from it that a block is gone.
        read_cache_bytes = 0 if host.read_only else shape.read_cache_bytes
        config = ClientConfig(
            metadata=f"torus://{META_ADDRESS}:{PORT}",
            nbd=NbdConfig(
                listen=(),
                read_only=host.read_only,
                caches=CacheSizes(read_cache_bytes, shape.write_cache_bytes),
            ),
            lease_ttl_s=shape.lease_ttl_s,
            machine=self._machine(host),
        )
        rng = random.Random(f"{self.seed}/{host.name}/{host.boots}")
        task = process.run(_started(start_client(config, rng, START_S_MAX)))
        tree = await self.finish(host, task, None)
        if isinstance(tree, BaseException):
            self.say(f"{host.name} did not start: {tree!r}")
            self.kill(host)
            return None
        host.tree = tree
        return tree if isinstance(tree, Client) else None

    async def finish(self, host: Host, task: asyncio.Task[Any], timeout_s: float | None) -> Any:
        """Wait for something that a process does; None if the process dies before it is done."""
        process = host.process
        end = None if timeout_s is None else self.loop.time() + timeout_s
        while process is not None and process.alive:
            await asyncio.wait([task], timeout=0.5)
            if task.done():
                # The power may go in the middle of it.
                return None if isinstance(task.exception(), PowerCut) else task.result()
            if end is not None and self.loop.time() > end:
                self.fail(f"{process.name} has not done in {timeout_s} s what it was to do")
                return None
        return None

    def run_on(self, host: Host, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something as part of a host's process."""
        assert host.process is not None
        return host.process.run(coroutine)

    # -- ending processes --------------------------------------------------------------------------

    async def stop(self, host: Host) -> None:
        """End a host's program in order."""
        host.wanted = False
        if host.up:
            tree = host.tree
            await self.finish(host, self.run_on(host, tree.stop()), STOP_S_MAX)
        self.kill(host)

    def kill(self, host: Host) -> None:
        """SIGKILL: the page cache survives."""
        process = host.process
        if process is None or not process.alive:
            return
        process.kill()
        self.network.process_killed(process)
        for path, disk in list(host.disks.items()):
            self._watch_disk(host, path, disk.kill())

    def power_off(self, host: Host) -> None:
        """Pull the plug: what was not synced may be lost, or torn, and nobody is told."""
        if host.process is not None and host.process.alive:
            host.process.kill()
        host.cut_after = None
        self.network.power_off(host.address)
        for path, disk in list(host.disks.items()):
            self._watch_disk(host, path, disk.crash())

    def power_on(self, host: Host) -> None:
        """The machine is back, its program not yet."""
        self.network.power_on(host.address)

    @property
    def members_up(self) -> list[Host]:
        """Nodes that run and are not paused."""
        return [h for h in self.nodes if h.up and h.process is not None and not h.process.paused]


def _is_aimed_at(aim: tuple[str, str] | None, directory: str, operation: Operation) -> bool:
    return aim is None or (operation.kind == aim[0] and aim[1] in f"{directory}/{operation.path}")


async def _started(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result, or the exception as a result: the driver decides what to do about it."""
    try:
        return await coroutine
    except Exception as error:
        return error


class ObservedStore(kv.KeyValueStore):
    """The metadata store, as kept by its host: outlives the process, and is looked at.

    Attributes:
        watchers: called with each operation that was applied.
    """

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner
        self.watchers: list[Any] = []

    async def get(self, key: str) -> kv.KeyValue | None:
        """See KeyValueStore."""
        return await self.inner.get(key)

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See KeyValueStore."""
        return await self.inner.range(prefix, after=after, limit=limit)

    async def txn(self, compare: Any, then: Any) -> kv.TxnResult:
        """See KeyValueStore."""
        result = await self.inner.txn(compare, then)
        if result.succeeded:
            for operation in then:
                for watcher in self.watchers:
                    watcher(operation)
        return result

    async def lease_grant(self, ttl_s: int) -> int:
        """See KeyValueStore."""
        return await self.inner.lease_grant(ttl_s)

    async def lease_keepalive(self, lease: int) -> int:
        """See KeyValueStore."""
        return await self.inner.lease_keepalive(lease)

    async def lease_revoke(self, lease: int) -> None:
        """See KeyValueStore."""
        await self.inner.lease_revoke(lease)

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See KeyValueStore."""
        return await self.inner.events(prefix, after_revision, timeout_s)

    async def close(self) -> None:
        """The state outlives whoever used it."""
