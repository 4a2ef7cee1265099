"""What tests of the API client share: a stub and a real server, clients of both, reflectors that end in time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import load
from ovsmesh.kube.http import Transport
from ovsmesh.kube.leader_election import LeaderElector, Timing
from ovsmesh.kube.reflector import Reflector
from ovsmesh.kube.service_account import ServiceAccount
from ovsmesh.wakeup import Wakeup
from tests.support.controlplane import ControlPlane
from tests.support.kubestub import Stub

THINGS = "/apis/test/v1/things"


def make_stub(tmp_path: Path) -> Iterator[Stub]:
    made = Stub(tmp_path)
    yield made
    made.close()


KUBECONFIG, SERVICE_ACCOUNT = "kubeconfig", "service account"
TRANSPORTS = (KUBECONFIG, SERVICE_ACCOUNT)


def transport_to(stub: Stub, kind: str, token: str = "t") -> Transport:
    """The way to the stub through the library or as an agent in a pod goes; its token stands in `folder`/token."""
    if kind == KUBECONFIG:
        file = stub.folder / "token"
        file.write_text(token)
        return load(stub.kubeconfig({"tokenFile": str(file)}))
    account = ServiceAccount.find(*pod(stub, token))
    assert account is not None
    return account.transport()


def pod(stub: Stub, token: str = "t") -> tuple[dict[str, str], Path]:
    """Environment and service account folder of a pod whose API server is the stub."""
    (stub.folder / "token").write_text(token)
    (stub.folder / "namespace").write_text("ovsmesh")
    shutil.copy(stub.authority.certificate, stub.folder / "ca.crt")
    return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(stub.port)}, stub.folder


def make_api(stub: Stub, request: pytest.FixtureRequest) -> Iterator[Api]:
    """A fixture with params=TRANSPORTS, or without: then as an agent in a pod."""
    made = Api(transport_to(stub, getattr(request, "param", SERVICE_ACCOUNT)), timeout=3.0)
    yield made
    made.close()


def spec_of(found: Object) -> int:
    value: int = found["spec"]["n"]
    return value + 0


Watch = Callable[..., Reflector[int]]


def make_watch(api: Api) -> Iterator[Watch]:
    made: list[tuple[Reflector[int], Wakeup]] = []

    def make(**options: Any) -> Reflector[int]:
        wakeup = Wakeup()
        reflector = Reflector(api, THINGS, spec_of, wakeup, **{"silence": 2.0, "seconds": 30, **options})
        made.append((reflector, wakeup))
        reflector.start()
        return reflector

    yield make
    for reflector, wakeup in made:
        reflector.close()
        assert not reflector._thread.is_alive()
        wakeup.close()


def items(reflector: Reflector[int]) -> dict[str, int]:
    return dict(reflector.collection().items)


def make_real(cluster: ControlPlane) -> Iterator[Api]:
    with closing(Api(load(cluster.kubeconfig()), timeout=3.0)) as made:
        yield made


FAST = Timing(duration=2, deadline=1.2, retry=0.2)


def lease_of(api: Api, who: str, told: list[str], times: Timing = FAST) -> LeaderElector:
    return LeaderElector(
        api, "ovsmesh", "ovsmesh-controller", who, lambda leads: told.append(f"{who} {'on' if leads else 'off'}"), times
    )
