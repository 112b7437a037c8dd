"""Bridge and links over real loopback TCP: liveness, order, bounds, and who may come in."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.runtime_harness import on_loop, on_uvloop, until
from torus_actors.actors import bridge, links
from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.actors.metadata import ActorStore
from torus_actors.errors import (
    Again,
    DeadlineExceeded,
    Invalid,
    NoPeer,
    PeerLost,
    ProtocolError,
    TorusError,
    Unauthenticated,
)
from torus_actors.metadata.kv import Put
from torus_actors.metadata.patience import refusal
from torus_actors.metadata.service import MetadataService
from torus_actors.runtime import (
    ActorSystem,
    ChildSpec,
    LoopActor,
    ObjectRef,
    Reply,
    SupervisorSpec,
    expose,
)
from torus_actors.wire.frames import FrameDecoder, encode
from torus_actors.wire.hello import Hello, Identity, Role
from torus_actors.wire.limits import PAYLOAD_MAX
from torus_actors.wire.messages import encode_call

SECRET = b"a secret of the cluster"

NO_LONGER_YOUNG_S = 2 * bridge.REDIAL_AFTER_S
"""Age of a link that is replaced at once when it breaks. Not just so long: by a clock of whole
milliseconds that may be a little less."""


class Echo(LoopActor):
    """What is called from the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = 0
        self.made = 0

    @expose(remote=True)
    async def after(self, pause_ms: int, value: int) -> int:
        """Answer later."""
        await asyncio.sleep(pause_ms / 1000)
        return value

    @expose(remote=True)
    async def gated(self, *, payload: memoryview) -> int:
        """Answer when the gate opens."""
        self.waiting += 1
        await self.gate.wait()
        return len(payload)

    @expose(remote=True, idempotent=True)
    def large(self, size: int) -> Reply:
        """Answer so many bytes."""
        self.made += 1
        return Reply(size, (bytes(size),))

    @expose(remote=True)
    def large_once(self, size: int) -> Reply:
        """The same, and it may not be done twice."""
        return Reply(size, (bytes(size),))

    @expose(remote=True)
    async def told(self, text: str, *, payload: memoryview | None = None) -> None:
        """Done when the gate opens."""
        self.waiting += 1
        await self.gate.wait()
        if text:
            raise Invalid(text)

    @expose(remote=True)
    def double(self, *, payload: memoryview) -> Reply:
        """Answer the payload twice."""
        return Reply(len(payload), (payload, payload))

    @expose(remote=True)
    def refuse(self, text: str) -> None:
        """Fail."""
        raise Invalid(text)

    @expose(remote=True)
    def hang_up(self) -> None:
        """Break every connection."""
        self.waiting += 1
        break_all(self.system.cells["bridge"].actor)

    @expose()
    def private(self) -> None:
        """Not for others."""


def break_all(bridge: Any) -> None:
    """Break all connections that a bridge has accepted."""
    for link in list(bridge._in_links):
        link.abort(PeerLost("on purpose"))


class End:
    """One node: a system with a bridge and an echo."""

    def __init__(
        self,
        port: int | None,
        secret: bytes | None = None,
        cluster: str | None = "c",
        shortcut: bool = False,
    ) -> None:
        self.node = str(uuid.uuid4())
        self.port = port
        identity = Identity(cluster, self.node, Role.NODE, 1, "test")
        listen = None if port is None else ("127.0.0.1", port)
        self._config = BridgeConfig(identity, listen, secret, shortcut=shortcut)
        self.system = ActorSystem(
            asyncio.get_running_loop(), node_id=self.node, rng=random.Random(self.node)
        )

    async def start(self) -> None:
        """Start it."""
        await self.system.start(
            SupervisorSpec(
                "root",
                (
                    ChildSpec("bridge", lambda: Bridge(self._config)),
                    ChildSpec("echo", Echo, max_concurrency=5000),
                ),
                backoff_first_s=0.001,
            )
        )

    @property
    def bridge(self) -> Any:
        """The bridge actor itself."""
        return self.system.cells["bridge"].actor

    @property
    def echo(self) -> Any:
        """The echo actor itself."""
        return self.system.cells["echo"].actor

    def knows(self, *others: End) -> None:
        """Connect with others."""
        self.system.actor("bridge").set_peers.tell(
            {other.node: f"127.0.0.1:{other.port}" for other in others}
        )

    def at(self, other: End) -> Any:
        """The echo of another."""
        return self.system.actor("echo", node=other.node)

    def link_to(self, other: End) -> Any:
        """The outgoing link."""
        return self.bridge._peers[other.node].link


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def pair(
    secret: bytes | None = None, other_secret: bytes | None = None
) -> AsyncIterator[tuple[End, End]]:
    """A caller that knows a server."""
    server = End(free_port(), secret)
    caller = End(None, secret if other_secret is None else other_secret)
    await server.start()
    await caller.start()
    caller.knows(server)
    await until(lambda: caller.bridge._peers)
    try:
        yield caller, server
    finally:
        if server.echo is not None:
            server.echo.gate.set()  # or stopping waits for those who wait at it
        await caller.system.stop()
        await server.system.stop()


