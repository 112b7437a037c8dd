"""Making a volume smaller: what is cut off is gone, also when the volume grows again.

A larger size is a matter of the volume's record: what it adds is zeros. A smaller one is a commit,
of a session that has nothing else to do: it fences whoever was there, takes over what the journal
has, and records the head without the end, and the volume's size, in one transaction. Whoever opens
the volume after a crash finds it whole, or cut.
"""

from __future__ import annotations

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import OutcomeUnknown, TorusError
from torus_actors.metadata.service import MetadataService
from torus_actors.runtime import ActorSystem
from torus_actors.volume.opening import commit_and_close, open_for_tool


async def shrink_volume(
    system: ActorSystem,
    meta: MetadataService,
    view: ClusterView,
    name: str,
    size: int,
    *,
    holder: str,
) -> None:
    """Cut the end of a volume off.

    Args:
        system: of a client: its lease, its ways to the journals and to the blocks.
        meta: the metadata service.
        view: the cluster as last seen.
        name: of the volume.
        size: bytes; not more than it has.
        holder: who does it, for people.

    Raises:
        NotExist, Locked, Again, BlockUnavailable, Fenced: it cannot be opened; nothing was done.
        Invalid: it is smaller already; nothing was done.
        OutcomeUnknown: it could not be committed, or nobody knows.
    """
    session = await open_for_tool(system, meta, view, name, holder=holder, shrink_to=size)
    failure: TorusError | None = None
    try:
        await commit_and_close(session, meta)
    except TorusError as error:
        failure = error
    if session.heads.resizing:
        raise OutcomeUnknown(
            f"volume {name} may or may not be smaller now: "
            f"{failure or session.file.failure}; look with torusctl volume list"
        ) from failure
