"""The socket of an AoE target: frames of one EtherType on one network interface. Linux only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from torus_actors.aoe.protocol import (
    ETHERNET_BYTES,
    ETHERTYPE,
    FRAME_BYTES_MIN,
    sectors_of_mtu,
)
from torus_actors.errors import Invalid, NotExist, TorusError

BUFFER_BYTES = 4 << 20
"""Of the socket, each way: what comes while the loop is busy is not lost, and answers to a batch
fit. The kernel's default holds some twenty frames of 9000 bytes."""

PIECES_MAX = 64
"""An answer in more pieces is joined: the kernel takes at most 1024, and is slow with many."""

_SIOCGIFFLAGS = 0x8913
_SIOCGIFMTU = 0x8921
_SIOCGIFINDEX = 0x8933
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_NO_FRAMES = 0
"""A protocol number that has a packet socket receive nothing."""
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_RUNNING = 0x40
_ARPHRD_ETHER = 1
_ARPHRD_LOOPBACK = 772
_PACKET_FOR_US = frozenset({0, 1, 2})
"""To this host, to all, to a group; not what others get, and not what this host sends."""

_NAME_BYTES_MAX = 15
_IFREQ = struct.Struct("16sI20x")

Buffer = bytes | bytearray | memoryview


class Port(Protocol):
    """Where a target's frames come from and go to; never blocks.

    Attributes:
        name: of the interface.
        mac: its hardware address.
        mtu: bytes.
        up: whether frames can get through.
    """

    name: str
    mac: bytes
    mtu: int
    up: bool

    def listen(self) -> None:
        """Receive what comes from now on; before, nothing is kept.

        What lay there from before would be old by the time it is done: somebody else may have done
        it, and others have written since.
        """

    def fileno(self) -> int:
        """For the event loop to watch."""

    def receive(self) -> bytes | None:
        """The next frame, from its destination address on; None if there is none now."""

    def send(self, frame: Sequence[Buffer]) -> bool:
        """Send a frame; whether there was room. One that cannot be sent at all is dropped."""

    def refresh(self) -> None:
        """Look at the interface again.

        Raises:
            NotExist: it is gone.
        """

    def close(self) -> None:
        """Let go of the socket."""


class PacketPort:
    """A raw packet socket, bound to an interface that is up; see ``Port``.

    Args:
        name: of the interface.

    Raises:
        NotExist: there is no such interface.
        Invalid: it is down, not Ethernet, or too small for a sector; or this process may not.

    Attributes:
        loopback: whether what is sent there stays on this machine.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._index = _index(name)
        try:
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0
            )
        except PermissionError as error:
            raise Invalid(
                "frames of raw Ethernet need the capability CAP_NET_RAW: run this as root"
            ) from error
        try:
            self._socket.bind((name, _NO_FRAMES))
            _, _, _, kind, mac = self._socket.getsockname()
            flags = self._flags()
            if kind not in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
                raise Invalid(f"interface {name} is not Ethernet")
            if not flags & _IFF_UP:
                raise Invalid(f"interface {name} is down: ip link set {name} up")
            self.mac = bytes(mac)
            self.up = bool(flags & _IFF_RUNNING)
            self.loopback = bool(flags & _IFF_LOOPBACK)
            self.mtu = self._ask(_SIOCGIFMTU)
            if not sectors_of_mtu(self.mtu):
                raise Invalid(f"interface {name}: no sector fits into its MTU of {self.mtu}")
            for forced, plain in (
                (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
                (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
            ):
                try:
                    self._socket.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
                except PermissionError:  # beyond the system's bound only with CAP_NET_ADMIN
                    self._socket.setsockopt(socket.SOL_SOCKET, plain, BUFFER_BYTES)
        except TorusError:
            self._socket.close()
            raise
        except OSError as error:
            self._socket.close()
            if error.errno == errno.ENETDOWN:
                raise Invalid(f"interface {name} is down: ip link set {name} up") from error
            raise NotExist(f"interface {name}: {error.strerror}") from error

    def listen(self) -> None:
        """See Port."""
        with contextlib.suppress(OSError):  # gone meanwhile, as ``refresh`` will tell
            self._socket.bind((self.name, ETHERTYPE))

    def fileno(self) -> int:
        """See Port."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """See Port."""
        # A frame may be larger than what the interface sends by itself.
        room = max(self.mtu, 9216) + ETHERNET_BYTES
        while True:
            try:
                frame, address = self._socket.recvfrom(room)
            except BlockingIOError:
                return None
            except OSError:
                return None  # it went down, which is told once; ``refresh`` sees what it is
            if address[2] in _PACKET_FOR_US:
                return frame

    def send(self, frame: Sequence[Buffer]) -> bool:
        """See Port."""
        size = sum(map(len, frame))
        if size < FRAME_BYTES_MIN:
            frame = (*frame, bytes(FRAME_BYTES_MIN - size))
        if len(frame) > PIECES_MAX:
            frame = (b"".join(frame),)
        try:
            self._socket.sendmsg(frame)
        except BlockingIOError:
            return False
        except OSError:
            pass  # down, or its queue is full: as if it were lost on the way
        return True

    def refresh(self) -> None:
        """See Port."""
        try:
            index = self._ask(_SIOCGIFINDEX)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise NotExist(f"there is no network interface {self.name}") from error
            return
        if index != self._index:
            raise NotExist(f"interface {self.name} was made anew")
        with contextlib.suppress(OSError):
            self.mtu = self._ask(_SIOCGIFMTU)
            self.mac = bytes(self._socket.getsockname()[4])
            self.up = self._flags() & (_IFF_UP | _IFF_RUNNING) == _IFF_UP | _IFF_RUNNING

    def close(self) -> None:
        """See Port."""
        self._socket.close()

    def _flags(self) -> int:
        return self._ask(_SIOCGIFFLAGS) & 0xFFFF

    def _ask(self, request: int) -> int:
        ifreq = _IFREQ.pack(self.name.encode(), 0)
        value: int = _IFREQ.unpack(fcntl.ioctl(self._socket, request, ifreq))[1]
        return value


def _index(name: str) -> int:
    try:
        if not 0 < len(name.encode()) <= _NAME_BYTES_MAX:
            raise OSError
        return socket.if_nametoindex(name)
    except (OSError, ValueError) as error:
        raise NotExist(f"there is no network interface {name}") from error
