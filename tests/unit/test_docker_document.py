"""docs/docker.md names the differences that the Docker matrix allows, docs/compatibility.md the words of refusals."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docker import cells

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/docker.md").read_text(encoding="utf-8")


def test_each_difference_is_in_the_document_and_no_other() -> None:
    section = TEXT.partition("\n## Differences\n")[2].partition("\n## ")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if line[:1] == "|"
    ]
    assert rows[0] == ("what", "on docker0", "on kbr0")
    assert rows[2:] == [(each.what, each.docker0, each.kbr0) for each in cells.DIFFERENCES]


def test_each_group_and_situation_is_in_the_document() -> None:
    for group in cells.GROUPS:
        assert f"| {group} |" in TEXT, group


def test_a_difference_is_about_the_probes_it_names() -> None:
    baseline = dict.fromkeys(cells.probes(), cells.NO_ANSWER)
    baseline |= {cells.Probe(cells.NETWORKS, "web", "idle", version): "web" for version in (4, 6)}
    wanted = cells.wanted(baseline, cells.SWITCH)
    changed = {str(probe) for probe in baseline if wanted[probe] != baseline[probe]}
    assert "pod → web IPv4" in changed and "web → pod IPv6" in changed
    assert not {"outside → web IPv4", "web → shop IPv4", "web → pod DOCKER-USER IPv4", "pod → shop IPv4"} & changed
    assert cells.wanted(baseline, "cleanup after reboot") == baseline
    assert cells.wanted(baseline, cells.REFUSED) == baseline | {cells.NAMED[cells.REFUSED]: "is named"}


def test_the_words_of_each_refusal_are_in_the_code() -> None:
    document = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    section = document.partition("\n## What is refused\n")[2]
    words = re.findall(r"^\| .+ \| `(.+)` \|$", section, re.MULTILINE)
    sources = [*(ROOT / "ovsmesh").rglob("*.py"), ROOT / "scripts/bootstrap.sh"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(words) > 10
    assert not [each for each in words if each not in code]
