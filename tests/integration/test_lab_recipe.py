"""`ovsmesh bootstrap --print`: the script alone makes the mesh, on real Open vSwitch, with no agent anywhere."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from ovsmesh.lab.host import Host
from tests.support.labtools import SOON, Make, difference, wiring

pytestmark = pytest.mark.lab


def printed(host: Host) -> str:
    done = host.ovsmesh("bootstrap", "--print")
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_hand(host: Host, script: str, check: bool = True) -> str:
    """Runs the script as a user does: a file, and sh."""
    path = host.state / "recipe.sh"
    path.write_text(script)
    done = host.run(["sh", str(path)], timeout=60, check=check)
    return done.stderr


@pytest.mark.parametrize(
    "options",
    [{"dual_stack": True}, {"key": 7, "underlay6": True}, {"encapsulation": "vxlan", "key": 5}],
    ids=["dual-stack", "key-ipv6-underlay", "vxlan"],
)
def test_the_recipe_alone_joins_all_pods_and_leaves_the_agent_nothing_to_do(lab: Make, options: Any) -> None:
    made = lab(3, 1, agents=False, **options)
    for host in made.hosts:
        script = printed(host)
        assert "python" not in script and not any(
            line.startswith("ovsmesh") for line in script.splitlines() if not line.startswith("#")
        )
        assert by_hand(host, script) == ""
    for host in made.hosts:
        host.plug()
    made.warm_up()
    tracks = made.ping_matrix()
    assert len(tracks) == 3 * 2 * (2 if "dual_stack" in options else 1)
    assert [track.pair for track in tracks if track.lost] == []
    for host in made.hosts:
        plan = host.ovsmesh("plan")
        assert (plan.returncode, plan.stdout) == (0, "nothing to change\n"), plan.stdout + plan.stderr
    # a second run changes nothing
    host = made.host(1)
    before = wiring(host)
    by_hand(host, printed(host))
    assert difference(before, wiring(host)) == []
    # and an agent takes over what the script made, and cleanup removes it
    host.start_agent()
    made.converged(30, [host])
    host.stop_agent()
    done = host.ovsmesh("cleanup")
    assert done.returncode == 0 and "nothing of ovsmesh is left" in done.stdout, done.stdout


def test_rules_of_docker_are_let_through_and_what_was_broken_is_repaired(lab: Make) -> None:
    made = lab(2, 1, agents=False)
    first = made.host(1)
    first.run(["iptables", "-P", "FORWARD", "DROP"])
    for host in made.hosts:
        by_hand(host, printed(host))
        host.plug()
    made.warm_up()
    assert [track.pair for track in made.ping_matrix() if track.lost] == []
    assert first.ovsmesh("plan").returncode == 0
    first.run(["ip", "link", "del", "kbr0"])
    first.run(["ip", "route", "del", "unreachable", "10.97.0.0/16", "metric", "4278198272"], check=False)
    first.ovs_vsctl("set", "Port", "gre-h2", "protected=false")
    first.ovs_ofctl("del-flows", "obr0")
    assert first.ovsmesh("plan").returncode == 2
    by_hand(first, printed(first))
    first.plug()
    assert first.ovsmesh("plan").returncode == 0
    made.warm_up()
    assert [track.pair for track in made.ping_matrix() if track.lost] == []


def test_unmanaged_bridges_are_refused_and_left_alone(lab: Make) -> None:
    made = lab(2, 0, agents=False)
    first, second = made.hosts
    scripts = {host.name: printed(host) for host in made.hosts}
    first.run(["ip", "link", "add", "kbr0", "type", "bridge"])
    second.ovs_vsctl("add-br", "obr0")
    for host, name in ((first, "kbr0"), (second, "obr0")):
        before = wiring(host)
        said = by_hand(host, scripts[host.name], check=False)
        assert f"{name} is not managed by ovsmesh" in said
        assert difference(before, wiring(host)) == []


def test_names_are_never_the_shells(lab: Make) -> None:
    made = lab(1, 0, agents=False)
    host = made.host(1)
    hostile = {
        "name": "true",
        "address": "192.0.2.77",
        "podCIDRs": ["10.97.77.0/24"],
        "uid": "$(touch /tmp/x)'\"\n\\END",
    }
    made.write_mesh(
        [host.node, hostile, {**hostile, "name": "a.b-C", "address": "192.0.2.78", "podCIDRs": ["10.97.78.0/24"]}]
    )
    script = printed(host)
    by_hand(host, script)
    plan = host.ovsmesh("plan")
    assert (plan.returncode, plan.stdout) == (0, "nothing to change\n"), plan.stdout + plan.stderr
    if shutil.which("shellcheck"):
        host.run(["shellcheck", str(host.state / "recipe.sh")])


def test_the_preflight_reports_every_problem_at_once(lab: Make) -> None:
    made = lab(3, 0, agents=False)
    first, second = made.host(1), made.host(2)
    good = first.ovsmesh("bootstrap", "--check")
    assert good.returncode == 0 and "FAIL" not in good.stdout, good.stdout
    assert "arrives at 2 of 2 peers" in good.stdout and "2 of 2 hosts answer a ping" in good.stdout
    drop = "table ip f { chain input { type filter hook input priority 0; policy drop; ip protocol icmp accept; }; }"
    first.run(["nft", "-f", "-"], text=drop)
    first.run(["ip", "link", "add", "kbr0", "type", "bridge"])
    first.run(["ip", "route", "add", "10.97.2.128/25", "via", "192.0.2.1"])
    refuse = ["iptables", "-I", "INPUT", "-p", "gre", "-j", "REJECT", "--reject-with", "icmp-admin-prohibited"]
    second.run(refuse)
    before = wiring(first)
    bad = first.ovsmesh("bootstrap", "--check")
    assert bad.returncode == 1
    for words in (
        "FAIL  ranges",
        "10.97.2.128/25 dev br-phy (of h2)",
        "bridge kbr0 is not managed by ovsmesh",
        "warn  firewall     table ip f refuses input by default",
        "FAIL  gre          1 of 2 peers: h2 192.0.2.12: a filter on the way",
    ):
        assert words in bad.stdout, bad.stdout
    assert difference(before, wiring(first)) == []
    first.run(["iptables", "-I", "OUTPUT", "-p", "gre", "-j", "DROP"])
    assert (
        "2 of 2 peers: h2 192.0.2.12: can't be sent: a filter of this host"
        in first.ovsmesh("bootstrap", "--check").stdout
    )


def test_the_wait_reports_who_answers_and_what_is_left(lab: Make) -> None:
    made = lab(3, 0, agents=False)
    made.write_mesh(
        [*(host.node for host in made.hosts), {"name": "away", "address": "192.0.2.99", "podCIDRs": ["10.97.99.0/24"]}]
    )
    first = made.host(1)
    nobody = first.ovsmesh("bootstrap", "--wait", "0")
    assert nobody.returncode == 1 and "no agent runs" in nobody.stdout
    for host in made.hosts:
        host.start_agent()
    made.converged(SOON)
    done = first.ovsmesh("bootstrap", "--wait", "30")
    assert done.returncode == 2 and done.stdout.startswith("h1: converged, 3 peers\n"), done.stdout + done.stderr
    assert "h2 192.0.2.12: answers in" in done.stdout and "no peer answers" not in done.stdout, done.stdout
    assert "away 192.0.2.99: unreachable: nothing arrives from it: is the host down" in done.stdout
    checked = first.ovsmesh("bootstrap", "--check")
    assert checked.returncode == 2 and "FAIL  peers        1 of 3 do not answer: away (unreachable" in checked.stdout
    # they answer the host, and let nothing through to their pods
    for host in made.hosts[1:]:
        drop = 'table inet odd { chain f { type filter hook forward priority 10; iifname "kbr0" drop; }; }'
        host.run(["nft", "-f", "-"], text=drop)
    dropped = first.ovsmesh("bootstrap", "--wait", "30")
    assert dropped.returncode == 2 and "h2 192.0.2.12: not forwarded: " in dropped.stdout, dropped.stdout
    assert "no peer answers. If this is the first host" in dropped.stdout
    for host in made.hosts[1:]:
        host.run(["nft", "delete", "table", "inet", "odd"])
    made.write_mesh()
    made.converged(SOON)
    alone = first.ovsmesh("bootstrap", "--wait", "30")
    assert alone.returncode == 0 and "h3 192.0.2.13: answers in" in alone.stdout, alone.stdout
    assert first.ovsmesh("bootstrap", "--check").returncode == 0
    first.run(["ip", "route", "add", "10.97.2.0/24", "via", "192.0.2.1"])
    stuck = first.ovsmesh("bootstrap", "--wait", "1")
    assert stuck.returncode == 1 and "not converged after 1 s" in stuck.stdout and "10.97.2.0/24" in stuck.stdout
