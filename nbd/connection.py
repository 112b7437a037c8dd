"""One NBD connection on an event loop: moves bytes between a transport and the sans-IO machines.

``NbdConnection`` is a ``BufferedProtocol``: bulk payloads are received straight into the buffer
that the device gets. Nothing here waits: exports are opened in a task of their own, and in the
transmission phase each wake-up of the socket is one plain call.

``NbdState`` owns what must outlive the actor that supervises the server: sockets, connections,
devices in use. That actor may die and be started again; the new one adopts the state, and no client
notices.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from torus_actors.errors import Closed, TorusError
from torus_actors.model.addresses import format_address
from torus_actors.model.buffers import BufferPool
from torus_actors.nbd import handshake as hs
from torus_actors.nbd.protocol import errno_of
from torus_actors.nbd.requests import BlockDevice, ExportInfo, Exports, Reply
from torus_actors.nbd.transmission import Load, Transmission

if TYPE_CHECKING:
    from torus_actors.nbd.server import NbdListener

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024
"""Connections of one server. A node's file descriptors and receive buffers are finite, and a client
that leaks connections must not take them all. For one more, the one is closed that has been in its
handshake for longest, if it is its client's turn: an honest client is through in milliseconds, and
those that say nothing must not keep it out. Where there is none, the newcomer is closed."""

HANDSHAKE_TIMEOUT_S = 120.0
"""How long a client may be silent in the handshake, when it is its turn. Long enough for a person
who types options into nbdsh; without it, port scanners would pile up."""

TLS_TIMEOUT_S = 20.0
"""For the TLS handshake after STARTTLS; two round trips and some arithmetic."""

HANDSHAKE_BUFFER_BYTES = 16 << 10
"""Received at once during the handshake; most options have fewer than 100 bytes."""

WRITE_HIGH_BYTES = 4 << 20
"""Replies waiting in the transport at which no further requests are taken from that client: enough
to keep a fast client's socket filled, and a slow one from holding the memory of many reads."""

UNIX_SEND_BUFFER_BYTES = 2 << 20
"""The kernel's default for unix sockets, 208 KiB, makes five wake-ups on either side of each
mebibyte. TCP tunes its own."""

WRITE_LOW_BYTES = 1 << 20
"""And at which requests are taken again."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How a listener encrypts; without one it does not.

    Attributes:
        context: server-side context, with its certificate loaded.
        required: refuse clients that do not start TLS.
    """

    context: ssl.SSLContext
    required: bool = False


class Wakeful(Protocol):
    """Is told when a request is due and when one came, so that it can keep the loop awake."""

    def expect(self) -> None:
        """Answers were sent: who got them may ask the next thing at once."""

    def came(self) -> None:
        """Something arrived."""


