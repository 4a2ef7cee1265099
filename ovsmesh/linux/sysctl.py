"""Read and write sysctls, as paths below /proc/sys."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ovsmesh.errors import OvsmeshError

_PROC = Path("/proc/sys")


def read_sysctls(keys: Iterable[str]) -> dict[str, str]:
    """Return the values of those sysctls that this kernel has."""
    found = {}
    for key in keys:
        try:
            found[key] = (_PROC / key).read_text().strip()
        except OSError:
            continue
    return found


def write_sysctl(key: str, value: str) -> None:
    """Set a sysctl. Raise OvsmeshError if the kernel does not have it or refuses the value."""
    try:
        (_PROC / key).write_text(value + "\n")
    except OSError as error:
        raise OvsmeshError(f"can't set sysctl {key} to {value}: {error.strerror}") from error
