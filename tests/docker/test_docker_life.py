"""What ovsmesh leaves to Docker and its owner: a network after cleanup, settings that belong together, containers."""

from __future__ import annotations

import json

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from tests.docker.test_docker_move import replace, settled
from tests.docker.test_docker_refuse import refused, unmoved
from tests.support.dockerkit import PLAIN, SOON, Docker, power_cut, until

pytestmark = [pytest.mark.docker, pytest.mark.lab]

Dockers = tuple[Lab, list[Docker]]
Calm = tuple[Lab, Docker]


def sysctl(docker: Docker, name: str) -> str:
    return docker.host.run(["sysctl", "-n", name]).stdout.strip()


def test_cleanup_after_a_reboot_leaves_docker_its_network(fresh: Dockers) -> None:
    """The agent was the first to turn forwarding on, and Docker has come to depend on it."""
    lab, (docker, _) = fresh
    host = docker.host
    replace(docker)
    settled(lab, [docker])
    docker.run("keeps", "always")
    power_cut(docker)
    netns.sysctl(host.ns, {"net/ipv4/ip_forward": "0"})
    host.run(["iptables", "-P", "FORWARD", "ACCEPT"])
    (host.state / "agent/before.json").unlink(missing_ok=True)
    host.start_ovsdb()
    host.start_vswitchd()
    replace(docker)
    settled(lab, [docker])
    until("the container", lambda: docker.running() == ["keeps"])
    assert json.loads((host.state / "agent/before.json").read_text())["net/ipv4/ip_forward"] == "0"
    host.stop_agent()
    done = host.ovsmesh("cleanup", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert docker.on("docker0") and sysctl(docker, "net.ipv4.ip_forward") == "1", done.stdout
    # as it is where no ovsmesh ever was: Docker found 0, and drops what it does not forward
    assert "-P FORWARD DROP" in host.run(["iptables", "-S"]).stdout
    until("the container", lambda: docker.running() == ["keeps"])
    netns.sysctl(host.ns, {"net/ipv4/ip_forward": "1"})


def test_cleanup_leaves_forwarding_on_for_a_docker_that_it_does_not_move(calm: Calm) -> None:
    _, docker = calm
    host = docker.host
    before = host.state / "agent/before.json"
    old = before.read_bytes() if before.exists() else None
    try:
        before.write_text('{"net/ipv4/ip_forward": "0"}')
        done = host.ovsmesh("cleanup", "--dry-run", "--docker", "auto", *docker.options)
        assert "net/ipv4/ip_forward left at 1: Docker runs" in done.stdout, done.stdout + done.stderr
        done = host.ovsmesh("cleanup", "--docker", "off", timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "net/ipv4/ip_forward left at 1: Docker runs" in done.stdout, done.stdout
        assert sysctl(docker, "net.ipv4.ip_forward") == "1" and docker.on("docker0")
    finally:
        if old is not None and before.parent.exists():
            before.write_bytes(old)
        assert host.ovsmesh("agent", "--once", "--docker", "off", timeout=60).returncode == 0


def test_docker_s_ipv6_goes_as_a_whole_where_the_mesh_has_none(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    nodes = [host.node for host in lab.hosts]
    file = '{"ipv6": true, "fixed-cidr-v6": "fd00:dead::/64"}'
    four = [node | {"podCIDRs": [c for c in node["podCIDRs"] if ":" not in c]} for node in nodes]
    lab.write_mesh(four, clusterCIDRs=["10.97.0.0/16"])
    try:
        docker.again(file)
        docker.run("keeps", "always")
        docker.run("ends")
        plan = docker.host.ovsmesh("plan", "--docker", "replace", *docker.options)
        assert "no IPv6 range in the mesh" in plan.stderr and "fixed-cidr-v6" in plan.stderr, plan.stdout + plan.stderr
        replace(docker)
        settled(lab, [docker])
        assert docker.restarts() == 1
        assert json.loads(docker.config.read_text()) == {"bridge": "kbr0", "mtu": 1462}
        until("the container", lambda: docker.running() == ["keeps"])
        docker.host.stop_agent()
        assert docker.host.ovsmesh("cleanup", timeout=60).returncode == 0
        assert docker.config.read_text() == file
    finally:
        lab.write_mesh()


def test_another_mtu_restarts_nothing(fresh: Dockers) -> None:
    lab, (docker, _) = fresh
    replace(docker)
    settled(lab, [docker])
    docker.run("ends")
    count, pid = docker.restarts(), docker.pid()
    for mtu in (1400, None):
        lab.write_mesh(None, **({"mtu": mtu} if mtu else {}))
        wanted = mtu or 1462
        until("the file", lambda wanted=wanted: json.loads(docker.config.read_text())["mtu"] == wanted)
        lab.converged(SOON, [docker.host], thorough=True)
        said = docker.host.ovsmesh("status").stdout
        assert ("for the next start of Docker" in said) == bool(mtu), said
    assert docker.restarts() == count and docker.pid() == pid and docker.running() == ["ends"]


def test_a_docker_that_would_not_start_again_is_left_running(calm: Calm) -> None:
    """Its owner has written `hosts` into the file, which is on the command line too, and has not restarted it since."""
    _, docker = calm
    file = json.dumps({"hosts": [f"unix://{docker.dir}/docker.sock"]})
    docker.run("ends")
    docker.configure(file)
    refused(docker, "does not start again", "hosts")
    unmoved(docker, file=file)
    assert docker.running() == ["ends"]


def test_a_docker_that_is_off_is_refused_before_anything_is_touched(calm: Calm) -> None:
    _, docker = calm
    docker.stop()
    text = refused(docker, "dockerd does not run", "--docker off")
    assert "changes nothing" in text
    assert docker.config.read_text() == PLAIN and docker.restarts() == 0 and not docker.alive()
    assert not (docker.host.state / "agent/docker.json").exists()
    docker.start()


def test_a_dockerd_on_tcp_only_is_refused_by_name(calm: Calm) -> None:
    lab, docker = calm
    docker.stop()
    (docker.dir / "argv.json").write_text(json.dumps(["--host=tcp://127.0.0.1:23755"]))
    docker.start()
    none = ("--docker-socket", str(docker.dir / "none.sock"))
    try:
        refused(docker, "tcp://127.0.0.1:23755", f"--docker-socket {docker.dir}/docker.sock", options=none)
        unmoved(docker)
        docker.host.start_agent("--docker", "auto", *docker.options, *none)
        lab.converged(SOON, [docker.host])
        until("the word of it", lambda: "tcp://127.0.0.1:23755" in docker.host.ovsmesh("status").stdout)
    finally:
        (docker.dir / "argv.json").unlink()


def test_a_remote_docker_host_is_refused_by_name(calm: Calm) -> None:
    _, docker = calm
    argv = ["env", "DOCKER_HOST=tcp://192.0.2.99:2375", *docker.host.command("agent"), "--once"]
    done = docker.host.run([*argv, "--docker", "replace", *docker.options], 60, check=False)
    assert done.returncode == 1 and "DOCKER_HOST is tcp://192.0.2.99:2375" in done.stderr, done.stderr
    unmoved(docker)


def test_a_swarm_node_is_refused_by_name(calm: Calm) -> None:
    _, docker = calm
    docker.api("POST", "/swarm/init", {"ListenAddr": "127.0.0.1:23777", "AdvertiseAddr": "127.0.0.1"})
    try:
        refused(docker, "Swarm", "docker swarm leave")
        unmoved(docker)
    finally:
        docker.api("POST", "/swarm/leave?force=1")
