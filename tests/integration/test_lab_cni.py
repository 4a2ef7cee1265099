"""Pods that come up through CNI, with the upstream plugins, run as a container runtime runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import Pair, ping
from tests.support.cnikit import BIN, CniError, Runtime, addresses, namespaces
from tests.support.labtools import (
    SOON,
    Make,
    State,
    await_problem,
    await_state,
    drift,
    fdb,
    ip_json,
    links,
    live,
    neighbours,
    problems,
    report,
    routes,
)
from tests.support.labtools import addresses as addresses_of

pytestmark = pytest.mark.lab

FILE = "10-ovsmesh.conflist"
PODS = 50
LEFTOVER = '{"cniVersion": "0.3.1", "name": "cbr0", "plugins": [{"type": "flannel"}]}'


def start(host: Host) -> None:
    host.start_agent("--cni-dir", str(host.state / "net.d"), "--cni-bin-dir", str(BIN))


def runtime(host: Host) -> Runtime:
    return Runtime(host.ns, host.state / "net.d", host.state / "store")


@pytest.fixture(scope="module")
def cluster(module_lab: Make) -> tuple[Lab, list[Runtime]]:
    """Three hosts: a pod on each of the second and third, and fifty that started at once on the first."""
    lab = module_lab(3, 0, dual_stack=True, agents=False)
    for host in lab.hosts:
        start(host)
    lab.converged()
    lab.warm_up()
    runtimes = [runtime(host) for host in lab.hosts]
    for one in runtimes[1:]:
        namespaces([f"{one.ns}p1"])
        one.add(f"{one.ns}p1")
    names = [f"{lab.host(1).ns}p{n}" for n in range(1, PODS + 1)]
    namespaces(names)
    began = time.monotonic()
    runtimes[0].add_all(names, PODS)
    print(f"{PODS} ADDs at once: {time.monotonic() - began:.1f} s")
    return lab, runtimes


@pytest.fixture
def lab(cluster: tuple[Lab, list[Runtime]]) -> Iterator[Lab]:
    """As a test finds it and has to leave it: agents that run, are converged, and say that nothing is wrong."""
    made = cluster[0]
    revive(made)
    yield made
    revive(made)
    made.converged(SOON)


def revive(lab: Lab) -> None:
    for host in lab.hosts:
        if not host.agent_alive():
            start(host)
    lab.converged(SOON)


@pytest.fixture
def first(cluster: tuple[Lab, list[Runtime]]) -> Runtime:
    return cluster[1][0]


@pytest.fixture
def others(cluster: tuple[Lab, list[Runtime]]) -> list[Runtime]:
    return cluster[1][1:]


def pairs(first: Runtime, others: list[Runtime], most: int = PODS) -> list[Pair]:
    """From a pod of each other host to the first host's pods, in both families."""
    return [
        Pair(f"{other.ns}p1", address, other.ns, pod)
        for other in others
        for pod in sorted(first.results)[:most]
        for address in addresses(first.results[pod])
    ]


def reached(chosen: list[Pair]) -> None:
    """Every pair answers within the deadline; the userspace datapath loses a packet of many on a busy machine."""
    left = list(chosen)

    def all_answered() -> bool:
        left[:] = [t.pair for t in ping(left, 1, timeout=0.5) if t.lost]
        return not left

    wait_for("every pod to answer", all_answered, SOON, every=0.05)


def core(host: Host) -> State:
    """What of the wiring hangs on kbr0; sysctls are fifty veths' too, and left to `plan`."""
    read = {"links": links, "addresses": addresses_of, "routes": routes, "neighbours": neighbours, "fdb": fdb}
    return {name: look(host) for name, look in read.items()}


def ports(host: Host) -> dict[str, object]:
    """kbr0's ports and whether they are hairpins."""
    found = {}
    for link in ip_json(host, "-d", "link", "show", "master", "kbr0"):
        found[link["ifname"]] = link["linkinfo"]["info_slave_data"]["hairpin"]
    return found


