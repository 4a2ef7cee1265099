"""Parse JSON for python-ovs with the standard library's C code.

python-ovs has a C parser, but its source distribution builds it only where Open vSwitch's headers are installed. It
falls back silently to a parser in Python that takes over a second for a thousand ports.
"""

from __future__ import annotations

import json
import re
from typing import Any

import ovs.json

_MARKS = re.compile(r'[{}\[\]"]|\\.?', re.DOTALL)


class Parser:
    """A replacement of ovs.json.Parser. It finds the end of the outermost object or array; json decodes that whole."""

    def __init__(self, check_trailer: bool = False) -> None:
        self._chunks: list[str] = []
        self._depth = 0
        self._in_string = False
        self._skip = 0
        self._done = False

    def feed(self, text: str) -> int:
        """Take characters up to the end of the message, and return how many."""
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
        """Return whether the message is complete."""
        return self._done

    def finish(self) -> Any:
        """Return the decoded message, or a string that says what is wrong with it, as python-ovs does."""
        try:
            return json.loads("".join(self._chunks))
        except ValueError as error:
            return str(error)
        except RecursionError:
            return "nested too deeply"


def install() -> None:
    """Make python-ovs use this parser where its own is the slow one."""
    if ovs.json.PARSER != ovs.json.PARSER_C:
        ovs.json.Parser = Parser
