"""The ring types: empty, single, mod, ketama, zone, and union for the time of a change."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from weakref import WeakValueDictionary

from mmh3 import hash as mmh3_32
from mmh3 import hash128 as mmh3_128

from torus_actors.errors import Invalid
from torus_actors.model.peers import Peer, PeerList
from torus_actors.model.ring_base import GROWN_KIND, Ring, register_ring, ring_class

POINTS_MEAN = 1024
"""Points of a peer of average weight. A peer's share of the blocks deviates from its weight's by
about 1/sqrt(points), one standard deviation: 3.1 %."""

POINTS_MEAN_MIN = POINTS_MEAN // 2
POINTS_MEAN_MAX = POINTS_MEAN * 2
"""While the mean stays between these, the bytes that one point stands for are kept, so that a peer
that joins moves no block between two others."""

TABLE_ENTRIES_MAX = 1 << 20
"""Points times members up to which every permutation is computed ahead: 8 MiB of pointers, 32
equal peers. Larger rings compute each permutation when asked, in some 0.6 us a member."""

_Arrange = Callable[[tuple[str, ...]], tuple[str, ...]]


@register_ring("empty")
class EmptyRing(Ring):
    """No peers: a cluster that was just initialised."""

    __slots__ = ()

    def __init__(self, version: int, replication: int = 1, peers: Iterable[Peer] = ()) -> None:
        super().__init__(version, replication, peers)
        if self._peers:
            raise Invalid("an empty ring has no peers")

    def permutation(self, ref: bytes) -> PeerList:
        """Nobody."""
        return self._members

    def with_peer(self, peer: Peer) -> Ring:
        """The next version: a ketama ring with its first peer."""
        return ring_class(GROWN_KIND).build(self.version + 1, self.replication, [peer], {})


@register_ring("single")
class SingleRing(Ring):
    """One peer that holds everything."""

    __slots__ = ()

    def __init__(self, version: int, replication: int, peers: Iterable[Peer]) -> None:
        super().__init__(version, replication, peers)
        if len(self._peers) != 1:
            raise Invalid(f"a single ring has one peer, not {len(self._peers)}")

    def permutation(self, ref: bytes) -> PeerList:
        """The one peer."""
        return self._members

    def with_peer(self, peer: Peer) -> Ring:
        """The next version: the peer updated, or a ketama ring of the two."""
        if peer.peer_id in self._members:
            return super().with_peer(peer)
        peers = [*self._peers, peer]
        return ring_class(GROWN_KIND).build(self.version + 1, self.replication, peers, {})

    def without_peer(self, peer_id: str) -> Ring:
        """The next version: an empty ring."""
        if peer_id not in self._members:
            raise Invalid(f"peer {peer_id} is not in the ring")
        return EmptyRing(self.version + 1, self.replication)


@register_ring("mod")
class ModRing(Ring):
    """Hash modulo the number of peers: even and simple, but every change moves nearly everything.

    Weights are not used.
    """

    __slots__ = ("_table",)

    def __init__(self, version: int, replication: int, peers: Iterable[Peer]) -> None:
        super().__init__(version, replication, peers)
        ids = self._members
        self._table = [PeerList(ids[i:] + ids[:i]) for i in range(len(ids))]

    def permutation(self, ref: bytes) -> PeerList:
        """The members in order of id, rotated by the hash of the ref."""
        table = self._table
        return table[mmh3_32(ref, 0, False) % len(table)] if table else self._members


@register_ring("ketama")
class KetamaRing(Ring):
    """Consistent hashing: each peer has points on a circle in proportion to its weight.

    A ref's permutation is the order in which the peers are met going up the circle from its hash.

    Args:
        version: as in every ring.
        replication: as in every ring.
        peers: as in every ring.
        unit_bytes: weight that one point stands for. Carried from version to version: were it
            derived from the present mean weight, a large peer that joins would take points, and
            so blocks, away from everybody, also in favour of old peers.
    """

    __slots__ = ("_circle", "_unit_bytes")

    def __init__(
        self, version: int, replication: int, peers: Iterable[Peer], unit_bytes: int = 0
    ) -> None:
        super().__init__(version, replication, peers)
        if type(unit_bytes) is not int or unit_bytes < 0:
            raise Invalid(f"ring unit {unit_bytes!r} is not a number of bytes")
        self._unit_bytes = _fitting_unit(self._peers, unit_bytes)
        # Built when first asked: most rings that are decoded or compared are never asked.
        self._circle: _Circle | None = None

    @property
    def unit_bytes(self) -> int:
        """Weight that one point on the circle stands for; 0 while no peer has weight."""
        return self._unit_bytes

    def permutation(self, ref: bytes) -> PeerList:
        """The members in the order in which they are met on the circle."""
        circle = self._circle
        if circle is None:
            circle = self._build_circle()
        at = bisect_right(circle.hashes, mmh3_32(ref, 0, False))
        return circle.table[at] if circle.table else circle.compute(at)

    def prepare(self) -> None:
        """Compute the circle now, some 3 ms a peer."""
        if self._circle is None:
            self._build_circle()

    def _build_circle(self) -> _Circle:
        # A ring that differs only in version or replication, as most next versions do, has the
        # same circle; so has one that was read again.
        key = (self.kind, self._unit_bytes, self._peers)
        circle = _circles.get(key)
        if circle is None:
            circle = _circles[key] = _Circle(self._peers, self._unit_bytes, self._arrange)
        self._circle = circle
        return circle

    def _arrange(self, order: tuple[str, ...]) -> tuple[str, ...]:
        """Hook for types that reorder what the circle gives; called once a distinct order."""
        return order

    def with_type(self, kind: str) -> Ring:
        """The next version, of another type; between ketama and zone the points stay."""
        cls = ring_class(kind)
        params = self.params() if issubclass(cls, KetamaRing) else {}
        return cls.build(self.version + 1, self.replication, self._peers, params)

    def params(self) -> dict[str, object]:
        """The unit."""
        return {"unit_bytes": self._unit_bytes}

    @classmethod
    def build(
        cls,
        version: int,
        replication: int,
        peers: Iterable[Peer],
        params: Mapping[str, object],
    ) -> Ring:
        """Make one; ``params`` may hold ``unit_bytes``."""
        unit = params.get("unit_bytes", 0)
        if not set(params) <= {"unit_bytes"} or not isinstance(unit, int):
            raise Invalid(f"a {cls.kind} ring takes a number as unit_bytes and nothing else")
        return cls(version, replication, peers, unit)


@register_ring("zone")
class ZoneRing(KetamaRing):
    """Ketama, rearranged so that the first replicas are in different failure domains.

    The circle's first peer stays first. After it, the next peer on the circle whose zone has been
    used least so far is taken: with k zones, the first k peers are in k zones.
    """

    __slots__ = ("_domains", "_weightless")

    def __init__(
        self, version: int, replication: int, peers: Iterable[Peer], unit_bytes: int = 0
    ) -> None:
        super().__init__(version, replication, peers, unit_bytes)
        self._domains = {peer.peer_id: peer.failure_domain for peer in self._peers}
        self._weightless = frozenset(p.peer_id for p in self._peers if p.weight_bytes == 0)

    def _arrange(self, order: tuple[str, ...]) -> tuple[str, ...]:
        # Peers are dealt into rounds, of which each has one peer of a zone.
        domains = self._domains
        used: dict[str, int] = {}
        rounds: list[list[str]] = []
        for peer_id in order:
            domain = domains[peer_id]
            turn = used.get(domain, 0)
            used[domain] = turn + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(peer_id)
        arranged = tuple(chain.from_iterable(rounds))
        if not self._weightless:
            return arranged
        # A peer without weight is a last resort, even if its zone is not in use otherwise.
        return tuple(sorted(arranged, key=self._weightless.__contains__))


@register_ring("union")
class UnionRing(Ring):
    """The old and the new ring together, while blocks move from one to the other.

    It has the new ring's version and replication, and the members of both.
    """

    __slots__ = ("_joined", "new", "old")

    def __init__(self, old: Ring, new: Ring) -> None:
        # Union members may exceed what one ring may have, so the base gets only the new ring's.
        super().__init__(new.version, new.replication, new.peers)
        self.old = old
        self.new = new
        extra = (peer for peer in old.peers if peer.peer_id not in new.members)
        self._peers = tuple(sorted((*new.peers, *extra), key=lambda peer: peer.peer_id))
        self._members = PeerList(peer.peer_id for peer in self._peers)
        self._joined: dict[tuple[PeerList, PeerList], PeerList] = {}

    def permutation(self, ref: bytes) -> PeerList:
        """The new ring's permutation, then the members that only the old one has."""
        new = self.new.permutation(ref)
        old = self.old.permutation(ref)
        joined = self._joined.get((new, old))
        if joined is None:
            if len(self._joined) >= _JOINED_MAX:
                self._joined.clear()
            joined = self._joined[new, old] = new.union(old)
        return joined

    def prepare(self) -> None:
        """Prepare both rings."""
        self.new.prepare()
        self.old.prepare()

    def owners(self, ref: bytes) -> PeerList:
        """Who may hold ``ref`` while it moves: the new ring's owners, then the old one's."""
        return self.new.owners(ref).union(self.old.owners(ref))

    def describe(self) -> str:
        """Both rings."""
        return f"union ring\nold: {self.old.describe()}\nnew: {self.new.describe()}"

    def with_type(self, kind: str) -> Ring:
        """Refused: a union is a transition, only the new ring has a next version."""
        raise Invalid("a union ring cannot be changed; change its new ring")

    def _next(self, *, replication: int | None = None, peers: Iterable[Peer] | None = None) -> Ring:
        raise Invalid("a union ring cannot be changed; change its new ring")

    def params(self) -> dict[str, object]:
        """Both rings."""
        return {"old": self.old, "new": self.new}

    @classmethod
    def build(
        cls,
        version: int,
        replication: int,
        peers: Iterable[Peer],
        params: Mapping[str, object],
    ) -> Ring:
        """Make one from the rings ``old`` and ``new``; the other fields follow from them."""
        old, new = params.get("old"), params.get("new")
        if not isinstance(old, Ring) or not isinstance(new, Ring) or len(params) != 2:
            raise Invalid("a union ring is made of an old and a new ring")
        return cls(old, new)

    def _identity(self) -> tuple[object, ...]:
        return (self.kind, self.old, self.new)


