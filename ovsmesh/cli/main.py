"""The command line: one thin command each, and nothing decided here.

Each command imports what it needs when it runs, so that the agent carries no table drawing and
`status` no lab. Every option can be set as OVSMESH_<COMMAND>_<OPTION>.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ovsmesh import __version__
from ovsmesh.dataplane.types import CNI_BIN_DIR, DEFAULT_LISTEN, DEFAULT_OVSDB, DEFAULT_STATE
from ovsmesh.errors import OvsmeshError

if TYPE_CHECKING:
    from ovsmesh.agent.options import Options
    from ovsmesh.agent.result import ReconcileResult

CONTROLLER_LISTEN = "127.0.0.1:9475"


class _Lazy(click.Group):
    """Loads the lab's commands when they are asked for."""

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
    """One flat network for the pods and containers of many hosts, on Open vSwitch."""


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """What names a node and its mesh. None means: as the agent that ran here last, or the default."""
    for option in (
        click.option("--mesh", metavar="FILE", help="The mesh file (a Mesh object in YAML)."),
        click.option("--node", metavar="NAME", help="This node's name in the mesh.  [default: the hostname]"),
        click.option("--ovsdb", metavar="unix:PATH", help=f"The OVS database.  [default: {DEFAULT_OVSDB}]"),
        click.option("--state-dir", metavar="DIR", default=DEFAULT_STATE, show_default=True, help="The agent's state."),
    ):
        command = option(command)
    return command


def _containers(command: Callable[..., None]) -> Callable[..., None]:
    """What plugs containers in."""
    for option in (
        click.option("--cni-dir", metavar="DIR", help="Holds the CNI conflist, e.g. /etc/cni/net.d.  [default: none]"),
        click.option("--cni-bin-dir", metavar="DIR:DIR…", help=f"Hold the CNI plugins.  [default: {CNI_BIN_DIR}]"),
        click.option(
            "--docker",
            type=click.Choice(["auto", "replace", "off"]),
            help="replace: docker0 gives way to kbr0. auto: never restarts Docker; says what to do.  [default: auto]",
        ),
        click.option("--docker-config", metavar="FILE", help="[default: /etc/docker/daemon.json]"),
        click.option("--docker-socket", metavar="PATH", help="[default: /var/run/docker.sock]"),
        click.option(
            "--docker-restart", metavar="'ARGV …'", help="Without a shell.  [default: systemctl restart docker]"
        ),
        click.option(
            "--docker-timeout",
            metavar="SECONDS",
            type=click.FloatRange(1, 3600),
            help="For the restart command, and again for dockerd to answer.  [default: 120]",
        ),
    ):
        command = option(command)
    return command


_PATHS = ("mesh", "cni_dir", "docker_config", "docker_socket")


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, with paths that mean the same from anywhere."""
    said = {name: value for name, value in options.items() if value is not None and value != ""}
    return said | {name: os.path.abspath(said[name]) for name in _PATHS if name in said}


def _options(state_dir: str, options: Mapping[str, Any]) -> Options:
    """What was not said is as the agent that last ran here has it, so `ovsmesh status` needs no option."""
    from ovsmesh.agent.options import remembered

    return remembered(state_dir, _chosen(options))


def _root() -> None:
    if os.geteuid() != 0:
        raise OvsmeshError("this reads and changes the host's network; run it as root (sudo)")


@cli.command()
@_common
@_containers
@click.option(
    "--listen", metavar="ADDR:PORT", default=DEFAULT_LISTEN, show_default=True, help="/metrics, /healthz, /readyz."
)
@click.option("--kubeconfig", metavar="FILE", help="Read the mesh from this cluster.  [default: in a pod, its own]")
@click.option("--once", is_flag=True, help="Apply until nothing is left to do, then exit: 0 converged, 1 not.")
@click.option(
    "--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True
)
def agent(listen: str, once: bool, log_level: str, **options: Any) -> None:
    """Keep this node's part of the mesh true, until SIGTERM; what is in place then stays."""
    from ovsmesh.agent import main as room
    from ovsmesh.agent.options import Options

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    chosen = _chosen(options)
    if "mesh" in chosen and "kubeconfig" in chosen:
        raise OvsmeshError("--mesh and --kubeconfig: give one of them, the mesh comes from a file or from a cluster")
    if "mesh" not in chosen and "kubeconfig" not in chosen:
        _in_pod()
    _root()
    told = Options(listen="" if once else listen, **chosen)
    if not once:
        room.serve(told, _stop_fd())
        return
    turn = room.once(told)
    _tell(turn)
    if not (turn.converged and turn.whole):
        sys.exit(1)


def _in_pod() -> None:
    from ovsmesh.kube.config import in_cluster

    if in_cluster() is None:
        raise OvsmeshError("no mesh: give --mesh FILE, or --kubeconfig FILE (in a pod with a service account: neither)")