async def up(caller: End, server: End) -> None:
    """Wait until they are connected."""
    await until(lambda: caller.bridge.is_up(server.node))


async def under_way(caller: End, server: End) -> Any:
    """A call that waits at the gate, may be sent again, and is on a link that is not young."""
    call = caller.at(server).gated.remote(payload=b"x", timeout_s=60.0, resend=True)
    await until(lambda: server.echo.waiting == 1)
    await asyncio.sleep(NO_LONGER_YOUNG_S)
    return call


async def stop_listening(server: End) -> None:
    """Take no more connections; those that there are stay."""
    for listener in server.bridge._servers:
        listener.close()
        await listener.wait_closed()


async def reason(caller: End) -> str:
    """Why the caller is not connected."""
    (peer,) = await caller.system.actor("bridge").peers.remote()
    told: str = peer["reason"]
    return told


# -- calls -----------------------------------------------------------------------------------------


@on_uvloop
async def test_many_calls_in_flight_are_answered_out_of_order() -> None:
    """A thousand calls at once, each answered after its own time, get their own answers."""
    async with pair(SECRET) as (caller, server):
        await up(caller, server)
        order: list[int] = []
        calls = []
        for n in range(1000):
            call = caller.at(server).after.remote((n * 7919) % 50, n, timeout_s=5.0)
            call.add_done_callback(lambda _, n=n: order.append(n))
            calls.append(call)
        assert [await call for call in calls] == list(range(1000))
        assert order != sorted(order)
        await until(lambda: not caller.link_to(server)._in_flight)
        (link,) = server.bridge._in_links
        assert link._calls == link._bytes == 0


@on_uvloop
async def test_payloads_of_all_sizes_arrive_unchanged() -> None:
    """From nothing to many mebibytes, both ways, several at once."""
    async with pair() as (caller, server):
        rng = random.Random(1)
        payloads = [rng.randbytes(size) for size in (1, 4096, 65536, 65537, 1 << 20, 5 << 20)]
        calls = [caller.at(server).double.remote(payload=payload) for payload in payloads]
        for call, payload in zip(calls, payloads, strict=True):
            answer = await call
            assert answer.result == len(payload) and bytes(answer.joined()) == payload * 2


@on_uvloop
async def test_errors_keep_their_class_and_harm_nobody() -> None:
    """What the other side refuses is told as it is, and the link lives on."""
    async with pair() as (caller, server):
        with pytest.raises(Invalid, match="no, thanks"):
            await caller.at(server).refuse.remote("no, thanks")
        for broken in (
            caller.at(server).private.remote(),
            caller.at(server).missing.remote(),
            caller.at(server).after.remote("text", 1),
            caller.at(server).after.remote(-1, 1),
            caller.system.actor("nobody", node=server.node).after.remote(1, 1),
        ):
            with pytest.raises(TorusError):
                await broken
        assert await caller.at(server).after.remote(0, 5) == 5
        with pytest.raises(NoPeer):
            await caller.system.actor("echo", node="unknown").after.remote(0, 1)


@on_uvloop
async def test_an_oversized_call_is_refused_by_its_sender_and_by_the_receiver() -> None:
    """A payload over the limit is not sent.

    An answer over the limit is an error, not a lost link; and a frame that announces too much ends
    its connection before anything is allocated.
    """
    async with pair() as (caller, server):
        with pytest.raises(Invalid):
            await caller.at(server).double.remote(payload=bytes(PAYLOAD_MAX + 1))
        with pytest.raises(TorusError):
            await caller.at(server).large.remote(PAYLOAD_MAX + 1)
        assert await caller.at(server).after.remote(0, 5) == 5
        header = bytearray(b"".join(bytes(part) for part in encode(links.Kind.PING, 0)))
        reader, writer = await shaken(server)
        header[-12:] = struct.pack("<III", 1 << 31, 0, 0)
        writer.write(bytes(header) * 3)
        assert await reader.read(1000) is not None
        await gone(reader)
        writer.close()
        assert await caller.at(server).after.remote(0, 6) == 6


