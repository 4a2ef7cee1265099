"""The machine-readable formats of the commands' output."""

from __future__ import annotations

import json
from typing import Any

import yaml


def serialize(tree: Any, output: str) -> str:
    """Return a tree of plain values as "json" or "yaml", without a newline at its end."""
    if output == "json":
        return json.dumps(tree, indent=2, ensure_ascii=False)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip()
