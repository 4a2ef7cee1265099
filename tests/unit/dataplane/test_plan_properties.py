"""Properties of mesh and plan together, over meshes of any shape."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ovsmesh.dataplane.desired import dataplane, mac
from ovsmesh.dataplane.plan import Plan, plan
from ovsmesh.dataplane.types import KBR, KINDS, Dataplane, Facts, Link, Observed, Port, Route, Rule, Unmanaged
from ovsmesh.mesh.types import Mesh, Node
from tests.support.meshkit import FACTS, mesh_of, node, seen, want

CALM = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no finding."""

NAMES = st.sampled_from(
    ["a", "b", "web1", "web2", "web3", "UPPER", "rack1.dc1.example.org", "rack2.dc1.example.org", "x_y", "z" * 63]
)


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    names = draw(st.lists(NAMES, min_size=2, max_size=8, unique=True))
    six = draw(st.booleans())
    made = []
    for i, name in enumerate(names, start=1):
        address = f"2001:db8::{i:x}" if six else f"192.0.2.{i}"
        ranges = [f"10.97.{i}.0/24", f"fd00:97:{i:x}::/64", f"10.97.{100 + i}.128/25"]
        chosen = draw(st.lists(st.sampled_from(ranges), min_size=1, max_size=3, unique=True))
        made.append(node(name, address, *chosen, uid=draw(st.sampled_from(["", f"uid-{i}"]))))
    return made


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    how = {
        "encapsulation": draw(st.sampled_from(["gre", "vxlan", "geneve"])),
        "key": draw(st.none() | st.sampled_from([0, 7, 2**24 - 1])),
        "mtu": draw(st.none() | st.sampled_from([1300, 1400, 9000])),
    }
    return mesh_of(*draw(nodes()), **how)


HOSTS = st.builds(
    Facts,
    underlay_mtu=st.none() | st.sampled_from([1500, 9000]),
    datapath_type=st.sampled_from(["system", "netdev"]),
    ipv6=st.booleans(),
    ra_links=st.sampled_from([(), ("eth0",)]),
    forward_drop=st.sampled_from([(), ("iptables",), ("iptables", "ip6tables")]),
)


@st.composite
def wanted(draw: st.DrawFn) -> Dataplane:
    mesh = draw(meshes())
    return dataplane(mesh, draw(st.sampled_from(mesh.nodes)).name, draw(HOSTS))[0]


WORDS = st.sampled_from(["a", "gre-web1", "10.97.1.1", "LOCAL", "peers4"])
STRAY: dict[str, st.SearchStrategy[Any]] = {
    "links": st.builds(Link, WORDS, st.integers(0, 9000), st.booleans(), WORDS, WORDS, st.booleans()),
    "ports": st.builds(Port, WORDS, WORDS, WORDS, WORDS, WORDS, WORDS, st.booleans()),
    "routes": st.builds(
        Route, st.sampled_from(["unicast", "unreachable", "blackhole"]), WORDS, WORDS, st.integers(0, 9)
    ),
    "rules": st.builds(Rule, WORDS),
}
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "routes": st.tuples(WORDS, st.sampled_from([0, 111])),
    "rules": st.tuples(WORDS, WORDS, WORDS),
    "flows": st.sampled_from(["0 ", "100 in_port=LOCAL", "100 dl_dst=x,in_port=LOCAL", "5 in_port=9"]),
}


@st.composite
def mangled(draw: st.DrawFn, of: Dataplane) -> Dataplane:
    """A dataplane from which someone took, to which someone added, in which someone changed anything."""
    changes: dict[str, Any] = {}
    for kind in KINDS:
        if kind in ("bridges", "restore_wait") or not draw(st.booleans()):
            continue
        parts = dict(getattr(of, kind))
        for key in draw(st.lists(st.sampled_from(sorted(parts, key=str)), max_size=4, unique=True)) if parts else ():
            del parts[key]
        value = STRAY.get(kind, WORDS)
        for key in draw(st.lists(st.sampled_from(sorted(parts, key=str)), max_size=2, unique=True)) if parts else ():
            parts[key] = draw(value)
        if kind != "sysctls":
            parts |= draw(st.dictionaries(KEYS.get(kind, WORDS), value, max_size=3))
        changes[kind] = parts
    return replace(of, **changes)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Dataplane, Dataplane]:
    """What is wanted, and what may be there: another mesh's, nothing, or the same, each mangled."""
    want = draw(wanted())
    start = draw(st.sampled_from([want, Dataplane()]) | wanted())
    return want, draw(mangled(start))


