"""Where the scrubber of a node has come to, so that the next process goes on from there.

Else a node that is started anew more often than it can read all its blocks would never read the
last ones. A hint and no more: it is written now and then and never synced, and where it is lost or
damaged the scrubber begins at the first slot.
"""

from __future__ import annotations

import logging
import struct

from crc32c import crc32c

from torus_actors.errors import NotExist, TorusError
from torus_actors.storage.disk import Disk

log = logging.getLogger(__name__)

PLACE_FILE = "scrubbed"

_PLACE = struct.Struct("<8sIQ")
_CRC = struct.Struct("<I")
_MAGIC = b"torusSP1"


class ScrubPlace:
    """The next slot to be read. Outlives the scrubber; ``save`` is for a worker, the rest is not.

    Args:
        disk: the data directory; None to forget it with the process.

    Attributes:
        kind: number of the store.
        slot: in it.
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self.kind = 0
        self.slot = 0
        self._disk = disk

    @classmethod
    def load(cls, disk: Disk) -> ScrubPlace:
        """That of the process before; blocks. No trouble with it keeps a node from its start."""
        place = cls(disk)
        try:
            file = disk.open(PLACE_FILE)
            try:
                data = file.pread(_PLACE.size + _CRC.size, 0)
            finally:
                file.close()
        except NotExist:
            return place
        except (OSError, TorusError) as error:
            log.warning("the scrubber begins at the first block: %s", error)
            return place
        body = data[: _PLACE.size]
        if data[_PLACE.size :] == _CRC.pack(crc32c(body)):
            magic, kind, slot = _PLACE.unpack(body)
            if magic == _MAGIC:
                place.kind, place.slot = kind, slot
        return place

    def save(self, kind: int, slot: int) -> None:
        """Write a place down for the next process; blocks.

        Raises:
            OSError, OutOfSpace: it could not be written.
        """
        if self._disk is None:
            return
        body = _PLACE.pack(_MAGIC, kind, slot)
        file = self._disk.open(PLACE_FILE, create=True)
        try:
            file.pwrite(body + _CRC.pack(crc32c(body)), 0)
        finally:
            file.close()
