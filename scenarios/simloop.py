"""An asyncio event loop with virtual time, whose callbacks belong to simulated processes.

Nothing waits: when no callback is ready, time jumps to the next timer. Every callback carries the
`SimProcess` in whose context it was scheduled, so a process can be paused (its callbacks are held,
and all run when it goes on, as after SIGSTOP) or killed (they are dropped, as after SIGKILL: no
``finally``, no clean-up). Two runs that schedule the same things run the same callbacks in the same
order: ties in time are broken by the order of scheduling.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from heapq import heappop, heappush
from typing import Any

START_S = 1000.0
"""Where virtual time begins: not at 0, which code may take for "never"."""

STUCK_CALLBACKS = 500_000
"""So many callbacks without time moving on are a loop that never ends."""

log = logging.getLogger(__name__)

_process: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar(
    "torus_sim_process", default=None
)


class Stuck(Exception):
    """The simulation cannot go on: nothing is left to do, or it runs in circles."""


class SimProcess:
    """One simulated process: what its callbacks have in common.

    Attributes:
        name: for people.
        context: run things in it, and they belong to the process.
        alive: False once it was killed.
        paused: whether its callbacks are held.
        address: of the simulated host it runs on; the network looks at it.
    """

    __slots__ = ("_graveyard", "_held", "_loop", "address", "alive", "context", "name", "paused")

    def __init__(self, loop: SimLoop, name: str, address: str) -> None:
        self._loop = loop
        self.name = name
        self.address = address
        self.alive = True
        self.paused = False
        self._held: list[SimHandle] = []
        self._graveyard: list[asyncio.Task[Any]] = []
        self.context = contextvars.Context()
        self.context.run(_process.set, self)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of the process."""
        return self._loop.create_task(coroutine, context=self.context.copy())

    def pause(self) -> None:
        """Hold all callbacks from now on."""
        self.paused = True

    def resume(self) -> None:
        """Go on; what was held runs now, in its order."""
        if self.paused:
            self.paused = False
            held, self._held = self._held, []
            self._loop.requeue(held)

    def kill(self) -> None:
        """Never run anything of it again.

        Its suspended coroutines are kept until the loop is closed: were they collected now, their
        ``finally`` blocks would run, which no process does after SIGKILL.
        """
        if self.alive:
            self.alive = False
            self._held.clear()
            tasks = asyncio.all_tasks(self._loop)
            self._graveyard = [t for t in tasks if isinstance(t, SimTask) and t.process is self]

    def take(self, task: asyncio.Task[Any]) -> None:
        """Keep a task that a callback made in which the process was killed."""
        self._graveyard.append(task)

    def hold(self, handle: SimHandle) -> None:
        """Keep a callback that came up while the process was paused."""
        self._held.append(handle)

    def bury(self) -> None:
        """The loop is being closed: let the suspended coroutines go."""
        # Clean-up code may make further tasks.
        while self._graveyard:
            close_quietly(self._graveyard.pop(0))


def close_quietly(task: asyncio.Task[Any]) -> None:
    """End a task that will never run again, whatever its coroutine still wants to say."""
    coroutine = task.get_coro()
    try:
        if coroutine is not None:
            coroutine.close()
    except BaseException as error:
        log.debug("a coroutine as it was closed: %r", error)


def current_process() -> SimProcess | None:
    """The process whose code is running; None for the simulator's own."""
    return _process.get()


class SimTask(asyncio.Task[Any]):
    """A task that knows its process; made by `SimLoop.create_task`, in few steps: they are many."""

    process: SimProcess | None
    _log_destroy_pending: bool


