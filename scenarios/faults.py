"""The faults: what happens to a simulated cluster, each from its beginning to its end.

A fault is a coroutine that strikes once and returns when what it broke is whole again (or is to
stay broken until the scenario ends). `FAULTS` is the table of all of them.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

from torus_actors.errors import TorusError
from torus_actors.metadata.ring_changes import change_ring
from torus_actors.model import rings
from torus_actors.model.checksums import sums_size
from torus_actors.model.refs import BlockRef
from torus_actors.runtime.cell import State
from torus_actors.scenarios.aimed_faults import (
    AIMS,
    break_after_reading,
    cut_at,
    hang_syncs,
    metadata_unsure,
    rot_index,
    tear_node,
)
from torus_actors.scenarios.client_faults import (
    crash_at_flush,
    crash_beside_commit,
    crash_client,
    crash_client_and_member,
    cut_client,
    freeze_client,
    hand_over_slowly,
    kill_at_head,
    reopen,
    second_client,
    tell_half,
)
from torus_actors.scenarios.cluster import META_ADDRESS, Cluster, Host
from torus_actors.scenarios.cuts import Cut, ways_of
from torus_actors.scenarios.field import Field
from torus_actors.scenarios.late_requests import late_requests
from torus_actors.scenarios.readers import crash_reader, cut_reader, end_lease, read_beside
from torus_actors.scenarios.resizes import resize
from torus_actors.scenarios.restores import restore
from torus_actors.scenarios.retiring import retire_node
from torus_actors.scenarios.snapshots import take_snapshots
from torus_actors.storage.index import Layout
from torus_actors.storage.journal import JournalStore
from torus_actors.storage.journal_format import NAME_PREFIX, segment_name
from torus_actors.storage.mfile_open import DATA_PATH, INDEX_PATH

EVICTED_S_MAX = 90.0
"""Faults may interrupt the counting: a lost node leaves the ring within thrice the time-out and
this."""


async def crash_node(field: Field) -> None:
    """A node dies: killed, or its power fails, maybe in the middle of a disk operation."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    await _die(field, host)
    await asyncio.sleep(rng.choice((0.05, 1.0, 4.0, 12.0)) * (0.5 + rng.random()))
    cluster.power_on(host)
    await cluster.start_node(host)
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    field.whole(host)


async def _die(field: Field, host: Host) -> None:
    cluster, rng = field.cluster, field.rng
    how = rng.choice(("kill", "power", "kill", "power"))
    if rng.random() < 0.5:
        await _cut_in_operation(host, rng.randrange(12), how == "kill")
        if not host.up:
            return
    if how == "kill":
        field.say(f"{host.name} is killed")
        cluster.kill(host)
    else:
        field.say(f"{host.name} loses power")
        cluster.power_off(host)


async def _cut_in_operation(host: Host, operations: int, kill: bool, wait_s: float = 2.0) -> None:
    """Have the host die in the disk operation after so many, if there is one soon."""
    host.cut_after, host.cut_kills = operations, kill
    for _ in range(40):
        await asyncio.sleep(wait_s / 40)
        if not host.up:
            return
    host.cut_after = None


async def lose_node(field: Field) -> None:
    """Nodes are gone with their disks, up to all but one of a block's; others join instead."""
    async with field.losing():
        if not await field.whole_again():
            return
        cluster, rng = field.cluster, field.rng
        ring = await cluster.ring()
        room = len(ring.members) - cluster.shape.replication
        count = min(rng.randint(1, cluster.shape.replication - 1), room)
        lost = [host for _ in range(count) if (host := field.victim()) is not None]
        for host in lost:
            field.say(f"{host.name} burns down")
            host.wanted = False
            cluster.power_off(host)
            host.disks.clear()
        if field.rotten in lost:
            field.rotten, field.records_rotted = None, False
        await asyncio.sleep(rng.uniform(0.0, 8.0))
        for host in lost:
            field.say(f"{host.name} is taken out of the ring")
            cluster.may_leave.add(host.node_id)
            await change_ring(cluster.meta, _without(host.node_id), rng)
            await asyncio.sleep(rng.uniform(0.0, 3.0))
            await cluster.start_node(cluster.add_host())
        if not await field.settled():
            lacking = await field.checker.lacking(deep=False)
            cluster.fail(f"a lost node's blocks were not copied in time: {lacking[:3]}")
        for host in lost:
            field.whole(host)


