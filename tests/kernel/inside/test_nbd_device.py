"""``torusblk nbd`` and the Linux kernel: run by `test_devices` in a guest whose kernel has nbd."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster
from tests.kernel.inside.forked import Fork, ForkedProcess
from tests.kernel.inside.system import MIB, SIZE, mounted, shell
from torus_actors.nbd import keeper
from torus_actors.nbd.genetlink import attribute
from torus_actors.scenarios.processes import command, until

LEASE_S = 6


class Attached(ForkedProcess):
    """A ``torusblk nbd``."""

    @property
    def path(self) -> str:
        """The device."""
        return self.output.partition(self.ready)[2].split()[0]

    def lives(self) -> bool:
        """Whether the kernel has it."""
        return Path("/sys/block", os.path.basename(self.path), "pid").exists()


def device(cluster: Cluster, volume: str, *options: str) -> Attached:
    """A process that attaches a volume, and was not started yet."""
    process = Attached(
        f"attached-{len(cluster.clients)}",
        [*command("torusblk", "nbd", volume), "-C", cluster.metadata, *options],
        cluster.directory,
        f"serving volume {volume} at ",
    )
    cluster.clients.append(process)
    return process


def attach(cluster: Cluster, volume: str, *options: str) -> Attached:
    """Attach a volume."""
    process = device(cluster, volume, *options)
    process.start()
    return process


def refused(cluster: Cluster, volume: str, *options: str) -> str:
    """Why a volume cannot be attached: the one line that the command prints."""
    process = device(cluster, volume, *options)
    process.launch()
    assert process.wait() == 1
    assert process.output.count("\n") == 1
    return process.output


def read(path: str, count: int, offset: int = 0) -> bytes:
    """Read a device, and not what the kernel has in memory of it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file, count, offset)
    finally:
        os.close(file)


def write(path: str, data: bytes, offset: int = 0) -> None:
    """Write to a device that nobody else uses meanwhile, as if mounted, and sync."""
    file = os.open(path, os.O_WRONLY | os.O_EXCL)
    try:
        assert os.pwrite(file, data, offset) == len(data)
        os.fsync(file)
    finally:
        os.close(file)


def test_the_kernel_reads_what_it_wrote(cluster: Cluster, volume: str) -> None:
    """Also after the device was detached and attached again; what was discarded is zeros."""
    attached = attach(cluster, volume)
    queue = Path("/sys/block", os.path.basename(attached.path), "queue")
    assert int(shell("blockdev", "--getsize64", attached.path)) == SIZE
    assert shell("blockdev", "--getss", attached.path).strip() == "512"
    # Else no file system would send a flush.
    assert (queue / "write_cache").read_text().strip() == "write back"
    assert (queue / "fua").read_text().strip() == "1"
    data = random.Random(1).randbytes(8 * MIB)
    write(attached.path, data, MIB)
    write(attached.path, b"x" * 512, 512)
    assert read(attached.path, 8 * MIB, MIB) == data
    assert attached.stop() == 0
    again = attach(cluster, volume, "/dev/nbd5")
    assert again.path == "/dev/nbd5"
    sysfs = Path("/sys/block/nbd5/pid")
    assert sysfs.exists()
    assert read(again.path, 8 * MIB, MIB) == data
    assert read(again.path, 1024) == bytes(512) + b"x" * 512
    shell("blkdiscard", "-o", str(2 * MIB), "-l", str(2 * MIB), again.path)
    assert read(again.path, 8 * MIB, MIB) == data[:MIB] + bytes(2 * MIB) + data[3 * MIB :]
    assert again.stop() == 0
    assert not sysfs.exists()
    # One that the kernel makes for it.
    more = attach(cluster, volume, "nbd77")
    assert read(more.path, MIB, MIB) == data[:MIB]
    assert more.stop() == 0


def test_a_mounted_device_stays_until_it_is_unmounted(
    cluster: Cluster, volume: str, tmp_path: Path
) -> None:
    """What a file system has not written yet is in the volume when the command has ended."""
    attached = attach(cluster, volume)
    shell("mkfs.ext4", "-q", attached.path)
    content = random.Random(2).randbytes(3 * MIB)
    with mounted(attached.path, tmp_path / "at") as at:
        (at / "first").write_bytes(content)
        attached.ask_to_stop()
        until(lambda: "is in use" in attached.output, "the command says why it goes on")
        (at / "second").write_bytes(content)
        assert attached.running
    assert attached.wait() == 0
    again = attach(cluster, volume)
    shell("fsck.ext4", "-fn", again.path)
    with mounted(again.path, tmp_path / "at", "-o", "ro") as at:
        assert (at / "first").read_bytes() == (at / "second").read_bytes() == content
    # Not all that a program writes to a device goes through a file system.
    file = os.open(again.path, os.O_WRONLY)
    os.pwrite(file, content, 32 * MIB)
    os.close(file)
    assert again.stop() == 0
    last = attach(cluster, volume, "--read-only")
    assert shell("blockdev", "--getro", last.path).strip() == "1"
    assert read(last.path, len(content), 32 * MIB) == content
    assert last.stop() == 0


