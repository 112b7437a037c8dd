"""``torus-node start`` and ``torusctl`` against one real node."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest

from tests.integration.cluster import (
    Cluster,
    Process,
    command,
    environment,
    free_ports,
    need,
    until,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Shared by the tests of this module that do not break it."""
    with Cluster(tmp_path_factory.mktemp("one")) as cluster:
        port = free_ports(2)
        options = ["--http", f"127.0.0.1:{port}", "--nbd", f"127.0.0.1:{port + 1}"]
        cluster.start_node(0, "--zone", "rack1", *options)
        cluster.http = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
        cluster.nbd = f"nbd://127.0.0.1:{port + 1}"  # type: ignore[attr-defined]
        yield cluster


def need_address(host: str) -> None:
    """Skip where this machine has no such address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        try:
            sock.bind((host, 0))
        except OSError as error:
            pytest.skip(f"{host}: {error.strerror}")


def one_line(text: str) -> bool:
    """Whether it is one whole line."""
    return text.count("\n") == 1 and text.endswith("\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_fresh_node_is_a_cluster_of_its_own(tmp_path: Path, host: str) -> None:
    """No metadata, no ring, no data directory are needed: the node makes them, and is healthy.

    Where it can be asked is shown as it is typed.
    """
    need_address(host.strip("[]"))
    at = f"{host}:{free_ports(1)}"
    arguments = command("torus-node", "start", "--size", "64MiB", "--listen", at)
    node = Process("fresh", arguments, tmp_path, " ready on ").start()
    try:
        assert (tmp_path / "data" / "torus-actors" / "node" / "node.json").exists()
        done = subprocess.run(
            command("torusctl", "status", "--json", "-C", f"torus://{at}"),
            capture_output=True,
            env=environment(tmp_path),
            check=True,
        )
        report = json.loads(done.stdout)
        assert report["replication"] == 1 and report["ring_members"] == 1
        assert report["problems"] == []
        assert [peer["up"] for peer in report["peers"]] == [True]
        assert [peer["address"] for peer in report["peers"]] == [at]
    finally:
        assert node.stop(signal.SIGINT) == 0
    assert node.output.count("\n") == 3, node.output


def test_status_shows_the_node_within_80_columns(cluster: Cluster) -> None:
    """The table fits a terminal, and has no colour where it is not on one."""
    text = cluster.run("torusctl", "status")
    assert cluster.address(0) in text and "healthy" in text and "rack1" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_metadata_url_is_taken_before_and_behind_the_subcommand(cluster: Cluster) -> None:
    """Also from the environment, and the option wins."""
    for arguments, variables in (
        (["-C", cluster.metadata, "volume", "list"], {}),
        (["volume", "-C", cluster.metadata, "list"], {}),
        (["volume", "list", "--metadata", cluster.metadata], {"TORUS_METADATA": "torus://1.2:3"}),
        (["volume", "list"], {"TORUS_METADATA": cluster.metadata}),
    ):
        env = {**environment(cluster.directory), **variables}
        subprocess.run(command("torusctl", *arguments), env=env, check=True, capture_output=True)


def test_everything_that_lists_speaks_json(cluster: Cluster) -> None:
    """The output of --json parses, and names what there is."""
    cluster.ctl("volume", "create", "listed", "16MiB")
    assert [v["name"] for v in cluster.ctl_json("volume", "list")] == ["listed"]
    assert [p["zone"] for p in cluster.ctl_json("peer", "list")] == ["rack1"]
    assert cluster.ctl_json("ring", "get")["type"] == "ketama"
    assert cluster.ctl_json("debug", "dump")["torus-actors/volume-counter"] == {"last": 1}
    (tree,) = cluster.ctl_json("tree")
    assert {"node", "bridge", "block_store", "control"} <= {a["name"] for a in tree["actors"]}
    assert cluster.ctl_json("volume", "check", "listed")["good"] is True
    assert cluster.ctl_json("config")["metadata"] == cluster.metadata
    cluster.ctl("volume", "delete", "listed")
    assert cluster.ctl_json("volume", "list") == []


def test_volumes_are_resized_and_not_cut_off_by_accident(cluster: Cluster, tmp_path: Path) -> None:
    """Shrinking needs a word more, and what it cuts off is gone; create-block is create."""
    cluster.ctl("volume", "create-block", "sized", "16MiB")
    cluster.ctl("volume", "resize", "sized", "32MiB")
    assert one_line(cluster.ctl("volume", "resize", "sized", "8MiB", status=1))
    (tmp_path / "image").write_bytes(b"x" * (32 << 20))
    cluster.ctl("block", "load", "sized", str(tmp_path / "image"))
    cluster.ctl("volume", "resize", "sized", "8MiB", "--shrink")
    assert cluster.ctl_json("volume", "list")[0]["size"] == 8 << 20
    cluster.ctl("volume", "resize", "sized", "32MiB")
    cluster.ctl("block", "dump", "sized", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == b"x" * (8 << 20) + bytes(24 << 20)
    cluster.ctl("volume", "delete", "sized")


@pytest.mark.parametrize(
    "arguments",
    [
        ["volume", "delete", "nothing"],
        ["volume", "check", "nothing"],
        ["block", "dump", "nothing", "-"],
        ["tree", "00000000"],
        ["peer", "add", "00000000"],
        ["wipe"],
        ["init"],
        ["tree", "@nowhere"],
        ["debug", "kill", "@127.0.0.1:1", "bridge"],
    ],
)
def test_what_is_refused_is_told_in_one_line(cluster: Cluster, arguments: list[str]) -> None:
    """Status 1, and one plain line on standard error that begins with the program's name."""
    told = cluster.ctl(*arguments, status=1)
    assert one_line(told) and told.startswith("torusctl: "), told


