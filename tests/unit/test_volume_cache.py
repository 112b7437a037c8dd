"""The caches of a volume: bounds that hold, buffers that are not reused, answers that come."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes import Cluster, Device, DeviceError, StorageNode, until, virtual
from torus_actors.errors import Fenced, OutOfSpace, TorusError
from torus_actors.model.buffers import BufferPool
from torus_actors.model.extents import ExtentMap
from torus_actors.model.inode_tree import BlockMap
from torus_actors.model.inode_tree_pages import FANOUT
from torus_actors.model.inode_tree_walk import PageNeeded
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Op, Request
from torus_actors.storage.mfile_open import DATA_PATH
from torus_actors.volume.block_status import PIECES_MAX
from torus_actors.volume.file import File
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.read_side import READAHEAD_MAX, SEQUENTIAL_AFTER, STREAM_COUNT_MAX
from torus_actors.volume.write_back import WriteBack

BLOCK = 16 << 10
SIZE = 64 * BLOCK


# -- the write cache -------------------------------------------------------------------------------


@virtual
async def test_writes_wait_for_room_and_then_go_on() -> None:
    """With the peers hanging the cache fills to its bound and no further.

    When they are back all writes are answered, and the accounting returns to zero.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 * BLOCK)
        file = device.client.session("v").file
        for peer in cluster.ids:
            cluster.network.hanging.add(peer)
        writes = [
            asyncio.ensure_future(device.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(20)
        ]
        await asyncio.sleep(1.0)
        assert sum(write.done() for write in writes) in range(1, 5)
        assert 0 < file.layers.size <= 4 * BLOCK
        cluster.network.heal()
        await asyncio.gather(*writes)
        assert await device.read(19 * BLOCK, 10) == bytes([19]) * 10
        await device.flush()
        assert file.layers.size == 0 and not file.unsynced and not file.fresh
        assert not file._waiting and not file._putting and not file._failed_puts


@virtual
async def test_writes_that_wait_for_room_fail_in_the_end() -> None:
    """No block can be put anywhere, for long: who waits for room is told, and does not hang.

    Found by the simulator, with every peer gone; the data that is in the cache stays there.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 * BLOCK)
        for n in range(len(cluster.ids)):
            await cluster.node(n).crash()
        writes = [
            asyncio.ensure_future(device.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(20)
        ]
        results = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 100.0)
        assert results[0] is None
        assert isinstance(results[-1], DeviceError) and results[-1].errno == Errno.EIO


@virtual
async def test_truncation_forgets_what_it_cuts_off() -> None:
    """A file cut in the middle of a block and grown again has zeros where it was cut."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        file = device.client.session("v").file
        await device.write(0, b"x" * (3 * BLOCK))
        await device.flush()
        await file.truncate(BLOCK + 100)
        assert file.size == BLOCK + 100 and file.blockset.length == 2
        await file.truncate(SIZE)
        assert await device.read(0, BLOCK + 100) == b"x" * (BLOCK + 100)
        assert await device.read(BLOCK + 100, 2 * BLOCK) == bytes(2 * BLOCK)
        await device.flush()
        assert await device.read(BLOCK + 90, 20) == b"x" * 10 + bytes(10)


@virtual
async def test_small_writes_are_counted_with_what_they_cost() -> None:
    """A flood of one-byte writes does not outgrow the bound either."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4096)
        file = device.client.session("v").file
        most = 0
        for n in range(400):
            await device.write(n * 100, b"x")
            most = max(most, file.layers.size)
        assert most <= 4096 + 100
        await device.flush()
        assert file.layers.size == 0


@pytest.mark.parametrize("no_hole", [False, True])
@virtual
async def test_a_write_larger_than_the_cache_is_let_through_alone(no_hole: bool) -> None:
    """Data and zeros of many times the cache's size are written, and read back."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=2 * BLOCK)
        await device.write(0, b"x" * SIZE)
        await device.zero(100, SIZE - 200, no_hole=no_hole)
        assert await device.read(0, SIZE) == b"x" * 100 + bytes(SIZE - 200) + b"x" * 100
        await device.flush()
        assert device.client.session("v").file.layers.size == 0


@virtual
async def test_zeros_wait_for_room_like_data() -> None:
    """Zero runs take memory too: their number is bounded, and all are answered."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=2048)
        file = device.client.session("v").file
        await device.write(0, b"x" * SIZE)
        await device.flush()
        for peer in cluster.ids:
            cluster.network.hanging.add(peer)
        zeros = [asyncio.ensure_future(device.zero(n * 512, 100)) for n in range(300)]
        await asyncio.sleep(1.0)
        assert file.layers.size <= 2048 + 128
        cluster.network.heal()
        await asyncio.gather(*zeros)
        await device.flush()
        assert file.layers.size == 0
        assert await device.read(0, 512) == bytes(100) + b"x" * 412


@virtual
async def test_torus_401_out_of_space_reaches_the_writer_and_goes_away() -> None:
    """Regression, coreos/torus#401: on a full cluster writers and flushes hear ENOSPC.

    Those that wait for room too. Reads and trims work; after room was made, writes and flushes do
    again.
    """
    async with Cluster(nodes=1, replication=1, blocks=8, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 * BLOCK)
        await device.write(0, b"a" * BLOCK)
        await device.flush()
        with pytest.raises(DeviceError) as failed:
            for n in range(1, 60):
                await device.write(n * BLOCK, bytes([n]) * BLOCK)
        assert failed.value.errno == Errno.ENOSPC
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.ENOSPC
        assert await device.read(0, BLOCK) == b"a" * BLOCK
        await device.trim(BLOCK, SIZE - BLOCK)
        await device.flush()
        assert not device.in_flight

        async def writable() -> bool:
            try:
                await device.write(BLOCK, b"again" * 1000, fua=True)
            except DeviceError:
                return False
            return True

        for _ in range(60):
            if await writable():
                break
            await asyncio.sleep(1.0)
        assert await device.read(BLOCK, 5) == b"again"
        assert device.client.session("v").file.put_error is None


@pytest.mark.parametrize(("operation", "error"), [("sync", errno.EIO), ("write", errno.EROFS)])
@virtual
async def test_room_is_made_on_a_full_node_beside_one_whose_disk_failed(
    operation: str, error: int
) -> None:
    """As beside a dead one: what was overwritten is collected, and the flush goes through.

    Found by reading: that nobody took a block was told as if no node were full, and no flush ever
    went through again until the other node was started anew.
    """
    async with Cluster(nodes=2, replication=2, blocks=8, collect_s=1.0) as cluster:
        failed, full = cluster.node(0), cluster.node(1)
        failed.disks[0].inject(operation, error, path=DATA_PATH, times=10**9)
        device = await cluster.volume(SIZE)
        for content in (b"a", b"b", b"c"):
            for n in range(full.stores[0].stats().total - 2):
                await device.write(n * BLOCK, content * BLOCK)
            await device.flush()
        assert await device.read(0, BLOCK) == b"c" * BLOCK


@virtual
async def test_what_waits_for_room_hears_of_a_full_cluster() -> None:
    """Writes that wait when the cluster turns out to be full fail, all of them, and do not hang."""
    async with Cluster(nodes=1, replication=1, blocks=4) as cluster:
        device = await cluster.volume(SIZE, write_bytes=2 * BLOCK)
        writes = [
            asyncio.ensure_future(device.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(60)
        ]
        results = await asyncio.gather(*writes, return_exceptions=True)
        errors = [result for result in results if result is not None]
        assert errors and all(
            isinstance(error, DeviceError) and error.errno == Errno.ENOSPC for error in errors
        )
        assert not device.in_flight


@virtual
async def test_a_trim_behind_writes_that_find_no_room_is_not_refused() -> None:
    """It is how room is made: it waits for its turn behind them, and they alone fail."""
    async with Cluster(nodes=1, replication=1, blocks=4) as cluster:
        device = await cluster.volume(SIZE, write_bytes=2 * BLOCK)
        await device.write(0, b"x" * BLOCK, fua=True)
        writes = [
            asyncio.ensure_future(device.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(1, 60)
        ]
        await asyncio.sleep(0.5)
        zeros = [device.trim(0, BLOCK), device.zero(BLOCK, SIZE - BLOCK)]
        trims = await asyncio.gather(*zeros, return_exceptions=True)
        assert trims == [None, None]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert any(isinstance(result, DeviceError) for result in results)
        assert await device.read(0, SIZE) == bytes(SIZE)
        await device.flush()
        assert not device.in_flight


@virtual
async def test_tries_on_a_cluster_that_is_partly_full_leave_no_copies_behind() -> None:
    """One of two nodes is full: trying again and again does not fill the other one."""
    async with Cluster(nodes=2, replication=2, blocks=64) as cluster:
        device = await cluster.volume(SIZE)
        small = cluster.node(0)
        filler = 0
        while small.stores[0].stats().free:
            small.stores[0].put(BlockRef.of(77, 1, filler), b"f")
            filler += 1
        await device.write(0, b"x" * BLOCK)
        await asyncio.sleep(120.0)
        assert len(cluster.node(1).refs()) <= 2


@pytest.mark.parametrize("blocks", [1, 64])
@pytest.mark.parametrize("after_s", [0.0, 1.0])
@virtual
async def test_what_is_trimmed_while_it_is_tried_leaves_no_copy_behind(
    blocks: int, after_s: float
) -> None:
    """One of two nodes is full; a trim comes beside a try, or between two. No head is recorded."""
    async with Cluster(nodes=2, replication=2, blocks=64) as cluster:
        device = await cluster.volume(SIZE)
        small, other = cluster.node(0), cluster.node(1)
        filler = 0
        while small.stores[0].stats().free:
            small.stores[0].put(BlockRef.of(77, 1, filler), b"f")
            filler += 1
        file = device.client.session("v").file
        file.commit_soon = lambda: None
        await device.write(0, b"x" * BLOCK)
        if after_s:
            await asyncio.sleep(after_s)
            await until(lambda: not file.layers.frozen)
        await until(other.refs)
        await device.trim(0, blocks * BLOCK)
        await until(lambda: not (file.layers.dirty or file.layers.frozen or other.refs()))


@virtual
async def test_all_trimmed_while_the_cluster_is_full_makes_it_writable() -> None:
    """What could not be stored was trimmed: nothing waits for room, so writers are let in again."""
    async with Cluster(nodes=1, replication=1, blocks=4) as cluster:
        device = await cluster.volume(SIZE, write_bytes=64 * BLOCK)
        store = cluster.node(0).stores[0]
        filler = 0
        while store.stats().free:
            store.put(BlockRef.of(77, 1, filler), b"f")
            filler += 1
        await device.write(0, b"x" * BLOCK)
        file = device.client.session("v").file
        await until(lambda: isinstance(file.put_error, OutOfSpace))
        with pytest.raises(DeviceError):
            await device.write(0, b"y")
        await device.trim(0, SIZE)
        await until(lambda: file.put_error is None)
        assert await device.read(0, 10) == bytes(10)


@virtual
async def test_a_trim_does_not_bring_back_what_was_overwritten() -> None:
    """While a trim waits for a page of the map, reads see the newest data, never what is below it.

    If the page cannot be had the trim fails and the data stays.
    """
    async with Cluster(nodes=1, replication=1) as cluster:
        size = 3000 * BLOCK
        device = await cluster.volume(size)
        for at in (0, 1500 * BLOCK, 2900 * BLOCK):
            await device.write(at, b"old" * 1000)
        await device.release()
        device = await device.client.open("v")
        await device.write(100 * BLOCK, b"new" * 1000)
        await device.read(0, 1)  # the first leaf is loaded, the others are not
        cluster.network.hanging.update(cluster.ids)
        trim = asyncio.ensure_future(device.trim(10 * BLOCK, 2000 * BLOCK))
        await asyncio.sleep(0.5)
        assert not trim.done()
        assert await device.read(100 * BLOCK, 3) == b"new"
        cluster.network.heal()
        await trim
        assert await device.read(100 * BLOCK, 3) == bytes(3)
        assert await device.read(1500 * BLOCK, 3) == bytes(3)
        assert await device.read(2900 * BLOCK, 3) == b"old"


# -- requests and actors ---------------------------------------------------------------------------


@virtual
async def test_every_request_of_a_batch_is_answered_once_though_the_volume_dies() -> None:
    """The volume actor is killed with reads, writes, flushes and block status under way."""
    async with Cluster() as cluster:
        device = await cluster.volume(3000 * BLOCK, write_bytes=2 * BLOCK, read_bytes=0)
        await device.write(2500 * BLOCK, b"x" * BLOCK)
        await device.release()
        device = await device.client.open("v")
        for _ in range(10):
            requests = [
                Request(Op.READ, 2500 * BLOCK, 4096, 0),
                Request(Op.BLOCK_STATUS, 2400 * BLOCK, 300 * BLOCK, 0),
                Request(Op.WRITE, 0, 3 * BLOCK, 0, data=bytes(3 * BLOCK)),
                Request(Op.WRITE, BLOCK, 10, 0, data=bytes(10), fua=True),
                Request(Op.FLUSH, 0, 0, 0),
                Request(Op.CACHE, 2500 * BLOCK, 4096, 0),
                Request(Op.TRIM, 100, 200 * BLOCK, 0),
            ]
            futures = device.submit(*requests)
            await asyncio.sleep(cluster.rng.random() * 0.001)
            device.client.kill("volume:v")
            for reply in await asyncio.gather(*futures):
                assert not reply.error, reply.message
            await asyncio.sleep(0.1)
            assert not device.violations
            file = device.client.session("v").file
            file.map.drop_clean_pages(0)


@virtual
async def test_a_bug_in_one_request_is_an_error_for_that_batch_and_nothing_else() -> None:
    """A request that makes the volume actor crash.

    Each of its batch is answered, exactly once, and the successor serves on.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        session = device.client.session("v")
        read_at, broken = session.file.read_at, [True]

        def read_once_broken(*args: Any, **kwargs: Any) -> Any:
            if broken.pop() if broken else False:
                raise RuntimeError("a bug")
            return read_at(*args, **kwargs)

        session.file.read_at = read_once_broken  # type: ignore[method-assign]
        futures = device.submit(
            Request(Op.WRITE, 0, 1, 0, data=b"x"),
            Request(Op.READ, 0, 1, 0),
            Request(Op.READ, 0, 1, 0),
        )
        errors = [reply.error for reply in await asyncio.gather(*futures)]
        assert errors == [0, Errno.EIO, Errno.EIO]
        await asyncio.sleep(1.0)
        assert not device.violations
        assert await device.read(0, 1) == b"x"


@virtual
async def test_full_blocks_are_put_again_after_the_volume_died() -> None:
    """Whole blocks that were on their way when the actor died are put without anybody asking."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=SIZE)
        file = device.client.session("v").file
        for _ in range(3):
            await device.write(0, b"x" * 20 * BLOCK)
            device.client.kill("volume:v")
            await until(lambda: not file.layers.size)
        await device.flush()


@virtual
async def test_no_put_is_on_its_way_when_a_commit_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block that a head names has a lower INode number than that head.

    None enters the map later under a number that a head has ended: a collector would take it for
    dead.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=8 * BLOCK)
        session = device.client.session("v")
        ended: list[int] = []
        put = BlockMap.set
        next_inode = session.committer._next_inode

        def checked_put(self: BlockMap, index: int, ref: BlockRef, root: int) -> None:
            assert not ended or ref.inode >= ended[-1]
            put(self, index, ref, root)

        def ending() -> int:
            ended.append(next_inode())
            return ended[-1]

        monkeypatch.setattr(BlockMap, "set", checked_put)
        session.committer._next_inode = ending
        for peer in cluster.ids:
            cluster.network.delay_s[peer] = cluster.rng.random() * 0.02

        async def write() -> None:
            for n in range(240):
                await device.write((n * 7 % 60) * BLOCK, b"x" * BLOCK)

        writing = asyncio.ensure_future(write())
        while not writing.done():
            await device.flush()
        await writing
        assert len(ended) >= 3


# -- block status ----------------------------------------------------------------------------------


class Looked:
    """How many pieces block status looks at: in all, and in one turn of the loop."""

    def __init__(self, file: File) -> None:
        self.pieces = self.most = self._in_turn = 0
        self._loop = file.loop
        self._counting = False
        self._real = file._pieces
        file._pieces = self._counted  # type: ignore[method-assign]

    def _counted(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        if not self._counting:
            self._counting, self._in_turn = True, 0
            self._loop.call_soon(self._turn_ended)
        for piece in self._real(offset, length):
            self.pieces += 1
            self._in_turn += 1
            self.most = max(self.most, self._in_turn)
            yield piece

    def _turn_ended(self) -> None:
        self._counting = False


async def all_extents(device: Device, offset: int, end: int) -> list[tuple[int, int]]:
    """What a client learns that asks again where an answer ends; neighbours are joined."""
    found: list[tuple[int, int]] = []
    while offset < end:
        reply = await device.do(Op.BLOCK_STATUS, offset, end - offset)
        assert reply.extents
        for size, state in reply.extents:
            if found and found[-1][1] == state:
                found[-1] = (found[-1][0] + size, state)
            else:
                found.append((size, state))
            offset += size
    return found


@virtual
async def test_block_status_is_asked_a_thousand_times_and_nothing_waits_for_it() -> None:
    """Of a volume in thousands of pieces: a turn of the loop looks at a bounded number of them.

    A write that came later is answered long before the last of the statuses.
    """
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 << 20)
        for sector in range(0, SIZE, 1024):
            await device.write(sector, b"x" * 512)
        looked = Looked(device.client.session("v").file)
        statuses = device.submit(*(Request(Op.BLOCK_STATUS, n, SIZE - n, 0) for n in range(1000)))
        await device.write(0, b"y")
        assert sum(status.done() for status in statuses) < 20
        for reply in await asyncio.gather(*statuses):
            assert 0 < len(reply.extents) <= PIECES_MAX
        assert PIECES_MAX <= looked.most <= 2 * PIECES_MAX
        assert await all_extents(device, 0, SIZE) == [(512, 0), (512, 3)] * (SIZE // 1024)


@virtual
async def test_block_status_looks_at_a_bounded_number_of_pieces_that_are_alike() -> None:
    """Thousands of writes side by side are one extent: the answer tells of a part of it."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 << 20)
        for offset in range(0, 3000, 2):
            await device.write(offset, b"x")
        for offset in range(1, 3000, 2):
            await device.write(offset, b"y")
        file = device.client.session("v").file
        looked = Looked(file)
        for req_one in (False, True):
            reply = await device.do(Op.BLOCK_STATUS, 0, SIZE, req_one=req_one)
            assert reply.extents == [(PIECES_MAX, 0)]
        assert looked.pieces == 2 * PIECES_MAX
        assert await all_extents(device, 0, SIZE) == [(3000, 0), (SIZE - 3000, 3)]


@virtual
async def test_a_client_that_wants_one_extent_pays_for_one() -> None:
    """It begins with what it asked for, and ends where the next one would begin."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, write_bytes=4 << 20)
        for sector in range(0, SIZE, 1024):
            await device.write(sector, b"x" * 512)
        looked = Looked(device.client.session("v").file)
        reply = await device.do(Op.BLOCK_STATUS, 100, SIZE - 100, req_one=True)
        assert reply.extents == [(412, 0)]
        assert looked.pieces == 2


@virtual
async def test_block_status_does_not_look_at_what_was_written_elsewhere() -> None:
    """Of thousands of blocks with layers those in the range are looked up, and no others."""

    class Watched(dict[int, ExtentMap]):
        touched = 0

        def __contains__(self, key: object) -> bool:
            self.touched += 1
            return super().__contains__(key)

        def __iter__(self) -> Iterator[int]:
            for key in super().__iter__():
                self.touched += 1
                yield key

    async with Cluster() as cluster:
        device = await cluster.volume(4000 * BLOCK, write_bytes=4 << 20)
        for index in range(0, 4000, 2):
            await device.write(index * BLOCK, b"x")
        layers = device.client.session("v").file.layers
        layers.dirty = watched = Watched(layers.dirty)
        reply = await device.do(Op.BLOCK_STATUS, 2000 * BLOCK, 2 * BLOCK)
        assert reply.extents == [(1, 0), (2 * BLOCK - 1, 3)]
        assert watched.touched < 10


@virtual
async def test_a_status_tells_what_it_can_without_another_page_of_the_map() -> None:
    """Where the next page is not in memory the answer ends, if there is something to tell."""
    async with Cluster(nodes=1, replication=1) as cluster:
        device = await cluster.volume(3000 * BLOCK)
        for at in (0, 1023, 1024, 2900):
            await device.write(at * BLOCK, b"old" * 1000)
        await device.release()
        device = await device.client.open("v")
        reply = await device.do(Op.BLOCK_STATUS, 1000 * BLOCK, 1000 * BLOCK)
        assert sum(size for size, _ in reply.extents) == 24 * BLOCK
        assert await all_extents(device, 0, 3000 * BLOCK) == [
            (BLOCK, 0),
            (1022 * BLOCK, 3),
            (2 * BLOCK, 0),
            (1875 * BLOCK, 3),
            (BLOCK, 0),
            (99 * BLOCK, 3),
        ]


# -- the read cache --------------------------------------------------------------------------------


@virtual
async def test_a_block_read_just_after_it_was_written_is_right() -> None:
    """Regression, found by reading: the read cache kept a slice of a buffer that was reused.

    Write 1 MiB, write the next MiB, read the first, from pooled receive buffers. A buffer that is
    still looked at must not be filled again.
    """
    async with Cluster(nodes=2, block_size=64 << 10, blocks=400) as cluster:
        device = await cluster.volume(4 << 20, write_bytes=2 << 20, read_bytes=4 << 20)
        pool = BufferPool(1 << 20)

        def received(value: int) -> memoryview:
            buffer = pool.take(1 << 20)
            buffer[:] = bytes([value]) * len(buffer)
            return buffer

        for turn in range(4):
            await device.write(0, received(2 * turn + 1))
            await device.write(1 << 20, received(2 * turn + 2))
            assert await device.read(0, 1 << 20) == bytes([2 * turn + 1]) * (1 << 20)
            await device.flush()
            device.client.session("v").file.cache._entries.clear()
            assert await device.read(0, 2 << 20) == bytes([2 * turn + 1]) * (1 << 20) + bytes(
                [2 * turn + 2]
            ) * (1 << 20)


@virtual
async def test_reads_are_never_stale_after_overwrites_and_discards() -> None:
    """Blocks that are overwritten all the time, and discarded from the ring, are read right."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, read_bytes=0, write_bytes=2 * BLOCK)

        async def read_all_the_time() -> None:
            while True:
                found = await device.read(0, BLOCK)
                assert found == found[:1] * BLOCK
                assert found[0] >= acknowledged
                await asyncio.sleep(0.001)

        acknowledged = 0
        await device.write(0, bytes(BLOCK))
        readers = [asyncio.ensure_future(read_all_the_time()) for _ in range(4)]
        for n in range(1, 120):
            await device.write(0, bytes([n]) * BLOCK)
            acknowledged = n - 1
            await asyncio.sleep(0.02)
            if n % 40 == 0:
                await device.flush()
        for reader in readers:
            if reader.done():
                reader.result()
            reader.cancel()
        await asyncio.wait(readers)
        assert max(len(node.refs()) for node in cluster.nodes.values()) < 20


@virtual
async def test_a_read_whose_block_is_collected_meanwhile_reads_what_took_its_place() -> None:
    """A read waits for nodes that are cut off; when they are back they have collected the block.

    It was in a head, and nobody discarded it: what was written over it is the volume's since.
    """
    async with Cluster(nodes=4, replication=2, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE, read_bytes=0)
        await device.write(0, b"1" * BLOCK, fua=True)
        client = device.client
        first = {ref for node in cluster.nodes.values() for ref in node.refs()}
        having = [node for node in cluster.nodes.values() if node.refs()]
        for node in having:
            cluster.network.cut(client.node_id, node.node_id)
        reading = asyncio.ensure_future(device.read(0, BLOCK))
        await asyncio.sleep(0.1)
        await device.write(0, b"2" * BLOCK, fua=True)
        await client.actor("replicator").reclaim.remote()
        for node in having:
            await until(lambda node=node: not node.refs() & first)  # type: ignore[misc]
        assert not reading.done()
        cluster.network.heal()
        assert await reading == b"2" * BLOCK


@pytest.mark.parametrize("op", [Op.READ, Op.TRIM])
@virtual
async def test_who_waits_for_a_page_that_is_trimmed_and_collected_meanwhile_looks_anew(
    op: Op,
) -> None:
    """The same of a page of the map: what it told of are holes since, and it is not missed."""
    async with Cluster(nodes=4, replication=1, collect_s=1.0) as cluster:
        device = await cluster.volume(3 * FANOUT * BLOCK, read_bytes=0)
        at = FANOUT * BLOCK
        for n in range(3):
            await device.write(n * at, b"1" * BLOCK)
        await device.release()
        client = device.client
        device = await client.open("v")
        await device.read(0, 1)  # so that only the page of those blocks is to be loaded
        with pytest.raises(PageNeeded) as needed:
            client.session("v").file.blockset.get(FANOUT)
        ref = needed.value.ref
        having = [node for node in cluster.nodes.values() if ref in node.refs(1)]
        assert len(having) == 1
        cluster.network.cut(client.node_id, having[0].node_id)
        waiting = asyncio.ensure_future(device.do(op, at, 100 * BLOCK))
        await asyncio.sleep(0.1)
        await device.trim(at, at)
        await device.write(0, b"2" * BLOCK, fua=True)
        await client.actor("replicator").reclaim.remote()
        await until(lambda: ref not in having[0].refs(1))
        assert not waiting.done()
        cluster.network.heal()
        assert not (await waiting).error
        assert await device.read(at, BLOCK) == bytes(BLOCK)


@virtual
async def test_what_a_client_says_it_will_read_is_fetched() -> None:
    """CACHE: what it names is in the read cache when it is answered, holes and all."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, read_bytes=SIZE)
        await device.write(100, b"x" * (6 * BLOCK))
        await device.flush()
        device.client.session("v").file.cache._entries.clear()
        await device.do(Op.CACHE, 1000, 10 * BLOCK)
        cluster.network.hanging.update(cluster.ids)
        assert await device.read(1000, 10 * BLOCK) == b"x" * (6 * BLOCK - 900) + bytes(
            4 * BLOCK + 900
        )


@virtual
async def test_a_request_to_cache_all_of_a_volume_takes_little_memory() -> None:
    """It is advice: followed for a share of the read cache, a few blocks at a time.

    So are a hundred of them, and each is answered.
    """
    async with Cluster() as cluster:
        cache_bytes = 32 * BLOCK
        device = await cluster.volume(SIZE, read_bytes=cache_bytes)
        await device.write(0, b"x" * SIZE)
        await device.flush()
        file = device.client.session("v").file
        read_at, asked = file.read_at, []

        def watched(offset: int, length: int, *args: Any) -> Any:
            asked.append((offset, length))
            return read_at(offset, length, *args)

        file.read_at = watched  # type: ignore[method-assign]
        requests = [Request(Op.CACHE, 5, SIZE - 5, 0) for _ in range(100)]
        for reply in await asyncio.gather(*device.submit(*requests)):
            assert not reply.error
        assert max(length for _, length in asked) <= 4 * BLOCK
        assert max(offset + length for offset, length in asked) == 5 + cache_bytes // 4
        assert sum(length for _, length in asked) <= 5 * cache_bytes // 4


@virtual
async def test_no_read_costs_more_for_all_the_reads_before_it() -> None:
    """Found by reading: how far to read ahead was a number of as many bits as reads in a row."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, read_bytes=SIZE)
        for offset in range(0, SIZE, 4096):
            await device.read(offset, 4096)
        assert device.client.session("v").file._streams == {SIZE: STREAM_COUNT_MAX}
        assert 1 << (STREAM_COUNT_MAX - SEQUENTIAL_AFTER) >= READAHEAD_MAX


@virtual
async def test_a_request_to_cache_tells_of_what_cannot_be_read() -> None:
    """With every node gone it fails, and so does the next one; neither waits for ever."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE, read_bytes=SIZE)
        await device.write(0, b"x" * SIZE)
        await device.flush()
        device.client.session("v").file.cache._entries.clear()
        for n in range(len(cluster.ids)):
            await cluster.node(n).crash()
        for reply in await asyncio.gather(
            *device.submit(*(Request(Op.CACHE, 0, SIZE, 0) for _ in range(2)))
        ):
            assert reply.error == Errno.EIO


def test_the_read_cache_keeps_its_bound() -> None:
    """Whole blocks and pages, small and large.

    The accounted size never exceeds the bound by more than one entry, and is right when all is
    replaced.
    """
    cache = ReadCache(100_000)
    for n in range(500):
        ref = n.to_bytes(24, "little")
        if n % 2:
            cache.put_whole(ref, bytes(16_384))
        else:
            cache.put_pages(ref, 4096, bytes(8192))
            cache.put_whole(ref, bytes(16_384))
            cache.put_pages(ref, 0, bytes(4096))
        assert cache.size <= cache.size_max + 17_000
        assert cache.size == sum(entry.size for entry in cache._entries.values())


def test_the_read_cache_does_not_keep_large_buffers_alive_for_small_parts() -> None:
    """A block out of a much larger buffer is copied; one that is most of its buffer is not."""
    cache = ReadCache(1 << 20)
    large, own = bytearray(1 << 20), bytearray(16_384)
    cache.put_whole(b"a" * 24, memoryview(large)[:16_384])
    cache.put_whole(b"b" * 24, memoryview(own))
    part, whole = cache.whole(b"a" * 24), cache.whole(b"b" * 24)
    assert isinstance(part, bytes)
    assert isinstance(whole, memoryview) and whole.obj is own


def test_the_layers_account_for_what_they_hold() -> None:
    """Writes, zeros, freezes, thaws and drops: the size is always that of what is there."""
    layers = WriteBack(1 << 20)
    layers.write(1, 0, b"x" * 100)
    frozen = layers.freeze(1)
    layers.write(1, 50, b"y" * 100)
    layers.zero(1, 0, 10)
    layers.thaw(1)
    assert (
        b"".join(
            bytes(size) if buffer is None else bytes(buffer)  # type: ignore[arg-type]
            for _, size, buffer in layers.read(1, 0, 150)
        )
        == bytes(10) + b"x" * 40 + b"y" * 100
    )
    assert layers.freeze(1) is frozen
    layers.write(2, 0, b"z")
    layers.settle(1, frozen, None, 0)
    layers.drop(2, 3)
    assert layers.size == 0 and not list(layers.indexes())


@virtual
async def test_the_ends_of_large_writes_do_not_keep_all_of_them_alive() -> None:
    """What is in the middle is stored or trimmed soon; parts of blocks stay for minutes."""
    async with Cluster() as cluster:
        device = await cluster.volume(4096 * BLOCK, write_bytes=64 * BLOCK)
        file = device.client.session("v").file
        pool = BufferPool(0)
        size = 16 * BLOCK + 1024
        for n in range(10):
            data = pool.take(size)
            data[:] = b"x" * size
            await device.write(n * 70 * BLOCK + BLOCK - 512, data)
            del data
            await asyncio.sleep(0.5)
            await device.zero(n * 70 * BLOCK + BLOCK, 16 * BLOCK)
        assert sum(len(memory) for _, memory in pool._in_use.values()) <= 4 * file.layers.size
        assert await device.read(BLOCK - 512, 512) == b"x" * 512


@virtual
async def test_zeros_that_stay_allocated_are_never_fast() -> None:
    """The protocol wants ENOTSUP for what cannot be fast: qemu then writes the zeros itself."""
    async with Cluster() as cluster:
        device = await cluster.volume(64 * BLOCK)
        with pytest.raises(DeviceError) as refused:
            await device.do(Op.WRITE_ZEROES, 0, length=4096, no_hole=True, fast_zero=True)
        assert refused.value.errno == Errno.ENOTSUP


def fill(node: StorageNode, kind: int) -> list[BlockRef]:
    """Leave a node no room for blocks of a kind; returns what takes it."""
    fillers: list[BlockRef] = []
    while node.stores[kind].stats().free:
        fillers.append(BlockRef.of(77, 1, len(fillers), BlockType(kind)))
        node.stores[kind].put(fillers[-1], b"f")
    return fillers


@pytest.mark.parametrize("asks", [False, True])
@virtual
async def test_commits_that_fail_fill_no_node_with_pages(asks: bool) -> None:
    """One of two nodes has no room for pages, the other takes those of each attempt.

    Found by review: no collector may delete them before a head is stored, which never was again.
    """
    async with Cluster(nodes=2, replication=2, inode_copies=2, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"y" * BLOCK)
        await device.flush()
        small, other = cluster.node(0), cluster.node(1)
        before = len(other.refs(1))
        fillers = fill(small, 1)
        await device.write(0, b"x" * BLOCK)
        for _ in range(40):
            if asks:
                with pytest.raises(DeviceError):
                    await device.flush()
            else:
                await asyncio.sleep(5.0)
        await asyncio.sleep(2.0)
        assert len(other.refs(1)) <= before + 2
        small.stores[1].delete(fillers)
        await small.actor("block_store").flush.remote()
        await device.flush()


@virtual
async def test_writes_that_fail_fill_no_node_with_copies() -> None:
    """One of two nodes has no room for data, and each attempt is of other data."""
    async with Cluster(nodes=2, replication=2, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE)
        small, other = cluster.node(0), cluster.node(1)
        fillers = fill(small, 0)
        for n in range(40):
            with contextlib.suppress(DeviceError):
                await device.write(0, bytes([n]) * BLOCK)
            with pytest.raises(DeviceError):
                await device.flush()
            await asyncio.sleep(1.0)
        assert len(other.refs()) <= 3
        small.stores[0].delete(fillers)
        await small.actor("block_store").flush.remote()
        await asyncio.sleep(5.0)
        await device.write(0, b"last" * (BLOCK // 4))
        await device.flush()


@pytest.mark.parametrize("failure", [Fenced("another session"), OutOfSpace("full")])
@virtual
async def test_a_write_that_is_refused_is_not_kept_in_memory(failure: TorusError) -> None:
    """Nor what any of the others held: the error is one that was kept."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        session = device.client.session("v")
        if isinstance(failure, Fenced):
            session.fence(failure)
        else:
            session.file.put_error = failure
        pool = BufferPool()
        for n in range(20):
            data = pool.take(BLOCK)
            with pytest.raises(DeviceError):
                await device.write(n * BLOCK, data)
            with contextlib.suppress(DeviceError):
                await device.flush()
            del data
        gc.collect()
        assert pool.in_use <= 1
