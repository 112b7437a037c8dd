"""Writes that are durable when they end, started and ended on the event loop without a thread.

An asynchronous write (see ``aio``) to a file opened with O_DSYNC has ended when the disk has it for
good.

Only for writes of whole pages into space that was written before: those wait for nothing when they
are started. Where the system, the file system or the machine cannot do it, nothing is started, and
the caller has to write in a thread as ever.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torus_actors.model.buffers import aligned
from torus_actors.model.checksums import PAGE_SIZE, Buffer
from torus_actors.storage.aio import WRITE, AioQueue, Transfer
from torus_actors.storage.disk import DurableWriter

log = logging.getLogger(__name__)

WRITE_BYTES_MAX = 256 << 10
"""A larger write is no faster this way, and copying it would hold up the loop."""

SLOW_START_S = 0.002
SLOW_STARTS_MAX = 3
"""If starting a write takes so long, so often in a row, it is done while it is started: the file
system does not write in the background, and the loop would wait for the disk."""

SLOW_REST_S = 60.0
"""Then none is started for this long. Not for good: a machine that had no time to spare looks the
same."""

_NOT_STARTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN)
"""Of a write that ended like this nothing was done: it was not to the file system's liking."""

Ended = Callable[[OSError | None], None]


class DirectWriter(DurableWriter):
    """See the module.

    Args:
        folder: the directory.
        loop: has ``reap`` called when a write has ended; without it the owner sees to that.

    Raises:
        OSError: this machine cannot do it.
    """

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._folder = folder
        self._loop = loop
        self._queue = AioQueue(1)
        self._memory = aligned(WRITE_BYTES_MAX)
        self._files: dict[str, int] = {}
        self._length = 0
        self._ended: Ended | None = None
        self._slow = 0
        self._works = True
        self._rests_until = 0.0
        if loop is not None:
            loop.add_reader(self._queue.notify_fd, self.reap)

    def start(self, name: str, buffers: Sequence[Buffer], offset: int, ended: Ended) -> bool:
        """See `DurableWriter.start`; ``ended`` is called by ``reap``."""
        length = sum(map(len, buffers))
        if not self._works or self._ended is not None or length > WRITE_BYTES_MAX:
            return False
        if length % PAGE_SIZE or offset % PAGE_SIZE:
            return False
        file = self._files.get(name)
        if file is None:
            try:
                flags = os.O_WRONLY | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC
                file = self._files[name] = os.open(self._folder / name, flags)
            except OSError as error:
                self._give_up(error)
                return False
        began = time.monotonic()
        if began < self._rests_until:
            return False
        memory = self._memory[:length]
        at = 0
        for buffer in buffers:
            memory[at : at + len(buffer)] = buffer
            at += len(buffer)
        if not self._queue.start([Transfer(WRITE, file, memory, offset, self._done)]):
            self._give_up(OSError(errno.EAGAIN, "a write could not be started"))
            return False
        self._ended, self._length = ended, length
        now = time.monotonic()
        self._slow = self._slow + 1 if now - began > SLOW_START_S else 0
        if self._slow >= SLOW_STARTS_MAX:
            self._slow = 0
            self._rests_until = now + SLOW_REST_S
            log.info("%s: asynchronous writes are slow to start", self._folder)
        return True

    def _give_up(self, error: OSError) -> None:
        self._works = False
        log.info("%s: no asynchronous writes: %s", self._folder, error)

    @property
    def notify_fd(self) -> int:
        """Readable when a write has ended; then call ``reap``."""
        return self._queue.notify_fd

    def reap(self) -> None:
        """Take note of the write that has ended, if it has."""
        self._queue.reap()

    def _done(self, result: int) -> None:
        ended, self._ended = self._ended, None
        assert ended is not None
        if result == self._length:
            ended(None)
        elif result >= 0 or -result in _NOT_STARTED:
            error = OSError(errno.EAGAIN, f"{result} of {self._length} bytes were written")
            self._give_up(error)
            ended(error)
        else:
            ended(OSError(-result, os.strerror(-result)))

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._ended is not None

    def close(self) -> None:
        """See `DurableWriter.close`."""
        self._works = False
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._queue.notify_fd)
        self._queue.close()
        for file in self._files.values():
            os.close(file)
        self._files.clear()
