"""The replicator: reads and writes blocks through the ring.

Messages in: ``put_block``, ``read``, ``flush``, ``copies``, ``repair``, ``status``. Messages out:
to the block stores of the peers. Reads of one turn of the loop are gathered into one vectored call
a peer, overtaken by another replica where one is slow, and answered each as its data arrives. Its
death costs nothing: reads in the air go on, writes are handed to the successor.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torus_actors.actors.block_messages import RANGE, RANGE_STATUS, Status, split_answer, whole
from torus_actors.actors.peer_syncs import PeerSyncs
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import (
    TRANSIENT,
    BlockNotExist,
    BlockUnavailable,
    Closed,
    Corruption,
    DeadlineExceeded,
    Invalid,
    NoPeer,
    OutOfSpace,
    PeerLost,
    ProtocolError,
    TorusError,
)
from torus_actors.model.checksums import Buffer, sums_size, verify_range
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.runtime import LoopActor, ObjectRef, Reply, expose

log = logging.getLogger(__name__)

PUT_TIMEOUT_S = 2.5
"""A peer that has not taken a block by then is passed over. A dead link is noticed sooner."""

BEFORE_RINGS_S = 30.0
"""How long a peer counts as one of an earlier version: it may be brought up to date at any time."""

READ_TIMEOUT_S = 5.0
"""A peer's answer to a read; another replica overtakes it long before."""

READ_PATIENCE_S = 20.0
"""How long a read tries all replicas again while some of them only could not be asked."""

RETRY_PAUSE_S = 0.02
"""Pause before all replicas are asked again; doubles up to half a second."""

HEDGE_TICK_S = 0.01
HEDGE_MIN_S = 0.04
HEDGE_MAX_S = 0.8
HEDGE_FACTOR = 8
"""A read that takes this many times the usual latency is sent to another replica as well."""

BATCH_ITEMS_MAX = 256
BATCH_BYTES_MAX = 1 << 20
"""Bounds of one vectored read: a larger one would delay its first range for its last."""

ALONE_BYTES_MIN = 128 << 10
"""A range of this size is read in a call of its own: the reader keeps what it gets, and part of a
larger answer would keep the whole of it in memory."""

MISSING_ROUNDS = 3
"""How often all replicas are asked for a block that none has: it may be moving from one to another
just then, and be missed on both."""

ORDERS_PEERS_MAX = 1 << 21
"""Peers in all orders of asking that are remembered: some tens of MiB. A ring of 32 peers has
fewer; one of 200 had filled 232 MiB after 80,000 reads, and would have gone on."""

FOLLOWING_MAX = 32
"""Blocks whose further copies are written in the background at write level one; beyond it the
writer waits for all its copies."""

REPAIRS_MAX = 4
"""Repairs under way at once: each holds a whole block."""

REPAIR_PAUSE_S = 30.0
"""So long reads give nothing to a peer that took nothing, being full for one: each try moves a
whole block twice, and the rebalancer tries too."""


class ReadLevel(enum.StrEnum):
    """Which replicas a read asks."""

    BLOCK = "block"  # one, chosen by the ref so that load spreads; another when it fails or is slow
    SEQUENTIAL = "sequential"  # in the ring's order, the next one only after a failure
    SPREAD = "spread"  # two at once, the first right answer wins


class WriteLevel(enum.StrEnum):
    """When a write is acknowledged."""

    ALL = "all"  # all copies are taken
    ONE = "one"  # one is; the others follow in the background
    LOCAL = "local"  # this node's store has it, or as ONE where it has no store


CONCURRENCY = 1024
"""Messages in work at once: more than many volumes put, so that reads do not wait for puts that
hang."""


class _Read:
    """One range being read."""

    __slots__ = (
        "bad",
        "failures",
        "hedged",
        "in_air",
        "length",
        "offset",
        "order",
        "ref",
        "reply",
        "root",
        "rounds",
        "started",
        "tried",
    )

    def __init__(
        self, ref: BlockRef, root: int, offset: int, length: int, reply: Any, started: float
    ) -> None:
        self.ref = ref
        self.root = root
        self.offset = offset
        self.length = length
        self.reply = reply
        self.started = started
        self.order: Sequence[str] = ()
        self.tried = 0
        self.in_air = 0
        self.hedged = False
        """Whether who was asked first does not answer: others are asked as soon as one fails."""
        self.rounds = 0
        self.failures: list[TorusError] = []
        self.bad: list[str] = []  # peers whose copy is missing or wrong


