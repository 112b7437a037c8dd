"""Scenarios in the simulator: they pass, they are repeatable, and known bugs are found by them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from torus_actors.actors.collector import Collector
from torus_actors.actors.replicator import Replicator
from torus_actors.metadata.kv import Put
from torus_actors.metadata.records import Record
from torus_actors.metadata.sessions import SessionOperations
from torus_actors.scenarios.__main__ import main
from torus_actors.scenarios.explore import jobs_of, scenario_of
from torus_actors.scenarios.faults import FAULTS
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS
from torus_actors.scenarios.speed import measure
from torus_actors.storage.mfile import MFileBatch

ROOT = Path(__file__).parents[2]

SEEDS = range(1, 201)
"""Seeds of the default run, each of which is one run; `explore` is for more."""

EVERYTHING_GROUPS = 10
"""Tests that share the seeds of everything, so that two cores have equally much to do."""

SPEED_MIN = 8.0
"""Simulated seconds for a core's. A quiet machine does seven times as many, two busy ones that
share a core four times: this is for a loop that does all its work many times over."""


def failures(result: Result) -> str:
    """What a failed test prints."""
    return "\n".join([*result.failures, result.replay])


def seeds_of(name: str) -> list[int]:
    """Seeds of the default run that play a scenario."""
    return [seed for seed in SEEDS if scenario_of(seed) == name]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "everything"])
def test_seeds(name: str) -> None:
    """Those of the 200 seeds that play it: the promise is kept, and all its faults strike."""
    struck: set[str] = set()
    for seed in seeds_of(name):
        result = run(SCENARIOS[name], seed)
        assert not result.failures, failures(result)
        assert result.operations and result.flushes and result.sessions, failures(result)
        struck.update(result.counts)
    assert struck == set(SCENARIOS[name].faults)


@pytest.mark.parametrize("group", range(EVERYTHING_GROUPS))
def test_seeds_of_everything(group: int) -> None:
    """The other quarter of the 200 seeds: all faults at once."""
    struck: set[str] = set()
    for seed in seeds_of("everything")[group::EVERYTHING_GROUPS]:
        result = run(SCENARIOS["everything"], seed)
        assert not result.failures, failures(result)
        struck.update(result.counts)
    # The rarest strike once in several runs.
    assert len(struck) > len(FAULTS) / 2


@pytest.mark.parametrize(("name", "seed"), [("zombie_client", 274)])
def test_a_seed_that_once_failed(name: str, seed: int) -> None:
    """Found by exploring, beyond the seeds above.

    A frozen client had two volumes open: the operations of both may take as long as it slept.
    """
    result = run(SCENARIOS[name], seed)
    assert not result.failures, failures(result)


def test_every_seed_has_its_scenario() -> None:
    """A quarter are everything; of 200 in a row each other scenario has five. It stays like this.

    A failure names its scenario, so the command that replays it does not depend on this.
    """
    for first in (1, 77, 1801):
        played = Counter(name for name, _ in jobs_of((), first, 200))
        assert played.pop("everything") == 50
        assert min(played.values()) >= 5 and len(played) == len(SCENARIOS) - 1
    assert [scenario_of(seed) for seed in (1, 4, 8, 100)] == [
        "overwrites",
        "everything",
        "everything",
        "everything",
    ]
    assert list(jobs_of(["calm", "bit_rot"], 4, 3)) == [
        ("calm", 4),
        ("bit_rot", 5),
        ("calm", 6),
    ]


def test_the_simulator_is_not_slow() -> None:
    """Five nodes with load: far faster than in real time. How fast, the command ``speed`` says."""
    speed = measure(seeds=(1,))
    assert not speed.results[0].failures, failures(speed.results[0])
    assert speed.factor > SPEED_MIN, speed.describe()


def test_every_fault_is_used_and_known() -> None:
    """The tables of faults and scenarios fit together."""
    used = {kind for scenario in SCENARIOS.values() for kind in scenario.faults}
    assert used == set(FAULTS)


def _digest_in_new_process(hash_seed: str, seed: int) -> str:
    code = (
        "from torus_actors.scenarios.run import run\n"
        "from torus_actors.scenarios.spec import SCENARIOS\n"
        f"print(run(SCENARIOS['everything'], {seed}).digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_a_seed_is_a_run() -> None:
    """The same seed gives the same run, byte by byte, whatever the hashes of strings are."""
    seed = 5
    first, second = (_digest_in_new_process(hash_seed, seed) for hash_seed in ("1", "2"))
    here = run(SCENARIOS["everything"], seed).digest
    assert first == second == here
    assert run(SCENARIOS["everything"], seed + 1).digest != first


def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush does not reach the disk."""
    monkeypatch.setattr(MFileBatch, "_sync", lambda self, file: None)


def _no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit compares neither the epoch nor the head that it replaces."""

    async def commit(
        self: SessionOperations, volume_id: int, epoch: int, revision: int, key: str, record: Record
    ) -> int:
        return (await self.store.txn([], [Put(key, record.encode())])).revision

    monkeypatch.setattr(SessionOperations, "_commit", commit)


def _one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write is acknowledged with one copy."""
    put = Replicator._put_copies

    async def one(self: Replicator, *args: Any) -> Any:
        return await put(self, *args[:-1], 1)

    monkeypatch.setattr(Replicator, "_put_copies", one)


def _no_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read does not look at checksums."""
    monkeypatch.setattr("torus_actors.actors.replicator.verify_range", lambda *args: None)


def _eager_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector takes what is not committed yet for garbage."""
    read = Collector._read_metadata

    async def all_closed(self: Collector) -> Any:
        oldest_open, *rest = await read(self)
        return (dict.fromkeys(oldest_open, 1 << 62), *rest)

    monkeypatch.setattr(Collector, "_read_metadata", all_closed)


@pytest.mark.parametrize(
    ("break_it", "name", "seed"),
    [
        (_no_sync, "torn_write", 1),
        (_no_fence, "two_clients", 1),
        (_one_copy, "calm", 3),
        (_no_verify, "bit_rot", 3),
        (_eager_collector, "long_session", 4),
    ],
)
def test_a_known_bug_is_found(
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    name: str,
    seed: int,
) -> None:
    """A bug put in on purpose makes its scenario fail: the simulator would have found it."""
    break_it(monkeypatch)
    assert run(SCENARIOS[name], seed).failures, break_it.__doc__


def test_the_command_line() -> None:
    """``list`` names every scenario; ``run`` says what the seed made, and ends with 0."""
    runner = CliRunner()
    listed = runner.invoke(main, ["list"])
    assert listed.exit_code == 0
    assert all(name[:20] in listed.output for name in SCENARIOS)
    done = runner.invoke(main, ["run", "partition_one_way", "--seed", "1"])
    assert done.exit_code == 0, done.output
    assert "copies, blocks of" in done.output and "passed" in done.output


def test_a_failure_prints_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` and ``explore`` end with 1 and print the seed's command."""
    _one_copy(monkeypatch)
    runner = CliRunner()
    command = "python -m torus_actors.scenarios run calm --seed 3"
    for args in (
        ["run", "calm", "--seed", "3", "--quiet"],
        ["explore", "--scenario", "calm", "--first", "3", "--seeds", "1", "--jobs", "1"],
    ):
        done = runner.invoke(main, args)
        assert done.exit_code == 1, done.output
        assert command in done.output
