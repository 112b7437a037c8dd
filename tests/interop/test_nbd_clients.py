"""The NBD server against other people's clients: libnbd, qemu, fio; TCP, unix sockets, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from torus_actors.nbd.connection import TlsSettings
from torus_actors.nbd.memory import MemoryDevice, MemoryExports
from torus_actors.nbd.requests import ExportInfo
from torus_actors.nbd.server import serve

MIB = 1 << 20
CLIENT_TIMEOUT_S = 60.0


def need(*programs: str) -> None:
    """Skip where a client is missing; fail instead where CI=true."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


async def client(*command: str, fails: bool = False) -> str:
    """Run a client beside the server; its standard output (or error, where it must fail)."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), CLIENT_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode != 0) is fails, f"{command}: {out!r} {err!r}"
    return (err if fails else out).decode()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine on uvloop, the loop that production uses."""

    async def main() -> None:
        await test()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextlib.asynccontextmanager
async def served(
    exports: MemoryExports, folder: Path, tls: TlsSettings | None = None, tcp: bool = False
) -> AsyncIterator[str]:
    """A server, on a unix socket if not told otherwise; the URI of its default export."""
    path = str(folder / "nbd.sock")
    if tcp:
        listener = await serve(exports, host="127.0.0.1", tls=tls)
    else:
        listener = await serve(exports, path=path, tls=tls)
    try:
        yield f"nbd://{listener.address}" if tcp else f"nbd+unix:///?socket={path}"
    finally:
        await listener.close()
    assert exports.opened == dict.fromkeys(exports.opened, 0)
    assert not listener.state.open_names


def image(folder: Path, size: int, seed: int = 1) -> Path:
    """A file that is part data and part holes."""
    rng = random.Random(seed)
    path = folder / f"image{seed}"
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(10):
            file.seek(rng.randrange(size - 300_000) & ~511)
            file.write(rng.randbytes(rng.randrange(1, 300_000)))
    return path


def test_nbdinfo(tmp_path: Path) -> None:
    """Everything an export promises is what nbdinfo sees; --list shows all exports."""
    need("nbdinfo")

    async def body() -> None:
        exports = MemoryExports(
            {
                "first": (ExportInfo("first", 10 * MIB, "a disk"), MemoryDevice(10 * MIB)),
                "ro": (ExportInfo("ro", 513, "", True), MemoryDevice(513)),
            }
        )
        async with served(exports, tmp_path) as uri:
            (export,) = json.loads(await client("nbdinfo", "--json", uri))["exports"]
            assert export["export-name"] == "first"
            assert export["description"] == "a disk"
            assert export["export-size"] == 10 * MIB
            assert export["contexts"] == ["base:allocation"]
            for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim"):
                assert export[f"can_{ability}"] is True, ability
            assert export["is_read_only"] is False
            assert export["block_size_minimum"] == 1
            assert export["block_size_preferred"] == 4096
            assert export["block_size_maximum"] == 32 * MIB
            listed = json.loads(await client("nbdinfo", "--list", "--json", uri))
            assert [e["export-name"] for e in listed["exports"]] == ["first", "ro"]
            read_only = uri.replace("///", "///ro")
            assert await client("nbdinfo", "--size", read_only) == "513\n"
            await client("nbdinfo", "--is", "read-only", read_only)
            error = await client("nbdinfo", uri.replace("///", "///nope"), fails=True)
            assert "No such file or directory for export: nope" in error

    run(body)


def test_nbdinfo_map(tmp_path: Path) -> None:
    """The allocation map follows writes, trims and zeroes made by qemu-io."""
    need("nbdinfo", "qemu-io")

    async def body() -> None:
        async with served(MemoryExports.single(MIB), tmp_path) as uri:
            script = ["write -P 5 64k 128k", "write -z -u 64k 64k", "write -z 512k 64k"]
            script += ["discard 0 64k", "flush", "read -P 5 128k 64k", "read -P 0 0 128k"]
            args = [part for line in script for part in ("-c", line)]
            await client("qemu-io", "-f", "raw", "-t", "writeback", "-d", "unmap", *args, uri)
            extents = json.loads(await client("nbdinfo", "--map", "--json", uri))
            assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
                (0, 128 << 10, 3),
                (128 << 10, 64 << 10, 0),
                (192 << 10, 320 << 10, 3),
                (512 << 10, 64 << 10, 0),
                (576 << 10, 448 << 10, 3),
            ]

    run(body)


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("extra", [(), ("--request-size=4096",), ("--synchronous",)])
def test_nbdcopy_both_ways(tmp_path: Path, tcp: bool, extra: tuple[str, ...]) -> None:
    """A sparse file copied in over several connections comes out the same."""
    need("nbdcopy")

    async def body() -> None:
        size = 20 * MIB + 512
        source, target = image(tmp_path, size), tmp_path / "out"
        exports = MemoryExports.single(size)
        async with served(exports, tmp_path, tcp=tcp) as uri:
            await client("nbdcopy", *extra, "--flush", str(source), uri)
            device = exports.exports["memory"][1]
            assert isinstance(device, MemoryDevice)
            assert device.flushes
            assert device.data == source.read_bytes()
            await client("nbdcopy", *extra, uri, str(target))
            assert target.read_bytes() == source.read_bytes()

    run(body)


