"""A session's journal: appending records to all members; `recovery` reads them back.

The rule: a flush is acknowledged by the journal only when every member recorded in the metadata
has the record on its disk. So any one member has all that was acknowledged, and one member that is
fenced keeps an older session from getting anything acknowledged ever again. A member is known by
the identity of its journal too: one that lost its disk has no records, which is not "none".

A member that does not answer ends the journal: the flush becomes a commit, whose head covers all
records, and a new ensemble is recorded before the next one is used. An ensemble never shrinks
silently, and a journal never waits for the metadata while its members live.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgpack

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import (
    Again,
    BlockUnavailable,
    CompareFailed,
    DeadlineExceeded,
    Fenced,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
    TorusError,
)
from torus_actors.metadata.records import Journal
from torus_actors.metadata.service import MetadataService
from torus_actors.model.checksums import PAGE_SIZE, Buffer
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ActorSystem

log = logging.getLogger(__name__)

APPEND_TIMEOUT_S = 2.0
"""A member that has not stored a record by then is given up: the flush commits instead."""

UNDER_WAY_BYTES = 4 << 20
"""Records that may be on their way at a time, unless it is a single one: enough to keep a disk
busy, and little enough for it to take them within ``APPEND_TIMEOUT_S``."""

RECORD_OVERHEAD_BYTES = 128
"""What a member adds to a record that comes alone."""

GROW_PAUSE_S = 30.0
"""How long a journal that should have other members, and could not, is left as it is."""

HUNG_PAUSE_S = 10.0
"""How long a peer that did not answer in time is no member. It may well promise to take records: a
promise that is on its disk already needs no sync. Then every flush would wait for it anew."""

COMMIT_BYTES = 256 << 20
"""A journal of this size is due to be folded into blocks, if its members have room for as much.
Small writes all over a volume make a commit write whole blocks for a few pages of each: the more of
them it can wait for, the less that is."""

COMMIT_AGE_S = 30.0
"""And one of this age, when the volume is quiet: a crash then has nothing to replay."""

COMMIT_AGE_S_MAX = 300.0
"""And one of this age in any case. Small writes all over a volume make a commit write many times as
much as they are, so it pays to wait for more of them in the same blocks."""


class SessionJournal:
    """The journal of one session.

    Args:
        volume_id: the volume.
        epoch: of the session.
        revision: of the journal record in the metadata, as last read.
        replay_bytes: see below.

    Attributes:
        replay_bytes: of memory that a replay may take, more or less.
        active: whether records can be appended.
        sent: number of the last record that was handed in, or that a head covers. Those before it
            go to the members first.
        under_way_bytes: records that were sent and that not all members have stored.
        size: bytes that the records which no head covers take on a member's disk.
        size_max: bytes that its members have room for, with others beside it.
        broken: why there is no ensemble now; empty if there is one or none was wanted yet.
    """

    def __init__(
        self,
        system: ActorSystem,
        meta: MetadataService,
        view: ClusterView,
        *,
        volume_id: int,
        epoch: int,
        revision: int,
        replay_bytes: int,
    ) -> None:
        self._system = system
        self._meta = meta
        self._view = view
        self.replay_bytes = replay_bytes
        self._volume_id = volume_id
        self._epoch = epoch
        self._revision = revision
        self._homes: dict[str, _Home] = {}
        self._queue: deque[_Append] = deque()
        self._covered = 0
        """Number of the last record that the members were told to forget."""
        self._stored = 0
        """Number of the last record that all members have."""
        self.under_way_bytes = 0
        self.active = False
        self.sent = 0
        self.size = 0
        self.size_max = 0
        self.began_at = 0.0
        self.broken = ""
        self._failed_at: dict[str, float] = {}
        """When a peer has last not stored a record, by the loop's clock."""
        self._hung_at: dict[str, float] = {}
        """When it has last not answered at all."""
        self._grow_at = 0.0
        """From when on other members are looked for."""
        self._looking = False
        self._found_for: tuple[Any, ...] = ()
        """In which state of things peers were found that would be members instead."""

    async def form(self, covered_seq: int) -> None:
        """Choose an ensemble and record it; only right after a commit that covers all records.

        Args:
            covered_seq: number of the last record so far; what comes next follows it.

        Raises:
            BlockUnavailable: fewer peers take records than copies are wanted, or the ring has
                changed and this process has not heard of it yet. An ensemble that was active, and
                that the metadata still names, is so again.
            Again: the same is true; the metadata cannot be reached, or the ring has just changed.
            Fenced: another session has begun.
            OutcomeUnknown: the metadata cannot be reached; nothing is active.
        """
        was_active, self.active = self.active, False
        self._found_for = ()
        try:
            # Who has left the ring may be switched off as soon as it was seen that no journal names
            # it: none must name it later, by an earlier ring.
            ring_revision = await self._meta.ring_revision(self._view.ring.version)
            homes, room = await self._gather(covered_seq)
        except BaseException:
            self._keep(was_active, covered_seq)
            raise
        members = tuple(homes)
        extra: bytes = msgpack.packb({each: home.identity for each, home in homes.items()})
        record = Journal(epoch=self._epoch, ensemble=members, extra=extra)
        try:
            await self._record(record, ring_revision)
        except (Again, OutOfSpace):  # nothing was changed
            self._keep(was_active, covered_seq)
            raise
        self._homes = homes
        self.active = True
        self.sent = self._covered = self._stored = covered_seq
        self.broken = ""
        self.size = 0
        self.size_max = min(room)
        self.began_at = self._system.loop.time()

    async def _record(self, record: Journal, ring_revision: int) -> None:
        try:
            self._revision = await self._meta.set_journal(
                self._volume_id, self._epoch, self._revision, record, ring_revision=ring_revision
            )
        except CompareFailed:
            # An attempt of ours whose answer was lost: nobody else writes under this epoch.
            try:
                found, revision = await self._meta.journal(self._volume_id)
            except Again as error:
                raise OutcomeUnknown(str(error)) from error
            unchanged = self._revision == revision
            self._revision = revision
            if unchanged:
                raise Again("the ring has just changed") from None
            if found != record:
                raise BlockUnavailable("the journal's record changed meanwhile") from None

    async def settle_end(self, last: int) -> None:
        """Record where the last session's journal ends, as this one has found it.

        Its members may have more records or fewer, none of them acknowledged. Whoever replays it
        next finds what this session has shown to its users.

        Args:
            last: number of the last record; 0 for none.

        Raises:
            TorusError: it could not be recorded.
        """
        found, revision = await self._meta.journal(self._volume_id)
        if found is None or found.epoch >= self._epoch or not found.ensemble:
            return  # this session has a journal of its own by now
        ended = dataclasses.replace(found, end=last)
        # Not by the revision that `_record` goes by: a commit may begin this session's own journal
        # meanwhile, which must not be replaced by the old one.
        now = await self._meta.set_journal(self._volume_id, self._epoch, revision, ended)
        if self._revision == revision:
            self._revision = now

    def _keep(self, was_active: bool, covered_seq: int) -> None:
        """Go on with the ensemble that the metadata still name, if it was active.

        Unless a record was refused meanwhile, or one before it was not stored, its members have all
        that there is.
        """
        self.active = was_active and not self.broken and self.sent <= covered_seq
        if self.active:
            self._grow_at = self._system.loop.time() + GROW_PAUSE_S

    async def _gather(self, covered_seq: int) -> tuple[dict[str, _Home], list[int]]:
        """Find peers that take records; also the bytes that each has room for."""
        order, up = self._candidates()
        wanted = min(self._view.replication, len(order))
        now = self._system.loop.time()
        up = [peer for peer in up if now - self._hung_at.get(peer, -HUNG_PAUSE_S) >= HUNG_PAUSE_S]
        # Who has just failed may do so again, though it is up and gives its promise.
        up.sort(key=lambda peer: self._failed_at.get(peer, 0.0))
        if not wanted or len(up) < wanted:
            raise BlockUnavailable(f"{len(up)} of {len(order)} peers are up, {wanted} are wanted")
        homes: dict[str, _Home] = {}
        room: list[int] = []
        failure = ""
        # A node may be up and yet take no records: its journal's disk failed, or hangs. The next
        # one is asked instead, as long as no more fail than may be lost.
        for member in up[: 2 * wanted - 1]:
            if len(homes) == wanted:
                break
            home = self._system.actor("journal", node=member)
            try:
                # Also the member's promise to refuse older sessions.
                fenced = await home.fence.remote(
                    self._volume_id, self._epoch, timeout_s=APPEND_TIMEOUT_S
                )
                if covered_seq:
                    # One that missed the last ones need not have them, nor refuse what follows.
                    await home.cut.remote(self._volume_id, self._epoch, covered_seq)
            except Fenced:
                raise
            except TorusError as error:
                self.member_failed(member, error)
                failure = f"; peer {member[:8]}: {error}"
                continue
            homes[member] = _Home(home, fenced[4], fenced[3])
            room.append(fenced[5])
        if len(homes) < wanted:
            raise BlockUnavailable(f"{len(homes)} peers take records, {wanted} are wanted{failure}")
        return homes, room

    def _candidates(self) -> tuple[Sequence[str], list[str]]:
        """Who may be a member, in the order of the ring; and those of them that are not down."""
        transport: Any = self._system.transport
        order = self._view.ring.permutation(BlockRef.of(self._volume_id, 0, 0))
        return order, [p for p in order if transport is not None and not transport.is_down(p)]

    @property
    def is_outdated(self) -> bool:
        """Whether it should have other members by now, and they have been found.

        Because more copies are wanted than it has members, or because one has left the ring, and
        may be switched off as soon as it has handed over its blocks.
        """
        return bool(self._found_for) and self._found_for == self._state() and self._wants_others()

    def _state(self) -> tuple[Any, ...]:
        return self._view.ring.version, self._view.replication, self.members

    def _wants_others(self) -> bool:
        if not self.active or self._system.loop.time() < self._grow_at:
            return False
        transport: Any = self._system.transport
        ring = set(self._view.ring.members)
        # One that is down already ends the journal with the next flush, and not before.
        leave = any(
            home not in ring and transport is not None and not transport.is_down(home)
            for home in self._homes
        )
        if len(self._homes) >= self._view.replication and not leave:
            return False
        order, up = self._candidates()
        wanted = min(self._view.replication, len(order))
        return len(up) >= wanted and (len(self._homes) < wanted or leave)

    def look_for_others(self) -> None:
        """Look for other members if it should have some, which may take long, and nobody waits."""
        if self._looking or not self._wants_others() or self._found_for == self._state():
            return
        self._looking = True
        task = self._system.loop.create_task(self._look_for_others())
        self._system.background.add(task)
        task.add_done_callback(self._system.background.discard)

    async def _look_for_others(self) -> None:
        state = self._state()
        try:
            await self._gather(self._covered)
            self._found_for = state
        except TorusError as error:
            log.info("a journal stays as it is: %s", error)
            self._grow_at = self._system.loop.time() + GROW_PAUSE_S
        finally:
            self._looking = False

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the peers in the ensemble, the last one if there is none now."""
        return tuple(self._homes)

    @property
    def in_doubt(self) -> bool:
        """Whether a member says of the time before that it may have lost records.

        It says so until it has a record of this session: nobody could tell that none is missing.
        """
        return any(home.lost for home in self._homes.values())

    @property
    def homes(self) -> dict[str, _Home]:
        """Of the members: their journals."""
        return self._homes

    @property
    def stored(self) -> int:
        """Number of the last record that all members have, or that a head covers."""
        return self._stored

    @property
    def is_large(self) -> bool:
        """Whether it is due to be folded into blocks for its size."""
        return self.size > self.size_wanted

    @property
    def size_wanted(self) -> int:
        """Bytes at which it is due to be folded into blocks."""
        return min(COMMIT_BYTES, self.replay_bytes, self.size_max)

    async def append(self, last: int, *records: list[Buffer]) -> None:
        """Have every member store records durably.

        Args:
            last: number of the last of them.
            records: the buffers of each, in order.

        Raises:
            Fenced: another session has begun.
            BlockUnavailable: a member did not store them; the journal is not active any more.
        """
        appended: asyncio.Future[None] = self._system.loop.create_future()
        left = len(records)
        failure: TorusError | None = None

        def done(error: TorusError | None) -> None:
            nonlocal left, failure
            left -= 1
            if error is not None and not isinstance(failure, Fenced):
                failure = error
            if not left and not appended.done():
                appended.set_result(None)

        for seq, record in enumerate(records, last - len(records) + 1):
            self.append_soon(seq, record, done)
        await appended
        if failure is None and not self.active:
            # Another record, on its way at the same time, was not stored.
            failure = self._lost()
        if failure is not None:
            raise failure

    def append_soon(
        self, seq: int, record: list[Buffer], done: Callable[[TorusError | None], None]
    ) -> None:
        """The same of one; ``done`` is called once, later, with None or what ``append`` raises.

        Args:
            seq: one more than that of the record handed in before.
            record: not to be changed before ``done``.
            done: see above.
        """
        self.sent = max(self.sent, seq)
        if self.active:
            self._queue.append(_Append(self, self._homes, seq, record, done))
            self._send()
        else:
            self._system.loop.call_soon(done, self._lost())

    def _send(self) -> None:
        """Send what may be on its way now.

        A member that has none of an ensemble's records takes any for the first. So one goes alone
        as long as that may be: should all members refuse it and then take what follows, nobody
        could tell that those records are to be left out.
        """
        queue = self._queue
        while queue:
            under_way = self.under_way_bytes + queue[0].size
            may_be_first = self._stored <= self._covered
            if self.under_way_bytes and (may_be_first or under_way > UNDER_WAY_BYTES):
                return
            self.under_way_bytes = under_way
            queue.popleft().send()

    def _lost(self) -> BlockUnavailable:
        return BlockUnavailable(f"the journal lost a member: {self.broken}")

    @property
    def volume(self) -> tuple[int, int]:
        """Whose log the records belong to: volume and epoch."""
        return self._volume_id, self._epoch

    def appended(self, append: _Append, error: TorusError | None) -> None:
        """All members have a record, or one has not stored it: then the journal ends."""
        self.under_way_bytes -= append.size
        # Of one for an ensemble that was replaced since, a head has what that ensemble lacks.
        if append.homes is self._homes:
            if error is not None:
                self.active = False
                self.broken = str(error)
            elif append.seq > self._covered:
                self._stored = append.seq
                # The journal of a member is written by whole pages.
                self.size += -(-(append.size + RECORD_OVERHEAD_BYTES) // PAGE_SIZE) * PAGE_SIZE
        unsent: deque[_Append] = deque()
        if self.active:
            self._send()
        else:
            unsent, self._queue = self._queue, unsent
        if error is not None and not isinstance(error, Fenced):
            told = BlockUnavailable(f"the journal lost a member: {error}")
            told.__cause__ = error
            error = told
        append.done(error)
        for later in unsent:
            later.done(self._lost())

    def member_failed(self, member: str, error: TorusError) -> None:
        """A member has not stored a record: others are asked before it from now on."""
        self._failed_at[member] = now = self._system.loop.time()
        if isinstance(error, DeadlineExceeded):
            self._hung_at[member] = now

    async def retire(self) -> None:
        """A head covers everything, and the session ends: the next one need ask no member.

        Nor one of an ensemble that was lost, and that the metadata still names.
        """
        self.active = False
        try:
            async with asyncio.timeout(APPEND_TIMEOUT_S):
                await self._meta.set_journal(
                    self._volume_id,
                    self._epoch,
                    self._revision,
                    Journal(epoch=self._epoch, ensemble=()),
                )
        except (TorusError, TimeoutError) as error:
            log.info("the journal's record stays: %s", error)

    def cut(self, upto_seq: int, size: int) -> None:
        """A head covers these records: the members may forget them.

        Args:
            upto_seq: number of the last.
            size: what ``size`` was when that had been cut. Of those that were on their way then it
                lacks a few: they count until the next cut.
        """
        self.sent = max(self.sent, upto_seq)
        self._covered = upto_seq
        if upto_seq:
            for home in self._homes.values():
                # A member that is not told now is told by the next cut.
                with contextlib.suppress(Overloaded):
                    home.actor.cut.tell(self._volume_id, self._epoch, upto_seq)
        self.size -= size
        self.began_at = self._system.loop.time()


class _Home(NamedTuple):
    """A member: its journal actor, and how that was when the records began.

    Attributes:
        actor: see above.
        identity: of the journal.
        lost: whether it might have lost some by then.
    """

    actor: Any
    identity: int
    lost: bool


class _Append:
    """One record on its way to all members."""

    __slots__ = ("_failure", "_journal", "_left", "_record", "done", "homes", "seq", "size")

    def __init__(
        self,
        journal: SessionJournal,
        homes: dict[str, _Home],
        seq: int,
        record: list[Buffer],
        done: Callable[[TorusError | None], None],
    ) -> None:
        self._journal = journal
        self.homes = homes
        self.seq = seq
        self._record = record
        self.size = sum(map(len, record))
        self.done = done
        self._left = len(homes)
        self._failure: TorusError | None = None

    def send(self) -> None:
        """Send it to all of them at once."""
        volume, epoch = self._journal.volume
        payload = b"".join(self._record)
        for member, home in self.homes.items():
            ref = home.actor.append.remote(
                volume,
                epoch,
                self.seq,
                payload=payload,
                timeout_s=APPEND_TIMEOUT_S,
                resend=True,
            )
            ref.add_done_callback(partial(self._answered, member))

    def _answered(self, member: str, answer: asyncio.Future[int]) -> None:
        try:
            if answer.result() != self.homes[member].identity:
                self._failure = BlockUnavailable(f"peer {member[:8]} has lost its journal")
        except TorusError as error:
            # That the session is over says more than anything else.
            if not isinstance(self._failure, Fenced):
                self._failure = error
            self._journal.member_failed(member, error)
        self._left -= 1
        if not self._left:
            self._record = []
            self._journal.appended(self, self._failure)
