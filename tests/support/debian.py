"""A Debian root file system by mmdebstrap, from the mirror that this machine's own apt uses.

No mirror is named here. Where apt has sources of Debian, they are taken over with another suite's name in them; so are
its settings of how to get there, and the certificates and settings that pip and other clients have in this machine's
environment.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

OLDEST = "bookworm"
"""The oldest release that ovsmesh runs on: that of the tests' machines and of the image's base."""
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_SECONDS = 900.0
_ACQUIRE = re.compile(r"Acquire::(https?|Check-Valid-Until|Check-Date|ForceIPv[46])\b.* \".+\";")
_CLIENT = re.compile(r"(?i)(https?|all|no)_proxy|PIP_(?!FIND_LINKS).+|SSL_CERT_(FILE|DIR)|\w+_CA_BUNDLE")
"""How this machine's clients reach what they download from; a folder of wheels of its own is not part of that."""


def own() -> str:
    """Return the release of this machine, for which its Python makes wheels; elsewhere than on Debian the oldest."""
    release = platform.freedesktop_os_release()
    return release.get("VERSION_CODENAME", OLDEST) if release.get("ID") == "debian" else OLDEST


class DebianError(Exception):
    """No root file system could be made; the text ends with what apt or mmdebstrap said."""


def bootstrap(
    suite: str, archive: Path, *, variant: str, include: Sequence[str] = (), options: Sequence[str] = ()
) -> None:
    """Make `archive`, a tar file of a root file system of `suite`; it is there whole or not at all.

    Raises DebianError where mmdebstrap is missing or fails, or apt has no sources of Debian.
    """
    if not shutil.which("mmdebstrap"):
        raise DebianError("mmdebstrap is missing: scripts/setup.sh --dev installs it")
    partial = archive.with_suffix(".partial.tar")
    argv = ["mmdebstrap", "--mode=root", f"--variant={variant}", *options]
    argv += [f"--aptopt={line}" for line in ("Acquire::Languages none", "Acquire::Retries 3", *acquire())]
    argv += [f"--include={','.join(include)}"] if include else []
    try:
        _run([*argv, suite, str(partial), *sources(suite)])
        partial.rename(archive)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def sources(suite: str) -> tuple[str, ...]:
    """Return the lines of sources.list for `suite`, as this machine has them for its own. Raises DebianError."""
    wanted = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    said = _run(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages", "Origin: Debian"])
    if not said.strip():
        # the origin stands in the lists that are downloaded
        said = _run(["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"])
    return _swapped(said, platform.freedesktop_os_release().get("VERSION_CODENAME", ""), suite)


def _swapped(targets: str, own: str, suite: str) -> tuple[str, ...]:
    signed = f" [signed-by={_KEYRING}]" if os.path.exists(_KEYRING) else ""
    found: dict[str, None] = {}
    for line in targets.splitlines():
        uri, release, component = line.split()
        name, _, pocket = release.partition("-")
        if own and name == own and pocket in ("", "updates", "security"):
            found[f"deb{signed} {uri} {suite}{pocket and f'-{pocket}'} {component}"] = None
    if not found:
        raise DebianError(
            f"apt's sources on this machine ({own or 'unknown'}) name no mirror of Debian, and a root file system of"
            f" {suite} is made from one: run this on Debian"
        )
    return tuple(found)


@functools.cache
def acquire() -> tuple[str, ...]:
    """Return apt's settings of how this machine reaches its mirror: proxies, certificates, clocks."""
    return tuple(line for line in _run(["apt-config", "dump"]).splitlines() if _ACQUIRE.fullmatch(line))


def client_environment() -> dict[str, str]:
    """Return the variables that tell clients such as pip how to reach their registry from this machine."""
    return {name: value for name, value in os.environ.items() if _CLIENT.fullmatch(name)}


def give_network(root: Path, environment: Mapping[str, str]) -> None:
    """Let a root file system reach what this machine reaches, in the same way.

    Copies the resolver's and apt's settings, pip's, and every file of certificates that `environment` names.
    """
    files = ["/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"]
    files += [value for value in environment.values() if value.startswith("/")]
    for name in files:
        if os.path.isfile(name):
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copy(name, target)
    (root / "etc/apt/apt.conf.d/90this-machine").write_text("".join(f"{line}\n" for line in acquire()))
    for home in ("~/.pip/pip.conf", "~/.config/pip/pip.conf"):
        if (found := Path(home).expanduser()).is_file():
            target = root / "root" / found.relative_to(Path.home())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, target)


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise DebianError(f"{shlex.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
