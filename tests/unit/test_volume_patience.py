"""A volume whose peers come and go: what its operations wait for, and how many copies there are."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest

from tests.fakes import Cluster, DeviceError, until, virtual
from tests.unit.test_volume_flush import journaling, reopened
from torus_actors.errors import Again, OutOfSpace
from torus_actors.model.inode_tree_pages import FANOUT
from torus_actors.model.refs import BlockRef
from torus_actors.nbd.protocol import Errno
from torus_actors.volume.room import RECLAIM_PATIENCE_S

BLOCK = 16 << 10
SIZE = 100 * BLOCK


@pytest.mark.parametrize("seconds", [0.5, 8.0])
@pytest.mark.parametrize("step", ["pages", "sync"])
@virtual
async def test_a_commit_waits_for_peers_at_every_step(step: str, seconds: float) -> None:
    """No peer can be reached at one of them, as when all connections broke at once.

    Found by the simulator: that cost a client an error at once where pages are put, and within two
    seconds where blocks are made durable, though those who take a block had 20 s.
    """
    async with Cluster(nodes=3, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        client, committer = device.client, device.client.session("v").committer
        next_inode, make_durable = committer._next_inode, committer.make_durable

        def cut_off() -> None:
            for node in cluster.nodes:
                cluster.network.cut(client.node_id, node)
            asyncio.get_running_loop().call_later(seconds, cluster.network.heal)

        def planned() -> int:
            cut_off()
            return next_inode()

        async def begun(pending: Any) -> None:
            cut_off()
            await make_durable(pending)

        if step == "pages":
            committer._next_inode = planned
        else:
            committer.make_durable = begun
        await device.write(0, b"x" * BLOCK)
        await device.flush()
        again = await reopened(device)
        assert await again.read(0, BLOCK) == b"x" * BLOCK


@virtual
async def test_a_journal_and_a_put_outlive_a_broken_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A connection breaks whenever something is on its way over it, and there is another.

    It does not end the journal, and no block is placed elsewhere than it belongs, or anew.
    """
    async with Cluster(nodes=4, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        client, session = device.client, device.client.session("v")
        members, revision = session.journal.members, session.journal._revision
        breaks = 0
        caplog.set_level(logging.INFO, "torus_actors.volume.commit")

        def breaking(source: str, target: str, actor: str, method: str) -> None:
            nonlocal breaks
            if method in {"append", "put_block", "flush"}:
                if breaks % 2 == 0:
                    loop = asyncio.get_running_loop()
                    loop.call_soon(cluster.network.reset, source, target)
                breaks += 1

        cluster.network.trace = breaking
        for n in range(10):
            await device.write(n * BLOCK, b"y" * BLOCK)
            await device.write(90 * BLOCK + n, b"z")
            await device.flush()
        cluster.network.trace = lambda *_: None
        assert breaks > 40
        assert "placed anew" not in caplog.text
        assert session.journal.active
        assert (session.journal.members, session.journal._revision) == (members, revision)
        ring = client.view.ring
        for node in map(cluster.node, range(4)):
            assert all(node.node_id in ring.owners(ref) for ref in node.refs())
        again = await reopened(device)
        assert await again.read(9 * BLOCK, BLOCK) == b"y" * BLOCK
        assert await again.read(90 * BLOCK, 10) == b"z" * 10


@virtual
async def test_a_commit_has_time_while_blocks_are_stored() -> None:
    """All nodes are away for 5 s, and then it takes more than 20 s to store what there is."""
    async with Cluster(nodes=3, replication=2, journals=True, blocks=4000) as cluster:
        device = await cluster.volume(2000 * BLOCK, write_bytes=64 << 20)
        await device.write(0, b"first")
        await device.flush()
        for n in range(2000):
            await device.write(n * BLOCK, b"x" * 4096)
        for node in range(3):
            await cluster.node(node).crash()
        flush = asyncio.ensure_future(device.flush())
        await asyncio.sleep(5.0)
        for node in range(3):
            await cluster.node(node).start()
        cluster.network.latency_s = 0.1
        began = asyncio.get_running_loop().time()
        await flush
        assert asyncio.get_running_loop().time() - began > 20


@virtual
async def test_a_commit_has_time_while_pages_are_stored() -> None:
    """Small writes all over a large volume change so many that they take more than a minute."""
    pages = 520
    async with Cluster(nodes=2, replication=2, blocks=2 * pages) as cluster:
        device = await cluster.volume(pages * FANOUT * BLOCK, write_bytes=64 << 20)
        for n in range(pages):
            await device.write(n * FANOUT * BLOCK, b"x" * 512)
        await until(lambda: not device.client.session("v").file.layers.frozen)
        cluster.network.latency_s = 1.0
        await device.flush()
        cluster.network.latency_s = 0.0
        again = await reopened(device)
        assert await again.read((pages - 1) * FANOUT * BLOCK, 1) == b"x"


@virtual
async def test_a_commit_has_time_for_blocks_that_are_overwritten_meanwhile() -> None:
    """The first that it waits for comes last: it was written again when it was on its way."""
    async with Cluster(nodes=3, replication=2, journals=True, blocks=2000) as cluster:
        device = await cluster.volume(512 * BLOCK, write_bytes=520 * BLOCK)
        await device.write(0, b"first")
        await device.flush()
        cluster.network.latency_s = 0.4
        for content in (b"x", b"y"):
            for n in range(512):
                await device.write(n * BLOCK, content * BLOCK)
        began = asyncio.get_running_loop().time()
        await device.flush()
        assert asyncio.get_running_loop().time() - began > 20


@pytest.mark.parametrize("away", [False, True])
@virtual
async def test_a_full_cluster_is_one_also_after_another_failure(away: bool) -> None:
    """A node is full of garbage, and was away a moment before: writers wait for the collector."""
    async with Cluster(nodes=1, replication=1, blocks=24, collect_s=5.0) as cluster:
        device = await cluster.volume(64 * BLOCK, write_bytes=8 * BLOCK)
        file = device.client.session("v").file
        for n in range(3):  # 24 blocks, 16 of them garbage then, of 31 that it has room for
            for index in range(8):
                await device.write(index * BLOCK, bytes([n]) * BLOCK)
            await device.flush()
        for index in range(8, 15):
            await device.write(index * BLOCK, b"c" * BLOCK)
        await device.flush()
        if away:
            cluster.network.cut(device.client.node_id, cluster.ids[0])
        await device.write(0, b"b" * BLOCK)
        if away:
            await until(lambda: file.put_error is not None)
            cluster.network.heal()
        for index in range(1, 8):
            await device.write(index * BLOCK, b"b" * BLOCK)
            await asyncio.sleep(0.2)
        await device.flush()
        assert await device.read(0, 1) == b"b"


@virtual
async def test_pages_wait_for_room_too() -> None:
    """Their stores are full of pages that were replaced, and there is room for data."""
    pages = 220
    async with Cluster(replication=1, inode_copies=3, blocks=600, collect_s=5.0) as cluster:
        device = await cluster.volume(pages * FANOUT * BLOCK, write_bytes=64 << 20)
        loop = asyncio.get_running_loop()
        longest = 0.0
        for content in (b"a", b"b", b"c", b"d", b"e"):
            for n in range(pages):
                await device.write(n * FANOUT * BLOCK, content * 512)
            began = loop.time()
            await device.flush()
            longest = max(longest, loop.time() - began)
        assert longest > 3.0
        again = await reopened(device)
        assert await again.read((pages - 1) * FANOUT * BLOCK, 1) == b"e"


@virtual
async def test_zeros_that_stay_allocated_hear_of_a_full_cluster_about_as_soon_as_data() -> None:
    """They are written piece by piece, and garbage is collected again and again for some of them.

    Each piece alone waits no longer than any write; the request would wait for minutes.
    """
    async with Cluster(
        nodes=3, replication=2, journals=True, blocks=400, collect_s=10.0
    ) as cluster:
        size = 1000 * BLOCK
        device = await cluster.volume(size, write_bytes=64 * BLOCK)
        for n in range(0, 600, 10):
            await device.write(n * BLOCK, b"y" * 10 * BLOCK)
        await device.flush()
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeviceError) as failed:
            await device.zero(0, size, no_hole=True)
        assert failed.value.errno == Errno.ENOSPC
        assert asyncio.get_running_loop().time() - began < 2 * RECLAIM_PATIENCE_S + 10.0
        await device.trim(0, size)
        await device.write(BLOCK, b"z" * BLOCK, fua=True)
        again = await reopened(device)
        assert await again.read(0, size) == bytes(BLOCK) + b"z" * BLOCK + bytes(size - 2 * BLOCK)


