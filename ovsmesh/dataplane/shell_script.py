"""Write a desired dataplane as a plain shell script for one host, with no ovsmesh in it.

What the script makes carries the agent's ownership marks, so `ovsmesh plan` finds nothing to change after it, and an
agent started later takes it over. Everything from outside is quoted for the shell and, where ovs-vsctl reads it, for
that as well.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator

from ovsmesh.dataplane.firewall_rules import IPTABLES, NFT
from ovsmesh.dataplane.nft_syntax import iptables_rule, rules_of, table_script
from ovsmesh.dataplane.types import COOKIE, KBR, MARK, OBR, PROTOCOL, Dataplane, Port
from ovsmesh.text import printable

_NEW = f"{MARK}-new"
_BATCH = 50
"""Ports in one ovs-vsctl call: each call waits for ovs-vswitchd once."""

_HEAD = """\
#!/bin/sh
# {title}
# The dataplane of one host as plain commands. It does not need ovsmesh.
# You may run it again: it adds and corrects, and removes nothing. Links, routes and filter rules are lost at
# a reboot: run it at each boot, after Open vSwitch has started. `ovsmesh agent` takes over what it made, and
# `ovsmesh cleanup` removes it.
{notes}set -eu
export LC_ALL=C PATH="${{PATH:-/usr/bin:/bin}}:/usr/sbin:/sbin"
{rundir}
"""

_GUARD = f"""\
die() {{ echo "$0: $*" >&2; exit 1; }}
[ "$(id -u)" = 0 ] || die 'run it as root'
for tool in ip bridge sysctl ovs-vsctl ovs-ofctl{{tools}}; do
  command -v "$tool" >/dev/null || die "$tool is missing: install iproute2, procps, nftables, openvswitch-switch"
done
exists() {{ ip link show dev "$1" >/dev/null 2>&1; }}
marked() {{ ip link show dev "$1" | grep -qx ' *alias {MARK}'; }}
if exists {KBR} && ! marked {KBR}; then die '{KBR} is not managed by ovsmesh (no alias {MARK}): rename or delete it'; fi
if ovs-vsctl --timeout=30 br-exists {OBR} && [ -z "$(ovs-vsctl --timeout=30 br-get-external-id {OBR} {MARK})" ]; then
  die '{OBR} is not managed by ovsmesh (no external_ids:{MARK}): rename or delete it'
fi
"""

_BRIDGE = """\
if ! exists {kbr}; then
  # Marked before it has its name, so that one left by an interrupted run counts as managed.
  if exists {new}; then ip link del dev {new}; fi
  ip link add name {new} address {mac} mtu {mtu} type bridge
  ip link set dev {new} alias {mark}
  ip link set dev {new} name {kbr}
