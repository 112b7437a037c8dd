"""The NBD server on real sockets, with a client that speaks raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.unit.runtime_harness import system_of
from torus_actors.actors.nbd_server import NbdAddress, NbdServer
from torus_actors.errors import Exists, Invalid, Locked, OutOfSpace
from torus_actors.model.addresses import parse_address
from torus_actors.nbd import connection as conn
from torus_actors.nbd import protocol as p
from torus_actors.nbd import transmission as tr
from torus_actors.nbd.connection import NbdConnection, NbdState, TlsSettings
from torus_actors.nbd.memory import MemoryExports
from torus_actors.nbd.protocol import Cmd, Errno, Opt, Rep
from torus_actors.nbd.requests import BlockDevice, ExportInfo, Replies, Reply, Request
from torus_actors.nbd.server import NbdListener, serve
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, expose, get

MIB = 1 << 20
DEADLINE_S = 20.0

Test = Callable[[Path], Awaitable[None]]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Test], None]:
    """Run a test's coroutine on either loop, within a deadline."""

    def runner(test: Test) -> None:
        async def main() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test(tmp_path)

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as loop:
            loop.run(main())
        gc.collect()

    return runner


class Held:
    """A device that answers only when the test says so."""

    def __init__(self) -> None:
        self.batches: list[tuple[Replies, list[Request]]] = []
        self.arrived = asyncio.Event()

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """Keep the batch."""
        self.batches.append((conn, requests))
        self.arrived.set()

    @property
    def requests(self) -> list[Request]:
        """All requests so far."""
        return [request for _, batch in self.batches for request in batch]

    async def until(self, count: int) -> None:
        """Wait until that many requests arrived."""
        while len(self.requests) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def answer(self, *cookies: int, data: bytes = b"") -> None:
        """Answer requests by cookie, in that order, one call each."""
        for cookie in cookies:
            for sink, batch in self.batches:
                for request in batch:
                    if request.cookie == cookie:
                        sink.reply([Reply(request, buffers=[data] if data else [])])


class One:
    """Exports that are one given device, and count what is open."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.opened = 0
        self.released = 0
        self.gate: asyncio.Event | None = None
        self.opening = asyncio.Event()

    async def list(self) -> list[str]:
        """Refuse."""
        raise Locked("not today")

    async def open(self, name: str) -> tuple[ExportInfo, BlockDevice]:
        """Open, once the gate is open."""
        self.opening.set()
        if self.gate is not None:
            await self.gate.wait()
        if name == "locked":
            raise Locked("volume locked is held by node-7")
        self.opened += 1
        return ExportInfo(name, 1 << 30), self.device

    async def release(self, name: str) -> None:
        """Count."""
        self.released += 1


class Client:
    """A raw client, past its handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def raw(cls, path: Path | str) -> Client:
        """Connect and send the client flags."""
        client = cls(*await asyncio.open_unix_connection(str(path)))
        assert await client.reader.readexactly(18) == b"NBDMAGICIHAVEOPT\0\3"
        client.writer.write(b"\0\0\0\3")
        return client

    @classmethod
    async def connect(cls, path: Path | str, behind: bytes = b"") -> Client:
        """Connect and enter transmission with simple replies."""
        client = await cls.raw(path)
        client.writer.write(p.OPTION.pack(p.OPTION_MAGIC, Opt.EXPORT_NAME, 1) + b"x" + behind)
        await client.reader.readexactly(10)
        return client

    async def option(self, code: int, data: bytes = b"") -> tuple[int, bytes]:
        """Send an option; the type and data of its first reply."""
        self.writer.write(p.OPTION.pack(p.OPTION_MAGIC, code, len(data)) + data)
        _, _, rep, length = p.OPTION_REPLY.unpack(await self.reader.readexactly(20))
        return rep, await self.reader.readexactly(length)

    def send(self, cmd: int, offset: int = 0, length: int = 0, cookie: int = 0) -> None:
        """Send a request; a WRITE with zeroes."""
        raw = p.REQUEST.pack(p.REQUEST_MAGIC, 0, cmd, cookie, offset, length)
        self.writer.write(raw + bytes(length if cmd == Cmd.WRITE else 0))

    async def reply(self) -> tuple[int, int]:
        """Cookie and errno of the next simple reply; its data is left to the caller."""
        magic, error, cookie = p.SIMPLE_REPLY.unpack(await self.reader.readexactly(16))
        assert magic == p.SIMPLE_REPLY_MAGIC
        return cookie, error

    async def ended(self) -> None:
        """Wait for the server to end the connection, and take leave."""
        while await self.reader.read(MIB):
            pass
        await self.leave()

    async def leave(self) -> None:
        """Drop the connection."""
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces; the test's deadline bounds it."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def gone(state: NbdState) -> None:
    """Wait until the state has no connection and no work left."""
    while state.connections:
        await asyncio.wait([c.lost for c in state.connections if c.lost is not None])
    await state.settled()


