#!/usr/bin/env bash
# image.sh BASE TAG [TOOL] -- builds the container image with docker, podman or buildah: the first one that works
# here, or TOOL. HTTP_PROXY and HTTPS_PROXY are passed to the build.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 2,3p "$0" >&2; exit 2; }
base=$1 tag=$2 tools=${3:-docker podman buildah}

die() { printf 'image: error: %s\n' "$*" >&2; exit 1; }
works() { # whether the tool can build here; docker can't without its daemon
  command -v "$1" >/dev/null || return 1
  case $1 in docker) timeout 20 docker version >/dev/null 2>&1 ;; *) timeout 20 "$1" info >/dev/null 2>&1 ;; esac
}
tool=
for each in $tools; do
  if works "$each"; then tool=$each; break; fi
done
[ -n "$tool" ] || die "none of $tools works here: start Docker, or install podman or buildah (Debian, Ubuntu: buildah)"

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ovsmesh/__init__.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain -- Dockerfile constraints.txt ovsmesh setup.cfg 2>/dev/null)" ] || revision=$revision-dirty
arguments=(--build-arg "BASE=$base" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --tag "$tag")
for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
  [ -z "${!name:-}" ] || arguments+=(--build-arg "$name=${!name}")
done
printf 'image: building %s from %s with %s\n' "$tag" "$base" "$tool" >&2
case $tool in
  # docker's own format, so that every runtime and `docker load` read it; chroot: needs no runtime and no cgroups
  buildah) exec buildah bud --format docker --isolation chroot --layers --network host "${arguments[@]}" . ;;
  podman) exec podman build --format docker --layers --network host "${arguments[@]}" . ;;
  docker) exec docker build --network host "${arguments[@]}" . ;;
  *) die "$tool: wanted docker, podman or buildah" ;;
esac
