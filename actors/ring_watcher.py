"""The ring watcher: keeps this node's picture of the cluster.

Watches the ring and the registered peers in the metadata, keeps the ``ClusterView`` that other
actors read, and tells the bridge who is where. Messages out: ``set_peers`` to the bridge,
``view_changed`` to whoever asked by ``subscribe``. Its death, or that of the metadata store, costs
fresh news only: the last view stays in use.
"""

from __future__ import annotations

import asyncio
import logging

from torus_actors.errors import TorusError
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.blocksets import create_blockset
from torus_actors.model.rings import Ring
from torus_actors.runtime import LoopActor, expose

log = logging.getLogger(__name__)

KEPT_S = 60.0
"""How long a node whose registration ended is still reached where it was: whoever was cut off from
the metadata, or is started again, is registered anew long before."""

LARGE_RING = 12
"""From so many peers on, a ring is prepared beside the loop: that takes some 3 ms for each."""


class ClusterView:
    """The cluster as last seen; outlives the watcher that keeps it.

    Attributes:
        ring: the newest ring.
        peers: registered peers by id: those that hold a lease now.
        former: those whose registration ended less than ``KEPT_S`` ago, as it was.
        gmd: global metadata.
    """

    def __init__(self, gmd: GlobalMetadata, ring: Ring) -> None:
        self.gmd = gmd
        self.ring = ring
        self.peers: dict[str, PeerInfo] = {}
        self.former: dict[str, PeerInfo] = {}
        self._spec_replication = create_blockset(gmd.block_spec).replication or 0

    @property
    def block_size(self) -> int:
        """Bytes of a data block."""
        return self.gmd.block_size

    @property
    def replication(self) -> int:
        """Copies of data that are kept: as many as the ring says, or the block spec if more."""
        return max(self.ring.replication, self._spec_replication)

    @property
    def inode_replication(self) -> int:
        """Copies of INode blocks: never fewer than of the data they lead to."""
        return max(self.gmd.inode_replication, self.replication)

    def addresses(self) -> dict[str, str]:
        """Where to reach whom.

        Ring members stay known when their lease ran out: a lost lease may mean a lost metadata
        store, which must not stop I/O. So do, for a while, others: they may have blocks that they
        have not handed over yet.
        """
        known = {peer.peer_id: peer.address for peer in self.ring.peers if peer.address}
        known.update({peer_id: info.address for peer_id, info in self.former.items()})
        known.update({peer_id: info.address for peer_id, info in self.peers.items()})
        return known


class RingWatcher(LoopActor):
    """See the module."""

    def __init__(self, meta: MetadataService, view: ClusterView) -> None:
        super().__init__()
        self._meta = meta
        self._view = view

    async def setup(self) -> None:
        """Start watching; the first news are the present state."""
        self._announce()
        for info in self._view.former.values():
            self.spawn(self._forget(info))
        self.spawn(self._watch_ring())
        self.spawn(self._watch_peers())

    async def _watch_ring(self) -> None:
        async for data, _ in self._meta.ring_watch():
            try:
                ring = rings.unmarshal(data)
            except TorusError as error:
                log.error("the stored ring cannot be read, keeping the last one: %s", error)
                continue
            if ring.version != self._view.ring.version:
                log.info("ring version %d: %s", ring.version, ring.describe())
            if len(ring.peers) >= LARGE_RING:
                await asyncio.to_thread(ring.prepare)
            self._view.ring = ring
            self._announce()

    async def _watch_peers(self) -> None:
        async for peers in self._meta.peers_watch():
            present = {info.peer_id: info for info in peers}
            for peer_id, info in self._view.peers.items():
                if peer_id not in present:
                    self._view.former[peer_id] = info
                    self.spawn(self._forget(info))
            own = present.get(self.system.node_id)
            if own is not None:
                self.system.actor("heartbeat").registered.tell(own.incarnation, own.address)
            for peer_id in present:
                self._view.former.pop(peer_id, None)
            self._view.peers = present
            self._announce()

    async def _forget(self, info: PeerInfo) -> None:
        await asyncio.sleep(KEPT_S)
        if self._view.former.get(info.peer_id) is info:
            del self._view.former[info.peer_id]
            self._view.peers = dict(self._view.peers)  # whoever derived something from it looks
            self._announce()

    def _announce(self) -> None:
        self.system.actor("bridge").set_peers.tell(self._view.addresses())
        for name in self.system.heirlooms.setdefault("view_subscribers", {}):
            self.system.actor(name).view_changed.tell()

    @expose()
    def subscribe(self, actor: str) -> None:
        """Send ``view_changed`` to this actor whenever the ring or the peers change."""
        self.system.heirlooms.setdefault("view_subscribers", {})[actor] = True
