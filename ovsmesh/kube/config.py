"""Reach an API server by kubeconfig, through the `kubernetes` library: whatever kubectl takes.

Here is what the library gets wrong: merging several files, exec plugins (exec_plugin), OIDC refresh (oidc), tokens from
files, impersonation, private keys in a shared folder, retries that sleep as long as a server asks. The library is
imported at the first request, so an agent in a pod or with a mesh file never loads it.
"""

from __future__ import annotations

import base64
import binascii
import gc
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3
import yaml

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import exec_plugin, oidc
from ovsmesh.kube.http import KEPT_CONNECTIONS, SOCKET_OPTIONS, Headers, Session, Transport, read_token, tls_context
from ovsmesh.kube.service_account import ServiceAccount

log = logging.getLogger("ovsmesh")

_MAX_BYTES = 4 << 20
"""Bytes of a kubeconfig."""
_FILES = {"cluster": ("certificate-authority",), "user": ("client-certificate", "client-key", "tokenFile")}
"""Fields that name files, relative to the kubeconfig that they stand in."""
_DATA = {"cluster": ("certificate-authority-data",), "user": ("client-certificate-data", "client-key-data")}
"""Fields in base64; each is stronger than the file of the same name."""
_HEADER_NAME = "!#$&'*+-.^_`|~"
"""What client-go leaves unescaped in the name of an Impersonate-Extra header, beside letters and digits (RFC 7230)."""


@dataclass(frozen=True, slots=True)
class Context:
    """One context of a kubeconfig with its cluster and its user; the paths in them are absolute."""

    name: str
    cluster: dict[str, Any]
    user: dict[str, Any]
    namespace: str
    where: str
    """The files and the context, for messages."""
    source: tuple[str, str] = ("", "")
    """The file that the user stands in, and the user's name."""


