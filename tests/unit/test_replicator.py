"""The replicator: copies where they belong, truth about them, reads around bad replicas."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import Client, Cluster, DeviceError, until, virtual
from torus_actors.actors.replicator import (
    BEFORE_RINGS_S,
    REPAIR_PAUSE_S,
    ReadLevel,
    WriteLevel,
)
from torus_actors.errors import (
    BlockUnavailable,
    Corruption,
    Invalid,
    NoPeer,
    OutOfSpace,
    TorusError,
)
from torus_actors.model import rings
from torus_actors.model.checksums import root_of, sums_of
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.model.rings import Ring
from torus_actors.nbd.protocol import Errno
from torus_actors.storage.mfile_open import DATA_PATH

BLOCK = 16 << 10


class Block:
    """One block with all that belongs to it."""

    def __init__(self, index: int, content: bytes | None = None) -> None:
        self.ref = BlockRef.of(1, 1, index)
        self.data = content if content is not None else bytes([index % 251]) * BLOCK
        self.sums = sums_of(self.data)
        self.root = root_of(self.sums)

    async def put(self, client: Client, copies: int = 0) -> list[str]:
        """Store it; the peers that took it."""
        placed = await client.actor("replicator").put_block.remote(
            self.ref, self.root, self.sums, copies, payload=self.data
        )
        return [peer for peer, _ in placed]

    async def read(self, client: Client, offset: int = 0, length: int = BLOCK) -> bytes:
        """Read from it."""
        return bytes(
            await client.actor("replicator").read.remote(self.ref, self.root, offset, length)
        )


def owners(cluster: Cluster, block: Block) -> list[str]:
    """Where a block belongs."""
    return list(cluster.ring.owners(block.ref))


async def status(client: Client) -> dict[str, Any]:
    """What the replicator says of itself."""
    answer: dict[str, Any] = await client.actor("replicator").status.remote()
    return answer


# -- writing ---------------------------------------------------------------------------------------


@virtual
async def test_torus_250_a_write_that_no_peer_took_is_an_error() -> None:
    """Regression, coreos/torus#250: a write returned success though every peer had failed.

    Here it fails, with every peer gone, or full, or failing.
    """
    async with Cluster(nodes=2) as cluster:
        client = await cluster.client()
        for node in cluster.nodes.values():
            await node.crash()
        with pytest.raises(BlockUnavailable):
            await Block(1).put(client)
        for node in cluster.nodes.values():
            await node.start()
        for peer in cluster.ids:
            cluster.network.hanging.add(peer)
        with pytest.raises(BlockUnavailable):
            await Block(2).put(client)


@pytest.mark.parametrize("nodes", [1, 2])
@virtual
async def test_torus_219_fewer_peers_than_replicas(nodes: int) -> None:
    """Regression, coreos/torus#219, 246, 427: fewer peers than replicas are no crash.

    Blocks go to those there are, and the state says that it is degraded.
    """
    async with Cluster(nodes=nodes, replication=3) as cluster:
        client = await cluster.client()
        block = Block(1)
        assert sorted(await block.put(client)) == sorted(cluster.ids)
        assert await block.read(client) == block.data
        assert (await status(client))["degraded"]


@virtual
async def test_an_empty_ring_is_said_so() -> None:
    """Without a peer in the ring, reads and writes say that at once."""
    async with Cluster(nodes=1) as cluster:
        client = await cluster.client()
        client.view.ring = cluster.ring.without_peer(cluster.ids[0])
        with pytest.raises(NoPeer):
            await Block(1).put(client)
        cluster.nodes[cluster.ids[0]].view.ring = client.view.ring
        with pytest.raises(BlockUnavailable):
            await Block(1).read(client)


@virtual
async def test_a_down_peer_is_replaced_by_the_next_and_seen_as_degraded() -> None:
    """With an owner down the block has all its copies, one of them on the next peer."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client()
        blocks = [Block(n) for n in range(6)]
        await cluster.node(0).crash()
        for block in blocks:
            placed = await block.put(client)
            assert sorted(placed) == sorted(cluster.ids[1:])
        assert not (await status(client))["degraded"]
        assert (await status(client))["peers_up"] == 2
        await cluster.node(1).crash()
        assert await Block(7).put(client) == [cluster.ids[2]]
        state = await status(client)
        assert state["degraded"] and state["degraded_puts"] == 1


