"""Observe and change the filter rules in the kernel, through nft and iptables.

It decides when to read and what to write, and finds out what this kernel can't do.

A rule is identified by its comment, "NAME DIGEST". Texts can't be compared: nft prints a rule in
another form than it was written in, and each version in its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ovsmesh.dataplane.firewall_rules import CHAINS, IPTABLES, NFT, SETS, WITHOUT, digest, supported
from ovsmesh.dataplane.nft_syntax import (
    Ranges,
    Table,
    Unreadable,
    accepted_ranges,
    by_chain,
    element_changes,
    filters_forward,
    filters_only_ipv4,
    iptables_script,
    parse_iptables,
    parse_nft,
    refusal,
    refused,
    rules_of,
    sets_used,
    table_script,
    wanted_order,
)
from ovsmesh.dataplane.types import MARK, Rule, RuleKey
from ovsmesh.errors import Problem
from ovsmesh.linux.nft_monitor import ALL_TOOLS, NftMonitor, generation, holders
from ovsmesh.reasons import Reason

_TIMEOUT = 10.0
"""Seconds; a full table of a thousand peers takes 0.03."""
_LOCK_WAIT = "5"
"""Seconds that iptables waits for the lock that all its users share."""


class Filters(NamedTuple):
    """What was read back. A rule that differs from what was written, or is unmanaged, has a text that says so."""

    rules: dict[RuleKey, Rule]
    peers: Mapping[str, str]
    problems: tuple[Problem, ...]


class _Failed(Exception):
    """A tool failed; the text is its own."""


def _run(argv: list[str], script: str | None = None) -> str:
    """Return the standard output of a command. Raise FileNotFoundError or _Failed."""
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


def _not_installed(tool: str) -> str:
    return "" if shutil.which(tool) else f"{tool} is not installed"


def _legacy_filter(tool: str) -> bool:
    """Return whether the kernel has the table "filter" of iptables-legacy."""
    names = Path("/proc/net", tool.replace("tables", "_tables_names"))
    return names.exists() and "filter" in names.read_text().split()


def _first_line(error: Exception) -> str:
    return re.sub(r"/dev/stdin:[0-9:-]+ ", "", str(error).splitlines()[0][:200])


class Firewall:
    """The filter rules of this network namespace. Not thread-safe.

    A table that was read is kept until a notification says that it changed.
    """

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {tool: Table() for tool in (*NFT, *IPTABLES)}
        self._dirty: set[str] = set(ALL_TOOLS)
        self._doubted = False
        """Whether a notification may have been lost."""
        self._generation: int | None = None
        """nf_tables' generation before all tables were read last; None where the kernel does not tell it."""
        self._missing: dict[str, str] = {}
        """What this system can't do → why. Cleared at each resync."""
        self._refused: dict[str, tuple[int, str]] = {}
        """Tool → hash of the write that failed, and why. It is not tried again before a resync."""
        self._supported: set[str] = set()
        """Families whose tables were read as wanted or could be written, so that there is nothing to try out."""
        self._unreadable: set[str] = set()
        """Families that could not be parsed at the last reading: written again once, then reported."""
        self._legacy: dict[str, bool] = {}
        self.forward_nft = False
        """Whether an nft table of others filters what is forwarded, as read last; see Facts."""
        self._brothers: dict[str, Table] = {}
        """iptables-legacy and ip6tables-legacy, where the kernel has their rules beside those of the tools in use."""
        self._walked: dict[str, tuple[Table, Ranges, Problem | None]] = {}
        """Tool → what was last looked for refusals, and what was found."""
        self._peers: dict[str, str] = {}
        self.changed_by = ""
        """The process that changed a table last, as far as the kernel tells."""
        self._monitor: NftMonitor | None = None
        try:
            self._monitor = NftMonitor(MARK)
        except OSError as e:
            self._missing["nft"] = f"no nf_tables notifications: {e.strerror}"

    def close(self) -> None:
        """Stop watching for changes."""
        if self._monitor:
            self._monitor.close()

    def fds(self) -> tuple[int, ...]:
        """Return the file descriptors that are readable after a change of a filter table; then call drain()."""
        return (self._monitor.fileno(),) if self._monitor else ()

    def drain(self) -> bool:
        """Return whether a managed table, or FORWARD, may have changed since it was last read."""
        self._take_changes()
        return bool(self._dirty)

    @property
    def others(self) -> int:
        """How many times tables of others have changed, as far as the kernel tells."""
        return self._monitor.others if self._monitor else 0

    def resync(self) -> None:
        """Make the next observation read all that may have changed, and try again what failed."""
        self._doubted = True
        if self._refused or self._unreadable or self._missing.keys() - {"ibrname"}:
            self._dirty |= ALL_TOOLS
        self._refused.clear()
        self._missing.clear()
        self._supported.clear()
        self._unreadable.clear()

    def _take_changes(self, own: str = "") -> None:
        """Mark what other programs changed. `own`: the tool that one transaction was just written with."""
        if not self._monitor:
            # there are no notifications: read what was just written, and the rest at the next resync
            self._dirty |= {own} & ALL_TOOLS
            return
        transactions = self._monitor.transactions()
        if transactions is None:
            self._dirty |= ALL_TOOLS
            return
        # our own transaction is among those of its tool, so if there is one it is our own
        of_tool = [tools for tools in transactions if own in tools] if own else []
        for tools, writer in zip(transactions, self._monitor.writers, strict=True):
            if len(of_tool) != 1 or tools is not of_tool[0]:
                self._dirty |= tools
                self.changed_by = writer

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
        # asking iptables-legacy would load its modules
        if self._legacy[tool] and not _legacy_filter(tool):
            return Table(present=True)
        self._brothers.pop(tool, None)
        brother = f"{tool}-legacy"
        if not self._legacy[tool] and _legacy_filter(tool) and not _not_installed(brother):
            self._brothers[tool] = parse_iptables(_run([brother, "-w", _LOCK_WAIT, "-S"]))
        try:
            return parse_iptables(_run([tool, "-w", _LOCK_WAIT, "-S"]))
        except _Failed:
            # it refuses to show a table with a chain that only nft can show
            return parse_iptables(_run([tool, "-w", _LOCK_WAIT, "-S", "FORWARD"]))

    def _others_forward(self) -> bool:
        try:
            return filters_forward(_run(["nft", "-j", "list", "chains"]))
        except (FileNotFoundError, _Failed, Unreadable):
            return False

    def _doubt(self) -> None:
        """Mark what has to be read again where a notification may have been lost.

        The generation counts all changes of nf_tables in this namespace: while it is that of the last reading of all
        tables, each is as it was read. iptables-legacy is no part of it.
        """
        if self._doubted and (self._generation is None or self._generation != generation()):
            self._dirty |= ALL_TOOLS
        elif self._doubted:
            self._dirty |= {tool for tool in IPTABLES if _legacy_filter(tool)}
        self._doubted = False
        if self._dirty >= ALL_TOOLS:
            self._generation = generation()

    def _refresh(self) -> None:
        self._take_changes()
        self._doubt()
        if IPTABLES[0] in self._dirty:
            self.forward_nft = self._others_forward()
        for tool in [*NFT, *IPTABLES]:
            if tool not in self._dirty:
                continue
            if tool in NFT and "nft" in self._missing:
                self._dirty.discard(tool)
                continue
            try:
                self._tables[tool] = self._nft_table(tool) if tool in NFT else self._iptables(tool)
            except FileNotFoundError:
                self._tables[tool] = Table()
                if tool in NFT:
                    self._missing["nft"] = "nft is not installed; install the package nftables"
            except _Failed as e:
                self._tables[tool] = Table()
                self._missing["nft" if tool in NFT else tool] = _first_line(e)
            self._dirty.discard(tool)
            if tool in NFT:
                self._peers = {}

    def forward_drop(self) -> tuple[str, ...]:
        """Return those of iptables and ip6tables whose FORWARD chain may drop, see Facts."""
        self._refresh()
        return tuple(tool for tool in IPTABLES if self._tables[tool].drops)

    def forward_limited(self) -> set[int]:
        """Return the IP versions for which rules are in place that limit what is forwarded."""
        names = [row.name for table in self._tables.values() for row in table.rows]
        return {version for version in (4, 6) if any(name.startswith(f"only-mesh-v{version}") for name in names)}

    def open_ipv6(self, links: Iterable[str]) -> bool:
        """Return whether others accept IPv4 of one of these links, and have no rules for its IPv6."""
        return any(filters_only_ipv4(self._tables["iptables"], self._tables["ip6tables"], link) for link in links)

    def observe(self, want: Mapping[RuleKey, Rule]) -> Filters:
        """Return what is in the kernel.

        A rule's text can't be read back: it is taken from `want` where the digest agrees. Any other rule
        has a text that differs, or a name that is not wanted.
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
                    text = "unmanaged, in a managed table"
                elif tool in NFT and table.chains.get(row.chain) != CHAINS.get((tool, row.chain)):
                    text = f"digest {row.digest}, in a chain with another hook"
                elif row.ahead_of:
                    text = f"in front of: {row.ahead_of}"
                elif rule and digest(key, rule) == row.digest:
                    text = rule.text
                else:
                    text = f"digest {row.digest}"
                found[key] = Rule(text)
        ordered = dict(sorted(found.items(), key=lambda item: order.get(item[0][:2], len(order))))
        return Filters(ordered, self._peers or self._observed_peers(), self._problems(want))

    def told(self, name: str) -> frozenset[str]:
        """Return the elements of a set, as last read."""
        return frozenset().union(*(table.sets.get(name, ()) for table in self._tables.values()))

    def _observed_peers(self) -> dict[str, str]:
        holders = [self._tables[family].sets for family in NFT if self._tables[family].sets]
        for name in SETS:
            held = [sets[name] for sets in holders if name in sets]
            if held:
                common = set.intersection(*held)
                self._peers |= dict.fromkeys(common, name)
                self._peers |= dict.fromkeys(set.union(*held) - common, f"{name} (not in each table)")
        return self._peers

    def _refusals(self, want: Mapping[RuleKey, Rule]) -> Iterator[Problem]:
        """Yield which rules of others refuse the mesh's packets before the managed rules are asked."""
        for tool in IPTABLES:
            ranges = accepted_ranges(rules_of(tool, want))
            if ranges:
                yield from self._refused_by(tool, self._tables[tool], ranges)
            if tool in self._brothers:
                yield from self._refused_by(f"{tool}-legacy", self._brothers[tool], ranges or ((None, None),), True)

    def _refused_by(self, tool: str, table: Table, ranges: Ranges, policy: bool = False) -> Iterator[Problem]:
        known = self._walked.get(tool)
        if known is None or known[0] is not table or known[1] != ranges:
            found = next(filter(None, (refusal(table, own, cluster, policy) for own, cluster in ranges)), None)
            problem = Problem(Reason.ForwardRefused, refused(tool, found), field=tool) if found else None
            self._walked[tool] = known = (table, ranges, problem)
        if known[2]:
            yield known[2]

    def _problems(self, want: Mapping[RuleKey, Rule]) -> tuple[Problem, ...]:
        lacking = [Problem(Reason.FilterUnavailable, f"{WITHOUT[what]} ({why})") for what, why in self._missing.items()]
        again = "tried again at the next resync"
        refused = [
            Problem(Reason.FilterFailed, f"could not be written: {why}; {again}", field=f"{tool} rules")
            for tool, (_, why) in self._refused.items()
        ]
        return (*lacking, *refused, *self._refusals(want))

    def unseen(self) -> list[str]:
        """Return why there may be managed rules that can't be read: a text for each tool that does not work.

        Where nft or iptables does not work, the kernel itself says whether something of it is there.
        """
        self._refresh()
        tools = {tool: "nft" if tool in NFT else tool for tool in (*NFT, *IPTABLES)}
        why = {tool: self._missing.get(name) or _not_installed(name) for tool, name in tools.items()}
        if not any(why.values()):
            return []
        try:
            there = holders(MARK) | {tool for tool in IPTABLES if _legacy_filter(tool)}
        except OSError as error:
            return [f"the kernel's nf_tables can't be read: {error.strerror}"]
        return [
            f"there {'is a table' if tool in NFT else 'are rules'} of {tool} that can't be read: {text}"
            for tool, text in why.items()
            if text and tool in there
        ]

    # What this system can do

    def missing(self, rules: Callable[[], Mapping[RuleKey, Rule]], probe: bool = True) -> tuple[str, ...]:
        """Return what this system is known not to have, in the words of firewall_rules.supported.

        `rules` returns all rules that the node should have; it is called unless they are known to be
        supported. With `probe`, those that are not in the kernel are tried out (`nft -c`, 0.02 s a table);
        without, a refused apply() finds out.
        """
        self._refresh()
        unknown = [family for family in NFT if family not in self._supported and "nft" not in self._missing]
        wanted = rules() if unknown else {}
        for family in unknown:
            of_family = rules_of(family, wanted)
            if not of_family:
                continue
            if self._in_place(family, of_family):
                self._supported.add(family)
            elif probe:
                self._try_out(family, of_family)
                self._supported.add(family)
        return tuple(sorted(self._missing))

    def _in_place(self, family: str, wanted: Mapping[RuleKey, Rule]) -> bool:
        """Return whether the kernel has these rules, or those that it can have without nft_meta_bridge."""
        found = by_chain(row[:3] for row in self._tables[family].rows)
        if found == wanted_order(wanted):
            return True
        if family == "bridge" and found == wanted_order(supported(wanted, ["ibrname"])):
            self._missing["ibrname"] = "the kernel has no module nft_meta_bridge"
            return True
        return False

    def _check(self, family: str, wanted: Mapping[RuleKey, Rule]) -> str:
        """Return why the kernel refuses these rules, "" if it accepts them."""
        try:
            _run(["nft", "-c", "-f", "-"], table_script(family, wanted, {}))
        except FileNotFoundError:
            return "nft is not installed; install the package nftables"
        except _Failed as e:
            return _first_line(e)
        return ""

    def _try_out(self, family: str, wanted: Mapping[RuleKey, Rule]) -> None:
        """Find out what of these rules the kernel refuses."""
        if not self._check(family, wanted):
            return
        if family == "bridge":
            reduced = supported(wanted, ["ibrname"])
            why = self._check(family, reduced)
            what = "bridge" if why else "ibrname"
            self._missing[what] = why or "the kernel has no module nft_meta_bridge"
            return
        for chain in dict.fromkeys(key[1] for key in wanted):
            why = self._check(family, {key: rule for key, rule in wanted.items() if key[1] == chain})
            if why:
                self._missing[f"{family} {chain}"] = why

    # Writing

    def apply(self, rules: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> None:
        """Make the managed tables hold these rules and set elements, and nothing else.

        `peers` includes those whose removal is held. Only what differs is written: whole tables if
        a rule differs, else single set elements. A failed write is not raised: the next observe()
        reports it, and it is not repeated before the next resync().
        """
        self._refresh()
        for family in NFT:
            if "nft" not in self._missing:
                self._apply_nft(family, rules_of(family, rules), peers)
        for tool in IPTABLES:
            if tool not in self._missing:
                self._apply_iptables(tool, rules_of(tool, rules))

    def _shaped(self, family: str, wanted: Mapping[RuleKey, Rule]) -> bool:
        """Return whether everything but set elements is as wanted."""
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
        """After a refused write, find out what the kernel does not have, and write the rest."""
        if family in self._supported:
            return
        self._try_out(family, wanted)
        self._supported.add(family)
        left = supported(wanted, self._missing)
        if left != wanted:
            del self._refused[family]
        if left and left != wanted:
            self._write(family, ["nft", "-f", "-"], table_script(family, left, peers))

    def _apply_iptables(self, tool: str, wanted: Mapping[RuleKey, Rule]) -> None:
        table = self._tables[tool]
        same = [row[:3] for row in table.rows] == [(k[1], k[2], digest(k, r)) for k, r in wanted.items()]
        if same and not any(row.ahead_of for row in table.rows):
            return
        command = [f"{tool}-restore", "-w", _LOCK_WAIT, "--noflush"]
        self._write(tool, command, iptables_script(table, wanted))

    def _write(self, tool: str, argv: list[str], script: str, own: bool = False) -> bool:
        """Run one transaction. With `own`, ignore its notification unless another writer came in between."""
        if self._refused.get(tool, (0, ""))[0] == hash(script):
            return False
        if own:
            self._take_changes()
        try:
            _run(argv, script)
        except (FileNotFoundError, _Failed) as e:
            self._refused[tool] = hash(script), _first_line(e)
            self._dirty.add(tool)
            return False
        self._refused.pop(tool, None)
        if own:
            self._take_changes(tool)
            self._peers = {}
        else:
            # read back what the kernel made of it
            self._dirty.add(tool)
        return True