class _Batch:
    """One vectored call in the air."""

    __slots__ = ("hedged", "reads", "sent")

    def __init__(self, reads: list[_Read], sent: float) -> None:
        self.reads = reads
        self.sent = sent
        self.hedged = False


class Replicator(LoopActor):
    """See the module.

    Args:
        view: the cluster as last seen: ring and peers.
        has_store: whether this node stores blocks itself.
    """

    def __init__(
        self,
        view: ClusterView,
        *,
        has_store: bool = False,
        read_level: ReadLevel = ReadLevel.BLOCK,
        write_level: WriteLevel = WriteLevel.ALL,
    ) -> None:
        super().__init__()
        self._view = view
        self._has_store = has_store
        self._read_level = read_level
        self._write_level = write_level
        self._stores: dict[str, Any] = {}
        self._syncs: PeerSyncs
        self._orders: dict[tuple[Any, int, int], list[str]] = {}
        self._orders_of: tuple[Any, Any, Any, int | None] = (None, None, None, None)
        self._queue: list[_Read] = []
        self._dispatching = False
        self._batches: dict[_Batch, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._latency_s = HEDGE_MIN_S / HEDGE_FACTOR
        self._repairing: set[tuple[BlockRef, str]] = set()
        self._not_before: dict[str, float] = {}
        """Loop time before which reads repair nothing on a peer."""
        self._before_rings: dict[str, float] = {}
        """Peers that do not let a writer say by which ring it goes, as those of an earlier version,
        and the loop time until which they are not asked to."""
        self._following = 0
        self._counts = {"degraded_puts": 0, "hedged": 0, "repaired": 0, "corrupt": 0, "missing": 0}

    async def setup(self) -> None:
        """Begin to watch who syncs."""

        def flush(peer: str, timeout_s: float) -> ObjectRef[Any]:
            ref: ObjectRef[Any] = self._store(peer).flush.remote(timeout_s=timeout_s, resend=True)
            return ref

        def ring() -> tuple[Sequence[str], int]:
            ring = self._view.ring
            return ring.members, max(ring.replication, self._view.inode_replication)

        self._syncs = PeerSyncs(self._loop, flush, self._down, ring)

    async def cleanup(self) -> None:
        """The successor begins anew."""
        self._syncs.closed = True

    # -- where blocks live -----------------------------------------------------------------------

    def _store(self, peer: str) -> Any:
        handle = self._stores.get(peer)
        if handle is None:
            handle = self._stores[peer] = self.system.actor("block_store", node=peer)
        return handle

    def _down(self, peer: str) -> bool:
        transport: Any = self.system.transport
        return transport is None or transport.is_down(peer)

    def _well(self) -> int:
        """How many members of the ring take blocks, as far as is known."""
        members = self._view.ring.members
        return sum(not self._down(peer) and not self._syncs.hangs(peer) for peer in members)

    def _copies(self, ref: BlockRef) -> int:
        if ref.block_type == BlockType.INODE:
            return self._view.inode_replication
        return self._view.ring.replication

    # -- writing -----------------------------------------------------------------------------------

    @expose(idempotent=True)
    async def put_block(
        self, ref: BlockRef, root: int, sums: bytes, copies: int, payload: Buffer
    ) -> list[list[Any]]:
        """Store a block on its replicas.

        Args:
            ref: its name; a block already stored under it is the same one.
            root: checksum of ``sums``.
            sums: checksum list.
            copies: how many, if more than the ring says.
            payload: the block; not to be changed before the answer.

        Returns:
            ``[peer, incarnation id]`` of each copy: what ``flush`` must later confirm.

        Raises:
            NoPeer: the ring is empty.
            OutOfSpace: no peer took it, and one had no room.
            BlockUnavailable: no peer took it.
        """
        ring = self._view.ring
        order = list(ring.permutation(ref))
        if not order:
            raise NoPeer("no peer is in the ring: add one with 'torusctl peer add'")
        block = (ref, root, sums, payload, ring.version)
        copies = min(max(copies, self._copies(ref)), len(order))
        order = [peer for peer in order if not self._syncs.hangs(peer)]
        if self._write_level is WriteLevel.LOCAL and self._has_store:
            order.sort(key=lambda peer: peer != self.system.node_id)
            return await self._put_copies(*block, order, 1)
        # A peer known to be down is asked last: it may be back, and the others may be full.
        candidates = [p for p in order if not self._down(p)] + [p for p in order if self._down(p)]
        if self._write_level is WriteLevel.ALL:
            return await self._put_copies(*block, candidates, copies)
        placed = await self._put_copies(*block, candidates, 1)
        rest = [p for p in candidates if p != placed[0][0]]
        if copies > 1 and rest:
            following = self._put_quietly(*block, rest, copies - 1)
            if self._following < FOLLOWING_MAX:
                self.spawn(following)
            else:
                await following
        return placed

    async def _put_quietly(self, ref: BlockRef, *args: Any) -> None:
        self._following += 1
        try:
            await self._put_copies(ref, *args)
        except TorusError as error:
            log.warning("further copies of %s: %s", ref, error)
        finally:
            self._following -= 1

    async def _put_copies(
        self,
        ref: BlockRef,
        root: int,
        sums: bytes,
        payload: Buffer,
        version: int,
        candidates: list[str],
        copies: int,
    ) -> list[list[Any]]:
        """Have so many of the candidates, of a ring of that version, take a block."""
        placed: list[list[Any]] = []
        failures: list[TorusError] = []
        rest: Iterator[str] = iter(candidates)
        in_air: dict[asyncio.Future[Any], tuple[str, bool]] = {}
        while True:
            while len(placed) + len(in_air) < copies:
                peer = next(rest, None)
                if peer is None:
                    break
                told = self._before_rings.get(peer, -1.0) < self._loop.time()
                put = self._store(peer).put_block.remote(
                    *(ref, root, sums, False),
                    *([version] if told else []),
                    payload=payload,
                    timeout_s=PUT_TIMEOUT_S,
                    checked=True,
                    resend=True,
                )
                in_air[put.future] = peer, told
            if not in_air:
                break
            done, _ = await asyncio.wait(in_air, return_when=asyncio.FIRST_COMPLETED)
            # In the order they were sent: that of a set differs from run to run.
            for future in [future for future in in_air if future in done]:
                peer, told = in_air.pop(future)
                error = future.exception()
                if error is None:
                    placed.append([peer, future.result()])
                elif isinstance(error, Invalid) and told:
                    self._before_rings[peer] = self._loop.time() + BEFORE_RINGS_S
                    rest = itertools.chain((peer,), rest)
                elif isinstance(error, TorusError):
                    failures.append(error)
                    if isinstance(error, DeadlineExceeded):
                        self._syncs.suspect(peer, PUT_TIMEOUT_S)
                else:
                    raise error
        if placed and len(placed) < copies:
            self._counts["degraded_puts"] += 1
        full = next((e for e in failures if isinstance(e, OutOfSpace)), None)
        if full is not None and len(placed) < copies:
            # Fewer copies because of a dead peer is a state that heals; because of a full cluster
            # it is not, and the writer is the one who can do something about it. Whatever else
            # keeps a peer from taking blocks, a failed disk for one, is as if it were dead.
            raise full
        if not placed:
            raise BlockUnavailable(
                f"no peer took block {ref}: {failures[-1] if failures else 'none is left'}"
            )
        return placed

    @expose(idempotent=True)
    async def flush(self, peers: list[str]) -> dict[str, int]:
        """Make every block put so far durable on these peers.

        Those whose disks hang are left out after some seconds, as dead ones are.

        Returns:
            The incarnation id of each store that confirmed. A store that has another one than when
            it took a block may have lost it, or is not the store which took it.
        """
        return await self._syncs.sync(peers)

    @expose(idempotent=True)
    def copies(self, wanted: int) -> list[int]:
        """How many copies of a block that is put now its writer waits for.

        Args:
            wanted: of a block of data, if more than the ring says.

        Returns:
            Of a block of data, and of a page: no more than there are peers that are well.
        """
        if self._write_level is not WriteLevel.ALL:
            return [1, 1]
        up = self._well()
        wanted = max(wanted, self._view.ring.replication)
        return [min(wanted, up), min(self._view.inode_replication, up)]

    # -- reading -----------------------------------------------------------------------------------

    @expose(deferred=True)
    def read(self, reply: Any, ref: BlockRef, root: int, offset: int, length: int) -> None:
        """Read a page-aligned range of a block, verified against its root checksum.

        Answers one buffer, at most ``length`` bytes: less where the block ends before.

        Raises:
            BlockUnavailable: no replica could give it.
        """
        self._begin(_Read(ref, root, offset, length, reply, self._loop.time()))

    def _begin(self, read: _Read) -> None:
        read.order = self._read_order(read.ref)
        read.tried = 0
        read.hedged = False
        read.failures.clear()
        self._queue.append(read)
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _read_order(self, ref: BlockRef) -> list[str]:
        """Peers in the order to ask them; the list is shared, not to be changed."""
        view, ring = self._view, self._view.ring
        permutation = ring.permutation(ref)
        transport: Any = self.system.transport
        changes = None if transport is None else transport.changes
        of_ring, of_peers, of_transport, of_changes = self._orders_of
        # Not whether they are equal: with a ring that was read again, as after each compaction of
        # etcd, to find that out would cost every read from then on.
        if (
            ring is not of_ring
            or view.peers is not of_peers
            or transport is not of_transport
            or changes != of_changes
        ):
            self._orders.clear()
            self._orders_of = (ring, view.peers, transport, changes)
        copies = min(self._copies(ref), len(permutation))
        first = ref[16] % copies if copies else 0
        key = (permutation, copies, first)
        order = self._orders.get(key)
        if order is None:
            if len(self._orders) * len(permutation) >= ORDERS_PEERS_MAX:
                self._orders.clear()
            order = self._orders[key] = self._make_order(list(permutation), copies, first)
        return order

    def _make_order(self, order: list[str], copies: int, first: int) -> list[str]:
        if self._read_level is not ReadLevel.SEQUENTIAL and len(order) > 1:
            order[:copies] = order[first:copies] + order[:first]
            if self._has_store and self.system.node_id in order[1:copies]:
                order.remove(self.system.node_id)
                order.insert(0, self.system.node_id)
        # A node that has just left the ring still has blocks until it has handed them over.
        order += [peer for peer in self._view.peers if peer not in order]
        order += [peer for peer in self._view.former if peer not in order]
        order.sort(key=self._down)
        return order

    def _dispatch(self) -> None:
        self._dispatching = False
        queue, self._queue = self._queue, []
        by_peer: dict[str, list[_Read]] = {}
        for read in queue:
            wanted = 2 if self._read_level is ReadLevel.SPREAD else 1
            for _ in range(wanted):
                self._next_replica(read, by_peer)
        self._send_all(by_peer)

    def _next_replica(self, read: _Read, by_peer: dict[str, list[_Read]]) -> bool:
        if read.tried >= len(read.order):
            if not read.in_air:
                self._exhausted(read)
            return False
        peer = read.order[read.tried]
        read.tried += 1
        read.in_air += 1
        by_peer.setdefault(peer, []).append(read)
        return True

    def _send_all(self, by_peer: dict[str, list[_Read]]) -> None:
        for peer, reads in by_peer.items():
            batch: list[_Read] = []
            size = 0
            for read in reads:
                if read.length >= ALONE_BYTES_MIN:
                    self._send(peer, [read])
                    continue
                if size + read.length > BATCH_BYTES_MAX or len(batch) >= BATCH_ITEMS_MAX:
                    self._send(peer, batch)
                    batch, size = [], 0
                batch.append(read)
                size += read.length
            if batch:
                self._send(peer, batch)

    def _send(self, peer: str, reads: list[_Read]) -> None:
        pack = RANGE.pack
        items = b"".join([pack(r.ref, r.offset, r.length) for r in reads])
        batch = _Batch(reads, self._loop.time())
        self._batches[batch] = None
        if self._timer is None:
            self._timer = self._loop.call_later(HEDGE_TICK_S, self._hedge)
        ref: ObjectRef[Any] = self._store(peer).read_ranges.remote(items, timeout_s=READ_TIMEOUT_S)
        ref.add_done_callback(partial(self._answered, peer, batch))

    def _answered(self, peer: str, batch: _Batch, future: asyncio.Future[Any]) -> None:
        self._batches.pop(batch, None)
        by_peer: dict[str, list[_Read]] = {}
        error = PeerLost("given up") if future.cancelled() else future.exception()
        answers: list[_Answer] = []
        if error is None:
            latency = self._loop.time() - batch.sent
            self._latency_s += (latency - self._latency_s) / 16
            try:
                answers = _parse_ranges(future.result(), len(batch.reads))
            except TorusError as broken:
                error = broken
        if error is not None:
            told = error if isinstance(error, TorusError) else TorusError(repr(error))
            for read in batch.reads:
                self._missed(read, told, by_peer)
        else:
            for read, answer in zip(batch.reads, answers, strict=True):
                self._deliver(peer, read, answer, by_peer)
        self._send_all(by_peer)

    def _deliver(
        self, peer: str, read: _Read, answer: _Answer, by_peer: dict[str, list[_Read]]
    ) -> None:
        status, sums, data = answer
        if read.reply.done():
            # Another replica was faster; but what this one lacks it shall get.
            if status == Status.MISSING or status == Status.CORRUPT:
                self._wrong(peer, read, Corruption("a late answer"), by_peer, status)
                self._repair_soon(read)
            else:
                self._missed(read, TorusError("answered"), by_peer)
        elif status == Status.OK:
            try:
                size, pages = len(data), len(sums) // 4
                end = read.offset + size
                if size != read.length and not (pages - 1) << 12 < end <= pages << 12:
                    raise Corruption("a range of another length")
                verify_range(sums, read.root, read.offset, data)
            except Corruption as error:
                self._wrong(peer, read, error, by_peer)
                return
            read.in_air -= 1
            read.reply.set(data)
            if read.bad:
                self._repair_soon(read)
        elif status == Status.FAILED:
            self._missed(read, TorusError(f"peer {peer[:8]} could not read it"), by_peer)
        else:
            missing = status == Status.MISSING
            kind, what = (BlockNotExist, "missing") if missing else (Corruption, "damaged")
            self._wrong(peer, read, kind(f"is {what} on {peer[:8]}"), by_peer, status)

    def _wrong(
        self,
        peer: str,
        read: _Read,
        error: TorusError,
        by_peer: dict[str, list[_Read]],
        status: int = Status.CORRUPT,
    ) -> None:
        """A replica does not have what it should."""
        missing = status == Status.MISSING
        self._counts["missing" if missing else "corrupt"] += 1
        if not missing:
            log.warning("block %s on peer %s: %s", read.ref, peer[:8], error)
        if peer not in read.bad and (not missing or peer in self._view.ring.owners(read.ref)):
            read.bad.append(peer)
        self._missed(read, error, by_peer)

    def _missed(self, read: _Read, error: TorusError, by_peer: dict[str, list[_Read]]) -> None:
        read.in_air -= 1
        read.failures.append(error)
        if (read.hedged or not read.in_air) and not read.reply.done():
            self._next_replica(read, by_peer)

    def _exhausted(self, read: _Read) -> None:
        """Every peer was asked: try again if some could not answer, else say so."""
        if read.reply.done():
            return
        waited = self._loop.time() - read.started
        read.rounds += 1
        transient = any(isinstance(e, TRANSIENT) for e in read.failures)
        moving = bool(read.failures) and read.rounds < MISSING_ROUNDS
        if (waited < READ_PATIENCE_S and transient) or moving:
            pause = min(max(RETRY_PAUSE_S, waited), 0.5)
            self._loop.call_later(pause, self._begin, read)
            return
        reason = read.failures[-1] if read.failures else NoPeer("no peer is in the ring")
        error = BlockUnavailable(f"block {read.ref} cannot be read: {reason}")
        error.gone = bool(read.failures) and all(
            isinstance(failure, BlockNotExist) for failure in read.failures
        )
        read.reply.fail(error)

    def _hedge(self) -> None:
        self._timer = None
        if not self._batches:
            return
        self._timer = self._loop.call_later(HEDGE_TICK_S, self._hedge)
        if self._read_level is ReadLevel.SEQUENTIAL:
            return
        patience = min(max(HEDGE_FACTOR * self._latency_s, HEDGE_MIN_S), HEDGE_MAX_S)
        limit = self._loop.time() - patience
        by_peer: dict[str, list[_Read]] = {}
        for batch in self._batches:
            if batch.sent < limit and not batch.hedged:
                batch.hedged = True
                for read in batch.reads:
                    if not read.reply.done() and self._next_replica(read, by_peer):
                        read.hedged = True
                        self._counts["hedged"] += 1
        self._send_all(by_peer)

    # -- repair ------------------------------------------------------------------------------------

    def _repair_soon(self, read: _Read) -> None:
        if self.actor_stopped.is_set():
            return  # a read that outlived its actor; the next one finds the bad copy again
        for peer in read.bad:
            key = (read.ref, peer)
            if self._not_before.get(peer, 0.0) > self._loop.time():
                continue
            if key not in self._repairing and len(self._repairing) < REPAIRS_MAX:
                self._repairing.add(key)
                self.spawn(self._repair(read.ref, read.root, peer))

    async def _repair(self, ref: BlockRef, root: int, peer: str) -> None:
        try:
            await self.repair(ref, root, peer)
        except TorusError as error:
            log.warning("could not repair block %s on peer %s: %s", ref, peer[:8], error)
            if isinstance(error, (OutOfSpace, Closed)):
                self._not_before[peer] = self._loop.time() + REPAIR_PAUSE_S
        finally:
            self._repairing.discard((ref, peer))

    @expose(idempotent=True)
    async def repair(self, ref: BlockRef, root: int, peer: str) -> None:
        """Give a peer a good copy instead of its bad or missing one.

        Raises:
            BlockUnavailable: no other peer has a good one.
        """
        sums, block = await self.fetch_whole(ref, root, avoid=peer)
        await self._store(peer).put_block.remote(
            ref, root, sums, True, payload=block, timeout_s=PUT_TIMEOUT_S, checked=True
        )
        self._counts["repaired"] += 1
        log.info("repaired block %s on peer %s", ref, peer[:8])

    async def fetch_whole(self, ref: BlockRef, root: int, avoid: str = "") -> tuple[bytes, Buffer]:
        """A whole block with its checksum list from any replica that has it right."""
        failure: TorusError = NoPeer("no other peer is left")
        for peer in self._read_order(ref):
            if peer == avoid:
                continue
            try:
                answer = await self._store(peer).read_ranges.remote(
                    whole(ref, self._view.block_size), timeout_s=READ_TIMEOUT_S
                )
                ((status, sums, block),) = _parse_ranges(answer, 1)
                if status != Status.OK or len(sums) != sums_size(len(block)):
                    raise Corruption(f"peer {peer[:8]} has no good copy")
                verify_range(sums, root, 0, block)
                return bytes(sums), block
            except TorusError as error:
                failure = error
        raise BlockUnavailable(f"block {ref}: {failure}")

    @expose(idempotent=True)
    async def place_again(self, ref: BlockRef, root: int, copies: int) -> list[list[Any]]:
        """Store a block anew that some peers lost before it was durable.

        Args:
            ref: the block.
            root: its checksum.
            copies: how many copies to have, if more than the ring says.

        Returns:
            As ``put_block``.
        """
        sums, block = await self.fetch_whole(ref, root)
        return await self.put_block(ref, root, sums, copies, block)

    @expose()
    def discard(self, peer: str, refs: bytes) -> None:
        """Have a peer delete blocks that no head ever named; what it misses is collected later."""
        self._store(peer).discard_blocks.tell(refs)

    @expose()
    def discard_everywhere(self, refs: bytes) -> None:
        """Likewise all peers that are not down: of these blocks it is not known who has them."""
        for peer in self._view.ring.members:
            if not self._down(peer):
                self.discard(peer, refs)

    @expose()
    async def reclaim(self) -> int:
        """Have all collectors look for garbage now; returns how many dead blocks they know of."""
        refs = [
            self.system.actor("collector", node=peer).start_pass.remote(timeout_s=2.0)
            for peer in self._view.ring.members
        ]
        found = 0
        for ref in refs:
            try:
                found += (await ref)["garbage"]
            except TorusError as error:
                log.debug("asking a collector: %s", error)
        return found

    @expose()
    def status(self) -> dict[str, Any]:
        """Counters since the start, and whether fewer peers are well than copies are wanted."""
        members, up = self._view.ring.members, self._well()
        return {
            **self._counts,
            "peers": len(members),
            "peers_up": up,
            "replication": self._view.ring.replication,
            "degraded": up < self._view.ring.replication,
            "read_latency_ms": round(self._latency_s * 1000, 3),
        }


_Answer = tuple[int, memoryview, memoryview]
"""Of one range: Status, checksum list, data."""


def _parse_ranges(answer: Any, count: int) -> list[_Answer]:
    """What a block store answered to ``read_ranges``.

    Raises:
        ProtocolError: it is not an answer to so many ranges.
    """
    packed = answer.result if type(answer) is Reply else answer
    payload = memoryview(answer.joined() if type(answer) is Reply else b"")
    statuses = split_answer(RANGE_STATUS, packed, count)
    if sum(sums + size for _, sums, size in statuses) != len(payload):
        raise ProtocolError(f"{len(payload)} bytes are not those that the answer announces")
    answers: list[_Answer] = []
    at = 0
    for status, sums, size in statuses:
        answers.append((status, payload[at : at + sums], payload[at + sums : at + sums + size]))
        at += sums + size
    return answers