@virtual
async def test_a_hanging_peer_is_passed_over() -> None:
    """A peer that is connected and does not answer costs a write seconds, not its success."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client()
        block = Block(1)
        hung = owners(cluster, block)[0]
        cluster.network.hanging.add(hung)
        started = asyncio.get_running_loop().time()
        placed = await block.put(client)
        assert hung not in placed and len(placed) == 2
        assert asyncio.get_running_loop().time() - started < 3.5


@virtual
async def test_a_node_that_left_the_ring_takes_nothing_from_who_has_not_heard_of_it() -> None:
    """It may be switched off by then: the block goes where it can stay.

    Found by reading: a client that was cut off from the metadata had flushes acknowledged, and what
    it had flushed was gone with the nodes that everybody else knew to be empty.
    """
    async with Cluster(nodes=4, replication=2) as cluster:
        client = await cluster.client()
        old, leavers = cluster.ring, set(owners(cluster, Block(0)))
        block, another, *_ = (
            each for each in map(Block, range(20)) if set(owners(cluster, each)) == leavers
        )
        ring = old
        for peer in leavers:
            ring = ring.without_peer(peer)
        for node in cluster.nodes.values():
            node.view.ring = ring
        assert client.view.ring is old
        assert set(await block.put(client)) == set(cluster.ids) - leavers
        assert await block.read(client) == block.data
        # One that joins, and has not heard of it yet, takes blocks.
        for member in old.peers:
            if member.peer_id in leavers:
                ring = ring.with_peer(member)
        client.view.ring = ring
        assert set(await another.put(client)) == leavers


@virtual
async def test_a_node_of_the_version_before_takes_blocks() -> None:
    """It does not let a writer say by which ring it goes, and refuses what it does not know."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        cell: Any = cluster.node(0).system.cells["block_store"]
        now = cell.handlers["put_block"]
        refused = 0

        def check(args: Sequence[Any], has_payload: bool) -> None:
            nonlocal refused
            if len(args) > 4:
                refused += 1
                raise Invalid(f"put_block takes 3 to 4 arguments, not {len(args)}")
            now.check(args, has_payload)

        cell.handlers = {**cell.handlers, "put_block": replace(now, check=check)}
        # At once: none of them knows what the others have found.
        for placed in await asyncio.gather(*[Block(n).put(client) for n in range(16)]):
            assert sorted(placed) == sorted(cluster.ids)
        assert refused == 16
        await Block(16).put(client)
        assert refused == 16
        # It may have been brought up to date.
        cell.handlers = {**cell.handlers, "put_block": now}
        await asyncio.sleep(BEFORE_RINGS_S + 1)
        for node in cluster.nodes.values():
            node.view.ring = node.view.ring.without_peer(cluster.ids[0])
        assert await Block(17).put(client) == [cluster.ids[1]]


@virtual
async def test_write_level_all_waits_for_all_copies() -> None:
    """Regression, found by reading: write-all succeeds with one copy.

    Here, at level all, the slowest copy is waited for.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        cluster.network.delay_s[cluster.ids[0]] = 1.0
        started = asyncio.get_running_loop().time()
        assert len(await Block(1).put(client)) == 2
        assert asyncio.get_running_loop().time() - started > 1.0


@virtual
async def test_write_level_one_waits_for_one_and_the_others_follow() -> None:
    """At level one the first copy answers, and the other is made all the same.

    Those on their way are bounded.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client(write_level=WriteLevel.ONE)
        blocks = [Block(n) for n in range(60)]
        for peer in cluster.ids:
            cluster.network.delay_s[peer] = 0.5
        assert client.system is not None
        replicator: Any = client.system.cells["replicator"].actor
        puts = [asyncio.ensure_future(block.put(client)) for block in blocks]
        most = 0
        while not all(put.done() for put in puts):
            await asyncio.sleep(0.05)
            most = max(most, replicator._following)
        assert all(len(put.result()) == 1 for put in puts)
        assert most <= 64
        for node in cluster.nodes.values():
            await until(lambda node=node: len(node.refs()) == len(blocks))


