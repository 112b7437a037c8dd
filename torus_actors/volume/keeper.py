"""A session's side of snapshots: takes those that are asked for of a volume in use.

What a snapshot holds is what the volume was in one moment between the request and the answer: while
the map is cut for it, writes wait, for a fraction of a second as a rule. Without that a write might
be in it and an earlier one, flushed in between, might not.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

from torus_actors.errors import (
    Again,
    CompareFailed,
    Fenced,
    LeaseNotFound,
    TorusError,
)
from torus_actors.metadata.records import SnapshotRequest
from torus_actors.metadata.service import MetadataService
from torus_actors.volume.commit import Committer
from torus_actors.volume.file import File

log = logging.getLogger(__name__)

HOLD_S_MAX = 1.5
"""Writes wait no longer for a snapshot; it fails if the cluster does not take what is cached by
then. Below what a client may be kept waiting for anything."""

ASK_AGAIN_S = 1.0
"""A request that could not be answered, for want of the metadata, is taken up again after this."""

ATTEMPTS_MAX = 3
"""The time may be over, or a node be lost, between holding writes and cutting the map."""


class Keeper:
    """A session's side: takes the snapshots that are asked for.

    Args:
        meta: the metadata service.
        file: of the session.
        committer: of the session.
        size: bytes of the volume.
        epoch: of the session.
        commit: commits all that was acknowledged so far.
        head_revision: tells the revision of the session's last head.
    """

    def __init__(
        self,
        meta: MetadataService,
        file: File,
        committer: Committer,
        size: int,
        epoch: int,
        commit: Callable[[], Awaitable[None]],
        head_revision: Callable[[], int],
    ) -> None:
        self._meta = meta
        self._file = file
        self._committer = committer
        self._size = size
        self._epoch = epoch
        self._commit = commit
        self._head_revision = head_revision
        self._seen: set[str] = set()
        self._taking: list[SnapshotRequest] = []
        self._unanswered: list[SnapshotRequest] = []
        self._ask_again_at = 0.0
        self.wanted: list[SnapshotRequest] = []
        """Requests that nobody has begun to answer."""

    def want(self, requests: Iterable[SnapshotRequest]) -> None:
        """These are the requests for the volume that there are now."""
        present = {request.nonce: request for request in requests if not request.error}
        self.wanted += [present[nonce] for nonce in present if nonce not in self._seen]
        self._unanswered = [each for each in self._unanswered if each.nonce in present]
        self._seen = set(present)

    def ask_again(self) -> None:
        """The metadata has the volume's newest head: those that waited for that are wanted again.

        Each is of a new moment, for what the volume was then may be in no head any more.
        """
        if self._unanswered and self._file.loop.time() >= self._ask_again_at:
            self.wanted, self._unanswered = self._unanswered + self.wanted, []

    def resume(self) -> None:
        """Whoever was answering has died: begin again with that."""
        self.wanted, self._taking = self._taking + self.wanted, []

    async def take(self) -> None:
        """Answer what is asked; runs between commits, and no other may run beside it.

        Raises:
            Fenced: another session has begun.
        """
        self._taking, self.wanted = self.wanted, []
        error: TorusError | None = None
        try:
            await self._commit_one_moment()
        except Fenced:
            raise
        except TorusError as failed:
            error = failed
        for request in self._taking:
            try:
                await self._answer(request, error)
            except Fenced:
                raise
            except TorusError as failed:  # also full or damaged, which a person can mend
                log.info("volume %s: snapshot %s: %s", self._file.name, request.name, failed)
                # With its lease ended, whoever asked is gone.
                if not isinstance(failed, LeaseNotFound):
                    self._unanswered.append(request)
                    self._ask_again_at = self._file.loop.time() + ASK_AGAIN_S
        self._taking = []

    async def _answer(self, request: SnapshotRequest, error: TorusError | None) -> None:
        if error is None:
            try:
                await self._meta.answer_request(
                    request, self._epoch, self._head_revision(), self._size
                )
                return
            except CompareFailed as failed:
                error = failed
        await self._meta.refuse_request(request, str(error))

    async def _commit_one_moment(self) -> None:
        """Commit what the file is in one moment."""
        await self._commit()
        file, committer = self._file, self._committer
        for _ in range(ATTEMPTS_MAX):
            # The commit before has written most out, so that this one is short.
            file.hold_writes()
            timer = file.loop.call_later(HOLD_S_MAX, file.release_writes)
            try:
                if committer.clean:
                    return
                committer.exact = False
                await self._commit()
                if committer.exact:
                    return
            finally:
                timer.cancel()
                file.release_writes()
        raise Again(
            f"volume {file.name} could not be stored within {HOLD_S_MAX:g} s, for which writes "
            "may wait; try again when the cluster is less busy"
        )
