"""Flush tells the truth: what it covers is durable, in the order that makes it so."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from tests.fakes import Cluster, Device, DeviceError, until, virtual
from torus_actors.errors import Locked
from torus_actors.nbd.protocol import Errno
from torus_actors.storage.mfile_open import INDEX_PATH
from torus_actors.volume.commit import PATIENCE_S

BLOCK = 16 << 10
SIZE = 16 * BLOCK


async def put_only(device: Device, content: bytes) -> None:
    """Write whole blocks and wait until they are on the ring, not flushed."""
    await device.write(0, content)
    file = device.client.session("v").file
    await until(lambda: not file.layers.size and file.unsynced)


async def reopened(device: Device) -> Device:
    """The volume, on another client after this one is lost."""
    await device.client.crash()
    client = await device.client.cluster.client()
    async with asyncio.timeout(60):
        while True:
            try:
                return await client.open("v")
            except Locked:
                await asyncio.sleep(0.5)


async def journaling(cluster: Cluster, size: int) -> Device:
    """A volume ``v`` that begins with ``first``, and has its journal."""
    device = await cluster.volume(size)
    for _ in range(2):
        await device.write(0, b"first")
        await device.flush()
    assert device.client.session("v").journal.active
    return device


@pytest.mark.parametrize("kind", [0, 1])
@virtual
async def test_a_disk_that_refuses_what_flushes_write_fails_none(kind: int) -> None:
    """Blocks and pages go to other nodes. It was asked again and again, until each flush failed."""
    async with Cluster(nodes=3, replication=2, journals=True, inode_copies=2) as cluster:
        device = await cluster.volume(SIZE, write_bytes=8 << 20)
        cluster.node(0).disks[kind].inject("write", errno.EIO, path=INDEX_PATH, times=1 << 30)
        loop = asyncio.get_running_loop()
        for number in range(1, 4):
            began = loop.time()
            await device.write(0, bytes([number]) * SIZE)
            await device.flush()
            await device.client.actor("volume:v").commit.remote()
            assert loop.time() - began < 5.0
        assert cluster.node(0).opened.refusal  # type: ignore[union-attr]
        await device.client.stop()
        again = await (await cluster.client()).open("v")
        assert await again.read(0, SIZE) == b"\3" * SIZE


@virtual
async def test_a_block_lost_by_a_restarted_node_is_placed_again_before_flush_returns() -> None:
    """A node restarts between put and flush: the flush succeeds, and then both copies exist."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        content = bytes(range(256)) * (2 * BLOCK // 256)
        await put_only(device, content)
        before = cluster.node(0).refs()
        assert len(before) == 2
        await cluster.node(0).restart()
        assert not cluster.node(0).refs()
        await device.flush()
        assert cluster.node(0).refs() == before
        await cluster.node(0).restart()
        await cluster.node(1).crash()
        again = await reopened(device)
        assert await again.read(0, len(content)) == content


@virtual
async def test_flush_fails_when_all_replicas_are_lost_and_nobody_has_the_data() -> None:
    """Both copies were lost before the flush, and the client does not have the block any more.

    The flush fails, each time; and works again once the block was overwritten.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        session = device.client.session("v")
        session.file.kept_max = 0
        heads = session.heads.recorded
        await put_only(device, b"x" * BLOCK)
        await cluster.node(0).restart()
        await cluster.node(1).restart()
        for _ in range(2):
            with pytest.raises(DeviceError) as failed:
                await device.flush()
            assert failed.value.errno == Errno.EIO
        assert session.heads.recorded == heads
        await device.write(0, b"y" * BLOCK)
        await device.flush()
        assert await (await reopened(device)).read(0, BLOCK) == b"y" * BLOCK


@virtual
async def test_what_was_stored_at_once_gives_no_time_to_what_cannot_be() -> None:
    """Of a block that all nodes lost a part is written anew; others beside it are stored at once.

    Found by seed 53 of many_crashes: a flush took 129 s to fail.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        file = device.client.session("v").file
        kept_max, file.kept_max = file.kept_max, 0
        await put_only(device, b"x" * BLOCK)
        file.kept_max = kept_max
        for node in range(2):
            await cluster.node(node).restart()
        await device.write(0, b"part")
        for n in range(1, 4):
            await device.write(n * BLOCK, b"part")
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeviceError):
            await device.flush()
        assert asyncio.get_running_loop().time() - began < PATIENCE_S + 10.0


