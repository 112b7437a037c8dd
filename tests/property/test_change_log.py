"""The journal's records against a model: replaying them gives what was there when they were cut."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import msgpack
import pytest

from torus_actors.errors import Corruption
from torus_actors.metadata.records import Head
from torus_actors.model.checksums import Buffer
from torus_actors.model.extents import MISSING, ExtentMap
from torus_actors.model.refs import BlockRef
from torus_actors.volume import change_log
from torus_actors.volume.change_log import (
    ChangeLog,
    LoggedBlock,
    LoggedExtent,
    Replay,
    read_record,
)
from torus_actors.volume.write_back import WriteBack

BLOCK = 64
BLOCKS = 4
ATOM = 8
"""A sector, so to speak."""


class Volume:
    """A tiny file: layers, a map of blocks, and the records of its journal."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.layers = WriteBack(1 << 20)
        self.stored: dict[BlockRef, bytes] = {}
        self.map: dict[int, BlockRef] = {}
        self.fresh: set[BlockRef] = set()
        """Blocks that no record and no head names: once overwritten, they are discarded."""
        self.records: dict[int, bytes] = {}
        self.durable = bytes(BLOCK * BLOCKS)
        self.since = [self.durable]
        """What was flushed last, and what the content was after each write since."""
        self.layers.log.start()
        self.last: list[tuple[int, bytes]] = []
        """Numbers and records of the last flush."""
        self.before: tuple[dict[int, bytes], list[bytes]] = ({}, self.since)
        """``records`` and ``since`` before it."""
        self._refs = 0

    def content(self) -> bytes:
        """What a reader sees now."""
        out = b""
        for index in range(BLOCKS):
            block = bytearray(self.stored.get(self.map.get(index, BlockRef()), bytes(BLOCK)))
            for at, length, buffer in self.layers.read(index, 0, BLOCK):
                if buffer is not MISSING:
                    block[at : at + length] = bytes(length) if buffer is None else buffer
            out += bytes(block)
        return out

    def write(self) -> None:
        """Write or zero a random range of a random block."""
        index = self.rng.randrange(BLOCKS)
        start = self.rng.randrange(BLOCK)
        length = self.rng.randint(1, BLOCK - start)
        if self.rng.random() < 0.2:
            self.layers.zero(index, start, length)
        else:
            self.layers.write(index, start, self.rng.randbytes(length))
        self.since.append(self.content())

    def freeze(self) -> None:
        """Begin to put a block on the ring."""
        ready = [i for i in self.layers.dirty if i not in self.layers.frozen]
        if ready:
            self.layers.freeze(self.rng.choice(ready))

    def settle(self) -> None:
        """A put succeeds: its content was fixed when it was frozen."""
        if not self.layers.frozen:
            return
        index = self.rng.choice(list(self.layers.frozen))
        layer: ExtentMap = self.layers.frozen[index]
        block = bytearray(self.stored.get(self.map.get(index, BlockRef()), bytes(BLOCK)))
        layer.overlay(block)
        below = self.map.get(index)
        if below in self.fresh:
            self.fresh.remove(below)
            del self.stored[below]
        if layer.is_all_zero and layer.is_full(BLOCK):
            self.map.pop(index, None)
            self.layers.settle(index, layer, None, 0)
            return
        self._refs += 1
        ref = BlockRef.of(1, 1, self._refs)
        self.stored[ref] = bytes(block)
        self.map[index] = ref
        self.fresh.add(ref)
        self.layers.settle(index, layer, ref, self._refs)

    def thaw(self) -> None:
        """A put fails."""
        if self.layers.frozen:
            self.layers.thaw(self.rng.choice(list(self.layers.frozen)))

    def flush(self) -> None:
        """Cut what was not told, into one record or into several."""
        self.before = (dict(self.records), self.since)
        self.fresh.difference_update(self.layers.log.refs())
        records = self.layers.log.cut()
        first = self.layers.log.seq - len(records) + 1
        self.last = [(first + i, b"".join(record)) for i, record in enumerate(records)]
        self.records.update(self.last)
        self.durable = self.content()
        self.since = [self.durable]

    def tear(self) -> bool:
        """Crash in the middle of the last flush; whether it had more than one record."""
        self.records, self.since = self.before
        self.since = [*self.since, self.durable]
        self.records.update(self.last[: self.rng.randrange(1, len(self.last) + 1) - 1])
        return len(self.last) > 1

    def commit(self) -> None:
        """Fold all that is there into a head that the journal keeps, and forget older records.

        Writes, puts and flushes go on meanwhile.
        """
        others = [self.write, self.freeze, self.settle, self.flush]
        covered = self.layers.log.seq
        left = set(self.layers.indexes())
        targets = {i: (self.layers.dirty.get(i), self.layers.frozen.get(i)) for i in left}
        while left:
            self.rng.choice(others)()
            for index in list(left):
                present = (self.layers.dirty.get(index), self.layers.frozen.get(index))
                if not any(now is not None and now in targets[index] for now in present):
                    left.discard(index)
                elif index not in self.layers.frozen:
                    self.layers.freeze(index)
        head = Head(
            inode=1, root=bytes(24), root_crc=0, size=0, epoch=1, journal_seq=covered,
            map_seq=self.layers.log.map_cut(), extra=msgpack.packb(list(self.map.items())),
        )  # fmt: skip
        self.fresh.clear()
        garbage = self.stored.keys() - self.map.values()
        for _ in range(self.rng.randrange(3)):
            self.rng.choice(others)()
        if self.rng.random() < 0.5:
            for ref in garbage:
                del self.stored[ref]
        record = b"".join(self.layers.log.cut_head(head))
        self.records[self.layers.log.seq] = record
        self.layers.log.in_head(covered, head.map_seq)
        if self.rng.random() < 0.7:
            self.records = {seq: each for seq, each in self.records.items() if seq > covered}

    def replayed(self) -> bytes:
        """What the records give over an empty head."""
        replay = Replay()
        for seq, record in self.records.items():
            replay.add(seq, record)
        blocks: dict[int, BlockRef] = {}
        if replay.head is not None:
            blocks = {i: BlockRef(ref) for i, ref in msgpack.unpackb(replay.head.extra)}
        for index, (ref, _, _) in replay.blocks.items():
            if ref is None:
                blocks.pop(index, None)
            else:
                blocks[index] = ref
        out = [
            bytearray(self.stored.get(blocks.get(i, BlockRef()), bytes(BLOCK)))
            for i in range(BLOCKS)
        ]
        for index, offset, length, buffer in replay.extents():
            out[index][offset : offset + length] = bytes(length) if buffer is None else buffer
        return b"".join(bytes(block) for block in out)


