"""What travels between actors: calls, replies with a payload, and the marks on handlers."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
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
        checked: the caller verifies every byte of the payload by checksums of its own.
    """

    __slots__ = ("checked", "payload", "result")

    def __init__(self, result: Any, payload: Sequence[Buffer], checked: bool = False) -> None:
        self.result = result
        self.payload = payload
        self.checked = checked

    def joined(self) -> Buffer:
        """The payload as one buffer, copied only where it came in several."""
        return self.payload[0] if len(self.payload) == 1 else b"".join(self.payload)


class _NoReply:
    """What a deferred handler answers to where nobody asked: any node may send it as a cast."""

    def done(self) -> bool:
        """Never: the handler is to do its work."""
        return False

    def set(self, value: Any = None) -> None:
        """Drop the answer."""

    def fail(self, error: BaseException) -> None:
        """Drop the error."""

    def set_exception(self, exc_info: Any = None) -> None:
        """Drop the error."""


NO_REPLY = _NoReply()


@dataclass(frozen=True, slots=True)
class Handler:
    """An exposed method.

    Attributes:
        function: the plain function, called with the actor first.
        is_async: whether it returns a coroutine.
        remote: whether other nodes may call it.
        idempotent: whether doing it twice is the same as once, so that it may be redelivered.
        deferred: whether it takes the reply as its first argument and answers it itself, later.
        check: raises Invalid unless arguments fit the annotations, down to the elements of lists;
            ints may not be negative, and floats are finite.
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
        if deferred and inspect.iscoroutinefunction(function):
            raise TypeError(f"{cls.__name__}.{name} is deferred, so it may not be async")
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
    where = f"{cls.__name__}.{function.__name__}"
    payload = next((p for p in parameters if p.name == "payload"), None)
    positional = [p for p in parameters if p is not payload]
    if any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in positional) or (
        payload is not None and payload is not parameters[-1]
    ):
        # What was checked here must be what the handler then gets.
        raise TypeError(f"{where}: remote methods take plain arguments, and payload as the last")
    fits = [_fits(hints.get(p.name, Any)) for p in positional]
    required = sum(p.default is inspect.Parameter.empty for p in positional)
    needs_payload = payload is not None and payload.default is inspect.Parameter.empty

    def check(args: Sequence[Any], has_payload: bool) -> None:
        if not required <= len(args) <= len(positional):
            raise Invalid(
                f"{where} takes {required} to {len(positional)} arguments, not {len(args)}"
            )
        if has_payload and payload is None:
            raise Invalid(f"{where} takes no payload")
        if needs_payload and not has_payload:
            raise Invalid(f"{where} needs a payload")
        for value, fit, parameter in zip(args, fits, positional, strict=False):
            if type(value) is int and value < 0:
                raise Invalid(f"{where}: {parameter.name} may not be negative")
            if not fit(value):
                wanted = inspect.formatannotation(parameter.annotation).strip("'")
                found = value if isinstance(value, float) else type(value).__name__
                raise Invalid(f"{where}: {parameter.name} should be {wanted}, not {found}")

    return check


def _anything(value: Any) -> bool:
    return True


def _natural(value: Any) -> bool:
    # Sizes, offsets, indexes, ids: nothing that travels is negative. A bool is no number here.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    # NaN passes every bound that is kept by comparing, and no timer takes it, nor infinity.
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(hint: Any) -> Callable[[Any], bool]:
    """The test whether a value fits a type hint, down to the elements of containers."""
    if isinstance(hint, typing.NewType):
        return _fits(hint.__supertype__)
    origin = typing.get_origin(hint)
    if origin is None:
        return _fits_class(hint)
    parts = typing.get_args(hint)
    if origin is typing.Literal:
        return lambda value: any(type(value) is type(part) and value == part for part in parts)
    if origin in (typing.Union, types.UnionType):
        tests = [_fits(part) for part in parts]
        return lambda value: any(test(value) for test in tests)
    if origin is tuple and parts[-1:] != (...,):
        tests = [_fits(part) for part in parts]
        return lambda value: (
            isinstance(value, (list, tuple))
            and len(value) == len(tests)
            and all(test(item) for test, item in zip(tests, value, strict=True))
        )
    container = _fits_class(origin)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_value = _fits(parts[0]), _fits(parts[1])
        return lambda value: (
            container(value) and all(of_key(k) and of_value(v) for k, v in value.items())
        )
    if isinstance(origin, type) and issubclass(origin, Collection):
        of_item = _fits(parts[0])
        return lambda value: container(value) and all(of_item(item) for item in value)
    return container


def _fits_class(hint: Any) -> Callable[[Any], bool]:
    if hint is None or hint is type(None):
        return lambda value: value is None
    if hint is int:
        return _natural
    if hint is float:
        return _number
    if hint in (list, tuple, Sequence, Collection):
        # The codec hands over lists for every sequence.
        return lambda value: isinstance(value, (list, tuple))
    if typing.is_typeddict(hint):
        return lambda value: isinstance(value, dict)
    try:
        isinstance(None, hint)
    except TypeError:
        return _anything  # Any, type variables, protocols
    return lambda value: isinstance(value, hint)
