"""AoE without a network: what each command is answered with, and what the volume is asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest

from tests.aoe_initiator import (
    EVERYBODY,
    FLUSH,
    HOST_MAC,
    IDENTIFY,
    OTHER_MAC,
    READ,
    READ_EXT,
    SECTOR,
    TARGET_MAC,
    WRITE,
    WRITE_EXT,
    Answer,
    ata,
    config,
    decode,
    frame,
)
from torus_actors.aoe import target as target_module
from torus_actors.aoe.protocol import Error, format_mac, list_max, parse_mac, sectors_of_mtu
from torus_actors.aoe.target import RECENT_S, Disk, Target
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Hole, Op, Piece, Reply, Request

SECTORS = 4096


class Bench:
    """A target, its clock, and what it has asked the volume for."""

    def __init__(
        self,
        size_bytes: int = SECTORS * SECTOR,
        read_only: bool = False,
        accept: Iterable[bytes] = (),
    ) -> None:
        self.target = Target(
            7, 3, Disk("vol", size_bytes, read_only, "0123456789abcdef0123"), list(accept)
        )
        self.target.mac = TARGET_MAC
        self.now = 100.0
        self.requests: list[Request] = []

    def send(self, sent: bytes) -> Answer | None:
        """Give it a frame; the answer, if there is one at once."""
        pieces = self.target.receive(sent, self.now, self.requests)
        return None if pieces is None else decode(b"".join(pieces))

    def ask(self, sent: bytes) -> Answer:
        """The same where there must be one."""
        answer = self.send(sent)
        assert answer is not None
        return answer

    def reply(self, request: Request, error: int = 0, *pieces: Piece) -> Answer:
        """The volume answers."""
        out = self.target.answered(Reply(request, error, buffers=pieces), self.now)
        assert out is not None
        return decode(b"".join(out))

    def asked(self, sent: bytes) -> Request:
        """Give it a frame that is for the volume."""
        before = len(self.requests)
        assert self.send(sent) is None
        (request,) = self.requests[before:]
        return request


@pytest.fixture
def bench() -> Bench:
    """A target of a volume that can be written to."""
    return Bench()


def write(lba: int, fill: bytes, tag: int, source: bytes = HOST_MAC, count: int = 1) -> bytes:
    """A write of sectors of one byte."""
    return frame(0, ata(WRITE_EXT, lba, count, fill * SECTOR * count), tag, source=source)


# -- reading and writing ---------------------------------------------------------------------------


def test_every_write_is_durable_before_its_answer(bench: Bench) -> None:
    """Initiators do not flush: each write asks the volume for FUA, and waits for it."""
    for tag, code in enumerate((WRITE, WRITE_EXT)):
        request = bench.asked(frame(0, ata(code, 5, 2, b"a" * 1024), tag))
        assert request.op == Op.WRITE and request.fua is True
        assert (request.offset, request.length) == (5 * SECTOR, 1024)
        assert request.data is not None and bytes(request.data) == b"a" * 1024
        answer = bench.reply(request)
        assert (answer.tag, answer.error, answer.status, answer.ata_error) == (tag, 0, 0x40, 0)
        assert answer.body[2] == 0, "no sector is left"
        assert (answer.destination, answer.source) == (HOST_MAC, TARGET_MAC)
        assert (answer.major, answer.minor) == (7, 3)


def test_holes_are_read_as_zeros(bench: Bench) -> None:
    """Pieces of the volume's answer follow the registers, in their order."""
    request = bench.asked(frame(0, ata(READ_EXT, 8, 2), 9))
    assert (request.op, request.offset, request.length) == (Op.READ, 8 * SECTOR, 1024)
    answer = bench.reply(request, 0, b"x" * 100, Hole(800), memoryview(b"y" * 124))
    assert answer.data == b"x" * 100 + bytes(800) + b"y" * 124


