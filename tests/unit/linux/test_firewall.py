"""The filter rules in a kernel: written, read back, damaged, repaired; and what the tools print."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.dataplane import firewall_rules
from ovsmesh.dataplane.firewall_rules import WITHOUT
from ovsmesh.dataplane.nft_syntax import Unreadable, parse_iptables, parse_nft, table_script
from ovsmesh.dataplane.types import Dataplane, Facts
from ovsmesh.linux import firewall as module
from ovsmesh.linux.firewall import Firewall
from ovsmesh.linux.netlink_socket import messages
from ovsmesh.linux.nft_monitor import END, tools
from tests.support.firewallkit import (
    ME,
    MESH,
    PEER,
    converge,
    desired,
    needs_nft,
    needs_root,
    nft,
    possible,
    sh,
    use_iptables,
)


@needs_root
@needs_nft
@pytest.mark.root
class TestKept:
    """Written once, then kept."""

    def test_apply_then_observe_is_equal_and_a_second_pass_writes_nothing(
        self, firewall: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert converge(firewall, desired())
        monkeypatch.setattr(Firewall, "_write", lambda *a, **k: pytest.fail("wrote"))
        assert not converge(firewall, desired())

    def test_a_resync_reads_nothing_while_nothing_has_changed(
        self, firewall: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[list[str]] = []
        real = module._run

        def run(argv: list[str], script: str | None = None) -> str:
            ran.append(argv)
            return real(argv, script)

        monkeypatch.setattr(module, "_run", run)
        converge(firewall, desired())
        for _ in range(2):
            # the first one reads what was written
            ran.clear()
            firewall.resync()
            assert not converge(firewall, desired())
        assert ran == []

    def test_a_change_whose_notification_is_lost_is_found_by_the_next_resync(self, firewall: Any) -> None:
        for _ in range(3):
            converge(firewall, desired())
            firewall.resync()
        assert not converge(firewall, desired())
        nft("flush chain inet ovsmesh postrouting")
        assert firewall._monitor.transactions()
        assert not converge(firewall, desired())
        firewall.resync()
        assert converge(firewall, desired())

    def test_a_restarted_agent_reads_the_same_and_writes_nothing(
        self, firewall: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        converge(firewall, desired())
        monkeypatch.setattr(Firewall, "_write", lambda *a, **k: pytest.fail("wrote"))
        again = Firewall()
        assert not converge(again, desired())
        again.close()

    @pytest.mark.parametrize(
        "damage",
        [
            "flush ruleset",
            "delete table inet ovsmesh",
            "delete table bridge ovsmesh",
            "flush table inet ovsmesh",
            "flush chain inet ovsmesh postrouting",
            "flush chain inet ovsmesh forward\ndelete chain inet ovsmesh forward",
            "flush set inet ovsmesh peers4",
            "add element inet ovsmesh peers4 { 203.0.113.9 }",
            "add rule inet ovsmesh input accept",
            'insert rule bridge ovsmesh prerouting counter accept comment "hello there"',
            'add rule inet ovsmesh input accept comment "tunnel-not-peer 00000000"',
            "flush chain bridge ovsmesh prerouting",
            "add chain inet ovsmesh input { policy drop; }",
            "add table inet ovsmesh { flags dormant; }",
        ],
    )
    def test_damage_is_heard_seen_and_repaired(self, firewall: Any, damage: Any) -> None:
        want = desired()
        converge(firewall, want)
        firewall.drain()
        assert not firewall.drain()
        nft(damage)
        assert firewall.drain()
        assert converge(firewall, want)
        assert not converge(firewall, want)

    def test_a_moved_rule_is_seen(self, firewall: Any) -> None:
        want = desired()
        converge(firewall, want)
        rules = possible(firewall, want).rules
        code = firewall_rules.digest(key := ("inet", "input", "tunnel-from-pod"), rules[key])
        chain = subprocess.run(
            ["nft", "-a", "list", "chain", "inet", "ovsmesh", "input"], text=True, capture_output=True, check=True
        ).stdout
        handle = next(line for line in chain.splitlines() if "tunnel-from-pod" in line).rpartition(" ")[2]
        nft(
            f"delete rule inet ovsmesh input handle {handle}\n"
            f'add rule inet ovsmesh input {rules[key].text} comment "tunnel-from-pod {code}"\n'
        )
        assert converge(firewall, want)

    def test_one_peer_more_is_one_element_and_no_reading(self, firewall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        many = [replace(PEER, address=ip_address("10.1.0.1") + n) for n in range(1000)]
        converge(firewall, desired(peers=many))
        calls: list[Any] = []
        from ovsmesh.linux import firewall as module

        run = module._run

        def counted(argv: Any, script: Any = None) -> Any:
            calls.append(script)
            return run(argv, script)

        monkeypatch.setattr(module, "_run", counted)
        converge(firewall, desired(peers=[*many, PEER]))
        tables = sum("@peers4" in rule.text for rule in possible(firewall, desired()).rules.values() if rule)
        assert tables and 1 <= len(calls) <= 2, calls
        assert all(script.startswith("add element") and script.count("\n") == 1 for script in calls)
        calls.clear()
        converge(firewall, desired(peers=[*many[1:], PEER]))
        assert all(script.startswith("delete element") for script in calls) and len(calls) <= 2
        assert not firewall.drain()

    def test_an_unmanaged_write_at_the_same_time_is_not_taken_for_our_own(
        self, firewall: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        converge(firewall, desired())
        from ovsmesh.linux import firewall as module

        run = module._run

        def meddled(argv: Any, script: Any = None) -> Any:
            monkeypatch.setattr(module, "_run", run)
            nft("add element inet ovsmesh peers4 { 203.0.113.9 }")
            return run(argv, script)

        monkeypatch.setattr(module, "_run", meddled)
        more = desired(peers=[PEER, replace(PEER, address=ip_address("192.0.2.3"))])
        firewall.apply(possible(firewall, more).rules, more.filter_peers)
        assert "203.0.113.9" in firewall.observe(more.rules).peers

    def test_unmanaged_tables_are_no_change_and_stay(self, firewall: Any) -> None:
        converge(firewall, desired())
        firewall.drain()
        unmanaged = (
            'add table inet other\nadd chain inet other c\nadd rule inet other c counter comment "ovsmesh \\\\ 1"\n'
        )
        nft(unmanaged)
        assert not firewall.drain()
        firewall.apply({}, {})
        left = subprocess.run(["nft", "list", "ruleset"], text=True, capture_output=True, check=True).stdout
        assert "ovsmesh {" not in left and "table inet other" in left
        assert firewall.observe({})[:2] == ({}, {})

    def test_peers_stand_in_both_tables(self, firewall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # what a kernel with nft_meta_bridge holds, on any kernel
        monkeypatch.setattr(firewall_rules, "IN_KBR", firewall_rules.IN_ANY)
        converge(firewall, desired())
        assert not converge(firewall, desired(peers=[PEER]))
        for damage in (
            "delete element bridge ovsmesh peers4 { 192.0.2.2 }",
            "add element bridge ovsmesh peers4 { 203.0.113.9 }",
            "flush set inet ovsmesh peers4",
        ):
            nft(damage)
            assert converge(firewall, desired())
        assert converge(firewall, desired(peers=[PEER, replace(PEER, address=ip_address("192.0.2.3"))]))
        assert not firewall.drain()

    def test_the_kernel_or_nft_knows_each_word(self, firewall: Any) -> None:
        """The whole bridge table: a kernel may lack nft_meta_bridge, but nft must not find fault with the text."""
        wanted = {key: rule for key, rule in desired().rules.items() if key[0] == "bridge"}
        done = subprocess.run(["nft", "-c", "-f", "-"], input=table_script("bridge", wanted, {"192.0.2.2": "peers4"}),
                              text=True, capture_output=True, timeout=10, check=False)  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        assert all("Could not process rule: Operation not supported" in line for line in errors)

    def test_ipv6_underlay(self, firewall: Any) -> None:
        me = replace(ME, address=ip_address("2001:db8::1"))
        peer = replace(PEER, address=ip_address("::ffff:192.0.2.2"))
        want = Dataplane(
            rules=firewall_rules.rules(MESH, me, Facts()), filter_peers=dict([firewall_rules.peer_set(peer)])
        )
        assert converge(firewall, want)
        assert not converge(firewall, want)

    @pytest.mark.parametrize(("encapsulation", "key"), [("vxlan", 7), ("geneve", None)])
    def test_other_encapsulations(self, firewall: Any, encapsulation: Any, key: Any) -> None:
        want = desired(replace(MESH, encapsulation=encapsulation, key=key))
        assert converge(firewall, want)
        assert not converge(firewall, want)

    def test_cidrs_change_replaces_the_rules(self, firewall: Any) -> None:
        converge(firewall, desired())
        assert converge(firewall, desired(replace(MESH, cluster_cidrs=(ip_network("10.0.0.0/8"),))))


@needs_root
@needs_nft
@pytest.mark.root
class TestLacking:
    """A system that lacks something keeps what can work, and says what does not."""

    def tool(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Any) -> None:
        real = shutil.which("nft")
        path = tmp_path / "nft"
        path.write_text(
            f'#!/bin/bash\ninput=""\n[ "${{@: -1}}" = - ] && input=$(cat)\n{body}\n{real} "$@" <<<"$input"\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def refuse(self, pattern: Any) -> Any:
        return f'[[ $input == *{pattern}* ]] && {{ echo "Error: Could not process rule: Not supported" >&2; exit 1; }}'

    def test_nft_missing(self, firewall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        assert not converge(firewall, desired())
        (problem,) = firewall.observe({}).problems
        assert problem.reason == "FilterUnavailable" and not problem.fatal and "install" in problem.message

    @pytest.mark.parametrize(
        ("pattern", "lacking"),
        [
            ("'type nat'", "inet postrouting"),
            ("'table bridge'", "bridge"),
            ("ibrname", "ibrname"),
            ("'hook forward'", "inet forward"),
        ],
    )
    def test_something_missing(
        self, firewall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any, lacking: Any
    ) -> None:
        self.tool(tmp_path, monkeypatch, self.refuse(pattern))
        assert converge(firewall, desired())
        assert not converge(firewall, desired())
        assert any(str(p).startswith(WITHOUT[lacking]) for p in firewall.observe({}).problems)
        firewall.resync()
        assert not converge(firewall, desired())

    @pytest.mark.parametrize("pattern", ["'type nat'", "'table bridge'", "ibrname", "'hook forward'"])
    def test_something_missing_found_by_writing(
        self, firewall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any
    ) -> None:
        self.tool(tmp_path, monkeypatch, self.refuse(pattern))
        want = possible(firewall, desired(), probe=False)
        assert want == desired()
        firewall.apply(want.rules, want.filter_peers)
        assert not converge(firewall, desired())
        assert not [p for p in firewall.observe({}).problems if p.fatal]

    def test_a_write_that_fails_is_named_and_not_repeated(
        self, firewall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = tmp_path / "count"
        self.tool(tmp_path, monkeypatch, f"[[ $input ]] && [[ $1 != -c ]] && {{ echo x >> {count}; exit 1; }}")
        want = possible(firewall, desired())
        for _ in range(3):
            firewall.apply(want.rules, want.filter_peers)
        assert count.read_text().count("x") == 2  # one for each table
        assert {p.reason for p in firewall.observe(want.rules).problems if p.fatal} == {"FilterFailed"}
        firewall.resync()
        firewall.apply(want.rules, want.filter_peers)
        assert count.read_text().count("x") == 4

    def test_hanging_tool(self, firewall: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ovsmesh.linux.firewall._TIMEOUT", 0.2)
        path = tmp_path / "nft"
        path.write_text("#!/bin/bash\nexec sleep 5\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert not converge(firewall, desired())
        assert "did not answer" in firewall.observe({}).problems[0].message


@needs_root
@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.root
class TestIptables:
    """Docker's FORWARD chain, with both kinds of iptables."""

    @pytest.fixture(autouse=True)
    def _variant(self, variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        use_iptables(variant, tmp_path, monkeypatch)

    def test_forward(self, firewall: Any, variant: Any) -> None:
        assert firewall.forward_drop() == ()
        sh("iptables -P FORWARD DROP", "iptables -A FORWARD -o docker0 -j ACCEPT", "ip6tables -A FORWARD -j DROP")
        assert firewall.drain() == (variant == "nft")
        firewall.resync()
        facts = Facts(forward_drop=firewall.forward_drop())
        assert facts.forward_drop == ("iptables", "ip6tables")
        assert converge(firewall, desired(facts=facts))
        assert not converge(firewall, desired(facts=facts))
        lines = subprocess.run(["iptables", "-S", "FORWARD"], text=True, capture_output=True, check=True).stdout
        assert "ovsmesh:mesh-out" in lines.splitlines()[2] and lines.splitlines()[1].endswith("docker0 -j ACCEPT")
        assert firewall.forward_drop() == facts.forward_drop

        sh("iptables -D FORWARD 3", "iptables -D FORWARD 2")
        assert firewall.drain() == (variant == "nft")
        firewall.resync()
        assert converge(firewall, desired(facts=facts))

        # with nothing else left there, our rules are not wanted any longer
        sh("iptables -P FORWARD ACCEPT", "iptables -D FORWARD -o docker0 -j ACCEPT", "ip6tables -D FORWARD -j DROP")
        firewall.resync()
        assert firewall.forward_drop() == ()
        assert converge(firewall, desired())
        lines = subprocess.run(["iptables", "-S", "FORWARD"], text=True, capture_output=True, check=True).stdout
        assert lines == "-P FORWARD ACCEPT\n"


class TestTexts:
    """What the tools print, including what they have never been seen to print."""

    @pytest.mark.parametrize("text", ["", "[]", '{"nftables": [3]}', '{"nftables": [{"rule": {"x": 1}}]}', "\0"])
    def test_strange_json(self, text: Any) -> None:
        with pytest.raises(Unreadable):
            parse_nft(text)

    def test_strange_iptables_lines(self) -> None:
        text = '-P FORWARD ACCEPT\n-A FORWARD -m comment --comment "ovsmesh:x:12345678\n-A OTHER -j DROP\n\n-A\n'
        table = parse_iptables(text)
        assert table.rows == () and table.drops
        assert not parse_iptables("-P FORWARD ACCEPT\n").drops
        assert parse_iptables("-P FORWARD DROP\n").drops

    def test_strange_notifications(self) -> None:
        good = struct.pack("=IHHIIBBHHH", 32, 10 << 8, 0, 0, 0, 1, 0, 0, 12, 1) + b"ovsmesh\0"
        assert list(tools(messages(good), b"ovsmesh")) == ["inet"]
        for cut in range(len(good)):
            for tail in (b"", b"\xff" * 9 + good[cut + 9 :], bytes(9) + good[cut + 9 :]):
                assert set(tools(messages(good[:cut] + tail), b"ovsmesh")) <= {"inet", "bridge", END}
