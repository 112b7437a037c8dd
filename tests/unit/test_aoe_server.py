"""The AoE server actor, with a network that is a pair of sockets and a volume that waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.aoe_initiator import (
    HOST_MAC,
    OTHER_MAC,
    READ_EXT,
    SECTOR,
    TARGET_MAC,
    WRITE_EXT,
    Answer,
    ata,
    config,
    decode,
    frame,
)
from tests.fakes import Cluster, virtual
from tests.unit.runtime_harness import on_uvloop, system_of, until
from torus_actors.actors import aoe_server
from torus_actors.actors.aoe_server import NAME, AoeServer
from torus_actors.aoe.port import PacketPort
from torus_actors.aoe.protocol import sectors_of_mtu
from torus_actors.cli.blk_aoe import watch
from torus_actors.cli.common import Failed
from torus_actors.errors import Invalid, NotExist
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Op, Reply, Request
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, expose


class FakePort:
    """An interface whose other end the test has."""

    def __init__(self) -> None:
        self.name = "fake0"
        self.mac = TARGET_MAC
        self.mtu = 1500
        self.up = True
        self.gone = False
        self.closed = False
        self.listens = False
        self._socket, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self.other.setblocking(False)

    def listen(self) -> None:
        """See Port."""
        self.listens = True

    def fileno(self) -> int:
        """See Port."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """See Port."""
        try:
            return self._socket.recv(1 << 16) or None
        except BlockingIOError:
            return None

    def send(self, frame: Sequence[bytes | bytearray | memoryview]) -> bool:
        """See Port."""
        try:
            self._socket.sendmsg(frame)
        except BlockingIOError:
            return False
        return True

    def refresh(self) -> None:
        """See Port."""
        if self.gone:
            raise NotExist("there is no network interface fake0")

    def close(self) -> None:
        """See Port."""
        self._socket.close()
        self.closed = True


class Volume(LoopActor):
    """Keeps what it is asked for until the test answers."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, list[Request]]] = []

    @expose()
    def submit(self, conn: int, requests: list[Request]) -> None:
        """Keep the batch."""
        self.batches.append((conn, requests))

    def answer(self) -> None:
        """Answer what was kept."""
        for conn, requests in self.batches:
            replies = [
                Reply(each, buffers=[b"d" * each.length] if each.op == Op.READ else ())
                for each in requests
            ]
            self.system.actor(NAME).replies.tell(conn, replies)
        self.batches.clear()


class Volumes(LoopActor):
    """Says how the volume is."""

    fenced = False

    @expose()
    def status(self) -> list[dict[str, Any]]:
        """One open volume."""
        return [{"name": "x", "fenced": self.fenced, "failure": "epoch 2", "users": 1}]


