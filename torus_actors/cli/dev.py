"""``torus-node dev``: a cluster of real processes on this machine, kept running.

The first node keeps the metadata; one more process serves volumes over NBD. A process that dies is
started again, after a pause that grows as long as it keeps dying. They stop when their standard
input is closed: in order by this process when it stops, and all at once if it was killed. Signals
they leave to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import click
import uvloop

from torus_actors.cli.common import LIFECYCLE, Failed, Settings, set_up_logging
from torus_actors.cli.connect import Connection
from torus_actors.cli.daemon import Stop, fill_standard_streams
from torus_actors.cli.entry import loaded
from torus_actors.cli.units import format_size
from torus_actors.errors import Again, Exists, Invalid, NoGlobalMetadata
from torus_actors.machine import command_of
from torus_actors.model.addresses import Address, check_free, format_address
from torus_actors.model.rings import Ring

HOST = "127.0.0.1"

REPLICATION_DEFAULT = 2

READY_S_MAX = 120.0
"""For everything to be up; making large stores on a slow disk takes the most of it."""

POLL_S = 0.1

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
STEADY_S = 10.0
"""A process that ran for so long starts again without a pause."""

STOP_CLIENT_S_MAX = 100.0
STOP_NODE_S_MAX = 40.0


@dataclass(frozen=True, slots=True)
class DevConfig:
    """What to run.

    Attributes:
        directory: a directory for each node in it.
        nodes: how many.
        size_bytes: disk for each.
        volume: name and size; made if it is not there.
        nbd: where NBD clients connect.
        unix_path: and where else.
        replication: copies; None for the default, or what there is.
        port: of the first node; the others follow, and the NBD process comes last.
        secret_file: of the cluster.
        chatter: options that say how much the processes log.
    """

    directory: Path
    nodes: int
    size_bytes: int
    volume: tuple[str, int]
    nbd: Address
    unix_path: Path | None
    replication: int | None
    port: int
    secret_file: str | None
    chatter: list[str]


class Child:
    """One process, started again when it dies.

    Args:
        name: for people.
        module: with the command's ``main``.
        arguments: of the command.
    """

    def __init__(self, name: str, module: str, arguments: list[str]) -> None:
        self.name = name
        self._command = [*command_of(module), *arguments, "--with-parent"]
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._keeper: asyncio.Task[None] | None = None
        self._last_line = ""
        self.ready = asyncio.Event()
        """Set once it has said that it serves."""
        self.failure: str | None = None
        """Why it ended before it was ready for the first time."""

    def start(self) -> None:
        """Start it, and keep it running."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def _stopped(self) -> bool:
        return self._stopping

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause = BACKOFF_FIRST_S
        while not self._stopped():
            started = loop.time()
            self._last_line = ""
            try:
                status = await self._run_once()
                how = f"status {status}"
                if status < 0:  # what it said before was not the reason
                    how = self._last_line = f"killed by {signal.Signals(-status).name}"
            except OSError as error:
                how = self._last_line = f"cannot be started: {error.strerror}"
            if self._stopped():
                return
            if not self.ready.is_set():
                self.failure = self._last_line or f"it ended with {how}"
                return
            if loop.time() - started > STEADY_S:
                pause = BACKOFF_FIRST_S
            LIFECYCLE.warning("%s ended (%s): starting it again in %.1f s", self.name, how, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, BACKOFF_MAX_S)

    async def _run_once(self) -> int:
        # In a session of its own: Ctrl-C is for this process, which stops the others in order.
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stderr is not None
        assert process.stdin is not None
        if self._stopped():
            process.stdin.close()
        await asyncio.gather(self._listen(process.stdout), self._relay(process.stderr))
        return await process.wait()

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            if line.startswith(b"serving "):
                self.ready.set()

    async def _relay(self, stream: asyncio.StreamReader) -> None:
        """Pass on what it logs, but for what is known already."""
        async for line in stream:
            text = line.decode(errors="replace").rstrip()
            self._last_line = text.partition(": ")[2] or text
            if b" ready on " in line:
                self.ready.set()
            if self.ready.is_set() and " info " not in text[:32]:
                # If nobody reads it, or its disk is full, the process must not stand still for it.
                with contextlib.suppress(OSError):
                    print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    async def stop(self, patience_s: float) -> None:
        """Have it stop in order; kill it if it does not."""
        self._stopping = True
        if self._keeper is None:
            return
        process = self._process
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
        else:
            self._keeper.cancel()
        done, _ = await asyncio.wait([self._keeper], timeout=patience_s)
        if not done and process is not None:
            LIFECYCLE.warning("%s does not stop: killing it", self.name)
            process.kill()
            await asyncio.wait([self._keeper])

    def kill(self) -> None:
        """End it now."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


class DevCluster:
    """The processes of a cluster.

    Args:
        config: what to run.
        settings: for the connection by which it looks after the cluster.
    """

    def __init__(self, config: DevConfig, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self.url = f"torus://{HOST}:{config.port}"
        self.nodes = [self._node(index) for index in range(config.nodes)]
        self.client = self._client()

    @property
    def control(self) -> Address:
        """Where the NBD process answers torusctl."""
        return (HOST, self.config.port + self.config.nodes)

    def _shared(self) -> list[str]:
        secret = self.config.secret_file
        return [*self.config.chatter, *([] if secret is None else ["--secret-file", secret])]

    def _node(self, index: int) -> Child:
        config = self.config
        arguments = ["start", "--data-dir", str(config.directory / f"node-{index}")]
        arguments += ["--size", str(config.size_bytes), "--metadata", self.url, "--auto-join"]
        arguments += ["--listen", f"{HOST}:{config.port + index}", *self._shared()]
        return Child(f"node-{index}", "torus_actors.cli.node", arguments)

    def _client(self) -> Child:
        config = self.config
        arguments = ["serve", "--metadata", self.url, "--default-export", config.volume[0]]
        arguments += ["--tcp", format_address(config.nbd), "--listen", format_address(self.control)]
        if config.unix_path is not None:
            arguments += ["--unix", str(config.unix_path)]
        return Child("nbd", "torus_actors.cli.blk", [*arguments, *self._shared()])

    def check(self) -> None:
        """Refuse what cannot work before anything is started.

        Raises:
            Exists: a port is taken.
            Invalid: the directory holds a larger cluster, strangers could use the volume, that has
                no name, or there is no place for the socket.
        """
        from torus_actors.metadata.records import check_name
        from torus_actors.process import is_loopback

        config = self.config
        check_name(config.volume[0])
        if not is_loopback(config.nbd[0]):
            raise Invalid(
                f"refusing to listen on {config.nbd[0]}: a dev cluster knows no TLS; give --nbd "
                "127.0.0.1:PORT, and serve others with torusblk serve --tls-required"
            )
        if config.unix_path is not None:
            place, directory = config.unix_path.parent, config.directory.absolute()
            made = place.absolute() in (directory, *directory.parents)
            if not (made or place.is_dir()):
                raise Invalid(f"cannot listen on {config.unix_path}: there is no directory {place}")
        if config.directory.is_dir():
            found = sum(path.name.startswith("node-") for path in config.directory.iterdir())
            if found > config.nodes:
                raise Invalid(
                    f"{config.directory} holds a cluster of {found} nodes: give --nodes {found}, "
                    "or another --dir"
                )
        ports = {(HOST, config.port + index): "--port" for index in range(config.nodes + 1)}
        if config.nbd in ports:
            raise Invalid(
                f"--nbd {format_address(config.nbd)} is a port of the cluster itself, which takes "
                f"{config.port} to {config.port + config.nodes}: choose another one"
            )
        for address, option in {**ports, config.nbd: "--nbd"}.items():
            check_free(address, option)

    async def start(self) -> None:
        """Start everything, and wait until it is up."""
        self.config.directory.mkdir(parents=True, exist_ok=True)
        async with asyncio.timeout(READY_S_MAX):
            for node in self.nodes:
                node.start()
            for node in self.nodes:
                await self._until(node.ready.is_set, node)
            connection = Connection(self.url, self.settings.secret())
            try:
                await connection.start()
                await self._prepare(connection)
            finally:
                await connection.stop()
            self.client.start()
            await self._until(self.client.ready.is_set, self.client)

    async def _until(self, done: Callable[[], bool], child: Child) -> None:
        while not done():
            if child.failure is not None:
                raise Failed(f"{child.name} did not start: {child.failure}")
            await asyncio.sleep(POLL_S)

    async def _prepare(self, connection: Connection) -> None:
        """Wait until all nodes are registered; set replication, make the volume."""
        from torus_actors.metadata.ring_changes import change_ring

        meta = connection.meta
        while True:
            try:
                _, ring = await connection.cluster()
                up = {info.peer_id for info in await meta.peers()}
                if len(up & set(ring.members)) >= self.config.nodes:
                    break
            except (Again, NoGlobalMetadata):
                pass
            await asyncio.sleep(POLL_S)
        copies = self.config.replication
        # A first start that was cut off leaves everything but a volume, which is made last.
        if copies is None and not await meta.volumes() and not await meta.deleted_volumes():
            copies = min(REPLICATION_DEFAULT, self.config.nodes)
        if copies is not None:
            wanted = copies

            def change(present: Ring) -> Ring | None:
                return None if present.replication == wanted else present.with_replication(wanted)

            ring = await change_ring(meta, change)
        self.replication = ring.replication
        name, size = self.config.volume
        try:
            await meta.create_volume(name, size)
        except Exists:
            LIFECYCLE.debug("volume %s is there", name)

    async def stop(self) -> None:
        """Stop everything: who writes first, who keeps the metadata last."""
        await self.client.stop(STOP_CLIENT_S_MAX)
        first, *others = self.nodes
        await asyncio.gather(*[node.stop(STOP_NODE_S_MAX) for node in others])
        await first.stop(STOP_NODE_S_MAX)

    def kill(self) -> None:
        """End everything now."""
        for child in (self.client, *self.nodes):
            child.kill()

    def _is_default(self) -> bool:
        """Whether commands that are not told otherwise use this cluster."""
        try:
            return self.settings.metadata_url() == self.url
        except Invalid:
            return False

    def banner(self) -> str:
        """What is running, and what to do with it."""
        config = self.config
        name, _ = config.volume
        uri = f"nbd://{format_address(config.nbd)}/{name}"
        at = "" if self._is_default() else f" -C {self.url}"
        if config.secret_file is not None:
            at += f" --secret-file {shlex.quote(config.secret_file)}"
        lines = [
            f"{config.nodes} nodes of {format_size(config.size_bytes)}, replication "
            f"{self.replication}, in {config.directory}",
            f"metadata  {self.url}",
            f"volume    {uri}",
        ]
        if config.unix_path is not None:
            lines.append(
                f"          nbd+unix:///{name}?socket={quote(os.fsencode(config.unix_path))}"
            )
        lines += [
            "try",
            f"  torusctl{at} status",
            f"  torusctl{at} tree @{format_address(self.control)}",
            f"  qemu-img convert -n -f raw -O raw disk.img {uri}",
            f"  nbdcopy {uri} copy.img",
            "Ctrl-C stops it; started again with the same --dir it has the same data.",
        ]
        return "\n".join(lines)


async def _run(cluster: DevCluster, exit_after_ready: bool) -> None:
    stop = Stop(on_second=cluster.kill)
    try:
        try:
            await stop.unless(cluster.start())
        except TimeoutError as error:
            raise Failed(f"the cluster was not up within {READY_S_MAX:g} s") from error
        if not stop.asked:
            click.echo(cluster.banner())
            sys.stdout.flush()
            if not exit_after_ready:
                await stop.wait()
    finally:
        await cluster.stop()
    LIFECYCLE.info("stopped")


def run_dev(cluster: DevCluster, exit_after_ready: bool) -> None:
    """Run a cluster until told to stop."""
    fill_standard_streams()
    set_up_logging(cluster.settings, daemon=True)
    cluster.check()
    loaded()
    uvloop.run(_run(cluster, exit_after_ready))
