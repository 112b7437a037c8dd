"""Random calls, crashes, kills and stops: what holds whatever happens in which order."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.runtime_harness import Diary, Worker, on_loop, system_of
from torus_actors.errors import ActorCrashed
from torus_actors.runtime import ChildSpec, Strategy, SupervisorSpec, expose

NAMES = ("a", "b", "c", "d")


class Counted(Worker):
    """Knows whether two of its name are up at once, and handles calls that are never lost."""

    async def setup(self) -> None:
        """Take a moment."""
        await asyncio.sleep(0)
        await super().setup()

    async def cleanup(self) -> None:
        """Take a moment."""
        await asyncio.sleep(0)
        await super().cleanup()

    @expose(idempotent=True)
    async def again(self, line: Any) -> Any:
        """Answer a little later; may be handled twice."""
        await asyncio.sleep(0)
        return line

    @expose()
    async def once(self, line: Any) -> Any:
        """Answer a little later; may not be handled twice."""
        self.diary(("once", line))
        await asyncio.sleep(0)
        return line


steps = st.tuples(
    st.sampled_from(
        ["again", "once", "again", "once", "kill", "kill parent", "crash", "stop", "turn", "turn"]
    ),
    st.sampled_from(NAMES),
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(steps, max_size=40),
    st.sampled_from(list(Strategy)),
    st.sampled_from(list(Strategy)),
)
def test_whatever_happens(
    plan: list[tuple[str, str]], strategy: Strategy, nested_strategy: Strategy
) -> None:
    """Every call is answered or fails; nothing is handled twice unless it may be; all come back.

    Of each actor one is up at a time, and stop() leaves none.
    """
    logging.getLogger("torus_actors").setLevel(logging.CRITICAL)
    diary = Diary()

    def spec(name: str) -> ChildSpec:
        return ChildSpec(name, lambda: Counted(diary, name), max_concurrency=2, shutdown_s=0.5)

    nested = SupervisorSpec(
        "nested",
        (spec("b"), spec("c")),
        strategy=nested_strategy,
        max_restarts=1000,
        backoff_first_s=0.0,
        backoff_max_s=0.0,
    )

    @on_loop
    async def scenario() -> None:
        async with system_of(
            spec("a"),
            nested,
            spec("d"),
            strategy=strategy,
            max_restarts=1000,
            backoff_first_s=0.0,
            backoff_max_s=0.0,
        ) as system:
            calls: list[tuple[str, int, Any]] = []
            for number, (step, name) in enumerate(plan):
                handle = system.actor(name)
                if step in ("again", "once"):
                    calls.append((step, number, getattr(handle, step).remote(number)))
                elif step == "kill":
                    system.cells[name].kill()
                elif step == "kill parent":
                    system.cells["nested"].kill()
                elif step == "crash":
                    handle.crash.tell()
                elif step == "stop":
                    system.cells[name].stop_soon()
                else:
                    await asyncio.sleep(0)
            for _step, number, ref in calls:
                try:
                    assert await ref == number
                except ActorCrashed:
                    continue
            for name in NAMES:
                assert await system.actor(name).note.remote("well") == "well"
            assert not system.fatal.done()

    try:
        scenario()
    finally:
        logging.getLogger("torus_actors").setLevel(logging.NOTSET)
    once = [line for line in diary.lines if isinstance(line, tuple)]
    assert len(once) == len(set(once))
    for name in NAMES:
        turns = [line for line in diary.lines if line in (f"{name} up", f"{name} down")]
        # A setup that was cut short has not written "up", but its cleanup writes "down".
        up = 0
        for line in turns:
            up = up + 1 if line.endswith("up") else max(up - 1, 0)
            assert up <= 1
        assert up == 0


@pytest.mark.parametrize("count", [1, 50])
def test_the_same_plan_gives_the_same_history(count: int) -> None:
    """Nothing in the runtime depends on hashes, clocks or chance: histories repeat exactly."""
    histories = []
    for _ in range(2):
        diary = Diary()

        @on_loop
        async def scenario(diary: Diary = diary) -> None:
            async with system_of(
                *(ChildSpec(name, lambda name=name: Counted(diary, name)) for name in NAMES),
                strategy=Strategy.ONE_FOR_ALL,
                max_restarts=1000,
                backoff_max_s=0.0,
            ) as system:
                refs = []
                for n in range(count):
                    name = NAMES[n % 4]
                    refs += [system.actor(name).again.remote(n), system.actor(name).once.remote(n)]
                    if n % 7 == 3:
                        system.cells[name].kill()
                    if n % 3 == 0:
                        await asyncio.sleep(0)
                for answer in await asyncio.gather(*refs, return_exceptions=True):
                    diary(repr(answer))

        scenario.__signature__ = None  # type: ignore[attr-defined]
        scenario()
        histories.append(diary.lines)
    assert histories[0] == histories[1]
