"""Making, opening, growing and shrinking the two files of an mfile store.

A new store appears by the rename of its index: before it there is no store, after it both files are
whole. The mark in the data file is written last, so that a data file whose index was lost is told
from one whose making was interrupted, and never overwritten.
"""

from __future__ import annotations

import dataclasses
import random

from torus_actors.errors import Corruption, Invalid, NotExist, OutOfSpace, TorusError
from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.storage.disk import Disk, File
from torus_actors.storage.index import (
    DATA_OFFSET,
    ENTRIES_OFFSET,
    ENTRY_SIZE,
    HEADER_COPIES,
    ZERO_ENTRY,
    Header,
    Layout,
    entry_seed,
    parse_entries,
    parse_header,
)
from torus_actors.storage.slots import FREE, SLOTS_MAX, SlotTable
from torus_actors.storage.store import check_block_size

DATA_PATH = "blocks.data"
INDEX_PATH = "blocks.index"
NEW_INDEX_PATH = "blocks.index.new"

CHUNK_SIZE = 1 << 20
"""Index bytes read at once when opening: 16,384 entries."""

DIRECT_BLOCK_MIN = 64 << 10
"""Blocks from this size on go to the disk past the page cache: filling fresh pages of it costs more
than the disk does, and the caches that matter are the clients'. INode pages are smaller, and are
read again by every collector."""

_ZERO_CHUNK = bytes(CHUNK_SIZE)


@dataclasses.dataclass(slots=True)
class Opened:
    """An open store: its files, and what its index says."""

    data: File
    index: File
    header: Header
    table: SlotTable
    generation: int
    """The highest that any entry has."""
    damaged: int
    """Entries that are neither valid nor empty."""


def open_files(disk: Disk, block_size: int, size_bytes: int | None, rng: random.Random) -> Opened:
    """Open the store of a data directory, or make one; see `BlockStore.open`."""
    check_block_size(block_size)
    layout = Layout(block_size)
    slots = None if size_bytes is None else _slots_in(layout, size_bytes)
    if not disk.exists(INDEX_PATH):
        if slots is None:
            raise Invalid("there is no block store here yet, and no size was given to make one")
        _create(disk, layout, Header.first(block_size, slots, rng.randbytes(16)))
    index = disk.open(INDEX_PATH)
    try:
        header = parse_header(index.pread(ENTRIES_OFFSET, 0), INDEX_PATH)
        if header.block_size != block_size:
            raise Invalid(
                f"the block store here has blocks of {header.block_size} bytes, not {block_size}"
            )
        data = _open_data(disk, index, layout, header)
    except (OSError, TorusError):
        index.close()
        raise
    try:
        if slots is not None:
            # What an interrupted growth has is there already.
            grown = max(0, layout.data_size(slots) - data.size())
            _check_room(disk, grown + max(0, layout.index_size(slots) - index.size()))
        opened = Opened(data, index, header, SlotTable(max(header.slots, slots or 0)), 0, 0)
        _load(opened)
        if slots is not None and slots < header.slots:
            _shrink(opened, slots)
        else:
            _begin(opened, layout, slots or header.slots)
            return opened
    except (OSError, TorusError):
        data.close()
        index.close()
        raise
    data.close()
    index.close()
    again = open_files(disk, block_size, None, rng)
    again.damaged += opened.damaged
    return again


def _slots_in(layout: Layout, size_bytes: int) -> int:
    slots = layout.slots_in(size_bytes)
    if slots < 1:
        raise Invalid(f"a block store of {size_bytes} bytes has no room for one block")
    if slots > SLOTS_MAX:
        raise Invalid(f"a block store of {size_bytes} bytes has more than {SLOTS_MAX} blocks")
    return slots


def _check_room(disk: Disk, more_bytes: int) -> None:
    free = disk.free_bytes()
    if more_bytes > free:
        raise OutOfSpace(
            f"the block store needs {more_bytes >> 20} MiB more, and the disk has {free >> 20} "
            "MiB free; choose a smaller size"
        )


def _create(disk: Disk, layout: Layout, header: Header) -> None:
    if disk.exists(DATA_PATH):
        leftover = disk.open(DATA_PATH)
        marked = any(leftover.pread(PAGE_SIZE, 0))
        leftover.close()
        if marked:
            raise Corruption(
                f"{DATA_PATH} holds blocks, but {INDEX_PATH} is missing; "
                "restore it, or remove both to start empty"
            )
        disk.unlink(DATA_PATH)
    if disk.exists(NEW_INDEX_PATH):
        disk.unlink(NEW_INDEX_PATH)
    data_size, index_size = layout.data_size(header.slots), layout.index_size(header.slots)
    _check_room(disk, data_size + index_size)
    data = disk.open(DATA_PATH, create=True, size=data_size)
    try:
        data.fdatasync()
        index = disk.open(NEW_INDEX_PATH, create=True, size=index_size)
        try:
            header.write(index)
        finally:
            index.close()
    except OutOfSpace:
        disk.unlink(DATA_PATH)
        raise
    finally:
        data.close()
    # The names first, then the one that makes it a store.
    disk.fsync_dir()
    disk.rename(NEW_INDEX_PATH, INDEX_PATH)


