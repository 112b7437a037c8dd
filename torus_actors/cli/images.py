"""Copying between volumes and files. Holes stay holes, and zeros become holes.

A file may be a pipe, and who is at its other end may take any time. So all that reads or writes one
runs beside the event loop, where the heartbeat keeps the volume's lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import itertools
import os
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torus_actors.cli.common import Settings
from torus_actors.cli.full import full_client
from torus_actors.cli.output import open_stdout
from torus_actors.cli.progress import Advance, progress_bar
from torus_actors.cli.units import format_size
from torus_actors.client import Client
from torus_actors.errors import Invalid, NoPeer, NotExist
from torus_actors.runtime import ActorHandle, ObjectRef

CHUNK = 2 << 20
"""Read or written at once: several blocks of the default size, so that they travel side by side."""

IN_FLIGHT = 4
"""Chunks on their way at once; together less than the write cache."""

OPERATION_TIMEOUT_S = 300.0
"""For one chunk: a slow cluster may take its time, a dead one answers with an error."""

_ZEROS = bytes(CHUNK)

T = TypeVar("T")


async def dump(settings: Settings, name: str, file: Path) -> int:
    """Write a volume, or ``VOLUME@SNAPSHOT``, into a file; returns the bytes that were data.

    Raises:
        TorusError: the volume cannot be read.
        OSError: the file cannot be written.
    """
    async with full_client(settings, name, read_only=True) as client:
        _, size, _, _ = await client.system.actor("volumes").open.remote(name)
        volume = client.system.actor(f"volume:{name}")
        fd = await _beside(_open_output, file)
        shown = "standard output" if str(file) == "-" else str(file)
        with _named(shown), progress_bar(f"dumping {name}", size) as advance:
            sparse = stat.S_ISREG(os.fstat(fd).st_mode) and str(file) != "-"
            written = 0
            async for offset, data in _read_all(volume, size):
                if sparse and not offset:
                    # Not before something could be read: the file may be an older dump.
                    await _beside(os.ftruncate, fd, 0)
                if data is not None:
                    await _beside(_write_fully, fd, data, offset if sparse else None)
                    written += len(data)
                elif not sparse:
                    zeros = _ZEROS[: min(CHUNK, size - offset)]
                    await _beside(_write_fully, fd, zeros, None)
                advance(offset)
            if sparse:
                await _beside(os.ftruncate, fd, size)
            if sparse or stat.S_ISBLK(os.fstat(fd).st_mode):
                await _beside(os.fsync, fd)
        # Only now: a thread that was left behind must not write into what has its number then.
        if str(file) != "-":
            os.close(fd)
        return written


async def _read_all(volume: ActorHandle, size: int) -> AsyncIterator[tuple[int, bytes | None]]:
    """Offset and data of every chunk, in order; None for the data of a hole."""
    waiting: list[tuple[int, ObjectRef[bytes] | None]] = []
    for offset in range(0, size, CHUNK):
        length = min(CHUNK, size - offset)
        reading = None
        if await _has_data(volume, offset, length):
            reading = volume.read.remote(offset, length, timeout_s=OPERATION_TIMEOUT_S)
        waiting.append((offset, reading))
        if len(waiting) > IN_FLIGHT:
            at, ref = waiting.pop(0)
            yield at, None if ref is None else await ref
    for at, ref in waiting:
        yield at, None if ref is None else await ref


async def _has_data(volume: ActorHandle, offset: int, length: int) -> bool:
    """Whether a range is not all hole."""
    end = offset + length
    while offset < end:
        extents = await volume.extents.remote(offset, end - offset, timeout_s=60.0)
        if any(data for _, data in extents):
            return True
        offset += sum(size for size, _ in extents)
    return False


async def load(settings: Settings, name: str, file: Path, create: bool, size: int | None) -> int:
    """Make a file the content of a volume; returns the bytes that were data.

    Raises:
        Invalid: there is nothing in the file, or more than the volume has room for.
        TorusError: the volume cannot be written.
        OSError: the file cannot be read.
    """
    # Not closed before the process ends: a thread that is left behind may read from it.
    fd = await _beside(_open_input, file)
    with _named(_shown(file)):
        length = _length_of(fd)
    chunks = _chunks(fd, length)
    empty = length == 0
    if length is None:
        # Nothing is touched before something came: a pipe is empty when what feeds it has failed.
        with _named(_shown(file)):
            first = await _beside(next, chunks, None)
        empty = first is None
        chunks = chunks if first is None else itertools.chain([first], chunks)
    if empty:
        advice = "" if create else f"; to empty volume {name}, delete it and make it again"
        raise Invalid(f"{_shown(file)} is empty: nothing was changed{advice}")
    if create:
        if size is not None:
            _check_fits(file, length, name, size, "give more, or leave out --size")
        await _create_if_missing(settings, name, size, length)
    async with full_client(settings, name) as client:
        assert client.view is not None
        if not client.view.ring.members:
            raise NoPeer("no node is in the ring to store anything: torusctl peer add --all")
        volume_size = await _size_of(client, name)
        _check_fits(file, length, name, volume_size, "resize it first")
        volume = client.system.actor(f"volume:{name}")
        with _named(_shown(file)), progress_bar(f"loading {name}", length) as advance:
            loader = _Loader(volume, volume_size, name, _shown(file))
            loaded = await loader.load(chunks, advance)
        await volume.flush.remote(timeout_s=OPERATION_TIMEOUT_S)
    return loaded


def _check_fits(file: Path, length: int | None, name: str, size: int, advice: str) -> None:
    if length is not None and length > size:
        raise Invalid(f"{_shown(file)} has {length} bytes, and volume {name} only {size}: {advice}")


async def _create_if_missing(
    settings: Settings, name: str, size: int | None, length: int | None
) -> None:
    """Make the volume, of the size that is asked for, or else of the file's."""
    from torus_actors.cli.connect import connect

    async with connect(settings) as connection:
        try:
            record = await connection.patiently(connection.meta.volume, name)
        except NotExist:
            size = size or length
            if size is None:
                raise Invalid(
                    f"how large shall volume {name} be? give --size: the input does not say"
                ) from None
            await connection.meta.create_volume(name, size)
            return
    if size is not None and size != record.size:
        raise Invalid(
            f"volume {name} exists, and has {record.size} bytes, not {size}: leave out --size, or "
            "resize it first"
        )


