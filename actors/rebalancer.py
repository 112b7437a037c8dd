"""The rebalancer: moves this node's blocks to where the ring wants them.

Walks the blocks stored here. What one of a block's owners misses is sent to it, by the first of
those that have it: the others look again soon, and send it if nothing comes of that. A copy that
this node holds without being an owner is dropped once every owner has confirmed, by reading it, a
durable copy with the same checksum, and has promised to keep it. What an owner has no room for is
kept by the next node in the ring's order that has. Messages in: ``start_pass``, ``status``; out: to
the block stores of other nodes. Its death costs the pass under way, which begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torus_actors.actors.block_messages import (
    CHECK_STATUS,
    RANGE_STATUS,
    Status,
    split_answer,
    split_records,
    split_refs,
    whole,
)
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import (
    BlockUnavailable,
    Closed,
    DeadlineExceeded,
    OutOfSpace,
    TorusError,
)
from torus_actors.model.checksums import verify_range
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.runtime import LoopActor, Reply, expose

log = logging.getLogger(__name__)

BATCH = 128
"""Blocks looked at together: one question to each owner for all of them."""

SENDS_MAX = 4
"""Blocks on their way at once; each is held in memory whole."""

RATE_BYTES_S = 400 << 20
"""Bound of what one node sends, so that clients keep the larger part of disk and network."""

SHARED_RATE_BYTES_S = 64 << 20
"""The same while clients read and write here: what is sent must not stand in front of them. Three
nodes that heal a fourth's loss move up to 200 MB/s by this."""

SHARED_SENDS_MAX = 1
"""And as many blocks are on their way then: several that come at once make a client wait for all of
them."""

CREDIT_S = 0.03
"""So much time that went by without sending is made up for: disks are slow now and then."""

SERVED_MIN_S = 10.0
"""Requests a second from which on clients count as at work."""

TICK_S = 0.5
"""How often it looks whether the ring or the set of live peers changed."""

SETTLE_S = 1.0
"""A change is acted on when nothing more changed for this long: nodes come and go in groups."""

PASS_EVERY_S = 60.0
"""A pass runs this often even without a change: a client may place blocks by an older view."""

RETRY_FIRST_S = 2.0
"""What could not be moved is tried again after this long; the pause doubles up to a pass's own."""

CONFIRMED_S = 20.0
"""How old an owner's word may be when a copy is dropped because of it; well below VOUCH_S."""

CALL_TIMEOUT_S = 30.0

CONFIRM_AFTER_S = 3.0
"""A store syncs by itself once nothing came for two seconds. To have it do so while others still
send to it makes clients wait for all that is in memory."""

FLUSH_TIMEOUT_S = 120.0
"""What was sent in a pass counts once its receivers have it on their disks."""

DEAD = -1
"""In the place of a root checksum: a node's collector deleted the block, which it need not get."""

LATE_MAX = 4
"""A peer that let so many calls of a pass time out is left alone until the next one: what others
need must not wait for it for ever."""


@dataclass(slots=True)
class Progress:
    """Of the pass under way or the last one; in blocks, but for ``sent_bytes``.

    ``waiting`` are those that an owner does not have because it is down; ``yielded`` those that
    another node is to send; ``failed`` those that could not be moved this time.
    """

    running: bool = False
    passes: int = 0
    total: int = 0
    seen: int = 0
    sent: int = 0
    sent_bytes: int = 0
    dropped: int = 0
    waiting: int = 0
    yielded: int = 0
    failed: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0


