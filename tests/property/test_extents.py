"""ExtentMap against two bytearrays: one of values, one of what is known."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.model.extents import COMPACT_RATIO, MISSING, ExtentMap, Missing

SIZE = 96
UNKNOWN, DATA, ZERO = 0, 1, 2

offsets = st.integers(0, SIZE - 1)
lengths = st.integers(0, SIZE)
operations = st.lists(
    st.tuples(st.sampled_from(["write", "view", "zero", "discard", "merge"]), offsets, lengths),
    max_size=40,
)


class Model:
    """What every byte is, one by one."""

    def __init__(self) -> None:
        self.values = bytearray(SIZE)
        self.states = bytearray(SIZE)

    def put(self, offset: int, data: bytes, state: int) -> None:
        """Set every byte of a range."""
        self.values[offset : offset + len(data)] = data
        self.states[offset : offset + len(data)] = bytes([state]) * len(data)


def check(extents: ExtentMap, model: Model) -> None:
    """The map's structure and every read agree with the model."""
    items = list(extents.items())
    position = 0
    for start, length, buffer in items:
        assert start >= position
        assert length > 0
        assert buffer is None or len(buffer) == length
        if isinstance(buffer, memoryview) and buffer.obj is not None:
            assert len(buffer) <= memoryview(buffer.obj).nbytes
        position = start + length
    assert extents.covered_bytes == sum(state != UNKNOWN for state in model.states)
    assert extents.data_bytes == sum(state == DATA for state in model.states)
    assert extents.is_full(SIZE) == (UNKNOWN not in model.states)
    assert extents.is_all_zero == (ZERO in model.states and DATA not in model.states)
    base = bytearray(b"\xee" * SIZE)
    extents.overlay(base)
    assert base == bytes(
        value if state else 0xEE for value, state in zip(model.values, model.states, strict=True)
    )


@settings(max_examples=400, deadline=None)
@given(operations, offsets, lengths)
def test_against_model(steps: list[tuple[str, int, int]], offset: int, length: int) -> None:
    """After any operations, reads, counters and overlay agree with byte-by-byte bookkeeping."""
    extents, model = ExtentMap(), Model()
    for number, (name, start, wanted) in enumerate(steps):
        size = min(wanted, SIZE - start)
        data = bytes((number * 7 + i) % 255 + 1 for i in range(size))
        if name == "write":
            extents.write(start, data)
            model.put(start, data, DATA)
        elif name == "view":
            backing = bytes(number) + data + bytes(number * 3)
            extents.write(start, memoryview(backing)[number : number + size])
            model.put(start, data, DATA)
        elif name == "zero":
            extents.zero(start, size)
            model.put(start, bytes(size), ZERO)
        elif name == "discard":
            extents.discard(start, size)
            model.put(start, bytes(size), UNKNOWN)
        else:
            newer = ExtentMap()
            newer.zero(start, size)
            newer.write(start, data[: size // 2])
            extents.merge_from(newer)
            model.put(start, bytes(size), ZERO)
            model.put(start, data[: size // 2], DATA)
        check(extents, model)
    length = min(length, SIZE - offset)
    position = offset
    for start, size, data_or_none in extents.read(offset, length):
        assert start == position
        assert size > 0
        states = set(model.states[start : start + size])
        if isinstance(data_or_none, Missing):
            assert data_or_none is MISSING
            assert states == {UNKNOWN}
        elif data_or_none is None:
            assert states == {ZERO}
        else:
            assert states == {DATA}
            assert bytes(data_or_none) == model.values[start : start + size]
        position += size
    assert position == offset + length
    whole = extents.read(offset, length)
    for pieces_max in range(1, len(whole)):
        assert extents.read(offset, length, pieces_max) == whole[:pieces_max]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(offsets, st.integers(1, SIZE)), min_size=1, max_size=30))
def test_memory_held_is_bounded(writes: list[tuple[int, int]]) -> None:
    """The buffers kept alive are at most COMPACT_RATIO times the data in the map."""
    extents = ExtentMap()
    for start, wanted in writes:
        extents.write(start, bytes(min(wanted, SIZE - start)))
    kept: dict[int, int] = {}
    for _, _, buffer in extents.items():
        assert buffer is not None
        backing = buffer.obj if isinstance(buffer, memoryview) else buffer
        kept[id(backing)] = memoryview(backing).nbytes
    assert sum(kept.values()) <= COMPACT_RATIO * extents.data_bytes
