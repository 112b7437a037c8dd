"""The backends that the metadata conformance suite runs against, each with its levers for tests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from tests.integration.etcd_server import EtcdServer
from torus_actors.metadata.etcd import EtcdStore
from torus_actors.metadata.faulty import FaultyStore
from torus_actors.metadata.kv import DeletePrefix, KeyValueStore, Put
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.records import GlobalMetadata
from torus_actors.metadata.service import MetadataService
from torus_actors.metadata.sqlite import SqliteStore

BACKENDS = ("memory", "sqlite", "etcd")

HISTORY_EVENTS_MAX = 50
"""Short, so that a test can outrun it."""

DEADLINE_S = 10.0

METADATA = GlobalMetadata(512 << 10, "crc,base", 2, str(uuid.UUID(int=7)), created=1.0)

_numbers = itertools.count()


class Backend:
    """One kind of store, and how to open it."""

    def __init__(self, kind: str, directory: Path, etcd: EtcdServer | None) -> None:
        self.kind = kind
        self._etcd = etcd
        self._path = directory / f"metadata-{next(_numbers)}.sqlite"

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[KeyValueStore]:
        """An empty store, closed at the end."""
        store: KeyValueStore
        if self.kind == "memory":
            store = MemoryStore(history_events_max=HISTORY_EVENTS_MAX)
        elif self.kind == "sqlite":
            store = await SqliteStore.open(self._path, history_events_max=HISTORY_EVENTS_MAX)
        else:
            assert self._etcd is not None
            store = EtcdStore([self._etcd.endpoint])
            await store.txn([], [DeletePrefix("")])
        try:
            yield store
        finally:
            await store.close()

    async def outrun_history(self, store: KeyValueStore) -> None:
        """Make the store forget every event up to now."""
        revision = 0
        for number in range(HISTORY_EVENTS_MAX + 1):
            revision = (await store.txn([], [Put("outrun", b"%d" % number)])).revision
        if self._etcd is not None and self.kind == "etcd":
            await asyncio.to_thread(self._etcd.compact, revision)


@contextlib.asynccontextmanager
async def service_on(backend: Backend, *, initialised: bool = True) -> AsyncIterator[Fixture]:
    """A metadata service on a store whose faults can be switched on; of a fresh cluster."""
    async with backend.open() as store:
        faulty = FaultyStore(store)
        service = MetadataService(faulty, rng=random.Random(1), resolve_s=5.0)
        if initialised:
            await service.init(METADATA, b"ring 1")
        yield Fixture(service, faulty)


class Fixture(NamedTuple):
    """What a service test works with."""

    service: MetadataService
    store: FaultyStore


async def until(
    condition: Callable[[], Awaitable[object]], *, deadline_s: float = DEADLINE_S
) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not within the deadline.
    """
    async with asyncio.timeout(deadline_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)
