"""Opening and closing a volume: lock, epoch, fence, replay; and the other way round.

A crash at any point leaves a lock that its lease takes along, and a journal that the next session
fences and replays.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import (
    Again,
    BlockUnavailable,
    Closed,
    Corruption,
    DeadlineExceeded,
    Fenced,
    Invalid,
    LeaseNotFound,
    OutcomeUnknown,
    OutOfSpace,
    TorusError,
    anew,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import Head, Reader, Snapshot, VolumeRecord
from torus_actors.metadata.service import MetadataService
from torus_actors.model import blocksets
from torus_actors.model.refs import BlockRef
from torus_actors.runtime import ActorSystem
from torus_actors.volume.change_log import Replay
from torus_actors.volume.journal import SessionJournal
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.recovery import (
    RECOVER_PATIENCE_S,
    Unreadable,
    is_closed,
    recover,
)
from torus_actors.volume.session import MINTED, CacheSizes, Session

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTACH_PATIENCE_S = 10.0
"""How long opening a volume waits for a lease that holds."""

DETACH_PATIENCE_S = 5.0
"""How long closing a volume waits for the metadata; then the lock is given up in the background."""

KEEP_S = 2.0
"""How soon it is noticed that a lease was replaced: well within the grace of collectors."""

CLOSE_FLUSH_S = 60.0
"""How long the last commit of a volume may take."""

CLOSE_JOURNAL_S = 20.0
"""How long what that could not store may take to go to the journal."""

_MAY_BE_DONE = (asyncio.CancelledError, OutcomeUnknown)
"""After which what was to be put into the metadata may be there, or come yet."""


async def open_session(
    system: ActorSystem,
    meta: MetadataService,
    name: str,
    *,
    holder: str,
    block_size: int,
    block_spec: str,
    read_cache: ReadCache,
    write_cache_bytes: int,
    view: ClusterView,
    read_only: bool = False,
    snapshot: str | None = None,
    shrink_to: int | None = None,
    may_lose_journal: bool = False,
    answers_to: str = "nbd_server",
) -> Session:
    """Attach a volume: fence the session before, and take over what its journal holds.

    With a ``snapshot``, read-only, what is kept under that name is opened instead. With
    ``shrink_to`` bytes, to write, the session cuts off what lies behind: its first head does. With
    ``may_lose_journal`` a journal that all members have lost, or left the ring with, counts as
    empty from its first head on.
    Requests are answered to the actor ``answers_to``.

    Raises:
        NotExist: there is no such volume or snapshot.
        Locked: another client has it open; the text says who.
        Again: the metadata cannot be reached.
        BlockUnavailable: no member of the last session's journal can be reached.
        Fenced: another client opened it in the meantime.
        Invalid: a snapshot is to be written to, or a volume shrunk to more than it has.
    """
    record = await meta.volume(name)
    epoch = lease = revision = journal_revision = 0
    inodes: list[int] = []
    reader: Reader | None = None
    replay = Replay()
    follows_crash = False
    lost_journal = ""
    if snapshot is not None and not read_only:
        raise Invalid(f"snapshot {snapshot} of volume {name} can only be read")
    if not read_only:
        epoch, lease = await attach(system, meta, record.id, holder)
    try:
        if not read_only:
            # Before the lock was taken another tool may have cut it, or gone back to a snapshot:
            # what a session of the former size flushed behind the end would be cut off later.
            record = await meta.volume_by_id(record.id)
            if shrink_to is not None:
                if shrink_to > record.size:
                    raise Invalid(f"volume {name} has {record.size} bytes, less than {shrink_to}")
                record = dataclasses.replace(record, size=shrink_to)
            first = await meta.mint_inode(record.id, MINTED)
            inodes = list(range(first, first + MINTED))
            head, revision = await meta.head(record.id)
            journal, journal_revision = await meta.journal(record.id)
            follows_crash = not is_closed(journal, epoch)
            try:
                replay = await recover(system, record.id, journal, epoch, head)
            except Unreadable as error:
                if not may_lose_journal:
                    raise
                for member in error.silent:
                    if member in view.ring.members:
                        raise BlockUnavailable(
                            f"peer {member[:8]} may have the journal of volume {name} yet: "
                            f"{error.remedy}, or if it is lost for good: torusctl peer remove "
                            f"{member[:8]}"
                        ) from error
                lost_journal = str(error)
                replay.certain = False  # so that a head is recorded before anything is read
        elif snapshot is None:
            newest = await _read_newest(system, meta, record.id, holder)
            record, reader, lease, head, replay = newest
        else:
            kept = await meta.snapshot(record.id, snapshot)
            record = dataclasses.replace(record, size=kept.size or record.size)
            nonce = meta.new_nonce()
            reading = partial(meta.begin_reading_snapshot, kept, holder, nonce=nonce)
            begin = partial(_begin_reading, system, meta, record.id, nonce, reading)
            reader, lease = await _under_lease(system, begin)
            head = Head.decode(kept.head) if kept.head else None
        head = replay.head or head
        nblocks = -(-record.size // block_size)
        if head is None:
            blockset = blocksets.create_blockset(block_spec, nblocks)
        else:
            blockset = blocksets.unmarshal_blockset(head.extra)
        session = Session(
            system,
            meta,
            record,
            epoch=epoch,
            holder=holder,
            head_revision=revision,
            inodes=inodes,
            blockset=blockset,
            block_size=block_size,
            read_cache=read_cache,
            write_cache_bytes=write_cache_bytes,
            journal=SessionJournal(
                system,
                meta,
                view,
                volume_id=record.id,
                epoch=epoch,
                revision=journal_revision,
                replay_bytes=write_cache_bytes,
            ),
            answers_to=answers_to,
        )
        # The map of a head of a part may be longer than that says.
        if head is not None and (head.size, blockset.length) != (record.size, nblocks):
            session.covered_size = min(head.size, record.size)
            session.file.size = head.size
            await session.file.truncate(record.size)
        session.heads.resizing = shrink_to
        # The part of a head that made the volume smaller cut what the records have behind it, too.
        end = session.covered_size if head is not None and head.replays else record.size
        await _apply(session, replay, end)
        session.replaying = replay if replay.records or not replay.certain else None
        session.follows_crash = follows_crash
        session.lost_journal = lost_journal
        if replay.head is not None:
            session.heads.owed = replay.head  # until this session's first one takes its place
        if epoch:
            # The replay may have taken long, on nodes that are slow to answer. Whoever has begun a
            # session meanwhile has written what this one does not know of.
            _, begun = await meta.lock_status(record.id)
            if begun != epoch:
                raise Fenced(f"session {begun} of volume {name} began while it was being opened")
        # If another lease was made meanwhile, it does not know of what hangs on this one. From the
        # last look at it on the heartbeat knows of the session: nothing may be waited for between.
        while True:
            now = await system.actor("heartbeat").lease.remote(timeout_s=ATTACH_PATIENCE_S)
            if now == lease:
                break
            lease = now
            if reader is not None:
                await meta.keep_reading(reader, lease)
            else:
                await meta.renew_lock(record.id, epoch, holder, lease)
        session.reader = reader
    except BaseException:
        if epoch:
            detach_later(system, meta, record.id, epoch)
        if reader is not None:
            end_reading_later(system, meta, reader.volume_id, reader.nonce)
        raise
    return session


async def _begin_reading(
    system: ActorSystem,
    meta: MetadataService,
    volume_id: int,
    nonce: str,
    begin: Callable[[int], Coroutine[Any, Any, T]],
    lease: int,
) -> T:
    """Leave a reader's record; where nobody knows whether it was left, see that it is ended.

    Else it would keep what nobody reads for as long as this process lives.
    """
    beginning = system.loop.create_task(begin(lease))
    try:
        return await asyncio.shield(beginning)
    except _MAY_BE_DONE:
        end_reading_later(system, meta, volume_id, nonce, after=beginning)
        raise


async def _read_newest(
    system: ActorSystem, meta: MetadataService, volume_id: int, holder: str
) -> tuple[VolumeRecord, Reader, int, Head | None, Replay]:
    """The volume's head, and what its journal has beyond it, for somebody who only reads.

    A reader leaves the writer alone: should that commit, or another session begin, meanwhile, both
    are read again. A head with the records of a later journal would be a mix of new and old.

    Returns:
        The volume's record, of the size that goes with the head; the reader's record, which keeps
        what it reads; the lease that this hangs on; head, replay.
    """
    loop = system.loop
    end = loop.time() + RECOVER_PATIENCE_S
    backoff = Backoff(system.rng, first_s=0.02, max_s=1.0)
    reader: Reader | None = None
    nonce = meta.new_nonce()
    begin = partial(meta.begin_reading, volume_id, holder, nonce=nonce)
    promised = 0
    try:
        while True:
            lease = await system.actor("heartbeat").lease.remote(timeout_s=ATTACH_PATIENCE_S)
            failure: TorusError | None = None
            try:
                begun = await _begin_reading(system, meta, volume_id, nonce, begin, lease)
                reader, revision = begun
                record = await meta.volume_by_id(volume_id)
                head = Head.decode(reader.head) if reader.head else None
                journal, journal_revision = await meta.journal(volume_id)
                replay = await recover(system, volume_id, journal, promised, head, patience_s=0.0)
                _, head_now = await meta.head(volume_id)
                _, journal_now = await meta.journal(volume_id)
                if (head_now, journal_now) == (revision, journal_revision):
                    reader = dataclasses.replace(reader, upto=replay.newest_inode)
                    await meta.keep_reading(reader, lease)
                    return record, reader, lease, head, replay
            except (BlockUnavailable, Fenced, LeaseNotFound) as error:
                failure = error  # also of records that a newer head has, or a newer session
            if isinstance(failure, Fenced):
                # A session that has committed nothing yet, and that may have died so. Whom its
                # number fences is over: a member has promised itself to a later one.
                _, promised = await meta.lock_status(volume_id)
            if not await backoff.wait(end):
                raise failure or BlockUnavailable("the head changes faster than it is read")
    except BaseException:
        if reader is not None:
            end_reading_later(system, meta, volume_id, nonce)
        raise


async def _apply(session: Session, replay: Replay, end: int) -> None:
    """Put what the last session had flushed and not committed back into the file.

    Args:
        session: of the file.
        replay: what that is.
        end: bytes of the volume that it may be in.
    """
    file, blockset = session.file, session.file.blockset
    for index, (ref, root, _) in replay.blocks.items():
        if index < blockset.length:
            await file.with_pages(partial(_enter, blockset, index, ref, root))
    for index, offset, length, buffer in replay.extents():
        if index >= blockset.length:
            continue
        length = min(length, end - index * file.block_size - offset)
        if length <= 0:
            continue  # the volume has become smaller
        if buffer is None:
            file.layers.zero(index, offset, length)
        else:
            file.layers.write(index, offset, memoryview(buffer)[:length])
    if replay.records:
        log.info("volume %s: %d journal records replayed", session.name, replay.records)


def _enter(blockset: blocksets.Blockset, index: int, ref: BlockRef | None, root: int) -> None:
    if ref is None:
        blockset.trim(index, index + 1)
    else:
        blockset.put(index, ref, root)


async def attach(
    system: ActorSystem, meta: MetadataService, volume_id: int, holder: str
) -> tuple[int, int]:
    """Take the lock; returns epoch and lease."""
    nonce = meta.new_nonce()

    async def take(lease: int) -> int:
        attaching = asyncio.ensure_future(meta.attach(volume_id, holder, lease, nonce))
        try:
            return await asyncio.shield(attaching)
        except _MAY_BE_DONE:
            # Whoever wanted the volume has died, or is told that it is not open. A lock that has
            # been taken, or is yet, would be nobody's.
            again = partial(meta.attach, volume_id, holder, lease, nonce)
            undoing = _undo_attach(system, meta, volume_id, attaching, again)
            _in_background(system, undoing)
            raise

    return await _under_lease(system, take)


async def _under_lease(system: ActorSystem, put: Callable[[int], Awaitable[T]]) -> tuple[T, int]:
    """Put something under this process's lease; returns what that gives, and the lease."""
    backoff = Backoff(system.rng, max_s=0.5)
    end = system.loop.time() + ATTACH_PATIENCE_S
    while True:
        lease = await system.actor("heartbeat").lease.remote(timeout_s=ATTACH_PATIENCE_S)
        try:
            return await put(lease), lease
        except LeaseNotFound:
            # It ran out, and the heartbeat has not noticed yet.
            if not await backoff.wait(end):
                raise


