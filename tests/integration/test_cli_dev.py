"""``torus-node dev``: a whole cluster by one command."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from pathlib import Path

from tests.integration.cluster import (
    Process,
    command,
    environment,
    free_ports,
    need,
    until,
)
from torus_actors.scenarios.nbd_client import NbdClient

MIB = 1 << 20


class Dev(Process):
    """A dev cluster of three small nodes in a directory."""

    def __init__(self, directory: Path) -> None:
        self.port = free_ports(5)
        self.metadata = f"torus://127.0.0.1:{self.port}"
        socket = directory / "nbd.sock"
        arguments = command(
            "torus-node", "dev", "--dir", str(directory / "dev"), "--size", "128MiB",
            "--volume", "demo:32MiB", "--nbd", f"127.0.0.1:{self.port + 4}",
            "--unix", str(socket), "--port", str(self.port),
        )  # fmt: skip
        super().__init__("dev", arguments, directory, "Ctrl-C stops it")
        self.socket = socket
        self.uri = f"nbd://127.0.0.1:{self.port + 4}/demo"

    def ctl(self, *arguments: str) -> str:
        """Run ``torusctl`` on it."""
        return subprocess.run(
            command("torusctl", *arguments, "-C", self.metadata),
            capture_output=True,
            env=environment(self.directory),
            check=True,
            text=True,
            timeout=30,
        ).stdout


def processes_of(directory: Path) -> dict[int, str]:
    """Command lines of our processes that work in a directory, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(directory) in line and "torus_actors.cli" in line:
                found[int(entry.name)] = line
    return found


def test_data_outlives_a_stop_in_order(tmp_path: Path) -> None:
    """Written by one client, read by another after the cluster was stopped and started again.

    On the way: the banner is short, a process that is killed is started again, a port that is
    taken is told in one line, and at the end nothing is left running.
    """
    need("nbdcopy", "qemu-io")
    dev = Dev(tmp_path)
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(32 * MIB))
    dev.start()
    try:
        assert dev.uri in dev.output and str(tmp_path / "dev") in dev.output
        assert dev.output.count("\n") < 15
        subprocess.run(["nbdcopy", str(source), dev.uri], check=True, timeout=30)
        until(lambda: "healthy" in dev.ctl("status"), "the nodes have looked at their blocks", 10)

        again = subprocess.run(
            command("torus-node", "dev", "--dir", str(tmp_path / "o"), "--port", str(dev.port)),
            capture_output=True, env=environment(tmp_path), text=True, timeout=30,
        )  # fmt: skip
        assert again.returncode == 1 and again.stderr.count("\n") == 1
        assert f"127.0.0.1:{dev.port}" in again.stderr

        victims = [pid for pid, line in processes_of(tmp_path).items() if "node-2" in line]
        assert len(victims) == 1
        os.kill(victims[0], signal.SIGKILL)
        until(lambda: "node-2 ended (killed by SIGKILL)" in dev.output, "the death is noticed")
        # Written while it comes back, and only flushed by the orderly end.
        qemu = ["qemu-io", "-f", "raw", "-c", "write -P 5 3M 1M"]
        uri = f"nbd+unix:///demo?socket={dev.socket}"
        subprocess.run([*qemu, uri], check=True, timeout=30, capture_output=True)
        assert dev.stop(signal.SIGINT) == 0, dev.output
        assert processes_of(tmp_path) == {}

        dev.start()
        copy = tmp_path / "copy"
        subprocess.run(["nbdcopy", dev.uri, str(copy)], check=True, timeout=30)
        expected = bytearray(source.read_bytes())
        expected[3 * MIB : 4 * MIB] = b"\5" * MIB
        assert copy.read_bytes() == bytes(expected)

        dev.kill()
        until(lambda: processes_of(tmp_path) == {}, "orphans end by themselves")
    finally:
        dev.kill()


def test_a_signal_to_all_of_it_stops_it_in_order(tmp_path: Path) -> None:
    """As by ``systemctl stop``, which sends SIGTERM to each process of a service at once.

    Found by review: the nodes ended, and were started again, while the client had still to write
    what it held; to be stopped in order was then the second time that it was asked.
    """
    need("nbdcopy")
    dev = Dev(tmp_path)
    chunks = [random.Random(number).randbytes(4096) for number in range(3000)]

    async def write_and_stop() -> None:
        client = await NbdClient.connect(dev.socket, "demo")
        for number, chunk in enumerate(chunks):
            await client.write(number * 10240, chunk)
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGTERM)
        await client.abandon()

    dev.start()
    try:
        asyncio.run(write_and_stop())
        assert dev.wait() == 0, dev.output
        assert "ended (" not in dev.output and "does not stop" not in dev.output, dev.output
        assert processes_of(tmp_path) == {}
        dev.start()
        copy = tmp_path / "copy"
        subprocess.run(["nbdcopy", dev.uri, str(copy)], check=True, timeout=30)
        data = copy.read_bytes()
        for number, chunk in enumerate(chunks):
            assert data[number * 10240 : number * 10240 + 4096] == chunk
    finally:
        dev.kill()


def test_a_dev_cluster_that_cannot_start_says_why(tmp_path: Path) -> None:
    """One line that names the process and its reason; the others are stopped again."""
    dev = Dev(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "node-1").write_text("in the way")
    dev.launch()
    assert dev.wait() == 1
    assert "node-1 did not start" in dev.output
    assert "Traceback" not in dev.output
    assert processes_of(tmp_path) == {}


def test_exit_after_ready_ends_well(tmp_path: Path) -> None:
    """For scripts: everything was up once, and everything was stopped in order."""
    dev = Dev(tmp_path)
    dev.arguments.append("--exit-after-ready")
    dev.launch()
    assert dev.wait() == 0, dev.output
    assert "replication 2" in dev.output
