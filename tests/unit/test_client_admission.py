"""A client that starts: whether the nodes let it in, before it takes the lock of a volume."""

from __future__ import annotations

import dataclasses
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.unit.runtime_harness import on_uvloop
from torus_actors import process
from torus_actors.client import Client, ClientConfig
from torus_actors.errors import Unauthenticated
from torus_actors.machine import REAL_MACHINE
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.node import new_global_metadata
from torus_actors.process import Process
from torus_actors.wire.hello import Role

SECRET = b"a secret of the cluster"
OTHER = b"another secret, of one node"
ELSEWHERE = dataclasses.replace(REAL_MACHINE, shortcut=False)
"""Nodes on the client's own machine are found wherever they listen."""


def node_id(number: int) -> str:
    """The id of a node, in the order of the tests' addresses."""
    return str(uuid.UUID(int=number + 1))


@asynccontextmanager
async def listening(number: int, secret: bytes, cluster: str = "") -> AsyncIterator[str]:
    """The address of a node that does nothing but say who it is, and of which cluster."""
    node = Process(node_id(number), Role.NODE, "memory://", secret, random.Random(number))
    await node.start_base(("127.0.0.1", 0), None)
    if cluster:
        await node.system.actor("bridge").set_cluster.remote(cluster)
    _, port = await node.system.actor("bridge").listening.remote()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await node.stop()


@asynccontextmanager
async def taken(silent: bool) -> AsyncIterator[str]:
    """An address where nobody answers: nobody listens, or who does is frozen."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if silent:
            sock.listen()
        yield f"127.0.0.1:{sock.getsockname()[1]}"


async def admit(
    addresses: list[str], moved: list[str] | None = None, outside: Sequence[str] = ()
) -> None:
    """See whether a client of a ring of these is let in.

    Args:
        addresses: of the nodes of the ring.
        moved: where they are by now.
        outside: of nodes that follow them, and are not in the ring.
    """
    store = MemoryStore()
    meta = MetadataService(store, rng=random.Random(1), wall_clock=time.time)
    peers = [Peer(node_id(number), 1, "", address) for number, address in enumerate(addresses)]
    ring = rings.make_ring("mod", version=1, replication=1, peers=peers)
    await meta.init(new_global_metadata(), rings.marshal(ring))
    lease = await meta.grant_lease(60)
    for number, address in enumerate(moved or []):
        await meta.register_peer(PeerInfo(node_id(number), address), lease)
    for number, address in enumerate(outside, len(addresses)):
        await meta.register_peer(PeerInfo(node_id(number), address), lease)

    async def opened() -> MemoryStore:
        return store

    config = ClientConfig(metadata="memory://", secret=SECRET, machine=ELSEWHERE)
    joining = Client(config, random.Random(9))
    await joining.start_base(None, opened)
    try:
        await joining.check_admitted(await joining.load_view(1.0), 1.0)
    finally:
        await joining.stop()


@on_uvloop
async def test_half_of_the_nodes_that_let_a_client_in_are_enough() -> None:
    """Nobody knows who has the wrong secret; blocks are on those, or will be."""
    async with listening(0, OTHER) as other, listening(1, SECRET) as right:
        await admit([other, right])


@on_uvloop
async def test_nodes_that_are_frozen_do_not_hide_that_the_others_let_nobody_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is powered off says nothing, and the secret is as wrong as without it.

    Found by review: the client started, and held the lock of a volume that it could not read.
    """
    monkeypatch.setattr(process, "ADMITTED_S_MAX", 0.2)
    async with listening(0, OTHER) as first, listening(1, OTHER) as second, taken(True) as frozen:
        with pytest.raises(Unauthenticated, match="give the --secret-file of the nodes"):
            await admit([first, second, frozen])


@on_uvloop
async def test_a_node_with_another_secret_keeps_no_client_out_while_the_others_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All machines were switched on together, and one of them has the wrong file."""
    monkeypatch.setattr(process, "ADMITTED_S_MAX", 0.2)
    async with listening(0, OTHER) as other, taken(False) as one, taken(False) as two:
        await admit([other, one, two])


@on_uvloop
async def test_who_is_refused_by_all_is_not_let_in() -> None:
    """It could take locks, and serve what it cannot read."""
    async with listening(0, OTHER) as first, listening(1, OTHER) as second:
        with pytest.raises(Unauthenticated, match="give the --secret-file of the nodes"):
            await admit([first, second])


@on_uvloop
async def test_nodes_that_are_down_keep_no_client_out() -> None:
    """They may be back before they are needed."""
    async with taken(False) as one, taken(False) as two:
        await admit([one, two])


@pytest.mark.parametrize("strangers", [True, False])
@pytest.mark.parametrize("admitted", [True, False])
@on_uvloop
async def test_a_node_that_moved_is_asked_where_it_is_now(strangers: bool, admitted: bool) -> None:
    """Where the ring has it is nobody by now, or a node of another cluster.

    Found by review: with strangers there no client started any more; with nobody there, those that
    no node lets in did.
    """
    before = listening(7, OTHER) if strangers else taken(False)
    async with before as old, listening(0, SECRET if admitted else OTHER) as new:
        if admitted:
            await admit([old], [new])
        else:
            with pytest.raises(Unauthenticated):
                await admit([old], [new])


@on_uvloop
async def test_a_node_with_the_same_wrong_secret_lets_nobody_in() -> None:
    """Found by use: one such node was enough, and what was written went to it alone."""
    wrong = listening(2, SECRET)
    async with listening(0, OTHER) as first, listening(1, OTHER) as second, wrong as third:
        with pytest.raises(Unauthenticated, match="most nodes do not talk to this process"):
            await admit([first, second, third])
        async with listening(3, SECRET) as fourth:
            await admit([first, second, third, fourth])  # nobody knows whose is wrong


@on_uvloop
async def test_nodes_outside_the_ring_keep_no_client_out() -> None:
    """Found by review: some with a wrong secret, that had not joined, kept all clients out."""
    async with (
        listening(0, SECRET) as member,
        listening(1, OTHER) as first,
        listening(2, OTHER) as second,
    ):
        await admit([member], outside=[first, second])


@on_uvloop
async def test_some_that_refuse_keep_no_client_out_while_others_are_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of five are not most of them."""
    monkeypatch.setattr(process, "ADMITTED_S_MAX", 0.2)
    async with (
        listening(0, SECRET) as up,
        listening(1, OTHER) as first,
        listening(2, OTHER) as second,
        taken(False) as one,
        taken(True) as two,
    ):
        await admit([up, first, second, one, two])


@on_uvloop
async def test_nodes_of_another_cluster_keep_no_client_out_that_one_lets_in() -> None:
    """They have the addresses of nodes that are down."""
    async with (
        listening(0, SECRET) as up,
        listening(7, SECRET, "elsewhere") as first,
        listening(8, SECRET, "elsewhere") as second,
    ):
        await admit([up, first, second])


@on_uvloop
async def test_a_ring_without_members_keeps_no_client_out() -> None:
    """Nor is there anybody to wait for."""
    began = time.monotonic()
    await admit([])
    assert time.monotonic() - began < process.ADMITTED_S_MAX