@pytest.fixture(params=[4 << 20, 90], ids=["one record", "several"], autouse=True)
def record_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much goes into a record: all there ever is, or so little that most flushes cut many."""
    monkeypatch.setattr(change_log, "RECORD_BYTES", request.param)
    monkeypatch.setattr(change_log, "RECORD_BLOCKS", 1 if request.param < 100 else 1000)
    monkeypatch.setattr(change_log, "ATOM_BYTES", ATOM)
    size: int = request.param
    return size


def run(seed: int, heads: bool = False) -> bool:
    """One random history; whether the replay after its last flush is right."""
    volume = Volume(random.Random(seed))
    steps = [volume.write] * 4 + [volume.freeze, volume.settle, volume.thaw, volume.flush]
    steps *= 3
    if heads:
        steps.append(volume.commit)
    for _ in range(volume.rng.randint(5, 60)):
        volume.rng.choice(steps)()
    # What came after the last record was cut is not in it; the blocks of later puts are no part
    # of what a replay sees, unless a head has them.
    replayed = volume.replayed()
    if not heads:
        return replayed == volume.durable
    allowed = zip(*volume.since, strict=True)
    return all(byte in each for byte, each in zip(replayed, allowed, strict=True))


def test_a_replay_gives_what_was_flushed() -> None:
    """Writes, failed and successful puts and flushes in any order: nothing flushed is lost."""
    for seed in range(800):
        assert run(seed), seed


def test_a_head_in_the_journal_stands_for_what_is_before_it() -> None:
    """The same with heads among the records, and the records that they cover cut or not."""
    for seed in range(800):
        assert run(seed, heads=True), seed


def atoms(content: bytes) -> list[bytes]:
    """The content in pieces that no crash may tear."""
    return [content[at : at + ATOM] for at in range(0, len(content), ATOM)]


def test_some_records_of_a_flush_are_some_of_its_writes(record_bytes: int) -> None:
    """A crash in the middle of a flush leaves each atom as flushed before, or as it was since."""
    torn = 0
    for seed in range(800):
        volume = Volume(random.Random(seed))
        steps = [volume.write] * 4 + [volume.freeze, volume.settle, volume.thaw, volume.flush]
        for _ in range(volume.rng.randint(5, 60)):
            volume.rng.choice(steps)()
        volume.flush()
        torn += volume.tear()
        allowed = zip(*map(atoms, volume.since), strict=True)
        replayed = atoms(volume.replayed())
        assert all(atom in each for atom, each in zip(replayed, allowed, strict=True)), seed
    assert torn > 250 or record_bytes > 1000


def test_a_record_has_its_bound(record_bytes: int) -> None:
    """Whatever the number and the size of the extents; and what fits in one record is one."""
    rng = random.Random(3)
    for size in range(1, 60):
        layers = WriteBack(1 << 20)
        layers.log.start()
        for _ in range(size):
            index, offset = rng.randrange(9), rng.randrange(1000)
            if rng.random() < 0.3:
                layers.zero(index, offset, rng.randrange(1, 300))
            else:
                layers.write(index, offset, bytes(rng.randrange(1, 300)))
        total = layers.log.extent_bytes
        records = layers.log.cut()
        assert (len(records) == 1) == (total <= record_bytes)
        assert layers.log.seq == len(records) and layers.log.empty
        for record in records:
            extents = read_record(b"".join(record))[1]
            data = sum(0 if buffer is None else length for _, _, length, buffer in extents)
            most = record_bytes + ATOM * (1 + change_log.PLACE_BYTES)
            assert data + change_log.PLACE_BYTES * len(extents) <= most


def test_a_record_names_so_many_blocks_and_no_more(record_bytes: int) -> None:
    """However many were put since the last one: what follows is told after them."""
    layers = WriteBack(1 << 20)
    layers.log.start()
    for index in range(50):
        layers.write(index, 0, b"put")
        layers.settle(index, layers.freeze(index), BlockRef.of(1, 1, index + 1), index)
        layers.write(index, 0, b"since")
    assert layers.log.fits_one_record == (record_bytes > 1000)
    records = layers.log.cut()
    replay = Replay()
    for seq, record in enumerate(records, 1):
        blocks, extents, _ = read_record(b"".join(record))
        assert len(blocks) <= change_log.RECORD_BLOCKS
        assert not extents or seq >= 50 // change_log.RECORD_BLOCKS
        replay.add(seq, b"".join(record))
    assert len(replay.blocks) == len(list(replay.extents())) == 50


def _head_covers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is taken to cover every record before it in the journal."""

    def add(self: Replay, seq: int, payload: Buffer) -> None:
        head = read_record(payload)[2]
        if head is not None:
            self.head = head
            self.blocks.clear()
            self._extents.clear()
        else:
            original(self, seq, payload)

    original = Replay.add
    monkeypatch.setattr(Replay, "add", add)