async def start(folder: Path, exports: One) -> NbdListener:
    """Listen on ``s`` in that folder."""
    return await serve(exports, path=str(folder / "s"))


def test_what_arrives_together_is_one_batch_and_answers_come_in_any_order(
    run: Callable[[Test], None],
) -> None:
    """Regression, found by reading: NBD serves one request at a time.

    Here sixteen requests in one segment are one submit; the answers go back as the device gives.
    """

    async def body(folder: Path) -> None:
        device = Held()
        exports = One(device)
        listener = await start(folder, exports)
        stream = b"".join(
            p.REQUEST.pack(p.REQUEST_MAGIC, 0, Cmd.READ, i, 4096 * i, 4) for i in range(16)
        )
        client = await Client.connect(folder / "s", stream)
        await device.until(16)
        assert len(device.batches) == 1
        device.answer(9, 2, data=b"abcd")
        for cookie in (9, 2):
            assert await client.reply() == (cookie, 0)
            assert await client.reader.readexactly(4) == b"abcd"
        device.answer(*(i for i in range(16) if i not in (2, 9)), data=b"....")
        await client.leave()
        await gone(listener.state)
        assert (exports.opened, exports.released) == (1, 1)
        await listener.close()

    run(body)


def test_losing_a_client_with_requests_in_flight(run: Callable[[Test], None]) -> None:
    """Late answers go nowhere, other clients notice nothing, the export is released last."""

    async def body(folder: Path) -> None:
        device = Held()
        exports = One(device)
        listener = await start(folder, exports)
        first, second = await Client.connect(folder / "s"), await Client.connect(folder / "s")
        first.send(Cmd.WRITE, 0, 100_000, cookie=1)
        second.send(Cmd.FLUSH, cookie=2)
        await device.until(2)
        await first.leave()
        await until(lambda: len(listener.state.connections) == 1)
        await listener.state.settled()
        assert exports.released == 0
        device.answer(1, 2)
        assert await second.reply() == (2, 0)
        await listener.state.settled()
        assert exports.released == 1
        await second.leave()
        await gone(listener.state)
        assert exports.released == 2
        await listener.close()

    run(body)


def test_losing_a_client_in_the_middle_of_a_refused_write(run: Callable[[Test], None]) -> None:
    """The rest of its payload will not come: the export is released all the same."""

    async def body(folder: Path) -> None:
        device = Held()
        exports = One(device)
        listener = await start(folder, exports)
        flush = p.REQUEST.pack(p.REQUEST_MAGIC, 0, Cmd.FLUSH, 1, 0, 0)
        beyond = p.REQUEST.pack(p.REQUEST_MAGIC, 0, Cmd.WRITE, 2, 1 << 30, MIB)
        client = await Client.connect(folder / "s", flush + beyond + bytes(1000))
        await device.until(1)
        device.answer(1)
        await client.leave()
        await gone(listener.state)
        assert exports.released == 1
        await listener.close()

    run(body)


