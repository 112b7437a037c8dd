"""Blocksets: a volume's blocks as a stack of layers, chosen by a spec such as ``crc,base``.

The last layer, ``base``, maps each index to the block that holds it, in the paged tree of
``inode_tree``. The layers above add to it: ``crc`` insists on a checksum for each block and checks
what was read against it, ``rep=3`` has the volume's blocks kept in three copies where the ring says
fewer. The outermost layer is the volume's map. What a layer needs to know of each block is in the
one entry that the tree keeps, so that a stack takes no more memory than its tree.

As in ``inode_tree``, a call that needs a page which is not in memory raises ``PageNeeded`` before
it has changed anything; load it into ``blockset.block_map`` and call again.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

import msgpack
from pyroaring import BitMap64

from torus_actors.errors import Invalid
from torus_actors.model.checksums import Buffer, verify_range
from torus_actors.model.inode_tree import BlockMap, TreeRoot, empty_root
from torus_actors.model.inode_tree_pages import BlockEntry
from torus_actors.model.inode_tree_walk import PageVisit, ReadPage, Walk, visits
from torus_actors.model.refs import VOLUME_ID_MAX, BlockRef
from torus_actors.model.ring_base import REPLICATION_MAX

DEFAULT_SPEC = "crc,base"

SPEC_LENGTH_MAX = 255
"""Longest spec in characters; it is part of every volume's record."""

FORMAT = 1
_LAYER = re.compile(r"(?P<kind>[a-z][a-z0-9]*)(?:=(?P<arg>[A-Za-z0-9_.:-]+))?")
_VOLUME_AND_INODE = struct.Struct("<QQ12x")


