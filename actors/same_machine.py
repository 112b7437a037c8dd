"""Connections between processes of one machine, without TCP.

A round trip through a unix socket costs half of what TCP takes on the loopback, and to send a
fifth. So each node also listens in Linux's abstract namespace, under a name made of its id, and
whoever dials a node looks there first. What is said is the same as over TCP, the handshake too.

The namespace belongs to the network namespace: containers and hosts with networks of their own do
not see each other in it, and what cuts them off from TCP does so from this. A name goes away with
its last process. Anybody on the machine may take one, as they may a port: so one is trusted no more
than a port is, and a node that cannot be reached under its name is dialed by its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable

log = logging.getLogger(__name__)

BACKLOG = 128

BUFFER_BYTES = 2 << 20
"""The kernel's default is less than half of a block; TCP tunes its own."""

_CREDENTIALS = struct.Struct("3i")
_POSSIBLE = sys.platform == "linux"
_KIND = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)


def listen(node: str) -> socket.socket | None:
    """A socket that listens under a node's name.

    Returns:
        None where that is not possible: TCP will do.
    """
    if not _POSSIBLE:
        return None
    listening = socket.socket(socket.AF_UNIX, _KIND)
    try:
        listening.bind(_name_of(node))
        listening.listen(BACKLOG)
    except OSError as error:
        log.info("no connections within this machine: %s", error)
        listening.close()
        return None
    return listening


def connect(node: str) -> socket.socket | None:
    """A socket that is connected with the node of that id, if it is on this machine.

    Whoever listens must have this process's user, or root's.
    """
    if not _POSSIBLE:
        return None
    connected = socket.socket(socket.AF_UNIX, _KIND)
    try:
        connected.connect(_name_of(node))  # at once, or not at all
        told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(told)
        if user in (0, os.geteuid()):
            return connected
    except OSError:
        pass
    connected.close()
    return None


async def hand_over(connected: socket.socket, factory: Callable[[], asyncio.BaseProtocol]) -> None:
    """Make a socket a connection of the running loop, which closes it from now on.

    Raises:
        OSError: it is not usable.
    """
    loop = asyncio.get_running_loop()
    transport: asyncio.BaseTransport | None = None
    try:
        transport, _ = await loop.create_unix_connection(factory, sock=connected)
    finally:
        ended = transport is None or transport.is_closing()
        if ended and not isinstance(loop, asyncio.BaseEventLoop):
            # uvloop closes the descriptor, but tells the socket only once the connection is made.
            # One that ended before would be closed again when the socket is collected, and by then
            # its number may be that of a file.
            connected.detach()


def tune(connected: socket.socket) -> None:
    """Give a connection the room that blocks need, as far as the system lets it."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _name_of(node: str) -> bytes:
    return b"\0torus-actors/" + node.encode()
