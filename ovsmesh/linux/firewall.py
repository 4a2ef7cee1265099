"""The filter rules as the kernel holds them: reading them back and writing them, through nft and iptables.

Knows: when to read and what to write, and what to do without on a kernel that lacks something.
Never imports ovs, pyroute2 or kubernetes.

A rule is told by its comment, "NAME DIGEST": nft prints rules in another form than they were
written, and in another one in each version, so texts can't be compared.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ovsmesh.dataplane.firewall_rules import CHAINS, IPTABLES, NFT, SETS, digest, within
from ovsmesh.dataplane.nft_syntax import (
    Table,
    Unreadable,
    by_chain,
    element_changes,
    iptables_script,
    parse_iptables,
    parse_nft,
    rules_of,
    sets_used,
    table_script,
    wanted_order,
)
from ovsmesh.dataplane.types import MARK, Dataplane, Rule, RuleKey
from ovsmesh.errors import Problem
from ovsmesh.linux.nft_monitor import EVERYTHING, Bell
from ovsmesh.reasons import Reason

_TIMEOUT = 10.0
"""Seconds; a full table of a thousand peers takes 0.03."""
_LOCK_WAIT = "5"
"""Seconds that iptables waits for the lock that all its users share."""
_LOST = {
    "nft": "no masquerading, no source check and no filter for tunnel packets",
    "bridge": "a pod may use another pod's source address on this node",
    "ibrname": "source addresses are checked on the veth ports of all bridges, and forged tunnel addresses"
    " are not refused between pods of this node",
    "inet postrouting": "pods reach nothing outside the mesh, unless something else masquerades them",
    "inet input": "tunnel packets from addresses that are no peers are left to Open vSwitch to refuse",
    "inet forward": "a pod may send packets that look like this node's tunnel packets",
    "iptables": "rules in FORWARD may drop the mesh's packets",
    "ip6tables": "rules in FORWARD may drop the mesh's IPv6 packets",
}


class Filters(NamedTuple):
    """What was read back. A rule that is not as written, or not ours, comes with a text that says so."""

    rules: dict[RuleKey, Rule]
    peers: Mapping[str, str]
    problems: tuple[Problem, ...]


class _Failed(Exception):
    """A tool said no; the text is its own."""


def _run(argv: list[str], script: str | None = None) -> str:
    """Standard output of a command. Raises FileNotFoundError, _Failed."""
    try:
        done = subprocess.run(
            argv,
            input=None if script is None else script.encode(),
            stdin=subprocess.DEVNULL if script is None else None,
            capture_output=True,
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"{argv[0]} did not answer in {_TIMEOUT:.0f} s") from None
    except PermissionError as e:
        raise _Failed(f"{argv[0]}: {e.strerror}") from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise _Failed(f"{argv[0]}: {text}")
    return done.stdout.decode(errors="replace")


def _first_line(error: Exception) -> str:
    line = str(error).splitlines()[0][:200]
    return re.sub(r"/dev/stdin:[0-9:-]+ ", "", line)


class Firewall:
    """The filter rules of this network namespace.

    What was read is kept until the bell rings; so an unchanged table costs nothing to observe.
    Not for use by more than one thread.
    """

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {tool: Table() for tool in (*NFT, *IPTABLES)}
        self._dirty: set[str] = set(EVERYTHING)
        self._lacking: dict[str, str] = {}
        """What this system can't do → why; forgotten at each resync."""
        self._refused: dict[str, tuple[int, str]] = {}
        """Tool → the write that failed (its hash) and why; the same one is not tried again before a resync."""
        self._sound: set[str] = set()
        """Families whose tables were seen as wanted, or could be written: nothing to try out."""
        self._unreadable: set[str] = set()
        """Families whose listing made no sense at the last reading: written anew once, then given up."""
        self._legacy: dict[str, bool] = {}
        self._peers: dict[str, str] = {}
        self._bell: Bell | None = None
        try:
            self._bell = Bell(MARK)
        except OSError as e:
            self._lacking["nft"] = f"no nf_tables notifications: {e.strerror}"

    def close(self) -> None:
        if self._bell:
            self._bell.close()

    def fds(self) -> tuple[int, ...]:
        """File descriptors that become readable when someone changes a filter table; then call drain()."""
        return (self._bell.fileno(),) if self._bell else ()

    def drain(self) -> bool:
        """Whether something of ours, or FORWARD, may have changed since it was last read."""
        self._listen()
        return bool(self._dirty)

    def resync(self) -> None:
        """Read all again at the next observation, and try again what failed."""
        self._dirty |= EVERYTHING
        self._refused.clear()
        self._lacking.clear()
        self._sound.clear()
        self._unreadable.clear()

    def _listen(self, own: str = "") -> None:
        """Take what the bell heard; `own` is the tool that we have just written one transaction with."""
        if not self._bell:
            # nothing will tell: read again what we wrote, and the rest at the next resync
            self._dirty |= {own} & EVERYTHING
            return
        heard = self._bell.heard()
        if heard is None:
            self._dirty |= EVERYTHING
            return
        # our transaction is among them, so a single one is ours
        ours = [tools for tools in heard if own in tools] if own else []
        for tools in heard:
            if len(ours) != 1 or tools is not ours[0]:
                self._dirty |= tools

    # Reading

    def _nft_table(self, family: str) -> Table:
        try:
            table = parse_nft(_run(["nft", "-j", "list", "table", family, MARK]))
            self._unreadable.discard(family)
            return table
        except Unreadable as e:
            if family in self._unreadable:
                raise _Failed(str(e)) from None
            self._unreadable.add(family)
            return Table(present=True)
        except _Failed as e:
            if "No such file or directory" in str(e):
                return Table()
            raise

    def _iptables(self, tool: str) -> Table:
        if tool not in self._legacy:
            self._legacy[tool] = "nf_tables" not in _run([tool, "--version"])
        if self._legacy[tool]:
            # asking iptables-legacy would load its modules
            names = Path("/proc/net", tool.replace("tables", "_tables_names"))
            if not names.exists() or "filter" not in names.read_text().split():
                return Table(present=True)
        return parse_iptables(_run([tool, "-w", _LOCK_WAIT, "-S", "FORWARD"]))

    def _refresh(self) -> None:
        self._listen()
        for tool in [*NFT, *IPTABLES]:
            if tool not in self._dirty:
                continue
            if tool in NFT and "nft" in self._lacking:
                self._dirty.discard(tool)
                continue
            try:
                self._tables[tool] = self._nft_table(tool) if tool in NFT else self._iptables(tool)
            except FileNotFoundError:
                self._tables[tool] = Table()
                if tool in NFT:
                    self._lacking["nft"] = "nft is not installed; install the package nftables"
            except _Failed as e:
                self._tables[tool] = Table()
                self._lacking["nft" if tool in NFT else tool] = _first_line(e)
            self._dirty.discard(tool)
            if tool in NFT:
                self._peers = {}

    def forward_drop(self) -> tuple[str, ...]:
        """Which of iptables and ip6tables has a FORWARD chain that may drop: see model.Facts."""
        self._refresh()
        return tuple(tool for tool in IPTABLES if self._tables[tool].drops)

    def observe(self, want: Mapping[RuleKey, Rule]) -> Filters:
        """What stands in the kernel. A rule's text can't be read back, so it is taken from `want` where the
        digest agrees; anything else comes back with a text that differs, or under a name that nobody wants.
        """
        self._refresh()
        order = {place: n for n, place in enumerate(dict.fromkeys(key[:2] for key in want))}
        found: dict[RuleKey, Rule] = {}
        for tool, table in self._tables.items():
            for row in table.rows:
                key = (tool, row.chain, row.name)
                while key in found:
                    key = (tool, row.chain, key[2] + "-again")
                rule = want.get(key)
                if not row.digest:
                    text = "not ours, in our table"
                elif tool in NFT and table.chains.get(row.chain) != CHAINS.get((tool, row.chain)):
                    text = f"digest {row.digest}, in a chain that is not hooked as ours"
                elif rule and digest(key, rule) == row.digest:
                    text = rule.text
                else:
                    text = f"digest {row.digest}"
                found[key] = Rule(text)
        ordered = dict(sorted(found.items(), key=lambda item: order.get(item[0][:2], len(order))))
        return Filters(ordered, self._peers or self._observed_peers(), self._problems())

    def _observed_peers(self) -> dict[str, str]:
        holders = [self._tables[family].sets for family in NFT if self._tables[family].sets]
        for name in SETS:
            held = [sets[name] for sets in holders if name in sets]
            if held:
                common = set.intersection(*held)
                self._peers |= dict.fromkeys(common, name)
                self._peers |= dict.fromkeys(set.union(*held) - common, f"{name} (not in each table)")
        return self._peers

    def _problems(self) -> tuple[Problem, ...]:
        lacking = [
            Problem(Reason.FilterUnavailable, f"{why}; without it {_LOST[what]}", field=what)
            for what, why in self._lacking.items()
        ]
        refused = [
            Problem(
                Reason.FilterFailed,
                f"could not be written: {why}; tried again at the next resync",
                field=f"{tool} rules",
            )
            for tool, (_, why) in self._refused.items()
        ]
        return (*lacking, *refused)

    # What this system can do

    def possible(self, want: Dataplane, try_out: bool = True) -> Dataplane:
        """`want` without the filter rules that this system can't have, each of them named in the problems.

        Call it before observing. What is neither in place nor known is tried out (`nft -c`, 0.02 s
        a table); without `try_out` that is left to apply(), so call it again after that.
        """
        self._refresh()
        for family in NFT:
            wanted = rules_of(family, want.rules)
            if not wanted or family in self._sound or "nft" in self._lacking:
                continue
            if self._in_place(family, wanted):
                self._sound.add(family)
            elif try_out:
                self._try_out(family, wanted)
                self._sound.add(family)
        if not self._lacking:
            return want
        rules = within(want.rules, self._lacking)
        return replace(
            want, rules=rules, filter_peers=want.filter_peers if sets_used(r.text for r in rules.values()) else {}
        )

    def _in_place(self, family: str, wanted: Mapping[RuleKey, Rule]) -> bool:
        found = by_chain(row[:3] for row in self._tables[family].rows)
        if found == wanted_order(wanted):
            return True
        if family == "bridge" and found == wanted_order(within(wanted, ["ibrname"])):
            self._lacking["ibrname"] = "the kernel has no nft_meta_bridge"
            return True
        return False

    def _check(self, family: str, wanted: Mapping[RuleKey, Rule]) -> str:
        """Why the kernel would refuse these rules; "" when it would take them."""
        try:
            _run(["nft", "-c", "-f", "-"], table_script(family, wanted, {}))
        except FileNotFoundError:
            return "nft is not installed; install the package nftables"
        except _Failed as e:
            return _first_line(e)
        return ""

    def _try_out(self, family: str, wanted: Mapping[RuleKey, Rule]) -> None:
        if not self._check(family, wanted):
            return
        if family == "bridge":
            reduced = within(wanted, ["ibrname"])
            why = self._check(family, reduced)
            what = "bridge" if why else "ibrname"
            self._lacking[what] = why or "the kernel has no nft_meta_bridge"
            return
        for chain in dict.fromkeys(key[1] for key in wanted):
            why = self._check(family, {key: rule for key, rule in wanted.items() if key[1] == chain})
            if why:
                self._lacking[f"{family} {chain}"] = why

    # Writing

    def apply(self, rules: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> None:
        """Make the kernel hold these rules and these set elements, and nothing else of ours.

        `peers` are all that are to be there afterwards, those included whose removal is held.
        Writes only what differs: whole tables where a rule does, else single set elements.
        A write that fails is not raised but named by the next observe(), and not repeated
        before the next resync().
        """
        self._refresh()
        for family in NFT:
            if "nft" not in self._lacking:
                self._apply_nft(family, rules_of(family, rules), peers)
        for tool in IPTABLES:
            if tool not in self._lacking:
                self._apply_iptables(tool, rules_of(tool, rules))

    def _shaped(self, family: str, wanted: Mapping[RuleKey, Rule]) -> bool:
        """Whether only set elements may differ."""
        table = self._tables[family]
        chains = {key[1]: CHAINS[family, key[1]] for key in wanted}
        sets = set(sets_used(rule.text for rule in wanted.values()))
        rows = by_chain(row[:3] for row in table.rows)
        return (
            table.present == bool(wanted)
            and rows == wanted_order(wanted)
            and table.chains == chains
            and table.sets.keys() == sets
        )

    def _apply_nft(self, family: str, wanted: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> None:
        table = self._tables[family]
        if not self._shaped(family, wanted):
            if not self._write(family, ["nft", "-f", "-"], table_script(family, wanted, peers)):
                self._write_less(family, wanted, peers)
            return
        after = {name: {a for a, where in peers.items() if where == name} for name in table.sets}
        script = element_changes(family, table.sets, after)
        if script and self._write(family, ["nft", "-f", "-"], script, own=True):
            table.sets = after

    def _write_less(self, family: str, wanted: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> None:
        """After a refused write: find out what the kernel lacks, and write the rest."""
        if family in self._sound:
            return
        self._try_out(family, wanted)
        self._sound.add(family)
        left = within(wanted, self._lacking)
        if left != wanted:
            del self._refused[family]
        if left and left != wanted:
            self._write(family, ["nft", "-f", "-"], table_script(family, left, peers))

    def _apply_iptables(self, tool: str, wanted: Mapping[RuleKey, Rule]) -> None:
        table = self._tables[tool]
        if [row[:3] for row in table.rows] == [(k[1], k[2], digest(k, r)) for k, r in wanted.items()]:
            return
        command = [f"{tool}-restore", "-w", _LOCK_WAIT, "--noflush"]
        self._write(tool, command, iptables_script(table, wanted))

    def _write(self, tool: str, argv: list[str], script: str, own: bool = False) -> bool:
        """Run one transaction; with `own` its echo rings no bell, when nobody else wrote meanwhile."""
        if self._refused.get(tool, (0, ""))[0] == hash(script):
            return False
        if own:
            self._listen()
        try:
            _run(argv, script)
        except (FileNotFoundError, _Failed) as e:
            self._refused[tool] = hash(script), _first_line(e)
            self._dirty.add(tool)
            return False
        self._refused.pop(tool, None)
        if own:
            self._listen(tool)
            self._peers = {}
        else:
            # read back what the kernel made of it
            self._dirty.add(tool)
        return True
