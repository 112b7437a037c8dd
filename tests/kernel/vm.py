"""A Debian kernel under qemu, for tests that need more of Linux than this machine's kernel has.

The guest sees the host's root file system, read-only beneath a layer of memory, and runs a shell
script in it: with the same programs, the same Python and the same checkout as the test. Nothing
that it writes reaches the host, except into `/run/exchange`. There is no network but loopback.
The processor is emulated, so that Python is some thirty times slower than on the host.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "linux-image-amd64"
"""Debian's kernel. The smaller one for clouds has no 9p."""

BASE_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What the guest needs to see the host's files."""

SOFT_DEPENDENCIES = {"ext4": ("crc32c_generic",)}
"""Modules that others ask for by an alias, when they are already at work."""

UNPACKED = (
    "./boot/vmlinuz-*",
    "./lib/modules/*/kernel/crypto/*",
    "./lib/modules/*/kernel/drivers/block/*",
    "./lib/modules/*/kernel/drivers/net/veth.ko",
    "./lib/modules/*/kernel/drivers/virtio/*",
    "./lib/modules/*/kernel/fs/9p/*",
    "./lib/modules/*/kernel/fs/ext4/*",
    "./lib/modules/*/kernel/fs/fscache/*",
    "./lib/modules/*/kernel/fs/jbd2/*",
    "./lib/modules/*/kernel/fs/mbcache.ko",
    "./lib/modules/*/kernel/fs/netfs/*",
    "./lib/modules/*/kernel/fs/overlayfs/*",
    "./lib/modules/*/kernel/lib/*",
    "./lib/modules/*/kernel/net/9p/*",
    "./lib/modules/*/kernel/net/sched/sch_netem.ko",
)
"""Of the package's 400 MB, the folders and files with modules that tests ask for."""

MEMORY_MIB = 1536
BOOT_TIMEOUT_S = 180.0
"""From qemu's start to the script's; it takes about 10 s where two cores are free."""
DOWNLOAD_TIMEOUT_S = 600.0
POLL_S = 0.1

INIT = """\
#!/bin/busybox sh
# A step that fails is seen on the console, and by the script never being started.
set -e
mount() { /bin/busybox mount "$@"; }
mount -t proc proc /proc
for module in MODULES; do
    /bin/busybox insmod "/modules/$module.ko"
done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs memory /memory
/bin/busybox mkdir /memory/files /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/files,workdir=/memory/work root /root
mount -t devtmpfs devices /root/dev
/bin/busybox mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts terminals /root/dev/pts
mount -t tmpfs -o mode=1777 memory /root/dev/shm
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
# What runs on the host has its sockets and locks here.
mount -t tmpfs memory /root/run
/bin/busybox mkdir /root/run/exchange /root/run/lock /root/run/work
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 exchange /root/run/exchange
/bin/busybox ip link set lo up
echo > /root/run/exchange/started
set +e
/bin/busybox chroot /root /bin/sh /run/exchange/script \\
    < /root/dev/null > /root/run/exchange/output 2>&1
# Whole, or not there: the host looks at any time.
echo $? > /root/run/exchange/status.new
/bin/busybox mv /root/run/exchange/status.new /root/run/exchange/status
/bin/busybox poweroff -f
"""


class GuestFailed(Exception):
    """The guest did not come to the end of its script; the text has what it printed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a script that ran to its end.

    Attributes:
        status: The script's exit status.
        output: What it wrote to standard output and error.
        console: What the kernel had to say: warnings and worse.
    """

    status: int
    output: str
    console: str


@dataclass(frozen=True, slots=True)
class _Kernel:
    image: Path
    modules: dict[str, Path]

    def in_order(self, wanted: Iterable[str]) -> list[str]:
        """Modules with all that they depend on, each after what it depends on."""
        ordered: list[str] = []

        def add(name: str) -> None:
            if name not in ordered:
                for other in (*_depends(self.modules[name]), *SOFT_DEPENDENCIES.get(name, ())):
                    add(other)
                ordered.append(name)

        for name in wanted:
            add(name)
        return ordered


def require_vm() -> None:
    """Skip the calling test where no guest can be run; fail instead where CI=true."""
    programs = ("apt-get", "busybox", "dpkg-deb", "qemu-system-x86_64", "tar")
    missing = [program for program in programs if shutil.which(program) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else ""
    if platform.machine() != "x86_64":
        reason = "the guest is an x86-64 machine that runs the host's programs"
    if not reason:
        try:
            _kernel()
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"no kernel for the guest: {error}"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def run_in_vm(script: str, *, modules: Sequence[str], timeout_s: float) -> Outcome:
    """Boot a guest, run a script there as root with /bin/sh, and turn the guest off.

    The script begins in an empty folder in memory, `/run/work`, with the test's PYTHONPATH, and
    with the folder of the test's Python before the standard ones on its PATH.

    Args:
        script: Text of the script.
        modules: Kernel modules to load before it starts, by name; what they depend on is loaded
            too.
        timeout_s: Limit for the script, from its start.

    Raises:
        GuestFailed: The kernel did not boot or crashed, or the script ran out of time.
    """
    kernel = _kernel()
    with tempfile.TemporaryDirectory(prefix="torus-vm-") as folder:
        exchange = Path(folder, "exchange")
        exchange.mkdir()
        (exchange / "script").write_text(_preamble() + script)
        initramfs = Path(folder, "initramfs")
        initramfs.write_bytes(_initramfs(kernel, (*BASE_MODULES, *modules)))
        console = Path(folder, "console")
        console.touch()
        guest = subprocess.Popen(_command(kernel.image, initramfs, exchange, console))
        try:
            ended = _wait(guest, exchange, timeout_s)
        finally:
            guest.kill()
            guest.wait()
        output, printed = _text(exchange / "output"), _text(console)
        status = _text(exchange / "status").strip()
    if not status:
        raise GuestFailed(f"the guest {ended}; script:\n{output}\nconsole:\n{printed}")
    return Outcome(int(status), output, printed)


def _preamble() -> str:
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": f"{path}:/sbin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "TMPDIR": "/run/work",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines, "cd /run/work", ""])


