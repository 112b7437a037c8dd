"""The Linux kernel as an NBD client: an export as ``/dev/nbdN`` on this machine.

The kernel is given one end of a socket pair, and speaks the transmission phase on it. A process of
its own asks it to, and keeps the device: see `keeper`. A device lives as long as anybody has it
open, of which that process is one. So it ends with this process, but not under those who have it
mounted: they get errors, and nobody else gets the device, into which they would write, before they
have let go of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from torus_actors.errors import Exists, Invalid, TorusError
from torus_actors.machine import command_of
from torus_actors.nbd import keeper
from torus_actors.nbd.requests import ExportInfo

KEEPER = tuple(command_of("torus_actors.nbd.keeper"))

KEEPER_S_MAX = 5.0
"""The kernel ends a device at once."""

ENDED_S_MAX = 1.0
ENDED_POLL_S = 0.02
"""Between looks whether the kernel has let go of a device whose connection it has ended."""


class KernelDevice:
    """A device of the kernel's that this process serves; made by ``attach``.

    Attributes:
        path: ``/dev/nbdN``.
    """

    def __init__(self, path: str, process: Process, lost: asyncio.Future[None]) -> None:
        self.path = path
        self._process = process
        self._lost = lost

    @property
    def ended(self) -> bool:
        """Whether the kernel has ended it, for whatever reason."""
        return self._lost.done()

    @property
    def kept(self) -> bool:
        """Whether the process that keeps it is there."""
        return self._process.returncode is None

    async def has_gone(self, patience_s: float) -> bool:
        """Wait for its end, until the kernel would give it to another process."""
        await asyncio.wait([self._lost], timeout=patience_s)
        if not self._lost.done():
            return False
        # It says goodbye a moment before. Whoever is faster has a connection of its own.
        lives = Path("/sys/block", os.path.basename(self.path), "pid")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDED_S_MAX):
                while lives.exists():  # noqa: ASYNC110, ASYNC240 - a file that costs no I/O
                    await asyncio.sleep(ENDED_POLL_S)
        return True

    async def sync(self) -> None:
        """Have what the kernel keeps in memory of it written, and made durable.

        Raises:
            OSError: that was not possible; it may be lost.
        """
        await self._do(keeper.SYNC)

    async def let_go(self) -> None:
        """Leave the device to those who use it: it ends when the last one closes it.

        Raises:
            OSError: nobody had it for this process any more.
        """
        await self._do(keeper.LET_GO)

    async def cut_off(self) -> None:
        """End it at once, if it has not ended: whoever waits for it gets an error."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), KEEPER_S_MAX)

    async def _do(self, command: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        number = errno.EIO  # of a process that has ended
        if not pipe.is_closing():
            pipe.write(f"{command}\n".encode())
            number, _ = await _answer(self._process)
        if number:
            raise OSError(number, os.strerror(number))


async def attach(
    sock: socket.socket, lost: asyncio.Future[None], info: ExportInfo, path: str | None = None
) -> KernelDevice:
    """Attach an export to a device of the kernel's.

    Args:
        sock: its other end is a connection of the export, in the transmission phase. The kernel
            keeps it; the caller has to close it.
        lost: done when that connection is gone.
        info: of the export; what is beyond its last whole sector cannot be reached.
        path: ``/dev/nbdN`` or ``nbdN``; None for the first that is free.

    Raises:
        Exists: it is in use.
        Invalid: there is no such device, or this process may not have it.
    """
    device = [] if path is None else [_number_of(path)]
    if info.size < keeper.SECTOR_BYTES:
        raise Invalid(f"{info.name} is smaller than a sector")
    process = await asyncio.create_subprocess_exec(
        *KEEPER,
        *map(str, (sock.fileno(), info.size, int(info.flags(structured=False)), *device)),
        stdin=PIPE,
        stdout=PIPE,
        pass_fds=[sock.fileno()],
        start_new_session=True,  # a Ctrl-C is for this process
    )
    attached = KernelDevice("", process, lost)
    try:
        number, attached.path = await _answer(process)
        if number:
            raise _refusal(number, attached.path)
    except BaseException:
        await attached.cut_off()
        raise
    return attached


async def _answer(process: Process) -> tuple[int, str]:
    """An errno, or 0; and what it is about."""
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    match line.split():
        case ["ok", path]:
            return 0, path
        case ["refused", number, what]:
            return int(number), what
    return errno.EIO, "a device: the process that keeps it has ended"


def _number_of(path: str) -> int:
    match = re.fullmatch(r"(?:/dev/)?nbd(\d{1,6})", path)
    if match is None:
        raise Invalid(f"{path} is not an NBD device: name one such as /dev/nbd0, or none")
    return int(match[1])


def _refusal(number: int, what: str) -> TorusError:
    if what == keeper.DRIVER:
        return Invalid("this kernel has no NBD devices: load its module first (modprobe nbd)")
    what = "an NBD device" if what == "-" else what
    match number:
        case errno.EBUSY:
            return Exists(f"{what} is in use: name another one, or none for the first that is free")
        case errno.EPERM | errno.EACCES:
            return Invalid(f"cannot attach to {what}: only root may")
    return Invalid(f"cannot attach to {what}: {os.strerror(number)}")
