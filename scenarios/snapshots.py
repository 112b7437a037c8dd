"""Snapshots in the simulator: made and deleted under load, and judged.

A snapshot that a session made is what the volume was in one moment between the request and the
answer: every write that was acknowledged before some moment of that time, none that was begun after
it. One that was made of a volume that nobody had open has at least what was durable. Whatever is
read of a snapshot first is read of it ever after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torus_actors.errors import (
    Again,
    CompareFailed,
    NotExist,
    OutcomeUnknown,
    TorusError,
)
from torus_actors.metadata.kv import Put
from torus_actors.metadata.records import SnapshotRequest
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.oracle import SECTOR, Taking, VolumeOracle, describe, stamp
from torus_actors.scenarios.workload import Driver, give_back
from torus_actors.volume.snapshots import restore_snapshot, take_snapshot

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

PATIENCE_S = 30.0
READ_S_MAX = 120.0
KEPT_MAX = 6
"""Snapshots of a run at a time: each keeps blocks, and is read in the end."""


@dataclass(eq=False)
class Kept:
    """A snapshot that was made.

    Attributes:
        strict: a session made it, and the same one was there from the request to the answer.
        content: what was read of it first.
    """

    driver: Driver
    name: str
    taking: Taking
    strict: bool
    content: bytes | None = None

    @property
    def export(self) -> str:
        """Its name for a server."""
        return f"{self.driver.name}@{self.name}"


@dataclass(eq=False)
class Snapshots:
    """All snapshots of a run."""

    cluster: Cluster
    kept: list[Kept] = field(default_factory=list)
    made: int = 0
    read: int = 0
    asked: set[str] = field(default_factory=set)
    """Nonces of requests: a snapshot with one of them was made by a session."""
    restored: dict[str, bytes] = field(default_factory=dict)
    """What volumes have that went back to a snapshot."""
    unsure: set[str] = field(default_factory=set)
    """Names of which nobody knows whether they were made."""
    must_be_made: bool = False
    """Nothing else happens, so nothing keeps one from being made."""

    def __post_init__(self) -> None:
        self.cluster.store.watchers.append(self._on_change)

    def _on_change(self, operation: Any) -> None:
        if isinstance(operation, Put) and "/snapshot-requests/" in operation.key:
            self.asked.add(SnapshotRequest.decode(operation.value).nonce)

    async def make(self, driver: Driver) -> None:
        """Make one; that may fail, but not leave anybody in doubt without saying so."""
        cluster = self.cluster
        self.made += 1
        name = f"s{self.made}"
        process = driver.host.process
        volume = await cluster.meta.volume(driver.name)
        cluster.say(f"snapshot {driver.name}@{name} is wanted")
        taking = driver.oracle.begin_snapshot()
        try:
            snapshot = await take_snapshot(cluster.meta, volume.id, name, PATIENCE_S)
        except OutcomeUnknown as error:
            self.unsure.add(f"{driver.name}@{name}")
            cluster.say(f"snapshot {driver.name}@{name}: {error}")
            return
        except (Again, CompareFailed) as error:
            cluster.say(f"snapshot {driver.name}@{name}: {error}")
            if self.must_be_made and not driver.stopping:
                cluster.fail(f"snapshot {driver.name}@{name} was refused: {error}")
            return
        finally:
            driver.oracle.end_snapshot(taking)
        if snapshot is None:
            cluster.say(f"{driver.name} was not closed in order: no snapshot {name}")
            return
        same = process is not None and process.alive and process is driver.host.process
        strict = snapshot.nonce in self.asked and same and not taking.crossed
        kept = Kept(driver, name, taking, strict)
        self.kept.append(kept)
        how = "at one moment" if strict else "of what was durable"
        cluster.say(f"snapshot {kept.export} made, {how}")
        host = driver.host
        if host.up:
            await cluster.finish(host, cluster.run_on(host, self.look(host, kept)), READ_S_MAX)

    async def delete(self, kept: Kept) -> None:
        """Delete one."""
        self.kept.remove(kept)
        volume = await self.cluster.meta.volume(kept.driver.name)
        try:
            await self.cluster.meta.delete_snapshot(volume.id, kept.name)
        except NotExist:
            self.cluster.fail(f"snapshot {kept.export} is gone")
        self.cluster.say(f"snapshot {kept.export} deleted")

    async def look(self, host: Host, kept: Kept, must: bool = False) -> None:
        """Read a snapshot in a client's process, and judge it.

        Args:
            host: of the client.
            kept: the snapshot.
            must: whether it must be readable now.
        """
        try:
            content = await read_all(host, kept.export)
        except TorusError as error:
            if must:
                self.cluster.fail(f"snapshot {kept.export} cannot be read: {error!r}")
            return
        self.read += 1
        if kept.content is None:
            judge(kept.driver.oracle, kept, content)
            kept.content = content
        elif content != kept.content:
            self.cluster.fail(f"snapshot {kept.export} is not what it was before")

    async def last_look(self, host: Host, again: bool) -> None:
        """In the end: all are there, and are read; then each volume goes back to one of its own."""
        cluster = self.cluster
        for driver in {kept.driver: None for kept in self.kept}:
            volume = await cluster.meta.volume(driver.name)
            there = {
                f"{driver.name}@{each.name}" for each in await cluster.meta.snapshots(volume.id)
            }
            known = {kept.export for kept in self.kept if kept.driver is driver}
            if known - there or there - known - self.unsure:
                cluster.fail(f"snapshots {sorted(there)} are there, and {sorted(known)} were made")
        for kept in self.kept:
            await self.look(host, kept, must=True)
        if not again:
            return
        for kept in {kept.driver: kept for kept in self.kept}.values():
            try:
                await go_back(host, kept, "driver")
                content = await read_all(host, kept.driver.name)
            except TorusError as error:
                cluster.fail(f"{kept.driver.name} cannot go back to {kept.name}: {error!r}")
                continue
            if content != kept.content:
                cluster.fail(f"{kept.driver.name} has gone back to {kept.name}, and is not like it")
            self.restored[kept.driver.name] = content


async def go_back(host: Host, kept: Kept, holder: str) -> None:
    """Let a volume be what a snapshot of it was, as ``torusctl snapshot restore`` does.

    Args:
        host: where the command runs.
        kept: the snapshot.
        holder: who takes the lock, by name.

    Raises:
        TorusError: as `restore_snapshot`.
    """
    await restore_snapshot(
        host.tree.system,
        host.tree.meta,
        kept.driver.name,
        kept.name,
        holder=holder,
        block_size=kept.driver.cluster.shape.block_size,
        block_spec="crc,base",
    )


async def read_all(host: Host, export: str) -> bytes:
    """All of a volume or snapshot."""
    system = host.tree.system
    _, size, _, _ = await system.actor("volumes").open.remote(export, timeout_s=60.0)
    try:
        content: bytes = await system.actor(f"volume:{export}").read.remote(
            0, size, timeout_s=READ_S_MAX
        )
        return content
    finally:
        await give_back(system, export, READ_S_MAX)


def judge(oracle: VolumeOracle, kept: Kept, content: bytes) -> None:
    """Whether this may be in the snapshot."""
    taking = kept.taking
    allowed: Callable[[int], list[int]] = taking.strict if kept.strict else taking.loose
    if len(content) not in oracle.sizes:
        oracle.violated(f"snapshot {kept.export} has {len(content)} bytes")
    found: list[list[int]] = []
    for at in range(0, len(content), SECTOR):
        sector = at // SECTOR
        data = content[at : at + SECTOR]
        candidates = allowed(sector)
        # Several only where they are zeros, which do not say whose they are.
        match = [n for n in candidates if data == stamp(oracle.number, sector, n)]
        if not match:
            oracle.violated(
                f"sector {sector} of snapshot {kept.export} is {describe(data)}; allowed are "
                f"{candidates}"
            )
        found.append(match or [0])
    if not kept.strict:
        return
    # The moment is not before the last write that is in it was begun. What had been acknowledged
    # by then must be in it, or have been overwritten by what is in it.
    moment = max(min(taking.begun_at.get(n, 0) for n in match) for match in found)
    for sector, match in enumerate(found):
        missed = [
            [later for later in taking.after(sector, n) if taking.acked_before(later, moment)]
            for n in match
        ]
        if all(missed):
            oracle.violated(
                f"snapshot {kept.export} has a write that was begun after write {missed[-1][-1]} "
                f"of sector {sector} had been acknowledged, and not that one, but {match}"
            )


async def take_snapshots(field: Field) -> None:
    """A snapshot is made of a volume in use, or one is deleted."""
    snapshots, rng = field.snapshots, field.rng
    if snapshots.kept and (len(snapshots.kept) >= KEPT_MAX or rng.random() < 0.3):
        await snapshots.delete(rng.choice(snapshots.kept))
    else:
        await snapshots.make(rng.choice(field.drivers))
