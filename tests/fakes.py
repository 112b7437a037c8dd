"""A cluster in one process, on one event loop: for tests of the actors that make it up.

Every node has an ``ActorSystem`` of its own with the real block store over ``MFileStore`` on a
simulated disk; clients have the real replicator, INode store, heartbeat and volumes. They are
connected by a ``Network`` that carries calls as the wire does (arguments and errors are encoded,
payloads go by reference until they arrive) and has faults. Metadata is the in-memory store. Time is
virtual: no test waits for a clock. All randomness comes from one seed.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import random
import selectors
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from torus_actors.actors.block_store import CONCURRENCY as BLOCK_STORE_CONCURRENCY
from torus_actors.actors.block_store import BlockStoreActor, OpenStores
from torus_actors.actors.collector import Collector
from torus_actors.actors.disk import READERS, disk_workers
from torus_actors.actors.heartbeat import Heartbeat
from torus_actors.actors.inode_store import INodeStore
from torus_actors.actors.journal import JournalActor, JournalDisk, OpenJournal
from torus_actors.actors.rebalancer import Rebalancer
from torus_actors.actors.replicator import CONCURRENCY as REPLICATOR_CONCURRENCY
from torus_actors.actors.replicator import ReadLevel, Replicator, WriteLevel
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.actors.volumes import CONCURRENCY as VOLUMES_CONCURRENCY
from torus_actors.actors.volumes import Volumes
from torus_actors.errors import ActorNotFound, NoPeer, NotSupported, PeerLost, TorusError
from torus_actors.metadata import kv
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata, RingRecord
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.model.refs import BlockRef
from torus_actors.model.rings import Ring
from torus_actors.nbd.requests import Hole, Op, Request
from torus_actors.nbd.requests import Reply as NbdReply
from torus_actors.runtime import (
    ActorSystem,
    ChildSpec,
    LoopActor,
    ObjectRef,
    Reply,
    SupervisorSpec,
    expose,
)
from torus_actors.runtime.messages import Call
from torus_actors.storage.mfile import MFileStore
from torus_actors.storage.mfile_open import DATA_PATH
from torus_actors.storage.simdisk import SimDisk
from torus_actors.volume.session import CacheSizes, Session
from torus_actors.wire.messages import (
    decode_call,
    decode_error,
    decode_reply,
    encode_call,
    encode_error,
    encode_reply,
)

TEST_TIMEOUT_S = 3600.0
"""Virtual seconds that one test may take."""

INODE_BLOCK = 32 << 10


# -- virtual time ----------------------------------------------------------------------------------


class _Jump(selectors.BaseSelector):
    """A selector that never waits: what would be a wait moves the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        self._turns += 1
        if timeout == 0 and self._turns % 16:
            return []  # files are hardly ever ready, and to ask takes as long as a callback
        ready = self._real.select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing is left to happen, and somebody waits for it")
        if not ready and timeout:
            self._loop.now += timeout
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> Any:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Any:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time moves only when nothing else is to be done."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        """Virtual seconds."""
        return self.now


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in virtual time; nothing may be left unhandled on its loop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        noise: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what))
            async with asyncio.timeout(TEST_TIMEOUT_S):
                await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main())
        gc.collect()  # "exception was never retrieved" comes with the collection
        assert not noise, noise

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


async def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    """Let time pass until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await asyncio.sleep(0.01)


# -- network ---------------------------------------------------------------------------------------


