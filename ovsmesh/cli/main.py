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

from ovsmesh import __version__, logs
from ovsmesh.errors import OvsmeshError
from ovsmesh.names import CNI_BIN_DIR, DEFAULT_LISTEN, DEFAULT_OVSDB, DEFAULT_STATE

if TYPE_CHECKING:
    from ovsmesh.agent.options import Options
    from ovsmesh.cli.formats import View

CONTROLLER_LISTEN = "127.0.0.1:9475"
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class _Lazy(click.Group):
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


def _option(name: str, text: str, default: str | None = None, usual: str = "", **settings: Any) -> Decorator:
    """Return an option. `usual` is shown as the default of one whose default is decided later."""
    shown = f"{text}  [default: {usual}]" if usual else text
    return click.option(*name.split(), help=shown, default=default, show_default=default is not None, **settings)


def _listen(default: str) -> Decorator:
    return _option("--listen", "Address for /metrics, /healthz and /readyz.", default, metavar="ADDR:PORT")


def _kubeconfig(text: str) -> Decorator:
    usual = "$KUBECONFIG, the pod's service account, ~/.kube/config"
    return _option("--kubeconfig", text, usual=usual, metavar="FILE")


_SECONDS = click.FloatRange(0)
_COUNT = click.IntRange(1)
_LEVELS = click.Choice(["debug", "info", "warning", "error"])
_log_level = _option("--log-level", "Least severity that is logged.", "info", type=_LEVELS)
_log_format = _option("--log-format", "Format of the log.", "text", type=click.Choice(logs.FORMATS))
_state_dir = _option("--state-dir", "Directory in which the agent keeps its state.", DEFAULT_STATE, metavar="DIR")
_NODE = (
    _option("--mesh", "Mesh file: a Mesh object in YAML.", metavar="FILE"),
    _option("--node", "Name of this node in the mesh.", usual="the hostname", metavar="NAME"),
    _option("--ovsdb", "Socket of the Open vSwitch database.", usual=DEFAULT_OVSDB, metavar="unix:PATH"),
    _state_dir,
)
"""Options that name a node, its mesh and its switch. None means: as the agent that last ran here, or the default."""
_CONTAINERS = (
    _option("--cni-dir", "Directory for the CNI conflist, for example /etc/cni/net.d.", usual="none", metavar="DIR"),
    _option("--cni-bin-dir", "Directories of the CNI plugins.", usual=CNI_BIN_DIR, metavar="DIR:DIR…"),
    _option(
        "--docker",
        "replace: move Docker's containers from docker0 to kbr0. auto: never restart Docker, say what to do. "
        "off: leave Docker alone.",
        usual="auto",
        type=click.Choice(["auto", "replace", "off"]),
    ),
    _option("--docker-config", "Configuration of Docker.", usual="/etc/docker/daemon.json", metavar="FILE"),
    _option("--docker-socket", "Socket of Docker.", usual="/var/run/docker.sock", metavar="PATH"),
    _option(
        "--docker-restart",
        "Command that restarts Docker, run without a shell.",
        usual="systemctl restart docker",
        metavar="'ARGV …'",
    ),
    _option(
        "--docker-timeout",
        "Time for the restart command, and again for Docker to answer.",
        usual="120",
        metavar="SECONDS",
        type=click.FloatRange(1, 3600),
    ),
)


def _with(*options: Decorator) -> Decorator:
    """Return one decorator for several options, which help shows in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


_PATHS = ("mesh", "cni_dir", "docker_config", "docker_socket")


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, their paths made absolute."""
    given = {name: value for name, value in options.items() if value is not None and value != ""}
    return given | {name: os.path.abspath(given[name]) for name in _PATHS if name in given}


def _options(state_dir: str, options: Mapping[str, Any]) -> Options:
    """Return all options: what was not given is as the agent that last ran here has it."""
    from ovsmesh.agent.options import remembered

    return remembered(state_dir, _chosen(options))


def _root() -> None:
    if os.geteuid() != 0:
        raise OvsmeshError("this reads and changes the host's network; run it as root (sudo)")


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@_listen(DEFAULT_LISTEN)
@_option("--kubeconfig", "Kubernetes cluster to read the mesh from.", usual="in a pod, its own", metavar="FILE")
@click.option("--once", is_flag=True, help="Apply changes until none is left, then exit: 0 converged, 1 not.")
@_log_level
@_log_format
def agent(listen: str, once: bool, log_level: str, log_format: str, **options: Any) -> None:
    """Keep this node's part of the mesh in sync until SIGTERM. What is in place then stays."""
    from ovsmesh.agent.main import once as reconcile_once
    from ovsmesh.agent.main import serve
    from ovsmesh.agent.options import Options

    logs.to_stderr(log_level, log_format)
    chosen = _chosen(options)
    if "mesh" in chosen and "kubeconfig" in chosen:
        raise OvsmeshError("--mesh and --kubeconfig: give one of them, the mesh comes from a file or from a cluster")
    if "mesh" not in chosen and "kubeconfig" not in chosen:
        _in_pod()
    _root()
    if not once:
        serve(Options(listen=listen, **chosen), _stop_fd())
        return
    result = reconcile_once(Options(listen="", **chosen))
    for line in (*result.plan.lines(), *result.problems):
        click.echo(str(line), err=True)
    converged = result.converged and result.mesh_current
    click.echo("converged" if converged else "not converged", err=True)
    sys.exit(0 if converged else 1)