class Volume(LoopActor):
    """The only volume, and who opens it; answers only when the test says so."""

    users = 0

    @expose()
    def open(self, name: str) -> list[object]:
        """Open it."""
        self.users += 1
        return [name, 1 << 30, "", False]

    @expose()
    def release(self, name: str) -> None:
        """Give it back."""
        self.users -= 1

    @expose()
    async def work(self, gate: asyncio.Event) -> None:
        """Do nothing else until the gate opens."""
        await gate.wait()

    @expose()
    def submit(self, conn: int, requests: list[Request]) -> None:
        """Keep the batch."""
        self.batch = conn, requests

    def answer(self) -> None:
        """Answer what was kept."""
        conn, requests = self.batch
        self.system.actor("nbd_server").replies.tell(conn, [Reply(each) for each in requests])


@contextlib.asynccontextmanager
async def flush_under_way(folder: Path) -> AsyncIterator[tuple[ActorSystem, Client]]:
    """A server whose client waits for a flush, until the actor ``volume:x`` is told to answer."""
    path = str(folder / "s")
    children = (
        ChildSpec("volumes", Volume),
        ChildSpec("volume:x", Volume),
        ChildSpec("nbd_server", lambda: NbdServer([NbdAddress(path=path)])),
    )
    async with system_of(*children) as system:
        client = await Client.connect(path)
        client.send(Cmd.FLUSH, cookie=1)
        await until(lambda: hasattr(system.cells["volume:x"].actor, "batch"))
        yield system, client


def test_the_actor_leaves_nothing_where_it_cannot_listen_everywhere(
    run: Callable[[Test], None],
) -> None:
    """Of several addresses the last one is in use: no socket of the first ones stays."""

    async def body(folder: Path) -> None:
        path = folder / "first"
        listener = await start(folder, One(Held()))
        taken = [NbdAddress(path=str(path)), NbdAddress(path=str(folder / "s"))]
        with pytest.raises(Exists, match="another server is using it"):
            async with system_of(ChildSpec("nbd_server", lambda: NbdServer(taken))):
                pass
        assert not path.exists()
        await listener.close()

    run(body)


def test_the_actor_gives_back_the_volume_of_a_client_that_was_lost(
    run: Callable[[Test], None],
) -> None:
    """Its requests were in flight; the volume is given back when they have been answered."""

    async def body(folder: Path) -> None:
        async with flush_under_way(folder) as (system, client):
            volumes: Any = system.cells["volumes"].actor
            volume: Any = system.cells["volume:x"].actor
            await client.leave()
            state = system.heirlooms["nbd_state"]
            await until(lambda: not state.connections)
            await asyncio.sleep(0)
            assert volumes.users == 1
            volume.answer()
            await until(lambda: not volumes.users)

    run(body)


def test_the_actor_lets_requests_finish_when_it_is_stopped(run: Callable[[Test], None]) -> None:
    """Their answers come as messages, which are taken until the last."""

    async def body(folder: Path) -> None:
        async with flush_under_way(folder) as (system, client):
            volumes: Any = system.cells["volumes"].actor
            volume: Any = system.cells["volume:x"].actor
            stopping = asyncio.ensure_future(system.cells["nbd_server"].stop(final=True))
            await until(lambda: not (folder / "s").exists())
            volume.answer()
            assert await client.reply() == (1, 0)
            await client.ended()
            await stopping
            assert not volumes.users

    run(body)


def test_the_actor_gives_a_volume_back_to_who_is_overloaded(run: Callable[[Test], None]) -> None:
    """Nobody would ask again."""

    async def body(folder: Path) -> None:
        path = str(folder / "s")
        children = (
            ChildSpec("volumes", Volume, inbox_max=1),
            ChildSpec("nbd_server", lambda: NbdServer([NbdAddress(path=path)])),
        )
        async with system_of(*children) as system:
            volumes: Any = system.cells["volumes"].actor
            client = await Client.connect(path)
            assert volumes.users == 1
            gate = asyncio.Event()
            work = system.actor("volumes").work
            refs = [work.remote(gate)]
            await until(lambda: not system.cells["volumes"].waiting())
            refs.append(work.remote(gate))
            await client.leave()
            state = system.heirlooms["nbd_state"]
            await until(lambda: not state.connections)
            await asyncio.sleep(0.01)
            gate.set()
            await get(refs)
            await until(lambda: not volumes.users)

    run(body)