async def _undo_attach(
    system: ActorSystem,
    meta: MetadataService,
    volume_id: int,
    attaching: asyncio.Future[int],
    ask_again: Callable[[], Awaitable[int]],
) -> None:
    """Give up the lock of a call that nobody waits for, once it is known that there is one.

    A request that may still be under way fails when a later one of the same call has an answer.
    """
    backoff = Backoff(system.rng)
    attempt: Awaitable[int] = attaching
    while True:
        try:
            epoch = await attempt
            break
        except (Again, OutcomeUnknown, OutOfSpace, Corruption) as error:
            if attempt is attaching and isinstance(error, Again):
                return
            await backoff.wait()
            attempt = ask_again()
        except TorusError:
            return  # somebody else has it, or the lease has ended: no request can take it any more
    await detach(system, meta, volume_id, epoch)


async def detach(system: ActorSystem, meta: MetadataService, volume_id: int, epoch: int) -> None:
    """Give the lock up, however long the metadata is away: the lease would keep it for ever.

    Another session cannot be harmed: it has another epoch.
    """
    backoff = Backoff(system.rng)
    while True:
        try:
            await meta.detach(volume_id, epoch)
            return
        except (Fenced, Closed):
            return
        except TorusError:  # away, full or damaged: a person can mend that
            await backoff.wait()


