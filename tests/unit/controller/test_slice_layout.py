"""Where members stand in slices, and that it takes the fewest writes to say so."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from operator import attrgetter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.controller.slice_layout import FIRST_PAUSE, LONGEST_PAUSE, Pacer, Write, assign
from ovsmesh.mesh.meshslice import MOST, MeshSlice, parse_slice
from ovsmesh.mesh.types import MeshSettings, Node
from tests.support.meshkit import node

by_name = attrgetter("name")
SETTINGS = MeshSettings((ip_network("10.0.0.0/8"),))


def entry(number: int, uid: str = "", address: str = "") -> Node:
    uid = uid or f"u{number}"
    where = address or f"192.{number // 256}.2.{number % 256}"
    return node(f"n{number:04d}", where, f"10.{number // 256}.{number % 256}.0/24", uid=uid)


def entries(*numbers: int) -> list[Node]:
    return [entry(number) for number in numbers]


def good(found: MeshSlice) -> list[Node]:
    return [entry for entry in found.nodes if isinstance(entry, Node)]


class Store:
    """Holds slices as the API server does, and counts."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, object]] = {}
        self.version = 0
        self.writes = 0

    def slices(self) -> list[MeshSlice]:
        return [parse_slice(found) for found in self.objects.values()]

    def apply(self, writes: Iterable[Write]) -> None:
        for write in writes:
            self.writes += 1
            self.version += 1
            if write.spec is None:
                del self.objects[write.name]
                continue
            assert (write.name in self.objects) == bool(write.resource_version)
            has = {"ovsmesh.io/mesh": "default", "app.kubernetes.io/managed-by": "ovsmesh-controller"}
            meta = {"name": write.name, "resourceVersion": str(self.version), "labels": has}
            self.objects[write.name] = {"metadata": meta, "spec": write.spec}
            self.check()

    def check(self) -> None:
        """What an agent may rely on after any single write: the count names only slices that exist."""
        found = {s.index: s for s in self.slices()}
        if 0 in found:
            assert found.keys() >= set(range(found[0].count))

    def bring(self, wanted: list[Node], to: MeshSettings = SETTINGS, generation: int = 1) -> tuple[Write, ...]:
        writes = assign("default", wanted, to, generation, self.slices())
        self.apply(writes)
        assert assign("default", wanted, to, generation, self.slices()) == ()
        assert sorted(self.members(), key=by_name) == sorted(wanted, key=by_name)
        assert all(len(s.nodes) <= MOST for s in self.slices())
        indexes = sorted(s.index for s in self.slices())
        assert indexes == list(range(len(indexes)))
        assert len(indexes) == 1 or all(s.nodes for s in self.slices() if s.index == indexes[-1])
        counts = {s.index: s.count for s in self.slices()}
        assert counts[0] == len(indexes) == max(counts.values())
        assert len({s.generation for s in self.slices()}) == 1
        return writes

    def places(self) -> dict[str, str]:
        return {e.name: s.name for s in self.slices() for e in good(s)}

    def members(self) -> list[Node]:
        return [e for s in self.slices() for e in good(s)]


def test_nobody_yet_is_one_empty_slice() -> None:
    store = Store()
    (write,) = store.bring([])
    assert write.name == "default-000"


def test_the_first_thousand_take_ten_writes() -> None:
    store = Store()
    assert len(store.bring(entries(*range(1000)))) == 10


def test_one_more_is_one_write_and_nobody_moves() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    before = store.places()
    assert len(store.bring(entries(*range(151)))) == 1
    assert before.items() <= store.places().items()


def test_the_hundred_and_first_takes_a_new_slice_and_the_count() -> None:
    store = Store()
    store.bring(entries(*range(100)))
    assert [w.name for w in store.bring(entries(*range(101)))] == ["default-001", "default-000"]


def test_growth_at_a_thousand_costs_two_writes() -> None:
    store = Store()
    store.bring(entries(*range(1000)))
    assert len(store.bring(entries(*range(1001)))) == 2


def test_a_node_that_leaves_makes_room_for_the_next() -> None:
    store = Store()
    store.bring(entries(*range(200)))
    assert len(store.bring(entries(*range(1, 201)))) == 1
    assert store.places()["n0200"] == "default-000"


