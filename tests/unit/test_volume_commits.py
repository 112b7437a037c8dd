"""Flushes beside a commit, and crashes around it: what was acknowledged is there afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from tests.fakes import Cluster, Device, until, virtual
from tests.unit.test_snapshots import shrink, snapshot
from tests.unit.test_volume_flush import journaling, reopened
from torus_actors.actors import nbd_server
from torus_actors.errors import (
    Again,
    BlockUnavailable,
    DeadlineExceeded,
    OutOfSpace,
    Overloaded,
    TorusError,
)
from torus_actors.metadata.records import Head
from torus_actors.model.inode_tree_pages import FANOUT
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ChildSpec
from torus_actors.volume import journal, read_side
from torus_actors.volume.change_log import ChangeLog, Replay
from torus_actors.volume.file import DISCARD_S, File
from torus_actors.volume.journal import SessionJournal
from torus_actors.volume.opening import close_session
from torus_actors.volume.session import OUTBOX_RETRY_S

BLOCK = 16 << 10
SIZE = 100 * BLOCK


def hold_heads(session: Any) -> tuple[asyncio.Event, asyncio.Event]:
    """Heads wait at the door of the metadata: the first event tells, the second lets them in."""
    store, there, go_on = session.heads.store, asyncio.Event(), asyncio.Event()

    async def held(head: Head) -> None:
        there.set()
        await go_on.wait()
        await store(head)

    session.heads.store = held
    return there, go_on


def hold_write_out(session: Any) -> tuple[asyncio.Event, asyncio.Event]:
    """The first step of a commit takes long, as if one of many blocks were slow."""
    write_out, there, go_on = session.committer.write_out, asyncio.Event(), asyncio.Event()

    async def held(indexes: list[int], checkpoint: Any = None) -> None:
        await write_out(indexes, checkpoint)
        if checkpoint is not None:
            there.set()
            await go_on.wait()

    session.committer.write_out = held
    return there, go_on


def begin_commit(session: Any) -> asyncio.Future[TorusError | None]:
    """A commit that no flush asked for, as by age, by size or for a snapshot."""
    done: asyncio.Future[TorusError | None] = asyncio.get_running_loop().create_future()
    session.commit_soon(done.set_result)
    return done


async def overwritten(cluster: Cluster) -> Device:
    """A volume that has its journal, and old data in most of its blocks, in a head."""
    device = await cluster.volume(SIZE)
    for n in range(95):
        await device.write(n * BLOCK, b"o" * BLOCK)
    for _ in range(2):
        await device.flush()
    return device


async def is_acknowledged(device: Device, wait_s: float = 5.0) -> bool:
    """Whether a flush ends well in that time; it is given up then."""
    flush = asyncio.ensure_future(device.flush())
    await asyncio.wait([flush], timeout=wait_s)
    acknowledged = flush.done() and flush.exception() is None
    flush.cancel()
    return acknowledged


@virtual
async def test_a_flush_waits_for_the_head_of_a_commit_it_did_not_ask_for() -> None:
    """There is no journal, all blocks are durable, and the metadata is away: no head names them."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x" * BLOCK)
        device.client.store.down = True
        begin_commit(device.client.session("v"))
        await asyncio.sleep(3)
        acknowledged = await is_acknowledged(device)
        again = await reopened(device)
        assert not acknowledged or await again.read(0, BLOCK) == b"x" * BLOCK


@pytest.mark.parametrize("delay_us", range(100, 2000, 400))
@virtual
async def test_zeros_that_no_record_tells_wait_for_the_commit_that_does(delay_us: int) -> None:
    """A flush comes while a commit is under way that has them, at any moment of it."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        await device.zero(0, 80 * BLOCK)
        begin_commit(device.client.session("v"))
        await asyncio.sleep(delay_us / 1e6)
        acknowledged = await is_acknowledged(device, 0.0002)
        again = await reopened(device)
        assert not acknowledged or await again.read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("when", ["blocks", "head"])
@virtual
async def test_zeros_wait_for_a_commit_that_takes_long(when: str) -> None:
    """The same with a commit that is held where it writes blocks, or where it records its head."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        session = device.client.session("v")
        there, _ = hold_write_out(session) if when == "blocks" else hold_heads(session)
        await device.zero(0, 80 * BLOCK)
        await device.write(90 * BLOCK, b"y" * 512)
        begin_commit(session)
        await there.wait()
        assert not await is_acknowledged(device)