@virtual
async def test_what_was_trimmed_needs_not_last() -> None:
    """All nodes lost it before the flush, nobody has it, and a trim of the range came after."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(80 * BLOCK, read_bytes=0, write_bytes=100 * BLOCK)
        session = device.client.session("v")
        session.file.kept_max = 0
        await put_only(device, b"x" * 80 * BLOCK)
        for node in range(2):
            await cluster.node(node).restart()
        await device.trim(0, 75 * BLOCK)
        await device.write(75 * BLOCK, b"y" * 5 * BLOCK)
        await device.flush()
        again = await reopened(device)
        assert await again.read(0, 80 * BLOCK) == bytes(75 * BLOCK) + b"y" * 5 * BLOCK


@virtual
async def test_what_is_trimmed_before_any_head_names_it_leaves_its_room_at_once() -> None:
    """As what is overwritten: no collector is needed for it."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(80 * BLOCK)
        await put_only(device, b"x" * 80 * BLOCK)
        await device.trim(0, 75 * BLOCK)
        await asyncio.sleep(1.0)
        assert [len(cluster.node(n).refs()) for n in range(2)] == [5, 5]
        await device.flush()
        assert await device.read(0, 80 * BLOCK) == bytes(75 * BLOCK) + b"x" * 5 * BLOCK


@virtual
async def test_what_all_nodes_lost_before_a_flush_is_still_in_the_client() -> None:
    """The first blocks since the last flush are kept until they are durable, up to a bound."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        file = device.client.session("v").file
        content = bytes(range(1, 9)) * BLOCK
        await put_only(device, content)
        kept = [each.kept for each in file.unsynced.values()]
        assert len(kept) == len(content) // BLOCK and None not in kept
        for node in range(2):
            await cluster.node(node).restart()
        assert await device.read(0, len(content)) == content
        await device.flush()
        assert not file.unsynced
        assert await (await reopened(device)).read(0, len(content)) == content


@virtual
async def test_no_more_blocks_are_kept_than_the_bound_says() -> None:
    """The later ones are on the nodes only; a commit has some durable before it puts others."""
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        file = device.client.session("v").file
        file.kept_max = 3
        content = bytes(range(1, 9)) * BLOCK
        await put_only(device, content)
        assert sum(each.kept is not None for each in file.unsynced.values()) == 3
        await device.flush()
        assert await (await reopened(device)).read(0, len(content)) == content


@virtual
async def test_a_lost_block_is_placed_again_from_the_read_cache() -> None:
    """The only copy is lost before the flush, but the client still has the data.

    Nothing is lost.
    """
    async with Cluster(nodes=1, replication=1) as cluster:
        device = await cluster.volume(SIZE, read_bytes=1 << 20)
        await put_only(device, b"x" * BLOCK)
        await cluster.node(0).restart()
        await device.flush()
        assert await (await reopened(device)).read(0, BLOCK) == b"x" * BLOCK


@virtual
async def test_a_trimmed_block_that_was_lost_fails_no_flush() -> None:
    """A block is lost with its node, and trimmed, alone or with many others at once.

    No flush has to fail because of it.
    """
    async with Cluster(nodes=1, replication=1) as cluster:
        device = await cluster.volume(200 * BLOCK, read_bytes=0)
        await put_only(device, b"x" * BLOCK)
        await cluster.node(0).restart()
        await device.trim(0, 200 * BLOCK)
        await device.flush()
        await put_only(device, b"x" * BLOCK)
        await cluster.node(0).restart()
        await device.trim(0, BLOCK)
        await device.write(BLOCK, b"z")
        await device.flush()
        assert await device.read(0, BLOCK + 1) == bytes(BLOCK) + b"z"


@virtual
async def test_a_head_is_recorded_only_after_all_its_blocks_are_durable() -> None:
    """In the order of calls.

    Every put, then the flush of every peer that took one, then the head.
    """
    async with Cluster(nodes=3, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        session = device.client.session("v")
        order: list[tuple[str, str]] = []
        cluster.network.trace = lambda _, target, __, method: order.append((method, target))
        commit_head = session._meta.commit_head
        durable: list[set[Any]] = []

        async def recorded(*args: Any, **options: Any) -> int:
            order.append(("head", ""))
            for node in cluster.nodes.values():
                assert not any(store.stats().pending for store in node.stores)
            durable.append({ref for node in cluster.nodes.values() for ref in node.refs()})
            return await commit_head(*args, **options)

        session._meta.commit_head = recorded  # type: ignore[method-assign]
        for round_ in range(3):
            order.clear()
            await device.write(round_ * 1000, b"x" * 3 * BLOCK)
            await device.flush()
            methods = [method for method, _ in order]
            last_put = len(methods) - 1 - methods[::-1].index("put_block")
            first_flush = methods.index("flush", last_put)
            assert last_put < first_flush < methods.index("head")
            took = {target for method, target in order if method == "put_block"}
            flushed = {target for method, target in order[last_put:] if method == "flush"}
            assert took <= flushed
        assert len(durable) == 3


@virtual
async def test_flush_waits_for_the_metadata() -> None:
    """While the metadata is away a flush does not answer; it succeeds when it is back."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x" * 100)
        device.client.store.down = True
        flush = asyncio.ensure_future(device.flush())
        await asyncio.sleep(30.0)
        assert not flush.done()
        assert await device.read(0, 100) == b"x" * 100
        device.client.store.down = False
        await flush
        assert await (await reopened(device)).read(0, 100) == b"x" * 100


