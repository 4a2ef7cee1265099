"""`ovsmesh lab …`: makes, pings, shows and ends a mesh of hosts on this one machine.

Knows how a lab is shown: steps with their times, the ping matrix at any size, the proof at the end.
Decides nothing about labs. Never imports ovs, pyroute2, kubernetes.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ovsmesh.errors import OvsmeshError
from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.ping import Track
from ovsmesh.lab.state import MOST_HOSTS, load, names
from ovsmesh.names import ENCAPSULATIONS

F = TypeVar("F", bound=Callable[..., Any])
_DATAPATHS = {"auto": "", "kernel": "system", "userspace": "netdev"}
_PLAIN_WIDTH = 100
"""Columns when the output is no terminal and COLUMNS says nothing."""


def console() -> Console:
    plain = None if os.isatty(1) or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(highlight=False, width=plain)


class Steps:
    """One line a step: what is being done, and once it is done how long it took."""

    def __init__(self, out: Console) -> None:
        self.out = out

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            if self.out.is_terminal:
                with self.out.status(name):
                    yield
            else:
                yield
        except BaseException:
            self._line("[red]✗[/]", name, start)
            raise
        self._line("[green]✓[/]", name, start)

    def _line(self, mark: str, name: str, start: float) -> None:
        self.out.print(f"{mark} {name:<62} [dim]{time.monotonic() - start:6.2f} s[/]", soft_wrap=True)


class _Group(click.Group):
    """Shows errors meant for the reader as they are, and turns SIGTERM into an orderly end."""

    def invoke(self, ctx: click.Context) -> Any:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return super().invoke(ctx)
        except OvsmeshError as error:
            raise click.ClickException(str(error)) from error
        finally:
            signal.signal(signal.SIGTERM, before)


@click.group(cls=_Group)
def lab() -> None:
    """A whole mesh on this one machine: hosts in network namespaces, real Open vSwitch, real agents."""


_name = click.option("--name", default="lab", show_default=True, help="The lab's name; two labs need two names.")
_hosts = click.option("--hosts", default=5, show_default=True, help=f"Hosts, 2 to {MOST_HOSTS}.")
_pods = click.option("--pods", default=2, show_default=True, help="Pods on each host.")
_count = click.option("--count", default=3, show_default=True, help="Packets for each pair.")
_output = click.option("-o", "--output", default="table", type=click.Choice(["table", "json"]), show_default=True)


def _shape(command: F) -> F:
    for option in reversed(_SHAPE):
        command = option(command)
    return command


_SHAPE = (
    _name,
    _hosts,
    _pods,
    click.option("--dual-stack", is_flag=True, help="Pods have IPv6 beside IPv4."),
    click.option("--underlay-v6", "underlay6", is_flag=True, help="Tunnels run over IPv6."),
    click.option("--encapsulation", default="gre", type=click.Choice(ENCAPSULATIONS), show_default=True),
    click.option("--key", type=click.IntRange(0, 2**32 - 1), help="The tunnels' key."),
    click.option("--underlay-mtu", default=1500, show_default=True, help="Bytes."),
    click.option("--datapath", default="auto", type=click.Choice(list(_DATAPATHS)), show_default=True),
)


def _lab(steps: Steps, datapath: str, hosts: int, **shape: Any) -> Lab:
    if hosts < 2:
        raise OvsmeshError(f"--hosts {hosts}: a mesh has at least 2")
    return Lab(hosts, datapath=_DATAPATHS[datapath], step=steps, **shape)


@lab.command()
@_shape
def up(**shape: Any) -> None:
    """Make a lab and leave it running."""
    out = console()
    made = _lab(Steps(out), **shape)
    try:
        made.up()
    except OvsmeshError as error:
        rest = f"\nleft as it is, to look at; `ovsmesh lab down --name {made.name}` ends it" if made.made else ""
        raise OvsmeshError(f"{error}{rest}") from error
    first, other = made.hosts[0], made.hosts[-1]
    out.print(f"\nlab {made.name} is up: {len(made.hosts)} hosts, {len(made.pods)} pods. Look around:")
    at = "" if made.name == "lab" else f"--name {made.name} "
    out.print(f"  ovsmesh lab ping {at}".rstrip())
    out.print(f"  ovsmesh lab exec {at}{first.name} -- ovs-vsctl show")
    out.print(f"  ovsmesh lab exec {at}{first.name} -- ovsmesh status")
    if other.pods:
        out.print(f"  ovsmesh lab exec {at}{first.pods[0].name} -- ping -c 3 {other.pods[0].addresses[0]}")
    out.print(f"  ovsmesh lab down {at}".rstrip())


@lab.command()
@_name
@_count
@_output
def ping(name: str, count: int, output: str) -> None:
    """Ping from every pod to every pod; exit 1 when a pair fails."""
    tracks = Lab.open(name).ping_matrix(count)
    if output == "json":
        click.echo(json.dumps([_plain(track) for track in tracks], indent=1))
    else:
        show_matrix(console(), tracks)
    if any(map(failed, tracks)):
        raise SystemExit(1)


@lab.command()
@_name
def down(name: str) -> None:
    """End a lab: its processes, namespaces and files; prove that nothing is left."""
    proof = Lab.open(name, remains=True).down()
    click.echo(str(proof))
    if not proof.ok:
        raise SystemExit(1)


@lab.command()
@_shape
@_count
def run(count: int, **shape: Any) -> None:
    """Make a lab, ping all to all, end it; exit 1 when a pair fails."""
    out = console()
    steps = Steps(out)
    made = _lab(steps, **shape)
    tracks: list[Track] = []
    try:
        with ended(out, made):
            made.up()
            with steps(f"{len(made.pairs())} pairs of pods, {count} pings each"):
                tracks = made.ping_matrix(count)
            out.print()
            show_matrix(out, tracks)
            out.print()
    except KeyboardInterrupt as error:
        raise click.Abort from error
    if any(map(failed, tracks)):
        raise SystemExit(1)


@contextmanager
def ended(out: Console, made: Lab) -> Iterator[None]:
    """Takes the lab down after, whatever happens, and shows some agents' logs when it went wrong."""
    try:
        yield
    except OvsmeshError:
        if made.state.exists():
            shown = "\n".join(host.logs(12, "agent.log") for host in made.hosts[:3])
            out.print(shown, markup=False, soft_wrap=True)
        raise
    finally:
        # a lab of that name that was there before is not ours to end
        if made.made:
            proof = made.down()
            out.print(f"{'[green]✓[/]' if proof.ok else '[red]✗[/]'} {proof}", soft_wrap=True)


