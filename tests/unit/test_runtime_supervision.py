"""Supervision: who is started, restarted and stopped, in which order, and when it is given up."""

from __future__ import annotations

import ast
import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import pytest

import torus_actors
from tests.unit.runtime_harness import (
    Diary,
    Fragile,
    Thinker,
    Worker,
    on_loop,
    on_uvloop,
    row,
    system_of,
    until,
    worker,
)
from torus_actors.errors import ActorCrashed, ActorNotFound, DeadlineExceeded, Invalid
from torus_actors.runtime import (
    PERMANENT,
    TEMPORARY,
    TRANSIENT,
    ActorSystem,
    ChildSpec,
    LoopActor,
    Strategy,
    SupervisorSpec,
    expose,
    get,
)
from torus_actors.runtime.supervision import IntensityExceeded


def trio(diary: Diary) -> list[ChildSpec]:
    """Three workers that write one diary."""
    return [worker(diary, name) for name in "abc"]


@on_loop
async def test_started_in_order_and_stopped_in_reverse() -> None:
    """Children start one after the other and stop the other way round, through nested levels."""
    diary = Diary()
    nested = SupervisorSpec("nested", (worker(diary, "b"), worker(diary, "c")))
    async with system_of(worker(diary, "a"), nested, worker(diary, "d")) as system:
        assert [(r["name"], r["depth"]) for r in system.tree()] == [
            ("root", 0), ("a", 1), ("nested", 1), ("b", 2), ("c", 2), ("d", 1),
        ]  # fmt: skip
        await system.spawn(worker(diary, "guest"))
    ups, downs = diary.lines[:5], diary.lines[5:]
    assert ups == ["a up", "b up", "c up", "d up", "guest up"]
    assert downs == [line.replace("up", "down") for line in reversed(ups)]


@on_loop
async def test_a_setup_that_fails_at_boot_stops_what_was_started() -> None:
    """start() raises the very error; what was up is down again; the system may start again."""
    diary = Diary()
    system = ActorSystem(asyncio.get_running_loop())
    bad = ChildSpec("bad", lambda: Fragile([Invalid("no disk")], diary))
    nested = SupervisorSpec("nested", (worker(diary, "b"), bad, worker(diary, "never")))
    waiting = None
    with pytest.raises(Invalid, match="no disk"):
        starting = asyncio.create_task(
            system.start(SupervisorSpec("root", (worker(diary, "a"), nested)))
        )
        await until(lambda: "never" in system.cells)
        waiting = system.actor("never").note.remote("sent early")
        await starting
    assert diary.lines == ["a up", "b up", "try", "cleaned", "b down", "a down"]
    assert {r["state"] for r in system.tree()} == {"stopped"}
    assert row(system, "bad")["last_death"] == "Invalid: no disk"
    with pytest.raises(ActorNotFound):
        await waiting
    await system.start(SupervisorSpec("root", (worker(diary, "a"),)))
    assert await system.actor("a").note.remote(1) == 1
    await system.stop()


@on_loop
async def test_names_are_unique_in_the_tree() -> None:
    """Two actors of one name would share an inbox; the tree is refused before anything starts."""
    with pytest.raises(Invalid, match="two actors"):
        async with system_of(worker(), SupervisorSpec("nested", (worker(),))):
            pass


@on_loop
async def test_messages_sent_before_the_first_start_are_kept() -> None:
    """A child may send to one that is started after it."""
    diary = Diary()

    class Early(LoopActor):
        async def setup(self) -> None:
            for name in ("later", "brief"):
                self.system.actor(name).note.tell(f"{name}: from the early one")

    async with system_of(
        ChildSpec("early", Early), worker(diary, "later"), worker(diary, "brief", restart=TEMPORARY)
    ):
        await until(lambda: "later: from the early one" in diary.lines)
        await until(lambda: "brief: from the early one" in diary.lines)


