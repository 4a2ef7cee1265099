"""Decide which settings make Docker plug its containers into kbr0, and what keeps Docker from taking them over.

The settings are daemon.json's own, and two more: "daemon" is what the running daemon uses, "docker0" the bridge that
it leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from ovsmesh.dataplane.types import KBR, Daemon, Facts
from ovsmesh.mesh.types import IPNetwork, Node
from ovsmesh.text import counted, listed

DOCKER0 = "docker0"
DAEMON = "daemon"
DOWN = "not running"
AWAY = f"anywhere but on {KBR}"
"""Aim of a restart that makes dockerd forget what it remembers of kbr0."""
_NUMBERS = frozenset({"mtu"})
_SWITCHES = frozenset({"ipv6"})
_RANGES = {"bip": 4, "fixed-cidr": 4, "default-gateway": 4, "bip6": 6, "fixed-cidr-v6": 6, "default-gateway-v6": 6}
"""Settings that tell where on its bridge Docker has its addresses → IP version."""
_NEVER = ("bip", "bip6")
"""Settings that dockerd refuses together with `bridge`."""
FILE_KEYS = frozenset({"bridge", "mtu", "ipv6", *_RANGES})
_DEFAULTS = frozenset(f"172.{n}.0.1/16" for n in range(17, 32))
"""Addresses that dockerd gives to a bridge of its own (its default address pools)."""
_FLAGS = {"-b": "bridge"}


def docker_ranges(cidrs: Iterable[IPNetwork], facts: Facts) -> dict[IPNetwork, IPNetwork]:
    """Return pod CIDR → its upper half, which is Docker's where CNI gives out addresses too: neither asks the other.

    In IPv6 both have all: Docker's addresses hold its containers' MACs, CNI's are counted from the range's start.
    """
    first = next((c for c in cidrs if isinstance(c, IPv4Network) and c.prefixlen < 30), None)
    if first is None or not facts.docker or facts.cni is None:
        return {}
    return {first: list(first.subnets(1))[1]}


def desired(me: Node, facts: Facts, mtu: int) -> dict[str, str]:
    """Return the settings of this node's Docker; {} where it is left alone, or has no use for kbr0.

    Masquerading, forwarding and iptables stay as their owner set them: Docker's rules for kbr0 match nothing that
    goes to a peer. The default gateway is the bridge's own address.
    """
    own4 = [c for c in me.pod_cidrs if isinstance(c, IPv4Network)]
    own6 = [c for c in me.pod_cidrs if isinstance(c, IPv6Network)]
    if not facts.docker or not own4:
        return {}
    want = {"bridge": KBR, "mtu": str(mtu)}
    for part in docker_ranges(own4, facts).values():
        want["fixed-cidr"] = str(part)
    if facts.docker == "keep":
        return want
    ipv6 = bool(own6) and facts.ipv6
    if ipv6:
        want |= {"ipv6": "true", "fixed-cidr-v6": str(own6[0])}
    want[DAEMON] = _daemon_text(KBR, [str(own4[0])], ipv6, mtu)
    return want


def observed(
    file: Mapping[str, Any], flags: Mapping[str, str], want: Mapping[str, str], own: Sequence[str]
) -> dict[str, str]:
    """Return the wanted settings as they are in force, and those that can't stand beside them.

    `own` are kbr0's ranges. A wanted value that the command line gives counts as set: dockerd refuses to have it in
    both.
    """
    found = {key: _text(key, file[key]) for key in want if key in file}
    found |= {key: flags[key] for key in want if flags.get(key) == want[key]}
    if "bridge" not in want:
        return found
    others = {k: _text(k, file[k]) for k in _RANGES if k in file and k not in want}
    return found | {k: text for k, text in others.items() if k in _NEVER or not _within(text, own)}


def value(key: str, text: str) -> Any:
    """Return a wanted setting as it stands in the file."""
    return int(text) if key in _NUMBERS else text == "true" if key in _SWITCHES else text


def _text(key: str, value: Any) -> str:
    """Return a value of the file as it is shown; one of the wrong type differs from any that is wanted."""
    if key in _SWITCHES and isinstance(value, bool):
        return str(value).lower()
    if key in _NUMBERS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if key not in _SWITCHES | _NUMBERS and isinstance(value, str):
        return value
    return json.dumps(value)[:80]


def _within(text: str, ranges: Iterable[str]) -> bool:
    try:
        inner = ip_network(text, strict=False) if "/" in text else ip_network(ip_address(text))
        nets = [ip_network(r, strict=False) for r in ranges]
    except ValueError:
        return False
    # of one version, which mypy does not see
    return any(inner.version == net.version and inner.subnet_of(net) for net in nets)  # type: ignore[arg-type]


def flags(argv: Sequence[str]) -> dict[str, str]:
    """Return the options of dockerd's command line that concern its bridge, and config-file."""
    wanted = {*FILE_KEYS, "config-file"}
    given: dict[str, str] = {}
    words = list(argv[1:])
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        if name.startswith("-b") and not name.startswith("--") and len(name) > 2:
            name, equals, text = "-b", "=", word[2:].removeprefix("=")
        key = _FLAGS.get(name, name[2:] if name.startswith("--") else "")
        if key not in wanted:
            continue
        if key in _SWITCHES:
            given[key] = text or "true"
        elif equals:
            given[key] = text
        elif words:
            given[key] = words.pop(0)
    return given