def test_addresses_of_28_bits_have_other_bits_above_them(bench: Bench) -> None:
    """The device register shares a byte with the address; initiators set its bits."""
    request = bench.asked(frame(0, ata(READ, 0xE0000007, 1), 1))
    assert request.offset == 7 * SECTOR


@pytest.mark.parametrize("code", [READ, READ_EXT, WRITE, WRITE_EXT])
def test_where_flag_and_command_disagree_nothing_is_guessed(bench: Bench, code: int) -> None:
    """A wrong guess of the length of an address would write to other sectors."""
    wrong = code in (READ, WRITE)
    answer = bench.ask(frame(0, ata(code, 1, 1, b"a" * SECTOR, extended=wrong), 1))
    assert answer.error == Error.BAD_ARGUMENT
    assert not bench.requests


def test_what_lies_outside_is_not_found(bench: Bench) -> None:
    """Also what begins inside, and what begins far outside; the last sector is inside."""
    for lba, count in ((SECTORS, 1), (SECTORS - 1, 2), ((1 << 48) - 1, 1)):
        for code, data in ((READ_EXT, b""), (WRITE_EXT, b"a" * SECTOR * count)):
            answer = bench.ask(frame(0, ata(code, lba, count, data), 1))
            assert (answer.error, answer.status, answer.ata_error) == (0, 0x41, 0x10)
    assert not bench.requests
    # Who got nothing has nothing in memory that belongs here.
    assert not bench.target.used and not bench.target.initiators
    assert bench.asked(frame(0, ata(READ_EXT, SECTORS - 1, 1), 1)).length == SECTOR
    assert bench.target.used and bench.target.initiators


def test_a_size_that_is_no_multiple_of_a_sector_is_rounded_down() -> None:
    """What would reach into the rest of the volume is outside."""
    bench = Bench(size_bytes=10 * SECTOR + 511)
    assert bench.ask(frame(0, ata(READ_EXT, 10, 1), 1)).ata_error == 0x10
    assert bench.asked(frame(0, ata(READ_EXT, 9, 1), 1)).offset == 9 * SECTOR


def test_what_does_not_fit_into_a_frame_is_refused(bench: Bench) -> None:
    """The interface's MTU bounds a read; a write must bring what it says."""
    assert [sectors_of_mtu(mtu) for mtu in (500, 1500, 9000, 65536)] == [0, 2, 17, 127]
    bench.target.mtu = 1500
    assert bench.ask(frame(0, ata(READ_EXT, 0, 3), 1)).error == Error.BAD_ARGUMENT
    assert bench.ask(frame(0, ata(READ_EXT, 0, 0), 1)).error == Error.BAD_ARGUMENT
    bench.target.mtu = 9000
    bench.asked(frame(0, ata(READ_EXT, 0, 17), 2))
    short = frame(0, ata(WRITE_EXT, 0, 2, b"a" * 1023), 3)
    assert bench.ask(short).error == Error.BAD_ARGUMENT
    padded = bench.asked(frame(0, ata(WRITE_EXT, 0, 1, b"a" * SECTOR + b"padding"), 4))
    assert padded.data is not None and bytes(padded.data) == b"a" * SECTOR


def test_a_volume_that_is_only_read_aborts_writes() -> None:
    """Before they reach it."""
    bench = Bench(read_only=True)
    answer = bench.ask(write(0, b"a", 1))
    assert (answer.status, answer.ata_error) == (0x41, 0x04)
    assert bench.asked(frame(0, ata(READ_EXT), 2)).op == Op.READ


def test_flush_asks_the_volume_and_other_commands_are_aborted(bench: Bench) -> None:
    """Though all writes are durable: a volume that was taken over says so."""
    request = bench.asked(frame(0, ata(FLUSH, count=0), 1))
    assert request.op == Op.FLUSH
    assert bench.reply(request).status == 0x40
    for code in (0x00, 0x25, 0x35, 0xE5, 0xEF, 0xFF):
        answer = bench.ask(frame(0, ata(code), 1))
        assert (answer.error, answer.status, answer.ata_error) == (0, 0x41, 0x04)


