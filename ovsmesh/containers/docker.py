"""Docker on this host: observe what its file says and what its daemon uses, and bring both to what is desired.

dataplane.docker_config says what is desired. A migration is never half done: all that could refuse it is checked first,
the old file is kept until the daemon is seen on kbr0, and is put back if it is not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ovsmesh.containers import docker_kind, docker_rules
from ovsmesh.containers.docker_api import DaemonWatch
from ovsmesh.containers.docker_migration import DockerMigration, DockerOptions
from ovsmesh.containers.docker_restart import command
from ovsmesh.containers.docker_state import DaemonConfig, DockerFile, MigrationRecord
from ovsmesh.containers.docker_unit import DockerUnit
from ovsmesh.dataplane import docker_config as settings
from ovsmesh.dataplane.docker_config import AWAY, DAEMON, DOCKER0, DOWN, daemon_text
from ovsmesh.dataplane.plan import Step
from ovsmesh.dataplane.types import KBR, Daemon, Dataplane, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import listed

_POKES = 30.0
_IPTABLES = 10.0
_RULE = "rule "
DOCKER_ADDRESS = "address "
"""Key of an address that dockerd gave to a kbr0 without one, when it started."""


class BridgeState(NamedTuple):
    """What the kernel says of the bridges that matter to Docker."""

    kbr: int = 0
    """Index of kbr0; 0 for none."""
    docker0: tuple[str, ...] | None = None
    """Ports of the bridge docker0; None if there is no such bridge."""
    addresses: tuple[str, ...] = ()
    """All addresses of kbr0, with prefix length."""


class DockerObserved(NamedTuple):
    """What was read back. `known` is False during a migration, and before the first look at the daemon."""

    settings: Mapping[str, str] = {}
    unmanaged: tuple[Unmanaged, ...] = ()
    problems: tuple[Problem, ...] = ()
    known: bool = True
    note: str = ""


class Docker:
    """The Docker of this host. Not thread-safe. Only the agent and cleanup change it."""

    def __init__(self, options: DockerOptions, state: StateDir, removing: bool = False, acting: bool = False) -> None:
        self._options, self._removing, self._acting = options, removing, acting
        if removing:
            # the file that was changed, whatever the options of the last agent
            with contextlib.suppress(OvsmeshError):
                record = DockerFile(options.config, state).record()
                options = options._replace(config=record.config) if record else options
            self._options = options
        self._file = DockerFile(options.config, state)
        self._unit = DockerUnit(options.restart)
        self._watch = DaemonWatch(options.socket, self._unit.off)
        self._remote = docker_kind.remote(os.environ, options.socket)
        self._file_watch = FileWatch(options.config)
        self._cached: tuple[DaemonConfig, MigrationRecord | None, dict[str, object]] | None = None
        self._rules: dict[str, list[str]] = {}
        self._migration = DockerMigration(options, self._file, self._watch, self._unit)
        self._poke_at = time.monotonic() + _POKES

    def close(self) -> None:
        """Stop watching; a restart that runs goes on."""
        self._migration.close()
        self._watch.close()
        self._file_watch.close()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable after an event."""
        return [*self._watch.fds(), *self._file_watch.fds(), *self._migration.fds()]

    def drain(self) -> bool:
        """Read all events, and go on with a restart that is under way. Return whether something may have changed."""
        woken = [self._watch.drain(), self._file_watch.drain(), self._migration.go_on()]
        if any(woken):
            self._cached = None
            self._rules.clear()
        return any(woken)

    def dirty(self) -> None:
        """Have the next observation read the file and the rules again, and poke the daemon from time to time."""
        self._cached = None
        self._rules.clear()
        if time.monotonic() >= self._poke_at:
            # each read is an event, and each failed reconcile comes here
            self._poke_at = time.monotonic() + _POKES
            self._watch.poke()

    @property
    def busy(self) -> bool:
        """Whether a restart is under way. It has its own deadlines."""
        return self._migration.busy

    @property
    def expecting(self) -> bool:
        """Whether the first look at the daemon, or its answer, is still to come."""
        daemon = self._watch.daemon
        return daemon is None or daemon.state == "starting"

    # reading

    def _read(self) -> tuple[DaemonConfig, MigrationRecord | None, dict[str, object]]:
        if self._cached is None or self._file_watch.why_silent:
            config = self._file.read()
            self._cached = config, self._file.record(), self._file.settings(config)
        return self._cached

    def wanted(self) -> str:
        """Return what Facts.docker says: "replace", "keep" or ""."""
        daemon = self._watch.daemon
        if self._options.mode == "replace":
            # known before the first look at the daemon, as the range of CNI depends on it
            there = shutil.which("dockerd") or any(map(os.path.exists, (self._file.real, self._options.socket)))
            return "replace" if there or self._remote or (daemon and daemon.unsuitable) else ""
        try:
            says = self._read()[2].get("bridge")
        except OvsmeshError:
            says = ""
        return "keep" if KBR in (daemon.bridge if daemon else "", says) else ""

    def observe(self, want: Dataplane, kernel: BridgeState) -> DockerObserved:
        """Read back Docker's settings. `kernel` says which bridges there are."""
        daemon = self._watch.daemon
        if daemon is None:
            return DockerObserved(known=False)
        self._migration.here = _here(kernel.kbr)
        self._migration.wanted = want.docker
        try:
            config, record, file = self._read()
            if record and record.step and self._may_resume(daemon, want.docker):
                self._cached = None
                good = want.docker.get(DAEMON, "")
                self._migration.resume(daemon, config, record, AWAY if good and file.get("bridge") != KBR else good)
                config, record, file = self._read()
        except OvsmeshError as error:
            if not want.docker and not self._removing:
                return DockerObserved(note=f"{_where(daemon)}; {error}")
            return DockerObserved({}, (Unmanaged("docker", "bridge", str(error)),), self._trouble(), note=str(error))
        if self._migration.busy or (record and record.step and not self._removing):
            text = self._migration.text()
            return DockerObserved(
                {}, (), (Problem(Reason.DockerSwitching, text), *self._trouble()), known=False, note=text
            )
        if self._removing:
            return DockerObserved(self._changed(daemon, file, record), note=_where(daemon))
        if not want.docker:
            return DockerObserved(problems=self._elsewhere(daemon), note=_where(daemon))
        if DAEMON in want.docker and (why := self._unsuitable(daemon, record, file)):
            text = f"--docker replace changes nothing here: {why}"
            return DockerObserved({}, (Unmanaged("docker", "bridge", text),), self._trouble(), note=text)
        return self._compare(want, kernel, daemon, config, record, file)

    def _may_resume(self, daemon: Daemon, wanted: Mapping[str, str]) -> bool:
        # what is desired may have been computed before the first look at the daemon
        sure = DAEMON in wanted or self._options.mode != "replace"
        return sure and self._acting and not self._migration.busy and daemon.state != "starting"

    def _unsuitable(self, daemon: Daemon, record: MigrationRecord | None, file: Mapping[str, object]) -> str:
        """Return why this Docker can't be moved, whatever its file says; "" if it can, or was already."""
        if record is not None or daemon.state == "starting":
            return ""
        if self._remote or daemon.unsuitable:
            return self._remote or daemon.unsuitable
        if daemon.state == "up" or (file.get("bridge") == KBR and not daemon.off):
            return ""
        why = daemon.off or daemon.why
        return f"dockerd does not run ({why}); start it, and the move goes on by itself, or give `--docker off`"

    def _compare(
        self,
        want: Dataplane,
        kernel: BridgeState,
        daemon: Daemon,
        config: DaemonConfig,
        record: MigrationRecord | None,
        file: Mapping[str, object],
    ) -> DockerObserved:
        wanted = want.docker
        have = settings.observed(file, settings.flags(daemon.flags), wanted, list(want.addresses))
        problems = list(self._trouble())
        if DAEMON in wanted:
            if daemon.state == "starting":
                return DockerObserved(
                    {}, (), (Problem(Reason.DockerStarting, daemon.why),), known=False, note=daemon.why
                )
            have[DAEMON], found = self._daemon(daemon, wanted[DAEMON], record, file)
            problems += found
            gone = settings.given_up(have, wanted)
            problems += [Problem(Reason.DockerGivesUp, gone)] if gone else []
            if pools := settings.pool_overlaps(file, [k[0] for k, r in want.routes.items() if r.type != "unicast"]):
                text = f"default-address-pools of {self._options.config} overlap the mesh's ranges: {listed(pools)}"
                problems.append(Problem(Reason.DockerPools, f"{text}; give Docker's own networks other ones"))
        elif daemon.state == "up" and (daemon.bridge != KBR or str(daemon.mtu) != wanted["mtu"]):
            text = f"dockerd still runs {daemon_text(daemon)}: restart Docker when its containers may stop"
            problems.append(Problem(Reason.DockerStale, text))
        restart = have.get(DAEMON) != wanted.get(DAEMON)
        if daemon.bridge == KBR and (shut := settings.isolation(daemon, file)):
            problems.append(Problem(Reason.DockerIsolates, shut))
        unmanaged: tuple[Unmanaged, ...] = ()
        if restart or have != wanted:
            why = self._obstacle(daemon, wanted, config, record, restart, file)
            if restart and file.get("bridge") != KBR and (shut := settings.isolation(daemon, file)):
                why = "; ".join(filter(None, (why, shut)))
            unmanaged = (Unmanaged("docker", DAEMON, why),) if why else ()
            stops = settings.stops(daemon) if restart else ""
            problems += [Problem(Reason.DockerRestart, stops)] if stops else []
        if record and self._acting and DAEMON in wanted:
            problems += self._keep_order(file, want)
        # containers of a daemon that is left on another range still use its address
        if daemon.state == "up" and DAEMON in wanted and (restart or settings.reached(daemon, wanted[DAEMON])):
            problems += self._left_behind(have, daemon, want.addresses, kernel, restart)
            if not restart and record and self._acting and record.seen != self._migration.here:
                self._cached = None
                self._migration.keep(replace(record, seen=self._migration.here))
        return DockerObserved(have, unmanaged, tuple(problems), note=_where(daemon))

    def _keep_order(self, file: Mapping[str, object], want: Dataplane) -> list[Problem]:
        """Have systemd start dockerd on kbr0 only when there is one. Return what is in the way of that."""
        try:
            if file.get("bridge") == KBR:
                why = self._unit.need_bridge(want.addresses)
            else:
                why = ""
                self._unit.need_nothing()
        except OvsmeshError as error:
            why = str(error)
        return [Problem(Reason.DockerOrder, why)] if why else []

    def _daemon(
        self, daemon: Daemon, wanted: str, record: MigrationRecord | None, file: Mapping[str, object]
    ) -> tuple[str, list[Problem]]:
        """Return what the daemon uses. One that someone stopped is left alone, and counts as desired."""
        if daemon.state == "up":
            fresh = record is None or record.seen != self._migration.here
            still = settings.unsettled(daemon, wanted, fresh) if record else ""
            still = still or settings.stale(daemon, wanted)
            if still:
                return wanted, [Problem(Reason.DockerStale, still)]
            return daemon_text(daemon), []
        ready = file.get("bridge") == KBR
        if ready and not daemon.off and (record is None or record.seen != self._migration.here):
            return DOWN, []
        then = f"it will be on {KBR} when somebody starts it" if ready else "it moves when somebody starts it"
        text = f"dockerd does not run ({daemon.off or daemon.why}); {then}"
        return wanted, [Problem(Reason.DockerStopped, text)]

    def _trouble(self) -> tuple[Problem, ...]:
        """Return what went wrong in the migration, which no look at the system shows."""
        return (self._migration.trouble,) if self._migration.trouble else ()

    def _obstacle(
        self,
        daemon: Daemon,
        wanted: Mapping[str, str],
        config: DaemonConfig,
        record: MigrationRecord | None,
        restart: bool,
        file: Mapping[str, object],
    ) -> str:
        """Return why nothing of it can be done now, "" if it can."""
        texts = list(settings.obstacles(daemon, self._options.config, self._file.real, wanted, restart, file))
        if restart:
            try:
                command(self._options.restart)
            except OvsmeshError as error:
                texts.append(str(error))
        if record and record.stamp == config.stamp and not texts and self._migration.refused(daemon, record):
            path = self._options.config
            texts.append(
                f"{record.why}. Not tried again before the mesh, {path} or Docker (its version, its command line) "
                f"changes: `touch {path}` is such a change"
            )
        return "; ".join(texts)

    def _left_behind(
        self, have: dict[str, str], daemon: Daemon, own: Iterable[str], kernel: BridgeState, restart: bool
    ) -> list[Problem]:
        """Add docker0, its rules and the address that dockerd gave to kbr0, if they are to be removed."""
        if kernel.kbr:
            have |= {
                f"{DOCKER_ADDRESS}{text}": "Docker's own"
                for text in settings.docker_addresses(daemon, own, kernel.addresses)
            }
        if kernel.docker0 is not None and (restart or not kernel.docker0):
            have[DOCKER0] = "bridge"
        if restart:
            return []
        if kernel.docker0:
            text = f"{DOCKER0} stays, as {listed(kernel.docker0)} is plugged into it and is not Docker's any more"
            return [Problem(Reason.DockerLeftover, text)]
        have |= {f"{_RULE}{rule}": "left behind" for rule in self._stale(DOCKER0)}
        return []

    def _changed(self, daemon: Daemon, file: Mapping[str, object], record: MigrationRecord | None) -> dict[str, str]:
        """Return what cleanup is to restore."""
        have = {k: str(file[k]) for k in settings.FILE_KEYS if k in file} if record else {}
        if record and daemon.bridge == KBR:
            have[DAEMON] = daemon_text(daemon)
        return have

    def _elsewhere(self, daemon: Daemon) -> tuple[Problem, ...]:
        if daemon.unsuitable:
            text = f"no peer reaches Docker's containers, and `--docker replace` can't move them: {daemon.unsuitable}"
            return (Problem(Reason.DockerElsewhere, text),)
        if daemon.state != "up" or not daemon.bridge:
            return ()
        text = (
            f"Docker's containers are on {daemon.bridge}, which no peer reaches: `ovsmesh agent --docker replace` "
            f"moves them to {KBR} and restarts Docker; `--docker off` leaves Docker alone and says nothing"
        )
        return (Problem(Reason.DockerElsewhere, text),)

    # applying

    def apply(self, steps: Iterable[Step], want: Dataplane) -> None:
        """Begin what these steps ask for. A restart goes on in drain(). Raise OvsmeshError."""
        if self._migration.busy or self._removing:
            return
        steps = list(steps)
        config, record, _ = self._read()
        self._cached = None
        changes = _changes({s.key: s.want for s in steps if s.key in settings.FILE_KEYS}, want.docker)
        restart = any(step.key == DAEMON for step in steps)
        daemon, aim = self._watch.daemon, want.docker[DAEMON] if restart else ""
        if restart and daemon and settings.remembers(daemon, aim):
            # the next reconcile goes on from there
            changes, aim = self._file.back(config, record), AWAY
            changes |= {"bridge": None} if changes.get("bridge") == KBR else {}
        elif restart:
            # before the file, so that not even a power cut in between leaves a dockerd that starts without kbr0
            self._unit.need_bridge(want.addresses)
        self._migration.begin(changes, config, record, aim)
        if restart:
            return
        rules = [step.key.removeprefix(_RULE) for step in steps if step.key.startswith(_RULE)]
        self._remove_rules(rules)

    def refusal(self) -> str:
        """Return why `--docker replace` changes nothing here, "" where it can; once the daemon is known."""
        daemon, (_, record, file) = self._watch.daemon, self._read()
        if not daemon or self.wanted() != "replace":
            return ""
        shut = settings.isolation(daemon, file) if file.get("bridge") != KBR else ""
        return self._unsuitable(daemon, record, file) or shut

    # restoring

    def stays(self) -> str:
        """Return why cleanup can't move Docker off kbr0 now, "" if it can or need not."""
        daemon, record = self._watch.daemon, self._read()[1]
        if daemon is None or daemon.bridge != KBR or record is None:
            return ""
        if daemon.live_restore and daemon.running:
            return (
                f"dockerd has live-restore, and stays on {KBR} while containers run: stop {listed(daemon.running)}, "
                f"then run this again (nothing was changed)"
            )
        command(self._options.restart)
        return ""

    def returns(self) -> bool:
        """Return whether cleanup restarts a dockerd that has this host forward when it starts."""
        daemon, (_, record, file) = self._watch.daemon, self._read()
        given = " ".join(daemon.flags) if daemon else ""
        off = file.get("ip-forward") is False or "--ip-forward=false" in given
        return record is not None and daemon is not None and daemon.bridge == KBR and not off

    def restore(self) -> list[str]:
        """Put the old file back and begin the restart, if one is needed. Return messages for the user."""
        daemon, record = self._watch.daemon, self._read()[1]
        on_kbr = daemon is not None and daemon.bridge == KBR
        if record is None:
            text = f"Docker is on {KBR} by its own {self._options.config}, which ovsmesh did not write and leaves alone"
            return [text] if on_kbr else []
        self._cached = None
        if record.step:
            self._migration.await_child(record)
        self._file.restore(record)
        if self._read()[2].get("bridge") == KBR:
            return [f"{self._options.config} had {KBR} before ovsmesh: Docker can't start again before there is one"]
        if on_kbr or record.step:
            self._migration.begin_restore(record)
        elif daemon is None or daemon.state != "up":
            return ["dockerd does not run: it will be where it was before when somebody starts it"]
        return []

    def restored(self) -> str:
        """Clean up after restore(), once nothing is under way. Return why Docker is not as before, or ""."""
        record = self._file.record()
        if record is None:
            return ""
        if self._migration.why:
            return f"the old {self._options.config} is in place, but {self._migration.why}"
        self._remove_rules(self._stale(KBR))
        self._unit.need_nothing()
        self._file.forget(record)
        self._cached = None
        return ""

    # the rules that dockerd leaves behind

    def _stale(self, bridge: str) -> list[str]:
        if bridge not in self._rules:
            listings = {
                table: _iptables(["iptables", "-w", "5", "-t", table, "-S"]) for table in docker_rules.TABLES[:2]
            }
            self._rules[bridge] = docker_rules.left(listings, bridge)
        return self._rules[bridge]

    def _remove_rules(self, rules: list[str]) -> None:
        self._rules.clear()
        if rules:
            _iptables(["iptables-restore", "-w", "5", "--noflush"], docker_rules.removal(rules), strict=True)


