"""A cluster of real processes for a scenario: the counterpart of the one in ``cluster.py``.

Storage nodes, clients and an etcd, as a user would start them: all on loopback, or each on a host
of its own (see ``netns.py``) where a scenario cuts the network. A node that ends by itself is
started again, as a service manager would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torus_actors.errors import TorusError
from torus_actors.metadata.etcd import EtcdStore
from torus_actors.metadata.records import Epoch, Head, RingRecord
from torus_actors.metadata.service import MetadataService
from torus_actors.scenarios import processes
from torus_actors.scenarios.cluster import FAILURES_MAX, RESTART_PAUSE_S, Shape
from torus_actors.scenarios.etcd_server import EtcdServer
from torus_actors.scenarios.netns import Network
from torus_actors.scenarios.processes import Process, Unexpected, command, environment, judge

META = "meta"

NODES_MAX = 24
"""Nodes that a run may start, those that are lost or join later among them."""

PORT = 40000
"""Of every node that has an address of its own."""

STORE_BYTES_MIN = 64 << 20
"""A node's files are made before it is up; more than this is seldom needed."""

START_S_MAX = 60.0
STOP_S_MAX = 60.0
TOOL_S_MAX = 90.0
POLL_S = 0.02
WATCH_S = 0.5

MORTAL = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Before a command line: it ends when this process does. In a private world all do."""

BUG = "Traceback (most recent call last)"
"""In the log of a process: an error that nobody foresaw."""


@dataclass(eq=False)
class RealHost:
    """One machine, as far as the scenario is concerned.

    Attributes:
        index: of the node, or of the client.
        wanted: whether the program shall run.
        paused: by SIGSTOP.
        hit: boots of a client that a fault struck, whose operations may fail.
    """

    name: str
    index: int
    process: Process
    wanted: bool = False
    starting: bool = False
    paused: bool = False
    hit: set[str] = field(default_factory=set)

    @property
    def up(self) -> bool:
        """Whether its program is running and has started."""
        return not self.starting and self.process.up

    @property
    def boot(self) -> str:
        """Names the present process, or the last one."""
        return self.process.boot


class RealCluster(processes.Cluster):
    """See the module. To be used on a running event loop.

    Args:
        directory: an empty one.
        shape: how the cluster is made.
        say: called with each line of progress.
        rng: of the few decisions that are made here.
        network: where the hosts are; None puts all on loopback.
        lease_s: how long a dead process counts as alive.
    """

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        say: Callable[[str], None],
        rng: random.Random,
        network: Network | None = None,
        lease_s: int | None = None,
    ) -> None:
        self.shape = shape
        self.network = network
        self.failures: list[str] = []
        self._tell = say
        self._began = time.monotonic()
        self.lease_s = lease_s or shape.lease_ttl_s
        folder = directory / "etcd"
        folder.mkdir()
        if network is None:
            self.etcd = EtcdServer(folder, prefix=MORTAL)
        else:
            self.etcd = EtcdServer(folder, network.add(META), network.prefix(META))
        super().__init__(
            directory, f"etcd://{self.etcd.endpoint}", NODES_MAX + 4, secrets.token_hex(16)
        )
        self._remove_after_s = int(shape.remove_after_s)
        self._size = str(max(shape.store_bytes, STORE_BYTES_MIN))
        self.hosts: list[RealHost] = []
        for _ in range(shape.nodes):
            self.add_node()
        self.client_hosts = [self._new_client(index) for index in range(shape.clients)]
        self.meta = MetadataService(
            EtcdStore([self.etcd.endpoint]), rng=rng, wall_clock=time.time, resolve_s=1.0
        )
        """The driver's own way to the metadata."""
        self._watcher: asyncio.Task[None] | None = None
        self._epochs: dict[str, int] = {}
        self._ring_version = 0

    # -- saying ------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line of progress."""
        self._tell(f"{time.monotonic() - self._began:8.2f} {text}")

    def fail(self, text: str) -> None:
        """Something that must not happen has happened."""
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(text)
            self.say(f"FAILURE {text}")

    # -- making it ---------------------------------------------------------------------------------

    def address(self, index: int) -> str:
        """See Cluster."""
        if self.network is None:
            return super().address(index)
        return f"{self.network.address(f'node-{index}')}:{PORT}"

    def prefix(self, name: str) -> Sequence[str]:
        """See Cluster."""
        return MORTAL if self.network is None else self.network.prefix(name)

    def listen_of(self, host: RealHost) -> str:
        """Where tools can ask a node or a client."""
        return self.address(host.index) if host in self.hosts else self._client_address(host.index)

    def _client_address(self, index: int) -> str:
        if self.network is None:
            return super().address(NODES_MAX + index)
        return f"{self.network.address(f'client-{index}')}:{PORT}"

    def add_node(self) -> RealHost:
        """One more machine for a storage node."""
        index = len(self.hosts)
        if index >= NODES_MAX:
            raise Unexpected(f"a scenario has at most {NODES_MAX} nodes")
        name = f"node-{index}"
        if self.network is not None:
            self.network.add(name)
        options = ("--lease", str(self.lease_s), "--remove-after", f"{self._remove_after_s}s")
        process = self.node(index, *options, size=self._size)
        host = RealHost(name, index, process)
        self.hosts.append(host)
        return host

    def _new_client(self, index: int) -> RealHost:
        name = f"client-{index}"
        if self.network is not None:
            self.network.add(name)
        process = self.client(
            None,
            *("--listen", self._client_address(index), "--lease", str(self.lease_s)),
            *("--read-cache", str(max(self.shape.read_cache_bytes, 1))),
            *("--write-cache", str(self.shape.write_cache_bytes)),
        )
        return RealHost(name, index, process)

    async def start(self) -> None:
        """Initialise the metadata, start all nodes, make the volumes.

        Raises:
            Unexpected: something does not come up.
        """
        shape = self.shape
        await self.start_etcd()
        await self.tool(
            "torusctl", "init",
            "--block-size", str(shape.block_size), "--replication", str(shape.replication),
        )  # fmt: skip
        if not all(await asyncio.gather(*[self.boot_node(host) for host in self.hosts])):
            raise Unexpected("the nodes do not come up")
        sizes = enumerate(shape.volume_bytes)
        await asyncio.gather(
            *[self.tool("torusctl", "volume", "create", f"v{n}", str(size)) for n, size in sizes]
        )
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def start_etcd(self) -> None:
        """Start etcd, with what it kept."""
        if not self.etcd.running:
            self.etcd.kill()
            self.etcd.launch()
        end = time.monotonic() + START_S_MAX
        while not self.etcd.accepts():
            if not self.etcd.running or time.monotonic() > end:
                raise Unexpected("etcd does not come up")
            await asyncio.sleep(POLL_S)

    async def boot_node(self, host: RealHost) -> bool:
        """Start a storage node; whether it came up. One that fails is tried again later."""
        host.wanted = True
        return await self._start(host)

    async def boot_client(self, host: RealHost) -> bool:
        """Start a client that serves volumes; whether it came up."""
        return await self._start(host)

    async def _start(self, host: RealHost) -> bool:
        if host.starting:
            return False
        if host.process.running:
            return host.up
        host.starting = True
        try:
            host.process.kill()  # one that ended by itself is still to be waited for
            host.paused = False
            process = host.process.launch()
            end = time.monotonic() + START_S_MAX
            while not process.up:
                if not process.running:
                    self.say(f"{host.boot} did not come up: {_last_line(process.output)}")
                    return False
                if time.monotonic() > end:
                    self.fail(f"{host.boot} is not up after {START_S_MAX:g} s")
                    return False
                await asyncio.sleep(POLL_S)
            return True
        finally:
            host.starting = False

    # -- ending processes --------------------------------------------------------------------------

    async def stop(self, host: RealHost) -> None:
        """End a host's program in order."""
        host.wanted = False
        process = host.process
        if process.running:
            self.resume(host)
            process.ask_to_stop()
            end = time.monotonic() + STOP_S_MAX
            while process.running:
                if time.monotonic() > end:
                    self.fail(f"{host.boot} does not stop within {STOP_S_MAX:g} s")
                    break
                await asyncio.sleep(POLL_S)
        process.kill()

    def kill(self, *hosts: RealHost) -> None:
        """SIGKILL, all at once."""
        for host in hosts:
            host.process.send_kill()
        for host in hosts:
            host.process.kill()
            host.paused = False

    def pause(self, host: RealHost) -> None:
        """SIGSTOP: it stays connected and never answers."""
        host.process.pause()
        host.paused = True

    def resume(self, host: RealHost) -> None:
        """SIGCONT."""
        if host.paused and host.process.running:
            host.process.resume()
        host.paused = False

    async def heal(self) -> None:
        """End all that is still broken; nodes that are wanted run afterwards."""
        if self.network is not None:
            self.network.heal()
        for host in [*self.hosts, *self.client_hosts]:
            self.resume(host)
        if self.etcd.running:
            self.etcd.resume()
        await self.start_etcd()
        end = time.monotonic() + START_S_MAX
        while down := [host for host in self.hosts if host.wanted and not host.up]:
            if time.monotonic() > end:
                raise Unexpected(f"{down[0].name} does not come up again")
            await asyncio.gather(*[self._start(host) for host in down])
            await asyncio.sleep(POLL_S)

    async def end(self) -> None:
        """Kill everything, and look at what was said."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        self.kill(*self.client_hosts, *self.hosts)
        self.etcd.kill()
        await self.meta.store.close()
        for path in sorted(self.directory.glob("*.log")):
            text = path.read_text(errors="replace")
            if BUG in text:
                where = text.index(BUG)
                self.fail(f"{path.name} has a traceback: {text[where:][:2000]}")

    @property
    def members_up(self) -> list[RealHost]:
        """Nodes that run, are wanted and are not paused."""
        return [host for host in self.hosts if host.up and host.wanted and not host.paused]

    # -- looking at it -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Restart nodes that ended by themselves; see that epochs and rings only grow."""
        ended: dict[RealHost, float] = {}
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for host in self.hosts:
                if not host.wanted or host.starting or not host.process.ended:
                    ended.pop(host, None)
                elif now - ended.setdefault(host, now) >= RESTART_PAUSE_S:
                    self.say(f"{host.boot} ended by itself: {_last_line(host.process.output)}")
                    await self._start(host)
            with contextlib.suppress(TorusError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._look_at_metadata()

    async def _look_at_metadata(self) -> None:
        for key, record in await self.meta.dump():
            if isinstance(record, (Epoch, Head)):
                before = self._epochs.get(key, 0)
                if record.epoch < before:
                    self.fail(f"{key} goes from epoch {before} back to {record.epoch}")
                self._epochs[key] = record.epoch
            elif isinstance(record, RingRecord):
                if record.version < self._ring_version:
                    self.fail(f"the ring goes from {self._ring_version} to {record.version}")
                self._ring_version = record.version

    def node_id(self, host: RealHost) -> str:
        """Of a node that has run."""
        path = self.data_dir(host.index) / "node.json"
        return str(json.loads(path.read_text())["id"])

    async def ring(self) -> dict[str, Any]:
        """As ``torusctl ring get`` tells it."""
        ring: dict[str, Any] = json.loads(await self.tool("torusctl", "ring", "get", "--json"))
        return ring

    async def audit(self, volume: str, deep: bool, placed: bool = False) -> str:
        """Whether all copies of a volume's blocks are there: what lacks, or nothing.

        Args:
            volume: name.
            deep: have all copies read and verified.
            placed: whether each must be where the ring wants it, too.
        """
        options = ["--deep"] if deep else []
        status, out, err = await self._run(
            "torusctl", "volume", "check", volume, "--json", *options
        )
        if not out.startswith("{"):
            return f"volume {volume} cannot be checked: {_last_line(err)}"
        found = json.loads(out)
        lacking = {
            name: found[name]
            for name in ("fewer", "missing", "corrupt", "silent", *["misplaced"] * placed)
            if found[name]
        }
        if found["expected"] < self.shape.replication:
            lacking["expected"] = found["expected"]
        if status and not lacking:
            return f"volume {volume}: {_last_line(err)}"
        return f"volume {volume}: {lacking} {found['examples'][:2]}" if lacking else ""

    def forget(self, host: RealHost) -> None:
        """A machine is gone with its disk."""
        host.wanted = False
        self.kill(host)
        shutil.rmtree(self.data_dir(host.index), ignore_errors=True)

    # -- tools -------------------------------------------------------------------------------------

    async def tool(self, program: str, *arguments: str) -> str:
        """Run a tool to its end; what it printed.

        Raises:
            Unexpected: it failed.
        """
        status, out, err = await self._run(program, *arguments)
        return judge(arguments, 0, status, out, err)

    async def _run(self, program: str, *arguments: str) -> tuple[int, str, str]:
        done = await asyncio.create_subprocess_exec(
            *command(program, *arguments),
            *self._shared,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(self.directory),
        )
        try:
            async with asyncio.timeout(TOOL_S_MAX):
                out, err = await done.communicate()
        except BaseException as error:
            done.kill()
            await done.wait()
            if isinstance(error, TimeoutError):
                raise Unexpected(
                    f"{program} {' '.join(arguments)} has not ended in {TOOL_S_MAX:g} s"
                ) from error
            raise
        assert done.returncode is not None
        return done.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "without a word"
