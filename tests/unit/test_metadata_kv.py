"""Conformance of the key-value stores: memory, SQLite and a real etcd behave alike.

And the actor that serves one of them to others.
"""

from __future__ import annotations

import asyncio
import random
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.integration.etcd_server import EtcdServer, require_etcd
from tests.integration.metadata_backends import (
    BACKENDS,
    HISTORY_EVENTS_MAX,
    METADATA,
    Backend,
    until,
)
from tests.unit.runtime_harness import on_uvloop, row
from tests.unit.runtime_harness import until as soon
from torus_actors import node as node_module
from torus_actors.actors import metadata
from torus_actors.actors.metadata import ActorStore
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.actors.volumes import NOT_CLOSED, OpenVolume
from torus_actors.errors import (
    Again,
    Closed,
    Compacted,
    Corruption,
    Invalid,
    LeaseNotFound,
    OutcomeUnknown,
)
from torus_actors.machine import REAL_MACHINE
from torus_actors.metadata import kv
from torus_actors.metadata.kv import (
    Compare,
    Delete,
    DeletePrefix,
    Event,
    EventKind,
    KeyValue,
    KeyValueStore,
    Put,
    TxnResult,
)
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.sqlite import Database, SqliteStore
from torus_actors.model.rings import make_ring
from torus_actors.node import NodeConfig, StorageNode, claim_data_dir, load_node_id, start_node
from torus_actors.process import Process, store_opener
from torus_actors.runtime import ChildSpec, LoopActor, expose
from torus_actors.scenarios.processes import free_ports
from torus_actors.storage.mfile_open import INDEX_PATH
from torus_actors.wire.hello import Role

Test = Callable[[KeyValueStore], Awaitable[None]]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for the module."""
    require_etcd()
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Each kind of store in turn."""
    etcd = request.getfixturevalue("etcd") if request.param == "etcd" else None
    return Backend(request.param, tmp_path, etcd)


def run(backend: Backend, test: Test) -> None:
    """Run a test on a fresh store."""

    async def main() -> None:
        async with asyncio.timeout(30), backend.open() as store:
            await test(store)

    asyncio.run(main())


def test_a_put_value_is_read_back_with_the_revision_that_wrote_it(backend: Backend) -> None:
    """Get and range return exactly what was put: empty and binary values, non-ASCII keys."""

    async def test(store: KeyValueStore) -> None:
        assert await store.get("a") is None
        first = await store.txn([], [Put("a/ü", bytes(range(256))), Put("a/b", b"")])
        second = await store.txn([], [Put("a/b", b"2")])
        assert first.succeeded and second.revision == first.revision + 1
        assert await store.get("a/ü") == KeyValue("a/ü", bytes(range(256)), first.revision)
        assert await store.range("a/") == (
            [KeyValue("a/b", b"2", second.revision), await store.get("a/ü")],
            second.revision,
        )

    run(backend, test)


def test_range_takes_exactly_the_keys_with_the_prefix_in_order(backend: Backend) -> None:
    """Neighbouring keys stay outside, order is by bytes, and the empty prefix means all keys."""

    async def test(store: KeyValueStore) -> None:
        keys = ["p", "p/", "p/2", "p/10", "p/\U0010ffff", "p/\ue000", "p0", "o/~", "q/"]
        await store.txn([], [Put(key, b"") for key in keys])
        found, _ = await store.range("p/")
        assert [item.key for item in found] == ["p/", "p/10", "p/2", "p/\ue000", "p/\U0010ffff"]
        everything, _ = await store.range("")
        assert [item.key for item in everything] == sorted(keys, key=str.encode)
        nothing, revision = await store.range("absent/")
        assert nothing == [] and revision > 0

    run(backend, test)