@pytest.mark.parametrize("half_closed", [False, True])
def test_disconnect_waits_for_what_is_in_flight(
    half_closed: bool, run: Callable[[Test], None]
) -> None:
    """DISC is honoured after the outstanding requests were handled and answered.

    Also where the client, as libnbd does, closes its side behind it: it was answered nothing more.
    """

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        client = await Client.connect(folder / "s")
        client.send(Cmd.WRITE, 0, 10, cookie=1)
        client.send(Cmd.DISC)
        if half_closed:
            client.writer.write_eof()
        await device.until(1)
        await asyncio.sleep(0.05)
        assert listener.state.connections
        device.answer(1)
        assert await client.reply() == (1, 0)
        await client.ended()
        await listener.close()

    run(body)


def test_too_many_requests_wait_in_the_socket(run: Callable[[Test], None]) -> None:
    """A client far ahead of its device is stopped at the limit, and goes on when answered."""

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        count = 3 * tr.INFLIGHT_REQUESTS_MAX
        client = await Client.connect(folder / "s")
        for i in range(count):
            client.send(Cmd.FLUSH, cookie=i)
        done = 0
        while done < count:
            await device.until(done + 1)
            (connection,) = listener.state.connections
            assert connection.inflight <= tr.INFLIGHT_REQUESTS_MAX
            ready = [request.cookie for request in device.requests[done:]]
            device.answer(*ready)
            done += len(ready)
        assert [await client.reply() for _ in range(count)] == [(i, 0) for i in range(count)]
        await client.leave()
        await listener.close()

    run(body)


