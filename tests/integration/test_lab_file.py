"""Mesh files good and bad on live agents: what is good keeps running, what is bad is named, nothing goes by mistake."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from ovsmesh.lab.ping import ping
from tests.support.labpackets import assert_reach, assert_whole
from tests.support.labtools import (
    SOON,
    Make,
    State,
    at_rest,
    await_problem,
    await_state,
    confirm_all,
    difference,
    operations,
    revive,
    tunnels,
    wiring,
)

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    return module_lab(3, 1)


@pytest.fixture
def mesh(three: Lab) -> Iterator[Lab]:
    three.write_mesh()
    confirm_all(three)
    revive(three)
    yield three
    three.write_mesh()
    at_rest(three)


Change = Callable[[dict[str, Any]], object]


class Bad(NamedTuple):
    """A mesh file that something is wrong with: what it becomes, and the words by which that has to be named."""

    text: Callable[[Lab], str | bytes]
    words: tuple[str, ...]
    node: str = ""
    """Whose entry is refused; "" when the file is refused as a whole."""


def _nodes(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Lab], str]:
    def text(lab: Lab) -> str:
        nodes = [host.node for host in lab.hosts]
        change(nodes)
        return lab.mesh_text(nodes)

    return text


def _set(index: int, **values: object) -> Callable[[Lab], str]:
    return _nodes(lambda nodes: nodes[index].update(values))


BAD = {
    "truncated": Bad(lambda lab: lab.mesh_text()[: len(lab.mesh_text()) // 2 + 7], ("mesh.yaml",)),
    "cut off within an address": Bad(lambda lab: lab.mesh_text()[:-2], ("podCIDRs", "10.97.3.0/2"), "h3"),
    "invalid YAML": Bad(lambda lab: lab.mesh_text() + "  - [unclosed\n", ("mesh.yaml",)),
    "not UTF-8": Bad(lambda lab: b"\xff\xfe" + lab.mesh_text().encode(), ("mesh.yaml",)),
    "0 bytes": Bad(lambda lab: "", ("mesh.yaml",)),
    "empty list": Bad(lambda lab: lab.mesh_text([]), ("spec.nodes is empty",)),
    "unknown key": Bad(lambda lab: lab.mesh_text().replace("encapsulation:", "encapsulatoin:"), ("encapsulatoin",)),
    "wrong kind": Bad(lambda lab: lab.mesh_text().replace("kind: Mesh", "kind: Mess"), ("kind", "Mess")),
    "encapsulation that is none": Bad(lambda lab: lab.mesh_text(encapsulation="ipip"), ("encapsulation", "ipip")),
    "cluster CIDR with host bits": Bad(
        lambda lab: lab.mesh_text(clusterCIDRs=["10.97.1.0/16"]), ("clusterCIDRs", "10.97.1.0/16")
    ),
    "pod CIDR with host bits": Bad(_set(2, podCIDRs=["10.97.3.7/24"]), ("podCIDRs", "10.97.3.7/24"), "h3"),
    "pod CIDR outside the cluster's": Bad(_set(2, podCIDRs=["10.98.3.0/24"]), ("podCIDRs", "10.98.3.0/24"), "h3"),
    "pod CIDRs that overlap": Bad(_set(2, podCIDRs=["10.97.2.128/25"]), ("podCIDRs", "10.97.2.128/25"), "h3"),
    "address missing": Bad(_nodes(lambda nodes: nodes[2].pop("address")), ("address", "missing"), "h3"),
    "address that is none": Bad(_set(2, address="192.0.2.333"), ("address", "192.0.2.333"), "h3"),
    "address of another node": Bad(_set(2, address="192.0.2.12"), ("address", "192.0.2.12"), "h3"),
    "unknown key in a node": Bad(_set(2, podcidrs=["10.97.3.0/24"]), ("podcidrs",), "h3"),
    "a second node of the name": Bad(
        _nodes(lambda nodes: nodes.append({"name": "h3", "address": "192.0.2.14", "podCIDRs": ["10.97.4.0/24"]})),
        ("name", "h3"),
        "h3",
    ),
}


def write(lab: Lab, text: str | bytes) -> None:
    """Replace the mesh file, by a rename."""
    temporary = lab.mesh_file.with_name(".new")
    temporary.write_bytes(text if isinstance(text, bytes) else text.encode())
    temporary.replace(lab.mesh_file)


@pytest.fixture(scope="module")
def good(three: Lab) -> list[State]:
    """The wiring of all hosts under the good file, which no bad one may change."""
    return [wiring(host) for host in three.hosts]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_what_was_good_keeps_running(mesh: Lab, good: list[State], name: str) -> None:
    bad, host = BAD[name], mesh.host(1)
    done = [operations(h) for h in mesh.hosts]
    write(mesh, bad.text(mesh))

    await_problem(host, *bad.words, f" {bad.node} {bad.words[0]}" if bad.node else "")
    assert_whole(ping(mesh.pairs(), 2))
    assert difference(good[0], wiring(host)) == []
    assert [operations(h) for h in mesh.hosts] == done
    assert all(h.agent_alive() for h in mesh.hosts)
    # an agent that starts under such a file starts from what was good
    if name in ("0 bytes", "pod CIDR with host bits"):
        host.stop_agent()
        host.start_agent()
        await_problem(host, *bad.words)
        assert difference(good[0], wiring(host)) == []
        text = host.ovsmesh("status").stdout
        assert any(word in text for word in bad.words), text


def test_a_file_without_this_node_keeps_it_as_it_is_and_the_others_let_it_go(mesh: Lab, good: list[State]) -> None:
    host = mesh.host(1)
    done = operations(host)
    mesh.write_mesh([h.node for h in mesh.hosts[1:]])
    await_problem(host, "SelfMissing", "has no entry for this node, h1")
    for other in mesh.hosts[1:]:
        wait_for("h1's port to go", lambda o=other: "gre-h1" not in tunnels(o), SOON)  # type: ignore[misc]
    assert difference(good[0], wiring(host)) == [] and operations(host) == done
    assert_whole(ping([mesh.pair(mesh.pod(2, 1), mesh.pod(3, 1))], 2))
    mesh.write_mesh()
    mesh.converged(SOON, thorough=True)
    assert_reach(mesh)


def test_only_the_refused_node_stays_out_and_all_others_join(lab: Make) -> None:
    made = lab(3, 1, agents=False)
    nodes = [host.node for host in made.hosts]
    nodes[2]["podCIDRs"] = ["10.97.3.1/24"]
    made.write_mesh(nodes)
    for host in made.hosts[:2]:
        host.start_agent()
    made.converged(hosts=made.hosts[:2])
    for host in made.hosts[:2]:
        host.plug()
    assert_reach(made, [pair for pair in made.pairs() if "h3" not in pair.source + pair.target])
    await_problem(made.host(1), "PodCIDRInvalid h3 podCIDRs[0] 10.97.3.1/24 has host bits")
    assert "gre-h3" not in made.host(1).ovs_vsctl("list-ports", "obr0")
    done = made.host(1).ovsmesh("plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10.97.3.1/24" in done.stderr


def test_an_agent_without_any_good_mesh_touches_nothing(lab: Make) -> None:
    made = lab(2, 1, agents=False)
    host = made.host(1)
    before = wiring(host)
    made.write_mesh_text("nodes: 7\n")
    host.start_agent()
    await_problem(host, "mesh.yaml", "nothing is touched")
    assert host.http("/readyz")[0] == 503
    assert difference(before, wiring(host)) == []
    done = host.ovsmesh("plan")
    assert done.returncode == 1 and "mesh.yaml" in done.stderr
    made.write_mesh()
    made.converged(hosts=[host])


@pytest.mark.parametrize("way", ["renamed away", "made a directory", "a loop of links", "a FIFO"])
def test_a_file_that_cannot_be_read_changes_nothing(mesh: Lab, good: list[State], way: str) -> None:
    host, file = mesh.host(1), mesh.mesh_file
    aside = file.with_name("aside.yaml")
    file.rename(aside)
    if way == "made a directory":
        file.mkdir()
    elif way == "a loop of links":
        file.symlink_to(file)
    elif way == "a FIFO":
        os.mkfifo(file)
    try:
        for each in mesh.hosts:
            await_problem(each, "MeshFileUnreadable", "mesh.yaml")
        assert_whole(ping(mesh.pairs(), 2))
        assert [difference(old, wiring(h)) for old, h in zip(good, mesh.hosts, strict=True)] == [[], [], []]
        # and it is not deaf: drift is repaired all the while
        host.run(["ip", "route", "del", "10.97.2.0/24"])
        await_state(lambda: wiring(host), good[0])
    finally:
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        aside.rename(file)
    at_rest(mesh)


def test_a_file_behind_a_link_that_is_exchanged_is_followed(mesh: Lab) -> None:
    """As Kubernetes mounts a ConfigMap: the file is a link into a directory that is itself exchanged."""
    host, file = mesh.host(1), mesh.mesh_file
    old = file.with_name("data-1")
    new = file.with_name("data-2")
    for directory in (old, new):
        directory.mkdir()
    (old / "mesh.yaml").write_text(mesh.mesh_text())
    (new / "mesh.yaml").write_text(mesh.mesh_text(mtu=1300))
    data = file.with_name("data")
    data.symlink_to(old.name)
    link = file.with_name(".link")
    link.symlink_to("data/mesh.yaml")
    link.replace(file)
    at_rest(mesh)
    exchanged = file.with_name(".data")
    exchanged.symlink_to(new.name)
    exchanged.replace(data)
    mtu = Path("/sys/class/net/kbr0/mtu")
    wait_for("the MTU of the new file", lambda: host.run(["cat", str(mtu)]).stdout == "1300\n", SOON)
    mesh.write_mesh()
    wait_for("the MTU of the old file", lambda: host.run(["cat", str(mtu)]).stdout == "1462\n", SOON)
    for extra in (data, old / "mesh.yaml", new / "mesh.yaml"):
        extra.unlink()
    for host in mesh.hosts:
        host.plug()


def test_written_in_place_in_pieces_it_is_never_taken_for_half(mesh: Lab, good: list[State]) -> None:
    text = mesh.mesh_text()
    with mesh.stream(interval=0.02) as stream, mesh.mesh_file.open("w") as out:
        for at in range(0, len(text), len(text) // 5):
            out.write(text[at : at + len(text) // 5])
            out.flush()
            assert stream.wait(time.time(), SOON)
    at_rest(mesh)
    assert_whole(stream.tracks)
    assert [difference(old, wiring(h)) for old, h in zip(good, mesh.hosts, strict=True)] == [[], [], []]


def test_the_file_in_all_its_spellings_is_one_mesh(mesh: Lab, good: list[State]) -> None:
    """Flow style, JSON and another order of the nodes change nothing."""
    content = yaml.safe_load(mesh.mesh_text())
    content["spec"]["nodes"].reverse()
    write(mesh, yaml.safe_dump(content, default_flow_style=True))
    mesh.converged(SOON, thorough=True)
    assert [difference(old, wiring(h)) for old, h in zip(good, mesh.hosts, strict=True)] == [[], [], []]