def _open_data(disk: Disk, index: File, layout: Layout, header: Header) -> File:
    try:
        data = disk.open(DATA_PATH, direct=header.block_size >= DIRECT_BLOCK_MIN)
    except NotExist:
        raise Corruption(f"{INDEX_PATH} is here, but {DATA_PATH} is missing") from None
    try:
        for path, file, size in (
            (DATA_PATH, data, layout.data_size(header.slots)),
            (INDEX_PATH, index, layout.index_size(header.slots)),
        ):
            if file.size() < size:
                raise Corruption(f"{path} is cut short: {file.size()} of {size} bytes")
        mark = data.pread(DATA_OFFSET, 0)
        if mark != header.data_mark and (any(mark) or header.incarnation):
            raise Corruption(f"{DATA_PATH} does not belong to {INDEX_PATH}, or is damaged")
        if not header.incarnation:
            # Also where both are there: after a kill, or a failed sync, maybe in memory only.
            disk.fsync_dir()
            data.pwrite(header.data_mark, 0)
            data.fdatasync()
    except (OSError, TorusError):
        data.close()
        raise
    return data


def _load(opened: Opened) -> None:
    """Fill the table from the index; after an unclean stop, make the index durable as read."""
    index, header = opened.index, opened.header
    seed = entry_seed(header.store_id)
    stale: list[int] = []
    written = False
    for first in range(0, header.slots, CHUNK_SIZE // ENTRY_SIZE):
        size = min(CHUNK_SIZE, (header.slots - first) * ENTRY_SIZE)
        offset = ENTRIES_OFFSET + first * ENTRY_SIZE
        chunk = bytearray(index.pread(size, offset))
        damaged = opened.damaged
        if chunk != _ZERO_CHUNK:
            _load_chunk(opened, chunk, first, seed, stale)
        if not header.clean or opened.damaged > damaged:
            index.pwrite(chunk, offset)
            written = True
    if written:
        index.fdatasync()
    if stale:
        # Only now: until here the newer copy of the block may have been less durable.
        for slot in stale:
            index.pwrite(ZERO_ENTRY, ENTRIES_OFFSET + slot * ENTRY_SIZE)
        index.fdatasync()


def _load_chunk(opened: Opened, chunk: bytearray, first: int, seed: int, stale: list[int]) -> None:
    """Enter a run of entries; zero damaged ones in ``chunk``, add outdated slots to ``stale``."""
    table, block_size = opened.table, opened.header.block_size
    newest = opened.generation
    damaged: list[int] = []
    for slot, ref, root, length, generation in parse_entries(
        memoryview(chunk), first, block_size, seed
    ):
        if not length:
            damaged.append(slot)
            continue
        newest = max(newest, generation)
        other = table.find(ref)
        if other >= 0:
            # A copy was replaced, and the power went before the flush that zeroes the old one.
            if table.generations[other] > generation:
                stale.append(slot)
                continue
            table.remove(other, FREE)
            stale.append(other)
        table.insert(slot, ref, root, length, generation)
    for slot in damaged:
        at = (slot - first) * ENTRY_SIZE
        chunk[at : at + ENTRY_SIZE] = ZERO_ENTRY
    opened.generation = newest
    opened.damaged += len(damaged)


def _begin(opened: Opened, layout: Layout, slots: int) -> None:
    """Grow if asked to, and note that the store is in use."""
    header = opened.header
    if slots > header.slots:
        data_size, index_size = layout.data_size(slots), layout.index_size(slots)
        # What lies behind the end may be left from an interrupted shrinking.
        opened.index.truncate(layout.index_size(header.slots))
        opened.data.allocate(data_size)
        try:
            opened.index.allocate(index_size)
        except OutOfSpace:
            opened.data.truncate(layout.data_size(header.slots))
            raise
        opened.data.fdatasync()
        opened.index.fdatasync()
    _write_headers(
        opened, dataclasses.replace(header, slots=slots, incarnation=header.incarnation + 1)
    )
    # Only now: a header that tells of more than is there would be one of a damaged store.
    for file, size in (
        (opened.index, layout.index_size(slots)),
        (opened.data, layout.data_size(slots)),
    ):
        if file.size() > size:
            file.truncate(size)


def _shrink(opened: Opened, slots: int) -> None:
    """Give up the last slots, if they are empty; the next opening cuts them off."""
    highest = opened.table.highest_used()
    if highest >= slots:
        raise Invalid(
            f"the block store cannot shrink to {slots} blocks: block {highest + 1} of "
            f"{opened.header.slots} is in use"
        )
    _write_headers(opened, dataclasses.replace(opened.header, slots=slots))


def _write_headers(opened: Opened, header: Header) -> None:
    """Replace all copies of the header, before anything relies on what it says.

    A copy that still told of fewer slots, an earlier incarnation or an index closed in order would
    count as soon as the other one rots: blocks would be dropped, a flush confirmed that never was,
    or entries trusted that no sync has covered.

    Each is durable before the next is written over: wherever the power goes, one is whole, and it
    tells of the state before or of the one to be. The two differ in nothing that is in use yet.
    """
    for _ in range(HEADER_COPIES):
        header = header.successor(clean=False)
        header.write(opened.index)
    opened.header = header
