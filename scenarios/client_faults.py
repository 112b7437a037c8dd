"""Faults of clients: cut off, frozen, killed, or not the only one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torus_actors.runtime.cell import State
from torus_actors.scenarios.cluster import META_ADDRESS, Cluster
from torus_actors.scenarios.cuts import Cut, ways_of
from torus_actors.scenarios.field import Field

CLOSE_S_MAX = 60.0
"""How long closing is waited for: without the metadata it takes as long as the last commit may."""


async def cut_client(field: Field) -> None:
    """A client is cut off: from the metadata, or from everything; another one takes over."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    cluster, rng = field.cluster, field.rng
    if not host.up or host.process is None:
        return
    field.cluster.expendable.add(host.process.name)
    targets = [META_ADDRESS]
    if rng.random() < 0.5:
        targets += [node.address for node in cluster.nodes]
    ways, how = ways_of(host.address, targets, rng.choice(("", "", "out", "in")))
    field.say(f"{host.name} is cut off from {len(targets)} hosts{how}")
    with Cut(cluster, ways):
        others = [h for h in driver.hosts if h is not host]
        if others and rng.random() < 0.8:
            driver.move(rng.choice(others))
        await asyncio.sleep(rng.choice((1.0, 8.0, 15.0)) * (0.5 + rng.random()))
    field.say(f"{host.name} is back")


async def freeze_client(field: Field) -> None:
    """A client stands still for longer than its lease, another opens its volume, it wakes up."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    process = host.process
    field.cluster.expendable.add(process.name)
    field.say(f"{process.name} is frozen")
    process.pause()
    others = [h for h in driver.hosts if h is not host]
    if others:
        driver.move(field.rng.choice(others))
    await asyncio.sleep(field.cluster.shape.lease_ttl_s * field.rng.uniform(0.2, 4.0))
    if process.alive:
        field.say(f"{process.name} wakes up")
        process.resume()


async def crash_client(field: Field) -> None:
    """A client is killed, and started again there or elsewhere."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    field.cluster.expendable.add(host.process.name)
    field.say(f"{host.process.name} is killed")
    field.cluster.kill(host)
    if field.rng.random() < 0.5:
        driver.move(field.rng.choice(driver.hosts))
    await asyncio.sleep(field.rng.uniform(1.0, 5.0))


async def reopen(field: Field) -> None:
    """A client closes its volume in order, whatever else happens, and it is opened again."""
    rng = field.rng
    driver = rng.choice(field.drivers)
    driver.held = driver.closing = True
    await driver.wait_closed(CLOSE_S_MAX)
    field.say(f"{driver.name} is closed")
    await asyncio.sleep(rng.choice((0.0, 1.0)) * rng.random())
    if rng.random() < 0.5:
        driver.move(rng.choice(driver.hosts))
    driver.held = driver.closing = False


TELLING = (
    "flush asked for",
    "flush acknowledged",
    "flush beside another acknowledged",
    "head recorded",
)
"""Moments at which a crash shows most."""


async def crash_at_flush(field: Field) -> None:
    """A client is killed at a telling moment: a flush, or the commit of a head."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    cluster, rng, process = field.cluster, field.rng, host.process
    moment = rng.choice(TELLING)
    pause = rng.choice((0.0, 0.0, 0.002, 0.01)) * rng.random()
    cluster.expendable.add(process.name)
    await driver.wait_for(moment, 4.0)
    if pause:
        await asyncio.sleep(pause)
    if host.process is process:
        field.say(f"{process.name} is killed {pause * 1000:.1f} ms after: {moment}")
        cluster.kill(host)
    if rng.random() < 0.5:
        driver.move(rng.choice(driver.hosts))
    await asyncio.sleep(rng.uniform(1.0, 5.0))


async def kill_at_head(field: Field) -> None:
    """A volume's actor dies when the metadata has a new head, and has not said so."""
    rng = field.rng_of("kill_at_head")
    driver = rng.choice(field.drivers)
    await driver.wait_for("head recorded", 4.0)
    host = driver.host
    if not host.up or host.process is None:
        return
    cell = host.tree.system.cells.get(f"volume:{driver.name}")
    if cell is not None and cell.state is State.RUNNING:
        field.say(f"actor {cell.name} of {host.name} dies when its head is recorded")
        host.process.context.copy().run(cell.kill)
    await asyncio.sleep(0.3)


async def crash_beside_commit(field: Field) -> None:
    """A client is killed once a flush was acknowledged that came while a head was being recorded.

    What the flush stands for must not be in that head alone.
    """
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    cluster, rng, process = field.cluster, field.rng, host.process
    cluster.expendable.add(process.name)
    await driver.wait_for("flush beside a commit acknowledged", 6.0)
    if host.process is process:
        field.say(f"{process.name} is killed beside a commit")
        cluster.kill(host)
    await asyncio.sleep(rng.uniform(1.0, 5.0))


async def _ensemble(cluster: Cluster, name: str) -> Sequence[str]:
    """Ids of the nodes that the metadata says have a volume's journal."""
    volume = await cluster.meta.volume(name)
    journal, _ = await cluster.meta.journal(volume.id)
    return () if journal is None else journal.ensemble


