"""Clients that use a volume as NBD connections do: by batches of requests, without the sockets.

Each request is answered once, whoever dies on the way. A write that is asked to be durable (FUA) is
so when it is answered, without a flush. What is called a hole reads as zeros; whole blocks that
were trimmed are holes from then on, until they are written to; and zeros that are to stay allocated
are no hole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from torus_actors.errors import (
    BlockUnavailable,
    Closed,
    DeadlineExceeded,
    Fenced,
    Invalid,
    OutOfSpace,
)
from torus_actors.nbd.protocol import STATE_HOLE, Errno
from torus_actors.nbd.requests import Hole, Op, Reply, Request
from torus_actors.scenarios.cluster import Host
from torus_actors.scenarios.oracle import SECTOR, Flush, Session, Write
from torus_actors.scenarios.workload import OP_S_MAX, Driver

CONNECTIONS = 2
"""Of a client. A flush on one of them covers what is written on the other."""

FUA_SHARE = 0.2
"""Of the writes and zeros."""

LOOK_SHARE = 0.4
"""Of the reads after which it is asked what of the range is a hole; and of the zeros."""

CACHE_SHARE = 0.1
"""Of the reads before which the range is to be fetched."""

ERRORS = {
    Errno.ESHUTDOWN: Closed,
    Errno.ENOSPC: OutOfSpace,
    Errno.EIO: BlockUnavailable,
}
"""What an errno stands for; any other is a request that should not have been refused."""


class Connection:
    """One connection of a client, as the NBD server has it.

    Args:
        system: of the client's process.
        name: of the volume.
        driver: whose it is.
    """

    lost = None

    def __init__(self, system: Any, name: str, driver: Driver) -> None:
        self.export = name
        self.number = 0
        self._submit = system.actor(f"volume:{name}").submit
        self._driver = driver
        self._sessions = system.heirlooms["sessions"]
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        system.heirlooms["nbd_connections"].number(self)

    def reply(self, replies: Sequence[Reply]) -> None:
        """See `nbd.requests.Replies`."""
        for reply in replies:
            waiter = self._waiting.pop(reply.request.cookie, None)
            if waiter is None:
                op = Op(reply.request.op).name
                self._driver.cluster.fail(f"a {op} of {self.export} was answered more than once")
            elif not waiter.done():
                waiter.set_result(reply)

    async def ask(self, op: Op, offset: int, length: int, **how: Any) -> Reply:
        """Have a request answered.

        Raises:
            Closed, Fenced, OutOfSpace, BlockUnavailable, Invalid: it was refused.
            DeadlineExceeded: there is no answer.
        """
        self._asked += 1
        request = Request(op, offset, length, self._asked, **how)
        waiter = self._waiting[self._asked] = self._driver.cluster.loop.create_future()
        self._submit.tell(self.number, [request])
        try:
            async with asyncio.timeout(OP_S_MAX):
                reply: Reply = await waiter
        except TimeoutError:
            raise DeadlineExceeded(f"no answer to {op.name}") from None
        if reply.error:
            error = Errno(reply.error)
            session = self._sessions.get(self.export)
            failure = None if session is None else session.file.failure
            if error is Errno.ESHUTDOWN and isinstance(failure, Fenced):
                raise Fenced(reply.message)  # which has no errno of its own
            raise ERRORS.get(error, Invalid)(reply.message)
        return reply


class RequestDriver(Driver):
    """A driver whose sessions use their volume as NBD connections do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._how = self.cluster.rng(f"requests/{self.name}")
        self._connections: dict[str, list[Connection]] = {}
        """By client process."""
        self._holes: dict[str, set[int]] = {}
        """Likewise, blocks that were trimmed, and nothing was done to them since."""

    def _begin(self, host: Host, who: str) -> None:
        system = host.tree.system
        self._connections[who] = [Connection(system, self.name, self) for _ in range(CONNECTIONS)]
        self._holes[who] = set()

    async def _make_durable(self, volume: Any, who: str) -> None:
        await self._connection(who).ask(Op.FLUSH, 0, 0)

    def _connection(self, who: str) -> Connection:
        return self._how.choice(self._connections[who])

    async def _request(
        self, kind: str, volume: Any, session: Session, who: str, offset: int, length: int
    ) -> None:
        if kind == "read":
            await self._read(session, who, offset, length)
        else:
            await self._change(kind, session, who, offset, length)

    async def _read(self, session: Session, who: str, offset: int, length: int) -> None:
        if self._how.random() < CACHE_SHARE:
            await self._connection(who).ask(Op.CACHE, offset, length)
        reply = await self._connection(who).ask(Op.READ, offset, length)
        data = b"".join(bytes(len(p)) if isinstance(p, Hole) else p for p in reply.buffers)
        if len(data) != length:
            self.oracle.violated(f"{len(data)} bytes were read instead of {length}")
        session.check_read(offset, data)
        if self._how.random() < LOOK_SHARE:
            await self._look(session, who, offset, length)

    async def _change(
        self, kind: str, session: Session, who: str, offset: int, length: int
    ) -> None:
        fua = self._how.random() < FUA_SHARE
        keep = kind == "trim" and self._how.random() < 0.3
        block = self.cluster.shape.block_size
        touched = range(offset // block, -(-(offset + length) // block))
        self._holes[who].difference_update(touched)
        write = session.begin_write(offset, length, zeros=kind == "trim")
        flush = self._covering(write, session)
        how: dict[str, Any] = {}
        if kind == "write":
            op, how = Op.WRITE, {"data": write.data}
        elif keep:
            op, how = Op.WRITE_ZEROES, {"no_hole": True}
        else:
            op = self._how.choice((Op.TRIM, Op.WRITE_ZEROES))
        await self._connection(who).ask(op, offset, length, fua=fua, **how)
        session.write_done(write)
        if fua:
            session.flush_done(flush)
            self.note("flush acknowledged")
        if kind == "trim" and not keep:
            end = offset + length
            last = touched.stop if end == session.size else end // block
            self._holes[who].update(range(-(-offset // block), last))
        if kind == "trim" and self._how.random() < LOOK_SHARE:
            await self._look(session, who, offset, length, kept=keep)

    def _covering(self, write: Write, session: Session) -> Flush:
        """What a write makes durable that is asked to be."""
        sectors = range(write.first, write.last)
        return Flush(dict.fromkeys(sectors, write.sequence), session.fenced)

    async def _look(
        self, session: Session, who: str, offset: int, length: int, kept: bool = False
    ) -> None:
        """Ask what of a range is a hole; nobody writes there meanwhile.

        Args:
            session: of the client.
            who: the client.
            offset: bytes.
            length: bytes.
            kept: whether all of it was to stay allocated.
        """
        block, oracle, end = self.cluster.shape.block_size, self.oracle, offset + length
        while offset < end:
            reply = await self._connection(who).ask(Op.BLOCK_STATUS, offset, end - offset)
            if session.fenced:
                return
            before = offset
            for size, state in reply.extents:
                sectors = range(offset // SECTOR, min(offset + size, end) // SECTOR)
                holes = self._holes[who]
                if not state & STATE_HOLE:
                    full = [n for n in sectors if n * SECTOR // block in holes]
                    if full:
                        oracle.violated(f"sector {full[0]} was trimmed, and is no hole for {who}")
                elif kept:
                    oracle.violated(f"{size} bytes at {offset} were to stay allocated, for {who}")
                else:
                    full = [n for n in sectors if min(oracle.live(n)) > 0]
                    if full:
                        oracle.violated(f"sector {full[0]} was written, and is a hole for {who}")
                offset += size
            if offset == before:
                oracle.violated(f"nothing is said of {end - offset} bytes at {offset} to {who}")
                return
