"""What the system's tools do in the guest."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
SIZE = 64 * MIB
"""Of a test's volume."""


def shell(*arguments: str) -> str:
    """Run a system's tool."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{arguments}: {done.stdout} {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def mounted(device: str, where: Path, *options: str) -> Iterator[Path]:
    """Mount a device for a while."""
    where.mkdir(exist_ok=True)
    shell("mount", *options, device, str(where))
    try:
        yield where
    finally:
        shell("umount", str(where))