@pytest.mark.parametrize("fault", ["lose_answers", "lose_requests"])
@virtual
async def test_a_head_whose_answer_was_lost_is_recorded_once(fault: str) -> None:
    """The metadata loses the request or the answer of a commit: the flush succeeds all the same."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        for content in (b"a", b"b"):
            await device.write(0, content)
            setattr(device.client.store, fault, 1)
            await device.flush()
        assert await (await reopened(device)).read(0, 1) == b"b"


@virtual
async def test_the_volume_actor_dies_as_its_head_is_recorded() -> None:
    """The head was recorded, but the actor that recorded it is dead.

    Its successor's flush goes on from there and succeeds.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"1")
        session = device.client.session("v")
        commit_head = session._meta.commit_head
        died = asyncio.Event()

        async def recorded(*args: Any, **options: Any) -> int:
            revision = await commit_head(*args, **options)
            if not died.is_set():
                died.set()
                device.client.kill("volume:v")
                await asyncio.sleep(60.0)
            return revision

        session._meta.commit_head = recorded  # type: ignore[method-assign]
        await device.flush()
        assert died.is_set()
        await device.write(1, b"2")
        await device.flush()
        assert await (await reopened(device)).read(0, 2) == b"12"


@virtual
async def test_a_fenced_session_reads_and_writes_no_more() -> None:
    """Regression, coreos/torus#230, 261, 317: a client writes on under a lost lease.

    Here, when another session has begun, writes and flushes fail with ESHUTDOWN, reads still work,
    what waits for room is answered too, and the other session's data is untouched.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=2 * BLOCK)
        await device.write(0, b"mine")
        await device.flush()
        device.client.store.down = True
        client = await cluster.client()
        await asyncio.sleep(10.0)
        other = await client.open("v")
        await other.write(0, b"THEY")
        await other.flush()
        await device.write(100, b"late")
        device.client.store.down = False
        for operation in (device.flush, lambda: device.write(0, b"x"), device.flush):
            with pytest.raises(DeviceError) as failed:
                await operation()
            assert failed.value.errno == Errno.ESHUTDOWN
        assert await device.read(0, 4) == b"mine"
        with pytest.raises(DeviceError):
            await device.trim(0, SIZE)
        assert not device.in_flight
        assert await other.read(0, 4) == b"THEY"


@virtual
async def test_flushes_that_come_together_share_a_commit() -> None:
    """Twenty flushes at once cost two or three commits, and all are answered."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)

        async def write_and_flush(at: int) -> None:
            await device.write(at, b"x")
            await device.flush()

        await asyncio.gather(*[write_and_flush(100 * n) for n in range(20)])
        assert device.client.session("v").heads.recorded <= 3


