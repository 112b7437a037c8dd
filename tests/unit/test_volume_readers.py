"""Sessions that only read, opened while the volume changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes import Client, Cluster, Device, until, virtual
from tests.unit.test_snapshots import shrink
from tests.unit.test_volume_flush import journaling, reopened
from torus_actors.errors import BlockUnavailable, OutcomeUnknown, TorusError
from torus_actors.metadata.records import Reader
from torus_actors.nbd.requests import Hole
from torus_actors.volume import audit
from torus_actors.volume.opening import kept_head, open_session
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.session import Session

BLOCK = 16 << 10
SIZE = 32 * BLOCK


async def reader(cluster: Cluster, between: Callable[[], Awaitable[None]], times: int) -> Session:
    """Open ``v``; ``between`` happens after each of the first times that its head is read."""
    client = await cluster.client()
    assert client.system is not None
    meta, begin_reading = client.meta, client.meta.begin_reading

    async def slowly(*args: Any, nonce: str) -> tuple[Reader, int]:
        nonlocal times
        found = await begin_reading(*args, nonce=nonce)
        if times:
            times -= 1
            await between()
        return found

    meta.begin_reading = slowly  # type: ignore[method-assign]
    return await opened(client, read_only=True)


async def opened(client: Client, *, read_only: bool) -> Session:
    """A session of ``v`` that no actor drives: it serves and commits nothing by itself."""
    assert client.system is not None
    return await open_session(
        client.system,
        client.meta,
        "v",
        holder="reader",
        block_size=BLOCK,
        block_spec="crc,base",
        read_cache=ReadCache(1 << 20),
        write_cache_bytes=1 << 20,
        view=client.view,
        read_only=read_only,
    )


async def read(session: Session, offset: int, length: int) -> bytes:
    """Read without an NBD server."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    pieces = session.file.read_at(offset, length, lambda *answer: done.set_result(answer))
    if pieces is None:
        error, pieces = await done
        if error is not None:
            raise error
    return b"".join(bytes(len(p)) if isinstance(p, Hole) else bytes(p) for p in pieces)


@virtual
async def test_it_does_not_mix_a_head_with_the_journal_of_a_later_session() -> None:
    """That session begins its journal after the head was read, and before the record of it is."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.write(5 * BLOCK, b"flushed by the first")
        await device.flush()
        again = await reopened(device)

        async def between() -> None:
            for n in (7, 8):
                await again.write(n * BLOCK, b"second")
                await again.flush()
            assert again.client.session("v").journal.active

        session = await reader(cluster, between, 1)
        assert await read(session, 8 * BLOCK, 6) == b"second"
        assert await read(session, 5 * BLOCK, 7) == b"flushed"


@pytest.mark.parametrize("times", [1, 5, 10_000])
@virtual
async def test_it_can_be_opened_beside_commits(times: int) -> None:
    """Between the head and the journal's record the writer commits, once or again and again."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.write(5 * BLOCK, b"flushed")
        await device.flush()

        async def between() -> None:
            await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
            await device.write(6 * BLOCK, b"next")
            await device.flush()

        if times == 10_000:
            with pytest.raises(BlockUnavailable):
                await reader(cluster, between, times)
            return
        session = await reader(cluster, between, times)
        assert await read(session, 5 * BLOCK, 7) == b"flushed"
        assert await read(session, 6 * BLOCK, 4) == b"next"


@pytest.mark.parametrize("crashed", [True, False])
@virtual
async def test_it_can_be_opened_after_a_session_that_committed_nothing(crashed: bool) -> None:
    """The journal has promised itself to a writer that died, or is at work, before its first head.

    Nothing need change any more, so it must not wait for that.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.write(5 * BLOCK, b"flushed")
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(10.0)
        writer = await cluster.client()
        session = await opened(writer, read_only=False)
        if crashed:
            session.close()
            await writer.crash()
        reading = await cluster.client(read_only=True)
        found = await reading.open("v")
        assert await found.read(5 * BLOCK, 7) == b"flushed"
        session.close()


@virtual
async def test_it_has_the_size_that_goes_with_what_it_reads() -> None:
    """The volume becomes smaller after its record was read, and before its head is."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.release()
        tool, reading = await cluster.client(), await cluster.client(read_only=True)
        begin_reading = reading.meta.begin_reading

        async def slowly(*args: Any, nonce: str) -> tuple[Reader, int]:
            await shrink(tool, SIZE // 2)
            return await begin_reading(*args, nonce=nonce)

        reading.meta.begin_reading = slowly  # type: ignore[method-assign]
        assert (await reading.open("v")).size == SIZE // 2


async def only_reading(cluster: Cluster, name: str = "v") -> tuple[Client, Device]:
    """A client that has a volume open to read it, and keeps no block in memory."""
    client = await cluster.client(read_only=True, read_bytes=0)
    return client, await client.open(name)


async def collected(cluster: Cluster) -> None:
    """Let collectors make some passes."""
    for _ in range(4):
        await asyncio.sleep(30)


def stored(cluster: Cluster) -> int:
    """Blocks of data on all nodes."""
    return sum(len(node.refs()) for node in cluster.nodes.values())


async def replaced(device: Device) -> None:
    """Overwrite all of a volume, three times, with commits."""
    for content in (b"2", b"3", b"4"):
        for n in range(8):
            await device.write(n * BLOCK, content * BLOCK)
        await device.flush()
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)


