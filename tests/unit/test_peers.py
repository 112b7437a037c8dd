"""Peers and the algebra of peer lists."""

from __future__ import annotations

import dataclasses
import uuid

import pytest

from torus_actors.errors import Invalid
from torus_actors.model.peers import NAME_LENGTH_MAX, WEIGHT_BYTES_MAX, Peer, PeerList

A, B, C = (str(uuid.UUID(int=n)) for n in (1, 2, 3))


def test_peer_is_a_value() -> None:
    """Equal fields make equal peers, and no field can be changed."""
    peer = Peer(A, 10, "z", "host:1")
    assert peer == Peer(A, 10, "z", "host:1")
    assert hash(peer) == hash(Peer(A, 10, "z", "host:1"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        peer.zone = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    "peer_id", ["", "node-1", A.replace("-", ""), "{" + A + "}", A.upper()[:-1] + "F", 7, None]
)
def test_peer_id_has_one_spelling(peer_id: str) -> None:
    """Whatever is not a UUID in canonical form is refused."""
    with pytest.raises(Invalid):
        Peer(peer_id, 1)


@pytest.mark.parametrize("weight", [-1, WEIGHT_BYTES_MAX + 1, 1.5, "1", True, None])
def test_weight_is_checked(weight: int) -> None:
    """A weight is an integer in range."""
    with pytest.raises(Invalid):
        Peer(A, weight)


def test_names_are_checked() -> None:
    """Zone and address are text of bounded length."""
    with pytest.raises(Invalid):
        Peer(A, 1, zone="z" * (NAME_LENGTH_MAX + 1))
    with pytest.raises(Invalid):
        Peer(A, 1, address=b"host:1")  # type: ignore[arg-type]


def test_peer_without_zone_is_its_own_failure_domain() -> None:
    """Two peers without a zone are not taken to fail together."""
    assert Peer(A, 1).failure_domain != Peer(B, 1).failure_domain
    assert Peer(A, 1, "z").failure_domain == Peer(B, 1, "z").failure_domain


def test_algebra_keeps_the_left_order() -> None:
    """Union, intersection and and-not follow the left list's order and give each peer once."""
    left, right = PeerList([C, A]), PeerList([B, A])
    assert left.union(right) == (C, A, B)
    assert left.intersection(right) == (A,)
    assert left.and_not(right) == (C,)
    assert right.and_not(right) == ()


def test_contains() -> None:
    """Membership and position, with -1 for a stranger."""
    peers = PeerList([C, A])
    assert peers.has(A)
    assert A in peers
    assert not peers.has(B)
    assert peers.index_at(A) == 1
    assert peers.index_at(B) == -1
