"""Writes without a thread: they are where they should be, or the caller is told to do them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runtime_harness import on_uvloop
from tests.unit.test_journal_actor import LIMITS, journal_on
from torus_actors.actors.journal import OpenJournal
from torus_actors.storage import direct
from torus_actors.storage.aio import Transfer
from torus_actors.storage.direct import (
    SLOW_REST_S,
    SLOW_START_S,
    SLOW_STARTS_MAX,
    WRITE_BYTES_MAX,
    DirectWriter,
)
from torus_actors.storage.disk import RealDisk
from torus_actors.storage.journal import JournalStore

PAGE = 4096


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
async def test_a_write_that_has_ended_is_durable(tmp_path: Path) -> None:
    """Only a power cut would show it: so the file is asked how it is open."""
    writer = writer_in(tmp_path)
    outcomes: list[OSError | None] = []
    assert writer.start("file", [bytes(PAGE)], 0, outcomes.append)
    assert await ended(writer, outcomes) is None
    flags = fcntl.fcntl(writer._files["file"], fcntl.F_GETFL)
    assert flags & os.O_DSYNC and flags & os.O_DIRECT
    writer.close()


@pytest.mark.parametrize(
    ("result", "number"),
    [
        (2 * PAGE, None),
        (PAGE, errno.EAGAIN),
        (0, errno.EAGAIN),
        (-errno.EINVAL, errno.EAGAIN),
        (-errno.EIO, errno.EIO),
        (-errno.ENOSPC, errno.ENOSPC),
    ],
)
@on_uvloop
async def test_only_a_whole_write_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: int, number: int | None
) -> None:
    """The kernel may write less than it was asked to, and says so once."""
    writer = writer_in(tmp_path)
    started: list[Transfer] = []

    def start(transfers: list[Transfer]) -> int:
        started.extend(transfers)
        return len(transfers)

    monkeypatch.setattr(writer._queue, "start", start)
    outcomes: list[OSError | None] = []
    assert writer.start("file", [bytes(2 * PAGE)], 0, outcomes.append)
    started[0].ended(result)
    (outcome,) = outcomes
    assert (outcome.errno if outcome is not None else None) == number
    assert not writer.busy
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


@on_uvloop
async def test_slow_starts_are_given_a_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not given up: it may have been the machine that had no time."""
    writer = writer_in(tmp_path)
    outcomes: list[OSError | None] = []
    now, step = 0.0, SLOW_START_S * 1.5

    def monotonic() -> float:
        nonlocal now
        now += step
        return now

    monkeypatch.setattr(direct.time, "monotonic", monotonic)
    for _ in range(SLOW_STARTS_MAX):
        assert writer.start("file", [b"s" * PAGE], 0, outcomes.append)
        assert await ended(writer, outcomes) is None
    for _ in range(5):
        assert not writer.start("file", [b"r" * PAGE], 0, outcomes.append)
    now += SLOW_REST_S
    step = 0.0
    assert writer.start("file", [b"f" * PAGE], 0, outcomes.append)
    assert await ended(writer, outcomes) is None
    assert (tmp_path / "file").read_bytes()[:PAGE] == b"f" * PAGE
    writer.close()


@asynccontextmanager
async def journal_in(folder: Path) -> AsyncIterator[tuple[OpenJournal, Any]]:
    """A journal on a real disk, and a handle for it; skips where it always needs a thread."""
    async with journal_on(RealDisk(folder)) as (opened, journal):
        if opened._direct is None:
            pytest.skip("no asynchronous writes here")
        yield opened, journal


async def filled(folder: Path, count: int) -> tuple[int, int]:
    """Append records to a journal on a real disk; commits, and how many the worker did."""
    runs = 0

    async with journal_on(RealDisk(folder)) as (opened, journal):
        real_run = opened._run

        async def counted(step: Any) -> None:
            nonlocal runs
            runs += type(step).__name__ == "Commit"
            await real_run(step)

        opened._run = counted  # type: ignore[method-assign]
        for seq in range(1, count + 1):
            await journal.append.remote(7, 1, seq, payload=bytes([seq % 256]) * 3000)
            if seq == count // 2 and opened._direct is not None:
                commits_before = opened.store.stats().commits
                assert runs < commits_before, "nothing was written without a thread"
                opened._direct._works = False
        commits = opened.store.stats().commits
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
    async with journal_in(tmp_path) as (opened, journal):
        await journal.append.remote(7, 1, 1, payload=b"good")
        direct = opened._direct
        assert direct is not None

        def failing(name: str, buffers: Any, offset: int, told: Any) -> bool:
            opened.system.loop.call_soon(told, OSError(errno.EIO, "no such luck"))
            return True

        direct.start = failing  # type: ignore[method-assign]
        with pytest.raises(Exception, match="no such luck"):
            await journal.append.remote(7, 1, 2, payload=b"lost")
        assert opened.store.failure is not None
        with pytest.raises(Exception, match="restart the node"):
            await journal.append.remote(7, 1, 2, payload=b"again")


def torn(opened: OpenJournal, written: int, told_of: OSError | None) -> None:
    """From now on only so many bytes of a write arrive; ``told_of`` None never ends it."""

    def tear(name: str, buffers: Any, offset: int, told: Any) -> bool:
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(b"".join(map(bytes, buffers))[:written])
        if told_of is not None:
            opened.system.loop.call_soon(told, told_of)
        return True

    direct = opened._direct
    assert direct is not None
    folder = direct._folder
    direct.start = tear  # type: ignore[method-assign]


@pytest.mark.parametrize("written", [0, 512, PAGE, PAGE + 1000])
@on_uvloop
async def test_a_write_that_ended_short_is_done_again(tmp_path: Path, written: int) -> None:
    """Whatever part of it is on the disk: it is acknowledged once all of it is, by a thread."""
    async with journal_in(tmp_path) as (opened, journal):
        await journal.append.remote(7, 1, 1, payload=b"a" * 3000)
        torn(opened, written, OSError(errno.EAGAIN, "short"))
        for seq in (2, 3):
            await journal.append.remote(7, 1, seq, payload=b"b" * 6000)
        # What a kill -9 would leave behind: nothing is closed in order.
        again = JournalStore.open(RealDisk(tmp_path), limits=LIMITS, rng=random.Random(2))
        assert again.read(7, 1, 1, 1 << 20) == [
            (1, b"a" * 3000),
            (2, b"b" * 6000),
            (3, b"b" * 6000),
        ]
        again.close()


@pytest.mark.parametrize("written", [0, 512, PAGE, PAGE + 1000])
@on_uvloop
async def test_a_write_that_power_cut_short_was_never_there(tmp_path: Path, written: int) -> None:
    """It was not acknowledged; what was before it is whole, and what comes next takes its place."""
    async with journal_in(tmp_path) as (opened, journal):
        await journal.append.remote(7, 1, 1, payload=b"a" * 3000)
        torn(opened, written, None)
        lost = journal.append.remote(7, 1, 2, payload=b"b" * 6000)
        await asyncio.wait([lost.future], timeout=0.05)
        assert not lost.done()
        again = JournalStore.open(RealDisk(tmp_path), limits=LIMITS, rng=random.Random(2))
        assert again.read(7, 1, 1, 1 << 20) == [(1, b"a" * 3000)]
        ticket = again.append(7, 1, 2, [b"c" * 100])
        again.settle()
        assert ticket is not None and again.read(7, 1, 2, 1 << 20) == [(2, b"c" * 100)]
        again.close()
        assert opened._under_way is not None
        opened._under_way.set_result(None)
        opened._under_way = None
