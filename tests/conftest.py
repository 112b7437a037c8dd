"""What holds for every test."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Generator

import pytest


def pytest_configure() -> None:
    """Commands that tests start can be interrupted, however the tests were started.

    In the background of a shell script, or under nohup, SIGINT is ignored, which children inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A test hears of its own garbage only, and leaves the log as it was.

    Many tests end with a collection, to hear of exceptions that nobody retrieved. All modules, and
    all tests that were collected, would be looked through each time: a quarter of the whole run.
    Commands that run in the test's process set up the log, for which other tests wait then in vain.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()
        root.setLevel(level)
        root.handlers[:] = handlers
