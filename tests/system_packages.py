"""Sees to it that the programs which the tests use are installed.

As root on a Debian system it installs what is missing; elsewhere it names it. The tests skip what
is missing, except in CI, where they fail. With the argument `kernel` it is about those that the
tests under tests/kernel use as well, which are large.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PACKAGES = {
    "etcd": "etcd-server",
    "fio": "fio",
    "ip": "iproute2",
    "mke2fs": "e2fsprogs",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdkit": "nbdkit",
    "openssl": "openssl",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "unshare": "util-linux",
}
"""Program to Debian package."""

KERNEL_PACKAGES = {
    "busybox": "busybox-static",
    "qemu-system-x86_64": "qemu-system-x86",
}
"""What runs a kernel for the tests under tests/kernel; they fetch the kernel themselves."""


def missing(packages: dict[str, str]) -> set[str]:
    """Packages whose programs are not on the path; sbin counts, since mke2fs is there."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return {
        package for program, package in packages.items() if not shutil.which(program, path=path)
    }


def main() -> int:
    """Install or name what is missing; the status says whether all is there now."""
    packages = {**PACKAGES, **(KERNEL_PACKAGES if sys.argv[1:] == ["kernel"] else {})}
    wanted = sorted(missing(packages))
    if not wanted:
        return 0
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *wanted]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing", *wanted, flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=False, env=environment)
        subprocess.run(command, check=False, env=environment)
        wanted = sorted(missing(packages))
        if not wanted:
            return 0
    print(f"these tests will be skipped or fail without: sudo {' '.join(command)}", file=sys.stderr)
    return 1 if os.environ.get("CI") == "true" else 0


if __name__ == "__main__":
    sys.exit(main())
