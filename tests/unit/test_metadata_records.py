"""Records, the key table, URLs, backoff, and the clock of the store in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import uuid
from pathlib import Path

import pytest

from torus_actors.errors import Corruption, Invalid, LeaseNotFound, NotSupported
from torus_actors.metadata import keys, opening, records
from torus_actors.metadata.base import when
from torus_actors.metadata.kv import Delete, KeyValueStore, Put, prefix_end
from torus_actors.metadata.memory import MemoryStore
from torus_actors.metadata.patience import Backoff
from torus_actors.metadata.service import MetadataService

PEER = str(uuid.UUID(int=1))

RECORDS = [
    records.GlobalMetadata(512 << 10, "crc,base", 2, PEER, 1.5),
    records.RingRecord(3, bytes(range(256))),
    records.PeerInfo(PEER, "[::1]:40000", "rack 1", 1 << 40, "0.1.0", 7),
    records.Counter((1 << 64) - 1),
    records.VolumeRecord(1 << 39, "demo-1.x_y", "block", 1 << 63, 1.5, "n"),
    records.VolumeName(3),
    records.Head((1 << 64) - 1, bytes(range(24)), 0xFFFF_FFFF, 0, 3, b"\0"),
    records.Epoch(1 << 40),
    records.Lock("höst pid 1", 3, 1.5, "n"),
    records.Journal(3, (PEER,), b"\xff"),
    records.Snapshot(3, "monday", b"", 1.5, "n"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_back_as_it_was(record: records.Record) -> None:
    """decode(encode(x)) == x, equal records have equal bytes, and the bytes are JSON."""
    data = record.encode()
    assert type(record).decode(data) == record
    assert dataclasses.replace(record).encode() == data
    assert isinstance(json.loads(data), dict)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_no_record_is_corruption(record: records.Record) -> None:
    """Damage, another type, a missing field: Corruption and never a wrong record."""
    data = record.encode()
    plain = json.loads(data)
    wrong: list[object] = [None, [], 7, {}]
    wrong += [{**plain, name: [{}]} for name in plain]
    wrong += [{**plain, name: None} for name in plain]
    deep = b"[" * 100_000, b'{"a":' * 100_000
    for broken in (b"", data[:-1], b"\xff", *deep, *(json.dumps(each).encode() for each in wrong)):
        with pytest.raises(Corruption):
            type(record).decode(broken)


@pytest.mark.parametrize("since", ["1" + "0" * 400, "NaN", "Infinity", "1e12", "-1"])
def test_a_time_that_no_clock_shows_is_corruption(since: str) -> None:
    """Whoever tells a person of it need not look out for that.

    Found by review: a lock with such a time ended whoever told of the lock, with a traceback.
    """
    with pytest.raises(Corruption):
        records.Lock.decode(b'{"holder":"h","epoch":3,"since":%s}' % since.encode())
    last = records.Lock.decode(b'{"holder":"h","epoch":3,"since":253402300799}').since
    assert when(last) == "9999-12-31T23:59:59Z"


def test_an_unknown_field_is_ignored_and_a_new_one_has_a_default() -> None:
    """Versions can be mixed during an upgrade."""
    later = json.dumps({"holder": "h", "epoch": 3, "colour": "red"}).encode()
    assert records.Lock.decode(later) == records.Lock("h", 3, 0.0, "")


@pytest.mark.parametrize(
    "build",
    [
        lambda: records.PeerInfo("not-a-uuid", "h:1"),
        lambda: records.PeerInfo(PEER.upper().replace("0", "A"), "h:1"),
        lambda: records.PeerInfo(PEER, "h"),
        lambda: records.PeerInfo(PEER, ":1"),
        lambda: records.PeerInfo(PEER, "h:0"),
        lambda: records.PeerInfo(PEER, "h:65536"),
        lambda: records.GlobalMetadata(0, "base", 1, PEER),
        lambda: records.GlobalMetadata(1, "base", 0, PEER),
        lambda: records.VolumeRecord(1 << 40, "a", "block", 1),
        lambda: records.Head(1, bytes(24), 0, 0, 0, bytes(records.EXTRA_BYTES_MAX + 1)),
        lambda: records.Journal(1, ("x",)),
        lambda: records.Journal(1, (), bytes(records.EXTRA_BYTES_MAX + 1)),
    ],
)
def test_a_record_that_breaks_a_rule_cannot_be_made(build: object) -> None:
    """Records are checked where they are made, so that a stored one is sound."""
    assert callable(build)
    with pytest.raises(Invalid):
        build()


def test_every_key_is_in_the_table() -> None:
    """Each key that Keys can build belongs to exactly the row it was built for."""
    made = keys.Keys("p/")
    samples = {
        keys.GLOBAL: made.global_,
        keys.RING: made.ring,
        keys.VOLUME_COUNTER: made.volume_counter,
        keys.PEER: made.peer(PEER),
        keys.NAME: made.name("demo-1.x_y"),
        keys.SNAPSHOT: made.snapshot(7, "monday"),
        keys.SNAPSHOT_REQUEST: made.snapshot_request(7, "monday"),
        keys.READER: made.reader(7, PEER),
    }
    for row in (
        keys.VOLUME, keys.MINT, keys.HEAD, keys.EPOCH, keys.LOCK, keys.JOURNAL, keys.DELETED
    ):  # fmt: skip
        samples[row] = made.of(row, (1 << 40) - 1)
    assert set(samples) == set(keys.TABLE)
    for row, key in samples.items():
        assert made.row_of(key) is row
        assert key.startswith(made.under(row)) or "/" not in row.pattern
    ids = "p/heads/1", "p/heads/000000000G", "p/epochs/00000000001", "p/snapshots/1/monday"
    for foreign in ("q/global", "p/globals", "p/heads", "p/heads/", "p/heads/1/2", "p/", *ids):
        assert made.row_of(foreign) is None


def test_keys_of_one_volume_are_no_prefix_of_anothers() -> None:
    """Ids have a fixed width: deleting the snapshots of volume 1 leaves those of 0x10 alone."""
    made = keys.Keys()
    assert not made.snapshots(0x10).startswith(made.snapshots(0x1))
    assert made.of(keys.HEAD, 9) < made.of(keys.HEAD, 10) < made.of(keys.HEAD, 1 << 39)


def test_the_documentation_shows_the_table() -> None:
    """The table in docs/metadata.md is the one in keys.py, word for word."""
    text = (Path(__file__).parents[2] / "docs" / "metadata.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert rows == [
        (
            row.pattern,
            row.record.__name__,
            row.writer,
            "yes" if row.leased else "no",
            row.meaning,
        )
        for row in keys.TABLE
    ]


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"", None), (b"a", b"b"), (b"a/", b"a0"), (b"a\xff", b"b"), (b"\xff\xff", None)],
)
def test_the_end_of_a_prefix_is_the_next_key_behind_it(prefix: bytes, end: bytes | None) -> None:
    """No key with the prefix is at or behind it."""
    assert prefix_end(prefix) == end


@pytest.mark.parametrize(
    "url",
    [
        "",
        "etcd",
        "etcd:",
        "etcd://",
        "etcd://host",
        "etcd://host:",
        "etcd://:1",
        "etcd://host:0",
        "etcd://host:65536",
        "etcd://host:1,",
        "etcd://host:1/path",
        "etcd://u@host:1",
        "etcd:host:1",
        "http://host:1",
        "memory:",
        "memory://x",
        "sqlite:",
        "127.0.0.1:2379",
    ],
)
def test_a_bad_url_is_refused_in_one_plain_line(url: str) -> None:
    """The text shows the mistake and what would be right."""
    with pytest.raises(Invalid) as caught:
        asyncio.run(opening.open_metadata(url))
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 10


def test_urls_open_their_backend(tmp_path: Path) -> None:
    """memory, sqlite and etcd open; torus needs an opener, which can be registered."""

    async def test() -> None:
        for url in ("memory://", f"sqlite:{tmp_path / 'm.sqlite'}", "etcd://[::1]:1,h:2"):
            service = await opening.open_metadata(url)
            assert isinstance(service, MetadataService)
            await service.close()
        with pytest.raises(NotSupported):
            await opening.open_metadata("torus://h:1")

        asked: list[str] = []

        async def open_torus(rest: str) -> KeyValueStore:
            asked.append(rest)
            return MemoryStore()

        schemes = {**opening.SCHEMES, "torus": open_torus}
        service = await opening.open_metadata("torus://h:1", schemes=schemes)
        await service.close()
        assert asked == ["h:1"]

    asyncio.run(test())


def test_backoff_grows_is_jittered_and_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits double up to the cap, are between half and all of it, and start again after a reset."""
    waits: list[float] = []

    async def remembered(delay: float) -> None:
        waits.append(delay)

    monkeypatch.setattr(asyncio, "sleep", remembered)

    async def test() -> None:
        backoff = Backoff(random.Random(1), first_s=1.0, max_s=5.0)
        for _ in range(5):
            assert await backoff.wait()
        backoff.reset()
        assert await backoff.wait()
        assert not await backoff.wait(until=asyncio.get_running_loop().time())

    asyncio.run(test())
    for wait, full in zip(waits, [1, 2, 4, 5, 5, 1], strict=True):
        assert full / 2 <= wait <= full
    assert len(set(waits)) == len(waits)


