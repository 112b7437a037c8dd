"""Calls to actors on the loop: order, overlap, bounds, deadlines, errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pykka
import pytest

from tests.unit.runtime_harness import (
    Diary,
    Worker,
    on_loop,
    on_uvloop,
    row,
    system_of,
    until,
    worker,
)
from torus_actors.errors import (
    ActorCrashed,
    ActorNotFound,
    Closed,
    DeadlineExceeded,
    Invalid,
    NoPeer,
    Overloaded,
)
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, Reply, expose, get
from torus_actors.runtime.actor import TURN_MESSAGES_MAX
from torus_actors.runtime.messages import REDELIVERIES_MAX


async def in_arrival_order() -> None:
    """Messages are handled in the order they were sent, sync and async ones alike."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        handle = system.actor("worker")
        diary.lines.clear()
        refs = [(handle.turn if n % 3 else handle.note).remote(n) for n in range(1000)]
        assert await get(refs) == list(range(1000))
        assert diary.lines == list(range(1000))


test_in_arrival_order = on_loop(in_arrival_order)
test_in_arrival_order_on_uvloop = on_uvloop(in_arrival_order)


@on_loop
async def test_a_flooded_actor_lets_others_have_their_turn() -> None:
    """One actor's flood delays another actor's message by one budget at most."""
    diary = Diary()
    async with system_of(worker(diary), worker(diary, "other")) as system:
        for n in range(10 * TURN_MESSAGES_MAX):
            system.actor("worker").note.tell(n)
        await system.actor("other").note.remote("me")
        assert diary.lines.index("me") <= 2 * TURN_MESSAGES_MAX + 2


@on_loop
@pytest.mark.parametrize("limit", [1, 3])
async def test_max_concurrency_bounds_the_overlap(limit: int) -> None:
    """Exactly ``max_concurrency`` async handlers overlap, and a sync one waits for a free place."""
    async with system_of(worker(max_concurrency=limit)) as system:
        handle = system.actor("worker")
        refs = [handle.slow.remote(n) for n in range(2 * limit)]
        actor = system.cells["worker"].actor
        assert isinstance(actor, Worker)
        await until(lambda: actor.at_work == limit)
        late = handle.note.remote("late")
        assert not late.done() and system.cells["worker"].waiting() == limit + 1
        actor.gate.set()
        assert await get(refs) == list(range(2 * limit))
        assert await late == "late"
        assert actor.at_work_max == limit


@on_loop
async def test_deadline_of_a_call_that_is_never_answered() -> None:
    """The caller gets DeadlineExceeded, in the order of deadlines; later calls are not lost."""
    async with system_of(worker()) as system:
        handle = system.actor("worker")
        ref = handle.slow.remote("x", timeout_s=0.01)
        queued = handle.note.remote("never handled", timeout_s=0.01)
        patient = handle.note.remote("patient")
        with pytest.raises(DeadlineExceeded):
            await ref
        with pytest.raises(TimeoutError):
            await queued
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        assert await patient == "patient"
        # What was given up while it waited is not done afterwards.
        assert "never handled" not in actor.diary.lines
        assert ref.done() and "end x" in actor.diary.lines


@on_loop
async def test_the_sweep_forgets_what_is_answered_or_given_up() -> None:
    """Nothing is watched that was answered or cancelled, and an idle system has no timer."""
    async with system_of(worker()) as system:
        handle = system.actor("worker")
        deadlines = system.deadlines
        await handle.note.remote(1)
        assert not deadlines._pending
        task = asyncio.create_task(handle.slow.call("x"))
        await until(lambda: deadlines._pending)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: not deadlines._pending and deadlines._timer is None)


@on_loop
async def test_a_cancelled_waiter_gives_its_queued_call_up() -> None:
    """A call whose caller was cancelled while it waited in the inbox is never handled."""
    async with system_of(worker()) as system:
        handle = system.actor("worker")
        first = handle.slow.remote("x")
        task = asyncio.create_task(handle.note.call("unwanted"))
        await until(lambda: system.cells["worker"].waiting() == 1)
        task.cancel()
        await asyncio.wait([task])
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        await first
        await handle.note.remote("wanted")
        assert "unwanted" not in actor.diary.lines


