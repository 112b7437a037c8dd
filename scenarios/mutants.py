"""The table of mutants: bugs that the simulator has to find, each of a rule that keeps data safe.

To add one: a name, the rule, the piece of code that keeps it and what the bug makes of it, and the
scenarios to hunt it in. One that survives shows where the simulator looks too little: then a
scenario, a fault or the oracle is to be strengthened, not the mutant.
"""

from __future__ import annotations

from torus_actors.scenarios.mutation import Edit, Mutant


def _mutant(
    name: str, breaks: str, *edits: Edit, hunted_in: tuple[str, ...], first_seed: int = 1
) -> Mutant:
    return Mutant(name, breaks, edits, hunted_in, first_seed)


_STORE = (
    _mutant(
        "flush_without_fdatasync",
        "A flush of the block store reaches the disk, not only the page cache",
        Edit("storage.mfile:MFileBatch._sync", "file.fdatasync()", "pass"),
        hunted_in=("calm",),
    ),
    _mutant(
        "index_before_data",
        "An index entry is written only after the sync that covers its data",
        Edit(
            "storage.mfile:MFileBatch._work",
            "    if self.puts:\n        self.sync_data()\n    self.write_index()\n",
            "    self.write_index()\n    self.sync_index()\n    if self.puts:\n"
            "        self.sync_data()\n",
        ),
        hunted_in=("one_bad_node",),
        first_seed=13,
    ),
    _mutant(
        "refused_put_acknowledged",
        "A put that the disk refused is not acknowledged",
        Edit(
            "actors.block_store:OpenStores._put",
            "    except BaseException:\n        store.abandon(ticket)\n        raise\n",
            "    except BaseException:\n        store.abandon(ticket)\n        return\n",
        ),
        hunted_in=("one_bad_node",),
    ),
    _mutant(
        "slot_reserved_for_ever",
        "A slot that a put had taken is free again when the put has failed",
        Edit(
            "actors.block_store:OpenStores._put",
            "    except BaseException:\n        store.abandon(ticket)\n        raise\n",
            "    except BaseException:\n        raise\n",
        ),
        hunted_in=("one_bad_node",),
    ),
    _mutant(
        "synced_only_when_asked",
        "What nobody flushes is durable soon all the same, also what a rebalancer sent",
        Edit(
            "actors.block_store:OpenStores.flush_later",
            "if self._idle_flush is None:",
            "if False:",
        ),
        hunted_in=("ring_change", "node_crash"),
    ),
    _mutant(
        "incarnation_not_checked",
        "A flush counts only if the very run of the store confirms it that took the blocks",
        Edit(
            "volume.commit:Committer.make_durable",
            "confirmed.get(peer) != incarnation",
            "peer not in confirmed",
        ),
        hunted_in=("many_crashes", "node_crash"),
        first_seed=8,
    ),
)