# -- liveness --------------------------------------------------------------------------------------


@on_uvloop
async def test_a_lost_peer_fails_what_is_in_flight_at_once() -> None:
    """The connection breaks with calls under way.

    All fail with PeerLost, long before their time.
    """
    async with pair() as (caller, server):
        calls = [caller.at(server).gated.remote(payload=b"x", timeout_s=60.0) for _ in range(50)]
        await until(lambda: server.echo.waiting == 50)
        started = time.monotonic()
        break_all(server.bridge)
        for call in calls:
            with pytest.raises(PeerLost):
                await call
        assert time.monotonic() - started < 0.5
        assert not server.bridge._in_links or caller.bridge.is_up(server.node)


@pytest.mark.parametrize(("method", "encoder"), [("after", "reply"), ("refuse", "error")])
@on_uvloop
async def test_an_answer_that_cannot_be_read_fails_its_call_at_once(
    method: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the connection, and with it the very call that it answers, not only the others."""
    async with pair() as (caller, server):
        await up(caller, server)
        other = caller.at(server).gated.remote(payload=b"x", timeout_s=60.0)
        await until(lambda: server.echo.waiting == 1)
        monkeypatch.setattr(links, f"encode_{encoder}", lambda _: b"\xc1")
        args = (0, 1) if method == "after" else ("no, thanks",)
        call = getattr(caller.at(server), method).remote(*args, timeout_s=60.0)
        started = time.monotonic()
        for lost in (call, other):
            with pytest.raises(PeerLost, match="connection lost: metadata"):
                await lost
        assert time.monotonic() - started < 0.5
        server.echo.gate.set()


@pytest.mark.parametrize("size", [1, 1 << 20])
@on_uvloop
async def test_what_may_be_done_twice_outlives_a_broken_connection(size: int) -> None:
    """It is sent again over the next one, also what waited for a socket that did not keep up."""
    async with pair() as (caller, server):
        await up(caller, server)
        payload, at = bytes(size), caller.at(server)
        again = [at.gated.remote(payload=payload, timeout_s=60.0, resend=True) for _ in range(100)]
        once = at.gated.remote(payload=payload, timeout_s=60.0)
        given_up = at.gated.remote(payload=payload, timeout_s=60.0, resend=True)
        await until(lambda: server.echo.waiting >= 60)
        given_up.future.cancel()
        await asyncio.sleep(NO_LONGER_YOUNG_S)
        before = server.echo.waiting
        break_all(server.bridge)
        with pytest.raises(PeerLost, match="connection lost"):
            await once
        later = at.after.remote(0, 7)
        assert not caller.bridge.is_down(server.node)
        server.echo.gate.set()
        assert [await call for call in again] == [size] * 100
        assert await later == 7
        assert server.echo.waiting == before + 100


@on_uvloop
async def test_nothing_waits_for_a_peer_that_is_gone() -> None:
    """Its process has ended, with its connections: that is known at once."""
    async with pair() as (caller, server):
        await up(caller, server)
        call = await under_way(caller, server)
        started = time.monotonic()
        await stop_listening(server)
        break_all(server.bridge)
        with pytest.raises(PeerLost, match="cannot be reached"):
            await call
        assert time.monotonic() - started < 0.5


@on_uvloop
async def test_nothing_waits_long_for_a_peer_that_broke_a_connection_and_says_nothing() -> None:
    """The next connection comes to be, and nobody introduces himself on it."""
    async with pair() as (caller, server):
        await up(caller, server)
        call = await under_way(caller, server)
        await stop_listening(server)
        with socket.create_server(("127.0.0.1", server.port or 0)):
            started = time.monotonic()
            break_all(server.bridge)
            with pytest.raises(PeerLost, match="cannot be reached: no connection again"):
                await call
            assert time.monotonic() - started < bridge.REDIAL_S + 0.5
            assert caller.bridge.is_down(server.node)
            with pytest.raises(PeerLost, match="cannot be reached"):
                await caller.at(server).after.remote(0, 1, timeout_s=60.0)
            assert time.monotonic() - started < bridge.REDIAL_S + 0.5


@on_uvloop
async def test_a_call_that_breaks_every_connection_is_not_sent_for_ever() -> None:
    """A connection that breaks at once is not replaced at once, and what was on it fails."""
    async with pair() as (caller, server):
        await up(caller, server)
        await asyncio.sleep(NO_LONGER_YOUNG_S)
        with pytest.raises(PeerLost):
            await caller.at(server).hang_up.remote(timeout_s=60.0, resend=True)
        assert server.echo.waiting == 2
        await up(caller, server)
        assert await caller.at(server).after.remote(0, 1) == 1


@on_uvloop
async def test_a_silent_peer_is_noticed_in_time() -> None:
    """Regression, found by reading: a dead peer that refuses nothing stalls every operation.

    Here a side that is connected and says nothing, as if stopped, is known within 2.5 s.
    """
    async with pair() as (caller, server):
        await up(caller, server)
        (link,) = server.bridge._in_links
        link._transport.pause_reading()
        link._timer.cancel()
        started = time.monotonic()
        with pytest.raises(PeerLost, match="silent"):
            await caller.at(server).after.remote(0, 1, timeout_s=60.0)
        assert time.monotonic() - started < 2.5
        await up(caller, server)
        assert await caller.at(server).after.remote(0, 1) == 1


@on_uvloop
async def test_a_busy_peer_is_not_taken_for_a_silent_one() -> None:
    """The other side reads no more because it has too much in work, and says so: it is not lost."""
    async with pair() as (caller, server):
        block = bytes(1 << 20)
        calls = [caller.at(server).gated.remote(payload=block, timeout_s=60.0) for _ in range(70)]
        await until(lambda: any(link._paused for link in server.bridge._in_links))
        started = time.monotonic()
        await until(lambda: time.monotonic() - started > 2.5)
        assert caller.bridge.is_up(server.node)
        server.echo.gate.set()
        assert [await call for call in calls] == [1 << 20] * 70


@on_uvloop
async def test_who_slept_itself_does_not_blame_the_other() -> None:
    """This process stood still for longer than a silence may last: the link survives."""
    async with pair() as (caller, server):
        await up(caller, server)
        link = caller.link_to(server)
        time.sleep(links.SILENCE_MAX_S + 0.5)  # noqa: ASYNC251 - stands still on purpose
        assert await caller.at(server).after.remote(600, 1) == 1
        assert caller.link_to(server) is link


@on_uvloop
async def test_what_a_dialer_left_half_open_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialer that was switched off says nothing any more.

    Its connection does not stay for ever.
    """
    monkeypatch.setattr(links, "DIALER_SILENCE_MAX_S", 1.0)
    async with pair() as (_, server):
        _, writer = await shaken(server)
        await until(lambda: link_from(writer, server) is None)
        writer.close()


@on_uvloop
async def test_it_connects_again_after_the_peer_was_away() -> None:
    """With the peer gone calls fail at once, attempts back off; when it is back all is well."""
    async with pair() as (caller, server):
        await up(caller, server)
        await server.system.stop()
        await until(lambda: caller.bridge.is_down(server.node))
        peer = caller.bridge._peers[server.node]
        await until(lambda: peer.failures >= 4)
        started = time.monotonic()
        with pytest.raises(PeerLost, match="cannot be reached"):
            await caller.at(server).after.remote(0, 1, timeout_s=60.0)
        assert time.monotonic() - started < 0.2
        again = End(server.port)
        again.node = server.node
        again._config = server._config
        again.system = ActorSystem(
            asyncio.get_running_loop(), node_id=server.node, rng=random.Random(2)
        )
        await again.start()
        await up(caller, again)
        assert not caller.bridge.is_down(server.node) and peer.failures == 0
        assert await caller.at(again).after.remote(0, 9) == 9
        await again.system.stop()


@on_uvloop
async def test_a_killed_bridge_fails_its_calls_and_its_successor_connects() -> None:
    """Killed at either end under load: every call is answered or fails, and new ones work."""
    async with pair() as (caller, server):
        await up(caller, server)
        for end in (caller, server, caller):
            calls = [caller.at(server).after.remote(20, n, timeout_s=5.0) for n in range(50)]
            await asyncio.sleep(0)
            end.system.cells["bridge"].kill()
            for n, call in enumerate(calls):
                try:
                    assert await call == n
                except TorusError as error:
                    assert not isinstance(error, DeadlineExceeded)

            async def works() -> bool:
                try:
                    return await caller.at(server).after.remote(0, 1) == 1
                except TorusError:
                    return False

            async with asyncio.timeout(5):
                while not await works():  # noqa: ASYNC110 - the call itself is the condition
                    await asyncio.sleep(0.01)


@on_uvloop
async def test_a_call_that_waits_for_a_connection_is_lost_with_the_bridge() -> None:
    """It fails as one to a peer that is gone, which callers take for what can be tried again.

    Found by the simulator: as `Closed` it ended a client's session for good.
    """
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        caller = End(None)
        await caller.start()
        node = str(uuid.uuid4())
        address = "{}:{}".format(*mute.getsockname())
        await caller.system.actor("bridge").set_peers.remote({node: address})
        call = caller.system.actor("echo", node=node).after.remote(0, 1, timeout_s=5.0)
        await asyncio.sleep(0)
        caller.system.cells["bridge"].kill()
        with pytest.raises(PeerLost):
            await call
        await caller.system.stop()


@on_uvloop
async def test_a_call_between_two_bridges_can_be_tried_again() -> None:
    """While the bridge is started again its peers are lost, not unknown: a reader tries again.

    Found by the simulator: a bridge that took 50 ms to come back cost a client an error.
    """
    async with pair() as (caller, server):
        await up(caller, server)
        bridge, caller.system.transport = caller.system.transport, None
        with pytest.raises(PeerLost):
            await caller.at(server).after.remote(0, 1)
        caller.system.transport = bridge
        assert await caller.at(server).after.remote(0, 1) == 1


@on_uvloop
async def test_addresses_that_cannot_be_are_reasons_and_not_crashes() -> None:
    """Nonsense in the metadata costs the one peer, not the bridge."""
    async with pair() as (caller, server):
        await up(caller, server)
        caller.system.actor("bridge").set_peers.tell(
            {
                server.node: f"127.0.0.1:{server.port}",
                "a": "127.0.0.1:99999",
                "b": "nonsense",
                "c": "127.0.0.1:",
                "d": f"127.0.0.1:{free_port()}",
                "e": f"127.0.0.1:{server.port}",
            }
        )
        await until(lambda: len(caller.bridge._peers) == 6)
        await until(lambda: all(caller.bridge._peers[name].failures for name in "abcde"))
        rows = {row["node"]: row for row in await caller.system.actor("bridge").peers.remote()}
        assert rows["d"]["reason"] == "connection refused"
        assert "is now node" in rows["e"]["reason"]
        assert caller.bridge.is_up(server.node)
        assert caller.system.cells["bridge"].restarts == 0


@on_uvloop
async def test_a_peer_given_up_while_it_is_connected_leaves_no_link() -> None:
    """Peers come and go faster than connections are made: none stays open unseen."""
    async with pair() as (caller, server):
        for _ in range(20):
            caller.knows(server)
            await asyncio.sleep(0)
            caller.knows()
            await asyncio.sleep(0.0005)
        await until(lambda: not server.bridge._in_links)


# -- who may come in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "other"), [(SECRET, b"another secret here"), (None, SECRET)], ids=["other", "none"]
)
@on_uvloop
async def test_a_secret_mismatch_is_refused_with_a_plain_reason(
    secret: bytes | None, other: bytes
) -> None:
    """Without the cluster's secret nothing is answered, and the caller learns why."""
    async with pair(secret, other) as (caller, server):
        with pytest.raises(TorusError, match="secret"):
            await caller.at(server).after.remote(0, 1, timeout_s=3.0)
        assert "secret" in await reason(caller)
        assert not caller.bridge.is_up(server.node)
        await until(lambda: not any(link.ready for link in server.bridge._in_links))


