"""Attaching to the kernel's NBD driver, which a fake stands for; the real one: `tests/kernel`."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from torus_actors.actors import same_machine
from torus_actors.errors import Exists, Invalid
from torus_actors.nbd import genetlink, keeper, kernel
from torus_actors.nbd.connection import NbdConnection, NbdState
from torus_actors.nbd.genetlink import attribute
from torus_actors.nbd.memory import MemoryDevice, MemoryExports
from torus_actors.nbd.requests import ExportInfo

MIB = 1 << 20
FAKE = Path(__file__).with_name("nbd_keeper.py")
GONE_S = 20.0


class Asked:
    """What the fake driver was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def all(self) -> list[tuple[int, dict[int, int]]]:
        """Commands, and the numbers they came with."""
        if not self.path.exists():
            return []
        return [
            (
                command,
                {
                    int(kind): int.from_bytes(bytes.fromhex(value), "little")
                    for kind, value in told.items()
                },
            )
            for command, told in map(json.loads, self.path.read_text().splitlines())
        ]

    @property
    def commands(self) -> list[int]:
        """Without the numbers."""
        return [command for command, _ in self.all]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Put a driver in the place of the kernel's."""
    monkeypatch.setattr(kernel, "KEEPER", (sys.executable, str(FAKE)))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("PYTHONPATH", str(Path(kernel.__file__).parents[2]))
    return Asked(tmp_path / "asked")


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on the loop that production uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(test, 60.0))


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


async def until_given_back(state: NbdState) -> None:
    """Until no connection is left, nor an export open."""
    async with asyncio.timeout(GONE_S):
        await asyncio.gather(*[each.lost for each in set(state.connections) if each.lost])
        await state.settled()
    assert not state.open_names


def new_state(size: int = MIB + 100) -> NbdState:
    """A server with an export that does not end at a sector's end."""
    return NbdState(MemoryExports({"demo": (ExportInfo("demo", size), MemoryDevice(size))}))


def test_a_device_is_served_from_attaching_to_its_end(asked: Asked) -> None:
    """The kernel is told all it needs, reads what it wrote, and the export is given back."""

    async def test() -> None:
        state = new_state()
        device = await attach(state)
        assert device.path == "/dev/nbd0"
        assert device.kept
        flags = int(ExportInfo("demo", MIB).flags(structured=False))
        assert asked.all == [
            (
                keeper.CONNECT,
                {
                    keeper.SIZE_BYTES: MIB,
                    keeper.BLOCK_SIZE_BYTES: 512,
                    keeper.SERVER_FLAGS: flags,
                },
            ),
            (
                keeper.RECONFIGURE,
                {keeper.INDEX: 0, keeper.CLIENT_FLAGS: keeper.DISCONNECT_ON_CLOSE},
            ),
        ]
        (connection,) = state.connections
        assert connection.export == "demo"
        await device.sync()
        assert not device.ended
        await device.let_go()
        assert await device.has_gone(GONE_S)
        await until_given_back(state)
        await device.cut_off()
        # It has gone: nothing is left to be ended, which may be somebody else's by now.
        assert keeper.DISCONNECT not in asked.commands

    run(test())


def test_a_device_in_use_is_ended_with_its_server(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it would wait without end."""
    monkeypatch.setenv("IN_USE", "1")

    async def test() -> None:
        state = new_state()
        device = await attach(state)
        await device.let_go()
        assert not await device.has_gone(0.2)
        await device.cut_off()  # as if this process had ended
        assert await device.has_gone(GONE_S)
        assert asked.commands[-1] == keeper.DISCONNECT
        await until_given_back(state)

    run(test())


@pytest.mark.parametrize("path", ["/dev/nbd3", "nbd3"])
def test_a_device_can_be_named(asked: Asked, path: str) -> None:
    """With its directory, or without."""

    async def test() -> None:
        device = await attach(new_state(), path)
        assert device.path == "/dev/nbd3"
        assert asked.all[0][1][keeper.INDEX] == 3
        await device.cut_off()
        assert await device.has_gone(GONE_S)

    run(test())


@pytest.mark.parametrize(
    ("command", "number", "error", "told"),
    [
        (keeper.CONNECT, errno.EBUSY, Exists, "/dev/nbd3 is in use: name another one"),
        (keeper.CONNECT, errno.EPERM, Invalid, "cannot attach to /dev/nbd3: only root may"),
        (keeper.CONNECT, errno.EINVAL, Invalid, "cannot attach to /dev/nbd3: Invalid argument"),
        (keeper.RECONFIGURE, errno.EINVAL, Invalid, "cannot attach to /dev/nbd3: Invalid"),
    ],
)
def test_what_the_kernel_refuses_is_told(
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    command: int,
    number: int,
    error: type[Exception],
    told: str,
) -> None:
    """In one line; the export is given back, and no device is left that nobody serves."""
    monkeypatch.setenv("REFUSES", json.dumps({command: number}))

    async def test() -> None:
        state = new_state()
        with pytest.raises(error, match=told):
            await attach(state, "/dev/nbd3")
        await until_given_back(state)
        assert (keeper.DISCONNECT in asked.commands) is (command == keeper.RECONFIGURE)

    run(test())


def test_a_device_that_cannot_be_opened_is_ended(asked: Asked) -> None:
    """It would stay for ever: only who has a device open can let go of it."""

    async def test() -> None:
        state = new_state()
        with pytest.raises(Invalid, match="nbd4: No such file"):
            await attach(state, "/dev/nbd4")
        assert asked.commands == [keeper.CONNECT, keeper.DISCONNECT]
        await until_given_back(state)

    run(test())


@pytest.mark.parametrize("path", ["/dev/sda", "/tmp/nbd0", "nbd", "/dev/nbd0p1"])
def test_a_device_that_is_none_is_told(asked: Asked, path: str) -> None:
    """Before anything is asked of the kernel."""

    async def test() -> None:
        with pytest.raises(Invalid, match="is not an NBD device"):
            await attach(new_state(), path)
        assert not asked.all

    run(test())


def test_what_has_no_sector_is_no_device(asked: Asked) -> None:
    """It could not be read or written."""

    async def test() -> None:
        with pytest.raises(Invalid, match="demo is smaller than a sector"):
            await attach(new_state(511))
        assert not asked.all

    run(test())


def test_an_attaching_that_is_given_up_leaves_no_device(asked: Asked) -> None:
    """Whenever that is."""

    async def test() -> None:
        state = new_state()
        attaching = asyncio.ensure_future(attach(state))
        while not asked.commands:  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.001)
        attaching.cancel()
        await asyncio.wait([attaching])
        await until_given_back(state)
        assert keeper.DISCONNECT in asked.commands

    run(test())


def test_who_kept_a_device_is_missed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it fails, and does not wait."""
    monkeypatch.setenv("IN_USE", "1")

    async def test() -> None:
        device = await attach(new_state())
        device._process.kill()
        await device._process.wait()
        assert not device.kept
        with pytest.raises(OSError, match="Input/output error"):
            await device.sync()
        await device.cut_off()

    run(test())


@pytest.mark.skipif(Path("/sys/block/nbd0").exists(), reason="this kernel has NBD devices")
def test_a_kernel_without_the_module_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As most are that have booted and served no device yet: this asks the real kernel."""
    monkeypatch.setenv("PYTHONPATH", str(Path(kernel.__file__).parents[2]))

    async def test() -> None:
        state = new_state()
        with pytest.raises(Invalid, match="modprobe nbd"):
            await attach(state)
        await until_given_back(state)

    run(test())


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
