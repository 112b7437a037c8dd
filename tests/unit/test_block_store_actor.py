"""The block store actor: slots, pins and flushes end in order, whoever dies on the way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import random
import shutil
import threading
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest

from tests.fakes import Cluster, StorageNode, until, virtual
from tests.unit.runtime_harness import on_uvloop, system_of
from torus_actors.actors import block_store
from torus_actors.actors.block_messages import (
    CHECK_STATUS,
    RANGE,
    RANGE_STATUS,
    Status,
    split_records,
)
from torus_actors.actors.block_store import (
    DATA,
    INODES,
    STORE_NAMES,
    VOUCH_S,
    BlockStoreActor,
    OpenStores,
    StoreConfig,
)
from torus_actors.actors.disk import READERS, disk_workers
from torus_actors.cli.node import store_size
from torus_actors.errors import Again, Closed, Corruption, Exists, Invalid, OutOfSpace, TorusError
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.runtime import BlockingActor, ChildSpec
from torus_actors.storage.disk import Disk
from torus_actors.storage.index import ENTRIES_OFFSET
from torus_actors.storage.mfile import MFileStore
from torus_actors.storage.mfile_open import DATA_PATH, INDEX_PATH
from torus_actors.storage.simdisk import SimDisk
from torus_actors.storage.store import BLOCK_SIZE_MAX, BlockStore
from torus_actors.wire.frames import Kind, encode
from torus_actors.wire.messages import encode_call, encode_reply

BLOCK = 16 << 10


def ref_of(index: int, kind: BlockType = BlockType.DATA) -> BlockRef:
    """A block's name."""
    return BlockRef.of(1, 1, index, kind)


def put(
    node: StorageNode, ref: BlockRef, data: bytes, replace: bool = False, timeout_s: float = 30.0
) -> Any:
    """Start a put; its answer is awaited."""
    sums = sums_of(data)
    return node.actor("block_store").put_block.remote(
        ref, root_of(sums), sums, replace, payload=memoryview(data), timeout_s=timeout_s
    )


async def check(
    node: StorageNode, *refs: BlockRef, deep: bool = False, durable: bool = False
) -> Any:
    """Status and root of blocks."""
    answer = await node.actor("block_store").check_blocks.remote(
        b"".join(refs), deep, durable, node.view.ring.version
    )
    return split_records(CHECK_STATUS, answer)


async def read(node: StorageNode, *ranges: tuple[BlockRef, int, int]) -> list[tuple[int, bytes]]:
    """Status and bytes of ranges."""
    answer = await node.actor("block_store").read_ranges.remote(
        b"".join(RANGE.pack(*each) for each in ranges)
    )
    payload, at, found = b"".join(answer.payload), 0, []
    for status, sums, size in split_records(RANGE_STATUS, answer.result):
        found.append((status, payload[at + sums : at + sums + size]))
        at += sums + size
    return found


@virtual
async def test_put_read_check_flush_delete() -> None:
    """The life of a block and of an INode page, each in its own store."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        block, page = ref_of(1), ref_of(2, BlockType.INODE)
        incarnation = await put(node, block, b"b" * BLOCK)
        assert await put(node, page, b"page") == incarnation
        assert node.refs(0) == {block} and node.refs(1) == {page}
        found = await read(node, (block, 4096, 4096), (page, 0, 32768), (ref_of(3), 0, 4096))
        assert found == [
            (Status.OK, b"b" * 4096),
            (Status.OK, b"page"),
            (Status.MISSING, b""),
        ]
        assert [s for s, _ in await check(node, block, ref_of(9), deep=True)] == [
            Status.OK,
            Status.MISSING,
        ]
        assert await node.actor("block_store").flush.remote() == incarnation
        assert await node.actor("block_store").delete_blocks.remote(block + page) == 2
        assert not node.refs(0) and not node.refs(1)


@virtual
async def test_a_block_that_is_stored_as_its_node_leaves_the_ring_does_not_count() -> None:
    """The rebalancer's pass may have been over before it was in the index."""
    async with Cluster(nodes=2) as cluster:
        node, ref = cluster.node(0), ref_of(1)
        ring, data = node.view.ring, b"x" * BLOCK
        sums = sums_of(data)

        def store(version: int) -> Any:
            return node.actor("block_store").put_block.remote(
                ref, root_of(sums), sums, False, version, payload=memoryview(data)
            )

        under_way = store(ring.version)
        await asyncio.sleep(1e-5)
        assert not under_way.future.done() and node.stores[0].stats().reserved == 1
        node.view.ring = ring.without_peer(node.node_id)
        with pytest.raises(Again):
            await under_way
        assert node.refs() == {ref}
        with pytest.raises(Again):
            await store(node.view.ring.version)
        # From who knows a later ring, and from who does not say by which one it goes.
        assert await store(node.view.ring.version + 1) == await store(0)


