"""Rings: which peers hold a block. This module makes them, and turns them into bytes and back.

``ring.permutation(ref)`` is a pure function: the same on every node and in every process. The types
are in ``ring_types``; others can add one with ``register_ring``.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgpack

from torus_actors.errors import Invalid
from torus_actors.model.peers import Peer, PeerList
from torus_actors.model.ring_base import (
    MEMBERS_MAX,
    REPLICATION_MAX,
    RING_TYPES,
    Ring,
    register_ring,
    ring_class,
)
from torus_actors.model.ring_types import (
    EmptyRing,
    KetamaRing,
    ModRing,
    SingleRing,
    UnionRing,
    ZoneRing,
)

__all__ = [
    "MEMBERS_MAX",
    "REPLICATION_MAX",
    "RING_TYPES",
    "EmptyRing",
    "KetamaRing",
    "ModRing",
    "Peer",
    "PeerList",
    "Ring",
    "SingleRing",
    "UnionRing",
    "ZoneRing",
    "make_ring",
    "marshal",
    "register_ring",
    "union",
    "unmarshal",
]

FORMAT = 1
MARSHALLED_SIZE_MAX = 1 << 20
"""Largest marshalled ring in bytes: etcd takes requests of up to 1.5 MiB."""

UNION_DEPTH_MAX = 8
"""Unions within unions: changes that may overlap before the first one is done."""


def make_ring(
    kind: str, peers: Iterable[Peer] = (), *, version: int = 1, replication: int = 1
) -> Ring:
    """A ring of the named type.

    Raises:
        Invalid: no such type, or the values do not make such a ring.
    """
    return ring_class(kind).build(version, replication, peers, {})


def union(old: Ring, new: Ring) -> UnionRing:
    """The ring to use while blocks move from where ``old`` puts them to where ``new`` does."""
    return UnionRing(old, new)


def marshal(ring: Ring) -> bytes:
    """The ring as msgpack; equal rings give equal bytes."""
    packed: bytes = msgpack.packb(_to_data(ring, UNION_DEPTH_MAX))
    return packed


def unmarshal(data: bytes | memoryview) -> Ring:
    """The ring that ``marshal`` was given.

    Raises:
        Invalid: the bytes are no ring, or one of a type or format that is not known here.
    """
    if len(data) > MARSHALLED_SIZE_MAX:
        raise Invalid(f"{len(data)} bytes are too many for a ring")
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise Invalid(f"not a marshalled ring: {error}") from error
    return _from_data(fields, UNION_DEPTH_MAX)


def _to_data(ring: Ring, depth: int) -> dict[str, object]:
    if depth < 0:
        raise Invalid(f"more than {UNION_DEPTH_MAX} unions within each other")
    params = {
        name: _to_data(value, depth - 1) if isinstance(value, Ring) else value
        for name, value in ring.params().items()
    }
    peers: list[list[object]] = []
    if not isinstance(ring, UnionRing):
        peers = [[p.peer_id, p.weight_bytes, p.zone, p.address] for p in ring.peers]
    return {
        "format": FORMAT,
        "kind": ring.kind,
        "version": ring.version,
        "replication": ring.replication,
        "peers": peers,
        "params": params,
    }


def _from_data(fields: object, depth: int) -> Ring:
    if depth < 0:
        raise Invalid(f"more than {UNION_DEPTH_MAX} unions within each other")
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise Invalid(f"not a marshalled ring of format {FORMAT}")
    try:
        kind = fields["kind"]
        version, replication = fields["version"], fields["replication"]
        peers = [Peer(peer_id, weight, zone, at) for peer_id, weight, zone, at in fields["peers"]]
        raw_params = dict(fields["params"].items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Invalid(f"the marshalled ring is incomplete: {error}") from error
    params = {
        name: _from_data(value, depth - 1) if isinstance(value, dict) else value
        for name, value in raw_params.items()
    }
    return ring_class(kind).build(version, replication, peers, params)
