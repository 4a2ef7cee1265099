"""Cleanup after real use: the host is as it was before the agent ever ran, and what is others' was never touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labpackets import assert_reach
from tests.support.labtools import (
    SOON,
    Make,
    State,
    await_state,
    difference,
    links,
    routes,
    rules,
    wiring,
)

pytestmark = pytest.mark.lab

OTHERS_NFT = """
table inet others { chain forward { type filter hook forward priority 10; ip saddr 10.97.0.0/16 accept; }; }
table bridge others { chain in { type filter hook prerouting priority -300; policy accept; }; }
"""
DOCKER = """*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
"""


def others(host: Host) -> None:
    """What a host with Docker, a firewall of its own and odd settings has."""
    host.run(["nft", "-f", "-"], text=OTHERS_NFT)
    for tool in ("iptables-restore", "ip6tables-restore"):
        host.run([tool, "--noflush"], text=DOCKER)
    lines = ["link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up"]
    lines += ["route add 203.0.113.0/24 via 192.0.2.1 metric 111", "route add unreachable 10.0.0.0/8 metric 999"]
    lines += ["neigh add 172.17.0.9 lladdr 02:00:00:00:00:09 dev docker0 nud permanent"]
    netns.ip_batch(lines, host.ns)
    settings = {
        "net/ipv4/ip_forward": "0",
        "net/ipv4/conf/all/send_redirects": "1",
        "net/ipv6/conf/all/forwarding": "0",
        "net/ipv4/conf/default/rp_filter": "1",
    }
    netns.sysctl(host.ns, settings)
    host.ovs_vsctl("add-br", "br-else", "--", "set", "bridge", "br-else", f"datapath_type={host.settings.datapath}")
    host.ovs_vsctl("set", "Open_vSwitch", ".", "external_ids:system-id=abc", "other_config:foo=bar")


@pytest.fixture(scope="module")
def bare(module_lab: Make) -> tuple[Lab, list[State]]:
    """Two hosts on which no agent has run yet, and their state."""
    made = module_lab(2, 1, dual_stack=True, agents=False)
    others(made.host(1))
    return made, [whole(host) for host in made.hosts]


def whole(host: Host) -> State:
    """All that may not differ after a cleanup; without the links by which the lab plugs its pods in."""
    found = wiring(host)
    found["links"] = {name: about for name, about in found["links"].items() if not name.startswith("vp")}
    found["sysctls"] = {k: v for k, v in found["sysctls"].items() if "/vp" not in k}
    return found


@pytest.fixture
def used(bare: tuple[Lab, list[State]]) -> Iterator[tuple[Lab, list[State]]]:
    """The lab after real use: agents, pods, pings, a repair; agents ended."""
    made, before = bare
    made.write_mesh()
    for host in made.hosts:
        # what a failed test has left
        if not host.daemon("ovsdb-server"):
            host.start_ovsdb()
        if not host.daemon("ovs-vswitchd"):
            host.start_vswitchd(restore_wait=False)
        if host.agent_alive():
            host.stop_agent()
        host.start_agent()
    made.converged(SOON)
    for host in made.hosts:
        host.plug()
    assert_reach(made)
    made.host(1).run(["ip", "route", "del", "10.97.2.0/24"])
    wait_for("a repair", lambda: any("10.97.2.0/24 via" in r for r in routes(made.host(1))), SOON)
    for host in made.hosts:
        host.stop_agent()
    yield made, before
    for host in made.hosts:
        host.stop_agent()
        host.ovsmesh("cleanup")
    for host, old in zip(made.hosts, before, strict=True):
        assert difference(old, whole(host)) == []


def test_cleanup_leaves_the_host_as_it_was(used: tuple[Lab, list[State]]) -> None:
    made, before = used
    for host, old in zip(made.hosts, before, strict=True):
        assert difference(old, whole(host)) != []
        dry = host.ovsmesh("cleanup", "--dry-run")
        done = host.ovsmesh("cleanup")
        assert done.returncode == 0, done.stdout + done.stderr
        assert difference(old, whole(host)) == []
        assert re.search(r"nothing of ovsmesh is left; \d+ sysctls are as they were", done.stdout), done.stdout
        assert not (host.state / "agent").exists()
        # it did what it had said it would, each part of it in a line
        steps = [line for line in dry.stdout.splitlines() if line[:2] in ("- ", "~ ")]
        assert len(steps) > 20
        assert sorted(steps) == sorted(line for line in done.stdout.splitlines() if line[:2] in ("- ", "~ "))
        for words in ("- port gre-h", "- bridge obr0", "- link kbr0", "- route 10.97.0.0/16", "- rule inet"):
            assert any(line.startswith(words) for line in steps), (words, steps)
        again = host.ovsmesh("cleanup")
        assert again.returncode == 0 and "nothing of ovsmesh is left" in again.stdout, again.stdout + again.stderr
        assert not [line for line in again.stdout.splitlines() if line[:2] in ("- ", "~ ")]
        assert difference(old, whole(host)) == []


def test_a_dry_run_changes_nothing(used: tuple[Lab, list[State]]) -> None:
    made, _ = used
    host = made.host(1)
    before, files = whole(host), sorted(path.name for path in (host.state / "agent").iterdir())
    done = host.ovsmesh("cleanup", "--dry-run")
    assert done.returncode == 0 and "would be removed" in done.stdout
    assert difference(before, whole(host)) == []
    assert sorted(path.name for path in (host.state / "agent").iterdir()) == files
    assert_reach(made)


def test_cleanup_refuses_while_the_agent_runs(used: tuple[Lab, list[State]]) -> None:
    made, _ = used
    host = made.host(1)
    process = host.start_agent()
    made.converged(SOON, [host])
    before = whole(host)
    done = host.ovsmesh("cleanup")
    assert done.returncode == 1
    assert str(process.pid) in done.stderr and "stop it" in done.stderr, done.stderr
    assert difference(before, whole(host)) == [] and host.ready()
    assert host.ovsmesh("cleanup", "--dry-run").returncode == 0


def test_cleanup_after_an_agent_that_was_killed_amid_things(used: tuple[Lab, list[State]]) -> None:
    made, before = used
    host = made.host(1)
    host.start_agent()
    made.converged(SOON, [host])
    host.stop_agent(signal.SIGKILL)
    # half of it is gone already
    host.ovs_vsctl("del-port", "gre-h2")
    netns.ip_batch(["link del kbr0"], host.ns)
    host.run(["nft", "delete", "table", "bridge", "ovsmesh"])
    done = host.ovsmesh("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    assert difference(before[0], whole(host)) == []


def test_cleanup_leaves_what_others_put_beside_ours(used: tuple[Lab, list[State]]) -> None:
    made, before = used
    host = made.host(1)
    lines = ["route add 10.97.9.0/24 via 192.0.2.1", "route add 10.97.2.0/25 via 192.0.2.1"]
    netns.ip_batch(lines, host.ns)
    host.run(["nft", "add", "table", "ip", "ovsmesh_not"])
    there = {"routes": [r for r in routes(host) if "via 192.0.2.1 " in f"{r} " and "10.97." in r]}
    assert len(there["routes"]) == 2
    done = host.ovsmesh("cleanup")
    assert done.returncode == 0, done.stdout + done.stderr
    left = [f"routes + {route}" for route in there["routes"]] + ["rules + table ip ovsmesh_not {", "rules + }"]
    assert [line for line in difference(before[0], whole(host)) if line not in left] == []
    assert set(there["routes"]) <= set(routes(host))
    host.run(["nft", "delete", "table", "ip", "ovsmesh_not"])
    netns.ip_batch([line.replace(" add ", " del ") for line in lines], host.ns)


def test_cleanup_leaves_an_unmanaged_port_and_says_so(used: tuple[Lab, list[State]]) -> None:
    made, before = used
    host = made.host(1)
    host.ovs_vsctl("add-port", "obr0", "alien", "--", "set", "interface", "alien", "type=internal")
    done = host.ovsmesh("cleanup")
    assert "alien" in done.stdout, done.stdout
    if "alien" in host.ovs_vsctl("list-ports", "obr0"):
        # the bridge stays for its sake, without a mark or a part of ours
        assert host.ovs_vsctl("list-ports", "obr0").split() == ["alien"]
    host.ovs_vsctl("del-port", "alien")
    again = host.ovsmesh("cleanup")
    assert again.returncode == 0, again.stdout + again.stderr
    host.ovs_vsctl("--if-exists", "del-br", "obr0")
    await_state(lambda: whole(host), before[0])


@contextmanager
def ended(argv: list[str], ns: str) -> Iterator[None]:
    """Run a program in a host's namespace, and end it."""
    with subprocess.Popen(["ip", "netns", "exec", ns, *argv], stdout=subprocess.DEVNULL) as child:
        try:
            yield
        finally:
            child.terminate()


