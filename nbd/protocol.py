"""The NBD wire format as data: magics, options, commands, flags, errors, limits.

Source of every value: doc/proto.md of https://github.com/NetworkBlockDevice/nbd. All integers on
the wire are big-endian. Nothing here does anything but name numbers and pack or unpack them.
"""

from __future__ import annotations

import enum
import struct

from torus_actors import errors

# --- Handshake -------------------------------------------------------------------------------

NBD_MAGIC = 0x4E42444D41474943
"""``NBDMAGIC``: the first eight bytes of every newstyle server."""
OPTION_MAGIC = 0x49484156454F5054
"""``IHAVEOPT``: follows NBD_MAGIC, and opens every option the client sends."""
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = struct.Struct(">QQH")
"""NBD_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""OPTION_MAGIC, option, length of its data."""
OPTION_REPLY = struct.Struct(">QIII")
"""OPTION_REPLY_MAGIC, option answered, reply type, length of the reply's data."""
EXPORT_REPLY = struct.Struct(">QH")
"""Answer to EXPORT_NAME: size in bytes, transmission flags."""
EXPORT_PADDING = bytes(124)
"""Zeroes behind EXPORT_REPLY unless NO_ZEROES was negotiated."""

U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
INFO_EXPORT = struct.Struct(">HQH")
"""Info.EXPORT, size in bytes, transmission flags."""
INFO_BLOCK_SIZE = struct.Struct(">HIII")
"""Info.BLOCK_SIZE, minimum, preferred, maximum."""


class HandshakeFlag(enum.IntFlag):
    """Sent by the server in its greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """The client's answer to the handshake flags."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Opt(enum.IntEnum):
    """Option types that this server knows; all others are answered ERR_UNSUP."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(enum.IntEnum):
    """Option reply types."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(enum.IntEnum):
    """Information types inside a Rep.INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


BASE_ALLOCATION = "base:allocation"
"""The one metadata context the standard defines, and the one offered here."""
BASE_ALLOCATION_ID = 1
"""Its context id; "clients MUST treat the ID as an opaque value"."""

# --- Transmission ----------------------------------------------------------------------------

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

REQUEST = struct.Struct(">IHHQQI")
"""REQUEST_MAGIC, command flags, command, cookie, offset, length."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, type, cookie, length of the payload."""
CHUNK_DATA = struct.Struct(">IHHQIQ")
"""A CHUNK and the offset that opens the payload of OFFSET_DATA."""
CHUNK_HOLE = struct.Struct(">IHHQIQI")
"""A CHUNK with the whole payload of OFFSET_HOLE: offset, length of the hole."""
CHUNK_ERROR = struct.Struct(">IHHQIIH")
"""A CHUNK and what opens the payload of ERROR: error, length of the message."""


class Cmd(enum.IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(enum.IntFlag):
    """Command flags."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class TransmissionFlag(enum.IntFlag):
    """What an export can do, told at the end of the handshake."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Chunk(enum.IntEnum):
    """Structured reply types."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1


CHUNK_DONE = 1
"""The one structured reply flag: the last chunk of a reply."""

STATE_HOLE = 1 << 0
"""base:allocation: not allocated; a write here may be the one that finds no space."""
STATE_ZERO = 1 << 1
"""base:allocation: reads as zeroes."""


class Errno(enum.IntEnum):
    """The error values a reply may carry; the numbers are the protocol's, not this machine's."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# --- Limits ----------------------------------------------------------------------------------

MIN_BLOCK_BYTES = 1
PREFERRED_BLOCK_BYTES = 4096
"""The page that a checksum covers: smaller requests read more than they answer."""
MAX_PAYLOAD_BYTES = 1 << 25
""""For maximum portability, any length less than 2^25 SHOULD NOT be considered a denial of
service attack": exactly this much is offered, for one READ or WRITE."""
MAX_STRING_BYTES = 4096
"""Export names and messages "MUST be no longer than 4096 bytes"."""
MAX_OPTION_BYTES = 1 << 16
"""Room for a name and a dozen context queries of full length. Longer options are skipped without
being stored, and answered ERR_TOO_BIG."""
MAX_EXTENTS = 1 << 16
"""Descriptors in one BLOCK_STATUS reply (512 KiB); a client asks again from where they end."""

# --- Errors ----------------------------------------------------------------------------------

ERRNO_OF: dict[type[errors.TorusError], Errno] = {
    errors.Invalid: Errno.EINVAL,
    errors.NotSupported: Errno.EINVAL,
    errors.OutOfSpace: Errno.ENOSPC,
    errors.Closed: Errno.ESHUTDOWN,
    errors.Fenced: Errno.ESHUTDOWN,
}
"""What a failed request answers; whatever is not listed is EIO. (ENOTSUP is not for NotSupported:
it "SHOULD NOT be returned except" for FAST_ZERO.)"""

REFUSAL_OF: dict[type[errors.TorusError], Rep] = {
    errors.NotExist: Rep.ERR_UNKNOWN,
    errors.Locked: Rep.ERR_POLICY,
    errors.Fenced: Rep.ERR_POLICY,
    errors.WrongVolumeType: Rep.ERR_POLICY,
    errors.NotSupported: Rep.ERR_POLICY,
    errors.Invalid: Rep.ERR_INVALID,
    errors.Closed: Rep.ERR_SHUTDOWN,
}
"""What an export that could not be opened answers; whatever is not listed is ERR_UNKNOWN ("the
requested export is not available"). The error's text goes along."""


def errno_of(error: errors.TorusError) -> Errno:
    """The NBD errno that stands for an error."""
    for cls in type(error).__mro__:
        if cls in ERRNO_OF:
            return ERRNO_OF[cls]
    return Errno.EIO


def refusal_of(error: errors.TorusError) -> Rep:
    """The option reply that stands for an error."""
    for cls in type(error).__mro__:
        if cls in REFUSAL_OF:
            return REFUSAL_OF[cls]
    return Rep.ERR_UNKNOWN


def message_bytes(text: str) -> bytes:
    """A message for a person as it goes on the wire: UTF-8, no NUL, at most 4096 bytes."""
    raw = text.replace("\0", "").encode("utf-8", "replace")
    if len(raw) <= MAX_STRING_BYTES:
        return raw
    return raw[:MAX_STRING_BYTES].decode("utf-8", "ignore").encode("utf-8")
