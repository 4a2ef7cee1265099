"""Read and write the state directory: what an agent leaves for its next start and for the other commands.

Files found there may be cut off or hostile. Each reader says what it does then.
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
"""The migration record of containers.docker_state, and daemon.json before ovsmesh and before the last change."""
HISTORY_FILES = ("history.jsonl", "history.jsonl.1")
"""What history writes: the file that it appends to, and the one before it."""
_FILES = ("mesh.json", "before.json", "before.json.bad", "agent.json", "status.json", "confirm", *HISTORY_FILES)
MAX_BYTES = 16 << 20
"""Bytes that a file read here may have."""

_SYSCTL = re.compile(r"[a-z0-9_]{1,64}(/(?!\.{1,2}(?:/|$))[A-Za-z0-9_.:@+-]{1,64}){1,8}")
"""Below /proc/sys; no part is "." or ".."."""
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
    """Write `data` to `path` so that a reader sees the old content or the new, never a part. Raise OSError.

    With `sync` the content survives a power cut. `owner`: uid, gid.
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
    """Return the bytes of a regular file, and its stat from before the read. Never wait for a writer.

    Raise OSError, also for a directory (EISDIR), a FIFO, socket or device (EINVAL) and a file of more than `limit`
    bytes (EFBIG).
    """
    name = os.fspath(path)
    # before it is opened, as opening a device may have an effect
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
    """The state directory of one agent. Only the holder of the lock writes, except for request_confirm()."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.mesh_file = self.path / "mesh.json"
        """The last-known-good mesh; read and written by sources."""
        self.confirm_file = self.path / "confirm"
        self._lock: int | None = None

    def ensure(self) -> None:
        """Make the directory, with mode 0700. Raise OvsmeshError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) != 0o700:
                self.path.chmod(0o700)
        except OSError as error:
            why = error.strerror or error
            raise OvsmeshError(f"state directory {self.path}: can't be made or set to mode 0700: {why}") from error

    def lock(self) -> None:
        """Lock the directory for this process until it ends. Raise OvsmeshError if another holds the lock."""
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
            pass  # the lock holds all the same; the next agent's message does not name the pid
        self._lock = handle

    def held(self) -> bool:
        """Return whether an agent runs with this state directory."""
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
        """Release the lock. The file stays: if it were removed, two agents could hold locks on two files."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------ old sysctl values

    def before(self) -> tuple[dict[str, str], tuple[Problem, ...]]:
        """Return the sysctls before ovsmesh (path below /proc/sys → value), and problems that name unusable entries."""
        path = self.path / "before.json"
        try:
            found = _load(path)
        except OvsmeshError as error:
            message = f"{error}: the old sysctl values are not known, so they will not be restored"
            return {}, (Problem(Reason.StateUnreadable, message),)
        good: dict[str, str] = {}
        bad = 0
        for key, value in (found or {}).items():
            if isinstance(value, str) and _SYSCTL.fullmatch(key) and _VALUE.fullmatch(value):
                good[key] = value
            else:
                bad += 1
        message = f"{path}: {bad} entries are not sysctl values and are ignored"
        return good, (Problem(Reason.StateUnreadable, message),) if bad else ()

    def remember(self, values: Mapping[str, str]) -> tuple[Problem, ...]:
        """Record old sysctl values before the sysctls are written; what is recorded already stays. Return problems.

        A file that can't be read is renamed to before.json.bad.
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

    # ------------------------------------------------------------ for the other commands

    def write_agent(self, options: Mapping[str, Any]) -> None:
        """Write the running agent's options and pid. Raise OSError."""
        write_atomic(self.path / "agent.json", json.dumps(dict(options), indent=1, sort_keys=True) + "\n", sync=False)

    def agent(self) -> dict[str, Any]:
        """Return what write_agent() wrote; {} if it is absent or garbage, as it is a hint only."""
        try:
            return _load(self.path / "agent.json") or {}
        except OvsmeshError:
            return {}

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Write the agent's report. Raise OSError."""
        write_atomic(self.path / "status.json", json.dumps(dict(status)) + "\n", sync=False)

    def touch_status(self) -> None:
        """Say that the report is still true."""
        with contextlib.suppress(OSError):
            os.utime(self.path / "status.json")

    def status(self) -> dict[str, Any] | None:
        """Return the agent's last report, None if there is none yet. Raise OvsmeshError if it is garbage."""
        return _load(self.path / "status.json")

    def status_time(self) -> float | None:
        """Return when that report was last true, in seconds since the epoch; None if there is none."""
        return _written_at(self.path / "status.json")

    def agent_time(self) -> float | None:
        """Return when the agent started that runs or ran last, in seconds since the epoch; None if none has."""
        return _written_at(self.path / "agent.json")

    # ------------------------------------------------------------ confirming held removals

    def request_confirm(self, digest: str) -> None:
        """Ask the agent to carry out the held removals with this digest. Raise OvsmeshError."""
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
        """Return the digest that was confirmed; None if there is none, or the file holds no digest."""
        try:
            data, _ = read_regular(self.confirm_file, limit=1024)
        except OSError:
            return None
        text = data.decode(errors="replace").strip()
        return text if _DIGEST.fullmatch(text) else None

    def clear_confirmation(self) -> None:
        """Remove the confirmation, once it is used."""
        with contextlib.suppress(OSError):
            self.confirm_file.unlink()

    # ------------------------------------------------------------ removal

    def remove(self) -> list[str]:
        """Remove the files of ovsmesh, and the directory if nothing else is in it. Return the paths of what stays.

        Call it last, as the holder of the lock.
        """
        for name in (*_FILES, *DOCKER_FILES, "agent.lock"):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        self.unlock()
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return []
        except OSError as error:
            left: list[str] = []
            with contextlib.suppress(OSError):
                left = sorted(str(self.path / entry) for entry in os.listdir(self.path))
            return left or [f"{self.path}: {error.strerror}"]
        return []


def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _load(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in `path`, None if there is no file. Raise OvsmeshError."""
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
