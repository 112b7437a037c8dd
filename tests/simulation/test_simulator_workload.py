"""What clients and commands of the simulator tell its judge."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from torus_actors.errors import Again, Closed, Fenced, TorusError
from torus_actors.metadata import keys as table
from torus_actors.metadata.keys import Keys
from torus_actors.metadata.kv import Put
from torus_actors.metadata.records import Head, Lock
from torus_actors.model.refs import ZERO_BLOCK
from torus_actors.nbd.requests import Op, Reply, Request
from torus_actors.scenarios.oracle import SECTOR, Taking, VolumeOracle
from torus_actors.scenarios.requests import Connection
from torus_actors.scenarios.restores import HOLDER, Restores
from torus_actors.scenarios.snapshots import Kept
from torus_actors.scenarios.workload import Driver, Workload

SIZE = 8 * SECTOR


class FakeCluster:
    """As much of one as is needed here."""

    def __init__(self) -> None:
        self.store = SimpleNamespace(watchers=[])
        self.loop = asyncio.get_running_loop()
        self.failures: list[str] = []
        self.fail = self.failures.append
        self.expendable: set[str] = set()

    def say(self, text: str) -> None:
        """Nobody listens."""

    def run_on(self, host: Any, work: Any) -> Any:
        """The command itself is not run: the host says what it does, and what it says."""
        work.close()
        return host

    async def finish(self, host: Any, command: Any, timeout_s: float) -> Any:
        """What the command says."""
        return command()

    def put(self, row: Any, value: bytes) -> None:
        """Something is stored for the volume."""
        for watcher in self.store.watchers:
            watcher(Put(Keys().of(row, 1), value))


def driver_of(cluster: Any) -> Driver:
    """One whose volume nobody has opened yet."""
    oracle = VolumeOracle(0, SIZE, cluster.fail)
    rng: Any = None
    host: Any = None
    return Driver(cluster, oracle, "v", [host], Workload(), rng, True, False)


@pytest.mark.parametrize("ended", ["before", "meanwhile", "not"])
@pytest.mark.parametrize("fenced", [False, True])
def test_what_was_closed_is_durable_unless_the_session_was_over(ended: str, fenced: bool) -> None:
    """It may end between the request to close it and its last commit, which nobody is told.

    Who does not know that another client came, and could close it, has lost what it was told.
    """
    ends = Fenced("another client came")

    async def main() -> None:
        cluster = FakeCluster()
        driver = driver_of(cluster)
        file: Any = SimpleNamespace(failure=ends if ended == "before" else None)

        async def release(name: str, timeout_s: float) -> None:
            if ended == "meanwhile":
                file.failure = ends
            file.failure = file.failure or Closed("closed")

        system: Any = SimpleNamespace(
            heirlooms={"sessions": {"v": SimpleNamespace(file=file)}},
            actor=lambda _: SimpleNamespace(release=SimpleNamespace(remote=release)),
        )
        session = driver.oracle.open("a", 1)
        session.verify(0, bytes(SIZE))
        written = session.begin_write(SECTOR, SECTOR)
        session.write_done(written)
        if fenced:
            driver.oracle.open("b", 2).verify(0, bytes(SIZE))
            session.write_done(session.begin_write(0, SECTOR))
        await driver._close(system, session, "a")
        assert bool(driver.oracle.durable.get(1)) == (ended == "not" and not fenced)
        assert bool(cluster.failures) == (ended == "not" and fenced)

    asyncio.run(main())


@pytest.mark.parametrize("said", ["done", Again("away"), None])
def test_who_was_told_that_nothing_was_done_has_lost_nothing_later(said: str | TorusError) -> None:
    """The request may be late. Of a command that died nobody was told anything."""

    async def main() -> None:
        cluster: Any = FakeCluster()
        driver = driver_of(cluster)
        restores = Restores(cluster)
        kept = Kept(driver, "s1", Taking(driver.oracle), True, bytes(SIZE))
        head = Head(inode=1, root=ZERO_BLOCK, root_crc=0, size=SIZE, epoch=7, extra=b"")

        def command() -> str | TorusError:
            cluster.put(table.LOCK, Lock(HOLDER, 7).encode())
            if said == "done":
                cluster.put(table.HEAD, head.encode())
            return said

        host: Any = command
        await restores.restore(host, kept)
        assert not cluster.failures
        if said != "done":
            cluster.put(table.HEAD, head.encode())
            assert bool(cluster.failures) == (said is not None)
        assert restores.made == {"v": 1}

    asyncio.run(main())


@pytest.mark.parametrize("newest", [1, 2])
@pytest.mark.parametrize("ends", [Fenced("another client came"), Closed("closed")])
def test_by_requests_too_nobody_is_fenced_but_by_another(newest: int, ends: TorusError) -> None:
    """Of which there is a session then; both have the same errno."""

    async def main() -> None:
        cluster: Any = FakeCluster()
        connections: list[Any] = []

        def tell(number: int, requests: list[Request]) -> None:
            connections[0].reply([Reply.failed(each, ends) for each in requests])

        system: Any = SimpleNamespace(
            heirlooms={
                "sessions": {"v": SimpleNamespace(file=SimpleNamespace(failure=ends))},
                "nbd_connections": SimpleNamespace(number=connections.append),
            },
            actor=lambda _: SimpleNamespace(submit=SimpleNamespace(tell=tell)),
        )
        driver = driver_of(cluster)
        driver._newest = newest
        session = driver.oracle.open("a", 1)
        with pytest.raises(type(ends)) as told:
            await Connection(system, "v", driver).ask(Op.FLUSH, 0, 0)
        assert not driver._failed("flush", told.value, "a", session, cluster.loop.time())
        assert bool(cluster.failures) == (newest == 1 and isinstance(ends, Fenced))

    asyncio.run(main())
