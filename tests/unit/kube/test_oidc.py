"""OIDC logins of a kubeconfig: a valid id-token, one that is refreshed, and an issuer that is wrong, slow or false."""

from __future__ import annotations

import base64
import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import oidc
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from tests.support import apikit
from tests.support.apikit import THINGS
from tests.support.kubestub import Stub
from tests.support.pki import Authority

stub = pytest.fixture(apikit.make_stub)


def token(seconds: float, name: str = "me") -> str:
    """An id-token that ends in so many seconds; nobody here checks its signature."""
    claims = base64.urlsafe_b64encode(json.dumps({"sub": name, "exp": int(time.time() + seconds)}).encode())
    return f"e30.{claims.decode().rstrip('=')}.c2ln"


class Issuer:
    """An OIDC issuer over TLS; `answer` is what its token endpoint says, `asked` what it was asked."""

    def __init__(self, authority: Authority) -> None:
        issuer = self
        self.answer: tuple[int, dict[str, Any]] = (200, {})
        self.asked: list[dict[str, list[str]]] = []
        self.discoveries = 0

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                issuer.discoveries += 1
                self.say(200, {"token_endpoint": f"{issuer.url}/token"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                issuer.asked.append(parse_qs(body))
                self.say(*issuer.answer)

            def say(self, code: int, body: dict[str, Any]) -> None:
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

            def finish_request(self, request: Any, client_address: Any) -> None:
                with context.wrap_socket(request, server_side=True) as secure:
                    super().finish_request(secure, client_address)

        context = authority.server("issuer", "127.0.0.1")
        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"https://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def issuer(stub: Stub) -> Iterator[Issuer]:
    with closing(Issuer(stub.authority)) as made:
        yield made


def kubeconfig(stub: Stub, **settings: str) -> Path:
    named = {key.replace("_", "-"): value for key, value in settings.items()}
    return stub.kubeconfig({"auth-provider": {"name": "oidc", "config": named}})


def refreshable(stub: Stub, url: str, **more: str) -> Path:
    login = {"id_token": token(-60), "refresh_token": "once", "client_id": "cli", "idp_issuer_url": url, **more}
    return kubeconfig(stub, **{"idp_certificate_authority": str(stub.authority.certificate), **login})


def get(path: Path) -> None:
    with closing(Api(load(path), timeout=3.0)) as api:
        assert api.get(f"{THINGS}/a")["spec"] == {"n": 1}


def test_a_valid_id_token_needs_nothing_else(stub: Stub) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    valid = token(60)
    stub.authorization = f"Bearer {valid}"
    get(kubeconfig(stub, id_token=valid))


def test_an_expired_id_token_is_refreshed_and_kept_for_kubectl(stub: Stub, issuer: Issuer) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    new = token(3600, "renewed")
    stub.authorization = f"Bearer {new}"
    issuer.answer = 200, {"id_token": new, "refresh_token": "twice", "access_token": "x", "token_type": "Bearer"}
    path = refreshable(stub, issuer.url)
    path.chmod(0o640)
    before = yaml.safe_load(path.read_text())
    get(path)
    assert [(asked["grant_type"], asked["refresh_token"]) for asked in issuer.asked] == [(["refresh_token"], ["once"])]
    after = yaml.safe_load(path.read_text())
    config = before["users"][0]["user"]["auth-provider"]["config"]
    config |= {"id-token": new, "refresh-token": "twice"}
    assert after == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    get(path)
    assert len(issuer.asked) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "no id-token: log in again"),
        ({"id_token": "abc"}, "the id-token is not a JWT: log in again"),
        ({"id_token": "a.!.c"}, "the id-token is not a JWT: log in again"),
        ({"id_token": token(-60)}, "the id-token has expired, and there is no idp-issuer-url: log in again"),
    ],
)
def test_a_login_that_has_ended_says_so(stub: Stub, settings: dict[str, str], says: str) -> None:
    path = kubeconfig(stub, **settings)
    with pytest.raises(OvsmeshError, match=f"{path}: context test: user: auth-provider oidc: {says}"):
        get(path)
    assert stub.log == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((400, {"error": "invalid_grant", "error_description": "token revoked"}), "token revoked"),
        ((500, {}), "log in again"),
        ((200, {"access_token": "x", "token_type": "Bearer"}), "log in again"),
        ((200, {"id_token": token(-5), "access_token": "x", "token_type": "Bearer"}), "gave no new id-token"),
    ],
)
def test_an_issuer_that_refuses_is_an_error(
    stub: Stub, issuer: Issuer, answer: tuple[int, dict[str, Any]], says: str
) -> None:
    issuer.answer = answer
    with pytest.raises(OvsmeshError, match=f"{issuer.url}.*{says}"):
        get(refreshable(stub, issuer.url))


def test_an_issuer_that_nobody_vouches_for_learns_nothing(stub: Stub, issuer: Issuer) -> None:
    """The library alone would ask it for its token endpoint, unchecked, and send the refresh token there."""
    path = refreshable(stub, issuer.url)
    tree = yaml.safe_load(path.read_text())
    del tree["users"][0]["user"]["auth-provider"]["config"]["idp-certificate-authority"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(OvsmeshError, match="CERTIFICATE_VERIFY_FAILED"):
        get(path)
    assert (issuer.discoveries, issuer.asked) == (0, [])


def test_an_issuer_that_says_nothing_is_not_waited_for(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(OvsmeshError, match=rf"{url} did not answer within 0\.3 s"):
            get(refreshable(stub, url))


def test_a_kubeconfig_that_cannot_be_written_is_said(
    stub: Stub, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    issuer.answer = 200, {"id_token": token(3600), "access_token": "x", "token_type": "Bearer"}

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(oidc, "write_atomic", refuse)
    get(refreshable(stub, issuer.url))
    assert "the refreshed OIDC tokens cannot be saved" in caplog.text
