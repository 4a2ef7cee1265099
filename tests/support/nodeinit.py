"""The first process of a test node: a machine of its own as far as a kubelet can tell.

Runs as PID 1 of new mount, PID and UTS namespaces, in the node's network namespace. The node's root is this
machine's, with a layer in memory over it: nothing that the node writes reaches the machine, and `seen` in
the node's folder shows what it wrote. When this process ends, the kernel ends all that runs in the node.
Imports nothing but the standard library: it also runs where only that is.

    python nodeinit.py FOLDER/node.json
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_FORGOTTEN = ("etc/cni", "opt/cni", "etc/openvswitch", "var/lib/openvswitch", "var/lib/ovsmesh", "var/lib/kubelet")
"""Of this machine, which a fresh node has not."""
_ROOMY_KIB = 6 << 20
"""Memory from which images are kept there, which is faster than the disk; a node's take 1 GiB."""
_SOCKET = "/run/containerd/containerd.sock"
_START_SECONDS = 40.0
_LOAD_SECONDS = 150.0
_REBOOT = (signal.SIGTERM, signal.SIGINT)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=30)


def _kib_available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _root(folder: Path) -> None:
    """Makes the node's root and enters it; `folder` is at its own place in there too."""
    memory = folder / "memory"
    memory.mkdir()
    _mount("-t", "tmpfs", "-o", "mode=755", "node", str(memory))
    upper, work, root = (memory / name for name in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir()
    _mount("-t", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", "node", str(root))
    for name in _FORGOTTEN:
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "opt/cni/bin").mkdir(parents=True)
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("--rbind", "/dev", str(root / "dev"))
    _mount("-t", "sysfs", "sysfs", str(root / "sys"))
    _mount("--rbind", "/sys/fs/cgroup", str(root / "sys/fs/cgroup"))
    _mount("-t", "tmpfs", "-o", "mode=755", "run", str(root / "run"))
    inside = root / folder.relative_to("/")
    inside.mkdir(parents=True, exist_ok=True)
    _mount("--bind", str(folder), str(inside))
    _mount("--bind", str(upper), str(inside / "seen"))
    # containerd's layers can't lie on an overlay
    layers = folder / "containerd"
    if _kib_available() > _ROOMY_KIB:
        layers = memory / "containerd"
        layers.mkdir()
    (root / "var/lib/containerd").mkdir(parents=True, exist_ok=True)
    _mount("--bind", str(layers), str(root / "var/lib/containerd"))
    (root / "old").mkdir()
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "old"], check=True, timeout=30)
    os.chdir("/")
    subprocess.run(["umount", "-l", "/old"], check=True, timeout=30)
    os.rmdir("/old")
    # the kubelet must see what containerd mounts, and containers what the kubelet does
    _mount("--make-rshared", "/")


def _start(folder: Path, name: str, argv: list[str]) -> int:
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/").pid


def _answers(address: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with socket.socket(socket.AF_UNIX) as asker:
        while asker.connect_ex(address):
            if time.monotonic() > deadline:
                sys.exit(f"{address}: no answer after {_START_SECONDS:.0f} s")
            time.sleep(0.02)


def _await(path: Path) -> None:
    deadline = time.monotonic() + _LOAD_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path}: not there after {_LOAD_SECONDS:.0f} s")
        time.sleep(0.02)


def _hold(about: dict[str, Any], folder: Path) -> None:
    """Starts the node's programs, and takes in whoever loses its parent, until it is told to end."""
    names: dict[int, str] = {}
    for name, argv in about["programs"].items():
        names[_start(folder, name, argv)] = name
        if name == "containerd":
            # a kubelet without one gives up, and one without images asks a registry that is not there
            _answers(_SOCKET)
            (folder / "ready").touch()
            _await(folder / "loaded")
    for number in _REBOOT:
        signal.signal(number, lambda *_: sys.exit(0))
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            signal.pause()
            continue
        if pid in names:
            with (folder / "node.log").open("a") as log:
                log.write(f"{names[pid]} ended: {os.waitstatus_to_exitcode(status)}\n")


def main(config: str) -> None:
    about = json.loads(Path(config).read_text())
    folder = Path(config).parent
    for name in ("containerd", "seen"):
        (folder / name).mkdir(exist_ok=True)
    socket.sethostname(about["name"])
    _root(folder)
    _hold(about, folder)


if __name__ == "__main__":
    main(sys.argv[1])
