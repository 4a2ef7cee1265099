"""The netlink socket, on this machine's kernel, and how it splits what it reads."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder
from ovsmesh.linux.netlink_socket import Message, NetlinkError, NetlinkSocket, attributes, error_code, messages
from ovsmesh.linux.rtnetlink_parser import parse_link
from tests.support.firewallkit import inside, namespaces, needs_root

__all__ = ["namespaces"]

"""A busy machine is no finding."""
NO_LINK = 2**31 - 1


def test_a_dump_returns_every_link() -> None:
    found: list[Message] = []
    with NetlinkSocket(netlink_socket.ROUTE) as sock:
        assert sock.request(encoder.dump(rtnetlink.GETLINK, 0), found.append)
    links = [parse_link(message.payload) for message in found]
    assert {link.name for link in links if link} == set(os.listdir("/sys/class/net")) - {"bonding_masters"}


def test_one_reply_to_one_request() -> None:
    found: list[Message] = []
    with NetlinkSocket(netlink_socket.ROUTE) as sock:
        for _ in range(3):
            sock.request(encoder.get_link(1), found.append)
    assert [link.name for message in found if (link := parse_link(message.payload))] == ["lo"] * 3


def test_a_refused_request_is_an_error_with_the_kernels_number() -> None:
    with NetlinkSocket(netlink_socket.ROUTE) as sock, pytest.raises(NetlinkError) as caught:
        sock.request(encoder.get_link(NO_LINK), lambda reply: None)
    assert caught.value.errno == errno.ENODEV


def test_a_generic_family_that_no_kernel_has() -> None:
    with NetlinkSocket(netlink_socket.GENERIC) as sock, pytest.raises(NetlinkError) as caught:
        sock.request(encoder.get_genl_family("ovsmesh_none"), lambda reply: None)
    assert caught.value.errno == errno.ENOENT


def test_a_protocol_that_no_kernel_has() -> None:
    with pytest.raises(OSError):
        NetlinkSocket(31)


@needs_root
@pytest.mark.root
def test_each_refusal_in_a_long_batch_is_told_by_its_position(namespaces: object) -> None:
    (name,) = namespaces("batch")  # type: ignore[operator]
    with inside(name), NetlinkSocket(netlink_socket.ROUTE) as sock:
        good, bad = encoder.set_link(1, mtu=9000), encoder.del_link(NO_LINK)
        batch = [bad if n % 3 else good for n in range(500)]
        assert sock.change(batch) == {n: errno.ENODEV for n in range(500) if n % 3}
        assert sock.change([]) == {}
        assert Path("/sys/class/net/lo/mtu").exists()


@needs_root
@pytest.mark.root
def test_dropped_notifications_are_an_overrun(namespaces: object) -> None:
    (name,) = namespaces("drop")  # type: ignore[operator]
    with (
        inside(name),
        NetlinkSocket(netlink_socket.ROUTE) as sock,
        # RTNLGRP_LINK
        NetlinkSocket(netlink_socket.ROUTE, [1], buffer=8192) as watching,
    ):
        assert list(watching.notifications()) == []
        sock.change([encoder.set_link(1, mtu=9000)])
        assert [message.type for message in watching.notifications()] == [rtnetlink.NEWLINK]
        sock.change([encoder.set_link(1, mtu=9000 + n % 2) for n in range(300)])
        types = [message.type for message in watching.notifications()]
        assert set(types) == {rtnetlink.NEWLINK, netlink_socket.OVERRUN}
        assert list(watching.notifications()) == []


# what was read


def packed(seq: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), rtnetlink.NEWROUTE, 0, seq, 0) + body


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(0, 40))
def test_messages_in_one_read_are_told_apart_and_a_cut_one_is_left_out(bodies: list[bytes], cut: int) -> None:
    data, ends = b"", []
    for seq, body in enumerate(bodies):
        one = packed(seq, body)
        ends.append(len(data) + len(one))
        data += one + b"\0" * (-len(one) % 4)
    data = data[: max(0, len(data) - cut)]
    found = list(messages(data))
    assert [bytes(m.payload) for m in found] == [b for b, end in zip(bodies, ends, strict=True) if end <= len(data)]


@given(st.binary(max_size=64))
def test_garbage_does_not_split_into_nonsense(data: bytes) -> None:
    for message in messages(data):
        assert len(message.payload) <= len(data) - 16
    for value in attributes(memoryview(data)).values():
        assert len(value) <= len(data) - 4


@pytest.mark.parametrize(("raw", "code"), [(struct.pack("=i", -17), 17), (struct.pack("=i", 0) + b"\0" * 16, 0)])
def test_an_errors_code(raw: bytes, code: int) -> None:
    assert error_code(Message(netlink_socket.ERROR, 0, 1, memoryview(raw))) == code
