"""scripts/bootstrap.sh on a fresh Debian with a real systemd: from nothing to a node of the mesh.

The tests go through one machine's life in the order in which they stand. Its peer is a host of a lab.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from ovsmesh.lab import netns, underlay
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError, wait_for
from tests.support import built
from tests.support.debian import DebianError
from tests.support.labtools import Make, difference
from tests.support.systemd_container import ROOT, Machine

pytestmark = pytest.mark.lab

SCRIPT = "/root/dist/bootstrap.sh"
ARGS = ("--from", "/root/dist/wheels", "--mesh", "/root/mesh.yaml")
NEW = ("etc/default/ovsmesh", "etc/systemd/system/ovsmesh-agent.service", "usr/local/bin/ovsmesh")
_RESTLESS = (
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    ".old",
    "var/log",
    "var/tmp",
    "var/cache/apt",
    "var/lib/systemd",
    "var/lib/libuuid",
    "var/lib/ovsmesh",
)
"""What a machine and the agent write by themselves."""


class Stage(NamedTuple):
    lab: Lab
    peer: Host
    me: Host
    machine: Machine

    def bootstrap(self, *args: str) -> subprocess.CompletedProcess[str]:
        done = self.machine.run(SCRIPT, *(args or ARGS), check=False, timeout=500)
        if done.returncode:
            print(self.machine.journal())
        return done

    def main_pid(self) -> int:
        return int(self.machine.show("ovsmesh-agent", "MainPID"))

    def all_answer(self) -> None:
        self.me.plug()
        self.lab.warm_up()
        assert [track.pair for track in self.lab.ping_matrix() if track.lost] == []


@pytest.fixture(scope="module")
def stage(module_lab: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    try:
        archive, dist = built.machine()
    except (LabError, DebianError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no image of a fresh Debian: {error}")
    tmp = tmp_path_factory.mktemp("machine")
    lab = module_lab(1, 1)
    # a host of which there is nothing but its cable, and which is in the mesh
    lab.settings = replace(lab.settings, hosts=(1, 2))
    me = lab.host(2)
    underlay.join(lab.settings, [me])
    lab.write_mesh()
    machine = Machine(archive, tmp / "root", me.ns, "192.0.2.12/24")
    try:
        shutil.copytree(dist, machine.root / "root/dist")
        shutil.copy(lab.mesh_file, machine.root / "root/mesh.yaml")
        machine.start()
        yield Stage(lab, lab.host(1), me, machine)
    finally:
        machine.end()


def tree(root: Path) -> dict[str, tuple[int, ...]]:
    """Every file that only someone's doing changes."""
    found = {}
    for path, folders, files in os.walk(root):
        here = os.path.relpath(path, root)
        folders[:] = [f for f in folders if os.path.normpath(f"{here}/{f}") not in _RESTLESS]
        for name in (*folders, *files):
            about = os.lstat(os.path.join(path, name))
            # a folder's own time changes with what is put beside and taken away again
            more = () if os.path.isdir(os.path.join(path, name)) else (about.st_size, about.st_mtime_ns, about.st_ino)
            found[os.path.normpath(f"{here}/{name}")] = (about.st_mode, about.st_uid, *more)
    return found


def network(machine: Machine) -> dict[str, str]:
    commands = ("ip -o link", "ip -o addr", "ip route show table all", "ip -6 route", "ip neigh show nud permanent")
    more = ("bridge fdb show", "nft -s list ruleset", "ovs-ofctl --no-stats dump-flows obr0", "ovs-vsctl show")
    return {command: machine.run(*command.split(), check=False).stdout for command in (*commands, *more)}


@pytest.fixture
def unchanged(stage: Stage) -> Iterator[None]:
    """The test leaves every file as it was."""
    before = tree(stage.machine.root)
    yield
    assert difference(before, tree(stage.machine.root)) == []


def test_the_scripts_are_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not there")
    netns.run(["shellcheck", str(ROOT / "scripts/bootstrap.sh")])


