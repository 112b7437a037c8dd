"""Volumes that go back to a snapshot, in the simulator.

A volume that went back has what the snapshot had, and nothing that came later: neither from the
journal of a session that had not ended in order, nor from a client that goes on and was not asked.
Whether it went back is told by its head in the metadata, which is seen here as it is stored.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torus_actors.errors import OutcomeUnknown, TorusError
from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import Keys
from torus_actors.metadata.kv import Operation, Put
from torus_actors.metadata.records import Head, Lock
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.resizes import PATIENCE_S, trouble, without_client
from torus_actors.scenarios.snapshots import Kept, go_back

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

HOLDER = "restorer"

RESTORE_S_MAX = 100.0


@dataclass(eq=False)
class Restores:
    """What went back to what in a run.

    Attributes:
        made: how often each volume went back.
    """

    cluster: Cluster
    made: dict[str, int] = field(default_factory=dict)
    _keys: Keys = field(default_factory=Keys)
    _wanted: Kept | None = None
    """What the command that is given now goes back to."""
    _under: dict[tuple[str, int], Kept] = field(default_factory=dict)
    """And by the volume's id as keys have it, and the epoch of its lock, any such command."""
    _refused: set[tuple[str, int]] = field(default_factory=set)
    """Those of the commands that said that they had done nothing."""

    def __post_init__(self) -> None:
        self.cluster.store.watchers.append(self._on_change)

    def _on_change(self, operation: Operation) -> None:
        if not isinstance(operation, Put):
            return
        row, volume = self._keys.row_of(operation.key), operation.key.rpartition("/")[2]
        if row is table.LOCK:
            lock = Lock.decode(operation.value)
            if lock.holder == HOLDER and self._wanted is not None:
                self._under.setdefault((volume, lock.epoch), self._wanted)
        elif row is table.HEAD:
            epoch = Head.decode(operation.value).epoch
            kept = self._under.get((volume, epoch))
            if kept is not None:
                assert kept.content is not None
                self.cluster.say(f"{kept.driver.name} is what {kept.export} was")
                if (volume, epoch) in self._refused:
                    self.cluster.fail(f"{kept.driver.name} went back to {kept.export} after all")
                self.made[kept.driver.name] = self.made.get(kept.driver.name, 0) + 1
                kept.driver.oracle.restore(kept.content, epoch)

    async def restore(self, host: Host, kept: Kept) -> str:
        """Give the command once, on a host for tools; returns what it said, or "" if it died."""
        name = kept.driver.name
        before, earlier = self.made.get(name, 0), set(self._under)
        self._wanted = kept
        task = self.cluster.run_on(host, self._restore(host, kept))
        said: str | TorusError | None = await self.cluster.finish(host, task, RESTORE_S_MAX)
        self.cluster.say(f"to go back to {kept.export}: {said!r}")
        if said is None:
            return ""
        if isinstance(said, OutcomeUnknown):
            return "unknown"
        made = self.made.get(name, 0) - before
        if isinstance(said, TorusError):
            if made:
                self.cluster.fail(f"{name} went back to {kept.export}, and who did it: {said!r}")
            self._refused |= self._under.keys() - earlier
            return "refused"
        if not made:
            self.cluster.fail(f"{name} was said to be what {kept.export} was, and is not")
        return said

    async def _restore(self, host: Host, kept: Kept) -> str | TorusError:
        """Runs in the command's process."""
        try:
            await go_back(host, kept, HOLDER)
        except TorusError as error:
            return error
        return "done"


async def restore(field: Field) -> None:
    """A volume whose client is gone, or seems to be, goes back to a snapshot."""
    cluster, rng, host = field.cluster, field.rng, field.cluster.spares[0]
    kept = [each for each in field.snapshots.kept if each.content is not None]
    if not kept:
        return
    chosen = rng.choice(kept)
    driver = chosen.driver
    way = rng.choice(("closed", "killed", "cut off", "cut off"))
    async with without_client(field, driver, way):
        end = cluster.loop.time() + PATIENCE_S
        while cluster.loop.time() < end and chosen in field.snapshots.kept:
            if not host.up and await cluster.start_client(host) is None:
                continue
            with trouble(field, driver, host):
                said = await field.restores.restore(host, chosen)
            if said == "done" or (said in ("", "unknown") and rng.random() < 0.7):
                break
            await asyncio.sleep(rng.uniform(0.2, 0.6))
    await asyncio.sleep(rng.uniform(0.0, 4.0))