async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What another program does that has taken a node's port."""
    await reader.read(16)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    writer.close()


@pytest.mark.parametrize("what", ["another secret", "another program"])
@on_uvloop
async def test_metadata_that_is_something_else_may_be_asked_again(what: str) -> None:
    """A running process waits for it to be set right, and loses no change that it may have made.

    One that starts is told at once why it cannot.
    """
    server, caller = End(free_port(), SECRET), End(None, b"another secret here")
    await caller.start()
    if what == "another secret":
        await server.start()
    else:
        http = await asyncio.start_server(speak_http, "127.0.0.1", server.port)
    store = ActorStore(caller.system.actor("metadata", node=f"@127.0.0.1:{server.port}"))
    for asked in (store.get("x"), store.txn([], [Put("x", b"")]), store.lease_grant(5)):
        with pytest.raises(Again, match=r"cannot be reached: .*(secret|HTTP)") as told:
            await asked
        refused = refusal(told.value, "torus://x")
        assert isinstance(refused, (Unauthenticated, ProtocolError))
        assert str(refused).startswith("cannot use the metadata at torus://x: ")
    watch = MetadataService(store, rng=random.Random(1)).ring_watch()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await anext(watch)
    await caller.system.stop()
    if what == "another secret":
        await server.system.stop()
    else:
        http.close()
    assert refusal(Again("no answer"), "torus://x") is None


