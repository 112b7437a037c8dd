"""The server's side of the fixed newstyle handshake, without I/O.

Feed what arrives to ``receive``; then take events from ``next_event`` until it returns None. Some
events are questions that only the world outside can answer (which exports are there? may this one
be opened?); the machine waits, and keeps what arrives meanwhile, until the answer is given:

    event                   give back
    ----------------------  ------------------------------------------------------------
    Send(data)              nothing; write it
    ListExports()           listed(names) or refused(error)
    OpenExport(name, ...)   opened(info) or refused(error)
    StartTls()              tls_started(), once the connection is encrypted
    Enter(...)              nothing; the transmission phase begins, ``leftover`` belongs to it
    Close(reason)           nothing; end the connection

Quotations are from doc/proto.md of https://github.com/NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torus_actors.errors import TorusError
from torus_actors.nbd import protocol as p
from torus_actors.nbd.protocol import ClientFlag, HandshakeFlag, Info, Opt, Rep
from torus_actors.nbd.requests import ExportInfo

PENDING_BYTES_MAX = 1 << 20
"""Bytes kept while an answer is awaited. "The client MUST NOT send any option until it has
received a final reply"; only one that sends requests right behind EXPORT_NAME has any to send."""

CONTEXT_QUERIES_MAX = 64
"""Queries in one meta context option; known clients send one or two."""


class TlsPolicy(enum.Enum):
    """The three modes of "TLS support": NOTLS, SELECTIVETLS (for no export), FORCEDTLS."""

    NONE = "none"
    ALLOWED = "allowed"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes to write."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ListExports:
    """Asks for the names of all exports."""


@dataclass(frozen=True, slots=True)
class OpenExport:
    """Asks for an export; ``keep`` is False when the client only wants to know about it."""

    name: str
    keep: bool


@dataclass(frozen=True, slots=True)
class StartTls:
    """Encrypt the connection, as its server side."""


