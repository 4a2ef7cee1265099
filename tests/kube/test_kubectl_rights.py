"""What a user needs for `kubectl ovsmesh check`: the roles that docs/operations.md says, tried on a real API server."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.controlplane import ControlPlane
from tests.support.kubekit import eventually

pytestmark = pytest.mark.kube

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
PLUGIN = "from ovsmesh.cli.main import kubectl; kubectl()"


def check(plane: ControlPlane) -> str:
    """What `kubectl ovsmesh check` of user ann says; nothing answers on the node, so it never ends well."""
    argv = [sys.executable, "-c", PLUGIN, "check", "--on", "node1", f"--kubeconfig={plane.kubeconfig('ann')}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_the_documented_roles_are_enough_and_without_them_the_error_names_what_is_missing(
    cluster: ControlPlane,
) -> None:
    labels = {"app.kubernetes.io/name": "ovsmesh", "app.kubernetes.io/component": "agent"}
    spec = {"nodeName": "node1", "containers": [{"name": "agent", "image": "none"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-x", "labels": labels}, "spec": spec}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}}
    addresses = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}
    status = {"name": "agent", "ready": True, "restartCount": 0, "image": "", "imageID": "", "state": {"running": {}}}
    running = {"status": {"phase": "Running", "containerStatuses": [status]}}
    merge = "application/merge-patch+json"
    assert cluster.call("POST", "/api/v1/nodes", node).status == 201
    assert cluster.call("PATCH", "/api/v1/nodes/node1/status", {"status": addresses}, content_type=merge).status == 200
    assert cluster.call("POST", "/api/v1/namespaces/ovsmesh/pods", pod).status == 201
    path = "/api/v1/namespaces/ovsmesh/pods/agent-x/status"
    assert cluster.call("PATCH", path, running, content_type=merge).status == 200

    assert "needs `list` on pods in namespace ovsmesh" in check(cluster)
    commands = re.findall(r"^    kubectl (-n ovsmesh create .*)$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(commands) == 4
    made = []
    try:
        for command in sorted(commands, key=lambda line: "exec" in line):
            if "exec" in command:
                eventually(lambda: "`get` and `create` on pods/exec" in check(cluster))
            words = shlex.split(command.replace("NAME", "ann"))
            made.append(words[:3] + words[3:5])
            cluster.kubectl(*words)
        # past the permissions: the API server asks the kubelet, which nobody is here
        eventually(lambda: "Forbidden" not in check(cluster))
        assert "10250" in check(cluster)
    finally:
        for words in made:
            cluster.kubectl("-n", "ovsmesh", "delete", *words[3:5])
