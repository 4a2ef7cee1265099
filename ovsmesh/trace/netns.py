"""Network namespaces of pods: find the ones that are plugged into this host, and work inside one for a moment.

Nothing of a pod is run: a thread of this process enters its network, opens sockets there, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ovsmesh.errors import OvsmeshError
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink_socket import Message, NetlinkError, NetlinkSocket, attributes

_CLONE_NEWNET = 0x40000000
_NETNSA_NSID = 1
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def within(fd: int, make: Callable[[], T]) -> T:
    """Call `make` in the network namespace and return its result. A socket that is made there stays there.

    Raises OSError where it can't be entered, and what `make` raises.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def enter() -> None:
        # a thread of its own enters and ends, so no other one leaves its namespace
        try:
            if _libc.setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            done.append(make())
        except (OSError, ValueError, OvsmeshError) as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="in-pod", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


@contextlib.contextmanager
def known(netlink: NetlinkSocket) -> Iterator[dict[int, tuple[int, str]]]:
    """Yield the namespaces that have links to this one: number in this one → (file descriptor, how it was found)."""
    found: dict[int, tuple[int, str]] = {}
    seen: set[int] = set()
    try:
        for path, how in _paths():
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            inode = os.fstat(fd).st_ino
            number = _number(netlink, fd) if inode not in seen else None
            seen.add(inode)
            if number is None or number in found:
                os.close(fd)
            else:
                found[number] = fd, how
        yield found
    finally:
        for fd, _ in found.values():
            os.close(fd)


def _paths() -> Iterator[tuple[str, str]]:
    """Yield the files that stand for network namespaces: those of processes, and those that are mounted somewhere."""
    for root, pid in (("", "self"), ("/proc/1/root", "1")):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines():
                fields = line.split()
                if len(fields) > 4 and fields[3].startswith("net:["):
                    path = fields[4].encode().decode("unicode_escape")
                    yield root + path, f"namespace {Path(path).name}"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        yield f"/proc/{pid}/ns/net", f"namespace of process {pid}"


def _number(netlink: NetlinkSocket, fd: int) -> int | None:
    """Return the number that this namespace has for another one; None where no link leads there."""
    numbers: list[int] = []

    def take(message: Message) -> None:
        raw = attributes(message.payload, 4).get(_NETNSA_NSID, b"\xff\xff\xff\xff")
        numbers.append(struct.unpack("=i", raw)[0])

    try:
        netlink.request(encoder.get_namespace_number(fd), take)
    except NetlinkError:
        return None
    return numbers[0] if numbers and numbers[0] >= 0 else None
