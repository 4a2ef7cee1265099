"""Find or build the programs of a real control plane: from KUBEBUILDER_ASSETS, PATH, or a build from source.

A program that is found must be new enough for the tests. Otherwise it is built once with Go from the module
proxy, into a cache folder outside the checkout. `python tests/support/binaries.py` does
that and prints where they are (with --all those of a whole cluster, kubelet included). --ahead is for before the
tests: silent where there is nothing to build, and where nothing can be built it fails in CI and else says what
will be skipped. --check only says what is missing. With --docker it is about a newer dockerd than Debian has. Imports
nothing of ovsmesh.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

KUBE = "1.36.3"
ETCD = "3.6.16"
MOBY = "2.0.0-beta.24"
"""Docker 29, by the name of its Go module."""
GO = (1, 26)
"""What those sources ask for in their go.mod."""
BUILD_MINUTES = "4 to 10"
"""On two cores, from nothing (downloads included); for the message that says how long it takes."""
DOCKER_MINUTES = "3 to 6"

_BUILD_SECONDS = 3600
_QUERY_SECONDS = 60

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
"""A control plane, and what speaks to it."""
NODE_PROGRAMS = ("kube-scheduler", "kubelet", "kube-proxy")
"""What a cluster that runs pods needs besides."""
DOCKER_PROGRAMS = ("dockerd", "docker-proxy")
"""Of Docker 29; the rest of it is Debian 13's."""
_NEWEST_THAT_LACKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    # etcd 3.5 and older lack RequestWatchProgress: bookmarks of a new watch end in an ERROR 500 event.
    # Kubernetes before 1.33 lacks the node name in a token's claims by default, or the CEL library of CIDRs.
    {"etcd": (3, 5), "kube-apiserver": (1, 32), "kube-controller-manager": (1, 32), "kubectl": (1, 30)}
    | dict.fromkeys(NODE_PROGRAMS, (1, 32))
)
_MAINS = {
    "etcd": ("go.etcd.io/etcd/server/v3/etcdmain", "etcdmain.Main(os.Args)"),
    "kube-apiserver": ("k8s.io/kubernetes/cmd/kube-apiserver/app", "app.NewAPIServerCommand()"),
    "kube-controller-manager": (
        "k8s.io/kubernetes/cmd/kube-controller-manager/app",
        "app.NewControllerManagerCommand()",
    ),
    "kubectl": ("k8s.io/kubectl/pkg/cmd", "cmd.NewDefaultKubectlCommand()"),
    "kube-scheduler": ("k8s.io/kubernetes/cmd/kube-scheduler/app", "app.NewSchedulerCommand()"),
    "kubelet": ("k8s.io/kubernetes/cmd/kubelet/app", "app.NewKubeletCommand(context.Background())"),
    "kube-proxy": ("k8s.io/kubernetes/cmd/kube-proxy/app", "app.NewProxyCommand()"),
}
_STAGING = (
    "api apiextensions-apiserver apimachinery apiserver cli-runtime client-go cloud-provider cluster-bootstrap"
    " code-generator component-base component-helpers controller-manager cri-api cri-client cri-streaming"
    " csi-translation-lib dynamic-resource-allocation endpointslice externaljwt kms kube-aggregator"
    " kube-controller-manager kube-proxy kube-scheduler kubectl kubelet metrics mount-utils pod-security-admission"
    " sample-apiserver sample-cli-plugin sample-controller streaming"
)
"""Modules of k8s.io that are developed inside k8s.io/kubernetes."""


class BinariesError(Exception):
    """A program is missing and can't be built; the text says what to install."""


