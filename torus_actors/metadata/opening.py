"""From a metadata URL to a service."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable

from torus_actors.errors import Invalid, NotSupported
from torus_actors.metadata.keys import PREFIX
from torus_actors.metadata.kv import KeyValueStore
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.service import MetadataService

Opener = Callable[[str], Awaitable[KeyValueStore]]
"""Opens a store; the argument is what follows ``SCHEME:``, without a leading ``//``."""

USAGE = "use etcd://HOST:PORT[,HOST:PORT...], torus://HOST:PORT or memory://"


async def _open_memory(rest: str) -> KeyValueStore:
    if rest:
        raise Invalid(f"memory:// takes no address, not {rest!r}")
    return MemoryStore()


async def _open_sqlite(rest: str) -> KeyValueStore:
    # Here and below: a client of etcd need not load SQLite, and only it needs gRPC.
    from torus_actors.metadata.sqlite import SqliteStore

    if not rest:
        raise Invalid("sqlite: needs the path of a file")
    return await SqliteStore.open(rest)


async def _open_etcd(rest: str) -> KeyValueStore:
    from torus_actors.metadata.etcd import EtcdStore

    return EtcdStore(endpoints_of(rest))


async def _open_torus(rest: str) -> KeyValueStore:
    raise NotSupported(f"no opener for torus://{rest} is registered in this process")


SCHEMES: dict[str, Opener] = {
    "memory": _open_memory,
    "sqlite": _open_sqlite,
    "etcd": _open_etcd,
    "torus": _open_torus,
}
"""How each kind of URL is opened; a node registers its own opener for ``torus``."""


async def open_metadata(
    url: str,
    *,
    schemes: dict[str, Opener] = SCHEMES,
    rng: random.Random | None = None,
    wall_clock: Callable[[], float] = time.time,
    prefix: str = PREFIX,
) -> MetadataService:
    """Open the metadata service at a URL. It need not be reachable yet.

    Args:
        url: ``etcd://HOST:PORT[,HOST:PORT...]``, ``torus://HOST:PORT``, ``memory://`` (a new, empty
            store each time) or ``sqlite:PATH``.
        schemes: openers by scheme.
        rng: jitter and nonces; seeded by the system unless given.
        wall_clock: seconds since 1970, for people to read.
        prefix: of all keys.

    Raises:
        Invalid: the URL is none of these.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in schemes:
        raise Invalid(f"{url!r} is no metadata URL: {USAGE}")
    if scheme != "sqlite":
        if not rest.startswith("//"):
            raise Invalid(f"{url!r} is no metadata URL: {USAGE}")
        rest = rest[2:].removesuffix("/")
    store = await schemes[scheme](rest)
    return MetadataService(store, rng=rng or random.Random(), wall_clock=wall_clock, prefix=prefix)


def endpoints_of(rest: str) -> list[str]:
    """The addresses in ``HOST:PORT[,HOST:PORT...]``.

    Raises:
        Invalid: one of them is none.
    """
    endpoints = rest.split(",")
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
        if not host or not 0 < number < 65536 or set(host) & set("/@?# "):
            raise Invalid(f"{endpoint!r} is no HOST:PORT: {USAGE}")
    return endpoints
