"""What every block store offers: the interface, and the records that go through it.

A store is used from two kinds of thread. The *owner* (the event loop) makes all calls that change
or consult the store's memory; they never wait. A *worker* makes the calls that touch the disk:
`write`, `read`, `check` and `FlushBatch.write`; they change no memory of the store, so the owner
goes on with other operations meanwhile. Hence each operation has phases:

    put     reserve -> write (worker) -> commit or abandon
    flush   begin_flush -> batch.write (worker) -> end_flush or fail_flush
    read    locate -> read_nowait; on None: pin -> read (worker) -> unpin
    delete  delete; the next flush makes it durable

A block is readable from commit to delete, and survives a power cut from the end of a flush that
began after its commit. Blocks are immutable: a second put of a ref does nothing.

Disk errors (`OSError`) are not translated, but for those of reads, which are `Corruption`: the
caller's answer to both is another replica. A store whose sync failed refuses all changes with
`Closed` until it is opened anew.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.checksums import PAGE_SIZE, Buffer, root_of, sums_of, sums_size
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef
from torus_actors.storage.disk import Disk

BLOCK_SIZE_MAX = 16 << 20
"""Largest block: a node keeps several in memory for each client, and each goes in one frame, with
its checksum list (PAYLOAD_MAX in wire/limits.py)."""

WARNING_PERCENT = 85
"""A store fuller than this says so, while there is still time to add a disk."""

Allocator = Callable[[int], memoryview]
"""Gives a writable buffer of so many bytes; called in the thread that reads."""


def new_buffer(size: int) -> memoryview:
    """The default allocator: a fresh buffer each time."""
    return memoryview(bytearray(size))


class Level(enum.Enum):
    """How full a store is."""

    OK = "ok"
    WARNING = "warning"
    FULL = "full"


class Location(NamedTuple):
    """Where a block lies. Good until the owner next gives up control, or while pinned."""

    slot: int
    length: int
    """Bytes of the block."""
    root: int
    """Its root checksum."""
    generation: int
    """Tells this use of the slot from an earlier one."""


class DirectRead(NamedTuple):
    """A range of a block, and where it is in a file opened past the page cache."""

    sums: bytes
    """Checksum list of the block."""
    fd: int
    offset: int
    """Bytes, a whole page."""
    memory: memoryview
    """Where to read to, whole pages."""


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A put under way: a slot that nobody else writes to."""

    ref: BlockRef
    root: int
    slot: int
    """-1 when the put has ended."""
    length: int = 0
    """Set by `BlockStore.write`; 0 until the data is written."""
    sums: bytes = b""
    """Likewise: the checksum list."""
    failed: bool = False
    """The write met an error of the medium, or may still be under way: the slot is not to be used
    again."""
    begun: bool = False
    """Set by `BlockStore.write` when it is called."""
    refused: bool = False
    """Likewise, when the only call has ended with an error: nothing is under way any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoreStats:
    """Blocks, by state. All but ``total`` and ``pending`` add up to ``total``."""

    total: int
    """Room for so many blocks."""
    used: int
    """Readable."""
    reserved: int
    """Puts under way."""
    limbo: int
    """Deleted; free after the next flush, or when nobody reads them any more."""
    quarantined: int
    """Set aside because of a bad copy, until the store is opened anew."""
    free: int
    pending: int
    """Changes of the index that the next flush will write."""


class FlushBatch(abc.ABC):
    """The changes that one flush makes durable."""

    @property
    @abc.abstractmethod
    def empty(self) -> bool:
        """Whether there is nothing to do: `write` would touch no disk."""

    @abc.abstractmethod
    def write(self) -> None:
        """Make the batch durable. In a worker.

        A second worker may be told to do what a first one, given up on, is still doing or has
        done: it finds out how that ended. Once the store has ended the flush, nothing is begun.

        Raises:
            OSError, OutOfSpace: the disk failed; then `BlockStore.fail_flush` is due.
            Invalid: the store has ended the flush without it.
        """


class BlockStore(abc.ABC):
    """Blocks of one node. See the top of the module for which thread may call what."""

    block_size: int
    """Largest block, bytes."""
    incarnation: int
    """Another number each time the store is opened; an mfile's grows."""
    incarnation_id: int
    """Tells this incarnation from all others, of this store and of any other one: a disk may have
    been replaced, and every store counts from 1. Below 2**63. A put under one and a flush under
    another prove nothing: what was not flushed may be gone."""

    @classmethod
    @abc.abstractmethod
    def open(
        cls,
        disk: Disk,
        *,
        block_size: int,
        size_bytes: int | None = None,
        rng: random.Random,
        allocate: Allocator = new_buffer,
    ) -> Self:
        """Open the store in a data directory, or make one. Blocks; before any other use.

        Args:
            disk: the data directory, locked by the caller.
            block_size: bytes, a multiple of 4096 up to 16 MiB.
            size_bytes: room on the disk it may take; None keeps that of an existing store.
            rng: makes the id of a new store.
            allocate: gives the buffers that reads fill.

        Raises:
            Invalid: another block size, too small, or shrunk below what is used.
            Corruption: the files are not a store's, or damaged.
            OutOfSpace: the disk has no room for it; nothing was changed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close without flushing; no worker may be using the store."""

    # Put.

    @abc.abstractmethod
    def reserve(self, ref: BlockRef, root: int, instead: Location | None = None) -> Ticket | None:
        """Begin a put.

        Args:
            ref: the block's name.
            root: its root checksum.
            instead: a bad copy of it, which counts as none; `mark_corrupt` is due before `commit`.

        Returns:
            A ticket for `write`; None if the block is stored already.

        Raises:
            Exists: the ref is stored with other content.
            OutOfSpace: no free slot; nothing was changed.
            Invalid: the zero ref.
            Closed: the store failed or was closed.
        """

    @abc.abstractmethod
    def write(self, ticket: Ticket, sums: Buffer, data: Buffer) -> None:
        """Write the block. In a worker.

        Args:
            ticket: from `reserve`; used once.
            sums: the block's checksum list.
            data: 1 to ``block_size`` bytes.

        Raises:
            Corruption: data, sums and root do not belong together; nothing was written.
            Invalid: wrong lengths, or the put has ended; nothing was written.
            OSError, OutOfSpace: the disk failed; `abandon` is due.
        """

    @abc.abstractmethod
    def commit(self, ticket: Ticket) -> bool:
        """Make a written block readable.

        Returns:
            False if another put of the same block was first; that one stays.

        Raises:
            Exists: another put was first, with other content. The ticket is used up.
            Invalid: it was not written. The ticket is used up.
        """

    @abc.abstractmethod
    def abandon(self, ticket: Ticket) -> None:
        """Give up a put. No write of it may be under way."""

    def put(self, ref: BlockRef, data: Buffer, sums: bytes | None = None) -> bool:
        """All phases of a put at once; blocks. For tools and tests.

        Returns:
            False if the block was there.
        """
        sums = sums_of(data) if sums is None else sums
        ticket = self.reserve(ref, root_of(sums))
        if ticket is None:
            return False
        try:
            self.write(ticket, sums, data)
        except Exception:
            self.abandon(ticket)
            raise
        return self.commit(ticket)

    # Flush.

    @abc.abstractmethod
    def begin_flush(self) -> FlushBatch:
        """Collect all that was committed and deleted until now.

        Raises:
            Overloaded: another flush is under way; begin when it has ended.
            Closed: the store failed or was closed.
        """

    @abc.abstractmethod
    def end_flush(self, batch: FlushBatch) -> None:
        """Take note that a batch is durable."""

    @abc.abstractmethod
    def fail_flush(self, batch: FlushBatch) -> None:
        """Take note that a batch failed: it is pending again, or the store has failed."""

    def flush(self) -> None:
        """All phases of a flush at once; blocks. For tools and tests."""
        batch = self.begin_flush()
        try:
            batch.write()
        except Exception:
            self.fail_flush(batch)
            raise
        self.end_flush(batch)

    # Delete.

    @abc.abstractmethod
    def delete(self, refs: Iterable[BlockRef]) -> int:
        """Make blocks unreadable at once; the next flush makes it durable.

        Returns:
            How many of them were there.
        """

    @abc.abstractmethod
    def mark_corrupt(self, ref: BlockRef, location: Location | None = None) -> bool:
        """Take a bad copy away, so that a good one can be put; its slot is set aside.

        Args:
            ref: the block.
            location: the copy that was found bad; None is whichever is there.

        Returns:
            False if that copy was gone already.
        """

    # Read.

    @abc.abstractmethod
    def locate(self, ref: BlockRef) -> Location:
        """Find a block.

        Raises:
            BlockNotExist: it is not there.
        """

    @abc.abstractmethod
    def pin(self, location: Location) -> None:
        """Keep a slot from being reused while it is read elsewhere.

        Raises:
            BlockNotExist: the block was deleted since it was located.
        """

    @abc.abstractmethod
    def unpin(self, location: Location) -> None:
        """End one `pin`."""

    @abc.abstractmethod
    def read_nowait(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview] | None:
        """Read from memory alone; by the owner, in one go with `locate`.

        Args:
            location: from `locate`.
            offset: bytes, a multiple of 4096.
            length: bytes, at least 1; ends on a multiple of 4096 or at the end of the block.
            want_sums: also give the block's checksum list.

        Returns:
            The checksum list (empty if not wanted) and a buffer that is the caller's; None if the
            disk is needed: pin, and `read` in a worker. The bytes are *not* verified.

        Raises:
            Invalid: a range that breaks the rules above.
            BlockNotExist: the block was deleted since it was located.
            Corruption: the medium cannot give the bytes.
        """

    @property
    @abc.abstractmethod
    def reads_direct(self) -> bool:
        """Whether `plan_direct` may have an answer."""

    @abc.abstractmethod
    def keep_sums(self, location: Location, sums: bytes) -> None:
        """Remember a block's checksum list, which a worker has read, for `plan_direct`.

        A list that is not the block's is passed over.
        """

    @abc.abstractmethod
    def plan_direct(self, location: Location, offset: int, length: int) -> DirectRead | None:
        """How to read a range without a thread, past the page cache; by the owner, while pinned.

        Returns:
            None if that cannot be done: `read` it in a worker.
        """

    @abc.abstractmethod
    def read(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview]:
        """Like `read_nowait`, but waits for the disk. In a worker, while pinned."""

    def get(self, ref: BlockRef) -> bytes:
        """A whole block, verified; blocks. For tools and tests.

        Raises:
            BlockNotExist: it is not there.
            Corruption: the copy is bad.
        """
        return bytes(self.check(self.locate(ref)))

    def check(self, location: Location, cached: bool = False) -> memoryview:
        """Read a whole block and verify every byte. In a worker, while pinned.

        Args:
            location: of the block.
            cached: read it as who reads it often does, not from the disk in any case.

        Raises:
            Corruption: the copy is bad.
        """
        sums, data = self.read(location, 0, location.length, True)
        check_block(sums, location.root, data)
        return data

    def verify(self, ref: BlockRef) -> None:
        """Verify one block; blocks. For tools and tests; a scrubber pins and uses `check`.

        Raises:
            BlockNotExist: it is not there.
            Corruption: the copy is bad.
        """
        self.check(self.locate(ref))

    # Look.

    @abc.abstractmethod
    def has(self, ref: BlockRef) -> bool:
        """Whether the block is readable."""

    def root_of(self, ref: BlockRef) -> int:
        """The root checksum of a block.

        Raises:
            BlockNotExist: it is not there.
        """
        return self.locate(ref).root

    @abc.abstractmethod
    def refs_from(self, slot: int, count: int) -> tuple[list[BlockRef], int | None]:
        """Readable blocks in slot order.

        Args:
            slot: where to go on; 0 is the start.
            count: at most so many.

        Returns:
            The refs, and the slot to go on from; None at the end.
        """

    @abc.abstractmethod
    def stats(self) -> StoreStats:
        """Counts."""

    @property
    @abc.abstractmethod
    def failure(self) -> str | None:
        """Why the store refuses changes; None while it does not."""

    def level(self) -> Level:
        """How full the store is."""
        stats = self.stats()
        if not stats.free:
            return Level.FULL
        if (stats.total - stats.free) * 100 > stats.total * WARNING_PERCENT:
            return Level.WARNING
        return Level.OK


