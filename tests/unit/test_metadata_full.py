"""Metadata that answer and take nothing, for want of room or because they are damaged."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes import Client, Cluster, until, virtual
from torus_actors.errors import Corruption, OutcomeUnknown, OutOfSpace, TorusError
from torus_actors.volume.snapshots import take_snapshot

SIZE = 1 << 20

ERRORS = pytest.mark.parametrize(
    "error", [OutOfSpace("full"), Corruption("malformed")], ids=lambda e: type(e).__name__
)


@contextlib.contextmanager
def refusing(client: Client, error: TorusError) -> Iterator[None]:
    """The metadata take nothing from a client."""
    txn = client.store.txn

    async def refuses(compare: Any, then: Any) -> Any:
        raise error

    client.store.txn = refuses  # type: ignore[method-assign]
    try:
        yield
    finally:
        client.store.txn = txn  # type: ignore[method-assign]


@ERRORS
@virtual
async def test_a_lock_that_a_full_store_did_not_let_go_is_let_go_later(error: TorusError) -> None:
    """Nobody has the volume open; the process lives on, and so does its lease."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        client = device.client
        volume_id = client.session("v").volume_id
        with refusing(client, error):
            await asyncio.gather(device.release(), return_exceptions=True)
        assert "v" not in client.system.heirlooms["open_volumes"]
        await asyncio.sleep(300.0)
        lock, _ = await cluster.meta.lock_status(volume_id)
        assert lock is None
        again = await (await cluster.client()).open("v")
        await again.release()


@ERRORS
@virtual
async def test_a_readers_record_that_a_full_store_did_not_let_go_is_let_go_later(
    error: TorusError,
) -> None:
    """It keeps all garbage of the volume as long as it is there."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x")
        await device.release()
        client = await cluster.client(read_only=True)
        device = await client.open("v")
        assert (await cluster.meta.state()).readers
        with refusing(client, error):
            await asyncio.gather(device.release(), return_exceptions=True)
        await asyncio.sleep(300.0)
        assert not (await cluster.meta.state()).readers


@ERRORS
@virtual
async def test_an_opening_whose_answer_is_lost_before_the_store_fills_up_keeps_no_lock(
    error: TorusError,
) -> None:
    """The first copy of the request was taken, its answer lost; the second finds no room."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        volume_id = device.client.session("v").volume_id
        await device.release()
        client = await cluster.client()
        txn = client.store.txn
        sent = 0

        async def unlucky(compare: Any, then: Any) -> Any:
            nonlocal sent
            sent += 1
            if sent == 1:
                await txn(compare, then)
                raise OutcomeUnknown("the answer was lost")
            raise error

        client.store.txn = unlucky  # type: ignore[method-assign]
        with pytest.raises(TorusError):
            await client.open("v")
        client.store.txn = txn  # type: ignore[method-assign]
        await asyncio.sleep(300.0)
        lock, _ = await cluster.meta.lock_status(volume_id)
        assert lock is None


@pytest.mark.parametrize("dies", [False, True])
@ERRORS
@virtual
async def test_a_lock_that_found_no_room_under_a_new_lease_is_made_as_soon_as_there_is_some(
    error: TorusError, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease found room and the lock did not: else anybody could delete a volume in use.

    The heartbeat may die meanwhile.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        volume_id = device.client.session("v").volume_id
        heartbeat = device.client.system.cells["heartbeat"].actor
        renew, failures = heartbeat._meta.renew_lock, 1

        async def full(*args: Any) -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise error
            await renew(*args)

        monkeypatch.setattr(heartbeat._meta, "renew_lock", full)
        await cluster.store.lease_revoke(await device.client.actor("heartbeat").lease.remote())
        if dies:
            await until(lambda: failures == 0 and heartbeat._lease)
            device.client.kill("heartbeat")
        await asyncio.sleep(300.0)
        await device.write(0, b"still in use")
        await device.flush()
        lock, epoch = await cluster.meta.lock_status(volume_id)
        assert lock is not None and lock.epoch == epoch


@pytest.mark.parametrize("writing", [False, True])
@ERRORS
@virtual
async def test_a_snapshot_that_finds_no_room_harms_no_volume(
    error: TorusError, writing: bool
) -> None:
    """The request for it took the last of it: nobody dies of that, again and again."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x")
        await device.flush()
        client = device.client
        await asyncio.sleep(40.0)  # until all is committed
        with refusing(client, error):
            asking = asyncio.ensure_future(take_snapshot(cluster.meta, 1, "s", 30.0))
            for _ in range(20):
                await asyncio.sleep(1.0)
                if writing:
                    await device.write(4096, b"y", fua=True)
            cells = client.system.cells.items()
            deaths = {name: cell.restarts for name, cell in cells if cell.restarts}
        await asyncio.gather(asking, return_exceptions=True)
        assert not deaths
        assert await device.read(0, 1) == b"x"
