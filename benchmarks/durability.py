"""Measures what durability costs: flushes, group commit, recovery, healing, and large volumes.

    python benchmarks/durability.py [--json FILE] [--rounds 5] [--only NAME ...]

Everything runs on real processes: three storage nodes with replication 2, a client that serves a
volume over a unix socket, fio's nbd engine. Each part starts a cluster of its own. What is compared
alternates in short rounds, because machines drift; beside each figure stands what the machine does
without this system. The status is 1 if an aim was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rig import (
    Asker,
    Cluster,
    Stolen,
    bare_flushes,
    fio,
    ping_pong,
    plain_flushes,
    read_once,
    resident_bytes,
    synced_writes,
    until,
    uri_of,
)

from torus_actors.client import ClientConfig, start_client
from torus_actors.process import NbdConfig
from torus_actors.scenarios.nbd_client import NbdClient
from torus_actors.volume.session import CacheSizes

ROUND_S = 3.0

WRITERS = 16

FLUSHED_BYTES = (64 << 20, 1 << 30)

BURST_BYTES = 32 << 20

FLUSH_RATIO_MAX = 2.0
GROUP_RATIO_MIN = 5.0
RECOVERY_S_MAX = 5.0
HEAL_MBS_MIN = 150.0
P99_MAX = 2.0
THIN_RATIO_MAX = 1.5

CLIENT_BYTES = 200 << 20
"""What a client may need beside its caches."""

STEP = 32 << 20
"""Bytes written before it is looked how large the journal is."""

THIN_WRITES = 500
THIN_FAR = 8

MIB = 1 << 20

LARGE_JOURNAL = """
from torus_actors.cli import blk
from torus_actors.volume import journal
journal.SessionJournal.is_large = False
blk.main()
"""
"""A client that lets its journal grow, for which the product has no option."""


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
    """A flush after each write, alone and with others.

    On a volume that fits the client's write cache, and on one that does not: there, whole blocks
    are written back for a few changed pages each, all the time, beside the flushes.
    """
    rows: list[Row] = []
    with Cluster(folder, 8 << 30).start(3) as cluster:
        for size in FLUSHED_BYTES:
            rows += _flush(cluster, size, rounds)
    return rows


def _flush(cluster: Cluster, size: int, rounds: int) -> list[Row]:
    alone: list[tuple[float, float]] = []
    rates: list[tuple[float, float]] = []
    disk: list[float] = []
    bare: list[float] = []
    ratios: list[float] = []
    volume = f"v{size >> 20}"
    cluster.ctl("volume", "create", volume, str(size))
    client, path = cluster.serve(volume)
    client.start("serving ")
    uri = uri_of(path, volume)
    flushed(uri, size, 1)
    for _ in range(rounds):
        floor = statistics.median(synced_writes(cluster.folder, ROUND_S)) * 1e6
        least = statistics.median(bare_flushes(cluster.folder, ROUND_S)) * 1e6
        one = flushed(uri, size, 1)
        many = flushed(uri, size, WRITERS)
        disk.append(floor)
        bare.append(least / floor)
        alone.append(median_us(one))
        ratios.append(sum(alone[-1]) / floor)
        rates.append((one["write"]["iops"], many["write"]["iops"]))
    client.stop()
    ratio = statistics.median(ratios)
    shared = statistics.median(many / one for one, many in rates)
    name = f"flush, {size >> 20} MiB"
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
        Row(
            name,
            "the same by bare Python processes: no event loop, no protocol",
            statistics.median(bare),
            "x",
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


async def _burst(path: Path, size: int) -> float:
    """Seconds that a flush takes which finds ``BURST_BYTES`` of scattered changes."""
    device = await NbdClient.connect(path, "bench")
    page = os.urandom(4096)
    for _ in range(2):
        await device.write(0, page)
        await device.flush()  # the first one commits, and begins a journal
    for _ in range(BURST_BYTES // (16 * len(page))):
        places = [random.randrange(size // len(page)) * len(page) for _ in range(16)]
        await asyncio.gather(*[device.write(place, page) for place in places])
    began = time.perf_counter()
    await device.flush()
    took = time.perf_counter() - began
    await device.close()
    return took


def burst(folder: Path, rounds: int) -> list[Row]:
    """Many small writes all over a written volume, and one flush after them."""
    size = 1 << 30
    disk: list[float] = []
    flushes: list[float] = []
    with Cluster(folder, 8 << 30).start(3) as cluster:
        cluster.ctl("volume", "create", "bench", str(size))
        client, path = cluster.serve("bench")
        client.start("serving ")
        uri = uri_of(path, "bench")
        whole = ("--rw=write", "--bs=1M", "--iodepth=16", f"--size={size}", "--end_fsync=1")
        fio(uri, whole)
        for _ in range(rounds):
            disk.append(plain_flushes(cluster.folder, BURST_BYTES))
            flushes.append(asyncio.run(_burst(path, size)))
        client.stop()
    name = f"burst, {BURST_BYTES >> 20} MiB"
    return [
        Row(
            name,
            "two files at once, written in one piece + fdatasync",
            statistics.median(disk),
            "s",
        ),
        Row(name, "flush after 4 KiB random writes", statistics.median(flushes), "s"),
        Row(name, "the slowest of them", max(flushes), "s"),
    ]


def recovery(folder: Path, rounds: int) -> list[Row]:
    """A client is killed with a large journal, and the next one attaches."""
    size, grown = 1 << 30, 256 << 20
    name = "recovery"
    times: list[float] = []
    with Asker() as asker, Cluster(folder, 8 << 30, etcd=True).start(3) as cluster:
        assert cluster.etcd is not None
        cluster.ctl("volume", "create", "bench", str(size))
        for _ in range(max(1, rounds // 2)):
            client, path = cluster.serve("bench")
            client.command[1:3] = ["-c", LARGE_JOURNAL]
            client.start("serving ")
            uri = uri_of(path, "bench")
            # Without metadata a small journal is not folded, and this client's counts as small.
            cluster.etcd.kill()
            options = ("--rw=randwrite", "--bs=4k", "--fsync=1", f"--size={size}", "--thread")
            share = (f"--numjobs={WRITERS}", f"--io_size={STEP // WRITERS}", "--group_reporting")
            # How much a write takes in it depends on how many share a record.
            held = written = 0
            began = time.monotonic()
            while held < grown:
                fio(uri, options + share)
                written += STEP
                stats = [asker.ask(cluster.address(n), "journal", "stats") for n in range(3)]
                held = min(each["live_bytes"] for each in stats if each["live_bytes"])
            grow_s = time.monotonic() - began
            memory = client.resident_bytes
            client.kill()
            cluster.etcd.start("ready to serve client requests")
            until(lambda: not cluster.ctl_json("volume", "list")[0]["holder"], "the lock ends")
            client, path = cluster.serve("bench")
            began = time.monotonic()
            client.start("serving ")
            read_once(path, "bench", 0, 4096)
            times.append(time.monotonic() - began)
            after = client.resident_bytes
            client.stop()
    took = statistics.median(times)
    caches = CacheSizes()
    bound = caches.read_bytes + caches.write_bytes + CLIENT_BYTES
    return [
        Row(name, "flushed 4 KiB writes, metadata away", written / MIB, "MiB"),
        Row(name, "the time they took", grow_s, "s"),
        Row(
            name,
            "the journal then, on each member",
            held / MIB,
            "MiB",
            f">= {grown / MIB:g}",
            held >= grown,
        ),
        Row(
            name,
            "the client's memory after them",
            memory / MIB,
            "MiB",
            f"<= {bound / MIB:g}: its caches + {CLIENT_BYTES / MIB:g}",
            memory <= bound,
        ),
        Row(
            name,
            "from its successor's start to the first read",
            took,
            "s",
            f"<= {RECOVERY_S_MAX:g}",
            took <= RECOVERY_S_MAX,
        ),
        Row(name, "the successor's memory then", after / MIB, "MiB"),
    ]


def heal(folder: Path, rounds: int) -> list[Row]:
    """A node is lost for good while a client reads and writes."""
    size = 2 << 30
    name = "heal"
    rates: list[float] = []
    before: list[float] = []
    during: list[float] = []
    with Asker() as asker, Cluster(folder, 6 << 30).start(4) as cluster:
        cluster.ctl("volume", "create", "bench", str(size))
        client, path = cluster.serve("bench")
        client.start("serving ")
        uri = uri_of(path, "bench")
        fio(uri, ("--rw=write", "--bs=1M", "--iodepth=8", f"--size={size}", "--end_fsync=1"))
        alive = [cluster.address(index) for index in range(3)]
        lost = asker.ask(cluster.address(3), "control", "status")["node"]

        def sent() -> int:
            states = [asker.ask(address, "rebalancer", "status") for address in alive]
            return sum(state["sent_bytes"] for state in states)

        with Load(uri, size, folder) as load:
            time.sleep(2 * ROUND_S)
            quiet = (time.time() - 1.5 * ROUND_S, time.time())
            cluster.nodes[3].kill()
            cluster.ctl("peer", "remove", lost)
            start = sent()
            until(lambda: sent() > start, "blocks move")
            began, last, moved = time.time(), time.time(), sent()
            while time.time() - last < 1.0:
                time.sleep(0.05)
                now = sent()
                if now > moved:
                    last, moved = time.time(), now
            time.sleep(0.2)
        rates.append((moved - start) / (last - began) / 1e6)
        before.append(load.p99_us(*quiet))
        during.append(load.p99_us(began, last))
        left = asker.ask(alive[0], "rebalancer", "status")["failed"]
    rate = statistics.median(rates)
    ratio = statistics.median(after / base for base, after in zip(before, during, strict=True))
    return [
        Row(name, "copied among three nodes", (moved - start) / MIB, "MiB"),
        Row(name, "blocks that failed to move at first", left, ""),
        Row(name, "rate", rate, "MB/s", f">= {HEAL_MBS_MIN:g}", rate >= HEAL_MBS_MIN),
        Row(name, "client's p99 before", statistics.median(before), "us"),
        Row(name, "client's p99 meanwhile", statistics.median(during), "us"),
        Row(name, "its p99, as a multiple", ratio, "x", f"<= {P99_MAX:g}", ratio <= P99_MAX),
    ]


class Load:
    """A modest client: random 4 KiB reads and writes at a fixed rate, with every latency noted."""

    def __init__(self, uri: str, size: int, folder: Path) -> None:
        self._log = folder / "load"
        options = [
            "--rw=randrw", "--bs=4k", "--iodepth=4", "--rate_iops=200,200", f"--size={size}",
            "--time_based", "--runtime=120", f"--write_lat_log={self._log}", "--log_avg_msec=0",
            "--log_unix_epoch=1",
        ]  # fmt: skip
        self._command = ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", *options]

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def p99_us(self, start: float, end: float) -> float:
        """Of the requests that ended between two times of the clock."""
        found = []
        for line in Path(f"{self._log}_clat.1.log").read_text().splitlines():
            at, latency, *_ = line.split(",")
            if start <= int(at) / 1e3 <= end:
                found.append(int(latency) / 1e3)
        return statistics.quantiles(found, n=100)[98]


def thin(folder: Path, rounds: int) -> list[Row]:
    """The same changes to a small volume and to a large one that is as empty."""
    sizes = {"1 GiB": 1 << 30, "1 TiB": 1 << 40}
    told: dict[str, list[dict[str, float]]] = {title: [] for title in sizes}
    rng = random.Random(1)
    near = [rng.randrange((1 << 30) // 4096) * 4096 for _ in range(THIN_WRITES)]
    with Cluster(folder, 4 << 30).start(3) as cluster:
        for title, size in sizes.items():
            cluster.ctl("volume", "create", title.replace(" ", ""), str(size))
        spawn = multiprocessing.get_context("spawn")
        for _ in range(rounds):
            for title, size in sizes.items():
                # A few at the same places relative to the size: in the large one far apart.
                far = [size // THIN_FAR * n for n in range(THIN_FAR)]
                ours, theirs = spawn.Pipe()
                child = spawn.Process(
                    target=_use_once,
                    args=(cluster.metadata, title.replace(" ", ""), near + far, theirs),
                )
                child.start()
                told[title].append(ours.recv())
                child.join()
    rows = []
    for what, unit in (("attach", "ms"), ("flush", "us"), ("commit", "ms"), ("memory", "MiB")):
        small, large = (statistics.median(each[what] for each in told[title]) for title in sizes)
        rows += [
            Row("thin", f"{what} on a 1 GiB volume", small, unit),
            Row("thin", f"{what} on a 1 TiB volume", large, unit),
            Row(
                "thin",
                f"{what}, as a multiple",
                large / small,
                "x",
                f"<= {THIN_RATIO_MAX:g}",
                large <= THIN_RATIO_MAX * small,
            ),
        ]
    return rows


def _use_once(metadata: str, volume: str, offsets: list[int], out: Any) -> None:
    asyncio.run(_use(metadata, volume, offsets, out))


async def _use(metadata: str, volume: str, offsets: list[int], out: Any) -> None:
    client = await start_client(ClientConfig(metadata=metadata, nbd=NbdConfig((), only=volume)))
    system, clock = client.system, time.perf_counter
    began = clock()
    await system.actor("volumes").open.remote(volume)
    attached = clock() - began
    handle = system.actor(f"volume:{volume}")
    flushes = []
    for number, offset in enumerate(offsets):
        await handle.write.remote(offset, number.to_bytes(4, "little") * 1024)
        began = clock()
        await handle.flush.remote()
        flushes.append(clock() - began)
    began = clock()
    await handle.commit.remote()
    committed = clock() - began
    resident = resident_bytes(os.getpid())
    await system.actor("volumes").release.remote(volume)
    await client.stop()
    out.send(
        {
            "attach": attached * 1e3,
            "flush": statistics.median(flushes) * 1e6,
            "commit": committed * 1e3,
            "memory": resident / MIB,
        }
    )


PARTS: dict[str, Callable[[Path, int], list[Row]]] = {
    "flush": flush,
    "burst": burst,
    "recovery": recovery,
    "heal": heal,
    "thin": thin,
}


def show(rows: list[Row], console: Console) -> None:
    """Print what a part has measured."""
    table = Table(title=rows[0].name)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave nothing behind
    console = Console()
    rows = [Row("machine", "TCP round trip of two processes", 1e6 / ping_pong(1.0), "us")]
    show(rows, console)
    for name, part in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        with (
            console.status(name),
            tempfile.TemporaryDirectory(prefix="torus-bench-") as folder,
        ):
            stolen = Stolen()
            measured = part(Path(folder), arguments.rounds)
            measured.append(Row(name, Stolen.TITLE, stolen.percent, "%"))
        show(measured, console)
        rows += measured
    if arguments.json:
        told = {"rows": [asdict(row) for row in rows], "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps(told, indent=2))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