def test_fifty_pods_at_once_have_addresses_of_their_own_and_all_are_reached(
    lab: Lab, first: Runtime, others: list[Runtime]
) -> None:
    given = [address for result in first.results.values() for address in addresses(result)]
    assert len(given) == len(set(given)) == 2 * PODS
    assert not {"10.97.1.1", "fd00:97:1::1"} & set(given), "the gateway is kbr0's"
    assert set(given) == first.reserved()
    reached(pairs(first, others))


def test_a_pod_has_its_routes_its_mtu_and_no_masquerade(lab: Lab, first: Runtime, others: list[Runtime]) -> None:
    pod = f"{lab.host(1).ns}p1"
    assert "default via 10.97.1.1 dev eth0" in netns.run(["ip", "route"], pod).stdout
    assert "default via fd00:97:1::1 dev eth0" in netns.run(["ip", "-6", "route"], pod).stdout
    assert json.loads(netns.run(["ip", "-j", "link", "show", "eth0"], pod).stdout)[0]["mtu"] == 1462
    assert any(not track.lost for track in ping(pairs(first, others, 1), 5, size=1462, df=True))
    assert all(track.lost for track in ping(pairs(first, others, 1), 2, size=1463, df=True, timeout=0.3))
    # the sender's own address arrives, not its node's
    listener = netns.within(f"{others[0].ns}p1", lambda: socket.create_server(("10.97.2.2", 7777)))
    with listener, netns.within(pod, lambda: socket.create_connection(("10.97.2.2", 7777), SOON)):
        listener.settimeout(SOON)
        talk, peer = listener.accept()
        talk.close()
    assert peer[0] in addresses(first.results[pod])


def test_a_pod_s_host_port_is_reached_from_another_host(lab: Lab, first: Runtime) -> None:
    pod = f"{lab.host(1).ns}p90"
    namespaces([pod])
    first.add(pod, ports=[(8090, 80)])
    listener = netns.within(pod, lambda: socket.create_server(("0.0.0.0", 80)))
    try:
        with listener:
            other = lab.host(2).ns
            netns.within(other, lambda: socket.create_connection((str(lab.host(1).address), 8090), SOON)).close()
    finally:
        first.delete(pod)


def test_del_frees_what_add_took(lab: Lab, first: Runtime) -> None:
    host, pod = lab.host(1), f"{lab.host(1).ns}p91"
    namespaces([pod])
    before, had = first.reserved(), ports(host)
    for address in addresses(first.add(pod)):
        assert address in first.reserved() - before
    first.check(pod)
    assert len(ports(host)) == len(had) + 1
    first.delete(pod)
    assert (first.reserved(), ports(host)) == (before, had)


def test_a_deleted_kbr0_is_back_and_so_are_its_pods(lab: Lab, first: Runtime, others: list[Runtime]) -> None:
    host = lab.host(1)
    before, had = ports(host), core(host)
    assert sum(bool(hairpin) for hairpin in before.values()) >= PODS
    watched = pairs(first, others, 3)
    with lab.stream(watched, 0.02) as stream:
        assert stream.wait(time.time(), SOON)
        at = time.time()
        host.run(["ip", "link", "del", "kbr0"])
        assert stream.wait(time.time(), SOON, run=10), "pods that ran are reached again"
    for version, marker in ((4, "."), (6, ":")):
        longest = [o.seconds for t in stream.tracks if marker in t.pair.address for o in t.outages(at - 0.1)]
        print(f"kbr0 deleted: pods out for {max(longest, default=0.0):.3f} s (IPv{version})")
    await_state(lambda: core(host), had)
    assert ports(host) == before
    reached(pairs(first, others))
    first.check(f"{host.ns}p1")
    lab.converged(SOON, thorough=True)


def test_a_pod_that_comes_while_kbr0_is_away_blocks_nothing(lab: Lab, first: Runtime, others: list[Runtime]) -> None:
    """The bridge plugin makes a kbr0 of its own, before the agent has seen that ours is gone."""
    host, pod = lab.host(1), f"{lab.host(1).ns}p92"
    namespaces([pod])
    had, agent = links(host)["kbr0"], host.agent()
    assert agent is not None
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        host.run(["ip", "link", "del", "kbr0"])
        first.add(pod)
        assert "ifalias" not in links(host)["kbr0"]
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    try:
        await_state(lambda: links(host)["kbr0"], had)
        reached(pairs(first, others))
        assert all(hairpin for name, hairpin in ports(host).items() if name != "obr0")
        lab.converged(SOON, thorough=True)
    finally:
        first.delete(pod)


