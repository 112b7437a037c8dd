"""Endurance: one cluster of real processes, one growing volume, and kill -9 again and again.

In each round something is killed in the middle of writes and flushes: at most R-1 nodes, the
client, etcd, or several of them at the same moment. Then another client opens the volume and reads
every sector against the oracle, which is never reset. In the last rounds everything is killed at
once. Beside it fio verifies a second volume, whose client only those last rounds kill.

A killed process loses what is in its memory and nothing else: what the kernel has taken survives.
That a flush is on the disks too is what scenario ``torn_write`` shows in the simulator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torus_actors.scenarios.cluster import Shape
from torus_actors.scenarios.nbd_client import NbdClient
from torus_actors.scenarios.oracle import SECTOR, VolumeOracle
from torus_actors.scenarios.processes import Unexpected
from torus_actors.scenarios.real_cluster import RealCluster, RealHost
from torus_actors.scenarios.real_run import (
    RealResult,
    converge,
    interruptible,
    last_look,
    working_directory,
)
from torus_actors.scenarios.real_workload import RealDriver
from torus_actors.scenarios.workload import Workload

REPLICATION = 3
NODES = 4
VOLUME_BYTES = 16 << 20
FIO_BYTES = 8 << 20
STORE_BYTES = 512 << 20
"""Overwriting makes garbage faster than a small node can collect it."""

FULL_SHARE = 0.5
"""Of a node's room: who has more used is left alive until it has collected garbage. That takes two
passes in one life, and here few live so long."""

LOOK_EVERY = 5
"""Rounds; then it is looked how full the nodes are."""

ROOM_S_MAX = 120.0

LEASE_S = 2
"""Short: every reopening after the death of a client has to wait for it."""

LOAD = Workload(
    workers=8, write=5.0, read=2.0, trim=0.3, flush=1.0, pause_s=0.003, bytes_max=64 << 10
)
LOAD_S = (0.2, 1.0)
"""Load runs so long before the kill, and where the client lives, after it."""

FLUSHES_MIN = 5
"""And so many flushes were acknowledged, so that there is something to be lost."""

FLUSHES_S_MAX = 30.0
REOPEN_S_MAX = 60.0

SHAPE = Shape(
    nodes=NODES,
    clients=3,
    replication=REPLICATION,
    block_size=64 << 10,
    store_bytes=STORE_BYTES,
    volume_bytes=(VOLUME_BYTES, FIO_BYTES),
    write_cache_bytes=1 << 20,
    read_cache_bytes=1 << 20,
)

FIO = (
    "--name=job", "--ioengine=nbd", "--rw=randrw", "--bs=16k", "--iodepth=4",
    f"--size={FIO_BYTES}", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1",
    "--fsync=8", "--rate_iops=60,60", "--time_based", "--runtime=4",
)  # fmt: skip


@dataclass(slots=True)
class EnduranceResult(RealResult):
    """See RealResult.

    Attributes:
        rounds: of each kind that were passed.
        sectors: read back and compared, all rounds together.
        durable: sectors of the volume that some flush covered in the end.
        fio_jobs: that ended well.
        reopened_s: from the kill to the end of reading back, for each round.
        fullest: the largest share of a node's room that was seen used.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    sectors: int = 0
    durable: int = 0
    fio_jobs: int = 0
    reopened_s: list[float] = field(default_factory=list)
    fullest: float = 0.0

    def summary(self) -> str:
        """In a few lines."""
        rounds = ", ".join(f"{count} {kind}" for kind, count in self.rounds.items()) or "none"
        times = sorted(self.reopened_s) or [0.0]
        return (
            f"rounds passed: {rounds}\n"
            f"{self.describe()}\n"
            f"{self.sectors} sectors read back and compared, {self.durable} of the volume's are "
            f"flushed; {self.fio_jobs} fio jobs verified; from kill to read back "
            f"{times[len(times) // 2]:.1f} s in the middle, {times[-1]:.1f} s at most; "
            f"the fullest node was {self.fullest:.0%} full"
        )


def endure(
    rounds: int, everything_rounds: int, seed: int, say: Callable[[str], None]
) -> EnduranceResult:
    """Run the rounds, and end all processes.

    Args:
        rounds: with a random set of victims.
        everything_rounds: after them, in which all are killed.
        seed: of victims, moments and load.
        say: called with each line of progress.
    """
    result = EnduranceResult()
    began = time.monotonic()
    with working_directory(result) as directory:
        work = _endure(rounds, everything_rounds, seed, directory, say, result)
        asyncio.run(interruptible(work))
    result.took_s = time.monotonic() - began
    return result


