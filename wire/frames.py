"""Frames: a fixed header, msgpack metadata, then the raw payload. No I/O.

Header, 32 bytes, little-endian:

    offset  size  field
    0       4     magic "TrsA"
    4       4     CRC-32C of everything behind this field to the end of the metadata
    8       1     version of this layout, 1
    9       1     kind
    10      2     flags; bit 0: a payload follows, which may be empty; bit 1: it carries checksums
                  of its own, which its reader verifies, and none is in this header
    12      4     metadata length, bytes
    16      4     payload length, bytes
    20      4     CRC-32C of the payload
    24      8     request id

The checksum stands in front, so that it covers one contiguous range and costs one call. The
metadata is verified before memory for a large payload is taken, so a damaged length is found out
before it is acted on.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from crc32c import crc32c

from torus_actors.errors import Invalid, ProtocolError
from torus_actors.wire.limits import (
    DIRECT_PAYLOAD_MIN,
    HELLO_MAX,
    METADATA_MAX,
    PAYLOAD_MAX,
    PEEK_BYTES,
    RECEIVE_BUFFER_SIZE,
)

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"TrsA"
FRAME_VERSION: Final = 1
FLAG_PAYLOAD: Final = 1
FLAG_CHECKED: Final = 2
FLAGS: Final = FLAG_PAYLOAD | FLAG_CHECKED
HEADER_SIZE: Final = 32

_HEADER = struct.Struct("<4sIBBHIIIQ")
_CHECKED = struct.Struct("<BBHIIIQ")
_START = struct.Struct("<4sI")
_CHECKED_AT: Final = 8
"""Where in the header the checksum's range begins."""


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    CALL = 2
    CAST = 3
    REPLY = 4
    ERROR = 5
    PING = 6
    PONG = 7


_KINDS: Final[tuple[Kind | None, ...]] = tuple(
    Kind(code) if code in set(Kind) else None for code in range(256)
)


class Frame(NamedTuple):
    """One received frame; its buffers belong to the receiver.

    Attributes:
        kind: what it is for.
        request_id: pairs an answer with its call; 64 bits.
        meta: msgpack metadata.
        payload: one contiguous buffer, possibly empty; None where none was sent.
    """

    kind: Kind
    request_id: int
    meta: bytes | memoryview
    payload: memoryview | None


def encode(
    kind: Kind,
    request_id: int,
    meta: bytes = b"",
    payload: Sequence[Buffer] = (),
    checked: bool = False,
) -> list[Buffer]:
    """Frame a message, without copying or joining its payload.

    Args:
        kind: what it is for.
        request_id: 0 to 2**64-1.
        meta: encoded metadata, at most METADATA_MAX bytes.
        payload: contiguous buffers that arrive as one; ``()`` for no payload, ``[b""]`` for an
            empty one. They may not change until they are sent.
        checked: who reads the payload verifies it, end to end, by checksums that came with it.

    Returns:
        Buffers to send in this order: header with metadata, then the payload's own buffers.

    Raises:
        Invalid: over a limit.
    """
    size = checksum = flags = 0
    if payload:
        flags = FLAGS if checked else FLAG_PAYLOAD
        for part in payload:
            size += part.nbytes if type(part) is memoryview else len(part)
            if not checked:
                checksum = crc32c(part, checksum)
        if size > PAYLOAD_MAX:
            raise Invalid(f"payload of {size} bytes: at most {PAYLOAD_MAX} can be sent")
    if len(meta) > METADATA_MAX:
        raise Invalid(f"metadata of {len(meta)} bytes: at most {METADATA_MAX} can be sent")
    try:
        covered = (
            _CHECKED.pack(FRAME_VERSION, kind, flags, len(meta), size, checksum, request_id) + meta
        )
    except struct.error:
        raise Invalid(f"request id {request_id} does not fit 64 bits") from None
    return [_START.pack(MAGIC, crc32c(covered)) + covered, *payload]


def new_payload(size: int) -> memoryview:
    """Memory for a payload, the default of FrameDecoder: a fresh bytearray."""
    return memoryview(bytearray(size))


_new_frame: Callable[[type[Frame], tuple[Any, ...]], Frame] = tuple.__new__


