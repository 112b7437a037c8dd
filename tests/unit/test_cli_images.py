"""``torusctl block load`` and ``dump`` with files and pipes, on a cluster in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import Cluster, virtual
from torus_actors.actors.volumes import REPLAY_COMMIT_S
from torus_actors.cli import full, images
from torus_actors.cli.common import Settings
from torus_actors.errors import BlockUnavailable, Invalid
from torus_actors.runtime import ActorSystem, ChildSpec, LoopActor, SupervisorSpec, expose
from torus_actors.volume.recovery import RECOVER_PATIENCE_S

SIZE = 1 << 20


def run(
    monkeypatch: pytest.MonkeyPatch, test: Callable[[Cluster], Coroutine[Any, Any, None]]
) -> None:
    """Run a test on a cluster with a volume ``v`` of zeros, in real time: pipes have no other."""

    async def main() -> None:
        async with asyncio.timeout(30), Cluster() as cluster:

            @contextlib.asynccontextmanager
            async def full_client(
                settings: Settings, volume: str, read_only: bool = False
            ) -> AsyncIterator[Any]:
                client = await cluster.client()
                try:
                    await client.actor("volumes").open.remote(volume)
                    yield client
                finally:
                    await client.stop()

            @contextlib.asynccontextmanager
            async def connect(settings: Settings) -> AsyncIterator[Any]:
                class Connection:
                    meta = cluster.meta

                    @staticmethod
                    async def patiently(ask: Any, *args: Any) -> Any:
                        return await ask(*args)

                yield Connection

            monkeypatch.setattr(images, "full_client", full_client)
            monkeypatch.setattr("torus_actors.cli.connect.connect", connect)
            await cluster.meta.create_volume("v", SIZE)
            await test(cluster)

    asyncio.run(main())


async def load(file: Path | int, name: str = "v", **options: Any) -> int:
    """Load a file, or what comes out of a pipe, into a volume."""
    path = Path(f"/dev/fd/{file}") if isinstance(file, int) else file
    options = {"create": False, "size": None, **options}
    return await images.load(Settings(), name, path, **options)


async def dump(file: Path | int) -> int:
    """Dump ``v`` into a file or pipe."""
    return await images.dump(
        Settings(), "v", Path(f"/dev/fd/{file}") if isinstance(file, int) else file
    )


async def turns_until(done: asyncio.Future[Any], turns: int = 20) -> None:
    """See the loop turn; it is not done meanwhile."""
    for _ in range(turns):
        await asyncio.sleep(0.01)
        assert not done.done(), done


def test_a_slow_pipe_does_not_stop_the_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither one that is read nor one that is written: the heartbeat must go on."""

    async def test(cluster: Cluster) -> None:
        source, sink = os.pipe()
        loading = asyncio.ensure_future(load(source))
        await turns_until(loading)
        os.write(sink, b"a" * 5000)
        await turns_until(loading)
        os.write(sink, b"b" * 5000)
        os.close(sink)
        assert await loading == 10_000
        os.close(source)

        source, sink = os.pipe()
        dumping = asyncio.ensure_future(dump(sink))
        await turns_until(dumping)
        os.close(sink)
        received = await asyncio.to_thread(Path(f"/dev/fd/{source}").read_bytes)
        await dumping
        os.close(source)
        assert received == b"a" * 5000 + b"b" * 5000 + bytes(SIZE - 10_000)
        await dump(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == received

    run(monkeypatch, test)


def test_whoever_waits_for_a_pipe_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody ever writes into it; and the exit waits for no thread."""

    async def test(cluster: Cluster) -> None:
        source, sink = os.pipe()
        before = threading.enumerate()
        loading = asyncio.ensure_future(load(source))
        await turns_until(loading)
        loading.cancel()
        await asyncio.wait([loading], timeout=5)
        assert loading.cancelled()
        assert all(each.daemon for each in threading.enumerate() if each not in before)
        os.close(sink)
        os.close(source)

    run(monkeypatch, test)


def test_what_fails_beside_the_loop_fails_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing file, a full disk."""

    async def test(cluster: Cluster) -> None:
        with pytest.raises(FileNotFoundError):
            await load(tmp_path / "none")
        (tmp_path / "some").write_bytes(b"x")
        await load(tmp_path / "some")
        with pytest.raises(OSError, match="No space"):
            await dump(Path("/dev/full"))
        with pytest.raises(OSError, match="Invalid argument: '/proc/self/mem'"):
            await load(Path("/proc/self/mem"))  # looks like a file, and has no end

    run(monkeypatch, test)


def test_nothing_is_loaded_from_what_is_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pipe whose feeder has failed, or an empty file, must not empty a volume; zeros may."""

    async def test(cluster: Cluster) -> None:
        full, empty = tmp_path / "full", tmp_path / "empty"
        full.write_bytes(b"x" * SIZE)
        empty.touch()
        await load(full)
        source, sink = os.pipe()
        os.close(sink)
        for nothing in (source, empty, Path("/dev/null")):
            with pytest.raises(Invalid, match="is empty: nothing was changed"):
                await load(nothing)
        os.close(source)
        with pytest.raises(Invalid, match="/dev/zero has more than the 1 MiB of volume v"):
            await load(Path("/dev/zero"))
        await dump(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"x" * SIZE
        os.truncate(empty, 4096)
        assert await load(empty) == 0
        await dump(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == bytes(SIZE)

    run(monkeypatch, test)


def test_a_dump_replaces_a_file_once_something_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one is not lost because the volume cannot be read; of a longer one nothing stays."""
    file = tmp_path / "image"
    file.write_bytes(b"old" * SIZE)

    async def test(cluster: Cluster) -> None:
        async def unreadable(*_: Any) -> bool:
            raise BlockUnavailable("no copy")

        with monkeypatch.context() as patch:
            patch.setattr(images, "_has_data", unreadable)
            with pytest.raises(BlockUnavailable):
                await dump(file)
        assert file.read_bytes() == b"old" * SIZE
        assert await dump(file) == 0
        assert file.read_bytes() == bytes(SIZE)

    run(monkeypatch, test)


def test_a_volume_that_exists_keeps_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another one that is asked for is refused; a new volume has that one, or the file's."""

    async def test(cluster: Cluster) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"x" * 4096)
        with pytest.raises(Invalid, match=f"has {SIZE} bytes, not 8192"):
            await load(file, create=True, size=8192)
        await load(file, create=True, size=SIZE)
        await load(file, create=True)
        await load(file, "sized", create=True, size=8192)
        await load(file, "unsized", create=True)
        assert [each.size for each in await cluster.meta.volumes()] == [SIZE, 8192, 4096]
        with pytest.raises(Invalid, match="has 4096 bytes, and volume small only 2048"):
            await load(file, "small", create=True, size=2048)
        assert len(await cluster.meta.volumes()) == 3, "one was made that this file does not fit"
        source, sink = os.pipe()
        os.write(sink, b"x")
        os.close(sink)
        with pytest.raises(Invalid, match="give --size"):
            await load(source, "none", create=True)
        os.close(source)

    run(monkeypatch, test)