@pytest.mark.parametrize("change", ["zero", "trim"])
@virtual
async def test_an_older_record_is_not_replayed_over_what_a_head_has(change: str) -> None:
    """A record is cut while a commit runs, and its range zeroed before the map is cut."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        there, go_on = hold_write_out(session)
        await device.write(90 * BLOCK, b"y" * 512)
        committed = begin_commit(session)
        await there.wait()
        await device.write(0, b"OLD")
        await device.flush()
        await getattr(device, change)(0, 80 * BLOCK)
        go_on.set()
        assert await committed is None
        await device.flush()
        again = await reopened(device)
        assert await again.read(0, 5) == bytes(5)


@virtual
async def test_an_older_record_is_not_replayed_over_a_block_of_a_head() -> None:
    """The same with a whole block, and a flush that waits behind the one with the record."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        file = session.file
        there, go_on = hold_write_out(session)
        await device.write(90 * BLOCK, b"y" * 512)
        committed = begin_commit(session)
        await there.wait()
        await device.write(0, b"OLD")
        assert file.unsynced  # so that a task flushes
        append, answered = session.journal.append, asyncio.Event()

        async def slow(last: int, *records: Any) -> None:
            await append(last, *records)
            await answered.wait()

        session.journal.append = slow
        first = asyncio.ensure_future(device.flush())
        await asyncio.sleep(0.5)
        assert session.journal.sent
        await device.write(0, b"NEW".ljust(BLOCK, b"."))
        await until(lambda: not file.layers.size)
        second = asyncio.ensure_future(device.flush())
        await asyncio.sleep(0.1)
        go_on.set()
        assert await committed is None
        answered.set()
        await first
        await second
        again = await reopened(device)
        assert await again.read(0, 3) == b"NEW"


@pytest.mark.parametrize("head_kept", [True, False])
@pytest.mark.parametrize("error", [OutOfSpace("full"), BlockUnavailable("nodes are away")])
@virtual
async def test_a_replay_that_cannot_be_committed_outlasts_another_crash(
    monkeypatch: pytest.MonkeyPatch, error: TorusError, head_kept: bool
) -> None:
    """As long as no head has all of it, none of the new session may stand for the journal.

    Neither one that the journal kept for the metadata, nor one of a part, made to gain room.
    """
    monkeypatch.setattr(journal, "COMMIT_BYTES", 64 << 10)

    async def fails(self: Any, index: int, layer: Any) -> None:
        raise error

    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        owner = device.client.session("v")
        if head_kept:
            device.client.store.down = True
            n = 0
            while owner.heads.owed is None:
                n += 1
                await device.write(n % 50 * BLOCK, b"%04d" % n)
                await device.flush()
                await asyncio.sleep(0.05)
        await device.write(70 * BLOCK, b"b" * BLOCK)  # a block that a record names
        await device.write(60 * BLOCK, b"flushed")  # an extent in a record
        await device.flush()
        with monkeypatch.context() as patch:
            patch.setattr(File, "_assemble", fails)
            again = await reopened(device)
            assert await again.read(60 * BLOCK, 7) == b"flushed"
            await asyncio.sleep(60)
            last = await reopened(again)
        assert await last.read(70 * BLOCK, 2) == b"bb"
        assert await last.read(60 * BLOCK, 7) == b"flushed"


