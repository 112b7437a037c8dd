"""Opening a volume on a full cluster, after a record that not all members of its journal have."""

from __future__ import annotations

import asyncio
import random
import uuid
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import msgpack
import pytest

from tests.fakes import Cluster, StorageNode, virtual
from tests.unit.test_snapshots import content, pattern
from tests.unit.test_volume_flush import SIZE
from torus_actors.errors import Again, OutOfSpace
from torus_actors.metadata.records import Head, Journal
from torus_actors.volume.change_log import empty_record
from torus_actors.volume.commit import Committer
from torus_actors.volume.journal import SessionJournal
from torus_actors.volume.recovery import RECOVER_PATIENCE_S, Unreadable, recover

TOLD = b"one member alone has this"
AT = 5000


async def half_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> tuple[StorageNode, StorageNode]:
    """Volume ``v``: flushed to, then written to; its client crashes as it flushes that.

    Returns:
        The node whose journal has the record, and the one whose has not, which is stopped. No
        commit can be made from now on.
    """
    device = await cluster.volume(SIZE)
    await device.write(0, pattern(1))
    await device.flush()
    journal, _ = await cluster.meta.journal(1)
    assert journal is not None and len(journal.ensemble) == 2
    has, lacks = (cluster.nodes[member] for member in journal.ensemble)

    async def full(*_: object) -> None:
        raise OutOfSpace("the cluster is full")

    monkeypatch.setattr(Committer, "commit", full)
    await lacks.stop()
    await device.write(AT, TOLD)
    with pytest.raises(Exception, match="full"):
        await device.flush()
    await device.client.crash()
    await asyncio.sleep(30)
    return has, lacks


async def is_told(cluster: Cluster) -> bool:
    """Whether who opens the volume, and crashes then, reads what was not flushed."""
    device = await (await cluster.client()).open("v")
    found = bytearray(await device.read(0, SIZE))
    await device.client.crash()
    await asyncio.sleep(30)
    told = found[AT : AT + len(TOLD)] == TOLD
    found[AT : AT + len(TOLD)] = pattern(1)[AT : AT + len(TOLD)]
    assert found == pattern(1)
    return told


@virtual
async def test_what_was_found_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next client waits for the member that has it."""
    async with Cluster(journals=True) as cluster:
        has, lacks = await half_told(cluster, monkeypatch)
        assert await is_told(cluster)
        await has.stop()
        await lacks.start()
        opening = asyncio.get_running_loop().create_task(is_told(cluster))
        await asyncio.sleep(RECOVER_PATIENCE_S / 2)
        await has.start()
        assert await opening


@virtual
async def test_a_close_after_what_was_found_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata have where the journal ended: nothing that was read may be gone any more."""
    async with Cluster(journals=True) as cluster:
        await half_told(cluster, monkeypatch)
        device = await (await cluster.client()).open("v")
        assert await device.read(AT, len(TOLD)) == TOLD
        await device.release()


@virtual
async def test_what_was_not_found_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The member that has the record is back: it was not there for who opened the volume first."""
    async with Cluster(journals=True) as cluster:
        has, lacks = await half_told(cluster, monkeypatch)
        await has.stop()
        await lacks.start()
        assert not await is_told(cluster)
        await has.start()
        assert not await is_told(cluster)
        monkeypatch.undo()
        assert await content(cluster, "v") == pattern(1)


@virtual
async def test_what_was_flushed_is_there_without_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The member that has the record is lost for good: the volume opens, and stays as it is."""
    async with Cluster(journals=True) as cluster:
        has, lacks = await half_told(cluster, monkeypatch)
        assert await is_told(cluster)
        await has.stop()
        await lacks.start()
        assert not await is_told(cluster)
        await has.start()
        assert not await is_told(cluster)


@virtual
async def test_a_close_tells_of_what_was_read_and_may_be_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is nowhere but where one member of the old journal has it, and nobody recorded that."""
    async with Cluster(journals=True) as cluster:
        await half_told(cluster, monkeypatch)
        with monkeypatch.context() as patch:
            away = AsyncMock(side_effect=Again("the metadata are away for a moment"))
            patch.setattr(SessionJournal, "settle_end", away)
            device = await (await cluster.client()).open("v")
        assert await device.read(AT, len(TOLD)) == TOLD
        with pytest.raises(OutOfSpace, match="lost"):
            await device.release()


@virtual
async def test_records_that_begin_too_late_are_not_replayed() -> None:
    """Between what the head has and what a member has some are missing, whoever lost them."""
    member, record = str(uuid.UUID(int=1)), b"".join(empty_record())

    async def fence(*_: Any, **__: Any) -> list[Any]:
        return [1, 3, 4, False, 7, 0]  # epoch, first, last, lost, identity, room

    async def read_tail(volume: int, epoch: int, first: int, size: int) -> Any:
        lengths = [[seq, len(record)] for seq in range(first, 5)]
        return SimpleNamespace(result=lengths, joined=lambda: record * len(lengths))

    home = SimpleNamespace(
        fence=SimpleNamespace(remote=fence), read_tail=SimpleNamespace(remote=read_tail)
    )
    system: Any = SimpleNamespace(
        actor=lambda *_, **__: home, loop=asyncio.get_running_loop(), rng=random.Random(1)
    )
    journal = Journal(epoch=1, ensemble=(member,), extra=msgpack.packb({member: 7}))
    with pytest.raises(Unreadable, match="lacks records before 3"):
        await recover(system, 1, journal, 2, None, patience_s=0.0)
    head = Head(1, bytes(24), 0, SIZE, 1, journal_seq=2)
    assert (await recover(system, 1, journal, 2, head, patience_s=0.0)) is not None
