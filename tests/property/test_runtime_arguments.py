"""The check of arguments that come from other nodes, against whatever they may send."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NewType, Protocol, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torus_actors.errors import Invalid
from torus_actors.model.refs import BLOCK_REF_SIZE, BlockRef
from torus_actors.runtime import Buffer, LoopActor, expose
from torus_actors.runtime.messages import Handler

Epoch = NewType("Epoch", int)


class Extent(TypedDict):
    """A record."""

    offset: int


class HasName(Protocol):
    """Not checkable at run time."""

    name: str


class Target(LoopActor):
    """Methods with every kind of annotation; they are never run."""

    @expose(remote=True)
    async def scalars(
        self, a: int, b: str, c: float, d: bool, e: bytes | None = None, f: Epoch = Epoch(0)
    ) -> None:
        """Scalars."""

    @expose(remote=True)
    async def containers(
        self,
        refs: list[BlockRef],
        pairs: Sequence[tuple[int, str]],
        table: dict[str, list[int]] | None = None,
        bare: tuple[int, ...] = (),
        anything: list = [],  # type: ignore[type-arg]  # noqa: B006
    ) -> None:
        """Containers, checked down to their elements."""

    @expose(remote=True)
    def odd(
        self,
        a: Any,
        b: Literal["all", "one", 1],
        c: Extent,
        d: HasName,
        e: Mapping[str, Any],
        f: Buffer,
        g: object,
    ) -> None:
        """Hints of the rarer kinds."""

    @expose(remote=True)
    async def bulk(self, ref: BlockRef, *, payload: memoryview) -> None:
        """Bulk data that must come."""

    @expose(remote=True, deferred=True)
    def deferred(self, reply: Any, a: int, payload: Buffer | None = None) -> None:
        """Bulk data that may come, and a reply that never comes from the caller."""


HANDLERS: list[Handler] = list(Target.handlers.values())

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.binary(min_size=BLOCK_REF_SIZE, max_size=BLOCK_REF_SIZE).map(BlockRef.parse)
    | st.binary(max_size=4).map(memoryview)
    | st.just(object())
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.sampled_from(HANDLERS), st.lists(values, max_size=8), st.booleans())
def test_nothing_but_invalid(handler: Handler, args: list[Any], has_payload: bool) -> None:
    """Whatever comes in, the check passes or raises Invalid; what passes can be called."""
    try:
        handler.check(args, has_payload)
    except Invalid as error:
        assert str(error).startswith("Target.")
        return
    kwargs = {"payload": memoryview(b"")} if has_payload else {}
    reply = [object()] if handler.deferred else []
    inspect.signature(handler.function).bind(object(), *reply, *args, **kwargs)


REF = BlockRef.of(1, 2, 3)


@pytest.mark.parametrize(
    ("method", "args", "payload"),
    [
        ("scalars", [1, "x", 2.0, True], False),
        ("scalars", [0, "", 2, False, b"x", 3], False),
        ("containers", [[REF], [[1, "x"], (2, "y")]], False),
        ("containers", [(REF,), [], {"x": [1]}, [1, 2], (object(), -1)], False),
        ("odd", [None, "all", {"offset": 1}, object(), {"x": -1}, memoryview(b""), -1.0], False),
        ("odd", ["x", 1, {}, None, {}, b"", None], False),
        ("bulk", [REF], True),
        ("deferred", [1], True),
        ("deferred", [1], False),
    ],
)
def test_what_fits_passes(method: str, args: list[Any], payload: bool) -> None:
    """Arguments of the annotated types pass, lists for tuples too: the codec knows lists only."""
    Target.handlers[method].check(args, payload)


@pytest.mark.parametrize(
    ("method", "args", "payload"),
    [
        ("scalars", [], False),
        ("scalars", [1, "x", 2.0, True, None, 1, 1], False),
        ("scalars", [-1, "x", 2.0, True], False),
        ("scalars", [True, "x", 2.0, True], False),
        ("scalars", ["1", "x", 2.0, True], False),
        ("scalars", [1, b"x", 2.0, True], False),
        ("scalars", [1, "x", "2", True], False),
        ("scalars", [1, "x", False, True], False),
        ("scalars", [1, "x", math.nan, True], False),
        ("scalars", [1, "x", math.inf, True], False),
        ("scalars", [1, "x", -math.inf, True], False),
        ("scalars", [1, "x", 2.0, 1], False),
        ("scalars", [1, "x", 2.0, True, "x"], False),
        ("scalars", [1, "x", 2.0, True, None, "x"], False),
        ("scalars", [1, "x", 2.0, True], True),
        ("containers", ["refs", []], False),
        ("containers", [[bytes(BLOCK_REF_SIZE)], []], False),
        ("containers", [[REF, None], []], False),
        ("containers", [[], [[1]]], False),
        ("containers", [[], [[1, "x", 2]]], False),
        ("containers", [[], [[-1, "x"]]], False),
        ("containers", [[], ["1x"]], False),
        ("containers", [[], [], {1: [1]}], False),
        ("containers", [[], [], {"x": [-1]}], False),
        ("containers", [[], [], None, [1, "2"]], False),
        ("odd", [None, "none", {}, None, {}, b"", None], False),
        ("odd", [None, True, {}, None, {}, b"", None], False),
        ("odd", [None, "all", [], None, {}, b"", None], False),
        ("odd", [None, "all", {}, None, {1: 2}, b"", None], False),
        ("odd", [None, "all", {}, None, {}, "", None], False),
        ("odd", [-1, "all", {}, None, {}, b"", None], False),
        ("bulk", [REF], False),
        ("bulk", [REF, b"x"], True),
        ("deferred", [object(), 1], False),
    ],
)
def test_what_does_not_fit_is_invalid(method: str, args: list[Any], payload: bool) -> None:
    """Everything else is refused, with the name of the method and the argument."""
    with pytest.raises(Invalid, match=f"Target.{method}"):
        Target.handlers[method].check(args, payload)


def test_signatures_that_cannot_be_checked_are_refused() -> None:
    """A remote method whose call may differ from what was checked is refused with its class."""

    def many(self: Any, *refs: bytes) -> None: ...
    def named(self: Any, *, a: int) -> None: ...
    def middle(self: Any, payload: bytes, a: int = 0) -> None: ...

    for function in (many, named, middle):
        with pytest.raises(TypeError, match=function.__name__):
            type("Wrong", (LoopActor,), {"wrong": expose(remote=True)(function)})
        type("Local", (LoopActor,), {"right": expose()(function)})

    async def later(self: Any, reply: Any) -> None: ...

    with pytest.raises(TypeError, match="deferred"):
        type("Wrong", (LoopActor,), {"wrong": expose(deferred=True)(later)})


@given(st.lists(values, max_size=4))
def test_local_methods_are_not_checked(args: list[Any]) -> None:
    """Messages from inside the process are held to their types by mypy, not at run time."""

    class Local(LoopActor):
        @expose()
        def method(self, a: int) -> None: ...

    with contextlib.nullcontext():
        Local.handlers["method"].check(args, True)
