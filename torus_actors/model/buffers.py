"""Reusable buffers for bulk payloads.

Fresh memory costs a page fault for each 4 KiB, more time than filling it; and Python clears what it
allocates. A pool hands the same memory out again instead, as soon as nobody looks at it any more.
Nobody has to give a buffer back: every memoryview, slice, or pending system call holds a reference
to the object through which it was handed out, and the death of that object is what the pool waits
for.

Buffers begin on a page of memory: what is received into one can go to the disk past the page cache.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref
from typing import Any

GRAIN_BYTES = mmap.PAGESIZE
"""Buffers are whole pages."""

GRAINS = 32
"""Sizes between a power of two and the next are rounded up to so many steps: nearly equal ones
share their buffers, at 3 % of waste, and there are never many sizes to look after."""

IDLE_BYTES_MAX = 64 << 20
"""Default bound of the memory that a pool keeps for nobody. Twice the largest NBD payload, so that
even those are reused; what comes back beyond it is unmapped."""


@functools.cache
def _window(size: int) -> Any:
    """The type of an object through which ``size`` bytes of a map are handed out."""
    return ctypes.c_char * size


def _map(size: int) -> mmap.mmap:
    # Not shared with other processes, as Python would have it: such pages cost more to fault in.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def aligned(size: int) -> memoryview:
    """Fresh writable memory of ``size`` zero bytes that begins on a page."""
    return memoryview(_map(size))


class BufferPool:
    """Hands out writable memory, and reuses it when its last reader has let go; in any thread.

    What was let go of last is handed out first: it may still be in the processor's caches.

    Args:
        idle_bytes_max: upper bound of the memory that is kept while nobody uses it.
    """

    __slots__ = ("_idle", "_idle_bytes_max", "_in_use")

    def __init__(self, idle_bytes_max: int = IDLE_BYTES_MAX) -> None:
        self._idle_bytes_max = idle_bytes_max
        # Threads need no lock: each step is one operation on a container.
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._in_use: dict[int, tuple[weakref.ref[Any], mmap.mmap]] = {}

    @property
    def idle_bytes(self) -> int:
        """Memory that nobody uses."""
        return sum(size * len(idle) for size, idle in list(self._idle.items()))

    @property
    def in_use(self) -> int:
        """Buffers that somebody holds."""
        return len(self._in_use)

    def take(self, size: int) -> memoryview:
        """A writable view of exactly ``size`` bytes, of undefined content; begins on a page.

        The memory stays the caller's for as long as the view, or any slice of it, lives.
        """
        grain = max(GRAIN_BYTES, (1 << size.bit_length() - 1) // GRAINS)
        room = -(-size // grain) * grain
        try:
            memory = self._idle[room].pop()
        except (KeyError, IndexError):
            memory = _map(room)
        window = _window(room).from_buffer(memory)
        watch = weakref.ref(window, self._let_go)
        self._in_use[id(watch)] = (watch, memory)
        view = memoryview(window).cast("B")
        return view if size == room else view[:size]

    def _let_go(self, watch: weakref.ref[Any]) -> None:
        """The last reference to a buffer has gone; may run in any thread."""
        _, memory = self._in_use.pop(id(watch))
        room = len(memory)
        if self.idle_bytes + room > self._idle_bytes_max:
            # It may be other sizes that lie idle: those that nobody asks for must not stay.
            for size in [size for size in list(self._idle) if size != room]:
                self._idle.pop(size, None)
            if self.idle_bytes + room > self._idle_bytes_max:
                return
        self._idle.setdefault(room, []).append(memory)
