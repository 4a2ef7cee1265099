"""Who is cut off, from everybody's reports: exactly the right nodes, whatever the mesh's size and whoever is silent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.probe.quorum import _CLEAR, _MARK, LISTED, STALE, Decision, Quorum, Vote, rank

EPOCH = 1_780_000_000.0
Bad = Callable[[str, str], bool]


def names(count: int) -> list[str]:
    return [f"n{number:04d}" for number in range(count)]


def vote(node: str, members: Iterable[str], bad: Bad, at: float = EPOCH) -> Vote:
    """What the agent of this node reports, which sees its pairs as they are."""
    peers = [peer for peer in members if peer != node]
    lost = [peer for peer in peers if bad(node, peer)]
    listed = sorted(lost, key=lambda peer: rank(node, peer))[:LISTED]
    return Vote(len(peers), len(peers), len(lost), frozenset(listed), at)


class Mesh:
    """All nodes' reports, and the marks that were made, as time goes by."""

    def __init__(self, members: Collection[str], marked: Iterable[str] = ()) -> None:
        self.members, self.marked = members, frozenset(marked)
        self.quorum, self.now = Quorum(), 1000.0
        self.votes: dict[str, Vote] = {}

    def report(self, bad: Bad, silent: Collection[str] = ()) -> Mesh:
        """Everybody reports again, but those whose agents are dead."""
        stamp = EPOCH + self.now - 1000.0
        self.votes |= {node: vote(node, self.members, bad, stamp) for node in self.members if node not in silent}
        return self

    def decide(self, after: float = 0.0) -> Decision:
        self.now += after
        found = self.quorum.decide(self.votes, self.members, self.marked, self.now, EPOCH + self.now - 1000.0)
        self.marked = found.isolated
        return found

    def settle(self) -> frozenset[str]:
        """The marks that these reports lead to."""
        for _ in range(3):
            self.decide(_CLEAR + 0.1)
        return self.marked


def all_is_well(_: str, __: str) -> bool:
    return False


def apart(*parts: Collection[str]) -> Bad:
    """Packets pass within each part only."""
    where = {node: number for number, part in enumerate(parts) for node in part}
    return lambda a, b: where.get(a, -1) != where.get(b, -1)


def pair(a: str, b: str) -> Bad:
    return lambda x, y: {x, y} == {a, b}


SIZES = st.integers(3, 40)


@given(SIZES, st.data())
def test_one_isolated_node_is_marked_and_no_other(count: int, data: st.DataObject) -> None:
    members = names(count)
    lost = data.draw(st.sampled_from(members))
    dead = data.draw(st.booleans())
    mesh = Mesh(members).report(all_is_well)
    assert mesh.settle() == frozenset()
    mesh.report(apart({lost}, set(members) - {lost}), silent={lost} if dead else ())
    assert mesh.settle() == {lost}
    assert mesh.report(all_is_well, silent={lost} if dead else ()).settle() == frozenset()


@given(st.integers(2, 40), st.data())
def test_one_bad_pair_marks_nobody(count: int, data: st.DataObject) -> None:
    members = names(count)
    a, b = data.draw(st.lists(st.sampled_from(members), min_size=2, max_size=2, unique=True))
    silent = data.draw(st.sampled_from([(), (a,), (a, b)]))
    mesh = Mesh(members).report(all_is_well)
    assert mesh.report(pair(a, b), silent).settle() == frozenset()


def test_of_two_nodes_neither_is_to_blame() -> None:
    members = names(2)
    mesh = Mesh(members).report(pair(*members))
    assert mesh.settle() == frozenset() and not mesh.decide().split
    assert not any(found.lonely for found in mesh.votes.values())


