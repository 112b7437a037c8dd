"""Sessions that only read, opened while the volume changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes import Cluster, virtual
from tests.unit.test_volume_flush import journaling, reopened
from torus_actors.errors import BlockUnavailable
from torus_actors.metadata.records import Head
from torus_actors.nbd.requests import Hole
from torus_actors.volume.opening import open_session
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.session import Session

BLOCK = 16 << 10
SIZE = 32 * BLOCK


async def reader(cluster: Cluster, between: Callable[[], Awaitable[None]], times: int) -> Session:
    """Open ``v``; ``between`` happens after each of the first times that its head is read."""
    client = await cluster.client()
    assert client.system is not None
    meta, head = client.meta, client.meta.head

    async def slowly(volume_id: int) -> tuple[Head | None, int]:
        nonlocal times
        found = await head(volume_id)
        if times:
            times -= 1
            await between()
        return found

    meta.head = slowly  # type: ignore[method-assign]
    return await open_session(
        client.system,
        meta,
        "v",
        holder="reader",
        block_size=BLOCK,
        block_spec="crc,base",
        read_cache=ReadCache(1 << 20),
        write_cache_bytes=1 << 20,
        view=client.view,
        read_only=True,
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
