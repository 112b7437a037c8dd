"""The handshake machine, option by option, against doc/proto.md."""

from __future__ import annotations

import struct

import pytest

from torus_actors.errors import Again, Closed, Locked, NotExist, TorusError
from torus_actors.nbd import handshake as hs
from torus_actors.nbd import protocol as p
from torus_actors.nbd.handshake import Handshake, TlsPolicy
from torus_actors.nbd.protocol import Opt, Rep, TransmissionFlag
from torus_actors.nbd.requests import ExportInfo

FIXED, NO_ZEROES = 1, 2
INFO = ExportInfo("vol", 12345, "a volume")


def events(machine: Handshake) -> list[hs.Event]:
    """Take all events."""
    out = []
    while (event := machine.next_event()) is not None:
        out.append(event)
    return out


def fresh(flags: int = FIXED | NO_ZEROES, tls: TlsPolicy = TlsPolicy.NONE) -> Handshake:
    """A machine that got the client flags."""
    machine = Handshake(tls)
    machine.receive(struct.pack(">I", flags))
    events(machine)
    return machine


def option(code: int, data: bytes = b"") -> bytes:
    """An option as sent."""
    return p.OPTION.pack(p.OPTION_MAGIC, code, len(data)) + data


def go(name: str, *infos: int) -> bytes:
    """Data of a GO or INFO."""
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(infos)}H", len(raw), raw, len(infos), *infos)


def contexts(name: str, *queries: str) -> bytes:
    """Data of a meta context option."""
    data = p.U32.pack(len(name)) + name.encode() + p.U32.pack(len(queries))
    return data + b"".join(p.U32.pack(len(q)) + q.encode() for q in queries)


def replies(happened: list[hs.Event]) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of every option reply sent."""
    raw = b"".join(event.data for event in happened if isinstance(event, hs.Send))
    out = []
    while raw:
        magic, code, rep, length = p.OPTION_REPLY.unpack_from(raw)
        assert magic == p.OPTION_REPLY_MAGIC
        out.append((code, rep, raw[20 : 20 + length]))
        raw = raw[20 + length :]
    return out


def ask(machine: Handshake, code: int, data: bytes = b"") -> list[tuple[int, int, bytes]]:
    """Send an option; its replies."""
    machine.receive(option(code, data))
    return replies(events(machine))


def types(answer: list[tuple[int, int, bytes]]) -> list[int]:
    """Reply types only."""
    return [rep for _, rep, _ in answer]


def test_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    """The server speaks first: both magics, and the two handshake flags."""
    (event,) = events(Handshake())
    assert event == hs.Send(b"NBDMAGICIHAVEOPT\0\3")


def test_unknown_client_flags_end_the_connection() -> None:
    """A MUST of the protocol: the server drops a client that sets a flag it does not know."""
    machine = Handshake()
    machine.receive(struct.pack(">I", 4))
    assert isinstance(events(machine)[-1], hs.Close)


@pytest.mark.parametrize(("flags", "padding"), [(FIXED, 124), (FIXED | NO_ZEROES, 0), (0, 124)])
def test_export_name_enters_with_the_padding_agreed(flags: int, padding: int) -> None:
    """EXPORT_NAME answers size and flags, then 124 zeroes unless NO_ZEROES was negotiated."""
    machine = fresh(flags)
    machine.receive(option(Opt.EXPORT_NAME, b"vol") + b"next")
    assert events(machine) == [hs.OpenExport("vol", True)]
    machine.opened(INFO)
    sent, entered = events(machine)
    assert sent == hs.Send(struct.pack(">QH", 12345, INFO.flags(False)) + bytes(padding))
    assert entered == hs.Enter("vol", False, False, b"next")


def test_export_name_that_is_refused_ends_the_connection() -> None:
    """EXPORT_NAME has no way to carry an error."""
    machine = fresh()
    machine.receive(option(Opt.EXPORT_NAME, b"vol"))
    events(machine)
    machine.refused(NotExist("no"))
    assert [type(event) for event in events(machine)] == [hs.Close]


def test_other_options_need_fixed_newstyle() -> None:
    """EXPORT_NAME "is the only valid option in nonfixed newstyle negotiation"."""
    machine = fresh(0)
    machine.receive(option(Opt.LIST))
    assert isinstance(events(machine)[-1], hs.Close)


def test_go_tells_what_was_asked_and_enters() -> None:
    """GO answers EXPORT and the requested information, then ACK, then transmission begins."""
    machine = fresh()
    machine.receive(option(Opt.GO, go("vol", 1, 2, 3, 99)))
    assert events(machine) == [hs.OpenExport("vol", True)]
    machine.opened(INFO)
    happened = events(machine)
    assert replies(happened) == [
        (Opt.GO, Rep.INFO, struct.pack(">HQH", 0, 12345, INFO.flags(False))),
        (Opt.GO, Rep.INFO, b"\0\1vol"),
        (Opt.GO, Rep.INFO, b"\0\2a volume"),
        (Opt.GO, Rep.INFO, struct.pack(">HIII", 3, 1, 4096, 1 << 25)),
        (Opt.GO, Rep.ACK, b""),
    ]
    assert happened[-1] == hs.Enter("vol", False, False, b"")
    assert machine.state is hs.State.DONE


def test_info_tells_the_same_and_stays() -> None:
    """INFO opens nothing for keeps, and leaves the machine waiting for the next option."""
    machine = fresh()
    machine.receive(option(Opt.INFO, go("")))
    assert events(machine) == [hs.OpenExport("", False)]
    machine.opened(INFO)
    assert types(replies(events(machine))) == [Rep.INFO, Rep.ACK]
    assert types(ask(machine, Opt.STRUCTURED_REPLY)) == [Rep.ACK]


@pytest.mark.parametrize(
    ("error", "rep"),
    [
        (NotExist("no volume x"), Rep.ERR_UNKNOWN),
        (Locked("volume x is held by y"), Rep.ERR_POLICY),
        (Closed("closing"), Rep.ERR_SHUTDOWN),
        (Again("metadata is away"), Rep.ERR_UNKNOWN),
    ],
)
def test_go_that_is_refused_carries_the_text(error: TorusError, rep: Rep) -> None:
    """The client's user reads why; the client may go on with other options."""
    machine = fresh()
    ask(machine, Opt.GO, go("x"))
    machine.refused(error)
    assert replies(events(machine)) == [(Opt.GO, rep, str(error).encode())]
    assert types(ask(machine, Opt.STRUCTURED_REPLY)) == [Rep.ACK]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\5abc\0\0",
        go("vol") + b"x",
        struct.pack(">IH", 0, 2) + b"\0\1",
        struct.pack(">I", 1) + b"\xff\0\0",
        struct.pack(">I", 1) + b"\0\0\0",
    ],
    ids=["empty", "short-name", "trailing", "short-infos", "not-utf8", "nul"],
)
def test_malformed_go_is_invalid(data: bytes) -> None:
    """A field that is not there, or a string that is none, is ERR_INVALID and opens nothing."""
    machine = fresh()
    assert types(ask(machine, Opt.GO, data)) == [Rep.ERR_INVALID]


