"""Blocking actors without threads: on the simulated loop they behave as they do on a thread."""

# ruff: noqa: D102, D103 - what is no test needs none

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from torus_actors.errors import ActorCrashed, ActorNotFound, BlockNotExist
from torus_actors.runtime import (
    ActorSystem,
    BlockingActor,
    ChildSpec,
    SupervisorSpec,
    expose,
)
from torus_actors.scenarios.simloop import START_S, SimLoop

DELAY_S = 0.5


class Worker(BlockingActor):
    """Notes what it does, and on which thread."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self._seen = seen

    def setup(self) -> None:
        self._seen.append("setup")

    def cleanup(self) -> None:
        self._seen.append("cleanup")

    @expose()
    def note(self, value: int) -> int:
        assert threading.current_thread() is threading.main_thread()
        self._seen.append(value)
        return value

    @expose(idempotent=True)
    def note_twice(self, value: int) -> int:
        return self.note(value)

    @expose()
    def refuse(self) -> None:
        raise BlockNotExist("no such block")

    @expose()
    def crash(self) -> None:
        raise ValueError("a bug")


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    made = SimLoop()
    yield made
    made.close()


def play(loop: SimLoop, act: Callable[[ActorSystem, list[Any]], Awaitable[None]]) -> list[Any]:
    seen: list[Any] = []

    async def main() -> None:
        system = ActorSystem(
            loop, rng=random.Random(1), blocking_delay_s=lambda actor, method: DELAY_S
        )
        await system.start(SupervisorSpec("root", (ChildSpec("worker", lambda: Worker(seen)),)))
        assert threading.active_count() == threads
        await act(system, seen)
        await system.stop()

    threads = threading.active_count()
    loop.run_until_complete(main())
    assert loop.errors == []
    return seen


def test_calls_take_their_time_one_after_the_other(loop: SimLoop) -> None:
    """Each call takes the delay it was given, and the next one waits for it."""

    async def act(system: ActorSystem, seen: list[Any]) -> None:
        began = loop.time()
        worker = system.actor("worker")
        answers = await asyncio.gather(*[worker.note.remote(i) for i in range(4)])
        assert answers == [0, 1, 2, 3]
        assert loop.time() == pytest.approx(began + 4 * DELAY_S)

    assert play(loop, act) == ["setup", 0, 1, 2, 3, "cleanup"]
    assert loop.time() < START_S + 10


def test_an_error_of_ours_is_an_answer(loop: SimLoop) -> None:
    """A TorusError goes to the caller, and the actor lives."""

    async def act(system: ActorSystem, seen: list[Any]) -> None:
        with pytest.raises(BlockNotExist):
            await system.actor("worker").refuse.remote()
        assert await system.actor("worker").note.remote(1) == 1

    assert play(loop, act) == ["setup", 1, "cleanup"]


@pytest.mark.filterwarnings("default")
def test_a_bug_ends_the_actor_and_its_supervisor_makes_another(loop: SimLoop) -> None:
    """The caller learns of the crash; what waited in the inbox is handled by the successor."""

    async def act(system: ActorSystem, seen: list[Any]) -> None:
        worker = system.actor("worker")
        crash, after = worker.crash.remote(), worker.note.remote(1)
        with pytest.raises(ActorCrashed):
            await crash
        assert await after == 1
        assert system.cells["worker"].restarts == 1

    assert play(loop, act) == ["setup", "cleanup", "setup", 1, "cleanup"]


def test_a_killed_actor_finishes_its_call_unseen(loop: SimLoop) -> None:
    """As on a thread: the call it is in is still made, while the successor makes it again."""

    async def act(system: ActorSystem, seen: list[Any]) -> None:
        worker = system.actor("worker")
        lost, again = worker.note.remote(1), worker.note_twice.remote(2)
        await asyncio.sleep(DELAY_S / 2)
        system.cells["worker"].kill()
        with pytest.raises(ActorCrashed):
            await lost
        assert await again == 2

    seen = play(loop, act)
    assert seen.count(1) == 1 and seen.count(2) == 1 and seen.count("cleanup") == 2


def test_a_stop_waits_for_the_call_under_way(loop: SimLoop) -> None:
    """What is being done is done and answered; what waits is refused."""

    async def act(system: ActorSystem, seen: list[Any]) -> None:
        worker = system.actor("worker")
        first, second = worker.note.remote(1), worker.note.remote(2)
        await asyncio.sleep(DELAY_S / 2)
        await system.stop()
        assert await first == 1
        with pytest.raises(ActorNotFound):
            await second

    assert play(loop, act) == ["setup", 1, "cleanup"]
