"""Service monitors, alert rules and dashboard: promtool accepts them, alerts fire when they should, metrics exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh.agent.metrics import METRICS as AGENT_METRICS
from ovsmesh.agent.metrics import PEER_STATES
from ovsmesh.cli.main import cli
from ovsmesh.controller.http import METRICS as CONTROLLER_METRICS
from ovsmesh.metrics import Metric
from tests.kube.test_manifests import AGENT, CONTROLLER, WORKLOADS, container
from tests.support import built
from tests.support.kubekit import MANIFESTS
from tests.support.needs import absent

FOLDER = MANIFESTS / "monitoring"
MONITORS = list(yaml.safe_load_all((FOLDER / "monitors.yaml").read_text()))
RULES = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("rules", "rules-controller")}
ALERTS = {
    rule["alert"]: rule
    for manifest in RULES.values()
    for group in manifest["spec"]["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
DASHBOARD: Any = json.loads((FOLDER / "dashboard.json").read_text())


# As files


def expressions() -> Iterator[str]:
    for manifest in RULES.values():
        yield from (rule["expr"] for group in manifest["spec"]["groups"] for rule in group["rules"])
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query")


def series_of(metric: Metric[Any]) -> Iterator[str]:
    if metric.kind == "histogram":
        yield from (f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
    else:
        yield metric.name + ("_total" if metric.kind == "counter" else "")


def test_every_metric_of_rules_and_dashboard_is_served() -> None:
    every: list[Metric[Any]] = [*AGENT_METRICS, *CONTROLLER_METRICS]
    served = {name for metric in every for name in series_of(metric)}
    named = {name for text in expressions() for name in re.findall(r"(?<![\w:])ovsmesh_\w+", text)}
    assert len(named) > 20 and not named - served
    recorded = {r["record"] for m in RULES.values() for g in m["spec"]["groups"] for r in g["rules"] if "record" in r}
    used = {name for text in expressions() for name in re.findall(r"ovsmesh:[\w:]+", text)}
    assert used == recorded


def test_every_state_that_a_rule_names_is_one() -> None:
    named = {
        state
        for text in expressions()
        for word in re.findall(r'state!?=~?"([^"]+)"', text)
        for state in word.split("|")
    }
    assert named and not named - set(map(str, PEER_STATES))


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_is_wrong_and_what_to_run(name: str) -> None:
    notes = ALERTS[name]["annotations"]
    assert len(notes["summary"]) < 120 and ALERTS[name]["labels"]["severity"] in ("warning", "critical")
    commands = re.findall(r"`ovsmesh (\w+)", " ".join(notes["description"].split()))
    assert {"check", "trace"} & set(commands) and not set(commands) - cli.commands.keys()


def test_the_document_names_every_alert_of_the_agents() -> None:
    document = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    agents = [name for name in ALERTS if "Controller" not in name]
    assert len(agents) > 10 and not [name for name in agents if f"`{name}`" not in document]


def test_the_monitors_find_agent_and_controller() -> None:
    services = {each["metadata"]["name"]: each for each in MONITORS if each["kind"] == "Service"}
    monitors = {each["metadata"]["name"]: each for each in MONITORS if each["kind"] == "ServiceMonitor"}
    for name in (AGENT, CONTROLLER):
        labels = WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]
        (port,) = services[name]["spec"]["ports"]
        assert services[name]["spec"]["selector"].items() <= labels.items()
        assert port["targetPort"] == container(name)["ports"][0]["name"]
        assert port["port"] == container(name)["ports"][0]["containerPort"]
        selector = monitors[name]["spec"]["selector"]["matchLabels"]
        assert selector.items() <= services[name]["metadata"]["labels"].items()
        assert monitors[name]["spec"]["endpoints"][0]["port"] == port["name"]


def test_the_dashboard_stands_by_itself() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels if panel["type"] != "row")


# By promtool


def plain(name: str) -> str:
    """The rules for a Prometheus without the Operator, as the head of the file says to make them."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines(keepends=True)
    return "".join(line[2:] for line in lines if line.startswith("  "))


def promtool(*arguments: str, folder: Path) -> str:
    program = shutil.which("promtool") or absent("promtool", "prometheus")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.kube
