"""The simulated event loop: virtual time, and processes that are paused and killed."""

# ruff: noqa: D103 - what is no test needs none

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from torus_actors.scenarios.simloop import START_S, SimLoop, Stuck, current_process


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    made = SimLoop()
    yield made
    made.close()


def test_time_jumps_to_the_next_timer(loop: SimLoop) -> None:
    """A day passes in no time, and the clock says that it has passed."""
    began = time.monotonic()
    loop.run_until_complete(asyncio.sleep(86400))
    assert loop.time() == START_S + 86400
    assert time.monotonic() - began < 5


def test_timers_fire_in_order_of_time_then_of_scheduling(loop: SimLoop) -> None:
    """Callbacks due at the same moment run in the order in which they were scheduled."""
    seen: list[str] = []

    async def main() -> None:
        loop.call_later(2, seen.append, "c")
        loop.call_later(1, seen.append, "a")
        loop.call_later(1, seen.append, "b")
        loop.call_later(1.5, seen.append, "never").cancel()
        await asyncio.sleep(3)

    loop.run_until_complete(main())
    assert seen == ["a", "b", "c"]


def test_a_loop_with_nothing_left_to_do_says_so(loop: SimLoop) -> None:
    """A wait that nobody can end is an error and not a hang."""

    async def main() -> None:
        await loop.create_future()

    with pytest.raises(Stuck):
        loop.run_until_complete(main())


def test_a_loop_that_runs_in_circles_says_so(
    loop: SimLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callbacks that schedule each other for ever, at one moment, are an error and not a hang."""
    monkeypatch.setattr("torus_actors.scenarios.simloop.STUCK_CALLBACKS", 1000)

    def again() -> None:
        loop.call_soon(again)

    loop.call_soon(again)
    with pytest.raises(Stuck):
        loop.run_until_complete(asyncio.sleep(1))


def test_a_callback_that_raises_is_reported(loop: SimLoop) -> None:
    """A bug in a callback is kept for the report, and the others run on."""

    def broken() -> None:
        raise ValueError("a bug")

    async def main() -> None:
        loop.call_soon(broken)
        await asyncio.sleep(1)

    loop.run_until_complete(main())
    assert [str(context["exception"]) for context in loop.errors] == ["a bug"]


def test_a_paused_process_runs_nothing_and_then_everything(loop: SimLoop) -> None:
    """What falls due while a process stands still happens when it goes on, late and in order."""
    process = loop.new_process("p", "10.0.0.1")
    seen: list[tuple[int, float]] = []

    async def work() -> None:
        assert current_process() is process
        for i in range(5):
            await asyncio.sleep(1)
            seen.append((i, loop.time() - START_S))

    async def main() -> None:
        task = process.run(work())
        await asyncio.sleep(1.5)
        process.pause()
        await asyncio.sleep(10)
        assert len(seen) == 1
        process.resume()
        await task

    loop.run_until_complete(main())
    assert seen == [(0, 1.0), (1, 11.5), (2, 12.5), (3, 13.5), (4, 14.5)]


def test_a_killed_process_does_not_clean_up(loop: SimLoop) -> None:
    """After a kill nothing of the process runs: no timer, no callback, no ``finally``."""
    process = loop.new_process("p", "10.0.0.1")
    seen: list[str] = []

    async def work() -> None:
        loop.call_later(2, seen.append, "timer")
        try:
            await asyncio.sleep(3)
        finally:
            seen.append("finally")

    async def main() -> None:
        task = process.run(work())
        del task
        await asyncio.sleep(1)
        process.kill()
        await asyncio.sleep(10)
        assert seen == []

    loop.run_until_complete(main())


def test_processes_do_not_mix(loop: SimLoop) -> None:
    """Tasks that a process starts, and their callbacks, belong to it and to no other."""
    first, second = (loop.new_process(name, "10.0.0.1") for name in ("first", "second"))
    seen: list[object] = []

    async def inner() -> None:
        await asyncio.sleep(0.5)
        seen.append(current_process())

    async def outer() -> None:
        await asyncio.gather(inner(), asyncio.create_task(inner()))

    async def main() -> None:
        await asyncio.gather(first.run(outer()), second.run(outer()))
        assert current_process() is None

    loop.run_until_complete(main())
    assert seen == [first, first, second, second]


def test_an_executor_is_a_delay(loop: SimLoop) -> None:
    """What would run on another thread runs on the loop, and its error comes back as well."""

    def broken() -> None:
        raise KeyError("x")

    async def main() -> None:
        assert await loop.run_in_executor(None, lambda: 7) == 7
        with pytest.raises(KeyError):
            await loop.run_in_executor(None, broken)

    loop.run_until_complete(main())
    assert loop.time() > START_S