@virtual
async def test_write_level_local_stores_here() -> None:
    """At level local a node's own store takes the block, wherever it belongs."""
    async with Cluster(nodes=3, replication=1) as cluster:
        node = cluster.node(0)
        from torus_actors.actors.replicator import Replicator
        from torus_actors.runtime import ChildSpec

        assert node.system is not None
        await node.system.spawn(
            ChildSpec(
                "replicator",
                lambda: Replicator(node.view, has_store=True, write_level=WriteLevel.LOCAL),
                max_concurrency=16,
            )
        )
        for n in range(6):
            assert await Block(n).put(node) == [node.node_id]  # type: ignore[arg-type]


@virtual
async def test_fewer_copies_because_a_peer_is_full_are_no_success() -> None:
    """Unlike a peer that is down, one that is full does not come back by itself."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        cluster.node(0).disks[0].inject("write", errno.ENOSPC, path=DATA_PATH, times=1 << 30)
        with pytest.raises(OutOfSpace):
            await Block(1).put(client)
        await cluster.node(0).crash()
        assert await Block(2).put(client) == [cluster.ids[1]]


@virtual
async def test_a_full_peer_beside_a_dead_one_is_no_reason_for_fewer_copies() -> None:
    """A third one took the block. Decision 0018: as many copies as there are live peers, or none.

    Nothing is left of it, and when the dead one is back, those two take what comes.
    """
    async with Cluster(nodes=3, replication=2, blocks=40) as cluster:
        full, dead, other = map(cluster.node, range(3))
        filler = 0
        while full.stores[0].stats().free:
            full.stores[0].put(BlockRef.of(77, 1, filler), b"f")
            filler += 1
        await dead.crash()
        device = await cluster.volume(1 << 20)
        await device.write(0, b"x" * (16 << 10))
        with pytest.raises(DeviceError) as failed:
            await device.flush()
        assert failed.value.errno == Errno.ENOSPC
        await device.trim(0, 1 << 20)
        await until(lambda: not other.refs())
        await dead.start()
        await device.write(0, b"y" * (16 << 10), fua=True)
        assert dead.refs() == other.refs() != set()


@virtual
async def test_torus_401_a_full_peer_is_told_as_out_of_space() -> None:
    """Regression, coreos/torus#401: out of space came without a warning, as EIO.

    Here a write that a full cluster cannot take fails with OutOfSpace.
    """
    async with Cluster(nodes=2, replication=2, blocks=4) as cluster:
        client = await cluster.client()
        with pytest.raises(OutOfSpace):
            for n in range(1000):
                await Block(n).put(client)
        assert await Block(0).read(client) == Block(0).data


@virtual
async def test_the_replicator_dies_with_puts_and_reads_on_their_way() -> None:
    """Killed again and again under load: every call is answered as if nothing had been."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client(read_level=ReadLevel.SPREAD)
        blocks = [Block(n) for n in range(40)]

        async def cycle(block: Block) -> None:
            await block.put(client)
            assert await block.read(client) == block.data

        calls = [asyncio.ensure_future(cycle(block)) for block in blocks]
        for _ in range(3):
            await asyncio.sleep(0.0005)
            client.kill("replicator")
        await asyncio.gather(*calls)


@virtual
async def test_flush_names_the_incarnation_of_those_that_confirm() -> None:
    """A peer that is gone is not among them; one that restarted confirms another incarnation."""
    async with Cluster(nodes=2) as cluster:
        client = await cluster.client()
        flush = client.actor("replicator").flush
        before = await flush.remote(cluster.ids)
        assert sorted(before) == sorted(cluster.ids)
        await cluster.node(0).restart()
        await cluster.node(1).crash()
        after = await flush.remote(cluster.ids)
        assert list(after) == [cluster.ids[0]]
        assert after[cluster.ids[0]] != before[cluster.ids[0]]