@dataclass(frozen=True, slots=True)
class Enter:
    """The handshake is over.

    Attributes:
        name: the export's name as the client gave it.
        structured: structured replies were negotiated.
        allocation: the ``base:allocation`` context was selected.
        leftover: bytes that arrived behind the handshake.
    """

    name: str
    structured: bool
    allocation: bool
    leftover: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection. ``reason`` is empty when the client asked for it."""

    reason: str


Event = Send | ListExports | OpenExport | StartTls | Enter | Close


class State(enum.Enum):
    """What the machine waits for."""

    CLIENT_FLAGS = enum.auto()
    OPTION = enum.auto()
    ANSWER = enum.auto()
    TLS = enum.auto()
    DONE = enum.auto()


class _Violation(Exception):
    """The client broke a rule that leaves no way to answer."""


class _Refusal(Exception):
    """The option at hand is answered with an error."""

    def __init__(self, rep: Rep, message: str) -> None:
        super().__init__(message)
        self.rep = rep
        self.message = message


@dataclass(slots=True)
class _Pending:
    """The option whose answer is awaited."""

    option: int
    name: str = ""
    infos: frozenset[int] = frozenset()


class Handshake:
    """One connection's handshake; see the module's docstring for how to drive it.

    Args:
        tls: whether this connection may, or must, be encrypted.
    """

    def __init__(self, tls: TlsPolicy = TlsPolicy.NONE) -> None:
        self._tls = tls
        self._state = State.CLIENT_FLAGS
        self._buffer = bytearray()
        self._events: deque[Event] = deque()
        self._skip = 0
        self._skipped: int | None = None
        self._fixed = False
        self._zeroes = True
        self._secure = False
        self._structured = False
        self._context_export: str | None = None
        self._pending: _Pending | None = None
        self.shutting_down = False
        """Set it to answer every further option ERR_SHUTDOWN."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._events.append(Send(p.GREETING.pack(p.NBD_MAGIC, p.OPTION_MAGIC, flags)))

    @property
    def state(self) -> State:
        """What the machine waits for."""
        return self._state

    @property
    def waits_for_client(self) -> bool:
        """Whether it is the client's turn, so that its silence is its own fault."""
        return self._state in (State.CLIENT_FLAGS, State.OPTION)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the client, in pieces of any size."""
        if self._state is State.DONE:
            return
        if self._state is State.TLS:
            # Plain bytes behind STARTTLS may be somebody else's, put there to be taken for the
            # client's once the connection is encrypted.
            self._close("plain data behind STARTTLS")
            return
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = memoryview(data)[skipped:]
        self._buffer += data
        if len(self._buffer) > PENDING_BYTES_MAX and self._state is State.ANSWER:
            self._close("too much data before the answer to an option")
        self._advance()

    def next_event(self) -> Event | None:
        """The next thing to do, or None until more is received or answered."""
        return self._events.popleft() if self._events else None

    # --- answers ---------------------------------------------------------------------------

    def listed(self, names: Sequence[str]) -> None:
        """Answer to ListExports."""
        pending = self._take_pending()
        if pending is None:
            return
        for name in names:
            raw = name.encode("utf-8")
            self._reply(pending.option, Rep.SERVER, p.U32.pack(len(raw)) + raw)
        self._reply(pending.option, Rep.ACK)
        self._advance()

    def opened(self, info: ExportInfo) -> None:
        """Answer to OpenExport: here it is."""
        pending = self._take_pending()
        if pending is None:
            return
        flags = info.flags(self._structured)
        if pending.option == Opt.EXPORT_NAME:
            reply = p.EXPORT_REPLY.pack(info.size, flags)
            self._events.append(Send(reply + p.EXPORT_PADDING if self._zeroes else reply))
            self._enter(pending.name)
            return
        option = pending.option
        self._reply(option, Rep.INFO, p.INFO_EXPORT.pack(Info.EXPORT, info.size, flags))
        # "The server MAY send information requests back which are not explicitly requested", but
        # some clients warn about them, so only what was asked for is sent.
        if Info.NAME in pending.infos:
            self._reply(option, Rep.INFO, p.U16.pack(Info.NAME) + p.message_bytes(info.name))
        if Info.DESCRIPTION in pending.infos and info.description:
            text = p.message_bytes(info.description)
            self._reply(option, Rep.INFO, p.U16.pack(Info.DESCRIPTION) + text)
        if Info.BLOCK_SIZE in pending.infos:
            sizes = (p.MIN_BLOCK_BYTES, p.PREFERRED_BLOCK_BYTES, p.MAX_PAYLOAD_BYTES)
            self._reply(option, Rep.INFO, p.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Rep.ACK)
        if option == Opt.GO:
            self._enter(pending.name)
        else:
            self._advance()

    def refused(self, error: TorusError) -> None:
        """Answer to ListExports or OpenExport: it cannot be done."""
        pending = self._take_pending()
        if pending is None:
            return
        if pending.option == Opt.EXPORT_NAME:
            # "If the server is unwilling to allow the export, it MUST terminate the session."
            self._close(f"export {pending.name!r} was refused: {error}")
            return
        self._reply(pending.option, p.refusal_of(error), p.message_bytes(str(error)))
        self._advance()

    def tls_started(self) -> None:
        """Answer to StartTls; what is received from now on was encrypted."""
        if self._state is not State.TLS:
            return
        self._secure = True
        # "The server MUST NOT preserve any negotiation state (such as a request for
        # NBD_OPT_STRUCTURED_REPLY, or metadata contexts) issued before this command."
        self._structured = False
        self._context_export = None
        self._state = State.OPTION

    # --- inside ----------------------------------------------------------------------------

    def _take_pending(self) -> _Pending | None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._state = State.OPTION
        return pending

    def _close(self, reason: str) -> None:
        self._state = State.DONE
        self._pending = None
        self._buffer.clear()
        self._events.append(Close(reason))

    def _enter(self, name: str) -> None:
        self._state = State.DONE
        # "the final time it was sent, it referred to the same export name that was ultimately
        # selected for transmission phase"
        allocation = self._structured and self._context_export == name
        self._events.append(Enter(name, self._structured, allocation, bytes(self._buffer)))
        self._buffer.clear()

    def _reply(self, option: int, rep: Rep, data: bytes = b"") -> None:
        header = p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, rep, len(data))
        self._events.append(Send(header + data))

    def _advance(self) -> None:
        try:
            while self._step():
                pass
        except _Violation as broken:
            self._close(str(broken))

    def _step(self) -> bool:
        """Consume one message; False when there is no whole one, or it is not the time for it."""
        buffer = self._buffer
        if self._state is State.CLIENT_FLAGS:
            if len(buffer) < p.CLIENT_FLAGS.size:
                return False
            (flags,) = p.CLIENT_FLAGS.unpack_from(buffer)
            del buffer[: p.CLIENT_FLAGS.size]
            self._client_flags(flags)
            return True
        if self._state is not State.OPTION:
            return False
        if self._skipped is not None:
            if self._skip:
                return False
            option, self._skipped = self._skipped, None
            message = f"option data is limited to {p.MAX_OPTION_BYTES} bytes"
            self._reply(option, Rep.ERR_TOO_BIG, message.encode())
            return True
        if len(buffer) < p.OPTION.size:
            return False
        magic, option, length = p.OPTION.unpack_from(buffer)
        if magic != p.OPTION_MAGIC:
            raise _Violation("an option does not begin with IHAVEOPT")
        if not self._fixed and option != Opt.EXPORT_NAME:
            # "This is the only valid option in nonfixed newstyle negotiation."
            raise _Violation(f"option {option} without fixed newstyle")
        if length > p.MAX_OPTION_BYTES:
            if option == Opt.EXPORT_NAME:
                raise _Violation("the export name is too long")
            del buffer[: p.OPTION.size]
            present = min(length, len(buffer))
            del buffer[:present]
            self._skip = length - present
            self._skipped = option
            return True
        if len(buffer) < p.OPTION.size + length:
            return False
        data = bytes(buffer[p.OPTION.size : p.OPTION.size + length])
        del buffer[: p.OPTION.size + length]
        try:
            self._option(option, data)
        except _Refusal as refusal:
            if option == Opt.EXPORT_NAME:
                raise _Violation(refusal.message) from None
            self._reply(option, refusal.rep, p.message_bytes(refusal.message))
        return True

    def _client_flags(self, flags: int) -> None:
        # "the server MUST drop the TCP connection if the client sets an unknown flag"
        # (As plain int: the inverse of an IntFlag has only flags that are known.)
        if flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            raise _Violation(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & ClientFlag.NO_ZEROES
        self._state = State.OPTION

    def _option(self, option: int, data: bytes) -> None:
        if option == Opt.ABORT:
            # "a server SHOULD ignore any data sent by the client rather than rejecting"
            self._reply(option, Rep.ACK)
            self._close("")
            return
        if self.shutting_down:
            raise _Refusal(Rep.ERR_SHUTDOWN, "the server is shutting down")
        if option == Opt.STARTTLS:
            self._start_tls(data)
            return
        if self._tls is TlsPolicy.REQUIRED and not self._secure:
            # "If the server receives any other option, it MUST reply with NBD_REP_ERR_TLS_REQD
            # if TLS has not been initiated."
            raise _Refusal(Rep.ERR_TLS_REQD, "this server requires TLS")
        match option:
            case Opt.EXPORT_NAME:
                self._ask_open(_Pending(option, _string(data)), keep=True)
            case Opt.GO | Opt.INFO:
                self._ask_open(_parse_info(option, data), keep=option == Opt.GO)
            case Opt.LIST:
                _expect_no_data(data)
                self._pending = _Pending(option)
                self._state = State.ANSWER
                self._events.append(ListExports())
            case Opt.STRUCTURED_REPLY:
                _expect_no_data(data)
                self._structured = True
                self._reply(option, Rep.ACK)
            case Opt.LIST_META_CONTEXT | Opt.SET_META_CONTEXT:
                self._meta_context(option, data)
            case _:
                raise _Refusal(Rep.ERR_UNSUP, f"option {option} is not supported")

    def _ask_open(self, pending: _Pending, keep: bool) -> None:
        self._pending = pending
        self._state = State.ANSWER
        self._events.append(OpenExport(pending.name, keep))

    def _start_tls(self, data: bytes) -> None:
        _expect_no_data(data)
        if self._tls is TlsPolicy.NONE:
            raise _Refusal(Rep.ERR_POLICY, "this server does not offer TLS")
        if self._secure:
            # "when TLS has already been negotiated, it MUST reply with NBD_REP_ERR_INVALID"
            raise _Refusal(Rep.ERR_INVALID, "TLS is already on")
        self._reply(Opt.STARTTLS, Rep.ACK)
        if self._buffer:
            raise _Violation("plain data behind STARTTLS")
        self._state = State.TLS
        self._events.append(StartTls())

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == Opt.SET_META_CONTEXT
        if setting:
            # "Issuing this command replaces all previously-set metadata contexts (including when
            # this command fails)"
            self._context_export = None
        if not self._structured:
            # "If a client attempts to do so, a server SHOULD send NBD_REP_ERR_INVALID."
            raise _Refusal(Rep.ERR_INVALID, "meta contexts need structured replies first")
        name, queries = _parse_contexts(data)
        if setting:
            # "`base:` - the server MUST ignore this form during NBD_OPT_SET_META_CONTEXT"
            selected = p.BASE_ALLOCATION in queries
            context_id = p.BASE_ALLOCATION_ID
        else:
            # "If zero queries are sent, then the server MUST return all the metadata contexts"
            selected = not queries or "base:" in queries or p.BASE_ALLOCATION in queries
            # "The metadata context ID in these replies is reserved and SHOULD be set to zero"
            context_id = 0
        if selected:
            context = p.U32.pack(context_id) + p.BASE_ALLOCATION.encode()
            self._reply(option, Rep.META_CONTEXT, context)
            if setting:
                self._context_export = name
        self._reply(option, Rep.ACK)


def _expect_no_data(data: bytes) -> None:
    # "The client MUST NOT send any additional data with the option, and the server SHOULD reject
    # a request that includes data with NBD_REP_ERR_INVALID."
    if data:
        raise _Refusal(Rep.ERR_INVALID, "this option takes no data")


def _string(raw: bytes) -> str:
    # "a string is a sequence of UTF-8 code points, which is not NUL terminated, MUST NOT contain
    # NUL characters, ... and MUST be no longer than 4096 bytes"
    if len(raw) > p.MAX_STRING_BYTES:
        raise _Refusal(Rep.ERR_TOO_BIG, f"a string is limited to {p.MAX_STRING_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refusal(Rep.ERR_INVALID, "a string is not UTF-8") from None
    if "\0" in text:
        raise _Refusal(Rep.ERR_INVALID, "a string contains NUL")
    return text


class _Reader:
    """Reads the fields of an option; a field that is not there makes the option invalid."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def raw(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _Refusal(Rep.ERR_INVALID, "the option ends inside a field")
        self._at += size
        return self._data[self._at - size : self._at]

    def u16(self) -> int:
        return int.from_bytes(self.raw(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.raw(4), "big")

    def string(self) -> str:
        return _string(self.raw(self.u32()))

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refusal(Rep.ERR_INVALID, "the option has data behind its last field")


def _parse_info(option: int, data: bytes) -> _Pending:
    reader = _Reader(data)
    name = reader.string()
    infos = frozenset(reader.u16() for _ in range(reader.u16()))
    reader.end()
    return _Pending(option, name, infos)


def _parse_contexts(data: bytes) -> tuple[str, list[str]]:
    reader = _Reader(data)
    name = reader.string()
    count = reader.u32()
    if count > CONTEXT_QUERIES_MAX:
        # "the server MAY fail with NBD_REP_ERR_TOO_BIG if too many queries are requested"
        raise _Refusal(Rep.ERR_TOO_BIG, f"at most {CONTEXT_QUERIES_MAX} queries")
    queries = [reader.string() for _ in range(count)]
    reader.end()
    return name, queries
