"""Knows whether the installation that an agent belongs to is being taken away: its own Namespace is being deleted.

That is the one word that nothing else can be taken for: it is given on purpose, can't be taken back, and comes
with no roll-out, no drain, no empty list and no API server that is away. The watch is open before the word is
given, since what lets the agent ask goes in the same moment. Imports kube and kubewatch; never ovs or pyroute2.
"""

from __future__ import annotations

import threading

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api, Object, path_of
from ovsmesh.kube.reflector import Reflector, Wakeup

NAMESPACES = "/api/v1/namespaces"
ON_DELETE = "ovsmesh.io/on-delete"
"""Annotation of the Namespace: "keep" leaves nodes as they are when it is deleted."""
_ASK_SECONDS = 2.0


def leaving(namespace: Object) -> bool:
    """Whether this Namespace is going, and what it brought to the nodes with it."""
    about = namespace["metadata"]
    return bool(about.get("deletionTimestamp")) and (about.get("annotations") or {}).get(ON_DELETE) != "keep"


class UninstallWatch:
    """The Namespace `namespace`. `fd` is readable from when it is seen to be leaving."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._leaving = threading.Event()
        self._bell, self._unheard = Wakeup(), Wakeup()
        self._reflector: Reflector[bool] = Reflector(
            api, NAMESPACES, self._project, self._unheard, fields=f"metadata.name={namespace}"
        )
        self._reflector.start()

    @property
    def fd(self) -> int:
        return self._bell.fd

    def _project(self, found: Object) -> bool:
        # what was seen once holds: the next that is heard of it may be that it is gone
        # whose Namespace it is, is not left to the server's filter
        if found["metadata"]["name"] == self._namespace and leaving(found):
            self._leaving.set()
            self._bell.wake()
        return self._leaving.is_set()

    def leaving(self) -> bool:
        return self._leaving.is_set()

    def ask(self) -> bool:
        """As leaving(), after one question to the API server, as the watch may be behind; no answer is a no."""
        if not self._leaving.is_set():
            try:
                self._project(self._api.within(_ASK_SECONDS).get(path_of(NAMESPACES, self._namespace)))
            except (OvsmeshError, KeyError, TypeError, AttributeError):
                # not to be heard, not allowed, or not what was asked for: it stays
                return False
        return self._leaving.is_set()

    def close(self) -> None:
        self._reflector.close()
        for bell in (self._bell, self._unheard):
            bell.close()