def test_the_unit_is_sound_and_gives_no_more_than_is_needed() -> None:
    unit = ROOT / "scripts/ovsmesh-agent.service"
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not there")
    # of 100, where 0 is a process that may do nothing
    done = netns.run(["systemd-analyze", "security", "--offline=true", "--threshold=31", str(unit)], check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("argv", [["--docker", "maybe"], ["--node", "a b"], ["--wait", "soon"], ["--mesh"], ["what"]])
def test_wrong_usage(argv: list[str]) -> None:
    done = netns.run([str(ROOT / "scripts/bootstrap.sh"), *argv], check=False)
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.usefixtures("unchanged")
def test_all_that_is_missing_is_said_at_once(stage: Stage) -> None:
    modules = next((stage.machine.root / "lib/modules").iterdir()) / "modules.builtin"
    text = modules.read_text()
    away, link = modules.with_suffix(".away"), stage.machine.root / "usr/local/bin/ovsmesh"
    modules.rename(away)
    link.write_text("someone else's")
    try:
        done = stage.bootstrap("--mesh", "/root/none.yaml", "--from", "/root")
    finally:
        away.rename(modules)
        link.unlink()
    assert done.returncode == 1 and modules.read_text() == text
    for words in (
        "module openvswitch",
        "module vport_gre",
        "/root/none.yaml",
        "ovsmesh-*.whl in /root",
        "/ovsmesh for",
    ):
        assert words in done.stderr, done.stderr


@pytest.mark.usefixtures("unchanged")
def test_a_dry_run_says_everything_and_changes_nothing(stage: Stage) -> None:
    done = stage.bootstrap(*ARGS, "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in ("openvswitch-switch", "modules-load.d", "/opt/ovsmesh/", *(f"/{name}" for name in NEW), "restart"):
        assert words in done.stderr, done.stderr


def test_killed_at_ten_random_moments_and_run_again(stage: Stage) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    print(f"SEED={seed}")
    dice = random.Random(seed)
    machine = stage.machine
    for number in range(5):
        # in the packages, and in the virtual environment
        moment = dice.uniform(0.3, 6.0)
        print(f"{moment:.2f} s: {machine.run_and_kill(moment, SCRIPT, *ARGS)}")
        if number % 2:
            machine.power_cut()
            machine.start()
    done = stage.bootstrap()
    assert done.returncode == 0, done.stdout + done.stderr
    for _ in range(5):
        # in what is quick
        for name in NEW:
            (machine.root / name).unlink(missing_ok=True)
        moment = dice.uniform(0.1, 2.5)
        print(f"{moment:.2f} s: {machine.run_and_kill(moment, SCRIPT, *ARGS)}")
    done = stage.bootstrap()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h2: converged, 1 peer" in done.stdout and "answers in" in done.stdout
    assert list(machine.root.glob("etc/**/*.ovsmesh-new")) == []
    assert len(list(machine.root.glob("opt/ovsmesh/*"))) == 1
    stage.all_answer()


def test_a_package_torn_by_a_power_cut_is_installed_again(stage: Stage) -> None:
    status = stage.machine.root / "var/lib/dpkg/status"
    # what dpkg notes between the files of a package and that they are whole
    torn = status.read_text().replace("Package: kmod\nStatus: install ok installed", _TORN)
    assert _TORN in torn
    status.write_text(torn)
    done = stage.bootstrap()
    assert done.returncode == 0 and "half installed" in done.stderr, done.stderr
    assert stage.machine.run("dpkg", "--audit").stdout == ""


_TORN = "Package: kmod\nStatus: install reinstreq unpacked"


@pytest.mark.usefixtures("unchanged")
def test_a_second_run_changes_nothing(stage: Stage) -> None:
    before, pid = network(stage.machine), stage.main_pid()
    done = stage.bootstrap()
    assert done.returncode == 0 and "nothing to change" in done.stderr and "answers in" in done.stdout, done.stderr
    assert difference(before, network(stage.machine)) == [] and stage.main_pid() == pid


@pytest.mark.usefixtures("unchanged")
def test_a_peer_that_does_not_answer_is_named_and_told_from_a_fault_of_this_host(stage: Stage) -> None:
    hub, rule = underlay.hub(stage.lab.settings), "ip protocol gre drop"
    table = f"table bridge cut {{ chain c {{ type filter hook forward priority 0; {rule}; }}; }}"
    netns.run(["nft", "-f", "-"], hub, text=table)
    try:
        done = stage.bootstrap()
    finally:
        netns.run(["nft", "delete table bridge cut"], hub)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "h1 192.0.2.11: unreachable: nothing arrives from it" in done.stdout, done.stdout
    assert "If this is the first host" in done.stdout and "this host is a node and its agent runs" in done.stderr


def test_the_agent_has_three_capabilities_and_says_how_it_is(stage: Stage) -> None:
    status = Path(f"/proc/{stage.machine.outer(stage.main_pid())}/status").read_text()
    net_admin, net_raw, sys_ptrace = 12, 13, 19
    bounds = 1 << net_admin | 1 << net_raw | 1 << sys_ptrace
    assert f"CapBnd:\t{bounds:016x}\n" in status and "NoNewPrivs:\t1\n" in status
    assert stage.machine.show("ovsmesh-agent", "StatusText") == "1 peer, converged"
    assert "EPERM" not in stage.machine.journal("ovsmesh-agent") and "denied" not in stage.machine.journal(
        "ovsmesh-agent"
    )
    # what it is not given it would need: a filter that may drop, and all else that it writes
    stage.machine.run("iptables", "-P", "FORWARD", "DROP")
    wait_for("the mesh to be let through", lambda: "ovsmesh:" in stage.machine.run("iptables", "-S").stdout, 60)
    stage.all_answer()
    stage.machine.run("iptables", "-P", "FORWARD", "ACCEPT")


def test_what_the_unit_lets_its_process_do_and_what_not(stage: Stage) -> None:
    machine = stage.machine
    units = machine.root / "etc/systemd/system"
    other, probe, script = units / "other.service", units / "probe.service", machine.root / "probe.sh"
    other.write_text("[Service]\nExecStart=sleep 1000\n")
    script.write_text(_PROBE)
    text = (units / "ovsmesh-agent.service").read_text().replace("Type=notify", "Type=oneshot\nTimeoutStartSec=30")
    text = re.sub("(?m)^ExecStart=.*", "ExecStart=sh /probe.sh", text).replace("Restart=always", "")
    probe.write_text(text.replace("WatchdogSec=180", ""))
    said = machine.root / "var/lib/ovsmesh/probe"
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "other")
        first = machine.show("other", "MainPID")
        machine.run("systemctl", "start", "probe", check=False)
        wanted = "etc-docker:yes run:yes etc:no home:no tmp:no ns:yes restart:yes mknod:no"
        assert said.read_text().split() == wanted.split()
        assert machine.show("other", "MainPID") not in ("0", first)
    finally:
        machine.run("systemctl", "stop", "other", "probe")
        for path in (other, probe, script, said, machine.root / "etc/docker/probe"):
            path.unlink(missing_ok=True)
        machine.run("rm", "-f", "/run/openvswitch/probe", "/tmp/probe")
        machine.run("systemctl", "daemon-reload")


_PROBE = """\
exec >/var/lib/ovsmesh/probe
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name:yes"; else echo "$name:no"; fi; }
echo x >/tmp/probe
try etc-docker touch /etc/docker/probe
try run touch /run/openvswitch/probe
try etc touch /etc/probe
try home ls /root/dist
try tmp ls /proc/1/root/tmp/probe
try ns readlink /proc/1/ns/net
try restart systemctl restart other
try mknod mknod /var/lib/ovsmesh/null c 1 3
"""


def test_a_loop_that_makes_no_progress_is_killed_and_started_again(stage: Stage) -> None:
    machine = stage.machine
    drop_in = "mkdir -p /run/systemd/system/ovsmesh-agent.service.d; printf '[Service]\\nWatchdogSec=20\\n'"
    machine.run("sh", "-c", f"{drop_in} >/run/systemd/system/ovsmesh-agent.service.d/test.conf")
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", "ovsmesh-agent")
        first = stage.main_pid()
        # for longer than the watchdog has patience, it runs on by its own beats
        with pytest.raises(LabError):
            wait_for("another agent", lambda: stage.main_pid() != first, 25, every=0.1)
        machine.run("kill", "-STOP", str(first))
        wait_for("another agent", lambda: stage.main_pid() not in (0, first), 100, every=0.1)
        assert "watchdog" in machine.journal("ovsmesh-agent").lower()
        wait_for("it to be ready", lambda: machine.show("ovsmesh-agent", "StatusText") == "1 peer, converged", 60)
    finally:
        machine.run("rm", "-r", "/run/systemd/system/ovsmesh-agent.service.d")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", "ovsmesh-agent")


def test_an_upgrade_loses_no_packet_and_leaves_one_version(stage: Stage) -> None:
    stage.all_answer()
    machine = stage.machine
    wheel = next((machine.root / "root/dist/wheels").glob("ovsmesh-*.whl"))
    with zipfile.ZipFile(wheel, "a") as archive:
        # another file, the same program
        archive.comment = b"a newer one"
    before, pid = list(machine.root.glob("opt/ovsmesh/*")), stage.main_pid()
    with stage.lab.stream() as stream:
        # as the documents have it: what it was told before stands on the host
        done = stage.bootstrap("--from", "/root/dist/wheels")
    assert done.returncode == 0, done.stderr
    assert [track.pair for track in stream.tracks if track.lost] == []
    after = list(machine.root.glob("opt/ovsmesh/*"))
    assert len(after) == 1 and after != before and stage.main_pid() != pid


def reach(stage: Stage, address: str) -> bool:
    """Whether the container answers to a host of the mesh, in packets of the full size."""
    size = str(1462 - 28)
    return (
        netns.run(["ping", "-c1", "-W1", "-Mdo", "-s", size, address], stage.lab.pod(1, 1).ns, check=False).returncode
        == 0
    )


def container(stage: Stage) -> str:
    said = stage.machine.run(
        "docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "c1", check=False
    ).stdout.strip()
    return said if said.startswith("10.97.2.") else ""


def back(stage: Stage) -> None:
    """Waits until Docker has started the container again and it is reached."""
    try:
        wait_for("the container to be reached", lambda: reach(stage, container(stage)), 60)
    except LabError:
        for command in ("docker ps -a", "ip addr", "ip neigh", "journalctl -n 60 --no-pager -u docker -u containerd"):
            print(f"--- {command}", stage.machine.run(*command.split(), check=False).stdout, sep="\n")
        raise


def reboot(stage: Stage) -> None:
    """A power cut, and what a network namespace keeps where a machine does not."""
    ns = stage.me.ns
    stage.machine.power_cut()
    netns.run(["sh", "-c", "iptables -F; iptables -t nat -F; ip route flush proto 111; ip link del kbr0"], ns)
    for family in ("inet", "bridge"):
        # the second boot may have had no agent
        netns.run(["nft", "delete", "table", family, "ovsmesh"], ns, check=False)
    netns.sysctl(ns, {"net/ipv4/ip_forward": "0"})
    stage.machine.start()


def test_docker_moves_and_after_a_reboot_all_is_back(stage: Stage) -> None:
    machine, ns = stage.machine, stage.me.ns
    # Docker knows nothing of the pod that was plugged in beside it, and gives out its address first, under another MAC.
    # The kernel believes its entry of a pod that has just answered for up to 45 s: who unplugs one by hand removes it.
    stage.all_answer()
    netns.run(["ip", "link", "del", "vp1"], ns)
    netns.run(["ip", "neigh", "flush", "dev", "kbr0"], ns)
    machine.run("sh", "-c", "tar -C /bin -c busybox | docker import - box")
    kept = ["--name", "c1", "--restart", "always", "--stop-signal", "KILL"]
    machine.run("docker", "run", "-d", *kept, "box", "/busybox", "sleep", "100000")
    done = stage.bootstrap(*ARGS, "--docker", "replace")
    assert done.returncode == 0, done.stdout + done.stderr
    back(stage)

    reboot(stage)
    wait_for("the agent to be ready", lambda: machine.show("ovsmesh-agent", "StatusText") == "1 peer, converged", 60)
    back(stage)
    agent, docker = (int(machine.show(unit, "ActiveEnterTimestampMonotonic")) for unit in ("ovsmesh-agent", "docker"))
    assert 0 < agent < docker

    # a host whose agent does not start: dockerd is never started without kbr0, and the agent takes that one over later
    machine.run("systemctl", "disable", "ovsmesh-agent")
    reboot(stage)
    wait_for("Docker", lambda: machine.run("docker", "ps", "-q", check=False).stdout.strip(), 60)
    assert container(stage) and "10.97.2.1/24" in machine.run("ip", "-br", "addr", "show", "kbr0").stdout
    pid = machine.show("docker", "MainPID")
    machine.run("systemctl", "enable", "--now", "ovsmesh-agent")
    wait_for("the agent to be ready", lambda: machine.show("ovsmesh-agent", "StatusText") == "1 peer, converged", 60)
    back(stage)
    assert machine.show("docker", "MainPID") == pid and machine.show("docker", "NRestarts") == "0"
    machine.run("docker", "rm", "-f", "c1")


def test_a_host_that_cannot_be_a_node_is_told_why_and_not_touched(stage: Stage) -> None:
    machine = stage.machine
    bad = (machine.root / "root/mesh.yaml").read_text().replace("192.0.2.12", "192.0.2.99")
    (machine.root / "root/bad.yaml").write_text(bad)
    before = tree(machine.root)
    machine.run("ip", "route", "add", "10.97.1.128/25", "via", "192.0.2.1")
    try:
        done = stage.bootstrap("--from", "/root/dist/wheels", "--mesh", "/root/bad.yaml")
    finally:
        machine.run("ip", "route", "del", "10.97.1.128/25")
    assert done.returncode == 1
    assert "192.0.2.99 is on no link" in done.stderr and "10.97.1.128/25 dev br-phy (of h1)" in done.stderr, done.stderr
    assert difference(before, tree(machine.root)) == []


@pytest.mark.usefixtures("unchanged")
def test_without_systemd_it_says_what_to_run(stage: Stage) -> None:
    hidden = 'mount -t tmpfs tmpfs /run/systemd && exec "$0" "$@"'
    done = stage.machine.run("unshare", "-m", "sh", "-c", hidden, SCRIPT, *ARGS, check=False)
    assert done.returncode == 1 and "no systemd" in done.stderr
    assert "ovsmesh agent --mesh /etc/ovsmesh/mesh.yaml --node h2" in done.stderr


def test_for_kubernetes_it_makes_ready_and_starts_no_agent(stage: Stage) -> None:
    done = stage.bootstrap("--kubernetes")
    assert done.returncode == 0, done.stderr
    assert "bridge-nf-call-iptables = 1" in (stage.machine.root / "etc/sysctl.d/60-ovsmesh.conf").read_text()
    again = stage.bootstrap("--kubernetes")
    assert again.returncode == 0 and "nothing to change" in again.stderr
    assert stage.bootstrap("--kubernetes", "--mesh", "/m").returncode == 2


def test_what_the_documents_say_removes_all(stage: Stage) -> None:
    machine = stage.machine
    text = (ROOT / "docs/operations.md").read_text().partition("**Docker hosts** (`cleanup`")[2]
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert commands[1] == "ovsmesh cleanup" and commands[5].startswith("apt-get purge")
    said = machine.run("sh", "-e", "-c", "\n".join(commands[:5])).stdout
    assert "nothing of ovsmesh is left" in said
    assert (
        "docker0" in machine.run("ip", "-br", "link").stdout and not (machine.root / "etc/docker/daemon.json").exists()
    )
    places = ("etc", "opt", "usr/local", "var/lib")
    found: Callable[[str], Iterator[Path]] = lambda place: (machine.root / place).rglob("*ovsmesh*")  # noqa: E731
    assert [path for place in places for path in found(place)] == []
