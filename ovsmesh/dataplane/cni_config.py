"""Write the CNI conflist that plugs a node's pods into kbr0, and judge the files of other networks beside it.

A runtime reads the directory's *.conf, *.conflist and *.json in the order of their names and uses the first. Where
that is malformed, containerd stops at it; CRI-O goes on to the next. What others put into the conflist (chained
plugins) stays where it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ovsmesh.dataplane.docker_config import cni_bounds
from ovsmesh.dataplane.types import KBR, Chained, CniFacts, CniPlugin, Facts, Unmanaged
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import IPNetwork, gateway
from ovsmesh.reasons import Reason
from ovsmesh.text import listed, printable

FILE = "10-ovsmesh.conflist"
NETWORK = "ovsmesh"
"""Ownership mark: the network's name in the file of that name; also of host-local's store."""
DATA_DIR = "/run/cni/networks"
"""Where host-local keeps what it has given out: it goes with the pods at a reboot. Kept, the range would fill up."""
STORE = f"{DATA_DIR}/{NETWORK}"
OLD_STORE = f"/var/lib/cni/networks/{NETWORK}"
"""Where it is without a dataDir, as earlier versions had it."""
SUFFIXES = (".conf", ".conflist", ".json")
_RENAMED = ".cilium_bak"
"""What Cilium appends to the names of other networks' files where it is to be the only one (cni.exclusive)."""
REQUIRED = ("bridge", "host-local")
PORTMAP = "portmap"
LOOPBACK = "loopback"
PLUGINS = (*REQUIRED, PORTMAP, LOOPBACK)
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions that the file is valid for; earlier ones give a pod one address."""
_PLAIN = "1.0.0"
"""The newest version that every runtime knows. A later one is offered in `cniVersions`, which old runtimes ignore."""
_SHOWN = 3
_DEEPEST = 50
"""Levels of a JSON value that are looked at."""
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
    return tuple(v for v in VERSIONS if all(v in one for one in every))


def is_read(name: str) -> bool:
    """Return whether a file of the directory is looked at: a runtime's, or what someone has renamed."""
    return name.endswith((*SUFFIXES, _RENAMED)) or name.startswith(f"{FILE}.")


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
    return {FILE: _render(_used(facts.cni.plugins), facts.cni.chained, pod_cidrs, bounds, mtu)}


def _render(
    plugins: Sequence[CniPlugin],
    chained: Chained,
    pod_cidrs: Sequence[IPNetwork],
    bounds: Mapping[IPNetwork, Mapping[str, str]],
    mtu: int,
) -> str:
    """Return the conflist's text. `bounds`: see cni_bounds.

    The agent manages kbr0's address, its MAC and the masquerade: the plugin only plugs. A pod's default route goes to
    the gateway that host-local returns with each address, and host-local never gives that one out.
    """
    # a chained plugin that leaves no version in common is named, and must not keep the others from theirs
    common = versions([*plugins, *(p for p in chained.plugins if not p.why)]) or versions(plugins)
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
        "ipam": {"type": "host-local", "dataDir": DATA_DIR, "ranges": list(ranges.values()), "routes": routes},
    }
    chain: list[dict[str, Any]] = [bridge]
    if any(plugin.name == PORTMAP for plugin in plugins):
        chain.append({"type": PORTMAP, "capabilities": {"portMappings": True}, "snat": True})
    head: dict[str, Any] = {"cniVersion": (plain or common)[-1]}
    if common[-1] > _PLAIN:
        head["cniVersions"] = [v for v in common if v >= "0.4.0"]
    last = len(chain)
    for place, text in reversed(chained.entries):
        chain.insert(min(place, last), json.loads(text))
    return _text({**head, "name": NETWORK, **json.loads(chained.settings), "plugins": chain})


# What others put into it


def _text(conflist: Mapping[str, Any]) -> str:
    return json.dumps(conflist, indent=2) + "\n"


def _split(conflist: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Chained]:
    """Return the managed plugins of a conflist, and what others put into it.

    Managed are the bridge plugin and the first portmap. What is no plugin at all is nobody's.
    """
    given = conflist.get("plugins")
    plugins = given if isinstance(given, list) else []
    chain = [p for p in plugins if isinstance(p, dict) and isinstance(p.get("type"), str)]
    bridge = next((p for p in chain if p["type"] == "bridge"), None)
    portmap = next((p for p in chain if p["type"] == PORTMAP), None)
    managed = [p for p in (bridge, portmap) if p is not None]
    # without the bridge, and where portmap stands before it, all of theirs go behind
    in_order = bridge is not None and [p for p in chain if p is bridge or p is portmap] == managed
    entries: list[tuple[int, str]] = []
    seen = 0 if in_order else 2
    for plugin in chain:
        if plugin is bridge or plugin is portmap:
            seen += 1
        elif plugin["type"] != "bridge":
            entries.append((seen if seen < len(managed) else 2, json.dumps(plugin)))
    own = {"cniVersion", "cniVersions", "name", "plugins"}
    settings = {key: value for key, value in conflist.items() if key not in own}
    return managed, Chained(json.dumps(settings), tuple(entries))


