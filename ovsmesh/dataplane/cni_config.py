"""The CNI conflist that plugs a node's pods into kbr0, and what the other networks' files beside it mean.

Pure: text and what plugins answer in, text and problems out. Imports model only. The runtime reads the
directory's *.conf, *.conflist and *.json in the order of their names, uses the first, and stops at it when
it is malformed (containerd; CRI-O goes on to the next).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ovsmesh.dataplane.types import KBR, CniFacts, CniPlugin, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPNetwork
from ovsmesh.reasons import Reason

FILE = "10-ovsmesh.conflist"
NETWORK = "ovsmesh"
"""Ownership mark: the network's name in the file of that name; also of host-local's store."""
SUFFIXES = (".conf", ".conflist", ".json")
REQUIRED = ("bridge", "host-local")
PORTMAP = "portmap"
LOOPBACK = "loopback"
PLUGINS = (*REQUIRED, PORTMAP, LOOPBACK)
_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions of which the file is right; earlier ones give a pod one address."""
_PLAIN = "1.0.0"
"""Above it a runtime has to be asked: it reads `cniVersions`, which an older one does not know."""
_SHOWN = 3


class File(NamedTuple):
    """A file of the CNI directory: its bytes, or why it can't be read."""

    data: bytes
    why: str = ""


def plain(text: object, most: int = 80) -> str:
    """Someone else's text, fit for a log and a terminal: printable, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def missing(plugins: Iterable[CniPlugin]) -> list[CniPlugin]:
    """The plugins that a conflist can't do without, and that are not usable."""
    return [plugin for plugin in plugins if plugin.name in REQUIRED and plugin.why]


def versions(plugins: Iterable[CniPlugin]) -> tuple[str, ...]:
    """The CNI versions that all of them support and in which the file can be written, ascending."""
    every = [set(plugin.versions) for plugin in plugins]
    return tuple(v for v in _VERSIONS if all(v in one for one in every))


def _used(plugins: Iterable[CniPlugin]) -> list[CniPlugin]:
    """Those that the file names: portmap where it is, and where it does not forbid every version."""
    able = {plugin.name: plugin for plugin in plugins if not plugin.why}
    used = [able[name] for name in REQUIRED]
    more = [*used, able[PORTMAP]] if PORTMAP in able else used
    return more if versions(more) else used


def writable(plugins: Sequence[CniPlugin]) -> bool:
    """Whether a conflist can be written for these plugins."""
    return not missing(plugins) and bool(versions(_used(plugins)))


def wanted(
    cni: CniFacts,
    pod_cidrs: Sequence[IPNetwork],
    gateways: Sequence[str],
    mtu: int,
    ends: Mapping[IPNetwork, str] = MappingProxyType({}),
) -> dict[str, str]:
    """The conflist by its file name; none where plugins lack. `ends`: see render().

    One that is there stays while they do: without a conflist no pod could even be deleted.
    """
    if not writable(cni.plugins):
        return {FILE: cni.kept} if cni.kept else {}
    return {FILE: render(_used(cni.plugins), pod_cidrs, gateways, mtu, ends)}


