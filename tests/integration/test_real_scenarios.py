"""Scenarios and endurance on real processes, in short; ``tox -e real`` runs more of both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.integration.cluster import need
from torus_actors.scenarios import netns
from torus_actors.scenarios.__main__ import main
from torus_actors.scenarios.real_faults import NOT_REAL, REAL_FAULTS
from torus_actors.scenarios.real_run import not_real
from torus_actors.scenarios.spec import SCENARIOS

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]

REAL = {
    "node_crash", "many_crashes", "node_lost", "rolling_restart", "partition_client",
    "partition_peer", "partition_one_way", "zombie_client", "metadata_outage", "lease_wiped",
    "bit_rot", "ring_change", "replication_change", "two_clients", "client_crash", "actor_kill",
    "everything",
}  # fmt: skip
"""Scenarios that must have a real form."""


def scenarios(*arguments: str, status: int = 0) -> str:
    """Run the command, as a process; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "torus_actors.scenarios", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if not status else done.stderr


@pytest.mark.long
def test_endurance() -> None:
    """Whoever is killed in the middle of writes and flushes: what was flushed is read back.

    Nodes, client and etcd at random, then all of them at once; ``endure`` compares every sector
    after each round, and every copy in the end.
    """
    need("etcd", "fio")
    told = scenarios("endure", "--rounds", "3", "--everything-rounds", "1")
    assert "rounds passed: 3 random, 1 of all" in told and told.endswith("passed\n")
    flushed = re.search(r"(\d+) of the volume's are flushed; (\d+) fio", told)
    assert flushed is not None and int(flushed[1]) > 1000 and int(flushed[2]) > 0


@pytest.mark.long
def test_a_node_that_is_half_reachable() -> None:
    """One scenario with hosts of its own: cut one way, no client sees an error, nothing is left."""
    need("etcd", "unshare", "ip")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    told = scenarios("run", "partition_one_way", "--real", "--seconds", "4", "--seed", "45")
    assert re.search(r"faults: cut_one_way [1-9]", told), told
    assert " 0 errors seen by clients" in told and told.endswith("passed\n")
    assert not Path("/sys/class/net", netns.BRIDGE).exists(), "the bridge was in a world of its own"


def test_every_fault_has_a_real_form_or_a_reason() -> None:
    """The tables fit the scenarios, and all that must run on real processes can."""
    used = {kind for scenario in SCENARIOS.values() for kind in scenario.faults}
    assert used == REAL_FAULTS.keys() | NOT_REAL.keys()
    assert not REAL_FAULTS.keys() & NOT_REAL.keys()
    assert {name for name, each in SCENARIOS.items() if not not_real(each)} >= REAL


@pytest.mark.parametrize("name", ["torn_write", "slow_disk", "disk_errors", "overwrites"])
def test_what_has_no_real_form_is_refused(name: str) -> None:
    """One plain line says why; nothing is started."""
    done = CliRunner().invoke(main, ["run", name, "--real"])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert done.output.startswith(f"{name} has no real form: ")


def test_the_list_says_what_can_be_real() -> None:
    """Each scenario is marked: can be real, can be as root, cannot."""
    listed = CliRunner().invoke(main, ["list"])
    rows = [re.match(r"(\w+) +(yes|root|no) ", line) for line in listed.output.splitlines()]
    marks = {row[1]: row[2] for row in rows if row is not None}
    assert marks["node_crash"] == "yes"
    assert marks["partition_peer"] == "root"
    assert marks["torn_write"] == "no"


def test_without_root_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where namespaces cannot be had, one plain line says so."""
    need("etcd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv(netns.INSIDE, raising=False)
    done = CliRunner().invoke(main, ["run", "partition_peer", "--real"])
    assert done.exit_code == 1
    assert done.output == (
        "partition_peer cuts the network: network namespaces need root: run this as root\n"
    )
