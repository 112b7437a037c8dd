"""A cell: the lasting place of an actor, with its name, inbox and history.

An actor object lives from one start to the next crash; its cell outlives it. Handles point at the
cell, so a message sent while the actor is being restarted waits for its successor, and killing an
actor loses nothing but the handler that was running.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pykka

from torus_actors.errors import ActorCrashed, ActorNotFound, DeadlineExceeded, Invalid
from torus_actors.runtime.actor import BlockingActor, LoopActor, redeliver_or_fail
from torus_actors.runtime.inbox import Adoption, Inbox
from torus_actors.runtime.messages import Call, Handler

if TYPE_CHECKING:
    from torus_actors.runtime.system import ActorSystem

log = logging.getLogger(__name__)

INBOX_MAX = 16384
"""Messages that may wait for one actor. Windows further out keep real loads far below; reaching it
means that something feeds without waiting, and it must be told so before memory is gone."""

CLEANUP_S_MIN = 1.0
"""Time for cleanup where ``shutdown_s`` is less: handlers may be cut off, but what the actor holds
must be let go of, or its successor finds the port bound and the file locked."""

LONG_CALL_S = 0.05
"""One that has lasted longer may last for minutes: a disk that is well takes less for a block."""


class Restart(enum.Enum):
    """When a child is started again after it ended."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start and keep one actor.

    Attributes:
        name: unique in the node; messages are addressed to it.
        factory: makes an actor that was not started yet.
        restart: always, only after a crash, or never.
        shutdown_s: how long its handlers may finish when it is stopped.
        max_concurrency: how many async handlers may overlap.
        inbox_max: messages that may wait.
    """

    name: str
    factory: Callable[[], LoopActor | BlockingActor]
    restart: Restart = Restart.PERMANENT
    shutdown_s: float = 5.0
    max_concurrency: int = 1
    inbox_max: int = INBOX_MAX

    def __post_init__(self) -> None:
        if self.max_concurrency < 1 or self.inbox_max < 1 or self.shutdown_s < 0:
            raise Invalid(f"{self.name}: concurrency and inbox are at least 1, shutdown_s 0")


class State(enum.Enum):
    """Where a cell is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"  # crashed, to be restarted
    STOPPED = "stopped"


