"""The layout that CONTRIBUTING.md promises: few packages, few modules each, files that can be read in one sitting."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES, MODULES, LINES = 12, 12, 500


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
