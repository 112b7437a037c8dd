"""Storing blocks on a disk.

Read in this order: `store` (the interface), `mfile` (the store of a node, and why it loses
nothing), `index` (its bytes), `mfile_open`, `slots`; then `disk` and its simulation `simdisk`.
"""

from __future__ import annotations

from torus_actors.storage.memory import MemoryStore
from torus_actors.storage.mfile import MFileStore
from torus_actors.storage.store import BlockStore

BLOCK_STORES: dict[str, type[BlockStore]] = {"mfile": MFileStore, "memory": MemoryStore}
"""Kinds of block store, by the name that a configuration gives."""

__all__ = ["BLOCK_STORES", "BlockStore", "MFileStore", "MemoryStore"]
