"""How ``torusblk nbd`` stops: under nobody who uses the device, and never without end."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torus_actors.cli import blk_nbd
from torus_actors.cli.blk_nbd import AttachedClient
from torus_actors.cli.common import Failed
from torus_actors.client import Client
from torus_actors.errors import ActorCrashed, TorusError
from torus_actors.nbd.kernel import KernelDevice

WAIT_S = 10.0


class Device:
    """As `KernelDevice`; says what was done with it."""

    path = "/dev/nbd7"
    kept = True

    def __init__(self, done: list[str]) -> None:
        self.done = done
        self.ended = False
        self.sync_fails: OSError | None = None
        self.hangs = False
        self.syncing = asyncio.Event()
        self.looks = 0
        self.looks_until_gone = 1

    async def sync(self) -> None:
        """See KernelDevice."""
        self.done.append("sync")
        self.syncing.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.sync_fails is not None:
            raise self.sync_fails

    async def let_go(self) -> None:
        """See KernelDevice."""
        self.done.append("let go")

    async def cut_off(self) -> None:
        """See KernelDevice."""
        self.done.append("cut off")

    async def has_gone(self, patience_s: float) -> bool:
        """See KernelDevice."""
        await asyncio.sleep(0)
        self.looks += 1
        return self.looks >= self.looks_until_gone


class Rig:
    """A client with a device."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.rows: list[list[dict[str, Any]] | TorusError] = []
        volumes = SimpleNamespace(status=SimpleNamespace(remote=self._status))
        fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.system = SimpleNamespace(fatal=fatal, actor=lambda name: volumes)
        self.client = AttachedClient(cast(Client, self))
        self.device = Device(self.done)
        self.client.device = cast(KernelDevice, self.device)

    async def _status(self) -> list[dict[str, Any]]:
        found = self.rows.pop(0)
        if isinstance(found, TorusError):
            raise found
        return found

    async def stop(self) -> None:
        """See Client."""
        self.done.append("stop")


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test that may not take long."""
    asyncio.run(asyncio.wait_for(test, WAIT_S))


def test_it_stops_when_nobody_uses_the_device(caplog: pytest.LogCaptureFixture) -> None:
    """What the kernel has in memory is in the volume before that is closed."""

    async def test() -> None:
        rig = Rig()
        rig.device.looks_until_gone = 4
        with caplog.at_level(logging.WARNING):
            await rig.client.stop()
        assert rig.done == ["sync", "let go", "cut off", "stop"]
        assert rig.device.looks == 4
        (line,) = caplog.messages
        assert line.startswith("/dev/nbd7 is in use: it is detached when it is unmounted")

    run(test())


def test_a_device_that_goes_at_once_is_told_of_to_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is nothing to say."""

    async def test() -> None:
        rig = Rig()
        with caplog.at_level(logging.WARNING):
            await rig.client.stop()
        assert rig.done == ["sync", "let go", "cut off", "stop"]
        assert not caplog.messages

    run(test())


def test_what_could_not_be_written_is_told() -> None:
    """And everything is stopped all the same."""

    async def test() -> None:
        rig = Rig()
        rig.device.sync_fails = OSError(errno.EIO, "Input/output error")
        with pytest.raises(Failed, match=r"/dev/nbd7: what was written last is not in the volume"):
            await rig.client.stop()
        assert rig.done == ["sync", "let go", "cut off", "stop"]

    run(test())


def test_a_device_that_nobody_serves_any_more_is_not_waited_for() -> None:
    """Its sync would have no end."""

    async def test() -> None:
        rig = Rig()
        rig.device.hangs = True
        stopping = asyncio.ensure_future(rig.client.stop())
        await rig.device.syncing.wait()
        rig.system.fatal.set_exception(RuntimeError("a child died too often"))
        await stopping
        assert rig.done == ["sync", "cut off", "stop"]

    run(test())


def test_a_client_without_a_device_just_stops() -> None:
    """As where there was none to attach to."""

    async def test() -> None:
        rig = Rig()
        rig.client.device = None
        await rig.client.stop()
        assert rig.done == ["stop"]

    run(test())


def test_it_is_over_when_the_volume_was_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one's volume, and actors that are being restarted, are nothing to stop for."""
    monkeypatch.setattr(blk_nbd, "FENCED_POLL_S", 0.0)

    async def test() -> None:
        rig = Rig()
        rig.device.looks_until_gone = 100
        well = {"name": "demo", "fenced": False, "failure": ""}
        other = {"name": "other", "fenced": True, "failure": "gone"}
        lost = {"name": "demo", "fenced": True, "failure": "epoch 1 is over"}
        rig.rows = [[well], ActorCrashed("volumes"), [well, other], [other, lost]]
        with pytest.raises(
            Failed, match=r"^volume demo was taken over by another client \(epoch 1"
        ):
            await rig.client.until_over("demo")
        assert not rig.rows
        # That what comes late is not written is no news then.
        rig.device.looks_until_gone = 0
        rig.device.sync_fails = OSError(errno.EIO, "Input/output error")
        await rig.client.stop()
        assert rig.done == ["sync", "let go", "cut off", "stop"]

    run(test())


def test_it_is_over_when_nobody_keeps_the_device() -> None:
    """It would not be ended after a kill of this process."""

    async def test() -> None:
        rig = Rig()
        rig.device.looks_until_gone = 100
        rig.device.kept = False
        with pytest.raises(Failed, match=r"^the process that keeps /dev/nbd7 was killed$"):
            await rig.client.until_over("demo")

    run(test())


def test_it_is_over_when_the_device_was_detached() -> None:
    """By `nbd-client -d`, for one."""

    async def test() -> None:
        rig = Rig()
        with pytest.raises(Failed, match=r"^/dev/nbd7 was detached by another program, or"):
            await rig.client.until_over("demo")

    run(test())
