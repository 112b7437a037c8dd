"""The heartbeat: keeps this process's lease, and what hangs on it.

A storage node is registered under the lease; the volumes that the process has open are locked under
it, or kept for it as they were, if it only reads. When the lease ran out (the metadata was away, or
the process slept) a new one is made and all that is put back, so an expired lease is never the end.
Messages in: ``lease``, ``registered``, ``status``; out: ``lease_began`` to the evictor. Its own
death costs at most one renewal; nothing waits for it on the data path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from torus_actors.errors import (
    Again,
    Corruption,
    Exists,
    Fenced,
    LeaseNotFound,
    OutcomeUnknown,
    Overloaded,
    TorusError,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.runtime import LoopActor, expose

log = logging.getLogger(__name__)

LEASE_TTL_S = 6
"""A client that was cut off holds its volumes for this long; renewed three times as often."""


class Heartbeat(LoopActor):
    """See the module.

    Args:
        meta: the metadata service.
        peer_info: makes this node's registration; None for a client.
        ttl_s: of the lease, seconds.
    """

    def __init__(
        self,
        meta: MetadataService,
        peer_info: Callable[[], PeerInfo] | None = None,
        ttl_s: int = LEASE_TTL_S,
    ) -> None:
        super().__init__()
        self._meta = meta
        self._peer_info = peer_info
        self._ttl_s = ttl_s
        self._lease = 0
        self._registered = peer_info is None
        self._renewed_at = 0.0
        self._waiting: list[asyncio.Future[int]] = []
        self._left: list[Any] = []
        """Sessions that could not be hung on the lease, or let go of; an heirloom, as the lease."""

    async def setup(self) -> None:
        """Take over the predecessor's lease, if there is one, and keep it alive."""
        self._lease = self.system.heirlooms.get("lease", 0)
        self._left = self.system.heirlooms.get("left_sessions", [])
        self.spawn(self._beat())

    async def _beat(self) -> None:
        backoff = Backoff(self.system.rng, max_s=1.0)
        told = ""
        while True:
            began = self.system.loop.time()
            try:
                if self._lease:
                    await self._meta.renew_lease(self._lease)
                    if not self._registered:
                        await self._register(self._lease)
                    if self._left:
                        await self._take_along(self._left, self._lease, self.system.loop.time())
                else:
                    await self._begin_lease()
            except LeaseNotFound:
                if self._lease:
                    log.warning("the lease ran out: making another")
                    self._lease = self.system.heirlooms["lease"] = 0
                else:
                    await backoff.wait()  # not even the new one held until all hung on it
                continue
            except TorusError as error:
                # What is served does not depend on the metadata, be it away or full.
                passing = isinstance(error, (Again, OutcomeUnknown, Overloaded))
                known, told = told, str(error)
                log.log(logging.DEBUG if passing or told == known else logging.WARNING, told)
                await backoff.wait()
                continue
            told = ""
            backoff.reset()
            self._renewed_at = self.system.loop.time()
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                if not waiter.done():
                    waiter.set_result(self._lease)
            # The lease's time may have begun as soon as it was asked for.
            await asyncio.sleep(max(0.0, began + self._ttl_s / 3 - self.system.loop.time()))

    async def _begin_lease(self) -> None:
        """Make a lease, and hang on it what hung on the last one."""
        now = self.system.loop.time
        lease, renewed_at = await self._meta.grant_lease(self._ttl_s), now()
        await self._register(lease)
        sessions = list(self.system.heirlooms.get("sessions", {}).values())
        await self._take_along(sessions, lease, renewed_at)
        self._lease = self.system.heirlooms["lease"] = lease
        self.system.actor("evictor").lease_began.tell()

    async def _take_along(self, sessions: list[Any], lease: int, renewed_at: float) -> None:
        """Hang sessions on a lease; those that cannot be are tried again at each beat."""
        now = self.system.loop.time
        left = []
        for session in sessions:
            if session.closed:
                # What it gave up may be there again, made at a beat that nobody answered.
                if sessions is self._left and not await self._gave_up(session):
                    left.append(session)
                continue
            if now() - renewed_at > self._ttl_s / 3:
                await self._meta.renew_lease(lease)  # or many volumes would outlast it
                renewed_at = now()
            reader = session.reader
            try:
                if session.epoch:
                    await self._meta.renew_lock(
                        session.volume_id, session.epoch, session.holder, lease
                    )
                elif reader is not None:
                    await self._meta.keep_reading(reader, lease)
                # It may have been closed meanwhile, and what it gave up is there again.
                if session.closed and not await self._gave_up(session):
                    left.append(session)
            except Fenced as error:
                session.fence(error)
            except (Again, OutcomeUnknown, LeaseNotFound):
                raise
            except TorusError as error:
                log.warning("volume %s under a new lease: %s", session.name, error)
                left.append(session)
        self._left = self.system.heirlooms["left_sessions"] = left

    async def _gave_up(self, session: Any) -> bool:
        """Give up what a closed session has under the lease; whether it has nothing any more."""
        reader = session.reader
        try:
            if session.epoch:
                await self._meta.detach(session.volume_id, session.epoch)
            elif reader is not None:
                await self._meta.end_reading(reader.volume_id, reader.nonce)
        except (Fenced, LeaseNotFound):
            pass
        except (Again, OutcomeUnknown):
            raise
        except TorusError as error:
            log.warning("volume %s is closed, and not let go of: %s", session.name, error)
            return False
        return True

    async def _register(self, lease: int) -> None:
        """Say that this node is up; again at each beat as long as another one is in its place."""
        if self._peer_info is None:
            return
        try:
            await self._meta.register_peer(self._peer_info(), lease)
        except (Exists, Corruption) as error:
            if self._registered or not self._lease:
                log.error("cannot register this node: %s", error)
            self._registered = False
        else:
            self._registered = True

    @expose(idempotent=True)
    async def lease(self) -> int:
        """The lease, as soon as there is one that was just renewed."""
        if self._lease:
            return self._lease
        waiter: asyncio.Future[int] = self.system.loop.create_future()
        self._waiting.append(waiter)
        return await waiter

    @expose()
    async def registered(self, incarnation: int, address: str) -> None:
        """Somebody is registered as this node: see whether it still is this process."""
        if not self._lease or not self._registered or self._peer_info is None:
            return
        own = self._peer_info()
        if (incarnation, address) != (own.incarnation, own.address):
            await self._register(self._lease)

    @expose()
    async def reregister(self) -> None:
        """The registration changed (an address, a size), or is not there: write it anew."""
        if self._lease:
            await self._register(self._lease)

    @expose()
    def status(self) -> dict[str, Any]:
        """The lease, and how long ago it was renewed."""
        return {"lease": self._lease, "age_s": round(self.system.loop.time() - self._renewed_at, 1)}
