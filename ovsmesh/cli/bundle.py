"""`ovsmesh bundle`: everything that a maintainer asks for in one archive, secrets left out.

From each source it takes what is known to be harmless; what is taken goes through redact() too. Each part has a
deadline and a bound. What can't be had is named in the manifest, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ovsmesh import __version__, history
from ovsmesh import redact as known
from ovsmesh.agent.options import Options
from ovsmesh.bounded import Absent, get, read_file
from ovsmesh.bounded import run as bounded_run
from ovsmesh.errors import OvsmeshError
from ovsmesh.mesh.manifest import dump, parse
from ovsmesh.mesh.types import MeshError
from ovsmesh.ovs.idl import run_dir
from ovsmesh.redact import TABLES, redact
from ovsmesh.state_dir import HISTORY_FILES, StateDir, read_regular, write_atomic
from ovsmesh.text import duration, printable

_MOST = 20_000_000
"""Bytes of all parts, so of the archive too."""
_PART = 2 << 20
_DEADLINE, _ALL = 10.0, 90.0
"""Seconds for one part, and after which no other is begun."""
_SLOW = 45.0
"""Seconds for what looks at the whole system, or sends packets."""
_AT_ONCE = 6
_LOG_LINES = "5000"
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Searched too: the PATH of a user may have none of them."""
_OPENFLOW = "OpenFlow10,OpenFlow13,OpenFlow14,OpenFlow15"


class Part(NamedTuple):
    """One file of the archive."""

    name: str
    source: str
    """What it is made from: a command, a file, an address."""
    make: Callable[[], tuple[str, str]]
    """Returns its text and a note. Raises Absent."""


class Made(NamedTuple):
    """What became of a part."""

    part: Part
    text: str
    note: str
    """Why it is not there, or not whole; "" where it is."""
    absent: bool = False


# Commands


def _environment(options: Options) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (os.environ.get("PATH", ""), _SBIN)))
    kept = {name: os.environ[name] for name in ("OVS_LOGDIR", "OVS_DBDIR", "PYTHONPATH", "TZ") if name in os.environ}
    own = {name: value for name, value in os.environ.items() if name.startswith("OVSMESH_")}
    return {**own, **kept, "PATH": path, "LC_ALL": "C.UTF-8", "OVS_RUNDIR": str(run_dir(options.ovsdb))}


# What is taken from each source

_AGENT = (
    *("node", "mesh", "ovsdb", "state_dir", "listen", "cni_dir", "cni_bin_dir", "docker", "docker_config"),
    *("docker_socket", "docker_timeout", "pid", "version"),
)
"""Options of the agent; the command that restarts Docker and the kubeconfig are not among them."""
_UNIT = (
    "Id,ActiveState,SubState,Result,NRestarts,ExecMainStatus,ExecMainStartTimestamp,MemoryCurrent,StateChangeTimestamp"
)
_KERNEL = re.compile(
    r"openvswitch|\bovs|kbr0|obr0|\bgre\b|vxlan|geneve|nf_tables|br_netfilter|nf_conntrack|martian|oom", re.I
)
_MODULES = re.compile(
    r"^(openvswitch|vport_\w+|gre|ip_gre|ip6_gre|vxlan|geneve|bridge|br_netfilter|nf_\w+|nft_\w+|ip\w*_tables"
    r"|ip6?table_\w+|xt_\w+|veth|nsh|stp|llc) "
)
_SYSCTLS = (
    *("net/ipv4/ip_forward", "net/ipv4/conf/*/*", "net/ipv6/conf/*/*", "net/ipv4/neigh/default/gc_*"),
    *("net/ipv6/neigh/default/gc_*", "net/ipv6/route/*", "net/ipv4/ip_no_pmtu_disc", "net/ipv4/tcp_mtu_probing"),
    *("net/bridge/*", "net/netfilter/nf_conntrack_count", "net/netfilter/nf_conntrack_max", "net/core/*mem_max"),
    *("net/core/netdev_max_backlog", "kernel/osrelease", "fs/inotify/max_user_*"),
)
_LINKS = re.compile(r"/conf/(?!all/|default/|kbr0/|obr0/|ovs-system/|docker0/|lo/|e|b|w)")
"""Links whose sysctls are left away: those of each pod and each tunnel."""


