"""Knows where the API server is and how to prove who we are: a kubeconfig, or what a pod is given.

Files named there are read again whenever they change, so a token or certificate that rotates is
taken up by the next request. Imports model only; the network is kube's.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import yaml

from ovsmesh.errors import OvsmeshError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_UNSUPPORTED = ("exec", "auth-provider", "username", "password")
_MOST = 4 << 20
"""Bytes of a kubeconfig or of a file that one names."""


@dataclass(frozen=True, slots=True)
class Config:
    """Where the API server is and how to talk to it. Of each pair of data and file, the data holds."""

    host: str
    port: int
    ca_data: bytes = b""
    ca_file: str = ""
    token: str = ""
    token_file: str = ""
    cert_data: bytes = b""
    cert_file: str = ""
    key_data: bytes = b""
    key_file: str = ""
    server_name: str = ""
    """The name in the server's certificate, where it is not `host`."""
    namespace: str = "default"
    path: str = ""
    """What each path begins with, where the server lies behind a proxy."""
    where: str = "the service account"
    """Where this comes from, for messages."""

    @property
    def server(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}{self.path}"

    def bearer(self) -> str:
        """The token to send now, "" where a certificate proves who we are. Raises OvsmeshError."""
        return self.token or (_text(self.token_file, self.where).strip() if self.token_file else "")

    def signature(self) -> tuple[object, ...]:
        """What changes whenever one of the TLS files does."""
        return tuple(_stat(name) for name in (self.ca_file, self.cert_file, self.key_file) if name)

    def tls(self) -> ssl.SSLContext:
        """A context that checks the server against our CA, and no other. Raises OvsmeshError."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            ca = self.ca_data or (_bytes(self.ca_file, self.where) if self.ca_file else b"")
            if ca:
                context.load_verify_locations(cadata=ca.decode("ascii"))
            else:
                context.load_default_certs()
            if self.cert_data or self.cert_file:
                with contextlib.ExitStack() as stack:
                    cert = stack.enter_context(_unwritten(self.cert_data)) if self.cert_data else self.cert_file
                    key = stack.enter_context(_unwritten(self.key_data)) if self.key_data else self.key_file
                    context.load_cert_chain(cert, key or None)
        except (OSError, ValueError) as error:
            # ssl.SSLError is an OSError; a certificate that is not PEM is either
            raise OvsmeshError(f"{self.where}: its certificates can't be used: {error}") from error
        return context


@contextlib.contextmanager
def _unwritten(data: bytes) -> Iterator[str]:
    """A path that holds `data` and never was on a disk: the ssl module takes keys from files only."""
    handle = os.memfd_create("ovsmesh", os.MFD_CLOEXEC)
    try:
        os.write(handle, data)
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _stat(name: str) -> object:
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _bytes(name: str, where: str) -> bytes:
    try:
        with open(name, "rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise OvsmeshError(f"{where}: {name} can't be read: {error.strerror}") from error
    if len(data) > _MOST:
        raise OvsmeshError(f"{where}: {name} has more than {_MOST} bytes")
    return data


def _text(name: str, where: str) -> str:
    try:
        return _bytes(name, where).decode("ascii")
    except UnicodeError as error:
        raise OvsmeshError(f"{where}: {name} holds no token: it is not ASCII") from error


def in_cluster(environment: Mapping[str, str] | None = None, directory: Path = SERVICE_ACCOUNT) -> Config | None:
    """What a pod is given; None outside one."""
    env = os.environ if environment is None else environment
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (directory / "token").exists():
        return None
    if not port.isascii() or not port.isdigit():
        raise OvsmeshError(f"KUBERNETES_SERVICE_PORT is {port!a}: wanted a port number")
    namespace = "default"
    with contextlib.suppress(OSError):
        namespace = (directory / "namespace").read_text().strip() or namespace
    return Config(
        host, int(port), ca_file=str(directory / "ca.crt"), token_file=str(directory / "token"), namespace=namespace
    )


def load(path: str | os.PathLike[str], context: str = "") -> Config:
    """The current (or the named) context of a kubeconfig. Raises OvsmeshError saying what it lacks."""
    where = os.fspath(path)
    try:
        tree = yaml.safe_load(_bytes(where, "kubeconfig"))
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise OvsmeshError(f"{where}: is no kubeconfig: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise OvsmeshError(f"{where}: is no kubeconfig: wanted a mapping with clusters, users and contexts")
    name = context or tree.get("current-context")
    if not name:
        _lacks(where, "current-context is not set: set it with `kubectl config use-context NAME`")
    chosen = _named(tree, "contexts", name, "context", where)
    cluster = _named(tree, "clusters", chosen.get("cluster"), "cluster", where)
    user = _named(tree, "users", chosen.get("user"), "user", where)
    for key in _UNSUPPORTED:
        if user.get(key):
            fix = "give a user with token, tokenFile or a client certificate (`kubectl create token` makes a token)"
            _lacks(where, f"user {chosen.get('user')} has `{key}`, which ovsmesh does not run: {fix}")
    if cluster.get("insecure-skip-tls-verify"):
        _lacks(where, "insecure-skip-tls-verify is not supported: give certificate-authority-data")
    if cluster.get("proxy-url"):
        _lacks(where, "proxy-url is not supported: use a kubeconfig that reaches the API server directly")
    base = Path(where).resolve().parent
    host, port, prefix = _server(cluster.get("server"), where)
    return Config(
        host,
        port,
        ca_data=_data(cluster, "certificate-authority-data", where),
        ca_file=_file(cluster, "certificate-authority", base),
        token=str(user.get("token") or ""),
        token_file=_file(user, "tokenFile", base),
        cert_data=_data(user, "client-certificate-data", where),
        cert_file=_file(user, "client-certificate", base),
        key_data=_data(user, "client-key-data", where),
        key_file=_file(user, "client-key", base),
        server_name=str(cluster.get("tls-server-name") or ""),
        namespace=str(chosen.get("namespace") or "default"),
        path=prefix,
        where=where,
    )


def _lacks(where: str, message: str) -> NoReturn:
    raise OvsmeshError(f"{where}: {message}")


def _named(tree: dict[str, Any], kind: str, name: object, inner: str, where: str) -> dict[str, Any]:
    entries = tree.get(kind)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(inner), dict):
            found: dict[str, Any] = entry[inner]
            return found
    _lacks(where, f"{kind} has no entry named {str(name)[:80]!a}")


def _server(url: object, where: str) -> tuple[str, int, str]:
    try:
        found = urlsplit(str(url or ""))
        port = found.port or 443
    except ValueError:
        _lacks(where, f"server {str(url)[:80]!a} is no URL")
    if found.scheme != "https" or not found.hostname:
        _lacks(where, f"server {str(url)[:80]!a}: wanted https://HOST:PORT")
    return found.hostname, port, found.path.rstrip("/")


def _data(entry: dict[str, Any], key: str, where: str) -> bytes:
    value = entry.get(key)
    try:
        return base64.b64decode(str(value), validate=True) if value else b""
    except binascii.Error:
        _lacks(where, f"{key} is not base64")


def _file(entry: dict[str, Any], key: str, base: Path) -> str:
    value = entry.get(key)
    return str(base / str(value)) if value else ""
