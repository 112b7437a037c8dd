"""A network in memory: TCP as programs see it, with seeded latency, chunking and faults.

Bytes of one connection arrive in order. Between two hosts, and in each direction by itself, they
can be delayed or held back (a partition: nothing arrives, nobody is told, and what was sent arrives
when it ends, as TCP's retransmissions see to). A connection can be reset. A process that is killed
has its connections reset by its kernel; a host without power says nothing any more.

Data is passed on by reference until it arrives, as uvloop does with what the socket does not take
at once: who changes a buffer too early is found by the receiver's checksums.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torus_actors.scenarios.simloop import SimLoop, SimProcess, current_process
from torus_actors.scenarios.trace import Trace

LATENCY_S = 0.00005
"""Least time between two hosts; the rest is random."""

JITTER_S = 0.0002
"""Mean of the random part."""

BANDWIDTH_BYTES_S = 1.25e9
"""Of each connection: 10 Gbit/s."""

SOCKET_BUFFER_BYTES = 256 << 10
"""What the two kernels hold of a direction before the sender has to keep the rest."""

CHUNKING = 0.05
"""Chance that what arrives is cut in two at a random place, and the rest comes later."""

RECEIVE_BYTES_MAX = 256 << 10
"""At most so much in one go, as from a real socket."""

EPHEMERAL_PORT_FIRST = 49152

Host = str
Data = bytes | memoryview


class SimNetwork:
    """All hosts and the ways between them.

    Args:
        loop: whose network it is.
        rng: latency, and how data is cut up.
        trace: takes note of all that arrives.
    """

    def __init__(self, loop: SimLoop, rng: random.Random, trace: Trace) -> None:
        self.loop = loop
        self.rng = rng
        self.trace = trace
        self.connections: dict[SimTransport, None] = {}
        """The dialing ends of all connections."""
        self.bytes_sent = 0
        self._listeners: dict[tuple[Host, int], SimServer] = {}
        self._blocked: dict[tuple[Host, Host], int] = {}
        self._extra_s: dict[tuple[Host, Host], float] = {}
        self._dark: dict[Host, None] = {}
        self._next_port = EPHEMERAL_PORT_FIRST
        loop.network = self

    # -- faults ------------------------------------------------------------------------------------

    def block(self, source: Host, target: Host) -> None:
        """Hold back all that goes from one host to another; may be nested."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: Host, target: Host) -> None:
        """Take one `block` back; what was held arrives."""
        left = self._blocked.get((source, target), 0) - 1
        if left > 0:
            self._blocked[source, target] = left
            return
        self._blocked.pop((source, target), None)
        for end in self._ends():
            if end.host == source and end.other.host == target:
                end.release()

    def slow(self, source: Host, target: Host, extra_s: float) -> None:
        """Add random latency, up to ``extra_s``, in one direction; 0 ends it."""
        if extra_s:
            self._extra_s[source, target] = extra_s
        else:
            self._extra_s.pop((source, target), None)

    def power_off(self, host: Host) -> None:
        """The host says nothing any more, and hears nothing; its connections are gone."""
        self._dark[host] = None
        for end in self._ends():
            if end.host == host:
                end.vanish()

    def power_on(self, host: Host) -> None:
        """It answers again; connections from before are unknown to it."""
        self._dark.pop(host, None)
        for end in self._ends():
            if end.other.host == host and end.other.gone:
                end.remote_is_gone()

    def reset(self, connection: SimTransport) -> None:
        """Break a connection; both ends are told."""
        error = ConnectionResetError(104, "Connection reset by peer")
        for end in (connection, connection.other):
            end.break_off(error)

    def process_killed(self, process: SimProcess) -> None:
        """Its kernel closes its sockets: the other ends see a reset, unless a partition is between.

        To be called before or after the process is killed.
        """
        for address, server in list(self._listeners.items()):
            if server.process is process:
                del self._listeners[address]
        for end in self._ends():
            if end.process is process and not end.gone:
                # What the kernel took from the process is sent, unless something it did not read
                # makes the kernel reset the connection at once.
                orderly = self.rng.random() < 0.5
                end.vanish(orderly)
                if not orderly:
                    end.other.remote_is_gone()

    def heal(self) -> None:
        """End all delays and partitions."""
        self._extra_s.clear()
        for source, target in list(self._blocked):
            self._blocked[source, target] = 1
            self.unblock(source, target)

    # -- for transports ----------------------------------------------------------------------------

    def is_blocked(self, source: Host, target: Host) -> bool:
        """Whether nothing gets from one host to the other now."""
        return (source, target) in self._blocked

    def is_dark(self, host: Host) -> bool:
        """Whether the host has no power."""
        return host in self._dark

    def latency_s(self, source: Host, target: Host) -> float:
        """Of one packet."""
        draw = self.rng.random
        latency = LATENCY_S + JITTER_S * draw() * draw() * 4
        if self._extra_s:
            latency += self._extra_s.get((source, target), 0.0) * draw()
        return latency

    def _ends(self) -> list[SimTransport]:
        return [end for dialed in self.connections for end in (dialed, dialed.other)]

    # -- for the loop ------------------------------------------------------------------------------

    def listen(self, factory: Callable[[], Any], host: Host, port: int) -> SimServer:
        """Listen at an address of this process's host.

        Raises:
            OSError: the address is taken.
        """
        process = current_process()
        assert process is not None, "only simulated processes listen"
        if not port:
            port = self._take_port()
        taken = self._listeners.get((host, port))
        if taken is not None and taken.process.alive:
            raise OSError(98, "Address already in use")
        server = self._listeners[host, port] = SimServer(self, factory, process, (host, port))
        return server

    def forget(self, server: SimServer) -> None:
        """The server does not listen any more."""
        if self._listeners.get(server.address) is server:
            del self._listeners[server.address]

    def _take_port(self) -> int:
        port = self._next_port
        self._next_port = port + 1 if port < 65535 else EPHEMERAL_PORT_FIRST
        return port

    async def connect(
        self, factory: Callable[[], Any], host: Host, port: int
    ) -> tuple[SimTransport, Any]:
        """Connect from this process's host.

        Raises:
            ConnectionRefusedError: nobody listens there. (A host that is dark or cut off does not
                answer at all: the caller waits until it gives up.)
        """
        process = current_process()
        assert process is not None, "only simulated processes connect"
        here = process.address
        await asyncio.sleep(self.latency_s(here, host))
        # A SYN that gets lost is sent again, until the caller loses patience.
        pause = 0.2
        while self.is_blocked(here, host) or self.is_blocked(host, here) or self.is_dark(host):
            await asyncio.sleep(pause)
            pause = min(pause * 2, 3.0)
        server = self._listeners.get((host, port))
        if server is None or not server.process.alive:
            await asyncio.sleep(self.latency_s(host, here))
            raise ConnectionRefusedError(111, "Connection refused")
        protocol = factory()
        dialed = SimTransport(self, process, (here, self._take_port()), protocol)
        # The server's kernel accepts; its process finds out when it runs.
        accepted = SimTransport(self, server.process, (host, port), None)
        dialed.other, accepted.other = accepted, dialed
        self.connections[dialed] = None
        self.loop.call_soon(accepted.accept, server.factory, context=server.process.context)
        try:
            await asyncio.sleep(self.latency_s(host, here))
        except asyncio.CancelledError:
            dialed.abort()
            raise
        if dialed.is_closing():
            raise ConnectionResetError(104, "Connection reset by peer")
        dialed.made = True
        protocol.connection_made(dialed)
        dialed.wake_reader()
        return dialed, protocol