def test_list_names_all_exports() -> None:
    """LIST answers a SERVER for each export, then ACK; with data it is invalid."""
    machine = fresh()
    assert types(ask(machine, Opt.LIST, b"x")) == [Rep.ERR_INVALID]
    machine.receive(option(Opt.LIST))
    assert events(machine) == [hs.ListExports()]
    machine.listed(["a", "bé"])
    assert replies(events(machine)) == [
        (Opt.LIST, Rep.SERVER, b"\0\0\0\1a"),
        (Opt.LIST, Rep.SERVER, b"\0\0\0\3b\xc3\xa9"),
        (Opt.LIST, Rep.ACK, b""),
    ]


def test_abort_is_acknowledged_and_ends() -> None:
    """ABORT gets its ACK, whatever data it carries, and nothing after it is looked at."""
    machine = fresh()
    machine.receive(option(Opt.ABORT, b"data") + option(Opt.LIST))
    happened = events(machine)
    assert types(replies(happened)) == [Rep.ACK]
    assert happened[-1] == hs.Close("")


@pytest.mark.parametrize("code", [0, 4, 11, 77, 0xFFFFFFFF])
def test_unknown_options_are_unsupported(code: int) -> None:
    """Also the withdrawn PEEK_EXPORT and the extended headers: clients fall back."""
    machine = fresh()
    assert types(ask(machine, code, b"whatever")) == [Rep.ERR_UNSUP]
    assert types(ask(machine, Opt.STRUCTURED_REPLY)) == [Rep.ACK]


def test_oversized_option_is_skipped_not_stored() -> None:
    """Its data is not kept; the answer is ERR_TOO_BIG, and the next option is understood."""
    machine = fresh()
    size = p.MAX_OPTION_BYTES * 3
    stream = p.OPTION.pack(p.OPTION_MAGIC, Opt.LIST, size) + bytes(size)
    stream += option(Opt.STRUCTURED_REPLY)
    answer = []
    for i in range(0, len(stream), 1000):
        machine.receive(stream[i : i + 1000])
        assert len(machine._buffer) <= 1000
        answer += replies(events(machine))
    assert types(answer) == [Rep.ERR_TOO_BIG, Rep.ACK]