_JOINED_MAX = 4096
"""Distinct joined permutations a union ring remembers; a few hundred bytes each."""


class _Circle:
    """The points of a ketama ring, and for each the permutation that starts there.

    ``table`` has one entry more than ``hashes``: above the last point the circle begins again. It
    is empty when the ring is too large to compute all of it ahead.
    """

    __slots__ = ("__weakref__", "_arrange", "_at_owner", "_weightless", "hashes", "table")

    def __init__(self, peers: tuple[Peer, ...], unit_bytes: int, arrange: _Arrange) -> None:
        points: list[tuple[int, str]] = []
        weighted: list[str] = []
        self._weightless: list[str] = []
        for peer in peers:
            count = _points_of(peer, unit_bytes)
            points.extend((at, peer.peer_id) for at in _point_hashes(peer.peer_id, count))
            (weighted if count else self._weightless).append(peer.peer_id)
        points.sort()
        self.hashes = [at for at, _ in points]
        self._at_owner: dict[str, list[int]] = {}
        self.table: list[PeerList] = []
        if not points:
            self.table = [PeerList(arrange(tuple(self._weightless)))]
        elif len(points) * len(peers) <= TABLE_ENTRIES_MAX:
            self.table = self._fill([owner for _, owner in points], weighted, arrange)
        else:
            self._arrange = arrange
            for position, (_, owner) in enumerate(points):
                self._at_owner.setdefault(owner, []).append(position)

    def _fill(self, owners: list[str], weighted: list[str], arrange: _Arrange) -> list[PeerList]:
        # Going down the circle, the order at a point is that at the point above with the owner
        # moved to the front. The first round only finds the order with which to begin.
        order = weighted
        for owner in reversed(owners):
            order.remove(owner)
            order.insert(0, owner)
        distinct: dict[tuple[str, ...], PeerList] = {}
        table: list[PeerList] = []
        for owner in (owners[0], *reversed(owners)):
            order.remove(owner)
            order.insert(0, owner)
            key = tuple(order)
            permutation = distinct.get(key)
            if permutation is None:
                permutation = PeerList(arrange((*key, *self._weightless)))
                distinct[key] = permutation
            table.append(permutation)
        table.reverse()
        return table

    def compute(self, at: int) -> PeerList:
        """The permutation from point number ``at`` on, without the table."""
        total = len(self.hashes)
        distances: list[tuple[int, str]] = []
        for owner, positions in self._at_owner.items():
            next_up = bisect_right(positions, at - 1)
            if next_up < len(positions):
                distances.append((positions[next_up], owner))
            else:
                distances.append((positions[0] + total, owner))
        distances.sort()
        return PeerList(self._arrange((*(owner for _, owner in distances), *self._weightless)))


