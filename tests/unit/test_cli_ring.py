"""How ``torusctl peer`` and ``torusctl ring`` change the ring."""

from __future__ import annotations

import asyncio
import random
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import virtual
from torus_actors.cli.common import Failed
from torus_actors.cli.ctl_ring import (
    _all_copies_on,
    _change,
    _may_be_alone,
    _still_needed,
)
from torus_actors.errors import PeerLost
from torus_actors.metadata.cluster import Registrations
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer


@pytest.mark.parametrize("away_s", [12.0, 60.0])
@virtual
async def test_a_change_outlasts_metadata_that_go_away_with_its_answer(away_s: float) -> None:
    """It is made once; if they stay away nobody says that nothing was changed."""
    store = FaultyStore(MemoryStore())
    meta = MetadataService(store, rng=random.Random(1))
    gmd = GlobalMetadata(1 << 14, "crc,base", 1, str(uuid.UUID(int=9)))
    await meta.init(gmd, rings.marshal(rings.make_ring("ketama", version=1, replication=2)))

    def change(present: rings.Ring) -> rings.Ring | None:
        # The answer is lost, and nothing is answered for a while after that.
        store.lose_answers = 1
        asyncio.get_running_loop().call_later(0.001, setattr, store, "down", True)
        asyncio.get_running_loop().call_later(away_s, setattr, store, "down", False)
        return None if present.replication == 3 else present.with_replication(3)

    connection: Any = SimpleNamespace(meta=meta)
    if away_s < 20:
        assert (await _change(connection, change)).version == 2
    else:
        with pytest.raises(Failed, match="look with torusctl ring get"):
            await _change(connection, change)
    await store.close()


@pytest.mark.parametrize(
    ("replication", "leaving", "told"), [(1, 1, True), (2, 1, False), (2, 2, True), (3, 2, False)]
)
def test_who_removes_all_copies_of_a_block_is_told(
    replication: int, leaving: int, told: bool
) -> None:
    """Only nodes out of the ring know of such blocks, and no status tells of them any more."""
    ring = rings.make_ring("ketama", version=1, replication=replication)
    for number in range(4):
        ring = ring.with_peer(Peer(str(uuid.UUID(int=number)), 1 << 30))
    assert bool(_all_copies_on(ring, ring.members[:leaving])) == told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"settled": True, "waiting": 0}, False),
        ({"settled": False, "waiting": 0}, True),  # one that left before hands over, or is gone
        ({"settled": True, "waiting": 3}, True),  # a copy that is down
        (PeerLost("gone"), True),
    ],
)
@virtual
async def test_who_removes_a_node_while_copies_are_lacking_is_told(said: Any, told: bool) -> None:
    """Two nodes that leave one after the other may have all copies of a block, as if together."""
    leaving, staying, unread = (str(uuid.UUID(int=number)) for number in (1, 2, 4))
    infos = [PeerInfo(each, f"10.0.0.{n}:1") for n, each in enumerate((leaving, staying))]

    async def registrations() -> Registrations:
        return Registrations(infos, {unread: "nonsense"}, {})

    async def ask_all(addresses: list[str], actor: str, method: str) -> list[Any]:
        assert (addresses, actor, method) == (["10.0.0.0:1"], "rebalancer", "status")
        return [said]

    connection: Any = SimpleNamespace(
        meta=SimpleNamespace(registrations=registrations), ask_all=ask_all
    )
    gone = str(uuid.UUID(int=3))
    alone = await _may_be_alone(connection, [gone, leaving])
    assert alone == ([leaving] if told else [])
    assert bool(_still_needed(alone)) == told
    assert await _may_be_alone(connection, [unread, gone, leaving]) == [*alone, unread]