# -- reading ---------------------------------------------------------------------------------------


@virtual
async def test_reads_of_one_turn_are_one_call_a_peer() -> None:
    """A hundred small reads at once cost at most one call to each peer; large ones go alone."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        blocks = [Block(n) for n in range(25)]
        for block in blocks:
            await block.put(client)
        cluster.network.calls.clear()
        found = await asyncio.gather(
            *[block.read(client, at, 4096) for block in blocks for at in range(0, BLOCK, 4096)]
        )
        assert found == [block.data[:4096] for block in blocks for _ in range(4)]
        assert cluster.network.calls["read_ranges"] <= 2


def asked_first(client: Client, block: Block) -> str:
    """The peer that a read of this block goes to."""
    assert client.system is not None
    replicator: Any = client.system.cells["replicator"].actor
    order: list[str] = replicator._read_order(block.ref)
    return order[0]


@pytest.mark.parametrize("level", list(ReadLevel))
@virtual
async def test_a_missing_copy_is_read_elsewhere_and_repaired(level: ReadLevel) -> None:
    """One owner lost a block: reads succeed at every level, and the owner gets it back."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client(read_level=level)
        for n in range(6):
            block = Block(n)
            await block.put(client)
            store = cluster.nodes[asked_first(client, block)].stores[0]
            assert store.delete([block.ref]) == 1
            assert await block.read(client) == block.data
            await until(lambda: store.has(block.ref))  # noqa: B023 - waited for in this turn
        found = await status(client)
        assert found["missing"] >= 6 and found["repaired"] >= 6


@pytest.mark.parametrize("level", list(ReadLevel))
@virtual
async def test_a_damaged_copy_is_read_elsewhere_and_repaired(level: ReadLevel) -> None:
    """Regression, found by reading: a checksum mismatch tries no second replica.

    Here, when bits rot on one owner's disk, whoever reads gets the right bytes, and the copy is
    mended.
    """
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client(read_level=level)
        block = Block(3)
        await block.put(client)
        node = cluster.nodes[asked_first(client, block)]
        node.rot(block.ref, 5000)
        with pytest.raises(Corruption):
            node.stores[0].get(block.ref)
        for _ in range(4):
            assert await block.read(client) == block.data
            await asyncio.sleep(0.1)
        if level is ReadLevel.SPREAD:
            return  # the good copy may have been faster each time
        assert node.stores[0].get(block.ref) == block.data
        found = await status(client)
        assert found["corrupt"] >= 1 and found["repaired"] >= 1


@virtual
async def test_a_copy_damaged_on_its_way_is_read_elsewhere() -> None:
    """One peer's answers arrive damaged, shortened or too long: the reader never sees it."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        for mangle in (
            lambda _, data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda _, data: data[:-4096],
            lambda _, data: data + b"more",
            lambda _, data: b"",
        ):
            for peer in cluster.ids:
                cluster.network.mangle = {peer: mangle}
                assert await block.read(client) == block.data
                assert await block.read(client, 4096, 4096) == block.data[4096:8192]


@virtual
async def test_all_copies_damaged_is_an_error_not_data() -> None:
    """If no replica is right the read fails."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        for peer in cluster.ids:
            cluster.network.mangle[peer] = lambda _, data: data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(BlockUnavailable):
            await block.read(client)


@pytest.mark.parametrize("level", [ReadLevel.BLOCK, ReadLevel.SPREAD])
@virtual
async def test_a_hedged_read_overtakes_a_hanging_peer(level: ReadLevel) -> None:
    """Regression, found by reading: reads retry ten times, with doubling time-outs.

    Here a connected peer that does not answer delays a read by less than a second.
    """
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client(read_level=level)
        blocks = [Block(n) for n in range(8)]
        for block in blocks:
            await block.put(client)
        cluster.network.hanging.add(cluster.ids[0])
        started = asyncio.get_running_loop().time()
        for block in blocks:
            assert await block.read(client) == block.data
        assert asyncio.get_running_loop().time() - started < len(blocks)
        if level is ReadLevel.BLOCK:
            assert (await status(client))["hedged"] > 0


