"""The actor runtime: Ray's way of calling, Erlang's way of keeping alive, on pykka.

Where to read: ``system`` (handles: how a call is made), ``actor`` (how it is handled), ``cell``
(what outlives an actor), ``supervision`` (who restarts it), ``refs`` (the answer), ``messages``
(the marks on methods).
"""

from torus_actors.runtime.actor import BlockingActor, LoopActor
from torus_actors.runtime.cell import Cell, ChildSpec, Restart, State
from torus_actors.runtime.messages import Buffer, Reply, expose
from torus_actors.runtime.refs import ObjectRef, get, wait
from torus_actors.runtime.supervision import Strategy, SupervisorSpec
from torus_actors.runtime.system import ActorHandle, ActorSystem

PERMANENT = Restart.PERMANENT
TRANSIENT = Restart.TRANSIENT
TEMPORARY = Restart.TEMPORARY

__all__ = [
    "PERMANENT",
    "TEMPORARY",
    "TRANSIENT",
    "ActorHandle",
    "ActorSystem",
    "BlockingActor",
    "Buffer",
    "Cell",
    "ChildSpec",
    "LoopActor",
    "ObjectRef",
    "Reply",
    "Restart",
    "State",
    "Strategy",
    "SupervisorSpec",
    "expose",
    "get",
    "wait",
]
