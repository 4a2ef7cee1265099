"""Network namespaces and processes of a lab: entering, running, finding, ending.

Knows the kernel's doors for that (setns, pidfd, /proc) and `ip -batch`; knows nothing of hosts,
pods or meshes. Never imports ovs, pyroute2, kubernetes, rich.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ovsmesh.errors import OvsmeshError

NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class LabError(OvsmeshError):
    """Something in the lab is not as wanted: the text says what, where, and what to do."""


class Process(NamedTuple):
    """A process and its start time in clock ticks after boot (/proc/PID/stat, field 22): never two alike."""

    pid: int
    start: int


def namespaces() -> set[str]:
    return set(os.listdir(NETNS)) if NETNS.exists() else set()


def within(ns: str, make: Callable[[], T]) -> T:
    """What `make` returns when called inside the namespace: a socket made there stays there.

    A thread of its own enters and ends, so that no other thread, and not the process as
    /proc/PID/ns/net shows it, ever leaves its own namespace. Raises LabError when there is no such
    namespace, and whatever `make` raises.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            fd = os.open(NETNS / ns, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            failed.append(LabError(f"namespace {ns}: not there (looked in {NETNS}); is the lab up? `ovsmesh lab up`"))
            return
        try:
            if _libc.setns(fd, _CLONE_NEWNET):
                number = ctypes.get_errno()
                failed.append(LabError(f"namespace {ns}: can't enter: {os.strerror(number)}; run as root"))
                return
            done.append(make())
        except (OSError, ValueError, OvsmeshError) as error:
            failed.append(error)
        finally:
            os.close(fd)

    thread = threading.Thread(target=enter, name=f"in-{ns}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def run(
    argv: Sequence[str],
    ns: str = "",
    *,
    timeout: float = 20.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command, inside the namespace when one is named. `timeout` in seconds.

    Raises LabError when the program is missing, takes too long, or (with `check`) exits non-zero.
    """
    full = [*(("ip", "netns", "exec", ns) if ns else ()), *argv]
    where = f" in {ns}" if ns else ""
    try:
        done = subprocess.run(
            full,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )
    except FileNotFoundError as error:
        raise LabError(f"{full[0]}: not found on this machine; install it (see README.md)") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(argv)}`{where}: no end after {timeout:g} s; see the lab's logs") from error
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip() or "(it said nothing)"
        raise LabError(f"`{' '.join(argv)}`{where}: exit status {done.returncode}: {said}")
    return done


def ip_batch(lines: Iterable[str], ns: str = "") -> None:
    """One `ip -batch` for all lines. Raises LabError naming the first line that failed."""
    text = "\n".join(lines) + "\n"
    done = run(["ip", *(("-n", ns) if ns else ()), "-batch", "-"], text=text, check=False)
    if done.returncode:
        raise LabError(f"ip -batch{' in ' + ns if ns else ''}: {done.stderr.strip()}; the batch was:\n{text.strip()}")


def sysctl(ns: str, values: Mapping[str, str]) -> None:
    """Writes below /proc/sys of the namespace; what this kernel does not have is left out."""

    def write() -> None:
        for path, value in values.items():
            if (file := Path("/proc/sys") / path).exists():
                file.write_text(value)

    within(ns, write)


def tx_checksum_off(ns: str, device: str) -> None:
    """`ethtool -K DEVICE tx off`: a datapath in userspace reads frames before anyone fills in their checksums."""

    def set_feature() -> None:
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
        request = struct.pack("@16sP16x", device.encode(), ctypes.addressof(value))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)

    within(ns, set_feature)


def identity(pid: int) -> Process | None:
    """The process as it is now; None when it has ended (a zombie has)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]))


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def inhabitants(names: Iterable[str]) -> dict[Process, str]:
    """Every process whose network namespace is one of these → the namespace's name."""
    inodes: dict[int, str] = {}
    for name in names:
        try:
            inodes[(NETNS / name).stat().st_ino] = name
        except FileNotFoundError:
            continue
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            name = inodes.get(os.stat(f"/proc/{entry}/ns/net").st_ino, "")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        process = identity(int(entry)) if name else None
        if process and process.pid != os.getpid():
            found[process] = name
    return found


def end(processes: Iterable[Process], how: signal.Signals = signal.SIGKILL, timeout: float = 10.0) -> list[Process]:
    """Signals each process that is still the one meant, and waits for all; returns those that did end.

    A pidfd is opened before the identity is compared, so a reused pid is never hit. `timeout` in
    seconds for all. Raises LabError when one is still there after it.
    """
    fds: dict[int, Process] = {}
    try:
        for process in processes:
            try:
                fd = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
            fds[fd] = process
            if identity(process.pid) != process:
                os.close(fd)
                del fds[fd]
                continue
            signal.pidfd_send_signal(fd, how)
        ended = _gone(fds, timeout)
    finally:
        for fd in fds:
            os.close(fd)
    reap()
    left = [p for p in fds.values() if p not in ended]
    if left:
        names = ", ".join(f"{p.pid} ({' '.join(command_line(p.pid))[:60]})" for p in left)
        raise LabError(f"{names}: still there {timeout:g} s after {how.name}; kill it, then `ovsmesh lab down`")
    return ended


def _gone(fds: Mapping[int, Process], timeout: float) -> list[Process]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    waiting, ended, until = set(fds), [], time.monotonic() + timeout
    while waiting and (left := until - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            waiting.discard(fd)
            ended.append(fds[fd])
    return ended


_children: list[subprocess.Popen[bytes]] = []


def spawn(argv: Sequence[str], ns: str, log: Path, env: Mapping[str, str]) -> Process:
    """Starts a process inside the namespace that outlives this one; its output goes to `log` (appended)."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            ["ip", "netns", "exec", ns, *argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
    _children.append(child)
    process = identity(child.pid)
    if process is None:
        reap()
        raise LabError(f"`{' '.join(argv)}` in {ns}: ended at once with status {child.returncode}; see {log}")
    return process


def reap() -> None:
    """Takes the exit status of own children that have ended, so that none stays as a zombie."""
    _children[:] = [child for child in _children if child.poll() is None]


def wait_for(wanted: str, check: Callable[[], T | None], timeout: float, every: float = 0.02, hint: str = "") -> T:
    """Polls until `check` gives something true, for at most `timeout` seconds. For what rings no bell.

    Raises LabError with `wanted` and `hint` after it.
    """
    until = time.monotonic() + timeout
    while True:
        if found := check():
            return found
        if time.monotonic() >= until:
            raise LabError(f"waited {timeout:g} s for {wanted}, in vain{'; ' + hint if hint else ''}")
        time.sleep(every)
