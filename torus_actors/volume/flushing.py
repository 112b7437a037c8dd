"""Flushes of a session: one after the other; those that come while one runs share the next.

Most flushes have nothing to do but to append a record to the journal. Those are begun and ended by
callbacks, within the turn of the loop that brings the request or the last answer, since a task
would take as long as a disk. Whatever else there is to do is done by ``run``, a task.

A client that flushes after every write, as a database's log does, is foreseen: the record leaves
with the answer to the write, and the flush that follows finds it on its way. A record may leave at
any time, so nothing depends on the guess but time.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torus_actors.errors import BlockUnavailable, Fenced, TorusError, anew
from torus_actors.model.checksums import Buffer
from torus_actors.volume.commit import Superseded

if TYPE_CHECKING:
    from torus_actors.volume.session import Session

log = logging.getLogger(__name__)

WRITE_OUT_ROUNDS = 3
"""How often a flush waits for whole blocks that were filled while it waited; then it commits."""

SPARSE_RATIO = 2
SPARSE_BYTES_MIN = 4 << 20
"""More than that is journaled if the blocks it is in are at least so many times as much. If not,
they are put on the ring at once: it costs no more, and is to be done in any case."""

FORESEE_AFTER = 4
"""So many flushes in a row must each have had one write before them, and no other flush beside
them, for the next one to be foreseen. Of many writers, each has its share in a larger record."""

FORESEE_BYTES_MAX = 64 << 10
"""What is appended before anybody asked: a record in vain costs no more than this."""

Done = Callable[[TorusError | None], None]


class Flusher:
    """See the module.

    Args:
        session: whose file is flushed.

    Attributes:
        appending: whether a flush that needs no task is under way.
        appended_at: when the last of those began, by the loop's clock.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: list[Done] = []
        self._under_way: list[Done] = []
        self._wake = asyncio.Event()
        self._parked = False
        self._no_commit = False
        """Whether no commit can be had: the session ends, and its last one has failed."""
        self.appending = False
        self.appended_at = -math.inf
        self._writes = 0
        """Since the last flush was asked for."""
        self._lone = 0
        """Flushes in a row that had one write before them and none beside them."""

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a flush."""
        return bool(self._waiting or self._under_way)

    def ask(self, done: Done) -> None:
        """Make everything acknowledged so far durable, then call ``done``."""
        lone = self._writes == 1 and not self.busy
        self._lone = self._lone + 1 if lone else 0
        self._writes = 0
        self._waiting.append(done)
        self._begin()

    def ask_without_commit(self, done: Done) -> None:
        """The same of a session that ends and cannot commit: whole blocks go to the journal too."""
        self._no_commit = True
        self.ask(done)

    def wrote(self, writes: int) -> None:
        """So many writes were acknowledged: append them at once if a flush is to come."""
        self._writes += writes
        if (
            self._lone >= FORESEE_AFTER
            and self._writes == 1
            and self._parked
            and not self.appending
            and not self._waiting
            and self._session.log.extent_bytes <= FORESEE_BYTES_MAX
        ):
            self._append_at_once()

    def wake(self) -> None:
        """Have ``run`` look at what there is to do."""
        self._wake.set()

    def resume(self) -> None:
        """A new task is about to run: what the old one was at is done again."""
        self._parked = False
        if not self.appending:  # this goes on without it
            self._waiting = self._under_way + self._waiting
            self._under_way = []
        self._wake.set()

    def give_up(self) -> list[Done]:
        """Forget who waits; returns them."""
        waiting = self._under_way + self._waiting
        self._under_way, self._waiting = [], []
        return waiting

    def _begin(self) -> None:
        if self._parked and not self.appending and self._waiting:
            if self._session.log.empty and self._needs_no_block():
                self._under_way, self._waiting = self._waiting, []
                with self._session.answers_together():
                    self._end(None)
            elif not self._append_at_once():
                self._wake.set()

    def _end(self, error: TorusError | None) -> None:
        flushed, self._under_way = self._under_way, []
        for done in flushed:
            done(error)

    def _needs_no_block(self) -> bool:
        """Whether the journal alone can make durable what was acknowledged."""
        file = self._session.file
        return (
            self._may_journal()
            and file.failure is None
            and not file.layers.any_full
            and not self._waits_for_blocks()
        )

    def _waits_for_blocks(self) -> bool:
        """Whether a flush has to wait for blocks to be durable.

        For those that the next record names; and for those that this client does not keep: should
        all nodes that have one crash, it could not be read until the volume is opened anew.
        """
        unsynced = self._session.file.unsynced
        return bool(unsynced) and (
            any(ref in unsynced for ref in self._session.log.refs())
            or any(stored.kept is None for stored in unsynced.values())
        )

    # -- by callbacks ------------------------------------------------------------------------------

    def _append_at_once(self) -> bool:
        """Begin a flush that is nothing but a record of extents; whether it is one."""
        session = self._session
        changes = session.log
        if changes.empty or not self._needs_no_block() or not changes.fits_one_record:
            return False
        (record,) = self._cut()
        self._under_way, self._waiting = self._waiting, []
        self.appending = True
        self.appended_at = session.system.loop.time()
        session.journal.append_soon(changes.seq, record, self._appended)
        return True

    def _appended(self, error: TorusError | None) -> None:
        session = self._session
        self.appending = False
        if isinstance(error, Fenced):
            session.log.needs_commit = True
            self._failed(error)
            self._end(error)
        elif error is not None or session.file.failure is not None:
            # Nothing vouches for what was in the record, until a commit does.
            session.log.needs_commit = True
            if error is not None:
                log.info("volume %s: committing instead of journaling: %s", session.name, error)
            self._waiting = self._under_way + self._waiting
            self._under_way = []
        else:
            flushed, self._under_way = self._under_way, []
            self._begin()  # the members can be at work while these are told
            with session.answers_together():
                for done in flushed:
                    done(None)
            return
        self._begin()

    # -- as a task ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Flush whenever that is asked for and needs more than a record."""
        while True:
            while not self._waiting or self.appending:
                self._wake.clear()
                self._parked = True
                await self._wake.wait()
            self._parked = False
            self._under_way, self._waiting = self._waiting, []
            error: TorusError | None = None
            try:
                await self._flush()
            except TorusError as failed:
                error = failed
                self._failed(failed)
            self._end(error)

    def _failed(self, error: TorusError) -> None:
        log.warning("volume %s: flush failed: %s", self._session.name, error)
        if isinstance(error, Fenced):
            self._session.file.fail(error)

    async def _flush(self) -> None:
        """Make everything acknowledged so far durable: by the journal, or else by a commit."""
        session = self._session
        if session.file.failure is not None:
            raise anew(session.file.failure)
        changes = session.log
        # Otherwise a record may be replayed over what a newer head has.
        told = changes.empty and (not changes.waits_for_head or changes.seq == session.covered_seq)
        if (told and session.committer.clean) or await self._flush_by_journal():
            return
        if self._no_commit:
            raise BlockUnavailable(
                "the journal has not all of it"
                if session.journal.active
                else f"there is no journal: {session.journal.broken or 'none was begun'}"
            )
        committed: asyncio.Future[TorusError | None] = session.system.loop.create_future()

        def done(error: TorusError | None) -> None:
            if not committed.done():
                committed.set_result(error)

        session.commit_soon(done)
        error = await committed
        if error is not None:
            raise error

    def _may_journal(self) -> bool:
        session = self._session
        grows = not (session.log.empty or self._no_commit)
        if grows and session.commit_failed and session.journal.is_large:
            return False  # it would fill up, and with it the members' room for other volumes
        return session.journal.active and not session.log.waits_for_head

    def _cut(self) -> list[list[Buffer]]:
        """Make records of all that was not told yet."""
        changes, file = self._session.log, self._session.file
        for ref in changes.refs():
            file.fresh.pop(ref, None)  # from here on a record may name it
        return changes.cut()

    def _pays_to_journal(self) -> bool:
        """Whether the extents that were not told are to go to the journal, or else into blocks."""
        changes, journal = self._session.log, self._session.journal
        size = changes.extent_bytes
        if size <= SPARSE_BYTES_MIN:
            return True
        whole = changes.extent_blocks * self._session.file.block_size
        return size * SPARSE_RATIO <= whole and journal.size + size <= journal.size_max

    async def _flush_by_journal(self) -> bool:
        """Flush by appending records; whether that was possible.

        The blocks that they name are made durable first. From the cut of the records to their
        acknowledgement nothing else vouches for what is in them: whatever goes wrong in between
        makes the next flush a commit.

        Raises:
            OutOfSpace, BlockUnavailable: what was written cannot be stored at all.
            Fenced: another session has begun.
        """
        session = self._session
        changes, file = session.log, session.file
        if not self._may_journal():
            return False
        for _ in range(WRITE_OUT_ROUNDS):
            if self._no_commit:
                break
            # Whole blocks bypass the journal.
            await session.committer.write_out(file.layers.full())
            if self._pays_to_journal():
                break
        else:
            return False
        if not self._may_journal():
            return False
        if changes.empty:
            return True
        # A sync is of all that a node has, and when all are durable the next ones can be kept.
        covered = dict(file.unsynced) if self._waits_for_blocks() else {}
        records = self._cut()
        last = changes.seq
        acknowledged = False
        changes.held = True
        try:
            await session.committer.make_durable(covered)
            changes.held = False
            await session.journal.append(last, *records)
            acknowledged = file.failure is None
        except Fenced:
            raise
        except (TorusError, Superseded) as error:
            log.info("volume %s: committing instead of journaling: %s", session.name, error)
        finally:
            changes.held = False
            if not acknowledged:
                changes.needs_commit = True
        return acknowledged
