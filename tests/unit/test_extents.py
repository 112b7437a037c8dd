"""Extents of one block: the cases that a random model might not name."""

from __future__ import annotations

import pytest

from torus_actors.errors import Invalid
from torus_actors.model.extents import COMPACT_RATIO, MISSING, Buffer, ExtentMap, Missing

BLOCK = 64 * 1024


def content(piece: Buffer | Missing | None) -> bytes | Missing | None:
    """A piece's data as bytes."""
    return piece if piece is None or isinstance(piece, Missing) else bytes(piece)


def pieces(extents: ExtentMap, offset: int, length: int) -> list[tuple[int, int, object]]:
    """A read with its data as bytes."""
    return [(start, size, content(data)) for start, size, data in extents.read(offset, length)]


def test_nothing_is_known_at_first() -> None:
    """A new map reads as one missing piece."""
    extents = ExtentMap()
    assert extents.read(3, 10) == [(3, 10, MISSING)]
    assert extents.read(3, 0) == []
    assert not extents
    assert not extents.is_all_zero
    assert not extents.is_full(BLOCK)


def test_written_buffer_is_kept_not_copied() -> None:
    """A read of exactly what was written returns the same object; a part of it is a view."""
    extents = ExtentMap()
    data = bytes(range(200))
    extents.write(100, data)
    assert extents.read(100, 200)[0][2] is data
    part = extents.read(110, 5)[0][2]
    assert isinstance(part, memoryview)
    assert part.obj is data
    assert bytes(part) == data[10:15]


def test_pieces_of_all_three_sorts() -> None:
    """Data, zeros and gaps come in order and cover the range."""
    extents = ExtentMap()
    extents.write(10, b"aaaa")
    extents.zero(20, 5)
    assert pieces(extents, 8, 20) == [
        (8, 2, MISSING),
        (10, 4, b"aaaa"),
        (14, 6, MISSING),
        (20, 5, None),
        (25, 3, MISSING),
    ]
    assert extents.covered_bytes == 9
    assert extents.data_bytes == 4
    assert list(extents.items()) == [(10, 4, b"aaaa"), (20, 5, None)]


def test_write_splits_an_extent() -> None:
    """A write within an extent leaves the parts before and behind it."""
    extents = ExtentMap()
    extents.write(0, b"0123456789")
    extents.write(3, b"xx")
    assert pieces(extents, 0, 10) == [(0, 3, b"012"), (3, 2, b"xx"), (5, 5, b"56789")]
    assert len(extents) == 3


def test_write_covers_many() -> None:
    """A write over several extents replaces them and cuts the outer ones."""
    extents = ExtentMap()
    for i in range(5):
        extents.write(i * 10, bytes([65 + i]) * 8)
    extents.write(4, b"-" * 40)
    assert pieces(extents, 0, 48) == [(0, 4, b"AAAA"), (4, 40, b"-" * 40), (44, 4, b"EEEE")]


def test_same_range_again_replaces_in_place() -> None:
    """Overwriting exactly keeps the number of extents, also over zeros."""
    extents = ExtentMap()
    extents.zero(0, 4)
    extents.write(0, b"abcd")
    extents.write(0, b"efgh")
    assert pieces(extents, 0, 4) == [(0, 4, b"efgh")]
    assert (extents.covered_bytes, extents.data_bytes) == (4, 4)


def test_zero_runs_join() -> None:
    """Adjacent and overlapping zero runs are one extent, and take no memory."""
    extents = ExtentMap()
    extents.zero(0, 10)
    extents.zero(10, 5)
    assert list(extents.items()) == [(0, 15, None)]
    extents.zero(20, 10)
    extents.zero(16, 4)
    assert list(extents.items()) == [(0, 15, None), (16, 14, None)]
    extents.zero(5, 15)
    extents.zero(28, 10)
    assert list(extents.items()) == [(0, 38, None)]
    assert extents.data_bytes == 0
    assert extents.is_all_zero
    assert extents.is_full(38)


def test_zero_lets_go_of_data() -> None:
    """Zeros over data drop the buffer."""
    extents = ExtentMap()
    extents.write(0, bytes(100))
    extents.zero(0, 100)
    assert extents.data_bytes == 0
    assert list(extents.items()) == [(0, 100, None)]


def test_discard_makes_a_gap() -> None:
    """Discarded bytes are missing again."""
    extents = ExtentMap()
    extents.write(0, b"0123456789")
    extents.discard(2, 5)
    assert pieces(extents, 0, 10) == [(0, 2, b"01"), (2, 5, MISSING), (7, 3, b"789")]
    assert extents.covered_bytes == 5
    extents.clear()
    assert extents.covered_bytes == extents.data_bytes == len(extents) == 0


def test_small_remainder_lets_go_of_a_big_buffer() -> None:
    """A remainder below 1/COMPACT_RATIO of its buffer is a copy; a larger one is a view."""
    big = bytes(BLOCK)
    extents = ExtentMap()
    extents.write(0, big)
    extents.write(0, bytes(BLOCK - BLOCK // COMPACT_RATIO))
    tail = extents.read(BLOCK - 16, 16)[0][2]
    assert isinstance(tail, memoryview)
    assert tail.obj is big
    extents.write(0, bytes(BLOCK - 16))
    tail = extents.read(BLOCK - 16, 16)[0][2]
    assert isinstance(tail, bytes)


def test_remainder_of_a_view_counts_the_buffer_behind_it() -> None:
    """What matters is the buffer that a view keeps alive, not the view's own length."""
    received = bytearray(BLOCK)
    extents = ExtentMap()
    extents.write(0, memoryview(received)[:4096])
    extents.write(0, b"x")
    kept = extents.read(1, 4095)[0][2]
    assert isinstance(kept, bytes)


def test_overlay_applies_to_a_window() -> None:
    """Overlay changes the known bytes within the base, and no others."""
    extents = ExtentMap()
    extents.write(0, b"aaaa")
    extents.zero(6, 4)
    extents.write(12, b"bbbb")
    base = bytearray(b"-" * 12)
    extents.overlay(base, 2)
    assert base == b"aa--\0\0\0\0--bb"
    whole = bytearray(b"-" * 200_000)
    extents.zero(0, 200_000)
    extents.overlay(whole)
    assert whole == bytes(200_000)


def test_merge_from_prefers_the_newer() -> None:
    """After a merge the newer map's bytes win and the older ones fill the rest."""
    old, new = ExtentMap(), ExtentMap()
    old.write(0, b"old-old-")
    new.write(4, b"NEW")
    new.zero(8, 2)
    old.merge_from(new)
    assert pieces(old, 0, 10) == [(0, 4, b"old-"), (4, 3, b"NEW"), (7, 1, b"-"), (8, 2, None)]
    assert len(new) == 2
    old.merge_from(old)
    assert old.covered_bytes == 10


def test_negative_values_are_refused() -> None:
    """A negative offset or length is Invalid and changes nothing."""
    extents = ExtentMap()
    for bad in (
        lambda: extents.write(-1, b"x"),
        lambda: extents.zero(-1, 1),
        lambda: extents.zero(0, -1),
        lambda: extents.discard(-1, 1),
        lambda: extents.read(-1, 5),
        lambda: extents.read(0, -1),
    ):
        with pytest.raises(Invalid):
            bad()
    extents.write(5, b"")
    extents.zero(5, 0)
    extents.discard(5, 0)
    assert repr(extents) == "ExtentMap(extents=0, covered_bytes=0, data_bytes=0)"
