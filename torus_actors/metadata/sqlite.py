"""A key-value store in one SQLite file: the embedded metadata of a small cluster.

The file belongs to one process (it is locked exclusively), is in WAL mode, and every transaction is
on disk before it is answered. Nobody can renew a lease while the store is down, so on opening every
lease starts its full TTL again.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torus_actors.errors import (
    Again,
    Closed,
    Compacted,
    Corruption,
    Invalid,
    LeaseNotFound,
    Locked,
    NotSupported,
    OutcomeUnknown,
    OutOfSpace,
    TorusError,
)
from torus_actors.metadata import kv
from torus_actors.metadata.local import (
    HISTORY_BYTES_MAX,
    HISTORY_EVENTS_MAX,
    ChangeSignal,
    Clock,
    LeaseDeadlines,
    loop_clock,
)

SCHEMA_VERSION = 1

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS kv (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, mod_revision INTEGER NOT NULL, lease INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS kv_lease ON kv (lease) WHERE lease != 0;
CREATE TABLE IF NOT EXISTS lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY, mod_revision INTEGER NOT NULL, kind TEXT NOT NULL, key BLOB NOT NULL,
    value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS event_revision ON event (mod_revision);
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO counter VALUES ('revision', 1), ('compacted', 0);
PRAGMA user_version = 1;
COMMIT;
"""

Run = Callable[..., Awaitable[Any]]
"""``await run(function, *args)`` runs what blocks elsewhere: one at a time, in call order."""

T = TypeVar("T")


