"""An attached volume without the metadata: flushes go on, journals stay small, nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from typing import Any

import pytest

from tests.fakes import Cluster, Device, DeviceError, until, virtual
from tests.unit.test_volume_commits import begin_commit, hold_heads
from tests.unit.test_volume_flush import journaling, reopened
from torus_actors.actors.volumes import JOURNAL_S, NOT_CLOSED
from torus_actors.errors import (
    BlockUnavailable,
    Corruption,
    Fenced,
    OutOfSpace,
    ProtocolError,
    TorusError,
    Unauthenticated,
)
from torus_actors.metadata.keys import HEAD
from torus_actors.metadata.records import Head
from torus_actors.model.refs import BlockRef
from torus_actors.nbd.protocol import Errno
from torus_actors.runtime import ActorSystem
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import segment_name
from torus_actors.volume import journal
from torus_actors.volume.commit import Committer

BLOCK = 16 << 10
SIZE = 100 * BLOCK
SMALL = 256 << 10
"""A journal of this size is folded."""


@pytest.fixture(autouse=True)
def small_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred flushes fill them."""
    monkeypatch.setattr(journal, "COMMIT_BYTES", SMALL)


@virtual
async def test_a_journal_keeps_to_the_room_of_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a client would let it grow: what fills up a member costs a new ensemble."""
    monkeypatch.setattr(journal, "COMMIT_BYTES", 1 << 40)
    monkeypatch.setattr(JournalStore, "room", SMALL)
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await write_on(device, 300)
        owner = device.client.session("v")
        heads = owner.heads.recorded
        await write_on(device, 300)
        assert owner.heads.recorded > heads, "the journal was not folded"
        assert owner.journal.active and owner.journal.size < 2 * SMALL


@pytest.mark.parametrize("before", ["new", "written", "grown"])
@virtual
async def test_the_metadata_may_go_away_as_soon_as_a_volume_is_open(before: str) -> None:
    """A session has its journal from its opening: its very first flush needs nothing else."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        if before != "new":
            await device.write(0, b"old" * 1000)
            await device.release()
            if before == "grown":
                await cluster.meta.resize_volume("v", 2 * SIZE)
            device = await (await cluster.client()).open("v")
        device.client.store.down = True
        last = 2 * SIZE if before == "grown" else SIZE
        for offset in (1000, last - 5):
            began = asyncio.get_running_loop().time()
            await device.write(offset, b"fresh")
            await device.flush()
            assert asyncio.get_running_loop().time() - began < 1.0
        device.client.store.down = False
        again = await reopened(device)
        assert await again.read(1000, 5) == await again.read(last - 5, 5) == b"fresh"
        assert await again.read(0, 3) == (bytes(3) if before == "new" else b"old")


@virtual
async def test_a_volume_opens_though_there_can_be_no_journal() -> None:
    """Too few nodes are up, or some say nothing: it opens soon, and its flushes work."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.release()
        client = await cluster.client()
        for node in cluster.ids[:2]:
            cluster.network.cut(client.node_id, node)
        began = asyncio.get_running_loop().time()
        device = await client.open("v")
        assert asyncio.get_running_loop().time() - began < JOURNAL_S + 3.0
        cluster.network.heal()
        await device.write(0, b"later")
        await device.flush()
        assert await (await reopened(device)).read(0, 5) == b"later"


async def cut_off(cluster: Cluster) -> Device:
    """A volume whose session has its journal, and whose client cannot reach the metadata."""
    device = await journaling(cluster, SIZE)
    device.client.store.down = True
    return device


async def write_on(device: Device, rounds: int) -> bytearray:
    """Flush after each of many small writes; returns what the volume then is."""
    loop = asyncio.get_running_loop()
    content = bytearray(SIZE)
    content[:5] = b"first"
    for n in range(rounds):
        at = (n * 7919 * 512) % (SIZE - 4096)
        data = bytes([n % 251 + 1]) * (1000 + n % 3000)
        await device.write(at, data)
        content[at : at + len(data)] = data
        before = loop.time()
        await device.flush()
        assert loop.time() - before < 3.0, "a flush waited for the metadata"
        await asyncio.sleep(0.05)
    return content


@virtual
async def test_an_outage_fills_no_journal() -> None:
    """Through a long outage flushes go on, and the journals are folded as ever.

    Whatever was flushed is there for the next client, and the metadata was not asked for it.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        content = await write_on(device, 500)
        owner = device.client.session("v")
        assert owner.heads.owed is not None
        assert owner.journal.size < 2 * SMALL, "the journal was not cut"
        head, _ = await cluster.meta.head(owner.volume_id)
        assert head is not None and head.inode < owner.heads.owed.inode
        again = await reopened(device)
        assert await again.read(0, SIZE) == content
        await until(lambda: again.client.session("v").heads.owed is None)
        head, _ = await cluster.meta.head(owner.volume_id)
        assert head is not None and head.epoch == again.client.session("v").epoch
        last = await reopened(again)  # before its first commit has ended, or after
        assert await last.read(0, SIZE) == content


