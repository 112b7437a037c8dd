"""The frames of ATA over Ethernet: numbers, parsing, encoding. No I/O.

Source of every value: the AoE specification, AoEr11 (Coraid), and ATA/ATAPI-6 for what is inside an
ATA command. Integers are big-endian, but for the sector address, whose lowest byte comes first.

A frame is a header of 24 bytes, Ethernet's 14 included, and what belongs to its command::

     0 destination (6), source (6), EtherType (2)
    14 version (4 bits), flags (4 bits), error, shelf (2), slot, command, tag (4)
    24 ATA: flags, error or feature, sector count, command or status, sector (6), reserved (2), data
    24 config: buffers (2), firmware (2), sectors, version and action, length (2), string
    24 mask list: reserved, action, error, count, then of each: reserved, action, address (6)
    24 reserve list: action, count, then addresses (6 each)
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass

ETHERTYPE = 0x88A2
VERSION = 1
SECTOR_BYTES = 512

HEADER = struct.Struct(">6s6sHBBHBBI")
"""Destination, source, EtherType, version and flags, error, shelf, slot, command, tag."""
ATA = struct.Struct(">BBBB6s2x")
"""Flags, error or feature, sector count, status or command, address of the first sector."""
CONFIG = struct.Struct(">HHBBH")
"""Buffer count, firmware version, sectors in a frame, version and action, length of the string."""
MASK = struct.Struct(">xBBB")
"""Action, error, number of directives."""
DIRECTIVE = struct.Struct(">xB6s")
"""Action, hardware address."""
RESERVE = struct.Struct(">BB")
"""Action, number of addresses."""

ETHERNET_BYTES = 14
MAC_BYTES = 6
FRAME_BYTES_MIN = 60
"""Shorter frames are filled up with zeros: not every driver does it."""
BROADCAST_MAC = b"\xff" * MAC_BYTES

ANY_SHELF = 0xFFFF
ANY_SLOT = 0xFF

CONFIG_BYTES_MAX = 1024
"""The longest config string that the specification allows."""
LIST_MAX = 255
"""Addresses in a mask or reserve list: their number is one byte."""
SECTORS_MAX = 255
"""Sectors in a frame: their number is one byte, and 0 would mean more than a frame holds."""

LBA28_MASK = (1 << 28) - 1

_MAC = re.compile("[0-9a-fA-F]{1,2}([:-][0-9a-fA-F]{1,2}){5}")


class Flag(enum.IntFlag):
    """Of the header."""

    ERROR = 1 << 2
    RESPONSE = 1 << 3


class Command(enum.IntEnum):
    """Of the header."""

    ATA = 0
    CONFIG = 1
    MASK = 2
    RESERVE = 3


class Error(enum.IntEnum):
    """What is wrong with a command, beside what ATA has a register for."""

    BAD_COMMAND = 1
    BAD_ARGUMENT = 2
    DEVICE_UNAVAILABLE = 3
    CONFIG_PRESENT = 4
    UNSUPPORTED_VERSION = 5
    RESERVED = 6


class AtaFlag(enum.IntFlag):
    """Of an ATA command."""

    WRITE = 1 << 0
    ASYNC = 1 << 1
    EXTENDED = 1 << 6


class AtaCode(enum.IntEnum):
    """The ATA commands that do something here; all others are aborted."""

    READ = 0x20
    READ_EXT = 0x24
    WRITE = 0x30
    WRITE_EXT = 0x34
    FLUSH = 0xE7
    FLUSH_EXT = 0xEA
    IDENTIFY = 0xEC


READS = frozenset({AtaCode.READ, AtaCode.READ_EXT})
WRITES = frozenset({AtaCode.WRITE, AtaCode.WRITE_EXT})
_LBA28 = frozenset({AtaCode.READ, AtaCode.WRITE})
_LBA48 = frozenset({AtaCode.READ_EXT, AtaCode.WRITE_EXT})


class AtaStatus(enum.IntFlag):
    """The status register."""

    ERR = 1 << 0
    DF = 1 << 5
    DRDY = 1 << 6


class AtaError(enum.IntFlag):
    """The error register."""

    ABRT = 1 << 2
    IDNF = 1 << 4


class ConfigAction(enum.IntEnum):
    """What a config command wants; TEST and PREFIX are answered only if they match."""

    READ = 0
    TEST = 1
    PREFIX = 2
    SET = 3
    FORCE = 4


class MaskAction(enum.IntEnum):
    """What a mask list command wants."""

    READ = 0
    EDIT = 1


class MaskStep(enum.IntEnum):
    """One directive of an edit."""

    NOTHING = 0
    ADD = 1
    DELETE = 2


class MaskError(enum.IntEnum):
    """Why an edit was refused."""

    UNSPECIFIED = 1
    BAD_DIRECTIVE = 2
    FULL = 3


class ReserveAction(enum.IntEnum):
    """What a reserve or release wants: a list without addresses releases."""

    READ = 0
    SET = 1
    FORCE = 2


@dataclass(frozen=True, slots=True)
class Header:
    """Whom a command is for, and from whom.

    Attributes:
        source: hardware address, 6 bytes.
        major: shelf.
        minor: slot.
        command: number; may be one that is not known.
        tag: the sender's name for it, echoed in the answer.
    """

    source: bytes
    major: int
    minor: int
    command: int
    tag: int


@dataclass(frozen=True, slots=True)
class AtaCommand:
    """An ATA command.

    Attributes:
        count: sectors; at least 1 where they are read or written.
        code: number of the command; may be one that is not known.
        lba: first sector.
        data: of a write, exactly ``count`` sectors; else empty. A view of the frame.
    """

    header: Header
    flags: int
    count: int
    code: int
    lba: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class ConfigCommand:
    """Asks for the config string, or sets it."""

    header: Header
    action: ConfigAction
    string: bytes


@dataclass(frozen=True, slots=True)
class MaskCommand:
    """Asks who may use the target, or says so; directives are (step, address)."""

    header: Header
    action: MaskAction
    directives: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class ReserveCommand:
    """Asks who has reserved the target, or reserves it for some addresses."""

    header: Header
    action: ReserveAction
    macs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A command that can only be answered with an error."""

    header: Header
    error: Error


