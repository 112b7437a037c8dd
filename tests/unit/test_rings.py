"""Rings of every type, one case at a time; the statistics are in tests/property."""

from __future__ import annotations

import uuid

import msgpack
import pytest

from torus_actors.errors import Invalid
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.model.refs import BlockRef
from torus_actors.model.rings import (
    MEMBERS_MAX,
    REPLICATION_MAX,
    Ring,
    make_ring,
    marshal,
    union,
    unmarshal,
)

GIB = 1 << 30
REFS = [BlockRef.of(1, 2, i) for i in range(200)]
CIRCULAR = ["mod", "ketama", "zone"]


def some_peers(count: int, first: int = 1) -> list[Peer]:
    """Distinct peers of equal weight in three zones."""
    return [
        Peer(str(uuid.UUID(int=n)), 100 * GIB, f"zone-{n % 3}", f"10.0.0.{n}:40000")
        for n in range(first, first + count)
    ]


def every_ring() -> list[Ring]:
    """One ring of each type, and a union of unions."""
    peers = some_peers(4)
    plain = [make_ring(kind, peers, version=3, replication=2) for kind in CIRCULAR]
    single = make_ring("single", peers[:1])
    joined = union(plain[1], plain[1].with_peer(some_peers(1, 9)[0]))
    return [*plain, make_ring("empty"), single, joined, union(joined, plain[0])]


@pytest.mark.parametrize("ring", every_ring(), ids=lambda ring: ring.kind)
def test_permutation_names_every_member_once(ring: Ring) -> None:
    """A permutation is one: all members, each once."""
    for ref in REFS:
        permutation = ring.permutation(ref)
        assert len(permutation) == len(ring.members)
        assert set(permutation) == set(ring.members)


@pytest.mark.parametrize("ring", every_ring(), ids=lambda ring: ring.kind)
def test_unmarshalled_ring_is_equal(ring: Ring) -> None:
    """A ring survives msgpack: equal, of equal hash and bytes, and it places blocks alike."""
    data = marshal(ring)
    again = unmarshal(data)
    assert again == ring
    assert hash(again) == hash(ring)
    assert marshal(again) == data
    assert type(again) is type(ring)
    assert [again.permutation(ref) for ref in REFS] == [ring.permutation(ref) for ref in REFS]


@pytest.mark.parametrize("kind", CIRCULAR)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_peers_than_replicas_is_legal(kind: str, count: int) -> None:
    """Regression, coreos/torus#219, 246, 427: fewer peers than replicas are no crash.

    They give a shorter permutation.
    """
    ring = make_ring(kind, some_peers(count), replication=3)
    assert len(ring.permutation(REFS[0])) == count
    assert len(ring.owners(REFS[0])) == count
    assert unmarshal(marshal(ring)) == ring
    if count:
        shrunk = ring.without_peer(ring.members[0])
        assert len(shrunk.permutation(REFS[0])) == count - 1


def test_changes_make_the_next_version() -> None:
    """Every change gives a new ring of version + 1 and leaves the old one as it was."""
    peers = some_peers(4)
    ring = make_ring("ketama", peers[:3], version=5, replication=2)
    before = marshal(ring)
    changed = [
        ring.with_replication(3),
        ring.with_peer(peers[3]),
        ring.without_peer(peers[0].peer_id),
        ring.with_type("zone"),
    ]
    assert [new.version for new in changed] == [6, 6, 6, 6]
    assert changed[0].replication == 3
    assert peers[3].peer_id in changed[1].members
    assert peers[0].peer_id not in changed[2].members
    assert changed[3].kind == "zone"
    assert marshal(ring) == before


def test_with_peer_updates_a_member() -> None:
    """A member that is given again is replaced: its address and weight may change."""
    ring = make_ring("ketama", some_peers(3))
    moved = Peer(ring.members[0], 5 * GIB, "elsewhere", "10.9.9.9:1")
    updated = ring.with_peer(moved)
    assert updated.members == ring.members
    assert moved in updated.peers


