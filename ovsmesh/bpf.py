"""Classic BPF programs, by which the kernel filters what a socket is given."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence

_SO_ATTACH_FILTER = 26

Line = tuple[int, int, int, int]
"""An instruction: code, jumps if true and if false, operand."""


def attach(sock: socket.socket, program: Sequence[Line]) -> None:
    """Attach the program. Raise OSError where the kernel does not take it."""
    if len(program) > 4096:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))
