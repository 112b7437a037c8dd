"""One run of a scenario on real processes.

The same data as for the simulator, and the same draw of a seed; but what happens when is up to the
machine, so a seed that fails need not fail again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torus_actors.scenarios.faults import OVERLAPPING
from torus_actors.scenarios.netns import Network
from torus_actors.scenarios.oracle import VolumeOracle
from torus_actors.scenarios.processes import Unexpected
from torus_actors.scenarios.real_cluster import START_S_MAX, RealCluster
from torus_actors.scenarios.real_faults import (
    CUTTING,
    CUTTING_IF_POSSIBLE,
    NOT_REAL,
    REAL_FAULTS,
    RealField,
)
from torus_actors.scenarios.real_workload import RealDriver
from torus_actors.scenarios.spec import DRAWN_APART, Drawn, Scenario, draw

REST_S = 2.0
"""Load goes on for so long after the last fault."""

LAST_SESSION_S_MAX = 150.0
CONVERGE_S_MAX = 120.0
"""All copies are there so long after the last fault at the latest."""

CONVERGE_POLL_S = 1.0

SIZE_KNOBS = "torus_actors.actors.block_store."
"""Constants that a scenario cannot do without; others only make things happen sooner, and real
processes go without them."""

IN_PART = {"everything"}
"""Scenarios that make sense without those of their faults that have no real form."""


@dataclass(slots=True)
class RealResult:
    """How a run ended.

    Attributes:
        failures: what must not happen and did; none is success.
        logs: where the processes' logs are, if they were kept.
        took_s: wall clock, all in all.
        slowest_s: of all operations.
    """

    failures: list[str] = field(default_factory=list)
    logs: Path | None = None
    counts: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    flushes: int = 0
    errors: int = 0
    sessions: int = 0
    took_s: float = 0.0
    slowest_s: float = 0.0

    def describe(self) -> str:
        """In two lines."""
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts.items()) or "none"
        return (
            f"faults: {counts}\n"
            f"{self.operations} operations, {self.flushes} flushes, {self.errors} errors seen by "
            f"clients, {self.sessions} sessions, the slowest operation {self.slowest_s:.1f} s; "
            f"{self.took_s:.0f} s altogether"
        )


def not_real(scenario: Scenario) -> str:
    """Why a scenario cannot run on real processes; nothing if it can."""
    if any(name.startswith(SIZE_KNOBS) for name in scenario.knobs):
        return "it needs nodes that are smaller than real ones can be"
    # Those that were added later are not what the scenario is about.
    lacking = [kind for kind in scenario.faults if kind not in REAL_FAULTS.keys() | DRAWN_APART]
    if lacking and scenario.name not in IN_PART:
        return f"{lacking[0]}: {NOT_REAL[lacking[0]]}"
    return ""


def needs_network(scenario: Scenario) -> bool:
    """Whether its hosts must have addresses of their own."""
    return bool(CUTTING & set(scenario.faults))


def gains_from_network(scenario: Scenario) -> bool:
    """Whether more can be done to it then."""
    return bool((CUTTING | CUTTING_IF_POSSIBLE) & set(scenario.faults))


def draw_real(scenario: Scenario, seed: int, seconds: float | None) -> Drawn:
    """What the seed makes of the scenario, without the faults that have no real form.

    Args:
        scenario: one that can run.
        seed: decides.
        seconds: faults strike no longer than this.
    """
    drawn = draw(scenario, seed)
    faults = {kind: every_s for kind, every_s in drawn.faults.items() if kind in REAL_FAULTS}
    duration_s = drawn.duration_s if seconds is None else min(seconds, drawn.duration_s)
    return dataclasses.replace(drawn, faults=faults, duration_s=duration_s, knobs={})


@contextlib.contextmanager
def working_directory(result: RealResult) -> Iterator[Path]:
    """A directory that is removed at the end, unless the run failed."""
    directory = Path(tempfile.mkdtemp(prefix="torus-real-"))
    try:
        yield directory
        if result.failures:
            result.logs = directory
    finally:
        if result.logs is None:
            shutil.rmtree(directory)
        else:
            for folder in directory.glob("node-*/"):
                shutil.rmtree(folder)


def run_real(
    scenario: Scenario,
    seed: int,
    drawn: Drawn,
    network: Network | None,
    say: Callable[[str], None],
) -> RealResult:
    """Run a scenario, and end all its processes.

    Args:
        scenario: one that can run.
        seed: of all that is drawn.
        drawn: from it.
        network: for the hosts; None puts all on loopback.
        say: called with each line of progress.
    """
    result = RealResult()
    began = time.monotonic()
    with working_directory(result) as directory:
        asyncio.run(interruptible(_play(scenario, seed, drawn, network, directory, say, result)))
    result.took_s = time.monotonic() - began
    return result


async def interruptible(work: Coroutine[Any, Any, None]) -> None:
    """Do some work; SIGINT and SIGTERM cancel it once, so that it can end all that it started.

    Raises:
        KeyboardInterrupt: it was cancelled so.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    asked: list[int] = []

    def ask(number: int) -> None:
        if not asked:
            asked.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask, number)
    await asyncio.wait([task])
    if asked:
        raise KeyboardInterrupt
    task.result()


