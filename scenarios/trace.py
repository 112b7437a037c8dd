"""What happened in a simulation, as one number and as a few last lines.

Two runs of one seed must give the same number; the first line in which two traces differ shows
where they parted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import TextIO

from crc32c import crc32c

LINES_MAX = 400
"""Lines kept for a report."""

_POINT = struct.Struct("<dQ")


class Trace:
    """See the module.

    Args:
        file: also write every line here.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.hash = 0
        self.events = 0
        self.lines: deque[str] = deque(maxlen=LINES_MAX)
        self._file = file
        self._texts: dict[tuple[str, ...], bytes] = {}
        """What `point` was told, as it is hashed: few different things, each many times."""

    def data(
        self, now: float, source: str, target: str, views: Sequence[bytes | memoryview], size: int
    ) -> None:
        """Bytes arrived."""
        value = crc32c(_POINT.pack(now, size), self.hash)
        for view in views:
            value = crc32c(view, value)
        self.hash = value
        self.events += 1
        if self._file is not None:
            print(f"{now:.6f} {source} -> {target} {size} {value:08x}", file=self._file)

    def point(self, now: float, *values: str) -> None:
        """Something else happened: a disk operation, by host, directory and kind."""
        text = self._texts.get(values)
        if text is None:
            text = self._texts[values] = " ".join(values).encode()
        self.hash = crc32c(text, crc32c(_POINT.pack(now, 0), self.hash))
        self.events += 1
        if self._file is not None:
            print(f"{now:.6f} {text.decode()} {self.hash:08x}", file=self._file)

    def say(self, now: float, text: str) -> None:
        """A line for people: a fault, a warning of the program."""
        line = f"{now:10.3f}  {text}"
        self.lines.append(line)
        self.hash = crc32c(text.encode(), crc32c(_POINT.pack(now, 0), self.hash))
        self.events += 1
        if self._file is not None:
            print(f"{now:.6f} {text} {self.hash:08x}", file=self._file)

    @property
    def digest(self) -> str:
        """The number of the run so far."""
        return f"{self.hash:08x}-{self.events}"
