"""What is stored under the metadata keys: frozen records, as JSON that a person can read in etcd.

Unknown fields are ignored and missing ones take their default, so that versions can be mixed during
an upgrade. Bytes are stored as hex. Encoding is canonical (sorted, no spaces): equal records of one
version are equal bytes. A transaction compares revisions, since another version may have written a
record; an `Epoch`, whose one field never changes, is compared by value.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torus_actors.errors import Corruption, Invalid
from torus_actors.model.refs import BLOCK_REF_SIZE, UINT64_MAX, VOLUME_ID_MAX

R = TypeVar("R", bound="Record")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Volume and snapshot names: safe in keys, export names, shells and ``VOLUME@NAME``."""

RING_BYTES_MAX = 256 << 10
"""As hex still half of what one transaction takes."""

EXTRA_BYTES_MAX = 64 << 10
"""Metadata holds no data (torus#120)."""

TIME_END_S = 253_402_300_800
"""The year 10000, which no clock of a machine shows."""

_DECODERS: dict[str, Callable[[Any], Any]] = {}


@dataclass(frozen=True, slots=True)
class Record:
    """Base of the records."""

    def encode(self) -> bytes:
        """The canonical JSON of the record."""
        plain = {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls: type[R], data: bytes, key: str = "") -> R:
        """Read a record.

        Args:
            data: what is stored.
            key: where, for the error.

        Raises:
            Corruption: it is none of this kind.
        """
        try:
            plain = json.loads(data)
            if not isinstance(plain, dict):
                raise TypeError("not a map")
            decoders = _field_decoders(cls)
            known = {name: decoders[name](item) for name, item in plain.items() if name in decoders}
            return cls(**known)
        except (ValueError, TypeError, RecursionError, Invalid) as error:
            where = f"{key}: " if key else ""
            raise Corruption(f"{where}stored {cls.__name__} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class GlobalMetadata(Record):
    """What holds for the whole cluster and never changes after `init`."""

    block_size: int
    block_spec: str
    inode_replication: int
    cluster_id: str
    created: float = 0.0

    def __post_init__(self) -> None:
        check_uuid(self.cluster_id)
        if self.block_size <= 0 or self.inode_replication <= 0:
            raise Invalid("block size and INode replication are above 0")


@dataclass(frozen=True, slots=True)
class RingRecord(Record):
    """The ring, opaque here, and its version: 1 at first, one more with each change."""

    version: int
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) > RING_BYTES_MAX:
            raise Invalid(f"a ring of {len(self.data)} bytes is above {RING_BYTES_MAX}")


@dataclass(frozen=True, slots=True)
class PeerInfo(Record):
    """A storage node that is up; stored under its lease.

    ``incarnation`` grows with each start on the same data; ``zone`` is its failure domain.
    """

    peer_id: str
    address: str
    zone: str = ""
    capacity_bytes: int = 0
    version: str = ""
    incarnation: int = 0

    def __post_init__(self) -> None:
        check_uuid(self.peer_id)
        host, _, port = self.address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise Invalid(f"{self.address!r} is no HOST:PORT")


@dataclass(frozen=True, slots=True)
class Counter(Record):
    """The last number that was given out."""

    last: int


@dataclass(frozen=True, slots=True)
class VolumeRecord(Record):
    """A volume. Its id is never used again; ``nonce`` tells who made it if an answer was lost."""

    id: int
    name: str
    kind: str
    size: int
    created: float = 0.0
    nonce: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 < self.id <= VOLUME_ID_MAX:
            raise Invalid(f"volume id {self.id} does not fit 40 bits")
        if not 0 < self.size <= UINT64_MAX:
            raise Invalid(f"a volume of {self.size} bytes is not possible")


@dataclass(frozen=True, slots=True)
class VolumeName(Record):
    """Which volume a name means."""

    id: int


@dataclass(frozen=True, slots=True)
class Head(Record):
    """The last committed version of a volume.

    ``root`` is the block ref of the INode's root block, ``root_crc`` that block's checksum,
    ``epoch`` the session that committed it, ``extra`` is opaque here. ``journal_seq`` is the last
    record of that session's journal which the version includes, ``map_seq`` the last that was cut
    before the map of blocks was: the map has the blocks that records up to it name, or newer ones.
    A version that has a part of an earlier session's journal only says in ``replays`` which one,
    and both numbers are of that one's records; it is still to be replayed.
    """

    inode: int
    root: bytes
    root_crc: int
    size: int
    epoch: int
    extra: bytes = b""
    journal_seq: int = 0
    map_seq: int = 0
    replays: int = 0

    def handed_to(self, epoch: int, inode: int) -> Head:
        """The same version, as that of a session whose journal has nothing yet."""
        return dataclasses.replace(
            self, epoch=epoch, inode=inode, journal_seq=0, map_seq=0, replays=0
        )

    @property
    def journal_epoch(self) -> int:
        """The session whose journal goes on where this version ends."""
        return self.replays or self.epoch

    def __post_init__(self) -> None:
        if len(self.root) != BLOCK_REF_SIZE:
            raise Invalid(f"a head's root has {BLOCK_REF_SIZE} bytes, not {len(self.root)}")
        if len(self.extra) > EXTRA_BYTES_MAX:
            raise Invalid(f"a head's extra of {len(self.extra)} bytes is above {EXTRA_BYTES_MAX}")


