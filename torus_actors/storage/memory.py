"""A block store that keeps everything in memory, for tests: the same behaviour, nothing durable."""

# ruff: noqa: D102 - what overrides a method of the interface is documented there

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Iterable
from typing import Self

from torus_actors.errors import BlockNotExist, Closed, Exists, Invalid, OutOfSpace, Overloaded
from torus_actors.model.checksums import Buffer
from torus_actors.model.refs import BlockRef
from torus_actors.storage.disk import Disk
from torus_actors.storage.index import Layout
from torus_actors.storage.store import (
    Allocator,
    BlockStore,
    DirectRead,
    FlushBatch,
    Location,
    StoreStats,
    Ticket,
    check_block_size,
    check_put,
    check_range,
    check_ref,
    new_buffer,
    slot_of,
)


@dataclasses.dataclass(slots=True)
class _Block:
    ref: BlockRef
    root: int
    sums: bytes
    data: bytes
    generation: int


@dataclasses.dataclass(slots=True, eq=False)
class _MemoryTicket(Ticket):
    sums: bytes = b""
    data: bytes = b""


class _MemoryBatch(FlushBatch):
    def __init__(self, changes: int) -> None:
        self._changes = changes

    @property
    def empty(self) -> bool:
        return not self._changes

    def write(self) -> None:
        pass


