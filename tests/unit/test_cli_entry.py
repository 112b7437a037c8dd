"""The console scripts, before they are loaded."""

from __future__ import annotations

import configparser
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest

from torus_actors.cli import entry

ROOT = Path(__file__).parents[2]

SLOW_CLICK = """
import os, time
os.write(1, b"importing")
try:
    time.sleep(20.0)
except BaseException as error:
    raise ImportError("swallowed") from error
"""


def console_scripts() -> dict[str, str]:
    """Name and ``module:function`` of each, as setup.cfg has them."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(tuple(map(str.strip, line.split("="))) for line in lines)  # type: ignore[misc]


def start(name: str, path: Path) -> subprocess.Popen[str]:
    """Run a console script as the one that pip makes would, with what is in a directory."""
    module, function = console_scripts()[name].split(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    return subprocess.Popen(
        [sys.executable, "-c", script, "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", console_scripts())
def test_ctrl_c_while_a_command_is_loaded_ends_it_without_a_word(name: str, tmp_path: Path) -> None:
    """With the status that shells know, whatever the import would make of an exception.

    Found by trying: it printed a traceback.
    """
    (tmp_path / "click.py").write_text(SLOW_CLICK)
    with start(name, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("importing")) == "importing"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10.0) == ("", "")
        assert process.returncode == 130


def test_ctrl_c_is_an_exception_from_the_loop_on() -> None:
    """Until then a command imports what it needs, and modules were met that swallow one."""
    script = (
        "import signal\n"
        "from torus_actors.cli import common, entry\n"
        "async def work(): print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "def main():\n"
        "    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "    common.asyncio.run = lambda work: work.send(None)\n"
        "    try: common.run(common.Settings(), work())\n"
        "    except StopIteration: pass\n"
        "entry.import_module = lambda module: type('Command', (), {'main': staticmethod(main)})\n"
        "entry.torusctl()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\nTrue\n", "")


def test_ctrl_c_stays_ignored_where_it_was(tmp_path: Path) -> None:
    """A shell starts what is to run in the background like that."""
    slow = SLOW_CLICK.replace("20.0", "0.1") + "raise SystemExit(7)\n"
    (tmp_path / "click.py").write_text(slow)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("torusctl", tmp_path)
    finally:
        signal.signal(signal.SIGINT, ignored)
    with process:
        assert process.stdout is not None
        process.stdout.read(len("importing"))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10.0) == 7


@pytest.mark.parametrize("name", console_scripts())
def test_the_console_scripts_are_the_three_commands(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each under its own name; once it is loaded, Ctrl-C is met as ever."""
    loaded: list[str] = []
    monkeypatch.setattr(entry, "import_module", lambda module: loaded.append(module) or Mock())
    module, function = console_scripts()[name].split(":")
    before = signal.getsignal(signal.SIGINT)
    getattr(import_module(module), function)()
    assert signal.getsignal(signal.SIGINT) is before
    assert f"``{name}``" in import_module(*loaded).main.__doc__