def test_payload_of_all_connections_together_is_bounded(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its share in any case, here one request, and more when others were answered.

    Found by reading: with the writes of forty clients waiting a server took 3 GiB.
    """
    size = MIB // 2
    monkeypatch.setattr(tr, "ALL_BYTES_MAX", 2 * size)
    monkeypatch.setattr(tr, "EACH_BYTES_MIN", 1)

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        load = listener.state.load
        first, second = await Client.connect(folder / "s"), await Client.connect(folder / "s")

        async def under_way(*cookies: int) -> None:
            await device.until(len(cookies))
            await asyncio.sleep(0.05)
            assert {request.cookie for request in device.requests} == set(cookies)

        for cookie in (1, 2, 3):
            first.send(Cmd.WRITE, 0, size, cookie=cookie)
        await under_way(1, 2)
        for cookie in (11, 12, 13):
            second.send(Cmd.WRITE, 0, size, cookie=cookie)
        await under_way(1, 2, 11)
        assert load.bytes == 3 * size
        device.answer(1)  # there is less now, and not little
        await under_way(1, 2, 11)
        # The first goes on in any case, and the second because of it, though answered nothing.
        device.answer(2)
        await under_way(1, 2, 11, 12, 3)
        device.answer(3)
        await under_way(1, 2, 11, 12, 3)
        device.answer(11)
        await under_way(1, 2, 11, 12, 3, 13)
        device.answer(13, 12)
        for client, cookies in (first, (1, 2, 3)), (second, (11, 13, 12)):
            assert [await client.reply() for _ in cookies] == [(cookie, 0) for cookie in cookies]
        assert not load.bytes
        # Who is cut off with a request under way leaves nothing behind when that is answered.
        first.send(Cmd.WRITE, 0, size, cookie=4)
        await under_way(1, 2, 11, 12, 3, 13, 4)
        await first.leave()
        await second.leave()
        await until(lambda: not listener.state.connections)
        assert load.bytes == size
        device.answer(4)
        await gone(listener.state)
        assert not load.bytes and not load.waiting
        await listener.close()

    run(body)


def test_a_paused_connection_is_woken_by_what_others_are_answered(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was paused for. Found by review: else by its own answers only, a slow flush say.

    What takes no memory is held back by nobody else's.
    """
    size = MIB // 2
    monkeypatch.setattr(tr, "ALL_BYTES_MAX", 4 * size)
    monkeypatch.setattr(tr, "EACH_BYTES_MIN", 1)

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        slow = await Client.connect(folder / "s")
        (connection,) = listener.state.connections
        slow.send(Cmd.FLUSH, cookie=1)
        slow.send(Cmd.READ, 0, 4096, cookie=2)
        await device.until(2)
        other = await Client.connect(folder / "s")
        for cookie in (11, 12, 13):
            other.send(Cmd.WRITE, 0, size, cookie=cookie)
        await device.until(5)
        # As if it did not read for a moment; the load lies between half and all.
        connection.pause_writing()
        connection.resume_writing()
        slow.send(Cmd.READ, 0, 4096, cookie=3)
        device.answer(11, 12, 13)
        await device.until(6)
        for cookie in (14, 15, 16, 17):
            other.send(Cmd.WRITE, 0, size, cookie=cookie)
        await device.until(10)
        device.answer(2, 3, data=bytes(4096))
        slow.send(Cmd.TRIM, 0, 4096, cookie=4)
        slow.send(Cmd.FLUSH, cookie=5)
        await device.until(12)
        device.answer(1, 4, 5, 14, 15, 16, 17)
        for client in (slow, other):
            await client.leave()
        await gone(listener.state)
        assert not listener.state.load.bytes and not listener.state.load.waiting
        await listener.close()

    run(body)


def test_what_clients_do_not_read_counts_for_all(run: Callable[[Test], None]) -> None:
    """It is in the server's memory until they do, or are gone."""

    class Fresh:
        def submit(self, conn: Replies, requests: list[Request]) -> None:
            for request in requests:
                asyncio.get_running_loop().call_soon(
                    conn.reply, [Reply(request, buffers=[bytes(request.length)])]
                )

    async def body(folder: Path) -> None:
        listener = await start(folder, One(Fresh()))
        load = listener.state.load
        deaf, asks = await Client.connect(folder / "s"), 40
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(asks):
            deaf.send(Cmd.READ, 0, MIB, cookie=cookie)
        (connection,) = listener.state.connections
        await until(lambda: connection._write_paused and not connection.inflight)
        assert 2 * MIB < load.bytes <= asks * MIB
        deaf.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for cookie in range(asks):
            assert await deaf.reply() == (cookie, 0)
            await deaf.reader.readexactly(MIB)
        await until(lambda: not load.bytes)
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(asks):
            deaf.send(Cmd.READ, 0, MIB, cookie=cookie)
        await until(lambda: connection._write_paused and not connection.inflight)
        assert load.bytes
        deaf.writer.transport.abort()
        await gone(listener.state)
        assert not load.bytes
        await listener.close()

    run(body)


def test_a_client_that_does_not_read_stops_its_own_requests(run: Callable[[Test], None]) -> None:
    """Replies that pile up stop the intake of requests; when the client reads, all comes."""

    async def body(folder: Path) -> None:
        exports = MemoryExports.single(64 * MIB)
        listener = await serve(exports, path=str(folder / "s"))
        state = listener.state
        exports.exports["x"] = exports.exports["memory"]
        client = await Client.connect(folder / "s")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(Cmd.WRITE, 0, 1, cookie=999)
        for i in range(400):
            client.send(Cmd.READ, 0, MIB, cookie=i)
        (connection,) = state.connections
        await until(lambda: connection._reading_paused)
        transport = connection._transport
        assert transport is not None
        assert transport.get_write_buffer_size() < 80 * MIB
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert await client.reply() == (999, 0)
        for i in range(400):
            assert await client.reply() == (i, 0)
            assert await client.reader.readexactly(MIB) == bytes(MIB)
        await client.leave()
        await listener.close()

    run(body)


def test_a_device_that_refuses_a_batch(run: Callable[[Test], None]) -> None:
    """A TorusError from submit answers the batch; any other ends that one connection."""

    class Refusing(Held):
        def submit(self, conn: Replies, requests: list[Request]) -> None:
            if requests[0].cookie == 666:
                raise RuntimeError("a bug")
            raise OutOfSpace("full")

    async def body(folder: Path) -> None:
        seen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: seen.append(what))
        exports = One(Refusing())
        listener = await start(folder, exports)
        first, second = await Client.connect(folder / "s"), await Client.connect(folder / "s")
        first.send(Cmd.WRITE, 0, 10, cookie=5)
        assert await first.reply() == (5, Errno.ENOSPC)
        second.send(Cmd.WRITE, 0, 10, cookie=666)
        await second.ended()
        assert seen
        assert not listener.state.load.bytes, "nobody waits for what is never answered"
        first.send(Cmd.WRITE, 0, 10, cookie=6)
        assert await first.reply() == (6, Errno.ENOSPC)
        await first.leave()
        await gone(listener.state)
        assert exports.released == 2
        await listener.close()

    run(body)