@virtual
async def test_a_member_that_is_lost_in_an_outage_loses_nothing() -> None:
    """Any one member of the journal is enough to take over the head that only journals have."""
    for lost in range(2):
        async with Cluster(nodes=3, replication=2, journals=True) as cluster:
            device = await cut_off(cluster)
            content = await write_on(device, 150)
            owner = device.client.session("v")
            assert owner.heads.owed is not None
            members = [n for n in cluster.nodes.values() if n.node_id in owner.journal.members]
            await members[lost].crash()
            again = await reopened(device)
            assert await again.read(0, SIZE) == content


@virtual
async def test_what_is_owed_is_paid() -> None:
    """When the metadata is back it gets the head, without another write; closing is orderly."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        content = await write_on(device, 150)
        owner = device.client.session("v")
        owed = owner.heads.owed
        assert owed is not None
        device.client.store.down = False
        await until(lambda: owner.heads.owed is None)
        head, _ = await cluster.meta.head(owner.volume_id)
        assert head is not None and head.inode >= owed.inode
        await device.release()
        again = await (await cluster.client()).open("v")
        assert await again.read(0, SIZE) == content


@virtual
async def test_a_volume_can_be_closed_in_an_outage() -> None:
    """Closing waits for no metadata: the next session takes over what the journal has."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        content = await write_on(device, 20)
        before = asyncio.get_running_loop().time()
        await device.release()
        assert asyncio.get_running_loop().time() - before < 20.0
        device.client.store.down = False
        again = await reopened(device)
        assert await again.read(0, SIZE) == content


def fill(cluster: Cluster) -> None:
    """No node has room for another block."""
    for node in cluster.nodes.values():
        store, n = node.stores[0], 0
        while store.stats().free:
            store.put(BlockRef.of(77, 1, n), b"f")
            n += 1


@pytest.mark.parametrize("away", [False, True])
@virtual
async def test_what_a_close_cannot_commit_the_journal_keeps(
    caplog: pytest.LogCaptureFixture, away: bool
) -> None:
    """The cluster is full, so that the last commit fails: whole blocks go to the journal too."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        fill(cluster)
        device.client.store.down = away
        await device.write(BLOCK, b"small")
        await device.write(5 * BLOCK, b"z" * 12 * BLOCK)
        before = asyncio.get_running_loop().time()
        with caplog.at_level(logging.WARNING, "torus_actors.volume.opening"):
            await device.release()
        assert asyncio.get_running_loop().time() - before < 30.0
        assert "volume v: closed without a commit" in caplog.text
        device.client.store.down = False
        again = await reopened(device)
        assert await again.read(0, 5) == b"first"
        assert await again.read(BLOCK, 5) == b"small"
        assert await again.read(5 * BLOCK, 12 * BLOCK) == b"z" * 12 * BLOCK


@virtual
async def test_a_full_cluster_fills_no_journal() -> None:
    """Small flushes go on until it is due to be folded, and then fail; a close finds room yet."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        fill(cluster)
        owner = device.client.session("v")
        flushed, refused = 0, 0
        for n in range(120):
            try:
                await device.write(n % 8 * BLOCK, b"%04d" % n * 1000)
                await device.flush()
                flushed += 1
            except DeviceError as failed:
                assert failed.errno == Errno.ENOSPC
                refused += 1
            await asyncio.sleep(0.5)
        assert flushed > 30 and refused > 30
        assert owner.journal.active and SMALL < owner.journal.size < 2 * SMALL
        content = await device.read(0, SIZE)
        await device.release()
        again = await (await cluster.client()).open("v")
        assert await again.read(0, SIZE) == content


