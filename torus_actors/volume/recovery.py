"""Reading the journal of a session that has ended: from any one member, once all are fenced.

What every member recorded in the metadata has is all that was acknowledged, so one of them is
enough; what one has beyond the others was never acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from torus_actors.errors import (
    BlockUnavailable,
    Corruption,
    Fenced,
    Invalid,
    NotExist,
    OutcomeUnknown,
    TorusError,
)
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.records import Head, Journal
from torus_actors.runtime import ActorSystem
from torus_actors.volume.change_log import Replay
from torus_actors.volume.journal import APPEND_TIMEOUT_S

log = logging.getLogger(__name__)

RECOVER_PATIENCE_S = 15.0
"""How long opening a volume waits for one member of the last session's journal."""

READ_BYTES = 4 << 20

LOST = (BlockUnavailable, Corruption)
"""By these a member says itself that it has not got all records."""


def is_unreplayed(journal: Journal | None, head: Head | None) -> bool:
    """Whether a journal may hold what the head, read after it, does not have."""
    head_epoch = head.journal_epoch if head is not None else 0
    return journal is not None and journal.epoch >= head_epoch and bool(journal.ensemble)


def is_closed(journal: Journal | None, epoch: int) -> bool:
    """Whether the session before this one was closed in order, or there was none."""
    return epoch <= 1 or journal == Journal(epoch=epoch - 1, ensemble=())


class Unreadable(BlockUnavailable):
    """No member of a journal can be read.

    Attributes:
        silent: members that did not say themselves that they have lost it: they may be back.
        remedy: what may make it readable.
    """

    def __init__(self, text: str, silent: Sequence[str] = (), remedy: str = "start it") -> None:
        super().__init__(text)
        self.silent = list(silent)
        self.remedy = remedy


async def recover(
    system: ActorSystem,
    volume_id: int,
    journal: Journal | None,
    epoch: int,
    head: Head | None,
    patience_s: float = RECOVER_PATIENCE_S,
) -> Replay:
    """Fence the last session's journal, and read what its head does not cover.

    Args:
        system: whose bridge reaches the members.
        volume_id: the volume.
        journal: its record, read after the head.
        epoch: of the new session, already recorded: the older one can form no new ensemble. A
            reader, which fences nobody, gives 0, or a number that was recorded, if the members have
            promised themselves to a session later than the journal's.
        head: the volume's, read after the epoch was recorded.
        patience_s: how long to ask again while no member can be read.

    Raises:
        Unreadable: no member can be reached, or none has its records whole.
        Fenced: a still newer session has begun.
    """
    if journal is None or not is_unreplayed(journal, head):
        return Replay()
    identities = _identities(journal)
    end = system.loop.time() + patience_s
    end_found = system.loop.time() + RECOVER_PATIENCE_S
    backoff = Backoff(system.rng, first_s=0.05, max_s=1.0)
    # A reader asks by the epoch that the members have promised already.
    fence_epoch = max(epoch, journal.epoch)
    while True:
        tails: dict[str, _Tail] = {}
        failures: dict[str, TorusError] = {}
        fences = [
            _fence(system, volume_id, each, fence_epoch, identities) for each in journal.ensemble
        ]
        answers = await asyncio.gather(*fences, return_exceptions=True)
        for member, answer in zip(journal.ensemble, answers, strict=True):
            if isinstance(answer, _Tail):
                tails[member] = _ended(
                    answer if answer.epoch == journal.epoch else NO_TAIL, journal
                )
            elif isinstance(answer, TorusError) and not isinstance(answer, Fenced):
                failures[member] = answer
                log.warning("journal on peer %s: %s", member[:8], answer)
            else:
                raise answer
        if max((tail.last for tail in tails.values()), default=0) < journal.end:
            # Whoever opened the volume before has shown what only the others have.
            if await backoff.wait(end_found):
                continue
            log.warning("no member that answers has what was read last: what was flushed is there")
        # The longest first: a record that is damaged at the end of one looks as if it had never
        # been there.
        for member in sorted(tails, key=lambda each: -tails[each].last):
            try:
                replay = await _replay(
                    system, volume_id, member, journal.epoch, tails[member], head
                )
            except Fenced:
                raise
            except TorusError as error:
                failures[member] = error
                log.warning("journal on peer %s: %s", member[:8], error)
                continue
            ends = {tail.last for tail in tails.values()}
            replay.certain = len(tails) == len(journal.ensemble) and len(ends) == 1
            return replay
        if not await backoff.wait(end):
            names = ", ".join(member[:8] for member in journal.ensemble)
            silent = [peer for peer in failures if not isinstance(failures[peer], LOST)]
            why = f"no member of the volume's journal ({names}) can be read: "
            for each in failures.values():
                if isinstance(each, Invalid):
                    remedy = "open it with the version that wrote it"
                    raise Unreadable(f"{why}{each}; {remedy}", silent, remedy)
            raise Unreadable(
                f"{why}{list(failures.values())[-1]}; if all of them are lost for good: torusctl "
                "debug give-up-journal",
                silent,
            )


