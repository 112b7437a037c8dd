"""The read cache: verified pages and blocks, kept under the names of their blocks.

A block never changes, so an entry is never stale: what a volume overwrites gets another name, and
the old entry merely grows old.
"""

from __future__ import annotations

from collections import OrderedDict

from torus_actors.model.checksums import PAGE_SIZE, Buffer

ENTRY_OVERHEAD_BYTES = 300
"""What an entry costs beside its data, roughly; counted so that small entries cannot outgrow the
bound."""

PAGE_OVERHEAD_BYTES = 130

COPY_RATIO = 4
"""A block in a buffer more than so many times its size is copied out of it."""


class _Entry:
    __slots__ = ("pages", "size", "whole")

    def __init__(self) -> None:
        self.whole: Buffer | None = None
        self.pages: dict[int, bytes] | None = None
        self.size = ENTRY_OVERHEAD_BYTES


class ReadCache:
    """Least recently used blocks go first.

    Args:
        size_max: bytes of memory to use.
    """

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.size = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def get(self, ref: bytes, offset: int, length: int) -> Buffer | None:
        """Bytes of a block if all are here; a view, not to be changed."""
        entry = self._entries.get(ref)
        if entry is None:
            self.misses += 1
            return None
        whole = entry.whole
        if whole is not None:
            self._entries.move_to_end(ref)
            self.hits += 1
            return memoryview(whole)[offset : offset + length]
        pages = entry.pages
        if pages is not None:
            first = offset // PAGE_SIZE
            last = (offset + length - 1) // PAGE_SIZE
            if first == last:
                page = pages.get(first)
                if page is not None:
                    self._entries.move_to_end(ref)
                    self.hits += 1
                    if length == PAGE_SIZE:
                        return page
                    start = offset - first * PAGE_SIZE
                    return memoryview(page)[start : start + length]
            else:
                found = [pages.get(n) for n in range(first, last + 1)]
                if None not in found:
                    self._entries.move_to_end(ref)
                    self.hits += 1
                    start = offset - first * PAGE_SIZE
                    joined = b"".join(found)  # type: ignore[arg-type]
                    return memoryview(joined)[start : start + length]
        self.misses += 1
        return None

    def has_whole(self, ref: bytes) -> bool:
        """Whether the whole block is here."""
        entry = self._entries.get(ref)
        return entry is not None and entry.whole is not None

    def whole(self, ref: bytes) -> Buffer | None:
        """The whole block, if it is here; not counted as use."""
        entry = self._entries.get(ref)
        return None if entry is None else entry.whole

    def put_whole(self, ref: bytes, block: Buffer) -> None:
        """Keep a whole verified block; the buffer must never change again.

        It is kept as it is, but copied if it is a small part of a larger one, which it would keep
        alive unseen by the bound.
        """
        if len(block) > self.size_max:
            return
        behind = block.obj if isinstance(block, memoryview) else block
        if memoryview(behind).nbytes > COPY_RATIO * len(block):
            block = bytes(block)
        entry = self._entries.get(ref)
        if entry is None:
            entry = self._entries[ref] = _Entry()
        else:
            self.size -= entry.size
            self._entries.move_to_end(ref)
        entry.whole = block
        entry.pages = None
        entry.size = ENTRY_OVERHEAD_BYTES + len(block)
        self._added(entry.size)

    def put_pages(self, ref: bytes, offset: int, data: Buffer) -> None:
        """Keep verified whole pages of a block.

        Args:
            ref: the block.
            offset: where they start in it, a multiple of 4096.
            data: bytes; copied, because it is often a small part of a large buffer. A short last
                page is kept as it is.
        """
        if len(data) > self.size_max:
            return
        entry = self._entries.get(ref)
        if entry is None:
            entry = self._entries[ref] = _Entry()
            self.size += entry.size
        elif entry.whole is not None:
            return
        pages = entry.pages
        if pages is None:
            pages = entry.pages = {}
        if len(data) <= PAGE_SIZE:
            number = offset // PAGE_SIZE
            if number not in pages:
                pages[number] = bytes(data)
                entry.size += PAGE_SIZE + PAGE_OVERHEAD_BYTES
                self._entries.move_to_end(ref)
                self._added(PAGE_SIZE + PAGE_OVERHEAD_BYTES)
            return
        view = memoryview(data)
        grown = 0
        for at in range(0, len(view), PAGE_SIZE):
            number = (offset + at) // PAGE_SIZE
            if number not in pages:
                pages[number] = bytes(view[at : at + PAGE_SIZE])
                grown += PAGE_SIZE + PAGE_OVERHEAD_BYTES
        entry.size += grown
        self._entries.move_to_end(ref)
        self._added(grown)

    def _added(self, size: int) -> None:
        self.size += size
        while self.size > self.size_max and len(self._entries) > 1:
            _, entry = self._entries.popitem(last=False)
            self.size -= entry.size