def test_the_last_slice_goes_with_its_last_node() -> None:
    store = Store()
    store.bring(entries(*range(250)))
    before = store.places()
    writes = store.bring(entries(*range(200)))
    assert [w.name for w in writes if w.spec] == ["default-001", "default-000"]  # the first one told of three
    assert [w.name for w in writes if not w.spec] == ["default-002"]
    assert store.places().items() <= before.items()
    # One between others stays, as those behind it keep their numbers; it goes once it is the last.
    store.bring(entries(*range(300)))
    store.bring(entries(*range(100), *range(200, 300)))
    assert sorted(store.objects) == ["default-000", "default-001", "default-002"]
    store.bring(entries(*range(100)))
    assert sorted(store.objects) == ["default-000"]
    store.bring([])
    assert sorted(store.objects) == ["default-000"]


def test_a_slice_left_over_from_a_shrink_that_broke_off_is_taken_away() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    (first, gone) = assign("default", entries(*range(100)), SETTINGS, 1, store.slices())
    assert gone.spec is None
    store.apply([first])
    assert [w.name for w in store.bring(entries(*range(100)))] == ["default-001"]


def test_a_node_made_again_takes_the_place_of_the_old_in_one_write() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    new = entry(120, uid="other", address="198.51.100.9")
    writes = store.bring([*entries(*(n for n in range(150) if n != 120)), new])
    assert [w.name for w in writes] == ["default-001"]


def test_new_settings_rewrite_all_under_a_new_generation() -> None:
    store = Store()
    store.bring(entries(*range(250)), generation=3)
    assert len(store.bring(entries(*range(250)), SETTINGS._replace(mtu=1400), generation=4)) == 3
    assert {s.generation for s in store.slices()} == {4}
    # An edit of the Mesh that changes no setting is no write.
    assert store.bring(entries(*range(250)), SETTINGS._replace(mtu=1400), generation=7) == ()


def test_a_mesh_made_again_does_not_turn_generations_back() -> None:
    store = Store()
    store.bring(entries(1), generation=9)
    store.bring(entries(1), SETTINGS._replace(key=5), generation=1)
    assert {s.generation for s in store.slices()} == {10}
    store.bring(entries(1), SETTINGS, generation=1)
    assert {s.generation for s in store.slices()} == {11}


def test_each_slice_deleted_by_hand_is_made_again() -> None:
    for gone in range(4):
        store = Store()
        store.bring(entries(*range(350)))
        before = store.places()
        del store.objects[f"default-{gone:03d}"]
        writes = store.bring(entries(*range(350)))
        assert [w.name for w in writes] == [f"default-{gone:03d}"]
        assert store.places() == before


def test_all_slices_deleted_by_hand() -> None:
    store = Store()
    store.bring(entries(*range(350)))
    store.objects.clear()
    assert len(store.bring(entries(*range(350)))) == 4


def test_edits_by_hand_are_put_right() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    spec = store.objects["default-001"]["spec"]
    for field, value in (("index", 7), ("count", 99), ("meshGeneration", 0), ("mesh", "other"), ("nodes", [])):
        assert isinstance(spec, dict)
        store.objects["default-001"]["spec"] = spec | {field: value}
        writes = store.bring(entries(*range(150)))
        assert "default-001" in [w.name for w in writes] and len(writes) <= 2, field
    assert isinstance(spec, dict)
    for setting in ("mtu", "encapsulation"):
        settings = {key: value for key, value in spec["settings"].items() if key != setting}
        store.objects["default-001"]["spec"] = spec | {"settings": settings}
        assert len(store.bring(entries(*range(150)))) == 1, setting
    store.objects["default-001"]["metadata"] = {"name": "default-001", "resourceVersion": "1"}
    assert len(store.bring(entries(*range(150)))) == 1


def test_a_spoilt_entry_is_put_right_in_its_place() -> None:
    store = Store()
    store.bring(entries(*range(250)))
    before = store.places()
    spec = store.objects["default-000"]["spec"]
    assert isinstance(spec, dict)
    spoilt = [{**entry, "address": "nonsense"} for entry in spec["nodes"]]
    store.objects["default-000"]["spec"] = spec | {"nodes": spoilt}
    assert [w.name for w in store.bring(entries(*range(250)))] == ["default-000"]
    assert store.places() == before


