"""The HTTP actor: its bounds."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.unit.runtime_harness import on_uvloop, system_of, until
from torus_actors.actors import http
from torus_actors.actors.http import HttpServer
from torus_actors.runtime import ChildSpec, LoopActor, expose
from torus_actors.scenarios.processes import free_ports


class _Control(LoopActor):
    @expose()
    def status(self) -> dict[str, object]:
        """Nothing is wrong."""
        return {"node": "1"}


async def _ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: torus\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


@on_uvloop
async def test_connections_that_say_nothing_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are never many more than the bound, and who asks is answered.

    Found by review: each stayed for an hour, and together they took all file descriptors, without
    which a node takes no connection of its peers and of its clients.
    """
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 8)
    port = free_ports(1)
    async with system_of(
        ChildSpec("control", _Control),
        ChildSpec("http", lambda: HttpServer(("127.0.0.1", port))),
    ):
        assert (await _ask(port)).endswith(b"ok\n")
        at_once = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        crowd = [await asyncio.open_connection(sock=sock) for sock in at_once]
        ends = [asyncio.create_task(reader.read()) for reader, _ in crowd]
        for _ in range(4):
            assert (await _ask(port)).endswith(b"ok\n")
        await until(lambda: sum(end.done() for end in ends) >= 40 - 8)
        for _, writer in crowd:
            writer.close()
        await asyncio.gather(*ends, return_exceptions=True)
