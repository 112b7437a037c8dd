"""Volumes that become smaller, and larger again: what was cut off is gone, and nothing else is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from unittest.mock import AsyncMock

import pytest

from tests.fakes import Client, Cluster, Device, DeviceError, until, virtual
from tests.unit.test_snapshots import (
    content,
    crashes_at_each_step,
    pattern,
    restore,
    shrink,
    snapshot,
)
from tests.unit.test_volume_flush import BLOCK, SIZE
from torus_actors.errors import Invalid, Locked, NotExist, OutcomeUnknown, OutOfSpace
from torus_actors.metadata import keys as table
from torus_actors.nbd.protocol import Errno
from torus_actors.volume import opening
from torus_actors.volume.commit import Committer

HALF = SIZE // 2


async def written(cluster: Cluster) -> None:
    """Volume ``v``, full and closed."""
    device = await cluster.volume(SIZE)
    await device.write(0, pattern(1))
    await device.release()


@pytest.mark.parametrize("size", [HALF, HALF + 100, SIZE - 100, BLOCK // 2, 4096])
@pytest.mark.parametrize("opened", [False, True])
@virtual
async def test_what_was_cut_off_is_zeros_when_the_volume_grows_again(
    size: int, opened: bool
) -> None:
    """At a block's end, within a block, down to a part of one; used in between, or not."""
    async with Cluster(journals=True) as cluster:
        await written(cluster)
        client = await cluster.client()
        await shrink(client, size)
        assert (await cluster.meta.volume("v")).size == size
        assert (await cluster.meta.lock_status(1))[0] is None
        if opened:
            assert await content(cluster, "v", size) == pattern(1)[:size]
        await cluster.meta.resize_volume("v", SIZE)
        assert await content(cluster, "v") == pattern(1)[:size] + bytes(SIZE - size)
        device = await client.open("v")
        await device.write(SIZE - 50, b"new" * 10)
        await device.release()
        assert (await content(cluster, "v"))[: SIZE - 50] == pattern(1)[:size] + bytes(
            SIZE - size - 50
        )


@virtual
async def test_a_volume_that_was_never_written_to_shrinks_too() -> None:
    """There is no head yet; there is one afterwards."""
    async with Cluster() as cluster:
        await cluster.meta.create_volume("v", SIZE)
        client = await cluster.client()
        await shrink(client, 100)
        assert await content(cluster, "v", 100) == bytes(100)
        with pytest.raises(Invalid):
            await shrink(client, 101)
        with pytest.raises(NotExist):
            await shrink(client, 10, "none")


