"""The harness for tests that need the kernel: a guest runs scripts, and its failures are told."""

from __future__ import annotations

import shlex
import sys

import pytest

import torus_actors
from tests.kernel.vm import GuestFailed, require_vm, run_in_vm

# A guest boots in about 10 s, and has minutes on a busy machine; a kernel may be downloaded first.
pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]


def test_the_kernel_boots_and_runs_this_python() -> None:
    """The guest has the modules that were asked for, and this Python with its packages."""
    require_vm()
    code = "import sys, torus_actors, uvloop; print(sys.executable, torus_actors.__file__)"
    script = f"""
        test -b /dev/nbd0 && test -d /sys/module/aoe && test -d /sys/module/ext4 || exit 3
        exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}
    """
    outcome = run_in_vm(script, modules=("nbd", "aoe", "ext4"), timeout_s=120)
    assert outcome.output == f"{sys.executable} {torus_actors.__file__}\n"
    assert outcome.status == 0, outcome


def test_a_failing_script_is_told_by_status_and_output() -> None:
    """Both streams arrive, in order, and the host is as it was."""
    require_vm()
    script = "echo this; echo that >&2; echo lost > /etc/torus-guest; cat /etc/torus-guest; exit 7"
    outcome = run_in_vm(script, modules=(), timeout_s=60)
    assert outcome.status == 7, outcome
    assert outcome.output == "this\nthat\nlost\n"


def test_a_guest_that_hangs_is_ended() -> None:
    """What it printed so far is in the error."""
    require_vm()
    with pytest.raises(GuestFailed, match=r"not done after 5 s(?s:.*)so far"):
        run_in_vm("echo so far; sleep 1000; echo never", modules=(), timeout_s=5)


def test_a_kernel_that_crashes_is_told() -> None:
    """It does not wait for the time-out; the console's text says why."""
    require_vm()
    script = "echo so far; echo c > /proc/sysrq-trigger; sleep 1000"
    with pytest.raises(GuestFailed, match=r"ended with(?s:.*)so far(?s:.*)panic"):
        run_in_vm(script, modules=(), timeout_s=60)
