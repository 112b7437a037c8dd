"""Blocksets: specs, layers, and what they keep."""

from __future__ import annotations

import msgpack
import pytest

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.blocksets import (
    BLOCKSET_LAYERS,
    SPEC_LENGTH_MAX,
    Blockset,
    CrcBlockset,
    Layer,
    create_blockset,
    inodes_of,
    parse_spec,
    register_layer,
    unmarshal_blockset,
)
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.inode_tree import CommitPlan
from torus_actors.model.inode_tree_walk import PageNeeded, PageVisit
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.model.ring_base import REPLICATION_MAX


def commit(blockset: Blockset, inode: int = 90) -> CommitPlan:
    """A commit that succeeds."""
    numbers = iter(range(1000))
    plan = blockset.block_map.plan_commit(
        lambda: BlockRef.of(1, inode, next(numbers), BlockType.INODE)
    )
    blockset.block_map.commit_done(plan)
    return plan


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("base", [("base", "")]),
        ("crc,base", [("crc", ""), ("base", "")]),
        ("rep=2,crc,base", [("rep", "2"), ("crc", ""), ("base", "")]),
        ("rep=2, crc, base", [("rep", "2"), ("crc", ""), ("base", "")]),
    ],
)
def test_specs(spec: str, layers: list[tuple[str, str]]) -> None:
    """A spec names its layers, outermost first, and is given back by the stack."""
    assert parse_spec(spec) == layers
    blockset = create_blockset(spec)
    assert blockset.spec == spec.replace(" ", "")
    assert [layer.kind for layer in blockset.layers()] == [kind for kind, _ in layers]


@pytest.mark.parametrize(
    "spec",
    [
        "", ",", "crc", "crc,", "base,crc", "crc,crc,base", "base,base", "raid,base", "rep,base",
        "rep=,base", "rep=0,base", f"rep={REPLICATION_MAX + 1},base", "rep=two,base", "crc=1,base",
        "rep=-1,base", "rep=\u0662,base", "base=1", "CRC,base", "crc base", "crc\n,base",
        "rep=2,rep=3,base", "x" * (SPEC_LENGTH_MAX + 1),
    ],
)  # fmt: skip
def test_bad_specs(spec: str) -> None:
    """A spec that breaks a rule is Invalid, with one plain line."""
    with pytest.raises(Invalid) as caught:
        create_blockset(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["base", "crc,base", "rep=3,crc,base", "crc,rep=3,base"])
def test_stack_is_the_map(spec: str) -> None:
    """Whatever the stack, put, get, trim and truncate act on the one map at its bottom."""
    blockset = create_blockset(spec, 100)
    ref = BlockRef.of(1, 2, 3)
    blockset.put(5, ref, 77)
    assert blockset.get(5) == (ref, 77)
    assert blockset.block_map.get(5) == (ref, 77)
    assert blockset.get(6) is None
    blockset.put(6, ref, 78)
    blockset.trim(5, 6)
    assert blockset.get(5) is None
    assert blockset.get(6) == (ref, 78)
    blockset.truncate(6)
    assert blockset.length == 6
    with pytest.raises(Invalid):
        blockset.get(6)
    assert blockset.replication == (3 if "rep" in spec else None)
    assert blockset.keeps_sums == ("crc" in spec)


def test_layers_below() -> None:
    """Sub-blocksets lead down to base, which has none."""
    blockset = create_blockset("rep=2,crc,base")
    kinds = []
    layer: Blockset | None = blockset
    while layer is not None:
        kinds.append(layer.kind)
        layer = layer.sub_blockset()
    assert kinds == ["rep", "crc", "base"]


def test_crc_checks_what_was_read() -> None:
    """With crc any wrong byte, list or root is Corruption; without it nothing is checked."""
    data = bytes(range(256)) * 64
    sums = sums_of(data)
    ref = BlockRef.of(1, 2, 3)
    for spec in ("crc,base", "rep=2,crc,base"):
        blockset = create_blockset(spec, 4)
        blockset.put(1, ref, root_of(sums))
        blockset.check(1, sums, 0, data)
        blockset.check(1, sums, 4096, data[4096:8192])
        entry = blockset.get(1)
        assert entry is not None
        for bad_sums, bad in ((sums, b"x" + data[1:]), (b"\0" * len(sums), data)):
            with pytest.raises(Corruption):
                blockset.check(1, bad_sums, 0, bad)
            with pytest.raises(Corruption):
                blockset.check_entry(entry, bad_sums, 0, bad)
        with pytest.raises(Invalid):
            blockset.check(0, sums, 0, data)
    plain = create_blockset("base", 4)
    plain.put(1, ref)
    plain.check(1, sums, 0, b"anything")


def test_check_uses_the_entry_that_was_read() -> None:
    """A block that is replaced while it is read is checked against its own checksum."""
    old, new = bytes(4096), b"\1" * 4096
    blockset = create_blockset("crc,base", 4)
    blockset.put(0, BlockRef.of(1, 2, 3), root_of(sums_of(old)))
    entry = blockset.get(0)
    assert entry is not None
    blockset.put(0, BlockRef.of(1, 2, 4), root_of(sums_of(new)))
    blockset.check_entry(entry, sums_of(old), 0, old)