@virtual
async def test_a_volume_in_use_is_not_cut() -> None:
    """The error says who has it; it may grow, and whoever opens it again sees that."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        with pytest.raises(Locked):
            await shrink(await cluster.client(), HALF)
        await cluster.meta.resize_volume("v", 2 * SIZE)
        await device.flush()
        await device.release()
        assert await content(cluster, "v", 2 * SIZE) == pattern(1) + bytes(SIZE)


@virtual
async def test_what_the_journal_has_is_kept_up_to_the_cut() -> None:
    """The volume was not closed in order: what was flushed is there, without what lies behind."""
    async with Cluster(journals=True) as cluster:
        await in_the_journal(cluster)
        await shrink(await cluster.client(), HALF)
        await cluster.meta.resize_volume("v", SIZE)
        assert await content(cluster, "v") == FLUSHED[:HALF] + bytes(HALF)


@virtual
async def test_shrinking_fences_who_was_there() -> None:
    """A client whose lease ended gets nothing acknowledged any more, before the cut or behind."""
    async with Cluster(journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await device.flush()
        device.client.store.down = True
        await asyncio.sleep(30)
        await device.write(200, b"still flushed")
        await device.flush()
        await shrink(await cluster.client(), HALF)
        await device.write(SIZE - 100, b"too late")
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.ESHUTDOWN
        expected = bytearray(pattern(1)[:HALF])
        expected[200:213] = b"still flushed"
        assert await content(cluster, "v", HALF) == expected


@virtual
async def test_a_snapshot_keeps_what_is_cut_off() -> None:
    """Going back to it brings the size and the end back."""
    async with Cluster() as cluster:
        await written(cluster)
        await snapshot(cluster, "s")
        client = await cluster.client()
        await shrink(client, HALF)
        assert await content(cluster, "v@s") == pattern(1)
        await restore(client, "s")
        assert await content(cluster, "v") == pattern(1)


@virtual
async def test_what_is_cut_off_is_collected() -> None:
    """The blocks behind the cut are garbage at once."""
    async with Cluster(nodes=2, collect_s=2.0) as cluster:
        await written(cluster)
        await shrink(await cluster.client(), HALF)
        await asyncio.sleep(60)
        assert len(cluster.node(0).refs()) == HALF // BLOCK


@virtual
async def test_who_gives_up_cutting_a_volume_keeps_no_lock() -> None:
    """At any moment: this process lives on, and with it what hangs on its lease."""
    async with Cluster(journals=True) as cluster:
        await written(cluster)
        client = await cluster.client()
        for step in itertools.count():
            shrinking = asyncio.ensure_future(shrink(client, HALF))
            await asyncio.sleep(step * 0.0004)
            if shrinking.done():
                break
            shrinking.cancel()
            await asyncio.wait([shrinking])
            await asyncio.sleep(10.0)
            assert (await cluster.meta.lock_status(1))[0] is None, step
        assert step > 5
        assert await content(cluster, "v", HALF) == pattern(1)[:HALF]


@virtual
async def test_a_volume_that_grows_while_it_is_cut_is_one_or_the_other() -> None:
    """Whatever the order of the two, no record of a size gets lost between them."""
    async with Cluster() as cluster:
        await written(cluster)
        client = await cluster.client()
        commit_head = client.meta.commit_head

        async def before(*args: int, **options: bool) -> int:
            await cluster.meta.resize_volume("v", 2 * SIZE)
            return await commit_head(*args, **options)  # type: ignore[arg-type]

        client.meta.commit_head = before  # type: ignore[assignment, method-assign]
        await shrink(client, HALF)
        assert await content(cluster, "v", HALF) == pattern(1)[:HALF]

        read = client.meta._read

        async def grows_behind(key: str, kind: type) -> object:
            found = await read(key, kind)
            if key == cluster.meta.keys.of(table.VOLUME, 1):
                client.meta._read = read  # type: ignore[method-assign]
                await cluster.meta.resize_volume("v", SIZE)
            return found

        async def beside(*args: int, **options: bool) -> int:
            client.meta._read = grows_behind  # type: ignore[assignment, method-assign]
            return await commit_head(*args, **options)  # type: ignore[arg-type]

        client.meta.commit_head = beside  # type: ignore[assignment, method-assign]
        with pytest.raises(OutcomeUnknown):
            await shrink(client, BLOCK)
        assert await content(cluster, "v") == pattern(1)[:HALF] + bytes(HALF)


FLUSHED = pattern(2)[:100] + b"in the journal" + pattern(2)[114:-100] + b"j" * 100


async def in_the_journal(cluster: Cluster) -> None:
    """Volume ``v``, whose client was killed after a flush."""
    device = await cluster.volume(SIZE)
    await device.write(0, pattern(2))
    await device.flush()
    assert device.client.session("v").journal.active
    await device.write(100, b"in the journal")
    await device.write(SIZE - 100, b"j" * 100)
    await device.flush()
    await device.client.crash()
    await asyncio.sleep(30)


@pytest.mark.long
@virtual
async def test_a_crash_while_shrinking_leaves_the_old_or_the_new() -> None:
    """The tool dies between any two of its steps: all is there, or the end is gone for good."""
    size = HALF + 100

    async def prepare(cluster: Cluster) -> Device | None:
        await in_the_journal(cluster)
        return None

    async def act(cluster: Cluster, client: Client) -> None:
        await shrink(client, size)

    async def judge(cluster: Cluster, whole: bool) -> None:
        cut = (await cluster.meta.volume("v")).size == size
        assert cut or not whole
        await cluster.meta.resize_volume("v", SIZE)
        expected = FLUSHED[:size] + bytes(SIZE - size) if cut else FLUSHED
        assert await content(cluster, "v") == expected

    assert await crashes_at_each_step(prepare, act, judge) > 20


# -- while a volume is being opened ----------------------------------------------------------------


async def opened_while(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], Awaitable[None]]
) -> Device:
    """Open ``v``; something happens after its record was read and before its lock is taken."""
    client = await cluster.client()
    attach = opening.attach

    async def late(*args: object) -> tuple[int, int]:
        monkeypatch.setattr(opening, "attach", attach)
        await meanwhile()
        return await attach(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "attach", late)
    return await client.open("v")


@pytest.mark.parametrize("tool", ["shrink", "restore", "grow"])
@virtual
async def test_a_session_has_the_size_that_the_volume_has_under_its_lock(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tool changed it just before: nothing is served that does not belong to it any more.

    What is flushed at its end is there when it is opened again.
    """
    async with Cluster(journals=True) as cluster:
        await written(cluster)
        await snapshot(cluster, "small")
        await cluster.meta.resize_volume("v", 2 * SIZE)
        other = await cluster.client()

        async def meanwhile() -> None:
            if tool == "shrink":
                await shrink(other, SIZE)
            elif tool == "restore":
                await restore(other, "small")
            else:
                await cluster.meta.resize_volume("v", 3 * SIZE)

        device = await opened_while(cluster, monkeypatch, meanwhile)
        size = (await cluster.meta.volume("v")).size
        assert device.size == size == (3 * SIZE if tool == "grow" else SIZE)
        await device.write(size - 4096, b"Z" * 4096)
        await device.flush()
        await device.release()
        expected = pattern(1) + bytes(size - SIZE)
        assert await content(cluster, "v", size) == expected[:-4096] + b"Z" * 4096


