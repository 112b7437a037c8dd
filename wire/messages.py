"""What the metadata of each kind of frame holds, checked where it enters.

    CALL, CAST   [actor, method, [argument, ...], timeout in ms]
    REPLY        [result]
    ERROR        [class name, text, {attribute: value}]
    PING, PONG   empty

Bulk data is not here: it is the frame's payload.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torus_actors.errors import BY_NAME, Invalid, ProtocolError, TorusError
from torus_actors.wire.codec import pack, unpack
from torus_actors.wire.limits import ERROR_ATTRIBUTE_MAX, ERROR_TEXT_MAX, NAME_MAX, TIMEOUT_MAX_MS


class CallMessage(NamedTuple):
    """The metadata of a CALL or CAST.

    Attributes:
        actor: name of the actor on the receiving node, 1 to NAME_MAX characters.
        method: name of its method, likewise; nothing but its length was checked.
        args: positional arguments, of any type that the codec knows.
        timeout_ms: time left to the deadline, 0 to TIMEOUT_MAX_MS; 0 in a CAST: no deadline.
    """

    actor: str
    method: str
    args: list[Any]
    timeout_ms: int


_new_call: Callable[[type[CallMessage], list[Any]], CallMessage] = tuple.__new__


def encode_call(actor: str, method: str, args: Sequence[Any], timeout_ms: int) -> bytes:
    """Metadata of a CALL or CAST.

    Raises:
        Invalid: an argument cannot be sent, or a field is out of range.
    """
    if not (
        0 < len(actor) <= NAME_MAX
        and 0 < len(method) <= NAME_MAX
        and 0 <= timeout_ms <= TIMEOUT_MAX_MS
    ):
        raise Invalid(f"cannot call {actor!r}.{method!r} with a timeout of {timeout_ms} ms")
    return pack([actor, method, list(args), timeout_ms])


def decode_call(meta: bytes | memoryview) -> CallMessage:
    """Read the metadata of a CALL or CAST.

    Raises:
        ProtocolError: another layout, or a field out of range.
    """
    fields = unpack(meta)
    if type(fields) is list and len(fields) == 4:
        actor, method, args, timeout_ms = fields
        if (
            type(actor) is str
            and type(method) is str
            and type(args) is list
            and type(timeout_ms) is int
            and 0 < len(actor) <= NAME_MAX
            and 0 < len(method) <= NAME_MAX
            and 0 <= timeout_ms <= TIMEOUT_MAX_MS
        ):
            return _new_call(CallMessage, fields)
    raise ProtocolError("the metadata of a call is not [actor, method, arguments, timeout]")


def encode_reply(result: Any) -> bytes:
    """Metadata of a REPLY.

    Raises:
        Invalid: the result cannot be sent.
    """
    return pack([result])


def decode_reply(meta: bytes | memoryview) -> Any:
    """Read the metadata of a REPLY: the result.

    Raises:
        ProtocolError: another layout.
    """
    fields = unpack(meta)
    if type(fields) is list and len(fields) == 1:
        return fields[0]
    raise ProtocolError("the metadata of a reply is not [result]")


def encode_error(error: TorusError) -> bytes:
    """Metadata of an ERROR; never fails.

    An error class that the other side cannot know goes as its nearest base that it does.
    Attributes whose names are private, or whose values cannot be sent, stay here.
    """
    name = next(c.__name__ for c in type(error).__mro__ if BY_NAME.get(c.__name__) is c)
    text = str(error)
    if len(text) > ERROR_TEXT_MAX:
        text = text[: ERROR_TEXT_MAX - 3] + "..."
    # Names of files may hold what is not valid UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode()[:ERROR_TEXT_MAX]
    attributes = {key: value for key, value in vars(error).items() if _sendable(key, value)}
    return pack([name, text, attributes])


def _sendable(key: str, value: Any) -> bool:
    if key.startswith("_"):
        return False
    try:
        return len(key) <= NAME_MAX and len(_checked_pack(value)) <= ERROR_ATTRIBUTE_MAX
    except (Invalid, ProtocolError):
        return False


def _checked_pack(value: Any) -> bytes:
    packed = pack(value)
    unpack(packed)
    return packed


def decode_error(meta: bytes | memoryview) -> TorusError:
    """Read the metadata of an ERROR.

    Returns:
        The error, to be raised by the caller; a plain TorusError where its class is not known.

    Raises:
        ProtocolError: another layout.
    """
    fields = unpack(meta)
    if type(fields) is list and len(fields) == 3:
        name, text, attributes = fields
        if (
            type(name) is str
            and type(text) is str
            and type(attributes) is dict
            and 0 < len(name) <= NAME_MAX
            and len(text) <= ERROR_TEXT_MAX
        ):
            return _rebuild(name, text, attributes)
    raise ProtocolError("the metadata of an error is not [class, text, attributes]")


def _rebuild(name: str, text: str, attributes: dict[Any, Any]) -> TorusError:
    cls = BY_NAME.get(name)
    if cls is None:
        cls, text = TorusError, f"{name}: {text}"
    # Not cls(text): a class may want other arguments, which are in its attributes.
    error = cls.__new__(cls, text)
    for key, value in attributes.items():
        # A peer may add data to an error and never replace what the class defines.
        if (
            type(key) is str
            and key.isidentifier()
            and not key.startswith("_")
            and (not hasattr(cls, key) or key in _declared(cls))
        ):
            setattr(error, key, value)
    return error


def _declared(cls: type[TorusError]) -> set[str]:
    """Attributes that an error class annotates, and so expects to be set."""
    return {
        key
        for base in cls.__mro__
        if issubclass(base, TorusError)
        for key in inspect.get_annotations(base)
    }