@virtual
async def test_what_the_collector_deleted_is_told_from_what_is_missing() -> None:
    """Nobody has to send it here: not so what was dropped or discarded, which is alive."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        dead, dropped, discarded = refs = [ref_of(n) for n in (1, 2, 3)]
        for ref in refs:
            await put(node, ref, b"x" * BLOCK)
        store, loop = node.actor("block_store"), asyncio.get_running_loop()
        assert await store.delete_blocks.remote(dead) == 1
        assert await store.drop_blocks.remote(dropped, loop.time() + 10) == 1
        assert await store.discard_blocks.remote(discarded) == 1
        assert await check(node, *refs) == [
            (Status.DEAD, 0),
            (Status.MISSING, 0),
            (Status.MISSING, 0),
        ]


@pytest.mark.parametrize("busy", [False, True])
@virtual
async def test_what_the_collector_deleted_is_forgotten_after_a_while(
    busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it deletes anything else meanwhile.

    Found by review: what was deleted last was remembered for ever.
    """
    monkeypatch.setattr(block_store, "DEAD_S", 10.0)
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await node.actor("block_store").delete_blocks.remote(ref_of(0))
        for n in range(1, 25):
            if busy:
                await node.actor("block_store").delete_blocks.remote(ref_of(n))
            if n == 10:
                assert await check(node, ref_of(0)) == [(Status.DEAD, 0)]
            await asyncio.sleep(1.0)
        assert await check(node, ref_of(0)) == [(Status.MISSING, 0)]
        assert await check(node, ref_of(24)) == [(Status.DEAD if busy else Status.MISSING, 0)]


@virtual
async def test_a_new_disk_confirms_nothing_that_the_old_one_took() -> None:
    """A node that keeps its id and gets a new disk has a new store, which counts from 1 again."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        taken = await put(node, ref_of(1), b"b" * BLOCK)
        await node.crash()
        node.disks = [SimDisk(random.Random(index)) for index in range(len(node.disks))]
        await node.start()
        assert not node.refs(0)
        assert await node.actor("block_store").flush.remote() != taken


@virtual
async def test_a_second_put_is_the_same_block_or_refused() -> None:
    """The same content again is fine.

    Other content is refused while the stored copy is right, and takes its place when that one is
    damaged.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        ref = ref_of(1)
        await put(node, ref, b"a" * BLOCK)
        await put(node, ref, b"a" * BLOCK)
        with pytest.raises(Exists):
            await put(node, ref, b"b" * BLOCK)
        node.rot(ref, 100)
        assert (await check(node, ref, deep=True))[0][0] == Status.CORRUPT
        await put(node, ref, b"a" * BLOCK, replace=True)
        assert node.stores[0].get(ref) == b"a" * BLOCK


@virtual
async def test_many_repairs_of_one_block_at_once_leave_one_good_copy() -> None:
    """A copy that another repair has just made is not taken for the damaged one."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        ref = ref_of(1)
        await put(node, ref, b"a" * BLOCK)
        node.rot(ref, 100)
        await asyncio.gather(*[put(node, ref, b"a" * BLOCK, replace=True) for _ in range(5)])
        assert node.stores[0].get(ref) == b"a" * BLOCK
        assert node.stores[0].stats().quarantined == 1


@virtual
async def test_a_reserved_slot_is_given_back_whatever_happens() -> None:
    """Puts that fail, whose caller gives up or whose actors die, reserve nothing for ever."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        puts = [put(node, ref_of(n), bytes([n]) * BLOCK) for n in range(20)]
        for victim in ("disk_writer", "block_store", "disk_writer"):
            await asyncio.sleep(0.0003)
            node.kill(victim)
        await asyncio.gather(*puts)
        bad = node.actor("block_store").put_block.remote(
            ref_of(99), 1, b"sums", False, payload=memoryview(b"x")
        )
        with pytest.raises(TorusError):
            await bad
        stats = node.stores[0].stats()
        assert (stats.used, stats.reserved, stats.quarantined) == (20, 0, 0)