class MemoryStore(BlockStore):
    """Blocks in a dict; a deleted block's slot is free at once, since nothing can bring it back.

    Args:
        block_size: bytes.
        slots: room for so many blocks.
        incarnation: see `BlockStore`; a random one, since nothing is left of the one before.
        allocate: gives the buffers that reads fill.
    """

    def __init__(
        self, block_size: int, slots: int, incarnation: int, allocate: Allocator = new_buffer
    ) -> None:
        self.block_size = block_size
        self.incarnation = self.incarnation_id = incarnation
        self._slots = slots
        self._allocate = allocate
        self._by_ref: dict[BlockRef, int] = {}
        self._blocks: dict[int, _Block] = {}
        self._reserved: set[int] = set()
        self._pins: dict[Location, _Block] = {}
        self._pin_counts: dict[Location, int] = {}
        self._quarantined = 0
        self._free: list[int] = []
        self._fresh = 0
        self._changes = 0
        self._generation = 0
        self._in_flight: FlushBatch | None = None
        self._failure: str | None = None

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
        check_block_size(block_size)
        if size_bytes is None:
            raise Invalid("there is no block store here yet, and no size was given to make one")
        slots = Layout(block_size).slots_in(size_bytes)
        if slots < 1:
            raise Invalid(f"a block store of {size_bytes} bytes has no room for one block")
        return cls(block_size, slots, rng.getrandbits(62), allocate)

    def close(self) -> None:
        self._failure = "closed"

    def reserve(self, ref: BlockRef, root: int, instead: Location | None = None) -> Ticket | None:
        self._check_usable()
        check_ref(ref)
        if ref in self._by_ref and self.locate(ref) != instead:
            self._check_same(ref, root)
            return None
        if self._free:
            slot = heapq.heappop(self._free)
        elif self._fresh < self._slots:
            slot = self._fresh
            self._fresh += 1
        else:
            raise OutOfSpace(
                f"block store is full: {len(self._by_ref)} of {self._slots} blocks used"
            )
        self._reserved.add(slot)
        return _MemoryTicket(ref, root, slot)

    def write(self, ticket: Ticket, sums: Buffer, data: Buffer) -> None:
        assert isinstance(ticket, _MemoryTicket)
        slot_of(ticket)
        check_put(self.block_size, ticket.root, sums, data)
        ticket.sums, ticket.data, ticket.length = bytes(sums), bytes(data), len(data)

    def commit(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _MemoryTicket)
        if not ticket.length:
            self.abandon(ticket)
            raise Invalid(f"block {ticket.ref} was not written")
        if ticket.ref in self._by_ref:
            self.abandon(ticket)
            self._check_same(ticket.ref, ticket.root)
            return False
        slot = self._use_up(ticket)
        self._generation += 1
        self._by_ref[ticket.ref] = slot
        self._blocks[slot] = _Block(
            ticket.ref, ticket.root, ticket.sums, ticket.data, self._generation
        )
        self._changes += 1
        return True

    def abandon(self, ticket: Ticket) -> None:
        heapq.heappush(self._free, self._use_up(ticket))

    def begin_flush(self) -> FlushBatch:
        self._check_usable()
        if self._in_flight is not None:
            raise Overloaded("a flush of the block store is under way")
        self._in_flight = _MemoryBatch(self._changes)
        self._changes = 0
        return self._in_flight

    def end_flush(self, batch: FlushBatch) -> None:
        if batch is not self._in_flight:
            raise Invalid("this flush has ended already")
        self._in_flight = None

    def fail_flush(self, batch: FlushBatch) -> None:
        self.end_flush(batch)
        self._changes += 1

    def delete(self, refs: Iterable[BlockRef]) -> int:
        self._check_usable()
        count = 0
        for ref in refs:
            slot = self._by_ref.pop(ref, None)
            if slot is not None:
                del self._blocks[slot]
                heapq.heappush(self._free, slot)
                self._changes += 1
                count += 1
        return count

    def mark_corrupt(self, ref: BlockRef, location: Location | None = None) -> bool:
        slot = self._by_ref.get(ref)
        if slot is None or (location is not None and location != self.locate(ref)):
            return False
        del self._by_ref[ref], self._blocks[slot]
        self._quarantined += 1
        self._changes += 1
        return True

    def locate(self, ref: BlockRef) -> Location:
        slot = self._by_ref.get(ref)
        if slot is None:
            raise BlockNotExist(f"block {ref} is not stored here")
        block = self._blocks[slot]
        return Location(slot, len(block.data), block.root, block.generation)

    def pin(self, location: Location) -> None:
        self._check_current(location)
        self._pins[location] = self._blocks[location.slot]
        self._pin_counts[location] = self._pin_counts.get(location, 0) + 1

    def unpin(self, location: Location) -> None:
        self._pin_counts[location] -= 1
        if not self._pin_counts[location]:
            del self._pin_counts[location], self._pins[location]

    def read_nowait(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview] | None:
        self._check_current(location)
        return self.read(location, offset, length, want_sums)

    @property
    def reads_direct(self) -> bool:
        return False

    def keep_sums(self, location: Location, sums: bytes) -> None:
        """Nothing: they are where the block is."""

    def plan_direct(self, location: Location, offset: int, length: int) -> DirectRead | None:
        return None

    def read(
        self, location: Location, offset: int, length: int, want_sums: bool
    ) -> tuple[bytes, memoryview]:
        check_range(location.length, offset, length)
        block = self._pins.get(location)
        if block is None:
            self._check_current(location)
            block = self._blocks[location.slot]
        data = self._allocate(length)
        data[:] = block.data[offset : offset + length]
        return block.sums if want_sums else b"", data

    def has(self, ref: BlockRef) -> bool:
        return ref in self._by_ref

    def refs_from(self, slot: int, count: int) -> tuple[list[BlockRef], int | None]:
        slots = sorted(at for at in self._blocks if at >= slot)
        refs = [self._blocks[at].ref for at in slots[:count]]
        return refs, slots[count] if len(slots) > count else None

    def stats(self) -> StoreStats:
        used, reserved = len(self._by_ref), len(self._reserved)
        return StoreStats(
            total=self._slots,
            used=used,
            reserved=reserved,
            limbo=0,
            quarantined=self._quarantined,
            free=self._slots - used - reserved - self._quarantined,
            pending=self._changes,
        )

    @property
    def failure(self) -> str | None:
        return self._failure

    def _use_up(self, ticket: Ticket) -> int:
        slot = slot_of(ticket)
        ticket.slot = -1
        self._reserved.remove(slot)
        return slot

    def _is_current(self, location: Location) -> bool:
        block = self._blocks.get(location.slot)
        return block is not None and block.generation == location.generation

    def _check_current(self, location: Location) -> None:
        if not self._is_current(location):
            raise BlockNotExist(f"the block in slot {location.slot} was deleted")

    def _check_same(self, ref: BlockRef, root: int) -> None:
        if self._blocks[self._by_ref[ref]].root != root:
            raise Exists(f"block {ref} is stored with other content")

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise Closed(f"block store {self._failure}")
