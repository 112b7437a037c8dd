"""Failures of the original that must not come back; docs/regressions.md lists all of them."""

from __future__ import annotations

import ast
import asyncio
import random
import re
from pathlib import Path

from tests.fakes import Cluster, Device, until, virtual
from tests.unit.test_volume_flush import BLOCK, reopened
from torus_actors.errors import TorusError

ROOT = Path(__file__).parents[2]

ISSUES = (
    "250", "230", "261", "317", "416", "401", "257", "132", "294", "120", "219", "246", "427",
    "267", "288", "290", "406", "447",
)  # fmt: skip
"""Of coreos/torus: what its users ran into."""

FOUND_BY_READING = 11
"""And what nobody had reported."""


@virtual
async def test_a_file_system_is_made_and_read_back_by_another() -> None:
    """Regression, coreos/torus#416: checksums did not match after mkfs.

    The pattern of it: discard all, zero the journal and the tables, write superblocks, bitmaps and
    descriptors of a few KiB in every group, some of them twice, flush. Whoever reads it then, from
    either copy, finds what was written, and every copy fits its checksum.
    """
    rng = random.Random(416)
    size = 64 * BLOCK
    async with Cluster(nodes=2, replication=2) as cluster:
        device = await cluster.volume(size, read_bytes=4 * BLOCK, write_bytes=8 * BLOCK)
        expected = bytearray(size)

        async def write(offset: int, data: bytes, fua: bool = False) -> None:
            await device.write(offset, data, fua=fua)
            expected[offset : offset + len(data)] = data

        for attempt in range(3):
            await device.trim(0, size)
            expected[:] = bytes(size)
            await device.zero(10 * BLOCK, 20 * BLOCK, no_hole=bool(attempt % 2))
            groups = range(0, size, 8 * BLOCK)
            for group in groups:
                await write(group + 1024, rng.randbytes(1024), fua=group == 0)
                for place in range(2, 7):
                    await write(group + place * 1024, rng.randbytes(rng.choice((512, 1024, 4096))))
                await write(group + BLOCK, rng.randbytes(2 * BLOCK))
            for group in groups:
                await write(group + 1024, rng.randbytes(1024))
                assert await device.read(group, BLOCK) == expected[group : group + BLOCK]
            await device.flush()
            assert await device.read(0, size) == expected
        await device.client.actor("volume:v").commit.remote(timeout_s=60.0)
        for survivor in (0, 1):
            other = cluster.node(1 - survivor)
            await other.crash()
            device = await reopened(device)
            assert await device.read(0, size) == expected
            await other.start()
        for node in cluster.nodes.values():
            for store in node.stores:
                for ref in store.refs_from(0, 1 << 20)[0]:
                    store.get(ref)  # raises where the content does not fit the checksum


@virtual
async def test_what_was_flushed_is_there_after_all_power_failed() -> None:
    """Regression, found by reading: a flush reaches no peer's disk.

    Here, right after the answer, all nodes lose their power, and the client is gone too: what the
    flush covered is read back, whole blocks and parts, by the journal and by a commit.
    """
    for journals in (False, True):
        async with Cluster(journals=journals) as cluster:
            device = await cluster.volume(8 * BLOCK)
            rng = random.Random(1)
            expected = bytearray(8 * BLOCK)
            for turn in range(3):
                for offset, length in ((0, 2 * BLOCK), (3 * BLOCK + 512, 1024), (5 * BLOCK, 512)):
                    expected[offset : offset + length] = data = rng.randbytes(length)
                    await device.write(offset, data)
                await device.flush()
                for node in cluster.nodes.values():
                    await node.crash()
                await device.client.crash()
                for node in cluster.nodes.values():
                    await node.start()
                device = await reopened_soon(cluster, device)
                assert await device.read(0, 8 * BLOCK) == expected, (journals, turn)


async def reopened_soon(cluster: Cluster, device: Device) -> Device:
    """The volume on another client, once the lease of the last one is over."""
    client = await cluster.client()
    async with asyncio.timeout(120):
        while True:
            try:
                return await client.open("v")
            except TorusError:
                await asyncio.sleep(0.5)


@virtual
async def test_overwriting_for_ever_fills_no_node() -> None:
    """Regression, found by reading: overwrites that are not collected end in EIO.

    Many times the room of the nodes is written over a small volume, as fast as it goes and without
    a pause for collectors. No write fails, and in the end there is room again.
    """
    async with Cluster(nodes=2, replication=2, blocks=48, collect_s=1.0) as cluster:
        device = await cluster.volume(16 * BLOCK, write_bytes=8 * BLOCK)
        for turn in range(40):
            for index in range(16):
                await device.write(index * BLOCK, bytes([turn + index]) * BLOCK)
            if turn % 5 == 0:
                await device.flush()
        await device.flush()
        assert await device.read(15 * BLOCK, BLOCK) == bytes([39 + 15]) * BLOCK
        await device.client.actor("volume:v").commit.remote(timeout_s=60.0)
        await until(lambda: all(len(node.refs()) == 16 for node in cluster.nodes.values()))


# -- the table -------------------------------------------------------------------------------------


def docstrings() -> dict[str, str]:
    """Of every test function, by ``file::name``."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(ROOT)}::{node.name}"
                found[name] = " ".join((ast.get_docstring(node) or "").split())
    return found


def test_each_failure_of_the_original_has_a_test_that_names_it() -> None:
    """The table in docs/regressions.md is complete, and right.

    Every issue and every item found by reading has a row; each row's tests exist, and say in their
    first words which failure they keep away.
    """
    text = (ROOT / "docs" / "regressions.md").read_text()
    row = r"^\| (coreos/torus#[\d, ]+|found by reading) \| (.+?) \| (.+?) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    known = docstrings()
    numbers: set[str] = set()
    for label, what, cell in rows:
        tests = re.findall(r"`(tests/\S+?::\w+)`", cell)
        assert tests, what
        for test in tests:
            assert test in known, f"there is no {test}"
            assert known[test].startswith(f"Regression, {label}: "), test
        numbers |= set(re.findall(r"\d+", label))
    assert numbers == set(ISSUES)
    assert sum(label == "found by reading" for label, _, _ in rows) == FOUND_BY_READING
