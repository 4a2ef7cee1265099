"""Properties of the mesh file: no input raises anything but MeshError, and what is read is always consistent."""

from __future__ import annotations

import random
from ipaddress import ip_network

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh.mesh.manifest import dump
from ovsmesh.mesh.types import Mesh, MeshError
from ovsmesh.mesh.yaml_reader import show
from tests.support.meshtext import HEAD, A, B, read, text_of

CALM = settings(suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no finding."""

GOOD = text_of(A, B)
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


@CALM
@given(st.text() | st.binary() | SOUP | SOUP.map(lambda s: HEAD + s) | SOUP.map(lambda s: GOOD + s))
def test_no_text_raises_anything_but_mesh_error(text: str | bytes) -> None:
    try:
        mesh, problems = read(text)
    except MeshError as error:
        assert str(error).isprintable()
    else:
        consistent(mesh)
        assert all(str(p).isprintable() for p in problems)


@CALM
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


@CALM
@given(FILES)
def test_cut_anywhere_never_gives_a_node_that_the_whole_has_not(text: str) -> None:
    whole = {(n.name, n.address, n.pod_cidrs) for n in read(text)[0].nodes}
    for at in range(0, len(text), 3):
        try:
            mesh, _ = read(text[:at])
        except MeshError:
            continue
        assert {(n.name, n.address, n.pod_cidrs) for n in mesh.nodes} <= whole


@CALM
@given(FILES, FILES)
def test_round_trip_and_stability(first: str, second: str) -> None:
    last, _ = read(first)
    mesh, _ = read(second, last)
    consistent(mesh)
    again, problems = read(dump(mesh))
    assert again == mesh and problems == ()
    assert read(dump(mesh), mesh)[0] is mesh


@CALM
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


@CALM
@given(st.text())
def test_show_is_safe(text: str) -> None:
    assert show(text).isprintable() and len(show(text)) <= 80 * 10 + 3


@CALM
@given(st.integers(576, 65535), st.none() | st.integers(0, 2**24 - 1), st.sampled_from(["gre", "vxlan", "geneve"]))
def test_settings_round_trip(mtu: int, key: int | None, encapsulation: str) -> None:
    mesh = Mesh((ip_network("10.97.0.0/16"),), (), encapsulation, key, mtu)
    assert read(dump(mesh)) == (mesh, ())