@pytest.mark.parametrize(
    ("errno", "status"),
    [(Errno.EIO, 0x61), (Errno.ENOSPC, 0x61), (Errno.ESHUTDOWN, 0x61), (Errno.EINVAL, 0x41)],
)
def test_errors_of_the_volume_become_those_of_a_disk(errno: Errno, status: int) -> None:
    """Not errors of AoE, after which Linux goes on asking for minutes."""
    for sent in (write(0, b"a", 1), frame(0, ata(READ_EXT), 2), frame(0, ata(FLUSH), 3)):
        bench = Bench()  # another one: after some errors a volume is lost
        answer = bench.reply(bench.asked(sent), errno)
        assert (answer.error, answer.status, answer.ata_error) == (0, status, 0x04)
        assert answer.data == b""


def test_once_the_volume_is_lost_every_ata_command_fails(bench: Bench) -> None:
    """Reads too; the target can still be found, or initiators would wait for it."""
    bench.target.failure = "taken over"
    for sent in (write(0, b"a", 1), frame(0, ata(READ_EXT), 2), frame(0, ata(IDENTIFY), 3)):
        assert bench.ask(sent).status == 0x61
    assert not bench.requests and not bench.target.used
    assert bench.ask(frame(1, config(0), 4)).error == 0


# -- what is sent again ----------------------------------------------------------------------------


def test_nothing_is_read_after_a_write_was_told_that_the_volume_is_lost(bench: Bench) -> None:
    """The rule of docs/decisions/0017: it would be what was there before somebody took it over."""
    bench.reply(bench.asked(write(0, b"a", 1)), Errno.ESHUTDOWN)
    for tag, code in enumerate((READ, READ_EXT, WRITE_EXT, IDENTIFY, FLUSH), 2):
        data = bytes(SECTOR) if code == WRITE_EXT else b""
        assert bench.ask(frame(0, ata(code, 0, 1, data), tag)).status == 0x61


def test_a_write_in_work_is_not_done_twice(bench: Bench) -> None:
    """What comes again meanwhile has its answer in the one to come."""
    request = bench.asked(write(0, b"a", 1))
    assert bench.send(write(0, b"a", 1)) is None
    assert len(bench.requests) == 1
    assert bench.reply(request).tag == 1


def test_a_late_copy_of_an_answered_write_undoes_nothing(bench: Bench) -> None:
    """The rule of docs/decisions/0017: it is answered once more and not done once more.

    Else what was written to the same sectors after it, and acknowledged, would be gone.
    """
    assert bench.reply(bench.asked(write(0, b"a", 1))).status == 0x40
    assert bench.reply(bench.asked(write(0, b"b", 2))).status == 0x40
    before = len(bench.requests)
    again = bench.ask(write(0, b"a", 1))
    assert (again.tag, again.status) == (1, 0x40)
    assert len(bench.requests) == before


def test_an_error_is_repeated_too(bench: Bench) -> None:
    """Whoever was told that a write failed may have written something else since."""
    bench.reply(bench.asked(write(0, b"a", 1)), Errno.EIO)
    assert bench.ask(write(0, b"a", 1)).status == 0x61


def test_overlapping_writes_reach_the_volume_in_their_order(bench: Bench) -> None:
    """Whoever sent them: the volume does them in the order in which it gets them."""
    sent = [(0, b"a", 1, HOST_MAC), (1, b"b", 1, OTHER_MAC), (0, b"c", 2, HOST_MAC)]
    for lba, fill, tag, source in sent:
        assert bench.send(write(lba, fill, tag, source, count=2)) is None
    assert [bytes(r.data[:1]) for r in bench.requests if r.data is not None] == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    "other",
    [
        write(0, b"b", 1),
        write(1, b"a", 1),
        write(0, b"a", 2),
        write(0, b"a", 1, OTHER_MAC),
        frame(0, ata(WRITE, 0, 1, b"a" * SECTOR), 1),
    ],
    ids=["data", "sectors", "tag", "source", "command"],
)
@pytest.mark.parametrize("done", [False, True])
def test_what_differs_in_anything_is_another_write(bench: Bench, other: bytes, done: bool) -> None:
    """A tag may be used again; what is taken for a copy by mistake would be lost."""
    request = bench.asked(write(0, b"a", 1))
    if done:
        bench.reply(request)
    bench.asked(other)


