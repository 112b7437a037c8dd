"""The block store of a node: a preallocated file of slots, and an index file.

Why no power cut can lose a flushed block or expose a wrong one (layout: storage/index.py; decision:
docs/decisions/0002-block-store-format.md):

1. Data before index. An entry is written only after the `fdatasync` that covers its data.
2. A slot is written to only while the index on the disk holds no entry for it: a deleted block's
   slot waits in limbo until a flush has made the zeroed entry durable.
3. An entry that is torn, of another store, or in the wrong place counts as absent.
4. What an unclean stop left in the index is written again and synced before it is relied on: it may
   be in the page cache only, after a kill or a failed sync.
5. After a failed sync no further flush is attempted: the kernel would report success for lost
   pages.
"""

# ruff: noqa: D102 - what overrides a method of the interface is documented there

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self

from torus_actors.errors import (
    BlockNotExist,
    Closed,
    Corruption,
    Exists,
    Invalid,
    OutOfSpace,
    Overloaded,
    TorusError,
)
from torus_actors.model.buffers import BufferPool, aligned
from torus_actors.model.checksums import PAGE_SIZE, Buffer, root_of, sums_size
from torus_actors.model.refs import BlockRef
from torus_actors.storage import slots as states
from torus_actors.storage.disk import DIRECT_READ_MIN, Disk, File, WriteBuffer
from torus_actors.storage.index import (
    ENTRIES_OFFSET,
    ENTRY_SIZE,
    ZERO_ENTRY,
    Layout,
    entry_seed,
    pack_entry,
)
from torus_actors.storage.mfile_open import Opened, open_files
from torus_actors.storage.slots import SlotTable
from torus_actors.storage.step import Step
from torus_actors.storage.store import (
    Allocator,
    BlockStore,
    DirectRead,
    FlushBatch,
    Location,
    StoreStats,
    Ticket,
    check_block,
    check_put,
    check_range,
    check_ref,
    new_buffer,
    slot_of,
)

SUMS_KEPT_MAX = 8192
"""Checksum lists kept in memory for random reads: 4 MiB for blocks of 512 KiB."""

PAGES_BYTES_MAX = 4 << 20
"""Idle memory that is kept for small reads past the page cache."""

PAGE_NUMBER_BITS = 13
"""The largest block has 4,096 pages, and one number more stands for all of it."""

WHOLE = 1 << 12

SEEN_MAX = 32768
"""Reads remembered, to tell what is read again: 3 MiB. Only that goes into the page cache."""

SET_ASIDE_MIN = 8
SET_ASIDE_PART = 16
"""Slots that could not be written to are set aside until there are so many, or they are such a part
of the store."""

KEPT_MAX = 65536
"""Blocks remembered that went there whole: 6 MiB, for 32 GiB of the default size."""


class MFileBatch(Step, FlushBatch):
    """One flush of an `MFileStore`, done once: its slots may be other blocks' when it has ended.

    Args:
        lock: of the store.
        data: the data file.
        index: the index file.
        puts: slot to index entry, of blocks whose data is written.
        zeros: slots whose entries are to be zeroed.
        replaced: likewise, of bad copies: when the entries of those in their places are durable.
        lost: what the store's syncs failed with. After one did, none is tried any more, in this
            batch or a later one: the kernel reports success for pages that it has let go of.
    """

    def __init__(
        self,
        lock: threading.Lock,
        data: File,
        index: File,
        puts: dict[int, bytes],
        zeros: frozenset[int],
        replaced: frozenset[int],
        lost: list[str],
    ) -> None:
        super().__init__(lock)
        self._data = data
        self._index = index
        self.puts = puts
        self.zeros = zeros
        self.replaced = replaced
        self._lost = lost

    @property
    def empty(self) -> bool:
        return not (self.puts or self.zeros or self.replaced)

    def write(self) -> None:
        self.run()

    def _work(self) -> None:
        if self.empty:
            return
        if self.puts:
            self.sync_data()
        self.write_index()
        self.sync_index()
        if self.replaced:
            # What of them is right may be so nowhere else, should the power go in between.
            self._write(dict.fromkeys(self.replaced, ZERO_ENTRY))
            self.sync_index()

    def sync_data(self) -> None:
        """Make the blocks durable: before any entry names them."""
        self._sync(self._data)

    def write_index(self) -> None:
        """Write the entries of what is new and of what was deleted."""
        self._write(dict.fromkeys(self.zeros, ZERO_ENTRY) | self.puts)

    def _write(self, entries: dict[int, bytes]) -> None:
        """Write entries, neighbours together."""
        run: list[bytes] = []
        start = 0
        for slot in sorted(entries):
            if slot != start + len(run):
                self._write_run(start, run)
                run, start = [], slot
            run.append(entries[slot])
        self._write_run(start, run)

    def sync_index(self) -> None:
        """Make the entries durable."""
        self._sync(self._index)

    def _write_run(self, start: int, run: list[bytes]) -> None:
        if run:
            self._index.pwrite(b"".join(run), ENTRIES_OFFSET + start * ENTRY_SIZE)

    def _sync(self, file: File) -> None:
        if self._lost:
            raise OSError(errno.EIO, self._lost[0])
        try:
            file.fdatasync()
        except (OSError, TorusError) as error:
            self._lost.append(str(error))
            raise