def test_a_long_range_is_read_in_pages(backend: Backend) -> None:
    """A page begins behind the key that is named, and has no more keys than are wanted."""

    async def test(store: KeyValueStore) -> None:
        keys = ["p/", "p/1", "p/1/", "p/\ue000", "p/\U0010ffff"]
        await store.txn([], [Put(key, b"") for key in [*keys, "o", "q"]])
        found: list[str] = []
        while page := (await store.range("p/", after=found[-1] if found else "", limit=2))[0]:
            assert len(page) <= 2
            found += [item.key for item in page]
        assert found == keys
        behind, revision = await store.range("p/", after="p/1")
        assert [item.key for item in behind] == keys[2:]
        assert revision == (await store.range(""))[1]
        with pytest.raises(Invalid):
            await store.range("p/", limit=1 << 63)

    run(backend, test)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (lambda revision: Compare("k", mod_revision=revision), True),
        (lambda revision: Compare("k", mod_revision=revision - 1), False),
        (lambda revision: Compare("k", mod_revision=0), False),
        (lambda revision: Compare("k", value=b"v"), True),
        (lambda revision: Compare("k", value=b"w"), False),
        (lambda revision: Compare("k", value=b""), False),
        (lambda revision: Compare("absent", mod_revision=0), True),
        (lambda revision: Compare("absent", mod_revision=1), False),
        (lambda revision: Compare("absent", value=b"v"), False),
        (lambda revision: Compare("absent", value=b""), False),
    ],
)
def test_a_transaction_applies_only_if_its_compare_holds(
    backend: Backend, condition: Callable[[int], Compare], holds: bool
) -> None:
    """Compares are of a revision (0: absent) or of a value; an absent key equals no value."""

    async def test(store: KeyValueStore) -> None:
        revision = (await store.txn([], [Put("k", b"v")])).revision
        result = await store.txn([condition(revision)], [Put("then", b""), Delete("k")])
        assert result == TxnResult(holds, revision + holds)
        assert (await store.get("then") is not None) == holds
        assert (await store.get("k") is None) == holds

    run(backend, test)


def test_a_transaction_is_all_or_nothing(backend: Backend) -> None:
    """One false compare of several stops all operations, and changes no revision."""

    async def test(store: KeyValueStore) -> None:
        before = await store.txn([], [Put("a", b"1")])
        result = await store.txn(
            [Compare("a", value=b"1"), Compare("b", mod_revision=7)],
            [Put("a", b"2"), Put("c", b"")],
        )
        assert result == TxnResult(False, before.revision)
        assert await store.range("") == ([KeyValue("a", b"1", before.revision)], before.revision)

    run(backend, test)


def test_only_a_change_makes_a_revision(backend: Backend) -> None:
    """Deleting what is absent, and an empty transaction, succeed without a new revision."""

    async def test(store: KeyValueStore) -> None:
        before = (await store.txn([], [Put("a", b"")])).revision
        for then in ([], [Delete("absent")], [DeletePrefix("absent/")]):
            assert await store.txn([], then) == TxnResult(True, before)
        assert (await store.txn([], [Put("a", b"")])).revision == before + 1

    run(backend, test)


def test_of_racing_transactions_one_wins(backend: Backend) -> None:
    """Many compare-and-sets against one revision: exactly one succeeds."""

    async def test(store: KeyValueStore) -> None:
        base = (await store.txn([], [Put("k", b"")])).revision
        results = await asyncio.gather(
            *(
                store.txn([Compare("k", mod_revision=base)], [Put("k", b"%d" % number)])
                for number in range(20)
            )
        )
        winners = [number for number, result in enumerate(results) if result.succeeded]
        assert len(winners) == 1
        assert await store.get("k") == KeyValue("k", b"%d" % winners[0], base + 1)

    run(backend, test)


