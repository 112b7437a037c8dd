"""Giving up a journal that was lost with all nodes that had it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import Client, Cluster, StorageNode, until, virtual
from tests.unit.test_snapshots import content, pattern
from tests.unit.test_volume_flush import SIZE
from torus_actors.errors import BlockUnavailable, DeadlineExceeded, Locked, NotExist
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.model.peers import Peer
from torus_actors.model.rings import make_ring
from torus_actors.storage.journal_format import segment_name
from torus_actors.storage.journal_open import UNREADABLE_MAX
from torus_actors.volume import change_log, recovery
from torus_actors.volume.giving_up import give_up_journal
from torus_actors.volume.resizing import shrink_volume
from torus_actors.volume.snapshots import take_snapshot

LATE = b"flushed after the last commit"
AT = 5000


async def give_up(client: Client, volume: str = "v") -> str:
    """Give it up, as a tool does."""
    assert client.system is not None
    return await give_up_journal(client.system, client.meta, client.view, volume, holder="tool")


async def crashed(cluster: Cluster) -> list[StorageNode]:
    """Volume ``v``: committed, then flushed to, then left by a client that crashed.

    Returns:
        The nodes with its journal.
    """
    for node in cluster.nodes.values():
        await node.stop()
        await node.start(rebalancer=True)
    device = await cluster.volume(SIZE)
    await device.write(0, pattern(1))
    await device.flush()
    committed = asyncio.get_running_loop().create_future()
    device.client.session("v").commit_soon(committed.set_result)
    assert await committed is None
    await device.write(AT, LATE)
    await device.flush()
    await device.client.crash()
    await asyncio.sleep(30)
    journal, _ = await cluster.meta.journal(1)
    assert journal is not None and len(journal.ensemble) == 2
    return [cluster.nodes[member] for member in journal.ensemble]


def set_members(cluster: Cluster, ids: list[str]) -> None:
    """Let these be in the ring."""
    peers = [Peer(each, 1 << 30) for each in ids]
    version = cluster.ring.version + 1
    cluster.set_ring(make_ring("mod", version=version, replication=2, peers=peers))


async def lose(cluster: Cluster, nodes: list[StorageNode]) -> None:
    """Take nodes out of the ring; the others get their blocks, and they are never seen again."""
    gone = {node.node_id for node in nodes}
    set_members(cluster, [each for each in cluster.ids if each not in gone])
    await asyncio.sleep(300)
    for node in nodes:
        await node.stop()


async def is_late(cluster: Cluster) -> bool:
    """Whether the volume has what was flushed last; the rest must be as it was committed."""
    found = bytearray(await content(cluster, "v"))
    late = found[AT : AT + len(LATE)] == LATE
    found[AT : AT + len(LATE)] = pattern(1)[AT : AT + len(LATE)]
    assert found == pattern(1)
    return late


@virtual
async def test_a_volume_without_its_journal_is_as_the_last_commit_left_it() -> None:
    """It could not be opened; now it can, and goes on like any other."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        await lose(cluster, await crashed(cluster))
        with pytest.raises(BlockUnavailable) as refused:
            await (await cluster.client()).open("v")
        assert "torusctl debug give-up-journal" in str(refused.value)
        why = await give_up(await cluster.client())
        assert why.startswith("no member of the volume's journal")
        assert (await cluster.meta.lock_status(1))[0] is None
        assert not await is_late(cluster)
        device = await (await cluster.client()).open("v")
        await device.write(AT, LATE)
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(30)
        assert await is_late(cluster)


@virtual
async def test_members_that_come_back_bring_nothing_back() -> None:
    """Whoever opens the volume afterwards asks none of them."""
    async with Cluster(nodes=5, replication=2, journals=True, collect_s=5.0) as cluster:
        lost = await crashed(cluster)
        await lose(cluster, lost)
        assert await give_up(await cluster.client())
        for node in lost:
            await node.start()
        await asyncio.sleep(60)
        assert not await is_late(cluster)
        device = await (await cluster.client()).open("v")
        await device.write(0, pattern(1)[:10])
        await device.flush()
        await device.release()
        assert not await is_late(cluster)


