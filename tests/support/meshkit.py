"""Meshes and dataplanes as values, and golden texts, for the tests of the pure packages."""

from __future__ import annotations

import os
from dataclasses import fields
from ipaddress import ip_address, ip_network
from pathlib import Path

from ovsmesh.dataplane.desired import dataplane
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Rule
from ovsmesh.mesh.types import Mesh, Node

FACTS = Facts(underlay_mtu=1500)
CLUSTERS = (ip_network("10.97.0.0/16"), ip_network("fd00:97::/32"))


def node(name: str, address: str, *cidrs: str, uid: str = "", zone: str = "") -> Node:
    return Node(name, ip_address(address), tuple(map(ip_network, cidrs)), uid, zone)


def numbered(number: int) -> Node:
    """web1, web2, … as the documents have them."""
    return node(f"web{number}", f"192.0.2.{10 + number}", f"10.97.{number}.0/24", f"fd00:97:{number:x}::/64")


def mesh_of(*nodes: Node, **settings: object) -> Mesh:
    return Mesh(CLUSTERS, tuple(sorted(nodes, key=lambda n: n.name)), **settings)  # type: ignore[arg-type]


def first(count: int, **settings: object) -> Mesh:
    return mesh_of(*map(numbered, range(1, count + 1)), **settings)


def want(mesh: Mesh, name: str = "web1", facts: Facts = FACTS) -> Dataplane:
    return dataplane(mesh, name, facts)[0]


def seen(dataplane: Dataplane, *unmanaged: object, unknown: tuple[str, ...] = ()) -> Observed:
    return Observed(dataplane, tuple(unmanaged), (), frozenset(unknown))  # type: ignore[arg-type]


def shown(dataplane: Dataplane) -> str:
    """Every part on a line of its own, below the name of its kind."""
    lines = []
    for kind in (f.name for f in fields(dataplane)):
        parts = getattr(dataplane, kind)
        lines += [f"[{kind}]"] if parts else []
        for key, value in parts.items():
            name = " ".join(map(str, key)) if isinstance(key, tuple) else key
            if isinstance(value, Rule):
                value = value.text
            elif hasattr(value, "_asdict"):
                value = " ".join(f"{word}={v}" for word, v in value._asdict().items() if v not in ("", 0, False, ()))
            lines.append(f"{name.strip()}: {value}")
    return "\n".join(lines) + "\n"


def golden(name: str, text: str) -> None:
    """Compare with tests/unit/dataplane/golden/NAME; UPDATE_GOLDEN=1 writes it again, to be read in the diff."""
    path = Path(__file__).parents[1] / "unit" / "dataplane" / "golden" / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
