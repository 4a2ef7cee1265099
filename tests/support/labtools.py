"""What the tests of a live mesh look at: each host's real state, read with ip, nft and ovs-vsctl, outside the agent."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError, wait_for

Make = Callable[..., Lab]
State = dict[str, Any]

SOON = 60.0
"""Seconds that anything may take on a busy machine; what it takes on a quiet one is for the benches."""
VOLATILE = (
    *("next_cfg", "cur_cfg", "statistics", "status", "link_resets", "link_state", "admin_state", "mac_in_use"),
    *("ifindex", "ofport", "mtu", "error", "rstp_status", "_version", "lacp_current", "cfm_fault", "link_speed"),
    *("duplex", "_uuid", "datapath_id", "datapath_version", "datapath_types", "iface_types", "datapaths", "db_version"),
)
"""Columns that ovs-vswitchd writes, or that count transactions."""


# --- reading a host


def ip_json(host: Host, *args: str) -> list[dict[str, Any]]:
    found = host.run(["ip", "-j", *args]).stdout.strip()
    return json.loads(found) if found else []


def sysctls(host: Host, *below: str) -> dict[str, str]:
    """Every readable setting below /proc/sys/net of the host, by its path below /proc/sys."""

    def read() -> dict[str, str]:
        found = {}
        for top in below or ("net/ipv4", "net/ipv6"):
            for path in Path("/proc/sys", top).rglob("*"):
                # what the kernel draws again at each reading, or may not be read
                if path.is_file() and path.stat().st_mode & 0o444 and "stable_secret" not in path.name:
                    with contextlib.suppress(OSError):
                        found[str(path.relative_to("/proc/sys"))] = path.read_text().strip()
        return found

    return netns.within(host.ns, read)


def ovsdb(host: Host) -> dict[str, list[dict[str, Any]]]:
    """Every row that a user or an agent wrote, with names for row numbers."""
    text = host.run(["ovsdb-client", "--format=json", "--data=json", "dump", host.ovsdb]).stdout
    tables = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = {t["caption"].split()[0]: [dict(zip(t["headings"], row, strict=True)) for row in t["data"]] for t in tables}
    names = {row["_uuid"][1]: row.get("name", table) for table, many in rows.items() for row in many}

    def plain(value: Any) -> Any:
        if isinstance(value, list) and len(value) == 2 and value[0] == "uuid":
            return names.get(value[1], value[1])
        if isinstance(value, list) and len(value) == 2 and value[0] in ("set", "map"):
            return sorted((plain(item) for item in value[1]), key=str)
        return [plain(item) for item in value] if isinstance(value, list) else value

    kept = {
        table: [{key: plain(value) for key, value in row.items() if key not in VOLATILE} for row in many]
        for table, many in rows.items()
    }
    for row in kept.get("Bridge", []):
        # the agent counts here how often it had ovs-vswitchd try again
        row["external_ids"] = [[k, "" if k == "ovsmesh" else v] for k, v in row["external_ids"]]
    return {table: sorted(many, key=str) for table, many in kept.items() if many}


def flows(host: Host, bridge: str = "obr0") -> list[str]:
    """The flow table with port names, without counters; empty when the switch does not answer."""
    done = host.run(["ovs-ofctl", "--names", "--no-stats", "dump-flows", bridge], check=False)
    return sorted(line.strip() for line in done.stdout.splitlines() if "actions=" in line)


def rules(host: Host) -> str:
    """nft and iptables rules, without counters and handles."""
    return "\n".join(
        [
            host.run(["nft", "-s", "list", "ruleset"]).stdout,
            *(re.sub(r"(?m)^#.*\n|\[\d+:\d+\]", "", host.run([tool]).stdout) for tool in _SAVES),
        ]
    )


_SAVES = ("iptables-save", "ip6tables-save")


def links(host: Host) -> dict[str, Any]:
    keep = ("mtu", "master", "address", "ifalias")
    found = {}
    for link in ip_json(host, "-d", "link", "show"):
        slave = link.get("linkinfo", {}).get("info_slave_data", {})
        about = {key: link[key] for key in keep if key in link} | {"up": "UP" in link["flags"]}
        if link["ifname"] in ("obr0", "br-phy", "ovs-netdev"):
            # made by ovs-vswitchd under a random address
            about.pop("address", None)
        about |= {key: slave[key] for key in ("flood", "learning", "mcast_flood", "bcast_flood") if key in slave}
        found[link["ifname"]] = about
    return found


def addresses(host: Host) -> list[str]:
    found = []
    for link in ip_json(host, "addr", "show"):
        for entry in link["addr_info"]:
            if not entry["local"].startswith("fe80:"):
                found.append(f"{entry['local']}/{entry['prefixlen']} dev {link['ifname']}")
    return sorted(found)


def routes(host: Host) -> list[str]:
    text = [host.run(["ip", version, "route", "show", "table", "all"]).stdout for version in ("-4", "-6")]
    # link-local and multicast routes come and go with links, and some settle only after a second
    lines = [line.strip() for line in "".join(text).splitlines() if not re.search(r"\bfe80:|ff00::|broadcast", line)]
    return sorted(line for line in lines if line and "cache" not in line)


def neighbours(host: Host) -> list[str]:
    return sorted(line.strip() for line in host.run(["ip", "neigh", "show", "nud", "permanent"]).stdout.splitlines())


def fdb(host: Host, bridge: str = "kbr0") -> list[str]:
    done = host.run(["bridge", "fdb", "show", "br", bridge], check=False)
    return sorted(line.strip() for line in done.stdout.splitlines() if "static" in line)


def wiring(host: Host) -> State:
    """Everything that makes the mesh on this host, and what of others lies beside it."""
    return {
        "links": links(host),
        "addresses": addresses(host),
        "routes": routes(host),
        "neighbours": neighbours(host),
        "fdb": fdb(host),
        "flows": flows(host),
        "rules": rules(host),
        "ovsdb": ovsdb(host),
        "sysctls": sysctls(host),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> list[str]:
    """What is not the same in two states, each as one line."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += difference(a, b, f"{at}{key} ")
        elif isinstance(a, list) and isinstance(b, list):
            found += [f"{at}{key} - {item}" for item in a if item not in b]
            found += [f"{at}{key} + {item}" for item in b if item not in a]
        elif isinstance(a, str) and isinstance(b, str) and "\n" in a + b:
            found += difference({key: a.splitlines()}, {key: b.splitlines()}, at)
        else:
            found.append(f"{at}{key}: {a} → {b}")
    return found