_RING = (
    _mutant(
        "one_copy",
        "A write at level all is acknowledged when all its copies are taken",
        Edit(
            "actors.replicator:Replicator.put_block",
            "*block, candidates, copies)",
            "*block, candidates, 1)",
        ),
        hunted_in=("calm",),
    ),
    _mutant(
        "no_hand_off",
        "A copy that its peer did not take is given to the next one",
        Edit(
            "actors.replicator:Replicator._put_copies",
            "len(placed) + len(in_air) < copies",
            "len(placed) + len(in_air) + len(failures) < copies",
        ),
        hunted_in=("one_bad_node",),
        first_seed=7,
    ),
    _mutant(
        "full_is_one_copy_less",
        "A put with fewer copies than wanted, because a peer is full, is no success",
        Edit(
            "actors.replicator:Replicator._put_copies",
            "if full is not None and len(placed) < copies:",
            "if full is not None and not placed:",
        ),
        hunted_in=("disk_full",),
        first_seed=3,
    ),
    _mutant(
        "checksums_not_verified",
        "Data that was read is compared with the checksum that the map has of it",
        Edit(
            "actors.replicator:Replicator._deliver",
            "verify_range(sums, read.root, read.offset, data)",
            "pass",
        ),
        hunted_in=("bit_rot",),
        first_seed=2,
    ),
    _mutant(
        "cached_is_enough",
        "Who verifies a copy reads what its disk has, not what the page cache has of it",
        Edit(
            "storage.mfile:MFileStore.check",
            "self._data.read_medium(both, ",
            "self._data.preadv([both], ",
        ),
        hunted_in=("bit_rot",),
        first_seed=8,
    ),
    _mutant(
        "told_before_it_is_durable",
        "A flush waits for the blocks that its record names",
        Edit(
            "volume.flushing:Flusher._flush_by_journal",
            "await session.committer.make_durable(covered)",
            "session.system.loop.create_task(session.committer.make_durable(covered))",
        ),
        hunted_in=("calm", "overwrites"),
    ),
    _mutant(
        "takes_what_no_flush_confirms",
        "A node takes no blocks while its disk refuses what its flushes write",
        Edit("actors.block_store:OpenStores._put", "if self.refusal:", "if not self.stores:"),
        hunted_in=("disk_errors",),
    ),
    _mutant(
        "presence_is_enough",
        "The rebalancer drops its copy only after the owners have read and synced theirs",
        Edit("actors.rebalancer:Rebalancer._drop", "deep=True, durable=True", "deep=False"),
        hunted_in=("ring_change", "replication_change"),
    ),
    _mutant(
        "old_ring_is_enough",
        "The rebalancer drops its copy by no ring but the last that an owner knows of",
        Edit(
            "actors.block_store:BlockStoreActor.check_blocks",
            "0 < ring_version < newest",
            "False",
        ),
        hunted_in=("late_ring",),
    ),
)

_COLLECTOR = (
    _mutant(
        "uncommitted_is_garbage",
        "What an open session has not committed yet is not garbage",
        Edit(
            "actors.collector:Collector._pass",
            "ref.inode >= oldest_open.get(volume, 0)",
            "volume not in oldest_open",
        ),
        hunted_in=("long_session", "head_change_during_collection"),
    ),
    _mutant(
        "collector_goes_on",
        "An error while the collector reads a tree ends the pass with nothing deleted",
        Edit(
            "actors.collector:Collector._walk",
            "for page in batch])\n",
            "for page in batch], return_exceptions=True)\n"
            "        fetched = [page for page in fetched if isinstance(page, _Page)]\n",
        ),
        hunted_in=("isolated_node",),
    ),
    _mutant(
        "clone_of_the_dead_is_dead",
        "Blocks of a volume that was deleted stay as long as a clone leads to them",
        Edit(
            "actors.collector:Collector._pass",
            "and ref not in live\n",
            "and (volume in tombs or ref not in live)\n",
        ),
        hunted_in=("calm", "node_crash"),
    ),
    _mutant(
        "records_stay_for_ever",
        "A node forgets the records of sessions that nobody will ask for",
        Edit(
            "actors.collector:Collector._trim_journals",
            "await journal.cut.remote(volume, newest, upto)",
            "pass",
        ),
        hunted_in=("journal_members", "node_crash"),
        first_seed=3,
    ),
    _mutant(
        "no_second_pass",
        "A block is deleted only when two passes, a grace apart, find it dead",
        Edit(
            "actors.collector:Collector._pass",
            "[ref for ref in dead if ref in self._suspects]",
            "dead",
        ),
        hunted_in=("long_session", "overwrites", "head_change_during_collection"),
    ),
)

