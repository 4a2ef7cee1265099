"""What the kernel sets together with forwarding, and who depends on it, in a network namespace of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.root

SCRIPT = """
import json, subprocess
from pathlib import Path
from ovsmesh.agent import cleanup
from ovsmesh.containers.forwarding import FORWARDING, Device, forwarding_users, side_effects

def sh(text):
    subprocess.run(["sh", "-ec", text], check=True, capture_output=True)

def state():
    paths = [*Path("/proc/sys/net").glob("ipv[46]/conf/*/forwarding"), Path("/proc/sys/net/ipv4/ip_forward")]
    paths.append(Path("/proc/sys/net/ipv4/conf/all/accept_redirects"))
    return {str(path.relative_to("/proc/sys")): path.read_text().strip() for path in paths}

sh("for link in d0 d1; do ip link add $link type bridge; ip link set $link up; done")
# an owner who forwards on one link only, and takes no redirects
sh("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0 net.ipv4.conf.all.accept_redirects=0")
sh("sysctl -qw net.ipv4.conf.d0.forwarding=1 net.ipv6.conf.d1.forwarding=1")
before = state()
old = {}
for key in FORWARDING:
    old |= {key: "0", **side_effects(key)}
    (Path("/proc/sys") / key).write_text("1")
during = state()
back, left = cleanup.put_back(old, (), False)
problems = cleanup._write_back(back)
after = state()
# a filter that asks whether a packet was translated translates nothing
sh("iptables -A FORWARD -i d0 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP")
sh("nft 'add table inet f; add chain inet f c; add rule inet f c ct status dnat accept'")
assert forwarding_users(4, ()) == []
sh("iptables -t nat -A POSTROUTING -s 192.168.122.0/24 -j MASQUERADE")
rule = forwarding_users(4, ())
bridge = forwarding_users(4, [Device("virbr1", "bridge", True, ("192.168.9.1/24",), ("vnet0",))])
found = [before, during, after, left, [str(p) for p in problems], rule, bridge, forwarding_users(6, ())]
print(json.dumps(found))
"""


def test_a_link_s_own_forwarding_and_redirects_are_as_they_were() -> None:
    argv = ["unshare", "--net", sys.executable, "-c", SCRIPT]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    before, during, after, left, problems, rule, bridge, six = json.loads(done.stdout)
    assert during != before and during["net/ipv4/conf/d1/forwarding"] == "1"
    assert after == before and left == problems == []
    # and who depends on it is seen in the kernel
    assert rule == ["table ip nat chain POSTROUTING translates addresses"]
    assert "vnet0 on bridge virbr1" in bridge and six == []
