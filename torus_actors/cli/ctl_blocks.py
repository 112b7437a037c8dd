"""``torusctl block``: whole images into volumes and out of them."""

from __future__ import annotations

from pathlib import Path

import click

from torus_actors.cli.common import SIZE, Group, Settings, run
from torus_actors.cli.ctl_volumes import create_volume
from torus_actors.cli.units import format_size


@click.group(cls=Group)
def block() -> None:
    """Images of volumes, as files."""


@block.command("create")
@click.argument("name")
@click.argument("size", type=SIZE)
@click.pass_obj
def block_create(settings: Settings, name: str, size: int) -> None:
    """Make a volume: the same as volume create."""
    create_volume(settings, name, size)


@block.command("dump")
@click.argument("volume")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))
@click.pass_obj
def block_dump(settings: Settings, volume: str, file: Path) -> None:
    """Write the content of VOLUME, or VOLUME@SNAPSHOT, into FILE, or to standard output (-).

    Holes stay holes where FILE can have them. No lock is taken: of a volume that is in use, what it
    was at its last flush is written.
    """

    async def work() -> int:
        from torus_actors.cli.images import dump

        return await dump(settings, volume, file)

    size = run(settings, work())
    click.echo(f"dumped {format_size(size)} of data from volume {volume}", err=True)


@block.command("load")
@click.argument("volume")
@click.argument(
    "file", type=click.Path(path_type=Path, allow_dash=True, exists=True, dir_okay=False)
)
@click.option("--create", is_flag=True, help="Make the volume if there is none.")
@click.option("--size", type=SIZE, help="Its size, if not that of FILE.")
@click.pass_obj
def block_load(settings: Settings, volume: str, file: Path, create: bool, size: int | None) -> None:
    """Make FILE, or standard input (-), the content of a volume.

    What FILE does not fill reads as zeros afterwards, and zeros take no room.
    """
    if size is not None and not create:
        raise click.UsageError("--size goes with --create")
    if create and size is None and str(file) == "-":
        raise click.UsageError("how large shall it be? give --size: standard input does not say")

    async def work() -> int:
        from torus_actors.cli.images import load

        return await load(settings, volume, file, create, size)

    loaded = run(settings, work())
    click.echo(f"loaded {format_size(loaded)} of data into volume {volume}", err=True)