class FrameDecoder:
    """Turns received bytes into frames; the buffer side of an ``asyncio.BufferedProtocol``.

    Small frames are received in batches into a reused buffer and copied out; a payload of
    DIRECT_PAYLOAD_MIN or more is received in its own memory, and only what came in the same read
    as its header is copied. A frame never refers to the reused buffer.

    Behind a payload received directly the next read takes only as much as a header and ordinary
    metadata need: large payloads come in rows, and what is read of one with its header is copied.

    A decoder starts restricted to what the handshake needs: HELLO_MAX bytes, no payload, and one
    frame at a time, because what a peer sends right behind its last hello already falls under the
    full limits. ``lift_limits`` ends that.

    Args:
        allocate: gives writable memory of exactly the asked size in bytes; called only for
            lengths within the limits. What it raises ends the connection.
        restricted: begin with the limits of the handshake.
        buffer_size: bytes of the reused buffer, more than a header.
    """

    __slots__ = (
        "_allocate",
        "_buffer",
        "_end",
        "_failure",
        "_filled",
        "_header",
        "_in_metadata",
        "_meta",
        "_metadata_max",
        "_payload_max",
        "_peeking",
        "_restricted",
        "_size",
        "_start",
        "_target",
        "_unfed",
        "_view",
    )

    def __init__(
        self,
        allocate: Callable[[int], memoryview] = new_payload,
        *,
        restricted: bool = True,
        buffer_size: int = RECEIVE_BUFFER_SIZE,
    ) -> None:
        self._allocate = allocate
        self._restricted = restricted
        self._metadata_max = HELLO_MAX if restricted else METADATA_MAX
        self._payload_max = 0 if restricted else PAYLOAD_MAX
        self._size = buffer_size
        self._buffer = bytearray(buffer_size)
        self._view = memoryview(self._buffer)
        # What was received and not yet taken is _buffer[_start:_end].
        self._start = 0
        self._end = 0
        # Where a part too large for the buffer is received: metadata, then payload.
        self._target: memoryview | None = None
        self._filled = 0
        self._in_metadata = False
        self._header: bytes | bytearray = b""
        self._meta: bytes | memoryview = b""
        self._failure: ProtocolError | None = None
        self._peeking = False
        # What ``feed`` got behind a frame of the handshake.
        self._unfed = b""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive next; never empty.

        Args:
            sizehint: ignored, the decoder knows better.
        """
        target = self._target
        if target is not None:
            return target[self._filled :]
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = end = 0
            if self._peeking:
                return self._view[:PEEK_BYTES]
        elif start and self._size - end < self._size >> 1:
            # The rest of a frame is moved to the front, for the next read to be a large one.
            self._start, self._end = 0, end - start
            self._view[: end - start] = self._view[start:end]
            end -= start
        return self._view[end:]

    def buffer_updated(self, nbytes: int) -> list[Frame]:
        """Take note of bytes received into the last ``get_buffer``.

        Returns:
            The frames that are now complete, in order; at most one while restricted.

        Raises:
            ProtocolError: the stream is broken and the connection must end. Frames completed by
                the same bytes are lost with it. Raised again on each further call.
        """
        if self._failure is not None:
            raise self._failure
        if self._target is None:
            self._end += nbytes
            self._peeking = False
            return self._take_frames()
        self._filled += nbytes
        if self._filled < len(self._target):
            return []
        return self._target_full()

    def lift_limits(self) -> list[Frame]:
        """Go over to the full limits, once the other side is known.

        Returns:
            Frames that had already come behind the last hello.

        Raises:
            ProtocolError: those are broken.
        """
        self._restricted = False
        self._metadata_max = METADATA_MAX
        self._payload_max = PAYLOAD_MAX
        frames = self.buffer_updated(0) if self._target is None else []
        return frames + self.feed(b"")

    def feed(self, data: Buffer) -> list[Frame]:
        """Receive bytes that are already at hand; copies them once more than a socket would.

        Raises:
            ProtocolError: as ``buffer_updated``.
        """
        frames: list[Frame] = []
        rest = memoryview(self._unfed + data if self._unfed else data)
        self._unfed = b""
        while len(rest):
            room = self.get_buffer(len(rest))
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            frames += self.buffer_updated(count)
            rest = rest[count:]
            if frames and self._restricted:
                # The next one may already fall under the full limits.
                self._unfed = bytes(rest)
                break
        return frames

    def _take_frames(self) -> list[Frame]:
        """Take all frames that are whole; begin a direct reception where one is needed."""
        frames: list[Frame] = []
        buffer, view = self._buffer, self._view
        start, end = self._start, self._end
        while end - start >= HEADER_SIZE:
            magic, checksum, version, code, flags, meta_size, size, payload_checksum, request_id = (
                _HEADER.unpack_from(buffer, start)
            )
            kind = _KINDS[code]
            if (
                magic != MAGIC
                or version != FRAME_VERSION
                or kind is None
                or flags > FLAGS
                or flags == FLAG_CHECKED
                or size > self._payload_max
                or meta_size > self._metadata_max
                or (size and not flags & FLAG_PAYLOAD)
            ):
                raise self._fail(self._reason(start))
            meta_start = start + HEADER_SIZE
            meta_end = meta_start + meta_size
            payload_end = meta_end + size
            if meta_end > end:
                if meta_end - start > self._size:
                    self._begin_metadata(start, meta_size)
                    return frames
                break
            direct = size >= DIRECT_PAYLOAD_MIN or payload_end - start > self._size
            if payload_end > end and not direct:
                break
            checked = bytes(view[start + _CHECKED_AT : meta_end])
            if crc32c(checked) != checksum:
                raise self._fail("a frame's header or metadata does not match its checksum")
            meta = checked[HEADER_SIZE - _CHECKED_AT :]
            payload: memoryview | None = None
            if direct:
                payload = self._allocate(size)
                if payload_end > end:
                    payload[: end - meta_end] = view[meta_end:end]
                    self._header = buffer[start:meta_start]
                    self._meta = meta
                    self._receive_into(payload, end - meta_end)
                    return frames
                payload[:] = view[meta_end:payload_end]
            elif flags:
                payload = memoryview(buffer[meta_end:payload_end])
            if payload is not None and not flags & FLAG_CHECKED:
                self._verify(payload, payload_checksum)
            frames.append(_new_frame(Frame, (kind, request_id, meta, payload)))
            start = payload_end
            if self._restricted:
                break
        self._start = start
        return frames

    def _verify(self, payload: memoryview, checksum: int) -> None:
        if crc32c(payload) != checksum:
            raise self._fail("a frame's payload does not match its checksum")

    def _begin_metadata(self, start: int, meta_size: int) -> None:
        """Metadata larger than the reused buffer, which is rare, gets its own memory too."""
        have = self._end - start - HEADER_SIZE
        target = memoryview(bytearray(meta_size))
        target[:have] = self._view[start + HEADER_SIZE : self._end]
        self._header = self._buffer[start : start + HEADER_SIZE]
        self._receive_into(target, have)
        self._in_metadata = True

    def _receive_into(self, target: memoryview, filled: int) -> None:
        # All that was in the reused buffer belongs to this frame and has been copied.
        self._start = self._end = 0
        self._target = target
        self._filled = filled

    def _target_full(self) -> list[Frame]:
        """The metadata or payload received directly is complete."""
        target = self._target
        assert target is not None
        self._target = None
        self._peeking = True
        _, checksum, _, code, flags, _, size, payload_checksum, request_id = _HEADER.unpack(
            self._header
        )
        payload: memoryview | None = target
        if self._in_metadata:
            self._in_metadata = False
            if crc32c(target, crc32c(self._header[_CHECKED_AT:])) != checksum:
                raise self._fail("a frame's header or metadata does not match its checksum")
            self._meta = target
            if size:
                self._receive_into(self._allocate(size), 0)
                return []
            payload = memoryview(b"") if flags else None
        if payload is not None and not flags & FLAG_CHECKED:
            self._verify(payload, payload_checksum)
        meta, self._meta = self._meta, b""
        return [Frame(Kind(code), request_id, meta, payload)]

    def _reason(self, start: int) -> str:
        """Say in plain words what is wrong with a header."""
        magic, _, version, code, flags, meta_size, size, _, _ = _HEADER.unpack_from(
            self._buffer, start
        )
        if magic != MAGIC:
            return f"not a frame: it begins with {magic!r}"
        if version != FRAME_VERSION:
            return f"frame version {version} is not known, only {FRAME_VERSION}"
        if _KINDS[code] is None:
            return f"frame kind {code} is not known"
        if flags > FLAGS or flags == FLAG_CHECKED:
            return f"frame flags {flags:#x} are not known"
        when = "before the handshake is done" if self._restricted else "in a frame"
        if meta_size > self._metadata_max:
            return f"{meta_size} bytes of metadata {when}: the limit is {self._metadata_max}"
        if size > self._payload_max:
            return f"{size} bytes of payload {when}: the limit is {self._payload_max}"
        return f"{size} bytes of payload in a frame that says it has none"

    def _fail(self, reason: str) -> ProtocolError:
        self._failure = ProtocolError(reason)
        self._start = self._end = 0
        return self._failure