@virtual
async def test_sequential_reads_ask_one_replica_in_ring_order() -> None:
    """At level sequential only the first owner is asked as long as it answers."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client(read_level=ReadLevel.SEQUENTIAL)
        block = Block(1)
        await block.put(client)
        asked: list[str] = []
        cluster.network.trace = lambda _, target, __, method: asked.append(target)
        for _ in range(5):
            await block.read(client)
        assert asked == [cluster.ring.permutation(block.ref)[0]] * 5


@virtual
async def test_spread_reads_ask_two_replicas_at_once() -> None:
    """At level spread each read goes to two, and one slow replica is not noticed at all."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client(read_level=ReadLevel.SPREAD)
        block = Block(1)
        await block.put(client)
        cluster.network.calls.clear()
        cluster.network.delay_s[owners(cluster, block)[0]] = 2.0
        started = asyncio.get_running_loop().time()
        assert await block.read(client) == block.data
        assert asyncio.get_running_loop().time() - started < 0.03
        assert cluster.network.calls["read_ranges"] == 2


@virtual
async def test_a_read_waits_for_a_peer_that_comes_back() -> None:
    """The only copy is on a node that restarts: the read succeeds once it is back."""
    async with Cluster(nodes=1, replication=1) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        await client.actor("replicator").flush.remote(cluster.ids)
        await cluster.node(0).crash()
        read = asyncio.ensure_future(block.read(client))
        await asyncio.sleep(5.0)
        assert not read.done()
        await cluster.node(0).start()
        assert await read == block.data


@virtual
async def test_a_block_that_moves_just_now_is_found() -> None:
    """Between the question to its new owner and that to the old one a block moved: it is found."""
    async with Cluster(nodes=2, replication=1) as cluster:
        client = await cluster.client()
        block = Block(1)
        (owner,) = await block.put(client)
        (other,) = set(cluster.ids) - {owner}
        store, target = cluster.nodes[owner].stores[0], cluster.nodes[other].stores[0]
        store.delete([block.ref])
        moved = []

        def move(_: str, asked: str, __: str, method: str) -> None:
            if method == "read_ranges" and not moved and asked == other:
                moved.append(asked)
                asyncio.get_running_loop().call_later(
                    0.001, lambda: target.put(block.ref, block.data)
                )

        cluster.network.trace = move
        assert await block.read(client) == block.data
        assert moved


@virtual
async def test_a_node_that_left_the_ring_is_asked_last() -> None:
    """A block that only a former member has can still be read."""
    async with Cluster(nodes=2, replication=1) as cluster:
        client = await cluster.client()
        block = Block(1)
        (owner,) = await block.put(client)
        cluster.set_ring(cluster.ring.without_peer(owner))
        with pytest.raises(BlockUnavailable):
            await block.read(client)
        client.view.peers = {owner: None}  # type: ignore[dict-item]
        assert await block.read(client) == block.data


@virtual
async def test_a_node_that_is_forgotten_is_asked_no_more() -> None:
    """As the ring watcher says it: nothing else than who was there is another by then."""
    async with Cluster(nodes=2, replication=1) as cluster:
        client = await cluster.client()
        block = Block(1)
        (owner,) = await block.put(client)
        cluster.set_ring(cluster.ring.without_peer(owner))
        client.view.former = {owner: None}  # type: ignore[dict-item]
        assert await block.read(client) == block.data
        client.view.former = {}
        client.view.peers = dict(client.view.peers)
        with pytest.raises(BlockUnavailable):
            await block.read(client)