@pytest.mark.parametrize(
    ("compare", "then"),
    [
        ([], [Put("a", b""), Put("a", b"")]),
        ([], [Put("a", b""), Delete("a")]),
        ([], [DeletePrefix("x/"), Put("x/a", b"")]),
        ([], [Put("", b"")]),
        ([], [Delete("k" * (kv.KEY_BYTES_MAX + 1))]),
        ([], [Put("\ud800", b"")]),
        ([], [Put("a", bytes(kv.REQUEST_BYTES_MAX))]),
        ([], [Put(f"{number}", b"") for number in range(kv.TXN_OPERATIONS_MAX + 1)]),
        ([], [Put("a", b"", lease=1 << 63)]),
        ([Compare("a")], []),
        ([Compare("a", mod_revision=0, value=b"")], []),
        ([Compare("a", mod_revision=-1)], []),
    ],
)
def test_a_transaction_outside_the_limits_is_refused(
    backend: Backend, compare: list[Compare], then: list[kv.Operation]
) -> None:
    """Every backend holds to etcd's limits (torus#120): none accepts what etcd would not."""

    async def test(store: KeyValueStore) -> None:
        with pytest.raises(Invalid):
            await store.txn(compare, then)
        assert (await store.range(""))[0] == []

    run(backend, test)


