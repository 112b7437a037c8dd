"""The packed parts of messages between replicators and block stores.

Lists of refs and ranges travel as packed records and not as msgpack arrays: a read of sixteen pages
then costs one pack call on either side.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from torus_actors.errors import ProtocolError
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef

INODE_BLOCK_SIZE = 32 << 10
"""Slots for INode pages: a page of 1,024 entries of 28 bytes and its header fit, and a sparse page
does not take the room of a data block."""

RANGE = struct.Struct("<24sII")
"""A wanted range: ref, offset in the block, length; bytes, page-aligned (the end may be cut)."""

RANGE_STATUS = struct.Struct("<BII")
"""Answer to a range: Status, bytes of checksum list and of data, which follow in the payload."""

CHECK_STATUS = struct.Struct("<BI")
"""Answer to a check: Status, the stored root checksum."""


class Status(enum.IntEnum):
    """What became of one item of a batch."""

    OK = 0
    MISSING = 1
    CORRUPT = 2
    FAILED = 3
    DEAD = 4
    """In answers to checks only: not here, since the collector of this node has deleted it."""


def whole(ref: BlockRef, block_size: int) -> bytes:
    """The range that is all of a block, in a cluster with data blocks of ``block_size`` bytes."""
    return RANGE.pack(ref, 0, max(block_size, INODE_BLOCK_SIZE))


def split_refs(packed: bytes) -> Iterator[BlockRef]:
    """The refs of a packed list.

    Raises:
        ProtocolError: not a whole number of refs.
    """
    if len(packed) % BLOCK_REF_SIZE:
        raise ProtocolError(f"{len(packed)} bytes are not a list of block refs")
    for at in range(0, len(packed), BLOCK_REF_SIZE):
        yield BlockRef(packed[at : at + BLOCK_REF_SIZE])


def split_records(layout: struct.Struct, packed: bytes) -> Sequence[tuple[int, ...]]:
    """The records of a packed list.

    Raises:
        ProtocolError: not a whole number of records.
    """
    if len(packed) % layout.size:
        raise ProtocolError(f"{len(packed)} bytes are not a list of records of {layout.size}")
    return list(layout.iter_unpack(packed))


def split_answer(layout: struct.Struct, answer: Any, count: int) -> Sequence[tuple[int, ...]]:
    """The records of an answer that came from another node, which may be anything.

    Raises:
        ProtocolError: it is not a packed list of so many records.
    """
    if not isinstance(answer, (bytes, memoryview)):
        raise ProtocolError(f"{type(answer).__name__} where a list of records was due")
    records = split_records(layout, bytes(answer))
    if len(records) != count:
        raise ProtocolError(f"{len(records)} answers to {count} questions")
    return records
