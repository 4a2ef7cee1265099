"""Refresh the id-token of a kubeconfig user with `auth-provider: oidc`, through the `kubernetes` library.

Around its faults: it asks the issuer without checking its certificate where none is given, has no deadline, and keeps
the new tokens to itself, so that the next kubectl finds a refresh token that was used already.
"""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import ssl
import threading
import time
from typing import Any

import yaml

from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import write_atomic

log = logging.getLogger("ovsmesh")

SECONDS = 30.0
"""How long a refresh may take."""
_EARLY = 10.0
"""Seconds before its end at which a token is refreshed, as kubectl does."""
_NEEDED = ("idp-issuer-url", "client-id", "refresh-token")


def fresh(user: dict[str, Any], where: str, source: tuple[str, str]) -> dict[str, Any]:
    """Return the user with a valid id-token as `token`. Raises OvsmeshError.

    `source` is the kubeconfig file and the user's name in it: new tokens are written there, as kubectl does.
    """
    provider = user["auth-provider"]
    name = provider.get("name") if isinstance(provider, dict) else provider
    if name != "oidc":
        text = f"auth-provider {str(name)[:80]!a} is not in kubectl any more: use the exec plugin of your provider"
        raise OvsmeshError(f"{where}: user: {text}")
    where = f"{where}: user: auth-provider oidc"
    settings = provider.get("config")
    if not isinstance(settings, dict) or not settings.get("id-token"):
        raise OvsmeshError(f"{where}: no id-token: log in again")
    ends = _expiry(str(settings["id-token"]), where)
    if time.time() + _EARLY >= ends:
        missing = [key for key in _NEEDED if not settings.get(key)]
        if missing:
            raise OvsmeshError(f"{where}: the id-token has expired, and there is no {missing[0]}: log in again")
        settings = _refresh(settings, where)
        _save(settings, *source)
    return {**user, "token": str(settings["id-token"])}


def _expiry(token: str, where: str) -> float:
    """Return the `exp` claim of a JWT in seconds since the epoch; infinity where it has none."""
    try:
        _, payload, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims.get("exp", "inf"))
    except (ValueError, TypeError, AttributeError):
        raise OvsmeshError(f"{where}: the id-token is not a JWT: log in again") from None


def _refresh(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings with new tokens from the issuer."""
    import certifi
    from kubernetes.client import Configuration
    from kubernetes.config import load_kube_config_from_dict

    made = {"client-secret": "", **copy.deepcopy(settings)}
    if "idp-certificate-authority-data" not in made:
        made.setdefault("idp-certificate-authority", ssl.get_default_verify_paths().cafile or certifi.where())
    provider = {"name": "oidc", "config": made}
    failure: list[BaseException] = []

    def refresh() -> None:
        try:
            tree = {
                "clusters": [{"name": "this", "cluster": {"server": "https://unused"}}],
                "users": [{"name": "this", "user": {"auth-provider": provider}}],
                "contexts": [{"name": "this", "context": {"cluster": "this", "user": "this"}}],
                "current-context": "this",
            }
            load_kube_config_from_dict(tree, client_configuration=Configuration())
        except Exception as error:  # noqa: BLE001 - four libraries' errors; shown to the user below
            failure.append(error)

    thread = threading.Thread(target=refresh, name="oidc", daemon=True)
    thread.start()
    # requests has no deadline of its own here; what is left behind ends with the connection or the process
    thread.join(SECONDS)
    if thread.is_alive():
        raise OvsmeshError(f"{where}: {made['idp-issuer-url']} did not answer within {SECONDS:g} s")
    if failure:
        raise OvsmeshError(f"{where}: {made['idp-issuer-url']}: {failure[0]}: log in again") from failure[0]
    if time.time() >= _expiry(str(made["id-token"]), where):
        raise OvsmeshError(f"{where}: {made['idp-issuer-url']} gave no new id-token: log in again")
    return {**settings, "id-token": made["id-token"], "refresh-token": made["refresh-token"]}


def _save(settings: dict[str, Any], file: str, name: str) -> None:
    """Write the new tokens into the kubeconfig; where that fails, say that kubectl will need a new login."""
    try:
        path = os.path.realpath(file)
        with open(path, "rb") as opened:
            tree = yaml.safe_load(opened)
            status = os.fstat(opened.fileno())
        user = next(entry["user"] for entry in tree["users"] if entry["name"] == name)
        user["auth-provider"]["config"].update(settings)
        text = yaml.safe_dump(tree, sort_keys=False)
        write_atomic(path, text, status.st_mode & 0o777, owner=(status.st_uid, status.st_gid))
    except (OSError, ValueError, KeyError, TypeError, StopIteration, yaml.YAMLError) as error:
        log.warning("%s: the refreshed OIDC tokens cannot be saved, kubectl may ask to log in again: %s", file, error)
