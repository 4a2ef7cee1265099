"""Sockets of the row exchange: the kernel lets in what a peer's host sends from its gateway, and nothing else."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Collection

from ovsmesh.bpf import Line, attach
from ovsmesh.mesh.types import IPAddress
from ovsmesh.names import ROW_PORT

log = logging.getLogger("ovsmesh")

_BACKLOG = 64
_TTL = 255
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
"""Numbers of Linux, from its in.h, in6.h and socket.h."""


def new_socket(version: int) -> socket.socket:
    """Return a TCP socket whose packets can be told from forwarded ones."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, _TTL)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, _TTL)
    except BaseException:
        sock.close()
        raise
    return sock


def listener(address: IPAddress, peers: Collection[IPAddress], device: int) -> socket.socket:
    """Return a socket that listens on a gateway of this node, for these of its peers. `device`: the index of kbr0."""
    sock = new_socket(address.version)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # the address may be away for a moment
        freebind = (socket.IPPROTO_IP, _IP_FREEBIND) if address.version == 4 else (socket.IPPROTO_IPV6, _IPV6_FREEBIND)
        sock.setsockopt(*freebind, 1)
        try:
            attach(sock, accept_program(address.version, peers, device))
        except OSError as error:
            # more peers than the kernel takes in one program: the rest is checked after the handshake
            log.debug("row exchange: %d addresses in a socket filter: %s", len(peers), error)
            attach(sock, accept_program(address.version, (), device))
        sock.bind((str(address), ROW_PORT))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


_DEVICE, _HEADER = 0xFFFFF008, 0xFFF00000
"""SKF_AD_OFF + SKF_AD_IFINDEX, and SKF_NET_OFF: where a program finds a packet's device and its IP header."""
_LOAD, _LOAD_BYTE, _JUMP, _IF, _IF_SET, _RETURN = 0x20, 0x30, 0x05, 0x15, 0x45, 0x06
_DROP, _PASS = (_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF)
_CHUNK = 200
"""A jump reaches over 255 lines at most."""
_TCP_FLAGS, _RST = 13, 4


def _load_ttl(version: int) -> Line:
    return _LOAD_BYTE, 0, 0, _HEADER + (8 if version == 4 else 7)


def answer_program(version: int) -> list[Line]:
    """Return a program for a socket that asks: nothing that was forwarded, but any refusal, which has a usual TTL."""
    refusal: list[Line] = [(_LOAD_BYTE, 0, 0, _TCP_FLAGS), (_IF_SET, 0, 1, _RST), _PASS, _DROP]
    return [_load_ttl(version), (_IF, 0, 1, _TTL), _PASS, *refusal]


def accept_program(version: int, peers: Collection[IPAddress], device: int) -> list[Line]:
    """Return a classic BPF program for a listening socket.

    It lets packets in that came in on the device, with a TTL of 255, from one of `peers`; from anywhere without any.
    """
    lines: list[Line] = [(_LOAD, 0, 0, _DEVICE), (_IF, 1, 0, device), _DROP]
    lines += [_load_ttl(version), (_IF, 1, 0, _TTL), _DROP]
    if not peers:
        return [*lines, _PASS]
    offsets = [12] if version == 4 else [8, 12, 16, 20]
    # gateways have most of their words in common; what differs is one word in nearly all meshes
    columns = list(zip(*(struct.unpack(f"!{len(offsets)}I", peer.packed) for peer in peers), strict=True))
    varied = []
    for offset, column in zip(offsets, columns, strict=True):
        if len(set(column)) > 1:
            varied.append((_HEADER + offset, column))
        else:
            lines += [(_LOAD, 0, 0, _HEADER + offset), (_IF, 1, 0, column[0]), _DROP]
    if not varied:
        lines.append(_PASS)
    elif len(varied) == 1:
        (offset, column), *_ = varied
        lines.append((_LOAD, 0, 0, offset))
        for start in range(0, len(column), _CHUNK):
            chunk = column[start : start + _CHUNK]
            lines += [(_IF, len(chunk) - n, 0, word) for n, word in enumerate(chunk)]
            lines += [(_JUMP, 0, 0, 1), _PASS]
    else:
        for words in zip(*(column for _, column in varied), strict=True):
            left = 2 * len(words)
            for (offset, _), word in zip(varied, words, strict=True):
                left -= 2
                lines += [(_LOAD, 0, 0, offset), (_IF, 0, left + 1, word)]
            lines.append(_PASS)
    return [*lines, _DROP]