@virtual
async def test_a_cluster_that_is_full_for_a_while_in_an_outage_stops_no_commit() -> None:
    """Room was to be made by a head of a part, which the metadata did not take; it came anyway."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        session = device.client.session("v")
        await device.write(90 * BLOCK, b"y" * BLOCK)
        await until(lambda: session.file.unsynced)
        fill(cluster)
        await device.write(BLOCK, b"z" * 3 * BLOCK)
        await until(lambda: session.file.reclaiming)
        committed = begin_commit(session)
        await asyncio.sleep(1.0)
        for node in cluster.nodes.values():
            node.stores[0].delete([ref for ref in node.refs() if ref.volume == 77])
            await node.actor("block_store").flush.remote()
        async with asyncio.timeout(20.0):
            assert await committed is None
        before = asyncio.get_running_loop().time()
        await device.trim(4 * BLOCK, 80 * BLOCK)  # which no record tells
        await device.flush()
        assert asyncio.get_running_loop().time() - before < 20.0
        assert device.client.store.down and session.heads.owed is not None
        again = await reopened(device)
        assert await again.read(BLOCK, 3 * BLOCK) == b"z" * 3 * BLOCK


@virtual
async def test_a_flush_with_nothing_to_tell_needs_no_room() -> None:
    """The journal is due to be folded, which fails; it has all that was written all the same."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        fill(cluster)
        owner = device.client.session("v")
        for n in itertools.count():
            with contextlib.suppress(DeviceError):
                await device.write(n % 8 * BLOCK, b"%04d" % n * 1000)
            await asyncio.sleep(0.5)
            await device.flush()
            if owner.journal.is_large and owner.commit_failed:
                break
        assert owner.log.empty
        for _ in range(3):
            await device.flush()
            await asyncio.sleep(10.0)


