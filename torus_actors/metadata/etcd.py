"""A key-value store in an etcd cluster, through etcd3's client and its gRPC stubs.

Nothing here blocks the event loop. Ordinary requests are gRPC futures, whose answers come from
gRPC's own thread; a waiting watch has a thread of its own. etcd3's `Watcher` is not used: all its
watches share one stream and end with it. Here every poll opens a stream at the revision where the
last one ended, so that a restart of etcd needs no special case.

What a lost connection means decides which error is raised. After a failure a connection must first
answer a probe, which changes nothing: if it does not, that is certainly `Again`. A connection that
ends under a change is `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torus_actors.errors import (
    Again,
    Closed,
    Compacted,
    Invalid,
    LeaseNotFound,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
    TorusError,
    Unauthenticated,
)
from torus_actors.metadata import kv

with warnings.catch_warnings():
    # etcd3's generated code is older than the protobuf it imports, and says so on import.
    warnings.simplefilter("ignore")
    import etcd3
    import grpc
    from etcd3 import etcdrpc

DEADLINE_S = 2.0
"""A healthy etcd answers in milliseconds; a caller who can wait retries with its own patience."""

IN_FLIGHT_MAX = 32
"""Requests at once. etcd refuses when thousands wait, and is slow long before (torus#294)."""

LEASE_IN_FLIGHT_MAX = 8
"""Renewals at once, on their own connection; a process has one or two leases."""

WATCHES_MAX = 64
"""Polls at once; each holds two threads while it waits."""

WATCH_FLOOR_S = 0.5
"""etcd sends a late watcher its history in a loop of 100 ms: a shorter poll might miss it."""

CHANNEL_OPTIONS = [
    # Channels to one address share a connection by default; renewals shall not queue behind data.
    ("grpc.use_local_subchannel_pool", 1),
    # The defaults (1 to 120 s) would leave a node without metadata long after etcd is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Finds a peer that was powered off under a waiting watch. etcd allows one in 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
]

FULL_HINT = "compact and defragment it, then disarm its alarm (etcdctl)"
"""etcd keeps all history unless it is told not to (docs/metadata.md), and when it is full takes
nothing until a person has seen to it."""

NO_CREDENTIALS = ("etcdserver: user name is empty",)
"""What an etcd says that asks for a password; not with the code that gRPC has for it."""

Method = Callable[[Any], Any]
"""Picks a gRPC method from an `etcd3.Etcd3Client`."""


class EtcdStore(kv.KeyValueStore):
    """See `kv.KeyValueStore`.

    Args:
        endpoints: ``host:port`` of each member; the first that answers is used until it fails.
        deadline_s: after this time a request fails with `Again` or `OutcomeUnknown`.
        in_flight_max: requests sent and not answered; more wait here.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        deadline_s: float = DEADLINE_S,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        if not endpoints:
            raise Invalid("etcd needs at least one endpoint")
        self._deadline_s = deadline_s
        self._data = _Connections(endpoints, deadline_s, in_flight_max)
        self._lease = _Connections(endpoints, deadline_s, LEASE_IN_FLIGHT_MAX)
        self._threads = ThreadPoolExecutor(WATCHES_MAX, thread_name_prefix="torus-etcd-watch")
        self._polls: dict[_Poll, asyncio.Future[tuple[list[kv.Event], int]]] = {}

    async def get(self, key: str) -> kv.KeyValue | None:
        """See `kv.KeyValueStore.get`."""
        kv.check_key(key)
        request = etcdrpc.RangeRequest(key=key.encode())
        answer = await self._data.ask(_range, request, changes=False)
        return _key_value(answer.kvs[0]) if answer.kvs else None

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See `kv.KeyValueStore.range`."""
        kv.check_int64(limit)
        bounds = _under(prefix)
        if after:
            bounds["key"] = after.encode() + b"\0"
        request = etcdrpc.RangeRequest(**bounds, limit=limit)
        answer = await self._data.ask(_range, request, changes=False)
        return [_key_value(item) for item in answer.kvs], answer.header.revision

    async def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        """See `kv.KeyValueStore.txn`."""
        kv.validate_txn(compare, then)
        request = etcdrpc.TxnRequest(
            compare=[_compare(condition) for condition in compare],
            success=[_operation(operation) for operation in then],
        )
        answer = await self._data.ask(lambda client: client.kvstub.Txn, request, changes=True)
        return kv.TxnResult(answer.succeeded, answer.header.revision)

    async def lease_grant(self, ttl_s: int) -> int:
        """See `kv.KeyValueStore.lease_grant`."""
        kv.check_ttl(ttl_s)
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_s)
        # A lease whose answer was lost holds nothing and ends by itself: no change worth the name.
        answer = await self._lease.ask(
            lambda client: client.leasestub.LeaseGrant, request, changes=False
        )
        return int(answer.ID)

    async def lease_keepalive(self, lease: int) -> int:
        """See `kv.KeyValueStore.lease_keepalive`."""
        kv.check_int64(lease)
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        answer = await self._lease.ask(_keepalive, request, changes=False)
        if answer.TTL <= 0:
            raise LeaseNotFound(f"lease {lease:x} has ended")
        return int(answer.TTL)

    async def lease_revoke(self, lease: int) -> None:
        """See `kv.KeyValueStore.lease_revoke`."""
        kv.check_int64(lease)
        request = etcdrpc.LeaseRevokeRequest(ID=lease)
        await self._lease.ask(lambda client: client.leasestub.LeaseRevoke, request, changes=True)

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See `kv.KeyValueStore.events`."""
        kv.check_int64(after_revision)
        connection = self._data.current()
        if len(self._polls) >= WATCHES_MAX:
            raise Overloaded(f"more than {WATCHES_MAX} watches at once")
        timeout_s = max(timeout_s, WATCH_FLOOR_S)
        poll = _Poll(connection.client, prefix, after_revision, timeout_s + DEADLINE_S)
        waiting = asyncio.get_running_loop().run_in_executor(self._threads, poll.run)
        self._polls[poll] = waiting
        # Who was cancelled does not ask what became of it.
        waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            # A stopped etcd still accepts connections; only its first word shows that it is there.
            first_s = min(timeout_s, self._deadline_s)
            await asyncio.wait({waiting}, timeout=first_s)
            if poll.created:
                await asyncio.wait({waiting}, timeout=timeout_s - first_s)
            poll.cancel()
            found = await waiting
            # A poll that `close` ended before it began returns as if its time had passed.
            self._data.current()
            return found
        except grpc.RpcError as error:
            self._data.failed(connection)
            raise self._data.translate(error, changes=False) from error
        finally:
            poll.cancel()
            del self._polls[poll]

    async def close(self) -> None:
        """See `kv.KeyValueStore.close`."""
        polls = dict(self._polls)
        self._data.closed = self._lease.closed = True
        for poll in polls:
            poll.cancel()
        self._data.close()
        self._lease.close()
        if polls:
            await asyncio.wait(polls.values())
        self._threads.shutdown(wait=False)


class _Connection:
    """One channel to one member."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self.client = etcd3.client(host, int(port), grpc_options=CHANNEL_OPTIONS)
        self.ready = False
        """Whether its last request was answered."""