@on_loop
async def test_a_full_inbox_is_overloaded() -> None:
    """Over the bound remote() fails and tell() raises, and nothing is queued."""
    async with system_of(worker(inbox_max=2)) as system:
        handle = system.actor("worker")
        first = handle.slow.remote("x")
        await until(lambda: system.cells["worker"].waiting() == 0)
        waiting = [handle.note.remote(n) for n in range(2)]
        with pytest.raises(Overloaded):
            await handle.note.remote("too much")
        with pytest.raises(Overloaded):
            handle.note.tell("too much")
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        assert await get([first, *waiting]) == ["x", 0, 1]
        assert "too much" not in actor.diary.lines


@on_loop
@pytest.mark.parametrize("inbox_max", [1, 2, 7])
async def test_call_waits_for_room(inbox_max: int) -> None:
    """call() waits where remote() would be refused; all get through, in order."""
    diary = Diary()
    async with system_of(worker(diary, inbox_max=inbox_max)) as system:
        handle = system.actor("worker")
        tasks = [asyncio.create_task(handle.turn.call(n)) for n in range(40)]
        assert await asyncio.gather(*tasks) == list(range(40))
        assert [line for line in diary.lines if isinstance(line, int)] == list(range(40))
        assert system.cells["worker"].room_waiters == []


@on_loop
async def test_waiting_for_room_has_the_deadline_of_the_call() -> None:
    """call() on an inbox that stays full ends in DeadlineExceeded and leaves no waiter behind."""
    async with system_of(worker(inbox_max=1)) as system:
        handle = system.actor("worker")
        handle.slow.tell("x")
        await until(lambda: system.cells["worker"].waiting() == 0)
        handle.note.tell("fills it")
        with pytest.raises(DeadlineExceeded):
            await handle.note.call("y", timeout_s=0.01)
        task = asyncio.create_task(handle.note.call("z"))
        await until(lambda: system.cells["worker"].room_waiters)
        task.cancel()
        await asyncio.wait([task])
        assert system.cells["worker"].room_waiters == []
        last = asyncio.create_task(handle.note.call("cut short"))
        await until(lambda: system.cells["worker"].room_waiters)
        await system.remove("worker")
        with pytest.raises(ActorNotFound):
            await last


@on_loop
async def test_a_torus_error_is_an_answer() -> None:
    """The caller gets the very error, and the same actor goes on."""
    async with system_of(worker()) as system:
        handle = system.actor("worker")
        actor = system.cells["worker"].actor
        for method in (handle.refuse, handle.refuse_later):
            with pytest.raises(Invalid, match="as agreed"):
                await method.remote()
            method.tell()
        with pytest.raises(Invalid, match="no method"):
            await handle.no_such.remote()
        assert await handle.note.remote(1) == 1
        assert system.cells["worker"].actor is actor and row(system, "worker")["restarts"] == 0


