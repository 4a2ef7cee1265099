"""What the tests of the filter rules share: namespaces of their own, a mesh of two, one pass of the agent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.dataplane import firewall_rules
from ovsmesh.dataplane.nft_syntax import sets_used
from ovsmesh.dataplane.types import Dataplane, Facts
from ovsmesh.linux.firewall import Firewall
from ovsmesh.mesh.types import Mesh, Node
from tests.support.needs import needs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")
needs_nft = pytest.mark.skipif(not shutil.which("nft"), reason="nft is not installed")

ME = Node("web1", ip_address("192.0.2.1"), (ip_network("10.97.1.0/24"), ip_network("fd00:97:1::/64")))
PEER = Node("web2", ip_address("192.0.2.2"), (ip_network("10.97.2.0/24"),))
MESH = Mesh((ip_network("10.97.0.0/16"), ip_network("fd00:97::/32")), (ME, PEER))
LIBC = ctypes.CDLL(None, use_errno=True)


def use_iptables(variant: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have iptables and ip6tables be those of "nft" or "legacy", by links in `folder`."""
    for tool in ("iptables", "ip6tables"):
        for suffix in ("", "-restore"):
            real = shutil.which(f"{tool}-{variant}{suffix}")
            if not real:
                pytest.skip(f"{tool}-{variant}{suffix} is not installed")
            (folder / (tool + suffix)).symlink_to(real)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@contextlib.contextmanager
@needs("root")
def inside(name: Any) -> Iterator[Any]:
    """The calling thread, and what it starts, in a network namespace."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{name}") as there:
        assert LIBC.setns(there.fileno(), 0) == 0
        try:
            yield
        finally:
            assert LIBC.setns(home.fileno(), 0) == 0


def sh(*commands: Any) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, timeout=10)


def nft(script: Any) -> Any:
    return subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True, capture_output=True, timeout=10)


def desired(mesh: Any = MESH, facts: Any = None, peers: Any = (PEER,), ports: Any = ()) -> Any:
    return Dataplane(
        rules=firewall_rules.rules(mesh, ME, facts or Facts()),
        filter_peers=dict(firewall_rules.peer_set(peer) for peer in peers)
        | firewall_rules.range_sets(c for peer in peers for c in peer.pod_cidrs)
        | dict.fromkeys(ports, "pods"),
    )


def possible(firewall: Any, want: Any, probe: bool = True) -> Any:
    """What is left of the desired rules and set elements on this system, as desired.dataplane computes it."""
    rules = firewall_rules.supported(want.rules, firewall.missing(lambda: want.rules, probe))
    used = sets_used(r.text for r in rules.values())
    return replace(
        want, rules=rules, filter_peers={e: where for e, where in want.filter_peers.items() if where in used}
    )


def converge(firewall: Any, want: Any) -> Any:
    """One pass as the agent makes it: returns whether anything had to be written, and what is there after."""
    want = possible(firewall, want)
    have = firewall.observe(want.rules)
    differs = (list(have.rules.items()), have.peers) != (list(want.rules.items()), want.filter_peers)
    firewall.apply(want.rules, want.filter_peers)
    after = firewall.observe(want.rules)
    assert (list(after.rules.items()), after.peers) == (list(want.rules.items()), want.filter_peers)
    return differs


@pytest.fixture
@needs("root")
def namespaces() -> Iterator[Any]:
    made = []

    def make(*names: Any) -> Any:
        for name in names:
            sh(f"ip netns add fw{os.getpid()}{name}")
            made.append(f"fw{os.getpid()}{name}")
        return made[-len(names) :]

    yield make
    for name in made:
        sh(f"ip netns del {name}")


@pytest.fixture
def firewall(namespaces: Any) -> Iterator[Any]:
    (name,) = namespaces("n")
    with inside(name):
        firewall = Firewall()
        yield firewall
        firewall.close()
