"""The faults of ``faults.py`` on real processes: SIGKILL, SIGSTOP, cut networks, flipped bytes.

`REAL_FAULTS` is the table of those that have a real form; `NOT_REAL` says of the others why they
have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Coroutine
from typing import Any

from torus_actors.errors import TorusError
from torus_actors.scenarios.faults import EVICTED_S_MAX
from torus_actors.scenarios.processes import Unexpected, require
from torus_actors.scenarios.real_cluster import META, RealCluster, RealHost
from torus_actors.scenarios.real_workload import RealDriver
from torus_actors.storage.index import (
    ENTRIES_OFFSET,
    ENTRY_SIZE,
    Layout,
    entry_seed,
    parse_entries,
    parse_header,
)
from torus_actors.storage.mfile_open import DATA_PATH, INDEX_PATH

SETTLED_S_MAX = 120.0
"""A lost node's blocks are copied within this time."""

SETTLED_POLL_S = 1.0


class RealField:
    """What the faults of one scenario share.

    Args:
        cluster: where they strike.
        drivers: of the volumes.
        rng: when, where and how long.
        broken_max: nodes that may be broken at the same time.
    """

    def __init__(
        self, cluster: RealCluster, drivers: list[RealDriver], rng: random.Random, broken_max: int
    ) -> None:
        self.cluster = cluster
        self.drivers = drivers
        self.rng = rng
        self.broken_max = broken_max
        self.broken: set[str] = set()
        self.rotten: RealHost | None = None
        self.changing = asyncio.Lock()

    def say(self, text: str) -> None:
        """A line of progress."""
        self.cluster.say(text)

    def victim(self) -> RealHost | None:
        """A node to break now, or None if enough are broken. Give it back with `whole`."""
        candidates = [h for h in self.cluster.members_up if h.name not in self.broken]
        if not candidates or len(self.broken) >= self.broken_max:
            return None
        host = self.rng.choice(candidates)
        self.broken.add(host.name)
        return host

    def whole(self, host: RealHost) -> None:
        """The node is well again, as far as this fault goes."""
        self.broken.discard(host.name)

    def everybody_but(self, host: RealHost) -> list[str]:
        """Names of all other nodes and clients."""
        return [h.name for h in [*self.cluster.hosts, *self.cluster.client_hosts] if h is not host]

    async def settled(self) -> str:
        """Wait until all copies are there; what lacks if they are not in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLED_S_MAX
        while True:
            lacking = [await self.cluster.audit(d.name, deep=False) for d in self.drivers]
            if not any(lacking):
                return ""
            if loop.time() > end:
                return "; ".join(text for text in lacking if text)
            await asyncio.sleep(SETTLED_POLL_S)


async def crash_node(field: RealField) -> None:
    """A node is killed, and started again."""
    host = field.victim()
    if host is None:
        return
    field.say(f"{host.boot} is killed")
    field.cluster.kill(host)
    await asyncio.sleep(field.rng.choice((0.05, 1.0, 4.0, 12.0)) * (0.5 + field.rng.random()))
    await field.cluster.boot_node(host)
    await asyncio.sleep(field.rng.uniform(0.5, 3.0))
    field.whole(host)


async def lose_journal(field: RealField) -> None:
    """A node dies, and comes back with its blocks, but with an empty journal."""
    host = field.victim()
    if host is None:
        return
    cluster = field.cluster
    field.say(f"{host.boot} is killed and loses its journal")
    cluster.kill(host)
    shutil.rmtree(cluster.data_dir(host.index) / "journal")
    await asyncio.sleep(field.rng.choice((0.05, 1.0, 4.0)) * (0.5 + field.rng.random()))
    await cluster.boot_node(host)
    await asyncio.sleep(field.rng.uniform(0.5, 3.0))
    field.whole(host)


async def lose_node(field: RealField) -> None:
    """A node is gone with its disk: taken out of the ring, and another joins."""
    async with field.changing:
        cluster, rng = field.cluster, field.rng
        if field.broken or await field.settled():
            return
        if len((await cluster.ring())["peers"]) <= cluster.shape.replication:
            return
        host = field.victim()
        if host is None:
            return
        peer = cluster.node_id(host)
        field.say(f"{host.name} burns down")
        cluster.forget(host)
        await asyncio.sleep(rng.uniform(0.0, 8.0))
        field.say(f"{host.name} is taken out of the ring")
        await cluster.tool("torusctl", "peer", "remove", peer)
        await asyncio.sleep(rng.uniform(0.0, 3.0))
        await cluster.boot_node(cluster.add_node())
        if lacking := await field.settled():
            cluster.fail(f"a lost node's blocks were not copied in time: {lacking}")
        field.whole(host)


async def abandon_node(field: RealField) -> None:
    """A node is gone, and nobody does anything about it; it may come back much later."""
    async with field.changing:
        cluster, rng = field.cluster, field.rng
        if field.broken or await field.settled():
            return
        if len((await cluster.ring())["peers"]) <= max(cluster.shape.replication, 2):
            return
        host = field.victim()
        if host is None:
            return
        peer = cluster.node_id(host)
        returns = rng.random() < 0.5
        field.say(f"{host.name} is gone{'' if returns else ' for good'}, and nobody cares")
        host.wanted = False
        cluster.kill(host)
        if not await _in_ring(cluster, peer, False):
            cluster.fail(f"{host.name} was not taken out of the ring in time")
        elif lacking := await field.settled():
            cluster.fail(f"the blocks of a node that is gone were not copied: {lacking}")
        field.say(f"{host.name} has left the ring")
        if returns:
            await cluster.boot_node(host)
            if not await _in_ring(cluster, peer, True):
                cluster.fail(f"{host.name} has not come back into the ring")
        else:
            cluster.forget(host)
            await cluster.boot_node(cluster.add_node())
        field.whole(host)


async def _in_ring(cluster: RealCluster, peer: str, wanted: bool) -> bool:
    """Wait until a node is in the ring, or is not; whether that was in time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + EVICTED_S_MAX + 3 * cluster.shape.remove_after_s
    while True:
        with contextlib.suppress(Unexpected):  # etcd may be away
            ring = await cluster.ring()
            if (peer in {each["id"] for each in ring["peers"]}) == wanted:
                return True
        if loop.time() > end:
            return False
        await asyncio.sleep(SETTLED_POLL_S)


