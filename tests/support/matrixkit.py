"""`ovsmesh matrix` as the lab tests read it."""

from __future__ import annotations

import json
from typing import Any

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON


def matrix(host: Host) -> tuple[int, dict[str, Any]]:
    done = host.ovsmesh("matrix", "-o", "json")
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def cells(host: Host) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["node"], cell["peer"]): cell for row in matrix(host)[1]["rows"] for cell in row["cells"]}


def states(host: Host) -> dict[tuple[str, str], str]:
    return {pair: cell["state"] for pair, cell in cells(host).items()}


def pairs(lab: Lab) -> set[tuple[str, str]]:
    return {(a.name, b.name) for a in lab.hosts for b in lab.hosts if a != b}


def all_ok(lab: Lab) -> None:
    def well() -> bool:
        return all(states(host) == dict.fromkeys(pairs(lab), "ok") for host in lab.hosts)

    wait_for("every direction to be ok, from every host", well, SOON)