@on_uvloop
async def test_garbage_ends_only_its_own_connection() -> None:
    """Random bytes before and after the handshake: that connection ends, others notice nothing."""
    async with pair() as (caller, server):
        rng = random.Random(5)
        await up(caller, server)
        call = caller.at(server).after.remote(400, 7)
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(rng.randbytes(5000))
            await gone(reader)
            writer.close()
            reader, writer = await shaken(server)
            writer.write(rng.randbytes(5000))
            await gone(reader)
            writer.close()
        assert await call == 7
        assert len(server.bridge._in_links) == 1
        assert server.system.cells["bridge"].restarts == 0


@on_uvloop
async def test_who_says_nothing_is_shown_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a handshake is closed after a while, and when the bridge stops."""
    monkeypatch.setattr(links, "HELLO_TIMEOUT_S", 0.5)
    async with pair() as (_, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await gone(reader)
        writer.close()


@on_uvloop
async def test_who_says_little_at_a_time_is_shown_the_door_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An honest beginning of a hello, byte by byte, keeps no connection longer than silence."""
    monkeypatch.setattr(links, "HELLO_TIMEOUT_S", 0.5)
    async with pair() as (_, server):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await until(lambda: server.bridge._strangers)
        started = time.monotonic()
        for byte in b"".join(bytes(part) for part in encode(links.Kind.HELLO, 0, bytes(1000))):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.1)
            if not server.bridge._strangers:
                break
        assert time.monotonic() - started < 0.5 + 2 * links.PING_INTERVAL_S + 0.3
        writer.close()