@on_loop
async def test_setup_that_fails_on_restart_is_tried_again() -> None:
    """With pauses that double, until it works; what was sent meanwhile is answered then."""
    failures: list[Exception] = []
    async with system_of(ChildSpec("x", lambda: Fragile(failures))) as system:
        failures += [OSError("busy")] * 4
        begin = system.loop.time()
        system.cells["x"].kill()
        await until(lambda: "busy" in row(system, "x")["last_death"])
        assert row(system, "x")["state"] in ("starting", "stopped", "waiting")
        assert await system.actor("x").ping.remote() == "pong"
        assert system.loop.time() - begin >= 0.001 + 0.002 + 0.004 + 0.004
        assert row(system, "x")["restarts"] == 5


@on_loop
async def test_a_thread_that_could_not_be_started_soon_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """There were too many for a moment: nothing has begun that has to be given time to end."""
    start, failures = threading.Thread.start, [RuntimeError("can't start new thread")]

    def start_later(thread: threading.Thread) -> None:
        if failures:
            raise failures.pop()
        start(thread)

    async with system_of(ChildSpec("x", Thinker, shutdown_s=2.0)) as system:
        monkeypatch.setattr(threading.Thread, "start", start_later)
        begin = system.loop.time()
        system.cells["x"].kill()
        assert await system.actor("x").note.remote("well") == "well"
        assert system.loop.time() - begin < 1.0
        assert "new thread" in row(system, "x")["last_death"] and not failures


@on_loop
async def test_too_many_deaths_end_the_root() -> None:
    """Over the intensity the root gives up: all children stop, calls fail, ``fatal`` is set."""
    diary = Diary()
    async with system_of(*trio(diary), max_restarts=2) as system:
        handle = system.actor("b")
        for _ in range(2):
            with pytest.raises(ActorCrashed):
                await handle.crash.remote()
            await handle.note.remote("well")
        assert not system.fatal.done()
        diary.lines.clear()
        handle.crash.tell()
        with pytest.raises(IntensityExceeded) as given_up:
            await system.fatal
        assert isinstance(given_up.value.__cause__, ValueError)
        assert diary.lines == ["crash", "b down", "c down", "a down"]
        for name in "abc":
            with pytest.raises(ActorNotFound):
                await system.actor(name).note.remote()


@on_loop
async def test_a_nested_supervisor_that_gives_up_is_restarted_by_its_parent() -> None:
    """Escalation by one level: its children start afresh, idempotent calls and queues survive."""
    diary = Diary()
    nested = SupervisorSpec("nested", (worker(diary, "a"), worker(diary, "b")), max_restarts=0)
    async with system_of(nested, worker(diary, "c")) as system:
        diary.lines.clear()
        kept = system.actor("b").slow_again.remote("kept")
        await until(lambda: diary.count("begin kept"))
        system.actor("a").crash.tell()
        await until(lambda: diary.count("begin kept") == 2)
        assert row(system, "nested")["restarts"] == 1
        assert "IntensityExceeded" in row(system, "nested")["last_death"]
        assert row(system, "c")["restarts"] == 0 and not system.fatal.done()
        actor: Any = system.cells["b"].actor
        actor.gate.set()
        assert await kept == "kept"
        lines = [line for line in diary.lines if line.split()[-1] in ("up", "down")]
        assert lines == ["a down", "b down", "a up", "b up"]


@on_loop
async def test_setup_that_never_works_again_escalates_to_the_root() -> None:
    """A child that cannot start exhausts its supervisor, that one its parent, that one the node."""
    failures: list[Exception] = []
    nested = SupervisorSpec(
        "nested",
        (ChildSpec("x", lambda: Fragile(failures)),),
        max_restarts=2,
        backoff_first_s=0.001,
        backoff_max_s=0.001,
    )
    async with system_of(nested, max_restarts=2) as system:
        failures += [OSError("gone")] * 100
        waiting = system.actor("x").ping.remote()
        assert await waiting == "pong"
        system.cells["x"].kill()
        waiting = system.actor("x").ping.remote()
        with pytest.raises(IntensityExceeded):
            await system.fatal
        with pytest.raises(ActorNotFound, match="gone"):
            await waiting
        # Two attempts of nested after the death, and one in each of two restarts of nested.
        assert len(failures) == 100 - 2 - 2


