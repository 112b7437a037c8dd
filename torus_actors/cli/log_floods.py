"""A bound on how much one message may fill a log, whoever has a node or client say it."""

from __future__ import annotations

import logging

BURST = 50
"""So often the same message is logged within `WINDOW_S`; what is in it besides may differ."""

WINDOW_S = 10.0

MESSAGES_MAX = 1000
"""So many different ones are counted. A program has fewer, unless their text is made as it runs."""


class FloodGate(logging.Filter):
    """Drops what was said too often just now; the next one that passes tells how often."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """By logger and message: when a window began, and how often it was said since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        key = record.name, str(record.msg)
        began, count = self._said.get(key, (record.created, 0))
        if not began <= record.created < began + WINDOW_S:  # the clock may have been set back
            if count > BURST:
                record.msg = f"{record.msg} (and {count - BURST} like this since)"
            began, count = record.created, 0
        if len(self._said) >= MESSAGES_MAX:
            self._said.clear()
        self._said[key] = began, count + 1
        return count < BURST