class _Connections:
    """One channel to each member; one of them is used until it fails."""

    def __init__(self, endpoints: Sequence[str], deadline_s: float, in_flight_max: int) -> None:
        self._all = [_Connection(endpoint) for endpoint in endpoints]
        self._names = ", ".join(endpoints)
        self._using = 0
        self._deadline_s = deadline_s
        self._window = asyncio.Semaphore(in_flight_max)
        self.closed = False

    def current(self) -> _Connection:
        """The one in use.

        Raises:
            Closed: `close` was called.
        """
        if self.closed:
            raise Closed("the metadata store is closed")
        return self._all[self._using]

    def failed(self, connection: _Connection) -> None:
        """Use another from now on, unless somebody has already changed over."""
        connection.ready = False
        if self._all[self._using] is connection:
            self._using = (self._using + 1) % len(self._all)

    def close(self) -> None:
        """Close all; requests under way end with `Closed`."""
        self.closed = True
        for connection in self._all:
            connection.client.close()

    async def ask(self, method: Method, request: Any, *, changes: bool) -> Any:
        """Send a request to the first member that can be reached.

        Args:
            method: the gRPC method.
            request: its argument.
            changes: the request must not be sent twice, and its loss is `OutcomeUnknown`.
        """
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        self.current()
        try:
            async with asyncio.timeout_at(deadline):
                await self._window.acquire()
        except TimeoutError:
            raise Again(f"etcd at {self._names} is too slow: the request was not sent") from None
        try:
            return await self._ask(method, request, changes, deadline)
        finally:
            self._window.release()

    async def _ask(self, method: Method, request: Any, changes: bool, deadline: float) -> Any:
        loop = asyncio.get_running_loop()
        for members_left in range(len(self._all), 0, -1):
            connection = self.current()
            sent = False
            try:
                if not connection.ready:
                    patience = (deadline - loop.time()) / members_left
                    await _answer(_range(connection.client).future(PROBE, timeout=patience))
                    connection.ready = True
                sent = True
                return await _answer(
                    method(connection.client).future(request, timeout=deadline - loop.time())
                )
            except grpc.RpcError as error:
                failure = self.translate(error, changes=changes and sent)
                if not isinstance(failure, (Again, OutcomeUnknown)):
                    raise failure from error
                self.failed(connection)
                if isinstance(failure, OutcomeUnknown) or members_left == 1:
                    raise failure from error
        raise AssertionError("unreachable")

    def translate(self, error: grpc.RpcError, *, changes: bool) -> TorusError:
        """What a gRPC error means to the caller."""
        if self.closed:
            return Closed("the metadata store is closed")
        code, details = error.code(), str(error.details())
        if code is grpc.StatusCode.CANCELLED:
            details = "it accepts connections, but does not answer"
        text = f"etcd at {self._names}: {details}"
        match code:
            case grpc.StatusCode.NOT_FOUND:
                return LeaseNotFound(text)
            case grpc.StatusCode.OUT_OF_RANGE:
                return Compacted(text)
            case grpc.StatusCode.INVALID_ARGUMENT if details in NO_CREDENTIALS:
                return Unauthenticated(text)
            case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.FAILED_PRECONDITION:
                return Invalid(text)
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                return Unauthenticated(text)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "space exceeded" in details:
                return OutOfSpace(f"{text}: {FULL_HINT}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "too many requests" in details:
                return Again(text)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return Invalid(text)
        if not changes or "failed to connect" in details:
            return Again(f"{text}; nothing was changed")
        return OutcomeUnknown(text)


class _Poll:
    """One watch stream, from a revision on, until it brings events; ``run`` is its own thread."""

    def __init__(self, client: Any, prefix: str, after_revision: int, timeout_s: float) -> None:
        self._client = client
        self._after_revision = after_revision
        self._timeout_s = timeout_s
        self._create = etcdrpc.WatchCreateRequest(
            **_under(prefix), start_revision=after_revision + 1
        )
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._call: Any = None
        self.created = False

    def cancel(self) -> None:
        """End the stream; any thread, any time."""
        with self._lock:
            self._ended.set()
            call = self._call
        if call is not None:
            call.cancel()

    def run(self) -> tuple[list[kv.Event], int]:
        """Wait for events; blocks.

        Raises:
            Compacted: the revision is gone.
            grpc.RpcError: the stream ended.
        """
        with self._lock:
            if self._ended.is_set():
                return [], self._after_revision
            self._call = etcdrpc.WatchStub(self._client.channel).Watch(
                self._requests(),
                timeout=self._timeout_s,
                # A member cut off from its cluster would otherwise keep us waiting for nothing.
                metadata=(("hasleader", "true"),),
            )
        try:
            for answer in self._call:
                self.created = True
                if answer.compact_revision:
                    raise Compacted(f"history before revision {answer.compact_revision} is gone")
                if answer.canceled:
                    raise Again(f"etcd ended the watch: {answer.cancel_reason or 'no reason'}")
                if answer.created and answer.header.revision < self._after_revision:
                    # It was restored from a backup. A member that lags behind looks the same, and
                    # has caught up when it answers the read that follows.
                    raise Compacted(f"revision {self._after_revision} has not been made here")
                if answer.events:
                    # Not the header's revision: a late watcher gets its history in pieces, and the
                    # header is then ahead of them.
                    found = [_event(item) for item in answer.events]
                    return found, found[-1].mod_revision
            raise Again("etcd ended the watch")
        except grpc.RpcError:
            # Time is up when the waiter cancels. The stream's own deadline is for a lost waiter:
            # etcd may notice that one first, and words it as a failure.
            if self._ended.is_set() and self.created:
                return [], self._after_revision
            raise
        finally:
            self._ended.set()
            self._call.cancel()

    def _requests(self) -> Iterator[Any]:
        yield etcdrpc.WatchRequest(create_request=self._create)
        # The stream's sending half stays open as long as the watch is wanted.
        self._ended.wait()


async def _answer(call: Any) -> Any:
    """Wait for a gRPC future without blocking; cancelling the wait cancels the call."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def completed(_: Any) -> None:
        # Runs in gRPC's thread, maybe after the loop has been closed.
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake)

    call.add_done_callback(completed)
    try:
        await waiter
    except asyncio.CancelledError:
        call.cancel()
        raise
    if call.cancelled():
        raise Closed("the metadata store is closed")
    return call.result()


def _range(client: Any) -> Any:
    return client.kvstub.Range


def _keepalive(client: Any) -> Any:
    # On the wire a stream of one message each way is an ordinary call, and as such needs no thread.
    return client.channel.unary_unary(
        "/etcdserverpb.Lease/LeaseKeepAlive",
        request_serializer=etcdrpc.LeaseKeepAliveRequest.SerializeToString,
        response_deserializer=etcdrpc.LeaseKeepAliveResponse.FromString,
    )


PROBE = etcdrpc.RangeRequest(key=b"\0", count_only=True)
"""A linearised read of nothing: answered only by a member that has a quorum."""


def _under(prefix: str) -> dict[str, bytes]:
    start = prefix.encode()
    # A zero byte as the end means: to the last key.
    return {"key": start or b"\0", "range_end": kv.prefix_end(start) or b"\0"}


def _key_value(item: Any) -> kv.KeyValue:
    return kv.KeyValue(item.key.decode(errors="replace"), item.value, item.mod_revision, item.lease)


def _event(item: Any) -> kv.Event:
    kind = kv.EventKind.PUT if item.type == item.PUT else kv.EventKind.DELETE
    key = item.kv.key.decode(errors="replace")
    return kv.Event(kind, key, item.kv.value, item.kv.mod_revision)


def _compare(condition: kv.Compare) -> Any:
    compare = etcdrpc.Compare(result=etcdrpc.Compare.EQUAL, key=condition.key.encode())
    if condition.value is not None:
        compare.target = etcdrpc.Compare.VALUE
        compare.value = condition.value
    else:
        compare.target = etcdrpc.Compare.MOD
        compare.mod_revision = condition.mod_revision
    return compare


def _operation(operation: kv.Operation) -> Any:
    if isinstance(operation, kv.Put):
        put = etcdrpc.PutRequest(
            key=operation.key.encode(), value=operation.value, lease=operation.lease
        )
        return etcdrpc.RequestOp(request_put=put)
    if isinstance(operation, kv.Delete):
        delete = etcdrpc.DeleteRangeRequest(key=operation.key.encode())
    else:
        delete = etcdrpc.DeleteRangeRequest(**_under(operation.prefix))
    return etcdrpc.RequestOp(request_delete_range=delete)
