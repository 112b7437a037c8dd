"""Progress bars on terminals."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol


class Advance(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """So much is done so far; of so much, if that is another number than before."""


def shows_bars() -> bool:
    """Whether somebody sees them."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, unit: str = "bytes") -> Iterator[Advance]:
    """A bar on stderr; nothing where that is no terminal.

    Args:
        title: before the bar.
        total: how much there is to do; None if that is not known.
        unit: ``bytes``, or what is counted.
    """
    if not shows_bars():
        yield lambda done, total=None: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from torus_actors.cli.output import console

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if unit == "bytes":
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
    else:
        columns += [MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()]
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)

        def advance(done: int, total: int | None = None) -> None:
            # Without a total, rich keeps the one it has.
            bar.update(task, completed=done, total=total)

        yield advance