@virtual
async def test_a_session_that_is_closed_twice_keeps_what_it_could_not_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever closes it dies when the last commit has failed, and the successor closes it again."""

    async def fails(self: Any, index: int, layer: Any) -> None:
        raise BlockUnavailable("nodes are away")

    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        await device.write(60 * BLOCK, b"flushed")
        await device.flush()
        with monkeypatch.context() as patch:
            patch.setattr(File, "_assemble", fails)
            again = await reopened(device)
            session = again.client.session("v")
            await again.write(0, b"not flushed")
            for _ in range(2):
                with pytest.raises(BlockUnavailable):
                    await close_session(session, again.client.meta)
        last = await reopened(again)
        assert await last.read(60 * BLOCK, 7) == b"flushed"


def test_a_head_in_the_journal_does_not_replace_a_newer_one() -> None:
    """A session that replayed it has a head of its own; what only the old one names may be gone."""
    log = ChangeLog()
    record = b"".join(log.cut_head(Head(1, bytes(24), 0, SIZE, 1, journal_seq=0)))
    for map_seq in (0, 1):
        replay = Replay(map_seq, 1, 0, 1)
        replay.add(1, record)
        assert (replay.head is None) == (map_seq == 1)


@virtual
async def test_a_flush_does_not_wait_for_the_metadata_behind_a_commit_by_age() -> None:
    """An outage, and a commit under way that nobody waits for: one that is waited for comes."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        device.client.store.down = True
        await device.write(0, b"again")
        await device.flush()
        await asyncio.sleep(60)
        await device.trim(0, 90 * BLOCK)
        assert await is_acknowledged(device, 60.0)
        again = await reopened(device)
        assert await again.read(0, 5) == bytes(5)
        # Nothing but a head was replayed; the next session asks other members for it.
        await until(lambda: again.client.session("v").journal.active)
        last = await reopened(again)
        assert await last.read(0, 5) == bytes(5)


@virtual
async def test_what_a_record_says_of_a_part_that_was_cut_off_does_not_count() -> None:
    """The volume was made smaller before its journal was replayed.

    Nothing behind the end may make the last block look as if all of it had been written.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(41 * BLOCK, write_bytes=8 << 20)
        tail = 40 * BLOCK
        await device.write(tail, b"B" * BLOCK)
        for _ in range(2):
            await device.write(0, b"first")
            await device.flush()
        for n in range(40):
            await device.write(n * BLOCK, b"x")
        await device.write(tail + 12288, b"t" * 4096)
        await device.write(tail, b"w" * 4096)
        await device.flush()
        await device.client.crash()
        await asyncio.sleep(20)
        await shrink(await cluster.client(), tail + 8192)
        client = await cluster.client(write_bytes=8 << 20)
        device = await client.open("v")
        assert device.size == tail + 8192
        assert await device.read(tail, 8192) == b"w" * 4096 + b"B" * 4096


@virtual
async def test_a_record_that_was_never_sent_leaves_no_gap() -> None:
    """The head that covers it cannot be stored either, since the metadata has gone away just now.

    The journal keeps it, and what is flushed later is found.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"first")
        await device.flush()
        session = device.client.session("v")
        await until(lambda: session.journal.active)
        there, go_on = hold_write_out(session)
        make_durable = session.committer.make_durable

        async def fails(pending: Any) -> None:
            raise BlockUnavailable("peers restart faster than they flush")

        await device.write(90 * BLOCK, b"y" * 512)
        committed = begin_commit(session)
        await there.wait()
        before = session.log.seq
        await device.write(5 * BLOCK, b"z" * BLOCK)
        await until(lambda: not session.file.layers.size)
        session.committer.make_durable = fails
        flush = asyncio.ensure_future(device.flush())
        await until(lambda: session.log.seq == before + 1 and session._commit_waiting)
        session.committer.make_durable = make_durable
        commit = session.committer.commit

        async def away(force: bool) -> None:
            device.client.store.down = True
            await commit(force)

        session.committer.commit = away
        go_on.set()
        assert await committed is None
        await flush
        assert session.heads.owed is not None
        session.committer.commit = commit
        await device.write(50 * BLOCK, b"more")
        await device.flush()
        again = await reopened(device)
        assert await again.read(5 * BLOCK, 2) == b"zz"
        assert await again.read(50 * BLOCK, 4) == b"more"


