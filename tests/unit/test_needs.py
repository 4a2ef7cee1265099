"""A test that needs more of the machine than its markers say fails: at collection, or else when it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = 'pytest_plugins = ["tests.conftest", "tests.kube.conftest"]\n'
PLANTED = """
import pytest
from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from tests.support import built
from tests.support.controlplane import ControlPlane
from tests.support.dockerkit import Docker
from tests.support.systemd_container import Machine

def helper(folder):
    return ControlPlane(folder)

@pytest.fixture
def deep(own_plane):
    return own_plane()

{mark}
def test_by_fixture(deep): ...

{mark}
def test_by_helper(tmp_path): helper(tmp_path).start()

{mark}
def test_by_programs(programs): ...

{mark}
def test_by_lab(module_lab): module_lab(2)

{mark}
def test_by_hand_made_lab(): Lab(1).up()

{mark}
def test_by_docker(tmp_path): Docker(None, tmp_path).start()

{mark}
def test_by_machine(): Machine(*built.machine(), "ns", "192.0.2.1/24")

{mark}
def test_by_namespace(): [netns.within("ns", lambda: 1) for _ in "a"]

def test_of_nothing(tmp_path, monkeypatch): ...
"""
WANTED = {
    "test_by_fixture": "kube",
    "test_by_helper": "kube",
    "test_by_programs": "kube",
    "test_by_lab": "lab",
    "test_by_hand_made_lab": "lab",
    "test_by_docker": "docker",
    "test_by_machine": "lab",
    "test_by_namespace": "root",
}


def run(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tests in `text` as if they stood in this project."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_planted.py").write_text(text)
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "setup.cfg"), "--rootdir", str(folder)]
    argv += ["-p", "no:cacheprovider", f"--basetemp={folder / 'temporary'}", *options, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=folder, timeout=50, check=False)


def test_an_unmarked_test_fails_collection_with_its_name(tmp_path: Path) -> None:
    done = run(tmp_path, PLANTED.format(mark=""))
    assert done.returncode == 2, done.stdout + done.stderr
    found = re.findall(
        r"test_planted\.py::(\S+) uses .*: mark it with @pytest\.mark\.(\w+)$", done.stdout, re.MULTILINE
    )
    assert dict(found) == WANTED, done.stdout
    assert "1 error during collection" in done.stdout and "passed" not in done.stdout


def test_with_its_marker_it_is_collected(tmp_path: Path) -> None:
    marks = "@pytest.mark.kube\n@pytest.mark.lab\n@pytest.mark.docker"
    done = run(tmp_path, PLANTED.format(mark=marks), "--collect-only")
    assert done.returncode == 0 and f"{len(WANTED) + 1} tests collected" in done.stdout, done.stdout


def test_what_only_running_shows_fails_the_test(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
import socket, subprocess
import pytest
from tests.support import built
from tests.support.needs import built_ahead

made = []

@built_ahead
def thing():
    made.append(1)
    return 7

@pytest.mark.parametrize("argv", [["ip", "link"], ["nft", "--version"], ["ovsdb-server", "--version"]], ids=" ".join)
def test_program(argv): subprocess.run(argv)

def test_far():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock: sock.connect(("192.0.2.1", 9))

@pytest.mark.lab
def test_download(): subprocess.run(["apt-get", "--version"])

def test_build(): getattr(built, "control" + "_plane")()

def test_built_ahead(): assert thing() == 7 and made == [1]

@pytest.mark.root
def test_marked(): assert subprocess.run(["ip", "-V"]).returncode == 0

def test_a_stand_in(tmp_path):
    (tmp_path / "nft").write_text("#!/bin/sh\\n")
    (tmp_path / "nft").chmod(0o755)
    subprocess.run([tmp_path / "nft"], check=True)
    with pytest.raises(FileNotFoundError): subprocess.run(["etcd"], env={"PATH": str(tmp_path)})
    with socket.socket() as sock: sock.connect_ex(("127.0.0.1", 9))
""",
    )
    for said in (
        "test_program[ip link] starts ip link, which needs root: mark it with @pytest.mark.root",
        "test_program[nft --version] starts nft --version, which needs root",
        "test_program[ovsdb-server --version] starts ovsdb-server --version, which needs Open vSwitch",
        "test_far speaks to 192.0.2.1, which is beyond loopback: mark it with @pytest.mark.network",
        "test_download builds or downloads, by apt-get --version",
        "test_build builds control_plane, which no test or fixture of it names",
    ):
        assert f"\ntest_planted.py::{said}" in done.stdout, done.stdout
    assert "6 failed, 3 passed" in done.stdout, done.stdout
