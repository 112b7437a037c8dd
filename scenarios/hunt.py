"""Hunting mutants: runs with a bug put in, until one of them fails.

A mutant is found by the first of its runs that fails, in the order of `plan`, and only if the same
run passes without it.
"""

from __future__ import annotations

import concurrent.futures
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torus_actors.scenarios.mutants import MUTANTS
from torus_actors.scenarios.mutation import Mutant, put_in
from torus_actors.scenarios.pool import worker_pool
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS

WAITING_MAX = 1
"""Runs handed out ahead, so that no core waits."""


def plan(mutant: Mutant, number: int) -> tuple[str, int]:
    """Scenario and seed of a mutant's run with that number, from 0: its scenarios in turns."""
    turn, at = divmod(number, len(mutant.hunted_in))
    return mutant.hunted_in[at], mutant.first_seed + turn


@dataclass(frozen=True, slots=True)
class Try:
    """One run with a mutant.

    Attributes:
        result: of the run.
        clean: of the same run without the mutant, if the run failed.
    """

    result: Result
    clean: Result | None


def try_once(name: str, number: int, clean: Result | None = None) -> Try:
    """Run a mutant; where it fails, run the same without it. Works in any process.

    Args:
        name: of the mutant.
        number: of its run.
        clean: the same run without it, if that was made already.
    """
    mutant = MUTANTS[name]
    scenario_name, seed = plan(mutant, number)
    scenario = SCENARIOS[scenario_name]
    try:
        result = run(scenario, seed, mutant=mutant, one_failure=True)
    except Exception:
        # Whatever breaks the simulator would not go unnoticed either.
        result = Result(scenario_name, seed, failures=[traceback.format_exc()], mutant=name)
    if not result.failures:
        return Try(result, None)
    return Try(result, run(scenario, seed) if clean is None else replace(clean, cpu_s=0.0))


class _Clean:
    """Runs without a mutant: several mutants are hunted in the same ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], Result] = {}

    def of(self, each: Hunt, number: int) -> Result | None:
        """The one beside a run of a hunt, if it was made."""
        return self._known.get(plan(each.mutant, number))

    def learn(self, tried: Try) -> None:
        """Take note of one, if there is one."""
        if tried.clean is not None:
            self._known[tried.clean.scenario, tried.clean.seed] = tried.clean


@dataclass(slots=True)
class Hunt:
    """How far the hunt for one mutant is.

    Attributes:
        found: the first run that failed.
        runs: how many it took, or were in vain.
        cpu_s: processor time.
        spoilt: runs that fail without the mutant too.
    """

    mutant: Mutant
    runs_max: int
    found: Try | None = None
    runs: int = 0
    cpu_s: float = 0.0
    spoilt: list[Result] = field(default_factory=list)
    _next: int = 0
    _flying: set[int] = field(default_factory=set)
    _caught: dict[int, Try] = field(default_factory=dict)

    @property
    def flying(self) -> int:
        """Runs under way."""
        return len(self._flying)

    @property
    def wants_more(self) -> bool:
        """Whether there are runs left that may be the first to find it."""
        return not self._caught and self._next < self.runs_max

    @property
    def over(self) -> bool:
        """Whether the result is known."""
        first = min(self._caught, default=self.runs_max)
        return not self.wants_more and not any(number < first for number in self._flying)

    def begin(self) -> int:
        """The number of the next run."""
        number = self._next
        self._next += 1
        self._flying.add(number)
        return number

    def end(self, number: int, tried: Try) -> None:
        """A run is over."""
        self._flying.discard(number)
        self.cpu_s += tried.result.cpu_s
        if tried.clean is not None:
            self.cpu_s += tried.clean.cpu_s
            if tried.clean.failures:
                self.spoilt.append(tried.clean)
            else:
                self._caught[number] = tried
        first = min(self._caught, default=self._next - 1)
        self.found = self._caught.get(first)
        self.runs = first + 1


def hunt(
    names: Sequence[str],
    runs_max: int,
    cores: int,
    tried: Callable[[], None],
    over: Callable[[Hunt], None],
) -> list[Hunt]:
    """Hunt mutants on several cores.

    Args:
        names: of the mutants.
        runs_max: runs for each, at most.
        cores: how many.
        tried: called after each run.
        over: called with each hunt that has come to its end.

    Returns:
        All hunts, in the order of ``names``.

    Raises:
        Invalid: a mutant does not fit the code. Run, it would fail at once, and look found.
    """
    for name in names:
        with put_in(MUTANTS[name]):
            pass
    hunts = [Hunt(MUTANTS[name], runs_max) for name in names]
    clean = _Clean()
    if cores <= 1:
        for each in hunts:
            while not each.over:
                number = each.begin()
                result = try_once(each.mutant.name, number, clean.of(each, number))
                clean.learn(result)
                each.end(number, result)
                tried()
            over(each)
        return hunts
    open_hunts = list(hunts)
    with worker_pool(cores) as pool:
        flying: dict[concurrent.futures.Future[Try], tuple[Hunt, int]] = {}
        while open_hunts:
            while len(flying) < cores + WAITING_MAX:
                # The hunt with the fewest runs under way, so that few are in vain once it is found.
                ready = [each for each in open_hunts if each.wants_more]
                if not ready:
                    break
                each = min(ready, key=lambda each: each.flying)
                number = each.begin()
                job = pool.submit(try_once, each.mutant.name, number, clean.of(each, number))
                flying[job] = each, number
            done, _ = concurrent.futures.wait(
                flying, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                each, number = flying.pop(future)
                clean.learn(future.result())
                each.end(number, future.result())
                tried()
            for each in [each for each in open_hunts if each.over]:
                open_hunts.remove(each)
                over(each)
        for future in flying:
            future.cancel()
    return hunts
