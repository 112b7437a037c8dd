"""Nodes that are taken out of the ring and switched off for good, in the simulator.

An operator does so once the cluster says that such a node may go, as ``torusctl debug rebalance``
asks it: all rebalancers are settled by the present ring, and the node's collector finds no journal
there that anybody may need. From then on nothing may depend on it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from torus_actors.metadata.ring_changes import change_ring
from torus_actors.scenarios.cluster import Host
from torus_actors.volume.recovery import is_unreplayed

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

MAY_GO_S_MAX = 240.0
"""After that time the cluster must have said so."""

ASK_S_MAX = 20.0


async def retire_node(field: Field) -> None:
    """A node joins, and another one leaves the ring and is switched off when it may be."""
    async with field.changing():
        cluster, rng = field.cluster, field.rng
        ring = await cluster.ring()
        members = [host for host in cluster.members_up if host.node_id in ring.members]
        host = field.take(members)
        if host is None:
            return
        peer = host.node_id
        await cluster.start_node(cluster.add_host())
        field.say(f"{host.name} is taken out of the ring, and is to go")
        cluster.may_leave.add(peer)
        await change_ring(
            cluster.meta, lambda r: r.without_peer(peer) if peer in r.members else None, rng
        )
        if await _may_go(field, host):
            await _look(field, host)
            field.say(f"{host.name} is switched off for good")
        else:
            cluster.fail(f"{host.name} has left the ring, and may not be switched off yet")
        host.wanted = False
        cluster.power_off(host)
        host.disks.clear()
        field.whole(host)
    await asyncio.sleep(rng.uniform(0.0, 3.0))


async def _may_go(field: Field, host: Host) -> bool:
    """Wait until the cluster says that a node may be switched off; whether it did in time."""
    cluster = field.cluster
    end = cluster.loop.time() + MAY_GO_S_MAX
    begun = -1
    while cluster.loop.time() < end:
        await asyncio.sleep(1.0)
        collector = await _status(field, host, "collector")
        begun = collector["begun"] if begun < 0 else begun
        if collector["journals_read"] <= begun:
            continue
        if collector["unreplayed"] or collector["unreplayed_open"]:
            begun = -1
            continue
        ring = await cluster.ring()
        told = [await _status(field, each, "rebalancer") for each in cluster.members_up]
        if all(each["settled"] and each["ring_version"] >= ring.version for each in told):
            return True
    return False


async def _status(field: Field, host: Host, actor: str) -> dict[str, Any]:
    cluster = field.cluster

    async def ask() -> dict[str, Any]:
        status: dict[str, Any] = await host.tree.system.actor(actor).status.remote()
        return status

    found: dict[str, Any] = await cluster.finish(host, cluster.run_on(host, ask()), ASK_S_MAX)
    return found


async def _look(field: Field, host: Host) -> None:
    """Whether all is there without the node."""
    cluster = field.cluster
    if lacking := await field.checker.lacking():
        cluster.fail(f"{host.name} may be switched off, and there lack {lacking[:3]}")
    for driver in field.drivers:
        volume = await cluster.meta.volume(driver.name)
        head, _ = await cluster.meta.head(volume.id)
        journal, _ = await cluster.meta.journal(volume.id)
        needed = journal.ensemble if journal is not None and is_unreplayed(journal, head) else ()
        if host.node_id in needed:
            cluster.fail(f"{host.name} may be switched off, with {driver.name}'s journal")
