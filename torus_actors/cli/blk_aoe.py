"""``torusblk aoe``: a volume as an ATA-over-Ethernet target."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from torus_actors.aoe.protocol import ANY_SHELF, ANY_SLOT
from torus_actors.cli.blk_common import (
    OPEN_TIMEOUT_S,
    ClientOptions,
    client_options,
    once_unlocked,
    read_only_option,
    snapshot_option,
    start_patiently,
    wait_lock_option,
)
from torus_actors.cli.common import MAC, Command, Failed, Settings
from torus_actors.errors import Invalid, TorusError

if TYPE_CHECKING:
    from torus_actors.aoe.port import PacketPort
    from torus_actors.client import Client
    from torus_actors.runtime import ActorHandle

OVER_POLL_S = 1.0
"""How often it is looked whether the volume was taken over, or the interface is gone."""


@click.command(cls=Command)
@click.argument("volume")
@click.argument("interface")
@click.argument("major", type=click.IntRange(0, ANY_SHELF - 1))
@click.argument("minor", type=click.IntRange(0, ANY_SLOT - 1))
@read_only_option
@snapshot_option
@client_options
@wait_lock_option
@click.option(
    "--accept",
    multiple=True,
    type=MAC,
    metavar="MAC",
    help="Serve this hardware address only; give it again for more. It can be forged.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve whoever reaches an INTERFACE, or a --listen, that is not loopback.",
)
@click.option("--with-parent", is_flag=True, hidden=True)
@click.pass_obj
def aoe(
    settings: Settings,
    /,
    *,
    volume: str,
    interface: str,
    major: int,
    minor: int,
    read_only: bool,
    snapshot: str | None,
    wait_lock: float,
    accept: tuple[bytes, ...],
    insecure: bool,
    with_parent: bool,
    **options: Any,
) -> None:
    """Serve VOLUME over ATA over Ethernet on INTERFACE until SIGINT, SIGTERM or SIGHUP.

    Linux with its aoe module shows it as /dev/etherd/eMAJOR.MINOR; MAJOR is the shelf, 0 to 65534,
    and MINOR the slot, 0 to 254. It needs the capability CAP_NET_RAW. What is answered as written
    is durable.

    AoE knows no passwords and no encryption: whoever can send a frame to the interface can read and
    write. Hence --accept or --insecure. Hardware addresses can be forged: --accept keeps mistakes
    away and no attacker.

    When another client takes VOLUME over, every command is answered with an error. This ends then
    if nobody has read or written here; else it stays until it is stopped, because whoever has may
    still have data of before in memory, and would write them into what VOLUME is by then.
    """
    from torus_actors.actors.aoe_server import LOST
    from torus_actors.cli.daemon import run_daemon, serve_until_stopped
    from torus_actors.process import AoeConfig

    client_options = ClientOptions(**options)
    client_options.check(settings, insecure)
    if snapshot is not None:
        volume, read_only = f"{volume}@{snapshot}", True
    port = _open_port(interface, bool(accept), insecure)
    config = client_options.client(
        settings,
        aoe=AoeConfig(
            port,
            major,
            minor,
            volume,
            read_only=read_only,
            accept=frozenset(accept),
            caches=client_options.caches(),
        ),
    )
    clients: list[Client] = []

    async def open_volume(client: Client) -> None:
        clients.append(client)
        opening = client.system.actor("volumes").open
        name, size, _, only_read = await once_unlocked(
            lambda: opening.remote(volume, timeout_s=OPEN_TIMEOUT_S), wait_lock
        )
        await client.system.actor("aoe_server").serve.remote(name, size, only_read)
        click.echo(f"serving volume {volume} at e{major}.{minor} on {interface}")

    async def over(client: Client) -> None:
        await watch(client.system.actor("aoe_server"), volume)

    try:
        run_daemon(
            settings,
            serve_until_stopped(lambda: start_patiently(config), open_volume, with_parent, over),
        )
    finally:
        port.close()
    for client in clients:
        # It was told to stop: that is no success if the volume was lost before.
        failure = client.system.heirlooms.get(LOST)
        if failure:
            raise _lost(volume, failure)


def _open_port(interface: str, accepts: bool, insecure: bool) -> PacketPort:
    from torus_actors.aoe.port import PacketPort

    port = PacketPort(interface)
    if not (port.loopback or accepts or insecure):
        port.close()
        raise Invalid(
            f"refusing to serve on {interface} without --accept MAC, because AoE knows no "
            "passwords, or --insecure if the network is trusted"
        )
    return port


async def watch(server: ActorHandle, volume: str) -> None:
    """Wait until the interface is gone, or the volume was taken over and nobody has used it here.

    AoE has no connections: nobody can be seen to leave. Who has read or written may have the volume
    mounted, with data of before in memory. As long as this process is there it is told with every
    command that the volume is lost. Should this end and be started anew, under the same address, it
    would go on as if nothing had been, and write into what others have written.

    Args:
        server: the AoE server actor.
        volume: for people.

    Raises:
        Failed: now.
    """
    while True:
        await asyncio.sleep(OVER_POLL_S)
        try:
            status = await server.status.remote()
        except TorusError:
            continue  # it is being restarted
        if status.get("failure") and status["used"]:
            continue
        if status["gone"]:
            raise Failed(status["gone"])
        if status.get("failure"):
            raise _lost(volume, status["failure"])


def _lost(volume: str, failure: str) -> Failed:
    if "deleted" in failure:
        return Failed(f"volume {volume}: {failure}")
    return Failed(
        f"volume {volume} was taken over by another client ({failure}): unmount it where it is "
        "used over AoE, then start this again to open it anew"
    )