def test_a_killed_command_leaves_errors_and_what_was_synced(
    cluster: Cluster, volume: str, tmp_path: Path
) -> None:
    """Nobody waits for ever for a device whose server is gone, and nothing that was synced is."""
    attached = attach(cluster, volume)
    path = attached.path
    shell("mkfs.ext4", "-q", path)
    content = random.Random(3).randbytes(2 * MIB)
    with mounted(path, tmp_path / "at") as at:
        with (at / "synced").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shell("sync", "-f", str(at))
        attached.kill()
        with pytest.raises(OSError) as caught, (at / "late").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        assert caught.value.errno in (errno.EIO, errno.EROFS)
        # What is mounted there would write into the volume that is attached to it. The lock of the
        # one that was killed goes with its lease.
        told = refused(cluster, volume, path, "--wait-lock", str(10 * LEASE_S))
        assert "is in use" in told
    again = attach(cluster, volume, path)
    with mounted(path, tmp_path / "at") as at:
        assert (at / "synced").read_bytes() == content
    shell("fsck.ext4", "-fn", again.path)
    assert again.stop() == 0


def write_on(path: str, direct: bool) -> Fork:
    """A process that writes to a device until it gets an error."""

    def work() -> None:
        flags = os.O_WRONLY | os.O_EXCL | (os.O_DIRECT if direct else 0)
        file = os.open(path, flags)
        with mmap.mmap(-1, MIB) as page:
            for at in itertools.cycle(range(0, SIZE, MIB)):
                os.pwrite(file, page, at)

    return Fork(work)


def test_who_waits_for_a_killed_command_gets_an_error(cluster: Cluster, volume: str) -> None:
    """Also of what it had sent already, which the kernel would wait for without end."""
    attached = attach(cluster, volume)
    writing = write_on(attached.path, direct=True)
    time.sleep(2.0)
    # It does not answer when it is killed: what has been sent to it is under way.
    attached.pause()
    time.sleep(1.0)
    assert writing.poll() is None
    attached.kill()
    assert writing.wait(30.0) == 1
    until(lambda: not attached.lives(), "the kernel lets go of the device")


def test_a_killed_command_is_not_waited_for(cluster: Cluster, volume: str) -> None:
    """What the kernel has in memory for a device whose server is gone keeps nobody."""
    attached = attach(cluster, volume)
    attached.pause()
    file = os.open(attached.path, os.O_WRONLY)
    os.pwrite(file, bytes(16 * MIB), 0)
    closing = threading.Thread(target=os.close, args=(file,))
    closing.start()
    time.sleep(1.0)
    attached.kill()
    closing.join(30.0)
    assert not closing.is_alive()
    until(lambda: not attached.lives(), "the kernel lets go of the device")


def test_the_second_signal_ends_it(cluster: Cluster, volume: str) -> None:
    """Where no node answers, what is to be synced has no end."""
    attached = attach(cluster, volume)
    with open(attached.path, "r+b", buffering=0) as file:
        file.write(bytes(MIB))
        for node in cluster.nodes.values():
            node.pause()
        try:
            attached.ask_to_stop()
            time.sleep(3.0)
            assert attached.running
            attached.ask_to_stop()
            assert attached.wait() == 1
        finally:
            for node in cluster.nodes.values():
                node.resume()
    until(lambda: not attached.lives(), "the kernel lets go of the device")


def test_devices_are_not_taken_from_others(cluster: Cluster, volume: str) -> None:
    """A device in use, and a volume in use, are told in one line; the next device is taken."""
    cluster.ctl("volume", "create", f"{volume}-2", str(SIZE))
    first = attach(cluster, volume)
    assert refused(cluster, f"{volume}-2", first.path) == (
        f"torusblk: {first.path} is in use: name another one, or none for the first that is free\n"
    )
    assert "is held by" in refused(cluster, volume)
    second = attach(cluster, f"{volume}-2")
    assert second.path != first.path
    write(first.path, b"1" * 4096)
    write(second.path, b"2" * 4096)
    assert (read(first.path, 4096), read(second.path, 4096)) == (b"1" * 4096, b"2" * 4096)
    # As `nbd-client -d` does: the command ends, and says why.
    index = int(second.path.removeprefix("/dev/nbd")).to_bytes(4, "little")
    with contextlib.closing(keeper.Netlink()) as netlink:
        netlink.ask(keeper.DISCONNECT, [attribute(keeper.INDEX, index)])
    assert second.wait() == 1
    assert "was detached by another program" in second.output
    # The other one is as it was.
    assert read(first.path, 4096) == b"1" * 4096
    assert first.stop() == 0


def test_a_volume_that_was_taken_over_gives_errors(cluster: Cluster, volume: str) -> None:
    """A frozen client whose volume somebody else has opened writes nothing any more."""
    zombie = attach(cluster, volume)
    write(zombie.path, b"a" * 4096)
    zombie.pause()
    heir = attach(cluster, volume, "--wait-lock", str(20 * LEASE_S))
    write(heir.path, b"b" * 4096)
    late: list[OSError] = []

    def write_late() -> None:
        try:
            write(path, b"c" * 4096)
        except OSError as error:
            late.append(error)

    path = zombie.path
    writing = threading.Thread(target=write_late)
    writing.start()
    time.sleep(1.0)
    zombie.resume()
    writing.join(240)
    assert [error.errno for error in late] == [errno.EIO]
    # Nobody uses the device any more.
    assert zombie.wait() == 1
    assert zombie.output.splitlines()[-1].startswith(
        f"torusblk: volume {volume} was taken over by another client"
    )
    assert read(heir.path, 4096) == b"b" * 4096
    assert heir.stop() == 0
