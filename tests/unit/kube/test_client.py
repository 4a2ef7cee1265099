"""Both transports against a server that misbehaves: through the `kubernetes` library, and an agent's in a pod."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import client, http
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.service_account import ServiceAccount
from tests.support import apikit
from tests.support.apikit import THINGS
from tests.support.kubestub import Stub
from tests.support.pki import Authority

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(params=apikit.TRANSPORTS)(apikit.make_api)


# ---------------------------------------------------------------- credentials and certificates


def test_a_rotated_token_is_taken_by_the_next_request(stub: Stub, api: Api) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.authorization = "Bearer t"
    api.get(f"{THINGS}/a")
    # a projected token is changed by renaming, and the old one ends
    (stub.folder / "next").write_text("two\n")
    stub.authorization = "Bearer two"
    with pytest.raises(client.Unauthorized):
        api.get(f"{THINGS}/a")
    os.rename(stub.folder / "next", stub.folder / "token")
    api.get(f"{THINGS}/a")
    api.watch(THINGS, "1", 5, 5.0).release()


def test_a_token_that_changes_unseen_is_read_again_after_a_401(stub: Stub, api: Api) -> None:
    """Written in place, with the same length and time: only the server's answer tells."""
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.authorization = "Bearer t"
    api.get(f"{THINGS}/a")
    token = stub.folder / "token"
    before = token.stat()
    token.write_text("u")
    os.utime(token, ns=(before.st_atime_ns, before.st_mtime_ns))
    stub.authorization = "Bearer u"
    api.watch(THINGS, "1", 5, 5.0).release()
    assert [status_line for _, status_line, _ in stub.log] == ["GET", "WATCH", "WATCH"]


@pytest.mark.parametrize("text", ["", " \n", "a\nb", "\xe9"])
def test_a_file_without_a_token_is_named(stub: Stub, api: Api, text: str) -> None:
    (stub.folder / "token").write_text(text)
    with pytest.raises(OvsmeshError, match=f"token file {stub.folder}/token holds no token"):
        api.get("/x")
    (stub.folder / "token").unlink()
    with pytest.raises(OvsmeshError, match=f"{stub.folder}/token: No such file|no file {stub.folder}/token"):
        api.get("/x")


@pytest.mark.parametrize("transport", apikit.TRANSPORTS)
def test_another_authority_is_not_trusted(stub: Stub, tmp_path: Path, transport: str) -> None:
    way = apikit.transport_to(stub, transport)
    other = Authority(tmp_path / "other").certificate
    for file in (stub.authority.certificate, stub.folder / "ca.crt"):
        shutil.copy(other, file)
    with pytest.raises(client.Unavailable, match="its certificate is not valid"):
        Api(way).get("/x")


def test_a_certificate_for_another_address_is_not_trusted(stub: Stub, tmp_path: Path) -> None:
    environment, folder = apikit.pod(stub)
    account = ServiceAccount.find({**environment, "KUBERNETES_SERVICE_HOST": "127.0.0.2"}, folder)
    assert account is not None
    with socket.create_server(("127.0.0.2", stub.port)) as door:
        threading.Thread(target=_forward, args=(door, stub.port), daemon=True).start()
        with pytest.raises(client.Unavailable, match="its certificate is not valid"):
            Api(account.transport()).get("/x")


def _forward(door: socket.socket, port: int) -> None:
    there, _ = door.accept()
    with there, socket.create_connection(("127.0.0.1", port)) as way:
        way.sendall(there.recv(65536))
        there.sendall(way.recv(65536))
        there.recv(1)


def test_a_pod_finds_its_own_cluster(stub: Stub) -> None:
    environment, folder = apikit.pod(stub)
    account = ServiceAccount.find(environment, folder)
    assert account is not None
    assert (account.server, account.namespace) == (f"https://127.0.0.1:{stub.port}", "ovsmesh")
    assert ServiceAccount.find({}, folder) is None
    assert ServiceAccount.find(environment, folder / "none") is None
    ipv6 = ServiceAccount.find({"KUBERNETES_SERVICE_HOST": "fd00::1"}, folder)
    assert ipv6 is not None and ipv6.server == "https://[fd00::1]:443"
    with pytest.raises(OvsmeshError, match="KUBERNETES_SERVICE_PORT is '1x': expected a port number"):
        ServiceAccount.find({**environment, "KUBERNETES_SERVICE_PORT": "1x"}, folder)


