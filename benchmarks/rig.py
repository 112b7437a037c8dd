"""What the benchmarks have in common: real processes of a cluster, fio, and yardsticks.

A figure means little without one of the same machine in the same minute: the yardsticks say what
the disk, the page cache and the network do when nothing of this system is in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torus_actors.actors.bridge import Bridge, BridgeConfig
from torus_actors.runtime import ActorSystem, ChildSpec, SupervisorSpec
from torus_actors.wire.hello import Identity, Role

ROOT = Path(__file__).resolve().parents[1]

START_S_MAX = 60.0

STOP_S_MAX = 60.0

MODULES = {
    "torus-node": "torus_actors.cli.node",
    "torusctl": "torus_actors.cli.ctl",
    "torusblk": "torus_actors.cli.blk",
}


def fio(uri: str, options: tuple[str, ...], seconds: float | None = None) -> dict[str, Any]:
    """Run one fio job by its nbd engine; its first result. ``options`` name a ``--size``."""
    command = [
        "fio",
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--randrepeat=0",
        "--output-format=json",
        *options,
    ]
    if seconds is not None:
        command += ["--time_based", f"--runtime={seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/tmp")
    result: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if result["error"]:
        raise RuntimeError(f"fio failed: {done.stderr}")
    return result


@contextmanager
def nbdkit(folder: Path, size: int) -> Iterator[str | None]:
    """A running nbdkit memory disk; None where it is not installed."""
    if shutil.which("nbdkit") is None:
        yield None
        return
    path = folder / "nbdkit.sock"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(path), "memory", str(size)])
    try:
        while not path.exists():
            time.sleep(0.05)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()


def resident(parent: int) -> dict[str, float]:
    """Resident MiB of each process of the cluster."""
    found: dict[str, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" not in status:
            continue
        kind = "client" if any(b"blk" in part for part in command[:4]) else "storage node"
        size = int(status.split("VmRSS:")[1].split()[0]) / 1024
        found[f"{kind} {entry.name}"] = size
    return found


class Stolen:
    """What the hypervisor gives to other machines of the cores that this one asks for.

    With a half of it stolen every figure is another one, and nothing else on the machine says why.
    """

    TITLE = "time of its cores that the machine asked for and did not get"

    def __init__(self) -> None:
        self._before = self._times()

    @staticmethod
    def _times() -> list[int]:
        return [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]

    @property
    def percent(self) -> float:
        """Of the time that the cores were wanted, since this was made."""
        spent = [now - then for now, then in zip(self._times(), self._before, strict=True)]
        user, nice, system, _idle, _waiting, interrupts, soft, stolen = spent
        wanted = user + nice + system + interrupts + soft + stolen
        return 100.0 * stolen / max(wanted, 1)


def _pong(port: multiprocessing.connection.Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port.send(listener.getsockname())
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := peer.recv(256):
        peer.sendall(data)


def ping_pong(seconds: float) -> float:
    """Round trips a second of two processes with blocking sockets: no call can be faster."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_pong, args=(theirs,), daemon=True)
    process.start()
    with socket.create_connection(ours.recv()) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(50):
                peer.sendall(bytes(64))
                peer.recv(256)
            count += 50
        rate = count / (time.perf_counter() - start)
    process.join(5)
    return rate


def plain_writes(folder: Path, size: int) -> float:
    """MB/s of user data that one process gets into the page cache as two new files.

    What a cluster on one machine has to do at the least for two copies, before anything is sent.
    """
    block = os.urandom(512 << 10)
    count = size // len(block)
    start = time.perf_counter()
    files = [os.open(folder / f"plain-{n}", os.O_RDWR | os.O_CREAT) for n in range(2)]
    for n in range(count):
        for file in files:
            os.pwrite(file, block, n * len(block))
    elapsed = time.perf_counter() - start
    for n, file in enumerate(files):
        os.close(file)
        (folder / f"plain-{n}").unlink()
    return size / elapsed / 1e6


def plain_flushes(folder: Path, size: int) -> float:
    """Seconds that two processes take to write a new file each, in one piece, and sync it."""
    paths = [folder / f"plain{n}" for n in range(2)]
    with multiprocessing.Pool(2) as pool:
        times = pool.starmap(_written_and_synced, [(str(path), size) for path in paths])
    for path in paths:
        path.unlink()
    return max(times)


def _written_and_synced(path: str, size: int) -> float:
    data = os.urandom(size)
    with open(path, "wb", buffering=0) as file:
        began = time.perf_counter()
        file.write(data)
        os.fdatasync(file.fileno())
        return time.perf_counter() - began


