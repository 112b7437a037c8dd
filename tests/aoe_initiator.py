"""AoE frames made and read without the code under test, and an initiator on a raw socket."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

ETHERTYPE = 0x88A2
SECTOR = 512
TARGET_MAC = bytes.fromhex("020000000001")
HOST_MAC = bytes.fromhex("020000000002")
OTHER_MAC = bytes.fromhex("020000000003")
EVERYBODY = b"\xff" * 6

READ, READ_EXT, WRITE, WRITE_EXT, FLUSH, IDENTIFY = 0x20, 0x24, 0x30, 0x34, 0xE7, 0xEC


@dataclass(frozen=True)
class Answer:
    """A frame of a target."""

    destination: bytes
    source: bytes
    flags: int
    error: int
    major: int
    minor: int
    command: int
    tag: int
    body: bytes

    @property
    def status(self) -> int:
        """The ATA status register."""
        return self.body[3]

    @property
    def ata_error(self) -> int:
        """The ATA error register."""
        return self.body[1]

    @property
    def data(self) -> bytes:
        """What follows the ATA registers, padding included."""
        return self.body[12:]


def decode(frame: bytes) -> Answer:
    """Read an answer."""
    fields = struct.unpack_from(">6s6sHBBHBBI", frame)
    assert fields[2] == ETHERTYPE and fields[3] >> 4 == 1 and len(frame) >= 24
    flags = fields[3] & 15
    assert flags & 8, "no answer"
    assert bool(flags & 4) == bool(fields[4])
    return Answer(fields[0], fields[1], flags, *fields[4:], frame[24:])


def frame(
    command: int,
    body: bytes,
    tag: int = 1,
    *,
    major: int = 7,
    minor: int = 3,
    source: bytes = HOST_MAC,
    destination: bytes = TARGET_MAC,
    version_flags: int = 0x10,
    ethertype: int = ETHERTYPE,
) -> bytes:
    """Any command."""
    return (
        destination
        + source
        + struct.pack(">HBBHBBI", ethertype, version_flags, 0, major, minor, command, tag)
        + body
    )


def ata(
    code: int, lba: int = 0, count: int = 1, data: bytes = b"", extended: bool | None = None
) -> bytes:
    """Body of an ATA command; extended as its code says, unless told otherwise."""
    if extended is None:
        extended = code in (READ_EXT, WRITE_EXT)
    flags = (0x40 if extended else 0) | (1 if code in (WRITE, WRITE_EXT) else 0)
    return struct.pack(">BBBB", flags, 0, count, code) + lba.to_bytes(6, "little") + b"\0\0" + data


def config(action: int, string: bytes = b"") -> bytes:
    """Body of a config command."""
    return struct.pack(">HHBBH", 0, 0, 0, action, len(string)) + string


class Initiator:
    """Sends commands on a network interface and waits for answers.

    Args:
        interface: name.
        major: shelf of the target.
        minor: slot.
    """

    def __init__(self, interface: str, major: int, minor: int) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind((interface, ETHERTYPE))
        self.mac: bytes = self._socket.getsockname()[4]
        self.target = EVERYBODY
        self._address = major, minor
        self._tags = itertools.count(1)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def tag(self) -> int:
        """One that was not used yet."""
        return next(self._tags)

    def send(self, command: int, body: bytes, tag: int) -> None:
        """Send a command."""
        major, minor = self._address
        self._socket.send(
            frame(
                command, body, tag,
                major=major, minor=minor, source=self.mac, destination=self.target,
            )
        )  # fmt: skip

    def receive(self, wanted: Callable[[Answer], bool], timeout_s: float = 10.0) -> Answer | None:
        """The next answer of a kind; None if none comes in time."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                got = self._socket.recv(1 << 16)
            except TimeoutError:
                break
            if got[6:12] != self.mac and got[14] & 8:
                answer = decode(got)
                if (answer.major, answer.minor) == self._address and wanted(answer):
                    return answer
        return None

    def do(self, command: int, body: bytes, tag: int | None = None) -> Answer:
        """Send a command, again each second as initiators do, until it is answered."""
        tag = self.tag() if tag is None else tag
        for _ in range(30):
            self.send(command, body, tag)
            answer = self.receive(lambda each: each.tag == tag, 1.0)
            if answer is not None:
                return answer
        raise TimeoutError("the target does not answer")

    def find(self) -> Answer:
        """Ask who is there; from now on only that one is asked."""
        answer = self.do(1, config(0))
        self.target = answer.source
        return answer

    def read(self, lba: int, count: int) -> bytes:
        """Read sectors."""
        answer = self.do(0, ata(READ_EXT, lba, count))
        assert (answer.error, answer.status) == (0, 0x40), answer
        return answer.data[: count * SECTOR]

    def write(self, lba: int, data: bytes, tag: int | None = None) -> Answer:
        """Write sectors; returns the answer, which may be an error."""
        return self.do(0, ata(WRITE_EXT, lba, len(data) // SECTOR, data), tag)
