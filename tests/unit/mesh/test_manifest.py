"""The mesh file: what is good is read, what is bad is refused with node, field and value, nothing else raises."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_network

import pytest
import yaml

from ovsmesh.mesh.manifest import digest, dump
from ovsmesh.mesh.types import Mesh, MeshError, Node
from ovsmesh.mesh.yaml_reader import MAX_BYTES
from tests.support.meshkit import first
from tests.support.meshtext import HEAD, A, B, C, big, read, text_of


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
WHOLE_FILE: dict[str, tuple[str | bytes, list[str]]] = {
    "0 bytes": ("", ["0 bytes"]),
    "blanks": (" \n\n", ["only blanks"]),
    "comments": ("# soon\n", ["only comments"]),
    "not UTF-8": (b"\xff\xfea\x00", ["not UTF-8", "byte 0"]),
    "truncated in a list": (GOOD[: GOOD.index("10.97.2") + 4], ["mesh.yaml:", "cut off"]),
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
    "unknown spec key": (text_of(A, extra="  encapsulaton: gre\n"), ["spec.encapsulaton", "mean encapsulation?"]),
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
    "clusterCIDRs host bits": (
        text_of(A, clusters="[10.97.0.1/16]"), ["spec.clusterCIDRs[0]", "10.97.0.1/16", "10.97.0.0/16"],
    ),
    "clusterCIDRs overlap": (
        text_of(A, clusters="[10.97.0.0/16, 10.0.0.0/8]"), ["clusterCIDRs[1]", "10.0.0.0/8", "10.97.0.0/16"],
    ),
    "clusterCIDRs everything": (text_of(A, clusters="[0.0.0.0/0]"), ["0.0.0.0/0", "reaches into"]),
    "clusterCIDRs multicast": (text_of(A, clusters="['ff00::/16']"), ["ff00::/16", "multicast"]),
    "clusterCIDRs nonsense": (text_of(A, clusters="[ten]"), ["clusterCIDRs[0]", "ten", "not a CIDR"]),
    "encapsulation": (text_of(A, extra="  encapsulation: GRE\n"), ["spec.encapsulation GRE", "gre, vxlan, geneve"]),
    "encapsulation type": (text_of(A, extra="  encapsulation: [gre]\n"), ["spec.encapsulation", "[gre]"]),
    "key too large": (text_of(A, extra="  encapsulation: vxlan\n  key: 16777216\n"), ["spec.key 16777216", "16777215"]),
    "key negative": (text_of(A, extra="  key: -1\n"), ["spec.key", "-1", "0 to 4294967295"]),
    "key a string": (text_of(A, extra="  key: '7'\n"), ["spec.key", "7", "found a string"]),
    "key a boolean": (text_of(A, extra="  key: yes\n"), ["spec.key", "yes", "found a boolean"]),
    "key a number": (text_of(A, extra="  key: 7.0\n"), ["spec.key", "7.0", "found a number"]),
    "key absurd": (text_of(A, extra=f"  key: {'9' * 5000}\n"), ["spec.key", "999…"]),
    "mtu a boolean": (text_of(A, extra="  mtu: yes\n"), ["spec.mtu", "yes", "auto or an integer", "found a boolean"]),
    "mtu too small for IPv6": (text_of(A, extra="  mtu: 1000\n"), ["spec.mtu", "1000", "1280"]),
    "mtu a word": (text_of(A, extra="  mtu: Auto\n"), ["spec.mtu", "Auto", "auto or an integer"]),
    "allocatePodCIDRs": (text_of(A, extra="  allocatePodCIDRs: 1\n"), ["spec.allocatePodCIDRs 1", "true or false"]),
    "nodeSubnetLength": (text_of(A, extra="  nodeSubnetLength: 500\n"), ["spec.nodeSubnetLength", "500"]),
    "nodes a mapping": (HEAD + "spec: {clusterCIDRs: [10.0.0.0/8], nodes: {a: 1}}\n", ["spec.nodes", "a mapping"]),
}  # fmt: skip


def test_cut_within_an_address() -> None:
    """ "192.0.2.1" of "192.0.2.11" is an address too; only what stood there before tells."""
    whole = text_of("{name: a, address: 192.0.2.1, podCIDRs: [10.97.1.0/24]}") + (
        "  - name: b\n    podCIDRs: [10.97.2.0/24]\n    address: 192.0.2.22\n"
    )
    last, _ = read(whole)
    with pytest.raises(MeshError, match=r"node b: .*192\.0\.2\.2 where 192\.0\.2\.22 was.*cut off"):
        read(whole[:-2], last)
    assert read(whole[:-1], last)[0] is last, "only the newline is missing"
    changed, _ = read(whole[:-1].replace("192.0.2.22", "192.0.2.33"), last)
    assert str(changed.nodes[1].address) == "192.0.2.33"


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
    with pytest.raises(MeshError, match="anchor"):
        read(laughs)


def test_objects_are_reused() -> None:
    last, _ = read(text_of(A, B))
    copy = Mesh(last.cluster_cidrs, tuple(Node(n.name, n.address, n.pod_cidrs) for n in last.nodes))
    assert read("# moved\n" + text_of(B, A), copy)[0] is copy
    mesh, _ = read(text_of(A, B, C))
    assert mesh.nodes[0] is last.nodes[0] and mesh.nodes[1] is last.nodes[1]


def test_a_thousand_nodes_with_a_thousand_conflicts() -> None:
    text = big(1000) + big(1000).split("nodes:\n")[1].replace("name: web", "name: zzz")
    mesh, problems = read(text)
    assert len(mesh.nodes) == len(problems) == 1000


def test_reload_with_one_more_of_a_thousand() -> None:
    text = big(1000)
    mesh, _ = read(text)
    after, problems = read(text + "  - {name: new, address: 192.9.9.1, podCIDRs: [10.200.0.0/24]}\n", mesh)
    assert len(after.nodes) == 1001 and not problems
    assert {id(node) for node in mesh.nodes} < {id(node) for node in after.nodes}, "what is the same is the same object"


def test_the_pure_python_loader_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    want = read(text_of(A, "{name: b}", C))
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert read(text_of(A, "{name: b}", C)) == want
    for case, (text, _) in WHOLE_FILE.items():
        if case != "huge":
            with pytest.raises(MeshError):
                read(text)


def test_dump_carries_uid_and_zone() -> None:
    mesh, _ = read(text_of(B[:-1] + ", uid: u-1, zone: z1}"))
    assert mesh.nodes[0].uid == "u-1" and mesh.nodes[0].zone == "z1"
    assert read(dump(mesh))[0] == mesh


def test_the_digest_is_the_same_for_the_same_mesh_only() -> None:
    mesh = first(3)
    assert re.fullmatch("[0-9a-f]{12}", digest(mesh))
    same = [replace(mesh, cluster_cidrs=mesh.cluster_cidrs[::-1]), read(dump(mesh))[0]]
    assert {digest(one) for one in same} == {digest(mesh)}
    other = replace(mesh.nodes[0], zone="a")
    changed = [replace(mesh, mtu=1400), replace(mesh, key=0), first(2), replace(mesh, nodes=(other, *mesh.nodes[1:]))]
    assert len({digest(one) for one in (mesh, *changed)}) == 5