def test_an_agent_that_lies_has_nobody_marked() -> None:
    members = names(40)
    mesh = Mesh(members).report(pair(members[0], members[1]))
    mesh.votes[members[2]] = Vote(10**9, 10**9, 10**9 // 2, frozenset(members[:10]), EPOCH)
    assert mesh.settle() == frozenset()


@given(SIZES, st.data())
def test_where_the_mesh_falls_into_two_the_smaller_part_is_marked(count: int, data: st.DataObject) -> None:
    members = names(count)
    small = set(data.draw(st.lists(st.sampled_from(members), min_size=1, max_size=count - 1, unique=True)))
    found = Mesh(members).report(apart(small, set(members) - small)).settle()
    if 2 * len(small) > count:
        small = set(members) - small
    if 2 * len(small) == count or count == 3:
        assert found <= small
    elif len(small) <= LISTED:
        assert found == small
    else:
        # the names in the lists are drawn by lot
        assert found <= small and len(found) >= 0.8 * len(small)


@given(SIZES, st.data())
def test_never_more_than_half_are_marked(count: int, data: st.DataObject) -> None:
    """Whatever anyone says, reports that contradict each other among it."""
    members = names(count)
    bad = data.draw(st.sets(st.tuples(st.sampled_from(members), st.sampled_from(members)), max_size=count * 3))
    silent = data.draw(st.sets(st.sampled_from(members)))
    mesh = Mesh(members)
    for _ in range(3):
        mesh.report(lambda a, b: (a, b) in bad, silent)
        assert 2 * len(mesh.settle()) <= count


def test_a_mesh_in_pieces_without_a_majority_marks_nobody_and_says_so() -> None:
    members = names(10)
    for parts in ((members[:5], members[5:]), (members[:4], members[4:7], members[7:])):
        mesh = Mesh(members).report(all_is_well)
        mesh.decide()
        assert mesh.report(apart(*parts)).settle() == frozenset()
        assert mesh.decide().split


def test_what_is_marked_stays_so_while_nobody_has_a_majority() -> None:
    members = names(10)
    mesh = Mesh(members).report(apart(members[:1], members[1:]))
    assert mesh.settle() == {members[0]}
    mesh.report(apart(members[:1], members[1:5], members[5:]))
    assert mesh.settle() == {members[0]}


def test_living_nodes_are_not_marked_where_most_hosts_are_dead() -> None:
    members = names(15)
    dead = members[:10]
    mesh = Mesh(members).report(all_is_well)
    mesh.decide(100.0)
    for _ in range(30):
        mesh.report(lambda a, b: a in dead or b in dead, silent=dead)
        assert not mesh.decide(30.0).isolated


def test_a_rack_of_many_is_found_in_lists_of_ten() -> None:
    members = names(1000)
    dead = set(members[100:160])
    mesh = Mesh(members).report(all_is_well)
    mesh.report(lambda a, b: (a in dead) is not (b in dead), silent=dead)
    assert mesh.settle() == dead


def test_an_agent_that_is_silent_for_long_has_no_vote() -> None:
    members = names(5)
    mesh = Mesh(members).report(apart(members[:1], members[1:]))
    mesh.now += STALE + 1
    old = mesh.votes
    mesh.quorum = Quorum()
    assert mesh.settle() == frozenset() and mesh.votes is old
    # nor does it clear anybody
    mesh = Mesh(members, marked=members[:1]).report(all_is_well)
    mesh.now += STALE + 1
    assert mesh.settle() == {members[0]}


def test_a_missing_report_is_no_vote() -> None:
    members = names(5)
    mesh = Mesh(members)
    assert mesh.settle() == frozenset()
    mesh.votes = {node: vote(node, members, apart(members[:1], members[1:])) for node in members[:3]}
    assert mesh.settle() == {members[0]}
    mesh = Mesh(members)
    mesh.votes = {members[1]: vote(members[1], members, apart(members[:1], members[1:]))}
    assert mesh.settle() == frozenset()


def test_an_agent_that_has_probed_few_yet_has_no_vote() -> None:
    members = names(4)
    mesh = Mesh(members, marked=members[:1]).report(apart(members[:1], members[1:]))
    assert mesh.settle() == {members[0]}
    # all agents were started again
    mesh.votes = {node: Vote(3, 0, 0, frozenset(), EPOCH + 60.0) for node in members}
    assert mesh.settle() == {members[0]}


def test_nothing_flaps_when_reports_do() -> None:
    members = names(6)
    cut = apart(members[:1], members[1:])
    mesh = Mesh(members).report(all_is_well)
    seen = []
    for turn in range(60):
        mesh.report(cut if turn % 2 else all_is_well)
        seen.append(mesh.decide(_MARK * 0.9).isolated)
    assert set(seen) == {frozenset()}


def test_a_decision_says_when_it_is_due_again() -> None:
    members = names(5)
    mesh = Mesh(members).report(apart(members[:1], members[1:]))
    first = mesh.decide()
    assert first.doubtful == {members[0]} and not first.isolated and first.again == _MARK
    assert mesh.decide(first.again).isolated == {members[0]}


def test_a_node_that_alone_says_so_is_believed_once_the_others_are_known_to_be_alive() -> None:
    """Its own filter drops what it sends; the others reach it and say nothing, for minutes."""
    members = names(5)
    mesh = Mesh(members).report(all_is_well)
    mesh.decide(200.0)
    alone: Bad = lambda a, b: a == members[0]  # noqa: E731
    mesh.report(alone, silent=members[1:])
    assert mesh.settle() == frozenset()
    mesh.report(alone)
    mesh.decide(30.0)
    mesh.report(alone, silent=members[1:])
    assert mesh.settle() == {members[0]}
    # its agent is killed, the fault is repaired, and the others say so
    mesh.report(all_is_well, silent=members[:1])
    assert mesh.settle() == frozenset()


def test_a_controller_that_has_just_started_keeps_the_marks_that_it_finds() -> None:
    members = names(5)
    mesh = Mesh(members, marked=members[:1]).report(apart(members[:1], members[1:]))
    assert mesh.decide().isolated == {members[0]}
    assert mesh.settle() == {members[0]}


def test_a_node_that_left_the_mesh_is_not_marked() -> None:
    members = names(5)
    mesh = Mesh(members[1:], marked=members[:1]).report(all_is_well)
    assert mesh.decide().isolated == frozenset()