def test_refused_opens_carry_the_reason(run: Callable[[Test], None]) -> None:
    """Errors of the provider are option errors with their text; the client may go on."""

    async def body(folder: Path) -> None:
        exports = One(Held())
        listener = await start(folder, exports)
        client = await Client.raw(folder / "s")
        name = struct.pack(">I", 6) + b"locked\0\0"
        expected = (Rep.ERR_POLICY, b"volume locked is held by node-7")
        assert await client.option(Opt.GO, name) == expected
        assert await client.option(Opt.LIST) == (Rep.ERR_POLICY, b"not today")
        assert (await client.option(Opt.INFO, b"\0\0\0\1x\0\0"))[0] == Rep.INFO
        await client.reader.readexactly(20)
        assert (exports.opened, exports.released) == (1, 1)
        await client.leave()
        await listener.close()

    run(body)


def test_an_export_opened_for_nobody_is_released(run: Callable[[Test], None]) -> None:
    """A client that is gone before its export is open leaves nothing behind."""

    async def body(folder: Path) -> None:
        exports = One(Held())
        exports.gate = asyncio.Event()
        listener = await start(folder, exports)
        client = await Client.raw(folder / "s")
        client.writer.write(p.OPTION.pack(p.OPTION_MAGIC, Opt.EXPORT_NAME, 1) + b"x")
        await exports.opening.wait()
        await client.leave()
        await until(lambda: not listener.state.connections)
        exports.gate.set()
        await listener.state.settled()
        assert (exports.opened, exports.released) == (1, 1)
        await listener.close()

    run(body)


def test_another_owner_adopts_everything(run: Callable[[Test], None]) -> None:
    """Clients of an owner that died go on; new opens and old releases go to the new owner."""

    async def body(folder: Path) -> None:
        old, new = One(Held()), One(Held())
        listener = await start(folder, old)
        client = await Client.connect(folder / "s")
        state = listener.state
        assert state.open_names == {"x": 1}
        state.adopt(new)
        client.send(Cmd.FLUSH, cookie=3)
        assert isinstance(old.device, Held)
        await old.device.until(1)
        old.device.answer(3)
        assert await client.reply() == (3, 0)
        later = await Client.connect(folder / "s")
        await client.leave()
        await later.leave()
        await gone(state)
        assert (old.opened, old.released, new.opened, new.released) == (1, 0, 1, 2)
        assert not state.open_names
        await state.listeners[0].close()

    run(body)


