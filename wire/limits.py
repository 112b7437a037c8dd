"""Every bound of the wire protocol, each with its reason.

A sender that is over a bound gets Invalid and sends nothing; a receiver ends the connection with
ProtocolError, before it allocated anything for what was announced.
"""

from __future__ import annotations

METADATA_MAX = 1 << 20
"""Bytes of msgpack metadata in a frame: about 38,000 block refs, the largest batch that is useful.
It is decoded in one go on the event loop, so it bounds how long one peer can hold up the others."""

PAYLOAD_MAX = (16 << 20) + (16 << 10)
"""Bytes of raw payload in a frame: the largest block, and its checksum list of 4 bytes a page,
which is read together with it. Bounds what one announced length can make a node allocate."""

HELLO_MAX = 64 << 10
"""Bytes of metadata in a frame before the handshake is done, when the other side is a stranger;
such a frame has no payload at all."""

ARRAY_MAX = 1 << 16
"""Entries of one array or map in metadata. The decoder sets memory aside from the announced count,
for every level of nesting; an honest METADATA_MAX of refs stays below it."""

RECEIVE_BUFFER_SIZE = 128 << 10
"""Bytes of a connection's reused receive buffer: dozens of small calls in one read, and little to
copy where a large payload begins. Twice DIRECT_PAYLOAD_MIN, so that a smaller payload fits."""

DIRECT_PAYLOAD_MIN = 64 << 10
"""Payloads from this size on are received straight into their own memory: copying that much costs
more than the additional read."""

PEEK_BYTES = 4 << 10
"""What is read at first behind a large payload: the header and metadata of the next one."""

NAME_MAX = 128
"""Characters of an actor, method or error name."""

TIMEOUT_MAX_MS = 24 * 3600 * 1000
"""A deadline further away than a day is a mistake in its unit."""

ERROR_TEXT_MAX = 4096
"""Characters of an error's text; it is one plain line, with the cause of a crash at most."""

ERROR_ATTRIBUTE_MAX = 4096
"""Encoded bytes of one attribute of an error; a larger one stays with the side that raised it."""

ID_MAX = 64
"""Characters of a cluster or node id; a UUID has 36."""

NONCE_SIZE = 32
"""Bytes of a handshake nonce: as many as the MAC has, so it never repeats by chance."""

SECRET_MIN = 16
"""Bytes of a cluster secret: a listener proves that it knows the secret to whoever connects, so a
short one could be guessed offline."""
