"""Every module of ovsmesh has a room: a contract on what it may import, and a place in CONTRIBUTING.md."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOORS = {"__init__", "__main__", "cli"}
"""May import whatever the command at hand needs."""
LINES = 400


def modules() -> set[str]:
    return {path.stem for path in (ROOT / "ovsmesh").glob("*.py")} - DOORS


def test_every_module_is_under_a_contract() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    sources = [contracts[name].get("source_modules", "") for name in contracts.sections()]
    bound = set(re.findall(r"ovsmesh\.(\w+)", " ".join(sources)))
    assert modules() == bound, f"{modules() ^ bound} are in .importlinter or in ovsmesh/, but not in both"


def test_every_module_is_in_the_table_of_rooms() -> None:
    rows = re.findall(r"^\| [\w ]+ \| ([\w, ]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")}
    assert modules() <= named, f"{modules() - named} have no room in CONTRIBUTING.md"


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "ovsmesh").glob("*.py")}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}