class SqliteStore(kv.KeyValueStore):
    """See `kv.KeyValueStore`; made by `open`."""

    def __init__(
        self, database: Database, run: Run, stop: Callable[[], None], clock: Clock
    ) -> None:
        self._database = database
        self._run = run
        self._stop = stop
        self._signal = ChangeSignal()
        self._leases = LeaseDeadlines(clock, self._expire_due)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._expiring: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: str | Path,
        *,
        run: Run | None = None,
        clock: Clock = loop_clock,
        history_events_max: int = HISTORY_EVENTS_MAX,
    ) -> SqliteStore:
        """Open a store, or make it if the file is missing.

        Args:
            path: the file; SQLite puts its write-ahead log beside it.
            run: runs what blocks; a thread of its own unless given.
            clock: what leases are timed by.
            history_events_max: how many events a watcher may be behind.

        Raises:
            Locked: another process has it open.
            Corruption: the file is no database, or damaged.
            Invalid: it cannot be opened there.
            NotSupported: a newer version wrote it.
        """
        stop: Callable[[], None] = _nothing
        if run is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="torus-metadata-sqlite")
            stop = thread.shutdown

            async def run(function: Callable[..., T], *args: Any) -> T:
                return await asyncio.get_running_loop().run_in_executor(thread, function, *args)

        database = Database(Path(path), history_events_max)
        try:
            leases = await run(database.open)
        except BaseException:
            stop()
            raise
        store = cls(database, run, stop, clock)
        for lease, ttl_s in leases:
            store._leases.grant(lease, ttl_s)
        return store

    async def get(self, key: str) -> kv.KeyValue | None:
        """See `kv.KeyValueStore.get`."""
        kv.check_key(key)
        ended = await self._enter_to_read()
        found: kv.KeyValue | None = await self._run(self._database.get, key)
        return None if found is not None and found.lease in ended else found

    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[kv.KeyValue], int]:
        """See `kv.KeyValueStore.range`."""
        kv.check_int64(limit)
        ended = await self._enter_to_read()
        found: tuple[list[kv.KeyValue], int]
        found = await self._run(self._database.range, prefix, after, limit, ended)
        return found

    async def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        """See `kv.KeyValueStore.txn`."""
        kv.validate_txn(compare, then)
        await self._enter()
        return await self._finish(self._txn(compare, then))

    async def lease_grant(self, ttl_s: int) -> int:
        """See `kv.KeyValueStore.lease_grant`."""
        kv.check_ttl(ttl_s)
        await self._enter()
        return await self._finish(self._grant(ttl_s))

    async def lease_keepalive(self, lease: int) -> int:
        """See `kv.KeyValueStore.lease_keepalive`."""
        kv.check_int64(lease)
        self._signal.check()
        return self._leases.renew(lease)

    async def lease_revoke(self, lease: int) -> None:
        """See `kv.KeyValueStore.lease_revoke`."""
        kv.check_int64(lease)
        await self._enter()
        if lease not in self._leases:
            raise LeaseNotFound(f"lease {lease:x} has ended")
        await self._finish(self._end_leases([lease]))

    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[kv.Event], int]:
        """See `kv.KeyValueStore.events`."""
        kv.check_int64(after_revision)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            await self._enter_to_read()
            seen = self._signal.count
            found, after_revision = await self._run(self._database.events, prefix, after_revision)
            if found or not await self._signal.wait(seen, deadline):
                return found, after_revision

    async def close(self) -> None:
        """See `kv.KeyValueStore.close`."""
        if self._closed:
            return
        self._closed = True
        self._leases.stop()
        self._signal.close()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._run(self._database.close)
        self._stop()

    async def _enter(self) -> None:
        # Keys of a lease that is over must not be seen, so ending it comes before anything else.
        self._signal.check()
        while self._leases.due():
            await asyncio.shield(self._expire())

    async def _enter_to_read(self) -> set[int]:
        """The same; returns leases that are over, which a full or bad disk does not let end now."""
        try:
            await self._enter()
        except (OutOfSpace, Again, OutcomeUnknown, Corruption):
            return set(self._leases.due())
        return set()

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        # A caller that goes away does not stop the transaction, so what follows from it (waking
        # watchers, timing leases) must not be stopped either.
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> kv.TxnResult:
        result: kv.TxnResult
        changed: bool
        result, changed = await self._run(self._database.txn, compare, then)
        if changed:
            self._signal.fire()
        return result

    async def _grant(self, ttl_s: int) -> int:
        lease: int = await self._run(self._database.lease_grant, ttl_s)
        self._leases.grant(lease, ttl_s)
        return lease

    async def _end_leases(self, leases: list[int]) -> None:
        if await self._run(self._database.end_leases, leases):
            self._signal.fire()
        for lease in leases:
            self._leases.forget(lease)

    def _expire_due(self) -> None:
        if self._leases.due():
            self._expire()

    def _expire(self) -> asyncio.Task[None]:
        if self._expiring is None or self._expiring.done():
            self._expiring = self._start(self._end_leases(self._leases.due()))
        return self._expiring


