"""Tell who besides ovsmesh depends on this host's forwarding: Docker, other container networks, guests, VPNs, routers.

By what runs, by the links and the rules that are there, and by the files that set it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ovsmesh.bounded import output
from ovsmesh.dataplane.types import KBR, MARK, OBR
from ovsmesh.processes import running, shares_network
from ovsmesh.text import listed, printable

_CONF = "/proc/sys/net/ipv{}/conf"
FORWARDING = {"net/ipv4/ip_forward": 4, "net/ipv6/conf/all/forwarding": 6}
"""The sysctl that has a host forward → IP version. The kernel sets others with it, see side_effects()."""
_PROGRAMS = {
    "dockerd": "Docker",
    "kubelet": "the kubelet",
    "kube-proxy": "kube-proxy",
    "k3s": "k3s",
    "k3s-server": "k3s",
    "rke2": "rke2",
    "zebra": "FRR",
    "bird": "BIRD",
}
"""Programs that have this host forward while they run → how a message calls them."""
_TUNNELS = frozenset({"gre", "ip6gre", "ip6tnl", "ipip", "geneve", "ppp", "sit", "tun", "vxlan", "wireguard", "xfrm"})
_FALLBACKS = frozenset({"erspan0", "gre0", "gretap0", "gre_sys", "ip6gre0", "ip6tnl0", "sit0", "tunl0"})
"""Links that come with a kernel module, and that of Open vSwitch."""
_OF_DOCKER = re.compile(rf'"?({KBR}|docker0|docker_gwbridge|br-[0-9a-f]{{12}})"?')
"""Links that only Docker and ovsmesh give such names."""
_NAT = re.compile(r"(?<!status )(?<!status & )(?<!status ! )\b(masquerade|snat|dnat|MASQUERADE|SNAT|DNAT)\b")
_FILES = ("/etc/sysctl.d/*.conf", "/run/sysctl.d/*.conf", "/usr/local/lib/sysctl.d/*.conf", "/usr/lib/sysctl.d/*.conf")
_TABLE = re.compile(r"table (\S+) (\S+) \{")
_CHAIN = re.compile(r"chain (\S+) \{")


class Device(NamedTuple):
    """What matters of a network device here."""

    name: str
    kind: str
    up: bool
    addresses: tuple[str, ...]
    ports: tuple[str, ...] = ()
    """Ports of a Linux bridge."""


def side_effects(key: str) -> dict[str, str]:
    """Return what the kernel changes when `key` is switched on, and not back when it is switched off again.

    A host's forwarding sets that of every link to its own, and whether redirects are accepted to the opposite
    (inet_forward_change in net/ipv4/devinet.c).
    """
    version = FORWARDING.get(key)
    conf = Path(_CONF.format(version))
    if version is None or _value(conf / "all/forwarding") != "0":
        return {}
    links = sorted(path for path in conf.glob("*/forwarding") if path.parent.name != "all")
    found = {path: "1" for path in links if _value(path) == "1"}
    redirects = conf / "all/accept_redirects"
    if version == 4 and _value(redirects) == "0":
        found[redirects] = "0"
    return {str(path.relative_to("/proc/sys")): value for path, value in found.items()}


def _value(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def forwarding_users(version: int, devices: Iterable[Device], docker_returns: bool = False) -> list[str]:
    """Return who besides ovsmesh depends on this host's forwarding of an IP version, each as a short sentence.

    `docker_returns`: Docker is about to be started, and sets forwarding itself: what is Docker's does not count.
    """
    devices = [device for device in devices if device.name not in (KBR, OBR)]
    found = list(_programs(version, devices, docker_returns))
    if docker_returns:
        devices = [device for device in devices if not _OF_DOCKER.fullmatch(device.name)]
    found += _links(version, devices)
    return [*found, *_nat(version, output("nft", "-s", "list", "ruleset") or "", _legacy(version))]


def configured(key: str, value: str) -> str:
    """Return the file that has this host set `key` to `value` at boot; "" for none, and in a network namespace.

    The last one wins, by the order of sysctl.d(5).
    """
    with contextlib.suppress(OSError):
        if not shares_network(1):
            return ""
    names: dict[str, str] = {}
    for pattern in _FILES:
        for path in glob.glob(pattern):
            names.setdefault(os.path.basename(path), path)
    winner = ""
    for path in (*(names[name] for name in sorted(names)), "/etc/sysctl.conf"):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text(errors="replace").splitlines():
                name, equals, text = line.strip().removeprefix("-").partition("=")
                if equals and not name.startswith(("#", ";")) and _same(name.strip(), key):
                    winner = path if text.strip() == value else ""
    return winner


def _same(name: str, key: str) -> bool:
    aliases = {"net/ipv4/conf/all/forwarding": "net/ipv4/ip_forward"}
    path = name if "/" in name else name.replace(".", "/")
    return aliases.get(path, path) == key


def _programs(version: int, devices: Iterable[Device], docker_returns: bool) -> Iterator[str]:
    seen = {name for _, name in running(_PROGRAMS)}
    six = any(_OF_DOCKER.fullmatch(device.name) and _addressed(6, device) for device in devices)
    for name in sorted(seen):
        if name != "dockerd" or not (docker_returns or (version == 6 and not six)):
            yield f"{_PROGRAMS[name]} runs"


def _links(version: int, devices: Iterable[Device]) -> Iterator[str]:
    routed = set(_routed(version))
    for device in devices:
        if not device.up:
            continue
        if device.kind == "bridge" and device.ports and _addressed(version, device):
            yield f"{listed(device.ports, 2)} on bridge {device.name}"
        elif device.kind in _TUNNELS and device.name not in _FALLBACKS and _addressed(version, device):
            yield f"{device.kind} {device.name} is up"
        elif device.kind == "veth" and not device.addresses and device.name in routed:
            yield f"a route to {device.name}"


def _addressed(version: int, device: Device) -> bool:
    return any((":" in a) == (version == 6) and not a.lower().startswith("fe80:") for a in device.addresses)


def _routed(version: int) -> Iterator[str]:
    """Yield the links that a route is through."""
    with contextlib.suppress(ValueError):
        for route in json.loads(output("ip", f"-{version}", "-j", "route", "show") or "[]"):
            if isinstance(route, dict) and route.get("dst") != "default":
                yield str(route.get("dev"))


def _nat(version: int, ruleset: str, legacy: str) -> Iterator[str]:
    """Yield the chains that translate addresses of forwarded packets, but Docker's: that is seen as a program."""
    family = {"ip": 4, "ip6": 6}
    table, chain, seen = ("", ""), "", set()
    for line in ruleset.splitlines():
        if found := _TABLE.search(line):
            table = found[1], found[2]
        elif found := _CHAIN.search(line):
            chain = found[1]
        elif table[1] in (MARK, "docker-bridges") or family.get(table[0], version) != version or table[0] == "bridge":
            continue
        elif _NAT.search(line) and not chain.startswith("DOCKER") and not _for_docker(line):
            seen.add(f"table {table[0]} {table[1]} chain {chain} translates addresses")
    for line in legacy.splitlines():
        words = line.split()
        if _NAT.search(line) and not words[1].startswith("DOCKER") and not _for_docker(line):
            seen.add(f"iptables table nat chain {words[1]} translates addresses")
    yield from (printable(text, 120) for text in sorted(seen)[:3])


def _for_docker(rule: str) -> bool:
    return any(_OF_DOCKER.fullmatch(word) for word in rule.split())


def _legacy(version: int) -> str:
    """Return the rules of the table nat of iptables-legacy, if the kernel has that table."""
    tool = "iptables" if version == 4 else "ip6tables"
    with contextlib.suppress(OSError):
        if "nat" in Path("/proc/net", tool.replace("tables", "_tables_names")).read_text().split():
            text = output(f"{tool}-legacy-save", "-t", "nat") or ""
            return "\n".join(line for line in text.splitlines() if line.startswith("-A "))
    return ""
