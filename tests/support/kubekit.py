"""What the tests on a real API server share: the manifests applied, a clean cluster, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.support.controlplane import ControlPlane

MANIFESTS = Path(__file__).parents[2] / "manifests"
GROUP = "/apis/ovsmesh.io/v1alpha1"
NAMESPACE = "ovsmesh"
_WIPED = (
    f"{GROUP}/meshes",
    f"{GROUP}/meshslices",
    f"{GROUP}/meshnodes",
    "/api/v1/nodes",
    "/apis/coordination.k8s.io/v1/namespaces/ovsmesh/leases",
    "/api/v1/namespaces/default/events",
    "/api/v1/namespaces/ovsmesh/events",
    "/apis/events.k8s.io/v1/namespaces/default/events",
)


def install(plane: ControlPlane) -> None:
    """Applies the manifests, whole and once a control plane, and waits until the API serves our kinds."""
    done = plane.folder / "installed"
    if done.exists():
        return
    plane.kubectl("apply", "--server-side", "-f", str(MANIFESTS / "rendered.yaml"))
    plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=120s")
    done.touch()


def wipe(plane: ControlPlane) -> None:
    """Removes what tests make: Nodes, pods, Leases, Events, and all objects of ours."""
    pods = plane.call("GET", f"/api/v1/namespaces/{NAMESPACE}/pods").body.get("items", ())
    for pod in pods:
        name = pod["metadata"]["name"]
        plane.call("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}?gracePeriodSeconds=0")
    for path in _WIPED:
        plane.call("DELETE", path)


def eventually(
    check: Callable[[], object], seconds: float = 60.0, every: float = 0.05, why: Callable[[], object] = str
) -> None:
    """Waits until `check()` is true; fails with what it was last, or raised last, and with what `why` gives."""
    deadline = time.monotonic() + seconds
    while not (last := check()):
        assert time.monotonic() < deadline, f"not so after {seconds} s: {check.__name__} is {last!r} {why()}"
        time.sleep(every)
