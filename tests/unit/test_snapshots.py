"""Snapshots: each is the volume in one moment, stays so, and can be gone back to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes import Client, Cluster, Device, DeviceError, until, virtual
from tests.unit.test_volume_flush import BLOCK, SIZE, reopened
from torus_actors.errors import Again, Exists, Locked, NotExist, TorusError
from torus_actors.metadata import kv
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.records import Snapshot
from torus_actors.nbd.protocol import Errno
from torus_actors.volume import keeper
from torus_actors.volume.resizing import shrink_volume
from torus_actors.volume.snapshots import restore_snapshot, take_snapshot


def pattern(seed: int, size: int = SIZE) -> bytes:
    """Content that no other seed has."""
    return b"".join(bytes([(seed * 31 + n) % 251 + 1]) * 256 for n in range(size // 256))


async def snapshot(cluster: Cluster, name: str, patience_s: float = 60.0) -> Snapshot | None:
    """Make a snapshot of volume ``v``, as a tool does."""
    return await take_snapshot(cluster.meta, 1, name, patience_s)


async def content(cluster: Cluster, name: str, size: int = SIZE) -> bytes:
    """What a client that has cached nothing reads of a volume or snapshot."""
    client = await cluster.client()
    device = await client.open(name)
    try:
        assert device.size == size
        return await device.read(0, size)
    finally:
        await device.release()
        await client.stop()


async def restore(client: Client, name: str, volume: str = "v") -> None:
    """Go back to a snapshot, as a tool does."""
    assert client.system is not None
    await restore_snapshot(
        client.system,
        client.meta,
        volume,
        name,
        holder="tool",
        block_size=BLOCK,
        block_spec="crc,base",
    )


async def shrink(client: Client, size: int, volume: str = "v") -> None:
    """Cut the end off, as a tool does."""
    assert client.system is not None
    await shrink_volume(client.system, client.meta, client.view, volume, size, holder="tool")


@virtual
async def test_of_a_volume_in_use_it_has_all_that_was_acknowledged() -> None:
    """Written and not flushed, in whole blocks and in part: it is there, and what follows is not.

    The volume goes on, and the snapshot stays what it is when all of the volume was overwritten.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        data = bytearray(pattern(1))
        await device.write(0, bytes(data[: 8 * BLOCK]))
        await device.flush()
        await device.write(8 * BLOCK, bytes(data[8 * BLOCK :]))
        await device.write(700, b"x" * 1000)
        data[700:1700] = b"x" * 1000
        made = await snapshot(cluster, "s")
        assert made is not None and made.size == SIZE
        await device.write(0, pattern(2))
        await device.flush()
        assert await content(cluster, "v@s") == data
        assert await device.read(0, SIZE) == pattern(2)
        await device.release()
        assert await content(cluster, "v@s") == data
        with pytest.raises(Exists):
            await snapshot(cluster, "s")


@virtual
async def test_of_a_closed_volume() -> None:
    """Also of one that was never written to, and of one that was resized since its last commit."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        assert await snapshot(cluster, "empty") is not None
        client = await cluster.client()
        device = await client.open("v")
        await device.write(0, pattern(3))
        await device.release()
        assert await snapshot(cluster, "full") is not None
        await cluster.meta.resize_volume("v", SIZE + BLOCK)
        assert await snapshot(cluster, "larger") is not None
        assert await content(cluster, "v@empty") == bytes(SIZE)
        assert await content(cluster, "v@full") == pattern(3)
        assert await content(cluster, "v@larger", SIZE + BLOCK) == pattern(3) + bytes(BLOCK)
        with pytest.raises(NotExist):
            await client.open("v@none")


@virtual
async def test_of_a_volume_that_was_not_closed_in_order() -> None:
    """Its client was killed after a flush: nobody misses what is in the journal.

    Without opening the volume nothing is made; whoever opens it replays, and can.
    """
    async with Cluster(journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(4))
        await device.flush()
        await device.write(100, b"late")
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(30)
        assert await snapshot(cluster, "s") is None
        assert not await cluster.meta.snapshots(1)
        client = await cluster.client()
        await client.open("v")
        assert await snapshot(cluster, "s") is not None
        expected = bytearray(pattern(4))
        expected[100:104] = b"late"
        assert await content(cluster, "v@s") == expected


@virtual
async def test_it_can_only_be_read() -> None:
    """Writes to a snapshot are refused."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        await snapshot(cluster, "s")
        client = await cluster.client()
        device = await client.open("v@s")
        for wrong in (device.write(0, b"x" * 512), device.trim(0, BLOCK)):
            with pytest.raises(DeviceError):
                await wrong
        assert await device.read(0, SIZE) == bytes(SIZE)


