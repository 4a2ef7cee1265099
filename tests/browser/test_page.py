"""What a person sees on the agent's page, in a real Chromium: the rendered document, and what it says aloud."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.agent.publisher import AgentHttp
from ovsmesh.dataplane.report import Condition, Peer, Report, Self, Traffic
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.browser.conftest import Agent
from tests.support.chromium import Chromium, Page

pytestmark = pytest.mark.browser

NOW = 1.8e9
TIME = "2027-01-15T08:00:00Z"
PICTURES = os.environ.get("OVSMESH_PICTURES", "")
"""A folder to keep screenshots in, for a person to look at."""


# What an agent says


def reach(state: State = State.OK, trip: float | None = 0.0004, loss: float = 0.0, mtu: int | None = None) -> Reach:
    return Reach(state, NOW - 60, trip, trip, loss, mtu, 100, round(100 * loss))


def peer(name: str, found: Reach | None = None, why: str = "", **more: Any) -> Peer:
    number = sum(name.encode()) % 200
    found = found or reach()
    traffic = Traffic(1234, 2345, 12_345_678, 987_654_321, 3)
    cidrs = (f"10.97.{number}.0/24",)
    made = Peer(name, str(found.state), f"192.0.2.{number}", cidrs, f"gre-{name}"[:15], traffic, reach=found)
    return replace(made, missing=(why,) if why else (), **more)


def report(*peers: Peer, headline: str = "web1: all peers reachable", **more: Any) -> Report:
    me = Self(
        "web1", "192.0.2.1", ("10.97.1.0/24",), ("10.97.1.1",), "gre", None, 1462, "underlay 1500 − 38 of gre",
        "system", None, "3.1.0", True, NOW - 3600, "0.1.0", "/etc/ovsmesh/mesh.yaml", NOW - 7200,
    )  # fmt: skip
    conditions = (Condition("Converged", "True", Reason.AsWanted), Condition("Degraded", "False", Reason.AsWanted))
    return replace(Report(NOW, headline, True, me, conditions, peers, (), (), ()), **more)


def measured(state: str = "ok", trip: float | None = 0.0004, loss: float | None = 0.0, mtu: int | None = 1462) -> Any:
    return {"state": state, "since": TIME, "roundTrip": trip, "roundTripP99": trip, "loss": loss, "pathMtu": mtu}


DOWN = measured("unreachable", None, 1.0, None)


def matrix(names: list[str], faults: Any = None, silent: tuple[str, ...] = (), zones: int = 3) -> Any:
    """A matrix in which all is well but for `faults`: (from, to) → cell. `silent` agents are dead."""
    faults = faults or {}
    nodes: list[Any] = [
        {"name": name, "zone": f"zone-{at % zones}", "agent": "no answer" if name in silent else "ok",
         "version": "0.1.0", "headline": f"{name}: all peers reachable", "meshDigest": "7c1f00d0beef",
         "converged": True, "since": TIME, "time": TIME}
        for at, name in enumerate(names)
    ]  # fmt: skip
    trips = [0.0003, 0.002, 0.012, 0.048, 0.21]
    rows: list[Any] = []
    for at, name in enumerate(names):
        cells = [
            {"peer": other, **faults.get((name, other), measured(trip=trips[(at + to) % 3]))}
            | ({"fromOtherEnd": True} if name in silent else {})
            for to, other in enumerate(names)
            if other != name
        ]
        rows.append({"node": name, "time": TIME, "cells": cells})
    found: Any = {"time": TIME, "nodes": nodes, "rows": rows, "complete": True, "zones": []}
    zone_of = {node["name"]: node["zone"] for node in nodes}
    sums: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        row["counts"] = Counter(cell["state"] for cell in row["cells"])
        for cell in row["cells"]:
            sum_ = sums.setdefault((zone_of[row["node"]], zone_of[cell["peer"]]), Counter())
            sum_.update({"pairs": 1, "ok": cell["state"] == "ok", "unknown": cell["state"] == "unknown"})
    for (one, other), counts in sorted(sums.items()):
        found["zones"].append({"from": one, "to": other, **counts, "roundTrip": 0.0004, "slowest": 0.012})
    return found


ENTRIES = [
    {"time": f"2027-01-15T07:{at:02}:00Z", "event": "drift", "what": f"route 10.97.{at}.0/24 was deleted",
     "who": "someone", "took": 0.012}
    for at in range(60)
]  # fmt: skip


@contextmanager
def shown(browser: Chromium, agent: Agent, name: str = "", **options: Any) -> Iterator[Page]:
    """The page once it has shown what its agent says; it must have had nothing to complain of."""
    page = browser.open(agent.url, **options)
    try:
        page.until("Object.values(sources).every(one => one.good || one.since)")
        yield page
        if PICTURES and name:
            page.screenshot(Path(PICTURES, f"{name}.png"))
        assert not page.complaints()
    finally:
        page.close()


def cells(page: Page, table: str = "#matrix-tables") -> dict[tuple[str, str], tuple[str, str]]:
    """(row's name, column's name) → text and class of the cell."""
    found: list[Any] = page.js(f"""
        [...document.querySelectorAll('{table} table:first-of-type tbody tr')].flatMap(
            row => [...row.cells].slice(1).map((cell, at) => [
                row.cells[0].title, row.closest('table').tHead.rows[0].cells[at + 1].textContent,
                cell.innerText, cell.className]))""")
    return {(one, other): (text, kind) for one, other, text, kind in found}


@pytest.fixture(scope="module")
def first_page(chromium: Chromium) -> Iterator[Page]:
    """A page whose functions are asked by themselves."""
    served = Agent(report(peer("web2")))
    page = chromium.open(served.url)
    yield page
    page.close()
    served.close()


# Well, and not


def test_three_nodes_that_are_well(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    served = agent(report(peer("web2"), peer("web3")), matrix(["web1", "web2", "web3"]), {"entries": ENTRIES})
    with shown(chromium, served, "three-well") as page:
        assert page.text("#verdict") == "✔ web1: all peers reachable" and page.js("verdict()[0]") == "well"
        assert page.text("#node") == "ovsmesh on web1"
        found = cells(page)
        assert len(found) == 9 and found["web1", "web2"] == ("2.0 ms\n0 % lost\nMTU 1462", "rtt1")
        first = page.rows("#peers-table")[0]
        assert first[0] == "web2" and first[5:8] == ["12.3 MB, 1234", "987.7 MB, 2345", "3"]
        assert "3.1.0, datapath system" in page.text("#about-table")
        history = page.rows("#history-table")
        assert len(history) == 50 and history[0][2].startswith("route 10.97.59.0") and history[0][4] == "12 ms"
        assert not page.js("document.querySelectorAll('.problem, .stale').length")


def test_a_dead_peer_is_the_first_thing_said(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    why = "nothing arrives from it: is the host down?"
    dead = peer("web3", reach(State.UNREACHABLE, None, 1.0), why)
    faults = {("web1", "web3"): DOWN, ("web2", "web3"): DOWN}
    faults |= {("web3", name): DOWN for name in ("web1", "web2")}
    served = agent(
        report(peer("web2"), dead, headline="web1: 1 of 2 peers not reachable: web3"),
        matrix(["web1", "web2", "web3"], faults, silent=("web3",)),
        {"entries": []},
    )
    with shown(chromium, served, "one-dead") as page:
        assert page.text("#verdict") == "✖ web1: 1 of 2 peers not reachable: web3"
        assert page.js("document.getElementById('verdict').className") == "bad"
        assert page.text("#problems") == f"web3: {why}"
        assert page.rows("#peers-table")[0][:2] == ["web3", "unreachable since 2027-01-15 07:59:00"]
        assert cells(page)["web1", "web3"] == ("✖ unreachable", "bad")
        assert cells(page)["web3", "web1"] == ("⇄ ✖ unreachable", "bad")
        assert page.text("#matrix tbody tr:last-child th") == "web3\nagent: no answer"
        assert "web3: its agent: no answer; it answered last at 2027" in page.text("#matrix-list")
        assert page.text("#history-table") == "no entries"


def test_twelve_nodes_with_faults_of_each_kind(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    names = [f"web{n}" for n in range(1, 13)]
    faults = {
        ("web1", "web2"): measured("lossy", 0.002, 0.3),
        ("web3", "web4"): measured("small packets only", 0.0004, 0.05, 1400),
        ("web5", "web6"): measured("not forwarded", None, 1.0, None),
        ("web7", "web8"): measured("not probed yet", None, None, None),
        ("web9", "web1"): measured("a state of a later version", 0.0004),
        ("web2", "web1"): measured(trip=0.25, mtu=None),
        ("web4", "web1"): {"state": "ok"},
    }
    made = matrix(names, faults)
    made["nodes"][4]["meshDigest"] = "0123456789ab"
    made["nodes"][5] |= {"converged": False, "headline": "web6 is not converged: 3 changes to do"}
    made["rows"] = [row for row in made["rows"] if row["node"] != "web12"]
    served = agent(report(*(peer(name) for name in names[1:])), made, {"entries": ENTRIES[:5]})
    with shown(chromium, served, "twelve-faults") as page:
        found = cells(page)
        assert found["web1", "web2"] == ("▲ 30 % lost\n2.0 ms\nMTU 1462", "loss")
        assert found["web3", "web4"] == ("◆ MTU 1400\n0.40 ms\n5 % lost", "small")
        assert found["web5", "web6"] == ("✖ not forwarded", "bad")
        assert found["web7", "web8"] == ("? not probed yet", "unknown")
        assert found["web9", "web1"] == ("? a state of a later version", "unknown")
        assert found["web12", "web1"] == ("?", "unknown")
        assert found["web4", "web1"][1] == "unknown", "what has no figure has no colour of a figure"
        assert found["web2", "web1"] == ("250 ms\n0 % lost\nMTU full size", "rtt4")
        said = page.text("#matrix-list")
        assert "web5 has another mesh, 0123456789ab" in said and "web6 is not converged: 3 changes to do" in said


def test_eighty_nodes_are_the_worst_rows_and_the_zones(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    names = [f"node-{n:02}" for n in range(80)]
    dead = {pair: DOWN for other in names for pair in (("node-41", other), (other, "node-41"))}
    faults = dead | {("node-07", "node-09"): measured("small packets only", 0.002, 0.0, 1400)}
    served = agent(report(*(peer(name) for name in names[1:])), matrix(names, faults, silent=("node-41",)))
    with shown(chromium, served, "eighty") as page:
        worst, zones = page.js(
            "[...document.querySelectorAll('#matrix-tables table')].map(each => each.tBodies[0].rows.length)"
        )
        assert (worst, zones) == (20, 3)
        first = page.rows("#matrix-tables .scroll:first-child")[0]
        assert first[:5] == ["node-41", "zone-2", "no answer", "✖ 0 of 79", "0 of 79"]
        assert "and 74 more" in first[-1]
        second = page.rows("#matrix-tables .scroll:first-child")[1]
        assert second[0] == "node-07" and "node-09 small packets only" in second[-1] and second[7] == "1400"
        summary = page.rows("#matrix-tables .scroll:last-child")
        assert [row[0] for row in summary] == ["zone-0", "zone-1", "zone-2"]
        assert summary[0][3].startswith("✖ 27 of 702 not well") and summary[0][1].startswith("702 well")
        assert page.text("#history-note") == "/history.json: this agent does not serve it"


def test_a_row_that_has_its_worst_cells_only_counts_the_others(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    names = [f"node-{n:03}" for n in range(150)]
    made = matrix(names, {("node-007", "node-009"): DOWN, ("node-008", "node-009"): measured("not probed yet")})
    made["complete"], made["zones"] = False, []
    for row in made["rows"]:
        row["cells"] = sorted(row["cells"], key=lambda cell: str(cell["state"]) == "ok")[:20]
    served = agent(report(peer("node-001")), made)
    with shown(chromium, served, "large") as page:
        first, second, third = page.rows("#matrix-tables")[:3]
        assert (first[0], first[3:5]) == ("node-007", ["✖ 148 of 149", "–"]) and first[-1] == "node-009 unreachable"
        assert (second[0], second[3]) == ("node-008", "? 148 of 149") and third[3] == "149 of 149"
        assert "No node has a zone" in page.text("#matrix-tables")


def test_fifty_nodes_are_a_full_matrix_that_has_text_in_every_cell(
    chromium: Chromium, agent: Callable[..., Agent]
) -> None:
    names = [f"node-{n:02}" for n in range(50)]
    faults = {("node-01", "node-02"): DOWN, ("node-03", "node-02"): measured("lossy", 0.001, 0.25)}
    served = agent(report(*(peer(name) for name in names[1:])), matrix(names, faults))
    with shown(chromium, served, "fifty", width=1600) as page:
        found = cells(page)
        assert len(found) == 2500 and all(text for (one, other), (text, _) in found.items() if one != other)
        assert found["node-01", "node-02"] == ("✖", "bad")
        assert found["node-03", "node-02"] == ("▲ 1.0\n25%\n1462", "loss")
        assert found["node-00", "node-01"] == ("2.0\n0%\n1462", "rtt1")
        title = page.js("document.querySelector('#matrix-tables td.bad').title")
        assert title.startswith("node-01 to node-02: unreachable since ") and "100 % lost" in title


# What does not answer


def test_an_agent_that_is_gone_is_said_with_the_time_and_nothing_looks_well(
    chromium: Chromium, agent: Callable[..., Agent]
) -> None:
    served = agent(report(peer("web2")), matrix(["web1", "web2"]), {"entries": ENTRIES})
    with shown(chromium, served, "gone") as page:
        assert page.text("#verdict").startswith("✔")
        served.close()
        page.until("document.getElementById('verdict').textContent.startsWith('✖ the agent does not answer since ')")
        first = page.text("#verdict")
        assert (
            "Below is what it said then" in first and page.js("document.getElementById('verdict').className") == "bad"
        )
        assert page.js("document.body.className") == "stale"
        page.until("document.querySelectorAll('main .stale').length === 5")
        assert float(page.js("getComputedStyle(document.querySelector('#matrix table')).opacity")) < 1
        page.js("new Promise(done => setTimeout(done, PERIOD + 100))")
        assert page.text("#verdict") == first, "a screen reader hears it once"


def test_an_agent_that_never_answered_is_not_well(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    served = agent(None)
    with shown(chromium, served, "first") as page:
        assert page.text("#verdict") == "? the agent has not reconciled yet"
        assert page.text("#matrix-note") == "/matrix.json: this agent does not serve it"
        served.show(report(peer("web2")))
        page.until("document.getElementById('verdict').textContent.startsWith('✔')")


@pytest.mark.parametrize(
    ("states", "converged", "kind"),
    [
        (["ok", "ok"], True, "well"),
        (["ok", "ok"], False, "bad"),
        (["ok", "not probed yet"], True, ""),
        (["ok", "unknown"], True, ""),
        (["ok", "held"], True, ""),
        (["not probed yet", "unreachable"], True, "bad"),
        (["not probed yet", "small packets only"], True, "bad"),
        (["ok", "a state of a later version"], True, ""),
        ([], True, "well"),
    ],
)
def test_only_what_was_seen_to_work_is_well(first_page: Page, states: list[str], converged: bool, kind: str) -> None:
    peers = [{"name": f"web{at}", "state": state} for at, state in enumerate(states)]
    told = {"converged": converged, "well": kind == "well", "self": {"agentRunning": True}, "peers": peers}
    assert first_page.js(f"judge({json.dumps(told)})[0]") == kind
    for changed in ({"self": {"agentRunning": False}}, {"problems": [{"wrong": True}]}):
        assert first_page.js(f"judge({json.dumps(told | changed | {'well': False})})[0]") == "bad"


def test_one_document_that_fails_is_named_and_its_last_word_is_marked(
    chromium: Chromium, agent: Callable[..., Agent]
) -> None:
    served = agent(report(peer("web2")), matrix(["web1", "web2"]), {"entries": ENTRIES})
    with shown(chromium, served, "one-fails") as page:
        served.matrix = [1, "no matrix"]
        served.history = "no history"
        page.until("document.getElementById('history-note').textContent.includes('can\\'t be read since')")
        assert page.js("document.getElementById('history').className") == "stale"
        assert len(page.rows("#history-table")) == 50 and page.text("#verdict").startswith("✔")
        assert page.text("#matrix-tables") == "no node is known yet"


def test_what_the_node_works_without_is_a_note_after_what_is_wrong(
    chromium: Chromium, agent: Callable[..., Agent]
) -> None:
    problems = (Problem(Reason.CNILeftover, "files of others", field="cni"), Problem(Reason.ApplyFailed, "no flows"))
    with shown(chromium, agent(report(peer("web2"), problems=problems)), "note") as page:
        assert page.text("#problems") == "no flows\nnote: files of others"
        assert page.js("[...document.querySelectorAll('#problems li')].map(li => li.className)") == ["problem", "note"]
        assert page.text("#verdict").startswith("✖")


def test_a_loop_that_stands_still_is_said_before_it_counts_as_dead(
    chromium: Chromium, agent: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = agent(report(peer("web2")))
    monkeypatch.setattr(AgentHttp, "silent", 100.0)
    with shown(chromium, served) as page:
        assert page.text("#verdict").startswith("✖ the agent is stuck: its loop has not run since ")


def test_a_loop_that_hangs_is_the_headline(
    chromium: Chromium, agent: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = agent(report(peer("web2")))
    monkeypatch.setattr("ovsmesh.http_server.LOOP_DEADLINE", -1.0)
    with shown(chromium, served, "stuck") as page:
        assert page.text("#verdict").startswith("✖ the agent is stuck: the loop has not run for ")


# What others may have written

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def test_hostile_texts_are_text(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    bad = peer(HOSTILE, reach(State.UNREACHABLE), f"{HOSTILE}\u202egnp.exe")
    problems = (Problem(Reason.ApplyFailed, HOSTILE, HOSTILE, "\"'><b>", "`${alert(3)}`"),)
    made = matrix(["web1", HOSTILE, "__proto__", "constructor"], {("web1", HOSTILE): DOWN})
    made["nodes"][1] |= {
        "agent": HOSTILE,
        "zone": HOSTILE,
        "meshDigest": HOSTILE,
        "headline": HOSTILE,
        "since": HOSTILE,
    }
    entries = [{"time": HOSTILE, "event": HOSTILE, "what": HOSTILE, "who": {"a": HOSTILE}, "took": HOSTILE}, None, 7]
    served = agent(report(bad, headline=HOSTILE, problems=problems), made, {"entries": entries})
    with shown(chromium, served, "hostile") as page:
        assert page.text("#verdict") == f"✖ {HOSTILE}"
        elements = "document.querySelectorAll('script, img, b, iframe, svg').length"
        assert page.js(elements) == 1, "the page's own script"
        assert not page.js(
            "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))"
        )
        assert cells(page)["web1", HOSTILE][1] == "bad" and ("web1", "__proto__") in cells(page)
        assert "\u202e" not in page.js("document.body.textContent") and "\ufffdgnp.exe" in page.text("#problems")


@pytest.mark.parametrize(
    "answer", [{"nodes": 7, "rows": {}}, {"nodes": [None, 1, {}], "rows": [None, {"node": "x", "cells": [None]}]}]
)
def test_nonsense_is_shown_as_such(chromium: Chromium, agent: Callable[..., Agent], answer: Any) -> None:
    served = agent(report(peer("web2")), answer, answer)
    with shown(chromium, served) as page:
        assert page.text("#verdict").startswith("✔"), "the node's own report is another document"
        assert page.text("#matrix-tables") in ("", "no node is known yet")
        assert page.text("#history-table") == "no entries"


# For everyone


@pytest.mark.parametrize(("dark", "width"), [(True, 1280), (False, 400), (True, 400)])
def test_dark_and_light_and_a_phone(chromium: Chromium, agent: Callable[..., Agent], dark: bool, width: int) -> None:
    names = [f"web{n}" for n in range(1, 9)]
    faults = {
        ("web1", "web2"): DOWN,
        ("web2", "web3"): measured("lossy", 0.1, 0.3),
        ("web3", "web4"): measured("small packets only", 0.01, 0, 1400),
    }
    served = agent(report(*(peer(name) for name in names[1:])), matrix(names, faults), {"entries": ENTRIES})
    with shown(chromium, served, f"{'dark' if dark else 'light'}-{width}", width=width, dark=dark) as page:
        background = page.js("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(17, 21, 26)" if dark else "rgb(255, 255, 255)")
        assert page.js("document.documentElement.scrollWidth") <= width, "tables scroll, the page does not"
        low = [pair for pair in contrasts(page) if pair[0] < 4.5]
        assert not low, "WCAG AA"


def contrasts(page: Page) -> list[tuple[float, str]]:
    """The contrast of each cell's and note's text against what is behind it (WCAG 2.1, 1.4.3)."""
    found: list[Any] = page.js("""
        [...document.querySelectorAll('td, th, caption, .key, #verdict, h1, footer')].map(element => {
          const filled = each => getComputedStyle(each).backgroundColor;
          let behind = element;
          while (filled(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
          return [getComputedStyle(element).color, filled(behind), element.className];
        })""")

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def ratio(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    assert len(found) > 50
    return [(ratio(colour, behind), kind) for colour, behind, kind in found]


def test_a_screen_reader_and_a_keyboard_find_their_way(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    served = agent(report(peer("web2")), matrix(["web1", "web2"]), {"entries": ENTRIES})
    with shown(chromium, served) as page:
        assert page.js("document.getElementById('verdict').getAttribute('aria-live')") == "polite"
        assert page.js("document.documentElement.lang") == "en"
        assert page.js("[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent)")
        assert page.js("[...document.querySelectorAll('thead th')].every(h => h.scope === 'col')")
        assert page.js(
            "[...document.querySelectorAll('#matrix tbody th, #peers tbody th')].every(h => h.scope === 'row')"
        )
        assert page.js(
            "[...document.querySelectorAll('.scroll')].every(s => s.tabIndex === 0 && s.getAttribute('aria-label'))"
        )


def test_what_has_not_changed_stays_so_that_a_selection_does(chromium: Chromium, agent: Callable[..., Agent]) -> None:
    served = agent(report(peer("web2")), matrix(["web1", "web2"]), {"entries": ENTRIES})
    with shown(chromium, served) as page:
        page.js("window.kept = document.querySelector('#peers-table tbody th'), kept.closest('.scroll').focus()")
        served.show(report(peer("web2"), peer("web4"), headline="web1: all 2 peers reachable"))
        page.until("document.getElementById('verdict').textContent.includes('all 2 peers')")
        assert page.js("kept.isConnected && kept.textContent === 'web2'")
        assert page.js("document.activeElement.getAttribute('aria-label')") == "Peers, the worst first"