def detach_later(
    system: ActorSystem, meta: MetadataService, volume_id: int, epoch: int
) -> asyncio.Task[None]:
    """Give the lock up in the background."""
    return _in_background(system, detach(system, meta, volume_id, epoch))


@contextlib.asynccontextmanager
async def kept_head(
    system: ActorSystem,
    meta: MetadataService,
    volume_id: int,
    holder: str,
    snapshot: Snapshot | None = None,
) -> AsyncIterator[Head | None]:
    """The head of a volume or snapshot, which leads to blocks that are not collected meanwhile.

    Raises:
        NotExist: the snapshot is gone.
    """
    nonce = meta.new_nonce()
    begin = partial(_begin_reading, system, meta, volume_id, nonce)
    if snapshot is None:
        newest = partial(meta.begin_reading, volume_id, holder, nonce=nonce)
        (reader, _), lease = await _under_lease(system, partial(begin, newest))
    else:
        kept = partial(meta.begin_reading_snapshot, snapshot, holder, nonce=nonce)
        reader, lease = await _under_lease(system, partial(begin, kept))
    keeping: asyncio.Task[None] | None = None
    try:
        if reader.upto:
            reader = dataclasses.replace(reader, upto=0)
            await meta.keep_reading(reader, lease)
        keeping = _in_background(system, _keep_reading(system, meta, reader, lease))
        yield Head.decode(reader.head) if reader.head else None
    finally:
        if keeping is not None:
            keeping.cancel()
        end_reading_later(system, meta, volume_id, nonce, keeping)


