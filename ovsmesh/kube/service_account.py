"""The transport of an agent in a pod: the service account's token and CA, and nothing else.

Without the `kubernetes` library, as one such agent runs on every node.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.http import KEPT_CONNECTIONS, SOCKET_OPTIONS, Headers, Session, Transport, read_token, tls_context

DIRECTORY = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """What a pod is given: the server's URL, the files of the CA and the token, the namespace."""

    server: str
    ca: str
    token: str
    namespace: str

    @classmethod
    def find(cls, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> ServiceAccount | None:
        """Return this pod's, None outside a pod. Raises OvsmeshError."""
        env = os.environ if environment is None else environment
        directory = folder or DIRECTORY
        host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (directory / "token").exists():
            return None
        if not port.isascii() or not port.isdigit():
            raise OvsmeshError(f"KUBERNETES_SERVICE_PORT is {port!a}: expected a port number")
        namespace = "default"
        with contextlib.suppress(OSError):
            namespace = (directory / "namespace").read_text().strip() or namespace
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", str(directory / "ca.crt"), str(directory / "token"), namespace)

    def transport(self) -> Transport:
        """Return the way to the API server as this account. Its files are read at the first request."""
        return Transport(self._open, self.server, self.namespace)

    def _open(self) -> Session:
        token = read_token(self.token, "service account")
        try:
            tls = tls_context(self.ca)
        except (OSError, ValueError) as error:
            raise OvsmeshError(f"service account: CA {self.ca}: {error}") from error
        pool = urllib3.PoolManager(
            maxsize=KEPT_CONNECTIONS, retries=False, ssl_context=tls, socket_options=SOCKET_OPTIONS
        )

        def send(method: str, url: str, headers: Headers, body: object, timeout: float) -> urllib3.BaseHTTPResponse:
            data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
            deadline = urllib3.Timeout(connect=timeout, read=timeout)
            return pool.request(
                method, url, body=data, headers=headers, timeout=deadline, preload_content=False, redirect=False
            )

        headers = Headers({"Authorization": f"Bearer {token}"})
        return Session(send, headers, pool.clear, (self.token, self.ca))
