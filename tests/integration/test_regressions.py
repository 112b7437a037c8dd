"""Failures of the original system that must not come back, with real processes and clients."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, need, small_cluster, until
from tests.integration.test_failures import qemu_io

ATTACHES = 48
AT_ONCE = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Shared by the tests of this module, which leave it whole."""
    with small_cluster(tmp_path_factory.mktemp("regressions"), 2, 2, "512MiB") as cluster:
        yield cluster


def test_a_block_read_just_after_it_was_written_is_right(cluster: Cluster) -> None:
    """Regression, found by reading: the read cache kept a slice of a buffer that was reused.

    Write 1 MiB, write the next MiB, read the first, on one connection, before and after a flush.
    """
    cluster.ctl("volume", "create", "reused", "16MiB")
    client = cluster.serve("reused")
    commands = []
    for turn in range(1, 9):
        first, second = f"-P {turn} 0 1M", f"-P {turn + 100} 1M 1M"
        commands += [f"write {first}", f"write {second}", f"read {first}"]
        if turn % 2:
            commands += ["flush", f"read {first}", f"read {second}"]
    qemu_io(client.uri, *commands)
    assert client.stop() == 0
    cluster.ctl("volume", "delete", "reused")


def test_mkfs_and_a_deep_check(cluster: Cluster, tmp_path: Path) -> None:
    """Regression, coreos/torus#416: checksums did not match after mkfs.

    mke2fs makes a file system on the volume itself, e2fsck finds it clean when it is opened again,
    and every copy of every block fits its checksum.
    """
    need("nbdfuse", "mke2fs")
    if os.geteuid() or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("showing a volume as a file takes root and /dev/fuse")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    cluster.ctl("volume", "create", "fs", "64MiB")
    for tool in (["mke2fs", "-q", "-t", "ext4", "-F"], ["e2fsck", "-fn"]):
        program = shutil.which(tool[0], path=path)
        assert program is not None, tool
        client = cluster.serve("fs")
        mounted = tmp_path / tool[0]
        mounted.mkdir()
        fuse = subprocess.Popen(["nbdfuse", str(mounted), client.uri])
        try:
            until(lambda at=mounted: (at / "nbd").exists(), "the volume is a file")
            done = subprocess.run(
                [program, *tool[1:], str(mounted / "nbd")], capture_output=True, timeout=60
            )
            assert done.returncode == 0, done
        finally:
            subprocess.run(["umount", str(mounted)], check=False, timeout=30)
            fuse.wait(30)
        assert client.stop() == 0
    checked = cluster.ctl_json("volume", "check", "fs", "--deep")
    assert checked["blocks"] > 5 and checked["good"] and not checked["corrupt"], checked
    cluster.ctl("volume", "delete", "fs")


def test_attaching_works_every_time(cluster: Cluster) -> None:
    """Regression, coreos/torus#288, 290, 406, 447: attaching over NBD worked now and then.

    Many clients attach and leave at once, and beside them others vanish in the middle of the
    handshake, at every place in it. Each attach works at the first try; so does the first one after
    the server was killed and started anew on the same socket.
    """
    need("nbdinfo", "qemu-io")
    cluster.ctl("volume", "create", "flaky", "16MiB")
    client = cluster.serve("flaky")
    qemu_io(client.uri, "write -P 5 0 64k", "flush")
    path = client.uri.partition("socket=")[2]
    go = b"IHAVEOPT\0\0\0\7\0\0\0\x0b\0\0\0\5flaky\0\0"
    hello = b"\0\0\0\3" + go

    def vanish(at: int) -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            if at % 3:
                raw.settimeout(20)
                raw.recv(18)
            raw.sendall(hello[: at % (len(hello) + 1)])

    def attach(n: int) -> None:
        vanish(n)
        done = subprocess.run(
            ["nbdinfo", "--size", client.uri], capture_output=True, text=True, timeout=30
        )
        assert done.stdout.strip() == str(16 << 20), done
        vanish(n + ATTACHES)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(attach, range(ATTACHES)))
    qemu_io(client.uri, "read -P 5 0 64k")
    client.kill()

    def free() -> bool:
        rows = cluster.ctl_json("volume", "list")
        return all(row["holder"] is None for row in rows if row["name"] == "flaky")

    until(free, "the lock let go")
    client.start()
    qemu_io(client.uri, "read -P 5 0 64k", "write -P 6 0 64k")
    assert client.stop() == 0
    cluster.ctl("volume", "delete", "flaky")