async def restart_all(field: RealField) -> None:
    """Every node is stopped in order and started again, one after the other."""
    for host in list(field.cluster.hosts):
        if not host.up or host.name in field.broken or len(field.broken) >= field.broken_max:
            continue
        field.broken.add(host.name)
        field.say(f"{host.boot} is restarted")
        await field.cluster.stop(host)
        await asyncio.sleep(field.rng.uniform(0.1, 2.0))
        await field.cluster.boot_node(host)
        field.whole(host)
        await asyncio.sleep(field.rng.uniform(0.5, 2.0))


async def cut_client(field: RealField) -> None:
    """A client is cut off: from the metadata, or from everything; another one takes over."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up:
        return
    host.hit.add(host.boot)
    targets = [META]
    if field.rng.random() < 0.5:
        targets += [node.name for node in field.cluster.hosts]
    field.say(f"{host.boot} is cut off from {len(targets)} hosts")
    with _Cut(field, [(host.name, t) for t in targets] + [(t, host.name) for t in targets]):
        others = [h for h in driver.hosts if h is not host]
        if others and field.rng.random() < 0.8:
            driver.move(field.rng.choice(others))
        await asyncio.sleep(field.rng.choice((1.0, 8.0, 15.0)) * (0.5 + field.rng.random()))
    field.say(f"{host.name} is back")


async def cut_peers(field: RealField) -> None:
    """A node cannot reach some others, or nobody."""
    host = field.victim()
    if host is None:
        return
    others = field.everybody_but(host)
    if field.rng.random() < 0.5:
        others = field.rng.sample(others, field.rng.randint(1, len(others)))
    field.say(f"{host.name} is cut off from {', '.join(others)}")
    await _cut_for_a_while(field, host, [*((host.name, o) for o in others), *_back(host, others)])


async def cut_one_way(field: RealField) -> None:
    """What a node sends, or what is sent to it, does not arrive."""
    host = field.victim()
    if host is None:
        return
    others = field.everybody_but(host)
    outward = field.rng.random() < 0.5
    field.say(f"{host.name} can{'not be heard' if outward else ' hear nobody'}")
    ways = [(host.name, o) for o in others] if outward else _back(host, others)
    await _cut_for_a_while(field, host, ways)


def _back(host: RealHost, others: list[str]) -> list[tuple[str, str]]:
    return [(other, host.name) for other in others]


async def _cut_for_a_while(field: RealField, host: RealHost, ways: list[tuple[str, str]]) -> None:
    with _Cut(field, ways):
        await asyncio.sleep(field.rng.choice((0.5, 2.0, 10.0)) * (0.5 + field.rng.random()))
    field.say(f"{host.name} is back")
    await asyncio.sleep(2.0)
    field.whole(host)


class _Cut:
    """Ways that are blocked while it lasts: packets get lost, or there is no route."""

    def __init__(self, field: RealField, ways: list[tuple[str, str]]) -> None:
        require(field.cluster.network is not None, "nothing can be cut on loopback")
        self._network = field.cluster.network
        self._ways = ways
        self._silent = field.rng.random() < 0.7

    def __enter__(self) -> None:
        assert self._network is not None
        for way in self._ways:
            self._network.block(*way, self._silent)

    def __exit__(self, *_: object) -> None:
        assert self._network is not None
        for way in self._ways:
            self._network.unblock(*way, self._silent)


async def freeze_client(field: RealField) -> None:
    """A client stands still for longer than its lease, another opens its volume, it wakes up."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up or host.paused:
        return
    boot = host.boot
    host.hit.add(boot)
    field.say(f"{boot} is frozen")
    field.cluster.pause(host)
    others = [h for h in driver.hosts if h is not host]
    if others:
        driver.move(field.rng.choice(others))
    await asyncio.sleep(field.cluster.lease_s * field.rng.uniform(0.2, 4.0))
    if host.boot == boot:
        field.say(f"{boot} wakes up")
        field.cluster.resume(host)


