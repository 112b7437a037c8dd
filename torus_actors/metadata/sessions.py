"""Metadata of a volume's session: lock, epoch, head, journal.

The lock keeps two clients from opening one volume, and hangs on a lease. The epoch is what makes it
safe: it only grows, hangs on nothing, and every commit compares it. A client that lost its lease
may go on until another attaches; from then on the store refuses all that it commits.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torus_actors.errors import CompareFailed, Fenced, Invalid, NotExist
from torus_actors.metadata import keys as table
from torus_actors.metadata.base import MetadataBase
from torus_actors.metadata.kv import Compare, Put
from torus_actors.metadata.records import Epoch, Head, Journal, Lock, Record, VolumeRecord
from torus_actors.metadata.volumes import held

R = TypeVar("R", bound=Record)


class SessionOperations(MetadataBase):
    """What the one client that has a volume open does."""

    async def attach(self, volume_id: int, holder: str, lease: int, nonce: str = "") -> int:
        """Open a volume: take its lock, under a new epoch that fences all earlier sessions.

        Args:
            volume_id: the volume.
            holder: who, for people: host and process.
            lease: the lock lives as long.
            nonce: of the lock; a call whose outcome is unknown may be repeated with the same one,
                and finds out what became of it.

        Returns:
            The epoch of the new session.

        Raises:
            Locked: somebody else has it; the text names them.
            NotExist: there is no such volume.
            LeaseNotFound: the lease has ended.
        """
        lock_key = self.keys.of(table.LOCK, volume_id)
        epoch_key = self.keys.of(table.EPOCH, volume_id)
        nonce = nonce or self.new_nonce()
        attempts = self._attempts("attach the volume")
        while True:
            await attempts.next()
            epoch, revision = await self._read(epoch_key, Epoch)
            if epoch is None:
                raise NotExist(f"there is no volume with id {volume_id}")
            lock, _ = await self._read(lock_key, Lock)
            if lock is not None:
                if lock.nonce == nonce:
                    return lock.epoch
                raise held(await self._name_of(volume_id), lock)
            mine_epoch = Epoch(epoch.epoch + 1)
            new = Lock(holder, mine_epoch.epoch, self._now(), nonce)

            async def mine(new: Lock = new) -> int | None:
                stored, at = await self._read(lock_key, Lock)
                return at if stored == new else None

            compare = [
                Compare(epoch_key, mod_revision=revision),
                Compare(lock_key, mod_revision=0),
            ]
            then = [Put(epoch_key, mine_epoch.encode()), Put(lock_key, new.encode(), lease)]
            if await self._settle(compare, then, mine) is not None:
                return new.epoch

    async def lock_status(self, volume_id: int) -> tuple[Lock | None, int]:
        """Who has the volume open, if anybody, and its newest epoch.

        Raises:
            NotExist: there is no such volume.
        """
        epoch, _ = await self._read(self.keys.of(table.EPOCH, volume_id), Epoch)
        if epoch is None:
            raise NotExist(f"there is no volume with id {volume_id}")
        lock, _ = await self._read(self.keys.of(table.LOCK, volume_id), Lock)
        return lock, epoch.epoch

    async def renew_lock(self, volume_id: int, epoch: int, holder: str, new_lease: int) -> None:
        """Hang the lock on another lease; make it again if the old lease took it along.

        Raises:
            Fenced: another session has begun since, or the volume is gone.
            LeaseNotFound: the new lease has ended.
        """
        key = self.keys.of(table.LOCK, volume_id)
        nonce = self.new_nonce()
        attempts = self._attempts("renew the volume's lock")
        while True:
            await attempts.next()
            lock, revision = await self._read(key, Lock)
            new = Lock(holder, epoch, self._now() if lock is None else lock.since, nonce)

            async def mine(new: Lock = new) -> int | None:
                stored, at = await self._read(key, Lock)
                return at if stored == new else None

            # These revisions too: else a renewal that was delayed on its way could bring back a
            # lock that has been given up.
            unchanged, touch = await self._touch(volume_id)
            compare = [
                self._in_session(volume_id, epoch),
                Compare(key, mod_revision=revision),
                *unchanged,
            ]
            # A lock that is made again fails others' attaches and deletes for good, or a late copy
            # of one would apply once it is gone with its lease.
            then = [Put(key, new.encode(), new_lease), *([] if lock else touch)]
            if await self._settle(compare, then, mine) is not None:
                return
            await self._check_epoch(volume_id, epoch)

    async def detach(self, volume_id: int, epoch: int) -> None:
        """Give up the lock; fine if it is gone already.

        Raises:
            Fenced: another session has begun since, or the volume is gone.
        """
        key = self.keys.of(table.LOCK, volume_id)

        async def fenced() -> int | None:
            return None

        # Its effect leaves the compare true, but twice is as good as once: while the epoch is ours
        # nobody else's lock can be there. The epoch is written anew as in `_touch`.
        compare = [self._in_session(volume_id, epoch)]
        touch = [Put(self.keys.of(table.EPOCH, volume_id), Epoch(epoch).encode())]
        if await self._settle_deletion(compare, key, touch, fenced) is None:
            await self._check_epoch(volume_id, epoch)

    async def head(self, volume_id: int) -> tuple[Head | None, int]:
        """The last committed version and its revision; None and 0 before the first commit."""
        return await self._read(self.keys.of(table.HEAD, volume_id), Head)

    async def commit_head(
        self,
        volume_id: int,
        epoch: int,
        expected_revision: int,
        head: Head,
        *,
        resized: int | None = None,
    ) -> int:
        """Make a checkpoint the volume's version. Repeating it after a lost answer is fine.

        Args:
            volume_id: the volume.
            epoch: the session's.
            expected_revision: of the head that this one replaces.
            head: with the session's epoch and an INode number of its own.
            resized: the volume's size from now on, in the same transaction; None leaves it.

        Returns:
            The new head's revision: expected by the next commit.

        Raises:
            Fenced: another session has begun since, or the volume is gone.
            CompareFailed: the head is another than expected, or the volume was resized meanwhile.
            OutcomeUnknown: the store did not come back in time to tell; commit the same again.
        """
        if head.epoch != epoch:
            raise Invalid(f"a head of epoch {head.epoch} in a session of epoch {epoch}")
        key = self.keys.of(table.HEAD, volume_id)
        if resized is None:
            return await self._commit(volume_id, epoch, expected_revision, key, head)
        volume_key = self.keys.of(table.VOLUME, volume_id)
        volume, at = await self._read(volume_key, VolumeRecord)
        if volume is None:
            raise Fenced("the volume was deleted while it was open")
        volume = dataclasses.replace(volume, size=resized)
        also = Compare(volume_key, mod_revision=at)
        resizing = Put(volume_key, volume.encode())
        return await self._commit(volume_id, epoch, expected_revision, key, head, also, resizing)

    async def journal(self, volume_id: int) -> tuple[Journal | None, int]:
        """Where the newest journal is, and the record's revision; None and 0 before the first."""
        return await self._read(self.keys.of(table.JOURNAL, volume_id), Journal)

    async def set_journal(
        self,
        volume_id: int,
        epoch: int,
        expected_revision: int,
        journal: Journal,
        *,
        ring_revision: int | None = None,
    ) -> int:
        """Name the journal's ensemble, or the ``end`` of an earlier session's journal.

        Arguments, result and errors are those of `commit_head`. A ``ring_revision`` is what the
        ring's record must have in the moment of the change; else it is a `CompareFailed`, too.
        """
        if journal.epoch > epoch or (journal.epoch < epoch and journal.end < 0):
            raise Invalid(f"a journal of epoch {journal.epoch} in a session of epoch {epoch}")
        key = self.keys.of(table.JOURNAL, volume_id)
        ring = (
            None if ring_revision is None else Compare(self.keys.ring, mod_revision=ring_revision)
        )
        return await self._commit(volume_id, epoch, expected_revision, key, journal, ring)

    async def _commit(
        self,
        volume_id: int,
        epoch: int,
        expected_revision: int,
        key: str,
        record: Record,
        also: Compare | None = None,
        *others: Put,
    ) -> int:
        async def mine() -> int | None:
            # Only this session writes records of its epoch, so an equal one is its own.
            stored = await self.store.get(key)
            same = stored is not None and stored.value == record.encode()
            return stored.mod_revision if stored is not None and same else None

        compare = [
            self._in_session(volume_id, epoch),
            Compare(key, mod_revision=expected_revision),
        ]
        if also is not None:
            compare.append(also)
        revision = await self._settle(compare, [Put(key, record.encode()), *others], mine)
        if revision is None:
            await self._check_epoch(volume_id, epoch)
            raise CompareFailed(f"{key} is no longer at revision {expected_revision}")
        return revision

    def _in_session(self, volume_id: int, epoch: int) -> Compare:
        return Compare(self.keys.of(table.EPOCH, volume_id), value=Epoch(epoch).encode())

    async def _check_epoch(self, volume_id: int, epoch: int) -> None:
        newest, _ = await self._read(self.keys.of(table.EPOCH, volume_id), Epoch)
        if newest is None:
            raise Fenced("the volume was deleted while it was open")
        if newest.epoch != epoch:
            raise Fenced(f"session {epoch} of the volume is over: session {newest.epoch} has begun")

    async def _name_of(self, volume_id: int) -> str:
        found, _ = await self._read(self.keys.of(table.VOLUME, volume_id), VolumeRecord)
        return str(volume_id) if found is None else found.name
