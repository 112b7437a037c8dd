"""What is done to a volume on real processes: the counterpart of ``workload.py``, over NBD.

A `RealDriver` keeps one volume in use, on one client after the other. Its connections are to the
unix sockets of ``torusblk serve``; its operations end with the server that they were sent to.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from typing import TypeVar

from torus_actors.nbd.protocol import Errno, Rep
from torus_actors.scenarios.nbd_client import NbdClient, NbdError, Refused
from torus_actors.scenarios.oracle import Flush, Session, VolumeOracle
from torus_actors.scenarios.real_cluster import RealCluster, RealHost
from torus_actors.scenarios.workload import Workload, choose

T = TypeVar("T")

OP_S_MAX = 120.0
"""No operation takes longer, whatever happens: faults end long before."""

SLOW_S = 3.0
"""What takes longer is worth a line of progress."""

OPEN_S_MAX = 120.0
"""A volume can be opened within this: a lease has to end first, and faults to pass."""

OPEN_POLL_S = 0.2
VERIFY_BYTES = 1 << 20
READ_FAILURES_MAX = 10

FUA_SHARE = 0.1
RECONNECT_SHARE = 0.01

SHUT_DOWN = int(Errno.ESHUTDOWN)
EXPECTED = (int(Errno.EIO), int(Errno.ENOSPC))
"""What clients may get where errors are allowed: copies out of reach, no room."""


class _Use:
    """One session's connections, and the ranges of its operations under way."""

    def __init__(self, host: RealHost, boot: str, session: Session, first: NbdClient) -> None:
        self.host = host
        self.boot = boot
        self.session = session
        self.connections = [first]
        self.busy: list[tuple[int, int]] = []


