"""Docker's containers move from docker0 into the mesh and back, with a real dockerd on each of two hosts."""

from __future__ import annotations

import json
import re
import signal
import stat
from ipaddress import ip_address

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from tests.support.dockerkit import SOON, Docker, links, power_cut, rules, until, without_kbr0

pytestmark = [pytest.mark.docker, pytest.mark.lab]

Dockers = tuple[Lab, list[Docker]]
FILE = (
    '{\n    "log-level": "info",\n\t"labels" : [ "a=b" ] ,\n  "bip": "172.18.0.1/16", "fixed-cidr": "172.18.1.0/24"}\n'
)
MTU = 1462


def replace(docker: Docker, *more: str) -> None:
    docker.host.start_agent("--docker", "replace", *docker.options, *more)


def settled(lab: Lab, dockers: list[Docker], bridge: str = "kbr0") -> None:
    for docker in dockers:
        until(f"Docker of {docker.host.name} on {bridge}", lambda docker=docker: docker.on(bridge))
    lab.converged(SOON, [docker.host for docker in dockers], thorough=True)


def reaches(one: Docker, name: str, address: str, size: int) -> bool:
    # the userspace datapath loses the first packets of a new tunnel
    return bool(until(f"{name} to reach {address}", lambda: one.ping(name, address, size), SOON))


