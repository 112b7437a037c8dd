"""Addresses of processes, as people write and read them."""

from __future__ import annotations

import errno
import socket

from torus_actors.errors import Exists

Address = tuple[str, int]

PORT_MAX = 65535


def parse_address(text: str) -> Address:
    """Host and port from ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ValueError: it is none.
    """
    host, _, port = text.strip().rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else 0
    if host.startswith("[") and host.endswith("]"):
        bare = _ipv6(host[1:-1])
    else:
        bare = "" if set(host) & set(":[]/@?# ") or not _is_host(host) else host
    if not bare or not 0 < number <= PORT_MAX:
        raise ValueError(f"{text!r} is no HOST:PORT")
    # One spelling, so that a node knows its own address in a metadata URL.
    return ("127.0.0.1" if bare == "localhost" else bare), number


def _ipv6(text: str) -> str:
    """An IPv6 address in its one spelling; empty if it is none."""
    import ipaddress  # only here: most commands have no use for it

    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        return ""


def _is_host(name: str) -> bool:
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return "\0" not in name


def format_address(address: Address) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(address: Address, option: str) -> None:
    """See that this process could listen on an address; port 0 is any.

    Args:
        address: host and port.
        option: by which another one is chosen.

    Raises:
        Exists: somebody listens there, or this machine has no such address.
    """
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in found:
            try:
                probe = socket.socket(family, kind, protocol)
            except OSError:
                continue  # no such addresses here, as of IPv6; a server does without
            with probe:
                # As asyncio's servers do.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(place)
    except OSError as error:
        hint = "stop what listens there, or " if error.errno == errno.EADDRINUSE else ""
        raise Exists(
            f"cannot listen on {format_address(address)}: {error.strerror}; "
            f"{hint}choose another with {option}"
        ) from error
