"""What users buy a replicated store for: real processes, real clients, and things that break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import Cluster, need, small_cluster, until
from tests.integration.etcd_server import EtcdServer, require_etcd
from torus_actors.scenarios.processes import Unexpected

pytestmark = pytest.mark.timeout(240)

SLOWEST_S = 3.0
"""No operation may take longer while a node fails."""


LOADED_SIZE = "1GiB"
"""Disk of a node under load: overwriting makes garbage faster than small nodes can collect it."""


class Fio:
    """An fio job in the background that must end without an error."""

    def __init__(self, uri: str, *options: str, seconds: int = 0) -> None:
        need("fio")
        command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
        if seconds:
            command += ["--time_based", f"--runtime={seconds}"]
        self._process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/tmp"
        )

    def result(self) -> dict[str, Any]:
        """Wait for its end; its report, after a check that nothing failed."""
        out, err = self._process.communicate(timeout=180)
        assert self._process.returncode == 0, err.decode() + out.decode()[-2000:]
        text = out.decode()
        report: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        assert report["error"] == 0
        return report


def slowest_s(report: dict[str, Any]) -> float:
    """The longest operation of a job, seconds."""
    sides = (report["read"], report["write"])
    return max(float(side["clat_ns"].get("max", 0)) for side in sides) / 1e9


VERIFIED = (
    "--rw=randrw", "--bs=16k", "--iodepth=8", "--size=64M", "--verify=crc32c",
    "--verify_backlog=256", "--verify_fatal=1",
)  # fmt: skip


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A running etcd."""
    require_etcd()
    folder = tmp_path / "etcd"
    folder.mkdir()
    server = EtcdServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def on_etcd(tmp_path: Path, etcd: EtcdServer) -> Iterator[Cluster]:
    """Three nodes on etcd with replication 2 and a volume ``vol``."""
    with Cluster(tmp_path, metadata=f"etcd://{etcd.endpoint}") as cluster:
        cluster.ctl("init", "--replication", "2")
        cluster.start_nodes(3, size=LOADED_SIZE)
        cluster.ctl("volume", "create", "vol", "256MiB")
        yield cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with replication 2, for tests that leave them whole."""
    with small_cluster(tmp_path_factory.mktemp("shared"), 3, 2, LOADED_SIZE) as cluster:
        yield cluster


def test_a_node_killed_under_load_is_not_noticed(on_etcd: Cluster) -> None:
    """A kill -9 of one node of three and its return cost no error, no lost byte, no long wait.

    Afterwards every block has two valid copies again, read and compared with their checksums.
    """
    client = on_etcd.serve("vol")
    load = Fio(client.uri, *VERIFIED, seconds=7)
    time.sleep(1)  # the load has to be under way
    on_etcd.nodes[1].kill()
    time.sleep(2)  # and to go on without the node
    on_etcd.nodes[1].start()
    report = load.result()
    assert slowest_s(report) < SLOWEST_S
    client.stop()
    on_etcd.ctl("debug", "rebalance")
    checked = on_etcd.ctl_json("volume", "check", "vol", "--deep")
    assert checked["blocks"] > 0
    assert checked["good"] and not checked["silent"] and not checked["corrupt"], checked
    assert checked["expected"] == 2


@pytest.mark.long
def test_etcd_killed_under_load_only_delays_commits(on_etcd: Cluster, etcd: EtcdServer) -> None:
    """Reads, writes and flushes go on without etcd, from the moment the volume is open."""
    client = on_etcd.serve("vol")
    etcd.kill()
    load = Fio(client.uri, *VERIFIED, "--end_fsync=0", seconds=8)
    assert slowest_s(load.result()) < SLOWEST_S
    Fio(client.uri, "--rw=write", "--bs=64k", "--size=1M", "--end_fsync=1").result()
    flushes = Fio(client.uri, "--rw=randwrite", "--bs=4k", "--size=1M", "--fsync=1", seconds=3)
    report = flushes.result()
    assert report["write"]["total_ios"] > 10
    etcd.start()
    assert client.running
    assert all(node.running for node in on_etcd.nodes.values())
    assert client.stop() == 0


def actors_of(cluster: Cluster, node: str) -> list[str]:
    """Names of all actors of a process, supervisors last."""
    rows = cluster.ctl_json("tree", node)
    return [row["name"] for row in _flat(rows)]


def tree_of(cluster: Cluster, node: str) -> dict[str, dict[str, Any]]:
    """All actors of a process by name; waits for the one that answers, which may be the victim."""
    found: dict[str, dict[str, Any]] = {}

    def asked() -> bool:
        try:
            found.update({row["name"]: row for row in _flat(cluster.ctl_json("tree", node))})
        except AssertionError:
            return False
        return bool(found)

    until(asked, "the tree", 20)
    return found


def kill_actor(cluster: Cluster, node: str, name: str) -> None:
    """Kill an actor, and wait until it was restarted."""
    before = tree_of(cluster, node)[name]["restarts"]

    def killed() -> bool:
        try:
            cluster.ctl("debug", "kill", node, name)
        except AssertionError:
            return False
        return True

    def back() -> bool:
        row = tree_of(cluster, node).get(name)
        return row is not None and row["state"] == "running" and row["restarts"] > before

    until(killed, f"{name} killed", 20)
    until(back, f"{name} restarted", 20)


def _flat(rows: Any) -> list[dict[str, Any]]:
    if isinstance(rows, dict):
        return [rows] if "restarts" in rows else [r for v in rows.values() for r in _flat(v)]
    if isinstance(rows, list):
        return [r for each in rows for r in _flat(each)]
    return []


@pytest.mark.long
def test_killing_any_actor_of_a_node_costs_no_error(shared: Cluster) -> None:
    """Each actor of a storage node dies once under verified load, supervisors included."""
    shared.ctl("volume", "create", "node-actors", "128MiB")
    client = shared.serve("node-actors")
    target = f"@{shared.address(1)}"
    names = [name for name in actors_of(shared, target) if name != "node"]
    load = Fio(client.uri, *VERIFIED, seconds=len(names) + 4)
    time.sleep(1)
    for name in names:
        kill_actor(shared, target, name)
    report = load.result()
    assert slowest_s(report) < SLOWEST_S
    assert shared.nodes[1].running
    client.stop()


@pytest.mark.long
def test_killing_any_actor_of_the_client_costs_no_error(shared: Cluster) -> None:
    """Each actor of the NBD client process dies once under verified load, and none twice."""
    shared.ctl("volume", "create", "client-actors", "128MiB")
    listen = f"127.0.0.1:{shared.port + 7}"
    client = shared.serve("client-actors", "--listen", listen)
    target = f"@{listen}"
    names = [name for name in actors_of(shared, target) if name != "node"]
    assert {"volumes", "nbd_server", "volume:client-actors", "replicator"} <= set(names)
    load = Fio(client.uri, *VERIFIED, seconds=len(names) + 4)
    time.sleep(1)
    for name in names:
        kill_actor(shared, target, name)
    report = load.result()
    assert slowest_s(report) < SLOWEST_S
    assert client.running
    assert client.stop() == 0


@pytest.mark.long
def test_a_full_cluster_says_enospc_and_recovers(tmp_path: Path) -> None:
    """Regression, coreos/torus#401: the writer learns it, reads go on, deleting makes room."""
    need("qemu-io", "nbdcopy")
    with Cluster(tmp_path) as cluster:
        for index in range(2):
            cluster.node(index, size="96MiB").launch()
        for index in range(2):
            cluster.nodes[index].wait_ready()
        cluster.ctl("ring", "set-replication", "2")
        cluster.ctl("volume", "create", "small", "16MiB")
        cluster.ctl("volume", "create", "large", "256MiB")
        client = cluster.serve()
        small = client.uri.replace("///", "///small")
        large = client.uri.replace("///", "///large")
        qemu_io(small, "write -P 5 0 16M", "flush")
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write -P 9 0 200M", "-c", "flush", large],
            capture_output=True, text=True, timeout=150,
        )  # fmt: skip
        assert "No space left" in done.stdout + done.stderr, done
        qemu_io(small, "read -P 5 0 16M")
        assert any(
            "full" in process.output or "nearly full" in process.output
            for process in cluster.nodes.values()
        ), "a node has to warn before it is full"
        until(lambda: not cluster.ctl_json("volume", "list")[0].get("holder"), "volume released")
        cluster.ctl("volume", "delete", "large")

        def room() -> bool:
            again = subprocess.run(
                ["qemu-io", "-f", "raw", "-c", "write -P 6 0 16M", "-c", "flush", small],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            return again.returncode == 0 and "rror" not in again.stdout + again.stderr

        until(room, "room after the delete", 90)
        qemu_io(small, "read -P 6 0 16M")


def qemu_io(uri: str, *commands: str, read_only: bool = False) -> None:
    """Run commands of qemu-io, all of which must succeed."""
    options = ["-r"] * read_only + [part for each in commands for part in ("-c", each)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *options, uri], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done
    assert "rror" not in done.stdout + done.stderr, done


@pytest.fixture(scope="module")
def ext4_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 file system made of this project's own documents and code."""
    program = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        need("mke2fs")
    assert program is not None
    path = tmp_path_factory.mktemp("image") / "fs.img"
    source = Path(__file__).parents[2]
    subprocess.run(
        [program, "-q", "-t", "ext4", "-d", str(source / "docs"), str(path), "32M"], check=True
    )
    return path


def test_a_real_file_system_survives_stop_and_start(tmp_path: Path, ext4_image: Path) -> None:
    """qemu-img and nbdcopy put an ext4 image on a volume; after a restart it is the same."""
    need("qemu-img", "nbdcopy", "nbdinfo")
    with small_cluster(tmp_path, nodes=3, replication=2) as cluster:
        size = str(ext4_image.stat().st_size)
        for name in ("one", "two"):
            cluster.ctl("volume", "create", name, size)
        client = cluster.serve()
        uri = {name: client.uri.replace("///", f"///{name}") for name in ("one", "two")}
        convert = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(ext4_image)]
        subprocess.run([*convert, uri["one"]], check=True, timeout=60)
        subprocess.run(["nbdcopy", str(ext4_image), uri["two"]], check=True, timeout=60)
        assert client.stop() == 0
        for index in (2, 1, 0):
            assert cluster.nodes[index].stop() == 0
        for process in cluster.nodes.values():
            process.launch()
        for process in cluster.nodes.values():
            process.wait_ready()
        client.start()
        for name in ("one", "two"):
            compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(ext4_image), uri[name]]
            subprocess.run(compare, check=True, timeout=60)
        back = tmp_path / "back.img"
        subprocess.run(["nbdcopy", uri["one"], str(back)], check=True, timeout=60)
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        check = [shutil.which("e2fsck", path=path) or "e2fsck", "-fn", str(back)]
        subprocess.run(check, check=True, timeout=60, capture_output=True)
        holes = json.loads(
            subprocess.run(
                ["nbdinfo", "--map", "--json", uri["two"]],
                check=True, timeout=60, capture_output=True,
            ).stdout
        )  # fmt: skip
        kinds = {extent["type"] for extent in holes}
        assert {0, 3} <= kinds, "a sparse image keeps its holes"


