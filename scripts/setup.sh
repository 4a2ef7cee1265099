#!/bin/sh
# shellcheck shell=bash
# Makes this machine ready for `make demo` (plain) or for the tests (--dev): Debian and Ubuntu packages,
# and a virtual environment in a cache folder outside the checkout. Installs only what is missing and
# says what and why. A second run does nothing. `--where` only prints the virtual environment's path.
if [ -z "${BASH_VERSION-}" ] || [ "${BASH##*/}" = sh ]; then
  command -v bash >/dev/null && exec bash "$0" "$@"
  echo 'setup: error: bash is missing, and this script is for Debian 12, Ubuntu 24.04 and newer' >&2
  exit 1
fi
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

flavour=plain where=
for option; do
  case $option in
    --dev) flavour=dev ;;
    --where) where=1 ;;
    *) echo "usage: scripts/setup.sh [--dev] [--where]" >&2; exit 2 ;;
  esac
done

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# name on PATH | package | flavour | why
needs='ovs-vswitchd|openvswitch-switch|plain|the switch that holds the tunnels
ip|iproute2|plain|network namespaces for the hosts of the lab
nft|nftables|plain|filter and masquerade rules
iptables|iptables|plain|accept rules where a host filters with iptables
ping|iputils-ping|plain|pings from a pod of the lab by hand
tcpdump|tcpdump|plain|shows what crosses a tunnel
modprobe|kmod|dev|loads kernel modules in the kernel tests
openssl|openssl|dev|certificates of the control plane in the Kubernetes tests
/usr/lib/cni/bridge|containernetworking-plugins|dev|plugs pods into kbr0 as a container runtime does, in the lab
setpriv|util-linux|dev|ends that control plane when the tests are killed
mmdebstrap|mmdebstrap|dev|a fresh Debian: for the tests of bootstrap.sh and of fresh machines, and as the base of the image without a registry
shellcheck|shellcheck|dev|reads bootstrap.sh and the scripts that bootstrap --print writes
dockerd|docker.io|dev|a Docker daemon for each lab host, in the tests of --docker
containerd|containerd|dev|runs the containers of the nodes in the end to end tests
runc|runc|dev|starts the containers of both
buildah|buildah|dev|builds the image where no Docker runs
chromium|chromium|dev|opens the page of the agent in the tests
promtool|prometheus|dev|checks the alert rules of manifests/monitoring
busybox|busybox-static|dev|the content of the containers of the tests
linux.uml|user-mode-linux|dev|a kernel with the openvswitch datapath, for the kernel tests'

# The first Python >= 3.11 that really starts (a version manager puts shims on PATH that do not).
find_python() {
  local name found
  for name in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3 /usr/bin/python3.11; do
    found=$(command -v "$name" 2>/dev/null) || continue
    if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$found"
      return
    fi
  done
  return 1
}

# One virtual environment for each Python, each set of dependencies and each checkout.
venv_path() {
  local key
  key=$({ "$1" -VV; sed '/^\[tool:/,$d' setup.cfg; pwd -P; } | sha256sum | cut -c1-12)
  echo "${OVSMESH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ovsmesh}/venv-$key"
}

if [ -n "$where" ]; then
  python=$(find_python) || die "no Python 3.11 or newer on PATH; run scripts/setup.sh"
  venv_path "$python"
  exit
fi

[ "$(uname -s)" = Linux ] || die "ovsmesh needs Linux, this is $(uname -s)"

sudo=
as_root() { # says once that it is going to use sudo
  if [ "$(id -u)" != 0 ] && [ -z "$sudo" ]; then
    command -v sudo >/dev/null || die "packages are missing and this is not root: run it as root, or install sudo"
    if [ ! -t 0 ]; then
      sudo -n true 2>/dev/null || die "packages are missing and sudo wants a password that nobody can type here: run it as root"
    fi
    say "not root: using sudo to install packages"
    sudo=sudo
  fi
  $sudo "$@"
}