def _changes(keys: Mapping[str, object], wanted: Mapping[str, str]) -> dict[str, object]:
    """Return the settings to write; None for those to remove, which come first: the rest shows the file's layout."""
    managed = sorted((k for k in keys if k in settings.FILE_KEYS), key=lambda k: k in wanted)
    return {k: settings.value(k, wanted[k]) if k in wanted else None for k in managed}


def _here(kbr: int) -> str:
    """Return the identity of this kbr0. A dockerd that failed without kbr0 is started once for each."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino} {kbr}"


def _where(daemon: Daemon) -> str:
    version = f" ({daemon.version})" if daemon.version else ""
    return f"{daemon_text(daemon)}{version}" if daemon.state == "up" else ""


def _iptables(argv: list[str], script: str = "", strict: bool = False) -> str:
    """Return the output of an iptables command; "" if it fails. With `strict` raise OvsmeshError if it fails."""
    try:
        done = subprocess.run(
            argv,
            input=script.encode(),
            capture_output=True,
            timeout=_IPTABLES,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if strict:
            raise OvsmeshError(f"{argv[0]}: {error}") from error
        return ""
    if done.returncode and strict:
        raise OvsmeshError(f"{argv[0]}: {done.stderr.decode(errors='replace').strip()[:300]}")
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