def test_trimmed_ranges_become_holes_and_read_zero(shared: Cluster) -> None:
    """What a client trims is given back, block by block, and the rest stays."""
    need("qemu-io", "nbdinfo")
    shared.ctl("volume", "create", "trimmed", "16MiB")
    client = shared.serve("trimmed")
    qemu_io(client.uri, "write -P 3 0 8M", "flush", "discard 2M 4M", "flush")
    qemu_io(client.uri, "read -P 3 0 2M", "read -P 0 2M 4M", "read -P 3 6M 2M")
    told = subprocess.run(
        ["nbdinfo", "--map", "--json", client.uri], check=True, capture_output=True, timeout=60
    ).stdout
    extents = [(e["offset"], e["length"], e["type"]) for e in json.loads(told)]
    mib = 1 << 20
    assert extents == [
        (0, 2 * mib, 0),
        (2 * mib, 4 * mib, 3),
        (6 * mib, 2 * mib, 0),
        (8 * mib, 8 * mib, 3),
    ]
    client.stop()


@pytest.mark.long
def test_a_silent_node_does_not_stall_operations(shared: Cluster) -> None:
    """Regression, found by reading: a dead peer that refuses nothing stalls every operation.

    Here a node that neither answers nor closes (SIGSTOP, as if powered off) is soon passed over.
    """
    shared.ctl("volume", "create", "silent", "128MiB")
    client = shared.serve("silent")
    load = Fio(client.uri, *VERIFIED, seconds=8)
    time.sleep(1)
    shared.nodes[2].pause()
    time.sleep(4)
    shared.nodes[2].resume()
    assert slowest_s(load.result()) < SLOWEST_S
    client.stop()