def test_pods_that_come_before_the_agent_are_taken_over(lab: Lab, others: list[Runtime]) -> None:
    """After a reboot the conflist lies there still, and the kubelet starts pods in any order."""
    host, second = lab.host(2), others[0]
    pod = f"{host.ns}p92"
    namespaces([pod])
    had = links(host)["kbr0"]
    second.delete(f"{host.ns}p1")
    host.stop_agent()
    host.run(["ip", "link", "del", "kbr0"])
    second.add(f"{host.ns}p1")
    second.add(pod)
    plan = host.ovsmesh("plan").stdout
    assert "~ link kbr0" in plan and "alias none → ovsmesh" in plan
    start(host)
    lab.converged()
    await_state(lambda: links(host)["kbr0"], had)
    reached([Pair(f"{others[1].ns}p1", a, "h3", pod) for a in addresses(second.results[pod])])
    second.delete(pod)
    lab.converged(SOON, thorough=True)


def test_a_bridge_of_someone_else_is_not_taken_over(lab: Lab) -> None:
    host = lab.host(3)
    host.stop_agent()
    host.run(["ip", "link", "del", "kbr0"])
    netns.ip_batch(["link add kbr0 type bridge", "addr add 192.168.7.1/24 dev kbr0", "link set kbr0 up"], host.ns)
    try:
        plan = host.ovsmesh("plan")
        assert plan.returncode == 1 and "! link kbr0 blocked" in plan.stdout
    finally:
        host.run(["ip", "link", "del", "kbr0"])
        start(host)
        netns.ip_batch([f"link set {name} master kbr0" for name in _veths(lab, host)], host.ns)


def _veths(lab: Lab, host: Host) -> list[str]:
    lab.converged()
    return [
        link["ifname"] for link in ip_json(host, "link", "show", "type", "veth") if link["ifname"].startswith("veth")
    ]


@pytest.mark.parametrize(
    "does",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text().replace("1462", "1500")),
        lambda path: path.write_text(""),
        lambda path: path.rename(path.with_name("x.bak")),
    ],
)
def test_a_conflist_that_someone_changes_is_put_back(lab: Lab, first: Runtime, does) -> None:  # type: ignore[no-untyped-def]
    host, path = lab.host(1), first.directory / FILE
    text, counted = path.read_text(), drift(host)["cni"]
    began = time.monotonic()
    does(path)
    wait_for("the conflist to be back", lambda: path.exists() and path.read_text() == text, SOON, every=0.005)
    print(f"back after {time.monotonic() - began:.3f} s")
    wait_for("it to be counted as drift", lambda: drift(host)["cni"] > counted, SOON)
    assert path.stat().st_mode & 0o777 == 0o644
    (first.directory / "x.bak").unlink(missing_ok=True)


TUNING: dict[str, object] = {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}


def append(path: Path, *plugins: dict[str, object]) -> str:
    """As istio-cni does it: read, append, written in its own way, renamed into place. Returns the text."""
    found = json.loads(path.read_text())
    found["plugins"] += plugins
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    path.with_name(".new").write_text(text)
    path.with_name(".new").rename(path)
    return text


