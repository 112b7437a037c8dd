"""One suite for the real disk and the simulated one, and what only one of them has."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torus_actors.errors import Closed, Invalid, Locked, NotExist, OutOfSpace
from torus_actors.model.buffers import aligned
from torus_actors.storage import disk as disk_module
from torus_actors.storage.disk import DIRECT_UNIT, Disk, RealDisk, RealFile
from torus_actors.storage.simdisk import PowerCut, SimDisk


@pytest.fixture(params=["real", "sim"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """An empty data directory of each kind."""
    if request.param == "real":
        return RealDisk(tmp_path / "data" / "node")
    return SimDisk(random.Random(1))


def sim(seed: int = 1, **options: int) -> SimDisk:
    """A simulated disk with one synced file of 8 KiB of 'a'."""
    disk = SimDisk(random.Random(seed), **options)
    file = disk.open("f", create=True)
    file.pwrite(b"a" * 8192, 0)
    file.fdatasync()
    disk.fsync_dir()
    return disk


def test_bytes_come_back(disk: Disk) -> None:
    """What vectored calls write is what vectored reads see, at any offset and split."""
    file = disk.open("f", create=True)
    file.pwritev([b"abc", memoryview(b"defg"), bytearray(b"h")], 4095)
    assert file.size() == 4103
    first, second = bytearray(3), bytearray(4)
    assert file.preadv([first, memoryview(second)], 4096) == 7
    assert bytes(first + second) == b"bcdefgh"
    assert file.pread(100, 4094) == b"\0abcdefgh"
    assert file.pread(10, 5000) == b""
    assert disk.open("f").pread(3, 4095) == b"abc"
    file.close()


def test_bytes_come_back_wherever_they_lie(disk: Disk) -> None:
    """Reads of every length, over holes too, see what writes of every length left there."""
    rng = random.Random(7)
    size = 300_000
    model = bytearray(size)
    file = disk.open("f", create=True)
    file.truncate(size)
    for round_ in range(60):
        at = rng.choice((rng.randrange(size), rng.randrange(size // 4096) * 4096))
        # At first little is written, and what is read is mostly holes.
        length = min(rng.choice((1, 700, 4096, 5000, 12288)), size - at)
        data = rng.randbytes(length)
        file.pwritev([data[:100], data[100:]], at)
        model[at : at + length] = data
        if round_ % 7 == 0:
            file.fdatasync()
        first = rng.randrange(size)
        length = rng.choice((10, 4096, 20_000, size))
        assert file.pread(length, first) == model[first : first + length]
        assert file.pread(size, 0) == model


def test_read_ends_at_end_of_file(disk: Disk) -> None:
    """A read over the end of the file is short, and says by how much."""
    file = disk.open("f", create=True)
    file.pwrite(b"abc", 0)
    first, second = bytearray(2), bytearray(4)
    assert file.preadv([first, second], 0) == 3
    assert second[:1] == b"c"


def test_more_buffers_than_one_call_takes(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer lists than IOV_MAX are written and read whole."""
    monkeypatch.setattr(disk_module, "BUFFERS_MAX", 3)
    file = disk.open("f", create=True)
    pieces = [bytes([i]) * (i + 1) for i in range(10)]
    file.pwritev(pieces, 7)
    buffers = [bytearray(i + 1) for i in range(10)]
    assert file.preadv(buffers, 7) == 55
    assert [bytes(b) for b in buffers] == pieces


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that writes only part is followed by others until all is written."""
    real = os.pwritev

    def stingy(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [memoryview(buffers[0])[:2]], offset)

    monkeypatch.setattr(os, "pwritev", stingy)
    file = RealDisk(tmp_path).open("f", create=True)
    file.pwritev([b"abc", b"", b"defg"], 1)
    assert file.pread(8, 0) == b"\0abcdefg"


def _shifted(data: bytes) -> memoryview:
    """The same bytes in memory that begins on no page."""
    return memoryview(b"x" + data)[1:]


def test_direct_file_takes_any_memory(disk: Disk) -> None:
    """What goes past the page cache is what every kind of read then sees, in whole pages."""
    file = disk.open("f", create=True, size=1 << 20, direct=True)
    page, block = os.urandom(DIRECT_UNIT), os.urandom(128 << 10)
    first, second = aligned(len(page)), aligned(len(block))
    first[:], second[:] = page, block
    file.pwritev([first, second], 0)
    file.pwritev([_shifted(page), _shifted(block)], 256 << 10)
    file.fdatasync()
    for start in (0, 256 << 10):
        assert file.pread(len(page) + len(block), start) == page + block
        assert file.pread(100, start + 4000) == (page + block)[4000:4100]
        into = aligned(len(page) + len(block))
        assert file.preadv([into], start) == len(into)
        assert into == page + block
    assert disk.open("f").pread(len(page), 256 << 10) == page
    # Over what the page cache holds from these reads.
    file.pwritev([second], DIRECT_UNIT * 40)
    file.pwritev([second], 0)
    assert file.pread(len(block), 0) == block
    file.close()


@pytest.mark.parametrize("direct", [False, True])
def test_what_the_disk_has_is_read_whether_it_is_synced_or_not(disk: Disk, direct: bool) -> None:
    """And where the page cache has it, too; short only at the end of the file."""
    file = disk.open("f", create=True, size=4 * DIRECT_UNIT, direct=direct)
    data = os.urandom(2 * DIRECT_UNIT)
    file.pwrite(data, DIRECT_UNIT)
    into = aligned(2 * DIRECT_UNIT)
    for _ in range(2):
        assert file.read_medium(into, DIRECT_UNIT) == len(into)
        assert into == data == file.pread(len(data), DIRECT_UNIT)
        file.fdatasync()
    assert file.read_medium(into, 3 * DIRECT_UNIT) == DIRECT_UNIT
    file.close()
    with pytest.raises(Closed):
        file.read_medium(into, 0)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_what_the_disk_has_is_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, refused: bool
) -> None:
    """Where the file system can do that; else as ever. No descriptor stays open."""
    file = RealDisk(tmp_path).open("f", create=True, size=DIRECT_UNIT, direct=direct)
    ways: list[bool] = []
    real = os.preadv

    def noted(fd: int, *args: Any) -> int:
        ways.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        if ways[-1] and refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, *args)

    monkeypatch.setattr(disk_module.os, "preadv", noted)
    before = len(os.listdir("/proc/self/fd"))
    assert file.read_medium(aligned(DIRECT_UNIT), 0) == DIRECT_UNIT
    assert len(os.listdir("/proc/self/fd")) == before
    assert ways == ([True, False] if refused else [True])
    file.close()


def test_rot_under_the_cache() -> None:
    """It shows where the medium is read, and after the power was lost, but in no other read."""
    disk = sim()
    file = disk.open("f")
    disk.rot("f", 10, cached=True)
    assert file.pread(8192, 0) == b"a" * 8192
    into = aligned(4096)
    assert file.read_medium(into, 0) == 4096
    assert into[10] == 0xFF ^ ord("a")
    assert file.pread(8192, 0) == b"a" * 8192
    disk = sim()
    disk.rot("f", 10, cached=True)
    assert disk.crash().open("f").pread(1, 10) != b"a"


def test_direct_file_where_direct_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that refuses each direct call is used through the page cache instead."""
    file = RealDisk(tmp_path).open("f", create=True, size=1 << 20, direct=True)
    assert isinstance(file, RealFile)
    direct, write, read = file._direct_fd, os.pwritev, os.preadv

    def refuse(call: Any) -> Any:
        def checked(fd: int, *args: Any) -> int:
            if fd == direct and direct >= 0:
                raise OSError(errno.EINVAL, "Invalid argument")
            return int(call(fd, *args))

        return checked

    monkeypatch.setattr(disk_module.os, "pwritev", refuse(write))
    monkeypatch.setattr(disk_module.os, "preadv", refuse(read))
    block = os.urandom(128 << 10)
    file.pwrite(block, 4096)
    file.pwrite(block, 256 << 10)
    assert file.pread(len(block), 4096) == block == file.pread(len(block), 256 << 10)
    file.close()


