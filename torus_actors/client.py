"""A client: a process that uses the cluster and stores nothing.

Its tree is that of a storage node without what concerns stored blocks. One that serves a volume
over AoE has an aoe_server in the place of the nbd_server.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass

from torus_actors.actors.control import Control
from torus_actors.actors.heartbeat import LEASE_TTL_S, Heartbeat
from torus_actors.actors.replicator import ReadLevel, WriteLevel
from torus_actors.machine import REAL_MACHINE, Machine
from torus_actors.process import DEFAULT_METADATA, Addr, AoeConfig, NbdConfig, Process, store_opener
from torus_actors.runtime import ChildSpec
from torus_actors.wire.hello import Role


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """A process that uses the cluster and stores nothing.

    Attributes:
        metadata: URL.
        listen: where ``torusctl`` may ask it; None for nowhere.
        machine: what it runs on.
    """

    metadata: str = DEFAULT_METADATA
    secret: bytes | None = None
    nbd: NbdConfig | None = None
    aoe: AoeConfig | None = None
    listen: Addr | None = None
    read_level: ReadLevel = ReadLevel.BLOCK
    write_level: WriteLevel = WriteLevel.ALL
    lease_ttl_s: int = LEASE_TTL_S
    machine: Machine = REAL_MACHINE


class Client(Process):
    """A running client; made by ``start_client``."""

    def __init__(self, config: ClientConfig, rng: random.Random) -> None:
        self.config = config
        node_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        super().__init__(node_id, Role.CLIENT, config.metadata, config.secret, rng, config.machine)

    async def start(self, patience_s: float = 5.0) -> None:
        """Start what a client needs.

        Raises:
            Again, NoGlobalMetadata: no cluster there in time.
            Unauthenticated: its nodes do not let this process in.
        """
        config = self.config
        await self.start_base(config.listen, store_opener(config.metadata))
        view = await self.load_view(patience_s)
        await self.check_admitted(view, patience_s)
        await self.start_services(
            [
                *self.common_services(config.read_level, config.write_level, False),
                ChildSpec(
                    "heartbeat",
                    lambda: Heartbeat(self.meta, None, config.lease_ttl_s),
                    max_concurrency=64,
                ),
                ChildSpec("control", lambda: Control(view, "client"), max_concurrency=16),
                *self.nbd_services(config.nbd),
                *self.aoe_services(config.aoe),
            ]
        )


async def start_client(
    config: ClientConfig, rng: random.Random | None = None, patience_s: float = 5.0
) -> Client:
    """Start a client on the running loop.

    Args:
        config: what it shall do.
        rng: all its randomness.
        patience_s: how long to wait for metadata that does not answer.

    Raises:
        TorusError: it cannot start; nothing keeps running.
    """
    client = Client(config, rng or random.Random())
    try:
        await client.start(patience_s)
    except BaseException:
        await client.stop()
        raise
    return client
