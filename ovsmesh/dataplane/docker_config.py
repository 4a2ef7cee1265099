"""Decide which settings make Docker plug its containers into kbr0, and what keeps Docker from taking them over.

The settings are daemon.json's own, and two more: "daemon" is what the running daemon uses, "docker0" the bridge that
it leaves behind.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from ovsmesh.dataplane.types import KBR, Daemon, Facts
from ovsmesh.mesh.types import IPNetwork, Node, within
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
_IPV6 = ("ipv6", "bip6", "fixed-cidr-v6", "default-gateway-v6")
"""Settings that dockerd takes together or not at all: a node without an IPv6 range keeps none of them."""
FILE_KEYS = frozenset({"bridge", "mtu", "ipv6", *_RANGES})
_IN_FILE = {
    "H": "hosts",
    "host": "hosts",
    "D": "debug",
    "G": "group",
    "l": "log-level",
    "p": "pidfile",
    "s": "storage-driver",
    "insecure-registry": "insecure-registries",
    **{k: f"{k}s" for k in ("authorization-plugin", "default-address-pool", "dns-opt", "exec-opt", "label", "log-opt")},
    **{k: f"{k}s" for k in ("registry-mirror", "storage-opt")},
}
"""Options of dockerd's command line that have another name in daemon.json."""
_BOTH = frozenset({"builder", "default-ulimits", "features", "runtimes"})
"""Settings that may be on the command line and in daemon.json."""
_DEFAULTS = frozenset(f"172.{n}.0.1/16" for n in range(17, 32))
"""Addresses that dockerd gives to a bridge of its own (its default address pools)."""
_FLAGS = {"-b": "bridge"}


def docker_ranges(cidrs: Iterable[IPNetwork], facts: Facts) -> dict[IPNetwork, IPNetwork]:
    """Return pod CIDR → its upper half in IPv4, which is Docker's where CNI gives out addresses too.

    Neither asks the other. See cni_bounds for IPv6.
    """
    first = next((c for c in cidrs if isinstance(c, IPv4Network) and c.prefixlen < 30), None)
    if first is None or not facts.docker or facts.cni is None:
        return {}
    return {first: list(first.subnets(1))[1]}


def cni_bounds(cidrs: Sequence[IPNetwork], facts: Facts) -> dict[IPNetwork, dict[str, str]]:
    """Return pod CIDR → host-local's bounds in it, where Docker gives out addresses of it too.

    In IPv6 CNI has the upper half and Docker the lower: dockerd wants the gateway, the first address, inside of what is
    its own. Docker 28 and newer count from there; older ones put the container's MAC (02:42:…) into the lower 48 bits.
    """
    bounds = {c: {"rangeEnd": str(part.network_address - 1)} for c, part in docker_ranges(cidrs, facts).items()}
    first = next((c for c in cidrs if isinstance(c, IPv6Network) and c.prefixlen < 126), None)
    if bounds and first is not None:
        bounds[first] = {"rangeStart": str(list(first.subnets(1))[1].network_address)}
    return bounds


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
    both. A file that somebody else put on kbr0 keeps its IPv6 as it is: dockerd runs with it.
    """
    found = {key: _text(key, file[key]) for key in want if key in file}
    found |= {key: flags[key] for key in want if flags.get(key) == want[key]}
    if "bridge" not in want:
        return found
    kept = () if DAEMON in want else _IPV6
    others = {k: _text(k, file[k]) for k in _RANGES if k in file and k not in want and k not in kept}
    misfits = {k: text for k, text in others.items() if k in _NEVER or not _within(text, own)}
    if DAEMON in want and "ipv6" not in want and file.get("ipv6", False) is not False:
        misfits |= {k: _text(k, file[k]) for k in _IPV6 if k in file}
    return found | misfits


def given_up(have: Mapping[str, str], want: Mapping[str, str]) -> str:
    """Return what the switch takes from Docker's owner, with the way to keep it; "" for nothing."""
    gone = [key for key in _IPV6 if key in have and key not in want]
    if DAEMON not in want or "ipv6" not in gone:
        return ""
    return (
        f"containers on {KBR} have no IPv6, as this node has no IPv6 range in the mesh: the switch takes "
        f"{listed(gone)} out of daemon.json together. Give the node an IPv6 range to keep IPv6"
    )


def pool_overlaps(file: Mapping[str, Any], clusters: Iterable[str]) -> list[str]:
    """Return the default address pools of the file that overlap one of the mesh's ranges."""
    pools = file.get("default-address-pools")
    bases = [p.get("base") for p in pools if isinstance(p, dict)] if isinstance(pools, list) else []
    nets = [ip_network(text) for text in clusters]
    found = []
    for base in bases:
        with contextlib.suppress(ValueError):
            pool = ip_network(str(base), strict=False)
            found += [str(base)] if any(n.version == pool.version and n.overlaps(pool) for n in nets) else []
    return found


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
    return any(within(inner, net) for net in nets)


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


