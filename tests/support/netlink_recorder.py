"""Record the netlink messages of `ip` and `bridge`, as the witness of what ovsmesh sends and parses.

Run as root, with strace, and with iproute2 6.3 or later (the first that marks addresses), which may be
in another root directory:

    unshare --net python -m tests.support.netlink_recorder [ROOT] > tests/unit/linux/golden/netlink.txt

For each command the file has the messages of one type, sent to the kernel or received from it, in hex.
Sequence numbers and port ids are 0. kbr0 has index 2, obr0 4.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "unit" / "linux" / "golden" / "netlink.txt"

_SETUP, _SENT, _RECEIVED = "", "sent", "received"
_COMMANDS = (
    # the message type is that of <linux/rtnetlink.h>, or GENL_ID_CTRL for genl
    (_SENT, 16, "ip link add ovsmesh-new address 0a:58:0a:61:01:01 mtu 1462 type bridge"),
    (_SENT, 16, "ip link set ovsmesh-new alias ovsmesh"),
    (_SENT, 16, "ip link set ovsmesh-new name kbr0"),
    (_SENT, 16, "ip link set kbr0 up"),
    (_SENT, 16, "ip link set kbr0 mtu 1400"),
    (_SENT, 16, "ip link set kbr0 address 0a:58:0a:61:01:01"),
    (_SETUP, 0, "ip link add obr0 mtu 1400 address 02:00:00:00:00:05 type veth peer name other"),
    (_SETUP, 0, "ip link set obr0 up"),
    (_SETUP, 0, "ip link set other up"),
    (_SENT, 16, "ip link set obr0 master kbr0"),
    (_RECEIVED, 16, "ip link show dev obr0"),
    (_SENT, 19, "bridge link set dev obr0 learning off flood off mcast_flood off bcast_flood off"),
    (_RECEIVED, 16, "ip -details link show dev obr0"),
    (_SENT, 19, "bridge link set dev obr0 hairpin on"),
    (_RECEIVED, 16, "bridge link show dev obr0"),
    (_RECEIVED, 16, "ip link show dev kbr0"),
    (_SENT, 20, "ip address replace 10.97.1.1/24 dev kbr0 proto 111"),
    (_SENT, 20, "ip address replace fd00:97:1::1/64 dev kbr0 nodad proto 111"),
    (_SETUP, 0, "ip address add 192.0.2.1 peer 192.0.2.2 dev lo"),
    (_SENT, 24, "ip route add 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111 mtu 1462"),
    (_SENT, 24, "ip route add fd00:97:2::/64 via fd00:97:2::1 dev kbr0 onlink proto 111 metric 111 mtu 1462"),
    (_SENT, 24, "ip route replace 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111 mtu 1400"),
    (_SENT, 24, "ip route add unreachable 10.97.0.0/16 proto 111 metric 4278198272"),
    (_SENT, 24, "ip route add unreachable fd00:97::/32 proto 111 metric 4278198272"),
    (_SETUP, 0, "ip route add default via 10.97.1.9 dev kbr0 proto static"),
    (_SETUP, 0, "ip route add 198.51.100.0/24 dev kbr0 table 1000"),
    (_SENT, 28, "ip neigh replace 10.97.2.1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111"),
    (_SENT, 28, "ip neigh replace fd00:97:2::1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111"),
    (_SENT, 28, "bridge fdb replace 0a:58:0a:61:02:01 dev obr0 master static"),
    (_SENT, 18, "ip link show"),
    (_SENT, 22, "ip address show"),
    (_RECEIVED, 20, "ip address show"),
    (_SENT, 26, "ip -4 route show table all"),
    (_RECEIVED, 24, "ip -4 route show table all"),
    (_RECEIVED, 24, "ip -6 route show table main"),
    (_SENT, 30, "ip -4 neigh show"),
    (_RECEIVED, 28, "ip neigh show nud permanent"),
    (_RECEIVED, 28, "bridge fdb show brport obr0"),
    (_SENT, 16, "genl ctrl get name ovs_datapath"),
    (_SENT, 29, "bridge fdb del 0a:58:0a:61:02:01 dev obr0 master"),
    (_SENT, 29, "ip neigh del 10.97.2.1 dev kbr0"),
    (_SENT, 25, "ip route del 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111"),
    (_SENT, 21, "ip address del 10.97.1.1/24 dev kbr0"),
    (_SENT, 16, "ip link set obr0 nomaster"),
    (_SENT, 16, "ip link set kbr0 down"),
    (_SENT, 17, "ip link del kbr0"),
)
_HEX = re.compile(r"\| ([0-9a-f]+)  (.{48})")


def golden(direction: str) -> dict[str, list[bytes]]:
    """Return the messages that were "sent" or "received" by each command."""
    found: dict[str, list[bytes]] = {}
    for block in GOLDEN.read_text().split("\n\n")[1:]:
        title, *lines = block.splitlines()
        kind, _, command = title.partition(": ")
        if kind == direction:
            found[command] = [bytes.fromhex(line) for line in lines]
    return found


def _record(direction: str, type_: int, command: list[str]) -> list[bytes]:
    with tempfile.NamedTemporaryFile("r") as log:
        calls = {_SENT: ("sendto,sendmsg", "write"), _RECEIVED: ("recvmsg", "read")}[direction]
        strace = ["strace", "-f", "-qq", "-o", log.name, "-e", f"trace={calls[0]}", "-e", f"{calls[1]}=all"]
        subprocess.run([*strace, *command], stdout=subprocess.DEVNULL, check="genl" not in command)
        reads: list[bytearray] = []
        for offset, text in _HEX.findall(log.read()):
            if not int(offset, 16):
                reads.append(bytearray())
            reads[-1] += bytes.fromhex(text)
    found = []
    for data in reads:
        while (length := int.from_bytes(data[:4], sys.byteorder)) >= 16:
            message, data = data[:length], data[(length + 3) & ~3 :]
            if int.from_bytes(message[4:6], sys.byteorder) == type_:
                message[8:16] = bytes(8)
                found.append(bytes(message))
    if direction == _SENT or type_ == 16:
        # the last one is what the command is about; before it, `ip` looks for links
        name = command[-1].encode()
        found = [message for message in found if direction == _SENT or name in message][-1:]
    return found


def main(root: str) -> None:
    """Run the commands in this network namespace and print the recorded messages."""
    inside = ["chroot", root] if root != "/" else []
    version = subprocess.run([*inside, "ip", "-V"], capture_output=True, text=True, check=True).stdout
    print(f"# {version.partition(',')[2].partition(',')[0].strip()}, recorded by {Path(__file__).name}")
    for direction, type_, command in _COMMANDS:
        argv = [*inside, *command.split()]
        if direction == _SETUP:
            subprocess.run(argv, check=True)
            continue
        print(f"\n{direction}: {command}")
        for message in _record(direction, type_, argv):
            print(message.hex(" ", 4))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["/"])