def test_close_lets_requests_finish(run: Callable[[Test], None]) -> None:
    """Nothing new is taken but with ESHUTDOWN; what is in flight is answered; then it ends."""

    async def body(folder: Path) -> None:
        device = Held()
        exports = One(device)
        listener = await start(folder, exports)
        busy, idle = await Client.connect(folder / "s"), await Client.connect(folder / "s")
        asking = await Client.raw(folder / "s")
        busy.send(Cmd.WRITE, 0, 10, cookie=1)
        await device.until(1)
        closing = asyncio.ensure_future(listener.close())
        await idle.ended()
        await asking.ended()
        assert not (folder / "s").exists()
        busy.send(Cmd.READ, 0, 10, cookie=2)
        assert await busy.reply() == (2, Errno.ESHUTDOWN)
        device.answer(1)
        assert await busy.reply() == (1, 0)
        await busy.ended()
        await closing
        assert exports.released == 2
        await listener.close()

    run(body)


def test_close_does_not_wait_for_ever(run: Callable[[Test], None]) -> None:
    """After the grace time connections are cut, whatever is in flight."""

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        client = await Client.connect(folder / "s")
        client.send(Cmd.FLUSH, cookie=1)
        await device.until(1)
        await listener.close(grace_s=0.01)
        assert not listener.state.connections
        await client.ended()
        device.answer(1)
        await listener.state.settled()

    run(body)


def test_stale_socket_is_replaced_a_live_one_refused(run: Callable[[Test], None]) -> None:
    """What a killed server left is in nobody's way; what a live one uses is not taken away."""

    async def body(folder: Path) -> None:
        path = folder / "s"
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(path))
        dead.close()
        listener = await start(folder, One(Held()))
        with pytest.raises(Exists, match="another server is using it"):
            await start(folder, One(Held()))
        client = await Client.connect(path)
        await client.leave()
        os.unlink(path)
        path.write_text("not a socket")
        with pytest.raises(Invalid, match="is not a socket"):
            await start(folder, One(Held()))
        # And a file that is not its own is left alone by the one that closes.
        await listener.close()
        assert path.exists()
        tcp = await serve(One(Held()), host="127.0.0.1")
        host, _, port = tcp.address.rpartition(":")
        with pytest.raises(Exists):
            await serve(One(Held()), host=host, port=int(port))
        await tcp.close()
        with pytest.raises(Invalid):
            await serve(One(Held()), path=str(folder / "no" / "such" / "folder"))
        with pytest.raises(Invalid):
            await serve(One(Held()))

    run(body)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_addresses_are_shown_as_they_are_typed(run: Callable[[Test], None], host: str) -> None:
    """That of the listener, and those of its clients."""

    async def body(_: Path) -> None:
        try:
            listener = await serve(One(Held()), host=host)
        except Invalid as error:
            pytest.skip(str(error))
        reader, writer = await asyncio.open_connection(*parse_address(listener.address))
        await reader.readexactly(8)
        (peer,) = [connection.peer for connection in listener.state.connections]
        ours = tuple(writer.get_extra_info("sockname")[:2])
        writer.close()
        await listener.close()
        assert parse_address(peer) == ours and ours[0] == host

    run(body)