def test_a_plugin_that_others_append_stays_and_runs(lab: Lab, first: Runtime) -> None:
    host, path, pod = lab.host(1), first.directory / FILE, f"{lab.host(1).ns}p93"
    had, counted = path.read_text(), drift(host)["cni"]
    try:
        text = append(path, TUNING)
        wait_for("the status to tell of it", lambda: report(host)["self"]["cni"]["plugins"][-1] == "tuning", SOON)
        lab.converged(SOON)
        assert path.read_text() == text and drift(host)["cni"] == counted
        namespaces([pod])
        first.add(pod)
        assert netns.run(["sysctl", "-n", "net.core.somaxconn"], pod).stdout == "500\n"
        # what ovsmesh's part becomes, its own or by others, changes nothing of theirs
        lab.write_mesh(mtu=1400)
        wait_for("the conflist to follow", lambda: '"mtu": 1400' in path.read_text(), SOON)
        assert json.loads(path.read_text())["plugins"][-1] == TUNING
        lab.write_mesh()
        wait_for("the conflist to follow", lambda: '"mtu": 1462' in path.read_text(), SOON)
        path.write_text(json.dumps({**json.loads(text), "plugins": [TUNING]}))
        wait_for("ours to be back", lambda: len(json.loads(path.read_text() or "{}").get("plugins", ())) == 3, SOON)
        assert json.loads(path.read_text()) == json.loads(text)
        first.delete(pod)
        # an agent that starts finds it as it is
        before = path.stat().st_ino
        host.stop_agent()
        start(host)
        lab.converged()
        assert path.stat().st_ino == before
    finally:
        path.write_text(had)
    wait_for("theirs to be gone", lambda: "tuning" not in report(host)["self"]["cni"]["plugins"], SOON)


def test_a_program_that_rewrites_the_conflist_each_time_is_named(lab: Lab) -> None:
    """Cilium with cni.exclusive renames it; each write of the agent is answered at once."""
    host = lab.host(3)
    path = host.state / "net.d" / FILE
    bak = path.with_name(f"{FILE}.cilium_bak")
    writes = 0

    def exclusive() -> bool:
        nonlocal writes
        if path.exists():
            path.rename(bak)
            writes += 1
        return any("by another program" in text for text in problems(host))

    wait_for("the fight to be named", exclusive, SOON, every=0.005)
    began, before = time.monotonic(), writes
    wait_for("ten seconds of it", lambda: exclusive() and time.monotonic() > began + 10, SOON, every=0.005)
    print(f"written {before} times until it was named, {writes - before} times in the ten seconds after that")
    assert writes - before <= 10
    said = host.ovsmesh("status").stdout
    assert "another program" in said and bak.name in said and "cni.exclusive" in said
    bak.unlink(missing_ok=True)
    wait_for("the conflist to stay", path.exists, 2 * SOON)
    host.stop_agent()
    start(host)


def test_an_agent_that_stops_and_starts_leaves_the_file_as_it_is(lab: Lab, first: Runtime) -> None:
    host, path = lab.host(1), first.directory / FILE
    before = path.stat()
    host.stop_agent()
    assert path.exists()
    first.check(f"{host.ns}p1")
    start(host)
    lab.converged()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_mtu_that_changes_is_written_and_the_wiring_first(lab: Lab, first: Runtime) -> None:
    host, path = lab.host(1), first.directory / FILE
    try:
        lab.write_mesh(mtu=1400)
        wait_for("the conflist to follow", lambda: '"mtu": 1400' in path.read_text(), SOON)
        assert links(host)["kbr0"]["mtu"] == 1400
    finally:
        lab.write_mesh()
        wait_for("the conflist to follow", lambda: '"mtu": 1462' in path.read_text(), SOON)


def test_another_network_s_file_is_named_and_left(lab: Lab, first: Runtime) -> None:
    host = lab.host(1)
    before, after = first.directory / "05-flannel.conflist", first.directory / "87-podman.conflist"
    try:
        after.write_text(LEFTOVER)
        await_problem(host, "CNILeftover", "87-podman.conflist", "not used")
        assert live(host)["converged"]
        before.write_text(LEFTOVER)
        await_problem(host, "CNIOverruled", str(before), "network cbr0 wins")
        assert not host.ready()
        assert "cbr0 wins" in host.ovsmesh("status").stdout
        before.write_text("{")
        await_problem(host, "CNIOverruled", "is not JSON, and containerd stops at it")
    finally:
        before.unlink()
        after.unlink()
    wait_for("all to be well", lambda: host.ready() and not problems(host), SOON)


