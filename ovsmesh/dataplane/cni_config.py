"""Write the CNI conflist that plugs a node's pods into kbr0, and judge the files of other networks beside it.

A runtime reads the directory's *.conf, *.conflist and *.json in the order of their names and uses the first. Where
that is malformed, containerd stops at it; CRI-O goes on to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ovsmesh.dataplane.docker_config import cni_bounds
from ovsmesh.dataplane.types import KBR, CniFacts, CniPlugin, Facts, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPNetwork, gateway
from ovsmesh.reasons import Reason
from ovsmesh.text import listed, printable

FILE = "10-ovsmesh.conflist"
NETWORK = "ovsmesh"
"""Ownership mark: the network's name in the file of that name; also of host-local's store."""
SUFFIXES = (".conf", ".conflist", ".json")
REQUIRED = ("bridge", "host-local")
PORTMAP = "portmap"
LOOPBACK = "loopback"
PLUGINS = (*REQUIRED, PORTMAP, LOOPBACK)
_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions that the file is valid for; earlier ones give a pod one address."""
_PLAIN = "1.0.0"
"""The newest version that every runtime knows. A later one is offered in `cniVersions`, which old runtimes ignore."""
_SHOWN = 3
_shown = partial(printable, most=80)
"""Makes a text out of another's file fit for a log and a terminal."""


class File(NamedTuple):
    """A file of the CNI directory: its bytes, or why it can't be read."""

    data: bytes
    why: str = ""


def missing(plugins: Iterable[CniPlugin]) -> list[CniPlugin]:
    """Return the required plugins that are not usable."""
    return [plugin for plugin in plugins if plugin.name in REQUIRED and plugin.why]


def versions(plugins: Iterable[CniPlugin]) -> tuple[str, ...]:
    """Return the CNI versions that all plugins support and the file can be written in, ascending."""
    every = [set(plugin.versions) for plugin in plugins]
    return tuple(v for v in _VERSIONS if all(v in one for one in every))


def _used(plugins: Iterable[CniPlugin]) -> list[CniPlugin]:
    """Return the plugins that the file names: portmap only where a version in common is left with it."""
    able = {plugin.name: plugin for plugin in plugins if not plugin.why}
    used = [able[name] for name in REQUIRED]
    more = [*used, able[PORTMAP]] if PORTMAP in able else used
    return more if versions(more) else used


def writable(plugins: Sequence[CniPlugin]) -> bool:
    """Return whether a conflist can be written for these plugins."""
    return not missing(plugins) and bool(versions(_used(plugins)))


def desired(pod_cidrs: Sequence[IPNetwork], facts: Facts, mtu: int) -> dict[str, str]:
    """Return the conflist by its file name; none where CNI is left alone, or required plugins are missing.

    Where they are missing, a file that exists stays: without a conflist no pod could even be deleted.
    """
    if facts.cni is None:
        return {}
    if not writable(facts.cni.plugins):
        return {FILE: facts.cni.kept} if facts.cni.kept else {}
    bounds = cni_bounds(pod_cidrs, facts)
    return {FILE: _render(_used(facts.cni.plugins), pod_cidrs, bounds, mtu)}


def _render(
    plugins: Sequence[CniPlugin],
    pod_cidrs: Sequence[IPNetwork],
    bounds: Mapping[IPNetwork, Mapping[str, str]],
    mtu: int,
) -> str:
    """Return the conflist's text. `bounds`: see cni_bounds.

    The agent manages kbr0's address, its MAC and the masquerade: the plugin only plugs. A pod's default route goes to
    the gateway that host-local returns with each address, and host-local never gives that one out.
    """
    common = versions(plugins)
    plain = [v for v in common if v <= _PLAIN]
    ranges: dict[int, list[dict[str, str]]] = {}
    for cidr in pod_cidrs:
        # a pod gets one address out of each set: one of each family
        part = {"subnet": str(cidr), "gateway": str(gateway(cidr)), **bounds.get(cidr, {})}
        ranges.setdefault(cidr.version, []).append(part)
    routes = [{"dst": "0.0.0.0/0" if family == 4 else "::/0"} for family in ranges]
    bridge = {
        "type": "bridge",
        "bridge": KBR,
        "isGateway": False,
        "ipMasq": False,
        # a pod can reach itself through a Service
        "hairpinMode": True,
        "mtu": mtu,
        "ipam": {"type": "host-local", "ranges": list(ranges.values()), "routes": routes},
    }
    chain: list[dict[str, Any]] = [bridge]
    if any(plugin.name == PORTMAP for plugin in plugins):
        chain.append({"type": PORTMAP, "capabilities": {"portMappings": True}, "snat": True})
    head: dict[str, Any] = {"cniVersion": (plain or common)[-1]}
    if common[-1] > _PLAIN:
        head["cniVersions"] = [v for v in common if v >= "0.4.0"]
    return json.dumps({**head, "name": NETWORK, "plugins": chain}, indent=2) + "\n"


def problems(cni: CniFacts) -> Iterator[Problem]:
    """Yield what is missing for a conflist, or for all that a runtime needs."""
    stays = f"; {FILE} stays as it is" if cni.kept else ""
    if gone := missing(cni.plugins):
        names = ", ".join(f"{plugin.name} ({plugin.why})" for plugin in gone)
        text = f"no CNI conflist can be written: plugins are missing: {names}{stays}"
        yield Problem(Reason.CNIPluginsMissing, f"{text}; install containernetworking-plugins, or give --cni-bin-dir")
    elif not versions(_used(cni.plugins)):
        found = "; ".join(f"{plugin.name}: {', '.join(plugin.versions) or 'none'}" for plugin in _used(cni.plugins))
        text = f"the CNI plugins have no version in common ({found}); all need one of {', '.join(_VERSIONS)}"
        yield Problem(Reason.CNIVersionMissing, f"{text}{stays}: upgrade them")
    else:
        used = {plugin.name for plugin in _used(cni.plugins)}
        for plugin in cni.plugins:
            if plugin.name == PORTMAP and PORTMAP not in used:
                why = plugin.why or f"supports none of the others' versions, only {', '.join(plugin.versions)}"
                yield Problem(Reason.CNIPluginMissing, f"plugin {PORTMAP}: {why}; hostPort of pods does not work")
            elif plugin.name == LOOPBACK and plugin.why:
                why = f"{plugin.why}; containerd before 2.0 starts no pod without it"
                yield Problem(Reason.CNIPluginMissing, f"plugin {LOOPBACK}: {why}")


