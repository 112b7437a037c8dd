"""``torusctl volume``: making, changing, checking volumes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.common import SIZE, Failed, Group, Settings, json_option, run
from torus_actors.cli.output import print_json, print_table
from torus_actors.cli.units import format_size

if TYPE_CHECKING:
    from torus_actors.volume.audit import Audit


@click.group(cls=Group)
def volume() -> None:
    """Volumes."""


@volume.command("list")
@json_option
@click.pass_obj
def volume_list(settings: Settings, as_json: bool) -> None:
    """List volumes, and who has them open."""

    async def work() -> list[dict[str, Any]]:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            await connection.cluster()
            state = await connection.meta.state()
        rows = []
        for record in state.volumes.values():
            lock = state.locks.get(record.id)
            rows.append(
                {
                    "name": record.name,
                    "id": record.id,
                    "kind": record.kind,
                    "size": record.size,
                    "created": record.created,
                    "epoch": state.epochs.get(record.id, 0),
                    "holder": None if lock is None else lock.holder,
                }
            )
        return sorted(rows, key=lambda row: str(row["name"]))

    rows = run(settings, work())
    if as_json:
        print_json(rows)
        return
    print_table(
        ("NAME", "SIZE", "KIND", "EPOCH", "OPEN AT"),
        [
            (
                row["name"],
                format_size(row["size"]),
                row["kind"],
                str(row["epoch"]),
                row["holder"] or "-",
            )
            for row in rows
        ],
        right=("SIZE", "EPOCH"),
    )


def create_volume(settings: Settings, name: str, size: int) -> None:
    """Make a volume and say so."""

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            await connection.patiently(connection.meta.create_volume, name, size)

    run(settings, work())
    click.echo(f"volume {name}: {format_size(size)}")


@volume.command("create")
@click.argument("name")
@click.argument("size", type=SIZE)
@click.pass_obj
def volume_create(settings: Settings, name: str, size: int) -> None:
    """Make a volume; it takes room as it is written to."""
    create_volume(settings, name, size)


@volume.command("create-block")
@click.argument("name")
@click.argument("size", type=SIZE)
@click.pass_obj
def volume_create_block(settings: Settings, name: str, size: int) -> None:
    """The same as create."""
    create_volume(settings, name, size)


@volume.command("delete")
@click.argument("name")
@click.pass_obj
def volume_delete(settings: Settings, name: str) -> None:
    """Delete a volume, with all that is in it, and its snapshots."""

    async def work() -> int:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            meta = connection.meta
            record = await connection.patiently(meta.volume, name)
            snapshots = await meta.snapshots(record.id)
            await connection.patiently(meta.delete_volume, name)
            return len(snapshots)

    click.echo(f"volume {name}{_with(run(settings, work()))} deleted")


@volume.command("resize")
@click.argument("name")
@click.argument("size", type=SIZE)
@click.option("--shrink", is_flag=True, help="Allow to cut off the end, and what is in it.")
@click.pass_obj
def volume_resize(settings: Settings, name: str, size: int, shrink: bool) -> None:
    """Give a volume another size; a client that has it open sees it when it opens it again.

    To be made smaller it must not be open anywhere.
    """

    async def work() -> str:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            meta = connection.meta
            record = await connection.patiently(meta.volume, name)
            if size >= record.size:
                lock, _ = await meta.lock_status(record.id)
                await meta.resize_volume(name, size)
                if lock is None:
                    return ""
                return f"; {lock.holder} has it open, and must open it again"
        if not shrink:
            raise Failed(
                f"volume {name} has {format_size(record.size)}, and {format_size(size)} "
                "would cut off its end: give --shrink if that is wanted"
            )
        await cut_off()
        return ""

    async def cut_off() -> None:
        from torus_actors.cli.full import full_client
        from torus_actors.volume.resizing import shrink_volume

        async with full_client(settings) as client:
            assert client.view is not None
            await shrink_volume(
                client.system,
                client.meta,
                client.view,
                name,
                size,
                holder=client.machine.process_name(),
            )

    note = run(settings, work())
    click.echo(f"volume {name}: {format_size(size)}{note}")


@volume.command("clone")
@click.argument("source")
@click.argument("name")
@click.pass_obj
def volume_clone(settings: Settings, source: str, name: str) -> None:
    """Make a volume with the content of SOURCE, which nobody may have open; they share blocks."""
    if "@" in source:
        raise Failed(
            f"{source} is a snapshot, and only volumes can be cloned: copy it, with torusctl block "
            f"dump {source} FILE and torusctl block load NAME FILE --create"
        )

    async def work() -> int:
        from torus_actors.cli.connect import connect
        from torus_actors.metadata.volumes import Origin
        from torus_actors.volume.recovery import is_unreplayed

        async with connect(settings) as connection:
            meta = connection.meta
            origin = await connection.patiently(meta.volume, source)
            lock, epoch = await meta.lock_status(origin.id)
            if lock is not None:
                raise Failed(f"volume {source} is held by {lock.holder}: close it there first")
            head, revision = await meta.head(origin.id)
            journal, _ = await meta.journal(origin.id)
            if is_unreplayed(journal, head):
                raise Failed(
                    f"volume {source} was not closed in order, and its last flushes are in its "
                    f"journal: torusctl snapshot create {source}@NAME puts them into the volume, "
                    "then clone it"
                )
            if head is not None:
                # The clone has sessions and INode numbers of its own, and there were none yet: by
                # the origin's number a collector would take its first blocks for old ones.
                head = head.handed_to(0, 0)
            made_of = Origin(origin.id, epoch, revision)
            await meta.create_volume(name, origin.size, origin.kind, head=head, origin=made_of)
            return origin.size

    size = run(settings, work())
    click.echo(f"volume {name}: {format_size(size)}, a clone of {source}")


@volume.command("check")
@click.argument("name")
@click.option("--deep", is_flag=True, help="Have every copy read and verified.")
@json_option
@click.pass_obj
def volume_check(settings: Settings, name: str, deep: bool, as_json: bool) -> None:
    """Count the good copies of every block; fails if any block has too few.

    It fails too if a member of the volume's journal has not all that was flushed since the last
    commit; with --deep it has the journal read, too.
    The blocks of the volume's snapshots are checked with it; NAME may also be VOLUME@SNAPSHOT.
    """

    async def work() -> Audit:
        from torus_actors.cli.full import full_client
        from torus_actors.cli.progress import progress_bar
        from torus_actors.volume.audit import audit_volume

        async with full_client(settings) as client:
            assert client.view is not None
            with progress_bar(f"checking {name}", None, "blocks") as advance:
                return await audit_volume(
                    client.system, client.meta, client.view, name, deep=deep, progress=advance
                )

    from torus_actors.volume.audit import explain

    audit = run(settings, work())
    if as_json:
        print_json({**dataclasses.asdict(audit), "good": audit.good})
    else:
        how = "read and verified" if deep else "looked up"
        click.echo(
            f"volume {name}{_with(audit.snapshots) if '@' not in name else ''}: {audit.blocks} "
            f"blocks, {audit.pages} of them INode pages; copies wanted: {audit.wanted}; {how}"
        )
        for count, what in (
            (audit.exact, "with as many good copies as wanted"),
            (audit.more, "with more"),
            (audit.fewer, "with fewer"),
            (audit.missing, "without any good copy"),
            (audit.corrupt, "with a damaged copy"),
            (audit.misplaced, "with a copy elsewhere instead of at an owner"),
        ):
            click.echo(f"{count:8}  {what}")
        if audit.journal:
            there = len(audit.journal) - len(audit.journal_lost)
            click.echo(
                f"what was flushed last is in its journal: {there} of {len(audit.journal)} members "
                "have it"
            )
        for example in audit.examples:
            click.echo(f"block {example}")
    problem = explain(audit)
    if problem is not None:
        raise problem


def _with(snapshots: int) -> str:
    if not snapshots:
        return ""
    return " with 1 snapshot" if snapshots == 1 else f" with {snapshots} snapshots"
