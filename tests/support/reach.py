"""How tests reach an API server as anyone: by client certificate, by service account token, by kubectl.

tests/support/controlplane.py runs the API server.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.errors import OvsmeshError
from ovsmesh.lab import netns
from tests.support import built
from tests.support.pki import Authority, kubeconfig, subject

ADMIN = "admin"
MASTERS = "system:masters"

_CALL_SECONDS = 30.0


class ControlPlaneError(OvsmeshError):
    """A program of the control plane did not do what was asked; the text ends with its log."""


class Answer(NamedTuple):
    """What the API server answered."""

    status: int
    body: dict[str, Any]

    @property
    def reason(self) -> str:
        """ "NotFound", "Forbidden", "Invalid", …; "" for a success."""
        return str(self.body.get("reason", "")) if self.status >= 400 else ""

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class Reach:
    """The API server at `address` and `port`, inside the network namespace `ns` ("" is this process's own)."""

    def __init__(self, folder: Path, address: str, port: int, ns: str) -> None:
        self.folder, self.address, self.port, self.ns = folder, address, port, ns
        host = f"[{address}]" if ":" in address else address
        self.url = f"https://{host}:{port}"
        self.authority = Authority(folder / "pki")
        self.ca = self.authority.certificate
        self._contexts: dict[str, ssl.SSLContext] = {}

    def inside(self) -> list[str]:
        """What stands before a command that is to run where the API server is."""
        return ["ip", "netns", "exec", self.ns] if self.ns else []

    # ------------------------------------------------------------ identities

    def kubeconfig(self, user: str = ADMIN, *groups: str) -> Path:
        """For a user with a client certificate; `admin` is in system:masters, who may do everything."""
        path = self.folder / f"{user.replace(':', '-')}.kubeconfig"
        if not path.exists():
            certificate, key = self._certificate(user, groups)
            who = {"client-certificate": str(certificate), "client-key": str(key)}
            path.write_text(json.dumps(kubeconfig(self.url, self.ca, who), indent=1))
        return path

    def _certificate(self, user: str, groups: Sequence[str]) -> tuple[Path, Path]:
        member = groups or ((MASTERS,) if user == ADMIN else ())
        return self.authority.sign(user.replace(":", "-"), subject(user, member))

    def token(
        self, account: str, node: str = "", pod: str = "", namespace: str = "ovsmesh", seconds: int = 3600
    ) -> str:
        """A token of the service account, by TokenRequest, as kubelets get them.

        With `node` it is bound to that Node (which must exist) and carries its name as a claim; with `pod`, to
        that Pod of the namespace, and carries the name of the Pod's node. Raises ControlPlaneError.
        """
        spec: dict[str, Any] = {"expirationSeconds": seconds}
        if pod or node:
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod" if pod else "Node", "name": pod or node}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        answer = self.call("POST", path, body)
        if answer.status != 201:
            raise ControlPlaneError(f"no token for {namespace}/{account}: {answer.message}")
        return str(answer.body["status"]["token"])

    def agent_token(self, node: str, account: str = "ovsmesh-agent", namespace: str = "ovsmesh") -> str:
        """A token as the agent's pod on `node` has it: bound to a Pod on that node, which is made if need be."""
        name = f"{account}-{node}"
        container = {"name": "main", "image": "none"}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"serviceAccountName": account, "nodeName": node, "containers": [container]},
        }
        answer = self.call("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        if answer.status not in (201, 409):
            raise ControlPlaneError(f"no pod {namespace}/{name}: {answer.message}")
        return self.token(account, pod=name, namespace=namespace)

    def token_kubeconfig(self, name: str, token: str) -> Path:
        """Return a kubeconfig whose token is in a file beside it: token_file(name), which may be written again."""
        self.token_file(name).write_text(token)
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(kubeconfig(self.url, self.ca, {"tokenFile": str(self.token_file(name))}, True)))
        return path

    def token_file(self, name: str) -> Path:
        return self.folder / f"{name}.token"

    def service_account_folder(self, name: str, token: str, namespace: str = "ovsmesh") -> Path:
        """A folder as every pod finds it mounted: token, ca.crt, namespace."""
        folder = self.folder / f"{name}.serviceaccount"
        folder.mkdir(exist_ok=True)
        (folder / "token").write_text(token)
        (folder / "ca.crt").write_bytes(self.ca.read_bytes())
        (folder / "namespace").write_text(namespace)
        return folder

    # ------------------------------------------------------------ asking

    def kubectl(
        self, *arguments: str, text: str = "", config: Path | None = None, check: bool = True, timeout: float = 150.0
    ) -> str:
        """What kubectl prints (with check=False: its errors too). Raises ControlPlaneError where it fails."""
        argv = [
            *self.inside(),
            str(built.control_plane()["kubectl"]),
            f"--kubeconfig={config or self.kubeconfig()}",
            *arguments,
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("KUBE", "HTTP", "http"))}
        environment["HOME"] = str(self.folder)  # where it keeps what it knows of the API's kinds
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
        if check and done.returncode:
            raise ControlPlaneError(f"kubectl {' '.join(arguments)}: exit {done.returncode}: {done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        token: str = "",
        user: str = ADMIN,
        content_type: str = "application/json",
        timeout: float = _CALL_SECONDS,
    ) -> Answer:
        """One request over a connection of its own, as the token's holder or, without one, as `user`.

        Raises OSError where there is no answer.
        """
        connection = self.connection("" if token else user, timeout)
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            self.connect(connection)
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        try:
            parsed = json.loads(data) if data else {}
        except ValueError:
            parsed = {"message": data.decode(errors="replace")}
        return Answer(response.status, parsed if isinstance(parsed, dict) else {"value": parsed})

    def connection(self, user: str, timeout: float) -> http.client.HTTPSConnection:
        """Not yet connected; `user` "" shows no certificate."""
        context = self._contexts.get(user)
        if context is None:
            context = ssl.create_default_context(cafile=str(self.ca))
            if user:
                context.load_cert_chain(*self._certificate(user, ()))
            self._contexts[user] = context
        return http.client.HTTPSConnection(self.address, self.port, timeout=timeout, context=context)

    def connect(self, connection: http.client.HTTPConnection) -> None:
        """Connects it, inside the namespace where there is one."""
        if self.ns:
            netns.within(self.ns, connection.connect)
        else:
            connection.connect()
