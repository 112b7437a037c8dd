"""Measures a three-node cluster on this machine against nbdkit's memory disk, in one run.

    python benchmarks/grid.py [--json FILE] [--seconds 5] [--only NAME ...]

Both are reached by fio's nbd engine over a unix socket. The figures of the cluster are for three
storage nodes with replication 2 and a volume four times the read cache; nbdkit keeps one copy in
memory and does nothing else, so it is the yardstick for the machine and the protocol. Jobs
alternate between the two, because machines drift. Actor calls and memory are measured at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from rig import Stolen, fio, nbdkit, ping_pong, plain_writes, resident

from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, SupervisorSpec, expose, get
from torus_actors.runtime.spinner import SPIN_S
from torus_actors.wire.hello import Identity, Role

VOLUME_BYTES = 1 << 30
READ_CACHE = "256MiB"
HOT_BYTES = 64 << 20
PORT = 41900


@dataclass(frozen=True)
class Job:
    """One line of the table.

    ``unit`` is MB/s or IOPS; ``floor`` is what it should at least be, ``floor_ratio`` the least
    share of nbdkit's figure; ``timed`` runs for the given seconds, the others by amount.
    """

    name: str
    title: str
    options: tuple[str, ...]
    unit: str
    timed: bool = True
    floor: float = 0.0
    floor_ratio: float = 0.0
    prepare: tuple[str, ...] = ()


READ_HOT = ("--rw=read", "--bs=1M", "--iodepth=4", f"--size={HOT_BYTES}")

JOBS = (
    Job(
        "write-1m",
        "1 MiB sequential write, depth 16, new",
        ("--rw=write", "--bs=1M", "--iodepth=16"),
        "MB/s",
        timed=False,
        floor=300,
    ),
    Job(
        "rewrite-1m",
        "1 MiB sequential write, depth 16, again",
        ("--rw=write", "--bs=1M", "--iodepth=16"),
        "MB/s",
        timed=False,
        floor=300,
    ),
    Job(
        "read-1m",
        "1 MiB sequential read, depth 16",
        ("--rw=read", "--bs=1M", "--iodepth=16"),
        "MB/s",
        timed=False,
        floor=700,
    ),
    Job(
        "read-1m-d1",
        "1 MiB sequential read, depth 1",
        ("--rw=read", "--bs=1M", "--iodepth=1"),
        "MB/s",
        timed=False,
    ),
    Job(
        "randread-4k-d1",
        "4 KiB random read, depth 1",
        ("--rw=randread", "--bs=4k", "--iodepth=1"),
        "IOPS",
    ),
    Job(
        "randread-4k-d16",
        "4 KiB random read, depth 16",
        ("--rw=randread", "--bs=4k", "--iodepth=16"),
        "IOPS",
        floor=12000,
    ),
    Job(
        "hot-4k-d1",
        "4 KiB random read, depth 1, in the cache",
        ("--rw=randread", "--bs=4k", "--iodepth=1", f"--size={HOT_BYTES}"),
        "IOPS",
        prepare=READ_HOT,
    ),
    Job(
        "hot-4k-d16",
        "4 KiB random read, depth 16, in the cache",
        ("--rw=randread", "--bs=4k", "--iodepth=16", f"--size={HOT_BYTES}"),
        "IOPS",
        floor_ratio=0.8,
        prepare=READ_HOT,
    ),
    Job(
        "randwrite-4k-d16",
        "4 KiB random write, depth 16, room in the cache",
        ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--io_size=24M"),
        "IOPS",
        timed=False,
        floor=10000,
    ),
    Job(
        "mix-64k-d64",
        "64 KiB mix 75/25, depth 64",
        ("--rw=randrw", "--rwmixread=75", "--bs=64k", "--iodepth=64"),
        "IOPS",
    ),
    Job(
        "fsync-4k-d1",
        "4 KiB random write, flush after each",
        ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"),
        "IOPS",
    ),
)


def figure(job: Job, result: dict[str, Any]) -> float:
    """The number of a job that goes into the table."""
    both = (result["read"], result["write"])
    if job.unit == "MB/s":
        return sum(float(side["bw_bytes"]) for side in both) / 1e6
    return sum(float(side["iops"]) for side in both)


def measure(job: Job, uri: str, seconds: float) -> float:
    """Prepare and run a job."""
    if job.prepare:
        fio(uri, job.prepare)
    options = job.options
    if not any(option.startswith("--size") for option in options):
        options += (f"--size={VOLUME_BYTES}",)
    return figure(job, fio(uri, options, seconds if job.timed else None))


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running three-node cluster; the URI of its volume, and the process that runs it."""
    path = folder / "torus.sock"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torus_actors.cli.node",
            "dev",
            "--dir",
            str(folder / "data"),
            "--nodes",
            "3",
            "--size",
            "4GiB",
            "--volume",
            f"bench:{VOLUME_BYTES}",
            "--unix",
            str(path),
            "--nbd",
            f"127.0.0.1:{PORT}",
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the cluster did not start")
            time.sleep(0.1)
        yield f"nbd+unix:///bench?socket={path}", process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