class _Loader:
    """Writes chunks, some at once; what is not written becomes a hole."""

    def __init__(self, volume: ActorHandle, size: int, name: str, source: str) -> None:
        self._volume = volume
        self._size = size
        self._name = name
        self._source = source
        self._writing: list[ObjectRef[None]] = []
        self._hole_from = 0
        self._loaded = 0

    async def load(self, chunks: Iterator[tuple[int, bytes]], advance: Advance) -> int:
        """Copy everything; returns the bytes of data."""
        while (chunk := await _beside(next, chunks, None)) is not None:
            offset, data = chunk
            if offset + len(data) > self._size:
                raise Invalid(
                    f"{self._source} has more than the {format_size(self._size)} of volume "
                    f"{self._name}, which has a part of it now: resize it, and load it again"
                )
            if data != _ZEROS[: len(data)]:
                await self._zero_until(offset)
                await self._write(offset, data)
                self._hole_from = offset + len(data)
                self._loaded += len(data)
            advance(offset + len(data))
        await self._zero_until(self._size)
        for write in self._writing:
            await write
        return self._loaded

    async def _write(self, offset: int, data: bytes) -> None:
        if len(self._writing) >= IN_FLIGHT:
            await self._writing.pop(0)
        self._writing.append(self._volume.write.remote(offset, data, timeout_s=OPERATION_TIMEOUT_S))

    async def _zero_until(self, end: int) -> None:
        """Make a hole of what lies between the last data and here, where it is none yet."""
        start = self._hole_from
        if start >= end:
            return
        for write in self._writing:
            await write
        self._writing.clear()
        if await _has_data(self._volume, start, end - start):
            await self._volume.zero.remote(start, end - start, timeout_s=OPERATION_TIMEOUT_S)


def _shorter(length: int) -> Invalid:
    return Invalid(
        f"the file became shorter than {length} bytes while it was read, and the volume has a part "
        "of it now: load it again"
    )


def _chunks(fd: int, length: int | None) -> Iterator[tuple[int, bytes]]:
    """Offset and content of every chunk that may have data in it."""
    if length is None:
        offset = 0
        while data := _read_fully(fd, CHUNK):
            yield offset, data
            offset += len(data)
        return
    offset = 0
    while offset < length:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                if os.fstat(fd).st_size < length and stat.S_ISREG(os.fstat(fd).st_mode):
                    raise _shorter(length) from error
                return  # only a hole is left
            start, end = offset, length  # no file with holes
        if start >= length:
            return  # what was appended since is not asked for
        end = min(end, length)
        # Whole chunks, aligned: a block of which part is a hole is written once.
        offset = start // CHUNK * CHUNK
        while offset < end:
            data = os.pread(fd, min(CHUNK, length - offset), offset)
            if not data:
                raise _shorter(length)
            yield offset, data
            offset += len(data)


def _read_fully(fd: int, size: int) -> bytes:
    parts = []
    while size and (part := os.read(fd, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_fully(fd: int, data: bytes, offset: int | None) -> None:
    view = memoryview(data)
    while view:
        if offset is None:
            count = os.write(fd, view)
        else:
            count = os.pwrite(fd, view, offset)
            offset += count
        view = view[count:]


@contextlib.contextmanager
def _named(shown: str) -> Iterator[None]:
    """Errors of a descriptor say whose it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = shown
        raise


def _length_of(fd: int) -> int | None:
    """Bytes in a file or device; None for a pipe, and for a file of which a part was read."""
    mode = os.fstat(fd).st_mode
    if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not os.lseek(fd, 0, os.SEEK_CUR):
        length = os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, 0, os.SEEK_SET)
        return length
    return None


def _shown(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


def _open_input(file: Path) -> int:
    if str(file) != "-":
        return os.open(file, os.O_RDONLY)
    if sys.stdin is None:  # number 0 may be anything that was opened since
        raise Invalid("standard input is closed: nothing can be read from it")
    return sys.stdin.fileno()


def _open_output(file: Path) -> int:
    if str(file) == "-":
        stdout = open_stdout()
        stdout.flush()
        return stdout.fileno()
    return os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)


async def _beside(function: Callable[..., T], *args: object) -> T:
    """Call what may block for long on a thread of its own.

    Unlike those of ``asyncio.to_thread`` it is not waited for at the end: Ctrl-C must do although
    nobody writes into the pipe that is read.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # whoever waits may leave, and the result is dropped

    def call() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return await asyncio.wrap_future(done)


async def _size_of(client: Client, name: str) -> int:
    return (await client.meta.volume(name)).size
