"""Changing the ring: read, derive the successor, compare-and-set, until it holds."""

from __future__ import annotations

import random
from collections.abc import Callable

from torus_actors.errors import Again, CompareFailed, OutcomeUnknown
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.peers import Peer


async def change_ring(
    meta: MetadataService,
    change: Callable[[rings.Ring], rings.Ring | None],
    rng: random.Random | None = None,
) -> rings.Ring:
    """Change the ring by compare-and-set, however many others change it too.

    Args:
        meta: the metadata service.
        change: makes the next ring of the present one, or None if nothing is to be done.
        rng: the jitter of the waits between attempts.

    Returns:
        The ring that holds now.
    """
    backoff = Backoff(rng or random.Random(), first_s=0.01)
    while True:
        data, _ = await meta.ring()
        present = rings.unmarshal(data)
        following = change(present)
        if following is None:
            return present
        try:
            await meta.set_ring(rings.marshal(following), following.version)
            return following
        except (CompareFailed, Again, OutcomeUnknown):
            await backoff.wait()


async def join_ring(
    meta: MetadataService, peer: Peer, rng: random.Random | None = None
) -> rings.Ring:
    """Add a peer to the ring, or bring its weight, zone and address up to date."""
    return await change_ring(
        meta, lambda ring: None if peer in ring.peers else ring.with_peer(peer), rng
    )


async def evict(
    meta: MetadataService, peer_id: str, version: int, witness: tuple[str, int]
) -> rings.Ring | None:
    """Take a member that is not registered out of the ring.

    Args:
        meta: the metadata service.
        peer_id: the member.
        version: of the ring on which that was decided.
        witness: the peer that saw it gone, and the revision of its own registration then. As long
            as that one stands it has not slept, and whoever asks again as it registers anew takes
            back what he asked for.

    Returns:
        The ring without it; None if the ring or the witness's registration is another by now, or
        the peer is registered.

    Raises:
        Again, OutcomeUnknown: the metadata cannot be reached.
    """
    data, _ = await meta.ring()
    present = rings.unmarshal(data)
    if present.version != version or peer_id not in present.members:
        return None
    following = present.without_peer(peer_id)
    try:
        await meta.set_ring(
            rings.marshal(following), following.version, absent=[peer_id], witnesses=[witness]
        )
    except CompareFailed:
        return None
    return following