STRATEGIES = [
    (Strategy.ONE_FOR_ONE, ["b down", "b up"]),
    (Strategy.REST_FOR_ONE, ["b down", "c down", "b up", "c up"]),
    (Strategy.ONE_FOR_ALL, ["b down", "c down", "a down", "a up", "b up", "c up"]),
]


@on_loop
@pytest.mark.parametrize(("strategy", "expected"), STRATEGIES)
async def test_strategies(strategy: Strategy, expected: list[str]) -> None:
    """Who is restarted along, and in which order."""
    diary = Diary()
    async with system_of(*trio(diary), strategy=strategy) as system:
        diary.lines.clear()
        with pytest.raises(ActorCrashed):
            await system.actor("b").crash_later.remote()
        await until(lambda: len(diary.lines) >= len(expected))
        await get([system.actor(name).turn.remote("well") for name in "abc"])
        assert [line for line in diary.lines if line != "well"] == expected
        assert row(system, "b")["restarts"] == 1


test_strategies_on_uvloop = on_uvloop(test_strategies.__on_loop__)  # type: ignore[attr-defined]


@on_loop
async def test_a_group_restart_that_fails_half_way_starts_nobody_twice() -> None:
    """After a sibling failed to start, those already up are stopped before the next attempt."""
    diary = Diary()
    failures: list[Exception] = []
    bad = ChildSpec("bad", lambda: Fragile(failures, diary))
    async with system_of(worker(diary, "a"), bad, strategy=Strategy.ONE_FOR_ALL) as system:
        failures.append(OSError("busy"))
        diary.lines.clear()
        with pytest.raises(ActorCrashed):
            await system.actor("a").crash.remote()
        await until(lambda: diary.count("try") == 2)
        assert await system.actor("bad").ping.remote() == "pong"
        assert diary.lines == [
            "crash", "a down", "cleaned",
            "a up", "try", "cleaned",
            "a down", "a up", "try",
        ]  # fmt: skip
        assert row(system, "a")["last_death"] == "ValueError: a bug"


@on_loop
async def test_restart_policies() -> None:
    """Permanent: always; transient: after a crash only; temporary: never."""
    diary = Diary()
    specs = [
        worker(diary, "permanent", restart=PERMANENT),
        worker(diary, "transient", restart=TRANSIENT),
        worker(diary, "temporary", restart=TEMPORARY),
    ]
    async with system_of(*specs) as system:
        handles = {spec.name: system.actor(spec.name) for spec in specs}
        refs = {name: handle.slow_again.remote(name) for name, handle in handles.items()}
        await until(lambda: diary.count("begin temporary"))
        for spec in specs:
            system.cells[spec.name].kill()
        with pytest.raises(ActorCrashed):
            await refs["temporary"]
        await until(lambda: row(system, "temporary")["state"] == "stopped")
        with pytest.raises(ActorNotFound, match="Killed"):
            await handles["temporary"].note.remote()
        for name in ("permanent", "transient"):
            await until(lambda name=name: diary.count(f"begin {name}") == 2)
            actor: Any = system.cells[name].actor
            actor.gate.set()
            assert await refs[name] == name
            system.cells[name].stop_soon()
        await until(lambda: row(system, "transient")["state"] == "stopped")
        with pytest.raises(ActorNotFound):
            await handles["transient"].note.remote()
        assert await handles["permanent"].note.remote(1) == 1
        await until(lambda: row(system, "permanent")["restarts"] == 2)


