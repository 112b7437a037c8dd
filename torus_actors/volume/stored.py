"""Blocks that are on the ring, and that no flush of their nodes has made durable yet."""

from __future__ import annotations

from typing import Any

from torus_actors.model.checksums import Buffer


class Stored:
    """One such block.

    Attributes:
        root: its checksum.
        placed: ``[peer, incarnation id]`` of each copy.
        index: where it is in the file; -1 for a page of the map.
        data: its content, if it is a page of the map.
        kept: its content, if it is a block of data that the client keeps until it is durable:
            should all nodes that have it crash before, it is placed anew from here.
    """

    __slots__ = ("data", "index", "kept", "placed", "root")

    def __init__(
        self,
        root: int,
        placed: list[list[Any]],
        index: int = -1,
        data: Buffer | None = None,
        kept: Buffer | None = None,
    ) -> None:
        self.root = root
        self.placed = placed
        self.index = index
        self.data = data
        self.kept = kept
