"""The conflist as text, what keeps it from being written, and what other networks' files beside it mean."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.dataplane.cni_config import (
    FILE,
    File,
    chained,
    conflist_status,
    judge,
    problems,
    summary,
    without_managed,
)
from ovsmesh.dataplane.desired import dataplane
from ovsmesh.dataplane.plan import plan
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Dataplane, Observed
from tests.support.meshkit import FACTS, first, golden, mesh_of, node, want

OLD = ("0.3.0", "0.3.1", "0.4.0")
DEBIAN = ("0.1.0", "0.2.0", *OLD, "1.0.0")
NEW = (*DEBIAN, "1.1.0")
DIR = "/etc/cni/net.d"


def cni(kept: Any = "", **versions: Any) -> Any:
    """Facts with these plugins' versions (a text: why it can't be used); the others are Debian's."""
    every = {"bridge": DEBIAN, "host_local": DEBIAN, "portmap": DEBIAN, "loopback": DEBIAN} | versions
    return CniFacts(
        DIR,
        tuple(
            CniPlugin(name.replace("_", "-"), () if isinstance(v, str) else v, v if isinstance(v, str) else "")
            for name, v in every.items()
        ),
        kept,
    )


def made(mesh: Any = None, **versions: Any) -> Any:
    facts = dataclasses.replace(FACTS, cni=cni(**versions))
    return want(mesh or first(3, key=7), facts=facts).cni


def conf(**versions: Any) -> Any:
    return json.loads(made(**versions)[FILE])


def reasons(**versions: Any) -> Any:
    return [(p.reason, p.fatal) for p in problems(cni(**versions))]


def test_golden() -> None:
    golden("conflist.json", made()[FILE])


def test_golden_with_plugins_of_the_newest_version() -> None:
    golden("conflist-1.1.json", made(bridge=NEW, host_local=NEW, portmap=NEW)[FILE])


def test_without_cni_dir_there_is_none() -> None:
    assert want(first(3)).cni == {}


