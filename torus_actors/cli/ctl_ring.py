"""``torusctl peer`` and ``torusctl ring``: who is in the ring, and how blocks are placed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.common import Failed, Group, Settings, json_option, run
from torus_actors.cli.nodes import pick, short
from torus_actors.cli.output import print_json, print_table
from torus_actors.cli.units import format_size
from torus_actors.errors import Invalid

if TYPE_CHECKING:
    from torus_actors.cli.connect import Connection
    from torus_actors.metadata.cluster import Registrations
    from torus_actors.metadata.records import PeerInfo
    from torus_actors.model.rings import Peer, Ring

CHANGE_S_MAX = 20.0
"""A change is tried again while others change the ring too, or the metadata is away."""

RING_TYPES = ("ketama", "zone", "mod", "single", "empty")


@click.group(cls=Group)
def peer() -> None:
    """Nodes, and which of them are in the ring."""


@click.group(cls=Group)
def ring() -> None:
    """How blocks are placed on nodes."""


async def _change(connection: Connection, change: Callable[[Ring], Ring | None]) -> Ring:
    from torus_actors.metadata.patience import patiently
    from torus_actors.metadata.ring_changes import change_ring

    work = change_ring, connection.meta, change
    try:
        async with asyncio.timeout(CHANGE_S_MAX):
            return await patiently(*work, give_up_s=None, rng=random.Random())
    except TimeoutError as error:
        raise Failed(
            f"the ring could not be changed within {CHANGE_S_MAX:g} s: look with torusctl ring get"
        ) from error


def _peer_of(info: PeerInfo) -> Peer:
    from torus_actors.model.rings import Peer

    return Peer(info.peer_id, max(info.capacity_bytes, 1), info.zone, info.address)


def _one_step(before: Ring, after: Ring) -> Ring:
    """Several changes as one version: metadata takes only successors, and blocks move once."""
    return type(after).build(before.version + 1, after.replication, after.peers, after.params())


@peer.command("list")
@json_option
@click.pass_obj
def peer_list(settings: Settings, as_json: bool) -> None:
    """List the nodes that are up, and those in the ring."""

    async def work() -> list[dict[str, Any]]:
        from torus_actors.cli.connect import connect
        from torus_actors.cli.report import add_disk, peer_rows

        async with connect(settings) as connection:
            _, present = await connection.cluster()
            rows = peer_rows(present, await connection.meta.registrations())
            rows.sort(key=lambda row: row["id"])
            # Only a node itself knows whether its disk answers.
            asked = [row for row in rows if row["registered"]]
            addresses = [row["address"] for row in asked]
            answers = await connection.ask_all(addresses, "control", "status")
        for row, answer in zip(asked, answers, strict=True):
            add_disk(row, answer)
        for row in rows:
            row["up"] = row["registered"]
        return rows

    rows = run(settings, work())
    if as_json:
        print_json(rows)
        return
    print_table(
        ("ID", "ADDRESS", "ZONE", "CAPACITY", "RING", "STATE"),
        [
            (
                short(row["id"]),
                row["address"] or "-",
                row["zone"] or "-",
                format_size(row["capacity_bytes"]),
                "yes" if row["in_ring"] else "no",
                _state_of(row),
            )
            for row in rows
        ],
    )


def _state_of(row: dict[str, Any]) -> str:
    if "unreadable" in row:
        return "not readable"
    return "disk hangs" if "disk_hangs" in row else "up" if row["up"] else "down"


@peer.command("add")
@click.argument("peers", nargs=-1, metavar="PEER_ID...")
@click.option("--all", "everyone", is_flag=True, help="All nodes that are up.")
@click.pass_obj
def peer_add(settings: Settings, peers: tuple[str, ...], everyone: bool) -> None:
    """Add nodes to the ring, by the beginnings of their ids."""
    if bool(peers) == everyone:
        raise click.UsageError("give either PEER_IDs or --all")

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            await connection.cluster()
            registered = {info.peer_id: info for info in await connection.meta.peers()}
            ids = (
                list(registered)
                if everyone
                else [pick(each, registered, "node that is up") for each in peers]
            )
            if not ids:
                raise Failed("no node is up: start one with torus-node start")

            def add(present: Ring) -> Ring | None:
                after = present
                for each in ids:
                    new = _peer_of(registered[each])
                    if new not in after.peers:
                        after = after.with_peer(new)
                return None if after is present else _one_step(present, after)

            _told(await _change(connection, add))

    run(settings, work())


@peer.command("remove")
@click.argument("peers", nargs=-1, required=True, metavar="PEER_ID...")
@click.pass_obj
def peer_remove(settings: Settings, peers: tuple[str, ...]) -> None:
    """Take nodes out of the ring; their blocks move to the others while they run.

    A registration that cannot be read goes too; a node that runs makes it anew.
    """

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            _, before = await connection.cluster()
            there = await connection.meta.registrations()
            known = {*before.members, *there.unread}
            ids = {pick(each, known, "node in the ring") for each in peers}

            def remove(present: Ring) -> Ring | None:
                leaving = [each for each in ids if each in present.members]
                if len(leaving) == len(present.members):
                    raise _nobody_left()
                after = present
                for each in leaving:
                    after = after.without_peer(each)
                return None if after is present else _one_step(present, after)

            leaving = ids.intersection(before.members)
            if leaving:
                alone = await _may_be_alone(connection, leaving)
                _told(await _change(connection, remove))
                note = _all_copies_on(before, leaving, there) or _still_needed(alone)
                if note:
                    click.echo(note)
            for each in sorted(ids.intersection(there.unread)):
                await connection.meta.forget_peer(each, there.revisions[each])
                click.echo(f"the registration of node {short(each)} is removed")

    run(settings, work())


async def _may_be_alone(connection: Connection, leaving: Collection[str]) -> list[str]:
    """Of nodes that leave the ring, those that may have blocks of which others lack copies.

    Another node may have left a moment before, or be down; one that is not registered is no help.
    """
    from torus_actors.errors import TorusError

    there = await connection.meta.registrations()
    registered = {info.peer_id: info.address for info in there.peers}
    asked = [each for each in sorted(leaving) if each in registered]
    addresses = [registered[each] for each in asked]
    answers = await connection.ask_all(addresses, "rebalancer", "status")
    alone = [
        each
        for each, said in zip(asked, answers, strict=True)
        if isinstance(said, TorusError) or said.get("waiting") or not said.get("settled", True)
    ]
    return sorted([*alone, *(each for each in leaving if each in there.unread)])


def _still_needed(alone: Collection[str]) -> str:
    """What is to be known when what leaves the ring may have what no other node has."""
    if not alone:
        return ""
    names = ", ".join(short(each) for each in alone)
    return (
        f"note: not all blocks of {names} had all their copies before: keep what was removed "
        "running until torusctl debug rebalance is done"
    )


def _all_copies_on(before: Ring, leaving: Collection[str], there: Registrations) -> str:
    """What is to be known when blocks may have all their copies on nodes that leave the ring."""
    if len(leaving) < min(before.replication, len(before.members)):
        return ""
    note = (
        "note: of some blocks all copies are on what was removed: keep it running until torusctl "
        "debug rebalance is done"
    )
    registered = {info.peer_id for info in there.peers}
    away = [short(each) for each in sorted(leaving) if each not in registered]
    if not away:
        return note
    # It asks those that are registered. One that is not may run, cut off from the metadata alone.
    return (
        f"{note}; that says nothing of {', '.join(away)} before torusctl peer list has it up "
        "again: what only it has is lost unless it comes back"
    )


def _nobody_left() -> Invalid:
    return Invalid("the ring would be left without a node, and every block without a place")


def _told(now: Ring) -> None:
    names = ", ".join(short(each) for each in now.members) or "nobody"
    click.echo(f"ring version {now.version}: {names}")
    if 0 < len(now.members) < now.replication:
        click.echo(
            f"note: replication is {now.replication}, and the ring has {len(now.members)} members"
        )


@ring.command("get")
@json_option
@click.pass_obj
def ring_get(settings: Settings, as_json: bool) -> None:
    """Show the ring."""

    async def work() -> Ring:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            return (await connection.cluster())[1]

    found = run(settings, work())
    if not as_json:
        click.echo(found.describe())
        return
    print_json(
        {
            "type": found.kind,
            "version": found.version,
            "replication": found.replication,
            "peers": [
                {
                    "id": each.peer_id,
                    "weight_bytes": each.weight_bytes,
                    "zone": each.zone,
                    "address": each.address,
                }
                for each in found.peers
            ],
        }
    )


@ring.command("set-replication")
@click.argument("copies", type=click.IntRange(1, 16), metavar="N")
@click.pass_obj
def ring_set_replication(settings: Settings, copies: int) -> None:
    """Keep N copies of each block from now on; missing ones are made in the background."""

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            await connection.cluster()

            def change(present: Ring) -> Ring | None:
                return None if present.replication == copies else present.with_replication(copies)

            _told(await _change(connection, change))

    run(settings, work())


@ring.command("manual-change")
@click.option("--type", "kind", type=click.Choice(RING_TYPES), help="Default: as it is.")
@click.option(
    "--peers", "--uuids", "peers", metavar="ID,ID,...", help="Members. Default: as they are."
)
@click.option("--replication", type=click.IntRange(1, 16), help="Default: as it is.")
@click.pass_obj
def ring_manual_change(
    settings: Settings, kind: str | None, peers: str | None, replication: int | None
) -> None:
    """Replace the ring by one of a given type, members and replication."""
    if kind is None and peers is None and replication is None:
        raise click.UsageError("nothing to change: give --type, --peers or --replication")

    async def work() -> None:
        from torus_actors.cli.connect import connect
        from torus_actors.model import rings
        from torus_actors.model.ring_base import ring_class

        async with connect(settings) as connection:
            _, now = await connection.cluster()
            known = {each.peer_id: each for each in now.peers}
            known.update({info.peer_id: _peer_of(info) for info in await connection.meta.peers()})
            chosen: set[str] | None = None
            if peers is not None:
                given = [each.strip() for each in peers.split(",") if each.strip()]
                chosen = {pick(each, known, "node") for each in given}
                if not chosen and kind != "empty":
                    raise _nobody_left()

            def change(present: Ring) -> Ring | None:
                members = list(present.peers)
                if chosen is not None:
                    members = [known[each] for each in sorted(chosen)]
                copies = present.replication if replication is None else replication
                cls = ring_class(kind or present.kind)
                # Between ketama and zone the points stay, so that fewer blocks move.
                alike = issubclass(cls, rings.KetamaRing) and isinstance(present, rings.KetamaRing)
                params = present.params() if alike or cls is type(present) else {}
                return cls.build(present.version + 1, copies, members, params)

            leaving = set() if chosen is None else set(now.members) - chosen
            alone = await _may_be_alone(connection, leaving)
            there = await connection.meta.registrations()
            _told(await _change(connection, change))
            note = _all_copies_on(now, leaving, there) or _still_needed(alone)
            if note:
                click.echo(note)

    run(settings, work())