def test_answered_writes_are_forgotten_in_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By age and by number: the same frame is then a new write."""
    bench.reply(bench.asked(write(0, b"a", 1)))
    bench.now += RECENT_S
    bench.reply(bench.asked(write(0, b"a", 1)))
    monkeypatch.setattr(target_module, "RECENT_MAX", 2)
    for tag in (2, 3):
        bench.reply(bench.asked(write(0, b"a", tag)))
    assert bench.ask(write(0, b"a", 3)).status == 0x40
    bench.asked(write(0, b"a", 1))


def test_what_the_volume_did_not_take_may_come_again(bench: Bench) -> None:
    """It was not done, so its copy is."""
    request = bench.asked(write(0, b"a", 1))
    bench.target.forget([request])
    assert bench.target.in_flight == 0
    assert bench.target.answered(Reply(request), bench.now) is None
    bench.asked(write(0, b"a", 1))


def test_too_much_is_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer, so that it is sent again, and taken when there is room."""
    monkeypatch.setattr(target_module, "IN_FLIGHT_MAX", 2)
    first = bench.asked(write(0, b"a", 1))
    bench.asked(frame(0, ata(READ_EXT), 2))
    assert bench.send(write(8, b"a", 3)) is None
    assert len(bench.requests) == 2 and bench.target.dropped == 1
    bench.reply(first)
    bench.asked(write(8, b"a", 3))


# -- who is meant, and who may ---------------------------------------------------------------------


def test_frames_for_others_are_ignored(bench: Bench) -> None:
    """Other targets, other protocols, answers, groups as a source, and what is too short."""
    body = config(0)
    for sent in (
        frame(1, body, major=8),
        frame(1, body, minor=4),
        frame(1, body, version_flags=0x18),
        frame(1, body, ethertype=0x0800),
        frame(1, body, source=EVERYBODY),
        frame(1, body)[:23],
        b"",
    ):
        assert bench.send(sent) is None
    assert not bench.requests


def test_who_asks_everybody_is_answered_but_changes_nothing(bench: Bench) -> None:
    """One frame shall not write to each disk of a network."""
    for address in ({"major": 0xFFFF, "minor": 0xFF}, {"major": 0xFFFF}, {"minor": 0xFF}):
        answer = bench.ask(frame(1, config(0), 5, **address, destination=EVERYBODY))
        assert (answer.major, answer.minor, answer.tag) == (7, 3, 5)
        assert len(bench.ask(frame(0, ata(IDENTIFY), **address)).data) == SECTOR
        for command, body in (
            (0, ata(WRITE_EXT, 0, 1, b"a" * SECTOR)),
            (1, config(4, b"x")),
            (2, struct.pack(">xBBB", 1, 0, 0)),
            (3, struct.pack(">BB", 1, 0)),
        ):
            assert bench.ask(frame(command, body, **address)).error == Error.BAD_ARGUMENT
    assert not bench.requests


def test_others_than_the_accepted_ones_are_ignored() -> None:
    """And nothing that is sent can change who is accepted."""
    bench = Bench(accept=[OTHER_MAC])
    assert bench.send(frame(1, config(0))) is None
    assert bench.send(write(0, b"a", 1)) is None
    bench.asked(write(0, b"a", 1, OTHER_MAC))
    add = struct.pack(">xBBBxB6s", 1, 0, 1, 1, HOST_MAC)
    assert bench.ask(frame(2, add, source=OTHER_MAC)).error == 0
    assert bench.send(frame(1, config(0))) is None


