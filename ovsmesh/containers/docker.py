"""Docker on this host: what its file says, what its daemon uses, and bringing both to what is wanted.

Observes and applies; what is wanted comes from dockersettings. A switch is never half done: all that could refuse it
is looked at first, the old file is kept until the daemon is seen on kbr0, and put back when it is not.
Never imports ovs, pyroute2 or kubernetes.
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

from ovsmesh.containers import docker_rules
from ovsmesh.containers.docker_api import DaemonWatch
from ovsmesh.containers.docker_migration import DockerMigration, DockerOptions
from ovsmesh.containers.docker_restart import command
from ovsmesh.containers.docker_state import DaemonConfig, DockerFile, MigrationRecord, digest
from ovsmesh.dataplane import docker_config as settings
from ovsmesh.dataplane.docker_config import AWAY, DAEMON, DOCKER0, DOWN, daemon_text
from ovsmesh.dataplane.plan import Step
from ovsmesh.dataplane.types import KBR, Daemon, Dataplane, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import listed

_AGAIN = (300.0, 3600.0)
"""Seconds before a file that dockerd refused is tried again; doubled each time."""
_POKES = 30.0
_IPTABLES = 10.0
_RULE = "rule "
DOCKER_ADDRESS = "address "
"""Key of an address that dockerd gave a kbr0 that had none, when it started."""


class BridgeState(NamedTuple):
    """What the kernel has that matters here."""

    kbr: int = 0
    """Index of kbr0; 0 for none."""
    docker0: tuple[str, ...] | None = None
    """Ports of the bridge docker0; None when there is no such bridge."""
    addresses: tuple[str, ...] = ()
    """Everyone's on kbr0, with prefix length."""


class DockerObserved(NamedTuple):
    """What was read back. `known` is False while it is under way, or was not looked at yet."""

    settings: Mapping[str, str] = {}
    unmanaged: tuple[Unmanaged, ...] = ()
    problems: tuple[Problem, ...] = ()
    known: bool = True
    note: str = ""


