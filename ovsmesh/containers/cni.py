"""Read the CNI directory and ask the CNI plugins of this host; write and remove the managed conflist.

Decides nothing: dataplane.cni_config says what the conflist holds. Files in the directory may be hostile: only regular
files of limited size are read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.plan import Step
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import read_regular, write_atomic
from ovsmesh.text import printable

log = logging.getLogger("ovsmesh")

_MAX_BYTES = 1 << 20
_MOST_FILES = 1000
_TIMEOUT = 5.0
"""Seconds for a plugin to answer VERSION; it takes 10 ms."""
_Copy = tuple[tuple[str, ...], str]


class Cni:
    """The directory `directory` ("" leaves CNI alone), and the plugins in the directories of `bin_dir` (as in PATH)."""

    def __init__(self, directory: str = "", bin_dir: str = "") -> None:
        self._directory = directory
        self._bins = [os.path.abspath(p) for p in bin_dir.split(":") if p] if directory else []
        self._watch = FileWatch(directory, *self._bins, entries=True) if directory else None
        self._known: CniFacts | None = None
        """The facts as last returned; cleanup asks for none."""
        self._answers: dict[tuple[str, int, int, int], _Copy] = {}
        """Path and identity of a plugin's copy → its answer."""

    def close(self) -> None:
        """Stop watching; what was written stays."""
        if self._watch:
            self._watch.close()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable after an event."""
        return self._watch.fds() if self._watch else []

    def drain(self) -> bool:
        """Read all events. Return whether the directory or a plugin may have changed."""
        return self._watch is not None and self._watch.drain()

    # facts

    def facts(self) -> CniFacts | None:
        """Return which plugins there are and what they support; None if CNI is left alone."""
        if not self._directory:
            return None
        plugins = tuple(self._plugin(name) for name in cni_config.PLUGINS)
        kept = ""
        if not cni_config.writable(plugins):
            kept = self.observe()[0].get(cni_config.FILE, "")
        self._known = CniFacts(self._directory, plugins, kept)
        return self._known

    def _plugin(self, name: str) -> CniPlugin:
        """Ask every copy: it is not known which of the directories the runtime uses."""
        copies = [self._ask(f"{directory}/{name}") for directory in self._bins]
        there = [copy for copy in copies if copy is not None]
        good = [set(versions) for versions, why in there if not why]
        if good:
            return CniPlugin(name, tuple(sorted(set.intersection(*good))))
        why = there[0][1] if there else f"not in {', '.join(self._bins)}"
        return CniPlugin(name, (), why)

    def _ask(self, path: str) -> _Copy | None:
        """Return what a plugin answers to VERSION, or why it does not; None if there is no such file."""
        try:
            found = os.stat(path)
        except OSError as error:
            return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else ((), f"{path}: {error.strerror}")
        if not stat.S_ISREG(found.st_mode) or not os.access(path, os.X_OK):
            return (), f"{path} is not an executable file"
        key = (path, found.st_ino, found.st_mtime_ns, found.st_size)
        if key in self._answers:
            return self._answers[key]
        try:
            answer = _version(path)
        except OSError as error:
            # not remembered: the file may be half written
            return (), f"{path} can't be run here: {error.strerror}"
        self._answers = {k: v for k, v in self._answers.items() if k[0] != path} | {key: answer}
        return answer

    # observing

    def observe(self) -> tuple[dict[str, str], list[Unmanaged], list[Problem]]:
        """Return the managed conflist by its name, what conflicts with it, and problems with the other files."""
        if not self._directory:
            return {}, [], []
        files: dict[str, cni_config.File] = {}
        try:
            names = sorted(n for n in os.listdir(self._directory) if n.endswith(cni_config.SUFFIXES))
        except FileNotFoundError:
            names = []
        except OSError as error:
            why = f"CNI directory {self._directory}: {error.strerror}; give --cni-dir the runtime's"
            return {}, [], [Problem(Reason.CNIUnreadable, why)]
        for name in names[:_MOST_FILES]:
            path = os.path.join(self._directory, name)
            # a runtime ignores directories, and nothing else
            if not os.path.isdir(path) or os.path.islink(path):
                files[printable(name, 255)] = _read(path, name == cni_config.FILE)
        managed, unmanaged, problems = cni_config.judge(self._directory, files)
        return managed, unmanaged, [*cni_config.problems(self._known), *problems] if self._known else []

    # applying

    def apply(self, steps: Iterable[Step]) -> None:
        """Write or remove the conflist. Raise OvsmeshError."""
        for step in steps:
            path = Path(self._directory, step.key)
            if step.op == "-":
                self._remove(path)
            else:
                self._write(path, step.want)

    def _write(self, path: Path, text: str) -> None:
        try:
            if not os.path.isdir(self._directory):
                os.makedirs(self._directory, 0o755)
                log.info("CNI directory %s was missing and is made", self._directory)
            # renamed within the directory: a runtime may not notice a file that is moved in from another one
            write_atomic(path, text, 0o644)
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be written: {error.strerror}; is it the runtime's directory?") from error

    def _remove(self, path: Path) -> None:
        if cni_config.FILE not in self.observe()[0]:
            return
        try:
            path.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be removed: {error.strerror}") from error


def _read(path: str, own: bool) -> cni_config.File:
    """Return a file as the runtime would read it. Never wait for a writer. The managed conflist is no link."""
    if own and os.path.islink(path):
        return cni_config.File(b"", "is an unmanaged symbolic link")
    try:
        return cni_config.File(read_regular(path, _MAX_BYTES)[0])
    except OSError as error:
        return cni_config.File(b"", error.strerror or str(error))


def _version(path: str) -> _Copy:
    """Ask a plugin which versions it supports. Raise OSError if it can't be started."""
    env = {"CNI_COMMAND": "VERSION", "CNI_PATH": os.path.dirname(path), "PATH": os.defpath}
    try:
        done = subprocess.run(
            [path],
            input=b'{"cniVersion":"1.0.0"}',
            capture_output=True,
            env=env,
            cwd="/",
            timeout=_TIMEOUT,
            check=False,
        )
        found = json.loads(done.stdout)["supportedVersions"]
        versions = tuple(printable(v, 20) for v in found[:50])
    except subprocess.TimeoutExpired:
        return (), f"{path} did not answer VERSION within {_TIMEOUT:g} s"
    except (ValueError, KeyError, TypeError, RecursionError):
        said = printable((done.stderr or done.stdout).decode(errors="replace").strip(), 120)
        return (), f"{path} gave no answer to VERSION (exit {done.returncode}): {said or 'no output'}"
    return (versions, "") if versions else ((), f"{path} supports no version")
