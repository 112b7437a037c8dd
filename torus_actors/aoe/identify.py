"""What a disk says of itself: the 512 bytes that answer ATA's IDENTIFY DEVICE. No I/O.

Source: ATA/ATAPI-6, IDENTIFY DEVICE. Words of 16 bits, the lower byte first; of each text the
bytes of every word are swapped.
"""

from __future__ import annotations

import struct

from torus_actors.aoe.protocol import LBA28_MASK, SECTOR_BYTES

WORDS = SECTOR_BYTES // 2

HEADS = 16
TRACK_SECTORS = 63
CYLINDERS_MAX = 16383
"""The largest disk that cylinders, heads and sectors can describe; larger ones say the same."""

SERIAL_BYTES = 20
FIRMWARE_BYTES = 8
MODEL_BYTES = 40

_FIXED_DISK = 0x0040
_LBA = 0x0200
_GEOMETRY_VALID = 0x0001
_ATA_4_TO_6 = 0x0070
_VALID = 0x4000
_FLUSH_CACHE_EXT = 0x2000
_FLUSH_CACHE = 0x1000
_LBA48 = 0x0400
_EIGHT_IN_A_PHYSICAL_ONE = 0x2003
_SIGNATURE = 0xA5


def identify(sectors: int, model: str, serial: str, firmware: str) -> bytes:
    """The data of IDENTIFY DEVICE: LBA48, no DMA, no write cache.

    Args:
        sectors: of 512 bytes; 4096 bytes are said to be one physical sector.
        model: at most 40 characters are told; what is not ASCII as a question mark.
        serial: at most 20.
        firmware: at most 8.

    Returns:
        512 bytes.
    """
    words = [0] * WORDS
    cylinders = min(sectors // (HEADS * TRACK_SECTORS), CYLINDERS_MAX)
    words[0] = _FIXED_DISK
    words[1], words[3], words[6] = cylinders, HEADS, TRACK_SECTORS
    words[10:20] = _text(serial, SERIAL_BYTES)
    words[23:27] = _text(firmware, FIRMWARE_BYTES)
    words[27:47] = _text(model, MODEL_BYTES)
    words[49] = _LBA
    words[50] = _VALID
    words[53] = _GEOMETRY_VALID
    words[54:57] = cylinders, HEADS, TRACK_SECTORS
    words[57:59] = _number(cylinders * HEADS * TRACK_SECTORS, 2)
    words[60:62] = _number(min(sectors, LBA28_MASK), 2)
    words[80] = _ATA_4_TO_6
    # What there is, then what is in use. The write cache has a bit in words 82 and 85: it is clear.
    words[83] = _VALID | _FLUSH_CACHE_EXT | _FLUSH_CACHE | _LBA48
    words[84] = _VALID
    words[86] = _FLUSH_CACHE_EXT | _FLUSH_CACHE | _LBA48
    words[87] = _VALID
    words[100:104] = _number(sectors, 4)
    words[106] = _VALID | _EIGHT_IN_A_PHYSICAL_ONE
    words[255] = _SIGNATURE
    data = bytearray(struct.pack(f"<{WORDS}H", *words))
    # "The sum of all 512 bytes shall be zero", without what does not fit into a byte.
    data[-1] = -sum(data) & 0xFF
    return bytes(data)


def _text(text: str, size: int) -> tuple[int, ...]:
    raw = text.encode("ascii", "replace")[:size].ljust(size)
    return struct.unpack(f">{size // 2}H", raw)


def _number(value: int, words: int) -> tuple[int, ...]:
    return tuple(value >> 16 * i & 0xFFFF for i in range(words))
