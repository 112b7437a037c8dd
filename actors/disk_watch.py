"""Which calls of a node's disk do not come back, and since when.

A disk that hangs fails nothing: the node is up, and what it was asked waits. Where it is a sync
clients pass the node over (`peer_syncs`), and each of them knows of its own calls only. The node
knows of all: those of its workers, and those that are under way without a thread. Nothing is
decided here; it is told, to whoever asks the control actor, and in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torus_actors.actors.block_store import OpenStores
from torus_actors.actors.disk import READERS
from torus_actors.actors.journal import OpenJournal
from torus_actors.actors.peer_syncs import PATIENCE_S
from torus_actors.runtime import ActorSystem, BlockingActor

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often it is looked whether calls have come back."""

HANGS_S = PATIENCE_S
"""A call that takes longer is told: for a sync clients wait no longer, if other nodes are well."""

READ_HANGS_S = 30.0
"""A disk may try that long to read one bad sector, and do everything else meanwhile."""

LATE_S_MAX = 1.0
"""Who looks later than this by more stood still, and not the disk."""

READING = "reading blocks"

WORKERS = {
    "disk_writer": "writing blocks",
    **dict.fromkeys(READERS, READING),
    "disk_flusher": "syncing blocks",
    "journal_disk": "the journal",
}
"""What each of the threads waits for."""

UnderWay = Callable[[], object | None]
"""Something that is another one whenever a call has come back; None while there is no call."""


class DiskWatch:
    """See the module; on the loop's thread. Outlives the actor that has it look.

    Args:
        system: whose workers are watched.
        stores: for the reads that need no worker.
        journal: for the writes that need none.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        system: ActorSystem,
        stores: OpenStores,
        journal: OpenJournal,
        wall_clock: Callable[[], float],
    ) -> None:
        self._loop = system.loop
        self._wall_clock = wall_clock
        self._calls: list[tuple[str, UnderWay]] = [
            *((what, _call_of(system, name)) for name, what in WORKERS.items()),
            (READING, lambda: stores.read_under_way),
            ("the journal", lambda: journal.write_under_way),
        ]
        self._seen: list[tuple[object, float] | None] = [None] * len(self._calls)
        """What was under way at the last look, and since when."""
        self._looked_at = self._loop.time()
        self._since: float | None = None
        """Since when the disk hangs, on the loop's clock."""

    def look(self) -> list[str]:
        """Look at all calls; what those wait for that do not come back."""
        now = self._loop.time()
        late_s = now - self._looked_at - LOOK_S
        forgiven_s = late_s if late_s > LATE_S_MAX else 0.0
        self._looked_at = now
        hanging: dict[str, float] = {}
        for number, (what, under_way) in enumerate(self._calls):
            call, seen = under_way(), self._seen[number]
            since = now if seen is None or seen[0] != call else seen[1] + forgiven_s
            self._seen[number] = None if call is None else (call, since)
            patience_s = READ_HANGS_S if what == READING else HANGS_S
            if call is not None and now - since > patience_s:
                hanging[what] = min(since, hanging.get(what, since))
        self._tell(hanging)
        return list(hanging)

    def _tell(self, hanging: dict[str, float]) -> None:
        before, self._since = self._since, min(hanging.values(), default=None)
        if before is None and self._since is not None:
            log.warning(
                "the disk has not answered for %.0f s (%s)",
                self._loop.time() - self._since,
                ", ".join(hanging),
            )
        elif before is not None and self._since is None:
            log.warning("the disk answers again, after %.0f s", self._loop.time() - before)

    def status(self) -> dict[str, Any]:
        """Whether the disk hangs, since when (seconds since 1970; 0 if not), and in what."""
        calls = self.look()
        waited_s = 0.0 if self._since is None else self._loop.time() - self._since
        return {
            "hangs_s": round(waited_s, 1),
            "since": round(self._wall_clock() - waited_s, 1) if calls else 0.0,
            "calls": calls,
        }


def _call_of(system: ActorSystem, name: str) -> UnderWay:
    def under_way() -> object | None:
        cell = system.cells.get(name)
        actor = None if cell is None else cell.actor
        return actor.call_under_way if isinstance(actor, BlockingActor) else None

    return under_way
