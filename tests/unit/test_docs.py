"""The documents name what the code has: commands, files and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import Command, Group

from ovsmesh.cli.main import cli
from ovsmesh.lab.cli import lab
from tests.support.generated_docs import GENERATED

ROOT = Path(__file__).parents[2]
_WITH_COMMENTS = (
    *("manifests/**/*.yaml", "ovsmesh/**/*.py", "scripts/**/*.py", "scripts/*.s*", "tests/support/*.py"),
    *("Makefile", "Dockerfile", "setup.cfg", "ruff.toml", ".importlinter", ".ci/run"),
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FILES = [*DOCUMENTS, *(path for pattern in _WITH_COMMENTS for path in sorted(ROOT.glob(pattern)))]
_FOLDERS = ("docs", "manifests", "ovsmesh", "scripts", "tests", ".ci")
_BUILT = ("dist/bootstrap.sh", "dist/wheels")
"""Files that a document names and that a command there makes."""


def commands(group: Group = cli, before: str = "ovsmesh") -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        assert isinstance(command, Command)
        if isinstance(command, Group):
            yield from commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}"


def written() -> str:
    """All documents that a person wrote."""
    return "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if _name(path) not in GENERATED)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("command", [c for c in commands() if " lab" not in c])
def test_each_command_is_in_a_document_that_a_person_wrote(command: str) -> None:
    assert command in written()


def test_each_command_that_a_document_names_exists() -> None:
    inside = {*commands(lab, "ovsmesh lab")}
    known = {*commands(), "ovsmesh lab", *inside}
    below = "|".join(name.split()[-1] for name in inside)
    named = re.findall(rf"(?:`|^    )(ovsmesh [a-z]+(?: (?:{below})\b)?)", written(), re.MULTILINE)
    assert len(named) > 20
    assert not {name.strip() for name in named} - known


def test_each_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z][a-z0-9-]*)", written(), re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    assert not named - targets
    assert not {target for target in targets if target.startswith("test")} - named


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    found = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert not [link for link in found if not _leads(document, link)]


def _leads(document: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    return not anchor or anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_files_that_documents_and_comments_name_exist() -> None:
    folders = "|".join(map(re.escape, _FOLDERS))
    named: dict[str, set[str]] = {}
    for path in FILES:
        for name in re.findall(rf"(?<![\w/.~$}}-])((?:{folders})/[\w./*-]*[\w*/])", path.read_text(encoding="utf-8")):
            # NAME stands for any name
            named.setdefault(re.sub("[A-Z]{4,}", "*", name), set()).add(_name(path))
    assert len(named) > 50
    assert not {name: where for name, where in named.items() if name not in _BUILT and not list(ROOT.glob(name))}


@pytest.mark.parametrize("document", GENERATED)
def test_generated_document_is_what_the_code_says(document: str) -> None:
    assert (ROOT / document).read_text(encoding="utf-8") == GENERATED[document](), "run `make docs`"


# README.md and README.zh-CN.md


def _code(text: str) -> list[str]:
    """Lines of code blocks, without their comments."""
    lines, fenced, found = text.splitlines(), False, []
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(re.sub(r"\s+# .*", "", line).rstrip())
    return found


def _headings(text: str) -> list[int]:
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", plain, re.MULTILINE)]


def _rows(text: str) -> list[tuple[list[str], list[str]]]:
    """For each row of a table its code spans, and the numbers outside of them."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [
        (sorted(re.findall(r"`[^`]+`", r)), sorted(re.findall(r"\d(?:[\d.,]*\d)?", re.sub(r"`[^`]+`", "", r))))
        for r in rows
    ]


def test_the_chinese_readme_says_what_the_english_one_says() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    assert _headings(chinese) == _headings(english)
    assert _code(chinese) == _code(english)
    assert _rows(chinese) == _rows(english)
    links = re.compile(r"\]\((?!README)([^)]+)\)")
    assert sorted(links.findall(chinese)) == sorted(links.findall(english))
    assert chinese.count("\n- ") == english.count("\n- ")
