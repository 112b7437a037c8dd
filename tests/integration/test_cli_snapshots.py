"""``torusctl snapshot``, ``torusblk serve --snapshot`` and progress bars, with real processes."""

from __future__ import annotations

import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import (
    Cluster,
    command,
    environment,
    free_ports,
    small_cluster,
    until,
)
from tests.integration.test_failures import qemu_io

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Shared by the tests of this module, which leave it whole."""
    with small_cluster(tmp_path_factory.mktemp("snapshots"), nodes=2, replication=2) as cluster:
        yield cluster


def test_a_snapshot_of_a_volume_in_use(cluster: Cluster, tmp_path: Path) -> None:
    """Made while a client writes; read by name at any server, and as a file; gone when deleted.

    The client listens nowhere: it is asked by way of the metadata.
    """
    cluster.ctl("volume", "create", "used", "16MiB")
    client = cluster.serve("used")
    qemu_io(client.uri, "write -P 1 0 4M", "flush", "write -P 2 1M 512")
    assert "used@one made" in cluster.ctl("snapshot", "create", "used@one")
    qemu_io(client.uri, "write -P 3 0 8M", "flush")
    assert "has a snapshot one already" in cluster.ctl("snapshot", "create", "used@one", status=1)
    held = cluster.ctl("snapshot", "restore", "used@one", status=1)
    assert held.count("\n") == 1 and f"pid {client.pid}" in held
    (row,) = cluster.ctl_json("snapshot", "list", "used")
    assert (row["volume"], row["name"], row["size"]) == ("used", "one", 16 * MIB)
    assert row["created"] > 1.7e9 and "used@one" in cluster.ctl("snapshot", "list")

    old = ("read -P 1 0 1M", "read -P 2 1M 512", "read -P 1 1049088 1M", "read -P 0 4M 4M")
    reader = cluster.serve("used", "--snapshot", "one")
    assert "used@one" in reader.output
    qemu_io(reader.uri, *old, read_only=True)
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", reader.uri], capture_output=True, timeout=30
    )
    assert refused.returncode == 1 and b"Permission denied" in refused.stderr
    assert reader.stop() == 0
    port = free_ports(1)
    every = cluster.serve(None, "--tcp", f"127.0.0.1:{port}")
    qemu_io(f"nbd://127.0.0.1:{port}/used@one", *old, read_only=True)
    assert every.stop() == 0

    qemu_io(client.uri, "read -P 3 0 8M")
    assert client.stop() == 0
    checked = cluster.ctl_json("volume", "check", "used", "--deep")
    alone = cluster.ctl_json("volume", "check", "used@one", "--deep")
    assert checked["snapshots"] == 1 and checked["good"] and alone["good"]
    # 8 MiB of the volume, 4 MiB of the snapshot, and their pages.
    assert checked["blocks"] == 24 + 2 and alone["blocks"] == 8 + 1
    assert "used with 1 snapshot: 26 blocks" in cluster.ctl("volume", "check", "used")
    cluster.ctl("block", "dump", "used@one", str(tmp_path / "old"))
    content = (tmp_path / "old").read_bytes()
    assert content == b"\1" * MIB + b"\2" * 512 + b"\1" * (3 * MIB - 512) + bytes(12 * MIB)
    assert "what it was" in cluster.ctl("snapshot", "restore", "used@one")
    cluster.ctl("snapshot", "delete", "used@one")
    assert "no snapshot one" in cluster.ctl("snapshot", "delete", "used@one", status=1)
    assert cluster.ctl_json("snapshot", "list") == []
    again = cluster.serve("used")
    qemu_io(again.uri, *old)
    assert again.stop() == 0
    cluster.ctl("volume", "delete", "used")


@pytest.mark.long
def test_a_snapshot_after_a_client_was_killed(cluster: Cluster) -> None:
    """What it had flushed is in the journal only: the tool replays it first."""
    cluster.ctl("volume", "create", "left", "16MiB")
    client = cluster.serve("left")
    qemu_io(client.uri, "write -P 1 0 4k", "flush", "write -P 2 4k 12k", "flush")
    client.kill()

    def free() -> bool:
        rows = cluster.ctl_json("volume", "list")
        return all(row["holder"] is None for row in rows if row["name"] == "left")

    until(free, "the lock let go")
    cluster.ctl("snapshot", "create", "left@s")
    assert free()
    reader = cluster.serve("left", "--snapshot", "s")
    qemu_io(reader.uri, "read -P 1 0 4k", "read -P 2 4k 12k", read_only=True)
    assert reader.stop() == 0
    assert "volume left with 1 snapshot deleted" in cluster.ctl("volume", "delete", "left")
    assert cluster.ctl_json("snapshot", "list") == []


def test_mistakes_are_told_in_one_line(cluster: Cluster) -> None:
    """Bad names are bad usage; what is not there is named."""
    cluster.ctl("volume", "create", "few", "16MiB")
    for bad in ("few", "few@", "@s"):
        assert "no VOLUME@NAME" in cluster.ctl("snapshot", "create", bad, status=2)
    for arguments, told in (
        (("create", "none@s"), "no volume none"),
        (("create", "few@-s"), "is no name"),
        (("restore", "few@s"), "no snapshot s"),
        (("delete", "few@s"), "no snapshot s"),
        (("list", "none"), "no volume none"),
    ):
        text = cluster.ctl("snapshot", *arguments, status=1)
        assert told in text and text.count("\n") == 1
    assert "no snapshot s" in cluster.run("torusblk", "serve", "few", "--snapshot", "s", "--unix",
                                          str(cluster.directory / "x.sock"), status=1)  # fmt: skip
    cluster.ctl("volume", "delete", "few")


def on_terminal(cluster: Cluster, *arguments: str) -> str:
    """What a tool prints on standard error where that is a terminal of 80 columns."""
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                return
            if not data:
                return
            shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [*command("torusctl", *arguments), "-C", cluster.metadata],
            stdout=subprocess.PIPE,
            stderr=slave,
            env={**environment(cluster.directory), "TERM": "xterm", "COLUMNS": "80"},
            timeout=60,
        )
    finally:
        os.close(slave)
        reader.join(10)
        os.close(master)
    text = b"".join(shown).decode(errors="replace")
    assert done.returncode == 0, text
    return text


def test_bars_are_shown_on_terminals_only(cluster: Cluster, tmp_path: Path) -> None:
    """Whatever takes long shows one on a terminal; elsewhere there are plain lines, or nothing."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(8 * MIB))
    cluster.ctl("block", "load", "demo", str(source), "--create")
    for arguments, title in (
        (("debug", "rebalance"), "rebalancing"),
        (("debug", "scrub"), "scrubbing"),
        (("volume", "check", "demo", "--deep"), "checking demo"),
        (("block", "dump", "demo", str(tmp_path / "copy")), "dumping demo"),
        (("block", "load", "demo", str(source)), "loading demo"),
    ):
        assert title in on_terminal(cluster, *arguments)
    done = subprocess.run(
        [*command("torusctl", "debug", "rebalance"), "-C", cluster.metadata],
        capture_output=True,
        env=environment(cluster.directory),
        timeout=60,
    )
    assert b"rebalancing" not in done.stderr and b"\x1b" not in done.stderr
    cluster.ctl("volume", "delete", "demo")


@pytest.mark.long
def test_status_tells_of_garbage(cluster: Cluster) -> None:
    """What was overwritten is found, then its room is reclaimed, by every node; in JSON too."""
    cluster.ctl("volume", "create", "worn", "16MiB")
    client = cluster.serve("worn")
    for n in (1, 2):
        qemu_io(client.uri, f"write -P {n} 0 8M", "flush")
    assert client.stop() == 0

    def told() -> bool:
        report = cluster.ctl_json("status")
        nodes = [row["collector"] for row in report["peers"]]
        assert report["reclaimed_bytes"] == sum(each["reclaimed_bytes"] for each in nodes)
        assert report["garbage_bytes"] == sum(each["garbage_bytes"] for each in nodes)
        return all(each["garbage_bytes"] or each["reclaimed_bytes"] for each in nodes)

    until(told, "garbage is found", 60)
    text = cluster.ctl("status")
    assert "garbage  " in text and "reclaimed since" in text and "RECLAIMED" in text
    assert max(map(len, text.splitlines())) <= 80
    cluster.ctl("volume", "delete", "worn")
