"""The process that keeps a device of the kernel's for the one that serves it.

    python -m torus_actors.nbd.keeper SOCKET SIZE FLAGS [NUMBER]

It asks the kernel's NBD driver, by netlink (``linux/nbd-netlink.h``, ``drivers/block/nbd.c``), to
serve a device by a socket, and has the device open from then on. It is a process of its own, for
two reasons. Whoever opens, syncs or closes a device waits in the kernel until that is answered, and
cannot be killed meanwhile, so it must not be who answers. And what has been sent to a server that
died is waited for without end, unless somebody ends the device: so this does, when its standard
input ends.

It reads commands, a line each: ``sync`` and ``let-go``; the end of the input ends the device and
this. It writes a line for attaching and for each command: ``ok PATH``, or ``refused ERRNO WHAT``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torus_actors.nbd import genetlink
from torus_actors.nbd.genetlink import attribute

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

DATAGRAM_BYTES = 64 << 10

DRIVER = "driver"
"""What is refused where the kernel has no NBD driver."""

SYNC = "sync"
LET_GO = "let-go"

U16 = struct.Struct("=H")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")


class Netlink:
    """A conversation with the kernel's NBD driver.

    Raises:
        OSError: there is none.
    """

    def __init__(self) -> None:
        self._number = 0
        self._family = genetlink.CONTROLLER
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._socket.settimeout(ANSWER_S_MAX)
        try:
            found = self.ask(genetlink.GET_FAMILY, [attribute(genetlink.FAMILY_NAME, b"nbd\0")])
        except OSError:
            self._socket.close()
            raise
        (self._family,) = U16.unpack(found[genetlink.FAMILY_ID])

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


class Keeper:
    """See the module.

    Args:
        say: writes a line.
        netlink: makes a `Netlink`.
        sys_block: where the kernel tells of its devices.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        netlink: Callable[[], Netlink] = Netlink,
        sys_block: Path = Path("/sys/block"),
    ) -> None:
        self._say = say
        self._make_netlink = netlink
        self._sys_block = sys_block
        self._lock = threading.Lock()
        self._over = False
        self._index = -1
        self._file = -1
        self._owner = ""
        """What the kernel says of who attached the device."""
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()

    def keep(self, sock: socket.socket, size: int, flags: int, number: int | None) -> None:
        """Attach, and do as told; to be run in a thread, which may wait in the kernel for long.

        Args:
            sock: for the kernel.
            size: bytes; what is beyond the last whole sector cannot be reached.
            flags: transmission flags.
            number: of the device; None for the first that is free.
        """
        what = DRIVER
        try:
            netlink = self._make_netlink()
            what = "-" if number is None else f"/dev/nbd{number}"
            with sock:
                self._connect(netlink, sock, size, flags, number)
            what = f"/dev/nbd{self._index}"
            self._file = os.open(what, os.O_RDONLY | os.O_CLOEXEC)
            # Only now, or it would end with any other program that looks at what is new.
            client = attribute(CLIENT_FLAGS, U64.pack(DISCONNECT_ON_CLOSE))
            netlink.ask(RECONFIGURE, [self._this, client])
        except OSError as error:
            self.end()
            self._say(f"refused {error.errno or errno.EIO} {what}")
            return
        self._say(f"ok {what}")
        while True:
            command = self._commands.get()
            try:
                if command == SYNC:
                    os.fsync(self._file)
                else:
                    os.close(self._file)
            except OSError as error:
                self._say(f"refused {error.errno} {what}")
            else:
                self._say(f"ok {what}")

    def do(self, command: str) -> None:
        """Have the thread do a command."""
        self._commands.put(command)

    def end(self) -> None:
        """End the device, if it is still this one's; whoever waits for it gets an error."""
        with self._lock:
            self._over = True
            if self._index >= 0 and self._owner and self._tell_owner() == self._owner:
                with (
                    contextlib.suppress(OSError),
                    contextlib.closing(self._make_netlink()) as driver,
                ):
                    driver.ask(DISCONNECT, [self._this])

    @property
    def _this(self) -> bytes:
        return attribute(INDEX, U32.pack(self._index))

    def _connect(
        self, netlink: Netlink, sock: socket.socket, size: int, flags: int, number: int | None
    ) -> None:
        attributes = [] if number is None else [attribute(INDEX, U32.pack(number))]
        item = attribute(SOCKET_ITEM, [attribute(SOCKET_FD, U32.pack(sock.fileno()))])
        attributes += [
            attribute(SIZE_BYTES, U64.pack(size // SECTOR_BYTES * SECTOR_BYTES)),
            attribute(BLOCK_SIZE_BYTES, U64.pack(SECTOR_BYTES)),
            attribute(SERVER_FLAGS, U64.pack(flags)),
            attribute(SOCKETS, [item]),
        ]
        with self._lock:
            if self._over:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            (self._index,) = U32.unpack(netlink.ask(CONNECT, attributes)[INDEX])
            self._owner = self._tell_owner()

    def _tell_owner(self) -> str:
        try:
            return (self._sys_block / f"nbd{self._index}" / "pid").read_text()
        except OSError:
            return ""


def main() -> None:
    """Entry point; see the module."""
    descriptor, size, flags, *device = map(int, sys.argv[1:])
    # It ends when the server does, however that came about.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody is left who would hear it
            print(line, flush=True)

    keeper = Keeper(say)
    threading.Thread(
        target=keeper.keep,
        args=(socket.socket(fileno=descriptor), size, flags, device[0] if device else None),
        daemon=True,
    ).start()
    for line in sys.stdin:
        keeper.do(line.strip())
    keeper.end()
    # Not by way of threads that may be in the kernel.
    os._exit(0)


if __name__ == "__main__":
    main()
