"""The layout that CONTRIBUTING.md promises: few packages and modules, imports that only point down, short files."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES, MODULES, LINES, LEVELS = 12, 12, 500, 9
BREACHES = {
    "A package imports only from the layers below it": ("mesh/types.py", "from ovsmesh.dataplane import plan"),
    "The lab drives ovsmesh from outside": ("lab/ping.py", "from ovsmesh.dataplane.types import KBR"),
    "Pure packages decide and do no I/O": ("dataplane/plan.py", "import socket"),
    "A third-party package is imported only where": ("dataplane/plan.py", "import rich.console"),
}
"""The beginning of each contract's name → a module and an import that breaks this contract alone."""


def packages() -> list[Path]:
    return [path.parent for path in sorted((ROOT / "ovsmesh").glob("*/__init__.py"))]


def test_packages_and_modules_are_few() -> None:
    counts = {path.name: len([*path.glob("*.py")]) - 1 for path in packages()}
    assert len(counts) <= PACKAGES
    assert not {name: count for name, count in counts.items() if count > MODULES}
    nested = list((ROOT / "ovsmesh").glob("*/*/*.py"))
    assert not nested


def test_every_package_has_its_row_in_the_document() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [path.name for path in packages() if f"| {path.name} |" not in text]


def test_files_can_be_read_in_one_sitting() -> None:
    files = [path for folder in ("ovsmesh", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}


# imports


def imports() -> dict[str, set[str]]:
    """Return each module of ovsmesh and the modules of ovsmesh that it imports, also inside functions."""
    graph = grimp.build_graph("ovsmesh", exclude_type_checking_imports=True, cache_dir=None)
    found = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(found) > 50
    return found


def levels(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the levels of a graph, the lowest first. Raises CycleError where it has a circle."""
    sorter, found = TopologicalSorter(arrows), []
    sorter.prepare()
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def test_a_circle_is_found() -> None:
    assert levels({"a": {"b"}, "b": {"c"}}) == [["c"], ["b"], ["a"]]
    with pytest.raises(CycleError):
        levels({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_modules_import_in_no_circle() -> None:
    levels(imports())


def test_what_ls_shows_has_no_circle_and_few_levels() -> None:
    def box(module: str) -> str:
        return module.split(".")[1]

    inside = {name: found for name, found in imports().items() if name not in ("ovsmesh", "ovsmesh.__main__")}
    boxes: dict[str, set[str]] = {box(name): set() for name in inside}
    for name, found in inside.items():
        boxes[box(name)] |= {box(other) for other in found if other != "ovsmesh"} - {box(name)}
    assert len(levels(boxes)) <= LEVELS


# contracts


def test_the_contract_names_every_third_party_package() -> None:
    graph = grimp.build_graph("ovsmesh", include_external_packages=True, cache_dir=None)
    outside = {name for name in graph.modules if not name.startswith("ovsmesh")} - sys.stdlib_module_names
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    named = set(parser["importlinter:contract:third-party"]["forbidden_modules"].split())
    assert len(outside) > 5 and outside <= named


def lint_imports(folder: Path) -> dict[str, str]:
    """Return the verdict (KEPT or BROKEN) of each contract on the tree in `folder`, by the contract's name."""
    argv = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=50)
    lines = [line.partition("(")[0].split() for line in done.stdout.splitlines()]
    found = {" ".join(words): verdict for *words, verdict in filter(None, lines) if verdict in ("KEPT", "BROKEN")}
    assert len(found) == len(BREACHES), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("contract", BREACHES)
def test_a_breach_of_each_contract_is_found(contract: str, tmp_path: Path) -> None:
    module, line = BREACHES[contract]
    shutil.copytree(ROOT / "ovsmesh", tmp_path / "ovsmesh", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    with (tmp_path / "ovsmesh" / module).open("a") as file:
        file.write(f"\n{line}\n")
    verdicts = lint_imports(tmp_path)
    assert [name for name, verdict in verdicts.items() if verdict == "BROKEN"] == [
        name for name in verdicts if name.startswith(contract)
    ]