async def abandon_node(field: Field) -> None:
    """A node is gone, and nobody does anything about it; it may come back much later.

    The others take it out of the ring, and all copies are made, without an operator.
    """
    async with field.losing():
        cluster, rng = field.cluster, field.rng
        if not await field.whole_again():
            return
        ring = await cluster.ring()
        if len(ring.members) <= max(cluster.shape.replication, 2):
            return
        host = field.victim()
        if host is None:
            return
        peer = host.node_id
        returns = rng.random() < 0.5
        field.say(f"{host.name} is gone{'' if returns else ' for good'}, and nobody cares")
        cluster.may_leave.add(peer)
        host.wanted = False
        cluster.power_off(host)
        if not returns:
            host.disks.clear()
        if not await _in_ring(field, peer, False):
            cluster.fail(f"{host.name} was not taken out of the ring in time")
        elif not await field.settled():
            lacking = await field.checker.lacking(deep=False)
            cluster.fail(f"the blocks of a node that is gone were not copied: {lacking[:3]}")
        if returns:
            cluster.power_on(host)
            await cluster.start_node(host)
            if not await _in_ring(field, peer, True):
                cluster.fail(f"{host.name} has not come back into the ring")
        else:
            await cluster.start_node(cluster.add_host())
        cluster.may_leave.discard(peer)
        field.whole(host)


async def _in_ring(field: Field, peer: str, wanted: bool) -> bool:
    """Wait until a node is in the ring, or is not; whether that was in time."""
    cluster = field.cluster
    end = cluster.loop.time() + EVICTED_S_MAX + 3 * cluster.shape.remove_after_s
    while (peer in (await cluster.ring()).members) != wanted:
        if cluster.loop.time() > end:
            return False
        await asyncio.sleep(1.0)
    return True


def _without(peer: str) -> Callable[[rings.Ring], rings.Ring | None]:
    return lambda ring: ring.without_peer(peer) if peer in ring.members else None


async def lose_journal(field: Field) -> None:
    """A node dies, and comes back with its blocks, but with an empty journal."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    if not await field.may_lose_journal(host) or not host.up:
        field.whole(host)
        return
    field.say(f"{host.name} is killed and loses its journal")
    cluster.kill(host)
    del host.disks[f"/{host.name}/journal"]
    await asyncio.sleep(rng.choice((0.05, 1.0, 4.0)) * (0.5 + rng.random()))
    await cluster.start_node(host)
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    field.whole(host)


async def restart_all(field: Field) -> None:
    """Every node is stopped in order and started again, one after the other."""
    for host in list(field.cluster.nodes):
        if not host.up or host.name in field.broken or len(field.broken) >= field.broken_max:
            continue
        field.broken[host.name] = host
        field.say(f"{host.name} is restarted")
        await field.cluster.stop(host)
        await asyncio.sleep(field.rng.uniform(0.1, 2.0))
        await field.cluster.start_node(host)
        field.whole(host)
        await asyncio.sleep(field.rng.uniform(0.5, 2.0))


async def cut_peers(field: Field) -> None:
    """Some nodes cannot reach some others, or one node nobody."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    others = _others(cluster, host)
    if rng.random() < 0.5:
        others = rng.sample(others, rng.randint(1, len(others)))
    field.say(f"{host.name} is cut off from {len(others)} hosts")
    with Cut(cluster, ways_of(host.address, others)[0]):
        await asyncio.sleep(rng.choice((0.5, 2.0, 10.0)) * (0.5 + rng.random()))
    field.say(f"{host.name} is back")
    await asyncio.sleep(2.0)
    field.whole(host)


async def isolate_node(field: Field) -> None:
    """A node reaches the metadata and nobody else, for longer than anybody has patience."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    everybody = [*cluster.nodes, *cluster.clients, *cluster.spares]
    others = [h.address for h in everybody if h is not host]
    field.say(f"{host.name} is cut off from all but the metadata")
    ways = [(host.address, o) for o in others] + [(o, host.address) for o in others]
    with Cut(cluster, ways):
        await asyncio.sleep(rng.uniform(60.0, 90.0))
    field.say(f"{host.name} is back")
    await asyncio.sleep(2.0)
    field.whole(host)


async def late_node(field: Field) -> None:
    """A node does not hear that more copies are wanted, for some passes; all others reach it."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    least = cluster.shape.replication
    await _want_copies(field, least)
    await asyncio.sleep(5.0)
    field.say(f"{host.name} is cut off from the metadata alone")
    ways, _ = ways_of(host.address, [cluster.meta_host.address])
    with Cut(cluster, ways):
        await asyncio.sleep(rng.uniform(0.0, 5.0))
        await _want_copies(field, least + 1)
        await asyncio.sleep(rng.uniform(125.0, 150.0))
    field.say(f"{host.name} reaches the metadata again")
    await asyncio.sleep(2.0)
    field.whole(host)


