"""Disk workers: the threads on which a block store waits for its disk.

Messages in: ``write``, ``read_many``, ``check``, ``sync`` from the block store of the same node,
``keep_place`` from its scrubber. Several workers stand side by side (writer, readers, flusher),
because a flush may take long and must not hold up reads. Their death costs nothing: every message
may be done twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torus_actors.errors import Corruption, TorusError
from torus_actors.model.checksums import Buffer
from torus_actors.runtime import BlockingActor, ChildSpec, expose
from torus_actors.storage.scrub_place import ScrubPlace
from torus_actors.storage.store import BlockStore, FlushBatch, Location, Ticket

READERS = ("disk_reader", "disk_reader_2")
"""One that waits for a whole block must not hold up small reads."""


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
    def check(self, kind: int, location: Location, cached_too: bool) -> bool:
        """Read a pinned block and verify every byte; whether it is right.

        Args:
            kind: number of the store.
            location: of the block.
            cached_too: what the page cache has of it as well.
        """
        try:
            self._stores[kind].check(location)
            if cached_too:
                self._stores[kind].check(location, cached=True)
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

    @expose(idempotent=True)
    def keep_place(self, place: ScrubPlace, kind: int, slot: int) -> None:
        """Write down where the scrubber has come to."""
        try:
            place.save(kind, slot)
        except OSError as error:
            raise Corruption(f"disk error: {error}") from error


def disk_workers(stores: list[BlockStore]) -> list[ChildSpec]:
    """The workers of a node: one that writes, several that read, one that flushes."""
    names = ("disk_writer", *READERS, "disk_flusher")
    return [ChildSpec(name, _factory(stores)) for name in names]


def _factory(stores: list[BlockStore]) -> Callable[[], DiskWorker]:
    writing = threading.Lock()
    return lambda: DiskWorker(stores, writing)
