"""The evictor: takes members out of the ring that are gone for too long, and brings this one back.

A block whose owner is gone for good has a copy too few until the ring names another owner. When a
member was not registered for ``remove_after_s``, as this node saw it without a gap, it is taken out
by compare-and-set, and the rebalancers make the missing copies. All nodes watch and any of them may
do it: whoever comes second finds another ring. No partition and no outage may empty the ring, so:

- time counts only while this node holds one lease, and reads the metadata at every look; whatever
  interrupts that begins all over;
- a change of the ring begins all over too: two members leave at least ``remove_after_s`` apart;
- most members must be registered, and as many must remain as there are copies of a block;
- one whose registration cannot be read is not gone, nor does it count as registered;
- the transaction itself demands that the member is still not registered, and that this node still
  is, as it was at the look. So what is sent by a process that stood still does nothing; and this
  node registers anew after each that was in vain, or a copy that is late might be carried out when
  the member has come back, and is away for a moment.

A node that joins by itself does so again when it comes back under a new lease and finds that it was
taken out meanwhile. Taken out while it was there, it was by an operator, and stays out: so it looks
at once when a lease begins, and when the ring is seen without it. Messages in: ``status``,
``lease_began``, ``view_changed``. Its death costs the time that it has counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import Again, TorusError
from torus_actors.metadata.ring_changes import evict, join_ring
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.runtime import LoopActor, expose

log = logging.getLogger(__name__)

REMOVE_AFTER_S = 3600.0
"""Long enough for a reboot, a new kernel or a changed cable, after which nothing need be copied."""

LOOK_S_MAX = 15.0
LOOKS_MIN = 10
"""So often at least it looks within the time-out, and no less often than every ``LOOK_S_MAX``."""

GAPS_MAX = 3
"""A look that comes this many times too late means that this process slept: others may have been
back in between."""

HEARTBEAT_TIMEOUT_S = 5.0


class Evictor(LoopActor):
    """See the module.

    Args:
        meta: the metadata service.
        view: the cluster as last seen.
        lease_ttl_s: of this node's lease: one that was not renewed for so long may have ended.
        remove_after_s: how long a member may be gone; None for any time.
        rejoin: makes this node's entry in the ring; None if it does not join by itself.
    """

    def __init__(
        self,
        meta: MetadataService,
        view: ClusterView,
        lease_ttl_s: float,
        remove_after_s: float | None = REMOVE_AFTER_S,
        rejoin: Callable[[], Peer] | None = None,
    ) -> None:
        super().__init__()
        self._meta = meta
        self._view = view
        self._lease_ttl_s = lease_ttl_s
        self._remove_after_s = remove_after_s
        self._rejoin = rejoin
        self._look_s = min(LOOK_S_MAX, (remove_after_s or REMOVE_AFTER_S) / LOOKS_MIN)
        self._lease = 0
        self._looked_at = 0.0
        self._version = 0
        self._missing: dict[str, float] = {}
        self._kept = ""
        """Why no member may leave now, however long it is gone; empty if one may."""
        self._evicted = 0
        self._hurry = asyncio.Event()

    async def setup(self) -> None:
        """Start looking."""
        self._hurry.set()
        self.system.actor("ring_watcher").subscribe.tell("evictor")
        self._looked_at = self.system.loop.time()
        # In the ring as it was when this process started: whoever took this node out since then
        # did so before it was registered. An evictor that died leaves to this one what it knew.
        is_member = self.system.node_id in self._view.ring.members
        self.system.heirlooms.setdefault("was_ring_member", is_member)
        self.spawn(self._work())

    @property
    def _was_member(self) -> bool:
        return bool(self.system.heirlooms["was_ring_member"])

    @expose()
    def lease_began(self) -> None:
        """Look now: what happens to the ring from here on, this node was there to see."""
        self._hurry.set()

    @expose()
    def view_changed(self) -> None:
        """Look now if this node has left the ring: its lease may end before the next look."""
        if self._was_member and self.system.node_id not in self._view.ring.members:
            self._hurry.set()

    @expose(remote=True)
    def status(self) -> dict[str, Any]:
        """Members that are gone, and for how many seconds already; what has been done.

        ``kept`` is why none of them leaves the ring as things are; empty if they do.
        """
        now = self.system.loop.time()
        return {
            "remove_after_s": self._remove_after_s,
            "missing_s": {peer: round(now - since, 1) for peer, since in self._missing.items()},
            "kept": self._kept,
            "evicted": self._evicted,
        }

    async def _work(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s * (0.75 + 0.5 * self.system.rng.random())):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self._look()
            except TorusError as error:
                log.debug("looking for lost members: %s", error)
                self._missing.clear()

    async def _look(self) -> None:
        loop = self.system.loop
        if self.system.heirlooms.get("evicting"):
            heartbeat = self.system.actor("heartbeat")
            await heartbeat.reregister.remote(timeout_s=HEARTBEAT_TIMEOUT_S)
            self.system.heirlooms["evicting"] = False
        began = loop.time()
        slept = began - self._looked_at > GAPS_MAX * self._look_s
        lease = await self._valid_lease()
        data, version = await self._meta.ring()
        ring = rings.unmarshal(data)
        there = await self._meta.registrations()
        registered = {info.peer_id for info in there.peers}
        me = self.system.node_id
        if me not in registered:
            # Whatever took the registration and left the lease: the others would count this node
            # as gone for ever.
            self.system.actor("heartbeat").reregister.tell()
            # Nothing else is taken note of: a machine that was suspended finds out late that its
            # lease is over, and that it was taken out of the ring it shall see under the next one.
            raise Again("this node is not registered")
        if await self._valid_lease() != lease:
            raise Again("the registration hangs on another lease than the one before")
        if lease != self._lease:
            await self._come_back(ring)
        if lease != self._lease or version != self._version or slept:
            self._missing.clear()
        self._lease, self._version = lease, version
        self._looked_at = now = loop.time()
        self.system.heirlooms["was_ring_member"] = me in ring.members
        self._missing = {
            peer: self._missing.get(peer, now)
            for peer in ring.members
            if peer not in registered and peer not in there.unread
        }
        self._kept = self._why_kept(ring, registered)
        due = self._due(began)
        if due is None or await self._valid_lease() != lease:
            return
        self.system.heirlooms["evicting"] = True
        following = await evict(self._meta, due, version, (me, there.revisions[me]))
        self._missing.clear()
        if following is not None:
            self.system.heirlooms["evicting"] = False
            self._evicted += 1
            log.warning(
                "node %s was gone for %.0f s and is no longer in the ring (version %d): "
                "its blocks are copied from the others",
                due[:8],
                self._remove_after_s,
                following.version,
            )

    def _why_kept(self, ring: rings.Ring, registered: set[str]) -> str:
        members = len(ring.members)
        here = sum(peer in registered for peer in ring.members)
        copies = max(ring.replication, self._view.inode_replication)
        if 2 * here <= members:
            return "half of the members or more are gone"
        if members - 1 < copies:
            return f"{copies} copies of each block need {copies} members"
        return ""

    def _due(self, now: float) -> str | None:
        """The member that is to go now, if any may."""
        if self._remove_after_s is None or not self._missing or self._kept:
            return None
        peer = min(self._missing, key=lambda each: (self._missing[each], each))
        return peer if now - self._missing[peer] >= self._remove_after_s else None

    async def _valid_lease(self) -> int:
        """This node's lease, which surely lives.

        Raises:
            Again: it may have ended.
        """
        status = await self.system.actor("heartbeat").status.remote(timeout_s=HEARTBEAT_TIMEOUT_S)
        if not status["lease"] or status["age_s"] >= self._lease_ttl_s:
            raise Again("this node has no lease that surely lives")
        return int(status["lease"])

    async def _come_back(self, ring: rings.Ring) -> None:
        """Enter the ring again, if this node was taken out of it while it was away."""
        me = self.system.node_id
        if me in ring.members or not self._was_member:
            return
        if self._rejoin is None:
            log.warning("this node was taken out of the ring while it was away: torusctl peer add")
            return
        await join_ring(self._meta, self._rejoin(), self.system.rng)
        log.warning("this node was taken out of the ring while it was away, and is back in it")
