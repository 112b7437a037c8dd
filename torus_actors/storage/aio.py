"""Linux's asynchronous I/O (``io_submit``): what is started on the event loop ends there too.

Handing a small read or write to a thread and its end back costs more than the disk takes for it:
two wakes, and a wait for the interpreter's lock on either side. A transfer past the page cache
(O_DIRECT) needs no thread: the kernel starts it at once and tells its end by an eventfd. Where the
system or the machine cannot do it, making a queue fails and the caller uses threads as ever.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""

_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_NOTIFY = 1
"""A flag of a control block: tell the eventfd."""

READ = 0
WRITE = 1

Ended = Callable[[int], None]
"""Called with the bytes transferred, or the negative number of an error."""


class Transfer(NamedTuple):
    """What to start.

    Attributes:
        opcode: READ or WRITE.
        fd: a file opened with O_DIRECT.
        memory: begins on a page; the transfer's until it has ended.
        offset: in the file, bytes.
        ended: called by ``reap``.
    """

    opcode: int
    fd: int
    memory: memoryview
    offset: int
    ended: Ended


class AioQueue:
    """Transfers under way; on one thread.

    Args:
        depth: how many at most.

    Attributes:
        notify_fd: readable when some have ended; then call ``reap``.
        ended: how many have ended so far.

    Raises:
        OSError: not on this machine.
    """

    def __init__(self, depth: int) -> None:
        calls = _CALLS.get(platform.machine())
        if calls is None or sys.byteorder != "little" or not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOSYS, "no asynchronous I/O on this machine")
        setup, self._destroy, self._getevents, self._submit = calls
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._context = ctypes.c_uint64(0)
        if self._libc.syscall(setup, depth, ctypes.byref(self._context)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self.notify_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ended = 0
        self._depth = depth
        self._blocks = ctypes.create_string_buffer(_IOCB.size * depth)
        self._first = ctypes.addressof(self._blocks)
        self._pointers = (ctypes.c_void_p * depth)()
        self._events = ctypes.create_string_buffer(_EVENT.size * depth)
        self._free = list(range(depth))
        # The memory is kept alive here: the kernel writes to it whatever becomes of its owner.
        self._under_way: dict[int, Transfer] = {}

    @property
    def busy(self) -> int:
        """Transfers under way."""
        return len(self._under_way)

    def start(self, transfers: Sequence[Transfer]) -> int:
        """Start transfers, in one call.

        Returns:
            How many were started, the first ones; of the rest nothing was done.
        """
        count = 0
        for transfer in transfers:
            if not self._free:
                break
            slot = self._free.pop()
            memory = transfer.memory
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            at = slot * _IOCB.size
            _IOCB.pack_into(
                self._blocks, at,
                slot, 0, 0, transfer.opcode, 0, transfer.fd, address, len(memory),
                transfer.offset, 0, _NOTIFY, self.notify_fd,
            )  # fmt: skip
            self._pointers[count] = self._first + at
            self._under_way[slot] = transfer
            count += 1
        if not count:
            return 0
        slots = list(self._under_way)[-count:]
        submitted: int = self._libc.syscall(
            self._submit, self._context, ctypes.c_long(count), self._pointers
        )
        started = max(submitted, 0)
        for slot in slots[started:]:
            del self._under_way[slot]
            self._free.append(slot)
        return started

    def reap(self) -> None:
        """Take note of the transfers that have ended."""
        try:
            os.eventfd_read(self.notify_fd)
        except BlockingIOError:
            return
        while True:
            got = self._libc.syscall(
                self._getevents,
                self._context,
                ctypes.c_long(0),
                ctypes.c_long(self._depth),
                self._events,
                None,
            )
            for n in range(max(got, 0)):
                slot, _, result, _ = _EVENT.unpack_from(self._events, n * _EVENT.size)
                transfer = self._under_way.pop(slot)
                self.ended += 1
                self._free.append(slot)
                transfer.ended(result)
            if got < self._depth:
                return

    def close(self) -> None:
        """Wait for what is under way, without telling anybody, and end."""
        if self.notify_fd >= 0:
            self._libc.syscall(self._destroy, self._context)
            self._under_way.clear()
            os.close(self.notify_fd)
            self.notify_fd = -1
