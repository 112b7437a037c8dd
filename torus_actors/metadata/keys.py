"""Every metadata key, in one table: its name, its record, who writes it, its lease, its meaning.

docs/metadata.md shows the same table; a test compares them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torus_actors.metadata import records

PREFIX = "torus-actors/"
"""All keys start with it, so that etcd can be shared, and a wipe knows what is ours."""


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table: a key, or a family of them."""

    pattern: str
    record: type[records.Record]
    writer: str
    leased: bool
    meaning: str


GLOBAL = Key(
    "global",
    records.GlobalMetadata,
    "torusctl init",
    False,
    "Block size, spec, cluster id; constant",
)
RING = Key(
    "ring",
    records.RingRecord,
    "torusctl init, ring commands, --auto-join, --remove-after",
    False,
    "The ring; compare-and-set, version + 1 each time",
)
VOLUME_COUNTER = Key(
    "volume-counter",
    records.Counter,
    "whoever creates a volume",
    False,
    "Last volume id given out; never goes back",
)
PEER = Key("peers/PEER", records.PeerInfo, "that storage node", True, "A storage node that is up")
NAME = Key(
    "names/NAME", records.VolumeName, "volume commands", False, "Which volume a name belongs to"
)
VOLUME = Key("volumes/ID", records.VolumeRecord, "volume commands", False, "Name, kind and size")
MINT = Key(
    "mints/ID",
    records.Counter,
    "the volume's sessions",
    False,
    "Last INode number given out for the volume; never goes back. That of no volume, 0, is made "
    "before the cluster and goes with it: by it a late init makes no cluster again that was wiped",
)
HEAD = Key(
    "heads/ID",
    records.Head,
    "the volume's session",
    False,
    "Last checkpoint; compare-and-set under the session's epoch",
)
EPOCH = Key(
    "epochs/ID",
    records.Epoch,
    "attach",
    False,
    "Newest session of the volume; fences older ones. Written anew, as it is, by who deletes a "
    "lock, reader, snapshot or request, which no late copy of another request then brings back",
)
LOCK = Key("locks/ID", records.Lock, "the volume's session", True, "Who has the volume open")
JOURNAL = Key(
    "journals/ID",
    records.Journal,
    "the volume's session",
    False,
    "Peers that hold the session's journal; compare-and-set under its epoch. `end`, written by a "
    "later session that could commit nothing: the last record that it found",
)
SNAPSHOT = Key(
    "snapshots/ID/NAME", records.Snapshot, "snapshot commands", False, "A head that is kept"
)
SNAPSHOT_REQUEST = Key(
    "snapshot-requests/ID/NAME",
    records.SnapshotRequest,
    "snapshot create; answered by the volume's session",
    True,
    "A snapshot that is wanted of a volume in use",
)
READER = Key(
    "readers/ID/NONCE",
    records.Reader,
    "who opens a volume only to read",
    True,
    "A version that somebody reads, and that is not to be collected meanwhile",
)
DELETED = Key(
    "deleted/ID",
    records.VolumeRecord,
    "volume delete",
    False,
    "A deleted volume: nodes that come back late may still have blocks of it",
)

TABLE = (
    GLOBAL,
    RING,
    VOLUME_COUNTER,
    PEER,
    NAME,
    VOLUME,
    MINT,
    HEAD,
    EPOCH,
    LOCK,
    JOURNAL,
    SNAPSHOT,
    SNAPSHOT_REQUEST,
    READER,
    DELETED,
)


class Keys:
    """Builds keys under one prefix.

    Args:
        prefix: ends with a slash.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        self.prefix = prefix
        self.global_ = prefix + GLOBAL.pattern
        self.ring = prefix + RING.pattern
        self.volume_counter = prefix + VOLUME_COUNTER.pattern
        self.before_global = self.of(MINT, 0)
        """Of no volume. Who makes a cluster makes it first, and then compares its revision."""
        self.behind_deleted = self.under(DELETED)[:-1] + chr(ord("/") + 1)
        """No marker of a deleted volume comes after it, and no other family's key before."""

    def under(self, key: Key) -> str:
        """The prefix of a family of keys."""
        return self.prefix + key.pattern.partition("/")[0] + "/"

    def peer(self, peer_id: str) -> str:
        """Key of a storage node."""
        return self.under(PEER) + peer_id

    def name(self, name: str) -> str:
        """Key of a volume's name."""
        return self.under(NAME) + name

    def of(self, key: Key, volume_id: int) -> str:
        """Key of something that belongs to a volume."""
        return f"{self.under(key)}{volume_id:010x}"

    def snapshots(self, volume_id: int) -> str:
        """Prefix of a volume's snapshots."""
        return self.of(SNAPSHOT, volume_id) + "/"

    def snapshot(self, volume_id: int, name: str) -> str:
        """Key of a snapshot."""
        return self.snapshots(volume_id) + name

    def snapshot_request(self, volume_id: int, name: str) -> str:
        """Key of a request for a snapshot."""
        return f"{self.of(SNAPSHOT_REQUEST, volume_id)}/{name}"

    def reader(self, volume_id: int, nonce: str) -> str:
        """Key of somebody who reads a volume."""
        return f"{self.of(READER, volume_id)}/{nonce}"

    def row_of(self, key: str) -> Key | None:
        """The table's row for a key; None if it is not ours."""
        if not key.startswith(self.prefix):
            return None
        rest = key[len(self.prefix) :]
        return next((row for row, pattern in _PATTERNS if pattern.fullmatch(rest)), None)


_PARTS = {"ID": "[0-9a-f]{10}", "PEER": "[^/]+", "NAME": "[^/]+", "NONCE": "[^/]+"}

_PATTERNS = [
    (row, re.compile(re.sub("[A-Z]+", lambda part: _PARTS[part[0]], re.escape(row.pattern))))
    for row in TABLE
]