@virtual
async def test_a_holder_that_does_not_answer() -> None:
    """Who has the volume cannot reach the metadata: the error names it, and no snapshot appears."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        client = await cluster.client(lease_ttl_s=600)
        device = await client.open("v")
        await device.write(0, pattern(5))
        client.store.down = True
        with pytest.raises(Again, match="did not answer in time"):
            await snapshot(cluster, "s", 5.0)
        client.store.down = False
        await device.flush()
        await asyncio.sleep(60)
        assert not await cluster.meta.snapshots(1)
        assert await snapshot(cluster, "s") is not None


@virtual
async def test_a_request_whose_lease_is_lost() -> None:
    """All leases end while a session is asked: nothing is made, and the tool says so; try again.

    Found by the simulator, where the tool ended with the error of the lease.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        device.client.store.down = True
        asking = asyncio.ensure_future(snapshot(cluster, "s"))
        await asyncio.sleep(1.0)
        lease = (await cluster.store.range(cluster.meta.keys.prefix + "snapshot-req"))[0][0].lease
        await cluster.meta.revoke_lease(lease)
        with pytest.raises(Again, match="not made"):
            await asking
        device.client.store.down = False
        assert not await cluster.meta.snapshots(1)
        await asyncio.sleep(30)
        assert await snapshot(cluster, "s") is not None


@virtual
async def test_a_tool_that_was_killed_leaves_nothing() -> None:
    """Its request ends with its lease, whether a session sees it before that or not."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        device.client.store.down = True
        asking = asyncio.ensure_future(snapshot(cluster, "s"))
        await asyncio.sleep(1.0)
        lease = (await cluster.store.range(cluster.meta.keys.prefix + "snapshot-req"))[0][0].lease
        assert lease
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(30)
        device.client.store.down = False
        await asyncio.sleep(30)
        assert not (await cluster.meta.state()).snapshots


@pytest.mark.parametrize("victim", ["volume:v", "volumes"])
@virtual
async def test_it_is_made_though_actors_die_on_the_way(victim: str) -> None:
    """Whoever is answering dies again and again: in the end there is one snapshot, and it is right.

    No write is left waiting.
    """
    async with Cluster(blocks=2000, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for n in range(12):
            await device.write(0, pattern(n))
            asking = asyncio.ensure_future(snapshot(cluster, f"s{n}"))
            for _ in range(3):
                await asyncio.sleep(0.02 * (n % 4))
                device.client.kill(victim)
            await asking
            await device.write(0, pattern(n + 100))
            await device.flush()
        assert len(await cluster.meta.snapshots(1)) == 12
        for n in range(12):
            assert await content(cluster, f"v@s{n}") == pattern(n)


@virtual
async def test_writes_wait_only_so_long() -> None:
    """The cluster takes no block: the snapshot is refused, and writes go on after the limit."""
    async with Cluster(nodes=2) as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 * SIZE)
        await device.write(0, pattern(1))
        await device.flush()
        commit = device.client.session("v").keeper._commit

        async def slow() -> None:
            # Writes come in before they are held, and then the nodes take very long.
            if device.client.session("v").file.held:
                await asyncio.sleep(5.0)
                await commit()
            else:
                await commit()
                await asyncio.sleep(0.2)

        device.client.session("v").keeper._commit = slow
        asking = asyncio.ensure_future(snapshot(cluster, "s"))
        loop = asyncio.get_running_loop()
        longest = 0.0
        n = 0
        while not asking.done():
            began = loop.time()
            await device.write(n % 16 * BLOCK, pattern(n, BLOCK))
            longest = max(longest, loop.time() - began)
            n += 1
            await asyncio.sleep(0.05)
        with pytest.raises(Again, match="less busy"):
            await asking
        assert keeper.HOLD_S_MAX * 0.5 < longest < keeper.HOLD_S_MAX * 1.5
        assert not await cluster.meta.snapshots(1)


@virtual
async def test_a_write_is_never_in_it_without_one_flushed_before() -> None:
    """A client writes in part, flushes, writes a whole block, again and again, as a journal does.

    Whatever moment a snapshot catches: the second of a pair is never there without the first.
    """
    async with Cluster(blocks=2000, journals=True) as cluster:
        device = await cluster.volume(SIZE, write_bytes=SIZE)
        stop = False

        async def pairs() -> int:
            n = 0
            while not stop:
                n += 1
                await device.write(0, n.to_bytes(8, "little") * 64)
                await device.flush()
                await device.write(4 * BLOCK, n.to_bytes(8, "little") * (BLOCK // 8))
                await asyncio.sleep(0.001 * (n % 7))
            return n

        async def noise() -> None:
            n = 0
            while not stop:
                n += 1
                await device.write((5 + n % 11) * BLOCK + 512, bytes([n % 256]) * 512)
                await asyncio.sleep(0.0002)

        writing = asyncio.ensure_future(pairs())
        beside = asyncio.ensure_future(noise())
        for n in range(15):
            await asyncio.sleep(0.05 + 0.003 * n)
            await snapshot(cluster, f"s{n}")
        stop = True
        assert await writing > 50
        await beside
        found = []
        for n in range(15):
            data = await content(cluster, f"v@s{n}")
            first = int.from_bytes(data[:8], "little")
            second = int.from_bytes(data[4 * BLOCK : 4 * BLOCK + 8], "little")
            assert first - 1 <= second <= first
            found.append(first)
        assert found == sorted(found) and found[-1] > found[0]


@virtual
async def test_going_back() -> None:
    """The volume is again what it was, with its size; the snapshot stays; and a second time too."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await snapshot(cluster, "one")
        await device.write(0, pattern(2))
        client = await cluster.client()
        with pytest.raises(Locked):
            await restore(client, "one")
        await device.release()
        await cluster.meta.resize_volume("v", 2 * SIZE)
        epoch = (await cluster.meta.lock_status(1))[1]
        await snapshot(cluster, "two")
        await restore(client, "one")
        lock, newest = await cluster.meta.lock_status(1)
        assert lock is None and newest > epoch
        assert await content(cluster, "v") == pattern(1)
        device = await client.open("v")
        await device.write(0, pattern(3))
        await device.release()
        assert await content(cluster, "v@one") == pattern(1)
        await restore(client, "two")
        assert await content(cluster, "v", 2 * SIZE) == pattern(2) + bytes(SIZE)
        await restore(client, "one")
        assert await content(cluster, "v") == pattern(1)
        with pytest.raises(NotExist):
            await restore(client, "three")
        assert (await cluster.meta.lock_status(1))[0] is None


