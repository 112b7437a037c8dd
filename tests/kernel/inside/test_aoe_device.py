"""``torusblk aoe`` and the Linux kernel's aoe driver: run by `test_devices` in a guest."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from tests.integration.cluster import Cluster
from tests.kernel.inside.forked import ForkedProcess
from tests.kernel.inside.system import MIB, SIZE, mounted, shell
from torus_actors.aoe.protocol import ATA, ETHERTYPE, HEADER, WRITES
from torus_actors.scenarios.processes import command, until

SHELF = 7
WAIT_LOCK_S = 60

OURS, KERNELS = "target0", "kernel0"
"""Both ends of a cable."""

CONTROL = Path("/dev/etherd")
"""Where the driver has its files."""


@pytest.fixture(scope="module", autouse=True)
def cable() -> None:
    """Two interfaces, one of which the driver uses; frames of 9000 bytes."""
    shell("ip", "link", "add", OURS, "type", "veth", "peer", "name", KERNELS)
    for end in (OURS, KERNELS):
        shell("ip", "link", "set", end, "mtu", "9000", "up")
    (CONTROL / "interfaces").write_text(KERNELS)


class Target(ForkedProcess):
    """A ``torusblk aoe`` that was not started yet.

    Args:
        slot: must not be that of another test: the driver knows a disk for good.
    """

    def __init__(self, cluster: Cluster, volume: str, slot: int, *options: str) -> None:
        super().__init__(
            f"aoe-{len(cluster.clients)}",
            [
                *command("torusblk", "aoe", volume, OURS, str(SHELF), str(slot)),
                *("--insecure", "-C", cluster.metadata, *options),
            ],
            cluster.directory,
            f"serving volume {volume} at e{SHELF}.{slot} on {OURS}",
        )
        self.slot = slot
        self.disk = str(CONTROL / f"e{SHELF}.{slot}")
        self.sysfs = Path("/sys/block", f"etherd!e{SHELF}.{slot}")
        cluster.clients.append(self)

    def attach(self) -> Self:
        """Start it, and wait until the kernel has the disk."""
        self.start()
        until(lambda: os.path.exists(self.disk), "the kernel has found the disk")
        until(lambda: self.state.startswith("up"), "the kernel uses the disk")
        return self

    @property
    def sectors(self) -> int:
        """That the driver puts into a frame."""
        return int((self.sysfs / "payload").read_text()) // 512

    @property
    def state(self) -> str:
        """What the driver says of the disk: that it is up, with more words or without."""
        return (self.sysfs / "state").read_text().strip()


class Sniffer:
    """Sees the driver's frames as the target does, beginnings only; to be entered.

    Attributes:
        commands: (tag, ATA command, first sector, sectors) of each, in their order.
    """

    def __init__(self, slot: int) -> None:
        self.commands: list[tuple[int, int, int, int]] = []
        self._slot = slot
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        # At once: the driver waits until nobody has its frames any more.
        self._thread = threading.Thread(target=self._receive)

    def __enter__(self) -> Self:
        self._socket.bind((OURS, ETHERTYPE))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    @property
    def writes(self) -> list[tuple[int, int, int]]:
        """(Tag, first sector, sectors) of each write, in their order."""
        return [(tag, lba, count) for tag, code, lba, count in self.commands if code in WRITES]

    def _receive(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                frame = self._socket.recv(HEADER.size + ATA.size)
                _, _, _, flags, _, major, minor, kind, tag = HEADER.unpack_from(frame)
                if kind or flags & 8 or (major, minor) != (SHELF, self._slot):
                    continue
                _, _, count, code, lba = ATA.unpack_from(frame, HEADER.size)
                self.commands.append((tag, code, int.from_bytes(lba, "little"), count))


KEPT: list[mmap.mmap] = []
"""What was written directly. A frame between two interfaces of one machine refers to this memory
and has no data of its own: a copy that is still on its way must not have others by then."""


def write(path: str, data: bytes, offset: int = 0, *, direct: bool = True) -> None:
    """Write to a disk: past the kernel's memory, or through it, and then sync."""
    file = os.open(path, os.O_WRONLY | (os.O_DIRECT if direct else 0))
    try:
        aligned = mmap.mmap(-1, len(data))
        KEPT.append(aligned)
        aligned[:] = data
        assert os.pwrite(file, aligned, offset) == len(data)
        if not direct:
            os.fsync(file)
    finally:
        os.close(file)


