"""A node tells that its disk does not answer, and since when."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.fakes import Cluster, StorageNode, VirtualLoop, until, virtual
from tests.unit.runtime_harness import on_uvloop, system_of
from tests.unit.test_block_store_actor import put, ref_of
from torus_actors.actors.block_store import CONCURRENCY
from torus_actors.actors.control import Control
from torus_actors.actors.disk_watch import HANGS_S, READ_HANGS_S, DiskWatch
from torus_actors.actors.http import _Collector, problems_of
from torus_actors.runtime import ActorHandle, BlockingActor, ChildSpec, expose
from torus_actors.storage.simdisk import DirectPauses

BLOCK = 16 << 10
EPOCH_S = 1_000_000.0
"""What the wall clock of a test says when the loop's says nothing."""

EVERYTHING = dict.fromkeys(("sync", "run", "write", "read_many", "check"), 3000.0)


async def watched(node: StorageNode) -> ActorHandle:
    """The control actor of a node whose disk is watched."""
    system, opened, journal = node.system, node.opened, node.journal
    assert system is not None and opened is not None and journal is not None
    watch = DiskWatch(system, opened, journal, lambda: EPOCH_S + system.loop.time())
    spec = ChildSpec("control", lambda: Control(node.view, "node", watch), max_concurrency=16)
    await system.actor("root").start_child.remote(spec)
    return system.actor("control")


async def disk_of(control: ActorHandle) -> dict[str, Any]:
    """What a node says of its disk."""
    status = await control.status.remote()
    disk: dict[str, Any] = status["disk"]
    return disk


@pytest.mark.parametrize(
    ("method", "what", "patience_s"),
    [
        ("sync", "syncing blocks", HANGS_S),
        ("write", "writing blocks", HANGS_S),
        ("check", "reading blocks", READ_HANGS_S),
        ("run", "the journal", HANGS_S),
    ],
)
@virtual
async def test_a_disk_that_hangs_is_told_until_it_answers(
    method: str, what: str, patience_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """In the status and in the log, each time once; a disk that is only slow is not told."""
    async with Cluster(nodes=1, journals=True) as cluster:
        node, loop = cluster.node(0), asyncio.get_running_loop()
        control = await watched(node)
        await put(node, ref_of(1), b"1" * BLOCK)
        for takes_s, told in ((patience_s - 1, False), (40.0, True)):
            node.blocking_s = {method: takes_s}
            began = loop.time()
            asked = [
                put(node, ref_of(2 + told), b"2" * BLOCK, timeout_s=600.0),
                node.actor("block_store").flush.remote(timeout_s=600.0),
                node.actor("block_store").check_blocks.remote(ref_of(1), True, timeout_s=600.0),
                node.actor("journal").append.remote(1, 1, 1 + told, payload=b"x", timeout_s=600.0),
            ]
            await asyncio.sleep(33.0)
            disk = await disk_of(control)
            assert disk["calls"] == ([what] if told else [])
            if told:
                # The sync is that of the node itself, once it is quiet.
                assert EPOCH_S + began <= disk["since"] <= EPOCH_S + began + 4.0
                assert disk["since"] + disk["hangs_s"] == EPOCH_S + round(loop.time(), 1)
                assert caplog.text.count("the disk has not answered") == 1 and what in caplog.text
            await asyncio.gather(*asked)
            node.blocking_s = {}
            await asyncio.sleep(50.0)
            assert await disk_of(control) == {"hangs_s": 0.0, "since": 0.0, "calls": []}
        assert caplog.text.count("the disk answers again, after 4") == 1
        assert len(caplog.records) == 2


@virtual
async def test_writes_without_a_thread_are_watched_too() -> None:
    """Small records of the journal go to the disk that way."""
    async with Cluster(nodes=1, journals=True) as cluster:
        node = cluster.node(0)
        await node.stop()
        rng, takes_s = cluster.rng, 0.001
        node.disks[2].direct = DirectPauses(rng, lambda: takes_s, refused=0.0, failed=0.0)
        await node.start()
        control, journal = await watched(node), node.actor("journal")
        await journal.append.remote(1, 1, 1, payload=b"x")
        takes_s = 1000.0
        asked = journal.append.remote(1, 1, 2, payload=b"x", timeout_s=3000.0)
        await asyncio.sleep(30.0)
        assert (await disk_of(control))["calls"] == ["the journal"]
        takes_s = 0.001
        await asked
        assert not (await disk_of(control))["calls"]


@virtual
async def test_a_node_whose_disk_hangs_in_everything_answers_all_the_same() -> None:
    """However many calls wait for it, and though its control actor dies meanwhile."""
    async with Cluster(nodes=1, journals=True) as cluster:
        node = cluster.node(0)
        control = await watched(node)
        await put(node, ref_of(0), b"0" * BLOCK)
        node.blocking_s = EVERYTHING
        store = node.actor("block_store")
        waiting = [store.check_blocks.remote(ref_of(0), True) for _ in range(100)]
        waiting += [put(node, ref_of(n), b"x" * BLOCK) for n in range(1, 100)]
        waiting += [store.flush.remote() for _ in range(CONCURRENCY)]
        await asyncio.sleep(20.0)
        node.kill("control")
        began = asyncio.get_running_loop().time()
        status = await control.status.remote()
        assert asyncio.get_running_loop().time() - began < 2.5
        assert "error" in status["block_store"]
        assert status["disk"]["hangs_s"] > 18.0
        assert status["disk"]["calls"] == ["writing blocks", "syncing blocks"]
        (told,) = [each for each in problems_of(status) if each.startswith("disk")]
        assert "has not answered for 19 s (writing blocks, syncing" in told
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(status, []))
        assert b"torus_disk_hangs_seconds 19" in generate_latest(registry)


@virtual
async def test_a_node_that_stood_still_does_not_blame_its_disk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What came back meanwhile it has not seen yet."""
    async with Cluster(nodes=1, journals=True) as cluster:
        node, loop = cluster.node(0), asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        caplog.set_level(logging.INFO)
        control = await watched(node)
        await put(node, ref_of(0), b"0" * BLOCK)
        node.blocking_s = {"sync": 33.0}
        flushed = node.actor("block_store").flush.remote(timeout_s=600.0)
        await asyncio.sleep(1.5)
        loop.now += 30.0
        assert not (await disk_of(control))["calls"]
        await flushed
        await asyncio.sleep(5.0)
        assert not caplog.records


@on_uvloop
async def test_a_thread_tells_which_call_it_is_in() -> None:
    """Another one for each call; none while it has nothing to do."""
    gate = threading.Event()

    class Waits(BlockingActor):
        @expose()
        def wait(self) -> None:
            gate.wait(10.0)
            gate.clear()

    async with system_of(ChildSpec("waits", Waits)) as system:
        actor: Any = system.cells["waits"].actor
        assert actor.call_under_way is None
        asked = [system.actor("waits").wait.remote() for _ in range(2)]
        await until(lambda: actor.call_under_way is not None)
        first = actor.call_under_way
        assert first.method == "wait"
        gate.set()
        await asked[0]
        await until(lambda: actor.call_under_way is not None)
        assert actor.call_under_way is not first
        gate.set()
        await asked[1]
        assert actor.call_under_way is None
