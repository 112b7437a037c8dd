"""Connections between nodes: the asyncio side of the wire protocol.

The side that dialed calls, the side that accepted answers. A link lives until its connection
breaks, the other side falls silent, or a frame breaks a rule; it is never reused.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from torus_actors.actors import same_machine
from torus_actors.errors import (
    ActorNotFound,
    Invalid,
    NotSupported,
    Overloaded,
    PeerLost,
    ProtocolError,
    TorusError,
)
from torus_actors.model.addresses import format_address
from torus_actors.model.buffers import BufferPool
from torus_actors.runtime import ObjectRef, Reply
from torus_actors.runtime.messages import Call
from torus_actors.runtime.spinner import Spinner
from torus_actors.wire.frames import Buffer, Frame, FrameDecoder, Kind, encode
from torus_actors.wire.hello import Hello, Identity, PeerIdentity
from torus_actors.wire.limits import TIMEOUT_MAX_MS
from torus_actors.wire.messages import (
    decode_call,
    decode_error,
    decode_reply,
    encode_call,
    encode_error,
    encode_reply,
)

if TYPE_CHECKING:
    from torus_actors.runtime import ActorSystem

log = logging.getLogger(__name__)

PING_INTERVAL_S = 0.4
"""How often a link is looked after; a silent one is pinged."""

SILENCE_MAX_S = 1.5
"""A peer that sent nothing for this long, though pinged, is lost: with hand-off and hedging behind
it, a client then waits well under three seconds for a machine that was switched off."""

DIALER_SILENCE_MAX_S = 20.0
"""The side that dialed pings a link that is silent, so one that says nothing for this long is gone,
and what it left half-open is closed. Longer than above: nobody waits for it."""

HELLO_TIMEOUT_S = 3.0
"""A connection that has not introduced itself by then is closed, however much it has said."""

IN_FLIGHT_CALLS_MAX = 4096
"""Calls of one link without answer; more is a caller that does not wait."""

SERVED_CALLS_MAX = 1024
SERVED_BYTES_MAX = 64 << 20
"""What one connection may have in work here, with and without an answer; beyond it, it is not read
from, so that TCP makes the other side wait. 64 MiB are 128 blocks of the default size."""

OutCall = tuple[ObjectRef[Any], str, str, Sequence[Any], Any, bool, bool]
"""What gets the answer, actor, method, arguments, payload, ``checked``, ``resend``: see
`Bridge.call`."""

WRITE_HIGH_WATER = 32 << 20
"""Bytes waiting to be sent from which on a link takes no more calls, or no more to answer."""

HELD_ANSWERS_MAX = 2 * WRITE_HIGH_WATER
"""Bytes of answers, one not counted, that a node holds for who does not read them. Beyond half of
it, large ones are kept only if they must not be made twice; beyond this the connection is ended."""

SMALL_ANSWER_MAX = 4 << 10
"""An answer of so many bytes is kept rather than made again, which would cost more."""

AGAIN_CALLS = 8
"""Calls to answer again that are taken up when the socket keeps up again, and one more for each
that is answered: enough to keep it busy, and less than would fill it at once."""

HELD_CALLS_MAX = 512
"""Calls that wait for the socket to keep up, before more are refused. A refused call would send a
block to another peer than it belongs on, though nothing is wrong with this one."""


class Link(asyncio.BufferedProtocol):
    """What both sides share: framing, handshake, liveness.

    Args:
        system: the node's actor system.
        side: which side opened the connection.
        identity: of this node.
        secret: of the cluster, or None.
        pool: memory for payloads.
        spinner: is told when a message is due, and when one came.
        on_ready: called with the link once the other side is known.
        on_lost: called once with the link and the reason when it ended.

    Attributes:
        ready: whether the other side is known, and the connection holds.
        lost: whether the link has ended.
        broken: whether it ended because the connection did, not because a side gave the other up.
    """

    def __init__(
        self,
        system: ActorSystem,
        side: Literal["dial", "accept"],
        identity: Identity,
        secret: bytes | None,
        pool: BufferPool,
        spinner: Spinner,
        on_ready: Callable[[Link], None],
        on_lost: Callable[[Link, TorusError], None],
    ) -> None:
        self.system = system
        self.loop = system.loop
        self.ready = False
        self.lost = False
        self.broken = False
        self._side = side
        self._hello = Hello(side, identity, secret, system.rng.randbytes(32))
        self._decoder = FrameDecoder(pool.take)
        self._spinner = spinner
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._reason: TorusError | None = None
        self._heard_at = self._ticked_at = self.loop.time()
        self._hello_by = self._heard_at + HELLO_TIMEOUT_S
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self.get_buffer = self._decoder.get_buffer  # type: ignore[method-assign]

    @property
    def peer(self) -> PeerIdentity:
        """Who is at the other end."""
        return self._hello.peer

    @property
    def where(self) -> str:
        """The other end's address, for logs."""
        transport = self._transport
        name = transport.get_extra_info("peername") if transport is not None else None
        if isinstance(name, tuple):
            return format_address(name[:2])
        return "?" if name is None else "this machine"

    # -- asyncio's callbacks ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if self.lost:  # given up before it began
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            same_machine.tune(sock)
        self._heard_at = self._ticked_at = self.loop.time()
        self._hello_by = self._heard_at + HELLO_TIMEOUT_S
        self._timer = self.loop.call_later(PING_INTERVAL_S, self._tick)
        hello = self._hello.start()
        if hello:
            self._transport.writelines(hello)

    def get_buffer(self, sizehint: int) -> Any:
        """Where to receive; replaced by the decoder's own method."""
        return self._decoder.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """Handle what arrived; whatever breaks a rule ends this link and nothing else."""
        self._heard_at = self.loop.time()
        self._spinner.came()
        try:
            frames = self._decoder.buffer_updated(nbytes)
            while frames and not self.ready:
                frames = self._shake(frames)
            if frames:
                self._on_frames(frames)
        except TorusError as error:
            self._refuse(error)

    def _shake(self, frames: list[Frame]) -> list[Frame]:
        first, *rest = frames
        out = self._hello.receive(first)
        transport = self._transport
        assert transport is not None
        if out:
            transport.writelines(out)
        if self._hello.done:
            self.ready = True
            rest += self._decoder.lift_limits()
            self._on_ready(self)
        return rest

    def _refuse(self, error: TorusError) -> None:
        log.warning("connection with %s ended: %s", self.where, error)
        if self._transport is not None and not self._transport.is_closing():
            out = self._hello.refusal(error)
            if out:
                self._transport.writelines(out)
                self._reason = error
                self._transport.close()  # lets the refusal reach the other side
                return
        self.abort(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, for whatever reason."""
        self.broken = not self.lost and self._reason is None
        self._end(PeerLost(str(exc) if exc else "the other side closed the connection"))

    def abort(self, error: TorusError) -> None:
        """End the link now."""
        if self._transport is not None:
            self._transport.abort()
        self._end(error)

    def _end(self, error: TorusError) -> None:
        if self.lost:
            return
        self.lost = True
        self.ready = False
        if self._timer is not None:
            self._timer.cancel()
        reason = self._reason or error
        self._on_lost(self, reason)
        self._finish(reason)

    def _finish(self, reason: TorusError) -> None:
        """Let go of what hung on the link."""

    def _tick(self) -> None:
        now = self.loop.time()
        if now - self._ticked_at > 3 * PING_INTERVAL_S:
            # It was this side that slept; what the other said meanwhile is not read yet.
            self._heard_at = max(self._heard_at, now - PING_INTERVAL_S)
            self._hello_by = max(self._hello_by, now + PING_INTERVAL_S)
        self._ticked_at = now
        if self.ready:
            self._look_after(now - self._heard_at)
        elif now > self._hello_by:
            self.abort(PeerLost(f"no handshake within {HELLO_TIMEOUT_S:g} s"))
            return
        if not self.lost:
            self._timer = self.loop.call_later(PING_INTERVAL_S, self._tick)

    def _look_after(self, silence: float) -> None:
        """Every ``PING_INTERVAL_S`` on a link in use; ``silence`` in seconds."""

    def _on_frames(self, frames: list[Frame]) -> None:
        raise NotImplementedError


class OutLink(Link):
    """The dialing side: sends calls, receives their answers in any order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_flight: dict[int, OutCall] = {}
        self._held: deque[OutCall] = deque()
        self._next_id = 1
        self._congested = False

    def pause_writing(self) -> None:
        """The socket does not keep up."""
        self._congested = True

    def resume_writing(self) -> None:
        """It does again."""
        self._congested = False
        while self._held and not self._congested and not self.lost:
            call = self._held.popleft()
            if not call[0].done():
                self.call(call)

    def call(self, call: OutCall) -> None:
        """Send a call; what gets the answer must have a deadline."""
        if self._congested and len(self._held) < HELD_CALLS_MAX:
            self._held.append(call)
            return
        ref, actor, method, args, payload, checked, _ = call
        if self._congested or len(self._in_flight) >= IN_FLIGHT_CALLS_MAX:
            ref.fail(Overloaded(f"the link to {self.where} is full"))
            return
        assert ref.deadline is not None and self._transport is not None
        left_ms = int((ref.deadline - self.loop.time()) * 1000)
        request_id = self._next_id
        try:
            meta = encode_call(actor, method, args, min(max(left_ms, 1), TIMEOUT_MAX_MS))
            out = encode(Kind.CALL, request_id, meta, _parts(payload), checked)
        except TorusError as error:
            ref.fail(error)
            return
        self._next_id = request_id + 1
        self._in_flight[request_id] = call
        self._transport.writelines(out)
        self._spinner.expect()

    def cast(self, actor: str, method: str, args: Sequence[Any], payload: Any) -> None:
        """Send a message without an answer."""
        if not self._congested:
            assert self._transport is not None
            meta = encode_call(actor, method, args, 0)
            self._transport.writelines(encode(Kind.CAST, 0, meta, _parts(payload)))

    def _on_frames(self, frames: list[Frame]) -> None:
        for kind, request_id, meta, payload in frames:
            # Decoded before its call is forgotten: what cannot be read ends the link, and that
            # fails all calls that are known.
            if kind is Kind.REPLY:
                result = decode_reply(meta)
                call = self._in_flight.pop(request_id, None)
                if call is not None:  # otherwise its caller gave up on it
                    call[0]._resolve(result if payload is None else Reply(result, (payload,)))
            elif kind is Kind.ERROR:
                error = decode_error(meta)
                call = self._in_flight.pop(request_id, None)
                if call is not None:
                    call[0]._reject(error)
            elif kind is Kind.HELLO:
                self._hello.receive(Frame(kind, request_id, meta, payload))  # a late refusal
            elif kind is not Kind.PONG:
                raise ProtocolError(f"{kind.name} frame from the side that answers")

    def _look_after(self, silence: float) -> None:
        if silence > SILENCE_MAX_S:
            self.abort(PeerLost(f"silent for {silence:.1f} s"))
            return
        if silence > PING_INTERVAL_S / 2:
            assert self._transport is not None
            self._transport.writelines(encode(Kind.PING, 0))
        # Forget calls that were given up.
        for request_id in [i for i, call in self._in_flight.items() if call[0].done()]:
            del self._in_flight[request_id]
        self._held = deque(call for call in self._held if not call[0].done())

    def take_resent(self) -> list[OutCall]:
        """Calls without an answer that may be sent again, in order; they are the caller's now."""
        unanswered = [*self._in_flight.values(), *self._held]
        self._in_flight = {i: call for i, call in self._in_flight.items() if not call[-1]}
        self._held = deque(call for call in self._held if not call[-1])
        return [call for call in unanswered if call[-1]]

    def _finish(self, reason: TorusError) -> None:
        lost, self._in_flight = self._in_flight, {}
        held, self._held = self._held, deque()
        for ref, *_ in [*lost.values(), *held]:
            ref.fail(PeerLost(f"connection lost: {reason}"))


class InLink(Link):
    """The accepting side: hands calls to actors here and sends back what they answer.

    Calls that are in work when the other side stops reading are answered all the same, and what
    they answer is more than a node can hold. So those answers that are large, and may be made
    twice, are thrown away, and their calls kept, to be done again when there is room.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls = 0
        self._bytes = 0
        self._paused = False
        self._congested_at: float | None = None
        self._again: deque[tuple[int, bytes | memoryview, float]] = deque()
        """Calls to be done again: request id, metadata, deadline. Nothing is read while there are
        any."""

    def pause_writing(self) -> None:
        """The other side does not read its answers: take no more calls from it."""
        self._congested_at = self.loop.time()
        self._pause()

    def resume_writing(self) -> None:
        """It does again."""
        self._congested_at = None
        self._serve_again(AGAIN_CALLS)

    def _serve_again(self, count: int) -> None:
        count = min(count, SERVED_CALLS_MAX - self._calls)
        while count > 0 and self._again and self._congested_at is None and not self.lost:
            request_id, meta, deadline = self._again.popleft()
            # Else nobody waits any more, and the answer would only be in the way of others.
            if self.loop.time() <= deadline:
                self._serve(True, request_id, meta, None, deadline)
                count -= 1
        self._resume()

    def _pause(self) -> None:
        transport = self._transport
        if not self._paused and transport is not None and not transport.is_closing():
            self._paused = True
            transport.pause_reading()

    def _resume(self) -> None:
        transport = self._transport
        if (
            self._paused
            and not self._again
            and self._congested_at is None
            and self._calls <= SERVED_CALLS_MAX // 2
            and self._bytes <= SERVED_BYTES_MAX // 2
            and transport is not None
            and not transport.is_closing()
        ):
            self._paused = False
            self._heard_at = self.loop.time()
            transport.resume_reading()

    def _look_after(self, silence: float) -> None:
        if self._congested_at is not None:
            stuck = self.loop.time() - self._congested_at
            if stuck > DIALER_SILENCE_MAX_S:
                self.abort(PeerLost(f"answers not read for {stuck:.0f} s"))
            return
        if self._again:
            # Those that were taken up may hang: the others, and whatever comes next, need not.
            self._serve_again(AGAIN_CALLS)
        if self._paused or silence <= PING_INTERVAL_S:
            # A ping may be stuck behind a large payload, or not be read at all for now: say
            # unasked that this side lives.
            assert self._transport is not None
            self._transport.writelines(encode(Kind.PONG, 0))
        elif silence > DIALER_SILENCE_MAX_S:
            self.abort(PeerLost(f"silent for {silence:.0f} s"))

    def _on_frames(self, frames: list[Frame]) -> None:
        transport = self._transport
        assert transport is not None
        for kind, request_id, meta, payload in frames:
            if kind is Kind.CALL or kind is Kind.CAST:
                self._serve(kind is Kind.CALL, request_id, meta, payload)
            elif kind is Kind.PING:
                transport.writelines(encode(Kind.PONG, request_id))
            else:
                raise ProtocolError(f"{kind.name} frame from the side that calls")
        if self._calls > SERVED_CALLS_MAX or self._bytes > SERVED_BYTES_MAX:
            self._pause()

    def _serve(
        self,
        answered: bool,
        request_id: int,
        meta: bytes | memoryview,
        payload: memoryview | None,
        deadline: float | None = None,
    ) -> None:
        actor, method, args, timeout_ms = decode_call(meta)
        if deadline is None:
            deadline = self.loop.time() + timeout_ms / 1000
        reply: WireReply
        if not answered:
            reply = CastReply(self, 0, None, len(meta) + len(payload or b""), deadline)
        elif payload is None:
            reply = WireReply(self, request_id, meta, len(meta), deadline)
        else:
            reply = WireReply(self, request_id, None, len(meta) + len(payload), deadline)
        try:
            cell = self.system.cells.get(actor)
            if cell is None or cell.ended:
                raise ActorNotFound(f"no actor {actor} on this node")
            handler = cell.handlers.get(method)
            if handler is None or not handler.remote:
                if not cell.handlers:
                    raise ActorNotFound(f"{actor} has not started yet")
                raise NotSupported(f"{actor} has no method {method} for other nodes")
            handler.check(args, payload is not None)
            if cell.waiting() >= cell.spec.inbox_max:
                raise Overloaded(f"{actor} has {cell.spec.inbox_max} messages waiting")
        except TorusError as error:
            if answered:
                reply.fail(error)
            else:
                reply.set()
            return
        kwargs = {} if payload is None else {"payload": payload}
        cell.inbox.put(Call(method, tuple(args), kwargs, reply))

    def taken(self, size: int) -> None:
        """A message of ``size`` bytes came into work."""
        self._calls += 1
        self._bytes += size

    def answered(self, reply: WireReply, out: list[Buffer]) -> None:
        """It is handled, and this is the answer, if there is one."""
        self._calls -= 1
        self._bytes -= reply.size
        if self.lost:
            return
        if out and (self._congested_at is None or self._has_room(reply, out)):
            assert self._transport is not None
            self._transport.writelines(out)
            self._spinner.expect()  # who got one answer may ask the next thing
        if self._paused:
            if self._again:
                # Later: what cannot be served is answered at once, and there may be many.
                self.loop.call_soon(self._serve_again, 1)
            else:
                self._resume()

    def _has_room(self, reply: WireReply, out: list[Buffer]) -> bool:
        """Whether an answer is kept, though those before it have not been read."""
        size = sum(memoryview(part).nbytes for part in out)
        meta = reply.meta
        if size > SMALL_ANSWER_MAX and meta is not None and self._may_be_repeated(meta):
            self._again.append((reply.request_id, meta, reply.deadline))
            return False
        assert self._transport is not None
        held = self._transport.get_write_buffer_size()
        if held > HELD_ANSWERS_MAX:
            self.abort(PeerLost(f"{held >> 20} MiB of answers are not read"))
            return False
        return True

    def _may_be_repeated(self, meta: bytes | memoryview) -> bool:
        actor, method, _, _ = decode_call(meta)
        cell = self.system.cells.get(actor)
        handler = cell.handlers.get(method) if cell is not None else None
        return handler is not None and handler.idempotent

    def _finish(self, reason: TorusError) -> None:
        self._again.clear()


class WireReply:
    """Where an actor's answer to a call from another node goes; an ObjectRef's other half.

    Args:
        link: the call came by it.
        request_id: of the call.
        meta: of the call, by which it can be done again; None if it had a payload.
        size: bytes of the call.
        deadline: loop time after which nobody waits for it.
    """

    __slots__ = ("_done", "_link", "deadline", "meta", "request_id", "size")

    def __init__(
        self,
        link: InLink,
        request_id: int,
        meta: bytes | memoryview | None,
        size: int,
        deadline: float,
    ) -> None:
        self._link = link
        self.request_id = request_id
        self.meta = meta
        self.size = size
        self._done = False
        self.deadline = deadline
        link.taken(size)

    def done(self) -> bool:
        """Whether nobody waits any more: answered, given up, or the connection is gone."""
        if not self._done and (self._link.lost or self._link.loop.time() > self.deadline):
            self._done = True
            self._link.answered(self, [])
        return self._done

    def set(self, value: Any = None) -> None:
        """Answer; any thread."""
        self._link.system.on_loop(self._set, value)

    def fail(self, error: BaseException) -> None:
        """Fail; any thread."""
        self._link.system.on_loop(self._fail, error)

    def set_exception(self, exc_info: Any = None) -> None:
        """Fail with an exception triple; any thread."""
        self.fail(exc_info[1])

    def _set(self, value: Any) -> None:
        if self._done:
            return
        try:
            if type(value) is Reply:
                meta = encode_reply(value.result)
                out = encode(Kind.REPLY, self.request_id, meta, value.payload, value.checked)
            else:
                out = encode(Kind.REPLY, self.request_id, encode_reply(value))
        except Invalid as error:
            self._fail(error)
            return
        self._done = True
        self._link.answered(self, out)

    def _fail(self, error: BaseException) -> None:
        if self._done:
            return
        self._done = True
        known = error if isinstance(error, TorusError) else TorusError(repr(error))
        self._link.answered(self, encode(Kind.ERROR, self.request_id, encode_error(known)))


class CastReply(WireReply):
    """Where the answer to a message goes that wants none: it tells when the message is handled."""

    __slots__ = ()

    def done(self) -> bool:
        """Never before it is handled: nobody waits, and the handler is to do its work."""
        return False

    def _set(self, value: Any) -> None:
        if not self._done:
            self._done = True
            self._link.answered(self, [])

    def _fail(self, error: BaseException) -> None:
        if not self._done:
            log.warning("a message from %s: %s", self._link.where, error)
        self._set(None)


def _parts(payload: Any) -> Sequence[Buffer]:
    if payload is None:
        return ()
    return payload if isinstance(payload, (list, tuple)) else (payload,)