@virtual
async def test_a_head_of_a_part_does_not_bring_back_what_was_cut_off() -> None:
    """A full cluster has one recorded before the first whole one of a session that is larger.

    Found by review: the rest of the block that was cut in two was there again after a crash.
    """
    async with Cluster(journals=True) as cluster:
        await written(cluster)
        client = await cluster.client()
        await shrink(client, HALF + 100)
        await cluster.meta.resize_volume("v", SIZE)
        for _ in range(2):
            device = await client.open("v")
            await device.write(0, pattern(2)[:BLOCK])
            await device.client.session("v").committer._checkpoint()
            await client.crash()
            await asyncio.sleep(10.0)
            client = await cluster.client()
        found = await content(cluster, "v")
        assert found[BLOCK:] == pattern(1)[BLOCK : HALF + 100] + bytes(HALF - 100)
        head, _ = await cluster.meta.head(1)
        assert head is not None and head.size == SIZE


@virtual
async def test_a_head_of_a_part_cuts_no_more_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The volume was made larger since its last head, and the cluster is full as it is cut."""
    commit = Committer.commit

    async def in_parts(self: Committer, force: bool = False) -> None:
        await self._checkpoint()
        await commit(self, force)

    async with Cluster(journals=True) as cluster:
        await written(cluster)
        await cluster.meta.resize_volume("v", 2 * SIZE)
        monkeypatch.setattr(Committer, "commit", in_parts)
        await shrink(await cluster.client(), SIZE + HALF)
        assert (await cluster.meta.volume("v")).size == SIZE + HALF
        head, _ = await cluster.meta.head(1)
        assert head is not None and head.size == SIZE + HALF
        assert await content(cluster, "v", SIZE + HALF) == pattern(1) + bytes(HALF)


@virtual
async def test_what_a_head_of_a_part_has_behind_its_end_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session that is larger than the last head stores some of what it has, and crashes.

    The volume is cut to where that head ended, and has nothing there when it grows again.
    """
    async with Cluster(journals=True) as cluster:
        await written(cluster)
        await cluster.meta.resize_volume("v", 2 * SIZE)
        with monkeypatch.context() as patch:
            patch.setattr(Committer, "commit", AsyncMock(side_effect=OutOfSpace("full")))
            device = await (await cluster.client()).open("v")
        await device.write(SIZE, b"x" * BLOCK)
        file = device.client.session("v").file
        await until(lambda: not file.layers.size)
        await device.client.session("v").committer._checkpoint()
        head, _ = await cluster.meta.head(1)
        assert head is not None and head.size == SIZE
        await device.client.crash()
        await asyncio.sleep(10.0)
        await shrink(await cluster.client(), SIZE)
        await cluster.meta.resize_volume("v", 2 * SIZE)
        assert await content(cluster, "v", 2 * SIZE) == pattern(1) + bytes(SIZE)


@virtual
async def test_what_a_part_cuts_off_is_not_replayed_when_the_volume_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cluster is full: the head of a part is recorded, the size with it, and then no other."""

    async def full(self: Committer, force: bool = False) -> None:
        await self._checkpoint()
        raise OutOfSpace("the cluster is full")

    async with Cluster(journals=True) as cluster:
        await in_the_journal(cluster)
        with monkeypatch.context() as patch:
            patch.setattr(Committer, "commit", full)
            await shrink(await cluster.client(), HALF)
        assert (await cluster.meta.volume("v")).size == HALF
        await cluster.meta.resize_volume("v", SIZE)
        assert await content(cluster, "v") == FLUSHED[:HALF] + bytes(HALF)


@virtual
async def test_a_cut_that_cannot_be_committed_speaks_of_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody wrote to the session that does it, and what it replayed is where it was."""
    async with Cluster(journals=True) as cluster:
        await in_the_journal(cluster)
        with monkeypatch.context() as patch:
            patch.setattr(Committer, "commit", AsyncMock(side_effect=OutOfSpace("full")))
            with pytest.raises(OutcomeUnknown) as failed:
                await shrink(await cluster.client(), HALF)
        assert ": full;" in str(failed.value) and "lost" not in str(failed.value)
        assert await content(cluster, "v") == FLUSHED
