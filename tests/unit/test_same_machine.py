"""Connections without TCP: used where they can be, and never in the way of those by TCP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
import uvloop

from tests.unit.runtime_harness import on_uvloop, until
from tests.unit.test_bridge import SECRET, End, free_port
from torus_actors.actors import same_machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")


@contextlib.asynccontextmanager
async def pair(
    listens: bool = True,
    dials: bool = True,
    secret: bytes | None = None,
    before: Callable[[End], None] = lambda _: None,
) -> AsyncIterator[tuple[End, End]]:
    """A caller that knows a server; ``before`` gets the server before it starts."""
    server = End(free_port(), secret, shortcut=listens)
    caller = End(None, secret, shortcut=dials)
    before(server)
    await server.start()
    await caller.start()
    caller.knows(server)
    await until(lambda: caller.bridge._peers)
    try:
        yield caller, server
    finally:
        await caller.system.stop()
        await server.system.stop()


def is_near(caller: End) -> bool | None:
    """Whether the one connection does without TCP; None while there is none."""
    (peer,) = caller.bridge.peers()
    return bool(peer["near"]) if peer["up"] else None


@on_uvloop
@pytest.mark.parametrize("secret", [None, SECRET])
async def test_a_node_on_this_machine_is_reached_without_tcp(secret: bytes | None) -> None:
    """Calls of every size arrive and are answered, with a secret and without."""
    async with pair(secret=secret) as (caller, server):
        assert await caller.at(server).after.remote(1, 7) == 7
        assert is_near(caller)
        for size in (1, 1 << 10, 1 << 20, 8 << 20):
            payload = os.urandom(size)
            answer = await caller.at(server).double.remote(payload=payload)
            assert answer.joined() == payload * 2


@on_uvloop
@pytest.mark.parametrize(("listens", "dials"), [(True, False), (False, True), (False, False)])
async def test_tcp_will_do(listens: bool, dials: bool) -> None:
    """Where one of the two does not want it, or cannot."""
    async with pair(listens, dials) as (caller, server):
        assert await caller.at(server).after.remote(1, 7) == 7
        assert is_near(caller) is False


@on_uvloop
async def test_a_taken_name_keeps_nobody_away() -> None:
    """The node starts without the name, and callers come by TCP after who has it hung up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:

        def take(server: End) -> None:
            other.bind(same_machine._name_of(server.node))
            other.listen()

        async with pair(before=take) as (caller, server):
            other.setblocking(False)
            await until(lambda: _hangs_up(other))
            await until(lambda: is_near(caller) is not None)
            assert is_near(caller) is False
            assert await caller.at(server).after.remote(1, 7) == 7


class Aborting(asyncio.Protocol):
    """Ends its connection as soon as it has one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Do that."""
        cast(asyncio.Transport, transport).abort()


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_descriptor_is_closed_once(runner: Callable[..., None], cancelled: bool) -> None:
    """Also where the connection ends before it is the loop's: the number is a file's by then."""

    async def opened_and_ended() -> None:
        ours, other = socket.socketpair()
        number = ours.fileno()
        protocol = asyncio.Protocol if cancelled else Aborting
        task = asyncio.ensure_future(same_machine.hand_over(ours, protocol))
        await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: not _is_open(number))
        file = os.open(os.devnull, os.O_RDONLY)
        assert file == number
        del ours, task
        gc.collect()
        assert _is_open(number)
        os.close(file)
        other.close()

    runner(opened_and_ended())


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _hangs_up(listening: socket.socket) -> bool:
    try:
        accepted, _ = listening.accept()
    except BlockingIOError:
        return False
    accepted.close()
    return True


def test_somebody_else_is_not_spoken_to() -> None:
    """Whoever took the name must be this user or root."""
    code = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.bind(b'\\0torus-actors/taken'); s.listen(); print(flush=True); sys.stdin.read()"
    )
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert same_machine.connect("taken") is None
    own = same_machine.listen("taken")
    assert own is not None
    assert same_machine.listen("taken") is None, "one name, one listener"
    connected = same_machine.connect("taken")
    assert connected is not None
    connected.close()
    own.close()
    assert same_machine.connect("taken") is None


@on_uvloop
async def test_a_new_bridge_takes_the_name_again() -> None:
    """A bridge that died leaves it to its successor, and callers come back the same way."""
    async with pair() as (caller, server):
        assert await caller.at(server).after.remote(1, 7) == 7
        for _ in range(3):
            server.system.cells["bridge"].kill()
            await until(lambda: is_near(caller) is None)
            await until(lambda: is_near(caller) is not None)
            assert is_near(caller)
            assert await caller.at(server).after.remote(1, 7) == 7
        listening = {name for name in _abstract_names() if server.node in name}
        assert listening, "the successor does not listen"


def _abstract_names() -> list[str]:
    with open("/proc/net/unix") as table:
        return [line.split()[-1] for line in table]
