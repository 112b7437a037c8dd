"""A real etcd that crashes, stalls, forgets history, or is one of several."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from tests.integration.etcd_server import EtcdServer, require_etcd
from tests.integration.metadata_backends import METADATA, until
from torus_actors.errors import (
    Again,
    Closed,
    CompareFailed,
    Invalid,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
    Unauthenticated,
)
from torus_actors.metadata import etcd as etcd_module
from torus_actors.metadata.etcd import EtcdStore
from torus_actors.metadata.kv import Compare, Put
from torus_actors.metadata.patience import patiently
from torus_actors.metadata.records import Head
from torus_actors.metadata.service import MetadataService

DEADLINE_S = 0.5
"""Short, so that tests of a stalled etcd are."""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd of the test's own."""
    require_etcd()
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def service_at(*endpoints: str) -> AsyncIterator[MetadataService]:
    """A metadata service, closed at the end."""
    store = EtcdStore(endpoints, deadline_s=DEADLINE_S)
    service = MetadataService(store, rng=random.Random(1))
    try:
        yield service
    finally:
        await service.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on the event loop that production uses."""

    async def main() -> None:
        async with asyncio.timeout(40):
            await test()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_watch_survives_a_crash_of_etcd(etcd: EtcdServer) -> None:
    """After kill -9 and restart a watch goes on by itself, and misses nothing."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            rings = service.ring_watch()
            assert await anext(rings) == (b"1", 1)
            for version in (2, 3):
                coming = asyncio.ensure_future(anext(rings))
                # The poll is under way when etcd dies.
                await service.ring()
                await asyncio.to_thread(etcd.kill)
                await asyncio.to_thread(etcd.start)
                await patiently(
                    service.set_ring, b"%d" % version, version, give_up_s=20, rng=random.Random(2)
                )
                assert await coming == (b"%d" % version, version)

    run(test)


def test_puts_through_crashes_of_etcd_are_made_exactly_once(etcd: EtcdServer) -> None:
    """Commits go on while etcd is killed under them; each acknowledged one is there, in order."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            volume = await service.create_volume("demo", 1 << 30)
            epoch = await service.attach(volume.id, "vm1 pid 1", await service.grant_lease(600))
            rng = random.Random(3)
            revision, inode, killed = 0, 0, False

            async def crash() -> None:
                for _ in range(2):
                    seen = inode
                    await until(lambda seen=seen: more_than(seen + 30))
                    await asyncio.to_thread(etcd.kill)
                    await asyncio.to_thread(etcd.start)

            async def more_than(wanted: int) -> bool:
                return inode > wanted

            crashing = asyncio.ensure_future(crash())
            while not killed:
                killed = crashing.done()
                first = await patiently(service.mint_inode, volume.id, give_up_s=20, rng=rng)
                assert first > inode
                head = Head(first, bytes(24), 0, 1 << 30, epoch)
                # CompareFailed here would mean that an earlier commit was made twice, or lost.
                revision = await patiently(
                    service.commit_head, volume.id, epoch, revision, head, give_up_s=20, rng=rng
                )
                inode = first
                assert await patiently(service.head, volume.id, give_up_s=20, rng=rng) == (
                    head,
                    revision,
                )
            await crashing
            with pytest.raises(CompareFailed):
                await service.commit_head(
                    volume.id, epoch, revision - 1, Head(inode + 1, bytes(24), 0, 1 << 30, epoch)
                )

    run(test)


def test_a_watch_survives_compaction(etcd: EtcdServer) -> None:
    """A watch that fell behind a compaction starts again with the full state, and then follows."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            watch = service.watch(service.keys.prefix)
            first = await anext(watch)
            assert first.full and len(first.items) == 4
            await service.set_ring(b"2", 2)
            revision = (await service.store.txn([], [Put("other", b"")])).revision
            await asyncio.to_thread(etcd.compact, revision)
            again = await anext(watch)
            assert again.full and again.revision == revision and len(again.items) == 4
            coming = asyncio.ensure_future(anext(watch))
            await service.set_ring(b"3", 3)
            assert [event.key for event in (await coming).events] == [service.keys.ring]

    run(test)