def test_a_node_of_one_family_has_one_route() -> None:
    (bridge, _) = json.loads(made(mesh_of(node("web1", "192.0.2.11", "10.97.1.0/24")))[FILE])["plugins"]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.97.1.0/24", "gateway": "10.97.1.1"}]]
    assert bridge["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]


def test_two_ranges_of_a_family_give_a_pod_one_address() -> None:
    mesh = mesh_of(node("web1", "192.0.2.11", "10.97.1.0/24", "10.97.2.0/24", "fd00:97:1::/64"))
    (bridge, _) = json.loads(made(mesh)[FILE])["plugins"]
    assert [[r["gateway"] for r in one] for one in bridge["ipam"]["ranges"]] == [
        ["10.97.1.1", "10.97.2.1"],
        ["fd00:97:1::1"],
    ]


def test_a_kernel_without_ipv6_gets_no_ipv6() -> None:
    facts = dataclasses.replace(FACTS, cni=cni(), ipv6=False)
    assert dict(summary(want(first(3), facts=facts).cni[FILE]))["ranges"] == "10.97.1.0/24"


@pytest.mark.parametrize(
    ("versions", "version", "offered"),
    [
        ({}, "1.0.0", None),
        ({"host_local": OLD}, "0.4.0", None),
        ({"portmap": ("0.3.1", "0.4.0")}, "0.4.0", None),
        ({"bridge": NEW}, "1.0.0", None),
        ({"bridge": NEW, "host_local": NEW, "portmap": NEW}, "1.0.0", ["0.4.0", "1.0.0", "1.1.0"]),
        ({"bridge": ("0.3.0",), "host_local": NEW, "portmap": ("0.3.0",)}, "0.3.0", None),
        ({"bridge": (*DEBIAN, "9.9.9")}, "1.0.0", None),
    ],
)
def test_the_version_is_the_highest_that_all_plugins_have(versions: Any, version: Any, offered: Any) -> None:
    found = conf(**versions)
    assert (found["cniVersion"], found.get("cniVersions")) == (version, offered)
    assert reasons(**versions) == []


def test_without_portmap_there_is_a_conflist_all_the_same() -> None:
    assert [p["type"] for p in conf(portmap="not there")["plugins"]] == ["bridge"]
    assert reasons(portmap="not there") == [("CNIPluginMissing", False)]


def test_a_portmap_that_is_too_old_for_the_others_is_left_out() -> None:
    found = conf(portmap=("0.2.0",))
    assert (found["cniVersion"], len(found["plugins"])) == ("1.0.0", 1)
    assert reasons(portmap=("0.2.0",)) == [("CNIPluginMissing", False)]


def test_loopback_is_the_runtime_s() -> None:
    assert conf(loopback="away") == conf()
    assert reasons(loopback="away") == [("CNIPluginMissing", False)]


@pytest.mark.parametrize("versions", [{"bridge": "away"}, {"host_local": "away"}, {"bridge": ("0.2.0",)}])
def test_without_a_usable_plugin_there_is_none_and_one_that_is_there_stays(versions: Any) -> None:
    assert made(**versions) == {}
    assert made(kept="{…}", **versions) == {FILE: "{…}"}
    ((reason, fatal),) = reasons(**versions)
    assert reason in ("CNIPluginsMissing", "CNIVersionMissing") and fatal


def test_missing_plugins_are_named_with_what_to_do() -> None:
    (problem,) = problems(cni(bridge="not in /opt/cni/bin", host_local="/x did not answer"))
    for text in ("bridge (not in /opt/cni/bin)", "host-local (/x did not answer)", "containernetworking-plugins"):
        assert text in str(problem)


# what is there


def judged(found: Any) -> Any:
    return judge(DIR, {name: f if isinstance(f, File) else File(f.encode()) for name, f in found.items()})


CONFLIST = made()[FILE]
LIST = '{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"}]}'
CONF = '{"cniVersion":"0.3.1","name":"old","type":"bridge"}'


def test_the_managed_file_is_recognized() -> None:
    assert judged({FILE: CONFLIST}) == ({FILE: CONFLIST}, [], [])
    assert judged({}) == ({}, [], [])


def test_an_edited_file_is_still_managed() -> None:
    edited = CONFLIST.replace("1462", "1500").replace("1458", "1500")
    assert judged({FILE: edited})[0] == {FILE: edited}


@pytest.mark.parametrize("text", ["", " \n", "{", "[]", "null", '"x"', "\x00\x01", "[" * 100_000])
def test_what_is_no_network_under_the_managed_name_is_replaced(text: Any) -> None:
    managed, unmanaged, _ = judged({FILE: text})
    assert managed == {FILE: text} and not unmanaged


def test_bytes_that_are_no_text() -> None:
    assert judged({FILE: File(b"\xff\xfe")})[0].keys() == {FILE}


@pytest.mark.parametrize("held", [LIST, "{}", '{"name":7}', File(b"", "is a FIFO, not a regular file")])
def test_another_network_under_the_managed_name_is_named_and_stays(held: Any) -> None:
    managed, (unmanaged,), _ = judged({FILE: held})
    assert not managed and unmanaged.kind == "cni" and unmanaged.key == FILE and unmanaged.blocks
    todo = plan(Dataplane(cni={FILE: CONFLIST}), Observed(Dataplane(), (unmanaged,)))
    assert not todo.steps and "blocked" in str(todo) and f"{DIR}/{FILE}" in str(todo)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("10-flannel.conflist", LIST, "network cbr0 wins"),
        ("05-cilium.conf", CONF, "network old wins"),
        ("00-x.json", CONF, "network old wins"),
        ("00-x.conflist", "{", "is not JSON, and containerd stops at it"),
        ("00-x.conflist", CONF, "names no plugins"),
        ("00-x.conflist", '{"name":"a","plugins":[]}', "names no plugins"),
        ("00-x.conflist", '{"name":"a","plugins":[{"type":7}]}', "names no plugins"),
        ("00-x.conf", LIST, "no plugin type"),
        ("00-x.conf", "", "is empty"),
        ("00-x.conf", File(b"", "is a FIFO, not a regular file"), "can't be read: is a FIFO"),
    ],
)
def test_a_file_before_the_managed_one_wins_and_is_named(name: Any, text: Any, says: Any) -> None:
    _, unmanaged, (problem,) = judged({name: text, FILE: CONFLIST})
    assert not unmanaged
    assert problem.reason == "CNIOverruled" and problem.fatal
    assert says in str(problem) and f"{DIR}/{name}" in str(problem)


def test_files_after_the_managed_one_are_named_in_one_line() -> None:
    _, _, (problem,) = judged({FILE: CONFLIST} | {f"{n}-x.conf": CONF for n in range(87, 99)})
    assert problem.reason == "CNILeftover" and not problem.fatal
    assert "and 9 more" in str(problem) and "not used" in str(problem)


def test_a_file_after_the_managed_one_is_used_while_that_is_missing() -> None:
    _, _, (problem,) = judged({"87-podman-bridge.conflist": LIST})
    assert "used until" in str(problem)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["name", "type", "plugins", "ipam", "ranges"]), inner)
    ),
    max_leaves=12,
)


