"""``torusctl snapshot``: versions of volumes that are kept, and going back to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.common import Group, Settings, json_option, run
from torus_actors.cli.output import print_json, print_table
from torus_actors.cli.units import format_moment, format_size
from torus_actors.errors import NotExist

if TYPE_CHECKING:
    from torus_actors.metadata.records import Snapshot


@click.group(cls=Group)
def snapshot() -> None:
    """Versions of volumes that are kept under a name: VOLUME@NAME."""


def _named(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, str]:
    volume, sign, name = value.partition("@")
    if not volume or not sign or not name:
        raise click.BadParameter(f"{value!r} is no VOLUME@NAME", ctx, param)
    return volume, name


_target = click.argument("target", metavar="VOLUME@NAME", callback=_named)


@snapshot.command("list")
@click.argument("volume", required=False)
@json_option
@click.pass_obj
def snapshot_list(settings: Settings, volume: str | None, as_json: bool) -> None:
    """List the snapshots of VOLUME, or of all volumes."""

    async def work() -> list[dict[str, Any]]:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            await connection.cluster()
            state = await connection.meta.state()
        names = {record.id: record.name for record in state.volumes.values()}
        if volume is not None and volume not in names.values():
            raise NotExist(f"there is no volume {volume}")
        rows = [
            {
                "volume": names[each.volume_id],
                "name": each.name,
                "size": each.size,
                "created": each.created,
            }
            for each in state.snapshots
            if each.volume_id in names and volume in (None, names[each.volume_id])
        ]
        return sorted(rows, key=lambda row: (row["volume"], row["created"]))

    rows = run(settings, work())
    if as_json:
        print_json(rows)
        return
    print_table(
        ("SNAPSHOT", "SIZE", "CREATED"),
        [
            (
                f"{row['volume']}@{row['name']}",
                format_size(row["size"]),
                format_moment(row["created"]),
            )
            for row in rows
        ],
        right=("SIZE",),
    )


@snapshot.command("create")
@_target
@click.pass_obj
def snapshot_create(settings: Settings, target: tuple[str, str]) -> None:
    """Keep what VOLUME is now under NAME; it takes room only for what is overwritten later.

    A volume may be in use: the process that has it open is asked, by way of the metadata, and
    everything that it acknowledged before is in the snapshot.
    """
    volume, name = target

    async def direct() -> Snapshot | None:
        from torus_actors.cli.connect import connect
        from torus_actors.volume.snapshots import take_snapshot

        async with connect(settings) as connection:
            record = await connection.patiently(connection.meta.volume, volume)
            return await take_snapshot(connection.meta, record.id, name)

    async def replayed() -> None:
        """It was not closed in order: open it, which replays its journal."""
        from torus_actors.cli.full import full_client
        from torus_actors.volume.snapshots import take_snapshot

        async with full_client(settings, volume) as client:
            record = await client.meta.volume(volume)
            if await take_snapshot(client.meta, record.id, name) is None:
                raise NotExist(f"volume {volume} was closed while snapshot {name} was made")

    async def work() -> None:
        if await direct() is None:
            await replayed()

    run(settings, work())
    click.echo(f"snapshot {volume}@{name} made")


@snapshot.command("delete")
@_target
@click.pass_obj
def snapshot_delete(settings: Settings, target: tuple[str, str]) -> None:
    """Let a snapshot go; what only it needs is collected, once nobody reads it any more."""
    volume, name = target

    async def work() -> None:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            record = await connection.patiently(connection.meta.volume, volume)
            await connection.meta.delete_snapshot(record.id, name)

    run(settings, work())
    click.echo(f"snapshot {volume}@{name} deleted")


@snapshot.command("restore")
@_target
@click.pass_obj
def snapshot_restore(settings: Settings, target: tuple[str, str]) -> None:
    """Make VOLUME, which nobody may have open, what it was; what came later is lost.

    To keep that too, make another snapshot first.
    """
    volume, name = target

    async def work() -> None:
        from torus_actors.cli.full import full_client
        from torus_actors.volume.snapshots import restore_snapshot

        async with full_client(settings) as client:
            assert client.view is not None
            await restore_snapshot(
                client.system,
                client.meta,
                volume,
                name,
                holder=client.machine.process_name(),
                block_size=client.view.block_size,
                block_spec=client.view.gmd.block_spec,
            )

    run(settings, work())
    click.echo(f"volume {volume} is what it was at snapshot {name}")
