"""Watch what a path leads to, through inotify.

Calls libc itself: inotify_simple starts ldconfig when it is imported and has no types, and pyroute2's inotify needs
an event loop.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time

_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLYDIR, _MASK_ADD = 0x01000000, 0x20000000
_ON_DIRECTORY = _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO | _DELETE_SELF | _MOVE_SELF | _ONLYDIR
_ON_FILE = _MODIFY | _ATTRIB | _CLOSE_WRITE | _DELETE_SELF | _MOVE_SELF
_ON_ENTRIES = _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO
_GONE = _DELETE_SELF | _MOVE_SELF | _IGNORED | _UNMOUNT
_EVENT = struct.Struct("iIII")
_MAX_LINKS = 40
"""Symbolic links followed in one path, as the kernel does (path_resolution(7))."""


class FileWatch:
    """An event source: the file that a path leads to was written, replaced, removed or made, or a link on the way.

    With `entries` the paths lead to directories, and a change to anything in them counts too. Without inotify (no
    instances left) there is never an event: `why_silent` says so, and the user has to read again from time to time.
    """

    def __init__(self, *paths: str | os.PathLike[str], entries: bool = False) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self._on_last = _ON_FILE | (_ON_ENTRIES if entries else 0)
        self.why_silent = ""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = -1
        self._names: dict[int, set[bytes]] = {}
        """Watch descriptor of a directory → the entries in it that matter."""
        self._files: set[int] = set()
        self._writing = 0.0
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0:
            self.why_silent = f"no inotify: {os.strerror(ctypes.get_errno())}"
        self._aim()

    def fds(self) -> list[int]:
        """Return what to wait on for reading. It stays the same until close()."""
        return [] if self._handle < 0 else [self._handle]

    def close(self) -> None:
        """Stop watching."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def writing(self) -> float:
        """Return the seconds since a writer began who has not closed the file yet; 0 if there is none."""
        return time.monotonic() - self._writing if self._writing else 0.0

    def drain(self) -> bool:
        """Read all events. Return whether the content may have changed. Never block."""
        changed, moved = self._take()
        if moved:
            self._aim()
            # events that the new watches caused must not wake the caller again
            changed = self._take()[0] or changed
        return changed

    def _take(self) -> tuple[bool, bool]:
        """Read all events. Return whether the content may have changed, and whether the watches must be set again."""
        changed = moved = False
        while self._handle >= 0:
            try:
                data = os.read(self._handle, 65536)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                watch, mask, _, size = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + size].rstrip(b"\0")
                at += _EVENT.size + size
                gone = bool(mask & _GONE)
                if watch in self._files:
                    if mask & _MODIFY:
                        self._writing = self._writing or time.monotonic()
                    if mask & _CLOSE_WRITE:
                        self._writing = 0.0
                    changed = changed or bool(mask & ~_MODIFY)
                    moved = moved or gone
                elif mask & _OVERFLOW or (watch in self._names and (gone or name in self._names[watch])):
                    changed = moved = True
        return changed, moved

    def _aim(self) -> None:
        """Set all watches again, on what the paths lead to now."""
        if self._handle < 0:
            return
        for watch in [*self._names, *self._files]:
            self._libc.inotify_rm_watch(self._handle, watch)
        self._names.clear()
        self._files.clear()
        self._writing = 0.0
        # twice: a path may change between the look at it and its watch
        for path in self.paths * 2:
            links, last = _trail(path)
            for directory, name in links:
                watch = self._watch(directory, _ON_DIRECTORY)
                if watch >= 0:
                    self._names.setdefault(watch, set()).add(os.fsencode(name))
            if last:
                watch = self._watch(last, self._on_last)
                if watch >= 0:
                    self._files.add(watch)

    def _watch(self, path: str, mask: int) -> int:
        watch: int = self._libc.inotify_add_watch(self._handle, os.fsencode(path), ctypes.c_uint32(mask | _MASK_ADD))
        if watch < 0 and ctypes.get_errno() == errno.ENOSPC:
            self.why_silent = "no inotify watches left: raise fs.inotify.max_user_watches"
        return watch


def _trail(path: str) -> tuple[list[tuple[str, str]], str]:
    """Return the directory entries that decide what `path` leads to, and the file it leads to ("" for none).

    Of the plain directories on the way, only the last and the first that is missing count: a watch on each of them
    would wake the reader for every file in /tmp.
    """
    todo = [part for part in path.split("/") if part]
    here, links = "/", 0
    entries: list[tuple[str, str]] = []
    while todo:
        name = todo.pop(0)
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        full = os.path.join(here, name)
        try:
            target = os.readlink(full)
        except OSError:
            if not os.path.lexists(full):
                return [*entries, (here, name)], ""
            if not todo:
                return [*entries, (here, name)], full
            here = full
            continue
        entries.append((here, name))
        links += 1
        if links > _MAX_LINKS:
            break
        if target.startswith("/"):
            here = "/"
        todo = target.split("/") + todo
    return entries, ""
