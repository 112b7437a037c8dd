"""One simulated run of one scenario with one seed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

import pykka

from torus_actors.scenarios.checks import Checker, Excess
from torus_actors.scenarios.clones import look_at, part_with
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.faults import (
    COPIES_LOST,
    DAMAGING,
    FAULTS,
    OVERLAPPING,
    restart_if_failed,
)
from torus_actors.scenarios.field import Field
from torus_actors.scenarios.mutation import Mutant, put_in
from torus_actors.scenarios.oracle import VolumeOracle
from torus_actors.scenarios.requests import RequestDriver
from torus_actors.scenarios.simloop import SimLoop, Stuck, current_process
from torus_actors.scenarios.spec import KNOBS, Drawn, Scenario, draw
from torus_actors.scenarios.trace import Trace
from torus_actors.scenarios.workload import Driver

CONVERGE_S_MAX = 300.0
"""All copies are there, and all garbage is gone, so long after the last fault at the latest."""

LAST_SESSION_S_MAX = 400.0

NOT_OUR_BUG = ("was never retrieved",)
"""What asyncio reports of futures whose error nobody fetched: no defect by itself."""


@dataclass(slots=True)
class Result:
    """How a run ended.

    Attributes:
        failures: what must not happen and did; none is success.
        digest: equal for two runs of a seed.
        virtual_s: how long it was inside.
        cpu_s: processor time that it took.
        slowest_s: the longest that an operation took, of clients that no fault hit themselves.
        slowest: which it was.
        lines: the last lines of the trace.
        seconds: as `run` was told.
    """

    scenario: str
    seed: int
    failures: list[str] = field(default_factory=list)
    digest: str = ""
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    operations: int = 0
    flushes: int = 0
    errors: int = 0
    sessions: int = 0
    deletions: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    drawn: Drawn | None = None
    seconds: float | None = None
    mutant: str = ""

    @property
    def replay(self) -> str:
        """The command that does it again."""
        seconds = f" --seconds {self.seconds}" if self.seconds is not None else ""
        mutant = f" --mutant {self.mutant}" if self.mutant else ""
        options = f"--seed {self.seed}{seconds}{mutant}"
        return f"python -m torus_actors.scenarios run {self.scenario} {options}"


def run(
    scenario: Scenario,
    seed: int,
    trace_file: TextIO | None = None,
    drawn: Drawn | None = None,
    *,
    seconds: float | None = None,
    mutant: Mutant | None = None,
    one_failure: bool = False,
) -> Result:
    """Run a scenario with a seed, in virtual time.

    Args:
        scenario: what happens.
        seed: decides everything random.
        trace_file: gets every event.
        drawn: instead of what the seed makes of the scenario.
        seconds: faults strike no longer than this, the first ones as much sooner.
        mutant: a bug that the production code has meanwhile.
        one_failure: stop at the first.
    """
    drawn = drawn or draw(scenario, seed)
    if seconds is not None and seconds < drawn.duration_s:
        drawn = replace(drawn, duration_s=seconds, first_share=seconds / drawn.duration_s)
    with put_in(mutant), _collected_afterwards():
        result = _run(scenario, seed, trace_file, drawn, one_failure)
    result.seconds = seconds
    result.mutant = mutant.name if mutant is not None else ""
    return result


def _run(
    scenario: Scenario, seed: int, trace_file: TextIO | None, drawn: Drawn, one_failure: bool
) -> Result:
    result = Result(scenario.name, seed, drawn=drawn)
    trace = Trace(trace_file)
    loop = SimLoop()
    began, cpu = loop.time(), time.process_time()
    play = _Play(loop, scenario, seed, drawn, trace, result)
    with _knobs({**KNOBS, **drawn.knobs}), _logs_into(play.cluster), _own_actors():
        try:
            loop.run_until_complete(play.until_failure() if one_failure else play.all())
        except Stuck as error:
            play.cluster.fail(str(error))
        finally:
            virtual_s = loop.time() - began
            for context in loop.errors:
                if not any(known in str(context["message"]) for known in NOT_OUR_BUG):
                    play.cluster.fail(f"{context['message']}: {context.get('exception')!r}")
            play.finish()
            loop.close()
    result.failures = play.cluster.failures
    result.digest = trace.digest
    result.virtual_s = virtual_s
    result.cpu_s = time.process_time() - cpu
    result.lines = list(trace.lines)
    return result


class _Play:
    """The acts of one run."""

    def __init__(
        self,
        loop: SimLoop,
        scenario: Scenario,
        seed: int,
        drawn: Drawn,
        trace: Trace,
        result: Result,
    ) -> None:
        self.loop = loop
        self.scenario = scenario
        self.drawn = drawn
        self.result = result
        self.cluster = cluster = Cluster(loop, seed, drawn.shape, trace)
        self.checker = Checker(cluster)
        if scenario.full_copies:
            self.checker.copies_min = drawn.shape.replication
        if not COPIES_LOST & set(scenario.faults):
            self.checker.copies_left_min = drawn.shape.replication
        self.checker.nothing_rots = not DAMAGING & set(scenario.faults)
        self.oracles = [
            VolumeOracle(number, size, cluster.fail)
            for number, size in enumerate(drawn.shape.volume_bytes)
        ]
        make = RequestDriver if drawn.workload.requests else Driver
        self.drivers = [
            make(
                cluster,
                oracle,
                f"v{oracle.number}",
                _turned(cluster.clients, oracle.number),
                drawn.workload,
                cluster.rng(f"workload{oracle.number}"),
                scenario.errors_allowed,
                scenario.blocks_may_lack,
                scenario.op_s_max,
            )
            for oracle in self.oracles
        ]
        self.field = Field(
            cluster,
            self.checker,
            self.drivers,
            cluster.rng("faults"),
            drawn.broken_max,
            scenario.one_victim,
        )
        self.field.snapshots.must_be_made = set(scenario.faults) == {"take_snapshots"}

    async def until_failure(self) -> None:
        """The play as far as it goes well."""
        playing = self.loop.create_task(self.all())
        await asyncio.wait([playing, self.cluster.failed], return_when=asyncio.FIRST_COMPLETED)
        if playing.done():
            playing.result()

    async def all(self) -> None:
        """The whole play."""
        cluster, loop = self.cluster, self.loop
        await cluster.start()
        self.checker.begin()
        work = [loop.create_task(driver.run()) for driver in self.drivers]
        await asyncio.sleep(self.scenario.calm_s)
        await self._faults()
        await self._heal()
        # Faults are over: everything must get to work again, and then come to rest.
        await asyncio.sleep(3.0)
        for driver in self.drivers:
            driver.stopping = True
        _, pending = await asyncio.wait(work, timeout=LAST_SESSION_S_MAX)
        if pending:
            for driver, task in zip(self.drivers, work, strict=True):
                if task in pending:
                    cluster.fail(f"the workload of {driver.name} did not come to its end")
            return
        for task in work:
            task.result()
        await self._last_look()
        clone = await part_with(cluster, self.drivers, self.field.snapshots, cluster.rng("clones"))
        await self._converge()
        if clone is not None:
            await look_at(cluster, cluster.clients[0], clone)

    async def _faults(self) -> None:
        end = self.field.ends_at = self.loop.time() + self.drawn.duration_s
        tasks = [
            self.loop.create_task(self._strike(kind, every_s, end))
            for kind, every_s in self.drawn.faults.items()
        ]
        await asyncio.sleep(self.drawn.duration_s)
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            task.result()

    async def _strike(self, kind: str, every_s: float, end: float) -> None:
        rng: random.Random = self.cluster.rng(f"fault/{kind}")
        fault = FAULTS[kind]
        under_way: list[asyncio.Task[None]] = []
        share = self.drawn.first_share
        while True:
            pause = min(rng.expovariate(1 / every_s), 4 * every_s) * share
            share = 1.0
            if self.loop.time() + pause >= end:
                await asyncio.gather(*under_way)
                return
            await asyncio.sleep(pause)
            self.result.counts[kind] = self.result.counts.get(kind, 0) + 1
            if kind in OVERLAPPING:
                under_way.append(self.loop.create_task(fault(self.field)))
            else:
                await fault(self.field)

    async def _heal(self) -> None:
        """End all faults that are still on."""
        cluster = self.cluster
        cluster.say("no more faults")
        cluster.network.heal()
        hosts = [cluster.meta_host, *cluster.nodes, *cluster.clients, *cluster.spares]
        for host in hosts:
            host.disk_factor = 1.0
            host.cut_after = None
            for disk in host.disks.values():
                disk.heal()
            cluster.power_on(host)
            if host.process is not None:
                host.process.resume()
        for host in cluster.nodes:
            if host.wanted and not host.up:
                await cluster.start_node(host)
            await restart_if_failed(cluster, host)

    async def _last_look(self) -> None:
        """A client that has cached nothing reads all volumes, twice, with a write in between."""
        cluster = self.cluster
        for host in cluster.clients:
            cluster.kill(host)
        host = cluster.clients[0]
        for again in (False, True):
            if await cluster.start_client(host) is None:
                cluster.fail("the last client did not start")
                return
            for driver in self.drivers:
                driver.host = host
                task = cluster.run_on(host, driver.last_session(host))
                await cluster.finish(host, task, LAST_SESSION_S_MAX)
            snapshots = self.field.snapshots
            if snapshots.kept:
                task = cluster.run_on(host, snapshots.last_look(host, again))
                await cluster.finish(host, task, LAST_SESSION_S_MAX)
            await cluster.stop(host)
            if not again:
                await self.field.resizes.grow_all()
            await self.field.readers.last_look(self.drivers, again)

    async def _converge(self) -> None:
        """All copies are made, and all garbage goes."""
        loop, checker = self.loop, self.checker
        damaged = any(kind in DAMAGING for kind in self.scenario.faults)
        end = loop.time() + CONVERGE_S_MAX
        lacking: list[str] = []
        garbage: list[Excess | str] = []
        leavings: list[str] = []
        while loop.time() < end:
            await asyncio.sleep(2.0)
            garbage = await checker.garbage()
            leavings = await checker.leavings()
            # Every byte is read once the rest is as it should be.
            lacking = await checker.lacking(deep=False)
            if not lacking and not garbage and not leavings:
                lacking = await checker.lacking()
                if not lacking:
                    return
                if damaged:
                    for host in self.cluster.members_up:
                        host.tree.system.actor("scrubber").start_pass.tell()
        if lacking:
            self.cluster.fail(f"{len(lacking)} copies lack in the end: {'; '.join(lacking[:3])}")
        if garbage:
            told = "; ".join(map(str, garbage[:3]))
            self.cluster.fail(f"{len(garbage)} blocks too many: {told}")
        if leavings:
            self.cluster.fail(f"{len(leavings)} things left behind: {'; '.join(leavings[:3])}")

    def finish(self) -> None:
        """Count."""
        result = self.result
        for driver in self.drivers:
            result.operations += driver.operations
            result.flushes += driver.flushes
            result.errors += driver.errors
            result.sessions += driver.sessions
            if driver.slowest_s > result.slowest_s:
                result.slowest_s, result.slowest = driver.slowest_s, driver.slowest
        result.deletions = self.checker.deletions


def _turned(hosts: list[Host], by: int) -> list[Host]:
    by %= len(hosts)
    return hosts[by:] + hosts[:by]


@contextlib.contextmanager
def _knobs(values: dict[str, Any]) -> Iterator[None]:
    """Set module constants, and set them back."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for path, value in values.items():
            module_name, _, name = path.rpartition(".")
            module = importlib.import_module(module_name)
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)