@contextlib.asynccontextmanager
async def kept_newest(
    system: ActorSystem, meta: MetadataService, volume_id: int, holder: str
) -> AsyncIterator[tuple[Head | None, Replay]]:
    """The volume's head, and what its journal has beyond it; no block of both is collected.

    Raises:
        BlockUnavailable, Fenced: no member of the journal can be read, or it changes all the time.
    """
    _, reader, lease, head, replay = await _read_newest(system, meta, volume_id, holder)
    keeping = _in_background(system, _keep_reading(system, meta, reader, lease))
    try:
        yield head, replay
    finally:
        keeping.cancel()
        end_reading_later(system, meta, volume_id, reader.nonce, keeping)


async def _keep_reading(
    system: ActorSystem, meta: MetadataService, reader: Reader, lease: int
) -> None:
    """Hang a reader's record on each new lease; for one that the heartbeat does not know of."""
    while True:
        await asyncio.sleep(KEEP_S)
        with contextlib.suppress(TorusError):
            now = await system.actor("heartbeat").lease.remote(timeout_s=ATTACH_PATIENCE_S)
            if now != lease:
                await meta.keep_reading(reader, now)
                lease = now


def end_reading_later(
    system: ActorSystem,
    meta: MetadataService,
    volume_id: int,
    nonce: str,
    after: asyncio.Future[Any] | None = None,
) -> asyncio.Task[None]:
    """Let what a reader read be collected, however long the metadata is away.

    Args:
        system: of the reader.
        meta: the metadata service.
        volume_id: what it read.
        nonce: of its record.
        after: what may be making the record still.
    """

    async def end() -> None:
        if after is not None:
            await asyncio.gather(after, return_exceptions=True)
        backoff = Backoff(system.rng)
        while True:
            try:
                await meta.end_reading(volume_id, nonce)
                return
            except (Fenced, Closed):
                return
            except TorusError:
                await backoff.wait()

    return _in_background(system, end())


