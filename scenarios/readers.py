"""Readers in the simulator: they open volumes and snapshots without the lock, and are judged.

A reader has the volume of one moment of the time in which it was opened, for as long as it likes
(`Reading` says what that may be), and its reads do not fail: what it reads is not collected, also
when its lease ended and it had to leave its record anew. Only one whose record may have been away
while a collector made both its passes may fail, and even then it reads nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torus_actors.actors.collector import GRACE_S
from torus_actors.errors import LeaseNotFound, TorusError
from torus_actors.scenarios.cluster import META_ADDRESS, Cluster, Host
from torus_actors.scenarios.cuts import Cut, ways_of
from torus_actors.scenarios.oracle import SECTOR, Reading, describe
from torus_actors.scenarios.snapshots import Kept
from torus_actors.scenarios.workload import VERIFY_BYTES, Driver, give_back

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

READ_S_MAX = 5.0
"""No read takes longer, whatever becomes of the metadata: at most R-1 nodes are away."""

OPEN_S_MAX = 60.0
STAY_S = (5.0, 35.0)
"""A collector needs two passes, ten seconds apart, to delete anything."""

CLOSE_S_MAX = 10.0
LATE_S_MAX = 3.0
"""Readers stay no longer after the last fault."""

READ_BYTES_MAX = 64 << 10

CUT_S_MAX = GRACE_S - 2.0
"""One that was cut off for no longer has its record back before a second pass."""


@dataclass(eq=False)
class Reader:
    """A client that has something open to read it, or is opening it.

    Attributes:
        export: what.
        host: where.
        gaps: times in which a collector may not have seen its record. One is not enough for two
            passes.
        long_gap: one was.
    """

    export: str
    host: Host
    gaps: int = 0
    long_gap: bool = False

    @property
    def may_fail(self) -> bool:
        """Whether what it reads may have been collected."""
        return self.long_gap or self.gaps > 1


@dataclass(eq=False)
class Readers:
    """All readers of a run.

    Attributes:
        present: by the name of their host.
        cut_off: names of hosts that do not reach the metadata.
        opened: how many volumes and snapshots were opened.
        reads: how often something was read.
    """

    cluster: Cluster
    present: dict[str, Reader] = field(default_factory=dict)
    cut_off: set[str] = field(default_factory=set)
    opened: int = 0
    reads: int = 0
    _begun: int = 0
    _last: dict[str, Reading] = field(default_factory=dict)
    """By volume, what the reader sees that is there in the end."""

    def leases_end(self) -> None:
        """Leases end, or do if what happens now goes on."""
        for reader in self.present.values():
            reader.gaps += 1

    async def read(self, host: Host, driver: Driver, kept: Kept | None, until: float) -> None:
        """Open a volume, or a snapshot of it, on an idle host, and read it until then."""
        cluster = self.cluster
        reader = Reader(driver.name if kept is None else kept.export, host)
        self.present[host.name] = reader
        self._begun += 1
        rng = cluster.rng(f"reader{self._begun}")
        reading = driver.oracle.begin_reading()
        try:
            if await self._start(host):
                work = self._session(reader, driver, kept, reading, until, rng)
                await cluster.finish(host, cluster.run_on(host, work), None)
        finally:
            driver.oracle.end_reading(reading)
            del self.present[host.name]

    async def _start(self, host: Host) -> bool:
        host.read_only = True
        return host.up or await self.cluster.start_client(host) is not None

    async def _session(
        self,
        reader: Reader,
        driver: Driver,
        kept: Kept | None,
        reading: Reading,
        until: float,
        rng: random.Random,
    ) -> None:
        """Runs in the reader's process."""
        cluster, system = self.cluster, reader.host.tree.system
        assert reader.host.process is not None
        who = f"reader {reader.host.process.name} of {reader.export}"
        try:
            size = await _open(system, reader.export)
        except TorusError as error:
            cluster.say(f"{who} cannot open it: {error!r}")
            return
        finally:
            driver.oracle.end_reading(reading)
        self.opened += 1
        cluster.say(f"{who} has begun")
        expected = driver.oracle.size if kept is None else len(kept.content or b"")
        if size != expected:
            cluster.fail(f"{who} has {size} bytes, not {expected}")
            return
        check = reading.check if kept is None else _same_as(kept, driver.oracle.violated)
        while cluster.loop.time() < until:
            offset = rng.randrange(size // SECTOR) * SECTOR
            length = min(rng.randint(1, READ_BYTES_MAX // SECTOR) * SECTOR, size - offset)
            if not await self._read(reader, offset, length, check, who):
                break
            await asyncio.sleep(rng.uniform(0.1, 1.5))
        else:
            for offset in range(0, size, VERIFY_BYTES):
                length = min(VERIFY_BYTES, size - offset)
                if not await self._read(reader, offset, length, check, who):
                    break
        cluster.say(f"{who} has done")
        await give_back(system, reader.export, OPEN_S_MAX)

    async def _read(
        self,
        reader: Reader,
        offset: int,
        length: int,
        check: Callable[[int, bytes, str], None],
        who: str,
    ) -> bool:
        """Read and judge; whether the reader goes on."""
        loop, system = self.cluster.loop, reader.host.tree.system
        began = loop.time()
        try:
            data = await system.actor(f"volume:{reader.export}").read.remote(
                offset, length, timeout_s=OPEN_S_MAX
            )
        except TorusError as error:
            self.cluster.say(f"{who} cannot read {length} at {offset}: {error!r}")
            if not reader.may_fail:
                self.cluster.fail(f"{who} cannot read {length} at {offset}: {error!r}")
            return False
        self.reads += 1
        check(offset, data, who)
        if loop.time() - began > READ_S_MAX and not reader.may_fail:
            self.cluster.fail(f"{who} waited {loop.time() - began:.1f} s for {length} at {offset}")
        return True

    async def last_look(self, drivers: list[Driver], again: bool) -> None:
        """In the end one reads all volumes; ``again``, when they have other heads, it does again.

        Its process stays: what it read is to be collected though its lease lives.
        """
        cluster = self.cluster
        if not self._begun:
            return
        host = cluster.spares[0]
        if not again and not await self._start(host):
            cluster.fail("the last reader did not start")
            return
        for driver in drivers:
            task = cluster.run_on(host, self._look(host, driver, again))
            await cluster.finish(host, task, OPEN_S_MAX)

    async def _look(self, host: Host, driver: Driver, again: bool) -> None:
        system, oracle = host.tree.system, driver.oracle
        who = f"the last reader of {driver.name}"
        try:
            if not again:
                self._last[driver.name] = reading = oracle.begin_reading()
                await _open(system, driver.name)
                oracle.end_reading(reading)
            volume = system.actor(f"volume:{driver.name}")
            for offset in range(0, oracle.size, VERIFY_BYTES):
                length = min(VERIFY_BYTES, oracle.size - offset)
                data = await volume.read.remote(offset, length, timeout_s=OPEN_S_MAX)
                self._last[driver.name].check(offset, data, who)
            if again:
                await give_back(system, driver.name, OPEN_S_MAX)
        except TorusError as error:
            self.cluster.fail(f"{who} cannot read it: {error!r}")


async def _open(system: Any, export: str) -> int:
    """Open something to read it; returns its size."""
    size: int
    _, size, _, _ = await system.actor("volumes").open.remote(export, timeout_s=OPEN_S_MAX)
    return size


def _same_as(kept: Kept, violated: Callable[[str], None]) -> Callable[[int, bytes, str], None]:
    """Judges what is read of a snapshot that was read before."""
    content = kept.content
    assert content is not None

    def check(offset: int, data: bytes, who: str) -> None:
        for at in range(0, len(data), SECTOR):
            found, was = data[at : at + SECTOR], content[offset + at : offset + at + SECTOR]
            if found != was:
                sector = (offset + at) // SECTOR
                violated(f"sector {sector} read by {who} is {describe(found)}, not {describe(was)}")

    return check


async def read_beside(field: Field) -> None:
    """Somebody opens a volume or a snapshot to read it, stays for a while, and leaves or dies."""
    cluster, rng, readers = field.cluster, field.rng, field.readers
    away = readers.present.keys() | readers.cut_off
    idle = [h for h in cluster.spares if h.name not in away]
    if not idle:
        return
    host = rng.choice(idle)
    kept = [each for each in field.snapshots.kept if each.content is not None]
    chosen = rng.choice(kept) if kept and rng.random() < 0.3 else None
    driver = rng.choice(field.drivers) if chosen is None else chosen.driver
    pause_s, changes = rng.uniform(0.0, 2.0), rng.random() < 0.5
    stay_s, dies = rng.uniform(*STAY_S), rng.random() < 0.3
    now = cluster.loop.time()
    until = min(now + stay_s, field.ends_at + LATE_S_MAX)
    ways, _ = ways_of(host.address, [META_ADDRESS])
    slow_s = rng.choice((0.0, 0.0, 0.2))
    for way in ways:
        cluster.network.slow(*way, slow_s)
    reading = cluster.loop.create_task(readers.read(host, driver, chosen, until))
    # While it is opened, or soon after: what it reads is replaced, or nobody else's any more.
    await asyncio.sleep(pause_s)
    if changes and chosen is None:
        driver.closing = True
        await driver.wait_closed(CLOSE_S_MAX)
        driver.closing = False
    elif changes and chosen in field.snapshots.kept:
        await field.snapshots.delete(chosen)
    if rng.random() < 0.5:
        # The heartbeat puts back what hung on it, just when the reader gives it up.
        await asyncio.sleep(max(0.0, until + rng.uniform(-0.5, 1.5) - cluster.loop.time()))
        await end_lease_of(field, readers.present.get(host.name))
    await reading
    for way in ways:
        cluster.network.slow(*way, 0.0)
    if dies:
        cluster.kill(host)


def _one_of(field: Field) -> Reader | None:
    present = [reader for reader in field.readers.present.values() if reader.host.up]
    return field.rng.choice(present) if present else None


async def crash_reader(field: Field) -> None:
    """A reader is killed."""
    reader = _one_of(field)
    if reader is not None:
        field.say(f"{reader.host.name} is killed")
        field.cluster.kill(reader.host)
    await asyncio.sleep(0.1)


async def cut_reader(field: Field) -> None:
    """A reader is cut off from the metadata, but not from the nodes."""
    reader = _one_of(field)
    if reader is None:
        return
    pause = field.rng.choice((2.0, 6.0, 12.0)) * (0.5 + field.rng.random())
    field.say(f"{reader.host.name} is cut off from the metadata for {pause:.1f} s")
    reader.gaps += 1
    reader.long_gap |= pause > CUT_S_MAX
    ways, _ = ways_of(reader.host.address, [META_ADDRESS])
    field.readers.cut_off.add(reader.host.name)
    with Cut(field.cluster, ways):
        await asyncio.sleep(pause)
    field.readers.cut_off.remove(reader.host.name)


async def end_lease(field: Field) -> None:
    """The lease of a reader ends."""
    await end_lease_of(field, _one_of(field))


async def end_lease_of(field: Field, reader: Reader | None) -> None:
    """Only once for each, so that its record is never away for two passes."""
    if reader is None or reader.gaps or not reader.host.up:
        return
    lease = reader.host.tree.system.heirlooms.get("lease")
    if not lease:
        return
    field.say(f"the lease of {reader.host.name} ends")
    reader.gaps += 1
    with contextlib.suppress(LeaseNotFound):  # it may have, while the metadata was away
        await field.cluster.store.lease_revoke(lease)
