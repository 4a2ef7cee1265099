"""Send the packets of a trace, and see them on every link and at every filter hook of this host.

Nothing that it makes outlives the process, however that ends: sockets, and a filter table that its socket owns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ovsmesh.dataplane.types import KBR, OBR
from ovsmesh.errors import OvsmeshError
from ovsmesh.linux.nft_trace import Encapsulation, Filters, patterns
from ovsmesh.mesh.types import IPAddress, Node, gateway
from ovsmesh.trace import netns
from ovsmesh.trace.echo import SMALL, Echo, exchange, icmp_socket, new_token
from ovsmesh.trace.taps import Taps, points
from ovsmesh.trace.types import EchoFound, FilterFound, Kind, Place, Point

_COUNT, _GAP = 3, 0.1
"""Packets of each kind, and seconds between them."""
_MORE, _MORE_GAP = 20, 0.02
"""Packets that tell a lossy way from a slow first packet."""
_ANSWER, _SILENCE = 1.0, 3.6
"""Seconds for an answer; and until the last hop has found out that nobody there has the address (three seconds)."""
_STALE = 14
"""Seconds after which it finds out that nobody has it any more: five, and twice three (neigh_delay_probe)."""
_SEARCH = 0.25
"""Seconds for an answer while the path MTU is searched for, at least."""


@dataclass(frozen=True, slots=True)
class Way:
    """Between which ends packets are sent, and what they pass."""

    source: Place
    target: Place
    me: Node
    peer: Node | None
    mtu: int
    form: Encapsulation | None
    """How the tunnel's packets look; None without a tunnel."""
    underlay: tuple[str, ...]
    """Links on which the tunnel's packets can be seen."""
    own: frozenset[str]
    """Addresses of this host."""

    @property
    def version(self) -> int:
        """IP version of the ends."""
        return self.target.address.version


@dataclass(frozen=True, slots=True)
class From:
    """The inside of the source, where it can be entered, and the links of both ends on this host."""

    namespace: int | None = None
    """File descriptor; None where packets are sent from the host."""
    largest: int | None = None
    """MTU inside, in bytes."""
    port: str = ""
    target_port: str = ""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of all packets."""

    sent_from: str
    """See Evidence."""
    seen: Mapping[Point, int]
    seen_full: Mapping[Point, int]
    small: EchoFound
    full: EchoFound
    helpers: Mapping[str, EchoFound]
    """"underlay", "gateway" and "unused": what this node itself has asked the peer's host, gateway and range."""
    heard: bool
    underlay_errors: tuple[str, ...]
    rewritten: str
    """See Evidence."""
    path_mtu: int | None
    filter: FilterFound
    mark: int