def _in_background(system: ActorSystem, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = system.loop.create_task(coroutine)
    system.background.add(task)
    task.add_done_callback(system.background.discard)
    return task


async def close_session(session: Session, meta: MetadataService, served: bool = True) -> None:
    """Flush, then give the lock up.

    Where this is cut off it may be called again, and goes on: until the flush has ended the session
    is as it was, with its lock.

    Args:
        session: to be closed.
        meta: the metadata service.
        served: whether anybody may have written to it.

    Raises:
        TorusError: it could not be committed, nor could the journal keep what was written; the
            lock is given up all the same, what was not flushed is lost, as when a disk is
            unplugged.
    """
    if not session.closed:
        error = await _last_commit(session)
        if error is not None and served and session.file.failure is None:
            error = await _keep_in_journal(session, error)
        session.close_error = error
        session.close()
    error = session.close_error
    detaching: asyncio.Task[None] | None = None
    try:
        if session.epoch and error is None and session.all_covered:
            await session.journal.retire()
    finally:
        if session.epoch:
            detaching = detach_later(session.system, meta, session.volume_id, session.epoch)
        elif session.reader is not None:
            reader = session.reader  # it stays for the heartbeat, which may have put it back
            detaching = end_reading_later(session.system, meta, reader.volume_id, reader.nonce)
    if detaching is not None:
        await asyncio.wait([detaching], timeout=DETACH_PATIENCE_S)
    if error is not None:
        raise error


async def open_for_tool(
    system: ActorSystem,
    meta: MetadataService,
    view: ClusterView,
    name: str,
    *,
    holder: str,
    shrink_to: int | None = None,
    may_lose_journal: bool = False,
) -> Session:
    """A session that serves nobody, for `commit_and_close`; see `open_session`."""
    sizes = CacheSizes()
    return await open_session(
        system,
        meta,
        name,
        holder=holder,
        block_size=view.block_size,
        block_spec=view.gmd.block_spec,
        read_cache=ReadCache(sizes.read_bytes),
        write_cache_bytes=sizes.write_bytes,
        view=view,
        shrink_to=shrink_to,
        may_lose_journal=may_lose_journal,
    )


async def commit_and_close(session: Session, meta: MetadataService) -> None:
    """What a tool opened a session for, which serves nobody: its first head.

    Where this is cut off nothing is committed any more, and the lock is given up.

    Raises:
        TorusError: it could not be committed, or nobody knows.
    """
    tasks: set[asyncio.Task[Any]] = set()

    def spawn(work: Coroutine[Any, Any, Any]) -> None:
        task = session.system.loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    try:
        session.resume(spawn)
        try:
            # This commits, unless the session has been fenced.
            await close_session(session, meta, served=False)
        except TorusError:
            raise
        except BaseException:
            # Cut off: nobody is left who would close it, and this process's lease keeps the lock.
            session.close()
            detach_later(session.system, meta, session.volume_id, session.epoch)
            raise
    finally:
        for task in tasks:
            task.cancel()


async def _last_commit(session: Session) -> TorusError | None:
    """Commit what there is; returns why that failed."""
    if not session.epoch or session.file.failure is not None:
        return None
    committed: asyncio.Future[TorusError | None] = session.system.loop.create_future()

    def done(failed: TorusError | None) -> None:
        if not committed.done():
            committed.set_result(failed)

    session.commit_soon(done)
    try:
        async with asyncio.timeout(CLOSE_FLUSH_S):
            return await committed
    except TimeoutError:
        return BlockUnavailable("the last flush did not end in time")


async def _keep_in_journal(session: Session, failure: TorusError) -> TorusError | None:
    """Have the journal keep what could not be committed; returns why something is lost.

    Args:
        session: that is to be closed.
        failure: of its last commit.
    """
    replay = session.replaying
    if not session.file.was_written and (replay is None or replay.certain):
        told = "volume %s: closed without a commit (%s), as it was opened"
        log.warning(told, session.name, failure)
        return None  # what it was opened with is where it was found
    kept: asyncio.Future[TorusError | None] = session.system.loop.create_future()

    def done(failed: TorusError | None) -> None:
        if not kept.done():
            kept.set_result(failed)

    session.keep_in_journal(done)
    error: TorusError | None = DeadlineExceeded("the journal did not take it in time")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_JOURNAL_S):
            error = await kept
    if error is not None:
        lost = anew(failure)
        lost.args = (f"{failure}; what was not flushed before is lost: {error}",)
        return lost
    log.warning(
        "volume %s: closed without a commit (%s): its journal has all that was written, for "
        "whoever opens it next",
        session.name,
        failure,
    )
    return None
