"""Giving up a journal that nobody has any more.

What was flushed after the last commit is in the journal of the session that did so, on as many
nodes as there are copies. Where that session crashed and all of these nodes are lost for good the
volume cannot be opened, though its last head and the blocks of that are still there. Only a person
can know that no member will come back, so only a person can give the journal up.
"""

from __future__ import annotations

from torus_actors.actors.ring_watcher import ClusterView
from torus_actors.errors import OutcomeUnknown
from torus_actors.metadata.service import MetadataService
from torus_actors.runtime import ActorSystem
from torus_actors.volume.opening import commit_and_close, open_for_tool


async def give_up_journal(
    system: ActorSystem,
    meta: MetadataService,
    view: ClusterView,
    name: str,
    *,
    holder: str,
) -> str:
    """Go back to a volume's last head, if nobody can read its journal.

    A journal that can be read is replayed and committed instead, and nothing is lost. Where this is
    cut off, or fails before the head is recorded, the volume is as it was.

    Args:
        system: of a client: its lease, its ways to the journals and to the blocks.
        meta: the metadata service.
        view: the cluster as last seen.
        name: of the volume.
        holder: who does it, for people.

    Returns:
        Why the journal could not be read; empty if it could, or if there was none.

    Raises:
        NotExist, Locked, Again, Fenced: it cannot be opened; nothing was done.
        BlockUnavailable: a member may be back: it is in the ring, and has not said that it has lost
            the journal; nothing was done.
        OutcomeUnknown: it could not be committed, or nobody knows.
    """
    session = await open_for_tool(system, meta, view, name, holder=holder, may_lose_journal=True)
    await commit_and_close(session, meta)
    if not session.all_covered:
        raise OutcomeUnknown(
            f"whether volume {name} can be opened now is not known: "
            f"{session.file.failure or 'its head may not be recorded'}; try again"
        )
    return session.lost_journal