def await_state(read: Callable[[], Mapping[str, Any]], wanted: Mapping[str, Any], timeout: float = SOON) -> None:
    """Until what is read equals what is wanted. Raises AssertionError with the differences."""
    last: list[str] = []

    def same() -> bool:
        last[:] = difference(wanted, read())
        return not last

    try:
        wait_for("the state to be as wanted", same, timeout, every=0.05)
    except LabError:
        raise AssertionError(f"not as wanted after {timeout:g} s:\n" + "\n".join(last[:40])) from None


# --- asking the agent


def metrics(host: Host) -> dict[str, float]:
    """Every sample of /metrics by its name with labels, as it stands there."""
    status, body = host.http("/metrics")
    assert status == 200, body
    pairs = (line.rsplit(" ", 1) for line in body.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def drift(host: Host) -> dict[str, float]:
    """How often each kind of part was found changed by someone else."""
    found = {re.fullmatch(r'ovsmesh_drift_total\{kind="(\w+)"\}', name): value for name, value in metrics(host).items()}
    return {match[1]: value for match, value in found.items() if match}


def report(host: Host) -> dict[str, Any]:
    done = host.ovsmesh("status", "-o", "json")
    assert done.returncode in (0, 2), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def live(host: Host) -> dict[str, Any]:
    """The report that the agent itself shows."""
    status, body = host.http("/status.json")
    found: dict[str, Any] = json.loads(body) if status == 200 else {"converged": False, "problems": []}
    return found


def problems(host: Host) -> list[str]:
    """What the agent says is wrong, a line for each problem: reason, node, field, value, message.

    What this kernel lacks is left out.
    """
    found = [p for p in live(host)["problems"] if p["reason"] != "FilterUnavailable"]
    return [" ".join(str(p.get(k, "")) for k in ("reason", "node", "field", "value", "message")) for p in found]


def await_problem(host: Host, *words: str, timeout: float = SOON) -> str:
    """Until one line of problems() has all words; returns it."""
    return wait_for(
        f"{host.name} to say {' … '.join(words)}",
        lambda: next((line for line in problems(host) if all(word in line for word in words)), ""),
        timeout,
        every=0.05,
    )


def at_rest(lab: Lab, timeout: float = SOON) -> None:
    """Until every agent is converged and says that nothing is wrong."""
    left: dict[str, object] = {}

    def quiet() -> bool:
        left.clear()
        left.update({h.name: problems(h) for h in lab.hosts if problems(h) or not live(h)["converged"]})
        return not left

    try:
        wait_for("all agents to be at rest", quiet, timeout, every=0.05)
    except LabError:
        raise AssertionError(f"not at rest after {timeout:g} s: {left}") from None


def turns(host: Host) -> float:
    return metrics(host)["ovsmesh_reconcile_total"]


def operations(host: Host) -> float:
    """How many changes the agent has made since it started."""
    return sum(n for name, n in metrics(host).items() if name.startswith("ovsmesh_apply_operations_total"))


def tunnels(host: Host) -> list[str]:
    return sorted(host.ovs_vsctl("list-ports", "obr0").split())


def confirm(host: Host, digest: str) -> subprocess.CompletedProcess[str]:
    """`ovsmesh confirm`, as `status` says to do it."""
    command = [sys.executable, "-m", "ovsmesh", "confirm", digest, "--state-dir", str(host.state / "agent")]
    return host.run(command, check=False)


def held(host: Host) -> str:
    """The digest of the removals that the host's agent holds; "" when it holds none."""
    found = re.search(r"ovsmesh confirm ([0-9a-f]{12})", " ".join(problems(host)))
    return found[1] if found else ""


def confirm_all(lab: Lab) -> None:
    for host in lab.hosts:
        if digest := held(host):
            confirm(host, digest)


def revive(lab: Lab) -> None:
    """Start what an earlier, failed test has left dead, so that no other test fails with it."""
    for host in lab.hosts:
        if not host.daemon("ovsdb-server"):
            host.start_ovsdb()
        if not host.daemon("ovs-vswitchd"):
            host.start_vswitchd()
        if not host.agent_alive():
            host.start_agent()
    at_rest(lab)


def guarded(lab: Lab, thorough: bool = True) -> Iterator[Lab]:
    """What a fixture yields from: the lab as a test finds it and has to leave it, which is converged.

    Without `thorough` the agents' word is enough: for tests that compare the state itself.
    """
    revive(lab)
    yield lab
    at_rest(lab)
    if thorough:
        lab.converged(SOON, thorough=True)


# --- watching what is written


@dataclass
class Quiet:
    """What others' monitors saw written while nothing was to be written."""

    lines: list[str]


@contextlib.contextmanager
def netlink_watched(host: Host) -> Iterator[Quiet]:
    """Collects what `ip monitor` and `nft monitor` of the host show, less neighbours that age by themselves."""
    monitors = [["ip", "-o", "monitor", "all"], ["nft", "-n", "monitor"]]
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", host.ns, "stdbuf", "-oL", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for argv in monitors
    ]
    lines: list[str] = []

    def collect(child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.decode(errors="replace").strip())

    threads = [threading.Thread(target=collect, args=(child,), daemon=True) for child in running]
    for thread in threads:
        thread.start()

    def seen(mark: str, address: str) -> bool:
        """Makes a mark in each monitor, and says whether both have shown it."""
        host.run(["ip", "route", "replace", "blackhole", address, "proto", "99"])
        host.run(["ip", "route", "del", "blackhole", address])
        host.run(["nft", "-f", "-"], text=f"add table ip {mark}; delete table ip {mark};")
        wanted = (f"Deleted blackhole {address}", f"delete table ip {mark}")
        return all(any(text in line for line in lines) for text in wanted)

    quiet = Quiet([])
    try:
        wait_for("the monitors to watch", lambda: seen("startmark", "203.0.113.1"), SOON)
        yield quiet
        wait_for("the monitors' last words", lambda: seen("endmark", "203.0.113.2"), SOON)
    finally:
        for child in running:
            child.send_signal(signal.SIGTERM)
            child.wait(timeout=SOON)
        for thread in threads:
            thread.join(SOON)
        for child in running:
            assert child.stdout is not None
            child.stdout.close()
    quiet.lines = [
        line
        for line in lines
        if not re.search(r"startmark|endmark|203\.0\.113\.|# new generation", line)
        and not ("[NEIGH]" in line and "PERMANENT" not in line)
    ]


def transactions(host: Host) -> tuple[int, str]:
    """The bytes of the OVS database's log, which every transaction lengthens, and next_cfg.

    What ovs-vswitchd counts (statistics, status) is not in the log.
    """
    size = (host.state / "conf.db").stat().st_size
    return size, host.ovs_vsctl("get", "Open_vSwitch", ".", "next_cfg").strip()
