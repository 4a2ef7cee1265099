"""What the tests of a live mesh look at, break and send: each host's real state, read from outside the agent.

Knows ip, nft, ovs-vsctl and packet sockets, and nothing of the rooms under test but their names of things.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any

from ovsmesh import labnet
from ovsmesh.lab import Lab
from ovsmesh.labhost import Host, Pod
from ovsmesh.labnet import LabError, wait_for
from ovsmesh.labping import Pair, Track, ping

Make = Callable[..., Lab]
State = dict[str, Any]

SOON = 10.0
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
                # what the kernel draws anew at each reading, or may not be read
                if path.is_file() and path.stat().st_mode & 0o444 and "stable_secret" not in path.name:
                    with contextlib.suppress(OSError):
                        found[str(path.relative_to("/proc/sys"))] = path.read_text().strip()
        return found

    return labnet.within(host.ns, read)


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
    assert done.returncode == 0, done.stdout + done.stderr
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


def mend(lab: Lab) -> None:
    """Starts whatever an earlier test that failed has left dead, so that it fails alone."""
    for host in lab.hosts:
        if not host.daemon("ovsdb-server"):
            host.start_ovsdb()
        if not host.daemon("ovs-vswitchd"):
            host.start_vswitchd()
        if not host.agent_alive():
            host.start_agent()
    at_rest(lab, 2 * SOON)


def guarded(lab: Lab, thorough: bool = True) -> Iterator[Lab]:
    """What a fixture yields from: the lab as a test finds it and has to leave it, which is converged.

    Without `thorough` the agents' word is enough: for tests that compare the state itself.
    """
    mend(lab)
    yield lab
    at_rest(lab)
    if thorough:
        lab.converged(SOON, thorough=True)


# --- packets


def assert_whole(tracks: Sequence[Track]) -> None:
    """Every packet came back once, from where it was sent to."""
    assert tracks
    bad = [t for t in tracks if t.lost or t.duplicates or t.strays or t.errors]
    told = [f"{t.pair}: lost {t.lost} of {len(t.sent)}, twice {t.duplicates}, {dict(t.errors)}" for t in bad]
    assert not bad, "\n".join(told[:10])


def assert_reach(lab: Lab, pairs: Sequence[Pair] | None = None, timeout: float = SOON) -> None:
    """Every pod reaches every other again, within the deadline; from then on with no packet lost."""
    left = list(lab.pairs() if pairs is None else pairs)

    def all_answer() -> bool:
        left[:] = [t.pair for t in ping(left, 1, timeout=0.3) if t.lost]
        return not left

    try:
        wait_for("every pair to answer", all_answer, timeout, every=0.05)
    except LabError:
        raise AssertionError(f"no answer in {timeout:g} s: {left[:10]}") from None
    assert_whole(ping(lab.pairs() if pairs is None else pairs, 3))


def silent(pairs: Sequence[Pair]) -> bool:
    """No pair gets a single answer."""
    return all(not track.received for track in ping(pairs, 2, timeout=0.3))


class Sniffer:
    """Collects the frames that a device of a namespace receives, until it is left. Bound before it returns."""

    def __init__(self, ns: str, device: str = "eth0", outgoing: bool = False) -> None:
        self._outgoing = outgoing
        self.frames: list[bytes] = []
        self._socket = labnet.within(ns, lambda: self._open(device))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"sniffer-{ns}", daemon=True)

    @staticmethod
    def _open(device: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((device, 0))
        sock.settimeout(0.05)
        return sock

    def __enter__(self) -> Sniffer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                frame, address = self._socket.recvfrom(65535)
            except TimeoutError:
                continue
            except OSError:
                # the device went down: reading takes the error
                continue
            if self._outgoing or address[2] != socket.PACKET_OUTGOING:
                self.frames.append(frame)

    def count(self, marker: bytes) -> int:
        return sum(marker in frame for frame in list(self.frames))

    def await_marker(self, marker: bytes, timeout: float = SOON) -> None:
        wait_for(f"a frame with {marker!r}", lambda: self.count(marker) > 0, timeout)


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(source: str, target: str, payload: bytes, protocol: int = socket.IPPROTO_UDP) -> bytes:
    """An IP packet of either family; as UDP it goes from port 4000 to port 4001."""
    a, b = ip_address(source), ip_address(target)
    if protocol == socket.IPPROTO_UDP:
        head = struct.pack("!HHHH", 4000, 4001, 8 + len(payload), 0)
        pseudo = a.packed + b.packed + struct.pack("!II", 8 + len(payload), protocol)
        payload = head[:6] + struct.pack("!H", checksum(pseudo + head + payload) or 0xFFFF) + payload
    if a.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + a.packed + b.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + a.packed + b.packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ethernet(target: str, source: str, packet: bytes) -> bytes:
    """A frame around an IP packet; MACs as text."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    return (
        bytes.fromhex(target.replace(":", ""))
        + bytes.fromhex(source.replace(":", ""))
        + struct.pack("!H", kind)
        + packet
    )


def send_frame(ns: str, device: str, *frames: bytes) -> None:
    def opened() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((device, 0))
        return sock

    with labnet.within(ns, opened) as sock:
        for frame in frames:
            sock.send(frame)


def send_packet(ns: str, *packets: bytes) -> None:
    """IP packets with headers of our own making, as a process of the namespace with CAP_NET_RAW sends them."""
    for packet in packets:
        four = packet[0] >> 4 == 4
        family = socket.AF_INET if four else socket.AF_INET6
        with labnet.within(ns, lambda f=family: socket.socket(f, socket.SOCK_RAW, socket.IPPROTO_RAW)) as sock:  # type: ignore[misc]
            target = socket.inet_ntop(family, packet[16:20] if four else packet[24:40])
            sock.sendto(packet, (target, 0))


def mac(ns: str, device: str = "eth0") -> str:
    return str(json.loads(labnet.run(["ip", "-j", "link", "show", device], ns).stdout)[0]["address"])


def pod_to_remote_hosts(lab: Lab, source: Pod) -> list[Pair]:
    return [pair for pair in lab.pairs(between_hosts_only=True) if pair.ns == source.ns]


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