def doubled(argv: Sequence[str], file: Mapping[str, Any]) -> list[str]:
    """Return the settings that are both on the command line and in the file: dockerd does not start again with them.

    Those that concern its bridge are left out, see obstacles().
    """
    words = [word.partition("=")[0] for word in argv[1:] if word.startswith("-")]
    names = [word[2:] if word.startswith("--") else word[1:2] for word in words]
    keys = {_IN_FILE.get(name, name) for name in names} & file.keys()
    return sorted(keys - FILE_KEYS - _BOTH)


def obstacles(
    daemon: Daemon, config: str, real: str, want: Mapping[str, str], restart: bool, file: Mapping[str, Any] = {}
) -> Iterator[str]:
    """Yield why the move to kbr0 can't begin, each with what to do. `file`: what daemon.json sets."""
    if restart and (twice := doubled(daemon.flags, file)):
        yield (
            f"dockerd does not start again as it is: {listed(twice)} is in {config} and on its command line; remove "
            "one of the two, and restart Docker yourself"
        )
    given = flags(daemon.flags)
    other = given.pop("config-file", "")
    if other and other not in (config, real):
        yield f"dockerd reads {other}, and --docker-config is {config}: give --docker-config {other}"
    # a part of the IPv6 settings alone, or an IPv6 that nobody wants, is one that dockerd would come back with
    refused = (*_NEVER, *(_IPV6 if DAEMON in want and "ipv6" not in want else ()))
    for key, text in given.items():
        if key == "ipv6" and text == "false" and key not in want:
            continue
        if text != want.get(key) and (key in want or key in refused):
            yield (
                f"dockerd was started with --{key} {text}, and does not start when {config} has it too: remove it "
                f"from its command line (`systemctl edit --full docker`), then restart Docker"
            )
    if restart and daemon.live_restore and daemon.running:
        yield (
            f"dockerd has live-restore, and stays on {daemon.bridge or 'no bridge'} while containers run: "
            f"stop {listed(daemon.running)}, then the move goes on by itself"
        )


def isolation(daemon: Daemon, file: Mapping[str, Any]) -> str:
    """Return what `icc: false` does on kbr0, where dockerd has it now or at its next start; "" where it has not.

    It is for containers of one bridge. On kbr0 that bridge is also the way to the peers: dockerd's rule does not tell
    them apart, and 29 with nftables has it where no rule of others comes first. Only its owner can give it up.
    """
    given = [word.partition("=")[2].lower() for word in daemon.flags if word.startswith("--icc=")]
    now = daemon.bridge == KBR and daemon.isolates
    if not (now or file.get("icc") is False or given[-1:] in (["false"], ["f"], ["0"])):
        return ""
    return (
        f"dockerd has `icc: false`: on {KBR} it refuses every packet that goes from {KBR} to {KBR}, as all do between "
        f"this node's pods and its peers'. To have the mesh, take icc out of daemon.json and dockerd's command line: "
        f"containers of this host's {KBR} then reach each other too. To keep it, give `--docker off`"
    )


def remembers(daemon: Daemon, wanted: str) -> bool:
    """Return whether dockerd is on kbr0 with another range than wanted, which its next start would put there again.

    It forgets the range of a bridge when it starts with another bridge. (With none it would forget it too, and also
    disable the network of each container that it starts, for good.)
    """
    return daemon.bridge == KBR and not reached(daemon, wanted)


def stale(daemon: Daemon, wanted: str) -> str:
    """Return what a daemon on kbr0 does otherwise than wanted, though it is where it should be; "" for nothing."""
    if not reached(daemon, wanted) or daemon_text(daemon) == wanted:
        return ""
    return (
        f"dockerd still runs {daemon_text(daemon)}, and is wanted {wanted}: daemon.json has that for the next start of "
        "Docker, and nothing is restarted for it. Restart Docker when its containers may stop"
    )


def unsettled(daemon: Daemon, wanted: str, fresh: bool) -> str:
    """Return why a daemon on kbr0 with another range is left so: its containers would stop. "" where it need not be.

    `fresh`: it was not yet seen right on this kbr0, as after a boot; then a restart is part of the switch, if all its
    containers come back.
    """
    if daemon.bridge != KBR or reached(daemon, wanted):
        return ""
    if not daemon.running or (fresh and set(daemon.running) <= set(daemon.returning)):
        return ""
    return (
        f"dockerd still runs {daemon_text(daemon)}, and is wanted {wanted}: only a restart of Docker moves it, which "
        f"would stop its containers. Stop {listed(daemon.running)} when they may stop, then the agent restarts Docker"
    )


def reached(daemon: Daemon, aim: str) -> bool:
    """Return whether a daemon is where a restart was to bring it: MTU and IPv6 are no reason for another one."""
    if aim == AWAY:
        return daemon.state == "up" and daemon.bridge != KBR
    return daemon_text(daemon).replace(",", "").split()[:3] == aim.replace(",", "").split()[:3]


def explained(why: str) -> str:
    """Return what dockerd said, with the remedy where that is known."""
    if "networks have same bridge name" not in why:
        return why
    return (
        f"{why}. This Docker was started once without {KBR}, and keeps a note of that which no later start clears (a "
        "fault of some versions before 27.5): `systemctl stop docker.socket docker; mv "
        "/var/lib/docker/network/files/local-kv.db /var/lib/docker/network/files/local-kv.db.old; systemctl start "
        "docker`, then make Docker's own networks again, as that file held them"
    )


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