def test_containers_move_into_the_mesh_and_back(fresh: Dockers) -> None:
    lab, dockers = fresh
    for docker in dockers:
        docker.host.run(["iptables", "-P", "FORWARD", "DROP"])
        docker.again(FILE, mode=0o640)
        docker.run("keeps", "always")
        docker.run("ends")
    before = [(rules(d.host), links(d.host), d.config.read_bytes()) for d in dockers]
    assert before[0][1]["docker0"] == (1500, ["172.18.0.1"])
    one, two = dockers

    # what would be done is said beforehand, and nothing of it is done
    host = one.host
    host.start_agent("--docker", "auto", *one.options)
    lab.converged(SOON, [host])
    assert "docker0" in host.ovsmesh("status").stdout
    assert "--docker replace" in host.ovsmesh("status").stdout
    host.stop_agent()
    assert one.restarts() == 0 and one.config.read_bytes() == before[0][2]

    for docker in dockers:
        replace(docker)
    settled(lab, dockers)
    for docker in dockers:
        number = docker.host.index
        text = docker.config.read_text()
        assert text == (
            '{\n    "log-level": "info",\n\t"labels" : [ "a=b" ],\n\t"bridge" : "kbr0",\n\t"mtu" : 1462,'
            f'\n\t"ipv6" : true,\n\t"fixed-cidr-v6" : "fd00:97:{number}::/64"}}\n'
        )
        assert stat.S_IMODE(docker.config.stat().st_mode) == 0o640
        assert docker.restarts() == 1
        assert docker.running() == ["keeps"], "a container with restart=always comes back, another one does not"
        assert docker.address("keeps").startswith(f"10.97.{number}.") and docker.mtu("keeps") == MTU
        assert "docker0" not in links(docker.host)
        docker.begin("ends")
    for name in ("keeps", "ends"):
        for version, header in ((4, 28), (6, 48)):
            reaches(one, name, two.address(name, version), MTU - header)
            assert not one.ping(name, two.address(name, version), MTU - header + 1)
    # a container and a pod of another host are neighbours as any two
    assert one.ping("keeps", str(lab.host(2).pod_cidrs[0].network_address + 1), MTU - 28)

    # the old rules are gone, what is dropped by default still is, and nothing is masqueraded on the way
    for docker in dockers:
        text = rules(docker.host)
        assert "docker0" not in text and ":FORWARD DROP" in text, text
    with two.host.capture() as seen:
        assert one.ping("keeps", two.address("keeps"))
    sources = {str(ip_address(frame[26:30])) for frame in seen.kept if frame[12:14] == b"\x08\x00"}
    assert sources == {one.address("keeps"), two.address("keeps")}

    found = json.loads(one.host.ovsmesh("status", "-o", "json").stdout)
    assert found["self"]["docker"].startswith("on kbr0 10.97.1.0/24 and IPv6, MTU 1462 (")
    assert found["converged"] is True
    assert "Docker" in one.host.ovsmesh("status").stdout

    # the agent again: nothing is done twice
    for docker in dockers:
        docker.host.stop_agent()
        replace(docker)
    settled(lab, dockers)
    assert [d.restarts() for d in dockers] == [1, 1]
    for docker in dockers:
        docker.host.stop_agent()

    dry = one.host.ovsmesh("cleanup", "--dry-run").stdout
    for words in ("- docker bridge", "- docker mtu", "- docker daemon"):
        assert words in dry, dry
    for docker, (old_rules, old_links, old_file) in zip(dockers, before, strict=True):
        done = docker.host.ovsmesh("cleanup", timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nothing of ovsmesh is left" in done.stdout and "0 docker" in done.stdout
        assert docker.on("docker0")
        assert docker.config.read_bytes() == old_file
        assert stat.S_IMODE(docker.config.stat().st_mode) == 0o640
        assert rules(docker.host) == old_rules
        assert links(docker.host) == old_links
        assert not (docker.host.state / "agent").exists()
        assert docker.running() == ["keeps"] and docker.address("keeps").startswith("172.18.")
        again = docker.host.ovsmesh("cleanup")
        assert again.returncode == 0 and docker.restarts() == 2, again.stdout + again.stderr


def test_the_plan_says_each_step_and_whom_it_stops(fresh: Dockers) -> None:
    _, (docker, _) = fresh
    docker.again(FILE)
    docker.run("keeps", "always")
    docker.run("ends")
    docker.misbehave("nothing")
    done = docker.once("--docker-timeout", "1")
    assert done.returncode == 1, done.stderr
    docker.misbehave("")
    docker.touch()
    host = docker.host
    plan = host.ovsmesh("plan")
    assert plan.returncode == 2, plan.stdout + plan.stderr
    lines = plan.stdout.splitlines()
    for line in (
        "+ docker bridge kbr0",
        "+ docker mtu 1462",
        "- docker bip",
        "- docker fixed-cidr",
        "~ docker daemon on docker0 172.18.0.0/16, MTU 1500 → on kbr0 10.97.1.0/24 and IPv6, MTU 1462",
        "- docker docker0",
    ):
        assert line in lines, (line, lines)
    assert "stops 2 containers: keeps come back with new addresses; ends stay stopped" in plan.stderr
    assert docker.on("docker0") and docker.config.read_text() == FILE


@pytest.mark.parametrize("first", [pytest.param("docker", marks=without_kbr0), "agent"])
def test_after_a_power_cut_all_comes_back_in_either_order(fresh: Dockers, first: str) -> None:
    lab, dockers = fresh
    one, two = dockers
    for docker in dockers:
        replace(docker)
    settled(lab, dockers)
    for docker in dockers:
        docker.run("keeps", "always")
    restarts = one.restarts()
    power_cut(one)
    if first == "docker":
        assert one.start(check=False), "without kbr0 dockerd refuses to start"
        assert not one.alive()
    host = one.host
    host.start_ovsdb()
    host.start_vswitchd()
    replace(one)
    settled(lab, [one])
    assert one.restarts() == restarts + 1, "it did not run, and was started once"
    until("the container", lambda: one.running() == ["keeps"])
    reaches(one, "keeps", two.address("keeps"), MTU - 28)


def test_a_docker_that_somebody_stopped_is_left_alone(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    replace(docker)
    settled(lab, [docker])
    count = docker.restarts()
    docker.stop()
    until("the word of it", lambda: "dockerd does not run" in docker.host.ovsmesh("status").stdout)
    docker.host.stop_agent()
    replace(docker)
    lab.converged(SOON, [docker.host], thorough=True)
    assert docker.restarts() == count and not docker.alive()
    docker.start()
    until("Docker again", lambda: docker.on("kbr0"))


def test_kbr0_made_again_has_its_containers_again(fresh: Dockers) -> None:
    lab, dockers = fresh
    one, two = dockers
    for docker in dockers:
        replace(docker)
    settled(lab, dockers)
    one.run("a1")
    two.run("a2")
    reaches(one, "a1", two.address("a2"), 56)
    # a container is traced by its name, from inside its own network
    traced = one.host.ovsmesh("trace", "-o", "json", "a1", two.address("a2"))
    found = json.loads(traced.stdout or "{}")
    assert traced.returncode == 0 and found["source"]["name"] == "a1", traced.stdout + traced.stderr
    assert found["sentFrom"] == "pod" and {hop["verdict"] for hop in found["hops"]} == {"ok"}, traced.stdout
    count = one.restarts()
    netns.ip_batch(["link del kbr0"], one.host.ns)
    reaches(one, "a1", two.address("a2"), MTU - 28)
    assert one.restarts() == count and one.running() == ["a1"]
    # and one that is started now is plugged in too
    one.run("a3")
    reaches(one, "a3", two.address("a2"), MTU - 28)


def test_changes_that_others_made_to_the_file_stay(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    docker.again('{"mtu": 1400, "debug": false}')
    replace(docker)
    settled(lab, [docker])
    # someone adds a setting, and removes one that ovsmesh wrote
    text = docker.config.read_text().replace('"debug": false', '"debug": true, "max-concurrent-uploads": 3')
    docker.configure(re.sub(r',\s*"ipv6": true', "", text))
    count = docker.restarts()
    until("the repair", lambda: '"ipv6": true' in docker.config.read_text())
    lab.converged(SOON, [docker.host], thorough=True)
    assert docker.restarts() == count, "the daemon was as it should be"
    docker.host.stop_agent()
    done = docker.host.ovsmesh("cleanup", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(docker.config.read_text()) == {"mtu": 1400, "debug": True, "max-concurrent-uploads": 3}


def test_where_there_was_no_file_there_is_none_afterwards(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    docker.stop()
    docker.configure(None)
    docker.config.parent.rmdir()
    docker.start()
    replace(docker)
    settled(lab, [docker])
    assert json.loads(docker.config.read_text())["bridge"] == "kbr0"
    assert stat.S_IMODE(docker.config.stat().st_mode) == 0o644
    docker.host.stop_agent()
    done = docker.host.ovsmesh("cleanup", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not docker.config.parent.exists() and docker.on("docker0")


def test_auto_keeps_a_docker_that_is_on_kbr0_and_restarts_nothing(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    replace(docker)
    settled(lab, [docker])
    docker.host.stop_agent()
    docker.configure(docker.config.read_text().replace('"mtu": 1462', '"mtu": 1500'))
    count = docker.restarts()
    docker.host.start_agent("--docker", "auto", *docker.options)
    until("the repair", lambda: '"mtu": 1462' in docker.config.read_text())
    lab.converged(SOON, [docker.host], thorough=True)
    docker.host.stop_agent()
    before = docker.config.read_bytes()
    docker.host.start_agent("--docker", "off", *docker.options)
    lab.converged(SOON, [docker.host], thorough=True)
    assert "docker" not in docker.host.ovsmesh("status", "-o", "json").stdout
    assert docker.restarts() == count and docker.config.read_bytes() == before
    # but what was done to it before is taken back
    docker.host.stop_agent()
    done = docker.host.ovsmesh("cleanup", timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert docker.config.read_text() == "{}\n" and docker.on("docker0")


def test_what_a_killed_dockerd_leaves_in_iptables_goes(fresh: Dockers) -> None:
    """Its masquerade rule would hit a mesh that has docker0's old range."""
    lab, (docker, _) = fresh
    host = docker.host
    old = rules(host)
    docker.stop(signal.SIGKILL)
    # with what it remembers of docker0 it would clear up itself
    (docker.dir / "data/network/files/local-kv.db").unlink()
    docker.configure('{"bridge": "none"}')
    docker.start()
    assert "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE" in rules(host)
    host.run(["iptables", "-A", "DOCKER-USER", "-i", "docker0", "-j", "RETURN"])
    host.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "172.17.9.9/32", "-j", "MASQUERADE"])
    replace(docker)
    settled(lab, [docker])
    text = rules(host)
    left = [line for line in text.splitlines() if "docker0" in line or "172.17" in line]
    assert left == ["-A DOCKER-USER -i docker0 -j RETURN", "-A POSTROUTING -s 172.17.9.9/32 -j MASQUERADE"], text
    host.run(["iptables", "-D", "DOCKER-USER", "-i", "docker0", "-j", "RETURN"])
    host.run(["iptables", "-t", "nat", "-D", "POSTROUTING", "-s", "172.17.9.9/32", "-j", "MASQUERADE"])
    host.stop_agent()
    assert host.ovsmesh("cleanup", timeout=60).returncode == 0
    docker.again("{}\n")
    assert rules(host) == old


def test_a_dockerd_that_came_before_the_address_is_put_right(fresh: Dockers) -> None:
    """On a bridge without an address dockerd puts one of its own, 172.17.0.1/16."""
    lab, (docker, _) = fresh
    replace(docker)
    settled(lab, [docker])
    host = docker.host
    host.stop_agent()
    docker.stop()
    host.run(["ip", "addr", "flush", "dev", "kbr0"])
    # else it remembers what it had there
    (docker.dir / "data/network/files/local-kv.db").unlink()
    docker.start()
    assert "172.17.0.1" in links(host)["kbr0"][1], links(host)
    assert docker.run("old").startswith("172.17.")
    count = docker.restarts()
    replace(docker)
    # a restart would stop the container, and meanwhile that still uses the address
    until("the word of it", lambda: "Stop old when" in host.ovsmesh("status").stdout)
    assert docker.restarts() == count and "172.17.0.1" in links(host)["kbr0"][1] and docker.running() == ["old"]
    docker.remove("old")
    until("the right range", lambda: links(host)["kbr0"][1] == ["10.97.1.1"] and docker.on("kbr0"))
    lab.converged(SOON, [host], thorough=True)
    assert docker.run("a1").startswith("10.97.1.")
    assert links(host)["kbr0"][1] == ["10.97.1.1"]


def test_a_node_that_is_renumbered_takes_its_docker_along(fresh: Dockers) -> None:
    """dockerd remembers the range it had on a bridge, and at its next start uses it in place of the pod CIDR."""
    lab, (docker, _) = fresh
    nodes = [host.node for host in lab.hosts]
    replace(docker)
    settled(lab, [docker])
    docker.run("keeps", "always")
    count = docker.restarts()
    lab.write_mesh([nodes[0] | {"podCIDRs": ["10.97.77.0/24", "fd00:97:77::/64"]}, nodes[1]])
    try:
        # a restart would stop its containers, and nobody has asked for that
        until("the word of it", lambda: "Stop keeps when" in docker.host.ovsmesh("status").stdout)
        assert docker.restarts() == count and docker.running() == ["keeps"]
        docker.halt("keeps")
        until(
            "the new range", lambda: docker.on("kbr0") and docker.running() and "10.97.77." in docker.address("keeps")
        )
        lab.converged(SOON, [docker.host], thorough=True)
        assert links(docker.host)["kbr0"][1] == ["10.97.77.1"]
        docker.host.stop_agent()
        assert docker.host.ovsmesh("cleanup", timeout=90).returncode == 0
    finally:
        lab.write_mesh()
    assert docker.config.read_text() == "{}\n" and docker.on("docker0")


def test_docker_and_cni_on_one_node_give_out_different_addresses(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    nets = docker.dir / "net.d"
    nets.mkdir(exist_ok=True)
    replace(docker, "--cni-dir", str(nets))
    settled(lab, [docker])
    found = json.loads((nets / "10-ovsmesh.conflist").read_text())["plugins"][0]["ipam"]["ranges"]
    assert found[0] == [{"subnet": "10.97.1.0/24", "gateway": "10.97.1.1", "rangeEnd": "10.97.1.127"}]
    for name in ("a1", "a2"):
        assert 128 <= int(docker.run(name).split(".")[3]) < 255
    assert docker.mtu("a1") == MTU and docker.ping("a1", docker.address("a2"), MTU - 28)