def test_another_network_under_our_name_is_named_and_left(lab: Lab, first: Runtime) -> None:
    host, path = lab.host(1), first.directory / FILE
    held = path.with_name(".theirs")
    held.write_text(LEFTOVER)
    held.rename(path)
    try:
        wait_for("it to be named", lambda: any(FILE in line for line in live(host).get("foreign", ())), SOON)
        assert path.read_text() == LEFTOVER and not host.ready()
        assert f"! cni {FILE} blocked: {path} is of network cbr0, not of ovsmesh" in host.ovsmesh("plan").stdout
    finally:
        path.unlink()
    wait_for("ours to be there", lambda: path.exists() and host.ready(), SOON)


def test_the_status_tells_of_the_conflist(lab: Lab, first: Runtime) -> None:
    host = lab.host(1)
    assert report(host)["self"]["cni"] == {
        "path": str(first.directory / FILE),
        "state": "written",
        "version": "1.0.0",
        "plugins": ["bridge", "host-local", "portmap"],
    }
    assert "written; version 1.0.0; bridge, host-local, portmap" in host.ovsmesh("status").stdout


def fake(directory: Path, **answers: str) -> Path:
    """A directory of the real plugins, but for those that answer VERSION with this one."""
    directory.mkdir()
    for name in ("bridge", "host-local", "portmap", "loopback"):
        if name not in answers:
            (directory / name).symlink_to(BIN / name)
        elif answers[name]:
            said = json.dumps({"cniVersion": answers[name], "supportedVersions": ["0.3.1", answers[name]]})
            (directory / name).write_text(f"#!/bin/sh\necho '{said}'\n")
            (directory / name).chmod(0o755)
    return directory


def test_old_plugins_get_an_old_version_and_missing_ones_none(lab: Lab, tmp_path: Path) -> None:
    host = lab.host(3)
    host.stop_agent()
    old, away = fake(tmp_path / "old", bridge="0.4.0"), fake(tmp_path / "away", bridge="", portmap="")
    net = tmp_path / "net.d"

    def once(bins: Path) -> tuple[int, str]:
        done = host.ovsmesh("agent", "--once", "--cni-dir", str(net), "--cni-bin-dir", str(bins))
        return done.returncode, done.stderr

    code, said = once(away)
    assert code == 1 and "plugins are missing: bridge (not in" in said and not net.exists()
    code, _ = once(old)
    assert code == 0 and json.loads((net / FILE).read_text())["cniVersion"] == "0.4.0"
    code, said = once(away)
    assert code == 1 and (net / FILE).exists(), "without it no pod could be deleted"
    code, said = once(BIN)
    assert code == 0 and json.loads((net / FILE).read_text())["cniVersion"] == "1.0.0", said


def test_cleanup_leaves_the_plugins_of_others_and_says_so(lab: Lab) -> None:
    host = lab.host(3)
    path = host.state / "net.d" / FILE
    append(path, TUNING)
    host.stop_agent()
    done = host.ovsmesh("cleanup")
    assert done.returncode == 0, done.stdout
    assert json.loads(path.read_text())["plugins"] == [TUNING]
    assert f"left alone: {path} holds nothing of ovsmesh, only tuning" in done.stdout and "its owner" in done.stdout
    start(host)
    wait_for("it to be whole again", lambda: len(json.loads(path.read_text())["plugins"]) == 3, SOON)
    lab.converged(SOON)
    host.stop_agent()
    path.unlink()
    start(host)


def test_cleanup_removes_the_conflist_first_and_no_other(lab: Lab, others: list[Runtime]) -> None:
    host, third = lab.host(3), others[1]
    (third.directory / "87-podman.conflist").write_text(LEFTOVER)
    host.stop_agent()
    done = host.ovsmesh("cleanup")
    assert done.returncode == 0, done.stdout
    removals = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    assert removals[0] == f"- cni {FILE}" and ", 0 cni" in done.stdout
    assert [p.name for p in third.directory.iterdir()] == ["87-podman.conflist"]
    with pytest.raises(CniError, match="flannel"):
        third.add(f"{host.ns}p1")
    (third.directory / "87-podman.conflist").unlink()