@given(json_values, st.sampled_from([FILE, "00-a.conf", "00-a.conflist", "99-a.json"]))
def test_whatever_json_lies_there_is_judged_and_told(value: Any, name: Any) -> None:
    text = json.dumps(value)
    managed, unmanaged, said = judged({name: text})
    assert [*managed, *unmanaged, *said]
    for one in managed.values():
        str(plan(Dataplane(cni={FILE: CONFLIST}), Observed(Dataplane(cni={FILE: one}))))


@pytest.mark.parametrize("evil", ["\\ud800", "\\u001b[2J", "a\\nb", "x" * 10_000])
def test_text_of_others_steers_no_terminal_and_break_no_log(evil: Any) -> None:
    odd = CONFLIST.replace('"1.0.0"', f'"{evil}"').replace('"portmap"', f'"{evil}"').replace("10.97.1.0/24", evil)
    lines = [*map(str, judged({"00-x.conflist": LIST.replace("cbr0", evil)})[2])]
    lines += [*map(str, judged({FILE: LIST.replace("cbr0", evil)})[1])]
    lines.append(str(plan(Dataplane(cni={FILE: CONFLIST}), Observed(Dataplane(cni={FILE: odd})))))
    lines.append(str(conflist_status(cni(), {FILE: CONFLIST}, {FILE: odd})))
    for line in lines:
        assert line.isprintable() and len(line.encode()) < 1000, line


@given(st.binary(max_size=64))
def test_whatever_bytes_lie_there_are_judged(data: Any) -> None:
    managed, unmanaged, _ = judged({FILE: File(data)})
    assert bool(managed) != bool(unmanaged)


# plugins of others in the conflist

ISTIO = {"type": "istio-cni", "kubernetes": {"kubeconfig": "/etc/cni/net.d/ZZZ-istio-cni-kubeconfig"}, "level": 1.5}
TUNING = {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}
CILIUM = {"type": "cilium-cni", "chaining-mode": "generic-veth"}
OTHERS = [ISTIO, TUNING, CILIUM, {"type": "bandwidth", "capabilities": {"bandwidth": True}}, {"type": "portmap"}]
OURS = json.loads(CONFLIST)["plugins"]


def with_plugins(*plugins: Any, **head: Any) -> str:
    """As jq or Go write it: another order of keys, no spaces."""
    return json.dumps({**json.loads(CONFLIST), **head, "plugins": plugins}, sort_keys=True, separators=(",", ":"))


def again(text: str, **versions: Any) -> str:
    """What the agent wants where this is on disk."""
    facts = dataclasses.replace(FACTS, cni=cni(**versions)._replace(chained=chained(text)))
    return str(want(first(3, key=7), facts=facts).cni[FILE])


def steps(text: str) -> list[str]:
    managed, unmanaged, _ = judged({FILE: text})
    assert not unmanaged
    return list(plan(Dataplane(cni={FILE: again(text)}), Observed(Dataplane(cni=managed))).lines())


@pytest.mark.parametrize(
    "plugins",
    [
        [*OURS, ISTIO],
        [*OURS, *OTHERS],
        [OURS[0], TUNING, OURS[1], ISTIO],
        [TUNING, *OURS],
        [TUNING, OURS[0], CILIUM, OURS[1], ISTIO, TUNING],
    ],
)
def test_what_others_put_into_the_conflist_stays_where_it_is(plugins: Any) -> None:
    text = with_plugins(*plugins, disableCheck=True)
    assert steps(text) == []
    assert json.loads(again(text)) == json.loads(text)


@pytest.mark.parametrize(
    ("plugins", "right"),
    [
        ([ISTIO], [*OURS, ISTIO]),
        ([{**OURS[0], "mtu": 1500}, OURS[1], ISTIO], [*OURS, ISTIO]),
        ([{**OURS[0], "bridge": "cni0"}, ISTIO, TUNING], [*OURS, ISTIO, TUNING]),
        ([OURS[0], ISTIO], [*OURS, ISTIO]),
        ([ISTIO, {**OURS[1], "snat": False}, OURS[0], TUNING], [*OURS, ISTIO, TUNING]),
        ([OURS[0], TUNING, {"type": "portmap"}, ISTIO], [OURS[0], TUNING, OURS[1], ISTIO]),
        ([*OURS, 7, {"no": "type"}, ISTIO, OURS[0]], [*OURS, ISTIO]),
    ],
)
def test_the_managed_plugins_are_kept_right_around_them(plugins: Any, right: Any) -> None:
    text = with_plugins(*plugins)
    assert json.loads(again(text))["plugins"] == right
    assert steps(again(text)) == []


