"""The keeper of a device, with a driver in the place of the kernel's that has devices 0 and 3.

When it is asked to connect, it does with the socket what the kernel might, and says at the end of
its input what it was asked.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from torus_actors.nbd import keeper
from torus_actors.nbd import protocol as p
from torus_actors.nbd.genetlink import attributes_of

REPLY_BYTES = 16
DATA = bytes(range(256)) * 32


class Driver:
    """See Netlink. What it refuses is in the environment, an errno for a command."""

    asked: list[tuple[int, dict[int, str]]]

    def __init__(self, log: Path, sys_block: Path) -> None:
        self._log = log
        self._sys_block = sys_block
        self._refuses = {
            int(command): number
            for command, number in json.loads(os.environ.get("REFUSES", "{}")).items()
        }

    def close(self) -> None:
        """See Netlink."""

    def ask(self, command: int, attributes: Iterable[bytes]) -> Mapping[int, bytes]:
        """See Netlink."""
        told = dict(attributes_of(b"".join(attributes)))
        with self._log.open("a") as log:
            shown = {kind: value.hex() for kind, value in told.items() if kind != keeper.SOCKETS}
            print(json.dumps([command, shown]), file=log)
        if command in self._refuses:
            number = self._refuses[command]
            raise OSError(number, os.strerror(number))
        index = int.from_bytes(told.get(keeper.INDEX, bytes(4)), "little")
        if command == keeper.CONNECT:
            (item,) = dict(attributes_of(told[keeper.SOCKETS])).values()
            (number_of_file,) = dict(attributes_of(item)).values()
            connection = socket.socket(fileno=os.dup(int.from_bytes(number_of_file, "little")))
            connection.setblocking(True)
            (self._sys_block / f"nbd{index}").mkdir(parents=True)
            (self._sys_block / f"nbd{index}" / "pid").write_text("7\n")
            use(connection)
            CONNECTIONS.append(connection)
        if command == keeper.DISCONNECT:
            (self._sys_block / f"nbd{index}" / "pid").unlink()
            end(CONNECTIONS.pop())
        return {keeper.INDEX: index.to_bytes(4, "little")}


CONNECTIONS: list[socket.socket] = []


def use(connection: socket.socket) -> None:
    """Write, flush and read, as the kernel does."""
    for command, length, data in (
        (p.Cmd.WRITE, len(DATA), DATA),
        (p.Cmd.FLUSH, 0, b""),
        (p.Cmd.READ, len(DATA), b""),
    ):
        offset = 4096 if length else 0
        header = p.REQUEST.pack(p.REQUEST_MAGIC, 0, command, 7, offset, length)
        connection.sendall(header + data)
        answer = connection.recv(REPLY_BYTES, socket.MSG_WAITALL)
        assert struct.unpack(">IIQ", answer) == (0x67446698, 0, 7)
    assert connection.recv(len(DATA), socket.MSG_WAITALL) == DATA


def end(connection: socket.socket) -> None:
    """Say goodbye."""
    connection.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.Cmd.DISC, 0, 0, 0))
    connection.close()


def main() -> None:
    """As the keeper's own."""
    log = Path(os.environ["ASKED"])
    number, size, flags, *device = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        devices = Path(folder)
        for name in ("nbd0", "nbd3"):
            (devices / name).touch()
        real_open, real_close = os.open, os.close
        opened: list[int] = []

        def open_device(path: str, flags: int) -> int:
            opened.append(real_open(devices / os.path.basename(path), flags))
            return opened[0]

        def close_device(file: int) -> None:
            real_close(file)
            if file in opened and os.environ.get("IN_USE") is None:
                end(CONNECTIONS.pop())
                (devices / "sys" / "nbd0" / "pid").unlink()

        keeper.os.open = open_device  # type: ignore[assignment]
        keeper.os.close = close_device  # type: ignore[assignment]
        if "NO_DRIVER" in os.environ:

            def make() -> Driver:
                raise OSError(errno.ENOENT, "none")
        else:

            def make() -> Driver:
                return Driver(log, devices / "sys")

        kept = keeper.Keeper(
            lambda line: print(line, flush=True),
            make,  # type: ignore[arg-type]
            devices / "sys",
        )
        threading.Thread(
            target=kept.keep,
            args=(socket.socket(fileno=number), size, flags, *(device or [None])),
            daemon=True,
        ).start()
        for line in sys.stdin:
            kept.do(line.strip())
        kept.end()
        keeper.os.open, keeper.os.close = real_open, real_close
    os._exit(0)


main()