def without(folder: Path, *programs: str) -> str:
    """Return a PATH that has all of this machine's programs but these."""
    for place in ("/usr/sbin", "/usr/bin"):
        for program in Path(place).iterdir():
            if program.name not in programs:
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return str(folder)


def kernel_part(host: Host) -> list[object]:
    """What is managed in the kernel, and does not change by itself when a switch ends."""
    return [set(links(host)), rules(host), [route.split(" linkdown")[0] for route in routes(host) if "111" in route]]


def refused(host: Host, *words: str, path: str = "", options: tuple[str, ...] = ()) -> None:
    """Assert that cleanup says these words, with and without --dry-run, and changes nothing."""
    before, files = whole(host) if host.daemon("ovs-vswitchd") else {}, sorted((host.state / "agent").iterdir())
    there = kernel_part(host)
    for dry in ((), ("--dry-run",)):
        command = ["env", f"PATH={path or os.environ['PATH']}", *host.command("cleanup"), *options, *dry]
        done = host.run(command, check=False)
        assert done.returncode == 1 and done.stdout == "", done.stdout
        assert done.stderr.startswith("ovsmesh: nothing was changed"), done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert kernel_part(host) == there
    assert sorted((host.state / "agent").iterdir()) == files
    if before:
        assert difference(before, whole(host)) == []


