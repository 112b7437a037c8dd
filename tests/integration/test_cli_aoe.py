"""``torusblk aoe`` as a real process, on a pair of virtual network interfaces."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.aoe_initiator import (
    FLUSH,
    IDENTIFY,
    READ_EXT,
    SECTOR,
    WRITE_EXT,
    Initiator,
    ata,
    config,
)
from tests.integration.cluster import Cluster, Process, command, need, small_cluster, until

MTU = 9000
LEASE_S = 1


def ip(*arguments: str) -> None:
    """Configure the network."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[str, str]]:
    """Two interfaces that are joined by a cable: the target's and the initiator's.

    Their names are this process's own, so that runs beside each other have cables of their own.
    """
    if os.geteuid() != 0:
        pytest.skip("raw Ethernet and network interfaces need root")
    need("ip")
    ends = f"ta{os.getpid()}", f"ia{os.getpid()}"
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual interfaces here: {error.stderr.decode().strip()}")
    try:
        for end in ends:
            ip("link", "set", end, "mtu", str(MTU), "up")
        until(lambda: all(carrier(end) for end in ends), "the cable is in")
        yield ends
    finally:
        subprocess.run(["ip", "link", "del", ends[0]], check=False, capture_output=True)


def carrier(interface: str) -> bool:
    """Whether frames get through."""
    return Path(f"/sys/class/net/{interface}/carrier").read_text().strip() == "1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, link: object) -> Iterator[Cluster]:
    """Two nodes with two copies of everything."""
    with small_cluster(tmp_path_factory.mktemp("aoe"), nodes=2, replication=2) as cluster:
        yield cluster


class Target(Process):
    """A ``torusblk aoe`` that was not started yet."""

    def __init__(self, cluster: Cluster, name: str, *arguments: str) -> None:
        line = command("torusblk", "aoe", *arguments, "-C", cluster.metadata)
        super().__init__(f"aoe-{name}", line, cluster.directory, "serving ")
        cluster.clients.append(self)


def test_a_disk_on_the_network(cluster: Cluster, link: tuple[str, str]) -> None:
    """Found, identified, written, read, flushed; what is outside is not there; it ends in order."""
    cluster.ctl("volume", "create", "disk", "16MiB")
    target = Target(cluster, "disk", "disk", link[0], "7", "3", "--insecure")
    with closing(Initiator(link[1], 7, 3)) as host:
        target.launch()
        announced = host.receive(lambda each: each.command == 1 and each.tag == 0)
        assert announced is not None and announced.destination == b"\xff" * 6
        target.wait_ready()
        assert f"serving volume disk at e7.3 on {link[0]}\n" in target.output

        found = host.find()
        assert struct.unpack_from(">HHBB", found.body) == (128, 1, 17, 0x10), "17 sectors at 9000"
        identity = host.do(0, ata(IDENTIFY)).data
        sectors = (16 << 20) // SECTOR
        assert struct.unpack_from("<Q", identity, 200)[0] == sectors
        words = struct.unpack("<20H", identity[54:94])
        assert struct.pack(">20H", *words) == b"torus disk".ljust(40)
        rng = random.Random(1)
        data = rng.randbytes(17 * SECTOR)
        assert host.write(1000, data).status == 0x40
        assert host.read(1000, 17) == data
        assert host.read(999, 3) == bytes(SECTOR) + data[: 2 * SECTOR], "holes are zeros"
        assert host.do(0, ata(FLUSH, count=0)).status == 0x40

        assert host.do(0, ata(READ_EXT, sectors, 1)).ata_error == 0x10
        assert host.write(sectors - 1, data[: 2 * SECTOR]).ata_error == 0x10
        assert host.read(sectors - 1, 1) == bytes(SECTOR)
        assert host.do(0, ata(0xB0)).ata_error == 0x04

        assert host.do(1, config(3, b"here")).error == 0
        assert host.do(1, config(0)).body[8:12] == b"here"
    assert target.stop() == 0
    assert "Traceback" not in target.output and "warning" not in target.output, target.output