def cache(name: str = "kube") -> Path:
    """The folder that a program is built into; the same rule as scripts/setup.sh has for what it keeps."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = f"docker-{MOBY}" if name in DOCKER_PROGRAMS else f"kube-{KUBE}"
    return Path(os.environ.get("OVSMESH_CACHE") or f"{home}/ovsmesh") / folder


@functools.cache
def binaries(names: tuple[str, ...] = PROGRAMS) -> Mapping[str, Path]:
    """Each of `names` → its path, built first where need be. Raises BinariesError.

    The first call on a machine may take ten minutes and says so on standard error.
    """
    found = {name: path for name in names if (path := _find(name)) is not None}
    missing = [name for name in names if name not in found]
    if missing:
        found |= _build(missing)
    return MappingProxyType(found)


def ready(names: tuple[str, ...] = PROGRAMS) -> bool:
    """Whether binaries() would return at once."""
    return all(_find(name) is not None for name in names)


def _find(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    places = [Path(assets) / name] if assets else []
    if (on_path := shutil.which(name)) is not None:
        places.append(Path(on_path))
    for place in places if name in _NEWEST_THAT_LACKS else ():
        if os.access(place, os.X_OK) and _version(place) > _NEWEST_THAT_LACKS[name]:
            return place
    built = cache(name) / "bin" / name
    return built if os.access(built, os.X_OK) else None


@functools.cache
def _version(program: Path) -> tuple[int, int]:
    """Major and minor version that `program` says it has; (0, 0) when it says none."""
    arguments = ["version", "--client"] if program.name == "kubectl" else ["--version"]
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    match = re.search(r"(?:[vV]ersion:|Kubernetes) v?(\d+)\.(\d+)", done.stdout)
    # A cloud vendor's kubectl is a dispatcher that starts others: not what is under test.
    if match is None or "dispatcher" in done.stdout:
        return (0, 0)
    return int(match[1]), int(match[2])


# ---------------------------------------------------------------- building


def _say(text: str) -> None:
    print(f"binaries: {text}", file=sys.__stderr__, flush=True)


def _go(docker: bool = False) -> str:
    """The go command, known to be able to build this. Raises BinariesError."""
    wanted = f"{GO[0]}.{GO[1]}"
    remedy = f"install Go {wanted} or newer (https://go.dev/doc/install) and put it on PATH"
    if not docker:
        remedy += f", or point KUBEBUILDER_ASSETS at a folder with {', '.join(PROGRAMS)}"
        remedy += " (Kubernetes 1.33, etcd 3.6, or newer)"
    go = shutil.which("go")
    if go is None:
        what = "Docker 29" if docker else "a control plane"
        raise BinariesError(f"{what} for the tests must be built with Go {wanted}, found no go: {remedy}")
    have = _run([go, "env", "GOVERSION", "GOTOOLCHAIN"], Path("/"), _QUERY_SECONDS).split()
    match = re.match(r"go(\d+)\.(\d+)", have[0]) if have else None
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    # From 1.21 on, go fetches the toolchain that a module asks for, unless it was told not to.
    if version >= GO or (version >= (1, 21) and have[1:] != ["local"]):
        return go
    raise BinariesError(f"wanted Go {wanted} or newer, found {have[0] if have else 'none'} in {go}: {remedy}")


def _run(argv: list[str], folder: Path, seconds: int) -> str:
    # No vendor folder, no version control stamp: the sources below are made here, not checked out.
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false", "GOWORK": "off"}
    try:
        done = subprocess.run(
            argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BinariesError(f"{' '.join(argv)}: not done after {seconds} s") from error
    if done.returncode:
        raise BinariesError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def _build(missing: list[str]) -> dict[str, Path]:
    go = _go(missing[0] in DOCKER_PROGRAMS)
    folder = cache(missing[0])
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be building the same
        left = [name for name in missing if not os.access(folder / "bin" / name, os.X_OK)]
        if left:
            docker = left[0] in DOCKER_PROGRAMS
            what = f"Docker 29, moby {MOBY}" if docker else f"Kubernetes {KUBE}, etcd {ETCD}"
            minutes, size = (DOCKER_MINUTES, "2 GB") if docker else (BUILD_MINUTES, "4 GB")
            _say(
                f"building {', '.join(left)} ({what}) from the Go module proxy: once, about"
                f" {minutes} minutes on two cores, {size} of downloads and build results; kept in {folder}"
            )
        for name in left:
            start = time.monotonic()
            (_build_docker if name in DOCKER_PROGRAMS else _build_one)(go, folder, name)
            _say(f"{name} built in {time.monotonic() - start:.0f} s")
    return {name: folder / "bin" / name for name in missing}


def _build_one(go: str, folder: Path, name: str) -> None:
    """Builds one program; it stands in bin/ whole or not at all."""
    source = folder / "src" / ("etcd" if name == "etcd" else "kube")
    main = source / name / "main.go"
    main.parent.mkdir(parents=True, exist_ok=True)
    for each in _MAINS:
        # All mains of a module must be there before `go mod tidy` looks at what they need.
        if (each == "etcd") == (name == "etcd"):
            (source / each).mkdir(exist_ok=True)
            (source / each / "main.go").write_text(_main(each))
    if not (source / "go.sum").exists():
        (source / "go.mod").write_text(_module(name))
        _tidy(go, source)
    package = "k8s.io/component-base/version"
    flags = f"-s -w -X {package}.gitVersion=v{KUBE} -X {package}.gitMajor=1 -X {package}.gitMinor={KUBE.split('.')[1]}"
    temporary = folder / "bin" / f".{name}"
    _run([go, "build", "-trimpath", "-ldflags", flags, "-o", str(temporary), f"./{name}"], source, _BUILD_SECONDS)
    temporary.rename(folder / "bin" / name)


_LOG_DRIVERS = """\
package daemon

