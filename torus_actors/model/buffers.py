"""Reusable buffers for bulk payloads.

A fresh buffer of a mebibyte costs a page fault for each 4 KiB of it, about as much time as filling
it. A pool hands the same memory out again instead, once nobody looks at it any more. Nobody has to
give a buffer back: CPython's reference count tells whether one is still seen, since every
memoryview, slice, or pending system call over a bytearray holds a reference to it.
"""

from __future__ import annotations

import sys
from collections import deque

GRAIN_BYTES = 4 << 10
"""Buffers are allocated in multiples of this, so that nearly equal sizes share them."""

IDLE_BYTES_MAX = 64 << 20
"""Default bound of what a pool remembers. Twice the largest NBD payload, so that even those are
reused; beyond it, buffers still are handed out, but forgotten."""

PROBES_MAX = 8
"""Buffers of one size looked at in one ``take``. They are probed oldest first: when the eight
oldest are still in use, the rest most likely are too, and allocating costs less than a long
search."""


def _measure_idle_refcount() -> int:
    probe = deque([bytearray(1)])
    buffer = probe[0]
    return sys.getrefcount(buffer)


_IDLE_REFCOUNT = _measure_idle_refcount()
"""What getrefcount says of a buffer seen only by its pool and one local variable."""


class BufferPool:
    """Hands out writable memory, and reuses it when its last reader has let go.

    For one thread (an event loop's). What it hands out may be read, and dropped, in any thread.

    Args:
        idle_bytes_max: upper bound of the memory that the pool keeps alive by itself. Where
            payloads stay in use for long (a write-back cache keeps them), choose it larger than
            what is in use at a time, or buffers are forgotten before they come back.
    """

    __slots__ = ("_buffers", "_bytes", "_idle_bytes_max")

    def __init__(self, idle_bytes_max: int = IDLE_BYTES_MAX) -> None:
        self._buffers: dict[int, deque[bytearray]] = {}
        self._bytes = 0
        self._idle_bytes_max = idle_bytes_max

    @property
    def pooled_bytes(self) -> int:
        """Bytes of all remembered buffers, in use or idle."""
        return self._bytes

    def take(self, size: int) -> memoryview:
        """A writable view of exactly ``size`` bytes, of undefined content.

        The memory stays the caller's for as long as the view, or any slice of it, lives.
        """
        room = -(-size // GRAIN_BYTES) * GRAIN_BYTES
        buffers = self._buffers.get(room)
        if buffers is not None:
            for at in range(min(len(buffers), PROBES_MAX)):
                buffer = buffers[at]
                if sys.getrefcount(buffer) == _IDLE_REFCOUNT:
                    del buffers[at]
                    buffers.append(buffer)
                    return memoryview(buffer)[:size]
            # Who took first lets go first, mostly. One that is kept for long does not stay in front
            # for ever: once the pool is full, each new buffer makes it forget the first.
        buffer = bytearray(room)
        self._remember(buffer)
        return memoryview(buffer)[:size]

    def _remember(self, buffer: bytearray) -> None:
        room = len(buffer)
        # Taken out and put back, so that the sizes stand in order of their last new buffer.
        buffers = self._buffers.pop(room, None) or deque()
        buffers.append(buffer)
        self._buffers[room] = buffers
        self._bytes += room
        while self._bytes > self._idle_bytes_max:
            # Forgetting a buffer that is in use costs nothing now: it is freed by its last reader.
            stalest = next(iter(self._buffers))
            self._buffers[stalest].popleft()
            self._bytes -= stalest
            if not self._buffers[stalest]:
                del self._buffers[stalest]
