"""The inbox of a cell: what waits for its actor, and how the actor learns of it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Inbox:
    """A queue that outlives the actors it feeds; put from any thread, taken by one actor.

    It belongs to the cell and is never exchanged, so a message put while an actor dies cannot end
    up in a queue that nobody reads.

    Attributes:
        items: what waits, oldest first.
        wake: called after a put; None while no actor takes messages.
        any_thread: whether ``wake`` may be called from every thread, or on the loop's only.
    """

    __slots__ = ("any_thread", "items", "loop", "thread_id", "wake")

    def __init__(self, loop: asyncio.AbstractEventLoop, thread_id: int) -> None:
        self.items: deque[Any] = deque()
        self.loop = loop
        self.thread_id = thread_id
        self.wake: Callable[[], None] | None = None
        self.any_thread = False

    def put(self, envelope: Any, /) -> None:
        """Queue an envelope and see that the actor gets its turn."""
        self.items.append(envelope)
        wake = self.wake
        if wake is not None:
            if threading.get_ident() == self.thread_id or self.any_thread:
                wake()
            else:
                self.loop.call_soon_threadsafe(self._wake_up)

    def put_back(self, envelope: Any) -> None:
        """Queue an envelope in front of what waits; on the loop's thread only."""
        self.items.appendleft(envelope)
        self._wake_up()

    def _wake_up(self) -> None:
        if self.wake is not None:
            self.wake()

    def get(self) -> Any:
        """Take the oldest envelope; the caller has seen that there is one."""
        return self.items.popleft()

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self.items


_adopted = threading.local()


class Adoption:
    """While it lasts, an actor made on this thread takes over the given inbox.

    pykka creates inboxes in a static method, which knows neither the actor nor its cell.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def __enter__(self) -> None:
        _adopted.inbox = self._inbox

    def __exit__(self, *_exc_info: object) -> None:
        _adopted.inbox = None


def adopted_inbox() -> Inbox:
    """The inbox for the actor that is being made.

    Raises:
        RuntimeError: the actor is made outside of a cell.
    """
    inbox: Inbox | None = getattr(_adopted, "inbox", None)
    if inbox is None:
        raise RuntimeError("actors are made by their cell: use ActorSystem.spawn() or options()")
    return inbox