def test_qemu_img(tmp_path: Path) -> None:
    """Convert in, compare, convert out, and info agree with the file."""
    need("qemu-img")

    async def body() -> None:
        source, target = image(tmp_path, 8 * MIB, seed=2), tmp_path / "out"
        raw = ("-f", "raw")
        async with served(MemoryExports.single(8 * MIB), tmp_path) as uri:
            await client("qemu-img", "convert", "-n", *raw, "-O", "raw", str(source), uri)
            await client("qemu-img", "compare", *raw, "-F", "raw", str(source), uri)
            await client("qemu-img", "convert", *raw, "-O", "raw", uri, str(target))
            assert target.read_bytes() == source.read_bytes()
            info = json.loads(await client("qemu-img", "info", *raw, "--output=json", uri))
            assert info["virtual-size"] == 8 * MIB

    run(body)


def test_qemu_io_errors(tmp_path: Path) -> None:
    """A read-only export cannot be opened for writing, and can be read."""
    need("qemu-io")

    async def body() -> None:
        async with served(MemoryExports.single(MIB, read_only=True), tmp_path) as uri:
            await client("qemu-io", "-f", "raw", "-c", "write 0 4k", uri, fails=True)
            await client("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri)

    run(body)


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("block", ["512", "4k", "60k-300k"])
def test_fio_verifies(tmp_path: Path, tcp: bool, block: str) -> None:
    """Random reads and writes of several jobs at depth 16, checked by CRC."""
    need("fio")

    async def body() -> None:
        exports = MemoryExports.single(32 * MIB)
        async with served(exports, tmp_path, tcp=tcp) as uri:
            sizes = f"--bsrange={block}" if "-" in block else f"--bs={block}"
            await client(
                "fio",
                "--name=verify",
                "--ioengine=nbd",
                f"--uri={uri}",
                "--rw=randrw",
                sizes,
                "--iodepth=16",
                "--numjobs=2",
                "--size=8m",
                "--offset_increment=16m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--io_size=4m",
                "--randseed=7",
                f"--aux-path={tmp_path}",
            )

    run(body)


def certificates(folder: Path) -> None:
    """A certificate authority and a server certificate, under the names that libnbd expects."""
    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    openssl(
        *("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem"),
        *("-subj", "/CN=test authority", "-addext", "keyUsage=keyCertSign"),
    )
    openssl(
        "req", *key, "-keyout", "server-key.pem", "-out", "server.csr", "-subj", "/CN=localhost"
    )
    (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
        *("-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", "server-cert.pem"),
    )


@pytest.mark.parametrize("required", [True, False])
def test_tls(tmp_path: Path, required: bool) -> None:
    """nbds:// works for nbdinfo and nbdcopy; plain nbd:// only where TLS is not required."""
    need("nbdinfo", "nbdcopy", "openssl")
    other = tmp_path / "other"
    other.mkdir()
    certificates(tmp_path)
    certificates(other)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")

    async def body() -> None:
        size = 20 * MIB
        source, target = image(tmp_path, size, seed=3), tmp_path / "out"
        exports = MemoryExports.single(size)
        settings = TlsSettings(context, required=required)
        async with served(exports, tmp_path, settings, tcp=True) as plain:
            port = plain.rpartition(":")[2]
            secure = f"nbds://localhost:{port}?tls-certificates={tmp_path}"
            info = json.loads(await client("nbdinfo", "--json", secure))
            assert info["TLS"] is True
            assert info["exports"][0]["can_df"] is True
            await client("nbdcopy", str(source), secure)
            await client("nbdcopy", secure, str(target))
            assert target.read_bytes() == source.read_bytes()
            if required:
                await client("nbdinfo", plain, fails=True)
            else:
                assert json.loads(await client("nbdinfo", "--json", plain))["TLS"] is False
            # A client that does not trust the certificate gives up; the server goes on.
            distrusting = f"nbds://localhost:{port}?tls-certificates={other}"
            await client("nbdinfo", distrusting, fails=True)
            await client("nbdinfo", secure)

    run(body)