@virtual
async def test_fua_is_durable_when_it_is_answered() -> None:
    """A write with FUA survives the loss of the client at once."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(5, b"durable", fua=True)
        assert await (await reopened(device)).read(5, 7) == b"durable"


@virtual
async def test_torus_120_the_commit_of_a_huge_thin_volume_stays_small() -> None:
    """Regression, coreos/torus#120: an INode did not fit a request to etcd.

    Here a volume of 1 PiB costs its metadata some hundred bytes, and one write a few pages on the
    ring, whatever was written before.
    """
    async with Cluster(nodes=1, replication=1) as cluster:
        device = await cluster.volume(1 << 50)
        costs = []
        for offset in (0, 1 << 40, 1 << 45, (1 << 50) - 1):
            await device.write(offset, b"x")
            before = sum(len(ref) > 0 for ref in cluster.node(0).refs(1))
            await device.flush()
            costs.append(len(cluster.node(0).refs(1)) - before)
            head, _ = await cluster.meta.head(device.client.session("v").volume_id)
            assert head is not None and len(head.encode()) < 600
        assert max(costs) <= 4
        assert await device.read(1 << 40, 2) == b"x\0"


@virtual
async def test_what_was_closed_answers_nobody_late() -> None:
    """A flush that is under way while the volume is closed is answered."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x")
        flush = asyncio.ensure_future(device.flush())
        await asyncio.sleep(0)
        await device.release()
        await flush
        assert not device.in_flight


@virtual
async def test_a_lock_is_given_up_though_the_metadata_was_away() -> None:
    """Closing while the metadata is away leaves no lock behind that the lease keeps for ever."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        device.client.store.down = True
        await device.release()
        device.client.store.down = False
        await asyncio.sleep(3.0)
        again = await device.client.open("v")
        assert await again.read(0, 1) == b"\0"


@virtual
async def test_an_opener_that_dies_leaves_no_lock_behind() -> None:
    """The volumes actor is killed while it attaches: the volume can be opened again at once."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        client = await cluster.client()
        attach = client.meta.attach

        async def slow(*args: Any) -> int:
            await asyncio.sleep(0.1)
            epoch = await attach(*args)
            await asyncio.sleep(0.1)
            return epoch

        client.meta.attach = slow  # type: ignore[method-assign]
        opening = client.actor("volumes").open.remote("v")
        await asyncio.sleep(0.05)
        client.kill("volumes")
        with pytest.raises(Exception, match="died"):
            await opening
        await asyncio.sleep(1.0)
        device = await client.open("v")
        await device.write(0, b"x", fua=True)


@virtual
async def test_a_client_that_stops_as_its_volume_actor_dies_still_flushes() -> None:
    """The volume actor is killed, and at once the client is stopped: nothing is lost, or waits."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"last words")
        started = asyncio.get_running_loop().time()
        device.client.kill("volume:v")
        await device.client.stop()
        assert asyncio.get_running_loop().time() - started < 10
        device = await (await cluster.client()).open("v")
        assert await device.read(0, 10) == b"last words"