import (
	_ "github.com/moby/moby/v2/daemon/logger/jsonfilelog"
	_ "github.com/moby/moby/v2/daemon/logger/local"
	_ "github.com/moby/moby/v2/daemon/logger/loggerutils/cache"
)
"""
"""Without those that bring the clients of two clouds: an eighth of all packages."""


def _build_docker(go: str, folder: Path, name: str) -> None:
    """Builds one program of Docker; it stands in bin/ whole or not at all."""
    source, module = folder / "src", "github.com/moby/moby/v2"
    if not (source / "go.mod").exists():
        source.mkdir(exist_ok=True)
        shutil.rmtree(source / "moby", ignore_errors=True)
        told = _run([go, "mod", "download", "-json", f"{module}@v{MOBY}"], source, _BUILD_SECONDS)
        # what is in the module cache may not be written
        shutil.copytree(json.loads(told)["Dir"], source / "moby", copy_function=shutil.copyfile)
        for path in (source / "moby", *(source / "moby").rglob("*/")):
            path.chmod(0o755)
        (source / "moby/daemon/logdrivers_linux.go").write_text(_LOG_DRIVERS)
        head = f"module ovsmesh.test\n\ngo {GO[0]}.{GO[1]}\n\nrequire {module} v{MOBY}\n\n"
        (source / "go.mod").write_text(f"{head}replace {module} => ./moby\n")
    temporary = folder / "bin" / f".{name}"
    version = f"-X {module}/dockerversion.Version=29.0.0"
    flags = ["-trimpath", "-ldflags", f"-s -w {version}", "-tags", "exclude_graphdriver_btrfs netgo osusergo"]
    _run([go, "build", *flags, "-o", str(temporary), f"{module}/cmd/{name}"], source, _BUILD_SECONDS)
    temporary.rename(folder / "bin" / name)


def _tidy(go: str, source: Path) -> None:
    """`go mod tidy`, tried again where a download broke off."""
    for attempt in (1, 2, 3):
        try:
            _run([go, "mod", "tidy"], source, _BUILD_SECONDS)
        except BinariesError as error:
            (source / "go.sum").unlink(missing_ok=True)
            if attempt == 3:
                raise
            _say(f"again, since this failed: {error}")
        else:
            return


def _main(name: str) -> str:
    package, call = _MAINS[name]
    if name == "etcd":
        return f'package main\n\nimport (\n\t"os"\n\n\t"{package}"\n)\n\nfunc main() {{ {call} }}\n'
    context = '\t"context"\n' if "context." in call else ""
    imports = f'import (\n{context}\t"os"\n\n\t"k8s.io/component-base/cli"\n\t"{package}"\n)'
    return f"package main\n\n{imports}\n\nfunc main() {{ os.Exit(cli.Run({call})) }}\n"


def _module(name: str) -> str:
    head = f"module ovsmesh.test\n\ngo {GO[0]}.{GO[1]}\n\n"
    if name == "etcd":
        return head + f"require go.etcd.io/etcd/server/v3 v{ETCD}\n"
    # k8s.io/kubernetes is not meant to be required: each of its staging modules must be pinned by a replace.
    minor = KUBE.split(".", 1)[1]
    replaces = "".join(f"\tk8s.io/{module} => k8s.io/{module} v0.{minor}\n" for module in _STAGING.split())
    return head + f"require k8s.io/kubernetes v{KUBE}\n\nreplace (\n{replaces})\n"


def check(names: tuple[str, ...]) -> None:
    """Raises BinariesError where binaries() can't but fail; builds nothing."""
    if not ready(names):
        _go(names == DOCKER_PROGRAMS)


def main(options: Sequence[str]) -> str | None:
    """What to end with: None for success, else an error text."""
    names: tuple[str, ...] = PROGRAMS + NODE_PROGRAMS if "--all" in options else PROGRAMS
    what = "a Kubernetes control plane"
    if "--docker" in options:
        names, what = DOCKER_PROGRAMS, "Docker 29"
    try:
        if "--check" in options:
            check(names)
            return None
        found = binaries(names)
    except BinariesError as problem:
        if "--ahead" in options and not os.environ.get("CI"):
            _say(f"the tests that need {what} will be skipped: {problem}")
            return None
        return f"binaries: error: {problem}"
    if "--ahead" not in options:
        for program, path in found.items():
            print(program, path)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
