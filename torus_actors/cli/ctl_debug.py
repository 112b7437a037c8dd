"""``torusctl debug``: looking inside, and breaking things on purpose."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from torus_actors.cli.common import Failed, Group, Seconds, Settings, json_option, run
from torus_actors.cli.nodes import short
from torus_actors.cli.output import open_stdout, print_json
from torus_actors.cli.progress import Advance, progress_bar, shows_bars
from torus_actors.errors import TRANSIENT

if TYPE_CHECKING:
    from torus_actors.cli.connect import Connection
    from torus_actors.model.ring_base import Ring

POLL_S = 0.3

MOVE_S_MAX = 30.0
"""A client that is to move its journal off a node needs no longer, if there are nodes for it."""

ASK_AGAIN_S = 5.0
"""A pass may have been asked for just before the one that tells could begin."""

SILENT_S_MAX = 20.0
"""A node that is busy, or is just started again, answers late; after so long it is given up."""


@click.group(cls=Group)
def debug() -> None:
    """Look inside, and break things on purpose."""


@debug.command("dump")
@json_option
@click.pass_obj
def debug_dump(settings: Settings, as_json: bool) -> None:
    """Print every metadata key with its record."""

    async def work() -> Sequence[tuple[str, Any]]:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            return await connection.patiently(connection.meta.dump)

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {name: plain(item) for name, item in dataclasses.asdict(value).items()}
        return value

    items = {key: plain(record) for key, record in run(settings, work())}
    if as_json:
        print_json(items)
        return
    for key, record in items.items():
        if isinstance(record, dict):
            record = " ".join(f"{name}={value}" for name, value in record.items())
        click.echo(f"{key} {record}", open_stdout())


@debug.command("kill")
@click.argument("node")
@click.argument("actor")
@click.pass_obj
def debug_kill(settings: Settings, node: str, actor: str) -> None:
    """Kill an actor of NODE as a bug would; its supervisor restarts it."""

    async def work() -> str:
        from torus_actors.cli.connect import connect

        async with connect(settings) as connection:
            name, address = await connection.find_node(node)
            await connection.ask(address, "control", "kill", actor)
            return name

    name = run(settings, work())
    click.echo(f"killed {actor} of node {short(name)}")


@debug.command("give-up-journal")
@click.argument("name")
@click.option("--yes-i-am-sure", is_flag=True, help="Without it nothing is given up.")
@click.pass_obj
def debug_give_up_journal(settings: Settings, name: str, yes_i_am_sure: bool) -> None:
    """Open a volume again whose journal was lost, with all nodes that had it.

    What was flushed after its last commit is lost then; what was written shortly before it may be
    there in part, as after a power cut without any flush. Only for nodes that will not come back: a
    client that still reaches one of them could have flushes acknowledged that are lost. A journal
    that can be read is not given up.
    """
    if not yes_i_am_sure:
        raise Failed(
            f"what was flushed to volume {name} after its last commit would be lost, unless a node "
            "with its journal comes back: nothing was done; give --yes-i-am-sure"
        )

    async def work() -> str:
        from torus_actors.cli.full import full_client
        from torus_actors.volume.giving_up import give_up_journal

        async with full_client(settings) as client:
            assert client.view is not None
            return await give_up_journal(
                client.system,
                client.meta,
                client.view,
                name,
                holder=client.machine.process_name(),
            )

    why = run(settings, work())
    if why:
        click.echo(f"volume {name} is as its last commit left it; its journal was given up")
    else:
        click.echo(f"volume {name}: its journal could be read, and nothing was lost")


@debug.command("rebalance")
@click.option(
    "--timeout",
    type=Seconds(min=0.1),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Fail if it takes longer.",
)
@click.pass_obj
def debug_rebalance(settings: Settings, timeout: float) -> None:
    """Run passes on all nodes until every block is where the ring wants it.

    On a terminal a bar shows the pass under way: blocks looked at on all nodes, and how long it
    will take. Fails if a node that has left the ring must stay for what its journal has.
    """
    run(settings, _rebalance(settings, timeout))


async def _addresses(connection: Connection) -> tuple[dict[str, str], list[str]]:
    """Where the nodes that are up can be asked, and of which nobody knows whether they are."""
    there = await connection.meta.registrations()
    unasked = [
        f"node {short(peer)} was not asked: its registration cannot be read: {error}"
        for peer, error in there.unread.items()
    ]
    if not there.peers:
        raise Failed("; ".join(unasked) or "no node is up: start one with torus-node start")
    return {info.peer_id: info.address for info in there.peers}, unasked


async def _rebalance(settings: Settings, timeout_s: float) -> None:
    from torus_actors.cli.connect import connect

    async def one_round(
        connection: Connection, addresses: dict[str, str], advance: Advance
    ) -> list[dict[str, Any]]:
        """Ask all for a pass, and wait until each has made a whole one."""
        before = await _ask_all(connection, addresses, "rebalancer", "status")
        wanted = [_after_a_pass(each) for each in before]
        await _ask_all(connection, addresses, "rebalancer", "start_pass")
        told = ""
        while True:
            now = await _ask_all(connection, addresses, "rebalancer", "status")
            for at, (each, was) in enumerate(zip(now, before, strict=True)):
                if each["passes"] < was["passes"]:  # it was started again
                    wanted[at], before[at] = 1, each
            busy = sum(each["running"] for each in now)
            totals = [max(each["total"], each["seen"]) for each in now]
            advance(sum(each["seen"] for each in now), sum(totals))
            line = f"{busy} nodes at work, {sum(each['left'] for each in now)} blocks left"
            if busy and line != told and not shows_bars():
                click.echo(line, err=True)
                told = line
            if all(
                each["passes"] >= count and not each["running"]
                for each, count in zip(now, wanted, strict=True)
            ):
                return now
            await asyncio.sleep(POLL_S)

    moved: dict[str, int] = {"sent": 0, "dropped": 0}
    left = "no pass has ended"
    try:
        async with asyncio.timeout(timeout_s), connect(settings) as connection:
            while True:
                _, ring = await connection.cluster()
                addresses, unasked = await _addresses(connection)
                with progress_bar("rebalancing", None, "blocks") as advance:
                    result = await one_round(connection, addresses, advance)
                late = _late(addresses, result, ring)
                total = {key: sum(each.get(key, 0) for each in result) for key in _COUNTS}
                for key in moved:
                    moved[key] += total[key]
                if late:
                    left = late
                    await asyncio.sleep(POLL_S)
                    continue
                if not any(total.values()):
                    left = "nothing to move, but not all copies are on disks"
                    if await _are_durable(connection, addresses, result):
                        break
                    continue
                left = ", ".join(f"{count} {key}" for key, count in total.items() if count)
                click.echo(f"a pass ended: {left}", err=True)
                await asyncio.sleep(POLL_S)
            left = "nothing, but for journals"
            kept = [*unasked, *await _journals_of_leavers(connection, addresses)]
    except TimeoutError as error:
        raise Failed(f"not balanced within {timeout_s:g} s; last pass: {left}") from error
    click.echo(f"balanced: {moved['sent']} blocks sent, {moved['dropped']} dropped")
    if kept:
        raise Failed("; ".join(kept))


def _late(addresses: Iterable[str], result: Sequence[dict[str, Any]], ring: Ring) -> str:
    """Which nodes have made their pass by an earlier ring, so that it tells nothing of this one."""
    late = [
        short(peer)
        for peer, each in zip(addresses, result, strict=True)
        if each.get("ring_version", ring.version) < ring.version
    ]
    have = "has" if len(late) == 1 else "have"
    return f"{', '.join(late)} {have} not heard of ring version {ring.version}" if late else ""


async def _are_durable(
    connection: Connection, addresses: dict[str, str], ended: list[dict[str, Any]]
) -> bool:
    """Wait until all copies that these passes counted are on disks; False if others came after.

    Not a reason to ask for a pass: that begins the wait anew.
    """
    while True:
        now = await _ask_all(connection, addresses, "rebalancer", "status")
        if all(each.get("settled", True) for each in now):
            return True
        if any(
            each["running"] or each["passes"] != was["passes"]
            for each, was in zip(now, ended, strict=True)
        ):
            return False
        await asyncio.sleep(POLL_S)


async def _journals_of_leavers(connection: Connection, addresses: dict[str, str]) -> list[str]:
    """Of nodes that are not in the ring, why they cannot be switched off though they have no block.

    What a crashed session flushed last moves when the volume is opened, not before.
    """
    from torus_actors.cli.report import unreplayed_of

    _, ring = await connection.cluster()
    leaving = {peer: at for peer, at in addresses.items() if peer not in ring.members}
    found: list[str] = []
    begun: dict[str, int] = {}
    loop = asyncio.get_running_loop()
    until = loop.time() + MOVE_S_MAX
    ask_at = 0.0
    while leaving:
        for peer, now in zip(
            list(leaving), await _ask_all(connection, leaving, "collector", "status"), strict=True
        ):
            if "journals_read" not in now:  # an earlier version, which cannot tell
                del leaving[peer]
                continue
            # Only a pass that began after the question tells. It has begun anew if it was started
            # again; and what a client has open it is about to move.
            begun[peer] = min(begun.get(peer, now["begun"]), now["begun"])
            is_open = now["unreplayed_open"]
            if now["journals_read"] > begun[peer] and not (is_open and loop.time() < until):
                del leaving[peer]
                must_stay = f"node {short(peer)} must stay for now: "
                if now["unreplayed"]:
                    found.append(must_stay + unreplayed_of(now["unreplayed"]))
                elif is_open:
                    found.append(
                        f"{must_stay}clients have yet to move the journals of what is open"
                    )
        if loop.time() >= ask_at:
            ask_at = loop.time() + ASK_AGAIN_S
            await _ask_all(connection, leaving, "collector", "start_pass")
        await asyncio.sleep(POLL_S)
    return found


@debug.command("scrub")
@click.option(
    "--timeout",
    type=Seconds(min=0.1),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Fail if it takes longer.",
)
@click.pass_obj
def debug_scrub(settings: Settings, timeout: float) -> None:
    """Have all nodes verify every block they store now, and repair what is damaged."""
    damaged, lost, unread = run(settings, _scrub(settings, timeout))
    click.echo(f"scrubbed: {damaged} damaged copies found, {damaged - lost} repaired")
    problems = []
    if lost:
        problems.append(f"{lost} damaged copies could not be repaired: no good copy was found")
    if unread:
        problems.append(f"{unread} copies were not read by their disk in time: see its node's log")
    if problems:
        raise Failed("; ".join(problems))


async def _scrub(settings: Settings, timeout_s: float) -> tuple[int, int, int]:
    """Returns damaged copies, those of them without a good one, and copies that were not read."""
    from torus_actors.cli.connect import connect

    try:
        async with asyncio.timeout(timeout_s), connect(settings) as connection:
            await connection.cluster()
            addresses, unasked = await _addresses(connection)
            for line in unasked:
                click.echo(line, err=True)
            before = await _ask_all(connection, addresses, "scrubber", "status")
            wanted = [_after_a_pass(each) for each in before]
            ended: dict[int, dict[str, Any]] = {}
            with progress_bar("scrubbing", None, "blocks") as advance:
                while True:
                    now = await _ask_all(connection, addresses, "scrubber", "status")
                    advance(sum(each["seen"] for each in now), sum(each["total"] for each in now))
                    for at, each in enumerate(now):
                        if each["passes"] < before[at]["passes"] and at not in ended:
                            # It was started again.
                            wanted[at], before[at] = 1, {**each, **dict.fromkeys(_FOUND, 0)}
                        if each["passes"] >= wanted[at]:
                            # What it finds in a pass after that it has told already.
                            ended.setdefault(at, each)
                    if len(ended) == len(now):
                        pairs = [(ended[at], was) for at, was in enumerate(before)]
                        # An older node does not tell the last of them.
                        damaged, failed, unread = (
                            sum(each.get(key, 0) - was.get(key, 0) for each, was in pairs)
                            for key in _FOUND
                        )
                        return damaged, failed - unread, unread
                    late = [w for at, w in enumerate(addresses.values()) if at not in ended]
                    await connection.ask_all(late, "scrubber", "start_pass")
                    await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise Failed(f"not scrubbed within {timeout_s:g} s") from error


_FOUND = ("damaged", "failed", "unread")
_COUNTS = ("sent", "dropped", "failed", "waiting", "yielded")


def _after_a_pass(status: dict[str, Any]) -> int:
    """How many passes a node has made when it has made a whole one from now on."""
    # One that is under way did not see everything there is now.
    return int(status["passes"]) + (2 if status["running"] else 1)


async def _ask_all(
    connection: Connection, addresses: dict[str, str], actor: str, method: str
) -> list[Any]:
    """Ask all nodes; those again that do not answer just now.

    Raises:
        Failed: one refuses, or stays silent.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + SILENT_S_MAX
    answers: dict[str, Any] = {}
    while True:
        asked = [name for name in addresses if name not in answers]
        found = await connection.ask_all([addresses[name] for name in asked], actor, method)
        for name, answer in zip(asked, found, strict=True):
            if not isinstance(answer, Exception):
                answers[name] = answer
            elif not isinstance(answer, TRANSIENT) or loop.time() > until:
                raise Failed(f"node {short(name)}: {answer}")
        if len(answers) == len(addresses):
            return [answers[name] for name in addresses]
        await asyncio.sleep(POLL_S)