@virtual
async def test_what_is_read_is_not_collected() -> None:
    """Neither what the head had, nor what only the journal named, however often both are replaced.

    When nobody reads it any more, it is.
    """
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await journaling(cluster, SIZE)
        for n in range(4):
            await device.write(n * BLOCK, b"1" * BLOCK)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        await device.flush()
        for n in range(4, 8):
            await device.write(n * BLOCK, b"1" * BLOCK)
        await device.flush()  # by a record that names blocks
        _, reading = await only_reading(cluster)
        await replaced(device)
        await collected(cluster)
        for n in range(8):
            assert await reading.read(n * BLOCK, BLOCK) == b"1" * BLOCK
        # What was put and replaced since is collected, from the next INode number on.
        assert stored(cluster) == 2 * (8 + 8 + 8)
        await reading.release()
        await collected(cluster)
        assert stored(cluster) == 2 * 8
        state = await cluster.meta.state()
        assert not state.readers


async def with_snapshot(cluster: Cluster) -> Device:
    """An open volume with eight blocks of ones, and the snapshot ``s`` of them."""
    device = await journaling(cluster, SIZE)
    for n in range(8):
        await device.write(n * BLOCK, b"1" * BLOCK)
    await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
    await cluster.meta.create_snapshot(1, "s")
    return device


@virtual
async def test_a_deleted_snapshot_stays_for_those_who_read_it() -> None:
    """And goes with them, also when they end without a word."""
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await with_snapshot(cluster)
        client, reading = await only_reading(cluster, "v@s")
        await cluster.meta.delete_snapshot(1, "s")
        await replaced(device)
        await collected(cluster)
        assert await reading.read(7 * BLOCK, BLOCK) == b"1" * BLOCK
        await client.crash()
        await collected(cluster)
        assert stored(cluster) == 2 * 8


@virtual
async def test_what_is_read_is_kept_under_a_new_lease_too() -> None:
    """The lease ran out, as when the metadata was away for long."""
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await journaling(cluster, SIZE)
        for n in range(8):
            await device.write(n * BLOCK, b"1" * BLOCK)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        client, reading = await only_reading(cluster)
        lease = (await client.actor("heartbeat").status.remote())["lease"]
        await cluster.meta.revoke_lease(lease)
        await asyncio.sleep(5)
        assert [each.holder for each in (await cluster.meta.state()).readers] == [""]
        await replaced(device)
        await collected(cluster)
        assert await reading.read(0, BLOCK) == b"1" * BLOCK