class Network:
    """Carries calls between the systems of one loop.

    Attributes:
        hanging: nodes that take calls and do not answer, but do not look lost either.
        delay_s: additional time that a node's answers take.
        mangle: by node: changes the payload of an answer; gets the method and the bytes.
        trace: called with source, target, actor and method of every call that arrives.
        calls: how many calls arrived, by method.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.systems: dict[str, ActorSystem] = {}
        self.hanging: set[str] = set()
        self.delay_s: dict[str, float] = {}
        self.latency_s = 0.0
        self.mangle: dict[str, Callable[[str, bytes], bytes]] = {}
        self.trace: Callable[[str, str, str, str], None] = lambda *_: None
        self.calls: dict[str, int] = {}
        self.lost_requests: dict[str, int] = {}
        self.lost_answers: dict[str, int] = {}
        self._cut: set[frozenset[str]] = set()
        self._in_flight: dict[ObjectRef[Any], tuple[str, str]] = {}
        self._resent: dict[ObjectRef[Any], tuple[bytes, Sequence[Any]]] = {}
        self._arrives: dict[tuple[str, str], float] = {}
        self._changes = 0

    def join(self, system: ActorSystem) -> None:
        """Connect a system under its node id; one that was there before is gone."""
        self.systems[system.node_id] = system
        system.transport = FakeTransport(self, system)
        self._changes += 1

    def leave(self, node: str) -> None:
        """The node is gone: calls from and to it fail at once."""
        system = self.systems.pop(node, None)
        if system is not None:
            system.transport = None
        self._changes += 1
        self._lose(lambda pair: node in pair)

    def cut(self, a: str, b: str) -> None:
        """Two nodes lose their connection."""
        self._cut.add(frozenset((a, b)))
        self._changes += 1
        self._lose(lambda pair: pair in ((a, b), (b, a)))

    def reset(self, a: str, b: str) -> None:
        """Their connection breaks, and they have another at once, as two bridges would.

        What may be sent again may arrive twice by that.
        """
        again = [
            (ref, self._in_flight.pop(ref), *self._resent[ref])
            for ref, pair in list(self._in_flight.items())
            if ref in self._resent and set(pair) == {a, b}
        ]
        self._changes += 1
        self._lose(lambda pair: set(pair) == {a, b})
        for ref, (source, target), meta, parts in again:
            self.send(source, target, ref, meta, parts, resend=True)

    def heal(self) -> None:
        """Take back all cuts, hangs and delays."""
        self._cut.clear()
        self.hanging.clear()
        self.delay_s.clear()
        self._changes += 1

    def connected(self, a: str, b: str) -> bool:
        """Whether a call from ``a`` would reach ``b``."""
        return b in self.systems and frozenset((a, b)) not in self._cut

    @property
    def changes(self) -> int:
        """Moves when who is connected changes."""
        return self._changes

    def _lose(self, lost: Callable[[tuple[str, str]], bool]) -> None:
        for ref, pair in list(self._in_flight.items()):
            if lost(pair):
                del self._in_flight[ref]
                ref.fail(PeerLost("the connection was lost"))

    def send(
        self,
        source: str,
        target: str,
        ref: ObjectRef[Any] | None,
        meta: bytes,
        parts: Sequence[Any],
        resend: bool = False,
    ) -> None:
        """Carry one call; its payload is read when it arrives, not before."""
        system = self.systems[target]
        loop = system.loop
        if ref is not None:
            self._in_flight[ref] = (source, target)
            ref.add_done_callback(lambda _: self._in_flight.pop(ref, None))
            if resend:
                self._resent[ref] = (meta, parts)
                ref.add_done_callback(lambda _: self._resent.pop(ref, None))
        # A connection keeps the order of what it carries.
        at = max(loop.time() + self._latency(), self._arrives.get((source, target), 0.0) + 1e-6)
        self._arrives[source, target] = at
        loop.call_at(at, self._arrive, source, target, system, ref, meta, parts)

    def _latency(self) -> float:
        return self.latency_s or 0.0001 + self.rng.random() * 0.0004

    def _arrive(
        self,
        source: str,
        target: str,
        system: ActorSystem,
        ref: ObjectRef[Any] | None,
        meta: bytes,
        parts: Sequence[Any],
    ) -> None:
        if self.systems.get(target) is not system or (ref is not None and ref.done()):
            return
        actor, method, args, _ = decode_call(meta)
        self.calls[method] = self.calls.get(method, 0) + 1
        self.trace(source, target, actor, method)
        if self.lost_requests.get(target, 0):
            self.lost_requests[target] -= 1
            return
        if target in self.hanging:
            return
        reply = _FakeReply(self, system, target, method, ref) if ref is not None else None
        try:
            cell = system.cells.get(actor)
            if cell is None or cell.ended:
                raise ActorNotFound(f"no actor {actor} on this node")
            handler = cell.handlers.get(method)
            if handler is None or not handler.remote:
                raise NotSupported(f"{actor} has no method {method} for other nodes")
            handler.check(args, bool(parts))
        except TorusError as error:
            if reply is not None:
                reply.fail(error)
            return
        kwargs = {"payload": memoryview(b"".join(parts))} if parts else {}
        cell.inbox.put(Call(method, tuple(args), kwargs, reply))

    def answer(
        self, target: str, system: ActorSystem, ref: ObjectRef[Any], resolve: Callable[[], None]
    ) -> None:
        """Carry an answer back."""
        if self.systems.get(target) is not system:
            return
        if self.lost_answers.get(target, 0):
            self.lost_answers[target] -= 1
            return

        def arrive() -> None:
            if ref in self._in_flight:
                resolve()

        system.loop.call_later(self._latency() + self.delay_s.get(target, 0.0), arrive)


class _FakeReply:
    """Where an actor's answer to a call from another node goes."""

    def __init__(
        self, network: Network, system: ActorSystem, node: str, method: str, ref: ObjectRef[Any]
    ) -> None:
        self._network = network
        self._system = system
        self._node = node
        self._method = method
        self._ref = ref
        self._done = False

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._done or self._ref.done()

    def set(self, value: Any = None) -> None:
        """Answer."""
        if self._done:
            return
        self._done = True
        reply = value if type(value) is Reply else None
        meta = encode_reply(value if reply is None else reply.result)

        def resolve() -> None:
            result = decode_reply(meta)
            if reply is not None:
                payload = b"".join(reply.payload)
                mangle = self._network.mangle.get(self._node)
                if mangle is not None:
                    payload = mangle(self._method, payload)
                result = Reply(result, (memoryview(payload),))
            self._ref.set(result)

        self._network.answer(self._node, self._system, self._ref, resolve)

    def fail(self, error: BaseException) -> None:
        """Fail."""
        if self._done:
            return
        self._done = True
        known = error if isinstance(error, TorusError) else TorusError(repr(error))
        meta = encode_error(known)
        self._network.answer(
            self._node, self._system, self._ref, lambda: self._ref.fail(decode_error(meta))
        )


