"""Check what a host needs before it can be a node: each thing is one line, and all of them are reported.

Reads the system through its own tools and changes nothing; asking for a datapath may load its module, as starting
Open vSwitch does. What only the agent's driver can tell (facts, plan) is given as arguments.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.bounded import output
from ovsmesh.dataplane.types import KBR, OBR, PROTOCOL
from ovsmesh.mesh.types import Mesh, Node, within
from ovsmesh.probe import gre

OK, WARN, FAIL, UNKNOWN = "ok", "warn", "FAIL", "?"
_KERNEL = (5, 0)
_OVS = (2, 13)
_PACKAGES = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "nft": "nftables",
    "ovs-vsctl": "openvswitch-switch",
    "ovs-ofctl": "openvswitch-switch",
}
_SHOWN = 5
"""Things that one line names at most."""


class Check(NamedTuple):
    """The result of one check: `state` is OK, WARN, FAIL, or UNKNOWN for what can't be told."""

    state: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.name:<12} {self.text}"


def kernel() -> Iterator[Check]:
    """Check the kernel's version, br_netfilter and whether sysctls can be written."""
    release = os.uname().release
    found = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    text = "Linux {} is needed, for ownership marks".format(".".join(map(str, _KERNEL)))
    yield Check(OK, "kernel", release) if found >= _KERNEL else Check(FAIL, "kernel", f"{release}: {text}")
    if Path("/proc/sys/net/bridge").exists():
        yield Check(OK, "br_netfilter", "is loaded")
    else:
        text = "is not loaded: what filters IP packets does not see those that kbr0 forwards (Kubernetes needs that)"
        yield Check(WARN, "br_netfilter", f"{text}; modprobe br_netfilter")
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        yield Check(FAIL, "sysctls", "/proc/sys/net can't be written: is this a container without its own network?")
    else:
        yield Check(OK, "sysctls", "can be set")


