"""A volume against a model, under concurrency, killed actors, restarted nodes and lost clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.fakes import Client, Cluster, Device, DeviceError, virtual
from torus_actors.actors.replicator import ReadLevel, WriteLevel
from torus_actors.errors import Locked
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Op

SEEDS = range(int(os.environ.get("VOLUME_SEEDS", "5")))
SIZE = 200_000
"""Bytes of the volume: not a whole number of blocks."""

KILLED = ("replicator", "inode_store", "volumes", "volume:v", "nbd_server")
KILLED_ON_NODES = ("block_store", "disk_writer", "disk_reader", "disk_flusher")


class Model:
    """What a volume holds, and what it may hold after its client was lost.

    Attributes:
        now: content, as acknowledged.
        floor: content that the last successful flush made durable.
        later: writes since that flush began, acknowledged or not.
    """

    def __init__(self, size: int) -> None:
        self.now = bytearray(size)
        self.floor = bytes(size)
        self.later: list[tuple[int, bytes]] = []
        self._dropped = 0
        self._open: set[int] = set()

    def begin_write(self, offset: int, data: bytes) -> None:
        """A write is submitted."""
        self.later.append((offset, data))
        self._open.add(id(data))

    def acknowledge(self, offset: int, data: bytes) -> None:
        """It was acknowledged."""
        self.now[offset : offset + len(data)] = data
        self._open.discard(id(data))

    async def flush(self, device: Device) -> None:
        """Flush the volume; what was acknowledged before is durable if it succeeds."""
        content, position = bytes(self.now), self._dropped + len(self._settled())
        await device.flush()
        if position >= self._dropped:  # else a flush that began later was faster
            self.floor = content
            del self.later[: position - self._dropped]
            self._dropped = position

    def _settled(self) -> list[tuple[int, bytes]]:
        """Writes before the first that is not acknowledged."""
        count = 0
        for write in self.later:
            if id(write[1]) in self._open:
                break
            count += 1
        return self.later[:count]

    def check_after_loss(self, found: bytes) -> None:
        """Each byte is the last durable one or one written later."""
        for at, value in enumerate(found):
            if value != self.floor[at]:
                assert any(
                    offset <= at < offset + len(data) and data[at - offset] == value
                    for offset, data in self.later
                ), f"byte {at} is {value}, which is neither durable nor written later"

    def restart_from(self, found: bytes) -> None:
        """What was found after the loss is the content from now on."""
        self.now = bytearray(found)
        self.floor = found
        self._dropped += len(self.later)
        self.later.clear()
        self._open.clear()


class Worker:
    """One series of operations on its own part of the volume, so that the model is exact."""

    def __init__(self, device: Device, model: Model, rng: random.Random, low: int, high: int):
        self.device = device
        self.model = model
        self.rng = rng
        self.low = low
        self.high = high

    def _range(self, longest: int) -> tuple[int, int]:
        length = self.rng.randint(1, min(longest, self.high - self.low))
        if self.rng.random() < 0.3:
            length = min(self.rng.choice([512, 4096, 16384, 32768]), self.high - self.low)
        offset = self.rng.randint(self.low, self.high - length)
        if self.rng.random() < 0.3:
            offset = max(self.low, offset & -4096)
        return offset, length

    async def step(self) -> None:
        """One operation; reads are compared with the model."""
        rng, model, device = self.rng, self.model, self.device
        choice = rng.random()
        if choice < 0.4:
            offset, length = self._range(40_000)
            found = await device.read(offset, length)
            assert found == model.now[offset : offset + length], (offset, length)
        elif choice < 0.8:
            offset, length = self._range(40_000)
            data = rng.randbytes(length)
            model.begin_write(offset, data)
            await device.write(offset, data, fua=rng.random() < 0.05)
            model.acknowledge(offset, data)
        elif choice < 0.93:
            offset, length = self._range(60_000)
            zeros = bytes(length)
            model.begin_write(offset, zeros)
            if rng.random() < 0.5:
                await device.trim(offset, length)
            else:
                await device.zero(offset, length, no_hole=rng.random() < 0.3)
            model.acknowledge(offset, zeros)
        elif choice < 0.97:
            await model.flush(device)
        else:
            await check_extents(device, *self._range(60_000), model.now)


async def check_extents(device: Device, offset: int, length: int, now: bytearray) -> None:
    """Extents cover the range in order, and holes read as zeros."""
    reply = await device.do(Op.BLOCK_STATUS, offset, length)
    position = offset
    for size, flags in reply.extents:
        if flags:
            assert not any(now[position : position + size]), (position, size)
        position += size
    assert position == offset + length


async def run_all(steps: list[Coroutine[Any, Any, None]]) -> None:
    """Run together; the first failure ends the test."""
    async with asyncio.TaskGroup() as group:
        for step in steps:
            group.create_task(step)


async def disturb(cluster: Cluster, client: Client, rng: random.Random, nodes: bool) -> None:
    """Kill something, after a moment."""
    await asyncio.sleep(rng.random() * 0.01)
    if client.system is None:
        return
    if rng.random() < 0.6:
        name = rng.choice(KILLED)
        if name in client.system.cells:
            client.kill(name)
        return
    node = rng.choice(list(cluster.nodes.values()))
    if nodes and rng.random() < 0.3:
        await node.restart()
        await asyncio.sleep(1.0)
    elif node.system is not None:
        node.kill(rng.choice(KILLED_ON_NODES))


@pytest.mark.parametrize("seed", SEEDS)
@virtual
async def test_reads_see_every_acknowledged_write_whatever_is_killed(seed: int) -> None:
    """Random operations on odd ranges, several at once, equal those on a byte array.

    Though actors die and nodes restart, no request fails, and none is answered twice.
    """
    rng = random.Random(seed)
    level = rng.choice(list(ReadLevel))
    async with Cluster(nodes=3, replication=2, seed=seed, blocks=400, collect_s=1.0) as cluster:
        device = await cluster.volume(
            SIZE,
            read_bytes=rng.choice([1 << 10, 64 << 10, 1 << 20]),
            write_bytes=rng.choice([20_000, 64 << 10, 1 << 20]),
            read_level=level,
            write_level=rng.choice([WriteLevel.ALL, WriteLevel.ALL, WriteLevel.ONE]),
        )
        model = Model(SIZE)
        parts = 4
        edges = [SIZE * n // parts + (n % 2) for n in range(parts)] + [SIZE]
        workers = [
            Worker(device, model, random.Random(rng.random()), low, high)
            for low, high in itertools.pairwise(edges)
        ]
        for _ in range(30):
            steps = [worker.step() for worker in workers]
            if rng.random() < 0.4:
                steps.append(disturb(cluster, device.client, rng, nodes=True))
            await run_all(steps)
        await model.flush(device)
        assert await device.read(0, SIZE) == model.now
        assert not device.in_flight
        file = device.client.session("v").file
        assert file.layers.size == 0 and not file.unsynced
        await device.release()


@pytest.mark.parametrize("seed", SEEDS)
@virtual
async def test_a_lost_client_loses_nothing_that_was_flushed(seed: int) -> None:
    """After a client is gone without a flush.

    Another finds in each byte what the last successful flush made durable, or something written
    later; several times over, with nodes restarting.
    """
    rng = random.Random(1000 + seed)
    async with Cluster(nodes=3, replication=2, seed=seed, blocks=400, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE, write_bytes=64 << 10)
        model = Model(SIZE)
        for _ in range(4):
            await _work_until_lost(cluster, device, model, rng)
            if rng.random() < 0.5:
                await rng.choice(list(cluster.nodes.values())).restart()
            client = await cluster.client(write_bytes=64 << 10)
            while True:
                try:
                    device = await client.open("v")
                    break
                except Locked:
                    await asyncio.sleep(1.0)
            found = await device.read(0, SIZE)
            model.check_after_loss(found)
            model.restart_from(found)


async def _work_until_lost(
    cluster: Cluster, device: Device, model: Model, rng: random.Random
) -> None:
    worker = Worker(device, model, random.Random(rng.random()), 0, SIZE)

    async def work() -> None:
        while True:
            await worker.step()

    async def flush() -> None:
        while True:
            await asyncio.sleep(rng.random() * 0.02)
            await model.flush(device)

    tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(flush())]
    for _ in range(3):
        await asyncio.sleep(rng.random() * 0.2)
        await disturb(cluster, device.client, rng, nodes=True)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    await asyncio.wait(tasks)
    await device.client.crash()


@virtual
async def test_the_oracle_finds_a_lost_flush() -> None:
    """The check of the test above fails when what a flush covered is gone."""
    model = Model(10)
    model.floor = b"0123456789"
    model.later = [(2, b"ab")]
    model.check_after_loss(b"01ab456789")
    with pytest.raises(AssertionError):
        model.check_after_loss(b"01ab45678x")


@virtual
async def test_errors_are_answers_too() -> None:
    """With no node left each request is answered, reads and flushes with EIO."""
    async with Cluster(nodes=1, replication=1) as cluster:
        device = await cluster.volume(SIZE, write_bytes=1 << 20, read_bytes=0)
        await device.write(0, b"x" * 16384)
        await device.flush()
        await cluster.node(0).crash()
        with pytest.raises(DeviceError) as failed:
            await device.read(0, 4096)
        assert failed.value.errno == Errno.EIO
        await device.write(5, b"y")
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.EIO
        await cluster.node(0).start()
        await device.flush()
        assert await device.read(0, 6) == b"xxxxxy"
