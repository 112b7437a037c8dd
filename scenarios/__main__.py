"""``python -m torus_actors.scenarios``: list scenarios, run one, explore many seeds."""

from __future__ import annotations

import os
import sys
import time

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torus_actors.cli.common import Seconds, run_main
from torus_actors.errors import Invalid
from torus_actors.scenarios.explore import explore, jobs_of
from torus_actors.scenarios.hunt import Hunt, hunt
from torus_actors.scenarios.mutants import MUTANTS
from torus_actors.scenarios.real_main import endure_, real_, run_on_real_processes
from torus_actors.scenarios.real_run import needs_network, not_real
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS, draw
from torus_actors.scenarios.speed import measure

console = Console(highlight=False, soft_wrap=True, emoji=False)

FAILURES_SHOWN = 10

SEEDS = 200
"""As many as the default tests run."""

TELL_EVERY_S = 60.0
"""Where the output is no terminal, and there is no bar to look at."""


@click.group()
def main() -> None:
    """Run failure scenarios, each from one seed: in a simulator, or on real processes."""


@main.command("list")
def list_() -> None:
    """List the scenarios and what each is about."""
    table = Table(box=None, pad_edge=False)
    for column in ("scenario", "real", "why", "faults"):
        table.add_column(column, no_wrap=column in ("scenario", "real"))
    for scenario in SCENARIOS.values():
        faults = ", ".join(scenario.faults) or "none"
        real = "no" if not_real(scenario) else "root" if needs_network(scenario) else "yes"
        shown = faults if len(faults) < 60 else "all of them"
        table.add_row(scenario.name, real, scenario.why, shown)
    console.print(table)


@main.command("run")
@click.argument("name", type=click.Choice(sorted(SCENARIOS)))
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--trace", "trace_path", type=click.Path(), help="Write every event to this file.")
@click.option("--quiet", is_flag=True, help="Print the events only of a run that fails.")
@click.option("--real", is_flag=True, help="On real processes, in real time.")
@click.option(
    "--seconds",
    type=Seconds(min=0, min_open=True),
    help="Faults strike no longer than this, and in the simulator the first ones as much sooner.",
)
@click.option(
    "--mutant",
    "mutant_name",
    type=click.Choice(sorted(MUTANTS)),
    metavar="NAME",
    help="Put this bug into the program first; see 'mutants --list'.",
)
def run_(
    name: str,
    seed: int,
    trace_path: str | None,
    quiet: bool,
    real: bool,
    seconds: float | None,
    mutant_name: str | None,
) -> None:
    """Run one scenario with one seed: in the simulator always the same run."""
    scenario = SCENARIOS[name]
    mutant = MUTANTS[mutant_name] if mutant_name is not None else None
    if real:
        if mutant is not None:
            raise click.UsageError("--mutant is for the simulator, not for --real")
        run_on_real_processes(scenario, seed, seconds)
    console.print(f"{name}, seed {seed}: {scenario.why}", markup=False)
    console.print(draw(scenario, seed).describe(), markup=False)
    if trace_path is None:
        result = run(scenario, seed, seconds=seconds, mutant=mutant)
    else:
        with open(trace_path, "w", encoding="utf-8") as file:
            result = run(scenario, seed, file, seconds=seconds, mutant=mutant)
    if result.failures or not quiet:
        for line in result.lines:
            console.print(line, markup=False)
    _summary(result)
    sys.exit(1 if result.failures else 0)


@main.command("explore")
@click.option(
    "--seeds", type=click.IntRange(1), help=f"How many, one run each; without --minutes {SEEDS}."
)
@click.option("--first", type=int, default=1, show_default=True, help="The first seed.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
@click.option("--minutes", type=Seconds(min=0.01), help="Stop after so many minutes.")
@click.option(
    "--scenario",
    "names",
    type=click.Choice(sorted(SCENARIOS)),
    multiple=True,
    help="Only this one; may be given more than once.",
)
def explore_(
    seeds: int | None, first: int, jobs: int, minutes: float | None, names: tuple[str, ...]
) -> None:
    """Run many seeds; print what fails, with the command that replays it.

    A seed decides everything, the scenario too: every fourth seed is `everything`, between them the
    others take turns. With --scenario, only those take turns.
    """
    if seeds is None and minutes is None:
        seeds = SEEDS
    runs: list[int] = []
    failed: list[Result] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    simulated = cpu = 0.0
    told = time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=seeds)

        def done(result: Result) -> None:
            nonlocal simulated, cpu, told
            runs.append(result.seed)
            simulated += result.virtual_s
            cpu += result.cpu_s
            progress.advance(bar)
            if result.failures:
                failed.append(result)
                progress.console.print(
                    f"FAILED {result.scenario}, seed {result.seed}: {result.failures[0][:300]}\n"
                    f"  {result.replay}",
                    markup=False,
                )
                progress.update(bar, description=f"{len(failed)} failed")
            if not console.is_terminal and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()  # a bar is shown in the end only
                progress.console.print(f"{len(runs)} runs, {len(failed)} failed so far")

        explore(jobs_of(names, first, seeds), jobs, minutes, done)
    speed = simulated / cpu if cpu else 0.0
    console.print(
        f"{len(runs)} runs, {len(failed)} failed; {simulated:.0f} simulated seconds, "
        f"{speed:.0f} for each second of a core",
        markup=False,
    )
    for result in failed:
        console.print(result.replay, markup=False)
    sys.exit(1 if failed else 0)


