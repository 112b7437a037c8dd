"""One AoE target: what is done with each command, and what is not done twice. No I/O, no clock.

Commands that need the volume become the same requests that NBD's do; the rest is answered at once.
Two rules keep data safe (docs/decisions/0017-aoe.md):

- No initiator needs to flush, and Linux' does not: a write is answered when it is durable.
- Initiators send again what is not answered soon. Writes go to the volume in the order in which
  they came, which does them in that order; one that comes again is answered again, not done again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from torus_actors.aoe.identify import identify
from torus_actors.aoe.protocol import (
    ANY_SHELF,
    ANY_SLOT,
    BROADCAST_MAC,
    READS,
    SECTOR_BYTES,
    WRITES,
    AtaCode,
    AtaCommand,
    AtaError,
    AtaStatus,
    Command,
    ConfigAction,
    ConfigCommand,
    Error,
    MaskAction,
    MaskCommand,
    MaskError,
    MaskStep,
    ReserveAction,
    ReserveCommand,
    Sender,
    Unusable,
    answer,
    ata_body,
    config_body,
    encode,
    list_max,
    mask_body,
    parse,
    reserve_body,
    sectors_of_mtu,
)
from torus_actors.nbd.protocol import Errno
from torus_actors.nbd.requests import Hole, Op, Piece, Reply, Request

Answer = tuple[memoryview | bytes | bytearray, ...]
"""A frame to be sent, in pieces."""

BUFFER_COUNT = 128
"""What an initiator is told to keep in flight at most: as many as Linux' does by itself."""

IN_FLIGHT_MAX = 1024
"""Requests that the volume has not answered yet, of all initiators. What comes beyond is dropped,
as a network does it: it is sent again, later and less often."""

FIRMWARE_VERSION = 1

RECENT_S = 30.0
"""How long an answered write is remembered. Longer than a frame may be on its way, and shorter than
it takes Linux to use a tag again: 16 bits of it are a clock, which needs 65 s or more."""

RECENT_MAX = 16384
"""Answered writes that are remembered; some megabytes."""

INITIATORS_MAX = 256
"""Hardware addresses that are shown; anybody can make up any number of them."""

_DONE = AtaStatus.DRDY
_ABORTED = AtaStatus.DRDY | AtaStatus.ERR
_FAULT = AtaStatus.DRDY | AtaStatus.DF | AtaStatus.ERR

_NOT_ITS_FAULT = frozenset({Errno.EINVAL, Errno.EPERM, Errno.ENOTSUP})
"""Errors of the request and not of the device."""

_OVER = "it takes no writes any more"
"""Until whoever supervises the target has looked what it is."""

_ZEROS = memoryview(bytes(1 << 17))


@dataclass(frozen=True, slots=True)
class Disk:
    """What is served.

    Attributes:
        name: of the volume; the model that initiators see ends with it.
        size_bytes: what lies behind the last whole sector of 512 bytes is not reached.
        read_only: writes are aborted.
        serial: 20 characters, the same for the same volume wherever it is served.
    """

    name: str
    size_bytes: int
    read_only: bool
    serial: str

    @property
    def sectors(self) -> int:
        """Of 512 bytes."""
        return self.size_bytes // SECTOR_BYTES


_Key = tuple[bytes, int, int, int, int, int]
"""What makes two commands the same one, sent twice: source, tag, ATA command, first sector, number
of sectors, checksum of the data. With the data, because a tag may be used again: other data are
another command, and the same data do no harm as long as nothing else was written there."""


@dataclass(slots=True)
class _Pending:
    command: AtaCommand
    key: _Key


