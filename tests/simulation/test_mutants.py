"""Mutants: they fit the code, they leave no trace, and the simulator finds them.

Here only a few that fall at once; ``tox -e mutants`` hunts all of them.
"""

from __future__ import annotations

import dataclasses

import pytest
from click.testing import CliRunner

from torus_actors.errors import Invalid
from torus_actors.scenarios.__main__ import main
from torus_actors.scenarios.hunt import Hunt, Try, hunt, plan, try_once
from torus_actors.scenarios.mutants import MUTANTS
from torus_actors.scenarios.mutation import Edit, Mutant, find_function, put_in
from torus_actors.scenarios.run import Result, run
from torus_actors.scenarios.spec import SCENARIOS
from torus_actors.volume.write_back import WriteBack

QUICK = {
    "flush_without_fdatasync": 1,
    "one_copy": 1,
    "last_record_not_replayed": 4,
}
"""Mutants that are found within so many runs."""

HARMLESS = Mutant(
    "harmless",
    "None",
    (
        Edit(
            "volume.write_back:WriteBack.thaw",
            "layer.merge_from(newer)",
            "layer.merge_from( newer)",
        ),
    ),
    ("calm",),
)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fits_the_code(name: str) -> None:
    """Each piece that a mutant changes is there, its scenarios exist, and it is taken out again."""
    mutant = MUTANTS[name]
    assert mutant.name == name and mutant.breaks and mutant.edits
    assert mutant.hunted_in and set(mutant.hunted_in) <= set(SCENARIOS)
    functions = [find_function(edit.where) for edit in mutant.edits]
    before = [function.__code__ for function in functions]
    with put_in(mutant):
        for function, code in zip(functions, before, strict=True):
            assert function.__code__ is not code
            assert function.__code__.co_freevars == code.co_freevars
    assert [function.__code__ for function in functions] == before


@pytest.mark.parametrize(
    "edit",
    [
        Edit("volume.write_back:WriteBack.thaw", "no such piece", ""),
        Edit("volume.write_back:WriteBack.thaw", "layer", "layers"),
        Edit("volume.write_back:WriteBack.melt", "layer", "layers"),
        Edit("volume.write_back:EXTENT_OVERHEAD_BYTES", "64", "65"),
    ],
    ids=["not there", "ambiguous", "no function", "not a function"],
)
def test_a_mutant_that_does_not_fit_is_refused(edit: Edit) -> None:
    """Nothing is changed by a mutant one of whose edits does not fit."""
    good = Edit("volume.write_back:WriteBack.zero", "layer.zero(offset, length)", "pass")
    function = find_function(good.where)
    before = function.__code__
    with pytest.raises(Invalid), put_in(Mutant("broken", "", (good, edit), ())):
        pytest.fail("it was put in")
    assert function.__code__ is before


def test_a_mutant_is_everywhere_and_only_meanwhile() -> None:
    """Who holds a method from before has the bug too, and is rid of it even after an error."""
    layers = WriteBack(1 << 20)
    zero = layers.zero
    mutant = Mutant(
        "zero_not_counted",
        "",
        (Edit("volume.write_back:WriteBack.zero", "self.size += _cost(layer) - before", "pass"),),
        (),
    )
    with pytest.raises(ZeroDivisionError), put_in(mutant):
        zero(0, 0, 4096)
        assert layers.size == 0
        raise ZeroDivisionError
    zero(1, 0, 4096)
    assert layers.size > 0


def test_scenarios_take_turns_from_the_first_seed_on() -> None:
    """Which run a number is."""
    mutant = dataclasses.replace(HARMLESS, hunted_in=("calm", "bit_rot"), first_seed=7)
    assert [plan(mutant, number) for number in range(4)] == [
        ("calm", 7),
        ("bit_rot", 7),
        ("calm", 8),
        ("bit_rot", 8),
    ]


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_is_found(name: str) -> None:
    """The simulator finds it in a few runs; the same run without it passes."""
    found: list[Hunt] = []
    hunt([name], QUICK[name], 1, lambda: None, found.append)
    (each,) = found
    assert each.found is not None, f"survived {each.runs} runs"
    assert not each.spoilt
    assert each.found.clean is not None and not each.found.clean.failures
    result = each.found.result
    assert (result.scenario, result.seed) == plan(MUTANTS[name], each.runs - 1)


