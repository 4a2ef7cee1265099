"""Run the exec plugin of a kubeconfig user (EKS, GKE, AKS and others) and return the credentials that it prints.

Instead of the library's, which logs a failure and goes on without credentials, has no deadline, and forgets when a
client certificate ends. The protocol: https://kubernetes.io/docs/reference/access-authn-authz/authentication/
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.errors import OvsmeshError
from ovsmesh.text import printable

SECONDS, INTERACTIVE_SECONDS = 60.0, 300.0
"""How long a plugin may take; the second where someone sits at the terminal and may have to log in."""
_CLUSTER_FIELDS = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url")
_FIELDS = ("token", "clientCertificateData", "clientKeyData")
_EXTENSION = "client.authentication.k8s.io/exec"


class Credentials(NamedTuple):
    """What a plugin gives."""

    user: dict[str, str]
    """As fields of a kubeconfig's user: token, or client-certificate-data and client-key-data, or all three."""
    expires: float
    """time.time() at which they end; infinity where the plugin does not say."""


def run(spec: object, cluster: Mapping[str, Any], where: str) -> Credentials:
    """Run the plugin that a user's `exec` describes. Raises OvsmeshError with the plugin's own words."""
    if not isinstance(spec, dict) or not spec.get("command") or not spec.get("apiVersion"):
        raise OvsmeshError(f"{where}: exec: expected a mapping with command and apiVersion")
    command, version = str(spec["command"]), str(spec["apiVersion"])
    where = f"{where}: exec plugin {command}"
    interactive = spec.get("interactiveMode") != "Never" and sys.stdin is not None and sys.stdin.isatty()
    info: dict[str, Any] = {"interactive": interactive}
    if spec.get("provideClusterInfo"):
        info["cluster"] = _cluster(cluster)
    try:
        environment = {str(entry["name"]): str(entry["value"]) for entry in spec.get("env") or ()}
        arguments = [str(argument) for argument in spec.get("args") or ()]
    except (TypeError, KeyError):
        raise OvsmeshError(f"{where}: expected args as a list and env as a list of name and value") from None
    credential = {"apiVersion": version, "kind": "ExecCredential", "spec": info}
    environment = {**os.environ, **environment, "KUBERNETES_EXEC_INFO": json.dumps(credential)}
    output = _output([command, *arguments], environment, interactive, where, str(spec.get("installHint") or ""))
    return _parse(output, version, where)


def _cluster(cluster: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: cluster[key] for key in _CLUSTER_FIELDS if key in cluster}
    if "certificate-authority" in cluster:
        with contextlib.suppress(OSError):  # the request that follows names the file
            data = Path(cluster["certificate-authority"]).read_bytes()
            made["certificate-authority-data"] = base64.b64encode(data).decode()
    extensions = cluster.get("extensions")
    for extension in extensions if isinstance(extensions, list) else ():
        if isinstance(extension, dict) and extension.get("name") == _EXTENSION:
            made["config"] = extension.get("extension")
    return made


def _output(argv: list[str], environment: dict[str, str], interactive: bool, where: str, hint: str) -> bytes:
    """Return what the command prints; its errors go to the terminal where someone sits at it."""
    seconds = INTERACTIVE_SECONDS if interactive else SECONDS
    try:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=None if interactive else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if interactive else subprocess.PIPE,
            # A group of its own ends with its children, but must not read from the terminal.
            process_group=None if interactive else 0,
        )
    except OSError as error:
        raise OvsmeshError(f"{where}: cannot be run: {error.strerror}. {hint}".rstrip(". ")) from error
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill() if interactive else os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OvsmeshError(f"{where}: no answer within {seconds:g} s") from error
            raise
    if process.returncode:
        words = _words(errors or b"") or ("see above" if interactive else "it printed nothing")
        raise OvsmeshError(f"{where}: exit {process.returncode}: {words}. {hint}".rstrip(". "))
    return output


def _parse(output: bytes, version: str, where: str) -> Credentials:
    # What it printed is not shown: it may hold a token.
    try:
        found = json.loads(output)
        kind, given, status = found["kind"], found["apiVersion"], found["status"]
        token, certificate, key = (status.get(field) for field in _FIELDS)
        ends = status.get("expirationTimestamp")
        expires = datetime.fromisoformat(ends).timestamp() if ends else math.inf
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise OvsmeshError(f"{where}: it printed no ExecCredential with a status, as JSON") from None
    if (kind, given) != ("ExecCredential", version):
        raise OvsmeshError(f"{where}: expected an ExecCredential of {version}, found a {kind} of {given}")
    user = {"token": str(token).strip()} if token else {}
    if certificate and key:
        for name, pem in (("client-certificate-data", certificate), ("client-key-data", key)):
            user[name] = base64.b64encode(str(pem).encode()).decode()
    if not user:
        raise OvsmeshError(f"{where}: it gave neither a token nor a client certificate with its key")
    if not user.get("token", "").isprintable():
        raise OvsmeshError(f"{where}: it gave a token with control characters")
    return Credentials(user, expires)


def _words(data: bytes) -> str:
    """Return the end of what a plugin wrote, fit for one line."""
    return printable(" ".join(data.decode(errors="replace").split())[-500:])
