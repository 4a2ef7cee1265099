"""Where the accept rules stand in FORWARD: behind everyone else's, and what stands in their way is named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.dataplane.types import Facts
from tests.support.firewallkit import converge, desired, needs_root, possible, sh, use_iptables

pytestmark = [pytest.mark.root, needs_root]
FACTS = Facts(forward_drop=("iptables", "ip6tables"))
DOCKER = """*filter
:FORWARD DROP
:DOCKER -
:DOCKER-ISOLATION-STAGE-1 -
:DOCKER-ISOLATION-STAGE-2 -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o kbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o kbr0 -j DOCKER
-A FORWARD -i kbr0 ! -o kbr0 -j ACCEPT
-A FORWARD -i kbr0 -o kbr0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i kbr0 ! -o kbr0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o kbr0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""


@pytest.fixture(params=["nft", "legacy"], autouse=True)
def variant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of iptables, as the program of that name."""
    use_iptables(str(request.param), tmp_path, monkeypatch)
    return str(request.param)


def chain(tool: str = "iptables") -> list[str]:
    done = subprocess.run([tool, "-S", "FORWARD"], text=True, capture_output=True, check=True)
    return done.stdout.splitlines()[1:]


def load(text: str) -> None:
    subprocess.run(["iptables-restore", "--noflush"], input=text, text=True, check=True, capture_output=True)


def last(lines: list[str]) -> bool:
    """Whether there are managed rules, and none of anybody else behind the first of them."""
    managed = ["ovsmesh:" in line for line in lines]
    return any(managed) and all(managed[managed.index(True) :])


def refused(firewall: Any, want: Any) -> list[Any]:
    return [problem for problem in firewall.observe(want.rules).problems if problem.reason == "ForwardRefused"]


LATER = {
    "a rule that is appended": ["iptables -A FORWARD -i kbr0 -d 192.0.2.1 -j DROP"],
    "a jump that is appended": ["iptables -N mine", "iptables -A FORWARD -j mine"],
    "a log that is appended": ["iptables -A FORWARD -j LOG"],
    "a Docker that starts": [],
}


@pytest.mark.parametrize("later", LATER)
def test_what_others_write_later_comes_first_again(firewall: Any, variant: str, later: str) -> None:
    sh("iptables -P FORWARD DROP", "iptables -A FORWARD -s 198.51.100.0/24 -j DROP")
    converge(firewall, desired(facts=FACTS))
    assert last(chain()) and len(chain()) > 1
    firewall.drain()
    if later.startswith("a Docker"):
        load(DOCKER)
    sh(*LATER[later])
    assert firewall.drain() or variant == "legacy"
    firewall.resync()
    assert converge(firewall, desired(facts=FACTS))
    assert last(chain()), chain()
    assert not converge(firewall, desired(facts=FACTS))


def test_a_rule_in_front_of_a_users_is_drift_that_names_it(firewall: Any) -> None:
    load(DOCKER)
    want = desired(facts=FACTS)
    converge(firewall, want)
    sh("iptables -A FORWARD -s 10.97.1.7/32 -j DROP")
    firewall.resync()
    seen = firewall.observe(possible(firewall, want).rules).rules["iptables", "FORWARD", "mesh-out"]
    assert "-s 10.97.1.7/32 -j DROP" in seen.text


def test_one_rule_that_is_repaired_does_not_jump_ahead(firewall: Any) -> None:
    load(DOCKER)
    converge(firewall, desired(facts=FACTS))
    sh(f"iptables -D {next(line for line in chain() if 'mesh-in' in line)[3:]}".replace('"', ""))
    firewall.resync()
    assert converge(firewall, desired(facts=FACTS))
    assert last(chain()), chain()


def test_rules_of_an_older_agent_at_the_top_are_moved(firewall: Any) -> None:
    load(DOCKER)
    converge(firewall, desired(facts=FACTS))
    for line in chain():
        if "ovsmesh:" in line:
            sh(f"iptables -D {line[3:]}".replace('"', ""), f"iptables -I {line[3:]}".replace('"', ""))
    assert not last(chain())
    firewall.resync()
    assert converge(firewall, desired(facts=FACTS))
    assert last(chain()), chain()


def test_who_keeps_an_accept_of_marked_packets_last_is_not_fought(firewall: Any) -> None:
    # as Felix of Calico does, which moves its own rule behind ours as often as ours goes behind it
    sh("iptables -P FORWARD DROP")
    converge(firewall, desired(facts=FACTS))
    sh("iptables -A FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT")
    firewall.resync()
    assert not converge(firewall, desired(facts=FACTS))


CLOSED = {
    "iptables -A FORWARD -j REJECT --reject-with icmp-host-prohibited": ("FORWARD", 2),
    "iptables -A FORWARD -i kbr0 -o kbr0 -j DROP": ("FORWARD", 2),
    "iptables -A FORWARD ! -i eth0 -j DROP": ("FORWARD", 2),
    "iptables -A FORWARD -d 10.0.0.0/8 -j DROP": ("FORWARD", 2),
    "iptables -A FORWARD -m conntrack --ctstate NEW -j DROP": ("FORWARD", 2),
    "iptables -A FORWARD -p tcp -j DROP": ("FORWARD", 2),
    "iptables -A FORWARD -m comment --comment bye -g shut": ("shut", 1),
    "iptables -A FORWARD -j shut": ("shut", 1),
}


@pytest.mark.parametrize("rule", CLOSED)
def test_a_closing_rule_before_the_place_is_named_with_the_command_that_opens_it(firewall: Any, rule: str) -> None:
    sh("iptables -N shut", "iptables -A shut -j DROP", "iptables -A FORWARD -i eth0 -o eth1 -j DROP", rule)
    want = desired(facts=FACTS)
    converge(firewall, want)
    name, number = CLOSED[rule]
    (problem,) = refused(firewall, want)
    assert problem.fatal and problem.reason == "ForwardRefused"
    command = f"iptables -I {name} {number} -i kbr0 -o kbr0 -j ACCEPT"
    assert f"rule {number} of chain {name}" in problem.message and f"`{command}`" in problem.message, problem
    # what it says opens it, and then it is silent
    sh(command)
    firewall.resync()
    assert refused(firewall, want) == []


OPEN = [
    "iptables -A FORWARD -i eth0 -j DROP",
    "iptables -A FORWARD -d 172.16.0.0/12 -j DROP",
    "iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "iptables -A FORWARD -p tcp --dport 25 -j REJECT",
    "iptables -A FORWARD -m mark --mark 7 -j DROP",
    "iptables -A FORWARD -s 10.97.1.7 -j DROP",
    "iptables -A FORWARD -i kbr1+ -j DROP",
]


@pytest.mark.parametrize("rule", OPEN)
def test_a_rule_about_other_packets_is_not_named(firewall: Any, rule: str) -> None:
    sh(rule)
    want = desired(facts=FACTS)
    converge(firewall, want)
    assert refused(firewall, want) == []


def test_a_docker_on_kbr0_with_icc_lets_through_and_one_without_is_named(firewall: Any) -> None:
    load(DOCKER)
    sh("iptables -A FORWARD -j REJECT")
    want = desired(facts=FACTS)
    converge(firewall, want)
    assert refused(firewall, want) == [], "Docker's own rule accepts before"
    sh("iptables -D FORWARD -i kbr0 -o kbr0 -j ACCEPT", "iptables -I FORWARD 6 -i kbr0 -o kbr0 -j DROP")
    firewall.resync()
    (problem,) = refused(firewall, want)
    assert "icc" in problem.message and "rule 6 of chain FORWARD" in problem.message


def test_ufw_is_opened_by_its_own_command(firewall: Any) -> None:
    sh("iptables -N ufw-reject-forward", "iptables -A ufw-reject-forward -j REJECT")
    sh("iptables -A FORWARD -j ufw-reject-forward")
    want = desired(facts=FACTS)
    converge(firewall, want)
    (problem,) = refused(firewall, want)
    assert "`ufw route allow in on kbr0 out on kbr0`" in problem.message


def test_the_other_kind_of_iptables_is_looked_at_too(firewall: Any, variant: str) -> None:
    if variant == "legacy":
        pytest.skip("its brother's rules are an nft table, as any other")
    sh("iptables-legacy -P FORWARD DROP")
    want = desired()
    firewall.resync()
    (problem,) = refused(firewall, want)
    command = "iptables-legacy -A FORWARD -i kbr0 -o kbr0 -j ACCEPT"
    assert "policy DROP" in problem.message and f"`{command}`" in problem.message, problem
    sh(command)
    firewall.resync()
    assert refused(firewall, want) == []
