"""Where the three commands begin: Ctrl-C while Python still loads them ends them without a word.

It is met by a handler, and not as an exception: that would come out of whatever is being imported,
as a traceback, or be swallowed there. Hence this module imports next to nothing.
"""

from __future__ import annotations

import os
import signal
from importlib import import_module

INTERRUPTED = 130
"""Exit status of what SIGINT ended, as shells have it."""


def torus_node() -> None:
    """Entry point of ``torus-node``."""
    _run("torus_actors.cli.node")


def torusctl() -> None:
    """Entry point of ``torusctl``."""
    _run("torus_actors.cli.ctl")


def torusblk() -> None:
    """Entry point of ``torusblk``."""
    _run("torus_actors.cli.blk")


def _run(module: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    main = import_module(module).main
    signal.signal(signal.SIGINT, before)
    main()