class Database:
    """The blocking half: every method runs where ``run`` puts it, one at a time."""

    def __init__(self, path: Path, history_events_max: int) -> None:
        self._path = path
        self._history_events_max = history_events_max
        self._history_bytes = 0
        self._history_events = 0
        self._db: sqlite3.Connection

    def open(self) -> list[tuple[int, int]]:
        """Open the file; returns the leases it holds as (id, TTL in seconds)."""
        with self._errors("open"):
            # An injected executor may use several threads, one at a time.
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            with self._errors("open"):
                # Before WAL: then no other process can get in, and no shared memory is needed.
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA busy_timeout = 0")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                if version > SCHEMA_VERSION:
                    raise NotSupported(f"{self._path} was written by a newer version")
                if version < SCHEMA_VERSION:  # it writes, for which there may be no room
                    self._db.executescript(SCHEMA)
                self._history_events, self._history_bytes = self._db.execute(
                    "SELECT count(*), coalesce(sum(length(value)), 0) FROM event"
                ).fetchone()
                leases = self._db.execute("SELECT id, ttl_s FROM lease ORDER BY id").fetchall()
            return [(self._int(lease), self._int(ttl_s)) for lease, ttl_s in leases]
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._errors("close"):
            self._db.close()

    def get(self, key: str) -> kv.KeyValue | None:
        """Read one key."""
        with self._errors("read"):
            row = self._db.execute(
                "SELECT value, mod_revision, lease FROM kv WHERE key = ?", (key.encode(),)
            ).fetchone()
        if row is None:
            return None
        return kv.KeyValue(key, self._bytes(row[0]), self._int(row[1]), self._int(row[2]))

    def range(
        self, prefix: str, after: str, limit: int, ended: Collection[int]
    ) -> tuple[list[kv.KeyValue], int]:
        """Read keys under a prefix, but for those of leases that are over; and the revision."""
        where, bounds = _under(prefix)
        # Not afterwards: a page with fewer keys than were asked for would be taken for the last.
        over = ", ".join(map(str, ended))
        with self._errors("read"):
            rows = self._db.execute(
                "SELECT key, value, mod_revision, lease FROM kv"
                f" WHERE {where} AND key > ? AND lease NOT IN ({over}) ORDER BY key LIMIT ?",
                (*bounds, after.encode(), limit or -1),
            ).fetchall()
            revision = self._counter("revision")
        found = [
            kv.KeyValue(self._text(key), self._bytes(value), self._int(at), self._int(lease))
            for key, value, at, lease in rows
        ]
        return found, revision

    def events(self, prefix: str, after_revision: int) -> tuple[list[kv.Event], int]:
        """Read the events under a prefix that are newer than a revision."""
        where, bounds = _under(prefix)
        with self._errors("read"):
            compacted = self._counter("compacted")
            if after_revision < compacted:
                raise Compacted(f"history before revision {compacted} is gone")
            revision = self._counter("revision")
            if after_revision > revision:  # the file was restored from a backup
                raise Compacted(f"revision {after_revision} has not been made here")
            rows = self._db.execute(
                "SELECT CAST(kind AS BLOB), key, value, mod_revision FROM event"
                f" WHERE mod_revision > ? AND {where} ORDER BY id",
                (after_revision, *bounds),
            ).fetchall()
        found = [
            kv.Event(self._kind(kind), self._text(key), self._bytes(value), self._int(at))
            for kind, key, value, at in rows
        ]
        return found, revision

    def txn(
        self, compare: Sequence[kv.Compare], then: Sequence[kv.Operation]
    ) -> tuple[kv.TxnResult, bool]:
        """Run a transaction; returns the result and whether anything changed."""
        with self._transaction():
            before = self._counter("revision")
            if not all(condition.holds(self.get(condition.key)) for condition in compare):
                return kv.TxnResult(False, before), False
            for lease in kv.leases_of(then):
                if not self._db.execute("SELECT 1 FROM lease WHERE id = ?", (lease,)).fetchone():
                    raise LeaseNotFound(f"lease {lease:x} has ended")
            after = self._apply(then, before)
        return kv.TxnResult(True, after), after != before

    def lease_grant(self, ttl_s: int) -> int:
        """Make a lease."""
        with self._transaction():
            cursor = self._db.execute("INSERT INTO lease (ttl_s) VALUES (?)", (ttl_s,))
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def end_leases(self, leases: Sequence[int]) -> bool:
        """End leases and delete their keys; returns whether any key was deleted."""
        with self._transaction():
            before = after = self._counter("revision")
            for lease in leases:
                self._db.execute("DELETE FROM lease WHERE id = ?", (lease,))
                rows = self._db.execute("SELECT key FROM kv WHERE lease = ?", (lease,)).fetchall()
                after = self._apply([kv.Delete(self._text(key)) for (key,) in rows], after)
        return after != before

    def _apply(self, operations: Sequence[kv.Operation], before: int) -> int:
        revision = before + 1
        changed = False
        for operation in operations:
            if isinstance(operation, kv.Put):
                key = operation.key.encode()
                self._db.execute(
                    "INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?)",
                    (key, operation.value, revision, operation.lease),
                )
                self._remember(revision, kv.EventKind.PUT, key, operation.value)
                changed = True
                continue
            if isinstance(operation, kv.Delete):
                where, bounds = "key = ?", [operation.key.encode()]
            else:
                where, bounds = _under(operation.prefix)
            gone = self._db.execute(f"SELECT key FROM kv WHERE {where} ORDER BY key", bounds)
            for (key,) in gone.fetchall():
                self._db.execute("DELETE FROM kv WHERE key = ?", (key,))
                self._remember(revision, kv.EventKind.DELETE, key, b"")
                changed = True
        if not changed:
            return before
        self._set_counter("revision", revision)
        self._forget_history()
        return revision

    def _remember(self, revision: int, kind: kv.EventKind, key: bytes, value: bytes) -> None:
        self._db.execute(
            "INSERT INTO event (mod_revision, kind, key, value) VALUES (?, ?, ?, ?)",
            (revision, kind.value, key, value),
        )
        self._history_events += 1
        self._history_bytes += len(value)

    def _forget_history(self) -> None:
        while (
            self._history_events > self._history_events_max
            or self._history_bytes > HISTORY_BYTES_MAX
        ):
            # A revision is dropped whole, or a watcher would see half of a transaction.
            (oldest,) = self._db.execute("SELECT min(mod_revision) FROM event").fetchone()
            events, size = self._db.execute(
                "SELECT count(*), sum(length(value)) FROM event WHERE mod_revision = ?", (oldest,)
            ).fetchone()
            self._db.execute("DELETE FROM event WHERE mod_revision = ?", (oldest,))
            self._history_events -= events
            self._history_bytes -= size
            self._set_counter("compacted", oldest)

    def _counter(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise self._damaged(f"there is no {name}")
        return self._int(row[0])

    # SQLite has no checksums: damage that leaves a page in order is met as content.

    def _bytes(self, stored: object) -> bytes:
        if not isinstance(stored, bytes):
            raise self._damaged(f"{type(stored).__name__} where bytes were written")
        return stored

    def _text(self, stored: object) -> str:
        try:
            return self._bytes(stored).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"no text ({error})") from error

    def _int(self, stored: object) -> int:
        if not isinstance(stored, int):
            raise self._damaged(f"{type(stored).__name__} where a number was written")
        return stored

    def _kind(self, stored: object) -> kv.EventKind:
        try:
            return kv.EventKind(self._text(stored))
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> Corruption:
        return Corruption(f"{self._path} is damaged: {what}")

    def _set_counter(self, name: str, value: int) -> None:
        self._db.execute("UPDATE counter SET value = ? WHERE name = ?", (value, name))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        kept = self._history_events, self._history_bytes
        with self._errors("write"):
            self._db.execute("BEGIN IMMEDIATE")
        try:
            with self._errors("write"):
                yield
            with self._errors("commit"):
                self._db.execute("COMMIT")
        except BaseException:
            self._history_events, self._history_bytes = kept
            # After some errors SQLite has rolled back by itself.
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error, doing) from error

    def _translate(self, error: sqlite3.Error, doing: str) -> TorusError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        text = f"cannot {doing} {self._path}: {error}"
        if code == sqlite3.SQLITE_FULL:
            return OutOfSpace(text)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return Corruption(text)
        if isinstance(error, sqlite3.ProgrammingError):
            return Closed(text)
        if doing == "open":
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return Locked(f"{self._path} is in use by another process")
            return Invalid(text)
        if doing == "commit" and code == sqlite3.SQLITE_IOERR:
            # The log may or may not have reached the disk.
            return OutcomeUnknown(text)
        return Again(text)


def _under(prefix: str) -> tuple[str, list[bytes]]:
    start = prefix.encode()
    end = kv.prefix_end(start)
    return ("key >= ?", [start]) if end is None else ("key >= ? AND key < ?", [start, end])


def _nothing() -> None:
    pass
