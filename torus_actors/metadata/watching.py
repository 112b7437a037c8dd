"""Following a prefix of the store, through outages and lost history."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torus_actors.errors import Closed, Compacted, Corruption, Fenced, TorusError
from torus_actors.metadata.kv import Event, EventKind, KeyValue, KeyValueStore
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import Record

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
T = TypeVar("T")

POLL_S = 30.0
"""One long poll: short enough that a connection that died unnoticed is replaced."""


@dataclass(frozen=True, slots=True)
class Update:
    """One step of a watch.

    The first one, and the first after lost history, is ``full``: ``items`` is then all there is, by
    key. The others carry ``events``, oldest first. ``revision`` is where the watch now stands.
    """

    full: bool
    items: list[KeyValue]
    events: list[Event]
    revision: int


class Watch(AsyncIterator[Update]):
    """The present state under a prefix, then every change, for ever.

    No failure of the store does more than delay: the watch goes on where it was, or with a full
    state if the history in between is gone. That holds for failures that only a person can mend as
    well: what was seen last stays in use meanwhile, which is better than none. It ends with
    `Closed` when the store is closed. It is a class and not a generator so that leaving the loop
    needs no clean-up; nothing runs between two steps.

    Args:
        store: what to watch.
        prefix: of the keys.
        rng: jitter of the waits during an outage.
        poll_s: length of one long poll, seconds.
        check: raises if the store is not the one that is meant any more. What came of it then does
            not count, nor does its number: it begins anew, with a full state, when it is again.
    """

    def __init__(
        self,
        store: KeyValueStore,
        prefix: str,
        *,
        rng: random.Random,
        poll_s: float = POLL_S,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._check = check
        self._poll_s = poll_s
        self._backoff = Backoff(rng)
        self._revision: int | None = None
        self._told = ""

    async def __anext__(self) -> Update:
        while True:
            try:
                update = await self._step()
            except Closed:
                raise
            except Compacted:
                self._revision = None
            except TorusError as error:
                if isinstance(error, Fenced):
                    self._revision = None
                known, self._told = self._told, str(error)
                if self._told != known:
                    log.warning("watching %s, which goes on: %s", self._prefix, error)
            else:
                self._told = ""
                self._backoff.reset()
                self._revision = update.revision
                if update.full or update.events:
                    return update
                continue
            await self._backoff.wait()

    async def _step(self) -> Update:
        if self._revision is None:
            items, revision = await self._store.range(self._prefix)
            update = Update(True, items, [], revision)
        else:
            events, revision = await self._store.events(self._prefix, self._revision, self._poll_s)
            update = Update(False, [], events, revision)
        if self._check is not None and revision != self._revision:
            await self._check()
        return update


class Follow(AsyncIterator[T], Generic[R, T]):
    """The records under a prefix, all of them, at present and after every change.

    A record that cannot be read is passed over, and said: who follows goes on with the last one
    that was under its key, if there was one, and hears of all others.

    Args:
        watch: the watch to follow.
        record: what the keys hold.
        view: makes what is yielded from the records, in order of key; None is not yielded.
        key: the only one that counts, where others may begin with it; empty for all.
    """

    def __init__(
        self,
        watch: Watch,
        record: type[R],
        view: Callable[[list[R]], T | None],
        *,
        key: str = "",
    ) -> None:
        self._watch = watch
        self._key = key
        self._record = record
        self._view = view
        self._records: dict[str, R] = {}
        """The last that could be read of each key that is there."""
        self._unread: dict[str, bytes] = {}
        """What is stored instead, where it cannot be read."""

    async def __anext__(self) -> T:
        while True:
            update = await anext(self._watch)
            if self._take(update):
                seen = self._view([self._records[key] for key in sorted(self._records)])
                if seen is not None:
                    return seen

    def _take(self, update: Update) -> bool:
        """Take note of a step; False if there is nothing in it that counts and can be read."""
        news: list[tuple[str, bytes | None]] = []
        if update.full:
            there = {item.key for item in update.items}
            news += [(key, None) for key in (*self._records, *self._unread) if key not in there]
            news += [(item.key, item.value) for item in update.items]
        for event in update.events:
            news.append((event.key, event.value if event.kind is EventKind.PUT else None))
        counts = update.full
        for key, value in news:
            if self._key in ("", key):
                counts |= self._put(key, value)
        return counts

    def _put(self, key: str, value: bytes | None) -> bool:
        """Take note of what is under a key now; False if it cannot be read."""
        told = self._unread.pop(key, None)
        if value is None:
            self._records.pop(key, None)
            return True
        try:
            self._records[key] = self._record.decode(value, key)
        except Corruption as error:
            self._unread[key] = value
            if value != told:
                log.error("keeping what was known before: %s", error)
            return False
        return True
