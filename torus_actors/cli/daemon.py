"""Running until told to stop: signals, an orderly end, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import uvloop

from torus_actors.cli.common import LIFECYCLE, Failed, Settings, one_line, set_up_logging
from torus_actors.cli.entry import loaded

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The last one comes when a terminal is closed, or an ssh connection ends."""

ONCE_S = 0.5
"""Signals closer to the first are one with it: timeout(1) passes the one that it gets to its child
and to its group, in which the child is too, and sudo does likewise."""


class Running(Protocol):
    """A node or a client."""

    system: Any

    async def stop(self) -> None:
        """Stop in order."""


class Stop:
    """Set by the first signal. A second one, a moment later, ends the process at once.

    Args:
        with_parent: stop when standard input is closed: the process that started this one wants
            that, or is gone. Until then signals are left to it: who stops all of a service sends
            them to each process at once, and only that one knows in which order they stop.
        on_second: called before that end.
    """

    def __init__(
        self, with_parent: bool = False, on_second: Callable[[], None] | None = None
    ) -> None:
        self._on_second = on_second
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._signalled_at: float | None = None
        self._has_parent = with_parent
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                # Ignored, it is to go on without the terminal: nohup.
                self._loop.add_signal_handler(number, self._signalled, signal.Signals(number).name)
        if with_parent:
            self._loop.add_reader(0, self._parent_spoke)

    @property
    def asked(self) -> bool:
        """Whether it is time to stop."""
        return self._asked.is_set()

    async def wait(self) -> None:
        """Wait until it is time to stop."""
        await self._asked.wait()

    def _signalled(self, name: str) -> None:
        if self._has_parent:
            LIFECYCLE.debug("%s: that is for the process that started this one", name)
            return
        now = self._loop.time()
        if self._signalled_at is not None:
            if now - self._signalled_at < ONCE_S:
                return
            if self._on_second is not None:
                self._on_second()
            with contextlib.suppress(OSError):  # who read it may be gone: Ctrl-C is for tee too
                print("stopped at once: asked twice", file=sys.stderr, flush=True)
            os._exit(1)
        self._signalled_at = now
        if not self.asked:
            LIFECYCLE.info("%s: stopping", name)
            self._asked.set()

    def _parent_spoke(self) -> None:
        if not os.read(0, 4096):
            self._loop.remove_reader(0)
            self._has_parent = False
            LIFECYCLE.info("the process that started this one has closed standard input: stopping")
            self._asked.set()

    async def unless(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do some work, unless it is time to stop before it is done: then the result is None.

        Raises:
            Exception: what the work raised.
        """
        task = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        return None if task.cancelled() else task.result()


async def serve_until_stopped(
    start: Callable[[], Coroutine[Any, Any, Running]],
    ready: Callable[[Any], Coroutine[Any, Any, None]],
    with_parent: bool,
    over: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Start something, keep it until told to stop, stop it.

    Args:
        start: makes it.
        ready: called with it once it runs.
        with_parent: see ``Stop``.
        over: called with it after that; raises ``Failed`` when it is of no use any more.

    Raises:
        Failed: it gave up by itself, or is of no use any more; or it could not store what was
            written as it stopped.
        TorusError: it could not start.
    """
    from torus_actors.actors.volumes import NOT_CLOSED

    stop = Stop(with_parent)
    running = await stop.unless(start())
    if running is None:
        return
    try:
        # What there is now stays: to look through it again would stop the process every time.
        gc.collect()
        gc.freeze()
        await stop.unless(ready(running))
        if not stop.asked:
            try:
                await stop.unless(_until_over(running, over))
            except Failed:
                raise
            except Exception as error:
                raise Failed(f"gave up: {one_line(error)}") from error
    finally:
        await running.stop()
    lost = running.system.heirlooms.get(NOT_CLOSED)
    if lost:
        raise Failed("; ".join(lost))
    LIFECYCLE.info("stopped")


async def _until_over(
    running: Running, over: Callable[[Any], Coroutine[Any, Any, None]] | None
) -> None:
    """Wait until it gives up, or is of no use any more."""
    waiting = [asyncio.shield(running.system.fatal)]
    if over is not None:
        waiting.append(asyncio.ensure_future(over(running)))
    try:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        for each in waiting:
            each.cancel()


def run_daemon(settings: Settings, work: Coroutine[Any, Any, None]) -> None:
    """Run a daemon's main coroutine on uvloop."""
    fill_standard_streams()
    set_up_logging(settings, daemon=True)
    _open_many_files()
    loaded()
    uvloop.run(work)


def fill_standard_streams() -> None:
    """Give descriptors 0 to 2 to /dev/null where they are closed, as by ``<&-``.

    Else the event loop's own get these numbers, and libuv ends the process when it closes such a
    one.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _open_many_files() -> None:
    """Raise the limit of open files as far as it goes.

    It is low for the sake of programs that use select(2), and each client of NBD is one file.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems cannot, where there is no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