@on_uvloop
async def test_strangers_that_crowd_the_door_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a crowd stands in the door, as large as may be, one of it makes room for each newcomer.

    There are never more of them than the bound, and who is in stays in.
    """
    monkeypatch.setattr(bridge, "STRANGERS_MAX", 4)
    async with pair() as (caller, server):
        await up(caller, server)  # who was let in may come back beside the others
        # All of them before the server looks: some are given up before they have begun.
        at_once = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(25)]
        crowd = [await asyncio.open_connection(sock=sock) for sock in at_once]
        leaving = [asyncio.create_task(gone(reader)) for reader, _ in crowd]
        await until(lambda: sum(task.done() for task in leaving) == 20)
        assert len(server.bridge._strangers) == 5 and len(server.bridge._in_links) == 6
        for inside in range(2, 5):
            crowd.append(await shaken(server))
            assert len(server.bridge._in_links) - len(server.bridge._strangers) == inside
        await until(lambda: sum(task.done() for task in leaving) >= 21)
        assert server.bridge._known_most == 4  # so many may break, and come again at once
        assert await caller.at(server).after.remote(0, 1) == 1
        for _, writer in crowd:
            writer.close()
        await until(lambda: len(server.bridge._in_links) == 1 and not server.bridge._strangers)
        await asyncio.wait(leaving)


# This loop accepts many before it tells any of them.
test_strangers_that_crowd_the_door_on_asyncio = on_loop(
    test_strangers_that_crowd_the_door_keep_nobody_out.__on_loop__  # type: ignore[attr-defined]
)


# -- bounds ----------------------------------------------------------------------------------------


@on_uvloop
async def test_too_much_in_work_stops_the_reading() -> None:
    """More payload than a connection may have in work waits in the sender; then all is answered."""
    async with pair() as (caller, server):
        block = bytes(1 << 20)
        calls = [caller.at(server).gated.remote(payload=block, timeout_s=30.0) for _ in range(200)]
        await until(lambda: any(link._paused for link in server.bridge._in_links))
        (link,) = server.bridge._in_links
        held = link._bytes
        assert held <= links.SERVED_BYTES_MAX + (8 << 20)
        await until(lambda: caller.link_to(server)._held)
        server.echo.gate.set()
        assert sum([await call for call in calls]) == 200 << 20
        assert link._bytes == 0 and not link._paused


@on_uvloop
async def test_answers_that_are_not_read_stop_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for much and reads nothing is not read from any more, and in the end closed."""
    monkeypatch.setattr(links, "DIALER_SILENCE_MAX_S", 1.0)
    async with pair() as (_, server):
        reader, writer = await shaken(server)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(calls_of("large", 100, 4 << 20))
        link = link_from(writer, server)
        assert link is not None
        await until(lambda: link._congested_at)
        await until(lambda: link.lost)
        writer.transport.abort()


