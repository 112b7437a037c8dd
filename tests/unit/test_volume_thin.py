"""What a volume costs follows what changed in it, not its size."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from dataclasses import dataclass

from tests.fakes import Cluster, virtual

BLOCK = 512 << 10

RATIO_MAX = 1.5


@dataclass
class Cost:
    """Of one session.

    Attributes:
        flush: messages between client and nodes for the flushes.
        commit: the same for the commit.
        pages: of the block map that the commit wrote.
        attach: messages for attaching the volume again.
        memory: bytes that attaching and the first read took.
    """

    flush: int
    commit: int
    pages: int
    attach: int
    memory: int


async def cost(size: int) -> Cost:
    """Write and flush the same places of a volume of some size, commit, and attach it anew."""
    rng = random.Random(7)
    near = [rng.randrange((1 << 30) // BLOCK) * BLOCK for _ in range(24)]
    async with Cluster(nodes=2, replication=2, block_size=BLOCK, journals=True) as cluster:
        device = await cluster.volume(size)
        calls: Counter[str] = Counter()
        cluster.network.trace = lambda _, __, ___, method: calls.update([method])
        await device.write(size - 4096, b"far" * 1000)
        await device.flush()  # a commit, which begins the journal
        calls.clear()
        for offset in near:
            await device.write(offset, b"near" * 1000)
            await device.flush()
        flush = calls.total()
        assert calls["append"] == 2 * len(near)
        before = len(cluster.node(0).refs(1))
        calls.clear()
        await device.client.actor("volume:v").commit.remote()
        commit, pages = calls.total(), len(cluster.node(0).refs(1)) - before
        assert calls["put_block"] >= 2 * len(set(near))
        await device.release()
        client = await cluster.client()
        calls.clear()
        tracemalloc.start()
        try:
            again = await client.open("v")
            assert (await again.read(near[0], 4)) == b"near"
            memory, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (await again.read(size - 4096, 3)) == b"far"
        return Cost(flush, commit, pages, calls.total(), memory)


@virtual
async def test_a_tebibyte_costs_what_a_gibibyte_does() -> None:
    """Flush, commit and attach: messages, pages of the map, and memory, within half as much more.

    Both volumes are empty but for the same few blocks, near each other and one at the end.
    """
    small, large = await cost(1 << 30), await cost(1 << 40)
    assert small.flush and small.commit and small.pages and small.attach and small.memory
    assert large.flush == small.flush
    assert large.commit <= RATIO_MAX * small.commit
    assert large.attach <= RATIO_MAX * small.attach
    assert large.memory <= RATIO_MAX * small.memory
    # A larger tree is deeper: some more on the way to the same leaves, whatever the size.
    assert large.pages <= small.pages + 4