async def crash_client_and_member(field: Field) -> None:
    """A client dies, and a node with its journal at the same time: the other members must do.

    If another member has lost its journal too, they must wait for the first.
    """
    cluster, rng = field.cluster, field.rng
    driver = rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    process = host.process
    await driver.wait_for(rng.choice(TELLING[1:3]), 4.0)
    ensemble = await _ensemble(cluster, driver.name)
    member = field.take([node for node in cluster.nodes if node.node_id in ensemble])
    if member is None:
        return
    others = [h for h in cluster.members_up if h.node_id in ensemble and h.name not in field.broken]
    may_lose = [h for h in others if await field.may_lose_journal(h)]
    if host.process is not process or not member.up:
        field.whole(member)
        return
    field.say(f"{process.name} is killed, and {member.name}, which has its journal, loses power")
    cluster.expendable.add(process.name)
    cluster.kill(host)
    cluster.power_off(member)
    may_lose = [other for other in may_lose if other.up]
    if may_lose and rng.random() < 0.5:
        other = rng.choice(may_lose)
        field.say(f"{other.name} is killed and loses its journal")
        cluster.kill(other)
        del other.disks[f"/{other.name}/journal"]
        await cluster.start_node(other)
    await asyncio.sleep(rng.uniform(4.0, 12.0))
    cluster.power_on(member)
    await cluster.start_node(member)
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    field.whole(member)


async def hand_over_slowly(field: Field) -> None:
    """A client is replaced while all disks that its journal is on are slow.

    What it has on its way to them is acknowledged to it, or is not found by the next one.
    """
    cluster, rng = field.cluster, field.rng
    driver = rng.choice(field.drivers)
    host = driver.host
    others = [each for each in driver.hosts if each is not host]
    if not host.up or host.process is None or not others:
        return
    ensemble = await _ensemble(cluster, driver.name)
    members = [node for node in cluster.nodes if node.node_id in ensemble]
    factor = rng.choice((20.0, 60.0, 100.0))
    cluster.expendable.add(host.process.name)
    names = ", ".join(member.name for member in members)
    field.say(f"{host.name} loses the metadata; {names}: disks {factor:g} times slower")
    with Cut(cluster, ways_of(host.address, [META_ADDRESS])[0]):
        for member in members:
            member.disk_factor = factor
        driver.move(rng.choice(others))
        await driver.wait_for("read back", 15.0)
        for member in members:
            member.disk_factor = 1.0
        await asyncio.sleep(2.0)


async def tell_half(field: Field) -> None:
    """A record reaches one member of the journal, and its client dies.

    Who opens the volume next reaches some of the members, reads, and dies as well; the one after it
    reaches the others. What the first one read must be what the second one finds.
    """
    cluster, rng = field.cluster, field.rng
    driver = rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.process is None:
        return
    process = host.process
    ensemble = await _ensemble(cluster, driver.name)
    members = [node for node in cluster.nodes if node.node_id in ensemble and node.up]
    if len(members) < 2 or host.process is not process:
        return
    lacking = rng.choice(members)
    cluster.expendable.add(process.name)
    with Cut(cluster, ways_of(host.address, [lacking.address], "out")[0]):
        await driver.wait_for("flush asked for", 4.0)
        await asyncio.sleep(0.01 * rng.random())
        if host.process is process:
            field.say(f"{process.name} is killed when {lacking.name} cannot have its last record")
            cluster.kill(host)
    having = [node for node in members if node is not lacking]
    for hidden in rng.sample([[lacking], having], 2):
        addresses = [node.address for node in hidden]
        ways = [way for each in driver.hosts for way in ways_of(each.address, addresses)[0]]
        names = ", ".join(node.name for node in hidden)
        field.say(f"no client of {driver.name} reaches {names}")
        with Cut(cluster, ways):
            await driver.wait_for("read back", 20.0)
            await asyncio.sleep(rng.choice((0.0, 0.01, 0.3)) * rng.random())
            host = driver.host
            if host.up and host.process is not None:
                field.say(f"{host.process.name} is killed")
                cluster.expendable.add(host.process.name)
                cluster.kill(host)


async def second_client(field: Field) -> None:
    """Another client opens a volume that is in use; it gets it when the first has let go."""
    driver = field.rng.choice(field.drivers)
    others = [h for h in driver.hosts if h is not driver.host]
    if not others:
        return
    first, second = driver.host, field.rng.choice(others)
    if not first.up or first.process is None:
        return
    process = first.process
    field.cluster.expendable.add(process.name)
    field.say(f"{second.name} wants {driver.name}, which {process.name} has")
    driver.move(second)
    await asyncio.sleep(field.rng.uniform(0.5, 5.0))
    how = field.rng.choice(("metadata", "kill", "freeze"))
    field.say(f"{process.name}: {how}")
    if how == "kill":
        field.cluster.kill(first)
        return
    if how == "freeze":
        process.pause()
        await asyncio.sleep(field.rng.uniform(5.0, 15.0))
        process.resume()
        return
    with Cut(field.cluster, ways_of(first.address, [META_ADDRESS])[0]):
        await asyncio.sleep(field.rng.uniform(5.0, 20.0))
