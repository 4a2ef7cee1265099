"""Observe the flow table of obr0 through `ovs-ofctl dump-flows`, and change it by one `ovs-ofctl --bundle` call.

`ovs-ofctl monitor` is the event source. Its lines have no priority, so no flow is taken from them: a line that says
what is known already is skipped, any other makes the next observation read the whole table. On doubt the switch is
asked, through the monitor, how many flows it has: that shows too that the monitor still hears of changes. The table is
kept with port numbers, as the switch has them. Names are filled in when it is observed, so that a port that comes back
under another number shows as drift.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import socket
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ovsmesh.dataplane.types import COOKIE, OBR, Unmanaged
from ovsmesh.errors import OvsmeshError
from ovsmesh.ovs.json_rpc import request
from ovsmesh.text import counted

TIMEOUT = 10.0
"""Seconds for one ovs-ofctl call; 0.1 s is usual for 3,000 flows."""
COUNT_DEADLINE = 1.0
"""Seconds for the number of flows; a few milliseconds are usual."""
_EVENT = re.compile(
    r"^ event=(ADDED|DELETED|MODIFIED) (?:reason=\S+ )?table=(\d+) cookie=(0x[0-9a-f]+|0) ?(\S*?)(?: actions=(.*))?$"
)


_COUNT = re.compile(r"^OFPST_AGGREGATE reply .*\(xid=0x([0-9a-f]+)\):.* flow_count=(\d+)")
# OpenFlow 1.0: version, OFPT_STATS_REQUEST, length, xid, OFPST_AGGREGATE, no flags; any match of any table, to any port
_COUNT_REQUEST = "01100038{:08x}00020000003fffff" + "00" * 36 + "ff00ffff"


_COOKIE = re.compile(r"0x[0-9a-f]{1,16}|0")


def _argv(*words: str) -> list[str]:
    return ["ovs-ofctl", "--no-names", *words]


def _sorted(match: str) -> str:
    return ",".join(sorted(match.split(","))) if match else ""


def _parse(line: str) -> tuple[int, bool, str, str] | None:
    """Parse a line of dump-flows: cookie, whether it is a plain flow of table 0, key and actions; None for others."""
    head, found, actions = line.strip().partition("actions=")
    if not found or not line.startswith(" "):
        return None
    cookie, plain, priority, match = 0, True, "32768", ""
    for field in head.strip().rstrip(",").split(", "):
        name, _, value = field.partition("=")
        if name == "cookie":
            # garbled or not, what is not the cookie of ovsmesh is not managed
            cookie = int(value, 16) if _COOKIE.fullmatch(value) else -1
        elif name == "table":
            plain &= value == "0"
        elif name == "priority":
            priority, _, match = value.partition(",")
        elif name.endswith(("_timeout", "_age", "flags")):
            plain = False
        else:
            match = field
    return cookie, plain, f"{priority} {_sorted(match)}", actions


def port_of(key: str, actions: str) -> str:
    """Return the port that a managed flow names besides LOCAL; obr0 for the default flow, which names none."""
    if actions.startswith("output:"):
        return actions[7:]
    found = _IN_PORT.search(key)
    return found[1] if found else OBR


class _Named(NamedTuple):
    """A managed flow with its port's name, and what that was made from. It names at most one port."""

    raw_actions: str
    port: int
    name: str
    key: str
    actions: str