def test_an_agent_in_a_pod_never_loads_the_library(stub: Stub) -> None:
    environment, folder = apikit.pod(stub)
    code = f"""
import sys
from pathlib import Path
from ovsmesh.agent import cluster
from ovsmesh.kube import service_account
account = service_account.ServiceAccount.find({environment!r}, Path({str(folder)!r}))
service_account.ServiceAccount.find = lambda: account
cluster.connect("", {str(folder)!r}, "n1", 0.1).close()
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {{"kubernetes", "pydantic", "requests"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "\n"


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


def test_a_connection_that_ends_in_place_of_an_answer_is_tried_once_more(stub: Stub, api: Api) -> None:
    """The server ended it while the request was on its way. A create may have been carried out all the same."""
    stub.put(f"{THINGS}/a", {"n": 1})
    ended: tuple[int, bytes, dict[str, str]] = (0, b"", {})
    stub.answers = [ended]
    assert api.get(f"{THINGS}/a")["spec"] == {"n": 1}
    stub.answers = [ended, ended]
    with pytest.raises(client.Unavailable):
        api.get(f"{THINGS}/a")
    assert not stub.answers
    stub.answers = [ended]
    with pytest.raises(client.Unavailable):
        api.create(THINGS, {"metadata": {"name": "b"}})
    assert stub.count("POST") == 1


def test_a_connection_reset_before_tls_leaves_nothing_open(stub: Stub, api: Api, monkeypatch: Any) -> None:
    """As where the server ends while a connection waits to be accepted: a leak would be an unraisable warning."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def connect(*_: object, **__: object) -> socket.socket:
            mine = socket.socket()
            mine.connect(door.getsockname())
            theirs, _peer = door.accept()
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            return mine

        monkeypatch.setattr("urllib3.util.connection.create_connection", connect)
        with pytest.raises(client.Unavailable, match="reset before TLS began"):
            api.get("/x")
        with pytest.raises(client.Unavailable, match="reset before TLS began"):
            api.watch("/x", "1", 5, 5.0)
    gc.collect()


@pytest.mark.parametrize("transport", apikit.TRANSPORTS)
def test_a_server_that_never_speaks_tls_is_not_waited_for(tmp_path: Path, transport: str) -> None:
    stub = Stub(tmp_path)
    way = apikit.transport_to(stub, transport)
    stub.close()
    with socket.create_server(("127.0.0.1", stub.port)):
        for ask in (lambda: Api(way, timeout=0.3).get("/x"), lambda: Api(way, timeout=0.3).watch("/x", "1", 5, 60.0)):
            with pytest.raises(client.Unavailable, match="no answer in time"):
                ask()


def test_a_server_that_is_not_there_is_named(stub: Stub, api: Api) -> None:
    stub.close()
    with pytest.raises(client.Unavailable, match=f"API server https://127.0.0.1:{stub.port}: GET /x: .*refused"):
        api.get("/x")


def test_an_answer_without_an_end_is_left(stub: Stub, api: Api, monkeypatch: Any) -> None:
    stub.answers = [(200, b"x" * 200_000, {})]
    monkeypatch.setattr(http, "_MAX_ANSWER", 100_000)
    with pytest.raises(client.Garbage, match="more than 100000 bytes"):
        api.get("/x")


def test_an_answer_that_drips_is_left(stub: Stub, api: Api, monkeypatch: Any) -> None:
    """Each byte comes well within the read's deadline, all of them do not."""
    monkeypatch.setattr(http, "_MAX_SECONDS", 0.3)
    stub.answers = [(200, b"x" * 40, {"Drip": "0.05"})]
    with pytest.raises(client.Unavailable, match="no answer in time"):
        api.get("/x")


def test_an_answer_that_is_cut_short_is_no_answer(stub: Stub, api: Api) -> None:
    stub.answers = [(200, b'{"a": 1}', {"Content-Length": "100"})] * 2
    with pytest.raises(client.Unavailable, match="IncompleteRead"):
        api.get("/x")


def test_the_transport_neither_sleeps_for_a_server_nor_follows_it(stub: Stub, api: Api) -> None:
    """The library alone would sleep for Retry-After three times, and go where Location says with the token."""
    stub.answers = [(429, b"", {"Retry-After": "30"}), (307, b"", {"Location": f"https://127.0.0.1:{stub.port}/other"})]
    with pytest.raises(client.Unavailable) as raised:
        api.get("/x")
    assert raised.value.retry_after == 30
    with pytest.raises(client.Unavailable, match="307"):
        api.get("/x")
    assert [target for _, _, target in stub.log] == ["/x", "/x"]


def test_a_watch_over_a_connection_that_is_not_kept_is_refused(stub: Stub, api: Api) -> None:
    stub.faults = ["close"]
    with pytest.raises(client.Unavailable, match="a watch needs a connection that is kept"):
        api.watch(THINGS, "1", 5, 5.0)


def test_a_watch_is_ended_from_another_thread(stub: Stub, api: Api) -> None:
    stub.faults = ["stall"]
    stream = api.watch(THINGS, "1", 30, 30.0)
    threading.Timer(0.2, stream.close).start()
    with contextlib.suppress(client.Unavailable):
        assert list(stream) == []
    stream.release()


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