def check_ref(ref: BlockRef) -> None:
    """Refuse what names no block.

    Raises:
        Invalid: not 24 bytes, or the zero ref.
    """
    if len(ref) != BLOCK_REF_SIZE or not any(ref):
        raise Invalid("the zero ref names no block")


def slot_of(ticket: Ticket) -> int:
    """The slot of a put under way.

    Raises:
        Invalid: it has ended, and the slot may be another block's: this is a worker that was given
            up on before its turn.
    """
    slot = ticket.slot
    if slot < 0:
        raise Invalid(f"the put of block {ticket.ref} has ended already")
    return slot


def check_block_size(block_size: int) -> None:
    """Refuse a block size that no store can have.

    Raises:
        Invalid: not a multiple of 4096 up to 16 MiB.
    """
    if not PAGE_SIZE <= block_size <= BLOCK_SIZE_MAX or block_size % PAGE_SIZE:
        raise Invalid(
            f"block size {block_size} is not a multiple of {PAGE_SIZE} up to {BLOCK_SIZE_MAX}"
        )


def check_range(length_of_block: int, offset: int, length: int) -> None:
    """Refuse a range that cannot be verified by whole pages.

    Raises:
        Invalid: outside the block, or not on page boundaries.
    """
    end = offset + length
    if length < 1 or offset < 0 or end > length_of_block:
        raise Invalid(f"bytes {offset} to {end} are not in a block of {length_of_block}")
    if offset % PAGE_SIZE or (end % PAGE_SIZE and end != length_of_block):
        raise Invalid(f"bytes {offset} to {end} are not whole pages of {PAGE_SIZE}")


def check_put(block_size: int, root: int, sums: Buffer, data: Buffer) -> None:
    """Refuse a put whose parts do not belong together: it would be found bad on every read.

    Raises:
        Invalid: wrong lengths.
        Corruption: wrong checksums.
    """
    if not 1 <= len(data) <= block_size:
        raise Invalid(f"a block has 1 to {block_size} bytes, not {len(data)}")
    if len(sums) != sums_size(len(data)):
        raise Invalid(f"a checksum list of {len(sums)} bytes is not for {len(data)} bytes of data")
    check_block(sums, root, data)


def check_block(sums: Buffer, root: int, data: Buffer) -> None:
    """Verify every byte of a whole block.

    Raises:
        Corruption: a checksum does not match.
    """
    if root_of(sums) != root:
        raise Corruption("checksum list does not match the block's checksum")
    if sums_of(data) != bytes(sums):
        raise Corruption("data does not match its checksum list")