def test_a_version_that_others_write_is_corrected_and_a_plugin_that_they_repeat_is_theirs() -> None:
    """Both from reports about istio-cni: it wrote 0.3.1, and itself once more at each start."""
    text = with_plugins(*OURS, ISTIO, ISTIO, cniVersion="0.3.1")
    assert steps(text) == [f"~ cni {FILE} version 0.3.1 → 1.0.0"]
    assert json.loads(again(text))["plugins"] == [*OURS, ISTIO, ISTIO]


def test_an_mtu_that_changes_keeps_them() -> None:
    text = with_plugins(*OURS, ISTIO).replace("1458", "1400")
    assert steps(text) == [f"~ cni {FILE} mtu 1400 → 1458"]
    assert json.loads(again(text))["plugins"] == [*OURS, ISTIO]


def test_without_portmap_they_stay_too() -> None:
    assert json.loads(again(with_plugins(*OURS, ISTIO, TUNING), portmap="away"))["plugins"] == [OURS[0], ISTIO, TUNING]


def test_a_change_of_the_managed_part_alone_is_no_change_of_theirs() -> None:
    """Else it would not be counted as drift."""
    texts = [with_plugins(*OURS, ISTIO), with_plugins(ISTIO), with_plugins({**OURS[0], "mtu": 9}, OURS[1], ISTIO)]
    assert len({chained(text) for text in texts}) == 1
    assert chained(CONFLIST) == chained("") == chained("{") == chained(LIST)


def test_their_versions_count_and_a_plugin_that_is_missing_is_named() -> None:
    text = with_plugins(*OURS, ISTIO)
    named = "istio-cni, which someone else has put into 10-ovsmesh.conflist"
    for plugin, version, says in (
        (CniPlugin("istio-cni", DEBIAN), "1.0.0", ""),
        (CniPlugin("istio-cni", OLD), "0.4.0", ""),
        (CniPlugin("istio-cni", ("0.1.0",)), "1.0.0", f"{named}: supports none"),
        (CniPlugin("istio-cni", (), "not in /opt/cni/bin"), "1.0.0", f"{named}: not in /opt/cni/bin; no pod starts"),
    ):
        found = cni()._replace(chained=chained(text)._replace(plugins=(plugin,)))
        facts = dataclasses.replace(FACTS, cni=found)
        assert json.loads(want(first(3, key=7), facts=facts).cni[FILE])["cniVersion"] == version
        assert [says in str(p) and not p.fatal for p in problems(found)] == ([True] if says else [])


def test_the_status_and_the_plan_show_the_whole_chain() -> None:
    full = {FILE: again(with_plugins(*OURS, ISTIO))}
    assert str(conflist_status(cni(), full, full)) == (
        f"{DIR}/{FILE} (written; version 1.0.0; bridge, host-local, portmap, istio-cni)"
    )


def test_cleanup_takes_the_managed_plugins_only() -> None:
    assert without_managed(CONFLIST) == without_managed("{") == without_managed("") == ""
    left = without_managed(with_plugins(TUNING, *OURS, ISTIO))
    assert json.loads(left)["plugins"] == [TUNING, ISTIO]
    managed, (unmanaged,), said = judged({FILE: left})
    assert not managed and not said and not unmanaged.blocks
    assert "holds nothing of ovsmesh, only tuning, istio-cni" in unmanaged.detail and "owner" in unmanaged.detail
    # and the next agent makes it whole again
    assert json.loads(again(left))["plugins"] == [*OURS, TUNING, ISTIO]


@given(st.lists(st.sampled_from([*OURS, *OTHERS, {**OURS[0], "mtu": 9}, {"type": "host-device"}]), max_size=7))
def test_whatever_is_in_the_chain_theirs_keep_their_order_and_ours_are_right(plugins: Any) -> None:
    found = json.loads(again(with_plugins(*plugins)))["plugins"]
    portmaps = [p for p in found if p["type"] == "portmap"]
    assert [p for p in found if p["type"] == "bridge"] == OURS[:1] and portmaps[0] == OURS[1]
    assert theirs_of(found) == theirs_of(plugins)
    assert steps(again(with_plugins(*plugins))) == []


def theirs_of(plugins: Any) -> Any:
    """All but the bridge plugin and the first portmap."""
    portmap = next((n for n, p in enumerate(plugins) if p["type"] == "portmap"), None)
    return [p for n, p in enumerate(plugins) if p["type"] != "bridge" and n != portmap]


