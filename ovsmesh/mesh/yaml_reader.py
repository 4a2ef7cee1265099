"""Read YAML or decoded JSON into a tree of strings, scalars, lists and maps, with the line where each map begins.

Built straight from the parser's events: five times faster than a full load, and what a mesh file has no use
for (aliases, tags, duplicate keys, several documents) is refused on the way, before it can cost anything.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from ovsmesh.mesh.types import MeshError
from ovsmesh.text import printable

MAX_BYTES = 16 << 20
"""Bytes of a mesh file; 5,000 nodes need about 0.5 MB."""
MAX_DEPTH = 32
"""Levels of nesting; a mesh has 5, what stands in metadata may have more."""
MAX_ITEMS = 1_000_000
"""Parser events; 5,000 nodes need 50,000. A million take about a second."""

_SHOWN = 80
_CLEAN = re.compile(r"[-A-Za-z0-9_./:+=,@~\[\]]+")
# YAML 1.1 as kubectl reads it, less sexagesimal integers: 2001:10:20:30:40:50:0:1 is an address.
_ODD = re.compile(
    r"(?P<null>~|null|Null|NULL|)"
    r"|(?P<boolean>true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)"
    r"|(?P<integer>[-+]?(?:0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16}))"
    r"|(?P<number>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)
_TRUE = frozenset(("true", "yes", "on"))


class Scalar(NamedTuple):
    """A plain scalar that YAML does not take for a string."""

    kind: str
    """null, boolean, integer or number."""
    text: str
    """As it stands in the file."""
    value: int | bool | None


class Map(dict[str, "Tree"]):
    """A mapping. Keys are the text of the file, whatever their type."""

    __slots__ = ("line",)
    line: int
    """Where it begins, counted from 1; 0 if it came from no file."""


Tree = str | Scalar | list[Any] | Map


def show(value: object) -> str:
    """Return `value` for a message: on one line, about 80 characters at most, without control characters."""
    if isinstance(value, Scalar):
        value = value.text
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    if isinstance(value, list):
        inner = ", ".join(show(v) for v in value[:3]) + (", …" if len(value) > 3 else "")
        return f"[{inner if len(inner) <= _SHOWN else inner[:_SHOWN] + '…'}]"
    text = str(value)
    cut = text[:_SHOWN]
    return (cut if _CLEAN.fullmatch(cut) else ascii(cut)) + ("…" if len(text) > len(cut) else "")


def kind_of(value: object) -> str:
    """Return what YAML takes `value` for, with its article."""
    if isinstance(value, Scalar):
        return {"null": "nothing", "integer": "an integer"}.get(value.kind, f"a {value.kind}")
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a string"


def decode(data: str | bytes, where: str) -> str:
    """Return the text of `data` without a byte order mark. Raises MeshError if it is empty, too large or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise MeshError(f"{where}: holds {len(data)} bytes, more than the {MAX_BYTES} that a mesh file may have")
    try:
        text = data.decode() if isinstance(data, bytes) else data.encode().decode()
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        raise MeshError(f"{where}: is not UTF-8 (byte {at}): save it as UTF-8 text") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        found = "only blanks" if text else "0 bytes"
        raise MeshError(f"{where}: wanted a Mesh object, found {found}: the file is empty, or was cut while written")
    return text


