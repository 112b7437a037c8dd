"""The state of a cluster as data, and in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torus_actors.cli.connect import Connection
from torus_actors.cli.nodes import short
from torus_actors.cli.units import format_moment, format_seconds, format_size
from torus_actors.errors import TorusError, Unauthenticated
from torus_actors.metadata.cluster import Registrations
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.model.blocksets import create_blockset
from torus_actors.model.rings import Peer, Ring
from torus_actors.wire.hello import shut_out

Row = dict[str, Any]


async def cluster_report(connection: Connection) -> Row:
    """Everything ``torusctl status`` shows; each node is asked how it is."""
    gmd, ring = await connection.cluster()
    rows = peer_rows(ring, await connection.meta.registrations())
    asked = [row for row in rows if row["address"]]
    answers = await connection.ask_all([row["address"] for row in asked], "control", "status")
    check_not_refused(answers)
    for row, answer in zip(asked, answers, strict=True):
        add_answer(row, answer)
    return {
        "metadata": connection.url,
        **cluster_row(gmd, ring),
        **garbage_row(rows),
        "peers": rows,
        "problems": problems(ring, rows, create_blockset(gmd.block_spec).replication),
    }


def check_not_refused(answers: Sequence[Any]) -> None:
    """Refuse to tell of a cluster of which every node refused to answer: they are not down.

    Raises:
        Unauthenticated: with the reason.
    """
    if answers and all(isinstance(each, Unauthenticated) for each in answers):
        raise shut_out("no node answers this command", [str(each) for each in answers])


def cluster_row(gmd: GlobalMetadata, ring: Ring) -> Row:
    """What holds for the cluster as a whole."""
    return {
        "cluster_id": gmd.cluster_id,
        "block_size": gmd.block_size,
        "block_spec": gmd.block_spec,
        "replication": ring.replication,
        "ring_type": ring.kind,
        "ring_version": ring.version,
        "ring_members": len(ring.members),
    }


def garbage_row(rows: Sequence[Row]) -> Row:
    """What the collectors of all nodes that answer have found and done since they started."""
    told = [row["collector"] for row in rows if "collector" in row]
    return {
        "garbage_bytes": sum(each["garbage_bytes"] for each in told),
        "reclaimed_bytes": sum(each["reclaimed_bytes"] for each in told),
    }


def peer_rows(ring: Ring, there: Registrations) -> list[Row]:
    """All nodes that the metadata speak of, members of the ring first."""
    members = {peer.peer_id: peer for peer in ring.peers}
    registered = {info.peer_id: info for info in there.peers}
    rows = []
    for each in dict.fromkeys((*members, *registered, *there.unread)):
        row = peer_row(each, members.get(each), registered.get(each))
        if each in there.unread:
            row["unreadable"] = there.unread[each]
        rows.append(row)
    return rows


def peer_row(peer_id: str, member: Peer | None, info: PeerInfo | None) -> Row:
    """One node, from what the metadata say of it."""
    address = zone = ""
    capacity = 0
    if member is not None:
        address, zone, capacity = member.address, member.zone, member.weight_bytes
    if info is not None:
        address, zone, capacity = info.address, info.zone, info.capacity_bytes
    return {
        "id": peer_id,
        "address": address,
        "zone": zone,
        "capacity_bytes": capacity,
        "weight_bytes": member.weight_bytes if member is not None else 0,
        "in_ring": member is not None,
        "registered": info is not None,
        "up": False,
    }


def add_answer(row: Row, answer: Any) -> None:
    """Add what the node itself says, or that it says nothing."""
    if isinstance(answer, TorusError):
        row["error"] = str(answer)
        row["refused"] = isinstance(answer, Unauthenticated)
        return
    if answer["node"] != row["id"]:
        row["error"] = f"{row['address']} is now node {short(answer['node'])}"
        return
    row["up"] = True
    row["version"] = answer["version"]
    row["node_ring_version"] = answer["ring_version"]
    stores = answer.get("block_store", {})
    if "blocks" in stores:
        sizes = [stores["blocks"], stores["inodes"]]
        row["used_bytes"] = sum(each["used"] * each["block_size"] for each in sizes)
        row["total_bytes"] = sum(each["total"] * each["block_size"] for each in sizes)
        levels = [each["level"] for each in sizes]
        # One without room for pages takes no commits, however much there is for data.
        row["level"] = next((each for each in ("full", "warning") if each in levels), levels[0])
        row["failure"] = " ".join(each["failure"] for each in sizes).strip()
    add_disk(row, answer)
    journal = answer.get("journal", {})
    if journal.get("failure"):
        row["failure"] = f"{row.get('failure', '')} the journal {journal['failure']}".strip()
    if journal.get("no_growth"):
        row["journal_no_growth"] = journal["no_growth"]
    evictor = answer.get("evictor", {})
    if "missing_s" in evictor:
        row["evictor"] = evictor
    collector = answer.get("collector", {})
    if "garbage_bytes" in collector:
        row["collector"] = collector
    row["silent_actors"] = {
        name: said["error"]
        for name, said in answer.items()
        if isinstance(said, dict) and "error" in said
    }
    row["unrepaired"] = answer.get("scrubber", {}).get("unrepaired", 0)
    rebalancer = answer.get("rebalancer", {})
    if "running" in rebalancer:
        row["rebalance"] = rebalancer


def add_disk(row: Row, answer: Any) -> None:
    """Add that its disk does not answer, if the node itself says so."""
    if isinstance(answer, dict) and answer["node"] == row["id"]:
        disk = answer.get("disk", {})
        if disk.get("calls"):
            row["disk_hangs"] = disk


def problems(ring: Ring, rows: Sequence[Row], copies: int | None = None) -> list[str]:
    """What is wrong, in plain words; nothing if all is well.

    Args:
        ring: by which blocks are placed.
        rows: of all nodes.
        copies: how many the block spec wants, if it says so.
    """
    found: list[str] = []
    members = [row for row in rows if row["in_ring"]]
    up = [row for row in members if row["up"]]
    well = [row for row in up if "disk_hangs" not in row]
    wanted = max(ring.replication, copies or 0)
    if not members:
        found.append("no node is in the ring, so nothing can be stored: torusctl peer add --all")
    elif not up:
        found.append("no node of the ring is up: no volume can be read or written")
    elif len(up) < wanted:
        found.append(
            f"degraded: blocks should have {_copies(wanted)}, but only {_nodes(len(up))} of the "
            f"ring {'is' if len(up) == 1 else 'are'} up"
        )
    elif not well:
        found.append("no disk of the ring answers: nothing can be flushed")
    elif len(well) < wanted:
        found.append(
            f"degraded: blocks should have {_copies(wanted)}, but only {_nodes(len(well))} of the "
            f"ring {'has a disk that answers' if len(well) == 1 else 'have disks that answer'}"
        )
    for row in members:
        if row.get("refused"):
            found.append(f"node {short(row['id'])} does not answer this command: {row['error']}")
        elif not row["up"]:
            known = row["registered"] or "unreadable" in row
            heard = "" if known else " and its lease has ended"
            leaves = _leaves_in(row["id"], rows)
            found.append(f"node {short(row['id'])} does not answer{heard}{leaves}")
    for row in rows:
        name = short(row["id"])
        if row["registered"] and not row["in_ring"]:
            found.append(f"node {name} is not in the ring: torusctl peer add {name}")
            unreplayed = row.get("collector", {}).get("unreplayed")
            if unreplayed:
                found.append(f"node {name} must stay for now: {unreplayed_of(unreplayed)}")
        room, weight = row["capacity_bytes"], row["weight_bytes"]
        if row["registered"] and row["in_ring"] and room and abs(room - weight) > weight // 20:
            found.append(
                f"node {name} has room for {format_size(room)} of blocks, and the ring counts on "
                f"{format_size(weight)}: torusctl peer add {name}"
            )
        if "unreadable" in row:
            found.append(
                f"the registration of node {name} cannot be read: {row['unreadable']}; "
                f"torusctl peer remove {name} removes it"
            )
        elif row["up"] and not row["registered"]:
            found.append(f"node {name} answers, but is not registered")
        for actor, error in row.get("silent_actors", {}).items():
            found.append(f"{actor} of node {name} does not answer: {error}")
        if "disk_hangs" in row:
            found.append(_disk_hangs(row))
        if row.get("failure"):
            found.append(f"node {name}: {row['failure']}")
        if "journal_no_growth" in row:
            found.append(
                f"the journal of node {name} cannot grow, so that flushes may have to be commits: "
                f"{row['journal_no_growth']}"
            )
        if row.get("level", "ok") != "ok":
            found.append(f"the store of node {name} is {row['level']}: add nodes or make room")
        if row.get("collector", {}).get("last_error"):
            found.append(f"node {name} collects no garbage: {row['collector']['last_error']}")
        if row.get("unrepaired"):
            found.append(
                f"node {name} found no good copy of {_blocks(row['unrepaired'])} whose copy is "
                "damaged there: torusctl volume check --deep tells which volume lost something"
            )
        moving = row.get("rebalance", {})
        if moving.get("failed"):
            failed = _blocks(moving["failed"])
            found.append(f"node {name} could not move {failed}, and tries again")
        if moving.get("waiting"):
            waiting = _blocks(moving["waiting"])
            found.append(f"{waiting} of node {name} wait for a node that is down")
        if not moving.get("failed") and _is_unsettled(row, ring):
            found.append(_unsettled(row))
    return found


def _disk_hangs(row: Row) -> str:
    name, disk = short(row["id"]), row["disk_hangs"]
    leave = f", or take it out: torusctl peer remove {name}" if row["in_ring"] else ""
    return (
        f"the disk of node {name} has not answered for {format_seconds(disk['hangs_s'])}, since "
        f"{format_moment(disk['since'])} ({', '.join(disk['calls'])}): "
        f"mend the disk and start the node again{leave}"
    )


def unreplayed_of(count: int) -> str:
    """What the journal of a node has that is nowhere else but in the journals of as many others."""
    volumes = "a volume" if count == 1 else f"{count} volumes"
    each = "it" if count == 1 else "each of them"
    return f"its journal has flushed writes of {volumes}, until somebody has opened {each}"


def _is_unsettled(row: Row, ring: Ring) -> bool:
    """Whether blocks of a node that is up may lack copies, for all that is known.

    A pass that runs only because the last one was a minute ago says nothing of that; and whoever
    has no blocks has none to send.
    """
    if "rebalance" not in row or not row.get("used_bytes"):
        return False
    knows_ring = bool(row["node_ring_version"] == ring.version)
    return not (knows_ring and row["rebalance"].get("settled", True))


def _unsettled(row: Row) -> str:
    name, moving = short(row["id"]), row["rebalance"]
    if moving["left"]:
        return (
            f"node {name} copies blocks to where they should be: it has yet to look at "
            f"{_blocks(moving['left'])}"
        )
    if moving.get("yielded"):
        return f"{_blocks(moving['yielded'])} of node {name} are still to be copied by another node"
    return f"node {name} has yet to look which of its blocks lack copies"


def _leaves_in(peer_id: str, rows: Sequence[Row]) -> str:
    """When the others will take a silent node out of the ring, or why not, as far as they say."""
    evictors = [row["evictor"] for row in rows if "evictor" in row]
    told = [
        each
        for each in evictors
        if peer_id in each["missing_s"] and each["remove_after_s"] is not None
    ]
    left = [_left_s(peer_id, each) for each in told if not each.get("kept")]
    if left:
        return f"; it leaves the ring in {format_seconds(max(min(left), 0))}"
    return f"; it stays in the ring: {told[0]['kept']}" if told else ""


def _left_s(peer_id: str, evictor: Row) -> float:
    """One leaves after the other, the longest gone first: each change begins the count anew."""
    missing = evictor["missing_s"]
    order = sorted(missing, key=lambda each: (-missing[each], each))
    turns = order.index(peer_id) + 1
    return float(turns * evictor["remove_after_s"] - missing[order[0]])


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def state_of(row: Row) -> str:
    """A node's state in a word."""
    if not row["up"]:
        return "silent" if row["registered"] or "unreadable" in row else "down"
    if "disk_hangs" in row:
        return "disk hangs"
    return "up" if row["in_ring"] else "up, out"


def usage_of(row: Row) -> str:
    """``used/total``."""
    if "total_bytes" not in row:
        return "-"
    return f"{format_size(row['used_bytes'])}/{format_size(row['total_bytes'])}"


def rebalance_of(row: Row) -> str:
    """What its rebalancer does, in a few words."""
    progress = row.get("rebalance")
    if progress is None:
        return "-"
    if progress["running"]:
        if progress["left"] and progress["eta_s"]:
            return f"{progress['left']} left, {format_seconds(progress['eta_s'])}"
        return f"{progress['left']} left" if progress["left"] else "running"
    if progress["failed"]:
        return f"{progress['failed']} failed"
    if progress["waiting"]:
        return f"{progress['waiting']} wait"
    if progress.get("yielded"):
        return f"{progress['yielded']} left to others"
    return "done"


def garbage_of(row: Row) -> tuple[str, str]:
    """Garbage that a node has found, and the room it has made since it started."""
    told = row.get("collector")
    if told is None:
        return "-", "-"
    return format_size(told["garbage_bytes"]), format_size(told["reclaimed_bytes"])
