"""How ``torusctl peer`` and ``torusctl ring`` change the ring, and how a cluster is wiped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tests.fakes import virtual
from torus_actors.cli import common, connect
from torus_actors.cli.common import Failed, Settings
from torus_actors.cli.ctl import cli
from torus_actors.cli.ctl_ring import (
    _all_copies_on,
    _change,
    _may_be_alone,
    _still_needed,
)
from torus_actors.errors import NotExist, PeerLost
from torus_actors.metadata.cluster import Registrations
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.kv import Put
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
    there = Registrations([PeerInfo(each, "10.0.0.1:1") for each in ring.members], {}, {})
    assert bool(_all_copies_on(ring, ring.members[:leaving], there)) == told


def test_who_removes_all_copies_is_told_which_nodes_nobody_can_ask() -> None:
    """Found by reading: the rest was called balanced, and with the node went what was flushed."""
    up, away = (str(uuid.UUID(int=number << 96)) for number in (1, 2))
    ring = rings.make_ring("ketama", version=1, replication=1)
    ring = ring.with_peer(Peer(up, 1 << 30)).with_peer(Peer(away, 1 << 30))
    there = Registrations([PeerInfo(up, "10.0.0.1:1")], {}, {})
    assert "says nothing" not in _all_copies_on(ring, [up], there)
    assert "says nothing of 00000002 before" in _all_copies_on(ring, [up, away], there)


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


def test_a_registration_that_cannot_be_read_is_removed_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no etcd is, nobody could have done so; and until then no garbage is collected.

    A member of the ring leaves that as well, and nobody else does.
    """
    ids = [str(uuid.UUID(int=number << 96)) for number in range(1, 5)]
    member, staying, stranger, fine = ids
    meta = MetadataService(MemoryStore(), rng=random.Random(1))
    gmd = GlobalMetadata(1 << 14, "crc,base", 1, str(uuid.UUID(int=9)))
    ring = rings.make_ring("ketama", [Peer(each, 1 << 30) for each in ids[:2]], replication=1)

    async def prepare() -> None:
        await meta.init(gmd, rings.marshal(ring))
        await meta.register_peer(PeerInfo(fine, "10.0.0.4:1"), await meta.grant_lease(10**6))
        for each in (member, stranger):
            await meta.store.txn([], [Put(meta.keys.peer(each), b"nonsense")])

    async def cluster() -> tuple[GlobalMetadata, rings.Ring]:
        return gmd, rings.unmarshal((await meta.ring())[0])

    async def ask_all(addresses: list[str], *_: str) -> list[Any]:
        assert not addresses
        return []

    @contextlib.asynccontextmanager
    async def connected(settings: Settings) -> AsyncIterator[Any]:
        yield SimpleNamespace(meta=meta, cluster=cluster, ask_all=ask_all)

    async def left() -> tuple[set[str], set[str], set[str]]:
        there = await meta.registrations()
        members = set((await cluster())[1].members)
        return set(there.unread), {info.peer_id for info in there.peers}, members

    monkeypatch.setattr(connect, "connect", connected)
    monkeypatch.setattr(common, "set_up_logging", lambda *_, **__: None)
    asyncio.run(prepare())
    done = CliRunner().invoke(cli, ["peer", "remove", stranger[:8]], obj=Settings())
    assert done.output == "the registration of node 00000003 is removed\n", done.exception
    assert asyncio.run(left()) == ({member}, {fine}, {member, staying})
    done = CliRunner().invoke(cli, ["peer", "remove", fine[:8]], obj=Settings())
    assert isinstance(done.exception, NotExist)
    done = CliRunner().invoke(cli, ["peer", "remove", member[:8]], obj=Settings())
    assert done.output.endswith("the registration of node 00000001 is removed\n")
    assert asyncio.run(left()) == (set(), {fine}, {staying})


@pytest.mark.parametrize("bad", ["global", "volumes/0000000001"])
def test_metadata_that_cannot_be_read_can_be_wiped(
    monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """Nor could a cluster be made in their place."""
    meta = MetadataService(MemoryStore(), rng=random.Random(1))

    async def prepare() -> None:
        await meta.init(GlobalMetadata(1 << 14, "crc,base", 1, str(uuid.UUID(int=9))), b"")
        await meta.store.txn([], [Put(meta.keys.prefix + bad, b"nonsense")])

    async def patiently(ask: Any) -> Any:
        return await ask()

    @contextlib.asynccontextmanager
    async def connected(settings: Settings) -> AsyncIterator[Any]:
        yield SimpleNamespace(meta=meta, patiently=patiently, url="memory://")

    monkeypatch.setattr(connect, "connect", connected)
    monkeypatch.setattr(common, "set_up_logging", lambda *_, **__: None)
    asyncio.run(prepare())
    done = CliRunner().invoke(cli, ["wipe"], obj=Settings())
    assert isinstance(done.exception, Failed) and "nothing was done" in str(done.exception)
    assert asyncio.run(meta.dump())
    done = CliRunner().invoke(cli, ["wipe", "--yes-i-am-sure"], obj=Settings())
    assert done.output.startswith("wiped "), done.exception
    assert not asyncio.run(meta.dump())