def apply(todo: Plan, to: Dataplane) -> Dataplane:
    """Carries out a plan on values, step by step."""
    parts = {f.name: dict(getattr(to, f.name)) for f in fields(to)}
    for step in todo.steps:
        assert step.have == parts[step.kind].get(step.key)
        if step.op == "-":
            del parts[step.kind][step.key]
        else:
            parts[step.kind][step.key] = step.want
    return Dataplane(**parts)


def managed(dataplane: Dataplane, like: Dataplane) -> dict[str, Any]:
    """All but the sysctls that nobody wants: those are unmanaged."""
    parts = {f.name: dict(getattr(dataplane, f.name)) for f in fields(dataplane)}
    parts["sysctls"] = {k: v for k, v in parts["sysctls"].items() if k in like.sysctls}
    return parts


@CALM
@given(pairs())
def test_applying_the_plan_gives_what_was_wanted_and_then_there_is_none(pair: tuple[Dataplane, Dataplane]) -> None:
    want, have = pair
    after = apply(plan(want, seen(have), confirmed=True), have)
    assert managed(after, want) == managed(want, want)
    # dicts keep the order in which parts were added, and that of rules matters
    after = replace(after, rules=want.rules)
    assert plan(want, seen(after)) == Plan()


@CALM
@given(pairs())
def test_the_plan_is_empty_exactly_when_both_are_equal(pair: tuple[Dataplane, Dataplane]) -> None:
    want, have = pair
    have = replace(have, rules={k: have.rules[k] for k in (*want.rules, *have.rules) if k in have.rules})
    assert bool(plan(want, seen(have), confirmed=True)) == (managed(want, want) != managed(have, want))
    assert not plan(want, seen(want))


@CALM
@given(pairs(), st.booleans())
def test_only_what_is_there_is_removed(pair: tuple[Dataplane, Dataplane], confirmed: bool) -> None:
    want, have = pair
    todo = plan(want, seen(have), confirmed)
    for step in (*todo.steps, *todo.held):
        if step.op == "-":
            assert getattr(have, step.kind)[step.key] == step.have
            assert step.key not in getattr(want, step.kind)
        assert step.kind != "sysctls" or step.op != "-"


@CALM
@given(pairs(), st.data())
def test_what_is_unmanaged_is_never_touched(pair: tuple[Dataplane, Dataplane], data: st.DataObject) -> None:
    want, have = pair
    keys = [(kind, key) for kind in KINDS for key in getattr(want, kind) if key not in getattr(have, kind)]
    assume(keys)
    kind, key = data.draw(st.sampled_from(keys))
    unmanaged = Unmanaged(kind, key[0] if kind == "routes" else key, "someone's")
    todo = plan(want, seen(have, unmanaged))
    assert (kind, key) not in [(s.kind, s.key) for s in todo.steps] or (kind == "routes" and key[1] != 111)
    assert unmanaged in [b.unmanaged for b in todo.blocked] or kind == "routes"


@CALM
@given(pairs())
def test_the_guard_never_loses_an_addition_and_only_puts_removals_off(pair: tuple[Dataplane, Dataplane]) -> None:
    want, have = pair
    careful, sure = plan(want, seen(have)), plan(want, seen(have), confirmed=True)
    assert [s for s in careful.steps if s.op != "-"] == [s for s in sure.steps if s.op != "-"]
    assert sorted(map(str, (*careful.steps, *careful.held))) == sorted(map(str, sure.steps))
    assert not sure.held
    assert all(step.op == "-" for step in careful.held)
    assert careful.held_peers or not careful.held


@CALM
@given(pairs())
def test_a_guard_that_is_lifted_later_ends_in_the_same(pair: tuple[Dataplane, Dataplane]) -> None:
    want, have = pair
    between = apply(plan(want, seen(have)), have)
    assert managed(apply(plan(want, seen(between), confirmed=True), between), want) == managed(want, want)


@CALM
@given(pairs(), st.sets(st.sampled_from(KINDS)))
def test_what_can_not_be_seen_is_left_alone(pair: tuple[Dataplane, Dataplane], unknown: set[str]) -> None:
    want, have = pair
    blind = plan(want, Observed(replace(have, **{kind: {} for kind in unknown}), unknown=frozenset(unknown)))
    assert not {step.kind for step in (*blind.steps, *blind.held)} & unknown


@CALM
@given(meshes(), HOSTS, st.randoms(use_true_random=False))
def test_the_order_of_nodes_never_matters(mesh: Mesh, facts: Facts, chance: random.Random) -> None:
    shuffled = list(mesh.nodes)
    chance.shuffle(shuffled)
    for me in mesh.nodes:
        first, problems = dataplane(mesh, me.name, facts)
        second, others = dataplane(replace(mesh, nodes=tuple(shuffled)), me.name, facts)
        assert first == second and set(problems) == set(others)
        assert not plan(first, seen(second))