@pytest.mark.parametrize("begun", [True, False])
@virtual
async def test_a_slot_that_may_still_be_written_to_is_set_aside(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that nobody waits for any more may come late: no other block gets its slot.

    One that the worker has not begun never will. Found by reading: a hang of an hour set aside as
    many slots as there were writes behind it, and the node was full.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        assert node.opened is not None
        data = b"a" * BLOCK
        sums = sums_of(data)
        store = node.stores[0]
        write = store.write
        tasks: list[asyncio.Future[None]] = []

        def written(*args: Any) -> None:
            write(*args)
            tasks[0].cancel()

        monkeypatch.setattr(store, "write", written)
        tasks.append(
            asyncio.ensure_future(node.opened._put(ref_of(1), root_of(sums), sums, False, data))
        )
        await asyncio.sleep(0)
        assert store.stats().reserved == 1
        if not begun:
            tasks[0].cancel()
        await asyncio.sleep(1.0)
        stats = store.stats()
        assert (stats.used, stats.reserved, stats.quarantined) == (0, 0, int(begun))
        monkeypatch.undo()
        await put(node, ref_of(1), b"a" * BLOCK)
        assert store.get(ref_of(1)) == b"a" * BLOCK


@virtual
async def test_a_flush_does_not_join_the_one_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was put since that one began is not in it."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        assert node.opened is not None
        store, began, go_on = node.opened.stores[0], asyncio.Event(), asyncio.Event()
        flush_once = node.opened._flush_once

        async def held() -> None:
            begin = store.begin_flush

            def begun() -> Any:
                batch = begin()
                began.set()
                return batch

            monkeypatch.setattr(store, "begin_flush", begun)
            await flush_once()
            await go_on.wait()

        monkeypatch.setattr(node.opened, "_flush_once", held)
        await put(node, ref_of(1), b"a" * BLOCK)
        first = asyncio.ensure_future(node.opened.flush())
        await began.wait()
        await put(node, ref_of(2), b"b" * BLOCK)
        second = asyncio.ensure_future(node.opened.flush())
        await asyncio.sleep(1.0)
        go_on.set()
        await asyncio.gather(first, second)
        monkeypatch.undo()
        await node.crash()
        await node.start()
        found = node.opened.stores[0]
        assert (found.get(ref_of(1)), found.get(ref_of(2))) == (b"a" * BLOCK, b"b" * BLOCK)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@virtual
async def test_a_node_takes_no_block_whose_entry_the_disk_refuses(
    error: int, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one of the other store: a flush is of both. It does again once a flush goes through.

    Found by reading: it took them and confirmed none, and writers sent them to it again and again.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        store = node.actor("block_store")
        first = ref_of(1, BlockType.INODE if kind else BlockType.DATA)
        await put(node, first, b"x" * 4096)
        node.disks[kind].inject("write", error, path=INDEX_PATH, times=1 << 30)
        with pytest.raises((Corruption, OutOfSpace)):
            await store.flush.remote()
        for other in (ref_of(2), ref_of(3, BlockType.INODE)):
            with pytest.raises(Closed, match="takes no blocks: "):
                await put(node, other, b"x" * 4096)
        stats = await store.stats.remote()
        assert [bool(stats[name]["failure"]) for name in STORE_NAMES] == [True, False]
        opened = node.opened
        assert opened is not None
        monkeypatch.setattr(opened, "_is_pressed", lambda: True)  # it is nearly full, too
        flush_once, flushes = opened._flush_once, 0

        async def counted() -> None:
            nonlocal flushes
            flushes += 1
            await flush_once()

        monkeypatch.setattr(opened, "_flush_once", counted)
        await asyncio.sleep(60)
        assert 10 < flushes < 40  # found by reading: ten a second
        with pytest.raises(Closed):
            await put(node, ref_of(2), b"x" * 4096)
        node.disks[kind].heal()
        await until(lambda: node.opened is not None and not node.opened.refusal)
        await put(node, ref_of(2), b"x" * 4096)
        await store.flush.remote()
        assert not (await store.stats.remote())["blocks"]["failure"]


@virtual
async def test_a_store_that_there_is_not_is_refused() -> None:
    """Another node may ask for anything."""
    async with Cluster(nodes=1) as cluster:
        with pytest.raises(Invalid):
            await cluster.node(0).actor("block_store").list_blocks.remote(2, 0, 10)


@virtual
async def test_torus_401_a_full_store_says_so_and_works_again_after_deletes() -> None:
    """Regression, coreos/torus#401: a full store says so, as OutOfSpace on a put.

    Reads and deletes work; after a delete there is room again.
    """
    async with Cluster(nodes=1, blocks=4) as cluster:
        node = cluster.node(0)
        stored = 0
        with pytest.raises(OutOfSpace):
            while True:
                await put(node, ref_of(stored), bytes([stored]) * BLOCK)
                stored += 1
        assert stored == node.stores[0].stats().total
        assert (await read(node, (ref_of(0), 0, BLOCK)))[0][1] == bytes(BLOCK)
        await node.actor("block_store").delete_blocks.remote(ref_of(0))
        await until(lambda: node.stores[0].stats().free)
        await put(node, ref_of(100), b"x" * BLOCK)


@pytest.mark.parametrize("kind", BlockType)
@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_deleted_in_a_full_store_is_free_soon(kind: BlockType, restarted: bool) -> None:
    """Also while more is deleted; be it full of blocks or of pages, or full since it was opened."""

    @virtual
    async def play() -> None:
        async with Cluster(nodes=1, blocks=4) as cluster:
            node = cluster.node(0)
            stored = 0
            with pytest.raises(OutOfSpace):
                while True:
                    await put(node, ref_of(stored, kind), b"x")
                    stored += 1
            await node.actor("block_store").flush.remote()
            if restarted:
                await node.restart()
            for n in range(4):
                await node.actor("block_store").delete_blocks.remote(ref_of(n, kind))
                await asyncio.sleep(1.0)
            assert node.stores[kind].stats().free

    play()


@virtual
async def test_a_damaged_copy_stays_until_there_is_room_for_a_good_one() -> None:
    """All pages but one can still be read from it, maybe from nowhere else."""
    async with Cluster(nodes=1, blocks=4) as cluster:
        node = cluster.node(0)
        count = node.stores[0].stats().free
        for n in range(count):
            await put(node, ref_of(n + 1), bytes([n + 1]) * BLOCK)
        node.rot(ref_of(1), 5000)
        with pytest.raises(OutOfSpace):
            await put(node, ref_of(1), bytes([1]) * BLOCK, replace=True)
        found = await read(node, (ref_of(1), 0, 4096))
        assert found == [(Status.OK, bytes([1]) * 4096)]
        await node.actor("block_store").delete_blocks.remote(ref_of(2))
        await node.actor("block_store").flush.remote()
        await put(node, ref_of(1), bytes([1]) * BLOCK, replace=True)
        assert node.stores[0].get(ref_of(1)) == bytes([1]) * BLOCK


@virtual
async def test_a_damaged_copy_stays_until_a_good_one_is_written() -> None:
    """What comes for it may be damaged itself, or the disk may not take it."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        data = bytes([1]) * BLOCK
        await put(node, ref_of(1), data)
        node.rot(ref_of(1), 5000)
        sums = sums_of(data)
        for payload in (bytes([2]) * BLOCK, b"short", data):
            node.disks[0].inject("write", path=DATA_PATH)
            with pytest.raises(TorusError):
                await node.actor("block_store").put_block.remote(
                    ref_of(1), root_of(sums), sums, True, payload=memoryview(payload)
                )
            node.disks[0].heal()
            assert await read(node, (ref_of(1), 0, 4096)) == [(Status.OK, data[:4096])]
        await put(node, ref_of(1), data, replace=True)
        assert node.stores[0].get(ref_of(1)) == data
        assert node.stores[0].stats().quarantined == 2  # the copy, and where it was not written


@virtual
async def test_a_copy_that_the_successor_of_a_killed_writer_wrote_is_there() -> None:
    """The last write of the killed one failed: what was damaged had gone, and nothing was there."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"a" * BLOCK)
        await node.actor("block_store").flush.remote()
        node.rot(ref_of(1), 100)
        node.disks[0].inject("write", path=DATA_PATH)
        putting = put(node, ref_of(1), b"a" * BLOCK, replace=True)
        writer: Any = node.system.cells["disk_writer"].actor
        async with asyncio.timeout(1.0):
            while writer._current is None:  # noqa: ASYNC110 - for less time than `until` sleeps
                await asyncio.sleep(1e-5)
        node.kill("disk_writer")
        await putting
        assert node.refs() == {ref_of(1)}
        assert node.stores[0].get(ref_of(1)) == b"a" * BLOCK


@virtual
async def test_a_failed_sync_is_told_to_all_who_wait_and_to_all_who_come() -> None:
    """The disk fails under a flush: every waiter hears it, and no later flush says success."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"a" * BLOCK)
        node.disks[0].inject("sync")
        flush = node.actor("block_store").flush
        for result in await asyncio.gather(
            *[flush.remote() for _ in range(3)], return_exceptions=True
        ):
            assert isinstance(result, TorusError)
        for _ in range(2):
            with pytest.raises(Closed):
                await flush.remote()
        assert (await node.actor("block_store").stats.remote())["blocks"]["failure"]


@virtual
async def test_a_store_that_failed_does_not_block_the_other_ones_flush_for_ever() -> None:
    """If one store cannot begin a flush, that of the other is ended and not left under way."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1, BlockType.INODE), b"page")
        node.disks[1].inject("sync")
        for _ in range(3):
            with pytest.raises(TorusError):
                await node.actor("block_store").flush.remote()
        node.stores[0].end_flush(node.stores[0].begin_flush())


@virtual
async def test_a_node_takes_no_block_that_no_flush_could_confirm() -> None:
    """One store has failed, and a flush is of both: blocks for the other one go elsewhere."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"block")
        await put(node, ref_of(1, BlockType.INODE), b"page")
        node.disks[1].inject("sync")
        with pytest.raises(TorusError):
            await node.actor("block_store").flush.remote()
        for number in (1, 2):  # also one that it has
            with pytest.raises(Closed):
                await put(node, ref_of(number), b"block")


@virtual
async def test_concurrent_flushes_share_a_sync() -> None:
    """Fifty flushes at once cost one or two rounds of syncs."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        syncs: list[str] = []
        await asyncio.gather(*[put(node, ref_of(n), b"x" * BLOCK) for n in range(50)])
        node.disks[0].on_operation = lambda op: syncs.append(op.kind)
        await asyncio.gather(*[node.actor("block_store").flush.remote() for _ in range(50)])
        assert node.stores[0].stats().pending == 0
        assert syncs.count("sync") <= 4


@virtual
async def test_a_flush_survives_its_workers() -> None:
    """The flusher and the block store are killed under flushes: all of them succeed."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(5):
            await put(node, ref_of(n), b"x" * BLOCK)
            flushes = [node.actor("block_store").flush.remote() for _ in range(3)]
            await asyncio.sleep(0)
            node.kill("disk_flusher")
            node.kill("block_store")
            await asyncio.gather(*flushes)
        assert node.stores[0].stats().pending == 0


def test_the_successor_of_a_killed_writer_waits_for_its_last_write() -> None:
    """A worker that was killed may still be writing: nothing is written beside it."""
    order: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    class Store:
        def write(self, ticket: Any, sums: Any, payload: Any) -> None:
            order.append(f"begin {ticket}")
            if ticket == "first":
                entered.set()
                go_on.wait(10)
            order.append(f"end {ticket}")

    factory = disk_workers([Store()])[0].factory  # type: ignore[list-item]
    write = type(make_unstarted(factory)).write
    zombie, successor = make_unstarted(factory), make_unstarted(factory)
    first = threading.Thread(target=write, args=(zombie, 0, "first", b"", b""))
    second = threading.Thread(target=write, args=(successor, 0, "second", b"", b""))
    first.start()
    assert entered.wait(10)
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert order == ["begin first", "end first", "begin second", "end second"]


def make_unstarted(factory: Any) -> Any:
    """An actor that was made and not started."""
    from torus_actors.runtime.inbox import Adoption, Inbox

    with Adoption(Inbox(None, 0)):  # type: ignore[arg-type]
        return factory()


@virtual
async def test_cold_reads_unpin_what_they_pinned() -> None:
    """Reads from the disk, also such as nobody waits for any more, leave no slot pinned."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(8):
            await put(node, ref_of(n), bytes([n]) * BLOCK)
        node.disks[0].miss_percent = 100
        reads = [read(node, *[(ref_of(n), 0, BLOCK) for n in range(8)]) for _ in range(6)]
        tasks = [asyncio.ensure_future(each) for each in reads]
        await asyncio.sleep(0.0002)
        node.kill("disk_reader")
        tasks[0].cancel()
        node.kill("block_store")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for found in results[1:]:
            assert found == [(Status.OK, bytes([n]) * BLOCK) for n in range(8)]
        await until(lambda: not node.stores[0]._pins)


@virtual
async def test_a_read_that_ends_in_the_middle_leaves_nothing_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no memory for the second of its blocks: the actor dies of it, and the next reads."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(2):
            await put(node, ref_of(n), bytes([n]) * BLOCK)
        store = node.stores[0]
        node.disks[0].miss_percent = 100
        allocate, calls = store._allocate, itertools.count(1)

        def allocate_unless_second(size: int) -> Any:
            if next(calls) == 2:
                raise MemoryError("none for the moment")
            return allocate(size)

        monkeypatch.setattr(store, "_allocate", allocate_unless_second)
        found = await read(node, *[(ref_of(n), 0, BLOCK) for n in range(2)])
        assert found == [(Status.OK, bytes([n]) * BLOCK) for n in range(2)]
        assert node.system.cells["block_store"].restarts == 1
        await until(lambda: not store._pins)


@virtual
async def test_the_largest_block_fits_the_wire_with_its_checksum_list() -> None:
    """Both ways: a block that could be put and not be read whole could never be repaired."""
    async with Cluster(nodes=1, block_size=BLOCK_SIZE_MAX, blocks=1) as cluster:
        node = cluster.node(0)
        data = random.Random(1).randbytes(BLOCK_SIZE_MAX)
        sums = sums_of(data)
        encode(Kind.CALL, 1, encode_call("block_store", "put_block", (sums,), 1), [data])
        await put(node, ref_of(1), data)
        answer = await node.actor("block_store").read_ranges.remote(
            RANGE.pack(ref_of(1), 0, BLOCK_SIZE_MAX)
        )
        frame = encode(Kind.REPLY, 1, encode_reply(answer.result), answer.payload)
        assert b"".join(frame).endswith(sums + data)


@virtual
async def test_a_request_for_too_much_is_refused_before_anything_is_read() -> None:
    """Neither a vectored read nor a check can make a node allocate without bound."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"x" * BLOCK)
        huge = RANGE.pack(ref_of(1), 0, 1 << 20) * 100
        with pytest.raises(Invalid):
            await node.actor("block_store").read_ranges.remote(huge)
        # Each range brings the checksum list of its block along.
        many = RANGE.pack(ref_of(1), 0, 4096) * (BLOCK_SIZE_MAX // 4096)
        with pytest.raises(Invalid):
            await node.actor("block_store").read_ranges.remote(many)
        with pytest.raises(Invalid):
            await node.actor("block_store").check_blocks.remote(ref_of(1) * 5000)
        with pytest.raises(TorusError):
            await node.actor("block_store").read_ranges.remote(b"odd")


def test_a_range_behind_a_blocks_end_leaves_nothing_pinned(tmp_path: Path) -> None:
    """On a real disk, where cold reads are planned before they are begun."""
    size = 64 << 10

    async def play() -> None:
        async with system_of() as system:
            config = StoreConfig(tmp_path, 64 << 20, size)
            opened = OpenStores.open(system, config, random.Random(3))
            for spec in disk_workers(opened.stores):
                await system.spawn(spec)
            await system.spawn(ChildSpec("block_store", lambda: BlockStoreActor(opened)))
            actor = system.actor("block_store")
            for n in range(2):
                data = memoryview(b"x" * size)
                sums = sums_of(data)
                await actor.put_block.remote(ref_of(n), root_of(sums), sums, payload=data)
            packed = RANGE.pack(ref_of(0), 0, 4096) + RANGE.pack(ref_of(1), size, 4096)
            with contextlib.suppress(TorusError):
                await actor.read_ranges.remote(packed)
            assert not opened.stores[0]._pins
            await system.remove("block_store")
            for spec in disk_workers(opened.stores):
                await system.remove(spec.name)
            opened.close()

    on_uvloop(play)()


def test_a_node_killed_between_the_making_of_its_two_stores_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without --size, as it was started before."""
    monkeypatch.setattr("torus_actors.cli.node.SIZE_DEFAULT", 64 << 20)
    made: list[BlockStore] = []

    def open_one(disk: Disk, **kwargs: Any) -> MFileStore:
        if made:
            raise KeyboardInterrupt
        made.append(MFileStore.open(disk, **kwargs))
        return cast(MFileStore, made[0])

    async def play() -> None:
        async with system_of() as system:

            def start() -> OpenStores:
                config = StoreConfig(tmp_path, store_size(tmp_path, None), BLOCK)
                return OpenStores.open(system, config, random.Random(3))

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("torus_actors.actors.block_store.MFileStore", Mock(open=open_one))
                start()
            assert (tmp_path / "blocks" / INDEX_PATH).exists()
            assert not (tmp_path / "inodes" / INDEX_PATH).exists()
            for _ in range(2):
                start().close()

    on_uvloop(play)()


@pytest.mark.parametrize("kind", [DATA, INODES])
def test_a_store_that_is_missing_beside_one_with_blocks_is_not_made_anew(
    tmp_path: Path, kind: int
) -> None:
    """As where its disk is not mounted: the blocks are there, and no second store hides them.

    Beside an empty one it is made: nothing can be missing.
    """

    async def play() -> None:
        async with system_of() as system:

            def start() -> OpenStores:
                return OpenStores.open(system, config, random.Random(3))

            config = StoreConfig(tmp_path, 64 << 20, BLOCK)
            start().close()
            away = tmp_path / STORE_NAMES[kind]
            there = tmp_path / "elsewhere"
            shutil.rmtree(away)
            opened = start()
            store = opened.stores[1 - kind]
            block_type = BlockType.DATA if kind == INODES else BlockType.INODE
            store.put(BlockRef.of(1, 1, 1, block_type), bytes(store.block_size))
            store.flush()
            opened.close()
            away.rename(there)
            for _ in range(2):
                with pytest.raises(Invalid, match="is a disk not mounted"):
                    start()
            assert not (away / INDEX_PATH).exists()
            if away.exists():
                away.rmdir()
            there.rename(away)
            opened = start()
            assert opened.stores[1 - kind].stats().used == 1
            opened.close()

    on_uvloop(play)()


@virtual
async def test_a_vouched_block_is_not_dropped_and_a_stale_word_is_no_word() -> None:
    """Who was asked to keep a block does not drop it for a while.

    An old confirmation drops none.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        loop = asyncio.get_running_loop()
        drop = node.actor("block_store").drop_blocks
        await put(node, ref_of(1), b"x" * BLOCK)
        await check(node, ref_of(1), deep=True, durable=True)
        assert await drop.remote(ref_of(1), loop.time() + 10) == 0
        await asyncio.sleep(VOUCH_S + 1)
        assert await drop.remote(ref_of(1), loop.time() - 1) == 0
        assert await drop.remote(ref_of(1), loop.time() + 10) == 1


@virtual
async def test_what_nobody_flushes_is_durable_soon() -> None:
    """A put without a flush survives a power cut some seconds later."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"x" * BLOCK)
        await asyncio.sleep(5.0)
        await put(node, ref_of(2), b"y" * BLOCK)
        await node.restart()
        assert node.refs() == {ref_of(1)}


@virtual
async def test_what_could_not_be_flushed_is_flushed_later() -> None:
    """A flush that nobody asked for met an error that passes: it is made again."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        node.disks[0].inject("write", path=INDEX_PATH, times=2)
        await put(node, ref_of(1), b"x" * BLOCK)
        await asyncio.sleep(15.0)
        await node.restart()
        assert node.refs() == {ref_of(1)}


@virtual
async def test_index_entries_that_rotted_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Their blocks are missing from then on, and nothing else says why. Found by review."""
    disks: dict[str, SimDisk] = {}

    def open_disk(path: Path) -> SimDisk:
        return disks.setdefault(path.name, SimDisk(random.Random(1)))

    async with system_of() as system:
        config = StoreConfig(Path("node"), 64 << 20, BLOCK, open_disk)
        opened = OpenStores.open(system, config, random.Random(3))
        opened.stores[DATA].put(ref_of(1), bytes(BLOCK))
        opened.stores[DATA].flush()
        opened.close()
        assert not caplog.records
        disks["blocks"].rot(INDEX_PATH, ENTRIES_OFFSET + 3)
        OpenStores.open(system, config, random.Random(3)).close()
        (told,) = caplog.records
        assert "node/blocks: 1 " in told.getMessage()
        caplog.clear()
        OpenStores.open(system, config, random.Random(3)).close()
        assert not caplog.records


@virtual
async def test_stores_are_closed_whatever_their_disks_say(caplog: pytest.LogCaptureFixture) -> None:
    """A disk that fails in the last moment keeps neither the other store open nor the node up.

    Found by review: a node that could not start for another reason told of this one instead.
    """
    disks: dict[str, SimDisk] = {}

    def open_disk(path: Path) -> SimDisk:
        return disks.setdefault(path.name, SimDisk(random.Random(1)))

    async with system_of() as system:
        config = StoreConfig(Path("node"), 64 << 20, BLOCK, open_disk)
        opened = OpenStores.open(system, config, random.Random(3))
        disks["blocks"].inject("sync", errno.EIO)
        opened.close()
        assert [store.failure for store in opened.stores] == ["closed", "closed"]
        assert "cannot sync" in caplog.text


@virtual
@pytest.mark.parametrize("asked", [1, 2, 3])
async def test_a_read_that_hangs_holds_up_no_other(asked: int) -> None:
    """A drive tries a bad sector for minutes, for the scrubber say: there is a second reader.

    Who asks for the same once more, as the scrubber does, waits for the answer to the first.
    Found by review: reads went to both in turn, and each other one waited behind the first; later
    only those that came one at a time went by it.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(12):
            await put(node, ref_of(n), b"x" * BLOCK)
        node.blocking_s["check"] = 300.0
        location = node.stores[0].locate(ref_of(0))
        verifying = []
        for _ in range(asked):
            verifying.append(asyncio.ensure_future(node.opened.verify(0, location)))
            await asyncio.sleep(0.1)
        node.disks[0].miss_percent = 100
        async with asyncio.timeout(1.0):
            for n in range(12):
                assert await read(node, (ref_of(n), 0, 4096)) == [(Status.OK, b"x" * 4096)]
            reading = [read(node, (ref_of(n), 4096, 4096)) for n in range(12)]
            assert await asyncio.gather(*reading) == 12 * [[(Status.OK, b"x" * 4096)]]
        assert not any(each.done() for each in verifying)
        verifying[0].cancel()
        assert all(await asyncio.gather(*verifying[1:]))
        await node.actor("block_store").delete_blocks.remote(ref_of(0))
        await asyncio.sleep(300.0)
        assert not node.stores[0]._pins and not node.opened._verifying


@virtual
async def test_reads_that_came_before_one_was_known_to_hang_are_read_by_the_other() -> None:
    """They wait behind it already when the time is over after which nobody waits there any more."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(12):
            await put(node, ref_of(n), b"x" * BLOCK)
        node.blocking_s["check"] = 300.0
        node.disks[0].miss_percent = 100
        verifying = asyncio.ensure_future(node.opened.verify(0, node.stores[0].locate(ref_of(0))))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1.0):
            reading = [read(node, (ref_of(n), 0, 4096)) for n in range(12)]
            assert await asyncio.gather(*reading) == 12 * [[(Status.OK, b"x" * 4096)]]
        assert not verifying.done() and await verifying


@virtual
async def test_reads_are_not_handed_to_a_worker_that_has_ended() -> None:
    """It has nothing to do, and will do nothing."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        assert node.system is not None and node.opened is not None
        busy, ended = (node.system.cells[name] for name in READERS)
        await ended.stop(final=True)
        assert isinstance(busy.actor, BlockingActor)
        busy.actor.quiesce()  # as if in a call
        for _ in range(4):
            node.actor(busy.name).read_many.remote([])
        node.opened._spread()
        node.opened._spreading = asyncio.get_running_loop().call_later(1e6, node.opened._spread)
        node.opened.share()
        node.opened._spreading.cancel()
        assert (busy.waiting(), ended.waiting()) == (4, 0)


@virtual
async def test_no_worker_is_idle_while_reads_wait_for_a_slow_disk() -> None:
    """Each read takes so long that it might be one that hangs; both workers share them."""
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        for n in range(64):
            await put(node, ref_of(n), b"x" * BLOCK)
        rng, loop = random.Random(1), asyncio.get_running_loop()
        node.blocking_s = cast(Any, Mock(get=lambda *_: rng.uniform(0.06, 0.12)))
        node.disks[0].miss_percent = 100
        began = loop.time()
        await asyncio.gather(*[read(node, (ref_of(n), 0, 4096)) for n in range(64)])
        assert loop.time() - began < 1.2 * 64 / 2 * 0.09


@virtual
async def test_a_copy_that_only_the_page_cache_has_wrong_is_replaced() -> None:
    """Who read it wrong says so, and would read it wrong again for as long as the cache has it.

    Found by review: only what the disk has was looked at.
    """
    async with Cluster(nodes=1) as cluster:
        node = cluster.node(0)
        await put(node, ref_of(1), b"x" * BLOCK)
        await node.actor("block_store").flush.remote()
        store, right = node.stores[0], [(Status.OK, b"x" * 4096)]
        at = store._layout.slot_offset(store.locate(ref_of(1)).slot) + store._layout.sums_room
        node.disks[0].rot(DATA_PATH, at, cached=True)
        node.disks[0].rot(DATA_PATH, at)  # the disk has it right again, and the cache not any more
        assert await read(node, (ref_of(1), 0, 4096)) != right
        await put(node, ref_of(1), b"x" * BLOCK, replace=True)
        assert await read(node, (ref_of(1), 0, 4096)) == right