async def cut_one_way(field: Field) -> None:
    """What a node sends, or what is sent to it, does not arrive."""
    host = field.victim()
    if host is None:
        return
    cluster, rng = field.cluster, field.rng
    others = _others(cluster, host)
    ways, how = ways_of(host.address, others, rng.choice(("out", "in")))
    field.say(f"{host.name} is cut off{how}")
    with Cut(cluster, ways):
        await asyncio.sleep(rng.choice((0.5, 2.0, 10.0)) * (0.5 + rng.random()))
    field.say(f"{host.name} is back")
    await asyncio.sleep(2.0)
    field.whole(host)


def _others(cluster: Cluster, host: Host) -> list[str]:
    """All other addresses, that of the metadata included."""
    hosts = [*cluster.nodes, *cluster.clients, *cluster.spares, cluster.meta_host]
    return [other.address for other in hosts if other is not host]


async def freeze_node(field: Field) -> None:
    """A node stands still for a while."""
    host = field.victim()
    if host is None:
        return
    process = host.process
    assert process is not None
    field.say(f"{process.name} is frozen")
    process.pause()
    await asyncio.sleep(field.rng.choice((0.3, 2.0, 10.0)) * (0.5 + field.rng.random()))
    field.say(f"{process.name} wakes up")
    process.resume()
    await asyncio.sleep(1.0)
    field.whole(host)


async def metadata_out(field: Field) -> None:
    """The metadata cannot be reached for a while."""
    await _without_metadata(field, field.rng.choice((1.0, 5.0, 15.0)) * (0.5 + field.rng.random()))


async def metadata_away(field: Field) -> None:
    """The metadata cannot be reached for long."""
    await _without_metadata(field, field.rng.uniform(10.0, 40.0))


async def _without_metadata(field: Field, pause: float) -> None:
    cluster, rng = field.cluster, field.rng
    how = rng.choice(("killed", "cut off", "frozen"))
    field.say(f"the metadata is {how} for {pause:.1f} s")
    field.readers.leases_end()
    host = cluster.meta_host
    if how == "killed":
        cluster.kill(host)
        await asyncio.sleep(pause)
        await cluster.start_meta()
    elif how == "frozen":
        process = host.process
        assert process is not None
        process.pause()
        await asyncio.sleep(pause)
        process.resume()
    else:
        with Cut(cluster, ways_of(META_ADDRESS, _others(cluster, host))[0]):
            await asyncio.sleep(pause)
    field.say("the metadata is back")
    await asyncio.sleep(2.0)


async def wipe_leases(field: Field) -> None:
    """All leases are gone at once, as after an etcd that lost its lease timers."""
    store = field.cluster.store
    leases = sorted({item.lease for item in (await store.range(""))[0] if item.lease})
    field.say(f"{len(leases)} leases end at once")
    field.readers.leases_end()
    for lease in leases:
        await store.lease_revoke(lease)
    await asyncio.sleep(1.0)


SUMS_SHARE = 0.15
"""Of the blocks that rot it is their checksum list: a few bytes, which chance would never meet."""

CACHED_SHARE = 0.3
"""Of the blocks that rot the page cache has them right still: no read finds it."""


async def rot(field: Field) -> None:
    """A byte of a stored block or record changes, always on the same node: one copy at most is bad.

    Not a byte of a header of the journal's files: a node that lost one does not start any more, and
    is a node lost.
    """
    cluster, rng = field.cluster, field.rng
    if field.rotten is None:
        field.rotten = rng.choice(cluster.nodes)
    host = field.rotten
    if not host.up or field.copies_missing:
        return
    area = rng.choice(("blocks", "blocks", "inodes", "journal"))
    if area == "journal":
        found = await _in_journal(host, rng)
    else:
        found = _in_store(host, area, rng, field.rng_of("sums").random() < SUMS_SHARE)
    if found is not None and not field.copies_missing:
        path, at, what = found
        field.records_rotted |= area == "journal"
        field.say(f"a byte of {what} rots on {host.name}")
        cached = area != "journal" and field.rng_of("cached").random() < CACHED_SHARE
        host.disks[f"/{host.name}/{area}"].rot(path, at, cached=cached)