def test_kustomize_makes_the_monitoring(programs: None) -> None:
    argv = [str(built.control_plane()["kubectl"]), "kustomize", str(FOLDER)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert len(made) == len(MONITORS) + len(RULES) + 1
    assert all(each["metadata"]["namespace"] == "ovsmesh" for each in made.values())
    for name in RULES:
        kind = ("PrometheusRule", RULES[name]["metadata"]["name"])
        assert made[kind]["spec"] == RULES[name]["spec"]
    config = made["ConfigMap", "ovsmesh-dashboard"]
    assert json.loads(config["data"]["ovsmesh.json"]) == DASHBOARD
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    for monitor in MONITORS:
        labels = made[monitor["kind"], monitor["metadata"]["name"]]["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "ovsmesh"


@pytest.mark.kube
@pytest.mark.parametrize("name", RULES)
def test_promtool_accepts_the_rules(name: str, tmp_path: Path) -> None:
    assert yaml.safe_load(plain(name)) == RULES[name]["spec"]
    (tmp_path / "rules.yml").write_text(plain(name))
    assert "SUCCESS" in promtool("check", "rules", "rules.yml", folder=tmp_path)


@pytest.mark.kube
def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    rules = [{"record": f"panel:{at}", "expr": text.replace("$instance", ".*")} for at, text in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", "rules.yml", folder=tmp_path)


NODES = ("web1", "web2", "web3", "web4")
Series = dict[str, str | None]


def agent(node: str, name: str, **labels: str) -> str:
    text = {"job": "ovsmesh-agent", "instance": f"{node}:9474", "node": node, **labels}
    return f"{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in text.items())}}}"


def lost(node: str, *peers: str, state: str = "unreachable") -> Series:
    """What the agent of `node` says while it does not reach these peers."""
    found: Series = {agent(node, "ovsmesh_peer_unreachable", peer=peer): "1x30" for peer in peers}
    return found | {agent(node, "ovsmesh_peers", state=state): f"{len(peers)}x30"}


def well() -> Series:
    """Four nodes and two controllers for half an hour in which nothing is wrong."""
    found: Series = {}
    for node in NODES:
        found |= {
            agent(node, "up"): "1x30",
            agent(node, "ovsmesh_peers", state="ok"): "3x30",
            **{agent(node, "ovsmesh_peers", state=state): "0x30"
               for state in ("unreachable", "not forwarded", "lossy", "small packets only", "unknown")},
            **{agent(node, "ovsmesh_peer_unreachable", peer=peer): "0x30" for peer in NODES if peer != node},
            agent(node, "ovsmesh_peers_wanted"): "3x30",
            agent(node, "ovsmesh_converged"): "1x30",
            agent(node, "ovsmesh_held_removals"): "0x30",
            agent(node, "ovsmesh_mesh_refused_nodes"): "0x30",
            agent(node, "ovsmesh_mesh_current"): "1x30",
            agent(node, "ovsmesh_mesh_info", digest="7c1f00d0beef"): "1x30",
            agent(node, "ovsmesh_last_success_timestamp_seconds"): "0+60x30",
            **{agent(node, "ovsmesh_drift_total", kind=kind): "0+1x30" for kind in ("routes", "fdb")},
        }  # fmt: skip
    for node, leads in (("web1", 1), ("web2", 0)):
        controller = f'job="ovsmesh-controller",instance="{node}:9475"'
        found |= {
            f"up{{{controller}}}": "1x30",
            f"ovsmesh_controller_leader{{{controller}}}": f"{leads}x30",
            f"ovsmesh_controller_errors_total{{{controller}}}": "3x30",
            f"ovsmesh_controller_refused_nodes{{{controller}}}": "0x30",
        }
    return found


LEADER = 'job="ovsmesh-controller",instance="web1:9475"'
ALL = {"job": "ovsmesh-agent"}


def at(node: str, **labels: str) -> dict[str, str]:
    return {"job": "ovsmesh-agent", "instance": f"{node}:9474", "node": node, **labels}


CASES: Mapping[str, tuple[Series, Mapping[str, dict[str, str]]]] = {
    "all is well": ({}, {}),
    "one bad pair": (
        lost("web1", "web2") | lost("web2", "web1"),
        {"OvsmeshPeerUnreachable": at("web1", peer="web2"), "OvsmeshPeerUnreachable 2": at("web2", peer="web1")},
    ),
    "one direction is not forwarded": (
        lost("web1", "web2", state="not forwarded"),
        {"OvsmeshPeerUnreachable": at("web1", peer="web2")},
    ),
    "a host is down": (
        {key: None for key in well() if 'node="web4"' in key}
        | {agent("web4", "up"): "0x30"}
        | lost("web1", "web4") | lost("web2", "web4") | lost("web3", "web4"),
        {"OvsmeshNodeNotReached": ALL | {"peer": "web4"}, "OvsmeshAgentAbsent": at("web4")},
    ),
    "a host is cut off": (
        lost("web4", "web1", "web2", "web3") | lost("web1", "web4") | lost("web2", "web4") | lost("web3", "web4"),
        {"OvsmeshNodeNotReached": ALL | {"peer": "web4"}, "OvsmeshNodeIsolated": at("web4")},
    ),
    "small packets only": (
        {agent("web2", "ovsmesh_peers", state="small packets only"): "1x30"}, {"OvsmeshPathMTU": at("web2")}
    ),
    "packets are lost": ({agent("web2", "ovsmesh_peers", state="lossy"): "1x30"}, {"OvsmeshPacketsLost": at("web2")}),
    "no agent is scraped": (
        {key: None for key in well() if "ovsmesh-agent" in key}, {"OvsmeshAgentsAbsent": ALL}
    ),
    "not converged": ({agent("web1", "ovsmesh_converged"): "0x30"}, {"OvsmeshNotConverged": at("web1")}),
    "a removal is held": (
        {agent("web1", "ovsmesh_converged"): "0x30", agent("web1", "ovsmesh_held_removals"): "3x30"},
        {"OvsmeshHeldRemoval": at("web1")},
    ),
    "the switch can't be read": (
        {agent("web1", "ovsmesh_peers", state="unknown"): "3x30"}, {"OvsmeshStateUnknown": at("web1")}
    ),
    "reconciles fail": (
        {agent("web1", "ovsmesh_last_success_timestamp_seconds"): "60x30"}, {"OvsmeshReconcileFails": at("web1")}
    ),
    "drift": ({agent("web1", "ovsmesh_drift_total", kind="fdb"): "0+10x30"}, {"OvsmeshDriftStorm": at("web1")}),
    "a node is refused": ({agent("web1", "ovsmesh_mesh_refused_nodes"): "1x30"}, {"OvsmeshNodesRefused": at("web1")}),
    "the last good mesh": ({agent("web1", "ovsmesh_mesh_current"): "0x30"}, {"OvsmeshMeshNotCurrent": at("web1")}),
    "another mesh": (
        {agent("web1", "ovsmesh_mesh_info", digest="7c1f00d0beef"): None,
         agent("web1", "ovsmesh_mesh_info", digest="0123456789ab"): "1x30"},
        {"OvsmeshMeshDiffers": ALL},
    ),
    "no controller": (
        {key: None for key in well() if "ovsmesh-controller" in key},
        {"OvsmeshControllerAbsent": {}},
    ),
    "no leader": (
        {f"ovsmesh_controller_leader{{{LEADER}}}": "0x30"}, {"OvsmeshControllerLeader": {"job": "ovsmesh-controller"}}
    ),
    "writes of the controller fail": (
        {f"ovsmesh_controller_errors_total{{{LEADER}}}": "0+2x30"},
        {"OvsmeshControllerWritesFail": {"job": "ovsmesh-controller", "instance": "web1:9475"}},
    ),
    "the controller refuses a node": (
        {f"ovsmesh_controller_refused_nodes{{{LEADER}}}": "2x30"},
        {"OvsmeshNodesRefusedByController": {"job": "ovsmesh-controller"}},
    ),
    "a node is cut off": (
        {f"ovsmesh_controller_isolated_nodes{{{LEADER}}}": "1x30"},
        {"OvsmeshNodeIsolated": {"job": "ovsmesh-controller"}},
    ),
    "the mesh falls apart": (
        {f"ovsmesh_controller_mesh_split{{{LEADER}}}": "1x30"}, {"OvsmeshMeshSplit": {"job": "ovsmesh-controller"}}
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    assert {name.split()[0] for _, fires in CASES.values() for name in fires} == ALERTS.keys()


@pytest.mark.kube
def test_each_alert_fires_on_its_fault_and_on_no_other(tmp_path: Path) -> None:
    for name in RULES:
        # what they say is another test's
        rules = yaml.safe_load(plain(name))
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(rules))
    tests = []
    for case, (changed, fires) in CASES.items():
        series = {key: values for key, values in (well() | changed).items() if values is not None}
        expected: dict[str, list[Any]] = {name: [] for name in ALERTS}
        for name, labels in fires.items():
            alert = name.split()[0]
            expected[alert].append({"exp_labels": labels | ALERTS[alert]["labels"]})
        tests.append(
            {
                "name": case,
                "interval": "1m",
                "input_series": [{"series": key, "values": values} for key, values in series.items()],
                "alert_rule_test": [
                    {"eval_time": "25m", "alertname": name, "exp_alerts": found} for name, found in expected.items()
                ],
            }
        )
    text = yaml.safe_dump(
        {"rule_files": [f"{name}.yml" for name in RULES], "evaluation_interval": "1m", "tests": tests}
    )
    (tmp_path / "tests.yml").write_text(text)
    promtool("test", "rules", "tests.yml", folder=tmp_path)


@pytest.mark.kube
@pytest.mark.parametrize(("label", "name"), [(True, "web1"), (False, "web1:9474")])
def test_an_alert_names_the_node_and_the_command(tmp_path: Path, label: bool, name: str) -> None:
    (tmp_path / "rules.yml").write_text(plain("rules"))
    labels = at("web1", peer="web2")
    if not label:
        del labels["node"]
    said = ALERTS["OvsmeshPeerUnreachable"]["annotations"]["description"].replace("{{ $labels.peer }}", "web2")
    expected = {
        "exp_labels": labels | {"severity": "warning"},
        "exp_annotations": {
            "summary": f"{name} does not reach web2",
            "description": said.replace("{{ or $labels.node $labels.instance }}", name),
        },
    }
    assert f"Run `ovsmesh trace {name} web2`" in expected["exp_annotations"]["description"]
    series = "ovsmesh_peer_unreachable{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": "1x10"}],
        "alert_rule_test": [{"eval_time": "5m", "alertname": "OvsmeshPeerUnreachable", "exp_alerts": [expected]}],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
    promtool("test", "rules", "tests.yml", folder=tmp_path)
