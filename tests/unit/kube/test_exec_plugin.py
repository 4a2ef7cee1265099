"""Exec plugins, as those of EKS, GKE and AKS: that they work, and each way in which they do not."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import exec_plugin
from ovsmesh.kube.client import Api, Unauthorized
from ovsmesh.kube.config import load
from tests.support import apikit
from tests.support.apikit import THINGS
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub

stub = pytest.fixture(apikit.make_stub)
V1 = "client.authentication.k8s.io/v1"
NO_ENV = {"command": "x", "apiVersion": V1, "env": 3}


def write_plugin(folder: Path, script: str) -> Path:
    """A plugin that notes each run and what it is told, and then does `script`."""
    path = folder / "plugin"
    path.write_text(f'#!/bin/sh\ncd {folder}\necho "$KUBERNETES_EXEC_INFO" >>runs\n{script}\n')
    path.chmod(0o755)
    return path


def runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def credential(program: str = "cat", **status: Any) -> str:
    body = {"apiVersion": V1, "kind": "ExecCredential", "status": status}
    return f"{program} <<'END'\n{json.dumps(body)}\nEND"


def api_of(stub: Stub, script: str, **fields: Any) -> Api:
    plugin = write_plugin(stub.folder, script)
    spec = {"apiVersion": V1, "command": str(plugin), "interactiveMode": "Never", **fields}
    return Api(load(stub.kubeconfig({"exec": spec})), timeout=3.0)


def test_a_token_of_a_plugin_is_sent_and_kept(stub: Stub) -> None:
    stub.authorization = "Bearer from-plugin"
    stub.put(f"{THINGS}/a", {"n": 1})
    later = (datetime.now(UTC) + timedelta(minutes=10)).isoformat()
    with closing(api_of(stub, credential(token="from-plugin\n", expirationTimestamp=later))) as api:
        for _ in range(3):
            api.get(f"{THINGS}/a")
    assert len(runs(stub.folder)) == 1


@pytest.mark.parametrize("kind", ["both", "certificate"])
def test_a_certificate_of_a_plugin_is_shown(stub: Stub, kind: str) -> None:
    cert, key = stub.authority.sign("plugged", "/CN=plugged")
    stub.put(f"{THINGS}/a", {"n": 1})
    status = {"clientCertificateData": cert.read_text(), "clientKeyData": key.read_text()}
    if kind == "both":
        status["token"] = "t"
        stub.authorization = "Bearer t"
    with closing(api_of(stub, credential(**status))) as api:
        api.get(f"{THINGS}/a")
    assert stub.peers == ["plugged"]


def test_a_plugin_runs_again_once_its_token_has_ended(stub: Stub) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    past = (datetime.now(UTC) - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    with closing(api_of(stub, credential(token="t", expirationTimestamp=past))) as api:
        api.get(f"{THINGS}/a")
        api.get(f"{THINGS}/a")
    assert len(runs(stub.folder)) == 2


def test_a_plugin_runs_again_once_after_a_401(stub: Stub) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.authorization = "Bearer 2"
    script = f"n=$(wc -l <runs); {credential('sed s/TOKEN/$n/', token='TOKEN')}"
    with closing(api_of(stub, script)) as api:
        api.get(f"{THINGS}/a")
        assert len(runs(stub.folder)) == 2
        stub.authorization = "Bearer 9"
        with pytest.raises(Unauthorized):
            api.get(f"{THINGS}/a")
    assert len(runs(stub.folder)) == 3


def test_a_plugin_is_told_what_it_asks_for(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.authorization = "Bearer yes"
    script = f'[ "$1 $2 $EXTRA $INHERITED" = "get-token --quiet more yes" ] || exit 9\n{credential(token="yes")}'
    monkeypatch.setenv("INHERITED", "yes")
    fields = {"args": ["get-token", "--quiet"], "env": [{"name": "EXTRA", "value": "more"}], "provideClusterInfo": True}
    with closing(api_of(stub, script, **fields)) as api:
        api.get(f"{THINGS}/a")
    (told,) = runs(stub.folder)
    assert (told["apiVersion"], told["kind"], told["spec"]["interactive"]) == (V1, "ExecCredential", False)
    assert told["spec"]["cluster"]["server"] == f"https://127.0.0.1:{stub.port}"
    assert "certificate-authority-data" in told["spec"]["cluster"]


def test_a_plugin_beside_the_kubeconfig_is_found(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with closing(api_of(stub, credential(token="t"), command="./plugin")) as api:
        api.get(f"{THINGS}/a")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'SSO session has expired' >&2; exit 3", "exit 3: SSO session has expired$"),
        ("exit 1", "exit 1: it printed nothing"),
        ("kill -9 $$", "exit -9"),
        ("echo hello", "it printed no ExecCredential"),
        ("printf '\\377\\376'", "it printed no ExecCredential"),
        ("true", "it printed no ExecCredential"),
        ("echo '[]'", "it printed no ExecCredential"),
        ('echo \'{"kind": "ExecCredential", "apiVersion": "x", "status": null}\'', "it printed no ExecCredential"),
        (credential(), "neither a token nor a client certificate with its key"),
        (credential(clientCertificateData="x"), "neither a token nor a client certificate with its key"),
        (credential(token="a\r\nb"), "a token with control characters"),
        (credential(token="t", expirationTimestamp="soon"), "it printed no ExecCredential"),
        (credential(token="t").replace("/v1", "/v1beta1"), f"expected an ExecCredential of {V1}, found a .*v1beta1"),
    ],
)
def test_a_plugin_that_fails_is_an_error_with_its_words(stub: Stub, script: str, says: str) -> None:
    with pytest.raises(OvsmeshError, match=says) as raised:
        api_of(stub, script).get("/x")
    path = stub.folder / "stub.kubeconfig"
    assert str(raised.value).startswith(f"{path}: context test: user: exec plugin {stub.folder}/plugin: ")
    assert stub.log == []


def test_what_a_plugin_printed_is_not_shown(stub: Stub) -> None:
    with pytest.raises(OvsmeshError) as raised:
        api_of(stub, 'echo \'{"token": "top-secret"}\'').get("/x")
    assert "top-secret" not in str(raised.value)


def test_a_plugin_that_is_not_installed_says_how_to_get_it(stub: Stub) -> None:
    hint = "Install it from your cloud's packages."
    with pytest.raises(OvsmeshError, match=r"exec plugin no-such-plugin: cannot be run: No such file.*Install it from"):
        api_of(stub, "", command="no-such-plugin", installHint=hint).get("/x")


@pytest.mark.parametrize("spec", [{"command": "x"}, {"apiVersion": V1}, "x", NO_ENV])
def test_an_exec_without_its_fields_is_an_error(stub: Stub, spec: Any) -> None:
    path = stub.kubeconfig({"exec": spec})
    with pytest.raises(OvsmeshError, match=r"expected a mapping with command|expected args as a list"):
        Api(load(path)).get("/x")


def test_a_plugin_that_hangs_is_ended_with_its_children(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_plugin, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(OvsmeshError, match=r"no answer within 0\.5 s"):
        api_of(stub, "echo $$ >pid; sleep 600 & echo $! >child; wait").get("/x")
    assert time.monotonic() - began < 30
    for name in ("pid", "child"):
        pid = int((stub.folder / name).read_text())
        eventually(lambda pid=pid: not _alive(pid))  # type: ignore[misc]


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_plugin_that_hangs_does_not_hold_up_the_end(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_plugin, "SECONDS", 8.0)
    api = api_of(stub, "touch started; exec sleep 600")
    failed: list[OvsmeshError] = []

    def ask() -> None:
        try:
            api.get("/x")
        except OvsmeshError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: (stub.folder / "started").exists())
    api.close()
    assert asking.is_alive() and not failed
    asking.join(30)
    assert failed


def test_a_plugin_at_a_terminal_may_ask_there(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors go to the terminal, and it may read from it."""
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.authorization = "Bearer typed"
    leader, terminal = os.openpty()
    os.write(leader, b"typed\n")
    script = f"read word; {credential('sed s/TOKEN/$word/', token='TOKEN')}"
    with open(terminal) as stdin, closing(api_of(stub, script, interactiveMode="IfAvailable")) as api:
        monkeypatch.setattr("sys.stdin", stdin)
        saved = os.dup(0)
        os.dup2(terminal, 0)
        try:
            api.get(f"{THINGS}/a")
        finally:
            os.dup2(saved, 0)
            os.close(saved)
    os.close(leader)
    assert runs(stub.folder)[0]["spec"]["interactive"] is True