class Docker:
    """The Docker of this host. Not for use by more than one thread; only the agent and cleanup act."""

    def __init__(self, options: DockerOptions, state: StateDir, removing: bool = False, acting: bool = False) -> None:
        self._options, self._removing, self._acting = options, removing, acting
        if removing:
            # the file that was changed, whatever the last agent was told
            with contextlib.suppress(OvsmeshError):
                mark = DockerFile(options.config, state).mark()
                options = options._replace(config=mark.config) if mark else options
            self._options = options
        self._file = DockerFile(options.config, state)
        self._watch = DaemonWatch(options.socket)
        self._bell = FileWatch(options.config)
        self._cached: tuple[DaemonConfig, MigrationRecord | None, dict[str, object]] | None = None
        self._rules: dict[str, list[str]] = {}
        self._switch = DockerMigration(options, self._file, self._watch)
        self._poke_at = time.monotonic() + _POKES

    def close(self) -> None:
        self._switch.close()
        self._watch.close()
        self._bell.close()

    def fds(self) -> list[int]:
        return [*self._watch.fds(), *self._bell.fds(), *self._switch.fds()]

    def drain(self) -> bool:
        """Takes in what rang, and goes on with a restart that is under way; True when something may have changed."""
        rang = [self._watch.drain(), self._bell.drain(), self._switch.go_on()]
        if any(rang):
            self._cached = None
            self._rules.clear()
        return any(rang)

    def dirty(self) -> None:
        self._cached = None
        self._rules.clear()
        if time.monotonic() >= self._poke_at:
            # what is read rings, and a turn that fails comes here each time
            self._poke_at = time.monotonic() + _POKES
            self._watch.poke()

    @property
    def busy(self) -> bool:
        """Whether a restart is under way; it has deadlines of its own."""
        return self._switch.busy

    @property
    def expecting(self) -> bool:
        """Whether the daemon was not looked at yet, or is about to answer."""
        daemon = self._watch.daemon
        return daemon is None or daemon.state == "starting"

    # reading

    def _read(self) -> tuple[DaemonConfig, MigrationRecord | None, dict[str, object]]:
        if self._cached is None or self._bell.why_silent:
            config = self._file.read()
            self._cached = config, self._file.mark(), self._file.settings(config)
        return self._cached

    def wanted(self) -> str:
        """ "replace", "keep" or "": what facts say of Docker here."""
        daemon = self._watch.daemon
        if self._options.mode == "replace":
            # told before the daemon was looked at, as CNI's range hangs on it
            there = (self._file.real, self._options.socket)
            return "replace" if shutil.which("dockerd") or any(map(os.path.exists, there)) else ""
        try:
            says = self._read()[2].get("bridge")
        except OvsmeshError:
            says = ""
        return "keep" if KBR in (daemon.bridge if daemon else "", says) else ""

    def observe(self, want: Dataplane, kernel: BridgeState) -> DockerObserved:
        daemon = self._watch.daemon
        if daemon is None:
            return DockerObserved(known=False)
        self._switch.here = _here(kernel.kbr)
        self._switch.aim = digest(repr(sorted(want.docker.items())).encode())
        try:
            config, mark, file = self._read()
            if mark and mark.step and self._may_resume(daemon, want.docker):
                self._cached = None
                good = want.docker.get(DAEMON, "")
                self._switch.resume(daemon, config, mark, AWAY if good and file.get("bridge") != KBR else good)
                config, mark, file = self._read()
        except OvsmeshError as error:
            if not want.docker and not self._removing:
                return DockerObserved(note=f"{_where(daemon)}; {error}")
            return DockerObserved({}, (Unmanaged("docker", "bridge", str(error)),), self._trouble(), note=str(error))
        if self._switch.busy or (mark and mark.step and not self._removing):
            text = self._switch.text()
            return DockerObserved(
                {}, (), (Problem(Reason.DockerSwitching, text), *self._trouble()), known=False, note=text
            )
        if self._removing:
            return DockerObserved(self._ours(daemon, file, mark), note=_where(daemon))
        if not want.docker:
            return DockerObserved(problems=self._elsewhere(daemon), note=_where(daemon))
        return self._compare(want, kernel, daemon, config, mark, file)

    def _may_resume(self, daemon: Daemon, wanted: Mapping[str, str]) -> bool:
        # what is wanted may have been told before the daemon was looked at first
        sure = DAEMON in wanted or self._options.mode != "replace"
        return sure and self._acting and not self._switch.busy and daemon.state != "starting"

    def _compare(
        self,
        want: Dataplane,
        kernel: BridgeState,
        daemon: Daemon,
        config: DaemonConfig,
        mark: MigrationRecord | None,
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
            have[DAEMON], told = self._daemon(daemon, wanted[DAEMON], mark, file)
            problems += told
        elif daemon.state == "up" and (daemon.bridge != KBR or str(daemon.mtu) != wanted["mtu"]):
            text = f"dockerd still runs {daemon_text(daemon)}: restart Docker when its containers may stop"
            problems.append(Problem(Reason.DockerStale, text))
        restart = have.get(DAEMON) != wanted.get(DAEMON)
        unmanaged: tuple[Unmanaged, ...] = ()
        if restart or have != wanted:
            why = self._obstacle(daemon, wanted, config, mark, restart)
            unmanaged = (Unmanaged("docker", DAEMON, why),) if why else ()
            stops = settings.stops(daemon) if restart else ""
            problems += [Problem(Reason.DockerRestart, stops)] if stops else []
        if DAEMON in wanted and daemon.state == "up":
            problems += self._left_behind(have, daemon, want.addresses, kernel, restart)
            if not restart and mark and self._acting and mark.seen != self._switch.here:
                self._cached = None
                self._switch.keep(replace(mark, seen=self._switch.here))
        return DockerObserved(have, unmanaged, tuple(problems), note=_where(daemon))

    def _daemon(
        self, daemon: Daemon, wanted: str, mark: MigrationRecord | None, file: Mapping[str, object]
    ) -> tuple[str, list[Problem]]:
        """What the daemon uses; one that somebody stopped is left alone, and counts as it should be."""
        if daemon.state == "up":
            return daemon_text(daemon), []
        if file.get("bridge") == KBR and (mark is None or mark.seen != self._switch.here):
            return DOWN, []
        text = f"dockerd does not run ({daemon.why}); it will be on {KBR} when somebody starts it"
        return wanted, [Problem(Reason.DockerStopped, text)]

    def _trouble(self) -> tuple[Problem, ...]:
        """What went wrong on the way, which no look at the system tells."""
        return (self._switch.trouble,) if self._switch.trouble else ()

    def _obstacle(
        self,
        daemon: Daemon,
        wanted: Mapping[str, str],
        config: DaemonConfig,
        mark: MigrationRecord | None,
        restart: bool,
    ) -> str:
        """Why nothing of it can be done now; "" when it can."""
        texts = list(settings.obstacles(daemon, self._options.config, self._file.real, wanted, restart))
        if restart:
            try:
                command(self._options.restart)
            except OvsmeshError as error:
                texts.append(str(error))
        if mark and mark.refused and mark.stamp == config.stamp and not texts:
            again = mark.at + min(_AGAIN[0] * 2 ** (mark.times - 1), _AGAIN[1])
            if 0 < again - time.time() <= _AGAIN[1] and mark.refused == self._switch.aim:
                when, path = time.strftime("%H:%M:%S UTC", time.gmtime(again)), self._options.config
                texts.append(f"{mark.why}. Tried again at {when}, or after `touch {path}`")
        return "; ".join(texts)

    def _left_behind(
        self, have: dict[str, str], daemon: Daemon, own: Iterable[str], kernel: BridgeState, restart: bool
    ) -> list[Problem]:
        """Adds docker0, the rules that dockerd made for it and the address it gave to kbr0, where they are to go."""
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
            text = f"{DOCKER0} stays, as {listed(kernel.docker0)} is plugged into it and not Docker's any more"
            return [Problem(Reason.DockerLeftover, text)]
        have |= {f"{_RULE}{rule}": "left behind" for rule in self._stale(DOCKER0)}
        return []

    def _ours(self, daemon: Daemon, file: Mapping[str, object], mark: MigrationRecord | None) -> dict[str, str]:
        """What cleanup is to take back."""
        have = {k: str(file[k]) for k in settings.FILE_KEYS if k in file} if mark else {}
        if mark and daemon.bridge == KBR:
            have[DAEMON] = daemon_text(daemon)
        return have

    def _elsewhere(self, daemon: Daemon) -> tuple[Problem, ...]:
        if daemon.state != "up" or not daemon.bridge:
            return ()
        text = (
            f"Docker's containers are on {daemon.bridge}, which no peer reaches: `ovsmesh agent --docker replace` "
            f"moves them to {KBR} and restarts Docker; `--docker off` leaves Docker alone without a word"
        )
        return (Problem(Reason.DockerElsewhere, text),)

    # changing

    def apply(self, steps: Iterable[Step], want: Dataplane) -> None:
        """Begins what these steps ask for; a restart goes on in drain(). Raises OvsmeshError."""
        if self._switch.busy or self._removing:
            return
        steps = list(steps)
        config, mark, _ = self._read()
        self._cached = None
        changes = _changes({s.key: s.want for s in steps if s.key in settings.FILE_KEYS}, want.docker)
        restart = any(step.key == DAEMON for step in steps)
        daemon, aim = self._watch.daemon, want.docker[DAEMON] if restart else ""
        if restart and daemon and settings.remembers(daemon, aim):
            # the next turn then goes on from there
            changes, aim = self._file.back(config, mark), AWAY
            changes |= {"bridge": None} if changes.get("bridge") == KBR else {}
        self._switch.begin(changes, config, mark, aim)
        if restart:
            return
        rules = [step.key.removeprefix(_RULE) for step in steps if step.key.startswith(_RULE)]
        self._remove_rules(rules)

    # back to what was before

    def stays(self) -> str:
        """Why cleanup can't take Docker off kbr0 now; "" when it can, or need not."""
        daemon, mark = self._watch.daemon, self._read()[1]
        if daemon is None or daemon.bridge != KBR or mark is None:
            return ""
        if daemon.live_restore and daemon.running:
            return (
                f"dockerd has live-restore, and stays on {KBR} while containers run: stop {listed(daemon.running)}, "
                f"then run this again (nothing was changed)"
            )
        command(self._options.restart)
        return ""

    def restore(self) -> list[str]:
        """Puts the old file back and begins the restart, where one is needed; what there is to say of it."""
        daemon, mark = self._watch.daemon, self._read()[1]
        on_kbr = daemon is not None and daemon.bridge == KBR
        if mark is None:
            text = (
                f"Docker is on {KBR} by its own {self._options.config}, which ovsmesh has not written and leaves alone"
            )
            return [text] if on_kbr else []
        self._cached = None
        if mark.step:
            self._switch.await_child(mark)
        self._file.restore(mark)
        if self._read()[2].get("bridge") == KBR:
            return [f"{self._options.config} had {KBR} before ovsmesh: Docker can't start again before there is one"]
        if on_kbr or mark.step:
            self._switch.begin_restore(mark)
        elif daemon is None or daemon.state != "up":
            return ["dockerd does not run: it will be where it was before when somebody starts it"]
        return []

    def restored(self) -> str:
        """After restore(), once nothing is under way: tidies up; why it is not as before, or ""."""
        mark = self._file.mark()
        if mark is None:
            return ""
        if self._switch.why:
            return f"the old {self._options.config} is in place, but {self._switch.why}"
        self._remove_rules(self._stale(KBR))
        self._file.forget(mark)
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
    """File settings to write; None for those to take out, which come first: what is left shows the file's layout."""
    ours = sorted((k for k in keys if k in settings.FILE_KEYS), key=lambda k: k in wanted)
    return {k: settings.value(k, wanted[k]) if k in wanted else None for k in ours}


def _here(kbr: int) -> str:
    """This kbr0: a dockerd that failed for the lack of one is started once for each."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino} {kbr}"


def _where(daemon: Daemon) -> str:
    version = f" ({daemon.version})" if daemon.version else ""
    return f"{daemon_text(daemon)}{version}" if daemon.state == "up" else ""


def _iptables(argv: list[str], script: str = "", strict: bool = False) -> str:
    """What it printed; "" where there is none. Raises OvsmeshError for a change that was refused."""
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
