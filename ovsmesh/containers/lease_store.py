"""Move host-local's leases to another directory while pods come and go, so that no address is given twice.

host-local holds a lock on the file `lock` of its store, and opens all others by their paths. One that still has the old
directory in its configuration, and waits for that lock meanwhile, follows the link that takes the directory's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

log = logging.getLogger("ovsmesh")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LOCK = "lock"


def move(old: str, new: str) -> None:
    """Move all leases of the store `old` to `new`, and leave a link to it. Raise OSError; then try again.

    Nothing is done where `old` is no directory. A lease that `new` has already stays as it is there.
    """
    if os.path.islink(old) or not os.path.isdir(old):
        return
    os.makedirs(new, 0o755, exist_ok=True)
    with _locked(old), _locked(new):
        names = [entry.name for entry in os.scandir(old) if entry.is_file(follow_symlinks=False)]
        for name in names:
            if name != _LOCK and not os.path.lexists(target := os.path.join(new, name)):
                shutil.copy2(os.path.join(old, name), f"{target}.new")
                os.rename(f"{target}.new", target)
        with tempfile.TemporaryDirectory(prefix=".ovsmesh-", dir=os.path.dirname(old)) as beside:
            link = os.path.join(beside, "store")
            os.symlink(new, link)
            _exchange(link, old)
    log.info("%d files of host-local's are moved from %s to %s", len(names), old, new)


def link_age(old: str, new: str) -> float:
    """Return the seconds since move() left its link; infinity where it leads nowhere (after a reboot), 0 for none."""
    with contextlib.suppress(OSError):
        if os.readlink(old) == new:
            return time.time() - os.lstat(old).st_mtime if os.path.isdir(new) else math.inf
    return 0.0


def unlink(old: str, new: str) -> None:
    """Remove the link that move() has left."""
    if link_age(old, new):
        with contextlib.suppress(OSError):
            os.unlink(old)


@contextlib.contextmanager
def _locked(store: str) -> Iterator[None]:
    """Hold host-local's lock of a store. Raise BlockingIOError where a plugin holds it, which it does for moments."""
    handle = os.open(os.path.join(store, _LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _exchange(one: str, other: str) -> None:
    """Let two paths change places in one step: there is no moment without either."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), other)