Parsed = AtaCommand | ConfigCommand | MaskCommand | ReserveCommand | Unusable


def parse(frame: bytes) -> Parsed | None:
    """What a frame asks for; never raises.

    Args:
        frame: as it was received, from the destination address on; may end in padding. What is
            returned may refer to it.

    Returns:
        None if it is no command, and so nothing to answer: another protocol, an answer of another
        target, too short for a header, from a group address.
    """
    if len(frame) < HEADER.size:
        return None
    _, source, ethertype, version_flags, _, major, minor, command, tag = HEADER.unpack_from(frame)
    if ethertype != ETHERTYPE or version_flags & Flag.RESPONSE or source[0] & 1:
        return None
    header = Header(source, major, minor, command, tag)
    if version_flags >> 4 != VERSION:
        return Unusable(header, Error.UNSUPPORTED_VERSION)
    parser = _PARSERS.get(command)
    if parser is None:
        return Unusable(header, Error.BAD_COMMAND)
    body = memoryview(frame)[HEADER.size :]
    try:
        return parser(header, body)
    except (struct.error, ValueError):
        # Too short for what it says it holds, or an action that there is not.
        return Unusable(header, Error.BAD_ARGUMENT)


def _parse_ata(header: Header, body: memoryview) -> Parsed:
    flags, _, count, code, address = ATA.unpack_from(body)
    lba = int.from_bytes(address, "little")
    data = body[:0]
    if code in _LBA28 or code in _LBA48:
        extended = code in _LBA48
        if bool(flags & AtaFlag.EXTENDED) != extended or not count:
            # Where flag and command disagree on how long the address is, a guess might write
            # somewhere else.
            return Unusable(header, Error.BAD_ARGUMENT)
        if not extended:
            # Above the 28 bits are those of the device register.
            lba &= LBA28_MASK
        if code in WRITES:
            data = body[ATA.size : ATA.size + count * SECTOR_BYTES]
            if len(data) != count * SECTOR_BYTES:
                return Unusable(header, Error.BAD_ARGUMENT)
    return AtaCommand(header, flags, count, code, lba, data)


def _parse_config(header: Header, body: memoryview) -> Parsed:
    _, _, _, version_action, length = CONFIG.unpack_from(body)
    string = bytes(body[CONFIG.size : CONFIG.size + length])
    if length > CONFIG_BYTES_MAX or len(string) != length:
        return Unusable(header, Error.BAD_ARGUMENT)
    return ConfigCommand(header, ConfigAction(version_action & 0x0F), string)


