"""``torusblk serve``, images, and what the tools say when a node is down; with real processes."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import (
    Cluster,
    Process,
    command,
    environment,
    free_ports,
    need,
    small_cluster,
    until,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def heir(cluster: Cluster) -> Process:
    """A client that waits for the volume of one that was killed.

    Begun before the other tests, because the lease of the dead takes its time to end.
    """
    cluster.ctl("volume", "create", "waited", "16MiB")
    first = cluster.serve("waited")
    qemu_io(first.uri, "write -P 9 0 512k", "flush")
    first.kill()
    return cluster.client("waited", "--wait-lock", "20").launch()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Shared by the tests of this module that do not break it."""
    with small_cluster(tmp_path_factory.mktemp("two"), nodes=2, replication=2) as cluster:
        yield cluster


def image(path: Path, size: int, data: dict[int, bytes]) -> Path:
    """A sparse file with data at some offsets."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
    return path


def qemu_io(uri: str, *commands: str, form: str = "raw") -> str:
    """Run commands of qemu-io on an export."""
    need("qemu-io")
    options = [part for each in commands for part in ("-c", each)]
    done = subprocess.run(
        ["qemu-io", "-f", form, *options, uri], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done
    return done.stdout


def test_a_volume_that_is_held_is_told_in_one_line(cluster: Cluster, heir: Process) -> None:
    """The second client learns who has it; after an orderly end the volume is free at once."""
    cluster.ctl("volume", "create", "held", "16MiB")
    first = cluster.serve("held")
    qemu_io(first.uri, "write -P 7 1M 64k")
    second = cluster.client("held").launch()
    assert second.wait() == 1
    assert second.output.count("\n") == 1
    assert "volume held is held by" in second.output and f"pid {first.pid}" in second.output
    (row,) = [each for each in cluster.ctl_json("volume", "list") if each["name"] == "held"]
    assert row["holder"].endswith(f"pid {first.pid}")
    assert "held by" in cluster.ctl("volume", "delete", "held", status=1)
    assert first.stop() == 0
    assert "Traceback" not in first.output and "warning" not in first.output, first.output
    second.start()
    qemu_io(second.uri, "read -P 7 1M 64k")
    assert second.stop(signal.SIGINT) == 0
    cluster.ctl("volume", "delete", "held")


def test_without_a_name_every_volume_is_served(cluster: Cluster) -> None:
    """Each is opened when it is asked for and closed after that; the unnamed export is a choice."""
    for name in ("red", "blue"):
        cluster.ctl("volume", "create", name, "16MiB")
    port = free_ports(2)
    client = cluster.serve(
        None, "--tcp", f"127.0.0.1:{port}", "--default-export", "red",
        "--listen", f"127.0.0.1:{port + 1}",
    )  # fmt: skip
    qemu_io(f"nbd://127.0.0.1:{port}/blue", "write -P 1 0 4k")
    qemu_io(f"nbd://127.0.0.1:{port}", "write -P 2 0 4k")
    qemu_io(f"nbd://127.0.0.1:{port}/red", "read -P 2 0 4k")
    (tree,) = cluster.ctl_json("tree", f"@127.0.0.1:{port + 1}")
    assert {"volumes", "nbd_server"} <= {each["name"] for each in tree["actors"]}

    def free() -> bool:
        volumes = cluster.ctl_json("volume", "list")
        return all(v["holder"] is None for v in volumes if v["name"] in ("red", "blue"))

    until(free, "both volumes are closed")
    assert client.stop() == 0
    for name in ("red", "blue"):
        cluster.ctl("volume", "delete", name)


def test_a_volume_can_have_an_image_with_a_format_of_its_own(cluster: Cluster) -> None:
    """Qemu asks for fast zeros beside the first write to a cluster of it, and must be told no."""
    need("qemu-img")
    cluster.ctl("volume", "create", "qcow", "64MiB")
    served = cluster.serve("qcow")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", served.uri, "32M"], check=True)
    qemu_io(served.uri, "write -P 5 4k 4k", "flush", form="qcow2")
    qemu_io(served.uri, "read -P 5 4k 4k", "read -P 0 8k 4k", form="qcow2")
    subprocess.run(["qemu-img", "check", "-q", served.uri], check=True, timeout=30)
    served.stop()


def test_read_only_takes_no_lock(cluster: Cluster) -> None:
    """Two readers at once, and neither can write."""
    cluster.ctl("volume", "create", "shared", "16MiB")
    one, two = (cluster.serve("shared", "--read-only") for _ in range(2))
    for each in (one, two):
        done = subprocess.run(
            ["qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 4k", each.uri],
            capture_output=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done
        assert each.stop() == 0
    cluster.ctl("volume", "delete", "shared")


def test_images_go_in_and_come_out_with_their_holes(cluster: Cluster, tmp_path: Path) -> None:
    """Load and dump are inverse; holes take no room on either side; a clone has the content."""
    rng = random.Random(5)
    parts = {0: rng.randbytes(700_001), 9 * MIB + 4096: rng.randbytes(MIB)}
    source = image(tmp_path / "source", 24 * MIB + 512, parts)
    assert "there is no volume" in cluster.ctl("block", "load", "image", str(source), status=1)
    cluster.ctl("block", "load", "image", str(source), "--create")
    cluster.ctl("block", "dump", "image", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 8 * MIB
    assert cluster.ctl_json("volume", "check", "image", "--deep")["blocks"] < 16

    cluster.ctl("volume", "clone", "image", "twin")
    # The second image has holes where the first has data, and comes through a pipe.
    other = image(tmp_path / "other", 4 * MIB, {2 * MIB: b"x" * 1000})
    cluster.run("torusctl", "block", "load", "image", "-", stdin=other.read_bytes())
    cluster.ctl("block", "dump", "image", str(tmp_path / "copy"))
    content = (tmp_path / "copy").read_bytes()
    assert content[: 4 * MIB] == other.read_bytes() and not any(content[4 * MIB :])
    cluster.ctl("block", "dump", "twin", str(tmp_path / "twin"))
    assert (tmp_path / "twin").read_bytes() == source.read_bytes()

    large = image(tmp_path / "large", 25 * MIB, {})
    assert "resize it" in cluster.ctl("block", "load", "image", str(large), status=1)
    for name in ("image", "twin"):
        cluster.ctl("volume", "delete", name)


def test_a_load_that_waits_for_its_pipe_can_be_interrupted(cluster: Cluster) -> None:
    """With Ctrl-C, though nothing comes and the pipe stays open; the volume is free afterwards."""
    cluster.ctl("volume", "create", "slow", "16MiB")
    load = subprocess.Popen(
        [*command("torusctl", "block", "load", "slow", "-"), "-C", cluster.metadata],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(cluster.directory),
    )
    assert load.stdin is not None
    load.stdin.write(bytes(4 * MIB))
    load.stdin.flush()

    def holder() -> str | None:
        (row,) = [each for each in cluster.ctl_json("volume", "list") if each["name"] == "slow"]
        held: str | None = row["holder"]
        return held

    until(lambda: holder() is not None, "the volume is open")
    load.send_signal(signal.SIGINT)
    assert load.wait(10) == 1
    assert load.stderr is not None and load.stderr.read() == b"torusctl: interrupted\n"
    load.stdin.close()
    load.stderr.close()
    assert holder() is None
    cluster.ctl("volume", "delete", "slow")


def test_a_client_can_wait_for_the_lock_of_a_dead_one(cluster: Cluster, heir: Process) -> None:
    """The lease of a killed client ends by itself; what it had flushed is there."""
    heir.wait_ready()
    qemu_io(heir.uri, "read -P 9 0 512k")
    assert heir.stop() == 0


@pytest.mark.long
def test_a_node_that_is_down_is_seen_and_its_copies_are_missed(tmp_path: Path) -> None:
    """Status says in words what is wrong, and an audit fails; both are content again afterwards."""
    with small_cluster(tmp_path, nodes=3, replication=2) as cluster:
        source = image(tmp_path / "source", 8 * MIB, {0: random.Random(1).randbytes(8 * MIB)})
        cluster.ctl("block", "load", "demo", str(source), "--create")
        assert cluster.ctl_json("volume", "check", "demo")["exact"] == 17
        cluster.nodes[2].kill()
        report = cluster.ctl_json("status")
        assert [peer["up"] for peer in report["peers"]].count(False) == 1
        assert "does not answer" in report["problems"][0]
        assert "does not answer" in cluster.ctl("status")
        told = cluster.ctl("volume", "check", "demo", status=1)
        assert told.count("\n") == 1 and "too few good copies" in told
        cluster.ctl("block", "dump", "demo", str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()
        cluster.nodes[2].start()
        cluster.ctl("ring", "set-replication", "3")
        assert "balanced" in cluster.ctl("debug", "rebalance", "--timeout", "25")
        assert cluster.ctl_json("volume", "check", "demo", "--deep")["exact"] == 17
        assert cluster.ctl_json("status")["problems"] == []

        gone = cluster.ctl_json("peer", "list")[0]["id"]
        cluster.ctl("ring", "set-replication", "2")
        # Nobody has looked yet whether all copies are there.
        assert "keep what was removed running" in cluster.ctl("peer", "remove", gone[:8])
        assert cluster.ctl_json("status")["ring_members"] == 2
        told = cluster.ctl("ring", "manual-change", "--peers", "", status=1)
        assert told.count("\n") == 1 and "without a node" in told
        cluster.ctl("ring", "manual-change", "--type", "mod", "--uuids", gone)
        ring = cluster.ctl_json("ring", "get")
        assert ring["type"] == "mod" and [peer["id"] for peer in ring["peers"]] == [gone]
        cluster.ctl("ring", "manual-change", "--type", "ketama")
        cluster.ctl("peer", "add", "--all")
        assert len(cluster.ctl_json("ring", "get")["peers"]) == 3
        cluster.nodes[1].pause()
        assert "does not answer" in cluster.ctl("status")
        cluster.nodes[1].resume()


def test_a_cluster_secret_keeps_strangers_out(tmp_path: Path) -> None:
    """Tools without the secret are told so in one line, and those with it work."""
    with Cluster(tmp_path, secret="correct horse battery staple") as cluster:
        cluster.start_node(0)
        assert cluster.ctl_json("status")["problems"] == []
        (tmp_path / "secret").write_text("another secret of some length")
        told = cluster.ctl("status", status=1)
        assert told.count("\n") == 1 and "secret" in told
        (tmp_path / "secret").write_text("short")
        assert "16 to" in cluster.ctl("status", status=1)
