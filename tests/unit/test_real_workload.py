"""What judges real processes sees when they lie: the driver, against servers that lose things."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torus_actors.errors import Fenced
from torus_actors.nbd.memory import MemoryDevice, MemoryExports
from torus_actors.nbd.requests import ExportInfo, Op, Replies, Request
from torus_actors.nbd.server import serve
from torus_actors.scenarios.oracle import VolumeOracle
from torus_actors.scenarios.real_run import draw_real, not_real
from torus_actors.scenarios.real_workload import RealDriver
from torus_actors.scenarios.spec import SCENARIOS
from torus_actors.scenarios.workload import Workload

SIZE = 256 << 10
DEADLINE_S = 30.0
LOAD = Workload(workers=4, flush=2.0, pause_s=0.001)


class Disk(MemoryDevice):
    """Memory that can be taken back to what it was; may fence whoever uses it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.fenced = False
        self.spoil = False

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """Refuse everything once it is fenced."""
        if self.fenced:
            raise Fenced("another session has begun")
        super().submit(conn, requests)
        if self.spoil and any(request.op is Op.WRITE for request in requests):
            self.data[random.randrange(SIZE)] ^= 1


class Stage:
    """Stands for a cluster whose one client process is this one.

    Attributes:
        failures: what the driver reported.
    """

    def __init__(self, path: Path) -> None:
        self.failures: list[str] = []
        self.shape = SimpleNamespace(block_size=8 << 10)
        process = SimpleNamespace(socket=path)
        self.host: Any = SimpleNamespace(process=process, boot="client.1", up=True, hit=set())
        self.oracle = VolumeOracle(0, SIZE, self.fail)
        self.driver = RealDriver(
            self,  # type: ignore[arg-type]
            self.oracle,
            "vol",
            [self.host],
            LOAD,
            random.Random(1),
            errors_allowed=False,
        )

    def say(self, text: str) -> None:
        """Nobody listens."""

    def fail(self, text: str) -> None:
        """Keep it."""
        self.failures.append(text)

    async def work(self, disk: Disk, flushes: int) -> None:
        """One session on a disk, until so many flushes were acknowledged, and its orderly end."""
        exports = MemoryExports({"vol": (ExportInfo("vol", SIZE), disk)})
        listener = await serve(exports, path=str(self.host.process.socket))
        driver = self.driver
        driver.stopping = False
        session = asyncio.create_task(driver.session(self.host))
        wanted = driver.flushes + flushes

        async def enough() -> None:
            while True:
                if driver.flushes >= wanted or self.failures:
                    return
                await asyncio.sleep(0.005)

        busy = asyncio.create_task(enough())
        await asyncio.wait([session, busy], return_when=asyncio.FIRST_COMPLETED)
        busy.cancel()
        driver.stopping = True
        await session
        await listener.close()


def play(tmp_path: Path, *disks: Disk) -> Stage:
    """One session on each disk, one after the other; the judge takes them for one volume."""

    async def main() -> Stage:
        stage = Stage(tmp_path / "s")
        async with asyncio.timeout(DEADLINE_S):
            for disk in disks:
                await stage.work(disk, 20)
        return stage

    return asyncio.run(main())


def test_an_honest_disk_is_not_blamed(tmp_path: Path) -> None:
    """Two sessions on a disk that keeps everything: no failure, and much was done."""
    disk = Disk(SIZE)
    stage = play(tmp_path, disk, disk)
    assert not stage.failures
    assert stage.driver.sessions == 2 and stage.driver.operations > 100


def test_lost_flushes_are_seen(tmp_path: Path) -> None:
    """A disk that has forgotten what was flushed is found out when it is opened again."""
    stage = play(tmp_path, Disk(SIZE), Disk(SIZE))
    assert any("on opening is zeros" in failure for failure in stage.failures)


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    """A disk that changes a bit now and then is found out, by a read or at the next opening."""
    disk = Disk(SIZE)
    disk.spoil = True
    assert any("torn" in each or "garbage" in each for each in play(tmp_path, disk, disk).failures)


def test_a_fence_nobody_asked_for_is_seen(tmp_path: Path) -> None:
    """ESHUTDOWN without another session is a failure: a client lost its volume for nothing."""
    disk = Disk(SIZE)
    disk.fenced = True
    stage = play(tmp_path, disk)
    assert stage.failures


@pytest.mark.parametrize("name", [name for name, each in SCENARIOS.items() if not not_real(each)])
def test_the_draw_is_that_of_the_simulator(name: str) -> None:
    """A seed makes the same cluster for both; faults without a real form are left out."""
    drawn = draw_real(SCENARIOS[name], 3, 5.0)
    assert drawn.duration_s == 5.0
    assert set(drawn.faults) <= set(SCENARIOS[name].faults)
    assert "power_cut" not in drawn.faults
    assert drawn.faults or not SCENARIOS[name].faults
