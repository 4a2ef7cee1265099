"""Network namespaces and processes: enter, run, find, end. Does not know hosts, pods or meshes."""

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
    """Something in the lab is not as wanted. The text says what, where, and what to do."""


class Process(NamedTuple):
    """A process and its start time in clock ticks after boot (/proc/PID/stat, field 22). No two are equal."""

    pid: int
    start: int


def namespaces() -> set[str]:
    """Return the names of all named network namespaces of this machine."""
    return set(os.listdir(NETNS)) if NETNS.exists() else set()


def within(ns: str, make: Callable[[], T]) -> T:
    """Call `make` inside the namespace and return its result. A socket made there stays there.

    A thread of its own enters and ends, so that no other thread leaves its namespace.
    Raises LabError when there is no such namespace, and whatever `make` raises.
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
    timeout: float = 60.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command, inside the namespace when one is named. `timeout` is in seconds.

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
        output = (done.stderr or done.stdout).strip() or "(no output)"
        raise LabError(f"`{' '.join(argv)}`{where}: exit status {done.returncode}: {output}")
    return done


def ip_batch(lines: Iterable[str], ns: str = "") -> None:
    """Run one `ip -batch` for all lines. Raises LabError, which names the first line that failed."""
    text = "\n".join(lines) + "\n"
    done = run(["ip", *(("-n", ns) if ns else ()), "-batch", "-"], text=text, check=False)
    if done.returncode:
        raise LabError(f"ip -batch{' in ' + ns if ns else ''}: {done.stderr.strip()}; the batch was:\n{text.strip()}")


def sysctl(ns: str, values: Mapping[str, str]) -> None:
    """Write files below /proc/sys of the namespace; leave out those that this kernel does not have."""

    def write() -> None:
        for path, value in values.items():
            if (file := Path("/proc/sys") / path).exists():
                file.write_text(value)

    within(ns, write)


def tx_checksum_off(ns: str, device: str) -> None:
    """Do `ethtool -K DEVICE tx off`: a userspace datapath reads frames before their checksums are filled in."""

    def set_feature() -> None:
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_STXCSUM, 0))
        request = struct.pack("@16sP16x", device.encode(), ctypes.addressof(value))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)

    within(ns, set_feature)


def identity(pid: int) -> Process | None:
    """Return the process that has this pid now; None when it has ended. A zombie has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]))


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process; [] when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def inhabitants(names: Iterable[str]) -> dict[Process, str]:
    """Return the processes in these network namespaces, each with the name of its namespace."""
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


def end(processes: Iterable[Process], how: signal.Signals = signal.SIGKILL, timeout: float = 60.0) -> list[Process]:
    """Signal each process that is still the one meant, wait for all, and return those that ended.

    A pidfd is opened before the identity is compared, so a reused pid is never signalled.
    `timeout` is in seconds, for all. Raises LabError when one is still there after it.
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
    """Start a process inside the namespace that outlives this one. Its output is appended to `log`."""
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
    """Wait for the children of this process that have ended, so that none stays a zombie."""
    _children[:] = [child for child in _children if child.poll() is None]


def wait_for(wanted: str, check: Callable[[], T | None], timeout: float, every: float = 0.02, hint: str = "") -> T:
    """Call `check` until it returns something true, and return that. For what sends no event.

    Raises LabError with `wanted` and `hint` after `timeout` seconds.
    """
    until = time.monotonic() + timeout
    while True:
        if found := check():
            return found
        if time.monotonic() >= until:
            raise LabError(f"waited {timeout:g} s in vain for {wanted}{'; ' + hint if hint else ''}")
        time.sleep(every)
