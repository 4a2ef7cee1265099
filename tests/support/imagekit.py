"""Make container images without a registry: ovsmesh's by `make image`, and one for test pods.

The base is a Debian root file system made by mmdebstrap, as slim as debian:12-slim. It, and the layers of the
build, are kept in the folder where setup.sh keeps the virtual environments. Imports nothing of ovsmesh.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import binaries, debian

ROOT = Path(__file__).parents[2]
POD_IMAGE = "ovsmesh.test/pod:1"
_BASE = "localhost/ovsmesh-base:12"
TAG = "docker.io/library/ovsmesh:0.1.0"
"""What manifests/kustomization.yaml names, as a runtime spells it."""
_AUTHORITIES = Path("/usr/local/share/ca-certificates")
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
"""What the slim image of Debian leaves out too."""
_MOST_BYTES = 6 << 30
"""Of kept layers; then they are removed and made again."""
_BUILD_SECONDS = 900.0


class ImageError(Exception):
    """An image could not be made; the text ends with what the tool said."""


def cache() -> Path:
    return binaries.cache().parent / "image"


def ours() -> Path:
    """Return the archive of the image of this checkout, built by `make image`, for `ctr images import`."""
    cache().mkdir(parents=True, exist_ok=True)
    archive = cache() / f"ovsmesh-{os.getpid()}.tar"
    with _alone():
        environment = _storage()
        if not _has(_BASE, environment):
            _make_base(environment)
        _run(["make", "-C", str(ROOT), "image", f"BASE={_BASE}", f"TAG={TAG}", "TOOL=buildah"], environment)
        atexit.register(archive.unlink, missing_ok=True)
        _run(["buildah", "push", "--quiet", TAG, f"docker-archive:{archive}:{TAG}"], environment)
    return archive


@contextmanager
def _alone() -> Iterator[None]:
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _storage() -> dict[str, str]:
    """The environment in which buildah keeps everything under cache()."""
    folder = cache()
    config = folder / "storage.conf"
    text = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/layers"\nrunroot = "{folder}/run"\n'
    if not config.exists() or config.read_text() != text:
        config.write_text(text)
    return {**os.environ, "CONTAINERS_STORAGE_CONF": str(config), "BUILDAH_ISOLATION": "chroot"}


def _has(tag: str, environment: dict[str, str]) -> bool:
    layers = cache() / "layers"
    if layers.exists() and _bytes(layers) > _MOST_BYTES:
        shutil.rmtree(layers)
        return False
    found = subprocess.run(["buildah", "images", "--quiet", tag], env=environment, capture_output=True, check=False)
    return found.returncode == 0 and bool(found.stdout.strip())


def _bytes(folder: Path) -> int:
    return int(_run(["du", "-sx", "--block-size=1", str(folder)], dict(os.environ)).split()[0])


def _make_base(environment: dict[str, str]) -> None:
    archive = cache() / "base.tar"
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    clean = '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*'
    # in: what this machine trusts, so that the build gets through a proxy that this machine gets through
    hooks = [clean]
    if _AUTHORITIES.is_dir():
        hooks.append(f'--customize-hook=mkdir -p "$1{_AUTHORITIES}"')
        hooks.append(f"--customize-hook=sync-in {_AUTHORITIES} {_AUTHORITIES}")
    debian.bootstrap(debian.OLDEST, archive, variant="minbase", options=[*options, *hooks])
    container = _run(["buildah", "from", "scratch"], environment).strip()
    try:
        _run(["buildah", "add", "--quiet", container, str(archive), "/"], environment)
        _run(["buildah", "config", "--cmd", "bash", container], environment)
        _run(["buildah", "commit", "--quiet", container, _BASE], environment)
    finally:
        _run(["buildah", "rm", container], environment)
        archive.unlink()


def _run(argv: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    if done.returncode:
        raise ImageError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def pod(archive: Path) -> None:
    """An image with the machine's static busybox: sleeps as a sandbox, and whatever busybox can as a pod."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise ImageError("busybox: not found; install busybox-static (scripts/setup.sh --dev does)")
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "tmp", "www", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        _add(tar, "bin/busybox", Path(busybox).read_bytes(), 0o755)
        for name in ("sh", "sleep", "httpd", "hostname"):
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    blob = layer.getvalue()
    about = {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["trap exit TERM; while :; do sleep 1; done"]}
    config = json.dumps(
        {
            "architecture": _architecture(),
            "os": "linux",
            "config": {**about, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(blob).hexdigest()]},
        }
    ).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    with tarfile.open(archive, "w") as tar:
        _add(tar, "layer.tar", blob)
        _add(tar, name, config)
        listing = [{"Config": name, "RepoTags": [POD_IMAGE], "Layers": ["layer.tar"]}]
        _add(tar, "manifest.json", json.dumps(listing).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