def calls_of(method: str, count: int, size: int, timeout_ms: int = 60_000) -> bytes:
    """Calls that ask for so much, as they arrive: together, and themselves next to nothing."""
    meta = encode_call("echo", method, [size], timeout_ms)
    frames = [encode(links.Kind.CALL, n, meta) for n in range(1, count + 1)]
    return b"".join(bytes(part) for frame in frames for part in frame)


@on_uvloop
async def test_answers_that_are_not_read_are_thrown_away_and_made_again() -> None:
    """Whoever stands still makes nobody hold more than a bounded part of what it asked for.

    When it reads again it gets all answers, and what it asks next.
    """
    async with pair() as (caller, server):
        await up(caller, server)
        out = caller.link_to(server)
        out._timer.cancel()  # whoever stands still does not look after anything either
        out._transport.pause_reading()
        count, size = 100, 4 << 20
        refs = [ObjectRef[Any](caller.system) for _ in range(count)]
        out._in_flight = {n: (ref, *[None] * 6) for n, ref in enumerate(refs, 1)}
        out._next_id = count + 1
        out._transport.write(calls_of("large", count, size))
        (link,) = server.bridge._in_links
        await until(lambda: link._congested_at is not None and not link._calls)
        held = link._transport.get_write_buffer_size()
        assert held <= links.WRITE_HIGH_WATER + size
        assert len(link._again) > count // 2
        out._transport.resume_reading()
        for ref in refs:
            assert (await ref).result == size
        assert await caller.at(server).after.remote(0, 5) == 5
        assert link._calls == link._bytes == 0 and not link._paused


@on_uvloop
async def test_answers_that_nobody_waits_for_any_more_are_not_made_again() -> None:
    """Nor are they in the way of what is asked next.

    Regression: after a few seconds with more to read than a slow network carries, all that it
    carried were answers to calls that had been given up, for ever.
    """
    async with pair() as (caller, server):
        await up(caller, server)
        out = caller.link_to(server)
        out._timer.cancel()
        out._transport.pause_reading()
        count = 100
        out._next_id = count + 1
        out._transport.write(calls_of("large", count, 4 << 20, 500))
        (link,) = server.bridge._in_links
        await until(lambda: server.echo.made == count and not link._calls)
        assert len(link._again) > count // 2
        over = server.system.loop.time() + 0.5
        await until(lambda: server.system.loop.time() > over)
        out._transport.resume_reading()
        assert await caller.at(server).after.remote(0, 5) == 5
        assert server.echo.made == count
        assert not link._again and link._calls == link._bytes == 0 and not link._paused


@on_uvloop
async def test_answers_that_are_not_read_and_not_made_twice_end_the_connection() -> None:
    """They are kept up to a bound, since whoever asked must not believe that nothing was done."""
    async with pair() as (_, server):
        reader, writer = await shaken(server)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        link = link_from(writer, server)
        assert link is not None
        kept = 0

        def end(error: TorusError) -> None:
            nonlocal kept
            kept = link._transport.get_write_buffer_size()
            abort(error)

        abort, link.abort = link.abort, end
        writer.write(calls_of("large_once", 100, 4 << 20))
        await until(lambda: link.lost)
        assert kept <= links.HELD_ANSWERS_MAX + (4 << 20)
        writer.close()


