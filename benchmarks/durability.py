"""Measures what durability costs: flushes, group commit, recovery, healing, and large volumes.

    python benchmarks/durability.py [--json FILE] [--rounds 5] [--only NAME ...]

Everything runs on real processes: three storage nodes with replication 2, a client that serves a
volume over a unix socket, fio's nbd engine. Each part starts a cluster of its own. What is compared
alternates in short rounds, because machines drift; beside each figure stands what the machine does
without this system. The status is 1 if an aim was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rig import Cluster, fio, ping_pong, synced_writes, uri_of

ROUND_S = 3.0

WRITERS = 16

FLUSH_RATIO_MAX = 2.0
GROUP_RATIO_MIN = 5.0


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the part that measured it.
        title: what it is.
        value, unit: the figure.
        aim: what it should be, in words; empty for what is only told.
        met: whether it is.
    """

    name: str
    title: str
    value: float
    unit: str
    aim: str = ""
    met: bool | None = None


def median_us(result: dict[str, Any]) -> tuple[float, float]:
    """Median latency of fio's writes and of its flushes, microseconds."""
    write = result["write"]["clat_ns"]["percentile"]["50.000000"]
    flush = result["sync"]["lat_ns"]["percentile"]["50.000000"]
    return write / 1e3, flush / 1e3


def flushed(uri: str, size: int, writers: int) -> dict[str, Any]:
    """4 KiB random writes, each flushed; by one connection or by many at once."""
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", f"--size={size}"]
    if writers > 1:
        options += [f"--numjobs={writers}", "--group_reporting", "--thread"]
    return fio(uri, tuple(options), ROUND_S)


def flush(folder: Path, rounds: int) -> list[Row]:
    """A flush after each write, alone and with others."""
    size = 1 << 30
    alone: list[tuple[float, float]] = []
    rates: list[tuple[float, float]] = []
    disk: list[float] = []
    ratios: list[float] = []
    with Cluster(folder, 4 << 30).start(3) as cluster:
        cluster.ctl("volume", "create", "bench", str(size))
        client, path = cluster.serve("bench")
        client.start("serving ")
        uri = uri_of(path, "bench")
        flushed(uri, size, 1)
        for _ in range(rounds):
            floor = statistics.median(synced_writes(folder, ROUND_S)) * 1e6
            one = flushed(uri, size, 1)
            many = flushed(uri, size, WRITERS)
            disk.append(floor)
            alone.append(median_us(one))
            ratios.append(sum(alone[-1]) / floor)
            rates.append((one["write"]["iops"], many["write"]["iops"]))
    ratio = statistics.median(ratios)
    shared = statistics.median(many / one for one, many in rates)
    name = "flush"
    write, sync = (statistics.median(each) for each in zip(*alone, strict=True))
    return [
        Row(name, "4 KiB pwrite + fdatasync, two files at once", statistics.median(disk), "us"),
        Row(name, "4 KiB random write", write, "us"),
        Row(name, "flush after it", sync, "us"),
        Row(
            name,
            "write + flush, as a multiple of pwrite + fdatasync",
            ratio,
            "x",
            f"<= {FLUSH_RATIO_MAX:g}",
            ratio <= FLUSH_RATIO_MAX,
        ),
        Row(name, "one such writer", statistics.median(one for one, _ in rates), "/s"),
        Row(name, f"{WRITERS} such writers", statistics.median(many for _, many in rates), "/s"),
        Row(
            name,
            f"{WRITERS} writers, as a multiple of one",
            shared,
            "x",
            f">= {GROUP_RATIO_MIN:g}",
            shared >= GROUP_RATIO_MIN,
        ),
    ]


PARTS: dict[str, Callable[[Path, int], list[Row]]] = {"flush": flush}


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="durability: 3 nodes, 2 copies, one machine")
    for column in ("part", "what", "figure", "aim", ""):
        table.add_column(column, justify="right" if column == "figure" else "left")
    for row in rows:
        digits = 0 if abs(row.value) >= 100 else 2
        table.add_row(
            row.name,
            row.title,
            f"{row.value:,.{digits}f} {row.unit}",
            row.aim,
            "" if row.met is None else "met" if row.met else "MISSED",
        )
    console.print(table)


def main() -> int:
    """Run all; the status is 1 if an aim was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[], help="parts to run")
    arguments = parser.parse_args()
    console = Console()
    rows = [Row("machine", "TCP round trip of two processes", 1e6 / ping_pong(1.0), "us")]
    for name, part in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        with (
            console.status(name),
            tempfile.TemporaryDirectory(prefix="torus-bench-") as folder,
        ):
            rows += part(Path(folder), arguments.rounds)
    show(rows, console)
    if arguments.json:
        told = {"rows": [asdict(row) for row in rows], "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps(told, indent=2))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