def test_empty_grows_and_shrinks() -> None:
    """An empty ring takes its first peer, and a single one its second, as ketama."""
    one, two = some_peers(2)
    empty = make_ring("empty", version=1, replication=2)
    assert empty.permutation(REFS[0]) == ()
    first = empty.with_peer(one)
    assert (first.kind, first.version, first.replication) == ("ketama", 2, 2)
    assert make_ring("single", [one]).with_peer(two).kind == "ketama"
    assert make_ring("single", [one]).with_peer(Peer(one.peer_id, 1)).kind == "single"
    assert make_ring("single", [one]).without_peer(one.peer_id).kind == "empty"
    with pytest.raises(Invalid):
        empty.without_peer(one.peer_id)
    with pytest.raises(Invalid):
        make_ring("single", [one]).without_peer(two.peer_id)


def test_union_serves_both_rings() -> None:
    """While blocks move: the new ring's peers first, then the old one's; owners are of both."""
    peers = some_peers(5)
    old = make_ring("ketama", peers[:4], version=7, replication=2)
    new = make_ring("ketama", peers[2:], version=8, replication=2)
    both = union(old, new)
    assert both.version == 8
    assert both.replication == 2
    assert set(both.members) == set(old.members) | set(new.members)
    both.prepare()
    for ref in REFS:
        n, o = new.permutation(ref), old.permutation(ref)
        assert both.permutation(ref) == n + tuple(p for p in o if p not in n)
        assert both.owners(ref)[:2] == n[:2]
        assert set(both.owners(ref)) == set(n[:2]) | set(o[:2])


def test_union_is_a_transition() -> None:
    """A union has no next version of its own."""
    ring = make_ring("ketama", some_peers(2))
    both = union(ring, ring.with_replication(2))
    for change in (
        lambda: both.with_replication(3),
        lambda: both.with_peer(some_peers(1, 7)[0]),
        lambda: both.without_peer(ring.members[0]),
        lambda: both.with_type("mod"),
    ):
        with pytest.raises(Invalid):
            change()


def test_union_depth_is_bounded() -> None:
    """Unions within unions end at a named limit instead of exhausting the stack."""
    ring: Ring = make_ring("mod", some_peers(1))
    for _ in range(rings.UNION_DEPTH_MAX + 1):
        ring = union(ring, ring)
        ring = union(ring.old, ring)
    with pytest.raises(Invalid):
        marshal(ring)


def test_zone_puts_replicas_in_different_zones() -> None:
    """With three zones, the first three peers of every permutation are in three zones."""
    peers = [*some_peers(9), Peer(str(uuid.UUID(int=99)), 0, "zone-empty")]
    zone_of = {peer.peer_id: peer.zone for peer in peers}
    ring = make_ring("zone", peers, replication=3)
    plain = make_ring("ketama", peers, replication=3)
    for ref in REFS:
        permutation = ring.permutation(ref)
        assert len({zone_of[peer] for peer in permutation[:3]}) == 3
        assert len({zone_of[peer] for peer in permutation[3:6]}) == 3
        assert permutation[0] == plain.permutation(ref)[0]
        assert permutation[-1] == peers[-1].peer_id


def test_weightless_peers_come_last() -> None:
    """A peer of weight 0 is a last resort; if there are only such, they are still all listed."""
    peers = some_peers(3)
    drained = Peer(str(uuid.UUID(int=50)), 0)
    ring = make_ring("ketama", [drained, *peers])
    assert {ring.permutation(ref)[-1] for ref in REFS} == {drained.peer_id}
    assert make_ring("ketama", [drained]).permutation(REFS[0]) == (drained.peer_id,)


def test_points_stay_when_the_type_changes_to_zone() -> None:
    """Between ketama and zone only the rearrangement moves blocks: first peers stay."""
    peers = some_peers(4)
    ring = make_ring("ketama", peers).with_peer(Peer(str(uuid.UUID(int=60)), 300 * GIB))
    zoned = ring.with_type("zone")
    assert all(zoned.permutation(ref)[0] == ring.permutation(ref)[0] for ref in REFS)