class FakeTransport:
    """One system's way to the others; see ``runtime.system.Transport``."""

    def __init__(self, network: Network, system: ActorSystem) -> None:
        self._network = network
        self._system = system

    @property
    def changes(self) -> int:
        """See ``Network.changes``."""
        return self._network.changes

    def call(
        self,
        node: str,
        actor: str,
        method: str,
        args: tuple[Any, ...],
        payload: Any,
        timeout_s: float,
        checked: bool = False,
        resend: bool = False,
    ) -> ObjectRef[Any]:
        """See Transport."""
        ref: ObjectRef[Any] = ObjectRef(self._system, self._system.loop.time() + timeout_s)
        if not self.is_up(node):
            ref.fail(NoPeer(f"no peer {node}") if not node else PeerLost(f"{node} is not there"))
            return ref
        try:
            meta = encode_call(actor, method, args, max(int(timeout_s * 1000), 1))
        except TorusError as error:
            ref.fail(error)
            return ref
        self._network.send(self._system.node_id, node, ref, meta, _parts(payload), resend)
        return ref

    def cast(self, node: str, actor: str, method: str, args: tuple[Any, ...], payload: Any) -> None:
        """See Transport."""
        if self.is_up(node):
            meta = encode_call(actor, method, args, 0)
            self._network.send(self._system.node_id, node, None, meta, _parts(payload))

    def is_up(self, node: str) -> bool:
        """Whether a peer is connected."""
        return node == self._system.node_id or self._network.connected(self._system.node_id, node)

    def is_down(self, node: str) -> bool:
        """Whether a peer is known not to answer."""
        return not self.is_up(node)


def _parts(payload: Any) -> Sequence[Any]:
    if payload is None:
        return ()
    return payload if isinstance(payload, (list, tuple)) else (payload,)


# -- nodes -----------------------------------------------------------------------------------------


class Forgetful(random.Random):
    """Decides that a crash loses everything that was not synced."""

    def randrange(self, *_args: Any, **_kwargs: Any) -> int:
        """Always the first fate."""
        return 0


class Member:
    """What storage nodes and clients have in common."""

    def __init__(self, cluster: Cluster, node_id: str) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.view = ClusterView(cluster.gmd, cluster.ring)
        self.system: ActorSystem | None = None
        self.blocking_s: dict[str, float] = {}
        """How long calls of blocking actors take, by method, where it is not a moment."""

    def _new_system(self) -> ActorSystem:
        system = ActorSystem(
            asyncio.get_running_loop(),
            node_id=self.node_id,
            rng=random.Random(self.cluster.rng.getrandbits(32)),
            blocking_delay_s=lambda _, method: self.blocking_s.get(method, 0.0001),
        )
        self.system = system
        return system

    def actor(self, name: str) -> Any:
        """A handle, for the test to call."""
        assert self.system is not None
        return self.system.actor(name)

    def kill(self, name: str) -> None:
        """Kill one actor; its supervisor restarts it."""
        assert self.system is not None
        self.system.cells[name].kill()

    def _root(self, *children: ChildSpec) -> SupervisorSpec:
        return SupervisorSpec(
            "root", children, max_restarts=1000, backoff_first_s=0.001, backoff_max_s=0.01
        )


