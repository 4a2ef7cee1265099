"""The addresses of what a user names: an address, a node, a Docker container, a Kubernetes pod."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from ipaddress import ip_address

from ovsmesh.containers.docker_api import container_addresses
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api, NotFound, path_of
from ovsmesh.kube.config import find
from ovsmesh.mesh.types import IPAddress, Mesh
from ovsmesh.text import instead, printable
from ovsmesh.trace import places

_DEADLINE = 5.0
"""Seconds for the API server."""


def addresses(mesh: Mesh, name: str, docker: str, kubeconfig: str | None) -> tuple[str, tuple[IPAddress, ...]]:
    """Return what the user called it, "" for an address itself, and its addresses.

    `docker` is the path of Docker's socket. Raises OvsmeshError with what was looked at, where it is nothing that is
    known.
    """
    with contextlib.suppress(ValueError):
        return "", (ip_address(name),)
    shown = printable(name, 120)
    looked = []
    if "/" not in name:
        if found := places.of_node(mesh, name):
            return shown, found
        looked.append(f"no node of the mesh has this name: {instead(name, [node.name for node in mesh.nodes])}")
        container, why = _container(docker, name)
        if container:
            return shown, container
        looked.append(why)
    pod, why = _pod(name, kubeconfig)
    if pod:
        return shown, pod
    raise OvsmeshError(f"{shown}: {'; '.join([*looked, why])}")


def _parsed(texts: Iterable[object]) -> tuple[IPAddress, ...]:
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(ip_address(str(text)))
    return tuple(found)


def _container(docker: str, name: str) -> tuple[tuple[IPAddress, ...], str]:
    """Return the addresses of a container of this host, or why there are none."""
    try:
        found = container_addresses(docker, name)
    except OSError as error:
        return (), f"Docker was not asked ({docker}: {error.strerror or error})"
    if found is None:
        return (), "no Docker container of this host has it (for one of another host give its address)"
    return _parsed(
        found
    ), "the Docker container of this name has no address of its own: it does not run, or uses the host's network"


def _pod(name: str, kubeconfig: str | None) -> tuple[tuple[IPAddress, ...], str]:
    """Return the addresses of a pod of the cluster, or why there are none."""
    try:
        api = Api(find(kubeconfig), "ovsmesh-trace", _DEADLINE)
    except OvsmeshError as error:
        return (), f"no cluster was asked for a pod ({error})"
    namespace, _, pod = name.rpartition("/")
    namespace = namespace or api.namespace or "default"
    try:
        found = api.get(path_of("/api/v1/namespaces", namespace, "pods", pod))
    except NotFound:
        return (), f"no pod in namespace {printable(namespace, 80)} of {api.server} has it (give NAMESPACE/NAME)"
    except OvsmeshError as error:
        return (), f"the cluster was not asked for a pod ({error})"
    finally:
        api.close()
    status = found.get("status") or {}
    ips = [entry.get("ip") for entry in status.get("podIPs") or () if isinstance(entry, dict)]
    return _parsed(
        ips or [status.get("podIP")]
    ), f"the pod has no address yet; its phase is {printable(status.get('phase'), 40)}"
