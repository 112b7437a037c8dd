"""The metadata actor: the one way of a node to the cluster's metadata.

Does the key-value operations that others ask for, also other nodes: that is how
``torus://HOST:PORT`` works. Messages in: ``kv_*``. The open store (etcd, or an SQLite file of this
node) is its owner's, and outlives it: an SQLite file that is opened anew after each death would
stay locked by the last one as long as a disk that stalls keeps that from closing it. So the actor's
death costs the watches a reconnect; what was asked fails as unknown or is asked again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack

from torus_actors.errors import (
    ActorCrashed,
    ActorNotFound,
    Again,
    Compacted,
    DeadlineExceeded,
    Invalid,
    NoPeer,
    OutcomeUnknown,
    Overloaded,
    PeerLost,
    ProtocolError,
    Unauthenticated,
)
from torus_actors.metadata import kv
from torus_actors.runtime import ActorHandle, LoopActor, ObjectRef, Reply, expose
from torus_actors.wire.limits import METADATA_MAX, PAYLOAD_MAX

CALL_TIMEOUT_S = 5.0
"""A metadata operation that takes longer counts as not answered."""

CONCURRENCY = 4096
"""Handlers of one metadata actor at once."""

POLLS_MAX = 3072
"""Those among them that wait for news: three for each process, and those of lost connections that
wait on."""

OPERATIONS_MAX = 768
"""Those that wait for the store, whose disk may hang, long after whoever asked has given up and
asked again. The rest are for renewals: were they to wait behind these, all leases would end."""

INLINE_BYTES = METADATA_MAX // 4
"""A longer list goes beside the message, as bulk data does: some thousand volumes, deleted ones
among them, are more than a message holds."""

ITEM_BYTES = 32
"""What an item of a list takes beside its key and value, more or less."""


class MetadataActor(LoopActor):
    """See the module.

    Args:
        store: the open backend; whoever opened it closes it when the actor is gone for good.
    """

    def __init__(self, store: kv.KeyValueStore) -> None:
        super().__init__()
        self.store = store
        self._polls = 0
        self._operations = 0

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """One that waits for the store.

        Raises:
            Overloaded: too many do already; nothing was done.
        """
        if self._operations >= OPERATIONS_MAX:
            raise Overloaded(f"{OPERATIONS_MAX} wait for the metadata's store already")
        self._operations += 1
        try:
            yield
        finally:
            self._operations -= 1

    @expose(remote=True, idempotent=True)
    async def kv_get(self, key: str) -> Any:
        """``KeyValueStore.get``."""
        with self._operation():
            found = await self.store.get(key)
        return None if found is None else found.to_wire()

    @expose(remote=True, idempotent=True)
    async def kv_range(self, prefix: str, after: str = "", limit: int = 0) -> Any:
        """``KeyValueStore.range``."""
        with self._operation():
            found = await self.store.range(prefix, after=after, limit=limit)
        return _listed(*found)

    @expose(remote=True)
    async def kv_txn(self, compare: list[Any], then: list[Any]) -> Any:
        """``KeyValueStore.txn``."""
        with self._operation():
            result = await self.store.txn(
                [kv.Compare.from_wire(each) for each in compare],
                [kv.operation_from_wire(each) for each in then],
            )
        return result.to_wire()

    @expose(remote=True)
    async def kv_lease_grant(self, ttl_s: int) -> int:
        """``KeyValueStore.lease_grant``."""
        with self._operation():
            return await self.store.lease_grant(ttl_s)

    @expose(remote=True, idempotent=True)
    async def kv_lease_keepalive(self, lease: int) -> int:
        """``KeyValueStore.lease_keepalive``."""
        return await self.store.lease_keepalive(lease)

    @expose(remote=True)
    async def kv_lease_revoke(self, lease: int) -> None:
        """``KeyValueStore.lease_revoke``."""
        with self._operation():
            await self.store.lease_revoke(lease)

    @expose(remote=True, idempotent=True)
    async def kv_events(self, prefix: str, after_revision: int, timeout_s: float) -> Any:
        """``KeyValueStore.events``.

        Raises:
            Compacted: also if there are more than one answer holds.
            Overloaded: too many wait already.
        """
        if self._polls >= POLLS_MAX:
            raise Overloaded(f"{POLLS_MAX} wait for news of the metadata already")
        self._polls += 1
        try:
            events, revision = await self.store.events(prefix, after_revision, min(timeout_s, 60.0))
        finally:
            self._polls -= 1
        answer = _listed(events, revision)
        if type(answer) is Reply and len(answer.joined()) > PAYLOAD_MAX:
            raise Compacted(f"more happened since revision {after_revision} than can be told")
        return answer


def _listed(items: Sequence[kv.KeyValue | kv.Event], revision: int) -> Any:
    """The answer that has these items."""
    plain = [item.to_wire() for item in items]
    if sum(len(item.key) + len(item.value) + ITEM_BYTES for item in items) <= INLINE_BYTES:
        return [plain, revision]
    return Reply([None, revision], (msgpack.packb(plain),))


def _items(answer: Any) -> tuple[list[Any], int]:
    """What `_listed` made an answer of."""
    if type(answer) is not Reply:
        plain, revision = answer
        return plain, revision
    try:
        return msgpack.unpackb(answer.joined()), answer.result[1]
    except (ValueError, msgpack.UnpackException) as error:
        raise Again(f"the metadata's answer cannot be read: {error}") from error


class ActorStore(kv.KeyValueStore):
    """A key-value store that asks a metadata actor, of this node or another.

    Args:
        actor: its handle.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def _ask(self, ref: ObjectRef[Any], changes: bool) -> Any:
        try:
            return await ref
        except (NoPeer, ActorNotFound, Overloaded, Unauthenticated, ProtocolError) as error:
            # The last two come of a handshake, before any call is sent (what is on a connection
            # when it ends is PeerLost, whatever ends it), or from a backend that has not done it.
            raise Again(f"the metadata cannot be reached: {error}") from error
        except (PeerLost, ActorCrashed, DeadlineExceeded) as error:
            # A link that never came to be has sent nothing, but a lost one may have.
            if changes and "cannot be reached" not in str(error):
                raise OutcomeUnknown(f"the metadata did not answer: {error}") from error
            raise Again(f"the metadata cannot be reached: {error}") from error

    async def get(self, key: str) -> kv.KeyValue | None:
        """See KeyValueStore."""
        found = await self._ask(self._actor.kv_get.remote(key, timeout_s=CALL_TIMEOUT_S), False)
        return None if found is None else kv.KeyValue.from_wire(found)

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See KeyValueStore."""
        kv.check_int64(limit)
        if after or limit:
            try:
                return await self._range(prefix, after, limit)
            except Invalid:
                # A node of an earlier version knows of no pages: they are cut here.
                found, revision = await self._range(prefix)
                return [each for each in found if each.key > after][: limit or None], revision
        return await self._range(prefix)

    async def _range(self, prefix: str, *page: str | int) -> tuple[list[kv.KeyValue], int]:
        ref = self._actor.kv_range.remote(prefix, *page, timeout_s=CALL_TIMEOUT_S)
        found, revision = _items(await self._ask(ref, False))
        return [kv.KeyValue.from_wire(each) for each in found], revision

    async def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        """See KeyValueStore."""
        kv.validate_txn(compare, then)
        ref = self._actor.kv_txn.remote(
            [each.to_wire() for each in compare],
            [each.to_wire() for each in then],
            timeout_s=CALL_TIMEOUT_S,
        )
        return kv.TxnResult.from_wire(await self._ask(ref, True))

    async def lease_grant(self, ttl_s: int) -> int:
        """See KeyValueStore."""
        kv.check_ttl(ttl_s)
        ref = self._actor.kv_lease_grant.remote(ttl_s, timeout_s=CALL_TIMEOUT_S)
        return int(await self._ask(ref, True))

    async def lease_keepalive(self, lease: int) -> int:
        """See KeyValueStore."""
        ref = self._actor.kv_lease_keepalive.remote(lease, timeout_s=CALL_TIMEOUT_S)
        return int(await self._ask(ref, False))

    async def lease_revoke(self, lease: int) -> None:
        """See KeyValueStore."""
        await self._ask(self._actor.kv_lease_revoke.remote(lease, timeout_s=CALL_TIMEOUT_S), True)

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See KeyValueStore."""
        ref = self._actor.kv_events.remote(
            prefix, after_revision, timeout_s, timeout_s=timeout_s + CALL_TIMEOUT_S
        )
        events, revision = _items(await self._ask(ref, False))
        return [kv.Event.from_wire(each) for each in events], revision

    async def close(self) -> None:
        """Nothing to close: the actor is its supervisor's, and its store their owner's."""
