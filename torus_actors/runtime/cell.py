"""A cell: the lasting place of an actor, with its name, inbox and history.

An actor object lives from one start to the next crash; its cell outlives it. Handles point at the
cell, so a message sent while the actor is being restarted waits for its successor, and killing an
actor loses nothing but the handler that was running.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import queue
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pykka

from torus_actors.errors import ActorCrashed, ActorNotFound, TorusError
from torus_actors.runtime import actor as actor_module
from torus_actors.runtime.actor import BlockingActor, LoopActor, LoopInbox, redeliver_or_fail
from torus_actors.runtime.messages import Call, Handler

if TYPE_CHECKING:
    from torus_actors.runtime.system import ActorSystem

log = logging.getLogger(__name__)

INBOX_MAX = 16384
"""Messages that may wait for one actor. Windows further out keep real loads far below; reaching it
means that something feeds without waiting, and it must be told so before memory is gone."""

START_TIMEOUT_S = 60.0
"""An actor whose setup takes longer counts as crashed."""


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


class State(enum.Enum):
    """Where a cell is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"  # crashed, to be restarted
    STOPPED = "stopped"


class Cell:
    """See the module. All methods run on the loop's thread."""

    def __init__(self, system: ActorSystem, spec: ChildSpec, parent: str | None) -> None:
        self.system = system
        self.spec = spec
        self.name = spec.name
        self.parent = parent
        self.state = State.STOPPED
        self.actor: LoopActor | BlockingActor | None = None
        self.handlers: dict[str, Handler] = {}
        self.inbox: Any = LoopInbox(system.loop, system.thread_id)
        self.restarts = 0
        self.last_death = ""
        self.started_at = 0.0
        self.will_restart = spec.restart is not Restart.TEMPORARY
        self.room_waiters: list[asyncio.Future[None]] = []
        self._thread_start: asyncio.Future[None] | None = None
        self._thread_end: asyncio.Future[None] | None = None
        self.on_exit: Callable[[Cell, BaseException | None], None] = _no_parent

    # -- sending -------------------------------------------------------------------------------

    def waiting(self) -> int:
        """Messages in the inbox."""
        inbox = self.inbox
        return len(inbox.items) if isinstance(inbox, LoopInbox) else inbox.qsize()

    def requeue(self, call: Call) -> None:
        """Put a call back in front of what waits."""
        inbox = self.inbox
        if isinstance(inbox, LoopInbox):
            inbox.items.appendleft(call)
            if inbox.wake is not None:
                inbox.wake()
        else:
            inbox.put(call)

    def room_made(self) -> None:
        """The inbox shrank: let callers that wait for room go on."""
        if self.waiting() < self.spec.inbox_max // 2:
            waiters, self.room_waiters = self.room_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the actor and wait for its setup.

        Raises:
            Exception: whatever setup raised; the cell is then stopped.
        """
        self.state = State.STARTING
        self.will_restart = self.spec.restart is not Restart.TEMPORARY
        actor: LoopActor | BlockingActor | None = None
        try:
            actor = self._make()
            self.actor = actor
            pykka.ActorRegistry.register(actor.actor_ref)
            if isinstance(actor, LoopActor):
                actor._start_actor_loop()
                await asyncio.wait_for(actor.setup(), START_TIMEOUT_S)
            else:
                self._thread_start = self.system.loop.create_future()
                self._thread_end = self.system.loop.create_future()
                actor._start_actor_loop()
                await asyncio.wait_for(self._thread_start, START_TIMEOUT_S)
        except BaseException:
            if actor is not None:
                self._detach(actor)
                if isinstance(actor, LoopActor):
                    await self._clean_up(actor)
            self.state = State.STOPPED
            raise
        self.state = State.RUNNING
        self.started_at = self.system.loop.time()
        if isinstance(actor, LoopActor):
            actor.begin()

    def _make(self) -> LoopActor | BlockingActor:
        adopted = actor_module._adopted
        adopted.inbox = self.inbox
        try:
            actor = self.spec.factory()
            if isinstance(actor, BlockingActor) and isinstance(self.inbox, LoopInbox):
                # The kind is known only now; what was sent before the first start moves over.
                fresh: queue.Queue[Any] = queue.Queue()
                for envelope in self.inbox.items:
                    fresh.put(envelope)
                self.inbox = fresh
                actor.actor_inbox = fresh
                actor._actor_ref = pykka.ActorRef(actor)
        finally:
            adopted.inbox = None
        actor.cell = self
        actor.system = self.system
        self.handlers = actor.handlers
        return actor

    def thread_started(self, actor: BlockingActor, error: BaseException | None) -> None:
        """A thread actor's setup ended."""
        if actor is self.actor and self._thread_start is not None and not self._thread_start.done():
            if error is None:
                self._thread_start.set_result(None)
            else:
                self._thread_start.set_exception(error)

    def thread_ended(self, actor: BlockingActor, crash: tuple[BaseException, Call] | None) -> None:
        """A thread actor left its loop."""
        if crash is not None:
            self.crashed(actor, *crash)
        elif self._thread_end is not None and not self._thread_end.done():
            self._thread_end.set_result(None)

    def crashed(
        self, actor: LoopActor | BlockingActor, error: BaseException, call: Call | None = None
    ) -> None:
        """The actor hit a bug (or was killed): end it and tell the supervisor."""
        if actor is not self.actor or self.state not in (State.RUNNING, State.STARTING):
            if call is not None and isinstance(call.reply_to, pykka.Future):
                call.reply_to.set_exception((type(error), error, None))
            return
        if not isinstance(error, Killed):
            log.error(
                "actor %s died: %s", self.name, "".join(traceback.format_exception(error)).rstrip()
            )
        self.last_death = f"{type(error).__name__}: {error}"
        self.state = State.WAITING
        cut_off = self._detach(actor)
        if call is not None and call not in cut_off:
            cut_off.append(call)
        told = ActorCrashed(f"{self.name} died: {self.last_death}")
        told.__cause__ = error
        for lost in cut_off:
            redeliver_or_fail(self, lost, told)
        if isinstance(actor, LoopActor):
            task = self.system.loop.create_task(self._clean_up(actor))
            self.system.background.add(task)
            task.add_done_callback(self.system.background.discard)
            task.add_done_callback(lambda _: self.on_exit(self, error))
        else:
            self.on_exit(self, error)

    def kill(self, reason: str = "killed on request") -> None:
        """End the actor as a crash would; for tests and ``torusctl debug kill``."""
        if self.actor is not None:
            self.crashed(self.actor, Killed(reason))

    def stop_soon(self) -> None:
        """The actor was asked to stop by pykka's own means; its supervisor decides what follows."""
        task = self.system.loop.create_task(self._stop_and_tell())
        self.system.background.add(task)
        task.add_done_callback(self.system.background.discard)

    async def _stop_and_tell(self) -> None:
        await self.stop()
        self.on_exit(self, None)

    async def stop(self, final: bool = False) -> None:
        """Let handlers finish for ``shutdown_s``, then end the actor.

        Args:
            final: nobody will start it again: what waits in the inbox fails now.
        """
        actor = self.actor
        self.will_restart = self.will_restart and not final
        if actor is not None and self.state in (State.RUNNING, State.STARTING):
            if isinstance(actor, LoopActor):
                at_work = actor.quiesce()
                if at_work:
                    await asyncio.wait(at_work, timeout=self.spec.shutdown_s)
            cut_off = self._detach(actor)
            told = ActorCrashed(f"{self.name} was stopped")
            for call in cut_off:
                redeliver_or_fail(self, call, told)
            if isinstance(actor, LoopActor):
                await self._clean_up(actor)
            elif self._thread_end is not None:
                await asyncio.wait([self._thread_end], timeout=self.spec.shutdown_s)
        self.state = State.STOPPED
        if final:
            self.bury()

    def bury(self) -> None:
        """No successor will come: fail what waits."""
        self.will_restart = False
        inbox = self.inbox
        items: list[Any] = []
        if isinstance(inbox, LoopInbox):
            items, inbox.items = list(inbox.items), type(inbox.items)()
        else:
            while not inbox.empty():
                items.append(inbox.get())
        for call in items:
            if isinstance(call, Call) and call.reply_to is not None:
                call.reply_to.fail(ActorNotFound(f"{self.name} has ended: {self.last_death}"))
        for waiter in self.room_waiters:
            if not waiter.done():
                waiter.set_exception(ActorNotFound(f"{self.name} has ended"))
        self.room_waiters.clear()

    def _detach(self, actor: LoopActor | BlockingActor) -> list[Call]:
        self.actor = None
        if isinstance(actor, BlockingActor):
            old: queue.Queue[Any] = self.inbox
            fresh: queue.Queue[Any] = queue.Queue()
            self.inbox = fresh
            while not old.empty():
                envelope = old.get()
                if envelope is not None:
                    fresh.put(envelope)
        return actor.halt()

    async def _clean_up(self, actor: LoopActor) -> None:
        try:
            await asyncio.wait_for(actor.cleanup(), self.spec.shutdown_s)
        except TorusError as error:
            log.warning("%s: cleanup: %s", self.name, error)
        except Exception:
            log.exception("%s: cleanup failed", self.name)

    def describe(self) -> dict[str, Any]:
        """What ``torusctl tree`` shows of it."""
        actor = self.actor
        return {
            "name": self.name,
            "parent": self.parent,
            "kind": "thread" if isinstance(actor, BlockingActor) else "loop",
            "class": type(actor).__name__ if actor is not None else "",
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


def _no_parent(cell: Cell, error: BaseException | None) -> None:
    """An actor outside the supervision tree: nobody restarts it."""
    cell.bury()
