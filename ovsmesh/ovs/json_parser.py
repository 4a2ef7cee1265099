"""A JSON parser for python-ovs that decodes with the standard library's C code.

python-ovs ships a C parser, but its source distribution builds it only where Open vSwitch's
headers are installed, and falls back silently to a parser that walks each character in Python:
a thousand ports cost it over a second. Imports ovs and json only.
"""

from __future__ import annotations

import json
import re
from typing import Any

import ovs.json

_MARKS = re.compile(r'[{}\[\]"]|\\.?', re.DOTALL)


class Parser:
    """What ovs.jsonrpc wants of ovs.json.Parser: feed(), is_done(), finish().

    `feed` only looks for the end of the outermost object or array; json decodes it whole.
    """

    def __init__(self, check_trailer: bool = False) -> None:
        self._chunks: list[str] = []
        self._depth = 0
        self._in_string = False
        self._skip = 0
        self._done = False

    def feed(self, text: str) -> int:
        """Takes characters up to the end of the message and returns how many it took."""
        at, self._skip = min(self._skip, len(text)), 0
        for found in _MARKS.finditer(text, at):
            mark = found.group()
            if mark[0] == "\\":
                # an escape cut in two by the end of the chunk: its second half is not a quote
                self._skip = 2 - len(mark)
            elif mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    self._done = True
                    self._chunks.append(text[: found.end()])
                    return found.end()
        self._chunks.append(text)
        return len(text)

    def is_done(self) -> bool:
        return self._done

    def finish(self) -> Any:
        """The decoded message, or a string that says what is wrong with it, as python-ovs has it."""
        try:
            return json.loads("".join(self._chunks))
        except ValueError as error:
            return str(error)
        except RecursionError:
            return "nested too deeply"


def install() -> None:
    """Makes python-ovs use this parser where its own is the slow one."""
    if ovs.json.PARSER != ovs.json.PARSER_C:
        ovs.json.Parser = Parser