fi
ip link show dev {kbr} | grep -q 'link/ether {mac} ' || ip link set dev {kbr} address {mac}
ip link set dev {kbr} mtu {mtu} up
"""


def render(want: Dataplane, title: str, notes: Iterable[str] = (), run_dir: str = "") -> str:
    """Return the script. `notes` stand in its head; `run_dir` is Open vSwitch's where it is not the default one."""
    used = {"nft" if key[0] in NFT else key[0] for key in want.rules}
    tools = [tool for tool in ("nft", *IPTABLES) if tool in used]
    head = _HEAD.format(
        title=printable(title, instead=" "),
        notes="".join(f"# Note: {printable(note, instead=' ')}\n" for note in notes),
        rundir=f"export OVS_RUNDIR={shlex.quote(run_dir)}\n" if run_dir else "",
    )
    parts = [
        head,
        _section(
            "requirements, and what must not be in the way",
            [_GUARD.replace("{tools}", "".join(f" {t}" for t in tools))],
        ),
        _section(f"{KBR}: the Linux bridge that containers plug into", _kbr(want)),
        _section("forward packets; send and accept no redirects", _sysctls(want)),
        _section("filter rules: tunnel packets from peers only, no spoofed sources, masquerade", _rules(want)),
        _section(f"{OBR}: the OVS bridge, with one protected tunnel port for each peer", _ovs(want)),
        _section("flows: to each peer by its MAC; from each peer only its own sources; nothing else", _flows(want)),
        _section(f"plug {OBR} into {KBR}, with no flooding to it", _obr(want)),
        _section("addresses; neighbour, FDB entry and route for each peer: no ARP crosses a tunnel", _kernel(want)),
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(line.rstrip("\n") for line in lines)
    return f"# --- {title}\n{body}\n" if body else ""


def _input(command: str, lines: Iterable[str]) -> list[str]:
    """Return a command that reads these lines; the shell expands nothing in them."""
    body = [line for line in lines if line]
    return [f"{command} <<'END'", *body, "END"] if body else []


def _kbr(want: Dataplane) -> list[str]:
    link = want.links[KBR]
    return [_BRIDGE.format(kbr=KBR, new=_NEW, mark=MARK, mac=shlex.quote(link.mac), mtu=link.mtu)]


def _sysctls(want: Dataplane) -> list[str]:
    return [f"sysctl -q -w {shlex.quote(f'{key}={value}')}" for key, value in want.sysctls.items()]


def _rules(want: Dataplane) -> list[str]:
    lines = []
    for family in NFT:
        rules = rules_of(family, want.rules)
        if rules:
            lines += _input("nft -f -", _indented(table_script(family, rules, want.filter_peers)))
    for tool in IPTABLES:
        for key, rule in rules_of(tool, want.rules).items():
            spec = iptables_rule(key, rule)
            # at the end, behind the rules of others, also where it was there before
            lines.append(f"{tool} -w 5 -D FORWARD {spec} 2>/dev/null || :")
            lines.append(f"{tool} -w 5 -A FORWARD {spec}")
    return lines


def _indented(script: str) -> Iterator[str]:
    depth = 0
    for line in script.splitlines():
        depth -= line.startswith("}")
        yield "  " * depth + line
        depth += line.endswith("{")


def _string(text: str) -> str:
    """Return a value quoted for ovs-vsctl, which would read a name like `true` or 2001:db8::1 as something else."""
    return json.dumps(text)


def _ovs(want: Dataplane) -> list[str]:
    bridge = want.bridges[OBR]
    lines = [
        f"ovs-vsctl --timeout=30 --may-exist add-br {OBR} \\",
        f"  -- set Bridge {OBR} datapath_type={bridge.datapath_type} fail_mode={bridge.fail_mode} "
        f"external_ids:{MARK}=1 \\",
        f"  -- set Interface {OBR} mtu_request={bridge.mtu_request}",
    ]
    ports = [_port(name, port) for name, port in want.ports.items()]
    for start in range(0, len(ports), _BATCH):
        lines += ["ovs-vsctl --timeout=60 \\", " \\\n".join(ports[start : start + _BATCH])]
    return lines


def _port(name: str, port: Port) -> str:
    ids = {MARK: port.node} | ({f"{MARK}-uid": port.uid} if port.uid else {})
    options = {"remote_ip": port.remote, "local_ip": port.local} | ({"key": port.key} if port.key else {})
    words = [
        *("--", "--may-exist", "add-port", OBR, name),
        *("--", "set", "Port", name, f"protected={str(port.protected).lower()}", f"external_ids={_map(ids)}"),
        *("--", "set", "Interface", name, f"type={port.type}", f"options={_map(options)}"),
    ]
    return "  " + shlex.join(words)


def _map(values: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}={_string(value)}" for key, value in values.items()) + "}"


def _flows(want: Dataplane) -> list[str]:
    return _input(f"ovs-ofctl --bundle add-flows {OBR} -", (_flow(*flow) for flow in want.flows.items()))


def _flow(key: str, actions: str) -> str:
    priority, _, match = key.partition(" ")
    # quoted, as a port's name may have a dot
    fields = [
        f'in_port="{field[8:]}"' if field.startswith("in_port=") and field != "in_port=LOCAL" else field
        for field in match.split(",")
    ]
    to = f'output:"{actions[7:]}"' if actions.startswith("output:") else actions
    return ",".join(filter(None, [f"cookie={COOKIE:#x}", f"priority={priority}", *fields, f"actions={to}"]))


def _obr(want: Dataplane) -> list[str]:
    link = want.links[OBR]
    return [
        f"ip link set dev {OBR} master {link.master} up",
        f"bridge link set dev {OBR} learning off flood off mcast_flood off bcast_flood off",
    ]


def _kernel(want: Dataplane) -> list[str]:
    lines = [
        f"address replace {address} dev {link}{' nodad' if ':' in address else ''}"
        for address, link in want.addresses.items()
    ]
    lines += [
        f"neighbour replace {gateway} lladdr {mac} dev {KBR} nud permanent protocol {PROTOCOL}"
        for gateway, mac in want.neighbours.items()
    ]
    fdb = [f"fdb replace {mac} dev {port} master static sticky" for mac, port in want.fdb.items()]
    routes = []
    for (destination, metric), route in want.routes.items():
        how = f"via {route.via} dev {route.dev} onlink" if route.via else ""
        kind = "" if route.type == "unicast" else f"{route.type} "
        more = f" mtu {route.mtu}" if route.mtu else ""
        routes.append(
            f"route replace {kind}{destination} {how} proto {PROTOCOL} metric {metric}{more}".replace("  ", " ")
        )
    return [*_input("ip -batch -", lines), *_input("bridge -batch -", fdb), *_input("ip -batch -", routes)]