class RealDriver:
    """Keeps one volume in use.

    Args:
        cluster: where.
        oracle: the judge.
        name: of the volume.
        hosts: clients it may be used from.
        workload: what to do.
        rng: what to do next.
        errors_allowed: whether an operation may fail; a fenced session always may.
    """

    def __init__(
        self,
        cluster: RealCluster,
        oracle: VolumeOracle,
        name: str,
        hosts: list[RealHost],
        workload: Workload,
        rng: random.Random,
        errors_allowed: bool,
    ) -> None:
        self.cluster = cluster
        self.oracle = oracle
        self.name = name
        self.hosts = hosts
        self.host = hosts[0]
        self.workload = workload
        self.errors_allowed = errors_allowed
        self.operations = 0
        self.flushes = 0
        self.errors = 0
        self.sessions = 0
        self.slowest_s = 0.0
        self.fenced_errors = 0
        """Operations refused to a session that another one had followed."""
        self.stopping = False
        self.verified = asyncio.Event()
        """Set when the present session has read all of the volume."""
        self._rng = rng
        self._moved = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """The last session's task of each client process."""

    # -- over many sessions ------------------------------------------------------------------------

    async def run(self) -> None:
        """Use the volume until told to stop; sessions that die are followed by others."""
        while not self.stopping:
            host = self.host
            if not host.up and not await self.cluster.boot_client(host):
                await asyncio.sleep(OPEN_POLL_S)
                continue
            task = self._tasks.get(host.boot)
            if task is None or task.done():
                task = asyncio.create_task(self.session(host))
                self._tasks[host.boot] = task
            self._moved.clear()
            moved = asyncio.create_task(self._moved.wait())
            await asyncio.wait([task, moved], return_when=asyncio.FIRST_COMPLETED)
            moved.cancel()
            if task.done():
                task.result()
        for task in self._tasks.values():
            await task

    def move(self, host: RealHost) -> None:
        """Open the volume on another host, whatever becomes of the session there is."""
        self.host = host
        self._moved.set()

    # -- one session -------------------------------------------------------------------------------

    async def session(self, host: RealHost) -> None:
        """Open the volume, read all of it, and work on it until told to stop or cut off."""
        boot = host.boot
        self.verified.clear()
        client = await self.open(host, boot)
        if client is None:
            return
        use = _Use(host, boot, self.oracle.open(boot), client)
        self.sessions += 1
        try:
            if await self.verify(use):
                self.verified.set()
                if not await self._first_write(use):
                    return
                await self._second_connection(use)
                await asyncio.gather(*[self._work(use) for _ in range(self.workload.workers)])
                if self.stopping and not use.session.fenced:
                    await self._flush(use)
        finally:
            for client in use.connections:
                await client.close()

    async def _first_write(self, use: _Use) -> bool:
        """Mostly a write and a flush, so that there is something for later crashes to threaten."""
        if self._rng.random() < 0.3:
            return True
        length = min(self.cluster.shape.block_size, self.oracle.size)
        return await self._operate("write", use, 0, length) and await self._flush(use)

    async def _second_connection(self, use: _Use) -> None:
        """Two connections: the export says that a flush on one covers what is sent on the other."""
        try:
            use.connections.append(await NbdClient.connect(use.host.process.socket, self.name))
        except (Refused, OSError) as error:
            self.cluster.say(f"{use.boot}: no second connection to {self.name}: {error}")

    async def last_session(self, host: RealHost) -> None:
        """Read everything, write a little, flush, close. No fault is left: nothing may fail."""
        client = await self.open(host, host.boot)
        if client is None:
            self.cluster.fail(f"{self.name} could not be opened in the end")
            return
        self.errors_allowed = False
        use = _Use(host, host.boot, self.oracle.open(host.boot), client)
        if await self.verify(use):
            await self._operate("write", use, 0, min(4096, self.oracle.size))
            await self._flush(use)
        await client.close()

    async def open(self, host: RealHost, boot: str) -> NbdClient | None:
        """Connect to the volume as soon as it can be had; None if its client is gone meanwhile."""
        cluster = self.cluster
        end = time.monotonic() + OPEN_S_MAX
        told = ""
        while True:
            problem: Exception
            try:
                client = await NbdClient.connect(host.process.socket, self.name)
                cluster.say(f"{boot} has {self.name} open")
                return client
            except Refused as error:
                problem = error
                if error.reply != Rep.ERR_POLICY and str(error) != told:
                    told = str(error)
                    cluster.say(f"{boot} cannot open {self.name} yet: {error}")
            except OSError as error:
                problem = error
            if host.boot != boot or not host.up or host is not self.host:
                return None
            if time.monotonic() > end:
                cluster.fail(f"{boot} could not open {self.name}: {problem}")
                return None
            await asyncio.sleep(OPEN_POLL_S)

    async def verify(self, use: _Use) -> bool:
        """Read all of the volume; whether that worked."""
        offset = failures = 0
        while offset < self.oracle.size:
            length = min(VERIFY_BYTES, self.oracle.size - offset)
            try:
                data = await self._timed(use.connections[0].read(offset, length))
            except (NbdError, OSError) as error:
                if not self._failed(f"read of {length} at {offset}", error, use):
                    return False
                failures += 1
                if failures > READ_FAILURES_MAX:
                    self.cluster.fail(f"{use.boot} cannot read {self.name}: {error}")
                    return False
                await asyncio.sleep(OPEN_POLL_S)
                continue
            use.session.verify(offset, data)
            offset += length
        return True

    async def _work(self, use: _Use) -> None:
        load, rng = self.workload, self._rng
        kinds = ("write", "read", "trim", "flush")
        weights = (load.write, load.read, load.trim, load.flush)
        block = self.cluster.shape.block_size
        while not self.stopping:
            await asyncio.sleep(load.pause_s * (0.5 + rng.random()))
            if rng.random() < RECONNECT_SHARE:
                await self._reconnect(use)
            kind = rng.choices(kinds, weights)[0]
            if kind == "flush":
                going = await self._flush(use)
            else:
                offset, length = choose(kind, load, rng, block, self.oracle.size)
                end = offset + length
                if any(first < end and offset < last for first, last in use.busy):
                    continue
                use.busy.append((offset, end))
                try:
                    going = await self._operate(kind, use, offset, length)
                finally:
                    use.busy.remove((offset, end))
            if not going:
                return

    async def _reconnect(self, use: _Use) -> None:
        """Leave by one connection and come back by another, while the other goes on."""
        if len(use.connections) < 2:
            return
        leaving = use.connections.pop(self._rng.randrange(len(use.connections)))
        await leaving.close()
        await self._second_connection(use)

    async def _operate(self, kind: str, use: _Use, offset: int, length: int) -> bool:
        """One operation; whether the session goes on."""
        rng, session = self._rng, use.session
        client = rng.choice(use.connections)
        fua = kind != "read" and rng.random() < FUA_SHARE
        self.operations += 1
        try:
            if kind == "read":
                session.check_read(offset, await self._timed(client.read(offset, length)))
                return True
            write = session.begin_write(offset, length, zeros=kind == "trim")
            # What FUA makes durable is this write; what a flush would cover besides may be more.
            sectors = range(write.first, write.last)
            flush = Flush(dict.fromkeys(sectors, write.sequence), session.fenced)
            if kind == "write":
                await self._timed(client.write(offset, write.data, fua=fua))
            elif rng.random() < 0.5:
                await self._timed(client.zero(offset, length, fua=fua))
            else:
                await self._timed(client.trim(offset, length, fua=fua))
            session.write_done(write)
            if fua:
                session.flush_done(flush)
                self.flushes += 1
            return True
        except (NbdError, OSError) as error:
            return self._failed(f"{kind} of {length} at {offset}", error, use)

    async def _flush(self, use: _Use) -> bool:
        flush = use.session.begin_flush()
        self.operations += 1
        try:
            await self._timed(self._rng.choice(use.connections).flush())
        except (NbdError, OSError) as error:
            return self._failed("flush", error, use)
        use.session.flush_done(flush)
        self.flushes += 1
        return True

    async def _timed(self, operation: Awaitable[T]) -> T:
        began = time.monotonic()
        async with asyncio.timeout(OP_S_MAX):
            result = await operation
        took_s = time.monotonic() - began
        self.slowest_s = max(self.slowest_s, took_s)
        if took_s > SLOW_S:
            name = getattr(operation, "__name__", "operation")
            self.cluster.say(f"{self.name}: a {name} took {took_s:.1f} s")
        return result

    def _failed(self, what: str, error: Exception, use: _Use) -> bool:
        """An operation failed; whether the session goes on."""
        self.errors += 1
        ended = use.session.fenced or use.boot in use.host.hit
        text = f"{use.boot}: {what} of {self.name}: {error}"
        if isinstance(error, TimeoutError):
            self.cluster.fail(f"{use.boot}: {what} of {self.name} got no answer in {OP_S_MAX:g} s")
            return False
        if isinstance(error, OSError):
            if use.host.boot == use.boot and use.host.up and not ended:
                self.cluster.fail(text)
            return False
        assert isinstance(error, NbdError)
        if error.errno == SHUT_DOWN:
            if use.session.fenced:
                self.fenced_errors += 1
            if not ended and not self.errors_allowed:
                self.cluster.fail(text)
            self.cluster.say(text)
            return False
        if not ended and not (error.errno in EXPECTED and self.errors_allowed):
            self.cluster.fail(text)
        return True