_COMMIT = (
    _mutant(
        "head_before_data",
        "A head is recorded only when all that it leads to is durable",
        Edit(
            "volume.commit:Committer._commit_map",
            "await self.make_durable(covered)",
            "self._system.loop.create_task(self.make_durable(covered))",
        ),
        hunted_in=("calm",),
    ),
    _mutant(
        "commit_beside_puts",
        "No block enters the map under a number that a commit has ended",
        Edit(
            "volume.commit:Committer._commit_map",
            "async with file.no_puts():",
            "if True:",
        ),
        hunted_in=("head_change_during_collection", "long_session", "overwrites"),
    ),
    _mutant(
        "discards_what_a_head_names",
        "A block is discarded when it is overwritten only if no head can name it",
        Edit("volume.commit:Committer._commit_map", "file.fresh.clear()", "pass"),
        hunted_in=("overwrites", "calm"),
        first_seed=10,
    ),
    _mutant(
        "head_without_epoch",
        "A head is recorded only while the session's epoch is the newest",
        Edit(
            "metadata.sessions:SessionOperations._commit",
            "    self._in_session(volume_id, epoch),\n"
            "        Compare(key, mod_revision=expected_revision),\n",
            "",
        ),
        hunted_in=("two_clients", "zombie_client", "partition_client"),
    ),
    _mutant(
        "inode_numbers_again",
        "INode numbers come from the metadata, so that no two sessions have the same",
        Edit(
            "volume.opening:open_session",
            "first = await meta.mint_inode(record.id, MINTED)",
            "old, _ = await meta.head(record.id)\n"
            "            first = 1 if old is None else old.inode",
        ),
        hunted_in=("client_crash", "head_change_during_collection"),
    ),
)

_SESSIONS = (
    _mutant(
        "first_to_leave_closes",
        "A volume is open as long as anybody has it open",
        Edit("actors.volumes:Volumes.release", "volume.users -= 1", "volume.users = 0"),
        hunted_in=("calm",),
    ),
    _mutant(
        "no_fence_on_open",
        "Opening a volume fences the journal of the session before",
        Edit(
            "volume.recovery:recover",
            "fence_epoch = max(epoch, journal.epoch)",
            "fence_epoch = journal.epoch",
        ),
        hunted_in=("handover",),
        first_seed=6,
    ),
    _mutant(
        "fenced_session_flushes",
        "No flush of a session succeeds that knows that it is over",
        Edit(
            "volume.flushing:Flusher._flush",
            "raise anew(session.file.failure)",
            "return",
        ),
        hunted_in=("zombie_client", "partition_client"),
    ),
    _mutant(
        "epoch_given_out_twice",
        "Each session has an epoch of its own",
        Edit(
            "metadata.sessions:SessionOperations.attach",
            "Epoch(epoch.epoch + 1)",
            "Epoch(max(epoch.epoch, 1))",
        ),
        hunted_in=("two_clients", "client_crash"),
    ),
    _mutant(
        "zombie_renews_its_lock",
        "A lock that its lease took along is taken back only by the newest session",
        Edit(
            "metadata.sessions:SessionOperations.renew_lock",
            "await self._check_epoch(volume_id, epoch)",
            "pass",
        ),
        Edit(
            "metadata.sessions:SessionOperations.renew_lock",
            "self._in_session(volume_id, epoch),",
            "",
        ),
        hunted_in=("zombie_client", "partition_client"),
    ),
)

