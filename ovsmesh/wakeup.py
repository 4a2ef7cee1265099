"""Wake a loop that waits for file descriptors, from any thread."""

from __future__ import annotations

import contextlib
import os
import threading


class Wakeup:
    """An event source for a loop: wake() from any thread makes `fd` readable until clear()."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._open = True

    def wake(self) -> None:
        """Make `fd` readable; does nothing after close()."""
        with self._lock:
            if self._open:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> bool:
        """Forget the calls of wake(), and return whether there was one."""
        with self._lock, contextlib.suppress(BlockingIOError):
            return self._open and os.eventfd_read(self.fd) > 0
        return False

    def close(self) -> None:
        """Close `fd`."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.fd)