class Blockset(ABC):
    """A layer and all below it.

    Args:
        arg: the text behind ``=`` in the spec, or nothing.
        sub: the layer below, or ``None``.
    """

    kind: ClassVar[str]
    takes_arg: ClassVar[bool] = False
    __slots__ = ("arg", "sub")

    def __init__(self, arg: str, sub: Blockset | None) -> None:
        if bool(arg) != self.takes_arg:
            wanted = "needs a value, as in" if self.takes_arg else "takes no value, only"
            example = f"{self.kind}=2" if self.takes_arg else self.kind
            raise Invalid(f"block layer {self.kind} {wanted} {example}")
        self.arg = arg
        self.sub = sub

    # --- what every layer answers ---------------------------------------------------------------

    @property
    @abstractmethod
    def block_map(self) -> BlockMap:
        """The tree at the bottom: to load and drop pages, and to commit."""

    @property
    @abstractmethod
    def replication(self) -> int | None:
        """How many copies this volume's blocks get at least; ``None``: as many as the ring says."""

    @property
    @abstractmethod
    def keeps_sums(self) -> bool:
        """Whether ``put`` wants the root of the block's checksums."""

    @abstractmethod
    def get(self, index: int) -> BlockEntry | None:
        """Where a block is, and its checksum root; ``None`` for a hole.

        Raises:
            PageNeeded: a page must be loaded first.
            Invalid: the index is outside the volume.
        """

    @abstractmethod
    def put(self, index: int, ref: bytes, root: int | None = None) -> None:
        """Say where a block is from now on.

        Args:
            index: position in the volume, in blocks.
            ref: the block's ref, 24 bytes.
            root: ``checksums.root_of`` its checksum list.

        Raises:
            PageNeeded: a page must be loaded first; nothing was changed.
            Invalid: a value is out of range, or the root is missing where a layer keeps it.
        """

    @abstractmethod
    def check_entry(self, entry: BlockEntry, sums: Buffer, offset: int, data: Buffer) -> None:
        """Verify what was read for an entry; ``checksums.verify_range`` says what the bytes are.

        The entry is the one with which the read began: by now the index may have another.

        Raises:
            Corruption: it does not match.
        """

    @abstractmethod
    def state(self, root: TreeRoot) -> object:
        """What the layer has to keep beside its arg: anything msgpack can carry."""

    @abstractmethod
    def restore(self, state: object) -> None:
        """Take in what ``state`` gave; called once, before any other use.

        Raises:
            Invalid: it is not such a state.
        """

    # --- the same for all -----------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Length of the volume in blocks."""
        return self.block_map.nblocks

    @property
    def spec(self) -> str:
        """The spec of this layer and those below."""
        return ",".join(
            f"{layer.kind}={layer.arg}" if layer.arg else layer.kind for layer in self.layers()
        )

    def sub_blockset(self) -> Blockset | None:
        """The layer below, or ``None`` at the bottom."""
        return self.sub

    def layers(self) -> Iterator[Blockset]:
        """This layer and those below, outermost first."""
        layer: Blockset | None = self
        while layer is not None:
            yield layer
            layer = layer.sub

    def check(self, index: int, sums: Buffer, offset: int, data: Buffer) -> None:
        """Verify bytes read from the block that is at ``index`` now; see ``check_entry``.

        Raises:
            Corruption: they do not match.
            Invalid: there is a hole.
            PageNeeded: a page must be loaded first.
        """
        entry = self.get(index)
        if entry is None:
            raise Invalid(f"block {index} is a hole; there is nothing to check")
        self.check_entry(entry, sums, offset, data)

    def truncate(self, nblocks: int) -> None:
        """Set the length in blocks, smaller or larger; see ``BlockMap.resize``."""
        self.block_map.resize(nblocks)

    def trim(self, first: int, stop: int) -> None:
        """Make holes of the blocks ``first`` up to, not including, ``stop``."""
        self.block_map.clear_range(first, stop)

    def walk(self) -> Walk:
        """Visit every page and ref, one page at a time; see ``inode_tree_walk``."""
        return self.block_map.walk()

    def all_refs(self, read: ReadPage | None = None) -> Iterator[BlockRef]:
        """Every block that the volume needs: the data blocks, and the pages that name them.

        Args:
            read: gives pages that are not in memory. Callers that have to wait for pages use
                ``walk`` instead.

        Raises:
            PageNeeded: a page is not in memory, and there is no ``read``.
        """
        for visit in visits(self.walk(), read):
            if visit.ref is not None:
                yield visit.ref
            yield from visit.data_refs()

    def live_inodes(self, read: ReadPage | None = None, volume: int | None = None) -> BitMap64:
        """Numbers of the INodes under which the volume's blocks and pages were written.

        Args:
            read: as in ``all_refs``.
            volume: count only refs of this volume; a clone has refs of its origin too, whose
                numbers mean other INodes.

        Raises:
            PageNeeded: a page is not in memory, and there is no ``read``.
        """
        live = BitMap64()
        for visit in visits(self.walk(), read):
            live.update(inodes_of(visit, volume))
        return live

    def marshal(self, root: TreeRoot | None = None) -> bytes:
        """Configuration and content, some 60 bytes: what the volume's record keeps.

        Args:
            root: that of the commit plan which is being recorded. Without it, the map must not
                have changed since its last plan.

        Raises:
            Invalid: no root was given, and there are changes that are not committed.
        """
        if root is None:
            root = self.block_map.root
        layers = [[layer.kind, layer.arg, layer.state(root)] for layer in self.layers()]
        packed: bytes = msgpack.packb({"format": FORMAT, "layers": layers})
        return packed


