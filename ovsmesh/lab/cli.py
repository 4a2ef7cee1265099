"""`ovsmesh lab …`: make, ping, show and end a mesh of hosts on this one machine."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ovsmesh import usage
from ovsmesh.errors import OvsmeshError
from ovsmesh.lab import netns
from ovsmesh.lab.console import Console, Steps, failed, show_matrix, taken_down
from ovsmesh.lab.demo import play
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.ping import Track
from ovsmesh.lab.state import MOST_HOSTS, MOST_PODS, NAME, names
from ovsmesh.names import ENCAPSULATIONS

F = TypeVar("F", bound=Callable[..., Any])
_DATAPATHS = {"auto": "", "kernel": "system", "userspace": "netdev"}


class _Group(usage.Group):
    """Ends a command at SIGTERM as at Ctrl-C, so that its lab is taken down."""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        finally:
            signal.signal(signal.SIGTERM, before)


@click.group(cls=_Group)
def lab() -> None:
    """Make a whole mesh on this one machine.

    Hosts are network namespaces with a real Open vSwitch and a real agent each.
    """


_option = functools.partial(click.option, cls=usage.Option)


class _Name(usage.TextType):
    """The name of a lab."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name. Fail for one that no lab can have."""
        if not NAME.fullmatch(str(value)):
            self.fail(f"{value!r}: wanted at most 20 of a-z, 0-9 and '-', with no '-' at either end", param, ctx)
        return str(value)


_name = _option(
    "--name", default="lab", show_default=True, help="Name of the lab. Two labs at once need two names.", type=_Name()
)
_count = _option(
    "--count", default=3, show_default=True, help="Packets for each pair of pods.", type=click.IntRange(1, 10000)
)
_SHAPE = (
    _name,
    _option("--hosts", default=5, show_default=True, help="Number of hosts.", type=click.IntRange(2, MOST_HOSTS)),
    _option(
        "--pods", default=2, show_default=True, help="Number of pods on each host.", type=click.IntRange(0, MOST_PODS)
    ),
    _option("--dual-stack", is_flag=True, help="Give pods IPv6 addresses beside IPv4."),
    _option("--underlay-v6", is_flag=True, help="Run the tunnels over IPv6."),
    _option(
        "--encapsulation",
        default="gre",
        type=click.Choice(ENCAPSULATIONS),
        show_default=True,
        help="Protocol of the tunnels.",
    ),
    _option("--key", type=click.IntRange(0, 2**32 - 1), help="Key of the tunnels."),
    _option(
        "--underlay-mtu",
        default=1500,
        show_default=True,
        help="MTU between the hosts, in bytes.",
        type=click.IntRange(576, 65535),
    ),
    _option(
        "--datapath",
        default="auto",
        type=click.Choice(list(_DATAPATHS)),
        show_default=True,
        help="Datapath of Open vSwitch. auto: the kernel's where there is one.",
    ),
)


def _shape(command: F) -> F:
    for option in reversed(_SHAPE):
        command = option(command)
    return command


def _lab(steps: Steps, datapath: str, hosts: int, underlay_v6: bool, **shape: Any) -> Lab:
    return Lab(hosts, datapath=_DATAPATHS[datapath], underlay6=underlay_v6, step=steps, **shape)


@lab.command()
@_shape
def up(**shape: Any) -> None:
    """Make a lab and leave it running."""
    out = Console()
    made = _lab(Steps(out), **shape)
    try:
        made.up()
    except OvsmeshError as error:
        rest = f"\nleft as it is, to look at; `ovsmesh lab down --name {made.name}` ends it" if made.made else ""
        raise OvsmeshError(f"{error}{rest}") from error
    first, other = made.hosts[0], made.hosts[-1]
    out.print(f"\nlab {made.name} is up: {len(made.hosts)} hosts, {len(made.pods)} pods. Look around:")
    at = "" if made.name == "lab" else f"--name {made.name} "
    commands = [f"ping {at}", f"exec {at}{first.name} -- ovs-vsctl show", f"exec {at}{first.name} -- ovsmesh status"]
    if other.pods:
        commands.append(f"exec {at}{first.pods[0].name} -- ping -c 3 {other.pods[0].addresses[0]}")
    for command in (*commands, f"down {at}"):
        out.print(f"  ovsmesh lab {command}".rstrip())


@lab.command()
@_name
@_count
@_option(
    "-o",
    "--output",
    default="table",
    type=click.Choice(["table", "json"]),
    show_default=True,
    help="Format of the output.",
)
def ping(name: str, count: int, output: str) -> None:
    """Ping from every pod to every pod.

    Exit status: 0 when every packet was answered once, else 1.
    """
    tracks = Lab.open(name).ping_matrix(count)
    if output == "json":
        click.echo(json.dumps([_plain(track) for track in tracks], indent=1))
    else:
        show_matrix(Console(), tracks)
    if any(map(failed, tracks)):
        raise SystemExit(1)


def _plain(track: Track) -> dict[str, Any]:
    sent, rtt = len(track.sent), track.rtt
    shown = {"source": track.pair.source, "target": track.pair.target, "address": track.pair.address, "sent": sent}
    return shown | {
        "lost": track.lost,
        "duplicates": track.duplicates,
        "rtt_ms": None if rtt is None else round(rtt, 3),
    }


@lab.command()
@_name
def down(name: str) -> None:
    """End a lab: its processes, namespaces and files.

    Looks again afterwards and prints what is left. Exit status: 0 when nothing is, else 1.
    """
    proof = Lab.open(name, remains=True).down()
    click.echo(str(proof))
    if not proof.ok:
        raise SystemExit(1)


@lab.command()
@_shape
@_count
def run(count: int, **shape: Any) -> None:
    """Make a lab, ping from every pod to every pod, end the lab.

    Exit status: 0 when every packet was answered once, else 1.
    """
    out = Console()
    steps = Steps(out)
    made = _lab(steps, **shape)
    with taken_down(out, made):
        made.up()
        with steps(f"{len(made.pairs())} pairs of pods, {count} pings each"):
            tracks = made.ping_matrix(count)
        out.print()
        show_matrix(out, tracks)
        out.print()
    if any(map(failed, tracks)):
        raise SystemExit(1)


@lab.command("list")
def list_labs() -> None:
    """List the labs on this machine."""
    found = names()
    if not found:
        click.echo("no labs", err=True)
    for name in found:
        settings = Lab.open(name).settings
        click.echo(f"{name}: {len(settings.hosts)} hosts × {settings.pods} pods, {settings.encapsulation}")


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@_name
@click.argument("place")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str, place: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a host (h1), a pod (h1p1) or the hub.

    Example: ovsmesh lab exec h1 -- ovs-vsctl show
    """
    made = Lab.open(name)
    places = {host.name: (host.ns, host.env) for host in made.hosts}
    places |= {pod.name: (pod.ns, {}) for pod in made.pods} | {"hub": (made.hub, {})}
    if place not in places:
        raise OvsmeshError(f"{place}: not in lab {name}; there are {', '.join(places)}")
    ns, env = places[place]
    if ns not in netns.namespaces():
        raise OvsmeshError(f"{place}: its namespace {ns} has gone; `ovsmesh lab down --name {name}`, then up again")
    os.execvpe("ip", ["ip", "netns", "exec", ns, *command], {**os.environ, **env})


@lab.command()
@_name
def demo(name: str) -> None:
    """Show a mesh of five hosts and ten pods, and how it repairs faults.

    Pings from every pod to every pod, then breaks the mesh while packets run and shows how long each repair takes.
    Takes less than 90 seconds and leaves nothing behind.
    """
    play(name, Console())