def test_what_is_broken_is_answered_with_an_error(bench: Bench) -> None:
    """Of the protocol's own list; nothing reaches the volume."""
    for sent, error in (
        (frame(1, config(0), version_flags=0x20), Error.UNSUPPORTED_VERSION),
        (frame(1, config(0), version_flags=0x00), Error.UNSUPPORTED_VERSION),
        (frame(4, b""), Error.BAD_COMMAND),
        (frame(240, b""), Error.BAD_COMMAND),
        (frame(0, b"\0" * 11), Error.BAD_ARGUMENT),
        (frame(1, config(5)), Error.BAD_ARGUMENT),
        (frame(1, config(4, b"x" * 1025)), Error.BAD_ARGUMENT),
        (frame(1, config(4, b"xyz")[:-1]), Error.BAD_ARGUMENT),
        (frame(2, struct.pack(">xBBB", 2, 0, 0)), Error.BAD_ARGUMENT),
        (frame(2, struct.pack(">xBBB", 1, 0, 1)), Error.BAD_ARGUMENT),
        (frame(3, struct.pack(">BB", 1, 1) + b"abcde"), Error.BAD_ARGUMENT),
    ):
        answer = bench.ask(sent)
        assert answer.error == error and answer.flags == 0xC
    assert not bench.requests


# -- config string, mask list, reserve list --------------------------------------------------------


def told(answer: Answer) -> bytes:
    """The config string of an answer."""
    (length,) = struct.unpack_from(">H", answer.body, 6)
    return answer.body[8 : 8 + length]


def test_the_config_string(bench: Bench) -> None:
    """Set once, changed by force, compared whole and by its beginning."""
    empty = bench.ask(frame(1, config(0)))
    assert told(empty) == b""
    assert struct.unpack_from(">HHBB", empty.body) == (128, 1, 2, 0x10)
    assert told(bench.ask(frame(1, config(3, b"one two")))) == b"one two"
    assert bench.ask(frame(1, config(3, b"one two"))).error == 0, "its first answer was lost"
    refused = bench.ask(frame(1, config(3, b"three")))
    assert refused.error == Error.CONFIG_PRESENT and told(refused) == b"one two"
    assert bench.send(frame(1, config(1, b"one"))) is None
    assert told(bench.ask(frame(1, config(1, b"one two")))) == b"one two"
    assert told(bench.ask(frame(1, config(2, b"one")))) == b"one two"
    assert bench.send(frame(1, config(2, b"two"))) is None
    assert told(bench.ask(frame(1, config(4, b"three")))) == b"three"


def masks(*steps: tuple[int, bytes], action: int = 1) -> bytes:
    """A mask list command."""
    return struct.pack(">xBBB", action, 0, len(steps)) + b"".join(
        struct.pack(">xB6s", *each) for each in steps
    )


def test_the_mask_list(bench: Bench) -> None:
    """Whoever is not in it is ignored, if there is one; an edit is done whole or not at all."""
    assert bench.ask(frame(2, masks(action=0))).body == struct.pack(">xBBB", 0, 0, 0)
    answer = bench.ask(frame(2, masks((1, HOST_MAC), (1, HOST_MAC), (0, OTHER_MAC))))
    assert answer.body == struct.pack(">xBBBxB6s", 1, 0, 1, 0, HOST_MAC)
    assert bench.send(frame(1, config(0), source=OTHER_MAC)) is None
    assert bench.send(write(0, b"a", 1, OTHER_MAC)) is None
    refused = bench.ask(frame(2, masks((1, OTHER_MAC), (9, OTHER_MAC))))
    assert refused.error == Error.BAD_ARGUMENT and refused.body[2] == 2
    assert bench.send(frame(1, config(0), source=OTHER_MAC)) is None
    many = [(1, bytes([2, 0, 0, 0, 1, n])) for n in range(185)]
    assert list_max(1500) == 185
    full = bench.ask(frame(2, masks(*many)))
    assert full.error == Error.BAD_ARGUMENT and full.body[2:4] == b"\3\1"
    bench.ask(frame(2, masks((2, HOST_MAC))))
    assert bench.ask(frame(1, config(0), source=OTHER_MAC)).error == 0