def _daemon_json(path: Path) -> tuple[str, str]:
    try:
        found = json.loads(read_regular(path)[0])
    except (OSError, ValueError, RecursionError) as error:
        raise Absent(error.strerror or str(error) if isinstance(error, OSError) else "is not JSON") from error
    if not isinstance(found, dict):
        raise Absent("is not a JSON object")
    kept = known.daemon_json(found)
    return json.dumps(kept, indent=2) + "\n", f"{len(found) - len(kept)} keys that are not about networks are left out"


def _mesh(path: Path) -> tuple[str, str]:
    """Return a mesh file as ovsmesh understands it: nothing else of it, comments and other keys included."""
    try:
        mesh, problems = parse(read_regular(path)[0], str(path))
    except (OSError, MeshError) as error:
        raise Absent(str(error.strerror if isinstance(error, OSError) else error)) from error
    return dump(mesh) + "".join(f"# {printable(problem, 1000)}\n" for problem in problems), ""


def _names_in(folder: str) -> tuple[str, str]:
    if not folder:
        raise Absent("the agent has no --cni-dir")
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise Absent(error.strerror or str(error)) from error
    lines = (
        f"{found.st_mode:o} {found.st_size:8} {_utc(found.st_mtime)} {printable(name)}\n" for name, found in found[:500]
    )
    return "".join(lines), "names only"


def _sysctls() -> tuple[str, str]:
    lines = []
    root = Path("/proc/sys")
    for pattern in _SYSCTLS:
        for path in sorted(root.glob(pattern)):
            name = str(path.relative_to(root))
            if _LINKS.search(name) or path.name.endswith(("_secret", "secret")):
                continue
            with contextlib.suppress(OSError):
                lines.append(f"{name} = {path.read_text().strip()}\n")
    return "".join(lines), ""


def _agent(state: StateDir) -> tuple[str, str]:
    found = state.agent()
    if not found:
        raise Absent("no agent has left its options")
    return json.dumps({"running": state.held(), **{key: found.get(key) for key in _AGENT}}, indent=2) + "\n", ""


def _history(state: StateDir) -> tuple[str, str]:
    try:
        entries = history.read(state.path)
    except OvsmeshError as error:
        raise Absent(str(error)) from error
    if not entries:
        raise Absent("it is empty, or there is none")
    return "".join(json.dumps(entry.to_dict(), ensure_ascii=False) + "\n" for entry in entries), ""


