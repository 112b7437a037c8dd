"""Metadata of snapshots: versions of a volume that are kept under a name.

A snapshot is made of a head. Of a volume in use that takes a word with its session, which has what
no head has yet: a request, under the lease of whoever asks, which the session answers by making the
snapshot in the same transaction that removes the request. Whoever dies on the way leaves nothing
behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from torus_actors.errors import Again, CompareFailed, Exists, NotExist, OutcomeUnknown
from torus_actors.metadata import keys as table
from torus_actors.metadata.kv import Compare, Delete, Operation, Put
from torus_actors.metadata.records import (
    Head,
    Snapshot,
    SnapshotRequest,
    VolumeRecord,
    check_name,
)
from torus_actors.metadata.sessions import SessionOperations
from torus_actors.metadata.watching import Follow


class SnapshotOperations(SessionOperations):
    """Snapshots and requests for them."""

    async def create_snapshot(
        self, volume_id: int, name: str, *, epoch: int | None = None
    ) -> Snapshot:
        """Keep the volume's present head under a name.

        Args:
            volume_id: the volume.
            name: of the snapshot.
            epoch: only if this still is the newest session; None for any.

        Raises:
            NotExist: there is no such volume.
            Exists: it has a snapshot of that name.
            CompareFailed: the head moved meanwhile, or a session began.
        """
        check_name(name)
        volume_key = self.keys.of(table.VOLUME, volume_id)
        head_key = self.keys.of(table.HEAD, volume_id)
        key = self.keys.snapshot(volume_id, name)
        volume, volume_revision = await self._read(volume_key, VolumeRecord)
        if volume is None:
            raise NotExist(f"there is no volume with id {volume_id}")
        head, head_revision = await self._read(head_key, Head)
        if (await self._read(key, Snapshot))[0] is not None:
            raise Exists(f"volume {volume.name} has a snapshot {name} already")
        encoded = b"" if head is None else head.encode()
        snapshot = Snapshot(volume_id, name, encoded, self._now(), self.new_nonce(), volume.size)

        async def mine() -> int | None:
            stored, at = await self._read(key, Snapshot)
            return at if stored == snapshot else None

        unchanged, _ = await self._touch(volume_id)
        compare = [
            Compare(volume_key, mod_revision=volume_revision),
            Compare(head_key, mod_revision=head_revision),
            Compare(key, mod_revision=0),
            *unchanged,
        ]
        if epoch is not None:
            compare.append(self._in_session(volume_id, epoch))
        if await self._settle(compare, [Put(key, snapshot.encode())], mine) is None:
            raise CompareFailed(f"the volume changed while snapshot {name} was made")
        return snapshot

    async def snapshot(self, volume_id: int, name: str) -> Snapshot:
        """One snapshot.

        Raises:
            NotExist: there is none of that name.
        """
        found, _ = await self._read(self.keys.snapshot(volume_id, name), Snapshot)
        if found is None:
            raise await self._no_snapshot(volume_id, name)
        return found

    async def _no_snapshot(self, volume_id: int, name: str) -> NotExist:
        volume, _ = await self._read(self.keys.of(table.VOLUME, volume_id), VolumeRecord)
        whose = "the volume" if volume is None else f"volume {volume.name}"
        return NotExist(
            f"{whose} has no snapshot {name}: torusctl snapshot list shows those there are"
        )

    async def snapshots(self, volume_id: int) -> list[Snapshot]:
        """A volume's snapshots, by name."""
        return await self._list(self.keys.snapshots(volume_id), Snapshot)

    async def delete_snapshot(self, volume_id: int, name: str) -> None:
        """Let a snapshot go.

        Raises:
            NotExist: there is none of that name.
        """
        key = self.keys.snapshot(volume_id, name)
        _, revision = await self._read(key, Snapshot)
        if not revision:
            raise await self._no_snapshot(volume_id, name)
        if not await self._delete(volume_id, key, revision, f"delete snapshot {name}"):
            raise CompareFailed(f"snapshot {name} was replaced meanwhile")

    async def request_snapshot(self, volume_id: int, name: str, lease: int) -> SnapshotRequest:
        """Ask the session that has the volume open for a snapshot.

        Args:
            volume_id: the volume.
            name: of the snapshot.
            lease: the request lives no longer.

        Raises:
            NotExist: there is no such volume.
            Exists: it has a snapshot of that name.
            Again: somebody else is asking for it just now.
            LeaseNotFound: the lease has ended.
        """
        check_name(name)
        volume_key = self.keys.of(table.VOLUME, volume_id)
        key = self.keys.snapshot_request(volume_id, name)
        request = SnapshotRequest(volume_id, name, lease, self._now(), self.new_nonce())

        async def mine() -> int | None:
            stored, at = await self._read(key, SnapshotRequest)
            return at if stored == request else None

        attempts = self._attempts(f"ask for snapshot {name}")
        while True:
            await attempts.next()
            volume, revision = await self._read(volume_key, VolumeRecord)
            if volume is None:
                raise NotExist(f"there is no volume with id {volume_id}")
            if (await self._read(self.keys.snapshot(volume_id, name), Snapshot))[0] is not None:
                raise Exists(f"volume {volume.name} has a snapshot {name} already")
            unchanged, _ = await self._touch(volume_id)
            compare = [
                Compare(volume_key, mod_revision=revision),
                Compare(self.keys.snapshot(volume_id, name), mod_revision=0),
                Compare(key, mod_revision=0),
                *unchanged,
            ]
            put = [Put(key, request.encode(), lease)]
            if await self._settle(compare, put, mine) is not None:
                return request
            if (await self._read(key, SnapshotRequest))[0] is not None:
                raise Again(f"somebody else is asking for snapshot {name} just now")

    async def snapshot_request(self, request: SnapshotRequest) -> SnapshotRequest | None:
        """What has become of a request; None if it is gone: look for the snapshot then."""
        key = self.keys.snapshot_request(request.volume_id, request.name)
        found, _ = await self._read(key, SnapshotRequest)
        return found if found is not None and found.nonce == request.nonce else None

    def snapshot_requests_watch(self) -> AsyncIterator[list[SnapshotRequest]]:
        """All requests: at present, then after every change."""
        watch = self.watch(self.keys.under(table.SNAPSHOT_REQUEST))
        return Follow(watch, SnapshotRequest, list)

    async def answer_request(
        self, request: SnapshotRequest, epoch: int, head_revision: int, size: int
    ) -> Snapshot:
        """Make the snapshot of the session's head that was asked for.

        Args:
            request: as it was read.
            epoch: of the session.
            head_revision: of the head that is to be kept; 0 for none.
            size: bytes of the volume, as the session has it.

        Raises:
            Fenced: another session has begun since, or the volume is gone.
            CompareFailed: the request is gone, the head is another, or the name is taken.
        """
        volume_id, name = request.volume_id, request.name
        head_key = self.keys.of(table.HEAD, volume_id)
        request_key = self.keys.snapshot_request(volume_id, name)
        key = self.keys.snapshot(volume_id, name)
        head, _ = await self._read(head_key, Head)
        encoded = b"" if head is None else head.encode()
        snapshot = Snapshot(volume_id, name, encoded, self._now(), request.nonce, size)

        async def mine() -> int | None:
            stored, at = await self._read(key, Snapshot)
            return at if stored == snapshot else None

        wanted = await self._revision_of(request_key, request)
        compare = [
            self._in_session(volume_id, epoch),
            Compare(head_key, mod_revision=head_revision),
            Compare(request_key, mod_revision=wanted),
            Compare(key, mod_revision=0),
        ]
        then: list[Operation] = [Put(key, snapshot.encode()), Delete(request_key)]
        if wanted is None or await self._settle(compare, then, mine) is None:
            await self._check_epoch(volume_id, epoch)
            raise CompareFailed(f"snapshot {name} is not wanted any more, or not of this head")
        return snapshot

    async def refuse_request(self, request: SnapshotRequest, error: str) -> None:
        """Say why a snapshot cannot be made; fine if nobody asks any more.

        Raises:
            LeaseNotFound: whoever asked is gone.
        """
        key = self.keys.snapshot_request(request.volume_id, request.name)
        refused = dataclasses.replace(request, error=error)
        revision = await self._revision_of(key, request)
        if revision is not None:
            await self.store.txn(
                [Compare(key, mod_revision=revision)], [Put(key, refused.encode(), request.lease)]
            )

    async def withdraw_request(self, request: SnapshotRequest) -> None:
        """Ask no longer; the snapshot may have been made before that."""
        key = self.keys.snapshot_request(request.volume_id, request.name)
        what = f"ask no longer for snapshot {request.name}"
        while True:
            present, revision = await self._read(key, SnapshotRequest)
            if present is None or present.nonce != request.nonce:
                return  # made, or another one
            # Not gone if it was refused just now, which is another record of the same request.
            if await self._delete(request.volume_id, key, revision, what):
                return

    async def restore_snapshot(
        self,
        volume: VolumeRecord,
        epoch: int,
        expected_revision: int,
        snapshot: Snapshot,
        head: Head,
    ) -> None:
        """Make a snapshot the volume's version again, and its size that of the volume.

        Args:
            volume: as it was read.
            epoch: of the session that does it.
            expected_revision: of the head that is replaced.
            snapshot: as it was read; it must still be there, or its blocks may be gone.
            head: the snapshot's, under the session's epoch and an INode number of its own.

        Raises:
            Fenced: another session has begun since, or the volume is gone.
            CompareFailed: the head, the volume's record or the snapshot is another by now.
            OutcomeUnknown: it may have been made, and another session has put its head there since.
        """
        head_key = self.keys.of(table.HEAD, volume.id)
        volume_key = self.keys.of(table.VOLUME, volume.id)
        snapshot_key = self.keys.snapshot(volume.id, snapshot.name)
        resized = dataclasses.replace(volume, size=snapshot.size or head.size)
        volume_revision = await self._revision_of(volume_key, volume)
        snapshot_revision = await self._revision_of(snapshot_key, snapshot)

        async def mine() -> int | None:
            stored, at = await self._read(head_key, Head)
            return at if stored == head else None

        compare = [
            self._in_session(volume.id, epoch),
            Compare(head_key, mod_revision=expected_revision),
            Compare(volume_key, mod_revision=volume_revision),
            Compare(snapshot_key, mod_revision=snapshot_revision),
        ]
        then = [Put(head_key, head.encode()), Put(volume_key, resized.encode())]
        same = volume_revision is not None and snapshot_revision is not None
        if not same or await self._settle(compare, then, mine) is None:
            _, head_at = await self._read(head_key, Head)
            present, at = await self._read(volume_key, VolumeRecord)
            # No other session writes the volume's record with its heads: where the answer was lost,
            # this may have been made before such a head came.
            if same and present and head_at != expected_revision and at != volume_revision:
                raise OutcomeUnknown(
                    f"volume {volume.name} may have gone back to snapshot {snapshot.name} before "
                    "another session began: look at what it has"
                )
            await self._check_epoch(volume.id, epoch)
            raise CompareFailed(f"the volume or its snapshot {snapshot.name} changed meanwhile")
