"""A cluster full of garbage: what to wait for before writers are told that it is full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from torus_actors.errors import TorusError
from torus_actors.runtime import ActorHandle

log = logging.getLogger(__name__)

RECLAIM_PATIENCE_S = 20.0
"""How long a full cluster is given to collect garbage before writers are told that it is full."""

RECLAIM_EMPTY_MAX = 4
"""So often in a row must collectors know of no garbage before the cluster counts as full of data.
What they answer is from their last pass: two answers may be from before the commit that made the
garbage, and a third from a pass that ran beside it."""

RECLAIM_PAUSE_S = 1.0


class RoomToCome:
    """Waiting for room, from now on.

    Args:
        loop: whose clock counts.
        replicator: reaches the collectors.
        discard: gives back what needs no collector.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        replicator: ActorHandle,
        discard: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._replicator = replicator
        self._discard = discard
        self._end = loop.time() + RECLAIM_PATIENCE_S
        self._empty = 0

    async def may_come(self) -> bool:
        """Have garbage collected, and wait a little; whether there is any use in waiting longer."""
        self._discard()
        try:
            found = await self._replicator.reclaim.remote()
        except TorusError as failed:
            log.debug("looking for garbage: %s", failed)
            found = 0
        self._empty = 0 if found else self._empty + 1
        await asyncio.sleep(RECLAIM_PAUSE_S)
        return self._loop.time() < self._end and self._empty < RECLAIM_EMPTY_MAX