@pytest.mark.parametrize("why", ["away", "full"])
@virtual
async def test_heads_of_a_part_that_are_not_taken_leave_no_pages(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """No collector could take them before there is a later head, which needs room for pages."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        if why == "away":
            device.client.store.down = True
        else:

            async def refuse(*_: Any, **__: Any) -> int:
                raise OutOfSpace("the metadata are full")

            monkeypatch.setattr(type(cluster.meta), "commit_head", refuse)
        await device.write(50 * BLOCK, b"y" * BLOCK)
        await until(lambda: session.file.unsynced)
        fill(cluster)
        for n in range(120):
            with contextlib.suppress(DeviceError):
                await device.write(n % 8 * BLOCK, b"%04d" % n * 1000)
                await device.flush()
            await asyncio.sleep(0.5)
        await asyncio.sleep(10.0)
        assert max(node.stores[1].stats().used for node in cluster.nodes.values()) < 20


@virtual
async def test_a_close_speaks_of_no_loss_where_nobody_wrote(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a crashed client had flushed cannot be committed, and stays in its journal."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.write(BLOCK, b"small")
        await device.flush()
        fill(cluster)
        for _ in range(2):
            await device.client.crash()
            await asyncio.sleep(30)
            device = await (await cluster.client()).open("v")
            assert await device.read(BLOCK, 5) == b"small"
            await device.release()
        assert "lost" not in caplog.text


@pytest.mark.parametrize("by_tool", [False, True])
@virtual
async def test_a_close_that_neither_commits_nor_journals_says_what_is_lost(by_tool: bool) -> None:
    """A member of the journal is lost while the metadata is away: there is no place for it."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await reopened(await journaling(cluster, SIZE))
        journal = device.client.session("v").journal
        await until(lambda: journal.active)
        device.client.store.down = True
        if by_tool:
            await device.client.actor("volume:v").write.remote(0, b"second")
        else:
            await device.write(0, b"second")
        await cluster.nodes[journal.members[0]].crash()
        before = asyncio.get_running_loop().time()
        with pytest.raises(BlockUnavailable, match="was not flushed before is lost: there is no"):
            await device.release()
        assert asyncio.get_running_loop().time() - before < 90.0


async def nowhere_to_store(cluster: Cluster) -> tuple[Device, ActorSystem]:
    """A client that wrote, and whose close can neither commit that nor have it in its journal."""
    device = await cut_off(cluster)
    await device.write(0, b"second")
    await cluster.nodes[device.client.session("v").journal.members[0]].crash()
    assert device.client.system is not None
    return device, device.client.system


@virtual
async def test_a_process_that_ends_leaves_word_of_what_is_lost() -> None:
    """So that it does not end as if all was well."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device, system = await nowhere_to_store(cluster)
        await device.client.stop()
        (told,) = system.heirlooms[NOT_CLOSED]
        assert told.startswith("closing volume v: ") and "is lost" in told


@virtual
async def test_a_volume_that_its_last_user_gives_back_in_a_stop_leaves_word_too() -> None:
    """Servers stop before what opens volumes; in the days before a stop it is in the log.

    Found by reading, with real processes: the status was 0.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device, system = await nowhere_to_store(cluster)
        told = system.heirlooms.setdefault(NOT_CLOSED, [])  # as `Process.stop` begins
        with pytest.raises(BlockUnavailable):
            await device.release()
        assert len(told) == 1 and told[0].startswith("closing volume v: ") and "is lost" in told[0]


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("noticed", ["by its heartbeat", "by a commit", "in the end"])
@pytest.mark.parametrize("what", ["nothing", "flushed", "written"])
@virtual
async def test_a_process_that_ends_tells_that_its_volume_was_taken_over(
    what: str, noticed: str, served: bool
) -> None:
    """What it had acknowledged, and nobody had flushed, went with the session."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        if what != "nothing":
            await device.write(0, b"first")
            await device.flush()
            await device.write(BLOCK, b"second")
        if what == "flushed":
            await device.flush()
        session = device.client.session("v")
        await cluster.meta.detach(1, session.epoch)
        await cluster.meta.attach(1, "other", await cluster.meta.grant_lease(600))
        if noticed == "by its heartbeat":
            session.file.fail(Fenced("session 1 of the volume is over"))
        elif noticed == "by a commit":
            committed = asyncio.get_running_loop().create_future()
            session.commit_soon(committed.set_result)
            await committed
        system = device.client.system
        assert system is not None
        told = system.heirlooms.setdefault(NOT_CLOSED, [])
        if served:
            with contextlib.suppress(Fenced):
                await device.release()
        await device.client.stop()
        assert len(told) == (what == "written")


@pytest.mark.parametrize("where", ["blocks", "record", "commit"])
@virtual
async def test_what_a_flush_was_about_to_store_is_told_too(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a client that was cut off, and was taken over meanwhile: found by review."""
    async with Cluster(nodes=3, replication=2, journals=where != "commit") as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"first")
        await device.flush()
        session, there = device.client.session("v"), asyncio.Event()

        async def stuck(*_: Any, **__: Any) -> None:
            there.set()
            await asyncio.Event().wait()

        if where == "record":
            monkeypatch.setattr(session.journal, "append_soon", lambda *_: there.set())
        else:
            step = "make_durable" if where == "blocks" else "commit"
            monkeypatch.setattr(session.committer, step, stuck)
        await device.write(BLOCK, b"x" * (5 if where == "record" else BLOCK))
        flush = asyncio.ensure_future(device.flush())
        await there.wait()
        session.file.fail(Fenced("session 1 of the volume is over"))
        system = device.client.system
        assert system is not None
        told = system.heirlooms.setdefault(NOT_CLOSED, [])
        await device.client.stop()
        assert len(told) == 1
        flush.cancel()


@virtual
async def test_a_process_that_ends_closes_its_volumes_together() -> None:
    """Each takes long, in a full cluster without its metadata, and all have a bounded time."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        client = await cluster.client()
        names = [f"v{n}" for n in range(12)]
        for name in names:
            await cluster.meta.create_volume(name, SIZE)
        devices = [await client.open(name) for name in names]
        fill(cluster)
        client.store.down = True
        for device in devices:
            await device.write(0, b"written" * BLOCK)
        await client.stop()
        client.store.down = False
        other = await cluster.client()
        await asyncio.sleep(30.0)
        for name in names:
            assert await (await other.open(name)).read(0, 7) == b"written"


@virtual
async def test_large_trims_are_flushed_in_an_outage() -> None:
    """What records cannot tell needs a commit; that too goes on without the metadata."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        content = await write_on(device, 50)
        before = asyncio.get_running_loop().time()
        await device.trim(0, 90 * BLOCK)
        await device.flush()
        assert asyncio.get_running_loop().time() - before < 20.0
        content[: 90 * BLOCK] = bytes(90 * BLOCK)
        await device.write(5 * BLOCK, b"after the trim")
        await device.flush()
        content[5 * BLOCK : 5 * BLOCK + 14] = b"after the trim"
        again = await reopened(device)
        assert await again.read(0, SIZE) == content