class Cell:
    """See the module. All methods run on the loop's thread.

    Starts and stops of one cell follow one another, whoever asks for them: an actor is set up only
    when its predecessor has cleaned up.

    Attributes:
        will_restart: whether what waits in the inbox will be handled by a successor.
    """

    def __init__(self, system: ActorSystem, spec: ChildSpec, parent: str | None) -> None:
        self.system = system
        self.spec = spec
        self.name = spec.name
        self.parent = parent
        self.state = State.STOPPED
        self.actor: LoopActor | BlockingActor | None = None
        self.handlers: dict[str, Handler] = {}
        self.inbox = Inbox(system.loop, system.thread_id)
        self.restarts = 0
        self.last_death = ""
        self.started_at = 0.0
        self.will_restart = True  # whoever made the cell is about to start it
        self.room_waiters: list[asyncio.Future[None]] = []
        self.on_exit: Callable[[Cell, BaseException | None], None] = no_parent
        self._changing = asyncio.Lock()
        self._started: asyncio.Future[BaseException | None] | None = None
        self._after_crash: asyncio.Task[None] | None = None
        self._last_actor: type[LoopActor] | type[BlockingActor] | None = None

    # -- sending -------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether a message would wait for ever: there is no actor, nor will there be one."""
        return self.state is State.STOPPED and not self.will_restart

    def epitaph(self) -> str:
        """What a caller who comes too late is told."""
        return f"{self.name} has ended" + (f": {self.last_death}" if self.last_death else "")

    def waiting(self) -> int:
        """Messages in the inbox."""
        return len(self.inbox.items)

    def load(self) -> tuple[bool, int]:
        """What says which of several actors has least to do.

        Returns:
            Whether a blocking actor has been in one call for longer than ``LONG_CALL_S``: who knows
            how long that will take. Then how many messages there are, the one that it is in
            included.
        """
        actor = self.actor
        if not isinstance(actor, BlockingActor) or actor.call_under_way is None:
            return False, self.waiting()
        return actor.call_lasts_s > LONG_CALL_S, self.waiting() + 1

    def pass_on(self, to: Cell, most: int = sys.maxsize) -> None:
        """Have another actor of this kind do what waits here for a blocking actor's call to end."""
        if isinstance(self.actor, BlockingActor):
            for call in self.actor.take_waiting(most):
                to.inbox.put(call)
            self.room_made()

    async def room(self, timeout_s: float) -> None:
        """Wait until the inbox has room again.

        Raises:
            DeadlineExceeded: none within ``timeout_s``.
            ActorNotFound: the actor ended for good.
        """
        waiter: asyncio.Future[None] = self.system.loop.create_future()
        self.room_waiters.append(waiter)
        try:
            # Looked at again now that room_made() can find the waiter: an actor on a thread may
            # have emptied the inbox just before.
            if self.waiting() < self.spec.inbox_max:
                return
            await asyncio.wait([waiter], timeout=timeout_s)
            if not waiter.done():
                raise DeadlineExceeded(f"the inbox of {self.name} stayed full for {timeout_s:g} s")
            waiter.result()
        finally:
            if waiter in self.room_waiters:
                self.room_waiters.remove(waiter)

    def room_made(self) -> None:
        """The inbox shrank: let callers that wait for room go on."""
        if self.waiting() <= self.spec.inbox_max // 2:
            waiters, self.room_waiters = self.room_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the actor and wait for its setup.

        Raises:
            Exception: whatever setup raised; the actor has cleaned up and the cell is stopped.
        """
        async with self._changing:
            await self._stop_actor()
            self.state = State.STARTING
            self.will_restart = self.spec.restart is not Restart.TEMPORARY
            self._started = self.system.loop.create_future()
            actor: LoopActor | BlockingActor | None = None
            try:
                actor = self._make()
                await asyncio.wait([self._started], timeout=actor.setup_timeout_s)
                if not self._started.done():
                    raise DeadlineExceeded(f"setup took over {actor.setup_timeout_s} s")
                error = self._started.result()
                if error is not None:
                    raise error
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError):
                    self.last_death = f"{type(error).__name__}: {error}"
                actor = actor or self.actor
                if actor is not None:
                    await self._end(actor, f"{self.name} did not start", self._cleanup_s)
                self.state = State.STOPPED
                raise

    async def settled(self) -> None:
        """Wait until no start or stop is under way."""
        async with self._changing:
            pass

    def _make(self) -> LoopActor | BlockingActor:
        with Adoption(self.inbox):
            actor = self.spec.factory()
        actor.cell = self
        actor.system = self.system
        self.handlers = actor.handlers
        self.actor = actor
        self._last_actor = type(actor)
        pykka.ActorRegistry.register(actor.actor_ref)
        actor._start_actor_loop()
        return actor

    def set_up(self, actor: LoopActor | BlockingActor, error: BaseException | None) -> None:
        """An actor's setup ended; one that was given up on meanwhile is not listened to."""
        if actor is not self.actor or self._started is None or self._started.done():
            return
        if error is not None and not isinstance(error, Exception):
            # Out of start() a CancelledError or SystemExit would look like the supervisor's own.
            error = RuntimeError(f"setup ended in {error!r}")
        if error is None:
            self.state = State.RUNNING
            self.started_at = self.system.loop.time()
            actor.begin()
        self._started.set_result(error)

    def crashed(
        self, actor: LoopActor | BlockingActor, error: BaseException, call: Call | None = None
    ) -> None:
        """The actor hit a bug (or was killed): end it and tell the supervisor."""
        told = ActorCrashed(f"{self.name} died: {type(error).__name__}: {error}")
        told.__cause__ = error
        if actor is not self.actor:
            if call is not None:
                redeliver_or_fail(self, call, told)
            return
        if self.state is State.STARTING:
            self.set_up(actor, error)  # start() ends it and raises
            return
        if isinstance(error, GaveUp):
            log.error("actor %s gave up: %s", self.name, error)
        elif not isinstance(error, Killed):
            log.error(
                "actor %s died: %s", self.name, "".join(traceback.format_exception(error)).rstrip()
            )
        self.last_death = f"{type(error).__name__}: {error}"
        self.state = State.WAITING
        cut_off = self._detach(actor)
        if call is not None:
            cut_off.append(call)
        # Each goes in front of the one before, so the oldest has to come last.
        for lost in reversed(cut_off):
            redeliver_or_fail(self, lost, told)
        if isinstance(actor, LoopActor):
            self._after_crash = self._in_background(self._bury_actor(actor, error))
        else:
            # Not waited for: its thread may be in a call that blocks for long.
            self.on_exit(self, error)

    async def _bury_actor(self, actor: LoopActor, error: BaseException) -> None:
        await actor.wind_up(self._cleanup_s)
        self.on_exit(self, error)

    def kill(self, reason: str = "killed on request") -> None:
        """End the actor as a crash would; for tests and ``torusctl debug kill``."""
        if self.actor is not None:
            self.crashed(self.actor, Killed(reason))

    def stop_soon(self, actor: LoopActor | BlockingActor | None = None) -> None:
        """The actor wants to end, or was asked to by pykka's own means; its supervisor is told.

        Args:
            actor: which one; if it is not here any more nothing happens. None is the present one.
        """
        self._in_background(self._stop_and_tell(self.actor if actor is None else actor))

    async def _stop_and_tell(self, actor: LoopActor | BlockingActor | None) -> None:
        async with self._changing:
            if actor is None or self.actor is not actor:
                return
            await self._stop_actor()
            if self.state is State.WAITING:
                return  # it crashed at the last moment, and that was told
        self.on_exit(self, None)

    async def stop(self, final: bool = False) -> None:
        """Let handlers finish for ``shutdown_s``, then end the actor.

        A handler must not await the stop of its own actor: each would wait for the other, until
        ``shutdown_s`` is over. It may call ``stop_soon``.

        Args:
            final: nobody will start it again: what waits in the inbox fails now.
        """
        if final:
            self.will_restart = False
        if self.state is State.STARTING and self.actor is not None:
            self.set_up(self.actor, Killed("stopped while it was starting"))
        # Shielded: if the supervisor that stops it is killed, the stop goes on to its end.
        await asyncio.shield(self._in_background(self._stop(final)))

    async def _stop(self, final: bool) -> None:
        async with self._changing:
            await self._stop_actor()
            self.state = State.STOPPED
            if final:
                self.bury()

    async def _stop_actor(self) -> None:
        actor = self.actor
        if actor is not None:
            at_work = actor.quiesce()
            if at_work:
                await asyncio.wait(at_work, timeout=self.spec.shutdown_s)
            if self.actor is actor:  # otherwise it crashed at the last moment
                self.state = State.STOPPED
                # A thread that has not ended by now had its time.
                patience = self._cleanup_s if isinstance(actor, LoopActor) else 0.0
                await self._end(actor, f"{self.name} was stopped", patience)
        if self._after_crash is not None:
            await asyncio.wait([self._after_crash])
            self._after_crash = None

    async def _end(self, actor: LoopActor | BlockingActor, why: str, timeout_s: float) -> None:
        told = ActorCrashed(why)
        for call in reversed(self._detach(actor)):
            redeliver_or_fail(self, call, told)
        await actor.wind_up(timeout_s)

    def bury(self) -> None:
        """No successor will come, to it or to what it supervised: fail what waits."""
        self.will_restart = False
        if self.state is State.WAITING:
            self.state = State.STOPPED
        reason = self.epitaph()
        items = self.inbox.items
        while items:
            envelope = items.popleft()
            if envelope.reply_to is None:
                continue
            if type(envelope) is Call:
                envelope.reply_to.fail(ActorNotFound(reason))
            else:
                dead = pykka.ActorDeadError(reason)
                envelope.reply_to.set_exception((pykka.ActorDeadError, dead, None))
        waiters, self.room_waiters = self.room_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(ActorNotFound(reason))
        for cell in self.system.cells.values():
            if cell.parent == self.name and cell.actor is None and cell.state is not State.STARTING:
                cell.bury()

    def _detach(self, actor: LoopActor | BlockingActor) -> list[Call]:
        self.actor = None
        return actor.halt()

    @property
    def _cleanup_s(self) -> float:
        return max(self.spec.shutdown_s, CLEANUP_S_MIN)

    def _in_background(self, coroutine: Any) -> asyncio.Task[None]:
        background = self.system.background
        task: asyncio.Task[None] = self.system.loop.create_task(coroutine)
        background.add(task)
        task.add_done_callback(background.discard)
        return task

    def describe(self) -> dict[str, Any]:
        """What ``torusctl tree`` shows of it; a dead actor is described as it was."""
        cls = self._last_actor
        return {
            "name": self.name,
            "parent": self.parent,
            "kind": "thread" if cls is not None and issubclass(cls, BlockingActor) else "loop",
            "class": cls.__name__ if cls is not None else "",
            "state": self.state.value,
            "restart": self.spec.restart.value,
            "restarts": self.restarts,
            "last_death": self.last_death,
            "uptime_s": round(self.system.loop.time() - self.started_at, 1)
            if self.state is State.RUNNING
            else 0.0,
            "waiting": self.waiting(),
        }


class Killed(Exception):
    """Cause of death of an actor that was killed on request."""


class GaveUp(Exception):
    """Cause of death of a supervisor whose children died too often; each death has been logged."""


def no_parent(cell: Cell, error: BaseException | None) -> None:
    """An actor outside the supervision tree: nobody restarts it."""
    cell.bury()
