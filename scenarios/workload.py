"""What simulated clients do: open a volume, write, read, trim, flush, close, crash, come back.

Each volume has one `Driver`, which keeps it in use: on one client host after the other, when they
crash or are cut off. Its operations run inside the client's process, so they stop with it. Ranges
of operations under way do not overlap, as with any sane user of a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any

from torus_actors.errors import (
    ActorCrashed,
    ActorNotFound,
    BlockUnavailable,
    Closed,
    Fenced,
    Locked,
    OutOfSpace,
    TorusError,
)
from torus_actors.metadata.kv import Operation, Put
from torus_actors.metadata.records import Epoch, VolumeRecord
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.oracle import SECTOR, Session, VolumeOracle

OP_S_MAX = 240.0
"""Deadline of every operation, whatever happens: faults end long before."""

OPEN_S_MAX = 120.0
"""A volume can be opened within this, once the cluster is whole: a lease has to end first."""

VERIFY_BYTES = 128 << 10

PAUSE_S_LATER = 0.4
"""Mean pause of a worker, at least, after the first operations: ten thousand more cost as much as
ten other runs, and bring to light less."""

SESSION_ENDS = (Fenced, Closed, ActorNotFound)
"""After one of these the client cannot go on with the volume."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is done to each volume; the numbers are weights and means.

    Attributes:
        workers: operations under way at once.
        write, read, trim, flush: how often each is chosen.
        pause_s: mean pause of a worker between operations.
        whole_blocks: share of the writes that cover whole blocks.
        bytes_max: largest write or read that is not of whole blocks.
        hot_share: share of the operations that go to a tenth of the volume.
        span: share of the volume that is used.
        fast: operations on a volume at this pace; those that follow come more slowly.
        requests: whether clients use it as NBD connections do; see `RequestDriver`.
    """

    workers: int = 3
    write: float = 5.0
    read: float = 4.0
    trim: float = 0.3
    flush: float = 0.7
    pause_s: float = 0.2
    whole_blocks: float = 0.3
    bytes_max: int = 16 << 10
    hot_share: float = 0.5
    span: float = 1.0
    fast: int = 800
    requests: bool = False


def choose(
    kind: str, load: Workload, rng: random.Random, block: int, volume_bytes: int
) -> tuple[int, int]:
    """Where the next operation goes.

    Args:
        kind: of operation.
        load: says how such ranges look.
        rng: decides.
        block: size of the volume's blocks.
        volume_bytes: its size.

    Returns:
        Offset and length, bytes; whole sectors.
    """
    size = int(volume_bytes * load.span) // block * block
    if rng.random() < load.hot_share:
        size = max(size // 10 // block * block, block)
    if kind != "read" and rng.random() < load.whole_blocks:
        count = rng.randint(1, 3)
        first = rng.randrange(size // block)
        count = min(count, size // block - first)
        return first * block, count * block
    sectors = rng.randint(1, load.bytes_max // SECTOR)
    if rng.random() < 0.7:
        sectors = -(-sectors // 8) * 8  # as most file systems do
        first = rng.randrange(size // 4096) * 8
    else:
        first = rng.randrange(size // SECTOR)
    return first * SECTOR, min(sectors, size // SECTOR - first) * SECTOR


class Driver:
    """Keeps one volume in use.

    Args:
        cluster: where.
        oracle: the judge.
        name: of the volume.
        hosts: client hosts it may be used from.
        workload: what to do.
        rng: what to do next.
        errors_allowed: whether a session may end unasked for; a fenced one always may. But none is
            told that it is fenced while it is the newest.
        blocks_may_lack: whether an operation may fail because no node has a block, or room for it.
        op_s_max: how long an operation may take; of a client that a fault hit, up to its deadline.
    """

    def __init__(
        self,
        cluster: Cluster,
        oracle: VolumeOracle,
        name: str,
        hosts: list[Host],
        workload: Workload,
        rng: random.Random,
        errors_allowed: bool,
        blocks_may_lack: bool,
        op_s_max: float = OP_S_MAX,
    ) -> None:
        self.cluster = cluster
        self.oracle = oracle
        self.name = name
        self.hosts = hosts
        self.host = hosts[0]
        self.workload = workload
        self.errors_allowed = errors_allowed
        self.blocks_may_lack = blocks_may_lack
        self.op_s_max = op_s_max
        self.session: Session | None = None
        self.operations = 0
        self.flushes = 0
        self.errors = 0
        self.sessions = 0
        self.slowest_s = 0.0
        self.slowest = ""
        self.stopping = False
        self.held = False
        """No session is begun meanwhile."""
        self.closing = False
        """The session there is ends in order."""
        self._rng = rng
        self._busy: list[tuple[int, int]] = []
        self._moved = asyncio.Event()
        self._moments: dict[str, asyncio.Future[None]] = {}
        self._epoch_key = ""
        """In the metadata, once the volume is there."""
        self._newest = 0
        """The newest epoch of the volume that the metadata has."""
        cluster.store.watchers.append(self._on_change)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """The last session's task of each client process."""

    # -- over many sessions ------------------------------------------------------------------------

    async def run(self) -> None:
        """Use the volume until told to stop; sessions that die are followed by others."""
        while not self.stopping:
            host = self.host
            if self.held:
                await asyncio.sleep(0.1)
                continue
            if not await self._ensure_client(host):
                await asyncio.sleep(0.5)
                continue
            process = host.process
            assert process is not None
            # Moved back to a client that never stopped: its session goes on, or finds its end.
            task = self._tasks.get(process.name)
            if task is None or task.done():
                task = self._tasks[process.name] = self.cluster.run_on(host, self._session(host))
            self._moved.clear()
            while process.alive and not task.done():
                await asyncio.wait([task], timeout=0.25)
                if self._moved.is_set():
                    break  # another client is to take over; this one is left to itself
            if task.done() and task.exception() is not None:
                self.cluster.fail(f"workload of {self.name} broke: {task.exception()!r}")
                return

    def _on_change(self, operation: Operation) -> None:
        if not isinstance(operation, Put):
            return
        if "/heads/" in operation.key:
            self.note("head recorded")
        elif operation.key == self._epoch_key:
            self._newest = Epoch.decode(operation.value).epoch
        elif "/volumes/" in operation.key and not self._epoch_key:
            record = VolumeRecord.decode(operation.value)
            if record.name == self.name:
                self._epoch_key = operation.key.replace("/volumes/", "/epochs/")

    def move(self, host: Host) -> None:
        """Open the volume on another host, whatever becomes of the session there is."""
        self.host = host
        self._moved.set()

    async def wait_closed(self, timeout_s: float) -> None:
        """Wait until the present client has closed the volume, but not for too long."""
        process = self.host.process
        task = self._tasks.get(process.name) if process is not None and process.alive else None
        if task is not None:
            await asyncio.wait([task], timeout=timeout_s)

    async def wait_for(self, moment: str, timeout_s: float) -> None:
        """Wait until something has happened to the volume, but not for too long."""
        came = self._moments[moment] = self.cluster.loop.create_future()
        await asyncio.wait([came], timeout=timeout_s)

    def note(self, moment: str) -> None:
        """It has happened."""
        waiter = self._moments.pop(moment, None)
        if waiter is not None:
            waiter.set_result(None)

    async def _ensure_client(self, host: Host) -> bool:
        if host.up:
            return True
        if host.starting:
            return False
        host.starting = True
        try:
            return await self.cluster.start_client(host) is not None
        finally:
            host.starting = False

    # -- one session -------------------------------------------------------------------------------

    async def _session(self, host: Host) -> None:
        """Runs in the client's process."""
        assert host.process is not None
        who = host.process.name
        system = host.tree.system
        size = await self._open(system, who)
        if size is None:
            return
        session = self.oracle.open(who, self._epoch(system), size)
        self.session = session
        self.sessions += 1
        self._busy = []
        volume = system.actor(f"volume:{self.name}")
        self._begin(host, who)
        if await self._verify(volume, session) and await self._first_write(volume, session, who):
            workers = [
                asyncio.ensure_future(self._work(volume, session, who))
                for _ in range(self.workload.workers)
            ]
            await asyncio.gather(*workers)
            if self.stopping and not session.fenced:
                await self._flush(volume, session, who)
        await self._close(system, session, who)

    async def _close(self, system: Any, session: Session, who: str) -> None:
        """In order; then all is durable, unless the session had ended before that."""
        began = self.cluster.loop.time()
        ending = system.heirlooms["sessions"].get(self.name)
        flush = session.begin_flush()
        try:
            closed = await give_back(system, self.name, OP_S_MAX)
        except TorusError as error:
            self._failed("closing", error, who, session, began)
            return
        # What ends a session may come after the request and before the last commit: nobody is told.
        # Nor does it vouch for what another had been told was taken, and this one did not see.
        if not (closed and session.verified and ending is not None):
            return
        if isinstance(ending.file.failure, Closed):
            session.flush_done(flush)

    def _begin(self, host: Host, who: str) -> None:
        """A client has the volume open."""

    async def _make_durable(self, volume: Any, who: str) -> None:
        """Flush."""
        await volume.flush.remote(timeout_s=OP_S_MAX)

    async def _first_write(self, volume: Any, session: Session, who: str) -> bool:
        """Mostly a write and a flush, so that there is something for later crashes to threaten."""
        if self._rng.random() < 0.3:
            return True
        length = min(self.cluster.shape.block_size, session.size)
        written = await self._operate("write", volume, session, who, 0, length)
        return written and await self._flush(volume, session, who)

    async def last_session(self, host: Host) -> None:
        """Read everything, write a little, flush, close. No fault is left: nothing may fail."""
        assert host.process is not None
        who = host.process.name
        system = host.tree.system
        size = await self._open(system, who)
        if size is None:
            return
        session = self.oracle.open(who, self._epoch(system), size)
        self.errors_allowed = self.blocks_may_lack = False
        self._begin(host, who)
        volume = system.actor(f"volume:{self.name}")
        try:
            # Another user, who leaves at once.
            await system.actor("volumes").open.remote(self.name, timeout_s=60.0)
            await system.actor("volumes").release.remote(self.name, timeout_s=60.0)
            if await self._verify(volume, session):
                # A new head, under which all that earlier sessions left behind is garbage; and a
                # record, which is none of it any more once the volume is closed.
                for _ in range(2):
                    write = session.begin_write(0, min(4096, session.size))
                    await volume.write.remote(0, write.data, timeout_s=OP_S_MAX)
                    session.write_done(write)
                    await self._flush(volume, session, who)
            await system.actor("volumes").release.remote(self.name, timeout_s=OP_S_MAX)
        except TorusError as error:
            self.cluster.fail(f"{who}: the last session of {self.name} failed: {error!r}")

    def _epoch(self, system: Any) -> int:
        """Of the session that a client has opened."""
        session = system.heirlooms["sessions"].get(self.name)
        return session.epoch if session is not None else 0

    async def _open(self, system: Any, who: str) -> int | None:
        """Open the volume; returns its size, or None if that is not to be."""
        loop = self.cluster.loop
        end = loop.time() + OPEN_S_MAX
        told = ""
        while True:
            had = len(self.oracle.sizes)
            size: int
            try:
                _, size, _, _ = await system.actor("volumes").open.remote(self.name, timeout_s=60.0)
                self.cluster.say(f"{who} has {self.name} open")
                sizes = self.oracle.sizes[had - 1 :]
                if size not in sizes:
                    self.oracle.violated(f"it was opened with {size} bytes, and had {sizes}")
                return size
            except TorusError as error:
                if self.host.process is None or who != self.host.process.name:
                    return None
                if str(error) != told and not isinstance(error, Locked):
                    told = str(error)
                    self.cluster.say(f"{who} cannot open {self.name} yet: {error!r}")
                if loop.time() > end:
                    self.cluster.fail(f"{who} could not open {self.name}: {error!r}")
                    return None
                if self.held:
                    return None
                await asyncio.sleep(0.5)

    async def _verify(self, volume: Any, session: Session) -> bool:
        """Read all of the volume; whether that worked."""
        offset = 0
        failures = 0
        while offset < session.size:
            length = min(VERIFY_BYTES, session.size - offset)
            began = self.cluster.loop.time()
            try:
                data = await volume.read.remote(offset, length, timeout_s=OP_S_MAX)
                self._took(began, "the first read", session.name, session)
            except TorusError as error:
                failures += 1
                going = self._failed("the first read", error, session.name, session, began)
                if session.fenced or not going:
                    return False
                if failures > 10:
                    self.cluster.fail(f"{session.name} cannot read {self.name}: {error!r}")
                    return False
                await asyncio.sleep(0.5)
                continue
            self._check_length(data, offset, length)
            session.verify(offset, data)
            await self._look_for_holes(volume, offset, data)
            offset += length
        self.note("read back")
        return True

    def _check_length(self, data: Any, offset: int, length: int) -> None:
        """What is compared is what came."""
        if len(data) != length:
            self.oracle.violated(f"{len(data)} of {length} bytes at {offset} were read")

    async def _look_for_holes(self, volume: Any, offset: int, data: bytes) -> None:
        """What is said to be a hole must be zeros; nobody writes meanwhile."""
        try:
            found = await volume.extents.remote(offset, len(data), timeout_s=OP_S_MAX)
        except TorusError:
            return  # whoever reads on finds out
        at = 0
        for size, has_data in found:
            if not has_data and any(data[at : at + size]):
                self.oracle.violated(f"{size} bytes at {offset + at} are no hole, as is said")
            at += size
        if at != len(data):
            self.oracle.violated(f"of {len(data)} bytes at {offset} it is said what {at} are")

    async def _work(self, volume: Any, session: Session, who: str) -> None:
        load, rng, busy = self.workload, self._rng, self._busy
        kinds = ("write", "read", "trim", "flush")
        weights = (load.write, load.read, load.trim, load.flush)
        while not (self.stopping or self.closing):
            later = PAUSE_S_LATER if self.operations > load.fast else 0.0
            await asyncio.sleep(max(load.pause_s, later) * (0.5 + rng.random()))
            kind = rng.choices(kinds, weights)[0]
            if kind == "flush":
                going = await self._flush(volume, session, who)
            else:
                offset, length = self._choose(kind, session.size)
                end = offset + length
                if any(first < end and offset < last for first, last in busy):
                    continue
                busy.append((offset, end))
                try:
                    going = await self._operate(kind, volume, session, who, offset, length)
                finally:
                    busy.remove((offset, offset + length))
            self.operations += 1
            if not going:
                return

    def _choose(self, kind: str, size: int) -> tuple[int, int]:
        return choose(kind, self.workload, self._rng, self.cluster.shape.block_size, size)

    async def _operate(
        self, kind: str, volume: Any, session: Session, who: str, offset: int, length: int
    ) -> bool:
        began = self.cluster.loop.time()
        try:
            await self._request(kind, volume, session, who, offset, length)
            self._took(began, kind, who, session)
            return True
        except TorusError as error:
            what = f"{kind} of {length} at {offset}"
            return self._failed(what, error, who, session, began)

    async def _request(
        self, kind: str, volume: Any, session: Session, who: str, offset: int, length: int
    ) -> None:
        if kind == "read":
            data = await volume.read.remote(offset, length, timeout_s=OP_S_MAX)
            self._check_length(data, offset, length)
            session.check_read(offset, data)
        elif kind == "write":
            write = session.begin_write(offset, length)
            await volume.write.remote(offset, write.data, timeout_s=OP_S_MAX)
            session.write_done(write)
        else:
            write = session.begin_write(offset, length, zeros=True)
            await volume.zero.remote(offset, length, timeout_s=OP_S_MAX)
            session.write_done(write)

    async def _flush(self, volume: Any, session: Session, who: str) -> bool:
        flush = session.begin_flush()
        began = self.cluster.loop.time()
        self.note("flush asked for")
        beside_another = bool(session.flushing)
        session.flushing += 1
        try:
            await self._make_durable(volume, who)
        except TorusError as error:
            return self._failed("flush", error, who, session, began)
        finally:
            session.flushing -= 1
        session.flush_done(flush)
        self.flushes += 1
        host = next((h for h in self.hosts if h.up and h.process and h.process.name == who), None)
        if host is not None and not session.fenced:
            for watcher in self.cluster.flush_watchers:
                watcher(host, self.name)
        self._took(began, "flush", who, session)
        self.note("flush acknowledged")
        if beside_another:
            self.note("flush beside another acknowledged")
        if host is not None and self._commits(host):
            self.note("flush beside a commit acknowledged")
        return True

    def _commits(self, host: Host) -> bool:
        """Whether a head is about to be recorded, in which is all that was there."""
        session = host.tree.system.heirlooms["sessions"].get(self.name)
        return session is not None and session.committer.complete

    def _took(self, began: float, what: str, who: str, session: Session) -> None:
        """An operation has ended that began then."""
        if not session.fenced and who not in self.cluster.expendable:
            elapsed = self.cluster.loop.time() - began
            if elapsed > self.slowest_s:
                self.slowest_s, self.slowest = elapsed, what
            if elapsed > self.op_s_max:
                self.cluster.fail(f"{who}: {what} of {self.name} took {elapsed:.1f} s")

    def _failed(
        self, what: str, error: TorusError, who: str, session: Session, began: float
    ) -> bool:
        """An operation that began then failed; whether the session goes on."""
        self.errors += 1
        self._took(began, what, who, session)
        ended = session.fenced or who in self.cluster.expendable
        if self.cluster.loop.time() - began >= OP_S_MAX:
            self.cluster.fail(f"{who}: {what} of {self.name} got no answer in {OP_S_MAX:g} s")
            return False
        if isinstance(error, SESSION_ENDS):
            nobody_else = isinstance(error, Fenced) and self._newest == session.epoch
            if not ended and (nobody_else or not self.errors_allowed):
                self.cluster.fail(f"{who}: {what} of {self.name} failed: {error!r}")
            self.cluster.say(f"{who}: {what} of {self.name}: {error!r}")
            return False
        expected = isinstance(error, (BlockUnavailable, OutOfSpace))
        if not ended and not (expected and self.blocks_may_lack):
            self.cluster.fail(f"{who}: {what} of {self.name} failed: {error!r}")
        return True


async def give_back(system: Any, name: str, timeout_s: float) -> bool:
    """Close a volume or snapshot; if the actor dies over it, its successor does.

    Returns:
        Whether it is said to be closed, and with it to be flushed.
    """
    with contextlib.suppress(ActorCrashed):
        await system.actor("volumes").release.remote(name, timeout_s=timeout_s)
        return True
    return False