_JOURNAL = (
    _mutant(
        "fence_not_durable",
        "What a fence tells of the records is durable, and will not become more",
        Edit(
            "actors.journal:JournalActor.fence",
            "store.fence(volume, epoch), settled)",
            "store.fence(volume, epoch), lambda error: None)\n    settled(None)",
        ),
        hunted_in=("slow_handover",),
        first_seed=12,
    ),
    _mutant(
        "journal_without_fdatasync",
        "A journal record is acknowledged only after the sync that covers it",
        Edit("storage.journal_steps:Commit.sync", "self.segment.file.fdatasync()", "pass"),
        hunted_in=("torn_write", "many_crashes"),
    ),
    _mutant(
        "acknowledged_by_one_member",
        "A flush is acknowledged by the journal when every member has the record",
        Edit(
            "volume.journal:_Append._answered",
            "self._journal.appended(self, self._failure)",
            "self._journal.appended(\n"
            "    self, self._failure if isinstance(self._failure, Fenced) else None\n"
            ")",
        ),
        hunted_in=("journal_members",),
        first_seed=2,
    ),
    _mutant(
        "journal_of_one",
        "A journal has as many members as copies are wanted, or there is none",
        Edit(
            "volume.journal:SessionJournal._gather",
            "if not wanted or len(up) < wanted:",
            "if not wanted:",
        ),
        Edit("volume.journal:SessionJournal._gather", "if len(homes) < wanted:", "if not homes:"),
        hunted_in=("crashes_everywhere", "many_crashes"),
        first_seed=2,
    ),
    _mutant(
        "direct_write_not_repeated",
        "A record that could not be written without a thread is written by one",
        Edit(
            "actors.journal:OpenJournal._start_direct",
            "if error is not None and error.errno == errno.EAGAIN:",
            "if error is not None and error.errno == errno.EAGAIN:\n"
            "            self._end(step, None)\n"
            "            self.kick()\n"
            "        elif False:",
        ),
        hunted_in=("crashes_everywhere", "many_crashes"),
    ),
    _mutant(
        "acknowledged_by_one_record",
        "A flush of several records is acknowledged when the members have all of them",
        Edit("volume.journal:SessionJournal.append", "if not left and not", "if not"),
        hunted_in=("journal_replay",),
        first_seed=10,
    ),
    _mutant(
        "foreseen_flush_does_not_wait",
        "A flush that finds its record on its way is acknowledged when the members have it",
        Edit(
            "volume.flushing:Flusher._append_at_once",
            "self.appending = True",
            "self.appending = bool(self._under_way)",
        ),
        hunted_in=("foreseen_flush",),
        first_seed=64,
    ),
    _mutant(
        "block_not_told",
        "A record names the blocks that have what no record tells",
        Edit(
            "volume.change_log:ChangeLog.settled",
            "self._blocks[index] = (ref, root)",
            "pass",
        ),
        hunted_in=("journal_replay",),
    ),
    _mutant(
        "named_before_durable",
        "A block is durable before a record names it",
        Edit(
            "volume.flushing:Flusher._waits_for_blocks",
            "any(ref in unsynced for ref in self._session.log.refs())",
            "False",
        ),
        hunted_in=("torn_write", "journal_replay", "many_crashes"),
    ),
    _mutant(
        "zeros_told_too_early",
        "What no record tells is durable when the head that tells it is recorded",
        Edit(
            "volume.session:Session._commit",
            "changes.committing, changes.needs_commit = changes.needs_commit, False",
            "changes.needs_commit = False",
        ),
        hunted_in=("flush_beside_commit",),
        first_seed=62,
    ),
    _mutant(
        "cut_before_head",
        "The journal is cut only after the head that covers it is recorded",
        Edit(
            "volume.session:Session._commit",
            "    try:\n        await self.committer.commit(force)\n",
            "    if journal.active:\n        journal.cut(self._covering_seq, covering_bytes)\n"
            "    try:\n        await self.committer.commit(force)\n",
        ),
        hunted_in=("journal_replay",),
        first_seed=5,
    ),
    _mutant(
        "head_covers_too_much",
        "A head says that it covers only the records that were cut before its commit began",
        Edit(
            "volume.session:Session._record_head",
            "self._covering_seq if complete else self.covered_seq",
            "self.log.seq",
        ),
        hunted_in=("journal_replay",),
        first_seed=58,
    ),
    _mutant(
        "ensemble_not_recorded",
        "A new ensemble is in the metadata before it acknowledges anything",
        Edit(
            "volume.journal:SessionJournal._record",
            "        self._revision = await self._meta.set_journal(\n"
            "            self._volume_id, self._epoch, self._revision, record, "
            "ring_revision=ring_revision\n"
            "        )\n",
            "        if not self._homes:\n"
            "            self._revision = await self._meta.set_journal(\n"
            "                self._volume_id, self._epoch, self._revision, record, "
            "ring_revision=ring_revision\n"
            "            )\n",
        ),
        hunted_in=("journal_members",),
        first_seed=2,
    ),
    _mutant(
        "lost_journal_is_empty",
        "A member that has lost its journal is not one that has no records",
        Edit(
            "volume.recovery:_fence",
            "if lost or identities.get(member) != identity:",
            "if lost:",
        ),
        Edit(
            "volume.journal:_Append._answered",
            "answer.result() != self.homes[member].identity",
            "answer.result() is None",
        ),
        hunted_in=("journal_members",),
    ),
    _mutant(
        "last_record_not_replayed",
        "Opening a volume replays its journal to the last record",
        Edit(
            "volume.recovery:_read_tail",
            "replay.add(seq, payload[at : at + length])",
            "replay.add(seq, payload[at : at + length]) if seq < last else None",
        ),
        hunted_in=("client_crash", "journal_replay"),
    ),
    _mutant(
        "uncertain_replay_is_read",
        "What not all members of a journal say is committed before anybody reads it",
        Edit(
            "actors.volumes:Volumes._first_commit",
            "replay is not None and replay.certain",
            "replay is not None",
        ),
        hunted_in=("half_told",),
        first_seed=3,
    ),
    _mutant(
        "old_journal_replayed",
        "A journal of a session that a newer one's head covers is not replayed",
        Edit("volume.recovery:is_unreplayed", " and journal.epoch >= head_epoch", ""),
        hunted_in=("journal_replay", "crashes_everywhere"),
        first_seed=6,
    ),
    _mutant(
        "replay_lays_old_over_new",
        "What older records say of a block's place is in the block",
        Edit("volume.change_log:Replay.add", "if each[0] > after", "if each"),
        hunted_in=("journal_replay",),
    ),
    _mutant(
        "trim_not_recorded",
        "What was trimmed is in the journal as well",
        Edit(
            "volume.write_back:WriteBack.zero",
            "self.log.wrote(index, offset, None, length)",
            "pass",
        ),
        hunted_in=("journal_replay",),
    ),
    _mutant(
        "flush_joins_one_under_way",
        "A flush covers all that was acknowledged before it, also where one is under way",
        *[
            Edit(
                f"volume.flushing:Flusher.{method}",
                "flushed, self._under_way = self._under_way, []",
                "flushed = self._under_way + self._waiting\n"
                + indent * " "
                + "self._under_way, self._waiting = [], []",
            )
            for method, indent in (("_end", 4), ("_appended", 8))
        ],
        hunted_in=("journal_replay",),
        first_seed=7,
    ),
    _mutant(
        "sync_joins_one_under_way",
        "A node's sync covers all blocks that were put before it was asked for",
        Edit(
            "actors.block_store:OpenStores._flush_all",
            "await self._flush_once()\n",
            "await self._flush_once()\n"
            "                waiters += self._flush_waiters\n"
            "                self._flush_waiters.clear()\n",
        ),
        hunted_in=("slow_disk",),
        first_seed=3,
    ),
)

