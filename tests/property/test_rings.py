"""Statistics and determinism of rings, over drawn members."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torus_actors.errors import Invalid
from torus_actors.model.peers import Peer, PeerList
from torus_actors.model.refs import BlockRef
from torus_actors.model.rings import Ring, make_ring, marshal, union, unmarshal

GIB = 1 << 30
BALANCE_TOLERANCE = 0.25
"""Bound on how far a peer's share may be from its weight's, relative. A peer of the least drawn
weight has some 1024 / 2.5 points: 5 % standard deviation, so that this is 5 of them."""
REF_COUNT = 10_000
REFS = [BlockRef.of(1 + i % 5, i % 97, i) for i in range(REF_COUNT)]

peer_ids = st.uuids().map(str)
weights = st.sampled_from([100 * GIB, 150 * GIB, 250 * GIB])
zones = st.sampled_from(["", "a", "b", "c"])
peers_strategy = st.lists(
    st.builds(Peer, peer_ids, weights, zones),
    min_size=2,
    max_size=20,
    unique_by=lambda peer: peer.peer_id,
)
kinds = st.sampled_from(["mod", "ketama", "zone"])


@settings(max_examples=25, deadline=None)
@given(peers_strategy)
def test_share_is_proportional_to_weight(peers: list[Peer]) -> None:
    """Each peer is first for its weight's share of blocks, within 25 % of that share."""
    ring = make_ring("ketama", peers)
    counts = Counter(ring.permutation(ref)[0] for ref in REFS)
    total = sum(peer.weight_bytes for peer in peers)
    for peer in peers:
        expected = REF_COUNT * peer.weight_bytes / total
        # Drawing 10000 blocks adds its own scatter: four standard deviations of it.
        slack = BALANCE_TOLERANCE * expected + 4 * expected**0.5
        assert abs(counts[peer.peer_id] - expected) <= slack


@settings(max_examples=25, deadline=None)
@given(peers_strategy, st.uuids().map(str), weights)
def test_joining_moves_only_to_the_new_peer(peers: list[Peer], new_id: str, weight: int) -> None:
    """When a peer joins, blocks move to it only, and no more than its share (within bounds)."""
    ring = make_ring("ketama", [p for p in peers if p.peer_id != new_id])
    grown = ring.with_peer(Peer(new_id, weight))
    moved = 0
    for ref in REFS:
        before, after = ring.permutation(ref), grown.permutation(ref)
        assert after.and_not([new_id]) == before
        moved += before[0] != after[0]
    share = weight / sum(peer.weight_bytes for peer in grown.peers)
    expected = REF_COUNT * share
    assert abs(moved - expected) <= BALANCE_TOLERANCE * expected + 4 * expected**0.5


@settings(max_examples=25, deadline=None)
@given(peers_strategy, st.data())
def test_leaving_moves_only_the_lost_blocks(peers: list[Peer], data: st.DataObject) -> None:
    """When a peer leaves, every block that it did not hold stays where it is."""
    ring = make_ring("ketama", peers)
    gone = data.draw(st.sampled_from(ring.members))
    shrunk = ring.without_peer(gone)
    for ref in REFS[:2000]:
        assert shrunk.permutation(ref) == ring.permutation(ref).and_not([gone])


@settings(max_examples=50, deadline=None)
@given(kinds, peers_strategy)
def test_replicas_are_distinct(kind: str, peers: list[Peer]) -> None:
    """A permutation names every member exactly once."""
    ring = make_ring(kind, peers, replication=3)
    wanted = sorted(ring.members)
    assert all(sorted(ring.permutation(ref)) == wanted for ref in REFS[:500])


@settings(max_examples=50, deadline=None)
@given(peers_strategy, st.integers(1, 5))
def test_zone_ring_uses_as_many_domains_as_there_are(peers: list[Peer], replication: int) -> None:
    """The owners of a block are in min(replication, failure domains) different domains."""
    ring = make_ring("zone", peers, replication=replication)
    domain = {peer.peer_id: peer.failure_domain for peer in peers}
    wanted = min(replication, len(set(domain.values())))
    for ref in REFS[:300]:
        assert len({domain[peer] for peer in ring.owners(ref)}) >= wanted


def rings_strategy() -> st.SearchStrategy[Ring]:
    """Rings of all types, changed or not, and unions of them."""
    ring = st.one_of(
        st.builds(
            lambda kind, peers, version, replication: make_ring(
                kind, peers, version=version, replication=replication
            ),
            kinds,
            peers_strategy,
            st.integers(0, 1 << 40),
            st.integers(1, 16),
        ),
        st.builds(lambda version: make_ring("empty", version=version), st.integers(0, 99)),
        st.builds(lambda peers: make_ring("single", peers[:1]), peers_strategy),
        st.builds(lambda peers: make_ring("ketama", peers[1:]).with_peer(peers[0]), peers_strategy),
    )
    return st.one_of(ring, st.builds(union, ring, ring))


@settings(max_examples=60, deadline=None)
@given(rings_strategy())
def test_round_trip(ring: Ring) -> None:
    """unmarshal(marshal(ring)) equals the ring and places blocks alike."""
    again = unmarshal(marshal(ring))
    assert again == ring
    assert all(again.permutation(ref) == ring.permutation(ref) for ref in REFS[:50])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_ring_or_invalid(data: bytes) -> None:
    """Decoding never fails with anything but Invalid."""
    with contextlib.suppress(Invalid):
        unmarshal(data)


@settings(max_examples=100, deadline=None)
@given(rings_strategy(), st.data())
def test_damaged_ring_is_a_ring_or_invalid(ring: Ring, data: st.DataObject) -> None:
    """A marshalled ring with one byte changed decodes to some ring or raises Invalid."""
    raw = bytearray(marshal(ring))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Invalid):
        unmarshal(bytes(raw))


_OTHER_PROCESS = """
import sys
from torus_actors.model.refs import BlockRef
from torus_actors.model.rings import unmarshal
ring = unmarshal(bytes.fromhex(sys.argv[1]))
for i in range(300):
    print(",".join(ring.permutation(BlockRef.of(7, 3, i))))
"""


@pytest.mark.parametrize("kind", ["mod", "ketama", "zone", "union"])
def test_other_processes_agree(kind: str) -> None:
    """Processes with different hash seeds compute the same permutations."""
    peers = [Peer(str(uuid.UUID(int=n * 7919)), n * GIB, f"z{n % 3}") for n in range(1, 8)]
    ring: Ring
    if kind == "union":
        old = make_ring("ketama", peers[:5])
        ring = union(old, old.with_peer(peers[6]))
    else:
        ring = make_ring(kind, peers)
    here = [ring.permutation(BlockRef.of(7, 3, i)) for i in range(300)]
    root = Path(__file__).resolve().parents[2]
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS, marshal(ring).hex()],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert [tuple(line.split(",")) for line in done.stdout.splitlines()] == here


@given(st.lists(peer_ids, unique=True), st.lists(peer_ids, unique=True))
def test_peer_list_algebra(left: list[str], right: list[str]) -> None:
    """Peer lists obey the set identities, and a list is split by intersection and and-not."""
    a, b = PeerList(left), PeerList(right + left[:2])
    assert set(a.union(b)) == set(a) | set(b)
    assert a.union(b)[: len(a)] == a
    assert set(a.intersection(b)) == set(a) & set(b)
    assert sorted(a.intersection(b) + a.and_not(b)) == sorted(a)
