"""The bridge: carries calls between the actors of different nodes, over TCP or within a machine.

Responsible for listening, for one outgoing link to each peer it knows, for reconnecting with
backoff, and for failing calls at once when a peer is lost. A peer whose connection breaks is dialed
again at once, and lost only if that fails: calls that may be done twice are then sent again, since
a broken connection is no reason to place a block elsewhere, or to end a journal.

Other actors do not send it messages to make calls: handles of remote actors use ``Bridge.call``,
which runs on the same loop, because a message in between would cost more than the call.

Messages in: ``set_peers`` (who is where), ``set_cluster``. Its death closes every connection: calls
in flight fail with PeerLost, callers on the data path try again, and the successor listens anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import Any, cast

from torus_actors.actors import same_machine
from torus_actors.actors.links import InLink, Link, OutCall, OutLink
from torus_actors.errors import (
    Closed,
    Invalid,
    NoPeer,
    Overloaded,
    PeerLost,
    TorusError,
    Unauthenticated,
)
from torus_actors.model.addresses import format_address
from torus_actors.model.buffers import BufferPool
from torus_actors.runtime import LoopActor, ObjectRef, expose
from torus_actors.runtime.spinner import Spinner
from torus_actors.wire.hello import Identity

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 1.0
"""A peer in the same cluster answers a SYN in milliseconds, or it is not there."""

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
"""Pause between attempts to reach a peer: a restarted one is back soon, and one attempt a second to
each dead peer costs nothing."""

REDIAL_S = 1.5
"""How long calls wait for a peer whose connection broke: no longer than for one that is silent."""

REDIAL_AFTER_S = 0.2
"""A connection that broke sooner than this is not replaced at once: it would break again."""

POOL_BYTES = 16 << 20
"""Receive buffers kept for reuse: what a reader or a store usually has in use at a time. More would
be memory beside the read cache, whose blocks it cannot tell from idle ones."""

WAITING_CALLS_MAX = 512
"""Calls that may wait for a connection being made."""

STRANGERS_MAX = 128
"""Accepted connections that may be in their handshake, beside as many as were let in at one time:
when a network breaks for a moment, all of those come back at once. For one more, one of them is
closed, whichever: an honest one is through in milliseconds and is hardly ever hit,
while one that says nothing holds its place only until others come. What strangers can make
a node hold, a receive buffer and a hello each, stays below 32 MiB, and as much again for each
hundred that were let in."""

BACKLOG = 1024
"""Connections that the system may hold before the loop gets to see them."""


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """What a bridge needs.

    Attributes:
        identity: of this node; the cluster may become known later.
        listen: ``(host, port)``, or None for a client, which nobody calls.
        secret: of the cluster, or None.
        spin_s: longest time that the loop stays awake for a message; see `Spinner`.
        shortcut: whether nodes on the same machine are reached without TCP; see `same_machine`.
    """

    identity: Identity
    listen: tuple[str, int] | None = None
    secret: bytes | None = None
    spin_s: float = 0.0
    shortcut: bool = False


class Bridge(LoopActor):
    """See the module; at the same time the system's Transport."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self._config = config
        self._identity = config.identity
        self._pool = BufferPool(POOL_BYTES)
        self._peers: dict[str, _Peer] = {}
        self._in_links: dict[InLink, None] = {}
        self._strangers: dict[Link, None] = {}
        """Those among them that have not introduced themselves yet."""
        self._known_most = 0
        """How many others there were at most."""
        self._servers: list[asyncio.Server] = []
        self._listening: tuple[str, int] | None = None
        self._closed = False
        self.changes = 0
        """Counts connections made and lost: what was derived from them is good until it moves."""

    async def setup(self) -> None:
        """Listen, and connect again to the peers the predecessor knew."""
        self._spinner = Spinner(self.system.loop, self._config.spin_s)
        if self._config.listen is not None:
            loop = self.system.loop
            near = same_machine.listen(self.system.node_id) if self._config.shortcut else None
            if near is not None:
                self._servers.append(
                    await loop.create_unix_server(self._accept, sock=near, backlog=BACKLOG)
                )
            host, port = self._config.listen
            try:
                server = await loop.create_server(self._accept, host, port, backlog=BACKLOG)
            except OSError as error:
                # asyncio's own text repeats the address.
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                raise Invalid(
                    f"cannot listen on {format_address((host, port))}: {reason}"
                ) from error
            self._servers.append(server)
            self._listening = server.sockets[0].getsockname()[:2]
        cluster = self.system.heirlooms.get("cluster_id")
        if cluster is not None:
            self._identity = replace(self._identity, cluster=cluster)
        self.system.transport = self
        self.system.bridged = True
        self.set_peers(self.system.heirlooms.get("peer_addresses", {}))

    async def cleanup(self) -> None:
        """Close everything; calls in flight fail."""
        self._closed = True
        if self.system.transport is self:
            self.system.transport = None
        for peer in list(self._peers.values()):
            peer.close(PeerLost("this node's bridge stopped"))
        self._peers.clear()
        for link in list(self._in_links):
            link.abort(Closed("this node's bridge stopped"))
        for server in self._servers:
            server.close()

    # -- messages --------------------------------------------------------------------------------

    @expose()
    def set_peers(self, addresses: dict[str, str]) -> None:
        """Know these peers and no others: node id to ``host:port``."""
        self.system.heirlooms["peer_addresses"] = dict(addresses)
        for node, peer in list(self._peers.items()):
            if not node.startswith("@") and addresses.get(node) != peer.address:
                del self._peers[node]
                peer.close(NoPeer(f"peer {node} left or moved"))
        for node, address in addresses.items():
            if node not in self._peers and node != self.system.node_id:
                self._peers[node] = peer = _Peer(self, node, address)
                peer.connect()

    @expose()
    def set_cluster(self, cluster: str | None) -> None:
        """From now on connect only with nodes of this cluster."""
        self.system.heirlooms["cluster_id"] = cluster
        self._identity = replace(self._identity, cluster=cluster)
        for link in [each for each in self._in_links if each not in self._strangers]:
            self._check_cluster(link)

    @expose()
    def listening(self) -> tuple[str, int] | None:
        """The address it listens on, with the port the system chose if that was 0."""
        return self._listening

    @expose()
    def peers(self) -> list[dict[str, Any]]:
        """Every known peer, whether it is connected, whether without TCP, and why not."""
        return [
            {
                "node": p.node,
                "address": p.address,
                "up": p.up,
                "near": p.up and p.near,
                "reason": p.reason,
                "refused": p.refused,
            }
            for p in self._peers.values()
        ]

    # -- the transport -----------------------------------------------------------------------------

    def call(
        self,
        node: str,
        actor: str,
        method: str,
        args: tuple[Any, ...],
        payload: Any,
        timeout_s: float,
        checked: bool = False,
        resend: bool = False,
    ) -> ObjectRef[Any]:
        """Call an actor of another node. Loop thread.

        Args:
            node: its id, or ``@host:port`` where only its address is known.
            actor: name of the actor there.
            method: one of its methods that other nodes may call.
            args: what the codec can carry.
            payload: None, a buffer or a list of them; not to be changed before the answer.
            timeout_s: deadline, seconds from now.
            checked: the handler verifies the payload by itself.
            resend: it may be done twice, and later than what was called after it.
        """
        ref: ObjectRef[Any] = ObjectRef(self.system, self.system.loop.time() + timeout_s)
        peer = self._peers.get(node) or self._stranger(node)
        if peer is None:
            ref.fail(NoPeer(f"no peer {node} is known"))
        elif peer.link is not None and peer.up:
            peer.link.call((ref, actor, method, args, payload, checked, resend))
        else:
            peer.call_later((ref, actor, method, args, payload, checked, resend))
        return ref

    def cast(self, node: str, actor: str, method: str, args: tuple[Any, ...], payload: Any) -> None:
        """Send without an answer; dropped if there is no connection."""
        peer = self._peers.get(node) or self._stranger(node)
        if peer is not None and peer.link is not None and peer.up:
            peer.link.cast(actor, method, args, payload)

    def is_up(self, node: str) -> bool:
        """Whether a peer is connected (this node itself always is)."""
        peer = self._peers.get(node)
        return node == self.system.node_id or (peer is not None and peer.up)

    def is_down(self, node: str) -> bool:
        """Whether a peer is known not to answer: not connected, and not just being connected."""
        if node == self.system.node_id:
            return False
        peer = self._peers.get(node)
        return peer is None or (not peer.up and peer.failures > 0)

    def _stranger(self, node: str) -> _Peer | None:
        if not node.startswith("@") or self._closed:
            return None
        peer = self._peers[node] = _Peer(self, node, node[1:])
        return peer

    # -- connections -------------------------------------------------------------------------------

    def _accept(self) -> asyncio.BaseProtocol:
        most = STRANGERS_MAX + self._known_most
        if len(self._strangers) >= most:
            # Not the newcomer: those inside may be there to keep it out.
            unlucky = self.system.rng.choice(list(self._strangers))
            unlucky.abort(PeerLost("more strangers came than there is room for"))
        link = InLink(
            self.system,
            "accept",
            self._identity,
            self._config.secret,
            self._pool,
            self._spinner,
            self._in_ready,
            self._in_lost,
        )
        self._in_links[link] = self._strangers[link] = None
        if len(self._strangers) == most:
            log.warning("%d strangers at the door: some are turned away", most)
        return link

    def _in_ready(self, link: Link) -> None:
        self._strangers.pop(link, None)
        self._known_most = max(self._known_most, len(self._in_links) - len(self._strangers))
        self._check_cluster(link)

    def _check_cluster(self, link: Link) -> None:
        """Before it was known of which cluster this node is those of any could come in."""
        ours, theirs = self._identity.cluster, link.peer.cluster
        if ours is not None and theirs not in (None, ours):
            link.abort(Unauthenticated(f"this node belongs to cluster {ours}"))

    def _in_lost(self, link: Link, reason: TorusError) -> None:
        self._in_links.pop(cast(InLink, link), None)
        self._strangers.pop(link, None)

    def shortcut_to(self, peer: _Peer) -> socket.socket | None:
        """A connection with a peer that is on this machine, if it is.

        After one that came to nothing there is none: a name that somebody else has taken keeps
        nobody away.
        """
        if not self._config.shortcut or peer.misled:
            return None
        return same_machine.connect(peer.node)

    def make_link(self, peer: _Peer) -> OutLink:
        """A new outgoing link for a peer."""
        return OutLink(
            self.system,
            "dial",
            self._identity,
            self._config.secret,
            self._pool,
            self._spinner,
            peer.link_ready,
            peer.link_lost,
        )


