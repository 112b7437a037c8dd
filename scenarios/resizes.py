"""Volumes that become smaller, and larger again, in the simulator.

What was cut off is gone: when the volume grows again there are zeros. Whether it was cut is told by
its record in the metadata, which is seen here as it is stored: then the oracle knows. A command
that says it has cut a volume has; one that says it has done nothing has not; of one that was
killed, or that says it does not know, either may be.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torus_actors.errors import OutcomeUnknown, TorusError
from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import Keys
from torus_actors.metadata.kv import Operation, Put
from torus_actors.metadata.records import Head, VolumeRecord
from torus_actors.scenarios.cluster import META_ADDRESS, Cluster, Host
from torus_actors.scenarios.cuts import Cut, ways_of
from torus_actors.scenarios.oracle import SECTOR
from torus_actors.scenarios.workload import Driver
from torus_actors.volume.resizing import shrink_volume

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

PATIENCE_S = 15.0
"""How long the command is given again: the lock of a client that is gone ends with its lease."""

SHRINK_S_MAX = 200.0
CLOSE_S_MAX = 15.0

BLOCKS_MIN = 2
"""No volume is made smaller than so many blocks."""

STEPS = (1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 7)
"""Records of a volume that a command stores to make it smaller: epoch, lock, INode numbers, head,
size, and journal. Before and after the head a crash shows most."""


@dataclass(eq=False)
class Resizes:
    """What became of all sizes in a run.

    Attributes:
        cuts: how often each volume became smaller.
        sizes: what each volume had in the beginning.
    """

    cluster: Cluster
    drivers: list[Driver]
    cuts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    _keys: Keys = field(default_factory=Keys)
    _epochs: dict[str, int] = field(default_factory=dict)
    """Of the last head of each volume, by the volume's id as keys have it."""
    _ids: dict[str, str] = field(default_factory=dict)
    """Of each volume, as keys have it."""

    def __post_init__(self) -> None:
        self.sizes = {driver.name: driver.oracle.size for driver in self.drivers}
        self.cluster.store.watchers.append(self._on_change)

    def _on_change(self, operation: Operation) -> None:
        if not isinstance(operation, Put):
            return
        row, volume = self._keys.row_of(operation.key), operation.key.rpartition("/")[2]
        if row is table.HEAD:
            self._epochs[volume] = Head.decode(operation.value).epoch
        elif row is table.VOLUME:
            record = VolumeRecord.decode(operation.value)
            self._ids[record.name] = volume
            oracle = next((each.oracle for each in self.drivers if each.name == record.name), None)
            if oracle is not None and record.size != oracle.size:  # and it is no clone
                self.cluster.say(f"{record.name} has {record.size} bytes now")
                self.cuts[record.name] = self.cuts.get(record.name, 0) + (record.size < oracle.size)
                oracle.resize(record.size, self._epochs.get(volume, 0))

    async def shrink(self, host: Host, name: str, size: int) -> str:
        """Give the command once, on a host for tools; returns what it said, or "" if it died."""
        driver = next(each for each in self.drivers if each.name == name)
        before, oracle = self.cuts.get(name, 0), driver.oracle
        task = self.cluster.run_on(host, self._shrink(host, name, size))
        said: str | TorusError | None = await self.cluster.finish(host, task, SHRINK_S_MAX)
        self.cluster.say(f"to cut {name} to {size} bytes: {said!r}")
        if said is None:
            return ""
        if isinstance(said, OutcomeUnknown):
            return "unknown"
        if isinstance(said, TorusError):
            if self.cuts.get(name, 0) != before:
                self.cluster.fail(f"{name} was cut, and the command said: {said!r}")
            return "refused"
        if oracle.size != size:
            self.cluster.fail(f"{name} has {oracle.size} bytes, and was said to be cut to {size}")
        return said

    async def _shrink(self, host: Host, name: str, size: int) -> str | TorusError:
        """Runs in the command's process."""
        try:
            await shrink_volume(
                host.tree.system,
                host.tree.meta,
                host.tree.view,
                name,
                size,
                holder="tool",
            )
        except TorusError as error:
            return error
        return "done"

    async def grow(self, driver: Driver, size: int) -> None:
        """Make a volume larger, by its record alone."""
        if size > driver.oracle.size:
            await self.cluster.meta.resize_volume(driver.name, size)

    async def grow_all(self) -> None:
        """In the end: what was ever cut off would be seen now."""
        for driver in self.drivers:
            if driver.name in self.cuts:
                await self.grow(driver, self.sizes[driver.name])

    @contextlib.contextmanager
    def after_step(
        self, name: str, step: int, delay_s: float, strike: Callable[[], object]
    ) -> Iterator[None]:
        """Strike some time after so many more records of a volume were stored, if at all."""
        loop, left = self.cluster.loop, step
        timer: asyncio.TimerHandle | None = None

        def count(operation: Operation) -> None:
            nonlocal left, timer
            if isinstance(operation, Put) and operation.key.endswith(self._ids[name]):
                left -= 1
                if left == 0:
                    timer = loop.call_later(delay_s, strike)

        self.cluster.store.watchers.append(count)
        try:
            yield
        finally:
            self.cluster.store.watchers.remove(count)
            if timer is not None:
                timer.cancel()


