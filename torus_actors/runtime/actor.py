"""The two kinds of actor: on the event loop, and on a thread of its own for what blocks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pykka

from torus_actors.errors import ActorCrashed, Invalid, TorusError
from torus_actors.runtime.messages import REDELIVERIES_MAX, Call, Handler, handlers_of

if TYPE_CHECKING:
    from torus_actors.runtime.cell import Cell
    from torus_actors.runtime.system import ActorSystem

log = logging.getLogger(__name__)

TURN_MESSAGES_MAX = 256
"""Messages one actor handles before the loop gets its turn: a flooded actor must not starve the
others, and 256 cheap messages are well under a millisecond."""

_adopted = threading.local()
"""The inbox that the actor being constructed takes over. pykka creates inboxes in a static method,
which knows neither the actor nor its cell."""


class LoopInbox:
    """A cell's inbox: put from any thread, drained on the loop."""

    __slots__ = ("items", "loop", "thread_id", "wake")

    def __init__(self, loop: asyncio.AbstractEventLoop, thread_id: int) -> None:
        self.items: deque[Any] = deque()
        self.loop = loop
        self.thread_id = thread_id
        self.wake: Any = None

    def put(self, envelope: Any, /) -> None:
        """Queue an envelope and see that the actor gets its turn."""
        self.items.append(envelope)
        if self.wake is not None:
            if threading.get_ident() == self.thread_id:
                self.wake()
            else:
                self.loop.call_soon_threadsafe(self._wake_up)

    def _wake_up(self) -> None:
        if self.wake is not None:
            self.wake()

    def get(self) -> Any:
        """Take the oldest envelope; the drain checks first that there is one."""
        return self.items.popleft()

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self.items


def _is_stop(message: Any) -> bool:
    # pykka's own ActorRef.stop() sends this private message; its type has no public name.
    return type(message).__name__ == "_ActorStop"


class _Exposing:
    """What both kinds share: the table of exposed methods and the place in the system."""

    handlers: ClassVar[dict[str, Handler]] = {}
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
        self._scheduled = False
        self._running = 0
        self._accepting = False

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _adopted.inbox

    @staticmethod
    def _create_future() -> Any:
        # Only pykka's own ask() comes here, which may be called from any thread.
        return pykka.ThreadingFuture()

    def _start_actor_loop(self) -> None:
        self._loop = self.system.loop
        self._inbox = cast(LoopInbox, self.actor_inbox)
        self._items = self._inbox.items
        self._concurrency = self.cell.spec.max_concurrency

    async def setup(self) -> None:
        """Prepare; no message is handled before it returns. Runs on the loop."""

    async def cleanup(self) -> None:
        """Let go of what the actor holds; also after a crash. Runs on the loop."""

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run a coroutine as part of this actor: it dies with it, and its bug is the actor's."""
        task = self._loop.create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        call = self._tasks.pop(task, None)
        if call is not None:
            self._running -= 1
            self._wake()
        if task.cancelled():
            return
        error = task.exception()
        if call is None:
            if error is not None:
                self.cell.crashed(self, error)
        elif error is None:
            if call.reply_to is not None:
                call.reply_to.set(task.result())
        else:
            self._handler_failed(call, error)

    # -- called by the cell ------------------------------------------------------------------

    def begin(self) -> None:
        """Start handling messages."""
        self._accepting = True
        self._inbox.wake = self._wake
        self._wake()

    def halt(self) -> list[Call]:
        """Stop handling messages; return the calls that were cut off in the middle."""
        self._accepting = False
        if self._inbox.wake == self._wake:
            self._inbox.wake = None
        calls = [call for call in self._tasks.values() if call is not None]
        for task in list(self._tasks):
            task.remove_done_callback(self._task_done)
            task.cancel()
        self._tasks.clear()
        pykka.ActorRegistry.unregister(self.actor_ref)
        self.actor_stopped.set()
        return calls

    def quiesce(self) -> list[asyncio.Task[Any]]:
        """Take no new message; return the handlers still at work."""
        self._accepting = False
        return [task for task, call in self._tasks.items() if call is not None]

    # -- the loop ----------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._scheduled and self._items and self._accepting:
            self._scheduled = True
            self._loop.call_soon(self._drain)

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
                handler.function(self, reply_to, *call.args, **call.kwargs)
                return
            result = handler.function(self, *call.args, **call.kwargs)
        except Exception as error:
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

    def _handle_foreign(self, envelope: Any) -> None:
        """A message sent with pykka's own ActorRef: a stop request, or a (method, args) tuple."""
        if _is_stop(envelope.message):
            self.cell.stop_soon()
            if envelope.reply_to is not None:
                envelope.reply_to.set(None)
        elif envelope.reply_to is not None:
            error = Invalid("send calls through a handle")
            envelope.reply_to.set_exception((Invalid, error, None))


