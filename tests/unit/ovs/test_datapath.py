"""The ports of the datapaths, as the switch tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovsmesh.ovs.datapath import port_types

SHOWN = """\
system@ovs-system:
  lookups: hit:0 missed:0 lost:0
  flows: 0
  port 0: ovs-system (internal)
  port 1: obr0 (internal)
  port 2: gre_sys (gre: packet_type=ptap)
"""


def appctl(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "ovs-appctl"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_types_of_all_ports_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    appctl(tmp_path, monkeypatch, f"[ $OVS_RUNDIR = /run/x ] && cat <<'END'\n{SHOWN}END")
    assert port_types(Path("/run/x")) == frozenset({"internal", "gre"})


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 9"])
def test_a_switch_that_does_not_tell_has_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr("ovsmesh.ovs.datapath.TIMEOUT", 0.2)
    appctl(tmp_path, monkeypatch, script)
    assert port_types(tmp_path) is None


def test_without_the_tool_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert port_types(tmp_path) is None