def test_overlong_export_name_ends_the_connection() -> None:
    """EXPORT_NAME cannot be refused in any other way, however its length is too long."""
    for data in (bytes(p.MAX_OPTION_BYTES + 1), b"x" * (p.MAX_STRING_BYTES + 1)):
        machine = fresh()
        machine.receive(option(Opt.EXPORT_NAME, data))
        assert isinstance(events(machine)[-1], hs.Close)


def test_bad_option_magic_ends_the_connection() -> None:
    """Without IHAVEOPT the stream cannot be followed any more."""
    machine = fresh()
    machine.receive(b"x" * 16)
    assert isinstance(events(machine)[-1], hs.Close)


def test_structured_reply_takes_no_data() -> None:
    """With data it is invalid and changes nothing."""
    machine = fresh()
    assert types(ask(machine, Opt.STRUCTURED_REPLY, b"x")) == [Rep.ERR_INVALID]
    ask(machine, Opt.GO, go(""))
    machine.opened(INFO)
    assert isinstance(entered := events(machine)[-1], hs.Enter)
    assert not entered.structured


def test_structured_reply_brings_df() -> None:
    """DF may only be offered once structured replies are negotiated."""
    machine = fresh()
    ask(machine, Opt.STRUCTURED_REPLY)
    ask(machine, Opt.GO, go(""))
    machine.opened(INFO)
    happened = events(machine)
    (flags,) = struct.unpack(">H", replies(happened)[0][2][-2:])
    assert flags & TransmissionFlag.SEND_DF
    assert isinstance(happened[-1], hs.Enter)
    assert happened[-1].structured


