"""Docker's daemon.json as text: read its settings, and change some of them without touching another byte.

Pure. Order, indentation and line ends of the user's file stay. A text that two readers could understand differently (a
key twice, no object) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ovsmesh.errors import OvsmeshError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff"
_DEPTH = 64
"""Levels of nesting that are read; dockerd's settings need three."""


class _Member(NamedTuple):
    """A member of the outermost object, by its positions in the text."""

    key: str
    start: int
    key_end: int
    value_start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Outline:
    opened: int
    """Position after the opening brace; 0 for a text of white space only."""
    closed: int
    """Position of the closing brace."""
    members: tuple[_Member, ...]


def settings(data: bytes) -> dict[str, Any]:
    """Return what the file sets; {} for an empty file. Raise OvsmeshError."""
    text = _text(data)
    return {m.key: json.loads(text[m.value_start : m.end]) for m in _outline(text).members}


def edit(data: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return the file with these settings changed; None removes one. All else stays byte for byte.

    A new setting comes last, indented as the last one. Raise OvsmeshError.
    """
    text = _text(data)
    for key, value in changes.items():
        outline = _outline(text)
        member = next((m for m in outline.members if m.key == key), None)
        if value is None:
            text = text if member is None else _without(text, outline, member)
        elif member is None:
            text = _with(text, outline, json.dumps(key), json.dumps(value))
        elif json.loads(text[member.value_start : member.end]) != value:
            text = text[: member.value_start] + json.dumps(value) + text[member.end :]
    return text.encode()


def _with(text: str, outline: _Outline, key: str, value: str) -> str:
    if not outline.opened:
        return f"{text.rstrip()}{{\n  {key}: {value}\n}}\n"
    if not outline.members:
        before, after = text[: outline.opened], text[outline.closed :]
        return f"{before}\n  {key}: {value}\n{after}"
    last = outline.members[-1]
    # the text between the last key and the comma or brace before it is how this file indents
    gap = text[outline.members[-2].end if len(outline.members) > 1 else outline.opened : last.start]
    gap = gap[gap.rfind(",") + 1 :]
    colon = text[last.key_end : last.value_start]
    return f"{text[: last.end]},{gap}{key}{colon}{value}{text[last.end :]}"


def _without(text: str, outline: _Outline, member: _Member) -> str:
    at = outline.members.index(member)
    if at + 1 < len(outline.members):
        return text[: member.start] + text[outline.members[at + 1].start :]
    start = outline.members[at - 1].end if at else outline.opened
    return text[:start] + text[member.end :]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise OvsmeshError(f"is not UTF-8 text (byte {error.start})") from None


def _outline(text: str) -> _Outline:
    """Return the positions of the members. Raise OvsmeshError with the line and what is wrong there."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
    here = _skip(text, 1 if text.startswith(_BOM) else 0)
    if here == len(text):
        return _Outline(0, 0, ())
    try:
        whole, end = decoder.raw_decode(text, here)
        if not isinstance(whole, dict):
            raise _Wrong(f"holds a {type(whole).__name__}, not an object", here)
        if _skip(text, end) != len(text):
            raise _Wrong("goes on after its object has ended", _skip(text, end))
        if _deep(whole) > _DEPTH:
            raise _Wrong(f"is nested more than {_DEPTH} levels deep", here)
    except json.JSONDecodeError as error:
        raise OvsmeshError(f"is not JSON: line {error.lineno} column {error.colno}: {error.msg}") from None
    except _Wrong as error:
        raise OvsmeshError(error.text if error.at is None else f"line {_line(text, error.at)}: {error.text}") from None
    except RecursionError:
        raise OvsmeshError("is nested too deep") from None
    except ValueError as error:
        # a number with thousands of digits
        raise OvsmeshError(f"is not JSON: {error}") from None
    members = []
    opened = here + 1
    here = _skip(text, opened)
    while text[here] != "}":
        start = here
        key, key_end = decoder.raw_decode(text, start)
        value_start = _skip(text, _skip(text, key_end) + 1)
        _, value_end = decoder.raw_decode(text, value_start)
        members.append(_Member(key, start, key_end, value_start, value_end))
        here = _skip(text, value_end)
        if text[here] == ",":
            here = _skip(text, here + 1)
    return _Outline(opened, here, tuple(members))


class _Wrong(Exception):
    def __init__(self, text: str, at: int | None = None) -> None:
        self.text, self.at = text, at


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"has the key {twice!a} more than once, so its value is not certain")
    return found


def _constant(name: str) -> NoReturn:
    raise _Wrong(f"holds {name}, which is not JSON")


def _deep(value: Any) -> int:
    level, these = 0, [value]
    while these:
        level += 1
        these = [
            inner
            for one in these
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(inner, (dict, list))
        ]
    return level


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
