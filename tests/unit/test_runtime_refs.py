"""ObjectRefs, get and wait; and what pykka itself may do with these actors."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pykka
import pytest

from tests.unit.runtime_harness import (
    PATIENCE_S,
    Diary,
    Thinker,
    Worker,
    on_loop,
    on_uvloop,
    row,
    system_of,
    until,
    worker,
)
from torus_actors.errors import Closed, DeadlineExceeded, Invalid
from torus_actors.runtime import ActorSystem, ChildSpec, ObjectRef, get, wait


async def in_thread(function: Any, *args: Any) -> Any:
    """Run a function on another thread and wait for it without stopping the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def set_from_foreign_threads() -> None:
    """Whoever sets a ref first wins, from any thread, and the waiter wakes."""
    system = ActorSystem(asyncio.get_running_loop())
    for n in range(50):
        ref: ObjectRef[int] = ObjectRef(system, system.loop.time() + PATIENCE_S)
        setters = [
            threading.Thread(target=ref.set, args=(n,)),
            threading.Thread(target=ref.fail, args=(Invalid(str(n)),)),
        ]
        for setter in setters:
            setter.start()
        try:
            assert await ref == n
        except Invalid as error:
            assert str(error) == str(n)
        for setter in setters:
            await in_thread(setter.join)
    assert not system.deadlines._pending
    await system.stop()


test_set_from_foreign_threads = on_loop(set_from_foreign_threads)
test_set_from_foreign_threads_on_uvloop = on_uvloop(set_from_foreign_threads)


@on_loop
async def test_the_first_answer_wins() -> None:
    """Later answers and errors are dropped without a word."""
    system = ActorSystem(asyncio.get_running_loop())
    ref: ObjectRef[int] = ObjectRef(system)
    ref.set(1)
    ref.set(2)
    ref.fail(Invalid("late"))
    ref.set_exception((ValueError, ValueError("late"), None))
    assert ref.done() and await ref == 1 and ref.get() == 1
    failed: ObjectRef[int] = ObjectRef(system)
    try:
        raise Invalid("handled")
    except Invalid:
        failed.set_exception()
    with pytest.raises(Invalid, match="handled"):
        await failed
    await system.stop()


@on_loop
async def test_get_blocks_another_thread() -> None:
    """It returns the answer, raises the error, or DeadlineExceeded; the call goes on after that."""
    system = ActorSystem(asyncio.get_running_loop())
    ref: ObjectRef[int] = ObjectRef(system)
    with pytest.raises(RuntimeError, match="await it"):
        ref.get()
    with pytest.raises(DeadlineExceeded):
        await in_thread(lambda: ref.get(timeout=0.01))
    assert asyncio.all_tasks() == {asyncio.current_task()}
    getting = asyncio.ensure_future(in_thread(ref.get))
    await asyncio.sleep(0)
    ref.set(5)
    assert await getting == 5 and await in_thread(ref.get) == 5
    failed: ObjectRef[int] = ObjectRef(system)
    failed.fail(DeadlineExceeded("its own"))
    with pytest.raises(DeadlineExceeded, match="its own"):
        await in_thread(lambda: failed.get(timeout=PATIENCE_S))
    given_up: ObjectRef[int] = ObjectRef(system)
    given_up.future.cancel()
    with pytest.raises(Closed):
        await in_thread(given_up.get)
    await system.stop()


@on_loop
async def test_stop_releases_threads_and_tasks_that_wait() -> None:
    """A ref that nobody answers fails when the system stops: nobody hangs."""
    system = ActorSystem(asyncio.get_running_loop())
    ref: ObjectRef[int] = ObjectRef(system, system.loop.time() + 1000)
    thread = asyncio.ensure_future(in_thread(ref.get))
    await asyncio.sleep(0)
    await system.stop()
    for waiter in (ref, thread):
        with pytest.raises(Closed):
            await waiter