def test_silent_client_is_dropped(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that says nothing in the handshake is closed; one in transmission may be silent."""
    monkeypatch.setattr(conn, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def body(folder: Path) -> None:
        device = Held()
        listener = await start(folder, One(device))
        entered = await Client.connect(folder / "s")
        silent = await Client.raw(folder / "s")
        await silent.ended()
        entered.send(Cmd.FLUSH, cookie=4)
        await device.until(1)
        device.answer(4)
        assert await entered.reply() == (4, 0)
        await entered.leave()
        await listener.close()

    run(body)


def test_connections_are_limited(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit connections are closed as they come; those that are there stay."""
    monkeypatch.setattr(conn, "CONNECTIONS_MAX", 1)

    async def body(folder: Path) -> None:
        listener = await start(folder, One(Held()))
        first = await Client.connect(folder / "s")
        reader, writer = await asyncio.open_unix_connection(str(folder / "s"))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await Client(reader, writer).leave()
        assert len(listener.state.connections) == 1
        await first.leave()
        await listener.close()

    run(body)


def test_connections_that_say_nothing_keep_nobody_out(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one more than the limit the one makes room that has been silent for longest.

    Who has an export stays, and so does who waits for one. Found by review: for two minutes, and
    as often as somebody liked, no client was let in.
    """
    monkeypatch.setattr(conn, "CONNECTIONS_MAX", 4)

    async def body(folder: Path) -> None:
        exports = One(Held())
        listener = await start(folder, exports)
        client = await Client.connect(folder / "s")
        exports.gate = asyncio.Event()
        exports.opening.clear()
        waiting = asyncio.ensure_future(Client.connect(folder / "s"))
        await exports.opening.wait()
        silent = [await Client.raw(folder / "s") for _ in range(5)]
        for each in silent[:3]:
            await each.ended()
        assert len(listener.state.connections) == 4
        honest = asyncio.ensure_future(Client.connect(folder / "s"))
        await silent[3].ended()
        exports.gate.set()
        for there in (client, await waiting, await honest):
            there.send(Cmd.DISC)
            await there.ended()
        await silent[4].leave()
        await gone(listener.state)
        assert exports.opened == exports.released == 3
        await listener.close()

    run(body)


def test_garbage_instead_of_a_tls_handshake(run: Callable[[Test], None]) -> None:
    """The session ends, and leaves nothing behind."""

    async def body(folder: Path) -> None:
        tls = TlsSettings(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        listener = await serve(One(Held()), path=str(folder / "s"), tls=tls)
        client = await Client.raw(folder / "s")
        assert await client.option(Opt.STARTTLS) == (Rep.ACK, b"")
        client.writer.write(b"hello, are you there?\n" * 10)
        try:
            await client.ended()
        except ConnectionError:
            await client.leave()
        await gone(listener.state)
        await listener.close()

    run(body)


def test_close_in_the_middle_of_a_tls_handshake(run: Callable[[Test], None]) -> None:
    """Nobody waits for a client that has asked for TLS and says no more."""

    async def body(folder: Path) -> None:
        tls = TlsSettings(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        listener = await serve(One(Held()), path=str(folder / "s"), tls=tls)
        client = await Client.raw(folder / "s")
        assert await client.option(Opt.STARTTLS) == (Rep.ACK, b"")
        async with asyncio.timeout(conn.TLS_TIMEOUT_S / 10):
            await listener.close()
        assert not listener.state.connections
        await client.ended()

    run(body)


def test_connection_without_a_loop_of_its_own() -> None:
    """A connection object can be made before any loop runs; it has no client yet."""
    connection = NbdConnection(NbdState(One.__new__(One)))
    assert connection.export is None
    assert connection.inflight == 0
    connection.abort()


def test_lists_wait_for_who_does_not_read_them(
    run: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many were asked for at once; a client that goes on not reading is ended."""
    monkeypatch.setattr(conn, "HANDSHAKE_TIMEOUT_S", 2.0)

    async def body(folder: Path) -> None:
        exports = MemoryExports.single(1 << 20)
        for n in range(200):
            exports.exports[f"{n:0128}"] = exports.exports["memory"]
        listener = await serve(exports, path=str(folder / "s"))
        _, writer = await asyncio.open_unix_connection(str(folder / "s"), limit=1)
        writer.write(struct.pack(">I", 3))
        writer.write(p.OPTION.pack(p.OPTION_MAGIC, Opt.LIST, 0) * 10_000)
        await until(lambda: len(listener.state.connections) == 1)
        (connection,) = listener.state.connections
        await until(lambda: connection._write_paused)
        held = connection._transport
        assert held is not None and held.get_write_buffer_size() < 16 << 20
        await asyncio.sleep(0.2)
        assert held.get_write_buffer_size() < 16 << 20
        await until(lambda: not listener.state.connections)
        writer.transport.abort()
        await listener.close()

    run(body)
