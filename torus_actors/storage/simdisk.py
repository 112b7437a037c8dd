"""A disk in memory that forgets what a real one may forget.

It models what Linux and a disk with a volatile cache promise, and nothing above it:

- What a process reads is the page cache: it sees each finished write at once.
- What survives a power cut is, for each file, what the last successful `fdatasync` covered, plus
  any subset of the writes since, each whole or torn at sectors of 512 bytes. Names behave likewise
  under `fsync_dir`.
- A failed `fdatasync` loses any subset of what it covered, yet leaves it in the page cache, marked
  clean: a later successful one does not bring it back. (As ext4 and XFS do since Linux 4.13.) The
  kernel may let go of such pages at any time, so of some the old content is read from then on.
- What rots on the medium may be right in the page cache for as long as that has it.

Everything random comes from the injected generator, so a seed replays a run exactly.
"""

# ruff: noqa: D102 - what overrides a method of the interface is documented there

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torus_actors.errors import Closed, Locked, NotExist, OutOfSpace
from torus_actors.storage.disk import (
    DIRECT_UNIT,
    SECTOR_SIZE,
    Disk,
    DiskLock,
    DurableWriter,
    File,
    ReadBuffer,
    WriteBuffer,
    same_directory,
)

PAGE = 4096
_ZERO_PAGE = bytes(PAGE)
_ZEROS = bytes(1 << 18)


class PowerCut(BaseException):
    """The machine, or the process, is gone: no call on this disk will ever return again.

    Not an Exception, so that no error handling of the code under test can live on after it.
    """


class Operation(NamedTuple):
    """What is about to be done: kind is one of `OPERATIONS`."""

    kind: str
    path: str


OPERATIONS = ("write", "sync", "allocate", "truncate", "create", "rename", "unlink", "sync_dir")
"""The operations that change something: those that `SimDisk.cut_before` counts."""


@dataclasses.dataclass(slots=True)
class _Fault:
    kind: str
    error: int
    path: str | None
    skip: int
    times: int


@dataclasses.dataclass(slots=True)
class _Write:
    """An unsynced write: whole sectors as the cache had them afterwards, and where it ended."""

    start: int
    data: bytes
    end: int