def test_a_killed_actor_is_restarted_and_the_tree_says_so(cluster: Cluster) -> None:
    """The tree shows the restart and the cause of death."""
    cluster.ctl("debug", "kill", f"@{cluster.address(0)}", "replicator")

    def restarted() -> bool:
        (tree,) = cluster.ctl_json("tree", f"@{cluster.address(0)}")
        (row,) = [each for each in tree["actors"] if each["name"] == "replicator"]
        return row["restarts"] == 1 and row["state"] == "running" and "killed" in row["last_death"]

    until(restarted, "the replicator is back")
    assert "killed" in cluster.ctl("tree")
    # The root has nobody who would restart it.
    told = cluster.ctl("debug", "kill", f"@{cluster.address(0)}", "node", status=1)
    assert one_line(told) and "has no supervisor" in told
    # Into a pipe, each look as `tree` without --watch; it ends when nobody reads any more.
    watching = subprocess.Popen(
        command("torusctl", "-C", cluster.metadata, "tree", "--watch"),
        stdout=subprocess.PIPE,
        env=environment(cluster.directory),
        text=True,
    )
    assert watching.stdout is not None
    with watching, watching.stdout as pipe:
        for line in pipe:
            if "replicator" in line:
                break
        pipe.close()
        assert watching.wait(20) == 1


def test_http_serves_health_metrics_and_status(cluster: Cluster) -> None:
    """Monitoring finds what it looks for; anything else is 404; the actor survives a kill."""
    base = cluster.http  # type: ignore[attr-defined]

    def get(path: str) -> str:
        with urllib.request.urlopen(base + path, timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    assert get("/healthz") == "ok\n"
    assert json.loads(get("/status"))["role"] == "node"
    metrics = get("/metrics")
    assert 'torus_store_total_blocks{store="blocks"}' in metrics
    assert 'torus_actor_restarts_total{actor="bridge"} 0.0' in metrics
    with pytest.raises(urllib.error.HTTPError) as refused:
        get("/other")
    refused.value.close()
    cluster.ctl("debug", "kill", f"@{cluster.address(0)}", "http")

    def back() -> bool:
        try:
            return get("/healthz") == "ok\n"
        except OSError:  # refused, or let in by the one that was about to die
            return False

    until(back, "HTTP is served again")


def test_a_node_can_serve_volumes_itself(cluster: Cluster) -> None:
    """With --nbd: every volume by its name, and no unnamed one."""
    need("qemu-io")
    base = cluster.nbd  # type: ignore[attr-defined]
    cluster.ctl("volume", "create", "near", "16MiB")
    for commands, uri, status in (
        (["write -P 4 0 64k"], f"{base}/near", 0),
        (["read -P 4 0 64k"], f"{base}/near", 0),
        (["read 0 4k"], base, 1),
    ):
        options = [part for each in commands for part in ("-c", each)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *options, uri], capture_output=True, timeout=30, check=False
        )
        assert done.returncode == status, done
    cluster.ctl("volume", "check", "near", "--deep")

    def closed() -> bool:
        return all(v["holder"] is None for v in cluster.ctl_json("volume", "list"))

    until(closed, "the volume is closed")
    cluster.ctl("volume", "delete", "near")