@on_loop
@pytest.mark.parametrize("method", ["crash", "crash_later", "cancelled", "cancelled_later"])
async def test_any_other_exception_is_a_crash(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller learns the cause, what waits is handled by the successor, the tree tells of it."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        handle = system.actor("worker")
        before = system.cells["worker"].actor
        failing = getattr(handle, method).remote()
        queued = [handle.note.remote(n) for n in range(5)]
        with pytest.raises(ActorCrashed) as crashed:
            await failing
        assert crashed.value.__cause__ is not None
        assert await get(queued) == list(range(5))
        assert system.cells["worker"].actor is not before
        told = row(system, "worker")
        assert (told["restarts"], told["state"]) == (1, "running")
        assert told["last_death"] in str(crashed.value)
        assert diary.lines[:1] == ["worker up"]
        assert [x for x in diary.lines if x != "crash"][1:] == [
            "worker down",
            "worker up",
            0,
            1,
            2,
            3,
            4,
        ]
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@on_loop
async def test_redelivery_is_for_idempotent_calls_only() -> None:
    """Killed at work: idempotent calls are begun again in order, the others fail."""
    diary = Diary()
    async with system_of(worker(diary, max_concurrency=4)) as system:
        handle = system.actor("worker")
        again = [handle.slow_again.remote(n) for n in range(3)]
        once = handle.slow.remote("once")
        queued = handle.slow_again.remote("queued")
        await until(lambda: diary.count("begin once"))
        system.cells["worker"].kill()
        with pytest.raises(ActorCrashed, match="killed on request"):
            await once
        await until(lambda: diary.count("begin queued"))
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        assert await get([*again, queued]) == [0, 1, 2, "queued"]
        begun = [line for line in diary.lines if line.startswith("begin")]
        assert begun == [
            "begin 0", "begin 1", "begin 2", "begin once",
            "begin 0", "begin 1", "begin 2", "begin queued",
        ]  # fmt: skip


@on_loop
async def test_a_call_that_is_done_is_answered_though_its_actor_dies_just_then() -> None:
    """It is neither done twice, nor told to have failed."""
    diary = Diary()
    async with system_of(worker(diary, max_concurrency=4)) as system:
        handle = system.actor("worker")
        refs = [handle.slow.remote("once"), handle.slow_again.remote("again")]
        await until(lambda: diary.count("begin again"))
        actor: Any = system.cells["worker"].actor
        actor.gate.set()
        system.loop.call_soon(system.cells["worker"].kill)
        assert await get(refs) == ["once", "again"]
        await until(lambda: diary.count("worker up") == 2)
        assert diary.count("begin again") == 1


@on_loop
async def test_redelivery_is_bounded() -> None:
    """A call that kills every actor it meets is redelivered REDELIVERIES_MAX times, then fails."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        with pytest.raises(ActorCrashed):
            await system.actor("worker").crash_again.remote()
        assert diary.count("crash") == 1 + REDELIVERIES_MAX
        assert await system.actor("worker").note.remote("well") == "well"


@on_loop
async def test_a_handler_may_kill_its_own_actor() -> None:
    """It ends at its next await; its caller gets ActorCrashed; a sync one still answers."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        handle = system.actor("worker")
        with pytest.raises(ActorCrashed, match="suicide"):
            await handle.suicide.remote()
        assert await handle.suicide_now.remote() == "last words"
        assert await handle.note.remote("well") == "well"
        assert row(system, "worker")["restarts"] == 2
        assert "still here" in diary.lines and "and on" not in diary.lines


@on_loop
async def test_spawned_tasks_are_part_of_the_actor() -> None:
    """A bug in one crashes the actor; a cancelled one does not; all end with the actor."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        handle = system.actor("worker")
        await handle.spawn_and_cancel.remote()
        await handle.spawn_forever.remote()
        await handle.turn.remote("in between")
        assert row(system, "worker")["restarts"] == 0
        await handle.spawn_bug.remote()
        await until(lambda: diary.lines[-1] == "worker up")
        assert row(system, "worker")["restarts"] == 1
        assert "in a task" in row(system, "worker")["last_death"]
        # The task has ended before the actor cleans up.
        assert diary.lines[-3:] == ["task ended", "worker down", "worker up"]


@on_loop
async def test_a_dead_actor_spawns_nothing() -> None:
    """spawn() after death refuses: no task may outlive its actor."""
    async with system_of(worker()) as system:
        actor: Any = system.cells["worker"].actor
        system.cells["worker"].kill()
        with pytest.raises(Closed):
            actor.spawn(asyncio.sleep(60))


@on_loop
async def test_unknown_and_ended_actors_are_not_found() -> None:
    """Calls fail at once, casts are dropped, and a new actor of that name gets none of them."""
    diary = Diary()
    async with system_of(worker()) as system:
        with pytest.raises(ActorNotFound):
            await system.actor("nobody").note.remote()
        system.actor("nobody").note.tell()
        handle = await system.spawn(worker(diary, "guest"))
        with pytest.raises(Invalid):
            await system.spawn(worker(diary, "guest"))
        system.cells["guest"].kill()
        waiting = handle.note.remote("too late")
        with pytest.raises(ActorNotFound):
            await waiting
        handle.note.tell("dropped")
        with pytest.raises(ActorNotFound):
            await handle.note.call("gone")
        assert await (await system.spawn(worker(diary, "guest"))).note.remote("hello") == "hello"
        assert diary.lines == ["guest up", "guest down", "guest up", "hello"]
        with pytest.raises(NoPeer):
            await system.actor("worker", node="elsewhere").note.remote()


@on_loop
async def test_stop_fails_what_waits() -> None:
    """After stop() no caller hangs: neither one at work, nor one in the inbox, nor later ones."""
    async with system_of(worker(shutdown_s=0.01)) as system:
        handle = system.actor("worker")
        at_work, queued = handle.slow.remote("x"), handle.note.remote("y")
        await asyncio.sleep(0)
        await system.stop()
        with pytest.raises(ActorCrashed, match="was stopped"):
            await at_work
        with pytest.raises(ActorNotFound):
            await queued
        with pytest.raises(ActorNotFound):
            await handle.note.remote("z")


class Answers(LoopActor):
    """Answers of several kinds."""

    @expose()
    def echo(self, *args: Any, payload: Any = None) -> Any:
        """The arguments."""
        return Reply(list(args), [payload]) if payload is not None else args

    @expose()
    def bad(self) -> Any:
        """What cannot travel."""
        return object()

    @expose(deferred=True)
    def later(self, reply: Any, line: str) -> None:
        """Answer from a callback."""
        self.system.loop.call_soon(reply.set, line)

    @expose(deferred=True)
    def never(self, reply: Any) -> None:
        """Fail before there is an answer."""
        raise ValueError("a bug")


def pack(value: Any) -> Any:
    """A codec: lists of plain values."""
    if isinstance(value, (list, tuple)):
        return [pack(item) for item in value]
    if value is not None and not isinstance(value, (int, str)):
        raise Invalid(f"{type(value).__name__} does not travel")
    return value


@on_loop
async def test_roundtrip_mode_finds_what_cannot_travel() -> None:
    """Arguments and answers go through the codec, payloads do not."""
    async with system_of(ChildSpec("answers", Answers), roundtrip=pack) as system:
        handle = system.actor("answers")
        assert await handle.echo.remote(1, (2, "x")) == [1, [2, "x"]]
        payload = memoryview(b"bulk")
        reply = await handle.echo.remote(1, payload=payload)
        assert reply.result == [1] and reply.payload[0] is payload
        with pytest.raises(Invalid, match="object"):
            handle.echo.remote(object())
        with pytest.raises(Invalid, match="object"):
            await handle.bad.remote()
        with pytest.raises(Invalid):
            handle.echo.tell(object())


@on_loop
async def test_deferred_handlers_answer_themselves() -> None:
    """The reply comes when they set it; as a cast it goes nowhere; their bugs are crashes too."""
    async with system_of(ChildSpec("answers", Answers)) as system:
        handle = system.actor("answers")
        assert await handle.later.remote("x") == "x"
        handle.later.tell("x")
        assert await handle.later.remote("y") == "y"
        assert row(system, "answers")["restarts"] == 0
        with pytest.raises(ActorCrashed):
            await handle.never.remote()


@on_loop
async def test_several_systems_share_a_loop() -> None:
    """Each has its own names and ends alone; in its actors current() is itself, whoever calls."""

    class Where(LoopActor):
        async def setup(self) -> None:
            assert ActorSystem.current() is self.system

        @expose()
        def here(self) -> bool:
            return ActorSystem.current() is self.system

        @expose()
        async def here_too(self) -> bool:
            await asyncio.sleep(0)
            return ActorSystem.current() is self.system

    loop = asyncio.get_running_loop()
    one, two = ActorSystem(loop), ActorSystem(loop)
    assert ActorSystem.current() is two
    handles = [await system.spawn(ChildSpec("where", Where)) for system in (one, two)]
    for handle in handles:
        assert await handle.here.remote() and await handle.here_too.remote()
    await one.stop()
    with pytest.raises(ActorNotFound):
        await handles[0].here.remote()
    assert await handles[1].here.remote()
    await two.stop()


@on_loop
async def test_options_start_an_actor_as_in_ray() -> None:
    """Cls.options(...).remote(args) starts one in the current system and returns its handle."""
    async with system_of() as system:
        handle = await Worker.options(name="ray", max_concurrency=2).remote(Diary(), "ray")
        assert await handle.note.remote(1) == 1
        assert system.cells["ray"].spec.max_concurrency == 2
        await system.remove("ray")
        assert "ray" not in system.cells


@on_loop
async def test_actors_are_made_by_cells_only() -> None:
    """Pykka's own start() would make one that nobody supervises; specs are checked."""
    with pytest.raises(RuntimeError, match="cell"):
        Worker.start()
    assert not pykka.ActorRegistry.get_by_class(Worker)
    with pytest.raises(Invalid):
        ChildSpec("x", Worker, max_concurrency=0)
