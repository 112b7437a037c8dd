"""Real processes: storage nodes, NBD clients and tools, as a user would start them.

    with Cluster(directory) as cluster:
        cluster.start_node(0)                       # keeps the metadata
        cluster.start_node(1)
        cluster.run("torusctl", "volume", "create", "demo", "64MiB")
        client = cluster.serve("demo")
        ... client.uri ...
        cluster.nodes[1].kill()
        cluster.nodes[1].start()

Everything is on loopback and below one directory. What still runs at the end is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import torus_actors

DEADLINE_S = 30.0
"""For anything that shall come true; machines that run tests are slow at times."""

POLL_S = 0.02

PORTS = range(20000, 32000)
"""Below the ports that the kernel gives to outgoing connections: none is taken meanwhile."""

MODULES = {
    "torus-node": "torus_actors.cli.node",
    "torusctl": "torus_actors.cli.ctl",
    "torusblk": "torus_actors.cli.blk",
}

NODE_SIZE = "128MiB"


class Unexpected(AssertionError):
    """A program did not do what it had to do."""


def require(condition: object, text: str) -> None:
    """Go on only if the condition holds.

    Raises:
        Unexpected: it does not.
    """
    if not condition:
        raise Unexpected(text)


def pause(process: subprocess.Popen[Any]) -> None:
    """SIGSTOP a child; when this returns, it does nothing any more, or has ended."""
    process.send_signal(signal.SIGSTOP)
    # Its threads run on for a moment: long enough, on a busy machine, to answer a request.
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def until(condition: Callable[[], Any], what: str, deadline_s: float | None = None) -> Any:
    """Wait until a condition holds, and return what it returned.

    Args:
        condition: to hold.
        what: that is, for people.
        deadline_s: `DEADLINE_S` if None.

    Raises:
        Unexpected: not within the deadline.
    """
    deadline_s = DEADLINE_S if deadline_s is None else deadline_s
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        require(time.monotonic() < end, f"not within {deadline_s:g} s: {what}")
        time.sleep(POLL_S)
    return found


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    rng = random.Random()
    for _ in range(200):
        first = rng.choice(PORTS)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                each = stack.enter_context(socket.socket())
                each.bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} free ports in a row")


def environment(directory: Path) -> dict[str, str]:
    """Of a user who has nothing configured, and whose home is the directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORUS_")}
    package = str(Path(torus_actors.__file__).parents[1])
    return {
        **kept,
        "PYTHONPATH": package,
        "HOME": str(directory),
        "XDG_CONFIG_HOME": str(directory / "config"),
        "XDG_DATA_HOME": str(directory / "data"),
    }


def command(program: str, *arguments: str) -> list[str]:
    """The command line of one of the three programs."""
    return [sys.executable, "-m", MODULES[program], *arguments]


