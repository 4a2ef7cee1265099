"""Knows what an agent in a cluster needs more than one with a file: its API server, its slices, its MeshNode, its home.

Imported only where there is a cluster. Imports kube, kubehome, sourcekube and meshnode; never ovs or pyroute2.
"""

from __future__ import annotations

from ovsmesh.agent.meshnode import MeshNodeWriter
from ovsmesh.agent.uninstall import UninstallWatch
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api
from ovsmesh.kube.service_account import ServiceAccount
from ovsmesh.mesh.slice_source import SliceSource

START = 1.0
"""Seconds that a start waits for the mesh at most: a last good one is taken after half of that."""


class KubernetesBackend:
    """An agent's end of its cluster."""

    def __init__(self, api: Api, state_dir: str, node: str, patience: float, pod: bool) -> None:
        self._api = api
        self.source = SliceSource(api, state_dir, node)
        self.source.settled(patience)
        self.writer = MeshNodeWriter(api, node, self.source.observed).start()
        self.home = UninstallWatch(api, api.namespace) if pod else None
        """What is taken away with its Namespace; None outside of a pod, where it belongs to none."""

    def close(self) -> None:
        if self.home:
            self.home.close()
        self.writer.close()
        self.source.close()
        self._api.close()


def connect(kubeconfig: str, state_dir: str, node: str, patience: float = START) -> KubernetesBackend:
    """The cluster that `kubeconfig` names, "" for the one that this pod is in, as seen from `node`.

    Waits `patience` seconds for a mesh at most, so that a first turn has something to do. Raises OvsmeshError
    where the configuration can't be used; an API server that is away is no error.
    """
    if kubeconfig:
        from ovsmesh.kube.config import load  # an agent in a pod needs none of it

        transport = load(kubeconfig)
    elif account := ServiceAccount.find():
        transport = account.transport()
    else:
        raise OvsmeshError("no cluster: there is no service account here; give --kubeconfig FILE")
    return KubernetesBackend(Api(transport, "ovsmesh-agent"), state_dir, node, patience, pod=not kubeconfig)