@virtual
async def test_a_ring_that_was_read_again_costs_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A watch begins anew, with the same ring: from then on each read compared all its members."""
    async with Cluster(nodes=2, replication=1) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        assert await block.read(client) == block.data
        cluster.set_ring(rings.unmarshal(rings.marshal(cluster.ring)))
        assert await block.read(client) == block.data
        compared: list[object] = []

        def equal(self: object, other: object) -> bool:
            compared.append(other)
            return self is other

        monkeypatch.setattr(Ring, "__eq__", equal)
        assert await block.read(client) == block.data
        assert not compared


@virtual
async def test_orders_of_asking_take_a_bounded_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a large ring there are hundreds of thousands. Found by reading: all were kept."""
    async with Cluster(nodes=4, replication=2) as cluster:
        client = await cluster.client()
        replicator: Any = client.system.cells["replicator"].actor
        orders = {tuple(replicator._read_order(Block(n).ref)) for n in range(1000)}
        assert len(orders) > 4
        monkeypatch.setattr("torus_actors.actors.replicator.ORDERS_PEERS_MAX", 16)
        client.view.peers = dict(client.view.peers)
        assert orders == {tuple(replicator._read_order(Block(n).ref)) for n in range(1000)}
        assert len(replicator._orders) <= 4


@virtual
async def test_nothing_is_left_behind() -> None:
    """After reads that were answered, hedged and failed, no batch and no timer remains."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        cluster.network.hanging.add(cluster.ids[0])
        await block.read(client)
        with pytest.raises(TorusError):
            await Block(2).read(client)
        await asyncio.sleep(60.0)
        assert client.system is not None
        replicator: Any = client.system.cells["replicator"].actor
        assert not replicator._batches and not replicator._queue and replicator._timer is None
        assert not replicator._repairing


@virtual
async def test_a_copy_that_the_disk_cannot_read_is_replaced() -> None:
    """A bad sector under one copy: a reader gets the data from another, and mends it like rot."""
    async with Cluster(nodes=3, replication=2) as cluster:
        client = await cluster.client()
        block = Block(3)
        await block.put(client)
        node = cluster.nodes[asked_first(client, block)]
        slot = node.stores[0].locate(block.ref).slot
        node.disks[0].inject("read", errno.EIO, path=DATA_PATH, times=3)
        assert await block.read(client) == block.data
        await asyncio.sleep(0.5)
        node.disks[0].heal()
        assert (await status(client))["repaired"] == 1
        assert node.stores[0].locate(block.ref).slot != slot


@virtual
async def test_reads_do_not_try_to_fill_a_full_owner_each_time() -> None:
    """Each try moves a whole block twice, for a page: one is enough for a while."""
    async with Cluster(nodes=3, replication=1, blocks=4) as cluster:
        client = await cluster.client()
        block = Block(1)
        (owner,) = await block.put(client)
        stand_in = next(each for each in cluster.ids if each != owner)
        cluster.nodes[stand_in].stores[0].put(block.ref, block.data)
        store = cluster.nodes[owner].stores[0]
        store.delete([block.ref])
        store.flush()
        for n in range(store.stats().free):
            store.put(Block(100 + n).ref, block.data)
        puts = cluster.network.calls["put_block"]
        for _ in range(50):
            assert await block.read(client, 0, 4096) == block.data[:4096]
            await asyncio.sleep(0.01)
        assert cluster.network.calls["put_block"] - puts == 1
        store.delete([Block(100).ref])
        store.flush()
        await asyncio.sleep(REPAIR_PAUSE_S)
        await block.read(client, 0, 4096)
        await until(lambda: store.has(block.ref))


@virtual
async def test_one_bad_disk_does_not_make_the_cluster_full() -> None:
    """A node whose disk refuses all writes keeps its room: blocks have one copy, and no error."""
    async with Cluster(nodes=2, replication=2, blocks=64) as cluster:
        client = await cluster.client()
        bad, good = (cluster.nodes[node] for node in cluster.ids)
        bad.disks[0].inject("write", errno.EROFS, path=DATA_PATH, times=10**9)
        for index in range(200):
            block = Block(index)
            assert await block.put(client) == [good.node_id]
            await good.actor("block_store").delete_blocks.remote(bytes(block.ref))
            await good.actor("block_store").flush.remote()
        bad.disks[0].heal()
        assert set(await Block(300).put(client)) == set(cluster.ids)


@pytest.mark.parametrize("copies", [2, 3])
@virtual
async def test_a_hedged_read_goes_on_where_the_second_peer_has_nothing(copies: int) -> None:
    """The first one hangs, the second one lacks the block, and a third has it, an owner or not.

    Found by review: nobody else was asked before the first one's time was over.
    """
    async with Cluster(nodes=3, replication=copies) as cluster:
        client = await cluster.client()
        block = Block(1)
        await block.put(client)
        replicator: Any = client.system.cells["replicator"].actor
        hangs, lacks, has = replicator._read_order(block.ref)
        cluster.nodes[has].stores[0].put(block.ref, block.data)
        cluster.nodes[lacks].stores[0].delete([block.ref])
        cluster.network.hanging.add(hangs)
        began = asyncio.get_running_loop().time()
        assert await block.read(client) == block.data
        assert asyncio.get_running_loop().time() - began < 1.0


@virtual
async def test_a_page_that_is_larger_than_a_block_is_repaired() -> None:
    """Pages have up to 28 KiB, and blocks of data may have 4: all of a page is fetched."""
    async with Cluster(nodes=2, replication=2) as cluster:
        client = await cluster.client()
        page = bytes(range(256)) * (28 * 4)
        ref = BlockRef.of(1, 1, 7, BlockType.INODE)
        sums = sums_of(page)
        lost, other = cluster.node(0), cluster.node(1)
        await other.actor("block_store").put_block.remote(ref, root_of(sums), sums, payload=page)
        repair = client.actor("replicator").repair
        await repair.remote(ref, root_of(sums), lost.node_id)
        assert lost.stores[1].get(ref) == page


@virtual
async def test_reads_do_not_wait_for_puts_that_hang() -> None:
    """Of many volumes; the blocks that are read are on other peers."""
    async with Cluster(nodes=3, replication=1) as cluster:
        client = await cluster.client()
        hangs = cluster.ids[0]
        blocks = [Block(n) for n in range(1200)]
        stuck = [block for block in blocks if hangs in cluster.ring.owners(block.ref)]
        there = next(block for block in blocks if hangs not in cluster.ring.owners(block.ref))
        await there.put(client)
        cluster.network.hanging.add(hangs)
        puts = [asyncio.ensure_future(block.put(client)) for block in stuck[:300]]
        await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
        assert await there.read(client) == there.data
        assert len(puts) == 300 and asyncio.get_running_loop().time() - began < 0.5
        await asyncio.gather(*puts, return_exceptions=True)


@virtual
async def test_reads_do_not_wait_for_puts_whose_disk_hangs() -> None:
    """In writes alone; of many volumes, each of which tries again until the node is left out.

    Found by reading: reads waited behind the puts, and failed, until the disk went on.
    """
    async with Cluster(nodes=2, replication=1, blocks=2000) as cluster:
        client = await cluster.client()
        there = Block(1)
        (hangs,) = await there.put(client)
        cluster.nodes[hangs].blocking_s["write"] = 1000.0
        for _ in range(4):
            puts = [Block(n).put(client) for n in range(1000, 1400)]
            await asyncio.gather(*puts, return_exceptions=True)
        began = asyncio.get_running_loop().time()
        assert await there.read(client) == there.data
        assert asyncio.get_running_loop().time() - began < 0.5


@virtual
async def test_no_page_is_put_when_the_call_has_failed() -> None:
    """What went on would store pages that nobody knows of."""
    async with Cluster(nodes=2, replication=1) as cluster:
        client = await cluster.client()
        too_large = [BlockRef.of(1, 1, 0, BlockType.INODE), bytes(64 << 10)]
        others = [[BlockRef.of(1, 1, n, BlockType.INODE), bytes(30)] for n in range(1, 128)]
        cluster.network.hanging.update(cluster.ids)
        with pytest.raises(TorusError):
            await client.actor("inode_store").put_pages.remote([too_large, *others])
        cluster.network.hanging.clear()
        await asyncio.sleep(60)
        assert not any(node.refs(1) for node in cluster.nodes.values())
