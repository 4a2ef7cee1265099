"""The control plane that the other tests stand on: what it keeps over a restart, and how it fails when told to."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import binaries
from tests.support.controlplane import APISERVER, ETCD, ControlPlane
from tests.support.kubekit import eventually
from tests.support.reach import ControlPlaneError

CONFIG_MAPS = "/api/v1/namespaces/default/configmaps"


@pytest.mark.kube
def test_what_was_written_survives_both_restarts(own_plane: Callable[..., ControlPlane]) -> None:
    plane = own_plane()
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}}
    assert plane.call("POST", CONFIG_MAPS, made).status == 201
    plane.kill(APISERVER, ETCD)
    with pytest.raises(OSError):
        plane.call("GET", CONFIG_MAPS)
    plane.start()
    assert plane.call("GET", f"{CONFIG_MAPS}/kept").status == 200
    assert "kept" in plane.kubectl("get", "configmaps", "-o", "name")


@pytest.mark.kube
def test_a_paused_api_server_answers_nobody(plane: ControlPlane) -> None:
    plane.pause(APISERVER)
    try:
        with pytest.raises(TimeoutError):
            plane.call("GET", "/readyz", timeout=0.5)
    finally:
        plane.resume(APISERVER)
    eventually(lambda: plane.call("GET", "/readyz").status == 200)


@pytest.mark.kube
def test_a_program_that_ends_says_why(tmp_path: Path, programs: None) -> None:
    plane = ControlPlane(tmp_path, apiserver_options=["--no-such-option"])
    plane.start(ETCD)
    try:
        with pytest.raises(ControlPlaneError, match=r"(?s)kube-apiserver: ended with .*no-such-option"):
            plane.start(APISERVER)
    finally:
        plane.stop()


@pytest.mark.kube
def test_tokens_carry_the_node(cluster: ControlPlane) -> None:
    assert cluster.call("POST", "/api/v1/nodes", {"kind": "Node", "metadata": {"name": "node1"}}).status == 201
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    for token in (cluster.agent_token("node1"), cluster.token("ovsmesh-agent", node="node1")):
        answer = cluster.call("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review, token=token)
        who = answer.body["status"]["userInfo"]
        assert who["username"] == "system:serviceaccount:ovsmesh:ovsmesh-agent"
        assert who["extra"]["authentication.kubernetes.io/node-name"] == ["node1"]
    with pytest.raises(ControlPlaneError, match="node9"):
        cluster.token("ovsmesh-agent", node="node9")


@pytest.mark.kube
def test_node_ranges_from_the_controller_manager(own_plane: Callable[..., ControlPlane]) -> None:
    plane = own_plane(pod_cidrs="10.97.0.0/16")
    assert plane.call("POST", "/api/v1/nodes", {"kind": "Node", "metadata": {"name": "node1"}}).status == 201
    eventually(lambda: plane.call("GET", "/api/v1/nodes/node1").body["spec"].get("podCIDRs") == ["10.97.0.0/24"])


@pytest.mark.kube
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root: run `sudo make test`")
def test_in_a_network_namespace(own_plane: Callable[..., ControlPlane]) -> None:
    ns = f"ovsmesh-kube-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", ns], check=True, timeout=10)
    try:
        for argv in (["link", "set", "lo", "up"], ["addr", "add", "192.0.2.1/32", "dev", "lo"]):
            subprocess.run(["ip", "-n", ns, *argv], check=True, timeout=10)
        plane = own_plane(address="192.0.2.1", ns=ns)
        assert plane.call("GET", "/version").body["gitVersion"]
        assert "default" in plane.kubectl("get", "namespaces")
        plane.stop()
    finally:
        subprocess.run(["ip", "netns", "delete", ns], check=True, timeout=10)


# ---------------------------------------------------------------- where the programs come from


def _program(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing on PATH but what the test puts there, and an empty cache."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("OVSMESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    binaries._version.cache_clear()
    return tmp_path / "path"


def test_programs_that_are_too_old_or_no_real_ones_are_not_used(bare: Path) -> None:
    _program(bare, "etcd", "etcd Version: 3.5.21")
    _program(bare, "kubectl", "Client Version: v1.36.0-dispatcher")
    assert binaries._find("etcd") is None
    assert binaries._find("kubectl") is None


def test_kubebuilder_assets_come_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = _program(bare, "kube-apiserver", "Kubernetes v1.34.2")
    assert binaries._find("kube-apiserver") == on_path
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    assert binaries._find("kube-apiserver") == on_path
    asset = _program(tmp_path / "assets", "kube-apiserver", "Kubernetes v1.35.0")
    assert binaries._find("kube-apiserver") == asset


def test_without_go_it_says_what_to_install(bare: Path) -> None:
    with pytest.raises(binaries.BinariesError, match=r"found no go: install Go 1\.26 or newer .* KUBEBUILDER_ASSETS"):
        binaries._build(["etcd"])


def test_an_old_go_is_named(bare: Path) -> None:
    _program(bare, "go", "go1.19.8")
    with pytest.raises(binaries.BinariesError, match=r"wanted Go 1\.26 or newer, found go1\.19\.8 in"):
        binaries._build(["etcd"])


def test_what_is_built_from_names_modules_that_there_are() -> None:
    """A name that a line break has torn apart fails on a machine without cache only, minutes into the build."""
    text = binaries._module("kubelet")
    assert text.startswith(f"module ovsmesh.test\n\ngo 1.26\n\nrequire k8s.io/kubernetes v{binaries.KUBE}\n")
    lines = re.findall(r"^\t(.*)$", text, re.MULTILINE)
    name = r"[a-z]+(?:-[a-z]+)*"
    found = [re.fullmatch(rf"k8s\.io/({name}) => k8s\.io/\1 v0\.36\.3", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    names = [match[1] for match in found if match]
    assert names == sorted(set(names))
    # What a name that was torn at a hyphen would leave: its end, as a module of its own.
    assert {"api", "client-go", "csi-translation-lib", "dynamic-resource-allocation", "mount-utils"} < set(names)
    for program, (package, call) in binaries._MAINS.items():
        assert f'"{package}"' in binaries._main(program) and call in binaries._main(program)


def test_what_is_built_from_is_what_kubernetes_itself_names() -> None:
    """Where Go has downloaded Kubernetes already (the build does): its go.mod has each as a folder of its own."""
    home = os.environ.get("GOMODCACHE") or f"{os.environ.get('GOPATH') or Path.home() / 'go'}/pkg/mod"
    theirs = Path(home) / f"cache/download/k8s.io/kubernetes/@v/v{binaries.KUBE}.mod"
    if not theirs.exists():
        pytest.skip(f"no {theirs}: the names are checked by their form only")
    wanted = re.findall(r"k8s\.io/(\S+) => \./staging/", theirs.read_text())
    assert binaries._STAGING.split() == wanted


@pytest.mark.kube
def test_ready_programs_cost_nothing(programs: None) -> None:
    start = time.monotonic()
    assert binaries.ready()
    assert time.monotonic() - start < 30
