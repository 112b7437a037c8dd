"""Names of stored things: VolumeID, INodeRef and BlockRef, in Torus's own byte layout.

A ref *is* its wire bytes (little-endian 64-bit fields: volume with type bits, INode, index), so a
ref hashes, compares, travels and is stored without conversion.
"""

from __future__ import annotations

import enum
import struct
from typing import NewType

from torus_actors.errors import Invalid

VolumeID = NewType("VolumeID", int)
VOLUME_ID_MAX = 0xFF_FFFF_FFFF
"""Volume ids have 40 bits; the 24 bits above them in a ref hold the block type."""

UINT64_MAX = 0xFFFF_FFFF_FFFF_FFFF

INODE_REF_SIZE = 16
BLOCK_REF_SIZE = 24

_INODE_REF = struct.Struct("<QQ")
_BLOCK_REF = struct.Struct("<QQQ")


class BlockType(enum.IntEnum):
    """What a block holds; stored in the type bits of its ref."""

    DATA = 0
    INODE = 1


class INodeRef(bytes):
    """One committed version of a file: volume id and INode number; 16 bytes."""

    __slots__ = ()

    @classmethod
    def of(cls, volume: int, inode: int) -> INodeRef:
        """Build a ref.

        Raises:
            Invalid: a field is out of range.
        """
        if not 0 <= volume <= VOLUME_ID_MAX:
            raise Invalid(f"volume id {volume} does not fit 40 bits")
        if not 0 <= inode <= UINT64_MAX:
            raise Invalid(f"INode {inode} does not fit 64 bits")
        return cls(_INODE_REF.pack(volume, inode))

    @classmethod
    def parse(cls, data: bytes | memoryview) -> INodeRef:
        """Read a ref from exactly 16 bytes.

        Raises:
            Invalid: another length.
        """
        if len(data) != INODE_REF_SIZE:
            raise Invalid(f"an INode ref has {INODE_REF_SIZE} bytes, not {len(data)}")
        return cls(data)

    @property
    def volume(self) -> VolumeID:
        """The volume id, without type bits."""
        return VolumeID(int.from_bytes(self[0:5], "little"))

    @property
    def inode(self) -> int:
        """The INode number."""
        return int.from_bytes(self[8:16], "little")

    def __repr__(self) -> str:
        return f"INodeRef({self.volume}, {self.inode})"

    __str__ = __repr__


class BlockRef(bytes):
    """The name of one immutable block: volume, INode it was written under, index; 24 bytes."""

    __slots__ = ()

    @classmethod
    def of(
        cls, volume: int, inode: int, index: int, block_type: BlockType = BlockType.DATA
    ) -> BlockRef:
        """Build a ref.

        Raises:
            Invalid: a field is out of range.
        """
        if not 0 <= volume <= VOLUME_ID_MAX:
            raise Invalid(f"volume id {volume} does not fit 40 bits")
        if not (0 <= inode <= UINT64_MAX and 0 <= index <= UINT64_MAX):
            raise Invalid(f"INode {inode} or index {index} does not fit 64 bits")
        return cls(_BLOCK_REF.pack(volume | (block_type << 40), inode, index))

    @classmethod
    def parse(cls, data: bytes | memoryview) -> BlockRef:
        """Read a ref from exactly 24 bytes.

        Raises:
            Invalid: another length.
        """
        if len(data) != BLOCK_REF_SIZE:
            raise Invalid(f"a block ref has {BLOCK_REF_SIZE} bytes, not {len(data)}")
        return cls(data)

    @property
    def volume(self) -> VolumeID:
        """The volume id, without type bits."""
        return VolumeID(int.from_bytes(self[0:5], "little"))

    @property
    def block_type(self) -> int:
        """The 24 type bits above the volume id."""
        return int.from_bytes(self[5:8], "little")

    @property
    def inode(self) -> int:
        """The INode number the block was written under."""
        return int.from_bytes(self[8:16], "little")

    @property
    def inode_ref(self) -> INodeRef:
        """The INode the block was written under, without type bits."""
        return INodeRef(self[0:5] + b"\0\0\0" + self[8:16])

    @property
    def index(self) -> int:  # type: ignore[override]
        """Which block of that INode; not a position in the file."""
        return int.from_bytes(self[16:24], "little")

    @property
    def is_zero(self) -> bool:
        """Whether this is the ref of no block: a hole."""
        return self == ZERO_BLOCK

    def __repr__(self) -> str:
        return f"BlockRef({self.volume}, {self.inode}, {self.index}, type={self.block_type})"

    def __str__(self) -> str:
        kind = {0: "", 1: "inode "}.get(self.block_type, f"type{self.block_type} ")
        return f"{kind}{self.volume:x}:{self.inode:x}:{self.index:x}"


ZERO_BLOCK = BlockRef(bytes(BLOCK_REF_SIZE))
ZERO_INODE = INodeRef(bytes(INODE_REF_SIZE))
