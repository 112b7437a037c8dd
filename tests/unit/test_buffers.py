"""The buffer pool: reuse without ever sharing."""

from __future__ import annotations

import ctypes
import gc
import threading

from torus_actors.model.buffers import GRAIN_BYTES, BufferPool, aligned

MIB = 1 << 20


def address(view: memoryview) -> int:
    """Where a buffer begins in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_view_has_exactly_the_size_asked_for() -> None:
    """Writable, of single bytes, whatever the grain of allocation; on a page, for direct I/O."""
    pool = BufferPool()
    for size in (1, GRAIN_BYTES - 1, GRAIN_BYTES, GRAIN_BYTES + 1, 516 << 10, MIB + 5):
        view = pool.take(size)
        assert len(view) == view.nbytes == size
        assert not view.readonly
        view[:] = bytes(size)
        assert address(view) % GRAIN_BYTES == 0
    assert address(aligned(3 * GRAIN_BYTES)) % GRAIN_BYTES == 0


def test_released_memory_is_reused() -> None:
    """When the last reader lets go, the same memory is handed out again."""
    pool = BufferPool()
    view = pool.take(MIB)
    part = view[10:20]
    memory = address(view)
    del view
    other = pool.take(MIB)
    assert address(other) != memory
    assert pool.in_use == 2
    del part
    assert address(pool.take(MIB - 5)) == memory
    del other
    assert pool.in_use == 0
    assert pool.idle_bytes == 2 * MIB


def test_any_kind_of_reference_keeps_memory() -> None:
    """Slices, casts, views of views and the object behind them all count as readers."""
    for hold in (
        lambda view: view[5:6],
        lambda view: view.cast("I"),
        memoryview,
        lambda view: view.obj,
        lambda view: view.toreadonly(),
    ):
        pool = BufferPool()
        view = pool.take(MIB)
        memory = address(view)
        held = hold(view)
        del view
        gc.collect()
        assert address(pool.take(MIB)) != memory
        assert held is not None


def test_contents_in_use_never_change() -> None:
    """Taking a hundred buffers while each is held for a while never overwrites one in use."""
    pool = BufferPool(8 * MIB)
    held: list[tuple[int, memoryview]] = []
    for i in range(100):
        view = pool.take(GRAIN_BYTES)
        view[:] = bytes([i]) * GRAIN_BYTES
        held.append((i, view[7:9]))
        del view
        held = held[-10:]
        assert all(bytes(part) == bytes([n]) * 2 for n, part in held)


def test_what_the_pool_keeps_is_bounded() -> None:
    """Beyond the bound, memory that comes back is given up; other sizes go first."""
    pool = BufferPool(4 * MIB)
    held = [pool.take(MIB) for _ in range(10)]
    assert pool.in_use == 10
    held.clear()
    assert pool.in_use == 0
    assert pool.idle_bytes == 4 * MIB
    view = pool.take(2 * MIB)
    del view
    assert pool.idle_bytes == 2 * MIB, "what nobody asks for any more made room"
    view = pool.take(100 * MIB)
    del view
    assert pool.idle_bytes <= 4 * MIB


def test_threads_share_a_pool() -> None:
    """Buffers taken, filled, checked and let go in several threads at once never overlap."""
    pool = BufferPool(4 * MIB)
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(300):
            view = pool.take(GRAIN_BYTES * (1 + i % 3))
            view[:] = bytes([number]) * len(view)
            if bytes(view) != bytes([number]) * len(view):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.in_use == 0


def test_a_size_may_come_while_others_are_let_go_of() -> None:
    """By another thread, whenever this one is between two of them.

    Found by review: what was let go of then was lost to the pool, with an error on standard error.
    """
    pool = BufferPool(4 * GRAIN_BYTES)

    class Late(int):
        """A size; while it is looked at another thread comes with a new one."""

        __hash__ = int.__hash__

        def __ne__(self, other: object) -> bool:
            pool._idle.setdefault(GRAIN_BYTES * 100, [])
            return int(self) != other

    idle = pool.take(3 * GRAIN_BYTES)
    del idle
    pool._idle[Late(3 * GRAIN_BYTES)] = pool._idle.pop(3 * GRAIN_BYTES)
    view = pool.take(2 * GRAIN_BYTES)
    del view
    assert pool.idle_bytes == 2 * GRAIN_BYTES