def test_a_damaged_copy_is_read_around_and_scrubbed(tmp_path: Path) -> None:
    """Bytes flipped on one node's disk: reads are right, and the scrubber repairs the copy.

    The audit sees the damage before and none after.
    """
    need("qemu-io")
    with small_cluster(tmp_path, nodes=2, replication=2) as cluster:
        cluster.ctl("volume", "create", "rotten", "16MiB")
        client = cluster.serve("rotten")
        qemu_io(client.uri, "write -P 7 0 8M", "flush")
        assert client.stop() == 0
        path = cluster.data_dir(1) / "blocks" / "blocks.data"
        with path.open("r+b") as file:
            for slot in range(16):
                # In the middle of each slot: a checksum list and 512 KiB of data.
                file.seek(slot * (516 << 10) + (200 << 10))
                file.write(b"rot")
        text = cluster.ctl("volume", "check", "rotten", "--deep", "--json", status=1)
        assert "rotten" in text
        client.start()
        qemu_io(client.uri, "read -P 7 0 8M", "read -P 0 8M 8M")
        assert client.stop() == 0
        told = cluster.ctl("debug", "scrub")
        assert "scrubbed" in told
        checked = cluster.ctl_json("volume", "check", "rotten", "--deep")
        assert checked["good"] and not checked["corrupt"], checked