def _parse_mask(header: Header, body: memoryview) -> Parsed:
    action, _, count = MASK.unpack_from(body)
    at = MASK.size
    directives = tuple(DIRECTIVE.unpack_from(body, at + i * DIRECTIVE.size) for i in range(count))
    return MaskCommand(header, MaskAction(action), directives)


def _parse_reserve(header: Header, body: memoryview) -> Parsed:
    action, count = RESERVE.unpack_from(body)
    macs = bytes(body[RESERVE.size : RESERVE.size + count * MAC_BYTES])
    if len(macs) != count * MAC_BYTES:
        return Unusable(header, Error.BAD_ARGUMENT)
    each = tuple(macs[i : i + MAC_BYTES] for i in range(0, len(macs), MAC_BYTES))
    return ReserveCommand(header, ReserveAction(action), each)


_PARSERS = {
    Command.ATA: _parse_ata,
    Command.CONFIG: _parse_config,
    Command.MASK: _parse_mask,
    Command.RESERVE: _parse_reserve,
}


@dataclass(frozen=True, slots=True)
class Sender:
    """Who answers: hardware address, shelf and slot."""

    mac: bytes
    major: int
    minor: int


def answer(sender: Sender, header: Header, body: bytes = b"", error: int = 0) -> bytes:
    """The answer to a command, up to where its data begin.

    Args:
        sender: who answers.
        header: of the command.
        body: what follows the header.
        error: an ``Error``, or 0.
    """
    return encode(sender, header.source, header.command, header.tag, body, error)


def encode(
    sender: Sender, destination: bytes, command: int, tag: int, body: bytes, error: int = 0
) -> bytes:
    """An answer, also to what nobody asked: that is how a target makes itself known."""
    flags = Flag.RESPONSE | (Flag.ERROR if error else 0)
    return (
        HEADER.pack(
            destination, sender.mac, ETHERTYPE, VERSION << 4 | flags, error,
            sender.major, sender.minor, command, tag,
        )
        + body
    )  # fmt: skip


def ata_body(command: AtaCommand, status: int, error: int = 0) -> bytes:
    """The registers after an ATA command; sectors that were not done are counted in one of them."""
    left = command.count if status & (AtaStatus.ERR | AtaStatus.DF) else 0
    return ATA.pack(command.flags, error, left, status, command.lba.to_bytes(6, "little"))


def config_body(
    buffers: int, firmware: int, sectors: int, action: ConfigAction, string: bytes
) -> bytes:
    """What a target says of itself.

    Args:
        buffers: commands that it keeps at once.
        firmware: version.
        sectors: that a frame may carry.
        action: of the command.
        string: the config string.
    """
    version_action = VERSION << 4 | action
    return CONFIG.pack(buffers, firmware, sectors, version_action, len(string)) + string


def mask_body(action: MaskAction, macs: list[bytes], error: int = 0) -> bytes:
    """The mask list."""
    steps = b"".join(DIRECTIVE.pack(MaskStep.NOTHING, mac) for mac in macs)
    return MASK.pack(action, error, len(macs)) + steps


def reserve_body(action: ReserveAction, macs: tuple[bytes, ...]) -> bytes:
    """The reserve list."""
    return RESERVE.pack(action, len(macs)) + b"".join(macs)


def sectors_of_mtu(mtu: int) -> int:
    """How many sectors a frame carries.

    Args:
        mtu: bytes that follow Ethernet's own header.
    """
    room = mtu - (HEADER.size - ETHERNET_BYTES) - ATA.size
    return max(0, min(room // SECTOR_BYTES, SECTORS_MAX))


def list_max(mtu: int) -> int:
    """How many addresses a mask or reserve list may have, so that it fits into an answer.

    Args:
        mtu: bytes that follow Ethernet's own header.
    """
    room = mtu - (HEADER.size - ETHERNET_BYTES) - MASK.size
    return min(room // DIRECTIVE.size, LIST_MAX)


def parse_mac(text: str) -> bytes:
    """A hardware address as people write it.

    Raises:
        ValueError: it is none of one host.
    """
    mac = b""
    if _MAC.fullmatch(text):
        mac = bytes(int(part, 16) for part in re.split("[:-]", text))
    if not mac or mac[0] & 1:
        raise ValueError(f"{text!r} is no hardware address of a host, such as 02:00:00:00:00:01")
    return mac


def format_mac(mac: bytes) -> str:
    """A hardware address as people write it."""
    return mac.hex(":")