@on_loop
async def test_a_group_restart_leaves_the_ended_alone() -> None:
    """one_for_all neither revives a temporary sibling nor a transient one that was done."""
    diary = Diary()
    specs = [
        worker(diary, "done", restart=TRANSIENT),
        worker(diary, "brief", restart=TEMPORARY),
        worker(diary, "a"),
    ]
    async with system_of(*specs, strategy=Strategy.ONE_FOR_ALL) as system:
        system.cells["done"].stop_soon()
        await until(lambda: row(system, "done")["state"] == "stopped")
        with pytest.raises(ActorCrashed):
            await system.actor("a").crash.remote()
        assert await system.actor("a").note.remote(1) == 1
        states = {r["name"]: r["state"] for r in system.tree()}
        assert (states["a"], states["done"], states["brief"]) == ("running", "stopped", "stopped")
        with pytest.raises(ActorNotFound):
            await system.actor("brief").note.remote()


@on_loop
async def test_stop_lets_handlers_finish() -> None:
    """Within shutdown_s handlers answer; what takes longer is cut off; what waits is failed."""
    async with system_of(worker(max_concurrency=2, shutdown_s=0.05)) as system:
        handle = system.actor("worker")
        quick, stuck = handle.turn.remote("quick"), handle.slow.remote("stuck")
        await until(lambda: system.cells["worker"].waiting() == 0)
        begin = system.loop.time()
        await system.cells["worker"].stop(final=True)
        assert 0.04 <= system.loop.time() - begin < 1.0
        assert await quick == "quick"
        with pytest.raises(ActorCrashed, match="was stopped"):
            await stuck


@on_loop
async def test_a_crash_during_a_stop_is_one_death() -> None:
    """A handler that crashes while its actor is stopped: one cleanup, one successor."""
    diary = Diary()
    async with system_of(worker(diary, shutdown_s=2.0)) as system:
        handle = system.actor("worker")
        cell = system.cells["worker"]
        failing = handle.crash_later.remote()
        await asyncio.sleep(0)
        cell.stop_soon()
        cell.stop_soon()
        with pytest.raises(ActorCrashed):
            await failing
        assert await handle.turn.remote("well") == "well"
        assert diary.lines == ["worker up", "worker down", "worker up", "well"]


@on_loop
async def test_stops_at_the_same_time_are_one_stop() -> None:
    """Several stops, and kills between them: one cleanup, and nobody is left half stopped."""
    diary = Diary()
    async with system_of(worker(diary, shutdown_s=0.01)) as system:
        cell = system.cells["worker"]
        system.actor("worker").slow.tell("x")
        await until(lambda: diary.count("begin x"))
        stops = [asyncio.create_task(cell.stop(final=True)) for _ in range(3)]
        await asyncio.sleep(0)
        cell.kill()
        cell.kill()
        await asyncio.gather(*stops)
        assert cell.actor is None and cell.state.value == "stopped"
        assert diary.lines == ["worker up", "begin x", "worker down"]


@on_loop
async def test_a_stop_that_was_given_up_on_goes_on() -> None:
    """Who stops an actor may be killed at it: the actor is not left half stopped."""
    diary = Diary()
    async with system_of(worker(diary)) as system:
        cell = system.cells["worker"]
        actor: Any = cell.actor
        ref = system.actor("worker").slow.remote("x")
        await until(lambda: diary.count("begin x"))
        stopping = asyncio.create_task(cell.stop(final=True))
        await until(lambda: not actor._accepting)
        stopping.cancel()
        await asyncio.wait([stopping])
        actor.gate.set()
        assert await ref == "x"
        await until(lambda: row(system, "worker")["state"] == "stopped")
        await until(lambda: diary.count("worker down"))