@virtual
async def test_a_session_that_is_replaced_in_an_outage_gets_nothing_in() -> None:
    """A client that was cut off folds its journal; once another has the volume it cannot."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cut_off(cluster)
        content = await write_on(device, 100)
        other = await cluster.client()
        await asyncio.sleep(10.0)
        theirs = await other.open("v")
        assert await theirs.read(0, SIZE) == content
        await theirs.write(0, b"THEIRS")
        await theirs.flush()
        await device.write(0, b"mine!!")
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.ESHUTDOWN
        device.client.store.down = False
        await asyncio.sleep(10.0)
        await theirs.release()
        last = await (await cluster.client()).open("v")
        assert await last.read(0, 6) == b"THEIRS"


@virtual
async def test_the_longest_tail_is_replayed() -> None:
    """The last record rots on one member, which then shows one less: the other's is taken.

    A record that is damaged at the end of a journal cannot be told from one that was never whole.
    """
    for rotten in range(2):
        async with Cluster(nodes=3, replication=2, journals=True) as cluster:
            device = await cluster.volume(SIZE)
            for content in (b"one", b"two", b"six"):
                await device.write(0, content)
                await device.flush()
            owner = device.client.session("v")
            node = next(
                n for n in cluster.nodes.values() if n.node_id == owner.journal.members[rotten]
            )
            assert node.journal is not None
            store = node.journal.store
            epoch, _, last, _ = store.fenced(owner.volume_id)
            _, step = store.locate(owner.volume_id, epoch, last, 1)
            _, _, record, segment = step.items[0]
            node.disks[2].rot(segment_name(segment.index), record.offset)
            store.release(step)
            node.journal.close = lambda: None  # type: ignore[method-assign]
            await node.restart()  # at once: an orderly end would write behind the record
            assert node.journal is not None
            assert node.journal.store.fenced(owner.volume_id).last == last - 1
            again = await reopened(device)
            assert await again.read(0, 3) == b"six"


@pytest.mark.parametrize("everywhere", [True, False])
@virtual
async def test_records_that_not_all_members_have_are_committed_before_the_first_read(
    everywhere: bool,
) -> None:
    """One that only some have may be gone next time: who has read it must not see it vanish.

    What all of them have cannot go, so opening does not wait for a commit.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for content in (b"one", b"two"):
            await device.write(0, content)
            await device.flush()
        journal = device.client.session("v").journal
        assert journal.active
        if not everywhere:
            member, home = next(iter(journal._homes.items()))
            journal._homes = {member: home}
        await device.write(0, b"six")
        await device.flush()
        again = await reopened(device)
        session = again.client.session("v")
        assert (session.heads.recorded == 0) == everywhere
        assert await again.read(0, 3) == b"six"


