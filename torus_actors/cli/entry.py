"""Where the three commands begin: Ctrl-C while Python still loads them ends them without a word.

It is met by a handler, and not as an exception: that would come out of whatever is being imported,
as a traceback, or be swallowed there. Commands import what they need, so that goes on until their
event loop begins. Hence this module imports next to nothing.
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


_before: signal._HANDLER = None
"""The handler of SIGINT as it was; None where it is in force."""


def _run(module: str) -> None:
    global _before
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        _before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        import_module(module).main()
    finally:
        loaded()


def loaded() -> None:
    """All that a command needs is there: from now on Ctrl-C is an exception again."""
    global _before
    if _before is not None:
        signal.signal(signal.SIGINT, _before)
        _before = None
