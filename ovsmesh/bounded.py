"""Read a command's output, a file or an agent's answer within a bound and a deadline.

What is read is text: bytes that are none are shown as U+FFFD.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

_OUTPUT = 10.0
"""Seconds for a command whose whole output is wanted."""
_ERROR_LINES = 4
"""Fewer lines of a command that fails are its error, and nothing else."""


class Absent(Exception):
    """Something that can't be had. Its text says why."""


def run(argv: list[str], env: Mapping[str, str], most: int, deadline: float, says: bool = False) -> tuple[str, str]:
    """Return what a command prints, at most `most` bytes of it, and a note. Raise Absent.

    The few lines of one that fails are its error, unless it `says` something by its exit status.

    It and its children are ended after `deadline` seconds.
    """
    program = shutil.which(argv[0], path=env["PATH"])
    if program is None:
        raise Absent(f"{argv[0]} is not installed")
    child = subprocess.Popen(
        [program, *argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    assert child.stdout is not None
    data, note, end = b"", "", time.monotonic() + deadline
    with child.stdout as out:
        while len(data) <= most:
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                note = f"ended after {deadline:.0f} s"
                break
            more = os.read(out.fileno(), 1 << 16)
            if not more:
                break
            data += more
        else:
            note = f"cut off after {most} bytes"
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.0 if note else 1.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # one that even this does not end is left behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
    failed = bool(child.returncode) and not note
    if failed:
        note = f"exit status {child.returncode}" if child.returncode > 0 else "ended by a signal"
    text = data[:most].decode(errors="replace")
    lines = text.strip().splitlines()
    if note and len(lines) < (_ERROR_LINES if failed and not says else 1):
        raise Absent(": ".join([note, *lines]))
    return text, note or ("" if lines else "it is empty")


def output(*argv: str) -> str | None:
    """Return what a command prints to its standard output; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_OUTPUT,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def read_file(path: Path, most: int, end: bool = False) -> tuple[str, str]:
    """Return the text of a file, its end where `end` is set, and a note where it is not whole. Raise Absent."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(handle, "rb") as file:
            size = os.fstat(handle).st_size
            start = max(0, size - most) if end else 0
            if start:
                file.seek(start)
            data = file.read(most + 1)
    except OSError as error:
        raise Absent(error.strerror or str(error)) from error
    if start:
        # the first line is cut, and may be the end of something that is known by its beginning
        data = data.partition(b"\n")[2]
    return data[:most].decode(errors="replace"), f"the last {most} bytes" if start else _cut(len(data), most)


def _cut(size: int, most: int) -> str:
    return f"cut off after {most} bytes" if size > most else ""


def opened(listen: str, path: str, timeout: float) -> http.client.HTTPResponse:
    """Ask the agent that listens at `listen`, past any proxy, and return its answer, to be closed.

    Raise HTTPError for an answer that is not 200, else OSError, ValueError or HTTPException.
    """
    host, _, port = listen.rpartition(":")
    local = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(host, host)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: http.client.HTTPResponse = opener.open(f"http://{local}:{port}{path}", timeout=timeout)
    return answer


def get(listen: str, path: str, most: int, deadline: float) -> tuple[str, str]:
    """Return what the agent that listens at `listen` answers, and a note where it is not whole. Raise Absent."""
    try:
        data, end = b"", time.monotonic() + deadline
        with opened(listen, path, deadline) as answer:
            while len(data) <= most and time.monotonic() < end and (more := answer.read1(1 << 16)):
                data += more
    except urllib.error.HTTPError as error:
        raise Absent(f"the agent answers {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        text = why.strerror if isinstance(why, OSError) and why.strerror else str(why)
        raise Absent(f"the agent does not answer: {text}") from error
    return data[:most].decode(errors="replace"), _cut(len(data), most)
