"""Run one command as root inside User-mode Linux, on a throw-away overlay of this machine's root.

Debian's linux.uml boots over hostfs. The guest sees this machine's files (the checkout and the virtual environment
among them) but can write to one folder of it only, `out`, and to one terminal, `REPORT`, whose
lines come out of `Guest.lines`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
MODULES_LOADED = ("openvswitch", "vport-gre", "veth", "bridge", "br_netfilter", "tun")
REPORT = "/dev/tty1"
INIT = Path(__file__).with_name("init.sh")


class GuestError(Exception):
    """The guest did not run the command to its end; the text holds what its console said last."""


def unavailable() -> str:
    """Why no guest can be booted on this machine; "" when one can."""
    if shutil.which(KERNEL) is None:
        return f"{KERNEL} not found: install the package user-mode-linux (scripts/setup.sh --dev does)"
    names = {path.name.removesuffix(".ko").replace("_", "-") for path in MODULES.rglob("*.ko")}
    missing = [name for name in ("overlay", *MODULES_LOADED) if name.replace("_", "-") not in names]
    if missing:
        return f"{KERNEL} has no module {', '.join(missing)} in {MODULES}"
    return ""


class Guest:
    """A guest that runs `command` and then powers off; `out` must be an empty folder.

    `timeout` is in seconds from boot to power-off; `memory` is a ceiling, the guest takes from the
    host only what it touches. `status` is the command's exit status once `lines` has ended, and what
    the command printed is in `out`/output. Use as a context manager: leaving it ends the guest.
    """

    def __init__(
        self,
        command: Sequence[str],
        out: Path,
        timeout: float,
        *,
        modules: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        memory: str = "2G",
    ) -> None:
        self.out = out.resolve()
        self.status: int | None = None
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        job = self.out / "job"
        job.write_text(_script(command, modules, env or {}, cwd or Path.cwd()))
        self._report, theirs = os.pipe()
        arguments = {
            "mem": memory,
            "root": "/dev/root",
            "rootfstype": "hostfs",
            "rootflags": "/",
            "init": str(INIT),
            "job": str(job),
            "out": str(self.out),
            "uml_dir": f"{self.out}/",
            "panic": "-1",
            "con": "null",
            "con0": "null,fd:1",
            "con1": f"null,fd:{theirs}",
        }
        try:
            with (self.out / "console").open("wb") as console:
                self._process = subprocess.Popen(
                    [KERNEL, "ro", "quiet", "noreboot", *(f"{name}={value}" for name, value in arguments.items())],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs],
                    # without TMPDIR it keeps the guest's memory in /dev/shm rather than in a file on a disk
                    env={name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TMP", "TEMP")},
                    # its own group: linux.uml runs its guest's processes as processes of the host
                    start_new_session=True,
                )
        finally:
            os.close(theirs)

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
        os.close(self._report)

    def lines(self) -> Iterator[str]:
        """Each line that the guest writes to REPORT, as it comes, until it powers off.

        Raises GuestError when it does not in time, or when the command never reported its status.
        """
        rest = b""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._report], [], [], left)[0]:
                raise GuestError(f"the guest still ran after {self._timeout:.0f} s\n{self.last_words()}")
            if not (data := os.read(self._report, 65536)):
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        self._process.wait(timeout=10)
        status = self.out / "status"
        if not status.exists():
            raise GuestError(f"the guest stopped before its command did\n{self.last_words()}")
        self.status = int(status.read_text())

    def last_words(self, lines: int = 40) -> str:
        """The end of what its console and its command said."""
        told = []
        for name in ("console", "output"):
            path = self.out / name
            if path.exists():
                told += [f"--- last lines of {name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(told)


def _script(command: Sequence[str], modules: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    lines = ["#!/bin/bash"]
    if modules:
        lines.append(f"modprobe -a {shlex.join(modules)} || exit 70")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    lines += [f"cd {shlex.quote(str(cwd))} || exit 70", f"exec {shlex.join(command)}", ""]
    return "\n".join(lines)


def main() -> int:
    """Runs the command given as arguments in a guest and shows what it printed, for looking around inside."""
    if why := unavailable():
        sys.exit(why)
    with tempfile.TemporaryDirectory(prefix="guest.", dir="/var/tmp") as folder:
        command = sys.argv[1:] or ["dmesg"]
        with Guest(command, Path(folder), 600, modules=MODULES_LOADED, env={"PATH": os.environ["PATH"]}) as guest:
            for line in guest.lines():
                print(line)
        print((Path(folder) / "output").read_text(errors="replace"), end="")
        return guest.status or 0


if __name__ == "__main__":
    sys.exit(main())
