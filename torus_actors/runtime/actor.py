"""The two kinds of actor: on the event loop, and on a thread of its own for what blocks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pykka

from torus_actors.errors import ActorCrashed, Closed, Invalid, TorusError
from torus_actors.runtime.inbox import Inbox, adopted_inbox
from torus_actors.runtime.messages import (
    NO_REPLY,
    REDELIVERIES_MAX,
    Call,
    Handler,
    handlers_of,
)

if TYPE_CHECKING:
    from torus_actors.runtime.cell import Cell
    from torus_actors.runtime.system import ActorSystem

log = logging.getLogger(__name__)

BlockingDelay = Callable[[str, str], float]
"""How long a call of a blocking actor takes, seconds: by name of the actor and of the method."""

TURN_MESSAGES_MAX = 256
"""Messages one actor handles before the loop gets its turn: a flooded actor must not starve the
others, and 256 cheap messages are well under a millisecond."""

SETUP_TIMEOUT_S = 60.0
"""An actor whose setup takes longer counts as crashed."""


def _is_stop(message: Any) -> bool:
    # pykka's own ActorRef.stop() sends this private message; its type has no public name.
    return type(message).__name__ == "_ActorStop"


class _Exposing:
    """What both kinds share: the table of exposed methods and the place in the system."""

    handlers: ClassVar[dict[str, Handler]] = {}
    setup_timeout_s: ClassVar[float | None] = SETUP_TIMEOUT_S
    cell: Cell
    system: ActorSystem

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.handlers = handlers_of(cls)

    @classmethod
    def options(cls, **options: Any) -> Any:
        """A blueprint in Ray's manner: ``Store.options(name="store").remote(args)`` starts one.

        Args:
            options: ``name``, ``max_concurrency``, ``restart``, ``shutdown_s``, ``inbox_max``
                (see ChildSpec).
        """
        from torus_actors.runtime.system import Blueprint

        return Blueprint(cls, options)

    def _handle_foreign(self, envelope: Any) -> None:
        """A message sent with pykka's own ActorRef: a stop request, or something else; any thread.

        Calls must come through a handle, which gives them a deadline and a bound.
        """
        if _is_stop(envelope.message):
            self.system.on_loop(self.cell.stop_soon, self)
            if envelope.reply_to is not None:
                envelope.reply_to.set(None)
        elif envelope.reply_to is not None:
            error = Invalid(f"{self.cell.name}: send calls through a handle")
            envelope.reply_to.set_exception((Invalid, error, None))


class LoopActor(_Exposing, pykka.Actor):
    """An actor on the node's event loop.

    Its handlers run on the loop's thread, in arrival order. Where ``max_concurrency`` is above
    one, async handlers overlap and may touch the actor's state only between their awaits.

    Subclasses override ``setup`` and ``cleanup`` instead of pykka's ``on_start`` and ``on_stop``:
    both may await, and an error in ``setup`` is seen by the supervisor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[asyncio.Task[Any], Call | None] = {}
        self._cancelled: list[asyncio.Task[Any]] = []
        self._scheduled = False
        self._running = 0
        self._accepting = False

    @staticmethod
    def _create_actor_inbox() -> Any:
        return adopted_inbox()

    @staticmethod
    def _create_future() -> Any:
        # Only pykka's own ask() comes here, which may be called from any thread.
        return pykka.ThreadingFuture()

    def _start_actor_loop(self) -> None:
        self._loop = self.system.loop
        # Handlers run in the system's context, not in that of whoever woke the actor.
        self._context = self.system.context
        self._inbox = cast(Inbox, self.actor_inbox)
        self._items = self._inbox.items
        self._concurrency = self.cell.spec.max_concurrency
        task = self._loop.create_task(self.setup(), context=self._context.copy())
        self._tasks[task] = None
        task.add_done_callback(self._setup_done)

    async def setup(self) -> None:
        """Prepare; no message is handled before it returns. Runs on the loop."""

    async def cleanup(self) -> None:
        """Let go of what the actor holds; also after a crash or a failed setup. Runs on the loop.

        The actor's tasks have ended by then.
        """

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run a coroutine as part of this actor: it dies with it, and its bug is the actor's.

        Raises:
            Closed: the actor is dead already; nothing would end the task.
        """
        if self.actor_stopped.is_set():
            coroutine.close()
            raise Closed(f"{self.cell.name} has ended")
        task = self._loop.create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._task_done)
        return task

    def _setup_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        self.cell.set_up(self, _error_of(task))

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        call = self._tasks.pop(task, None)
        if call is None:
            # An actor may well cancel what it spawned.
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self.cell.crashed(self, error)
            return
        self._running -= 1
        self._wake()
        error = _error_of(task)
        if error is not None:
            self._handler_failed(call, error)
        elif call.reply_to is not None:
            call.reply_to.set(task.result())

    # -- called by the cell ------------------------------------------------------------------

    def begin(self) -> None:
        """Start handling messages."""
        self._accepting = True
        self._inbox.any_thread = False
        self._inbox.wake = self._wake
        self._wake()

    def quiesce(self) -> list[asyncio.Future[Any]]:
        """Take no new message; return the handlers still at work."""
        self._accepting = False
        return [task for task, call in self._tasks.items() if call is not None]

    def halt(self) -> list[Call]:
        """Stop handling messages; return the calls that were cut off in the middle."""
        self._accepting = False
        if self._inbox.wake == self._wake:
            self._inbox.wake = None
        for task, call in list(self._tasks.items()):
            if call is not None and task.done():  # in this very turn of the loop: not cut off
                task.remove_done_callback(self._task_done)
                self._task_done(task)
        calls = [call for call in self._tasks.values() if call is not None]
        for task in self._tasks:
            task.remove_done_callback(self._task_done)
            task.remove_done_callback(self._setup_done)
            task.add_done_callback(self._last_words)
            task.cancel()
        self._cancelled = list(self._tasks)
        self._tasks.clear()
        pykka.ActorRegistry.unregister(self.actor_ref)
        self.actor_stopped.set()
        return calls

    def _last_words(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TorusError):
            log.warning("%s: a task failed as it was ended: %r", self.cell.name, error)

    async def wind_up(self, timeout_s: float) -> None:
        """After ``halt``: wait for the cancelled tasks to end, then clean up."""
        if self._cancelled:
            await asyncio.wait(self._cancelled, timeout=timeout_s)
        try:
            await asyncio.wait_for(self.cleanup(), timeout_s)
        except TorusError as error:
            log.warning("%s: cleanup: %s", self.cell.name, error)
        except TimeoutError:
            # No bug: what it waits for (a last flush, say) may not be had.
            log.warning("%s: cleanup was not done within %g s", self.cell.name, timeout_s)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task was cancelled, but what the cleanup awaited. Further out it would look
            # like an order to the supervisor, which would never start a child again.
            log.error("%s: cleanup failed: %r", self.cell.name, error)
        except Exception:
            log.exception("%s: cleanup failed", self.cell.name)

    # -- the loop ----------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._scheduled and self._items and self._accepting:
            self._scheduled = True
            self._loop.call_soon(self._drain, context=self._context)

    def _drain(self) -> None:
        self._scheduled = False
        items = self._items
        budget = TURN_MESSAGES_MAX
        while items and self._accepting and self._running < self._concurrency:
            if not budget:
                self._wake()
                return
            budget -= 1
            envelope = items.popleft()
            if type(envelope) is Call:
                self._handle(envelope)
            else:
                self._handle_foreign(envelope)
        if self.cell.room_waiters:
            self.cell.room_made()

    def _handle(self, call: Call) -> None:
        handler = self.handlers.get(call.method)
        reply_to = call.reply_to
        if handler is None:
            if reply_to is not None:
                reply_to.fail(Invalid(f"{self.cell.name} has no method {call.method}"))
            return
        if reply_to is not None and reply_to.done():
            return  # given up while it waited: nobody would see the answer
        call.deliveries += 1
        try:
            if handler.is_async:
                coroutine = handler.function(self, *call.args, **call.kwargs)
                task = self._loop.create_task(coroutine)
                self._running += 1
                self._tasks[task] = call
                task.add_done_callback(self._task_done)
                return
            if handler.deferred:
                reply = NO_REPLY if reply_to is None else reply_to
                handler.function(self, reply, *call.args, **call.kwargs)
                return
            result = handler.function(self, *call.args, **call.kwargs)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a stray CancelledError must not stop the drain either
            self._handler_failed(call, error)
            return
        if reply_to is not None:
            reply_to.set(result)

    def _handler_failed(self, call: Call, error: BaseException) -> None:
        if isinstance(error, TorusError):
            if call.reply_to is not None:
                call.reply_to.fail(error)
            else:
                log.warning("%s.%s: %s", self.cell.name, call.method, error)
            return
        self.cell.crashed(self, error, call)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    """Why a task failed, if it did. One that was cancelled by others failed too."""
    if task.cancelled():
        return RuntimeError("cancelled from outside, or let the cancellation of another through")
    return task.exception()


class BlockingActor(_Exposing, pykka.ThreadingActor):
    """An actor on a thread of its own, for calls that block; one message at a time.

    ``setup``, ``cleanup`` and the handlers run on that thread. A thread cannot be killed: a killed
    actor finishes the call it is in, unseen, while its successor already works.

    In a system made with ``blocking_delay_s`` there is no thread: all of it runs on the loop, each
    message after the delay that the function says, which stands for the time it would block.
    """

    use_daemon_thread: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, handler in cls.handlers.items():
            if handler.is_async or handler.deferred:
                raise TypeError(f"{cls.__name__}.{name}: a blocking actor's methods just return")

    def __init__(self) -> None:
        super().__init__()
        # Guards the fields below, which the loop and the actor's thread both change.
        self._turn = threading.Condition()
        self._accepting = False
        self._leaving = False
        self._current: Call | None = None
        self._taken_at = 0.0
        # Without a thread: how long a call takes, whether one is under way, and whether a turn is
        # scheduled.
        self._delay_s: BlockingDelay | None = None
        self._busy = True
        self._turn_set = False

    @staticmethod
    def _create_actor_inbox() -> Any:
        return adopted_inbox()

    def _start_actor_loop(self) -> None:
        self._ended: asyncio.Future[None] = self.system.loop.create_future()
        delay_s = self.system.blocking_delay_s
        if delay_s is None:
            try:
                super()._start_actor_loop()
            except BaseException:
                self._ended.set_result(None)  # it never began
                raise
            return
        self._delay_s = delay_s
        # Taking turns in the system's context, not in that of whoever woke the actor.
        self._context = self.system.context.copy()
        self.system.loop.call_later(
            delay_s(self.cell.name, "setup"), self._live_on_loop, context=self._context
        )

    def setup(self) -> None:
        """Prepare; no message is handled before it returns."""

    def cleanup(self) -> None:
        """Let go of what the actor holds; also after a crash or a failed setup."""

    @property
    def call_under_way(self) -> Call | None:
        """The call it is in; None while it waits for one."""
        return self._current

    @property
    def call_lasts_s(self) -> float:
        """How long it has been in that call; 0 while it waits for one."""
        return self.system.loop.time() - self._taken_at if self._current is not None else 0.0

    # -- the thread --------------------------------------------------------------------------

    def _actor_loop(self) -> None:
        crash: BaseException | None = None
        try:
            self.setup()
        except BaseException as error:
            self.system.on_loop(self.cell.set_up, self, error)
        else:
            self.system.on_loop(self.cell.set_up, self, None)
            crash = self._work()
        try:
            self.cleanup()
        except BaseException:
            log.exception("%s: cleanup failed", self.cell.name)
        self.system.on_loop(self._thread_ended, crash)

    def _work(self) -> BaseException | None:
        """Handle messages until told to leave, or until a crash, whose cause is returned."""
        while (envelope := self._next()) is not None:
            if type(envelope) is not Call:
                self._handle_foreign(envelope)
                continue
            crash = self._handle(envelope)
            if crash is not None:
                return crash
        return None

    def _next(self) -> Any:
        items = cast(Inbox, self.actor_inbox).items
        with self._turn:
            while not self._leaving and not (self._accepting and items):
                self._turn.wait()
            if self._leaving:
                return None
            return self._take()

    def _take(self) -> Any:
        envelope = cast(Inbox, self.actor_inbox).items.popleft()
        if type(envelope) is Call:
            self._taken_at = self.system.loop.time()
            self._current = envelope
        if self.cell.room_waiters:
            self.system.on_loop(self.cell.room_made)
        return envelope

    def _live_on_loop(self) -> None:
        """What the thread does, in turns. A killed actor finishes its call here too, unseen."""
        try:
            self.setup()
        except BaseException as error:
            self.cell.set_up(self, error)
            self._end_on_loop(None)
            return
        self.cell.set_up(self, None)
        self._busy = False
        self._turn_on_loop()

    def _turn_on_loop(self) -> None:
        """Begin the next call, if there is one; it is made when its time is over."""
        self._turn_set = False
        if self._busy:
            return
        items = cast(Inbox, self.actor_inbox).items
        while not self._leaving:
            if not (self._accepting and items):
                return
            envelope = self._take()
            if type(envelope) is not Call:
                self._handle_foreign(envelope)
                continue
            if envelope.reply_to is not None and envelope.reply_to.done():
                self._handle(envelope)
                continue
            # A call that has begun is made, even if its caller gives it up meanwhile.
            self._busy = True
            assert self._delay_s is not None
            pause_s = self._delay_s(self.cell.name, envelope.method)
            self.system.loop.call_later(
                pause_s, self._call_on_loop, envelope, context=self._context
            )
            return
        self._end_on_loop(None)

    def _call_on_loop(self, call: Call) -> None:
        crash = self._handle(call, True)
        if crash is not None:
            self._end_on_loop(crash)
            return
        self._busy = False
        self._turn_on_loop()

    def _end_on_loop(self, crash: BaseException | None) -> None:
        self._busy = True  # for ever: no turn comes after this one
        try:
            self.cleanup()
        except BaseException:
            log.exception("%s: cleanup failed", self.cell.name)
        self._thread_ended(crash)

    def _handle(self, call: Call, begun: bool = False) -> BaseException | None:
        reply_to = call.reply_to
        handler = self.handlers.get(call.method)
        failure: TorusError | None = None
        result: Any = None
        if not begun and reply_to is not None and reply_to.done():
            pass  # given up while it waited: nobody would see the answer
        elif handler is None:
            failure = Invalid(f"{self.cell.name} has no method {call.method}")
        else:
            call.deliveries += 1
            try:
                result = handler.function(self, *call.args, **call.kwargs)
            except TorusError as error:
                failure = error
            except BaseException as error:
                return error  # the call stays current: its fate is decided on the loop
        with self._turn:
            if self._current is not call:
                return None  # killed meanwhile: the call is no longer ours to answer
            self._current = None
        if reply_to is None:
            if failure is not None:
                log.warning("%s.%s: %s", self.cell.name, call.method, failure)
        elif failure is not None:
            reply_to.fail(failure)
        else:
            reply_to.set(result)
        return None

    def _wake(self) -> None:
        if self._delay_s is not None:
            if not self._busy and not self._turn_set:
                self._turn_set = True
                self.system.loop.call_soon(self._turn_on_loop, context=self._context)
            return
        with self._turn:
            self._turn.notify()

    # -- called by the cell, on the loop -----------------------------------------------------

    def _thread_ended(self, crash: BaseException | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        if crash is not None:
            self.cell.crashed(self, crash)

    def begin(self) -> None:
        """Start handling messages."""
        inbox = cast(Inbox, self.actor_inbox)
        inbox.any_thread = True
        inbox.wake = self._wake
        self._accepting = True
        self._wake()

    def quiesce(self) -> list[asyncio.Future[Any]]:
        """Take no new message; return what is done when the thread has ended."""
        with self._turn:
            self._leaving = True
        self._wake()
        return [self._ended]

    def take_waiting(self, most: int) -> list[Call]:
        """Take so many of the calls that wait behind the one it is in: the caller's now."""
        items = cast(Inbox, self.actor_inbox).items
        with self._turn:  # or the thread finds nothing where it has just seen something
            taken = [items.popleft() for _ in range(min(most, len(items)))]
            items.extendleft(each for each in reversed(taken) if type(each) is not Call)
        return [each for each in taken if type(each) is Call]

    def halt(self) -> list[Call]:
        """Tell the thread to end; return the call it is in, whose answer is given up on."""
        with self._turn:
            self._leaving = True
            current, self._current = self._current, None
        self._wake()
        inbox = cast(Inbox, self.actor_inbox)
        if inbox.wake == self._wake:
            inbox.wake = None
        pykka.ActorRegistry.unregister(self.actor_ref)
        self.actor_stopped.set()
        return [current] if current is not None else []

    async def wind_up(self, timeout_s: float) -> None:
        """After ``halt``: wait for the thread, which cleans up as it ends."""
        await asyncio.wait([self._ended], timeout=timeout_s)


def redeliver_or_fail(cell: Cell, call: Call, error: ActorCrashed) -> None:
    """A call was cut off by its actor's death: give it to the successor, or tell the caller."""
    handler = cell.handlers.get(call.method)
    if (
        handler is not None
        and handler.idempotent
        and call.deliveries <= REDELIVERIES_MAX
        and cell.will_restart
    ):
        cell.inbox.put_back(call)
    elif call.reply_to is not None:
        call.reply_to.fail(error)
