"""The scrubber: finds what is damaged on its node, and does not stop at what it cannot read."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import Cluster, StorageNode, virtual
from tests.unit.test_block_store_actor import BLOCK, put, ref_of
from torus_actors.actors.block_messages import INODE_BLOCK_SIZE
from torus_actors.actors.replicator import Replicator
from torus_actors.actors.scrubber import (
    BATCH,
    CHECK_S,
    FIRST_PASS_AFTER_S,
    MEND_S_MAX,
    RATE_BYTES_S,
    SAVE_S,
    Scrubber,
)
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.runtime import ChildSpec
from torus_actors.storage.scrub_place import PLACE_FILE, ScrubPlace
from torus_actors.storage.simdisk import SimDisk


async def start_scrubber(
    node: StorageNode,
    rate_bytes_s: int = RATE_BYTES_S,
    place: ScrubPlace | None = None,
    block_size: int = BLOCK,
) -> None:
    """Start a scrubber of this node."""
    replicator = ChildSpec(
        "replicator", lambda: Replicator(node.view, has_store=True), max_concurrency=9
    )
    scrubber = ChildSpec("scrubber", lambda: Scrubber(block_size, rate_bytes_s, place=place))
    for spec in (replicator, scrubber):
        await node.system.spawn(spec)


async def scrubbed(node: StorageNode) -> dict[str, Any]:
    """Let a scrubber of this node make one pass; returns its counts."""
    await start_scrubber(node)
    await asyncio.sleep(FIRST_PASS_AFTER_S + 20 * CHECK_S)
    status: dict[str, Any] = await node.actor("scrubber").status.remote()
    assert status["passes"] == 1
    return status


async def with_blocks(cluster: Cluster, count: int) -> StorageNode:
    """Two nodes that have so many blocks; returns the first."""
    for node in (cluster.node(0), cluster.node(1)):
        for n in range(1, count + 1):
            await put(node, ref_of(n), bytes([n]) * BLOCK)
    return cluster.node(0)


@virtual
async def test_a_damaged_block_is_replaced() -> None:
    """By the copy of the other node."""
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 20)
        node.rot(ref_of(7), 100)
        status = await scrubbed(node)
        # It is met again in its new place.
        assert (status["checked"], status["damaged"], status["repaired"]) == (21, 1, 1)


@virtual
async def test_what_is_too_slow_to_be_read_hides_nothing_behind_it() -> None:
    """A drive tries a bad sector again and again for longer than a check may take.

    Only the block that it is in is left out: not its neighbours, nor what comes later.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 40)
        for n in (4, 40):
            node.rot(ref_of(n), 100)
        verify = node.opened.verify
        slow = node.stores[0].locate(ref_of(3)).slot

        async def verify_slowly(kind: int, location: Any, cached_too: bool = False) -> bool:
            if kind == 0 and location.slot == slow:
                await asyncio.sleep(CHECK_S + 10)
            return await verify(kind, location, cached_too)

        node.opened.verify = verify_slowly  # type: ignore[method-assign]
        status = await scrubbed(node)
        assert (status["checked"], status["repaired"], status["failed"]) == (39 + 2, 2, 1)
        assert (status["damaged"], status["unread"]) == (2, 1)


@virtual
async def test_what_could_not_be_repaired_is_soon_when_a_good_copy_is_there_again() -> None:
    """The other node was away when the damage was found: nobody waits for the next pass.

    Until then the status says so.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 20)
        node.rot(ref_of(7), 100)
        cluster.network.cut(*cluster.ids)
        status = await scrubbed(node)
        assert (status["damaged"], status["repaired"], status["unrepaired"]) == (1, 0, 1)
        cluster.network.heal()
        await asyncio.sleep(MEND_S_MAX + 1)
        status = await node.actor("scrubber").status.remote()
        assert (status["passes"], status["repaired"], status["unrepaired"]) == (1, 1, 0)
        assert node.stores[0].get(ref_of(7)) == bytes([7]) * BLOCK


@virtual
async def test_damaged_blocks_that_are_deleted_are_no_longer_told() -> None:
    """What was garbage has been collected."""
    async with Cluster(nodes=1, replication=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), bytes(BLOCK))
        node.rot(ref_of(1), 100)
        assert (await scrubbed(node))["unrepaired"] == 1
        node.stores[0].delete([ref_of(1)])
        await asyncio.sleep(MEND_S_MAX + 1)
        assert (await node.actor("scrubber").status.remote())["unrepaired"] == 0


@virtual
async def test_a_pass_that_is_asked_for_during_a_slow_one_is_fast() -> None:
    """The one under way is hurried, and the next one, which whoever asked waits for, is too.

    Found by review: nothing at all was answered while a pass ran, which may take hours.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 3 * BATCH)
        await start_scrubber(node, BLOCK)
        await asyncio.sleep(FIRST_PASS_AFTER_S + 1.0)
        scrubber = node.actor("scrubber")
        status = await scrubber.status.remote()
        assert status["running"] and not status["passes"]
        await scrubber.start_pass.remote()
        await asyncio.sleep(BATCH + 1.0)  # until the pause that it is in is over
        assert (await scrubber.status.remote())["passes"] == 2


