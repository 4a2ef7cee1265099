"""Report which filter tables other programs change: the managed nft tables, and FORWARD of iptables.

It reads the notifications of nf_tables (<linux/netfilter/nf_tables.h>) as far as telling whose table a
message is about.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from ovsmesh.errors import Problem
from ovsmesh.linux import netlink_socket
from ovsmesh.linux.netlink_socket import Message, NetlinkSocket, attributes
from ovsmesh.text import printable
from ovsmesh.wakeup import Wakeup

_NFNLGRP_NFTABLES, _NFNL_SUBSYS_NFTABLES = 7, 10
_DELTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN = 2, 3, 5, 6, 8, 15
"""NFT_MSG_ types."""
_NFGENMSG_BYTES = 4
_RECEIVE_BYTES = 4 << 20
"""A thousand new set elements are a thousand messages."""
_TOOLS = {1: "inet", 7: "bridge", 2: "iptables", 10: "ip6tables"}
"""NFPROTO_ number → nft family, or the tool whose rules are there."""
_CHAIN_HOOK, _HOOK_NUMBER, _FORWARD = 4, 1, 2
"""NFTA_CHAIN_HOOK, NFTA_HOOK_HOOKNUM, NF_INET_FORWARD."""
ALL_TOOLS = frozenset(_TOOLS.values())
_GETTABLE, _GETRULE, _GETGEN = 1, 7, 16
"""NFT_MSG_ types."""
_REQUEST, _REQUEST_DUMP = 0x1, 0x301
_ABSENT = (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT)
"""What a kernel without nf_tables, or without nfnetlink at all, answers."""
_PAUSE, _SHARE, _CLOSING = 2.0, 20.0, 12.0
"""Seconds between two looks at least, and how many times as long as one has taken; seconds for the end of one."""
END = "."
"""What `tools` yields at the end of a transaction."""


def tools(messages: Iterable[Message], mark: bytes) -> Iterator[str]:
    """Yield the tool that each message is about, one of ALL_TOOLS, and END for the end of a transaction.

    `mark`: the name of managed nft tables. Messages about other tables, and malformed ones, are left out.
    """
    for message in messages:
        if message.type >> 8 != _NFNL_SUBSYS_NFTABLES or len(message.payload) < _NFGENMSG_BYTES:
            continue
        if message.type & 0xFF == _NEWGEN:
            yield END
        elif tool := _tool(message.type & 0xFF, message.payload, mark):
            yield tool


def writers(messages: Iterable[Message]) -> Iterator[str]:
    """Yield who wrote each transaction, for each END of `tools`, as "nft, pid 812"; "" where it is not told."""
    for message in messages:
        if message.type == _NFNL_SUBSYS_NFTABLES << 8 | _NEWGEN and len(message.payload) >= _NFGENMSG_BYTES:
            found = attributes(message.payload, _NFGENMSG_BYTES)
            # NFTA_GEN_PROC_NAME and NFTA_GEN_PROC_PID
            name, pid = found.get(3, b"").rstrip(b"\0").decode(errors="replace"), found.get(2, b"")
            yield f"{printable(name, 32)}, pid {int.from_bytes(pid)}" if name and len(pid) == 4 else ""


def _tool(kind: int, payload: memoryview, mark: bytes) -> str:
    tool = _TOOLS.get(payload[0], "")
    given = attributes(payload, _NFGENMSG_BYTES)
    names = {number: value.rstrip(b"\0") for number, value in given.items()}
    if tool in ("inet", "bridge") and names.get(1) == mark:
        return tool
    if tool in ("inet", "bridge") or names.get(1) != b"filter":
        hook = attributes(memoryview(given.get(_CHAIN_HOOK, b""))).get(_HOOK_NUMBER, b"")
        forwards = kind == _DELTABLE or (kind == _NEWCHAIN and int.from_bytes(hook) == _FORWARD)
        # a chain of others may filter what is forwarded: it is read with the rules of iptables
        return "iptables" if forwards and tool != "bridge" and not names.get(1, b"").startswith(mark) else ""
    # a rule has its chain's name as attribute 2, a chain has its own as attribute 3
    chain = {_NEWRULE: 2, _DELRULE: 2, _NEWCHAIN: 3, _DELCHAIN: 3}.get(kind, 0)
    return tool if names.get(chain) == b"FORWARD" else ""


def _of_others(message: Message, mark: bytes) -> bool:
    """Return whether a message is about a table that is not managed, nor one of a trace."""
    if message.type >> 8 != _NFNL_SUBSYS_NFTABLES or message.type & 0xFF == _NEWGEN:
        return message.type == netlink_socket.OVERRUN
    return not attributes(message.payload, _NFGENMSG_BYTES).get(1, b"").startswith(mark)


def holders(mark: str) -> frozenset[str]:
    """Return the tools, of ALL_TOOLS, whose tables hold something managed, by the kernel's own word.

    It needs neither nft nor iptables. `mark`: the name of managed tables, and a word in each managed iptables rule.
    Raise OSError if the kernel has nf_tables and does not answer.
    """
    found: set[str] = set()

    def take(message: Message) -> None:
        tool = _tool(message.type & 0xFF, message.payload, mark.encode())
        if tool in ("inet", "bridge") or (tool and mark.encode() in bytes(message.payload)):
            found.add(tool)

    try:
        with NetlinkSocket(netlink_socket.NETFILTER) as sock:
            for kind in (_GETTABLE, _GETRULE):
                sock.request(_request(kind, _REQUEST_DUMP), take)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
    return frozenset(found)


def generation() -> int | None:
    """Return the number of the last change of nf_tables in this network namespace; None where it is not told."""
    found: list[int] = []
    try:
        with NetlinkSocket(netlink_socket.NETFILTER) as sock:
            request = _request(_GETGEN, _REQUEST)
            # NFTA_GEN_ID
            sock.request(request, lambda m: found.append(int.from_bytes(attributes(m.payload, _NFGENMSG_BYTES)[1])))
    except (OSError, LookupError):
        return None
    return found[0] if found else None


def _request(kind: int, flags: int) -> bytes:
    header = struct.pack("=IHHII", 16 + _NFGENMSG_BYTES, _NFNL_SUBSYS_NFTABLES << 8 | kind, flags, 0, 0)
    return header + bytes(_NFGENMSG_BYTES)


class NftMonitor:
    """The changes of filter tables in this network namespace. Raise OSError if the kernel has no nf_tables."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._open: set[str] = set()
        """Tools changed by a transaction whose end was not read yet."""
        self.writers: list[str] = []
        """Who wrote each of the transactions that were returned last."""
        self.others = 0
        """Counts the times that tables of others have changed."""
        self._socket = NetlinkSocket(netlink_socket.NETFILTER, [_NFNLGRP_NFTABLES], _RECEIVE_BYTES)

    def fileno(self) -> int:
        """Return the file descriptor. It is readable while changes wait."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop watching."""
        self._socket.close()

    def transactions(self) -> list[frozenset[str]] | None:
        """Return the tools that each finished transaction changed; None if some were missed."""
        finished: list[frozenset[str]] = []
        self.writers = []
        waiting = list(self._socket.notifications())
        self.others += any(_of_others(message, self._mark) for message in waiting)
        who = writers(waiting)
        for tool in tools(waiting, self._mark):
            if tool != END:
                self._open.add(tool)
                continue
            writer = next(who)
            if self._open:
                finished.append(frozenset(self._open))
                self.writers.append(writer)
                self._open.clear()
        return None if any(message.type == netlink_socket.OVERRUN for message in waiting) else finished