@pytest.mark.long
def test_what_a_killed_client_had_flushed_is_read_back(tmp_path: Path) -> None:
    """A client that is killed leaves flushed writes in the journal.

    A reader sees them at once, and the next client takes them over. The volume cannot be cloned
    in between, because its head does not have them yet.
    """
    need("qemu-io", "fio")
    with small_cluster(tmp_path, nodes=3, replication=2) as cluster:
        cluster.ctl("volume", "create", "left", "16MiB")
        client = cluster.serve("left")
        # The first flush of a session commits, and later ones go to the journal.
        qemu_io(client.uri, "write -P 1 0 4k", "flush", "write -P 2 4k 12k", "flush")
        qemu_io(client.uri, "write -P 3 1M 1M", "write -P 4 3M 512", "flush")
        client.kill()
        until(lambda: not cluster.ctl_json("volume", "list")[0].get("holder"), "the lock let go")
        assert "journal" in cluster.ctl("volume", "clone", "left", "twin", status=1)
        for options in (["--read-only"], []):
            again = cluster.serve("left", *options)
            reads = ("read -P 1 0 4k", "read -P 2 4k 12k", "read -P 3 1M 1M", "read -P 4 3M 512")
            qemu_io(again.uri, *reads, "read -P 0 4M 1M", read_only=bool(options))
            assert again.stop() == 0
        cluster.ctl("volume", "clone", "left", "twin")
        twin = cluster.serve("twin")
        qemu_io(twin.uri, "read -P 2 4k 12k", "write -P 5 0 4k", "flush", "read -P 5 0 4k")
        assert twin.stop() == 0


@pytest.mark.long
def test_a_node_lost_for_good_is_healed_without_an_operator(tmp_path: Path) -> None:
    """Nobody does anything: the node leaves the ring, all blocks have two copies; it may return.

    Started again after that, it is a member again and gets its share back.
    """
    options = ["--remove-after", "10s"]
    with Cluster(tmp_path) as cluster:
        for index in range(3):
            cluster.start_node(index, *options)
        cluster.ctl("ring", "set-replication", "2")
        source = tmp_path / "source"
        source.write_bytes(os.urandom(8 << 20))
        cluster.ctl("block", "load", "demo", str(source), "--create")
        cluster.nodes[2].kill()

        def members() -> int:
            return int(cluster.ctl_json("status")["ring_members"])

        until(lambda: "leaves the ring in" in cluster.ctl("status"), "it is told", 30)
        until(lambda: members() == 2, "the node is out of the ring", 60)

        def whole() -> bool:
            status, out, _ = cluster._call(
                ["volume", "check", "demo", "--deep", "--json", "-C", cluster.metadata]
            )
            return status == 0 and json.loads(out)["exact"] == 17

        until(whole, "all copies are there", 60)
        until(lambda: cluster.ctl_json("status")["problems"] == [], "the nodes know it", 30)
        cluster.nodes[2].start()
        assert members() == 3
        cluster.ctl("debug", "rebalance")
        assert whole()


def test_who_is_let_in_by_no_node_takes_no_volume_and_no_place_in_the_ring(
    tmp_path: Path, etcd: EtcdServer
) -> None:
    """With etcd the metadata can be read without the secret, and so the lock of a volume be taken.

    Found by use: a new node with a wrong secret was in the ring, and what was written through it
    was acknowledged with one copy that nobody else could read.
    """
    with Cluster(tmp_path, f"etcd://{etcd.endpoint}", secret="correct horse battery") as cluster:
        cluster.ctl("init")
        cluster.start_nodes(1)
        cluster.ctl("volume", "create", "vol", "16MiB")
        (tmp_path / "secret").write_text("another secret of some length")
        client = cluster.client("vol").launch()
        assert client.wait() == 1
        assert "give the --secret-file of the nodes" in client.output.splitlines()[-1]
        (row,) = cluster.ctl_json("volume", "list")
        assert not row["holder"]
        with pytest.raises(Unexpected, match="give the --secret-file of the nodes"):
            cluster.start_node(1, "--auto-join")
        (tmp_path / "secret").write_text("correct horse battery")
        assert len(cluster.ctl_json("ring", "get")["peers"]) == 1
        cluster.start_node(1, "--auto-join")
        assert len(cluster.ctl_json("ring", "get")["peers"]) == 2