class NbdState:
    """Everything of an NBD server that outlives its supervising actor.

    Args:
        exports: who opens exports; replaced by ``adopt``.
        pool: source of payload buffers.
        wakeful: keeps the loop awake between an answer and the next request, if anything does.
    """

    def __init__(
        self, exports: Exports, pool: BufferPool | None = None, wakeful: Wakeful | None = None
    ) -> None:
        self.exports = exports
        self.pool = pool if pool is not None else BufferPool()
        self.wakeful = wakeful
        self.connections: dict[NbdConnection, None] = {}
        """In the order in which they came."""
        self.load = Load()
        """Of all connections."""
        self.listeners: list[NbdListener] = []
        self.open_names: Counter[str] = Counter()
        """Exports that connections hold open, by the name each of them gave to ``open``."""
        self._tasks: set[asyncio.Task[None]] = set()

    def adopt(self, exports: Exports) -> None:
        """Put another provider in charge: of all opens, and of the releases of what is open."""
        self.exports = exports

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a connection's slow work (open, release, TLS) beside it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def ease(self) -> None:
        """Let connections go on that wait for less to be in flight, if it is."""
        load = self.load
        if load.waiting and load.relaxed:
            waiting, load.waiting = load.waiting, {}
            for connection in waiting:
                asyncio.get_running_loop().call_soon(connection.go_on)

    def make_room(self) -> bool:
        """End the first connection that is silent in its handshake; False if there is none."""
        for connection in self.connections:
            if connection.silent:
                del self.connections[connection]
                connection.abort()
                return True
        return False

    async def settled(self) -> None:
        """Wait until no slow work is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def release(self, name: str) -> None:
        """Give an opened export back to whoever provides exports now."""
        self.open_names[name] -= 1
        if not self.open_names[name]:
            del self.open_names[name]
        try:
            await self.exports.release(name)
        except TorusError as error:
            log.warning("NBD export %r could not be released: %s", name, error)


class NbdConnection(asyncio.BufferedProtocol):
    """One client, from its greeting to its last reply.

    Args:
        state: what the connection belongs to.
        tls: how its listener encrypts.
        opened: an export that was opened for it: there is no handshake, and it gives it back.
    """

    def __init__(
        self,
        state: NbdState,
        tls: TlsSettings | None = None,
        opened: tuple[ExportInfo, BlockDevice] | None = None,
    ) -> None:
        self._state = state
        self._wakeful = state.wakeful
        self._tls = tls
        policy = hs.TlsPolicy.NONE
        if tls is not None:
            policy = hs.TlsPolicy.REQUIRED if tls.required else hs.TlsPolicy.ALLOWED
        self._handshake = hs.Handshake(policy)
        self._early = memoryview(bytearray(HANDSHAKE_BUFFER_BYTES))
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._progress_at = 0.0
        self._opened = opened
        self._name = opened[0].name if opened is not None else None
        self._device: BlockDevice | None = None
        self._tx: Transmission | None = None
        self._pumping = False
        self._reading_paused = False
        self._write_paused = False
        self._unread_bytes = 0
        self._closing = False
        self._lost_track = False
        self.number = 0
        """For the owner: how it names the connection in messages; 0 as long as it does not."""
        self.peer = "?"
        """Where the client is, for people."""
        self.lost: asyncio.Future[None] | None = None
        """Done when the connection is gone; None before it was made."""

    # --- what the owner sees ---------------------------------------------------------------

    @property
    def export(self) -> str | None:
        """Name of the export in use; None during the handshake."""
        return self._name

    @property
    def inflight(self) -> int:
        """Requests the device has not answered yet."""
        return self._tx.inflight if self._tx is not None else 0

    @property
    def silent(self) -> bool:
        """Whether it has no export, and waits for its client to ask for one."""
        return self._tx is None and self._opened is None and self._handshake.waits_for_client

    def shut_down(self) -> None:
        """Answer nothing new but ESHUTDOWN, and close once nothing is in flight."""
        self._handshake.shutting_down = True
        self._closing = True
        if self._tx is None:
            self._close("")
        else:
            self._tx.shutting_down = True
            self._settle()

    def abort(self) -> None:
        """End the connection at once; what is in flight is still answered, to nobody."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self.lost = loop.create_future()
        peer = transport.get_extra_info("peername")
        self.peer = format_address(peer[:2]) if isinstance(peer, tuple) else "unix socket"
        if len(self._state.connections) >= CONNECTIONS_MAX and not self._state.make_room():
            log.warning("NBD client %s refused: %d connections", self.peer, CONNECTIONS_MAX)
            self._transport.abort()
            return
        self._state.connections[self] = None
        self._transport.set_write_buffer_limits(WRITE_HIGH_BYTES, WRITE_LOW_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER_BYTES)
        if self._opened is not None:
            self._enter(hs.Enter(self._opened[0].name, False, False, b""))
            return
        self._progress_at = loop.time()
        self._timer = loop.call_later(HANDSHAKE_TIMEOUT_S, self._check_progress)
        self._drain_handshake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client; its export is released when its requests have been answered."""
        self._transport = None
        self._state.connections.pop(self, None)
        self._state.load.waiting.pop(self, None)
        self._count_unread(0)
        if self._timer is not None:
            self._timer.cancel()
        if self.lost is not None and not self.lost.done():
            self.lost.set_result(None)
        if self._tx is not None:
            self._tx.cut_off()
        self._release_if_done()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what arrives next."""
        tx = self._tx
        return tx.get_buffer() if tx is not None else self._early

    def buffer_updated(self, nbytes: int) -> None:
        """Handle what arrived."""
        tx = self._tx
        if tx is not None:
            if self._wakeful is not None:
                self._wakeful.came()
            tx.received(nbytes)
            self._pump()
            return
        self._progress_at = asyncio.get_running_loop().time()
        self._handshake.receive(self._early[:nbytes])
        self._drain_handshake()

    def eof_received(self) -> bool:
        """The client sends nothing more; whether the transport stays open for what it is owed.

        So it does behind a DISC: libnbd shuts its side down at once then, and waits for the answers
        to what it had sent before. TLS has no such state, in asyncio's eyes.
        """
        tx, transport = self._tx, self._transport
        owed = tx is not None and tx.disconnecting and tx.inflight > 0
        plain = transport is not None and transport.get_extra_info("sslcontext") is None
        return owed and plain

    def pause_writing(self) -> None:
        """The client does not read its replies: take no more requests from it."""
        self._write_paused = True
        if self._transport is not None:
            self._count_unread(self._transport.get_write_buffer_size())
        self._settle()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._write_paused = False
        self._count_unread(0)
        if self._tx is None:
            self._drain_handshake()
        self._pump()

    # --- transmission ----------------------------------------------------------------------

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answer requests; see ``requests.Replies``."""
        tx = self._tx
        assert tx is not None
        buffers = tx.encode(replies)
        transport = self._transport
        if transport is None:
            self._state.ease()
            self._release_if_done()
            return
        transport.writelines(buffers)
        if self._write_paused:
            self._count_unread(transport.get_write_buffer_size())
        self._state.ease()
        if self._wakeful is not None:
            self._wakeful.expect()
        if not self._pumping and (self._reading_paused or tx.disconnecting or self._closing):
            self._pump()

    def go_on(self) -> None:
        """There may be room for its next requests."""
        if self._transport is not None and not self._pumping:
            self._pump()

    def _pump(self) -> None:
        """Hand everything that arrived, and that the limits let through, to the device."""
        tx, device = self._tx, self._device
        if tx is None or device is None:
            self._settle()
            return
        self._pumping = True
        try:
            while not self._write_paused and self._transport is not None:
                batch = tx.requests()
                if tx.refused:
                    self.reply(tx.take_refused())
                if batch:
                    try:
                        device.submit(self, batch)
                    except TorusError as error:
                        errno, text = errno_of(error), str(error)
                        self.reply([Reply(request, errno, text) for request in batch])
                if not tx.limited or tx.full:
                    break
        except BaseException:
            # The device is broken and may never answer this batch: do not wait for it.
            self._lost_track = True
            tx.write_off()
            self._state.ease()
            self.abort()
            raise
        finally:
            self._pumping = False
        if tx.failure or tx.disconnecting or tx.full or self._closing or self._reading_paused:
            self._settle()

    def _settle(self) -> None:
        """Close, pause or resume reading, as the state of things demands."""
        transport, tx = self._transport, self._tx
        if transport is None or transport.is_closing():
            return
        if tx is not None:
            if tx.failure:
                self._close(tx.failure)
                return
            if (tx.disconnecting or self._closing) and not tx.inflight:
                # "The server MUST handle all outstanding requests, shut down the TLS session (if
                # one is running), and close the TCP session."
                self._close("")
                return
        if self._write_paused or (tx is not None and tx.full):
            if not self._reading_paused:
                self._reading_paused = True
                transport.pause_reading()
        elif self._reading_paused and (tx is None or tx.relaxed):
            self._reading_paused = False
            transport.resume_reading()
        load = self._state.load
        if self._reading_paused and not load.relaxed:
            load.waiting[self] = None  # its own answers may be the last to come

    def _count_unread(self, now: int) -> None:
        """What it was answered, and its client does not read, is still in memory."""
        self._state.load.bytes += now - self._unread_bytes
        self._unread_bytes = now
        if not now:
            self._state.ease()

    def _close(self, reason: str) -> None:
        if reason:
            log.info("NBD client %s: %s", self.peer, reason)
        if self._transport is not None:
            # Writes out what is queued first.
            self._transport.close()

    def _release_if_done(self) -> None:
        if self._name is None or self._transport is not None:
            return
        if self._tx is not None and self._tx.inflight and not self._lost_track:
            return
        name, self._name = self._name, None
        self._state.spawn(self._state.release(name))

    # --- handshake -------------------------------------------------------------------------

    def _check_progress(self) -> None:
        """The timer of the handshake: close a client that is silent when it is its turn."""
        self._timer = None
        if self._tx is not None or self._transport is None:
            return
        loop = asyncio.get_running_loop()
        due = self._progress_at + HANDSHAKE_TIMEOUT_S
        if not self._handshake.waits_for_client and not self._write_paused:
            due = loop.time() + HANDSHAKE_TIMEOUT_S
        elif loop.time() >= due:
            self._close("silent in the handshake")
            if self._write_paused:
                self.abort()  # what is queued will not be read either
            return
        self._timer = loop.call_at(due, self._check_progress)

    def _drain_handshake(self) -> None:
        """Do what the handshake asks for."""
        # Not while the client reads nothing: it may have asked for a thousand lists at once.
        while not self._write_paused and (event := self._handshake.next_event()) is not None:
            transport = self._transport
            if transport is None:
                return
            match event:
                case hs.Send(data):
                    transport.write(data)
                case hs.ListExports():
                    self._state.spawn(self._list())
                case hs.OpenExport(name, keep):
                    self._state.spawn(self._open(name, keep))
                case hs.StartTls():
                    # Nothing may be read between the acknowledgement and the TLS handshake.
                    transport.pause_reading()
                    self._state.spawn(self._start_tls(transport))
                case hs.Enter():
                    self._enter(event)
                case hs.Close(reason):
                    self._close(reason)

    async def _list(self) -> None:
        try:
            names = await self._state.exports.list()
        except TorusError as error:
            self._handshake.refused(error)
        else:
            self._handshake.listed(names)
        self._answered()

    async def _open(self, name: str, keep: bool) -> None:
        state = self._state
        try:
            info, device = await state.exports.open(name)
        except TorusError as error:
            self._handshake.refused(error)
            self._answered()
            return
        state.open_names[name] += 1
        if not keep:
            # Before the answer: a client that asked INFO must find the export free for its GO.
            await state.release(name)
            self._handshake.opened(info)
        elif self._transport is None or self._closing:
            await state.release(name)
            self._handshake.refused(Closed("the server is shutting down"))
        else:
            self._opened = (info, device)
            self._name = name
            self._handshake.opened(info)
        self._answered()

    def _answered(self) -> None:
        self._progress_at = asyncio.get_running_loop().time()
        self._drain_handshake()

    async def _start_tls(self, transport: asyncio.Transport) -> None:
        assert self._tls is not None
        try:
            secure = await asyncio.get_running_loop().start_tls(
                transport,
                self,
                self._tls.context,
                server_side=True,
                ssl_handshake_timeout=TLS_TIMEOUT_S,
            )
            if secure is None or transport.is_closing():
                # This side closed it meanwhile, which the TLS layer does not call a failure.
                raise ConnectionAbortedError("closed before it was done")
        except OSError as error:
            # "If the handshake is unsuccessful the server MUST terminate the session". The
            # transport belongs to the TLS layer by now, which does not tell this protocol.
            log.info("NBD client %s: TLS handshake failed: %s", self.peer, error)
            transport.abort()
            if self._transport is not None:
                self.connection_lost(error)
            return
        if self._transport is None:
            transport.abort()
            return
        self._transport = secure
        self._transport.set_write_buffer_limits(WRITE_HIGH_BYTES, WRITE_LOW_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER_BYTES)
        self._handshake.tls_started()
        self._answered()

    def _enter(self, event: hs.Enter) -> None:
        assert self._opened is not None
        info, device = self._opened
        self._opened = None
        self._early = memoryview(b"")
        self._device = device
        self._tx = Transmission(
            *(info, event.structured, event.allocation, self._state.pool, event.leftover),
            self._state.load,
        )
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if event.leftover:
            self._pump()
