"""The journal actor and its disk worker: answers, group commit, and the death of either."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runtime_harness import PATIENCE_S, on_uvloop, system_of, until
from torus_actors.actors.journal import JournalActor, JournalDisk, OpenJournal
from torus_actors.errors import (
    ActorNotFound,
    Closed,
    Corruption,
    Fenced,
    Invalid,
    NotExist,
    OutcomeUnknown,
    TorusError,
)
from torus_actors.machine import Machine
from torus_actors.node import NodeConfig, start_node
from torus_actors.runtime import ChildSpec, get
from torus_actors.scenarios.processes import free_ports
from torus_actors.storage.disk import Disk
from torus_actors.storage.journal_format import segment_name
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.simdisk import Operation, SimDisk

LIMITS = JournalLimits(segment_bytes=256 << 10, journal_bytes_max=6 * (256 << 10))


class Gate:
    """Holds the disk before each sync while it is shut."""

    def __init__(self, disk: SimDisk) -> None:
        self.syncs = 0
        self.open = threading.Event()
        self.open.set()
        disk.on_operation = self

    def __call__(self, operation: Operation) -> None:
        """Before each operation; in the worker's thread."""
        if operation.kind == "sync":
            self.syncs += 1
            assert self.open.wait(PATIENCE_S)


@contextlib.asynccontextmanager
async def journal_on(disk: Disk) -> AsyncIterator[tuple[OpenJournal, Any]]:
    """A system with a journal on this disk, and a handle to it."""
    async with system_of() as system:
        opened = OpenJournal.open(system, disk, random.Random(1), LIMITS)
        root = system.actor("root")
        await root.start_child.remote(ChildSpec("journal_disk", JournalDisk, shutdown_s=1.0))
        await root.start_child.remote(
            ChildSpec("journal", lambda: JournalActor(opened), max_concurrency=16)
        )
        yield opened, system.actor("journal")
    opened.close()


@on_uvloop
async def test_answers() -> None:
    """Each call says what it should, and errors come as themselves."""
    async with journal_on(SimDisk(random.Random(1))) as (opened, journal):
        identity = opened.store.identity
        room = opened.store.room
        assert await journal.fence.remote(7, 3) == [0, 0, 0, False, identity, room]
        for seq in range(4, 7):
            assert await journal.append.remote(7, 3, seq, payload=bytes([seq]) * 10) == identity
        assert await journal.append.remote(7, 3, 6, payload=bytes([6]) * 10) == identity
        with pytest.raises(Invalid, match="the next one is 7"):
            await journal.append.remote(7, 3, 8, payload=b"")
        with pytest.raises(Fenced):
            await journal.append.remote(7, 2, 8, payload=b"")
        with pytest.raises(Fenced):
            await journal.fence.remote(7, 2)
        reply = await journal.read_tail.remote(7, 3, 5, 1000)
        assert reply.result == [[5, 10], [6, 10]]
        assert reply.joined() == bytes([5]) * 10 + bytes([6]) * 10
        reply = await journal.read_tail.remote(7, 3, 7, 1000)
        assert reply.result == [] and reply.joined() == b""
        assert await journal.cut.remote(7, 3, 4) is None
        with pytest.raises(NotExist):
            await journal.read_tail.remote(7, 3, 4, 1000)
        assert await journal.fence.remote(7, 9) == [3, 5, 6, False, identity, room]
        assert await journal.volumes.remote() == {7: (3, 6)}
        stats = await journal.stats.remote()
        assert stats["identity"] == identity and stats["failure"] == "" and stats["records"] == 2
        assert await journal.drop.remote(7) == identity
        assert await journal.fence.remote(7, 1) == [0, 0, 0, False, identity, room]


