"""Known bugs, put into the production code on purpose and taken out again.

A mutant is data: for some functions, a piece of their source and what stands there instead. The
function objects stay and only their code is exchanged, so whoever holds one already, by whatever
name, has the bug too. A piece that is not found exactly once is an error, so that no mutant becomes
harmless in silence when the code around it changes.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torus_actors.errors import Invalid


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of one function.

    Attributes:
        where: ``module:function`` or ``module:Class.method``, below ``torus_actors``.
        old: a piece of its source, as if the function were not indented; there exactly once.
        new: what stands there instead.
    """

    where: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug.

    Attributes:
        name: for the command line.
        breaks: which rule it breaks, in a line.
        edits: how.
        hunted_in: scenarios to look for it in, the likeliest first.
        first_seed: where to begin. For a bug that is seldom met, a seed that met it once: it is
            found sooner, and any other would do.
    """

    name: str
    breaks: str
    edits: tuple[Edit, ...]
    hunted_in: tuple[str, ...]
    first_seed: int = 1

    @property
    def kept_in(self) -> str:
        """Where the rule is kept."""
        return ", ".join(dict.fromkeys(edit.where for edit in self.edits))


@contextlib.contextmanager
def put_in(mutant: Mutant | None) -> Iterator[None]:
    """Have a bug in the production code meanwhile; None is no bug.

    Raises:
        Invalid: the mutant does not fit the code.
    """
    before: list[tuple[FunctionType, CodeType]] = []
    try:
        for where in dict.fromkeys(edit.where for edit in mutant.edits) if mutant else ():
            assert mutant is not None
            function = find_function(where)
            broken = _broken(function, [edit for edit in mutant.edits if edit.where == where])
            before.append((function, function.__code__))
            function.__code__ = broken
        yield
    finally:
        for function, code in before:
            function.__code__ = code


def find_function(where: str) -> FunctionType:
    """The function that an edit names.

    Raises:
        Invalid: there is none.
    """
    module_name, _, path = where.partition(":")
    found: Any = importlib.import_module(f"torus_actors.{module_name}")
    for name in path.split("."):
        try:
            found = inspect.getattr_static(found, name)
        except AttributeError:
            raise Invalid(f"there is no {where}") from None
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    found = inspect.unwrap(found)
    if not isinstance(found, FunctionType):
        raise Invalid(f"{where} is not a function")
    return found


def _broken(function: FunctionType, edits: list[Edit]) -> CodeType:
    """The code of a function after some edits."""
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    for edit in edits:
        count = source.count(edit.old)
        if count != 1 or edit.old == edit.new:
            raise Invalid(f"{edit.where} has {edit.old!r} {count} times, not once")
        source = source.replace(edit.old, edit.new)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    definition.decorator_list = []
    ast.increment_lineno(definition, first - 1)
    # What it takes from around it (``__class__``) has to come from around it here too.
    old = function.__code__
    module = ast.parse(f"def around({', '.join(old.co_freevars)}): pass")
    around = module.body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body = [definition]
    flags = __future__.annotations.compiler_flag
    code: CodeType = compile(module, old.co_filename, "exec", flags, dont_inherit=True)
    for name in ("around", function.__name__):
        (code,) = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
    if code.co_freevars != old.co_freevars:
        raise Invalid(f"{edits[0].where} cannot be exchanged: it is a closure")
    return code.replace(co_qualname=old.co_qualname)
