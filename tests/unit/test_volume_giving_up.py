"""Giving up a journal that was lost with all nodes that had it."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from tests.fakes import Client, Cluster, Device, virtual
from tests.unit.test_snapshots import content, pattern
from tests.unit.test_volume_flush import BLOCK, SIZE
from torus_actors.errors import BlockUnavailable, Locked, NotExist, OutcomeUnknown, TorusError
from torus_actors.volume.giving_up import give_up_journal

LATE = b"flushed after the last commit"


async def give_up(client: Client, volume: str = "v") -> str:
    """Give it up, as a tool does."""
    assert client.system is not None
    return await give_up_journal(
        client.system,
        client.meta,
        client.view,
        volume,
        holder="tool",
        block_size=BLOCK,
        block_spec="crc,base",
    )


async def crashed(cluster: Cluster) -> Device:
    """Volume ``v``: committed, then flushed to, then left by a client that crashed."""
    device = await cluster.volume(SIZE)
    await device.write(0, pattern(1))
    committed = asyncio.get_running_loop().create_future()
    await device.flush()
    device.client.session("v").commit_soon(committed.set_result)
    assert await committed is None
    await device.write(5000, LATE)
    await device.flush()
    await device.client.crash()
    await asyncio.sleep(30)
    return device


async def members_of(cluster: Cluster) -> list[str]:
    """Nodes with the volume's journal."""
    journal, _ = await cluster.meta.journal(1)
    assert journal is not None
    return list(journal.ensemble)


async def lose_journal(cluster: Cluster) -> None:
    """All nodes that have it lose it; their blocks are there."""
    members = await members_of(cluster)
    assert len(members) == 2
    for member in members:
        await cluster.nodes[member].system.remove("journal")


@virtual
async def test_a_volume_without_its_journal_is_as_the_last_commit_left_it() -> None:
    """It could not be opened; now it can, and goes on like any other."""
    async with Cluster(nodes=4, replication=2, journals=True) as cluster:
        await crashed(cluster)
        await lose_journal(cluster)
        with pytest.raises(BlockUnavailable):
            await (await cluster.client()).open("v")
        why = await give_up(await cluster.client())
        assert why.startswith("no member of the volume's journal")
        assert (await cluster.meta.lock_status(1))[0] is None
        assert await content(cluster, "v") == pattern(1)
        device = await (await cluster.client()).open("v")
        await device.write(100, b"new")
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(30)
        assert (await content(cluster, "v"))[100:103] == b"new"


@virtual
async def test_members_that_come_back_bring_nothing_back() -> None:
    """Whoever opens the volume afterwards asks none of them, and they forget what they have."""
    async with Cluster(nodes=4, replication=2, journals=True, collect_s=5.0) as cluster:
        await crashed(cluster)
        lost = [cluster.nodes[member] for member in await members_of(cluster)]
        cut = [(node.node_id, other) for node in lost for other in cluster.ids]
        for node in lost:
            await node.system.remove("journal")
        assert await give_up(await cluster.client())
        for node in lost:
            await node.stop()
            await node.start()
        assert cut and await content(cluster, "v") == pattern(1)
        device = await (await cluster.client()).open("v")
        await device.write(0, b"after")
        await device.flush()
        await asyncio.sleep(60)
        await device.release()
        assert (await content(cluster, "v"))[5000 : 5000 + len(LATE)] != LATE


@virtual
async def test_a_journal_that_can_be_read_is_not_given_up() -> None:
    """By one member even: what it has is committed instead."""
    async with Cluster(nodes=4, replication=2, journals=True) as cluster:
        await crashed(cluster)
        await cluster.nodes[(await members_of(cluster))[0]].system.remove("journal")
        assert await give_up(await cluster.client()) == ""
        assert (await content(cluster, "v"))[5000 : 5000 + len(LATE)] == LATE


@virtual
async def test_what_is_in_use_or_was_closed_is_left_as_it_is() -> None:
    """The error says who has it; where there is no journal there is nothing to be given up."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await device.flush()
        with pytest.raises(Locked):
            await give_up(await cluster.client())
        await device.release()
        assert await give_up(await cluster.client()) == ""
        assert await content(cluster, "v") == pattern(1)
        with pytest.raises(NotExist):
            await give_up(await cluster.client(), "none")


@virtual
async def test_where_it_cannot_be_committed_nothing_is_given_up() -> None:
    """The members are asked again by whoever comes next: they may be back."""
    async with Cluster(nodes=4, replication=2, journals=True) as cluster:
        await crashed(cluster)
        members = await members_of(cluster)
        for node in cluster.nodes.values():
            await node.stop()
        with pytest.raises(TorusError) as failed:
            await give_up(await cluster.client())
        assert isinstance(failed.value, BlockUnavailable | OutcomeUnknown)
        for node in cluster.nodes.values():
            await node.start()
        assert await members_of(cluster) == members
        await asyncio.sleep(30)
        assert (await content(cluster, "v"))[5000 : 5000 + len(LATE)] == LATE


@virtual
async def test_who_is_killed_on_the_way_leaves_the_volume_whole() -> None:
    """As it was, or given up: it opens, or the command is given again."""
    for cut_s in (0.0, 0.01, 0.1, 1.0, 5.0, 15.0, 21.0):
        async with Cluster(nodes=4, replication=2, journals=True) as cluster:
            await crashed(cluster)
            await lose_journal(cluster)
            tool = await cluster.client()
            work = asyncio.ensure_future(give_up(tool))
            await asyncio.sleep(cut_s)
            await tool.crash()
            work.cancel()
            await asyncio.wait([work])
            await asyncio.sleep(60)
            await give_up(await cluster.client())
            assert await content(cluster, "v") == pattern(1)
