"""``torusctl init``, ``wipe``, ``status`` and ``tree``: the cluster as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.common import SIZE, Command, Failed, Settings, json_option, run
from torus_actors.cli.output import console, make_table, print_json, print_table
from torus_actors.cli.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torus_actors.cli.connect import Connection

FIRST_RING_TYPES = ("ketama", "zone", "mod")
"""Types that can begin empty and grow."""

WATCH_S = 1.0


@click.command(cls=Command)
@click.option(
    "--block-size",
    type=SIZE,
    default="512KiB",
    show_default=True,
    help="A multiple of 4KiB, up to 16MiB.",
)
@click.option("--block-spec", default="crc,base", show_default=True, help="Layers of new volumes.")
@click.option(
    "--replication",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Copies of each block.",
)
@click.option(
    "--ring-type", type=click.Choice(FIRST_RING_TYPES), default="ketama", show_default=True
)
@click.pass_obj
def init(
    settings: Settings, block_size: int, block_spec: str, replication: int, ring_type: str
) -> None:
    """Make a cluster in the metadata. Nodes are added afterwards."""

    async def work() -> None:
        from torus_actors.cli.connect import connect
        from torus_actors.errors import Exists
        from torus_actors.metadata.records import GlobalMetadata
        from torus_actors.model import rings
        from torus_actors.model.blocksets import parse_spec
        from torus_actors.storage.store import check_block_size

        check_block_size(block_size)
        parse_spec(block_spec)
        gmd = GlobalMetadata(
            block_size=block_size,
            block_spec=block_spec,
            inode_replication=replication,
            cluster_id=str(uuid.uuid4()),
            created=time.time(),
        )
        ring = rings.make_ring(ring_type, version=1, replication=replication)
        async with connect(settings) as connection:
            try:
                await connection.patiently(connection.meta.init, gmd, rings.marshal(ring))
            except Exists as error:
                raise Exists(
                    f"{connection.url} has a cluster already: torusctl ring set-replication "
                    "changes the number of copies; block size and spec never change"
                ) from error
        click.echo(
            f"cluster {gmd.cluster_id}: blocks of {format_size(block_size)}, {block_spec}, "
            f"replication {replication}"
        )

    run(settings, work())


@click.command(cls=Command)
@click.option("--yes-i-am-sure", is_flag=True, help="Without it nothing is removed.")
@click.pass_obj
def wipe(settings: Settings, yes_i_am_sure: bool) -> None:
    """Remove all metadata: every volume is lost."""

    async def work() -> None:
        from torus_actors.cli.connect import connect
        from torus_actors.errors import Corruption, NoGlobalMetadata

        async with connect(settings) as connection:
            meta = connection.meta
            try:
                gmd = await connection.patiently(meta.global_metadata)
                named = f"cluster {gmd.cluster_id}"
            except NoGlobalMetadata:
                named = ""
            except Corruption:
                named = "a cluster whose metadata cannot be read"  # a reason to wipe them
            if not yes_i_am_sure:
                try:
                    count = f"{len(await connection.patiently(meta.volumes))} volumes"
                except Corruption:
                    count = "its volumes"
                raise Failed(
                    f"wipe would remove {named or 'what is left'} with {count} from "
                    f"{connection.url}: nothing was done; give --yes-i-am-sure"
                )
            await connection.patiently(meta.wipe)
        if not named:
            click.echo("there was no cluster to wipe")
            return
        click.echo(
            f"wiped {named}; its nodes still hold blocks: stop them and remove their data "
            "directories"
        )

    run(settings, work())


@click.command(cls=Command)
@json_option
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Show the cluster and how each node is."""

    async def work() -> dict[str, Any]:
        from torus_actors.cli.connect import connect
        from torus_actors.cli.report import cluster_report

        async with connect(settings) as connection:
            return await cluster_report(connection)

    report = run(settings, work())
    if as_json:
        print_json(report)
        return
    from torus_actors.cli.nodes import short
    from torus_actors.cli.report import garbage_of, rebalance_of, state_of, usage_of

    click.echo(f"cluster      {report['cluster_id']}")
    click.echo(f"metadata     {report['metadata']}")
    click.echo(f"blocks       {format_size(report['block_size'])}, {report['block_spec']}")
    click.echo(f"replication  {report['replication']}")
    click.echo(
        f"ring         {report['ring_type']}, version {report['ring_version']}, "
        f"{report['ring_members']} members"
    )
    click.echo(
        f"garbage      {format_size(report['garbage_bytes'])} found, "
        f"{format_size(report['reclaimed_bytes'])} reclaimed since the nodes started"
    )
    click.echo()
    if report["peers"]:
        rows = [
            (
                short(row["id"]),
                row["address"] or "-",
                row["zone"] or "-",
                state_of(row),
                usage_of(row),
                row.get("level", "-"),
                rebalance_of(row),
            )
            for row in report["peers"]
        ]
        columns = ("ID", "ADDRESS", "ZONE", "STATE", "USED/TOTAL", "LEVEL", "REBALANCE")
        print_table(columns, rows)
        click.echo()
        print_table(
            ("ID", "GARBAGE", "RECLAIMED"),
            [(short(row["id"]), *garbage_of(row)) for row in report["peers"]],
            right=("GARBAGE", "RECLAIMED"),
        )
        click.echo()
    if report["problems"]:
        for problem in report["problems"]:
            click.echo(problem)
    else:
        click.echo("healthy: every node is up, and blocks have all the copies they should have")


