"""Recording the heads of a session: in the metadata, or in the journal while that is away.

The rule: a commit has ended when its head is where the next session looks for it. That is the
metadata; or, if it cannot be reached, a record that every member of the journal has. The head in
the journal covers the records before it like any other, so those are cut, and no outage fills the
journals. It is owed to the metadata: as long as it is, nobody may take what the metadata has for
the volume's newest version.
"""

from __future__ import annotations

import logging

from torus_actors.errors import (
    Again,
    Closed,
    CompareFailed,
    Fenced,
    Invalid,
    OutcomeUnknown,
    TorusError,
)
from torus_actors.metadata.records import Head
from torus_actors.metadata.service import MetadataService
from torus_actors.volume.change_log import ChangeLog, empty_record
from torus_actors.volume.journal import SessionJournal

log = logging.getLogger(__name__)


class Heads:
    """See the module.

    Args:
        meta: the metadata service.
        journal: of the session.
        changes: whose records the journal holds.
        name: of the volume, for logs.
        volume_id: of the volume.
        epoch: of the session.
        revision: of the head in the metadata, as last read.

    Attributes:
        owed: the newest head, if the journal has it and the metadata does not.
        recorded: heads recorded so far, here or there.
        resizing: bytes that the volume has from the next head on, if that makes it smaller. It is
            recorded with the volume's size or not at all: beside the old size it would look as if
            zeros had been written there.
    """

    def __init__(
        self,
        meta: MetadataService,
        journal: SessionJournal,
        changes: ChangeLog,
        *,
        name: str,
        volume_id: int,
        epoch: int,
        revision: int,
    ) -> None:
        self._meta = meta
        self._journal = journal
        self._changes = changes
        self._name = name
        self._volume_id = volume_id
        self._epoch = epoch
        self._revision = revision
        self._told = ""
        self.owed: Head | None = None
        self.recorded = 0
        self.resizing: int | None = None

    @property
    def revision(self) -> int:
        """Of the volume's newest head in the metadata.

        Raises:
            Again: the metadata does not have it.
        """
        if self.owed is not None:
            raise Again("the metadata does not have the volume's newest version yet")
        return self._revision

    async def store(self, head: Head) -> None:
        """Try to store a head in the metadata.

        Raises:
            Again: it cannot be reached, or it is full, damaged or somebody else, all of which an
                operator can mend; the head may have been stored all the same.
            Fenced, CompareFailed: another session has begun.
        """
        while True:
            try:
                self._revision = await self._meta.commit_head(
                    self._volume_id, self._epoch, self._revision, head, resized=self.resizing
                )
                self.recorded += 1
                self.owed = None
                self.resizing = None
                self._told = ""
                return
            except CompareFailed:
                found = await self._adopt()
                if found is None:
                    raise
                # In a long outage the numbers of INodes run out, and those of records do not.
                is_newer = (found.inode, found.map_seq) > (head.inode, head.map_seq)
                if head is self.owed and is_newer:
                    # One that came after what the journal keeps: nobody had heard of its storing.
                    self.owed = None
                    return
            except TorusError as error:
                raise self._away(error) from error

    async def reach(self) -> None:
        """See whether the metadata can be reached.

        Raises:
            Again: it cannot.
        """
        try:
            await self._meta.head(self._volume_id)
        except TorusError as error:
            raise self._away(error) from error

    def _away(self, error: TorusError) -> TorusError:
        """What an error of the metadata means for a session."""
        if isinstance(error, (Again, Closed, Fenced, Invalid)):
            return error
        if not isinstance(error, OutcomeUnknown) and str(error) != self._told:
            self._told = str(error)
            log.warning("volume %s: the metadata takes no head: %s", self._name, error)
        return Again(str(error))

    async def _adopt(self) -> Head | None:
        """Learn of a head whose storing was not heard of: the volume actor died, or the answer.

        Only this session writes heads of its epoch, and all they lead to is durable.
        """
        try:
            head, revision = await self._meta.head(self._volume_id)
        except TorusError as error:
            raise self._away(error) from error
        if head is None or head.epoch != self._epoch or revision == self._revision:
            return None
        self._revision = revision
        return head

    async def keep_in_journal(self, head: Head, awaited: bool) -> bool:
        """Have the journal keep a head that the metadata cannot take now.

        Args:
            head: covers all records up to ``journal_seq``.
            awaited: somebody waits for it; otherwise a journal that is small may grow.

        Returns:
            Whether all members have it.

        Raises:
            Fenced: another session has begun.
        """
        journal, changes = self._journal, self._changes
        wanted = journal.active and (awaited or journal.is_large)
        if changes.held or self.resizing or not wanted:
            return False
        # Those that were cut and never handed in: until a head covers them no flush counts on what
        # was in them, but their numbers must not be missing.
        gap = [empty_record() for _ in range(journal.sent, changes.seq)]
        try:
            await journal.append(changes.seq + 1, *gap, changes.cut_head(head))
        except Fenced:
            raise
        except TorusError as error:
            changes.needs_commit = True
            log.info("volume %s: the journal cannot keep the head: %s", self._name, error)
            return False
        self.owed = head
        self.recorded += 1
        log.info("volume %s: the journal keeps the head until the metadata is back", self._name)
        return True

    async def pay(self) -> None:
        """Store what is owed, if the metadata is back.

        Raises:
            Fenced: another session has begun.
        """
        if self.owed is None or self.resizing:
            return
        try:
            await self.store(self.owed)
        except Fenced:
            raise
        except TorusError as error:
            log.debug("volume %s: the metadata is still away: %s", self._name, error)