def _host() -> tuple[str, str]:
    lines = [f"{key}: {value}" for key, value in platform.uname()._asdict().items()]
    lines.append(f"time: {datetime.now().astimezone().isoformat(' ', 'seconds')}")
    for path in ("/etc/os-release", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/proc/modules"):
        with contextlib.suppress(Absent):
            text = read_file(Path(path), _PART)[0]
            if path == "/proc/modules":
                text = "".join(line + "\n" for line in text.splitlines() if _MODULES.match(line))
            lines.append(f"\n# {path}\n{text.rstrip()}")
    return "\n".join(lines) + "\n", ""


def _versions(run: Callable[..., tuple[str, str]]) -> tuple[str, str]:
    lines = [f"ovsmesh {__version__}", f"Python {platform.python_version()}"]
    for package in ("ovs", "pyroute2", "kubernetes", "click", "PyYAML", "prometheus_client", "tenacity", "urllib3"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"{package} {metadata.version(package)}")
    commands = (
        *(["ovs-vsctl", "--version"], ["ovs-vswitchd", "--version"], ["docker", "--version"], ["nft", "--version"]),
        *(["iptables", "--version"], ["ip", "-V"], ["systemctl", "--version"], ["containerd", "--version"]),
    )
    for argv in commands:
        try:
            lines.append(run(argv)[0].strip().splitlines()[0])
        except (Absent, IndexError) as error:
            lines.append(f"{argv[0]}: {error}")
    return "\n".join(lines) + "\n", ""


def _docker_logs(run: Callable[..., tuple[str, str]], docker: list[str]) -> tuple[str, str]:
    names = run([*docker, "ps", "-a", "--filter", "name=ovsmesh", "--format", "{{.Names}}"])[0].split()[:4]
    if not names:
        raise Absent("no container has ovsmesh in its name")
    found = [(name, *run([*docker, "logs", "--timestamps", "--tail", _LOG_LINES, name])) for name in names]
    return "".join(f"# {name}\n{text}\n" for name, text, _ in found), "; ".join(
        filter(None, (note for *_, note in found))
    )


def _pod_logs() -> tuple[str, str]:
    paths = sorted(Path("/var/log/pods").glob("ovsmesh_ovsmesh-*/*/*.log"), key=lambda p: p.stat().st_mtime)[-6:]
    if not paths:
        raise Absent("there are none in /var/log/pods")
    return "".join(f"# {path}\n{read_file(path, _PART // 6, end=True)[0]}\n" for path in paths), ""


# The archive


def parts(options: Options, given: list[str], state: StateDir) -> Iterator[Part]:
    """Yield the parts, the most wanted first. `given` are the options with which other commands are called."""
    env = _environment(options)

    def run(argv: list[str], most: int = _PART, deadline: float = _DEADLINE) -> tuple[str, str]:
        return bounded_run(argv, env, most, deadline)

    def command(
        name: str, *argv: str, only: Callable[[str], str] = str, most: int = _PART, deadline: float = _DEADLINE
    ) -> Part:
        def make() -> tuple[str, str]:
            text, note = run(list(argv), most, deadline)
            return only(text), note

        return Part(name, " ".join(argv), make)

    def own(name: str, *argv: str) -> Part:
        line = [sys.executable, "-m", "ovsmesh", *argv, *given]
        return Part(name, " ".join(["ovsmesh", *argv]), lambda: bounded_run(line, env, _PART, _SLOW, says=True))

    def live(name: str, path: str, most: int = _PART, deadline: float = _DEADLINE) -> Part:
        return Part(name, f"http://{options.listen}{path}", lambda: get(options.listen, path, most, deadline))

    def file(path: Path, name: str, make: Callable[[], tuple[str, str]]) -> Part:
        return Part(name, str(path), make)

    switch = f"unix:{run_dir(options.ovsdb)}/obr0.mgmt"
    vsctl = ("ovs-vsctl", f"--db={options.ovsdb}", "--timeout=5", "--no-wait")
    docker = ["docker", "-H", f"unix://{options.docker_socket}"]
    yield Part("versions.txt", "programs and packages", lambda: _versions(run))
    yield Part("host.txt", "uname, /etc/os-release, /proc", _host)
    yield own("status.txt", "status")
    yield own("status.json", "status", "-o", "json")
    yield own("plan.txt", "plan")
    yield own("check.txt", "check")
    yield file(state.path / HISTORY_FILES[0], "history.jsonl", lambda: _history(state))
    yield live("agent/status.json", "/status.json")
    yield live("agent/metrics.txt", "/metrics")
    yield live("agent/matrix.json", "/matrix.json", 4 << 20, _SLOW)
    yield file(state.path / "agent.json", "agent/options.json", lambda: _agent(state))
    yield file(
        state.path / "status.json", "agent/status-file.json", lambda: read_file(state.path / "status.json", _PART)
    )
    if options.mesh and options.mesh != str(state.mesh_file):
        yield file(Path(options.mesh), "mesh/file.json", lambda: _mesh(Path(options.mesh)))
    yield file(state.mesh_file, "mesh/last-good.json", lambda: _mesh(state.mesh_file))
    journal = ("journalctl", "--no-pager", "-o", "short-iso-precise", "-n", _LOG_LINES)
    yield command("log/agent.txt", *journal, "-u", "ovsmesh-agent", most=4 << 20)
    yield Part("log/containers.txt", "docker logs", lambda: _docker_logs(run, docker))
    yield Part("log/pods.txt", "/var/log/pods/ovsmesh_ovsmesh-*", _pod_logs)
    logs = Path(os.environ.get("OVS_LOGDIR") or "/var/log/openvswitch")
    for program in ("ovs-vswitchd", "ovsdb-server"):
        path = logs / f"{program}.log"
        yield file(path, f"log/{program}.txt", partial(read_file, path, 1 << 20, end=True))
    yield command(
        "log/kernel.txt", "dmesg", only=lambda t: "\n".join([x for x in t.splitlines() if _KERNEL.search(x)][-500:])
    )
    yield command(
        "log/units.txt",
        "systemctl",
        "show",
        "-p",
        _UNIT,
        "ovsmesh-agent",
        "openvswitch-switch",
        "ovs-vswitchd",
        "docker",
    )
    yield command("ovs/show.txt", *vsctl, "show", only=known.show)
    for table in TABLES:
        listed = (*vsctl, "-f", "json", "list", table)
        yield command(f"ovs/{table}.jsonl", *listed, only=partial(known.table, table), most=16 << 20)
    for name, *words in (
        ("flows", "dump-flows"), ("groups", "dump-groups"), ("group-stats", "dump-group-stats"),
        ("ports", "dump-ports"), ("switch", "show"),
    ):  # fmt: skip
        argv = ("ovs-ofctl", "-O", _OPENFLOW, "--names", "--timeout=8", *words, switch)
        yield command(f"ovs/{name}.txt", *argv, most=4 << 20)
    for name, *words in (
        ("datapath", "dpif/show"), ("datapath-flows", "dpctl/dump-flows", "-m"), ("fdb", "fdb/show", "obr0"),
        ("tunnel-ports", "tnl/ports/show", "-v"), ("tunnel-routes", "ovs/route/show"),
        ("tunnel-neighbours", "tnl/neigh/show"), ("upcalls", "upcall/show"), ("coverage", "coverage/show"),
    ):  # fmt: skip
        yield command(f"ovs/{name}.txt", "ovs-appctl", "--timeout=8", *words)
    for name, *words in (
        ("links", "ip", "-d", "-s", "link"), ("addresses", "ip", "-d", "addr"), ("netns", "ip", "netns", "list-id"),
        ("routes", "ip", "-d", "route", "show", "table", "all"), ("rules", "ip", "-d", "rule"),
        ("routes6", "ip", "-6", "-d", "route", "show", "table", "all"), ("rules6", "ip", "-6", "-d", "rule"),
        ("neighbours", "ip", "-s", "neigh"), ("fdb", "bridge", "-d", "-s", "fdb"),
        ("bridge-ports", "bridge", "-d", "link"), ("vlans", "bridge", "vlan"),
    ):  # fmt: skip
        yield command(f"network/{name}.txt", *words, only=known.aliases)
    yield Part("network/sysctls.txt", "/proc/sys", _sysctls)
    # without the elements of sets of others
    yield command("filter/nft.txt", "nft", "-a", "-t", "list", "ruleset", only=known.comments)
    for family in ("inet", "bridge"):
        yield command(
            f"filter/nft-ovsmesh-{family}.txt", "nft", "-a", "list", "table", family, "ovsmesh", only=known.comments
        )
    for tool in ("iptables", "ip6tables"):
        for variant in ("nft", "legacy"):
            yield command(f"filter/{tool}-{variant}.txt", f"{tool}-{variant}-save", "-c", only=known.comments)
    cni = options.cni_dir
    yield Part("containers/cni-files.txt", cni or "the CNI directory", lambda: _names_in(cni))
    daemon = Path(options.docker_config)
    yield file(daemon, "containers/daemon.json", lambda: _daemon_json(daemon))
    yield command("containers/docker.txt", *docker, "ps", "--format", "{{.Names}} {{.Networks}} {{.Status}}")
    yield command("containers/docker-networks.txt", *docker, "network", "ls", "--no-trunc")


def collect(wanted: Iterable[Part]) -> list[Made]:
    """Return what became of each part, the bound of the archive kept."""
    begun = time.monotonic()

    def one(part: Part) -> Made:
        if time.monotonic() - begun > _ALL:
            return Made(part, "", f"no time was left: {_ALL:.0f} s were over", absent=True)
        try:
            text, note = part.make()
        except Absent as error:
            return Made(part, "", redact(printable(error, 500, " ")), absent=True)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            return Made(part, "", redact(printable(why or "can't be read", 500, " ")), absent=True)
        return Made(part, redact(text), redact(note))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(one, wanted))
    left, bounded = _MOST, []
    for made in found:
        data = made.text.encode(errors="replace")
        if len(data) > left:
            data = data[:left].rpartition(b"\n")[0]
            made = made._replace(text=data.decode(errors="replace"), note="cut off: the archive has its bound")
        left -= len(data)
        bounded.append(made)
    return bounded


