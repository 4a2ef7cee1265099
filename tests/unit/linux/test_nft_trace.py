"""A packet is followed through everybody's tables, and the table that follows it ends with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ovsmesh.linux.nft_trace import PacketTrace, Pattern, Verdict
from tests.support.firewallkit import inside, needs_nft, needs_root, nft, sh
from tests.support.needs import needs

pytestmark = [pytest.mark.root, needs_root, needs_nft]

TOKEN = b"followed"
# ping fills its data behind a time stamp of 16 bytes with the pattern
OUT = Pattern("out", ((20, b"\x08"), (44, TOKEN)))
BACK = Pattern("back", ((20, b"\x00"), (44, TOKEN)))


@pytest.fixture
@needs("root")
def namespace() -> Iterator[str]:
    name = f"nfttrace{os.getpid()}"
    sh(f"ip netns add {name}", f"ip -n {name} link set lo up")
    yield name
    sh(f"ip netns del {name}")


def ping(address: str) -> None:
    argv = ["ping", "-c2", "-i0.2", "-W1", "-p", TOKEN.hex(), "-s", "40", address]
    subprocess.run(argv, capture_output=True, timeout=30, check=False)


def test_the_rule_and_the_policy_that_drop_are_named_and_hooks_counted(namespace: str) -> None:
    with inside(namespace):
        nft(
            "table ip mine { chain c { type filter hook input priority 10; ip daddr 127.0.0.8 counter drop; }; }\n"
            "table inet strict { chain o { type filter hook output priority 5; policy drop;"
            " ip daddr != 127.0.0.9 accept; }; }"
        )
        with PacketTrace([OUT, BACK], ["lo"]) as trace:
            for address in ("127.0.0.1", "127.0.0.8", "127.0.0.9"):
                ping(address)
            verdicts = trace.verdicts()
            passed = trace.passed()
    rule = next(v for v in verdicts if v.chain == "c")
    assert rule._replace(handle=0) == Verdict("ip", "mine", "c", 0, "drop") and rule.handle and verdicts[rule] == 2
    assert verdicts[Verdict("inet", "strict", "o", 0, "drop")] == 2
    assert passed["inet", "output", "out"] == (6, 4)
    assert passed["inet", "input", "out"] == (4, 2)
    assert passed["inet", "input", "back"] == (2, 2)


def test_packets_of_others_are_neither_counted_nor_traced(namespace: str) -> None:
    with inside(namespace), PacketTrace([Pattern("out", ((20, b"\x08"), (44, b"sometime")))]) as trace:
        ping("127.0.0.1")
        assert not trace.verdicts() and not any(count.first for count in trace.passed().values())


def test_the_table_ends_with_its_process_however_that_ends(namespace: str) -> None:
    code = (
        "from ovsmesh.linux.nft_trace import PacketTrace, Pattern\n"
        "t = PacketTrace([Pattern('x', ((0, b'E'),))])\nprint(1, flush=True)\ninput()"
    )
    with inside(namespace):
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"1\n"
            listing = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=10, check=True)
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        assert listing.stdout.count("ovsmesh-trace") == 2
        left = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=10, check=True)
        assert not left.stdout
