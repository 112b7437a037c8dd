"""``torus-node``: a storage node, or a whole cluster of them on this machine."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import click

from torus_actors.cli.common import (
    ADDRESS,
    CONTEXT,
    LIFECYCLE,
    NAMED_SIZE,
    SIZE,
    DirectoryName,
    Group,
    ParamType,
    Settings,
    SocketName,
    lease_option,
    run_main,
    version_option,
)
from torus_actors.cli.profile import data_home, expanded, read_config
from torus_actors.cli.units import format_size, parse_seconds, parse_size
from torus_actors.errors import Invalid, TorusError
from torus_actors.model.addresses import Address, format_address
from torus_actors.model.peers import NAME_LENGTH_MAX

DEFAULT_LISTEN: Address = ("127.0.0.1", 40000)

SIZE_DEFAULT = 10 << 30
SHARE_DEFAULT_PERCENT = 80
"""A new store takes the default size, but no more than this share of the free space."""

BESIDE_BYTES = 64 << 20
SHARE_REST = 50
"""No share takes all of a disk: two files of the journal need room beside the stores, and of the
whole as small a part for what file systems keep for themselves."""

_PERCENT = re.compile(r"(\d{1,3})\s*%")

REGISTERED_S = 5.0
"""How long the first registration may take before a node says that it is ready without."""

REMOVE_AFTER_S_MIN = 10
"""Below it a member would leave the ring whose lease merely has to be made again."""

WILDCARDS = ("0.0.0.0", "::", "*")


class StoreSize(ParamType):
    """``10GiB``, or ``80%``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Bytes as an int, percents as a float."""
        if not isinstance(value, str):
            return value
        percent = _PERCENT.fullmatch(value.strip())
        if percent is not None:
            if 1 <= int(percent[1]) <= 100:
                return int(percent[1]) / 100
            self.fail(f"{value!r} is no share: use 1% to 100%", param, ctx)
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(f"{error}; or as a share of the disk, 80%", param, ctx)


class RemoveAfter(ParamType):
    """``10m``, or ``never``, which is 0."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Seconds."""
        if not isinstance(value, str):
            return value
        if value.strip().lower() == "never":
            return 0.0
        try:
            seconds = parse_seconds(value)
        except ValueError as error:
            self.fail(f"{error}; or never", param, ctx)
        if seconds < REMOVE_AFTER_S_MIN:
            self.fail(f"{value} is too short: at least {REMOVE_AFTER_S_MIN} s", param, ctx)
        return seconds


class Zone(ParamType):
    """A name that metadata and nodes can carry."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The same text."""
        if len(value) > NAME_LENGTH_MAX or not value.isprintable():
            self.fail(
                f"{value[:NAME_LENGTH_MAX]!r} is no zone: use up to {NAME_LENGTH_MAX} letters, "
                "digits and the like",
                param,
                ctx,
            )
        return value


@click.group(cls=Group, context_settings=CONTEXT)
@version_option()
def cli() -> None:
    """Storage nodes of a torus-actors cluster."""


