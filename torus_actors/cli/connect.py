"""How one-shot commands reach the cluster: a bridge, the metadata, and nothing else.

A whole client (caches, replicator, lease) takes longer to load than most commands run. This one
has what it takes to read and change metadata and to ask nodes how they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

from torus_actors import __version__
from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.actors.metadata import ActorStore, MetadataActor
from torus_actors.cli.common import Settings
from torus_actors.errors import (
    ActorNotFound,
    Again,
    DeadlineExceeded,
    Invalid,
    PeerLost,
    TorusError,
)
from torus_actors.metadata.kv import KeyValueStore
from torus_actors.metadata.patience import Backoff, refusal
from torus_actors.metadata.records import GlobalMetadata, PeerInfo
from torus_actors.metadata.service import MetadataService
from torus_actors.model import rings
from torus_actors.model.addresses import format_address, parse_address
from torus_actors.model.rings import Ring
from torus_actors.runtime import ActorSystem, ChildSpec, SupervisorSpec
from torus_actors.wire.hello import Identity, Role

PATIENCE_S = 1.5
"""How long a command waits for metadata that does not answer: long enough for a node that is just
being restarted by its supervisor."""

ASK_TIMEOUT_S = 2.5
"""For questions to one node; its control actor waits 2 s for each of its own."""

T = TypeVar("T")
P = ParamSpec("P")


class Connection:
    """A process that asks and stores nothing; made by ``connect``.

    Attributes:
        url: of the metadata.
        meta: the metadata service.
    """

    def __init__(self, url: str, secret: bytes | None) -> None:
        self.url = url
        self._rng = random.Random()
        node_id = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        self.system = ActorSystem(asyncio.get_running_loop(), node_id=node_id, rng=self._rng)
        self._identity = Identity(
            None, node_id, Role.CLIENT, self._rng.getrandbits(63), f"torus-actors/{__version__}"
        )
        self._secret = secret
        self._opened: KeyValueStore | None = None
        target = f"@{url.removeprefix('torus://')}" if url.startswith("torus://") else None
        store = ActorStore(self.system.actor("metadata", node=target))
        self.meta = MetadataService(store, rng=self._rng, wall_clock=time.time)

    async def start(self) -> None:
        """Start bridge and, for etcd, the metadata actor."""
        config = BridgeConfig(self._identity, None, self._secret)
        children = [ChildSpec("bridge", lambda: Bridge(config))]
        if not self.url.startswith("torus://"):
            # Only here: it loads the whole node.
            from torus_actors.process import store_opener

            opener = store_opener(self.url)
            assert opener is not None
            self._opened = opened = await opener()
            children.append(ChildSpec("metadata", lambda: MetadataActor(opened)))
        await self.system.start(SupervisorSpec("tool", tuple(children)))

    async def stop(self) -> None:
        """Close the connections."""
        await self.system.stop()
        if self._opened is not None:
            await self._opened.close()

    async def patiently(
        self, ask: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Ask the metadata; where it cannot be reached, a little longer.

        Raises:
            Again: it was not reached; one line that says what to do.
            Unauthenticated, ProtocolError: it is not for this process, or something else.
        """
        until = self.system.loop.time() + PATIENCE_S
        backoff = Backoff(self._rng, first_s=0.1, max_s=0.5)
        while True:
            try:
                return await ask(*args, **kwargs)
            except Again as error:
                refused = refusal(error, self.url)
                if refused is not None:
                    raise refused from error
                if not await backoff.wait(until):
                    raise unreachable(self.url, error) from error

    async def cluster(self) -> tuple[GlobalMetadata, Ring]:
        """Global metadata and ring; from here on only nodes of this cluster are talked to.

        Raises:
            NoGlobalMetadata: there is no cluster yet.
        """
        gmd = await self.patiently(self.meta.global_metadata)
        data, _ = await self.meta.ring()
        await self.system.actor("bridge").set_cluster.remote(gmd.cluster_id)
        return gmd, rings.unmarshal(data)

    async def ask(self, address: str, actor: str, method: str, *args: Any) -> Any:
        """Ask an actor of the node at an address."""
        handle = getattr(self.system.actor(actor, node=f"@{address}"), method)
        return await handle.remote(*args, timeout_s=ASK_TIMEOUT_S)

    async def ask_all(self, addresses: list[str], actor: str, method: str, *args: Any) -> list[Any]:
        """Ask many at once; a TorusError stands for the answer of one that gave none."""
        answers = await asyncio.gather(
            *[self.ask(address, actor, method, *args) for address in addresses],
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, TorusError):
                raise answer
        return answers

    async def find_node(self, name: str) -> tuple[str, str]:
        """A node by ``@HOST:PORT``, or by the beginning of its id.

        Returns:
            Its id, or what was given if only the address is known; and its address.

        Raises:
            NotExist, Invalid: no node, or several.
        """
        from torus_actors.cli.nodes import pick

        if name.startswith("@"):
            try:
                return name, format_address(parse_address(name[1:]))
            except ValueError as error:
                raise Invalid(str(error)) from error
        _, ring = await self.cluster()
        known = {peer.peer_id: peer.address for peer in ring.peers}
        registered: list[PeerInfo] = await self.meta.peers()
        known.update({info.peer_id: info.address for info in registered})
        node = pick(name, known, "node")
        return node, known[node]


def unreachable(url: str, error: TorusError) -> Again:
    """What a person is told when the metadata is not there."""
    cause: BaseException = error
    while isinstance(cause, (Again, PeerLost)) and isinstance(cause.__cause__, TorusError):
        cause = cause.__cause__
    # "the metadata cannot be reached: 127.0.0.1:40000 cannot be reached: connection refused"
    reason = str(cause).rpartition("cannot be reached: ")[2]
    if url.startswith("etcd:"):
        # "etcd at ...: failed to connect to ...; last error: ...: Connection refused; nothing ..."
        reason = reason.removesuffix("; nothing was changed").rpartition(": ")[2].lower()
        reason = reason.removesuffix("]")  # of a name that is not found; gRPC puts that in brackets
    if isinstance(cause, DeadlineExceeded):
        reason = "no answer"
    hint = "is a node running? start one with: torus-node start"
    if isinstance(cause, ActorNotFound) and url.startswith("torus:"):
        reason = "the node there does not keep it"
        hint = "give the URL that the node was started with"
    if url.startswith("etcd:"):
        hint = "is etcd running?"
    return Again(f"cannot reach the metadata at {url}: {reason}; {hint}")


@contextlib.asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[Connection]:
    """A connection for the time of one command."""
    connection = Connection(settings.metadata_url(), settings.secret())
    try:
        await connection.start()
        yield connection
    finally:
        await connection.stop()
