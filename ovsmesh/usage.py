"""What all commands share: a group whose help is whole, and options whose errors name where a wrong value came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ovsmesh.text import nearest, printable

if TYPE_CHECKING:
    TextType = click.ParamType[str]
else:
    # generic for a type checker only, before click 8.4
    TextType = click.ParamType
PREFIX = "OVSMESH"
_OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
"""Variables that Kubernetes sets in each pod for each Service."""
_ALIKE = 0.8
"""How alike a misspelt variable and its right name are, of 1."""


class Option(click.Option):
    """An option whose errors name the environment variable that a wrong value came from."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Parse the option."""
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.BadParameter as error:
            if self.name and self.name not in opts and (names := self.variables(ctx)):
                error.param_hint = f"the environment variable {names[0]}"
            raise

    def variables(self, ctx: click.Context) -> list[str]:
        """Return the environment variables that set this option."""
        return variables(self, ctx)


def variables(option: click.Parameter, ctx: click.Context) -> list[str]:
    """Return the environment variables that set an option."""
    if not isinstance(option, click.Option):
        return []
    given = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    if option.allow_from_autoenv and ctx.auto_envvar_prefix and option.name and option.name != "help":
        given.append(f"{ctx.auto_envvar_prefix}_{option.name.upper()}")
    return given


class Command(click.Command):
    """A command that names misspelt variables of the environment."""

    def invoke(self, ctx: click.Context) -> Any:
        """Warn of variables that look like one of this command, and run it."""
        for found, right in misspelt(ctx):
            click.echo(f"warning: the environment variable {found} is of no effect; did you mean {right}?", err=True)
        return super().invoke(ctx)


class Group(click.Group):
    """A group whose help shows the whole summary of each command."""

    command_class = Command
    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called. Fail for one that there is not, with the nearest or the list."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            names = self.list_commands(ctx)
            like = nearest(name, names)
            ctx.fail(
                f"No such command {name!r}. {f'Did you mean {like!r}?' if like else 'There are ' + ', '.join(names)}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with its summary; click would cut off what does not fit one line."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(1000)) for name, command in found if command and not command.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def misspelt(ctx: click.Context) -> Iterator[tuple[str, str]]:
    """Yield the variables of the environment that look like one that this command takes, each with the right name."""
    own = {name for option in ctx.command.params for name in variables(option, ctx)}
    root = ctx.find_root().command
    commands = root.list_commands(ctx) if isinstance(root, click.Group) else []
    path = ctx.auto_envvar_prefix or ""
    others = tuple(f"{PREFIX}_{name.upper()}_" for name in commands if not path.startswith(f"{PREFIX}_{name.upper()}"))
    for found in sorted(os.environ):
        if found in own or found.startswith(others) or not found.upper().startswith(PREFIX[:4]):
            continue
        right = nearest(found, own, _ALIKE)
        if right and not _OF_A_SERVICE.search(found):
            yield printable(found, 80), right
