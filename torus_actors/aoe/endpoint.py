"""Moves frames between a port and a target on an event loop.

It owns what must outlive the actor that supervises it: the socket, and the requests in flight. That
actor may die and be started again; no initiator notices.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from torus_actors.aoe.port import Port
from torus_actors.aoe.target import Answer, Target
from torus_actors.errors import TorusError
from torus_actors.nbd.requests import Reply, Request

log = logging.getLogger(__name__)

BATCH_MAX = 64
"""Frames taken in one wake-up: enough to make one message of many, and the loop has others too."""

QUEUE_MAX = 1024
"""Answers that wait for room in the socket; more are dropped, and asked for again."""


class Endpoint:
    """See the module; begins to receive at once.

    Args:
        port: where frames come from.
        target: what is done with them.
        submit: hands requests to the volume, in their order. It may raise TorusError: then it took
            none of them.

    Attributes:
        receiving: whether it takes commands.
    """

    def __init__(self, port: Port, target: Target, submit: Callable[[list[Request]], None]) -> None:
        self.port = port
        self.target = target
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Answer] = deque()
        self._settled: asyncio.Future[None] | None = None
        self.receiving = True
        self._told: tuple[bytes, int, bool] | None = None
        port.listen()
        self.refreshed()

    def refreshed(self) -> None:
        """The port has looked at its interface; to be called now and then.

        An interface that went down is an error of the socket, after which libuv watches that no
        more; so it is told again. And so is the network, when the interface is back, or has another
        address or MTU: Linux' driver does not ask by itself. It would send to the old address, or
        ask for more than fits into a frame, until it gives the disk up.
        """
        self.target.mac, self.target.mtu = self.port.mac, self.port.mtu
        if self.receiving:
            self._loop.remove_reader(self.port.fileno())
            self._loop.add_reader(self.port.fileno(), self._readable)
        if self._queue:
            self._loop.remove_writer(self.port.fileno())
            self._loop.add_writer(self.port.fileno(), self._writable)
        now = self.port.mac, self.port.mtu, self.port.up
        if self.receiving and self._told != now:
            self._told = now
            if self.port.up:
                self._send(self.target.announce())

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answers of the volume."""
        now = self._loop.time()
        for each in replies:
            answer = self.target.answered(each, now)
            if answer is not None:
                self._send(answer)
        self._settle()

    async def drained(self) -> None:
        """Take no more commands; wait until all those that were taken are answered."""
        self.stop()
        if self.target.in_flight or self._queue:
            self._settled = self._loop.create_future()
            await self._settled

    def stop(self) -> None:
        """Take no more commands."""
        if self.receiving:
            self.receiving = False
            self._loop.remove_reader(self.port.fileno())

    def close(self) -> None:
        """End now; what is in flight is answered to nobody."""
        self.stop()
        self._loop.remove_writer(self.port.fileno())
        self._queue.clear()
        self.port.close()

    def _readable(self) -> None:
        """One wake-up: take what is there, and hand it on as one message."""
        requests: list[Request] = []
        now = self._loop.time()
        try:
            for _ in range(BATCH_MAX):
                frame = self.port.receive()
                if frame is None:
                    break
                answer = self.target.receive(frame, now, requests)
                if answer is not None:
                    self._send(answer)
        finally:
            if requests:
                try:
                    self._submit(requests)
                except TorusError as error:
                    log.info("the volume takes no commands: %s", error)
                    self.target.forget(requests)

    def _send(self, answer: Answer) -> None:
        if self._queue or not self.port.send(answer):
            if not self._queue:
                self._loop.add_writer(self.port.fileno(), self._writable)
            if len(self._queue) < QUEUE_MAX:
                self._queue.append(answer)

    def _writable(self) -> None:
        while self._queue:
            if not self.port.send(self._queue[0]):
                return
            self._queue.popleft()
        self._loop.remove_writer(self.port.fileno())
        self._settle()

    def _settle(self) -> None:
        settled = self._settled
        busy = self.target.in_flight or self._queue
        if settled is not None and not settled.done() and not busy:
            settled.set_result(None)
