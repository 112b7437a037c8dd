"""Generic netlink, as far as the kernel's NBD driver is asked by it. No I/O.

Layouts are those of ``linux/netlink.h`` and ``linux/genetlink.h``: a message is a header, a generic
header, and attributes, each padded to 4 bytes; all in the machine's byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

CONTROLLER = 16
"""Family of the messages that ask for the number of another one."""

GET_FAMILY = 3
FAMILY_ID = 1
FAMILY_NAME = 2

_ERROR = 2
_REQUEST, _ACK = 1, 4
_NESTED = 1 << 15
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
"""Length, family, flags, sequence number, port."""
_GENERIC = struct.Struct("=BBH")
"""Command, version, reserved."""
_ATTRIBUTE = struct.Struct("=HH")
"""Length, type."""
_ERRNO = struct.Struct("=i")


def attribute(kind: int, value: bytes | Iterable[bytes]) -> bytes:
    """An attribute.

    Args:
        kind: its type.
        value: its content, or the attributes within it.
    """
    if not isinstance(value, bytes):
        kind, value = kind | _NESTED, b"".join(value)
    packed = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return packed + bytes(-len(packed) % 4)


def request(family: int, command: int, number: int, attributes: Iterable[bytes]) -> bytes:
    """A message that asks for something, and to be told when it is done.

    Args:
        family: number of who is asked.
        command: what for.
        number: that the answers carry.
        attributes: made by `attribute`.
    """
    body = _GENERIC.pack(command, 1, 0) + b"".join(attributes)
    return _HEADER.pack(_HEADER.size + len(body), family, _REQUEST | _ACK, number, 0) + body


def answers(data: bytes) -> Iterable[tuple[int, int | None, Mapping[int, bytes]]]:
    """What came in one datagram.

    Yields:
        The number of the request; how it ended, 0 or an errno, or None in an answer with content;
        that content, attributes by type.

    Raises:
        ValueError: it is cut off.
    """
    at = 0
    while at + _HEADER.size <= len(data):
        length, family, _, number, _ = _HEADER.unpack_from(data, at)
        end = at + length
        body = at + _HEADER.size
        if length < _HEADER.size + _ERRNO.size or end > len(data):
            raise ValueError("a netlink message is cut off")
        if family == _ERROR:
            yield number, -_ERRNO.unpack_from(data, body)[0], {}
        else:
            yield number, None, dict(attributes_of(data[body + _GENERIC.size : end]))
        at = end + (-length % 4)


def attributes_of(data: bytes) -> Iterable[tuple[int, bytes]]:
    """Attributes that lie one behind the other, such as those within one.

    Yields:
        Type and content of each.

    Raises:
        ValueError: the last one is cut off.
    """
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            raise ValueError("a netlink attribute is cut off")
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + (-length % 4)
