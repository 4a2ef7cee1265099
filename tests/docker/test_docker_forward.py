"""What Docker closes stays closed: DOCKER-USER, isolation between networks, unpublished ports, whoever came first."""

from __future__ import annotations

import json

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from tests.support.dockerkit import SOON, Docker, until

pytestmark = [pytest.mark.docker, pytest.mark.lab]

Dockers = tuple[Lab, list[Docker]]


def reaches(host: Host, address: str) -> bool:
    return host.run(["ping", "-c1", "-W1", address], check=False).returncode == 0


def forward(host: Host) -> list[str]:
    return host.run(["iptables", "-S", "FORWARD"]).stdout.splitlines()[1:]


def placed(host: Host) -> bool:
    """Whether the managed rules are there, behind all others."""
    managed = ["ovsmesh:" in line for line in forward(host)]
    return any(managed) and all(managed[managed.index(True) :])


def test_a_docker_that_starts_after_the_agent_is_as_closed_as_alone(fresh: Dockers) -> None:
    lab, (one, two) = fresh
    host, outside = one.host, two.host
    # as after a boot: no Docker yet, nobody has turned forwarding on
    one.stop()
    host.run(["ip", "link", "del", "docker0"])
    for command in (["-F"], ["-X"], ["-P", "FORWARD", "ACCEPT"]):
        host.run(["iptables", *command])
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    host.start_agent("--docker", "off")
    lab.converged(SOON, [host])
    assert host.run(["sysctl", "-n", "net.ipv4.ip_forward"]).stdout == "1\n"
    one.start()
    until("the rules behind Docker's", lambda: any("DOCKER" in line for line in forward(host)) and placed(host))
    address = one.run("box")
    outside.run(["ip", "route", "add", f"{address}/32", "via", str(host.address)])
    try:
        assert one.ping("box", str(outside.address)), "its own way out is open"
        assert not reaches(outside, address), "and nothing else is"
        said = host.ovsmesh("status").stdout
        assert "nobody had it on before the agent" in said, said
        # another agent does not take the first one's switch for somebody else's
        host.stop_agent()
        host.start_agent("--docker", "off")
        lab.converged(SOON, [host])
        assert not reaches(outside, address)
        # what Docker's user opens is open
        host.run(["iptables", "-I", "DOCKER-USER", "-d", address, "-j", "ACCEPT"])
        assert reaches(outside, address)
    finally:
        outside.run(["ip", "route", "del", f"{address}/32"])
        host.run(["iptables", "-F", "DOCKER-USER"])


def test_docker_user_and_isolation_come_first_whoever_wrote_last(fresh: Dockers) -> None:
    lab, (one, two) = fresh
    host, outside = one.host, str(two.host.address)
    host.start_agent("--docker", "replace", *one.options)
    until("Docker on kbr0", lambda: one.on("kbr0"))
    lab.converged(SOON, [host])
    one.run("box")
    for name, internal in (("inner", True), ("other", False)):
        one.api("POST", "/networks/create", {"Name": name, "Internal": internal, "Driver": "bridge"})
    try:
        hidden = {name: one.run(name, network=name) or there(one, name) for name in ("inner", "other")}
        assert one.ping("box", outside)
        host.run(["iptables", "-I", "DOCKER-USER", "-i", "kbr0", "-d", outside, "-j", "DROP"])

        def closed() -> None:
            until("the rules behind Docker's", lambda: placed(host))
            assert not one.ping("box", outside), "DOCKER-USER"
            for name, address in hidden.items():
                assert not one.ping("box", address), f"isolation from {name}"

        closed()
        rule = next(line for line in forward(host) if "ovsmesh:mesh-in" in line)
        host.run(["iptables", *rule.replace('"', "").replace("-A", "-D", 1).split()])
        until("the repair", lambda: any("ovsmesh:mesh-in" in line for line in forward(host)))
        closed()
        one.again(one.config.read_text())
        closed()
        host.run(["iptables", "-A", "FORWARD", "-i", "kbr0", "-d", "203.0.113.9", "-j", "DROP"])
        closed()
    finally:
        host.run(["iptables", "-F", "DOCKER-USER"])
        host.run(["iptables", "-D", "FORWARD", "-i", "kbr0", "-d", "203.0.113.9", "-j", "DROP"], check=False)
        one.clear()
        for name in ("inner", "other"):
            one.api("DELETE", f"/networks/{name}")


def there(docker: Docker, name: str) -> str:
    """The address of a container on the user-defined network of its name."""
    return str(docker.inspect(name)["NetworkSettings"]["Networks"][name]["IPAddress"])


def test_icc_false_is_named_before_the_switch_and_after_it(fresh: Dockers) -> None:
    _, (one, _) = fresh
    host, text = one.host, '{"icc": false}\n'
    one.again(text)
    done = one.once()
    assert done.returncode == 1 and "`icc: false`" in done.stderr and "--docker off" in done.stderr, done.stderr
    assert "`icc: false`" in host.ovsmesh("plan").stdout
    assert one.on("docker0") and one.config.read_text() == text and one.restarts() == 0
    # its owner gives it up, and it moves
    one.configure("{}")
    host.start_agent("--docker", "replace", *one.options)
    until("Docker on kbr0", lambda: one.on("kbr0"))
    # its owner wants it again, on kbr0: the mesh is dead, and not in silence
    one.again(json.dumps(json.loads(one.config.read_text()) | {"icc": False}))
    until("the reason", lambda: "`icc: false`" in host.ovsmesh("status").stdout)
    reasons = {problem["reason"] for problem in json.loads(host.ovsmesh("status", "-o", "json").stdout)["problems"]}
    assert "DockerIsolates" in reasons