def test_what_was_answered_survives_kill_9(cluster: Cluster, link: tuple[str, str]) -> None:
    """Nobody flushed: each answered write is read back, whatever happens to the target then.

    A copy of an answered write that comes late undoes nothing.
    """
    cluster.ctl("volume", "create", "durable", "16MiB")
    options = ("--insecure", "--lease", str(LEASE_S), "--wait-lock", "20")
    target = Target(cluster, "durable", "durable", link[0], "7", "4", *options).start()
    rng = random.Random(2)
    with closing(Initiator(link[1], 7, 4)) as host:
        host.find()
        parts = {lba: rng.randbytes(4 * SECTOR) for lba in range(0, 800, 40)}
        old, old_tag = rng.randbytes(4 * SECTOR), host.tag()
        assert host.write(0, old, old_tag).status == 0x40
        for lba, data in parts.items():
            assert host.write(lba, data).status == 0x40
        again = host.write(0, old, old_tag)
        assert (again.tag, again.status) == (old_tag, 0x40)
        assert host.read(0, 4) == parts[0], "the late copy was not written"
        target.kill()
        target.start()
        for lba, data in parts.items():
            assert host.read(lba, 4) == data
    assert target.stop() == 0


def sockets_on(interface: str) -> int:
    """How many packet sockets are bound to it."""
    index = str(socket.if_nametoindex(interface))
    lines = Path("/proc/net/packet").read_text().splitlines()[1:]
    return sum(line.split()[4] == index for line in lines)


def test_what_came_before_the_volume_was_open_is_not_done(
    cluster: Cluster, link: tuple[str, str]
) -> None:
    """Whoever sent it has given up by then, or had it done by another target that was stopped.

    What has been written since would be undone.
    """
    cluster.ctl("volume", "create", "late", "16MiB")
    holder = cluster.serve("late")
    options = ("--insecure", "--wait-lock", "30")
    target = Target(cluster, "late", "late", link[0], "7", "6", *options)
    before = sockets_on(link[0])
    with closing(Initiator(link[1], 7, 6)) as host:
        target.launch()
        until(lambda: sockets_on(link[0]) > before, "the target has its socket")
        address = Path(f"/sys/class/net/{link[0]}/address").read_text().strip()
        host.target = bytes.fromhex(address.replace(":", ""))
        host.send(0, ata(WRITE_EXT, 0, 1, b"o" * SECTOR), host.tag())
        assert holder.stop() == 0
        target.wait_ready()
        assert host.read(0, 1) == bytes(SECTOR)
        assert host.write(0, b"n" * SECTOR).status == 0x40
        assert host.read(0, 1) == b"n" * SECTOR
    assert target.stop() == 0


def test_a_target_that_is_only_read(cluster: Cluster, link: tuple[str, str]) -> None:
    """A snapshot, and a volume without its lock: writes are aborted, and it is still as it was."""
    cluster.ctl("volume", "create", "kept", "16MiB")
    address = ("kept", link[0], "7", "5")
    with closing(Initiator(link[1], 7, 5)) as host:
        writer = Target(cluster, "writer", *address, "--insecure").start()
        host.find()
        assert host.write(8, b"1" * SECTOR).status == 0x40
        cluster.ctl("snapshot", "create", "kept@one")
        assert host.write(8, b"2" * SECTOR).status == 0x40
        assert writer.stop() == 0
        for name, options, fill in (
            ("snapshot", ["--snapshot", "one", "--insecure"], b"1"),
            ("reader", ["--read-only", "--accept", host.mac.hex(":")], b"2"),
        ):
            reader = Target(cluster, name, *address, *options).start()
            assert host.read(8, 1) == fill * SECTOR
            answer = host.write(8, b"3" * SECTOR)
            assert (answer.status, answer.ata_error) == (0x41, 0x04)
            assert host.read(8, 1) == fill * SECTOR
            assert reader.stop() == 0


