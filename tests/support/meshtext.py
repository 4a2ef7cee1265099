"""Mesh files as texts, for the tests of those who read them."""

from __future__ import annotations

from ovsmesh.errors import Problem
from ovsmesh.mesh.manifest import parse
from ovsmesh.mesh.types import Mesh

HEAD = "apiVersion: ovsmesh.io/v1alpha1\nkind: Mesh\n"
A = "{name: a, address: 192.0.2.1, podCIDRs: [10.97.1.0/24]}"
B = "{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}"
C = "{name: c, address: 192.0.2.3, podCIDRs: [10.97.3.0/24, 'fd00:97:3::/64']}"


def text_of(*nodes: str, extra: str = "", clusters: str = "[10.97.0.0/16, 'fd00:97::/32']") -> str:
    body = "".join(f"  - {node}\n" for node in nodes)
    return f"{HEAD}spec:\n  clusterCIDRs: {clusters}\n{extra}  nodes:\n{body}"


def read(text: str | bytes, last: Mesh | None = None) -> tuple[Mesh, tuple[Problem, ...]]:
    return parse(text, "mesh.yaml", last)


def names(mesh: Mesh) -> str:
    return "".join(node.name for node in mesh.nodes)


def big(count: int) -> str:
    """In block style, `count` nodes."""
    lines = [
        f"  - name: web{i}\n    address: 192.1.{i >> 8}.{i & 255}\n    podCIDRs: [10.{i >> 8}.{i & 255}.0/24]\n"
        for i in range(count)
    ]
    return f"{HEAD}metadata: {{name: default}}\nspec:\n  clusterCIDRs: [10.0.0.0/8]\n  nodes:\n{''.join(lines)}"
