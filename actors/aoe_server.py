"""The AoE server actor: serves one volume to AoE initiators on a network interface.

Messages in: ``serve``, ``replies`` from the volume actor, ``status``. Messages out: ``submit`` to
the volume actor, ``status`` to the volumes actor. Socket and requests outlive it, so its death
costs no initiator anything: answers wait until the successor has adopted them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Collection
from typing import Any

from torus_actors.aoe.endpoint import Endpoint
from torus_actors.aoe.port import Port
from torus_actors.aoe.protocol import format_mac
from torus_actors.aoe.target import Disk, Target
from torus_actors.errors import Invalid, NotExist, TorusError
from torus_actors.nbd.requests import Reply, Request
from torus_actors.runtime import LoopActor, expose

log = logging.getLogger(__name__)

NAME = "aoe_server"
"""Of the actor: volumes answer to it."""

LOST = "aoe_lost"
"""The heirloom that says why the volume is lost, once it is; also after the actor has ended."""

WATCH_S = 1.0
"""How often it looks whether the volume was taken over, and at the interface."""

CLOSE_GRACE_S = 10.0
"""How long commands in flight may take when this is stopped; see ``nbd.server``."""

_CONNECTION = 1
"""The number that volumes answer to: there is one target, and the request says the rest."""


class AoeServer(LoopActor):
    """See the module.

    Args:
        port: the interface; closed when this ends for good.
        major: shelf.
        minor: slot.
        cluster_id: makes serial numbers differ between clusters.
        accept: hardware addresses that may use the target; empty for all.
    """

    def __init__(
        self, port: Port, major: int, minor: int, cluster_id: str, accept: Collection[bytes] = ()
    ) -> None:
        super().__init__()
        self._port = port
        self._major = major
        self._minor = minor
        self._cluster_id = cluster_id
        self._accept = accept
        self._volume = ""
        self._endpoint: Endpoint | None = None
        self._gone = ""

    async def setup(self) -> None:
        """Adopt what the predecessor served, if it did."""
        found: tuple[str, Endpoint] | None = self.system.heirlooms.get(NAME)
        if found is not None:
            self._volume, self._endpoint = found
            self.spawn(self._watch())

    def quiesce(self) -> list[asyncio.Future[Any]]:
        """When this is for good, let commands in flight finish; their answers are messages."""
        if self.cell.will_restart or self._endpoint is None:
            return super().quiesce()
        if self._endpoint.target.failure:  # known from a write, and nobody has looked since
            self.system.heirlooms.setdefault(LOST, self._endpoint.target.failure)
        self._endpoint.stop()
        return [self.spawn(self._finish(self._endpoint))]

    async def cleanup(self) -> None:
        """When this is for good, let go of the interface."""
        if self.cell.will_restart:
            return
        self.system.heirlooms.pop(NAME, None)
        if self._endpoint is not None:
            self._endpoint.close()
        else:
            self._port.close()

    @expose()
    def serve(self, volume: str, size_bytes: int, read_only: bool) -> None:
        """Begin to serve an open volume, and tell the network.

        Raises:
            Invalid: the volume has not even one sector; or one is served already.
        """
        if self._endpoint is not None:
            raise Invalid(f"volume {self._volume} is served already")
        serial = hashlib.sha256(f"{self._cluster_id}/{volume}".encode()).hexdigest()
        disk = Disk(volume, size_bytes, read_only, serial[:20])
        if not disk.sectors:
            raise Invalid(f"volume {volume} is smaller than a sector")
        submit = self.system.actor(f"volume:{volume}").submit

        def hand_over(requests: list[Request]) -> None:
            submit.tell(_CONNECTION, requests)

        target = Target(self._major, self._minor, disk, self._accept)
        self._volume = volume
        self._endpoint = Endpoint(self._port, target, hand_over)
        self.system.heirlooms[NAME] = (volume, self._endpoint)
        self.spawn(self._watch())

    @expose(idempotent=True)
    def replies(self, conn: int, replies: list[Reply]) -> None:
        """Answers to requests."""
        if self._endpoint is not None:
            self._endpoint.reply(replies)

    @expose()
    def status(self) -> dict[str, Any]:
        """Where it serves what to whom.

        ``failure`` is why every command fails, and ``gone`` why none comes any more; both are empty
        as long as all is well. ``used`` tells whether anybody has read or written.
        """
        status: dict[str, Any] = {
            "interface": self._port.name,
            "address": f"e{self._major}.{self._minor}",
            "volume": self._volume,
            "gone": self._gone,
        }
        if self._endpoint is not None:
            target = self._endpoint.target
            status |= {
                "failure": target.failure,
                "used": target.used,
                "initiators": [format_mac(mac) for mac in target.initiators],
                "in_flight": target.in_flight,
                "dropped": target.dropped,
            }
        return status

    async def _watch(self) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        target = endpoint.target
        while True:
            try:
                self._port.refresh()
                endpoint.refreshed()
            except NotExist as error:
                self._gone = str(error)
            if LOST not in self.system.heirlooms:
                # The target may have been told with a write that it is lost, and not how.
                doubted = bool(target.failure)
                failure = await self._failure()
                if failure is not None and doubted:
                    target.failure = ""
                if failure:
                    target.failure = self.system.heirlooms[LOST] = failure
                    log.error(
                        "every command is answered with an error from now on: volume %s: %s",
                        self._volume, failure,
                    )  # fmt: skip
            await asyncio.sleep(WATCH_S)

    async def _failure(self) -> str | None:
        """Why the volume is of no use any more; empty if it is, None if nobody knows now."""
        try:
            rows = await self.system.actor("volumes").status.remote()
        except TorusError:
            return None
        for row in rows:
            if row["name"] == self._volume:
                return (row["failure"] or "it was taken over") if row["fenced"] else ""
        return None

    @staticmethod
    async def _finish(endpoint: Endpoint) -> None:
        try:
            async with asyncio.timeout(CLOSE_GRACE_S):
                await endpoint.drained()
        except TimeoutError:
            log.warning("commands in flight are given up: %d", endpoint.target.in_flight)