class Rebalancer(LoopActor):
    """See the module.

    Args:
        view: the cluster as last seen.
        rate_bytes_s: bound of what it sends, bytes a second.
    """

    def __init__(self, view: ClusterView, rate_bytes_s: int = RATE_BYTES_S) -> None:
        super().__init__()
        self._view = view
        self._rate_max = rate_bytes_s
        self._busy = False
        """Whether clients are at work here."""
        self._reads = 0
        self._looked = (0.0, 0)
        """When it was last looked how busy clients are: loop time, and requests so far but ours."""
        self._asked = asyncio.Event()
        self._progress = Progress()
        self._settled: tuple[Any, ...] | None = None
        """The situation in which a pass last ended with nothing left to do."""
        self._insists = False
        """Whether this pass leaves nothing to others: those get no further."""
        self._late: dict[str, int] = {}
        """How many calls of this pass each peer let time out."""
        self._refusing: dict[tuple[str, int], str] = {}
        """Why peers take no more blocks of a type in this pass: no room, or a failed store."""
        self._relied: set[str] = set()
        """Whose copies this pass has counted."""
        self._incarnations: dict[str, int] = {}
        """Of the stores of others, as far as known: a store that has another one was opened anew,
        and may lack what it had."""
        self._confirming: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(SENDS_MAX)
        self._shared_room = asyncio.Semaphore(SHARED_SENDS_MAX)
        self._next_send = 0.0

    async def setup(self) -> None:
        """Start looking for reasons to move blocks."""
        self.spawn(self._work())

    @expose(remote=True)
    def start_pass(self) -> None:
        """Run a pass now."""
        self._asked.set()

    @expose(remote=True)
    def status(self) -> dict[str, Any]:
        """Progress of the pass under way, or the result of the last one.

        ``settled`` says whether one has ended in the present situation that left nothing to do but
        what waits for a node that is down.
        """
        p = self._progress
        now = self.system.loop.time()
        elapsed = max((now if p.running else p.ended_at) - p.started_at, 1e-6)
        left = max(p.total - p.seen, 0)
        speed = p.seen / elapsed
        return {
            "running": p.running,
            "passes": p.passes,
            "total": p.total,
            "seen": p.seen,
            "left": left if p.running else 0,
            "sent": p.sent,
            "sent_bytes": p.sent_bytes,
            "dropped": p.dropped,
            "waiting": p.waiting,
            "yielded": p.yielded,
            "failed": p.failed,
            "settled": self._settled == self._situation(),
            "eta_s": round(left / speed, 1) if p.running and speed else 0.0,
            "ring_version": self._view.ring.version,
        }

    # -- when --------------------------------------------------------------------------------------

    def _situation(self) -> tuple[Any, ...]:
        transport: Any = self.system.transport
        up = tuple(
            p for p in self._view.ring.members if transport is not None and transport.is_up(p)
        )
        return self._view.ring.version, up

    async def _work(self) -> None:
        loop = self.system.loop
        handled: tuple[Any, ...] | None = None
        last_pass = loop.time()
        retry_s = RETRY_FIRST_S
        in_vain = False
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._asked.wait()
            except TimeoutError:
                pass
            situation = self._situation()
            p = self._progress
            pause_s = retry_s if p.failed or p.yielded else PASS_EVERY_S
            due = loop.time() - last_pass > pause_s
            if situation == handled and not self._asked.is_set() and not due:
                continue
            if situation != handled and not self._asked.is_set():
                await asyncio.sleep(SETTLE_S)
                if self._situation() != situation:
                    continue
            self._asked.clear()
            if self._confirming is not None:
                self._confirming.cancel()
            yielded = p.yielded if situation == handled and not self._insists else 0
            again = situation == handled and (in_vain or not yielded)
            retry_s = min(retry_s * 2, PASS_EVERY_S) if again else RETRY_FIRST_S
            handled = situation
            self._insists = False
            await self._pass()
            if yielded and self._progress.yielded >= yielded:
                self._insists = True
                await self._pass()
            p = self._progress
            # Whoever takes nothing from anybody, full for one, is not asked to every moment.
            in_vain = ((again and in_vain) or self._insists) and not p.sent
            outcome = None if p.failed or p.yielded else situation
            if p.sent or outcome is None:
                self._settled = None
            if outcome is not None:
                self._confirming = self.spawn(self._confirm(outcome, sorted(self._relied)))
            last_pass = loop.time()

    async def _confirm(self, situation: tuple[Any, ...], peers: list[str]) -> None:
        """See to it that all copies that were counted are durable: until then nothing is settled.

        Not a part of the pass: a disk whose syncs hang is not to keep others from being healed.
        """
        await asyncio.sleep(CONFIRM_AFTER_S)
        sure = await asyncio.gather(*[self._is_durable(peer) for peer in peers])
        if all(sure):
            self._settled = situation
        else:
            self._asked.set()

    async def _is_durable(self, peer: str) -> bool:
        """Have a peer flush; False if it may lack by now what it had, and is to be asked again."""
        transport: Any = self.system.transport
        store = self.system.actor("block_store", node=peer)
        # One that goes away is another situation, which is looked at for itself.
        while transport is not None and transport.is_up(peer):
            try:
                found = await store.flush.remote(timeout_s=FLUSH_TIMEOUT_S)
            except TorusError as error:
                log.debug("peer %s may not have what it was sent: %s", peer[:8], error)
                await asyncio.sleep(RETRY_FIRST_S)
                continue
            return self._has_incarnation(peer, found)
        return True

    def _has_incarnation(self, peer: str, found: int) -> bool:
        known = self._incarnations.get(peer, found)
        self._incarnations[peer] = found
        return known == found

    # -- one pass ----------------------------------------------------------------------------------

    async def _pass(self) -> None:
        loop = self.system.loop
        store = self.system.actor("block_store")
        passes = self._progress.passes
        self._progress = p = Progress(running=True, passes=passes, started_at=loop.time())
        self._late.clear()
        self._refusing.clear()
        self._relied.clear()
        try:
            await self._give_way()
            stats = await store.stats.remote()
            p.total = stats["blocks"]["used"] + stats["inodes"]["used"]
            for kind in (0, 1):
                slot: int | None = 0
                while slot is not None:
                    packed, slot = await store.list_blocks.remote(kind, slot, BATCH)
                    if packed:
                        await self._settle_batch(list(split_refs(packed)))
            if p.waiting and len(self._situation()[1]) == len(self._view.ring.members):
                # Whoever they waited for went and came within the pass, which no situation shows.
                p.failed, p.waiting = p.failed + p.waiting, 0
        except TorusError as error:
            p.failed += 1
            log.warning("rebalancing: %s", error)
        finally:
            p.running = False
            p.passes = passes + 1
            p.ended_at = loop.time()
        if p.sent or p.dropped:
            log.info(
                "rebalanced: %d blocks sent, %d dropped, %d wait for a peer",
                p.sent,
                p.dropped,
                p.waiting,
            )

    def _owners(self, ref: BlockRef) -> tuple[str, ...]:
        view = self._view
        owners = view.ring.owners(ref)
        is_page = ref.block_type == BlockType.INODE
        wanted = view.inode_replication if is_page else view.replication
        if wanted > len(owners):
            return tuple(view.ring.permutation(ref)[:wanted])
        return tuple(owners)

    async def _give_way(self) -> None:
        """Send slowly while clients are at work here."""
        stats = await self.system.actor("block_store").stats.remote()
        now, requests = self.system.loop.time(), stats["requests"] - self._reads
        at, before = self._looked
        self._looked = (now, requests)
        self._busy = at > 0 and requests - before >= SERVED_MIN_S * (now - at)

    @property
    def _rate(self) -> int:
        return min(self._rate_max, SHARED_RATE_BYTES_S) if self._busy else self._rate_max

    async def _settle_batch(self, refs: list[BlockRef]) -> None:
        await self._give_way()
        me = self.system.node_id
        p = self._progress
        transport: Any = self.system.transport
        wanted: dict[str, list[BlockRef]] = {}
        foreign: list[BlockRef] = []
        for ref in refs:
            owners = self._owners(ref)
            if not owners:
                continue
            if me not in owners:
                foreign.append(ref)
            waits = False
            for peer in owners:
                if peer == me:
                    continue
                if transport is None or not transport.is_up(peer):
                    waits = True
                elif self._is_left_alone(peer):
                    p.failed += 1
                else:
                    wanted.setdefault(peer, []).append(ref)
            p.waiting += waits
        found = await self._roots(me, refs)
        roots = {ref: root for ref, root in found.items() if root != DEAD}
        there = await self._ask_all(wanted)
        yielded: set[BlockRef] = set()
        refused: dict[BlockRef, int] = {}
        for peer, found in there.items():
            missing = _missing(found, [ref for ref in wanted[peer] if ref in roots], roots)
            others = [ref for ref in missing if self._is_for_another(ref, roots[ref], there)]
            p.yielded += len(others)
            yielded.update(others)
            mine = [ref for ref in missing if ref not in yielded]
            for ref in await self._send_all(peer, mine, roots):
                if (peer, ref.block_type) in self._refusing:
                    refused[ref] = refused.get(ref, 0) + 1
        if refused:
            await self._place_elsewhere(refused, roots)
        foreign = [ref for ref in foreign if ref not in yielded]
        if foreign:
            await self._drop(foreign, roots)
        p.seen += len(refs)

    def _is_for_another(
        self, ref: BlockRef, root: int, there: dict[str, dict[BlockRef, int]]
    ) -> bool:
        """Whether an owner before this node in the ring's order has a block, and is to send it."""
        if self._insists:
            return False
        for peer in self._owners(ref):
            if peer == self.system.node_id:
                return False
            if there.get(peer, {}).get(ref) == root:
                return True
        return False

    async def _place_elsewhere(
        self, refused: dict[BlockRef, int], roots: dict[BlockRef, int]
    ) -> None:
        """Have other nodes keep what owners do not take, full for one, as writers have.

        Args:
            refused: for each block how many of its owners do not take it.
            roots: checksums of what is here.
        """
        me = self.system.node_id
        transport: Any = self.system.transport
        by_peer: dict[str, list[BlockRef]] = {}
        for ref, copies in refused.items():
            owners = self._owners(ref)
            if me not in owners:
                copies -= 1  # the one that is here
            others = [
                peer
                for peer in self._view.ring.permutation(ref)
                if peer not in owners
                and peer != me
                and (transport is not None and transport.is_up(peer))
                and not self._is_left_alone(peer)
                and (peer, ref.block_type) not in self._refusing
            ]
            for peer in others[:copies]:
                by_peer.setdefault(peer, []).append(ref)
        there = await self._ask_all(by_peer)
        for peer, found in there.items():
            await self._send_all(peer, _missing(found, by_peer[peer], roots), roots)

    def _is_left_alone(self, peer: str) -> bool:
        return self._late.get(peer, 0) >= LATE_MAX

    def _was_late(self, peer: str) -> None:
        self._late[peer] = self._late.get(peer, 0) + 1

    async def _roots(
        self,
        peer: str,
        refs: Iterable[BlockRef],
        deep: bool = False,
        durable: bool = False,
        by: int = 0,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[BlockRef, int]:
        """Root checksums of the blocks that a peer has, and when ``deep``, has right; or DEAD.

        When ``durable``, it refuses if it knows a later ring than version ``by``.
        """
        refs = list(refs)
        # An earlier version of this program takes no more than it must.
        how = (deep, True, by) if durable else (deep,)
        answer = await self.system.actor("block_store", node=peer).check_blocks.remote(
            b"".join(refs), *how, timeout_s=timeout_s
        )
        statuses = split_answer(CHECK_STATUS, answer, len(refs))
        return {
            ref: root if status == Status.OK else DEAD
            for ref, (status, root) in zip(refs, statuses, strict=True)
            if status in (Status.OK, Status.DEAD)
        }

    async def _ask_all(self, wanted: dict[str, list[BlockRef]]) -> dict[str, dict[BlockRef, int]]:
        """Root checksums of what each of these peers has, of those that answer."""
        peers = list(wanted)
        answers = await asyncio.gather(
            *[self._ask(peer, wanted[peer]) for peer in peers], return_exceptions=True
        )
        there: dict[str, dict[BlockRef, int]] = {}
        for peer, answer in zip(peers, answers, strict=True):
            if isinstance(answer, TorusError):
                self._progress.failed += len(wanted[peer])
                log.debug("asking peer %s: %s", peer[:8], answer)
                if isinstance(answer, DeadlineExceeded):
                    self._was_late(peer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                there[peer] = answer
                self._relied.add(peer)
        return there

    async def _ask(self, peer: str, refs: list[BlockRef]) -> dict[BlockRef, int]:
        if peer in self._incarnations:
            return await self._roots(peer, refs)
        # What it says that it has need not be there any more when it flushes. Asked first, it is
        # the store of before that answers, or the same.
        stats = self.system.actor("block_store", node=peer).stats.remote(timeout_s=CALL_TIMEOUT_S)
        roots = await self._roots(peer, refs)
        found = await stats
        if isinstance(found, dict) and isinstance(found.get("incarnation_id"), int):
            self._incarnations.setdefault(peer, found["incarnation_id"])
        return roots

    async def _send_all(
        self, peer: str, refs: list[BlockRef], roots: dict[BlockRef, int]
    ) -> list[BlockRef]:
        """Send blocks to a peer; returns those that it did not get."""
        p = self._progress
        lacking = []
        results = await asyncio.gather(
            *[self._send(peer, ref, roots[ref]) for ref in refs], return_exceptions=True
        )
        for ref, result in zip(refs, results, strict=True):
            if isinstance(result, TorusError):
                lacking.append(ref)
                p.failed += 1
                log.debug("sending to peer %s: %s", peer[:8], result)
            elif isinstance(result, BaseException):
                raise result
        return lacking

    async def _send(self, peer: str, ref: BlockRef, root: int) -> None:
        async with self._shared_room if self._busy else self._room:
            if self._is_left_alone(peer):
                raise BlockUnavailable(f"peer {peer[:8]} does not answer in time")
            refusal = self._refusing.get((peer, ref.block_type))
            if refusal is not None:
                raise BlockUnavailable(f"peer {peer[:8]} takes no more: {refusal}")
            self._reads += 1
            answer = await self.system.actor("block_store").read_ranges.remote(
                whole(ref, self._view.block_size)
            )
            packed = answer.result if type(answer) is Reply else answer
            ((status, _, size),) = split_records(RANGE_STATUS, packed)
            if status == Status.MISSING:
                return  # collected meanwhile
            if status != Status.OK:
                raise BlockUnavailable(f"block {ref} cannot be read here")
            sums, data = (memoryview(part) for part in answer.payload)
            # A damaged copy must not travel: the scrubber or a reader repairs it first.
            verify_range(sums, root, 0, data)
            loop = self.system.loop
            pause = self._next_send - loop.time()
            # One that took long does not make the next one wait as long as if it had not.
            self._next_send = max(self._next_send, loop.time() - CREDIT_S) + size / self._rate
            if pause > 0:
                await asyncio.sleep(pause)
            try:
                incarnation = await self.system.actor("block_store", node=peer).put_block.remote(
                    *(ref, root, bytes(sums), True),
                    payload=data,
                    timeout_s=CALL_TIMEOUT_S,
                    checked=True,
                )
            except (OutOfSpace, Closed) as error:
                self._refusing[peer, ref.block_type] = str(error)
                raise
            except DeadlineExceeded:
                self._was_late(peer)
                raise
            self._progress.sent += 1
            self._progress.sent_bytes += size
            if not self._has_incarnation(peer, incarnation):
                self._asked.set()  # what it was sent before, it may have lost

    async def _drop(self, refs: list[BlockRef], roots: dict[BlockRef, int]) -> None:
        """Delete copies that do not belong here, as far as all their owners have them for sure."""
        transport: Any = self.system.transport
        loop = self.system.loop
        by_peer: dict[str, list[BlockRef]] = {}
        safe = []
        version = self._view.ring.version
        for ref in refs:
            owners = self._owners(ref)
            enough = len(owners) >= min(self._view.replication, len(self._view.ring.members))
            if ref not in roots or not enough or self.system.node_id in owners:
                continue
            if not owners:
                continue  # an empty ring: nobody would confirm it, and that be enough
            if transport is None or not all(transport.is_up(peer) for peer in owners):
                continue
            if any(self._is_left_alone(peer) for peer in owners):
                self._progress.failed += 1
                continue
            safe.append(ref)
            for peer in owners:
                by_peer.setdefault(peer, []).append(ref)
        confirmed = dict.fromkeys(safe, True)
        unsure: dict[str, list[BlockRef]] = {}
        not_after = loop.time() + CONFIRMED_S
        for peer, candidates in by_peer.items():
            left_s = not_after - loop.time()
            try:
                there = await self._roots(
                    peer, candidates, deep=True, durable=True, by=version, timeout_s=left_s
                )
            except DeadlineExceeded as error:
                log.debug("asking peer %s: %s", peer[:8], error)
                if len(safe) > 1:
                    # The disk is slow, or stuck at one of them, which must not keep the others.
                    for ref in safe:
                        await self._drop([ref], roots)
                    return
                self._was_late(peer)
                self._progress.failed += 1
                return
            except TorusError as error:
                self._progress.failed += len(candidates)
                log.debug("asking peer %s: %s", peer[:8], error)
                confirmed.update(dict.fromkeys(candidates, False))
                continue
            unsure[peer] = _missing(there, candidates, roots)
            confirmed.update((ref, False) for ref in candidates if there.get(ref) != roots[ref])
        if self._view.ring.version != version:
            confirmed.clear()  # the next pass asks those that are owners now
        dead = [ref for ref, sure in confirmed.items() if sure]
        if dead:
            try:
                self._progress.dropped += await self.system.actor("block_store").drop_blocks.remote(
                    b"".join(dead), not_after
                )
            except TorusError as error:
                # A store that failed deletes nothing, but what is in it can still be sent.
                self._progress.failed += len(dead)
                log.debug("dropping %d blocks: %s", len(dead), error)
        for peer, missing in unsure.items():
            # Missing, or damaged: until it is mended the copy here may be the last good one.
            await self._send_all(peer, missing, roots)


def _missing(
    found: dict[BlockRef, int], refs: Iterable[BlockRef], roots: dict[BlockRef, int]
) -> list[BlockRef]:
    """Of some blocks those that who told ``found`` does not have right, and should."""
    return [ref for ref in refs if found.get(ref) not in (roots[ref], DEAD)]