@on_loop
async def test_get_many() -> None:
    """Answers in the order of the refs; the error of one; a timeout that leaves the calls be."""
    async with system_of(worker(max_concurrency=2), worker(name="other")) as system:
        handle, other = system.actor("worker"), system.actor("other")
        assert await get([]) == [] and await get([], timeout=0.1) == []
        assert await get(handle.note.remote(1), timeout=PATIENCE_S) == 1
        refs = [handle.turn.remote(1), other.note.remote(2), handle.note.remote(3)]
        assert await get(refs, timeout=PATIENCE_S) == [1, 2, 3]
        assert await get((refs[2], refs[0], refs[2])) == [3, 1, 3]
        with pytest.raises(Invalid):
            await get([other.note.remote(1), other.refuse.remote()])
        slow = handle.slow.remote("x")
        for refs_ in (slow, [slow, other.note.remote(1)]):
            with pytest.raises(DeadlineExceeded, match="1 of"):
                await get(refs_, timeout=0.01)
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        assert await slow == "x"


@on_loop
async def test_wait() -> None:
    """The answered and the pending, in order; by count, by timeout; errors count as answers."""
    system = ActorSystem(asyncio.get_running_loop())
    refs: list[ObjectRef[int]] = [ObjectRef(system) for _ in range(4)]
    assert await wait([]) == ([], [])
    assert await wait(refs, timeout=0) == ([], refs)
    assert await wait(refs, timeout=0.01) == ([], refs)
    assert await wait(refs, num_returns=0) == ([], refs)
    refs[2].set(1)
    assert await wait(refs) == ([refs[2]], [refs[0], refs[1], refs[3]])
    system.loop.call_soon(refs[0].fail, Invalid("x"))
    assert await wait(refs, num_returns=2) == ([refs[0], refs[2]], [refs[1], refs[3]])
    for ref in refs:
        system.loop.call_soon(ref.set, 1)
    assert await wait(refs, num_returns=100) == (refs, [])
    await system.stop()


@on_loop
async def test_polling_with_wait_lets_the_answer_come() -> None:
    """A loop of wait(timeout=0) does not starve the actor it waits for."""
    async with system_of(worker()) as system:
        ref = system.actor("worker").turn.remote(1)
        for _ in range(100):
            ready, _pending = await wait([ref], timeout=0)
            if ready:
                break
        assert ready == [ref]


@on_loop
async def test_cancelled_waiters() -> None:
    """Awaiting and being cancelled gives the call up; wait() and get(timeout) leave it be."""
    system = ActorSystem(asyncio.get_running_loop())
    ref: ObjectRef[int] = ObjectRef(system)
    for waiting in (wait([ref]), get(ref, timeout=PATIENCE_S)):
        task = asyncio.ensure_future(waiting)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and not ref.done()
    task = asyncio.ensure_future(get(ref))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert ref.done()
    ref.set(1)
    ref.fail(Invalid("late"))
    await system.stop()


@on_loop
async def test_errors_that_nobody_fetches_are_silent() -> None:
    """A caller may drop a ref: asyncio prints nothing about the error in it."""
    async with system_of(worker()) as system:
        handle = system.actor("worker")
        for _ in range(3):
            handle.refuse.remote()
            handle.crash.remote()
            handle.no_such.remote()
        assert await handle.note.remote("well") == "well"
        gc.collect()
        await asyncio.sleep(0)


@on_loop
async def test_callbacks() -> None:
    """add_done_callback runs on the loop with the future, for answers and errors."""
    system = ActorSystem(asyncio.get_running_loop())
    seen: list[Any] = []
    for error in (None, Invalid("x")):
        ref: ObjectRef[int] = ObjectRef(system)
        ref.add_done_callback(lambda future: seen.append(future.exception()))
        await in_thread(ref.set, 1) if error is None else await in_thread(ref.fail, error)
        await until(ref.done)
        await asyncio.sleep(0)
        assert seen.pop() is error
    await system.stop()


