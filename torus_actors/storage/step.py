"""One piece of disk work, done once: by a worker, while the owner of the store goes on.

A step may be run twice, even by two workers at once (one that was given up on finishes its call
unseen): a lock lets them in one by one, and the second finds the outcome of the first. That matters
most for a failed sync: the kernel would tell the second that all is well. It may also be run when
the owner has long gone on without it, by a worker that was killed before its turn: then nothing
may be done any more.
"""

from __future__ import annotations

import abc
import threading

from torus_actors.errors import Invalid, TorusError


class Step(abc.ABC):
    """One piece of disk work.

    Args:
        lock: of the store; one step works at a time.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._done = False
        self._error: Exception | None = None
        self._given_up = False

    def run(self) -> None:
        """Do it, unless it was done; in a worker.

        Raises:
            OSError, TorusError: it failed, now or earlier.
            Invalid: it was given up before it was begun.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._done:
                return
            if self._given_up:
                raise Invalid("this disk work was given up before it was begun")
            try:
                self._work()
            except (OSError, TorusError) as error:
                self._error = error
                raise
            self._done = True

    def give_up(self) -> None:
        """Not to be begun any more. By the owner, which does not wait for one that was begun."""
        self._given_up = True

    @abc.abstractmethod
    def _work(self) -> None:
        """The disk calls."""