@virtual
async def test_records_are_not_cut_before_any_head_covers_them() -> None:
    """A journal without a head of its session, and zeros over holes, which change no map."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(95 * BLOCK, b"a" * BLOCK)
        await device.release()  # in order: after a crash there is a head at once
        device = await device.client.open("v")
        assert await snapshot(cluster, "s") is not None
        session = device.client.session("v")
        assert session.journal.active and not session.heads.recorded
        await device.write(0, b"OLD")
        await device.flush()
        await device.zero(0, 80 * BLOCK)
        await device.flush()
        await device.write(90 * BLOCK, b"more")
        await device.flush()
        await asyncio.sleep(1)
        again = await reopened(device)
        assert await again.read(0, 3) == bytes(3)
        assert await again.read(90 * BLOCK, 4) == b"more"


@virtual
async def test_a_head_of_a_part_says_where_the_journal_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One member has a record more, never acknowledged, which the session did not see.

    It made a head of what it saw, and what that record names is collected: it counts no more.
    """

    async def fails(self: Any, index: int, layer: Any) -> None:
        raise OutOfSpace("full")

    async with Cluster(nodes=4, replication=2, journals=True, collect_s=1.0) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(70 * BLOCK, b"good" * (BLOCK // 4))
        for _ in range(2):
            await device.write(0, b"first")
            await device.flush()
        first = device.client.session("v")
        assert first.journal.active
        await device.write(60 * BLOCK, b"flushed")
        await device.flush()
        await asyncio.sleep(5)
        longer = first.journal.members[1]
        await device.write(70 * BLOCK, b"late" * (BLOCK // 4))
        await until(lambda: not first.file.layers.any_full)
        await first.committer.make_durable(dict(first.file.unsynced))
        (record,) = first.flusher._cut()
        member = first.journal._homes[longer].actor
        await member.append.remote(1, first.epoch, first.log.seq, payload=b"".join(record))
        await device.client.crash()
        await asyncio.sleep(20)
        client = await cluster.client()
        cluster.network.cut(client.node_id, longer)
        with monkeypatch.context() as patch:
            patch.setattr(File, "_assemble", fails)
            # Else the record's end, which is noted as well, would keep it out.
            patch.setattr(SessionJournal, "settle_end", AsyncMock(side_effect=Again("away")))
            second = await client.open("v")
            await client.session("v").committer._checkpoint()
            head, _ = await cluster.meta.head(1)
            assert head is not None and head.replays == first.epoch
            await asyncio.sleep(60)
        cluster.network.heal()
        third = await reopened(second)
        assert await third.read(60 * BLOCK, 7) == b"flushed"
        assert await third.read(70 * BLOCK, 8) == b"goodgood"


@virtual
async def test_closing_keeps_a_journal_that_has_more_than_the_head() -> None:
    """A flush was acknowledged by a record while the last commit ran."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        session = device.client.session("v")
        there, go_on = hold_heads(session)
        await device.write(0, b"again")
        closing = asyncio.ensure_future(device.release())
        await there.wait()
        await device.write(BLOCK, b"flushed")
        await device.flush()
        go_on.set()
        await closing
        again = await (await cluster.client()).open("v")
        assert await again.read(BLOCK, 7) == b"flushed"


@virtual
async def test_opens_that_meet_a_release_share_one_session() -> None:
    """However they interleave, nobody is told that this very process holds the volume."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"first")
        client = device.client
        releasing = asyncio.ensure_future(device.release())
        await asyncio.sleep(0)
        opens = [asyncio.ensure_future(client.open("v"))]
        await releasing
        for _ in range(12):
            opens.append(asyncio.ensure_future(client.open("v")))
            await asyncio.sleep(0)
        await asyncio.gather(*opens)
        assert client.system.heirlooms["open_volumes"]["v"].users == len(opens)


@virtual
async def test_a_volume_that_opens_when_nobody_waits_any_more_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The open waited for a close that took long, and its client was told so."""
    monkeypatch.setattr(nbd_server, "OPEN_TIMEOUT_S", 10.0)
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"first")
        client = device.client
        system = client.system
        assert system is not None
        await system.cell_for(ChildSpec("nbd", lambda: nbd_server.NbdServer([])), "root").start()
        exports = system.heirlooms["nbd_state"].exports
        there, go_on = hold_heads(client.session("v"))
        releasing = asyncio.ensure_future(device.release())
        await there.wait()
        with pytest.raises(DeadlineExceeded):
            await exports.open("v")
        go_on.set()
        await releasing
        await asyncio.sleep(30)
        assert "v" not in system.heirlooms["open_volumes"]
        info, _ = await exports.open("v")
        assert info.size == SIZE
        await exports.release("v")
        assert "v" not in system.heirlooms["open_volumes"]


@virtual
async def test_a_record_puts_no_older_block_over_what_the_head_has() -> None:
    """A flush while a commit writes out names a block that is replaced before the map is cut.

    The record stays, since it is newer than those that the head covers; what it names is older than
    what the head has, and the next flush counts on that.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        session: Any = device.client.session("v")
        await device.write(0, b"1" * BLOCK)
        there, go_on = hold_write_out(session)
        committed = begin_commit(session)
        await there.wait()
        await device.write(0, b"2" * BLOCK)
        records = session.log.seq
        await device.flush()
        assert session.log.seq == records + 1
        await device.write(0, b"3" * BLOCK)
        await until(lambda: not session.file.layers.dirty and not session.file.layers.frozen)
        go_on.set()
        assert await committed is None
        await device.flush()
        head, _ = await cluster.meta.head(1)
        assert head is not None and head.journal_seq <= records
        assert head.map_seq == records + 1, "no block that it names is replayed"
        again = await reopened(device)
        assert await again.read(0, BLOCK) == b"3" * BLOCK


@virtual
async def test_a_block_that_a_record_names_is_not_discarded() -> None:
    """It is overwritten while its flush waits for it, and the client dies before the next one."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        session: Any = device.client.session("v")
        make_durable, there, go_on = (
            session.committer.make_durable,
            asyncio.Event(),
            asyncio.Event(),
        )

        async def held(pending: Any) -> None:
            there.set()
            await go_on.wait()
            await make_durable(pending)

        await device.write(0, b"1" * BLOCK)
        session.committer.make_durable = held
        flush = asyncio.ensure_future(device.flush())
        await there.wait()
        await device.write(0, b"2" * BLOCK)
        await until(lambda: not session.file.layers.dirty and not session.file.layers.frozen)
        await asyncio.sleep(2 * DISCARD_S)
        go_on.set()
        await flush
        again = await reopened(device)
        assert await again.read(0, BLOCK) == b"1" * BLOCK


@virtual
async def test_a_replicator_without_room_for_hints_does_not_keep_a_lock() -> None:
    """They say what is garbage, which collectors find all the same; closing goes on."""

    class Full:
        def tell(self, *_: Any) -> None:
            raise Overloaded("its inbox is full")

    async with Cluster(nodes=3, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"1" * BLOCK)
        session: Any = device.client.session("v")
        session.file._replicator.discard_everywhere = Full()
        session.file.discard_tried([BlockRef.of(1, 1, 1)])
        await close_session(session, device.client.meta)
        assert (await device.client.meta.lock_status(session.volume_id))[0] is None


@virtual
async def test_replies_that_find_no_room_are_sent_again_by_one_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by reading: each connection had one, and each of them sent for all of them."""

    class Full:
        def __init__(self) -> None:
            self.refused = 0
            self.told: dict[int, int] = {}

        def tell(self, conn: int, replies: list[Any]) -> None:
            if self.refused < 100:
                self.refused += 1
                raise Overloaded("its inbox is full")
            self.told[conn] = self.told.get(conn, 0) + len(replies)

    async with Cluster(nodes=3, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        session: Any = device.client.session("v")
        real, session._replies = session._replies, Full()
        loop, timers = session.system.loop, 0
        call_later = loop.call_later

        def counted(delay: float, *args: Any, **options: Any) -> Any:
            nonlocal timers
            timers += delay == OUTBOX_RETRY_S
            return call_later(delay, *args, **options)

        monkeypatch.setattr(loop, "call_later", counted)
        for conn in range(10):
            session._answer(conn, Mock())
        await until(lambda: len(session._replies.told) == 10)
        assert set(session._replies.told.values()) == {1} and timers == 10
        session._replies = real


@virtual
async def test_a_head_is_owed_no_longer_than_the_metadata_is_away_after_a_replay() -> None:
    """A session that has replayed and committed is like any other."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        await device.write(0, b"1" * 512)
        await device.flush()
        again = await reopened(device)
        session: Any = again.client.session("v")
        assert session.replaying is not None
        for _ in range(2):
            await again.write(BLOCK, b"2" * 512)
            await again.flush()
        assert await begin_commit(session) is None
        again.client.store.down = True
        await again.write(2 * BLOCK, b"3" * 512)
        await again.flush()
        assert await begin_commit(session) is None
        assert session.heads.owed is not None
        again.client.store.down = False
        await until(lambda: session.heads.owed is None)


@virtual
async def test_zeros_wait_for_the_commit_after_one_that_failed() -> None:
    """No record tells them, and the head that was to do so was not recorded."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await overwritten(cluster)
        session: Any = device.client.session("v")
        await device.zero(0, 80 * BLOCK)
        write_out = session.committer.write_out

        async def failing(*_: Any) -> None:
            raise BlockUnavailable("no peer takes a block")

        session.committer.write_out = failing
        assert isinstance(await begin_commit(session), BlockUnavailable)
        session.committer.write_out = write_out
        there, go_on = hold_heads(session)
        await device.write(90 * BLOCK, b"y" * 512)
        assert not await is_acknowledged(device)
        assert there.is_set()
        go_on.set()
        await device.flush()
        again = await reopened(device)
        assert await again.read(0, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("journals", [False, True])
@virtual
async def test_more_pages_of_the_map_change_than_are_kept(
    journals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small writes all over a volume that was opened anew: each leaf is read and then changed.

    What had just been read was dropped again for the pages that had changed, for ever, and flushes
    failed as long as the volume was open.
    """
    leaves, leaf = 8, FANOUT * BLOCK
    async with Cluster(journals=journals) as cluster:
        device = await cluster.volume(leaves * leaf)
        for at in range(leaves):
            await device.write(at * leaf, b"a" * BLOCK)
        await device.flush()
        await device.release()
        await device.client.stop()
        monkeypatch.setattr(read_side, "MAP_PAGES_MAX", 4)
        client = await cluster.client()
        device = await client.open("v")
        for at in range(leaves):
            await device.write(at * leaf, b"b" * 4096)
        client.session("v").log.needs_commit = True
        await asyncio.wait_for(device.flush(), 10.0)
        for at in range(leaves):
            assert await device.read(at * leaf, BLOCK) == b"b" * 4096 + b"a" * (BLOCK - 4096)


@virtual
async def test_what_the_journal_keeps_takes_no_newer_head_away() -> None:
    """A commit stores the next head, its answer is lost, and the volume actor dies.

    The metadata were then given the older one, which only the journal had had: collectors may have
    let go of what it leads to.
    """
    async with Cluster(nodes=3, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"a" * BLOCK)
        await device.flush()
        client = device.client
        heads, meta = client.session("v").heads, client.meta
        client.store.down = True
        await device.write(0, b"b" * BLOCK)
        await client.actor("volume:v").commit.remote(timeout_s=60)
        assert heads.owed is not None
        owed = heads.owed
        client.store.down = False
        newer = dataclasses.replace(owed, inode=owed.inode + 1)
        # As a commit did that did not hear of it.
        await meta.commit_head(1, client.session("v").epoch, heads._revision, newer)
        await heads.pay()
        assert heads.owed is None
        assert (await cluster.meta.head(1))[0] == newer
        await device.write(BLOCK, b"c" * BLOCK)
        await client.actor("volume:v").commit.remote(timeout_s=60)
        head, _ = await cluster.meta.head(1)
        assert head is not None and head.inode > owed.inode


@virtual
async def test_what_the_journal_keeps_takes_no_newer_head_of_the_same_inode_away() -> None:
    """In a long outage the numbers of INodes run out: two heads with the last one are told apart.

    The second is stored when the metadata is back, its answer is lost, and the volume actor dies.
    """
    async with Cluster(nodes=3, journals=True) as cluster:
        device = await journaling(cluster, SIZE)
        client = device.client
        session: Any = client.session("v")
        client.store.down = True
        session._inodes.clear()
        await device.write(0, b"b" * BLOCK)
        await client.actor("volume:v").commit.remote(timeout_s=60)
        owed = session.heads.owed
        assert owed is not None
        await device.write(BLOCK, b"c" * BLOCK)
        client.store.down = False
        commit_head, stored = client.meta.commit_head, asyncio.Event()

        async def unheard(*args: Any, **options: Any) -> int:
            revision = await commit_head(*args, **options)
            stored.set()
            await asyncio.sleep(60.0)
            return revision

        client.meta.commit_head = unheard  # type: ignore[method-assign]
        begin_commit(session)
        await stored.wait()
        client.meta.commit_head = commit_head  # type: ignore[method-assign]
        newer, _ = await cluster.meta.head(1)
        assert newer is not None and newer.inode == owed.inode
        session._committing.clear()  # as one by age, which its successor does not make again
        client.kill("volume:v")
        await until(lambda: session.heads.owed is None)
        assert (await cluster.meta.head(1))[0] == newer
