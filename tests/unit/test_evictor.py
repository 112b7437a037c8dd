"""The evictor: who is gone for long leaves the ring, and nothing else makes a member leave."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import until, virtual
from torus_actors.actors.evictor import Evictor
from torus_actors.actors.heartbeat import Heartbeat
from torus_actors.actors.ring_watcher import ClusterView, RingWatcher
from torus_actors.errors import CompareFailed, TorusError
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.kv import Delete, Put
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.ring_changes import evict
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.runtime import ActorSystem, ChildSpec, SupervisorSpec

AFTER_S = 60.0
TTL_S = 6


class Member:
    """A node that has a lease, a registration and an evictor, and nothing else."""

    def __init__(self, cluster: Cluster, number: int, joins: bool = True) -> None:
        self.cluster = cluster
        self.peer = Peer(str(uuid.UUID(int=number)), 1 << 30, "", f"127.0.0.1:{40000 + number}")
        self.store = FaultyStore(cluster.store)
        self.joins = joins
        self.incarnation = 1
        self.system: ActorSystem | None = None

    @property
    def id(self) -> str:
        """Of the node."""
        return self.peer.peer_id

    async def start(self) -> None:
        """Start it, as a node that was started before is."""
        rng = random.Random(self.id)
        self.system = ActorSystem(asyncio.get_running_loop(), node_id=self.id, rng=rng)
        meta = MetadataService(self.store, rng=rng, resolve_s=1.0)
        view = ClusterView(self.cluster.gmd, await self.cluster.ring())
        number = self.incarnation
        info = PeerInfo(self.id, self.peer.address, capacity_bytes=1 << 30, incarnation=number)
        rejoin = (lambda: self.peer) if self.joins else None
        await self.system.start(
            SupervisorSpec(
                "root",
                (
                    ChildSpec("ring_watcher", lambda: RingWatcher(meta, view)),
                    ChildSpec(
                        "heartbeat", lambda: Heartbeat(meta, lambda: info, TTL_S), max_concurrency=9
                    ),
                    ChildSpec("evictor", lambda: Evictor(meta, view, TTL_S, AFTER_S, rejoin)),
                ),
            )
        )

    async def stop(self) -> None:
        """End without a word: the lease stays until it ends."""
        system, self.system = self.system, None
        if system is not None:
            await system.stop()

    async def status(self) -> dict[str, Any]:
        """What its evictor says."""
        assert self.system is not None
        answer: dict[str, Any] = await self.system.actor("evictor").status.remote()
        return answer


class Cluster:
    """Members on one store."""

    def __init__(self, members: int, replication: int) -> None:
        self.store = MemoryStore()
        self.meta = MetadataService(self.store, rng=random.Random(0))
        self.gmd = GlobalMetadata(1 << 14, "crc,base", 1, str(uuid.UUID(int=99)))
        self.members = [Member(self, n + 1) for n in range(members)]
        self.replication = replication

    async def ring(self) -> rings.Ring:
        """As the metadata has it."""
        data, _ = await self.meta.ring()
        return rings.unmarshal(data)

    async def ids(self) -> set[str]:
        """Members of the ring."""
        return set((await self.ring()).members)

    async def witness(self, member: Member) -> tuple[str, int]:
        """Its id, and the revision of its registration."""
        return member.id, (await self.meta.registrations()).revisions[member.id]

    async def suspended(self) -> Member:
        """One whose lease ended, and which was taken out of the ring, while it slept."""
        slept = self.members[0]
        assert slept.system is not None
        lease = (await slept.system.actor("heartbeat").status.remote())["lease"]
        await self.meta.revoke_lease(lease)
        ring = (await self.ring()).without_peer(slept.id)
        await self.meta.set_ring(rings.marshal(ring), ring.version)
        return slept


@contextlib.asynccontextmanager
async def running(members: int, replication: int) -> AsyncIterator[Cluster]:
    """A cluster, all of whose members are up."""
    cluster = Cluster(members, replication)
    ring = rings.make_ring(
        "ketama", [m.peer for m in cluster.members], version=1, replication=replication
    )
    await cluster.meta.init(cluster.gmd, rings.marshal(ring))
    try:
        for member in cluster.members:
            await member.start()
        await asyncio.sleep(AFTER_S / 2)
        yield cluster
    finally:
        for member in cluster.members:
            await member.stop()
        await cluster.store.close()


@virtual
async def test_who_is_gone_for_long_leaves_and_comes_back() -> None:
    """A member is gone: not before the time-out, and once, it leaves; started again, it is back."""
    async with running(3, 2) as cluster:
        lost = cluster.members[2]
        await lost.stop()
        await asyncio.sleep(AFTER_S - 1)
        assert lost.id in await cluster.ids()
        says = await cluster.members[0].status()
        assert lost.id in says["missing_s"] and not says["kept"]
        await asyncio.sleep(AFTER_S / 2)
        ring = await cluster.ring()
        assert lost.id not in ring.members and ring.version == 2
        told = [(await m.status())["evicted"] for m in cluster.members[:2]]
        assert sum(told) == 1
        # A node that starts enters the ring first, and is registered after that.
        joined = ring.with_peer(lost.peer)
        await cluster.meta.set_ring(rings.marshal(joined), joined.version)
        await lost.start()
        await asyncio.sleep(2 * AFTER_S)
        assert lost.id in await cluster.ids()


@virtual
async def test_who_was_away_and_taken_out_enters_again() -> None:
    """A member whose lease ended, and which never stopped, was taken out: it is back by itself."""
    async with running(4, 2) as cluster:
        away = cluster.members[0]
        away.store.down = True
        await asyncio.sleep(2 * AFTER_S)
        assert away.id not in await cluster.ids()
        away.store.down = False
        await asyncio.sleep(AFTER_S / 2)
        assert away.id in await cluster.ids()


@virtual
async def test_who_does_not_join_by_itself_stays_out() -> None:
    """Without --auto-join a member that was taken out waits for ``peer add``."""
    async with running(4, 2) as cluster:
        away = cluster.members[0]
        await away.stop()
        away.joins = False
        await away.start()
        away.store.down = True
        await asyncio.sleep(2 * AFTER_S)
        away.store.down = False
        await asyncio.sleep(2 * AFTER_S)
        assert away.id not in await cluster.ids()


@virtual
async def test_whom_an_operator_took_out_stays_out() -> None:
    """A running member is taken out by hand; later leases do not bring it back."""
    async with running(4, 2) as cluster:
        out = cluster.members[1]
        ring = (await cluster.ring()).without_peer(out.id)
        await cluster.meta.set_ring(rings.marshal(ring), ring.version)
        await asyncio.sleep(AFTER_S / 2)
        out.store.down = True
        await asyncio.sleep(3 * TTL_S)
        out.store.down = False
        await asyncio.sleep(2 * AFTER_S)
        assert out.id not in await cluster.ids()


@pytest.mark.parametrize("when", ["running", "just started", "under a new lease"])
@pytest.mark.parametrize("seed", range(3))
@virtual
async def test_whom_an_operator_took_out_stays_out_whatever_comes_next(
    when: str, seed: int
) -> None:
    """Its lease ends a second later, before it would have looked at the ring by itself."""
    async with running(4, 2) as cluster:
        out = cluster.members[seed]
        if when == "just started":
            await out.stop()
            await out.start()
        if when == "under a new lease":
            out.store.down = True
            await asyncio.sleep(3 * TTL_S)
            out.store.down = False
            await asyncio.sleep(1.0)
        await asyncio.sleep(1.0)
        ring = (await cluster.ring()).without_peer(out.id)
        await cluster.meta.set_ring(rings.marshal(ring), ring.version)
        await asyncio.sleep(1.0)
        out.store.down = True
        await asyncio.sleep(3 * TTL_S)
        out.store.down = False
        await asyncio.sleep(2 * AFTER_S)
        assert out.id not in await cluster.ids()


@pytest.mark.parametrize(
    ("members", "replication", "lost"),
    [(2, 2, 1), (3, 3, 1), (4, 2, 2), (3, 1, 2), (5, 2, 3), (2, 1, 1)],
)
@virtual
async def test_never_below_the_copies_and_never_without_a_majority(
    members: int, replication: int, lost: int
) -> None:
    """Too few members would be left, or too few are registered: nobody leaves, ever."""
    async with running(members, replication) as cluster:
        for member in cluster.members[:lost]:
            await member.stop()
        await asyncio.sleep(10 * AFTER_S)
        assert len(await cluster.ids()) == members
        assert (await cluster.members[-1].status())["kept"]


@virtual
async def test_two_do_not_leave_together() -> None:
    """Two of five are lost at once: the second leaves a whole time-out after the first."""
    async with running(5, 2) as cluster:
        loop = asyncio.get_running_loop()
        for member in cluster.members[:2]:
            await member.stop()
        changed: list[float] = []
        for left in (4, 3):
            async with asyncio.timeout(10 * AFTER_S):
                async for data, _ in cluster.meta.ring_watch():
                    if len(rings.unmarshal(data).members) == left:
                        break
            changed.append(loop.time())
        assert changed[1] - changed[0] >= AFTER_S
        await asyncio.sleep(10 * AFTER_S)
        assert len(await cluster.ids()) == 3


@virtual
async def test_an_outage_of_the_metadata_empties_no_ring() -> None:
    """Nobody reaches the metadata for long, and all leases end: nobody leaves, then or after."""
    async with running(5, 2) as cluster:
        for member in cluster.members:
            member.store.down = True
        await asyncio.sleep(10 * AFTER_S)
        assert not await cluster.meta.peers()
        for member in cluster.members:
            member.store.down = False
            await asyncio.sleep(1.0)
        await asyncio.sleep(5 * AFTER_S)
        ring = await cluster.ring()
        assert len(ring.members) == 5 and ring.version == 1


@virtual
async def test_time_counts_only_without_a_gap() -> None:
    """Whoever loses sight of the metadata begins to count anew."""
    async with running(3, 2) as cluster:
        lost = cluster.members[2]
        await lost.stop()
        watchers = cluster.members[:2]
        for _ in range(5):
            await asyncio.sleep(AFTER_S / 2)
            for member in watchers:
                member.store.down = True
            await asyncio.sleep(AFTER_S / 4)
            for member in watchers:
                member.store.down = False
        assert lost.id in await cluster.ids()
        await asyncio.sleep(2 * AFTER_S)
        assert lost.id not in await cluster.ids()


@virtual
async def test_a_minority_beside_the_metadata_takes_nobody_out() -> None:
    """Most members are cut off from the metadata, one is not: it leaves the ring alone."""
    async with running(5, 2) as cluster:
        for member in cluster.members[1:]:
            member.store.down = True
        await asyncio.sleep(20 * AFTER_S)
        assert len(await cluster.ids()) == 5


@virtual
async def test_a_registration_that_cannot_be_read_says_neither_gone_nor_there() -> None:
    """One member's record is nonsense, and another is gone: that one leaves, and the first stays.

    As long as most of those that can be read are registered.
    """
    async with running(5, 2) as cluster:
        unread, lost = cluster.members[3], cluster.members[4]
        await unread.stop()
        key = cluster.meta.keys.peer(unread.id)
        await cluster.store.txn([], [Put(key, b"nonsense")])
        await asyncio.sleep(4 * AFTER_S)
        assert len(await cluster.ids()) == 5
        await lost.stop()
        await asyncio.sleep(2 * AFTER_S)
        assert await cluster.ids() == {each.id for each in cluster.members[:4]}
        assert (await cluster.members[0].status())["missing_s"] == {}
        await cluster.members[1].stop()
        await asyncio.sleep(4 * AFTER_S)
        assert len(await cluster.ids()) == 4


@virtual
async def test_a_registration_that_became_nonsense_is_made_anew() -> None:
    """By the node itself, which sees that it is not registered, and under the lease that it has."""
    async with running(3, 2) as cluster:
        node = cluster.members[2]
        assert node.system is not None
        lease = (await node.system.actor("heartbeat").status.remote())["lease"]
        await cluster.store.txn([], [Put(cluster.meta.keys.peer(node.id), b"nonsense", lease)])
        assert node.id in (await cluster.meta.registrations()).unread
        await asyncio.sleep(AFTER_S / 2)
        assert node.id in {each.peer_id for each in await cluster.meta.peers()}


@virtual
async def test_a_node_whose_registration_cannot_be_read_has_a_lease_all_the_same() -> None:
    """Volumes that it serves are locked under that; the record of another process is in the way."""
    async with running(3, 2) as cluster:
        node = cluster.members[2]
        await node.stop()
        await asyncio.sleep(2 * TTL_S)
        theirs = await cluster.meta.grant_lease(10**6)
        key = cluster.meta.keys.peer(node.id)
        await cluster.store.txn([], [Put(key, b"nonsense", theirs)])
        await node.start()
        await asyncio.sleep(TTL_S)
        assert node.system is not None
        assert (await node.system.actor("heartbeat").status.remote())["lease"]
        await cluster.meta.revoke_lease(theirs)
        await asyncio.sleep(TTL_S)
        assert node.id in {each.peer_id for each in await cluster.meta.peers()}


@virtual
async def test_the_change_itself_demands_that_the_peer_is_not_registered() -> None:
    """Between the decision and the change it registers, or the ring changes: nothing is done."""
    async with running(3, 2) as cluster:
        there, other = cluster.members[0], cluster.members[1]
        witness = await cluster.witness(other)
        assert await evict(cluster.meta, there.id, 1, witness) is None
        assert await evict(cluster.meta, other.id, 7, witness) is None
        ring = (await cluster.ring()).without_peer(there.id)
        with pytest.raises(CompareFailed):
            await cluster.meta.set_ring(rings.marshal(ring), 2, absent=[there.id])
        await there.stop()
        await until(lambda: there.system is None)
        await asyncio.sleep(2 * TTL_S)
        assert await evict(cluster.meta, there.id, 1, (other.id, 3)) is None
        following = await evict(cluster.meta, there.id, 1, witness)
        assert following is not None and there.id not in following.members
        assert await evict(cluster.meta, there.id, 1, witness) is None


@virtual
async def test_what_was_asked_while_a_node_was_gone_does_nothing_when_it_is_back() -> None:
    """The request is stuck on its way, and is carried out when the member is away for a moment.

    That was back meanwhile, and is no longer gone for long.
    """
    async with running(3, 2) as cluster:
        lost, others = cluster.members[2], cluster.members[:2]
        await lost.stop()
        for other in others:
            other.store.delay_requests = 1000
        await until(lambda: any(other.store.delay_requests < 1000 for other in others), 2 * AFTER_S)
        await asyncio.sleep(5)
        for other in others:
            other.store.delay_requests = 0
        await lost.start()
        await asyncio.sleep(AFTER_S)
        await lost.stop()
        await asyncio.sleep(2 * TTL_S)
        assert lost.id not in {each.peer_id for each in await cluster.meta.peers()}
        results = [each for other in others for each in await other.store.arrive()]
        assert results and not any(each.succeeded for each in results)
        assert len(await cluster.ids()) == 3
        await asyncio.sleep(2 * AFTER_S)
        assert lost.id not in await cluster.ids()


@virtual
async def test_who_stood_still_while_it_asked_takes_nobody_out() -> None:
    """Its own lease ended before the change is made; the member was back, and is away again."""
    async with running(3, 2) as cluster:
        lost, asking = cluster.members[2], cluster.members[0]
        await cluster.members[1].stop()
        await cluster.members[1].start()  # it counts anew
        await lost.stop()
        txn, held = asking.store.txn, asyncio.Event()
        stuck = asyncio.Event()

        async def txn_that_waits(*args: Any) -> Any:
            if not held.is_set():
                stuck.set()
                await held.wait()
            return await txn(*args)

        asking.store.txn = txn_that_waits  # type: ignore[method-assign]
        await until(stuck.is_set, 2 * AFTER_S)
        assert asking.system is not None
        lease = (await asking.system.actor("heartbeat").status.remote())["lease"]
        await cluster.meta.revoke_lease(lease)
        await lost.start()
        await asyncio.sleep(TTL_S)
        await lost.stop()
        await asyncio.sleep(2 * TTL_S)
        held.set()
        await asyncio.sleep(TTL_S)
        assert len(await cluster.ids()) == 3


@virtual
async def test_a_node_that_was_not_registered_at_once_is_later() -> None:
    """A newer registration of the same node is still there when it starts, and ends some day.

    The node is registered then, and stays in the ring.
    """
    async with running(3, 2) as cluster:
        node = cluster.members[2]
        await node.stop()
        node.incarnation = 0
        await asyncio.sleep(1)
        await node.start()
        await asyncio.sleep(3 * AFTER_S)
        registered = {each.peer_id: each.incarnation for each in await cluster.meta.peers()}
        assert registered[node.id] == 0
        assert node.id in await cluster.ids()


@virtual
async def test_a_machine_that_was_suspended_comes_back_too() -> None:
    """Its clock stood still: it looks at the ring before it finds out that its lease is over.

    It was taken out meanwhile, and enters again under its next lease.
    """
    async with running(4, 2) as cluster:
        slept = await cluster.suspended()
        assert slept.system is not None
        evictor: Any = slept.system.cells["evictor"].actor
        with contextlib.suppress(TorusError):
            await evictor._look()
        await asyncio.sleep(AFTER_S / 2)
        assert slept.id in await cluster.ids()


@virtual
async def test_a_lease_that_is_replaced_while_the_node_looks_is_no_proof() -> None:
    """It sees a ring without itself under the old lease, and its registration under the new one."""
    async with running(4, 2) as cluster:
        slept = cluster.members[0]
        assert slept.system is not None
        evictor: Any = slept.system.cells["evictor"].actor
        peers = evictor._meta.peers

        async def late() -> list[PeerInfo]:
            evictor._meta.peers = peers
            await asyncio.sleep(TTL_S / 2)
            return await peers()

        evictor._meta.peers = late
        lease = (await slept.system.actor("heartbeat").status.remote())["lease"]
        await cluster.meta.revoke_lease(lease)
        ring = (await cluster.ring()).without_peer(slept.id)
        await cluster.meta.set_ring(rings.marshal(ring), ring.version)
        with contextlib.suppress(TorusError):
            await evictor._look()
        await asyncio.sleep(AFTER_S / 2)
        assert slept.id in await cluster.ids()


@virtual
async def test_who_lost_its_registration_but_not_its_lease_is_registered_again() -> None:
    """The metadata were restored from a backup, say: a node that is well is not taken for gone."""
    async with running(3, 2) as cluster:
        node = cluster.members[0]
        await cluster.store.txn([], [Delete(cluster.meta.keys.peer(node.id))])
        await asyncio.sleep(3 * AFTER_S)
        assert node.id in {each.peer_id for each in await cluster.meta.peers()}
        ring = await cluster.ring()
        assert node.id in ring.members and ring.version == 1


@virtual
async def test_who_was_taken_out_while_suspended_is_back_though_its_evictor_dies_too() -> None:
    """After the node has heard of the ring, and before its next lease: the next evictor knows."""
    async with running(4, 2) as cluster:
        slept = await cluster.suspended()
        assert slept.system is not None
        evictor: Any = slept.system.cells["evictor"].actor
        await until(lambda: slept.id not in evictor._view.ring.members)
        slept.system.cells["evictor"].kill()
        await asyncio.sleep(AFTER_S / 2)
        assert slept.id in await cluster.ids()
