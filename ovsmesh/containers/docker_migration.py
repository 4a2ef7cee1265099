"""A change of Docker's bridge, from the file that is written to the daemon that is seen on it, or the way back.

Acts; what is to be done comes from docker. What has been done so far is in the mark on disk, so an agent that
dies at any moment is gone on from by the next one. Never imports ovs, pyroute2 or kubernetes.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ovsmesh.containers.docker_api import DaemonWatch
from ovsmesh.containers.docker_restart import Restart, command, start_time
from ovsmesh.containers.docker_state import DaemonConfig, DockerFile, MigrationRecord
from ovsmesh.dataplane.docker_config import AWAY, reached
from ovsmesh.dataplane.types import KBR, Daemon
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason

_RESUME = 60.0
"""Seconds before a file that could not be put back is tried again."""


class DockerOptions(NamedTuple):
    """Options of the agent that are about Docker."""

    mode: str
    config: str
    socket: str
    restart: str
    timeout: float


class DockerMigration:
    """The one change that may be under way."""

    def __init__(self, options: DockerOptions, file: DockerFile, watch: DaemonWatch) -> None:
        self._options, self._file, self._watch = options, file, watch
        self._job: Restart | None = None
        self._kind = ""
        """"switch" (a file was written), "start" (none was), "rollback" or "restore"."""
        self.here = ""
        """The kbr0 of this moment."""
        self.aim = ""
        """Digest of what is wanted of Docker now."""
        self.why = ""
        """Why the last change did not end well; "" when it did."""
        self.trouble: Problem | None = None
        self._resume_at = 0.0

    def close(self) -> None:
        if self._job:
            self._job.close()

    def fds(self) -> list[int]:
        return self._job.fds() if self._job else []

    @property
    def busy(self) -> bool:
        return self._job is not None

    def text(self) -> str:
        """What is under way."""
        if self._job is None:
            return "Docker is amid a switch, or was when an agent was killed: the agent goes on with it"
        return f"{'putting the old daemon.json back: ' if self._kind == 'rollback' else ''}{self._job.text()}"

    def begin(
        self, changes: Mapping[str, object], config: DaemonConfig, mark: MigrationRecord | None, wanted: str
    ) -> None:
        """Writes the file; with `wanted`, how the daemon is to be seen, restarts it too. Raises OvsmeshError."""
        argv = command(self._options.restart) if wanted else []
        self.trouble = None
        if changes or (wanted and mark is None):
            mark = self._file.change(config, changes, mark, "switch" if wanted else "")
        if wanted and mark:
            self._start("switch" if changes else "start", argv, mark, lambda daemon: reached(daemon, wanted))

    def await_child(self, mark: MigrationRecord) -> None:
        """Waits for the restart command of an agent that was killed meanwhile, so that no two run at once."""
        end = time.monotonic() + self._options.timeout
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(mark.child[0]) if mark.child[0] else -1
            if pidfd >= 0 and start_time(mark.child[0]) == mark.child[1]:
                select.select([pidfd], [], [], max(0.0, end - time.monotonic()))
            if pidfd >= 0:
                os.close(pidfd)

    def begin_restore(self, mark: MigrationRecord) -> None:
        """Restarts a daemon whose old file is back in place. Raises OvsmeshError."""
        argv = command(self._options.restart)
        self._start("restore", argv, mark, lambda daemon: reached(daemon, AWAY))

    def keep(self, mark: MigrationRecord) -> MigrationRecord:
        """Saves the mark; where that can't be, what was saved last has to do, and says less."""
        try:
            return self._file.save(mark)
        except OvsmeshError as error:
            self.trouble = Problem(Reason.DockerMark, str(error))
            return mark

    def _start(
        self,
        kind: str,
        argv: list[str],
        mark: MigrationRecord,
        good: Callable[[Daemon], bool],
        adopt: tuple[int, int] = (0, 0),
    ) -> None:
        job = Restart(argv, self._watch, good, self._options.timeout)
        self._kind, self._job = kind, job
        try:
            job.begin(adopt)
        except OvsmeshError as error:
            self._failed(str(error), mark)
            return
        self.keep(replace(mark, child=job.identity))

    def go_on(self) -> bool:
        """Looks how far it has come; True when something has ended."""
        outcome = self._job.outcome() if self._job else None
        if outcome is None:
            return False
        try:
            mark = self._file.mark()
        except OvsmeshError as error:
            mark, outcome = None, outcome or str(error)
        if mark is None or self._kind == "restore":
            self._end(outcome)
        elif outcome:
            self._failed(outcome, mark)
        elif self._kind == "rollback":
            self._refused(mark, mark.why)
        else:
            self._end("")
            self.keep(replace(mark, step="", child=(0, 0), refused="", why="", times=0, seen=self.here))
        return True

    def _end(self, why: str) -> None:
        if self._job:
            self._job.close()
        self._job, self.why = None, why

    def _failed(self, why: str, mark: MigrationRecord) -> None:
        """The daemon is not as it should be: puts the file back and, unless the old daemon still runs, restarts it."""
        before = self._job.before if self._job else None
        self._end(why)
        if self._kind == "restore":
            return
        if self._kind == "rollback":
            self._refused(mark, f"{mark.why}; nor did dockerd come back then: {why}")
            return
        if self._kind == "start":
            self._refused(mark, f"dockerd did not start: {why}")
            return
        mark = self.keep(replace(mark, step="rollback", why=f"dockerd did not come back on {KBR}: {why}", child=(0, 0)))
        self._roll_back(mark, before)

    def _roll_back(self, mark: MigrationRecord, before: Daemon | None) -> None:
        try:
            self._file.roll_back(mark)
            argv = command(self._options.restart)
        except OvsmeshError as error:
            text = f"{mark.why}; and the old {self._options.config} can't be put back: {error}"
            self.trouble = Problem(Reason.DockerRollbackFailed, text)
            self._resume_at = time.monotonic() + _RESUME
            return
        mark = replace(mark, why=f"{mark.why}; the old {self._options.config} is back in place")
        now = self._watch.daemon
        if before and now and now.state == before.state == "up" and now.instance == before.instance:
            # it was never restarted
            self._refused(mark, mark.why)
            return
        self._start("rollback", argv, mark, lambda daemon: daemon.state == "up")

    def _refused(self, mark: MigrationRecord, why: str) -> None:
        self._end(why)
        stamp = ""
        with contextlib.suppress(OvsmeshError):
            stamp = self._file.read().stamp
        self.keep(
            replace(
                mark,
                step="",
                child=(0, 0),
                why=why,
                refused=self.aim,
                stamp=stamp,
                times=mark.times + 1,
                at=time.time(),
            )
        )

    def resume(self, daemon: Daemon, config: DaemonConfig, mark: MigrationRecord, good: str) -> None:
        """Goes on with what an agent before us, or a full disk, left half done. Raises OvsmeshError."""
        if time.monotonic() < self._resume_at:
            return
        if not good:
            # nobody wants Docker restarted any more
            if mark.step == "rollback":
                self._file.roll_back(mark)
            self.keep(replace(mark, step=""))
        elif mark.step == "rollback":
            self._roll_back(mark, daemon if daemon.bridge != KBR else None)
        elif config.digest != mark.new:
            # it was never written, or is another by now
            self.keep(replace(mark, step=""))
        else:
            argv = command(self._options.restart)
            if reached(daemon, good):
                self.keep(replace(mark, step="", child=(0, 0), seen=self.here))
            else:
                self._start("switch", argv, mark, lambda d: reached(d, good), mark.child)
