"""`ovsmesh history` and `ovsmesh bundle` on real hosts: what happened is told, also with everything dead."""

from __future__ import annotations

import json
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.lab.faults import fault, tunnel
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, live

pytestmark = pytest.mark.lab
SECRET = "hunter2-S3cr3t"


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    made = module_lab(3, 1)
    at_rest(made)
    return made


def history(host: Host, *options: str) -> list[dict[str, Any]]:
    done = host.ovsmesh("history", "-o", "json", *options)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["entries"])


def last(host: Host, event: str) -> dict[str, Any]:
    return [entry for entry in history(host) if entry["event"] == event][-1]


def test_it_begins_with_the_start_and_says_that_the_node_is_in_sync(three: Lab) -> None:
    found = history(three.host(1))
    assert found[0]["event"] == "start" and "node h1, mesh from " in found[0]["what"]
    assert found[0]["what"].endswith(", 2 peers")
    assert last(three.host(1), "in-sync")["what"].startswith("in sync with 2 peers (mesh ")


def test_drift_is_told_in_words_with_the_time_until_it_was_repaired(three: Lab) -> None:
    host = three.host(1)
    host.run(["ip", "route", "del", str(three.host(2).pod_cidrs[0]), "dev", "kbr0"])
    wait_for("the drift to be told", lambda: [e for e in history(host) if e["event"] == "drift"], SOON)
    entry = last(host, "drift")
    assert entry["what"].startswith(f"route {three.host(2).pod_cidrs[0]} was deleted by ")
    assert 0 < entry["took"] < 60
    text = host.ovsmesh("history", "--since", "10m").stdout
    assert f"route {three.host(2).pod_cidrs[0]} was deleted by " in text and "; restored after " in text
    assert entry["what"] in host.agent_log.read_text()


