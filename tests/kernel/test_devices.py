"""Volumes as devices of the Linux kernel: the tests in `inside`, run in a guest."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.kernel.vm import require_vm, run_in_vm

INSIDE = Path(__file__).parent / "inside"

MODULES = {
    "test_aoe_device.py": ("aoe", "ext4", "sch_netem", "veth"),
    "test_nbd_device.py": ("nbd", "ext4"),
}
"""What the tests of each file need of the kernel."""

TESTS_S_MAX = 600
"""Those of a file take two minutes where two cores are free."""

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(TESTS_S_MAX + 300)]


@pytest.mark.parametrize("name", sorted(path.name for path in INSIDE.glob("test_*.py")))
def test_in_a_guest(name: str) -> None:
    """All tests of a file pass there."""
    require_vm()
    run = [
        *("timeout", "-s", "INT", str(TESTS_S_MAX), str(Path(sys.executable).parent / "pytest")),
        *("-v", "--durations=9", "-p", "no:cacheprovider", "-o", "timeout=0", str(INSIDE / name)),
    ]
    script = f"""
        cd {shlex.quote(str(INSIDE.parents[2]))}
        TORUS_GUEST=1 exec {shlex.join(run)}
    """
    outcome = run_in_vm(script, modules=MODULES[name], timeout_s=TESTS_S_MAX + 60)
    print(outcome.output)
    assert outcome.status == 0, f"{outcome.output}\n{outcome.console}"
