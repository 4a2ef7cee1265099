"""The mesh on the real kernel datapath: cases.py, run inside User-mode Linux, shown here one by one.

The guest is booted once; its tests run in it in their order, and each is a test here too. A case
that passes prints what it measured (`pytest -rP`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import cases
from tests.kernel.guest import MODULES_LOADED, Guest, unavailable

HERE = Path(__file__).parent
BOOT_TIMEOUT = 1200
"""Seconds for everything that happens in the guest; about 100 on two quiet cores."""

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(BOOT_TIMEOUT + 30)]


def names() -> list[str]:
    """Of the tests in cases.py, in order, with their parameters."""
    found = []
    for name, test in vars(cases).items():
        if name.startswith("test_"):
            chosen = [value for mark in getattr(test, "pytestmark", ()) for value in mark.args[1]]
            found += [f"{name}[{value}]" for value in chosen] or [name]
    return found


class Told:
    """What the guest told of its tests, read as far as asked for."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._lines = guest.lines()
        self._known: dict[str, dict[str, Any]] = {}

    def about(self, name: str) -> dict[str, Any]:
        while name not in self._known:
            line = next(self._lines, None)
            if line is None:
                pytest.fail(f"the guest never told of {name}\n{self.guest.last_words()}", pytrace=False)
            report = json.loads(line)
            self._known[report["name"]] = report
        return self._known[name]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    if why := unavailable():
        if os.environ.get("CI"):
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    out = tmp_path_factory.mktemp("guest")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_timeout",
        "-p",
        "tests.kernel.reporter",
    ]
    env = {
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        "PYTHONPATH": str(HERE.parent.parent),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    cwd = HERE.parent.parent
    with Guest(
        [*command, str(HERE / "cases.py")], out, BOOT_TIMEOUT, modules=MODULES_LOADED, env=env, cwd=cwd
    ) as guest:
        yield Told(guest)
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("name", names())
def test_in_guest(told: Told, name: str) -> None:
    report = told.about(name)
    if report["outcome"] == "skipped":
        pytest.skip(report["text"])
    if report["outcome"] != "passed":
        pytest.fail(report["text"], pytrace=False)
    print(f"{report['seconds']} s in the guest\n{report['text']}")