def test_meta_contexts_need_structured_replies() -> None:
    """Before they are negotiated, both options are invalid."""
    for code in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
        assert types(ask(fresh(), code, contexts("vol"))) == [Rep.ERR_INVALID]


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        (("base:allocation",), True),
        (("base:other",), False),
        (("x-mine:thing",), False),
    ],
)
def test_list_meta_context(queries: tuple[str, ...], found: bool) -> None:
    """No query, the wildcard, and the full name find base:allocation; unknown ones nothing."""
    machine = fresh()
    ask(machine, Opt.STRUCTURED_REPLY)
    answer = ask(machine, Opt.LIST_META_CONTEXT, contexts("vol", *queries))
    expected = [(Opt.LIST_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\0base:allocation")]
    assert answer == expected * found + [(Opt.LIST_META_CONTEXT, Rep.ACK, b"")]


@pytest.mark.parametrize(
    ("queries", "selected"),
    [((), False), (("base:",), False), (("x:y", "base:allocation"), True)],
)
def test_set_meta_context(queries: tuple[str, ...], selected: bool) -> None:
    """Only the full name selects; without queries nothing is."""
    machine = fresh()
    ask(machine, Opt.STRUCTURED_REPLY)
    answer = ask(machine, Opt.SET_META_CONTEXT, contexts("vol", *queries))
    assert types(answer) == [Rep.META_CONTEXT] * selected + [Rep.ACK]
    ask(machine, Opt.GO, go("vol"))
    machine.opened(INFO)
    assert isinstance(entered := events(machine)[-1], hs.Enter)
    assert entered.allocation is selected


def test_meta_context_counts_only_for_its_export_and_until_replaced() -> None:
    """Another export's name, or a later request that fails, leaves nothing selected."""
    for spoil in ("name", "failure"):
        machine = fresh()
        ask(machine, Opt.STRUCTURED_REPLY)
        ask(machine, Opt.SET_META_CONTEXT, contexts("vol", "base:allocation"))
        if spoil == "failure":
            assert types(ask(machine, Opt.SET_META_CONTEXT, b"")) == [Rep.ERR_INVALID]
        ask(machine, Opt.GO, go("vol" if spoil == "failure" else "other"))
        machine.opened(INFO)
        assert isinstance(entered := events(machine)[-1], hs.Enter)
        assert not entered.allocation


def test_too_many_context_queries() -> None:
    """The number of queries has a limit, and it is checked before they are read."""
    machine = fresh()
    ask(machine, Opt.STRUCTURED_REPLY)
    data = p.U32.pack(0) + p.U32.pack(hs.CONTEXT_QUERIES_MAX + 1)
    assert types(ask(machine, Opt.SET_META_CONTEXT, data)) == [Rep.ERR_TOO_BIG]


def test_starttls_without_tls_is_refused_politely() -> None:
    """A NOTLS server refuses by policy, and the session may go on in the clear."""
    machine = fresh()
    assert types(ask(machine, Opt.STARTTLS)) == [Rep.ERR_POLICY]
    assert types(ask(machine, Opt.STRUCTURED_REPLY)) == [Rep.ACK]


@pytest.mark.parametrize("policy", [TlsPolicy.ALLOWED, TlsPolicy.REQUIRED])
def test_starttls_forgets_what_was_negotiated(policy: TlsPolicy) -> None:
    """Nothing negotiated in the clear counts under TLS; a second STARTTLS is invalid."""
    machine = fresh(tls=policy)
    machine.receive(option(Opt.STRUCTURED_REPLY))
    events(machine)
    assert types(ask(machine, Opt.STARTTLS, b"x")) == [Rep.ERR_INVALID]
    machine.receive(option(Opt.STARTTLS))
    happened = events(machine)
    assert types(replies(happened)) == [Rep.ACK]
    assert happened[-1] == hs.StartTls()
    machine.tls_started()
    assert types(ask(machine, Opt.STARTTLS)) == [Rep.ERR_INVALID]
    ask(machine, Opt.GO, go(""))
    machine.opened(INFO)
    assert isinstance(entered := events(machine)[-1], hs.Enter)
    assert not entered.structured


def test_required_tls_refuses_all_else() -> None:
    """A FORCEDTLS server answers TLS_REQD to every option, known or not, but ABORT."""
    machine = fresh(tls=TlsPolicy.REQUIRED)
    for code, data in ((Opt.LIST, b""), (Opt.GO, go("")), (Opt.STRUCTURED_REPLY, b""), (77, b"")):
        assert types(ask(machine, code, data)) == [Rep.ERR_TLS_REQD]
    assert types(ask(machine, Opt.ABORT)) == [Rep.ACK]
    machine = fresh(tls=TlsPolicy.REQUIRED)
    machine.receive(option(Opt.EXPORT_NAME, b""))
    assert isinstance(events(machine)[-1], hs.Close)


@pytest.mark.parametrize("together", [True, False])
def test_plain_bytes_behind_starttls_end_the_connection(together: bool) -> None:
    """What somebody injects before encryption begins is never taken for the client's words."""
    machine = fresh(tls=TlsPolicy.ALLOWED)
    injected = option(Opt.STRUCTURED_REPLY)
    if together:
        machine.receive(option(Opt.STARTTLS) + injected)
    else:
        machine.receive(option(Opt.STARTTLS))
        machine.receive(injected)
    happened = events(machine)
    assert isinstance(happened[-1], hs.Close)
    assert types(replies(happened)) == [Rep.ACK]


def test_options_wait_for_the_answer_before_them() -> None:
    """What arrives while an export is being opened is kept, and understood afterwards."""
    machine = fresh()
    machine.receive(option(Opt.INFO, go("x")) + option(Opt.STRUCTURED_REPLY))
    assert events(machine) == [hs.OpenExport("x", False)]
    machine.refused(NotExist("x"))
    assert types(replies(events(machine))) == [Rep.ERR_UNKNOWN, Rep.ACK]


def test_too_much_while_waiting_ends_the_connection() -> None:
    """What is kept while an answer is awaited has a limit; a late answer then changes nothing."""
    machine = fresh()
    machine.receive(option(Opt.GO, go("x")))
    machine.receive(bytes(hs.PENDING_BYTES_MAX + 1))
    assert isinstance(events(machine)[-1], hs.Close)
    machine.opened(INFO)
    assert events(machine) == []


def test_shutdown_refuses_options() -> None:
    """A server that is going away says so, and lets the client go in peace."""
    machine = fresh()
    machine.shutting_down = True
    assert types(ask(machine, Opt.GO, go(""))) == [Rep.ERR_SHUTDOWN]
    assert types(ask(machine, Opt.ABORT)) == [Rep.ACK]


def test_bytes_one_at_a_time() -> None:
    """How the stream is cut into pieces makes no difference."""
    machine = Handshake()
    for byte in struct.pack(">I", FIXED) + option(Opt.GO, go("vol", 3)):
        machine.receive(bytes([byte]))
    assert events(machine)[1:] == [hs.OpenExport("vol", True)]


def test_read_only_flags() -> None:
    """A read-only export says so, and offers no writing command."""
    flags = ExportInfo("s", 1, read_only=True).flags(True)
    assert flags & TransmissionFlag.READ_ONLY
    writing = TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
    assert not flags & (writing | TransmissionFlag.SEND_FAST_ZERO)
    assert flags & TransmissionFlag.CAN_MULTI_CONN
