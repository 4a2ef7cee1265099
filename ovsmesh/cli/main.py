"""The command line: one thin command each.

A command imports what it needs when it runs, so the agent does not carry the lab. Every option can be set as
OVSMESH_<COMMAND>_<OPTION>.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

import click

from ovsmesh import __version__, logs, usage
from ovsmesh.cli import formats
from ovsmesh.cli.formats import (
    CONTAINERS,
    COUNT,
    FILE,
    NODE,
    SECONDS,
    flag,
    kubeconfig_of,
    listening,
    log_format_option,
    log_level_option,
    option,
    state_dir_option,
    with_options,
)
from ovsmesh.errors import OvsmeshError, grouped
from ovsmesh.names import DEFAULT_LISTEN

if TYPE_CHECKING:
    from ovsmesh.agent.options import Options

CONTROLLER_LISTEN = "127.0.0.1:9475"
_READ = "read the packet filter, Open vSwitch's database and flows, and the agent's state directory"


class _Lazy(usage.Group):
    """Loads the lab's commands when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "lab"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "lab":
            from ovsmesh.lab.cli import lab

            return lab
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Lazy, context_settings={"auto_envvar_prefix": "OVSMESH", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ovsmesh")
def cli() -> None:
    """Connect the pods and containers of many hosts in one flat network, on Open vSwitch."""


_PATHS = ("mesh", "cni_dir", "docker_config", "docker_socket")


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, their paths made absolute."""
    given = {name: value for name, value in options.items() if value is not None and value != ""}
    return given | {name: os.path.abspath(given[name]) for name in _PATHS if name in given}


def _options(state_dir: str, options: Mapping[str, Any]) -> Options:
    """Return all options: what was not given is as the agent that last ran here has it."""
    from ovsmesh.agent.options import remembered

    return remembered(state_dir, _chosen(options))


def _root(needed: str, instead: str = "") -> None:
    if os.geteuid() != 0:
        raise OvsmeshError(f"only root may {needed}; run it as root (sudo){instead}")


@cli.command()
@with_options(*NODE, *CONTAINERS)
@listening(DEFAULT_LISTEN)
@option(
    "--kubeconfig", "Kubernetes cluster to read the mesh from.", usual="in a pod, its own", metavar="FILE", type=FILE
)
@flag("--once", "Apply changes until none is left, then exit: 0 converged, 1 not.")
@log_level_option
@log_format_option
def agent(listen: str, once: bool, log_level: str, log_format: str, **options: Any) -> None:
    """Keep this node's part of the mesh in sync until SIGTERM. What is in place then stays."""
    from ovsmesh.agent.main import once as reconcile_once
    from ovsmesh.agent.main import serve
    from ovsmesh.agent.options import Options

    logs.to_stderr(log_level, log_format)
    chosen = _chosen(options)
    if "mesh" in chosen and "kubeconfig" in chosen:
        raise click.UsageError("--mesh and --kubeconfig: give one of them, the mesh is from a file or from a cluster")
    if "mesh" not in chosen and "kubeconfig" not in chosen:
        _in_pod()
    _root("change links, routes, packet filter rules and Open vSwitch")
    if not once:
        serve(Options(listen=listen, **chosen), _stop_fd())
        return
    result = reconcile_once(Options(listen="", **chosen))
    for line in (*result.plan.lines(), *grouped(result.problems)):
        click.echo(line, err=True)
    converged = result.converged and result.mesh_current
    click.echo("converged" if converged else "not converged", err=True)
    sys.exit(0 if converged else 1)


def _in_pod() -> None:
    from ovsmesh.kube.service_account import ServiceAccount

    if ServiceAccount.find() is None:
        text = "no mesh: give --mesh FILE, or --kubeconfig FILE (in a pod with a service account: neither)"
        raise click.UsageError(text)


def _stop_fd() -> int:
    """Return a file descriptor that becomes readable at SIGTERM or SIGINT."""
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read


_output = option("-o --output", "Format of the output.", "table", type=click.Choice(["table", "json", "yaml"]))


@cli.command()
@with_options(*NODE, *CONTAINERS)
@option("-o --output", "Format of the output.", "text", type=click.Choice(["text", "json", "yaml"]))
def plan(state_dir: str, output: str, **options: Any) -> None:
    """Print what the agent would change now.

    Exit status: 0 nothing, 2 changes, 1 an error or a conflict with something unmanaged.
    """
    from ovsmesh.cli import inspect
    from ovsmesh.dataplane.report_text import problem_lines

    _root(_READ)
    result, failed = inspect.look(_options(state_dir, options))
    changes = bool(result.plan.steps or result.plan.held)
    if output == "text":
        for line in (*result.plan.lines(), *(() if changes or failed else ("nothing to change",))):
            click.echo(line)
        for line in problem_lines(result.problems):
            click.echo(line, err=True)
    else:
        click.echo(formats.serialize(inspect.plan_dict(result), output))
    sys.exit(1 if failed else 2 if changes else 0)


@cli.command()
@with_options(*NODE, *CONTAINERS)
@_output
@flag("--watch", "Show it again whenever it changes, at least every 2 seconds.")
@flag("--all", "Show all nodes, as their agents tell this host's agent.")
@flag("--cluster", "Show all nodes, as the Kubernetes API has them. Does not need root.")
@kubeconfig_of("Cluster to ask, with --cluster.")
def status(state_dir: str, output: str, watch: bool, cluster: bool, kubeconfig: str | None, **options: Any) -> None:
    """Show this node and each peer: what is in place, whether packets arrive, what is missing and why.

    Exit status: 0 all is well, 2 it is not, 1 it can't be told. With --watch: of what was shown last.
    """
    from ovsmesh.cli import inspect

    nodes = options.pop("all")
    given = click.get_current_context().get_parameter_source("kubeconfig")
    if given is click.core.ParameterSource.COMMANDLINE and not cluster:
        raise click.UsageError("--kubeconfig is the cluster to ask with --cluster: give that too")
    if nodes and cluster:
        raise click.UsageError("give one of --all and --cluster")
    view: Callable[[], formats.View]
    if cluster:
        from ovsmesh.cli import cluster_status

        view = functools.partial(cluster_status.view, kubeconfig)
    else:
        chosen = _options(state_dir, options)
        if not nodes:
            _root(_READ, ". Without root, what the agents tell: `ovsmesh status --all`, `ovsmesh matrix`")
        view = functools.partial(_all_nodes if nodes else inspect.view, chosen)
    sys.exit((formats.watch if watch else formats.show)(view, output))


def _all_nodes(options: Options) -> formats.View:
    from ovsmesh.cli.inspect import nodes_view
    from ovsmesh.cli.matrix import matrix

    return nodes_view(matrix(options))


@cli.command()
@with_options(*NODE, *CONTAINERS)
@option("--peer", "Check this peer only.", usual="all", metavar="NAME", type=formats.NodeName())
@_output
def check(state_dir: str, peer: str | None, output: str, **options: Any) -> None:
    """Send packets of full size to every peer and say which ones get through.

    Exit status: 0 all do, 2 some do not or something is missing, 1 it can't be told.
    """
    from ovsmesh.cli import inspect
    from ovsmesh.cli.check import check as run

    _root(f"send probes from raw sockets and {_READ}")
    chosen = _options(state_dir, options)
    sys.exit(formats.show(lambda: inspect.view_of(run(chosen, peer or "")), output))


@cli.command()
@state_dir_option
@option(
    "--since",
    "Show what is newer: an age as 30s, 10m, 1h, 2d, or an RFC 3339 time.",
    usual="all",
    metavar="WHEN",
    type=formats.Since(),
)
@option("-o --output", "Format of the output.", "text", type=click.Choice(["text", "json"]))
def history(state_dir: str, since: str | None, output: str) -> None:
    """Show what changed, drifted, broke and recovered on this node.

    It reads the state directory, and needs no running agent.
    """
    from ovsmesh.cli import history as found

    entries = found.entries(state_dir, since or "")
    if output == "json":
        click.echo(formats.serialize(found.tree(entries), output))
        return
    for line in found.lines(entries):
        click.echo(line)
    if not entries:
        click.echo("nothing", err=True)


@cli.command()
@with_options(*NODE)
@option("-o --output", "Format of the output.", "table", type=click.Choice(["table", "json"]))
@option("--worst", "List the worst N directions.", usual="a table, where it fits", metavar="N", type=COUNT)
def matrix(state_dir: str, output: str, worst: int | None, **options: Any) -> None:
    """Show round trip, loss and path MTU between every two nodes, in each direction.

    Asks the agents of all nodes, from any of them. Exit status: 0 all is well, 2 it is not, 1 it can't be told.
    """
    from ovsmesh.cli import matrix as matrices

    found = matrices.matrix(_options(state_dir, options))
    click.echo(formats.serialize(found, output) if output == "json" else matrices.render(found, worst))
    sys.exit(matrices.exit_code(found))


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@with_options(*NODE, *CONTAINERS)
@_output
@kubeconfig_of("Cluster in which pod names are looked up.")
def trace(source: str, destination: str, state_dir: str, output: str, kubeconfig: str | None, **options: Any) -> None:
    """Follow packets from SRC to DST and say at which hop they stop.

    SRC and DST are addresses of the mesh, names of nodes or Docker containers, or pods as NAMESPACE/NAME. One of them
    is on this node. Exit status: 0 packets arrive and all hops are as wanted, 2 not so, 1 it can't be told.
    """
    from ovsmesh.cli.trace import trace as run
    from ovsmesh.trace.text import EXIT, render, to_dict

    _root(f"send packets from raw sockets and {_READ}")
    found = run(_options(state_dir, options), source, destination, kubeconfig)
    click.echo(render(found).rstrip() if output == "table" else formats.serialize(to_dict(found), output))
    sys.exit(EXIT[found.state])


@cli.command()
@with_options(*NODE, *CONTAINERS)
@option(
    "-o --output", "File or directory to write to; - is standard output.", usual="the current directory", metavar="FILE"
)
def bundle(state_dir: str, output: str | None, **options: Any) -> None:
    """Write everything that a maintainer asks for into one archive, secrets left out.

    It works with the agent or Open vSwitch dead: its MANIFEST.txt says what could not be had.
    """
    from ovsmesh.cli.bundle import bundle as run

    _root(_READ)
    chosen = _chosen(options)
    given = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    click.echo(run(_options(state_dir, options), [*given, "--state-dir", state_dir], output or ""), err=output == "-")


@cli.command()
@with_options(*NODE, *CONTAINERS)
@flag("--dry-run", "Print what would be removed and restored, change nothing.")
def cleanup(state_dir: str, dry_run: bool, **options: Any) -> None:
    """Remove everything that ovsmesh made and nothing else, and restore what it changed.

    Looks again afterwards and prints what is left. Exit status: 0 when nothing is, else 1.
    """
    from ovsmesh.agent.cleanup import cleanup as clean_up

    _root(
        f"{_READ}, even with --dry-run"
        if dry_run
        else "remove links, routes, packet filter rules and parts of Open vSwitch"
    )
    lines, clean = clean_up(_options(state_dir, options), dry_run)
    for line in lines:
        click.echo(line)
    sys.exit(0 if clean else 1)


@cli.command()
@with_options(*NODE, *CONTAINERS)
@flag("--check", "Check whether this host has what a node needs, and whether peers answer.")
@flag("--print", "Print this host's part of the mesh as a shell script without ovsmesh.")
@option(
    "--wait",
    "Wait until the agent has converged, and packets get through to all peers.",
    metavar="SECONDS",
    type=SECONDS,
)
def bootstrap(state_dir: str, wait: float | None, **options: Any) -> None:
    """Check this host, print its part of the mesh, or wait for its agent.

    scripts/bootstrap.sh makes a host a node with these three. Exit status of --check and --wait: 0 all is well, 2 only
    peers do not answer, 1 anything else.
    """
    from ovsmesh.cli.bootstrap import await_converged, check, exit_code, script

    printed, checked = options.pop("print"), options.pop("check")
    if [printed, checked, wait is not None].count(True) != 1:
        raise click.UsageError("give one of --print, --check and --wait SECONDS")
    _root(_READ)
    chosen = _options(state_dir, options)
    if printed:
        made, problems = script(chosen)
        click.echo(made, nl=False)
        for text in grouped(problems):
            click.echo(f"! {text}", err=True)
        sys.exit(1 if any(p.fatal for p in problems) else 0)
    if checked:
        checks = check(chosen)
        for line in checks:
            click.echo(str(line))
        sys.exit(exit_code(checks))
    lines, code = await_converged(chosen, wait or 0.0)
    for text in lines:
        click.echo(text)
    sys.exit(code)


@cli.command()
@kubeconfig_of("Cluster to work in.")
@listening(CONTROLLER_LISTEN)
@log_level_option
@log_format_option
def controller(kubeconfig: str | None, listen: str, log_level: str, log_format: str) -> None:
    """Run the controller of a Kubernetes cluster until SIGTERM.

    Reads Nodes; writes MeshSlices and the Nodes' conditions.
    """
    from ovsmesh.controller.controller import serve
    from ovsmesh.kube.client import Api
    from ovsmesh.kube.config import find

    logs.to_stderr(log_level, log_format)
    serve(Api(find(kubeconfig), "ovsmesh-controller"), listen, _stop_fd())


@cli.command()
@click.argument("digest")
@state_dir_option
def confirm(digest: str, state_dir: str) -> None:
    """Confirm the mass removal that the agent holds back.

    DIGEST is in the agent's message and in `status`. Waits until the agent has taken it. Exit status: 0 it has, else 1.
    """
    from ovsmesh.cli import inspect

    _root("write into the agent's state directory")
    click.echo(inspect.confirm(_options(state_dir, {}), digest))


class _Plugin(usage.Group):
    """The commands of `kubectl ovsmesh`: those that ask one node run in the pod of its agent."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return cli.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from ovsmesh.cli.kubectl import COMMANDS

        local = cli.get_command(ctx, cmd_name)
        return local if local is None or cmd_name not in COMMANDS else _in_pod_of_agent(local)


def _in_pod_of_agent(local: click.Command) -> click.Command:
    """Return the command that runs this one in the pod of a node's agent."""

    @click.command(
        local.name,
        help=f"{cleandoc(local.help or '')}\n\nRuns in the pod of a node's agent; other options are handed to it.",
        context_settings={"ignore_unknown_options": True},
    )
    @option("--on", "Node whose agent runs it.", usual="SRC's" if local.name == "trace" else "any", metavar="NODE")
    @kubeconfig_of("Cluster to ask.")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(on: str | None, kubeconfig: str | None, arguments: tuple[str, ...]) -> None:
        from ovsmesh.cli import kubectl

        # refuses here what the command does not take
        given = click.Context(local, info_name=click.get_current_context().command_path)
        values, _, _ = local.make_parser(given).parse_args(list(arguments))
        ends = [values.get(p.name) for p in local.params if isinstance(p, click.Argument)]
        code = kubectl.run(
            local.name or "", arguments, [end for end in ends if isinstance(end, str)], on or "", kubeconfig
        )
        sys.exit(code)

    return command


def _plugin() -> click.Group:
    return _Plugin(cli.name, params=cli.params, help=cli.help, context_settings=cli.context_settings)


def kubectl_complete() -> None:
    """Print the completions that kubectl asks its plugin's `kubectl_complete-ovsmesh` for."""
    for line in formats.complete(_plugin(), "kubectl ovsmesh", sys.argv[1:]):
        click.echo(line)


def kubectl() -> None:
    """Run `kubectl ovsmesh …`, the console script kubectl-ovsmesh. Its `status` is the cluster's."""
    main(_plugin(), prog_name="kubectl ovsmesh", default_map={"status": {"cluster": True}})


def main(command: click.Command = cli, **settings: Any) -> None:
    """Run the console script. An error that a user can correct is one line on standard error, exit status 1."""
    try:
        command(standalone_mode=True, **settings)
    except OvsmeshError as error:
        logs.fail(str(error))
        sys.exit(1)
