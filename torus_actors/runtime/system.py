"""The actor system of one node: its cells, handles, and the way to actors of other nodes."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torus_actors.errors import ActorNotFound, Invalid, NoPeer, Overloaded, PeerLost
from torus_actors.runtime.actor import BlockingDelay
from torus_actors.runtime.cell import Cell, ChildSpec, State, no_parent
from torus_actors.runtime.messages import Call
from torus_actors.runtime.refs import Deadlines, ObjectRef, RoundtripRef
from torus_actors.runtime.supervision import (
    SupervisorSpec,
    check_names,
    child_spec,
    describe_tree,
)

CALL_TIMEOUT_S = 30.0
"""Deadline of a call that names none. Calls on the data path name theirs."""

_current: contextvars.ContextVar[ActorSystem] = contextvars.ContextVar("torus_actors_system")


class Transport(Protocol):
    """What carries calls to other nodes: the bridge."""

    def call(
        self,
        node: str,
        actor: str,
        method: str,
        args: tuple[Any, ...],
        payload: Any,
        timeout_s: float,
        checked: bool,
        resend: bool,
    ) -> ObjectRef[Any]:
        """Send a call; never blocks, errors come through the ref."""

    def cast(self, node: str, actor: str, method: str, args: tuple[Any, ...], payload: Any) -> None:
        """Send a message without an answer; dropped if the peer is not connected."""


class Background(dict[asyncio.Task[Any], None]):
    """Tasks that belong to no actor, oldest first: the order in which they are ended is fixed."""

    def add(self, task: asyncio.Task[Any]) -> None:
        """Keep a task."""
        self[task] = None

    def discard(self, task: asyncio.Task[Any]) -> None:
        """Forget a task; nothing if it is not there."""
        self.pop(task, None)


class ActorSystem:
    """All actors of one node.

    Args:
        loop: the event loop they run on; the constructor must run on its thread.
        node_id: this node's id; handles for it are local.
        rng: source of all randomness on this node.
        roundtrip: test mode: a function that packs and unpacks a value, applied to the arguments
            and the answer of each local call, so that what cannot travel is found on one node.
            Payloads are left alone: buffers travel as they are.
        blocking_delay_s: run blocking actors on the loop as well, without threads, each call after
            the delay that this says: for a loop with virtual time, on which nothing blocks.

    Attributes:
        heirlooms: objects that must survive the actors that use them (client sockets, unflushed
            data), by name. A successor finds here what its predecessor held.
        transport: the way to other nodes; None where there is no bridge, or not now.
        bridged: whether there has been one: then calls may be tried again.
        context: the context that the actors run in; ``current()`` is this system there.
        fatal: set when the root supervisor gave up; its exception is the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        node_id: str = "local",
        rng: random.Random | None = None,
        roundtrip: Callable[[Any], Any] | None = None,
        blocking_delay_s: BlockingDelay | None = None,
    ) -> None:
        self.loop = loop
        self.thread_id = threading.get_ident()
        self.node_id = node_id
        self.rng = rng if rng is not None else random.Random()
        self.roundtrip = roundtrip
        self.blocking_delay_s = blocking_delay_s
        self.cells: dict[str, Cell] = {}
        self.heirlooms: dict[str, Any] = {}
        self.deadlines = Deadlines(loop, self.thread_id)
        self.background = Background()
        self.transport: Transport | None = None
        self.bridged = False
        self.fatal: asyncio.Future[None] = loop.create_future()
        self._root: Cell | None = None
        _current.set(self)
        self.context = contextvars.copy_context()

    def on_loop(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function(*args)`` on the loop: now if this is its thread, soon otherwise.

        A blocking call may outlast the loop. What it then says concerns nobody.
        """
        if threading.get_ident() == self.thread_id:
            function(*args)
            return
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    @staticmethod
    def current() -> ActorSystem:
        """The system of the actor that asks; elsewhere the last that was made in the context."""
        return _current.get()

    async def start(self, root: SupervisorSpec) -> None:
        """Start the supervision tree.

        Raises:
            Exception: what the first failing child raised; everything is stopped again.
        """
        check_names(root)
        if self._root is not None:
            raise Invalid("the system has its tree already")
        cell = self.cell_for(child_spec(root), None)
        cell.on_exit = self._root_exited
        self._root = cell
        try:
            await cell.start()
        except BaseException:
            await self.stop()
            self._root = None
            raise

    def _root_exited(self, cell: Cell, error: BaseException | None) -> None:
        cell.bury()
        if not self.fatal.done():
            self.fatal.set_exception(error or RuntimeError("the root supervisor stopped"))
            self.fatal.exception()  # the owner may look later, or never

    async def stop(self) -> None:
        """Stop all actors, the last started first, and fail what still waits.

        For the owner of the system: a handler that awaits it waits for its own end.
        """
        # Those outside the tree came later and may use those in it.
        outside = [cell for cell in self.cells.values() if cell.parent is None]
        for cell in reversed(outside):
            if cell is not self._root:
                await cell.stop(final=True)
        if self._root is not None:
            await self._root.stop(final=True)
        for cell in list(reversed(self.cells.values())):
            await cell.stop(final=True)
        for task in list(self.background):
            task.cancel()
        if self.background:
            await asyncio.wait(list(self.background))
        self.deadlines.close()

    def cell_for(self, spec: ChildSpec, parent: str | None) -> Cell:
        """The cell of that name; a supervisor that restarts finds its children's cells again."""
        cell = self.cells.get(spec.name)
        if cell is None:
            cell = self.cells[spec.name] = Cell(self, spec, parent)
        else:
            cell.spec = spec
            cell.parent = parent
        return cell

    async def spawn(self, spec: ChildSpec, parent: str | None = None) -> ActorHandle:
        """Start one actor outside the tree; it is not restarted unless ``parent`` sees to it."""
        existing = self.cells.get(spec.name)
        if existing is not None and existing.state is not State.STOPPED:
            raise Invalid(f"an actor named {spec.name} is already running")
        cell = self.cell_for(spec, parent)
        cell.on_exit = no_parent
        try:
            await cell.start()
        except BaseException:
            cell.bury()
            raise
        return self.actor(spec.name)

    async def remove(self, name: str) -> None:
        """Stop an actor for good and forget it."""
        cell = self.cells.pop(name, None)
        if cell is not None:
            await cell.stop(final=True)

    def actor(self, name: str, node: str | None = None) -> ActorHandle:
        """A handle for an actor here (``node`` None or this node's id) or on another node."""
        if node is None or node == self.node_id:
            return ActorHandle(self, name, None)
        return ActorHandle(self, name, node)

    def load(self, name: str) -> tuple[bool, int]:
        """How much an actor here has to do; see `Cell.load`."""
        cell = self.cells.get(name)
        return (False, 0) if cell is None else cell.load()

    def tree(self) -> list[dict[str, Any]]:
        """Every actor with depth, state, restarts and last cause of death."""
        return describe_tree(self.cells)


class ActorHandle:
    """Stands for an actor by name, here or on another node; lives through restarts.

    ``handle.method.remote(...)`` calls, ``handle.method.tell(...)`` sends without an answer.
    """

    def __init__(self, system: ActorSystem, name: str, node: str | None) -> None:
        self._system = system
        self._name = name
        self._node = node

    def __getattr__(self, method: str) -> MethodHandle:
        if method.startswith("_"):
            raise AttributeError(method)
        kind = LocalMethod if self._node is None else RemoteMethod
        bound = kind(self._system, self._name, method, self._node)
        self.__dict__[method] = bound
        return bound

    def __repr__(self) -> str:
        return f"<actor {self._name} on {self._node or 'this node'}>"


class MethodHandle:
    """One method of an actor, callable by message."""

    __slots__ = ("_cell", "_method", "_name", "_node", "_system")

    def __init__(self, system: ActorSystem, name: str, method: str, node: str | None) -> None:
        self._system = system
        self._name = name
        self._method = method
        self._node = node
        self._cell: Cell | None = None

    def remote(
        self,
        *args: Any,
        payload: Any = None,
        timeout_s: float = CALL_TIMEOUT_S,
        checked: bool = False,
        resend: bool = False,
    ) -> ObjectRef[Any]:
        """Call; returns at once.

        Args:
            args: positional arguments; for another node, what the codec can carry.
            payload: bulk data beside the message: a buffer, or a list of them.
            timeout_s: deadline, seconds from now.
            checked: the handler verifies every byte of the payload by checksums among its
                arguments; so the way there need not.
            resend: it may be done twice, and at another time: so it may be sent again, should the
                connection break.
        """
        raise NotImplementedError

    def tell(self, *args: Any, payload: Any = None) -> None:
        """Send without wanting an answer; dropped where there is no such actor.

        Raises:
            Overloaded: the local inbox is full.
        """
        raise NotImplementedError

    async def call(self, *args: Any, payload: Any = None, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call and await the answer; where the inbox is full, wait for room first."""
        return await self.remote(*args, payload=payload, timeout_s=timeout_s)


class LocalMethod(MethodHandle):
    """A method of an actor on this node: nothing is serialised, nothing copied."""

    __slots__ = ()

    def _find(self) -> Cell | None:
        cell = self._cell
        if cell is None or self._system.cells.get(self._name) is not cell:
            cell = self._cell = self._system.cells.get(self._name)
        return cell

    def remote(
        self,
        *args: Any,
        payload: Any = None,
        timeout_s: float = CALL_TIMEOUT_S,
        checked: bool = False,
        resend: bool = False,
    ) -> ObjectRef[Any]:
        """See MethodHandle."""
        system = self._system
        ref_type = ObjectRef if system.roundtrip is None else RoundtripRef
        ref: ObjectRef[Any] = ref_type(system, system.loop.time() + timeout_s)
        cell = self._find()
        if cell is None or cell.ended:
            told = f"no actor {self._name} here" if cell is None else cell.epitaph()
            ref.fail(ActorNotFound(told))
        elif cell.waiting() >= cell.spec.inbox_max:
            ref.fail(Overloaded(f"{self._name} has {cell.spec.inbox_max} messages waiting"))
        else:
            if system.roundtrip is not None:
                args = tuple(system.roundtrip(list(args)))
            kwargs = {} if payload is None else {"payload": payload}
            cell.inbox.put(Call(self._method, args, kwargs, ref))
        return ref

    def tell(self, *args: Any, payload: Any = None) -> None:
        """See MethodHandle."""
        cell = self._find()
        if cell is None or cell.ended:
            return
        if cell.waiting() >= cell.spec.inbox_max:
            raise Overloaded(f"{self._name} has {cell.spec.inbox_max} messages waiting")
        if self._system.roundtrip is not None:
            args = tuple(self._system.roundtrip(list(args)))
        cell.inbox.put(
            Call(self._method, args, {} if payload is None else {"payload": payload}, None)
        )

    async def call(self, *args: Any, payload: Any = None, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """See MethodHandle."""
        time = self._system.loop.time
        deadline = time() + timeout_s
        while (cell := self._find()) is not None and cell.waiting() >= cell.spec.inbox_max:
            await cell.room(deadline - time())
        return await self.remote(*args, payload=payload, timeout_s=deadline - time())


class RemoteMethod(MethodHandle):
    """A method of an actor on another node."""

    __slots__ = ()

    def remote(
        self,
        *args: Any,
        payload: Any = None,
        timeout_s: float = CALL_TIMEOUT_S,
        checked: bool = False,
        resend: bool = False,
    ) -> ObjectRef[Any]:
        """See MethodHandle."""
        transport = self._system.transport
        assert self._node is not None
        if transport is None:
            ref: ObjectRef[Any] = ObjectRef(self._system)
            if self._system.bridged:
                ref.fail(PeerLost("this node's bridge has stopped, or is being started again"))
            else:
                ref.fail(NoPeer("this node has no bridge to others"))
            return ref
        return transport.call(
            self._node, self._name, self._method, args, payload, timeout_s, checked, resend
        )

    def tell(self, *args: Any, payload: Any = None) -> None:
        """See MethodHandle."""
        if self._system.transport is not None:
            assert self._node is not None
            self._system.transport.cast(self._node, self._name, self._method, args, payload)


class Blueprint:
    """An actor class with options, ready to be started: ``Cls.options(name="x").remote(args)``."""

    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        self._cls = cls
        self._options = options

    def spec(self, *args: Any, **kwargs: Any) -> ChildSpec:
        """The child spec of an actor made with these arguments."""
        options = dict(self._options)
        options.setdefault("name", self._cls.__name__)
        return ChildSpec(factory=lambda: self._cls(*args, **kwargs), **options)

    async def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Start the actor in the current system and return its handle once it is set up."""
        return await ActorSystem.current().spawn(self.spec(*args, **kwargs))