class _Inode:
    """Content of one file, twice: as cached and as durable. Pages of zeros take no memory."""

    def __init__(self) -> None:
        self.durable: dict[int, bytes] = {}
        self.durable_size = 0
        self.cache: dict[int, bytes] = {}
        """Pages that are newer than the durable ones, or differ since a sync failed."""
        self.size = 0
        self.dirty: set[int] = set()
        self.pending: list[_Write | int] = []
        """Writes and size changes since the last sync, in order."""
        self.unreadable: set[int] = set()
        """Pages that the medium does not give; they can be written, and are well then."""

    def page(self, number: int) -> bytes:
        page = self.cache.get(number)
        return page if page is not None else self.durable.get(number, _ZERO_PAGE)

    def read_into(self, target: memoryview, offset: int) -> int:
        count = max(0, min(len(target), self.size - offset))
        cache, durable = self.cache, self.durable
        if count > PAGE * (len(cache) + len(durable)):
            self._read_sparse(target, offset, count)
            return count
        done = 0
        number, start = divmod(offset, PAGE)
        while done < count:
            page = cache.get(number)
            if page is None:
                page = durable.get(number, _ZERO_PAGE)
            length = min(PAGE - start, count - done)
            target[done : done + length] = page[start : start + length]
            done += length
            number += 1
            start = 0
        return count

    def _read_sparse(self, target: memoryview, offset: int, count: int) -> None:
        """As `read_into`, where most of what is read was never written."""
        for at in range(0, count, len(_ZEROS)):
            target[at : min(at + len(_ZEROS), count)] = memoryview(_ZEROS)[: count - at]
        for number in {**self.durable, **self.cache}:
            low, high = max(offset, number * PAGE), min(offset + count, (number + 1) * PAGE)
            if low < high:
                start = number * PAGE
                target[low - offset : high - offset] = self.page(number)[low - start : high - start]

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        cache = self.cache
        pages = range(offset // PAGE, -(-end // PAGE))
        for number in (pages[0], pages[-1]) if self.unreadable and data else ():
            whole = number * PAGE >= offset and (number + 1) * PAGE <= end
            if number in self.unreadable and number not in cache and not whole:
                # What is around the bytes would have to be read first.
                raise OSError(errno.EIO, f"cannot read what is around: {os.strerror(errno.EIO)}")
        self.size = max(self.size, end)
        self.dirty.update(pages)
        self.unreadable.difference_update(pages)
        for number in pages:
            low = number * PAGE - offset
            if low >= 0 and low + PAGE <= len(data):
                cache[number] = data[low : low + PAGE]
                continue
            old = self.page(number)
            head = old[:-low] if low < 0 else b""
            piece = data[max(low, 0) : low + PAGE]
            cache[number] = head + piece + old[len(head) + len(piece) :]
        first = offset // SECTOR_SIZE * SECTOR_SIZE
        last = -(-end // SECTOR_SIZE) * SECTOR_SIZE
        if (first, last) != (offset, end):
            # Sectors are what a disk writes: take along what was around the bytes.
            head = self.page(first // PAGE)[first % PAGE : first % PAGE + offset - first]
            tail = self.page(end // PAGE)[end % PAGE :][: last - end] if last > end else b""
            data = head + data + tail
        self.pending.append(_Write(first, data, end))

    def resize(self, size: int) -> None:
        if size < self.size:
            self._cut(self.cache, size)
            for number in [n for n in self.durable if n * PAGE >= size]:
                # The durable page stays until the sync; the cache hides it.
                self.cache[number] = _ZERO_PAGE
            if size % PAGE:
                number = size // PAGE
                self.cache[number] = self.page(number)[: size % PAGE].ljust(PAGE, b"\0")
                self.dirty.add(number)
            self.dirty = {n for n in self.dirty if n * PAGE < size}
        self.size = size
        self.pending.append(size)

    def sync(self) -> None:
        for change in self.pending:
            if isinstance(change, int):
                self._cut(self.durable, change)
        self._cut(self.cache, self.size)
        for number in self.dirty:
            self._store(number, self.cache.pop(number))
        self.durable_size = self.size
        self.dirty.clear()
        self.pending.clear()

    def lose(self, rng: random.Random) -> None:
        """Decide for each unsynced change whether it reached the disk; the cache stays."""
        for change in self.pending:
            fate = rng.randrange(3)
            if fate == 0:
                continue
            if isinstance(change, int):
                self._cut(self.durable, change)
                self.durable_size = change
                continue
            sectors = range(0, len(change.data), SECTOR_SIZE)
            if fate == 1:
                kept = list(sectors)
            elif rng.randrange(2):
                kept = list(sectors[: rng.randrange(len(sectors) + 1)])
            else:
                bits = rng.getrandbits(len(sectors))
                kept = [at for i, at in enumerate(sectors) if bits >> i & 1]
            for at in kept:
                self._store_sector(change.start + at, change.data[at : at + SECTOR_SIZE])
                end = min(change.end, change.start + at + SECTOR_SIZE)
                self.durable_size = max(self.durable_size, end)
        self.dirty.clear()
        self.pending.clear()

    def let_go(self, pages: list[int], rng: random.Random) -> None:
        """Take some of these pages, which are clean, out of the cache."""
        for number in pages:
            if rng.randrange(2):
                self.cache.pop(number, None)

    def forget_cache(self) -> None:
        self.cache.clear()
        self._cut(self.durable, self.durable_size)
        self.size = self.durable_size

    def settle(self, write: _Write) -> None:
        """Make one write durable, and no other."""
        if not any(each is write for each in self.pending):
            return  # a sync came first
        self.pending = [each for each in self.pending if each is not write]
        for at in range(0, len(write.data), SECTOR_SIZE):
            self._store_sector(write.start + at, write.data[at : at + SECTOR_SIZE])
        self.durable_size = max(self.durable_size, write.end)

    @contextlib.contextmanager
    def without_clean(self, offset: int, length: int) -> Iterator[None]:
        """Have what is read there come from the disk, as far as the disk was told of it."""
        pages = range(offset // PAGE, -(-(offset + length) // PAGE))
        clean = [n for n in pages if n in self.cache and n not in self.dirty]
        if any(isinstance(change, int) for change in self.pending):
            clean = []  # where the file was cut the cache hides pages that are gone
        hidden = {number: self.cache.pop(number) for number in clean}
        try:
            yield
        finally:
            self.cache.update(hidden)

    def flip(self, offset: int, cached: bool) -> None:
        """Change one byte where it lies, on the disk and, unless that has it ``cached``, there."""
        number, at = divmod(offset, PAGE)
        if cached:
            self.cache.setdefault(number, self.page(number))
            page = bytearray(self.durable.get(number, _ZERO_PAGE))
            page[at] ^= 0xFF
            self.durable[number] = bytes(page)
            return
        for pages in (self.durable, self.cache):
            if pages is self.durable or number in pages:
                page = bytearray(pages.get(number, _ZERO_PAGE))
                page[at] ^= 0xFF
                pages[number] = bytes(page)

    def _store(self, number: int, page: bytes) -> None:
        if page == _ZERO_PAGE:
            self.durable.pop(number, None)
        else:
            self.durable[number] = page

    def _store_sector(self, offset: int, sector: bytes) -> None:
        number, at = divmod(offset, PAGE)
        page = self.durable.get(number, _ZERO_PAGE)
        self._store(number, page[:at] + sector + page[at + SECTOR_SIZE :])

    @staticmethod
    def _cut(pages: dict[int, bytes], size: int) -> None:
        for number in [n for n in pages if (n + 1) * PAGE > size]:
            if number * PAGE >= size:
                del pages[number]
            else:
                pages[number] = pages[number][: size % PAGE].ljust(PAGE, b"\0")


class SimFile(File):
    """An open file of a `SimDisk`."""

    def __init__(self, disk: SimDisk, path: str, inode: _Inode, direct: bool) -> None:
        self._disk = disk
        self._direct = direct
        self._path = path
        self._inode = inode
        self._closed = False

    def preadv(self, buffers: Sequence[WriteBuffer], offset: int, keep: bool = False) -> int:
        self._begin("read")
        return self._read(buffers, offset)

    def preadv_nowait(self, buffers: Sequence[WriteBuffer], offset: int) -> int | None:
        if self._disk.draw_cache_miss():
            return None
        self._begin("read")
        return self._read(buffers, offset)

    def read_medium(self, memory: memoryview, offset: int) -> int:
        self._begin("read")
        with self._inode.without_clean(offset, len(memory)):
            return self._read([memory], offset)

    def pwritev(self, buffers: Sequence[ReadBuffer], offset: int) -> None:
        data = b"".join(buffers)
        if self._direct:
            # A real file would pass the page cache by no more, and nobody would notice.
            assert not offset % DIRECT_UNIT and not len(data) % DIRECT_UNIT, (offset, len(data))
        try:
            self._begin("write")
        except OSError:
            # A write that failed may have been made in part.
            part = data[: self._disk.rng.randrange(len(data) + 1)]
            if part and offset + len(part) <= self._inode.size:
                self._inode.write(offset, part)
            raise
        if not data:
            return
        self._disk.need_room(self._path, offset + len(data) - self._inode.size)
        self._inode.write(offset, data)

    def fdatasync(self) -> None:
        try:
            self._begin("sync")
        except OSError:
            pages = sorted(self._inode.dirty)
            self._inode.lose(self._disk.rng)
            self._inode.let_go(pages, self._disk.rng)
            raise
        self._inode.sync()

    def allocate(self, size: int) -> None:
        self._begin("allocate")
        if size > self._inode.size:
            self._disk.need_room(self._path, size - self._inode.size)
            self._inode.resize(size)

    def truncate(self, size: int) -> None:
        self._begin("truncate")
        if size != self._inode.size:
            self._inode.resize(size)

    def size(self) -> int:
        self._check_open("examine")
        return self._inode.size

    def close(self) -> None:
        self._closed = True

    def _begin(self, kind: str) -> None:
        if self._closed:
            self._check_open(kind)
        self._disk.begin(kind, self._path)

    def _check_open(self, action: str) -> None:
        if self._closed:
            raise Closed(f"cannot {action} {self._path}: it is closed")

    def _read(self, buffers: Sequence[WriteBuffer], offset: int) -> int:
        done = 0
        end = offset + sum(map(len, buffers))
        if any(offset < (n + 1) * PAGE and n * PAGE < end for n in self._inode.unreadable):
            raise OSError(errno.EIO, f"cannot read: {os.strerror(errno.EIO)}", self._path)
        for buffer in buffers:
            count = self._inode.read_into(memoryview(buffer), offset + done)
            done += count
            if count < len(buffer):
                break
        return done


class SimWriter(DurableWriter):
    """Writes that are durable when they end, a little later.

    Some cannot be started, and some end with EAGAIN, as on a real machine.
    """

    def __init__(
        self, disk: SimDisk, loop: asyncio.AbstractEventLoop, pauses: DirectPauses
    ) -> None:
        self._disk = disk
        self._loop = loop
        self._pauses = pauses
        self._busy = False

    def start(
        self,
        name: str,
        buffers: Sequence[ReadBuffer],
        offset: int,
        ended: Callable[[OSError | None], None],
    ) -> bool:
        disk, inode = self._disk, self._disk.inode_of(name)
        if self._busy or inode is None or self._pauses.refuses():
            return False
        self._busy = True
        error: OSError | None = None
        write: _Write | None = None
        data = b"".join(buffers)
        try:
            disk.begin("write", name)
        except PowerCut:
            return True  # and nobody is left to hear of it
        except OutOfSpace:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        except OSError as failed:
            error = failed
        if error is None and self._pauses.fails():
            error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), name)
            data = data[: disk.rng.randrange(len(data) + 1)]
        if data and (error is None or error.errno == errno.EAGAIN):
            inode.write(offset, data)
            last = inode.pending[-1]
            write = last if error is None and isinstance(last, _Write) else None
        self._loop.call_later(self._pauses.next_s(), self._end, name, inode, write, error, ended)
        return True

    def _end(
        self,
        name: str,
        inode: _Inode,
        write: _Write | None,
        error: OSError | None,
        ended: Callable[[OSError | None], None],
    ) -> None:
        try:
            self._disk.begin("sync", name)
        except PowerCut:
            return
        except (OSError, OutOfSpace) as failed:
            number = failed.errno if isinstance(failed, OSError) else errno.ENOSPC
            error = error or OSError(number, str(failed), name)
        else:
            if write is not None:
                inode.settle(write)
        self._busy = False
        ended(error)

    def close(self) -> None:
        pass


class DirectPauses:
    """How long the writes of a `SimWriter` take, and which it cannot do.

    Args:
        rng: decides.
        mean_s: of a write; asked each time.
        refused, failed: shares of those that are not started, and that end with EAGAIN.
    """

    def __init__(
        self,
        rng: random.Random,
        mean_s: Callable[[], float],
        refused: float = 0.05,
        failed: float = 0.02,
    ) -> None:
        self._rng = rng
        self._mean_s = mean_s
        self._refused = refused
        self._failed = failed

    def next_s(self) -> float:
        return self._mean_s() * (0.2 + 1.6 * self._rng.random())

    def refuses(self) -> bool:
        return self._rng.random() < self._refused

    def fails(self) -> bool:
        return self._rng.random() < self._failed


class _SimLock(DiskLock):
    def __init__(self, held: set[str], path: str) -> None:
        self._held = held
        self._path = path
        self._released = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._held.discard(self._path)


class SimDisk(Disk):
    """A simulated data directory.

    Args:
        rng: decides what a crash or a failed sync loses, and which reads miss the cache.
        capacity_bytes: how much the files may hold together.
        miss_percent: chance that `File.preadv_nowait` finds nothing cached, 0 to 100.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        capacity_bytes: int = 1 << 40,
        miss_percent: int = 0,
    ) -> None:
        self.rng = rng
        self.capacity_bytes = capacity_bytes
        self.miss_percent = miss_percent
        self.direct: DirectPauses | None = None
        """Where there are writes without a thread; outlives the process and the power."""
        self.operations = 0
        """Changing operations begun so far; what `cut_before` counts."""
        self.on_operation: Callable[[Operation], None] | None = None
        """Called before each changing operation, in the caller's stack."""
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        self._pending_names: list[tuple[str, dict[str, _Inode | None]]] = []
        self._locks: set[str] = set()
        self._faults: list[_Fault] = []
        self._cut_at: int | None = None
        self._dead = False

    # Faults.

    def cut_before(self, operation: int) -> None:
        """Cut the power before the n-th changing operation from now; 0 is the next one."""
        self._cut_at = self.operations + operation

    def cut_power(self) -> None:
        """Cut the power now: every later call raises `PowerCut`."""
        self._dead = True

    def inject(
        self,
        kind: str,
        error: int = errno.EIO,
        *,
        path: str | None = None,
        skip: int = 0,
        times: int = 1,
    ) -> None:
        """Make coming operations fail.

        Args:
            kind: "read" or one of `OPERATIONS`.
            error: errno of the failure; ENOSPC becomes `OutOfSpace`.
            path: only of this file; None is any.
            skip: let so many pass first.
            times: then fail so many.
        """
        self._faults.append(_Fault(kind, error, path, skip, times))

    def heal(self) -> None:
        """Take back the faults that have not happened yet."""
        self._faults.clear()

    def rot(self, path: str, offset: int, count: int = 1, *, cached: bool = False) -> None:
        """Flip the bits of ``count`` bytes at ``offset``, on the disk and in the cache.

        Args:
            path: of the file.
            offset: bytes.
            count: bytes.
            cached: not in the cache: that goes on to have what was there.
        """
        for at in range(offset, offset + count):
            self._lookup(path, "rot").flip(at, cached)

    def make_unreadable(self, path: str, offset: int) -> None:
        """Have reads of the page that this byte is in fail until it is written again."""
        self._lookup(path, "damage").unreadable.add(offset // PAGE)

    def make_readable(self, path: str) -> None:
        """Have all of a file be readable again."""
        self._lookup(path, "mend").unreadable.clear()

    def crash(self) -> SimDisk:
        """Lose the power: the disk as the next boot finds it. This one is dead afterwards."""
        after = self._successor()
        survivors = dict(self._durable_names)
        for _, change in self._pending_names:
            if self.rng.randrange(2):
                _apply(survivors, change)
        after._durable_names = survivors
        after._names = dict(survivors)
        for inode in {id(i): i for i in survivors.values()}.values():
            inode.lose(self.rng)
            inode.forget_cache()
        return after

    def kill(self) -> SimDisk:
        """Lose the process only: locks and handles end, the page cache stays."""
        after = self._successor()
        after._names = self._names
        after._durable_names = self._durable_names
        after._pending_names = self._pending_names
        return after

    def durable(self, path: str, offset: int, length: int) -> bytes:
        """What would be read there after a power cut that no unsynced change survived."""
        inode = self._durable_names.get(path)
        if inode is None:
            return b""
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        pages = b"".join([inode.durable.get(n, _ZERO_PAGE) for n in range(first, last)])
        return pages[offset - first * PAGE :][:length]

    def memory_bytes(self) -> int:
        """Bytes of file content held, durable and cached."""
        return sum(
            PAGE * (len(inode.durable) + len(inode.cache))
            + sum(len(w.data) for w in inode.pending if isinstance(w, _Write))
            for inode in self._names.values()
        )

    # The interface.

    def open(self, path: str, *, create: bool = False, size: int = 0, direct: bool = False) -> File:
        self._check_alive()
        fresh = path not in self._names
        if fresh:
            if not create:
                raise NotExist(f"cannot open {path}: no such file")
            self.begin("create", path)
            self._change_names(os.path.dirname(path), {path: _Inode()})
        file = SimFile(self, path, self._names[path], direct)
        if size > file.size():
            try:
                file.allocate(size)
            except (OSError, OutOfSpace):
                if fresh:
                    self.unlink(path)
                raise
        return file

    def exists(self, path: str) -> bool:
        self._check_alive()
        return path in self._names

    def rename(self, old: str, new: str) -> None:
        directory = same_directory(old, new)
        inode = self._lookup(old, "rename")
        self.begin("rename", old)
        self._change_names(directory, {old: None, new: inode})

    def unlink(self, path: str) -> None:
        self._lookup(path, "remove")
        self.begin("unlink", path)
        self._change_names(os.path.dirname(path), {path: None})

    def listdir(self, path: str = "") -> list[str]:
        self._check_alive()
        names = (os.path.split(name) for name in self._names)
        return sorted(name for directory, name in names if directory == path.rstrip("/"))

    def mkdir(self, path: str) -> None:
        # Directories are the prefixes of names: there is nothing to make, and nothing to lose.
        self._check_alive()

    def fsync_dir(self, path: str = "") -> None:
        self.begin("sync_dir", path)
        directory = path.rstrip("/")
        for where, change in self._pending_names:
            if where == directory:
                _apply(self._durable_names, change)
        self._pending_names = [p for p in self._pending_names if p[0] != directory]

    def free_bytes(self) -> int:
        self._check_alive()
        return max(0, self.capacity_bytes - sum(inode.size for inode in self._names.values()))

    def direct_writer(self, loop: asyncio.AbstractEventLoop) -> DurableWriter | None:
        return None if self.direct is None else SimWriter(self, loop, self.direct)

    def inode_of(self, path: str) -> _Inode | None:
        """For `SimWriter`: what has a name now."""
        return self._names.get(path)

    def lock(self, path: str = "lock") -> DiskLock:
        self._check_alive()
        if path in self._locks:
            raise Locked(
                "the data directory is in use by another process; "
                "stop it or choose another directory"
            )
        self._locks.add(path)
        return _SimLock(self._locks, path)

    # For SimFile.

    def begin(self, kind: str, path: str) -> None:
        """Count an operation, and let the faults have it."""
        if self._dead:
            raise PowerCut
        if kind != "read":
            if self._cut_at is not None and self.operations >= self._cut_at:
                self._dead = True
                raise PowerCut
            self.operations += 1
            if self.on_operation is not None:
                self.on_operation(Operation(kind, path))
                self._check_alive()
        for fault in self._faults:
            if fault.kind == kind and fault.path in (None, path):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                if fault.error == errno.ENOSPC:
                    raise OutOfSpace(f"cannot {kind} {path}: the disk is full")
                raise OSError(fault.error, f"cannot {kind}: {os.strerror(fault.error)}", path)

    def need_room(self, path: str, more: int) -> None:
        """Refuse to grow a file beyond the capacity."""
        if more > 0 and more > self.free_bytes():
            raise OutOfSpace(f"cannot write {path}: the disk is full")

    def draw_cache_miss(self) -> bool:
        """Whether the next read that must not wait finds nothing cached."""
        return self.miss_percent > 0 and self.rng.randrange(100) < self.miss_percent

    def _successor(self) -> SimDisk:
        self._dead = True
        after = SimDisk(
            self.rng, capacity_bytes=self.capacity_bytes, miss_percent=self.miss_percent
        )
        # Faults belong to the medium: they outlive the process and the power.
        after._faults = self._faults
        after.direct = self.direct
        return after

    def _check_alive(self) -> None:
        if self._dead:
            raise PowerCut

    def _lookup(self, path: str, action: str) -> _Inode:
        self._check_alive()
        inode = self._names.get(path)
        if inode is None:
            raise NotExist(f"cannot {action} {path}: no such file")
        return inode

    def _change_names(self, directory: str, change: dict[str, _Inode | None]) -> None:
        _apply(self._names, change)
        self._pending_names.append((directory, change))


def _apply(names: dict[str, _Inode], change: dict[str, _Inode | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode
