"""A container runtime as far as CNI goes: reads the directory as containerd does, and runs the plugins.

It follows the CNI specification (1.0.0, sections 1 to 4). Each plugin runs in a host's network
namespace, with its result kept as libcni keeps it, for DEL.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovsmesh.lab import netns

BIN = Path(os.environ.get("OVSMESH_TEST_CNI_BIN", "/usr/lib/cni"))
"""Debian's plugins, or others to try the tests with."""
SUFFIXES = (".conf", ".conflist", ".json")
_TIMEOUT = 60.0


class CniError(Exception):
    """What a plugin, or the reading of the directory, failed with."""


@dataclass
class Runtime:
    """One host's: `ns` is its network namespace, `store` where host-local keeps what it gave out."""

    ns: str
    directory: Path
    store: Path
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Pod → the result of its ADD."""
    ports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def conflist(self) -> dict[str, Any]:
        """The network that a runtime uses: the first file by name. Raises CniError when there is none or it is bad."""
        files = sorted(p for p in self.directory.iterdir() if p.suffix in SUFFIXES) if self.directory.is_dir() else []
        if not files:
            raise CniError(f"no network in {self.directory}")
        try:
            found: dict[str, Any] = json.loads(files[0].read_text())
        except ValueError as error:
            raise CniError(f"{files[0]}: {error}") from error
        if not found.get("plugins"):
            raise CniError(f"{files[0]}: no plugins")
        return found

    def add(self, pod: str, ports: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """ADD of every plugin of the chain, for a namespace that is there; `ports` are (hostPort, containerPort).

        Raises CniError.
        """
        conf, result = self.conflist(), None
        self.ports[pod] = [{"hostPort": h, "containerPort": c, "protocol": "tcp"} for h, c in ports]
        for plugin in conf["plugins"]:
            result = self._call("ADD", conf, plugin, pod, result)
        assert result is not None
        self.results[pod] = result
        return result

    def delete(self, pod: str) -> None:
        """DEL in reverse, with the result that ADD gave. Raises CniError."""
        conf = self.conflist()
        for plugin in reversed(conf["plugins"]):
            self._call("DEL", conf, plugin, pod, self.results.get(pod))
        self.results.pop(pod, None)

    def check(self, pod: str) -> None:
        """CHECK: the plugins say that the pod is still plugged in. Raises CniError."""
        conf = self.conflist()
        for plugin in conf["plugins"]:
            self._call("CHECK", conf, plugin, pod, self.results[pod])

    def add_all(self, pods: list[str], at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self.add, pods))

    def reserved(self) -> set[str]:
        """The addresses that host-local has given out."""
        return {p.name for p in self.store.rglob("*") if re.fullmatch(r"[0-9.]+|[0-9a-f:]+", p.name)}

    def _call(self, verb: str, conf: dict[str, Any], plugin: dict[str, Any], pod: str, before: Any) -> dict[str, Any]:
        # as libcni 1.2 and newer: the highest that is offered
        version = max([conf["cniVersion"], *conf.get("cniVersions", [])])
        given = {"cniVersion": version, "name": conf["name"], **plugin}
        if "ipam" in given:
            # the machine's own store is not the test's to fill
            given["ipam"] = {**given["ipam"], "dataDir": str(self.store)}
        if given.pop("capabilities", {}).get("portMappings") and self.ports.get(pod):
            given["runtimeConfig"] = {"portMappings": self.ports[pod]}
        if before is not None:
            given["prevResult"] = before
        env = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": pod,
            "CNI_NETNS": f"/run/netns/{pod}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(BIN),
            "PATH": os.environ["PATH"],
        }
        argv = ["ip", "netns", "exec", self.ns, str(BIN / plugin["type"])]
        done = subprocess.run(
            argv, input=json.dumps(given), capture_output=True, text=True, env=env, timeout=_TIMEOUT, check=False
        )
        if done.returncode:
            raise CniError(f"{verb} {plugin['type']} {pod}: {done.stdout or done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return found


def addresses(result: dict[str, Any]) -> list[str]:
    """The addresses of a result, without prefix lengths."""
    return [entry["address"].partition("/")[0] for entry in result["ips"]]


def namespaces(names: list[str]) -> None:
    for name in names:
        netns.run(["ip", "netns", "add", name])
        netns.run(["ip", "link", "set", "lo", "up"], name)
