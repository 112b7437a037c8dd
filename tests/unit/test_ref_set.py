"""The set of refs that collectors and audits keep: nothing is lost in it, and it is small."""

from __future__ import annotations

import random

from torus_actors.model.inode_tree_pages import FANOUT, pack_entry
from torus_actors.model.ref_set import RefSet, compact
from torus_actors.model.refs import BlockRef, BlockType


def leaf(rng: random.Random) -> tuple[list[BlockRef], bytes]:
    """A page of a volume that was written all over, in many commits."""
    refs = [BlockRef.of(7, rng.randrange(1, 1000), rng.randrange(2048)) for _ in range(FANOUT)]
    return refs, b"".join(pack_entry(ref, rng.getrandbits(32)) for ref in refs)


def test_what_is_kept_of_a_page_is_small_and_has_all_its_blocks() -> None:
    """A collector keeps that of all pages of all volumes: 2,049 for each TiB."""
    rng = random.Random(1)
    refs, entries = leaf(rng)
    kept = compact(entries)
    assert len(kept) * 4 < len(entries)
    directly, found = RefSet(), RefSet()
    directly.add_all(refs)
    found.add_compact(kept)
    assert len(found) == len(directly) == len(set(refs))
    assert all(ref in found for ref in refs)
    others = [BlockRef.of(7, ref.inode, ref.index, BlockType.INODE) for ref in refs]
    others += [BlockRef.of(8, ref.inode, ref.index) for ref in refs]
    assert not any(ref in found for ref in others)
    found.add_compact(compact(b""))
    assert len(found) == len(directly)
