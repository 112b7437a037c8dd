"""Many runs, on several processor cores: each is one seed, which also says what scenario it is."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from torus_actors.scenarios.pool import worker_pool
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS, draw

EVERYTHING = "everything"
EVERYTHING_EVERY = 4

WAITING_MAX = 4
"""Runs handed out ahead for each core."""


def run_safely(name: str, seed: int) -> Result:
    """Run a scenario; a fault of the simulator itself is a failed run too."""
    try:
        return run(SCENARIOS[name], seed)
    except Exception:
        drawn = draw(SCENARIOS[name], seed)
        return Result(name, seed, failures=[traceback.format_exc()], drawn=drawn)


def scenario_of(seed: int, names: Sequence[str] = ()) -> str:
    """Which scenario a seed plays: every fourth `everything`, between them the others in turn.

    So any 200 seeds in a row try each scenario at least three times. With ``names``, those take
    turns.
    """
    if names:
        return names[seed % len(names)]
    if seed % EVERYTHING_EVERY == 0:
        return EVERYTHING
    others = [name for name in SCENARIOS if name != EVERYTHING]
    return others[(seed - seed // EVERYTHING_EVERY) % len(others)]


def jobs_of(names: Sequence[str], first: int, seeds: int | None) -> Iterator[tuple[str, int]]:
    """Scenario and seed of each run; see `scenario_of`."""
    numbers = itertools.count(first) if seeds is None else range(first, first + seeds)
    for seed in numbers:
        yield scenario_of(seed, names), seed


def explore(
    jobs: Iterator[tuple[str, int]],
    cores: int,
    minutes: float | None,
    done: Callable[[Result], None],
) -> None:
    """Run jobs until there are none left, or the time is over; ``done`` gets each result."""
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def in_time() -> bool:
        return end is None or time.monotonic() < end

    if cores <= 1:
        for name, seed in jobs:
            if not in_time():
                return
            done(run_safely(name, seed))
        return
    with worker_pool(cores) as pool:
        waiting: set[concurrent.futures.Future[Result]] = set()
        more = True
        while more or waiting:
            while more and len(waiting) < WAITING_MAX * cores:
                job = next(jobs, None) if in_time() else None
                if job is None:
                    more = False
                    break
                waiting.add(pool.submit(run_safely, *job))
            ended, waiting = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                done(future.result())
            if not in_time():
                waiting = {future for future in waiting if not future.cancel()}
