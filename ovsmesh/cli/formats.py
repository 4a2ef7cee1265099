"""What the commands take and print: options and types of their values, what a shell completes, text, JSON and YAML.

A type refuses a wrong value before anything is done: a usage error, exit status 2.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem, ShellComplete

from ovsmesh import logs
from ovsmesh.errors import OvsmeshError
from ovsmesh.names import CNI_BIN_DIR, DEFAULT_OVSDB, DEFAULT_STATE
from ovsmesh.text import printable
from ovsmesh.usage import Option, TextType

_EVERY, _LATEST = 1.0, 2.0
"""Seconds between looks, and after which what was seen is shown even where it is the same."""
_HOME, _REST_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
"""Control sequences (ECMA-48): go to the first line, erase what is right of the cursor, what is below it."""


class _Checked(TextType):
    """A text that is taken as it is, once `_check` finds nothing wrong with it."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text. Fail for one that can't be meant."""
        text = str(value)
        try:
            why = self._check(text)
        except OvsmeshError as error:
            why = str(error)
        if why:
            self.fail(f"{printable(text, 120)!r}: {why}", param, ctx)
        return text

    def _check(self, text: str) -> str:
        """Return why not, "" for a good value."""
        raise NotImplementedError


class Listen(_Checked):
    """An address to listen on. That the port is free shows only when it is tried."""

    def _check(self, text: str) -> str:
        from ovsmesh.http_server import wrong_address

        return wrong_address(text)


class Ovsdb(_Checked):
    """The socket of this host's Open vSwitch database."""

    def _check(self, text: str) -> str:
        kind, _, path = text.partition(":")
        if kind != "unix" or not path.startswith("/"):
            return "wanted unix:/PATH of this host's ovsdb-server"
        return _wrong_path(path, stat.S_ISSOCK, "a socket")


class NodeName(_Checked):
    """The name of a node."""

    def _check(self, text: str) -> str:
        from ovsmesh.mesh.validation import is_name

        return "" if is_name(text) else "no node can have this name: wanted letters, digits, - _ . inside, 253 at most"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the nodes of the mesh that the agent of this host has, as far as this user may read them."""
        return [CompletionItem(name) for name in _nodes(ctx) if name.startswith(incomplete)]


class Since(_Checked):
    """An age, or a time."""

    def _check(self, text: str) -> str:
        from ovsmesh.cli.history import wrong_since

        return wrong_since(text)


class Argv(_Checked):
    """A command line, split as a shell splits words."""

    def _check(self, text: str) -> str:
        try:
            return "" if shlex.split(text) else "wanted a command"
        except ValueError as error:
            return f"can't be split into words: {str(error).lower()}"


class PathName(_Checked):
    """A path that need not exist; what is there is of the right kind: "file", "directory" or "socket"."""

    def __init__(self, kind: str, many: bool = False) -> None:
        self.name, self._many = kind, many

    def _check(self, text: str) -> str:
        kinds = {"file": stat.S_ISREG, "directory": stat.S_ISDIR, "socket": stat.S_ISSOCK}
        paths = [path for path in text.split(":") if path] if self._many else [text]
        whys = (
            _wrong_path(os.path.abspath(path) if path else "", kinds[self.name], f"a {self.name}") for path in paths
        )
        return next(filter(None, whys), "" if paths else "wanted directories, as in PATH")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Have the shell complete the path."""
        return [CompletionItem(incomplete, type="dir" if self.name == "directory" else "file")]


def _wrong_path(path: str, is_kind: Callable[[int], bool], wanted: str) -> str:
    """Return why nothing of the wanted kind can be at a path, "" if it can."""
    if not path or "\0" in path:
        return f"wanted the path of {wanted}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, PermissionError):
        return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()
    # a mesh may come through a pipe or a device, and its reader says what it makes of that
    return "" if is_kind(mode) or not (stat.S_ISDIR(mode) or wanted != "a file") else f"is there, and is not {wanted}"


