"""Running until told to stop: what a daemon does besides its work."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from torus_actors.actors.volumes import NOT_CLOSED
from torus_actors.cli import daemon
from torus_actors.cli.common import Failed, Settings
from torus_actors.cli.daemon import ONCE_S, Stop, serve_until_stopped


class Served:
    """Stands for a node that runs."""

    def __init__(self) -> None:
        fatal = asyncio.get_running_loop().create_future()
        self.system = SimpleNamespace(fatal=fatal, heirlooms={})
        self.stopped = False
        self.frozen = 0

    async def stop(self) -> None:
        """Note what the collector of Python's garbage does not look at."""
        self.stopped = True
        self.frozen = gc.get_freeze_count()


async def serve(then: object) -> Served:
    """Serve until that happens: a signal comes, or an error is met."""
    gc.unfreeze()
    served = Served()

    async def start() -> Served:
        return served

    async def ready(_: Served) -> None:
        assert gc.get_freeze_count(), "no pause follows once it says that it is ready"

    async def over(_: Served) -> None:
        if isinstance(then, BaseException):
            raise then
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    try:
        await serve_until_stopped(start, ready, False, over)
    except Failed:
        assert isinstance(then, Failed)
    finally:
        gc.unfreeze()
    return served


@pytest.mark.parametrize("then", [None, Failed("of no use")])
def test_what_was_there_at_the_start_is_not_looked_through_again(then: object) -> None:
    """Each time would stop the process for as long as a request may take."""
    served = asyncio.run(serve(then))
    assert served.stopped and served.frozen > 10_000


def test_what_a_stop_could_not_store_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to stop: that is no success if writes are lost."""

    async def stop(served: Served) -> None:
        served.system.heirlooms[NOT_CLOSED] = ["closing volume v: lost", "closing volume w: too"]

    monkeypatch.setattr(Served, "stop", stop)

    async def main() -> None:
        async def start() -> Served:
            return Served()

        async def ready(_: Served) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Failed, match=r"^closing volume v: lost; closing volume w: too$"):
            await serve_until_stopped(start, ready, False)

    asyncio.run(main())


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had acknowledged goes to the disks, and the volume is let go of.

    Found by a test with timeout(1): the second one ended the process in the middle of that.
    """
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        stop = Stop()
        now = loop.time() + 100.0
        monkeypatch.setattr(loop, "time", lambda: now)
        stop._signalled("SIGTERM")
        now += ONCE_S * 0.9
        stop._signalled("SIGTERM")
        assert stop.asked and not ended
        now += ONCE_S * 1.1
        stop._signalled("SIGTERM")
        assert ended == [1]

    asyncio.run(main())


def test_who_keeps_asking_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C that is held down comes thirty times a second.

    Found by review: each of them was taken for the one before it.
    """
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        stop = Stop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now)
        until = now + ONCE_S * 1.1
        while not ended:
            assert now < until
            stop._signalled("SIGINT")
            now += ONCE_S / 15

    asyncio.run(main())


def test_who_keeps_asking_is_heard_though_nobody_reads_what_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``2>&1 | tee log`` the first Ctrl-C ends tee too.

    Found by review: what is said of the second had no reader, and the process did not end.
    """
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    reader, writer = os.pipe()
    os.close(reader)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        stop = Stop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now)
        for _ in range(2):
            stop._signalled("SIGINT")
            now += ONCE_S * 1.1
        monkeypatch.undo()

    stderr = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    asyncio.run(main())
    with pytest.raises(BrokenPipeError):
        stderr.close()
    assert ended == [1]


def test_signals_are_for_the_process_that_started_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """``systemctl stop`` sends them to both, and that one stops the others in order.

    When that has happened, or it is gone, the first signal is not the second time of asking.
    """
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe()
        kept = os.dup(0)
        os.dup2(reader, 0)
        try:
            stop = Stop(with_parent=True)
            now = loop.time()
            monkeypatch.setattr(loop, "time", lambda: now)
            for _ in range(3):
                stop._signalled("SIGTERM")
                now += ONCE_S * 2
            assert not stop.asked and not ended
            monkeypatch.undo()
            monkeypatch.setattr(os, "_exit", ended.append)
            os.close(writer)
            await asyncio.wait_for(stop.wait(), 5.0)
            stop._signalled("SIGTERM")
            assert not ended
            monkeypatch.setattr("torus_actors.cli.daemon.ONCE_S", 0.0)
            stop._signalled("SIGTERM")
            assert ended == [1]
        finally:
            loop.remove_reader(0)
            os.dup2(kept, 0)
            os.close(kept)
            os.close(reader)

    asyncio.run(main())


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_stops_in_order(nohup: bool) -> None:
    """Unless it was to go on without it.

    Found by review: what a client of NBD had written and not flushed was lost with the terminal.
    """
    code = (
        "import asyncio, os, signal\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if nohup else 'SIG_DFL'})\n"
        "from torus_actors.cli.daemon import Stop\n"
        "async def main():\n"
        "    stop = Stop()\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    await asyncio.sleep(0.05)\n"
        "    print(stop.asked)\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, timeout=60, check=False, stdout=subprocess.PIPE
    )
    assert (done.returncode, done.stdout) == (0, b"%r\n" % (not nohup))


def test_a_daemon_opens_as_many_files_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the usual 1024, NBD clients alone could take all that the journal and peers need."""
    monkeypatch.setattr(daemon, "set_up_logging", lambda *_, **__: None)
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = 0

    async def work() -> None:
        nonlocal seen
        seen, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), most))
    try:
        daemon.run_daemon(Settings(), work())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    assert seen == most


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_closed_standard_streams_end_no_daemon(closed: tuple[int, ...]) -> None:
    """As by ``<&-``: libuv ends the process when it is to close a descriptor below 3."""
    code = (
        "import os\n"
        f"for number in {closed}: os.close(number)\n"
        "from torus_actors.cli import daemon\n"
        "from torus_actors.cli.common import Settings\n"
        "async def work():\n"
        "    await __import__('asyncio').sleep(0.01)\n"
        "daemon.run_daemon(Settings(), work())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=False)
    assert done.returncode == 0
