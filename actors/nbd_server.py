"""The NBD server actor: listens for NBD clients and passes their requests to volume actors.

Messages in: ``replies`` from volume actors, ``addresses``, ``attach`` (a volume as a device of this
machine's kernel). Messages out: ``submit`` to volume actors, ``open`` and ``release`` to the
volumes actor. Sockets and connections outlive it, so its death costs no client anything: requests
wait until the successor has adopted them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torus_actors.actors import same_machine
from torus_actors.errors import DeadlineExceeded, TorusError
from torus_actors.model.buffers import BufferPool
from torus_actors.nbd import kernel
from torus_actors.nbd.connection import NbdConnection, NbdState, TlsSettings
from torus_actors.nbd.requests import BlockDevice, ExportInfo, Replies, Reply, Request
from torus_actors.nbd.server import serve
from torus_actors.runtime import ActorSystem, LoopActor, expose
from torus_actors.runtime.spinner import Spinner

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 60.0

ATTACH_TIMEOUT_S = 60.0
"""The kernel reads the beginning and the end of a device before it is attached."""

GIVE_BACK_S = 600.0
"""A volume that is open only when its client has been told that it takes too long is given back;
it is waited for so long. So is who takes a volume back."""

POOL_BYTES = 16 << 20
"""Payload buffers kept for reuse; those that the caches hold come on top."""


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where to listen: ``(host, port)``, or the path of a unix socket."""

    tcp: tuple[str, int] | None = None
    path: str | None = None


class Connections:
    """Numbers the connections, so that messages can name them."""

    def __init__(self) -> None:
        self.by_id: dict[int, NbdConnection] = {}
        self._next = 1

    def number(self, connection: NbdConnection) -> int:
        """The connection's number, given on first use and taken back when nothing is due to it."""
        if connection.number:
            return connection.number
        number = self._next
        self._next += 1
        connection.number = number
        self.by_id[number] = connection
        if connection.lost is not None:
            connection.lost.add_done_callback(lambda _: self.forget_if_done(connection))
        return number

    def forget_if_done(self, connection: NbdConnection) -> None:
        """Forget a connection once it is gone, and its requests have been answered.

        It gives its export back when it gets the last of the answers.
        """
        if connection.export is None:
            self.by_id.pop(connection.number, None)


class VolumeDevice:
    """A volume, as NBD connections see it: every batch of requests becomes one message."""

    def __init__(self, system: ActorSystem, name: str, connections: Connections) -> None:
        self._submit = system.actor(f"volume:{name}").submit
        self._connections = connections

    def submit(self, conn: Replies, requests: list[Request]) -> None:
        """See BlockDevice."""
        assert isinstance(conn, NbdConnection)
        self._submit.tell(conn.number or self._connections.number(conn), requests)