class Echo(LoopActor):
    """Answers what it is told."""

    @expose(remote=True)
    def echo(self, word: bytes) -> bytes:
        """The same."""
        return word


async def _serve_echo(port: int) -> None:
    system = ActorSystem(asyncio.get_running_loop(), node_id="server")
    identity = Identity(None, "server", Role.NODE, 1, "bench")
    bridge = BridgeConfig(identity, ("127.0.0.1", port), spin_s=SPIN_S, shortcut=True)
    children = (ChildSpec("echo", Echo), ChildSpec("bridge", lambda: Bridge(bridge)))
    await system.start(SupervisorSpec("root", children))
    await asyncio.sleep(600)


def _echo_process(port: int) -> None:
    uvloop.run(_serve_echo(port))


async def _call_rates(port: int, seconds: float, shortcut: bool) -> dict[str, float]:
    system = ActorSystem(asyncio.get_running_loop(), node_id="client")
    identity = Identity(None, "client", Role.CLIENT, 1, "bench")
    bridge = BridgeConfig(identity, spin_s=SPIN_S, shortcut=shortcut)
    children = (ChildSpec("echo", Echo), ChildSpec("bridge", lambda: Bridge(bridge)))
    await system.start(SupervisorSpec("root", children))
    await system.actor("bridge").set_peers.remote({"server": f"127.0.0.1:{port}"})
    word = bytes(24)

    async def rate(call: Any, depth: int) -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(20):
                if depth == 1:
                    await call(word)
                else:
                    await get([call(word) for _ in range(depth)])
            count += 20 * depth
        return count / (time.perf_counter() - start)

    near = system.actor("echo").echo.remote
    far = system.actor("echo", node="server").echo.remote
    deadline = time.monotonic() + 10
    while True:
        try:
            await far(word)
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
    over = "" if shortcut else " over TCP"
    rates = {
        "actor call in a node, one at a time": await rate(near, 1),
        f"actor call between processes{over}, one at a time": await rate(far, 1),
        f"actor call between processes{over}, 16 in flight": await rate(far, 16),
    }
    await system.stop()
    return rates


def call_rates(seconds: float) -> dict[str, float]:
    """Rates of actor calls, in this process and to another one."""
    server = multiprocessing.Process(target=_echo_process, args=(PORT + 50,), daemon=True)
    server.start()
    try:
        over_tcp = uvloop.run(_call_rates(PORT + 50, seconds, False))
        return over_tcp | uvloop.run(_call_rates(PORT + 50, seconds, True))
    finally:
        server.terminate()


