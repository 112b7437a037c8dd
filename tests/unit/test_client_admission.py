"""A client sees whether nodes let it in, before it takes locks; over real loopback TCP."""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.runtime_harness import on_uvloop
from tests.unit.test_bridge import SECRET, End, free_port
from torus_actors import node
from torus_actors.errors import Unauthenticated
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.rings import Peer

OTHER_SECRET = b"a secret of another cluster"


class Fixture:
    """Metadata of a cluster, and the nodes that take part in it."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.meta = MetadataService(self.store, rng=random.Random(1))
        self.gmd = node.new_global_metadata()

    async def open(self) -> MemoryStore:
        """What a client opens."""
        return self.store

    async def init(self, *members: tuple[str, int]) -> None:
        """Make the cluster, with the addresses that the nodes had when they entered the ring."""
        peers = [Peer(name, 1, "", f"127.0.0.1:{port}") for name, port in members]
        ring = rings.make_ring("ketama", version=1, replication=1, peers=peers)
        await self.meta.init(self.gmd, rings.marshal(ring))

    async def register(self, end: End) -> None:
        """Say where a node is now."""
        lease = await self.meta.grant_lease(30)
        info = PeerInfo(end.node, f"127.0.0.1:{end.port}", "", 1, "test", 1)
        await self.meta.register_peer(info, lease)

    @contextlib.asynccontextmanager
    async def node_with(self, secret: bytes, cluster: str = "") -> AsyncIterator[End]:
        """A node that listens."""
        end = End(free_port(), secret, cluster or self.gmd.cluster_id)
        await end.start()
        try:
            yield end
        finally:
            await end.system.stop()

    async def start(self) -> None:
        """Start a client, and stop it again."""
        client = await node.start_client(
            node.ClientConfig(metadata="memory://", secret=SECRET), random.Random(2)
        )
        await client.stop()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Fixture:
    """A cluster whose metadata every client has."""
    made = Fixture()
    monkeypatch.setattr(node, "store_opener", lambda _: made.open)
    return made


@on_uvloop
async def test_who_is_let_in_by_one_node_starts(cluster: Any) -> None:
    """Though another one does not know the secret of the cluster."""
    async with cluster.node_with(SECRET) as good, cluster.node_with(OTHER_SECRET) as bad:
        await cluster.init((good.node, good.port), (bad.node, bad.port))
        await cluster.start()


@on_uvloop
async def test_who_is_refused_by_all_does_not_start(cluster: Any) -> None:
    """It could take locks, and serve what it cannot read."""
    async with cluster.node_with(OTHER_SECRET) as bad:
        await cluster.init((bad.node, bad.port))
        with pytest.raises(Unauthenticated, match="secret-file"):
            await cluster.start()


@on_uvloop
async def test_nodes_that_are_down_keep_no_client_from_its_start(cluster: Any) -> None:
    """They may be back before they are needed."""
    await cluster.init((str(uuid.UUID(int=1)), free_port()))
    await cluster.start()


@pytest.mark.parametrize("where", ["another cluster", "nobody"])
@pytest.mark.parametrize("admitted", [True, False])
@on_uvloop
async def test_a_node_that_moved_is_asked_where_it_is(
    cluster: Any, where: str, admitted: bool
) -> None:
    """The ring has the address that it had when it entered.

    Found by review: nobody else was asked. Where another cluster had the old address no client
    started any more; where nobody had it, those that no node lets in did.
    """
    secret = SECRET if admitted else OTHER_SECRET
    async with (
        cluster.node_with(secret) as moved,
        cluster.node_with(OTHER_SECRET, "another") as stranger,
    ):
        old = stranger.port if where == "another cluster" else free_port()
        await cluster.init((moved.node, old))
        await cluster.register(moved)
        if admitted:
            await cluster.start()
        else:
            with pytest.raises(Unauthenticated):
                await cluster.start()
