"""Find processes of this host by their name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path


def running(names: Collection[str], here: bool = True) -> Iterator[tuple[int, str]]:
    """Yield pid and name of each process that has one of these names, as the kernel cuts them to 15 characters.

    With `here` those in this network namespace only.
    """
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            name = Path("/proc", entry, "comm").read_text().strip() if entry.isdigit() else ""
            if name in names and (not here or shares_network(int(entry))):
                yield int(entry), name


def shares_network(pid: int) -> bool:
    """Return whether a process is in this network namespace. Raise OSError where that can't be seen."""
    return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), os.stat("/proc/self/ns/net"))