_SNAPSHOTS = (
    _mutant(
        "snapshots_are_refused",
        "A session makes the snapshots that are wanted of its volume",
        Edit("volume.keeper:Keeper._answer", "if error is None:", "if False:"),
        hunted_in=("calm_snapshots",),
    ),
    _mutant(
        "clone_with_old_numbers",
        "A clone has INode numbers of its own: its first blocks are newer than its head",
        Edit("metadata.records:Head.handed_to", "inode=inode,", "inode=inode or self.inode,"),
        hunted_in=("calm",),
    ),
    _mutant(
        "snapshot_of_the_last_head",
        "A snapshot of a volume in use has all that was written before it was asked for",
        Edit(
            "volume.keeper:Keeper._commit_one_moment",
            "await self._commit()\n    file, committer",
            "return\n    file, committer",
        ),
        hunted_in=("snapshots",),
    ),
    _mutant(
        "snapshot_without_the_journal",
        "A snapshot of a volume that was not closed in order has what its journal has",
        Edit(
            "volume.snapshots:take_snapshot",
            "if is_unreplayed(journal, head):",
            "if False:",
        ),
        hunted_in=("snapshots",),
    ),
    _mutant(
        "collector_forgets_snapshots",
        "What a snapshot leads to is not garbage",
        Edit(
            "actors.collector:Collector._read_metadata",
            "heads += [Head.decode(snapshot.head)] if snapshot.head else []\n",
            "pass\n",
        ),
        hunted_in=("snapshots",),
        first_seed=2,
    ),
    _mutant(
        "hasty_evictor",
        "A member leaves the ring only after it was gone for the whole time that is set",
        Edit("actors.evictor:Evictor._due", ">= self._remove_after_s", ">= 0"),
        hunted_in=("node_abandoned", "node_crash"),
        first_seed=6,
    ),
)