CALL_FLOORS = {
    "actor call in a node, one at a time": 100000.0,
    "actor call between processes, one at a time": 15000.0,
    "actor call between processes, 16 in flight": 40000.0,
    "actor call between processes over TCP, one at a time": 15000.0,
    "actor call between processes over TCP, 16 in flight": 40000.0,
}


def yardstick(title: str, unit: str, value: float) -> dict[str, Any]:
    """A row that says what the machine does without this system."""
    return {
        "name": title,
        "title": title,
        "unit": unit,
        "torus": value,
        "nbdkit": 0.0,
        "floor": 0.0,
        "floor_ratio": 0.0,
        "met": None,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title="torus-actors: 3 nodes, 2 copies, one machine; beside nbdkit memory")
    for column in ("job", "torus", "nbdkit", "ratio", "floor", ""):
        table.add_column(column, justify="left" if column in ("job", "") else "right")
    for row in rows:
        floor = row["floor"]
        text = (
            f"{floor:,.0f}"
            if floor
            else f"{row['floor_ratio']:.1f} x"
            if row["floor_ratio"]
            else ""
        )
        table.add_row(
            row["title"],
            f"{row['torus']:,.0f} {row['unit']}",
            f"{row['nbdkit']:,.0f}" if row["nbdkit"] else "",
            f"{row['torus'] / row['nbdkit']:.2f}" if row["nbdkit"] else "",
            text,
            "" if row["met"] is None else "met" if row["met"] else "MISSED",
        )
    console.print(table)


def main() -> int:
    """Run all; the status is 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a timed job")
    parser.add_argument("--only", nargs="*", default=[], help="names of jobs to run")
    arguments = parser.parse_args()
    console = Console()
    stolen = Stolen()
    rows: list[dict[str, Any]] = []
    jobs = [job for job in JOBS if not arguments.only or job.name in arguments.only]
    with tempfile.TemporaryDirectory(prefix="torus-bench-") as name:
        folder = Path(name)
        with nbdkit(folder, VOLUME_BYTES) as kit, cluster(folder) as (torus, process):
            idle = resident(process.pid)
            written = plain_writes(folder, VOLUME_BYTES)
            rows.append(yardstick("two plain files written anew, page cache", "MB/s", written))
            rows.append(yardstick("TCP round trip of two processes", "/s", ping_pong(1.0)))
            for job in jobs:
                with console.status(job.title):
                    other = measure(job, kit, arguments.seconds) if kit else 0.0
                    ours = measure(job, torus, arguments.seconds)
                met: bool | None = None
                if job.floor:
                    met = ours >= job.floor
                elif job.floor_ratio and other:
                    met = ours >= job.floor_ratio * other
                rows.append(
                    {
                        "name": job.name,
                        "title": job.title,
                        "unit": job.unit,
                        "torus": ours,
                        "nbdkit": other,
                        "floor": job.floor,
                        "floor_ratio": job.floor_ratio,
                        "met": met,
                    }
                )
            used = resident(process.pid)
    if not arguments.only:
        for title, rate in call_rates(2.0).items():
            floor = CALL_FLOORS[title]
            rows.append(
                {
                    "name": title,
                    "title": title,
                    "unit": "/s",
                    "torus": rate,
                    "nbdkit": 0.0,
                    "floor": floor,
                    "floor_ratio": 0.0,
                    "met": rate >= floor,
                }
            )
    rows.append(yardstick(Stolen.TITLE, "%", stolen.percent))
    show(rows, console)
    for title, when in (("at the start", idle), ("at the end", used)):
        sizes = ", ".join(
            f"{what.rsplit(' ', 1)[0]} {size:.0f}" for what, size in sorted(when.items())
        )
        console.print(f"resident MiB {title}: {sizes}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "jobs": rows,
                    "resident_mib_start": idle,
                    "resident_mib_end": used,
                    "cores": os.cpu_count(),
                },
                indent=2,
            )
        )
    return 1 if any(row["met"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