class Layer(Blockset):
    """A layer that adds something to the one below; by itself it adds nothing."""

    __slots__ = ("_below",)

    def __init__(self, arg: str, sub: Blockset | None) -> None:
        super().__init__(arg, sub)
        if sub is None:
            raise Invalid(
                f"block layer {self.kind} needs another one below, as in {self.kind},base"
            )
        self._below = sub

    @property
    def block_map(self) -> BlockMap:
        """The tree at the bottom."""
        return self._below.block_map

    @property
    def replication(self) -> int | None:
        """What the layer below says."""
        return self._below.replication

    @property
    def keeps_sums(self) -> bool:
        """What the layer below says."""
        return self._below.keeps_sums

    def get(self, index: int) -> BlockEntry | None:
        """What the layer below has."""
        return self._below.get(index)

    def put(self, index: int, ref: bytes, root: int | None = None) -> None:
        """Hand it to the layer below."""
        self._below.put(index, ref, root)

    def check_entry(self, entry: BlockEntry, sums: Buffer, offset: int, data: Buffer) -> None:
        """Have the layer below check it."""
        self._below.check_entry(entry, sums, offset, data)

    def state(self, root: TreeRoot) -> object:
        """Nothing."""
        return None

    def restore(self, state: object) -> None:
        """Nothing is expected."""
        if state is not None:
            raise Invalid(f"block layer {self.kind} keeps nothing, but something was stored")


BLOCKSET_LAYERS: dict[str, type[Blockset]] = {}
"""Every known layer by its name; ``register_layer`` adds one."""

_B = TypeVar("_B", bound=type[Blockset])


def register_layer(kind: str) -> Callable[[_B], _B]:
    """Class decorator: make a layer known under ``kind``, in lower-case letters and digits.

    Raises:
        Invalid: the name is taken, or is no name.
    """

    def add(cls: _B) -> _B:
        if kind in BLOCKSET_LAYERS or not re.fullmatch(r"[a-z][a-z0-9]*", kind):
            raise Invalid(f"block layer {kind} is already registered, or not a name")
        cls.kind = kind
        BLOCKSET_LAYERS[kind] = cls
        return cls

    return add


@register_layer("base")
class BaseBlockset(Blockset):
    """The bottom of every stack: index to entry, in a ``BlockMap``."""

    __slots__ = ("_map",)

    def __init__(self, arg: str, sub: Blockset | None) -> None:
        super().__init__(arg, sub)
        if sub is not None:
            raise Invalid("block layer base must be the last one")
        self._map = BlockMap()

    @property
    def block_map(self) -> BlockMap:
        """The tree."""
        return self._map

    @property
    def replication(self) -> int | None:
        """As many copies as the ring says."""
        return None

    @property
    def keeps_sums(self) -> bool:
        """No."""
        return False

    def get(self, index: int) -> BlockEntry | None:
        """The entry in the tree."""
        return self._map.get(index)

    def put(self, index: int, ref: bytes, root: int | None = None) -> None:
        """Set the entry in the tree; without a root, 0 is kept."""
        self._map.set(index, ref, root or 0)

    def check_entry(self, entry: BlockEntry, sums: Buffer, offset: int, data: Buffer) -> None:
        """Nothing to check against."""

    def state(self, root: TreeRoot) -> object:
        """The root of the tree."""
        return root.pack()

    def restore(self, state: object) -> None:
        """Open the tree of that root; no page is loaded yet."""
        if not isinstance(state, bytes):
            raise Invalid("the stored blockset has no tree root")
        self._map = BlockMap(TreeRoot.unpack(state))


@register_layer("crc")
class CrcBlockset(Layer):
    """Every block has a checksum, and what is read is checked against it."""

    __slots__ = ()

    @property
    def keeps_sums(self) -> bool:
        """Yes."""
        return True

    def put(self, index: int, ref: bytes, root: int | None = None) -> None:
        """Hand it on, if it has a root."""
        if root is None:
            raise Invalid(f"block {index} has no checksum, but the volume keeps checksums")
        self._below.put(index, ref, root)

    def check_entry(self, entry: BlockEntry, sums: Buffer, offset: int, data: Buffer) -> None:
        """Check the list against the entry's root and the bytes against the list."""
        verify_range(sums, entry.root, offset, data)
        self._below.check_entry(entry, sums, offset, data)


