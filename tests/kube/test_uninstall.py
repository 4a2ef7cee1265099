"""What makes an agent remove what it made: its own Namespace being deleted, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ovsmesh.agent.reconciler import readable
from ovsmesh.agent.uninstall import NAMESPACES, ON_DELETE, UninstallWatch
from ovsmesh.kube.client import Api
from tests.support import apikit
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(apikit.make_api)
OURS = f"{NAMESPACES}/ovsmesh"
GOING = "2026-01-01T00:00:00Z"


@pytest.fixture
def home(stub: Stub, api: Api) -> Iterator[UninstallWatch]:
    stub.put(OURS, {})
    made = UninstallWatch(api, "ovsmesh")
    eventually(lambda: made._reflector.collection().current)
    yield made
    made.close()


def test_the_namespace_being_deleted_is_told_at_once(stub: Stub, home: UninstallWatch) -> None:
    assert not home.leaving()
    assert not readable([home.fd])
    stub.put(OURS, {}, deletionTimestamp=GOING)
    assert readable([home.fd], 5.0)
    assert home.leaving()
    stub.remove(OURS)
    stub.answers = [(403, b"{}", {})]
    assert home.ask(), "what was seen once holds"


def test_a_namespace_that_says_keep_is_no_reason(stub: Stub, home: UninstallWatch) -> None:
    stub.put(OURS, {}, annotations={ON_DELETE: "keep"}, deletionTimestamp=GOING)
    eventually(lambda: home._reflector.events == 1)
    assert not home.ask()
    assert not readable([home.fd])


def test_another_namespace_is_no_reason(stub: Stub, home: UninstallWatch) -> None:
    stub.put(f"{NAMESPACES}/other", {}, deletionTimestamp=GOING)
    eventually(lambda: home._reflector.events == 1)
    assert not home.ask()


def test_a_namespace_that_is_not_there_is_no_reason(stub: Stub, home: UninstallWatch) -> None:
    # an API server with an older copy of everything knows of no ovsmesh either
    stub.remove(OURS)
    eventually(lambda: home._reflector.events == 1)
    assert not home.ask()
    assert not readable([home.fd])


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_no_answer_is_no_reason(stub: Stub, home: UninstallWatch, code: int) -> None:
    stub.answers = [(code, json.dumps({"kind": "Status", "code": code}).encode(), {})]
    assert not home.ask()


def test_an_api_server_that_is_away_is_no_reason(stub: Stub, home: UninstallWatch) -> None:
    stub.down()
    assert not home.ask()


def test_who_stops_asks_once_more(stub: Stub, home: UninstallWatch) -> None:
    home._reflector.close()
    stub.put(OURS, {}, deletionTimestamp=GOING)
    assert not home.leaving()
    assert home.ask()