def test_a_node_that_cannot_start_says_why_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    """A port or a directory in use, a directory that cannot be, a missing secret, damage."""
    own = ["--data-dir", str(tmp_path / "d"), "--size", "64MiB"]
    port = free_ports(1)
    journal = tmp_path / "damaged" / "journal"
    journal.mkdir(parents=True)
    (journal / "segment-000000").touch()
    damaged = ["--data-dir", str(journal.parent), "--size", "64MiB"]
    for options, word in (
        ([*own, "--listen", cluster.address(0)], "in use"),
        (["--data-dir", str(cluster.data_dir(0)), "--listen", f"127.0.0.1:{port}"], "in use"),
        ([*own, "--listen", f"0.0.0.0:{port}"], "--secret-file"),
        ([*own, "--listen", f"0.0.0.0:{port}", "--insecure"], "--advertise"),
        ([*own, "--listen", f"127.0.0.1:{port}", "--nbd", f"0.0.0.0:{port + 1}"], "--insecure"),
        ([*own, "--size", "1MiB", "--listen", f"127.0.0.1:{port}"], "at least"),
        ([*own, "--listen", f"127.0.0.1:{port}", "--http", cluster.address(0)], "in use"),
        ([*damaged, "--listen", f"127.0.0.1:{port}"], f"in {journal}: segment-000000: the header"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            command("torus-node", "start", *options),
            capture_output=True,
            env=environment(tmp_path),
            check=False,
            text=True,
        )
        assert done.returncode == 1, done
        assert one_line(done.stderr) and word in done.stderr, done.stderr
        assert time.monotonic() - began < 15


def test_a_node_does_not_join_under_the_address_of_another(tmp_path: Path) -> None:
    """Found by use: the ring had two members at one address, both of them "up"."""
    with Cluster(tmp_path) as cluster:
        cluster.start_nodes(2)
        own = ["--data-dir", str(tmp_path / "d"), "--size", "64MiB", "--auto-join"]
        own += ["-C", cluster.metadata, "--listen", f"127.0.0.1:{free_ports(1)}"]
        done = subprocess.run(
            command("torus-node", "start", *own, "--advertise", cluster.address(1)),
            capture_output=True,
            env=environment(tmp_path),
            timeout=30,
            check=False,
            text=True,
        )
        assert done.returncode == 1, done
        assert f"answers at {cluster.address(1)}: choose another address" in done.stderr
        assert len(cluster.ctl_json("ring", "get")["peers"]) == 2


def test_metadata_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    """Every program says what it could not reach, and what to do."""
    url = f"torus://127.0.0.1:{free_ports(1)}"
    processes = [
        subprocess.Popen(
            command(program, "-C", url, *arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            text=True,
        )
        for program, *arguments in (
            ("torusctl", "status"),
            ("torusctl", "volume", "check", "demo"),
            ("torusblk", "serve", "--unix", str(tmp_path / "s")),
        )
    ]
    for process in processes:
        _, told = process.communicate(timeout=30)
        assert process.returncode == 1, told
        assert one_line(told), told
        assert f"cannot reach the metadata at {url}: connection refused" in told


class Greeter(BaseRequestHandler):
    """Another program."""

    def handle(self) -> None:
        """Say what a node does not understand, and wait to be left."""
        self.request.sendall(b"220 mail.example.org ESMTP: what can I do for you?\r\n")
        while self.request.recv(4096):
            pass


@pytest.mark.parametrize("what", ["another secret", "another program"])
def test_metadata_that_is_something_else_is_told_in_one_line(tmp_path: Path, what: str) -> None:
    """Whoever starts does not wait for it to become what it is not."""
    secret, port = tmp_path / "other", free_ports(1)
    secret.touch(0o600)
    secret.write_text("another secret of some length")
    url = f"torus://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        if what == "another secret":
            cluster = stack.enter_context(Cluster(tmp_path, secret="correct horse battery staple"))
            cluster.start_node(0)
            url, word = f"torus://{cluster.address(0)}", "secret"
        else:
            server = stack.enter_context(ThreadingTCPServer(("127.0.0.1", port), Greeter))
            stack.callback(server.shutdown)
            Thread(target=server.serve_forever, daemon=True).start()
            word = "not a frame"
        own = ["--data-dir", str(tmp_path / "d"), "--size", "64MiB"]
        own += ["--listen", f"127.0.0.1:{free_ports(1)}"]
        for program, *arguments in (
            ("torusctl", "status"),
            ("torusctl", "init"),
            ("torusctl", "volume", "check", "demo"),
            ("torusblk", "serve", "--unix", str(tmp_path / "s")),
            ("torus-node", "start", *own),
        ):
            done = subprocess.run(
                command(program, "-C", url, "--secret-file", str(secret), *arguments),
                capture_output=True,
                env=environment(tmp_path),
                check=False,
                text=True,
                timeout=30,
            )
            assert done.returncode == 1, done
            *logged, told = done.stderr.splitlines()
            assert (
                told.startswith(f"{program}: cannot use the metadata at {url}: ") and word in told
            )
            # What serves also logs why the connection ended.
            assert not logged or (len(logged) == 1 and program != "torusctl"), done.stderr


def test_wipe_may_be_repeated_and_init_follows(tmp_path: Path) -> None:
    """Regression, coreos/torus#267: wipe panicked where there was nothing to wipe.

    Here that is fine; and a node with blocks of the old cluster does not join.
    """
    with Cluster(tmp_path) as cluster:
        node = cluster.start_node(0, size="64MiB")
        cluster.ctl("volume", "create", "demo", "16MiB")
        assert "wiped" in cluster.ctl("wipe", "--yes-i-am-sure")
        assert "no cluster" in cluster.ctl("wipe", "--yes-i-am-sure")
        assert "torusctl init" in cluster.ctl("status", status=1)
        cluster.ctl("init", "--block-size", "256KiB", "--replication", "2", "--ring-type", "zone")
        report = cluster.ctl_json("status")
        assert (report["block_size"], report["replication"]) == (256 << 10, 2)
        assert report["ring_type"] == "zone"
        assert node.stop() == 0
        node.launch()
        assert node.wait() == 1
        assert one_line(node.output) and "blocks of cluster" in node.output


def test_a_node_that_was_killed_registers_as_the_later_one(tmp_path: Path) -> None:
    """Its former registration lives on for a while, and must not count as newer."""
    with Cluster(tmp_path) as cluster:
        node = cluster.start_node(0, size="64MiB")
        for _ in range(4):
            node.kill()
            node.start()
            assert [peer["up"] for peer in cluster.ctl_json("peer", "list")] == [True]
            assert "cannot register" not in node.output


def test_a_node_that_cannot_serve_does_not_join(cluster: Cluster, tmp_path: Path) -> None:
    """It ended with 1, and was a member of the ring that was down from then on."""
    before = cluster.ctl_json("ring", "get")
    taken = cluster.http.removeprefix("http://")  # type: ignore[attr-defined]
    start = ["start", "--auto-join", "--size", "64MiB", "-C", cluster.metadata, "--http", taken]
    where = ["--data-dir", str(tmp_path / "data"), "--listen", f"127.0.0.1:{free_ports(1)}"]
    done = subprocess.run(
        command("torus-node", *start, *where),
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=False,
    )
    assert done.returncode == 1 and "choose another with --http" in done.stderr
    assert cluster.ctl_json("ring", "get") == before


def test_a_copy_of_a_nodes_data_is_told_to_both(tmp_path: Path) -> None:
    """The one that started last is taken for the node, and the other one says so."""
    with Cluster(tmp_path) as cluster:
        cluster.start_node(0)
        node = cluster.start_node(1)
        shutil.copytree(cluster.data_dir(1), tmp_path / "copy")
        start = ["start", "--data-dir", str(tmp_path / "copy"), "-C", cluster.metadata]
        where = ["--listen", f"127.0.0.1:{free_ports(1)}"]
        copy = Process("copy", command("torus-node", *start, *where), tmp_path, " ready on ")
        copy.start()
        try:
            until(lambda: "or have copies of one" in node.output, "the node says so")
        finally:
            copy.kill()


def test_options_may_come_from_a_file(tmp_path: Path) -> None:
    """The command line wins over the file; an unknown name is bad usage."""
    port = free_ports(2)
    file = tmp_path / "node.toml"
    file.write_text(
        f'data-dir = "{tmp_path / "d"}"\nsize = "64MiB"\nlisten = "127.0.0.1:{port}"\n'
        'zone = "here"\nauto-join = true\n'
    )
    arguments = command(
        "torus-node", "start", "--config", str(file), "--listen", f"127.0.0.1:{port + 1}"
    )
    node = Process("configured", arguments, tmp_path, " ready on ").start()
    assert f"127.0.0.1:{port + 1}" in node.output and str(tmp_path / "d") in node.output
    assert node.stop() == 0
    file.write_text('colour = "red"\n')
    node.launch()
    assert node.wait() == 2
    assert "there is no option colour" in node.output
