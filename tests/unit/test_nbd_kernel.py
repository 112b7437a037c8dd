"""Attaching to the kernel's NBD driver, which a fake stands for; the real one: `tests/kernel`."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop

from torus_actors.actors import same_machine
from torus_actors.errors import Exists, Invalid
from torus_actors.nbd import genetlink, kernel
from torus_actors.nbd import protocol as p
from torus_actors.nbd.connection import NbdConnection, NbdState
from torus_actors.nbd.genetlink import attribute, attributes_of
from torus_actors.nbd.memory import MemoryDevice, MemoryExports
from torus_actors.nbd.requests import ExportInfo

MIB = 1 << 20
REPLY_BYTES = 16
DISC = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.Cmd.DISC, 0, 0, 0)


class Driver:
    """What of `drivers/block/nbd.c` is asked by netlink; has one free device."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, dict[int, bytes]]] = []
        self.refuses: dict[int, int] = {}
        self.sock: socket.socket | None = None

    def ask(self, command: int, attributes: Iterable[bytes]) -> Mapping[int, bytes]:
        """See Netlink."""
        told = dict(attributes_of(b"".join(attributes)))
        self.asked.append((command, told))
        if command in self.refuses:
            raise OSError(self.refuses[command], os.strerror(self.refuses[command]))
        if command == kernel.CONNECT:
            (item,) = dict(attributes_of(told[kernel.SOCKETS])).values()
            (number,) = dict(attributes_of(item)).values()
            self.sock = socket.socket(fileno=os.dup(int.from_bytes(number, "little")))
            self.sock.setblocking(True)
            return {kernel.INDEX: told.get(kernel.INDEX, bytes(4))}
        if command == kernel.DISCONNECT:
            self.end()
        return {}

    def close(self) -> None:
        """See Netlink."""

    def end(self) -> None:
        """As when the last one has closed the device."""
        assert self.sock is not None
        self.sock.sendall(DISC)
        self.sock.close()
        self.sock = None

    def do(self, command: p.Cmd, offset: int, length: int, data: bytes = b"") -> bytes:
        """One request, as the kernel sends it; the payload of its answer."""
        assert self.sock is not None
        self.sock.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, command, 7, offset, length) + data)
        magic, error, cookie = struct.unpack(">IIQ", self._take(REPLY_BYTES))
        assert (magic, error, cookie) == (0x67446698, 0, 7)
        return self._take(length) if command is p.Cmd.READ else b""

    def _take(self, count: int) -> bytes:
        assert self.sock is not None
        parts = bytearray()
        while len(parts) < count:
            part = self.sock.recv(count - len(parts))
            assert part
            parts += part
        return bytes(parts)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """Put in the place of the kernel's; its devices are files."""
    driver = Driver()
    monkeypatch.setattr(kernel, "Netlink", lambda: driver)
    real = os.open

    def open_device(path: str, flags: int) -> int:
        assert path.startswith("/dev/nbd")
        return real(tmp_path / os.path.basename(path), flags)

    (tmp_path / "nbd0").touch()
    (tmp_path / "nbd3").touch()
    monkeypatch.setattr(kernel.os, "open", open_device)
    return driver


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on the loop that production uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test)


async def in_thread(work: Callable[[], Any]) -> Any:
    """The kernel does not run on the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def attach(state: NbdState, path: str | None = None) -> kernel.KernelDevice:
    """As the NBD server actor does it."""
    opened = await state.exports.open("demo")
    state.open_names["demo"] += 1
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        connection = NbdConnection(state, opened=opened)
        await same_machine.hand_over(ours, lambda: connection)
        assert connection.lost is not None
        return await kernel.attach(theirs, connection.lost, opened[0], path)
    finally:
        theirs.close()


def new_state() -> NbdState:
    """A server with an export that does not end at a sector's end."""
    info = ExportInfo("demo", MIB + 100)
    return NbdState(MemoryExports({"demo": (info, MemoryDevice(info.size))}))


def test_a_device_is_served_from_attaching_to_its_end(driver: Driver) -> None:
    """The kernel is told all it needs, reads what it wrote, and the export is given back."""

    async def test() -> None:
        state = new_state()
        device = await attach(state)
        assert device.path == "/dev/nbd0"
        (connect, told), (reconfigure, last) = driver.asked
        assert (connect, reconfigure) == (kernel.CONNECT, kernel.RECONFIGURE)
        del told[kernel.SOCKETS]
        flags = int(ExportInfo("demo", MIB).flags(structured=False))
        assert {kind: int.from_bytes(value, "little") for kind, value in told.items()} == {
            kernel.SIZE_BYTES: MIB,
            kernel.BLOCK_SIZE_BYTES: 512,
            kernel.SERVER_FLAGS: flags,
        }
        assert last == {kernel.INDEX: bytes(4), kernel.CLIENT_FLAGS: b"\2" + bytes(7)}
        (connection,) = state.connections
        assert connection.export == "demo"
        data = os.urandom(8192)
        await in_thread(lambda: driver.do(p.Cmd.WRITE, 4096, 8192, data))
        await in_thread(lambda: driver.do(p.Cmd.FLUSH, 0, 0))
        assert await in_thread(lambda: driver.do(p.Cmd.READ, 4096, 8192)) == data
        await device.sync()
        await device.let_go()
        assert not device.ended  # somebody else has it open
        assert not await device.has_gone(0.01)
        driver.end()
        assert await device.has_gone(10.0)
        assert device.ended
        await state.settled()
        assert not state.open_names
        await device.sync()  # nothing is left to do
        await device.let_go()

    run(test())