@click.command(cls=Command)
@click.argument("node", required=False)
@click.option("--watch", is_flag=True, help="Keep showing it, until Ctrl-C.")
@json_option
@click.pass_obj
def tree(settings: Settings, node: str | None, watch: bool, as_json: bool) -> None:
    """Show the supervision tree of NODE (the beginning of an id, or @HOST:PORT), or of all."""
    if watch and as_json:
        raise click.UsageError("--watch is for people, --json for programs")

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            if watch:
                await _watch(connection, node)
                return
            trees = await _trees(connection, node)
        if as_json:
            print_json(trees)
        else:
            for each in trees:
                _print_tree(each)
        if not trees:
            raise Failed("no node is up: start one with torus-node start")
        if all("error" in each for each in trees):
            raise Failed("no node answered" if len(trees) != 1 else trees[0]["error"])

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            run(settings, work())
    else:
        run(settings, work())


async def _trees(connection: Connection, node: str | None) -> list[dict[str, Any]]:
    if node is not None:
        name, address = await connection.find_node(node)
        targets = {name: address}
    else:
        _, ring = await connection.cluster()
        targets = {peer.peer_id: peer.address for peer in ring.peers if peer.address}
        targets.update({info.peer_id: info.address for info in await connection.meta.peers()})
    answers = await connection.ask_all(list(targets.values()), "control", "tree")
    trees = []
    for (name, address), answer in zip(targets.items(), answers, strict=True):
        result = {"error": str(answer)} if isinstance(answer, Exception) else {"actors": answer}
        trees.append({"node": name, "address": address, **result})
    return trees


_TREE_COLUMNS = ("ACTOR", "STATE", "UPTIME", "RESTARTS", "LAST DEATH")


def _tree_rows(actors: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            "  " * row["depth"] + row["name"],
            row["state"],
            format_seconds(row["uptime_s"]) if row["state"] == "running" else "-",
            str(row["restarts"]),
            row["last_death"] or "-",
        )
        for row in actors
    ]


def _title(tree: dict[str, Any]) -> str:
    name = "" if tree["node"].startswith("@") else f"{tree['node']} at "
    return f"node {name}{tree['address']}"


def _print_tree(tree: dict[str, Any]) -> None:
    click.echo(_title(tree))
    if "error" in tree:
        click.echo(f"  does not answer: {tree['error']}")
    else:
        print_table(_TREE_COLUMNS, _tree_rows(tree["actors"]), right=("RESTARTS", "UPTIME"))
    click.echo()


async def _watch(connection: Connection, node: str | None) -> None:
    from rich.console import Group as Stack
    from rich.live import Live
    from rich.text import Text

    out = console()
    if not out.is_terminal:  # a file, or a program that reads along
        while True:
            for each in await _trees(connection, node):
                _print_tree(each)
            await asyncio.sleep(WATCH_S)
    with Live(console=out, auto_refresh=False, screen=True) as live:
        while True:
            parts: list[RenderableType] = []
            for each in await _trees(connection, node):
                parts.append(Text(_title(each), style="bold"))
                if "error" in each:
                    parts.append(Text(f"  does not answer: {each['error']}"))
                else:
                    rows = _tree_rows(each["actors"])
                    parts.append(make_table(_TREE_COLUMNS, rows, ("RESTARTS", "UPTIME")))
            live.update(Stack(*parts), refresh=True)
            await asyncio.sleep(WATCH_S)