def test_table_and_single_computation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring too large for the table gives the same permutations as one within it."""
    peers = [*some_peers(7), Peer(str(uuid.UUID(int=70)), 0), Peer(str(uuid.UUID(int=71)), GIB)]
    for kind in ("ketama", "zone"):
        tabled = make_ring(kind, peers)
        tabled.prepare()
        expected = [tabled.permutation(ref) for ref in REFS]
        with monkeypatch.context() as patch:
            patch.setattr("torus_actors.model.ring_types.TABLE_ENTRIES_MAX", 0)
            ring = make_ring(kind, peers)
            assert [ring.permutation(ref) for ref in REFS] == expected


def test_order_of_peers_does_not_matter() -> None:
    """The same peers in another order make an equal ring."""
    peers = some_peers(5)
    for kind in CIRCULAR:
        assert make_ring(kind, peers) == make_ring(kind, reversed(peers))


def test_largest_ring() -> None:
    """A ring may have MEMBERS_MAX peers and no more."""
    peers = some_peers(MEMBERS_MAX + 1)
    ring = make_ring("ketama", peers[:-1], replication=3)
    assert len(ring.permutation(REFS[0])) == MEMBERS_MAX
    assert unmarshal(marshal(ring)) == ring
    with pytest.raises(Invalid):
        ring.with_peer(peers[-1])


def test_values_are_checked() -> None:
    """Out-of-range or contradictory values are refused with Invalid."""
    peers = some_peers(2)
    for bad in (
        lambda: make_ring("ketama", peers, replication=0),
        lambda: make_ring("ketama", peers, replication=REPLICATION_MAX + 1),
        lambda: make_ring("ketama", peers, version=-1),
        lambda: make_ring("ketama", [peers[0], peers[0]]),
        lambda: make_ring("single", peers),
        lambda: make_ring("single"),
        lambda: make_ring("empty", peers),
        lambda: make_ring("union", peers),
        lambda: make_ring("circle", peers),
        lambda: rings.ring_class("mod").build(1, 1, peers, {"unit_bytes": 1}),
        lambda: rings.ring_class("ketama").build(1, 1, peers, {"unit_bytes": -1}),
        lambda: rings.ring_class("ketama").build(1, 1, peers, {"unit_bytes": "x"}),
        lambda: rings.ring_class("ketama").build(1, 1, peers, {"colour": 1}),
    ):
        with pytest.raises(Invalid):
            bad()


def test_garbage_is_not_a_ring() -> None:
    """Any bytes that are no ring raise Invalid, and nothing else."""
    good = msgpack.unpackb(marshal(make_ring("ketama", some_peers(2))))
    cases = [b"", b"\xc1", b"\x80", msgpack.packb([1]), b"\0" * (rings.MARSHALLED_SIZE_MAX + 1)]
    for field, value in [
        ("format", 2),
        ("kind", "circle"),
        ("kind", ["mod"]),
        ("version", "1"),
        ("replication", None),
        ("peers", [["x", 1, "", ""]]),
        ("peers", [[1]]),
        ("peers", 3),
        ("params", []),
        ("params", {1: 2}),
    ]:
        cases.append(msgpack.packb({**good, field: value}))
    cases.extend(msgpack.packb({k: v for k, v in good.items() if k != field}) for field in good)
    for case in cases:
        with pytest.raises(Invalid):
            unmarshal(case)


def test_a_type_can_be_registered_once() -> None:
    """The registry refuses a second type of one name."""
    with pytest.raises(Invalid):
        rings.register_ring("mod")(rings.ModRing)


def test_describe_names_what_matters() -> None:
    """The description holds type, version, replication and every peer."""
    ring = make_ring("zone", some_peers(2), version=4, replication=2)
    text = ring.describe()
    assert "zone ring, version 4, replication 2" in text
    assert all(peer.peer_id in text and peer.address in text for peer in ring.peers)
    assert "no peers" in make_ring("empty").describe()
    assert "old:" in union(ring, ring.with_replication(1)).describe()
    assert "version=4" in repr(ring)