@pytest.mark.parametrize("silent", [1, 2])
@virtual
async def test_a_journal_that_may_come_back_is_not_given_up(silent: int) -> None:
    """A member that is in the ring and does not answer may have it: the error names it."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        members = await crashed(cluster)
        for node in members[:silent]:
            await node.stop()
        await lose(cluster, members[silent:])
        gone = {node.node_id for node in members[silent:]}
        set_members(cluster, [each for each in cluster.ids if each not in gone])
        with pytest.raises(BlockUnavailable, match=f"peer remove {members[0].node_id[:8]}"):
            await give_up(await cluster.client())
        for node in members[:silent]:
            await node.start()
        assert await is_late(cluster)


@virtual
async def test_a_journal_of_another_version_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All its members have it whole, and it is this program that cannot read it.

    Found by reading: what could not be understood counted as what a member says it has lost, and
    the error of opening recommended to give it up.
    """
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        monkeypatch.setattr(change_log, "_MAGIC", b"TJr9")
        await crashed(cluster)
        monkeypatch.undo()
        with pytest.raises(BlockUnavailable, match="open it with the version that wrote it"):
            await (await cluster.client()).open("v")
        with pytest.raises(BlockUnavailable, match="yet: open it with the version that"):
            await give_up(await cluster.client())
        monkeypatch.setattr(change_log, "_MAGIC", b"TJr9")
        assert await is_late(cluster)


