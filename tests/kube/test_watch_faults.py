"""Watches of a real API server that send 410 or garbage, or stall; tokens that rotate: controller and agent follow.

Both with the manifests' own service accounts, through a proxy that meddles; no slice is emptied meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from tenacity import wait_random_exponential

from ovsmesh.controller.controller import Controller
from ovsmesh.kube import reflector
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from ovsmesh.kube.reflector import Reflector
from ovsmesh.mesh.slice_source import SliceSource
from tests.support import slicekit
from tests.support.controllerkit import Cluster, mesh, node
from tests.support.fault_proxy import FAULTS, STALL, Meddler
from tests.support.kubekit import GROUP, NAMESPACE, eventually

pytestmark = pytest.mark.kube

state = pytest.fixture(slicekit.make_state)
SILENCE = 3.0
"""Instead of 90 s: what a stalled watch is found out by."""


@contextmanager
def running(config: Path) -> Iterator[Controller]:
    """A controller in a thread of this process, since none of its options makes it less patient."""
    stop = os.eventfd(0)
    with closing(Api(load(config))) as api, closing(Controller(api, "meddled")) as made:
        thread = threading.Thread(target=made.run, args=(stop,))
        thread.start()
        try:
            yield made
        finally:
            os.eventfd_write(stop, 1)
            thread.join(20)
            os.close(stop)


def names(source: SliceSource) -> list[str]:
    found = source.snapshot()
    return [n.name for n in found.mesh.nodes] if found.mesh and found.confirmed else []


def test_whatever_a_watch_does_all_follow(kube: Cluster, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Reflector.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Reflector.__init__.__kwdefaults__, "silence", SILENCE)
    # Some faults one after the other would be backed off from for half a minute.
    monkeypatch.setattr(reflector, "_BACKOFF", wait_random_exponential(multiplier=0.2, max=1.0, min=0.05))
    plane = kube.plane
    kube.add(mesh("10.97.0.0/16"))
    for number in range(3):
        kube.add(node(f"web{number}", f"192.0.2.{number + 1}", f"10.97.{number}.0/24"))
    with ExitStack() as ending:
        meddler = ending.enter_context(Meddler(plane))
        configs = {
            account: meddler.config(plane.token_kubeconfig(account, plane.agent_token("web0", account=account)))
            for account in ("ovsmesh-controller", "ovsmesh-agent")
        }
        controller = ending.enter_context(running(configs["ovsmesh-controller"]))
        api = ending.enter_context(closing(Api(load(configs["ovsmesh-agent"]))))
        source = ending.enter_context(closing(SliceSource(api, state, "web0", silence=SILENCE)))
        wanted = ["web0", "web1", "web2"]
        eventually(lambda: names(source) == wanted)
        least = [len(wanted)]

        def follow() -> bool:
            found = sorted(kube.members())
            least[0] = min(least[0], len(found))
            return found == wanted and names(source) == wanted

        for number, fault in enumerate((*FAULTS, "cut", STALL), start=3):
            # Meshes, Nodes, MeshSlices and MeshNodes of the controller, MeshSlices of the agent.
            eventually(lambda: len(meddler.watches()) >= 5)
            meddler.do(fault)
            kube.add(node(f"web{number}", f"192.0.2.{number + 1}", f"10.97.{number}.0/24"))
            kube.remove(f"web{number - 1}")
            wanted = ["web0", "web1", f"web{number}"]
            began = time.monotonic()
            try:
                eventually(follow)
            except AssertionError:
                pytest.fail(f"after {fault}: slices have {sorted(kube.members())}, the agent {names(source)}")
            print(f"{fault}: followed after {time.monotonic() - began:.2f} s")
        assert least[0] >= 2
        assert controller.lease.is_leader
        assert kube.whole()


def test_tokens_that_rotate(kube: Cluster, state: Path) -> None:
    """The old ones end with the pods that they are bound to; who goes on has read the new ones."""
    plane = kube.plane
    kube.add(mesh("10.97.0.0/16"))
    kube.add(node("web0", "192.0.2.1", "10.97.0.0/24"))
    with ExitStack() as ending:
        meddler = ending.enter_context(Meddler(plane))
        accounts = {"rotates": "ovsmesh-controller", "rotates-agent": "ovsmesh-agent"}
        old = {name: plane.agent_token("web0", account=account) for name, account in accounts.items()}
        configs = {name: meddler.config(plane.token_kubeconfig(name, token)) for name, token in old.items()}
        controller = ending.enter_context(running(configs["rotates"]))
        api = ending.enter_context(closing(Api(load(configs["rotates-agent"]))))
        source = ending.enter_context(closing(SliceSource(api, state, "web0")))
        eventually(lambda: names(source) == ["web0"])

        for name, account in accounts.items():
            pod = f"/api/v1/namespaces/{NAMESPACE}/pods/{account}-web0?gracePeriodSeconds=0"
            assert plane.call("DELETE", pod).status == 200
            fresh = plane.token_file(name).with_suffix(".fresh")
            fresh.write_text(plane.agent_token("web0", account=account))
            fresh.rename(plane.token_file(name))
        # The API server remembers for 10 s that a token was good.
        for token in old.values():
            eventually(lambda token=token: plane.call("GET", f"{GROUP}/meshslices", token=token).status == 401, 30, 0.5)  # type: ignore[misc]
        assert controller.lease.is_leader
        eventually(lambda: len(meddler.watches()) >= 5)
        meddler.cut()
        kube.add(node("web1", "192.0.2.2", "10.97.1.0/24"))
        eventually(lambda: names(source) == ["web0", "web1"])
        assert controller.lease.is_leader
