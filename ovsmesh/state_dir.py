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
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason

DOCKER_FILES = ("docker.json", "daemon.json.old", "daemon.json.last")
"""The migration record of containers.docker_state, and daemon.json before ovsmesh and before the last change."""
HISTORY_FILES = ("history.jsonl", "history.jsonl.1")
"""What history writes: the file that it appends to, and the one before it."""
_FILES = (
    "mesh.json",
    "before.json",
    "before.json.bad",
    "forwarding.json",
    "agent.json",
    "status.json",
    "confirm",
    *HISTORY_FILES,
)
MAX_BYTES = 16 << 20
"""Bytes that a file read here may have."""

_SYSCTL = re.compile(r"[a-z0-9_]{1,64}(/(?!\.{1,2}(?:/|$))[A-Za-z0-9_.:@+-]{1,64}){1,8}")
"""Below /proc/sys; no part is "." or ".."."""
_VALUE = re.compile(r"[ -~\t]{0,256}")
_DIGEST = re.compile(r"[0-9A-Za-z_.:-]{1,128}")
_PID = re.compile(r"[1-9][0-9]{0,9}")
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPERM})
"""A disk that is full, read-only or broken: nothing that an option could cure."""
_ONLY_ONE = "\0ovsmesh"
"""Abstract Unix socket, which a network namespace has once: whoever changes the dataplane listens on it."""
_CLAIMING = 0.5
"""Seconds between another's bind and listen, and then some."""
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@contextlib.contextmanager
def sole_writer() -> Iterator[tuple[Problem, ...]]:
    """Be the only process that changes the dataplane of this network namespace; yield what is doubtful about that.

    Raise OvsmeshError while another process of root is, whatever its state directory and mount namespace. The claim
    ends with the process, however that ends.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        problems: tuple[Problem, ...] = ()
        try:
            claim.bind(_ONLY_ONE)
            claim.listen()
        except OSError:
            pid, uid = _claimant()
            who = f"pid {pid}" if pid else "its pid is not visible from here"
            if uid in (0, os.geteuid()):
                text = "another ovsmesh agent or cleanup works in this network namespace"
                raise OvsmeshError(f"{text} ({who}): stop it first, as a node has one") from None
            # a name that anyone may take must not keep root's agent from its work
            owner = f"a process of user {uid} ({who})" if uid is not None else "a process that does not answer"
            text = f"{owner} has the abstract socket @ovsmesh, which marks the agent of this network namespace"
            problems = (Problem(Reason.NamespaceClaimed, f"{text}. End it: a second agent is not noticed meanwhile"),)
        else:
            threading.Thread(target=_answer, args=(claim,), name="claim", daemon=True).start()
        try:
            yield problems
        finally:
            with contextlib.suppress(OSError):
                claim.shutdown(socket.SHUT_RDWR)


def _answer(claim: socket.socket) -> None:
    """Take each connection, as one that waits keeps its place for good. The kernel has told who listens before."""
    while True:
        try:
            claim.accept()[0].close()
        except OSError:
            return


def _claimant(timeout: float = _CLAIMING) -> tuple[int, int | None]:
    """Return pid (0 where it is not visible) and uid (None where nobody answers) of the holder of the claim."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking:
        end = time.monotonic() + timeout
        while True:
            try:
                asking.connect(_ONLY_ONE)
            except OSError:
                # it has bound and does not listen yet, or has just ended
                if time.monotonic() > end:
                    return 0, None
                time.sleep(0.01)
            else:
                return struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[:2]


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
        self._options: dict[str, Any] | None = None
        """The running agent's, as long as they could not be written."""
        self.problems: tuple[Problem, ...] = ()
        """What the agent's report has to say: why the directory can't be written, whether a second agent may run."""

    def ensure(self) -> None:
        """Make the directory, with mode 0700. Raise OvsmeshError, but not for a disk that takes no writes."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self.path.stat().st_mode) != 0o700:
                self.path.chmod(0o700)
        except OSError as error:
            why = error.strerror or error
            self._unwritable(error, f"state directory {self.path}: can't be made or set to mode 0700: {why}")

    def _unwritable(self, error: OSError, text: str) -> None:
        """Note why the directory can't be written: a node must have its network back all the same.

        Raise OvsmeshError for what is not the disk's fault.
        """
        if error.errno not in _UNWRITABLE:
            raise OvsmeshError(text) from error
        what = "the agent works without it: after a restart it knows neither the last mesh nor the sysctls before it"
        problem = Problem(Reason.StateUnwritable, f"{text}; {what}")
        self.problems = (*(p for p in self.problems if p.reason is not problem.reason), problem)

    def lock(self) -> None:
        """Lock the directory for this process until it ends. Raise OvsmeshError if another holds the lock.

        Where no lock file can be made, there is no lock.
        """
        self.ensure()
        path = self.path / "agent.lock"
        try:
            handle = self._open_lock(path)
        except OSError as error:
            return self._unwritable(error, f"{path}: can't be opened: {error.strerror}")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 16, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OvsmeshError(f"{path}: can't be locked: {error.strerror}") from error
            who = f"pid {holder}" if _PID.fullmatch(holder) else "its pid is not in the lock file"
            raise OvsmeshError(
                f"{path}: another agent runs with this state directory ({who}): stop it first"
            ) from error
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # the lock holds all the same; the next agent's message does not name the pid
        self._lock = handle

    @staticmethod
    def _open_lock(path: Path) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS or not path.exists():
                raise
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def held(self) -> bool:
        """Return whether an agent runs with this state directory, or where it has no lock file, in this namespace."""
        try:
            handle = os.open(self.path / "agent.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return _claimant(0.0)[1] == 0
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

    # ------------------------------------------------------------ who turned forwarding on

    def found_off(self) -> frozenset[int]:
        """Return the IP versions whose forwarding the agent turned on since this host, or its namespace, began."""
        with contextlib.suppress(OvsmeshError, OSError):
            noted = _load(self.path / "forwarding.json") or {}
            versions = noted.get("off")
            if noted.get("since") == _since() and isinstance(versions, list):
                return frozenset(v for v in (4, 6) if v in versions)
        return frozenset()

    def note_off(self, versions: Iterable[int]) -> tuple[Problem, ...]:
        """Record that the agent turns forwarding of these IP versions on. Return problems."""
        known = self.found_off()
        if known >= set(versions):
            return ()
        try:
            noted = {"since": _since(), "off": sorted(known | set(versions))}
            write_atomic(self.path / "forwarding.json", json.dumps(noted) + "\n")
        except OSError as error:
            text = (
                f"{self.path / 'forwarding.json'}: can't be written ({error.strerror}), so the next agent takes it "
                f"that others had forwarding on, and limits it no more"
            )
            return (Problem(Reason.StateUnwritable, text),)
        return ()

    # ------------------------------------------------------------ for the other commands

    def write_agent(self, options: Mapping[str, Any]) -> None:
        """Write the running agent's options and pid. Raise OvsmeshError, but not for a disk that takes no writes."""
        self._options = dict(options)
        try:
            write_atomic(
                self.path / "agent.json", json.dumps(self._options, indent=1, sort_keys=True) + "\n", sync=False
            )
        except FileNotFoundError as error:
            if not self.problems:
                raise OvsmeshError(f"{self.path}: was removed while the agent started") from error
        except OSError as error:
            self._unwritable(error, f"{self.path}/agent.json: can't be written: {error.strerror}")
        else:
            self._options = None
            self.problems = tuple(p for p in self.problems if p.reason is not Reason.StateUnwritable)

    def retry(self) -> None:
        """Try again to write what a full or read-only disk did not take."""
        if self._options is not None:
            with contextlib.suppress(OvsmeshError):
                if self._lock is None:
                    self.lock()
                self.write_agent(self._options)

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


def _since() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"


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
