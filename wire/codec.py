"""The msgpack codec of metadata: plain values, refs and UUIDs; nothing executable, no pickle.

What goes in: None, bool, int (64 bits), float, str, bytes-likes, list, tuple, dict, BlockRef,
INodeRef, UUID. What comes out is the same, with lists for tuples and bytes for bytes-likes. Keys
of a map are str, bytes, int or a ref.
"""

from __future__ import annotations

import uuid
from typing import Any, Final, NoReturn

import msgpack

from torus_actors.errors import Invalid, ProtocolError
from torus_actors.model.refs import BLOCK_REF_SIZE, INODE_REF_SIZE, BlockRef, INodeRef
from torus_actors.wire.limits import ARRAY_MAX, METADATA_MAX

EXT_BLOCK_REF: Final = 1
EXT_INODE_REF: Final = 2
EXT_UUID: Final = 3

UUID_SIZE = 16
SMALL_ARRAY_MAX = 64
"""Entries of an array or map in what a stranger sends: a hello has a dozen fields."""

_ExtType = msgpack.ExtType
# ExtType's own constructor checks what is known here, for twice the time.
_new_ext = tuple.__new__
_unpackb = msgpack.unpackb

# A UUID's hash is not seeded, so a peer could make a map of colliding ones; the others are seeded
# (str, bytes and its subclasses) or spread by construction (int).
_KEY_TYPES = frozenset((str, bytes, int, BlockRef, INodeRef))


def _default(value: Any) -> Any:
    """Pack what msgpack does not know; it packs the answer instead."""
    kind = type(value)
    if kind is BlockRef:
        return _new_ext(_ExtType, (EXT_BLOCK_REF, value))
    if isinstance(value, tuple):
        return list(value)
    if kind is INodeRef:
        return _new_ext(_ExtType, (EXT_INODE_REF, value))
    if isinstance(value, uuid.UUID):
        return _new_ext(_ExtType, (EXT_UUID, value.bytes))
    raise TypeError(f"a {kind.__name__} cannot be sent to another node")


def _ext(code: int, data: bytes) -> Any:
    if code == EXT_BLOCK_REF and len(data) == BLOCK_REF_SIZE:
        return BlockRef(data)
    if code == EXT_INODE_REF and len(data) == INODE_REF_SIZE:
        return INodeRef(data)
    if code == EXT_UUID and len(data) == UUID_SIZE:
        return uuid.UUID(bytes=data)
    raise ProtocolError(f"metadata: no ext type {code} with {len(data)} bytes")


def _map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, _ in pairs:
        if type(key) not in _KEY_TYPES:
            raise ProtocolError(f"metadata: a {type(key).__name__} may not be a key of a map")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("metadata: a map has the same key twice")
    return found


def _new_packer() -> Any:
    # strict_types: the refs are bytes to msgpack, and would arrive as plain bytes.
    return msgpack.Packer(default=_default, strict_types=True, buf_size=4096)


# A packer is not reentrant, and building one costs more than a small call: idle ones are kept.
# Taking and returning are single operations on a list, so that any thread may pack.
_idle: list[Any] = [_new_packer()]


def pack(value: Any) -> bytes:
    """Encode a value.

    Raises:
        Invalid: a type that cannot be sent, or too large for the other side to take it.
    """
    try:
        packer = _idle.pop()
    except IndexError:
        packer = _new_packer()
    try:
        packed: bytes = packer.pack(value)
    except (TypeError, ValueError, OverflowError, BufferError) as error:
        raise Invalid(f"cannot be sent: {error}") from error
    if len(packed) > ARRAY_MAX:
        # Only now can an array be over its bound. The packer is dropped with its large buffer.
        _check_large(packed)
    else:
        _idle.append(packer)
    return packed


def _check_large(packed: bytes) -> None:
    """Find out here what the other side would end the connection for."""
    if len(packed) > METADATA_MAX:
        raise Invalid(f"metadata of {len(packed)} bytes: at most {METADATA_MAX} can be sent")
    try:
        unpack(packed)
    except ProtocolError as error:
        raise Invalid(f"cannot be sent: {error}") from error


def unpack(buffer: bytes | bytearray | memoryview) -> Any:
    """Decode exactly one value.

    Args:
        buffer: the whole encoding; nothing of the result refers to it.

    Raises:
        ProtocolError: not one whole valid value within the limits.
    """
    try:
        # msgpack bounds each announced length by that of the buffer.
        if len(buffer) <= ARRAY_MAX:
            return _unpackb(
                buffer, strict_map_key=False, object_pairs_hook=_map, ext_hook=_ext, timestamp=1
            )
        return _unpack_bounded(buffer, ARRAY_MAX)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        _refuse(error)


def unpack_small(buffer: bytes | bytearray | memoryview) -> Any:
    """Decode what a stranger sent: as ``unpack``, with at most 64 entries in an array or map.

    Raises:
        ProtocolError: not one whole valid value within the limits.
    """
    try:
        return _unpack_bounded(buffer, SMALL_ARRAY_MAX)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        _refuse(error)


def _unpack_bounded(buffer: bytes | bytearray | memoryview, entries_max: int) -> Any:
    if len(buffer) > METADATA_MAX:
        raise ProtocolError(f"metadata of {len(buffer)} bytes: at most {METADATA_MAX} are taken")
    return _unpackb(
        buffer,
        strict_map_key=False,
        object_pairs_hook=_map,
        ext_hook=_ext,
        timestamp=1,
        max_array_len=entries_max,
        max_map_len=entries_max,
    )


def _refuse(error: Exception) -> NoReturn:
    # Some of msgpack's errors have no text of their own.
    reason = str(error) or type(error).__name__
    raise ProtocolError(f"metadata is not valid msgpack: {reason}") from error