@register_layer("rep")
class RepBlockset(Layer):
    """``rep=N``: the volume's blocks are kept in N copies at least: more where the ring says so."""

    takes_arg = True
    __slots__ = ("_replication",)

    def __init__(self, arg: str, sub: Blockset | None) -> None:
        super().__init__(arg, sub)
        if not arg.isdecimal() or not arg.isascii() or not 1 <= int(arg) <= REPLICATION_MAX:
            raise Invalid(f"block layer rep={arg}: copies must be 1 to {REPLICATION_MAX}")
        self._replication = int(arg)

    @property
    def replication(self) -> int | None:
        """The N of the spec."""
        return self._replication


def parse_spec(spec: str) -> list[tuple[str, str]]:
    """Split a spec into layers, outermost first: kind and arg, which is empty if there is none.

    Raises:
        Invalid: it is malformed, names an unknown layer or one twice, or does not end in base.
    """
    if len(spec) > SPEC_LENGTH_MAX:
        raise Invalid(f"a block spec has at most {SPEC_LENGTH_MAX} characters")
    layers: list[tuple[str, str]] = []
    for part in spec.split(","):
        match = _LAYER.fullmatch(part.strip(" "))
        if match is None:
            raise Invalid(f"block spec {spec!r}: {part!r} is not a layer, as crc or rep=2")
        kind = match["kind"]
        if kind not in BLOCKSET_LAYERS:
            known = ", ".join(sorted(BLOCKSET_LAYERS))
            raise Invalid(f"block spec {spec!r}: no layer {kind}; there are {known}")
        if any(kind == other for other, _ in layers):
            raise Invalid(f"block spec {spec!r}: layer {kind} is there twice")
        layers.append((kind, match["arg"] or ""))
    if layers[-1][0] != BaseBlockset.kind:
        raise Invalid(f"block spec {spec!r}: the last layer must be base")
    return layers


def create_blockset(spec: str = DEFAULT_SPEC, nblocks: int = 0) -> Blockset:
    """An empty blockset.

    Args:
        spec: layers, outermost first, separated by commas.
        nblocks: length of the volume in blocks.

    Raises:
        Invalid: the spec or the length breaks a rule.
    """
    blockset = _stack(parse_spec(spec))
    if nblocks:
        for layer in blockset.layers():
            layer.restore(layer.state(empty_root(nblocks)))
    return blockset


def unmarshal_blockset(data: bytes | memoryview) -> Blockset:
    """The blockset that ``Blockset.marshal`` was asked of; no page of it is loaded yet.

    Raises:
        Invalid: the bytes are no blockset, or one with a layer that is not known here.
    """
    try:
        fields = msgpack.unpackb(data)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise Invalid(f"not a marshalled blockset of format {FORMAT}")
        layers = [(str(kind), str(arg), state) for kind, arg, state in fields["layers"]]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise Invalid(f"not a marshalled blockset: {error}") from error
    spec = ",".join(f"{kind}={arg}" if arg else kind for kind, arg, _ in layers)
    parsed = parse_spec(spec)
    if parsed != [(kind, arg) for kind, arg, _ in layers]:
        raise Invalid("not a marshalled blockset: a layer's name is not one")
    blockset = _stack(parsed)
    for layer, (_, _, state) in zip(blockset.layers(), layers, strict=True):
        layer.restore(state)
    return blockset


def inodes_of(visit: PageVisit, volume: int | None = None) -> Iterator[int]:
    """INode numbers of the refs in one visited page, and of the page; see ``live_inodes``."""
    if visit.ref is not None and volume in (None, visit.ref.volume):
        yield visit.ref.inode
    if visit.level == 0:
        for typed_volume, inode in _VOLUME_AND_INODE.iter_unpack(visit.packed):
            if volume is None or typed_volume & VOLUME_ID_MAX == volume:
                yield inode


def _stack(layers: list[tuple[str, str]]) -> Blockset:
    blockset: Blockset | None = None
    for kind, arg in reversed(layers):
        blockset = BLOCKSET_LAYERS[kind](arg, blockset)
    assert blockset is not None, "a parsed spec has a base layer"
    return blockset
