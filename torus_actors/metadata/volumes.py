"""Metadata of volumes: names, records, and what remains of the deleted."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import NamedTuple

from torus_actors.errors import (
    CompareFailed,
    Corruption,
    Exists,
    Invalid,
    Locked,
    NoGlobalMetadata,
    NotExist,
    OutOfSpace,
)
from torus_actors.metadata import keys as table
from torus_actors.metadata.base import MetadataBase, when
from torus_actors.metadata.kv import Compare, Delete, DeletePrefix, Operation, Put
from torus_actors.metadata.records import (
    Counter,
    Epoch,
    GlobalMetadata,
    Head,
    Lock,
    VolumeName,
    VolumeRecord,
    check_name,
)
from torus_actors.metadata.watching import Follow
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.model.inode_tree import NBLOCKS_MAX
from torus_actors.model.refs import VOLUME_ID_MAX


class Origin(NamedTuple):
    """What a clone was made of, as it was read.

    Attributes:
        volume_id: the volume that has the head.
        epoch: its newest; nobody had it open.
        head_revision: of its head; 0 for none.
    """

    volume_id: int
    epoch: int
    head_revision: int


class VolumeOperations(MetadataBase):
    """Volumes."""

    async def create_volume(
        self,
        name: str,
        size: int,
        kind: str = "block",
        *,
        head: Head | None = None,
        origin: Origin | None = None,
    ) -> VolumeRecord:
        """Make a volume.

        Args:
            name: 1 to 128 letters, digits, dots, dashes, underscores.
            size: bytes.
            kind: a registered volume kind.
            head: the first version, for a clone; without it the volume is all zeros.
            origin: whose head it is: it must still be, or its blocks may be gone. It must have that
                size, too, or the head may be of a larger or smaller volume.

        Raises:
            Exists: the name is taken.
            Invalid: the name is none, or no volume can be so large.
            CompareFailed: the origin was opened or changed meanwhile.
            Corruption: the counter of ids is behind those that were given out.
            NoGlobalMetadata: the cluster was never initialised.
            OutOfSpace: all 2^40 ids have been used.
        """
        await self._check_size(size)
        nonce = self.new_nonce()
        attempts = self._attempts(f"create volume {name}")
        while True:
            await attempts.next()
            counter, revision = await self._read(self.keys.volume_counter, Counter)
            if counter is None:
                raise NoGlobalMetadata("the cluster is not initialised: run torusctl init")
            if counter.last >= VOLUME_ID_MAX:
                raise OutOfSpace("all volume ids have been used")
            volume = VolumeRecord(counter.last + 1, name, kind, size, self._now(), nonce)
            if await self.store.get(self.keys.name(name)) is not None:
                raise Exists(f"volume {name} exists already")
            key = self.keys.of(table.VOLUME, volume.id)
            used = (key, self.keys.of(table.DELETED, volume.id))
            then = [
                Put(self.keys.volume_counter, Counter(volume.id).encode()),
                Put(self.keys.name(name), VolumeName(volume.id).encode()),
                Put(key, volume.encode()),
                Put(self.keys.of(table.MINT, volume.id), Counter(0).encode()),
                Put(self.keys.of(table.EPOCH, volume.id), Epoch(0).encode()),
            ]
            if head is not None:
                then.append(Put(self.keys.of(table.HEAD, volume.id), head.encode()))

            async def mine(key: str = key) -> int | None:
                stored, at = await self._read(key, VolumeRecord)
                return at if stored is not None and stored.nonce == nonce else None

            compare = [
                Compare(self.keys.volume_counter, mod_revision=revision),
                Compare(self.keys.name(name), mod_revision=0),
                *(Compare(each, mod_revision=0) for each in used),
            ]
            if origin is not None:
                compare += await self._is_still(origin, size)
            if await self._settle(compare, then, mine) is not None:
                return volume
            for each in used:
                if await self.store.get(each) is not None:
                    if (await self._read(self.keys.volume_counter, Counter))[1] != revision:
                        break  # by somebody who was faster
                    raise Corruption(
                        f"{self.keys.volume_counter} is {counter.last}, and there is {each}: "
                        "somebody has put it back; put it above all ids that were given out"
                    )

    async def _check_size(self, size: int) -> None:
        """Refuse what could never be opened; only what might be too large costs a question."""
        if size <= NBLOCKS_MAX * PAGE_SIZE:
            return  # so much can be had with the smallest blocks
        gmd, _ = await self._read(self.keys.global_, GlobalMetadata)
        if gmd is not None and size > NBLOCKS_MAX * gmd.block_size:
            raise Invalid(
                f"a volume of {size} bytes is not possible: with blocks of {gmd.block_size} bytes "
                f"it has at most {NBLOCKS_MAX * gmd.block_size}"
            )

    async def _is_still(self, origin: Origin, size: int) -> list[Compare]:
        """What must hold for a clone; raises CompareFailed if it does not now."""
        rows = table.HEAD, table.EPOCH, table.VOLUME
        head, epoch, record = (self.keys.of(each, origin.volume_id) for each in rows)
        newest, _ = await self._read(epoch, Epoch)
        _, revision = await self._read(head, Head)
        volume, at = await self._read(record, VolumeRecord)
        same = newest == Epoch(origin.epoch) and revision == origin.head_revision
        if newest is None or not same or volume is None or volume.size != size:
            raise CompareFailed("the volume was opened or changed while it was cloned: try again")
        return [
            Compare(epoch, value=newest.encode()),
            Compare(head, mod_revision=revision),
            Compare(record, mod_revision=at),
        ]

    async def volumes(self) -> list[VolumeRecord]:
        """All volumes, by id."""
        return await self._list(self.keys.under(table.VOLUME), VolumeRecord)

    def volumes_watch(self) -> AsyncIterator[list[VolumeRecord]]:
        """All volumes, by id: at present, then after every change."""
        return Follow(self.watch(self.keys.under(table.VOLUME)), VolumeRecord, list)

    async def volume(self, name: str) -> VolumeRecord:
        """The volume of that name.

        Raises:
            NotExist: there is none.
        """
        return (await self._volume(name))[0]

    async def volume_by_id(self, volume_id: int) -> VolumeRecord:
        """The volume with that id.

        Raises:
            NotExist: there is none, or no more.
        """
        found, _ = await self._read(self.keys.of(table.VOLUME, volume_id), VolumeRecord)
        if found is None:
            raise NotExist(f"there is no volume with id {volume_id}")
        return found

    async def resize_volume(self, name: str, size: int) -> VolumeRecord:
        """Record a larger size; whoever has the volume open sees it when they open it again.

        A smaller one is for a session to record, with a head that has nothing behind the end: by
        this alone what was cut off would come back when the volume grows again.

        Args:
            name: the volume.
            size: bytes; not less than it has.

        Raises:
            NotExist: there is no such volume.
            Invalid: it has more (``volume.resizing`` makes it smaller), or none can be so large.
        """
        await self._check_size(size)
        attempts = self._attempts(f"resize volume {name}")
        while True:
            await attempts.next()
            volume, revision = await self._volume(name)
            if size < volume.size:
                raise Invalid(f"volume {name} has {volume.size} bytes, more than {size}")
            resized = dataclasses.replace(volume, size=size)
            key = self.keys.of(table.VOLUME, volume.id)

            async def mine(key: str = key, resized: VolumeRecord = resized) -> int | None:
                stored, at = await self._read(key, VolumeRecord)
                return at if stored == resized else None

            compare = [Compare(key, mod_revision=revision)]
            if await self._settle(compare, [Put(key, resized.encode())], mine) is not None:
                return resized

    async def delete_volume(self, name: str) -> VolumeRecord:
        """Delete a volume with its snapshots; a marker for its blocks remains.

        Raises:
            NotExist: there is no such volume.
            Locked: somebody has it open.
        """
        attempts = self._attempts(f"delete volume {name}")
        while True:
            await attempts.next()
            volume, revision = await self._volume(name)
            lock_key = self.keys.of(table.LOCK, volume.id)
            # Before the lock: whoever attaches or detaches writes the epoch.
            unchanged, _ = await self._touch(volume.id)
            lock, _revision = await self._read(lock_key, Lock)
            if lock is not None:
                raise held(volume.name, lock)
            marker = self.keys.of(table.DELETED, volume.id)
            gone = (table.VOLUME, table.MINT, table.HEAD, table.EPOCH, table.JOURNAL)
            then: list[Operation] = [Delete(self.keys.of(row, volume.id)) for row in gone]
            then.append(Delete(self.keys.name(name)))
            then.append(DeletePrefix(self.keys.snapshots(volume.id)))
            then.append(Put(marker, volume.encode()))

            async def mine(marker: str = marker) -> int | None:
                return (await self._read(marker, VolumeRecord))[1] or None

            compare = [
                Compare(self.keys.of(table.VOLUME, volume.id), mod_revision=revision),
                Compare(lock_key, mod_revision=0),
                *unchanged,
            ]
            if await self._settle(compare, then, mine) is not None:
                return volume

    async def deleted_volumes(self) -> list[VolumeRecord]:
        """All volumes that were deleted, by id: nodes may still have blocks of them."""
        found = await self._in_pages(self.keys.under(table.DELETED))
        return [VolumeRecord.decode(item.value, item.key) for item in found]

    async def _volume(self, name: str) -> tuple[VolumeRecord, int]:
        check_name(name)
        named, _ = await self._read(self.keys.name(name), VolumeName)
        if named is not None:
            key = self.keys.of(table.VOLUME, named.id)
            volume, revision = await self._read(key, VolumeRecord)
            # Deleted between the two reads, or else they belong together.
            if volume is not None and volume.name != name:
                raise Corruption(f"{self.keys.name(name)} leads to volume {volume.name}")
            if volume is not None:
                return volume, revision
        raise NotExist(f"there is no volume {name}: torusctl volume list shows those there are")


def held(name: str, lock: Lock) -> Locked:
    """The error for a volume that is open elsewhere, naming who has it."""
    return Locked(
        f"volume {name} is held by {lock.holder} since {when(lock.since)}; "
        "detach it there, or wait until its lease ends"
    )
