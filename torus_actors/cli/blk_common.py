"""What the commands of ``torusblk`` share: how a volume is opened, and by whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torus_actors.cli.common import ADDRESS, SIZE, Failed, Seconds, Settings, lease_option
from torus_actors.errors import Again, Locked
from torus_actors.model.addresses import Address

if TYPE_CHECKING:
    from torus_actors.client import Client, ClientConfig
    from torus_actors.nbd.connection import TlsSettings
    from torus_actors.process import AoeConfig, NbdConfig
    from torus_actors.volume.session import CacheSizes

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

OPEN_TIMEOUT_S = 60.0

FENCED_POLL_S = 1.0
"""How often it is looked whether another client has taken the volume over."""

LOCK_POLL_S = 0.25
"""How often a lock that is waited for is tried."""

START_PATIENCE_S = 3.0
"""How long to wait for metadata that does not answer: nodes and clients of a machine that boots
are started together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """The options of `client_options`, as given."""

    read_cache: int
    write_cache: int
    listen: Address | None
    read_level: str
    write_level: str
    lease: int | None

    def check(self, settings: Settings, insecure: bool) -> None:
        """Refuse to be asked by strangers; see `check_exposure`."""
        from torus_actors.process import check_exposure

        if self.listen is not None:
            check_exposure(self.listen, settings.secret() is not None, insecure)

    def config(
        self,
        settings: Settings,
        *,
        listen: tuple[Any, ...] = (),
        only: str | None = None,
        default: str | None = None,
        read_only: bool = False,
        tls: TlsSettings | None = None,
    ) -> ClientConfig:
        """Configuration of a client with an NBD server.

        Args:
            settings: what all commands share.
            listen: where that listens, `NbdAddress`.
            only: the volume that is served, or None for every one.
            default: the unnamed export.
            read_only: take no lock, and refuse writes.
            tls: how connections are encrypted.
        """
        from torus_actors.process import NbdConfig

        nbd = NbdConfig(
            listen,
            only=only,
            default=default,
            read_only=read_only,
            caches=self.caches(),
            tls=tls,
        )
        return self.client(settings, nbd=nbd)

    def caches(self) -> CacheSizes:
        """Bounds of memory."""
        from torus_actors.volume.session import CacheSizes

        return CacheSizes(self.read_cache, self.write_cache)

    def client(
        self, settings: Settings, *, nbd: NbdConfig | None = None, aoe: AoeConfig | None = None
    ) -> ClientConfig:
        """Configuration of a client that serves as said."""
        from torus_actors.actors.heartbeat import LEASE_TTL_S
        from torus_actors.actors.replicator import ReadLevel, WriteLevel
        from torus_actors.client import ClientConfig

        return ClientConfig(
            metadata=settings.metadata_url(),
            secret=settings.secret(),
            nbd=nbd,
            aoe=aoe,
            listen=self.listen,
            read_level=ReadLevel(self.read_level),
            write_level=WriteLevel(self.write_level),
            lease_ttl_s=self.lease or LEASE_TTL_S,
        )


def client_options(command: F) -> F:
    """Options of every client that opens volumes; the fields of `ClientOptions`."""
    for option in (
        lease_option,
        click.option(
            "--write-level",
            type=click.Choice(["all", "one", "local"]),
            default="all",
            show_default=True,
            help="How many replicas must have a block before it counts as stored.",
        ),
        click.option(
            "--read-level",
            type=click.Choice(["block", "sequential", "spread"]),
            default="block",
            show_default=True,
            help="Which replicas are read from.",
        ),
        click.option("--listen", type=ADDRESS, help="Where torusctl tree may ask this process."),
        click.option(
            "--write-cache",
            type=SIZE,
            default="256MiB",
            show_default=True,
            help="Memory for each volume.",
        ),
        click.option(
            "--read-cache",
            type=SIZE,
            default="256MiB",
            show_default=True,
            help="Memory for all volumes.",
        ),
    ):
        command = option(command)
    return command


read_only_option = click.option("--read-only", is_flag=True, help="Take no lock and refuse writes.")
snapshot_option = click.option(
    "--snapshot", metavar="NAME", help="Serve this snapshot of VOLUME, read-only."
)
insecure_option = click.option(
    "--insecure", is_flag=True, help="Allow addresses beyond loopback without protection."
)
wait_lock_option = click.option(
    "--wait-lock",
    type=Seconds(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for a volume that is held elsewhere.",
)


def taken_over(volume: str, failure: str) -> Failed:
    """Why a volume is of no use here any more.

    Args:
        volume: its name.
        failure: what its session says.
    """
    if "deleted" in failure:
        return Failed(f"volume {volume}: {failure}")
    return Failed(
        f"volume {volume} was taken over by another client ({failure}): start this again to open "
        "it anew"
    )


async def start_patiently(config: ClientConfig) -> Client:
    """Start a client beside a cluster that may be about to start.

    Raises:
        Failed: no cluster answers.
        TorusError: it cannot start.
    """
    from torus_actors.cli.connect import unreachable
    from torus_actors.client import start_client

    try:
        return await start_client(config, patience_s=START_PATIENCE_S)
    except Again as error:
        raise unreachable(config.metadata, error) from error


async def once_unlocked(work: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """Do something with a volume, again and again while somebody else holds it.

    Args:
        work: it.
        patience_s: how long to wait for that.

    Raises:
        Locked: it was held for so long.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + patience_s
    while True:
        try:
            return await work()
        except Locked:
            if loop.time() >= until:
                raise
            await asyncio.sleep(LOCK_POLL_S)