class NbdServer(LoopActor):
    """See the module; at the same time the ``Exports`` of its connections.

    Args:
        listen: where.
        tls: how to encrypt; None for not at all.
        spin_s: how long the loop may stay awake for a request; see `Spinner`.
    """

    def __init__(
        self, listen: Sequence[NbdAddress], tls: TlsSettings | None = None, spin_s: float = 0.0
    ) -> None:
        super().__init__()
        self._listen = listen
        self._tls = tls
        self._spin_s = spin_s

    async def setup(self) -> None:
        """Adopt the predecessor's sockets and connections, or begin to listen."""
        heirlooms = self.system.heirlooms
        self._connections: Connections = heirlooms.setdefault("nbd_connections", Connections())
        state: NbdState | None = heirlooms.get("nbd_state")
        if state is not None:
            state.adopt(self)
            self._state = state
            return
        spinner = Spinner(self.system.loop, self._spin_s)
        self._state = NbdState(self, BufferPool(POOL_BYTES), spinner)
        try:
            for address in self._listen:
                if address.tcp is not None:
                    host, port = address.tcp
                    await serve(self, host=host, port=port, tls=self._tls, state=self._state)
                else:
                    await serve(self, path=address.path, tls=self._tls, state=self._state)
        except BaseException:
            await self._close()  # no successor knows of those that were opened
            raise
        heirlooms["nbd_state"] = self._state

    def quiesce(self) -> list[asyncio.Future[Any]]:
        """When this is for good, let requests in flight finish and close.

        Their answers are messages, so those are taken until then.
        """
        if self.cell.will_restart:
            return super().quiesce()
        return [self.spawn(self._close())]

    async def cleanup(self) -> None:
        """When this is for good, close what is left."""
        if self.cell.will_restart:
            return
        await self._close()
        self.system.heirlooms.pop("nbd_state", None)

    async def _close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in list(self._state.listeners)))

    @expose(idempotent=True)
    def replies(self, conn: int, replies: list[Reply]) -> None:
        """Answers to requests of one connection."""
        connection = self._connections.by_id.get(conn)
        if connection is not None:
            connection.reply(replies)
            self._connections.forget_if_done(connection)

    @expose()
    async def attach(self, name: str, path: str | None) -> kernel.KernelDevice:
        """Open an export and attach it to a device of this machine's kernel.

        Args:
            name: of the export.
            path: ``/dev/nbdN``; None for the first that is free.

        Returns:
            The device. The export is given back when it has ended.

        Raises:
            TorusError: it cannot be opened, or attached.
        """
        opened = await self.open(name)
        info = opened[0]
        ours, theirs = socket.socketpair()
        try:
            same_machine.tune(ours)
            same_machine.tune(theirs)
            ours.setblocking(False)
            self._state.open_names[info.name] += 1
            connection = NbdConnection(self._state, opened=opened)
            await same_machine.hand_over(ours, lambda: connection)
            assert connection.lost is not None
            try:
                async with asyncio.timeout(ATTACH_TIMEOUT_S):
                    return await kernel.attach(theirs, connection.lost, info, path)
            except TimeoutError:
                raise DeadlineExceeded(f"attaching {info.name} takes long") from None
        finally:
            theirs.close()  # the kernel has it, and sees the end when the other one is closed

    @expose()
    def addresses(self) -> list[str]:
        """Where it listens."""
        return [listener.address for listener in self._state.listeners]

    @expose()
    def status(self) -> dict[str, Any]:
        """Addresses and connections."""
        return {
            "addresses": self.addresses(),
            "connections": [
                {"peer": c.peer, "export": c.export, "in_flight": c.inflight}
                for c in self._state.connections
            ],
        }

    # -- Exports -----------------------------------------------------------------------------------

    async def list(self) -> list[str]:
        """See Exports."""
        names: list[str] = await self.system.actor("volumes").list_names.remote()
        return names

    async def open(self, name: str) -> tuple[ExportInfo, BlockDevice]:
        """See Exports."""
        asked = self.system.actor("volumes").open.remote(name, timeout_s=GIVE_BACK_S)
        opening = asyncio.ensure_future(asked)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                opened, size, description, read_only = await asyncio.shield(opening)
        except TimeoutError:
            self._state.spawn(self._give_back(name, opening))
            raise DeadlineExceeded(f"opening {name or 'the default export'} takes long") from None
        info = ExportInfo(opened, size, description, read_only)
        return info, VolumeDevice(self.system, opened, self._connections)

    async def _give_back(self, name: str, opening: asyncio.Future[Any]) -> None:
        try:
            opened = await opening
        except TorusError as error:
            log.info("%s was not opened: %s", name or "the default export", error)
        else:
            await self.release(opened[0])

    async def release(self, name: str) -> None:
        """See Exports."""
        try:
            # With patience: nobody asks again, and the volume would stay open.
            await self.system.actor("volumes").release.call(name, timeout_s=GIVE_BACK_S)
        except TorusError as error:
            log.warning("releasing %s: %s", name or "the default export", error)