class SimHandle(asyncio.TimerHandle):
    """A callback; all are timer handles, so that `asyncio` finds the methods it expects."""

    __slots__ = ("process",)

    def __init__(self, when: float, callback: Callable[..., Any], args: Any, context: Any) -> None:
        # Not the constructor of the base, which is twice as slow for what is not needed here.
        if context is None:
            context = copy_context()
        self._context = context
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._when = when
        self.process = context.get(_process)

    def __repr__(self) -> str:
        state = " cancelled" if self._cancelled else ""
        return f"<SimHandle{state} at {self._when:.6f}: {self._callback!r}>"

    def cancel(self) -> None:
        """Never run it."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = None  # type: ignore[assignment]
            self._args = None  # type: ignore[assignment]


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Attributes:
        network: answers ``create_connection`` and ``create_server``; set by its maker.
        errors: what callbacks and tasks raised that nobody caught: bugs.
        callbacks: callbacks run so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = None
        self.errors: list[dict[str, Any]] = []
        self.callbacks = 0
        self._now = START_S
        self._ready: deque[SimHandle] = deque()
        self._timers: list[tuple[float, int, SimHandle]] = []
        self._order = 0
        self._processes: list[SimProcess] = []
        self._leftovers: list[asyncio.Task[Any]] | None = None
        """While the loop is being closed: tasks that clean-up code still makes."""
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def new_process(self, name: str, address: str) -> SimProcess:
        """A process with nothing in it yet."""
        process = SimProcess(self, name, address)
        self._processes.append(process)
        return process

    # -- what asyncio calls ----------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def create_task(  # type: ignore[override]
        self, coro: Any, *, name: str | None = None, context: Any = None
    ) -> SimTask:
        """See asyncio."""
        task = SimTask(coro, loop=self, name=name or "task", context=context)
        process = _process.get() if context is None else context.get(_process)
        task.process = process
        # Those of a killed process stay pending for ever.
        task._log_destroy_pending = False
        if process is not None and not process.alive:
            process.take(task)
        if self._leftovers is not None:
            self._leftovers.append(task)
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> SimHandle:
        """See asyncio."""
        handle = SimHandle(self._now, callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]
    """There is but one thread."""

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> SimHandle:
        """See asyncio."""
        handle = SimHandle(when, callback, args, context)
        self._order = order = self._order + 1
        heappush(self._timers, (when, order, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> SimHandle:
        """See asyncio."""
        when = self._now + delay if delay > 0 else self._now
        handle = SimHandle(when, callback, args, context)
        self._order = order = self._order + 1
        heappush(self._timers, (when, order, handle))
        return handle

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run it here and now, and tell the result a little later."""
        future: asyncio.Future[Any] = self.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except BaseException as error:
                future.set_exception(error)

        self.call_later(0.0005, run)
        return future

    async def getaddrinfo(self, host: Any, port: Any, **kwargs: Any) -> list[Any]:
        """A name is its own address."""
        return [(2, 1, 6, "", (host, port))]

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
        """Connect over the simulated network."""
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
        """Listen on the simulated network."""
        return self.network.listen(protocol_factory, host, port)

    # -- running ---------------------------------------------------------------------------------

    def requeue(self, handles: list[SimHandle]) -> None:
        """Run handles that were held."""
        self._ready.extend(handles)

    def _run_once(self) -> None:
        """Run what is ready, then jump to the next timer, and so on until told to stop."""
        ready = self._ready
        take = ready.popleft
        total = count = 0
        while not self._stopping:  # type: ignore[attr-defined]
            if not ready and self._advance():
                total += count
                count = 0
            handle = take()
            if handle._cancelled:
                continue
            process = handle.process
            if process is not None:
                if not process.alive:
                    continue
                if process.paused:
                    process.hold(handle)
                    continue
            count += 1
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler(
                    {"message": f"callback {handle._callback!r}", "exception": error}
                )
            if count > STUCK_CALLBACKS:
                raise Stuck(f"time stands still at {self._now:.3f}: {handle._callback!r}")
        self.callbacks += total + count

    def _advance(self) -> bool:
        """Jump to the next timer, and make ready what is due then; whether time has moved on."""
        timers, ready = self._timers, self._ready
        while timers:
            when, _, handle = heappop(timers)
            process = handle.process
            if handle._cancelled or (process is not None and not process.alive):
                continue
            before = self._now
            now = self._now = max(when, before)
            ready.append(handle)
            while timers and timers[0][0] <= now:
                ready.append(heappop(timers)[2])
            return now > before
        raise Stuck(f"nothing is left to do at {self._now:.3f}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes."""

    def close(self) -> None:
        """Forget everything; suspended coroutines are closed with nobody listening."""
        for process in self._processes:
            process.kill()
        self._leftovers = list(asyncio.all_tasks(self))
        for process in self._processes:
            process.bury()
        while self._leftovers:
            close_quietly(self._leftovers.pop())
        self._ready.clear()
        self._timers.clear()
        super().close()
