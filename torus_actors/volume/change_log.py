"""What changed in a volume since it was last written to the journal, and the records made of it.

A record holds, for the writes since the last one, in this order: blocks that were put on the ring
and entered in the map, then extents that are in no block yet. Replaying all records after a head,
in order, over that head gives everything that was flushed. What is too much for one record is cut
into several at once, in that order; the first of them alone give a part of the writes that nobody
was told are durable, which is what a crash may leave of those in any case. What is in one page of
the volume is never in two of them: a crash leaves a sector as it was, or as it was written.

A block carries the number of the last record that was cut before its content was fixed. What older
records say of its place is in it, so a replay forgets that; what newer ones say lies over it. One
that has nothing but what records have told is not in any: a replay makes the same of those, and
until a head names it, its loss costs nothing but the work. So flushes need not wait for it.

A record may instead hold a head, for which the metadata was away when it was due. It has all that
the records up to the number in it say, so those need not be kept: that is how a journal stays small
however long the metadata is away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgpack

from torus_actors.errors import Corruption
from torus_actors.metadata.records import Head
from torus_actors.model.checksums import PAGE_SIZE, Buffer
from torus_actors.model.extents import ExtentMap
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

RECORD_BYTES = 1 << 20
"""Extents in one record, with what their places take. Enough for a disk to be busy with it, and so
little that even a slow network carries some of them in the time that a member has."""

RECORD_BLOCKS = 16 << 10
"""Blocks named in one record, which take less than a MiB. With the metadata away and no flush, any
number may have been put since the last one, and a member takes no record of more than some MiB."""

PLACE_BYTES = 16
"""What an extent takes beside its data, at most."""

ATOM_BYTES = PAGE_SIZE
"""A range of so many bytes, beginning at a multiple of them, is told by one record."""

_HEAD = struct.Struct("<4sI")
_MAGIC = b"TJr1"

LoggedBlock = tuple[int, BlockRef | None, int, int]
"""Position, ref (None: a hole), root checksum, number of the last record that it covers."""

LoggedExtent = tuple[int, int, int, Buffer | None]
"""Position, offset in the block, length, data (None: zeros)."""


class ChangeLog:
    """Collects changes of one volume; told of every change of its layers.

    Attributes:
        seq: number of the last record that was cut.
        needs_commit: something happened that records do not tell, such as a trim of a large range,
            or a record was cut and could not be stored; the next flush must commit.
        committing: a commit is under way whose head is to tell such things.
        recording: whether anything is collected.
        held: records were cut that are still to be handed to the journal.
    """

    def __init__(self) -> None:
        self.seq = 0
        self.needs_commit = False
        self.committing = False
        self.recording = False
        self.held = False
        self._extents: dict[int, ExtentMap] = {}
        self._frozen: dict[int, ExtentMap] = {}
        self._blocks: dict[int, tuple[BlockRef | None, int]] = {}
        self._in_map: dict[int, tuple[BlockRef | None, int]] = {}

    def start(self, seq: int = 0) -> None:
        """Begin to collect, with nothing to tell."""
        self.recording = True
        self.seq = seq
        self._extents.clear()
        self._frozen.clear()
        self._blocks.clear()

    # -- changes, as they happen -------------------------------------------------------------------

    def wrote(self, index: int, offset: int, data: Buffer | None, length: int) -> None:
        """Data, or zeros, came into the dirty layer of a block."""
        if not self.recording:
            return
        extents = self._extents.get(index)
        if extents is None:
            extents = self._extents[index] = ExtentMap()
        if data is None:
            extents.zero(offset, length)
        else:
            extents.write(offset, data)

    def froze(self, index: int) -> None:
        """The dirty layer of a block was fixed, to be put on the ring."""
        extents = self._extents.pop(index, None)
        if extents is not None:
            self._frozen[index] = extents

    def thawed(self, index: int) -> None:
        """The put failed: what was fixed is below what was written since."""
        extents = self._frozen.pop(index, None)
        if extents is not None:
            newer = self._extents.get(index)
            if newer is not None:
                extents.merge_from(newer)
            self._extents[index] = extents

    def settled(self, index: int, ref: BlockRef | None, root: int) -> None:
        """The fixed layer is in the map now, as a block or a hole."""
        if self._frozen.pop(index, None) is not None:
            self._blocks[index] = (ref, root)

    def dropped(self, first: int, last: int) -> None:
        """A range of blocks was trimmed at once, layers and all."""
        for table in (self._extents, self._frozen, self._blocks):
            for index in [i for i in table if first <= i < last]:
                del table[index]
        self.needs_commit = True

    # -- heads -------------------------------------------------------------------------------------

    def map_cut(self) -> int:
        """The map of blocks was cut for a head; returns the number of the last record before."""
        self._in_map = dict(self._blocks)
        return self.seq

    def in_head(self, before: int, seq: int) -> None:
        """That head is recorded: no record need name the blocks in it that none has named.

        Args:
            before: number of the last record that it covers.
            seq: what ``map_cut`` returned. If that is another, what was cut between is replayed
                over the head, and only a record that names a newer block keeps it from that.
        """
        if before == seq:
            for index, block in self._in_map.items():
                if self._blocks.get(index) is block:
                    del self._blocks[index]
        self._in_map = {}

    # -- records -----------------------------------------------------------------------------------

    @property
    def waits_for_head(self) -> bool:
        """Whether something happened that no record tells, and no head yet."""
        return self.needs_commit or self.committing

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self._extents or self._frozen or self._blocks)

    def refs(self) -> list[BlockRef]:
        """The blocks that the next record will name."""
        return [ref for ref, _ in self._blocks.values() if ref is not None]

    @property
    def fits_one_record(self) -> bool:
        """Whether ``cut`` would make one record."""
        return len(self._blocks) <= RECORD_BLOCKS and self.extent_bytes <= RECORD_BYTES

    @property
    def extent_bytes(self) -> int:
        """What the extents that were not told yet will take in records."""
        return sum(
            extents.data_bytes + PLACE_BYTES * len(extents)
            for table in (self._extents, self._frozen)
            for extents in table.values()
        )

    @property
    def extent_blocks(self) -> int:
        """How many blocks those extents are in."""
        return len(self._extents.keys() | self._frozen.keys())

    def cut(self) -> list[list[Buffer]]:
        """Make records of all that was not told, and count it as told.

        Returns:
            The buffers of each record, in the order of their numbers, of which ``seq`` is the last.
            One has extents of no more than ``RECORD_BYTES`` and an atom, and ``RECORD_BLOCKS``.
        """
        records: list[list[Buffer]] = []
        # No record was cut since their content was fixed: it would have told that instead.
        blocks = [
            [index, ref or b"", root, self.seq] for index, (ref, root) in self._blocks.items()
        ]
        while len(blocks) > RECORD_BLOCKS:
            records.append([self._begin_record(blocks[:RECORD_BLOCKS], [], None)])
            del blocks[:RECORD_BLOCKS]
        places: list[list[int]] = []
        data: list[Buffer] = []
        size = 0

        def tell(index: int, offset: int, length: int, buffer: Buffer | None) -> None:
            nonlocal size
            # A negative length is a run of zeros, for which nothing follows.
            places.append([index, offset, -length if buffer is None else length])
            size += PLACE_BYTES
            if buffer is not None:
                data.append(buffer)
                size += length

        for index, offset, length, buffer, atom in self._pieces():
            cost = PLACE_BYTES if buffer is None else PLACE_BYTES + length
            if places and size + cost > RECORD_BYTES:
                # Of an atom that this record has a part of, it gets the rest.
                rest = min(atom - offset, length)
                if rest > 0:
                    tell(index, offset, rest, _part(buffer, 0, rest))
                    if rest == length:
                        continue
                    offset, length, buffer = offset + rest, length - rest, _part(buffer, rest)
                records.append([self._begin_record(blocks, places, None), *data])
                blocks, places, data, size = [], [], [], 0
            tell(index, offset, length, buffer)
        records.append([self._begin_record(blocks, places, None), *data])
        self._blocks.clear()
        self._frozen.clear()
        self._extents.clear()
        return records

    def _pieces(self) -> Iterator[tuple[int, int, int, Buffer | None, int]]:
        """Extents that were not told, the older ones of a block first, none too long.

        With each comes where the atom ends that the one before it in the block ended in.
        """
        longest = max(RECORD_BYTES - PLACE_BYTES, ATOM_BYTES)
        step = longest // ATOM_BYTES * ATOM_BYTES
        for table in (self._frozen, self._extents):
            for index, extents in table.items():
                atom = 0
                for offset, length, buffer in extents.items():
                    end = offset + length
                    while buffer is not None and end - offset > longest:
                        stop = offset // ATOM_BYTES * ATOM_BYTES + step
                        yield index, offset, stop - offset, _part(buffer, 0, stop - offset), atom
                        offset, buffer, atom = stop, _part(buffer, stop - offset), 0
                    yield index, offset, end - offset, buffer, atom
                    atom = -(-end // ATOM_BYTES) * ATOM_BYTES

    def cut_head(self, head: Head) -> list[Buffer]:
        """Make a record of a head; what was not told yet stays for the next record."""
        return [self._begin_record([], [], head.encode())]

    def _begin_record(self, blocks: list[Any], places: list[Any], head: bytes | None) -> bytes:
        self.seq += 1
        return _packed(blocks, places, head)


def empty_record() -> list[Buffer]:
    """Makes a record that tells nothing, in place of one that was cut and never handed in."""
    return [_packed([], [], None)]


def _packed(blocks: list[Any], places: list[Any], head: bytes | None) -> bytes:
    packed: bytes = msgpack.packb([blocks, places, head])
    return _HEAD.pack(_MAGIC, len(packed)) + packed


def _part(buffer: Buffer | None, start: int, stop: int | None = None) -> Buffer | None:
    return None if buffer is None else memoryview(buffer)[start:stop]


def read_record(payload: Buffer) -> tuple[list[LoggedBlock], list[LoggedExtent], Head | None]:
    """Read a record.

    Args:
        payload: what ``cut`` or ``cut_head`` gave, in one buffer; extents are views of it.

    Raises:
        Corruption: it is none.
    """
    view = memoryview(payload)
    try:
        magic, size = _HEAD.unpack_from(view, 0)
        if magic != _MAGIC:
            raise ValueError("wrong magic")
        at = _HEAD.size + size
        packed_blocks, places, packed_head = msgpack.unpackb(view[_HEAD.size : at])
        head = None if packed_head is None else Head.decode(packed_head)
        blocks: list[LoggedBlock] = [
            (int(index), _ref(ref), int(root), int(after))
            for index, ref, root, after in packed_blocks
        ]
        extents: list[LoggedExtent] = []
        for index, offset, length in places:
            if length < 0:
                extents.append((index, offset, -length, None))
                continue
            if at + length > len(view):
                raise ValueError("cut short")
            extents.append((index, offset, length, view[at : at + length]))
            at += length
        if at != len(view):
            raise ValueError("bytes are left over")
    except (struct.error, ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corruption(f"a journal record cannot be read: {error}") from error
    return blocks, extents, head


def _ref(ref: bytes) -> BlockRef | None:
    if not ref:
        return None
    if len(ref) != BLOCK_REF_SIZE:
        raise ValueError("not a block ref")
    return BlockRef(ref)


class Replay:
    """What records add up to, over a head.

    A head's map may be newer than records that it does not cover: blocks that were entered while it
    was being written out are in it, and what those records name instead is older. From such records
    only extents are taken.

    Memory is bounded by what the session that wrote them held in its own: an extent that is written
    again, or that a block covers, is let go of, however long the journal has become.

    Args:
        map_seq: of the head; 0 if it is of another session.
        epoch: the session that wrote the records.
        covered: number of the last record that the head has.
        last: number of the last record there is.

    Attributes:
        head: replaces the head that the records are replayed over, if it is not None.
        blocks: by position, ref (None: a hole), root checksum, number of the record that names it.
        records: how many were taken in.
        certain: whether every member of the journal has these records and no others, so that
            another replay cannot end differently; also if there is no journal to be replayed.
    """

    def __init__(self, map_seq: int = 0, epoch: int = 0, covered: int = 0, last: int = 0) -> None:
        self._map_seq = map_seq
        self.epoch = epoch
        self.covered = covered
        self.last = last
        self.head: Head | None = None
        self.blocks: dict[int, tuple[BlockRef | None, int, int]] = {}
        self._extents: dict[int, dict[tuple[int, int], tuple[int, Buffer | None]]] = {}
        self.records = 0
        self.certain = True

    def add(self, seq: int, payload: Buffer) -> None:
        """Take in the next record.

        Raises:
            Corruption: it cannot be read.
        """
        blocks, extents, head = read_record(payload)
        if head is not None and seq > self._map_seq:  # or the one in the metadata is newer
            self._go_on_from(head)
        for index, ref, root, after in blocks:
            if seq > self._map_seq:
                self.blocks[index] = (ref, root, seq)
            older = self._extents.get(index, {})
            kept = {place: each for place, each in older.items() if each[0] > after}
            if kept:
                self._extents[index] = kept
            else:
                self._extents.pop(index, None)
        for index, offset, length, buffer in extents:
            if buffer is not None and length < len(payload):
                # A view would keep all that came in one answer.
                buffer = bytes(buffer)
            places = self._extents.setdefault(index, {})
            places.pop((offset, length), None)  # behind those that it may overlap
            places[offset, length] = (seq, buffer)
        self.records += 1

    def _go_on_from(self, head: Head) -> None:
        """Forget what is in a head."""
        self.head = head
        self.covered = head.journal_seq
        self._map_seq = head.map_seq
        self.blocks = {i: block for i, block in self.blocks.items() if block[2] > head.map_seq}
        newer = {
            index: {place: each for place, each in found.items() if each[0] > head.journal_seq}
            for index, found in self._extents.items()
        }
        self._extents = {index: found for index, found in newer.items() if found}

    @property
    def newest_inode(self) -> int:
        """The highest INode number of what the records name; 0 if they name nothing."""
        named = [ref.inode for ref, _, _ in self.blocks.values() if ref is not None]
        return max([*named, 0 if self.head is None else self.head.inode])

    def extents(self) -> Iterator[LoggedExtent]:
        """Writes to do over the blocks, in order."""
        for index, found in self._extents.items():
            for (offset, length), (_, buffer) in found.items():
                yield index, offset, length, buffer