def _in_store(host: Host, area: str, rng: random.Random, sums: bool) -> tuple[str, int, str] | None:
    """File, place and name of a byte of a stored block, or of its checksum list."""
    store = host.tree.stores.stores[("blocks", "inodes").index(area)]
    refs, _ = store.refs_from(0, 1 << 20)
    if not refs:
        return None
    ref = BlockRef(rng.choice(refs))
    location = store.locate(ref)
    layout = Layout(store.block_size)
    at = rng.randrange(location.length)
    at = at % sums_size(location.length) if sums else layout.sums_room + at
    what = f"the checksums of block {ref}" if sums else f"block {ref}"
    return DATA_PATH, layout.slot_offset(location.slot) + at, what


async def _in_journal(host: Host, rng: random.Random) -> tuple[str, int, str] | None:
    """File, place and name of a byte of a record that may still be needed.

    Not of the newest group of the journal: after a power cut, what rotted there looks like what was
    torn, and what was torn was not acknowledged. So it waits until there is a newer one.
    """
    tree, journal = host.tree, host.tree.journal.store
    volumes = journal.volumes()
    if not volumes:
        return None
    volume = rng.choice(volumes)
    epoch, first, last, _ = journal.fenced(volume)
    if not epoch:
        return None
    seq = rng.randint(first, last)
    place = _place(journal, volume, epoch, seq)
    commits = journal.stats().commits
    for _ in range(20):
        await asyncio.sleep(0.1)
        if not host.up or host.tree is not tree or place is None:
            return None
        if journal.stats().commits > commits:
            break
    else:
        return None
    if _place(journal, volume, epoch, seq) != place:
        return None  # cut, or moved, meanwhile
    segment, offset, length = place
    at = offset + rng.randrange(max(length, 1))
    return segment_name(segment), at, f"record {seq} of volume {volume}"


def _place(journal: JournalStore, volume: int, epoch: int, seq: int) -> tuple[int, int, int] | None:
    """Segment, offset and length of a record."""
    try:
        _, step = journal.locate(volume, epoch, seq, 1)
    except TorusError:
        return None  # cut, or lost
    journal.release(step)
    if not step.items:
        return None
    _, _, stored, segment = step.items[0]
    return segment.index, stored.offset, stored.length


AREAS = ("blocks", "inodes", "journal")
"""What a node has on its disk."""


async def disk_errors(field: Field) -> None:
    """A few operations of one node's disk fail: reads, writes (made in part), or syncs.

    What could not be synced is not written to any more, and says so: the node is restarted then.
    """
    host = field.victim()
    if host is None:
        return
    rng = field.rng
    area, kind = rng.choice(AREAS), rng.choice(("read", "write", "sync"))
    disk = host.disks[f"/{host.name}/{area}"]
    path, error = None, errno.EIO
    apart = field.rng_of("disk_errors")
    if area != "journal" and kind != "read" and apart.random() < 0.5:
        path = INDEX_PATH  # what is written to the data file comes first, and hides it
    if kind != "read" and apart.random() < 0.25:
        error = errno.ENOSPC  # as on a thin volume or under a quota
    where = f"{area}{'' if path is None else ', the index'}"
    times, lasts_s = rng.randint(1, 5), rng.uniform(1.0, 5.0)
    if kind == "write" and path is not None and apart.random() < 0.4:
        # For long: no flush of that node goes through, and it takes no blocks meanwhile.
        times, lasts_s = 1 << 30, apart.uniform(10.0, 30.0)
    field.say(
        f"the disk of {host.name} fails to {kind} {where}, {times} times in {lasts_s:.0f} s: "
        f"{errno.errorcode[error]}"
    )
    disk.inject(kind, error, path=path, times=times)
    await asyncio.sleep(lasts_s)
    disk.heal()
    await restart_if_failed(field.cluster, host)
    field.whole(host)


async def restart_if_failed(cluster: Cluster, host: Host) -> None:
    """Do what the message of a store or journal that failed asks for."""
    if not host.up:
        return
    parts = [*host.tree.stores.stores, host.tree.journal.store]
    if any(part.failure is not None for part in parts):
        cluster.say(f"{host.name} is restarted, because its disk failed")
        cluster.kill(host)
        await cluster.start_node(host)


async def disk_full(field: Field) -> None:
    """Writes to one node's disk find no room for a while."""
    host = field.victim()
    if host is None:
        return
    field.say(f"the disk of {host.name} is full")
    _fill(host)
    await asyncio.sleep(field.rng.uniform(0.5, 6.0))
    _empty(host)
    field.whole(host)