updated=
apt() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
    -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 "$@" </dev/null
}
apt_update() {
  [ -z "$updated" ] || return 0
  command -v apt-get >/dev/null || die "apt-get not found: install by hand what is named here (this script is for Debian 12, Ubuntu 24.04 and newer)"
  say "reading the package lists (apt-get update)"
  apt update >&2 || say "warning: apt-get update failed; trying with the lists that are there"
  updated=1
}
apt_has() { # whether apt can install this package
  # Read whole, then matched: `| grep -q` ends early, apt-cache dies of SIGPIPE, and pipefail says "no".
  [[ $(LC_ALL=C apt-cache policy "$1" 2>/dev/null) =~ Candidate:\ [^\(] ]]
}
# policy-rc.d keeps packages from starting their services. Without systemd an init script would start a switch that
# nothing ends; the lab runs switches of its own. The tests run dockerds of their own too, while one of the machine would
# make a docker0 and set FORWARD to DROP. In other cases apt does what it always does.
policy=/usr/sbin/policy-rc.d
apt_install() {
  local log rc=0 policy_made=
  log=$(mktemp)
  if { [ ! -d /run/systemd/system ] || [ "$flavour" = dev ]; } && [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
    policy_made=1
  fi
  apt install --no-install-recommends "$@" >"$log" 2>&1 || rc=$?
  [ -z "$policy_made" ] || as_root rm -f $policy
  [ $rc = 0 ] || { tail -n 20 "$log" >&2; }
  rm -f "$log"
  return $rc
}

packages=() names=() reasons=()
while IFS='|' read -r name package for why; do
  [ "$for" = plain ] || [ "$flavour" = dev ] || continue
  command -v "$name" >/dev/null && continue
  # what some releases do not have: the tests that need it are skipped there, and fail in CI
  case $package in
    user-mode-linux | chromium | prometheus)
      apt_update
      apt_has "$package" || { say "no $package for $(uname -m) in its packages; the tests that need it are skipped: $why"; continue; } ;;
  esac
  packages+=("$package") names+=("$name") reasons+=("$why")
done <<<"$needs"
if [ ${#packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "apt-get not found: install ${packages[*]} by hand (this script is for Debian 12, Ubuntu 24.04 and newer)"
  for n in "${!packages[@]}"; do say "installing ${packages[n]}: ${reasons[n]}"; done
  apt_update
  if ! apt_install "${packages[@]}"; then
    for n in "${!names[@]}"; do
      command -v "${names[n]}" >/dev/null || die "apt-get could not install ${packages[n]}, which brings ${names[n]} (see above)"
    done
    say "a package's start script failed; its programs are installed, and nothing more is needed"
  fi
fi

if ! python=$(find_python); then
  say "no Python 3.11 or newer on PATH"
  apt_update
  for version in 3.11 3.12 3.13; do
    apt_has python$version && apt_has python$version-venv || continue
    say "installing python$version: ovsmesh needs Python 3.11 or newer"
    apt_install python$version python$version-venv || die "apt-get could not install python$version (see above)"
    break
  done
  python=$(find_python) || die "Python 3.11 or newer is needed, this machine has $(python3 -V 2>/dev/null || echo none) and its packages hold no newer one; put a python3.11 on PATH and try again"
fi

# Go is not installed here: Debian's is too old. binaries.py says what is missing.
if [ $flavour = dev ] && ! missing=$("$python" tests/support/binaries.py --check 2>&1); then
  say "the Kubernetes tests will be skipped (in CI: fail): ${missing#kube: error: }"
fi

venv=$(venv_path "$python")
if [ -e "$venv/ready-$flavour" ] || [ -e "$venv/ready-dev" ]; then
  exit
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  package=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
  say "installing $package: a virtual environment for ovsmesh's Python libraries"
  apt_update
  apt_install "$package" || die "apt-get could not install $package (see above); $python can't make virtual environments without it"
fi
[ -x "$venv/bin/pip" ] || {
  say "making a virtual environment in $venv, so that nothing of this machine's Python changes"
  rm -rf "$venv"
  "$python" -m venv "$venv"
}
target=.[lab]
[ $flavour = plain ] || target=.[dev]
say "installing the Python libraries that setup.cfg names ($target)"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-input --retries 5 --timeout 30 -e "$target" >&2 ||
  die "pip could not install them (see above); check that this machine reaches its package index"
"$venv/bin/python" -c 'import click, ovs, yaml' || die "the virtual environment in $venv is broken; remove it and try again"
touch "$venv/ready-$flavour"
say "ready"