async def resize(field: Field) -> None:
    """A volume whose client is gone, or seems to be, is cut, and mostly grows again."""
    cluster, rng, resizes = field.cluster, field.rng, field.resizes
    driver, host = rng.choice(field.drivers), cluster.spares[0]
    block, size = cluster.shape.block_size, driver.oracle.size
    least = BLOCKS_MIN * block
    if size > least:
        size = rng.randrange(least, size, SECTOR)
        size -= size % block if rng.random() < 0.3 else 0
    grows = rng.choice(("at once", "in use", "not"))
    way = rng.choice(("closed", "killed", "cut off", "cut off"))
    async with without_client(field, driver, way):
        end = cluster.loop.time() + PATIENCE_S
        while cluster.loop.time() < end:
            if not host.up and await cluster.start_client(host) is None:
                continue
            with trouble(field, driver, host):
                said = await resizes.shrink(host, driver.name, size)
            if said == "done" or (said in ("", "unknown") and rng.random() < 0.7):
                break
            await asyncio.sleep(rng.uniform(0.2, 0.6))
        larger = driver.oracle.size + rng.randrange(0, 8 * block, SECTOR)
        larger = min(larger, resizes.sizes[driver.name])
        if grows == "at once":
            await resizes.grow(driver, larger)
    await asyncio.sleep(rng.uniform(0.0, 4.0))
    if grows == "in use":
        await resizes.grow(driver, larger)


@contextlib.contextmanager
def trouble(field: Field, driver: Driver, host: Host) -> Iterator[None]:
    """Mostly something happens to the command at some moment, if it runs for so long.

    It is killed, or it is cut off from the metadata for a while in which a client may come.
    """
    cluster, rng = field.cluster, field.rng
    what, step = rng.choice(("none", "kill", "kill", "cut")), rng.choice(STEPS)
    delay_s = rng.choice((0.0, 0.0, 0.01, 0.03)) * rng.random()
    pause_s = rng.uniform(1.0, 10.0)
    ways, _ = ways_of(host.address, [META_ADDRESS])

    def kill() -> None:
        if host.up:
            field.say(f"{host.name} is killed")
            cluster.kill(host)

    def cut() -> None:
        field.say(f"{host.name} is cut off from the metadata for {pause_s:.1f} s")
        driver.held = driver.closing = False
        for way in ways:
            cluster.network.block(*way)
        cluster.loop.call_later(pause_s, back)

    def back() -> None:
        for way in ways:
            cluster.network.unblock(*way)

    if what == "none":
        yield
        return
    with field.resizes.after_step(driver.name, step, delay_s, kill if what == "kill" else cut):
        yield


@contextlib.asynccontextmanager
async def without_client(field: Field, driver: Driver, way: str) -> AsyncIterator[None]:
    """Nobody has the volume open meanwhile who would be asked.

    Its client has closed it; or was killed, and another may come; or is cut off from the metadata,
    and goes on until somebody fences it.
    """
    cluster, rng, host = field.cluster, field.rng, driver.host
    driver.held = way == "closed" or rng.random() < 0.6
    try:
        if way == "closed":
            driver.closing = True
            await driver.wait_closed(CLOSE_S_MAX)
            yield
            return
        if host.process is None or not host.up:
            yield
            return
        cluster.expendable.add(host.process.name)
        field.say(f"{host.process.name} is {way}")
        if way == "killed":
            cluster.kill(host)
            yield
            return
        with Cut(cluster, ways_of(host.address, [META_ADDRESS])[0]):
            yield
    finally:
        driver.held = driver.closing = False