async def _endure(
    rounds: int,
    everything_rounds: int,
    seed: int,
    directory: Path,
    say: Callable[[str], None],
    result: EnduranceResult,
) -> None:
    rng = random.Random(f"{seed}/endure")
    cluster = RealCluster(directory, SHAPE, say, rng, lease_s=LEASE_S)
    result.failures = cluster.failures
    endurance = _Endurance(cluster, rng, result)
    try:
        await cluster.start()
        await endurance.run(rounds, everything_rounds)
    except Unexpected as error:
        cluster.fail(str(error))
    except Exception:
        # A fault of this program itself is a failed run too.
        cluster.fail(traceback.format_exc())
    finally:
        await cluster.end()
        endurance.count()


class _Endurance:
    """The rounds; one client has the volume while the other waits to take over."""

    def __init__(self, cluster: RealCluster, rng: random.Random, result: EnduranceResult) -> None:
        self.cluster = cluster
        self.rng = rng
        self.result = result
        self.oracle = VolumeOracle(0, VOLUME_BYTES, cluster.fail)
        self.driver = RealDriver(
            cluster, self.oracle, "v0", cluster.client_hosts[:2], LOAD, rng, errors_allowed=False
        )
        self.fio_host = cluster.client_hosts[2]
        self.fio_stopping = False
        self.work: asyncio.Task[None] | None = None

    async def run(self, rounds: int, everything_rounds: int) -> None:
        """All of them, and a last look."""
        cluster = self.cluster
        await asyncio.gather(*[cluster.boot_client(host) for host in cluster.client_hosts])
        await self._reopen(self.driver.host)
        fio = asyncio.create_task(self._fio())
        try:
            for number in range(1, rounds + 1):
                if cluster.failures:
                    return
                await self._round(f"round {number} of {rounds}", self._victims(), "random")
                if not number % LOOK_EVERY:
                    await self._wait_for_room()
            self.fio_stopping = True
            await fio
        finally:
            fio.cancel()
            await asyncio.wait([fio])
        everybody = {*cluster.hosts, *cluster.client_hosts, None}
        for number in range(1, everything_rounds + 1):
            if cluster.failures:
                return
            await self._round(f"everything {number} of {everything_rounds}", everybody, "of all")
            if not number % LOOK_EVERY:
                await self._wait_for_room()
        await self._leave()
        await cluster.heal()
        await last_look(cluster, [self.driver])
        await converge(cluster, ["v0", "v1"], scrub=False)

    def _victims(self) -> set[RealHost | None]:
        """Whom to kill: some nodes, the client that has the volume, None for etcd."""
        rng = self.rng
        while True:
            victims: set[RealHost | None] = set()
            victims.update(rng.sample(self.cluster.hosts, rng.randint(0, REPLICATION - 1)))
            if rng.random() < 0.5:
                victims.add(self.driver.host)
            if rng.random() < 0.3:
                victims.add(None)
            if victims:
                return victims

    async def _round(self, title: str, victims: set[RealHost | None], kind: str) -> None:
        cluster, driver, rng, result = self.cluster, self.driver, self.rng, self.result
        before = driver.flushes
        await asyncio.sleep(rng.uniform(*LOAD_S))
        for _ in range(int(FLUSHES_S_MAX / 0.01)):
            if driver.flushes >= before + FLUSHES_MIN:
                break
            await asyncio.sleep(0.01)
        else:
            raise Unexpected(f"fewer than {FLUSHES_MIN} flushes in {FLUSHES_S_MAX:g} s")
        hosts = [host for host in victims if host is not None]
        began = time.monotonic()
        for host in hosts:
            host.hit.add(host.boot)
        if None in victims:
            cluster.etcd.send_kill()
        cluster.kill(*hosts)
        if None in victims:
            cluster.etcd.kill()
        for name in sorted(host.name.partition("-")[0] for host in hosts):
            result.counts[name] = result.counts.get(name, 0) + 1
        result.counts["etcd"] = result.counts.get("etcd", 0) + (None in victims)
        if driver.host not in victims:
            # It writes on without those that died, and then leaves in order.
            await asyncio.sleep(rng.uniform(*LOAD_S))
        restarting = asyncio.create_task(self._restart(hosts, None in victims))
        try:
            await self._leave()
            following = driver.hosts[1 - driver.hosts.index(driver.host)]
            await self._reopen(following)
        finally:
            await restarting
        took_s = time.monotonic() - began
        if not cluster.failures:
            result.rounds[kind] = result.rounds.get(kind, 0) + 1
            result.reopened_s.append(took_s)
        names = sorted(host.name if host is not None else "etcd" for host in victims)
        what = "all" if kind == "of all" else ", ".join(names)
        cluster.say(
            f"{title}: killed {what}; {driver.flushes - before} flushes before, all of it read "
            f"back after {took_s:.1f} s"
        )

    async def _wait_for_room(self) -> None:
        """Where a node is too full, kill nobody and write little until it is not.

        Raises:
            Unexpected: it does not get emptier.
        """
        if (fullest := await self._fullest()) <= FULL_SHARE:
            return
        self.cluster.say(f"a node is {fullest:.0%} full: waiting for its collector")
        await self._leave()
        end = time.monotonic() + ROOM_S_MAX
        while (fullest := await self._fullest()) > FULL_SHARE and not self.cluster.failures:
            if time.monotonic() > end:
                raise Unexpected(f"a node is {fullest:.0%} full, {ROOM_S_MAX:g} s without a kill")
            await asyncio.sleep(2.0)
        await self._reopen(self.driver.host)

    async def _fullest(self) -> float:
        """The largest share of a node's room that is used."""
        status = json.loads(await self.cluster.tool("torusctl", "status", "--json"))
        # Who has just been started may not answer yet.
        rows = [row for row in status["peers"] if "used_bytes" in row]
        fullest = max((row["used_bytes"] / row["total_bytes"] for row in rows), default=0.0)
        self.result.fullest = max(self.result.fullest, fullest)
        return fullest

    async def _restart(self, hosts: list[RealHost], etcd: bool) -> None:
        cluster = self.cluster
        nodes = [host for host in hosts if host in cluster.hosts]
        clients = [host for host in hosts if host not in nodes]
        starting = [cluster.boot_node(host) for host in nodes]
        if etcd:
            await asyncio.gather(cluster.start_etcd(), *starting)
        else:
            await asyncio.gather(*starting)
        await asyncio.gather(*[cluster.boot_client(host) for host in clients])
        await cluster.heal()

    async def _leave(self) -> None:
        """End the present session: by closing in order, unless its client is dead."""
        if self.work is not None:
            self.driver.stopping = True
            await self.work
            self.driver.stopping = False
            self.work = None

    async def _reopen(self, host: RealHost) -> None:
        """Open the volume, read it back, and go on writing.

        Raises:
            Unexpected: it cannot be had, or not be read.
        """
        driver = self.driver
        driver.host = host
        end = time.monotonic() + REOPEN_S_MAX
        while not host.up:
            if time.monotonic() > end:
                raise Unexpected(f"{host.name} is not up")
            await asyncio.sleep(0.02)
        self.work = asyncio.create_task(driver.session(host))
        verified = asyncio.create_task(driver.verified.wait())
        await asyncio.wait(
            [self.work, verified], timeout=REOPEN_S_MAX, return_when=asyncio.FIRST_COMPLETED
        )
        if not verified.done():
            verified.cancel()
            raise Unexpected(f"the volume could not be read back by {host.boot}")
        self.result.sectors += VOLUME_BYTES // SECTOR

    async def _fio(self) -> None:
        """One verified job of fio after the other, as long as there is an fio."""
        program = shutil.which("fio")
        if program is None:
            self.cluster.say("fio is not installed: the rounds go without it")
            return
        socket = self.fio_host.process.socket
        uri = f"--uri=nbd+unix:///v1?socket={socket}"
        # A user for as long as it takes: without etcd a volume stays open, but cannot be opened.
        user = await NbdClient.connect(socket, "v1")
        try:
            await self._fio_jobs([program, *FIO, uri])
        finally:
            await user.abandon()

    async def _fio_jobs(self, command: list[str]) -> None:
        while not self.fio_stopping:
            job = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.cluster.directory,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                out, _ = await job.communicate()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    job.kill()
            if job.returncode:
                self.cluster.fail(f"fio ended with {job.returncode}: {out.decode()[-1000:]}")
                return
            self.result.fio_jobs += 1

    def count(self) -> None:
        """Fill in the result."""
        result, driver = self.result, self.driver
        result.operations = driver.operations
        result.flushes = driver.flushes
        result.errors = driver.errors
        result.sessions = driver.sessions
        result.slowest_s = driver.slowest_s
        result.durable = sum(1 for sequence in self.oracle.durable.values() if sequence)