class FilterWatch:
    """Looks again whenever the tables of others have changed, in a thread: some hosts have many thousand rules."""

    def __init__(self, look: Callable[[Any], tuple[Problem, ...]]) -> None:
        """`look` returns what is wrong; it is called in the thread, with what was last wanted."""
        self._look = look
        self._changes = Wakeup()
        self.fd = self._changes.fd
        """Readable after other problems were found than before, until `drain`."""
        self.problems: tuple[Problem, ...] = ()
        self._lock = threading.Lock()
        self._wanted: tuple[Hashable, int] | None = None
        self._looked: tuple[Hashable, int] | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._not_before = 0.0

    def want(self, query: Hashable, change: int) -> None:
        """Have problems looked for, unless that was done since. `change` counts the changes of others' tables."""
        with self._lock:
            self._wanted = query, change
            if self._thread is None and self._wanted != self._looked:
                self._thread = threading.Thread(target=self._run, name="filters", daemon=True)
                self._thread.start()

    def changed(self, change: int) -> None:
        """Have problems looked for again, after a change."""
        if self._wanted is not None:
            self.want(self._wanted[0], change)

    def drain(self) -> bool:
        """Return whether the problems have changed since the last call."""
        return self._changes.clear()

    def close(self) -> None:
        """End the thread; takes as long as nft does."""
        self._end.set()
        if (thread := self._thread) is not None:
            thread.join(_CLOSING)
        self._changes.close()

    def _run(self) -> None:
        while not self._end.wait(max(0.0, self._not_before - time.monotonic())):
            with self._lock:
                wanted = self._wanted
                if wanted is None or wanted == self._looked:
                    self._thread = None
                    return
            start = time.monotonic()
            found = self._look(wanted[0])
            # what takes long is done seldom: a twentieth of a core at most
            self._not_before = time.monotonic() + max(_PAUSE, _SHARE * (time.monotonic() - start))
            self._looked = wanted
            if found != self.problems:
                self.problems = found
                self._changes.wake()
        self._thread = None
