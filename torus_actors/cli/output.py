"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from torus_actors.cli.common import Failed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 80
"""Of tables where the terminal does not say: in a pipe, a file, a log."""


def open_stdout() -> TextIO:
    """Standard output, for those whose whole work is to write there.

    Raises:
        Failed: it is closed, as by ``>&-``.
    """
    if sys.stdout is None:
        raise Failed("standard output is closed: nothing can be written to it")
    return sys.stdout


def console(stderr: bool = False) -> Console:
    """A rich console: colour on terminals only.

    Raises:
        Failed: the stream is closed.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else open_stdout()
    width = None if stream.isatty() else WIDTH
    return Console(stderr=stderr, highlight=False, soft_wrap=False, width=width)


def print_json(data: Any) -> None:
    """One JSON document.

    Raises:
        Failed: standard output is closed.
    """
    open_stdout()
    click.echo(json.dumps(data, indent=2, sort_keys=False))


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> Table:
    """A plain table without borders.

    Args:
        columns: headings.
        rows: cells. Those of the last column are cut where they are too long, others folded.
        right: columns aligned to the right.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        last = name == columns[-1]
        table.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="ellipsis" if last else "fold",
            no_wrap=last,
        )
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    """Print what ``make_table`` makes, without blanks at the ends of lines."""
    out = console()
    with out.capture() as captured:
        out.print(make_table(columns, rows, right))
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
