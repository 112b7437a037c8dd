"""Trying again: capped exponential backoff with jitter, for calls that met `Again`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from torus_actors.errors import Again, Overloaded, ProtocolError, TorusError, Unauthenticated
from torus_actors.wire.hello import shut_out

T = TypeVar("T")

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
"""A node shall be back at work within seconds after its metadata is."""


def refusal(error: TorusError, url: str) -> TorusError | None:
    """What to tell the person who has given a wrong URL or secret just now; None if it is neither.

    Another program has the port then, or the secret is another. That is `Again` to a process that
    runs, for it may be set right; one that starts need not wait for it.

    Args:
        error: what the metadata failed with.
        url: of the metadata.
    """
    cause = error.__cause__
    if not isinstance(error, Again):
        return None
    what = f"cannot use the metadata at {url}"
    if isinstance(cause, Unauthenticated) and url.startswith("torus:"):
        return shut_out(what, [str(cause)])
    if isinstance(cause, (Unauthenticated, ProtocolError)):
        return type(cause)(f"{what}: {cause}")
    return None


class Backoff:
    """How long to wait before the next attempt: doubling, capped, and jittered by half.

    Args:
        rng: the jitter; without it all nodes would come back in the same instant.
        first_s: about the first wait.
        max_s: no wait is longer.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        first_s: float = BACKOFF_FIRST_S,
        max_s: float = BACKOFF_MAX_S,
    ) -> None:
        self._rng = rng
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def reset(self) -> None:
        """It worked: start small again."""
        self._next_s = self._first_s

    async def wait(self, until: float | None = None) -> bool:
        """Wait before the next attempt.

        Args:
            until: the loop's time behind which no attempt is wanted.

        Returns:
            False, at once, if the wait would end behind ``until``.
        """
        delay = self._next_s * self._rng.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        if until is not None and asyncio.get_running_loop().time() + delay > until:
            return False
        await asyncio.sleep(delay)
        return True


async def patiently(
    fn: Callable[..., Awaitable[T]], *args: Any, give_up_s: float | None, rng: random.Random
) -> T:
    """Call ``fn(*args)`` until it does not raise `Again` or `Overloaded`: nothing happened then.

    Args:
        fn: any method of the metadata service, for one.
        args: its arguments.
        give_up_s: stop trying after so many seconds; None is never.
        rng: the jitter of the waits between.

    Raises:
        Again: the last one, when time is up.
    """
    until = None if give_up_s is None else asyncio.get_running_loop().time() + give_up_s
    backoff = Backoff(rng)
    while True:
        try:
            return await fn(*args)
        except (Again, Overloaded):
            if not await backoff.wait(until):
                raise