@contextlib.contextmanager
def _own_actors() -> Iterator[None]:
    """Take the actors of killed processes out of pykka's registry, which would keep them."""
    before = {ref.actor_urn for ref in pykka.ActorRegistry.get_all()}
    try:
        yield
    finally:
        for ref in pykka.ActorRegistry.get_all():
            if ref.actor_urn not in before:
                pykka.ActorRegistry.unregister(ref)


@contextlib.contextmanager
def _collected_afterwards() -> Iterator[None]:
    """Collect what a run leaves behind when it is over, so that memory does not grow.

    It is in cycles, and nothing of the run may be on the stack any more. A run is short enough not
    to collect during it, which takes a tenth of its time, and which would end what was left alone
    at moments that depend on what ran before.
    """
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what was there before is not looked through in the end
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if collecting:
            gc.enable()


class _LogHandler(logging.Handler):
    """Puts what the program logs into the trace; an actor that dies of a bug is a failure."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(logging.WARNING)
        self._cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        if process is not None and not process.alive:
            return  # the last breath of a process that has just been cut off
        text = record.getMessage()
        who = process.name if process is not None else "driver"
        self._cluster.say(f"{who} [{record.levelname.lower()}] {text}")
        bug = record.exc_info or "died" in text.split(":")[0]
        if record.levelno >= logging.ERROR and bug:
            self._cluster.fail(f"{who}: {text}")


@contextlib.contextmanager
def _logs_into(cluster: Cluster) -> Iterator[None]:
    logger = logging.getLogger("torus_actors")
    handler = _LogHandler(cluster)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
