"""What a test needs of the machine beyond Python and this project: found in its code, held against its markers.

A test without the marker of what it needs fails collection. What it needs is read off its code: it and its fixtures
reach functions and classes of tests/, and some of these are marked by `needs`. Programs and sockets can't be read off:
an audit hook refuses those in a test without the marker. Nothing is built or downloaded in a test's time: what
`built_ahead` marks is made between collection and the first test, for the tests that reach it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import ipaddress
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn, TypeVar

import pytest

T = TypeVar("T")

COVERS = {
    "root": {"root"},
    "network": {"network"},
    "lab": {"lab", "root"},
    "docker": {"docker"},
    "browser": {"browser"},
    "kube": {"kube", "root"},
    "kernel": {"kernel", "lab", "root"},
    "e2e": {"e2e", "lab", "docker", "kube", "root"},
}
"""Each marker, and what a test that carries it may use."""
WHAT = {
    "root": "root",
    "network": "an address beyond loopback",
    "lab": "Open vSwitch in network namespaces",
    "docker": "a container runtime",
    "browser": "Chromium",
    "kube": "a Kubernetes control plane",
    "kernel": "User-mode Linux",
    "e2e": "kubelets",
}
_ELSEWHERE = {
    "ovsmesh.lab.lab.Lab.up": "lab",
    "ovsmesh.lab.lab.end_orphans": "lab",
    "tests.kernel.guest.Guest": "kernel",
} | {f"ovsmesh.lab.netns.{name}": "root" for name in ("within", "spawn", "ip_batch", "sysctl", "tx_checksum_off")}
"""What needs something where this module is not imported: the lab, and a script."""
_PROGRAMS = {
    **dict.fromkeys(("ip", "nft", "tc", "unshare", "nsenter", "mount", "umount", "modprobe"), "root"),
    **{f"{ip}tables{kind}{what}": "root" for ip in ("ip", "ip6") for kind in ("", "-nft", "-legacy")
       for what in ("", "-save", "-restore")},
    **dict.fromkeys(("ovsdb-server", "ovs-vswitchd", "ovs-vsctl"), "lab"),
    **dict.fromkeys(("docker", "dockerd", "containerd", "ctr", "runc"), "docker"),
    **dict.fromkeys(("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"), "browser"),
    **dict.fromkeys(("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "promtool"), "kube"),
    **dict.fromkeys(("kubelet", "kube-proxy"), "e2e"),
    "linux.uml": "kernel",
}  # fmt: skip
_BUILDERS = {"apt-get", "apt", "mmdebstrap", "debootstrap", "buildah", "podman", "pip", "pip3", "npm", "cargo"}
_GO_BUILDS = {"build", "install", "get", "mod", "run", "test"}


_needs: dict[object, str] = {}
_builders: dict[object, Callable[[], object]] = {}


def needs(what: str) -> Callable[[T], T]:
    """Say of a function or class what a test that reaches it needs."""
    assert what in WHAT

    def note(thing: T) -> T:
        _needs[thing] = what
        return thing

    return note


def absent(program: str, package: str) -> NoReturn:
    """Skip the test for want of a program that Debian has and other systems may not; fail it in CI."""
    text = f"no {program} on PATH: install the package {package} (scripts/setup.sh --dev does)"
    if os.environ.get("CI"):
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def built_ahead(make: Callable[[], T]) -> Callable[[], T]:
    """Make a builder that runs once a process and never in a test: inside one, what was made before, or its error."""
    outcome: list[tuple[T | None, Exception | None]] = []

    @functools.wraps(make)
    def get() -> T:
        if not outcome:
            if _current is not None:
                pytest.fail(
                    f"{_current.nodeid} builds {make.__name__}, which no test or fixture of it names", pytrace=False
                )
            try:
                outcome.append((make(), None))
            except Exception as error:  # noqa: BLE001  # kept, and raised where it is wanted
                outcome.append((None, error))
        made, why = outcome[0]
        if why is not None:
            raise why
        return made  # type: ignore[return-value]  # without an error it was made

    _builders[get] = get
    return get


# ---------------------------------------------------------------- what a test reaches


@functools.cache
def reached(function: object) -> frozenset[object]:
    """Return all functions and classes in tests/ that the code of `function` names, and what their code names.

    Names are looked up as the code would at run time; methods of an object that came from elsewhere are not followed.
    """
    left, found = [function], set[object]()
    while left:
        one = left.pop()
        if isinstance(one, functools.partial):
            one = one.func
        if (wrapped := getattr(one, "__wrapped__", None)) is not None and one not in _builders:
            left.append(wrapped)
        if not isinstance(one, FunctionType | type) or one in found:
            continue
        found.add(one)
        if one in _builders or _path(one) in _ELSEWHERE:
            continue
        if isinstance(one, type):
            left += [getattr(part, "__func__", getattr(part, "fget", part)) for part in vars(one).values()]
            left += [base for base in one.__mro__[1:] if _followed(base)]
        else:
            left += [thing for thing in _named(one) if _followed(thing)]
    return frozenset(found)


def _path(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _followed(thing: object) -> bool:
    return _path(thing) in _ELSEWHERE or str(getattr(thing, "__module__", "")).startswith(
        ("tests.", "test_", "conftest")
    )


def _named(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue  # not filled yet
    for code in _codes(function.__code__):
        things = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        # an import inside a function names its module by the dots
        things += [importlib.import_module(n) for n in code.co_names if n.startswith(("ovsmesh.lab", "tests."))]
        yield from things
        # a name after a dot is one of a module or class that the same code names
        for owner in [thing for thing in things if isinstance(thing, ModuleType | type)]:
            yield from (vars(owner)[name] for name in code.co_names if name in vars(owner))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _reached(item: pytest.Function) -> set[object]:
    fixtures = [each.func for many in item._fixtureinfo.name2fixturedefs.values() for each in many]
    return set().union(*(reached(function) for function in (item.function, *fixtures)))


def missing(item: pytest.Function) -> list[str]:
    """Return, for each thing that the test needs and has no marker for, a line that says so."""
    wanted = {need: thing for thing in _reached(item) if (need := _needs.get(thing) or _ELSEWHERE.get(_path(thing)))}
    lacking = wanted.keys() - _allowed(item)
    # one marker may stand for another
    lacking -= {need for other in lacking for need in COVERS[other] - {other}}
    return [
        f"{item.nodeid} uses {getattr(wanted[need], '__qualname__', wanted[need])}, which needs {WHAT[need]}:"
        f" mark it with @pytest.mark.{need}"
        for need in sorted(lacking)
    ]


def _allowed(item: pytest.Item) -> set[str]:
    return {need for mark in item.iter_markers() for need in COVERS.get(mark.name, ())}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    tests = [item for item in report.result or () if isinstance(item, pytest.Function)]
    if report.passed and (lines := [line for item in tests for line in missing(item)]):
        report.outcome, report.result, report.longrepr = "failed", [], "\n".join(dict.fromkeys(lines))
    return report


# ---------------------------------------------------------------- before the first test

_SECONDS = 900
"""For a test with a marker, fixtures included: the longest takes 60 s on a quiet machine, and a busy one is ten times
slower. Each wait in it has a deadline of its own, which says more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None and any(mark.name in COVERS for mark in item.iter_markers()):
            item.add_marker(pytest.mark.timeout(_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    tests = [item for item in session.items if isinstance(item, pytest.Function)]
    builders = dict.fromkeys(thing for item in tests for thing in _reached(item) if thing in _builders)
    capture = session.config.pluginmanager.getplugin("capturemanager")
    for builder in builders:
        # what goes wrong is kept, for the test to fail or skip with
        with capture.global_and_fixture_disabled(), contextlib.suppress(Exception):
            _builders[builder]()


# ---------------------------------------------------------------- while a test runs

_current: pytest.Item | None = None


def _namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


_HOME = _namespace()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _current
    _current = item
    try:
        return (yield)
    finally:
        _current = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    item = _current
    if item is None or event not in ("subprocess.Popen", "socket.connect", "socket.sendto"):
        return
    program = event == "subprocess.Popen"
    why = _program(item, arguments[0], arguments[1], arguments[3]) if program else _address(item, arguments[1])
    if why:
        pytest.fail(f"{item.nodeid} {why}", pytrace=False)


def _program(item: pytest.Item, executable: Any, argv: Any, environment: Any) -> str:
    words = [os.fsdecode(word) for word in argv] if isinstance(argv, list | tuple) else [os.fsdecode(argv)]
    name = os.path.basename(os.fsdecode(executable))
    path = shutil.which(os.fsdecode(executable), path=(environment or os.environ).get("PATH"))
    # not there, or a stand-in that the test has written itself
    if path is None or path.startswith(_temporary(item)):
        return ""
    builds = name in _BUILDERS or (name == "go" and words[1:2] and words[1] in _GO_BUILDS)
    if builds or words[1:3] == ["-m", "pip"]:
        return f"builds or downloads, by {' '.join(words[:6])}: that is for a function marked built_ahead"
    need = _PROGRAMS.get(name)
    if need and need not in _allowed(item):
        return f"starts {' '.join(words[:6])}, which needs {WHAT[need]}: mark it with @pytest.mark.{need}"
    return ""


def _temporary(item: pytest.Item) -> str:
    # pytest has no public name for it
    return f"{item.config._tmp_path_factory.getbasetemp()}/"  # type: ignore[attr-defined]


def _address(item: pytest.Item, address: object) -> str:
    if address in ("/run/docker.sock", "/var/run/docker.sock") and "docker" not in _allowed(item):
        return f"speaks to this machine's Docker, at {address}"
    if not isinstance(address, tuple) or not address or not isinstance(address[0], str):
        return ""
    try:
        far = not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    except ValueError:
        far = address[0] != "localhost"
    # in a namespace that the test has made it may speak to whom it likes; a lab's prober sends from outside through
    # sockets of inside
    if far and not {"network", "lab"} & _allowed(item) and _namespace() == _HOME:
        return f"speaks to {address[0]}, which is beyond loopback: mark it with @pytest.mark.network"
    return ""


sys.addaudithook(_audit)