def chained(text: str) -> Chained:
    """Return what others put into a managed conflist; its plugins are not asked yet."""
    found = _network(FILE, File(text.encode()))[2]
    return _split(found)[1] if found and found.get("name") == NETWORK else Chained()


def types(found: Chained) -> list[str]:
    """Return the types of the plugins that others put into the conflist."""
    return [json.loads(text)["type"] for _, text in found.entries]


def without_managed(text: str) -> str:
    """Return what is left of a conflist without the managed plugins; "" if that is nothing."""
    found = _network(FILE, File(text.encode()))[2]
    if not found or not (theirs := _split(found)[1]).entries:
        return ""
    return _text({**found, "plugins": [json.loads(entry) for _, entry in theirs.entries]})


def _canonical(found: Mapping[str, Any]) -> str:
    """Return a managed conflist as _render would order it, whoever wrote it last: jq, Go and Python each have a way."""
    managed, theirs = _split(found)
    head = {key: found[key] for key in ("cniVersion", "cniVersions", "name") if key in found}
    plugins = found.get("plugins")
    if isinstance(plugins, list):
        plugins = [_ordered(p) if any(p is one for one in managed) else p for p in plugins]
    return _text({**head, **json.loads(theirs.settings), "plugins": plugins})


_ORDER = (
    *("type", "bridge", "isGateway", "ipMasq", "hairpinMode", "mtu", "ipam", "dataDir", "ranges", "routes"),
    *("subnet", "gateway", "rangeStart", "rangeEnd", "dst", "capabilities", "portMappings", "snat"),
)
"""Keys of the managed plugins as they are written."""


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        known = [key for key in _ORDER if key in value]
        return {key: _ordered(value[key]) for key in (*known, *(key for key in value if key not in _ORDER))}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def problems(cni: CniFacts) -> Iterator[Problem]:
    """Yield what is missing for a conflist, or for all that a runtime needs."""
    stays = f"; {FILE} stays as it is" if cni.kept else ""
    if gone := missing(cni.plugins):
        names = ", ".join(f"{plugin.name} ({plugin.why})" for plugin in gone)
        text = f"no CNI conflist can be written: plugins are missing: {names}{stays}"
        yield Problem(Reason.CNIPluginsMissing, f"{text}; install containernetworking-plugins, or give --cni-bin-dir")
    elif not versions(_used(cni.plugins)):
        found = "; ".join(f"{plugin.name}: {', '.join(plugin.versions) or 'none'}" for plugin in _used(cni.plugins))
        text = f"the CNI plugins have no version in common ({found}); all need one of {', '.join(VERSIONS)}"
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
        for plugin in cni.chained.plugins:
            why = plugin.why
            if not why and not versions([*_used(cni.plugins), plugin]):
                why = f"supports none of the managed plugins' versions, only {', '.join(plugin.versions)}"
            if why:
                text = f"plugin {_shown(plugin.name)}, which someone else has put into {FILE}: {why}; no pod starts"
                yield Problem(Reason.CNIPluginMissing, f"{text}: install it, or take it out of that file")


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


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _parse(data: bytes) -> Any:
    """Return a JSON text's value. Raise ValueError or RecursionError where a runtime's parser (Go) finds none."""
    found = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [value for values in inside for value in values]
    if level:
        raise ValueError("nested too deeply")
    return found


