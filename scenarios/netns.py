"""Hosts with addresses of their own on this machine: network namespaces on a bridge, cut at will.

All of it is inside a private world that `enter` makes: new network, mount and process namespaces of
which this process is the first. They end with it, however it ends, and take along every namespace
below and every process that was started in them. Nothing is left over, and no address or name can
collide with another run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

INSIDE = "TORUS_SCENARIOS_INSIDE"
"""Set in the environment of a process that is in its private world."""

BRIDGE = "br0"
PREFIX = "10.77.0."
NOBODY = "02:00:00:00:00:99"
"""A hardware address that no host has: what is sent to it is lost without a word."""


class Unavailable(Exception):
    """There can be no network namespaces here; one line that says why."""


def enter(arguments: Sequence[str]) -> None:
    """Be inside a private world: replaces the process by one that is, unless it is already.

    Args:
        arguments: command line of the process inside.

    Raises:
        Unavailable: not as root, or a program is missing.
    """
    if os.environ.get(INSIDE):
        return
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root: run this as root")
    missing = [name for name in ("unshare", "ip", "mount") if shutil.which(name) is None]
    if missing:
        raise Unavailable(
            f"network namespaces need {', '.join(missing)}: apt-get install iproute2 util-linux"
        )
    worlds = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
    probe = subprocess.run([*worlds, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise Unavailable(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    os.environ[INSIDE] = "1"
    os.execvp(worlds[0], [*worlds, *arguments])


class Network:
    """Hosts by name, each a namespace with one address; the process itself is on the bridge too."""

    def __init__(self) -> None:
        self._address: dict[str, str] = {}
        self._cuts: dict[tuple[str, str], list[bool]] = {}
        os.makedirs("/run/netns", exist_ok=True)
        _run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
        _ip("link", "set", "lo", "up")
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{PREFIX}1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")

    def add(self, host: str) -> str:
        """Make a host; returns its address."""
        number = len(self._address) + 2
        address, hardware = f"{PREFIX}{number}", f"02:00:00:00:01:{number:02x}"
        port = f"port{number}"
        _ip("netns", "add", host)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", port, "master", BRIDGE, "up")
        _ip("-n", host, "link", "set", "eth0", "address", hardware, "up")
        _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
        self._address[host] = address
        return address

    def address(self, host: str) -> str:
        """Of a host that was made before."""
        return self._address[host]

    @staticmethod
    def prefix(host: str) -> list[str]:
        """What makes a command line run on a host; the process id stays the same."""
        return ["ip", "netns", "exec", host]

    def block(self, source: str, target: str, silent: bool) -> None:
        """Let nothing from one host reach another; the way back stays open.

        Args:
            source: whose packets are lost.
            target: whom they do not reach.
            silent: packets are lost on the way; otherwise there is no route, and whoever connects
                is told so.
        """
        cuts = self._cuts.setdefault((source, target), [])
        cuts.append(silent)
        self._set(source, target, silent, True)

    def unblock(self, source: str, target: str, silent: bool) -> None:
        """Take one `block` back."""
        cuts = self._cuts.get((source, target), [])
        if silent not in cuts:
            return
        cuts.remove(silent)
        if silent not in cuts:
            self._set(source, target, silent, False)

    def heal(self) -> None:
        """Take all of them back."""
        for (source, target), cuts in self._cuts.items():
            for silent in set(cuts):
                self._set(source, target, silent, False)
        self._cuts.clear()

    def _set(self, source: str, target: str, silent: bool, on: bool) -> None:
        address = self._address[target]
        if silent and on:
            _ip(
                "-n", source, "neigh", "replace", address,
                "lladdr", NOBODY, "dev", "eth0", "nud", "permanent",
            )  # fmt: skip
        elif silent:
            _ip("-n", source, "neigh", "del", address, "dev", "eth0")
        else:
            verb = "replace" if on else "del"
            _ip("-n", source, "route", verb, "blackhole", f"{address}/32")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
