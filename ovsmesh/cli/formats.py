"""The formats of the commands' output: text, JSON and YAML, once or again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import yaml

from ovsmesh.errors import OvsmeshError

_EVERY, _LATEST = 1.0, 2.0
"""Seconds between looks, and after which what was seen is shown even where it is the same."""
_HOME, _REST_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
"""Control sequences (ECMA-48): go to the first line, erase what is right of the cursor, what is below it."""


class View(NamedTuple):
    """What a command shows, in all formats, and its exit status."""

    text: str
    tree: Any
    code: int


def serialize(tree: Any, output: str) -> str:
    """Return a tree of plain values as "json" or "yaml", without a newline at its end."""
    if output == "json":
        return json.dumps(tree, indent=2, ensure_ascii=False)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip()


def show(read: Callable[[], View], output: str) -> int:
    """Print what is read in the given format. Return the exit status."""
    view = read()
    click.echo(view.text.rstrip() if output == "table" else serialize(view.tree, output))
    return view.code


def watch(read: Callable[[], View], output: str) -> int:
    """Show what is read whenever it changes, and every two seconds, until Ctrl-C. Return the last exit status.

    A terminal is drawn again. JSON is one document a line, YAML has a line of three hyphens before each document.
    """
    shown, shown_at, code = "", float("-inf"), 1
    try:
        while True:
            began = time.monotonic()
            try:
                text, tree, code = read()
            except OvsmeshError as error:
                text, tree, code = f"ovsmesh: {error}", {"error": str(error)}, 1
            if text != shown or time.monotonic() - shown_at + _EVERY > _LATEST:
                _draw(text, tree, output)
                shown, shown_at = text, time.monotonic()
            # what is shown comes from many sources; no single event tells that one of them has changed
            time.sleep(max(_EVERY, time.monotonic() - began))
    except KeyboardInterrupt:
        return code


def _draw(text: str, tree: Any, output: str) -> None:
    if output == "json":
        print(json.dumps(tree, ensure_ascii=False), flush=True)
    elif output == "yaml":
        print(f"---\n{serialize(tree, output)}", flush=True)
    elif sys.stdout.isatty():
        lines = [*text.rstrip().split("\n"), "", "Shown again at every change. Ctrl-C ends it."]
        print(_HOME + "".join(f"{line}{_REST_OF_LINE}\n" for line in lines) + _BELOW, end="", flush=True)
    else:
        print(text.rstrip() + "\n", flush=True)
