"""Programs in forks of the test's own process, which has imported them.

To start Python and to import the program takes half a minute where the processor is emulated.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NoReturn

import torus_actors.cli.blk
import torus_actors.cli.daemon
import torus_actors.cli.node
import torus_actors.client
import torus_actors.node
from torus_actors.scenarios.processes import MODULES, POLL_S, Process

IMPORTED = (
    torus_actors.cli.blk,
    torus_actors.cli.daemon,
    torus_actors.cli.node,
    torus_actors.client,
    torus_actors.node,
)


class Fork:
    """What of `subprocess.Popen` a `Process` needs.

    Args:
        work: what it does; its status is 0 if that returns.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _end_with(work)

    def poll(self) -> int | None:
        """See subprocess."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """See subprocess."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < end, "a process did not end in time"
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """See subprocess."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """See subprocess."""
        self.send_signal(signal.SIGKILL)


class ForkedProcess(Process):
    """A program of this package, in a fork."""

    def _spawn(self, log: IO[bytes], environment: Mapping[str, str]) -> Any:
        return Fork(lambda: _become(self.arguments, log, environment))


def _end_with(work: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _become(arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.closerange(3, 1024)
    # pytest has put its own in their place.
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    logging.root.handlers.clear()
    os.environ.clear()
    os.environ.update(environment)
    _, option, module, *rest = arguments
    assert option == "-m"
    (program,) = (name for name, each in MODULES.items() if each == module)
    sys.argv = [program, *rest]
    importlib.import_module(module).main()
