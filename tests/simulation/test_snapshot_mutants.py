"""Bugs of snapshots and of the evictor, put in on purpose: their scenarios find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torus_actors.actors.collector import Collector
from torus_actors.actors.evictor import Evictor
from torus_actors.metadata.records import Head
from torus_actors.scenarios.run import run
from torus_actors.scenarios.spec import SCENARIOS
from torus_actors.volume.keeper import Keeper


def _old_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a volume in use is of its last head, without a commit."""

    async def nothing(self: Keeper) -> None:
        return

    monkeypatch.setattr(Keeper, "_commit_one_moment", nothing)


def _no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a volume that was not closed in order leaves out its journal."""
    monkeypatch.setattr("torus_actors.volume.snapshots.is_unreplayed", lambda *_: False)


def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector does not know of snapshots."""
    read = Collector._read_metadata

    async def without(self: Collector) -> tuple[dict[int, int], set[int], list[Head]]:
        oldest_open, tombs, heads = await read(self)
        return oldest_open, tombs, heads[: len((await self._meta.state()).heads)]

    monkeypatch.setattr(Collector, "_read_metadata", without)


def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member leaves the ring at the first look that does not find it registered."""

    def at_once(self: Evictor, ring: Any, registered: set[str], now: float) -> str | None:
        return next((peer for peer in ring.members if peer not in registered), None)

    monkeypatch.setattr(Evictor, "_due", at_once)


@pytest.mark.parametrize(
    ("break_it", "name", "seed"),
    [
        (_old_head, "snapshots", 1),
        (_no_replay, "snapshots", 1),
        (_forgotten, "snapshots", 1),
        (_hasty, "node_abandoned", 2),
    ],
)
def test_a_known_bug_is_found(
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    name: str,
    seed: int,
) -> None:
    """A bug put in on purpose makes its scenario fail: the simulator would have found it."""
    break_it(monkeypatch)
    assert run(SCENARIOS[name], seed).failures, break_it.__doc__