def read(path: str, count: int, offset: int = 0) -> bytes:
    """Read a disk, and not what the kernel has in memory of it."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with contextlib.closing(mmap.mmap(-1, count)) as aligned:
            assert os.preadv(file, [aligned], offset) == count
            return aligned[:]
    finally:
        os.close(file)


def test_the_kernel_reads_what_it_wrote(cluster: Cluster, volume: str) -> None:
    """Directly and through its memory, with small frames and large ones."""
    for end in (OURS, KERNELS):
        shell("ip", "link", "set", end, "mtu", "1500")
    target = Target(cluster, volume, 1).attach()
    disk = target.disk
    assert int(shell("blockdev", "--getsize64", disk)) == SIZE
    assert shell("blockdev", "--getss", disk).strip() == "512"
    # It sends no flush: what is answered has to be durable.
    assert (target.sysfs / "queue" / "write_cache").read_text().strip() == "write through"
    data = random.Random(1).randbytes(MIB // 4)
    with Sniffer(1) as small:
        write(disk, data, MIB)
    assert {count for _, _, count in small.writes} == {2}
    assert read(disk, len(data), MIB) == data
    write(disk, b"x" * 512, 512)
    write(disk, b"y" * 4096, SIZE - 4096, direct=False)
    assert read(disk, 1024) == bytes(512) + b"x" * 512
    assert read(disk, 8192, SIZE - 8192) == bytes(4096) + b"y" * 4096

    for end in (KERNELS, OURS):
        shell("ip", "link", "set", end, "mtu", "9000")
    # The kernel does not ask by itself.
    until(lambda: target.sectors == 17, "the target has told that its frames are larger")
    with Sniffer(1) as large:
        write(disk, data, 2 * MIB)
    assert max(count for _, _, count in large.writes) == 17
    assert read(disk, len(data), 2 * MIB) == data
    for end in (OURS, KERNELS):
        shell("ip", "link", "set", end, "mtu", "1500")
        until(lambda: target.sectors == 2, "the target has told that its frames are smaller")
    assert read(disk, len(data), MIB) == data, "it does not go on to ask for large ones"
    for end in (KERNELS, OURS):
        shell("ip", "link", "set", end, "mtu", "9000")
    assert target.stop() == 0


def test_copies_of_a_command(cluster: Cluster, volume: str) -> None:
    """The driver gives each a tag of its own, and what comes late undoes nothing written next."""
    target = Target(cluster, volume, 8).attach()
    first, second = b"a" * 4096, b"b" * 4096
    # So much that the driver has learned how long answers take; and who opens first also reads.
    write(target.disk, bytes(MIB // 2))
    with (CONTROL / "err").open("rb", buffering=0) as file:
        os.set_blocking(file.fileno(), False)
        while file.read(4096):
            pass  # of other tests
        target.pause()
        with ThreadPoolExecutor(1) as pool, Sniffer(8) as sniffer:
            writing = pool.submit(write, target.disk, first)
            until(lambda: len(sniffer.writes) >= 2, "the driver sends again")
            target.resume()
            writing.result(timeout=120)
            write(target.disk, second)
        assert read(target.disk, 4096) == second
        said = b"".join(iter(lambda: file.read(4096) or b"", b"")).decode()
    (_, *again), (tag, _, _) = sniffer.writes[:-1], sniffer.writes[0]
    assert again and all(each[0] != tag for each in again)
    assert f"retransmit e{SHELF}.8 oldtag={tag:08x}" in said
    assert target.stop() == 0


def test_a_file_system_outlives_a_killed_target(
    cluster: Cluster, volume: str, tmp_path: Path
) -> None:
    """What was synced is there, and what was not yet answered goes on with the next process.

    Each copy of a command that the driver sends meanwhile has a tag of its own.
    """
    target = Target(cluster, volume, 2, "--wait-lock", str(WAIT_LOCK_S)).attach()
    shell("mkfs.ext4", "-q", target.disk)
    content = random.Random(2).randbytes(MIB // 2)
    with mounted(target.disk, tmp_path / "at") as at:
        with (at / "synced").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        target.kill()

        def write_late() -> None:
            with (at / "late").open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        with ThreadPoolExecutor(1) as pool, Sniffer(2) as sniffer:
            writing = pool.submit(write_late)
            until(lambda: sniffer.commands, "something waits for an answer")
            assert not writing.done()
            target.start()
            writing.result(timeout=120)
        assert (at / "late").read_bytes() == content
    # What was sent to nobody came again, and no tag did.
    tags = {tag for tag, *_ in sniffer.commands}
    assert len(tags) == len(sniffer.commands) > len({tuple(rest) for _, *rest in sniffer.commands})
    shell("fsck.ext4", "-fn", target.disk)
    with mounted(target.disk, tmp_path / "at", "-o", "ro") as at:
        assert (at / "synced").read_bytes() == (at / "late").read_bytes() == content
    assert target.stop() == 0


def test_a_target_that_is_only_read(cluster: Cluster, volume: str) -> None:
    """The kernel can read, and its writes get errors."""
    writer = Target(cluster, volume, 3).attach()
    write(writer.disk, b"1" * 4096)
    assert writer.stop() == 0
    reader = Target(cluster, volume, 4, "--read-only").attach()
    assert read(reader.disk, 4096) == b"1" * 4096
    for direct in (True, False):
        with pytest.raises(OSError) as caught:
            write(reader.disk, b"2" * 4096, direct=direct)
        assert caught.value.errno == errno.EIO
    assert read(reader.disk, 4096) == b"1" * 4096
    assert reader.stop() == 0


def test_a_bad_network(cluster: Cluster, volume: str) -> None:
    """Frames that are lost, doubled, late, and overtake others: the last write to a place stays."""
    target = Target(cluster, volume, 5).attach()
    regions, places, rounds, size = 4, 3, 2, 16 << 10
    last: dict[int, bytes] = {}

    def overwrite(region: int) -> None:
        rng = random.Random(region)
        for _ in range(rounds):
            for place in rng.sample(range(places), places):
                offset = (region * places + place) * size
                last[offset] = rng.randbytes(size)
                write(target.disk, last[offset], offset)

    bad = ("loss", "5%", "delay", "2ms", "reorder", "25%", "duplicate", "5%")
    for end in (OURS, KERNELS):
        shell("tc", "qdisc", "add", "dev", end, "root", "netem", *bad)
    try:
        with ThreadPoolExecutor(regions) as pool:
            list(pool.map(overwrite, range(regions)))
        whole = b"".join(last[offset] for offset in sorted(last))
        assert read(target.disk, len(whole)) == whole
    finally:
        for end in (OURS, KERNELS):
            shell("tc", "qdisc", "del", "dev", end, "root")
    assert target.stop() == 0


def test_a_volume_that_was_taken_over_gives_errors(cluster: Cluster, volume: str) -> None:
    """A frozen target whose volume somebody else has opened writes nothing any more."""
    zombie = Target(cluster, volume, 6).attach()
    write(zombie.disk, b"a" * 4096)
    zombie.pause()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(write, zombie.disk, b"c" * 4096)
        heir = Target(cluster, volume, 7, "--wait-lock", str(WAIT_LOCK_S)).attach()
        assert read(heir.disk, 4096) == b"a" * 4096
        write(heir.disk, b"b" * 4096)
        assert not late.done()
        zombie.resume()
        error = late.exception(timeout=120)
    assert isinstance(error, OSError) and error.errno == errno.EIO
    for attempt in (lambda: write(zombie.disk, b"d" * 4096), lambda: read(zombie.disk, 4096)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    assert read(heir.disk, 4096) == b"b" * 4096
    # It stays, so that nobody serves the volume's new content there, until it is told to end.
    assert zombie.running
    assert zombie.stop() == 1
    assert heir.stop() == 0