@on_uvloop
async def test_messages_without_an_answer_count_as_in_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who sends and does not ask is made to wait as well, until what he sent is handled."""
    async with pair() as (caller, server):
        await up(caller, server)
        (link,) = server.bridge._in_links
        for _ in range(7):
            caller.at(server).told.tell("", payload=bytes(10 << 20))
            await until(lambda: not caller.link_to(server)._congested)  # or the next is dropped
        caller.at(server).told.tell("no, thanks")
        caller.at(server).nothing.tell()
        await until(lambda: link._paused)
        assert link._bytes > links.SERVED_BYTES_MAX
        server.echo.gate.set()
        await until(lambda: not link._calls)
        assert link._bytes == 0 and not link._paused
        await until(lambda: "no, thanks" in caplog.text)
        assert "nothing" not in caplog.text


@on_uvloop
async def test_calls_that_were_given_up_are_forgotten() -> None:
    """After their deadline neither side remembers them."""
    async with pair() as (caller, server):
        calls = [caller.at(server).gated.remote(payload=b"x", timeout_s=0.2) for _ in range(20)]
        for call in calls:
            with pytest.raises(DeadlineExceeded):
                await call
        await until(lambda: not caller.link_to(server)._in_flight)
        server.echo.gate.set()
        await until(lambda: all(not link._calls for link in server.bridge._in_links))


@on_uvloop
async def test_calls_that_were_given_up_are_not_held_behind_one_that_was_not() -> None:
    """They would keep what they carry in memory, and have others refused.

    Found by reading: only those in front were forgotten while the socket did not keep up.
    """
    async with pair() as (caller, server):
        await up(caller, server)
        link = caller.link_to(server)
        link.pause_writing()
        patient = caller.at(server).after.remote(0, 1, timeout_s=60.0)
        for _ in range(links.HELD_CALLS_MAX - 1):
            caller.at(server).gated.remote(payload=b"x", timeout_s=0.2)
        await until(lambda: len(link._held) == 1)
        late = caller.at(server).after.remote(0, 2, timeout_s=60.0)
        link.resume_writing()
        assert await patient == 1 and await late == 2


# -- a stranger ------------------------------------------------------------------------------------


async def shaken(server: End) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection made by hand, after the handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    identity = Identity("c", str(uuid.uuid4()), Role.CLIENT, 1, "by-hand")
    hello = Hello("dial", identity, None, random.Random(3).randbytes(32))
    decoder = FrameDecoder(lambda size: memoryview(bytearray(size)))
    writer.write(b"".join(bytes(part) for part in hello.start()))
    while not hello.done:
        data = await reader.read(65536)
        assert data
        decoder.get_buffer(-1)[: len(data)] = data
        for frame in decoder.buffer_updated(len(data)):
            writer.write(b"".join(bytes(part) for part in hello.receive(frame)))
    await until(lambda: (link := link_from(writer, server)) is not None and link.ready)
    return reader, writer


def link_from(writer: asyncio.StreamWriter, server: End) -> links.InLink | None:
    """The server's end of a connection; others may come and go beside it."""
    name = writer.get_extra_info("sockname")
    for link in server.bridge._in_links:
        if link._transport is not None and link._transport.get_extra_info("peername") == name:
            return link
    return None


async def gone(reader: asyncio.StreamReader) -> None:
    """Wait until the other side has closed."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass


@on_uvloop
async def test_who_came_in_before_the_cluster_was_known_does_not_stay_if_it_is_of_another() -> None:
    """A node that starts takes any; found by reading: those of another cluster were kept."""
    server = End(free_port(), cluster=None)
    ours, theirs = End(None, cluster="ours"), End(None, cluster="theirs")
    for each in (server, ours, theirs):
        await each.start()
    for each in (ours, theirs):
        each.knows(server)
        await until(lambda each=each: each.bridge._peers)
        assert await each.at(server).after.remote(0, 7, timeout_s=5.0) == 7
    server.system.actor("bridge").set_cluster.tell("ours")
    with pytest.raises(TorusError):
        for _ in range(100):
            await theirs.at(server).after.remote(0, 7, timeout_s=5.0)
            await asyncio.sleep(0.02)
    assert await ours.at(server).after.remote(0, 7, timeout_s=5.0) == 7
    for each in (ours, theirs, server):
        await each.system.stop()
