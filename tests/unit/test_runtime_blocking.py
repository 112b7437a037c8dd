"""Actors on a thread of their own: the same rules, though a thread cannot be killed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.unit.runtime_harness import (
    PATIENCE_S,
    Diary,
    Thinker,
    on_loop,
    on_uvloop,
    row,
    system_of,
    until,
    worker,
)
from torus_actors.errors import ActorCrashed, ActorNotFound, DeadlineExceeded, Invalid, Overloaded
from torus_actors.runtime import ActorSystem, BlockingActor, ChildSpec, expose, get
from torus_actors.runtime.messages import REDELIVERIES_MAX


def thinker(
    diary: Diary | None = None, gate: threading.Event | None = None, **options: Any
) -> ChildSpec:
    """The spec of a Thinker."""
    return ChildSpec("thinker", lambda: Thinker(diary, gate), **{"shutdown_s": 1.0, **options})


async def on_its_own_thread() -> None:
    """setup, cleanup and all handlers run on one thread, which is not the loop's, in order."""
    diary = Diary()
    async with system_of(thinker(diary)) as system:
        handle = system.actor("thinker")
        refs = [handle.note.remote(n) for n in range(200)]
        assert await get(refs) == list(range(200))
        assert await handle.where.remote() == await handle.where.remote()
        assert await handle.where.remote() != threading.get_ident()
        assert (row(system, "thinker")["kind"], row(system, "thinker")["state"]) == (
            "thread", "running",
        )  # fmt: skip
    assert diary.lines == ["thinker up", *range(200), "thinker down"]


test_on_its_own_thread = on_loop(on_its_own_thread)
test_on_its_own_thread_on_uvloop = on_uvloop(on_its_own_thread)


@on_loop
async def test_errors_and_unknown_methods_are_answers() -> None:
    """A TorusError is an answer and the actor lives on."""
    async with system_of(thinker()) as system:
        handle = system.actor("thinker")
        with pytest.raises(Invalid, match="as agreed"):
            await handle.refuse.remote()
        handle.refuse.tell()
        handle.no_such.tell()
        with pytest.raises(Invalid, match="no method"):
            await handle.no_such.remote()
        assert await handle.note.remote(1) == 1
        assert row(system, "thinker")["restarts"] == 0


@on_loop
async def test_a_crash_ends_the_thread() -> None:
    """The caller learns the cause; a successor on a new thread handles what waits, in order."""
    diary = Diary()
    async with system_of(thinker(diary)) as system:
        handle = system.actor("thinker")
        before = await handle.where.remote()
        old: Any = system.cells["thinker"].actor
        failing = handle.crash.remote()
        queued = [handle.note.remote(n) for n in range(5)]
        with pytest.raises(ActorCrashed) as crashed:
            await failing
        assert isinstance(crashed.value.__cause__, ValueError)
        assert await get(queued) == list(range(5))
        assert system.cells["thinker"].actor is not old and old.thread == before
        assert diary.lines == ["thinker up", "crash", "thinker down", "thinker up", *range(5)]
        assert row(system, "thinker")["restarts"] == 1


@on_loop
async def test_redelivery_is_bounded() -> None:
    """A call that kills every actor it meets fails in the end, and those behind it get through."""
    diary = Diary()
    async with system_of(thinker(diary)) as system:
        handle = system.actor("thinker")
        failing, behind = handle.crash_again.remote(), handle.note.remote("behind")
        with pytest.raises(ActorCrashed):
            await failing
        assert await behind == "behind"
        assert diary.count("crash") == 1 + REDELIVERIES_MAX
        # What was redelivered came before what was sent after it.
        assert diary.lines.index("behind") > max(
            n for n, line in enumerate(diary.lines) if line == "crash"
        )


@on_loop
async def test_killed_in_a_blocking_call() -> None:
    """The caller learns at once, the successor gets what waits, the old thread's end is unseen."""
    diary, gate = Diary(), threading.Event()
    async with system_of(thinker(diary, gate)) as system:
        handle = system.actor("thinker")
        blocked = handle.block.remote("once")
        queued = [handle.note.remote(n) for n in range(3)]
        await until(lambda: diary.count("begin once"))
        system.cells["thinker"].kill()
        with pytest.raises(ActorCrashed, match="killed on request"):
            await blocked
        assert await get(queued) == [0, 1, 2]
        assert not diary.count("end once")
        gate.set()
        await until(lambda: diary.count("thinker down"))
        assert await handle.note.remote("well") == "well"
        # Nothing was handled twice, and the death of the old thread was no second death.
        assert diary.count("begin once") == 1 and row(system, "thinker")["restarts"] == 1
        assert [line for line in diary.lines if isinstance(line, int)] == [0, 1, 2]