def test_the_largest_transaction_fits(backend: Backend) -> None:
    """What the limits allow, the backend takes."""

    async def test(store: KeyValueStore) -> None:
        count = kv.TXN_OPERATIONS_MAX
        value = bytes(kv.REQUEST_BYTES_MAX // count - 100)
        then = [Put(f"key-{number}", value) for number in range(count)]
        compare = [Compare(f"key-{number}", mod_revision=0) for number in range(count)]
        assert (await store.txn(compare, then)).succeeded
        assert len((await store.range("key-"))[0]) == count

    run(backend, test)


def test_a_leased_key_ends_with_its_lease(backend: Backend) -> None:
    """Revoking deletes the keys at one revision; the lease is then unknown."""

    async def test(store: KeyValueStore) -> None:
        lease = await store.lease_grant(60)
        assert lease > 0 and lease != await store.lease_grant(60)
        put = await store.txn([], [Put("a", b"", lease), Put("b", b"", lease), Put("c", b"")])
        assert await store.get("a") == KeyValue("a", b"", put.revision, lease)
        assert await store.lease_keepalive(lease) >= 60
        await store.lease_revoke(lease)
        found, revision = await store.range("")
        assert [item.key for item in found] == ["c"] and revision == put.revision + 1
        for call in (store.lease_keepalive(lease), store.lease_revoke(lease)):
            with pytest.raises(LeaseNotFound):
                await call
        with pytest.raises(LeaseNotFound):
            await store.txn([], [Put("c", b"changed"), Put("d", b"", lease)])
        assert [item.value for item in (await store.range(""))[0]] == [b""]

    run(backend, test)


def test_a_key_hangs_on_the_lease_of_its_last_put(backend: Backend) -> None:
    """A later put moves the key to another lease, or to none."""

    async def test(store: KeyValueStore) -> None:
        old, new = await store.lease_grant(60), await store.lease_grant(60)
        await store.txn([], [Put("moved", b"", old), Put("freed", b"", old)])
        await store.txn([], [Put("moved", b"", new), Put("freed", b"")])
        await store.lease_revoke(old)
        assert [(item.key, item.lease) for item in (await store.range(""))[0]] == [
            ("freed", 0),
            ("moved", new),
        ]
        await store.lease_revoke(new)
        assert [item.key for item in (await store.range(""))[0]] == ["freed"]

    run(backend, test)


def test_a_lease_that_is_not_renewed_ends_and_one_that_is_does_not(backend: Backend) -> None:
    """The key of a dead process disappears, and watchers are told (torus#132 begins so)."""

    async def test(store: KeyValueStore) -> None:
        dead, alive = await store.lease_grant(1), await store.lease_grant(2)
        put = await store.txn([], [Put("dead", b"", dead), Put("alive", b"", alive)])

        async def renewed() -> bool:
            await store.lease_keepalive(alive)
            return await store.get("dead") is None

        await until(renewed)
        assert await store.get("alive") is not None
        events, revision = await store.events("", put.revision, 5)
        assert events == [Event(EventKind.DELETE, "dead", b"", revision)]
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(dead)
        # torus#132: the key can be made again under a new lease.
        again = await store.lease_grant(60)
        assert (
            await store.txn([Compare("dead", mod_revision=0)], [Put("dead", b"", again)])
        ).succeeded

    run(backend, test)


@pytest.mark.parametrize("stall_s", [1.0, 6.5, 60.0])
def test_a_process_that_stood_still_ends_no_lease(stall_s: float) -> None:
    """Nobody could renew meanwhile, however long it was; afterwards a lease ends when it should."""
    ahead_s = 0.0

    async def main() -> None:
        nonlocal ahead_s
        loop = asyncio.get_running_loop()
        real = loop.time
        loop.time = lambda: real() + ahead_s  # type: ignore[method-assign]
        store = MemoryStore()
        lease = await store.lease_grant(6)
        await store.txn([], [Put("k", b"", lease)])
        ahead_s += stall_s
        await asyncio.sleep(0.01)  # the timers are first
        assert await store.get("k") is not None
        await store.lease_keepalive(lease)
        for _ in range(59):
            ahead_s += 0.1
            await asyncio.sleep(0)
        assert await store.get("k") is not None
        for _ in range(3):
            ahead_s += 0.1
            await asyncio.sleep(0)
        assert await store.get("k") is None
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("ttl_s", [0, -1])
def test_a_lease_needs_a_ttl(backend: Backend, ttl_s: int) -> None:
    """A TTL below a second is refused."""

    async def test(store: KeyValueStore) -> None:
        with pytest.raises(Invalid):
            await store.lease_grant(ttl_s)
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(12345)

    run(backend, test)


def test_events_tell_every_change_in_order(backend: Backend) -> None:
    """History after a revision comes at once, only of the prefix, whole transactions at a time."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w/a", b"0"), Put("w/b", b"0"), Put("x", b"")])).revision
        await store.txn([], [Put("w/a", b"1"), Put("x", b"1"), Delete("w/b")])
        await store.txn([], [Put("x", b"2")])
        last = (await store.txn([], [DeletePrefix("w/")])).revision
        wanted = [
            Event(EventKind.PUT, "w/a", b"1", start + 1),
            Event(EventKind.DELETE, "w/b", b"", start + 1),
            Event(EventKind.DELETE, "w/a", b"", last),
        ]
        found: list[Event] = []
        revision = start
        while len(found) < len(wanted):
            events, revision = await store.events("w/", revision, 5)
            found += events
        assert found == wanted and revision == last
        everything, _ = await store.events("w/", start - 1, 5)
        assert everything[:2] == [
            Event(EventKind.PUT, "w/a", b"0", start),
            Event(EventKind.PUT, "w/b", b"0", start),
        ]

    run(backend, test)


def test_a_poll_wakes_up_for_a_change(backend: Backend) -> None:
    """Waiters are woken by a change of their prefix, not by another, and long before time is up."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w/a", b"0")])).revision
        polls = [asyncio.ensure_future(store.events(prefix, start, 25)) for prefix in ("w/", "w")]
        other = asyncio.ensure_future(store.events("v/", start, 0.6))
        await store.txn([], [Put("x", b"")])
        changed = await store.txn([], [Put("w/a", b"1")])
        for poll in polls:
            assert await poll == (
                [Event(EventKind.PUT, "w/a", b"1", changed.revision)],
                changed.revision,
            )
        nothing, revision = await other
        assert nothing == [] and start <= revision <= changed.revision

    run(backend, test)


def test_a_poll_without_a_change_ends_with_its_time(backend: Backend) -> None:
    """An empty answer still says where to go on from, and nothing is missed after it."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w", b"0")])).revision
        events, revision = await store.events("w", start, 0.01)
        assert events == [] and revision == start
        changed = (await store.txn([], [Put("w", b"1")])).revision
        assert await store.events("w", revision, 5) == (
            [Event(EventKind.PUT, "w", b"1", changed)],
            changed,
        )

    run(backend, test)


def test_a_poll_behind_the_history_is_told_so(backend: Backend) -> None:
    """History is bounded: who fell behind gets Compacted, and can go on from the present state."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w", b"0")])).revision
        await store.txn([], [Put("w", b"1")])
        await backend.outrun_history(store)
        with pytest.raises(Compacted):
            await store.events("w", start - 1, 5)
        found, revision = await store.range("w")
        assert [item.value for item in found] == [b"1"]
        changed = (await store.txn([], [Put("w", b"2")])).revision
        assert await store.events("w", revision, 5) == (
            [Event(EventKind.PUT, "w", b"2", changed)],
            changed,
        )

    run(backend, test)


