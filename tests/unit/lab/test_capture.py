"""The frame inside an encapsulated one is found, and only there."""

from __future__ import annotations

import struct

import pytest

from ovsmesh.lab.capture import inner_frame


def _ipv4(protocol: int, payload: bytes) -> bytes:
    return bytes(12) + b"\x08\x00" + b"\x45" + bytes(8) + bytes([protocol]) + bytes(10) + payload


def _ipv6(protocol: int, payload: bytes) -> bytes:
    return bytes(12) + b"\x86\xdd" + b"\x60" + bytes(5) + bytes([protocol, 64]) + bytes(32) + payload


INNER = b"\xff" * 6 + bytes(6) + b"\x08\x06" + bytes(28)


@pytest.mark.parametrize(
    "frame",
    [
        _ipv4(47, struct.pack("!HH", 0, 0x6558) + INNER),
        _ipv4(47, struct.pack("!HHI", 0x2000, 0x6558, 7) + INNER),
        _ipv6(47, struct.pack("!HHI", 0x2000, 0x6558, 7) + INNER),
        _ipv4(17, struct.pack("!HHHH", 1, 4789, 0, 0) + bytes(8) + INNER),
        _ipv6(17, struct.pack("!HHHH", 1, 6081, 0, 0) + b"\x01" + bytes(7) + bytes(4) + INNER),
    ],
    ids=["gre", "gre-key", "gre-key-v6", "vxlan", "geneve-option-v6"],
)
def test_the_inner_frame_is_found_in_each_encapsulation(frame: bytes) -> None:
    assert inner_frame(frame) == INNER


@pytest.mark.parametrize("frame", [b"", INNER, _ipv4(47, struct.pack("!HH", 0, 0x0800) + INNER), _ipv4(6, INNER)])
def test_what_is_not_encapsulated_has_no_inner_frame(frame: bytes) -> None:
    assert inner_frame(frame) is None