class MFileStore(BlockStore):
    """A block store in two files of a data directory; made by `open`."""

    batch_class: type[MFileBatch] = MFileBatch

    def __init__(self, opened: Opened, allocate: Allocator) -> None:
        self._data = opened.data
        self._index = opened.index
        self._header = opened.header
        self._table: SlotTable = opened.table
        self.damaged_entries = opened.damaged
        """Index entries found torn or rotten at opening: at most so many blocks are missing."""
        self.block_size = opened.header.block_size
        self.incarnation = opened.header.incarnation
        self.incarnation_id = opened.header.incarnation_id
        self._layout = Layout(self.block_size)
        self._direct = self._data.direct_fd >= 0
        self._seed = entry_seed(opened.header.store_id)
        self._generation = opened.generation
        self._allocate = allocate
        self._puts: dict[int, bytes] = {}
        """Committed, to be entered by the next flush."""
        self._zeros: set[int] = set()
        """Deleted, to be zeroed by the next flush."""
        self._replaced: set[int] = set()
        """Bad copies, to be zeroed by the next flush when all else in it is durable."""
        self._touched: set[int] = set()
        """Slots of `_puts` whose entry a failed flush may have written already."""
        self._in_flight: MFileBatch | None = None
        self._flushing = threading.Lock()
        """Held by the worker that writes a batch."""
        self._unsynced = False
        """A failed flush may have written entries that no sync has covered since."""
        self._pins: dict[int, int] = {}
        self._failure: str | None = None
        self._lost: list[str] = []
        self._sums: dict[int, tuple[int, bytes]] = {}
        """Generation and checksum list of slots written or read in part, the oldest first."""
        self._pages = BufferPool(PAGES_BYTES_MAX)
        self._seen: dict[int, None] = {}
        """Generation and page of reads, the oldest first."""
        self._kept: dict[int, None] = {}
        """Generations of blocks that were read whole more than once, the oldest first."""
        self._edges: list[memoryview] = []
        """Memory for what stands around a block in its slot: one for each thread that writes."""

    @classmethod
    def open(
        cls,
        disk: Disk,
        *,
        block_size: int,
        size_bytes: int | None = None,
        rng: random.Random,
        allocate: Allocator = new_buffer,
    ) -> Self:
        return cls(open_files(disk, block_size, size_bytes, rng), allocate)

    def close(self) -> None:
        settled = self._failure is None and self._in_flight is None and not self._unsynced
        self._failure = self._failure or "closed"
        with contextlib.closing(self._data), contextlib.closing(self._index):
            if settled:
                self._header.successor(clean=True).write(self._index)

    # Put.

    def reserve(self, ref: BlockRef, root: int, instead: Location | None = None) -> Ticket | None:
        self._check_usable()
        check_ref(ref)
        table = self._table
        slot = table.find(ref)
        if slot >= 0 and self.locate(ref) != instead:
            self._check_same(ref, slot, root)
            return None
        slot = table.lowest_free()
        if slot < 0:
            counts = table.counts
            raise OutOfSpace(
                f"block store is full: {counts[states.STORED]} of {table.slots} blocks used, "
                f"{counts[states.LIMBO]} free after the next flush"
            )
        table.set_state(slot, states.RESERVED)
        return Ticket(ref, root, slot)

    def write(self, ticket: Ticket, sums: Buffer, data: Buffer) -> None:
        # First: who gives the ticket up takes its slot away, and looks at this then.
        again, ticket.begun = ticket.begun, True
        slot = slot_of(ticket)
        check_put(self.block_size, ticket.root, sums, data)
        # Whole pages, so that the kernel need not read what is around them, nor copy anything.
        view = memoryview(data)
        whole = len(view) - len(view) % PAGE_SIZE
        room = self._layout.sums_room
        edges = self._edges.pop() if self._edges else aligned(room + PAGE_SIZE)
        edges[:] = bytes(sums).ljust(room, b"\0") + bytes(view[whole:]).ljust(PAGE_SIZE, b"\0")
        buffers = [edges[:room], view[:whole]]
        if whole < len(view):
            buffers.append(edges[room:])
        try:
            self._data.pwritev(buffers, self._layout.slot_offset(slot))
        except OSError:
            ticket.failed = True
            ticket.refused = not again
            raise
        # Not after a failure: the write may still be going on somewhere.
        self._edges.append(edges)
        # An earlier call, of a worker that died, may have failed; this one came after its end.
        ticket.failed = ticket.refused = False
        ticket.length = len(data)
        ticket.sums = bytes(sums)

    def commit(self, ticket: Ticket) -> bool:
        if not ticket.length or ticket.failed:
            self.abandon(ticket)
            raise Invalid(f"block {ticket.ref} was not written")
        slot = self._use_up(ticket)
        table = self._table
        first = table.find(ticket.ref)
        if first >= 0:
            # Nothing on the disk names this slot yet, so it can be used again at once.
            table.set_state(slot, states.FREE)
            self._check_same(ticket.ref, first, ticket.root)
            return False
        self._generation += 1
        table.insert(slot, ticket.ref, ticket.root, ticket.length, self._generation)
        if self._direct:
            self.keep_sums(self.locate(ticket.ref), ticket.sums)
        self._puts[slot] = pack_entry(
            ticket.ref, ticket.root, ticket.length, self._generation, slot, self._seed
        )
        return True

    def abandon(self, ticket: Ticket) -> None:
        slot = self._use_up(ticket)
        table = self._table
        # One place that cannot be written to is set aside, and so are some. A disk that refuses all
        # writes would be taken for a full one, and stay so when it is well again.
        many = table.counts[states.QUARANTINED] >= max(SET_ASIDE_MIN, table.slots // SET_ASIDE_PART)
        aside = ticket.failed and ticket.begun and not (ticket.refused and many)
        table.set_state(slot, states.QUARANTINED if aside else states.FREE)

    # Flush.

    def begin_flush(self) -> MFileBatch:
        self._check_usable()
        if self._in_flight is not None:
            # Two at once could write the entries of one slot in the wrong order.
            raise Overloaded("a flush of the block store is under way")
        zeros, replaced = frozenset(self._zeros), frozenset(self._replaced)
        batch = self.batch_class(
            self._flushing, self._data, self._index, self._puts, zeros, replaced, self._lost
        )
        self._in_flight = batch
        self._puts = {}
        self._zeros = set()
        self._replaced = set()
        return batch

    def end_flush(self, batch: FlushBatch) -> None:
        batch = self._landed(batch)
        if not batch.empty:
            self._unsynced = False
        self._touched.difference_update(batch.puts)
        for slot in batch.zeros:
            if self._table.state(slot) == states.LIMBO:
                self._release(slot)

    def fail_flush(self, batch: FlushBatch) -> None:
        batch = self._landed(batch)
        for slot, entry in batch.puts.items():
            # A block deleted meanwhile waits to be zeroed; its entry must not come back.
            if slot not in self._zeros and slot not in self._replaced:
                self._puts[slot] = entry
                self._touched.add(slot)
        self._zeros |= batch.zeros
        self._replaced |= batch.replaced
        self._unsynced = True
        if self._lost:
            self._failure = f"failed ({self._lost[0]}); open it again"

    # Delete.

    def delete(self, refs: Iterable[BlockRef]) -> int:
        self._check_usable()
        count = 0
        for ref in refs:
            slot = self._table.find(ref)
            if slot >= 0:
                self._drop(slot, states.LIMBO)
                count += 1
        return count

    def mark_corrupt(self, ref: BlockRef, location: Location | None = None) -> bool:
        slot = self._table.find(ref)
        if slot < 0 or (location is not None and location != self.locate(ref)):
            return False
        self._drop(slot, states.QUARANTINED)
        return True

    # Read.

    def locate(self, ref: BlockRef) -> Location:
        table = self._table
        slot = table.find(ref)
        if slot < 0:
            raise BlockNotExist(f"block {ref} is not stored here")
        return Location(slot, table.lengths[slot], table.roots[slot], table.generations[slot])

    def pin(self, location: Location) -> None:
        self._check_current(location)
        self._pins[location.slot] = self._pins.get(location.slot, 0) + 1

    def unpin(self, location: Location) -> None:
        slot = location.slot
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot]
            if self._table.state(slot) == states.DRAINING:
                self._release(slot)

    def read_nowait(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview] | None:
        self._check_current(location)
        check_range(location.length, offset, length)
        if self._direct and not self._may_be_cached(location, offset, length):
            # Looking there would have the kernel begin to read it.
            return None
        known = self._known_sums(location) if want_sums and offset else None
        if known is not None:
            # Random reads come back to the same blocks: their lists are small, and kept.
            found = self._read(self._data.preadv_nowait, location, offset, length, False)
            return None if found is None else (known, found[1])
        found = self._read(self._data.preadv_nowait, location, offset, length, want_sums)
        if found is not None and want_sums and length < location.length:
            self.keep_sums(location, found[0])
        return found

    def _may_be_cached(self, location: Location, offset: int, length: int) -> bool:
        """Whether a range may be in the page cache, or is worth to be: it was read before."""
        generation = location.generation
        if generation in self._kept:
            return True
        whole = length >= DIRECT_READ_MIN
        key = generation << PAGE_NUMBER_BITS | (WHOLE if whole else offset // PAGE_SIZE)
        if key not in self._seen:
            _remember(self._seen, key, SEEN_MAX)
            return False
        if whole:
            _remember(self._kept, generation, KEPT_MAX)
        return True

    def _known_sums(self, location: Location) -> bytes | None:
        known = self._sums.get(location.slot)
        return known[1] if known is not None and known[0] == location.generation else None

    def keep_sums(self, location: Location, sums: bytes) -> None:
        # A list that was read wrong once must not stand in for the right one from then on. What is
        # kept already was verified when it came.
        if self._known_sums(location) is not None or root_of(sums) != location.root:
            return
        if len(self._sums) >= SUMS_KEPT_MAX and location.slot not in self._sums:
            del self._sums[next(iter(self._sums))]
        self._sums[location.slot] = (location.generation, sums)

    @property
    def reads_direct(self) -> bool:
        return self._direct

    def plan_direct(self, location: Location, offset: int, length: int) -> DirectRead | None:
        check_range(location.length, offset, length)
        fd = self._data.direct_fd
        known = self._known_sums(location)
        if fd < 0 or known is None:
            return None
        # The room of a block is whole pages, though it may be shorter.
        memory = self._pages.take(-(-length // PAGE_SIZE) * PAGE_SIZE)
        start = self._layout.slot_offset(location.slot) + self._layout.sums_room + offset
        return DirectRead(known, fd, start, memory)

    def read(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview]:
        preadv = self._data.preadv
        if location.generation in self._kept:
            preadv = partial(preadv, keep=True)
        result = self._read(preadv, location, offset, length, want_sums)
        if result is None:
            raise Corruption(f"slot {location.slot}: the data file ends before it")
        return result

    def check(self, location: Location, cached: bool = False) -> memoryview:
        # From the disk itself. What the page cache has is right for as long as it stays there, and
        # nobody would hear that the disk has it no more: neither the scrubber, nor who drops a copy
        # of his own because of this one.
        room, length = self._layout.sums_room, location.length
        both = self._pages.take(room + -(-length // PAGE_SIZE) * PAGE_SIZE)
        try:
            start = self._layout.slot_offset(location.slot)
            if cached:
                count = self._data.preadv([both], start, keep=True)
            else:
                count = self._data.read_medium(both, start)
        except OSError as error:
            raise Corruption(f"slot {location.slot} cannot be read: {error}") from error
        if count < len(both):
            raise Corruption(f"slot {location.slot}: the data file ends before it")
        data = both[room : room + length]
        check_block(both[: sums_size(length)], location.root, data)
        return data

    # Look.

    def has(self, ref: BlockRef) -> bool:
        return self._table.find(ref) >= 0

    def refs_from(self, slot: int, count: int) -> tuple[list[BlockRef], int | None]:
        refs: list[BlockRef] = []
        for at, ref in self._table.stored_from(slot):
            if len(refs) == count:
                return refs, at
            refs.append(ref)
        return refs, None

    def stats(self) -> StoreStats:
        free, reserved, stored, limbo, draining, quarantined = self._table.counts
        return StoreStats(
            total=self._table.slots,
            used=stored,
            reserved=reserved,
            limbo=limbo + draining,
            quarantined=quarantined,
            free=free,
            pending=len(self._puts) + len(self._zeros) + len(self._replaced),
        )

    @property
    def failure(self) -> str | None:
        return self._failure

    # Inside.

    def _read(
        self,
        preadv: Callable[[Sequence[WriteBuffer], int], int | None],
        location: Location,
        offset: int,
        length: int,
        want_sums: bool,
    ) -> tuple[bytes, memoryview] | None:
        """None when fewer bytes came than asked for."""
        check_range(location.length, offset, length)
        start = self._layout.slot_offset(location.slot)
        room = self._layout.sums_room
        try:
            if not want_sums:
                data = self._allocate(length)
                whole = preadv([data], start + room + offset) == length
                return (b"", data) if whole else None
            if offset == 0:
                # The list and the block lie together: one call fetches both.
                both = self._allocate(room + length)
                if preadv([both], start) != room + length:
                    return None
                return bytes(both[: sums_size(location.length)]), both[room:]
            sums = bytearray(sums_size(location.length))
            data = self._allocate(length)
            whole = (
                preadv([sums], start) == len(sums)
                and preadv([data], start + room + offset) == length
            )
            return (bytes(sums), data) if whole else None
        except OSError as error:
            raise Corruption(f"slot {location.slot} cannot be read: {error}") from error

    def _drop(self, slot: int, state: int) -> None:
        """Make a block unreadable; its slot goes to LIMBO or QUARANTINED."""
        self._table.remove(slot, state)
        if self._puts.pop(slot, None) is not None and slot not in self._touched:
            # Its entry was never written: there is nothing to zero.
            if state == states.LIMBO:
                self._release(slot)
            return
        self._touched.discard(slot)
        (self._zeros if state == states.LIMBO else self._replaced).add(slot)

    def _release(self, slot: int) -> None:
        """Let a slot be used again that nothing on the disk names, once nobody reads it."""
        self._table.set_state(slot, states.DRAINING if slot in self._pins else states.FREE)

    def _use_up(self, ticket: Ticket) -> int:
        slot = slot_of(ticket)
        ticket.slot = -1
        return slot

    def _landed(self, batch: FlushBatch) -> MFileBatch:
        if self._in_flight is not batch:
            raise Invalid("this flush has ended already")
        landed, self._in_flight = self._in_flight, None
        assert landed is not None
        landed.give_up()
        return landed

    def _is_current(self, location: Location) -> bool:
        table, slot = self._table, location.slot
        return table.state(slot) == states.STORED and table.generations[slot] == location.generation

    def _check_current(self, location: Location) -> None:
        if not self._is_current(location):
            raise BlockNotExist(f"the block in slot {location.slot} was deleted")

    def _check_same(self, ref: BlockRef, slot: int, root: int) -> None:
        if self._table.roots[slot] != root:
            raise Exists(f"block {ref} is stored with other content")

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise Closed(f"block store {self._failure}")


def _remember(table: dict[int, None], key: int, count_max: int) -> None:
    """Add a key; the oldest one goes if there are too many."""
    if len(table) >= count_max:
        del table[next(iter(table))]
    table[key] = None
