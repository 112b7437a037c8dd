"""What is built is what is in the tree."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = ("actors", "nbd", "scenarios", "wire")


def tree_modules() -> set[str]:
    """Every module of the package, by its path inside the wheel."""
    found = {
        f"torus_actors/{p.relative_to(ROOT / 'torus_actors')}"
        for p in (ROOT / "torus_actors").rglob("*.py")
        if not _behind_link(p)
    }
    for folder in MAPPED:
        found |= {
            f"torus_actors/{folder}/{p.relative_to(ROOT / folder)}"
            for p in (ROOT / folder).rglob("*.py")
        }
    return {name for name in found if "__pycache__" not in name}


def _behind_link(path: Path) -> bool:
    return any((ROOT / "torus_actors" / folder) in path.parents for folder in MAPPED)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this tree."""
    # A copy: setuptools builds beside the source, and what an older build left there would get in.
    source = tmp_path_factory.mktemp("source") / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", target, source],
        check=True,
        capture_output=True,
    )
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    """A package that is missing from setup.cfg's list would be missing from the wheel, silently."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert names == tree_modules()
    assert "torus_actors/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_wheel_declares_the_three_commands(wheel: Path) -> None:
    """The console scripts are the contract with every user."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    for command in ("torus-node", "torusctl", "torusblk"):
        assert f"{command} = torus_actors.cli." in text


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_are_links_into_the_package(name: str) -> None:
    """A plain checkout, mypy and an editable install all see one tree."""
    link = ROOT / "torus_actors" / name
    assert link.is_symlink() and link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_refuse_their_bare_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``import nbd`` is libnbd's module, and must never be ours."""
    monkeypatch.syspath_prepend(str(ROOT))
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=f"torus_actors.{name}"):
        importlib.import_module(name)
