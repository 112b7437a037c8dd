"""Ways between hosts that are cut for a while."""

from __future__ import annotations

from torus_actors.scenarios.cluster import Cluster


class Cut:
    """Ways that are blocked while it lasts."""

    def __init__(self, cluster: Cluster, ways: list[tuple[str, str]]) -> None:
        self._network = cluster.network
        self._ways = ways

    def __enter__(self) -> None:
        for way in self._ways:
            self._network.block(*way)

    def __exit__(self, *_: object) -> None:
        for way in self._ways:
            self._network.unblock(*way)


def ways_of(here: str, others: list[str], only: str = "") -> tuple[list[tuple[str, str]], str]:
    """The ways between a host and others, or only out of it or into it; and which, in words."""
    out = [(here, other) for other in others]
    into = [(other, here) for other in others]
    if not only:
        return out + into, ""
    return (out, ": it cannot be heard") if only == "out" else (into, ": it hears nobody")