def _command(image: Path, initramfs: Path, exchange: Path, console: Path) -> list[str]:
    share = "local,security_model=none,multidevs=remap"
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
        *("-kernel", str(image), "-initrd", str(initramfs)),
        # A kernel that panics restarts at once, and qemu ends instead.
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"),
        *("-serial", f"file:{console}"),
        *("-virtfs", f"{share},path=/,mount_tag=host,readonly=on"),
        *("-virtfs", f"{share},path={exchange},mount_tag=exchange"),
    ]


def _wait(guest: subprocess.Popen[bytes], exchange: Path, timeout_s: float) -> str:
    """How the guest came to its end, or which limit it broke."""
    for path, limit_s, late in (
        (exchange / "started", BOOT_TIMEOUT_S, f"did not boot in {BOOT_TIMEOUT_S} s"),
        (exchange / "status", timeout_s, f"was not done after {timeout_s} s"),
    ):
        deadline = time.monotonic() + limit_s
        while not path.exists():
            if guest.poll() is not None:
                return f"ended with qemu's status {guest.returncode}"
            if time.monotonic() > deadline:
                return late
            time.sleep(POLL_S)
    return "is done"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _kernel() -> _Kernel:
    """The kernel, from the cache or from Debian."""
    default = Path.home() / ".cache" / "torus-actors-tests"
    # What was unpacked for other tests than these is left alone, and is not enough.
    unpacked = hashlib.sha256("\n".join(UNPACKED).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("TORUS_TEST_CACHE", default)) / f"kernel-{unpacked}"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unpacking-", dir=cache.parent) as folder:
            made = _download(Path(folder))
            try:
                made.rename(cache)
            except OSError:
                if not cache.exists():
                    raise
    return _Kernel(
        cache / "vmlinux", {path.stem: path for path in cache.glob("lib/modules/**/*.ko")}
    )


def _download(folder: Path) -> Path:
    """Fetch the kernel's package and unpack of it what is needed; it is not installed."""
    try:
        package = _fetch(folder)
    except subprocess.CalledProcessError:
        # Lists that are missing or old: the version that they name may be gone.
        _run("apt-get", "update", "-q", folder=folder)
        package = _fetch(folder)
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    archive = folder / "archive"
    with archive.open("wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, stdout=file)
    _run("tar", "-xf", str(archive), "--wildcards", *UNPACKED, folder=unpacked)
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    (unpacked / "vmlinux").write_bytes(_decompressed(image.read_bytes()))
    image.unlink()
    return unpacked


def _fetch(folder: Path) -> Path:
    depends = _run("apt-cache", "depends", PACKAGE, folder=folder)
    (concrete,) = (line.split()[1] for line in depends.splitlines() if "Depends:" in line)
    _run("apt-get", "download", "-q", concrete, folder=folder)
    (package,) = folder.glob("*.deb")
    return package


def _run(*command: str, folder: Path) -> str:
    """Run a program that may use the network; its standard output."""
    return subprocess.run(
        command,
        check=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        timeout=DOWNLOAD_TIMEOUT_S,
        text=True,
    ).stdout


def _decompressed(image: bytes) -> bytes:
    """The ELF file within a kernel image; to boot it spares the guest half of the time.

    The layout is that of Documentation/x86/boot.rst: the number of 512 byte sectors before the
    protected-mode code at 0x1F1, and the payload's offset in that code and length at 0x248.
    """
    code = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    return lzma.LZMADecompressor().decompress(image[code + offset :][:length])


def _depends(module: Path) -> Sequence[str]:
    """What a module says that it needs: the package has no modules.dep, depmod makes that."""
    _, found, rest = module.read_bytes().partition(b"\0depends=")
    names = rest.partition(b"\0")[0].decode() if found else ""
    return [name for name in names.split(",") if name]


def _initramfs(kernel: _Kernel, modules: Sequence[str]) -> bytes:
    ordered = kernel.in_order(modules)
    folders = ("bin", "dev", "host", "memory", "modules", "proc", "root")
    files = dict.fromkeys(folders, (0o040755, b""))
    busybox = shutil.which("busybox")
    assert busybox is not None
    files["bin/busybox"] = (0o100755, Path(busybox).read_bytes())
    files["init"] = (0o100755, INIT.replace("MODULES", " ".join(ordered)).encode())
    for name in ordered:
        files[f"modules/{name}.ko"] = (0o100644, kernel.modules[name].read_bytes())
    return b"".join(_cpio(files))


def _cpio(files: dict[str, tuple[int, bytes]]) -> Iterator[bytes]:
    """An archive in cpio's `newc` format, of modes and contents by path."""
    for inode, (name, (mode, content)) in enumerate((*files.items(), ("TRAILER!!!", (0, b"")))):
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, four device numbers, length of path, checksum
        numbers = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        for part in (header, content):
            yield part + bytes(-len(part) % 4)