def test_compaction_does_not_disturb_a_watch_that_kept_up(etcd: EtcdServer) -> None:
    """Compacting under a waiting poll changes nothing for it."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            rings = service.ring_watch()
            await anext(rings)
            coming = asyncio.ensure_future(anext(rings))
            revision = (await service.store.txn([], [Put("other", b"")])).revision
            await asyncio.to_thread(etcd.compact, revision)
            await service.set_ring(b"2", 2)
            assert await coming == (b"2", 2)

    run(test)


def test_a_full_etcd_says_what_to_do(tmp_path: Path) -> None:
    """No change is taken, in a line with the remedy; leases live on, and locks can be given up."""
    require_etcd()
    etcd = EtcdServer(tmp_path, prefix=["env", f"ETCD_QUOTA_BACKEND_BYTES={4 << 20}"])
    etcd.start()

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            volume = await service.create_volume("demo", 1 << 30)
            lease = await service.grant_lease(600)
            epoch = await service.attach(volume.id, "vm1 pid 1", lease)
            with pytest.raises(OutOfSpace, match=r"space exceeded: compact .* alarm"):
                async with asyncio.timeout(30):
                    while True:  # it looks at its size now and then only
                        await service.store.txn([], [Put("filler", bytes(1_000_000))])
            with pytest.raises(OutOfSpace):
                await service.commit_head(
                    volume.id, epoch, 0, Head(1, bytes(24), 0, 1 << 30, epoch)
                )
            assert await service.renew_lease(lease) == 600
            await service.detach(volume.id, epoch)
            assert await service.lock_status(volume.id) == (None, epoch)

    try:
        run(test)
    finally:
        etcd.kill()


def test_an_etcd_that_asks_for_a_password_is_not_ours_to_use(etcd: EtcdServer) -> None:
    """Somebody switches its authentication on: that is no fault of what is asked.

    Found by review: it counted as one, and flushes of attached volumes failed, which wait for
    metadata that is away.
    """

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            store = service.store
            revision = (await store.txn([], [Put("a", b"1")])).revision
            await asyncio.to_thread(etcd.ask_for_password)
            for call in (
                store.txn([], [Put("a", b"")]),
                store.get("a"),
                store.range(""),
            ):
                with pytest.raises(Unauthenticated, match="user name"):
                    await call
            with pytest.raises(Again):
                await store.events("a", revision, 30)

    run(test)


def test_requests_to_a_dead_etcd_fail_at_once(etcd: EtcdServer) -> None:
    """Again, within the deadline, for every kind of call; and all is well after the restart."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            store = service.store
            lease = await service.grant_lease(600)
            await asyncio.to_thread(etcd.kill)
            for call in (
                store.txn([], [Put("a", b"")]),
                store.get("a"),
                store.range(""),
                store.lease_grant(10),
                store.lease_keepalive(lease),
                store.lease_revoke(lease),
                store.events("", 1, 30),
            ):
                started = time.monotonic()
                with pytest.raises(Again):
                    await call
                assert time.monotonic() - started < DEADLINE_S + 0.3
            await asyncio.to_thread(etcd.start)
            assert await patiently(store.get, "a", give_up_s=20, rng=random.Random(4)) is None
            assert (
                await patiently(store.lease_keepalive, lease, give_up_s=20, rng=random.Random(4))
                == 600
            )

    run(test)


def test_an_etcd_that_was_never_there_is_again() -> None:
    """Opening needs no etcd; the first call says Again, in a plain line that names the address."""

    async def test() -> None:
        async with service_at("127.0.0.1:1") as service:
            with pytest.raises(Again, match=r"etcd at 127\.0\.0\.1:1: .*nothing was changed"):
                await service.init(METADATA, b"")

    run(test)


def test_requests_to_a_stalled_etcd_end_with_the_deadline(etcd: EtcdServer) -> None:
    """An etcd that accepts and never answers: reads are Again, a sent change is OutcomeUnknown."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            store = service.store
            revision = (await store.txn([], [Put("a", b"1")])).revision
            compare = [Compare("a", mod_revision=revision)]
            etcd.pause()
            try:
                with pytest.raises(OutcomeUnknown):
                    await store.txn(compare, [Put("a", b"2")])
                # The connection is now in doubt: the next change is not sent before a probe came
                # back, and so it certainly did not happen.
                with pytest.raises(Again):
                    await store.txn(compare, [Put("a", b"3")])
                for call in (store.get("a"), store.events("a", revision, 30)):
                    with pytest.raises(Again):
                        await call
            finally:
                etcd.resume()

            async def settled() -> bool:
                found = await patiently(store.get, "a", give_up_s=20, rng=random.Random(5))
                return found is not None and found.value in (b"1", b"2")

            await until(settled)

    run(test)


def test_a_commit_cut_off_by_a_stall_finds_out_that_it_was_made(etcd: EtcdServer) -> None:
    """The answer is lost, the change is not: commit_head asks again and reports success."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            volume = await service.create_volume("demo", 1 << 30)
            epoch = await service.attach(volume.id, "vm1 pid 1", await service.grant_lease(600))
            head = Head(1, bytes(24), 0, 1 << 30, epoch)
            etcd.pause()
            committing = asyncio.ensure_future(service.commit_head(volume.id, epoch, 0, head))
            await asyncio.wait({committing}, timeout=DEADLINE_S * 2)
            assert not committing.done()
            etcd.resume()
            revision = await committing
            assert await service.head(volume.id) == (head, revision)

    run(test)