def _network(name: str, file: File) -> tuple[str, str, dict[str, Any] | None]:
    """Return a file's network, what the runtime would find wrong with it, and the JSON object where it is one."""
    if file.why:
        return "", f"can't be read: {file.why}", None
    try:
        found = _parse(file.data)
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
    """Return the managed file, what stands in its place or is left of it, and what the other files do to it.

    Managed is the file with the managed name and network, and also one with that name and no network at all: nobody
    can use that one, and the runtime would stop at it.
    """
    managed: dict[str, str] = {}
    unmanaged: list[Unmanaged] = []
    problems: list[Problem] = []
    after: list[str] = []
    renamed: list[str] = []
    own = _network(FILE, files[FILE])[2] if FILE in files else None
    for name in sorted(files):
        network, bad, found = _network(name, files[name])
        where = f"{directory}/{name}"
        if name == FILE:
            if files[name].why:
                unmanaged.append(Unmanaged("cni", FILE, f"{where} {bad}; remove it, and ovsmesh writes its own"))
            elif found is None:
                managed[FILE] = files[name].data.decode(errors="replace")
            elif found.get("name") != NETWORK:
                text = f"{where} is of network {network or '?'}, not of {NETWORK}; rename or remove it"
                unmanaged.append(Unmanaged("cni", FILE, text))
            elif (theirs := types(_split(found)[1])) and not _split(found)[0]:
                which = listed([_shown(one) for one in theirs], _SHOWN)
                text = f"{where} holds nothing of ovsmesh, only {which}, which someone else has put there: its owner"
                text += " decides what becomes of it; a runtime that uses it starts no pod"
                unmanaged.append(Unmanaged("cni", FILE, text, blocks=False))
            else:
                text = files[name].data.decode(errors="replace")
                managed[FILE] = text if chained(text) == Chained() else _canonical(found)
        elif name.endswith(_RENAMED) or name.startswith(f"{FILE}."):
            renamed.append(name)
        elif name < FILE:
            text = f"{where} comes before {FILE}, so "
            if bad:
                text += f"pods are not plugged into {KBR}: it {bad}, and containerd stops at it"
            elif (differs := _copy(found or {}, own)) is None:
                text += f"pods are not plugged into {KBR}: its network {network or '?'} wins"
            elif differs:
                text += f"it decides how pods are plugged into {KBR}, and it holds an old copy: {differs}"
            else:
                continue
            problems.append(Problem(Reason.CNIOverruled, f"{text}; remove it when that network is gone, or rename it"))
        else:
            after.append(name)
    if after:
        which = f"{listed(after, _SHOWN)} in {directory}"
        does = f"not used, as {FILE} comes first" if FILE in managed else f"used until {FILE} is written"
        problems.append(Problem(Reason.CNILeftover, f"{which}: {does}"))
    if renamed:
        which = f"{listed([printable(name, 80) for name in renamed], _SHOWN)} in {directory}"
        text = f"{which}: someone renames other networks' files, as Cilium does (Helm value cni.exclusive)"
        problems.append(Problem(Reason.CNIRenamed, f"{text}; set that to false, then remove what was renamed"))
    return managed, unmanaged, problems


def _copy(found: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
    """Return how the managed plugins that another file holds differ from the conflist's: "" if they do not.

    None if it holds none. Multus delegates to a network that it names or has a copy of; Cilium copies the whole network
    that it is chained to.
    """
    given = found.get("plugins")
    chain = [p for p in given if isinstance(p, dict)] if isinstance(given, list) else [found]
    for plugin in chain:
        where = plugin.get("clusterNetwork")
        if isinstance(where, str) and where.rpartition("/")[2] in (FILE, NETWORK):
            return ""
        delegates = plugin.get("delegates")
        for one in delegates if isinstance(delegates, list) else []:
            if isinstance(one, dict) and (differs := _copy(one, own)) is not None:
                return differs
    there = next((p for p in chain if p.get("type") == "bridge" and p.get("bridge") == KBR), None)
    if there is None:
        return None
    here = next(iter(_split(own or {})[0]), None)
    if here is None:
        return f"{FILE} is not there to compare it with"
    keys = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
    return ", ".join(
        f"{_shown(key)} {_shown(there.get(key))}, not {_shown(here.get(key))}" for key in sorted(keys)[:_SHOWN]
    )


def summary(conf: str) -> list[tuple[str, str]]:
    """Return what a reader of a plan wants to know of a conflist, as pairs of field and text."""
    network, bad, found = _network(FILE, File(conf.encode()))
    if bad or found is None:
        return [("network", network), ("version", ""), ("mtu", ""), ("ranges", ""), ("plugins", bad)]
    chain = [p for p in found["plugins"] if isinstance(p, dict)]
    bridge = next((p for p in chain if p.get("type") == "bridge"), chain[0])
    mtu = bridge.get("mtu")
    ipam = bridge.get("ipam")
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
            ",".join(
                _shown(p["type"])
                for one in chain
                for p in ((one, ipam) if one is bridge else (one,))
                if isinstance(p, dict) and "type" in p
            ),
        ),
    ]