class SimServer:
    """What ``create_server`` returns."""

    def __init__(
        self,
        network: SimNetwork,
        factory: Callable[[], Any],
        process: SimProcess,
        address: tuple[Host, int],
    ) -> None:
        self.factory = factory
        self.process = process
        self.address = address
        self.sockets = [SimSocket(address, None)]
        self._network = network

    def close(self) -> None:
        """Stop listening."""
        self.sockets = []
        self._network.forget(self)

    def is_serving(self) -> bool:
        """Whether it listens."""
        return bool(self.sockets)

    async def wait_closed(self) -> None:
        """Connections live on without it."""


class SimSocket:
    """As much of a socket as programs ask of one."""

    def __init__(self, name: tuple[Host, int], peer: tuple[Host, int] | None) -> None:
        self._name = name
        self._peer = peer
        self.family = 2
        self.type = 1

    def getsockname(self) -> tuple[Host, int]:
        """Own address."""
        return self._name

    def getpeername(self) -> tuple[Host, int] | None:
        """The other end's."""
        return self._peer

    def setsockopt(self, *_: Any) -> None:
        """Options change nothing here."""


class SimTransport(asyncio.Transport):
    """One end of a connection.

    What this end sends lies in ``_sent`` until the other end has read it: (time of arrival, data,
    bytes); data None is the end of the stream.
    """

    other: SimTransport

    def __init__(
        self, network: SimNetwork, process: SimProcess, name: tuple[Host, int], protocol: Any
    ) -> None:
        super().__init__()
        self.process = process
        self.name = name
        self.host = process.address
        self.made = False
        self.gone = False
        """This end's kernel knows nothing of the connection any more."""
        self._network = network
        self._loop = network.loop
        self._protocol = protocol
        self._sent: deque[tuple[float, list[Data] | None, int]] = deque()
        self._unread = 0
        """Bytes in ``_sent``."""
        self._arrives = 0.0
        self._high, self._low = 64 << 10, 16 << 10
        self._writing_paused = False
        self._reading = True
        self._closing = False
        self._lost = False
        self._reader_set = False
        self.breaks_at: int | None = None
        """The connection breaks when this end has read so many bytes in one piece."""

    # -- the transport's interface -----------------------------------------------------------------

    def set_protocol(self, protocol: Any) -> None:
        """See asyncio."""
        self._protocol = protocol
        self.wake_reader()

    def get_protocol(self) -> Any:
        """See asyncio."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See asyncio."""
        if name == "peername":
            return self.other.name
        if name == "sockname":
            return self.name
        if name == "socket":
            return SimSocket(self.name, self.other.name)
        return default

    def is_closing(self) -> bool:
        """See asyncio."""
        return self._closing

    def is_reading(self) -> bool:
        """See asyncio."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """See asyncio."""
        self._reading = False

    def resume_reading(self) -> None:
        """See asyncio."""
        if not self._reading:
            self._reading = True
            self.wake_reader()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See asyncio."""
        if high is None:
            high = 64 << 10 if low is None else 4 * low
        self._high = high
        self._low = high // 4 if low is None else low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """See asyncio."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """See asyncio."""
        return max(0, self._unread - SOCKET_BUFFER_BYTES)

    def can_write_eof(self) -> bool:
        """See asyncio."""
        return False

    def write(self, data: Any) -> None:
        """See asyncio."""
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """See asyncio."""
        if self._closing or self._lost or not self.process.alive:
            return
        # Bytes need no view: nobody can change them.
        views: list[Data] = [
            data if type(data) is bytes else memoryview(data).cast("B")
            for data in list_of_data
            if len(data)
        ]
        size = sum(map(len, views))
        if not size:
            return
        if self.other.gone and not self._network.is_blocked(self.host, self.other.host):
            if not self._network.is_dark(self.other.host):
                self.remote_is_gone()
            return
        self._network.bytes_sent += size
        self._unread = unread = self._unread + size
        self._send(views, size)
        if unread - SOCKET_BUFFER_BYTES > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """See asyncio: what was written still arrives."""
        if self._closing or self._lost:
            return
        self._closing = True
        self._send(None, 0)
        self._loop.call_soon(self._connection_lost, None)

    def abort(self) -> None:
        """See asyncio."""
        if self._lost:
            return
        self._closing = True
        self._sent.clear()
        self._unread = 0
        self.other.remote_is_gone()
        self._loop.call_soon(self._connection_lost, None)

    # -- sending -----------------------------------------------------------------------------------

    def _send(self, views: list[Data] | None, size: int) -> None:
        network, loop, other = self._network, self._loop, self.other
        here, there = self.host, other.host
        when = loop.time() + network.latency_s(here, there) + size / BANDWIDTH_BYTES_S
        self._arrives = when = max(self._arrives, when)
        self._sent.append((when, views, size))
        if not network.is_blocked(here, there):
            loop.call_at(when, other.receive, context=other.process.context)

    def release(self) -> None:
        """A partition is over: what was held arrives, in order."""
        if not self._sent:
            return
        # Whole retransmission time-outs may pass before a sender finds that out.
        when = self._loop.time() + self._network.rng.random() * 0.2
        self._sent = deque((max(at, when), views, size) for at, views, size in self._sent)
        self._arrives = max(self._arrives, when)
        for at in sorted({at for at, _, _ in self._sent}):
            self._loop.call_at(at, self.other.receive, context=self.other.process.context)

    # -- receiving ---------------------------------------------------------------------------------

    def accept(self, factory: Callable[[], Any]) -> None:
        """The accepting process learns of the connection."""
        if self._lost:
            return
        self._protocol = factory()
        self.made = True
        self._protocol.connection_made(self)
        self.wake_reader()

    def wake_reader(self) -> None:
        """Look soon whether something has arrived."""
        if not self._reader_set and not self._lost:
            self._reader_set = True
            self._loop.call_soon(self._wake, context=self.process.context)

    def _wake(self) -> None:
        self._reader_set = False
        self.receive()

    def receive(self) -> None:
        """Hand what has arrived to the protocol."""
        sender = self.other
        sent = sender._sent
        network = self._network
        trace, blocked = network.trace, network.is_blocked
        there, here = sender.host, self.host
        now = self._loop.time()
        budget = RECEIVE_BYTES_MAX
        while (
            sent
            and self._reading
            and self.made
            and not self._lost
            and sent[0][0] <= now
            and not blocked(there, here)
        ):
            if budget <= 0:
                self.wake_reader()
                return
            _, views, size = sent.popleft()
            if views is None:
                self._closing = True
                sender.gone = True
                self._connection_lost(None)
                return
            if network.rng.random() < CHUNKING:
                views, later = _cut(views, size, network.rng)
                if later:
                    whole, size = size, sum(map(len, views))
                    when = now + network.latency_s(there, here)
                    sent.appendleft((when, later, whole - size))
                    self._loop.call_at(when, self.receive, context=self.process.context)
            budget -= size
            sender._unread -= size
            trace.data(now, there, here, views, size)
            self._deliver(views)
            if self.breaks_at is not None and size >= self.breaks_at:
                self.breaks_at = None
                network.reset(self)
                return
        if sender._writing_paused:
            sender.maybe_resume()

    def _deliver(self, views: list[Data]) -> None:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(b"".join(views))
            return
        get_buffer, updated = protocol.get_buffer, protocol.buffer_updated
        for view in views:
            if self._closing:
                return
            size = len(view)
            target = memoryview(get_buffer(-1))
            count = len(target)
            if size <= count:
                target[:size] = view
                updated(size)
                continue
            at = 0
            while True:
                target[:count] = view[at : at + count]
                updated(count)
                at += count
                if at >= size or self._closing:
                    break
                target = memoryview(get_buffer(-1))
                count = min(len(target), size - at)

    def maybe_resume(self) -> None:
        """The other end has read: let the protocol write again."""
        if self._writing_paused and self.get_write_buffer_size() <= self._low:
            self._loop.call_soon(self._resume_writing, context=self.process.context)

    def _resume_writing(self) -> None:
        if self._writing_paused and not self._lost and self.get_write_buffer_size() <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    # -- ending ------------------------------------------------------------------------------------

    def vanish(self, orderly: bool = False) -> None:
        """The kernel forgot this end, without a word to its process, which is dead.

        Args:
            orderly: what the process sent, and the end of the stream, still arrive.
        """
        if orderly and not self._closing:
            self._send(None, 0)
        elif not orderly:
            self._sent.clear()
            self._unread = 0
        self.gone = True
        self._lost = True
        self._closing = True
        if self.other.gone:
            self._network.connections.pop(self, None)
            self._network.connections.pop(self.other, None)

    def remote_is_gone(self) -> None:
        """The other end does not know this connection any more, and says so when asked."""
        network = self._network
        if self.gone or self._lost:
            return
        if network.is_blocked(self.other.host, self.host) or network.is_dark(self.other.host):
            return  # it cannot say so: this end waits until it notices by itself
        when = self._loop.time() + network.latency_s(self.other.host, self.host)
        error = ConnectionResetError(104, "Connection reset by peer")
        self._loop.call_at(
            max(when, self.other._arrives), self.break_off, error, context=self.process.context
        )

    def break_off(self, error: OSError) -> None:
        """The connection is broken; the protocol is told."""
        if not self._lost:
            self._closing = True
            self._loop.call_soon(self._connection_lost, error, context=self.process.context)

    def _connection_lost(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self.gone = True
        network = self._network
        # What this end sent before it closed is still under way.
        if self.other.gone or error is not None:
            network.connections.pop(self, None)
            network.connections.pop(self.other, None)
        if self.made:
            self._protocol.connection_lost(error)


def _cut(views: list[Data], size: int, rng: random.Random) -> tuple[list[Data], list[Data]]:
    """Cut data in two at a random byte."""
    at = rng.randrange(1, size + 1)
    first: list[Data] = []
    for i, view in enumerate(views):
        if at < len(view):
            rest = [view[at:], *views[i + 1 :]]
            return ([*first, view[:at]], rest) if at else (first, rest)
        first.append(view)
        at -= len(view)
    return first, []