@on_loop
async def test_an_idempotent_call_is_answered_by_the_successor() -> None:
    """What the killed thread still says is not taken for the answer."""
    diary, gates = Diary(), [threading.Event(), threading.Event()]
    spec = ChildSpec("thinker", lambda: Thinker(diary, gates[diary.count("thinker up")]))
    async with system_of(spec) as system:
        handle = system.actor("thinker")
        ref = handle.block_again.remote("x")
        await until(lambda: diary.count("begin x") == 1)
        system.cells["thinker"].kill()
        await until(lambda: diary.count("begin x") == 2)
        gates[0].set()
        await until(lambda: diary.count("thinker down"))
        await asyncio.sleep(0)
        assert not ref.done()
        gates[1].set()
        assert await ref == "x"


@on_loop
async def test_a_killed_thread_that_then_crashes_is_dead_once() -> None:
    """The bug of a thread that was given up on neither counts nor is its call redelivered again."""
    diary, gate = Diary(), threading.Event()

    class Late(Thinker):
        @expose(idempotent=True)
        def block_and_crash(self) -> str:
            self.diary("begin")
            if self.diary.count("begin") > 1:
                return "done"
            assert self.gate.wait(PATIENCE_S)
            raise ValueError("too late")

    async with system_of(ChildSpec("late", lambda: Late(diary, gate))) as system:
        ref = system.actor("late").block_and_crash.remote()
        await until(lambda: diary.count("begin"))
        system.cells["late"].kill()
        assert await ref == "done"
        gate.set()
        await until(lambda: diary.count("thinker down"))
        await system.actor("late").note.remote("well")
        assert diary.count("begin") == 2 and row(system, "late")["restarts"] == 1


@on_loop
async def test_many_kills_under_load_handle_nothing_twice() -> None:
    """Whenever the kills come: each call is handled at most once, and answered or failed."""
    diary = Diary()
    async with system_of(thinker(diary), max_restarts=1000, backoff_max_s=0.0) as system:
        handle = system.actor("thinker")
        refs = []
        for n in range(400):
            refs.append(handle.note.remote(n))
            if n % 20 == 7:
                system.cells["thinker"].kill()
                for _ in range(n % 9):
                    await asyncio.sleep(0)
        answers = await asyncio.gather(*refs, return_exceptions=True)
        noted = [line for line in diary.lines if isinstance(line, int)]
        assert len(noted) == len(set(noted))
        for n, answer in enumerate(answers):
            assert isinstance(answer, ActorCrashed) or (answer == n and n in noted)
        assert sum(isinstance(answer, ActorCrashed) for answer in answers) <= 20


@on_loop
async def test_stop_lets_the_call_finish() -> None:
    """Within shutdown_s the thread ends its call, is answered for, and cleans up."""
    diary, gate = Diary(), threading.Event()
    async with system_of(thinker(diary, gate)) as system:
        ref = system.actor("thinker").block.remote("x")
        queued = system.actor("thinker").note.remote("never")
        await until(lambda: diary.count("begin x"))
        actor: Any = system.cells["thinker"].actor
        stopping = asyncio.create_task(system.cells["thinker"].stop(final=True))
        await until(lambda: actor._leaving)
        assert not stopping.done()
        gate.set()
        await stopping
        assert await ref == "x"
        with pytest.raises(ActorNotFound):
            await queued
        assert diary.lines == ["thinker up", "begin x", "end x", "thinker down"]


async def stop_gives_up() -> None:
    """A call that outlasts shutdown_s, and the loop, harms nobody when it ends."""
    diary, gate = Diary(), threading.Event()
    async with system_of(thinker(diary, gate, shutdown_s=0.01)) as system:
        ref = system.actor("thinker").block.remote("x")
        await until(lambda: diary.count("begin x"))
        begin = system.loop.time()
        await system.stop()
        assert system.loop.time() - begin < 1.0
        with pytest.raises(ActorCrashed, match="was stopped"):
            await ref
    threads.append((gate, diary))


threads: list[tuple[threading.Event, Diary]] = []


@pytest.mark.parametrize("run", [on_loop, on_uvloop])
def test_stop_gives_up_on_a_stuck_thread(run: Any) -> None:
    """A call that outlasts shutdown_s, and the loop, harms nobody when it ends."""
    before = threading.active_count()
    run(stop_gives_up)()
    gate, diary = threads.pop()
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith("Thinker")]
    gate.set()
    for thread in stuck:
        thread.join(PATIENCE_S)
    # An exception in the thread would fail this test: pytest turns it into a warning.
    assert threading.active_count() <= before and diary.lines[-1] == "thinker down"


@on_loop
async def test_bounds_hold_for_threads_too() -> None:
    """A full inbox is Overloaded; call() waits for room, and gets it from the thread."""
    diary, gate = Diary(), threading.Event()
    async with system_of(thinker(diary, gate, inbox_max=2)) as system:
        handle = system.actor("thinker")
        first = handle.block.remote("x")
        await until(lambda: diary.count("begin x"))
        waiting = [handle.note.remote(n) for n in range(2)]
        with pytest.raises(Overloaded):
            await handle.note.remote("too much")
        late = [asyncio.create_task(handle.note.call(n)) for n in range(2, 30)]
        with pytest.raises(DeadlineExceeded):
            await handle.note.call("impatient", timeout_s=0.01)
        gate.set()
        assert await get([first, *waiting]) == ["x", 0, 1]
        assert await asyncio.gather(*late) == list(range(2, 30))