_circles: WeakValueDictionary[tuple[str, int, tuple[Peer, ...]], _Circle] = WeakValueDictionary()
"""The circles in use by some ring, by all that they follow from."""


def _fitting_unit(peers: tuple[Peer, ...], unit_bytes: int) -> int:
    """``unit_bytes`` if it gives a fitting number of points, otherwise one that does."""
    weights = [peer.weight_bytes for peer in peers if peer.weight_bytes]
    if not weights:
        return unit_bytes
    total = sum(weights)
    if unit_bytes:
        points_mean = total / (unit_bytes * len(weights))
        if POINTS_MEAN_MIN <= points_mean <= POINTS_MEAN_MAX:
            return unit_bytes
    return max(1, total // (POINTS_MEAN * len(weights)))


def _points_of(peer: Peer, unit_bytes: int) -> int:
    if peer.weight_bytes == 0:
        return 0
    return max(1, (peer.weight_bytes + unit_bytes // 2) // unit_bytes)


def _point_hashes(peer_id: str, count: int) -> list[int]:
    """``count`` positions of a peer; a smaller count gives a prefix of the same list."""
    hashes: list[int] = []
    for group in range(-(-count // 4)):
        digest = mmh3_128(f"{peer_id}-{group}".encode(), 0, True, False)
        hashes.extend((digest >> shift) & 0xFFFF_FFFF for shift in (0, 32, 64, 96))
    return hashes[:count]
