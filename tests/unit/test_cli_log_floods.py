"""A log is not filled by one message, and says how much of it was left out."""

from __future__ import annotations

import logging

import pytest

from torus_actors.cli import log_floods
from torus_actors.cli.log_floods import BURST, MESSAGES_MAX, WINDOW_S, FloodGate


def said(gate: FloodGate, message: str, at: float, *args: object) -> str | None:
    """What is logged of a message; None if nothing."""
    record = logging.LogRecord("torus_actors", logging.WARNING, __file__, 1, message, args, None)
    record.created = at
    return record.getMessage() if gate.filter(record) else None


def test_a_flood_is_cut_off_and_counted() -> None:
    """Other messages pass meanwhile; after a while it is said again, with how often it was not."""
    gate = FloodGate()
    logged = [said(gate, "client %d refused", 100.0 + n / 1000, n) for n in range(BURST + 70)]
    assert logged == [f"client {n} refused" for n in range(BURST)] + [None] * 70
    assert said(gate, "the disk is full", 101.0) == "the disk is full"
    later = 100.0 + WINDOW_S
    assert said(gate, "client %d refused", later, 7) == "client 7 refused (and 70 like this since)"
    assert said(gate, "client %d refused", later, 8) == "client 8 refused"


def test_a_clock_that_is_set_back_silences_nothing() -> None:
    """The window began in what is the future now."""
    gate = FloodGate()
    for _ in range(2 * BURST):
        said(gate, "full", 1000.0)
    assert said(gate, "full", 10.0) == f"full (and {BURST} like this since)"


def test_messages_made_as_it_runs_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are."""
    monkeypatch.setattr(log_floods, "MESSAGES_MAX", 10)
    gate = FloodGate()
    assert all(said(gate, f"message {n}", 1.0) for n in range(100))
    assert len(gate._said) <= 10 < MESSAGES_MAX
