"""The INode store: pages of INodes, kept as blocks on the ring.

Messages in: ``put_pages``, ``get_page``. Messages out: to the replicator. Its death costs nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from torus_actors.actors.block_messages import INODE_BLOCK_SIZE
from torus_actors.errors import BlockUnavailable, Invalid, TorusError
from torus_actors.metadata.patience import Backoff
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import LoopActor, expose

PUTS_MAX = 16
"""Pages on their way at once."""

PATIENCE_S = 20.0
"""How long a page is tried again that no peer takes: as long as whole blocks of data are."""


class INodeStore(LoopActor):
    """See the module."""

    @expose(idempotent=True)
    async def put_pages(self, pages: list[list[Any]]) -> list[list[Any]]:
        """Store pages.

        Args:
            pages: ``[ref, bytes]`` of each.

        Returns:
            ``[root checksum, placed]`` of each, as the replicator's ``put_block`` says; not yet
            durable.

        Raises:
            OutOfSpace, BlockUnavailable: one could not be stored.
        """
        end = self.system.loop.time() + PATIENCE_S
        room = asyncio.Semaphore(PUTS_MAX)
        replicator = self.system.actor("replicator")
        failure: BaseException | None = None

        async def put(ref: BlockRef, page: bytes) -> list[Any]:
            if len(page) > INODE_BLOCK_SIZE:
                raise Invalid(f"an INode page of {len(page)} bytes, at most {INODE_BLOCK_SIZE}")
            backoff = Backoff(self.system.rng, max_s=1.0)
            async with room:
                sums = sums_of(page)
                root = root_of(sums)
                while failure is None:
                    try:
                        placed = await replicator.put_block.remote(ref, root, sums, 0, payload=page)
                        return [root, placed]
                    except BlockUnavailable:
                        if not await backoff.wait(end):
                            raise
            return []

        async def put_or_fail(ref: BlockRef, page: bytes) -> list[Any]:
            nonlocal failure
            try:
                return await put(ref, page)
            except BaseException as error:
                failure = failure or error
                return []

        # To the end of all: what still went on would store pages that nobody knows of.
        answers = await asyncio.gather(*[put_or_fail(ref, page) for ref, page in pages])
        if failure is not None:
            raise failure
        return list(answers)

    @expose(deferred=True)
    def get_page(self, reply: Any, ref: BlockRef, root: int) -> None:
        """Fetch a page, verified against its root checksum."""
        fetched = self.system.actor("replicator").read.remote(ref, root, 0, INODE_BLOCK_SIZE)

        def arrived(future: asyncio.Future[Any]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None or future.cancelled():
                reply.fail(error or TorusError("given up"))
            else:
                reply.set(future.result())

        fetched.add_done_callback(arrived)
