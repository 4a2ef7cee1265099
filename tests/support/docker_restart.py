"""Starts, stops and restarts the dockerd of one lab host, as systemd would; what tests give as --docker-restart.

Usage: restart.py DIR NETNS stop|start|restart. DIR holds config/daemon.json, docker.sock, docker.pid, dockerd.log and
all of Docker's data; outside.pid there names the process of the tests, argv.json holds further options of dockerd,
mode.txt says how this script is to misbehave. root.json names the root file system that dockerd is of ("" is this
machine's), and a folder with programs that come before those in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# a sysfs of the network namespace, with the machine's cgroups, so that dockerd finds its own bridges there
_ENTER = (
    "mkdir -p /run/cg; mount --rbind /sys/fs/cgroup /run/cg; umount -l /sys; mount -t sysfs sysfs /sys; "
    "mount --rbind /run/cg /sys/fs/cgroup; umount -l /run/cg; "
    '[ ! -d /etc/docker ] || mount -t tmpfs none /etc/docker; exec "$@"'
)
# the same in a root file system of its own, which several may share; Docker's folder has one name inside and outside
_ENTER_ROOT = r"""
set -e
root=$1 folder=$2
shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
for place in proc dev; do mount --rbind /$place "$root/$place"; done
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
for place in run tmp var/tmp root mnt etc/docker; do
  [ ! -d "$root/$place" ] || mount -t tmpfs -o mode=755 none "$root/$place"
done
mkdir -p "$root$folder" "$root/mnt/old"
mount --rbind "$folder" "$root$folder"
cd "$root"
pivot_root . mnt/old
umount -l /mnt/old
cd /
exec env PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""
_UP, _DOWN = 60.0, 60.0


def running(directory: Path) -> int:
    """The process id of this directory's dockerd; 0 for none."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((directory / "docker.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "Z" and str(directory / "docker.pid").encode() in words:
            return pid
    return 0


def stop(directory: Path, how: int = signal.SIGTERM) -> None:
    pid = running(directory)
    if not pid:
        return
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, how)
        if not select.select([fd], [], [], _DOWN)[0]:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            select.select([fd], [], [], 5.0)
    finally:
        os.close(fd)
    if how == signal.SIGKILL:
        # its own containerd stays, and keeps the next one from starting
        left = directory / "exec/containerd/containerd.pid"
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(left.read_text()), signal.SIGKILL)
        left.unlink(missing_ok=True)
    # a killed daemon leaves it, and where nobody reaps the dead its number is taken for a living one's
    (directory / "docker.pid").unlink(missing_ok=True)


def answers(directory: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2.0)
        sock.connect(str(directory / "docker.sock"))
        sock.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        return b" 200 " in sock.recv(200)
    return False


def start(directory: Path, netns: str) -> int:
    """Returns when the daemon answers (0), or has ended (its exit code)."""
    config = directory / "config/daemon.json"
    argv = ["dockerd", f"--data-root={directory}/data", f"--exec-root={directory}/exec"]
    argv += [f"--host=unix://{directory}/docker.sock", "--pidfile", f"{directory}/docker.pid"]
    argv += ["--config-file", str(config)] if config.exists() else []
    with contextlib.suppress(FileNotFoundError):
        argv += json.loads((directory / "argv.json").read_text())
    outside = (directory / "outside.pid").read_text().strip()
    # out of the mount namespace that `ip netns exec` gives an agent, whose /sys lacks the cgroups
    entering = ["nsenter", f"--mount=/proc/{outside}/ns/mnt", "unshare", "--mount", "--propagation", "slave"]
    entering += ["nsenter", f"--net=/run/netns/{netns}"]
    inside = ["bash", "-c", _ENTER, "_"]
    with contextlib.suppress(FileNotFoundError):
        root, programs = json.loads((directory / "root.json").read_text())
        if root:
            inside = ["bash", "-c", _ENTER_ROOT, "_", root, str(directory)]
        if programs:
            argv = ["env", f"PATH={programs}:{os.environ['PATH']}", *argv]
    with (directory / "dockerd.log").open("ab") as log:
        child = subprocess.Popen(
            [*entering, *inside, *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    fd = os.pidfd_open(child.pid)
    end = time.monotonic() + _UP
    try:
        while time.monotonic() < end:
            if select.select([fd], [], [], 0.05)[0]:
                return child.wait() or 1
            if answers(directory):
                return 0
    finally:
        os.close(fd)
    return 1


def main() -> int:
    directory, netns, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    mode = (directory / "mode.txt").read_text().strip() if (directory / "mode.txt").exists() else ""
    mode = mode if what == "restart" else ""
    with (directory / "restarts.log").open("a") as log:
        log.write(f"{what}\n")
    if mode == "hang":
        time.sleep(600)
    if mode == "nothing":
        return 0
    # one at a time, as systemd's jobs for one unit are: an agent that is killed leaves its own under way
    lock = (directory / "restart.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    if what in ("stop", "restart"):
        stop(directory)
    if mode == "no-start":
        print("refused by the test", file=sys.stderr)
        return 3
    if mode == "slow":
        time.sleep(3.0)
    if what in ("start", "restart"):
        if mode == "die":
            (directory / "mode.txt").unlink()
            start(directory, netns)
            stop(directory, signal.SIGKILL)
            return 0
        code = start(directory, netns)
        if code:
            lines = (directory / "dockerd.log").read_text(errors="replace").splitlines()
            print(lines[-1] if lines else "", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
