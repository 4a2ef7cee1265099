"""No private vocabulary: docs/design.md has the words, and a network engineer needs no other glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (
    *(
        "ovsmesh/**/*.py",
        "scripts/**/*.py",
        "scripts/*.s*",
        "tests/**/*.py",
        "docs/*.md",
        "*.md",
        "manifests/**/*.yaml",
    ),
    *("Makefile", "Dockerfile", "setup.cfg", "ruff.toml", ".importlinter"),
)
PRIVATE = {
    "anew": "again",
    "bell": "event source, or wakeup",
    "brake": "removal guard",
    "mend": "repair",
    "rim": "edge",
    "roster": "membership",
}
PHRASES = {
    r"\bnot ours\b": "unmanaged",
    r"\bfor ever\b": "continuously, or without a deadline",
    r'(?:"""|^)\s*Knows\b': "what the module is for",
}


def words(text: str) -> set[str]:
    """Return the words of a text in lower case, with those inside identifiers."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


def private(line: str) -> list[str]:
    """Return what a line has of the private vocabulary, each with the word to use in its place."""
    forms = {form: word for word in PRIVATE for form in (word, f"{word}s", f"{word}ed", f"{word.rstrip('e')}ing")}
    forms["braked"] = "brake"
    found = [f"{word}: {PRIVATE[forms[word]]}" for word in sorted(words(line) & forms.keys())]
    return found + [f"{phrase}: {plain}" for phrase, plain in PHRASES.items() if re.search(phrase, line)]


FILES = sorted({path for pattern in PLACES for path in ROOT.glob(pattern) if path.is_file()} - {Path(__file__)})


def test_the_words_are_those_of_the_field() -> None:
    assert len(FILES) > 200
    found = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {word}" for word in private(line)]
    assert not found


@pytest.mark.parametrize("line", ["a_bell = FileBell()", "rings no bell", "mended", '    """Knows all."""', "not ours"])
def test_a_private_word_is_found(line: str) -> None:
    assert private(line)


@pytest.mark.parametrize("line", ["trim(primary)", "labelled", "recommend, amend", "he knows", "colours"])
def test_other_words_are_left_alone(line: str) -> None:
    assert not private(line)
