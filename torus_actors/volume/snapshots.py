"""Snapshots of volumes: making one, going back to one.

A snapshot is a head that is kept under a name.
"""

from __future__ import annotations

import asyncio
import contextlib

from torus_actors.errors import (
    Again,
    CompareFailed,
    Invalid,
    LeaseNotFound,
    OutcomeUnknown,
    TorusError,
)
from torus_actors.metadata.records import Head, Snapshot, VolumeRecord
from torus_actors.metadata.service import MetadataService
from torus_actors.model import blocksets
from torus_actors.model.refs import ZERO_BLOCK
from torus_actors.runtime import ActorSystem
from torus_actors.volume.opening import DETACH_PATIENCE_S, attach, detach_later
from torus_actors.volume.recovery import is_unreplayed, recover

REQUEST_TTL_S = 10
"""A request outlives a command that was killed by so much at most."""

ASK_S_MAX = 60.0
"""How long a session has for a snapshot: a commit of a full write cache takes some seconds."""

POLL_S = 0.1

SIGN = "@"
"""Between the names of a volume and its snapshot: ``VOLUME@NAME``."""


def split_name(text: str) -> tuple[str, str | None]:
    """Volume and snapshot of ``VOLUME`` or ``VOLUME@NAME``.

    Raises:
        Invalid: there is no name behind the sign.
    """
    volume, sign, name = text.partition(SIGN)
    if sign and not name:
        raise Invalid(f"{text!r} names no snapshot: write VOLUME{SIGN}NAME")
    return volume, name if sign else None


async def take_snapshot(
    meta: MetadataService, volume_id: int, name: str, patience_s: float = ASK_S_MAX
) -> Snapshot | None:
    """Make a snapshot of a volume, in use or not.

    Args:
        meta: the metadata service.
        volume_id: the volume.
        name: of the snapshot.
        patience_s: how long the session that has the volume open may take.

    Returns:
        The snapshot. None if nobody has the volume open and it was not closed in order: what was
        flushed last is in its journal then, and whoever opens it can make the snapshot.

    Raises:
        NotExist, Exists: there is no such volume, or such a snapshot already.
        Again: the session refused, or did not answer; nothing was made.
        OutcomeUnknown: the metadata cannot be reached any more.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + patience_s
    while True:
        lock, epoch = await meta.lock_status(volume_id)
        if lock is not None:
            snapshot = await _ask_session(meta, volume_id, name, end)
            if snapshot is not None:
                return snapshot
            continue  # the session has ended meanwhile
        head, _ = await meta.head(volume_id)
        journal, _ = await meta.journal(volume_id)
        if is_unreplayed(journal, head):
            return None
        try:
            return await meta.create_snapshot(volume_id, name, epoch=epoch)
        except CompareFailed:
            if loop.time() > end:
                raise


async def _ask_session(
    meta: MetadataService, volume_id: int, name: str, end: float
) -> Snapshot | None:
    """Ask the session that has the volume open; None if it ended before it answered."""
    loop = asyncio.get_running_loop()
    lease = await meta.grant_lease(REQUEST_TTL_S)
    try:
        try:
            request = await meta.request_snapshot(volume_id, name, lease)
        except LeaseNotFound as error:
            raise Again(f"snapshot {name} was not made: {error}") from error
        renewed = loop.time()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                if loop.time() - renewed > REQUEST_TTL_S / 4:
                    # If it has ended, so has the request: what became of it is asked below.
                    with contextlib.suppress(LeaseNotFound):
                        await meta.renew_lease(lease)
                    renewed = loop.time()
                present = await meta.snapshot_request(request)
                lock, _ = await meta.lock_status(volume_id)
                if present is not None and (lock is None or loop.time() > end):
                    await meta.withdraw_request(request)
                elif present is not None and not present.error:
                    continue
                made = {each.nonce: each for each in await meta.snapshots(volume_id)}
            except (Again, OutcomeUnknown) as error:
                if loop.time() <= end:
                    continue
                raise OutcomeUnknown(
                    f"snapshot {name} may or may not be made: {error}; "
                    "look with torusctl snapshot list"
                ) from error
            if request.nonce in made:
                return made[request.nonce]
            if present is not None and present.error:
                raise Again(f"snapshot {name} was not made: {present.error}")
            if lock is None:
                return None
            raise Again(
                f"snapshot {name} was not made: {lock.holder}, which has the volume open, "
                "did not answer in time"
            )
    finally:
        with contextlib.suppress(TorusError):
            await meta.revoke_lease(lease)


async def restore_snapshot(
    system: ActorSystem,
    meta: MetadataService,
    volume: str,
    name: str,
    *,
    holder: str,
    block_size: int,
    block_spec: str,
) -> None:
    """Make a volume what it was when the snapshot was made; all that came later is lost.

    A crash on the way leaves the volume as it was, or as it shall be; its lock ends with the lease.

    Args:
        system: of a client: its lease and its ways to the journals.
        meta: the metadata service.
        volume: its name.
        name: of the snapshot.
        holder: who does it, for people.
        block_size: of the cluster.
        block_spec: of a volume that was never written to.

    Raises:
        NotExist: there is no such volume or snapshot.
        Locked: the volume is open; the text says where.
        BlockUnavailable: no member of its journal can be reached, so that a client that may still
            be writing cannot be fenced.
        Fenced, CompareFailed: somebody else came between; nothing was done.
        OutcomeUnknown: the metadata cannot be reached, or somebody came when that was over; it may
            have been done.
    """
    record = await meta.volume(volume)
    await meta.snapshot(record.id, name)
    epoch, _ = await attach(system, meta, record.id, holder)
    try:
        inode = await meta.mint_inode(record.id, 1)
        present, revision = await meta.head(record.id)
        # The last session gets nothing acknowledged any more; what it had is not wanted.
        journal, _ = await meta.journal(record.id)
        await recover(system, record.id, journal, epoch, present)
        record = await meta.volume_by_id(record.id)
        snapshot = await meta.snapshot(record.id, name)
        kept = Head.decode(snapshot.head) if snapshot.head else None
        if kept is None:
            kept = _empty_head(record, block_size, block_spec)
        head = kept.handed_to(epoch, inode)
        await meta.restore_snapshot(record, epoch, revision, snapshot, head)
    finally:
        detaching = detach_later(system, meta, record.id, epoch)
    await asyncio.wait([detaching], timeout=DETACH_PATIENCE_S)


def _empty_head(record: VolumeRecord, block_size: int, block_spec: str) -> Head:
    """Of a volume that was never written to."""
    blockset = blocksets.create_blockset(block_spec, -(-record.size // block_size))
    return Head(
        inode=0, root=ZERO_BLOCK, root_crc=0, size=record.size, epoch=0, extra=blockset.marshal()
    )
