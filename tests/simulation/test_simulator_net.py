"""The simulated network: streams in order, and every way in which they can break."""

# ruff: noqa: D102, D103 - what is no test needs none

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from torus_actors.scenarios.simloop import SimLoop, SimProcess
from torus_actors.scenarios.simnet import SOCKET_BUFFER_BYTES, SimNetwork, SimTransport
from torus_actors.scenarios.trace import Trace

SERVER, CLIENT = "10.0.0.1", "10.0.0.2"


class Sink(asyncio.BufferedProtocol):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost: list[Exception | None] = []
        self.transport: Any = None
        self.paused = 0
        self.resumed = 0
        self._buffer = bytearray(1000)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.resumed += 1


class World:
    """Two hosts, a server on one of them."""

    def __init__(self, seed: int = 1) -> None:
        self.loop = SimLoop()
        self.net = SimNetwork(self.loop, random.Random(seed), Trace())
        self.server = self.loop.new_process("server", SERVER)
        self.client = self.loop.new_process("client", CLIENT)
        self.sinks: list[Sink] = []

    def accept(self) -> Sink:
        self.sinks.append(Sink())
        return self.sinks[-1]

    async def listen(self) -> None:
        await self.server.run(_listen(self.loop, self.accept))

    async def connect(self) -> tuple[SimTransport, Sink]:
        made: tuple[SimTransport, Sink] = await self.client.run(_connect(self.loop))
        return made

    def run(self, play: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            await self.listen()
            await play(self)

        self.loop.run_until_complete(main())
        assert self.loop.errors == []


async def _listen(loop: SimLoop, factory: Callable[[], Sink]) -> Any:
    return await loop.create_server(factory, SERVER, 1)


async def _connect(loop: SimLoop) -> Any:
    return await loop.create_connection(Sink, SERVER, 1)


def in_process(process: SimProcess, function: Callable[..., Any], *args: Any) -> Any:
    return process.context.copy().run(function, *args)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.loop.close()


def test_bytes_arrive_in_order_whole_and_later() -> None:
    """However a stream is cut up and delayed, the same bytes arrive in the same order."""
    for seed in range(5):
        world = World(seed)

        async def play(world: World = world, seed: int = seed) -> None:
            transport, _ = await world.connect()
            rng = random.Random(seed)
            sent = bytearray()
            for _ in range(200):
                pieces = [rng.randbytes(rng.randrange(1, 3000)) for _ in range(3)]
                in_process(world.client, transport.writelines, pieces)
                sent += b"".join(pieces)
                await asyncio.sleep(rng.random() * 0.0002)
            began = world.loop.time()
            await asyncio.sleep(1)
            assert began < world.loop.time()
            assert world.sinks[0].received == sent

        world.run(lambda world, play=play: play())
        world.loop.close()


def test_both_directions_and_end_of_stream(world: World) -> None:
    """What was written before a close arrives, then the end; the closing side is told as well."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        await asyncio.sleep(0.1)
        other = world.sinks[0].transport
        in_process(world.server, other.write, b"hello")
        in_process(world.client, transport.write, b"last words")
        await asyncio.sleep(0.1)
        assert sink.received == b"hello"
        in_process(world.client, transport.close)
        await asyncio.sleep(0.1)
        assert world.sinks[0].received == b"last words"
        assert sink.lost == [None] and world.sinks[0].lost == [None]
        assert world.net.connections == {}

    world.run(play)


def test_a_reader_that_stands_still_pauses_the_writer(world: World) -> None:
    """Back-pressure: once the kernels' buffers are full the writer is told, and told again."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        await asyncio.sleep(0.1)
        receiver = world.sinks[0].transport
        receiver.pause_reading()
        transport.set_write_buffer_limits(high=1000)
        in_process(world.client, transport.write, bytes(SOCKET_BUFFER_BYTES))
        assert not sink.paused
        in_process(world.client, transport.write, bytes(2000))
        assert sink.paused == 1 and transport.get_write_buffer_size() == 2000
        await asyncio.sleep(1)
        assert not sink.resumed
        in_process(world.server, receiver.resume_reading)
        await asyncio.sleep(1)
        assert sink.resumed == 1
        assert len(world.sinks[0].received) == SOCKET_BUFFER_BYTES + 2000

    world.run(play)


def test_a_partition_holds_bytes_back_without_a_word(world: World) -> None:
    """While it lasts nothing arrives and nobody is told; afterwards everything does, in order."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        world.net.block(CLIENT, SERVER)
        for i in range(50):
            in_process(world.client, transport.write, bytes([i]) * 10)
            await asyncio.sleep(0.1)
        assert world.sinks[0].received == b"" and sink.lost == []
        world.net.unblock(CLIENT, SERVER)
        await asyncio.sleep(1)
        assert world.sinks[0].received == b"".join(bytes([i]) * 10 for i in range(50))

    world.run(play)


def test_a_partition_may_be_one_way(world: World) -> None:
    """One direction is cut, the other is not."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        await asyncio.sleep(0.1)
        world.net.block(CLIENT, SERVER)
        in_process(world.client, transport.write, b"unheard")
        in_process(world.server, world.sinks[0].transport.write, b"heard")
        await asyncio.sleep(1)
        assert sink.received == b"heard" and world.sinks[0].received == b""

    world.run(play)


def test_a_reset_tells_both_ends(world: World) -> None:
    """A broken connection is an error on both sides, once."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        await asyncio.sleep(0.1)
        world.net.reset(transport)
        await asyncio.sleep(0.1)
        for end in (sink, world.sinks[0]):
            assert [type(error) for error in end.lost] == [ConnectionResetError]

    world.run(play)


def test_connecting_to_nobody_is_refused(world: World) -> None:
    """A host without a listener refuses at once."""

    async def play(world: World) -> None:
        world.server.kill()
        world.net.process_killed(world.server)
        with pytest.raises(ConnectionRefusedError):
            await world.connect()

    world.run(play)


@pytest.mark.parametrize("how", ["dark", "there", "back"])
def test_connecting_through_nothing_waits(world: World, how: str) -> None:
    """A host without power, or behind a partition in either direction, does not answer at all."""

    async def play(world: World) -> None:
        if how == "dark":
            world.net.power_off(SERVER)
        elif how == "there":
            world.net.block(CLIENT, SERVER)
        else:
            world.net.block(SERVER, CLIENT)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await world.connect()

    world.run(play)


def test_the_end_of_a_process_ends_its_connections(world: World) -> None:
    """The kernel of a killed process closes its connections: the other side learns of it."""

    async def play(world: World) -> None:
        _, sink = await world.connect()
        await asyncio.sleep(0.1)
        world.server.kill()
        world.net.process_killed(world.server)
        await asyncio.sleep(0.1)
        assert len(sink.lost) == 1
        assert world.sinks[0].lost == []

    world.run(play)


def test_a_host_without_power_is_silent_until_it_is_back(world: World) -> None:
    """Nobody is told that it is gone; who writes to it after it came back is."""

    async def play(world: World) -> None:
        transport, sink = await world.connect()
        await asyncio.sleep(0.1)
        world.server.kill()
        world.net.power_off(SERVER)
        in_process(world.client, transport.write, b"anybody there?")
        await asyncio.sleep(60)
        assert sink.lost == []
        world.net.power_on(SERVER)
        in_process(world.client, transport.write, b"anybody there?")
        await asyncio.sleep(1)
        assert [type(error) for error in sink.lost] == [ConnectionResetError]

    world.run(play)


def test_a_paused_process_is_connected_to_by_its_kernel(world: World) -> None:
    """The kernel accepts and buffers for a process that stands still, which reads it later."""

    async def play(world: World) -> None:
        world.server.pause()
        transport, sink = await world.connect()
        in_process(world.client, transport.write, b"patience")
        await asyncio.sleep(10)
        assert world.sinks == [] and sink.lost == []
        world.server.resume()
        await asyncio.sleep(1)
        assert world.sinks[0].received == b"patience"

    world.run(play)


def test_extra_latency_is_felt(world: World) -> None:
    """A slow way delays, by a random time each, and keeps the order."""

    async def play(world: World) -> None:
        transport, _ = await world.connect()
        await asyncio.sleep(0.1)
        world.net.slow(CLIENT, SERVER, 5.0)
        for i in range(10):
            in_process(world.client, transport.write, bytes([i]))
        await asyncio.sleep(0.5)
        assert len(world.sinks[0].received) < 10
        await asyncio.sleep(10)
        assert world.sinks[0].received == bytes(range(10))

    world.run(play)
