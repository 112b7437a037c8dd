"""The control actor: answers questions about this process, and takes orders from ``torusctl``.

Messages in, from any node or tool: ``tree``, ``status``, ``kill``. Its death costs nothing.
"""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

from torus_actors import __version__
from torus_actors.actors.disk_watch import LOOK_S, DiskWatch
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import ActorNotFound, Invalid, TorusError
from torus_actors.runtime import LoopActor, expose

ASK_TIMEOUT_S = 2.0

ASKED = (
    "block_store",
    "journal",
    "replicator",
    "rebalancer",
    "collector",
    "scrubber",
    "heartbeat",
    "evictor",
    "volumes",
    "nbd_server",
    "aoe_server",
    "bridge",
)
"""Actors whose status is part of the node's, where they run here."""


class Control(LoopActor):
    """See the module.

    Args:
        view: the cluster as this process sees it.
        role: of the process.
        disk: knows whether the disk answers; None where there is none.
    """

    def __init__(self, view: ClusterView, role: str, disk: DiskWatch | None = None) -> None:
        super().__init__()
        self._view = view
        self._role = role
        self._disk = disk

    async def setup(self) -> None:
        """Have the disk looked after, also while nobody asks."""
        if self._disk is not None:
            self.spawn(self._look_after(self._disk))

    async def _look_after(self, disk: DiskWatch) -> None:
        while True:
            disk.look()
            await asyncio.sleep(LOOK_S)

    @expose(remote=True)
    def tree(self) -> list[dict[str, Any]]:
        """Every actor of this process with its state, restarts and last cause of death."""
        return self.system.tree()

    @expose(remote=True)
    async def status(self) -> dict[str, Any]:
        """What this process does, and how it is."""
        questions = {"block_store": "stats", "journal": "stats", "bridge": "peers"}
        refs = {
            name: getattr(self.system.actor(name), questions.get(name, "status")).remote(
                timeout_s=ASK_TIMEOUT_S
            )
            for name in ASKED
            if name in self.system.cells
        }
        answer: dict[str, Any] = {
            "node": self.system.node_id,
            "role": self._role,
            "version": __version__,
            "pid": os.getpid(),
            "ring_version": self._view.ring.version,
            "rss_max_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if self._disk is not None:
            answer["disk"] = self._disk.status()
        for name, ref in refs.items():
            try:
                answer[name] = await ref
            except TorusError as error:
                answer[name] = {"error": str(error)}
        return answer

    @expose(remote=True)
    async def kill(self, actor: str) -> None:
        """Kill one actor, as a bug in it would; its supervisor sees to the rest.

        Raises:
            ActorNotFound: there is none of that name.
            Invalid: nobody would restart it.
        """
        cell = self.system.cells.get(actor)
        if cell is None:
            raise ActorNotFound(f"no actor {actor} is there: torusctl tree shows those that are")
        if cell.parent is None:
            raise Invalid(f"{actor} has no supervisor: without it the process would end")
        # After the answer is on its way: the victim may be this actor, or the bridge.
        asyncio.get_running_loop().call_later(0.01, cell.kill)
