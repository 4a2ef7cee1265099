"""Docker's systemd unit: whether it is off on purpose, what dockerd said, and that it never starts without kbr0.

Where systemd does not run, or something else restarts Docker, nothing is known and nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ovsmesh.bounded import output
from ovsmesh.dataplane.types import KBR, MARK
from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import write_atomic
from ovsmesh.text import printable

SYSTEMD = Path("/run/systemd/system")
UNITS = Path("/etc/systemd/system")
FILE = "50-ovsmesh.conf"
_UNIT = re.compile(r"[A-Za-z0-9@_.\\:-]{1,200}")
_FATAL = re.compile(r"failed to start daemon|level=fatal|unable to configure the Docker daemon|flag provided but")
_MOST = 400
"""Characters of dockerd's words in a message."""


class DockerUnit:
    """The unit that a restart command names; `name` is "" where there is none."""

    def __init__(self, restart: str) -> None:
        self.name = _unit(restart) if SYSTEMD.is_dir() else ""

    def off(self) -> str:
        """Return what says that this unit is off on purpose: masked, or disabled with its socket; "" if it is not."""
        if not self.name:
            return ""
        service, socket = (_show(f"{self.name}.{kind}") for kind in ("service", "socket"))
        if service.get("LoadState") == "masked":
            return f"{self.name}.service is masked"
        if service.get("LoadState") == "not-found":
            return f"there is no unit {self.name}.service"
        started = any(one.get("UnitFileState", "").startswith("enabled") for one in (service, socket))
        if service.get("UnitFileState") == "disabled" and not started:
            return f"{self.name}.service is disabled"
        return ""

    def said(self) -> str:
        """Return the last words of a dockerd that did not start; "" where they are not known."""
        if not self.name:
            return ""
        text = output("journalctl", "-q", "--no-pager", "-o", "cat", "-n", "30", "-u", f"{self.name}.service") or ""
        lines = [line for line in text.splitlines() if _FATAL.search(line)]
        return printable(lines[-1], _MOST) if lines else ""

    def forgive(self) -> None:
        """Let systemd start it again, which it refuses after a few failed starts in a row."""
        if self.name:
            output("systemctl", "reset-failed", f"{self.name}.service")

    @property
    def _path(self) -> Path:
        return UNITS / f"{self.name}.service.d" / FILE

    def need_bridge(self, addresses: Iterable[str]) -> str:
        """Have systemd make kbr0 before dockerd, if nobody else has. Return why that can't be kept, or ""."""
        if not self.name:
            return ""
        text = drop_in(addresses)
        with contextlib.suppress(OSError):
            if self._path.read_text() == text:
                return ""
        try:
            self._path.parent.mkdir(mode=0o755, exist_ok=True)
            write_atomic(self._path, text, 0o644)
        except OSError as error:
            return f"{self._path} can't be written ({error.strerror}), so dockerd may start without {KBR}"
        output("systemctl", "daemon-reload")
        return ""

    def need_nothing(self) -> None:
        """Take that back. Raise OvsmeshError."""
        if not self.name or not os.path.lexists(self._path):
            return
        try:
            self._path.unlink()
        except OSError as error:
            raise OvsmeshError(f"{self._path}: can't be removed: {error.strerror}") from error
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()
        output("systemctl", "daemon-reload")


def drop_in(addresses: Iterable[str]) -> str:
    """Return the drop-in. It marks the bridge that it makes, so that the agent takes it for its own."""
    steps = [f"ip link set {KBR} up", *(f"ip address add {address} dev {KBR}" for address in addresses), "true"]
    make = f"ip link add {KBR} type bridge && ip link set {KBR} alias {MARK} && {{ {'; '.join(steps)}; }}"
    there = f"ip link show dev {KBR} >/dev/null 2>&1"
    return (
        f"# Written by ovsmesh while Docker is on {KBR}; `ovsmesh cleanup` removes it.\n"
        f"# dockerd does not start without {KBR}, and some versions before 27.5 never do again after that.\n"
        "[Service]\n"
        f"ExecStartPre=/bin/sh -c 'PATH=/usr/sbin:/usr/bin:/sbin:/bin; {there} || {{ {make}; }} || {there}'\n"
    )


def _unit(restart: str) -> str:
    with contextlib.suppress(ValueError):
        words = shlex.split(restart)
        if len(words) > 2 and os.path.basename(words[0]) == "systemctl" and words[-2] in ("restart", "try-restart"):
            name = words[-1].removesuffix(".service")
            return name if _UNIT.fullmatch(name) else ""
    return ""


def _show(unit: str) -> dict[str, str]:
    text = output("systemctl", "show", "-p", "LoadState", "-p", "UnitFileState", unit) or ""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