def find(kubeconfig: str | None = None) -> Transport:
    """Return the way to the API server that kubectl would take. Raises OvsmeshError.

    That is `kubeconfig`, else the files of $KUBECONFIG, else the pod's service account, else ~/.kube/config.
    """
    if kubeconfig:
        return load(kubeconfig)
    named = [name for name in os.environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    if named:
        return load(*named)
    account = ServiceAccount.find()
    if account is not None:
        # No proxy, whatever the environment names: the server is inside the cluster.
        cluster = {"server": account.server, "certificate-authority": account.ca, "proxy-url": ""}
        inside = Context("", cluster, {"tokenFile": account.token}, account.namespace, "service account")
        return _transport(inside, lambda: inside)
    home = Path.home() / ".kube" / "config"
    if home.exists():
        return load(home)
    raise OvsmeshError(f"no API server is known: give --kubeconfig FILE or set KUBECONFIG ({home} does not exist)")


def load(*files: str | os.PathLike[str], context: str = "") -> Transport:
    """Return the way to the server of the current (or the named) context of the merged kubeconfig files.

    Of several files, those that do not exist are skipped, as kubectl does. Raises OvsmeshError, which names the file,
    the context and the field.
    """
    names = [os.fspath(name) for name in files]
    first = read_context(names, context)
    # Read again after a 401, for the same context, whatever `kubectl config use-context` did in between.
    return _transport(first, lambda: read_context(names, first.name))


def _transport(first: Context, again: Callable[[], Context]) -> Transport:
    contexts = iter([first])
    return Transport(lambda: _open(next(contexts, None) or again()), _server(first), first.namespace)


# ---------------------------------------------------------------- reading and merging


def read_context(files: Sequence[str], context: str = "") -> Context:
    """Return a context of the merged files; "" is the current one. Raises OvsmeshError."""
    present = [name for name in files if len(files) == 1 or os.path.exists(name)]
    if not present:
        raise OvsmeshError(f"none of the kubeconfig files exists: {', '.join(files)}")
    trees = [(name, _read(name)) for name in present]
    where = ":".join(present)
    # The first file wins for each name, as with kubectl (the library takes the last current-context, set or not).
    name = context or next((str(tree["current-context"]) for _, tree in trees if tree.get("current-context")), "")
    if not name:
        raise OvsmeshError(f"{where}: current-context is not set: set it with `kubectl config use-context NAME`")
    where = f"{where}: context {name}"
    chosen, _ = _entry(trees, "context", name, where)
    cluster, _ = _entry(trees, "cluster", chosen.get("cluster"), where)
    user, file = _entry(trees, "user", chosen["user"], where) if chosen.get("user") else ({}, "")
    namespace = str(chosen.get("namespace") or "default")
    return Context(name, cluster, user, namespace, where, (file, str(chosen.get("user"))))


def _read(name: str) -> dict[str, Any]:
    try:
        with open(name, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise OvsmeshError(f"{name}: kubeconfig cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise OvsmeshError(f"{name}: not a kubeconfig: more than {_MAX_BYTES} bytes")
    try:
        tree = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OvsmeshError(f"{name}: not a kubeconfig: not valid YAML ({str(error).splitlines()[0]})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise OvsmeshError(f"{name}: not a kubeconfig: expected a mapping with clusters, users and contexts")
    return tree


def _entry(
    trees: Sequence[tuple[str, dict[str, Any]]], kind: str, name: object, where: str
) -> tuple[dict[str, Any], str]:
    """Return the first entry of this name in clusters, users or contexts, and the file that it stands in."""
    for file, tree in trees:
        entries = tree.get(f"{kind}s")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and entry.get("name") == name and isinstance(entry.get(kind), dict):
                return _resolved(kind, entry[kind], Path(file).resolve().parent, f"{where}: {kind} {name}"), file
    raise OvsmeshError(f"{where}: {kind}s has no entry named {str(name)[:80]!a}")


def _resolved(kind: str, entry: dict[str, Any], base: Path, where: str) -> dict[str, Any]:
    """Return the entry with absolute paths and without empty fields. Raises OvsmeshError where data is not base64."""
    made = {key: value for key, value in entry.items() if value not in (None, "")}
    for key in _DATA.get(kind, ()):
        try:
            base64.b64decode(str(made.get(key, "")), validate=True)
        except (binascii.Error, ValueError):
            raise OvsmeshError(f"{where}: {key} is not base64") from None
        if key in made:
            made.pop(key.removesuffix("-data"), None)
    for key in _FILES.get(kind, ()):
        if key in made:
            made[key] = str(base / str(made[key]))
            if not os.path.isfile(made[key]):
                raise OvsmeshError(f"{where}: {key}: no file {made[key]}")
    plugin = made.get("exec")
    if isinstance(plugin, dict) and "/" in str(plugin.get("command", "")):
        made["exec"] = {**plugin, "command": str(base / str(plugin["command"]))}
    return made


def _server(context: Context) -> str:
    url = str(context.cluster.get("server") or "")
    try:
        found = urlsplit(url)
        valid = found.scheme in ("https", "http") and bool(found.hostname) and found.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise OvsmeshError(f"{context.where}: cluster: server {url[:80]!a}: expected https://HOST:PORT")
    return url


# ---------------------------------------------------------------- through the library


def _open(context: Context) -> Session:
    """Return a session: run the plugin, read the files, refresh the OIDC token. Raises OvsmeshError."""
    if "kubernetes" not in sys.modules:
        # only loaded here, all of it: what follows below takes names out of it
        import kubernetes.config  # noqa: F401

        # The collector need not walk through the library again: that was 18 % of the CPU of two lists of 500 Nodes.
        gc.collect()
        gc.freeze()
    from kubernetes.client import ApiClient, ApiException, Configuration

    # As kubectl: no credentials in clear text.
    secure = _server(context).startswith("https:")
    user, expires = _login(context) if secure else ({}, math.inf)
    configuration = Configuration()
    tls = _load(context, user, configuration)
    # The context has the certificates; else urllib3 would read them again for each connection.
    configuration.ssl_ca_cert = configuration.cert_file = configuration.key_file = None
    # Its own retries would sleep for as long as a server's Retry-After says, and follow redirects.
    configuration.retries = False
    configuration.connection_pool_maxsize = KEPT_CONNECTIONS
    configuration.socket_options = SOCKET_OPTIONS
    if configuration.proxy and configuration.proxy.startswith("socks5:"):
        # As in kubectl, the proxy resolves the server's name.
        configuration.proxy = f"socks5h:{configuration.proxy.removeprefix('socks5:')}"
    try:
        client = ApiClient(configuration)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise OvsmeshError(f"{context.where}: proxy {configuration.proxy!a}: {error}") from error
    client.rest_client.pool_manager.connection_pool_kw["ssl_context"] = tls
    headers = Headers()
    for name, value in _impersonation(context):
        headers.add(name, value)
    client.update_params_for_auth(headers, None, ["BearerToken"], "", "", None)

    def send(method: str, url: str, headers: Headers, body: object, timeout: float) -> urllib3.BaseHTTPResponse:
        try:
            response: urllib3.BaseHTTPResponse = client.call_api(
                method, url, headers, body, _request_timeout=(timeout, timeout)
            ).response
        except ApiException as error:
            # how the library wraps a TLS error
            raise urllib3.exceptions.SSLError(error.__context__ or error.reason) from error
        return response

    files = [
        str(part[key])
        for kind, part in (("cluster", context.cluster), ("user", context.user))
        for key in _FILES[kind]
        if key in part
    ]
    return Session(send, headers, client.close, files, expires)


def _login(context: Context) -> tuple[dict[str, Any], float]:
    """Return the user with the credentials of its file, plugin or provider, and the time.time() at which they end."""
    user = context.user
    if "tokenFile" in user:
        # Stronger than a token beside it, as with kubectl.
        return {**user, "token": read_token(user["tokenFile"], f"{context.where}: user: tokenFile")}, math.inf
    if "auth-provider" in user:
        return oidc.fresh(user, context.where, context.source), math.inf
    if "exec" in user and "token" not in user:
        found = exec_plugin.run(user["exec"], context.cluster, f"{context.where}: user")
        return {**user, **found.user}, found.expires
    return user, math.inf


def _load(context: Context, user: dict[str, Any], configuration: Any) -> Any:
    """Fill the library's configuration in and return the TLS context."""
    from kubernetes.config import ConfigException, load_kube_config_from_dict

    user = {key: value for key, value in user.items() if key not in ("exec", "auth-provider", "tokenFile")}
    parts = {"cluster": context.cluster, "user": user, "context": {"cluster": "this", "user": "this"}}
    tree = {f"{kind}s": [{"name": "this", kind: part}] for kind, part in parts.items()}
    # The library writes keys from the kubeconfig to files; this folder is private and goes once OpenSSL has read them.
    with tempfile.TemporaryDirectory(prefix="ovsmesh-") as private:
        try:
            load_kube_config_from_dict(
                {**tree, "current-context": "this"}, client_configuration=configuration, temp_file_path=private
            )
            if not configuration.verify_ssl:
                log.warning("%s: insecure-skip-tls-verify: the server's certificate is not checked", context.where)
                urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            return tls_context(
                configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file, configuration.verify_ssl
            )
        except (ConfigException, TypeError, AttributeError) as error:
            raise OvsmeshError(f"{context.where}: {error}") from error
        except (OSError, ValueError) as error:
            # ssl.SSLError is an OSError; a certificate that is not PEM is either
            raise OvsmeshError(f"{context.where}: a certificate or key cannot be used: {error}") from error


def _impersonation(context: Context) -> Iterator[tuple[str, str]]:
    """Yield the Impersonate headers of as, as-uid, as-groups and as-user-extra, which the library ignores."""
    user = context.user
    groups, extra = user.get("as-groups") or [], user.get("as-user-extra") or {}
    found = [("Impersonate-User", user.get("as")), ("Impersonate-Uid", user.get("as-uid"))]
    if not isinstance(groups, list) or not isinstance(extra, dict):
        raise OvsmeshError(f"{context.where}: user: expected as-groups as a list and as-user-extra as a mapping")
    found += [("Impersonate-Group", group) for group in groups]
    for key, values in extra.items():
        name = f"Impersonate-Extra-{quote(str(key), safe=_HEADER_NAME)}"
        found += [(name, value) for value in (values if isinstance(values, list) else [values])]
    headers = [(name, str(value)) for name, value in found if value]
    if headers and not user.get("as"):
        raise OvsmeshError(f"{context.where}: user: as-uid, as-groups and as-user-extra need `as`, who to act as")
    for name, value in headers:
        if not value.isprintable():
            raise OvsmeshError(f"{context.where}: user: {name}: {value[:80]!a} has control characters")
        # http.client writes Latin-1; kubectl sends UTF-8
        yield name, value.encode().decode("latin-1")