def load(data: str | bytes, where: str) -> Tree:
    """Return the single document in `data`; `where` (a path) begins each message. Raises MeshError."""
    text = decode(data, where)
    fast = getattr(yaml, "CSafeLoader", None)
    try:
        loader = fast(text.encode()) if fast is not None else yaml.SafeLoader(text)
        try:
            return _build(loader.get_event, where, text)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        why = printable(", ".join(part for part in (error.context, error.problem) if part), 200)
        raise MeshError(f"{at}: not valid YAML, or cut off: {why}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise MeshError(f"{where}: not valid YAML: {printable(error, 200)}") from error


def tree_of(value: object, where: str, depth: int = 0) -> Tree:
    """Return a decoded JSON value as load() would return its text. Raises MeshError if it is nested too deep."""
    if depth > MAX_DEPTH:
        raise MeshError(f"{where}: nested deeper than {MAX_DEPTH} levels, which no mesh needs")
    if isinstance(value, dict):
        made = Map((str(key), tree_of(each, where, depth + 1)) for key, each in value.items())
        made.line = 0
        return made
    if isinstance(value, list):
        return [tree_of(each, where, depth + 1) for each in value]
    if isinstance(value, (str, Scalar)):
        return value
    if value is None:
        return Scalar("null", "null", None)
    if isinstance(value, bool):
        return Scalar("boolean", str(value).lower(), value)
    if isinstance(value, int):
        return Scalar("integer", str(value), value)
    return Scalar("number", repr(value), None) if isinstance(value, float) else str(value)


def _build(next_event: Any, where: str, text: str) -> Tree:
    root: list[Tree] = []
    # Untyped, as a cast costs as much as the rest of a step.
    here: Any = root
    stack: list[Any] = []
    key: Any = None
    value: Any
    documents = 0
    for _ in range(MAX_ITEMS):
        event = next_event()
        kind = type(event)
        if kind is yaml.ScalarEvent:
            if event.tag is not None or event.anchor is not None:
                raise _unwanted(event, where)
            value = event.value
            if type(here) is Map and key is None:
                key = value
                if key in here:
                    raise _at(event, where, f"the key {show(key)} stands twice in one mapping: remove one of them")
                continue
            # Most are addresses, and the check for those is the cheaper one.
            if event.implicit[0] and value.count(".") < 2:
                value = _plain(value)
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            here = stack.pop()
            continue
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            if event.tag is not None or event.anchor is not None:
                raise _unwanted(event, where)
            if type(here) is Map and key is None:
                raise _at(event, where, "a key must be a string, found a list or mapping")
            if len(stack) >= MAX_DEPTH:
                raise _at(event, where, f"nested deeper than {MAX_DEPTH} levels, which no mesh needs")
            stack.append(here)
            if kind is yaml.MappingStartEvent:
                value = Map()
                value.line = event.start_mark.line + 1
            else:
                value = []
        elif kind is yaml.AliasEvent:
            raise _unwanted(event, where)
        elif kind is yaml.DocumentStartEvent:
            documents += 1
            if documents > 1:
                raise _at(event, where, "a second document begins here; a mesh file holds one Mesh: remove the rest")
            continue
        elif kind is yaml.StreamEndEvent:
            break
        else:
            continue
        if type(here) is Map:
            here[key] = value
            key = None
        else:
            here.append(value)
        if kind is not yaml.ScalarEvent:
            here = value
    else:
        raise MeshError(f"{where}: more than {MAX_ITEMS} YAML items, which no mesh needs")
    if not root:
        raise MeshError(f"{where}: wanted a Mesh object, found only comments")
    return root[0]


def _plain(text: str) -> Tree:
    found = _ODD.fullmatch(text)
    if found is None:
        return text
    kind = found.lastgroup or ""
    if kind == "integer":
        return Scalar(kind, text, int(text, 0))
    return Scalar(kind, text, text.lower() in _TRUE if kind == "boolean" else None)


def _at(event: Any, where: str, message: str) -> MeshError:
    mark = event.start_mark
    return MeshError(f"{where}:{mark.line + 1}:{mark.column + 1}: {message}")


def _unwanted(event: Any, where: str) -> MeshError:
    if event.anchor is not None:
        what = "alias *" if type(event) is yaml.AliasEvent else "anchor &"
        return _at(event, where, f"the {what}{show(event.anchor)} is not accepted here: write the value out")
    return _at(event, where, f"the tag {show(event.tag)} is not accepted here: write the plain value")