_RESTORES = (
    _mutant(
        "restore_fences_nobody",
        "Who goes back to a snapshot fences the journal of the session before",
        Edit(
            "volume.snapshots:restore_snapshot",
            "await recover(system, record.id, journal, epoch, present)",
            "pass",
        ),
        hunted_in=("restores",),
        first_seed=4,
    ),
    _mutant(
        "restored_with_the_journal",
        "What the journal has is not replayed over a snapshot to which a volume went back",
        Edit(
            "metadata.records:Head.handed_to",
            "journal_seq=0, map_seq=0, replays=0",
            "replays=self.journal_epoch",
        ),
        hunted_in=("restores",),
        first_seed=4,
    ),
    _mutant(
        "restore_that_was_made_is_refused",
        "Who is told that a volume did not go back to a snapshot has lost nothing",
        Edit(
            "metadata.snapshots:SnapshotOperations.restore_snapshot",
            "same and present and head_at != expected_revision and at != volume_revision",
            "False",
        ),
        hunted_in=("restores",),
        first_seed=20,
    ),
)

_READERS = (
    _mutant(
        "collector_forgets_readers",
        "What the head leads to that somebody reads is not garbage",
        Edit(
            "actors.collector:Collector._read_metadata",
            "heads_read += [] if seen is None else [seen]",
            "pass",
        ),
        hunted_in=("readers",),
        first_seed=2,
    ),
    _mutant(
        "collector_forgets_what_journals_named",
        "What the journal named beyond the head that somebody reads is not garbage",
        Edit(
            "actors.collector:Collector._pass",
            "and not _is_within(ref.inode, read.get(volume, ()))",
            "",
        ),
        hunted_in=("readers",),
        first_seed=3,
    ),
    _mutant(
        "reader_keeps_too_little",
        "A reader keeps all that the journal named beyond its head",
        Edit(
            "volume.opening:_read_newest",
            "upto=replay.newest_inode",
            "upto=0",
        ),
        hunted_in=("readers",),
        first_seed=3,
    ),
    _mutant(
        "deleted_snapshot_is_garbage",
        "A snapshot that is deleted stays for those who have it open",
        Edit(
            "metadata.readers:ReaderOperations.begin_reading_snapshot",
            "snapshot.head, 0,",
            'b"", 0,',
        ),
        hunted_in=("readers",),
        first_seed=41,
    ),
    _mutant(
        "reader_not_put_back",
        "What is read is kept under a new lease too",
        Edit(
            "actors.heartbeat:Heartbeat._take_along",
            "await self._meta.keep_reading(reader, lease)",
            "pass",
        ),
        hunted_in=("readers",),
        first_seed=4,
    ),
    _mutant(
        "reader_never_ends",
        "What nobody reads any more is collected",
        Edit(
            "volume.opening:close_session",
            "detaching = end_reading_later(session.system, meta, reader.volume_id, reader.nonce)",
            "pass",
        ),
        hunted_in=("readers",),
    ),
    _mutant(
        "reader_mixes_moments",
        "A reader takes no head with the journal of another moment",
        Edit(
            "volume.opening:_read_newest",
            "if (head_now, journal_now) == (revision, journal_revision):",
            "if True:",
        ),
        hunted_in=("readers",),
        first_seed=52,
    ),
    _mutant(
        "reader_without_the_journal",
        "A reader has what was flushed and is in no head yet",
        Edit(
            "volume.opening:_read_newest",
            "return record, reader, lease, head, replay",
            "return record, reader, lease, head, Replay()",
        ),
        hunted_in=("readers",),
    ),
)

