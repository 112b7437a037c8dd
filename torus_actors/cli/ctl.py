"""``torusctl``: looks after a cluster."""

from __future__ import annotations

import click

from torus_actors.cli.common import CONTEXT, Group, run_main, version_option
from torus_actors.cli.ctl_blocks import block
from torus_actors.cli.ctl_cluster import init, status, tree, wipe
from torus_actors.cli.ctl_debug import debug
from torus_actors.cli.ctl_ring import peer, ring
from torus_actors.cli.ctl_self import completion, config, version
from torus_actors.cli.ctl_snapshots import snapshot
from torus_actors.cli.ctl_volumes import volume


@click.group(cls=Group, context_settings=CONTEXT)
@version_option()
def cli() -> None:
    """Look after a torus-actors cluster."""


for _command in (
    init,
    wipe,
    status,
    tree,
    peer,
    ring,
    volume,
    block,
    snapshot,
    config,
    completion,
    version,
    debug,
):
    cli.add_command(_command)


def main() -> None:
    """Entry point of ``torusctl``."""
    run_main(cli, "torusctl")


if __name__ == "__main__":
    main()
