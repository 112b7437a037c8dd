"""Scenarios in the simulator: they pass, they are repeatable, and known bugs are found by them."""

from __future__ import annotations

import os
import subprocess
import sys
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
from torus_actors.scenarios.faults import FAULTS
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS
from torus_actors.storage.mfile import MFileBatch

ROOT = Path(__file__).parents[2]

SEEDS = {
    "calm": 3,
    "overwrites": 4,
    "node_crash": 2,
    "rolling_restart": 2,
    "lease_wiped": 6,
    "bit_rot": 2,
    "ring_change": 5,
    "long_session": 5,
    "bad_network": 4,
    "partition_peer": 2,
}
"""Seeds of runs with several faults and little load, to be quick; 1 for the others."""

EVERYTHING_CPU_S = 15.0
EVERYTHING_RUNS_MAX = 40
"""So long, or so many, runs of everything: `explore` is for more."""


def failures(result: Result) -> str:
    """What a failed test prints."""
    return "\n".join([*result.failures, result.replay])


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "everything"])
def test_scenario(name: str) -> None:
    """One seed of the scenario: its faults strike, and its promise holds."""
    result = run(SCENARIOS[name], SEEDS.get(name, 1))
    assert not result.failures, failures(result)
    assert result.operations and result.flushes and result.sessions
    if SCENARIOS[name].faults:
        assert result.counts, "no fault struck: choose another seed"


@pytest.mark.parametrize(
    ("name", "seed"), [("everything", 26), ("everything", 29), ("many_crashes", 13)]
)
def test_a_seed_that_once_failed(name: str, seed: int) -> None:
    """Found by exploring, in this order.

    A call waited for a connection when the bridge died. A volume was opened so slowly that another
    client had it already. A write waited for room that could not be made.
    """
    result = run(SCENARIOS[name], seed)
    assert not result.failures, failures(result)


def test_everything() -> None:
    """All faults at once, for as many seeds as fit."""
    spent = 0.0
    for seed in range(1, EVERYTHING_RUNS_MAX + 1):
        result = run(SCENARIOS["everything"], seed)
        assert not result.failures, failures(result)
        spent += result.cpu_s
        if spent > EVERYTHING_CPU_S:
            break


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
