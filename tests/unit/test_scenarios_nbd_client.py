"""The NBD client of the real scenarios, against this project's server and somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.integration.cluster import need, until
from torus_actors.errors import Locked
from torus_actors.nbd.memory import MemoryExports
from torus_actors.nbd.protocol import Errno, Rep
from torus_actors.nbd.requests import BlockDevice, ExportInfo, Op, Replies, Reply, Request
from torus_actors.nbd.server import serve
from torus_actors.scenarios.nbd_client import NbdClient, NbdError, Refused

MIB = 1 << 20
DEADLINE_S = 20.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine within a deadline."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(main())


class Slow:
    """Exports of one device that answers when it is told to, and in the order it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[Replies, Request]] = []
        self.arrived = asyncio.Event()

    async def list(self) -> list[str]:
        """One."""
        return ["slow"]

    async def open(self, name: str) -> tuple[ExportInfo, BlockDevice]:
        """Open ``slow``; anything else is held by somebody."""
        if name != "slow":
            raise Locked(f"volume {name} is held by node-7")
        return ExportInfo(name, MIB), self

    async def release(self, name: str) -> None:
        """Nothing is kept."""

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """Keep the requests."""
        self.requests += [(conn, request) for request in requests]
        self.arrived.set()

    async def until(self, count: int) -> None:
        """Wait until that many requests have arrived."""
        while len(self.requests) < count:
            self.arrived.clear()
            await self.arrived.wait()


async def memory_round_trip(path: Path, export: str) -> None:
    """What is written, trimmed and zeroed is read, however it overlaps in time."""
    client = await NbdClient.connect(path, export)
    assert client.size == MIB
    parts = [(n * 4096, bytes([n + 1]) * 4096) for n in range(64)]
    await asyncio.gather(*[client.write(at, data, fua=at % 8192 == 0) for at, data in parts])
    await client.flush()
    found = await asyncio.gather(*[client.read(at, 4096) for at, _ in parts])
    assert found == [data for _, data in parts]
    await asyncio.gather(client.zero(0, 4096), client.trim(8192, 4096, fua=True))
    assert await client.read(0, 12288) == bytes(4096) + bytes([2]) * 4096 + bytes(4096)
    with pytest.raises(NbdError) as told:
        await client.read(MIB - 512, 1024)
    assert told.value.errno == Errno.EINVAL
    assert await client.read(MIB - 512, 512) == bytes(512)
    await client.close()
    with pytest.raises(ConnectionError):
        await client.flush()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Pipelined reads, writes, zeros and trims do what they say; errors carry their number."""

    async def body() -> None:
        listener = await serve(MemoryExports.single(MIB, "one"), path=str(tmp_path / "s"))
        await memory_round_trip(tmp_path / "s", "one")
        await listener.close()

    run(body)


def test_another_server_understands_it(tmp_path: Path) -> None:
    """The same with nbdkit, so that client and server are not wrong in the same way."""
    need("nbdkit")
    program = shutil.which("nbdkit")
    assert program is not None
    path = tmp_path / "kit"
    server = subprocess.Popen([program, "-f", "--unix", str(path), "memory", "1M"])
    try:
        until(path.exists, "nbdkit's socket")

        async def body() -> None:
            await memory_round_trip(path, "")

        run(body)
    finally:
        server.terminate()
        server.wait()


def test_answers_in_any_order(tmp_path: Path) -> None:
    """Each request gets its own answer, whichever comes first; ``close`` waits for them."""

    async def body() -> None:
        device = Slow()
        listener = await serve(device, path=str(tmp_path / "s"))
        client = await NbdClient.connect(tmp_path / "s", "slow")
        reads = [asyncio.create_task(client.read(n * 512, 512)) for n in range(3)]
        await device.until(3)
        leaving = asyncio.create_task(client.close())
        for conn, request in reversed(device.requests):
            assert not leaving.done()
            conn.reply([Reply(request, buffers=[bytes([request.offset // 512]) * 512])])
        assert [set(await read) for read in reads] == [{0}, {1}, {2}]
        await leaving
        await listener.close()

    run(body)


def test_a_lost_server_ends_all_requests(tmp_path: Path) -> None:
    """No request hangs when the connection goes away: each ends with a ConnectionError."""

    async def body() -> None:
        device = Slow()
        listener = await serve(device, path=str(tmp_path / "s"))
        client = await NbdClient.connect(tmp_path / "s", "slow")
        flush = asyncio.create_task(client.flush())
        write = asyncio.create_task(client.write(0, bytes(512)))
        await device.until(2)
        assert {request.op for _, request in device.requests} == {Op.FLUSH, Op.WRITE}
        for connection in list(listener.state.connections):
            connection.abort()
        for task in (flush, write):
            with pytest.raises(ConnectionError):
                await task
        assert client.lost
        await client.close()
        await listener.close()

    run(body)


def test_a_held_export_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The server's text and kind of refusal reach the caller; no server is an OSError."""

    async def body() -> None:
        listener = await serve(Slow(), path=str(tmp_path / "s"))
        with pytest.raises(Refused, match="node-7") as told:
            await NbdClient.connect(tmp_path / "s", "other")
        assert told.value.reply == Rep.ERR_POLICY
        await listener.close()
        with pytest.raises(OSError):
            await NbdClient.connect(tmp_path / "s", "other")

    run(body)


def test_nonsense_ends_the_connection(tmp_path: Path) -> None:
    """A reply that does not begin as one, or that nobody asked for, ends it with an error."""
    answers = [b"x" * 20, b"\x66\x8e\x33\xef\x00\x01\x00\x00" + bytes(7) + b"\x63" + bytes(4)]

    async def body(nonsense: bytes, path: Path) -> None:
        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"NBDMAGICIHAVEOPT\0\3")
            ack = b"\x00\x03\xe8\x89\x04\x55\x65\xa9"
            for option in (8, 7):
                await reader.readexactly(16 if option == 8 else 23)
                info = bytes(2) + MIB.to_bytes(8, "big") + bytes(2)
                if option == 7:
                    writer.write(ack + bytes([0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 12]) + info)
                writer.write(ack + bytes([0, 0, 0, option, 0, 0, 0, 1, 0, 0, 0, 0]))
            await reader.readexactly(28)
            writer.write(nonsense)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(speak, str(path))
        client = await NbdClient.connect(path, "x")
        assert client.size == MIB
        with pytest.raises(ConnectionAbortedError):
            await client.flush()
        await client.close()
        server.close()
        await server.wait_closed()

    for number, nonsense in enumerate(answers):
        run(lambda n=nonsense, p=tmp_path / str(number): body(n, p))
