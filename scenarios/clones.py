"""In the end of many runs: a clone of a volume, and the end of the volume.

The clone shares the blocks of the volume, which bear its id and stay as long as the clone is there;
what else the volume and its snapshots had is garbage.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torus_actors.errors import TorusError
from torus_actors.metadata.volumes import Origin
from torus_actors.scenarios.cluster import Cluster, Host
from torus_actors.scenarios.snapshots import READ_S_MAX, Snapshots, read_all
from torus_actors.scenarios.workload import Driver, give_back

SHARE = 0.5
"""Of the runs that end with it."""

CLONED, DELETED = 0.7, 0.8


@dataclass(frozen=True, slots=True)
class Clone:
    """A volume with the content that another one had.

    Attributes:
        content: that of the snapshot to which the other one had gone back, if it had.
    """

    driver: Driver
    name: str
    content: bytes | None


async def part_with(
    cluster: Cluster, drivers: list[Driver], snapshots: Snapshots, rng: random.Random
) -> Clone | None:
    """Perhaps clone a volume that was closed in order, and perhaps delete it."""
    if rng.random() >= SHARE:
        return None
    driver = rng.choice(drivers)
    meta = cluster.meta
    origin = await meta.volume(driver.name)
    clone = None
    if rng.random() < CLONED:
        content = snapshots.restored.get(driver.name)
        clone = Clone(driver, f"{driver.name}-clone", content)
        _, epoch = await meta.lock_status(origin.id)
        head, revision = await meta.head(origin.id)
        if head is not None:
            head = head.handed_to(0, 0)
        made_of = Origin(origin.id, epoch, revision)
        await meta.create_volume(clone.name, origin.size, head=head, origin=made_of)
        cluster.say(f"{clone.name} is made of {driver.name}")
    if rng.random() < DELETED:
        await meta.delete_volume(driver.name)
        cluster.say(f"{driver.name} is deleted")
    return clone


async def look_at(cluster: Cluster, host: Host, clone: Clone) -> None:
    """A clone has what the volume had, though that is gone, and can be written to."""
    if await cluster.start_client(host) is None:
        cluster.fail("the client that is to read a clone did not start")
        return
    data = b"clone" * (cluster.shape.block_size // 5)

    async def look() -> None:
        oracle = clone.driver.oracle
        try:
            content = await read_all(host, clone.name)
        except TorusError as error:
            cluster.fail(f"{clone.name} cannot be read: {error!r}")
            return
        if clone.content is None:
            oracle.check(0, content, oracle.live, clone.name)
        elif content != clone.content:
            cluster.fail(f"{clone.name} is not like the volume that it was made of")
            return
        system = host.tree.system
        await system.actor("volumes").open.remote(clone.name, timeout_s=60.0)
        volume = system.actor(f"volume:{clone.name}")
        await volume.write.remote(0, data, timeout_s=READ_S_MAX)
        await volume.flush.remote(timeout_s=READ_S_MAX)
        await give_back(system, clone.name, READ_S_MAX)

    async def look_again() -> None:
        content = await read_all(host, clone.name)
        if content[: len(data)] != data:
            cluster.fail(f"{clone.name} does not have what was flushed")

    for act in (look, look_again):
        await cluster.finish(host, cluster.run_on(host, act()), READ_S_MAX)
    await cluster.stop(host)
