"""Scenarios in the simulator: they pass, and are repeatable. Bugs they find: see test_mutants."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from torus_actors.scenarios.__main__ import main
from torus_actors.scenarios.explore import jobs_of, scenario_of
from torus_actors.scenarios.faults import FAULTS
from torus_actors.scenarios.mutants import MUTANTS
from torus_actors.scenarios.mutation import put_in
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS, draw
from torus_actors.scenarios.speed import measure

ROOT = Path(__file__).parents[2]

SEEDS = range(1, 201)
"""Seeds of the default run, each of which is one run; `explore` is for more."""

SHARE = 0.2
"""Of the time that a seed has faults strike, so that all of them take a few minutes. Each kind
strikes as much sooner, and so no less often."""

SAME_S = 8.0
"""Of faults, in runs that are made three times over."""

EVERYTHING_GROUPS = 10
"""Tests that share the seeds of everything, so that two cores have equally much to do."""

SPEED_MIN = 8.0
"""Simulated seconds for a core's. A quiet machine does five times as many, two busy ones that
share a core three times: this is for a loop that does all its work many times over."""


@pytest.fixture
def short_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario ``calm`` takes a few seconds, for commands that need any."""
    short = dataclasses.replace(SCENARIOS["calm"], duration_s=(4, 5))
    monkeypatch.setitem(SCENARIOS, "calm", short)


def failures(result: Result) -> str:
    """What a failed test prints."""
    return "\n".join([*result.failures, result.replay])


def seeds_of(name: str) -> list[int]:
    """Seeds of the default run that play a scenario."""
    return [seed for seed in SEEDS if scenario_of(seed) == name]


def play(name: str, seed: int) -> Result:
    """A run of the default tests."""
    scenario = SCENARIOS[name]
    result = run(scenario, seed, seconds=round(draw(scenario, seed).duration_s * SHARE, 1))
    assert not result.failures, failures(result)
    return result


def more_seeds_of(name: str) -> list[int]:
    """Those that follow, in which a fault may strike that was not drawn in the first."""
    following = range(SEEDS.stop, SEEDS.stop + len(SEEDS))
    return [seed for seed in following if scenario_of(seed) == name]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "everything"])
def test_seeds(name: str) -> None:
    """Those of the 200 seeds that play it: the promise is kept, and all its faults strike.

    Which faults a seed draws changes with all that the cluster does in it. Where one has not struck
    by then, the next seeds must show it.
    """
    faults = set(SCENARIOS[name].faults)
    struck: set[str] = set()
    for seed in [*seeds_of(name), *more_seeds_of(name)]:
        if seed not in SEEDS and struck == faults:
            break
        result = play(name, seed)
        assert result.operations and result.flushes and result.sessions, failures(result)
        struck.update(result.counts)
    assert struck == faults


@pytest.mark.parametrize("group", range(EVERYTHING_GROUPS))
def test_seeds_of_everything(group: int) -> None:
    """The other quarter of the 200 seeds: all faults at once."""
    struck: set[str] = set()
    for seed in seeds_of("everything")[group::EVERYTHING_GROUPS]:
        result = play("everything", seed)
        struck.update(result.counts)
    # The rarest strike once in several runs.
    assert len(struck) > 5 * len(SCENARIOS["everything"].faults) / 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("zombie_client", 274),
        ("actor_kill", 594),
        ("everything", 424),
        ("everything", 1588),
        ("journal_members", 190),
        ("journal_replay", 77),
        ("disk_errors", 1750),
        ("bad_network", 1868),
        ("slow_disk", 1033),
    ],
)
def test_a_seed_that_once_failed(name: str, seed: int) -> None:
    """Found by exploring, beyond the seeds above.

    A frozen client had two volumes open: the operations of both may take as long as it slept. A
    read failed while the client's bridge was being started again. Nodes were starting when a head
    was recorded, so that nobody could tell what it led to. A snapshot was asked for before the
    client had read what it found. Both members of a journal lost it, one after the other, before a
    client had come that could choose others. Two records had a part of a sector each. A node one of
    whose stores had failed took blocks for the other. All connections broke when a commit put its
    pages. A disk hung while its node collected, which then paused as after a pass of much work.
    """
    result = run(SCENARIOS[name], seed)
    assert not result.failures, failures(result)


def test_every_seed_has_its_scenario() -> None:
    """A quarter are everything; of 200 in a row each other scenario has three. It stays like this.

    A failure names its scenario, so the command that replays it does not depend on this.
    """
    for first in (1, 77, 1801):
        played = Counter(name for name, _ in jobs_of((), first, 200))
        assert played.pop("everything") == 50
        assert min(played.values()) >= 3 and len(played) == len(SCENARIOS) - 1
    assert [scenario_of(seed) for seed in (1, 4, 8, 100)] == [
        "calm_snapshots",
        "everything",
        "everything",
        "everything",
    ]
    assert list(jobs_of(["calm", "bit_rot"], 4, 3)) == [
        ("calm", 4),
        ("bit_rot", 5),
        ("calm", 6),
    ]