@on_loop
async def test_deadlines_hold_for_threads_too() -> None:
    """The caller is released in time though the thread is not, and what it gave up is not done."""
    diary, gate = Diary(), threading.Event()
    async with system_of(thinker(diary, gate)) as system:
        handle = system.actor("thinker")
        ref = handle.block.remote("x", timeout_s=0.01)
        given_up = handle.note.remote("never", timeout_s=0.01)
        for late in (ref, given_up):
            with pytest.raises(DeadlineExceeded):
                await late
        gate.set()
        assert await handle.note.remote("well") == "well"
        assert "never" not in diary.lines


class Locked(BlockingActor):
    """Its setup fails as often as it is told to."""

    def __init__(self, failures: list[BaseException], diary: Diary) -> None:
        super().__init__()
        self.failures, self.diary = failures, diary

    def setup(self) -> None:
        """Fail, or not."""
        self.diary("try")
        if self.failures:
            raise self.failures.pop(0)

    def cleanup(self) -> None:
        """Write it down."""
        self.diary("cleaned")

    @expose()
    def ping(self) -> str:
        """Answer."""
        return "pong"


@on_loop
async def test_a_setup_that_fails_raises_and_cleans_up() -> None:
    """At boot out of start(); on restart it is tried again; no thread is left."""
    diary = Diary()
    failures: list[BaseException] = [OSError("no disk")]
    spec = ChildSpec("x", lambda: Locked(failures, diary))
    with pytest.raises(OSError, match="no disk"):
        async with system_of(spec):
            pass
    assert diary.lines == ["try", "cleaned"]
    async with system_of(spec) as system:
        failures += [OSError("busy"), StopIteration(), asyncio.CancelledError(), SystemExit(1)]
        system.cells["x"].kill()
        await until(lambda: not failures)
        assert await system.actor("x").ping.remote() == "pong"
        assert row(system, "x")["restarts"] == 5
        assert (diary.count("try"), diary.count("cleaned")) == (7, 6)


@on_loop
async def test_a_child_that_does_not_start_leaves_its_supervisor_alive() -> None:
    """What starts one more learns of it, and goes on.

    Found by review: the supervisor died of it, and a process that was stopped while it started
    could not give back its lease.
    """
    failures: list[BaseException] = [OSError("no disk"), Overloaded("not now")]
    async with system_of() as system:
        root = system.actor("root")
        spec = ChildSpec("x", lambda: Locked(failures, Diary()))
        with pytest.raises(ActorCrashed, match="x did not start: OSError"):
            await root.start_child.remote(spec)
        with pytest.raises(Overloaded):
            await root.start_child.remote(spec)
        await root.start_child.remote(spec)
        assert await system.actor("x").ping.remote() == "pong"
        assert row(system, "root")["restarts"] == 0


@on_loop
async def test_a_thread_may_call_actors_of_the_loop() -> None:
    """Calls from a foreign thread are safe: they are watched, answered, and get() blocks for it."""
    async with system_of(worker(), thinker()) as system:
        handle = system.actor("thinker")
        refs = [handle.ask.remote("worker", n) for n in range(200)]
        assert await get(refs) == list(range(200))
        with pytest.raises(ActorNotFound):
            await handle.ask.remote("nobody", 1)
        await until(lambda: not system.deadlines._pending)


@on_loop
async def test_a_call_from_a_thread_touches_the_loop_on_its_own_thread_only() -> None:
    """What the thread asks for is watched, and handled, by the loop once it turns again."""
    async with system_of(worker()) as system:
        refs: list[Any] = []
        thread = threading.Thread(
            target=lambda: refs.append(system.actor("worker").note.remote("x", timeout_s=0.2))
        )
        thread.start()
        thread.join(PATIENCE_S)  # the loop stands still meanwhile
        assert not system.deadlines._pending and system.deadlines._timer is None
        assert await refs[0] == "x"
        await system.cells["worker"].room(0.0)  # there is room: it does not wait for any


def test_async_methods_are_refused() -> None:
    """A coroutine on a thread without a loop would never run: the class is refused."""
    with pytest.raises(TypeError, match="just return"):

        class Wrong(BlockingActor):
            @expose()
            async def ping(self) -> None:
                pass


@on_loop
async def test_options_work_for_threads() -> None:
    """Cls.options(...).remote(args) starts one, and an unsupervised one that dies is gone."""
    async with system_of():
        diary = Diary()
        handle = await Thinker.options(name="ray").remote(diary)
        assert await handle.note.remote(1) == 1
        with pytest.raises(ActorCrashed):
            await handle.crash.remote()
        with pytest.raises(ActorNotFound, match="a bug"):
            await handle.note.remote(2)
        assert ActorSystem.current().cells["ray"].waiting() == 0
