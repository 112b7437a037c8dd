"""``torusblk nbd``: a volume as a block device of this machine's kernel."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.blk_common import (
    FENCED_POLL_S,
    ClientOptions,
    client_options,
    insecure_option,
    once_unlocked,
    read_only_option,
    snapshot_option,
    start_patiently,
    taken_over,
    wait_lock_option,
)
from torus_actors.cli.common import LIFECYCLE, Command, Failed, Settings
from torus_actors.errors import TorusError

if TYPE_CHECKING:
    from torus_actors.client import Client
    from torus_actors.nbd.kernel import KernelDevice

USE_POLL_S = 1.0
"""A device that was let go of, and lives for so long, is in use."""

ATTACH_TIMEOUT_S = 150.0
"""To open a volume, and to have the kernel attach it: longer than the actor takes for both, or a
device would come that nobody waits for."""

PR_SET_IO_FLUSHER = 57
"""Of Linux 5.6 and later; see prctl(2)."""


@click.command(cls=Command)
@click.argument("volume")
@click.argument("device", required=False, metavar="[/dev/nbdN]")
@read_only_option
@snapshot_option
@client_options
@wait_lock_option
@insecure_option
@click.option("--with-parent", is_flag=True, hidden=True)
@click.pass_obj
def nbd(
    settings: Settings,
    /,
    *,
    volume: str,
    device: str | None,
    read_only: bool,
    snapshot: str | None,
    wait_lock: float,
    insecure: bool,
    with_parent: bool,
    **options: Any,
) -> None:
    """Attach VOLUME to /dev/nbdN, or the first that is free, until SIGINT, SIGTERM or SIGHUP.

    Needs root, and the kernel's module (modprobe nbd). A device that is mounted is detached when it
    is unmounted. What was synced is durable; a volume is attached on one machine at a time.
    """
    from torus_actors.cli.daemon import run_daemon, serve_until_stopped

    if snapshot is not None:
        volume, read_only = f"{volume}@{snapshot}", True
    client = ClientOptions(**options)
    client.check(settings, insecure)
    config = client.config(settings, only=volume, read_only=read_only)

    async def start() -> AttachedClient:
        return AttachedClient(await start_patiently(config))

    async def attach(attached: AttachedClient) -> None:
        server = attached.system.actor("nbd_server")
        found: KernelDevice = await once_unlocked(
            lambda: server.attach.remote(volume, device, timeout_s=ATTACH_TIMEOUT_S), wait_lock
        )
        attached.device = found
        click.echo(f"serving volume {volume} at {found.path}")

    become_io_flusher()
    run_daemon(
        settings,
        serve_until_stopped(
            start, attach, with_parent, lambda attached: attached.until_over(volume)
        ),
    )


class AttachedClient:
    """A client with a device of the kernel's; stops once nobody uses that any more.

    Args:
        client: it.
        device: to be attached.
    """

    def __init__(self, client: Client) -> None:
        self.system = client.system
        self._client = client
        self.device: KernelDevice | None = None
        self._is_lost = False
        """Whether the volume was taken over, and takes nothing any more."""

    async def stop(self) -> None:
        """Detach the device when it is not in use any more, and stop.

        Raises:
            Failed: not all that was written to the device is in the volume.
        """
        try:
            if self.device is not None:
                detaching = asyncio.ensure_future(self._detach(self.device))
                # Once the client has given up, nobody answers the device any more.
                await asyncio.wait(
                    [detaching, self.system.fatal], return_when=asyncio.FIRST_COMPLETED
                )
                if detaching.done():
                    detaching.result()
                detaching.cancel()
        finally:
            if self.device is not None:
                await self.device.cut_off()
            await self._client.stop()

    async def _detach(self, device: KernelDevice) -> None:
        failure: OSError | None = None
        if not device.ended:
            try:
                await device.sync()
            except OSError as error:
                failure = error
            with contextlib.suppress(OSError):  # who kept it has ended, and keeps it no more
                await device.let_go()
        told = False
        while not await device.has_gone(USE_POLL_S):
            if not told:
                told = True
                LIFECYCLE.warning(
                    "%s is in use: it is detached when it is unmounted and closed; asked again, "
                    "this stops at once, and what was not synced is lost",
                    device.path,
                )
        if failure is not None and not self._is_lost:
            raise Failed(
                f"{device.path}: what was written last is not in the volume: {failure.strerror}"
            ) from failure

    async def until_over(self, volume: str) -> None:
        """Wait until the device is of no use any more.

        When another client has taken the volume over, it gives nothing but errors to those who
        write to it; whoever has it mounted must not find another state of the volume in its place,
        so it stays until they have let go of it.

        Raises:
            Failed: now.
        """
        device = self.device
        assert device is not None
        while not await device.has_gone(FENCED_POLL_S):
            if not device.kept:
                raise Failed(f"the process that keeps {device.path} was killed")
            try:
                rows: list[dict[str, Any]] = await self.system.actor("volumes").status.remote()
            except TorusError:
                continue  # it is being restarted
            for row in rows:
                if row["name"] == volume and row["fenced"]:
                    self._is_lost = True
                    raise taken_over(volume, row["failure"])
        raise Failed(f"{device.path} was detached by another program, or its connection broke")


def become_io_flusher() -> None:
    """Tell the kernel that its I/O waits for this thread, and those that it will start.

    So it does not have them write other devices' data to find memory for them, which may wait for
    the device served here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # Refused where this is not root's, or the kernel is older: then it is as it was.
    libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
