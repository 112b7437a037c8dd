"""The command line's half that runs real processes: ``run --real``, ``real``, ``endure``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from torus_actors.cli.common import Seconds
from torus_actors.scenarios import netns
from torus_actors.scenarios.endure import endure
from torus_actors.scenarios.real_faults import NOT_REAL
from torus_actors.scenarios.real_run import (
    RealResult,
    draw_real,
    gains_from_network,
    needs_network,
    not_real,
    run_real,
)
from torus_actors.scenarios.spec import SCENARIOS, Scenario

FAILURES_SHOWN = 10

PROGRAM = (sys.executable, "-m", "torus_actors.scenarios")


def run_on_real_processes(scenario: Scenario, seed: int, seconds: float | None) -> NoReturn:
    """Run a scenario, say how it ended, and exit.

    Args:
        scenario: which.
        seed: of all that is drawn.
        seconds: faults strike no longer than this.
    """
    if reason := not_real(scenario):
        refuse(f"{scenario.name} has no real form: {reason}")
    need_programs("etcd")
    replay = ["run", scenario.name, "--seed", str(seed), "--real"]
    if seconds is not None:
        replay += ["--seconds", f"{seconds:g}"]
    network = None
    if needs_network(scenario) or (gains_from_network(scenario) and os.geteuid() == 0):
        try:
            netns.enter([*PROGRAM, *replay])
            network = netns.Network()
        except netns.Unavailable as error:
            if needs_network(scenario):
                refuse(f"{scenario.name} cuts the network: {error}")
            say(f"nothing will be cut: {error}")
    drawn = draw_real(scenario, seed, seconds)
    say(f"{scenario.name}, seed {seed}, on real processes: {scenario.why}")
    say(drawn.describe())
    left_out = [kind for kind in scenario.faults if kind in NOT_REAL]
    if left_out:
        say(f"without {', '.join(left_out)}, which have no real form")
    result = run_real(scenario, seed, drawn, network, say)
    finish(result, replay)


@click.command("endure")
@click.option("--rounds", type=click.IntRange(0), default=50, show_default=True)
@click.option("--everything-rounds", type=click.IntRange(0), default=20, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def endure_(rounds: int, everything_rounds: int, seed: int) -> None:
    """Kill -9 nodes, client and etcd under load, round after round, on real processes.

    After each round everything that was flushed must be read back. In the everything-rounds all are
    killed at once.
    """
    need_programs("etcd")
    result = endure(rounds, everything_rounds, seed, say)
    say("")
    say(result.summary())
    options = ["--rounds", str(rounds), "--everything-rounds", str(everything_rounds)]
    _verdict(result, ["endure", *options, "--seed", str(seed)])


@click.command("real")
@click.argument("names", nargs=-1, type=click.Choice(sorted(SCENARIOS)))
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--seconds",
    type=Seconds(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="See run.",
)
def real_(names: tuple[str, ...], seed: int, seconds: float) -> None:
    """Run scenarios on real processes, one after the other; without NAMES all that can be run."""
    failed = []
    root = os.geteuid() == 0
    chosen = names or tuple(name for name, each in SCENARIOS.items() if not not_real(each))
    for name in chosen:
        if needs_network(SCENARIOS[name]) and not root:
            say(f"{name}: left out, it cuts the network, which needs root")
            continue
        arguments = ["run", name, "--seed", str(seed), "--seconds", f"{seconds:g}", "--real"]
        done = subprocess.run([*PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            say(done.stdout)
        else:
            say(f"{name}: {' '.join(done.stdout.splitlines()[-2:])}")
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    sys.exit(1 if failed else 0)


def finish(result: RealResult, replay: Sequence[str]) -> NoReturn:
    """Print how a run ended, and exit."""
    say("")
    say(result.describe())
    _verdict(result, replay)


def _verdict(result: RealResult, replay: Sequence[str]) -> NoReturn:
    if not result.failures:
        say("passed")
        sys.exit(0)
    say("FAILED")
    for failure in result.failures[:FAILURES_SHOWN]:
        say(f"  {failure}")
    say(f"logs: {result.logs}")
    say(f"again: python -m torus_actors.scenarios {' '.join(replay)}")
    sys.exit(1)


def say(text: str) -> None:
    """Print a line at once: who watches wants to see how far it is."""
    click.echo(text)
    sys.stdout.flush()


def refuse(text: str) -> NoReturn:
    """One line on standard error, and status 1."""
    click.echo(text, err=True)
    sys.exit(1)


def need_programs(*programs: str) -> None:
    """Refuse where one is missing."""
    for program in programs:
        if shutil.which(program) is None:
            refuse(f"{program} is not installed")
