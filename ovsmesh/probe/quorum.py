"""Which nodes are cut off from most others, from what the agents of all nodes report of their peers.

A report names ten peers at most, so a list that is cut short counts for all that it stands for: an agent chooses by
lot which ten (`rank`). A node that cannot reach most others itself has no vote, nor has one that was not heard for
long. So where the mesh falls into two, the smaller part is cut off; where no part has a majority, or most hosts are
dead, nobody has a vote and nothing changes. Pure: times are arguments, in seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ovsmesh.dataplane.types import State

CUT_OFF = frozenset({State.UNREACHABLE, State.NOT_FORWARDED})
"""States of a peer to whose pods no packet gets through."""
LISTED = 10
"""Peers that a report names at most."""
STALE = 420.0
"""Seconds for which a report counts: an agent at rest writes every 300."""
_MARK, _CLEAR = 2.0, 4.0
"""Seconds that the votes must say so before a node is marked, and before it is cleared."""


class Vote(NamedTuple):
    """What one node's agent reports of its peers."""

    wanted: int
    probed: int
    """Peers that were probed; the others are not known yet."""
    unreachable: int
    listed: frozenset[str]
    """Names of unreachable peers, LISTED at most."""
    at: float | None = None
    """When the agent says that it looked, in seconds since the epoch."""

    @property
    def lonely(self) -> bool:
        """Whether the node cannot reach most of those that it probes. Of one pair neither end is to blame."""
        return self.unreachable > 1 and 2 * self.unreachable > self.probed


class Decision(NamedTuple):
    """What follows from all votes."""

    isolated: frozenset[str]
    """Nodes to mark, those that are marked already and stay so among them."""
    doubtful: frozenset[str]
    """Nodes whose mark is about to change: too early to tell."""
    split: bool
    """Whether most nodes cannot reach most others, so that none of them is to blame."""
    again: float
    """Seconds after which to decide again, if no vote changes until then."""


def rank(node: str, peer: str) -> bytes:
    """Return what orders the peers of a node by lot: another order at each node, and always the same."""
    return hashlib.blake2b(f"{node}\n{peer}".encode(), digest_size=8).digest()


class Quorum:
    """Remembers when votes came in and since when they differ from the marks; call `decide` when either changes."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Vote, float]] = {}
        """Node → its vote, and when that came in."""
        self._claims: dict[str, float] = {}
        """Node that says that it cannot reach most others → since when."""
        self._since: dict[str, float] = {}
        """Node whose votes differ from its mark → since when."""

    def decide(
        self, votes: Mapping[str, Vote], members: Collection[str], marked: frozenset[str], now: float, epoch: float
    ) -> Decision:
        """Return who is to be marked. `members` should have a vote, `marked` are marked now.

        `now` is monotonic; `epoch` is the same moment in seconds since the epoch.
        """
        self._take(votes, now, epoch)
        members = frozenset(members)
        fresh = {name: vote for name, (vote, at) in self._heard.items() if name in members and now - at <= STALE}
        lonely = {name for name, vote in fresh.items() if vote.lonely}
        self._claims = {name: self._claims.get(name, now) for name in lonely}
        voters = {name for name, vote in fresh.items() if name not in lonely and 2 * vote.probed > vote.wanted}
        said = self._said(fresh, voters, members, marked)
        changes = {name for name, isolated in said.items() if isolated is not (name in marked)}
        self._since = {name: self._since.get(name, now) for name in changes}
        due = {n for n, since in self._since.items() if now - since >= (_MARK if said[n] else _CLEAR)}
        isolated = (marked & frozenset(members) - due) | (due - marked)
        split = len(lonely) > 2 and 2 * len(lonely) > len(fresh)
        if 2 * len(isolated) > len(members) and not isolated <= marked:
            # as the node lifecycle controller does in full disruption: no cluster is left without nodes
            isolated, split = marked & frozenset(members) - due, True
        waits = [since + (_MARK if said[n] else _CLEAR) - now for n, since in self._since.items() if n not in due]
        return Decision(frozenset(isolated), frozenset(changes - due), split, min(waits, default=STALE))

    def _take(self, votes: Mapping[str, Vote], now: float, epoch: float) -> None:
        heard = {}
        for name, vote in votes.items():
            old = self._heard.get(name)
            if old is None:
                # read for the first time: it may be old, and its node's clock may be wrong
                heard[name] = vote, now - max(0.0, epoch - vote.at) if vote.at is not None else now
            else:
                heard[name] = old if old[0] == vote else (vote, now)
        self._heard = heard

    def _said(
        self, fresh: Mapping[str, Vote], voters: set[str], members: Collection[str], marked: frozenset[str]
    ) -> dict[str, bool]:
        """Return for each member whether it is cut off; those are left out of whom nothing can be said."""
        against: dict[str, float] = {}
        listers: dict[str, set[str]] = {}
        for name in voters:
            vote = fresh[name]
            # of a list that is cut short each name counts for several; a lie counts for little
            weight = max(1.0, min(vote.unreachable, len(members)) / LISTED)
            for peer in vote.listed:
                against[peer] = against.get(peer, 0.0) + weight
                listers.setdefault(peer, set()).add(name)
        others = len(members) - 1
        found = {}
        for name in members if against or marked or self._claims else ():
            able = len(voters) - (name in voters)
            if 2 * able < others or able < 2:
                continue
            # names are drawn by lot: where the node says so too, fewer are enough
            enough = able / 4 if name in self._claims else able / 2
            most = against.get(name, 0.0) > enough and len(listers.get(name, ())) > 1
            found[name] = most or self._believed(name, voters, listers.get(name, set()), others)
        return found

    def _believed(self, name: str, voters: set[str], listers: set[str], others: int) -> bool:
        """Return whether a node's own word that it cannot reach most others counts, though these do not say so.

        They may be dead: most must have been heard since it began to say so, and it must have said so again since.
        """
        if name not in self._claims:
            return False
        since, last = self._claims[name], self._heard[name][1]
        alive = sum(other in listers or since < self._heard[other][1] < last for other in voters if other != name)
        return 2 * alive > others
