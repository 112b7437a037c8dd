"""The SQLite store on disk: restarts, crashes, damage, and the threads it may use."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from torus_actors.errors import (
    Compacted,
    Corruption,
    Invalid,
    LeaseNotFound,
    Locked,
    NotSupported,
    OutOfSpace,
)
from torus_actors.metadata.kv import Compare, DeletePrefix, EventKind, Put
from torus_actors.metadata.sqlite import Database, SqliteStore


def test_a_restart_keeps_keys_revisions_history_and_leases(tmp_path: Path) -> None:
    """After reopening, reads, compares and watches go on as if nothing had happened."""

    async def test() -> None:
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path)
        lease, revoked = await store.lease_grant(60), await store.lease_grant(60)
        first = (await store.txn([], [Put("a", b"1"), Put("leased", b"", lease)])).revision
        await store.lease_revoke(revoked)
        second = (await store.txn([], [Put("a", b"2")])).revision
        before = await store.range("")
        await store.close()

        store = await SqliteStore.open(path)
        assert await store.range("") == before and before[1] == second
        events, _ = await store.events("a", first, 1)
        assert [(event.kind, event.value) for event in events] == [(EventKind.PUT, b"2")]
        assert await store.lease_keepalive(lease) == 60
        assert await store.lease_grant(60) > revoked
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(revoked)
        assert (await store.txn([Compare("a", mod_revision=second)], [Put("a", b"3")])).succeeded
        await store.lease_revoke(lease)
        assert await store.get("leased") is None
        await store.close()

    asyncio.run(test())


def test_what_a_full_disk_has_can_be_read_when_a_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys cannot be deleted, and are not shown; nothing can be changed before they are.

    Found by review: nothing at all could be read from the end of the first lease on.
    """

    async def test() -> None:
        now = 0.0
        store = await SqliteStore.open(tmp_path / "metadata.sqlite", clock=lambda: now)
        lease = await store.lease_grant(10)
        revision = (await store.txn([], [Put("a", b"1"), Put("0", b"", lease)])).revision
        with monkeypatch.context() as patch:

            def full(self: Database, leases: Sequence[int]) -> bool:
                raise OutOfSpace("database or disk is full")

            patch.setattr(Database, "end_leases", full)
            now = 11.0
            found = await store.get("a")
            assert found is not None and await store.get("0") is None
            assert await store.range("") == ([found], revision)
            assert await store.range("", limit=1) == ([found], revision)
            assert await store.events("", revision, 0.0) == ([], revision)
            with pytest.raises(OutOfSpace):
                await store.txn([], [Put("a", b"2")])
            with pytest.raises(LeaseNotFound):
                await store.lease_keepalive(lease)
        events, _ = await store.events("", revision, 5.0)
        assert [(event.kind, event.key) for event in events] == [(EventKind.DELETE, "0")]
        await store.txn([], [Put("a", b"2")])
        await store.close()

    asyncio.run(test())


def test_reopening_gives_every_lease_its_full_time_again(tmp_path: Path) -> None:
    """Nobody could renew while the store was down, so nobody loses a lease for it."""

    async def test() -> None:
        now = 1000.0
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path, clock=lambda: now)
        lease = await store.lease_grant(10)
        await store.txn([], [Put("leased", b"", lease)])
        now += 9
        await store.close()
        now += 3600
        store = await SqliteStore.open(path, clock=lambda: now)
        now += 9
        assert await store.get("leased") is not None
        now += 1
        assert await store.get("leased") is None
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(lease)
        await store.close()

    asyncio.run(test())


def test_history_stays_bounded_on_disk(tmp_path: Path) -> None:
    """Old events are dropped by number and by bytes, and stay dropped after reopening."""

    async def test() -> None:
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path, history_events_max=10)
        for number in range(100):
            await store.txn([], [Put(f"k{number % 7}", b"")])
        for _ in range(20):
            revision = (await store.txn([], [Put("large", bytes(1 << 20 >> 1))])).revision
        await store.txn([], [DeletePrefix("k")])
        await store.close()
        with sqlite3.connect(path) as database:
            (count,) = database.execute("SELECT count(*) FROM event").fetchone()
        database.close()
        assert count <= 10
        store = await SqliteStore.open(path, history_events_max=10)
        with pytest.raises(Compacted):
            await store.events("", 1, 1)
        assert len((await store.events("", revision, 1))[0]) == 7
        await store.close()

    asyncio.run(test())


ROOT = Path(__file__).parents[2]

