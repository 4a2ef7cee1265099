"""Move Docker from one bridge to another: write the file, restart the daemon, see it on the bridge, or go back.

docker.py decides what is done. A record on disk says how far it is, so another agent can go on at any moment.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ovsmesh.containers import daemon_json
from ovsmesh.containers.docker_api import DaemonWatch, start_time
from ovsmesh.containers.docker_restart import Restart, command, validated
from ovsmesh.containers.docker_state import DaemonConfig, DockerFile, MigrationRecord, digest
from ovsmesh.containers.docker_unit import DockerUnit
from ovsmesh.dataplane.docker_config import AWAY, explained, reached
from ovsmesh.dataplane.types import KBR, Daemon
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason

_DOCKERD = "dockerd "
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
    """The one migration that may be under way."""

    def __init__(self, options: DockerOptions, file: DockerFile, watch: DaemonWatch, unit: DockerUnit) -> None:
        self._options, self._file, self._watch, self._unit = options, file, watch, unit
        self._job: Restart | None = None
        self._kind = ""
        """"switch" (a file was written), "start" (none was), "rollback" or "restore"."""
        self.here = ""
        """The present kbr0."""
        self.wanted: Mapping[str, str] = {}
        """What is desired of Docker now."""
        self.why = ""
        """Why the last migration failed; "" if it did not."""
        self.trouble: Problem | None = None
        self._resume_at = 0.0
        self._before: Daemon | None = None
        """The daemon as it was before the switch."""
        self._judged = "", ""
        """Digest of the file that dockerd was asked about last, and why it would refuse that."""

    def close(self) -> None:
        """Release a restart that runs."""
        if self._job:
            self._job.close()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable when the restart command has ended."""
        return self._job.fds() if self._job else []

    @property
    def busy(self) -> bool:
        """Whether a restart runs."""
        return self._job is not None

    def text(self) -> str:
        """Return what is under way."""
        if self._job is None:
            return "Docker moves to another bridge, or did when an agent was killed: the agent goes on with it"
        return f"{'putting the old daemon.json back: ' if self._kind == 'rollback' else ''}{self._job.text()}"

    def refused(self, daemon: Daemon, record: MigrationRecord) -> bool:
        """Return whether this was tried and refused, and nothing has changed since: time alone is no change.

        A dockerd that did not start on kbr0 is tried again on another kbr0, as after a boot, which stops no container.
        """
        if not record.refused or record.refused != self._digest():
            return False
        return record.refused_by == self._by(daemon) or (
            daemon.state != "up" and record.refused_by.startswith(_DOCKERD)
        )

    def _digest(self) -> str:
        return digest(repr(sorted(self.wanted.items())).encode())

    def _by(self, daemon: Daemon | None) -> str:
        if daemon is None or daemon.state != "up":
            return f"{KBR} {self.here}"
        return _DOCKERD + digest(repr((daemon.version, daemon.flags)).encode())

    def begin(
        self, changes: Mapping[str, object], config: DaemonConfig, record: MigrationRecord | None, wanted: str
    ) -> None:
        """Write the file. With `wanted`, the daemon as it is to be seen, restart it too. Raise OvsmeshError."""
        argv = command(self._options.restart) if wanted else []
        self.trouble, self._before = None, self._watch.daemon
        if changes and wanted:
            self._validate(daemon_json.edit(config.data, changes))
        if changes or (wanted and record is None):
            record = self._file.change(config, changes, record, "switch" if wanted else "")
        if wanted and record:
            self._start("switch" if changes else "start", argv, record, lambda daemon: reached(daemon, wanted))

    def _validate(self, data: bytes) -> None:
        """Raise OvsmeshError if dockerd says that it would not start with this file."""
        daemon = self._watch.daemon
        if daemon is None or daemon.state != "up":
            return
        asked = digest(data + repr((daemon.version, daemon.flags)).encode())
        if self._judged[0] != asked:
            self._judged = asked, validated(daemon, data, self._file.directory)
        if why := self._judged[1]:
            raise OvsmeshError(f"dockerd {daemon.version} would not start with the new {self._options.config}: {why}")

    def await_child(self, record: MigrationRecord) -> None:
        """Wait for the restart command of an agent that was killed, so that no two run at once."""
        end = time.monotonic() + self._options.timeout
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(record.child[0]) if record.child[0] else -1
            if pidfd >= 0 and start_time(record.child[0]) == record.child[1]:
                select.select([pidfd], [], [], max(0.0, end - time.monotonic()))
            if pidfd >= 0:
                os.close(pidfd)

    def begin_restore(self, record: MigrationRecord) -> None:
        """Restart a daemon whose old file is back in place. Raise OvsmeshError."""
        argv = command(self._options.restart)
        self._start("restore", argv, record, lambda daemon: reached(daemon, AWAY))

    def keep(self, record: MigrationRecord) -> MigrationRecord:
        """Save the record. If that fails, the record that was saved last stays, and says less."""
        try:
            return self._file.save(record)
        except OvsmeshError as error:
            self.trouble = Problem(Reason.DockerMark, str(error))
            return record

    def _start(
        self,
        kind: str,
        argv: list[str],
        record: MigrationRecord,
        good: Callable[[Daemon], bool],
        adopt: tuple[int, int] = (0, 0),
    ) -> None:
        if not (self._watch.daemon and self._watch.daemon.state == "up"):
            self._unit.forgive()
        job = Restart(argv, self._watch, good, self._options.timeout)
        self._kind, self._job = kind, job
        try:
            job.begin(adopt)
        except OvsmeshError as error:
            self._failed(str(error), record)
            return
        self.keep(replace(record, child=job.identity))

    def go_on(self) -> bool:
        """Look how far it is. Return whether something has ended."""
        outcome = self._job.outcome() if self._job else None
        if outcome is None:
            return False
        try:
            record = self._file.record()
        except OvsmeshError as error:
            record, outcome = None, outcome or str(error)
        if record is None or self._kind == "restore":
            self._end(outcome)
        elif outcome:
            self._failed(outcome, record)
        elif self._kind == "rollback":
            self._refused(record, record.why)
        else:
            self._end("")
            self.keep(replace(record, step="", child=(0, 0), refused="", refused_by="", why="", seen=self.here))
        return True

    def _end(self, why: str) -> None:
        if self._job:
            self._job.close()
        self._job, self.why = None, why

    def _failed(self, why: str, record: MigrationRecord) -> None:
        """Put the file back, as the daemon is not as wanted, and restart it unless the old daemon still runs."""
        before = self._job.before if self._job else None
        said = self._unit.said()
        why = explained(f"{why}: {said}" if said and said not in why else why)
        self._end(why)
        if self._kind == "restore":
            return
        if self._kind == "rollback":
            self._refused(record, f"{record.why}; nor did dockerd come back then: {why}")
            return
        if self._kind == "start":
            self._refused(record, f"dockerd did not start: {why}")
            return
        record = self.keep(
            replace(record, step="rollback", why=f"dockerd did not come back on {KBR}: {why}", child=(0, 0))
        )
        self._roll_back(record, before)

    def _roll_back(self, record: MigrationRecord, before: Daemon | None) -> None:
        try:
            self._file.roll_back(record)
            argv = command(self._options.restart)
        except OvsmeshError as error:
            text = f"{record.why}; and the old {self._options.config} can't be put back: {error}"
            self.trouble = Problem(Reason.DockerRollbackFailed, text)
            self._resume_at = time.monotonic() + _RESUME
            return
        record = replace(record, why=f"{record.why}; the old {self._options.config} is back in place")
        now = self._watch.daemon
        same = before and now and now.state == before.state == "up" and now.instance == before.instance
        # the watch may not have seen yet that it has ended
        if same and before and start_time(before.instance[0]) == before.instance[1]:
            # it was never restarted
            self._refused(record, record.why)
            return
        self._start("rollback", argv, record, lambda daemon: daemon.state == "up")

    def _refused(self, record: MigrationRecord, why: str) -> None:
        self._end(why)
        stamp = ""
        with contextlib.suppress(OvsmeshError):
            stamp = self._file.read().stamp
        self.keep(
            replace(
                record,
                step="",
                child=(0, 0),
                why=why,
                refused=self._digest(),
                refused_by=self._by(self._before or self._watch.daemon),
                stamp=stamp,
            )
        )

    def resume(self, daemon: Daemon, config: DaemonConfig, record: MigrationRecord, good: str) -> None:
        """Go on with what an earlier agent, or a full disk, left half done. Raise OvsmeshError."""
        if time.monotonic() < self._resume_at:
            return
        if not good:
            # a restart is no longer wanted
            if record.step == "rollback":
                self._file.roll_back(record)
            self.keep(replace(record, step=""))
        elif record.step == "rollback":
            self._roll_back(record, daemon if daemon.bridge != KBR else None)
        elif config.digest != record.new:
            # it was never written, or someone has changed it since
            self.keep(replace(record, step=""))
        else:
            argv = command(self._options.restart)
            if reached(daemon, good):
                self.keep(replace(record, step="", child=(0, 0), seen=self.here))
            else:
                self._start("switch", argv, record, lambda d: reached(d, good), record.child)