@virtual
async def test_a_full_cluster_takes_trims_whatever_was_replayed() -> None:
    """What was flushed before a crash is more than twice what this client may keep."""
    async with Cluster(nodes=2, replication=2, journals=True, blocks=40) as cluster:
        device = await cluster.volume(64 * BLOCK)
        for index in range(32):
            await device.write(index * BLOCK, b"y" * BLOCK)
        await device.flush()
        for node in cluster.nodes.values():
            store, n = node.stores[0], 0
            while store.stats().free:
                store.put(BlockRef.of(77, 1, n), b"f")
                n += 1
        for index in range(10):
            await device.write(index * BLOCK, b"z" * (BLOCK // 2))
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(20.0)
        again = await (await cluster.client(write_bytes=2 * BLOCK)).open("v")
        assert again.client.session("v").file.layers.size > 4 * BLOCK
        await again.trim(0, 32 * BLOCK)
        await again.flush()
        assert await again.read(0, 64 * BLOCK) == bytes(64 * BLOCK)


@virtual
async def test_what_a_node_lost_waits_for_room_too() -> None:
    """Where it is to be stored anew is full of garbage by then: the flush waits for the collector.

    Found on real processes: it failed within 6 s.
    """
    async with Cluster(nodes=1, replication=1, blocks=24, collect_s=8.0) as cluster:
        device = await cluster.volume(64 * BLOCK, write_bytes=16 * BLOCK)
        other = await cluster.volume(64 * BLOCK, "w")
        for n in range(3):
            for index in range(8):
                await device.write(index * BLOCK, bytes([n]) * BLOCK)
            await device.flush()
        for index in range(8, 15):
            await device.write(index * BLOCK, b"l" * BLOCK)
        await until(lambda: not device.client.session("v").file.layers.size)
        await cluster.node(0).restart()
        for index in range(7):
            await other.write(index * BLOCK, b"o" * BLOCK)
        await other.flush()
        stats = await cluster.node(0).actor("block_store").stats.remote()
        assert not stats["blocks"]["free"]
        began = asyncio.get_running_loop().time()
        await device.flush()
        assert asyncio.get_running_loop().time() - began > 8.0
        again = await reopened(device)
        assert await again.read(14 * BLOCK, 4) == b"llll"


@pytest.mark.parametrize("lost", ["connection", "request"])
@virtual
async def test_a_flush_completes_what_has_too_few_copies(lost: str) -> None:
    """A peer did not take a block, and no other could have it; it is up again at the flush."""
    async with Cluster(nodes=2, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        away, other = cluster.node(0), cluster.node(1)
        if lost == "connection":
            cluster.network.cut(device.client.node_id, away.node_id)
        else:
            cluster.network.lost_requests[away.node_id] = 1
        await device.write(5 * BLOCK, b"f" * BLOCK)
        await asyncio.sleep(0.05)
        cluster.network.heal()
        await asyncio.sleep(1)
        await device.flush()
        assert (await device.client.actor("replicator").status.remote())["degraded_puts"]
        await device.client.crash()
        await other.crash()
        client = await cluster.client()
        await asyncio.sleep(10)
        again = await client.open("v")
        assert await again.read(5 * BLOCK, 4) == b"ffff"


@virtual
async def test_a_flush_outlasts_a_crash_beside_a_slow_sync() -> None:
    """A node crashes as it is asked to sync, and the disk of the other has a lot to write."""
    async with Cluster(nodes=2, replication=2) as cluster:
        cluster.gmd = dataclasses.replace(cluster.gmd, inode_replication=2)
        device = await cluster.volume(SIZE)
        crashing, slow = cluster.node(0), cluster.node(1)
        loop = asyncio.get_running_loop()
        restarts: list[asyncio.Task[None]] = []

        def traced(source: str, target: str, actor: str, method: str) -> None:
            if method == "flush" and target == crashing.node_id and not restarts:
                restarts.append(loop.create_task(crashing.restart()))
                cluster.network.delay_s[slow.node_id] = 25.0
                loop.call_later(20.0, cluster.network.heal)

        cluster.network.trace = traced
        await device.write(0, b"x" * BLOCK)
        await device.flush()
        assert restarts
        await device.client.crash()
        await slow.crash()
        client = await cluster.client()
        await asyncio.sleep(10)
        again = await client.open("v")
        assert await again.read(0, BLOCK) == b"x" * BLOCK


@virtual
async def test_a_flush_has_time_to_place_anew_what_a_node_lost() -> None:
    """A node crashes that had taken so many blocks that it takes more than 20 s to send them."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(200 * BLOCK, write_bytes=400 * BLOCK)
        file = device.client.session("v").file
        for n in range(120):
            await device.write(n * BLOCK, b"x" * BLOCK)
        await until(lambda: not file.layers.size)
        await cluster.node(0).restart()
        cluster.network.latency_s = 1.0
        await device.flush()
        cluster.network.latency_s = 0.0
        await cluster.node(1).crash()
        again = await reopened(device)
        assert await again.read(119 * BLOCK, 1) == b"x"


@virtual
async def test_a_volume_takes_writes_again_when_what_found_no_room_was_trimmed() -> None:
    """Also where nothing but that was to be stored, and garbage was waited for meanwhile."""
    async with Cluster(nodes=2, journals=True, blocks=40) as cluster:
        await cluster.meta.create_volume("other", 64 * BLOCK)
        other = await (await cluster.client()).open("other")
        for index in range(50):
            await other.write(index * BLOCK, bytes([index + 1]) * BLOCK)
        await other.flush()
        device = await cluster.volume(128 * BLOCK)
        file = device.client.session("v").file
        for index in range(6):
            await device.write(index * BLOCK, bytes([index + 1]) * BLOCK)
        await until(lambda: file.reclaiming)
        await device.trim(0, 128 * BLOCK)
        await until(lambda: not file.reclaiming)
        await asyncio.sleep(10.0)
        assert file.put_error is None
        await device.write(0, b"x" * 100)


@virtual
async def test_who_waits_for_one_volume_keeps_nobody_from_another() -> None:
    """A hundred ask for one that takes long to fail. Those who wait too long are told, and gone."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        for name in ("slow", "other"):
            await cluster.meta.create_volume(name, SIZE)
        volumes: Any = device.client.system.cells["volumes"].actor
        attach = volumes._attach

        async def slowly(name: str) -> Any:
            if name == "slow":
                await asyncio.sleep(30.0)
                raise OutOfSpace("not now")
            return await attach(name)

        volumes._attach = slowly
        ask = device.client.actor("volumes").open
        waiting = [ask.remote("slow", timeout_s=600.0).future for _ in range(100)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5.0):
            await ask.remote("other")
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        kinds = [type(answer) for answer in answers]
        assert set(kinds) == {OutOfSpace, Again} and kinds.count(Again) > 80
        assert "slow" not in volumes._open
