"""daemon.json on disk, how it was before ovsmesh, and how far a change of it has come: all that survives a crash.

Knows the state directory's three Docker files. What to write is daemonjson's and docker's. Never imports ovs, pyroute2
or kubernetes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ovsmesh.containers import daemon_json
from ovsmesh.dataplane.docker_config import FILE_KEYS
from ovsmesh.dataplane.types import KBR
from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import DOCKER_FILES, StateDir, read_regular, write_atomic

LIMIT = 1 << 20
"""Bytes of a daemon.json."""
_MODE = 0o644


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """daemon.json as it is on disk. `digest` is "" where there is none."""

    data: bytes = b""
    exists: bool = False
    mode: int = _MODE
    owner: tuple[int, int] = (0, 0)
    digest: str = ""
    stamp: str = ""
    """Changes whenever the file is written or touched."""


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """What ovsmesh has done with daemon.json; there is one exactly while the file is changed by it."""

    config: str
    old: str
    """Digest of the file before ovsmesh; "" where there was none."""
    last: str = ""
    """Digest before the last change."""
    new: str = ""
    """Digest of what was written last."""
    mode: int = _MODE
    owner: tuple[int, int] = (0, 0)
    step: str = ""
    """"switch" or "rollback" while one is under way."""
    child: tuple[int, int] = (0, 0)
    """Process id and start time of the restart command under way."""
    seen: str = ""
    """The kbr0 (boot and index) on which dockerd was seen up."""
    made_dir: bool = False
    mixed: bool = False
    """Whether somebody else has changed the file after ovsmesh had."""
    why: str = ""
    refused: str = ""
    """Digest of what was wanted when dockerd did not come back."""
    stamp: str = ""
    """The old file's, since that refusal."""
    times: int = 0
    at: float = 0.0
    """When that was, in seconds since the epoch."""


class DockerFile:
    """One daemon.json, and the state directory's memory of it. Every method raises OvsmeshError."""

    def __init__(self, path: str, state: StateDir) -> None:
        self.path = path
        self.real = os.path.realpath(path)
        self._mark, self._old, self._last = (state.path / name for name in DOCKER_FILES)
        self._state = state

    # reading

    def read(self) -> DaemonConfig:
        try:
            data, about = read_regular(self.real, LIMIT)
        except FileNotFoundError:
            return DaemonConfig()
        except OSError as error:
            raise OvsmeshError(f"{self.path}: can't be read: {error.strerror}") from error
        owner = (about.st_uid, about.st_gid)
        stamp = f"{about.st_mtime_ns} {about.st_ino}"
        return DaemonConfig(data, True, stat.S_IMODE(about.st_mode), owner, digest(data), stamp)

    def settings(self, config: DaemonConfig) -> dict[str, Any]:
        try:
            return daemon_json.settings(config.data)
        except OvsmeshError as error:
            raise OvsmeshError(f"{self.path} {error}; mend it (nothing was changed)") from None

    def mark(self) -> MigrationRecord | None:
        try:
            data, _ = read_regular(self._mark)
            told = json.loads(data)
            known = {f.name: type(getattr(_BLANK, f.name)) for f in fields(MigrationRecord)}
            told = {k: tuple(v) if known.get(k) is tuple else v for k, v in told.items()}
            if not all(isinstance(told.get(name, getattr(_BLANK, name)), (kind, int)) for name, kind in known.items()):
                raise ValueError
            return MigrationRecord(**told)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OvsmeshError(f"{self._mark}: can't be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise OvsmeshError(
                f"{self._mark}: was cut off or changed by hand; {self._old} holds the old {self.path}, if any: "
                f"put that back, remove both"
            ) from error

    # writing

    def save(self, mark: MigrationRecord) -> MigrationRecord:
        self._write(self._mark, (json.dumps(asdict(mark), indent=1) + "\n").encode(), 0o600)
        return mark

    def change(
        self, config: DaemonConfig, changes: Mapping[str, Any], mark: MigrationRecord | None, step: str
    ) -> MigrationRecord:
        """Edits the file, after all that is needed to undo it is safely on disk."""
        new = daemon_json.edit(config.data, changes)
        fresh = mark is None or (mark.new != config.digest and self.settings(config).get("bridge") != KBR)
        self._state.ensure()
        if fresh or mark is None:
            self._write(self._old, config.data, config.mode, config.owner)
            made = not config.exists and not os.path.isdir(os.path.dirname(self.real))
            kept = mark or MigrationRecord(self.real, "")
            made = made or kept.made_dir
            mark = replace(kept, old=config.digest, mode=config.mode, owner=config.owner, made_dir=made)
            mark = replace(mark, mixed=False)
        elif config.digest != mark.new:
            mark = replace(mark, mixed=True)
        self._write(self._last, config.data, config.mode, config.owner)
        mark = self.save(replace(mark, config=self.real, last=config.digest, new=digest(new), step=step, child=(0, 0)))
        if mark.made_dir:
            with contextlib.suppress(OSError):
                os.mkdir(os.path.dirname(self.real), 0o755)
        self._write(Path(self.real), new, config.mode, config.owner)
        return mark

    def roll_back(self, mark: MigrationRecord) -> None:
        """The file as it was before the last change, unless someone else has changed it since then."""
        if self.read().digest == mark.new:
            self._put(self._last, mark.last, mark)

    def restore(self, mark: MigrationRecord) -> None:
        """The file as it was before ovsmesh; what someone else has changed in it since then stays changed."""
        config = self.read()
        if config.digest == mark.old or (config.digest == mark.new and not mark.mixed):
            self._put(self._old, mark.old, mark)
            return
        edited = daemon_json.edit(config.data, self.back(config, mark))
        if mark.old and daemon_json.settings(edited) == daemon_json.settings(self._saved(self._old, mark.old)):
            self._put(self._old, mark.old, mark)
        else:
            self._write(Path(self.real), edited, config.mode, config.owner)

    def back(self, config: DaemonConfig, mark: MigrationRecord | None) -> dict[str, Any]:
        """The changes that bring our settings to what they were before ovsmesh; None takes one out."""
        before = daemon_json.settings(self._saved(self._old, mark.old)) if mark and mark.old else {}
        ours = self.settings(config)
        return {key: before.get(key) for key in sorted(FILE_KEYS) if key in before or key in ours}

    def forget(self, mark: MigrationRecord) -> None:
        """Removes the memory of it, once the file is as it was."""
        if mark.made_dir:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self.real))
        for path in (self._mark, self._last, self._old):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _put(self, saved: Path, wanted: str, mark: MigrationRecord) -> None:
        if wanted:
            data = self._saved(saved, wanted)
            if self.read().digest != wanted:
                self._write(Path(self.real), data, mark.mode, mark.owner)
            return
        try:
            os.unlink(self.real)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OvsmeshError(f"{self.path}: can't be removed: {error.strerror}") from error

    def _saved(self, path: Path, wanted: str) -> bytes:
        try:
            data, _ = read_regular(path, LIMIT)
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be read: {error.strerror}; {self.path} stays as it is") from error
        if digest(data) != wanted:
            raise OvsmeshError(f"{path}: is not the old {self.path} any more; {self.path} stays as it is")
        return data

    def _write(self, path: Path, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
        try:
            write_atomic(path, data, mode, owner=owner)
        except OSError as error:
            hint = "; is it a mount of a single file? mount its directory" if error.errno == errno.EBUSY else ""
            raise OvsmeshError(f"{path}: can't be written: {error.strerror}{hint}") from error


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


_BLANK = MigrationRecord("", "")
