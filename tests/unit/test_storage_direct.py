"""Writes without a thread: they are where they should be, or the caller is told to do them."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runtime_harness import on_uvloop, system_of
from torus_actors.actors.journal import JournalActor, JournalDisk, OpenJournal
from torus_actors.runtime import ChildSpec
from torus_actors.storage.direct import WRITE_BYTES_MAX, DirectWriter
from torus_actors.storage.disk import RealDisk
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_space import JournalLimits

PAGE = 4096
LIMITS = JournalLimits(segment_bytes=256 << 10, journal_bytes_max=6 * (256 << 10))


def writer_in(folder: Path) -> DirectWriter:
    """A writer, or a skip where the machine cannot."""
    (folder / "file").write_bytes(bytes(64 * PAGE))
    try:
        return DirectWriter(folder)
    except OSError as error:
        pytest.skip(f"no asynchronous writes here: {error}")


async def ended(writer: DirectWriter, outcomes: list[OSError | None]) -> OSError | None:
    """The outcome of the write under way."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()

    def look() -> None:
        writer.reap()
        if outcomes:
            told.set()

    loop.add_reader(writer.notify_fd, look)
    async with asyncio.timeout(30):
        await told.wait()
    loop.remove_reader(writer.notify_fd)
    return outcomes.pop()


@on_uvloop
async def test_bytes_arrive_in_order_and_in_place(tmp_path: Path) -> None:
    """Several buffers are written behind one another at the offset, and nothing else changes."""
    writer = writer_in(tmp_path)
    outcomes: list[OSError | None] = []
    parts = [b"a" * 100, memoryview(b"b" * PAGE), bytearray(b"c" * (PAGE - 100))]
    assert writer.start("file", parts, 3 * PAGE, outcomes.append)
    assert writer.busy and not writer.start("file", [bytes(PAGE)], 0, outcomes.append)
    assert await ended(writer, outcomes) is None
    assert not writer.busy
    content = (tmp_path / "file").read_bytes()
    assert content == bytes(3 * PAGE) + b"".join(parts) + bytes(59 * PAGE)
    writer.close()


@on_uvloop
async def test_what_does_not_suit_is_not_started(tmp_path: Path) -> None:
    """Parts of pages, large writes and missing files are left to the caller; so is what follows."""
    writer = writer_in(tmp_path)
    outcomes: list[OSError | None] = []
    for buffers, offset in (
        ([b"x"], 0),
        ([bytes(PAGE)], 512),
        ([bytes(WRITE_BYTES_MAX + PAGE)], 0),
    ):
        assert not writer.start("file", buffers, offset, outcomes.append)
    assert not writer.start("missing", [bytes(PAGE)], 0, outcomes.append)
    assert not writer.start("file", [bytes(PAGE)], 0, outcomes.append), "it was given up"
    assert not outcomes and (tmp_path / "file").read_bytes() == bytes(64 * PAGE)
    writer.close()


async def filled(folder: Path, count: int) -> tuple[int, int]:
    """Append records to a journal on a real disk; commits, and how many the worker did."""
    runs = 0

    async with system_of() as system:
        opened = OpenJournal.open(system, RealDisk(folder), random.Random(1), LIMITS)
        real_run = opened._run

        async def counted(step: Any) -> None:
            nonlocal runs
            runs += type(step).__name__ == "Commit"
            await real_run(step)

        opened._run = counted  # type: ignore[method-assign]
        root = system.actor("root")
        await root.start_child.remote(ChildSpec("journal_disk", JournalDisk, shutdown_s=1.0))
        await root.start_child.remote(
            ChildSpec("journal", lambda: JournalActor(opened), max_concurrency=16)
        )
        journal = system.actor("journal")
        for seq in range(1, count + 1):
            await journal.append.remote(7, 1, seq, payload=bytes([seq % 256]) * 3000)
            if seq == count // 2 and opened._direct is not None:
                commits_before = opened.store.stats().commits
                assert runs < commits_before, "nothing was written without a thread"
                opened._direct._works = False
        commits = opened.store.stats().commits
    opened.close()
    return commits, runs


@on_uvloop
async def test_a_journal_goes_on_with_a_thread(tmp_path: Path) -> None:
    """Commits without a thread and with one follow each other in one log, which opens whole."""
    writer_in(tmp_path).close()
    (tmp_path / "file").unlink()
    count = 60
    commits, by_worker = await filled(tmp_path / "journal", count)
    assert 0 < by_worker < commits
    store = JournalStore.open(RealDisk(tmp_path / "journal"), limits=LIMITS, rng=random.Random(2))
    records = store.read(7, 1, 1, 1 << 30)
    assert [seq for seq, _ in records] == list(range(1, count + 1))
    assert all(payload == bytes([seq % 256]) * 3000 for seq, payload in records)
    store.close()


@on_uvloop
async def test_a_failed_write_ends_the_journal(tmp_path: Path) -> None:
    """An error of the disk is never tried again: nothing is acknowledged from then on."""
    writer_in(tmp_path).close()
    (tmp_path / "file").unlink()
    async with system_of() as system:
        opened = OpenJournal.open(system, RealDisk(tmp_path), random.Random(1), LIMITS)
        root = system.actor("root")
        await root.start_child.remote(ChildSpec("journal_disk", JournalDisk, shutdown_s=1.0))
        await root.start_child.remote(ChildSpec("journal", lambda: JournalActor(opened)))
        journal = system.actor("journal")
        await journal.append.remote(7, 1, 1, payload=b"good")
        direct = opened._direct
        assert direct is not None

        def failing(name: str, buffers: Any, offset: int, told: Any) -> bool:
            system.loop.call_soon(told, OSError(errno.EIO, "no such luck"))
            return True

        direct.start = failing  # type: ignore[method-assign]
        with pytest.raises(Exception, match="no such luck"):
            await journal.append.remote(7, 1, 2, payload=b"lost")
        assert opened.store.failure is not None
        with pytest.raises(Exception, match="restart the node"):
            await journal.append.remote(7, 1, 2, payload=b"again")
    opened.close()
