"""Real processes for tests: those of the scenarios, with tools that run inside the test process.

with Cluster(tmp_path) as cluster:
    cluster.start_node(0)                       # keeps the metadata
    cluster.start_node(1)
    cluster.ctl("volume", "create", "demo", "64MiB")
    client = cluster.serve("demo")
    ... client.uri ...
    cluster.nodes[1].kill()
    cluster.nodes[1].start()
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torus_actors.scenarios import processes
from torus_actors.scenarios.processes import (
    NODE_SIZE,
    Process,
    command,
    environment,
    free_ports,
    judge,
    until,
)

__all__ = [
    "Cluster",
    "Process",
    "command",
    "environment",
    "free_ports",
    "need",
    "small_cluster",
    "until",
]


def need(*programs: str) -> None:
    """Skip where a program is missing; fail instead where CI=true."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


class Cluster(processes.Cluster):
    """A cluster whose ``torusctl`` needs no process of its own."""

    def start_nodes(
        self, count: int, replication: int | None = None, size: str = NODE_SIZE
    ) -> None:
        """Start several at once; set the replication."""
        for index in range(count):
            self.node(index, size=size).launch()
        for index in range(count):
            self.nodes[index].wait_ready()
        if replication is not None:
            self.ctl("ring", "set-replication", str(replication))

    def ctl(self, *arguments: str, status: int = 0) -> str:
        """Run ``torusctl`` inside this process, which is much faster; see ``run``.

        Not from within a running event loop.
        """
        return judge(arguments, status, *self._call([*arguments, *self._shared]))

    def _call(self, arguments: list[str]) -> tuple[int, str, str]:
        from torus_actors.cli.common import run_main
        from torus_actors.cli.ctl import cli

        out, err = io.StringIO(), io.StringIO()
        root = logging.getLogger()
        level, handlers = root.level, list(root.handlers)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            for name in os.environ:
                if name.startswith("TORUS_"):
                    patch.delenv(name)
            for name, value in environment(self.directory).items():
                patch.setenv(name, value)
            run_main(cli, "torusctl", arguments)
        root.handlers[:] = handlers
        root.setLevel(level)
        assert isinstance(ended.value.code, int)
        return ended.value.code, out.getvalue(), err.getvalue()

    def ctl_json(self, *arguments: str) -> Any:
        """Run ``torusctl`` with ``--json``, and return what it says."""
        return json.loads(self.ctl(*arguments, "--json"))


@contextlib.contextmanager
def small_cluster(
    directory: Path, nodes: int, replication: int, size: str = NODE_SIZE
) -> Iterator[Cluster]:
    """A running cluster of a few nodes."""
    with Cluster(directory) as cluster:
        cluster.start_nodes(nodes, replication, size)
        yield cluster
