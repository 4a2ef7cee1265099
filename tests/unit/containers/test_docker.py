"""What is wanted of Docker, what is in its way, and whose iptables rules are left behind: decided without a Docker."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.containers import docker_rules
from ovsmesh.containers.docker_api import DaemonWatch, start_time
from ovsmesh.containers.docker_migration import DockerMigration
from ovsmesh.containers.docker_state import MigrationRecord
from ovsmesh.dataplane import docker_config
from ovsmesh.dataplane.desired import dataplane
from ovsmesh.dataplane.plan import plan
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Daemon, Dataplane, Unmanaged
from tests.support.meshkit import FACTS, first, mesh_of, node, seen, want

REPLACE = dataclasses.replace(FACTS, docker="replace")
CNI = CniFacts(
    "/etc/cni/net.d", tuple(CniPlugin(name, ("1.0.0",)) for name in ("bridge", "host-local", "portmap", "loopback"))
)
ON_DOCKER0 = Daemon("up", version="20.10.24", bridge="docker0", mtu=1500, subnets=("172.17.0.0/16",))
WANTED = {
    "bridge": "kbr0",
    "mtu": "1462",
    "ipv6": "true",
    "fixed-cidr-v6": "fd00:97:1::/64",
    "daemon": "on kbr0 10.97.1.0/24 and IPv6, MTU 1462",
}
OWN = ("10.97.1.1/24", "fd00:97:1::1/64")


def test_docker_is_wanted_on_kbr0_with_the_pods_mtu() -> None:
    assert dict(want(first(2), facts=REPLACE).docker) == WANTED
    assert dict(want(first(2)).docker) == {}
    keep = dataclasses.replace(FACTS, docker="keep")
    assert dict(want(first(2), facts=keep).docker) == {"bridge": "kbr0", "mtu": "1462"}
    v4 = mesh_of(node("web1", "192.0.2.11", "10.97.1.0/24"))
    assert dict(want(v4, facts=REPLACE).docker) == {
        "bridge": "kbr0",
        "mtu": "1462",
        "daemon": "on kbr0 10.97.1.0/24, MTU 1462",
    }


def test_without_ipv4_docker_stays_where_it_is() -> None:
    mesh = mesh_of(node("web1", "192.0.2.11", "fd00:97:1::/64"))
    desired, problems = dataplane(mesh, "web1", REPLACE)
    assert not desired.docker
    assert [p.reason for p in problems] == ["DockerNeedsIPv4"] and not problems[0].fatal


def test_docker_and_cni_share_the_range_and_no_address() -> None:
    both = dataclasses.replace(REPLACE, cni=CNI)
    desired = want(first(2), facts=both)
    assert desired.docker["fixed-cidr"] == "10.97.1.128/25"
    ranges = json.loads(next(iter(desired.cni.values())))["plugins"][0]["ipam"]["ranges"]
    assert ranges[0][0]["rangeEnd"] == "10.97.1.127"
    # Docker 29 counts from ::2 as host-local does, older ones put a MAC (02:42:…) into the lower 48 bits
    assert ranges[1][0] == {"subnet": "fd00:97:1::/64", "gateway": "fd00:97:1::1", "rangeStart": "fd00:97:1:0:8000::"}
    alone = want(first(2), facts=dataclasses.replace(FACTS, cni=CNI))
    assert "rangeEnd" not in next(iter(alone.cni.values())) and not alone.docker
    assert "fixed-cidr" not in want(first(2), facts=REPLACE).docker
    tiny = mesh_of(node("web1", "192.0.2.11", "10.97.1.0/30"))
    assert "fixed-cidr" not in want(tiny, facts=both).docker


@pytest.mark.parametrize(
    ("file", "flags", "misfits"),
    [
        ({}, {}, {}),
        ({"bip": "172.18.0.1/16", "fixed-cidr": "172.18.1.0/24"}, {}, {"bip", "fixed-cidr"}),
        ({"bip": "10.97.1.1/24"}, {}, {"bip"}),
        # somebody's own part of the range is theirs to choose
        ({"fixed-cidr": "10.97.1.64/26", "default-gateway": "10.97.1.9"}, {}, set()),
        ({"default-gateway": "172.17.0.9"}, {}, {"default-gateway"}),
        ({"fixed-cidr": 7}, {}, {"fixed-cidr"}),
        ({"log-level": "info", "ip-masq": False}, {}, set()),
        ({}, {"mtu": "1462"}, set()),
    ],
)
def test_what_belongs_to_another_bridge_goes(file: dict[str, Any], flags: dict[str, Any], misfits: set[str]) -> None:
    found = docker_config.observed(file, flags, WANTED, OWN)
    assert {key for key in found if key not in WANTED} == set(misfits)
    assert all(found[key] == text for key, text in flags.items())


V4 = {"bridge": "kbr0", "mtu": "1462", "daemon": "on kbr0 10.97.1.0/24, MTU 1462"}
V6 = {"ipv6": True, "fixed-cidr-v6": "fd00:dead::/64"}


@pytest.mark.parametrize(
    ("file", "misfits"),
    [
        (V6, {"ipv6", "fixed-cidr-v6"}),
        (V6 | {"default-gateway-v6": "fd00:dead::9"}, {"ipv6", "fixed-cidr-v6", "default-gateway-v6"}),
        # Docker 27 and newer choose a range themselves
        ({"ipv6": True}, {"ipv6"}),
        ({"ipv6": True, "ip6tables": True, "experimental": True}, {"ipv6"}),
        ({"ipv6": False}, set()),
        ({"ipv6": False, "fixed-cidr-v6": "fd00:dead::/64"}, {"fixed-cidr-v6"}),
        ({"bip": "172.18.0.1/16", "bip6": "fd00:dead::1/64", "ipv6": True}, {"bip", "bip6", "ipv6"}),
    ],
)
def test_docker_s_ipv6_settings_go_together(file: dict[str, Any], misfits: set[str]) -> None:
    found = docker_config.observed(file, {}, V4, OWN[:1])
    assert {key for key in found if key not in V4} == misfits
    said = docker_config.given_up(found, V4)
    assert ("IPv6 range" in said) == ("ipv6" in misfits)
    # a file that somebody else put on kbr0: dockerd runs with it
    keep = {"bridge": "kbr0", "mtu": "1462"}
    assert not set(docker_config.observed(file, {}, keep, OWN[:1])) & {"ipv6", "fixed-cidr-v6"}


def test_pools_that_overlap_the_mesh_are_named() -> None:
    clusters = ["10.97.0.0/16", "fd00:97::/32"]
    pools = [{"base": "10.0.0.0/8", "size": 24}, {"base": "172.30.0.0/16", "size": 24}, {"base": "x"}, 7]
    assert docker_config.pool_overlaps({"default-address-pools": pools}, clusters) == ["10.0.0.0/8"]
    assert docker_config.pool_overlaps({"default-address-pools": 7}, clusters) == []


def test_only_another_bridge_is_worth_a_restart() -> None:
    def on(subnet: str = "10.97.1.0/24", mtu: int = 1462, ipv6: bool = True, **more: Any) -> Daemon:
        return Daemon("up", bridge="kbr0", mtu=mtu, subnets=(subnet,), ipv6=ipv6, **more)

    wanted = WANTED["daemon"]
    for daemon in (on(mtu=8962), on(ipv6=False)):
        assert docker_config.reached(daemon, wanted) and not docker_config.remembers(daemon, wanted)
        assert "for the next start of Docker" in docker_config.stale(daemon, wanted)
        assert docker_config.unsettled(daemon, wanted, False) == ""
    assert docker_config.stale(on(), wanted) == ""
    other = on("172.17.0.0/16")
    assert docker_config.remembers(other, wanted) and docker_config.stale(other, wanted) == ""
    # a restart stops nothing, or is part of the switch and all come back
    assert docker_config.unsettled(other, wanted, False) == ""
    busy = on("172.17.0.0/16", running=("a", "b"), returning=("a",))
    assert "Stop a, b when they may stop" in docker_config.unsettled(busy, wanted, True)
    back = dataclasses.replace(busy, returning=("a", "b"))
    assert docker_config.unsettled(back, wanted, True) == "" != docker_config.unsettled(back, wanted, False)
    assert docker_config.unsettled(dataclasses.replace(busy, bridge="docker0"), wanted, False) == ""


def test_the_fault_of_docker_26_is_answered_with_its_remedy() -> None:
    said = "dockerd ended: error creating default network: networks have same bridge name"
    assert "local-kv.db" in docker_config.explained(said) and docker_config.explained("no") == "no"


def test_a_value_of_the_wrong_type_is_not_as_wanted() -> None:
    file = {"bridge": "kbr0", "mtu": "1462", "ipv6": "true", "fixed-cidr-v6": "fd00:97:1::/64"}
    found = docker_config.observed(file, {}, WANTED, OWN)
    assert found["mtu"] != WANTED["mtu"] and found["ipv6"] != WANTED["ipv6"] and found["bridge"] == "kbr0"


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ("dockerd", {}),
        ("dockerd -H fd:// --containerd=/run/containerd/containerd.sock", {}),
        ("dockerd -b br7", {"bridge": "br7"}),
        ("dockerd -bbr7 --mtu=1400", {"bridge": "br7", "mtu": "1400"}),
        ("dockerd --bridge br7 --ipv6 --bip 10.0.0.1/8", {"bridge": "br7", "ipv6": "true", "bip": "10.0.0.1/8"}),
        ("dockerd --ipv6=false --config-file /x", {"ipv6": "false", "config-file": "/x"}),
        ("dockerd --mtu", {}),
    ],
)
def test_options_of_a_command_line(argv: str, given: dict[str, Any]) -> None:
    assert docker_config.flags(argv.split()) == given


def obstacles(daemon: Daemon, restart: bool = True) -> list[str]:
    return list(docker_config.obstacles(daemon, "/etc/docker/daemon.json", "/etc/docker/daemon.json", WANTED, restart))


@pytest.mark.parametrize(
    ("bridge", "isolates", "file", "flag", "named"),
    [
        ("docker0", False, {}, "--icc=true", False),
        ("docker0", False, {"icc": True}, "", False),
        ("docker0", False, {"icc": False}, "", True),
        ("docker0", False, {}, "--icc=false", True),
        # the file is for its next start, which the switch is
        ("docker0", True, {}, "", False),
        ("kbr0", True, {}, "", True),
    ],
)
def test_icc_false_is_named(bridge: str, isolates: bool, file: dict[str, Any], flag: str, named: bool) -> None:
    daemon = dataclasses.replace(ON_DOCKER0, bridge=bridge, isolates=isolates, flags=("dockerd", flag))
    said = docker_config.isolation(daemon, file)
    assert bool(said) == named and ("--docker off" in said) == named


def test_what_is_in_the_way() -> None:
    assert obstacles(ON_DOCKER0) == []
    lives = dataclasses.replace(ON_DOCKER0, live_restore=True, running=("db", "web"))
    assert "stop db, web" in obstacles(lives)[0]
    assert obstacles(lives, restart=False) == []
    flagged = dataclasses.replace(ON_DOCKER0, flags=("dockerd", "-b", "br7", "--config-file=/x"))
    texts = obstacles(flagged)
    assert "--docker-config /x" in texts[0] and "--bridge br7" in texts[1]
    fits = dataclasses.replace(ON_DOCKER0, flags=("dockerd", "--mtu=1462", "--fixed-cidr=172.17.1.0/24"))
    assert obstacles(fits) == []
    # half of a pair that dockerd refuses alone, or an IPv6 that it would come back with
    for flag, refused in (("--ipv6", True), ("--fixed-cidr-v6=fd00:dead::/64", True), ("--ipv6=false", False)):
        six = dataclasses.replace(ON_DOCKER0, flags=("dockerd", flag))
        assert bool(list(docker_config.obstacles(six, "/x", "/x", V4, True))) == refused


@pytest.mark.parametrize(
    ("argv", "file", "twice"),
    [
        ("dockerd -H fd:// --containerd=/run/c.sock", {"hosts": ["fd://"]}, ["hosts"]),
        ("dockerd -Hfd:// -D", {"hosts": [], "debug": True, "labels": []}, ["debug", "hosts"]),
        ("dockerd --host=fd:// --log-opt max-size=1m", {"log-opts": {}, "log-driver": "x"}, ["log-opts"]),
        ("dockerd --insecure-registry x --label a=b", {"insecure-registries": [], "labels": []},
         ["insecure-registries", "labels"]),
        ("dockerd -H fd:// --mtu 1400", {"mtu": 1400, "storage-driver": "overlay2"}, []),
        ("dockerd --add-runtime a=b", {"runtimes": {}, "features": {}}, []),
    ],
)  # fmt: skip
def test_what_is_set_twice_keeps_dockerd_from_starting_again(argv: str, file: dict[str, Any], twice: list[str]) -> None:
    assert docker_config.doubled(argv.split(), file) == twice
    daemon = dataclasses.replace(ON_DOCKER0, flags=tuple(argv.split()))
    texts = list(docker_config.obstacles(daemon, "/x", "/x", {"bridge": "kbr0"}, True, file))
    assert any("does not start again" in text for text in texts) == bool(twice)
    assert not any("start again" in t for t in docker_config.obstacles(daemon, "/x", "/x", WANTED, False, file))


def test_whom_a_restart_stops() -> None:
    daemon = dataclasses.replace(ON_DOCKER0, running=("a", "b", "c"), returning=("b",))
    assert docker_config.stops(daemon) == (
        "restarting Docker stops 3 containers: b come back with new addresses; a, c stay stopped until you start them"
    )
    assert docker_config.stops(ON_DOCKER0) == ""


def test_nothing_of_a_switch_is_done_while_a_part_is_blocked() -> None:
    have = Dataplane(docker={"bip": "172.18.0.1/16", "docker0": "bridge", "daemon": "on docker0"})
    wanted = Dataplane(docker=WANTED)
    steps = [str(step) for step in plan(wanted, seen(have)).steps]
    assert len(steps) == 7 and "+ docker bridge kbr0" in steps and "- docker bip" in steps
    unmanaged = Unmanaged("docker", "daemon", "no")
    blocked = plan(wanted, seen(have, unmanaged))
    assert blocked.steps == () and [str(b) for b in blocked.blocked] == ["! docker bridge blocked: no"]
    # what is only to be taken away too
    only = plan(wanted, seen(Dataplane(docker={**WANTED, "bip": "x"}), unmanaged))
    assert only.steps == () and len(only.blocked) == 1
    assert plan(wanted, seen(Dataplane(docker=WANTED), unmanaged)) == plan(wanted, seen(wanted))


FILTER = """-P FORWARD DROP
-N DOCKER
-N DOCKER-USER
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A FORWARD -i docker0 -s 172.17.0.5/32 -j DROP
-A FORWARD -o docker01 -j DOCKER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -i br-5 ! -o br-5 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-USER -i docker0 -j DROP
"""
NAT = """-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.0/16 ! -o eth0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
"""


def test_only_dockers_own_rules_of_that_bridge_go() -> None:
    left = docker_rules.left({"filter": FILTER, "nat": NAT}, "docker0")
    assert left == [
        "filter FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "filter FORWARD -o docker0 -j DOCKER",
        "filter FORWARD -i docker0 ! -o docker0 -j ACCEPT",
        "filter FORWARD -i docker0 -o docker0 -j ACCEPT",
        "filter DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT",
        "filter DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
        "nat POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "nat DOCKER -i docker0 -j RETURN",
        "nat DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80",
    ]
    script = docker_rules.removal(left)
    assert script.startswith("*filter\n-D FORWARD -o docker0 -m") and script.count("COMMIT") == 2
    assert docker_rules.left({"filter": "", "nat": ""}, "docker0") == [] and docker_rules.removal([]) == ""


class Listener:
    """What holds a socket as a Docker daemon does, and answers each request with what a test says."""

    def __init__(self, path: Any, answers: Any) -> None:
        self.answers = answers
        self.asked: list[Any] = []
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(str(path))
        self.sock.listen(20)
        self.held: list[Any] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                there, _ = self.sock.accept()
            except OSError:
                return
            self.held.append(there)
            threading.Thread(target=self.talk, args=(there,), daemon=True).start()

    def talk(self, there: Any) -> None:
        with contextlib.suppress(OSError):
            while request := there.recv(4096):
                path = request.split()[1].decode().partition("?")[0]
                self.asked.append(path)
                body = self.answers.get(path, b"{}")
                if body is None:
                    continue
                there.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for there in self.held:
            with contextlib.suppress(OSError):
                there.shutdown(socket.SHUT_RDWR)
            there.close()


@contextlib.contextmanager
def watched(path: Any, answers: Any) -> Iterator[Any]:
    listener, watch = Listener(path, {"/_ping": b"OK"} | answers), DaemonWatch(str(path))
    try:
        yield listener, watch
    finally:
        listener.close()
        watch.close()


def until(check: Any, seconds: Any = 10.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


GOOD = json.dumps(
    {
        "IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}]},
        "Options": {"com.docker.network.bridge.name": "docker0", "com.docker.network.driver.mtu": "1500"},
    }
).encode()


def test_a_daemon_is_read_and_its_end_and_return_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    about = {"/networks/bridge": GOOD, "/containers/json": b"[]", "/info": b'{"ServerVersion": "20.10.24"}'}
    with watched(path, about) as (listener, watch):
        until(lambda: watch.daemon and watch.daemon.state == "up")
        assert watch.daemon.bridge == "docker0" and watch.daemon.mtu == 1500 and watch.daemon.version == "20.10.24"
        assert select.select(watch.fds(), [], [], 0)[0] and watch.drain() and not watch.drain()
        listener.close()
        until(lambda: watch.daemon.state == "down")
        path.unlink()
        again = Listener(path, {"/_ping": b"OK"} | about)
        try:
            until(lambda: watch.daemon.state == "up")
        finally:
            again.close()


@pytest.mark.parametrize(
    "answers",
    [
        {"/info": b"[]"},
        {"/info": b"[" * 50_000},
        {"/info": b"\xff"},
        {"/info": b"null"},
        {"/_ping": b"nothing of the kind"},
        {"/containers/json": b"{}"},
    ],
)
def test_what_is_no_docker_brings_nothing_down(tmp_path: Path, answers: Any) -> None:
    with watched(tmp_path / "s", answers) as (_, watch):
        until(lambda: watch.daemon is not None and watch.daemon.state == "down")
        assert watch.daemon.why


@pytest.mark.parametrize(
    "answers",
    [
        {"/networks/bridge": b'{"IPAM": {"Config": 7}, "Options": []}', "/containers/json": b"[1, null, {}]"},
        {"/networks/bridge": b'{"IPAM": 5}', "/containers/json": b'[{"Names": ["/\\u001b[2Ja"], "Id": 5}]'},
    ],
)
def test_odd_answers_are_read_as_far_as_they_go(tmp_path: Path, answers: Any) -> None:
    with watched(tmp_path / "s", answers) as (_, watch):
        until(lambda: watch.daemon is not None and watch.daemon.state == "up")
        assert watch.daemon.subnets == () and all(name.isprintable() for name in watch.daemon.running)


def test_a_daemon_that_does_not_answer_yet_is_starting(tmp_path: Path) -> None:
    with watched(tmp_path / "s", {"/_ping": None}) as (_, watch):
        until(lambda: watch.daemon is not None)
        assert watch.daemon.state == "starting"


@pytest.mark.parametrize(("ended", "done"), [(False, "refused"), (True, "rollback")])
def test_after_a_restart_that_failed_an_ended_dockerd_is_started_with_the_old_file(ended: bool, done: str) -> None:
    # the watch still has the one from before the restart
    instance = (os.getpid(), start_time(os.getpid()) + ended)
    daemon = dataclasses.replace(ON_DOCKER0, instance=instance)
    said: list[str] = []
    migration = DockerMigration.__new__(DockerMigration)
    vars(migration).update(
        _file=SimpleNamespace(roll_back=lambda record: None),
        _options=SimpleNamespace(restart="true", config="daemon.json"),
        _watch=SimpleNamespace(daemon=daemon),
        _start=lambda kind, *more: said.append(kind),
        _refused=lambda record, why: said.append("refused"),
    )
    migration._roll_back(MigrationRecord("daemon.json", ""), daemon)
    assert said == [done]