def render(
    plugins: Sequence[CniPlugin],
    pod_cidrs: Sequence[IPNetwork],
    gateways: Sequence[str],
    mtu: int,
    ends: Mapping[IPNetwork, str] = MappingProxyType({}),
) -> str:
    """The conflist's text. `ends`: the last address that may be given out of a range whose rest is Docker's.

    kbr0's address, MAC and masquerade are the agent's: the plugin only plugs. A pod's default route goes to the
    gateway that host-local tells with each address, and host-local never hands that one out.
    """
    common = versions(plugins)
    plain = [v for v in common if v <= _PLAIN]
    ranges: dict[int, list[dict[str, str]]] = {}
    for cidr, gateway in zip(pod_cidrs, gateways, strict=True):
        # one address out of each set: one of each family
        end = {"rangeEnd": ends[cidr]} if cidr in ends else {}
        ranges.setdefault(cidr.version, []).append({"subnet": str(cidr), "gateway": gateway, **end})
    routes = [{"dst": "0.0.0.0/0" if family == 4 else "::/0"} for family in ranges]
    bridge = {
        "type": "bridge",
        "bridge": KBR,
        "isGateway": False,
        "ipMasq": False,
        # a pod reaches itself through a Service
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
    """What lacks for a conflist, or for all that a runtime wants."""
    lacks = missing(cni.plugins)
    stays = f"; {FILE} stays as it is" if cni.kept else ""
    if lacks:
        names = ", ".join(f"{plugin.name} ({plugin.why})" for plugin in lacks)
        what = f"no CNI conflist can be written, as plugins lack: {names}{stays}"
        yield Problem(Reason.CNIPluginsMissing, f"{what}; install containernetworking-plugins, or give --cni-bin-dir")
    elif not versions(_used(cni.plugins)):
        told = "; ".join(f"{plugin.name}: {', '.join(plugin.versions) or 'none'}" for plugin in _used(cni.plugins))
        want = f"one of {', '.join(_VERSIONS)} is wanted of all"
        yield Problem(
            Reason.CNIVersionMissing, f"the CNI plugins have no common version ({told}); {want}{stays}: upgrade them"
        )
    else:
        used = {plugin.name for plugin in _used(cni.plugins)}
        for plugin in cni.plugins:
            if plugin.name == PORTMAP and PORTMAP not in used:
                why = plugin.why or f"supports none of the others' versions, only {', '.join(plugin.versions)}"
                yield Problem(Reason.CNIPluginMissing, f"plugin {PORTMAP}: {why}; pods' hostPort does nothing")
            elif plugin.name == LOOPBACK and plugin.why:
                why = f"{plugin.why}; containerd before 2.0 starts no pod without it"
                yield Problem(Reason.CNIPluginMissing, f"plugin {LOOPBACK}: {why}")


@dataclass(frozen=True, slots=True)
class Standing:
    """How it stands with the conflist, for a reader of the status."""

    path: str
    state: str
    """"written", "waits" (until all else is in place), "differs", "kept" (though plugins lack) or "none" (they do)."""
    version: str = ""
    plugins: tuple[str, ...] = ()

    def __str__(self) -> str:
        about = [self.state, self.version and f"version {self.version}", ", ".join(self.plugins)]
        return f"{self.path} ({'; '.join(filter(None, about))})"


def standing(cni: CniFacts, want: Mapping[str, str], have: Mapping[str, str]) -> Standing:
    wanted_text, there = want.get(FILE, ""), have.get(FILE, "")
    if not wanted_text or cni.kept:
        state = "kept" if there else "none"
    else:
        state = "written" if wanted_text == there else "differs" if there else "waits"
    told = dict(summary(there or wanted_text)) if there or wanted_text else {}
    plugins = tuple(filter(None, told.get("plugins", "").split(",")))
    return Standing(f"{cni.directory}/{FILE}", state, told.get("version", ""), plugins)


# What is there


def _network(name: str, file: File) -> tuple[str, str, dict[str, Any] | None]:
    """A file's network, and what the runtime would find wrong with it; the object where it is one."""
    if file.why:
        return "", f"can't be read: {file.why}", None
    try:
        found = json.loads(file.data)
    except (ValueError, RecursionError):
        return "", "is empty" if not file.data.strip() else "is not JSON", None
    if not isinstance(found, dict):
        return "", "is no JSON object", None
    network = found.get("name")
    network = plain(network) if isinstance(network, str) else ""
    if name.endswith(".conflist"):
        plugins = found.get("plugins")
        chain = [p.get("type") for p in plugins if isinstance(p, dict)] if isinstance(plugins, list) else []
        bad = "" if chain and all(isinstance(t, str) and t for t in chain) else "names no plugins"
    else:
        bad = "" if isinstance(found.get("type"), str) and found["type"] else "has no plugin type"
    return network, bad, found


def judge(directory: str, files: Mapping[str, File]) -> tuple[dict[str, str], list[Unmanaged], list[Problem]]:
    """Of the directory's files: ours, what holds its place, and what the others do to it.

    Ours is what has its name and our network's, and also what has its name and is no network at all: that is of
    use to nobody, and the runtime would stop at it.
    """
    ours: dict[str, str] = {}
    unmanaged: list[Unmanaged] = []
    said: list[Problem] = []
    after: list[str] = []
    for name in sorted(files):
        network, bad, found = _network(name, files[name])
        where = f"{directory}/{name}"
        if name == FILE:
            if files[name].why:
                unmanaged.append(Unmanaged("cni", FILE, f"{where} {bad}; remove it, and ovsmesh writes its own"))
            elif found is None or found.get("name") == NETWORK:
                ours[FILE] = files[name].data.decode(errors="replace")
            else:
                whose = f"is of network {network or '?'}, not ours ({NETWORK})"
                unmanaged.append(Unmanaged("cni", FILE, f"{where} {whose}; rename or remove it"))
        elif name < FILE:
            does = f"it {bad}, and containerd stops at it" if bad else f"its network {network or '?'} wins"
            why = f"{where} comes before {FILE}, so pods do not come to {KBR}: {does}"
            said.append(Problem(Reason.CNIOverruled, f"{why}; remove it when that network is gone, or rename it"))
        else:
            after.append(name)
    if after:
        more = f" and {len(after) - _SHOWN} more" if len(after) > _SHOWN else ""
        which = f"{', '.join(after[:_SHOWN])}{more} in {directory}"
        does = f"not used, as {FILE} comes first" if FILE in ours else f"used until {FILE} is there"
        said.append(Problem(Reason.CNILeftover, f"{which}: {does}"))
    return ours, unmanaged, said


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
    subnets = [plain(r.get("subnet")) for r in every if isinstance(r, dict)]
    return [
        ("network", network),
        ("version", plain(found.get("cniVersion") or "")),
        ("mtu", plain(mtu if mtu is not None else "")),
        ("ranges", ",".join(subnets)),
        (
            "plugins",
            ",".join(plain(p["type"]) for p in (chain[0], ipam, *chain[1:]) if isinstance(p, dict) and "type" in p),
        ),
    ]
