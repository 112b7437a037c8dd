"""``torusblk``: volumes as block devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from torus_actors.cli.blk_aoe import aoe
from torus_actors.cli.blk_common import (
    FENCED_POLL_S,
    OPEN_TIMEOUT_S,
    ClientOptions,
    client_options,
    insecure_option,
    once_unlocked,
    read_only_option,
    snapshot_option,
    start_patiently,
    taken_over,
    wait_lock_option,
)
from torus_actors.cli.blk_nbd import nbd
from torus_actors.cli.common import (
    ADDRESS,
    CONTEXT,
    Group,
    Settings,
    SocketName,
    run_main,
    version_option,
    warn_of_strangers,
)
from torus_actors.errors import Invalid, TorusError
from torus_actors.model.addresses import Address, format_address

if TYPE_CHECKING:
    import ssl

    from torus_actors.client import Client
    from torus_actors.runtime import ActorHandle


@click.group(cls=Group, context_settings=CONTEXT)
@version_option()
def cli() -> None:
    """Volumes of a torus-actors cluster as block devices."""


cli.add_command(nbd)
cli.add_command(aoe)


@cli.command()
@click.argument("volume", required=False)
@click.option(
    "--unix",
    "paths",
    multiple=True,
    type=SocketName(),
    metavar="PATH",
    help="Serve on a unix socket.",
)
@click.option("--tcp", "tcp", multiple=True, type=ADDRESS, help="Serve on TCP.")
@read_only_option
@snapshot_option
@client_options
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--tls-required", is_flag=True, help="Refuse NBD clients that do not start TLS.")
@click.option(
    "--default-export", metavar="VOLUME", help="With no VOLUME: what the unnamed export is."
)
@wait_lock_option
@insecure_option
@click.option("--with-parent", is_flag=True, hidden=True)
@click.pass_obj
def serve(
    settings: Settings,
    /,
    *,
    volume: str | None,
    paths: tuple[Path, ...],
    tcp: tuple[Address, ...],
    read_only: bool,
    snapshot: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_required: bool,
    default_export: str | None,
    wait_lock: float,
    insecure: bool,
    with_parent: bool,
    **options: Any,
) -> None:
    """Serve VOLUME over NBD until it is told to stop; without it, every volume by its name.

    That is by SIGINT, SIGTERM or SIGHUP.

    VOLUME is opened at once and kept, until another client has taken it over and those that used it
    here have left; otherwise a volume is opened when a client asks for it, and a snapshot by
    VOLUME@NAME.
    """
    if snapshot is not None and volume is None:
        raise click.UsageError("--snapshot goes with a VOLUME")
    if not paths and not tcp:
        raise click.UsageError("where to serve? give --unix PATH or --tcp HOST:PORT")
    if (tls_cert is None) != (tls_key is None) or (tls_required and tls_cert is None):
        raise click.UsageError("TLS needs both --tls-cert and --tls-key")
    if volume is not None and default_export is not None:
        raise click.UsageError("--default-export goes with no VOLUME: VOLUME is the default")
    from torus_actors.actors.nbd_server import NbdAddress
    from torus_actors.cli.daemon import run_daemon, serve_until_stopped
    from torus_actors.metadata.records import check_name
    from torus_actors.nbd.connection import TlsSettings
    from torus_actors.process import check_exposure
    from torus_actors.volume.snapshots import split_name

    if default_export is not None:
        try:
            check_name(split_name(default_export)[0])
        except Invalid as error:
            raise click.BadParameter(str(error), param_hint="--default-export") from error
    client = ClientOptions(**options)
    if snapshot is not None:
        volume, read_only = f"{volume}@{snapshot}", True
    for address in tcp:
        check_exposure(
            address, tls_required, insecure, "TLS: give --tls-cert, --tls-key and --tls-required"
        )
    client.check(settings, insecure)
    tls: TlsSettings | None = None
    if tls_cert is not None and tls_key is not None:
        tls = TlsSettings(_tls_context(tls_cert, tls_key), tls_required)
    sockets = [path.absolute() for path in paths]
    addresses = [NbdAddress(path=str(path)) for path in sockets]
    addresses += [NbdAddress(tcp=address) for address in tcp]
    config = client.config(
        settings,
        listen=tuple(addresses),
        only=volume,
        default=default_export,
        read_only=read_only,
        tls=tls,
    )
    shown = default_export if volume is None else volume
    scheme = "nbds" if tls_required else "nbd"
    uris = [f"{scheme}+unix:///{shown or ''}?socket={quote(os.fsencode(path))}" for path in sockets]
    uris += [f"{scheme}://{format_address(address)}/{shown or ''}" for address in tcp]

    async def open_volume(client: Client) -> None:
        opening = client.system.actor("volumes").open
        if volume is not None:
            await once_unlocked(lambda: opening.remote(volume, timeout_s=OPEN_TIMEOUT_S), wait_lock)
        what = f"volume {volume}" if volume is not None else "every volume"
        click.echo(f"serving {what} at {' and '.join(uris)}")

    async def over(client: Client) -> None:
        assert volume is not None
        await fenced_and_left(client.system.actor("volumes"), volume)

    run_daemon(
        settings,
        serve_until_stopped(
            lambda: start_patiently(config),
            open_volume,
            with_parent,
            None if volume is None else over,
        ),
    )


async def fenced_and_left(volumes: ActorHandle, volume: str) -> None:
    """Wait until another client has taken the volume over, and those that used it here have left.

    Those are told with each write and flush (ESHUTDOWN), and a new one is let in nowhere: it would
    find what the volume was. When they have left, whoever started this can start it again, and it
    opens what the volume is then. It must not end under them: one that connects again by itself
    would write on, into a volume that others have written to, and never know.

    Raises:
        Failed: now.
    """
    import asyncio

    while True:
        await asyncio.sleep(FENCED_POLL_S)
        try:
            rows = await volumes.status.remote()
        except TorusError:
            continue  # it is being restarted
        for row in rows:
            # One user is the command itself.
            if row["name"] == volume and row["fenced"] and row["users"] <= 1:
                raise taken_over(volume, row["failure"])


def _tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
        warn_of_strangers("private key", str(key), key.stat())
    except OSError as error:
        no_pem = "one of them is no PEM, or not the one it should be"
        why = error.reason or no_pem if isinstance(error, ssl.SSLError) else error.strerror
        raise Invalid(f"cannot use {cert} with {key} for TLS: {why or error}") from error
    return context


def main() -> None:
    """Entry point of ``torusblk``."""
    run_main(cli, "torusblk")


if __name__ == "__main__":
    main()