def _synced_writer(path: str, seconds: float, out: multiprocessing.connection.Connection) -> None:
    size = os.stat(path).st_size
    data = os.urandom(4096)
    file = os.open(path, os.O_RDWR)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        os.pwrite(file, data, random.randrange(size // 4096) * 4096)
        os.fdatasync(file)
        taken.append(time.perf_counter() - start)
    os.close(file)
    out.send(taken)


def synced_writes(folder: Path, seconds: float, size: int = 64 << 20) -> list[float]:
    """Seconds that each 4 KiB pwrite + fdatasync took, two processes doing so at once.

    Each has a file of its own that was written before, so that no metadata changes: what a write
    and a flush to two copies have to wait for at the least.
    """
    paths = [folder / f"synced-{n}" for n in range(2)]
    for path in paths:
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(size >> 20):
                    file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
    pipes = [multiprocessing.Pipe(duplex=False) for _ in paths]
    writers = [
        multiprocessing.Process(target=_synced_writer, args=(str(path), seconds, out), daemon=True)
        for path, (_, out) in zip(paths, pipes, strict=True)
    ]
    for writer in writers:
        writer.start()
    taken = [each for incoming, _ in pipes for each in incoming.recv()]
    for writer in writers:
        writer.join()
    return taken


def _received(peer: socket.socket, view: memoryview) -> bool:
    """Fill a buffer; whether the other side was still there."""
    at = 0
    while at < len(view):
        count = peer.recv_into(view[at:])
        if not count:
            return False
        at += count
    return True


def _bare_member(peer: socket.socket, path: str) -> None:
    size = os.stat(path).st_size
    file = os.open(path, os.O_RDWR)
    page = memoryview(bytearray(4096))
    while _received(peer, page):
        os.pwrite(file, page, random.randrange(size // 4096) * 4096)
        os.fdatasync(file)
        peer.sendall(b"y")


def _bare_server(peer: socket.socket, members: list[socket.socket]) -> None:
    page = memoryview(bytearray(4096))
    while _received(peer, page):
        peer.sendall(b"y")
        peer.recv(1)
        for member in members:
            member.sendall(page)
        for member in members:
            member.recv(1)
        peer.sendall(b"y")


def bare_flushes(folder: Path, seconds: float) -> list[float]:
    """Seconds that each 4 KiB write with a flush takes through bare Python processes.

    The messages of a flushed write and nothing else: a server answers the write, and for the flush
    sends the page to two members, which pwrite and fdatasync it and answer. Blocking unix sockets,
    no event loop, no protocol, no checksum. Call ``synced_writes`` first: it makes the files.
    """
    ours, theirs = socket.socketpair()
    pairs = [socket.socketpair() for _ in range(2)]
    processes = [
        multiprocessing.Process(
            target=_bare_member, args=(inner, str(folder / f"synced-{n}")), daemon=True
        )
        for n, (_, inner) in enumerate(pairs)
    ]
    outer = [pair[0] for pair in pairs]
    processes.append(
        multiprocessing.Process(target=_bare_server, args=(theirs, outer), daemon=True)
    )
    for process in processes:
        process.start()
    page = os.urandom(4096)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        for message in (page, b"f"):
            ours.sendall(message)
            ours.recv(1)
        taken.append(time.perf_counter() - start)
    for process in processes:
        process.kill()
        process.join()
    for each in (ours, theirs, *itertools.chain(*pairs)):
        each.close()
    return taken


def resident_bytes(pid: int) -> int:
    """Memory that a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def environment() -> dict[str, str]:
    """Of the processes under test: this tree, and nothing that a user has configured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORUS_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the kernel gives out."""
    rng = random.Random()
    while True:
        first = rng.randrange(20000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                each = stack.enter_context(socket.socket())
                each.bind(("127.0.0.1", port))
            return first


class Process:
    """A program under test.

    Args:
        name: of its log, which is kept beside its data.
        command: its command line.
        folder: for the log.
    """

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.command = command
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Memory it has now."""
        return resident_bytes(self.pid)

    @property
    def cpu_s(self) -> float:
        """Processor time it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start(self, ready: str = "") -> Process:
        """Start it, and wait until it has printed ``ready``."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        until(lambda: ready in self.log.read_text(errors="replace") or self._ended(), self.name)
        if self._ended():
            raise RuntimeError(f"{self.name} ended: {self.log.read_text(errors='replace')}")
        return self

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """Have it stop in order; kill it if it does not."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def until(condition: Callable[[], Any], what: str, within_s: float = START_S_MAX) -> Any:
    """Wait until a condition holds; what it returned."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"not within {within_s:g} s: {what}")
        time.sleep(0.01)
    return found


class Cluster:
    """Storage nodes, clients and tools of one cluster, as separate processes on this machine.

    Args:
        folder: an empty directory.
        node_bytes: disk for each node.
        etcd: keep the metadata in an etcd; else in the first node.
    """

    def __init__(self, folder: Path, node_bytes: int, *, etcd: bool = False) -> None:
        self.folder = folder
        self.node_bytes = node_bytes
        self.port = free_ports(16)
        self.metadata = f"torus://127.0.0.1:{self.port}"
        self.etcd: Process | None = None
        self.nodes: list[Process] = []
        self.clients: list[Process] = []
        if etcd:
            url = f"http://127.0.0.1:{self.port + 15}"
            peer = f"http://127.0.0.1:{self.port + 14}"
            self.metadata = f"etcd://127.0.0.1:{self.port + 15}"
            self.etcd = Process(
                "etcd",
                [
                    "etcd",
                    *("--data-dir", str(folder / "etcd"), "--name", "bench"),
                    *("--listen-client-urls", url, "--advertise-client-urls", url),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"bench={peer}"),
                ],
                folder,
            )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all that runs."""
        for process in (*self.clients, *self.nodes, *([self.etcd] if self.etcd else [])):
            process.kill()

    def start(self, nodes: int, replication: int = 2) -> Cluster:
        """Start the metadata and the first nodes."""
        try:
            if self.etcd is not None:
                self.etcd.start("ready to serve client requests")
                self.ctl("init", "--replication", str(replication))
            for _ in range(nodes):
                self.add_node()
            self.ctl("ring", "set-replication", str(replication))
        except BaseException:
            self.kill()
            raise
        return self

    def add_node(self) -> Process:
        """One more node, in the ring."""
        index = len(self.nodes)
        command = self._command(
            "torus-node", "start", "--data-dir", str(self.folder / f"node-{index}"),
            "--size", str(self.node_bytes), "--listen", f"127.0.0.1:{self.port + index}",
            "--auto-join",
        )  # fmt: skip
        node = Process(f"node-{index}", command, self.folder)
        self.nodes.append(node)
        return node.start(" ready on ")

    def address(self, index: int) -> str:
        """Where a node listens."""
        return f"127.0.0.1:{self.port + index}"

    def serve(self, volume: str, *options: str) -> tuple[Process, Path]:
        """A client that serves a volume; the process, not started, and its unix socket."""
        index = len(self.clients)
        path = self.folder / f"client-{index}.sock"
        command = self._command("torusblk", "serve", volume, "--unix", str(path), *options)
        client = Process(f"client-{index}", command, self.folder)
        self.clients.append(client)
        return client, path

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", MODULES[program], *arguments, "-C", self.metadata]

    def ctl(self, *arguments: str) -> str:
        """Run ``torusctl``; what it printed."""
        done = subprocess.run(
            self._command("torusctl", *arguments),
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"torusctl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def ctl_json(self, *arguments: str) -> Any:
        """Run ``torusctl`` with ``--json``; what it says."""
        return json.loads(self.ctl(*arguments, "--json"))


def uri_of(path: Path, volume: str) -> str:
    """Of a volume at a unix socket, for fio."""
    return f"nbd+unix:///{volume}?socket={path}"


def read_once(path: Path, volume: str, offset: int, length: int) -> bytes:
    """Connect to an NBD server at a unix socket and read: the least that a client does."""
    name = volume.encode()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        stream = peer.makefile("rwb")
        stream.read(18)  # the greeting
        # Fixed newstyle without zeroes; EXPORT_NAME, which is answered by size and flags.
        stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        stream.flush()
        stream.read(10)
        stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        stream.flush()
        _, error, _ = struct.unpack(">IIQ", stream.read(16))
        if error:
            raise RuntimeError(f"the first read failed: errno {error}")
        return stream.read(length)


class Sampler:
    """Calls a function again and again while it is entered; ``values`` has what it returned."""

    def __init__(self, function: Callable[[], float], every_s: float) -> None:
        self.values: list[tuple[float, float]] = []
        self._function = function
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self.values.append((time.monotonic(), self._function()))


class Asker:
    """Asks actors of running processes, by their addresses; usable from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Asker:
        self._thread.start()
        self._system = self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._system.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> ActorSystem:
        system = ActorSystem(asyncio.get_running_loop(), node_id="asker")
        bridge = BridgeConfig(Identity(None, "asker", Role.CLIENT, 1, "bench"))
        await system.start(SupervisorSpec("root", (ChildSpec("bridge", lambda: Bridge(bridge)),)))
        return system

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def ask(self, address: str, actor: str, method: str, *args: Any) -> Any:
        """The answer of one call."""

        async def call() -> Any:
            handle = self._system.actor(actor, node=f"@{address}")
            return await getattr(handle, method).remote(*args)

        return self._run(call())
