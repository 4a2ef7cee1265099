"""constraints.txt holds a version and hashes of all that setup.cfg needs, and names no place to fetch it from."""

from __future__ import annotations

import configparser
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
_HASHES = r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[0-9a-z.]+)(?: ; [^\\\n]+)?" + _HASHES)


def read(name: str) -> dict[str, str]:
    """The versions in a constraints file; each line of it is one of a package with its hashes."""
    text = (ROOT / name).read_text()
    body = text[text.index("\n") + 1 :]
    found = {match["name"]: match["version"] for match in LINE.finditer(body)}
    assert LINE.sub("", body) == ""
    return found


def required() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]


def build_required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [Requirement(line) for line in project["build-system"]["requires"]]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-build.txt"])
def test_every_requirement_has_a_version_that_it_allows(name: str) -> None:
    versions = read(name)
    wrong = {
        str(need): versions.get(canonicalize_name(need.name))
        for need in (required() if name == "constraints.txt" else build_required())
        if Version(versions.get(canonicalize_name(need.name), "0")) not in need.specifier
    }
    assert not wrong, f"run `make constraints`: {wrong}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_the_libraries_need_is_there_too(python: str, machine: str) -> None:
    """By what the installed ones say that they need, on each Python and machine."""
    versions = read("constraints.txt")
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"platform_machine": machine, "extra": ""}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    wanted, seen = required(), set()
    while wanted:
        need = wanted.pop()
        name = canonicalize_name(need.name)
        if (need.marker and not need.marker.evaluate(environment)) or name in seen:
            continue
        seen.add(name)
        assert name in versions, f"run `make constraints`: {need} is missing"
        wanted += map(Requirement, metadata.requires(name) or ())
    assert set(versions) == seen


def test_every_dependency_ends_before_a_major_version() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    needs = [Requirement(line) for text in texts for line in text.split("\n") if line] + build_required()
    assert not [str(need) for need in needs if not any(part.operator == "<" for part in need.specifier)]


def test_no_place_to_fetch_from_is_named() -> None:
    for name in ("constraints.txt", "constraints-build.txt"):
        assert not re.search(r"https?:|index|find-links", (ROOT / name).read_text())
