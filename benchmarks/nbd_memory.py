"""The NBD server over memory, against ``nbdkit memory`` in the same run.

Measures the protocol and the event loop alone: no ring, no disk. Needs fio with its nbd engine, and
nbdkit. Every pass starts both servers afresh, writes all of the export once, and runs each job on
both in turn, so that a slow moment of the machine touches both. Run as

    python benchmarks/nbd_memory.py [--seconds 5] [--rounds 3] [--loop uvloop|asyncio]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Job:
    """One fio job."""

    name: str
    pattern: str
    block: str
    depth: int


JOBS = (
    Job("4k randread depth 1", "randread", "4k", 1),
    Job("4k randread depth 16", "randread", "4k", 16),
    Job("4k randwrite depth 16", "randwrite", "4k", 16),
    Job("1M read depth 4", "read", "1M", 4),
    Job("1M write depth 4", "write", "1M", 4),
)


def run_server(path: str, size: int, loop_kind: str) -> None:
    """Serve memory until killed."""
    from torus_actors.nbd.memory import MemoryExports
    from torus_actors.nbd.server import serve

    async def main() -> None:
        await serve(MemoryExports.single(size), path=path)
        await asyncio.Event().wait()

    factory = None
    if loop_kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


@contextlib.contextmanager
def server(command: list[str], path: Path) -> Iterator[None]:
    """A server process, from when its socket is there."""
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def fio(path: Path, job: Job, size: int, seconds: int) -> float:
    """Run a job; operations each second. ``seconds`` 0: once over the whole export."""
    command = [
        "fio",
        "--name=job",
        "--ioengine=nbd",
        f"--uri=nbd+unix:///?socket={path}",
        f"--rw={job.pattern}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--size={size}",
        "--output-format=json",
        "--randrepeat=1",
        "--norandommap",
    ]
    if seconds:
        command += ["--time_based", f"--runtime={seconds}"]
    # fio's nbd engine chats on stdout before the JSON begins.
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out[out.index("{") :])["jobs"][0]
    side = "read" if "read" in job.pattern else "write"
    return float(result[side]["iops"])


def main() -> None:
    """Parse arguments and print one line for each job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1 << 30)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--serve", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        run_server(args.serve, args.size, args.loop)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "nbdkit")
        own = [sys.executable, __file__, "--serve", str(ours), "--size", str(args.size)]
        own += ["--loop", args.loop]
        other = ["nbdkit", "-f", "-U", str(theirs), "memory", str(args.size)]
        with server(own, ours), server(other, theirs):
            fill = Job("fill", "write", "1M", 4)
            for path in (ours, theirs):
                fio(path, fill, args.size, 0)
            print(f"{'job':24}{'ours':>12}{'nbdkit':>12}{'ratio':>8}   (operations/s)")
            for job in JOBS:
                figures: dict[Path, list[float]] = {ours: [], theirs: []}
                for _ in range(args.rounds):
                    for path, values in figures.items():
                        values.append(fio(path, job, args.size, args.seconds))
                mine = statistics.median(figures[ours])
                kit = statistics.median(figures[theirs])
                print(f"{job.name:24}{mine:12,.0f}{kit:12,.0f}{mine / kit:8.2f}", flush=True)


if __name__ == "__main__":
    main()