class BlockingActor(_Exposing, pykka.ThreadingActor):
    """An actor on a thread of its own, for calls that block; one message at a time.

    ``setup``, ``cleanup`` and the handlers run on that thread. A thread cannot be killed: a killed
    actor finishes the call it is in, unseen, while its successor already works.
    """

    use_daemon_thread: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._current: Call | None = None
        self._halted = threading.Event()

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _adopted.inbox

    def setup(self) -> None:
        """Prepare; no message is handled before it returns."""

    def cleanup(self) -> None:
        """Let go of what the actor holds."""

    def _actor_loop(self) -> None:
        loop = self.system.loop
        try:
            self.setup()
        except BaseException as error:
            loop.call_soon_threadsafe(self.cell.thread_started, self, error)
            return
        loop.call_soon_threadsafe(self.cell.thread_started, self, None)
        crash: tuple[BaseException, Call] | None = None
        while not self._halted.is_set():
            call: Any = self.actor_inbox.get()
            if call is None:
                break
            crash = self._run_one(call)
            if crash is not None:
                break
        try:
            self.cleanup()
        except Exception:
            log.exception("%s: cleanup failed", self.cell.name)
        pykka.ActorRegistry.unregister(self.actor_ref)
        self.actor_stopped.set()
        _call_soon(loop, self.cell.thread_ended, self, crash)

    def _run_one(self, call: Any) -> tuple[BaseException, Call] | None:
        if type(call) is not Call:
            if _is_stop(call.message):
                _call_soon(self.system.loop, self.cell.stop_soon)
                if call.reply_to is not None:
                    call.reply_to.set(None)
            return None
        reply_to = call.reply_to
        handler = self.handlers.get(call.method)
        if handler is None:
            if reply_to is not None:
                reply_to.fail(Invalid(f"{self.cell.name} has no method {call.method}"))
            return None
        if reply_to is not None and reply_to.done():
            return None
        call.deliveries += 1
        self._current = call
        try:
            result = handler.function(self, *call.args, **call.kwargs)
        except TorusError as error:
            if reply_to is not None:
                reply_to.fail(error)
            return None
        except BaseException as error:
            return error, call
        finally:
            self._current = None
        if reply_to is not None:
            reply_to.set(result)
        return None

    def halt(self) -> list[Call]:
        """Tell the thread to end; return the call it is in, whose answer is given up on.

        The cell has already moved what waits to a new inbox.
        """
        self._halted.set()
        self.actor_inbox.put(cast(Any, None))
        current = self._current
        return [current] if current is not None else []


def _call_soon(loop: asyncio.AbstractEventLoop, function: Any, *args: Any) -> None:
    """Hand over to the loop, unless the process is past it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)


def redeliver_or_fail(cell: Cell, call: Call, error: ActorCrashed) -> None:
    """A call was cut off by its actor's death: give it to the successor, or tell the caller."""
    handler = cell.handlers.get(call.method)
    if (
        handler is not None
        and handler.idempotent
        and call.deliveries < REDELIVERIES_MAX
        and cell.will_restart
    ):
        cell.requeue(call)
    elif call.reply_to is not None:
        call.reply_to.fail(error)
