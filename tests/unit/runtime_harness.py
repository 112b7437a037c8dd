"""What the tests of the runtime share: a loop that must end clean, and actors that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pykka
import pytest
import uvloop

from torus_actors.errors import Invalid
from torus_actors.runtime import (
    ActorSystem,
    BlockingActor,
    ChildSpec,
    LoopActor,
    SupervisorSpec,
    expose,
)

PATIENCE_S = 5.0
"""Deadline of every wait in these tests; reaching it is a failure."""


def on_loop(
    test: Callable[..., Coroutine[Any, Any, None]], factory: Any = asyncio.new_event_loop
) -> Callable[..., None]:
    """Run an async test on a loop of its own that must not report a single unhandled error."""

    def run(**kwargs: Any) -> None:
        noise: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: noise.append(what))
            async with asyncio.timeout(2 * PATIENCE_S):
                await test(**kwargs)

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
        gc.collect()  # "exception was never retrieved" comes with the collection
        assert noise == []

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__dict__.update(test.__dict__)  # the marks
    run.__on_loop__ = test  # type: ignore[attr-defined]
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The same on uvloop."""
    return on_loop(test, uvloop.new_event_loop)


@contextlib.asynccontextmanager
async def system_of(
    *children: ChildSpec | SupervisorSpec,
    roundtrip: Callable[[Any], Any] | None = None,
    **supervisor: Any,
) -> AsyncIterator[ActorSystem]:
    """A started system with these children under its root; checks that it leaves nothing behind."""
    tasks_before = asyncio.all_tasks()
    system = ActorSystem(asyncio.get_running_loop(), rng=random.Random(1), roundtrip=roundtrip)
    supervisor = {"backoff_first_s": 0.001, "backoff_max_s": 0.004, **supervisor}
    await system.start(SupervisorSpec("root", children, **supervisor))
    try:
        yield system
    finally:
        await system.stop()
    assert asyncio.all_tasks() <= tasks_before
    assert not [ref for ref in pykka.ActorRegistry.get_all() if ref.is_alive()]
    assert all(row["state"] == "stopped" and row["waiting"] == 0 for row in system.tree())
    assert not system.background


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of any kind, of any thread
            await asyncio.sleep(0.001)


def row(system: ActorSystem, name: str) -> dict[str, Any]:
    """One actor as ``tree()`` shows it."""
    return next(row for row in system.tree() if row["name"] == name)


