"""What a lab refuses before it makes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovsmesh.cli.main import cli
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from ovsmesh.lab.state import LabSettings


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"hosts": 21}, "21 hosts: a lab has 2 to 20"),
        ({"hosts": 0}, "0 hosts"),
        ({"pods": 51}, "51 pods"),
        ({"name": "Upper"}, "name 'Upper'"),
        ({"name": "-x"}, "name '-x'"),
        ({"base": Path("/run") / ("x" * 90)}, "too long for a unix socket"),
    ],
)
def test_what_no_lab_can_be_is_refused_before_anything_is_made(shape: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        Lab(**{"hosts": 2, "datapath": "netdev", **shape})


def test_a_lab_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="labs there: none"):
        Lab.open("nosuch", tmp_path)


def test_every_command_that_reads_the_state_directory_finds_that_of_its_host(tmp_path: Path) -> None:
    host = Host(LabSettings("x", (1, 2)), tmp_path, 1)
    # the lab starts agents and bootstrap with a state directory of its choice
    reading = {
        name for name, command in cli.commands.items() if any(option.name == "state_dir" for option in command.params)
    } - {"agent", "bootstrap"}
    assert reading == {n.split("_")[1].lower() for n in host.env if n.endswith("_STATE_DIR")}
