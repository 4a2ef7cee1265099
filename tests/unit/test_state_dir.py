"""The state directory: written whole or not at all, one agent at a time, and garbage in it does no harm."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import StateDir, read_regular, write_atomic

GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"null",
    b"\xff\xfe",
    b'{"a":',
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b"\0" * 64,
]


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "deep" / "state")
    made.ensure()
    return made


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "one")
    write_atomic(path, b"two", mode=0o640, sync=False)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_leaves_the_old_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_write_atomic_replaces_a_link_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "file").symlink_to("target")
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "file").is_symlink()


def test_read_regular_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * 100)
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        cases = {
            tmp_path: errno.EISDIR,
            tmp_path / "fifo": errno.EINVAL,
            tmp_path / "socket": errno.EINVAL,
            tmp_path / "large": errno.EFBIG,
            tmp_path / "loop": errno.ELOOP,
            tmp_path / "none": errno.ENOENT,
            Path("/dev/zero"): errno.EINVAL,
        }
        began = time.monotonic()
        for path, code in cases.items():
            with pytest.raises(OSError) as error:
                read_regular(path, limit=99)
            assert error.value.errno == code, path
    assert time.monotonic() - began < 1


def test_directory_is_private(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    state = StateDir(tmp_path / "s")
    state.ensure()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    (tmp_path / "f").write_text("")
    with pytest.raises(OvsmeshError, match="state directory"):
        StateDir(tmp_path / "f").ensure()


def test_lock_names_the_holder(state: StateDir) -> None:
    state.lock()
    other = StateDir(state.path)
    with pytest.raises(OvsmeshError, match=f"pid {os.getpid()}"):
        other.lock()
    (state.path / "agent.lock").write_bytes(b"\x1b[2Jnonsense")
    with pytest.raises(OvsmeshError, match="not in the lock file") as error:
        other.lock()
    assert str(error.value).isprintable()
    state.unlock()
    other.lock()
    other.unlock()


def test_lock_ends_with_its_process(state: StateDir) -> None:
    code = "import sys; from ovsmesh.state_dir import StateDir as S; s = S(sys.argv[1]); s.lock()"
    code += "; print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(state.path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(OvsmeshError, match=f"pid {child.pid}"):
            state.lock()
        child.kill()
        child.wait(timeout=10)
    state.lock()
    state.unlock()


def test_lock_does_not_follow_a_link(state: StateDir, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (state.path / "agent.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OvsmeshError, match=r"agent\.lock"):
        state.lock()
    assert (tmp_path / "victim").read_text() == "mine"


def test_before_keeps_the_first_value(state: StateDir) -> None:
    assert state.before() == ({}, ())
    assert state.remember({"net/ipv4/ip_forward": "0"}) == ()
    assert state.remember({"net/ipv4/ip_forward": "1", "net/ipv4/conf/kbr0/rp_filter": "2"}) == ()
    assert state.before()[0] == {"net/ipv4/ip_forward": "0", "net/ipv4/conf/kbr0/rp_filter": "2"}
    path = state.path / "before.json"
    stamp = path.stat().st_mtime_ns
    state.remember({"net/ipv4/ip_forward": "1"})
    assert path.stat().st_mtime_ns == stamp


def test_before_leaves_out_what_is_no_sysctl(state: StateDir) -> None:
    hostile = {
        "net/../../etc/passwd": "x",
        "/etc/passwd": "x",
        "net/ipv4/ip_forward": 1,
        "net/ipv4/tcp_mem": "1\n2",
        "net/ipv4/conf/all/forwarding": "0",
        "a": "b",
    }
    (state.path / "before.json").write_text(json.dumps(hostile))
    good, (problem,) = state.before()
    assert good == {"net/ipv4/conf/all/forwarding": "0"}
    assert "5 entries" in problem.message and not problem.fatal


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage(state: StateDir, garbage: bytes) -> None:
    for name in ("before.json", "agent.json", "status.json", "confirm"):
        (state.path / name).write_bytes(garbage)
    good, (problem,) = state.before()
    assert good == {} and "before.json" in problem.message and not problem.fatal
    assert state.agent() == {}
    with pytest.raises(OvsmeshError, match=r"status\.json"):
        state.status()
    assert state.confirmation() in (None, "3", "null")
    assert state.remember({"net/ipv4/ip_forward": "0"}) == (problem,)
    assert state.before() == ({"net/ipv4/ip_forward": "0"}, ())
    assert (state.path / "before.json.bad").read_bytes() == garbage


def test_agent_and_status(state: StateDir) -> None:
    assert state.agent() == {} and state.status() is None
    state.write_agent({"pid": 7, "listen": "127.0.0.1:9474"})
    state.write_status({"self": "web1"})
    assert state.agent()["pid"] == 7 and state.status() == {"self": "web1"}
    for name in ("agent.json", "status.json"):
        assert stat.S_IMODE((state.path / name).stat().st_mode) == 0o600


def test_remember_says_when_it_cannot(state: StateDir) -> None:
    (state.path / "before.json").mkdir()
    (state.path / "before.json" / "x").write_text("")
    (state.path / "before.json.bad").write_text("")
    *_, problem = state.remember({"net/ipv4/ip_forward": "0"})
    assert problem.reason == "StateUnwritable" and "net/ipv4/ip_forward" in problem.message and not problem.fatal


def test_confirm(state: StateDir) -> None:
    assert state.confirmation() is None
    state.request_confirm("deadbeef01")
    assert state.confirmation() == "deadbeef01"
    state.clear_confirmation()
    state.clear_confirmation()
    assert state.confirmation() is None
    for bad in ("", "a b", "x" * 200, "\x1b[2J"):
        with pytest.raises(OvsmeshError) as error:
            state.request_confirm(bad)
        assert str(error.value).isprintable()
    with pytest.raises(OvsmeshError, match="can't be written"):
        StateDir(state.path / "none").request_confirm("aa")
    state.confirm_file.write_bytes(b"x" * 2000)
    assert state.confirmation() is None


def test_remove_takes_only_ours(state: StateDir) -> None:
    state.lock()
    state.write_agent({})
    state.remember({"net/ipv4/ip_forward": "0"})
    (state.path / "theirs").write_text("x")
    assert state.remove() == [str(state.path / "theirs")]
    assert os.listdir(state.path) == ["theirs"]
    (state.path / "theirs").unlink()
    assert state.remove() == [] and not state.path.exists()
    assert state.remove() == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_anything_at_all(state: StateDir, data: bytes) -> None:
    for name in ("before.json", "agent.json", "status.json", "confirm"):
        (state.path / name).write_bytes(data)
    state.before()
    state.agent()
    state.confirmation()
    try:
        state.status()
    except OvsmeshError as error:
        assert str(error).isprintable()
