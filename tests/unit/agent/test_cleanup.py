"""Which sysctls cleanup puts back: those that nobody else depends on by now, and none that somebody has set since."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovsmesh.agent import cleanup
from ovsmesh.containers import forwarding
from ovsmesh.containers.forwarding import Device

FORWARD, FORWARD6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
REDIRECTS, RA = "net/ipv4/conf/all/send_redirects", "net/ipv6/conf/eth0/accept_ra"
BEFORE = {REDIRECTS: "1", FORWARD: "0", FORWARD6: "0", RA: "1", "net/ipv4/conf/kbr0/rp_filter": "0"}
NOW = {REDIRECTS: "0", FORWARD: "1", FORWARD6: "1", RA: "2", "net/ipv4/conf/kbr0/rp_filter": "2"}


class Host:
    """What the host of a test says."""

    def __init__(self) -> None:
        self.now = dict(NOW)
        self.users: dict[int, list[str]] = {}
        self.files: dict[str, str] = {}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host()
    monkeypatch.setattr(cleanup, "read_sysctls", lambda keys: {k: made.now[k] for k in keys if k in made.now})
    monkeypatch.setattr(cleanup, "forwarding_users", lambda version, *more: made.users.get(version, []))
    monkeypatch.setattr(cleanup, "configured", lambda key, value: made.files.get(key, ""))
    yield made


def test_all_is_put_back_where_nobody_depends_on_it(host: Host) -> None:
    back, left = cleanup.put_back(BEFORE, (), False)
    # forwarding first: the kernel sets others with it
    assert list(back) == [FORWARD, FORWARD6, REDIRECTS, RA] and left == []


def test_forwarding_stays_where_somebody_depends_on_it(host: Host) -> None:
    host.users[4] = ["Docker runs"]
    back, left = cleanup.put_back(BEFORE, (), False)
    assert left == [f"sysctl {FORWARD} left at 1: Docker runs"]
    assert FORWARD not in back and back[FORWARD6] == "0" and back[REDIRECTS] == "1"


def test_a_host_that_still_forwards_ipv6_keeps_its_default_route(host: Host) -> None:
    host.users[6] = ["kube-proxy runs"]
    back, left = cleanup.put_back(BEFORE, (), False)
    assert RA not in back and any(RA in line and "default route" in line for line in left)


def test_what_somebody_else_has_set_stays(host: Host) -> None:
    host.now |= {REDIRECTS: "2", RA: "0"}
    host.files[FORWARD] = "/etc/sysctl.d/99-router.conf"
    back, left = cleanup.put_back(BEFORE, (), False)
    assert f"sysctl {FORWARD} left at 1: /etc/sysctl.d/99-router.conf sets it" in left
    assert f"sysctl {REDIRECTS} left at 2: somebody else has set it" in left and list(back) == [FORWARD6]


def test_what_the_kernel_set_with_forwarding_goes_with_it(host: Host) -> None:
    with_it = {"net/ipv4/conf/all/accept_redirects": "0", "net/ipv4/conf/eth1/forwarding": "1"}
    host.now |= with_it
    assert cleanup.put_back(BEFORE | with_it, (), False)[0].items() >= with_it.items()
    host.users[4] = ["Docker runs"]
    assert not set(cleanup.put_back(BEFORE | with_it, (), False)[0]) & set(with_it)


# Who depends on forwarding

KBR = Device("kbr0", "bridge", True, ("10.97.1.1/24",), ("veth1",))
NFT = """table ip nat {
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.17.0.0/16 oifname != "docker0" counter masquerade
		ip saddr 10.97.1.0/24 oifname != "kbr0" counter masquerade
	}
	chain DOCKER {
		iifname != "docker0" tcp dport 80 counter dnat to 172.17.0.2:80
	}
}
table inet ovsmesh {
	chain postrouting {
		ip saddr 10.97.1.0/24 masquerade
	}
}
"""


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A host on which no program runs; what `nft` and `ip` say."""
    said = {"nft": NFT, "ip": "[]"}
    monkeypatch.setattr(forwarding, "output", lambda *argv: said.get(argv[0], ""))
    monkeypatch.setattr(forwarding, "_programs", lambda *more: iter(()))
    monkeypatch.setattr(forwarding, "_legacy", lambda version: said.get("legacy", ""))
    return said