@pytest.mark.parametrize("lease_ends", [False, True])
@virtual
async def test_a_check_of_a_volume_in_use_misses_nothing(
    lease_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it asks for one block after the other, all of them are replaced and collected.

    Found by review: also when its lease ran out before that, and was replaced.
    """
    monkeypatch.setattr(audit, "BATCH", 1)
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await journaling(cluster, SIZE)
        for n in range(8):
            await device.write(n * BLOCK, b"1" * BLOCK)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        tool = await cluster.client()
        assert tool.system is not None
        count, seen = audit.Auditor.count, 0

        def counted(*args: Any) -> None:
            nonlocal seen
            seen += 1
            count(*args)

        monkeypatch.setattr(audit.Auditor, "count", counted)
        check = audit.Auditor.check

        async def slowly(auditor: Any, batch: Any) -> None:
            if seen == 1:
                if lease_ends:
                    lease = (await tool.actor("heartbeat").status.remote())["lease"]
                    await cluster.meta.revoke_lease(lease)
                    await asyncio.sleep(8.0)
                await replaced(device)
                await collected(cluster)
            await check(auditor, batch)

        monkeypatch.setattr(audit.Auditor, "check", slowly)
        found = await audit.audit_volume(tool.system, tool.meta, tool.view, "v")
        assert found.good and found.blocks > 8 and found.exact == found.blocks
        await collected(cluster)
        assert not (await cluster.meta.state()).readers


@virtual
async def test_a_new_lease_does_not_bring_back_the_record_of_a_reader_that_was_closed() -> None:
    """It was closed while the heartbeat hung its record on the new lease."""
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await journaling(cluster, SIZE)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        client, reading = await only_reading(cluster)
        keep_reading = client.meta.keep_reading

        async def late(reader: Reader, lease: int) -> None:
            await reading.release()
            await keep_reading(reader, lease)

        client.meta.keep_reading = late  # type: ignore[method-assign]
        lease = (await client.actor("heartbeat").status.remote())["lease"]
        await cluster.meta.revoke_lease(lease)
        await asyncio.sleep(20)
        assert not (await cluster.meta.state()).readers


@pytest.mark.parametrize("name", ["v", "v@s"])
@virtual
async def test_a_reader_that_could_not_be_opened_leaves_no_record(name: str) -> None:
    """Its record was made, and the metadata was gone before it could say so."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        await cluster.meta.create_snapshot(1, "s")
        client = await cluster.client(read_only=True)
        before, client.store.lose_answers = client.store.txns, 1
        opening = asyncio.ensure_future(client.open(name))
        await until(lambda: client.store.txns > before)
        client.store.down = True
        with pytest.raises(OutcomeUnknown):
            await opening
        assert (await cluster.meta.state()).readers
        client.store.down = False
        await asyncio.sleep(3)
        assert not (await cluster.meta.state()).readers


@pytest.mark.parametrize("name", ["v", "v@s"])
@virtual
async def test_who_dies_while_it_opens_a_volume_to_read_it_leaves_no_record(name: str) -> None:
    """The record is there, and the answer that says so is still under way."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        await cluster.meta.create_snapshot(1, "s")
        client = await cluster.client(read_only=True)
        assert client.system is not None
        system, put = client.system, client.meta._put

        async def slowly(*args: Any) -> bool:
            client.meta._put = put  # type: ignore[method-assign]
            done = await put(*args)
            system.cells["volumes"].kill()
            await asyncio.sleep(1)
            return done

        client.meta._put = slowly  # type: ignore[method-assign]
        with contextlib.suppress(TorusError):
            await (await client.open(name)).release()
        await asyncio.sleep(3)
        assert not (await cluster.meta.state()).readers


@virtual
async def test_a_reader_that_was_overtaken_stops_no_collector() -> None:
    """It was cut off from the metadata until what it reads was collected, and puts its record back.

    Found by review: no collector could read the tree, so none collected anything, for as long as
    that client lived.
    """
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await journaling(cluster, SIZE)
        for n in range(8):
            await device.write(n * BLOCK, b"1" * BLOCK)
        await device.client.actor("volume:v").commit.remote(timeout_s=30.0)
        client, _ = await only_reading(cluster)
        client.store.down = True
        await asyncio.sleep(20.0)
        await replaced(device)
        await collected(cluster)
        assert stored(cluster) == 2 * 8
        client.store.down = False
        await asyncio.sleep(10.0)
        assert len((await cluster.meta.state()).readers) == 1
        await replaced(device)
        await collected(cluster)
        assert stored(cluster) == 2 * 8
        for node in cluster.nodes.values():
            assert (await node.actor("collector").status.remote())["last_error"] == ""


@pytest.mark.parametrize("name", ["v", "v@s"])
@virtual
async def test_a_check_misses_nothing_of_a_snapshot_that_is_deleted_meanwhile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the snapshot led to is collected when the check has ended, and not before."""
    async with Cluster(nodes=3, replication=2, journals=True, collect_s=5.0) as cluster:
        device = await with_snapshot(cluster)
        await replaced(device)
        find_unsafe = audit.Auditor.find_unsafe

        async def slowly(auditor: audit.Auditor) -> None:
            await find_unsafe(auditor)
            await cluster.meta.delete_snapshot(1, "s")
            await collected(cluster)

        monkeypatch.setattr(audit.Auditor, "find_unsafe", slowly)
        tool = await cluster.client()
        assert tool.system is not None
        found = await audit.audit_volume(tool.system, tool.meta, tool.view, name)
        assert found.good and found.snapshots == 1
        await collected(cluster)
        assert stored(cluster) == 2 * 8
        assert not (await cluster.meta.state()).readers


@virtual
async def test_who_is_cut_off_while_it_keeps_a_head_leaves_no_record() -> None:
    """At any moment, from its beginning to its end."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = (await cluster.volume(SIZE)).client
        assert client.system is not None

        async def keep() -> None:
            async with kept_head(client.system, client.meta, 1, "tool"):
                pass

        for turns in itertools.count():
            keeping = asyncio.ensure_future(keep())
            for _ in range(turns):
                await asyncio.sleep(0)
            if keeping.done():
                break
            keeping.cancel()
            await asyncio.wait([keeping])
            await asyncio.sleep(5.0)
            assert not (await cluster.meta.state()).readers, turns
        assert turns > 5