@lab.command("list")
def list_labs() -> None:
    """The labs that are there."""
    for name in names():
        settings = load(Lab.open(name).state.parent, name)
        click.echo(f"{name}: {len(settings.hosts)} hosts × {settings.pods} pods, {settings.encapsulation}")


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@_name
@click.argument("place")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str, place: str, command: tuple[str, ...]) -> None:
    """Run a command in host h1, pod h1p1 or the hub: `ovsmesh lab exec h1 -- ovs-vsctl show`."""
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
    """Five hosts, ten pods: the whole matrix, then faults mended while real packets run; under 90 seconds."""
    from ovsmesh.lab.demo import play

    play(name, console())


# --- the matrix


def failed(track: Track) -> bool:
    return bool(track.lost or track.duplicates)


def _plain(track: Track) -> dict[str, Any]:
    sent, rtt = len(track.sent), track.rtt
    shown = {"source": track.pair.source, "target": track.pair.target, "address": track.pair.address, "sent": sent}
    shown |= {"lost": track.lost, "duplicates": track.duplicates, "rtt_ms": None if rtt is None else round(rtt, 3)}
    return shown


def show_matrix(out: Console, tracks: Sequence[Track]) -> None:
    """Rows ping columns: round-trip times in ms where they fit, else one character a cell; then one line of sums."""
    for version, family in ((4, "."), (6, ":")):
        chosen = [t for t in tracks if family in t.pair.address]
        if not chosen:
            continue
        if any(":" in t.pair.address for t in tracks):
            out.print(f"[bold]IPv{version}[/]")
        pods = list(dict.fromkeys([*(t.pair.source for t in chosen), *(t.pair.target for t in chosen)]))
        cells = {(t.pair.source, t.pair.target): t for t in chosen}
        widths = max(len(pod) for pod in pods) + 1 + len(pods) * 7
        out.print(_wide(pods, cells) if widths <= out.width else _narrow(pods, cells, out.width), soft_wrap=True)
    out.print(_sums(tracks))


