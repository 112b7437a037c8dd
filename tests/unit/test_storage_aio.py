"""Asynchronous I/O: transfers end once, with what they did; a block store that reads by them."""

from __future__ import annotations

import errno
import os
import random
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runtime_harness import on_uvloop, system_of
from torus_actors.actors.block_messages import RANGE, RANGE_STATUS, Status, split_records
from torus_actors.actors.block_store import BlockStoreActor, OpenStores, StoreConfig
from torus_actors.actors.disk import disk_workers
from torus_actors.model.buffers import aligned
from torus_actors.model.checksums import root_of, sums_of, verify_range
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ChildSpec
from torus_actors.storage.aio import READ, WRITE, AioQueue, Transfer
from torus_actors.storage.mfile import MFileStore

PAGE = 4096
BLOCK = 64 << 10


@pytest.fixture
def queue() -> Iterator[AioQueue]:
    """A queue of four."""
    queue = AioQueue(4)
    yield queue
    queue.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of 64 pages, opened past the page cache."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(64 * PAGE))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


def wait(queue: AioQueue, results: list[Any], count: int) -> None:
    """Reap until so many have ended."""
    poll = select.poll()
    poll.register(queue.notify_fd, select.POLLIN)
    end = time.monotonic() + 10
    while len(results) < count:
        assert time.monotonic() < end, results
        poll.poll(1000)
        queue.reap()


def test_what_is_written_is_read(queue: AioQueue, file: int) -> None:
    """Several at once, each to its own place; the queue is free again afterwards."""
    results: list[int] = []
    pages = [aligned(PAGE) for _ in range(3)]
    for n, page in enumerate(pages):
        page[:] = bytes([n + 1]) * PAGE
    writes = [Transfer(WRITE, file, p, 2 * n * PAGE, results.append) for n, p in enumerate(pages)]
    assert queue.start(writes) == 3
    wait(queue, results, 3)
    assert results == [PAGE] * 3 and not queue.busy
    back = [aligned(PAGE) for _ in range(3)]
    reads = [Transfer(READ, file, p, 2 * n * PAGE, results.append) for n, p in enumerate(back)]
    assert queue.start(reads) == 3
    wait(queue, results, 6)
    assert back == pages


def test_no_more_than_its_depth_are_started(queue: AioQueue, file: int) -> None:
    """The rest is left to the caller, and a later start finds room."""
    results: list[int] = []
    reads = [Transfer(READ, file, aligned(PAGE), n * PAGE, results.append) for n in range(10)]
    assert queue.start(reads) == 4
    assert queue.start(reads[4:]) == 0 or queue.busy <= 4
    wait(queue, results, 4)
    assert queue.start(reads[4:6]) == 2
    wait(queue, results, 6)


def test_errors_are_told(queue: AioQueue, file: int) -> None:
    """Memory in the wrong place, a short read, a bad descriptor: nothing is taken for success."""
    results: list[int] = []
    shifted = aligned(2 * PAGE)[1 : PAGE + 1]
    started = queue.start([Transfer(READ, file, shifted, 0, results.append)])
    wait(queue, results, started)
    assert not started or results == [-errno.EINVAL]
    results.clear()
    assert queue.start([Transfer(READ, file, aligned(2 * PAGE), 63 * PAGE, results.append)]) == 1
    wait(queue, results, 1)
    assert results == [PAGE]
    assert queue.start([Transfer(READ, 1 << 20, aligned(PAGE), 0, results.append)]) == 0
    assert not queue.busy


def test_reaping_nothing_is_fine(queue: AioQueue) -> None:
    """A wake-up for nothing, and closing twice, do nothing."""
    queue.reap()
    queue.close()
    queue.close()


class Store:
    """A block store actor on real files."""

    def __init__(self, system: Any, opened: OpenStores) -> None:
        self.actor = system.actor("block_store")
        self.opened = opened

    async def put(self, ref: BlockRef, data: bytes) -> None:
        """Store a block."""
        sums = sums_of(data)
        await self.actor.put_block.remote(ref, root_of(sums), sums, payload=memoryview(data))

    async def read(self, data: dict[BlockRef, bytes], *ranges: tuple[BlockRef, int, int]) -> None:
        """Read ranges in one message, and compare and verify each."""
        packed = b"".join(RANGE.pack(*each) for each in ranges)
        answer = await self.actor.read_ranges.remote(packed)
        parts = iter(answer.payload)
        statuses = split_records(RANGE_STATUS, answer.result)
        for (ref, offset, length), (status, _, _) in zip(ranges, statuses, strict=True):
            assert status == Status.OK
            sums, got = bytes(next(parts)), next(parts)
            assert got == data[ref][offset : offset + length]
            verify_range(sums, root_of(sums_of(data[ref])), offset, got)


def test_a_block_store_reads_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small reads of what was just put, or read before, need no thread; all bytes are right.

    A block whose checksum list is not known is read by a thread once. One that ends within a page
    is read whole.
    """
    by_thread: list[int] = []
    read = MFileStore.read

    def counted(self: MFileStore, *args: Any) -> Any:
        by_thread.append(1)
        return read(self, *args)

    monkeypatch.setattr(MFileStore, "read", counted)
    rng = random.Random(2)
    data = {BlockRef.of(1, 1, n): rng.randbytes(BLOCK - 100 * (n == 3)) for n in range(8)}
    refs = list(data)

    async def play() -> None:
        for life in range(2):
            async with system_of() as system:
                opened = OpenStores.open(
                    system, StoreConfig(tmp_path, 64 << 20, BLOCK), random.Random(3)
                )
                for spec in disk_workers(opened.stores):
                    await system.spawn(spec)
                actor = ChildSpec("block_store", lambda: BlockStoreActor(opened))  # noqa: B023
                await system.spawn(actor)
                store = Store(system, opened)
                assert opened.aio is not None, "this file system should know direct I/O"
                if not life:
                    for ref, block in data.items():
                        await store.put(ref, block)
                    await opened.flush()
                else:
                    await store.read(data, *[(ref, PAGE, PAGE) for ref in refs])
                    assert sum(by_thread) == len(refs)
                by_thread.clear()
                for _ in range(3):  # the second time it may be in the page cache
                    ends = [(ref, 15 * PAGE, len(data[ref]) - 15 * PAGE) for ref in refs]
                    await store.read(data, *ends, *[(ref, 0, 2 * PAGE) for ref in refs])
                assert not by_thread
                await store.read(
                    data, *[(ref, 0, len(data[ref])) for ref in refs if ref != refs[3]]
                )
                for name in ("block_store", *[spec.name for spec in disk_workers([])]):
                    await system.remove(name)
                opened.close()

    on_uvloop(play)()