def _load_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take what a TOML file says as defaults of the other options."""
    if path is None:
        return
    import tomllib

    try:
        fields = tomllib.loads(read_config(path))
    except Invalid as error:
        raise click.BadParameter(str(error), ctx, param) from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from error
    known = {each.name: each for each in ctx.command.params}
    defaults: dict[str, Any] = {}
    for name, value in fields.items():
        option = known.get(name.replace("-", "_"))
        if option is None or option.name in ("config", "help", None):
            raise click.BadParameter(f"{path}: there is no option {name}", ctx, param)
        if not isinstance(value, (str, int, bool)):
            what = "text, a whole number, true or false"
            raise click.BadParameter(f"{path}: {name} must be {what}", ctx, param)
        if isinstance(value, str) and "\0" in value:
            raise click.BadParameter(f"{path}: there is a NUL in {name}", ctx, param)
        flag = isinstance(option, click.Option) and option.is_flag and isinstance(value, bool)
        defaults[option.name] = value if flag or option.name == "verbose" else str(value)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


@cli.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load_config,
    help="TOML file with these options by their long names; options given here win.",
)
@click.option(
    "--data-dir",
    type=DirectoryName(),
    help="Where to store everything. Default: ~/.local/share/torus-actors/node",
)
@click.option(
    "--size",
    type=StoreSize(),
    help="Disk to take: 10GiB, or 80% of what is free or taken by it, of which some stays free for "
    "the rest that a node stores. Default: what it has; "
    "for a new one 10GiB, or 80% of the free space if that is less.",
)
@click.option(
    "--listen",
    type=ADDRESS,
    default=format_address(DEFAULT_LISTEN),
    show_default=True,
    help="Where other nodes and tools connect.",
)
@click.option("--advertise", type=ADDRESS, help="Address that others are told, if not --listen.")
@click.option("--auto-join", is_flag=True, help="Enter the ring without being asked.")
@click.option(
    "--zone", type=Zone(), default="", metavar="NAME", help="Failure domain: a rack, a site."
)
@click.option(
    "--remove-after",
    type=RemoveAfter(),
    default="1h",
    show_default=True,
    metavar="TIME",
    help="Members that are gone for so long leave the ring, and their blocks are copied: 10m, 2h; "
    "or never.",
)
@click.option(
    "--rebalance-rate",
    type=SIZE,
    default="400MiB",
    show_default=True,
    help="Most that this node sends in a second when blocks move.",
)
@click.option("--http", type=ADDRESS, help="Serve /metrics, /healthz and /status there.")
@click.option("--nbd", type=ADDRESS, help="Serve every volume over NBD there.")
@click.option(
    "--insecure", is_flag=True, help="Allow addresses beyond loopback without protection."
)
@lease_option
@click.option("--with-parent", is_flag=True, hidden=True)
@click.pass_obj
def start(
    settings: Settings,
    *,
    data_dir: Path | None,
    size: int | float | None,
    listen: Address,
    advertise: Address | None,
    auto_join: bool,
    zone: str,
    remove_after: float,
    rebalance_rate: int,
    http: Address | None,
    nbd: Address | None,
    insecure: bool,
    lease: int | None,
    with_parent: bool,
) -> None:
    """Run a storage node until SIGINT, SIGTERM or SIGHUP.

    Without options, on a fresh machine, it is a cluster of its own: it keeps the metadata and is
    the only peer, with replication 1, on loopback. Wherever nothing names other metadata, it keeps
    them itself, at its own address.
    """
    from torus_actors.actors.heartbeat import LEASE_TTL_S
    from torus_actors.actors.nbd_server import NbdAddress
    from torus_actors.cli.daemon import run_daemon, serve_until_stopped
    from torus_actors.node import NodeConfig, StorageNode, start_node
    from torus_actors.process import NbdConfig, check_exposure

    secret = settings.secret()
    check_exposure(listen, secret is not None, insecure)
    if http is not None:
        check_exposure(http, False, insecure, "protection, which HTTP has not: use loopback")
    if nbd is not None:
        check_exposure(
            nbd, False, insecure, "encryption: serve NBD with torusblk serve --tls-required"
        )
    if (advertise or listen)[0] in WILDCARDS:
        raise Invalid(
            f"listening on {format_address(listen)}, others must be told an address of this "
            "machine: give --advertise HOST:PORT"
            + (f", not {format_address(advertise)}" if advertise is not None else "")
        )
    own_url = f"torus://{format_address(advertise or listen)}"
    directory = expanded(data_dir or data_home() / "node")
    config = NodeConfig(
        data_dir=directory,
        size_bytes=store_size(directory, size),
        listen=listen,
        advertise=advertise,
        metadata=settings.metadata_url(own_url),
        auto_join=auto_join,
        zone=zone,
        secret=secret,
        nbd=NbdConfig((NbdAddress(tcp=nbd),)) if nbd is not None else None,
        http=http,
        remove_after_s=remove_after or None,
        rebalance_rate_bytes_s=rebalance_rate,
        lease_ttl_s=lease or LEASE_TTL_S,
    )

    async def ready(node: StorageNode) -> None:
        assert node.view is not None
        # A node is ready when others know it; if the metadata has gone away, it is without that.
        with contextlib.suppress(TorusError):
            await node.system.actor("heartbeat").lease.remote(timeout_s=REGISTERED_S)
        role = "keeps the metadata" if node.embedded else f"metadata {config.metadata}"
        LIFECYCLE.info(
            "node %s ready on %s: %s, %s for blocks in %s",
            node.system.node_id[:8],
            format_address(listen),
            role,
            format_size(node.capacity_bytes),
            directory,
        )
        if node.system.node_id not in node.view.ring.members:
            LIFECYCLE.info(
                "not in the ring yet: torusctl peer add %s, or start it with --auto-join",
                node.system.node_id[:8],
            )

    run_daemon(settings, serve_until_stopped(lambda: start_node(config), ready, with_parent))


def store_size(directory: Path, size: int | float | None) -> int | None:
    """Bytes that a node's stores shall take; None for what they have.

    Args:
        directory: of the node; need not be there yet.
        size: bytes (int), a share of the disk (float), or None for the default.
    """
    if isinstance(size, int):
        return size
    existing = [directory / "blocks", directory / "inodes"]
    if size is None and (existing[0] / "blocks.index").exists():
        return None
    present = directory
    while not present.exists():
        present = present.parent
    room = shutil.disk_usage(present).free
    taken = sum(
        file.stat().st_size for store in existing if store.is_dir() for file in store.iterdir()
    )
    if size is not None:
        # A share moves with whatever else is on the disk: a store grows with it, but is not made
        # smaller, which might not be possible, on some later start.
        whole = room + taken
        beside = min(BESIDE_BYTES, whole // 4) + whole // SHARE_REST
        wanted = min(int(whole * size), whole - beside)
        if wanted > taken or not taken:
            return wanted
        if wanted < taken - taken // 20:
            LIFECYCLE.info(
                "the stores have %s already, and are not made smaller for a share of %d%%",
                format_size(taken),
                round(size * 100),
            )
        return None
    return min(SIZE_DEFAULT, room * SHARE_DEFAULT_PERCENT // 100)


@cli.command()
@click.option("--nodes", type=click.IntRange(1, 32), default=3, show_default=True)
@click.option(
    "--dir",
    "directory",
    type=DirectoryName(),
    help="Where to keep everything. Default: ~/.local/share/torus-actors/dev",
)
@click.option("--size", type=SIZE, default="2GiB", show_default=True, help="Disk for each node.")
@click.option(
    "--volume",
    type=NAMED_SIZE,
    default="demo:1GiB",
    show_default=True,
    metavar="NAME:SIZE",
    help="Volume to make, if it is not there.",
)
@click.option(
    "--nbd", type=ADDRESS, default="127.0.0.1:10809", show_default=True, help="NBD over TCP."
)
@click.option(
    "--unix", "unix_path", type=SocketName(), metavar="PATH", help="NBD on a unix socket too."
)
@click.option(
    "--replication",
    type=click.IntRange(1, 16),
    help="Copies of each block. Default: 2, or what the cluster has.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65000),
    default=DEFAULT_LISTEN[1],
    show_default=True,
    help="Port of the first node; the others take those behind it, the NBD process the last.",
)
@click.option("--exit-after-ready", is_flag=True, hidden=True)
@click.pass_obj
def dev(
    settings: Settings,
    *,
    nodes: int,
    directory: Path | None,
    size: int,
    volume: tuple[str, int],
    nbd: Address,
    unix_path: Path | None,
    replication: int | None,
    port: int,
    exit_after_ready: bool,
) -> None:
    """Run a cluster on this machine, with a volume served over NBD, until Ctrl-C.

    Started again with the same --dir it has the same data.
    """
    from torus_actors.cli.dev import DevCluster, DevConfig, run_dev

    if settings.metadata is not None:
        raise click.UsageError("a dev cluster keeps its own metadata: -C does not go with it")
    config = DevConfig(
        directory=expanded(directory or data_home() / "dev"),
        nodes=nodes,
        size_bytes=size,
        volume=volume,
        nbd=nbd,
        unix_path=unix_path.absolute() if unix_path is not None else None,
        replication=replication,
        port=port,
        secret_file=settings.secret_file,
        chatter=settings.chatter(),
    )
    run_dev(DevCluster(config, settings), exit_after_ready)


def main() -> None:
    """Entry point of ``torus-node``."""
    run_main(cli, "torus-node")


if __name__ == "__main__":
    main()