def _head_covers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What older records say is laid over a head that has it, or what came after it."""
    monkeypatch.setattr(Replay, "_go_on_from", lambda self, head: setattr(self, "head", head))


def _older_blocks_over_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that were cut while a head was made put their blocks over its newer ones."""
    original = Replay._go_on_from

    def go_on(self: Replay, head: Head) -> None:
        original(self, dataclasses.replace(head, map_seq=head.journal_seq))

    monkeypatch.setattr(Replay, "_go_on_from", go_on)


@pytest.mark.parametrize(
    "break_it", [_head_covers_all, _head_covers_nothing, _older_blocks_over_newer]
)
def test_the_model_finds_bugs_of_heads(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that takes too much or too little for covered fails some history."""
    break_it(monkeypatch)
    assert not all(run(seed, heads=True) for seed in range(800)), break_it.__doc__


def _keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block covers nothing of what older records say."""

    def read(payload: Buffer) -> tuple[list[LoggedBlock], list[LoggedExtent], Head | None]:
        blocks, extents, head = read_record(payload)
        return [(index, ref, root, 0) for index, ref, root, _ in blocks], extents, head

    monkeypatch.setattr(change_log, "read_record", read)


def _tell_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is in no record, though it has what no other record tells."""

    def settled(self: ChangeLog, index: int, ref: BlockRef | None, root: int) -> None:
        self._frozen.pop(index, None)

    monkeypatch.setattr(ChangeLog, "settled", settled)


def _lose_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being put on the ring is left out of records."""

    def froze(self: ChangeLog, index: int) -> None:
        self._extents.pop(index, None)

    monkeypatch.setattr(ChangeLog, "froze", froze)


@pytest.mark.parametrize("break_it", [_keep_all, _tell_no_block, _lose_frozen])
def test_the_model_finds_known_bugs(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the bugs that the order of records is there to avoid fails some history."""
    break_it(monkeypatch)
    assert not all(run(seed) for seed in range(800)), break_it.__doc__


def test_a_block_may_cover_fewer_records_than_there_are_before_it() -> None:
    """Journals have such records: extents that came after its content was fixed lie over it."""
    layers = WriteBack(1 << 20)
    layers.log.start()
    replay = Replay()
    for content in (b"in it", b"newer"):
        layers.write(0, 0, content)
        (record,) = layers.log.cut()
        replay.add(layers.log.seq, b"".join(record))
    packed = msgpack.packb([[[0, BlockRef.of(1, 1, 1), 7, 1]], [], None])
    replay.add(3, b"TJr1" + len(packed).to_bytes(4, "little") + packed)
    assert replay.blocks == {0: (BlockRef.of(1, 1, 1), 7, 3)}
    assert list(replay.extents()) == [(0, 0, 5, b"newer")]


def test_damaged_records_are_told() -> None:
    """Cut, changed or foreign bytes raise Corruption and nothing else."""
    rng = random.Random(7)
    volume = Volume(rng)
    for _ in range(20):
        volume.write()
        volume.freeze()
        volume.settle()
    volume.flush()
    record = next(iter(volume.records.values()))
    read_record(record)
    for size in range(len(record)):
        with pytest.raises(Corruption):
            read_record(record[:size])
    for junk in (b"", b"x" * 50, record + b"more", b"TJr1" + bytes(4)):
        with pytest.raises(Corruption):
            read_record(junk)
