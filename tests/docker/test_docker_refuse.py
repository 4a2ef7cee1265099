"""A switch of Docker that can't be, or that is cut off: the old state stays or comes back, and the reason is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from ovsmesh.lab.lab import Lab
from tests.support.dockerkit import PLAIN, SOON, Docker, links, until, without_kbr0

pytestmark = [pytest.mark.docker, pytest.mark.lab]

Calm = tuple[Lab, Docker]


def unmoved(docker: Docker, restarts: int = 0, file: str | bytes = PLAIN) -> None:
    assert docker.bridge() == "docker0"
    assert docker.config.read_bytes() == (file.encode() if isinstance(file, str) else file)
    assert docker.restarts() == restarts
    assert links(docker.host)["docker0"][1] == ["172.17.0.1"]


def refused(docker: Docker, *words: str, options: tuple[str, ...] = ()) -> str:
    done = docker.once(*options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    assert done.stderr.rstrip().endswith("not converged")
    return done.stderr


def test_a_file_that_is_no_daemon_json_is_named_and_not_touched(calm: Calm) -> None:
    _, docker = calm
    for text, words in (
        (b'{"debug": true,\n "mtu": }', ("line 2", "not JSON")),
        (b'["a"]', ("not an object",)),
        (b'{"mtu": 1, "mtu": 2}', ("'mtu' more than once",)),
        (b"{}" + b" " * (1 << 20), ("more than 1048576",)),
    ):
        docker.config.write_bytes(text)
        refused(docker, *words, str(docker.config))
        unmoved(docker, file=text)
    docker.config.unlink()
    os.mkfifo(docker.config)
    refused(docker, "FIFO")
    docker.config.unlink()
    docker.config.mkdir()
    # an option that can never be right: nothing is begun
    done = docker.once()
    assert done.returncode == 2 and f"{str(docker.config)!r}: is there, and is not a file" in done.stderr
    docker.config.rmdir()
    docker.configure(PLAIN)


def test_what_dockerd_would_refuse_is_seen_beforehand(calm: Calm) -> None:
    _, docker = calm
    (docker.dir / "argv.json").write_text(json.dumps(["--bip", "172.17.0.1/16", "--mtu=1400"]))
    docker.again(PLAIN)
    refused(docker, "--bip 172.17.0.1/16", "--mtu 1400", "command line")
    unmoved(docker)
    # what the command line has as it should be is left there, and the file does without it
    (docker.dir / "argv.json").write_text(json.dumps(["--mtu", "1462"]))
    docker.again(PLAIN)
    done = docker.once()
    assert done.returncode == 0, done.stderr
    assert docker.on("kbr0") and "mtu" not in json.loads(docker.config.read_text())


def test_a_restart_that_can_not_be_is_seen_beforehand(calm: Calm) -> None:
    _, docker = calm
    refused(docker, "no program", options=("--docker-restart", "no-such-program restart docker"))
    unmoved(docker)
    other = docker.config.with_name("other.json")
    other.write_text(PLAIN)
    refused(docker, str(docker.config), "--docker-config", options=("--docker-config", str(other)))
    other.unlink()
    unmoved(docker)


def test_live_restore_with_containers_waits_until_they_are_stopped(calm: Calm) -> None:
    lab, docker = calm
    text = '{"live-restore": true}'
    docker.again(text)
    docker.run("stays")
    refused(docker, "live-restore", "stop stays")
    unmoved(docker, file=text)
    assert docker.running() == ["stays"]
    docker.host.start_agent("--docker", "replace", *docker.options)
    until("the reason", lambda: "stop stays" in docker.host.ovsmesh("status").stdout)
    docker.halt("stays")
    until("the move", lambda: docker.on("kbr0"))
    lab.converged(SOON, [docker.host])
    assert docker.begin("stays").startswith("10.97.1.")
    # cleanup neither goes half of the way
    docker.host.stop_agent()
    done = docker.host.ovsmesh("cleanup")
    assert done.returncode == 1 and "stop stays" in done.stderr and "nothing was changed" in done.stderr
    assert "kbr0" in links(docker.host) and docker.on("kbr0")


def test_a_dockerd_that_refuses_the_new_file_has_the_old_one_again(calm: Calm) -> None:
    _, docker = calm
    file = '{ "labels": ["a=b"] }'
    docker.again(file, mode=0o600)
    # taken in by the next dockerd only; beside the mtu of the file it refuses to start
    (docker.dir / "argv.json").write_text(json.dumps(["--mtu", "1400"]))
    refused(docker, "putting the old daemon.json back", "--mtu 1400", "command line")
    unmoved(docker, 2, file)
    assert docker.config.stat().st_mode & 0o777 == 0o600
    refused(docker, "--mtu 1400")
    assert docker.restarts() == 2
    # the reason is gone, and somebody says so
    (docker.dir / "argv.json").unlink()
    docker.again(file, mode=0o600)
    docker.touch()
    done = docker.once()
    assert done.returncode == 0, done.stderr
    assert docker.on("kbr0")


@without_kbr0
def test_a_dockerd_that_dies_during_the_migration(calm: Calm) -> None:
    _, docker = calm
    docker.misbehave("die")
    refused(docker, "did not come back", "does not answer", "Not tried again before", options=("--docker-timeout", "6"))
    unmoved(docker, 2)
    # however long ago it was, unless somebody changes something
    path = docker.host.state / "agent/docker.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"at": time.time() - 7200, "times": 1}))
    refused(docker, "did not come back", f"touch {docker.config}")
    assert docker.restarts() == 2
    docker.touch()
    assert docker.once().returncode == 0 and docker.on("kbr0")


def test_a_docker_that_does_not_come_back_at_all_is_told(calm: Calm) -> None:
    _, docker = calm
    docker.misbehave("no-start")
    refused(docker, "refused by the test", "nor did dockerd come back")
    assert docker.config.read_text() == PLAIN and docker.restarts() == 2 and not docker.alive()


def test_the_mesh_is_kept_up_while_docker_restarts(calm: Calm) -> None:
    _, docker = calm
    host = docker.host
    docker.misbehave("hang")
    host.start_agent("--docker", "replace", *docker.options, "--docker-timeout", "8")
    until("the restart", lambda: docker.restarts() == 1)
    host.run(["ip", "route", "del", "10.97.2.0/24"])
    until("the repair", lambda: "10.97.2.0/24 via" in host.run(["ip", "route"]).stdout, 5.0)
    assert "moves to another bridge" in host.ovsmesh("status").stdout
    assert host.ready() is False
    until("the way back", lambda: docker.config.read_text() == PLAIN)
    until("the reason", lambda: "did not end in 8 s" in host.ovsmesh("status").stdout)
    unmoved(docker, 1)


def test_a_full_disk_leaves_all_as_it_was(calm: Calm) -> None:
    _, docker = calm
    file = json.dumps({"labels": [f"n{n}=" + "x" * 40 for n in range(120)]})
    small = ["mount", "-t", "tmpfs", "-o", "size=8k", "none"]
    for place in (docker.config.parent, docker.host.state / "agent"):
        kept = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
        subprocess.run([*small, str(place)], check=True)
        try:
            if place == docker.config.parent:
                docker.again(file)
            else:
                (place / "big").write_bytes(b"x" * 8192)
            done = docker.once()
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
            assert "No space left" in done.stderr, done.stderr
            text = file if place == docker.config.parent else PLAIN
            unmoved(docker, file=text)
            assert [p.name for p in docker.config.parent.iterdir()] == ["daemon.json"]
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
        for name, data in kept.items():
            (place / name).write_bytes(data)
        docker.calm()


def test_a_link_stays_a_link(calm: Calm) -> None:
    _, docker = calm
    real = docker.dir / "real.json"
    real.write_text('{"debug": false}\n')
    docker.config.unlink()
    docker.config.symlink_to("../real.json")
    done = docker.once()
    assert done.returncode == 0, done.stderr
    assert docker.config.is_symlink() and json.loads(real.read_text())["bridge"] == "kbr0"
    assert docker.on("kbr0")


def test_a_right_file_is_not_enough(calm: Calm) -> None:
    """dockerd takes SIGHUP and goes on as before: only a restart moves it."""
    _, docker = calm
    docker.configure('{"bridge": "kbr0", "mtu": 1462, "ipv6": true, "fixed-cidr-v6": "fd00:97:1::/64"}')
    os.kill(docker.pid(), signal.SIGHUP)
    before = docker.config.read_bytes()
    assert docker.bridge() == "docker0"
    done = docker.once()
    assert done.returncode == 0, done.stderr
    assert docker.on("kbr0") and docker.restarts() == 1 and docker.config.read_bytes() == before
    assert "docker0" not in links(docker.host)


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_an_agent_that_is_killed_amid_the_switch_is_gone_on_from(calm: Calm, moment: int) -> None:
    _, docker = calm
    host = docker.host
    docker.misbehave("slow")
    state = host.state / "agent"
    reached: Callable[[], bool] = [
        lambda: (state / "daemon.json.old").exists(),
        lambda: "kbr0" in docker.config.read_text(),
        lambda: docker.restarts() == 1,
        lambda: not docker.alive(),
    ][moment]
    host.start_agent("--docker", "replace", *docker.options)
    end = time.monotonic() + SOON
    while not reached():
        assert time.monotonic() < end
    host.stop_agent(signal.SIGKILL)
    if moment % 2:
        # the next agent goes on
        done = docker.once(timeout=100)
        assert done.returncode == 0, done.stderr
        assert docker.on("kbr0") and json.loads(docker.config.read_text())["bridge"] == "kbr0"
    else:
        # or somebody gives it up
        done = host.ovsmesh("cleanup", timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        assert docker.config.read_text() == PLAIN
        until("Docker on docker0", lambda: docker.on("docker0"))
        assert not (state / "docker.json").exists()
        assert host.ovsmesh("agent", "--once", "--docker", "off", timeout=60).returncode == 0
