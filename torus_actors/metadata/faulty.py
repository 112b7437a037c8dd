"""A store that fails on demand: for tests of what rests on it, and for the simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torus_actors.errors import Again, LeaseNotFound, OutcomeUnknown, TorusError
from torus_actors.metadata import kv


class FaultyStore(kv.KeyValueStore):
    """Passes everything on to another store, with the faults that are switched on.

    Attributes:
        down: every call fails with `Again`.
        failure: every call fails with this.
        failed: calls that have failed by either so far.
        lose_answers: so many more transactions are applied, but answered with `OutcomeUnknown`.
        lose_requests: so many more are not applied, and answered with `OutcomeUnknown`.
        delay_requests: so many more are answered with `OutcomeUnknown`, and applied by `arrive`.
        txns: transactions asked for so far.

    Args:
        inner: the store behind; closed with this one.
    """

    def __init__(self, inner: kv.KeyValueStore) -> None:
        self.inner = inner
        self.down = False
        self.failure: TorusError | None = None
        self.failed = 0
        self.lose_answers = 0
        self.lose_requests = 0
        self.delay_requests = 0
        self.txns = 0
        self._delayed: list[tuple[Sequence[kv.Compare], Sequence[kv.Operation]]] = []

    async def arrive(self) -> list[kv.TxnResult]:
        """Let the delayed requests reach the store now; returns what became of them."""
        delayed, self._delayed = self._delayed, []
        results = []
        for compare, then in delayed:
            with contextlib.suppress(LeaseNotFound):
                results.append(await self.inner.txn(compare, then))
        return results

    async def get(self, key: str) -> kv.KeyValue | None:
        """See `kv.KeyValueStore.get`."""
        self._check()
        return await self.inner.get(key)

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See `kv.KeyValueStore.range`."""
        self._check()
        return await self.inner.range(prefix, after=after, limit=limit)

    async def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        """See `kv.KeyValueStore.txn`."""
        self._check()
        self.txns += 1
        if self.lose_requests:
            self.lose_requests -= 1
            raise OutcomeUnknown("the request was lost on purpose")
        if self.delay_requests:
            self.delay_requests -= 1
            self._delayed.append((compare, then))
            raise OutcomeUnknown("the request was delayed on purpose")
        result = await self.inner.txn(compare, then)
        if self.lose_answers:
            self.lose_answers -= 1
            raise OutcomeUnknown("the answer was lost on purpose")
        return result

    async def lease_grant(self, ttl_s: int) -> int:
        """See `kv.KeyValueStore.lease_grant`."""
        self._check()
        return await self.inner.lease_grant(ttl_s)

    async def lease_keepalive(self, lease: int) -> int:
        """See `kv.KeyValueStore.lease_keepalive`."""
        self._check()
        return await self.inner.lease_keepalive(lease)

    async def lease_revoke(self, lease: int) -> None:
        """See `kv.KeyValueStore.lease_revoke`."""
        self._check()
        await self.inner.lease_revoke(lease)

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See `kv.KeyValueStore.events`. A poll that waits when the store goes down still ends."""
        self._check()
        found = await self.inner.events(prefix, after_revision, timeout_s)
        self._check()
        return found

    async def close(self) -> None:
        """See `kv.KeyValueStore.close`."""
        await self.inner.close()

    def _check(self) -> None:
        failure = Again("the store is down on purpose") if self.down else self.failure
        if failure is not None:
            self.failed += 1
            raise failure
