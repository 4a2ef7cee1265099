"""The manifests: one rendered file, applied to a real API server, and what each workload must have.

Imports the command line, to hold the arguments of the containers to it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh import __version__
from ovsmesh.cli.main import cli
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, MANIFESTS, eventually
from tests.support.needs import needs
from tests.support.render import HEAD, RENDERED, render

Object = dict[str, Any]
OBJECTS: list[Object] = list(yaml.safe_load_all(RENDERED.read_text()))
WORKLOADS = {o["metadata"]["name"]: o for o in OBJECTS if o["kind"] in ("DaemonSet", "Deployment")}
AGENT, CONTROLLER, OVS = "ovsmesh-agent", "ovsmesh-controller", "ovsmesh-ovs"
CRD, CRDS = "CustomResourceDefinition", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def pod(name: str) -> Object:
    return dict(WORKLOADS[name]["spec"]["template"]["spec"])


def container(name: str) -> Object:
    (only,) = pod(name)["containers"]
    return dict(only)


def of_kind(kind: str) -> list[Object]:
    return [o for o in OBJECTS if o["kind"] == kind]


# ---------------------------------------------------------------- as files


@pytest.mark.kube
def test_rendered_file_is_what_kustomize_makes(programs: None) -> None:
    made = list(yaml.safe_load_all(render()))
    assert made == OBJECTS, "run `python tests/kube/render.py`"
    assert RENDERED.read_text().startswith(HEAD)


def test_names_labels_and_version() -> None:
    for thing in OBJECTS:
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "ovsmesh"
        assert labels["app.kubernetes.io/version"] == __version__
        assert thing["metadata"].get("namespace", "ovsmesh") == "ovsmesh"
    for name, workload in WORKLOADS.items():
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels["app.kubernetes.io/component"] == name.removeprefix("ovsmesh-")
        assert container(name)["image"].endswith(f":{__version__}")


def test_every_workload_is_on_the_hosts_network_and_stays() -> None:
    assert sorted(WORKLOADS) == [AGENT, CONTROLLER, OVS]
    accounts = {o["metadata"]["name"] for o in of_kind("ServiceAccount")}
    for name in WORKLOADS:
        spec = pod(name)
        assert spec["hostNetwork"] and spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
        assert spec["serviceAccountName"] == name and name in accounts
        assert set(container(name)["resources"]["requests"]) == {"cpu", "memory"}
        assert "livenessProbe" in container(name)
        if WORKLOADS[name]["kind"] == "DaemonSet":
            assert spec["priorityClassName"] == "system-node-critical"
            assert spec["tolerations"] == [{"operator": "Exists"}]
    assert WORKLOADS[OVS]["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert pod(OVS)["automountServiceAccountToken"] is False


def test_controller_is_two_and_one_may_go() -> None:
    spec = WORKLOADS[CONTROLLER]["spec"]
    assert spec["replicas"] == 2 and spec["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert pod(CONTROLLER)["priorityClassName"] == "system-cluster-critical"
    (budget,) = of_kind("PodDisruptionBudget")
    assert budget["spec"] == {"maxUnavailable": 1, "selector": spec["selector"]}
    assert container(CONTROLLER)["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", [AGENT, CONTROLLER])
def test_arguments_ports_and_probes_fit_the_command_line(name: str) -> None:
    box = container(name)
    command, *arguments = box["args"]
    found = cli.commands.get(command)
    assert found is not None, f"no command ovsmesh {command}"
    context = found.make_context(command, list(arguments), resilient_parsing=True)
    port = box["ports"][0]["containerPort"]
    assert context.params["listen"] == f"0.0.0.0:{port}"
    known = {parameter.name for parameter in found.params}
    for variable in box.get("env", ()):
        option = variable["name"].removeprefix(f"OVSMESH_{command.upper()}_").lower()
        assert option in known
    for probe in ("livenessProbe", "readinessProbe"):
        assert box[probe]["httpGet"]["port"] == box["ports"][0]["name"]
    notes = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert (notes["prometheus.io/scrape"], notes["prometheus.io/port"]) == ("true", str(port))


def test_sample_rule_is_about_our_condition() -> None:
    rule = yaml.safe_load((MANIFESTS / "samples/nodereadinessrule.yaml").read_text())
    assert (rule["apiVersion"], rule["kind"]) == ("readiness.node.x-k8s.io/v1alpha1", "NodeReadinessRule")
    assert rule["spec"]["conditions"] == [{"type": "ovsmesh.io/MeshReady", "requiredStatus": "True"}]
    tolerated = {toleration["key"] for toleration in pod(CONTROLLER)["tolerations"]}
    assert {rule["spec"]["taint"]["key"], "node.ovsmesh.io/agent-not-ready"} <= tolerated


def test_agent_sees_what_the_node_s_runtime_reads() -> None:
    box, spec = container(AGENT), pod(AGENT)
    options = dict(zip(box["args"][1::2], box["args"][2::2], strict=True))
    mounts = {mount["mountPath"]: mount for mount in box["volumeMounts"]}
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    for option, path in (("--cni-dir", "/etc/cni/net.d"), ("--cni-bin-dir", "/opt/cni/bin")):
        # the host's own path, as the runtime has it
        assert options[option] == path == paths[mounts[path]["name"]]
    assert mounts["/opt/cni/bin"]["readOnly"] and "readOnly" not in mounts["/etc/cni/net.d"]


def test_plugins_that_the_node_lacks_are_put_there_whole_and_none_is_replaced(tmp_path: Path) -> None:
    (box,) = pod(AGENT)["initContainers"]
    image, node = tmp_path / "image", tmp_path / "node"
    image.mkdir()
    node.mkdir()
    names = ("bridge", "host-local", "loopback", "portmap")
    for name in names:
        (image / name).write_text(f"the image's {name}")
    (node / "bridge").write_text("the node's bridge")
    assert box["volumeMounts"] == [{"name": "cni-bin", "mountPath": "/host"}]

    def run() -> subprocess.CompletedProcess[str]:
        script = box["args"][0].replace("/usr/lib/cni", str(image)).replace("/host/", f"{node}/")
        return subprocess.run([*box["command"], script], capture_output=True, text=True, timeout=10, check=True)

    assert run().stderr == ""
    assert sorted(path.name for path in node.iterdir()) == sorted(names)
    assert (node / "bridge").read_text() == "the node's bridge"
    assert (node / "portmap").read_text() == "the image's portmap"
    assert (node / "portmap").stat().st_mode & 0o777 == 0o755
    (node / "portmap").unlink()
    (image / "portmap").unlink()
    # the agent starts all the same, and says what is missing
    assert "plugin portmap could not be put" in run().stderr


# ---------------------------------------------------------------- on a real API server


@pytest.mark.kube
def test_apply_k_works_on_an_empty_cluster(own_plane: Callable[..., ControlPlane]) -> None:
    plane = own_plane()
    first = plane.kubectl("apply", "-k", str(MANIFESTS))
    assert first.count(" created") == len(OBJECTS)
    plane.kubectl("apply", "-f", str(MANIFESTS / "mesh.yaml"))
    again = plane.kubectl("apply", "-k", str(MANIFESTS))
    assert " created" not in again, again
    assert sum(line.endswith(" unchanged") for line in again.splitlines() if ".apps/" in line) == len(WORKLOADS), again
    assert "10.244.0.0/16" in plane.kubectl("get", "mesh", "default")
    plane.kubectl("delete", "-k", str(MANIFESTS), "--wait=false")

    def conditions_of_what_is_left() -> dict[str, Object]:
        names = {o["metadata"]["name"]: plane.call("GET", f"{CRDS}/{o['metadata']['name']}") for o in of_kind(CRD)}
        return {name: found.body["status"] for name, found in names.items() if found.status != 404}

    # The API server empties a kind before it ends it. A try of its own that fails is repeated after 5 minutes at most.
    eventually(lambda: not conditions_of_what_is_left(), 400.0, 0.5, conditions_of_what_is_left)
    assert plane.call("GET", f"{GROUP}/meshes").status == 404


@pytest.mark.kube
def test_policies_are_typed_right(cluster: ControlPlane) -> None:
    path = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    for policy in of_kind("ValidatingAdmissionPolicy"):
        name = policy["metadata"]["name"]

        def checked(name: str = policy["metadata"]["name"]) -> bool:
            return "typeChecking" in cluster.call("GET", f"{path}/{name}").body.get("status", {})

        eventually(checked)
        assert not cluster.call("GET", f"{path}/{name}").body["status"]["typeChecking"]


# ---------------------------------------------------------------- the switch's script

NS = f"ovsmesh-ovs-{os.getpid()}"


@pytest.fixture
@needs("lab")
def run_switch(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Runs the script of ovsmesh-ovs as a pod would, with directories of its own, in a network namespace."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root: run `sudo make test`")
    (config,) = of_kind("ConfigMap")
    script = tmp_path / "run.sh"
    script.write_text(config["data"]["run.sh"])
    assert shlex.split(" ".join(container(OVS)["command"])) == ["bash", "/scripts/run.sh"]
    environment = os.environ | {"OVS_RUNDIR": str(tmp_path / "run"), "OVS_DBDIR": str(tmp_path / "db")}
    started: list[subprocess.Popen[str]] = []
    subprocess.run(["ip", "netns", "add", NS], check=True, timeout=10)

    def start() -> subprocess.Popen[str]:
        log = (tmp_path / f"log{len(started)}").open("w")
        argv = ["ip", "netns", "exec", NS, "bash", str(script)]
        with log:
            started.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log, text=True))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(20)
        subprocess.run(["ip", "netns", "delete", NS], check=True, timeout=10)


def _pid(tmp_path: Path) -> int:
    try:
        return int((tmp_path / "run/ovs-vswitchd.pid").read_text())
    except (OSError, ValueError):
        return 0


@pytest.mark.lab
def test_switch_starts_and_a_second_one_leaves_it_alone(
    tmp_path: Path, run_switch: Callable[[], subprocess.Popen[str]]
) -> None:
    first = run_switch()
    eventually(lambda: _pid(tmp_path))
    vsctl = ["ovs-vsctl", "--timeout=5", f"--db=unix:{tmp_path}/run/db.sock", "--no-wait"]
    waits = [*vsctl, "get", "Open_vSwitch", ".", "other_config:flow-restore-wait"]
    assert subprocess.run(waits, capture_output=True, text=True, timeout=10).stdout.strip() == '"true"'
    vswitchd = _pid(tmp_path)

    second = run_switch()
    eventually(lambda: "nothing to do" in (tmp_path / "log1").read_text())
    assert (_pid(tmp_path), second.poll(), first.poll()) == (vswitchd, None, None)
    second.send_signal(signal.SIGTERM)
    assert second.wait(10) == 0
    assert _pid(tmp_path) == vswitchd and Path(f"/proc/{vswitchd}").exists()

    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 0
    assert not Path(f"/proc/{vswitchd}").exists()