@virtual
async def test_who_cannot_ask_all_members_commits_also_when_there_is_nothing_to_replay() -> None:
    """Only the member that is away has a record that the head lacks; nobody acknowledged it.

    Found by seed 273 of crashes_everywhere: who had read the volume without it saw it come back.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for content in (b"one", b"two"):
            await device.write(0, content)
            await device.flush()
        session = device.client.session("v")
        session.commit_soon(lambda _: None)
        await until(lambda: session.all_covered)
        journal = session.journal
        away, home = next(iter(journal._homes.items()))
        journal._homes = {away: home}
        await device.write(0, b"six")
        await device.flush()
        await cluster.nodes[away].crash()
        again = await reopened(device)
        assert await again.read(0, 3) == b"two"
        await cluster.nodes[away].start()
        again = await reopened(again)
        assert await again.read(0, 3) == b"two"


@virtual
async def test_a_journal_lost_during_a_commit_is_replaced_only_when_a_head_covers_it() -> None:
    """A record is acknowledged while a commit runs that does not have it, and then a member dies.

    A new ensemble at the end of that commit would not have the record. The other old member is lost
    for good then, so the one that died and came back is the last to have it.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for content in (b"one", b"two"):
            await device.write(0, content)
            await device.flush()
        session = device.client.session("v")
        first, second = (
            next(node for node in cluster.nodes.values() if node.node_id == member)
            for member in session.journal.members
        )
        store, stored, gates = session.heads.store, asyncio.Event(), [asyncio.Event()]

        async def held(head: Head) -> None:
            gates[-1].set()
            gates.append(asyncio.Event())
            await stored.wait()
            stored.clear()
            await store(head)

        session.heads.store = held  # type: ignore[method-assign]
        session.commit_soon(lambda _: None)
        await gates[0].wait()
        await device.write(BLOCK, b"six")
        await device.flush()
        await second.crash()
        await device.write(2 * BLOCK, b"ten")
        flush = asyncio.ensure_future(device.flush())
        await until(lambda: not session.journal.active)
        stored.set()  # the first commit ends
        await gates[1].wait()  # the next one is on its way, and never ends
        flush.cancel()
        await first.crash()
        await second.start()
        again = await reopened(device)
        assert await again.read(BLOCK, 3) == b"six"


@pytest.mark.parametrize("killed", [False, True])
@virtual
async def test_a_flush_whose_actor_dies_while_it_waits_for_blocks(killed: bool) -> None:
    """Its record was cut, and is never handed in: the journal takes the head all the same."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        device.client.store.down = True
        await device.write(5 * BLOCK, b"z" * BLOCK)
        await until(lambda: session.file.unsynced)
        make_durable, there = session.committer.make_durable, asyncio.Event()

        async def slow(pending: Any) -> None:
            there.set()
            await asyncio.sleep(0.1)
            await make_durable(pending)

        session.committer.make_durable = slow
        flush = asyncio.ensure_future(device.flush())
        await there.wait()
        if killed:
            device.client.kill("volume:v")
        await flush
        await device.write(6 * BLOCK, b"small")
        await device.flush()
        assert device.client.store.down
        again = await reopened(device)
        assert await again.read(5 * BLOCK, 2) == b"zz"
        assert await again.read(6 * BLOCK, 5) == b"small"


@virtual
async def test_records_that_are_still_to_come_keep_their_numbers() -> None:
    """A commit wants its head in the journal, and a flush that began later waits for blocks."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        device.client.store.down = True
        await device.write(BLOCK, b"small")
        at_store, store = hold_heads(session)
        committed = begin_commit(session)
        await at_store.wait()
        await device.write(5 * BLOCK, b"z" * BLOCK)
        await until(lambda: session.file.unsynced)
        make_durable = session.committer.make_durable
        at_blocks, blocks = asyncio.Event(), asyncio.Event()

        async def held(pending: Any) -> None:
            at_blocks.set()
            await blocks.wait()
            await make_durable(pending)

        session.committer.make_durable = held
        flush = asyncio.ensure_future(device.flush())
        await at_blocks.wait()
        store.set()
        await asyncio.sleep(5)
        blocks.set()
        await flush
        assert await committed is None
        assert session.journal.active and session.heads.owed is not None
        again = await reopened(device)
        assert await again.read(5 * BLOCK, 2) == b"zz"