def test_a_process_that_drifts_and_still_runs_is_named(three: Lab) -> None:
    host, cidr = three.host(1), str(three.host(2).pod_cidrs[0])
    before = len(history(host))
    argv = ["ip", "netns", "exec", host.ns, "ip", "-batch", "-"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(f"route del {cidr} dev kbr0\n")
        process.stdin.flush()
        wait_for("the drift to be told", lambda: [e for e in history(host)[before:] if e["event"] == "drift"], SOON)
        entry = last(host, "drift")
    assert entry["what"].startswith(f"route {cidr} was deleted by someone")
    assert entry["who"] == f"ip, pid {process.pid}"
    before = len(history(host))
    host.run(["nft", "flush", "chain", "inet", "ovsmesh", "postrouting"])
    wait_for("the drift to be told", lambda: [e for e in history(host)[before:] if e["event"] == "drift"], SOON)
    assert last(host, "drift")["who"].startswith("nft, pid ")


def test_a_peer_that_is_cut_off_and_comes_back_is_told_with_the_cause(three: Lab) -> None:
    one, _, third = three.hosts
    ok = lambda: all(peer["state"] == "ok" for peer in live(one)["peers"])  # noqa: E731
    wait_for("all to be reachable", ok, SOON)
    with fault(three, f"{tunnel(one, third)} drop", f"{tunnel(third, one)} drop"):
        wait_for("the loss to be told", lambda: [e for e in history(one) if e["event"] == "lost"], SOON)
        assert last(one, "lost")["what"].startswith("h3 unreachable: nothing arrives from it")
        assert last(one, "degraded")["what"] == "degraded: 1 of 2 peers not reachable: h3"
    wait_for("the return to be told", lambda: history(one)[-1]["event"] == "in-sync", SOON)
    assert last(one, "reachable")["what"] == "h3 is reachable again" and last(one, "reachable")["took"] > 0


def test_it_survives_a_restart_and_tells_a_kill_from_a_stop(three: Lab) -> None:
    host = three.host(2)
    before = len(history(host))
    host.stop_agent()
    assert last(host, "stop")["what"].endswith("what is in place stays")
    host.start_agent()
    wait_for("the start to be told", lambda: len(history(host)) > before + 1, SOON)
    assert "was not stopped" not in last(host, "start")["what"]
    host.stop_agent(signal.SIGKILL)
    host.start_agent()
    wait_for("the start to be told", lambda: [e["event"] for e in history(host)].count("start") == 3, SOON)
    assert "was not stopped" in last(host, "start")["what"]


def test_the_log_has_zones_and_no_python(three: Lab) -> None:
    for line in three.host(1).agent_log.read_text().splitlines():
        assert line[:10].count("-") == 2 and line[23] in "+-" and line[26] == ":", line
        assert "('" not in line and "',)" not in line, line


# the bundle


def bundle(host: Host, folder: Path) -> dict[str, str]:
    target = folder / "bundle.tar.gz"
    done = host.ovsmesh("bundle", "-o", str(target), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("look through it before you send it")
    with tarfile.open(target) as tar:
        found = {}
        for member in tar.getmembers():
            content = tar.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read().decode()
    return found


def test_a_bundle_has_what_a_maintainer_asks_for_and_no_secret(three: Lab, tmp_path: Path) -> None:
    host = three.host(1)
    host.ovs_vsctl("set", "bridge", "obr0", f"external_ids:password={SECRET}", f"external_ids:note={SECRET}")
    secret_set = f'type ipv4_addr\n comment "{SECRET}"\n elements = {{ 203.0.113.77 }}\n'
    host.run(["nft", "-f", "-"], text=f"table ip other {{\n set s {{\n {secret_set} }}\n}}\n")
    host.run(["ip", "link", "set", "eth0", "alias", SECRET])
    try:
        found = bundle(host, tmp_path)
    finally:
        host.ovs_vsctl("remove", "bridge", "obr0", "external_ids", "password", "note")
        host.run(["nft", "delete", "table", "ip", "other"])
        host.run(["ip", "link", "set", "eth0", "alias", ""])
    assert not [name for name, text in found.items() if SECRET in text or "203.0.113.77" in text]
    assert "n_packets=" in found["ovs/flows.txt"] and "gre-h2" in found["ovs/show.txt"]
    assert json.loads(found["status.json"])["self"]["name"] == json.loads(found["agent/status.json"])["self"]["name"]
    assert "ovsmesh_converged 1" in found["agent/metrics.txt"] and "nothing to change" in found["plan.txt"]
    assert "table inet ovsmesh" in found["filter/nft.txt"] and "elements = {" in found["filter/nft-ovsmesh-inet.txt"]
    assert str(three.host(2).pod_cidrs[0]) in found["network/routes.txt"] and "kbr0" in found["network/links.txt"]
    assert json.loads(found["history.jsonl"].splitlines()[0])["event"] == "start"
    assert "net/ipv4/ip_forward = 1" in found["network/sysctls.txt"] and "h3" in found["mesh/file.json"]
    rows = [json.loads(line) for line in found["ovs/Interface.jsonl"].splitlines()]
    assert {"remote_ip", "local_ip"} <= next(set(row["options"]) for row in rows if row["name"] == "gre-h2")


def test_a_bundle_with_the_agent_and_the_switch_dead(three: Lab, tmp_path: Path) -> None:
    host = three.host(3)
    host.stop_agent(signal.SIGKILL)
    host.kill_vswitchd()
    host.kill_ovsdb()
    found = bundle(host, tmp_path)
    assert "agent/status.json" not in found and "ovs/flows.txt" not in found
    assert "(agent/status.json)" in found["MANIFEST.txt"] and "does not answer" in found["MANIFEST.txt"]
    assert "h1" in found["mesh/last-good.json"] and "start" in found["history.jsonl"] and "h3" in found["status.txt"]
    assert str(three.host(1).pod_cidrs[0]) in found["network/routes.txt"]