async def freeze_node(field: RealField) -> None:
    """A node stands still for a while."""
    host = field.victim()
    if host is None:
        return
    field.say(f"{host.boot} is frozen")
    field.cluster.pause(host)
    await asyncio.sleep(field.rng.choice((0.3, 2.0, 10.0)) * (0.5 + field.rng.random()))
    field.say(f"{host.boot} wakes up")
    field.cluster.resume(host)
    await asyncio.sleep(1.0)
    field.whole(host)


async def crash_client(field: RealField) -> None:
    """A client is killed, and started again there or elsewhere."""
    driver = field.rng.choice(field.drivers)
    host = driver.host
    if not host.up:
        return
    host.hit.add(host.boot)
    field.say(f"{host.boot} is killed")
    field.cluster.kill(host)
    if field.rng.random() < 0.5:
        driver.move(field.rng.choice(driver.hosts))
    await asyncio.sleep(field.rng.uniform(1.0, 5.0))


async def second_client(field: RealField) -> None:
    """Another client opens a volume that is in use; it gets it when the first has let go."""
    driver = field.rng.choice(field.drivers)
    first = driver.host
    others = [h for h in driver.hosts if h is not first]
    if not others or not first.up or first.paused:
        return
    boot = first.boot
    first.hit.add(boot)
    second = field.rng.choice(others)
    field.say(f"{second.name} wants {driver.name}, which {boot} has")
    driver.move(second)
    await asyncio.sleep(field.rng.uniform(0.5, 5.0))
    ways = ("kill", "freeze") if field.cluster.network is None else ("kill", "freeze", "cut")
    how = field.rng.choice(ways)
    field.say(f"{boot}: {how}")
    if how == "kill":
        field.cluster.kill(first)
    elif how == "freeze":
        field.cluster.pause(first)
        await asyncio.sleep(field.rng.uniform(5.0, 15.0))
        if first.boot == boot:
            field.cluster.resume(first)
    else:
        with _Cut(field, [(first.name, META), (META, first.name)]):
            await asyncio.sleep(field.rng.uniform(5.0, 20.0))


async def metadata_out(field: RealField) -> None:
    """Etcd cannot be reached for a while."""
    await _without_etcd(field, field.rng.choice((1.0, 5.0, 15.0)) * (0.5 + field.rng.random()))


async def metadata_away(field: RealField) -> None:
    """Etcd cannot be reached for long."""
    await _without_etcd(field, field.rng.uniform(10.0, 40.0))


