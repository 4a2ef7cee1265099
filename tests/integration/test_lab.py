"""The lab itself: it can be trusted to say what packets did, and it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab, end_orphans
from ovsmesh.lab.netns import LabError
from ovsmesh.lab.ping import ping
from ovsmesh.lab.state import left_of, names

REPOSITORY = Path(__file__).resolve().parents[2]
Make = Callable[..., Lab]


def ovsmesh(*args: str, timeout: float = 200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ovsmesh", "lab", *args]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Lab:
    return module_lab(2, 2, dual_stack=True)


@pytest.mark.lab
def test_every_pod_reaches_every_pod_once(two: Lab) -> None:
    tracks = two.ping_matrix(count=5)
    assert len(tracks) == 4 * 3 * 2
    assert [(t.pair, t.lost, t.duplicates, t.strays) for t in tracks if t.lost or t.duplicates or t.strays] == []


@pytest.mark.lab
def test_another_process_finds_the_lab_by_its_name(two: Lab) -> None:
    assert Lab.open(two.name).settings == two.settings
    done = ovsmesh("ping", "--name", two.name, "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {cell["lost"] for cell in json.loads(done.stdout)} == {0}
    assert ovsmesh("exec", "--name", two.name, "h1p1", "--", "ping", "-c1", "10.97.2.2").returncode == 0


@pytest.mark.lab
def test_a_packet_delivered_twice_is_counted(two: Lab) -> None:
    source, target, host = two.pod(1, 1), two.pod(2, 1), two.host(1)

    def opened() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind(("vp1", 0))
        sock.settimeout(5)
        return sock

    with netns.within(host.ns, opened) as wire, two.stream([two.pair(source, target)], 0.02) as stream:
        assert stream.wait(time.time(), 5)
        frame = b""
        # an echo reply on its way to the pod: EtherType IPv4, protocol ICMP, type 0
        while not (frame[12:14] == b"\x08\x00" and frame[23:24] == b"\x01" and frame[34:35] == b"\x00"):
            frame = wire.recv(2048)
        wire.send(frame)
        assert stream.wait(time.time(), 5)
    assert (stream.tracks[0].duplicates, stream.tracks[0].lost) == (1, 0)


@pytest.mark.lab
def test_an_outage_is_measured_by_the_packets_it_cost(two: Lab) -> None:
    host, pair = two.host(2), two.pair(two.pod(1, 1), two.pod(2, 1))
    with two.stream([pair], 0.002) as stream:
        assert stream.wait(time.time(), 5)
        start = time.time()
        netns.ip_batch(["link set vp1 down"], host.ns)
        time.sleep(0.2)
        before_up = time.time()
        netns.ip_batch(["link set vp1 up"], host.ns)
        assert stream.wait(time.time(), 5, run=10)
        end = time.time()
    (outage,) = stream.tracks[0].outages(start)
    assert start <= outage.start <= before_up <= outage.end <= end
    assert outage.lost == sum(outage.start <= at < outage.end for at in stream.tracks[0].sent) > 1


@pytest.mark.lab
def test_full_size_packets_fit_and_one_byte_more_does_not(two: Lab) -> None:
    pair = two.pair(two.pod(1, 1), two.pod(2, 1))
    assert ping([pair], 2, size=1462, df=True)[0].lost == 0
    assert ping([pair], 2, size=1463, df=True, timeout=0.3)[0].lost == 2


@pytest.mark.lab
def test_a_capture_sees_every_encapsulated_frame(two: Lab) -> None:
    pair = two.pair(two.pod(1, 1), two.pod(2, 1))
    with two.host(1).capture() as capture:
        assert ping([pair], 50)[0].lost == 0
    assert capture.inner[0x0800] == 100
    assert capture.missed == 0
    assert (capture.broadcast, capture.multicast) == (0, 0)


@pytest.mark.lab
def test_ping_says_which_pair_fails_and_exits_1(two: Lab) -> None:
    netns.ip_batch(["link set vp2 down"], two.host(2).ns)
    done = ovsmesh("ping", "--name", two.name, "--count", "1")
    netns.ip_batch(["link set vp2 up"], two.host(2).ns)
    assert done.returncode == 1
    assert "h1p1 → h2p2" in done.stdout and "lost" in done.stdout


@pytest.mark.lab
def test_two_labs_do_not_touch_each_other(two: Lab, lab: Make) -> None:
    other = lab(2, 1)
    assert [t.lost for t in other.ping_matrix()] == [0, 0]
    assert other.down().ok
    assert sum(t.lost for t in two.ping_matrix()) == 0
    with pytest.raises(LabError, match="exists already"):
        Lab(2, 1, name=two.name, datapath=two.settings.datapath).up()
    assert all(host.agent_alive() for host in two.hosts)


@pytest.mark.lab
def test_a_host_joins_and_leaves(lab: Make) -> None:
    made = lab(2, 1)
    host = made.add_host()
    assert host.name == "h3"
    assert sum(t.lost for t in made.ping_matrix()) == 0
    made.remove_host(3)
    made.converged(thorough=True)
    assert "gre-h3" not in made.host(1).ovs_vsctl("list-ports", "obr0")
    assert not host.state.exists()


DIE_AT = """
import os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from ovsmesh.lab.lab import Lab
left = int(sys.argv[2])
def step(name):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return nullcontext()
Lab(3, 1, name=sys.argv[1], base=Path(sys.argv[3]), ephemeral=True, step=step).up()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.lab
@pytest.mark.parametrize("steps", range(5))
def test_a_lab_whose_maker_was_killed_is_ended_with_nothing_left(lab_machine: None, steps: int, tmp_path: Path) -> None:
    name = f"k{os.getpid()}-{steps}"
    # a base of its own: other test runs on this machine end orphans in the usual one
    base = Path("/run") / f"ovsmesh-{name}"
    script = tmp_path / "die.py"
    script.write_text(DIE_AT)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    try:
        done = subprocess.run([sys.executable, str(script), name, str(steps), str(base)], env=env, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert names(base) == [name]
        assert [proof.ok for proof in end_orphans(base)] == [True]
        assert left_of(base, name) == ()
        assert not [ns for ns in netns.namespaces() if ns.startswith(f"{name}-")]
    finally:
        for left in names(base):
            Lab.open(left, base).down()
        base.rmdir()


@pytest.mark.lab
def test_twenty_hosts(lab_machine: None) -> None:
    done = ovsmesh("run", "--name", f"m{os.getpid()}", "--hosts", "20", "--pods", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "380 of 380 pairs answered; 1140 packets, 0 lost, 0 twice" in done.stdout
    assert "left: 0 processes, 0 namespaces, 0 files" in done.stdout


@pytest.mark.lab
def test_the_demo_repairs_everything(lab_machine: None) -> None:
    done = ovsmesh("demo", "--name", f"d{os.getpid()}", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in (
        "GRE port deleted",
        "route deleted",
        "flow table emptied",
        "vswitchd killed",
        "host joins",
        "host leaves",
    ):
        assert fault in done.stdout
    assert "left: 0 processes, 0 namespaces, 0 files" in done.stdout