class Bench:
    """A running system with the actor."""

    def __init__(self, system: ActorSystem, port: FakePort) -> None:
        self.system = system
        self.port = port
        self.volume: Any = system.cells["volume:x"].actor
        self.volumes: Any = system.cells["volumes"].actor

    def send(self, command: int, body: bytes, tag: int) -> None:
        """As an initiator."""
        self.port.other.send(frame(command, body, tag))

    async def receive(self) -> Answer:
        """The next frame."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5.0):
            return decode(await loop.sock_recv(self.port.other, 1 << 16))

    async def begin(self) -> None:
        """Serve, and take the announcement."""
        await self.system.actor(NAME).serve.remote("x", 1 << 20, False)
        announced = await self.receive()
        assert (announced.command, announced.tag) == (1, 0)

    async def asked(self, count: int = 1) -> list[Request]:
        """Wait until the volume has been asked for so much."""
        await until(lambda: sum(len(each) for _, each in self.volume.batches) >= count)
        return [request for _, each in self.volume.batches for request in each]


def children(port: FakePort, inbox_max: int | None = None) -> list[ChildSpec]:
    """The actors of a bench."""
    bound = {} if inbox_max is None else {"inbox_max": inbox_max}
    return [
        ChildSpec("volumes", Volumes),
        ChildSpec("volume:x", Volume, **bound),
        ChildSpec(NAME, lambda: AoeServer(port, 7, 3, "cluster")),
    ]


@contextlib.asynccontextmanager
async def serving(inbox_max: int | None = None, begun: bool = True) -> AsyncIterator[Bench]:
    """A running actor that serves, and whose announcement was taken."""
    port = FakePort()
    with contextlib.closing(port.other):
        async with system_of(*children(port, inbox_max)) as system:
            bench = Bench(system, port)
            if begun:
                await bench.begin()
            yield bench
        assert port.closed


def write(lba: int, fill: bytes) -> bytes:
    """Body of a write of a sector."""
    return ata(WRITE_EXT, lba, 1, fill * SECTOR)


@on_uvloop
async def test_what_comes_together_is_one_message() -> None:
    """In the order in which it came; each is answered when the volume has answered."""
    async with serving() as bench:
        bench.send(0, write(0, b"a"), 1)
        bench.send(0, ata(READ_EXT, 0, 1), 2)
        bench.send(0, write(0, b"b"), 3)
        requests = await bench.asked(3)
        assert len(bench.volume.batches) == 1
        assert [each.op for each in requests] == [Op.WRITE, Op.READ, Op.WRITE]
        assert requests[0].fua and requests[2].fua
        bench.volume.answer()
        answers = [await bench.receive() for _ in range(3)]
        assert [each.tag for each in answers] == [1, 2, 3]
        assert answers[1].data == b"d" * SECTOR
        assert answers[0].destination == HOST_MAC


@on_uvloop
async def test_its_death_costs_nothing() -> None:
    """Requests in flight are answered by the successor, and what it kept in mind is still there."""
    async with serving() as bench:
        bench.send(1, config(4, b"kept"), 1)
        await bench.receive()
        bench.send(0, write(0, b"a"), 2)
        await bench.asked()
        first = bench.system.cells[NAME].actor
        bench.system.cells[NAME].kill("test")
        await until(lambda: bench.system.cells[NAME].actor not in (None, first))
        bench.volume.answer()
        assert (await bench.receive()).tag == 2
        bench.send(1, config(0), 3)
        assert (await bench.receive()).body[8:12] == b"kept"
        bench.send(0, write(0, b"a"), 2)
        assert (await bench.receive()).status == 0x40
        assert not bench.volume.batches, "it was done before"


@on_uvloop
async def test_what_the_volume_has_no_room_for_comes_again() -> None:
    """It is dropped; sent once more, it is done."""
    async with serving(inbox_max=1) as bench:
        hold = bench.system.actor("volume:x").submit
        hold.tell(9, [])
        bench.port.other.send(frame(0, write(0, b"a"), 1))
        endpoint = bench.system.heirlooms[NAME][1]
        endpoint._readable()
        assert endpoint.target.dropped == 1 and endpoint.target.in_flight == 0
        await until(lambda: bench.volume.batches)
        bench.send(0, write(0, b"a"), 1)
        await bench.asked()
        bench.volume.answer()
        assert (await bench.receive()).tag == 1


@on_uvloop
async def test_it_lets_commands_finish_when_it_is_stopped() -> None:
    """A write that was taken is answered; what comes after that is not."""
    async with serving() as bench:
        bench.send(0, write(0, b"a"), 1)
        await bench.asked()
        stopping = asyncio.ensure_future(bench.system.cells[NAME].stop(final=True))
        endpoint = bench.system.heirlooms[NAME][1]
        await until(lambda: not endpoint.receiving)
        bench.send(0, write(8, b"b"), 2)
        assert not bench.port.closed
        bench.volume.answer()
        assert (await bench.receive()).tag == 1
        await stopping
        assert bench.port.closed and not bench.volume.batches


@on_uvloop
async def test_answers_wait_for_room_in_the_socket() -> None:
    """They leave in order when there is some."""
    async with serving() as bench:
        bench.port._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for tag in range(1, 41):
            bench.send(0, ata(READ_EXT, 0, 2), tag)
        await bench.asked(40)
        bench.volume.answer()
        endpoint = bench.system.heirlooms[NAME][1]
        await until(lambda: endpoint._queue)
        assert [(await bench.receive()).tag for _ in range(40)] == list(range(1, 41))
        await until(lambda: not endpoint._queue)


@pytest.mark.parametrize("used", [False, True])
@on_uvloop
async def test_a_volume_that_was_taken_over(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command fails; the process may end only if nobody has read or written."""
    monkeypatch.setattr(aoe_server, "WATCH_S", 0.01)
    monkeypatch.setattr("torus_actors.cli.blk_aoe.OVER_POLL_S", 0.01)
    async with serving() as bench:
        if used:
            bench.send(0, ata(READ_EXT, 0, 1), 1)
            await bench.asked()
            bench.volume.answer()
            await bench.receive()
        watching = asyncio.ensure_future(watch(bench.system.actor(NAME), "x"))
        bench.volumes.fenced = True
        if used:
            await until(lambda: bench.system.heirlooms.get(aoe_server.LOST) == "epoch 2")
            for tag, body in ((2, ata(READ_EXT, 0, 1)), (3, write(0, b"a"))):
                bench.send(0, body, tag)
                answer = await bench.receive()
                assert (answer.tag, answer.status) == (tag, 0x61)
            assert not watching.done() and not bench.volume.batches
            # Not even without its interface: it may come back, and a successor would serve there.
            bench.port.gone = True
            await until(lambda: bench.system.cells[NAME].actor._gone)
            await asyncio.sleep(0.05)
            assert not watching.done()
            watching.cancel()
        else:
            with pytest.raises(Failed, match=r"x was taken over by another client \(epoch 2\)"):
                await watching


