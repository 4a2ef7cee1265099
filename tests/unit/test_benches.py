"""The benches start, and the profile of a cold start times functions that exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argv", [["bench.py", "--help"], ["-c", "from benchlib.startup_profile import instrument; instrument()"]]
)
def test_the_benches_start(argv: list[str]) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT / "scripts", env=env, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