async def _play(
    scenario: Scenario,
    seed: int,
    drawn: Drawn,
    network: Network | None,
    directory: Path,
    say: Callable[[str], None],
    result: RealResult,
) -> None:
    rng = random.Random(f"{seed}/real")
    cluster = RealCluster(directory, drawn.shape, say, rng, network)
    result.failures = cluster.failures
    drivers: list[RealDriver] = []
    try:
        try:
            await cluster.start()
            drivers = make_drivers(cluster, scenario, drawn, seed)
            await _acts(cluster, scenario, drawn, drivers, seed, result)
        except Unexpected as error:
            cluster.fail(str(error))
        except Exception:
            # A fault of this program itself is a failed run too.
            cluster.fail(traceback.format_exc())
    finally:
        await cluster.end()
        for driver in drivers:
            result.operations += driver.operations
            result.flushes += driver.flushes
            result.errors += driver.errors
            result.sessions += driver.sessions
            result.slowest_s = max(result.slowest_s, driver.slowest_s)


def make_drivers(
    cluster: RealCluster, scenario: Scenario, drawn: Drawn, seed: int
) -> list[RealDriver]:
    """One for each volume, beginning on different clients."""
    drivers = []
    hosts = cluster.client_hosts
    for number, size in enumerate(drawn.shape.volume_bytes):
        turned = number % len(hosts)
        oracle = VolumeOracle(number, size, cluster.fail)
        drivers.append(
            RealDriver(
                cluster,
                oracle,
                f"v{number}",
                hosts[turned:] + hosts[:turned],
                drawn.workload,
                random.Random(f"{seed}/work/{number}"),
                scenario.errors_allowed,
            )
        )
    return drivers


async def _acts(
    cluster: RealCluster,
    scenario: Scenario,
    drawn: Drawn,
    drivers: list[RealDriver],
    seed: int,
    result: RealResult,
) -> None:
    work = [asyncio.create_task(driver.run()) for driver in drivers]
    try:
        async with asyncio.timeout(START_S_MAX):
            await asyncio.gather(*[driver.verified.wait() for driver in drivers])
        await asyncio.sleep(scenario.calm_s)
        loop = asyncio.get_running_loop()
        end = loop.time() + drawn.duration_s
        fields = RealField(cluster, drivers, random.Random(f"{seed}/fault"), drawn.broken_max)
        async with asyncio.TaskGroup() as group:
            for kind, every_s in drawn.faults.items():
                rng = random.Random(f"{seed}/fault/{kind}")
                group.create_task(_strike(kind, every_s, end, fields, rng, result))
            group.create_task(asyncio.sleep(drawn.duration_s))
        cluster.say("no more faults")
        await cluster.heal()
        # Everything must get to work again, and then come to rest.
        await asyncio.sleep(REST_S)
        for driver in drivers:
            driver.stopping = True
        _, pending = await asyncio.wait(work, timeout=LAST_SESSION_S_MAX)
        for driver, task in zip(drivers, work, strict=True):
            if task in pending:
                cluster.fail(f"the workload of {driver.name} did not come to its end")
            else:
                task.result()
    finally:
        for task in work:
            task.cancel()
        await asyncio.wait(work)
    await last_look(cluster, drivers)
    await converge(cluster, [driver.name for driver in drivers], scrub="rot" in scenario.faults)


async def _strike(
    kind: str,
    every_s: float,
    end: float,
    fields: RealField,
    rng: random.Random,
    result: RealResult,
) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as under_way:
        while True:
            pause = min(rng.expovariate(1 / every_s), 4 * every_s)
            if loop.time() + pause >= end:
                return
            await asyncio.sleep(pause)
            result.counts[kind] = result.counts.get(kind, 0) + 1
            if kind in OVERLAPPING:
                under_way.create_task(_once(kind, fields))
            else:
                await _once(kind, fields)


async def _once(kind: str, fields: RealField) -> None:
    try:
        await REAL_FAULTS[kind](fields)
    except Unexpected as error:
        fields.cluster.fail(f"{kind}: {error}")


async def last_look(cluster: RealCluster, drivers: list[RealDriver]) -> None:
    """A client that has cached nothing reads all volumes, twice, with a write in between."""
    await asyncio.gather(*[cluster.stop(host) for host in cluster.client_hosts])
    host = cluster.client_hosts[0]
    for _ in range(2):
        if not await cluster.boot_client(host):
            cluster.fail("the last client did not start")
            return
        for driver in drivers:
            driver.host = host
            await driver.last_session(host)
        await cluster.stop(host)
    cluster.say("all volumes were read back")


async def converge(cluster: RealCluster, volumes: list[str], scrub: bool) -> None:
    """Wait until every block has all its copies, each read and compared with its checksums.

    Args:
        cluster: nothing is broken in it any more.
        volumes: names.
        scrub: have the nodes look for damaged copies, which nobody else may have read.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + CONVERGE_S_MAX
    while True:
        if scrub:
            cluster.say((await cluster.tool("torusctl", "debug", "scrub")).strip())
        lacking = await asyncio.gather(*[cluster.audit(name, deep=True) for name in volumes])
        if not any(lacking):
            break
        if loop.time() > end:
            cluster.fail(f"copies lack in the end: {'; '.join(t for t in lacking if t)}")
            return
        await asyncio.sleep(CONVERGE_POLL_S)
    # There are enough; that each is where the ring wants it would take until the next round.
    cluster.say((await cluster.tool("torusctl", "debug", "rebalance")).strip())
    audits = [cluster.audit(name, deep=False, placed=True) for name in volumes]
    for misplaced in await asyncio.gather(*audits):
        if misplaced:
            cluster.fail(f"after rebalancing: {misplaced}")
    cluster.say("all copies are there and right")
