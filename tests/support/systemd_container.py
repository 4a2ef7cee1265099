"""A fresh Debian as a machine of its own: its root file system, a real systemd as process 1, a namespace's network.

The image is made once, by mmdebstrap, in the cache folder. It holds the packages that bootstrap.sh asks for as
files, since a lab has no way to a mirror.

The kernel of the build machines has no openvswitch. What stands in for one is told to the machine as its
hardware: a list of modules that says yes, a modprobe that does, and a unit that puts eth0 and its address
on a bridge of the userspace datapath whenever Open vSwitch starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ovsmesh.lab import netns
from ovsmesh.lab.netns import LabError, wait_for
from tests.support import debian
from tests.support.needs import needs

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(
    os.environ.get("OVSMESH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ovsmesh")
).expanduser()
_INSTALLED = ("systemd-sysv", "docker.io", "busybox-static")
"""What is there before bootstrap.sh is."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT = r"""
set -e
cd "$1"
mount --bind . .
cd "$1"
mount -t proc proc proc
# this machine may set its network's settings and no one else's
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty; do touch dev/$node; mount --bind /dev/$node dev/$node; done
mkdir dev/pts dev/shm dev/net
touch dev/net/tun
mount --bind /dev/net/tun dev/net/tun
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p .old
pivot_root . .old
umount -l /.old
exec env -i container=ovsmesh PATH="$2" /lib/systemd/systemd --system --show-status=0 --log-target=journal
"""
_UNDERLAY = """\
[Unit]
After=ovs-vswitchd.service
StartLimitIntervalSec=0
[Service]
Type=oneshot
Restart=on-failure
RestartSec=0.2
ExecStart=ovs-vsctl --may-exist add-br br-phy -- set bridge br-phy datapath_type=netdev \\
  -- --may-exist add-port br-phy eth0
ExecStart=ip addr replace {address} dev br-phy
ExecStart=ip link set br-phy up
ExecStart=ip route replace default via 192.0.2.1
"""


def packages() -> list[str]:
    """What bootstrap.sh installs, as it says itself."""
    text = (ROOT / "scripts/bootstrap.sh").read_text()
    names = re.findall(r"^(?:agent_)?packages='([^']*)'$", text, re.MULTILINE)
    assert len(names) == 2
    return [*" ".join(names).split(), "python3", "python3-venv"]


@contextlib.contextmanager
def once(path: Path) -> Iterator[bool]:
    """Whether `path` is still to be made; one process at a time finds out."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


def image() -> Path:
    """Return the archive of a fresh machine, made first where it is missing (90 s, 650 MB). Raises DebianError."""
    wanted = " ".join(packages())
    download = (
        f"chroot $1 apt-get -qq install -y --no-install-recommends --download-only {wanted} &&"
        " echo force-unsafe-io >$1/etc/dpkg/dpkg.cfg.d/test"
    )
    key = hashlib.sha256(f"{_INSTALLED} {download}".encode()).hexdigest()[:12]
    made = CACHE / f"machine-{debian.own()}-{key}.tar"
    with once(made) as needed:
        if needed:
            options = ["--skip=cleanup/apt", f"--customize-hook={download}"]
            debian.bootstrap(debian.own(), made, variant="apt", include=_INSTALLED, options=options)
    return made


def dist() -> Path:
    """Return a folder in the cache with what `make dist` makes of this checkout, made first where it is missing."""
    names = ["ovsmesh", "scripts", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    names += ["constraints.txt", "constraints-build.txt"]
    with tempfile.TemporaryDirectory(prefix="ovsmesh-dist-") as folder:
        source, made = Path(folder, "source"), Path(folder, "dist")
        source.mkdir()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
        key = hashlib.sha256(sys.version.encode())
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            key.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes())
        kept = CACHE / f"dist-{key.hexdigest()[:12]}"
        with once(kept) as needed:
            if needed:
                netns.run([sys.executable, "-m", "venv", f"{folder}/venv"], timeout=60)
                pip = [str(source / "scripts/pip.sh"), f"{folder}/venv", "wheel"]
                netns.run([*pip, "--wheel-dir", str(made / "wheels")], timeout=600)
                for name in ("bootstrap.sh", "ovsmesh-agent.service"):
                    shutil.copy(ROOT / "scripts" / name, made)
                for old in CACHE.glob("dist-*"):
                    # not one that another run has just made
                    if time.time() - old.stat().st_mtime > 86400:
                        shutil.rmtree(old)
                shutil.move(made, kept)
    return kept