@on_uvloop
async def test_what_comes_while_the_disk_is_busy_shares_a_sync() -> None:
    """Sixteen sessions that write at once cost two syncs, not sixteen."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (_, journal):
        await journal.fence.remote(99, 1)
        gate = Gate(disk)
        gate.open.clear()
        refs = [journal.append.remote(1, 1, 1, payload=b"first")]
        await until(lambda: gate.syncs == 1)
        refs += [journal.append.remote(2 + i, 1, 1, payload=bytes(4096)) for i in range(16)]
        refs += [journal.append.remote(1, 1, seq, payload=b"next") for seq in range(2, 10)]
        await asyncio.wait([refs[1].future], timeout=0.01)
        assert not any(ref.done() for ref in refs)
        gate.open.set()
        await get(refs, timeout=PATIENCE_S)
        assert gate.syncs == 2


@on_uvloop
async def test_death_of_the_actor_costs_nothing() -> None:
    """Appends and reads that were under way are answered, and nothing is done twice."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (opened, journal):
        await journal.fence.remote(1, 1)
        gate = Gate(disk)
        gate.open.clear()
        refs = [journal.append.remote(1, 1, seq, payload=bytes([seq])) for seq in range(1, 40)]
        await until(lambda: gate.syncs == 1)
        opened.system.cells["journal"].kill()
        refs.append(journal.append.remote(1, 1, 40, payload=b"("))
        gate.open.set()
        await get(refs, timeout=PATIENCE_S)
        read = journal.read_tail.remote(1, 1, 1, 1 << 20)
        opened.system.cells["journal"].kill()
        assert (await read).joined() == bytes(range(1, 41))
        assert all(segment.reading == 0 for segment in opened.store._segments)


@on_uvloop
async def test_death_of_the_worker_costs_nothing() -> None:
    """A step whose worker was killed is ended by the next one, in order."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (opened, journal):
        await journal.fence.remote(1, 1)
        gate = Gate(disk)
        for seq in range(1, 8):
            gate.open.clear()
            before = gate.syncs
            ref = journal.append.remote(1, 1, seq, payload=bytes([seq]))
            await until(lambda before=before: gate.syncs > before)
            opened.system.cells["journal_disk"].kill()
            gate.open.set()
            await get(ref, timeout=PATIENCE_S)
        assert (await journal.read_tail.remote(1, 1, 1, 100)).joined() == bytes(range(1, 8))


@on_uvloop
async def test_failed_disk() -> None:
    """A failed sync fails what it covered and all that follows, and kills nobody."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (opened, journal):
        await journal.append.remote(1, 1, 1, payload=b"x")
        disk.inject("sync")
        with pytest.raises(OutcomeUnknown, match="restart the node"):
            await journal.append.remote(1, 1, 2, payload=b"y")
        with pytest.raises(Closed, match="restart the node"):
            await journal.append.remote(1, 1, 3, payload=b"y")
        assert (await journal.read_tail.remote(1, 1, 1, 100)).joined() == b"x"
        assert (await journal.stats.remote())["failure"]
        assert opened.system.cells["journal"].restarts == 0
        assert opened.system.cells["journal_disk"].restarts == 0


@on_uvloop
async def test_damaged_record() -> None:
    """A reader of a damaged record is told; the next one gets what is whole."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (opened, journal):
        for seq in (1, 2):
            await journal.append.remote(1, 1, seq, payload=bytes(100))
        stored = opened.store._logs[1].runs[1].records[0]
        assert stored is not None
        disk.rot(segment_name(0), stored.offset)
        with pytest.raises(Corruption):
            await journal.read_tail.remote(1, 1, 1, 1000)
        assert (await journal.read_tail.remote(1, 1, 2, 1000)).result == [[2, 100]]


@on_uvloop
async def test_room_is_made_under_load() -> None:
    """Many times the journal's size goes through it, with sixteen writers."""
    disk = SimDisk(random.Random(1))
    async with journal_on(disk) as (opened, journal):
        await journal.append.remote(500, 1, 1, payload=b"stays")

        async def writer(volume: int) -> None:
            for seq in range(1, 101):
                await journal.append.remote(volume, 1, seq, payload=bytes([seq]) * 4096)
                if seq % 5 == 0:
                    await journal.cut.remote(volume, 1, seq - 2)

        await asyncio.gather(*(writer(volume) for volume in range(1, 17)))
        stats = opened.store.stats()
        assert stats.reused > 10 and stats.segments <= LIMITS.segments_max
        for volume in range(1, 17):
            reply = await journal.read_tail.remote(volume, 1, 99, 1 << 20)
            assert reply.joined() == bytes([99]) * 4096 + bytes([100]) * 4096
    again = SimDisk.crash(disk)
    async with journal_on(again) as (opened, journal):
        assert (await journal.read_tail.remote(500, 1, 1, 100)).joined() == b"stays"


