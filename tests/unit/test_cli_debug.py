"""Passes that ``torusctl debug`` has all nodes make, and waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tests.fakes import virtual
from torus_actors.cli import common, connect
from torus_actors.cli.common import Failed, Settings
from torus_actors.cli.ctl import cli
from torus_actors.cli.ctl_debug import (
    SILENT_S_MAX,
    _journals_of_leavers,
    _rebalance,
    _scrub,
    debug,
)
from torus_actors.errors import DeadlineExceeded, TorusError
from torus_actors.metadata.cluster import Registrations

COUNTS = "seen total left damaged failed unread sent dropped waiting yielded"
ZEROS = dict.fromkeys(COUNTS.split(), 0)


class Node:
    """Makes a pass in the time of a few questions, and gives these errors before answers."""

    def __init__(self, passes: int, errors: list[TorusError | None]) -> None:
        self.passes, self.errors = passes, errors
        self.left, self.length = 0, 3
        self.asked = False
        self.damaged = 7
        self.failed = self.unread = 0
        self.starts_again = False
        self.rings: list[int] = []

    def ask(self, method: str) -> Any:
        """Answer, or not."""
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            return error
        if method == "start_pass":
            self.asked = True  # also in a pass: then another one follows
            if self.starts_again:
                self.starts_again, self.passes, self.damaged = False, 0, 0
            return None
        if not self.left and self.asked:
            self.asked, self.left = False, self.length
        elif self.left:
            self.left -= 1
            self.passes += not self.left
            self.damaged += not self.left
        count = {"passes": self.passes, "running": self.left > 0, "damaged": self.damaged}
        if self.rings:
            count["ring_version"] = self.rings[min(self.passes, len(self.rings) - 1)]
        return {**ZEROS, **count, "failed": self.failed, "unread": self.unread}


@pytest.fixture
def unread() -> dict[str, str]:
    """Of nodes whose registration cannot be read, what is wrong with it."""
    return {}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, unread: dict[str, str]) -> dict[str, Node]:
    """Two nodes, the second of which does not answer some questions."""
    late = DeadlineExceeded("no answer within 2.5 s")
    made = {"a": Node(4, []), "b": Node(9, [late, None, late, late, None, None, late])}

    class Connection:
        async def cluster(self) -> tuple[None, Any]:
            return None, SimpleNamespace(members=tuple(made), peers=(), version=3)

        async def ask_all(self, addresses: list[str], actor: str, method: str) -> list[Any]:
            return [made[address].ask(method) for address in addresses]

        @property
        def meta(self) -> Any:
            async def peers() -> list[Any]:
                return [SimpleNamespace(peer_id=name, address=name) for name in made]

            async def registrations() -> Registrations:
                return Registrations(await peers(), unread, {})

            return SimpleNamespace(peers=peers, registrations=registrations)

    @contextlib.asynccontextmanager
    async def connected(settings: Settings) -> AsyncIterator[Connection]:
        yield Connection()

    monkeypatch.setattr(connect, "connect", connected)
    return made


@virtual
async def _scrubs() -> None:
    assert await _scrub(Settings(), 60.0) == (2, 0, 0)


@virtual
async def _rebalances() -> None:
    await _rebalance(Settings(), 60.0)


@pytest.mark.parametrize("command", ["tree", "debug scrub", "debug rebalance"])
def test_a_cluster_without_nodes_has_none_that_could_answer(
    nodes: dict[str, Node], command: str
) -> None:
    """And what to do about it is told."""
    nodes.clear()
    done = CliRunner().invoke(cli, command.split(), obj=Settings())
    assert isinstance(done.exception, Failed) and "no node is up: start" in str(done.exception)


def test_a_node_that_is_busy_is_asked_again(nodes: dict[str, Node]) -> None:
    """It leaves questions without an answer, in any place; the command goes on."""
    errors = list(nodes["b"].errors)
    _scrubs()
    nodes["b"].errors = errors
    _rebalances()
    assert nodes["a"].passes > 5 and nodes["b"].passes > 10


def test_a_pass_by_an_earlier_ring_tells_nothing_of_this_one(nodes: dict[str, Node]) -> None:
    """Found by reading: what had yet to hear that it is out of the ring had nothing to hand over.

    With the node, which could be switched off as it seemed, went the only copies.
    """
    nodes["a"].rings, nodes["b"].rings = [3], [2] * 15 + [3]
    _rebalances()
    assert nodes["b"].passes >= 15
    nodes["b"].rings = [2]

    @virtual
    async def fails() -> None:
        with pytest.raises(Failed, match="last pass: b has not heard of ring version 3"):
            await _rebalance(Settings(), 60.0)

    fails()


def test_a_node_that_starts_again_counts_from_the_beginning(nodes: dict[str, Node]) -> None:
    """It has made a pass when it has made one since, not when it has made as many as before."""
    nodes["b"].starts_again = True
    _scrubs()
    nodes["b"].starts_again = True
    _rebalances()
    assert 0 < nodes["b"].passes < 4


def test_damage_is_counted_once(nodes: dict[str, Node]) -> None:
    """A node that is done makes another pass while a slow one has yet to end its first."""
    nodes["b"].errors, nodes["b"].length = [], 12
    _scrubs()
    assert nodes["a"].damaged > 8


def test_what_a_disk_did_not_read_is_no_damage(
    nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as what it is, and beside what was repaired."""
    monkeypatch.setattr(common, "set_up_logging", lambda *_, **__: None)
    nodes["b"].errors = []
    ask = nodes["b"].ask

    def slow(method: str) -> Any:
        nodes["b"].failed = nodes["b"].unread = 3 * (method == "start_pass" or nodes["b"].asked)
        return ask(method)

    nodes["b"].ask = slow  # type: ignore[method-assign]
    done = CliRunner().invoke(debug, ["scrub"], obj=Settings())
    assert done.output == "scrubbed: 2 damaged copies found, 2 repaired\n"
    assert str(done.exception) == "3 copies were not read by their disk in time: see its node's log"


