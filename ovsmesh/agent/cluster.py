"""The agent's Kubernetes backend: API server, mesh from MeshSlices, MeshNode, and the end of the agent's Namespace."""

from __future__ import annotations

import threading

from ovsmesh.agent.meshnode import MeshNodeWriter
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api, Object, path_of
from ovsmesh.kube.reflector import Reflector
from ovsmesh.kube.service_account import ServiceAccount
from ovsmesh.mesh.slice_source import SliceSource
from ovsmesh.wakeup import Wakeup

NAMESPACES = "/api/v1/namespaces"
ON_DELETE = "ovsmesh.io/on-delete"
"""Annotation of the Namespace: with "keep", nodes stay as they are when it is deleted."""
_ASK_SECONDS = 2.0
START = 1.0
"""Most seconds that a start waits for the mesh. The last good one is taken after half of that."""


class UninstallWatch:
    """Watches for the deletion of the agent's own Namespace. `fd` is readable once that was seen.

    Deletion of the Namespace is the only unambiguous signal to uninstall: it is deliberate and final, and no roll-out,
    drain, empty list or absent API server looks like it. The watch is open before the deletion, as the agent's
    permission to ask goes with the Namespace.
    """

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._deleted = threading.Event()
        self._wakeup, self._unused = Wakeup(), Wakeup()
        self._reflector: Reflector[bool] = Reflector(
            api, NAMESPACES, self._take, self._unused, fields=f"metadata.name={namespace}"
        )
        self._reflector.start()

    @property
    def fd(self) -> int:
        """The file descriptor that is readable once the deletion was seen."""
        return self._wakeup.fd

    def _take(self, found: Object) -> bool:
        """Take in a Namespace. A deletion once seen holds, as the Namespace itself may be gone next."""
        about = found["metadata"]
        kept = (about.get("annotations") or {}).get(ON_DELETE) == "keep"
        # the server's filter is not relied on
        if about["name"] == self._namespace and about.get("deletionTimestamp") and not kept:
            self._deleted.set()
            self._wakeup.wake()
        return self._deleted.is_set()

    def deleted(self) -> bool:
        """Return whether the deletion was seen."""
        return self._deleted.is_set()

    def ask(self) -> bool:
        """Return the same after one question to the API server, as the watch may be behind. No answer is a no."""
        if not self._deleted.is_set():
            try:
                self._take(self._api.within(_ASK_SECONDS).get(path_of(NAMESPACES, self._namespace)))
            except (OvsmeshError, KeyError, TypeError, AttributeError):
                # absent, not allowed, or not what was asked for
                return False
        return self._deleted.is_set()

    def close(self) -> None:
        """Stop watching."""
        self._reflector.close()
        for wakeup in (self._wakeup, self._unused):
            wakeup.close()


class KubernetesBackend:
    """What an agent has in a cluster besides what it has with a mesh file."""

    def __init__(self, api: Api, state_dir: str, node: str, patience: float, pod: bool) -> None:
        self._api = api
        self.source = SliceSource(api, state_dir, node)
        self.source.settled(patience)
        self.writer = MeshNodeWriter(api, node, self.source.observed).start()
        self.uninstall = UninstallWatch(api, api.namespace) if pod else None
        """None outside of a pod: the agent belongs to no Namespace."""

    def close(self) -> None:
        """Close all of it; the MeshNode stays."""
        if self.uninstall:
            self.uninstall.close()
        self.writer.close()
        self.source.close()
        self._api.close()


def connect(kubeconfig: str, state_dir: str, node: str, patience: float = START) -> KubernetesBackend:
    """Return the backend of the cluster that `kubeconfig` names, "" for the cluster of this pod.

    Wait for a mesh, for `patience` seconds at most, so that the first reconcile has one. Raise OvsmeshError if the
    configuration can't be used. An API server that is away is no error.
    """
    if kubeconfig:
        from ovsmesh.kube.config import load  # an agent in a pod needs none of it

        transport = load(kubeconfig)
    elif account := ServiceAccount.find():
        transport = account.transport()
    else:
        raise OvsmeshError("no cluster: there is no service account here; give --kubeconfig FILE")
    return KubernetesBackend(Api(transport, "ovsmesh-agent"), state_dir, node, patience, pod=not kubeconfig)