@on_uvloop
async def test_stop_settles_what_is_waiting() -> None:
    """A stop leaves no caller without an answer, and nothing acknowledged is lost."""
    disk = SimDisk(random.Random(1))
    refs: list[Any] = []
    async with journal_on(disk) as (_, journal):
        await journal.fence.remote(1, 1)
        refs = [journal.append.remote(1, 1, seq, payload=bytes([seq])) for seq in range(1, 30)]
        await refs[0]
    acked = 0
    for ref in refs:
        try:
            await get(ref, timeout=PATIENCE_S)
            acked += 1
        except (Closed, ActorNotFound, TorusError) as error:
            assert not isinstance(error, OutcomeUnknown)
    async with journal_on(disk.crash()) as (_, journal):
        there = (await journal.read_tail.remote(1, 1, 1, 1000)).joined()
        assert len(there) >= acked >= 1
        assert bytes(there) == bytes(range(1, len(there) + 1))


@on_uvloop
async def test_a_journal_stays_as_small_as_its_node(tmp_path: Path) -> None:
    """Also when the node is started again without its size, which its stores know."""
    disks: dict[Path, SimDisk] = {}

    def open_disk(path: Path) -> SimDisk:
        return disks.setdefault(path, SimDisk(random.Random(1)))

    machine = Machine(open_disk=open_disk)
    limits: list[int] = []
    for size in (4 << 30, None):
        address = ("127.0.0.1", free_ports(1))
        url = f"torus://127.0.0.1:{address[1]}"
        config = NodeConfig(tmp_path, size, address, metadata=url, machine=machine)
        node = await start_node(config, random.Random(1))
        assert node.journal is not None
        limits.append(node.journal.store.limits.journal_bytes_max)
        await node.stop()
        disks = {path: disk.kill() for path, disk in disks.items()}
    assert limits[0] == 512 << 20
    assert limits[0] * 0.9 < limits[1] <= limits[0]


@on_uvloop
async def test_a_node_whose_journal_cannot_be_closed_in_order_closes_its_stores(
    tmp_path: Path,
) -> None:
    """A file system that copies what it writes may be full then, or its disk may fail."""
    disks: dict[Path, SimDisk] = {}

    def open_disk(path: Path) -> SimDisk:
        return disks.setdefault(path, SimDisk(random.Random(1)))

    for error in (errno.ENOSPC, errno.EIO):
        disks.clear()
        (tmp_path / "metadata.sqlite").unlink(missing_ok=True)
        address = ("127.0.0.1", free_ports(1))
        url = f"torus://127.0.0.1:{address[1]}"
        machine = Machine(open_disk=open_disk)
        config = NodeConfig(tmp_path, 64 << 20, address, metadata=url, machine=machine)
        node = await start_node(config, random.Random(1))
        append = node.system.actor("journal").append
        await append.remote(1, 1, 1, payload=memoryview(b"record"))
        disks[tmp_path / "journal"].inject("write", error)
        await node.stop()
        assert node.stores is not None
        assert [store.failure for store in node.stores.stores] == ["closed", "closed"]
