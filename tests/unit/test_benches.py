"""The benches start, and the profile of a cold start times functions that exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize(
    "argv", [["bench.py", "--help"], ["-c", "from benchlib.startup_profile import instrument; instrument()"]]
)
def test_the_benches_start(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, *argv], cwd=SCRIPTS, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
