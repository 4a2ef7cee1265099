"""The client against a server that misbehaves, and what a kubeconfig may hold."""

from __future__ import annotations

import base64
import gc
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import client
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import in_cluster, load
from tests.support import apikit
from tests.support.apikit import THINGS
from tests.support.kubestub import Stub
from tests.support.pki import Authority

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(apikit.make_api)


# ---------------------------------------------------------------- configuration


def test_a_kubeconfig_with_exec_is_refused_with_what_to_do(stub: Stub) -> None:
    path = stub.kubeconfig({"exec": {"command": "aws"}})  # type: ignore[dict-item]
    with pytest.raises(OvsmeshError, match="`exec`, which ovsmesh does not run: give a user with token"):
        load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"current-context": "gone"}, "contexts has no entry named 'gone'"),
        ({"current-context": None}, "current-context is not set"),
        ({"clusters": []}, "clusters has no entry named 'test'"),
        ({"clusters": [{"name": "test", "cluster": {"server": "http://x"}}]}, "wanted https://HOST:PORT"),
        ({"clusters": [{"name": "test", "cluster": {"server": "https://x:99999"}}]}, "is no URL"),
        (
            {"clusters": [{"name": "test", "cluster": {"server": "https://x", "insecure-skip-tls-verify": True}}]},
            "insecure-skip-tls-verify is not supported",
        ),
    ],
)
def test_a_bad_kubeconfig_says_what_it_lacks(stub: Stub, change: dict[str, Any], says: str) -> None:
    path = stub.kubeconfig()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(OvsmeshError, match=says):
        load(path)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "\x00", "&a [*a]"])
def test_what_is_no_kubeconfig_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(OvsmeshError, match="is no kubeconfig"):
        load(tmp_path / "config")


def test_certificates_in_the_kubeconfig_itself_are_used(stub: Stub, api: Api) -> None:
    cert, key = stub.authority.sign("me", "/CN=me")
    data = {
        "client-certificate-data": base64.b64encode(cert.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    stub.put(f"{THINGS}/a", {"n": 1})
    with closing(Api(load(stub.kubeconfig(data)))) as certain:
        assert certain.get(f"{THINGS}/a")["spec"] == {"n": 1}


def test_a_pod_finds_its_own_cluster(stub: Stub, tmp_path: Path) -> None:
    folder = tmp_path / "sa"
    folder.mkdir()
    env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(stub.port)}
    assert in_cluster(env, folder) is None
    (folder / "token").write_text("one\n")
    (folder / "namespace").write_text("ovsmesh")
    shutil.copy(stub.authority.certificate, folder / "ca.crt")
    assert in_cluster({}, folder) is None
    config = in_cluster(env, folder)
    assert config is not None
    assert config.namespace == "ovsmesh"
    stub.token = "one"
    stub.put(f"{THINGS}/a", {"n": 1})
    with closing(Api(config)) as api:
        api.get(f"{THINGS}/a")
        # a projected token is changed by renaming, and the old one ends
        (folder / "next").write_text("two")
        stub.token = "two"
        with pytest.raises(client.Unauthorized):
            api.get(f"{THINGS}/a")
        os.rename(folder / "next", folder / "token")
        api.get(f"{THINGS}/a")


def test_another_authority_is_not_trusted(stub: Stub, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    path = stub.kubeconfig()
    config = json.loads(path.read_text())
    config["clusters"][0]["cluster"]["certificate-authority"] = str(other.certificate)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(client.Unavailable, match="its certificate is not good"):
        Api(load(path)).get("/x")


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (404, "NotFound", client.NotFound),
        (409, "Conflict", client.Conflict),
        (409, "AlreadyExists", client.AlreadyExists),
        (403, "Forbidden", client.Forbidden),
        (410, "Expired", client.Gone),
        (422, "Invalid", client.Invalid),
        (500, "InternalError", client.Unavailable),
        (503, "", client.Unavailable),
    ],
)
def test_each_refusal_has_its_error(stub: Stub, api: Api, code: int, reason: str, error: type[client.ApiError]) -> None:
    stub.answers = [(code, json.dumps({"reason": reason, "message": "so it is"}).encode(), {})]
    with pytest.raises(error, match="so it is") as raised:
        api.get("/x")
    assert type(raised.value) is error
    assert raised.value.code == code


def test_how_long_the_server_asks_to_wait_is_known(stub: Stub, api: Api) -> None:
    stub.answers = [(429, b"", {"Retry-After": "7"})]
    with pytest.raises(client.Unavailable) as raised:
        api.get("/x")
    assert raised.value.retry_after == 7


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"<html>", b"\xff\xff", b"[" * 100_000])
def test_an_answer_that_is_no_object_is_garbage(stub: Stub, api: Api, data: bytes) -> None:
    stub.answers = [(200, data, {})]
    with pytest.raises(client.Garbage):
        api.get("/x")


def test_a_kept_connection_that_the_server_ended_is_replaced(stub: Stub, api: Api) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    api.get(f"{THINGS}/a")
    stub.cut_all()
    time.sleep(0.05)
    api.get(f"{THINGS}/a")
    api.create(THINGS, {"metadata": {"name": "b"}, "spec": {"n": 2}})
    assert stub.count("POST") == 1


def test_a_connection_reset_before_tls_leaves_nothing_open(stub: Stub, api: Api, monkeypatch: Any) -> None:
    """As where the server ends while a connection waits to be accepted: a leak would be an unraisable warning."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def connect(*_: object) -> socket.socket:
            mine = socket.socket()
            mine.connect(door.getsockname())
            theirs, _peer = door.accept()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            return mine

        monkeypatch.setattr(socket, "create_connection", connect)
        with pytest.raises(client.Unavailable, match="reset before TLS began"):
            api.get("/x")
        with pytest.raises(client.Unavailable, match="reset before TLS began"):
            api.watch("/x", "1", 5, 5.0)
    gc.collect()


def test_nothing_is_waited_for_longer_than_said(stub: Stub, api: Api) -> None:
    stub.delay = 2.0
    began = time.monotonic()
    with pytest.raises(client.Unavailable, match="no answer in time"):
        api.within(0.2).get("/x")
    assert time.monotonic() - began < 1.9


def test_a_fenced_write_is_not_sent_once_the_lease_is_lost(stub: Stub, api: Api) -> None:
    left = [5.0]
    fenced = api.fenced(lambda: left[0])
    fenced.create(THINGS, {"metadata": {"name": "a"}, "spec": {"n": 1}})
    left[0] = 0.0
    writes: tuple[Callable[[], Object], ...] = (
        lambda: fenced.create(THINGS, {"metadata": {"name": "b"}}),
        lambda: fenced.patch(f"{THINGS}/a", {"spec": {"n": 2}}),
        lambda: fenced.replace(f"{THINGS}/a", {}),
        lambda: fenced.delete(f"{THINGS}/a"),
    )
    for write in writes:
        with pytest.raises(client.NotLeader):
            write()
    assert fenced.get(f"{THINGS}/a")["spec"] == {"n": 1}
    assert [m for _, m, _ in stub.log] == ["POST", "GET"]


def test_a_list_comes_in_pages(stub: Stub, api: Api) -> None:
    for n in range(25):
        stub.put(f"{THINGS}/t{n:02}", {"n": n})
    pages = list(api.pages(THINGS, limit=10))
    assert [len(page.items) for page in pages] == [10, 10, 5]
