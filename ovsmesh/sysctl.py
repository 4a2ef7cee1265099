"""Read and write sysctls, as paths below /proc/sys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ovsmesh.errors import OvsmeshError

_PROC = Path("/proc/sys")
_BYTES = 4096


class Sysctls:
    """Reads sysctls, again and again: their files stay open. Not thread-safe."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the values of those sysctls that this kernel has."""
        found = {key: value for key in keys if (value := self._value(key)) is not None}
        for key in self._files.keys() - found.keys():
            os.close(self._files.pop(key))
        return found

    def _value(self, key: str) -> str | None:
        try:
            if key in self._files:
                # fails where the link that it belongs to was made again
                with contextlib.suppress(OSError):
                    return os.pread(self._files[key], _BYTES, 0).decode(errors="replace").strip()
                os.close(self._files.pop(key))
            self._files[key] = os.open(_PROC / key, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._files[key], _BYTES, 0).decode(errors="replace").strip()
        except OSError:
            return None


def read_sysctls(keys: Iterable[str]) -> dict[str, str]:
    """Return the values of those sysctls that this kernel has."""
    sysctls = Sysctls()
    try:
        return sysctls.read(keys)
    finally:
        sysctls.close()


def write_sysctl(key: str, value: str) -> None:
    """Set a sysctl. Raise OvsmeshError if the kernel does not have it or refuses the value."""
    try:
        (_PROC / key).write_text(value + "\n")
    except OSError as error:
        raise OvsmeshError(f"can't set sysctl {key} to {value}: {error.strerror}") from error