def test_crc_insists_on_a_root() -> None:
    """A block without a checksum does not get into a volume that keeps them; a root of 0 does."""
    blockset = create_blockset("crc,base", 4)
    with pytest.raises(Invalid):
        blockset.put(0, BlockRef.of(1, 2, 3))
    assert blockset.get(0) is None
    blockset.put(0, BlockRef.of(1, 2, 3), 0)
    assert blockset.get(0) == (BlockRef.of(1, 2, 3), 0)


def test_marshal_is_small_and_lazy() -> None:
    """A marshalled blockset names its content; reopened it has it all, page by page."""
    blockset = create_blockset("rep=2,crc,base", 5000)
    for index in range(0, 5000, 7):
        blockset.put(index, BlockRef.of(1, 2, index), index)
    with pytest.raises(Invalid):
        blockset.marshal()
    plan = commit(blockset)
    blockset.put(0, BlockRef.of(1, 3, 0), 1)
    data = blockset.marshal(plan.root)
    assert len(data) < 100
    again = unmarshal_blockset(data)
    assert again.spec == "rep=2,crc,base"
    assert again.length == 5000
    assert again.marshal() == data
    assert again.block_map.pages_loaded == 0
    pages = dict(plan.blocks)
    with pytest.raises(PageNeeded):
        list(again.all_refs())
    wanted = {BlockRef.of(1, 2, index) for index in range(0, 5000, 7)} | set(pages)
    refs = list(again.all_refs(lambda need: pages[need.ref]))
    assert set(refs) == wanted
    assert len(refs) == len(wanted)


def test_live_inodes() -> None:
    """The live INodes are those of the data blocks and of the pages, for one volume or for all."""
    blockset = create_blockset("crc,base", 3000)
    big = (1 << 63) + 5
    blockset.put(0, BlockRef.of(1, 11, 0), 1)
    blockset.put(2000, BlockRef.of(1, big, 0), 1)
    blockset.put(2001, BlockRef.of(8, 33, 0), 1)
    assert set(blockset.live_inodes()) == {11, big, 33}
    commit(blockset, inode=90)
    assert set(blockset.live_inodes()) == {11, big, 33, 90}
    assert set(blockset.live_inodes(volume=1)) == {11, big, 90}
    assert set(blockset.live_inodes(volume=8)) == {33}
    blockset.trim(0, 1)
    commit(blockset, inode=91)
    # The leaf of blocks 2000 and 2001 did not change, and is still the one written under 90.
    assert set(blockset.live_inodes()) == {big, 33, 90, 91}
    first = next(blockset.walk())
    assert isinstance(first, PageVisit)
    assert list(inodes_of(first)) == [91]


def test_garbage_is_not_a_blockset() -> None:
    """Any bytes that are no blockset raise Invalid, and nothing else."""
    good = msgpack.unpackb(create_blockset("crc,base", 5).marshal())
    root = good["layers"][1][2]
    cases = [b"", b"\xc1", b"\x80", msgpack.packb(7)]
    for field, value in [
        ("format", 2),
        ("layers", []),
        ("layers", 3),
        ("layers", [["crc", ""]]),
        ("layers", [["crc", "", None]]),
        ("layers", [["crc", "", 1], ["base", "", root]]),
        ("layers", [["base", "", None]]),
        ("layers", [["base", "", b"short"]]),
        ("layers", [["base", "", b"\xff" * len(root)]]),
        ("layers", [["crc,crc", "", None], ["base", "", root]]),
        ("layers", [["crc,base", "", None]]),
    ]:
        cases.append(msgpack.packb({**good, field: value}))
    for case in cases:
        with pytest.raises(Invalid):
            unmarshal_blockset(case)


def test_others_can_add_a_layer() -> None:
    """A registered layer takes part in specs, and keeps its own state with the volume's."""

    class Counting(Layer):
        """Counts puts."""

        __slots__ = ("puts",)

        def __init__(self, arg: str, sub: Blockset | None) -> None:
            super().__init__(arg, sub)
            self.puts = 0

        def put(self, index: int, ref: bytes, root: int | None = None) -> None:
            """Count it and hand it on."""
            super().put(index, ref, root)
            self.puts += 1

        def state(self, root: object) -> object:
            """The count."""
            return self.puts

        def restore(self, state: object) -> None:
            """The count."""
            assert isinstance(state, int)
            self.puts = state

    try:
        register_layer("counting")(Counting)
        blockset = create_blockset("counting,crc,base", 10)
        blockset.put(1, BlockRef.of(1, 2, 3), 4)
        again = unmarshal_blockset(blockset.marshal(commit(blockset).root))
        assert isinstance(again, Counting)
        assert again.puts == 1
        for name in ("counting", "crc", "Not a name"):
            with pytest.raises(Invalid):
                register_layer(name)(Counting)
    finally:
        BLOCKSET_LAYERS.pop("counting", None)


def test_a_layer_needs_one_below() -> None:
    """Layers cannot be put together against the rules by hand either."""
    with pytest.raises(Invalid):
        CrcBlockset("", None)
    with pytest.raises(Invalid):
        BLOCKSET_LAYERS["base"]("", create_blockset("base"))