@pytest.mark.long
def test_the_simulator_is_not_slow() -> None:
    """Five nodes with load: far faster than in real time. How fast, the command ``speed`` says."""
    speed = measure(seeds=(1,))
    assert not speed.results[0].failures, failures(speed.results[0])
    assert speed.factor > SPEED_MIN, speed.describe()


def test_every_fault_is_used_and_known() -> None:
    """The tables of faults and scenarios fit together."""
    used = {kind for scenario in SCENARIOS.values() for kind in scenario.faults}
    assert used == set(FAULTS)


def _in_new_process(code: str, **env: str) -> str:
    """What a program prints that runs scenarios and nothing else."""
    preamble = (
        "from torus_actors.scenarios.run import run\n"
        "from torus_actors.scenarios.spec import SCENARIOS\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def _digest_in_new_process(name: str, hash_seed: str, seed: int) -> str:
    code = f"print(run(SCENARIOS['{name}'], {seed}, seconds={SAME_S}).digest)"
    return _in_new_process(code, PYTHONHASHSEED=hash_seed)


@pytest.mark.parametrize(
    "name",
    [
        "everything",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("readers", "resizes")),
    ],
)
def test_a_seed_is_a_run(name: str) -> None:
    """The same seed gives the same run, byte by byte, whatever the hashes of strings are."""
    seed = 5
    first, second = (_digest_in_new_process(name, hash_seed, seed) for hash_seed in ("1", "2"))
    here = run(SCENARIOS[name], seed, seconds=SAME_S).digest
    assert first == second == here
    assert run(SCENARIOS[name], seed + 1, seconds=SAME_S).digest != first


def test_a_run_leaves_nothing_behind() -> None:
    """A thousand runs in one process need no more memory than one.

    In a process of its own: pytest keeps what is logged, tracebacks and all.
    """
    code = """
import gc
from torus_actors.scenarios.cluster import Cluster
made = []
count = Cluster.__init__
def counted(self, *args):
    made.append(id(self))
    count(self, *args)
Cluster.__init__ = counted
failures = [run(SCENARIOS["node_crash"], seed).failures for seed in (1, 2)]
print(failures, len(made), sum(isinstance(each, Cluster) for each in gc.get_objects()))
"""
    assert _in_new_process(code) == "[[], []] 2 0"


def test_the_command_line() -> None:
    """``list`` names every scenario; ``run`` says what the seed made, and ends with 0."""
    runner = CliRunner()
    listed = runner.invoke(main, ["list"])
    assert listed.exit_code == 0
    assert all(name[:20] in listed.output for name in SCENARIOS)
    done = runner.invoke(main, ["run", "partition_one_way", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert "copies, blocks of" in done.output and "passed" in done.output


@pytest.mark.usefixtures("short_calm")
def test_exploring_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no terminal: now and then a line."""
    monkeypatch.setattr("torus_actors.scenarios.__main__.TELL_EVERY_S", 0.0)
    args = ["explore", "--scenario", "calm", "--seeds", "2", "--jobs", "1"]
    done = CliRunner().invoke(main, args)
    lines = done.output.splitlines()
    assert lines[:2] == ["1 runs, 0 failed so far", "2 runs, 0 failed so far"]
    assert lines[-1].startswith("2 runs, 0 failed; ")


def test_workers_end_with_who_explores() -> None:
    """Also where it is killed: else they would wait for ever for more to do."""
    command = [sys.executable, "-m", "torus_actors.scenarios", "explore", "--jobs", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as exploring:
        children = Path(f"/proc/{exploring.pid}/task/{exploring.pid}/children")
        workers: list[str] = []
        while len(workers) < 3:  # one of them only looks after shared resources
            time.sleep(0.05)
            workers = children.read_text().split()
        exploring.kill()

    def running(pid: str) -> bool:
        try:
            # Of a process that has ended, and that nobody has waited for, it is empty.
            return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            return False

    end = time.monotonic() + 30.0
    while any(map(running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(running, workers))


@pytest.mark.usefixtures("short_calm")
def test_a_failure_prints_the_command_that_replays_it() -> None:
    """``run`` and ``explore`` end with 1 and print the seed's command."""
    runner = CliRunner()
    command = "python -m torus_actors.scenarios run calm --seed 3"
    with put_in(MUTANTS["one_copy"]):
        for args, told in (
            (["run", "calm", "--seed", "3", "--seconds", "3.5"], f"{command} --seconds 3.5\n"),
            (["explore", "--scenario", "calm", "--first", "3", "--seeds", "1"], f"{command}\n"),
        ):
            jobs = ["--quiet"] if args[0] == "run" else ["--jobs", "1"]
            done = runner.invoke(main, [*args, *jobs])
            assert done.exit_code == 1, done.output
            assert told in done.output