def _stop_fd() -> int:
    """A file descriptor that becomes readable at SIGTERM or SIGINT."""
    read, write = os.pipe()
    for fd in (read, write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return read


def _tell(turn: ReconcileResult) -> None:
    """The last word of `agent --once`: what is left, and why."""
    for line in turn.plan.lines():
        click.echo(line, err=True)
    for problem in turn.problems:
        click.echo(str(problem), err=True)
    click.echo("converged" if turn.converged and turn.whole else "not converged", err=True)


@cli.command()
@_common
@_containers
def plan(state_dir: str, **options: Any) -> None:
    """Print what the agent would change now; exit 0: nothing, 2: changes, 1: an error or something in the way."""
    from ovsmesh.cli import inspect

    _root()
    look, failed = inspect.look(_options(state_dir, options))
    for line in look.plan.lines():
        click.echo(line)
    for problem in look.problems:
        click.echo(f"! {problem}", err=True)
    if failed:
        sys.exit(1)
    if not look.plan.steps and not look.plan.held:
        click.echo("nothing to change")
    sys.exit(2 if look.plan.steps or look.plan.held else 0)


@cli.command()
@_common
@_containers
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True)
@click.option("--cluster", is_flag=True, help="One line a node, as the Kubernetes API has it; needs no root.")
@click.option(
    "--kubeconfig", metavar="FILE", help="With --cluster.  [default: $KUBECONFIG, in-cluster, ~/.kube/config]"
)
def status(state_dir: str, output: str, cluster: bool, kubeconfig: str | None, **options: Any) -> None:
    """Show this node and each peer: what is there, what is missing and why. Or, with --cluster, all nodes."""
    if cluster:
        from ovsmesh.cli import cluster_status

        click.echo(cluster_status.status(kubeconfig, output))
        return
    from ovsmesh.cli import inspect

    _root()
    click.echo(inspect.status(_options(state_dir, options), output))


@cli.command()
@_common
@_containers
@click.option("--dry-run", is_flag=True, help="Print what would be removed and restored.")
def cleanup(state_dir: str, dry_run: bool, **options: Any) -> None:
    """Remove all of ours and nothing else, put back what was there, and prove it."""
    from ovsmesh.agent import cleanup as room

    _root()
    lines, clean = room.cleanup(_options(state_dir, options), dry_run)
    for line in lines:
        click.echo(line)
    sys.exit(0 if clean else 1)


@cli.command()
@_common
@click.option(
    "--print", "printed", is_flag=True, help="This host's part of the mesh as a shell script without ovsmesh."
)
@click.option("--check", "checked", is_flag=True, help="What a node needs, and whether this host has it; exit 1: not.")
@click.option("--wait", "waited", type=click.FloatRange(0), metavar="SECONDS", help="Until the agent has converged.")
def bootstrap(state_dir: str, printed: bool, checked: bool, waited: float | None, **options: Any) -> None:
    """Make a host ready: what it needs, its recipe, its first success. scripts/bootstrap.sh does all of it."""
    from ovsmesh.cli import bootstrap as room

    if [printed, checked, waited is not None].count(True) != 1:
        raise click.UsageError("give one of --print, --check and --wait SECONDS")
    _root()
    told = _options(state_dir, options)
    if printed:
        text, problems = room.script(told)
        click.echo(text, nl=False)
        for problem in problems:
            click.echo(f"! {problem}", err=True)
        sys.exit(1 if any(p.fatal for p in problems) else 0)
    if checked:
        found = room.check(told)
        for line in found:
            click.echo(str(line))
        sys.exit(1 if any(c.state == "FAIL" for c in found) else 0)
    lines, converged = room.await_converged(told, waited or 0.0)
    for text in lines:
        click.echo(text)
    sys.exit(0 if converged else 1)


@cli.command()
@click.option("--kubeconfig", metavar="FILE", help="[default: $KUBECONFIG, in-cluster, ~/.kube/config]")
@click.option(
    "--listen", metavar="ADDR:PORT", default=CONTROLLER_LISTEN, show_default=True, help="/metrics, /healthz, /readyz."
)
@click.option(
    "--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]), show_default=True
)
def controller(kubeconfig: str | None, listen: str, log_level: str) -> None:
    """Keep the mesh of a Kubernetes cluster: Nodes in, MeshSlices and Nodes' conditions out; until SIGTERM."""
    from ovsmesh.cli import cluster_status
    from ovsmesh.controller import controller as room
    from ovsmesh.kube.client import Api

    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    room.serve(Api(cluster_status.config(kubeconfig), "ovsmesh-controller"), listen, _stop_fd())


@cli.command()
@click.argument("digest")
@click.option("--state-dir", metavar="DIR", default=DEFAULT_STATE, show_default=True)
def confirm(digest: str, state_dir: str) -> None:
    """Let the agent carry out the mass removal that it holds back; DIGEST is in its message and in `status`."""
    from ovsmesh.state_dir import StateDir

    StateDir(state_dir).request_confirm(digest)


def kubectl() -> None:
    """The console script kubectl-ovsmesh, for `kubectl ovsmesh …`: there `status` is the cluster's."""
    main(prog_name="kubectl ovsmesh", default_map={"status": {"cluster": True}})


def main(**settings: Any) -> None:
    """The console script: an error that a user can mend is one line on standard error, exit 1."""
    try:
        cli(standalone_mode=True, **settings)
    except OvsmeshError as error:
        click.echo(f"ovsmesh: {error}", err=True)
        sys.exit(1)