@on_loop
@pytest.mark.parametrize("cls", [Worker, Thinker])
async def test_the_registry_of_pykka_knows_who_lives(cls: Any) -> None:
    """It holds each living actor once, and forgets it at its death, its stop, its failed setup."""

    def listed() -> list[Any]:
        return pykka.ActorRegistry.get_by_class(cls)

    gate = threading.Event()
    async with system_of(ChildSpec("x", lambda: cls(Diary()), shutdown_s=0.1)) as system:
        actor: Any = system.cells["x"].actor
        assert listed() == [actor.actor_ref] and actor.actor_ref.is_alive()
        if cls is Thinker:
            actor.gate = gate
            system.actor("x").block.tell("x")
            await until(lambda: actor.diary.count("begin x"))
        system.cells["x"].kill()
        assert not actor.actor_ref.is_alive() and listed() == []
        with pytest.raises(pykka.ActorDeadError):
            actor.actor_ref.tell("anything")
        assert await system.actor("x").note.remote("well") == "well"
        assert len(listed()) == 1
        gate.set()
    assert listed() == []

    async def broken(self: Any) -> None:
        raise OSError

    bad = type("Bad", (cls,), {"setup": broken if cls is Worker else lambda self: 1 / 0})
    async with system_of() as system:
        with pytest.raises((OSError, ZeroDivisionError)):
            await system.spawn(ChildSpec("bad", lambda: bad(Diary())))
        assert listed() == []


@on_loop
@pytest.mark.parametrize("cls", [Worker, Thinker])
async def test_pykka_may_stop_an_actor(cls: Any) -> None:
    """ActorRef.stop() from a thread ends it after what was sent before; its supervisor decides."""
    diary = Diary()
    async with system_of(ChildSpec("x", lambda: cls(diary))) as system:
        actor: Any = system.cells["x"].actor
        before = [system.actor("x").note.remote(n) for n in range(5)]
        assert await in_thread(lambda: actor.actor_ref.stop(timeout=PATIENCE_S)) is True
        assert await get(before) == list(range(5))
        await until(lambda: row(system, "x")["restarts"] == 1)
        assert await system.actor("x").note.remote("well") == "well"
        assert await in_thread(lambda: actor.actor_ref.stop(timeout=PATIENCE_S)) is False
        # Twice at once ends one actor, not its successor too.
        again: Any = system.cells["x"].actor
        again.stop()
        again.stop()
        await until(lambda: system.cells["x"].actor not in (again, None))
        await system.actor("x").note.remote("well")
        # The thread may be gone before the second: that one is then meant for whoever is there.
        assert row(system, "x")["restarts"] in ((2,) if cls is Worker else (2, 3))


@on_loop
@pytest.mark.parametrize("cls", [Worker, Thinker])
async def test_pykka_messages_are_refused(cls: Any) -> None:
    """A raw ask() is told to use a handle; a raw tell() is dropped; neither harms the actor."""
    async with system_of(ChildSpec("x", lambda: cls(Diary()))) as system:
        reference = pykka.ActorRegistry.get_by_class(cls)[0]
        with pytest.raises(Invalid, match="handle"):
            await in_thread(lambda: reference.ask({"raw": 1}, timeout=PATIENCE_S))
        reference.tell({"raw": 1})
        assert await system.actor("x").note.remote("well") == "well"
        assert row(system, "x")["restarts"] == 0


@on_loop
async def test_a_stop_that_waits_in_a_dead_inbox_is_answered() -> None:
    """A thread blocked in ActorRef.stop() is released when the actor ends for good before it."""
    async with system_of(worker()) as system:
        reference = pykka.ActorRegistry.get_by_class(Worker)[0]
        slow = system.actor("worker").slow.remote("x")
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(in_thread(reference.stop))
        await until(lambda: system.cells["worker"].waiting() == 1)
        await system.remove("worker")
        assert await stopping is False
        assert slow.done()