def test_a_mutant_that_does_not_fit_is_not_hunted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail at once, and look found."""
    edit = dataclasses.replace(HARMLESS.edits[0], old="no such piece")
    odd = dataclasses.replace(HARMLESS, edits=(edit,))
    monkeypatch.setitem(MUTANTS, "odd", odd)
    with pytest.raises(Invalid):
        hunt(["odd"], 1, 1, lambda: None, lambda _: None)


def test_the_command_says_in_a_line_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that the code has left behind is no finding and no traceback."""
    edit = dataclasses.replace(HARMLESS.edits[0], old="no such piece")
    monkeypatch.setitem(MUTANTS, "one_copy", dataclasses.replace(HARMLESS, edits=(edit,)))
    done = CliRunner().invoke(main, ["mutants", "one_copy", "--seeds", "1", "--jobs", "1"])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("Error: ") and "no such piece" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_finding_can_be_replayed() -> None:
    """The printed command runs into the same failure."""
    tried = try_once("one_copy", 0)
    words = tried.result.replay.split()
    assert words[:3] == ["python", "-m", "torus_actors.scenarios"]
    done = CliRunner().invoke(main, [*words[3:], "--quiet"])
    assert done.exit_code == 1
    assert tried.result.failures[0] in done.output
    assert tried.result.replay in done.output


def test_what_a_mutant_breaks_is_whole_afterwards() -> None:
    """A run without a mutant is the same run before and after one with it."""
    before = run(SCENARIOS["partition_one_way"], 1).digest
    run(SCENARIOS["calm"], 1, mutant=MUTANTS["one_copy"], one_failure=True)
    assert run(SCENARIOS["partition_one_way"], 1).digest == before


def _tried(found: bool, spoilt: bool = False) -> Try:
    failures = ["broken"] if found else []
    clean = Result("calm", 1, failures=["broken too"] if spoilt else []) if found else None
    return Try(Result("calm", 1, failures=failures), clean)


def test_the_first_run_that_fails_counts() -> None:
    """Not the first to end: the result does not depend on how fast the cores are."""
    each = Hunt(HARMLESS, 10)
    assert [each.begin() for _ in range(4)] == [0, 1, 2, 3]
    each.end(2, _tried(True))
    assert not each.wants_more and not each.over
    each.end(3, _tried(False))
    each.end(1, _tried(True))
    assert not each.over
    each.end(0, _tried(False))
    assert each.over and each.runs == 2


def test_a_run_that_fails_anyway_finds_nothing() -> None:
    """A failure without the mutant too is no finding, and is told."""
    each = Hunt(HARMLESS, 2)
    each.end(each.begin(), _tried(True, spoilt=True))
    assert each.wants_more and each.spoilt and each.found is None
    each.end(each.begin(), _tried(False))
    assert each.over and each.found is None and each.runs == 2


def test_the_command() -> None:
    """``mutants`` lists all; prints what it found and ends with 0."""
    runner = CliRunner()
    listed = runner.invoke(main, ["mutants", "--list"])
    assert listed.exit_code == 0
    assert all(name[:20] in listed.output for name in MUTANTS)
    done = runner.invoke(main, ["mutants", "one_copy", "--seeds", "1", "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert "one_copy: found by run 1" in done.output and "1 of 1 mutants found" in done.output
    assert "scenarios run calm --seed 1 --mutant one_copy" in done.output


def test_a_survivor_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that no run finds makes the command end with 1."""
    monkeypatch.setitem(MUTANTS, "one_copy", dataclasses.replace(HARMLESS, name="one_copy"))
    done = CliRunner().invoke(main, ["mutants", "one_copy", "--seeds", "1", "--jobs", "1"])
    assert done.exit_code == 1, done.output
    assert "SURVIVED one_copy" in done.output and "0 of 1 mutants found" in done.output
