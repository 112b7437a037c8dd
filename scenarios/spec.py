"""Scenarios as data: the shape of the cluster, what clients do, what goes wrong, what must hold.

Ranges are ``(least, most)``; each run draws from them by its seed. To add a scenario, add an entry
to `SCENARIOS`; to add a fault, write it in ``faults.py``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from torus_actors.actors.evictor import REMOVE_AFTER_S
from torus_actors.scenarios.cluster import Shape
from torus_actors.scenarios.workload import Workload

Range = tuple[float, float]

OP_S_MAX = 5.0
"""Three seconds for a peer that says nothing any more, as it is promised, and some for the rest."""

ROOM_S_MAX = 60.0
"""Where an operation may wait until the collector has made room, which takes two passes."""

OUTAGE_S_MAX = 120.0
"""Where more than R-1 nodes may be away, or one and the metadata, which a session needs to find a
lost member of its journal another: an operation may wait until they are back."""

BROKEN_S_MAX = 10.0
"""Where connections break as often as every half second, and to make one and be answered over it
takes three ways there and back, of up to 0.4 s each; or where a peer dies while another one is as
slow as that, so that a commit, after its wait for the first, makes many such ways."""

KNOBS: dict[str, Any] = {
    "torus_actors.actors.block_store.INODE_ROOM_MIN": 32 << 20,
    "torus_actors.volume.session.COMMIT_AGE_S_MAX": 30.0,
}
"""Constants that are set for every run: what makes a cluster small enough to be simulated, and
large enough for the load of it; and its days short enough."""


SMALL_JOURNALS: dict[str, Any] = {
    "torus_actors.storage.journal_space.SEGMENT_BYTES": 128 << 10,
    "torus_actors.storage.journal_space.JOURNAL_BYTES_MAX": 768 << 10,
    "torus_actors.volume.change_log.RECORD_BYTES": 8 << 10,
}
"""Journals whose segments are full after some flushes: they are reused, and what is still needed in
them is moved."""

DRAWN_APART = {"tear_node", "rot_index", "metadata_unsure", "break_after_reading", "hang_syncs"}
"""Faults that were added to scenarios later: how often they strike is drawn by generators of their
own."""


MANY_BROKEN = {"power_cut", "disk_full", "all_full", "crash_client_and_member", "lose_journal"}
"""Faults that hit more nodes than there are copies less one, or leave no room on them."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of trouble.

    Attributes:
        name: for the command line.
        why: which promise it is about.
        faults: by name, the mean seconds between two of a kind.
        nodes, replication, volumes, clients, spares: how many.
        volume_bytes, store_bytes: sizes.
        write_cache_bytes: one of these.
        lease_ttl_s: of nodes and clients.
        duration_s: how long faults strike; virtual.
        calm_s: before the first fault.
        workload: what is done to each volume.
        errors_allowed: whether clients that no fault hit may see a session end; and an operation
            fail, where more is broken than that copies are left: see ``blocks_may_lack``.
        op_s_max: the liveness bound: how long an operation of a client that no fault hit may take.
        broken_max: nodes broken at a time; None is one fewer than there are copies.
        one_victim: nodes break one at a time, and always the same one.
        full_copies: whether each new head finds all copies of what it leads to on the disks.
        remove_after_s: after which nodes take one that is gone out of the ring.
        knobs: further constants to set, by dotted name.
        small_journals: share of the runs with `SMALL_JOURNALS`.
        direct_writes: and of those whose nodes write small records without a thread, as on Linux.
    """

    name: str
    why: str
    faults: dict[str, Range] = field(default_factory=dict)
    nodes: Range = (3, 5)
    replication: Range = (2, 2)
    volumes: Range = (1, 2)
    clients: Range = (1, 1)
    spares: Range = (0, 0)
    volume_bytes: Range = (256 << 10, 2 << 20)
    store_bytes: Range = (160 << 20, 160 << 20)
    write_cache_bytes: tuple[int, ...] = (64 << 10, 256 << 10, 1 << 20)
    lease_ttl_s: int = 6
    duration_s: Range = (15, 30)
    calm_s: float = 1.0
    workload: Workload = field(default_factory=Workload)
    errors_allowed: bool = False
    op_s_max: float = OP_S_MAX
    broken_max: int | None = None
    one_victim: bool = False
    full_copies: bool = False
    remove_after_s: Range = (REMOVE_AFTER_S, REMOVE_AFTER_S)
    knobs: dict[str, Any] = field(default_factory=dict)
    small_journals: float = 0.0
    direct_writes: float = 0.0

    @property
    def blocks_may_lack(self) -> bool:
        """Whether there may be times when a block, or room for one, is nowhere to be had."""
        return self.errors_allowed and (
            self.broken_max is not None or bool(MANY_BROKEN & set(self.faults))
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a seed made of a scenario.

    Attributes:
        first_share: the first fault of each kind comes after this share of the pause that was drawn
            for it: in a run that is cut short, as many kinds strike as in a whole one.
    """

    shape: Shape
    duration_s: float
    faults: dict[str, float]
    workload: Workload
    broken_max: int
    knobs: dict[str, Any] = field(default_factory=dict)
    first_share: float = 1.0

    def describe(self) -> str:
        """In a few lines, for the start of a report."""
        shape, load = self.shape, self.workload
        sizes = ", ".join(f"{size >> 10} KiB" for size in shape.volume_bytes)
        lines = [
            f"{shape.nodes} nodes of {shape.store_bytes >> 10} KiB, {shape.replication} copies, "
            f"blocks of {shape.block_size >> 10} KiB, {shape.clients} client hosts, "
            f"{shape.spares} spare ones, volumes of {sizes}",
            f"{load.workers} workers a volume, a pause of {load.pause_s * 1000:.0f} ms, caches "
            f"{shape.write_cache_bytes >> 10}/{shape.read_cache_bytes >> 10} KiB, "
            f"{shape.miss_percent} % cold reads, {self.duration_s:.0f} s of faults",
        ]
        if SMALL_JOURNALS.items() <= self.knobs.items():
            lines.append("journals of a few small segments")
        if shape.direct_writes:
            lines.append("small records are written without a thread")
        if self.faults:
            kinds = ", ".join(f"{kind} every {s:.1f} s" for kind, s in self.faults.items())
            lines.append(f"faults (at most {self.broken_max} nodes broken at once): {kinds}")
        return "\n".join(lines)


