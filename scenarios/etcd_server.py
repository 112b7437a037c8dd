"""A real etcd, for tests and scenarios: started, killed, restarted and compacted at will."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from torus_actors.scenarios.processes import POLL_S, Unexpected, free_ports, pause

START_DEADLINE_S = 15.0


class EtcdServer:
    """One etcd process, with its data in ``directory``.

    Args:
        directory: an empty or earlier used directory.
        host: where it listens, on two free ports.
        prefix: what comes before its command line.
    """

    def __init__(
        self, directory: Path, host: str = "127.0.0.1", prefix: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self._host = host
        self._prefix = prefix
        self._port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """``host:port`` for clients; the same after every restart."""
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        """Start it and wait until it accepts connections.

        Raises:
            Unexpected: it does not.
        """
        self.launch()
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.accepts():
            if not self.running or time.monotonic() > deadline:
                self.kill()
                raise Unexpected((self._directory / "log").read_text())
            time.sleep(POLL_S)

    def launch(self) -> None:
        """Start it, and do not wait."""
        client, peer = f"http://{self.endpoint}", f"http://{self._host}:{self._port + 1}"
        command = [
            *self._prefix,
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

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def accepts(self) -> bool:
        """Whether it accepts connections."""
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((self._host, self._port)) == 0

    def send_kill(self) -> None:
        """SIGKILL without waiting for its end; followed by ``kill``."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """The same: for ``contextlib.closing``."""
        self.kill()

    def pause(self) -> None:
        """SIGSTOP: it stays connected and never answers."""
        assert self._process is not None
        pause(self._process)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def ask_for_password(self) -> None:
        """Switch its authentication on."""
        # Imported here, after the etcd backend, which knows how to import etcd3 quietly.
        import torus_actors.metadata.etcd  # noqa: F401, I001
        import etcd3
        from etcd3 import etcdrpc

        with etcd3.client(self._host, self._port, timeout=5) as client:
            auth = etcdrpc.AuthStub(client.channel)
            auth.RoleAdd(etcdrpc.AuthRoleAddRequest(name="root"))
            auth.UserAdd(etcdrpc.AuthUserAddRequest(name="root", password="secret"))
            auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="root", role="root"))
            auth.AuthEnable(etcdrpc.AuthEnableRequest())

    def compact(self, revision: int) -> None:
        """Forget the history before ``revision``."""
        # Imported here, after the etcd backend, which knows how to import etcd3 quietly.
        import torus_actors.metadata.etcd  # noqa: F401, I001
        import etcd3

        with etcd3.client(self._host, self._port, timeout=5) as client:
            client.compact(revision, physical=True)
