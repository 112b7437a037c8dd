"""Faults that are aimed at moments and places which chance alone hardly ever meets.

Each draws from a generator of its own (`Field.rng_of`), so that those that were there before it
strike as they did.
"""

from __future__ import annotations

import asyncio
import random

from torus_actors.model.checksums import PAGE_SIZE
from torus_actors.scenarios.cluster import Host
from torus_actors.scenarios.field import Field
from torus_actors.storage.index import ENTRIES_OFFSET, ENTRY_SIZE, HEADER_COPIES
from torus_actors.storage.journal_format import HEADER_SIZE, segment_name
from torus_actors.storage.mfile_open import INDEX_PATH

AIMS = (
    ("sync", f"/blocks/{INDEX_PATH}"),
    ("sync", f"/inodes/{INDEX_PATH}"),
    ("sync", "/journal/"),
    ("sync", "/journal/"),
    ("write", "/journal/"),
)
"""Operations that last a moment, and before which little is written: what a crash in them leaves
decides what the next start finds."""

AIM_S = 2.0
"""Most of them come sooner than that where anybody flushes."""


async def cut_at(host: Host, aim: tuple[str, str], wait_s: float = AIM_S) -> None:
    """Have a host lose power in the next operation of a kind, if there is one soon."""
    host.cut_after, host.cut_in, host.cut_kills = 0, aim, False
    for _ in range(40):
        await asyncio.sleep(wait_s / 40)
        if not host.up:
            break
    host.cut_after = host.cut_in = None


async def tear_node(field: Field) -> None:
    """A node loses power while its index or its journal is written."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng_of("tear_node")
    await cut_at(host, rng.choice(AIMS))
    if host.up:
        field.say(f"{host.name} loses power")
        cluster.power_off(host)
    await asyncio.sleep(rng.choice((0.05, 1.0, 4.0)) * (0.5 + rng.random()))
    cluster.power_on(host)
    await cluster.start_node(host)
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    field.whole(host)


async def hang_syncs(field: Field) -> None:
    """One node's disk takes writes and gives what is read, and no sync ends; power may go then."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng_of("hang_syncs")
    hang_s = rng.choice((3.0, 12.0, 60.0)) * (0.5 + rng.random())
    host.syncs_hang_until = cluster.loop.time() + hang_s
    host.writes_hang = rng.random() < 0.5
    field.say(f"syncs of {host.name} hang for {hang_s:.1f} s")
    await asyncio.sleep(hang_s * rng.choice((0.7, 1.0)))
    if rng.random() < 0.5:
        field.say(f"{host.name} loses power")
        cluster.power_off(host)
        await asyncio.sleep(rng.uniform(0.1, 2.0))
        host.syncs_hang_until = 0.0
        cluster.power_on(host)
        await cluster.start_node(host)
    await asyncio.sleep(max(host.syncs_hang_until - cluster.loop.time(), 0.0) + 2.0)
    field.whole(host)


async def rot_index(field: Field) -> None:
    """A byte of an index rots, or a page of the journal cannot be read any more.

    Of the node whose copies rot; it is started again.
    """
    host, rng = field.rotten, field.rng_of("rot_index")
    if host is None or not host.up or field.copies_missing or field.take([host]) is None:
        return
    area = rng.choice(("blocks", "inodes", "journal"))
    if area == "journal":
        _lose_page(field, host, rng)
    else:
        at = _in_index(host, area, rng)
        field.say(f"byte {at} of the index of {area} rots on {host.name}, which is killed")
        host.disks[f"/{host.name}/{area}"].rot(INDEX_PATH, at)
    field.cluster.kill(host)
    await asyncio.sleep(rng.uniform(0.05, 1.0))
    await field.cluster.start_node(host)
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    field.whole(host)


def _lose_page(field: Field, host: Host, rng: random.Random) -> None:
    """Have a page of a segment fail that a group is in, or would be in next; no header."""
    segments = host.tree.journal.store._segments
    if not segments:
        return
    segment = rng.choice(segments)
    first, last = HEADER_SIZE // PAGE_SIZE, min(segment.end, segment.size - 1) // PAGE_SIZE
    page = rng.choice((rng.randint(first, last), max(first, last - 1), last))
    field.records_rotted = True
    name = segment_name(segment.index)
    field.say(f"page {page} of {name} is unreadable on {host.name}, which is killed")
    host.disks[f"/{host.name}/journal"].make_unreadable(name, page * PAGE_SIZE)


def _in_index(host: Host, area: str, rng: random.Random) -> int:
    """A byte of the entry of a block, or of one of the headers."""
    store = host.tree.stores.stores[("blocks", "inodes").index(area)]
    refs, _ = store.refs_from(0, 1 << 20)
    if not refs or rng.random() < 0.2:
        page = ENTRIES_OFFSET // HEADER_COPIES
        return rng.randrange(HEADER_COPIES) * page + rng.randrange(64)
    slot = store.locate(rng.choice(refs)).slot
    return int(ENTRIES_OFFSET + slot * ENTRY_SIZE + rng.randrange(ENTRY_SIZE))


async def metadata_unsure(field: Field) -> None:
    """Some changes of the metadata are not answered: made, or not, or made later."""
    store, rng = field.cluster.served, field.rng_of("metadata_unsure")
    for _ in range(rng.randint(1, 4)):
        how = rng.choice(("lose_answers", "lose_requests", "delay_requests"))
        field.say(f"the metadata: {how}")
        setattr(store, how, 1)
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        if rng.random() < 0.5:
            await store.arrive()
    await asyncio.sleep(rng.uniform(0.5, 4.0))
    store.lose_answers = store.lose_requests = store.delay_requests = 0
    await store.arrive()


CALL_BYTES = 512
"""What is larger than this is a call with something to store, and no ping."""


async def break_after_reading(field: Field) -> None:
    """Connections break when a node has read a call, and before it has answered."""
    cluster, rng = field.cluster, field.rng_of("break_after_reading")
    nodes = {host.process for host in cluster.nodes}
    ends = [dialed.other for dialed in cluster.network.connections if dialed.other.process in nodes]
    chosen = rng.sample(ends, min(len(ends), rng.randint(1, 4)))
    field.say(f"{len(chosen)} of {len(ends)} connections break at their next call")
    for end in chosen:
        end.breaks_at = CALL_BYTES
    await asyncio.sleep(rng.uniform(0.2, 2.0))
    for end in chosen:
        end.breaks_at = None
