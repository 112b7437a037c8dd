"""The processes of a dev cluster: kept running, whatever becomes of who started them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import until
from torus_actors.cli.dev import Child

CHATTY = """
import sys
print("node ready on 127.0.0.1:1", file=sys.stderr, flush=True)
for number in range(2000):
    print("2026-01-01 00:00:00 warning", "x" * 100, number, file=sys.stderr, flush=True)
print("serving it all", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def chatty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    """A process that has more to say than a pipe holds, and ends when it is told to."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Child("chatty", "chatty", [])


def test_a_process_goes_on_though_nobody_reads_what_it_logs(
    chatty: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torus-node dev 2>&1 | tee log``, and tee is gone.

    Found by review: the first line that had no reader was the last that was taken from a node. When
    the pipe was full the node stood still, and had it died it would not have been started again.
    """
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", stderr)

    async def main() -> None:
        chatty.start()
        await until(lambda: chatty._last_line.endswith(" 1999"), 20.0)
        await chatty.stop(20.0)
        assert chatty._process is not None and chatty._process.returncode == 0

    asyncio.run(main())
    with pytest.raises(BrokenPipeError):
        stderr.close()


def test_a_process_that_is_killed_before_it_is_up_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a machine without memory. Found by review: told was what it had logged last."""
    (tmp_path / "victim.py").write_text(
        "import os, sys\nprint('info: all is well', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    victim = Child("victim", "victim", [])

    async def main() -> None:
        victim.start()
        await until(lambda: victim.failure, 20.0)

    asyncio.run(main())
    assert victim.failure == "killed by SIGKILL"


def test_modules_in_the_current_directory_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Unless it is from there that this program itself was started, by ``python -m``.

    Found by review: a file ``queue.py`` in the directory in which root called ``torusblk nbd`` ran.
    """
    (tmp_path / "click.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "other.py").write_text("print('ours')")
    (tmp_path / "begin.py").write_text(
        "import subprocess, sys\n"
        "from torus_actors.machine import command_of\n"
        "raise SystemExit(subprocess.run(command_of(sys.argv[1]) + sys.argv[2:]).returncode)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for cwd, command in (
        (tmp_path, ["-P", str(tmp_path / "begin.py"), "torus_actors.cli.node", "--version"]),
        (tmp_path / "checkout", ["-m", "begin", "other"]),
    ):
        if cwd != tmp_path:
            cwd.mkdir()
            for name in ("begin.py", "other.py"):
                (tmp_path / name).rename(cwd / name)
        done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, timeout=60, check=False)
        assert done.returncode == 0


def test_a_process_that_cannot_be_started_is_tried_again(
    chatty: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine has no memory or no process left for a moment.

    Found by review: nobody tried again, nor said so.
    """
    start, starts = asyncio.create_subprocess_exec, 0

    async def short_of_memory(*arguments: Any, **options: Any) -> Any:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise OSError(12, "Cannot allocate memory")
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", short_of_memory)

    async def main() -> None:
        chatty.start()
        await until(chatty.ready.is_set, 20.0)
        chatty.kill()
        await until(lambda: starts == 3, 20.0)
        await chatty.stop(20.0)

    asyncio.run(main())