def test_another_member_is_used_when_one_fails(tmp_path: Path) -> None:
    """With several addresses a dead one costs nothing, and one that dies is left behind."""
    require_etcd()
    servers = [EtcdServer(tmp_path / name) for name in ("a", "b")]
    for server, name in zip(servers, ("a", "b"), strict=True):
        (tmp_path / name).mkdir()
        server.start()

    async def test() -> None:
        # They are no cluster, which shows which of them answers.
        endpoints = ["127.0.0.1:1", *(server.endpoint for server in servers)]
        async with service_at(*endpoints) as service:
            store = service.store
            await store.txn([], [Put("who", b"a")])
            async with service_at(servers[1].endpoint) as other:
                await other.store.txn([], [Put("who", b"b")])
            found = await store.get("who")
            assert found is not None and found.value == b"a"
            await asyncio.to_thread(servers[0].kill)

            async def moved() -> bool:
                there = await store.get("who")
                return there is not None and there.value == b"b"

            await patiently(moved, give_up_s=20, rng=random.Random(6))
            await until(moved)
            assert await store.lease_grant(10) > 0

    try:
        run(test)
    finally:
        for server in servers:
            server.kill()


def test_a_burst_is_sent_a_few_requests_at_a_time(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression, coreos/torus#294: many callers at once are held back, and overload no etcd."""
    under_way, peak = 0, 0
    answer = etcd_module._answer

    async def counted(call: object) -> object:
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        try:
            return await answer(call)
        finally:
            under_way -= 1

    monkeypatch.setattr(etcd_module, "_answer", counted)

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.init(METADATA, b"1")
            volumes = [await service.create_volume(f"v{n}", 1 << 30) for n in range(40)]
            lease = await service.grant_lease(600)
            rng = random.Random(7)

            async def writer(volume_id: int) -> None:
                attach = service.attach, volume_id, "vm1 pid 1", lease
                epoch = await patiently(*attach, give_up_s=20, rng=rng)
                revision = 0
                for _ in range(5):
                    mint = service.mint_inode, volume_id
                    inodes = await asyncio.gather(
                        *(patiently(*mint, give_up_s=20, rng=rng) for _ in range(10))
                    )
                    head = Head(max(inodes), bytes(24), 0, 1 << 30, epoch)
                    commit = service.commit_head, volume_id, epoch, revision, head
                    revision = await patiently(*commit, give_up_s=20, rng=rng)

            await asyncio.gather(*(writer(volume.id) for volume in volumes))
            counters = [await service.mint_inode(volume.id) for volume in volumes]
            # Every number was given out once; a lost answer may have left a gap.
            assert all(counter >= 51 for counter in counters)
            assert 1 < peak <= etcd_module.IN_FLIGHT_MAX

    run(test)


def test_renewals_do_not_wait_behind_other_requests(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases have their own connection and window: a full one for data does not cost the lease."""

    async def test() -> None:
        store = EtcdStore([etcd.endpoint], in_flight_max=1, deadline_s=20)
        lease = await store.lease_grant(60)
        blocked = asyncio.gather(*(store.range("") for _ in range(2000)), return_exceptions=True)
        await store.get("a")
        for _ in range(3):
            assert await store.lease_keepalive(lease) == 60
        assert not blocked.done()
        await store.close()
        results = await blocked
        assert any(isinstance(result, Closed) for result in results)

    run(test)


def test_watches_are_bounded_and_end_when_nobody_waits(etcd: EtcdServer) -> None:
    """More polls than the limit are Overloaded; cancelled ones make room."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            store = service.store
            revision = (await store.txn([], [Put("a", b"")])).revision
            polls = [
                asyncio.ensure_future(store.events("a", revision, 30))
                for _ in range(etcd_module.WATCHES_MAX)
            ]
            await store.get("a")
            with pytest.raises(Overloaded):
                await store.events("a", revision, 30)
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
            coming = asyncio.ensure_future(store.events("a", revision, 30))
            await store.txn([], [Put("a", b"2")])
            assert [event.value for event in (await coming)[0]] == [b"2"]

    run(test)


def test_what_etcd_itself_refuses_is_invalid(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If our limits ever let through what etcd does not take, that is Invalid and nothing worse."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            monkeypatch.setattr(etcd_module.kv, "REQUEST_BYTES_MAX", 1 << 30)
            with pytest.raises(Invalid):
                await service.store.txn([], [Put("a", bytes(2 << 20))])
            assert await service.store.get("a") is None

    run(test)


def test_a_watch_that_is_given_up_while_etcd_is_away_is_quiet(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No traceback for who stops a process in an outage."""

    async def test() -> None:
        async with service_at(etcd.endpoint) as service:
            await service.store.txn([], [Put("a", b"")])
            _, seen = await service.store.range("")
            await asyncio.to_thread(etcd.pause)
            poll = asyncio.ensure_future(service.store.events("a", seen, 30.0))
            await asyncio.sleep(0.2)
            poll.cancel()
            await asyncio.wait({poll})
            await asyncio.sleep(0.5)
            gc.collect()
            await asyncio.to_thread(etcd.resume)

    with caplog.at_level(logging.ERROR):
        run(test)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
