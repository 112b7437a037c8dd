"""What ``torusctl status`` and ``volume check`` make of what nodes say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import virtual
from torus_actors.actors.block_messages import Status
from torus_actors.actors.control import Control
from torus_actors.actors.http import problems_of
from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.cli.connect import unreachable
from torus_actors.cli.report import (
    add_answer,
    check_not_refused,
    garbage_of,
    garbage_row,
    peer_row,
    peer_rows,
    problems,
    rebalance_of,
    state_of,
    usage_of,
)
from torus_actors.errors import ActorNotFound, Again, PeerLost, Unauthenticated
from torus_actors.metadata.cluster import Registrations
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.model import rings
from torus_actors.model.peers import Peer
from torus_actors.model.refs import BlockRef, BlockType
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, SupervisorSpec, expose
from torus_actors.volume.audit import Audit, Auditor, explain

IDS = [f"{i}0000000-0000-4000-8000-000000000000" for i in range(1, 5)]
IDLE = {"running": False, "left": 0, "eta_s": 0.0, "failed": 0, "waiting": 0}


def ring(members: int, replication: int) -> rings.Ring:
    """A ring of the first so many nodes."""
    peers = [Peer(each, 1 << 30, "", f"10.0.0.{each[0]}:1") for each in IDS[:members]]
    return rings.make_ring("ketama", peers, replication=replication)


def answer(node: str, **changes: Any) -> dict[str, Any]:
    """Of a control actor."""
    store = {"block_size": 1024, "total": 10, "used": 1, "level": "ok", "failure": ""}
    return {
        "node": node,
        "version": "1",
        "ring_version": 1,
        "block_store": {"blocks": dict(store), "inodes": dict(store)},
        "rebalancer": {**IDLE},
        **changes,
    }


def row(index: int, at: rings.Ring, said: Any = None, registered: bool = True) -> dict[str, Any]:
    """A node's row, as ``cluster_report`` builds it."""
    peer_id = IDS[index]
    member = {peer.peer_id: peer for peer in at.peers}.get(peer_id)
    info = PeerInfo(peer_id, f"10.0.0.{index + 1}:1") if registered else None
    made = peer_row(peer_id, member, info)
    add_answer(made, answer(peer_id) if said is None else said)
    return made


def test_a_whole_cluster_has_no_problems() -> None:
    """And its rows say what there is."""
    at = ring(3, 2)
    rows = [row(i, at) for i in range(3)]
    assert problems(at, rows) == []
    assert state_of(rows[0]) == "up"
    assert usage_of(rows[0]) == "2 KiB/20 KiB"
    assert rebalance_of(rows[0]) == "done"


def test_a_dead_node_is_named_and_the_degree_is_told() -> None:
    """One of two is not enough for two copies; two of three are."""
    lost = PeerLost("gone")
    at = ring(2, 2)
    found = problems(at, [row(0, at), row(1, at, lost, registered=False)])
    assert any("2 copies" in each and "only 1 node" in each for each in found)
    assert any("20000000 does not answer and its lease has ended" in each for each in found)
    at = ring(3, 2)
    found = problems(at, [row(0, at), row(1, at), row(2, at, lost)])
    assert found == ["node 30000000 does not answer"]
    assert state_of(row(2, at, lost)) == "silent"
    assert state_of(row(2, at, lost, registered=False)) == "down"


def test_copies_that_the_block_spec_asks_for_are_wanted_though_the_ring_has_fewer() -> None:
    """With two nodes there is no third copy, and nowhere where one could be."""
    at = ring(2, 2)
    rows = [row(i, at) for i in range(2)]
    assert problems(at, rows) == problems(at, rows, 1) == []
    (told,) = problems(at, rows, 3)
    assert told.startswith("degraded") and "3 copies" in told and "only 2 nodes" in told


def test_who_has_left_the_ring_is_kept_as_long_as_its_journal_is_wanted() -> None:
    """Without what it has, volumes of clients that crashed cannot be opened."""
    at = ring(2, 2)
    rows = [row(i, at) for i in range(2)]
    for count, told in ((0, []), (1, ["a volume"]), (2, ["2 volumes"])):
        said = answer(IDS[2], collector={"garbage_bytes": 0, "unreplayed": count})
        _, *found = problems(at, [*rows, row(2, at, said)])
        assert len(found) == len(told), found
        for each, volumes in zip(found, told, strict=True):
            assert "node 30000000 must stay for now" in each and f"writes of {volumes}," in each


