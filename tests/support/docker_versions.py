"""Dockers of several versions: this machine's, another Debian's in a root file system, one built from source.

All of them run on this machine's kernel, in the network namespace of a lab host; docker_restart.py enters the root.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ovsmesh.lab import netns
from tests.support import debian as release
from tests.support.binaries import DOCKER_PROGRAMS, binaries
from tests.support.systemd_container import CACHE, once

_INCLUDE = ("docker.io", "iptables", "nftables", "iproute2", "mount")


@dataclass(frozen=True)
class Kind:
    """A Docker to test with: that of this machine, or the one in a root file system of its own."""

    name: str
    root: Path | None = None
    programs: Path | None = None
    """A folder with programs that come before those of `root`."""
    nftables: bool = False
    """Whether its rules are nft's own, by `"firewall-backend": "nftables"`."""

    @property
    def on_nftables(self) -> Kind:
        return replace(self, name=f"{self.name} nftables", nftables=True)


OWN = Kind("this machine's")


def by_hand() -> Kind:
    """Return what the tests of the move use: this machine's Docker, or that of $DOCKER_ROOT and $DOCKER_PROGRAMS."""
    root, programs = (os.environ.get(name, "") for name in ("DOCKER_ROOT", "DOCKER_PROGRAMS"))
    return Kind("by hand", Path(root) if root else None, Path(programs) if programs else None)


def debian(suite: str) -> Kind:
    """Return the Docker of a release of Debian; its root is made first where it is missing (2 minutes, 370 MB)."""
    if suite == release.own():
        return OWN
    key = hashlib.sha256(" ".join(_INCLUDE).encode()).hexdigest()[:12]
    root = CACHE / f"docker-{suite}-{key}"
    with once(root) as needed:
        if needed:
            archive, partial = root.with_suffix(".tar"), root.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                release.bootstrap(suite, archive, variant="apt", include=_INCLUDE)
                netns.run(["tar", "-xf", str(archive), "-C", str(partial), "--numeric-owner"], timeout=300)
            finally:
                archive.unlink(missing_ok=True)
            partial.rename(root)
    return Kind(suite, root)


_RUNC = """\
#!/bin/sh
# Debian's runc does not know time namespaces
before=
for word; do
  [ "$before" != --bundle ] || sed -i 's/,{"type":"time"}//; s/{"type":"time"},//' "$word/config.json"
  before=$word
done
exec /usr/sbin/runc "$@"
"""


def newest() -> Kind:
    """Return Docker 29, built from its source, with this machine's containerd, runc, iptables and nft."""
    programs = binaries(DOCKER_PROGRAMS)["dockerd"].parent
    with once(programs / "runc") as needed:
        if needed:
            (programs / ".runc").write_text(_RUNC)
            (programs / ".runc").chmod(0o755)
            (programs / ".runc").rename(programs / "runc")
    return Kind("29", programs=programs)
