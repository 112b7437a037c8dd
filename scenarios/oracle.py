"""What may be read: the judge of a simulated volume.

For each sector of 512 bytes it keeps the last durable value and every later one that somebody tried
to write. The rules:

- A client reads what it wrote last. After a write that failed or was not answered, either value;
  but not the old one any more once the new one was read.
- An acknowledged flush makes durable what was acknowledged when the flush was asked for.
- After a crash, the next client reads, for each sector, the durable value or any later one: what it
  reads is the truth from then on.
- Once a volume was opened anew, nothing that the earlier client writes may ever be seen, and none
  of its flushes may succeed for what was not there when the volume was opened.
- What was cut off a volume is gone: should it grow again, there are zeros. Nothing else is gone.
- A volume that went back to a snapshot has what that had, and nothing that came later.
- Who only reads has the volume of one moment of the time in which it was opened: see `Reading`.

Every write fills each of its sectors with a stamp of its own (volume, sector, sequence number), so
that a sector says which write it is from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

SECTOR = 512

_STAMP = struct.Struct("<QQQQ")
_MAGIC = 0x746F7275735F7631
_REPEAT = SECTOR // _STAMP.size
ZEROS = bytes(SECTOR)


def stamp(volume: int, sector: int, sequence: int) -> bytes:
    """The content of one sector; a sequence number that is 0 or less is zeros."""
    if sequence <= 0:
        return ZEROS
    return _STAMP.pack(_MAGIC, volume, sector, sequence) * _REPEAT


def describe(content: bytes) -> str:
    """What a sector seems to be, for people."""
    if content == ZEROS:
        return "zeros"
    magic, volume, sector, sequence = _STAMP.unpack_from(content)
    if magic != _MAGIC:
        return f"garbage ({content[:16].hex()}...)"
    whole = "" if content == stamp(volume, sector, sequence) else ", torn"
    return f"write {sequence} of sector {sector} of volume {volume}{whole}"


def sequence_of(content: bytes) -> int:
    """The number of the write that a whole sector is from; 0 for zeros."""
    return 0 if content == ZEROS else int(_STAMP.unpack_from(content)[3])


class Write:
    """One write under way: made by `Session.begin_write`."""

    __slots__ = ("data", "first", "last", "offset", "sequence")

    def __init__(self, offset: int, first: int, last: int, sequence: int, data: bytes) -> None:
        self.offset = offset
        self.first = first
        self.last = last
        self.sequence = sequence
        self.data = data


class Flush:
    """One flush under way: the sectors it covers and what they held.

    ``doomed``: it covers writes of a client that had been fenced before, and must fail.
    """

    __slots__ = ("covered", "doomed")

    def __init__(self, covered: dict[int, int], doomed: bool) -> None:
        self.covered = covered
        self.doomed = doomed


class Taking:
    """A snapshot that is being made: what may be in it.

    Attributes:
        crossed: another client has opened the volume meanwhile, or had, and not read all of it yet:
            nobody knew then what it had found of what was not flushed.
        begun_at, acked_at: places, in the order of all events, of the writes of this time.
    """

    def __init__(self, oracle: VolumeOracle) -> None:
        self._live = {sector: oracle.live(sector) for sector in oracle.later}
        self._crash = {sector: oracle.after_crash(sector) for sector in oracle.later}
        self._durable = dict(oracle.durable)
        self._begun: dict[int, list[int]] = {}
        self.crossed = oracle.session is not None and not oracle.session.verified
        self.begun_at: dict[int, int] = {}
        self.acked_at: dict[int, int] = {}
        self._events = 0
        self._cut_at: int | None = None

    def cut(self, sector: int) -> None:
        """The volume became smaller: from this sector on there may be zeros, if it grew again."""
        self._cut_at = sector if self._cut_at is None else min(sector, self._cut_at)
        self.crossed = True  # by whoever cut it

    def restored(self, content: dict[int, int]) -> None:
        """The volume went back to a snapshot: what that had counts as written since."""
        self.crossed = True  # by whoever did it
        for sector, sequence in content.items():
            self._begun.setdefault(sector, []).append(sequence)

    def hardened(self, covered: dict[int, int]) -> None:
        """A flush has made these writes durable, by sector."""

    def begun(self, write: Write) -> None:
        """A write is about to be sent."""
        self._events += 1
        self.begun_at[write.sequence] = self._events
        for sector in range(write.first, write.last):
            self._begun.setdefault(sector, []).append(write.sequence)

    def acked(self, write: Write) -> None:
        """A write was acknowledged."""
        self._events += 1
        self.acked_at[write.sequence] = self._events

    def strict(self, sector: int) -> list[int]:
        """If one session was there all the time: what it had acknowledged, or anything later."""
        live = self._live.get(sector) or [self._durable.get(sector, 0)]
        return live + self._begun.get(sector, [])

    def loose(self, sector: int) -> list[int]:
        """If not: what was durable, or anything later."""
        crash = self._crash.get(sector) or [self._durable.get(sector, 0)]
        cut = [0] if self._cut_at is not None and sector >= self._cut_at else []
        return crash + self._begun.get(sector, []) + cut

    def acked_before(self, number: int, moment: int) -> bool:
        """Whether a write was acknowledged before that place."""
        return self.acked_at.get(number, moment) < moment

    def after(self, sector: int, number: int) -> list[int]:
        """Writes of a sector, begun in this time, that came after one."""
        begun = self._begun.get(sector, [])
        return begun[begun.index(number) + 1 :] if number in begun else begun


class Reading(Taking):
    """A volume that somebody opens to read it, without the lock: what may be read there.

    That is the volume of one moment of the time in which it was opened. What was durable by then is
    in it, or was overwritten by what is in it; nothing is in it that was begun after that. Of what
    was not durable it may have some, and not the rest. A sector that was read stays as it was.
    """

    def __init__(self, oracle: VolumeOracle) -> None:
        super().__init__(oracle)
        self._oracle = oracle
        self._hardened: list[tuple[int, dict[int, int]]] = []
        self._moment = 0
        """The last write that was found was begun then: the volume is of no earlier moment."""
        self._least: dict[int, int] = {}
        """By sector, what was durable at that moment, if it has become so in this time."""
        self._content: dict[int, bytes] = {}
        self._found: dict[int, list[int]] = {}
        """By sector, the writes that this may be: several only where it is zeros."""

    def hardened(self, covered: dict[int, int]) -> None:
        """A flush has made these writes durable, by sector."""
        self._events += 1
        self._hardened.append((self._events, covered))

    def check(self, offset: int, data: bytes, who: str) -> None:
        """Data was read."""
        new: list[int] = []
        for at in range(0, len(data), SECTOR):
            sector, content = (offset + at) // SECTOR, data[at : at + SECTOR]
            before = self._content.setdefault(sector, content)
            if before is not content:
                if before != content:
                    self._oracle.violated(
                        f"sector {sector} read by {who} is {describe(content)}, and was "
                        f"{describe(before)}"
                    )
                continue
            number, candidates = self._oracle.number, self.loose(sector)
            match = [n for n in candidates if content == stamp(number, sector, n)]
            if not match:
                self._oracle.violated(
                    f"sector {sector} read by {who} is {describe(content)}; allowed are "
                    f"{candidates}"
                )
                continue
            self._found[sector] = match
            new.append(sector)
        # With two clients nobody can tell what was durable in between.
        if new and not self.crossed:
            self._check_moment(new, who)

    def _check_moment(self, new: list[int], who: str) -> None:
        """Whether what was found is of one moment; some sectors are new."""
        begun_at = self.begun_at
        for sector in new:
            self._moment = max(self._moment, min(begun_at.get(n, 0) for n in self._found[sector]))
        to_check = set(new)
        while self._hardened and self._hardened[0][0] < self._moment:
            _, covered = self._hardened.pop(0)
            self._least.update(covered)
            to_check.update(covered)
        for sector in sorted(to_check & self._found.keys() & self._least.keys()):
            order, least = self.loose(sector), self._least[sector]
            if max(map(order.index, self._found[sector])) < order.index(least):
                self._oracle.violated(
                    f"{who} reads a write that was begun after write {least} of sector {sector} "
                    f"was durable, and not that one, but {self._found[sector]}"
                )


class VolumeOracle:
    """One volume.

    Args:
        number: tells volumes apart.
        size: bytes, a multiple of 512.
        fail: called with what was violated.
    """

    def __init__(self, number: int, size: int, fail: Callable[[str], None]) -> None:
        self.number = number
        self.size = size
        self.sizes = [size]
        """All that it has had, the present one last."""
        self._cut_in = 0
        """Epoch of the session that made it smaller last, or went back to a snapshot."""
        self._fail = fail
        self._sequence = 0
        self.durable: dict[int, int] = {}
        """Sequence number by sector; zeros where there is none."""
        self.later: dict[int, list[int]] = {}
        """Values tried since, oldest first."""
        self.acked: dict[int, int] = {}
        """The last acknowledged of those."""
        self.seen: dict[int, int] = {}
        """Those that were read while an older one might have been."""
        self.session: Session | None = None
        self.takings: list[Taking] = []
        """Snapshots that are being made, and readers that are opening it."""
        self.reported = 0

    def open(self, name: str, epoch: int = 0, size: int | None = None) -> Session:
        """A client has the volume open now; whoever had it before is fenced.

        Unless that was in a later epoch: one who slept from when its session had begun until it
        looked at what it had opened is fenced already. It may read what was there, and no more.
        With ``size`` bytes, if it is not what the volume has now: that has grown since.
        """
        before = self.session
        session = Session(self, name, epoch, before, self.size if size is None else size)
        for taking in self.takings:
            taking.crossed = True
        if epoch < self._cut_in or (before is not None and before.epoch > epoch):
            session.fenced = True
            return session
        if before is not None:
            before.fenced = True
            if before.verified:
                before.unflushed = dict(self.acked)
        self.session = session
        return session

    def begin_snapshot(self) -> Taking:
        """A snapshot is about to be asked for."""
        taking = Taking(self)
        self.takings.append(taking)
        return taking

    def end_snapshot(self, taking: Taking) -> None:
        """It was made, or was not."""
        self.takings.remove(taking)

    def begin_reading(self) -> Reading:
        """Somebody is about to open it, only to read."""
        reading = Reading(self)
        self.takings.append(reading)
        return reading

    def end_reading(self, reading: Reading) -> None:
        """It is open, or will not be; may be told twice."""
        if reading in self.takings:
            self.takings.remove(reading)

    def resize(self, size: int, epoch: int) -> None:
        """It has another size from now on.

        Args:
            size: bytes. What lies behind a smaller one is gone.
            epoch: of the session that made it smaller; all before it are fenced.
        """
        if size < self.size:
            for table in (self.durable, self.later, self.acked, self.seen):
                for sector in [each for each in table if each >= size // SECTOR]:
                    del table[sector]
            for taking in self.takings:
                taking.cut(size // SECTOR)
            self._cut_in = epoch
            if self.session is not None:
                self.session.fenced = True
        self.size = size
        self.sizes.append(size)

    def restore(self, content: bytes, epoch: int) -> None:
        """It has what a snapshot had, from now on.

        Args:
            content: that.
            epoch: of the session that did it; all before it are fenced.
        """
        sectors = range(len(content) // SECTOR)
        restored = {n: sequence_of(content[n * SECTOR : (n + 1) * SECTOR]) for n in sectors}
        for table in (self.durable, self.later, self.acked, self.seen):
            table.clear()
        self.durable.update(restored)
        for taking in self.takings:
            taking.restored(restored)
        self._cut_in = epoch
        if self.session is not None:
            self.session.fenced = True

    def next_sequence(self) -> int:
        """A number for a write."""
        self._sequence += 1
        return self._sequence

    def live(self, sector: int) -> list[int]:
        """What the present client may read."""
        later = self.later.get(sector)
        if later is None:
            return [self.durable.get(sector, 0)]
        oldest = self.seen.get(sector, self.acked.get(sector))
        if oldest is None:
            return [self.durable.get(sector, 0), *later]
        return later[later.index(oldest) :]

    def after_crash(self, sector: int) -> list[int]:
        """What the next client may read."""
        return [self.durable.get(sector, 0), *self.later.get(sector, ())]

    def violated(self, text: str) -> None:
        """Report, but not the same a thousand times."""
        self.reported += 1
        if self.reported <= 5:
            self._fail(f"volume v{self.number}: {text}")

    def check(
        self, offset: int, data: bytes, allowed: Callable[[int], list[int]], who: str
    ) -> list[int]:
        """Compare what was read with what may be; returns the value of each sector."""
        found: list[int] = []
        for at in range(0, len(data), SECTOR):
            sector = (offset + at) // SECTOR
            content = data[at : at + SECTOR]
            candidates = allowed(sector)
            # Of several zeros the newest: nobody can tell which they are.
            for sequence in reversed(candidates):
                if content == stamp(self.number, sector, sequence):
                    found.append(sequence)
                    break
            else:
                found.append(0)
                self.violated(
                    f"sector {sector} read by {who} is {describe(content)}; "
                    f"allowed are {candidates}, durable is {self.durable.get(sector, 0)}"
                )
        return found


class Session:
    """One client's use of a volume. Ranges of concurrent operations must not overlap.

    Attributes:
        epoch: number of the session, as the client has it.
        size: bytes, as the client has it.
        fenced: another client has opened the volume since, or cut it, or went back to a snapshot.
        verified: all of it was read.
        flushing: flushes under way.
        unflushed: what it had been acknowledged, and not flushed, when it was fenced.
        found_after: by sector, what that client found, and all it might have found, in order.
    """

    def __init__(
        self, oracle: VolumeOracle, name: str, epoch: int, before: Session | None, size: int
    ) -> None:
        self._oracle = oracle
        self._before = before
        self._wrote_in_vain = False
        self.name = name
        self.epoch = epoch
        self.size = size
        self.fenced = False
        self.verified = False
        self.flushing = 0
        self.unflushed: dict[int, int] = {}
        self.found_after: dict[int, tuple[int, list[int]]] = {}

    def verify(self, offset: int, data: bytes) -> None:
        """What was found when the volume was opened; to be called for all of it, in order."""
        oracle = self._oracle
        if self.fenced:
            return
        values = oracle.check(offset, data, oracle.after_crash, f"{self.name} on opening")
        for sector, sequence in enumerate(values, offset // SECTOR):
            if sector in oracle.later:
                # Those before it too, if nobody has looked at the sector since.
                before = self._before
                found = (sequence, oracle.after_crash(sector))
                while before is not None and before.found_after.setdefault(sector, found) is found:
                    before = before._before
                del oracle.later[sector]
                oracle.acked.pop(sector, None)
                oracle.seen.pop(sector, None)
            oracle.durable[sector] = sequence
        self.verified = offset + len(data) == self.size

    def begin_write(self, offset: int, length: int, zeros: bool = False) -> Write:
        """A write is about to be sent; returns it, with its data."""
        oracle = self._oracle
        first, last = offset // SECTOR, (offset + length) // SECTOR
        sequence = oracle.next_sequence()
        data = b""
        if zeros:
            sequence = -sequence
        else:
            pack, number = _STAMP.pack, oracle.number
            stamps = [pack(_MAGIC, number, n, sequence) * _REPEAT for n in range(first, last)]
            data = b"".join(stamps)
        if not self.fenced:
            later = oracle.later
            for sector in range(first, last):
                tried = later.get(sector)
                if tried is None:
                    later[sector] = [sequence]
                else:
                    tried.append(sequence)
        write = Write(offset, first, last, sequence, data)
        if not self.fenced:
            for taking in oracle.takings:
                taking.begun(write)
        return write

    def write_done(self, write: Write) -> None:
        """It was acknowledged."""
        if self.fenced:
            self._wrote_in_vain = True
            return
        oracle = self._oracle
        oracle.acked.update(dict.fromkeys(range(write.first, write.last), write.sequence))
        if oracle.seen:
            for sector in range(write.first, write.last):
                oracle.seen.pop(sector, None)
        for taking in oracle.takings:
            taking.acked(write)

    def check_read(self, offset: int, data: bytes) -> None:
        """Data was read."""
        oracle = self._oracle
        if self.fenced:
            return
        found = oracle.check(offset, data, oracle.live, self.name)
        for sector, sequence in enumerate(found, offset // SECTOR):
            # Of zeros nobody can tell which they are.
            unsure = sequence > 0 and sequence != oracle.acked.get(sector)
            if unsure and sequence in oracle.later.get(sector, ()):
                oracle.seen[sector] = sequence

    def begin_flush(self) -> Flush:
        """A flush is about to be sent."""
        if self.fenced:
            return Flush(dict(self.unflushed), self._wrote_in_vain)
        return Flush(dict(self._oracle.acked), False)

    def flush_done(self, flush: Flush) -> None:
        """It was acknowledged."""
        if self.fenced:
            self._late_flush(flush)
            return
        self._flushed(flush.covered)

    def _flushed(self, covered: dict[int, int]) -> None:
        """So much is durable."""
        oracle = self._oracle
        later, acked, durable = oracle.later, oracle.acked, oracle.durable
        hardened: dict[int, int] = {}
        for sector, sequence in covered.items():
            tried = later.get(sector)
            if tried is None:
                continue  # another flush, answered before, covered more
            if tried[-1] == sequence:
                del later[sector]
            elif sequence in tried:
                del tried[: tried.index(sequence) + 1]
            else:
                continue
            durable[sector] = hardened[sector] = sequence
            if acked.get(sector) == sequence:
                del acked[sector]
            if oracle.seen and oracle.seen.get(sector) not in later.get(sector, ()):
                oracle.seen.pop(sector, None)
        for taking in oracle.takings:
            taking.hardened(hardened)

    def _late_flush(self, flush: Flush) -> None:
        """Acknowledged after another client came: that one must find what it covers."""
        if flush.doomed:
            self._oracle.violated(f"a flush of {self.name} succeeded after it had been fenced")
        covered, found_after = flush.covered, self.found_after
        # Where that one has not looked yet, it is to find this or something later.
        self._flushed({n: covered[n] for n in covered if n not in found_after})
        for sector, sequence in covered.items():
            found, history = found_after.get(sector, (0, []))
            if sequence in history and history.index(found) < history.index(sequence):
                self._oracle.violated(
                    f"{self.name} was told that write {sequence} of sector {sector} is "
                    f"durable, but the client after it found {found}"
                )