async def all_full(field: Field) -> None:
    """There is no room on any node for a while; some clients die just then."""
    cluster, rng = field.cluster, field.rng
    hosts = cluster.members_up
    field.say("all disks are full")
    for host in hosts:
        _fill(host)
    for _ in range(rng.choice((0, 1, 1, 2))):
        await asyncio.sleep(rng.uniform(0.5, 4.0))
        await crash_client(field)
    await asyncio.sleep(rng.uniform(0.5, 6.0))
    for host in hosts:
        _empty(host)
    field.say("there is room again")


def _fill(host: Host) -> None:
    *stores, journal = [host.disks[f"/{host.name}/{area}"] for area in AREAS]
    for disk in stores:
        disk.inject("write", errno.ENOSPC, path=DATA_PATH, times=1 << 30)
    # The journal's files were written in full when they were made; there can be no further one.
    # (An open file goes by the name under which it was made: those that are there are left alone.)
    count = sum(
        name.startswith(NAME_PREFIX) and not name.endswith(".new") for name in journal.listdir()
    )
    for index in range(count, count + 2):
        path = f"{segment_name(index)}.new"
        journal.inject("write", errno.ENOSPC, path=path, times=1 << 30)


def _empty(host: Host) -> None:
    for area in AREAS:
        host.disks[f"/{host.name}/{area}"].heal()


async def slow_disk(field: Field) -> None:
    """One node's disk is slow for a while."""
    host = field.victim()
    if host is None:
        return
    host.disk_factor = field.rng.choice((10.0, 100.0, 1000.0))
    field.say(f"the disk of {host.name} is {host.disk_factor:g} times slower")
    await asyncio.sleep(field.rng.uniform(1.0, 10.0))
    host.disk_factor = 1.0
    field.whole(host)


async def power_cut(field: Field) -> None:
    """All hosts lose power at once, in the middle of whatever they do; then all come back."""
    cluster = field.cluster
    field.say("the power fails")
    everybody = [*cluster.nodes, *cluster.clients, *cluster.spares]
    for driver in field.drivers:
        if driver.host.process is not None:
            field.cluster.expendable.add(driver.host.process.name)
    wanted = [host for host in cluster.nodes if host.wanted]
    apart = field.rng_of("power_cut")
    first = [host for host in wanted if host.up]
    if first:
        await cut_at(apart.choice(first), apart.choice(AIMS))
    # It fails everywhere within moments, in an operation of the disk where there is one.
    await asyncio.gather(
        *[_cut_in_operation(host, field.rng.randrange(3), False, 0.02) for host in wanted]
    )
    for host in everybody:
        cluster.power_off(host)
    await asyncio.sleep(field.rng.uniform(0.5, 5.0))
    field.say("the power is back")
    for host in everybody:
        cluster.power_on(host)
    # One may have been lost for good meanwhile.
    await asyncio.gather(*[cluster.start_node(host) for host in wanted if host.wanted])
    await asyncio.sleep(field.rng.uniform(2.0, 5.0))


async def reset_connections(field: Field) -> None:
    """Some connections break."""
    connections = list(field.cluster.network.connections)
    count = min(len(connections), field.rng.randint(1, 5))
    field.say(f"{count} of {len(connections)} connections break")
    for connection in field.rng.sample(connections, count):
        field.cluster.network.reset(connection)


async def slow_network(field: Field) -> None:
    """All that one host sends or gets takes longer, by a random time each."""
    cluster, rng = field.cluster, field.rng
    host = rng.choice([*cluster.nodes, *cluster.clients, *cluster.spares, cluster.meta_host])
    extra = rng.choice((0.002, 0.02, 0.2))
    field.say(f"packets of {host.name} take up to {extra * 1000:g} ms more")
    ways, _ = ways_of(host.address, _others(cluster, host))
    for way in ways:
        cluster.network.slow(*way, extra)
    await asyncio.sleep(rng.uniform(1.0, 8.0))
    for way in ways:
        cluster.network.slow(*way, 0)


async def change_members(field: Field) -> None:
    """A node joins, or one leaves the ring in order, while clients are at work."""
    async with field.changing():
        cluster, rng = field.cluster, field.rng
        ring = await cluster.ring()
        members = [h for h in cluster.members_up if h.node_id in ring.members]
        if members and len(ring.members) > cluster.shape.replication + 1 and rng.random() < 0.5:
            host = rng.choice(members)
            field.say(f"{host.name} is taken out of the ring")
            cluster.may_leave.add(host.node_id)
            await change_ring(cluster.meta, _without(host.node_id), rng)
        else:
            host = cluster.add_host()
            field.say(f"{host.name} joins")
            await cluster.start_node(host)
        await asyncio.sleep(rng.uniform(0.0, 10.0))


