"""Restart Docker: run the command as a child process, then wait for the daemon's answer, each with a deadline.

Never blocks: the loop asks after an event of the child's pidfd or of the daemon's watch, and when time has passed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ovsmesh.containers.docker_api import DaemonWatch, start_time
from ovsmesh.dataplane.docker_config import daemon_text
from ovsmesh.dataplane.types import Daemon
from ovsmesh.errors import OvsmeshError
from ovsmesh.text import printable

_VALIDATES = 23
"""The first major version of dockerd that has --validate."""
_VALIDATE = 10.0
_TOLD = 400
"""Characters of the command's output in a message."""


def command(text: str) -> list[str]:
    """Return the restart command as argv. Raise OvsmeshError if there is no such program."""
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise OvsmeshError(f"--docker-restart {text!r}: {error}") from None
    if not argv or shutil.which(argv[0]) is None:
        raise OvsmeshError(
            f"--docker-restart {text!r}: there is no program {argv[0] if argv else ''} to restart Docker with"
        )
    return argv


def validated(daemon: Daemon, data: bytes, directory: Path) -> str:
    """Return why this dockerd would not start with this daemon.json, "" if it would or can't be asked.

    Docker 23 and newer can be asked, without a daemon being touched; Docker 20 can't. A file is written to `directory`
    for as long as it takes.
    """
    program = shutil.which(daemon.flags[0]) if daemon.flags else None
    major = daemon.version.partition(".")[0]
    if program is None or not major.isascii() or not major.isdigit() or int(major) < _VALIDATES or _elsewhere(daemon):
        return ""
    words, given = [], list(daemon.flags[1:])
    while given:
        word = given.pop(0)
        if word == "--config-file" and given:
            given.pop(0)
        elif not word.startswith("--config-file="):
            words.append(word)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".daemon.json.") as file:
            file.write(data)
            file.flush()
            argv = [program, *words, "--validate", "--config-file", file.name]
            done = subprocess.run(argv, capture_output=True, timeout=_VALIDATE, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = " ".join(done.stderr.decode(errors="replace").split()) or "no output"
    return printable(said, _TOLD) if done.returncode and "unknown flag: --validate" not in said else ""


def _elsewhere(daemon: Daemon) -> bool:
    """Return whether a dockerd has other files than this process, or that can't be seen."""
    try:
        return not os.path.samestat(os.stat(f"/proc/{daemon.instance[0]}/root"), os.stat("/"))
    except OSError:
        return True


class Restart:
    """One run of the restart command, or a run that an earlier agent began. `good`: whether the daemon is as wanted."""

    def __init__(self, argv: list[str], watch: DaemonWatch, good: Callable[[Daemon], bool], timeout: float) -> None:
        self._watch, self._good, self._timeout = watch, good, timeout
        self.before = watch.daemon
        self._argv = argv
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        # in memory, as the disk may be full; close() closes it
        self._said = open(os.memfd_create("docker-restart"), "w+b", buffering=0)  # noqa: SIM115
        self.identity = (0, 0)
        self._ended = 0.0
        self._deadline = 0.0

    def begin(self, adopt: tuple[int, int] = (0, 0)) -> None:
        """Start the command, or take over one that still runs. Raise OvsmeshError."""
        self._deadline = time.monotonic() + self._timeout
        if adopt[0] and start_time(adopt[0]) == adopt[1]:
            with contextlib.suppress(OSError):
                self._pidfd, self.identity = os.pidfd_open(adopt[0]), adopt
                return
        try:
            self._child = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            raise OvsmeshError(f"{self._argv[0]}: {error.strerror}") from error
        self.identity = (self._child.pid, start_time(self._child.pid))
        self._pidfd = os.pidfd_open(self._child.pid)

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable when the command has ended."""
        return [self._pidfd] if self._pidfd >= 0 else []

    def close(self) -> None:
        """Release it. What still runs goes on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._said.close()
        if self._child is not None and self._child.returncode is None:
            # without this Python warns of a child that is not waited for; the next agent takes it over
            self._child.returncode = 0

    def text(self) -> str:
        """Return what is waited for."""
        what = "dockerd to answer" if self._ended else f"`{shlex.join(self._argv)}`"
        return f"waiting for {what}, {self._timeout:.0f} s at most"

    def outcome(self) -> str | None:
        """Return None while it is under way, "" if the daemon is as wanted, else why it is not."""
        if not self._ended:
            ended, why = self._command_ended()
            if why:
                return why
            if not ended:
                return None
            self._ended = time.monotonic()
            self._deadline = self._ended + self._timeout
            self._watch.poke()
        return self._answered()

    def _command_ended(self) -> tuple[bool, str]:
        shown = f"`{shlex.join(self._argv)}`"
        if self._child is not None:
            code = self._child.poll()
            if code:
                return True, f"{shown} ended with {code}: {self._output() or 'no output'}"
            if code == 0:
                self._let_go()
                return True, ""
        elif start_time(self.identity[0]) != self.identity[1]:
            self._let_go()
            return True, ""
        if time.monotonic() < self._deadline:
            return False, ""
        with contextlib.suppress(OSError):
            os.killpg(self.identity[0], signal.SIGKILL)
        if self._child is not None:
            self._child.wait()
        return True, f"{shown} did not end in {self._timeout:.0f} s"

    def _let_go(self) -> None:
        os.close(self._pidfd)
        self._pidfd = -1

    def _answered(self) -> str | None:
        daemon, before = self._watch.daemon, self.before
        if daemon is not None and daemon.state == "up" and daemon.read_at >= self._ended:
            if self._good(daemon):
                return ""
            other = before is None or before.state != "up" or daemon.instance != before.instance
            if other and daemon.instance != (0, 0):
                return f"dockerd came back {daemon_text(daemon)}"
        if time.monotonic() < self._deadline:
            return None
        state = "is as it was" if daemon is not None and daemon.state == "up" else "does not answer"
        said = self._output()
        return f"{self._timeout:.0f} s after `{shlex.join(self._argv)}` dockerd {state}{said and ': ' + said}"

    def _output(self) -> str:
        with contextlib.suppress(OSError):
            size = self._said.seek(0, os.SEEK_END)
            self._said.seek(max(0, size - 4 * _TOLD))
            text = " ".join(self._said.read().decode(errors="replace").split())
            return "".join(c for c in text if c.isprintable())[-_TOLD:]
        return ""