@pytest.mark.parametrize("odd", ['{"a": 1e999}', '{"a": NaN}', "[" * 60 + "]" * 60, "[" * 400 + "]" * 400])
def test_a_file_that_no_runtime_can_read_is_replaced(odd: str) -> None:
    text = with_plugins(*OURS, {"type": "x", "odd": 4711}).replace("4711", odd)
    managed, unmanaged, _ = judged({FILE: text})
    assert managed == {FILE: text} and not unmanaged
    assert again(text) == CONFLIST


MULTUS = {"name": "multus-cni-network", "type": "multus", "cniVersion": "0.3.1"}


@pytest.mark.parametrize(
    "conf",
    [
        {**MULTUS, "clusterNetwork": f"/host/etc/cni/net.d/{FILE}"},
        {**MULTUS, "type": "multus-shim", "clusterNetwork": "ovsmesh"},
        {**MULTUS, "delegates": [json.loads(CONFLIST)]},
    ],
)
def test_a_wrapper_that_delegates_to_the_conflist_is_no_problem(conf: Any) -> None:
    assert judged({"00-multus.conf": json.dumps(conf), FILE: CONFLIST})[2] == []
    wrapped = json.dumps({"name": "multus-cni-network", "cniVersion": "1.0.0", "plugins": [conf]})
    assert judged({"00-multus.conflist": wrapped, FILE: CONFLIST})[2] == []


def test_cilium_chained_to_the_conflist_is_no_problem_and_an_old_copy_is() -> None:
    assert judged({"05-cilium.conflist": with_plugins(*OURS, CILIUM), FILE: CONFLIST})[2] == []
    stale = with_plugins(*OURS, CILIUM).replace("1458", "1500")
    for copy in (stale, json.dumps({**MULTUS, "delegates": [json.loads(stale)]})):
        (problem,) = judged({"05-x.conflist" if copy is stale else "05-x.conf": copy, FILE: CONFLIST})[2]
        assert problem.reason == "CNIOverruled" and "old copy: mtu 1500, not 1458" in str(problem)


def test_a_wrapper_that_delegates_elsewhere_wins_and_is_named() -> None:
    conf = {**MULTUS, "clusterNetwork": "/host/etc/cni/net.d/10-flannel.conflist"}
    (problem,) = judged({"00-multus.conf": json.dumps(conf), FILE: CONFLIST})[2]
    assert problem.reason == "CNIOverruled" and "multus-cni-network wins" in str(problem)


@pytest.mark.parametrize("name", [f"{FILE}.cilium_bak", f"{FILE}.old", "10-flannel.conflist.cilium_bak"])
def test_a_file_that_was_renamed_is_named(name: str) -> None:
    (problem,) = judged({name: LIST, FILE: CONFLIST})[2]
    assert problem.reason == "CNIRenamed" and not problem.fatal and name in str(problem) and "Cilium" in str(problem)


# texts


def test_a_plan_tells_what_is_written_and_what_differs() -> None:
    has = Observed(Dataplane())
    (line,) = plan(Dataplane(cni={FILE: CONFLIST}), has).lines()
    assert line == (
        f"+ cni {FILE} network ovsmesh version 1.0.0 mtu 1458 ranges 10.97.1.0/24,fd00:97:1::/64 "
        "plugins bridge,host-local,portmap"
    )
    edited = CONFLIST.replace("1458", "1500")
    assert str(plan(Dataplane(cni={FILE: CONFLIST}), Observed(Dataplane(cni={FILE: edited})))) == (
        f"~ cni {FILE} mtu 1500 → 1458"
    )
    odd = CONFLIST.replace('"hairpinMode": true', '"hairpinMode": false')
    differs = str(plan(Dataplane(cni={FILE: CONFLIST}), Observed(Dataplane(cni={FILE: odd}))))
    assert differs == f"~ cni {FILE} text differs"


def test_the_conflist_status() -> None:
    full = {FILE: CONFLIST}
    assert str(conflist_status(cni(), full, full)) == (
        f"{DIR}/{FILE} (written; version 1.0.0; bridge, host-local, portmap)"
    )
    assert conflist_status(cni(), full, {}).state == "waits"
    assert conflist_status(cni(), full, {FILE: "{}"}).state == "differs"
    assert str(conflist_status(cni(bridge="away"), {}, {})) == f"{DIR}/{FILE} (none)"
    assert conflist_status(cni(kept=CONFLIST, bridge="away"), full, full).state == "kept"
    assert made(kept=CONFLIST, bridge="away") == full


def test_facts_are_compared_by_value() -> None:
    assert cni() == cni() and cni() != cni(bridge=OLD)
    assert dataplane(first(2), "web1", dataclasses.replace(FACTS, cni=cni()))[1] == ()
