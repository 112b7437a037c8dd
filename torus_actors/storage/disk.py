"""The disk as the rest of the program sees it: a few blocking calls, and the real ones behind them.

`Disk` is one data directory and `File` one open file in it. Everything that must survive a power
cut goes through these two, so that the simulator can put `SimDisk` in their place and lose exactly
what a real disk may lose. Paths are relative to the data directory and use ``/``.

What an implementation promises, and no more: a write is durable once a later `File.fdatasync` of
the same file returned; a name once a later `Disk.fsync_dir` of its directory returned; what was
written and not synced may survive in any subset, torn at sectors of 512 bytes.

Out of room is `OutOfSpace`. Every other failure of the medium stays an `OSError`: there is no
answer to it but to stop using that file.
"""

# ruff: noqa: D102 - what overrides a method of the interface is documented there

from __future__ import annotations

import abc
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torus_actors.errors import (
    Closed,
    Corruption,
    Invalid,
    Locked,
    NotExist,
    OutOfSpace,
    TorusError,
)
from torus_actors.model.buffers import aligned

log = logging.getLogger(__name__)

SECTOR_SIZE = 512
"""The largest write that is taken to be atomic."""

BUFFERS_MAX = 1024
"""Buffers in one vectored call: Linux's IOV_MAX. Longer lists are split."""

DIRECT_UNIT = 4096
"""What goes past the page cache is whole multiples of this, at such multiples, from memory that
begins on one: no disk or file system asks for more."""

DIRECT_READ_MIN = 64 << 10
"""Reads of a direct file from this size on leave the page cache alone. Smaller ones come back to
the same blocks, and the disk alone would make each of them wait."""

ReadBuffer = bytes | bytearray | memoryview
WriteBuffer = bytearray | memoryview