class _Peer:
    """One peer: its link, or the attempts to get one."""

    def __init__(self, bridge: Bridge, node: str, address: str) -> None:
        self.bridge = bridge
        self.node = node
        self.address = address
        self.link: OutLink | None = None
        self.up = False
        self.near = False
        self.misled = False
        """Whether the last attempt was without TCP, and failed."""
        self.failures = 0
        self.reason = ""
        self.refused = False
        """Whether that is why: it does not take this process for one of the cluster."""
        self._waiting: list[OutCall] = []
        self._timer: asyncio.TimerHandle | None = None
        """To dial again, or to wait no longer for that."""
        self._up_since = 0.0
        self._connecting = False
        self._closed = False

    def call_later(self, call: OutCall) -> None:
        """No link now: wait for the attempt under way, or fail if attempts keep failing."""
        ref = call[0]
        if self._closed or (self.failures and not self._connecting_first()):
            ref.fail(PeerLost(f"{self._name()} cannot be reached: {self.reason}"))
            return
        if len(self._waiting) >= WAITING_CALLS_MAX:
            ref.fail(Overloaded(f"too many calls wait for {self._name()}"))
            return
        self._waiting.append(call)
        self.connect()

    def _connecting_first(self) -> bool:
        # An address is dialed because of the call itself, so each call deserves an attempt.
        return self.node.startswith("@")

    def _name(self) -> str:
        return self.address if self.node.startswith("@") else f"peer {self.node[:8]}"

    def connect(self) -> None:
        """Start an attempt unless one is under way."""
        if self._connecting or self.up or self._closed or self.bridge.actor_stopped.is_set():
            return
        self._stop_timer()
        self._connecting = True
        self.bridge.spawn(self._connect())

    async def _connect(self) -> None:
        loop = self.bridge.system.loop
        host, _, port = self.address.rpartition(":")
        try:
            near = self.bridge.shortcut_to(self)
            self.near = near is not None
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if near is not None:
                    await same_machine.hand_over(near, self._new_link)
                else:
                    await loop.create_connection(self._new_link, host.strip("[]"), int(port))
        except (OSError, TimeoutError, ValueError, OverflowError) as error:
            text = "no answer" if isinstance(error, TimeoutError) else _plain(error)
            if self.link is not None:
                self.link.abort(PeerLost(text))  # connected, but too late
            else:
                self._failed(PeerLost(text))

    def _new_link(self) -> OutLink:
        self.link = self.bridge.make_link(self)
        return self.link

    def link_ready(self, link: Link) -> None:
        """The handshake is done."""
        expected = self.node
        if self._closed:
            link.abort(Closed("no longer wanted"))
            return
        if not expected.startswith("@") and link.peer.node != expected:
            link.abort(PeerLost(f"{self.address} is now node {link.peer.node}"))
            return
        self._stop_timer()
        self._connecting = False
        self.bridge.changes += 1
        self.up = True
        self._up_since = self.bridge.system.loop.time()
        self.failures = 0
        self.reason = ""
        self.refused = False
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if not call[0].done():
                cast(OutLink, link).call(call)

    def link_lost(self, link: Link, reason: TorusError) -> None:
        """The link broke, or never came to be."""
        if link is not self.link:
            return
        link, self.link = self.link, None
        lasted = self.bridge.system.loop.time() - self._up_since
        stranger = self.node.startswith("@")
        if self.up and link.broken and lasted >= REDIAL_AFTER_S and not (stranger or self._closed):
            self._redial(link.take_resent())
        else:
            self._failed(reason)

    def _redial(self, unanswered: list[OutCall]) -> None:
        """The connection broke, which says little of the peer: one attempt may tell more."""
        log.info("%s: the connection broke, dialing again", self._name())
        self.bridge.changes += 1
        self.up = False
        self._waiting = unanswered
        self.connect()
        self._timer = self.bridge.system.loop.call_later(
            REDIAL_S, self._lost, PeerLost(f"no connection again within {REDIAL_S:g} s")
        )

    def _failed(self, error: TorusError) -> None:
        """There is no connection, and no attempt either."""
        self._stop_timer()
        if self.up and not self._closed:
            log.info("%s lost: %s", self._name(), error)
        self._connecting = False
        self.misled = self.near and not self.up
        self.up = False
        self._lost(error)
        if self._closed or self.node.startswith("@"):
            return
        pause = min(BACKOFF_FIRST_S * 2 ** min(self.failures - 1, 10), BACKOFF_MAX_S)
        pause *= 0.75 + self.bridge.system.rng.random() / 2
        self._timer = self.bridge.system.loop.call_later(pause, self.connect)

    def _lost(self, error: TorusError) -> None:
        """Nobody is to wait for this peer."""
        self.bridge.changes += 1
        self.failures += 1
        self.reason = str(error)
        self.refused = isinstance(error, Unauthenticated)
        waiting, self._waiting = self._waiting, []
        for ref, *_ in waiting:
            failure = error if not isinstance(error, PeerLost) else None
            ref.fail(failure or PeerLost(f"{self._name()} cannot be reached: {error}"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, error: TorusError) -> None:
        """Give the peer up."""
        self._closed = True
        if self.link is not None:
            self.link.abort(error)
        self._failed(error)


def _plain(error: Exception) -> str:
    """An error of the system as a few words."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return getattr(error, "strerror", None) or str(error)
