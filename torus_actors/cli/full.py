"""A whole client for the time of one command: for those that read or write blocks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from torus_actors.cli.common import Settings
from torus_actors.cli.connect import PATIENCE_S, unreachable
from torus_actors.client import Client, ClientConfig, start_client
from torus_actors.errors import Again
from torus_actors.process import NbdConfig

OPEN_TIMEOUT_S = 60.0
"""For opening a volume, which may wait for its journal, and then for a commit of what that has."""


@contextlib.asynccontextmanager
async def full_client(
    settings: Settings, volume: str | None = None, read_only: bool = False
) -> AsyncIterator[Client]:
    """A client.

    Args:
        settings: where the cluster is.
        volume: has it opened by the ``volumes`` actor.
        read_only: without a lock.

    Raises:
        TorusError: there is no cluster, or the volume cannot be opened.
    """
    url = settings.metadata_url()
    nbd = None if volume is None else NbdConfig((), only=volume, read_only=read_only)
    config = ClientConfig(metadata=url, secret=settings.secret(), nbd=nbd)
    try:
        client = await start_client(config, patience_s=PATIENCE_S)
    except Again as error:
        raise unreachable(url, error) from error
    try:
        if volume is not None:
            await client.system.actor("volumes").open.remote(volume, timeout_s=OPEN_TIMEOUT_S)
        yield client
    finally:
        await client.stop()
