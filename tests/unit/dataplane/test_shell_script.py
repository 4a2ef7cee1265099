"""The script's text: read as a shell script, and hostile names stay data."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.dataplane.shell_script import render
from ovsmesh.dataplane.types import OBR, Port
from tests.support.meshkit import FACTS, first, golden, want

HOSTILE = [
    "$(touch X)",
    "`touch X`",
    "'; touch X; '",
    '"; touch X; "',
    "\nEND\ntouch X\n",
    "\\",
    "true",
    "-- del-br",
    "é\u2028",
]


def test_golden() -> None:
    golden(
        "script-web1.sh", render(want(first(2, key=7)), "node web1 of the mesh in /etc/ovsmesh/mesh.yaml", ["a note"])
    )


def test_rules_for_docker_are_put_in_once() -> None:
    facts = dataclasses.replace(FACTS, forward_drop=("iptables",))
    text = render(want(first(2), facts=facts), "node web1")
    lines = [line for line in text.splitlines() if line.startswith("iptables ")]
    gone, added = lines[::2], lines[1::2]
    assert gone == [line.replace(" -A FORWARD ", " -D FORWARD ") + " 2>/dev/null || :" for line in added]
    assert len(added) == 4 and all(" -A FORWARD " in line for line in added), "behind the rules of others"
    assert "for tool in ip bridge sysctl ovs-vsctl ovs-ofctl nft iptables;" in text


def executed(script: Any, tmp_path: Path) -> Any:
    """What the script runs, with every command replaced by one that writes its arguments down."""
    log = tmp_path / "log"
    fake = tmp_path / "bin"
    fake.mkdir(exist_ok=True)
    # iptables -C and br-exists say no; so nothing is there yet
    # one write a call: the two ends of a pipe write at once
    body = f'#!/bin/bash\nprintf "%s\\0" "${{0##*/}}" "$@" $\'\\1\' >>{log}\n'
    body += 'case "$*" in *br-exists*|*" -C "*|*show*) exit 2; esac\n'
    for tool in ("ip", "bridge", "nft", "sysctl", "ovs-vsctl", "ovs-ofctl", "iptables", "grep"):
        (fake / tool).write_text(body)
        (fake / tool).chmod(0o755)
    (fake / "id").write_text("#!/bin/sh\necho 0\n")
    (fake / "id").chmod(0o755)
    done = subprocess.run(
        ["sh", "-s"], input=script, env={"PATH": f"{fake}:/usr/bin:/bin"}, cwd=tmp_path, text=True, capture_output=True
    )
    return done, [call.split("\0")[:-1] for call in log.read_text().split("\1\0")[:-1]]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_data(name: Any, tmp_path: Path) -> None:
    wanted = want(first(2))
    port = next(iter(wanted.ports))
    bad = dataclasses.replace(
        wanted,
        ports={port: Port("gre", "192.0.2.12", "192.0.2.11", "", name, name)},
        sysctls={**wanted.sysctls, f"net/ipv6/conf/{name}/accept_ra": "2"},
    )
    done, calls = executed(render(bad, f"node {name}", [f"about {name}"], f"/run/{name}"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "X").exists()
    plain, expected = executed(render(wanted, "node web1"), tmp_path)
    assert plain.returncode == 0
    # one sysctl more, and not one other command
    assert sorted({tuple(c[:1]) for c in calls}) == sorted({tuple(c[:1]) for c in expected})
    (sysctl,) = [c for c in calls if "accept_ra=2" in c[-1]]
    assert sysctl == ["sysctl", "-q", "-w", f"net/ipv6/conf/{name}/accept_ra=2"]
    (add,) = [c for c in calls if "add-port" in c]
    assert add[add.index("add-port") + 1 : add.index("add-port") + 3] == [OBR, port] and len(add) == 19


def test_two_hundred_peers_are_a_few_calls(tmp_path: Path) -> None:
    _, calls = executed(render(want(first(200)), "node web1"), tmp_path)
    assert len(calls) < 40