def _in_pod() -> None:
    from ovsmesh.kube.service_account import ServiceAccount

    if ServiceAccount.find() is None:
        raise OvsmeshError("no mesh: give --mesh FILE, or --kubeconfig FILE (in a pod with a service account: neither)")


def _stop_fd() -> int:
    """Return a file descriptor that becomes readable at SIGTERM or SIGINT."""
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read


_output = _option("-o --output", "Format of the output.", "table", type=click.Choice(["table", "json", "yaml"]))


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@_option("-o --output", "Format of the output.", "text", type=click.Choice(["text", "json", "yaml"]))
def plan(state_dir: str, output: str, **options: Any) -> None:
    """Print what the agent would change now.

    Exit status: 0 nothing, 2 changes, 1 an error or a conflict with something unmanaged.
    """
    from ovsmesh.cli import inspect
    from ovsmesh.cli.formats import serialize
    from ovsmesh.dataplane.report_text import problem_lines

    _root()
    result, failed = inspect.look(_options(state_dir, options))
    changes = bool(result.plan.steps or result.plan.held)
    if output == "text":
        for line in (*result.plan.lines(), *(() if changes or failed else ("nothing to change",))):
            click.echo(line)
        for line in problem_lines(result.problems):
            click.echo(line, err=True)
    else:
        click.echo(serialize(inspect.plan_dict(result), output))
    sys.exit(1 if failed else 2 if changes else 0)


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@_output
@click.option("--watch", is_flag=True, help="Show it again whenever it changes, at least every 2 seconds.")
@click.option("--all", "nodes", is_flag=True, help="Show all nodes, as their agents tell this host's agent.")
@click.option("--cluster", is_flag=True, help="Show all nodes, as the Kubernetes API has them. Does not need root.")
@_kubeconfig("Cluster to ask, with --cluster.")
def status(
    state_dir: str, output: str, watch: bool, nodes: bool, cluster: bool, kubeconfig: str | None, **options: Any
) -> None:
    """Show this node and each peer: what is in place, whether packets arrive, what is missing and why.

    Exit status: 0 all is well, 2 it is not, 1 it can't be told. With --watch: of what was shown last.
    """
    from ovsmesh.cli import formats, inspect

    if nodes and cluster:
        raise click.UsageError("give one of --all and --cluster")
    view: Callable[[], View]
    if cluster:
        from ovsmesh.cli import cluster_status

        view = functools.partial(cluster_status.view, kubeconfig)
    else:
        chosen = _options(state_dir, options)
        if not nodes:
            _root()
        view = functools.partial(_all_nodes if nodes else inspect.view, chosen)
    sys.exit((formats.watch if watch else formats.show)(view, output))


def _all_nodes(options: Options) -> View:
    from ovsmesh.cli.inspect import nodes_view
    from ovsmesh.cli.matrix import matrix

    return nodes_view(matrix(options))


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@_option("--peer", "Check this peer only.", usual="all", metavar="NAME")
@_output
def check(state_dir: str, peer: str | None, output: str, **options: Any) -> None:
    """Send packets of full size to every peer and say which ones get through.

    Exit status: 0 all do, 2 some do not or something is missing, 1 it can't be told.
    """
    from ovsmesh.cli import formats, inspect
    from ovsmesh.cli.check import check as run

    _root()
    chosen = _options(state_dir, options)
    sys.exit(formats.show(lambda: inspect.view_of(run(chosen, peer or "")), output))


@cli.command()
@_state_dir
@_option("--since", "Show what is newer: an age as 30s, 10m, 1h, 2d, or an RFC 3339 time.", usual="all", metavar="WHEN")
@_option("-o --output", "Format of the output.", "text", type=click.Choice(["text", "json"]))
def history(state_dir: str, since: str | None, output: str) -> None:
    """Show what changed, drifted, broke and recovered on this node.

    It reads the state directory, and needs no running agent.
    """
    from ovsmesh.cli import history as found
    from ovsmesh.cli.formats import serialize

    entries = found.entries(state_dir, since or "")
    if output == "json":
        click.echo(serialize(found.tree(entries), output))
        return
    for line in found.lines(entries):
        click.echo(line)
    if not entries:
        click.echo("nothing", err=True)


