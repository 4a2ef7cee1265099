"""The mesh file: what is good is read, what is bad is refused with node, field and value, nothing else raises."""

from __future__ import annotations

import random
import statistics
import time
from ipaddress import ip_network
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.meshfile import dump, parse
from ovsmesh.model import Mesh, MeshError, Node, Problem
from ovsmesh.yamltree import MAX_BYTES, show

HEAD = "apiVersion: ovsmesh.io/v1alpha1\nkind: Mesh\n"
A = "{name: a, address: 192.0.2.1, podCIDRs: [10.97.1.0/24]}"
B = "{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}"
C = "{name: c, address: 192.0.2.3, podCIDRs: [10.97.3.0/24, 'fd00:97:3::/64']}"


def text_of(*nodes: str, extra: str = "", clusters: str = "[10.97.0.0/16, 'fd00:97::/32']") -> str:
    body = "".join(f"  - {node}\n" for node in nodes)
    return f"{HEAD}spec:\n  clusterCIDRs: {clusters}\n{extra}  nodes:\n{body}"


def read(text: str | bytes, last: Mesh | None = None) -> tuple[Mesh, tuple[Problem, ...]]:
    return parse(text, "mesh.yaml", last)


def names(mesh: Mesh) -> str:
    return "".join(node.name for node in mesh.nodes)


def test_whole_object() -> None:
    text = """\
# as kubectl prints it
apiVersion: ovsmesh.io/v1alpha1
kind: Mesh
metadata:
  name: default
  uid: 3f0e
  labels: {a: "1"}
  annotations:
    x: |
      anything
spec:
  clusterCIDRs: [10.97.0.0/16, fd00:97::/32]
  encapsulation: vxlan
  key: 0x10
  mtu: 1400
  allocatePodCIDRs: false
  nodeSubnetLength: 24
  nodes:
  - name: web2
    address: 2001:10:20:30:40:50:0:1
    podCIDRs:
    - fd00:97:2::/64
    uid: "77"
  - name: "web1"
    address: 192.0.2.11
    podCIDRs: [10.97.1.0/24, fd00:97:1::/64]
    zone:
status: {whatever: [1, {}]}
"""
    mesh, problems = read(text)
    assert problems == ()
    assert (mesh.encapsulation, mesh.key, mesh.mtu) == ("vxlan", 16, 1400)
    assert [n.name for n in mesh.nodes] == ["web1", "web2"]
    assert mesh.nodes[0].pod_cidrs == (ip_network("10.97.1.0/24"), ip_network("fd00:97:1::/64"))
    # YAML 1.1 would read the first eight groups as an integer to the base 60.
    assert str(mesh.nodes[1].address) == "2001:10:20:30:40:50:0:1"
    assert mesh.nodes[1].uid == "77"


def test_defaults() -> None:
    mesh, _ = read(text_of(A))
    assert (mesh.encapsulation, mesh.key, mesh.mtu) == ("gre", None, None)
    assert read(text_of(A, extra="  mtu: auto\n  key:\n  encapsulation: ~\n"))[0] == mesh


