"""The small etcd-like key-value interface that all cluster metadata rests on.

A store holds bytes under text keys. Every change has a revision; revisions only grow, and all
operations of one transaction share one. Keys may hang on a lease and disappear when it ends.
History is bounded: a reader that fell behind gets `Compacted` and starts again from the present.

The interface has four implementations: in this process (`memory`), in one file (`sqlite`), an etcd
cluster (`etcd`), and another node's store over the wire. Arguments and results are therefore
plain data, with ``to_wire``/``from_wire`` to lists of str, int, bytes and None.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torus_actors.errors import Invalid

TXN_OPERATIONS_MAX = 128
"""Operations, and compares, of one transaction: etcd's own default limit."""

KEY_BYTES_MAX = 1024
"""Keys are names made here; a longer one is a bug or an attack."""

REQUEST_BYTES_MAX = 1 << 20
"""Keys and values of one transaction together. etcd refuses requests of 1.5 MiB (torus#120)."""

LEASE_TTL_S_MAX = 9_000_000_000
"""etcd's limit."""

INT64_MAX = (1 << 63) - 1

Plain = TypeVar("Plain")

Wire = list[Any]
"""A list of str, int, bytes, bool, None and such lists."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One stored key: its value, the revision that wrote it, the lease it hangs on (0: none)."""

    key: str
    value: bytes
    mod_revision: int
    lease: int = 0

    def to_wire(self) -> Wire:
        """As a plain list."""
        return [self.key, self.value, self.mod_revision, self.lease]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> KeyValue:
        """Read what `to_wire` made."""
        return _build(cls, data, (str, bytes, int, int))


@dataclass(frozen=True, slots=True)
class Compare:
    """What must hold for a transaction to apply: a key's revision, or its exact value.

    Exactly one of ``mod_revision`` (0: the key is absent) and ``value`` is given.
    """

    key: str
    mod_revision: int | None = None
    value: bytes | None = None

    def to_wire(self) -> Wire:
        """As a plain list."""
        return [self.key, self.mod_revision, self.value]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> Compare:
        """Read what `to_wire` made."""
        return _build(cls, data, (str, (int, type(None)), (bytes, type(None))))

    def holds(self, present: KeyValue | None) -> bool:
        """Whether it holds, given what the store has under the key."""
        if self.value is not None:
            return present is not None and present.value == self.value
        return (0 if present is None else present.mod_revision) == self.mod_revision


@dataclass(frozen=True, slots=True)
class Put:
    """Store a value; the key then hangs on ``lease``, or on none if that is 0."""

    key: str
    value: bytes
    lease: int = 0

    def to_wire(self) -> Wire:
        """As a plain list."""
        return ["put", self.key, self.value, self.lease]


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key; nothing happens if it is absent."""

    key: str

    def to_wire(self) -> Wire:
        """As a plain list."""
        return ["delete", self.key]


@dataclass(frozen=True, slots=True)
class DeletePrefix:
    """Remove every key that starts with ``prefix``."""

    prefix: str

    def to_wire(self) -> Wire:
        """As a plain list."""
        return ["delete_prefix", self.prefix]


Operation = Put | Delete | DeletePrefix


def operation_from_wire(data: Sequence[Any]) -> Operation:
    """Read an operation from the list its ``to_wire`` made.

    Raises:
        Invalid: it is none.
    """
    match list(data) if isinstance(data, (list, tuple)) else None:
        case ["put", str(key), bytes(value), int(lease)]:
            return Put(key, value, lease)
        case ["delete", str(key)]:
            return Delete(key)
        case ["delete_prefix", str(prefix)]:
            return DeletePrefix(prefix)
    raise Invalid("not a transaction's operation")


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether the compares held, and the store's revision after the transaction."""

    succeeded: bool
    revision: int

    def to_wire(self) -> Wire:
        """As a plain list."""
        return [self.succeeded, self.revision]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> TxnResult:
        """Read what `to_wire` made."""
        return _build(cls, data, (bool, int))


class EventKind(enum.StrEnum):
    """What happened to a key."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key; ``value`` is empty when the key was deleted."""

    kind: EventKind
    key: str
    value: bytes
    mod_revision: int

    def to_wire(self) -> Wire:
        """As a plain list."""
        return [self.kind.value, self.key, self.value, self.mod_revision]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> Event:
        """Read what `to_wire` made."""
        plain = _build(cls, data, (str, str, bytes, int))
        if plain.kind not in EventKind.__members__.values():
            raise Invalid(f"unknown event kind {str(plain.kind)!r}")
        return cls(EventKind(plain.kind), plain.key, plain.value, plain.mod_revision)