def test_a_poll_ahead_of_the_history_is_told_so(backend: Backend) -> None:
    """The store was restored from a backup: the reader has seen what is not any more.

    Found by review: it then saw no change until the store had made as many again.
    """

    async def test(store: KeyValueStore) -> None:
        revision = (await store.txn([], [Put("a", b"")])).revision
        with pytest.raises(Compacted):
            await store.events("a", revision + 1, 5.0)
        assert await store.events("a", revision, 0.0) == ([], revision)

    run(backend, test)


def test_history_is_dropped_in_whole_transactions(backend: Backend) -> None:
    """From any revision a poll gives Compacted, or complete transactions: never a part of one."""

    async def test(store: KeyValueStore) -> None:
        first = (await store.txn([], [Put("w", b"")])).revision
        for _ in range(20):
            last = (await store.txn([], [Put(f"w{number}", b"") for number in range(7)])).revision
        complete = 0
        for revision in range(first, last, 3):
            try:
                events, _ = await store.events("w", revision, 5)
            except Compacted:
                assert not complete, "history that is gone lies behind history that is there"
                continue
            complete += 1
            assert len(events) == 7 * (last - revision)
        assert complete >= HISTORY_EVENTS_MAX // 7 // 3

    run(backend, test)


def test_a_cancelled_poll_leaves_the_store_working(backend: Backend) -> None:
    """Cancelling a waiter ends it promptly and disturbs nobody."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w", b"0")])).revision
        polls = [asyncio.ensure_future(store.events("w", start, 25)) for _ in range(4)]
        await store.get("w")
        for poll in polls[:3]:
            poll.cancel()
        ended = await asyncio.gather(*polls[:3], return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended)
        await store.txn([], [Put("w", b"1")])
        assert [event.value for event in (await polls[3])[0]] == [b"1"]

    run(backend, test)


def test_a_closed_store_says_so(backend: Backend) -> None:
    """Close ends waiting polls with Closed; every later call is refused; closing twice is fine."""

    async def test(store: KeyValueStore) -> None:
        start = (await store.txn([], [Put("w", b"0")])).revision
        poll = asyncio.ensure_future(store.events("w", start, 25))
        await store.get("w")
        await store.close()
        calls = [
            poll,
            store.get("a"),
            store.range(""),
            store.txn([], []),
            store.lease_grant(1),
            store.lease_keepalive(1),
            store.lease_revoke(1),
            store.events("", 0, 1),
        ]
        for call in calls:
            with pytest.raises(Closed):
                await call
        await store.close()

    run(backend, test)


@pytest.mark.parametrize(
    "record",
    [
        KeyValue("k", b"\0", 7, 8),
        Compare("k", mod_revision=0),
        Compare("k", value=b""),
        TxnResult(True, 9),
        Event(EventKind.DELETE, "k", b"", 3),
    ],
)
def test_records_survive_the_wire(record: KeyValue | Compare | TxnResult | Event) -> None:
    """from_wire reads what to_wire made, and refuses anything else with Invalid."""
    wire = record.to_wire()
    assert type(record).from_wire(wire) == record
    for broken in (wire[:-1], [*wire, 0], [None, *wire[1:]], "text", None):
        with pytest.raises(Invalid):
            type(record).from_wire(broken)


@pytest.mark.parametrize("operation", [Put("k", b"v", 3), Delete("k"), DeletePrefix("p/")])
def test_operations_survive_the_wire(operation: kv.Operation) -> None:
    """An operation is a tagged list; an unknown tag or a wrong type is Invalid."""
    assert kv.operation_from_wire(operation.to_wire()) == operation
    for broken in ([], ["drop", "k"], ["put", "k", "text", 0], ["delete", b"k"], None, 7):
        with pytest.raises(Invalid):
            kv.operation_from_wire(broken)  # type: ignore[arg-type]


# -- the actor that serves a store -----------------------------------------------------------------


def process() -> Process:
    """What keeps metadata, and has nothing else yet."""
    return Process(str(uuid.UUID(int=1)), Role.NODE, "memory://", None, random.Random(1))


@on_uvloop
async def test_what_is_kept_in_memory_outlives_the_actor_that_serves_it() -> None:
    """It is there after the actor was killed, and each process has its own."""
    first, second = process(), process()
    for each in (first, second):
        await each.start_base(None, store_opener("memory://"))
    store = ActorStore(first.system.actor("metadata"))
    await store.txn([], [Put("a", b"1")])
    waiting = asyncio.ensure_future(store.events("b", 2, 5.0))
    await asyncio.sleep(0)
    first.system.cells["metadata"].kill()
    found = await store.get("a")
    assert found is not None and found.value == b"1"
    await store.txn([], [Put("b", b"2")])
    assert len((await waiting)[0]) == 1
    assert await ActorStore(second.system.actor("metadata")).get("a") is None
    for each in (first, second):
        await each.stop()


@on_uvloop
async def test_a_volume_that_nobody_could_close_any_more_is_told() -> None:
    """Its actor was not to be had: no status of 0 for a process that lost what was written."""
    stopped = process()
    await stopped.start_base(None, store_opener("memory://"))

    def volume(epoch: int, closed: bool) -> OpenVolume:
        return OpenVolume(Mock(epoch=epoch, closed=closed))

    stopped.system.heirlooms["open_volumes"] = {
        "left": volume(3, False),
        "read only": volume(0, False),
        "closed": volume(3, True),
    }
    await stopped.stop()
    (told,) = stopped.system.heirlooms[NOT_CLOSED]
    assert "left" in told


class _Hanging(MemoryStore):
    """One whose disk has begun to hang: leases are in memory."""

    async def get(self, key: str) -> Any:
        """Never answers."""
        await asyncio.Event().wait()


@on_uvloop
async def test_what_waits_for_a_disk_that_hangs_keeps_no_lease_from_being_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by reading: as many as had given up took all handlers, and all leases ended."""
    monkeypatch.setattr(metadata, "CALL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(metadata, "OPERATIONS_MAX", 6)
    kept = _Hanging()
    keeper = process()
    await keeper.start_base(None, None)
    await keeper.system.spawn(
        ChildSpec("metadata", lambda: metadata.MetadataActor(kept), max_concurrency=8)
    )
    store = ActorStore(keeper.system.actor("metadata"))
    lease = await store.lease_grant(60)
    for _ in range(20):
        with pytest.raises(Again):
            await store.get("a")
    assert await store.lease_keepalive(lease) == 60
    with pytest.raises(Again, match="6 wait for the metadata's store already"):
        await store.txn([], [Put("a", b"1")])
    await keeper.stop()


class _NoPages(LoopActor):
    """The metadata actor of an earlier version, as far as ranges go."""

    def __init__(self, store: KeyValueStore) -> None:
        super().__init__()
        self._store = store

    @expose(remote=True, idempotent=True)
    async def kv_range(self, prefix: str) -> Any:
        """All keys at once."""
        found, revision = await self._store.range(prefix)
        return [[item.to_wire() for item in found], revision]


@on_uvloop
async def test_a_node_that_knows_of_no_pages_is_read_in_pages_all_the_same() -> None:
    """Nodes are upgraded one by one, and the one that keeps the metadata is not always the first.

    Found by review: until it was, nobody could list volumes, and no other node collected garbage.
    """
    kept = MemoryStore()
    now = (await kept.txn([], [Put(key, b"") for key in ("p/1", "p/2", "p/3", "q")])).revision
    keeper = process()
    await keeper.start_base(("127.0.0.1", 0), None)
    await keeper.system.spawn(ChildSpec("metadata", lambda: _NoPages(kept)))
    _, port = await keeper.system.actor("bridge").listening.remote()
    url = f"torus://127.0.0.1:{port}"
    other = Process(str(uuid.UUID(int=2)), Role.CLIENT, url, None, random.Random(2))
    await other.start_base(None, None)
    store = other.meta.store
    try:
        for after, limit, wanted in (
            ("", 2, ["p/1", "p/2"]),
            ("p/2", 2, ["p/3"]),
            ("p/1", 0, ["p/2", "p/3"]),
        ):
            assert await store.range("p/", after=after, limit=limit) == (
                [await kept.get(key) for key in wanted],
                now,
            )
        with pytest.raises(Invalid):
            await store.range("p/", limit=1 << 63)
    finally:
        await other.stop()
        await keeper.stop()


@on_uvloop
async def test_those_who_wait_for_news_keep_nobody_from_the_metadata() -> None:
    """Nor do those whose connection broke, whose polls go on until their time is over.

    Found by review: a thousand of them, from twenty clients on a bad network, and no lease of the
    cluster could be renewed for half a minute.
    """
    keeper = process()
    await keeper.start_base(None, store_opener("memory://"))
    store = ActorStore(keeper.system.actor("metadata"))
    lease = await store.lease_grant(60)
    revision = (await store.txn([], [Put("a", b"1")])).revision
    polls = [asyncio.ensure_future(store.events("a", revision, 30.0)) for _ in range(5000)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(10.0):
            assert await store.lease_keepalive(lease) == 60
            await store.txn([], [Put("a", b"2")])
        told = await asyncio.gather(*polls, return_exceptions=True)
        assert sum(isinstance(each, tuple) for each in told) > 1000
        assert all(isinstance(each, tuple | Again) for each in told)
    finally:
        await asyncio.gather(*polls, return_exceptions=True)
        await keeper.stop()


@on_uvloop
async def test_a_node_that_starts_waits_for_the_metadata_to_join_the_ring_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away while the node opens its stores, which may take a while.

    Found by review: the node ended, where it would have waited a moment earlier.
    """
    there = make_ring("ketama", version=2, replication=1, peers=())
    tried = 0

    async def away_at_first(*args: Any) -> Any:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise Again("the metadata cannot be reached")
        return there

    monkeypatch.setattr(node_module, "join_ring", away_at_first)
    monkeypatch.setattr(StorageNode, "_as_member", lambda node: None)
    node = StorageNode(NodeConfig(tmp_path), str(uuid.UUID(int=1)), random.Random(1))
    node.view = ClusterView(METADATA, make_ring("ketama", version=1, replication=1, peers=()))
    await node._join()
    assert node.view.ring is there


@pytest.mark.parametrize("left", ["nothing", "an empty file"])
@on_uvloop
async def test_metadata_that_was_lost_is_not_made_anew_over_the_blocks(
    tmp_path: Path, left: str
) -> None:
    """A node that keeps it does not start as another cluster, and says what is missing.

    Found by review: it made one, served it to the others, and then advised to remove the blocks.
    """
    disk = REAL_MACHINE.open_disk(tmp_path)
    rng = random.Random(1)
    load_node_id(disk, rng)
    claim_data_dir(disk, str(uuid.UUID(int=5)))
    path = tmp_path / "metadata.sqlite"
    if left != "nothing":
        path.touch()
    address = ("127.0.0.1", free_ports(1))
    config = NodeConfig(tmp_path, 1 << 20, address, metadata=f"torus://127.0.0.1:{address[1]}")
    with pytest.raises(Invalid, match=r"metadata\.sqlite .* is not there"):
        await start_node(config, rng)
    assert not path.exists() or not path.stat().st_size


@pytest.mark.parametrize("left", [None, b"{"])
def test_blocks_without_the_file_that_says_whose_they_are_are_not_taken(
    tmp_path: Path, left: bytes | None
) -> None:
    """They may be another cluster's, whose refs look like those of this one."""
    disk = REAL_MACHINE.open_disk(tmp_path)
    node_id = load_node_id(disk, random.Random(1))
    file = tmp_path / "node.json"
    kept = file.read_bytes()
    (tmp_path / "inodes").mkdir()
    (tmp_path / "inodes" / INDEX_PATH).touch()
    file.unlink()
    if left is not None:
        file.write_bytes(left)
    with pytest.raises(Corruption, match=r"node\.json .* put it back, or move"):
        load_node_id(disk, random.Random(2))
    file.write_bytes(kept)
    assert load_node_id(disk, random.Random(2)) == node_id


def test_who_removes_what_a_refusal_names_starts_empty(tmp_path: Path) -> None:
    """Nothing of the other cluster is left: its journal would fence the new one's volumes."""
    disk = REAL_MACHINE.open_disk(tmp_path)
    load_node_id(disk, random.Random(1))
    claim_data_dir(disk, str(uuid.UUID(int=5)))
    for area in ("blocks", "inodes", "journal"):
        (tmp_path / area).mkdir()
    with pytest.raises(Invalid) as refused:
        claim_data_dir(disk, str(uuid.UUID(int=6)))
    assert [path.name for path in tmp_path.iterdir() if path.name not in str(refused.value)] == []


@on_uvloop
async def test_a_disk_that_stalls_while_the_actor_is_killed_ends_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor serves the same open file, as soon as the disk answers again.

    Found by review: it could not open the file, which the first one had no time to close.
    """
    path = tmp_path / "metadata.sqlite"
    stalled, goes_on = threading.Event(), threading.Event()
    txn = Database.txn

    def slow(*args: Any) -> Any:
        stalled.set()
        goes_on.wait(5.0)
        return txn(*args)

    keeper = process()
    await keeper.start_base(None, lambda: SqliteStore.open(path))
    store = ActorStore(keeper.system.actor("metadata"))
    await store.txn([], [Put("a", b"1")])
    monkeypatch.setattr(Database, "txn", slow)
    change = asyncio.ensure_future(store.txn([], [Put("b", b"2")]))
    await soon(stalled.is_set)
    keeper.system.cells["metadata"].kill()
    with pytest.raises(OutcomeUnknown):
        await change
    asking = asyncio.ensure_future(store.get("b"))
    await asyncio.sleep(1.2)  # longer than a killed actor may clean up
    goes_on.set()
    found = await asking
    assert found is not None and found.value == b"2"
    assert row(keeper.system, "metadata")["restarts"] == 1
    await keeper.stop()
    again = await SqliteStore.open(path)
    assert await again.get("b") == found
    await again.close()


@on_uvloop
async def test_more_metadata_than_a_message_holds_reaches_another_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some thousand deleted volumes are as much. Who is too far behind is told to read anew.

    Found by review: only the collector of the metadata's own node could read it, and a watch that
    was so far behind never went on.
    """
    keeper = process()
    await keeper.start_base(("127.0.0.1", 0), store_opener("memory://"))
    _, port = await keeper.system.actor("bridge").listening.remote()
    url = f"torus://127.0.0.1:{port}"
    other = Process(str(uuid.UUID(int=2)), Role.CLIENT, url, None, random.Random(2))
    await other.start_base(None, None)
    store = other.meta.store
    try:
        for n in range(6):
            last = await store.txn([], [Put(f"a/{n}", bytes([n]) * 1000_000)])
        found, revision = await store.range("a")
        assert [(item.key, item.value[:1], len(item.value)) for item in found] == [
            (f"a/{n}", bytes([n]), 1000_000) for n in range(6)
        ]
        events, at = await store.events("a", last.revision - 6, 1.0)
        assert [(event.key, event.value) for event in events] == [
            (item.key, item.value) for item in found
        ]
        assert at == revision == last.revision
        monkeypatch.setattr(metadata, "PAYLOAD_MAX", 5_000_000)
        with pytest.raises(Compacted):
            await store.events("a", last.revision - 6, 1.0)
    finally:
        for each in (other, keeper):
            await each.stop()