async def lost_members(
    system: ActorSystem, volume_id: int, journal: Journal, newest: int
) -> list[str]:
    """Members of a journal that do not answer, or have lost records; fences nobody.

    Args:
        system: whose bridge reaches the members.
        volume_id: the volume.
        journal: its record.
        newest: the newest epoch that was recorded since.
    """
    asked = [_ask(system, volume_id, member, journal, newest) for member in journal.ensemble]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    lost = []
    for member, answer in zip(journal.ensemble, answers, strict=True):
        if isinstance(answer, TorusError):
            # By Fenced a member says that it is there; a newer session reads from it just now.
            if not isinstance(answer, Fenced):
                lost.append(member)
        elif isinstance(answer, BaseException):
            raise answer
    return lost


async def unreadable_members(
    system: ActorSystem,
    volume_id: int,
    journal: Journal,
    newest: int,
    head: Head | None,
    members: Sequence[str],
) -> list[str]:
    """Of these members of a journal, those that have not every record whole; fences nobody.

    They are read one after the other, as much at a time as who opens the volume needs memory for.
    """
    damaged = []
    for member in members:
        try:
            tail = await _ask(system, volume_id, member, journal, newest)
            if tail.epoch == journal.epoch:
                await _replay(system, volume_id, member, journal.epoch, tail, head)
        except Fenced:
            continue  # a newer session reads from it just now
        except TorusError as error:
            log.warning("journal on peer %s: %s", member[:8], error)
            damaged.append(member)
    return damaged


def _identities(journal: Journal) -> dict[str, int]:
    """Which journal each member had when the records began."""
    return msgpack.unpackb(journal.extra) if journal.extra else {}


class _Tail(NamedTuple):
    """The newest records that a member has; zeros where it has none."""

    epoch: int
    first: int
    last: int


NO_TAIL = _Tail(0, 0, 0)


def _ended(tail: _Tail, journal: Journal) -> _Tail:
    """Without records that were not there for who has opened the volume since."""
    return tail if journal.end < 0 else tail._replace(last=min(tail.last, journal.end))


async def _fence(
    system: ActorSystem, volume_id: int, member: str, epoch: int, identities: dict[str, int]
) -> _Tail:
    home = system.actor("journal", node=member)
    newest, first, last, lost, identity, _ = await home.fence.remote(
        volume_id, epoch, timeout_s=APPEND_TIMEOUT_S
    )
    if lost or identities.get(member) != identity:
        raise BlockUnavailable(f"peer {member[:8]} has lost records")
    return _Tail(newest, first, last)


async def _ask(
    system: ActorSystem, volume_id: int, member: str, journal: Journal, newest: int
) -> _Tail:
    """Ask a member by the epoch that it has promised already, as a reader does."""
    identities = _identities(journal)
    try:
        return await _fence(system, volume_id, member, journal.epoch, identities)
    except Fenced:
        # To a session that has committed nothing yet; this fences none that is not over.
        return await _fence(system, volume_id, member, max(newest, journal.epoch), identities)


async def _replay(
    system: ActorSystem, volume_id: int, member: str, epoch: int, tail: _Tail, head: Head | None
) -> Replay:
    """Read what a member has and the head does not cover."""
    first, map_seq = 1, 0
    if head is not None and head.journal_epoch == epoch:
        first, map_seq = head.journal_seq + 1, head.map_seq
        if head.replays:
            # It was made of the records up to that one. What another member has beyond was never
            # acknowledged, and the blocks it names may be collected.
            tail = tail._replace(last=min(tail.last, head.map_seq))
    replay = Replay(map_seq, epoch, first - 1, tail.last)
    if tail.last < first:
        return replay
    begin = max(first, tail.first)
    home = system.actor("journal", node=member)
    await _read_tail(replay, home, volume_id, epoch, begin, tail.last)
    # What was cut without the metadata's knowledge is in a head that follows.
    told = replay.head.journal_seq if replay.head is not None else first - 1
    if begin > told + 1:
        raise BlockUnavailable(f"peer {member[:8]} lacks records before {begin}")
    return replay


async def _read_tail(
    replay: Replay, home: Any, volume_id: int, epoch: int, first: int, last: int
) -> None:
    following = first
    asked = home.read_tail.remote(volume_id, epoch, following, READ_BYTES)
    while following <= last:
        answer = await asked
        lengths = answer.result
        if not lengths:
            raise NotExist(f"record {following} of {last} is not there")
        behind = following + len(lengths)
        if behind <= last:
            # The member can read what follows while this is taken in.
            asked = home.read_tail.remote(volume_id, epoch, behind, READ_BYTES)
        payload = memoryview(answer.joined())
        at = 0
        for seq, length in lengths:
            if seq > last:
                return  # it was not asked for
            if seq != following:
                raise OutcomeUnknown(f"record {seq} came where {following} was due")
            try:
                replay.add(seq, payload[at : at + length])
            except Corruption as error:
                # It came as it was stored, so nothing says that the member has lost it.
                raise Invalid(f"record {seq} came whole, and is not understood: {error}") from error
            at += length
            following += 1
        await asyncio.sleep(0)  # the heartbeat's turn: there may be a hundred of these