class Seconds(click.FloatRange):
    """A number of seconds. It is finite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r}: wanted seconds", param, ctx)
        return found


# options that several commands have

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
FILE, DIR = PathName("file"), PathName("directory")


def option(name: str, text: str, default: str | None = None, usual: str = "", **settings: Any) -> Decorator:
    """Return an option. `usual` is shown as the default of one whose default is decided later."""
    shown = f"{text}  [default: {usual}]" if usual else text
    given: dict[str, Any] = {
        "cls": Option,
        "help": shown,
        "default": default,
        "show_default": default is not None,
    }
    return click.option(*name.split(), **(given | settings))


def flag(name: str, text: str) -> Decorator:
    """Return an option without a value."""
    return option(name, text, is_flag=True, default=None)


def listening(default: str) -> Decorator:
    """Return the option `--listen`."""
    return option(
        "--listen", "Address for /metrics, /healthz and /readyz.", default, metavar="ADDR:PORT", type=Listen()
    )


def kubeconfig_of(text: str) -> Decorator:
    """Return the option `--kubeconfig`; `text` says what it is for."""
    usual = "$KUBECONFIG, the pod's service account, ~/.kube/config"
    return option("--kubeconfig", text, usual=usual, metavar="FILE", type=FILE)


SECONDS = Seconds(0, 86400)
COUNT = click.IntRange(1)
_LEVELS = click.Choice(["debug", "info", "warning", "error"])
log_level_option = option("--log-level", "Least severity that is logged.", "info", type=_LEVELS)
log_format_option = option("--log-format", "Format of the log.", "text", type=click.Choice(logs.FORMATS))
state_dir_option = option(
    "--state-dir", "Directory in which the agent keeps its state.", DEFAULT_STATE, metavar="DIR", type=DIR
)
NODE = (
    option("--mesh", "Mesh file: a Mesh object in YAML.", metavar="FILE", type=FILE),
    option("--node", "Name of this node in the mesh.", usual="the hostname", metavar="NAME", type=NodeName()),
    option(
        "--ovsdb",
        "Socket of the Open vSwitch database.",
        usual=DEFAULT_OVSDB,
        metavar="unix:PATH",
        type=Ovsdb(),
    ),
    state_dir_option,
)
"""Options that name a node, its mesh and its switch. None means: as the agent that last ran here, or the default."""
CONTAINERS = (
    option("--cni-dir", "Directory for the CNI conflist: /etc/cni/net.d.", usual="none", metavar="DIR", type=DIR),
    option(
        "--cni-bin-dir",
        "Directories of the CNI plugins.",
        usual=CNI_BIN_DIR,
        metavar="DIR:DIR…",
        type=PathName("directory", many=True),
    ),
    option(
        "--docker",
        "replace: move Docker's containers from docker0 to kbr0. auto: never restart Docker, say what to do. "
        "off: leave Docker alone.",
        usual="auto",
        type=click.Choice(["auto", "replace", "off"]),
    ),
    option("--docker-config", "Configuration of Docker.", usual="/etc/docker/daemon.json", metavar="FILE", type=FILE),
    option(
        "--docker-socket",
        "Socket of Docker.",
        usual="/var/run/docker.sock",
        metavar="PATH",
        type=PathName("socket"),
    ),
    option(
        "--docker-restart",
        "Command that restarts Docker, run without a shell.",
        usual="systemctl restart docker",
        metavar="'ARGV …'",
        type=Argv(),
    ),
    option(
        "--docker-timeout",
        "Time for the restart command, and again for Docker to answer.",
        usual="120",
        metavar="SECONDS",
        type=Seconds(1, 3600),
    ),
)


def with_options(*options: Decorator) -> Decorator:
    """Return one decorator for several options, which help shows in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


# completion


def _nodes(ctx: click.Context) -> list[str]:
    from ovsmesh.agent.options import remembered
    from ovsmesh.mesh import manifest
    from ovsmesh.names import DEFAULT_STATE
    from ovsmesh.state_dir import read_regular

    path = ctx.params.get("mesh") or remembered(ctx.params.get("state_dir") or DEFAULT_STATE, {}).mesh
    try:
        mesh, _ = manifest.parse(read_regular(path)[0], path)
    except (OvsmeshError, OSError):
        return []
    return [node.name for node in mesh.nodes]


def complete(command: click.Command, prog_name: str, words: list[str]) -> Iterator[str]:
    """Yield what kubectl wants of `kubectl_complete-PLUGIN`: a completion of the last word a line, then a directive.

    The directive's bits are those of Cobra: 4 is "no files", and without it the shell completes files.
    """
    *before, last = words or [""]
    found = ShellComplete(command, {}, prog_name, "").get_completions(before, last)
    yield from (item.value if not item.help else f"{item.value}\t{item.help}" for item in found if item.type == "plain")
    yield ":0" if any(item.type != "plain" for item in found) else ":4"


# what is printed


class View(NamedTuple):
    """What a command shows, in all formats, and its exit status."""

    text: str
    tree: Any
    code: int


def serialize(tree: Any, output: str) -> str:
    """Return a tree of plain values as "json" or "yaml", without a newline at its end."""
    if output == "json":
        return json.dumps(tree, indent=2, ensure_ascii=False)
    import yaml  # an agent in a pod does without it

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
