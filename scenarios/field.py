"""What the faults of a scenario share: the cluster, and who is broken now."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import msgpack

from torus_actors.scenarios.checks import Checker
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.readers import Readers
from torus_actors.scenarios.resizes import Resizes
from torus_actors.scenarios.restores import Restores
from torus_actors.scenarios.snapshots import Snapshots
from torus_actors.scenarios.workload import Driver

HEALED_S_MAX = 240.0
"""A lost node's blocks are copied, or a changed ring is settled, within this time."""


class Field:
    """What the faults of one scenario share.

    Args:
        cluster: where they strike.
        checker: tells when the cluster is whole again.
        drivers: of the volumes.
        rng: when, where and how long.
        broken_max: nodes that may be broken at the same time.
        one_victim: whether it is always the same one.
    """

    def __init__(
        self,
        cluster: Cluster,
        checker: Checker,
        drivers: list[Driver],
        rng: random.Random,
        broken_max: int,
        one_victim: bool = False,
    ) -> None:
        self.cluster = cluster
        self.checker = checker
        self.drivers = drivers
        self.rng = rng
        self.broken_max = broken_max
        self.broken: dict[str, Host] = {}
        self.counts: dict[str, int] = {}
        self.rotten: Host | None = None
        self.records_rotted = False
        self.copies_missing = False
        """Whether a node is being lost, or was and its copies are not all there again: another copy
        that rots now may be the last one."""
        self.snapshots = Snapshots(cluster)
        self.readers = Readers(cluster)
        self.resizes = Resizes(cluster, drivers)
        self.restores = Restores(cluster)
        self.ends_at = 0.0
        """When the last fault may begin."""
        self.only = rng.choice(cluster.nodes) if one_victim else None
        self._changing = asyncio.Lock()
        self._rngs: dict[str, random.Random] = {}

    def say(self, text: str) -> None:
        """Note it in the trace."""
        self.cluster.say(text)

    def rng_of(self, what: str) -> random.Random:
        """A generator of its own for a fault, or a part of one, that was added later."""
        return self._rngs.setdefault(what, self.cluster.rng(f"apart/{what}"))

    def victim(self) -> Host | None:
        """A node to break now, or None if enough are broken. Give it back with `whole`."""
        return self.take(self.cluster.nodes)

    def take(self, hosts: Sequence[Host]) -> Host | None:
        """The same, one of these."""
        up = self.cluster.members_up
        candidates = [h for h in up if h.name not in self.broken and h in hosts]
        if self.rotten is not None and len(candidates) > 1:
            candidates = [h for h in candidates if h is not self.rotten] or candidates
        if self.only is not None:
            candidates = [h for h in candidates if h is self.only]
        if not candidates or len(self.broken) >= self.broken_max:
            return None
        host = self.rng.choice(candidates)
        self.broken[host.name] = host
        return host

    def whole(self, host: Host) -> None:
        """The node is well again, as far as this fault goes."""
        self.broken.pop(host.name, None)

    def changing(self) -> asyncio.Lock:
        """To be held while the members of the ring are changed."""
        return self._changing

    @contextlib.asynccontextmanager
    async def losing(self) -> AsyncIterator[None]:
        """While this lasts nodes may be lost for good; nobody else changes who is a member."""
        async with self.changing():
            self.copies_missing = True
            try:
                yield
            finally:
                self.copies_missing = False

    async def settled(self, deep: bool = False) -> bool:
        """Wait until all copies are there, and right if ``deep``; whether they were in time."""
        loop = self.cluster.loop
        end = loop.time() + HEALED_S_MAX
        while loop.time() < end:
            await asyncio.sleep(1.0)
            if not await self.checker.lacking(deep):
                return True
        return False

    async def whole_again(self) -> bool:
        """Wait until nodes may be lost for good; whether they may.

        All copies must be there, and right if some rot, also those of blocks that are only in a
        journal yet. So must those of the journals: a client
        sees to that, and where none has come back since the last loss, the next is one too many;
        likewise where a record has rotted, which nobody mends before it is cut.
        """
        if self.broken or not await self.settled(deep=self.rotten is not None):
            return False
        if self.rotten is not None and (not self.rotten.up or self.checker.damaged(self.rotten)):
            return False
        cluster = self.cluster
        good = {host.node_id for host in cluster.nodes if host.up}
        if self.rotten is not None and self.records_rotted:
            good.discard(self.rotten.node_id)
        for driver in self.drivers:
            volume = await cluster.meta.volume(driver.name)
            journal, _ = await cluster.meta.journal(volume.id)
            if journal is not None:
                left = sum(peer in good for peer in journal.ensemble)
                if left < cluster.shape.replication:
                    return False
        return not self.broken

    async def may_lose_journal(self, host: Host) -> bool:
        """Whether each volume's journal would still have a member that is up and lost nothing.

        One that came back with an empty journal counts as lost until a client has chosen others.
        """
        cluster = self.cluster
        for driver in self.drivers:
            volume = await cluster.meta.volume(driver.name)
            journal, _ = await cluster.meta.journal(volume.id)
            if journal is None or host.node_id not in journal.ensemble:
                continue
            identities: dict[str, int] = msgpack.unpackb(journal.extra)
            others = [h for h in cluster.members_up if h is not host and h.node_id in identities]
            if not any(h.tree.journal.store.identity == identities[h.node_id] for h in others):
                return False
        return True
