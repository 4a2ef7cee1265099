"""host-local's leases on their way to another directory, with the real plugin giving out addresses meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ovsmesh.containers import lease_store
from ovsmesh.containers.cni import Cni
from ovsmesh.dataplane.cni_config import DATA_DIR, FILE, OLD_STORE, STORE
from ovsmesh.dataplane.plan import Step
from ovsmesh.errors import OvsmeshError
from tests.support.cnikit import BIN

PLUGIN = BIN / "host-local"


@pytest.fixture
def stores(tmp_path: Path) -> tuple[str, str]:
    """The directory of before with two leases, and the one that they are moved to."""
    old = tmp_path / "old" / "ovsmesh"
    old.mkdir(parents=True)
    for address, pod in (("10.97.1.2", "a"), ("fd00:97:1::2", "a"), ("last_reserved_ip.0", "10.97.1.2")):
        (old / address).write_text(pod)
    (old / "lock").touch()
    return str(old), str(tmp_path / "new" / "ovsmesh")


def files(store: str) -> dict[str, str]:
    return {p.name: p.read_text() for p in Path(store).iterdir() if p.name != "lock"}


def test_all_leases_are_moved_and_a_link_takes_their_place(stores: tuple[str, str]) -> None:
    old, new = stores
    before = files(old)
    lease_store.move(old, new)
    assert files(new) == before and os.readlink(old) == new
    assert os.listdir(os.path.dirname(old)) == ["ovsmesh"]
    assert 0 < lease_store.link_age(old, new) < 600
    lease_store.move(old, new)
    lease_store.unlink(old, new)
    assert not os.path.lexists(old) and files(new) == before
    lease_store.move(old, new)


def test_a_lease_that_is_there_already_stays(stores: tuple[str, str]) -> None:
    old, new = stores
    os.makedirs(new)
    Path(new, "10.97.1.2").write_text("b")
    lease_store.move(old, new)
    assert files(new)["10.97.1.2"] == "b" and files(new)["fd00:97:1::2"] == "a"


def test_a_store_that_a_plugin_holds_is_moved_at_the_next_attempt(stores: tuple[str, str], tmp_path: Path) -> None:
    cni = Cni(str(tmp_path / "net.d"), "", stores)
    step = Step("+", "cni", FILE, "{}", None)
    with lease_store._locked(stores[0]), pytest.raises(OvsmeshError, match="leases can't be moved"):
        cni.apply([step])
    assert not (tmp_path / "net.d" / FILE).exists(), "the conflist waits for them"
    cni.apply([step])
    assert os.path.islink(stores[0])
    # in use still, and after the reboot that took the new one away
    cni.dirty()
    assert os.path.islink(stores[0])
    os.rename(stores[1], f"{stores[1]}.gone")
    cni.dirty()
    assert not os.path.lexists(stores[0])
    cni.close()


def test_the_conflist_names_the_directory_that_goes_at_a_reboot() -> None:
    assert DATA_DIR.startswith("/run/") and f"{DATA_DIR}/ovsmesh" == STORE
    assert OLD_STORE == "/var/lib/cni/networks/ovsmesh", "host-local's default"


def call(data_dir: Path, verb: str, pod: str) -> list[str]:
    ipam = {"type": "host-local", "dataDir": str(data_dir), "ranges": [[{"subnet": "10.97.1.0/24"}]]}
    conf = {"cniVersion": "1.0.0", "name": "ovsmesh", "type": "bridge", "ipam": ipam}
    env = {"CNI_COMMAND": verb, "CNI_CONTAINERID": pod, "CNI_IFNAME": "eth0"}
    env |= {"CNI_NETNS": "/proc/self/ns/net", "CNI_PATH": str(BIN)}
    done = subprocess.run(
        [PLUGIN], input=json.dumps(conf), capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [entry["address"] for entry in json.loads(done.stdout)["ips"]] if verb == "ADD" else []


@pytest.mark.skipif(not PLUGIN.exists(), reason="host-local is not installed (containernetworking-plugins)")
def test_no_address_is_given_twice_while_they_are_moved(tmp_path: Path) -> None:
    """Pods come all the time: first by the conflist of before, then by either, as the runtime may still hold that."""
    old, new = tmp_path / "old", tmp_path / "new"
    moved = threading.Event()

    def add(number: int) -> list[str]:
        late = number % 2 and moved.is_set()
        return call(new if late else old, "ADD", f"pod{number}")

    def move() -> None:
        while not moved.is_set():
            try:
                lease_store.move(str(old / "ovsmesh"), str(new / "ovsmesh"))
                moved.set()
            except BlockingIOError:
                continue

    first = call(old, "ADD", "living")
    with ThreadPoolExecutor(8) as pool:
        adding = [pool.submit(add, number) for number in range(40)]
        pool.submit(move).result(60)
        adding += [pool.submit(add, number) for number in range(40, 80)]
        given = [address for future in adding for address in future.result(60)]
    assert len({*given, *first}) == 81
    leases = {p.name for p in (new / "ovsmesh").iterdir()} - {"lock", "last_reserved_ip.0"}
    assert leases == {address.partition("/")[0] for address in (*given, *first)}
    # a pod that came before is freed by its new configuration
    call(new, "DEL", "living")
    assert first[0].partition("/")[0] not in os.listdir(new / "ovsmesh")