def test_reading_a_large_state_holds_up_nobody() -> None:
    """Its records are decoded a few at a time.

    Found by review: with 60,000 volumes that had once been deleted, every node stood still for a
    second and a half, and so was lost to its peers, three times a minute.
    """

    async def test() -> None:
        store = MemoryStore()
        service = MetadataService(store, rng=random.Random(1))
        for number in range(1, 3001):
            record = records.VolumeRecord(number, "v", "block", 1)
            await store.txn([], [Put(service.keys.of(keys.DELETED, number), record.encode())])
        reading = asyncio.ensure_future(service.state())
        turns = 0
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        assert len((await reading).deleted) == 3000
        assert turns > 3000 / 300

    asyncio.run(test())


def test_the_marker_of_a_deleted_volume_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each collector's pass reads all that there ever were: 80,000 took seconds of each node.

    What is under a key that only looks like that of a known one is read, and not understood.
    """
    decoded: list[str] = []
    decode = records.VolumeRecord.decode

    def counted(data: bytes, key: str = "") -> records.VolumeRecord:
        decoded.append(key)
        return decode(data, key)

    monkeypatch.setattr(records.VolumeRecord, "decode", counted)

    async def test() -> None:
        store = MemoryStore()
        service = MetadataService(store, rng=random.Random(1))
        under = service.keys.under(keys.DELETED)
        for numbers in ([1, 5], [1, 2, 5, 0xAB]):
            for number in numbers:
                record = records.VolumeRecord(number, "v", "block", 1)
                await store.txn([], [Put(service.keys.of(keys.DELETED, number), record.encode())])
            assert (await service.state()).deleted == set(numbers)
        assert decoded == [service.keys.of(keys.DELETED, each) for each in (1, 5, 2, 0xAB)]
        for bad in ("0x00000005", "00000000AB", "5", " 000000005", "0000_00005"):
            await store.txn([], [Put(under + bad, b"")])
            with pytest.raises(Corruption, match=bad):
                await service.state()
            await store.txn([], [Delete(under + bad)])
        await store.txn([], [Put(service.keys.of(keys.DELETED, 7), b"")])
        for _ in range(2):
            with pytest.raises(Corruption):
                await service.state()

    asyncio.run(test())


def test_leases_in_memory_follow_the_injected_clock() -> None:
    """A lease lives exactly its TTL after the last renewal, by the store's own clock."""

    async def test() -> None:
        now = 50.0
        store = MemoryStore(clock=lambda: now)
        lease = await store.lease_grant(10)
        await store.txn([], [Put("a", b"", lease)])
        now += 9.5
        assert await store.lease_keepalive(lease) == 10
        now += 9.5
        assert await store.get("a") is not None
        now += 0.5
        assert await store.get("a") is None
        with pytest.raises(LeaseNotFound):
            await store.lease_keepalive(lease)
        await store.close()

    asyncio.run(test())


def test_one_seed_gives_one_run() -> None:
    """The service draws all its randomness from the injected source."""

    async def volumes() -> list[records.VolumeRecord]:
        service = MetadataService(MemoryStore(), rng=random.Random(9), wall_clock=lambda: 1.0)
        await service.init(records.GlobalMetadata(4096, "base", 1, PEER), b"")
        made = [await service.create_volume(name, 1) for name in ("a", "b")]
        await service.close()
        return made

    first, second = asyncio.run(volumes()), asyncio.run(volumes())
    assert first == second and first[0].nonce != first[1].nonce