def _own_rng(scenario: Scenario, seed: int, what: str) -> random.Random:
    """For what was added later: a generator of its own, so that old seeds stay what they were."""
    return random.Random(f"{seed}/{scenario.name}/{what}")


def draw(scenario: Scenario, seed: int) -> Drawn:
    """What the seed makes of the scenario."""
    rng = random.Random(f"{seed}/{scenario.name}/draw")

    def count(bounds: Range) -> int:
        return rng.randint(int(bounds[0]), int(bounds[1]))

    replication = count(scenario.replication)
    block_size = rng.choice((8 << 10, 16 << 10, 32 << 10))
    volumes = []
    for _ in range(count(scenario.volumes)):
        size = rng.uniform(*scenario.volume_bytes)
        whole = int(size) // block_size * block_size
        # Not every volume ends with a whole block.
        volumes.append(whole + rng.choice((0, 0, 512, 4096 + 512)))
    shape = Shape(
        nodes=max(count(scenario.nodes), replication + 1),
        clients=count(scenario.clients),
        spares=_own_rng(scenario, seed, "spares").randint(*map(int, scenario.spares)),
        replication=replication,
        block_size=block_size,
        store_bytes=count(scenario.store_bytes),
        volume_bytes=tuple(volumes),
        write_cache_bytes=rng.choice(scenario.write_cache_bytes),
        read_cache_bytes=rng.choice((0, 64 << 10, 1 << 20)),
        miss_percent=rng.choice((0, 20, 80)),
        remove_after_s=_own_rng(scenario, seed, "remove").uniform(*scenario.remove_after_s),
        lease_ttl_s=scenario.lease_ttl_s,
        direct_writes=_own_rng(scenario, seed, "direct").random() < scenario.direct_writes,
    )
    load = scenario.workload
    workload = Workload(
        workers=rng.randint(1, 2 * load.workers),
        write=load.write * rng.uniform(0.5, 2.0),
        read=load.read * rng.uniform(0.5, 2.0),
        trim=load.trim * rng.uniform(0.0, 2.0),
        flush=load.flush * rng.uniform(0.2, 2.0),
        pause_s=load.pause_s * rng.choice((0.2, 1.0, 3.0)),
        whole_blocks=rng.choice((0.0, load.whole_blocks, 0.8)),
        bytes_max=load.bytes_max,
        hot_share=load.hot_share,
        span=load.span,
        fast=load.fast,
        requests=load.requests,
    )
    faults = {
        kind: (_own_rng(scenario, seed, kind) if kind in DRAWN_APART else rng).uniform(*bounds)
        for kind, bounds in scenario.faults.items()
    }
    broken_max = replication - 1 if scenario.broken_max is None else scenario.broken_max
    knobs = dict(scenario.knobs)
    if _own_rng(scenario, seed, "journals").random() < scenario.small_journals:
        knobs |= SMALL_JOURNALS
    duration_s = rng.uniform(*scenario.duration_s)
    return Drawn(shape, duration_s, faults, workload, broken_max, knobs)