# The daemon


def _daemon_text(bridge: str, subnets: Iterable[str], ipv6: bool, mtu: int) -> str:
    four = next((subnet for subnet in subnets if ":" not in subnet), "without an address")
    return f"on {bridge} {four}{' and IPv6' if ipv6 else ''}, MTU {mtu}"


def daemon_text(daemon: Daemon) -> str:
    """Return the observed value of "daemon"."""
    if daemon.state != "up":
        return DOWN
    return _daemon_text(daemon.bridge, daemon.subnets, daemon.ipv6, daemon.mtu) if daemon.bridge else "on no bridge"


def obstacles(daemon: Daemon, config: str, real: str, want: Mapping[str, str], restart: bool) -> Iterator[str]:
    """Yield why the move to kbr0 can't begin, each with what to do."""
    given = flags(daemon.flags)
    other = given.pop("config-file", "")
    if other and other not in (config, real):
        yield f"dockerd reads {other}, and --docker-config is {config}: give --docker-config {other}"
    for key, text in given.items():
        if text != want.get(key) and (key in want or key in _NEVER):
            yield (
                f"dockerd was started with --{key} {text}, and does not start when {config} has it too: remove it "
                f"from its command line (`systemctl edit --full docker`), then restart Docker"
            )
    if restart and daemon.live_restore and daemon.running:
        yield (
            f"dockerd has live-restore, and stays on {daemon.bridge or 'no bridge'} while containers run: "
            f"stop {listed(daemon.running)}, then the move goes on by itself"
        )


def remembers(daemon: Daemon, wanted: str) -> bool:
    """Return whether dockerd is on kbr0 with another range than wanted, which its next start would put there again.

    It forgets the range of a bridge when it starts with another bridge. (With none it would forget it too, and also
    disable the network of each container that it starts, for good.)
    """
    return daemon.bridge == KBR and daemon_text(daemon).split()[:3] != wanted.split()[:3]


def reached(daemon: Daemon, aim: str) -> bool:
    """Return whether a daemon is where a restart was to bring it."""
    if aim == AWAY:
        return daemon.state == "up" and daemon.bridge != KBR
    return daemon_text(daemon) == aim


def docker_addresses(daemon: Daemon, own: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return those of the addresses on kbr0 that dockerd put there, as kbr0 had none of `own` at the time.

    It puts the one that it remembers there once more after it has moved on to kbr0's own.
    """
    managed = set(own)
    others = [text for text in present if text not in managed and ":" not in text]
    its = daemon.subnets if daemon.bridge == KBR else ()
    return [text for text in others if text in _DEFAULTS or _within(text, its)]


def stops(daemon: Daemon) -> str:
    """Return what a restart does to the running containers; "" for nothing."""
    if daemon.live_restore or not daemon.running:
        return ""
    left = [name for name in daemon.running if name not in daemon.returning]
    texts = [f"{listed(daemon.returning)} come back with new addresses"] if daemon.returning else []
    texts += [f"{listed(left)} stay stopped until you start them"] if left else []
    return f"restarting Docker stops {counted(len(daemon.running), 'container')}: {'; '.join(texts)}"