class StorageNode(Member):
    """A node with a block store on simulated disks, which outlive it."""

    def __init__(self, cluster: Cluster, node_id: str, blocks: int) -> None:
        super().__init__(cluster, node_id)
        self.blocks = blocks
        self.disks = [SimDisk(Forgetful(1)), SimDisk(Forgetful(2)), SimDisk(Forgetful(3))]
        self.journal: OpenJournal | None = None
        self.opened: OpenStores | None = None
        self._rebalances = False

    @property
    def stores(self) -> list[MFileStore]:
        """The open stores: data, INode pages."""
        assert self.opened is not None
        return self.opened.stores  # type: ignore[return-value]

    def refs(self, kind: int = 0) -> set[BlockRef]:
        """All blocks stored here."""
        return set(self.stores[kind].refs_from(0, 1 << 20)[0])

    def rot(self, ref: BlockRef, offset: int, count: int = 64) -> None:
        """Bits of a stored data block change on the disk."""
        store = self.stores[0]
        layout = store._layout
        at = layout.slot_offset(store.locate(ref).slot) + layout.sums_room + offset
        self.disks[0].rot(DATA_PATH, at, count)

    async def start(self, rebalancer: bool = False) -> None:
        """Start it, on what its disks hold."""
        self._rebalances = rebalancer
        system = self._new_system()
        sizes = (self.cluster.gmd.block_size, INODE_BLOCK)
        stores = []
        for disk, block_size, extra in zip(self.disks[:2], sizes, (0, 64), strict=True):
            room = (self.blocks + extra) * (block_size + 8192) + (1 << 16)
            stores.append(
                MFileStore.open(disk, block_size=block_size, size_bytes=room, rng=self.cluster.rng)
            )
        opened = self.opened = OpenStores(system, list(stores))
        children = [
            *disk_workers(opened.stores),
            ChildSpec(
                "block_store",
                lambda: BlockStoreActor(opened, self.view),
                max_concurrency=BLOCK_STORE_CONCURRENCY,
            ),
        ]
        if self.cluster.journals:
            journal = self.journal = OpenJournal.open(system, self.disks[2], self.cluster.rng)
            children += [
                ChildSpec("journal_disk", JournalDisk),
                ChildSpec("journal", lambda: JournalActor(journal), max_concurrency=64),
            ]
        if rebalancer:
            children.append(ChildSpec("rebalancer", lambda: Rebalancer(self.view)))
        if self.cluster.collect_s is not None:
            grace_s = self.cluster.collect_s
            meta = MetadataService(self.cluster.store, rng=system.rng)
            children += [
                ChildSpec(
                    "replicator", lambda: Replicator(self.view, has_store=True), max_concurrency=256
                ),
                ChildSpec("inode_store", INodeStore, max_concurrency=64),
                ChildSpec("collector", lambda: Collector(meta, grace_s, grace_s)),
            ]
        await system.start(self._root(*children))
        self.cluster.network.join(system)

    async def crash(self) -> None:
        """Lose the power: what was not flushed is gone."""
        assert self.system is not None and self.opened is not None
        self.cluster.network.leave(self.node_id)
        for name in ("disk_writer", *READERS, "disk_flusher"):
            cell = self.system.cells[name]
            if cell.actor is not None:
                cell.actor.quiesce()  # from now on nothing reaches the disks
        await self._end()
        self.disks = [disk.crash() for disk in self.disks]

    async def restart(self) -> None:
        """Lose the power and come back."""
        await self.crash()
        await self.start(self._rebalances)

    async def stop(self) -> None:
        """Stop in order."""
        if self.system is None:
            return
        self.cluster.network.leave(self.node_id)
        assert self.opened is not None
        opened = self.opened
        await self._end()
        opened.close()

    async def _end(self) -> None:
        system, self.system = self.system, None
        assert system is not None and self.opened is not None
        if self.opened._idle_flush is not None:
            self.opened._idle_flush.cancel()
        for name in ("disk_writer", *READERS, "disk_flusher"):
            system.cells[name].will_restart = False
        await system.stop()
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self.opened._idle_flush is not None:
            self.opened._idle_flush.cancel()


