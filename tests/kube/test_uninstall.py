"""What makes an agent remove what it made: its own Namespace being deleted, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ovsmesh.agent.cluster import NAMESPACES, ON_DELETE, UninstallWatch
from ovsmesh.agent.reconciler import readable
from ovsmesh.kube.client import Api
from tests.support import apikit
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(apikit.make_api)
OURS = f"{NAMESPACES}/ovsmesh"
GOING = "2026-01-01T00:00:00Z"


@pytest.fixture
def watch(stub: Stub, api: Api) -> Iterator[UninstallWatch]:
    stub.put(OURS, {})
    made = UninstallWatch(api, "ovsmesh")
    eventually(lambda: made._reflector.collection().current)
    yield made
    made.close()


def test_the_namespace_being_deleted_is_told_at_once(stub: Stub, watch: UninstallWatch) -> None:
    assert not watch.deleted()
    assert not readable([watch.fd])
    stub.put(OURS, {}, deletionTimestamp=GOING)
    assert readable([watch.fd], 5.0)
    assert watch.deleted()
    stub.remove(OURS)
    stub.answers = [(403, b"{}", {})]
    assert watch.ask(), "what was seen once holds"


def test_a_namespace_that_says_keep_is_no_reason(stub: Stub, watch: UninstallWatch) -> None:
    stub.put(OURS, {}, annotations={ON_DELETE: "keep"}, deletionTimestamp=GOING)
    eventually(lambda: watch._reflector.events == 1)
    assert not watch.ask()
    assert not readable([watch.fd])


def test_another_namespace_is_no_reason(stub: Stub, watch: UninstallWatch) -> None:
    stub.put(f"{NAMESPACES}/other", {}, deletionTimestamp=GOING)
    eventually(lambda: watch._reflector.events == 1)
    assert not watch.ask()


def test_a_namespace_that_is_not_there_is_no_reason(stub: Stub, watch: UninstallWatch) -> None:
    # an API server with an older copy of everything knows of no ovsmesh either
    stub.remove(OURS)
    eventually(lambda: watch._reflector.events == 1)
    assert not watch.ask()
    assert not readable([watch.fd])


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_no_answer_is_no_reason(stub: Stub, watch: UninstallWatch, code: int) -> None:
    stub.answers = [(code, json.dumps({"kind": "Status", "code": code}).encode(), {})]
    assert not watch.ask()


def test_an_api_server_that_is_away_is_no_reason(stub: Stub, watch: UninstallWatch) -> None:
    stub.down()
    assert not watch.ask()


def test_an_agent_that_stops_asks_once_more(stub: Stub, watch: UninstallWatch) -> None:
    watch._reflector.close()
    stub.put(OURS, {}, deletionTimestamp=GOING)
    assert not watch.deleted()
    assert watch.ask()