def test_what_cannot_be_ours_is_deleted_last() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    base = store.objects["default-001"]
    for name in ("default-700", "default-999", "default-x", "default-0001"):
        store.objects[name] = {"metadata": {"name": name, "resourceVersion": "7"}, "spec": base["spec"]}
    store.objects["other-000"] = {
        "metadata": {"name": "other-000", "resourceVersion": "8"},
        "spec": {"mesh": "other", "index": 0},
    }
    writes = assign("default", entries(*range(150)), SETTINGS, 1, store.slices())
    assert [(w.name, w.spec) for w in writes] == [
        (name, None) for name in ("default-0001", "default-x", "default-700", "default-999")
    ]


def test_an_invented_count_makes_no_thousand_slices() -> None:
    store = Store()
    store.bring(entries(*range(150)))
    spec = store.objects["default-000"]["spec"]
    assert isinstance(spec, dict)
    store.objects["default-000"]["spec"] = spec | {"count": 9000}
    assert len(store.bring(entries(*range(150)))) == 1


def test_garbage_is_read_and_replaced() -> None:
    store = Store()
    store.bring(entries(*range(3)))
    broken: list[Any] = [None, [], {}, {"nodes": [1, {"name": 4, "podCIDRs": "x"}], "settings": 3, "index": True}]
    for spec in broken:
        store.objects["default-000"]["spec"] = spec
        assert len(store.bring(entries(*range(3)))) == 1


def test_a_burst_of_five_hundred() -> None:
    """At 1,000 members 500 more come within 5 s: fewer than 60 writes, the first at once."""
    store = Store()
    store.bring(entries(*range(1000)))
    store.writes = 0
    pacer, now, first = Pacer(), 100.0, None
    for step in range(500):
        now = 100.0 + step * 0.01
        if pacer.due() <= now:
            store.bring(entries(*range(1001 + step)))
            pacer.wrote(now, 10)
            first = first or now
    store.bring(entries(*range(1500)))
    assert first == 100.0
    assert store.writes < 60, store.writes


def test_pacer_lets_single_changes_pass_at_once() -> None:
    pacer = Pacer()
    for number in range(20):
        now = number * 0.3
        assert pacer.due() <= now
        pacer.wrote(now, 10)


def test_joins_one_after_the_other_never_wait_long() -> None:
    """Each begins when the one before is through, so that they come as fast as they are let."""
    pacer, now = Pacer(), 0.0
    for _ in range(50):
        due = max(now, pacer.due())
        assert due - now <= FIRST_PAUSE + 1e-9
        now = due + 0.01
        pacer.wrote(now, 1)


def test_pacer_slows_down_in_a_burst_and_no_further_than_a_second() -> None:
    pacer, now, waits = Pacer(), 0.0, []
    for _ in range(20):
        due = max(now, pacer.due())
        waits.append(due - now)
        now = due
        pacer.wrote(now, 10)
    assert waits[0] == 0 and abs(waits[1] - FIRST_PAUSE) < 1e-9
    assert waits == sorted(waits) and abs(waits[-1] - LONGEST_PAUSE) < 1e-9


numbers = st.sets(st.integers(0, 400), max_size=330)


@settings(max_examples=60)
@given(st.lists(st.tuples(numbers, st.sampled_from([None, 1400]), st.integers(-1, 4)), min_size=1, max_size=6))
def test_any_history_ends_right_with_few_writes(steps: list[tuple[set[int], int | None, int]]) -> None:
    """Members come and go, the setting changes, slices vanish: all stand once, those who stay stay, few writes."""
    store = Store()
    setting: int | None = None
    for wanted, mtu, gone in steps:
        before = store.places()
        removed = store.objects.pop(f"default-{gone:03d}", None)
        was = {s.name: good(s) for s in store.slices()}
        told = [s.count for s in store.slices()]
        want = entries(*wanted)
        writes = store.bring(want, SETTINGS._replace(mtu=mtu))
        names = {e.name for e in want}
        after = store.places()
        if removed is None:
            assert {k: v for k, v in before.items() if k in names} == {k: after[k] for k in before if k in names}
        if removed is None and setting == mtu and was:
            left = {slice_ for name, slice_ in before.items() if name not in names}
            new = len(names - before.keys())
            spare = sorted((MOST - sum(e.name in names for e in nodes) for n, nodes in was.items() if n not in left))
            free = sum(MOST - sum(e.name in names for e in was[n]) for n in left)
            need, touched = new - free, len(left)
            while need > 0:
                need -= spare.pop() if spare else MOST
                touched += 1
            # the count in slice 0; where the last slices went, each that tells of more than there are
            assert len(writes) <= touched + 1 + sum(count > len(store.objects) for count in told)
        setting = mtu