class Packets:
    """Sends the packets of one trace. `links`: the names of this host's links."""

    def __init__(self, way: Way, start: From, links: frozenset[str]) -> None:
        self._s, self._start, self._links = way, start, links
        self._token = new_token()
        self._tap_names: list[str] = []
        self._echoes: list[Echo] = []

    def send(self) -> Sent:
        """Send them all. Raises OvsmeshError where none can be sent."""
        s = self._s
        taps = Taps(s.version, self._token)
        filters: Filters | None = None
        try:
            self._place_taps(taps)
            devices = [KBR, OBR, self._start.port, self._start.target_port]
            filters = Filters(patterns(s.version, self._token, s.form), [d for d in devices if d in self._links])
            main, sent_from = self._main(0)
            helpers = self._helpers()
            self._first_round(main, helpers, taps, filters)
            full = self._second_round(main, taps, filters)
            path_mtu = self._path_mtu(main.found(), full, taps)
            seen = self._seen(taps, 0, main.found(), sent_from)
            return Sent(
                sent_from,
                seen,
                self._seen(taps, 1, full, sent_from) if full.sent or full.refused else {},
                main.found() if sent_from != "host for the pod" else self._forged(main, seen),
                full,
                {name: echo.found() for name, echo in helpers.items()},
                taps.heard > 0,
                tuple(taps.errors),
                self._rewritten(taps),
                path_mtu,
                filters.found(),
                next(iter(filters.marks), 0),
            )
        finally:
            for echo in self._echoes:
                echo.close()
            if filters:
                filters.close()
            taps.close()

    def _place_taps(self, taps: Taps) -> None:
        s, ends = self._s, (("port", self._start.port), ("target", self._start.target_port))
        for name, device in (*ends, ("kbr0", KBR), ("obr0", OBR if s.peer else "")):
            if device in self._links:
                with contextlib.suppress(OSError):
                    taps.add(name, device)
                    self._tap_names.append(name)
        if s.form and s.peer and s.target.kind is not Kind.TUNNEL:
            for device in s.underlay:
                with contextlib.suppress(OSError):
                    taps.add_underlay("underlay", device, s.form, s.peer.address)
                    self._tap_names.append("underlay")

    def _main(self, phase: int) -> tuple[Echo, str]:
        """Return the echo from the source, and where it is sent from. Raises OvsmeshError where nothing can be sent."""
        s, fd = self._s, self._start.namespace
        try:
            if fd is not None:
                sock, sent_from = netns.within(fd, lambda: icmp_socket(s.version)), "pod"
            elif s.source.kind is Kind.POD:
                echo = Echo.forging(s.source.address, s.target.address, self._token, phase)
                self._echoes.append(echo)
                return echo, "host for the pod"
            else:
                source = s.source.address if str(s.source.address) in s.own else None
                sock, sent_from = icmp_socket(s.version, source), "host"
        except OSError as error:
            raise OvsmeshError(f"no packet can be sent, as raw sockets can't be used: {error.strerror}") from None
        self._echoes.append(Echo(sock, s.target.address, self._token, phase=phase))
        return self._echoes[-1], sent_from

    def _helpers(self) -> dict[str, Echo]:
        """Return the echoes from this node itself that tell where on the other side packets end."""
        s = self._s
        found: dict[str, Echo] = {}
        if s.peer is None:
            return found
        own = next((gateway(c) for c in s.me.pod_cidrs if c.version == s.version), None)
        theirs = next((c for c in s.peer.pod_cidrs if c.version == s.version), None)
        wanted: list[tuple[str, IPAddress, IPAddress | None]] = [("underlay", s.peer.address, s.me.address)]
        if theirs is not None and own is not None:
            wanted.append(("gateway", gateway(theirs), own))
            # an address that no pod gets: the last one, or in IPv6 one near it
            unused = theirs.broadcast_address - (1 if s.version == 4 else 0)
            if unused != s.target.address and s.target.kind is Kind.POD:
                wanted.append(("unused", unused, own))
        for name, target, source in wanted:
            bound = source if source is not None and str(source) in s.own else None
            with contextlib.suppress(OSError):
                found[name] = Echo(icmp_socket(target.version, bound), target, new_token())
                self._echoes.append(found[name])
        return found

    def _first_round(self, main: Echo, helpers: Mapping[str, Echo], taps: Taps, filters: Filters) -> None:
        def patience(since: float) -> bool:
            taps.drain()
            filters.drain()
            answered = main.answered == _COUNT
            if answered:
                return not all(echo.answered for name, echo in helpers.items() if name != "unused") and since < 0.3
            return since < (_SILENCE if not main.over and self._left_to_peer(helpers, taps) else _ANSWER)

        wanted = [
            (main, _COUNT, SMALL),
            *((echo, 1 if name == "unused" else _COUNT, SMALL) for name, echo in helpers.items()),
        ]
        exchange(wanted, _GAP, patience, taps.drain, taps.fds())
        unused = helpers.get("unused")
        if not main.over and unused is not None and unused.found().errors and self._left_to_peer(helpers, taps):
            # the peer forwards: its kernel still believes in an entry of its neighbour table
            for _ in range(_STALE):
                self._send(main, 1, SMALL, taps)
                if (ended := main.found()).errors or ended.answered:
                    break

    def _left_to_peer(self, helpers: Mapping[str, Echo], taps: Taps) -> bool:
        """Return whether only the peer can say what becomes of the packets: they reach it, and no answer comes."""
        gateway_echo = helpers.get("gateway")
        if self._s.peer is None or not (taps.heard or (gateway_echo is not None and gateway_echo.answered)):
            return False
        seen = points(taps.seen, self._tap_names, 0)
        return bool(seen.get(Point.UNDERLAY, 1)) and not seen.get(Point.UNDERLAY_BACK)

    def _second_round(self, main: Echo, taps: Taps, filters: Filters) -> EchoFound:
        """Send packets of full size, and more small ones where some of the first were lost."""
        if not main.answered:
            return EchoFound()
        if main.answered < _COUNT:
            self._send(main, _MORE, SMALL, taps, _MORE_GAP)
        full, _ = self._main(1)
        self._send(full, _COUNT, min(self._s.mtu, self._start.largest or self._s.mtu), taps)
        filters.drain()
        return full.found()

    @staticmethod
    def _send(echo: Echo, count: int, size: int, taps: Taps, gap: float = _GAP, wait: float = _ANSWER) -> None:
        exchange([(echo, count, size)], gap, lambda since: not echo.over and since < wait, taps.drain, taps.fds())

    def _path_mtu(self, main: EchoFound, full: EchoFound, taps: Taps) -> int | None:
        """Return the size of the largest packet that comes back, where full size does not, found by bisection."""
        if full.refused or full.answered or not full.sent or not main.answered:
            return None
        low, high = SMALL, full.size
        wait = min(_ANSWER, max(_SEARCH, 4 * (main.round_trip or 0.0)))
        while high - low > 1:
            middle = (low + high) // 2
            echo, _ = self._main(2)
            self._send(echo, 2, middle, taps, 0.02, wait)
            low, high = (middle, high) if echo.answered else (low, middle)
        return low

    def _seen(self, taps: Taps, phase: int, found: EchoFound, sent_from: str) -> dict[Point, int]:
        taps.drain()
        seen = points(taps.seen, self._tap_names, phase)
        seen[Point.SENT] = found.sent
        if sent_from != "host for the pod":
            seen[Point.ANSWERED] = found.answered
        return seen

    def _rewritten(self, taps: Taps) -> str:
        """Return what has become of the addresses of requests where they leave for the peer or the pod."""
        for which, wanted in (("source", self._s.source.address), ("destination", self._s.target.address)):
            seen = taps.addresses.get(which, str(wanted))
            if seen != str(wanted):
                return f"{which} {seen}"
        return ""

    @staticmethod
    def _forged(main: Echo, seen: Mapping[Point, int]) -> EchoFound:
        """Return what became of packets that were sent for a pod: the last tap that sees answers tells."""
        back = seen.get(Point.PORT_BACK, seen.get(Point.KBR_IN_BACK, 0))
        return replace(main.found(), answered=min(back, main.found().sent))