class Target:
    """See the module.

    Args:
        major: shelf.
        minor: slot.
        disk: what is served.
        accept: hardware addresses that may use it; empty for all. Nothing that is sent can
            change it, unlike the mask list.

    Attributes:
        mac: hardware address of the interface; whoever receives frames keeps it true.
        mtu: of the interface, bytes; the same.
        failure: why every ATA command fails from now on; empty as long as they do not.
        used: whether anybody has read or written. Who has may have data in memory that belong here.
        initiators: who has, up to a bound.
        dropped: commands for which there was no room.
    """

    def __init__(self, major: int, minor: int, disk: Disk, accept: Collection[bytes] = ()) -> None:
        self.mac = bytes(6)
        self.mtu = 1500
        self.failure = ""
        self.used = False
        self.initiators: dict[bytes, None] = {}
        self.dropped = 0
        self._major = major
        self._minor = minor
        self._disk = disk
        self._identity = identify(disk.sectors, f"torus {disk.name}", disk.serial, "1")
        self._accept = frozenset(accept)
        # These live as long as the process: AoE has no place for them in a volume.
        self._config = b""
        self._mask: list[bytes] = []
        self._reserved: tuple[bytes, ...] = ()
        self._cookies = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._in_work: set[_Key] = set()
        self._recent: dict[_Key, tuple[float, int, int]] = {}
        """Answered writes, the oldest first: when, status and error register."""

    @property
    def in_flight(self) -> int:
        """Requests that the volume has not answered yet."""
        return len(self._pending)

    def announce(self) -> Answer:
        """What makes the target known to everybody: the answer to a query that nobody sent."""
        body = self._config_body(ConfigAction.READ)
        return (encode(self._sender, BROADCAST_MAC, Command.CONFIG, 0, body),)

    def receive(self, frame: bytes, now_s: float, requests: list[Request]) -> Answer | None:
        """Take a frame; never raises.

        Args:
            frame: as received; the volume may keep parts of it.
            now_s: some clock that only goes forward.
            requests: what the volume is to do is added here. It must get them in this order.

        Returns:
            What to send at once, if anything.
        """
        command = parse(frame)
        if command is None:
            return None
        header = command.header
        if header.major not in (self._major, ANY_SHELF) or header.minor not in (
            self._minor,
            ANY_SLOT,
        ):
            return None
        source = header.source
        if self._accept and source not in self._accept:
            return None
        if self._mask and source not in self._mask:
            return None
        match command:
            case AtaCommand():
                return self._on_ata(command, now_s, requests)
            case ConfigCommand():
                return self._on_config(command)
            case MaskCommand():
                return self._on_mask(command)
            case ReserveCommand():
                return self._on_reserve(command)
            case Unusable():
                return self._refuse(command, command.error)

    def answered(self, reply: Reply, now_s: float) -> Answer | None:
        """The volume has done a request; returns what to send."""
        pending = self._pending.pop(reply.request.cookie, None)
        if pending is None:
            return None
        command, key = pending.command, pending.key
        self._in_work.discard(key)
        if reply.error == Errno.ESHUTDOWN and command.code in WRITES:
            # Who was told so shall not be given what was there before next.
            self.failure = self.failure or _OVER
        status, error = _registers(reply.error)
        if command.code in WRITES:
            self._remember(key, now_s, status, error)
        body = ata_body(command, status, error)
        head = answer(self._sender, command.header, body)
        if reply.error or command.code not in READS:
            return (head,)
        return (head, *map(_bytes_of, reply.buffers))

    def forget(self, requests: Sequence[Request]) -> None:
        """The volume did not take these: they are as good as lost on the way, and come again."""
        for request in requests:
            pending = self._pending.pop(request.cookie, None)
            if pending is not None:
                self._in_work.discard(pending.key)
                self.dropped += 1

    # -- ATA ---------------------------------------------------------------------------------------

    def _on_ata(self, command: AtaCommand, now_s: float, requests: list[Request]) -> Answer | None:
        header, code = command.header, command.code
        if not self._may_use(header.source):
            return self._refuse(command, Error.RESERVED)
        if self.failure:
            return self._registers(command, _FAULT, AtaError.ABRT)
        if code == AtaCode.IDENTIFY:
            head = answer(self._sender, header, ata_body(command, _DONE))
            return (head, self._identity)
        if code in READS or code in WRITES:
            refused = self._refuse_transfer(command)
            if refused is not None:
                return refused
        elif code not in (AtaCode.FLUSH, AtaCode.FLUSH_EXT):
            return self._registers(command, _ABORTED, AtaError.ABRT)
        crc = crc32c(command.data)
        key = (header.source, header.tag, code, command.lba, command.count, crc)
        if key in self._in_work:
            return None  # its answer comes when it is done
        recent = self._recent.get(key)
        if recent is not None and recent[0] > now_s - RECENT_S:
            return self._registers(command, recent[1], recent[2])
        if len(self._pending) >= IN_FLIGHT_MAX:
            self.dropped += 1
            return None
        if code in READS or code in WRITES:
            self.used = True
            if len(self.initiators) < INITIATORS_MAX:
                self.initiators[header.source] = None
        request = self._request(command)
        self._pending[request.cookie] = _Pending(command, key)
        self._in_work.add(key)
        requests.append(request)
        return None

    def _refuse_transfer(self, command: AtaCommand) -> Answer | None:
        """The answer to a read or write that cannot be done; None if it can."""
        if command.code in WRITES:
            if self._is_broadcast(command):
                # One frame shall not write to every disk of a network.
                return self._refuse(command, Error.BAD_ARGUMENT)
            if self._disk.read_only:
                return self._registers(command, _ABORTED, AtaError.ABRT)
        elif command.count > sectors_of_mtu(self.mtu):
            return self._refuse(command, Error.BAD_ARGUMENT)
        if command.lba + command.count > self._disk.sectors:
            return self._registers(command, _ABORTED, AtaError.IDNF)
        return None

    def _request(self, command: AtaCommand) -> Request:
        offset, length = command.lba * SECTOR_BYTES, command.count * SECTOR_BYTES
        cookie = next(self._cookies)
        if command.code in READS:
            return Request(Op.READ, offset, length, cookie)
        if command.code in WRITES:
            # Nobody flushes later: what is answered must be durable.
            return Request(Op.WRITE, offset, length, cookie, data=command.data, fua=True)
        return Request(Op.FLUSH, 0, 0, cookie)

    def _remember(self, key: _Key, now_s: float, status: int, error: int) -> None:
        recent = self._recent
        recent.pop(key, None)
        recent[key] = (now_s, status, error)
        while recent:
            oldest = next(iter(recent))
            if len(recent) <= RECENT_MAX and recent[oldest][0] > now_s - RECENT_S:
                break
            del recent[oldest]

    # -- the rest ----------------------------------------------------------------------------------

    def _on_config(self, command: ConfigCommand) -> Answer | None:
        action, string = command.action, command.string
        if action == ConfigAction.TEST and string != self._config:
            return None
        if action == ConfigAction.PREFIX and not self._config.startswith(string):
            return None
        if action in (ConfigAction.SET, ConfigAction.FORCE):
            refused = self._refuse_change(command)
            if refused is not None:
                return refused
            # The same string again: the first answer was lost.
            if action == ConfigAction.SET and self._config not in (b"", string):
                return self._refuse(
                    command, Error.CONFIG_PRESENT, self._config_body(command.action)
                )
            self._config = string
        return (answer(self._sender, command.header, self._config_body(action)),)

    def _config_body(self, action: ConfigAction) -> bytes:
        sectors = sectors_of_mtu(self.mtu)
        return config_body(BUFFER_COUNT, FIRMWARE_VERSION, sectors, action, self._config)

    def _on_mask(self, command: MaskCommand) -> Answer | None:
        if command.action == MaskAction.EDIT:
            refused = self._refuse_change(command)
            if refused is not None:
                return refused
            error = self._edit_mask(command.directives)
            if error:
                body = mask_body(command.action, self._mask, error)
                return self._refuse(command, Error.BAD_ARGUMENT, body)
        body = mask_body(command.action, self._mask)
        return (answer(self._sender, command.header, body),)

    def _edit_mask(self, directives: Sequence[tuple[int, bytes]]) -> int:
        """All of it, or nothing and why not."""
        mask = list(self._mask)
        for step, mac in directives:
            if step == MaskStep.ADD:
                if mac not in mask:
                    mask.append(mac)
            elif step == MaskStep.DELETE:
                if mac in mask:
                    mask.remove(mac)
            elif step != MaskStep.NOTHING:
                return MaskError.BAD_DIRECTIVE
        if len(mask) > list_max(self.mtu):
            return MaskError.FULL
        self._mask = mask
        return 0

    def _on_reserve(self, command: ReserveCommand) -> Answer | None:
        if command.action != ReserveAction.READ:
            if self._is_broadcast(command):
                return self._refuse(command, Error.BAD_ARGUMENT)
            if command.action == ReserveAction.SET and not self._may_use(command.header.source):
                body = reserve_body(command.action, self._reserved)
                return self._refuse(command, Error.RESERVED, body)
            if len(command.macs) > list_max(self.mtu):
                return self._refuse(command, Error.BAD_ARGUMENT)
            self._reserved = command.macs
        body = reserve_body(command.action, self._reserved)
        return (answer(self._sender, command.header, body),)

    def _refuse_change(self, command: ConfigCommand | MaskCommand) -> Answer | None:
        if self._is_broadcast(command):
            return self._refuse(command, Error.BAD_ARGUMENT)
        if not self._may_use(command.header.source):
            return self._refuse(command, Error.RESERVED)
        return None

    @property
    def _sender(self) -> Sender:
        return Sender(self.mac, self._major, self._minor)

    def _may_use(self, source: bytes) -> bool:
        return not self._reserved or source in self._reserved

    @staticmethod
    def _is_broadcast(command: _Command) -> bool:
        return command.header.major == ANY_SHELF or command.header.minor == ANY_SLOT

    def _registers(self, command: AtaCommand, status: int, error: int) -> Answer:
        return (answer(self._sender, command.header, ata_body(command, status, error)),)

    def _refuse(self, command: _Command, error: Error, body: bytes = b"") -> Answer:
        return (answer(self._sender, command.header, body, error),)


_Command = AtaCommand | ConfigCommand | MaskCommand | ReserveCommand | Unusable


def _registers(errno: int) -> tuple[int, int]:
    """Status and error register for what a request ended with."""
    if not errno:
        return _DONE, 0
    return _ABORTED if errno in _NOT_ITS_FAULT else _FAULT, AtaError.ABRT


def _bytes_of(piece: Piece) -> memoryview | bytes | bytearray:
    return _ZEROS[: piece.length] if isinstance(piece, Hole) else piece
