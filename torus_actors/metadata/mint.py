"""INode numbers of a volume: increasing, and never given out twice."""

from __future__ import annotations

import asyncio
import functools

from torus_actors.errors import Again, Invalid, NotExist, OutcomeUnknown, OutOfSpace, TorusError
from torus_actors.metadata import keys as table
from torus_actors.metadata.base import MetadataBase
from torus_actors.metadata.kv import Compare, Put
from torus_actors.metadata.records import Counter
from torus_actors.model.refs import UINT64_MAX

MINT_COUNT_MAX = 1 << 20
"""INode numbers in one call."""


class MintOperations(MetadataBase):
    """INode numbers.

    Calls that come while a transaction is under way share the next one, so that a burst of writers
    costs the store a handful of transactions (torus#294).
    """

    @functools.cached_property
    def _wanted(self) -> dict[int, list[tuple[int, asyncio.Future[int]]]]:
        return {}

    @functools.cached_property
    def _minting(self) -> dict[int, asyncio.Task[None]]:
        return {}

    async def mint_inode(self, volume_id: int, count: int = 1) -> int:
        """Take INode numbers that nobody has had or will have.

        Args:
            volume_id: the volume.
            count: how many in a row.

        Returns:
            The first of them; the smallest ever is 1.

        Raises:
            NotExist: there is no such volume.
        """
        if not 0 < count <= MINT_COUNT_MAX:
            raise Invalid(f"one can take 1 to {MINT_COUNT_MAX} INode numbers, not {count}")
        taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(volume_id, []).append((count, taken))
        if volume_id not in self._minting:
            self._minting[volume_id] = asyncio.ensure_future(self._mint(volume_id))
        return await taken

    async def _mint(self, volume_id: int) -> None:
        try:
            while self._wanted.get(volume_id):
                batch = self._wanted.pop(volume_id)
                try:
                    first = await self._advance(volume_id, sum(count for count, _ in batch))
                except TorusError as error:
                    for _, taken in batch:
                        if not taken.done():
                            taken.set_exception(error)
                    continue
                for count, taken in batch:
                    if not taken.done():
                        taken.set_result(first)
                    first += count
        finally:
            del self._minting[volume_id]

    async def _advance(self, volume_id: int, count: int) -> int:
        key = self.keys.of(table.MINT, volume_id)
        attempts = self._attempts("take an INode number")
        while True:
            await attempts.next()
            counter, revision = await self._read(key, Counter)
            if counter is None:
                raise NotExist(f"there is no volume with id {volume_id}")
            if counter.last + count > UINT64_MAX:
                raise OutOfSpace("all INode numbers of the volume have been used")

            async def unknown() -> int | None:
                # Whoever moved the counter, even we: numbers are plenty, take others.
                return None

            put = Put(key, Counter(counter.last + count).encode())
            try:
                done = await self._settle([Compare(key, mod_revision=revision)], [put], unknown)
            except OutcomeUnknown as error:
                raise Again(str(error)) from error
            if done is not None:
                return counter.last + 1
