"""The volumes actor: opens volumes when a client asks for them, and closes them after the last one.

Messages in: ``list_names``, ``open``, ``release``, ``status``. For each open volume it has one
child, a volume actor. Its death costs nothing: which volumes are open, and how often, outlives it,
and what it was opening for somebody, or closing, its successor closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.actors.volume import VolumeActor
from torus_actors.errors import Again, Fenced, NotExist, TorusError, WrongVolumeType, anew
from torus_actors.metadata.records import SnapshotRequest
from torus_actors.metadata.service import MetadataService
from torus_actors.runtime import Cell, ChildSpec, LoopActor, State, expose
from torus_actors.volume.change_log import Replay
from torus_actors.volume.opening import close_session, open_session
from torus_actors.volume.read_cache import ReadCache
from torus_actors.volume.session import CacheSizes, Session
from torus_actors.volume.snapshots import split_name

log = logging.getLogger(__name__)

NOT_CLOSED = "volumes_not_closed"
"""The heirloom that says, a line each, which volumes have lost writes as the process ended."""

VOLUME_KINDS = {"block"}
"""Kinds of volume that can be served."""

JOURNAL_S = 3.0
"""How long opening a volume waits until it has a journal; one may come later, with a flush."""

REPLAY_COMMIT_S = 30.0
"""How long opening a volume waits for the commit of what the last session left in its journal."""

CONCURRENCY = 1024
"""Openings at once: as many as may ask for one volume, so that no other one waits for it."""

TURN_S_MAX = 300.0
"""How long an opening waits for those before it of the same volume. With what it takes itself that
is less than those wait who ask: for one that had given up nobody would give the volume back."""

RESTARTS_MAX = 20
RESTART_PERIOD_S = 10.0
"""A volume actor that dies more often than this takes its supervisor with it."""


@dataclass(slots=True)
class OpenVolume:
    """A volume in use; outlives the volumes actor.

    Without users it is being opened or closed. If whoever does that dies, it is to be closed: its
    lock is held, and there may be writes in it that were acknowledged and not flushed.
    """

    session: Session
    users: int = 0


class Volumes(LoopActor):
    """See the module.

    Args:
        meta: the metadata service.
        view: the cluster as last seen.
        caches: bounds of memory: the read cache is shared by all volumes, each has its own write
            cache.
        only: serve this volume, or ``VOLUME@SNAPSHOT``, and no other, also as the default export.
        default: the default export where every volume is served.
        read_only: open without a lock, and refuse writes.
        holder: who has the volumes open, for people: host and process.
        answers_to: the actor that takes the answers to requests.
    """

    def __init__(
        self,
        meta: MetadataService,
        view: ClusterView,
        caches: CacheSizes,
        *,
        only: str | None = None,
        default: str | None = None,
        read_only: bool = False,
        holder: str = "",
        answers_to: str = "nbd_server",
    ) -> None:
        super().__init__()
        self._meta = meta
        self._view = view
        self._caches = caches
        self._only = only
        self._default = only if only is not None else default
        self._read_only = read_only
        self._holder = holder
        self._answers_to = answers_to
        self._deaths: list[float] = []
        # A lock is there as long as somebody has it or waits for it, and there is one for a name.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._requests: list[SnapshotRequest] = []

    async def setup(self) -> None:
        """Take over the open volumes; their actors died with the predecessor's supervision.

        Those without users are closed.
        """
        self._open: dict[str, OpenVolume] = self.system.heirlooms.setdefault("open_volumes", {})
        self._sessions: dict[str, Session] = self.system.heirlooms.setdefault("sessions", {})
        cache = self.system.heirlooms.get("read_cache")
        if cache is None:
            cache = self.system.heirlooms["read_cache"] = ReadCache(self._caches.read_bytes)
        self._cache: ReadCache = cache
        for name, volume in list(self._open.items()):
            await self._start_actor(name, volume.session)
            if not volume.users:
                self.spawn(self._close_left(name))
        if not self._read_only:
            self.spawn(self._watch_requests())

    async def cleanup(self) -> None:
        """Stop the volume actors; when this is for good, flush and unlock the volumes."""
        # All at once: where each takes long, there is no time for one after the other.
        await asyncio.gather(*map(self._stop_volume, list(self._open)))

    async def _stop_volume(self, name: str) -> None:
        final = not self.cell.will_restart
        cell = self.system.cells.get(_actor_name(name))
        if final:
            if cell is not None and cell.state is not State.RUNNING:
                await cell.start()  # it has just died, and the last flush is its work
            self.system.heirlooms.setdefault(NOT_CLOSED, [])
            await self._close(name, self._open[name].session)
            self._open.pop(name, None)
            self._sessions.pop(name, None)
        if cell is not None:
            await cell.stop(final=final)

    async def _close(self, name: str, session: Session) -> TorusError | None:
        """Close a session; what is lost is in the log then, and in a last stop its result too.

        Returns:
            Why the last flush failed.
        """
        # Before it is closed: by then nobody waits for a flush any more.
        unflushed = session.has_unflushed
        told: TorusError | None = None
        if unflushed and isinstance(session.file.failure, Fenced):
            told = Fenced("another client took it over; what was not flushed before is lost")
        error: TorusError | None = None
        try:
            await close_session(session, self._meta)
        except TorusError as failed:
            error = failed
            if unflushed or not isinstance(failed, Fenced):  # who took it over has all the rest
                told = failed
        if told is not None:
            log.error("closing volume %s: %s", name, told)
            lost = self.system.heirlooms.get(NOT_CLOSED)
            if lost is not None:
                lost.append(f"closing volume {name}: {told}")
        return error

    async def _watch_requests(self) -> None:
        """Tell the sessions here which snapshots are wanted of their volumes."""
        async for requests in self._meta.snapshot_requests_watch():
            self._requests = requests
            self._hand_out_requests()

    def _hand_out_requests(self) -> None:
        for volume in self._open.values():
            session = volume.session
            if session.epoch:
                session.snapshots_wanted(
                    [each for each in self._requests if each.volume_id == session.volume_id]
                )

    @expose(idempotent=True)
    async def list_names(self) -> list[str]:
        """Names of all volumes that may be opened."""
        if self._only is not None:
            return [self._only]
        return [record.name for record in await self._meta.volumes()]

    @expose()
    async def open(self, name: str) -> list[Any]:
        """Open a volume for one more user.

        Args:
            name: the volume, ``VOLUME@NAME`` for a snapshot of it, or ``""`` for the default.

        Returns:
            ``[name, size in bytes, description, read_only]``.

        Raises:
            NotExist: there is no such volume, or it is not served here.
            Locked: another client has it open.
            Fenced: another client took it over from this one, whose users have not all left yet.
        """
        name = self._resolve(name)
        async with self._turn(name):
            await self._close_unused(name)
            volume = self._open.get(name)
            if volume is None:
                session = await self._attach(name)
                volume = OpenVolume(session)
                self._open[name] = volume
                self._sessions[name] = session
                await self._start_actor(name, session)
                if session.epoch:
                    await self._first_commit(name, session)
                self._hand_out_requests()
            elif volume.session.file.failure is not None:
                # Fenced: those who have it open may read on, but it is not what the volume is now.
                raise anew(volume.session.file.failure)
            volume.users += 1
            session = volume.session
        return [name, session.size, f"torus volume {name}", not session.epoch]

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """Open one volume at a time.

        Raises:
            Again: others are at it for so long that nobody would wait for the result.
        """
        lock = self._locks.setdefault(name, asyncio.Lock())
        try:
            async with asyncio.timeout(TURN_S_MAX):
                await lock.acquire()
        except TimeoutError as error:
            raise Again(f"volume {name} is being opened by others for too long") from error
        try:
            yield
        finally:
            lock.release()

    async def _first_commit(self, name: str, session: Session) -> None:
        """Begin the session's journal, so that its flushes need no metadata any more.

        What was replayed and not all members of the last journal have is made the volume's version
        before anybody reads it. Where that cannot be done (a full cluster) the volume opens all the
        same, for what was flushed must be readable; the old journal stays until a commit succeeds,
        and the metadata have which of its records were found.

        Raises:
            Fenced: another client has opened the volume; it is closed here again.
        """
        replay = session.replaying
        if replay is not None and replay.certain:
            session.commit_soon(lambda _: None)  # nobody need wait for all that is written then
            return
        volume = self.system.actor(_actor_name(name))
        try:
            await volume.commit.remote(timeout_s=JOURNAL_S if replay is None else REPLAY_COMMIT_S)
        except Fenced:
            session.close()
            await self._forget(name)
            raise
        except TorusError as error:
            if replay is not None:
                log.warning("volume %s: its journal cannot be folded in now: %s", name, error)
                await self._settle_end(name, session, replay)
            else:
                log.info("volume %s: it has no journal yet: %s", name, error)

    async def _settle_end(self, name: str, session: Session, replay: Replay) -> None:
        if session.lost_journal:
            return  # it has no end that anybody could find
        try:
            async with asyncio.timeout(JOURNAL_S):
                await session.journal.settle_end(replay.last)
            replay.certain = True  # any later replay gives the same
        except (TorusError, TimeoutError) as error:
            log.warning("volume %s: what it was opened with is not recorded: %s", name, error)

    def _resolve(self, name: str) -> str:
        if not name:
            if self._default is None:
                raise NotExist("there is no default export here: name a volume")
            return self._default
        if self._only is not None and name != self._only:
            if name == split_name(self._only)[0]:
                return self._only  # a snapshot is served under the volume's own name too
            raise NotExist(f"only volume {self._only} is served here, not {name}")
        return name

    async def _attach(self, name: str) -> Session:
        name, snapshot = split_name(name)
        record = await self._meta.volume(name)
        if record.kind not in VOLUME_KINDS:
            raise WrongVolumeType(f"volume {name} is a {record.kind} volume, not a block volume")
        return await open_session(
            self.system,
            self._meta,
            name,
            holder=self._holder,
            block_size=self._view.block_size,
            block_spec=self._view.gmd.block_spec,
            read_cache=self._cache,
            write_cache_bytes=self._caches.write_bytes,
            view=self._view,
            read_only=self._read_only or snapshot is not None,
            snapshot=snapshot,
            answers_to=self._answers_to,
        )

    @expose()
    async def release(self, name: str) -> None:
        """The other half of ``open``; the last one flushes, unlocks and closes."""
        name = self._resolve(name)
        volume = self._open.get(name)
        if volume is None or not volume.users:
            return
        # Before anything is waited for: should this actor die meanwhile, nobody asks again.
        volume.users -= 1
        if not volume.users:
            async with self._locks.setdefault(name, asyncio.Lock()):
                error = await self._close_unused(name)
            if error is not None:
                raise error

    async def _close_left(self, name: str) -> None:
        """Close what a predecessor was opening or closing when it died."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            await self._close_unused(name)

    async def _close_unused(self, name: str) -> TorusError | None:
        """Close a volume if it is open and has no users; returns why the last flush failed.

        Nobody else may open or close it meanwhile.
        """
        volume = self._open.get(name)
        if volume is None or volume.users:
            return None
        # If this is cut off, the successor finds the volume where it is, and closes it.
        error = await self._close(name, volume.session)
        await self._forget(name)
        return error

    async def _forget(self, name: str) -> None:
        self._open.pop(name, None)
        self._sessions.pop(name, None)
        await self.system.remove(_actor_name(name))

    async def _start_actor(self, name: str, session: Session) -> None:
        spec = ChildSpec(_actor_name(name), lambda: VolumeActor(session), max_concurrency=64)
        cell = self.system.cell_for(spec, self.cell.name)
        cell.on_exit = self._volume_died
        await cell.start()

    def _volume_died(self, cell: Cell, error: BaseException | None) -> None:
        last = self.actor_stopped.is_set()
        if self.system.cells.get(cell.name) is not cell:
            return  # it was removed
        if last and (self.cell.will_restart or cell.state is not State.WAITING):
            return  # the successor starts it, or it has done its work
        now = self.system.loop.time()
        self._deaths = [at for at in self._deaths if at > now - RESTART_PERIOD_S] + [now]
        if len(self._deaths) > RESTARTS_MAX:
            self.cell.crashed(self, RuntimeError(f"{cell.name} dies again and again: {error}"))
            return
        if not last:
            self.spawn(self._restart(cell))
            return
        # The last flush is its work, and is waited for.
        task = self.system.loop.create_task(self._restart(cell))
        self.system.background.add(task)
        task.add_done_callback(self.system.background.discard)

    async def _restart(self, cell: Cell) -> None:
        if self.system.cells.get(cell.name) is cell:
            await cell.start()
            cell.restarts += 1

    @expose()
    def status(self) -> list[dict[str, Any]]:
        """Every open volume."""
        return [
            {**volume.session.status(), "users": volume.users} for volume in self._open.values()
        ]


def _actor_name(volume: str) -> str:
    return f"volume:{volume}"
