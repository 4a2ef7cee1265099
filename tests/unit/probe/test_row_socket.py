"""Who the kernel lets in: the programs of the sockets, run on packets as it would run them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ovsmesh.probe.row_socket import accept_program, answer_program

PASS, KBR = 0xFFFFFFFF, 7


def run(program: list[tuple[int, int, int, int]], header: bytes, tcp: bytes = b"", device: int = KBR) -> int:
    """Return what a classic BPF program returns for a packet."""
    at = value = 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == 0x20 and operand == 0xFFFFF008:
            value = device
        elif code in (0x20, 0x30):
            size = 4 if code == 0x20 else 1
            data, offset = (header, operand - 0xFFF00000) if operand >= 0xFFF00000 else (tcp, operand)
            assert offset + size <= len(data)
            value = int.from_bytes(data[offset : offset + size])
        elif code == 0x05:
            at += operand
        elif code == 0x15:
            at += if_true if value == operand else if_false
        elif code == 0x45:
            at += if_true if value & operand else if_false
        else:
            assert code == 0x06
            return operand


def header(source: str, ttl: int = 255) -> bytes:
    address = ip_address(source)
    if address.version == 4:
        return bytes([0x45, *bytes(7), ttl, 6, 0, 0]) + address.packed + bytes(4)
    return bytes([0x60, *bytes(6), ttl]) + address.packed + bytes(16)


def passes(program: list[tuple[int, int, int, int]], source: str, ttl: int = 255, device: int = KBR) -> bool:
    return run(program, header(source, ttl), device=device) == PASS


MESHES = {
    "one peer": ["10.97.2.1"],
    "four": ["10.97.2.1", "10.97.3.1", "192.168.4.1", "250.1.2.1"],
    "a thousand": [f"10.{n // 250}.{n % 250}.1" for n in range(1000)],
    "one IPv6 peer": ["fd00:97:2::1"],
    "IPv6": ["fd00:97:2::1", "fd00:97:3::1"],
    "a thousand IPv6": [f"fd00:97:{n:x}::1" for n in range(1000)],
    "unlike": ["fd00:97:2::1", "fd01:98:2:3::5", "2001:db8::1", "fd00:97:2::8001"],
}


@pytest.mark.parametrize("name", MESHES)
def test_peers_get_in_and_nobody_else(name: str) -> None:
    peers = [ip_address(text) for text in MESHES[name]]
    program = accept_program(peers[0].version, peers, KBR)
    assert all(0 <= jump <= 255 for line in program for jump in line[1:3])
    for text in MESHES[name][:: max(1, len(peers) // 20)] + MESHES[name][-1:]:
        assert passes(program, text)
        assert not passes(program, text, ttl=254), "it was forwarded"
        assert not passes(program, text, device=KBR + 1), "it came in elsewhere"
        for near in (1, -1, 1 << 8, 1 << 16, 1 << 24):
            other = ip_address(text) + near
            assert passes(program, str(other)) == (other in peers)


def test_a_thousand_peers_of_one_family_fit_the_kernels_limits() -> None:
    for name in ("a thousand", "a thousand IPv6"):
        peers = [ip_address(text) for text in MESHES[name]]
        program = accept_program(peers[0].version, peers, KBR)
        # 8 bytes a line; net.core.optmem_max was 20 KiB before Linux 6.7
        assert len(program) < 1100


def test_without_peers_only_way_and_distance_count() -> None:
    program = accept_program(4, (), KBR)
    assert run(program, header("203.0.113.1")) == PASS
    assert run(program, header("203.0.113.1", 254)) == run(program, header("203.0.113.1"), device=1) == 0


@pytest.mark.parametrize("source", ["10.97.2.1", "fd00:97:2::1"])
def test_an_answer_that_was_forwarded_is_not_heard_but_a_refusal_is(source: str) -> None:
    program = answer_program(ip_address(source).version)
    syn_ack, reset = bytes(13) + b"\x12" + bytes(6), bytes(13) + b"\x14" + bytes(6)
    assert run(program, header(source), syn_ack) == PASS
    assert run(program, header(source, 254), syn_ack) == 0
    assert run(program, header(source, 64), reset) == PASS