@CALM
@given(meshes())
def test_two_nodes_agree_on_their_tunnel(mesh: Mesh) -> None:
    views = {n.name: want(mesh, n.name) for n in mesh.nodes}
    for a in mesh.nodes:
        for b in mesh.nodes:
            if a is b:
                continue
            at_a = {p.node: (name, p) for name, p in views[a.name].ports.items()}
            at_b = {p.node: (name, p) for name, p in views[b.name].ports.items()}
            (_, mine), (name, theirs) = at_a[b.name], at_b[a.name]
            assert (mine.type, mine.key, mine.remote, mine.local) == (
                theirs.type,
                theirs.key,
                theirs.local,
                theirs.remote,
            )
            # what A sends to B is what B's kbr0 takes as its own, and B lets it in from A
            sent = [f for f, to in views[a.name].flows.items() if to == f"output:{at_a[b.name][0]}"]
            assert sent == [f"100 dl_dst={views[b.name].links[KBR].mac},in_port=LOCAL"]
            taken = [f for f, to in views[b.name].flows.items() if to == "LOCAL" and f"in_port={name}," in f]
            heard = [c for c in a.pod_cidrs if c.version in {own.version for own in b.pod_cidrs}]
            assert {f.rpartition("=")[2] for f in taken} == {str(source) for source in (*heard, a.address)}
            assert all(f.startswith(f"100 dl_dst={mac(b)},") for f in taken)
            # both ends have the same room
            assert views[a.name].links[KBR].mtu == views[b.name].links[KBR].mtu
            # the filter lets A's tunnel packets in
            assert mine.local in views[b.name].filter_peers


@CALM
@given(meshes())
def test_every_route_leads_somewhere(mesh: Mesh) -> None:
    for me in mesh.nodes:
        view = want(mesh, me.name)
        for (dst, _), route in view.routes.items():
            if route.type == "unicast":
                peer = next(n for n in mesh.nodes if dst in map(str, n.pod_cidrs))
                assert peer is not me
                assert view.neighbours[route.via] == mac(peer)
                assert view.fdb[mac(peer)] in view.links
        # and none to what is its own
        assert not {str(c) for c in me.pod_cidrs} & {dst for dst, _ in view.routes}


def _of(name: str, todo: Plan, mesh: Mesh) -> None:
    """Every step names something of the node `name`."""
    peer = mesh.node(name)
    assert peer is not None
    theirs = {
        mac(peer),
        str(peer.address),
        *map(str, peer.pod_cidrs),
        *(str(c.network_address + 1) for c in peer.pod_cidrs),
    }
    for step in todo.steps:
        text = str(step.key[0] if step.kind == "routes" else step.key)
        value = step.have if step.op == "-" else step.want
        assert (step.kind == "ports" and value.node == name) or any(word in text for word in theirs), step


@CALM
@given(meshes(), st.data())
def test_one_peer_more_or_less_costs_its_own_parts(mesh: Mesh, data: st.DataObject) -> None:
    assume(len(mesh.nodes) > 2)
    me, peer = data.draw(st.permutations(mesh.nodes))[:2]
    smaller = replace(mesh, nodes=tuple(n for n in mesh.nodes if n is not peer))
    facts = replace(FACTS, forward_drop=("iptables",))
    with_it, without = want(mesh, me.name, facts), want(smaller, me.name, facts)
    joins, leaves = plan(with_it, seen(without)), plan(without, seen(with_it))
    assert {step.op for step in joins.steps} == {"+"} and {step.op for step in leaves.steps} == {"-"}
    assert {(s.kind, s.key) for s in joins.steps} == {(s.kind, s.key) for s in leaves.steps}
    assert {step.why for step in leaves.steps} == {f"peer left ({peer.name})"}
    _of(peer.name, joins, mesh)
    _of(peer.name, leaves, mesh)
    assert {"ports", "flows", "fdb"} <= {step.kind for step in joins.steps}


@CALM
@given(pairs())
def test_every_step_is_one_printable_line(pair: tuple[Dataplane, Dataplane]) -> None:
    want, have = pair
    todo = plan(want, seen(have))
    found = str(todo).splitlines()
    assert len(found) == len(todo.steps) + len(todo.held)
    for line in found:
        assert line[:2] in ("+ ", "~ ", "- ", "= ") and line.isprintable() and line == line.strip(), line
