"""Which kind of Docker a host has: those that can't be moved are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.containers import docker_kind, docker_unit
from ovsmesh.containers.docker_kind import Process
from ovsmesh.containers.docker_restart import validated
from ovsmesh.dataplane.types import Daemon

INFO: dict[str, Any] = {
    "Name": "web1",
    "DockerRootDir": "/var/lib/docker",
    "SecurityOptions": ["name=seccomp,profile=default", "name=cgroupns"],
    "Swarm": {"LocalNodeState": "inactive"},
}
VERSION: dict[str, Any] = {"Components": [{"Name": "Engine"}, {"Name": "containerd"}]}
HERE = Process(7, 0, True, ("/usr/bin/dockerd", "-H", "fd://"))


def test_a_usual_docker_is_not_refused() -> None:
    assert docker_kind.of_daemon(INFO, VERSION, HERE, 0) == ""
    assert docker_kind.of_daemon({}, {}, None, 0) == ""
    # answers of another shape than Docker's
    assert docker_kind.of_daemon({"Swarm": 7, "SecurityOptions": "x"}, {"Components": {"a": 1}}, None, 0) == ""


@pytest.mark.parametrize(
    ("about", "version", "process", "uid", "words"),
    [
        ({"SecurityOptions": ["name=rootless"]}, {}, HERE, 0, "rootless"),
        ({}, {}, None, 1000, "rootless"),
        ({"DockerRootDir": "/var/snap/docker/common/var-lib-docker"}, {}, HERE, 0, "snap"),
        ({}, {}, Process(7, 0, True, ("dockerd", "--config-file=/var/snap/docker/1/config/daemon.json")), 0, "snap"),
        ({}, {"Components": [{"Name": "Podman Engine"}]}, HERE, 0, "podman"),
        ({"OperatingSystem": "Docker Desktop"}, {}, None, 0, "Docker Desktop"),
        ({"Name": "docker-desktop"}, {}, None, 0, "Docker Desktop"),
        ({"Swarm": {"LocalNodeState": "active"}}, {}, HERE, 0, "Swarm node (active)"),
        ({"Swarm": {"LocalNodeState": "locked"}}, {}, HERE, 0, "Swarm node (locked)"),
        ({}, {}, Process(7, 0, False, ("dockerd",)), 0, "another network namespace"),
    ],
)
def test_what_can_not_be_moved_is_refused_by_name(about: Any, version: Any, process: Any, uid: Any, words: str) -> None:
    assert words in docker_kind.of_daemon(INFO | about, VERSION | version, process, uid)


def test_a_docker_with_pods_of_a_kubelet_is_refused() -> None:
    assert "k8s_POD_web" in docker_kind.of_pods(("db", "k8s_POD_web_default_1_0")) and not docker_kind.of_pods(("db",))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        ({"DOCKER_HOST": ""}, ""),
        ({"DOCKER_HOST": "unix:///var/run/docker.sock"}, ""),
        ({"DOCKER_CONTEXT": "default"}, ""),
        ({"DOCKER_HOST": "unix:///run/user/1000/docker.sock"}, "--docker-socket is /var/run/docker.sock"),
        ({"DOCKER_HOST": "tcp://192.0.2.9:2375"}, "remote"),
        ({"DOCKER_HOST": "ssh://root@web9"}, "remote"),
        ({"DOCKER_CONTEXT": "web9"}, "DOCKER_CONTEXT is web9"),
        ({"DOCKER_HOST": "tcp://\x1b[31mx"}, "tcp://?[31mx"),
    ],
)
def test_a_remote_docker_is_named(environment: dict[str, str], words: str) -> None:
    found = docker_kind.remote(environment, "/var/run/docker.sock")
    assert (words in found) if words else found == ""


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ([], ""),
        # it has not opened its socket yet
        ([Process(7, 0, True, ("dockerd",))], ""),
        ([Process(7, 0, True, ("dockerd", "-H", "fd://"))], ""),
        ([Process(7, 0, True, ("dockerd", "-Htcp://127.0.0.1:2375"))], "listens on tcp://127.0.0.1:2375 and not on"),
        ([Process(7, 0, True, ("dockerd", "--host=192.0.2.1:2375"))], "tcp://192.0.2.1:2375"),
        (
            [Process(7, 0, True, ("dockerd", "-H", "unix:///x/d.sock", "-H", "tcp://[::1]:1"))],
            "--docker-socket /x/d.sock",
        ),
        # of another host in a network namespace of its own
        ([Process(7, 0, False, ("dockerd", "-H", "tcp://127.0.0.1:2375"))], ""),
        ([Process(9, 1000, False, ("dockerd",))], "rootless (pid 9 runs as uid 1000)"),
    ],
)
def test_another_docker_is_named_where_none_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Process], words: str
) -> None:
    monkeypatch.setattr(docker_kind, "processes", lambda: iter(seen))
    monkeypatch.setattr(docker_kind, "_ROOTLESS_SOCKETS", str(tmp_path / "user/*/docker.sock"))
    found = docker_kind.of_host(str(tmp_path / "docker.sock"), str(tmp_path / "daemon.json"))
    assert (words in found) if words else found == ""


def test_sockets_of_others_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_kind, "processes", lambda: iter(()))
    monkeypatch.setattr(docker_kind, "_ROOTLESS_SOCKETS", str(tmp_path / "user/*/docker.sock"))
    (tmp_path / "podman").mkdir()
    (tmp_path / "docker.sock").symlink_to(tmp_path / "podman/podman.sock")
    assert "podman" in docker_kind.of_host(str(tmp_path / "docker.sock"))
    (tmp_path / "user/1000").mkdir(parents=True)
    (tmp_path / "user/1000/docker.sock").touch()
    assert "rootless" in docker_kind.of_host(str(tmp_path / "other.sock"))
    # `hosts` of daemon.json
    monkeypatch.setattr(docker_kind, "processes", lambda: iter([Process(7, 0, True, ("dockerd",))]))
    (tmp_path / "daemon.json").write_text('{"hosts": ["tcp://127.0.0.1:2375"]}')
    assert "tcp://127.0.0.1" in docker_kind.of_host(str(tmp_path / "other.sock"), str(tmp_path / "daemon.json"))


# The unit


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose systemctl and journalctl answer what stands in files, and note what they were asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("systemctl", "journalctl"):
        (tools / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\ncat {tmp_path}/"$(echo "$*" | tr / _)"\n'
        )
        (tools / name).chmod(0o755)
    (tmp_path / "units").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(docker_unit, "SYSTEMD", tmp_path)
    monkeypatch.setattr(docker_unit, "UNITS", tmp_path / "units")
    return tmp_path


@pytest.mark.parametrize(
    ("service", "socket", "words"),
    [
        ("LoadState=loaded\nUnitFileState=enabled", "LoadState=loaded\nUnitFileState=enabled", ""),
        ("LoadState=loaded\nUnitFileState=disabled", "LoadState=loaded\nUnitFileState=enabled", ""),
        ("LoadState=loaded\nUnitFileState=disabled", "LoadState=loaded\nUnitFileState=disabled", "is disabled"),
        ("LoadState=masked\nUnitFileState=masked", "LoadState=loaded\nUnitFileState=enabled", "is masked"),
        ("LoadState=not-found\nUnitFileState=", "LoadState=not-found\nUnitFileState=", "no unit docker.service"),
        # a systemctl that fails says nothing
        ("", "", ""),
    ],
)
def test_a_docker_that_is_off_on_purpose_is_told_apart(systemd: Path, service: str, socket: str, words: str) -> None:
    for kind, text in (("service", service), ("socket", socket)):
        (systemd / f"show -p LoadState -p UnitFileState docker.{kind}").write_text(text)
    found = docker_unit.DockerUnit("systemctl restart docker").off()
    assert (words in found) if words else found == ""


@pytest.mark.parametrize(
    "restart", ["service docker restart", "systemctl restart", "/x/y z", "systemctl restart 'a b'"]
)
def test_another_restart_command_has_no_unit(systemd: Path, restart: str) -> None:
    unit = docker_unit.DockerUnit(restart)
    assert unit.name == "" and unit.off() == unit.said() == unit.need_bridge(["10.97.1.1/24"]) == ""
    unit.need_nothing()
    unit.forgive()
    assert not (systemd / "asked").exists()


def test_the_drop_in_is_there_exactly_while_it_is_needed(systemd: Path) -> None:
    (systemd / "daemon-reload").touch()
    unit = docker_unit.DockerUnit("/usr/bin/systemctl --no-ask-password restart docker.service")
    assert unit.need_bridge(["10.97.1.1/24"]) == unit.need_bridge(["10.97.1.1/24"]) == ""
    path = systemd / "units/docker.service.d/50-ovsmesh.conf"
    assert "ip address add 10.97.1.1/24 dev kbr0" in path.read_text()
    # once: the second time it was there
    assert (systemd / "asked").read_text().splitlines() == ["systemctl daemon-reload"]
    other = path.with_name("override.conf")
    other.touch()
    unit.need_nothing()
    assert not path.exists() and other.exists()
    other.unlink()
    assert unit.need_bridge([]) == ""
    unit.need_nothing()
    assert not path.parent.exists()
    path.parent.touch()
    assert "dockerd may start without kbr0" in unit.need_bridge([])


def test_a_failed_dockerd_s_own_words_are_found(systemd: Path) -> None:
    lines = ["systemd[1]: Starting", "failed to start daemon: networks have same bridge name", "docker.service: Failed"]
    (systemd / "-q --no-pager -o cat -n 30 -u docker.service").write_text("\n".join(lines))
    assert docker_unit.DockerUnit("systemctl restart docker").said() == lines[1]


def test_a_new_dockerd_is_asked_about_the_file_before_it_is_restarted(tmp_path: Path) -> None:
    program = tmp_path / "dockerd"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nasked = {str(tmp_path / 'asked')!r}\n"
        "open(asked, 'w').write(json.dumps(sys.argv[1:]))\n"
        "data = json.load(open(sys.argv[-1]))\nsys.exit('unable to configure: bip' if 'bip' in data else 0)\n"
    )
    program.chmod(0o755)
    flags = (str(program), "-H", "fd://", "--config-file", "/etc/docker/daemon.json", "--config-file=/x")
    here = (os.getpid(), 0)
    daemon = Daemon("up", version="26.1.5+dfsg1", flags=flags, instance=here)
    assert validated(daemon, b"{}", tmp_path) == ""
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked[:-1] == ["-H", "fd://", "--validate", "--config-file"] and not Path(asked[-1]).exists()
    assert validated(daemon, b'{"bip": 1}', tmp_path) == "unable to configure: bip"
    # older ones have no --validate, and of some nothing is known: who they are, or which files they have
    for other in (
        Daemon("up", version="26.1.5", flags=flags),
        Daemon("up", version="20.10.24", flags=flags, instance=here),
        Daemon("up", version="29.0.0", instance=here),
        Daemon("up", flags=flags, instance=here),
    ):
        assert validated(other, b'{"bip": 1}', tmp_path) == ""


def test_the_drop_in_is_a_script_that_a_shell_reads() -> None:
    line = next(x for x in docker_unit.drop_in(["10.97.1.1/24", "fd00:97:1::1/64"]).splitlines() if "ExecStartPre" in x)
    script = line.partition("-c ")[2].strip("'")
    assert "'" not in script and "%" not in script and "$" not in script
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