def test_an_empty_ring_and_a_dead_one_are_told_as_such() -> None:
    """They are the first thing to know."""
    empty = rings.make_ring("empty")
    assert "nothing can be stored" in problems(empty, [])[0]
    assert any("peer add 10000000" in each for each in problems(empty, [row(0, empty)]))
    at = ring(1, 1)
    assert "no volume can be read" in problems(at, [row(0, at, PeerLost("x"))])[0]


def test_full_stores_failures_and_waiting_blocks_are_told() -> None:
    """Each with the node that has it."""
    at = ring(2, 2)
    full = answer(IDS[0], rebalancer={**IDLE, "waiting": 3})
    full["block_store"]["blocks"]["level"] = "full"
    broken = answer(IDS[1], rebalancer={**IDLE, "failed": 1})
    broken["block_store"]["blocks"]["failure"] = "sync failed"
    found = problems(at, [row(0, at, full), row(1, at, broken)])
    assert any("store of node 10000000 is full" in each for each in found)
    assert any("3 blocks of node 10000000 wait" in each for each in found)
    assert any("node 20000000: sync failed" in each for each in found)
    assert any("could not move 1 block" in each for each in found)
    broken = answer(IDS[0], journal={"failure": "failed (I/O error); restart the node"})
    found = problems(at, [row(0, at, broken), row(1, at)])
    assert found == ["node 10000000: the journal failed (I/O error); restart the node"]
    assert problems_of(broken) == ["journal: failed (I/O error); restart the node"]
    pages = answer(IDS[0])
    pages["block_store"]["inodes"]["level"] = "full"
    assert any("store of node 10000000 is full" in e for e in problems(at, [row(0, at, pages)]))
    moving = answer(IDS[0], rebalancer={**IDLE, "running": True, "left": 7, "eta_s": 65.0})
    assert rebalance_of(row(0, at, moving)) == "7 left, 1m05s"
    moving["rebalancer"]["eta_s"] = 0.0  # in the first batch of a pass
    assert rebalance_of(row(0, at, moving)) == "7 left"
    yielding = answer(IDS[0], rebalancer={**IDLE, "yielded": 4})
    assert rebalance_of(row(0, at, yielding)) == "4 left to others"


def test_a_node_that_does_not_say_how_its_blocks_are_is_not_taken_for_well() -> None:
    """It answers, but its store or its rebalancer does not: it hangs, or dies again and again."""
    at = ring(2, 2)
    for actor in ("block_store", "rebalancer"):
        silent = answer(IDS[0], **{actor: {"error": "no answer within 2 s"}})
        found = problems(at, [row(0, at, silent), row(1, at)])
        assert found == [f"{actor} of node 10000000 does not answer: no answer within 2 s"]


def test_nodes_that_refuse_are_not_told_to_be_down() -> None:
    """Who forgets the secret is told so; one node that has another one is told with that reason.

    Found by following the README with etcd and a secret: status said that no volume could be read.
    """
    refused = Unauthenticated("refused by the other side: client x has no cluster secret")
    check_not_refused([])
    check_not_refused([refused, answer(IDS[0]), PeerLost("gone")])
    with pytest.raises(Unauthenticated, match="has no cluster secret; give the --secret-file"):
        check_not_refused([refused, refused])
    at = ring(3, 2)
    assert problems(at, [row(0, at), row(1, at), row(2, at, refused)]) == [
        f"node 30000000 does not answer this command: {refused}"
    ]


def test_a_disk_that_does_not_answer_is_told() -> None:
    """With the node, how long and since when, in what, and what to do; its copies do not count."""
    disk = {"hangs_s": 125.4, "since": 1_700_000_000.0, "calls": ["syncing blocks", "the journal"]}
    hung = answer(IDS[0], disk=disk)
    at = ring(3, 2)
    rows = [row(0, at, hung), row(1, at), row(2, at)]
    (told,) = problems(at, rows)
    assert told.startswith(
        "the disk of node 10000000 has not answered for 2m05s, since 2023-11-14 22:13:20 UTC "
        "(syncing blocks, the journal)"
    )
    assert told.endswith("torusctl peer remove 10000000")
    assert [state_of(each) for each in rows] == ["disk hangs", "up", "up"]
    assert problems_of(hung) == [
        "disk: it has not answered for 125 s (syncing blocks, the journal)"
    ]
    at = ring(2, 2)
    told = problems(at, [row(0, at, hung), row(1, at)])[0]
    assert "2 copies" in told and "only 1 node of the ring has a disk that answers" in told
    at = ring(1, 1)
    assert problems(at, [row(0, at, hung)])[0].startswith("no disk of the ring answers")
    (_, told) = problems(at, [row(0, at), row(1, at, answer(IDS[1], disk=disk))])
    assert "the disk of node 20000000" in told and "remove" not in told
    well = answer(IDS[0], disk={"hangs_s": 0.0, "since": 0.0, "calls": []})
    assert problems(at, [row(0, at, well)]) == problems_of(well) == []


