"""Kubeconfigs as kubectl takes them: several files, every kind of login, proxies, impersonation, and what is wrong."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import client, config, http
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import find, load
from tests.support import apikit, pki
from tests.support.apikit import THINGS
from tests.support.kubestub import Stub
from tests.support.loopback_proxy import LoopbackProxy

stub = pytest.fixture(apikit.make_stub)


def get(path: Path | str, *more: Path | str) -> None:
    with closing(Api(load(path, *more), timeout=3.0)) as api:
        assert api.get(f"{THINGS}/a")["spec"] == {"n": 1}


@pytest.fixture(autouse=True)
def thing(stub: Stub) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})


def change(path: Path, kind: str, **fields: Any) -> Path:
    """Changes the only cluster, user or context of a kubeconfig."""
    tree = yaml.safe_load(path.read_text())
    entry = tree[f"{kind}s"][0][kind]
    for key, value in fields.items():
        entry[key.replace("_", "-")] = value
    path.write_text(yaml.safe_dump(tree))
    return path


def data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# ---------------------------------------------------------------- logins


@pytest.mark.parametrize("name", ["token", "tokenFile", "both"])
def test_a_token_is_sent(stub: Stub, name: str) -> None:
    stub.authorization = "Bearer secret"
    (stub.folder / "file").write_text("secret\n")
    user = {"token": {"token": "secret"}, "tokenFile": {"tokenFile": "file"}}
    get(stub.kubeconfig({"token": "old", "tokenFile": "file"} if name == "both" else user[name]))


def test_a_name_and_a_password_are_sent(stub: Stub) -> None:
    stub.authorization = "Basic " + base64.b64encode(b"me:secret").decode()
    get(stub.kubeconfig({"username": "me", "password": "secret"}))


@pytest.mark.parametrize("inline", [False, True])
def test_a_client_certificate_is_shown(stub: Stub, inline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = stub.folder / "shared"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    modes: set[int] = set()

    def tls_context(ca: str | None, cert: str | None, key: str | None, verify: bool = True) -> Any:
        assert key
        modes.add(stat.S_IMODE(Path(key).parent.stat().st_mode) if inline else 0o700)
        return http.tls_context(ca, cert, key, verify)

    monkeypatch.setattr(config, "tls_context", tls_context)
    cert, key = stub.authority.sign("me", "/CN=me")
    files = {"client-certificate": str(cert), "client-key": str(key)}
    inlined = {"client-certificate-data": data(cert), "client-key-data": data(key)}
    get(stub.kubeconfig(inlined if inline else files))
    assert stub.peers == ["me"]
    assert modes == {0o700}
    assert list(shared.iterdir()) == []


def test_a_certificate_that_rotates_is_taken_by_the_next_request(stub: Stub) -> None:
    one, two = (stub.authority.sign(name, f"/CN={name}") for name in ("one", "two"))
    user = {"client-certificate": "me.crt", "client-key": "me.key"}

    def put(pair: tuple[Path, Path]) -> None:
        for file, name in zip(pair, ("me.crt", "me.key"), strict=True):
            (stub.folder / "next").write_bytes(file.read_bytes())
            os.rename(stub.folder / "next", stub.folder / name)

    put(one)
    with closing(Api(load(stub.kubeconfig(user)), timeout=3.0)) as api:
        api.get(f"{THINGS}/a")
        put(two)
        api.get(f"{THINGS}/a")
    assert stub.peers == ["one", "two"]


def test_a_kubeconfig_that_changes_is_read_again_after_a_401_for_the_same_context(stub: Stub) -> None:
    stub.authorization = "Bearer one"
    path = stub.kubeconfig({"token": "one"})
    with closing(Api(load(path), timeout=3.0)) as api:
        api.get(f"{THINGS}/a")
        tree = yaml.safe_load(stub.kubeconfig({"token": "two"}).read_text())
        path.write_text(yaml.safe_dump({**tree, "current-context": "another"}))
        stub.authorization = "Bearer two"
        api.get(f"{THINGS}/a")


def test_who_acts_as_someone_else_says_so(stub: Stub) -> None:
    extra = {"scopes": ["view", "edit"], "Acme/Team é": ["Müller"]}
    user = {"token": "t", "as": "jane", "as-uid": "7", "as-groups": ["dev", "ops"], "as-user-extra": extra}
    get(stub.kubeconfig(user))
    (sent,) = stub.headers
    found = sorted((name, value) for name, value in sent.items() if name.startswith("Impersonate-"))
    assert found == [
        ("Impersonate-Extra-Acme%2FTeam%20%C3%A9", "Müller".encode().decode("latin-1")),
        ("Impersonate-Extra-scopes", "edit"),
        ("Impersonate-Extra-scopes", "view"),
        ("Impersonate-Group", "dev"),
        ("Impersonate-Group", "ops"),
        ("Impersonate-Uid", "7"),
        ("Impersonate-User", "jane"),
    ]


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ({"as-groups": ["dev"]}, "need `as`, who to act as"),
        ({"as": "jane", "as-groups": "dev"}, "expected as-groups as a list"),
        ({"as": "jane\r\nX: y"}, "Impersonate-User: .* has control characters"),
        ({"auth-provider": {"name": "gcp"}}, "auth-provider 'gcp' is not in kubectl any more"),
        ({"client-certificate-data": "!"}, "user test: client-certificate-data is not base64"),
        ({"client-certificate-data": "eA==", "client-key-data": "eA=="}, "a certificate or key cannot be used"),
        ({"client-certificate": "none.crt"}, "user test: client-certificate: no file /.*/none.crt"),
        ({"tokenFile": "none"}, "user test: tokenFile: no file /.*/none"),
        ({"username": 1, "password": 2}, "context test: "),
    ],
)
def test_a_login_that_cannot_work_is_said_with_its_field(stub: Stub, user: dict[str, Any], says: str) -> None:
    path = stub.kubeconfig(user)
    with pytest.raises(OvsmeshError, match=says) as raised:
        Api(load(path)).get(f"{THINGS}/a")
    assert str(raised.value).startswith(f"{path}: context test: ")
    assert stub.log == []


def test_an_encrypted_key_does_not_ask_the_terminal(stub: Stub) -> None:
    cert, key = stub.authority.sign("me", "/CN=me")
    locked = stub.folder / "locked.key"
    pki._openssl("ec", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked))
    path = stub.kubeconfig({"client-certificate": str(cert), "client-key": str(locked)})
    code = f"from ovsmesh.kube.config import load; load({str(path)!r}).session()"
    leader, terminal = os.openpty()
    try:
        argv = ["setsid", "--wait", "--ctty", sys.executable, "-c", code]
        done = subprocess.run(argv, stdin=terminal, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    finally:
        os.close(terminal)
        os.close(leader)
    assert "OvsmeshError" in done.stderr and "a certificate or key cannot be used" in done.stderr


# ---------------------------------------------------------------- clusters


def test_another_name_in_the_servers_certificate_is_taken_where_it_is_given(stub: Stub) -> None:
    path = stub.kubeconfig()
    with pytest.raises(client.Unavailable, match=r"its certificate is not valid: .*elsewhere\.test"):
        get(change(path, "cluster", tls_server_name="elsewhere.test"))
    get(change(path, "cluster", tls_server_name="127.0.0.1"))


def test_a_server_that_is_not_to_be_checked_is_not(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    path = stub.kubeconfig()
    tree = yaml.safe_load(path.read_text())
    del tree["clusters"][0]["cluster"]["certificate-authority"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(client.Unavailable, match="its certificate is not valid"):
        get(path)
    get(change(path, "cluster", insecure_skip_tls_verify=True))
    assert "insecure-skip-tls-verify" in caplog.text


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_proxy_is_used(stub: Stub, scheme: str) -> None:
    with LoopbackProxy() as proxy:
        path = change(stub.kubeconfig(), "cluster", proxy_url=f"{scheme}://{proxy.address}")
        get(path)
        with closing(Api(load(path), timeout=3.0)) as api:
            api.watch(THINGS, "1", 5, 5.0).release()
    assert set(proxy.targets) == {f"127.0.0.1:{stub.port}"} and len(proxy.targets) == 2


@pytest.mark.parametrize("excepted", ["", "127.0.0.1", "127.0.0.0/8"])
def test_the_environments_proxy_is_used(stub: Stub, excepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", excepted)
    with LoopbackProxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        get(stub.kubeconfig())
    assert bool(proxy.targets) == (not excepted)


def test_the_proxy_resolves_the_servers_name(stub: Stub) -> None:
    with LoopbackProxy() as proxy:
        path = change(stub.kubeconfig(), "cluster", proxy_url=f"socks5://{proxy.address}")
        change(path, "cluster", server=f"https://localhost:{stub.port}", tls_server_name="127.0.0.1")
        get(path)
    assert proxy.targets == [f"localhost:{stub.port}"]


def test_a_proxy_that_refuses_is_told_from_the_server(stub: Stub) -> None:
    with LoopbackProxy(refuse=True) as proxy:
        path = change(stub.kubeconfig(), "cluster", proxy_url=f"http://{proxy.address}")
        with pytest.raises(client.Unavailable, match=r"the proxy refuses: .*403"):
            get(path)
    with pytest.raises(OvsmeshError, match="proxy 'ftp://x'"):
        get(change(path, "cluster", proxy_url="ftp://x"))


def test_no_credentials_go_in_clear_text(stub: Stub) -> None:
    with LoopbackProxy(refuse=True) as server:  # any server that shows what it was sent
        path = change(stub.kubeconfig({"token": "secret"}), "cluster", server=f"http://{server.address}")
        session = load(path).session()
    assert "authorization" not in session._headers


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"current-context": "gone"}, "context gone: contexts has no entry named 'gone'"),
        ({"current-context": None}, "current-context is not set"),
        ({"clusters": []}, "context test: clusters has no entry named 'test'"),
        ({"users": [{"name": "test"}]}, "context test: users has no entry named 'test'"),
        ({"clusters": [{"name": "test", "cluster": {"server": "ftp://x"}}]}, "expected https://HOST:PORT"),
        ({"clusters": [{"name": "test", "cluster": {"server": "https://x:99999"}}]}, "expected https://HOST:PORT"),
        ({"clusters": [{"name": "test", "cluster": {}}]}, "expected https://HOST:PORT"),
        ({"clusters": 3}, "clusters has no entry"),
    ],
)
def test_a_bad_kubeconfig_says_what_is_wrong(stub: Stub, fields: dict[str, Any], says: str) -> None:
    path = stub.kubeconfig()
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(OvsmeshError, match=says) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["[]", "a: [", "\x00", "&a [*a]", "- " * 5000])
def test_what_is_no_kubeconfig_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(OvsmeshError, match="not a kubeconfig"):
        load(tmp_path / "config")


def test_a_kubeconfig_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OvsmeshError, match=f"{tmp_path}/none: kubeconfig cannot be read: No such file"):
        load(tmp_path / "none")
    with pytest.raises(OvsmeshError, match=f"{tmp_path}: kubeconfig cannot be read: Is a directory"):
        load(tmp_path)


def parts(stub: Stub) -> tuple[Path, Path]:
    """A kubeconfig in two folders: contexts and users here, clusters there; paths are relative to each."""
    whole = json.loads(stub.kubeconfig({"tokenFile": "token"}).read_text())
    one, two = stub.folder / "one" / "config", stub.folder / "two" / "config"
    for path in (one, two):
        path.parent.mkdir()
    (one.parent / "token").write_text("t\n")
    (two.parent / "ca.crt").write_bytes(stub.authority.certificate.read_bytes())
    whole["clusters"][0]["cluster"]["certificate-authority"] = "ca.crt"
    clusters = whole.pop("clusters")
    one.write_text(json.dumps(whole))
    two.write_text(json.dumps({"clusters": clusters, "current-context": "", "users": [{"name": "test", "user": {}}]}))
    return one, two


def test_several_files_are_merged_as_kubectl_does(stub: Stub) -> None:
    stub.authorization = "Bearer t"
    one, two = parts(stub)
    get(stub.folder / "absent", one, two)
    other = stub.folder / "other"
    other.write_text(yaml.safe_dump({"current-context": "elsewhere", "clusters": None}))
    empty = stub.folder / "empty"
    empty.touch()
    get(empty, one, two, other)
    with pytest.raises(OvsmeshError, match=f"{other}:{one}: context elsewhere: contexts has no entry"):
        load(other, one)
    with pytest.raises(OvsmeshError, match="none of the kubeconfig files exists: /x/a, /x/b"):
        load("/x/a", "/x/b")


def test_the_way_is_found_as_kubectl_finds_it(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / ".kube").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OvsmeshError, match=f"give --kubeconfig FILE or set KUBECONFIG .{home}/.kube/config does not"):
        find()
    whole = json.loads(stub.kubeconfig().read_text())

    def write(path: Path, server: str) -> str:
        whole["clusters"][0]["cluster"]["server"] = f"https://{server}.test"
        path.write_text(json.dumps(whole))
        return str(path)

    write(home / ".kube" / "config", "home")
    assert find().host == "home.test"
    environment, folder = apikit.pod(stub)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("ovsmesh.kube.service_account.DIRECTORY", folder)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    inside = find()
    assert (inside.server, inside.namespace) == (f"https://127.0.0.1:{stub.port}", "ovsmesh")
    stub.authorization = "Bearer t"
    assert Api(inside, timeout=3.0).get(f"{THINGS}/a")["spec"] == {"n": 1}
    inside.close()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("KUBECONFIG", f"/absent:{write(tmp_path / 'one', 'one')}:{write(tmp_path / 'two', 'two')}")
    assert find().host == "one.test"
    assert find(write(tmp_path / "three", "three")).host == "three.test"
    monkeypatch.setenv("KUBECONFIG", "/absent")
    with pytest.raises(OvsmeshError, match="/absent: kubeconfig cannot be read"):
        find()
