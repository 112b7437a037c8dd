"""The buffer pool: reuse without ever sharing."""

from __future__ import annotations

import gc

from torus_actors.model.buffers import GRAIN_BYTES, PROBES_MAX, BufferPool

MIB = 1 << 20


def test_view_has_exactly_the_size_asked_for() -> None:
    """Writable, of single bytes, whatever the grain of allocation."""
    pool = BufferPool()
    for size in (1, GRAIN_BYTES - 1, GRAIN_BYTES, GRAIN_BYTES + 1, MIB):
        view = pool.take(size)
        assert len(view) == view.nbytes == size
        assert not view.readonly
        view[:] = bytes(size)


def test_released_memory_is_reused() -> None:
    """When the last reader lets go, the same memory is handed out again."""
    pool = BufferPool()
    view = pool.take(MIB)
    part = view[10:20]
    memory = id(view.obj)
    del view
    other = pool.take(MIB)
    assert id(other.obj) != memory
    del part, other
    seen = {id(pool.take(MIB - i).obj) for i in range(4)}
    assert memory in seen
    assert pool.pooled_bytes == 2 * MIB


def test_any_kind_of_reference_keeps_memory() -> None:
    """Slices, casts, views of views and the bytearray itself all count as readers."""
    for hold in (
        lambda view: view[5:6],
        lambda view: view.cast("I"),
        memoryview,
        lambda view: view.obj,
        lambda view: view.toreadonly(),
    ):
        pool = BufferPool()
        view = pool.take(MIB)
        memory = id(view.obj)
        held = hold(view)
        del view
        gc.collect()
        assert id(pool.take(MIB).obj) != memory
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
    """Beyond the bound buffers are handed out, but forgotten; oldest sizes go first."""
    pool = BufferPool(4 * MIB)
    held = [pool.take(MIB) for _ in range(10)]
    assert pool.pooled_bytes == 4 * MIB
    small = [pool.take(GRAIN_BYTES) for _ in range(16)]
    assert pool.pooled_bytes <= 4 * MIB
    assert len(pool.take(100 * MIB)) == 100 * MIB
    assert pool.pooled_bytes <= 4 * MIB
    assert len({id(view.obj) for view in held + small}) == 26


def test_the_search_is_short() -> None:
    """With many buffers in use, the oldest are probed first, and few of them."""
    pool = BufferPool()
    held = [pool.take(GRAIN_BYTES) for _ in range(5 * PROBES_MAX)]
    oldest = id(held[0].obj)
    del held[0]
    assert id(pool.take(GRAIN_BYTES).obj) == oldest