@virtual
async def test_a_node_says_of_its_journal_too_that_it_failed() -> None:
    """Status asks the control actor only."""

    class Failed(LoopActor):
        @expose()
        def stats(self) -> dict[str, Any]:
            """Of a journal."""
            return {"failure": "failed (I/O error)"}

    system = ActorSystem(asyncio.get_running_loop(), node_id=IDS[0])
    view = ClusterView(GlobalMetadata(1024, "crc,base", 1, IDS[0]), ring(1, 1))
    control = ChildSpec("control", lambda: Control(view, "node"), max_concurrency=16)
    await system.start(SupervisorSpec("root", (ChildSpec("journal", Failed), control)))
    said = await system.actor("control").status.remote()
    assert said["journal"] == {"failure": "failed (I/O error)"}
    await system.stop()


def test_a_journal_that_cannot_grow_is_told() -> None:
    """Found by use: a node without a file for its journal was healthy, and flushes were commits."""
    at = ring(1, 1)
    small = answer(IDS[0], journal={"failure": "", "no_growth": "the disk is full"})
    (told,) = problems(at, [row(0, at, small)])
    assert "node 10000000 cannot grow" in told and told.endswith("the disk is full")
    well = answer(IDS[0], journal={"failure": "", "no_growth": ""})
    assert problems(at, [row(0, at, well)]) == []


def test_damage_that_nobody_could_repair_is_told() -> None:
    """No cluster is healthy as long as a scrubber knows of a block without a good copy."""
    at = ring(2, 2)
    rotten = answer(IDS[0], scrubber={"failed": 5, "unrepaired": 1})
    found = problems(at, [row(0, at, rotten), row(1, at)])
    assert len(found) == 1 and "node 10000000 found no good copy of 1 block" in found[0]
    mended = answer(IDS[0], scrubber={"failed": 5, "unrepaired": 0})
    assert problems(at, [row(0, at, mended), row(1, at)]) == []


@pytest.mark.parametrize(("share", "told"), [(0.5, True), (0.99, False), (1.5, True)])
def test_a_node_of_another_size_than_the_ring_counts_on_is_told(share: float, told: bool) -> None:
    """As after a start with another ``--size``; a share of the free disk varies a little."""
    at = ring(1, 1)
    info = PeerInfo(IDS[0], "10.0.0.1:1", capacity_bytes=int(share * (1 << 30)))
    made = peer_row(IDS[0], at.peers[0], info)
    add_answer(made, answer(IDS[0]))
    found = problems(at, [made])
    assert bool(found) == told
    assert not told or "counts on 1 GiB: torusctl peer add 10000000" in found[0]


def test_blocks_that_may_lack_copies_are_told() -> None:
    """As long as no pass has ended well in the present situation, nobody knows that all is well.

    A pass that is run to make sure, and a node that stores nothing, are no problem.
    """
    at = ring(2, 2)
    running = {"running": True, "left": 7}
    for fields, told in (
        ({"settled": True}, None),
        ({"settled": True, **running}, None),
        ({"settled": False, **running}, "has yet to look at 7 blocks"),
        ({"settled": False, "yielded": 4}, "4 blocks of node 10000000 are still to be copied"),
        ({"settled": False}, "node 10000000 has yet to look"),
        ({"settled": False, "failed": 3}, "could not move 3 blocks"),
    ):
        said = answer(IDS[0], rebalancer={**IDLE, **fields})
        found = problems(at, [row(0, at, said), row(1, at)])
        assert len(found) == (told is not None), found
        assert told is None or told in found[0]
        for each in said["block_store"].values():
            each["used"] = 0
        assert bool(problems(at, [row(0, at, said), row(1, at)])) == ("failed" in fields)
    # The ring has changed, and this node has not heard of it.
    late = answer(IDS[0], ring_version=0, rebalancer={**IDLE, "settled": True})
    assert "yet to look" in problems(at, [row(0, at, late), row(1, at)])[0]