class File(abc.ABC):
    """One open file. All calls may block, and may be made from several threads at once."""

    @abc.abstractmethod
    def preadv(self, buffers: Sequence[WriteBuffer], offset: int, keep: bool = False) -> int:
        """Fill the buffers in order from ``offset`` (bytes).

        Args:
            buffers: where to read to.
            offset: bytes.
            keep: leave it in the page cache, though the file passes that by.

        Returns:
            Bytes read; fewer than asked only at the end of the file.
        """

    @abc.abstractmethod
    def preadv_nowait(self, buffers: Sequence[WriteBuffer], offset: int) -> int | None:
        """Like `preadv`, but only from memory: never waits for the disk.

        Returns:
            Bytes read, possibly fewer than asked; None when nothing is cached or the file system
            cannot tell. Then the same read has to be made with `preadv` in a thread.
        """

    @abc.abstractmethod
    def read_medium(self, memory: memoryview, offset: int) -> int:
        """Read what the disk has, also where the page cache has it too, if the system can do so.

        What was written and not synced is read as well.

        Args:
            memory: begins on a page; whole pages.
            offset: bytes, a whole page.

        Returns:
            Bytes read; fewer than asked only at the end of the file.
        """

    @property
    def direct_fd(self) -> int:
        """The descriptor that passes the page cache by, for asynchronous reads; -1 for none."""
        return -1

    @abc.abstractmethod
    def pwritev(self, buffers: Sequence[ReadBuffer], offset: int) -> None:
        """Write all buffers one behind the other at ``offset`` (bytes).

        Raises:
            OutOfSpace: the file system is full; part may be written.
        """

    @abc.abstractmethod
    def fdatasync(self) -> None:
        """Make all finished writes, and the file's size, durable.

        After it raised, nothing is known of those writes, and a second call that succeeds proves
        nothing: the kernel has marked the lost pages clean.
        """

    @abc.abstractmethod
    def allocate(self, size: int) -> None:
        """Grow the file to ``size`` bytes of zeros with room on the disk reserved; never shrinks.

        Raises:
            OutOfSpace: no room; the file has its old size.
        """

    @abc.abstractmethod
    def truncate(self, size: int) -> None:
        """Set the size; a longer file is extended with zeros, without reserving room."""

    @abc.abstractmethod
    def size(self) -> int:
        """Length in bytes."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close; a second call does nothing. Does not sync."""

    def pread(self, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes at ``offset``; shorter only at the end of the file."""
        buffer = bytearray(length)
        count = self.preadv([buffer], offset)
        return bytes(memoryview(buffer)[:count])

    def pwrite(self, data: ReadBuffer, offset: int) -> None:
        """Write one buffer; see `pwritev`."""
        self.pwritev([data], offset)


class DurableWriter(abc.ABC):
    """Writes to the files of one directory, one at a time; on the loop's thread."""

    @abc.abstractmethod
    def start(
        self,
        name: str,
        buffers: Sequence[ReadBuffer],
        offset: int,
        ended: Callable[[OSError | None], None],
    ) -> bool:
        """Start a write, if that is possible.

        Args:
            name: of a file in the directory.
            buffers: whole pages in all; copied.
            offset: bytes, whole pages; the range was written before.
            ended: called later with None when it is durable, or with what went wrong: an error with
                the number EAGAIN says that nothing is known to have been written, and that the same
                write may be done another way.

        Returns:
            Whether it was started; if not, nothing was done.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files; waits for the write that is under way."""


class DiskLock(abc.ABC):
    """An exclusive lock on a data directory; ends with its process."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let others in; a second call does nothing."""


class Disk(abc.ABC):
    """One data directory."""

    @abc.abstractmethod
    def open(self, path: str, *, create: bool = False, size: int = 0, direct: bool = False) -> File:
        """Open a file for reading and writing.

        Args:
            path: relative to the data directory.
            create: make it, empty, if it is not there.
            size: reserve at least so many bytes (see `File.allocate`).
            direct: pass the page cache by, where the file system can. For bulk data: all writes
                must be multiples of `DIRECT_UNIT` at multiples of it, and memory that begins on one
                saves a copy. Promises stay the same: nothing is durable before `File.fdatasync`.

        Raises:
            NotExist: no such file, and ``create`` is false.
            OutOfSpace: no room for ``size``; a file made by this call is gone again.
        """

    @abc.abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a file of that name is there."""

    @abc.abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file another name in the same directory, atomically, replacing what has it.

        Raises:
            NotExist: no such file.
            Invalid: the names are in different directories.
        """

    @abc.abstractmethod
    def unlink(self, path: str) -> None:
        """Remove a name.

        Raises:
            NotExist: no such file.
        """

    @abc.abstractmethod
    def listdir(self, path: str = "") -> list[str]:
        """Names of the files in a directory, sorted; empty when it is not there."""

    @abc.abstractmethod
    def mkdir(self, path: str) -> None:
        """Make a directory, durably, and those above it; nothing when it is there."""

    @abc.abstractmethod
    def fsync_dir(self, path: str = "") -> None:
        """Make the names in a directory durable."""

    @abc.abstractmethod
    def free_bytes(self) -> int:
        """Room left for this user on the file system."""

    def direct_writer(self, loop: asyncio.AbstractEventLoop) -> DurableWriter | None:
        """Make what writes small pieces durably without a thread.

        Args:
            loop: on which they are started and end.

        Returns:
            None where the machine cannot do it.
        """
        return None

    @abc.abstractmethod
    def lock(self, path: str = "lock") -> DiskLock:
        """Take the data directory for this process.

        Raises:
            Locked: another process, or another part of this one, has it.
        """


def same_directory(old: str, new: str) -> str:
    """The directory of both paths.

    Raises:
        Invalid: they are in different ones.
    """
    directory = os.path.dirname(old)
    if directory != os.path.dirname(new):
        raise Invalid(f"cannot rename {old} to {new}: not the same directory")
    return directory


def _translate(error: OSError, path: str, action: str) -> Exception:
    """What a caller reacts to becomes an error of ours; the rest names the file."""
    if error.errno == errno.ENOENT:
        return NotExist(f"cannot {action} {path}: no such file")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(f"cannot {action} {path}: the disk is full")
    if error.errno == errno.EBADF:
        return Closed(f"cannot {action} {path}: it is closed")
    return OSError(error.errno, f"cannot {action}: {error.strerror}", path)


@contextlib.contextmanager
def _plain_errors(path: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translate(error, path, action) from error


class RealFile(File):
    """A file of the operating system.

    Args:
        fd: open for reading and writing.
        path: for messages.
        direct_fd: the same file opened past the page cache; -1 for none. All writes then go that
            way, in whole pages: a page that was also written through the cache might be kept there
            in an older state.
    """

    def __init__(self, fd: int, path: str, direct_fd: int = -1) -> None:
        self._fd = fd
        self._direct_fd = direct_fd
        self._path = path
        self._nowait = hasattr(os, "RWF_NOWAIT")
        self._refuses_direct = False

    @property
    def direct_fd(self) -> int:
        return -1 if self._refuses_direct else self._direct_fd

    def preadv(self, buffers: Sequence[WriteBuffer], offset: int, keep: bool = False) -> int:
        total = sum(map(len, buffers))
        with _plain_errors(self._path, "read"):
            count = 0
            if self._direct_fd >= 0 and total >= DIRECT_READ_MIN and not keep:
                count = self._preadv_direct(self._direct_fd, buffers, offset)
            if count == total:
                return count
            count = os.preadv(self._fd, buffers[:BUFFERS_MAX], offset)
            while 0 < count < total:
                more = os.preadv(self._fd, _rest(buffers, count)[:BUFFERS_MAX], offset + count)
                if more == 0:
                    break
                count += more
        return count

    def read_medium(self, memory: memoryview, offset: int) -> int:
        fd = self._direct_fd
        with _plain_errors(self._path, "read"):
            # One of its own where the page cache is used otherwise: this is rare.
            own = _open_direct(self._path) if fd < 0 <= self._fd else -1
            try:
                count = self._preadv_direct(max(fd, own), [memory], offset)
            finally:
                if own >= 0:
                    os.close(own)
        return count if count == len(memory) else self.preadv([memory], offset, keep=True)

    def _preadv_direct(self, fd: int, buffers: Sequence[WriteBuffer], offset: int) -> int:
        """Bytes read past the page cache; 0 where that is impossible."""
        if fd < 0:
            return 0
        try:
            return os.preadv(fd, buffers[:BUFFERS_MAX], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # memory or a length that does not fit
                raise
            return 0

    def preadv_nowait(self, buffers: Sequence[WriteBuffer], offset: int) -> int | None:
        if not self._nowait:
            return None
        try:
            return os.preadv(self._fd, buffers, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                self._nowait = False
                return None
            raise _translate(error, self._path, "read") from error

    def pwritev(self, buffers: Sequence[ReadBuffer], offset: int) -> None:
        with _plain_errors(self._path, "write"):
            if self._direct_fd < 0 or not self._pwritev_direct(buffers, offset):
                _pwritev_all(self._fd, buffers, offset)

    def _pwritev_direct(self, buffers: Sequence[ReadBuffer], offset: int) -> bool:
        """Write past the page cache; False where the file system turns out not to."""
        if self._refuses_direct:
            return False
        try:
            _pwritev_all(self._direct_fd, buffers, offset)
            return True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        try:
            # Memory that does not begin on a page, mostly: once more from some that does.
            _pwritev_all(self._direct_fd, [_in_pages(buffers)], offset)
            return True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._refuses_direct = True
        return False

    def fdatasync(self) -> None:
        if self._fd < 0:
            raise Closed(f"cannot sync {self._path}: it is closed")
        with _plain_errors(self._path, "sync"):
            os.fdatasync(self._fd)

    def allocate(self, size: int) -> None:
        old = self.size()
        if size <= old:
            return
        try:
            with _plain_errors(self._path, "reserve room for"):
                os.posix_fallocate(self._fd, old, size - old)
        except (OSError, TorusError):
            # A failed reservation may have grown the file in part.
            os.ftruncate(self._fd, old)
            raise

    def truncate(self, size: int) -> None:
        with _plain_errors(self._path, "resize"):
            os.ftruncate(self._fd, size)

    def size(self) -> int:
        with _plain_errors(self._path, "examine"):
            return os.fstat(self._fd).st_size

    def close(self) -> None:
        # A closed descriptor's number is soon another file's: forget it first.
        fds, self._fd, self._direct_fd = (self._fd, self._direct_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _pwritev_all(fd: int, buffers: Sequence[ReadBuffer], offset: int) -> None:
    total = sum(map(len, buffers))
    count = os.pwritev(fd, buffers[:BUFFERS_MAX], offset)
    while count < total:
        # A regular file's write is cut short by a signal, the 2 GiB limit or a full disk; going on
        # either finishes it or meets the error itself.
        count += os.pwritev(fd, _rest(buffers, count)[:BUFFERS_MAX], offset + count)


def _in_pages(buffers: Sequence[ReadBuffer]) -> memoryview:
    """A copy that begins on a page."""
    pages = aligned(sum(map(len, buffers)))
    at = 0
    for buffer in buffers:
        pages[at : at + len(buffer)] = buffer
        at += len(buffer)
    return pages


def _rest(buffers: Sequence[ReadBuffer], skip: int) -> list[memoryview]:
    views = []
    for buffer in buffers:
        view = memoryview(buffer)
        if skip >= len(view):
            skip -= len(view)
            continue
        views.append(view[skip:])
        skip = 0
    return views


class _FlockLock(DiskLock):
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RealDisk(Disk):
    """A directory of the operating system.

    Args:
        root: made if it is not there.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root).absolute()
        self._make(self._root)

    @property
    def root(self) -> Path:
        """The data directory."""
        return self._root

    def open(self, path: str, *, create: bool = False, size: int = 0, direct: bool = False) -> File:
        full = str(self._root / path)
        fresh = create and not os.path.exists(full)
        with _plain_errors(full, "open"):
            fd = os.open(full, os.O_RDWR | (os.O_CREAT if create else 0), 0o640)
        file = RealFile(fd, full, _open_direct(full) if direct else -1)
        try:
            file.allocate(size)
        except (OSError, TorusError):
            file.close()
            if fresh:
                os.unlink(full)
            raise
        return file

    def exists(self, path: str) -> bool:
        return (self._root / path).is_file()

    def rename(self, old: str, new: str) -> None:
        same_directory(old, new)
        with _plain_errors(old, "rename"):
            os.replace(self._root / old, self._root / new)

    def unlink(self, path: str) -> None:
        with _plain_errors(path, "remove"):
            os.unlink(self._root / path)

    def listdir(self, path: str = "") -> list[str]:
        directory = self._root / path
        if not directory.is_dir():
            if directory.exists():
                raise Corruption(f"{directory} is no directory: move it away")
            return []
        return sorted(entry.name for entry in directory.iterdir() if entry.is_file())

    def mkdir(self, path: str) -> None:
        self._make(self._root / path)

    def fsync_dir(self, path: str = "") -> None:
        _fsync_path(self._root / path)

    def free_bytes(self) -> int:
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def direct_writer(self, loop: asyncio.AbstractEventLoop) -> DurableWriter | None:
        # Not above: it is one of those that this module describes.
        from torus_actors.storage.direct import DirectWriter

        try:
            return DirectWriter(self._root, loop)
        except OSError as error:
            log.info("%s: writes go by a thread: %s", self._root, error)
            return None

    def lock(self, path: str = "lock") -> DiskLock:
        full = str(self._root / path)
        with _plain_errors(full, "open"):
            fd = os.open(full, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            with _plain_errors(full, "lock"):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Locked(
                        f"data directory {self._root} is in use by another process; "
                        "stop it or choose another directory"
                    ) from None
        except (OSError, TorusError):
            os.close(fd)
            raise
        return _FlockLock(fd)

    @staticmethod
    def _make(path: Path) -> None:
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        try:
            if not any(path.iterdir()):
                # Whoever made it may have been killed before it was durable.
                _fsync_path(path.parent)
        except PermissionError:
            pass  # who may not look there, or above it, has not made it
        except OSError as error:
            # What knows no sync, as a read-only image or an automounter with disks mounted in it,
            # lets nobody make a directory that could be lost.
            if error.errno != errno.EINVAL:
                raise
        for directory in reversed(missing):
            with _plain_errors(str(directory), "make"), contextlib.suppress(FileExistsError):
                directory.mkdir()
            _fsync_path(directory.parent)


def _open_direct(path: str) -> int:
    """Open a file past the page cache; -1 where its file system does not know how."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return -1


def _fsync_path(path: Path) -> None:
    with _plain_errors(str(path), "sync"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
