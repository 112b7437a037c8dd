"""The metadata service: what the cluster agrees on, as typed operations.

It is written once, over `kv.KeyValueStore`; the backends differ only below that. Where to read:
``cluster`` (global metadata, ring, peers), ``volumes``, ``mint`` (INode numbers), ``sessions``
(lock, epoch, head, journal), ``snapshots``, ``readers``, ``keys`` (the table of all keys), ``base``
(how a change survives a lost answer).
"""

from __future__ import annotations

from torus_actors.metadata.cluster import ClusterOperations
from torus_actors.metadata.mint import MintOperations
from torus_actors.metadata.readers import ReaderOperations
from torus_actors.metadata.snapshots import SnapshotOperations
from torus_actors.metadata.volumes import VolumeOperations


class MetadataService(
    ClusterOperations, VolumeOperations, MintOperations, SnapshotOperations, ReaderOperations
):
    """All metadata operations on one store; see `base.MetadataBase` for the arguments.

    Any method may raise `Again` (the store cannot be asked; nothing happened: see
    `patience.patiently`), `Corruption` (a stored record cannot be read) and `Closed`; one that
    changes something also `OutcomeUnknown`, after having asked for ``resolve_s`` seconds.
    """

    async def grant_lease(self, ttl_s: int) -> int:
        """Make a lease that ends ``ttl_s`` seconds after its last renewal."""
        return await self.store.lease_grant(ttl_s)

    async def renew_lease(self, lease: int) -> int:
        """Renew a lease; returns its TTL in seconds.

        Raises:
            LeaseNotFound: it has ended: get another, and register under it again.
        """
        return await self.store.lease_keepalive(lease)

    async def revoke_lease(self, lease: int) -> None:
        """End a lease, and with it the registration and the locks that hang on it.

        Raises:
            LeaseNotFound: it has ended already.
        """
        await self.store.lease_revoke(lease)
