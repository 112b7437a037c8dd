"""Metadata of those who read a volume without its lock.

A reader has a version of the volume that may be replaced meanwhile, and what only that leads to
would be garbage. So it leaves a record of what it reads, under its lease; a collector takes that
for what is alive, as it does a snapshot.
"""

from __future__ import annotations

from torus_actors.errors import NotExist
from torus_actors.metadata import keys as table
from torus_actors.metadata.base import MetadataBase
from torus_actors.metadata.kv import Compare, Put
from torus_actors.metadata.records import Head, Reader, Snapshot

EVERYTHING = (1 << 63) - 1
"""No INode number is above it."""


class ReaderOperations(MetadataBase):
    """What somebody does who reads."""

    async def begin_reading(
        self, volume_id: int, holder: str, lease: int, nonce: str = ""
    ) -> tuple[Reader, int]:
        """Keep the volume's head, and all that is put from now on, for a reader.

        Args:
            volume_id: the volume.
            holder: who, for people: host and process.
            lease: the record lives as long.
            nonce: of the reader's record; if there is one already, that is replaced.

        Returns:
            The record, and the head's revision; 0 if there is none.

        Raises:
            LeaseNotFound: the lease has ended.
        """
        head_key = self.keys.of(table.HEAD, volume_id)
        nonce = nonce or self.new_nonce()
        attempts = self._attempts("read the volume")
        while True:
            await attempts.next()
            head, revision = await self._read(head_key, Head)
            encoded = b"" if head is None else head.encode()
            reader = Reader(volume_id, encoded, EVERYTHING, holder, self._now(), nonce)
            # Only while it is the head: what it leads to may be gone a moment later.
            if await self._put(reader, lease, Compare(head_key, mod_revision=revision)):
                return reader, revision

    async def begin_reading_snapshot(
        self, snapshot: Snapshot, holder: str, lease: int, nonce: str = ""
    ) -> Reader:
        """Keep what a snapshot leads to, also when that is deleted.

        Args:
            snapshot: as it was read.
            holder: who, for people: host and process.
            lease: the record lives as long.
            nonce: of the reader's record.

        Raises:
            NotExist: it is gone.
            LeaseNotFound: the lease has ended.
        """
        key = self.keys.snapshot(snapshot.volume_id, snapshot.name)
        nonce = nonce or self.new_nonce()
        reader = Reader(snapshot.volume_id, snapshot.head, 0, holder, self._now(), nonce)
        attempts = self._attempts("read the snapshot")
        while True:
            await attempts.next()
            revision = await self._revision_of(key, snapshot)
            if revision is None:
                raise NotExist(f"there is no snapshot {snapshot.name} of the volume any more")
            if await self._put(reader, lease, Compare(key, mod_revision=revision)):
                return reader

    async def keep_reading(self, reader: Reader, lease: int) -> None:
        """Put a reader's record, changed or under another lease.

        Raises:
            LeaseNotFound: the lease has ended.
        """
        attempts = self._attempts("keep what is read")
        while True:
            await attempts.next()
            if await self._put(reader, lease):
                return

    async def end_reading(self, volume_id: int, nonce: str) -> None:
        """Keep nothing for a reader any more; fine if its record is gone, or was never there."""
        key = self.keys.reader(volume_id, nonce)
        await self._delete(volume_id, key, 0, "keep no longer what is read")

    async def _put(self, reader: Reader, lease: int, *compare: Compare) -> bool:
        """Whether the record is there now."""
        key = self.keys.reader(reader.volume_id, reader.nonce)
        _, revision = await self._read(key, Reader)

        async def mine() -> int | None:
            stored, at = await self._read(key, Reader)
            return at if stored == reader else None

        # These revisions too: else one that was delayed on its way could hang it on an old lease,
        # or bring it back.
        unchanged, _ = await self._touch(reader.volume_id)
        compares = [*compare, Compare(key, mod_revision=revision), *unchanged]
        return await self._settle(compares, [Put(key, reader.encode(), lease)], mine) is not None
