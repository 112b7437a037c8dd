"""Staying awake for a message: only where it pays, and never for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.unit.runtime_harness import on_uvloop
from torus_actors.runtime.spinner import Spinner

FOR_EVER_S = 1000.0


class Core:
    """Counts how often the loop turned; what a yield does can be set."""

    def __init__(self) -> None:
        self.turns = 0
        self.takes: Callable[[], None] = lambda: None

    def sched_yield(self) -> None:
        """Stands in for the system's."""
        self.turns += 1
        self.takes()


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    """A core that nobody else wants, whatever else this machine does."""
    core = Core()
    monkeypatch.setattr("torus_actors.runtime.spinner.os.sched_yield", core.sched_yield)
    monkeypatch.setattr("torus_actors.runtime.spinner.CONTENDED_S", FOR_EVER_S)
    return core


def learned(longest_s: float = FOR_EVER_S) -> Spinner:
    """A spinner that has seen a short wait."""
    spinner = Spinner(asyncio.get_running_loop(), longest_s)
    spinner.expect()
    spinner.came()
    return spinner


def test_the_first_wait_is_slept_through(core: Core) -> None:
    """What is not known to be short is not waited for awake."""

    async def play() -> None:
        Spinner(asyncio.get_running_loop(), FOR_EVER_S).expect()
        await asyncio.sleep(0.02)

    on_uvloop(play)()
    assert core.turns == 0


def test_after_a_short_wait_the_next_is_spent_awake(core: Core) -> None:
    """Until the message comes: then nothing keeps the loop awake any more."""

    async def play() -> None:
        spinner = learned()
        spinner.expect()
        await asyncio.sleep(0.02)
        assert core.turns > 1
        spinner.came()
        await asyncio.sleep(0)
        turns = core.turns
        await asyncio.sleep(0.02)
        assert core.turns == turns

    on_uvloop(play)()


def test_a_wait_in_vain_is_the_last(core: Core) -> None:
    """When the longest time is over the loop sleeps, and sleeps through the next wait."""

    async def play() -> None:
        core.takes = lambda: time.sleep(0.002)
        spinner = learned(longest_s=0.01)
        spinner.expect()
        await asyncio.sleep(0.1)
        assert 0 < core.turns <= 5
        turns = core.turns
        spinner.expect()
        await asyncio.sleep(0.02)
        assert core.turns == turns

    on_uvloop(play)()


def test_it_gives_way(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """When somebody else took the core, the loop sleeps, and does not try again for a while."""
    monkeypatch.setattr("torus_actors.runtime.spinner.CONTENDED_S", 0.001)

    async def play() -> None:
        core.takes = lambda: time.sleep(0.003)
        spinner = learned()
        for _ in range(3):  # a short wait in between does not bring it back at once
            spinner.expect()
            spinner.came()
        spinner.expect()
        await asyncio.sleep(0.05)
        assert core.turns == 1
        spinner.came()
        spinner.expect()
        spinner.came()
        spinner.expect()
        await asyncio.sleep(0.05)
        assert core.turns == 2

    on_uvloop(play)()


def test_a_long_wait_teaches_to_sleep(core: Core) -> None:
    """A message that took longer than turning is worth ends it for the next."""

    async def play() -> None:
        spinner = learned(longest_s=0.01)
        spinner.expect()
        core.takes = lambda: time.sleep(0.02)
        await asyncio.sleep(0.05)
        spinner.came()
        turns = core.turns
        spinner.expect()
        await asyncio.sleep(0.02)
        assert core.turns == turns

    on_uvloop(play)()


def test_never_on_virtual_time(core: Core) -> None:
    """With no time to spend it does not turn."""

    async def play() -> None:
        learned(longest_s=0.0).expect()
        await asyncio.sleep(0.01)

    on_uvloop(play)()
    assert core.turns == 0
