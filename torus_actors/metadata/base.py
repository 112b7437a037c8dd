"""What all metadata operations share: typed reads, and transactions that survive a lost answer."""

from __future__ import annotations

import asyncio
import datetime
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from torus_actors.errors import (
    Again,
    Corruption,
    Fenced,
    NoGlobalMetadata,
    OutcomeUnknown,
    OutOfSpace,
)
from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import PREFIX, Keys
from torus_actors.metadata.kv import Compare, Delete, KeyValue, KeyValueStore, Operation, Put
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import GlobalMetadata, Record
from torus_actors.metadata.watching import POLL_S, Watch

R = TypeVar("R", bound=Record)

RESOLVE_S = 10.0
"""How long an operation whose answer was lost is followed up before it fails as unknown."""

PAGE_KEYS = 4096
"""Keys in one answer, where there may be more than an answer holds: a megabyte of volumes."""

CONTENTION_MAX = 50
"""Attempts against others who change the same key; more is not contention, but a bug."""


class MetadataBase:
    """The store, the keys in it, and how to change them.

    Args:
        store: where everything is kept; closed with the service.
        rng: jitter, and the nonces by which an operation knows its own work again. Two services on
            one store must not draw the same numbers.
        prefix: all keys start with it.
        wall_clock: seconds since 1970, for people to read; the loop's time unless given.
        resolve_s: how long the fate of a change is looked into after its answer was lost.
    """

    def __init__(
        self,
        store: KeyValueStore,
        *,
        rng: random.Random,
        prefix: str = PREFIX,
        wall_clock: Callable[[], float] | None = None,
        resolve_s: float = RESOLVE_S,
    ) -> None:
        self.store = store
        self.keys = Keys(prefix)
        self._rng = rng
        self._wall_clock = wall_clock
        self._resolve_s = resolve_s
        self._cluster_id = ""
        self._global = b""

    async def close(self) -> None:
        """Close the store."""
        await self.store.close()

    async def bind(self) -> GlobalMetadata:
        """Read what holds for the whole cluster, and from now on change that one only.

        The cluster may be wiped and another made in its place, in which volumes and sessions begin
        with the same numbers.

        Raises:
            NoGlobalMetadata: there is none.
        """
        found = await self.store.get(self.keys.global_)
        if found is None:
            raise NoGlobalMetadata("the cluster is not initialised: run torusctl init")
        metadata = GlobalMetadata.decode(found.value, found.key)
        self._cluster_id, self._global = metadata.cluster_id, found.value
        return metadata

    def _is_ours(self, stored: bytes | None) -> bool:
        """Whether that is the global metadata of the cluster to which this is bound, if to any."""
        if not self._cluster_id or stored == self._global:
            return True
        if stored is None or GlobalMetadata.decode(stored).cluster_id != self._cluster_id:
            return False
        self._global = stored  # it was written anew
        return True

    def watch(self, prefix: str, *, poll_s: float = POLL_S) -> Watch:
        """Follow the keys under ``prefix`` (a full key prefix): see `Watch`."""
        return Watch(self.store, prefix, rng=self._rng, poll_s=poll_s, check=self._check_ours)

    async def _check_ours(self) -> None:
        """Refuse what another cluster has, whose store may be at the same address.

        Raises:
            Fenced: the cluster to which this is bound was wiped, or it is another one's.
        """
        if not self._cluster_id:
            return
        found = await self.store.get(self.keys.global_)
        if not self._is_ours(None if found is None else found.value):
            raise Fenced("this is not the metadata of the cluster to which this process belongs")

    async def _read(self, key: str, record: type[R]) -> tuple[R | None, int]:
        found = await self.store.get(key)
        if found is None:
            return None, 0
        return record.decode(found.value, key), found.mod_revision

    async def _revision_of(self, key: str, record: Record) -> int | None:
        """The revision of a record that was read before; None if it is another by now.

        A transaction compares that, and not the bytes: of another version, which knows more fields
        or fewer, they are not those that this one writes.
        """
        stored, revision = await self._read(key, type(record))
        return revision if stored == record else None

    async def _list(self, prefix: str, record: type[R]) -> list[R]:
        found, _ = await self.store.range(prefix)
        return [record.decode(item.value, item.key) for item in found]

    async def _in_pages(self, prefix: str) -> list[KeyValue]:
        """Every key that starts with ``prefix``, but not all as they were in one moment."""
        found: list[KeyValue] = []
        while True:
            after = found[-1].key if found else ""
            page, _ = await self.store.range(prefix, after=after, limit=PAGE_KEYS)
            found += page
            if len(page) < PAGE_KEYS:
                return found

    async def _touch(self, volume_id: int) -> tuple[list[Compare], list[Put]]:
        """What keeps a creation that arrives late from undoing a deletion.

        A copy of a request may arrive long after another one was answered. One that makes a key
        compares that it is not there, which is true again once the key was deleted. So it compares
        the revision of the volume's epoch too, or of the marker that is left of a deleted volume,
        and who deletes such a key writes that anew, as it is.

        Returns:
            What either compares, and what who deletes writes besides.
        """
        gone: list[Compare] = []
        for row in (table.EPOCH, table.DELETED):
            key = self.keys.of(row, volume_id)
            found = await self.store.get(key)
            if found is not None:
                there = Compare(key, mod_revision=found.mod_revision)
                return [*gone, there], [Put(key, found.value)]
            gone.append(Compare(key, mod_revision=0))
        return gone, []

    async def _delete(self, volume_id: int, key: str, revision: int, what: str) -> bool:
        """Delete a key of a volume so that no late request brings it back; see `_touch`.

        Args:
            volume_id: the volume.
            key: fine if it is not there.
            revision: of the record that is meant; 0 for any.
            what: for the error if others change the volume all the time.

        Returns:
            Whether it is gone; if not, another record has taken its place.
        """
        meant = [Compare(key, mod_revision=revision)] if revision else []

        async def gone() -> int | None:
            # What made a compare fail has touched the epoch, too.
            return None if await self.store.get(key) else 1

        attempts = self._attempts(what)
        while True:
            await attempts.next()
            unchanged, touch = await self._touch(volume_id)
            if await self._settle_deletion([*meant, *unchanged], key, touch, gone) is not None:
                return True
            found = await self.store.get(key)
            if revision and found is not None and found.mod_revision != revision:
                return False

    async def _settle_deletion(
        self,
        compare: Sequence[Compare],
        key: str,
        touch: Sequence[Operation],
        mine: Callable[[], Awaitable[int | None]],
    ) -> int | None:
        """`_settle` for the deletion of a key, with what `_touch` has it write.

        A store that is full takes deletions alone; and as long as it is, no late creation.
        """
        try:
            return await self._settle(compare, [Delete(key), *touch], mine)
        except OutOfSpace:
            return await self._settle(compare, [Delete(key)], mine)

    async def _settle(
        self,
        compare: Sequence[Compare],
        then: Sequence[Operation],
        mine: Callable[[], Awaitable[int | None]],
    ) -> int | None:
        """Run a transaction to a known end, though its answer may get lost on the way.

        If an answer is lost the same transaction is sent again. That is safe only because its own
        effect makes its compares false: at most one of the two can apply, even if the first is
        still under way. When the compares fail, ``mine`` looks whether that is our own doing.

        Args:
            compare: false once ``then`` has applied, whatever comes later (see `_touch`); or twice
                must be as good as once.
            then: the operations.
            mine: returns the revision at which this very change was made, or None.

        Returns:
            The revision of the change; None if it was not made, and cannot be any more.

        Raises:
            Again: nothing happened.
            OutOfSpace: nor here.
            OutcomeUnknown: the store did not come back in time to tell.
            Fenced: the cluster was wiped.
        """
        until = asyncio.get_running_loop().time() + self._resolve_s
        backoff = Backoff(self._rng)
        unknown = False
        while True:
            try:
                known = self._global
                ours = [Compare(self.keys.global_, value=known)] if known else []
                result = await self.store.txn([*ours, *compare], then)
                if result.succeeded:
                    return result.revision
                made = await mine()
                if made is None and known:
                    found = await self.store.get(self.keys.global_)
                    if not self._is_ours(None if found is None else found.value):
                        raise Fenced("the cluster to which this process belongs was wiped")
                    if self._global != known:
                        continue
                return made
            except (Again, OutcomeUnknown, OutOfSpace, Corruption) as error:
                # Refused for want of room, say: the copy before may have been taken all the same.
                if isinstance(error, OutOfSpace) and not unknown:
                    # etcd makes the change that fills it up, and answers it with this.
                    try:
                        made = await mine()
                    except (Again, OutcomeUnknown, OutOfSpace, Corruption):
                        unknown = True
                    else:
                        if made is None:
                            raise
                        return made
                unknown = unknown or isinstance(error, OutcomeUnknown)
                if not unknown:
                    raise
                if not await backoff.wait(until):
                    raise OutcomeUnknown(f"the change may or may not be made: {error}") from error

    def _attempts(self, what: str) -> Attempts:
        return Attempts(Backoff(self._rng, first_s=0.002, max_s=0.1), what)

    def _now(self) -> float:
        if self._wall_clock is None:
            return asyncio.get_running_loop().time()
        return self._wall_clock()

    def new_nonce(self) -> str:
        """By which a record is known again; some operations take one."""
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))


class Attempts:
    """Counts the attempts at a compare-and-set that others may get ahead of."""

    def __init__(self, backoff: Backoff, what: str) -> None:
        self._backoff = backoff
        self._what = what
        self._made = 0

    async def next(self) -> None:
        """Call before each attempt; waits a little before all but the first.

        Raises:
            Again: there were enough of them.
        """
        if self._made >= CONTENTION_MAX:
            raise Again(f"cannot {self._what}: others change it all the time")
        if self._made:
            await self._backoff.wait()
        self._made += 1


def when(seconds: float) -> str:
    """A wall-clock time for a person, in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