@dataclass(frozen=True, slots=True)
class Epoch(Record):
    """The number of the volume's newest session. Compared by value: it has this one field."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Lock(Record):
    """Who has a volume open; stored under the holder's lease."""

    holder: str
    epoch: int
    since: float = 0.0
    nonce: str = ""


@dataclass(frozen=True, slots=True)
class Journal(Record):
    """Where the journal of a session is: the peers of its ensemble. ``extra`` is opaque here.

    ``end`` is the number of the last record that a later session found, if that has opened the
    volume with it and could not put it into a head; -1 otherwise.
    """

    epoch: int
    ensemble: tuple[str, ...]
    extra: bytes = b""
    end: int = -1

    def __post_init__(self) -> None:
        for peer_id in self.ensemble:
            check_uuid(peer_id)
        if len(self.extra) > EXTRA_BYTES_MAX:
            raise Invalid(f"a journal's extra is above {EXTRA_BYTES_MAX} bytes")


@dataclass(frozen=True, slots=True)
class Snapshot(Record):
    """A version of a volume that is kept under a name.

    ``head`` is an encoded `Head`, or nothing if there was none yet; ``size`` is the volume's.
    """

    volume_id: int
    name: str
    head: bytes
    created: float = 0.0
    nonce: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True)
class SnapshotRequest(Record):
    """Asks the session that has a volume open for a snapshot; stored under the asker's ``lease``.

    ``error`` is the session's refusal, in one line; empty while it has not answered.
    """

    volume_id: int
    name: str
    lease: int
    created: float = 0.0
    nonce: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True)
class Reader(Record):
    """What somebody reads without having the volume's lock; kept as long as its lease lives.

    ``head`` is an encoded `Head`, or nothing if there was none. Kept is what it leads to, and what
    the journal named beyond it: blocks with INode numbers from the head's on, up to ``upto``.
    """

    volume_id: int
    head: bytes
    upto: int
    holder: str = ""
    since: float = 0.0
    nonce: str = ""


def check_name(name: str) -> None:
    """Refuse what cannot name a volume or a snapshot.

    Raises:
        Invalid: not 1 to 128 letters, digits, dots, dashes, underscores.
    """
    if not NAME.fullmatch(name):
        raise Invalid(
            f"{name!r} is no name: use 1 to 128 letters, digits, '.', '-', '_', no sign first"
        )


def check_uuid(text: str) -> None:
    """Refuse what is no UUID in its usual lower-case form.

    Raises:
        Invalid: it is none.
    """
    try:
        good = str(uuid.UUID(text)) == text
    except ValueError:
        good = False
    if not good:
        raise Invalid(f"{text!r} is no UUID")


def _plain(item: Any) -> Any:
    return item.hex() if isinstance(item, bytes) else item


def _field_decoders(cls: type[Record]) -> dict[str, Callable[[Any], Any]]:
    return {field.name: _DECODERS[str(field.type)] for field in dataclasses.fields(cls)}


def _exactly(*kinds: type) -> Callable[[Any], Any]:
    def check(item: Any) -> Any:
        if isinstance(item, bool) or not isinstance(item, kinds):
            raise TypeError(f"{item!r} is no {kinds[0].__name__}")
        return item

    return check


def _time(item: Any) -> float:
    if not 0 <= _exactly(float, int)(item) < TIME_END_S:  # nor is NaN
        raise ValueError(f"{item!r} is no time")
    return float(item)


def _strings(item: Any) -> tuple[str, ...]:
    if not isinstance(item, list):
        raise TypeError(f"{item!r} is no list")
    return tuple(_exactly(str)(each) for each in item)


_DECODERS |= {
    "int": _exactly(int),
    "str": _exactly(str),
    "float": _time,
    "bytes": lambda item: bytes.fromhex(_exactly(str)(item)),
    "tuple[str, ...]": _strings,
}
