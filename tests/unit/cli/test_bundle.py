"""`ovsmesh bundle`: everything in one archive, no secret in it, bounded, whatever of the host is dead."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ovsmesh.agent.options import Options
from ovsmesh.bounded import Absent
from ovsmesh.cli import bundle
from ovsmesh.cli import main as cli
from ovsmesh.errors import OvsmeshError
from ovsmesh.history import Entry
from ovsmesh.state_dir import StateDir
from tests.support.meshtext import A, B, text_of

SECRET = "hunter2-S3cr3t"
"""Never a word of its own: each place is known by its form, or by what is taken from the source."""
PEM = f"-----BEGIN EC PRIVATE KEY-----\n{SECRET}\n-----END EC PRIVATE KEY-----"
LOG = f"""
2026-11-29T02:10:11+0000 h1 ovsmesh[1]: WARNING https://admin:{SECRET}@api.example:6443: no answer
2026-11-29T02:10:12+0000 h1 ovsmesh[1]: Authorization: Bearer {SECRET}
2026-11-29T02:10:13+0000 h1 ovsmesh[1]: password={SECRET} kept lines stay
{PEM}
"""
SHOW = f"""
    Bridge obr0
        Port gre-web2
            Interface gre-web2
                type: gre
                options: {{key="7", psk="{SECRET}", note={SECRET}, remote_ip="192.0.2.12"}}