def reserve(action: int, *macs: bytes) -> bytes:
    """A reserve command."""
    return struct.pack(">BB", action, len(macs)) + b"".join(macs)


def test_the_reserve_list(bench: Bench) -> None:
    """Others may look, and do nothing else, until it is released or taken by force."""
    assert bench.ask(frame(3, reserve(1, HOST_MAC))).body == b"\1\1" + HOST_MAC
    for command, body in (
        (0, ata(WRITE_EXT, 0, 1, b"a" * SECTOR)),
        (0, ata(READ_EXT)),
        (1, config(4, b"x")),
        (2, masks((1, OTHER_MAC))),
        (3, reserve(1, OTHER_MAC)),
    ):
        assert bench.ask(frame(command, body, source=OTHER_MAC)).error == Error.RESERVED
    assert bench.ask(frame(1, config(0), source=OTHER_MAC)).error == 0
    assert bench.ask(frame(3, reserve(0), source=OTHER_MAC)).body == b"\0\1" + HOST_MAC
    bench.asked(write(0, b"a", 1))
    assert bench.ask(frame(3, reserve(2, OTHER_MAC), source=OTHER_MAC)).error == 0
    assert bench.ask(write(0, b"a", 2)).error == Error.RESERVED
    assert bench.ask(frame(3, reserve(1), source=OTHER_MAC)).body == b"\1\0"
    bench.asked(write(0, b"a", 3))


# -- what it says of itself ------------------------------------------------------------------------


def test_identify(bench: Bench) -> None:
    """LBA48, both sizes, names in ATA's byte order, no write cache, a right checksum."""
    answer = bench.ask(frame(0, ata(IDENTIFY), 1))
    data = answer.data
    assert answer.status == 0x40 and len(data) == SECTOR
    words = struct.unpack("<256H", data)
    assert words[83] & 1 << 10 and words[86] & 1 << 10, "LBA48"
    assert not (words[82] | words[85]) & 1 << 5, "write cache"
    assert words[49] & 1 << 9 and not words[49] & 1 << 8, "LBA, no DMA"
    assert struct.unpack_from("<Q", data, 200)[0] == SECTORS
    assert struct.unpack_from("<I", data, 120)[0] == SECTORS
    text = struct.pack(">256H", *words)
    assert text[20:40] == b"0123456789abcdef0123"
    assert text[54:94] == b"torus vol".ljust(40)
    assert sum(data) % 256 == 0 and data[510] == 0xA5


def test_identify_of_a_large_disk() -> None:
    """What 28 bits do not hold is said in 48."""
    data = Bench(size_bytes=1 << 47).ask(frame(0, ata(IDENTIFY), 1)).data
    assert struct.unpack_from("<Q", data, 200)[0] == 1 << 38
    assert struct.unpack_from("<I", data, 120)[0] == (1 << 28) - 1


def test_a_target_makes_itself_known(bench: Bench) -> None:
    """With an answer to everybody that nobody asked for."""
    answer = decode(b"".join(bench.target.announce()))
    assert answer.destination == EVERYBODY and answer.command == 1 and answer.tag == 0
    assert (answer.major, answer.minor, answer.source) == (7, 3, TARGET_MAC)


def test_hardware_addresses() -> None:
    """As people write them; a group is nobody that could ask."""
    assert parse_mac("02-0:0-aB-0:1") == bytes.fromhex("02 00 00 ab 00 01")
    assert format_mac(HOST_MAC) == "02:00:00:00:00:02"
    for text in ("", "02:00:00:00:00", "02:00:00:00:00:100", "+2:00:00:00:00:01", "ff" + ":ff" * 5):
        with pytest.raises(ValueError, match="no hardware address"):
            parse_mac(text)
