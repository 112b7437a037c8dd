"""Any frames, against an AoE target: nothing is raised, nothing outside the disk is touched."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.aoe_initiator import HOST_MAC, OTHER_MAC, SECTOR, decode, frame
from torus_actors.aoe.protocol import parse
from torus_actors.aoe.target import RECENT_S, Answer, Disk, Target
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Hole, Op, Reply, Request

SECTORS = 300
SIZE = SECTORS * SECTOR + 100

byte = st.integers(0, 255)
codes = st.one_of(st.sampled_from([0x20, 0x24, 0x30, 0x34, 0xE7, 0xEA, 0xEC]), byte)
addresses = st.one_of(st.integers(0, SECTORS + 2), st.integers(0, 2**48 - 1))
data = st.builds(
    lambda fill, size: bytes([fill]) * size,
    st.integers(0, 2),
    st.one_of(st.sampled_from([0, SECTOR, 2 * SECTOR]), st.integers(0, 3 * SECTOR)),
)
ata_body = st.builds(
    lambda flags, count, code, lba, tail: (
        struct.pack(">BBBB", flags, 0, count, code) + lba.to_bytes(6, "little") + b"\0\0" + tail
    ),
    st.one_of(st.sampled_from([0, 1, 0x40, 0x41]), byte),
    st.one_of(st.integers(0, 3), byte),
    codes,
    addresses,
    data,
)
config_body = st.builds(
    lambda action, string, lie: (
        struct.pack(">HHBBH", 0, 0, 0, action, max(0, len(string) + lie)) + string
    ),
    st.one_of(st.integers(0, 5), byte),
    st.binary(max_size=20),
    st.sampled_from([0, 0, 1, -1, 2000]),
)
mask_body = st.builds(
    lambda action, count, steps: struct.pack(">xBBB", action, 0, count) + steps,
    st.integers(0, 3),
    st.one_of(st.integers(0, 2), byte),
    st.binary(max_size=40),
)
reserve_body = st.builds(
    lambda action, count, macs: struct.pack(">BB", action, count) + macs,
    st.integers(0, 3),
    st.one_of(st.integers(0, 2), byte),
    st.binary(max_size=20),
)
command = st.one_of(
    st.tuples(st.just(0), ata_body),
    st.tuples(st.just(1), config_body),
    st.tuples(st.just(2), mask_body),
    st.tuples(st.just(3), reserve_body),
    st.tuples(byte, st.binary(max_size=64)),
)
whole = st.builds(
    lambda which, tag, major, minor, source, version: frame(
        which[0], which[1], tag, major=major, minor=minor, source=source, version_flags=version
    ),
    command,
    st.integers(0, 3),
    st.sampled_from([7, 7, 7, 0xFFFF, 8]),
    st.sampled_from([3, 3, 3, 0xFF, 4]),
    st.sampled_from([HOST_MAC, HOST_MAC, OTHER_MAC]),
    st.sampled_from([0x10, 0x10, 0x10, 0x10, 0x18, 0x20]),
)
frames = st.one_of(
    whole,
    st.builds(lambda sent, size: sent[:size], whole, st.integers(0, 80)),
    st.binary(max_size=80),
)


class Volume:
    """Does what it is asked for, on a piece of memory, and says when that is not allowed."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE)

    def do(self, request: Request, errno: int) -> Reply:
        """Carry a request out, or fail."""
        end = request.offset + request.length
        assert request.offset >= 0 and end <= SECTORS * SECTOR
        if errno:
            return Reply(request, errno)
        if request.op == Op.WRITE:
            assert request.data is not None and len(request.data) == request.length > 0
            assert request.fua
            self.content[request.offset : end] = request.data
        elif request.op == Op.READ:
            half = request.length // 2
            view = bytes(self.content[request.offset : request.offset + half])
            return Reply(request, buffers=[view, Hole(request.length - half)])
        else:
            assert request.op == Op.FLUSH
        return Reply(request)


def check(answer: Answer | None) -> None:
    """An answer is a frame that fits into the interface's MTU."""
    if answer is not None:
        sent = b"".join(answer)
        decoded = decode(sent)
        assert (decoded.major, decoded.minor) == (7, 3)
        assert len(sent) <= 14 + 1500


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_can_be_parsed(sent: bytes) -> None:
    """Or are no command."""
    parse(sent)
    parse(bytes(12) + b"\x88\xa2\x10" + sent)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            frames,
            st.sampled_from([0.0, 0.0, 1.0, RECENT_S]),
            st.booleans(),
            st.sampled_from([0, 0, 0, Errno.EIO, Errno.EINVAL]),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_any_frames_do_no_harm(
    steps: list[tuple[bytes, float, bool, int]], read_only: bool
) -> None:
    """Each request lies inside, is answered once, and a read-only disk does not change."""
    target = Target(7, 3, Disk("v", SIZE, read_only, "s"))
    volume = Volume()
    requests: list[Request] = []
    now = 0.0
    for sent, pause, answers, errno in steps:
        now += pause
        check(target.receive(sent, now, requests))
        if answers:
            for request in requests:
                answer = target.answered(volume.do(request, errno), now)
                assert answer is not None
                check(answer)
            requests.clear()
            assert target.in_flight == 0
    assert len({each.cookie for each in requests}) == len(requests) == target.in_flight
    target.forget(requests)
    assert target.in_flight == 0
    if read_only:
        assert not any(volume.content)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_copies_of_writes_change_nothing(pick: st.DataObject, count: int) -> None:
    """However often and however late each write comes again, the last new one wins.

    One initiator that gives each write a tag of its own, and a volume that does requests in their
    order.
    """
    target = Target(7, 3, Disk("v", SIZE, False, "s"))
    volume = Volume()
    expected = bytearray(SIZE)
    sent: list[bytes] = []
    waiting: list[Request] = []
    for tag in range(count):
        lba = pick.draw(st.integers(0, 2))
        fill = bytes([tag + 1]) * SECTOR
        body = struct.pack(">BBBB", 0x41, 0, 1, 0x34) + lba.to_bytes(6, "little") + b"\0\0" + fill
        expected[lba * SECTOR : (lba + 1) * SECTOR] = fill
        sent.append(frame(0, body, tag))
        target.receive(sent[-1], 1.0, waiting)
        for old in pick.draw(st.lists(st.sampled_from(sent), max_size=4)):
            target.receive(old, 1.0, waiting)
            done = pick.draw(st.integers(0, len(waiting)))
            for request in waiting[:done]:
                check(target.answered(volume.do(request, 0), 1.0))
            del waiting[:done]
    for request in waiting:
        volume.do(request, 0)
    assert volume.content == expected
