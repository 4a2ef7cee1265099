"""Knows the state directory: what an agent leaves on disk for its next start and for the other commands.

Whatever is found there may be cut off or hostile: each reader says below what it makes of that.
Imports model only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason

DOCKER_FILES = ("docker.json", "daemon.json.old", "daemon.json.last")
"""What dockerfile keeps here: its mark, and daemon.json as it was before ovsmesh, and before the last change."""
MAX_BYTES = 16 << 20
"""Bytes that any file read here may have."""

_SYSCTL = re.compile(r"[a-z0-9_]{1,64}(/[A-Za-z0-9_.:@+-]{1,64}){1,8}")
_VALUE = re.compile(r"[ -~\t]{0,256}")
_DIGEST = re.compile(r"[0-9A-Za-z_.:-]{1,128}")
_PID = re.compile(r"[1-9][0-9]{0,9}")
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def write_atomic(
    path: str | os.PathLike[str],
    data: str | bytes,
    mode: int = 0o600,
    sync: bool = True,
    owner: tuple[int, int] | None = None,
) -> None:
    """Puts `data` at `path` so that a reader sees the old content or the new, never a part. Raises OSError.

    `sync` also makes it survive a power cut; leave it out for what is worth nothing after one. `owner`: uid, gid.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read_regular(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file and its stat from before they were read; never waits for a writer.

    Raises OSError: EISDIR, EINVAL (a FIFO, socket or device) and EFBIG (more than `limit` bytes) with a text
    that says so.
    """
    name = os.fspath(path)
    # Looked at first, as opening a device may already do something.
    _regular(os.stat(name), name, limit)
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        _regular(found, name, limit)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", name)
    return data, found


def _regular(found: os.stat_result, name: str, limit: int) -> None:
    for is_kind, label in _KINDS:
        if is_kind(found.st_mode):
            code = errno.EISDIR if label == "a directory" else errno.EINVAL
            raise OSError(code, f"is {label}, not a regular file", name)
    if found.st_size > limit:
        raise OSError(errno.EFBIG, f"has {found.st_size} bytes, more than {limit}", name)


class StateDir:
    """The state directory of one agent. Only the holder of lock() writes, except for request_confirm()."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.mesh_file = self.path / "mesh.json"
        """The last-known-good mesh; read and written by sources."""
        self.confirm_file = self.path / "confirm"
        self._lock: int | None = None

    def ensure(self) -> None:
        """Makes the directory, for its owner only. Raises OvsmeshError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) != 0o700:
                self.path.chmod(0o700)
        except OSError as error:
            why = error.strerror or error
            raise OvsmeshError(f"state directory {self.path}: can't be made or set to mode 0700: {why}") from error

    def lock(self) -> None:
        """Makes this process the agent of this directory until it ends. Raises OvsmeshError when another is."""
        self.ensure()
        path = self.path / "agent.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OvsmeshError(f"{path}: can't be opened: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 16, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OvsmeshError(f"{path}: can't be locked: {error.strerror}") from error
            who = f"pid {holder}" if _PID.fullmatch(holder) else "its pid is not in the lock file"
            raise OvsmeshError(
                f"{path}: another agent runs with this state directory ({who}): stop it, or give --state-dir another"
            ) from error
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # The lock holds all the same; only the next agent's message will lack the pid.
        self._lock = handle

    def held(self) -> bool:
        """Whether an agent runs with this state directory."""
        try:
            handle = os.open(self.path / "agent.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def unlock(self) -> None:
        """Lets another agent have the directory. The file stays: removing it would let two agents hold "the" lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------ old sysctl values

    def before(self) -> tuple[dict[str, str], tuple[Problem, ...]]:
        """Sysctl path below /proc/sys → the value before ovsmesh; entries that can't be such are left out and named."""
        path = self.path / "before.json"
        try:
            found = _load(path)
        except OvsmeshError as error:
            message = f"{error}: the old sysctl values are not known, so they will not be restored"
            return {}, (Problem(Reason.StateUnreadable, message),)
        good: dict[str, str] = {}
        bad = 0
        for key, value in (found or {}).items():
            if isinstance(value, str) and _SYSCTL.fullmatch(key) and _VALUE.fullmatch(value) and not _dots(key):
                good[key] = value
            else:
                bad += 1
        message = f"{path}: {bad} entries are not sysctl values and are ignored"
        return good, (Problem(Reason.StateUnreadable, message),) if bad else ()

    def remember(self, values: Mapping[str, str]) -> tuple[Problem, ...]:
        """Records old sysctl values; the first recorded of each path stays. Returns why it could not.

        Must come before the sysctl is written. A file that can't be read is set aside as before.json.bad.
        """
        known, problems = self.before()
        new = {key: value for key, value in values.items() if key not in known}
        if not new:
            return problems
        path = self.path / "before.json"
        try:
            if problems:
                os.replace(path, path.with_name("before.json.bad"))
            write_atomic(path, json.dumps(known | new, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            message = (
                f"{path}: can't be written ({error.strerror}), so cleanup will not restore {', '.join(sorted(new))}"
            )
            return (*problems, Problem(Reason.StateUnwritable, message))
        return problems

    # ------------------------------------------------------------ what the agent tells the other commands

    def write_agent(self, options: Mapping[str, Any]) -> None:
        """The running agent's options and pid. Raises OSError."""
        write_atomic(self.path / "agent.json", json.dumps(dict(options), indent=1, sort_keys=True) + "\n", sync=False)

    def agent(self) -> dict[str, Any]:
        """What write_agent() left; {} when it is absent or garbage, as it is only a hint."""
        try:
            return _load(self.path / "agent.json") or {}
        except OvsmeshError:
            return {}

    def write_status(self, report: Mapping[str, Any]) -> None:
        """The agent's last report. Raises OSError."""
        write_atomic(self.path / "status.json", json.dumps(dict(report)) + "\n", sync=False)

    def status(self) -> dict[str, Any] | None:
        """The agent's last report; None when there is none yet. Raises OvsmeshError when it is garbage."""
        return _load(self.path / "status.json")

    # ------------------------------------------------------------ confirming held removals

    def request_confirm(self, digest: str) -> None:
        """Asks the agent to carry out the removals with this digest. Raises OvsmeshError."""
        if not _DIGEST.fullmatch(digest):
            raise OvsmeshError(f"{digest[:80]!a} is no digest of held removals: `ovsmesh status` shows the right one")
        try:
            write_atomic(self.confirm_file, digest + "\n")
        except OSError as error:
            message = (
                f"{self.confirm_file}: can't be written: {error.strerror}; does the agent run, and as the same user?"
            )
            raise OvsmeshError(message) from error

    def confirmation(self) -> str | None:
        """The digest that was confirmed; None when there is none, or the file holds no digest."""
        try:
            data, _ = read_regular(self.confirm_file, limit=1024)
        except OSError:
            return None
        text = data.decode(errors="replace").strip()
        return text if _DIGEST.fullmatch(text) else None

    def clear_confirmation(self) -> None:
        with contextlib.suppress(OSError):
            self.confirm_file.unlink()

    # ------------------------------------------------------------ the end

    def remove(self) -> list[str]:
        """Removes what ovsmesh left here, and the directory when nothing else is in it; names what stays.

        Nothing that is not ours is removed. Call it as the holder of the lock, last of all.
        """
        for name in (
            "mesh.json",
            "before.json",
            "before.json.bad",
            "agent.json",
            "status.json",
            "confirm",
            *DOCKER_FILES,
            "agent.lock",
        ):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        self.unlock()
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return []
        except OSError as error:
            with contextlib.suppress(OSError):
                return sorted(str(self.path / entry) for entry in os.listdir(self.path)) or [
                    f"{self.path}: {error.strerror}"
                ]
            return [str(self.path)]
        return []


def _dots(key: str) -> bool:
    return any(part in (".", "..") for part in key.split("/"))


def _load(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None when there is no file. Raises OvsmeshError."""
    try:
        data, _ = read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OvsmeshError(f"{path}: can't be read: {error.strerror}") from error
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OvsmeshError(f"{path}: is not JSON: it was cut off or changed by hand") from error
    if not isinstance(found, dict):
        raise OvsmeshError(f"{path}: wanted a JSON object, found a {type(found).__name__}")
    return found
