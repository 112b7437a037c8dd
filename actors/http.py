"""The HTTP actor: metrics and health of this node, for monitoring and for people with a browser.

Serves ``/metrics`` (Prometheus), ``/healthz`` and ``/status`` (JSON), all from one question to the
control actor. It changes nothing. Its death costs the requests under way; the successor listens
anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from torus_actors.errors import Invalid, TorusError
from torus_actors.model.addresses import format_address
from torus_actors.runtime import LoopActor, expose

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0

STOP_S_MAX = 2.0
"""How long requests under way may keep a node from stopping."""

CONNECTIONS_MAX = 64
"""Connections at once; a few monitors and browsers have a dozen. For one more, one of them is
closed, whichever: an honest one has its answer in milliseconds, or asks again, while one that says
nothing holds its place only until others come. They must not take a node's file descriptors, which
its peers and its clients need."""


class HttpServer(LoopActor):
    """See the module.

    Args:
        listen: host and port.
    """

    def __init__(self, listen: tuple[str, int]) -> None:
        super().__init__()
        self._listen = listen
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def setup(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/status", self._status)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=STOP_S_MAX
        )
        await self._runner.setup()
        host, port = self._listen
        try:
            self._server = await self.system.loop.create_server(self._accept, host, port)
        except OSError as error:
            reason = os.strerror(error.errno).lower() if error.errno else str(error)
            raise Invalid(
                f"cannot serve HTTP on {self.address()}: {reason}; choose another --http"
            ) from error

    async def cleanup(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _accept(self) -> asyncio.BaseProtocol:
        assert self._runner is not None and self._runner.server is not None
        server = self._runner.server
        # Not the newcomer: those inside may be there to keep it out. Some of them may be gone, and
        # counted yet, or accepted, and not counted yet; the next newcomer puts that right.
        there = server.connections
        excess = max(0, len(there) + 1 - CONNECTIONS_MAX)
        for unlucky in self.system.rng.sample(there, excess):
            if unlucky.transport is not None:
                unlucky.transport.abort()
        return server()

    @expose()
    def address(self) -> str:
        """Where it listens."""
        return format_address(self._listen)

    async def _ask(self) -> dict[str, Any]:
        answer: dict[str, Any] = await self.system.actor("control").status.remote(
            timeout_s=ASK_TIMEOUT_S
        )
        return answer

    async def _status(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._ask())
        except TorusError as error:
            return web.json_response({"error": str(error)}, status=503)

    async def _healthz(self, request: web.Request) -> web.Response:
        """200 while the node does its work, be it degraded; 503 with a reason if it does not."""
        try:
            problems = problems_of(await self._ask())
        except TorusError as error:
            problems = [str(error)]
        text = "\n".join(problems or ["ok"]) + "\n"
        return web.Response(text=text, status=503 if problems else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            status = await self._ask()
        except TorusError as error:
            return web.Response(text=f"{error}\n", status=503)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(status, self.system.tree()))
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


def problems_of(status: dict[str, Any]) -> list[str]:
    """What keeps a node from doing its work; nothing if it does it."""
    problems = []
    for name, answer in status.items():
        if isinstance(answer, dict) and "error" in answer:
            problems.append(f"{name}: {answer['error']}")
    stores = status.get("block_store")
    if isinstance(stores, dict):
        for name in ("blocks", "inodes"):
            store = stores.get(name, {})
            if store.get("failure"):
                problems.append(f"{name}: {store['failure']}")
    journal = status.get("journal")
    if isinstance(journal, dict) and journal.get("failure"):
        problems.append(f"journal: {journal['failure']}")
    disk = status.get("disk", {})
    if disk.get("calls"):
        calls = ", ".join(disk["calls"])
        problems.append(f"disk: it has not answered for {disk['hangs_s']:.0f} s ({calls})")
    return problems


class _Collector:
    """One scrape's metrics."""

    def __init__(self, status: dict[str, Any], tree: list[dict[str, Any]]) -> None:
        self._status = status
        self._tree = tree

    def collect(self) -> Iterator[Metric]:
        """All metrics, from what the actors said."""
        status = self._status
        yield _gauge("ring_version", "Version of the ring in use", status["ring_version"])
        yield _gauge("rss_max_bytes", "Most memory used so far", status["rss_max_bytes"])
        if "disk" in status:
            text = "How long a call of the disk has not come back, if it hangs; else 0"
            yield _gauge("disk_hangs_seconds", text, status["disk"]["hangs_s"])
        yield from self._stores(status.get("block_store"))
        yield from self._numbers("replicator", status.get("replicator"))
        yield from self._numbers("rebalance", status.get("rebalancer"))
        yield from self._numbers("collector", status.get("collector"))
        yield from self._actors()
        peers = status.get("bridge")
        if isinstance(peers, list):
            up = GaugeMetricFamily("torus_peer_up", "Whether it is connected", labels=["peer"])
            for peer in peers:
                if not peer["node"].startswith("@"):
                    up.add_metric([peer["node"]], float(peer["up"]))
            yield up

    def _stores(self, stores: Any) -> Iterator[Metric]:
        if not isinstance(stores, dict) or "error" in stores:
            return
        for field in ("total", "used", "free", "quarantined"):
            metric = GaugeMetricFamily(
                f"torus_store_{field}_blocks", f"Blocks of the store: {field}", labels=["store"]
            )
            for name in ("blocks", "inodes"):
                metric.add_metric([name], float(stores[name][field]))
            yield metric

    def _numbers(self, prefix: str, answer: Any) -> Iterator[Metric]:
        if not isinstance(answer, dict) or "error" in answer:
            return
        for name, value in answer.items():
            if isinstance(value, (bool, int, float)):
                yield _gauge(f"{prefix}_{name}", f"{name} of the {prefix}", value)

    def _actors(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily(
            "torus_actor_restarts", "Restarts of an actor", labels=["actor"]
        )
        running = GaugeMetricFamily(
            "torus_actor_running", "Whether an actor runs", labels=["actor"]
        )
        for row in self._tree:
            restarts.add_metric([row["name"]], float(row["restarts"]))
            running.add_metric([row["name"]], float(row["state"] == "running"))
        yield restarts
        yield running


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"torus_{name}", text, value=float(value))
