"""Nodes by id: what a person types, and what a person is shown."""

from __future__ import annotations

from collections.abc import Iterable

from torus_actors.errors import Invalid, NotExist

SHORT_ID = 8
"""Characters of an id that are shown: enough to tell a few hundred nodes apart."""


def short(node_id: str) -> str:
    """The beginning of an id; an address is left as it is."""
    return node_id if node_id.startswith("@") else node_id[:SHORT_ID]


def pick(prefix: str, ids: Iterable[str], what: str) -> str:
    """The one id that begins with ``prefix``.

    Raises:
        NotExist: none does.
        Invalid: several do, or it is empty.
    """
    if not prefix:
        raise Invalid("'' is no id: give the beginning of one that torusctl peer list shows")
    found = sorted(each for each in ids if each.startswith(prefix.lower()))
    if not found:
        raise NotExist(
            f"no {what} has an id that begins with {prefix}: torusctl peer list shows those there "
            "are"
        )
    if len(found) > 1:
        raise Invalid(
            f"{prefix} is the beginning of {len(found)} ids "
            f"({', '.join(map(short, found))}): give more of it"
        )
    return found[0]
