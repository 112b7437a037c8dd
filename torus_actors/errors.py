"""Every error that torus-actors raises on purpose.

    TorusError
    |-- Invalid                 the caller's arguments break a rule
    |-- NotSupported            the request is well formed, but not offered here
    |-- Exists, NotExist        a name or id is taken, or unknown
    |-- WrongVolumeType
    |-- Closed                  used after it was closed
    |-- metadata
    |   |-- Again               the store cannot be asked right now; nothing changed
    |   |-- CompareFailed       somebody else changed the value first; nothing changed
    |   |-- OutcomeUnknown      asked, but the answer was lost: it may or may not have happened
    |   |-- NoGlobalMetadata    the cluster was never initialised
    |   |-- NonSequentialRing   a ring that does not follow the stored one
    |   |-- LeaseNotFound       the lease ran out or was revoked
    |   |-- Compacted           a watch asked for history that is gone
    |   |-- Locked              somebody else holds the volume
    |   `-- Fenced              this session's epoch is over: it may never write again
    |-- blocks
    |   |-- BlockNotExist       this store does not have it
    |   |-- BlockUnavailable    no replica could give it, or take it
    |   |-- Corruption          bytes do not match their checksum
    |   `-- OutOfSpace
    |-- peers
    |   |-- NoPeer              no such peer, or no peer at all
    |   |-- PeerLost            the connection ended under the call
    |   |-- ProtocolError       the other side broke the protocol
    |   `-- Unauthenticated     wrong cluster, or wrong secret
    `-- runtime
        |-- ActorCrashed        the actor died under the call; carries the cause
        |-- ActorNotFound
        |-- Overloaded          an inbox or a window is full
        `-- DeadlineExceeded

A class exists only if some caller treats it differently. ``TRANSIENT`` names those after which the
same request may succeed a moment later, so that a caller with time left tries again.
"""

from __future__ import annotations

import copy
from typing import TypeVar


class TorusError(Exception):
    """Base of all errors raised on purpose; its text is one plain line for a person."""


class Invalid(TorusError):
    """Arguments break a rule."""


class NotSupported(TorusError):
    """A well-formed request for something that is not offered here."""


class Exists(TorusError):
    """The name or id is already taken."""


class NotExist(TorusError):
    """No such thing."""


class WrongVolumeType(TorusError):
    """The volume is of another kind."""


class Closed(TorusError):
    """Used after it was closed."""


class Again(TorusError):
    """The metadata store cannot be reached now; nothing was changed."""


class CompareFailed(TorusError):
    """The value was changed by somebody else first; nothing was changed."""


class OutcomeUnknown(TorusError):
    """The request was sent and its answer lost: it may or may not have taken effect."""


class NoGlobalMetadata(TorusError):
    """The cluster was never initialised."""


class NonSequentialRing(TorusError):
    """A ring whose version does not follow the stored one."""


class LeaseNotFound(TorusError):
    """The lease ran out or was revoked."""


class Compacted(TorusError):
    """The asked-for history is gone; read the present state and go on from there."""


class Locked(TorusError):
    """Another client holds the volume."""


class Fenced(TorusError):
    """This session's epoch is over; nothing it writes will ever be taken."""


class BlockNotExist(TorusError):
    """This store does not have the block."""


class BlockUnavailable(TorusError):
    """No replica could give, or take, the block.

    ``gone``: every peer was asked, and said that it does not have it.
    """

    gone: bool = False


class Corruption(TorusError):
    """Bytes do not match their checksum."""


class OutOfSpace(TorusError):
    """No room left; nothing was changed, but for what `MetadataBase._settle` says of etcd."""


class NoPeer(TorusError):
    """No such peer, or no peer at all."""


class PeerLost(TorusError):
    """The connection to the peer ended before the answer came."""


class ProtocolError(TorusError):
    """The other side broke the wire protocol; the connection must end."""


class Unauthenticated(TorusError):
    """The other side belongs to another cluster or does not know the secret."""


class ActorCrashed(TorusError):
    """The actor died under the call; the text carries the cause."""


class ActorNotFound(TorusError):
    """No actor of that name."""


class Overloaded(TorusError):
    """An inbox or a window is full; nothing was done."""


class DeadlineExceeded(TorusError, TimeoutError):
    """No answer within the deadline."""


TRANSIENT: tuple[type[TorusError], ...] = (
    Again,
    PeerLost,
    ActorCrashed,
    ActorNotFound,
    Overloaded,
    DeadlineExceeded,
)

BY_NAME: dict[str, type[TorusError]] = {}


def _collect(cls: type[TorusError]) -> None:
    BY_NAME[cls.__name__] = cls
    for sub in cls.__subclasses__():
        _collect(sub)


_collect(TorusError)


E = TypeVar("E", bound=TorusError)


def anew(error: E) -> E:
    """An error that was kept, to be raised once more.

    Each raise adds the frames that it came by to an error, with all that was in them: one that is
    kept and raised itself for every write would keep every write in memory.
    """
    return copy.copy(error)
