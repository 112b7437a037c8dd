"""The journal of a node: takes the records of volume sessions, and gives them back for replay.

Messages in, from any node: ``append``, ``fence``, ``read_tail``, ``cut``, ``drop``, ``stats``; from
this node also ``volumes``. Messages out: to ``journal_disk``, the thread that waits for the disk.
Small commits need no thread where the system can do without (`storage/direct.py`).
What is stored, and what is under way, lives in `OpenJournal`, which outlives both actors: their
death costs callers nothing, since all these messages may be done twice.

All records that arrive while the disk is busy go out together, with one sync.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import random
from collections.abc import Callable
from typing import Any

from torus_actors.errors import TRANSIENT, ActorNotFound, Corruption, OutcomeUnknown, TorusError
from torus_actors.runtime import ActorSystem, BlockingActor, LoopActor, Reply, expose
from torus_actors.storage.disk import Disk, DurableWriter
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import segment_name
from torus_actors.storage.journal_index import Ticket
from torus_actors.storage.journal_space import JournalLimits
from torus_actors.storage.journal_steps import Commit, MakeSegment, ReadRecords
from torus_actors.storage.step import Step

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
"""One call of a worker. A step that takes longer is asked after again, and never given up: nobody
could tell what became of it."""

RETRY_PAUSE_S = 0.05

READ_BYTES_MAX = 8 << 20
"""Payload of one answer: as large as the largest record, and half of what a frame takes."""


class JournalDisk(BlockingActor):
    """The thread of the journal; does one step after the other."""

    @expose(idempotent=True)
    def run(self, step: Step) -> None:
        """Do a step; it knows itself whether it was done already."""
        try:
            step.run()
        except OSError as error:
            raise Corruption(f"disk error: {error}") from error


class OpenJournal:
    """The open journal of a node, and what drives it.

    Steps run in a task of their own, so that one whose caller died still ends in order; a small
    commit that finds nothing under way is started by whoever brings it.

    Args:
        system: whose ``journal_disk`` does the work.
        store: the journal.
        direct: writes without a thread; None where that is not possible.
    """

    def __init__(
        self, system: ActorSystem, store: JournalStore, direct: DurableWriter | None = None
    ) -> None:
        self.system = system
        self.store = store
        self._direct = direct
        self._driver: asyncio.Task[None] | None = None
        self._under_way: asyncio.Future[None] | None = None
        """Done when a write without a thread has ended; None while there is none."""
        self._paused = False

    @classmethod
    def open(
        cls,
        system: ActorSystem,
        disk: Disk,
        rng: random.Random,
        limits: JournalLimits | None = None,
    ) -> OpenJournal:
        """Open or begin the journal in a directory; blocks, before the node does anything else."""
        store = JournalStore.open(disk, limits=limits, rng=rng)
        return cls(system, store, disk.direct_writer(system.loop))

    def submit(self, ticket: Ticket | None, waiter: Callable[[Exception | None], None]) -> None:
        """See to it that a ticket is settled; ``waiter`` gets the outcome.

        Args:
            ticket: None where there is nothing to wait for.
            waiter: called once, with None when it is durable.
        """
        if ticket is None:
            waiter(None)
            return
        ticket.waiters.append(waiter)
        self.kick()

    def kick(self) -> None:
        """Do what is to be done on the disk."""
        if self._driver is not None or self._under_way is not None:
            return
        step = self._next_step()
        if step is not None and not self._start_direct(step):
            self._driver = self._own(self._drive(step))

    def _next_step(self) -> Step | None:
        store = self.store
        return store.next_step() if store.waiting or not self._paused else None

    def _start_direct(self, step: Step) -> bool:
        """Start a small commit without a thread; whether that was possible."""
        if self._direct is None or not isinstance(step, Commit):
            return False

        def ended(error: OSError | None) -> None:
            under_way, self._under_way = self._under_way, None
            if error is not None and error.errno == errno.EAGAIN:
                # The same bytes in the same place harm nothing, however much of them is there.
                self._driver = self._own(self._drive(step))
            else:
                self._end(step, None if error is None else Corruption(f"disk error: {error}"))
                self.kick()
            if under_way is not None and not under_way.done():
                under_way.set_result(None)

        name = segment_name(step.segment.index)
        if not self._direct.start(name, step.buffers, step.offset, ended):
            return False
        self._under_way = self.system.loop.create_future()
        return True

    def _end(self, step: Step, error: TorusError | None) -> None:
        if error is None:
            self.store.end_step(step)
            return
        self.store.fail_step(step, error)
        if self.store.failure is not None:
            log.error("the journal %s", self.store.failure)
        elif isinstance(step, MakeSegment):
            log.warning("the journal cannot grow: %s", error)

    @property
    def write_under_way(self) -> object | None:
        """Stands for the write without a thread that is under way; None while there is none."""
        return self._under_way

    async def pause(self) -> None:
        """Write what is waiting, and let the rest be until `resume`."""
        self._paused = True
        while (under_way := self._driver or self._under_way) is not None:
            await asyncio.wait([under_way])

    def resume(self) -> None:
        """Go on after a `pause`."""
        self._paused = False
        self.kick()

    async def read(self, step: ReadRecords) -> None:
        """Read located records; they are released whatever becomes of the one who waits."""
        await asyncio.shield(self._own(self._read(step)))

    async def _read(self, step: ReadRecords) -> None:
        try:
            if step.items:
                await self._run(step)
        finally:
            self.store.release(step)
            self.kick()

    async def _drive(self, step: Step | None) -> None:
        """Have a worker do this step and those that follow, until one can do without."""
        try:
            while step is not None:
                try:
                    await self._run(step)
                except TorusError as error:
                    self._end(step, error)
                else:
                    self._end(step, None)
                step = self._next_step()
                if step is not None and self._start_direct(step):
                    return
        finally:
            self._driver = None

    async def _run(self, step: Step) -> None:
        """Have a worker do a step, however many of them it takes."""
        while True:
            try:
                await self.system.actor("journal_disk").run.remote(step, timeout_s=STEP_TIMEOUT_S)
                return
            except ActorNotFound as error:
                raise OutcomeUnknown(f"nobody writes to the disk: {error}") from error
            except TRANSIENT as error:
                log.warning("the journal's disk does not answer: %s", error)
                await asyncio.sleep(RETRY_PAUSE_S)

    def _own(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self.system.loop.create_task(coroutine)
        self.system.background.add(task)
        task.add_done_callback(self.system.background.discard)
        return task

    def close(self) -> None:
        """Close the files; blocks."""
        if self._direct is not None:
            self._direct.close()
        self.store.close()


class JournalActor(LoopActor):
    """See the module."""

    def __init__(self, opened: OpenJournal) -> None:
        super().__init__()
        self._opened = opened
        self._store = opened.store

    async def setup(self) -> None:
        """Have the disk work done again."""
        self._opened.resume()

    async def cleanup(self) -> None:
        """Leave the disk in order: the worker may be stopped next."""
        await self._opened.pause()

    @expose(remote=True, idempotent=True, deferred=True)
    def append(self, reply: Any, volume: int, epoch: int, seq: int, *, payload: memoryview) -> None:
        """Store a record; answered when it is durable, with the journal's identity.

        Args:
            reply: takes the identity: another one than before means that this journal was lost in
                between, and all records that were in it.
            volume: whose log.
            epoch: the session's; a higher one than before fences those below.
            seq: one more than the last of the epoch; any for its first record.
            payload: the record; copied.

        Raises:
            Fenced: a later session has begun.
            Invalid: it leaves a gap, or is there with other content.
            OutOfSpace, Overloaded: no room; nothing was done.
            Corruption: records of this epoch were lost here.
            Closed, OutcomeUnknown: the disk failed.
        """
        ticket = self._store.append(volume, epoch, seq, (payload,))
        self._opened.submit(ticket, self._answer(reply))

    @expose(remote=True, idempotent=True, deferred=True)
    def fence(self, reply: Any, volume: int, epoch: int) -> None:
        """Refuse all lower epochs from now on; answered when that is durable.

        Args:
            reply: takes a list: newest epoch that has records, number of the first that was not
                cut, number of the last (all 0 if there are none), whether some were lost here, the
                journal's identity, and the bytes that a volume should keep here at most.
            volume: whose log.
            epoch: of the new session.

        Raises:
            Fenced: a higher epoch was promised.
            Closed, OutcomeUnknown: the disk failed.
        """
        store = self._store

        def settled(error: Exception | None) -> None:
            if error is None:
                reply.set([*store.fenced(volume), store.identity, store.room])
            else:
                reply.fail(error)

        self._opened.submit(store.fence(volume, epoch), settled)

    @expose(remote=True, idempotent=True)
    async def read_tail(self, volume: int, epoch: int, from_seq: int, max_bytes: int) -> Reply:
        """Read durable records, verified.

        Args:
            volume: whose log.
            epoch: of the records.
            from_seq: number of the first.
            max_bytes: of payload; at least one record comes in any case.

        Returns:
            A list of [number, length] pairs, and the records as buffers in that order. An empty
            list is the end of the log.

        Raises:
            NotExist: the record was cut.
            Corruption: the record was lost or damaged here: ask another member.
        """
        first, step = self._store.locate(volume, epoch, from_seq, min(max_bytes, READ_BYTES_MAX))
        await self._opened.read(step)
        lengths = [[first + i, len(payload)] for i, payload in enumerate(step.payloads)]
        return Reply(lengths, step.payloads or (b"",))

    @expose(remote=True, idempotent=True)
    def cut(self, volume: int, epoch: int, upto_seq: int) -> None:
        """Forget records up to this one, and all of lower epochs; a crash may bring some back.

        Raises:
            Invalid: the epoch was never promised.
        """
        self._store.cut(volume, epoch, upto_seq)
        self._opened.kick()

    @expose(remote=True, idempotent=True, deferred=True)
    def drop(self, reply: Any, volume: int) -> None:
        """Forget a volume that was deleted; answered when that is durable."""
        self._opened.submit(self._store.drop(volume), self._answer(reply))

    @expose()
    def volumes(self) -> dict[int, tuple[int, int]]:
        """All volumes that have a log here: its newest epoch with records, and the last of them."""
        logs = {volume: self._store.fenced(volume) for volume in self._store.volumes()}
        return {volume: (log.epoch, log.last) for volume, log in logs.items()}

    @expose(remote=True)
    def stats(self) -> dict[str, Any]:
        """Sizes, counts and health of the journal; see `JournalStats`."""
        return {
            "identity": self._store.identity,
            "failure": self._store.failure or "",
            **dataclasses.asdict(self._store.stats()),
        }

    def _answer(self, reply: Any) -> Callable[[Exception | None], None]:
        identity = self._store.identity

        def settled(error: Exception | None) -> None:
            if error is None:
                reply.set(identity)
            else:
                reply.fail(error)

        return settled