@dataclass(frozen=True, slots=True)
class ConflistStatus:
    """The state of the conflist, for a reader of the status."""

    path: str
    state: str
    """"written", "waits" (until all else is in place), "differs", or, where plugins are missing, "kept" or "none"."""
    version: str = ""
    plugins: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return path, state and contents in one line."""
        about = [self.state, self.version and f"version {self.version}", ", ".join(self.plugins)]
        return f"{self.path} ({'; '.join(filter(None, about))})"


def conflist_status(cni: CniFacts, want: Mapping[str, str], have: Mapping[str, str]) -> ConflistStatus:
    """Compare the wanted conflist with the one on disk."""
    wanted_text, found = want.get(FILE, ""), have.get(FILE, "")
    if not wanted_text or cni.kept:
        state = "kept" if found else "none"
    else:
        state = "written" if wanted_text == found else "differs" if found else "waits"
    fields = dict(summary(found or wanted_text)) if found or wanted_text else {}
    plugins = tuple(filter(None, fields.get("plugins", "").split(",")))
    return ConflistStatus(f"{cni.directory}/{FILE}", state, fields.get("version", ""), plugins)


# What the directory holds


def _network(name: str, file: File) -> tuple[str, str, dict[str, Any] | None]:
    """Return a file's network, what the runtime would find wrong with it, and the JSON object where it is one."""
    if file.why:
        return "", f"can't be read: {file.why}", None
    try:
        found = json.loads(file.data)
    except (ValueError, RecursionError):
        return "", "is empty" if not file.data.strip() else "is not JSON", None
    if not isinstance(found, dict):
        return "", "is no JSON object", None
    network = found.get("name")
    network = _shown(network) if isinstance(network, str) else ""
    if name.endswith(".conflist"):
        plugins = found.get("plugins")
        chain = [p.get("type") for p in plugins if isinstance(p, dict)] if isinstance(plugins, list) else []
        bad = "" if chain and all(isinstance(t, str) and t for t in chain) else "names no plugins"
    else:
        bad = "" if isinstance(found.get("type"), str) and found["type"] else "has no plugin type"
    return network, bad, found


def judge(directory: str, files: Mapping[str, File]) -> tuple[dict[str, str], list[Unmanaged], list[Problem]]:
    """Return the managed file, an unmanaged one in its place, and what the other files do to it.

    Managed is the file with the managed name and network, and also one with that name and no network at all: nobody
    can use that one, and the runtime would stop at it.
    """
    managed: dict[str, str] = {}
    unmanaged: list[Unmanaged] = []
    problems: list[Problem] = []
    after: list[str] = []
    for name in sorted(files):
        network, bad, found = _network(name, files[name])
        where = f"{directory}/{name}"
        if name == FILE:
            if files[name].why:
                unmanaged.append(Unmanaged("cni", FILE, f"{where} {bad}; remove it, and ovsmesh writes its own"))
            elif found is None or found.get("name") == NETWORK:
                managed[FILE] = files[name].data.decode(errors="replace")
            else:
                text = f"{where} is of network {network or '?'}, not of {NETWORK}; rename or remove it"
                unmanaged.append(Unmanaged("cni", FILE, text))
        elif name < FILE:
            does = f"it {bad}, and containerd stops at it" if bad else f"its network {network or '?'} wins"
            text = f"{where} comes before {FILE}, so pods are not plugged into {KBR}: {does}"
            problems.append(Problem(Reason.CNIOverruled, f"{text}; remove it when that network is gone, or rename it"))
        else:
            after.append(name)
    if after:
        which = f"{listed(after, _SHOWN)} in {directory}"
        does = f"not used, as {FILE} comes first" if FILE in managed else f"used until {FILE} is written"
        problems.append(Problem(Reason.CNILeftover, f"{which}: {does}"))
    return managed, unmanaged, problems


def summary(conf: str) -> list[tuple[str, str]]:
    """Return what a reader of a plan wants to know of a conflist, as pairs of field and text."""
    network, bad, found = _network(FILE, File(conf.encode()))
    if bad or found is None:
        return [("network", network), ("version", ""), ("mtu", ""), ("ranges", ""), ("plugins", bad)]
    chain = [p for p in found["plugins"] if isinstance(p, dict)]
    mtu = chain[0].get("mtu")
    ipam = chain[0].get("ipam")
    sets = ipam.get("ranges") if isinstance(ipam, dict) else None
    every = [r for one in sets if isinstance(one, list) for r in one] if isinstance(sets, list) else []
    subnets = [_shown(r.get("subnet")) for r in every if isinstance(r, dict)]
    return [
        ("network", network),
        ("version", _shown(found.get("cniVersion") or "")),
        ("mtu", _shown(mtu if mtu is not None else "")),
        ("ranges", ",".join(subnets)),
        (
            "plugins",
            ",".join(_shown(p["type"]) for p in (chain[0], ipam, *chain[1:]) if isinstance(p, dict) and "type" in p),
        ),
    ]