@main.command("speed")
def speed_() -> None:
    """Measure the simulator: five nodes with load, the same every time."""
    speed = measure()
    console.print(speed.describe(), markup=False)
    sys.exit(1 if any(result.failures for result in speed.results) else 0)


main.add_command(endure_)
main.add_command(real_)


@main.command("mutants")
@click.argument("names", nargs=-1, type=click.Choice(sorted(MUTANTS)), metavar="[NAME]...")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Runs for each, at most.",
)
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
@click.option("--list", "only_list", is_flag=True, help="Only list the mutants.")
def mutants_(names: tuple[str, ...], seeds: int, jobs: int, only_list: bool) -> None:
    """Put known bugs into the program, one at a time, and see that the simulator finds them."""
    chosen = list(dict.fromkeys(names)) or list(MUTANTS)
    if only_list:
        table = Table("mutant", "the rule that it breaks", "kept in", box=None, pad_edge=False)
        for name in chosen:
            table.add_row(name, MUTANTS[name].breaks, MUTANTS[name].kept_in)
        console.print(table)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    runs = 0
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("mutants found", total=len(chosen))

        def tried() -> None:
            nonlocal runs
            runs += 1
            progress.update(bar, description=f"{runs} runs, mutants found")

        def over(each: Hunt) -> None:
            progress.console.print(_outcome(each), markup=False)
            progress.advance(bar, each.found is not None)

        try:
            hunts = hunt(chosen, seeds, jobs, tried, over)
        except Invalid as error:
            raise click.ClickException(f"{error}: mend it in scenarios/mutants.py") from error
    found = [each for each in hunts if each.found is not None]
    spoilt = [result for each in hunts for result in each.spoilt]
    console.print(
        f"{len(found)} of {len(hunts)} mutants found in {runs} runs, "
        f"{sum(each.cpu_s for each in hunts):.0f} s of a core"
    )
    for each in hunts:
        if each.found is None:
            console.print(f"SURVIVED {each.mutant.name}: {each.mutant.breaks}", markup=False)
    for result in spoilt:
        console.print(f"FAILED without any mutant: {result.replay}", markup=False)
    sys.exit(1 if spoilt or len(found) < len(hunts) else 0)


def _outcome(each: Hunt) -> str:
    if each.found is None:
        return f"{each.mutant.name}: SURVIVED {each.runs} runs, {each.cpu_s:.0f} s of a core"
    result = each.found.result
    return (
        f"{each.mutant.name}: found by run {each.runs}, {result.scenario} with seed {result.seed}; "
        f"{each.cpu_s:.0f} s of a core\n"
        f"  {result.failures[0][:300]}\n"
        f"  {result.replay}"
    )


def _summary(result: Result) -> None:
    counts = ", ".join(f"{kind} {count}" for kind, count in result.counts.items()) or "none"
    slowest = f"a {result.slowest} of {result.slowest_s:.1f} s" if result.slowest else "none"
    console.print(
        f"\nfaults: {counts}\n"
        f"{result.operations} operations, {result.flushes} flushes, {result.errors} errors seen by "
        f"clients, {result.sessions} sessions, {result.deletions} deletions; slowest operation: "
        f"{slowest}\n"
        f"{result.virtual_s:.1f} s simulated in {result.cpu_s:.1f} s of a core; "
        f"trace {result.digest}",
        markup=False,
    )
    if result.failures:
        console.print("\nFAILED", markup=False)
        for failure in result.failures[:FAILURES_SHOWN]:
            console.print(f"  {failure}", markup=False)
        console.print(f"replay: {result.replay}", markup=False)
    else:
        console.print("passed", markup=False)


if __name__ == "__main__":
    run_main(main, "python -m torus_actors.scenarios")