@pytest.mark.parametrize("step", ["_fence", "_read_tail"])
@virtual
async def test_a_journal_that_is_slow_to_be_read_is_not_given_up(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members are there and have it: whether they answer in time says nothing of that."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        await crashed(cluster)
        real = getattr(recovery, step)
        began = asyncio.get_running_loop().time()

        async def slow(*of: Any) -> Any:
            if asyncio.get_running_loop().time() < began + recovery.RECOVER_PATIENCE_S:
                raise DeadlineExceeded("no answer before the deadline")
            return await real(*of)

        with monkeypatch.context() as patch:
            patch.setattr(recovery, step, slow)
            with pytest.raises(BlockUnavailable, match="torusctl peer remove"):
                await give_up(await cluster.client())
        assert await is_late(cluster)


@virtual
async def test_members_that_lost_their_journals_need_not_leave() -> None:
    """They say themselves that they have not got it any more."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        for node in await crashed(cluster):
            await node.stop()
            for path in node.disks[2].listdir():
                node.disks[2].unlink(path)
            await node.start(rebalancer=True)
        assert await give_up(await cluster.client())
        assert not await is_late(cluster)


@virtual
async def test_a_journal_of_which_nothing_can_be_read_is_no_empty_one() -> None:
    """The other member has it, and may come back: until then the volume cannot be opened."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        rotten, other = await crashed(cluster)
        await rotten.crash()
        for page in range(1, UNREADABLE_MAX):
            rotten.disks[2].make_unreadable(segment_name(0), page * PAGE_SIZE)
        await rotten.start(rebalancer=True)
        await other.crash()
        with pytest.raises(BlockUnavailable):
            await (await cluster.client()).open("v")
        with pytest.raises(BlockUnavailable, match="may have the journal"):
            await give_up(await cluster.client())
        await other.start(rebalancer=True)
        assert await is_late(cluster)


@virtual
async def test_a_journal_that_can_be_read_is_not_given_up() -> None:
    """By one member even: what it has is committed instead."""
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        await lose(cluster, (await crashed(cluster))[:1])
        assert await give_up(await cluster.client()) == ""
        assert await is_late(cluster)


@virtual
async def test_what_is_in_use_or_was_closed_is_left_as_it_is() -> None:
    """The error says who has it; where there is no journal there is nothing to be given up."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await device.flush()
        with pytest.raises(Locked):
            await give_up(await cluster.client())
        await device.release()
        assert await give_up(await cluster.client()) == ""
        assert not await is_late(cluster)
        with pytest.raises(NotExist):
            await give_up(await cluster.client(), "none")


@virtual
async def test_who_is_killed_on_the_way_leaves_the_volume_whole() -> None:
    """As it was, or given up: the command may be given again."""
    for cut_s in (0.01, 1.0, 15.0, 16.0, 17.0, 18.0, 20.0):
        async with Cluster(nodes=5, replication=2, journals=True) as cluster:
            await lose(cluster, await crashed(cluster))
            tool = await cluster.client()
            work = asyncio.ensure_future(give_up(tool))
            await asyncio.sleep(cut_s)
            await tool.crash()
            work.cancel()
            await asyncio.wait([work])
            await asyncio.sleep(60)
            await give_up(await cluster.client())
            assert not await is_late(cluster)


async def with_damage(cluster: Cluster, lost: int = 1, crashed: bool = False) -> StorageNode:
    """Let a node's journal have lost a record of a volume ``old``.

    Args:
        cluster: has one node.
        lost: index of the record among three.
        crashed: its client has; else the volume is done with it.
    """
    (node,) = cluster.nodes.values()
    device = await cluster.volume(SIZE, name="old")
    for number in (1, 2, 3):
        await device.write(0, pattern(number))
        await device.flush()
    volume = (await cluster.meta.volume("old")).id
    stored = node.system.cells["journal"].actor._store._logs[volume].runs[1].records[lost]
    await (device.client.crash() if crashed else device.client.stop())
    await node.crash()
    node.disks[2].make_unreadable(segment_name(0), stored.offset // PAGE_SIZE * PAGE_SIZE)
    await node.start(rebalancer=True)
    return node


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
@virtual
async def test_a_journal_that_once_lost_something_keeps_no_volume_closed(
    restarted: bool, reopened: bool
) -> None:
    """Of one that came later it has lost nothing, though nobody has flushed to it yet."""
    async with Cluster(nodes=1, replication=1, journals=True) as cluster:
        node = await with_damage(cluster)
        device = await cluster.volume(SIZE)
        for _ in range(1 + reopened):
            await device.write(0, pattern(1))
            await device.client.actor("volume:v").commit.remote()
            assert device.client.session("v").journal.active
            if reopened:
                await device.client.stop()
                device = await (await cluster.client()).open("v")
                await asyncio.sleep(10)
        await device.client.crash()
        if restarted:
            await node.crash()
            await node.start(rebalancer=True)
        await asyncio.sleep(30)
        assert await content(cluster, "v") == pattern(1)


@pytest.mark.parametrize("how", ["commit", "snapshot"])
@virtual
async def test_what_comes_behind_the_record_that_tells_nothing_is_not_alone(how: str) -> None:
    """A commit that has nothing to do makes no head, and must not cut what no head covers.

    Found by reading: no member could give what was flushed then, and all of them were whole.
    """
    async with Cluster(nodes=1, replication=1, journals=True) as cluster:
        await with_damage(cluster)
        device = await cluster.volume(SIZE)
        session = device.client.session("v")
        await until(lambda: session.journal.active)
        assert session.journal.in_doubt and session.log.seq == 1
        if how == "commit":
            await device.client.actor("volume:v").commit.remote()
        else:
            await take_snapshot(cluster.meta, (await cluster.meta.volume("v")).id, "s", 20.0)
        await device.write(AT, LATE)
        await device.flush()
        assert session.journal.active and session.journal.size
        await device.client.crash()
        await asyncio.sleep(30)
        again = await (await cluster.client()).open("v")
        assert await again.read(AT, len(LATE)) == LATE


@pytest.mark.parametrize("how", ["client", "shrink", "given up"])
@virtual
async def test_a_record_that_tells_nothing_is_no_reason_to_replay(how: str) -> None:
    """A close whose commit formed the journal left one in it: the volume counts as closed in order.

    Found by review. A shrunk volume could not be opened after that, and who gave a journal up was
    told that nothing was lost.
    """
    async with Cluster(nodes=1, replication=1, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, pattern(1))
        await device.flush()
        await device.client.actor("volume:v").commit.remote()
        if how == "given up":
            await device.write(0, pattern(2))
            await device.flush()
            await device.client.crash()
        elif how == "shrink":
            await device.client.stop()
        node = await with_damage(cluster, lost=-1, crashed=True)
        await asyncio.sleep(30)
        tool = await cluster.client()
        assert tool.system is not None
        if how == "client":
            await device.write(0, pattern(2))
            await device.flush()
            await device.client.stop()
        elif how == "shrink":
            await shrink_volume(tool.system, cluster.meta, tool.view, "v", SIZE // 2, holder="tool")
        else:
            assert "can be read" in await give_up(tool)
        journal, _ = await cluster.meta.journal(1)
        assert journal is not None and not journal.ensemble
        await node.stop()
        await node.start(rebalancer=True)
        await asyncio.sleep(30)
        again = await (await cluster.client()).open("v")
        wanted = pattern(2 if how == "client" else 1)[: again.size]
        assert await again.read(0, len(wanted)) == wanted