@pytest.mark.parametrize("path", ["/dev/nbd3", "nbd3"])
def test_a_device_can_be_named(driver: Driver, path: str) -> None:
    """With its directory, or without."""

    async def test() -> None:
        device = await attach(new_state(), path)
        assert device.path == "/dev/nbd3"
        assert driver.asked[0][1][kernel.INDEX] == b"\3\0\0\0"
        driver.end()
        assert await device.has_gone(10.0)

    run(test())


@pytest.mark.parametrize(
    ("command", "number", "error", "told"),
    [
        (kernel.CONNECT, errno.EBUSY, Exists, "/dev/nbd3 is in use: name another one"),
        (kernel.CONNECT, errno.EPERM, Invalid, "cannot attach to /dev/nbd3: only root may"),
        (kernel.CONNECT, errno.EINVAL, Invalid, "cannot attach to /dev/nbd3: Invalid argument"),
        (kernel.RECONFIGURE, errno.EINVAL, Invalid, "cannot attach to /dev/nbd3: Invalid"),
    ],
)
def test_what_the_kernel_refuses_is_told(
    driver: Driver, command: int, number: int, error: type[Exception], told: str
) -> None:
    """In one line; the export is given back, and no device is left that nobody serves."""
    driver.refuses[command] = number

    async def test() -> None:
        state = new_state()
        with pytest.raises(error, match=told):
            await attach(state, "/dev/nbd3")
        connections = list(state.connections)
        await asyncio.gather(*[each.lost for each in connections if each.lost is not None])
        await state.settled()
        assert not state.open_names
        ended = kernel.DISCONNECT in [each for each, _ in driver.asked]
        assert ended is (command == kernel.RECONFIGURE)

    run(test())


def test_a_device_that_cannot_be_opened_is_ended(driver: Driver) -> None:
    """It would stay for ever: only who has a device open can let go of it."""

    async def test() -> None:
        state = new_state()
        with pytest.raises(Invalid, match="nbd4: No such file"):
            await attach(state, "/dev/nbd4")
        assert [each for each, _ in driver.asked] == [kernel.CONNECT, kernel.DISCONNECT]

    run(test())


@pytest.mark.parametrize("path", ["/dev/sda", "/tmp/nbd0", "nbd", "/dev/nbd0p1"])
def test_a_device_that_is_none_is_told(driver: Driver, path: str) -> None:
    """Before anything is asked of the kernel."""

    async def test() -> None:
        with pytest.raises(Invalid, match="is not an NBD device"):
            await attach(new_state(), path)
        assert not driver.asked

    run(test())


@pytest.mark.skipif(Path("/sys/block/nbd0").exists(), reason="this kernel has NBD devices")
def test_a_kernel_without_the_module_is_told() -> None:
    """As most are that have booted and served no device yet: this asks the real kernel."""
    with pytest.raises(Invalid, match="modprobe nbd"):
        kernel.Netlink()


def test_netlink_messages_are_laid_out_as_the_kernel_has_them() -> None:
    """A request as `genl-ctrl-list` sends one, and answers of both kinds in one datagram."""
    name = attribute(genetlink.FAMILY_NAME, b"nbd\0")
    assert name == bytes.fromhex("0800 0200 6e626400")
    asked = genetlink.request(genetlink.CONTROLLER, genetlink.GET_FAMILY, 9, [name])
    assert asked == bytes.fromhex("1c000000 1000 0500 09000000 00000000 03010000") + name
    content = attribute(1, b"\x1d\0") + attribute(7, [attribute(1, b"abc")])
    assert content == bytes.fromhex("0600 0100 1d000000 0c00 0780 0700 0100 61626300")
    told = bytes.fromhex("28000000 1000 0000 09000000 00000000 01020000") + content
    ended = bytes.fromhex("24000000 0200 0001 09000000 00000000 f0ffffff") + asked[:16]
    (first, second) = genetlink.answers(told + ended)
    assert first == (9, None, {1: b"\x1d\0", 7: bytes.fromhex("0700 0100 61626300")})
    assert second == (9, errno.EBUSY, {})


@pytest.mark.parametrize("kept", [17, 19, 22])
def test_netlink_messages_that_are_cut_off_are_refused(kept: int) -> None:
    """The kernel sends none; a buffer that is too small would make one."""
    whole = bytes.fromhex("1c000000 1000 0000 09000000 00000000 01020000 0800 0100 1d000000")
    assert list(genetlink.answers(whole))
    with pytest.raises(ValueError, match="cut off"):
        list(genetlink.answers(whole[:kept]))
    broken = whole[:20] + b"\xff\0" + whole[22:]
    with pytest.raises(ValueError, match="cut off"):
        list(genetlink.answers(broken))