@cli.command()
@_with(*_NODE)
@_option("-o --output", "Format of the output.", "table", type=click.Choice(["table", "json"]))
@_option("--worst", "List the worst N directions.", usual="a table, where it fits", metavar="N", type=_COUNT)
def matrix(state_dir: str, output: str, worst: int | None, **options: Any) -> None:
    """Show round trip, loss and path MTU between every two nodes, in each direction.

    Asks the agents of all nodes, from any of them. Exit status: 0 all is well, 2 it is not, 1 it can't be told.
    """
    from ovsmesh.cli import matrix as matrices
    from ovsmesh.cli.formats import serialize

    found = matrices.matrix(_options(state_dir, options))
    click.echo(serialize(found, output) if output == "json" else matrices.render(found, worst))
    sys.exit(matrices.exit_code(found))


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@_with(*_NODE, *_CONTAINERS)
@_output
@_kubeconfig("Cluster in which pod names are looked up.")
def trace(source: str, destination: str, state_dir: str, output: str, kubeconfig: str | None, **options: Any) -> None:
    """Follow packets from SRC to DST and say at which hop they stop.

    SRC and DST are addresses of the mesh, names of nodes or Docker containers, or pods as NAMESPACE/NAME. One of them
    is on this node. Exit status: 0 packets arrive and all hops are as wanted, 2 not so, 1 it can't be told.
    """
    from ovsmesh.cli.formats import serialize
    from ovsmesh.cli.trace import trace as run
    from ovsmesh.trace.text import EXIT, render, to_dict

    _root()
    found = run(_options(state_dir, options), source, destination, kubeconfig)
    click.echo(render(found).rstrip() if output == "table" else serialize(to_dict(found), output))
    sys.exit(EXIT[found.state])


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@_option(
    "-o --output", "File or directory to write to; - is standard output.", usual="the current directory", metavar="FILE"
)
def bundle(state_dir: str, output: str | None, **options: Any) -> None:
    """Write everything that a maintainer asks for into one archive, secrets left out.

    It works with the agent or Open vSwitch dead: its MANIFEST.txt says what could not be had.
    """
    from ovsmesh.cli.bundle import bundle as run

    _root()
    chosen = _chosen(options)
    given = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    click.echo(run(_options(state_dir, options), [*given, "--state-dir", state_dir], output or ""), err=output == "-")


@cli.command()
@_with(*_NODE, *_CONTAINERS)
@click.option("--dry-run", is_flag=True, help="Print what would be removed and restored, change nothing.")
def cleanup(state_dir: str, dry_run: bool, **options: Any) -> None:
    """Remove everything that ovsmesh made and nothing else, and restore what it changed.

    Looks again afterwards and prints what is left. Exit status: 0 when nothing is, else 1.
    """
    from ovsmesh.agent.cleanup import cleanup as clean_up

    _root()
    lines, clean = clean_up(_options(state_dir, options), dry_run)
    for line in lines:
        click.echo(line)
    sys.exit(0 if clean else 1)


@cli.command()
@_with(*_NODE)
@_option("--check checked", "Check whether this host has what a node needs. Exit status 1: it has not.", is_flag=True)
@_option("--print printed", "Print this host's part of the mesh as a shell script without ovsmesh.", is_flag=True)
@_option("--wait waited", "Wait until the agent has converged, ping each peer.", metavar="SECONDS", type=_SECONDS)
def bootstrap(state_dir: str, printed: bool, checked: bool, waited: float | None, **options: Any) -> None:
    """Check this host, print its part of the mesh, or wait for its agent.

    scripts/bootstrap.sh makes a host a node with these three.
    """
    from ovsmesh.cli.bootstrap import await_converged, check, script

    if [printed, checked, waited is not None].count(True) != 1:
        raise click.UsageError("give one of --print, --check and --wait SECONDS")
    _root()
    chosen = _options(state_dir, options)
    if printed:
        text, problems = script(chosen)
        click.echo(text, nl=False)
        for problem in problems:
            click.echo(f"! {problem}", err=True)
        sys.exit(1 if any(p.fatal for p in problems) else 0)
    if checked:
        checks = check(chosen)
        for line in checks:
            click.echo(str(line))
        sys.exit(1 if any(line.state == "FAIL" for line in checks) else 0)
    lines, converged = await_converged(chosen, waited or 0.0)
    for text in lines:
        click.echo(text)
    sys.exit(0 if converged else 1)


@cli.command()
@_kubeconfig("Cluster to work in.")
@_listen(CONTROLLER_LISTEN)
@_log_level
@_log_format
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
@_state_dir
def confirm(digest: str, state_dir: str) -> None:
    """Confirm the mass removal that the agent holds back.

    DIGEST is in the agent's message and in `status`.
    """
    from ovsmesh.state_dir import StateDir

    StateDir(state_dir).request_confirm(digest)


class _Plugin(click.Group):
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
    @_option("--on", "Node whose agent runs it.", usual="SRC's" if local.name == "trace" else "any", metavar="NODE")
    @_kubeconfig("Cluster to ask.")
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


def kubectl() -> None:
    """Run `kubectl ovsmesh …`, the console script kubectl-ovsmesh. Its `status` is the cluster's."""
    group = _Plugin(cli.name, params=cli.params, help=cli.help, context_settings=cli.context_settings)
    main(group, prog_name="kubectl ovsmesh", default_map={"status": {"cluster": True}})


def main(command: click.Command = cli, **settings: Any) -> None:
    """Run the console script. An error that a user can correct is one line on standard error, exit status 1."""
    try:
        command(standalone_mode=True, **settings)
    except OvsmeshError as error:
        logs.fail(str(error))
        sys.exit(1)