_LIST = (
    Scenario(
        "calm",
        "With nothing wrong, what was written is read, and nothing is left over",
        full_copies=True,
    ),
    Scenario(
        "calm_snapshots",
        "With nothing wrong, each snapshot that is wanted is made",
        {"take_snapshots": (0.5, 1.5)},
        workload=Workload(pause_s=0.1),
    ),
    Scenario(
        "overwrites",
        "Overwriting a volume again and again does not fill the cluster",
        full_copies=True,
        store_bytes=(20 << 20, 24 << 20),
        knobs={"torus_actors.actors.block_store.INODE_ROOM_MIN": 8 << 20},
        volumes=(1, 1),
        volume_bytes=(1 << 20, 2 << 20),
        workload=Workload(whole_blocks=0.8, pause_s=0.05, flush=0.3, fast=5000),
        duration_s=(30, 40),
        op_s_max=ROOM_S_MAX,
    ),
    Scenario(
        "node_crash",
        "A node that is killed or loses power costs no client an error, and no data",
        {"crash_node": (2, 8)},
    ),
    Scenario(
        "one_bad_node",
        "While one node comes and goes, the others take all the copies of what is flushed",
        {"crash_node": (1, 4), "cut_peers": (4, 12), "freeze_node": (5, 15), "disk_full": (4, 12)},
        broken_max=1,
        one_victim=True,
        full_copies=True,
    ),
    Scenario(
        "many_crashes",
        "However many nodes crash, what was flushed is there when they are back",
        {"crash_node": (0.5, 2), "freeze_node": (4, 10), "tear_node": (2, 6)},
        errors_allowed=True,
        broken_max=9,
        op_s_max=OUTAGE_S_MAX,
        small_journals=0.5,
        direct_writes=0.5,
    ),
    Scenario(
        "node_lost",
        "A node that is gone for good is replaced; its blocks are copied from the others",
        {"lose_node": (4, 8)},
        nodes=(4, 5),
        replication=(2, 3),
        duration_s=(25, 40),
    ),
    Scenario(
        "node_abandoned",
        "A node that is gone for long leaves the ring by itself; no outage makes another one leave",
        {
            "abandon_node": (3, 6),
            "metadata_out": (8, 30),
            "freeze_node": (8, 30),
            "cut_peers": (8, 30),
            "wipe_leases": (8, 30),
        },
        nodes=(4, 5),
        replication=(2, 3),
        duration_s=(20, 30),
        remove_after_s=(25, 50),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "rolling_restart",
        "All nodes can be restarted, one after the other, under load",
        {"restart_all": (1, 3)},
    ),
    Scenario(
        "partition_client",
        "A client that is cut off is replaced by another, and can do no harm when it is back",
        {"cut_client": (3, 8)},
        clients=(2, 3),
        errors_allowed=True,
        duration_s=(25, 40),
    ),
    Scenario(
        "partition_peer",
        "A node that cannot be reached is worked around",
        {"cut_peers": (2, 8)},
    ),
    Scenario(
        "partition_one_way",
        "So is one that is only half reachable",
        {"cut_one_way": (2, 8)},
    ),
    Scenario(
        "zombie_client",
        "A client that sleeps through its lease and wakes up writes nothing any more",
        {"freeze_client": (4, 10), "freeze_node": (10, 30)},
        clients=(2, 3),
        errors_allowed=True,
        duration_s=(30, 50),
    ),
    Scenario(
        "metadata_outage",
        "Without the metadata, I/O on attached volumes goes on",
        {"metadata_out": (2, 6), "metadata_unsure": (1, 4)},
        duration_s=(25, 40),
        full_copies=True,
    ),
    Scenario(
        "long_outage",
        "However long the metadata is away: flushes go on, and the next client finds all of them",
        {"metadata_away": (2, 6), "crash_client": (5, 12), "crash_node": (8, 30)},
        clients=(1, 2),
        workload=Workload(flush=3.0),
        errors_allowed=True,
        duration_s=(40, 60),
        knobs={
            "torus_actors.volume.journal.COMMIT_BYTES": 64 << 10,
        },
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "lease_wiped",
        "Leases that end unasked for are made again",
        {"wipe_leases": (2, 6), "metadata_unsure": (1, 4)},
        full_copies=True,
    ),
    Scenario(
        "disk_full",
        "A full disk refuses writes in time, and loses nothing",
        {"disk_full": (2, 6), "collect_now": (2, 5)},
        store_bytes=(10 << 20, 12 << 20),
        volumes=(2, 3),
        volume_bytes=(1 << 20, 2 << 20),
        errors_allowed=True,
        knobs={"torus_actors.actors.block_store.INODE_ROOM_MIN": 4 << 20},
        op_s_max=ROOM_S_MAX,
        full_copies=True,
    ),
    Scenario(
        "bit_rot",
        "A copy that rots is never given to a client, and is repaired from another",
        {"rot": (0.1, 0.5), "crash_client": (5, 15), "rot_index": (3, 10)},
        clients=(1, 2),
    ),
    Scenario(
        "disk_errors",
        "A disk that fails now and then costs no client an error",
        {"disk_errors": (1, 4)},
        direct_writes=0.5,
    ),
    Scenario(
        "slow_disk",
        "A disk that is slow or hangs does not make the cluster slow for long, and breaks nothing",
        {"slow_disk": (2, 5), "hang_syncs": (4, 15)},
        direct_writes=0.5,
        op_s_max=20.0,
        full_copies=True,
    ),
    Scenario(
        "torn_write",
        "When all power fails at once, what was flushed is there afterwards",
        {"power_cut": (4, 8)},
        small_journals=0.5,
        direct_writes=0.5,
        errors_allowed=True,
    ),
    Scenario(
        "ring_change",
        "Nodes join and leave under load",
        {"change_members": (3, 8)},
        duration_s=(25, 40),
        nodes=(3, 4),
    ),
    Scenario(
        "replication_change",
        "The number of copies changes under load",
        {"change_replication": (3, 8)},
        nodes=(4, 5),
    ),
    Scenario(
        "two_clients",
        "Of two clients that want one volume only one has it, and the other sees all it flushed",
        {"second_client": (3, 8)},
        clients=(2, 3),
        errors_allowed=True,
        duration_s=(30, 50),
        full_copies=True,
    ),
    Scenario(
        "handover",
        "What a client that is cut off gets acknowledged is what the next one finds",
        {"cut_client": (2, 5), "slow_network": (1, 4), "metadata_unsure": (1, 4)},
        clients=(2, 3),
        errors_allowed=True,
        lease_ttl_s=2,
        workload=Workload(flush=6.0, whole_blocks=0.1, pause_s=0.05),
        duration_s=(25, 40),
    ),
    Scenario(
        "slow_handover",
        "So is what was on its way to slow disks when the next one came",
        {"hand_over_slowly": (1, 3)},
        clients=(2, 3),
        errors_allowed=True,
        lease_ttl_s=2,
        workload=Workload(flush=6.0, whole_blocks=0.1, pause_s=0.05),
        duration_s=(25, 40),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "client_crash",
        "A client that is killed has lost nothing that it flushed",
        {"crash_client": (1.5, 4), "crash_at_flush": (3, 8)},
        clients=(1, 2),
        lease_ttl_s=2,
        workload=Workload(whole_blocks=0.5, hot_share=0.8),
        errors_allowed=True,
        duration_s=(25, 40),
        full_copies=True,
    ),
    Scenario(
        "journal_replay",
        "What the journal says is not forgotten before a head says it, and is not said twice",
        {
            "crash_at_flush": (1, 4),
            "crash_node": (4, 12),
            "metadata_out": (6, 20),
            "slow_network": (2, 8),
        },
        clients=(1, 2),
        write_cache_bytes=(32 << 10, 64 << 10, 256 << 10),
        lease_ttl_s=2,
        workload=Workload(
            flush=3.0, trim=0.6, whole_blocks=0.2, pause_s=0.1, hot_share=0.8, fast=5000
        ),
        errors_allowed=True,
        duration_s=(25, 40),
        op_s_max=OUTAGE_S_MAX,
        knobs={
            "torus_actors.volume.change_log.RECORD_BYTES": 8 << 10,
            "torus_actors.volume.flushing.SPARSE_BYTES_MIN": 8 << 10,
            "torus_actors.volume.session.COMMIT_AGE_S": 2.0,
            "torus_actors.volume.session.COMMIT_AGE_S_MAX": 2.0,
        },
    ),
    Scenario(
        "half_told",
        "What nobody acknowledged is there for good once somebody has read it",
        {"tell_half": (0.5, 2), "crash_client": (8, 20)},
        clients=(1, 3),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, whole_blocks=0.2, pause_s=0.05, hot_share=0.8),
        errors_allowed=True,
        duration_s=(25, 40),
    ),
    Scenario(
        "foreseen_flush",
        "A flush waits for its record, also for one that left before anybody asked for it",
        {"crash_at_flush": (0.5, 2), "crash_node": (6, 20), "slow_network": (1, 4)},
        clients=(1, 2),
        lease_ttl_s=2,
        workload=Workload(
            workers=1,
            write=5.0,
            read=0.3,
            trim=0.1,
            flush=6.0,
            pause_s=0.05,
            whole_blocks=0.1,
            bytes_max=4 << 10,
            hot_share=0.8,
            fast=5000,
        ),
        errors_allowed=True,
        duration_s=(20, 35),
        op_s_max=BROKEN_S_MAX,
        knobs={"torus_actors.volume.flushing.FORESEE_AFTER": 0},
        direct_writes=0.5,
    ),
    Scenario(
        "flush_beside_commit",
        "A flush beside a commit waits for all that it stands for, wherever that is told",
        {
            "crash_at_flush": (0.5, 2),
            "crash_beside_commit": (0.5, 2),
            "crash_node": (6, 20),
            "metadata_out": (4, 12),
            "slow_network": (1, 4),
        },
        clients=(1, 2),
        lease_ttl_s=2,
        workload=Workload(
            write=4.0,
            read=1.0,
            trim=1.5,
            flush=3.0,
            pause_s=0.05,
            whole_blocks=0.4,
            hot_share=0.8,
            fast=1000,
        ),
        errors_allowed=True,
        duration_s=(15, 25),
        op_s_max=OUTAGE_S_MAX,
        knobs={
            "torus_actors.volume.file.CLEAR_RANGE_MIN": 1,
            "torus_actors.volume.session.IDLE_CHECK_S": 0.1,
            "torus_actors.volume.session.COMMIT_AGE_S": 0.2,
            "torus_actors.volume.session.COMMIT_AGE_S_MAX": 0.3,
        },
    ),
    Scenario(
        "journal_members",
        "The journal is whole as long as one of its members is",
        {"crash_client_and_member": (1, 3), "crash_node": (3, 10), "lose_journal": (2, 6)},
        clients=(1, 2),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, whole_blocks=0.1),
        errors_allowed=True,
        duration_s=(25, 40),
        # Two nodes may be away at once, if only for as long as one takes to start.
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "crashes_everywhere",
        "However many nodes crash, and clients too, what was flushed is there",
        {"crash_node": (0.5, 3), "crash_at_flush": (3, 8), "tear_node": (2, 6)},
        clients=(1, 2),
        lease_ttl_s=2,
        workload=Workload(flush=2.0),
        small_journals=0.7,
        direct_writes=0.5,
        errors_allowed=True,
        broken_max=9,
        duration_s=(25, 40),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "isolated_node",
        "A node that reaches the metadata and nothing else deletes nothing that is needed",
        {"isolate_node": (2, 6), "collect_now": (2, 5)},
        workload=Workload(pause_s=0.6),
        duration_s=(90, 110),
    ),
    Scenario(
        "late_ring",
        "A node that has not heard that there are to be more copies does not drop its own",
        {"late_node": (2, 6)},
        workload=Workload(pause_s=1.2),
        duration_s=(60, 80),
    ),
    Scenario(
        "head_change_during_collection",
        "The collector deletes nothing that a head leads to, however fast heads change",
        {"collect_now": (0.5, 2), "crash_client": (10, 20)},
        clients=(1, 2),
        workload=Workload(flush=3.0, hot_share=0.8),
        errors_allowed=True,
        duration_s=(30, 60),
        full_copies=True,
    ),
    Scenario(
        "snapshots",
        "A snapshot is what the volume was in one moment, stays so, and takes no room once deleted",
        {
            "take_snapshots": (0.5, 2.5),
            "collect_now": (2, 6),
            "crash_client": (8, 25),
            "crash_node": (6, 20),
            "kill_actor": (2, 10),
            "metadata_out": (15, 40),
            "metadata_unsure": (2, 6),
        },
        clients=(1, 2),
        volume_bytes=(256 << 10, 1 << 20),
        workload=Workload(flush=1.5, pause_s=0.1),
        errors_allowed=True,
        duration_s=(25, 45),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "long_session",
        "What a client wrote and has not flushed for long is not taken for garbage",
        {"collect_now": (2, 6)},
        workload=Workload(flush=0.01, whole_blocks=0.8, trim=0.05),
        duration_s=(40, 60),
        full_copies=True,
    ),
    Scenario(
        "actor_kill",
        "Killing any actor under I/O costs no client an error",
        {"kill_actor": (0.3, 2)},
    ),
    Scenario(
        "bad_network",
        "Slow and breaking connections cost no client an error",
        {"reset_connections": (0.5, 3), "slow_network": (1, 4), "break_after_reading": (0.5, 3)},
        op_s_max=BROKEN_S_MAX,
    ),
    Scenario(
        "readers",
        "Who only reads has the volume or snapshot of one moment, for as long as it likes",
        {
            "read_beside": (1, 4),
            "take_snapshots": (3, 10),
            "collect_now": (2, 5),
            "crash_node": (6, 20),
            "crash_client": (8, 25),
            "crash_reader": (10, 30),
            "cut_reader": (10, 40),
            "end_lease": (4, 12),
            "kill_actor": (4, 15),
            "metadata_out": (20, 60),
        },
        clients=(1, 2),
        spares=(2, 4),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=3,
        workload=Workload(flush=2.0, pause_s=0.1, whole_blocks=0.5),
        errors_allowed=True,
        duration_s=(30, 45),
        op_s_max=OUTAGE_S_MAX,
        knobs={
            "torus_actors.volume.session.COMMIT_AGE_S_MAX": 3.0,
        },
    ),
    Scenario(
        "resizes",
        "What is cut off a volume is gone for good, and nothing else is, whoever dies meanwhile",
        {
            "resize": (0.5, 3),
            "take_snapshots": (1, 4),
            "crash_client": (10, 30),
            "crash_node": (6, 20),
            "metadata_out": (15, 40),
            "slow_network": (4, 15),
            "collect_now": (4, 12),
        },
        clients=(1, 2),
        spares=(1, 1),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, pause_s=0.1, whole_blocks=0.4),
        errors_allowed=True,
        duration_s=(30, 45),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "restores",
        "A volume that went back to a snapshot is what it was then, whatever its client had since",
        {
            "restore": (0.5, 3),
            "take_snapshots": (0.5, 3),
            "crash_client": (10, 30),
            "crash_node": (6, 20),
            "metadata_out": (15, 40),
            "metadata_unsure": (2, 8),
            "slow_network": (4, 15),
            "collect_now": (4, 12),
        },
        clients=(1, 2),
        spares=(1, 1),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, pause_s=0.1, whole_blocks=0.4),
        errors_allowed=True,
        duration_s=(30, 45),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "late_requests",
        "A request that arrives late brings back no lock and no reader, and costs nobody an error",
        {"late_requests": (0.3, 1.5), "collect_now": (3, 8)},
        spares=(1, 2),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=3,
        duration_s=(20, 35),
        op_s_max=BROKEN_S_MAX,
    ),
    Scenario(
        "closings",
        "What was written is there when a volume was closed in order, whatever happened meanwhile",
        {
            "reopen": (0.3, 2),
            "metadata_out": (2, 6),
            "metadata_unsure": (2, 8),
            "crash_node": (6, 20),
            "kill_actor": (3, 12),
            "slow_network": (4, 15),
        },
        clients=(1, 2),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=2,
        workload=Workload(flush=1.0, pause_s=0.1),
        errors_allowed=True,
        duration_s=(25, 40),
        op_s_max=OUTAGE_S_MAX,
    ),
    Scenario(
        "retired",
        "A node that has left the ring can be switched off when it is said so, and is soon",
        {"retire_node": (0.5, 3), "crash_client": (8, 25)},
        clients=(1, 2),
        volume_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, pause_s=0.3),
        errors_allowed=True,
        duration_s=(25, 40),
    ),
    Scenario(
        "crash_when_full",
        "What was flushed is there after a crash of the client, though no room is left to store it",
        {
            "all_full": (1, 4),
            "collect_now": (4, 12),
            "crash_at_flush": (5, 15),
        },
        clients=(1, 2),
        volume_bytes=(256 << 10, 1 << 20),
        write_cache_bytes=(256 << 10, 1 << 20),
        lease_ttl_s=2,
        workload=Workload(flush=3.0, whole_blocks=0.4),
        errors_allowed=True,
        duration_s=(25, 40),
        op_s_max=ROOM_S_MAX,
    ),
    Scenario(
        "requests",
        "Each request is answered once: FUA makes a write durable, and holes are what was trimmed",
        {
            "crash_client": (5, 15),
            "crash_at_flush": (2, 6),
            "crash_node": (6, 20),
            "kill_actor": (1, 5),
            "kill_at_head": (0.5, 3),
            "slow_network": (4, 15),
        },
        clients=(1, 2),
        write_cache_bytes=(32 << 10, 64 << 10, 256 << 10),
        lease_ttl_s=2,
        workload=Workload(
            read=5.0, trim=2.0, pause_s=0.1, whole_blocks=0.5, hot_share=0.8, requests=True
        ),
        errors_allowed=True,
        duration_s=(15, 30),
        op_s_max=BROKEN_S_MAX,
    ),
    Scenario(
        "everything",
        "All of it at once",
        {
            "crash_node": (5, 30),
            "crash_client": (10, 40),
            "cut_client": (10, 40),
            "cut_peers": (5, 30),
            "cut_one_way": (5, 30),
            "freeze_client": (15, 40),
            "freeze_node": (10, 30),
            "metadata_out": (10, 40),
            "wipe_leases": (10, 40),
            "slow_disk": (10, 40),
            "disk_full": (10, 40),
            "change_replication": (10, 40),
            "second_client": (15, 40),
            "power_cut": (20, 60),
            "reset_connections": (2, 20),
            "slow_network": (3, 20),
            "change_members": (10, 40),
            "kill_actor": (3, 20),
            "collect_now": (3, 20),
            "take_snapshots": (5, 20),
            "lose_node": (20, 60),
            "restart_all": (20, 60),
            "rot": (5, 20),
            "disk_errors": (5, 30),
        },
        small_journals=0.3,
        direct_writes=0.4,
        nodes=(3, 5),
        replication=(2, 3),
        clients=(1, 3),
        volumes=(1, 3),
        errors_allowed=True,
        duration_s=(20, 40),
        op_s_max=OUTAGE_S_MAX,
    ),
)

SCENARIOS = {scenario.name: scenario for scenario in _LIST}