def test_cleanup_refuses_a_database_that_is_not_there(used: tuple[Lab, list[State]]) -> None:
    made, _ = used
    unseen = ("unix:/nope/db.sock", "? bridges", "? flows", "? ports", "2 links", "is installed", "--ovsdb")
    refused(made.host(1), *unseen, options=("--ovsdb", "unix:/nope/db.sock"))
    assert_reach(made)


def test_cleanup_refuses_the_database_of_another_switch(used: tuple[Lab, list[State]], tmp_path: Path) -> None:
    made, _ = used
    host, database, socket = made.host(1), tmp_path / "conf.db", tmp_path / "db.sock"
    host.run(["ovsdb-tool", "create", str(database), "/usr/share/openvswitch/vswitch.ovsschema"])
    with ended(["ovsdb-server", str(database), f"--remote=punix:{socket}", "--unixctl=none"], host.ns):
        wait_for("the other database", socket.exists, SOON)
        host.run(["ovs-vsctl", f"--db=unix:{socket}", "--no-wait", "init"])
        refused(host, "the link obr0 is in use", "another Open vSwitch's", options=("--ovsdb", f"unix:{socket}"))
    assert_reach(made)


def test_cleanup_refuses_while_open_vswitch_is_stopped(used: tuple[Lab, list[State]]) -> None:
    made, before = used
    host = made.host(1)
    host.kill_vswitchd()
    refused(host, "ovs-vswitchd does not answer", "systemctl start", "? flows", "1 bridges")
    host.kill_ovsdb()
    refused(host, "ovsdb-server does not answer", "db.sock is there", "? ports")
    host.start_ovsdb()
    host.start_vswitchd(restore_wait=False)
    again = host.ovsmesh("cleanup")
    assert again.returncode == 0, again.stdout + again.stderr
    await_state(lambda: whole(host), before[0])


def test_cleanup_works_where_open_vswitch_is_gone_for_good(used: tuple[Lab, list[State]], tmp_path: Path) -> None:
    made, before = used
    host, path = made.host(1), without(tmp_path, "ovs-vswitchd", "ovs-vsctl", "ovs-ofctl", "ovs-appctl", "ovsdb-server")
    host.kill_vswitchd()
    host.kill_ovsdb()
    (host.state / "db.sock").unlink()
    # what a switch that was killed leaves may be a living one's
    refused(host, "the link obr0 is there", "ip link del obr0", path=path)
    netns.ip_batch(["link del obr0"], host.ns)
    done = host.run(["env", f"PATH={path}", *host.command("cleanup")], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Open vSwitch is not installed here any more" in done.stdout and "nothing of ovsmesh is left" in done.stdout
    assert "kbr0" not in links(host) and not [route for route in routes(host) if "proto 111" in route]
    # it comes back after all, with all that it had
    host.start_ovsdb()
    host.start_vswitchd(restore_wait=False)
    again = host.ovsmesh("cleanup")
    assert again.returncode == 0 and "- bridge obr0" in again.stdout, again.stdout + again.stderr
    assert "! no agent has run with the state directory" in again.stdout and "? sysctls" in again.stdout
    await_state(lambda: whole(host), before[0])


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_cleanup_refuses_rules_that_it_can_not_read(used: tuple[Lab, list[State]], tmp_path: Path, tool: str) -> None:
    made, _ = used
    refused(made.host(1), f"{tool} is not installed", path=without(tmp_path, tool))


def test_cleanup_refuses_old_values_that_it_can_not_read(used: tuple[Lab, list[State]]) -> None:
    made, _ = used
    file = made.host(1).state / "agent/before.json"
    good = file.read_text()
    file.write_text(good[: len(good) // 2])
    refused(made.host(1), "before.json", "remove that file")
    file.write_text(good)
