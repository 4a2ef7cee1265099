"""What drops the mesh's packets in another program's table is named at home, with the command that opens it."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, live

pytestmark = pytest.mark.lab

RULESETS = Path(__file__).parent / "rulesets"
POLICY = "type filter hook forward priority 0; policy drop;"
ESTABLISHED = "ct state established,related accept;"


class Wall(NamedTuple):
    """A table of another program, the words that name what drops in it, and whether its remedy is run by nft."""

    text: str
    words: tuple[str, ...]
    remedied: bool = True


WALLS = {
    "inet, policy drop": Wall(
        f"table inet filter {{ chain forward {{ {POLICY} {ESTABLISHED} }}; }}",
        ("all packets", "h2", "policy drop of chain forward, table inet filter", "nft insert rule inet filter forward"),
    ),
    "inet, a closing reject": Wall(
        "table inet mine { chain way { type filter hook forward priority 10; ct state established accept;"
        ' iifname "eth0" tcp dport 80 accept; counter reject with icmpx type admin-prohibited; }; }',
        ("`reject with icmpx", "chain way, table inet mine", "nft insert rule inet mine way"),
    ),
    "ip6": Wall(f"table ip6 own {{ chain forward {{ {POLICY} }}; }}", ("policy drop of chain forward, table ip6 own",)),
    "bridge": Wall(
        "table bridge own { chain in { type filter hook input priority 0; policy drop; ether type arp accept; }; }",
        ("policy drop of chain in, table bridge own", "nft insert rule bridge own in ip saddr 10.97.0.0/16 accept"),
    ),
    "pings pass and the rest does not": Wall(
        f"table inet own {{ chain f {{ {POLICY} {ESTABLISHED} meta l4proto {{ icmp, ipv6-icmp }} accept; }}; }}",
        ("TCP and UDP packets", "ICMP passes", "policy drop of chain f, table inet own"),
    ),
    "what only packets show: a mark": Wall(
        'table inet own { chain f { type filter hook forward priority 3; meta mark 0 iifname "kbr0" drop; }; }',
        ("probes are dropped by `meta mark", "chain f, table inet own", "nft insert rule inet own f"),
    ),
    "firewalld": Wall((RULESETS / "firewalld-1.3.nft").read_text(), ("table inet firewalld", "firewall-cmd"), False),
}
OPEN = {
    "kbr0 is accepted": f'table inet a {{ chain f {{ {POLICY} iifname . oifname {{ "kbr0" . "kbr0" }} accept; }}; }}',
    "links of others are closed": 'table inet a { chain f { type filter hook forward priority 0; iifname "eth0" drop;'
    " ip daddr 198.51.100.0/24 drop; ip daddr 10.97.2.77 drop; tcp dport 25 drop; }; }",
}


def told(host: Host) -> list[str]:
    problems: list[dict[str, Any]] = live(host).get("problems", [])
    return [problem["message"] for problem in problems if problem["reason"] == "PacketsRefused"]


def checked(host: Host) -> list[str]:
    """What `check` says, which sends packets itself and watches them."""
    problems = json.loads(host.ovsmesh("check", "-o", "json", timeout=120).stdout)["problems"]
    return [problem["message"] for problem in problems if problem["reason"] == "PacketsRefused"]


def states(host: Host) -> set[str]:
    return {peer["state"] for peer in live(host).get("peers", ())}


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Lab:
    made = module_lab(2, 1, dual_stack=True)
    at_rest(made)
    return made


@pytest.fixture
def well(two: Lab) -> Iterator[Host]:
    one = two.host(1)
    for host in two.hosts:
        wait_for(f"{host.name} to be well", lambda h=host: states(h) == {"ok"} and not told(h), SOON)  # type: ignore[misc]
    yield one


def undo(host: Host, text: str) -> None:
    for table in re.findall(r"^table (\S+ \S+) \{", text, re.MULTILINE):
        host.run(["nft", f"delete table {table}"], check=False)


def connects(source: Host, target: Host) -> bool:
    """Whether a TCP packet of a pod reaches another, whose kernel refuses it, as nobody listens."""
    program = "import socket, sys; s = socket.socket(); s.settimeout(3); sys.exit(s.connect_ex((sys.argv[1], 9)))"
    address = str(target.pods[0].addresses[0])
    return source.pods[0].run(["python3", "-c", program, address], check=False).returncode == errno.ECONNREFUSED


def every_command_says(lab: Lab, host: Host, what: str) -> None:
    """Whoever asks in whatever way is told, and no exit status says that all is well."""
    for command, options, code in (
        ("check", (), 2),
        ("status", (), 2),
        ("bootstrap", ("--check",), 1),
        ("bootstrap", ("--wait", "60"), 2),
    ):
        done = host.ovsmesh(command, *options, timeout=120)
        assert done.returncode == code and what in done.stdout, f"{command} {options}: {done.stdout}{done.stderr}"
    assert "lost on this host" in host.ovsmesh("status").stdout.splitlines()[0]
    ends = [str(h.pods[0].addresses[0]) for h in lab.hosts]
    traced = host.ovsmesh("trace", *ends, timeout=120).stdout
    assert "nft insert rule inet filter forward" in " ".join(traced.split()), traced


@pytest.mark.parametrize("name", WALLS)
def test_what_drops_in_another_table_is_named_at_home_with_what_opens_it(two: Lab, well: Host, name: str) -> None:
    wall = WALLS[name]
    well.run(["nft", "-f", "-"], text=wall.text)
    try:
        look = checked if name.startswith("what only packets show") else told
        tries: list[list[str]] = []

        def named() -> bool:
            tries.append(look(well))
            return bool(tries[-1])

        wait_for("it to be named", named, SOON)
        said = tries[-1]
        assert all(word in said[0] for word in wall.words), said
        if name == "inet, policy drop":
            every_command_says(two, well, said[0])
        if wall.remedied:
            for command in re.findall("`(nft insert .*?)`", said[0]):
                well.run(shlex.split(command))
            wait_for("the remedy to work", lambda: not told(well), SOON)
            assert connects(well, two.host(2)) and connects(two.host(2), well)
    finally:
        undo(well, wall.text)


@pytest.mark.parametrize("name", OPEN)
def test_a_firewall_that_lets_the_mesh_through_is_not_called_a_fault(two: Lab, well: Host, name: str) -> None:
    well.run(["nft", "-f", "-"], text=OPEN[name])
    try:
        assert not checked(well)
        assert connects(well, two.host(2)) and connects(two.host(2), well)
    finally:
        undo(well, OPEN[name])
