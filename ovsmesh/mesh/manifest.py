"""The Mesh object as a file or as an object of the API: a Mesh, and a Problem for each node that can't be used.

What spoils the whole mesh raises MeshError; what spoils one entry refuses that node only, and all others
converge. Does no I/O and asks no clock.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ovsmesh.errors import Problem
from ovsmesh.mesh.conflicts import settle_entries
from ovsmesh.mesh.types import ENCAPSULATIONS, IPNetwork, Mesh, MeshError, MeshSettings, Node
from ovsmesh.mesh.validation import Refusal, clusters_of, validate_node
from ovsmesh.mesh.yaml_reader import Map, Scalar, Tree, kind_of, load, show, tree_of
from ovsmesh.names import API_VERSION, DEFAULT_MESH, MESH
from ovsmesh.reasons import Reason

MAX_CIDRS = 16
"""Pod CIDRs of one node; Kubernetes gives at most two."""
MAX_CLUSTER_CIDRS = 64

_TOP = ("apiVersion", "kind", "metadata", "spec", "status")
_SETTINGS = ("clusterCIDRs", "encapsulation", "key", "mtu")
_SPEC = (*_SETTINGS, "allocatePodCIDRs", "nodeSubnetLength", "nodes")
_NODE = ("name", "address", "podCIDRs", "uid", "zone")
NODE_KEYS = frozenset(_NODE)
"""Fields of an entry."""
_ONLY_STR = {str}
_KEY_BITS = {"gre": 32, "vxlan": 24, "geneve": 24}
"""Width of the key: RFC 2890, RFC 7348, RFC 8926."""
_MTU = range(576, 65536)
"""Pod MTU in bytes: what every IPv4 host must take (RFC 791), to the largest that a Linux link has."""
_MTU6 = 1280
"""Smallest MTU in bytes on which Linux runs IPv6 (RFC 8200)."""


def parse(text: str | bytes, where: str, last: Mesh | None = None) -> tuple[Mesh, tuple[Problem, ...]]:
    """Return the mesh in `text`, and what was refused of it. Raises MeshError.

    `where` is the file's path, for messages. `last` is the last good mesh: of two nodes that want one thing, the
    one that held it there keeps it; a node refused now keeps its entry of there; it is returned itself if nothing
    changed. The mesh may be without nodes: whether that is meant is for the caller to judge.
    """
    mesh, problems = _parse(load(text, where), where, last)
    if last is not None and mesh is not last and text[-1:] not in (b"\n", "\n"):
        _uncut(mesh, last, where)
    return mesh, problems


def parse_object(found: Mapping[str, Any], where: str) -> tuple[Mesh, tuple[Problem, ...]]:
    """Return the mesh of a decoded Mesh object, and what was refused of it. Raises MeshError."""
    return _parse(tree_of(found, where), where, None)


def _parse(tree: Tree, where: str, last: Mesh | None) -> tuple[Mesh, tuple[Problem, ...]]:
    if type(tree) is not Map:
        raise MeshError(f"{where}: wanted a Mesh object (apiVersion, kind, spec), found {kind_of(tree)}")
    _known(tree, _TOP, where, "")
    for field, want in (("apiVersion", API_VERSION), ("kind", MESH)):
        if field not in tree:
            raise MeshError(f"{where}: {field} is missing: begin the file with `{field}: {want}`")
        if tree[field] != want:
            _bad(where, field, tree[field], f"wanted {want}")
    if type(_given(tree, "metadata")) not in (Map, type(None)):
        _bad(where, "metadata", tree["metadata"], f"wanted a mapping, found {kind_of(tree['metadata'])}")
    spec = _given(tree, "spec")
    if spec is None:
        raise MeshError(f"{where}: spec is missing: it holds clusterCIDRs and nodes")
    if type(spec) is not Map:
        _bad(where, "spec", spec, f"wanted a mapping, found {kind_of(spec)}")
    _known(spec, _SPEC, where, "spec.")
    settings = _settings(spec, where)
    _integer(spec, "nodeSubnetLength", range(1, 127), where)
    allocate = _given(spec, "allocatePodCIDRs")
    if allocate is not None and not (isinstance(allocate, Scalar) and allocate.kind == "boolean"):
        _bad(where, "spec.allocatePodCIDRs", allocate, f"wanted true or false, found {kind_of(allocate)}")
    nodes, problems = _nodes(spec, where, tuple(map(str, settings.cluster_cidrs)), last)
    mesh = Mesh(settings.cluster_cidrs, nodes, *settings[1:])
    return (last if last is not None and last == mesh else mesh), problems


def _uncut(mesh: Mesh, last: Mesh, where: str) -> None:
    """Raise MeshError if a file ends within a value: "192.0.2.1" of "192.0.2.11" is an address too.

    Only a value that begins what stood there before tells a cut file from one that just has no
    newline at its end.
    """
    before = {node.name: node for node in last.nodes}
    for node in mesh.nodes:
        old = before.get(node.name, node)
        for now, then in [(node.address, old.address), *zip(node.pod_cidrs, old.pod_cidrs, strict=False)]:
            if now != then and str(then).startswith(str(now)):
                message = f"{where}: node {node.name}: the file ends without a newline and has {now} where {then} was"
                raise MeshError(f"{message}: it seems cut off; end its last line with a newline if not")


def dump(mesh: Mesh) -> str:
    """Return `mesh` in the format that parse() reads: JSON, which is YAML too, one node a line."""
    spec = {**dump_settings(mesh.settings), "nodes": []}
    head = json.dumps({"apiVersion": API_VERSION, "kind": MESH, "metadata": {"name": DEFAULT_MESH}, "spec": spec})
    if not mesh.nodes:
        return head + "\n"
    return head[:-3] + "\n" + ",\n".join(json.dumps(dump_node(node)) for node in mesh.nodes) + "\n]}}\n"


def digest(mesh: Mesh) -> str:
    """Return 12 hexadecimal digits that two meshes share only if all their settings and nodes are the same.

    The same on every host and for every source. The order of nodes and of cluster CIDRs does not matter.
    """
    ordered = replace(mesh, cluster_cidrs=tuple(sorted(mesh.cluster_cidrs, key=str)))
    return hashlib.sha256(dump(ordered).encode()).hexdigest()[:12]


def dump_settings(settings: MeshSettings) -> dict[str, Any]:
    """Return `settings` as parse_settings() reads them. No key is null, so that a merge patch removes an old one."""
    return {
        "clusterCIDRs": [str(c) for c in settings.cluster_cidrs],
        "encapsulation": settings.encapsulation,
        "key": settings.key,
        "mtu": "auto" if settings.mtu is None else settings.mtu,
    }


def dump_node(node: Node) -> dict[str, Any]:
    """Return `node` as parse_entry() reads it."""
    entry: dict[str, Any] = {"name": node.name, "address": str(node.address)}
    entry["podCIDRs"] = [str(c) for c in node.pod_cidrs]
    if node.uid:
        entry["uid"] = node.uid
    if node.zone:
        entry["zone"] = node.zone
    return entry


# ---------------------------------------------------------------- the mesh's own settings


def _bad(where: str, field: str, value: object, message: str) -> NoReturn:
    raise MeshError(f"{where}: {field} {show(value)}: {message}")


def _given(tree: dict[str, Any], field: str) -> Tree | None:
    """Return what stands under `field`; None if it is absent or null, which mean the same."""
    value = tree.get(field)
    return None if isinstance(value, Scalar) and value.kind == "null" else value


def _nearest(key: str, known: tuple[str, ...]) -> str:
    if key == "<<":
        return "merge keys are not accepted: write the values out"
    # By lower case, so that podcidrs and PodCIDRs find podCIDRs too.
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(key[:64].lower(), lower, 1, 0.6)
    return f"did you mean {lower[near[0]]}?" if near else f"known are {', '.join(known)}"


def _known(tree: Map, known: tuple[str, ...], where: str, prefix: str) -> None:
    for key in tree:
        if key not in known:
            at = f"{where}:{tree.line}" if tree.line else where
            raise MeshError(f"{at}: unknown key {prefix}{show(key)}: {_nearest(key, known)}")


def parse_settings(value: object, where: str) -> MeshSettings:
    """Return the settings in a decoded JSON object, such as a MeshSlice carries. Raises MeshError."""
    tree = tree_of(value, where)
    if type(tree) is not Map:
        raise MeshError(f"{where}: wanted settings, found {kind_of(tree)}")
    _known(tree, _SETTINGS, where, "spec.")
    return _settings(tree, where)


def _settings(spec: Map, where: str) -> MeshSettings:
    networks = _clusters(spec, where)
    encapsulation = _encapsulation(spec, where)
    key = _integer(spec, "key", range(1 << _KEY_BITS[encapsulation]), where)
    lowest = _MTU6 if any(network.version == 6 for network in networks) else _MTU.start
    mtu = None if spec.get("mtu") == "auto" else _integer(spec, "mtu", range(lowest, _MTU.stop), where, "auto or ")
    return MeshSettings(networks, encapsulation, key, mtu)


def _clusters(spec: Map, where: str) -> tuple[IPNetwork, ...]:
    given = _given(spec, "clusterCIDRs")
    field = "spec.clusterCIDRs"
    if given is None or given == []:
        state = "missing" if given is None else "empty"
        raise MeshError(f"{where}: {field} is {state}: give the ranges that all pods live in, such as [10.97.0.0/16]")
    if type(given) is not list:
        _bad(where, field, given, f"wanted a list, found {kind_of(given)}: write [{show(given)}]")
    if len(given) > MAX_CLUSTER_CIDRS:
        _bad(where, field, given, f"wanted at most {MAX_CLUSTER_CIDRS}, found {len(given)}")
    for index, text in enumerate(given):
        if type(text) is not str:
            _bad(where, f"{field}[{index}]", text, f"wanted a CIDR such as 10.97.0.0/16, found {kind_of(text)}")
    try:
        return clusters_of(tuple(given))[0]
    except Refusal as refusal:
        problem = refusal.problem
        raise MeshError(f"{where}: spec.{problem.field} {problem.value}: {problem.message}") from None


def _encapsulation(spec: Map, where: str) -> str:
    value = _given(spec, "encapsulation")
    if value is None:
        return "gre"
    if type(value) is not str or value not in ENCAPSULATIONS:
        _bad(where, "spec.encapsulation", value, f"wanted one of {', '.join(ENCAPSULATIONS)}")
    return value


def _integer(spec: Map, field: str, allowed: range, where: str, also: str = "") -> int | None:
    value = _given(spec, field)
    if value is None:
        return None
    want = f"wanted {also}an integer from {allowed.start} to {allowed.stop - 1}"
    if not (isinstance(value, Scalar) and value.kind == "integer" and value.value is not None):
        _bad(where, f"spec.{field}", value, f"{want}, found {kind_of(value)}")
    if value.value not in allowed:
        _bad(where, f"spec.{field}", value, want)
    return value.value


# ---------------------------------------------------------------- the nodes


def _nodes(
    spec: Map, where: str, clusters: tuple[str, ...], last: Mesh | None
) -> tuple[tuple[Node, ...], tuple[Problem, ...]]:
    given = _given(spec, "nodes")
    if given is None:
        given = []
    if type(given) is not list:
        _bad(where, "spec.nodes", given, f"wanted a list, found {kind_of(given)}")
    found: list[tuple[Node, int]] = []
    refused: list[tuple[Problem, int]] = []
    for index, entry in enumerate(given):
        line = entry.line if type(entry) is Map else 0
        node = parse_entry(entry, index, clusters)
        if isinstance(node, Node):
            found.append((node, line))
        else:
            refused.append((node, line))
    return settle_entries(found, refused, last, clusters)


def parse_entry(entry: Any, index: int, clusters: tuple[str, ...]) -> Node | Problem:
    """Return the node that an entry describes, or why it is refused.

    `entry` is a Tree or decoded JSON, the one with number `index` in its list; `clusters` as in validate_node().
    """
    here = f"nodes[{index}]"
    if not isinstance(entry, dict):
        return _misfit(entry, here)
    get = entry.get
    name, address, cidrs, uid, zone = get("name"), get("address"), get("podCIDRs"), get("uid", ""), get("zone", "")
    if (
        type(name) is str
        and type(address) is str
        and type(cidrs) is list
        and 0 < len(cidrs) <= MAX_CIDRS
        and type(uid) is str
        and type(zone) is str
        and entry.keys() <= NODE_KEYS
        and set(map(type, cidrs)) == _ONLY_STR
    ):
        node = validate_node(name, address, tuple(cidrs), uid, zone, clusters)
        # What is no name can't be the subject of a message: the entry's place stands in for it.
        return replace(node, node=here) if isinstance(node, Problem) and node.field == "name" else node
    if nulls := [f for f in ("uid", "zone") if f in entry and _given(entry, f) is None]:
        return parse_entry({field: value for field, value in entry.items() if field not in nulls}, index, clusters)
    return _misfit(entry, here)


def _misfit(entry: Any, here: str) -> Problem:
    """Return why an entry has not the shape of a node's."""
    message = "has not the shape of a node's entry"
    try:
        _check_shape(tree_of(entry, here), here)
    except MeshError as error:
        message = str(error)
    except Refusal as refusal:
        return refusal.problem
    return Problem(Reason.NodeInvalid, message, here)