async def _without_etcd(field: RealField, pause: float) -> None:
    cluster, rng = field.cluster, field.rng
    how = rng.choice(
        ("killed", "frozen") if cluster.network is None else ("killed", "frozen", "cut")
    )
    field.say(f"etcd is {how} for {pause:.1f} s")
    if how == "killed":
        cluster.etcd.kill()
        await asyncio.sleep(pause)
        await cluster.start_etcd()
    elif how == "frozen":
        cluster.etcd.pause()
        await asyncio.sleep(pause)
        cluster.etcd.resume()
    else:
        others = [h.name for h in [*cluster.hosts, *cluster.client_hosts]]
        with _Cut(field, [(META, o) for o in others] + [(o, META) for o in others]):
            await asyncio.sleep(pause)
    field.say("etcd is back")
    await asyncio.sleep(2.0)


async def wipe_leases(field: RealField) -> None:
    """All leases are gone at once, as after an etcd that lost its lease timers."""
    store = field.cluster.meta.store
    try:
        items, _ = await store.range("")
        leases = sorted({item.lease for item in items if item.lease})
        field.say(f"{len(leases)} leases end at once")
        for lease in leases:
            await store.lease_revoke(lease)
    except TorusError as error:
        field.say(f"the leases could not be ended: {error}")
    await asyncio.sleep(1.0)


async def rot(field: RealField) -> None:
    """A byte of a stored block changes, always on the same node: one copy at most is bad."""
    if field.rotten is None:
        field.rotten = field.rng.choice(field.cluster.hosts)
    flip_byte(field.cluster, field.rotten, field.rng)
    await asyncio.sleep(0)


def flip_byte(cluster: RealCluster, host: RealHost, rng: random.Random) -> bool:
    """Change a byte of a block in a node's data file; False if it has stored none yet."""
    folder = cluster.data_dir(host.index) / "blocks"
    index = (folder / INDEX_PATH).read_bytes()
    header = parse_header(index[:ENTRIES_OFFSET], INDEX_PATH)
    entries = memoryview(index)[ENTRIES_OFFSET : ENTRIES_OFFSET + header.slots * ENTRY_SIZE]
    seed = entry_seed(header.store_id)
    stored = [
        (slot, length)
        for slot, _, _, length, _ in parse_entries(entries, 0, header.block_size, seed)
        if length
    ]
    if not stored:
        return False
    slot, length = rng.choice(stored)
    layout = Layout(header.block_size)
    at = layout.slot_offset(slot) + layout.sums_room + rng.randrange(length)
    file = os.open(folder / DATA_PATH, os.O_RDWR)
    try:
        before = os.pread(file, 1, at)[0]
        os.pwrite(file, bytes([before ^ (1 << rng.randrange(8))]), at)
    finally:
        os.close(file)
    cluster.say(f"a byte of the block in slot {slot} rots on {host.name}")
    return True


async def change_members(field: RealField) -> None:
    """A node joins, or one leaves the ring in order, while clients are at work."""
    async with field.changing:
        cluster, rng = field.cluster, field.rng
        try:
            ring = {peer["id"] for peer in (await cluster.ring())["peers"]}
            members = [h for h in cluster.members_up if cluster.node_id(h) in ring]
            if members and len(ring) > cluster.shape.replication + 1 and rng.random() < 0.5:
                host = rng.choice(members)
                await cluster.tool("torusctl", "peer", "remove", cluster.node_id(host))
                field.say(f"{host.name} was taken out of the ring")
            else:
                host = cluster.add_node()
                field.say(f"{host.name} joins")
                await cluster.boot_node(host)
        except Unexpected as error:
            field.say(f"the ring was not changed: {error}")
        await asyncio.sleep(rng.uniform(0.0, 10.0))


async def change_replication(field: RealField) -> None:
    """Another number of copies is wanted."""
    async with field.changing:
        cluster, rng = field.cluster, field.rng
        try:
            now = int((await cluster.ring())["replication"])
            # Never fewer than the cluster was made with: the faults count on them.
            least = cluster.shape.replication
            wanted = rng.choice([n for n in (least, least + 1) if n != now])
            await cluster.tool("torusctl", "ring", "set-replication", str(wanted))
            field.say(f"{wanted} copies are wanted")
        except Unexpected as error:
            field.say(f"the replication was not changed: {error}")
        await asyncio.sleep(rng.uniform(1.0, 10.0))


