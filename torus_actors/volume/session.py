"""A session: one client's exclusive use of a volume, from attach to detach.

Owns the file, its caches and everything acknowledged but not yet durable, so it outlives the volume
actor that drives it. Requests come in as the NBD server's batches; answers leave through an outbox
that is emptied once a turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torus_actors.errors import (
    Again,
    BlockUnavailable,
    Closed,
    Fenced,
    OutcomeUnknown,
    OutOfSpace,
    Overloaded,
    TorusError,
    anew,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import Head, Reader, SnapshotRequest, VolumeRecord
from torus_actors.metadata.service import MetadataService
from torus_actors.model import blocksets
from torus_actors.model.inode_tree import CommitPlan
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Op, Piece, Reply, Request
from torus_actors.runtime import ActorSystem
from torus_actors.volume.block_status import BlockStatus
from torus_actors.volume.change_log import Replay, empty_record
from torus_actors.volume.commit import Committer
from torus_actors.volume.file import File, Spawn
from torus_actors.volume.flushing import Flusher
from torus_actors.volume.heads import Heads
from torus_actors.volume.journal import (
    COMMIT_AGE_S,
    COMMIT_AGE_S_MAX,
    SessionJournal,
)
from torus_actors.volume.keeper import Keeper
from torus_actors.volume.prefetch import Prefetch
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.read_side import ignore

log = logging.getLogger(__name__)

MINTED = 64
"""INode numbers taken from the metadata at a time: one transaction for that many commits."""

IDLE_FLUSH_S = 5.0
"""Writes that nobody flushed are flushed once the volume was quiet for this long."""


IDLE_CHECK_S = 1.0

OUTBOX_RETRY_S = 0.05
"""Answers that the NBD server has no room for are offered again after this long."""

YIELD_S = 0.5
"""So long after a flush that was a record, blocks are still put gently: the next one is due."""

YIELD_SHARE = 1.5
"""Of the size at which a journal is folded: if it is larger while that goes on, blocks are put as
fast as they can be. Its members have room for twice that size."""

UNSYNCED_MAX = 2048
"""Blocks that may be stored and not committed before a commit is due without being asked for: what
they replace cannot be collected before it."""


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Bounds of one client's memory, bytes."""

    read_bytes: int = 256 << 20
    write_bytes: int = 256 << 20