WRITER = """
import asyncio, sys
from torus_actors.metadata.kv import Put
from torus_actors.metadata.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(sys.argv[1])
    number = 0
    while True:
        number += 1
        await store.txn([], [Put("a", b"%d" % number), Put("b", b"%d" % number)])
        print(number, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_survives_kill_9(tmp_path: Path) -> None:
    """A killed writer loses nothing it was told is done, and leaves no half transaction."""
    path = tmp_path / "metadata.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    with writer.stdout as output:
        acknowledged = 0
        while acknowledged < 100:
            acknowledged = int(output.readline())
        writer.kill()
        writer.wait()
        acknowledged = max([acknowledged, *(int(line) for line in output if line.endswith("\n"))])

    async def test() -> None:
        store = await SqliteStore.open(path)
        items, revision = await store.range("")
        numbers = {int(item.value) for item in items}
        assert len(items) == 2 and len(numbers) == 1
        assert numbers.pop() in (acknowledged, acknowledged + 1)
        assert {item.mod_revision for item in items} == {revision}
        await store.close()

    asyncio.run(test())


def test_what_is_answered_is_synced(tmp_path: Path) -> None:
    """A kill does not show that; nor does the simulator, which has a store of its own."""
    database = Database(tmp_path / "m.db", 100)
    database.open()
    assert database._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: at each commit
    database.close()


def test_the_file_belongs_to_one_process(tmp_path: Path) -> None:
    """A second opener is told so in one plain line, and does no harm."""

    async def test() -> None:
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path)
        with pytest.raises(Locked, match="is in use by another process"):
            await SqliteStore.open(path)
        assert (await store.txn([], [Put("a", b"")])).succeeded
        await store.close()
        await (await SqliteStore.open(path)).close()

    asyncio.run(test())


def newer(path: Path) -> None:
    """Make a database of a later schema."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (lambda path: path.write_bytes(b"not a database " * 100), Corruption),
        (lambda path: path.mkdir(), Invalid),
        (newer, NotSupported),
    ],
)
def test_a_file_that_is_no_store_is_refused(
    tmp_path: Path, prepare: Callable[[Path], object], error: type[Exception]
) -> None:
    """Damage, a directory, a later version: each has its error, with the path in it."""
    path = tmp_path / "metadata.sqlite"
    prepare(path)
    with pytest.raises(error, match=str(path)):
        asyncio.run(SqliteStore.open(path))


@pytest.mark.parametrize("place", range(3))
def test_damage_that_sqlite_does_not_see_is_corruption(tmp_path: Path, place: int) -> None:
    """It has no checksums. Found by reading: one bit in a key ended the node that keeps it.

    What is whole can be read, and leases end in time as far as they can.
    """
    path = tmp_path / "metadata.sqlite"

    async def test() -> None:
        store = await SqliteStore.open(path)
        lease = await store.lease_grant(1)
        await store.txn([], [Put("a/whole", b"1")])
        await store.txn([], [Put("a/damaged", b"2", lease)])
        await store.close()
        data = bytearray(path.read_bytes())
        at = [each.start() for each in re.finditer(b"a/damaged", data)]
        data[at[place % len(at)] + 3] ^= 0x80
        path.write_bytes(data)
        store = await SqliteStore.open(path)
        failed = 0
        for _ in range(2):
            for asked in (store.range("a/"), store.events("a/", 0, 0.1)):
                try:
                    await asked
                except Corruption as error:
                    assert str(path) in str(error)
                    failed += 1
            whole = await store.get("a/whole")
            assert whole is not None and whole.value == b"1"
            await asyncio.sleep(1.2)  # the lease is over
        assert failed or place == 1  # an index, of which nothing is given
        await store.close()

    asyncio.run(test())


def test_all_that_blocks_goes_through_the_injected_executor(tmp_path: Path) -> None:
    """With an injected executor the store makes no thread and calls SQLite nowhere else."""
    calls: list[str] = []

    async def inline(function: Callable[..., object], *args: object) -> object:
        calls.append(function.__name__)
        return function(*args)

    async def test() -> None:
        store = await SqliteStore.open(tmp_path / "metadata.sqlite", run=inline)
        lease = await store.lease_grant(60)
        poll = asyncio.ensure_future(store.events("a", 1, 5))
        await store.txn([], [Put("a", b"", lease)])
        assert len((await poll)[0]) == 1
        await store.lease_revoke(lease)
        await store.range("")
        await store.get("a")
        await store.close()

    asyncio.run(test())
    assert set(calls) == {
        "open", "lease_grant", "events", "txn", "end_leases", "range", "get", "close"
    }  # fmt: skip


def test_a_cancelled_caller_does_not_stop_its_transaction(tmp_path: Path) -> None:
    """The change is made whole, those who watch are told, and a granted lease is timed."""

    async def test() -> None:
        entered, go = asyncio.Event(), asyncio.Event()

        async def gated(function: Callable[..., object], *args: object) -> object:
            if function.__name__ in ("txn", "lease_grant"):
                entered.set()
                await go.wait()
            return function(*args)

        now = 0.0
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path, run=gated, clock=lambda: now)
        poll = asyncio.ensure_future(store.events("a", 1, 10))
        for call in (store.lease_grant(60), store.txn([], [Put("a", b"", 1)])):
            entered.clear()
            task = asyncio.ensure_future(call)
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        go.set()
        assert len((await poll)[0]) == 1
        now = 61.0
        assert await store.get("a") is None
        await store.close()

    asyncio.run(test())


def test_opening_writes_nothing(tmp_path: Path) -> None:
    """For which there may be no room: all the rest of a cluster waits for what is in the file."""

    async def test() -> None:
        path = tmp_path / "metadata.sqlite"
        store = await SqliteStore.open(path)
        await store.txn([], [Put("a", b"1")])
        await store.close()
        written = path.read_bytes()
        store = await SqliteStore.open(path)
        waiting = path.with_name(path.name + "-wal")
        assert not waiting.exists() or not waiting.stat().st_size
        found = await store.get("a")
        assert found is not None and found.value == b"1"
        await store.close()
        assert path.read_bytes() == written

    asyncio.run(test())
