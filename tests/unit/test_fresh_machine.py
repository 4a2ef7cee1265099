"""What lets a fresh machine install everything: its own mirrors, and none that this project would name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import debian

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = re.compile(
    r"\b(?:deb|ftp|archive|snapshot|ports|proxy|sum|index|static|files|registry(?:-\d)?|repo\d?|mirrors?|pypi|crates)"
    r"\.[a-z0-9-]+\.(?:org|com|net|io|dev)\b|\b(?:pypi|crates)\.(?:org|io)\b"
    r"|\b(?:https?|ftp)://[A-Za-z0-9.-]+(?::\d+)?/(?:debian|ubuntu|simple|pypi)\b"
)


def hosts(text: str) -> set[str]:
    """Return the hosts in `text` that packages might come from."""
    return set(REGISTRY.findall(text))


def test_no_file_names_the_host_of_a_package_registry() -> None:
    found = {}
    for folder, folders, names in os.walk(ROOT):
        # what tools have left here is not of this project; a fresh machine has no git to ask
        folders[:] = [each for each in folders if each == ".ci" or not re.match(r"\.|build$|dist$|__pycache__$", each)]
        for path in (Path(folder, name) for name in names):
            if path != Path(__file__) and (named := hosts(path.read_text(errors="replace"))):
                found[str(path.relative_to(ROOT))] = named
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "http://deb.x.org/debian",
        "GOPROXY=https://proxy.x.org,direct",
        "--index-url https://e.f/simple",
        "files.x.org/a",
    ],
)
def test_such_a_host_is_found(text: str) -> None:
    assert hosts(text)


TARGETS = """\
http://m/debian/ bookworm main
http://m/debian/ bookworm-updates main
http://m/security/ bookworm-security main
http://m/debian/ bookworm main
http://vendor/apt stable main
"""


def test_sources_are_this_machine_s_with_another_suite() -> None:
    found = [re.sub(r" \[signed-by=.*?\]", "", line) for line in debian._swapped(TARGETS, "bookworm", "trixie")]
    assert found == [
        "deb http://m/debian/ trixie main",
        "deb http://m/debian/ trixie-updates main",
        "deb http://m/security/ trixie-security main",
    ]


def test_a_machine_without_sources_of_debian_is_told() -> None:
    with pytest.raises(debian.DebianError, match=r"\(jammy\) name no mirror of Debian.*trixie"):
        debian._swapped("http://m/ubuntu jammy-backports main\n", "jammy", "trixie")


def run(script: str, path: Path, shell: str = "/bin/sh") -> tuple[int, list[str]]:
    """Run a script of this project with `path` as PATH; its exit status and its lines."""
    argv = [shell, str(ROOT / "scripts" / script)]
    env = {"PATH": str(path), "HOME": str(path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("script", ["setup.sh", "bootstrap.sh"])
def test_a_machine_without_bash_is_refused_in_one_line(tmp_path: Path, script: str) -> None:
    code, lines = run(script, tmp_path)
    assert code == 1 and len(lines) == 1 and "bash is missing" in lines[0], lines


def test_a_machine_without_apt_is_told_at_once_what_to_install(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    code, lines = run("setup.sh", tmp_path, str(shutil.which("bash")))
    assert code == 1 and len(lines) == 1, lines
    assert "apt-get not found: install " in lines[0] and " by hand" in lines[0], lines