GOOD = text_of(A, B)
WHOLE_FILE = {
    "0 bytes": ("", ["0 bytes"]),
    "blanks": (" \n\n", ["only blanks"]),
    "comments": ("# soon\n", ["only comments"]),
    "not UTF-8": (b"\xff\xfea\x00", ["not UTF-8", "byte 0"]),
    "truncated in a list": (GOOD[: GOOD.index("10.97.2") + 4], ["mesh.yaml:", "cut off"]),
    "truncated in an address": (HEAD + "spec:\n  clusterCIDRs: [10.97.0.0/16]\n  nodes:\n  - name: a\n    address: 192.0.2.1",
                                ["mesh.yaml:7:14", "192.0.2.1", "cut off"]),
    "truncated in a key": (HEAD + "spec:\n  clusterCI", ["clusterCI"]),
    "invalid YAML": (HEAD + "spec: {a: [}\n", ["mesh.yaml:3:", "not valid YAML"]),
    "tab": (HEAD + "spec:\n\ta: 1\n", ["mesh.yaml:4:1", "not valid YAML"]),
    "control character": (HEAD + "spec: \x1b[31m\n", ["not valid YAML"]),
    "several documents": (GOOD + "---\n" + GOOD, ["mesh.yaml:8:1", "second document"]),
    "a list": ("- a\n", ["wanted a Mesh object", "found a list"]),
    "a string": ("hello\n", ["wanted a Mesh object", "found a string"]),
    "apiVersion": (GOOD.replace("v1alpha1", "v2"), ["apiVersion", "ovsmesh.io/v2", "ovsmesh.io/v1alpha1"]),
    "no apiVersion": (GOOD.replace("apiVersion: ovsmesh.io/v1alpha1\n", ""), ["apiVersion is missing"]),
    "kind": (GOOD.replace("kind: Mesh", "kind: MeshSlice"), ["kind", "MeshSlice", "wanted Mesh"]),
    "metadata": (HEAD + "metadata: 3\nspec: {}\n", ["metadata", "3"]),
    "no spec": (HEAD, ["spec is missing"]),
    "spec a list": (HEAD + "spec: [a]\n", ["spec", "[a]", "found a list"]),
    "unknown top key": (GOOD + "sepc: 1\n", ["unknown key", "sepc", "did you mean spec?"]),
    "unknown spec key": (text_of(A, extra="  encapsulaton: gre\n"), ["spec.encapsulaton", "did you mean encapsulation?"]),
    "unknown spec key by case": (text_of(A, extra="  MTU: 1400\n"), ["spec.MTU", "did you mean mtu?"]),
    "hostile key": (text_of(A, extra='  "\\e]0;x\\a": 1\n'), ["unknown key", r"'\x1b]0;x\x07'"]),
    "duplicate key": (text_of(A, extra="  mtu: auto\n  mtu: 1400\n"), ["mesh.yaml:6:3", "mtu", "twice"]),
    "duplicate key in metadata": (HEAD + "metadata: {a: 1, a: 2}\nspec: {}\n", ["a", "twice"]),
    "anchor": (HEAD + "spec: &s {clusterCIDRs: [10.0.0.0/8]}\n", ["mesh.yaml:3:7", "anchor &s"]),
    "alias": (HEAD + "spec: *s\n", ["alias *s"]),
    "merge key": (HEAD + "spec: {<<: {a: 1}}\n", ["merge keys"]),
    "tag": (HEAD + "spec: !!python/object:os.system {}\n", ["tag", "python/object"]),
    "deep": (HEAD + "metadata: " + "[" * 99 + "\n", ["nested deeper than 32"]),
    "list as key": (HEAD + "spec: {[a]: 1}\n", ["a key must be a string"]),
    "huge": (" " * (MAX_BYTES + 1), [str(MAX_BYTES + 1), str(MAX_BYTES)]),
    "no clusterCIDRs": (HEAD + "spec:\n  nodes: []\n", ["spec.clusterCIDRs is missing"]),
    "empty clusterCIDRs": (text_of(A, clusters="[]"), ["spec.clusterCIDRs is empty"]),
    "clusterCIDRs a string": (text_of(A, clusters="10.97.0.0/16"), ["wanted a list", "[10.97.0.0/16]"]),
    "clusterCIDRs a number": (text_of(A, clusters="[10]"), ["spec.clusterCIDRs[0]", "10", "found an integer"]),
    "clusterCIDRs host bits": (text_of(A, clusters="[10.97.0.1/16]"), ["spec.clusterCIDRs[0]", "10.97.0.1/16", "10.97.0.0/16"]),
    "clusterCIDRs overlap": (text_of(A, clusters="[10.97.0.0/16, 10.0.0.0/8]"), ["clusterCIDRs[1]", "10.0.0.0/8", "10.97.0.0/16"]),
    "clusterCIDRs everything": (text_of(A, clusters="[0.0.0.0/0]"), ["0.0.0.0/0", "reaches into"]),
    "clusterCIDRs multicast": (text_of(A, clusters="['ff00::/16']"), ["ff00::/16", "multicast"]),
    "clusterCIDRs nonsense": (text_of(A, clusters="[ten]"), ["clusterCIDRs[0]", "ten", "not a CIDR"]),
    "encapsulation": (text_of(A, extra="  encapsulation: GRE\n"), ["spec.encapsulation", "GRE", "gre, vxlan, geneve"]),
    "encapsulation type": (text_of(A, extra="  encapsulation: [gre]\n"), ["spec.encapsulation", "[gre]"]),
    "key too large": (text_of(A, extra="  encapsulation: vxlan\n  key: 16777216\n"), ["spec.key", "16777216", "16777215"]),
    "key negative": (text_of(A, extra="  key: -1\n"), ["spec.key", "-1", "0 to 4294967295"]),
    "key a string": (text_of(A, extra="  key: '7'\n"), ["spec.key", "7", "found a string"]),
    "key a boolean": (text_of(A, extra="  key: yes\n"), ["spec.key", "yes", "found a boolean"]),
    "key a number": (text_of(A, extra="  key: 7.0\n"), ["spec.key", "7.0", "found a number"]),
    "key absurd": (text_of(A, extra=f"  key: {'9' * 5000}\n"), ["spec.key", "999…"]),
    "mtu a boolean": (text_of(A, extra="  mtu: yes\n"), ["spec.mtu", "yes", "auto or an integer", "found a boolean"]),
    "mtu too small for IPv6": (text_of(A, extra="  mtu: 1000\n"), ["spec.mtu", "1000", "1280"]),
    "mtu a word": (text_of(A, extra="  mtu: Auto\n"), ["spec.mtu", "Auto", "auto or an integer"]),
    "allocatePodCIDRs": (text_of(A, extra="  allocatePodCIDRs: 1\n"), ["spec.allocatePodCIDRs", "1", "true or false"]),
    "nodeSubnetLength": (text_of(A, extra="  nodeSubnetLength: 500\n"), ["spec.nodeSubnetLength", "500"]),
    "nodes a mapping": (HEAD + "spec: {clusterCIDRs: [10.0.0.0/8], nodes: {a: 1}}\n", ["spec.nodes", "found a mapping"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE_FILE)
def test_unusable_as_a_whole(case: str) -> None:
    text, parts = WHOLE_FILE[case]
    with pytest.raises(MeshError) as error:
        read(text)
    message = str(error.value)
    assert message.startswith("mesh.yaml")
    assert message.isprintable() and len(message) < 500
    for part in parts:
        assert part in message


def test_billion_laughs_is_refused_at_once() -> None:
    laughs = "a: &a [x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 9}]\n" for i in range(9))
    began = time.monotonic()
    with pytest.raises(MeshError, match="anchor"):
        read(laughs)
    assert time.monotonic() - began < 1


LONG = "x" * 300
NODE = {
    # case: (entry, reason, node, field, value, parts of the text)
    "host bits": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.7/24]}", "PodCIDRInvalid", "b", "podCIDRs[0]", "10.97.2.7/24", ["10.97.2.0/24"]),
    "host bits v6": ("{name: b, address: 192.0.2.2, podCIDRs: ['fd00:97:2::1/64']}", "PodCIDRInvalid", "b", "podCIDRs[0]", "fd00:97:2::1/64", ["fd00:97:2::/64"]),
    "second CIDR": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24, nope]}", "PodCIDRInvalid", "b", "podCIDRs[1]", "nope", ["not a CIDR"]),
    "no prefix length": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0]}", "PodCIDRInvalid", "b", "podCIDRs[0]", "10.97.2.0", ["prefix length"]),
    "netmask": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/255.255.255.0]}", "PodCIDRInvalid", "b", "podCIDRs[0]", "10.97.2.0/255.255.255.0", []),
    "outside": ("{name: b, address: 192.0.2.2, podCIDRs: [10.98.2.0/24]}", "PodCIDROutside", "b", "podCIDRs[0]", "10.98.2.0/24", ["10.97.0.0/16"]),
    "larger than the cluster": ("{name: b, address: 192.0.2.2, podCIDRs: [10.96.0.0/15]}", "PodCIDROutside", "b", "podCIDRs[0]", "10.96.0.0/15", []),
    "overlap": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.0.0/20]}", "PodCIDRConflict", "b", "podCIDRs[0]", "10.97.0.0/20", ["10.97.1.0/24 of node a", "first in the file"]),
    "overlap with itself": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24, 10.97.2.128/25]}", "PodCIDRConflict", "b", "podCIDRs[1]", "10.97.2.128/25", ["podCIDRs[0]"]),
    "mapped CIDR": ("{name: b, address: 192.0.2.2, podCIDRs: ['::ffff:10.97.2.0/120']}", "PodCIDROutside", "b", "podCIDRs[0]", "::ffff:10.97.2.0/120", []),
    "no room": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/31]}", "PodCIDRInvalid", "b", "podCIDRs[0]", "10.97.2.0/31", ["/30"]),
    "no room v6": ("{name: b, address: 192.0.2.2, podCIDRs: ['fd00:97:2::/127']}", "PodCIDRInvalid", "b", "podCIDRs[0]", "fd00:97:2::/127", ["/126"]),
    "no podCIDRs": ("{name: b, address: 192.0.2.2}", "PodCIDRMissing", "b", "podCIDRs", "missing", []),
    "podCIDRs null": ("{name: b, address: 192.0.2.2, podCIDRs: }", "PodCIDRMissing", "b", "podCIDRs", "missing", []),
    "podCIDRs empty": ("{name: b, address: 192.0.2.2, podCIDRs: []}", "PodCIDRMissing", "b", "podCIDRs", "[]", []),
    "podCIDRs a string": ("{name: b, address: 192.0.2.2, podCIDRs: 10.97.2.0/24}", "PodCIDRInvalid", "b", "podCIDRs", "10.97.2.0/24", ["wanted a list", "[10.97.2.0/24]"]),
    "podCIDRs of lists": ("{name: b, address: 192.0.2.2, podCIDRs: [[10.97.2.0/24]]}", "PodCIDRInvalid", "b", "podCIDRs[0]", "[10.97.2.0/24]", ["found a list"]),
    "too many CIDRs": ("{name: b, address: 192.0.2.2, podCIDRs: [" + ", ".join(f"10.97.{i}.0/24" for i in range(2, 40)) + "]}", "PodCIDRInvalid", "b", "podCIDRs", "[10.97.2.0/24, 10.97.3.0/24, 10.97.4.0/24, …]", ["38"]),
    "no address": ("{name: b, podCIDRs: [10.97.2.0/24]}", "AddressMissing", "b", "address", "missing", []),
    "address a number": ("{name: b, address: 1.5, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "1.5", ["found a number"]),
    "address nonsense": ("{name: b, address: 192.0.2.256, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "192.0.2.256", ["not an IP address"]),
    "address with prefix": ("{name: b, address: 192.0.2.2/24, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "192.0.2.2/24", ["leave out"]),
    "address with zone": ("{name: b, address: 'fe80::1%eth0', podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "'fe80::1%eth0'", []),
    "unspecified": ("{name: b, address: 0.0.0.0, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "0.0.0.0", ["unspecified"]),
    "unspecified v6": ("{name: b, address: '::', podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "::", ["unspecified"]),
    "loopback": ("{name: b, address: 127.0.0.1, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "127.0.0.1", ["loopback"]),
    "loopback v6": ("{name: b, address: '::1', podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "::1", ["loopback"]),
    "multicast": ("{name: b, address: 224.0.0.9, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "224.0.0.9", ["multicast"]),
    "link-local": ("{name: b, address: 169.254.1.1, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "169.254.1.1", ["link-local"]),
    "link-local v6": ("{name: b, address: 'fe80::1', podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "fe80::1", ["link-local"]),
    "broadcast": ("{name: b, address: 255.255.255.255, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "255.255.255.255", ["broadcast"]),
    "mapped": ("{name: b, address: '::ffff:192.0.2.2', podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "::ffff:192.0.2.2", ["IPv4-mapped"]),
    "address in the cluster": ("{name: b, address: 10.97.200.1, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "10.97.200.1", ["10.97.0.0/16"]),
    "address in its pod CIDR": ("{name: b, address: 10.97.2.1, podCIDRs: [10.97.2.0/24]}", "AddressInvalid", "b", "address", "10.97.2.1", []),
    "duplicate address": ("{name: b, address: 192.0.2.1, podCIDRs: [10.97.2.0/24]}", "AddressConflict", "b", "address", "192.0.2.1", ["node a"]),
    "duplicate name": ("{name: a, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "DuplicateName", "a", "name", "a", ["line 6", "line 7"]),
    "no name": ("{address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameMissing", "nodes[1]", "name", "missing", []),
    "name a number": ("{name: 123, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameInvalid", "nodes[1]", "name", "123", ["found an integer", "quotes"]),
    "name a boolean": ("{name: no, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameInvalid", "nodes[1]", "name", "no", ["found a boolean"]),
    "name empty": ("{name: '', address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameInvalid", "nodes[1]", "name", "''", []),
    "name with a dash": ("{name: -b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameInvalid", "nodes[1]", "name", "-b", []),
    "name with a newline": ('{name: "b\\n", address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}', "NameInvalid", "nodes[1]", "name", r"'b\n'", []),
    "name hostile": ('{name: "b\\e[2J", address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}', "NameInvalid", "nodes[1]", "name", r"'b\x1b[2J'", []),
    "name not ASCII": ("{name: bü, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "NameInvalid", "nodes[1]", "name", r"'b\xfc'", []),
    "name too long": (f"{{name: {LONG}, address: 192.0.2.2, podCIDRs: [10.97.2.0/24]}}", "NameInvalid", "nodes[1]", "name", "x" * 80 + "…", []),
    "address hostile": ('{name: b, address: "\\a192.0.2.2", podCIDRs: [10.97.2.0/24]}', "AddressInvalid", "b", "address", r"'\x07192.0.2.2'", []),
    "unknown key": ("{name: b, adress: 192.0.2.2, podCIDRs: [10.97.2.0/24]}", "UnknownKey", "b", "adress", "192.0.2.2", ["did you mean address?"]),
    "unknown key by case": ("{name: b, address: 192.0.2.2, podCidrs: [10.97.2.0/24]}", "UnknownKey", "b", "podCidrs", "[10.97.2.0/24]", ["did you mean podCIDRs?"]),
    "uid a number": ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24], uid: 7}", "NodeInvalid", "b", "uid", "7", []),
    "zone hostile": ('{name: b, address: 192.0.2.2, podCIDRs: [10.97.2.0/24], zone: "\\e"}', "NodeInvalid", "b", "zone", r"'\x1b'", []),
    "a string": ("b", "NodeInvalid", "nodes[1]", "entry", "b", ["wanted a mapping"]),
    "null": ("~", "NodeInvalid", "nodes[1]", "entry", "~", ["found nothing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", NODE)
def test_one_node_is_refused_and_the_others_converge(case: str) -> None:
    entry, reason, node, field, value, parts = NODE[case]
    mesh, problems = read(text_of(A, entry, C))
    assert names(mesh) == "ac"
    assert mesh == read(text_of(A, C))[0]
    (problem,) = problems
    assert (problem.reason, problem.node, problem.field, problem.value) == (reason, node, field, value)
    text = str(problem)
    assert text.isprintable() and len(text) < 500
    for part in [f"node {node}", field, value, *parts]:
        assert part in text
    assert ("line 7" in text) == (entry not in ("b", "~"))


@pytest.mark.parametrize("case", [c for c in NODE if NODE[c][2] == "b"])
def test_a_refused_node_keeps_its_last_good_entry(case: str) -> None:
    last, _ = read(text_of(A, B, C))
    mesh, (problem,) = read(text_of(A, NODE[case][0], C), last)
    assert "keeping its last good entry" in problem.message
    assert mesh is last


def test_a_last_good_entry_never_displaces_a_good_one() -> None:
    last, _ = read(text_of(A, B))
    thief = "{name: d, address: 192.0.2.4, podCIDRs: [10.97.2.0/25]}"
    mesh, (problem,) = read(text_of(A, "{name: b, address: 192.0.2.2}", thief), last)
    assert names(mesh) == "ad"
    assert "can't be kept" in problem.message


def test_a_last_good_entry_must_fit_the_cluster_cidrs_of_now() -> None:
    last, _ = read(text_of(A, B))
    new = "{name: a, address: 192.0.2.1, podCIDRs: [10.50.1.0/24]}"
    mesh, (problem,) = read(text_of(new, B, clusters="[10.50.0.0/16]"), last)
    assert names(mesh) == "a" and problem.node == "b" and "can't be kept" in problem.message


def test_a_node_that_is_absent_has_left() -> None:
    last, _ = read(text_of(A, B))
    mesh, problems = read(text_of(A), last)
    assert names(mesh) == "a" and problems == ()


@pytest.mark.parametrize(
    ("thief", "reason", "value"),
    [
        ("{name: b, address: 192.0.2.1, podCIDRs: [10.97.2.0/24]}", "AddressConflict", "192.0.2.1"),
        ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.0/24]}", "PodCIDRConflict", "10.97.1.0/24"),
        ("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.128/25]}", "PodCIDRConflict", "10.97.1.128/25"),
    ],
)
def test_who_held_it_keeps_it_wherever_it_stands(thief: str, reason: str, value: str) -> None:
    last, _ = read(text_of(A))
    mesh, (problem,) = read(text_of(thief, A), last)
    assert names(mesh) == "a"
    assert (problem.node, problem.reason, problem.value) == ("b", reason, value)
    assert "node a" in problem.message and "held it before" in problem.message
    # Without a past the first in the file wins.
    mesh, (problem,) = read(text_of(thief, A))
    assert names(mesh) == "b" and problem.node == "a" and "comes first" in problem.message


def test_a_claim_is_kept_though_the_rest_of_the_entry_changed() -> None:
    last, _ = read(text_of(A))
    moved = A.replace("192.0.2.1", "192.0.2.77")
    mesh, (problem,) = read(text_of("{name: b, address: 192.0.2.2, podCIDRs: [10.97.1.0/24]}", moved), last)
    assert names(mesh) == "a" and str(mesh.nodes[0].address) == "192.0.2.77" and problem.node == "b"


def test_the_loser_of_a_conflict_keeps_its_last_good_entry() -> None:
    last, _ = read(text_of(A, B))
    mesh, (problem,) = read(text_of(B.replace("10.97.2.0", "10.97.1.0"), A), last)
    assert mesh is last and problem.node == "b" and "keeping its last good entry" in problem.message


def test_two_nodes_may_swap() -> None:
    last, _ = read(text_of(A, B))
    mesh, problems = read(text_of(A.replace("10.97.1", "10.97.2"), B.replace("10.97.2", "10.97.1")), last)
    assert problems == () and [str(n.pod_cidrs[0]) for n in mesh.nodes] == ["10.97.2.0/24", "10.97.1.0/24"]


def test_duplicate_name_the_one_that_was_good_stays() -> None:
    last, _ = read(text_of(A, B))
    other = "{name: a, address: 192.0.2.9, podCIDRs: [10.97.9.0/24]}"
    mesh, (problem,) = read(text_of(other, A, B), last)
    assert mesh is last and "held until now" in problem.message and "line 7" in problem.message


def test_objects_are_reused() -> None:
    last, _ = read(text_of(A, B))
    copy = Mesh(last.cluster_cidrs, tuple(Node(n.name, n.address, n.pod_cidrs) for n in last.nodes))
    assert read("# moved\n" + text_of(B, A), copy)[0] is copy
    mesh, _ = read(text_of(A, B, C), copy)
    assert mesh.nodes[0] is copy.nodes[0] and mesh.nodes[1] is copy.nodes[1]


def big(count: int) -> str:
    """In block style, `count` nodes."""
    lines = [
        f"  - name: web{i}\n    address: 192.1.{i >> 8}.{i & 255}\n    podCIDRs: [10.{i >> 8}.{i & 255}.0/24]\n"
        for i in range(count)
    ]
    return f"{HEAD}metadata: {{name: default}}\nspec:\n  clusterCIDRs: [10.0.0.0/8]\n  nodes:\n{''.join(lines)}"


def test_a_thousand_nodes_with_a_thousand_conflicts_are_quick() -> None:
    text = big(1000) + big(1000).split("nodes:\n")[1].replace("name: web", "name: zzz")
    began = time.monotonic()
    mesh, problems = read(text)
    assert len(mesh.nodes) == len(problems) == 1000
    assert time.monotonic() - began < 2


def test_reload_with_one_more_of_a_thousand(capsys: pytest.CaptureFixture[str]) -> None:
    text = big(1000)
    mesh, _ = read(text)
    times = []
    for i in range(15):
        more = text + f"  - {{name: new{i}, address: 192.9.9.{i + 1}, podCIDRs: [10.200.{i}.0/24]}}\n"
        began = time.perf_counter()
        after, problems = read(more, mesh)
        times.append(time.perf_counter() - began)
        assert len(after.nodes) == 1001 and not problems
    with capsys.disabled():
        print(f"\nreload with one node added at 1,000: p50 {statistics.median(times) * 1e3:.1f} ms")
    # 20 ms where nothing else runs; a loaded machine is given room.
    assert statistics.median(times) < 0.1


def test_the_pure_python_loader_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    want = read(text_of(A, "{name: b}", C))
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert read(text_of(A, "{name: b}", C)) == want
    for case, (text, _) in WHOLE_FILE.items():
        if case != "huge":
            with pytest.raises(MeshError):
                read(text)


# ---------------------------------------------------------------- properties

SOUP = st.text(st.sampled_from("{}[]:,-&*!|>'\"%@`#?~\n\t \\xu0123456789./abspecnodskiM\x00\x1b\u2028é\U0001f600"))
ADDRESSES = st.integers(1, 60).map(lambda i: f"192.0.2.{i}") | st.integers(1, 9).map(lambda i: f"2001:db8::{i:x}")
CIDRS = st.integers(0, 40).map(lambda i: f"10.97.{i}.0/24") | st.integers(0, 9).map(lambda i: f"fd00:97:{i:x}::/64")
WIDE = CIDRS | st.integers(0, 9).map(lambda i: f"10.97.{i * 4}.0/22") | st.just("10.97.1.1/24") | st.just("1.0.0.0/8")
ENTRY = st.tuples(st.sampled_from("abcdefgh"), ADDRESSES, st.lists(WIDE, min_size=1, max_size=3)).map(
    lambda t: f"{{name: {t[0]}, address: '{t[1]}', podCIDRs: {t[2]}}}"
)
FILES = st.lists(ENTRY, max_size=8).map(lambda nodes: text_of(*nodes))


def consistent(mesh: Mesh) -> None:
    assert [n.name for n in mesh.nodes] == sorted({n.name for n in mesh.nodes})
    assert len({n.address for n in mesh.nodes}) == len(mesh.nodes)
    cidrs = [c for n in mesh.nodes for c in n.pod_cidrs]
    for i, a in enumerate(cidrs):
        assert not any(a.overlaps(b) for b in cidrs[i + 1 :])
        assert any(a.version == c.version and a.subnet_of(c) for c in mesh.cluster_cidrs)  # type: ignore[arg-type]


@given(st.text() | st.binary() | SOUP | SOUP.map(lambda s: HEAD + s) | SOUP.map(lambda s: GOOD + s))
def test_no_text_raises_anything_but_mesh_error(text: str | bytes) -> None:
    try:
        mesh, problems = read(text)
    except MeshError as error:
        assert str(error).isprintable()
    else:
        consistent(mesh)
        assert all(str(p).isprintable() for p in problems)


@given(st.data())
def test_mutated_good_files(data: st.DataObject) -> None:
    text = data.draw(FILES)
    last = read(data.draw(FILES))[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.integers(at, min(len(text), at + 12)))
        text = text[:at] + data.draw(SOUP) + text[until:]
    try:
        mesh, problems = read(text, last)
    except MeshError as error:
        assert str(error).isprintable()
    else:
        consistent(mesh)
        assert all(str(p).isprintable() for p in problems)


@given(FILES)
def test_cut_anywhere_never_gives_a_node_that_the_whole_has_not(text: str) -> None:
    whole = {(n.name, n.address, n.pod_cidrs) for n in read(text)[0].nodes}
    for at in range(0, len(text), 3):
        try:
            mesh, _ = read(text[:at])
        except MeshError:
            continue
        assert {(n.name, n.address, n.pod_cidrs) for n in mesh.nodes} <= whole


@given(FILES, FILES)
def test_round_trip_and_stability(first: str, second: str) -> None:
    last, _ = read(first)
    mesh, _ = read(second, last)
    consistent(mesh)
    again, problems = read(dump(mesh))
    assert again == mesh and problems == ()
    assert read(dump(mesh), mesh)[0] is mesh


@given(st.lists(ENTRY, max_size=8), st.randoms(use_true_random=False))
def test_order_matters_only_for_who_wins(entries: list[str], chance: random.Random) -> None:
    mesh, problems = read(text_of(*entries))
    shuffled = entries[:]
    chance.shuffle(shuffled)
    other, others = read(text_of(*shuffled))
    conflicts = {"AddressConflict", "PodCIDRConflict", "DuplicateName"}
    if not any(p.reason in conflicts for p in problems):
        assert other == mesh and not any(p.reason in conflicts for p in others)
    # Once settled, the order of the file no longer decides anything.
    if not problems:
        assert read(text_of(*shuffled), mesh)[0] is mesh


@given(st.text())
def test_show_is_safe(text: str) -> None:
    assert show(text).isprintable() and len(show(text)) <= 80 * 10 + 3


@settings(max_examples=25)
@given(st.integers(576, 65535), st.none() | st.integers(0, 2**24 - 1), st.sampled_from(["gre", "vxlan", "geneve"]))
def test_settings_round_trip(mtu: int, key: int | None, encapsulation: str) -> None:
    mesh = Mesh((ip_network("10.97.0.0/16"),), (), encapsulation, key, mtu)
    assert read(dump(mesh)) == (mesh, ())


def test_dump_carries_uid_and_zone(tmp_path: Path) -> None:
    mesh, _ = read(text_of(B[:-1] + ", uid: u-1, zone: z1}"))
    assert mesh.nodes[0].uid == "u-1" and mesh.nodes[0].zone == "z1"
    assert read(dump(mesh))[0] == mesh