async def kill_actor(field: RealField) -> None:
    """An actor anywhere dies; its supervisor sees to the rest."""
    cluster, rng = field.cluster, field.rng
    hosts = [h for h in [*cluster.hosts, *cluster.client_hosts] if h.up and not h.paused]
    if not hosts:
        return
    host = rng.choice(hosts)
    target = f"@{cluster.listen_of(host)}"
    try:
        tree = json.loads(await cluster.tool("torusctl", "tree", target, "--json"))
        names = sorted(_names(tree) - {"node"})
        if names:
            name = rng.choice(names)
            field.say(f"actor {name} of {host.boot} dies")
            await cluster.tool("torusctl", "debug", "kill", target, name)
    except Unexpected as error:
        # The one that is asked may be the one that died last.
        field.say(f"no actor was killed: {error}")


def _names(tree: Any) -> set[str]:
    """Names of all running actors in what ``torusctl tree`` says."""
    found = set()
    if isinstance(tree, dict):
        if tree.get("state") == "running" and "restarts" in tree:
            found.add(str(tree["name"]))
        tree = list(tree.values())
    if isinstance(tree, list):
        for each in tree:
            found |= _names(each)
    return found


RealFault = Callable[[RealField], Coroutine[Any, Any, None]]

REAL_FAULTS: dict[str, RealFault] = {
    "crash_node": crash_node,
    "lose_node": lose_node,
    "abandon_node": abandon_node,
    "restart_all": restart_all,
    "cut_client": cut_client,
    "cut_peers": cut_peers,
    "cut_one_way": cut_one_way,
    "freeze_client": freeze_client,
    "freeze_node": freeze_node,
    "crash_client": crash_client,
    "crash_at_flush": crash_client,  # at any moment: none is known here
    "crash_beside_commit": crash_client,
    "lose_journal": lose_journal,
    "second_client": second_client,
    "metadata_out": metadata_out,
    "metadata_away": metadata_away,
    "wipe_leases": wipe_leases,
    "rot": rot,
    "change_members": change_members,
    "change_replication": change_replication,
    "kill_actor": kill_actor,
}

CUTTING = {"cut_client", "cut_peers", "cut_one_way"}
"""Those that need hosts with addresses of their own."""

CUTTING_IF_POSSIBLE = {"metadata_out", "metadata_away", "second_client"}
"""Those that do more where there are such hosts."""

NOT_REAL = {
    "power_cut": "what was not synced survives a kill, and no power is switched off here",
    "disk_errors": "a real disk does not fail on demand",
    "slow_disk": "a real disk is not slow on demand",
    "hang_syncs": "nor does it hang",
    "hand_over_slowly": "a real disk is not slow on demand",
    "all_full": "a node takes its room when it is made, so that no write finds none",
    "disk_full": "a node takes its room when it is made, so that no write finds none",
    "reset_connections": "nothing here breaks single connections",
    "slow_network": "not every kernel can delay packets (netem)",
    "take_snapshots": "what they hold is compared inside the simulator only",
    "read_beside": "what a reader may see is known inside the simulator only",
    "crash_reader": "nobody reads without the lock here",
    "cut_reader": "nobody reads without the lock here",
    "end_lease": "nobody reads without the lock here",
    "resize": "what may be behind a cut is known inside the simulator only",
    "retire_node": "what a disk has that is thrown away is looked at inside the simulator only",
    "restore": "what snapshots hold is compared inside the simulator only",
    "kill_at_head": "when a head is recorded is known inside the simulator only",
    "reopen": "a client that leaves ends no session there at a moment that is known",
    "collect_now": "there is no command that starts a collection",
    "crash_client_and_member": "which nodes have a volume's journal is not known here",
    "tell_half": "which nodes have a volume's journal is not known here",
    "late_node": "a cut here is between a host and the others, not with the metadata alone",
    "isolate_node": "a cut here is between a host and the others, the metadata with them",
    "tear_node": "no power is switched off here",
    "rot_index": "only on the simulated disk is it known what a byte of an index stands for",
    "metadata_unsure": "etcd answers whatever reaches it",
    "late_requests": "etcd answers whatever reaches it",
    "break_after_reading": "nothing here breaks single connections",
}
"""Faults without a real form, and why."""