def _check_shape(entry: Tree, here: str) -> None:
    """Raise Refusal if `entry` has not the shape of a node's."""
    if type(entry) is not Map:
        raise Refusal(Reason.NodeInvalid, here, "entry", show(entry), f"wanted a mapping, found {kind_of(entry)}")
    name = _given(entry, "name")
    who = show(name) if type(name) is str and name else here
    if name is None:
        raise Refusal(Reason.NameMissing, here, "name", "missing", "give the node's name")
    if type(name) is not str:
        raise Refusal(Reason.NameInvalid, here, "name", show(name), _quote(name))
    for key in entry:
        if key not in NODE_KEYS:
            raise Refusal(Reason.UnknownKey, who, show(key), show(entry[key]), f"unknown key: {_nearest(key, _NODE)}")
    address = _given(entry, "address")
    if address is None:
        raise Refusal(
            Reason.AddressMissing, who, "address", "missing", "give the address that its tunnel packets go to"
        )
    if type(address) is not str:
        raise Refusal(Reason.AddressInvalid, who, "address", show(address), _quote(address, "an IP address"))
    for field in ("uid", "zone"):
        value = entry.get(field, "")
        if type(value) is not str:
            raise Refusal(Reason.NodeInvalid, who, field, show(value), _quote(value))
    cidrs = _given(entry, "podCIDRs")
    if cidrs is None or cidrs == []:
        state = "missing" if cidrs is None else "[]"
        raise Refusal(Reason.PodCIDRMissing, who, "podCIDRs", state, "give at least one range out of spec.clusterCIDRs")
    if type(cidrs) is not list:
        fix = f": write [{show(cidrs)}]" if type(cidrs) is str else ""
        raise Refusal(
            Reason.PodCIDRInvalid, who, "podCIDRs", show(cidrs), f"wanted a list, found {kind_of(cidrs)}{fix}"
        )
    if len(cidrs) > MAX_CIDRS:
        message = f"wanted at most {MAX_CIDRS} ranges, found {len(cidrs)}"
        raise Refusal(Reason.PodCIDRInvalid, who, "podCIDRs", show(cidrs), message)
    for index, cidr in enumerate(cidrs):
        if type(cidr) is not str:
            raise Refusal(Reason.PodCIDRInvalid, who, f"podCIDRs[{index}]", show(cidr), _quote(cidr, "a CIDR"))


def _quote(value: Tree, want: str = "a string") -> str:
    hint = ": put it in quotes if it is one" if isinstance(value, Scalar) and want == "a string" else ""
    return f"wanted {want}, found {kind_of(value)}{hint}"
