"""Disk workers: the threads on which a block store waits for its disk.

Messages in: ``write``, ``read_many``, ``check``, ``sync``, all from the block store of the same
node. Several workers stand side by side (writer, reader, flusher), because a flush may take long
and must not hold up reads. Their death costs nothing: every message may be done twice.
"""

from __future__ import annotations

import threading
from typing import Any

from torus_actors.errors import Corruption, TorusError
from torus_actors.model.checksums import Buffer
from torus_actors.runtime import BlockingActor, expose
from torus_actors.storage.store import BlockStore, FlushBatch, Location, Ticket


class DiskWorker(BlockingActor):
    """See the module.

    Args:
        stores: the node's open stores; the same list as the block store uses.
        writing: held while something is written. A worker that was killed finishes its call unseen;
            its successor waits here, or a late write could land on what was written since.
    """

    def __init__(self, stores: list[BlockStore], writing: threading.Lock) -> None:
        super().__init__()
        self._stores = stores
        self._writing = writing

    @expose(idempotent=True)
    def write(self, kind: int, ticket: Ticket, sums: bytes, payload: Buffer) -> None:
        """Write one block of store number ``kind``."""
        with self._writing:
            try:
                self._stores[kind].write(ticket, sums, payload)
            except OSError as error:
                raise Corruption(f"disk error: {error}") from error

    @expose(idempotent=True)
    def read_many(
        self, ranges: list[tuple[int, Location, int, int]]
    ) -> list[tuple[bytes, memoryview] | TorusError]:
        """Read pinned ranges: store, location, offset, length; an error stands for itself."""
        answers: list[tuple[bytes, memoryview] | TorusError] = []
        for kind, location, offset, length in ranges:
            try:
                answers.append(self._stores[kind].read(location, offset, length, True))
            except TorusError as error:
                answers.append(error)
        return answers

    @expose(idempotent=True)
    def check(self, kind: int, location: Location) -> bool:
        """Read a pinned block and verify every byte; whether it is right."""
        try:
            self._stores[kind].check(location)
        except TorusError:
            return False
        return True

    @expose(idempotent=True)
    def sync(self, batches: list[FlushBatch]) -> None:
        """Make batches durable."""
        with self._writing:
            for batch in batches:
                try:
                    batch.write()
                except OSError as error:
                    raise Corruption(f"disk error: {error}") from error


def worker_factory(stores: list[BlockStore]) -> Any:
    """Makes one worker over these stores, and its successors."""
    writing = threading.Lock()
    return lambda: DiskWorker(stores, writing)
