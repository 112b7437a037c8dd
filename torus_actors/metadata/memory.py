"""A key-value store in this process: for tests, and for the simulator.

It is the reference for the others: one conformance suite says that SQLite and etcd behave alike.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from torus_actors.errors import Compacted, LeaseNotFound
from torus_actors.metadata import kv
from torus_actors.metadata.local import (
    HISTORY_BYTES_MAX,
    HISTORY_EVENTS_MAX,
    ChangeSignal,
    Clock,
    LeaseDeadlines,
    loop_clock,
)


class MemoryStore(kv.KeyValueStore):
    """See `kv.KeyValueStore`. Nothing survives `close`.

    Args:
        clock: what leases are timed by; the running loop's time unless given.
        history_events_max: how many events a watcher may be behind.
    """

    def __init__(
        self, *, clock: Clock = loop_clock, history_events_max: int = HISTORY_EVENTS_MAX
    ) -> None:
        self._keys: dict[str, kv.KeyValue] = {}
        # As in etcd an empty store is at revision 1, so that 0 is before everything.
        self._revision = 1
        self._compacted = 0
        self._history: deque[kv.Event] = deque()
        self._history_bytes = 0
        self._history_events_max = history_events_max
        self._lease_last = 0
        self._leases = LeaseDeadlines(clock, self._expire)
        self._signal = ChangeSignal()

    async def get(self, key: str) -> kv.KeyValue | None:
        """See `kv.KeyValueStore.get`."""
        kv.check_key(key)
        self._enter()
        return self._keys.get(key)

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See `kv.KeyValueStore.range`."""
        kv.check_int64(limit)
        self._enter()
        found = [item for key, item in self._keys.items() if key.startswith(prefix) and key > after]
        # Code points sort as their UTF-8 bytes do, which is the order of the other backends.
        found.sort(key=lambda item: item.key)
        return found[: limit or None], self._revision

    async def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        """See `kv.KeyValueStore.txn`."""
        kv.validate_txn(compare, then)
        self._enter()
        if not all(condition.holds(self._keys.get(condition.key)) for condition in compare):
            return kv.TxnResult(False, self._revision)
        for lease in kv.leases_of(then):
            if lease not in self._leases:
                raise LeaseNotFound(f"lease {lease:x} has ended")
        self._apply(then)
        return kv.TxnResult(True, self._revision)

    async def lease_grant(self, ttl_s: int) -> int:
        """See `kv.KeyValueStore.lease_grant`."""
        kv.check_ttl(ttl_s)
        self._enter()
        self._lease_last += 1
        self._leases.grant(self._lease_last, ttl_s)
        return self._lease_last

    async def lease_keepalive(self, lease: int) -> int:
        """See `kv.KeyValueStore.lease_keepalive`."""
        self._enter()
        return self._leases.renew(lease)

    async def lease_revoke(self, lease: int) -> None:
        """See `kv.KeyValueStore.lease_revoke`."""
        self._enter()
        if lease not in self._leases:
            raise LeaseNotFound(f"lease {lease:x} has ended")
        self._end_lease(lease)

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See `kv.KeyValueStore.events`."""
        kv.check_int64(after_revision)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            self._enter()
            seen = self._signal.count
            if after_revision < self._compacted:
                raise Compacted(f"history before revision {self._compacted} is gone")
            if after_revision > self._revision:
                raise Compacted(f"revision {after_revision} has not been made here")
            found = [
                event
                for event in self._history
                if event.mod_revision > after_revision and event.key.startswith(prefix)
            ]
            # All up to the present revision was looked at, so the next call may start from there.
            after_revision = max(after_revision, self._revision)
            if found or not await self._signal.wait(seen, deadline):
                return found, after_revision

    async def close(self) -> None:
        """See `kv.KeyValueStore.close`."""
        self._leases.stop()
        self._signal.close()

    def _enter(self) -> None:
        self._signal.check()
        self._expire()

    def _expire(self) -> None:
        for lease in self._leases.due():
            self._end_lease(lease)

    def _end_lease(self, lease: int) -> None:
        self._leases.forget(lease)
        ended = [kv.Delete(item.key) for item in self._keys.values() if item.lease == lease]
        self._apply(ended)

    def _apply(self, operations: Sequence[kv.Operation]) -> None:
        revision = self._revision + 1
        events: list[kv.Event] = []
        for operation in operations:
            if isinstance(operation, kv.Put):
                self._keys[operation.key] = kv.KeyValue(
                    operation.key, bytes(operation.value), revision, operation.lease
                )
                events.append(
                    kv.Event(kv.EventKind.PUT, operation.key, bytes(operation.value), revision)
                )
                continue
            if isinstance(operation, kv.Delete):
                gone = [operation.key] if operation.key in self._keys else []
            else:
                gone = sorted(key for key in self._keys if key.startswith(operation.prefix))
            for key in gone:
                del self._keys[key]
                events.append(kv.Event(kv.EventKind.DELETE, key, b"", revision))
        if events:
            self._revision = revision
            self._remember(events)
            self._signal.fire()

    def _remember(self, events: list[kv.Event]) -> None:
        self._history.extend(events)
        self._history_bytes += sum(len(event.value) for event in events)
        while self._history and (
            len(self._history) > self._history_events_max
            or self._history_bytes > HISTORY_BYTES_MAX
            or self._history[0].mod_revision <= self._compacted
        ):
            dropped = self._history.popleft()
            self._history_bytes -= len(dropped.value)
            self._compacted = dropped.mod_revision
