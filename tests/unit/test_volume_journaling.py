"""What a flush hands to the journal, and when: several records at once, and records unasked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import Cluster, Device, until, virtual
from tests.unit.test_volume_flush import reopened
from torus_actors.errors import BlockUnavailable, OutcomeUnknown, OutOfSpace
from torus_actors.volume import change_log, commit, flushing, journal, recovery
from torus_actors.volume.audit import Audit, audit_volume, explain
from torus_actors.volume.file import PUTS_BESIDE_FLUSHES, PUTS_MAX
from torus_actors.volume.flushing import FORESEE_AFTER, FORESEE_BYTES_MAX
from torus_actors.volume.session import YIELD_S

BLOCK = 16 << 10
BLOCKS = 100
SIZE = BLOCKS * BLOCK
PAGE = 4096


@pytest.fixture
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages in a record, and two such records on their way at a time."""
    record = 2 * (PAGE + change_log.PLACE_BYTES)
    monkeypatch.setattr(change_log, "RECORD_BYTES", record)
    monkeypatch.setattr(flushing, "SPARSE_BYTES_MIN", record)
    monkeypatch.setattr(journal, "UNDER_WAY_BYTES", 2 * record + 200)


async def with_journal(cluster: Cluster) -> Device:
    """A volume whose session has a journal, all of which a head has."""
    device = await cluster.volume(SIZE, write_bytes=8 << 20)
    await flushed(device, 0, b"first")
    await device.client.actor("volume:v").commit.remote()
    assert device.client.session("v").journal.active
    return device


async def flushed(device: Device, offset: int, data: bytes) -> None:
    """Write, then flush."""
    await device.write(offset, data)
    await device.flush()


async def scatter(device: Device, pages: int = 1) -> None:
    """Write into each block, at its beginning; no flush."""
    for index in range(BLOCKS):
        await device.write(index * BLOCK, bytes([index]) * (pages * PAGE))


async def assert_scattered(device: Device) -> None:
    """All of that is there after a crash of the client."""
    again = await reopened(device)
    for index in range(BLOCKS):
        assert await again.read(index * BLOCK, PAGE) == bytes([index]) * PAGE


def watch_sends(monkeypatch: pytest.MonkeyPatch, seen: Callable[[], None]) -> None:
    """Call ``seen`` whenever a record is sent to the members."""
    send = journal._Append.send

    def watched(append: journal._Append) -> None:
        seen()
        send(append)

    monkeypatch.setattr(journal._Append, "send", watched)