@needs("lab")
class Machine:
    """One machine in network namespace `ns`, its files below `root`."""

    def __init__(self, archive: Path, root: Path, ns: str, address: str) -> None:
        self.root, self._ns = root, ns
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._cgroup = _cgroups() / f"ovsmesh-{os.getpid()}-{ns}"
        root.mkdir(parents=True)
        netns.run(["tar", "-xf", str(archive), "-C", str(root), "--numeric-owner"], timeout=120)
        self._hardware(address)

    def _hardware(self, address: str) -> None:
        tree = self.root / "lib/modules" / os.uname().release
        tree.mkdir(parents=True)
        modules = ("openvswitch/openvswitch", "openvswitch/vport-gre", "bridge/br_netfilter", "netfilter/nf_tables")
        (tree / "modules.builtin").write_text("".join(f"kernel/net/{name}.ko\n" for name in modules))
        yes = self.root / "usr/local/sbin/modprobe"
        yes.write_text("#!/bin/sh\n")
        yes.chmod(0o755)
        units = self.root / "etc/systemd/system"
        (units / "lab-underlay.service").write_text(_UNDERLAY.format(address=address))
        wants = units / "ovs-vswitchd.service.wants"
        wants.mkdir()
        (wants / "lab-underlay.service").symlink_to("../lab-underlay.service")
        (self.root / "etc/hostname").write_text("h2\n")
        rules = "table netdev lab { chain in { type filter hook ingress device eth0 priority 0; policy drop; }; }"
        netns.run(["nft", "-f", "-"], self._ns, text=rules)
        netns.sysctl(self._ns, {"net/ipv6/conf/eth0/disable_ipv6": "1"})

    def start(self) -> None:
        """Boots it; returns when systemd has started all that is enabled. Raises LabError."""
        self._cgroup.mkdir(exist_ok=True)
        space = ["unshare", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--fork", "--kill-child"]
        enter = (
            f'echo $$ >{self._cgroup}/cgroup.procs && exec ip netns exec {self._ns} {" ".join(space)} sh -c "$0" _ "$@"'
        )
        argv = ["sh", "-c", enter, _BOOT, str(self.root), _PATH]
        log = (self.root.parent / "boot.log").open("ab")
        with log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for("systemd to be process 1", self._find_init, 60, every=0.02)
        wait_for(
            "systemd to answer", lambda: "State=" in self.run("systemctl", "show", check=False).stdout, 20, every=0.05
        )
        state = self.run("systemctl", "is-system-running", "--wait", check=False, timeout=90).stdout.strip()
        if state not in ("running", "degraded"):
            raise LabError(f"the machine did not come up: systemd says {state!r}\n{self.journal()}")

    def _find_init(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            said = (self.root.parent / "boot.log").read_text(errors="replace")
            raise LabError(f"the machine did not boot: {said[-2000:]}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._init = int(children[0]) if children else 0
        return bool(self._init) and "systemd" in " ".join(netns.command_line(self._init)[:1])

    def power_cut(self) -> None:
        """Every process of it ends at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
        wait_for("the machine to be dead", lambda: not any(_pids(p) for p in self._cgroup.rglob("cgroup.procs")), 60)

    def end(self) -> None:
        """Leaves nothing of it."""
        self.power_cut()
        wait_for("its control groups to go", lambda: _removed(self._cgroup), 60)
        shutil.rmtree(self.root)

    def argv(self, *argv: str) -> list[str]:
        inside = ["nsenter", f"--target={self._init}", "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net"]
        return [*inside, "env", "-i", f"PATH={_PATH}", "HOME=/root", "LC_ALL=C.UTF-8", *argv]

    def run(self, *argv: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return netns.run(self.argv(*argv), check=check, timeout=timeout)

    def run_and_kill(self, seconds: float, *argv: str) -> int | None:
        """Kills a command and all that it has started after so many seconds; its exit code when it ended before."""
        child = subprocess.Popen(self.argv(*argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in _tree(child.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.wait(10)
            return None

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()

    def outer(self, pid: int) -> int:
        """A process of the machine as this one's /proc numbers it."""
        for entry in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                found = re.search(r"^NSpid:\t(\d+)\t(\d+)$", entry.read_text(), re.MULTILINE)
                if found and int(found[2]) == pid and self._inside(int(found[1])):
                    return int(found[1])
        raise LabError(f"no process {pid} in the machine")

    def _inside(self, pid: int) -> bool:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat(f"/proc/{self._init}/ns/pid").st_ino

    def journal(self, unit: str = "", lines: int = 60) -> str:
        only = ["-u", unit] if unit else []
        return self.run("journalctl", "--no-pager", "-n", str(lines), *only, check=False).stdout


def _cgroups() -> Path:
    """Where the machine's kernel has cgroup v2."""
    found = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    if not found:
        raise LabError("no cgroup2 is mounted on this machine, so no systemd can run in a namespace of it")
    return Path(found[0])


def _pids(procs: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return procs.read_text().split()
    return []


def _removed(group: Path) -> bool:
    """Whether a control group and those below it are gone; one is busy until its last process is reaped."""
    with contextlib.suppress(OSError):
        for path, _, _ in os.walk(group, topdown=False):
            os.rmdir(path)
    return not group.exists()


def _tree(pid: int) -> list[int]:
    """A process and all its descendants, stopped first so that none starts another meanwhile."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGSTOP)
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found
