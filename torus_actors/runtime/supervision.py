"""Supervision as data: frozen trees of specs, and the actor that keeps one level of them alive."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from torus_actors.runtime.actor import LoopActor
from torus_actors.runtime.cell import Cell, ChildSpec, Restart, State

log = logging.getLogger(__name__)


class Strategy(enum.Enum):
    """Which siblings are restarted along with a child that died."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"


@dataclass(frozen=True, slots=True)
class SupervisorSpec:
    """One level of the tree.

    Attributes:
        name: unique in the node.
        children: started in this order, stopped in the reverse one.
        strategy: who is restarted along.
        max_restarts: more than this many within ``period_s`` and the supervisor gives up and dies
            itself, which its own supervisor sees; the root ends the process.
        backoff_first_s: pause before the second restart in a row; the first comes at once, because
            most crashes are single and somebody is waiting. Doubles up to ``backoff_max_s``.
    """

    name: str
    children: tuple[ChildSpec | SupervisorSpec, ...]
    strategy: Strategy = Strategy.ONE_FOR_ONE
    max_restarts: int = 10
    period_s: float = 30.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    shutdown_s: float = 30.0


class IntensityExceeded(Exception):
    """A supervisor gave up: its children died too often."""


class Supervisor(LoopActor):
    """Starts the children of its spec, restarts them as it says, escalates when that fails."""

    def __init__(self, spec: SupervisorSpec) -> None:
        super().__init__()
        self.spec = spec
        self._deaths: deque[float] = deque()
        self._cells: list[Cell] = []
        self._exits: asyncio.Queue[tuple[Cell, BaseException | None]] = asyncio.Queue()

    async def setup(self) -> None:
        """Start all children in order; the first that fails fails the supervisor."""
        for child in self.spec.children:
            cell = self.system.cell_for(child_spec(child), self.cell.name)
            cell.on_exit = self._child_exited
            self._cells.append(cell)
        for cell in self._cells:
            await cell.start()
        self.spawn(self._keep())

    async def cleanup(self) -> None:
        """Stop all children, the last started first."""
        for cell in reversed(self._cells):
            await cell.stop(final=not self.cell.will_restart)

    def _child_exited(self, cell: Cell, error: BaseException | None) -> None:
        self._exits.put_nowait((cell, error))

    async def _keep(self) -> None:
        while True:
            cell, error = await self._exits.get()
            if cell.state is State.RUNNING:
                continue  # already restarted along with a sibling
            restart = cell.spec.restart
            if restart is Restart.TEMPORARY or (restart is Restart.TRANSIENT and error is None):
                cell.state = State.STOPPED
                cell.bury()
                continue
            await self._restart(cell, error)

    async def _restart(self, cell: Cell, error: BaseException | None) -> None:
        """Restart a child until it stays up, or give up."""
        loop = self.system.loop
        while True:
            now = loop.time()
            while self._deaths and self._deaths[0] < now - self.spec.period_s:
                self._deaths.popleft()
            self._deaths.append(now)
            recent = len(self._deaths)
            if recent > self.spec.max_restarts:
                raise IntensityExceeded(
                    f"{cell.name} died {recent} times in {self.spec.period_s:g} s, "
                    f"last of {cell.last_death or error}"
                )
            if recent > 1:
                pause = min(self.spec.backoff_first_s * 2 ** (recent - 2), self.spec.backoff_max_s)
                await asyncio.sleep(pause)
            try:
                await self._restart_once(cell)
                return
            except asyncio.CancelledError:
                raise
            except Exception as again:
                cell.last_death = f"{type(again).__name__}: {again}"
                log.warning("%s did not start again: %s", cell.name, cell.last_death)
                error = again

    async def _restart_once(self, cell: Cell) -> None:
        position = self._cells.index(cell)
        if self.spec.strategy is Strategy.ONE_FOR_ONE:
            group = [cell]
        elif self.spec.strategy is Strategy.REST_FOR_ONE:
            group = self._cells[position:]
        else:
            group = self._cells
        for member in reversed(group):
            if member is not cell:
                await member.stop()
        for member in group:
            await member.start()
            member.restarts += 1


def child_spec(child: ChildSpec | SupervisorSpec) -> ChildSpec:
    """The spec of a child; a nested supervisor is an actor like any other."""
    if isinstance(child, ChildSpec):
        return child
    spec = child
    return ChildSpec(name=spec.name, factory=lambda: Supervisor(spec), shutdown_s=spec.shutdown_s)


def describe_tree(cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """All cells with their depth, parents before children."""
    children: dict[str | None, list[Cell]] = {}
    for cell in cells.values():
        children.setdefault(cell.parent, []).append(cell)
    rows: list[dict[str, Any]] = []

    def visit(parent: str | None, depth: int) -> None:
        for cell in children.get(parent, ()):
            rows.append({"depth": depth, **cell.describe()})
            visit(cell.name, depth + 1)

    visit(None, 0)
    return rows