@virtual
async def test_much_that_is_scattered_is_flushed_in_several_records(
    small_records: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by putting whole blocks for a page of each; few of them are on their way at a time."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        heads, sent = session.heads.recorded, session.journal.sent
        under_way = [0]
        watch_sends(monkeypatch, lambda: under_way.append(session.journal.under_way_bytes))
        await scatter(device)
        await device.flush()
        assert session.heads.recorded == heads
        assert session.journal.sent - sent == len(under_way) - 1 == BLOCKS // 2
        assert 4 * PAGE < max(under_way) <= journal.UNDER_WAY_BYTES
        assert session.journal.under_way_bytes == 0
        await assert_scattered(device)


@pytest.mark.parametrize("synced", [False, True])
@virtual
async def test_many_blocks_are_named_by_several_records(
    monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    """Without the metadata, whatever was put since the last flush: a member takes no record of all.

    Also where those blocks are durable already, and what is left to tell is small.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        for node in cluster.nodes.values():
            assert node.journal is not None
            monkeypatch.setattr(type(node.journal.store.limits), "record_bytes_max", 2000)
        monkeypatch.setattr(change_log, "RECORD_BLOCKS", 40)
        device.client.store.down = True
        for n in range(BLOCKS):
            await device.write(n * BLOCK, bytes([n]) * BLOCK)
        await until(lambda: not session.file.layers.any_full)
        if synced:
            await session.committer.make_durable(dict(session.file.unsynced))
        before = session.log.seq
        await flushed(device, 0, b"small")
        assert session.log.seq == before + 3 and session.journal.active
        again = await reopened(device)
        assert await again.read(0, 6) == b"small\0"
        for n in range(1, BLOCKS):
            assert await again.read(n * BLOCK, 2) == bytes([n, n])


@virtual
async def test_a_record_goes_alone_when_members_may_have_none(
    small_records: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a commit: whatever becomes of the first one, it is known before the next goes."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        under_way: list[int] = []
        watch_sends(monkeypatch, lambda: under_way.append(session.journal.under_way_bytes))
        await scatter(device)
        await device.flush()
        one = max(under_way) // 2
        assert under_way[0] < one + 200 and under_way[1] < one + 200
        assert under_way[2] > one + 200


@virtual
async def test_blocks_that_are_mostly_written_are_put_whole(small_records: None) -> None:
    """To journal them first would cost as much again."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        heads = session.heads.recorded
        await scatter(device, pages=3)
        await device.flush()
        assert session.heads.recorded == heads + 1
        await assert_scattered(device)


@virtual
async def test_more_than_its_members_have_room_for_is_not_journaled(small_records: None) -> None:
    """It is committed instead."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        heads = session.heads.recorded
        session.journal.size_max = session.journal.size + 20 * PAGE
        await scatter(device)
        await device.flush()
        assert session.heads.recorded == heads + 1
        await assert_scattered(device)


@virtual
async def test_a_member_dies_between_the_records_of_a_flush(
    small_records: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush commits; what was not sent yet is sent to nobody, nor to the next ensemble."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        heads, before = session.heads.recorded, session.journal.members
        nodes = {node.node_id: node for node in cluster.nodes.values()}
        sends = 0
        crash: asyncio.Task[None] | None = None

        def count() -> None:
            nonlocal sends, crash
            sends += 1
            if sends == 5:
                crash = asyncio.ensure_future(nodes[before[1]].crash())

        watch_sends(monkeypatch, count)
        await scatter(device)
        await device.flush()
        assert crash is not None
        await crash
        assert session.heads.recorded > heads
        assert 5 <= sends <= 7
        await flushed(device, 0, bytes(PAGE))  # forms the next ensemble
        await until(lambda: session.journal.active)
        assert session.journal.members != before
        await flushed(device, 0, bytes(PAGE))
        await assert_scattered(device)


@virtual
async def test_no_journal_has_fewer_members_than_copies_are_wanted() -> None:
    """With one of two nodes away flushes are commits; once it is back they are records again."""
    async with Cluster(nodes=2, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        await cluster.node(0).crash()
        for n in range(3):
            await flushed(device, n * PAGE, b"alone")
            assert not session.journal.active
        await cluster.node(0).start()
        await until(lambda: not device.client.system.transport.is_down(cluster.ids[0]))
        for n in range(2):
            await flushed(device, n * PAGE, b"again")
        assert session.journal.active and len(session.journal.members) == 2


@virtual
async def test_a_node_whose_journal_failed_is_no_member() -> None:
    """Its blocks may be well, so it is up all the time: the next node takes its place."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        failed, other = session.journal.members
        node = cluster.nodes[failed]
        assert node.journal is not None
        node.disks[2].inject("sync", times=1 << 30)
        node.disks[2].inject("write", times=1 << 30)
        for n in range(3):
            await flushed(device, n * PAGE, b"%d" % n)
        assert node.journal.store.failure is not None
        assert session.journal.active
        assert set(session.journal.members) == set(cluster.ids) - {failed}
        await cluster.nodes[other].crash()
        again = await reopened(device)
        for n in range(3):
            assert await again.read(n * PAGE, 1) == b"%d" % n


@virtual
async def test_a_node_whose_journal_is_full_is_no_member_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It promises to refuse older sessions, but takes no record: flushes go on without it."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        full, _ = session.journal.members
        node = cluster.nodes[full]
        assert node.journal is not None

        def takes_none(*_: Any) -> None:
            raise OutOfSpace("the journal is full")

        monkeypatch.setattr(node.journal.store, "append", takes_none)
        for n in range(3):
            await flushed(device, n * PAGE, b"%d" % n)
        assert session.journal.active
        assert set(session.journal.members) == set(cluster.ids) - {full}


@pytest.mark.parametrize("busy", [False, True])
@virtual
async def test_a_journal_has_as_many_members_as_copies_are_wanted_by_now(busy: bool) -> None:
    """The replication is raised while a volume is open: its journal gets another member soon."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        cluster.set_ring(cluster.ring.with_replication(3))
        for n in range(100):
            if busy:
                await flushed(device, n * PAGE, b"busy")
            await asyncio.sleep(0.05)
        assert session.journal.active and len(session.journal.members) == 3
        await flushed(device, SIZE - PAGE, b"three")
        for member in session.journal.members[:2]:
            await cluster.nodes[member].crash()
        again = await reopened(device)
        assert await again.read(SIZE - PAGE, 5) == b"three"


@virtual
async def test_flushes_that_never_pause_do_not_keep_a_journal_from_more_members() -> None:
    """The second commit takes what came during the first, and nothing comes during that."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")

        async def write_and_flush(at: int) -> None:
            while len(session.journal.members) < 3:
                await flushed(device, at * PAGE, b"on and on")

        workers = [asyncio.ensure_future(write_and_flush(at)) for at in range(4)]
        await asyncio.sleep(0.1)
        before = session.heads.recorded
        cluster.set_ring(cluster.ring.with_replication(3))
        await asyncio.wait_for(asyncio.gather(*workers), 10.0)
        assert session.heads.recorded - before <= 3


@pytest.mark.parametrize("leaves", [False, True])
@virtual
async def test_commits_that_never_pause_do_not_keep_a_journal_from_other_members(
    leaves: bool,
) -> None:
    """They are looked for between them too; one more of them, or others than have left the ring."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        members, ring = set(cluster.ids), cluster.ring.with_replication(3)
        if leaves:
            leaver = session.journal.members[0]
            members, ring = members - {leaver}, cluster.ring.without_peer(leaver)
        cluster.set_ring(ring)
        for n in range(150):
            await device.write(n % 60 * PAGE, b"x")
            session.commit_soon(lambda _: None)
            await asyncio.sleep(0.2)
        assert session.journal.active and set(session.journal.members) == members


@virtual
async def test_a_journal_that_is_to_have_more_members_goes_on_while_the_metadata_is_away() -> None:
    """They cannot be recorded then: flushes are records, as before, and wait for nothing."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        device.client.store.down = True
        cluster.set_ring(cluster.ring.with_replication(3))
        loop = asyncio.get_running_loop()
        for n in range(30):
            began = loop.time()
            await flushed(device, n * PAGE, b"away")
            assert loop.time() - began < 0.5
            await asyncio.sleep(0.5)
        assert session.journal.active and len(session.journal.members) == 2
        device.client.store.down = False
        await until(lambda: session.journal.active and len(session.journal.members) == 3)


@virtual
async def test_an_ensemble_is_the_one_that_the_metadata_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change whose answer was lost for good names another one: none is used then.

    The next client would ask its members only, which have none of the records.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        first, second = session.journal.members
        set_journal = session._meta.set_journal
        lost: list[tuple[Any, ...]] = []

        async def unknown(*args: Any, **_: Any) -> int:
            lost.append(args)
            raise OutcomeUnknown("the answer is lost, and what was asked is late")

        monkeypatch.setattr(session._meta, "set_journal", unknown)
        await cluster.nodes[second].crash()
        await flushed(device, 0, b"1")
        await until(lambda: bool(lost))
        assert not session.journal.active
        await set_journal(*lost[0])
        monkeypatch.undo()
        (third,) = set(lost[0][3].ensemble) - {first}
        await cluster.nodes[second].start()
        await cluster.nodes[third].crash()
        await until(lambda: not device.client.system.transport.is_down(second))
        for n in range(6):
            await flushed(device, n * PAGE, b"2")
            found, _ = await cluster.meta.journal(session.volume_id)
            assert found is not None
            assert not session.journal.active or found.ensemble == session.journal.members
        assert session.journal.active and set(session.journal.members) == {first, second}


async def foreseen(device: Device) -> None:
    """Flush after every write for so long that the next flush is expected."""
    for n in range(FORESEE_AFTER + 1):
        await flushed(device, n * PAGE, b"x")


@virtual
async def test_a_flush_that_follows_every_write_is_foreseen() -> None:
    """The record leaves with the write, and the flush that comes then needs no other."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        appends = device.client.session("v").journal
        await foreseen(device)
        sent = appends.sent
        await device.write(0, b"seven")
        await until(lambda: appends.sent == sent + 1)
        await device.flush()
        assert appends.sent == sent + 1
        await device.write(PAGE, b"eight")
        await until(lambda: appends.sent == sent + 2 and not appends.under_way_bytes)
        await device.flush()  # the record is on every disk by now
        assert appends.sent == sent + 2
        again = await reopened(device)
        assert await again.read(0, 5) == b"seven" and await again.read(PAGE, 5) == b"eight"


@virtual
async def test_a_foreseen_flush_waits_for_its_record() -> None:
    """A member that takes its time holds it up, and one that fails makes it a commit."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        await foreseen(device)
        nodes = {node.node_id: node for node in cluster.nodes.values()}
        member = nodes[session.journal.members[0]]
        heads = session.heads.recorded
        await member.crash()
        await device.write(0, b"seven")
        assert session.heads.recorded == heads
        await device.flush()
        assert session.heads.recorded > heads
        again = await reopened(device)
        assert await again.read(0, 5) == b"seven"


@virtual
@pytest.mark.parametrize("much", [False, True])
async def test_what_is_not_foreseen_waits_for_its_flush(much: bool) -> None:
    """A client that writes several times before it flushes, or much at a time."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        appends = device.client.session("v").journal
        await foreseen(device)
        for _ in range(2):
            if not much:
                await device.write(0, b"one")
                await device.write(PAGE, b"two")
                await device.flush()
            sent = appends.sent
            for n in range(FORESEE_BYTES_MAX // (2 * PAGE) + 1 if much else 1):
                await device.write(n * BLOCK, bytes(2 * PAGE))
                if much and not n:
                    await until(lambda before=sent: appends.sent == before + 1)
            await asyncio.sleep(0.1)
            assert appends.sent == sent + (1 if much else 0)
            await device.flush()


async def told_and_put(device: Device, kept_max: int) -> None:
    """Scattered pages that records have told, and whose blocks are on the ring, not durable."""
    file = device.client.session("v").file
    file.kept_max = kept_max
    await scatter(device)
    await device.flush()
    for index in range(BLOCKS):
        file.want(index)
    file.pump()
    await until(lambda: len(file.unsynced) == BLOCKS)


@virtual
async def test_a_flush_waits_for_no_block_that_records_have_told() -> None:
    """No store is synced for it; and should all nodes crash then, nothing is lost."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        await told_and_put(device, kept_max=BLOCKS)
        calls: list[str] = []
        cluster.network.trace = lambda _, __, ___, method: calls.append(method)
        await flushed(device, 5, b"new")
        assert calls.count("append") == 2 and "flush" not in calls
        for node in cluster.nodes.values():
            await node.restart()
        content = bytearray(PAGE)
        content[5:8] = b"new"
        assert await device.read(0, PAGE) == content
        for index in range(1, BLOCKS):
            assert await device.read(index * BLOCK, PAGE) == bytes([index]) * PAGE
        again = await reopened(device)
        assert await again.read(0, PAGE) == content
        for index in range(1, BLOCKS):
            assert await again.read(index * BLOCK, PAGE) == bytes([index]) * PAGE


@virtual
async def test_a_flush_waits_for_blocks_that_nobody_keeps() -> None:
    """Records have told them, but if their nodes crash, only a new session could read them."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        await told_and_put(device, kept_max=BLOCKS // 2)
        file = device.client.session("v").file
        assert sum(stored.kept is None for stored in file.unsynced.values()) == BLOCKS // 2
        await flushed(device, 5, b"new")
        assert not file.unsynced  # a sync is of all of them


@virtual
async def test_a_flush_waits_for_blocks_that_its_record_names() -> None:
    """What was written between flushes, and is in blocks already, is told by their names."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        file = device.client.session("v").file
        await device.write(0, b"x" * PAGE)
        file.want(0)
        file.pump()
        await until(lambda: file.unsynced)
        await device.flush()
        assert not file.unsynced
        for node in cluster.nodes.values():
            await node.restart()
        assert await (await reopened(device)).read(0, PAGE) == b"x" * PAGE


@virtual
async def test_a_commit_leaves_the_size_of_what_came_meanwhile() -> None:
    """The members still have those records: a journal that forgot them would outgrow its room."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        commit_head = session._meta.commit_head

        async def recorded(*args: Any, **options: Any) -> int:
            await flushed(device, BLOCK, b"meanwhile")
            return await commit_head(*args, **options)

        for _ in range(10):
            await flushed(device, 0, b"before")
        before = session.journal.size
        session._meta.commit_head = recorded  # type: ignore[method-assign]
        committed = asyncio.get_running_loop().create_future()
        session.commit_soon(committed.set_result)
        assert await committed is None
        assert session.journal.size == before // 10 > 0


@pytest.mark.parametrize("by_a_tool", [False, True])
@virtual
async def test_a_volume_that_is_written_to_is_not_quiet(by_a_tool: bool) -> None:
    """What comes in the meantime shares its blocks with more, and waits in the journal for them."""
    async with Cluster(nodes=2, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        heads = device.client.session("v").heads
        before = heads.recorded
        write = device.client.actor("volume:v").write.remote if by_a_tool else device.write
        for index in range(int(journal.COMMIT_AGE_S)):
            await write(index * BLOCK, bytes(PAGE))
            await device.flush()
            await asyncio.sleep(2)
        assert heads.recorded == before
        await until(lambda: heads.recorded > before, journal.COMMIT_AGE_S)


@virtual
async def test_a_journal_is_no_larger_than_a_replay_may_be() -> None:
    """A replay holds it in memory: it is folded at the size of the write cache."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        heads = session.heads.recorded
        session.journal.replay_bytes = 20 * PAGE
        for _ in range(30):
            await flushed(device, 0, b"again")
        await until(lambda: session.heads.recorded > heads)


@virtual
async def test_blocks_are_put_gently_beside_small_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not when no flush was for a while, nor when the journal fills up."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        most = [0]
        start_put = session.file._start_put

        def started(index: int) -> None:
            start_put(index)
            most[0] = max(most[0], session.file._putting)

        monkeypatch.setattr(session.file, "_start_put", started)

        async def put_all() -> int:
            most[0] = 0
            await session.committer.write_out(list(range(BLOCKS)))
            return most[0]

        await asyncio.sleep(YIELD_S)
        await scatter(device)
        assert await put_all() == PUTS_MAX
        await device.flush()
        await scatter(device)
        await device.flush()
        assert await put_all() == PUTS_BESIDE_FLUSHES
        await scatter(device)
        await device.flush()
        await asyncio.sleep(YIELD_S)
        assert await put_all() == PUTS_MAX
        await scatter(device)
        await device.flush()
        session.journal.size_max = session.journal.size // 2
        assert await put_all() == PUTS_MAX


@virtual
async def test_a_commit_may_take_long_as_long_as_it_gets_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its patience is for the next block: small writes all over a large volume take many."""
    patience_s = 1.0
    monkeypatch.setattr(commit, "PATIENCE_S", patience_s)
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        await scatter(device)
        cluster.network._latency = lambda: 0.1  # type: ignore[method-assign]
        loop = asyncio.get_running_loop()
        began = loop.time()
        await session.committer.write_out(list(range(BLOCKS)))
        assert loop.time() - began > patience_s


@virtual
async def test_what_counts_as_one_record_is_one() -> None:
    """An extent just as long as a record may be, in a block that is longer than a record."""
    async with Cluster(
        nodes=3, replication=2, journals=True, block_size=2 << 20, blocks=30
    ) as cluster:
        device = await cluster.volume(16 << 20, write_bytes=16 << 20)
        await device.write(0, b"first")
        await device.flush()
        session = device.client.session("v")
        assert session.journal.active
        before = session.log.seq
        await asyncio.sleep(1.0)
        await device.write(2 << 20, b"x" * (change_log.RECORD_BYTES - change_log.PLACE_BYTES))
        assert session.log.extent_bytes == change_log.RECORD_BYTES
        await device.flush()
        assert session.log.seq == before + 1
        again = await reopened(device)
        assert await again.read(2 << 20, 4) == b"xxxx"


async def flushed_late(cluster: Cluster, text: bytes) -> tuple[Device, Callable[..., Any]]:
    """A volume with this in its journal only, and how to audit it."""
    device = await cluster.volume(SIZE)
    for _ in range(2):
        await device.write(0, b"first")
        await device.flush()
    await until(lambda: device.client.session("v").journal.active)
    await device.write(5000, text)
    await device.flush()
    tool = await cluster.client()

    async def audit(deep: bool = False) -> Audit:
        assert tool.system is not None
        return await audit_volume(tool.system, cluster.meta, tool.view, "v", deep=deep)

    return device, audit


@virtual
async def test_an_audit_tells_whether_the_journal_can_be_had() -> None:
    """Of a volume that is open, or was not closed in order: of how many of its members.

    With fewer than there should be it is not good, whatever copies its blocks have; with none it
    cannot be opened.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device, audit = await flushed_late(cluster, b"late and flushed")
        in_use = await audit()
        members = in_use.journal
        assert in_use.good and len(members) == 2 and not in_use.journal_lost
        await device.client.crash()
        await asyncio.sleep(30)
        assert (await audit()).journal_lost == []
        told = ["1 of 2 members", "cannot be opened"]
        for lost, member in enumerate(members, 1):
            await cluster.nodes[member].system.remove("journal")
            found = await audit()
            assert found.journal_lost == members[:lost]
            assert not found.good and not found.fewer
            assert told[lost - 1] in str(explain(found)) and member[:8] in str(explain(found))
        with pytest.raises(BlockUnavailable):
            await (await cluster.client()).open("v")


@pytest.mark.parametrize("opened", [False, True])
@virtual
async def test_a_deep_audit_reads_the_journal(opened: bool) -> None:
    """A member with a damaged record is not counted; opening the volume makes all good again.

    Also after somebody who opened it died before the first commit: the members have promised
    themselves to that session.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        text = b"late and flushed"
        device, audit = await flushed_late(cluster, text)
        member, other = (await audit()).journal
        await device.client.crash()
        if opened:
            await asyncio.sleep(30)
            lease = await cluster.meta.grant_lease(1)
            epoch = await cluster.meta.attach(1, "who dies", lease)
            node = cluster.nodes[other]
            for each in (member, other):
                await node.system.actor("journal", node=each).fence.remote(1, epoch)
            await asyncio.sleep(5)
        assert (await audit(deep=True)).good
        disk = cluster.nodes[member].disks[2]
        for path in disk.listdir():
            found = disk.durable(path, 0, 1 << 20).find(text)
            if found >= 0:
                disk.rot(path, found)
        damaged = await audit(deep=True)
        assert damaged.journal_lost == [member] and not damaged.good
        assert (await audit()).good, "looked up, it is there"
        await asyncio.sleep(30)
        again = await cluster.client()
        assert await (await again.open("v")).read(5000, len(text)) == text
        await until(lambda: again.session("v").heads.recorded)
        assert (await audit(deep=True)).good


@virtual
async def test_an_audit_does_not_mind_a_commit_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of a member may be cut by then: it looks again."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device, audit = await flushed_late(cluster, b"late and flushed")
        ask = recovery._fence
        commits = []

        async def fence_then_commit(*of: Any) -> Any:
            tail = await ask(*of)
            if len(commits) < 2:
                commits.append(device.client.session("v").heads.recorded)
                await device.write(0, b"more")
                await device.flush()
                committed = asyncio.get_running_loop().create_future()
                device.client.session("v").commit_soon(committed.set_result)
                assert await committed is None
                await device.write(0, b"still more")
                await device.flush()
            return tail

        monkeypatch.setattr(recovery, "_fence", fence_then_commit)
        found = await audit(deep=True)
        assert len(commits) == 2 and found.good and found.journal


@virtual
async def test_an_audit_finds_no_journal_of_a_volume_that_was_closed() -> None:
    """All is in its head."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await cluster.volume(SIZE)
        for _ in range(2):
            await device.write(0, b"first")
            await device.flush()
        await device.release()
        tool = await cluster.client()
        assert tool.system is not None
        found = await audit_volume(tool.system, cluster.meta, tool.view, "v")
        assert found.good and not found.journal


@virtual
async def test_an_audit_does_not_count_on_a_disk_that_failed() -> None:
    """A block that was put there last is in the page cache alone, and gone after a restart.

    Found by review: it counted as a good copy.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(SIZE)
        await device.write(0, b"x" * BLOCK, fua=True)
        tool = await cluster.client()
        assert tool.system is not None

        async def audit() -> Audit:
            assert tool.system is not None
            return await audit_volume(tool.system, cluster.meta, tool.view, "v")

        assert (await audit()).good
        node = cluster.node(1)
        (ref,) = node.refs()
        root = node.stores[0].root_of(ref)
        node.stores[0].delete([ref])
        await asyncio.sleep(5.0)
        node.disks[0].inject("sync", times=10)
        await tool.actor("replicator").repair.remote(ref, root, node.node_id)
        await asyncio.sleep(5.0)
        found = await audit()
        problem = explain(found)
        assert not found.good and found.unsafe == [node.node_id] and not found.missing
        assert problem is not None and f"restart {node.node_id[:8]}" in str(problem)
        node.disks[0].heal()
        await node.restart()
        found = await audit()
        assert (found.fewer, found.missing, found.unsafe) == (1, 0, [])
        await tool.actor("replicator").repair.remote(ref, root, node.node_id)
        assert (await audit()).good


@virtual
async def test_a_volume_closed_without_its_journal_needs_no_member_of_it() -> None:
    """The journal ended with a node, there was no other for a new one, and all is in the head."""
    async with Cluster(nodes=2, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        await cluster.node(0).crash()
        await device.write(0, b"later")
        await device.flush()
        assert not session.journal.active and session.all_covered
        await device.release()
        other = await cluster.client()
        for node in cluster.ids:
            cluster.network.cut(other.node_id, node)
        again = await other.open("v")
        cluster.network.heal()
        assert await again.read(0, 5) == b"later"


@virtual
async def test_what_a_head_has_no_record_need_tell() -> None:
    """A client writes for long and never flushes: what is kept for records does not grow with it.

    A commit comes by itself from time to time. What it has not in its head is told.
    """
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        there, go_on = asyncio.Event(), asyncio.Event()
        record = session.committer._record

        async def held(*args: Any) -> None:
            there.set()
            await go_on.wait()
            await record(*args)

        for index in range(BLOCKS - 1):
            await device.write(index * BLOCK, b"x" * BLOCK)
        session.committer._record = held
        committed = asyncio.get_running_loop().create_future()
        session.commit_soon(committed.set_result)
        await there.wait()
        for index in (5, BLOCKS - 1):
            await device.write(index * BLOCK, b"y" * BLOCK)
        await until(lambda: not session.file.layers.size)
        go_on.set()
        assert await committed is None
        assert len(session.log.refs()) == 2
        await device.flush()
        again = await reopened(device)
        for index in range(BLOCKS):
            told = index in (5, BLOCKS - 1)
            assert await again.read(index * BLOCK, 1) == (b"y" if told else b"x")


@virtual
async def test_a_journal_that_cannot_have_more_members_goes_on_as_it_is() -> None:
    """More copies are wanted, and the third node takes no records: two go on having them."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        members = session.journal.members
        (third,) = set(cluster.ids) - set(members)
        taking = cluster.nodes[third].journal
        assert taking is not None
        store = taking.store
        store._failure = "failed (for a test)"
        cluster.set_ring(cluster.ring.with_replication(3))
        for n in range(50):
            await flushed(device, n * PAGE, b"goes on")
            await asyncio.sleep(0.2)
        assert session.journal.active and session.journal.members == members
        before = session.heads.recorded
        for n in range(50):
            await flushed(device, n * PAGE, b"as records")
        assert session.heads.recorded == before
        store._failure = None
        await until(lambda: len(session.journal.members) == 3, 60.0)
        await flushed(device, 0, b"with three")
        again = await reopened(device)
        assert await again.read(0, 10) == b"with three"
        assert await again.read(49 * PAGE, 10) == b"as records"


@virtual
async def test_an_ensemble_that_cannot_be_recorded_leaves_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The metadata goes away between the head and the new ensemble, which has more members."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session, store = device.client.session("v"), device.client.store
        members, set_journal = session.journal.members, session._meta.set_journal

        async def away(*args: Any, **options: Any) -> int:
            store.down = True
            return await set_journal(*args, **options)

        monkeypatch.setattr(session._meta, "set_journal", away)
        cluster.set_ring(cluster.ring.with_replication(3))
        await until(lambda: store.down)
        await asyncio.sleep(3.0)
        named, _ = await cluster.meta.journal(session.volume_id)
        assert named is not None and named.ensemble == members
        await asyncio.wait_for(flushed(device, 0, b"as a record"), 5.0)
        again = await reopened(device)
        assert await again.read(0, 11) == b"as a record"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@virtual
async def test_no_ensemble_is_made_by_an_earlier_ring(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has left it may be switched off once no journal names it, and must not be named later.

    Found by reading: a client that hears late of a ring chose such a node.
    """
    async with Cluster(nodes=4, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        before = cluster.ring
        crashing, leaver = session.journal.members
        gather = session.journal._gather

        def change() -> None:
            cluster.set_ring(before.without_peer(leaver))
            device.client.view.ring = before

        async def late(covered_seq: int) -> Any:
            found = await gather(covered_seq)
            change()
            return found

        if when == "before":
            change()
        else:
            monkeypatch.setattr(session.journal, "_gather", late)
        await cluster.nodes[crashing].crash()
        for n in range(3):
            await flushed(device, n * PAGE, b"without")
            assert not session.journal.active
        named, _ = await cluster.meta.journal(session.volume_id)
        assert named is not None and named.ensemble == (crashing, leaver)
        monkeypatch.undo()
        device.client.view.ring = cluster.ring
        for n in range(5):
            await flushed(device, n * PAGE, b"with one")
            await asyncio.sleep(1.0)
        assert session.journal.active and leaver not in session.journal.members


@pytest.mark.parametrize("found", [False, True])
@virtual
async def test_no_flush_waits_for_nodes_that_are_to_join_the_journal_and_hang(
    found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is their disks that hang: they are up, and do not answer.

    Or they did once, when more copies were wanted for a moment.
    """
    async with Cluster(nodes=5, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        if found:
            cluster.set_ring(cluster.ring.with_replication(3))
            await until(lambda: session.journal.is_outdated)
            cluster.set_ring(cluster.ring.with_replication(2))
            await asyncio.sleep(20.0)
            assert len(session.journal.members) == 2
        for each in set(cluster.ids) - set(session.journal.members):
            monkeypatch.setattr(cluster.nodes[each].journal, "submit", lambda *_: None)
        cluster.set_ring(cluster.ring.with_replication(3))
        for n in range(2 * int(journal.GROW_PAUSE_S)):
            await asyncio.wait_for(flushed(device, n * PAGE, b"on and on"), 0.5)
            await asyncio.sleep(1.0)


@pytest.mark.parametrize("busy", [False, True])
@virtual
async def test_a_member_that_leaves_the_ring_leaves_the_journal_too(busy: bool) -> None:
    """It may be switched off as soon as it has handed over its blocks, with what was flushed."""
    async with Cluster(nodes=3, replication=2, journals=True) as cluster:
        device = await with_journal(cluster)
        session = device.client.session("v")
        leaver, _ = session.journal.members
        await flushed(device, 0, b"before")
        cluster.set_ring(cluster.ring.without_peer(leaver))
        for n in range(1, 31):
            if busy:
                await flushed(device, n * PAGE, b"meanwhile")
            await asyncio.sleep(1.0)
        assert session.journal.active
        assert set(session.journal.members) == set(cluster.ids) - {leaver}
        await flushed(device, SIZE - PAGE, b"after")
        await cluster.nodes[leaver].crash()
        again = await reopened(device)
        assert await again.read(0, 6) == b"before"
        assert await again.read(30 * PAGE, 9) == (b"meanwhile" if busy else bytes(9))
        assert await again.read(SIZE - PAGE, 5) == b"after"
