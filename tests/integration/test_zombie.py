"""A client that lost its volume and comes back, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, until
from tests.integration.etcd_server import EtcdServer, require_etcd
from torus_actors.nbd.protocol import Errno
from torus_actors.scenarios.nbd_client import NbdClient, NbdError

LEASE_S = 2
DEADLINE_S = 60.0
KIB = 1 << 10

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes on etcd with replication 2 and a volume ``vol``."""
    require_etcd()
    folder = tmp_path / "etcd"
    folder.mkdir()
    etcd = EtcdServer(folder)
    with contextlib.closing(etcd):
        etcd.start()
        with Cluster(tmp_path, metadata=f"etcd://{etcd.endpoint}") as cluster:
            cluster.ctl("init", "--replication", "2")
            cluster.start_nodes(3)
            cluster.ctl("volume", "create", "vol", "16MiB")
            yield cluster


async def refused(operation: Awaitable[None]) -> None:
    """An operation ends with ESHUTDOWN."""
    with pytest.raises(NbdError) as told:
        await operation
    assert told.value.errno == Errno.ESHUTDOWN


def test_a_zombie_writes_nothing_any_more(cluster: Cluster) -> None:
    """Regression, coreos/torus#230, 261, 317: a client that is back writes under no lost lease.

    It is stopped with a write and a flush under way, and for longer than its lease. Another client
    opens the volume, finds what the first had flushed, and writes. When the first one wakes up its
    flushes and writes end with ESHUTDOWN, and the volume holds what the second one wrote; also for
    those who open it later. When its user has left, the first one ends, for others to start again.
    """
    lease = ("--lease", str(LEASE_S))
    first = cluster.serve("vol", *lease)
    second = cluster.client("vol", *lease, "--wait-lock", "40")

    async def play() -> None:
        zombie = await NbdClient.connect(first.socket, "vol")
        await zombie.write(0, b"1" * 64 * KIB)
        await zombie.flush()
        await zombie.write(128 * KIB, b"1" * KIB)  # acknowledged, and never flushed
        first.pause()
        late_write = asyncio.create_task(zombie.write(0, b"Z" * 4 * KIB))
        late_flush = asyncio.create_task(zombie.flush())
        await asyncio.to_thread(second.start)
        heir = await NbdClient.connect(second.socket, "vol")
        assert await heir.read(0, 64 * KIB) == b"1" * 64 * KIB
        assert await heir.read(128 * KIB, KIB) == bytes(KIB)
        await heir.write(0, b"2" * 4 * KIB)
        await heir.flush()
        assert not late_write.done() and not late_flush.done()

        first.resume()
        await refused(late_flush)
        # It may have been taken before the first knew that it was fenced: into memory, no further.
        with contextlib.suppress(NbdError):
            await late_write
        await refused(zombie.write(8 * KIB, b"Z" * 4 * KIB, fua=True))
        await refused(zombie.write(8 * KIB, b"Z" * 4 * KIB))
        await refused(zombie.flush())

        assert await heir.read(0, 64 * KIB) == b"2" * 4 * KIB + b"1" * 60 * KIB
        await heir.write(4 * KIB, b"2" * 4 * KIB)
        await heir.flush()
        await heir.close()
        await zombie.close()

    async def in_time() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await play()

    asyncio.run(in_time())
    assert first.wait() == 1
    assert first.output.splitlines()[-1].startswith("torusblk: volume vol was taken over")
    assert second.stop() == 0

    async def later() -> None:
        async with asyncio.timeout(DEADLINE_S):
            reader = await NbdClient.connect(third.socket, "vol")
            assert await reader.read(0, 64 * KIB) == b"2" * 8 * KIB + b"1" * 56 * KIB
            assert await reader.read(128 * KIB, KIB) == bytes(KIB)
            await reader.close()

    third = cluster.serve("vol")
    asyncio.run(later())
    assert third.stop() == 0
    until(lambda: cluster.ctl_json("volume", "check", "vol", "--deep")["good"], "all copies")
