"""Each way to log in, on a real API server: ovsmesh is whom kubectl is with the same kubeconfig."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.kube.client import Api, Forbidden
from ovsmesh.kube.config import load
from ovsmesh.kube.http import Transport
from ovsmesh.kube.service_account import ServiceAccount
from tests.support.controlplane import ControlPlane
from tests.support.loopback_proxy import LoopbackProxy
from tests.support.pki import kubeconfig

pytestmark = pytest.mark.kube

REVIEWS = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
V1 = "client.authentication.k8s.io/v1"


def whoami(transport: Transport) -> dict[str, Any]:
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    with closing(Api(transport)) as api:
        found: dict[str, Any] = api.create(REVIEWS, review)["status"]["userInfo"]
        return found


def plugin(folder: Path, **status: str) -> dict[str, Any]:
    """A user whose plugin gives these credentials."""
    made = folder / "plugin"
    credential = json.dumps({"apiVersion": V1, "kind": "ExecCredential", "status": status})
    made.write_text(f"#!/bin/sh\ncat <<'END'\n{credential}\nEND\n")
    made.chmod(0o755)
    return {"exec": {"apiVersion": V1, "command": str(made), "interactiveMode": "Never"}}


def user_of(kind: str, plane: ControlPlane, folder: Path) -> dict[str, Any]:
    token = plane.token("default", namespace="default")
    cert, key = (path.read_text() for path in plane.authority.sign("jane", "/O=dev/CN=jane"))
    if kind == "token file":
        (folder / "token").write_text(f"{token}\n")
        return {"tokenFile": str(folder / "token")}
    if kind == "certificate":
        data = {"client-certificate-data": cert, "client-key-data": key}
        return {name: base64.b64encode(text.encode()).decode() for name, text in data.items()}
    if kind == "plugin's token":
        return plugin(folder, token=token)
    if kind == "plugin's certificate":
        return plugin(folder, clientCertificateData=cert, clientKeyData=key)
    extra = {"example.com/team": ["red", "blue"]}
    return {
        **json.loads(plane.kubeconfig().read_text())["users"][0]["user"],
        "as": "someone",
        "as-uid": "7",
        "as-groups": ["dev", "ops"],
        "as-user-extra": extra,
    }


KINDS = {
    "token file": "system:serviceaccount:default:default",
    "certificate": "jane",
    "plugin's token": "system:serviceaccount:default:default",
    "plugin's certificate": "jane",
    "impersonation": "someone",
}


@pytest.mark.parametrize("kind", KINDS)
def test_ovsmesh_is_whom_kubectl_is(cluster: ControlPlane, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config"
    path.write_text(json.dumps(kubeconfig(cluster.url, cluster.ca, user_of(kind, cluster, tmp_path), True)))
    found = whoami(load(path))
    assert found["username"] == KINDS[kind]
    theirs = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", config=path))["status"]["userInfo"]
    for name in ("username", "uid", "groups"):
        assert found.get(name) == theirs.get(name)
    if kind == "impersonation":
        assert found["extra"] == theirs["extra"] == {"example.com/team": ["red", "blue"]}
        assert (found["uid"], found["groups"]) == ("7", ["dev", "ops", "system:authenticated"])


def test_a_service_account_is_who_the_library_is_with_its_token(cluster: ControlPlane, tmp_path: Path) -> None:
    token = cluster.token("default", namespace="default")
    folder = cluster.service_account_folder("login", token, "default")
    host, port = cluster.address, str(cluster.port)
    account = ServiceAccount.find({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}, folder)
    assert account is not None
    assert whoami(account.transport())["username"] == "system:serviceaccount:default:default"


def test_who_acts_as_someone_else_may_do_only_what_they_may(cluster: ControlPlane, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(json.dumps(kubeconfig(cluster.url, cluster.ca, user_of("impersonation", cluster, tmp_path))))
    with closing(Api(load(path))) as api, pytest.raises(Forbidden, match='User "someone" cannot list'):
        list(api.pages("/api/v1/nodes"))


def test_the_command_line_takes_a_plugin_a_proxy_and_several_files(cluster: ControlPlane, tmp_path: Path) -> None:
    cert, key = (path.read_text() for path in cluster.authority.sign("root", "/O=system:masters/CN=root"))
    user = plugin(tmp_path, clientCertificateData=cert, clientKeyData=key)
    with LoopbackProxy() as proxy:
        tree = kubeconfig(cluster.url, cluster.ca, user)
        tree["clusters"][0]["cluster"]["proxy-url"] = f"http://{proxy.address}"  # type: ignore[index]
        users = {"users": tree.pop("users")}
        for name, part in (("one", tree), ("two", users)):
            (tmp_path / name).write_text(json.dumps(part))
        files = ":".join(str(tmp_path / name) for name in ("absent", "one", "two"))
        argv = [sys.executable, "-m", "ovsmesh", "status", "--cluster"]
        env = {"KUBECONFIG": files, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False, env=env)
        assert (done.returncode, done.stderr) == (1, "")
        assert "there is no Mesh default" in done.stdout
        assert proxy.targets
        (tmp_path / "plugin").write_text("#!/bin/sh\necho 'your session has ended' >&2\nexit 1\n")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False, env=env)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "your session has ended" in done.stderr