@virtual
@pytest.mark.parametrize("block_size", [4 << 10, 1 << 20])
async def test_pages_take_the_time_of_pages(block_size: int) -> None:
    """However large the data blocks are: with those of 1 MiB a pass took 32 times as long."""
    async with Cluster(nodes=1, replication=1) as cluster:
        node = cluster.node(0)
        for n in range(1, 2 * BATCH + 1):
            await put(node, BlockRef.of(1, n, 1, BlockType.INODE), bytes([n]) * 100)
        # A batch in ten seconds.
        await start_scrubber(node, BATCH * INODE_BLOCK_SIZE // 10, block_size=block_size)
        scrubber = node.actor("scrubber")
        seen = []
        for wait_s in (FIRST_PASS_AFTER_S + 5.0, 10.0, 10.0):
            await asyncio.sleep(wait_s)
            status = await scrubber.status.remote()
            seen.append((status["checked"], status["passes"]))
        assert seen == [(BATCH, 0), (2 * BATCH, 0), (2 * BATCH, 1)]


@virtual
async def test_a_node_that_is_often_started_anew_scrubs_all_blocks() -> None:
    """Each process goes on where the one before was, so that the last slots have their turn too.

    Found by review: all began at the first one.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 6 * BATCH)
        last = ref_of(6 * BATCH)
        node.rot(last, 100)
        disk = SimDisk(random.Random(1))
        # Half a minute a batch, so that no process reads more than three.
        uptime_s = FIRST_PASS_AFTER_S + SAVE_S + 1.0
        for _ in range(3):
            await start_scrubber(node, BATCH * BLOCK * 2 // int(SAVE_S), ScrubPlace.load(disk))
            await asyncio.sleep(uptime_s)
            status = await node.actor("scrubber").status.remote()
            assert not status["passes"]
            for name in ("scrubber", "replicator"):
                await node.system.remove(name)
            disk = disk.kill()
        assert status["repaired"] == 1
        assert node.stores[0].get(last) == bytes([6 * BATCH]) * BLOCK


@virtual
@pytest.mark.parametrize("kind", [0, 1])
async def test_a_pass_is_whole_wherever_it_begins(kind: int) -> None:
    """Whoever asks for one wants all blocks read: data and INode pages, before the place too."""
    async with Cluster(nodes=2, replication=2) as cluster:
        node = await with_blocks(cluster, 3 * BATCH)
        for n in range(3 * BATCH):
            await put(node, ref_of(n, BlockType.INODE), b"page")
        disk = SimDisk(random.Random(1))
        ScrubPlace(disk).save(kind, BATCH)
        place = ScrubPlace.load(disk)
        await start_scrubber(node, place=place)
        await asyncio.sleep(FIRST_PASS_AFTER_S + 1.0)
        status = await node.actor("scrubber").status.remote()
        assert (status["passes"], status["checked"]) == (1, 6 * BATCH)
        assert (place.kind, place.slot) == (0, 0)


@virtual
async def test_a_scrubber_that_died_goes_on_where_it_was() -> None:
    """What holds for the process does for the actor."""
    async with Cluster(nodes=1, replication=1) as cluster:
        node = cluster.node(0)
        for n in range(1, 3 * BATCH + 1):
            await put(node, ref_of(n), bytes([n]) * BLOCK)
        place = ScrubPlace()
        await start_scrubber(node, BLOCK, place)
        await asyncio.sleep(FIRST_PASS_AFTER_S + BATCH + 1.0)
        assert place.slot == BATCH
        await node.system.remove("scrubber")
        await node.system.spawn(ChildSpec("scrubber", lambda: Scrubber(BLOCK, place=place)))
        assert place.slot == BATCH
        await asyncio.sleep(FIRST_PASS_AFTER_S + 1.0)
        assert (await node.actor("scrubber").status.remote())["checked"] == 3 * BATCH


def _with_rot(disk: SimDisk) -> None:
    disk.rot(PLACE_FILE, 9)


def _cut_short(disk: SimDisk) -> None:
    disk.open(PLACE_FILE).truncate(11)


def _unreadable(disk: SimDisk) -> None:
    disk.make_unreadable(PLACE_FILE, 0)


@pytest.mark.parametrize("damage", [_with_rot, _cut_short, _unreadable, SimDisk.crash])
def test_a_place_that_was_lost_is_the_first_slot(damage: Callable[[SimDisk], Any]) -> None:
    """It is a hint: no damage to it keeps a node from its start."""
    disk = SimDisk(random.Random(4))
    place = ScrubPlace.load(disk)
    place.save(1, 7)
    assert (ScrubPlace.load(disk).kind, ScrubPlace.load(disk).slot) == (1, 7)
    after = damage(disk) or disk
    assert (ScrubPlace.load(after).kind, ScrubPlace.load(after).slot) == (0, 0)


@virtual
async def test_a_pass_goes_on_where_its_place_cannot_be_written_down() -> None:
    """On a disk that is full, say."""
    async with Cluster(nodes=1, replication=1) as cluster:
        node = cluster.node(0)
        for n in range(1, 3 * BATCH + 1):
            await put(node, ref_of(n), bytes([n]) * BLOCK)
        disk = SimDisk(random.Random(1))
        disk.inject("create", errno.EIO)
        disk.inject("write", errno.ENOSPC, times=9)
        await start_scrubber(node, BATCH * BLOCK // int(SAVE_S + 1), ScrubPlace.load(disk))
        await asyncio.sleep(FIRST_PASS_AFTER_S + 4 * (SAVE_S + 2))
        status = await node.actor("scrubber").status.remote()
        assert (status["passes"], status["checked"]) == (1, 3 * BATCH)
        assert disk.operations > 1
