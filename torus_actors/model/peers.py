"""Peers, and the small algebra on ordered lists of their ids that rings and rebalancing use."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from torus_actors.errors import Invalid

WEIGHT_BYTES_MAX = 1 << 62
"""Largest weight of one peer; sums over a whole ring then still fit what msgpack can carry."""

NAME_LENGTH_MAX = 255
"""Longest zone or address, in characters: the longest host name that DNS allows."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A storage node as the ring knows it.

    Args:
        peer_id: the node's UUID in its canonical text form.
        weight_bytes: the capacity it offers; blocks are spread in proportion. A peer of weight 0
            is asked last, and given blocks only when no other is left.
        zone: name of its failure domain; a peer without one is a domain of its own.
        address: ``host:port`` under which other nodes reach it.

    Raises:
        Invalid: a field breaks one of these rules.
    """

    peer_id: str
    weight_bytes: int
    zone: str = ""
    address: str = ""

    def __post_init__(self) -> None:
        check_peer_id(self.peer_id)
        if type(self.weight_bytes) is not int or not 0 <= self.weight_bytes <= WEIGHT_BYTES_MAX:
            raise Invalid(f"peer {self.peer_id}: weight {self.weight_bytes!r} is out of range")
        for name, value in (("zone", self.zone), ("address", self.address)):
            if not isinstance(value, str) or len(value) > NAME_LENGTH_MAX:
                raise Invalid(
                    f"peer {self.peer_id}: {name} must be text of {NAME_LENGTH_MAX} characters or"
                    " fewer"
                )

    @property
    def failure_domain(self) -> str:
        """What fails together with this peer: its zone, or the peer alone."""
        return self.zone or self.peer_id


class PeerList(tuple[str, ...]):
    """An ordered list of distinct peer ids; the operations keep the order of the left side.

    It is a tuple, so it compares equal to one and can be shared without copying.
    """

    __slots__ = ()

    def has(self, peer_id: str) -> bool:
        """Whether the peer is listed."""
        return peer_id in self

    def index_at(self, peer_id: str) -> int:
        """Position of the peer, or -1, as Torus's ``IndexAt``."""
        return self.index(peer_id) if peer_id in self else -1

    def union(self, other: Iterable[str]) -> PeerList:
        """All of this list, then what only ``other`` has, each once."""
        return PeerList(dict.fromkeys((*self, *other)))

    def intersection(self, other: Iterable[str]) -> PeerList:
        """Those of this list that ``other`` has too."""
        wanted = frozenset(other)
        return PeerList(peer for peer in self if peer in wanted)

    def and_not(self, other: Iterable[str]) -> PeerList:
        """Those of this list that ``other`` does not have."""
        unwanted = frozenset(other)
        return PeerList(peer for peer in self if peer not in unwanted)


def check_peer_id(peer_id: object) -> str:
    """Return ``peer_id`` if it is a UUID in canonical text form.

    One form only: two spellings of one peer would otherwise count as two replicas.

    Raises:
        Invalid: it is not.
    """
    if isinstance(peer_id, str) and len(peer_id) == 36:
        try:
            if str(uuid.UUID(peer_id)) == peer_id:
                return peer_id
        except ValueError:
            pass
    raise Invalid(f"peer id {peer_id!r} is not a UUID in lower-case canonical form")