def manifest(found: Iterable[Made]) -> str:
    """Return what is in the archive, and what could not be had and why."""
    rows = [
        (f"({each.part.name})" if each.absent else each.part.name, str(len(each.text.encode(errors="replace"))),
         each.part.source, each.note)
        for each in found
    ]  # fmt: skip
    lines = [f"{name:36} {size:>9}  {redact(source)}{note and f'  [{note}]'}" for name, size, source, note in rows]
    head = (
        f"ovsmesh {__version__} bundle of {_utc(time.time())}\n"
        "Secrets are left out, as far as their place or their form tells them. Look through it before you send it.\n"
        "A name in brackets: the part could not be had, and why not is at the end of the line.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def archive(options: Options, given: list[str]) -> tuple[str, bytes, list[Made]]:
    """Return the name of the archive without its ending, the archive, and what became of each part."""
    state = StateDir(options.state_dir)
    found = collect(parts(options, given, state))
    node = re.sub(r"[^A-Za-z0-9.-]", "-", options.node)[:64].strip(".-") or "node"
    name = f"ovsmesh-{node}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    out, now = io.BytesIO(), time.time()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, text in (
            ("MANIFEST.txt", manifest(found)),
            *((each.part.name, each.text) for each in found if each.text),
        ):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(now)
            tar.addfile(entry, io.BytesIO(data))
    return name, out.getvalue(), found