@pytest.mark.parametrize(
    "error",
    [
        OutOfSpace("etcd: mvcc: database space exceeded"),
        Unauthenticated("refused by the other side"),
        ProtocolError("not a frame"),
        Corruption("database disk image is malformed"),
    ],
    ids=lambda error: type(error).__name__,
)
@virtual
async def test_metadata_that_takes_nothing_is_as_good_as_away(error: TorusError) -> None:
    """It answers, but is full, damaged, or somebody else: flushes go on, and are found later."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        txn = device.client.store.txn

        async def refuses(compare: Any, then: Any) -> Any:
            raise error

        device.client.store.txn = refuses  # type: ignore[method-assign]
        content = await write_on(device, 200)
        await device.trim(0, 80 * BLOCK)  # which no record tells
        content[: 80 * BLOCK] = bytes(80 * BLOCK)
        await device.flush()
        session = device.client.session("v")
        assert session.heads.owed is not None and session.journal.size < 2 * SMALL
        device.client.store.txn = txn  # type: ignore[method-assign]
        again = await reopened(device)
        assert await again.read(0, SIZE) == content


@virtual
async def test_a_head_that_filled_up_the_metadata_keeps_its_pages() -> None:
    """As etcd does: what crosses its bound is done, and answered like what comes after it."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        await device.write(50 * BLOCK, b"y" * BLOCK)
        await device.flush()
        key = cluster.meta.keys.of(HEAD, session.volume_id)
        store = device.client.store
        txn = store.txn
        of_parts: list[bool] = []

        async def fills(compare: Any, then: Any) -> Any:
            if of_parts:
                raise OutOfSpace("database space exceeded")
            result = await txn(compare, then)
            if result.succeeded and any(each.key == key for each in then):
                of_parts.append(not session.committer.complete)
                raise OutOfSpace("database space exceeded")
            return result

        store.txn = fills  # type: ignore[method-assign]
        await device.write(60 * BLOCK, b"y" * BLOCK)
        await until(lambda: session.file.unsynced)
        fill(cluster)
        for n in range(120):
            with contextlib.suppress(DeviceError):
                await device.write(n % 8 * BLOCK, b"%04d" % n * 1000)
                await device.flush()
            if of_parts:
                break
            await asyncio.sleep(0.5)
        assert of_parts == [True]
        await asyncio.sleep(3.0)
        again = await reopened(device)
        assert await again.read(50 * BLOCK, BLOCK) == b"y" * BLOCK


@virtual
async def test_who_goes_on_with_a_close_tells_what_was_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The actor died as it waited for the lock to be given up, and its successor said nothing."""
    async with Cluster() as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"1" * BLOCK)
        await device.flush()
        await device.write(BLOCK, b"2" * BLOCK)

        async def full(*_: Any) -> None:
            raise OutOfSpace("the cluster is full")

        monkeypatch.setattr(Committer, "commit", full)
        device.client.store.down = True
        release = asyncio.ensure_future(device.release())
        await asyncio.sleep(3)
        device.client.kill("volumes")
        await asyncio.wait([release])
        assert release.exception() is not None
        await asyncio.sleep(3)
        device.client.store.down = False
        await asyncio.sleep(12)
        assert "what was not flushed before is lost" in caplog.text
        monkeypatch.undo()


@pytest.mark.parametrize("when", ["before", "waiting", "meanwhile"])
@pytest.mark.parametrize("victim", ["volumes", "volume:v", "replicator", "inode_store"])
@virtual
async def test_a_stop_that_meets_a_death_stores_what_was_written(victim: str, when: str) -> None:
    """Just before it begins, or as the last flush is on its way: the actor is started for that.

    So it is if it had died twice, and its supervisor let some time go by before starting it.

    Found by reading: nobody started it any more, and what had not been flushed was lost, with a
    status of 0 if it was the one that closes volumes.
    """
    async with Cluster(nodes=3, replication=2, journals=True, inode_copies=2) as cluster:
        device = await cluster.volume(1 << 20, write_bytes=8 << 20)
        await device.write(0, b"1" * (1 << 20))
        await device.flush()
        await device.write(0, b"2" * (1 << 20))
        client, loop = device.client, asyncio.get_running_loop()
        assert client.system is not None
        cell = client.system.cells[victim]
        if when != "meanwhile":
            cell.kill()
        if when == "waiting" and cell.parent != "volumes":
            supervisor: Any = client.system.cells[str(cell.parent)].actor
            supervisor.spec = dataclasses.replace(supervisor.spec, backoff_first_s=0.05)
            await asyncio.sleep(0.01)
            cell.kill()
            await asyncio.sleep(0.02)
        began = loop.time()
        stop = loop.create_task(client.stop())
        if when == "meanwhile":
            await asyncio.sleep(0.0005)
            assert not stop.done()
            cell.kill()
        await stop
        assert loop.time() - began < 3.0
        again = await (await cluster.client()).open("v")
        assert await again.read(0, 1 << 20) == b"2" * (1 << 20)