class _Answers(LoopActor):
    """Stands in for the NBD server: takes the answers of volume actors."""

    def __init__(self, devices: dict[int, Device]) -> None:
        super().__init__()
        self._devices = devices

    @expose(idempotent=True)
    def replies(self, conn: int, replies: list[NbdReply]) -> None:
        """Answers to requests of one connection."""
        for reply in replies:
            self._devices[conn].answered(reply)


class Client(Member):
    """A process that has volumes open."""

    def __init__(
        self,
        cluster: Cluster,
        node_id: str,
        caches: CacheSizes,
        read_level: ReadLevel,
        write_level: WriteLevel,
        lease_ttl_s: int,
        read_only: bool,
    ) -> None:
        super().__init__(cluster, node_id)
        self.caches = caches
        self.read_level = read_level
        self.write_level = write_level
        self.lease_ttl_s = lease_ttl_s
        self.read_only = read_only
        self.store = FaultyStore(cluster.store)
        self.meta = MetadataService(
            self.store, rng=random.Random(cluster.rng.getrandbits(32)), resolve_s=2.0
        )
        self.devices: dict[int, Device] = {}

    async def start(self) -> None:
        """Start it."""
        system = self._new_system()
        self.cluster.network.join(system)
        await system.start(
            self._root(
                ChildSpec(
                    "replicator",
                    lambda: Replicator(
                        self.view, read_level=self.read_level, write_level=self.write_level
                    ),
                    max_concurrency=REPLICATOR_CONCURRENCY,
                ),
                ChildSpec("inode_store", INodeStore, max_concurrency=64),
                ChildSpec(
                    "heartbeat",
                    lambda: Heartbeat(self.meta, None, self.lease_ttl_s),
                    max_concurrency=64,
                ),
                ChildSpec(
                    "volumes",
                    lambda: Volumes(self.meta, self.view, self.caches, read_only=self.read_only),
                    max_concurrency=VOLUMES_CONCURRENCY,
                    shutdown_s=90.0,
                ),
                ChildSpec("nbd_server", lambda: _Answers(self.devices)),
            )
        )

    async def open(self, name: str) -> Device:
        """Open a volume."""
        _, size, _, _ = await self.actor("volumes").open.remote(name, timeout_s=60.0)
        device = Device(self, name, size, len(self.devices) + 1)
        self.devices[device.conn] = device
        return device

    def session(self, name: str) -> Session:
        """What a volume holds in this process."""
        assert self.system is not None
        session: Session = self.system.heirlooms["open_volumes"][name].session
        return session

    async def crash(self) -> None:
        """End without a word to anybody."""
        assert self.system is not None
        self.cluster.network.leave(self.node_id)
        self.store.down = True
        for volume in self.system.heirlooms.get("open_volumes", {}).values():
            volume.session.close()
        await self.stop()

    async def stop(self) -> None:
        """Stop in order: close volumes, then everything else."""
        system, self.system = self.system, None
        if system is not None:
            await system.stop()
            self.cluster.network.leave(self.node_id)


class DeviceError(Exception):
    """A request was answered with an error."""

    def __init__(self, reply: NbdReply) -> None:
        super().__init__(f"errno {reply.error}: {reply.message}")
        self.errno = reply.error


class Device:
    """One NBD connection to a volume, without the protocol.

    Checks that each request is answered exactly once.
    """

    def __init__(self, client: Client, name: str, size: int, conn: int) -> None:
        self.client = client
        self.name = name
        self.size = size
        self.conn = conn
        self._waiting: dict[Request, asyncio.Future[NbdReply]] = {}
        self.violations: list[str] = []

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._waiting)

    def answered(self, reply: NbdReply) -> None:
        """Take an answer."""
        future = self._waiting.pop(reply.request, None)
        if future is None:
            self.violations.append(f"{reply.request} was answered twice")
        elif not future.done():
            future.set_result(reply)

    def submit(self, *requests: Request) -> list[asyncio.Future[NbdReply]]:
        """Send requests as one batch."""
        loop = asyncio.get_running_loop()
        futures = []
        for request in requests:
            self._waiting[request] = loop.create_future()
            futures.append(self._waiting[request])
        self.client.actor(f"volume:{self.name}").submit.tell(self.conn, list(requests))
        return futures

    async def do(self, op: Op, offset: int = 0, length: int = 0, **fields: Any) -> NbdReply:
        """Send one request and wait for its answer.

        Raises:
            DeviceError: the answer is an error.
        """
        request = Request(op, offset, length, 0, **fields)
        (future,) = self.submit(request)
        async with asyncio.timeout(600.0):
            reply = await future
        assert not self.violations, self.violations
        if reply.error:
            raise DeviceError(reply)
        return reply

    async def read(self, offset: int, length: int) -> bytes:
        """Read."""
        reply = await self.do(Op.READ, offset, length)
        data = b"".join(
            bytes(len(piece)) if isinstance(piece, Hole) else bytes(piece)
            for piece in reply.buffers
        )
        assert len(data) == length
        return data

    async def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        """Write."""
        await self.do(Op.WRITE, offset, len(data), data=data, fua=fua)

    async def flush(self) -> None:
        """Flush."""
        await self.do(Op.FLUSH)

    async def zero(self, offset: int, length: int, no_hole: bool = False) -> None:
        """Write zeros."""
        await self.do(Op.WRITE_ZEROES, offset, length, no_hole=no_hole)

    async def trim(self, offset: int, length: int) -> None:
        """Trim."""
        await self.do(Op.TRIM, offset, length)

    async def release(self) -> None:
        """Close the volume, if this was its last user."""
        await self.client.actor("volumes").release.remote(self.name, timeout_s=120.0)


