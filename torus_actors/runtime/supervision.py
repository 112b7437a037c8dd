"""Supervision as data: frozen trees of specs, and the actor that keeps one level of them alive."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torus_actors.errors import ActorCrashed, Invalid, TorusError
from torus_actors.runtime.actor import LoopActor
from torus_actors.runtime.cell import Cell, ChildSpec, GaveUp, Restart, State
from torus_actors.runtime.messages import expose

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
        shutdown_s: how long all its children together may take to stop; then they are killed.
    """

    name: str
    children: tuple[ChildSpec | SupervisorSpec, ...]
    strategy: Strategy = Strategy.ONE_FOR_ONE
    max_restarts: int = 10
    period_s: float = 30.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    shutdown_s: float = 30.0


class IntensityExceeded(GaveUp):
    """A supervisor gave up: its children died too often."""


class Supervisor(LoopActor):
    """Starts the children of its spec, restarts them as it says, escalates when that fails."""

    setup_timeout_s: ClassVar[float | None] = None  # its children have their own, each

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
        """Stop all children, the last started first.

        When this is for good, those that are still to be stopped are kept alive meanwhile: others
        may need them for the last thing that they do, as a flush is.
        """
        keeper: asyncio.Task[None] | None = None
        try:
            for cell in reversed(self._cells):
                # It may become so while they are stopped for a successor.
                if not self.cell.will_restart:
                    if keeper is None:
                        for each in filter(_is_missed, self._cells):
                            # Whoever was at it has ended with what this actor did until now.
                            self._child_exited(each, ActorCrashed(f"{each.name} was dead"))
                        keeper = self.system.loop.create_task(self._keep_to_the_end())
                    await self._revive(cell)
                await cell.stop(final=not self.cell.will_restart)
        except asyncio.CancelledError:
            # Out of time. None may live on: a successor would start it a second time.
            for cell in reversed(self._cells):
                cell.kill("its supervisor ran out of time to stop it")
            raise
        finally:
            if keeper is not None:
                keeper.cancel()

    async def _keep_to_the_end(self) -> None:
        try:
            await self._keep()
        except IntensityExceeded as error:
            log.warning("%s: %s", self.spec.name, error)

    async def _revive(self, cell: Cell) -> None:
        """Start a child once more that had died and waited for that: its last work is undone."""
        await cell.settled()
        if _is_missed(cell):
            try:
                await cell.start()
            except Exception as error:
                log.warning("%s: %s cannot end in order: %r", self.spec.name, cell.name, error)

    @expose()
    async def start_child(self, child: ChildSpec | SupervisorSpec) -> None:
        """Start one more child, behind the others; for what can only be known later.

        Raises:
            Invalid: a child of that name is already there.
            ActorCrashed: it did not start; this supervisor lives on.
            TorusError: its setup raised this.
        """
        spec = child_spec(child)
        if any(cell.name == spec.name for cell in self._cells):
            raise Invalid(f"{self.spec.name} already has a child {spec.name}")
        cell = self.system.cell_for(spec, self.cell.name)
        cell.on_exit = self._child_exited
        try:
            await cell.start()
        except TorusError:
            raise
        except Exception as error:
            raise ActorCrashed(f"{spec.name} did not start: {error!r}") from error
        self._cells.append(cell)
        self.spec = replace(self.spec, children=(*self.spec.children, child))

    def _child_exited(self, cell: Cell, error: BaseException | None) -> None:
        self._exits.put_nowait((cell, error))

    async def _keep(self) -> None:
        while True:
            cell, error = await self._exits.get()
            if cell.state is State.RUNNING:
                continue  # already restarted along with a sibling
            done = error is None and cell.spec.restart is Restart.TRANSIENT
            if done or not cell.will_restart:
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
                    f"children of {self.spec.name} died {recent} times in "
                    f"{self.spec.period_s:g} s, last {cell.name}: {error!r}"
                ) from error
            if recent > 1:
                pause = min(self.spec.backoff_first_s * 2 ** (recent - 2), self.spec.backoff_max_s)
                await asyncio.sleep(pause)
                if not cell.will_restart:
                    return  # removed while it was to be restarted
            try:
                await self._restart_once(cell)
                return
            except Exception as again:
                log.warning("%s: restarting %s failed: %r", self.spec.name, cell.name, again)
                error = again

    async def _restart_once(self, cell: Cell) -> None:
        position = self._cells.index(cell)
        if self.spec.strategy is Strategy.ONE_FOR_ONE:
            group = [cell]
        elif self.spec.strategy is Strategy.REST_FOR_ONE:
            group = self._cells[position:]
        else:
            group = self._cells
        # All of them: in the attempt before this one some had come up before another failed.
        for member in reversed(group):
            await member.stop(final=member.spec.restart is Restart.TEMPORARY)
        for member in group:
            if member.will_restart:  # not a temporary one, nor one that had ended for good
                member.restarts += 1  # first: who gets an answer of the new one sees it counted
                await member.start()


def _is_missed(cell: Cell) -> bool:
    """Whether it has run, and is to run again."""
    return cell.actor is None and cell.will_restart and cell.started_at > 0


def child_spec(child: ChildSpec | SupervisorSpec) -> ChildSpec:
    """The spec of a child; a nested supervisor is an actor like any other."""
    if isinstance(child, ChildSpec):
        return child
    spec = child
    return ChildSpec(name=spec.name, factory=lambda: Supervisor(spec), shutdown_s=spec.shutdown_s)


def check_names(root: SupervisorSpec) -> None:
    """Names are addresses.

    Raises:
        Invalid: two actors of the tree have the same one.
    """
    seen: set[str] = set()
    specs: list[ChildSpec | SupervisorSpec] = [root]
    for spec in specs:
        if spec.name in seen:
            raise Invalid(f"two actors are named {spec.name}")
        seen.add(spec.name)
        if isinstance(spec, SupervisorSpec):
            specs.extend(spec.children)


def describe_tree(cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """All cells with their depth, parents before children."""
    children: dict[str | None, list[Cell]] = {}
    for cell in cells.values():
        parent = cell.parent if cell.parent in cells else None
        children.setdefault(parent, []).append(cell)
    rows: list[dict[str, Any]] = []

    def visit(parent: str | None, depth: int) -> None:
        for cell in children.get(parent, ()):
            rows.append({"depth": depth, **cell.describe()})
            visit(cell.name, depth + 1)

    visit(None, 0)
    return rows
