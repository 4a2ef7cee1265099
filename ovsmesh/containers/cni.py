"""Read the CNI directory and ask the CNI plugins of this host; write and remove the managed conflist.

Decides nothing: dataplane.cni_config says what the conflist holds. Files in the directory may be hostile: only regular
files of limited size are read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ovsmesh.containers import lease_store
from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.plan import Step
from ovsmesh.dataplane.types import CniFacts, CniPlugin, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import read_regular, write_atomic
from ovsmesh.text import duration, printable

log = logging.getLogger("ovsmesh")

_MAX_BYTES = 1 << 20
_MOST_FILES = 1000
_TIMEOUT = 5.0
"""Seconds for a plugin to answer VERSION; it takes 10 ms."""
_CONTESTED = 6
_MEMORY = 300.0
"""So many changes by others that were undone within so many seconds are a fight with another program."""
_LONGEST = 60.0
"""Seconds between two writes in a fight, at most."""
_LINK_STAYS = 600.0
"""Seconds for which a runtime may still start a plugin with the conflist of before; it reads a new one at once."""
_PLUGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_Copy = tuple[tuple[str, ...], str]


class Cni:
    """The directory `directory` ("" leaves CNI alone), and the plugins in the directories of `bin_dir` (as in PATH)."""

    def __init__(
        self, directory: str = "", bin_dir: str = "", stores: tuple[str, str] = (cni_config.OLD_STORE, cni_config.STORE)
    ) -> None:
        self._directory = directory
        self._old_store, self._store = stores
        self._bins = [os.path.abspath(p) for p in bin_dir.split(":") if p] if directory else []
        self._watch = FileWatch(directory, *self._bins, entries=True) if directory else None
        self._known: CniFacts | None = None
        """The facts as last returned; cleanup asks for none."""
        self._answers: dict[tuple[str, int, int, int], _Copy] = {}
        """Path and identity of a plugin's copy → its answer."""
        self._wrote: str | None = None
        """The conflist as it was written last."""
        self._undone: list[float] = []
        """When (monotonic) changes by others were undone lately."""

    def close(self) -> None:
        """Stop watching; what was written stays."""
        if self._watch:
            self._watch.close()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable after an event."""
        return self._watch.fds() if self._watch else []

    def drain(self) -> bool:
        """Read all events. Return whether the directory or a plugin may have changed; never in a pause of a fight."""
        return self._watch is not None and self._watch.drain() and not self._waits()

    def dirty(self) -> None:
        """Remove the link that the move of the leases has left, once no plugin can need it any more."""
        if self._directory and lease_store.link_age(self._old_store, self._store) > _LINK_STAYS:
            lease_store.unlink(self._old_store, self._store)

    def _waits(self) -> float:
        """Return the seconds for which nothing is written, as another program would undo it at once."""
        now = time.monotonic()
        self._undone = [at for at in self._undone if now - at < _MEMORY]
        more = len(self._undone) - _CONTESTED
        return max(0.0, self._undone[-1] + min(_LONGEST, 2.0**more) - now) if more >= 0 else 0.0

    # facts

    def facts(self) -> CniFacts | None:
        """Return which plugins there are and what they support; None if CNI is left alone."""
        if not self._directory:
            return None
        plugins = tuple(self._plugin(name) for name in cni_config.PLUGINS)
        text = self._text()
        found = cni_config.chained(text)
        found = found._replace(plugins=tuple(map(self._chained, cni_config.types(found))))
        kept = ""
        if not cni_config.writable(plugins):
            kept = self.observe()[0].get(cni_config.FILE, "")
        self._known = CniFacts(self._directory, plugins, kept, found)
        return self._known

    def _text(self) -> str:
        """Return the conflist as it is on disk; "" if it can't be read."""
        return _read(os.path.join(self._directory, cni_config.FILE), True).data.decode(errors="replace")

    def _chained(self, name: str) -> CniPlugin:
        # libcni refuses a path too
        return self._plugin(name) if _PLUGIN.fullmatch(name) else CniPlugin(name, (), "is no plugin's name")

    def _plugin(self, name: str) -> CniPlugin:
        """Ask every copy: it is not known which of the directories the runtime uses."""
        copies = [self._ask(f"{directory}/{name}") for directory in self._bins]
        there = [copy for copy in copies if copy is not None]
        good = [set(versions) for versions, why in there if not why]
        if name not in cni_config.PLUGINS and there and not good:
            # not all can tell; whoever put it there knows
            return CniPlugin(name, cni_config.VERSIONS)
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
            names = sorted(filter(cni_config.is_read, os.listdir(self._directory)))
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
        if self._known is None:
            # the others are about what the agent would write
            return managed, unmanaged, [p for p in problems if p.reason is Reason.CNIRenamed]
        return managed, unmanaged, [*cni_config.problems(self._known), *problems, *self._fight()]

    def _fight(self) -> Iterator[Problem]:
        pause = self._waits()
        if (times := len(self._undone)) >= _CONTESTED:
            text = (
                f"{self._directory}/{cni_config.FILE} was changed or removed by another program {times} times within "
            )
            text += f"{duration(time.monotonic() - self._undone[0])}, and put back each time; "
            text += f"it is put back at most every {duration(min(_LONGEST, 2.0 ** (times - _CONTESTED)))} now"
            yield Problem(Reason.CNIContested, f"{text}: find that program and stop it", fatal=bool(pause))

    # applying

    def apply(self, steps: Iterable[Step]) -> None:
        """Write the conflist, or take the managed plugins out and remove it if nothing is left. Raise OvsmeshError."""
        for step in steps:
            path = Path(self._directory, step.key)
            if step.op == "-":
                self._remove(path)
            else:
                self._write(path, step.want)

    def _write(self, path: Path, text: str) -> None:
        found = self._text()
        if self._known is not None and cni_config.chained(found) != self._known.chained._replace(plugins=()):
            # someone has put in or taken out a plugin meanwhile: the next comparison finds it
            return
        try:
            lease_store.move(self._old_store, self._store)
        except OSError as error:
            text = f"{self._old_store}: host-local's leases can't be moved to {self._store}: {error.strerror}"
            raise OvsmeshError(text) from error
        if self._wrote is not None and found != self._wrote:
            self._undone.append(time.monotonic())
        try:
            if not os.path.isdir(self._directory):
                os.makedirs(self._directory, 0o755)
                log.info("CNI directory %s was missing and is made", self._directory)
            # renamed within the directory: a runtime may not notice a file that is moved in from another one
            write_atomic(path, text, 0o644)
            self._wrote = text
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be written: {error.strerror}; is it the runtime's directory?") from error

    def _remove(self, path: Path) -> None:
        if cni_config.FILE not in self.observe()[0]:
            return
        lease_store.unlink(self._old_store, self._store)
        try:
            if rest := cni_config.without_managed(self._text()):
                write_atomic(path, rest, 0o644)
            else:
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