def _wide(pods: Sequence[str], cells: dict[tuple[str, str], Track]) -> Table:
    table = Table(box=None, padding=(0, 0), pad_edge=False, header_style="bold")
    table.add_column("ms", style="bold", min_width=max(map(len, pods)) + 1)
    for pod in pods:
        table.add_column(pod, justify="right", min_width=7)
    for source in pods:
        table.add_row(source, *(_time(cells.get((source, target))) for target in pods))
    return table


def _time(track: Track | None) -> Text:
    if track is None:
        return Text("·", "dim")
    rtt = track.rtt
    if rtt is None:
        return Text("lost", "bold red")
    if track.lost:
        return Text(f"-{track.lost}/{len(track.sent)}", "yellow")
    if track.duplicates:
        return Text("twice", "bold red")
    return Text(f"{rtt:.2f}" if rtt < 100 else f"{rtt:.0f}", "green")


_MARKS = {"ok": ("•", "green"), "partly": ("◐", "yellow"), "none": ("✗", "bold red"), "self": ("·", "dim")}


def _narrow(pods: Sequence[str], cells: dict[tuple[str, str], Track], width: int) -> Text:
    """One character a cell, columns in blocks that fit; a header names the first pod of each host."""
    room = max(map(len, pods)) + 1
    text = Text()
    for start in range(0, len(pods), max(1, width - room)):
        block = pods[start : start + width - room]
        for line in _host_numbers(block):
            text.append(" " * room + line + "\n", "bold")
        for source in pods:
            text.append(f"{source:<{room}}")
            for target in block:
                text.append(*_MARKS[_state(cells.get((source, target)))])
            text.append("\n")
    text.append("• all answered  ◐ some lost  ✗ none", "dim")
    return text


def _host_numbers(pods: Sequence[str]) -> list[str]:
    """Each host's number above its first pod, tens over ones so that it fits a host of one pod."""
    hosts = [pod.removeprefix("h").partition("p")[0] for pod in pods]
    firsts = [host if place == 0 or hosts[place - 1] != host else "" for place, host in enumerate(hosts)]
    lines = ["".join(f"{host:>2}"[row] for host in firsts).rstrip() for row in (0, 1)]
    return [line for line in lines if line]


def _state(track: Track | None) -> str:
    if track is None:
        return "self"
    if not track.received:
        return "none"
    return "partly" if failed(track) else "ok"


def _sums(tracks: Sequence[Track]) -> Text:
    bad = [t for t in tracks if failed(t)]
    sent, lost, twice = (sum(n) for n in zip(*((len(t.sent), t.lost, t.duplicates) for t in tracks), strict=True))
    text = Text(f"{len(tracks) - len(bad)} of {len(tracks)} pairs answered", "bold red" if bad else "bold green")
    text.append(f"; {sent} packets, {lost} lost, {twice} twice", "")
    if times := sorted(rtt for t in tracks for rtt in t.rtts):
        text.append(
            f"\nround trip {statistics.median(times):.2f} ms median, {times[-1 - len(times) // 100]:.2f} ms p99"
        )
    for track in bad[:5]:
        reason = f" ({', '.join(track.errors)})" if track.errors else ""
        text.append(f"\n  {track.pair.source} → {track.pair.target} {track.pair.address}: ", "red")
        text.append(f"{track.lost} of {len(track.sent)} lost, {track.duplicates} twice{reason}")
    if len(bad) > 5:
        text.append(f"\n  and {len(bad) - 5} more", "red")
    return text