def test_an_address_that_another_node_took_over_does_not_count_as_up() -> None:
    """Whoever answers must be who was asked."""
    at = ring(1, 1)
    other = row(0, at, answer(IDS[3]))
    assert not other["up"] and "is now node 40000000" in other["error"]


def test_unreachable_metadata_is_told_with_the_innermost_reason() -> None:
    """And with what to do, which depends on where the metadata are."""
    error = Again("the metadata cannot be reached: h:1 cannot be reached: connection refused")
    told = str(unreachable("torus://h:1", error))
    assert told == (
        "cannot reach the metadata at torus://h:1: connection refused; is a node running? "
        "start one with: torus-node start"
    )
    assert "is etcd running?" in str(unreachable("etcd://h:1", error))
    no_name = Again(
        "etcd at h:1: errors resolving h:1: [field:hostname lookup error:address lookup failed for "
        "h:1: Domain name not found]; nothing was changed"
    )
    assert "etcd://h:1: domain name not found; is etcd" in str(unreachable("etcd://h:1", no_name))
    # A node runs there, which has others keep the metadata.
    error.__cause__ = ActorNotFound("no actor metadata on this node")
    told = str(unreachable("torus://h:1", error))
    assert "the node there does not keep it" in told and "is a node running" not in told


# -- audits ----------------------------------------------------------------------------------------


def auditor(members: int, replication: int) -> tuple[Auditor, Audit, rings.Ring]:
    """One that was not asked anything yet."""
    at = ring(members, replication)
    gmd = GlobalMetadata(1024, "crc,base", replication, IDS[0])
    audit = Audit("demo", False, replication, min(replication, members))
    system: Any = None
    return Auditor(system, ClusterView(gmd, at), audit), audit, at


def test_copies_are_counted_by_what_they_are_worth() -> None:
    """A copy counts if its checksum is the map's; others are damaged, or missing."""
    counter, audit, at = auditor(3, 2)
    ref = BlockRef.of(1, 1, 1)
    first, second, other = at.permutation(ref)
    ok, wrong = (Status.OK, 7), (Status.OK, 8)
    missing, rotten = (Status.MISSING, 0), (Status.CORRUPT, 7)
    counter.count(ref, 7, {first: ok, second: ok, other: missing})
    assert (audit.exact, audit.good) == (1, True)
    counter.count(ref, 7, {first: ok, second: ok, other: ok})
    assert (audit.more, audit.misplaced, audit.good) == (1, 0, True)
    counter.count(ref, 7, {first: ok, second: missing, other: ok})
    assert (audit.exact, audit.misplaced, audit.good) == (2, 1, True)
    counter.count(ref, 7, {first: ok, second: wrong, other: missing})
    assert (audit.fewer, audit.corrupt, audit.good) == (1, 1, False)
    counter.count(ref, 7, {first: rotten, second: missing, other: missing})
    assert (audit.missing, audit.corrupt) == (1, 2)
    counter.count(ref, None, {first: ok, second: wrong, other: missing})
    assert (audit.exact, audit.blocks) == (3, 6)
    assert len(audit.examples) == 2 and "1 of 2 copies" in audit.examples[0]


def test_a_ring_with_fewer_members_than_copies_has_too_few() -> None:
    """However many there can be: it is compared with what is wanted, and told what is lacking."""
    counter, audit, at = auditor(1, 3)
    ref = BlockRef.of(1, 1, 1, BlockType.INODE)
    counter.count(ref, 7, {at.members[0]: (Status.OK, 7)})
    assert (audit.fewer, audit.pages, audit.good) == (1, 1, False)
    assert audit.examples == [f"{ref}: 1 of 3 copies"]
    assert "too few members" in str(explain(audit)) and "peer add" in str(explain(audit))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_journal_that_too_few_have_is_told(lost: int) -> None:
    """However good the copies of blocks are; with none of it the volume cannot be opened."""
    audit = Audit("demo", False, 2, 2, exact=9, journal=IDS[:2], journal_lost=IDS[:lost])
    assert audit.good is (lost == 0)
    assert (explain(audit) is None) is audit.good
    told = str(explain(audit))
    if lost == 1:
        assert "1 of 2 members" in told and "start 10000000" in told
    if lost == 2:
        assert "demo cannot be opened" in told and "10000000, 20000000" in told


