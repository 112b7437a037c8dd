"""The Linux kernel as an NBD client: an export as ``/dev/nbdN`` on this machine.

The kernel is given one end of a socket pair, and speaks the transmission phase on it; what the
handshake would tell is told by netlink, as ``linux/nbd-netlink.h`` and ``drivers/block/nbd.c`` have
it. (Their older interface, by ioctl, keeps a thread in the kernel, and ends the device when that is
stopped, traced or frozen: in a suspended machine, for one.)

A device lives as long as anybody has it open, of which this process is one. So it ends with this
process, but not under those who have it mounted: they get errors, and nobody else gets the device,
into which they would write, before they have let go of it.

Whoever opens a device may read it at once (partition tables), so that is done in threads: the event
loop has to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from torus_actors.errors import Exists, Invalid, TorusError
from torus_actors.nbd import genetlink
from torus_actors.nbd.genetlink import attribute
from torus_actors.nbd.requests import ExportInfo

NETLINK_GENERIC = 16
"""Protocol of a netlink socket."""

CONNECT = 1
DISCONNECT = 2
RECONFIGURE = 3

INDEX = 1
SIZE_BYTES = 2
BLOCK_SIZE_BYTES = 3
SERVER_FLAGS = 5
CLIENT_FLAGS = 6
SOCKETS = 7
SOCKET_ITEM = 1
SOCKET_FD = 1

DISCONNECT_ON_CLOSE = 2
"""Client flag: the device ends with the last one that has it open."""

SECTOR_BYTES = 512
"""What the device is addressed in. Images of other disks expect their partition tables in it."""

ANSWER_S_MAX = 10.0
"""The kernel answers at once."""

ENDED_S_MAX = 1.0
ENDED_POLL_S = 0.02
"""Between looks whether the kernel has let go of a device whose connection it has ended."""

DATAGRAM_BYTES = 64 << 10

_U16 = struct.Struct("=H")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")

T = TypeVar("T")


class KernelDevice:
    """A device of the kernel's that this process serves; made by ``attach``.

    Attributes:
        path: ``/dev/nbdN``.
    """

    def __init__(self, path: str, file: int, lost: asyncio.Future[None]) -> None:
        self.path = path
        self._file = file
        self._lost = lost

    @property
    def ended(self) -> bool:
        """Whether the kernel has ended it, for whatever reason."""
        return self._lost.done()

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
        if self._file >= 0:
            await _in_thread(partial(os.fsync, self._file))

    async def let_go(self) -> None:
        """Leave the device to those who use it: it ends when the last one closes it."""
        file, self._file = self._file, -1
        if file >= 0:
            await _in_thread(partial(os.close, file))


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
    wanted = None if path is None else _number_of(path)
    attributes = [] if wanted is None else [attribute(INDEX, _U32.pack(wanted))]
    attributes += [
        attribute(SIZE_BYTES, _U64.pack(info.size // SECTOR_BYTES * SECTOR_BYTES)),
        attribute(BLOCK_SIZE_BYTES, _U64.pack(SECTOR_BYTES)),
        attribute(SERVER_FLAGS, _U64.pack(info.flags(structured=False))),
        attribute(
            SOCKETS,
            [attribute(SOCKET_ITEM, [attribute(SOCKET_FD, _U32.pack(sock.fileno()))])],
        ),
    ]
    with contextlib.closing(Netlink()) as netlink:
        try:
            (index,) = _U32.unpack(netlink.ask(CONNECT, attributes)[INDEX])
        except OSError as error:
            raise _refusal(path or "an NBD device", error) from error
        path = f"/dev/nbd{index}"
        this = attribute(INDEX, _U32.pack(index))
        try:
            file = await _in_thread(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
            # Only now, or it would end with any other program that looks at what is new.
            netlink.ask(
                RECONFIGURE, [this, attribute(CLIENT_FLAGS, _U64.pack(DISCONNECT_ON_CLOSE))]
            )
        except OSError as error:
            netlink.ask(DISCONNECT, [this])
            raise _refusal(path, error) from error
    return KernelDevice(path, file, lost)


class Netlink:
    """A conversation with the kernel's NBD driver.

    Raises:
        Invalid: the kernel has none.
    """

    def __init__(self) -> None:
        self._number = 0
        self._family = genetlink.CONTROLLER
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        try:
            self._socket.settimeout(ANSWER_S_MAX)
            name = attribute(genetlink.FAMILY_NAME, b"nbd\0")
            found = self.ask(genetlink.GET_FAMILY, [name])
            (self._family,) = _U16.unpack(found[genetlink.FAMILY_ID])
        except OSError as error:
            self._socket.close()
            raise Invalid(
                "this kernel has no NBD devices: load its module first (modprobe nbd)"
            ) from error

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def ask(self, command: int, attributes: Iterable[bytes]) -> Mapping[int, bytes]:
        """Ask for something, and return what the answer has.

        Raises:
            OSError: it is refused.
        """
        self._number += 1
        self._socket.send(genetlink.request(self._family, command, self._number, attributes))
        content: Mapping[int, bytes] = {}
        while True:
            for number, ended, found in genetlink.answers(self._socket.recv(DATAGRAM_BYTES)):
                if number != self._number:
                    continue
                if ended is None:
                    content = found
                elif ended:
                    raise OSError(ended, os.strerror(ended))
                else:
                    return content


def _number_of(path: str) -> int:
    match = re.fullmatch(r"(?:/dev/)?nbd(\d{1,6})", path)
    if match is None:
        raise Invalid(f"{path} is not an NBD device: name one such as /dev/nbd0, or none")
    return int(match[1])


def _refusal(what: str, error: OSError) -> TorusError:
    match error.errno:
        case errno.EBUSY:
            return Exists(f"{what} is in use: name another one, or none for the first that is free")
        case errno.EPERM | errno.EACCES:
            return Invalid(f"cannot attach to {what}: only root may")
    return Invalid(f"cannot attach to {what}: {error.strerror or error}")


async def _in_thread(work: Callable[[], T]) -> T:
    """Do what may wait until this very process answers.

    Not in the loop's own threads: one that never returns would keep the process from ending.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(settled: Callable[[], None]) -> None:
        if not done.done():
            settled()

    def run() -> None:
        try:
            result = work()
        except OSError as error:
            settled = partial(done.set_exception, error)
        else:
            settled = partial(done.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this
            loop.call_soon_threadsafe(settle, settled)

    threading.Thread(target=run, daemon=True).start()
    return await done
