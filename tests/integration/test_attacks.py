"""What pods and peers must not be able to do, shown by packets, whatever the defender's agent and switch are doing."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.integration.attacks import Attack, Scene, Theft, every
from tests.support.labpackets import Sniffer, assert_reach, datagram, send_packet
from tests.support.labtools import SOON, Make, at_rest, await_problem

pytestmark = pytest.mark.lab

TIMES = 3


def killed(host: Host) -> None:
    host.stop_agent(signal.SIGKILL)


def without_flows(host: Host) -> None:
    """The switch restarts, as after a crash, while no agent is there to give it flows: it learns, and floods."""
    host.stop_agent(signal.SIGKILL)
    host.kill_vswitchd()
    host.start_vswitchd(restore_wait=False)
    wait_for("the switch to forward", lambda: "NORMAL" in host.ovs_ofctl("dump-flows", "obr0"), SOON)


STATES = {"agent alive": lambda host: None, "agent killed": killed, "switch restarted without flows": without_flows}


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    made = module_lab(3, 2, dual_stack=True)
    at_rest(made)
    return made


@pytest.fixture(scope="module", params=STATES)
def scene(request: pytest.FixtureRequest, three: Lab) -> Iterator[Scene]:
    host = three.host(1)
    STATES[request.param](host)
    yield Scene(three)
    if not host.agent_alive():
        host.start_agent()
    at_rest(three)
    assert_reach(three)


@pytest.mark.parametrize("attack", every(), ids=lambda attack: attack.name)
def test_attack(scene: Scene, attack: Attack | Theft) -> None:
    if isinstance(attack, Attack):
        refused(scene, attack)
    else:
        nothing_stolen(scene, attack)


def markers() -> Iterator[bytes]:
    own = os.urandom(6).hex().encode()
    return (own + b"-%04d" % number for number in itertools.count())


def refused(scene: Scene, attack: Attack) -> None:
    """The honest packet arrives, the attack does not, and one that was sent after it arrives again."""
    first, forged, last = itertools.islice(markers(), 3)
    with Sniffer(*attack.watched(scene)) as there:
        arrives(scene, attack, first, there)
        for _ in range(TIMES):
            attack.send(scene, forged)
        arrives(scene, attack, last, there)
        assert there.count(forged) == 0, [frame.hex(" ") for frame in there.frames if forged in frame][:3]


def arrives(scene: Scene, attack: Attack, marker: bytes, there: Sniffer) -> None:
    def again() -> bool:
        # a neighbour may be asked for its MAC first, and a switch without flows has to learn
        attack.control(scene, marker)
        return there.count(marker) > 0

    wait_for(f"the control of {attack.name}", again, SOON, every=0.1)


def nothing_stolen(scene: Scene, attack: Theft) -> None:
    """After the attack the victim's packets go where they should, and not to the liar."""
    target = attack.target(scene)
    source = scene.address(scene.victim, 6 if ":" in target else 4)
    with Sniffer(scene.liar.ns) as liar, Sniffer(scene.remote.ns) as rightful:
        send_packet(scene.victim.ns, datagram(source, target, b"before"))
        for number, marker in zip(range(5 * TIMES), markers(), strict=False):
            attack.send(scene)
            send_packet(scene.victim.ns, datagram(source, target, marker))
            wait_for(f"packet {number}", lambda m=marker: liar.count(m) or rightful.count(m), SOON, every=0.01)  # type: ignore[misc]
            assert not liar.count(marker), f"packet {number} went to the liar"


def test_what_copies_frames_out_of_obr0_is_named_and_left(three: Lab) -> None:
    # of h1 the agent may be dead
    host = three.host(2)
    host.ovs_vsctl("--", "--id=@m", "create", "Mirror", "name=m0", "--", "set", "Bridge", "obr0", "mirrors=@m")
    try:
        await_problem(host, "mirrors", "obr0")
        assert host.ovs_vsctl("get", "Bridge", "obr0", "mirrors").strip() != "[]"
    finally:
        host.ovs_vsctl("clear", "Bridge", "obr0", "mirrors")
