"""Writes that are durable when they end, started and ended on the event loop without a thread.

Handing a small write to a thread and its end back costs more than the disk takes for it: two wakes,
and a wait for the interpreter's lock on either side. Linux can do without: an asynchronous write
past the page cache (O_DIRECT) to a file opened with O_DSYNC ends when the disk has it for good,
and says so by an eventfd.

Only for writes of whole pages into space that was written before: those wait for nothing when they
are started. Where the system, the file system or the machine cannot do it, nothing is started, and
the caller has to write in a thread as ever.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torus_actors.model.checksums import PAGE_SIZE, Buffer

log = logging.getLogger(__name__)

WRITE_BYTES_MAX = 256 << 10
"""A larger write is no faster this way, and copying it would hold up the loop."""

SLOW_START_S = 0.002
SLOW_STARTS_MAX = 3
"""If starting a write takes so long, so often in a row, it is done while it is started: the file
system does not write in the background, and the loop would wait for the disk."""

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""

_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_PWRITE = 1
_NOTIFY = 1
"""A flag of a control block: tell the eventfd."""

_NOT_STARTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN)
"""Of a write that ended like this nothing was done: it was not to the file system's liking."""

Ended = Callable[[OSError | None], None]


class DirectWriter:
    """Writes to the files of one directory, one at a time; on the loop's thread.

    Attributes:
        notify_fd: readable when a write has ended; then call ``reap``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        calls = _CALLS.get(platform.machine())
        if calls is None or sys.byteorder != "little" or not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOSYS, "no asynchronous writes on this machine")
        self._setup, self._destroy, self._getevents, self._submit = calls
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._context = ctypes.c_uint64(0)
        if self._libc.syscall(self._setup, 8, ctypes.byref(self._context)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self.notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Anonymous memory begins at a page, as O_DIRECT wants it.
        self._memory = mmap.mmap(-1, WRITE_BYTES_MAX)
        self._view = memoryview(self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._block = ctypes.create_string_buffer(_IOCB.size)
        self._blocks = (ctypes.c_void_p * 1)(ctypes.addressof(self._block))
        self._event = ctypes.create_string_buffer(_EVENT.size)
        self._files: dict[str, int] = {}
        self._length = 0
        self._ended: Ended | None = None
        self._slow = 0
        self._works = True

    def start(self, name: str, buffers: Sequence[Buffer], offset: int, ended: Ended) -> bool:
        """Start a write, if that is possible.

        Args:
            name: of a file in the directory.
            buffers: whole pages in all; copied.
            offset: bytes, whole pages; the range was written before.
            ended: called by ``reap`` with None when it is durable, or with what went wrong: an
                error with the number EAGAIN says that nothing is known to have been written, and
                that the same write may be done another way.

        Returns:
            Whether it was started; if not, nothing was done.
        """
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
        at = 0
        view = self._view
        for buffer in buffers:
            view[at : at + len(buffer)] = buffer
            at += len(buffer)
        _IOCB.pack_into(
            self._block, 0,
            0, 0, 0, _PWRITE, 0, file, self._address, length, offset, 0, _NOTIFY, self.notify_fd,
        )  # fmt: skip
        began = time.monotonic()
        if self._libc.syscall(self._submit, self._context, ctypes.c_long(1), self._blocks) != 1:
            self._give_up(OSError(ctypes.get_errno(), "io_submit"))
            return False
        self._ended, self._length = ended, length
        self._slow = self._slow + 1 if time.monotonic() - began > SLOW_START_S else 0
        if self._slow >= SLOW_STARTS_MAX:
            self._give_up(OSError(errno.ETIME, "it waits for the disk"))
        return True

    def _give_up(self, error: OSError) -> None:
        self._works = False
        log.info("%s: no asynchronous writes: %s", self._folder, error)

    def reap(self) -> None:
        """Take note of the write that has ended, if it has."""
        try:
            os.eventfd_read(self.notify_fd)
        except BlockingIOError:
            return
        got = self._libc.syscall(
            self._getevents, self._context, ctypes.c_long(0), ctypes.c_long(1), self._event, None
        )
        ended = self._ended
        if got != 1 or ended is None:
            return
        self._ended = None
        _, _, result, _ = _EVENT.unpack(self._event.raw)
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
        """Close the files; waits for the write that is under way."""
        self._works = False
        if self.notify_fd < 0:
            return
        self._libc.syscall(self._destroy, self._context)
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        os.close(self.notify_fd)
        self.notify_fd = -1