class Session:
    """See the module; made by ``open_session``.

    Args:
        answers_to: the actor whose ``replies`` takes the answers to requests.

    Attributes:
        name, volume_id, size: of the volume.
        epoch: of this session; 0 for a read-only one, which has no lock.
        holder: who holds the lock, for people.
    """

    def __init__(
        self,
        system: ActorSystem,
        meta: MetadataService,
        record: VolumeRecord,
        *,
        epoch: int,
        holder: str,
        head_revision: int,
        inodes: list[int],
        blockset: blocksets.Blockset,
        block_size: int,
        read_cache: ReadCache,
        write_cache_bytes: int,
        journal: SessionJournal,
        answers_to: str = "nbd_server",
    ) -> None:
        self.system = system
        self.name = record.name
        self.volume_id = record.id
        self.size = record.size
        self.epoch = epoch
        self.holder = holder
        self._meta = meta
        self._inodes = inodes
        self._inode = inodes.pop(0) if inodes else 0
        self._next_index = 0
        self._minting = False
        self.file = File(
            system,
            name=record.name,
            size=record.size,
            block_size=block_size,
            blockset=blockset,
            read_cache=read_cache,
            write_cache_bytes=write_cache_bytes,
            next_ref=self._data_ref,
            read_only=not epoch,
        )
        self.file.commit_soon = lambda: self.commit_soon(lambda _: None)
        self.journal = journal
        self.log = self.file.layers.log
        self.heads = Heads(
            meta,
            journal,
            self.log,
            name=record.name,
            volume_id=record.id,
            epoch=epoch,
            revision=head_revision,
        )
        self.covered_seq = 0
        """Number of the last record that is known to be in a head."""
        self._covering_seq = 0
        self._blank_seq = 0
        """Number of a record that tells nothing, the next one after what a head covered."""
        self.covered_size = record.size
        """Bytes of the volume that are known to be in a head. What it has been made larger by is
        zeros, and some of them may be in the layers alone: over the rest of a block, which still
        has what was cut off before."""
        self.committer = Committer(
            system,
            self.file,
            self._inode_ref,
            self._next_inode,
            self._record_head,
            self.heads.reach,
        )
        self.keeper = Keeper(
            meta, self.file, self.committer, self.size, epoch, self._commit, self._revision_of_head
        )
        self._spawn: Spawn | None = None
        self._replies = system.actor(answers_to).replies
        self._outbox: dict[int, list[Reply]] = {}
        self._emptying = False
        self._retrying = False
        self._block_status = BlockStatus(self.file, self._answer)
        self._prefetch = Prefetch(self.file, self._answer)
        self.flusher = Flusher(self)
        self.file.yields = self._flushes_go_first
        self.commit_failed = False
        """Whether the last commit could not store what was written."""
        self._commit_waiting: list[Callable[[TorusError | None], None]] = []
        self._committing: list[Callable[[TorusError | None], None]] = []
        self._commit_wake = asyncio.Event()
        self.closed = False
        """Whether its lock, or its reader's record, is being given up."""
        self.close_error: TorusError | None = None
        """What was lost when it was closed, for whoever is to tell it."""
        self.reader: Reader | None = None
        """What keeps from being collected what is read here, if it is opened only for that."""
        self.replaying: Replay | None = None
        """The replay, until a head of this session has all of it. One that is recorded before says
        so, or the last session's journal would count as replayed. One that is not certain is to be
        committed before the first read, also if it has no record: another one might end with fewer
        of those that nobody acknowledged, or with more."""
        self.follows_crash = False
        """Whether the session before may have put blocks that no head names. They are garbage from
        this session's first head on, and until then no collector may take them for that."""
        self.lost_journal = ""
        """Why the journal of the session before could not be read, if this one gives it up."""
        self._handlers: dict[int, Callable[[int, Request, list[Reply]], None]] = {
            Op.READ: self._on_read,
            Op.WRITE: self._on_write,
            Op.FLUSH: self._on_flush,
            Op.TRIM: self._on_zero,
            Op.WRITE_ZEROES: self._on_zero,
            Op.CACHE: self._on_cache,
            Op.BLOCK_STATUS: self._on_block_status,
        }

    # -- names of blocks ---------------------------------------------------------------------------

    def _data_ref(self) -> BlockRef:
        self._next_index += 1
        return BlockRef.of(self.volume_id, self._inode, self._next_index)

    def _inode_ref(self) -> BlockRef:
        self._next_index += 1
        return BlockRef.of(self.volume_id, self._inode, self._next_index, BlockType.INODE)

    def _next_inode(self) -> int:
        """Go over to the next INode number and return it: blocks put from now on have it.

        Those with a lower one are in the map by now, or nobody's.

        With the metadata away the numbers may run out: the last one is then used on, which is safe,
        because an index is never given out twice, and only makes collecting coarser.
        """
        if self._inodes:
            self._inode = self._inodes.pop(0)
            self._next_index = 0
        if len(self._inodes) < MINTED // 2 and not self._minting and self._spawn is not None:
            self._minting = True
            self._spawn(self._mint())
        return self._inode

    async def _mint(self) -> None:
        try:
            first = await self._meta.mint_inode(self.volume_id, MINTED)
            self._inodes += range(first, first + MINTED)
        except TorusError as error:
            log.debug("volume %s: INode numbers: %s", self.name, error)
        finally:
            self._minting = False

    # -- life --------------------------------------------------------------------------------------

    def resume(self, spawn: Spawn) -> None:
        """Go on under a (new) volume actor."""
        self._spawn = spawn
        self._minting = False
        self.flusher.resume()
        self._commit_waiting = self._committing + self._commit_waiting
        self._committing = []
        self.keeper.resume()
        self.file.resume(spawn)
        if self.epoch:
            spawn(self.flusher.run())
            spawn(self._committer_loop())

    def fence(self, error: Fenced) -> None:
        """Another session has begun: nothing is written any more."""
        self.file.fail(error)
        self.flusher.wake()
        self._commit_wake.set()

    def flush_soon(self, done: Callable[[TorusError | None], None]) -> None:
        """Make everything acknowledged so far durable, then call ``done``."""
        if self.closed:
            done(self.file.failure or Closed(f"volume {self.name} is closed"))
            return
        self.flusher.ask(done)

    def foresee(self, writes: int) -> None:
        """So many writes are about to be answered; what a flush needs then may leave after that."""
        self.system.loop.call_soon(self.flusher.wrote, writes)

    def commit_soon(self, done: Callable[[TorusError | None], None]) -> None:
        """Fold everything acknowledged so far into blocks and a new head, then call ``done``."""
        if self.closed:
            done(self.file.failure or Closed(f"volume {self.name} is closed"))
            return
        self._commit_waiting.append(done)
        self._commit_wake.set()

    def keep_in_journal(self, done: Callable[[TorusError | None], None]) -> None:
        """Have the journal keep what was acknowledged: the session ends, and cannot commit.

        Who waits for a commit is told that there is none.
        """
        waiting, self._committing, self._commit_waiting = (
            self._committing + self._commit_waiting,
            [],
            [],
        )
        error = BlockUnavailable(f"volume {self.name} is being closed, and cannot be stored")
        for each in waiting:
            each(error)
        self.flusher.ask_without_commit(done)

    def close(self) -> None:
        """Take no more requests; commit before. A flush that has not ended by now fails."""
        self.closed = True
        self.file.close()
        waiting = self.flusher.give_up() + self._committing + self._commit_waiting
        self._committing, self._commit_waiting = [], []
        for done in waiting:
            done(self.file.failure)

    async def _committer_loop(self) -> None:
        """One commit after the other: when asked for, and when the journal is large or old."""
        while True:
            self.journal.look_for_others()
            if self.heads.owed is None:
                self.keeper.ask_again()
            if self.keeper.wanted and self.file.failure is None:
                await self._take_snapshots()
                continue
            if not self._commit_waiting:
                self._commit_wake.clear()
                try:
                    async with asyncio.timeout(IDLE_CHECK_S):
                        await self._commit_wake.wait()
                except TimeoutError:
                    self._flush_if_quiet()
                    await self._pay()
                    if not self._commit_is_due():
                        continue
                if self.keeper.wanted and self.file.failure is None:
                    continue
            self._committing, self._commit_waiting = self._commit_waiting, []
            error: TorusError | None = None
            try:
                await self._commit()
            except TorusError as failed:
                error = failed
                log.warning("volume %s: commit failed: %s", self.name, failed)
                if isinstance(failed, Fenced):
                    self.file.fail(failed)
            committed, self._committing = self._committing, []
            for done in committed:
                done(error)

    def snapshots_wanted(self, requests: list[SnapshotRequest]) -> None:
        """These requests for snapshots of the volume are there now."""
        self.keeper.want(requests)
        if self.keeper.wanted:
            self._commit_wake.set()

    async def _take_snapshots(self) -> None:
        try:
            await self.keeper.take()
        except Fenced as failed:
            self.file.fail(failed)

    def _revision_of_head(self) -> int:
        return self.heads.revision

    async def _pay(self) -> None:
        """Store in the metadata what only the journal has, if it is back.

        Not as long as there is more to replay: the head would not say how much.
        """
        if self.file.failure is None and self.replaying is None:
            try:
                await self.heads.pay()
            except Fenced as failed:
                self.file.fail(failed)

    @property
    def has_unflushed(self) -> bool:
        """Whether something was written that may be in no record and no head that counts."""
        if not self.file.was_written or self.committer.clean:
            return False
        return not self.log.empty or self.log.waits_for_head or self.flusher.busy

    @property
    def all_covered(self) -> bool:
        """Whether the head in the metadata has all that the journal has, or the last one had."""
        if self.replaying is not None or self.heads.owed is not None or self.follows_crash:
            return False
        return self.log.seq == max(self.covered_seq, self._blank_seq)

    def _commit_is_due(self) -> bool:
        journal = self.journal
        if self.file.failure is not None:
            return False
        if journal.is_outdated and self.heads.owed is None:
            return True
        if self.committer.clean:
            return False
        now = self.system.loop.time()
        quiet = now - self.file.written_at > IDLE_FLUSH_S
        old = now - journal.began_at > (COMMIT_AGE_S if quiet else COMMIT_AGE_S_MAX)
        return bool(
            journal.is_large or (journal.size and old) or len(self.file.unsynced) > UNSYNCED_MAX
        )

    def _flushes_go_first(self) -> bool:
        """Whether blocks are to leave the disks to the records of flushes.

        Not while there are none; nor when the journal grows too fast for a slow commit.
        """
        journal = self.journal
        return (
            self.system.loop.time() - self.flusher.appended_at < YIELD_S
            and journal.size < YIELD_SHARE * journal.size_wanted
        )

    def _flush_if_quiet(self) -> None:
        quiet = self.system.loop.time() - self.file.written_at > IDLE_FLUSH_S
        told = self.journal.active and self.log.empty and not self.log.needs_commit
        waiting = self.flusher.busy or self.file.failure is not None
        if quiet and not told and not waiting and not self.committer.clean:
            self.flush_soon(lambda _: None)

    async def _commit(self) -> None:
        """Commit, then cut the journal, or begin one."""
        changes, journal = self.log, self.journal
        begins = not journal.active
        if begins:
            # What is in the layers now will be in the head; what comes from here on is told by the
            # records that follow it.
            changes.start(changes.seq)
        # What no record tells is told by the head: until that is recorded, no flush may do without.
        changes.committing, changes.needs_commit = changes.needs_commit, False
        self._covering_seq = changes.seq
        covering_bytes = journal.size
        # A head may be wanted though nothing in the file has changed: for records that none covers;
        # because the metadata does not have the last one yet, and a new ensemble would hide it; so
        # that the last session's journal is not replayed once more; so that what a crashed one put
        # is collected; because the volume is to be smaller, is larger than the last one says, or
        # has none, without which there is no journal; or because a journal with other members takes
        # the place of this one, which needs the metadata too, and is left if they are away.
        heads = self.heads
        force = (
            self._covering_seq != self.covered_seq
            or bool(heads.owed or self.replaying or self.follows_crash or heads.resizing)
            or self.covered_size != self.size
            or not heads.revision
            or journal.is_outdated
        )
        try:
            await self.committer.commit(force)
        except (OutOfSpace, BlockUnavailable, Fenced):
            # No head has all of it. What records could tell before, they can yet.
            changes.needs_commit |= changes.committing or begins
            self.commit_failed = True
            raise
        except BaseException:
            changes.needs_commit = True
            raise
        finally:
            changes.committing = False
        self.commit_failed = False
        self.covered_seq = self._covering_seq
        self.covered_size = self.size
        changes.in_head(self.covered_seq, self.committer.map_seq)
        self.replaying = None
        self.follows_crash = False
        if journal.active and (not journal.is_outdated or heads.owed is not None):
            journal.cut(self.covered_seq, covering_bytes)
            return
        if changes.seq != self.covered_seq:
            # The journal was lost while this ran, or is outdated. Records that came meanwhile may
            # be acknowledged, and only the old members have them: they are to be asked until a
            # head covers those.
            changes.needs_commit = True
            self.commit_soon(lambda _: None)
            return
        try:
            await journal.form(self.covered_seq)
        except Fenced:
            raise
        except TorusError as error:
            if journal.active:
                log.info("volume %s: its journal stays as it is: %s", self.name, error)
                journal.cut(self.covered_seq, covering_bytes)
                return
            changes.needs_commit = True
            log.info("volume %s: no journal for now: %s", self.name, error)
            return
        if journal.in_doubt and changes.seq == self.covered_seq:
            # A crash before the first flush must not leave the next session without a member that
            # vouches for what it has. It is the next one after what the head covers: one that came
            # while there was no journal is committed first. Though it tells nothing, no head covers
            # it yet, and it must not be cut before one does: what follows it would lack it.
            changes.seq += 1
            self._blank_seq = changes.seq
            journal.append_soon(changes.seq, empty_record(), ignore)

    async def _record_head(self, plan: CommitPlan, inode: int) -> None:
        """Store the new head, however long the metadata is away; one of a part, if it is not.

        Raises:
            Again: it is, and the head of a part was not stored.
            OutcomeUnknown: nobody knows what became of that.
            Fenced: another session has begun.
        """
        complete = self.committer.complete
        head = Head(
            inode=inode,
            root=bytes(plan.root.ref),
            root_crc=plan.root.crc,
            size=self.size if complete else self.covered_size,
            epoch=self.epoch,
            extra=self.file.blockset.marshal(plan.root),
            journal_seq=self._covering_seq if complete else self.covered_seq,
            map_seq=self.committer.map_seq,
        )
        if not complete and (replay := self.replaying) is not None:
            # All blocks that its records name are in the map, or newer ones.
            head = dataclasses.replace(
                head, journal_seq=replay.covered, map_seq=replay.last, replays=replay.epoch
            )
        backoff = Backoff(self.system.rng, max_s=1.0)
        while True:
            try:
                await self.heads.store(head)
                return
            except Again as error:
                if not complete:
                    # It is to make room, which may come otherwise; this may take hours.
                    if isinstance(error.__cause__, (Again, OutOfSpace)):
                        raise
                    raise OutcomeUnknown(str(error)) from error
                log.info("volume %s: waiting for the metadata: %s", self.name, error)
            # What a head does not cover, it cannot stand for in the journal.
            awaited = bool(self._committing or self._commit_waiting)
            if complete and await self.heads.keep_in_journal(head, awaited):
                if self.file.failure is not None:
                    raise anew(self.file.failure)
                return
            await backoff.wait()

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, conn: int, requests: list[Request]) -> None:
        """Take a batch of requests of one NBD connection."""
        replies: list[Reply] = []
        handlers = self._handlers
        for request in requests:
            try:
                handlers[request.op](conn, request, replies)
            except TorusError as error:
                replies.append(Reply.failed(request, error))
            except BaseException:
                # A bug, of which the actor dies. Each request is answered once all the same: the
                # message is handed to the successor, so nothing may be left in it.
                rest = requests[requests.index(request) :]
                requests.clear()
                bug = BlockUnavailable("the volume failed on this or on an earlier request")
                self._send(conn, replies + [Reply.failed(each, bug) for each in rest])
                raise
        if replies:
            self._send(conn, replies)
            if requests[0].op == Op.WRITE:
                self.foresee(len(requests))

    def _send(self, conn: int, replies: list[Reply]) -> None:
        try:
            self._replies.tell(conn, replies)
        except Overloaded:
            self._outbox.setdefault(conn, []).extend(replies)
            if not self._retrying:
                self._retrying = True
                self.system.loop.call_later(OUTBOX_RETRY_S, self._retry_outbox)

    def _answer(self, conn: int, reply: Reply) -> None:
        """Answer later than within ``submit``; gathers what one turn of the loop brings."""
        self._outbox.setdefault(conn, []).append(reply)
        if not self._emptying:
            self._emptying = True
            self.system.loop.call_soon(self._empty_outbox)

    @contextlib.contextmanager
    def answers_together(self) -> Iterator[None]:
        """What is answered meanwhile leaves at the end, and not a turn of the loop later."""
        nested, self._emptying = self._emptying, True
        try:
            yield
        finally:
            self._emptying = nested
            if not nested:
                self._empty_outbox()

    def _empty_outbox(self) -> None:
        self._emptying = False
        outbox, self._outbox = self._outbox, {}
        for conn, replies in outbox.items():
            self._send(conn, replies)

    def _retry_outbox(self) -> None:
        self._retrying = False
        self._empty_outbox()

    def _on_read(self, conn: int, request: Request, replies: list[Reply]) -> None:
        pieces = self.file.read_at(
            request.offset, request.length, partial(self._read_done, conn, request)
        )
        if pieces is not None:
            replies.append(Reply(request, buffers=pieces))

    def _read_done(
        self, conn: int, request: Request, error: TorusError | None, pieces: Sequence[Piece]
    ) -> None:
        self._answer(
            conn, Reply(request, buffers=pieces) if error is None else Reply.failed(request, error)
        )

    def _on_write(self, conn: int, request: Request, replies: list[Reply]) -> None:
        assert request.data is not None
        done = partial(self._write_done, conn, request)
        if self.file.write_at(request.offset, request.data, done):
            if request.fua:
                self.flush_soon(partial(self._flush_done, conn, request))
            else:
                replies.append(Reply(request))

    def _on_zero(self, conn: int, request: Request, replies: list[Reply]) -> None:
        done = partial(self._write_done, conn, request)
        keep = request.op == Op.WRITE_ZEROES and request.no_hole
        if keep and request.fast_zero:
            # Not by an exception: NotSupported is EINVAL everywhere else.
            text = "zeros that stay allocated are written like data"
            replies.append(Reply(request, Errno.ENOTSUP, text))
            return
        file = self.file
        if (
            file.zero_at(request.offset, request.length, keep, done)
            if request.op == Op.WRITE_ZEROES
            else file.trim_at(request.offset, request.length, done)
        ):
            if request.fua:
                self.flush_soon(partial(self._flush_done, conn, request))
            else:
                replies.append(Reply(request))

    def _write_done(
        self, conn: int, request: Request, error: TorusError | None, _: Sequence[Piece]
    ) -> None:
        if error is not None:
            self._answer(conn, Reply.failed(request, error))
        elif request.fua:
            self.flush_soon(partial(self._flush_done, conn, request))
        else:
            self._answer(conn, Reply(request))

    def _on_flush(self, conn: int, request: Request, replies: list[Reply]) -> None:
        if not self.epoch:
            replies.append(Reply(request))  # read-only: there is nothing to flush
        else:
            self.flush_soon(partial(self._flush_done, conn, request))

    def _flush_done(self, conn: int, request: Request, error: TorusError | None) -> None:
        self._answer(conn, Reply(request) if error is None else Reply.failed(request, error))

    def _on_cache(self, conn: int, request: Request, replies: list[Reply]) -> None:
        self._prefetch.ask(conn, request)

    def _on_block_status(self, conn: int, request: Request, replies: list[Reply]) -> None:
        self._block_status.ask(conn, request)

    def status(self) -> dict[str, Any]:
        """What ``torusctl status`` shows of an open volume."""
        file = self.file
        return {
            "name": self.name,
            "size": self.size,
            "epoch": self.epoch,
            "commits": self.heads.recorded,
            "head": "metadata" if self.heads.owed is None else "journal",
            "journal_bytes": self.journal.size,
            "journal": "active" if self.journal.active else self.journal.broken or "none yet",
            "dirty_bytes": file.layers.size,
            "unsynced_blocks": len(file.unsynced),
            "read_cache_bytes": file.cache.size,
            "read_cache_hits": file.cache.hits,
            "read_cache_misses": file.cache.misses,
            "fenced": isinstance(file.failure, Fenced),
            "failure": str(file.failure or file.put_error or ""),
        }