@virtual
async def test_a_volume_may_take_its_time_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of its journal is silent, and what that has is committed by slow nodes first."""

    class Slow(LoopActor):
        @expose()
        async def open(self, name: str) -> None:
            """What ``Volumes`` waits for at most."""
            await asyncio.sleep(RECOVER_PATIENCE_S + REPLAY_COMMIT_S)

    system = ActorSystem(asyncio.get_running_loop(), node_id="n")
    await system.start(SupervisorSpec("root", (ChildSpec("volumes", Slow),)))

    async def start_client(config: Any, patience_s: float) -> Any:
        return SimpleNamespace(system=system, stop=system.stop)

    monkeypatch.setattr(full, "start_client", start_client)
    async with full.full_client(Settings(metadata="torus://127.0.0.1:1"), "v"):
        pass


def test_a_file_that_becomes_shorter_while_it_is_loaded_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is missing of it are not the zeros of a sparse file: somebody is writing it anew."""

    async def test(cluster: Cluster) -> None:
        for left, chunks in ((0, 1), (SIZE // 2, 1)):
            path = tmp_path / "image"
            path.write_bytes(b"x" * SIZE)
            pread, reads = os.pread, 0

            def shortening(fd: int, size: int, offset: int) -> bytes:
                nonlocal reads
                reads += 1
                if reads > chunks:  # noqa: B023 - used up before the next turn
                    os.truncate(path, left)  # noqa: B023
                return pread(fd, size, offset)  # noqa: B023

            with monkeypatch.context() as patch:
                patch.setattr(os, "pread", shortening)
                patch.setattr(images, "CHUNK", SIZE // 8)
                with pytest.raises(Invalid, match="became shorter"):
                    await load(path)

    run(monkeypatch, test)


@pytest.mark.parametrize("hole", [0, 1 << 20])
def test_what_is_appended_while_a_file_is_loaded_is_left_out(hole: int, tmp_path: Path) -> None:
    """It is a file that grows, a download say. It was said to have become shorter."""
    path, data = tmp_path / "image", b"x" * 10_000
    path.write_bytes(data)
    os.truncate(path, len(data) + hole)
    fd = os.open(path, os.O_RDONLY)
    length = images._length_of(fd)
    with path.open("ab") as file:
        file.write(b"y" * (3 << 20))
    assert length == len(data) + hole
    found = list(images._chunks(fd, length))
    os.close(fd)
    assert b"".join(piece for _, piece in found).rstrip(b"\0") == data
    assert all(at + len(piece) <= length for at, piece in found)


def test_of_a_file_that_was_read_in_part_the_rest_is_loaded(tmp_path: Path) -> None:
    """As ``{ head -c 4096; torusctl block load v -; } < FILE`` asks for."""
    path = tmp_path / "image"
    path.write_bytes(b"H" * 4096 + b"B" * 8192)
    fd = os.open(path, os.O_RDONLY)
    assert images._length_of(fd) == 12288
    os.read(fd, 4096)
    assert images._length_of(fd) is None
    assert list(images._chunks(fd, None)) == [(0, b"B" * 8192)]
    os.close(fd)