"""
TABLE = json.dumps(
    {
        "headings": ["_uuid", "name", "options", "external_ids", "statistics", "lldp"],
        "data": [
            [
                ["uuid", "5ac0f3f2-6b2d-4d0c-8f0e-2f6f7f3f8f11"],
                "gre-web2",
                ["map", [["remote_ip", "192.0.2.12"], ["psk", SECRET]]],
                ["map", [["ovsmesh-node", "web2"], ["password", SECRET], ["note", SECRET]]],
                ["map", [["rx_packets", 7]]],
                ["map", [["x", SECRET]]],
            ]
        ],
    }
)
RULES = f"""table ip filter {{ # handle 1
	chain FORWARD {{
		ip saddr 10.0.0.1 counter packets 1 bytes 2 accept comment "{SECRET}" # handle 4
		ip saddr 10.0.0.2 counter packets 1 bytes 2 drop comment "ovsmesh x" # handle 5
"""
SAVED = f"""*filter
-A FORWARD -m comment --comment "{SECRET} for x" -j ACCEPT
-A FORWARD -m comment --comment {SECRET} -j ACCEPT
-A FORWARD -m comment --comment ovsmesh:forward-in:1a2b -j ACCEPT
"""
LINKS = (
    f"3: eth0: <UP> mtu 1500\n    link/ether 02:00:00:00:00:01\n    alias {SECRET}\n4: kbr0: <UP>\n    alias ovsmesh\n"
)
MESH = (
    text_of(A, B.replace("name: b", f"name: b, x-registry: {SECRET}"))
    + f"""  # {SECRET}
metadata:
  name: default
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {{"kind": "Secret", "data": "{SECRET}"}}
"""
)
DAEMON = {
    "bridge": "kbr0",
    "mtu": 1462,
    "proxies": {"http-proxy": f"http://bob:{SECRET}@proxy:3128"},
    "registry-mirrors": [f"https://{SECRET}@mirror"],
    "auths": {"reg": {"auth": SECRET}},
    "log-opts": {"splunk-token": SECRET},
    "default-gateway": f"http://bob:{SECRET}@proxy",
}
FAKES = {
    "journalctl": LOG,
    "ovs-vsctl": f"case $* in *show*) cat <<'X'\n{SHOW}\nX\n;; *version*) echo 3.1;; *) cat <<'X'\n{TABLE}\nX\n;; esac",
    "python": f"h1: all is well\nproblem with token: {SECRET}",
    "ovs-ofctl": " cookie=0x6f76736d, n_packets=3, priority=100,in_port=LOCAL actions=output:1",
    "ovs-appctl": f"lookups token: {SECRET}",
    "ovs-vswitchd": "ovs-vswitchd 3.1",
    "nft": RULES,
    "iptables-nft-save": SAVED,
    "ip": LINKS,
    "docker": f"name\nlog line with https://u:{SECRET}@x/",
    "dmesg": f"openvswitch: loaded\nopenvswitch: secret={SECRET}\nsome other module: {SECRET}",
    "systemctl": "ActiveState=active",
    "containerd": "containerd 1.6",
}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose commands and files hold secrets wherever one may be."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, said in FAKES.items():
        body = said if name == "ovs-vsctl" else f"cat <<'X'\n{said}\nX"
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(bundle, "_SBIN", "")
    monkeypatch.setattr("ovsmesh.cli.bundle.sys.executable", str(programs / "python"))
    monkeypatch.setenv("OVS_LOGDIR", str(tmp_path))
    monkeypatch.setenv("REGISTRY_PASSWORD", SECRET)
    monkeypatch.setattr("ovsmesh.cli.main.os.geteuid", lambda: 0)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [])
    (tmp_path / "ovs-vswitchd.log").write_text(LOG)
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "daemon.json").write_text(json.dumps(DAEMON))
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "10-other.conflist").write_text(SECRET)
    state = StateDir(tmp_path / "state")
    state.ensure()
    state.write_agent({"node": "web1", "kubeconfig": SECRET, "docker_restart": f"restart --key {SECRET}", "pid": 1})
    state.write_status({"problems": [["ApplyFailed", f"https://u:{SECRET}@x: no"]]})
    entry = Entry(1.0, "problem", f"token: {SECRET}", parts=(f"Bearer {SECRET}",))
    (state.path / "history.jsonl").write_text(json.dumps(entry.to_dict()) + "\n")
    state.mesh_file.write_text(MESH)
    return tmp_path


def given(host: Path) -> list[str]:
    return [
        *("--mesh", str(host / "mesh.yaml"), "--node", "web1", "--ovsdb", f"unix:{host}/db.sock", "--docker", "off"),
        *("--docker-config", str(host / "daemon.json"), "--cni-dir", str(host / "net.d")),
        *("--state-dir", str(host / "state")),
    ]


def files(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        found = {}
        for member in tar.getmembers():
            assert member.isfile() and member.mode == 0o600
            content = tar.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read().decode()
        return found


def invoke(*argv: str) -> Any:
    return CliRunner().invoke(cli.cli, ["bundle", *argv])


def test_no_planted_secret_is_in_the_archive_and_the_rest_is(host: Path) -> None:
    target = host / "out.tar.gz"
    done = invoke(*given(host), "-o", str(target))
    assert done.exit_code == 0, done.output
    found = files(target)
    assert not [name for name, text in found.items() if SECRET in text]
    assert "kept lines stay" in found["log/agent.txt"] and "<left out>" in found["log/agent.txt"]
    assert 'remote_ip="192.0.2.12"' in found["ovs/show.txt"] and 'key="7"' in found["ovs/show.txt"]
    row = json.loads(found["ovs/Interface.jsonl"])
    assert row["options"] == {"remote_ip": "192.0.2.12", "psk": "<left out>"}
    assert row["statistics"] == {"rx_packets": 7} and "lldp" not in row
    assert "ip saddr 10.0.0.1" in found["filter/nft.txt"] and 'comment "ovsmesh x"' in found["filter/nft.txt"]
    assert "ovsmesh:forward-in:1a2b" in found["filter/iptables-nft.txt"]
    assert "alias ovsmesh" in found["network/links.txt"] and "alias <left out>" in found["network/links.txt"]
    assert json.loads(found["containers/daemon.json"])["bridge"] == "kbr0"
    assert "10-other.conflist" in found["containers/cni-files.txt"]
    assert "192.0.2.1" in found["mesh/file.json"] and "192.0.2.1" in found["mesh/last-good.json"]
    assert "x-registry" in found["mesh/file.json"]
    assert "openvswitch: loaded" in found["log/kernel.txt"] and "some other module" not in found["log/kernel.txt"]
    assert json.loads(found["history.jsonl"])["event"] == "problem"
    assert json.loads(found["agent/options.json"])["node"] == "web1"
    assert "n_packets=3" in found["ovs/flows.txt"]
    assert "h1: all is well" in found["status.txt"] and "h1: all is well" in found["plan.txt"]


def test_the_manifest_names_each_part_and_why_one_could_not_be_had(host: Path) -> None:
    (host / "bin" / "nft").unlink()
    (host / "bin" / "dmesg").write_text("#!/bin/sh\necho 'dmesg: not permitted'\nexit 1\n")
    done = invoke(*given(host), "-o", str(host))
    (target,) = [path for path in host.iterdir() if path.name.endswith(".tar.gz")]
    found = files(target)
    lines = {line.split()[0]: line for line in found["MANIFEST.txt"].splitlines()[4:]}
    assert {name.strip("()") for name in lines} >= set(found) - {"MANIFEST.txt"}
    assert {name for name in lines if not name.startswith("(")} >= set(found) - {"MANIFEST.txt"}
    assert lines["(log/kernel.txt)"].endswith("[exit status 1: dmesg: not permitted]")
    assert "[the agent does not answer: Connection refused]" in lines["(agent/status.json)"]
    assert lines["(filter/nft.txt)"].endswith("[nft is not installed]")
    assert done.output.splitlines()[0].endswith("its MANIFEST.txt says why the others could not be had")


def test_the_file_is_private_and_the_last_line_says_where_and_how_big(host: Path) -> None:
    target = host / "out.tar.gz"
    target.write_text("old")
    done = invoke(*given(host), "-o", str(target))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    size = target.stat().st_size
    assert (
        done.output.splitlines()[-1] == f"{target}: {size} bytes, secrets left out; look through it before you send it"
    )


def test_the_name_tells_node_and_time(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(host)
    argv = given(host)
    argv[argv.index("web1")] = "web-1"
    assert invoke(*argv).exit_code == 0
    (name,) = [path.name for path in host.iterdir() if path.name.endswith(".tar.gz")]
    assert name.startswith("ovsmesh-web-1-20") and name.endswith("Z.tar.gz")


def test_to_standard_output_goes_the_archive_and_nothing_else(host: Path) -> None:
    done = CliRunner().invoke(cli.cli, ["bundle", *given(host), "-o", "-"])
    archive = host / "x.tar.gz"
    archive.write_bytes(done.stdout_bytes)
    assert "MANIFEST.txt" in files(archive)
    assert done.stderr.splitlines()[-1].startswith("standard output: ")


@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p), lambda p: p.symlink_to("/dev/null")])
def test_what_is_no_regular_file_is_not_replaced(host: Path, make: Callable[[Path], None]) -> None:
    target = host / "target"
    make(target)
    done = invoke(*given(host), "-o", str(target))
    assert isinstance(done.exception, OvsmeshError) and "is not a regular file" in str(done.exception)


def test_a_directory_that_is_not_there_is_said_before_anything_is_collected(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "collect", None)
    done = invoke(*given(host), "-o", str(host / "nope" / "x.tar.gz"))
    assert isinstance(done.exception, OvsmeshError) and "No such file or directory" in str(done.exception)


# bounds


def part(name: str, text: str = "", make: Any = None) -> bundle.Part:
    return bundle.Part(name, name, make or (lambda: (text, "")))


def test_the_archive_is_bounded_and_the_first_parts_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_MOST", 1000)
    found = bundle.collect([part("a", "x\n" * 300), part("b", "y\n" * 300), part("c", "z\n")])
    assert [len(made.text) for made in found] == [600, 399, 0]
    assert found[0].note == "" and "bound" in found[1].note
    assert "cut off: the archive has its bound" in bundle.manifest(found)


def test_after_the_deadline_no_part_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_ALL", -1.0)
    (made,) = bundle.collect([part("a", "x")])
    assert made.absent and "no time was left" in made.note


def test_one_part_that_fails_keeps_no_other_from_the_archive() -> None:
    def fails() -> Any:
        raise Absent(f"https://u:{SECRET}@x\nno")

    failed, fine = bundle.collect([part("a", make=fails), part("b", "x")])
    assert failed.absent and SECRET not in failed.note and "\n" not in failed.note and fine.text == "x"


def test_a_thousand_peers_fit(host: Path) -> None:
    """As long as what the commands print for a thousand peers: 3,000 flows, 2,000 routes, 1,000 ports."""
    flow = (
        " cookie=0x6f76736d, duration=1.5s, table=0, n_packets=3, n_bytes=294, priority=100,in_port=LOCAL actions=x\n"
    )
    (host / "flows").write_text(flow * 40_000)
    (host / "bin" / "ovs-ofctl").write_text(f"#!/bin/sh\nexec cat {host}/flows\n")
    options = Options(node="web1", state_dir=str(host / "state"), ovsdb=f"unix:{host}/db.sock", docker="off", listen="")
    _, data, found = bundle.archive(options, given(host))
    assert len(data) < 20_000_000
    flows = next(made for made in found if made.part.name == "ovs/flows.txt")
    assert flows.note.startswith("cut off after 4194304 bytes") and len(flows.text) <= 4 << 20


def test_a_mesh_file_that_can_t_be_parsed_is_not_in_it(host: Path) -> None:
    (host / "mesh.yaml").write_text(f"a: [{SECRET}\n")
    invoke(*given(host), "-o", str(host / "x.tar.gz"))
    found = files(host / "x.tar.gz")
    assert "mesh/file.json" not in found and not [name for name, text in found.items() if SECRET in text]
