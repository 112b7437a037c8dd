"""Blocksets of any stack against a dict, and their bytes against damage."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.errors import Invalid
from torus_actors.model.blocksets import create_blockset, parse_spec, unmarshal_blockset
from torus_actors.model.inode_tree_walk import PageNeeded
from torus_actors.model.refs import BlockRef, BlockType

specs = st.sampled_from(["base", "crc,base", "rep=2,crc,base", "crc,rep=16,base", "rep=1,base"])
LENGTH = 4000
indexes = st.integers(0, LENGTH - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), indexes, st.integers(0, (1 << 32) - 1)),
        st.tuples(st.just("trim"), indexes, st.integers(0, LENGTH)),
        st.tuples(st.just("truncate"), indexes, st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(specs, operations)
def test_survives_marshal(spec: str, steps: list[tuple[str, int, int]]) -> None:
    """After any changes, a blockset opened from its bytes and pages has the same entries."""
    blockset = create_blockset(spec, LENGTH)
    model: dict[int, tuple[BlockRef, int]] = {}
    for number, (name, index, value) in enumerate(steps):
        if name == "put":
            if index < blockset.length:
                ref = BlockRef.of(1, number, index)
                blockset.put(index, ref, value)
                model[index] = (ref, value)
        elif name == "trim":
            first, stop = sorted((min(index, blockset.length), min(value, blockset.length)))
            blockset.trim(first, stop)
            model = {i: e for i, e in model.items() if not first <= i < stop}
        else:
            blockset.truncate(index)
            model = {i: e for i, e in model.items() if i < index}
    numbers = iter(range(1000))
    plan = blockset.block_map.plan_commit(
        lambda: BlockRef.of(1, 5000, next(numbers), BlockType.INODE)
    )
    pages = dict(plan.blocks)
    again = unmarshal_blockset(blockset.marshal(plan.root))
    assert again.spec == spec
    assert again.length == blockset.length
    data_refs = {ref for ref in again.all_refs(lambda n: pages[n.ref]) if ref.block_type == 0}
    assert data_refs == {ref for ref, _ in model.values()}
    inodes = set(again.live_inodes(lambda n: pages[n.ref]))
    assert inodes == {ref.inode for ref, _ in model.values()} | ({5000} if model else set())
    for index in list(model) + list(range(0, blockset.length, 997)):
        for _ in range(5):
            try:
                assert again.get(index) == model.get(index)
                break
            except PageNeeded as need:
                again.block_map.load(need, pages[need.ref])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_spec_or_invalid(text: str) -> None:
    """The parser raises nothing but Invalid, and what it takes it gives back."""
    with contextlib.suppress(Invalid):
        layers = parse_spec(text)
        assert layers[-1][0] == "base"
        create_blockset(text)


@settings(max_examples=300, deadline=None)
@given(specs, st.data())
def test_damaged_blockset_is_a_blockset_or_invalid(spec: str, data: st.DataObject) -> None:
    """A marshalled blockset with one byte changed decodes to some blockset or raises Invalid."""
    raw = bytearray(create_blockset(spec, 77).marshal())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Invalid):
        unmarshal_blockset(bytes(raw))
