"""What travels between actors: calls, replies with a payload, and the marks on handlers."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torus_actors.errors import Invalid

Buffer = bytes | bytearray | memoryview

REDELIVERIES_MAX = 3
"""How often a call marked idempotent is handed to the restarted actor before its caller learns of
the crash: more, and a message that kills its handler would kill it for ever."""


class Call:
    """One message to a method of an actor; it is its own envelope.

    Attributes:
        method: name of an exposed method.
        args: its positional arguments.
        kwargs: ``{"payload": buffer}`` where bulk data goes along, else empty.
        reply_to: where the answer goes; None for a cast.
        deliveries: how often it was handed to an actor so far.
    """

    __slots__ = ("args", "deliveries", "kwargs", "method", "reply_to")

    def __init__(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], reply_to: Any
    ) -> None:
        self.method = method
        self.args = args
        self.kwargs = kwargs
        self.reply_to = reply_to
        self.deliveries = 0

    @property
    def message(self) -> Call:
        """The envelope's content, for pykka."""
        return self


class Reply:
    """An answer with bulk data beside it.

    Attributes:
        result: small structured value.
        payload: buffers; a local caller gets the handler's own buffers, a caller on another node
            one memoryview. Nobody may change them afterwards.
    """

    __slots__ = ("payload", "result")

    def __init__(self, result: Any, payload: Sequence[Buffer]) -> None:
        self.result = result
        self.payload = payload

    def joined(self) -> Buffer:
        """The payload as one buffer, copied only where it came in several."""
        return self.payload[0] if len(self.payload) == 1 else b"".join(self.payload)


@dataclass(frozen=True, slots=True)
class Handler:
    """An exposed method.

    Attributes:
        function: the plain function, called with the actor first.
        is_async: whether it returns a coroutine.
        remote: whether other nodes may call it.
        idempotent: whether doing it twice is the same as once, so that it may be redelivered.
        deferred: whether it takes the reply as its first argument and answers it itself, later.
        check: raises Invalid unless arguments fit the annotations.
    """

    function: Callable[..., Any]
    is_async: bool
    remote: bool
    idempotent: bool
    deferred: bool
    check: Callable[[Sequence[Any], bool], None]


F = TypeVar("F", bound=Callable[..., Any])


def expose(
    *, remote: bool = False, idempotent: bool = False, deferred: bool = False
) -> Callable[[F], F]:
    """Mark a method as callable by message.

    Args:
        remote: other nodes may call it too; its arguments are then checked against its
            annotations before it runs.
        idempotent: after a crash in the middle it is handed to the restarted actor.
        deferred: the (synchronous) method gets the reply as its first argument and sees to it that
            it is answered, by a callback and without a task: for the data path. What it waits for
            must outlive the actor, or fail when the actor dies.
    """

    def mark(function: F) -> F:
        function.__torus_expose__ = (remote, idempotent, deferred)  # type: ignore[attr-defined]
        return function

    return mark


def handlers_of(cls: type) -> dict[str, Handler]:
    """All exposed methods of an actor class, by name."""
    found: dict[str, Handler] = {}
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        marks = getattr(function, "__torus_expose__", None)
        if marks is None:
            continue
        remote, idempotent, deferred = marks
        check = _argument_check(cls, function) if remote else _no_check
        found[name] = Handler(
            function,
            inspect.iscoroutinefunction(function),
            remote,
            idempotent,
            deferred,
            check,
        )
    return found


def _no_check(args: Sequence[Any], has_payload: bool) -> None:
    """Messages from inside the process were written against the same types: mypy checks them."""


def _argument_check(
    cls: type, function: Callable[..., Any]
) -> Callable[[Sequence[Any], bool], None]:
    hints = typing.get_type_hints(function)
    skipped = 2 if function.__torus_expose__[2] else 1  # type: ignore[attr-defined]
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    wants_payload = any(p.name == "payload" for p in parameters)
    needs_payload = wants_payload and any(
        p.name == "payload" and p.default is inspect.Parameter.empty for p in parameters
    )
    positional = [p for p in parameters if p.name != "payload"]
    allowed = [_runtime_types(hints.get(p.name, Any)) for p in positional]
    required = sum(p.default is inspect.Parameter.empty for p in positional)
    where = f"{cls.__name__}.{function.__name__}"

    def check(args: Sequence[Any], has_payload: bool) -> None:
        if not required <= len(args) <= len(positional):
            raise Invalid(
                f"{where} takes {required} to {len(positional)} arguments, not {len(args)}"
            )
        if has_payload and not wants_payload:
            raise Invalid(f"{where} takes no payload")
        if needs_payload and not has_payload:
            raise Invalid(f"{where} needs a payload")
        for value, types_, parameter in zip(args, allowed, positional, strict=False):
            if types_ is not None and not isinstance(value, types_):
                raise Invalid(f"{where}: {parameter.name} may not be {type(value).__name__}")
            if type(value) is int and value < 0:
                raise Invalid(f"{where}: {parameter.name} may not be negative")

    return check


def _runtime_types(hint: Any) -> tuple[type, ...] | None:
    """Classes for isinstance that a type hint admits; None for anything."""
    if hint is Any:
        return None
    if hint is None or hint is type(None):
        return (type(None),)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        collected: list[type] = []
        for part in typing.get_args(hint):
            inner = _runtime_types(part)
            if inner is None:
                return None
            collected += inner
        return tuple(collected)
    if isinstance(origin, type):
        # The codec hands over lists for every sequence.
        return (list, tuple) if issubclass(origin, Sequence) else (origin,)
    if hint is float:
        return (float, int)
    if isinstance(hint, typing.NewType):
        return _runtime_types(hint.__supertype__)
    return (hint,) if isinstance(hint, type) else None
