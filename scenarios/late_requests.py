"""Requests to the metadata that arrive long after they were made, in the simulator.

Whoever made one had no answer, made it again, and was answered; then gave up what it had made. When
the first copy arrives it must bring nothing back: no lock of a volume that was closed, and no
reader for whom nothing is collected.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from torus_actors.errors import LeaseNotFound
from torus_actors.scenarios.cluster import Host
from torus_actors.scenarios.readers import end_lease_of

if TYPE_CHECKING:
    from torus_actors.scenarios.field import Field

CLOSE_S_MAX = 15.0

COPIES_MAX = 3
"""Requests that are late at a time: others come between those that matter."""


async def late_requests(field: Field) -> None:
    """Some requests arrive when what they would make has been given up."""
    store, rng = field.cluster.served, field.rng
    store.delay_requests = rng.randint(1, COPIES_MAX)
    await rng.choice((_renewal, _reader))(field)
    store.delay_requests = 0
    await asyncio.sleep(rng.choice((0.0, 0.1, 3.0)) * rng.random())
    made = sum(result.succeeded for result in await store.arrive())
    field.say(f"late requests arrive; {made} are still carried out")
    for driver in field.drivers:
        driver.held = driver.closing = False


async def _renewal(field: Field) -> None:
    """A lock that a lease took along is made again, and its volume is closed."""
    rng, driver = field.rng, field.rng.choice(field.drivers)
    if driver.host.up:
        await _end_lease(field, driver.host)
        await asyncio.sleep(rng.uniform(0.5, 2.5))
    driver.held = driver.closing = True
    await driver.wait_closed(CLOSE_S_MAX)


async def _end_lease(field: Field, host: Host) -> None:
    lease = host.tree.system.heirlooms.get("lease")
    if lease:
        field.say(f"the lease of {host.name} ends")
        with contextlib.suppress(LeaseNotFound):
            await field.cluster.store.lease_revoke(lease)


async def _reader(field: Field) -> None:
    """Somebody opens a volume to read it, and leaves."""
    cluster, rng, readers = field.cluster, field.rng, field.readers
    host, driver = rng.choice(cluster.spares), rng.choice(field.drivers)
    until = cluster.loop.time() + rng.uniform(0.5, 3.0)
    reading = cluster.loop.create_task(readers.read(host, driver, None, until))
    if rng.random() < 0.5:
        await asyncio.sleep(rng.uniform(0.1, 2.0))
        await end_lease_of(field, readers.present.get(host.name))
    await reading