def test_a_volume_that_was_taken_over_is_lost_until_somebody_says_otherwise(
    cluster: Cluster, link: tuple[str, str]
) -> None:
    """Who had used it is told with every command; the process ends when it is told to, with 1."""
    cluster.ctl("volume", "create", "taken", "16MiB")
    first = Target(
        cluster, "first", "taken", link[0], "7", "6", "--insecure", "--lease", str(LEASE_S)
    ).start()
    second = Target(
        cluster, "second", "taken", link[0], "7", "7", "--insecure", "--wait-lock", "20"
    )
    with (
        closing(Initiator(link[1], 7, 6)) as host,
        closing(Initiator(link[1], 7, 7)) as heir,
    ):
        host.find()
        assert host.write(0, b"1" * SECTOR).status == 0x40
        first.pause()
        second.start()
        heir.find()
        assert heir.read(0, 1) == b"1" * SECTOR
        assert heir.write(0, b"2" * SECTOR).status == 0x40
        first.resume()
        assert host.write(0, b"Z" * SECTOR).status & 0x21
        until(lambda: "every command is answered with an error" in first.output, "it is known")
        assert host.do(0, ata(READ_EXT)).status & 0x21
        assert host.do(1, config(0)).error == 0
        assert heir.read(0, 1) == b"2" * SECTOR
        assert first.running
    assert first.stop() == 1
    assert "closing volume taken: another client took it over" in first.output.splitlines()[-1]
    assert second.stop() == 0


def test_an_interface_that_goes_away(cluster: Cluster, link: tuple[str, str]) -> None:
    """One plain line, and 1. While it is only down the target waits."""
    cluster.ctl("volume", "create", "cable", "16MiB")
    ends = f"tb{os.getpid()}", f"ib{os.getpid()}"
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    try:
        for end in ends:
            ip("link", "set", end, "up")
        until(lambda: all(carrier(end) for end in ends), "the cable is in")
        target = Target(cluster, "cable", "cable", ends[0], "7", "8", "--insecure").start()
        with closing(Initiator(ends[1], 7, 8)) as host:
            assert host.find().body[4] == 2, "sectors at 1500"
            ip("link", "set", ends[0], "down")
            ip("link", "set", ends[0], "up")
            until(lambda: all(carrier(end) for end in ends), "the cable is in again")
            assert host.write(0, b"1" * SECTOR).status == 0x40
    finally:
        ip("link", "del", ends[0])
    assert target.wait() == 1
    last = target.output.splitlines()[-1]
    assert last == f"torusblk: there is no network interface {ends[0]}", target.output


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("vol", "nope0", "1", "1"), 1, "torusblk: there is no network interface nope0\n"),
        (("vol", "lo", "65535", "1"), 2, "65535 is not in the range 0<=x<=65534"),
        (("vol", "lo", "1", "255"), 2, "255 is not in the range 0<=x<=254"),
        (("vol", "lo", "1", "1", "--accept", "ff:ff:ff:ff:ff:ff"), 2, "no hardware address"),
        (
            ("absent", "lo", "1", "1"),
            1,
            "torusblk: there is no volume absent: torusctl volume list shows those there are\n",
        ),
    ],
)
def test_what_cannot_be_served(
    cluster: Cluster, arguments: tuple[str, ...], status: int, told: str
) -> None:
    """One plain line where it is refused, and 2 for bad usage."""
    target = Target(cluster, f"refused-{len(cluster.clients)}", *arguments).launch()
    assert target.wait() == status
    assert told in target.output
    assert status == 2 or target.output == told


def test_strangers_are_not_served_by_accident(cluster: Cluster, link: tuple[str, str]) -> None:
    """An interface that is not loopback needs --accept or --insecure."""
    target = Target(cluster, "strangers", "vol", link[0], "1", "1").launch()
    assert target.wait() == 1
    assert target.output.startswith(f"torusblk: refusing to serve on {link[0]} without --accept")
    assert target.output.count("\n") == 1


def test_the_interface_must_be_up(cluster: Cluster, link: tuple[str, str]) -> None:
    """And the capability be there: each is one plain line."""
    down = f"td{os.getpid()}"
    ip("link", "add", down, "type", "veth", "peer", "name", f"id{os.getpid()}")
    try:
        target = Target(cluster, "down", "vol", down, "1", "1", "--insecure").launch()
        assert target.wait() == 1
        assert target.output == f"torusblk: interface {down} is down: ip link set {down} up\n"
    finally:
        ip("link", "del", down)
    need("setpriv")
    refused = Target(cluster, "refused", "vol", link[0], "1", "1", "--insecure")
    refused.arguments = ["setpriv", "--bounding-set", "-net_raw", *refused.arguments]
    refused.launch()
    assert refused.wait() == 1
    assert "CAP_NET_RAW" in refused.output and refused.output.count("\n") == 1
