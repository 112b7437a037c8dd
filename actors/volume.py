"""The volume actor: serves one open volume.

Messages in: ``submit`` (a batch of NBD requests), ``flush``, ``status``. Messages out: answers to
the NBD server, blocks to the replicator, heads to the metadata. What the volume holds lives in its
``Session``, which outlives the actor: after its death the successor puts again what was on its
way, and no client notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from torus_actors.errors import TorusError
from torus_actors.nbd.requests import Hole, Request
from torus_actors.runtime import LoopActor, expose
from torus_actors.volume.block_status import PIECES_MAX
from torus_actors.volume.session import Session


class VolumeActor(LoopActor):
    """See the module."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    async def setup(self) -> None:
        """Take the session over."""
        self._session.resume(self.spawn)

    @expose(idempotent=True)
    def submit(self, conn: int, requests: list[Request]) -> None:
        """Serve requests of one NBD connection; the answers go to the NBD server."""
        self._session.submit(conn, requests)

    @expose(idempotent=True)
    async def flush(self) -> None:
        """Make everything acknowledged so far durable."""
        await self._until(self._session.flush_soon)

    @expose(idempotent=True)
    async def commit(self) -> None:
        """Fold everything acknowledged so far into a new head."""
        await self._until(self._session.commit_soon)

    async def _until(self, ask: Callable[[Callable[[TorusError | None], None]], None]) -> None:
        answered, done = self._waiter()
        ask(done)
        await answered

    def _waiter(self) -> tuple[asyncio.Future[Any], Callable[..., None]]:
        """A future, and the callback of the data path that settles it."""
        answered: asyncio.Future[Any] = self.system.loop.create_future()

        def done(error: TorusError | None, result: Any = None) -> None:
            if answered.done():
                return
            if error is None:
                answered.set_result(result)
            else:
                answered.set_exception(error)

        return answered, done

    @expose(idempotent=True)
    async def read(self, offset: int, length: int) -> bytes:
        """Read, for tools; the NBD server uses ``submit``."""
        answered, done = self._waiter()
        pieces: Any = self._session.file.read_at(offset, length, done)
        if pieces is None:
            pieces = await answered
        return b"".join(bytes(len(p)) if isinstance(p, Hole) else p for p in pieces)

    @expose(idempotent=True)
    async def write(self, offset: int, data: bytes) -> None:
        """Write, for tools; the NBD server uses ``submit``."""
        answered, done = self._waiter()
        if not self._session.file.write_at(offset, data, done):
            await answered
        self._session.foresee(1)

    @expose(idempotent=True)
    async def zero(self, offset: int, length: int) -> None:
        """Make holes, for tools; the NBD server uses ``submit``."""
        answered, done = self._waiter()
        if not self._session.file.trim_at(offset, length, done):
            await answered

    @expose(idempotent=True)
    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Which parts of a range hold data: lengths in bytes, each with whether it is data.

        They may end before the range does, as in an answer to BLOCK_STATUS: ask again from there.
        """
        file = self._session.file
        scan = partial(file.extents, offset, length, PIECES_MAX, PIECES_MAX)
        found: list[tuple[int, bool]]
        found, _ = await file.with_pages(scan)
        return found

    @expose()
    def status(self) -> dict[str, Any]:
        """What ``torusctl status`` shows of it."""
        return self._session.status()