class Diary:
    """What happened, in order; written by actors of any thread."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def __call__(self, line: Any) -> None:
        """Write it down."""
        self.lines.append(line)

    def count(self, line: Any) -> int:
        """How often it happened."""
        return self.lines.count(line)


class Worker(LoopActor):
    """A loop actor with a handler for everything that may go well or badly."""

    def __init__(self, diary: Diary | None = None, name: str = "worker") -> None:
        super().__init__()
        self.diary = diary if diary is not None else Diary()
        self.name = name
        self.gate = asyncio.Event()
        self.at_work = 0
        self.at_work_max = 0

    async def setup(self) -> None:
        """Write it down."""
        self.diary(f"{self.name} up")

    async def cleanup(self) -> None:
        """Write it down."""
        self.diary(f"{self.name} down")

    @expose()
    def note(self, line: Any) -> Any:
        """Answer at once."""
        self.diary(line)
        return line

    @expose()
    async def slow(self, line: Any) -> Any:
        """Answer when the gate opens."""
        return await self._slow(line)

    @expose(idempotent=True)
    async def slow_again(self, line: Any) -> Any:
        """The same, and it may be handled twice."""
        return await self._slow(line)

    async def _slow(self, line: Any) -> Any:
        self.at_work += 1
        self.at_work_max = max(self.at_work, self.at_work_max)
        self.diary(f"begin {line}")
        try:
            await self.gate.wait()
        finally:
            self.at_work -= 1
        self.diary(f"end {line}")
        return line

    @expose()
    async def turn(self, line: Any) -> Any:
        """Answer some turns of the loop later."""
        for _ in range(3):
            await asyncio.sleep(0)
        self.diary(line)
        return line

    @expose()
    def open(self) -> None:
        """Let the slow ones go on."""
        self.gate.set()

    @expose()
    def refuse(self) -> None:
        """Fail on purpose."""
        raise Invalid("as agreed")

    @expose()
    async def refuse_later(self) -> None:
        """Fail on purpose, from a coroutine."""
        await asyncio.sleep(0)
        raise Invalid("as agreed")

    @expose()
    def crash(self) -> None:
        """Fail by a bug."""
        self.diary("crash")
        raise ValueError("a bug")

    @expose()
    async def crash_later(self) -> None:
        """Fail by a bug, from a coroutine."""
        await asyncio.sleep(0)
        raise ValueError("a bug")

    @expose(idempotent=True)
    def crash_again(self) -> None:
        """Fail by a bug, each time."""
        self.diary("crash")
        raise ValueError("a bug")

    @expose()
    def cancelled(self) -> None:
        """Let a CancelledError through that is not its own."""
        raise asyncio.CancelledError

    @expose()
    async def cancelled_later(self) -> None:
        """The same from a coroutine."""
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    @expose()
    async def suicide(self) -> str:
        """Kill its own actor, and go on if it can."""
        self.cell.kill("suicide")
        self.diary("still here")
        await asyncio.sleep(0)
        self.diary("and on")
        return "alive"

    @expose()
    def suicide_now(self) -> str:
        """Kill its own actor without ever awaiting."""
        self.cell.kill("suicide")
        return "last words"

    @expose()
    def spawn_bug(self) -> None:
        """Start a task that has a bug."""

        async def bug() -> None:
            await asyncio.sleep(0)
            raise KeyError("in a task")

        self.spawn(bug())

    @expose()
    def spawn_and_cancel(self) -> None:
        """Start a task and end it, which is no bug."""
        self.spawn(asyncio.sleep(60)).cancel()

    @expose()
    def spawn_forever(self) -> None:
        """Start a task that ends with the actor only, badly."""

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                self.diary("task ended")
                raise KeyError("while it was cancelled")

        self.spawn(forever())


class Thinker(BlockingActor):
    """A blocking actor with a handler for everything that may go well or badly."""

    def __init__(self, diary: Diary | None = None, gate: threading.Event | None = None) -> None:
        super().__init__()
        self.diary = diary if diary is not None else Diary()
        self.gate = gate if gate is not None else threading.Event()

    def setup(self) -> None:
        """Write it down."""
        self.thread = threading.get_ident()
        self.diary("thinker up")

    def cleanup(self) -> None:
        """Write it down."""
        self.diary("thinker down")
        assert threading.get_ident() == self.thread

    @expose()
    def note(self, line: Any) -> Any:
        """Answer at once."""
        self.diary(line)
        return line

    @expose()
    def where(self) -> int:
        """The thread it runs on."""
        assert threading.get_ident() == self.thread
        return self.thread

    @expose()
    def block(self, line: Any) -> Any:
        """Answer when the gate opens."""
        return self._block(line)

    @expose(idempotent=True)
    def block_again(self, line: Any) -> Any:
        """The same, and it may be handled twice."""
        return self._block(line)

    def _block(self, line: Any) -> Any:
        self.diary(f"begin {line}")
        assert self.gate.wait(PATIENCE_S)
        self.diary(f"end {line}")
        return line

    @expose()
    def refuse(self) -> None:
        """Fail on purpose."""
        raise Invalid("as agreed")

    @expose()
    def crash(self) -> None:
        """Fail by a bug."""
        self.diary("crash")
        raise ValueError("a bug")

    @expose(idempotent=True)
    def crash_again(self) -> None:
        """Fail by a bug, each time."""
        self.diary("crash")
        raise ValueError("a bug")

    @expose()
    def ask(self, name: str, line: Any) -> Any:
        """Ask a colleague on the loop, and block for the answer."""
        return self.system.actor(name).note.remote(line).get(timeout=PATIENCE_S)


class Fragile(LoopActor):
    """Its setup fails as often as it is told to."""

    def __init__(self, failures: list[Exception], diary: Diary | None = None) -> None:
        super().__init__()
        self.failures = failures
        self.diary = diary if diary is not None else Diary()

    async def setup(self) -> None:
        """Fail, or not."""
        self.diary("try")
        if self.failures:
            raise self.failures.pop(0)

    async def cleanup(self) -> None:
        """Write it down."""
        self.diary("cleaned")

    @expose()
    def ping(self) -> str:
        """Answer."""
        return "pong"


def worker(diary: Diary | None = None, name: str = "worker", **options: Any) -> ChildSpec:
    """The spec of a Worker."""
    return ChildSpec(name, lambda: Worker(diary, name), **{"shutdown_s": 0.05, **options})


@pytest.fixture
def diary() -> Diary:
    """An empty diary."""
    return Diary()
