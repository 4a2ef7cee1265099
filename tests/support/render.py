"""`python -m tests.support.render` writes manifests/rendered.yaml: what `kubectl apply -k manifests` applies.

Imports nothing of ovsmesh.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import built

MANIFESTS = Path(__file__).parents[2] / "manifests"
RENDERED = MANIFESTS / "rendered.yaml"
HEAD = "# Made of the other files here by tests/support/render.py; change those.\n"
_TIMEOUT = 60.0


def render() -> str:
    argv = [str(built.control_plane()["kubectl"]), "kustomize", str(MANIFESTS)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    return HEAD + done.stdout


if __name__ == "__main__":
    RENDERED.write_text(render())
