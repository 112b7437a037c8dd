"""CACHE: a client says what it is going to read, and that is fetched into the read cache.

It is advice. So as much of it is followed as does not crowd out everything else in the cache, and
never more than a few blocks at a time are on their way, however much is asked for and however
often: what was fetched is the cache's to keep, and nobody else's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from torus_actors.errors import TorusError
from torus_actors.nbd.requests import Piece, Reply, Request
from torus_actors.volume.read_side import ReadSide

CACHE_SHARE = 0.25
"""Of the read cache's size: as much of one request is followed."""

BLOCKS_AT_ONCE = 4
"""Fetched together: 2 MiB of the default size, enough to keep two peers busy."""

WAITING_MAX = 4
"""Requests that wait for the one under way. Any more are answered at once: a client that is gone
would have the volume open until all are done."""


class Prefetch:
    """A session's answers to CACHE, one after the other.

    Args:
        file: of the session.
        answer: sends a reply to a connection.
    """

    def __init__(self, file: ReadSide, answer: Callable[[int, Reply], None]) -> None:
        self._file = file
        self._answer = answer
        self._waiting: deque[tuple[int, Request]] = deque()
        self._at = self._end = 0
        self._busy = False

    def ask(self, conn: int, request: Request) -> None:
        """Fetch, then answer."""
        if len(self._waiting) > WAITING_MAX:
            self._answer(conn, Reply(request))
            return
        self._waiting.append((conn, request))  # the first one is under way
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        """Begin with the request that is first by now."""
        self._busy = bool(self._waiting)
        if self._busy:
            _, request = self._waiting[0]
            most = int(self._file.cache.size_max * CACHE_SHARE)
            self._at, self._end = request.offset, request.offset + min(request.length, most)
            self._fetch()

    def _fetch(self) -> None:
        """Fetch the next few blocks."""
        at, block_size = self._at, self._file.block_size
        size = min(BLOCKS_AT_ONCE * block_size - at % block_size, self._end - at)
        if size <= 0:
            self._ended(None)
            return
        self._at += size
        try:
            pieces = self._file.read_at(at, size, self._fetched)
        except TorusError as error:
            self._ended(error)
            return
        if pieces is not None:  # in memory already; the loop has its turn all the same
            self._file.loop.call_soon(self._fetch)

    def _fetched(self, error: TorusError | None, _: Sequence[Piece]) -> None:
        if error is None:
            self._fetch()
        else:
            self._ended(error)

    def _ended(self, error: TorusError | None) -> None:
        conn, request = self._waiting.popleft()
        self._answer(conn, Reply(request) if error is None else Reply.failed(request, error))
        self._begin()