@pytest.mark.parametrize(
    ("device", "four", "six"),
    [
        (KBR, False, False),
        (Device("docker0", "bridge", True, ("172.17.0.1/16",)), False, False),
        (Device("virbr0", "bridge", True, ("192.168.122.1/24", "fe80::1/64"), ("vnet0",)), True, False),
        (Device("cni0", "bridge", True, ("10.244.0.1/24", "fd00:244::1/64"), ("veth7",)), True, True),
        (Device("br0", "bridge", True, ("192.0.2.5/24",)), False, False),
        (Device("flannel.1", "vxlan", True, ("10.244.0.0/32",)), True, False),
        (Device("flannel.1", "vxlan", False, ("10.244.0.0/32",)), False, False),
        (Device("wg0", "wireguard", True, ("10.9.0.1/24",)), True, False),
        (Device("tunl0", "ipip", True, ("10.1.1.1/32",)), False, False),
        (Device("cali7", "veth", True, ()), True, False),
        (Device("eth0", "veth", True, ("192.0.2.11/24",)), False, False),
    ],
)
def test_links_that_forward_for_somebody(quiet: dict[str, str], device: Device, four: bool, six: bool) -> None:
    quiet["ip"] = '[{"dst": "default", "dev": "eth0"}, {"dst": "192.168.7.9", "dev": "cali7"}]'
    assert bool(forwarding.forwarding_users(4, [KBR, device])) == four
    quiet["ip"] = "[]"
    assert bool(forwarding.forwarding_users(6, [KBR, device])) == six


@pytest.mark.parametrize(
    ("ruleset", "legacy", "found"),
    [
        (NFT, "", False),
        (NFT + "table ip nat {\n chain KUBE-POSTROUTING {\n  counter masquerade fully-random\n }\n}\n", "", True),
        (NFT + "table ip6 nat {\n chain POSTROUTING {\n  counter masquerade\n }\n}\n", "", False),
        (NFT + "table inet mine {\n chain post {\n  oifname eth0 snat to 192.0.2.1\n }\n}\n", "", True),
        (NFT + "table ip docker-bridges {\n chain nat-post {\n  masquerade\n }\n}\n", "", False),
        ("", "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", False),
        ("", "-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE", True),
    ],
)
def test_rules_that_translate_for_somebody(quiet: dict[str, str], ruleset: str, legacy: str, found: bool) -> None:
    quiet |= {"nft": ruleset, "legacy": legacy}
    assert bool(forwarding.forwarding_users(4, [KBR])) == found


def test_docker_counts_unless_it_is_about_to_start(monkeypatch: pytest.MonkeyPatch, quiet: dict[str, str]) -> None:
    bridge = Device("br-0123456789ab", "bridge", True, ("172.18.0.1/16",), ("veth3",))
    assert forwarding.forwarding_users(4, [bridge]) and not forwarding.forwarding_users(4, [bridge], True)


def test_the_last_file_of_sysctl_d_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *pair: True)
    monkeypatch.setattr(forwarding, "_FILES", (f"{tmp_path}/etc/*.conf", f"{tmp_path}/usr/*.conf"))
    for name, text in (
        ("usr/10-a.conf", "net.ipv4.ip_forward=1\n"),
        ("etc/20-b.conf", "# net.ipv4.ip_forward=0\n-net/ipv4/conf/all/forwarding = 1\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (
        forwarding.configured(FORWARD, "1") == f"{tmp_path}/etc/20-b.conf"
        and forwarding.configured(FORWARD6, "1") == ""
    )
    # a file of that name in /etc stands for the one in /usr
    (tmp_path / "etc/10-a.conf").write_text("")
    (tmp_path / "etc/20-b.conf").unlink()
    assert forwarding.configured(FORWARD, "1") == ""