def tools() -> Iterator[Check]:
    """Check that the programs that the agent runs are installed, and that nft works."""
    missing = {tool: package for tool, package in _PACKAGES.items() if not shutil.which(tool)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        yield Check(FAIL, "tools", f"not found: {', '.join(missing)}; apt-get install {packages}")
    else:
        yield Check(OK, "tools", ", ".join(_PACKAGES))
    if "nft" not in missing:
        works = output("nft", "list", "tables") is not None
        text = "nft does not work: the kernel has no nf_tables; modprobe nf_tables"
        yield Check(OK, "nf_tables", "works") if works else Check(FAIL, "nf_tables", text)


def switch(synced: bool, version: str, remote: str, datapath: bool, carried: bool, kind: str) -> Iterator[Check]:
    """Check Open vSwitch at `remote` and its datapath for tunnels of `kind`.

    `datapath`: the kernel has one. `carried`: a bridge of the userspace datapath has the tunnel address.
    """
    if not synced:
        text = f"ovsdb-server does not answer at {remote}; systemctl start openvswitch-switch"
        yield Check(FAIL, "openvswitch", text)
        return
    known = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if known and known < _OVS:
        yield Check(FAIL, "openvswitch", f"{version}: {'.'.join(map(str, _OVS))} or newer is needed")
    elif output("ovs-appctl", "--timeout=5", "version") is None:
        yield Check(FAIL, "openvswitch", "ovs-vswitchd does not answer; systemctl start openvswitch-switch")
    else:
        yield Check(OK, "openvswitch", f"{version or 'of unknown version'}, ovsdb-server and ovs-vswitchd answer")
    module = f"vport_{kind}"
    if carried:
        yield Check(OK, "datapath", "userspace: a bridge of it has the tunnel address")
    elif not datapath:
        text = "the kernel has no module openvswitch, and no bridge of the userspace datapath has the tunnel address"
        yield Check(FAIL, "datapath", f"{text}; install the kernel's modules (Ubuntu: linux-modules-extra)")
    elif Path("/sys/module", module).exists() or output("modprobe", "-n", module) is not None:
        yield Check(OK, "datapath", f"openvswitch and {module} of the kernel")
    else:
        yield Check(FAIL, "datapath", f"the kernel has openvswitch, but no module {module}: no {kind} tunnels")


def ranges(mesh: Mesh, routes: Iterable[Mapping[str, Any]]) -> Iterator[Check]:
    """Check that no other route of this host is in the mesh's ranges. `routes` are as `ip -j route` prints them."""
    bad, near = [], []
    for route in routes:
        if route.get("dst") in (None, "default") or route.get("dev") in (KBR, OBR):
            continue
        if str(route.get("protocol")) == str(PROTOCOL):
            continue
        try:
            there = ip_network(str(route["dst"]), strict=False)
        except ValueError:
            continue
        if there.prefixlen == 0 or (there.version == 6 and there.is_link_local):
            continue
        text = f"{route['dst']} dev {route.get('dev', 'none')}"
        taken = [n.name for n in mesh.nodes for c in n.pod_cidrs if within(there, c)]
        if taken:
            bad.append(f"{text} (of {', '.join(taken[:_SHOWN])})")
        elif any(c.version == there.version and c.overlaps(there) for c in mesh.cluster_cidrs):
            near.append(text)
    if bad:
        yield Check(
            FAIL, "ranges", f"of the mesh are used by this host already: {'; '.join(bad[:_SHOWN])}; renumber one"
        )
    if near:
        text = f"routes that overlap the mesh's ranges, but no node's: {'; '.join(near[:_SHOWN])}"
        yield Check(WARN, "ranges", f"{text}; the mesh's are narrower and win")
    if not bad and not near:
        yield Check(OK, "ranges", f"{', '.join(map(str, mesh.cluster_cidrs))}: no other route of this host is in them")


def routes() -> list[dict[str, Any]]:
    """Return this host's routes, IPv4 and IPv6, as `ip -j route` prints them."""
    found: list[dict[str, Any]] = []
    for version in ("-4", "-6"):
        text = output("ip", version, "-j", "-N", "route", "show")
        try:
            listed = json.loads(text or "[]")
        except ValueError:
            continue
        found += [route for route in listed if isinstance(route, dict)]
    return found


def tunnels(mesh: Mesh, me: Node) -> Iterator[Check]:
    """Check whether encapsulated packets may leave and come in, as far as this host can tell."""
    closed = _closed(output("nft", "-j", "list", "ruleset"), mesh.encapsulation)
    if closed:
        peers = ",".join(str(n.address) for n in mesh.nodes[:3] if n.name != me.name) or "PEER"
        port = {"gre": "-p gre", "vxlan": "-p udp --dport 4789", "geneve": "-p udp --dport 6081"}[mesh.encapsulation]
        text = f"{', '.join(closed[:_SHOWN])} refuses input by default and has no rule for {mesh.encapsulation}"
        yield Check(
            WARN, "firewall", f"{text}; accept it from each peer: iptables -I INPUT {port} -s {peers} -j ACCEPT"
        )
    else:
        yield Check(OK, "firewall", f"no rule of this host is seen to refuse {mesh.encapsulation}")
    if mesh.encapsulation != "gre":
        return
    remotes = {
        str(n.address): n.name for n in mesh.nodes if n.name != me.name and n.address.version == me.address.version
    }
    results = gre.probe(str(me.address), remotes)
    refused = [
        f"{remotes[address]} {address}: {why}" for address, (state, why) in results.items() if state == gre.REFUSED
    ]
    arrived = [remotes[address] for address, (state, _) in results.items() if state == gre.ARRIVES]
    if refused:
        yield Check(
            FAIL, "gre", f"{len(refused)} of {len(results)} peers: {'; '.join(refused[:_SHOWN])}; allow IP protocol 47"
        )
    else:
        silent = len(results) - len(arrived)
        text = f"arrives at {len(arrived)} of {len(results)} peers"
        more = f"; the other {silent} take it without an answer, as peers with a tunnel do, or it is lost"
        yield Check(UNKNOWN if silent else OK, "gre", f"{text}{more if silent else ''}" if results else "no peers yet")


def _closed(ruleset: str | None, encapsulation: str) -> list[str]:
    """Return the tables whose input chain refuses by default and that have no rule for the encapsulation."""
    try:
        items = json.loads(ruleset or "{}").get("nftables", [])
        chains = [item["chain"] for item in items if item.get("chain", {}).get("hook") == "input"]
        rules = [item["rule"] for item in items if "rule" in item]
    except (ValueError, AttributeError, TypeError, KeyError):
        return []
    pattern = {"gre": r'"gre"|: 47\b', "vxlan": r"\b4789\b", "geneve": r"\b6081\b"}[encapsulation]
    found = []
    for chain in chains:
        table = (chain.get("family"), chain.get("table"))
        own = [rule for rule in rules if (rule.get("family"), rule.get("table")) == table]
        last: dict[str, Any] = next((rule for rule in reversed(own) if rule.get("chain") == chain.get("name")), {})
        verdicts = [key for part in last.get("expr", ()) for key in part if key != "counter"]
        closed = chain.get("policy") == "drop" or verdicts in (["drop"], ["reject"])
        if closed and not any(re.search(pattern, json.dumps(rule.get("expr"))) for rule in own):
            found.append(f"table {table[0]} {table[1]}")
    return found
