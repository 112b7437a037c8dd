"""What holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Garbage is looked for only in what the test itself made.

    Many tests end with a collection, to hear of exceptions that nobody retrieved. All modules, and
    all tests that were collected, would be looked through each time: a quarter of the whole run.
    """
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()
