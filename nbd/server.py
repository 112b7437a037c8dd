"""Listening sockets for NBD: TCP and unix, for one ``NbdState``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import weakref

from torus_actors.errors import Exists, Invalid, TorusError
from torus_actors.model.addresses import format_address
from torus_actors.nbd.connection import NbdConnection, NbdState, TlsSettings
from torus_actors.nbd.requests import Exports

BACKLOG = 128
"""Connections the kernel keeps until they are accepted; a VM's many-connection client comes with
sixteen at once."""

CLOSE_GRACE_S = 10.0
"""How long ``close`` waits for requests in flight: longer than a slow replica, shorter than the
supervisor's patience."""

FLUSH_GRACE_S = 2.0
"""How long a closed connection may take to send what is queued, before it is cut off."""


class NbdListener:
    """One listening address and the connections that came in by it.

    Attributes:
        state: what its connections belong to.
        address: ``host:port``, or the path of the unix socket.
    """

    def __init__(self, state: NbdState, address: str, path: str | None = None) -> None:
        self.state = state
        self.address = address
        self._path = path
        self._inode = os.stat(path).st_ino if path is not None else 0
        self._server: asyncio.AbstractServer | None = None
        self._accepted: weakref.WeakSet[NbdConnection] = weakref.WeakSet()
        self._closed = False

    async def _start(self, sock: socket.socket, tls: TlsSettings | None) -> None:
        loop = asyncio.get_running_loop()

        def accept() -> NbdConnection:
            connection = NbdConnection(self.state, tls)
            self._accepted.add(connection)
            return connection

        if sock.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(accept, sock=sock, backlog=BACKLOG)
        else:
            self._server = await loop.create_server(accept, sock=sock, backlog=BACKLOG)

    async def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """Stop accepting, let what is in flight finish, then end the connections made here.

        Args:
            grace_s: after this, connections are cut off with requests in flight.
        """
        if self._closed:
            return
        self._closed = True
        self.state.listeners.remove(self)
        if self._server is not None:
            self._server.close()
        if self._path is not None:
            # Only what this listener made: a successor may have put its own socket there.
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
        connections = [c for c in self._accepted if c in self.state.connections]
        for connection in connections:
            connection.shut_down()
        gone = [connection.lost for connection in connections if connection.lost is not None]
        await _wait(gone, grace_s)
        for connection in connections:
            connection.abort()
        await _wait(gone, FLUSH_GRACE_S)
        await self.state.settled()


async def _wait(futures: list[asyncio.Future[None]], timeout_s: float) -> None:
    pending = [future for future in futures if not future.done()]
    if pending:
        await asyncio.wait(pending, timeout=timeout_s)


async def serve(
    exports: Exports,
    *,
    host: str | None = None,
    port: int = 0,
    path: str | None = None,
    tls: TlsSettings | None = None,
    state: NbdState | None = None,
) -> NbdListener:
    """Listen for NBD clients on the running loop.

    Args:
        exports: who knows and opens exports; ignored when ``state`` is given.
        host: address or name to listen on over TCP; exclusive with ``path``.
        port: TCP port, 0 for any free one.
        path: unix socket to create; a stale one left by a killed server is replaced.
        tls: how to encrypt; None for not at all.
        state: to listen by one more address for a server that exists.

    Returns:
        The listener; ``address`` tells where it really listens.

    Raises:
        Exists: another server listens there.
        Invalid: it is not possible to listen there.
    """
    if (host is None) == (path is None):
        raise Invalid("an NBD server listens either on a host and port or on a unix socket path")
    if state is None:
        state = NbdState(exports)
    if path is not None:
        sock = _bind_unix(path)
        listener = NbdListener(state, path, path)
    else:
        assert host is not None
        sock = await _bind_tcp(host, port)
        bound = sock.getsockname()
        listener = NbdListener(state, format_address(bound[:2]))
    await listener._start(sock, tls)
    state.listeners.append(listener)
    return listener


async def _bind_tcp(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Invalid(
            f"cannot listen on {format_address((host, port))}: {error.strerror}"
        ) from error
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        # Or a restarted server would have to wait for its old connections to be forgotten.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by accepted sockets: a client whose machine vanished is noticed in the end.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(format_address((host, port)), error) from error
    return sock


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise _cannot_listen(path, error) from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket nobody listens on; a killed server could not."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_listen(path, error) from error
    if not stat.S_ISSOCK(mode):
        raise Invalid(f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A unix connect ends at once, one way or the other; a full backlog counts as alive.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise _cannot_listen(path, error) from error
    raise Exists(f"cannot listen on {path}: another server is using it")


def _cannot_listen(where: str, error: OSError) -> TorusError:
    if error.errno == errno.EADDRINUSE:
        return Exists(f"cannot listen on {where}: another server is using it")
    return Invalid(f"cannot listen on {where}: {error.strerror or error}")