def test_direct_write_keeps_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the medium is not taken for memory in the wrong place."""
    file = RealDisk(tmp_path).open("f", create=True, size=1 << 20, direct=True)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk_module.os, "pwritev", broken)
    with pytest.raises(OSError, match="cannot write"):
        file.pwrite(bytes(4096), 0)
    monkeypatch.undo()
    file.close()


def test_size_changes(disk: Disk) -> None:
    """Truncation cuts and extends with zeros; reserving never shrinks."""
    file = disk.open("f", create=True, size=6000)
    assert file.size() == 6000
    file.pwrite(b"x" * 6000, 0)
    file.allocate(100)
    assert file.size() == 6000
    file.truncate(10)
    file.allocate(5000)
    assert file.pread(6000, 0) == b"x" * 10 + bytes(4990)
    file.truncate(20)
    file.fdatasync()
    file.truncate(8000)
    assert file.pread(9000, 0) == b"x" * 10 + bytes(7990)


def test_names(disk: Disk) -> None:
    """Files are made, listed, renamed over others and removed."""
    assert disk.listdir() == []
    disk.mkdir("sub/deep")
    disk.open("b", create=True).pwrite(b"b", 0)
    disk.open("a", create=True).pwrite(b"a", 0)
    disk.open("sub/deep/c", create=True)
    assert disk.listdir() == ["a", "b"]
    assert disk.listdir("sub/deep") == ["c"]
    assert disk.listdir("nowhere") == []
    disk.rename("a", "b")
    assert not disk.exists("a")
    assert disk.open("b").pread(1, 0) == b"a"
    disk.unlink("b")
    assert not disk.exists("b")
    disk.fsync_dir()
    disk.fsync_dir("sub/deep")
    with pytest.raises(Invalid):
        disk.rename("sub/deep/c", "c")


@pytest.mark.parametrize("there", ["", "data", "data/node"])
def test_directories_are_durable_before_anything_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """Also those that a process made that was killed before it synced them, or could not.

    Found by review: they were taken for durable because they were there. A power cut could take
    them with all that was flushed in them since.
    """
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    RealDisk(tmp_path / "data" / "node")
    assert str(tmp_path / "data") in synced
    if there != "data/node":
        assert str(tmp_path) in synced
    (tmp_path / "data" / "node" / "f").touch()
    synced.clear()
    RealDisk(tmp_path / "data" / "node")
    assert not synced


def test_an_empty_directory_on_what_knows_no_sync_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point below a read-only image or an automounter: there is nothing to make durable.

    Found by review: a node whose new disk was mounted there did not start.
    """

    def fail(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(disk_module.os, "fsync", fail)
    assert RealDisk(tmp_path / "data").listdir() == []
    with pytest.raises(OSError, match="cannot sync"):
        RealDisk(tmp_path / "data" / "node")


def test_missing_files(disk: Disk) -> None:
    """What needs a file that is not there says so by name."""
    for action in (
        lambda: disk.open("gone"),
        lambda: disk.unlink("gone"),
        lambda: disk.rename("gone", "other"),
    ):
        with pytest.raises(NotExist, match="gone"):
            action()


def test_closed_file(disk: Disk) -> None:
    """A closed file refuses everything; closing twice is allowed."""
    file = disk.open("f", create=True)
    file.close()
    file.close()
    for action in (
        lambda: file.pread(1, 0),
        lambda: file.preadv_nowait([bytearray(1)], 0),
        lambda: file.pwrite(b"x", 0),
        file.fdatasync,
        file.size,
        lambda: file.truncate(0),
    ):
        with pytest.raises(Closed):
            action()


def test_lock_is_exclusive(disk: Disk) -> None:
    """A data directory is opened once at a time, and the refusal is one plain line."""
    lock = disk.lock()
    with pytest.raises(Locked, match="in use by another process") as refusal:
        disk.lock()
    assert "\n" not in str(refusal.value)
    lock.release()
    lock.release()
    disk.lock().release()


def test_a_directory_that_cannot_be_locked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems know no locks; the file is not left open."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk_module.fcntl, "flock", fail)
    disk = RealDisk(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"cannot lock: No locks available: .*/lock"):
        disk.lock()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_write_past_the_page_cache_is_whole_pages() -> None:
    """The simulated disk insists on it: a real one goes through the cache from then on."""
    disk = sim()
    file = disk.open("f", direct=True)
    file.pwritev([bytes(100), bytes(DIRECT_UNIT - 100)], DIRECT_UNIT)
    for data, offset in ((bytes(100), 0), (bytes(DIRECT_UNIT), 512)):
        with pytest.raises(AssertionError):
            file.pwrite(data, offset)
        disk.open("f").pwrite(data, offset)


def test_lock_survives_a_late_release(disk: Disk) -> None:
    """Releasing a lock twice does not take it from the next holder."""
    first = disk.lock()
    first.release()
    second = disk.lock()
    first.release()
    with pytest.raises(Locked):
        disk.lock()
    second.release()


def test_read_from_memory(disk: Disk) -> None:
    """A read that must not wait serves what was just written, or says that it cannot."""
    file = disk.open("f", create=True)
    file.pwrite(b"abcd", 0)
    buffer = bytearray(4)
    count = file.preadv_nowait([buffer], 0)
    assert count is None or (count == 4 and buffer == b"abcd")


def test_real_nowait_gives_up_where_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without cached reads is asked once; one that would block answers None."""
    file = RealDisk(tmp_path).open("f", create=True)
    calls = []

    def preadv(error: int) -> None:
        def fail(*_: object) -> int:
            calls.append(error)
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "preadv", fail)

    preadv(errno.EAGAIN)
    assert file.preadv_nowait([bytearray(1)], 0) is None
    preadv(errno.EIO)
    with pytest.raises(OSError, match="cannot read"):
        file.preadv_nowait([bytearray(1)], 0)
    preadv(errno.EOPNOTSUPP)
    assert file.preadv_nowait([bytearray(1)], 0) is None
    assert file.preadv_nowait([bytearray(1)], 0) is None
    assert calls == [errno.EAGAIN, errno.EIO, errno.EOPNOTSUPP]


def test_real_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservation that does not fit leaves the file, and the directory, as they were."""

    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    disk = RealDisk(tmp_path)
    file = disk.open("old", create=True, size=100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfSpace, match="the disk is full"):
        file.allocate(1000)
    assert file.size() == 100
    with pytest.raises(OutOfSpace):
        disk.open("new", create=True, size=1000)
    assert disk.listdir() == ["old"]
    with pytest.raises(OutOfSpace):
        disk.open("old", size=1000)
    assert disk.listdir() == ["old"]
    assert disk.free_bytes() > 0


def test_real_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the medium stays an OSError, with action and path in its text."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = RealDisk(tmp_path).open("f", create=True)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match=r"cannot sync: Input/output error: .*/f") as failure:
        file.fdatasync()
    assert failure.value.errno == errno.EIO


def test_a_real_sync_reaches_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No simulation sees it, and without it all of them pass."""
    synced: list[str] = []

    def noted(call: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            call(descriptor)

        return sync

    disk = RealDisk(tmp_path / "d")
    disk.mkdir("")
    file = disk.open("f", create=True)
    monkeypatch.setattr(os, "fdatasync", noted(os.fdatasync))
    monkeypatch.setattr(os, "fsync", noted(os.fsync))
    file.pwrite(b"x", 0)
    file.fdatasync()
    disk.fsync_dir()
    assert synced == ["f", "d"]


# What only the simulated one has.


def test_synced_bytes_survive_a_crash() -> None:
    """A sync makes all writes before it durable, in files whose names are synced."""
    after = sim().crash()
    assert after.open("f").pread(9000, 0) == b"a" * 8192


def test_unsynced_bytes_survive_in_any_subset() -> None:
    """Over many crashes every sector is seen old and new, and nothing else is."""
    seen: set[bytes] = set()
    torn = 0
    for seed in range(60):
        disk = sim(seed)
        disk.open("f").pwrite(b"b" * 2048, 1024)
        assert disk.open("f").pread(8192, 0) == b"a" * 1024 + b"b" * 2048 + b"a" * 5120
        content = disk.crash().open("f").pread(8192, 0)
        assert content[:1024] == b"a" * 1024
        assert content[3072:] == b"a" * 5120
        sectors = [content[at : at + 512] for at in range(1024, 3072, 512)]
        assert all(len(set(sector)) == 1 for sector in sectors)
        torn += len(set(sectors)) > 1
        seen.update(sectors)
    assert seen == {b"a" * 512, b"b" * 512}
    assert torn > 10


def test_small_write_takes_its_sector_along() -> None:
    """A write of less than a sector is there whole or not at all, with its neighbours intact."""
    outcomes = set()
    for seed in range(30):
        disk = sim(seed)
        disk.open("f").pwrite(b"b" * 100, 4000)
        content = disk.crash().open("f").pread(8192, 0)
        assert content.replace(b"b", b"a") == b"a" * 8192
        outcomes.add(content.count(b"b"))
    # 4000 to 4096 ends one sector, 4096 to 4100 begins the next.
    assert outcomes == {0, 4, 96, 100}


def test_unsynced_names_may_be_lost() -> None:
    """New names, renames and removals last only once their directory is synced."""
    outcomes = set()
    for seed in range(60):
        disk = sim(seed)
        disk.open("g", create=True)
        disk.rename("f", "h")
        outcomes.add(tuple(disk.crash().listdir()))
    assert outcomes == {("f",), ("f", "g"), ("h",), ("g", "h")}
    disk = sim()
    disk.rename("f", "h")
    disk.fsync_dir()
    assert disk.crash().listdir() == ["h"]
    disk = sim()
    disk.unlink("f")
    disk.fsync_dir()
    assert disk.crash().listdir() == []


def test_unsynced_sizes_may_be_lost() -> None:
    """Growing and cutting a file last only once it is synced."""
    for grow, sizes in ((True, {8192, 12288}), (False, {8192, 100})):
        outcomes = set()
        for seed in range(30):
            disk = sim(seed)
            file = disk.open("f")
            if grow:
                file.allocate(12288)
            else:
                file.truncate(100)
            after = disk.crash().open("f")
            outcomes.add(after.size())
            assert after.pread(20000, 0) == (b"a" * 8192)[: after.size()].ljust(after.size(), b"\0")
        assert outcomes == sizes


def test_failed_sync_lies_afterwards() -> None:
    """After a failed sync the cache may show what the disk lost, and a later sync does not help.

    Or it lets go of that, and what is on the disk is read.
    """
    lost = kept = 0
    for seed in range(30):
        disk = sim(seed)
        disk.inject("sync")
        file = disk.open("f")
        file.pwrite(b"b" * 4096, 0)
        with pytest.raises(OSError):
            file.fdatasync()
        file.fdatasync()
        seen = file.pread(4096, 0)
        after = disk.crash().open("f").pread(4096, 0)
        assert seen in (b"b" * 4096, after)
        kept += seen != after
        lost += after != b"b" * 4096
        # Writing the same again does.
        disk = sim(seed)
        disk.inject("sync")
        file = disk.open("f")
        file.pwrite(b"b" * 4096, 0)
        with pytest.raises(OSError):
            file.fdatasync()
        file.pwrite(b"b" * 4096, 0)
        file.fdatasync()
        assert disk.crash().open("f").pread(4096, 0) == b"b" * 4096
    assert lost > 10 and 5 < kept < lost


def test_power_cut_ends_everything() -> None:
    """From the cut on, no call of the old disk or its files returns."""
    disk = sim()
    file = disk.open("f")
    disk.cut_before(2)
    file.pwrite(b"x", 0)
    file.fdatasync()
    for action in (
        lambda: file.pwrite(b"y", 0),
        lambda: file.pread(1, 0),
        lambda: disk.open("f"),
        disk.listdir,
        disk.lock,
    ):
        with pytest.raises(PowerCut):
            action()
    assert disk.crash().open("f").pread(1, 0) == b"x"


def test_cut_on_demand() -> None:
    """A scenario can cut the power between operations too."""
    disk = sim()
    disk.cut_power()
    with pytest.raises(PowerCut):
        disk.open("f")


def test_kill_keeps_the_cache() -> None:
    """Killing the process ends locks and handles, and loses no finished write."""
    disk = sim()
    disk.lock()
    file = disk.open("f")
    file.pwrite(b"b", 0)
    after = disk.kill()
    with pytest.raises(PowerCut):
        file.pread(1, 0)
    after.lock()
    assert after.open("f").pread(2, 0) == b"ba"


def test_injected_errors() -> None:
    """Faults hit the given kind, file, place in the sequence and number of times."""
    disk = sim()
    file = disk.open("f")
    disk.inject("write", skip=1, times=2)
    disk.inject("write", path="other")
    file.pwrite(b"1", 0)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot write: Input/output error: 'f'"):
            file.pwrite(b"2", 0)
    file.pwrite(b"3", 0)
    disk.inject("read")
    with pytest.raises(OSError):
        file.pread(1, 0)
    assert file.pread(1, 0) == b"3"
    disk.inject("write", errno.ENOSPC)
    with pytest.raises(OutOfSpace):
        file.pwrite(b"4", 0)


def test_capacity() -> None:
    """The files together hold no more than the disk; refused growth changes nothing."""
    disk = sim(capacity_bytes=10_000)
    assert disk.free_bytes() == 10_000 - 8192
    with pytest.raises(OutOfSpace):
        disk.open("g", create=True, size=5000)
    assert disk.listdir() == ["f"]
    file = disk.open("f")
    with pytest.raises(OutOfSpace):
        file.pwrite(bytes(4096), 8192)
    assert file.size() == 8192
    file.pwrite(bytes(1000), 8192)
    assert disk.free_bytes() == 10_000 - 9192


def test_bit_rot() -> None:
    """Rot changes just those bytes, for readers and for good."""
    disk = sim()
    disk.rot("f", 4095, 2)
    rotten = b"a" * 4095 + b"\x9e\x9e" + b"a" * 4095
    assert disk.open("f").pread(8192, 0) == rotten
    assert disk.crash().open("f").pread(8192, 0) == rotten


def test_a_page_that_cannot_be_read_is_written_as_a_whole_only() -> None:
    """Linux reads what is around the bytes first. What was refused has changed nothing."""
    disk = sim()
    disk.make_unreadable("f", 4096)
    file = disk.open("f")
    for data, offset in ((b"x", 4096), (bytes(4096), 4000), (bytes(4096), 4097)):
        with pytest.raises(OSError, match="cannot read what is around"):
            file.pwrite(data, offset)
    with pytest.raises(OSError, match="cannot read"):
        file.pread(1, 4096)
    file.pwrite(b"x" * 4096, 4096)
    assert file.pread(4097, 4095) == b"a" + b"x" * 4096
    file.pwrite(b"y", 4096)


def test_cache_misses_are_seeded() -> None:
    """Which reads miss the cache depends on the seed alone."""

    def misses(seed: int) -> list[bool]:
        file = sim(seed, miss_percent=50).open("f")
        return [file.preadv_nowait([bytearray(1)], 0) is None for _ in range(40)]

    assert misses(1) == misses(1) != misses(2)
    assert 5 < sum(misses(1)) < 35


def test_memory_is_sparse() -> None:
    """Zeros take no memory, and synced bytes take theirs once."""
    disk = SimDisk(random.Random(1))
    file = disk.open("f", create=True, size=1 << 40 >> 1)
    assert disk.memory_bytes() == 0
    file.pwrite(b"x" * 4096, 1 << 30)
    file.fdatasync()
    assert disk.memory_bytes() == 4096