@pytest.mark.parametrize("command", [_scrub, _rebalance])
def test_a_node_that_stays_silent_is_named(nodes: dict[str, Node], command: Any) -> None:
    """Not for ever: the one line says which, and how it failed."""
    nodes["b"].errors = [DeadlineExceeded("no answer within 2.5 s")] * 1000

    @virtual
    async def fails() -> None:
        with pytest.raises(Failed, match="node b: no answer"):
            await command(Settings(), 10 * SILENT_S_MAX)

    fails()


@pytest.mark.parametrize("command", ["debug scrub", "debug rebalance"])
def test_a_node_whose_registration_cannot_be_read_is_named(
    nodes: dict[str, Node],
    unread: dict[str, str],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may have blocks that are nowhere else, so all is not balanced for sure; others are asked.

    Found by review: the command ended at once.
    """
    unread["c"] = "peers/c: nonsense"
    told = "node c was not asked: its registration cannot be read: peers/c: nonsense"
    if command == "debug scrub":
        _scrubs()
        assert capsys.readouterr().err == told + "\n"
    else:
        with pytest.raises(Failed, match=told):
            _rebalances()
    assert nodes["a"].passes > 4 and nodes["b"].passes > 9
    monkeypatch.setattr(common, "set_up_logging", lambda *_, **__: None)
    nodes.clear()
    done = CliRunner().invoke(cli, command.split(), obj=Settings())
    assert isinstance(done.exception, Failed) and str(done.exception) == told


def looked(
    begun: int, read: int, unreplayed: int = 0, still_open: int = 0, failed: int = 0
) -> dict[str, int]:
    """What a collector says that has begun so many passes, and has told of the journal in one."""
    return {
        "passes": read,
        "failed_passes": failed,
        "begun": begun,
        "journals_read": read,
        "unreplayed": unreplayed,
        "unreplayed_open": still_open,
    }


async def kept(*statuses: dict[str, int]) -> list[str]:
    """Why a node that has left the ring must stay, as its collector says this, one by one."""
    left = list(statuses)

    async def ask_all(addresses: list[str], actor: str, method: str) -> list[Any]:
        assert actor == "collector" and addresses in (["at 1"], [])
        if not addresses:
            return []
        return [left.pop(0) if method == "status" and len(left) > 1 else left[0]]

    async def cluster() -> tuple[None, Any]:
        return None, SimpleNamespace(members=("member",))

    connection: Any = SimpleNamespace(ask_all=ask_all, cluster=cluster)
    async with asyncio.timeout(60.0):
        return await _journals_of_leavers(connection, {"leaver": "at 1", "member": "at 2"})


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([looked(5, 5), looked(6, 5)], id="none"),
        pytest.param([looked(5, 4), looked(5, 5), looked(6, 5)], id="under way"),
        pytest.param([looked(5, 5), looked(6, 5), looked(7, 5, failed=1)], id="failed"),
        pytest.param(
            [looked(5, 5), looked(6, 6, still_open=1), looked(7, 6, still_open=1)], id="open"
        ),
        pytest.param([looked(5, 5), looked(0, 0), looked(1, 0)], id="started again"),
    ],
)
@pytest.mark.parametrize("count", [0, 1])
def test_a_node_that_leaves_has_looked_into_its_journal_since(
    before: list[dict[str, int]], count: int
) -> None:
    """In a pass that began after the question, and when no client had a volume open any more."""
    last = before[-1]
    following = looked(last["begun"] + 1, last["begun"] + 1, count, failed=last["failed_passes"])

    @virtual
    async def ask() -> None:
        told = await kept(*before, following)
        assert len(told) == count
        assert all(each.startswith("node leaver must stay for now: ") for each in told)

    ask()


@virtual
async def test_a_node_of_the_version_before_may_leave_without_a_look() -> None:
    """It does not say which of its passes have read the journal: nobody waits for it."""
    assert await kept({"passes": 5, "failed_passes": 0, "unreplayed": 0}) == []


def test_no_journal_is_given_up_by_mistake() -> None:
    """Without the option that says so nothing is even looked at, and the line says what is lost."""
    done = CliRunner().invoke(cli, ["debug", "give-up-journal", "v"], obj=Settings())
    assert done.exit_code == 1
    said = str(done.exception) if isinstance(done.exception, Failed) else done.output
    assert "after its last commit" in said and "--yes-i-am-sure" in said