_RESIZES = (
    _mutant(
        "snapshot_of_another_size",
        "A snapshot has the size that the volume had",
        Edit("volume.opening:open_session", "size=kept.size or record.size", "size=record.size"),
        hunted_in=("resizes",),
    ),
    _mutant(
        "cut_off_blocks_stay",
        "The map of a volume that was cut names nothing behind the end",
        Edit(
            "volume.file:File.truncate",
            "partial(self.blockset.truncate, nblocks)",
            "partial(self.blockset.truncate, max(nblocks, self.blockset.length))",
        ),
        hunted_in=("resizes",),
    ),
    _mutant(
        "cut_off_part_comes_back",
        "The block that is cut in the middle has zeros behind the cut when the volume grows",
        Edit("volume.file:File.truncate", "if size > before and tail:", "if False:"),
        hunted_in=("resizes",),
        first_seed=4,
    ),
    _mutant(
        "cut_does_not_fence",
        "Making a volume smaller fences the session before",
        Edit(
            "volume.opening:open_session",
            "recover(system, record.id, journal, epoch, head)",
            "recover(system, record.id, journal, 0 if shrink_to else epoch, head)",
        ),
        hunted_in=("resizes",),
        first_seed=13,
    ),
    _mutant(
        "cut_without_the_journal",
        "Making a volume smaller keeps what its journal has before the cut",
        Edit(
            "volume.opening:open_session",
            "await _apply(session, replay, end)",
            "await _apply(session, Replay() if shrink_to else replay, end)",
        ),
        hunted_in=("resizes",),
    ),
    _mutant(
        "size_after_the_head",
        "The head without the end is recorded with the volume's size, in one transaction",
        Edit(
            "metadata.sessions:SessionOperations.commit_head",
            "return await self._commit(volume_id, epoch, expected_revision, key, head, also, "
            "resizing)",
            "revision = await self._commit(volume_id, epoch, expected_revision, key, head)\n"
            "    await self.store.txn([also], [resizing])\n"
            "    return revision",
        ),
        hunted_in=("resizes",),
        first_seed=4,
    ),
    _mutant(
        "cut_by_the_record_alone",
        "A volume is made smaller by a head that has nothing behind the end",
        Edit(
            "metadata.volumes:VolumeOperations.resize_volume",
            "if size < volume.size:",
            "if False:",
        ),
        Edit(
            "volume.resizing:shrink_volume",
            "    session = await open_for_tool(",
            "    await meta.resize_volume(name, size)\n    return\n"
            "    session = await open_for_tool(",
        ),
        hunted_in=("resizes",),
    ),
    _mutant(
        "cut_said_too_early",
        "Who makes a volume smaller is told so only when the head is recorded",
        Edit("volume.resizing:shrink_volume", "if session.heads.resizing:", "if False:"),
        hunted_in=("resizes",),
        first_seed=53,
    ),
)

_CLOSINGS = (
    _mutant(
        "closed_without_commit",
        "A volume that is closed has all that was written",
        Edit(
            "volume.opening:_last_commit",
            "if not session.epoch or session.file.failure is not None:",
            "if True:",
        ),
        hunted_in=("closings",),
    ),
    _mutant(
        "retires_what_is_owed",
        "A journal is given up only when the head in the metadata has all that it has",
        Edit("volume.opening:close_session", "error is None and session.all_covered", "not error"),
        hunted_in=("closings",),
        first_seed=47,
    ),
)

_METADATA = (
    _mutant(
        "deleted_volume_leaves_its_counter",
        "Of a deleted volume nothing remains but a marker",
        Edit(
            "metadata.volumes:VolumeOperations.delete_volume",
            "table.VOLUME, table.MINT, table.HEAD",
            "table.VOLUME, table.HEAD",
        ),
        hunted_in=("calm",),
    ),
    _mutant(
        "late_request_undoes",
        "A creation that arrives late does not bring back what was deleted",
        Edit(
            "metadata.base:MetadataBase._touch",
            "return [*gone, there], [Put(key, found.value)]",
            "return [], []",
        ),
        hunted_in=("late_requests",),
    ),
)

