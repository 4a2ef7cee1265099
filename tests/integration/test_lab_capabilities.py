"""What the agent's unit gives it is what it needs: tried with less, and with just that."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ovsmesh.lab.host import Host
from tests.support.labtools import Make

pytestmark = pytest.mark.lab


def once(host: Host, *capabilities: str, path: str = "") -> tuple[int, str]:
    """`ovsmesh agent --once` as root with these capabilities only: its exit code, and what is left to do after it."""
    bounds = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    argv = ["setpriv", "--bounding-set", bounds, "--inh-caps=-all", "--no-new-privs"]
    argv += [sys.executable, "-m", "ovsmesh", "agent", "--once", "--mesh", str(host.mesh), "--node", host.name]
    argv += ["--ovsdb", host.ovsdb, "--state-dir", str(host.state / "agent")]
    with_path = ["env", f"PATH={path}"] if path else []
    done = host.run([*with_path, *argv], check=False, timeout=60)
    return done.returncode, host.run([*with_path, *host.command("plan")], check=False).stdout


def test_net_admin_is_needed_and_enough(lab: Make) -> None:
    host = lab(2, 0, agents=False).host(1)
    code, left = once(host)
    assert code == 1 and left != "nothing to change\n"
    host.run(["iptables", "-P", "FORWARD", "DROP"])
    assert once(host, "net_admin") == (0, "nothing to change\n")


def test_the_old_iptables_needs_net_raw_too(lab: Make, tmp_path: Path) -> None:
    legacy = shutil.which("iptables-legacy")
    if legacy is None:
        pytest.skip("iptables-legacy is not there")
    host = lab(2, 0, agents=False).host(1)
    if host.run([legacy, "-P", "FORWARD", "DROP"], check=False).returncode:
        pytest.skip("this kernel has no ip_tables")
    for tool in ("iptables", "iptables-restore", "ip6tables", "ip6tables-restore"):
        target = shutil.which(tool.replace("tables", "tables-legacy", 1))
        assert target is not None
        (tmp_path / tool).symlink_to(target)
    path = f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"
    _, left = once(host, "net_admin", path=path)
    assert "rule iptables FORWARD" in left
    assert once(host, "net_admin", "net_raw", path=path) == (0, "nothing to change\n")