class FlowTable:
    """obr0's flow table, through its management socket in `run_dir`. Not thread-safe."""

    def __init__(self, run_dir: Path) -> None:
        self._socket = run_dir / f"{OBR}.mgmt"
        self._bridge = f"unix:{self._socket}"
        self._raw: dict[str, str] | None = None
        """Managed flows, "PRIORITY MATCH" → actions, with port numbers; None: read the table again."""
        self._others = 0
        """Flows that are not managed, in all tables."""
        self._doubted = False
        self._counted: tuple[int, int] = (0, 0)
        """The last request for the number of flows, and the answer."""
        self._unmanaged: tuple[Unmanaged, ...] = ()
        self._named: dict[str, _Named] = {}
        self._result: tuple[dict[str, str] | None, dict[int, str], dict[str, str]] = (None, {}, {})
        self._monitor: subprocess.Popen[bytes] | None = None
        self._tty = -1
        self._line = b""

    def close(self) -> None:
        """Stop the monitor."""
        self._raw = None
        if self._monitor is not None:
            # the terminal first: a monitor that is blocked in a write handles no signal
            os.close(self._tty)
            # SIGKILL would leave its control socket in the run directory
            self._monitor.terminate()
            try:
                self._monitor.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self._monitor.kill()
                self._monitor.wait()
            self._monitor, self._tty, self._line = None, -1, b""

    def watch(self) -> bool:
        """Start the monitor where it is not running, and return whether the switch answers on obr0."""
        if self._monitor is not None and self._monitor.poll() is None:
            return True
        self.close()
        if not self.answers():
            return False
        if not shutil.which("ovs-ofctl"):
            raise OvsmeshError("can't run ovs-ofctl: it is not in PATH; install Open vSwitch's tools")
        # a terminal, because ovs-ofctl fills a block before it writes to a pipe
        self._tty, slave = pty.openpty()
        os.set_blocking(self._tty, False)
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        # the monitor must not outlive an agent that is killed
        keeper = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        argv = [*keeper, *_argv("monitor", self._bridge, "watch:!initial")]
        # the monitor makes a control socket there, and the default directory need not exist
        env = os.environ | {"OVS_RUNDIR": str(self._socket.parent)}
        try:
            self._monitor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=env)
        except OSError as error:
            os.close(self._tty)
            raise OvsmeshError(f"can't run ovs-ofctl: {error.strerror}; install Open vSwitch's tools") from error
        finally:
            os.close(slave)
        if not select.select([self._tty], [], [], TIMEOUT)[0] or not self._read():
            self.close()
            return False
        return True

    def answers(self) -> bool:
        """Return whether the switch listens for OpenFlow on obr0; cheap enough for ten calls a second."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.5)
            try:
                probe.connect(str(self._socket))
            except OSError:
                return False
        return True

    def fds(self) -> list[int]:
        """Return the file descriptors that become readable when the table changes; then call drain()."""
        return [self._tty] if self._monitor is not None else []

    @property
    def known(self) -> bool:
        """Return whether the table was read and has not changed since."""
        return self._raw is not None and self._monitor is not None

    def dirty(self) -> None:
        """Make the next observation read the whole table, unless the switch shows that nothing has changed."""
        self._doubted = True

    def drain(self) -> bool:
        """Read the monitor's lines, and return whether the table may differ from what was observed last."""
        if self._monitor is None:
            return False
        known = self._raw is not None
        alive = self._read()
        if not alive:
            self.close()
            return True
        return known and self._raw is None

    def _read(self) -> bool:
        """Read the monitor's lines, and return False when it ended, as it does with the switch or the bridge."""
        assert self._monitor is not None
        while True:
            try:
                data = os.read(self._tty, 65536)
            except BlockingIOError:
                return self._monitor.poll() is None
            except OSError:
                return False
            if not data:
                return False
            *lines, self._line = (self._line + data).split(b"\n")
            for line in lines:
                self._event(line.decode(errors="replace").rstrip("\r"))

    def _event(self, line: str) -> None:
        if found := _COUNT.match(line):
            self._counted = int(found[1], 16), int(found[2])
        if self._raw is None or not line.startswith(" event"):
            return
        found = _EVENT.match(line)
        if found is None:
            self._raw = None
            return
        event, table, cookie, match, actions = found.groups()
        key = _sorted(match)
        held = self._raw.get(f"100 {key}", self._raw.get(f"50 {key}"))
        # without a match the missing priority could be any
        managed = table == "0" and int(cookie, 16) == COOKIE and key != ""
        expected = held is None if event == "DELETED" else held == (actions or "drop")
        if not (managed and expected):
            self._raw = None

    def observe(self, ofports: Mapping[str, int]) -> tuple[dict[str, str], tuple[Unmanaged, ...]] | None:
        """Return the managed flows, with port names for the numbers in `ofports`, and the unmanaged ones.

        None when the switch does not answer. Raises OvsmeshError without ovs-ofctl.
        """
        if not self.watch():
            return None
        if self._doubted and self._raw is not None and not self._count_agrees():
            self._raw = None
        self._doubted = False
        if self._raw is None and (not self._read() or not self._dump()):
            return None
        names = {number: name for name, number in ofports.items() if name != OBR}
        assert self._raw is not None
        if self._result[0] is not self._raw or self._result[1] != names:
            self._result = (self._raw, names, self._with_names(self._raw, names))
        return self._result[2], self._unmanaged

    def _with_names(self, raw: Mapping[str, str], names: Mapping[int, str]) -> dict[str, str]:
        """Return the flows with names for numbers. A flow whose port has the same name as before is taken over."""
        known, self._named = self._named, {}
        for key, actions in raw.items():
            old = known.get(key)
            if old is None or old.raw_actions != actions or names.get(old.port, "") != old.name:
                found = _PORT.search(key) or _PORT.search(actions)
                port = int(found[1]) if found else 0
                name = names.get(port, "")
                old = _Named(actions, port, name, _put(name, key), _put(name, actions))
            self._named[key] = old
        return {named.key: named.actions for named in self._named.values()}

    def _count_agrees(self) -> bool:
        """Return whether the switch tells, by way of the monitor, as many flows as are known.

        A table that was read is then as it was: the switch tells a monitor each change, in order, before this answer.
        """
        if self._monitor is None or self._raw is None:
            return False
        number = self._counted[0] + 1
        path = self._socket.parent / f"ovs-ofctl.{self._monitor.pid}.ctl"
        end = time.monotonic() + COUNT_DEADLINE
        if request(str(path), "ofctl/send", [_COUNT_REQUEST.format(number)]) is None:
            return False
        while self._counted[0] != number:
            rest = end - time.monotonic()
            if rest <= 0 or not select.select([self._tty], [], [], rest)[0] or not self._read():
                return False
        known: Mapping[str, str] | None = self._raw
        return known is not None and self._counted[1] == len(known) + self._others

    def _dump(self) -> bool:
        try:
            argv = _argv("--no-stats", "dump-flows", self._bridge)
            done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
        raw: dict[str, str] = {}
        unmanaged = []
        others = 0
        for line in done.stdout.splitlines():
            found = _parse(line)
            if found is None:
                continue
            cookie, plain, key, actions = found
            if cookie == COOKIE and plain:
                raw[key] = actions
                continue
            others += 1
            if not (cookie == 0 and key == "0 " and actions == "NORMAL"):
                # standalone mode adds the NORMAL flow by itself, and the managed default flow replaces it
                text = f"flow {line.strip()} in {OBR} is not managed by ovsmesh (cookie {COOKIE:#x}); it stays"
                unmanaged.append(Unmanaged("flows", key, text, blocks=False))
        self._raw, self._unmanaged, self._others = raw, tuple(unmanaged), others
        return True

    def apply(self, add: Mapping[str, str], delete: list[str], ofports: Mapping[str, int]) -> None:
        """Add (or replace) and delete flows in one bundle: all of them or none.

        Keys and actions are as in Dataplane.flows, with port names out of `ofports`; a flow to delete may have
        numbers. Raises OvsmeshError where the switch refuses or does not answer.
        """
        adds = {_numbers(k, ofports): _numbers(v, ofports) for k, v in add.items()}
        deletes = [_numbers(k, ofports) for k in delete]
        lines = [f"add cookie={COOKIE:#x},{_spec(k)},actions={v}" for k, v in adds.items()]
        lines += [f"delete_strict {_spec(k)}" for k in deletes if k not in adds]
        argv = _argv("--bundle", "add-flows", self._bridge, "-")
        try:
            done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=TIMEOUT)
        except OSError as error:
            raise OvsmeshError(f"can't run ovs-ofctl: {error.strerror}; install Open vSwitch's tools") from error
        except subprocess.TimeoutExpired as error:
            raise OvsmeshError(f"ovs-ofctl on {OBR} did not end in {TIMEOUT} s; is ovs-vswitchd overloaded?") from error
        if done.returncode:
            self._raw = None
            detail = " / ".join(done.stderr.strip().splitlines()[:3])
            raise OvsmeshError(f"the switch refused {counted(len(lines), 'flow change')} on {OBR}: {detail}")
        if self._raw is not None:
            self._raw = {k: v for k, v in self._raw.items() if k not in set(deletes)} | adds
            # an unmanaged flow of the same key was replaced
            self._unmanaged = tuple(f for f in self._unmanaged if f.key not in adds)


def _spec(key: str) -> str:
    priority, _, match = key.partition(" ")
    return f"priority={priority},{match}" if match else f"priority={priority}"


_PORT = re.compile(r"\b(?:in_port=|output:)(\d+)")
_IN_PORT = re.compile(r"\bin_port=([^,]+)")


def _numbers(text: str, ofports: Mapping[str, int]) -> str:
    """Return a key or actions with numbers for port names. Raises OvsmeshError for a port without a number."""

    def number(name: str) -> str:
        if name == "LOCAL" or name.isdigit():
            return name
        if name not in ofports:
            raise OvsmeshError(f"port {name} has no OpenFlow number; ovs-vswitchd could not make it, see its log")
        return str(ofports[name])

    if text.startswith("output:"):
        return f"output:{number(text[7:])}"
    return _IN_PORT.sub(lambda found: f"in_port={number(found[1])}", text)


def _put(name: str, text: str) -> str:
    """Return `text` with its port number, if it has one, replaced by `name`."""
    return _PORT.sub(lambda found: found[0][: found.start(1) - found.start()] + name, text) if name else text