_CACHE = (
    _mutant(
        "written_is_a_hole",
        "What was written and is not on the ring yet is not called a hole",
        Edit(
            "volume.read_side:ReadSide._pieces",
            "min(layers.first_index(index + 1, run) * block_size, end)",
            "min(run * block_size, end)",
        ),
        hunted_in=("journal_replay", "client_crash"),
    ),
    _mutant(
        "writes_into_a_frozen_layer",
        "A layer that is being put on the ring takes no more writes",
        Edit(
            "volume.write_back:WriteBack.write",
            "layer = self.dirty.get(index)",
            "layer = self.dirty.get(index) or self.frozen.get(index)",
        ),
        hunted_in=("calm", "overwrites"),
    ),
    _mutant(
        "failed_put_hides_newer_writes",
        "When a put fails, its data comes back below what was written since",
        Edit(
            "volume.write_back:WriteBack.thaw",
            "layer.merge_from(newer)",
            "newer.merge_from(layer)\n        layer = newer",
        ),
        hunted_in=("disk_full",),
        first_seed=18,
    ),
    _mutant(
        "failed_put_forgotten",
        "What could not be put on the ring stays in the cache",
        Edit(
            "volume.file:File._put_failed",
            "self.layers.thaw(index)",
            "self.layers.drop(index, index + 1)",
        ),
        hunted_in=("many_crashes", "disk_full"),
        first_seed=3,
    ),
    _mutant(
        "unsynced_forgotten",
        "Whatever the map names, a flush makes durable",
        Edit("volume.file:File._settle", "self.unsynced[ref] = stored", "pass"),
        hunted_in=("calm",),
    ),
)

_FULL = (
    _mutant(
        "part_counts_as_replayed",
        "A head that is recorded before all of a replay is in it says how far that has come",
        Edit(
            "volume.session:Session._record_head",
            "if not complete and (replay := self.replaying) is not None:",
            "if (replay := None) is not None:",
        ),
        hunted_in=("crash_when_full",),
        first_seed=28,
    ),
)

_RETIRED = (
    _mutant(
        "journal_stays_on_who_left",
        "The journal of a volume that is open leaves a node that has left the ring",
        Edit(
            "volume.journal:SessionJournal._wants_others",
            "home not in ring and transport is not None and not transport.is_down(home)",
            "False",
        ),
        hunted_in=("retired",),
    ),
    _mutant(
        "needed_journal_not_counted",
        "A node tells of volumes of which its journal may have what no head has",
        Edit(
            "actors.collector:Collector._read_metadata",
            "unreplayed and me in journal.ensemble",
            "False",
        ),
        hunted_in=("retired",),
        first_seed=7,
    ),
)

_REQUESTS = (
    _mutant(
        "discards_pages_of_a_head",
        "Pages of a head that may have been recorded are not discarded",
        Edit(
            "volume.commit:Committer._commit_map",
            "if not may_be_named or isinstance(error, Again):",
            "if True:",
        ),
        hunted_in=("requests",),
        first_seed=3,
    ),
    _mutant(
        "fua_is_advice",
        "A write with FUA is answered when it is durable",
        Edit("volume.session:Session._on_write", "if request.fua:", "if False:"),
        hunted_in=("requests",),
    ),
    _mutant(
        "waiting_write_is_answered",
        "A write that has to wait for room is answered when there is some, and once",
        Edit(
            "volume.session:Session._on_write",
            "if self.file.write_at(request.offset, request.data, done):",
            "if self.file.write_at(request.offset, request.data, done) or not request.fua:",
        ),
        hunted_in=("requests",),
    ),
    _mutant(
        "trimmed_stays_allocated",
        "A block that was trimmed takes no room",
        Edit(
            "volume.file:File._put",
            "if layer.is_all_zero and layer.is_full(self.block_length(index)):",
            "if False:",
        ),
        hunted_in=("requests",),
    ),
    _mutant(
        "zeros_become_holes",
        "Zeros that are to stay allocated are stored",
        Edit(
            "volume.session:Session._on_zero",
            "keep = request.op == Op.WRITE_ZEROES and request.no_hole",
            "keep = False",
        ),
        hunted_in=("requests",),
    ),
    _mutant(
        "frozen_is_a_hole",
        "What is on its way to the ring is not called a hole",
        Edit(
            "volume.read_side:ReadSide._pieces",
            "if index in layers.dirty or index in layers.frozen:",
            "if index in layers.dirty:",
        ),
        hunted_in=("requests",),
    ),
)

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for mutant in (
        *_STORE,
        *_RING,
        *_COLLECTOR,
        *_COMMIT,
        *_SESSIONS,
        *_JOURNAL,
        *_SNAPSHOTS,
        *_RESTORES,
        *_READERS,
        *_RESIZES,
        *_CLOSINGS,
        *_METADATA,
        *_CACHE,
        *_FULL,
        *_RETIRED,
        *_REQUESTS,
    )
}
