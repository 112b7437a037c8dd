"""Which peers make durable what they took, and which of them hang in it.

A disk may hang in syncs alone. Its node is up, answers reads and takes blocks, and confirms no
flush. It is left out as a dead one is: blocks go to others until it has answered.

A call that has not been answered is never given up for an answer: whoever was left out confirms
nothing, and what others confirmed counts alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torus_actors.errors import DeadlineExceeded, TorusError
from torus_actors.runtime import ObjectRef

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""A peer that has not confirmed a flush by then is left out, if enough others are well. A flush is
up to four syncs of the disk, and may have to wait for the one before it."""

PATIENCE_FOR_COPIES_S = 20.0
"""And by then if there would be fewer copies without it, as without a dead one. Longer: where all
disks have a lot to write, the first that is done must not count as the only one that is well."""

FLUSH_TIMEOUT_S = 60.0
"""A disk may have a lot to write, and there may be no other."""

PROBE_TIMEOUT_S = 600.0
"""Who hangs is asked no more often than this whether it still does: each call stays with it."""

TICK_S = 0.25
"""How often somebody who waits looks whether to wait on."""

LATE_S_MAX = 1.0
"""Who looks later than this by more stood still, and not the peers."""


class PeerSyncs:
    """See the module; on the loop's thread.

    Args:
        flush: asks a peer to sync, with a time-out in seconds.
        down: whether a peer is known not to answer.
        ring: the members of the ring, and how many copies are wanted of a block.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        flush: Callable[[str, float], ObjectRef[Any]],
        down: Callable[[str], bool],
        ring: Callable[[], tuple[Sequence[str], int]],
    ) -> None:
        self._loop = loop
        self._flush = flush
        self._down = down
        self._ring = ring
        self._asked: dict[str, dict[asyncio.Future[Any], float]] = {}
        """Calls that were not answered, by peer: since when it has to."""
        self._stood_until = 0.0
        """When this process was last seen to have stood still, until then."""
        self.closed = False
        """Whether nobody is to be asked any more."""

    def hangs(self, peer: str) -> bool:
        """Whether a peer is to be left out. At least one other is well then."""
        waited = self._waited(peer)
        if waited <= PATIENCE_S:
            return False
        members, wanted = self._ring()
        well = sum(not self._down(each) and self._waited(each) <= PATIENCE_S for each in members)
        return well >= wanted or (well > 0 and waited > PATIENCE_FOR_COPIES_S)

    def _waited(self, peer: str) -> float:
        asked = self._asked.get(peer)
        return self._loop.time() - min(asked.values()) if asked else 0.0

    async def sync(self, peers: Iterable[str]) -> dict[str, int]:
        """Have peers make durable what they took.

        Returns:
            What each that has done so answered.
        """
        asked = {
            self._ask(peer, self._loop.time(), FLUSH_TIMEOUT_S): peer
            for peer in peers
            if not self.hangs(peer)
        }
        left = set(asked)
        while left:
            due = self._loop.time() + TICK_S
            _, left = await asyncio.wait(left, timeout=TICK_S)
            self._forgive(due)
            left = {future for future in left if not self.hangs(asked[future])}
        confirmed: dict[str, int] = {}
        for future, peer in asked.items():
            if not future.done():
                log.warning("peer %s hangs in a flush: its blocks go elsewhere", peer[:8])
                continue
            error = future.exception()
            if error is None:
                confirmed[peer] = future.result()
            elif isinstance(error, TorusError):
                log.warning("flush of peer %s failed: %s", peer[:8], error)
            else:
                raise error
        return confirmed

    def _forgive(self, due: float) -> None:
        """Who was to be woken at that time, and is late, tells how long this process stood still.

        Answers may be there that it has not read. Of all who wait only the first one counts.
        """
        now = self._loop.time()
        late_s = now - max(due, self._stood_until)
        if late_s <= LATE_S_MAX:
            return
        self._stood_until = now
        for asked in self._asked.values():
            for future, since in asked.items():
                asked[future] = min(since + late_s, now)

    def suspect(self, peer: str, waited_s: float) -> None:
        """A peer has not done something else for so long: ask whether it syncs."""
        if not self._asked.get(peer) and not self.closed:
            self._ask(peer, self._loop.time() - waited_s, PROBE_TIMEOUT_S)

    def _ask(self, peer: str, since: float, timeout_s: float) -> asyncio.Future[Any]:
        ref = self._flush(peer, timeout_s)
        self._asked.setdefault(peer, {})[ref.future] = since
        ref.add_done_callback(partial(self._answered, peer))
        return ref.future

    def _answered(self, peer: str, future: asyncio.Future[Any]) -> None:
        asked = self._asked[peer]
        since = asked.pop(future, None)
        if since is None or future.cancelled():
            return
        error = future.exception()
        if error is None:
            # It has done what it was asked for before, though an answer may have been lost.
            self._asked[peer] = {each: at for each, at in asked.items() if at > since}
        elif isinstance(error, DeadlineExceeded) and not asked and not self.closed:
            self._ask(peer, since, PROBE_TIMEOUT_S)