@on_uvloop
async def test_reads_fail_too_once_a_write_was_told_that_the_volume_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only when somebody has looked: a read would be answered with what was there before.

    When somebody has, and the volume is not lost, all goes on.
    """
    monkeypatch.setattr(aoe_server, "WATCH_S", 1000.0)
    async with serving() as bench:
        bench.send(0, write(0, b"a"), 1)
        (request,) = await bench.asked()
        bench.volume.batches.clear()
        bench.system.actor(NAME).replies.tell(1, [Reply(request, Errno.ESHUTDOWN)])
        assert (await bench.receive()).status == 0x61
        bench.send(0, ata(READ_EXT, 0, 1), 2)
        answer = await bench.receive()
        assert (answer.tag, answer.status) == (2, 0x61)
        assert not bench.volume.batches

        monkeypatch.setattr(aoe_server, "WATCH_S", 0.01)
        bench.system.cells[NAME].actor.spawn(bench.system.cells[NAME].actor._watch())
        await until(lambda: not bench.system.heirlooms[NAME][1].target.failure)
        bench.send(0, ata(READ_EXT, 0, 1), 3)
        await bench.asked()
        bench.volume.answer()
        assert (await bench.receive()).tag == 3
        assert aoe_server.LOST not in bench.system.heirlooms


@on_uvloop
async def test_a_volume_that_is_lost_is_told_also_if_it_is_stopped_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process ends with status 1 though nobody has looked how the volume is."""
    monkeypatch.setattr(aoe_server, "WATCH_S", 1000.0)
    async with serving() as bench:
        bench.send(0, write(0, b"a"), 1)
        (request,) = await bench.asked()
        bench.volume.batches.clear()
        bench.system.actor(NAME).replies.tell(1, [Reply(request, Errno.ESHUTDOWN)])
        await bench.receive()
        await bench.system.stop()
        assert bench.system.heirlooms[aoe_server.LOST]


@pytest.mark.parametrize("change", [("mtu", 9000), ("mac", OTHER_MAC), ("up", False)])
@on_uvloop
async def test_an_interface_that_is_another_now_is_announced(
    change: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and when it is up: Linux does not ask by itself."""
    monkeypatch.setattr(aoe_server, "WATCH_S", 0.01)
    async with serving() as bench:
        endpoint = bench.system.heirlooms[NAME][1]
        bench.port.up = False
        await until(lambda: endpoint._told[2] is False)
        setattr(bench.port, *change)
        await until(lambda: endpoint._told == (bench.port.mac, bench.port.mtu, False))
        with pytest.raises(BlockingIOError):
            bench.port.other.recv(1 << 16)
        bench.port.up = True
        told = await bench.receive()
        assert (told.command, told.tag, told.source) == (1, 0, bench.port.mac)
        assert told.body[4] == sectors_of_mtu(bench.port.mtu)
        # The next frame is an answer.
        bench.send(0, ata(0xB0), 7)
        assert (await bench.receive()).tag == 7


@on_uvloop
async def test_an_interface_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends, and says why."""
    monkeypatch.setattr(aoe_server, "WATCH_S", 0.01)
    monkeypatch.setattr("torus_actors.cli.blk_aoe.OVER_POLL_S", 0.01)
    async with serving() as bench:
        bench.port.gone = True
        with pytest.raises(Failed, match="there is no network interface fake0"):
            await watch(bench.system.actor(NAME), "x")


@on_uvloop
async def test_what_cannot_be_served() -> None:
    """A volume without a whole sector; a second one."""
    async with serving(begun=False) as bench:
        with pytest.raises(Invalid, match="smaller than a sector"):
            await bench.system.actor(NAME).serve.remote("x", 511, False)
        await bench.begin()
        with pytest.raises(Invalid, match="served already"):
            await bench.system.actor(NAME).serve.remote("x", 1 << 20, False)


@virtual
async def test_the_volume_does_overlapping_writes_in_their_order() -> None:
    """Also those that wait for room in its cache: the order of AoE's writes rests on it."""
    async with Cluster() as cluster:
        device = await cluster.volume(1 << 20, write_bytes=32 << 10)
        cluster.network.hanging.update(cluster.ids)
        expected = bytearray(1 << 20)
        futures = []
        # The second one has no room, and the third would have.
        writes = ((512 << 10, 16 << 10), (0, 24 << 10), (0, 512), (256, 1024), (8192, 4096))
        for n, (offset, length) in enumerate(writes):
            data = bytes([n + 1]) * length
            expected[offset : offset + length] = data
            futures += device.submit(Request(Op.WRITE, offset, length, n, data=data, fua=True))
        await asyncio.sleep(0.5)
        cluster.network.heal()
        assert not any(reply.error for reply in await asyncio.gather(*futures))
        assert await device.read(0, 1 << 20) == expected


@pytest.mark.parametrize("name", ["", "nope0", "x" * 16, "a\0b", "../lo"])
def test_interfaces_that_are_not_there(name: str) -> None:
    """One plain error, before anything needs a privilege."""
    with pytest.raises(NotExist, match="there is no network interface"):
        PacketPort(name)


def test_without_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which one."""

    def refused(*_: object) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("torus_actors.aoe.port.socket.socket", refused)
    with pytest.raises(Invalid, match="CAP_NET_RAW"):
        PacketPort("lo")