class Cluster:
    """Storage nodes, clients, their network and metadata; an async context manager.

    Args:
        nodes: how many storage nodes.
        replication: copies of a block.
        block_size: bytes of a data block.
        blocks: room of a node, in data blocks.
        collect_s: grace of the nodes' garbage collectors; None for none.
        journals: whether nodes keep journals; without, every flush is a commit.
        seed: of everything random.
        inode_copies: of a page at least.
    """

    def __init__(
        self,
        nodes: int = 3,
        replication: int = 2,
        block_size: int = 16 << 10,
        blocks: int = 256,
        seed: int = 1,
        collect_s: float | None = None,
        journals: bool = False,
        inode_copies: int = 1,
    ) -> None:
        self.collect_s = collect_s
        self.journals = journals
        self.rng = random.Random(seed)
        self.network = Network(self.rng)
        self.store = MemoryStore()
        self.meta = MetadataService(self.store, rng=self.rng)
        self.gmd = GlobalMetadata(
            block_size=block_size,
            block_spec="crc,base",
            inode_replication=inode_copies,
            cluster_id=self.new_id(),
        )
        self.ids = [self.new_id() for _ in range(nodes)]
        self.ring: Ring = rings.make_ring(
            "mod", version=1, replication=replication, peers=[Peer(i, 1 << 30) for i in self.ids]
        )
        self.nodes = {i: StorageNode(self, i, blocks) for i in self.ids}
        self.clients: list[Client] = []

    def new_id(self) -> str:
        """A node id."""
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    async def __aenter__(self) -> Cluster:
        await self.meta.init(self.gmd, rings.marshal(self.ring))
        for node in self.nodes.values():
            await node.start()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self.network.heal()
        for client in self.clients:
            if exc_info[0] is not None and client.system is not None:
                await client.crash()
            await client.stop()
        for node in self.nodes.values():
            await node.stop()
        await self.store.close()

    def node(self, position: int) -> StorageNode:
        """A storage node by its position in the ring."""
        return self.nodes[self.ids[position]]

    def set_ring(self, ring: Ring) -> None:
        """All members see another ring from now on."""
        record = RingRecord(ring.version, rings.marshal(ring)).encode()
        self.store._apply([kv.Put(self.meta.keys.ring, record)])
        self.ring = ring
        for member in [*self.nodes.values(), *self.clients]:
            member.view.ring = ring

    async def add_node(self, blocks: int = 256, rebalancer: bool = False) -> StorageNode:
        """One more storage node; not yet in the ring."""
        node = StorageNode(self, self.new_id(), blocks)
        self.ids.append(node.node_id)
        self.nodes[node.node_id] = node
        await node.start(rebalancer)
        return node

    async def client(
        self,
        read_bytes: int = 256 << 10,
        write_bytes: int = 256 << 10,
        read_level: ReadLevel = ReadLevel.BLOCK,
        write_level: WriteLevel = WriteLevel.ALL,
        lease_ttl_s: int = 6,
        read_only: bool = False,
    ) -> Client:
        """A running client."""
        client = Client(
            self,
            self.new_id(),
            CacheSizes(read_bytes, write_bytes),
            read_level,
            write_level,
            lease_ttl_s,
            read_only,
        )
        self.clients.append(client)
        await client.start()
        return client

    async def volume(self, size: int, name: str = "v", **options: Any) -> Device:
        """A new volume, open on a new client."""
        await self.meta.create_volume(name, size)
        client = await self.client(**options)
        return await client.open(name)