class KeyValueStore(ABC):
    """A revisioned key-value store with leases. Its methods run on the event loop, never block it.

    Every method may raise `Again` (could not be asked; nothing happened) and `Closed`. Those that
    change something may raise `OutcomeUnknown` (asked, answer lost).
    """

    @abstractmethod
    async def get(self, key: str) -> KeyValue | None:
        """The present value of a key, or None."""

    @abstractmethod
    async def range(
        self, prefix: str, *, after: str = "", limit: int = 0
    ) -> tuple[list[KeyValue], int]:
        """Keys that start with ``prefix``, by key, and the store's revision just then.

        Args:
            prefix: of the keys.
            after: one of those keys; only what comes after it is wanted.
            limit: no more than so many, and fewer only if there are no more; 0 for all.
        """

    @abstractmethod
    async def txn(self, compare: Sequence[Compare], then: Sequence[Operation]) -> TxnResult:
        """Apply all of ``then`` at one revision, if all of ``compare`` holds; else nothing.

        Raises:
            Invalid: `validate_txn` says so.
            LeaseNotFound: a put names a lease that has ended; nothing was changed.
        """

    @abstractmethod
    async def lease_grant(self, ttl_s: int) -> int:
        """Make a lease that ends ``ttl_s`` seconds after its last renewal. Its id is above 0.

        A store may round a very short TTL up.
        """

    @abstractmethod
    async def lease_keepalive(self, lease: int) -> int:
        """Renew a lease; returns its TTL in seconds.

        Raises:
            LeaseNotFound: it has ended.
        """

    @abstractmethod
    async def lease_revoke(self, lease: int) -> None:
        """End a lease now and delete the keys that hang on it.

        Raises:
            LeaseNotFound: it has ended already.
        """

    @abstractmethod
    async def events(
        self, prefix: str, after_revision: int, timeout_s: float
    ) -> tuple[list[Event], int]:
        """Wait for changes of keys that start with ``prefix``.

        Returns at once with all known events newer than ``after_revision``, oldest first, or with
        none after ``timeout_s`` seconds. The second value is what to pass as ``after_revision``
        next; a revision's events are never split between two answers.

        Raises:
            Compacted: that history is gone, or never was: the store was restored from a backup.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release everything; calls that still wait raise `Closed`. Leases are left to run out."""


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key behind all that start with ``prefix``; None if there is no such key."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def validate_txn(compare: Sequence[Compare], then: Sequence[Operation]) -> None:
    """Hold every backend to the same limits, which are etcd's.

    Raises:
        Invalid: too many or too large; a bad key; a compare of neither or both kinds; or a key that
            is put twice, or put and deleted.
    """
    if len(compare) > TXN_OPERATIONS_MAX or len(then) > TXN_OPERATIONS_MAX:
        raise Invalid(f"a transaction has at most {TXN_OPERATIONS_MAX} operations")
    size = 0
    for condition in compare:
        check_key(condition.key)
        if (condition.mod_revision is None) == (condition.value is None):
            raise Invalid("a compare is of a revision or of a value")
        check_int64(condition.mod_revision or 0)
        size += len(condition.key) + len(condition.value or b"")
    puts: set[str] = set()
    for operation in then:
        if isinstance(operation, DeletePrefix):
            size += len(operation.prefix)
            continue
        check_key(operation.key)
        size += len(operation.key)
        if isinstance(operation, Put):
            if operation.key in puts:
                raise Invalid(f"{operation.key} is put twice in one transaction")
            puts.add(operation.key)
            check_int64(operation.lease)
            size += len(operation.value)
    for operation in then:
        if isinstance(operation, Delete) and operation.key in puts:
            raise Invalid(f"{operation.key} is put and deleted in one transaction")
        if isinstance(operation, DeletePrefix) and any(
            key.startswith(operation.prefix) for key in puts
        ):
            raise Invalid(f"keys under {operation.prefix} are put and deleted in one transaction")
    if size > REQUEST_BYTES_MAX:
        raise Invalid(f"a transaction of {size} bytes is above {REQUEST_BYTES_MAX}")


def check_key(key: str) -> None:
    """Refuse what is no key.

    Raises:
        Invalid: empty or too long.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise Invalid("a key is valid Unicode") from None
    if not 0 < size <= KEY_BYTES_MAX:
        raise Invalid(f"a key has 1 to {KEY_BYTES_MAX} bytes")


def check_int64(number: int) -> None:
    """Refuse what etcd and SQLite cannot hold as a revision, a lease or a count.

    Raises:
        Invalid: below 0, or above 63 bits.
    """
    if not 0 <= number <= INT64_MAX:
        raise Invalid(f"{number} is no revision, lease or count")


def leases_of(then: Sequence[Operation]) -> set[int]:
    """The leases that a transaction's puts hang keys on."""
    return {operation.lease for operation in then if isinstance(operation, Put)} - {0}


def check_ttl(ttl_s: int) -> None:
    """Refuse what is no time to live.

    Raises:
        Invalid: not a whole number of seconds above 0.
    """
    if not 0 < ttl_s <= LEASE_TTL_S_MAX:
        raise Invalid(f"a lease's TTL is at least 1 second, not {ttl_s}")


def _build(cls: Callable[..., Plain], data: Sequence[Any], types: tuple[Any, ...]) -> Plain:
    if not isinstance(data, (list, tuple)) or len(data) != len(types):
        raise Invalid(f"not a {getattr(cls, '__name__', 'record')}: wrong length")
    for item, kind in zip(data, types, strict=True):
        if not isinstance(item, kind):
            raise Invalid(f"not a {getattr(cls, '__name__', 'record')}: wrong types")
    return cls(*data)