async def change_replication(field: Field) -> None:
    """Another number of copies is wanted."""
    async with field.changing():
        cluster, rng = field.cluster, field.rng
        ring = await cluster.ring()
        # Never fewer than the cluster was made with: the faults count on them.
        least = cluster.shape.replication
        wanted = rng.choice([n for n in (least, least + 1) if n != ring.replication])
        await _want_copies(field, wanted)
        await asyncio.sleep(rng.uniform(1.0, 10.0))


async def _want_copies(field: Field, wanted: int) -> None:
    field.say(f"{wanted} copies are wanted")
    await change_ring(
        field.cluster.meta,
        lambda r: r.with_replication(wanted) if r.replication != wanted else None,
        field.rng,
    )


async def kill_actor(field: Field) -> None:
    """An actor anywhere dies; its supervisor sees to the rest."""
    cluster, rng = field.cluster, field.rng
    hosts = [h for h in [*cluster.nodes, *cluster.clients, *cluster.spares] if h.up]
    if not hosts:
        return
    host = rng.choice(hosts)
    cells = host.tree.system.cells
    names = [n for n, c in cells.items() if c.state is State.RUNNING and n not in ("node",)]
    if names and host.process is not None:
        name = rng.choice(names)
        field.say(f"actor {name} of {host.name} dies")
        host.process.context.copy().run(cells[name].kill)
    await asyncio.sleep(0.3)


async def collect_now(field: Field) -> None:
    """All collectors are told to look for garbage now."""
    for host in field.cluster.members_up:
        field.cluster.run_on(host, _start_pass(host))
    await asyncio.sleep(0.1)


async def _start_pass(host: Host) -> None:
    host.tree.system.actor("collector").start_pass.tell()


Fault = Callable[[Field], Coroutine[Any, Any, None]]

FAULTS: dict[str, Fault] = {
    "crash_node": crash_node,
    "lose_node": lose_node,
    "abandon_node": abandon_node,
    "lose_journal": lose_journal,
    "restart_all": restart_all,
    "cut_client": cut_client,
    "cut_peers": cut_peers,
    "isolate_node": isolate_node,
    "late_node": late_node,
    "cut_one_way": cut_one_way,
    "freeze_client": freeze_client,
    "freeze_node": freeze_node,
    "crash_client": crash_client,
    "crash_at_flush": crash_at_flush,
    "crash_beside_commit": crash_beside_commit,
    "hand_over_slowly": hand_over_slowly,
    "tell_half": tell_half,
    "crash_client_and_member": crash_client_and_member,
    "second_client": second_client,
    "metadata_out": metadata_out,
    "metadata_away": metadata_away,
    "wipe_leases": wipe_leases,
    "rot": rot,
    "disk_errors": disk_errors,
    "disk_full": disk_full,
    "all_full": all_full,
    "slow_disk": slow_disk,
    "power_cut": power_cut,
    "reset_connections": reset_connections,
    "slow_network": slow_network,
    "change_members": change_members,
    "change_replication": change_replication,
    "kill_actor": kill_actor,
    "collect_now": collect_now,
    "take_snapshots": take_snapshots,
    "tear_node": tear_node,
    "hang_syncs": hang_syncs,
    "rot_index": rot_index,
    "metadata_unsure": metadata_unsure,
    "break_after_reading": break_after_reading,
    "read_beside": read_beside,
    "crash_reader": crash_reader,
    "cut_reader": cut_reader,
    "end_lease": end_lease,
    "resize": resize,
    "restore": restore,
    "retire_node": retire_node,
    "reopen": reopen,
    "kill_at_head": kill_at_head,
    "late_requests": late_requests,
}

DAMAGING = {"rot", "rot_index", "disk_errors"}
"""Those that damage what is stored, which nobody finds before it is read: the scrubber must."""

OVERLAPPING = {
    "crash_node",
    "tear_node",
    "cut_peers",
    "cut_one_way",
    "freeze_node",
    "slow_disk",
    "disk_errors",
    "read_beside",
}
"""Those of which one may begin before the last has ended: each takes a node that is not broken, or
a host on which nobody reads."""

COPIES_LOST = {"lose_node", "rot", "rot_index", "disk_errors"}
"""Those after which a copy that was durable may be so no more."""