class Process:
    """One program that runs until it is told to stop; may be started again.

    Args:
        name: of its log files.
        arguments: its command line.
        directory: for its logs, and its user's home.
        ready: it is up when it has printed this.
    """

    def __init__(self, name: str, arguments: list[str], directory: Path, ready: str) -> None:
        self.name = name
        self.arguments = arguments
        self.directory = directory
        self.ready = ready
        self.uri = ""
        """Where a client process serves its volume."""
        self.socket = Path()
        """The unix socket where it does."""
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise Unexpected(f"{self.name} does not run")
        return self._process

    @property
    def pid(self) -> int:
        """Of the running process."""
        return self._running.pid

    @property
    def output(self) -> str:
        """What it has printed since it was last started."""
        return self._log.read_text(errors="replace") if self._starts else ""

    @property
    def boot(self) -> str:
        """Names the process that runs, or ran last: another for each start."""
        return f"{self.name}.{self._starts}"

    @property
    def _log(self) -> Path:
        return self.directory / f"{self.boot}.log"

    def launch(self) -> Self:
        """Start it, and do not wait."""
        require(self._process is None, f"{self.name} runs already")
        self._starts += 1
        with self._log.open("wb") as log:
            self._process = self._spawn(log, environment(self.directory))
        return self

    def _spawn(self, log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def start(self) -> Self:
        """Start it, and wait until it is up."""
        self.launch()
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until it is up."""
        until(lambda: self.up or not self.running, f"{self.name} is up")
        require(self.up, f"{self.name} ended: {self.output}")

    @property
    def up(self) -> bool:
        """Whether it runs, and has said that it is ready."""
        return self.running and self.ready in self.output

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def ask_to_stop(self) -> None:
        """SIGTERM, without waiting."""
        self._running.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end, and return its status."""
        status = self._running.wait(DEADLINE_S)
        self._process = None
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have it stop in order, and return its status."""
        self._running.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_S)
            self._process = None

    def send_kill(self) -> None:
        """SIGKILL without waiting for its end: for many at once, each followed by ``kill``."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        """SIGSTOP: it stays connected and never answers."""
        pause(self._running)

    def resume(self) -> None:
        """SIGCONT."""
        self._running.send_signal(signal.SIGCONT)


class Cluster:
    """Nodes, clients and tools of one cluster.

    Args:
        directory: an empty directory.
        metadata: URL, if it is not node 0 that keeps it.
        nodes_max: how many nodes it may have.
        secret: the cluster secret, if it has one.
    """

    def __init__(
        self,
        directory: Path,
        metadata: str | None = None,
        nodes_max: int = 8,
        secret: str | None = None,
    ) -> None:
        self.directory = directory
        self.port = free_ports(nodes_max + 1)
        self.metadata = metadata or f"torus://127.0.0.1:{self.port}"
        self.nodes: dict[int, Process] = {}
        self.clients: list[Process] = []
        self._shared = ["-C", self.metadata]
        if secret is not None:
            path = directory / "secret"
            path.touch(0o600)
            path.write_text(secret)
            self._shared += ["--secret-file", str(path)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        processes = (*self.clients, *self.nodes.values())
        for process in processes:
            process.send_kill()
        for process in processes:
            process.kill()

    def address(self, index: int) -> str:
        """Where a node listens."""
        return f"127.0.0.1:{self.port + index}"

    def data_dir(self, index: int) -> Path:
        """Where a node stores."""
        return self.directory / f"node-{index}"

    def prefix(self, name: str) -> Sequence[str]:
        """What comes before the command line of a node or client: nothing, where all share a net.

        Args:
            name: ``node-N`` or ``client-N``.
        """
        return ()

    def node(self, index: int, *options: str, size: str = NODE_SIZE) -> Process:
        """A node that was not started yet; by default it enters the ring by itself.

        Args:
            index: 0 is the one that keeps the metadata, unless that is elsewhere.
            options: more of ``torus-node start``.
            size: disk to take.
        """
        name = f"node-{index}"
        arguments = command(
            "torus-node", "start", "--data-dir", str(self.data_dir(index)), "--size", size,
            "--listen", self.address(index), "--auto-join", *self._shared, *options,
        )  # fmt: skip
        process = Process(name, [*self.prefix(name), *arguments], self.directory, " ready on ")
        self.nodes[index] = process
        return process

    def start_node(self, index: int, *options: str, size: str = NODE_SIZE) -> Process:
        """Make a node and start it."""
        return self.node(index, *options, size=size).start()

    def client(self, volume: str | None = None, *options: str) -> Process:
        """An NBD client process that was not started yet, on a unix socket of its own.

        Args:
            volume: the one to serve; None for all.
            options: more of ``torusblk serve``.
        """
        name = f"client-{len(self.clients)}"
        path = self.directory / f"{name}.sock"
        chosen = [] if volume is None else [volume]
        arguments = command("torusblk", "serve", *chosen, "--unix", str(path), *self._shared)
        process = Process(
            name, [*self.prefix(name), *arguments, *options], self.directory, "serving "
        )
        process.uri = f"nbd+unix:///{volume or ''}?socket={path}"
        process.socket = path
        self.clients.append(process)
        return process

    def serve(self, volume: str | None = None, *options: str) -> Process:
        """Make a client process and start it."""
        return self.client(volume, *options).start()

    def run(
        self, program: str, *arguments: str, status: int = 0, stdin: bytes | None = None
    ) -> str:
        """Run a tool to its end, as a process.

        Args:
            program: ``torusctl``, ``torusblk`` or ``torus-node``.
            arguments: the subcommand first; where the cluster is, is added behind.
            status: what it has to end with.
            stdin: what it gets to read.

        Returns:
            What it printed on standard output; on standard error, if it had to fail.

        Raises:
            Unexpected: it ended with another status.
        """
        done = subprocess.run(
            [*command(program, *arguments), *self._shared],
            input=stdin if stdin is not None else b"",
            capture_output=True,
            env=environment(self.directory),
            timeout=DEADLINE_S,
            check=False,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode()
        return judge(arguments, status, done.returncode, out, err)


def judge(arguments: Sequence[str], status: int, ended: int, out: str, err: str) -> str:
    """What a tool said, if it ended as it had to; see ``Cluster.run``."""
    require(ended == status, f"{' '.join(arguments)}: {ended}, {out!r} {err!r}")
    require("Traceback" not in err, err)
    return err if status else out