def bundle(options: Options, given: list[str], output: str) -> str:
    """Write the archive to `output`: a file, a directory, "-" for standard output. Return what to tell the user.

    Raise OvsmeshError where it can't be written; looks for that first.
    """
    target = Path(output or ".")
    if output == "-":
        if sys.stdout.isatty():
            raise OvsmeshError("-o -: standard output is a terminal; redirect it, or give -o FILE")
    else:
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OvsmeshError(f"-o {output}: is not a regular file; `-o -` writes to standard output")
        try:
            tempfile.TemporaryFile(dir=target if target.is_dir() else target.parent).close()
        except OSError as error:
            raise OvsmeshError(f"-o {output or target}: can't be written there: {error.strerror}") from error
    begun = time.monotonic()
    name, data, found = archive(options, given)
    if output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        where = "standard output"
    else:
        path = target / f"{name}.tar.gz" if target.is_dir() else target
        try:
            write_atomic(path, data)
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be written: {error.strerror}") from error
        where = str(path)
    there = sum(not each.absent for each in found)
    took = duration(time.monotonic() - begun)
    return (
        f"{there} of {len(found)} parts in {took}; its MANIFEST.txt says why the others could not be had\n"
        f"{where}: {len(data)} bytes, secrets left out; look through it before you send it"
    )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
