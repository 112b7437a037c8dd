"""A real etcd on loopback, for tests: started, killed, restarted and compacted at will."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

START_DEADLINE_S = 15.0


class EtcdServer:
    """One etcd process on free ports, with its data in ``directory``.

    Args:
        directory: an empty or earlier used directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._client_port, self._peer_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """``host:port`` for clients; the same after every restart."""
        return f"127.0.0.1:{self._client_port}"

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        command = [
            "etcd",
            f"--data-dir={self._directory / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            # A lease's TTL is at least one and a half election time-outs.
            "--heartbeat-interval=20",
            "--election-timeout=200",
            "--log-level=error",
        ]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self._directory / "log").read_text())
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: it stays connected and never answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def compact(self, revision: int) -> None:
        """Forget the history before ``revision``."""
        # Imported here: only the etcd backend knows how to import etcd3 quietly.
        from torus_actors.metadata.etcd import etcd3

        host, port = self.endpoint.split(":")
        with etcd3.client(host, int(port), timeout=5) as client:
            client.compact(revision, physical=True)

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._client_port)) == 0


def require_etcd() -> None:
    """Skip the calling test where etcd is not installed; fail instead where CI=true."""
    if shutil.which("etcd") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("etcd is not installed")
        pytest.skip("etcd is not installed")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