@pytest.mark.parametrize("silent", [[], [IDS[1]]])
def test_an_audit_is_explained_in_one_line(silent: list[str]) -> None:
    """How many, of how many, and why or what to do."""
    audit = Audit("demo", False, 2, 2, blocks=9, fewer=1, missing=2, silent=silent)
    told = str(explain(audit))
    assert "3 of 9 blocks" in told and "2 have none" in told and "\n" not in told
    assert ("20000000" in told) is bool(silent)
    assert ("debug rebalance" in told) is (not silent)
    # What is damaged the rebalancer takes for a copy like others.
    audit.corrupt = 1
    told = str(explain(audit))
    assert ("debug scrub" in told) is (not silent) and "rebalance" not in told


def test_garbage_is_told_by_node_and_for_all() -> None:
    """Found and reclaimed room; a node that says nothing counts for nothing, an error is told."""
    at = ring(3, 2)
    told = {"garbage_bytes": 3 << 20, "reclaimed_bytes": 1 << 30, "last_error": ""}
    broken = {**told, "last_error": "stored Head cannot be read"}
    rows = [
        row(0, at, answer(IDS[0], collector=told)),
        row(1, at, answer(IDS[1], collector=broken)),
        row(2, at, PeerLost("gone")),
    ]
    assert garbage_row(rows) == {"garbage_bytes": 6 << 20, "reclaimed_bytes": 2 << 30}
    assert [garbage_of(each) for each in rows] == [("3 MiB", "1 GiB")] * 2 + [("-", "-")]
    assert "node 20000000 collects no garbage: stored Head cannot be read" in problems(at, rows)


def test_a_lost_node_says_when_it_leaves_the_ring() -> None:
    """The node that has counted longest decides; nobody says so where nobody leaves."""
    at = ring(3, 2)
    lost = PeerLost("gone")
    rows = [
        row(0, at, answer(IDS[0], evictor={"remove_after_s": 600.0, "missing_s": {IDS[2]: 60.0}})),
        row(1, at, answer(IDS[1], evictor={"remove_after_s": 600.0, "missing_s": {IDS[2]: 90.0}})),
        row(2, at, lost, registered=False),
    ]
    found = problems(at, rows)
    assert found[0].endswith("its lease has ended; it leaves the ring in 8m30s")
    never = {"remove_after_s": None, "missing_s": {IDS[2]: 90.0}}
    rows[:2] = [row(i, at, answer(IDS[i], evictor=never)) for i in range(2)]
    assert problems(at, rows)[0].endswith("its lease has ended")


def test_a_lost_node_that_may_not_leave_is_not_said_to() -> None:
    """It stayed for ever, and status said that it leaves in 0 s."""
    at = ring(3, 3)
    kept = {"remove_after_s": 600.0, "missing_s": {IDS[2]: 900.0}, "kept": "3 copies need 3"}
    rows = [row(i, at, answer(IDS[i], evictor=kept)) for i in range(2)]
    rows.append(row(2, at, PeerLost("gone"), registered=False))
    assert "its lease has ended; it stays in the ring: 3 copies need 3" in "".join(
        problems(at, rows)
    )


def test_lost_nodes_leave_the_ring_one_after_the_other() -> None:
    """The second one's time begins when the first has left."""
    at = ring(4, 1)
    both = {"remove_after_s": 600.0, "missing_s": {IDS[2]: 90.0, IDS[3]: 30.0}, "kept": ""}
    rows = [row(i, at, answer(IDS[i], evictor=both)) for i in range(2)]
    rows += [row(i, at, PeerLost("gone"), registered=False) for i in (2, 3)]
    first, second = (text for text in problems(at, rows) if "leaves" in text)
    assert first.endswith("leaves the ring in 8m30s")
    assert second.endswith("leaves the ring in 18m30s")


def test_a_registration_that_cannot_be_read_is_told_and_hides_nobody() -> None:
    """Such a node may be up: its lease is not said to have ended."""
    at = ring(3, 2)
    others = [PeerInfo(each, f"10.0.0.{each[0]}:1") for each in IDS[:2]]
    rows = peer_rows(at, Registrations(others, {IDS[2]: "peers/3: nonsense"}, {}))
    assert [made["id"] for made in rows] == IDS[:3]
    for made in rows[:2]:
        add_answer(made, answer(made["id"]))
    add_answer(rows[2], PeerLost("gone"))
    told = (
        "the registration of node 30000000 cannot be read: peers/3: nonsense; "
        "torusctl peer remove 30000000 removes it"
    )
    assert problems(at, rows) == ["node 30000000 does not answer", told]
    assert state_of(rows[2]) == "silent"
    del rows[2]["error"]
    add_answer(rows[2], answer(IDS[2]))
    assert problems(at, rows) == [told]
