"""The ring watcher: what a process knows of the cluster, and for how long."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import Client, Cluster, StorageNode, until, virtual
from tests.unit.test_replicator import Block
from torus_actors.actors.ring_watcher import LARGE_RING, RingWatcher
from torus_actors.metadata.records import PeerInfo
from torus_actors.model import rings
from torus_actors.model.ring_types import KetamaRing
from torus_actors.model.rings import Peer
from torus_actors.runtime import ChildSpec, LoopActor, expose

ADDRESS = "127.0.0.1:40009"


class _Bridge(LoopActor):
    """Takes note of whom the bridge is to know."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, str] = {}

    @expose()
    def set_peers(self, addresses: dict[str, str]) -> None:
        """As the bridge does."""
        self.known = addresses


async def watching(cluster: Cluster) -> tuple[Client, _Bridge]:
    """A client with a ring watcher."""
    client = await cluster.client()
    assert client.system is not None
    await client.system.spawn(ChildSpec("bridge", _Bridge))
    await client.system.spawn(
        ChildSpec("ring_watcher", lambda: RingWatcher(client.meta, client.view))
    )
    bridge: Any = client.system.cells["bridge"].actor
    return client, bridge


async def leave(cluster: Cluster, node: StorageNode) -> int:
    """Take a node out of the ring that is registered; returns its lease."""
    lease = await cluster.meta.grant_lease(10**6)
    await cluster.meta.register_peer(PeerInfo(node.node_id, ADDRESS, incarnation=1), lease)
    cluster.ring = cluster.ring.without_peer(node.node_id)
    await cluster.meta.set_ring(rings.marshal(cluster.ring), cluster.ring.version)
    return lease


@virtual
async def test_a_node_that_hands_over_is_waited_for_though_its_lease_ended() -> None:
    """It left the ring, has the only copy of a block, and is started again, or its lease is.

    The block can be read a moment later, as it could if the node were in the ring.
    """
    async with Cluster(nodes=2, replication=1) as cluster:
        client, _ = await watching(cluster)
        block = Block(1)
        (owner,) = await block.put(client)
        node = cluster.nodes[owner]
        lease = await leave(cluster, node)
        await until(lambda: owner in client.view.peers and owner not in client.view.ring.members)
        await client.actor("replicator").flush.remote([owner])
        await node.crash()
        await cluster.meta.revoke_lease(lease)
        await until(lambda: owner not in client.view.peers)
        reading = asyncio.ensure_future(block.read(client))
        await asyncio.sleep(5)
        await node.start()
        assert await reading == block.data


@virtual
async def test_an_address_outlives_its_registration_for_a_while() -> None:
    """A lease that ended says little of a node: it is reached where it was, or where it says."""
    async with Cluster(nodes=3, replication=1) as cluster:
        client, bridge = await watching(cluster)
        gone = cluster.node(0).node_id
        lease = await leave(cluster, cluster.node(0))
        await until(lambda: bridge.known.get(gone) == ADDRESS)
        await cluster.meta.revoke_lease(lease)
        await until(lambda: gone not in client.view.peers)
        await asyncio.sleep(30)
        assert bridge.known.get(gone) == ADDRESS
        lease = await cluster.meta.grant_lease(10**6)
        moved = PeerInfo(gone, "127.0.0.1:40010", incarnation=2)
        await cluster.meta.register_peer(moved, lease)
        await until(lambda: bridge.known.get(gone) == moved.address)
        await asyncio.sleep(100)
        assert bridge.known.get(gone) == moved.address
        await cluster.meta.revoke_lease(lease)
        await asyncio.sleep(100)
        assert gone not in bridge.known


@virtual
async def test_a_large_ring_is_prepared_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first read would hold up the loop for that, and all I/O with it."""
    beside: list[int] = []

    async def thread(function: Callable[[], None]) -> None:
        # Virtual time waits for no thread.
        beside.append(client.view.ring.version)
        await asyncio.sleep(1)
        function()

    monkeypatch.setattr(asyncio, "to_thread", thread)
    prepared: list[int] = []
    prepare = KetamaRing.prepare
    monkeypatch.setattr(
        KetamaRing, "prepare", lambda ring: (prepared.append(ring.version), prepare(ring))
    )

    async with Cluster(nodes=1, replication=1) as cluster:
        client, _ = await watching(cluster)

        async def grow() -> None:
            peer = Peer(str(uuid.UUID(int=cluster.ring.version)), 1 << 30)
            grown = cluster.ring.with_peer(peer)
            cluster.ring = rings.make_ring("ketama", grown.peers, version=grown.version)
            await cluster.meta.set_ring(rings.marshal(cluster.ring), cluster.ring.version)
            await until(lambda: client.view.ring.version == cluster.ring.version)

        while len(cluster.ring.peers) < LARGE_RING - 1:
            await grow()
        assert not beside
        before = cluster.ring.version
        await grow()
        assert beside == [before] and prepared == [before + 1]