@on_loop
async def test_successor_waits_for_the_cleanup() -> None:
    """An actor is set up only when its predecessor has let go, also if a sibling dies meanwhile."""
    diary = Diary()
    gate = asyncio.Event()

    class Slow(Worker):
        async def cleanup(self) -> None:
            self.diary("cleaning")
            await gate.wait()
            await super().cleanup()

    slow = ChildSpec("slow", lambda: Slow(diary, "slow"))
    async with system_of(slow, worker(diary, "b"), strategy=Strategy.ONE_FOR_ALL) as system:
        system.cells["slow"].kill()
        await until(lambda: diary.count("cleaning"))
        system.cells["b"].kill()
        waiting = system.actor("slow").note.remote("well")
        await until(lambda: diary.count("b down"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert diary.count("slow up") == 1
        gate.set()
        assert await waiting == "well"
        await system.actor("b").turn.remote("well")
        assert diary.count("slow up") == diary.count("slow down") + 1
        await until(lambda: {r["state"] for r in system.tree()} == {"running"})


@on_loop
async def test_a_removed_child_is_not_restarted() -> None:
    """remove() ends a child for good, also while its supervisor pauses before its restart."""
    diary = Diary()
    async with system_of(
        worker(diary, "a"), worker(diary, "b"), backoff_first_s=0.02, backoff_max_s=0.02
    ) as system:
        system.cells["a"].kill()
        await system.actor("a").note.remote("well")
        system.cells["a"].kill()
        await until(lambda: diary.count("a down") == 2)
        waiting = system.actor("a").note.remote("never")
        await system.remove("a")
        with pytest.raises(ActorNotFound):
            await waiting
        system.cells["b"].kill()
        assert await system.actor("b").note.remote("well") == "well"
        assert diary.count("a up") == 2


@on_loop
async def test_stop_while_a_child_backs_off() -> None:
    """stop() does not wait for the pause: it is tried once more, for what it does at its end."""
    failures: list[Exception] = []
    diary = Diary()
    async with system_of(
        ChildSpec("x", lambda: Fragile(failures, diary)), backoff_first_s=60.0, backoff_max_s=60.0
    ) as system:
        failures += [OSError("busy")] * 9
        system.cells["x"].kill()
        await until(lambda: diary.count("try") == 2)
        waiting = system.actor("x").ping.remote()
        await system.stop()
        with pytest.raises(ActorNotFound):
            await waiting
        assert diary.count("try") == 3


class Endless(LoopActor):
    """Its setup, and if told so its cleanup, never end."""

    def __init__(self, diary: Diary, clean: bool = True) -> None:
        super().__init__()
        self.diary, self.clean = diary, clean

    async def setup(self) -> None:
        """Hang."""
        self.diary("setting up")
        await asyncio.Event().wait()

    async def cleanup(self) -> None:
        """Hang, if told so."""
        self.diary("cleaning up")
        if not self.clean:
            await asyncio.Event().wait()


@on_loop
async def test_stop_while_it_starts() -> None:
    """stop() cuts a setup short: start() raises, what was up is down, and nothing is left."""
    diary = Diary()
    system = ActorSystem(asyncio.get_running_loop())
    nested = SupervisorSpec("nested", (ChildSpec("x", lambda: Endless(diary)),))
    starting = asyncio.create_task(system.start(SupervisorSpec("root", (worker(diary), nested))))
    await until(lambda: diary.count("setting up"))
    await system.stop()
    with pytest.raises(Exception, match="stopped while it was starting"):
        await starting
    assert diary.lines == ["worker up", "setting up", "cleaning up", "worker down"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@on_loop
async def test_a_cancelled_start_undoes_itself() -> None:
    """Who gives start() up, by a timeout say, finds everything stopped."""
    diary = Diary()
    system = ActorSystem(asyncio.get_running_loop())
    spec = SupervisorSpec("root", (worker(diary), ChildSpec("x", lambda: Endless(diary))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await system.start(spec)
    assert diary.lines == ["worker up", "setting up", "cleaning up", "worker down"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@on_loop
async def test_setup_and_cleanup_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that hangs in either holds nobody up for ever."""
    monkeypatch.setattr(Endless, "setup_timeout_s", 0.01)
    monkeypatch.setattr("torus_actors.runtime.cell.CLEANUP_S_MIN", 0.01)
    diary = Diary()
    async with system_of() as system:
        with pytest.raises(DeadlineExceeded, match="setup"):
            await system.spawn(ChildSpec("x", lambda: Endless(diary, clean=False), shutdown_s=0))
        assert diary.lines == ["setting up", "cleaning up"]
        with pytest.raises(ActorNotFound):
            await system.actor("x").anything.remote()


@on_loop
async def test_a_task_that_fails_during_setup_fails_the_start() -> None:
    """A bug in a task spawned by a setup that still runs is the actor's death, at once."""
    diary = Diary()

    class Spawning(Endless):
        async def setup(self) -> None:
            async def bug() -> None:
                raise KeyError("in a task")

            self.spawn(bug())
            await super().setup()

    async with system_of() as system:
        with pytest.raises(KeyError, match="in a task"):
            await system.spawn(ChildSpec("x", lambda: Spawning(diary)))
        assert diary.lines == ["setting up", "cleaning up"]


@on_loop
async def test_a_task_that_fails_as_setup_ends_is_a_crash() -> None:
    """In the moment between setup and running nothing gets lost."""
    tries = Diary()

    class Spawning(LoopActor):
        async def setup(self) -> None:
            tries("try")

            async def bug() -> None:
                if len(tries.lines) == 1:
                    raise KeyError("in a task")

            self.spawn(bug())

        @expose()
        def ping(self) -> str:
            return "pong"

    async with system_of(ChildSpec("x", Spawning)) as system:
        await until(lambda: len(tries.lines) == 2)
        assert await system.actor("x").ping.remote() == "pong"


@on_loop
async def test_a_setup_that_is_cancelled_does_not_deafen_the_supervisor() -> None:
    """A CancelledError out of a setup is a failed start like any other."""
    tries = Diary()

    class Cancelled(LoopActor):
        async def setup(self) -> None:
            tries("try")
            if len(tries.lines) == 2:
                raise asyncio.CancelledError

        @expose()
        def ping(self) -> str:
            return "pong"

    async with system_of(ChildSpec("x", Cancelled)) as system:
        system.cells["x"].kill()
        assert await system.actor("x").ping.remote() == "pong"
        assert len(tries.lines) == 3


@pytest.mark.parametrize("victim", ["x", "sibling"])
@on_loop
async def test_a_cleanup_that_is_cancelled_does_not_deafen_the_supervisor(victim: str) -> None:
    """A CancelledError of what a cleanup waits for ends the cleanup, and no more.

    Both after a crash and when the actor is restarted along with another.
    """

    class Waits(LoopActor):
        async def cleanup(self) -> None:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

        @expose()
        def ping(self) -> str:
            return "pong"

    children = (ChildSpec("x", Waits), ChildSpec("sibling", lambda: Fragile([])))
    async with system_of(*children, strategy=Strategy.ONE_FOR_ALL) as system:
        for _ in range(2):
            system.cells[victim].kill()
            for name in ("x", "sibling"):
                assert await system.actor(name).ping.remote(timeout_s=2.0) == "pong"


@on_loop
async def test_a_killed_supervisor_takes_its_children_along() -> None:
    """Its parent starts it again, and with it the children, each once."""
    diary = Diary()
    nested = SupervisorSpec("nested", (worker(diary, "a"), worker(diary, "b")))
    async with system_of(nested) as system:
        diary.lines.clear()
        system.cells["nested"].kill()
        system.cells["a"].kill()
        await until(lambda: len(diary.lines) == 4)
        assert await system.actor("b").turn.remote("well") == "well"
        assert sorted(diary.lines[:2]) == ["a down", "b down"]
        assert diary.lines[2:] == ["a up", "b up", "well"]
        assert row(system, "nested")["restarts"] == 1
        await system.actor("a").note.remote("well")
        await until(lambda: {r["state"] for r in system.tree()} == {"running"})


@on_loop
async def test_a_supervisor_out_of_time_kills_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Past its shutdown_s none of its children lives on beside a successor."""
    monkeypatch.setattr("torus_actors.runtime.cell.CLEANUP_S_MIN", 0.05)
    diary = Diary()
    children = tuple(worker(diary, name, shutdown_s=60.0) for name in "ab")
    nested = SupervisorSpec("nested", children, shutdown_s=0.0)
    async with system_of(nested) as system:
        handles = [system.actor(name) for name in "ab"]
        stuck = [handle.slow.remote("x") for handle in handles]
        await until(lambda: diary.count("begin x") == 2)
        system.cells["nested"].kill()
        for ref in stuck:
            with pytest.raises(ActorCrashed):
                await ref
        await get([handle.note.remote("well") for handle in handles])
        assert (diary.count("a up"), diary.count("a down")) == (2, 1)
        assert (diary.count("b up"), diary.count("b down")) == (2, 1)


@on_loop
async def test_states_and_last_death_in_the_tree() -> None:
    """tree() tells starting, running, waiting and stopped apart, and what is dead by its class."""
    gate, down = asyncio.Event(), asyncio.Event()

    class Slow(Worker):
        async def setup(self) -> None:
            await gate.wait()

        async def cleanup(self) -> None:
            await down.wait()

    async with system_of() as system:
        starting = asyncio.create_task(system.spawn(ChildSpec("x", Slow)))
        await until(lambda: "x" in system.cells and row(system, "x")["state"] == "starting")
        gate.set()
        handle = await starting
        told = row(system, "x")
        assert (told["state"], told["class"], told["kind"]) == ("running", "Slow", "loop")
        with pytest.raises(ActorCrashed):
            await handle.crash.remote()
        told = row(system, "x")
        assert (told["state"], told["class"]) == ("waiting", "Slow")
        assert told["last_death"] == "ValueError: a bug"
        down.set()
        await until(lambda: row(system, "x")["state"] == "stopped")


@on_loop
async def test_heirlooms_survive() -> None:
    """What an actor leaves to its successor is there after a crash, by identity."""

    class Heir(Worker):
        async def setup(self) -> None:
            self.thing = self.system.heirlooms.setdefault("thing", object())

        @expose()
        def which(self) -> int:
            return id(self.thing)

    async with system_of(ChildSpec("heir", Heir)) as system:
        before = await system.actor("heir").which.remote()
        with pytest.raises(ActorCrashed):
            await system.actor("heir").crash.remote()
        assert await system.actor("heir").which.remote() == before


@on_loop
async def test_dead_actors_are_garbage() -> None:
    """Dead actors are not held by the runtime: their memory is gone after the restart."""
    async with system_of(worker()) as system:
        system.cells["worker"].kill()
        await system.actor("worker").note.remote("well")
        gc.collect()
        assert sum(type(thing) is Worker for thing in gc.get_objects()) == 1


def _assigned(tree: ast.AST) -> set[str]:
    """Names of attributes that are set on ``self``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_no_actor_uses_a_name_of_the_runtimes() -> None:
    """One that has a state ``_running`` of its own, say, has the runtime think that it is busy.

    Found by review: the scrubber answered nothing while a pass ran.
    """
    root = Path(torus_actors.__file__).parent
    bases = ("LoopActor", "BlockingActor")
    taken = {
        node.name: _assigned(node)
        for node in ast.walk(ast.parse((root / "runtime" / "actor.py").read_text()))
        if isinstance(node, ast.ClassDef) and node.name in bases
    }
    assert "_running" in taken["LoopActor"] and "_ended" in taken["BlockingActor"]
    actors = 0
    for path in sorted((root / "actors").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in taken:
                        actors += 1
                        assert not _assigned(node) & taken[base.id], node.name
    assert actors > 10


@on_uvloop
async def test_a_stop_for_good_in_the_middle_of_another_is_one_for_all_children() -> None:
    """A supervisor has died, and stops its children for its successor, of which there is none then.

    Found by review: those that were still to be stopped heard that there is one.
    """
    ended: list[bool] = []

    class Last(LoopActor):
        async def cleanup(self) -> None:
            ended.append(self.cell.will_restart)

    class Slow(LoopActor):
        async def cleanup(self) -> None:
            await asyncio.sleep(0.1)

    children = SupervisorSpec("inner", (ChildSpec("last", Last), ChildSpec("slow", Slow)))
    async with system_of(ChildSpec("other", LoopActor), children) as system:
        system.cells["inner"].kill()
        await asyncio.sleep(0.02)
        await system.cells["inner"].stop(final=True)
    assert ended == [False]
