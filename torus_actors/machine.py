"""What a process takes from the machine it runs on: disks, wall clock, threads, its own name.

Everything else a process needs comes from its event loop, and its randomness from one injected
generator. The simulator gives another loop and another machine, and the trees run unchanged.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torus_actors.runtime.actor import BlockingDelay
from torus_actors.runtime.spinner import SPIN_S
from torus_actors.storage.disk import Disk, RealDisk


def command_of(module: str) -> list[str]:
    """The command that runs a module of this program in a process of its own.

    It looks for modules where this one does. Python itself would first look in the current
    directory, where anybody may have put a ``queue.py``; ``torusblk nbd`` is run by root.
    """
    return [sys.executable, *([] if _looks_here() else ["-P"]), "-m", module]


def _looks_here() -> bool:
    """Whether modules are taken from the current directory: python -m, in a checkout."""
    try:
        return not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]
    except OSError:  # it was removed
        return False


def _process_name() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The real machine, unless told otherwise.

    Attributes:
        open_disk: gives the disk with a directory; the directory is made if it is not there.
        wall_clock: seconds since 1970, for people to read.
        process_name: host and process, for people who ask who has a volume open.
        spin_s: how long a loop may stay awake for a message; see `Spinner`. 0 on virtual time.
        shortcut: whether processes of one machine may do without TCP; see `same_machine`.
        blocking_delay_s: None where blocking actors have threads; see `ActorSystem`.
    """

    open_disk: Callable[[Path], Disk] = RealDisk
    wall_clock: Callable[[], float] = time.time
    process_name: Callable[[], str] = _process_name
    spin_s: float = SPIN_S
    shortcut: bool = True
    blocking_delay_s: BlockingDelay | None = None


REAL_MACHINE = Machine()
