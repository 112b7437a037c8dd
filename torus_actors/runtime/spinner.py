"""Waiting for a message without going to sleep, where that is known to pay.

Waking a process that sleeps costs 30 to 50 us when its core was idle, more than an answer from
another process takes otherwise. So a loop that expects a message soon goes on turning for a while
instead of blocking. How long is learned the way KVM's halt polling learns it: after a wait that was
short the next one is spent turning, and one turn in vain ends that. It ends too as soon as somebody
else wants the core: turning must never take time from work.
"""

from __future__ import annotations

import asyncio
import os
from time import perf_counter

SPIN_S = 0.000_1
"""Longest time spent turning; about twice what a wake-up costs, so that guessing wrong never costs
more than three of them."""

CONTENDED_S = 0.000_02
"""A yield that takes so long let somebody else run: the core is not idle."""

REST_S = 0.01
"""After that it is left to the others for this long: even to look costs them something."""


class Spinner:
    """Keeps one loop awake while a message is due. All methods run on the loop's thread.

    Args:
        loop: a real one: on virtual time nothing sleeps, and turning would never end.
        longest_s: the longest time to turn; 0 never does.
    """

    __slots__ = ("_longest_s", "_loop", "_pays", "_rests_until", "_since", "_turning")

    def __init__(self, loop: asyncio.AbstractEventLoop, longest_s: float = SPIN_S) -> None:
        self._loop = loop
        self._longest_s = longest_s
        self._since = 0.0
        """When the wait under way began, on the performance counter; 0 for none."""
        self._pays = False
        self._rests_until = 0.0
        self._turning = False

    def expect(self) -> None:
        """A message is due: something was sent that will be answered."""
        if self._longest_s:
            self._since = now = perf_counter()
            if self._pays and not self._turning and now >= self._rests_until:
                self._turning = True
                self._loop.call_soon(self._turn)

    def came(self) -> None:
        """A message came."""
        if self._since:
            self._pays = perf_counter() - self._since < self._longest_s
            self._since = 0.0

    def _turn(self) -> None:
        # As long as something is ready, a loop looks for messages without waiting for them.
        if self._since:
            now = perf_counter()
            if now - self._since < self._longest_s:
                os.sched_yield()
                after = perf_counter()
                if after - now < CONTENDED_S:
                    self._loop.call_soon(self._turn)
                    return
                self._rests_until = after + REST_S
            self._pays = False
        self._turning = False
