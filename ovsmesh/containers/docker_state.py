"""Keep on disk what survives a crash: daemon.json, how it was before ovsmesh, and how far a change of it has come.

Uses three files of the state directory. docker.py decides what is written.
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
"""Most bytes of a daemon.json."""
_MODE = 0o644


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """daemon.json as it is on disk. `digest` is "" if there is none."""

    data: bytes = b""
    exists: bool = False
    mode: int = _MODE
    owner: tuple[int, int] = (0, 0)
    digest: str = ""
    stamp: str = ""
    """Changes whenever the file is written or touched."""


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """What ovsmesh has changed in daemon.json. It exists exactly while the file holds a change of ovsmesh."""

    config: str
    old: str
    """Digest of the file before ovsmesh; "" if there was none."""
    last: str = ""
    """Digest of the file before the last change."""
    new: str = ""
    """Digest of what ovsmesh wrote last."""
    mode: int = _MODE
    owner: tuple[int, int] = (0, 0)
    step: str = ""
    """"switch" or "rollback" while one is under way."""
    child: tuple[int, int] = (0, 0)
    """Process id and start time of the restart command under way."""
    seen: str = ""
    """The kbr0 (boot, namespace and index) on which dockerd was seen up."""
    made_dir: bool = False
    mixed: bool = False
    """Whether someone else has changed the file after ovsmesh."""
    why: str = ""
    refused: str = ""
    """Digest of what was wanted when dockerd did not come back."""
    refused_by: str = ""
    """Which dockerd that was (version and command line), or the kbr0 on which none started."""
    stamp: str = ""
    """That of the old file since the refusal."""


class DockerFile:
    """One daemon.json, and its record in the state directory. Every method raises OvsmeshError."""

    def __init__(self, path: str, state: StateDir) -> None:
        self.path = path
        self.real = os.path.realpath(path)
        self._record, self._old, self._last = (state.path / name for name in DOCKER_FILES)
        self._state = state

    # reading

    def read(self) -> DaemonConfig:
        """Read daemon.json."""
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
        """Return what daemon.json sets."""
        try:
            return daemon_json.settings(config.data)
        except OvsmeshError as error:
            raise OvsmeshError(f"{self.path} {error}; repair it (nothing was changed)") from None

    def record(self) -> MigrationRecord | None:
        """Read the record; None if there is none."""
        try:
            data, _ = read_regular(self._record)
            stored = json.loads(data)
            known = {f.name: type(getattr(_BLANK, f.name)) for f in fields(MigrationRecord)}
            # what another version of ovsmesh wrote beside is not needed
            stored = {k: tuple(v) if known[k] is tuple else v for k, v in stored.items() if k in known}
            if not all(
                isinstance(stored.get(name, getattr(_BLANK, name)), (kind, int)) for name, kind in known.items()
            ):
                raise ValueError
            return MigrationRecord(**stored)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OvsmeshError(f"{self._record}: can't be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise OvsmeshError(
                f"{self._record}: was cut off or changed by hand; {self._old} holds the old {self.path}, if any: "
                f"put that back, remove both"
            ) from error

    # writing

    def save(self, record: MigrationRecord) -> MigrationRecord:
        """Write the record and return it."""
        self._write(self._record, (json.dumps(asdict(record), indent=1) + "\n").encode(), 0o600)
        return record

    @property
    def directory(self) -> Path:
        """The state directory, once it is there."""
        self._state.ensure()
        return self._state.path

    def change(
        self, config: DaemonConfig, changes: Mapping[str, Any], record: MigrationRecord | None, step: str
    ) -> MigrationRecord:
        """Edit the file, once all that is needed to undo the edit is on disk."""
        new = daemon_json.edit(config.data, changes)
        fresh = record is None or (record.new != config.digest and self.settings(config).get("bridge") != KBR)
        self._state.ensure()
        if fresh or record is None:
            self._write(self._old, config.data, config.mode, config.owner)
            made = not config.exists and not os.path.isdir(os.path.dirname(self.real))
            kept = record or MigrationRecord(self.real, "")
            made = made or kept.made_dir
            record = replace(kept, old=config.digest, mode=config.mode, owner=config.owner, made_dir=made)
            record = replace(record, mixed=False)
        elif config.digest != record.new:
            record = replace(record, mixed=True)
        self._write(self._last, config.data, config.mode, config.owner)
        record = self.save(
            replace(record, config=self.real, last=config.digest, new=digest(new), step=step, child=(0, 0))
        )
        if record.made_dir:
            with contextlib.suppress(OSError):
                os.mkdir(os.path.dirname(self.real), 0o755)
        self._write(Path(self.real), new, config.mode, config.owner)
        return record

    def roll_back(self, record: MigrationRecord) -> None:
        """Put back the file from before the last change, unless someone else has changed it since."""
        if self.read().digest == record.new:
            self._put(self._last, record.last, record)

    def restore(self, record: MigrationRecord) -> None:
        """Put back the file from before ovsmesh. What someone else has changed in it since stays changed."""
        config = self.read()
        if config.digest == record.old or (config.digest == record.new and not record.mixed):
            self._put(self._old, record.old, record)
            return
        edited = daemon_json.edit(config.data, self.back(config, record))
        if record.old and daemon_json.settings(edited) == daemon_json.settings(self._saved(self._old, record.old)):
            self._put(self._old, record.old, record)
        else:
            self._write(Path(self.real), edited, config.mode, config.owner)

    def back(self, config: DaemonConfig, record: MigrationRecord | None) -> dict[str, Any]:
        """Return the changes that restore the settings from before ovsmesh; None removes one."""
        before = daemon_json.settings(self._saved(self._old, record.old)) if record and record.old else {}
        now = self.settings(config)
        return {key: before.get(key) for key in sorted(FILE_KEYS) if key in before or key in now}

    def forget(self, record: MigrationRecord) -> None:
        """Remove the record, once the file is as it was."""
        if record.made_dir:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self.real))
        for path in (self._record, self._last, self._old):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _put(self, saved: Path, wanted: str, record: MigrationRecord) -> None:
        if wanted:
            data = self._saved(saved, wanted)
            if self.read().digest != wanted:
                self._write(Path(self.real), data, record.mode, record.owner)
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
    """Return a short digest of a file."""
    return hashlib.sha256(data).hexdigest()[:16]


_BLANK = MigrationRecord("", "")
