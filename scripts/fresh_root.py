#!/usr/bin/env python3
"""Run make targets in a fresh clone on a machine that holds nothing: a new root file system of a Debian release.

    fresh_root.py SUITE TARGET...      as `make TARGET...` there

The root file system is Debian's smallest with apt, and `make`; every cache in it is empty. It has files, processes and
a /run of its own, and shares the network, since it installs from the registries that this machine reaches. Kernel,
/proc/sys and control groups are this machine's. Only the bare root file system is kept, in the cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.debian import DebianError, bootstrap, client_environment, give_network, sources

ROOT = Path(__file__).resolve().parent.parent
CLONE = "/root/ovsmesh"
INCLUDE = ("make", "ca-certificates")
"""What someone has who cloned this project and types `make`."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENTER = r"""
set -e
cd "$1"
mount --bind . .
cd "$1"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty net/tun kvm; do
  [ -e /dev/$node ] || continue
  mkdir -p dev/"$(dirname $node)"; touch dev/$node; mount --bind /dev/$node dev/$node
done
ln -s /proc/self/fd dev/fd
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p .old run/lock
if [ -d /lib/modules ]; then mkdir -p lib/modules; mount --rbind -o ro /lib/modules lib/modules; fi
pivot_root . .old
umount -l /.old
rmdir /.old
cd "$2"
shift 2
exec "$@"
"""


def cache() -> Path:
    """Return the folder in which root file systems are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("OVSMESH_CACHE") or f"{home}/ovsmesh")


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"fresh root: {text}", file=sys.stderr, flush=True)


def bare(suite: str) -> Path:
    """Return the tar file of the bare root file system. Make it if it is missing or a week old."""
    archive = cache() / f"root-{suite}.tar"
    if not archive.exists() or time.time() - archive.stat().st_mtime > 7 * 86400:
        say(f"making a root file system of {suite} with mmdebstrap (about a minute), kept in {archive}")
        archive.parent.mkdir(parents=True, exist_ok=True)
        bootstrap(suite, archive, variant="minbase", include=INCLUDE)
    return archive


def run(suite: str, targets: list[str]) -> int:
    """Unpack, clone, enter, run; leaves nothing. Returns make's exit status."""
    archive = bare(suite)
    base = Path(tempfile.mkdtemp(prefix=f"ovsmesh-{suite}-", dir="/var/tmp"))
    root = base / "root"
    try:
        root.mkdir()
        subprocess.run(["tar", "-xf", archive, "-C", root, "--numeric-owner"], check=True)
        given = client_environment()
        give_network(root, given)
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, root / CLONE.lstrip("/")], check=True)
        environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb", **given}
        environment |= {name: os.environ[name] for name in ("CI", "PYTHONUNBUFFERED") if name in os.environ}
        began = time.monotonic()
        code = 0
        for target in targets:
            say(f"{suite}: make {target}")
            start = time.monotonic()
            # the pid namespace's first process takes all others with it when it ends, and ends with this one
            space = [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
            ]
            argv = [*space, "sh", "-c", ENTER, "sh", str(root), CLONE, "make", target]
            code = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
            say(f"{suite}: make {target}: exit {code} after {time.monotonic() - start:.0f} s")
            if code:
                break
        say(f"{suite}: {'all passed' if not code else 'FAILED'} in {time.monotonic() - began:.0f} s")
        return code
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> int:
    """Run the command line; return its exit status."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        say("error: mounts and a chroot need root")
        return 1
    try:
        sources(sys.argv[1])
    except DebianError as error:
        say(f"{'error' if os.environ.get('CI') else 'skipped'}: {error}")
        return 1 if os.environ.get("CI") else 0
    try:
        return run(sys.argv[1], sys.argv[2:])
    except (DebianError, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
