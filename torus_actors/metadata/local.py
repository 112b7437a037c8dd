"""What the stores that live in this process share: lease deadlines, and the signal of a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from torus_actors.errors import Closed, LeaseNotFound

Clock = Callable[[], float]
"""Seconds, monotone, any origin."""

HISTORY_EVENTS_MAX = 4096
"""How far a watcher may fall behind before it must read the present state again."""

HISTORY_BYTES_MAX = 16 << 20
"""The same in bytes of values, so that a few large ones cannot fill the memory."""

STALL_S = 1.0
"""A timer that is later than this means that the process did not run: paused, or overloaded."""

LOOK_S = 0.5
"""How often a look is taken at the clock, whatever the leases have left: so each stall is noticed
that lasts for so much more than ``STALL_S``. A lease that is renewed in time has longer."""

TIMER_S_MIN = 0.05
"""An injected clock may lag behind the loop's; do not spin until it has caught up."""


def loop_clock() -> float:
    """The running loop's time: virtual under the simulator."""
    return asyncio.get_running_loop().time()


class LeaseDeadlines:
    """When each lease ends, with one loop timer for the earliest, or for the next look.

    Nobody can renew while this process does not run, so then every lease starts anew, as it does
    when the process was restarted.

    Args:
        clock: the store's clock.
        on_due: called on the loop when some lease may be over; the owner then asks `due`.
    """

    def __init__(self, clock: Clock, on_due: Callable[[], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._ttl_s: dict[int, int] = {}
        self._deadline: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, lease: int) -> bool:
        self._allow_for_stall()
        return lease in self._deadline and self._deadline[lease] > self._clock()

    def grant(self, lease: int, ttl_s: int) -> None:
        """Start a lease's time."""
        self._ttl_s[lease] = ttl_s
        self._deadline[lease] = self._clock() + ttl_s
        self._arm()

    def renew(self, lease: int) -> int:
        """Start a lease's time again; returns its TTL.

        Raises:
            LeaseNotFound: it has ended, even if nobody has cleaned up after it yet.
        """
        if lease not in self:
            raise LeaseNotFound(f"lease {lease:x} has ended")
        self._deadline[lease] = self._clock() + self._ttl_s[lease]
        return self._ttl_s[lease]

    def forget(self, lease: int) -> None:
        """Drop a lease that was revoked, or whose keys are gone."""
        self._ttl_s.pop(lease, None)
        self._deadline.pop(lease, None)

    def due(self) -> list[int]:
        """Leases that have ended, in order of id."""
        self._allow_for_stall()
        now = self._clock()
        return sorted(lease for lease, end in self._deadline.items() if end <= now)

    def stop(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _allow_for_stall(self) -> None:
        # Asked before the timer can tell: what came in meanwhile may be handled ahead of it.
        if self._timer is None:
            return
        if asyncio.get_running_loop().time() - self._timer.when() > STALL_S:
            now = self._clock()
            self._deadline = {lease: now + ttl_s for lease, ttl_s in self._ttl_s.items()}
            self.stop()
            self._arm()

    def _arm(self) -> None:
        # A renewed lease only moves its deadline back, so a timer that is set is never too late
        # for it: it fires, finds nothing due, and is set anew. A new, shorter lease moves it.
        if not self._deadline:
            self.stop()
            return
        loop = asyncio.get_running_loop()
        delay = min(max(min(self._deadline.values()) - self._clock(), TIMER_S_MIN), LOOK_S)
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay, self._fire)

    def _fire(self) -> None:
        self._allow_for_stall()
        self.stop()
        self._on_due()
        self._arm()


class ChangeSignal:
    """Wakes those who wait for the store to change.

    ``count`` grows with every change: read it before looking at the store, and wait with it after.
    """

    def __init__(self) -> None:
        # A dict, not a set: they wake in the order in which they came, whatever their hashes are.
        self._waiters: dict[asyncio.Future[None], None] = {}
        self._closed = False
        self.count = 0

    def fire(self) -> None:
        """Something changed: wake everybody."""
        self.count += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def close(self) -> None:
        """Wake everybody with `Closed`, now and later."""
        self._closed = True
        self.fire()

    def check(self) -> None:
        """Refuse work after `close`.

        Raises:
            Closed: it was closed.
        """
        if self._closed:
            raise Closed("the metadata store is closed")

    async def wait(self, seen: int, deadline: float) -> bool:
        """Wait for a change after ``seen``; False if the loop's time passes ``deadline`` first.

        Raises:
            Closed: it is, or was meanwhile, closed.
        """
        self.check()
        loop = asyncio.get_running_loop()
        if self.count != seen:
            return True
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters[waiter] = None
        timer = loop.call_at(deadline, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)
        self.check()
        return self.count != seen


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