@virtual
async def test_going_back_to_nothing() -> None:
    """The snapshot is of a volume that was never written to: all of it is zeros again."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        await snapshot(cluster, "empty")
        client = await cluster.client()
        device = await client.open("v")
        await device.write(0, pattern(1))
        await device.flush()
        await device.release()
        await restore(client, "empty")
        assert await content(cluster, "v") == bytes(SIZE)


@virtual
async def test_going_back_fences_who_was_there() -> None:
    """A client whose lease ended has the volume still open: it gets nothing acknowledged any more.

    What it had flushed, and the journal still holds, does not come back.
    """
    async with Cluster(journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await snapshot(cluster, "s")
        await device.write(100, b"in the journal")
        await device.flush()
        device.client.store.down = True
        await asyncio.sleep(30)
        await device.write(200, b"still flushed")
        await device.flush()
        await restore(await cluster.client(), "s")
        await device.write(300, b"too late")
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.ESHUTDOWN
        assert await content(cluster, "v") == pattern(1)


class DyingStore(FaultyStore):
    """A way to the metadata that is cut for good after some calls; the last may get through."""

    def __init__(self, inner: kv.KeyValueStore, calls: int, last_arrives: bool) -> None:
        super().__init__(inner)
        self.left = calls
        self._last_arrives = last_arrives

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.down = True

    async def get(self, key: str) -> kv.KeyValue | None:
        """See KeyValueStore."""
        self._count()
        return await super().get(key)

    async def txn(self, compare: Any, then: Any) -> kv.TxnResult:
        """See KeyValueStore."""
        self._count()
        if self.left == 0 and self._last_arrives:
            await self.inner.txn(compare, then)
            self.down = True
        return await super().txn(compare, then)


async def crashes_at_each_step(
    prepare: Callable[[Cluster], Awaitable[Device | None]],
    act: Callable[[Cluster, Client], Awaitable[None]],
    judge: Callable[[Cluster, bool], Awaitable[None]],
) -> int:
    """Cut a tool off at every one of its metadata calls, before or after it had its effect."""
    steps = 0
    for last_arrives in (False, True):
        for calls in range(60):
            async with Cluster(journals=True) as cluster:
                device = await prepare(cluster)
                client = await cluster.client()
                dying = DyingStore(cluster.store, calls, last_arrives)
                client.meta.store = dying
                try:
                    await act(cluster, client)
                    whole = True
                except (TorusError, TimeoutError):
                    whole = False
                finished = whole and not dying.down
                await client.crash()
                if device is not None:
                    await device.client.crash()
                await asyncio.sleep(30)
                await judge(cluster, whole)
            steps += 1
            if finished:
                break
        else:
            raise AssertionError("it does not come to an end")
    return steps


@pytest.mark.long
@virtual
async def test_a_crash_while_going_back_leaves_the_old_or_the_new() -> None:
    """The tool dies between any two of its steps: the volume is wholly one of the two."""

    async def prepare(cluster: Cluster) -> Device | None:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await snapshot(cluster, "s")
        await device.write(0, pattern(2))
        await device.flush()
        assert device.client.session("v").journal.active
        await device.write(100, b"in the journal")
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(30)
        return None

    async def act(cluster: Cluster, client: Client) -> None:
        await restore(client, "s")

    newer = bytearray(pattern(2))
    newer[100:114] = b"in the journal"

    async def judge(cluster: Cluster, whole: bool) -> None:
        found = await content(cluster, "v")
        assert found in (pattern(1), newer)
        assert not whole or found == pattern(1)

    assert await crashes_at_each_step(prepare, act, judge) > 10


@pytest.mark.long
@virtual
async def test_a_crash_while_making_one_leaves_it_or_nothing() -> None:
    """The tool dies between any two of its steps: the snapshot is right, or is not there."""

    async def prepare(cluster: Cluster) -> Device | None:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        return device

    async def act(cluster: Cluster, client: Client) -> None:
        await take_snapshot(client.meta, 1, "s", 5.0)

    async def judge(cluster: Cluster, whole: bool) -> None:
        found = await cluster.meta.snapshots(1)
        assert found or not whole
        if found:
            assert await content(cluster, "v@s") == pattern(1)
        assert not (await cluster.store.range(cluster.meta.keys.prefix + "snapshot-req"))[0]

    assert await crashes_at_each_step(prepare, act, judge) > 5


@virtual
async def test_the_collector_keeps_what_a_snapshot_needs_and_no_longer() -> None:
    """Overwritten blocks live as long as the snapshot that has them; then their room is free."""
    async with Cluster(nodes=2, collect_s=2.0) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await snapshot(cluster, "s")
        for n in range(4):
            await device.write(0, pattern(n + 2))
            await device.flush()
            await device.client.actor("volume:v").commit.remote()
        await asyncio.sleep(60)
        # Of each block the present one, and that of the snapshot.
        assert len(cluster.node(0).refs()) == 32
        assert await content(cluster, "v@s") == pattern(1)
        await cluster.meta.delete_snapshot(1, "s")
        await asyncio.sleep(60)
        assert len(cluster.node(0).refs()) == 16
        again = await reopened(device)
        assert await again.read(0, SIZE) == pattern(5)


@virtual
async def test_a_snapshot_is_a_checkpoint() -> None:
    """What the journal holds is folded into blocks for it, and the members may forget it."""
    async with Cluster(journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for n in range(3):
            await device.write(n * 512, bytes([n + 1]) * 512)
            await device.flush()
        session = device.client.session("v")
        assert session.journal.active and session.journal.size > 0
        commits = session.heads.recorded
        await snapshot(cluster, "s")
        assert session.journal.active and session.journal.size == 0
        assert session.heads.recorded > commits
        # Nothing has changed since: the head is kept as it is.
        commits = session.heads.recorded
        await snapshot(cluster, "t")
        assert session.heads.recorded == commits


@virtual
async def test_a_request_is_answered_when_the_metadata_is_back() -> None:
    """It went away as the snapshot was taken: its head is in the journal, and then stored."""
    async with Cluster(journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for _ in range(2):
            await device.write(0, b"first")
            await device.flush()
        session, store = device.client.session("v"), device.client.store
        await until(lambda: session.journal.active)
        await device.write(0, b"second")
        take = session.keeper.take
        taken = 0

        async def away() -> None:
            nonlocal taken
            taken += 1
            if taken == 1:
                store.down = True
                asyncio.get_running_loop().call_later(4, setattr, store, "down", False)
            await take()

        session.keeper.take = away  # type: ignore[method-assign]
        asked = asyncio.ensure_future(snapshot(cluster, "s"))
        await asyncio.sleep(1)
        # Somebody waits for a commit, so that the journal keeps the head.
        await device.client.actor("volume:v").commit.remote()
        assert not asked.done() and session.heads.owed is not None
        await device.write(0, b"third ")
        assert await asked is not None
        assert taken == 2
        assert (await content(cluster, "v@s"))[:6] in (b"second", b"third ")
