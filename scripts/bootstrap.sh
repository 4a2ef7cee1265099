#!/bin/sh
# shellcheck shell=bash
# Makes this Debian or Ubuntu host a node of a mesh. It lists everything that is missing, installs Open vSwitch and
# ovsmesh, starts the agent as a systemd unit, waits until it has converged, and prints the peers.
# It may be run again, also after it was killed: what is already right is left alone.
# shellcheck disable=SC2015,SC2016  # `a && b || c` where c is for either's failure; backquotes in messages
# Up to here any shell reads it, so that a host without bash is refused in our words.
if [ -z "${BASH_VERSION-}" ] || [ "${BASH##*/}" = sh ]; then
  command -v bash >/dev/null && exec bash "$0" "$@"
  echo 'bootstrap: error: bash is missing, and this script is for Debian 12, Ubuntu 24.04 and newer' >&2
  exit 1
fi
set -euo pipefail
PATH=${PATH:-/usr/bin:/bin}:/usr/local/sbin:/usr/sbin:/sbin
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

usage='usage: scripts/bootstrap.sh [--mesh FILE] [--node NAME] [--docker auto|replace|off] [--from DIR]
                            [--wait SECONDS] [--dry-run]
       scripts/bootstrap.sh --kubernetes [--dry-run]
  --mesh FILE    the mesh file; it is copied to /etc/ovsmesh/mesh.yaml, where the agent reads it from then on
  --node NAME    the name of this host in the mesh                                       [default: the hostname]
  --docker WHAT  what the agent does with docker0, see `ovsmesh agent --help`          [default: as it is set]
  --from DIR     install ovsmesh from the wheels in DIR (see `make dist`), without a package index
  --wait SECONDS for the agent to converge                                             [default: 120]
  --kubernetes   only what the DaemonSets need of a node: Open vSwitch, kernel modules, sysctls
  --dry-run      print what would be done, and change nothing
exit: 0 done, 1 something is missing or failed (all of it is said), 2 wrong usage,
      3 done, and a peer does not answer (as on the first host of a mesh)'

root=/opt/ovsmesh link=/usr/local/bin/ovsmesh unit=/etc/systemd/system/ovsmesh-agent.service
default=/etc/default/ovsmesh installed_mesh=/etc/ovsmesh/mesh.yaml
modules='openvswitch vport_gre br_netfilter nf_tables'
packages='openvswitch-switch iproute2 kmod procps'
agent_packages='nftables iptables iputils-ping'

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
wrong() { say "$*"; printf '%s\n' "$usage" >&2; exit 2; }

mesh='' node='' docker='' from='' wait=120 kubernetes='' dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --mesh | --node | --docker | --from | --wait)
      [ $# -gt 1 ] || wrong "$1 needs a value"
      case $1 in
        --mesh) mesh=$2 ;;
        --node) node=$2 ;;
        --docker) docker=$2 ;;
        --from) from=$2 ;;
        --wait) wait=$2 ;;
      esac
      shift
      ;;
    --kubernetes) kubernetes=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) printf '%s\n' "$usage"; exit 0 ;;
    *) wrong "unknown option $1" ;;
  esac
  shift
done
case $docker in '' | auto | replace | off) ;; *) wrong "--docker $docker: wanted auto, replace or off" ;; esac
[[ $wait =~ ^[0-9]{1,5}$ ]] || wrong "--wait $wait: wanted seconds"
# It is written into /etc/default/ovsmesh, where it must be one word.
[[ -z $node || $node =~ ^[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?$ ]] || wrong "--node $node: no name a node can have"
[ -z "$kubernetes" ] || [ -z "$mesh$docker$from" ] || wrong "--kubernetes takes no --mesh, --docker or --from: the DaemonSet has them"

# ---------------------------------------------------------------- list everything that is missing

missing=()
need() { missing+=("$*"); }

in_kernel() { # loaded, or built in
  [ -d "/sys/module/$1" ] || grep -qsE "/${1//_/[-_]}\.ko" "/lib/modules/$(uname -r)/modules.builtin" || case $1 in
    br_netfilter) [ -d /proc/sys/net/bridge ] ;;
    nf_tables) grep -qs ' nft_register_chain_type' /proc/kallsyms ;;
    *) false ;;
  esac
}
has_module() { in_kernel "$1" || grep -qsE "/${1//_/[-_]}\.ko" "/lib/modules/$(uname -r)/modules.dep"; }
has_package() { [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null)" = 'ii ' ]; }
apt_has() { # whether apt can install this package
  # Read whole, then matched: `| grep -q` ends early, apt-cache dies of SIGPIPE, and pipefail says "no".
  [[ $(LC_ALL=C apt-cache policy "$1" 2>/dev/null) =~ Candidate:\ [^\(] ]]
}
find_python() { # the first Python >= 3.11 that can make a virtual environment; with `any`, or could
  local name found test='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
  [ "${1:-}" != any ] || test='import sys; sys.exit(sys.version_info < (3, 11))'
  for name in python3 python3.11 python3.12 python3.13 python3.14; do
    # Debian's own Python: one in /usr/local may be removed, and apt can't complete it.
    found=/usr/bin/$name
    if [ -x "$found" ] && "$found" -c "$test" 2>/dev/null; then
      echo "$found"
      return
    fi
  done
  return 1
}
python_packages() { # what brings such a Python
  local found version
  if found=$(find_python any); then
    version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "python$version-venv"
    return
  fi
  for version in 3 3.11 3.12 3.13; do
    apt_has "python$version" && apt_has "python$version-venv" || continue
    if [ $version = 3 ]; then
      [[ $(LC_ALL=C apt-cache policy python3) =~ Candidate:\ 3\.(1[1-9]|[2-9][0-9]) ]] || continue
    fi
    echo "python$version python$version-venv"
    return
  done
  return 1
}
wheel_of() { # the one ovsmesh wheel in a directory
  local found=("$1"/ovsmesh-*.whl)
  [ ${#found[@]} = 1 ] && [ -f "${found[0]}" ] && echo "${found[0]}"
}

[ "$(uname -s)" = Linux ] || die "ovsmesh needs Linux, this is $(uname -s)"
command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
  need "apt: this script is for Debian 12, Ubuntu 24.04 and newer; elsewhere install Open vSwitch and \`pip install .\`"
[ "$(id -u)" = 0 ] || need 'root: run it with sudo'
release=$(uname -r)
[[ $release =~ ^([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -ge 5 ] || need "kernel: Linux 5.0 or newer, this is $release"
for module in $modules; do
  has_module "$module" || need "kernel module $module: not in this kernel ($release) and not below /lib/modules/$release" \
    '(Ubuntu: linux-modules-extra; a container: load it on its host)'
done
systemd=''
[ ! -d /run/systemd/system ] || systemd=1
want=()
for package in $packages; do has_package "$package" || want+=("$package"); done
if [ -z "$kubernetes" ]; then
  for package in $agent_packages; do has_package "$package" || want+=("$package"); done
  if ! find_python >/dev/null; then
    if names=$(python_packages); then
      read -ra python_names <<<"$names"
      want+=("${python_names[@]}")
    else
      need 'Python 3.11 or newer: neither here nor in the packages of this release (after apt-get update?)'
    fi
  fi
  source=$mesh
  [ -n "$source" ] || source=$installed_mesh
  [ -f "$source" ] && [ -r "$source" ] || need "the mesh file: no $source${mesh:+, which --mesh names}; give --mesh FILE"
  if [ -n "$from" ]; then
    wheel=$(wheel_of "$from") || need "ovsmesh's wheel: wanted one ovsmesh-*.whl in $from (--from)"
  elif [ ! -f "$here/../setup.cfg" ]; then
    need "ovsmesh itself: no checkout around $here; give --from DIR with its wheels"
  fi
  [ -f "$here/ovsmesh-agent.service" ] || need "ovsmesh-agent.service beside this script, in $here"
  if [ -e $link ] || [ -L $link ]; then
    [[ $(readlink $link 2>/dev/null) = $root/* ]] || need "$link for ovsmesh: something else is there; move it away"
  fi
fi
if [ ${#missing[@]} -gt 0 ]; then
  say "this host can't be a node as it is; missing:"
  printf '  - %s\n' "${missing[@]}" >&2
  exit 1
fi

# ---------------------------------------------------------------- do it, or with --dry-run say it

changed=''
run() { # a command that changes something
  changed=1
  if [ -n "$dry" ]; then
    say "would run: $*"
  else
    # 9 is the lock of this script: a daemon that it starts must not hold it.
    "$@" 9>&-
  fi
}
put() { # FILE MODE: writes standard input to FILE, whole or not at all; false if the file has that text already
  local text
  text=$(cat; echo .)
  text=${text%.}
  if [ -f "$1" ] && [ "$(cat "$1"; echo .)" = "$text." ]; then
    # left by a killed run
    [ -n "$dry" ] || rm -f "$1.ovsmesh-new"
    return 1
  fi
  changed=1
  if [ -n "$dry" ]; then
    say "would write $1"
    return
  fi
  say "writing $1"
  # Joined by &&, since `set -e` is off before ||.
  { mkdir -p "$(dirname "$1")" && printf %s "$text" >"$1.ovsmesh-new" && chmod "$2" "$1.ovsmesh-new" &&
    sync "$1.ovsmesh-new" && mv -T "$1.ovsmesh-new" "$1"; } || die "$1 could not be written (see above)"
}
quietly() { # a command whose output is shown only if it fails
  local log rc=0
  if [ -n "$dry" ]; then
    run "$@"
    return
  fi
  log=$(mktemp)
  run "$@" >"$log" 2>&1 </dev/null || rc=$?
  [ $rc = 0 ] || tail -n 25 "$log" >&2
  rm -f "$log"
  return $rc
}
apt() {
  quietly env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -qq -y -o DPkg::Lock::Timeout=300 \
    -o Dpkg::Options::=--force-confold -o Acquire::Retries=3 -o Acquire::http::Timeout=30 "$@"
}
reinstall() { apt --no-install-recommends --fix-broken --reinstall install "$@"; }
sources_hash() { # the version: a hash of the wheel or of the sources
  if [ -n "$from" ]; then
    sha256sum <"$wheel"
  else
    (cd "$here/.." && find ovsmesh -name '*.py' -print0 | sort -z | xargs -0 sha256sum setup.cfg constraints.txt) | sha256sum
  fi | cut -c1-12
}

if [ -z "$dry" ]; then
  exec 9>/run/ovsmesh-bootstrap.lock
  flock -n 9 || die 'another run of this script is under way'
fi

if [ -n "$(dpkg --audit 2>/dev/null)" ] || [ -n "$(find /var/lib/dpkg/updates -type f 2>/dev/null)" ]; then
  say 'completing packages that an interrupted run has left half installed'
  # First, as apt-get refuses to work before dpkg has read its notes.
  quietly env DEBIAN_FRONTEND=noninteractive dpkg --force-confold --configure -a || true
  # Cut off between a package's files and the note that they are whole: only a new installation completes it.
  mapfile -t torn < <(dpkg-query -W -f='${db:Status-Eflag} ${binary:Package}\n' | sed -n 's/^reinstreq //p')
  [ ${#torn[@]} = 0 ] || reinstall "${torn[@]}" || { apt update && reinstall "${torn[@]}"; } ||
    die "apt-get could not reinstall ${torn[*]} (see above)"
  apt --no-install-recommends --fix-broken install || die 'apt-get could not complete them (see above)'
fi
if [ ${#want[@]} -gt 0 ]; then
  say "installing ${want[*]}"
  apt --no-install-recommends install "${want[@]}" || {
    say 'that failed; once more with fresh package lists'
    apt update || die 'apt-get update failed (see above)'
    apt --no-install-recommends install "${want[@]}" || die "apt-get could not install ${want[*]} (see above)"
  }
fi

put /etc/modules-load.d/ovsmesh.conf 644 <<<"# What a node of ovsmesh needs of the kernel.
${modules// /$'\n'}" || true
for module in $modules; do
  in_kernel "$module" || run modprobe "$module" || die "modprobe $module failed (see above)"
done

if [ -n "$systemd" ] && ! { systemctl -q is-active openvswitch-switch && systemctl -q is-enabled openvswitch-switch; }; then
  run systemctl enable --now openvswitch-switch || die 'Open vSwitch does not start: journalctl -u ovs-vswitchd'
fi

if [ -n "$kubernetes" ]; then
  # The kubelet checks these before it starts. Without Kubernetes the agent sets them, and restores them at cleanup.
  if put /etc/sysctl.d/60-ovsmesh.conf 644 <<<'# What a Kubernetes node of ovsmesh needs at boot.
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
net.bridge.bridge-nf-call-ip6tables = 1'; then
    run sysctl -q -p /etc/sysctl.d/60-ovsmesh.conf || die 'these sysctls could not be set (see above)'
  fi
  [ -n "$changed" ] || say 'nothing to change'
  say "${dry:+would be }ready for the DaemonSets: kubectl apply -k manifests"
  exit 0
fi

# One directory a version, never changed once complete, so that a running agent keeps its files.
version=$(sources_hash)
venv=$root/$version
if [ ! -e "$venv/whole" ]; then
  say "${dry:+would be }installing ovsmesh into $venv"
  if [ -z "$dry" ]; then
    python=$(find_python) || die 'no Python 3.11 with venv, though its package is installed: see above'
    rm -rf "$venv"
    mkdir -p $root
    "$python" -m venv "$venv" 9>&- || die "$python could not make a virtual environment in $venv (see above)"
    if [ -n "$from" ]; then
      "$venv/bin/pip" install -q --disable-pip-version-check --no-input --no-index --find-links "$from" "$wheel" >&2 9>&- ||
        die "pip could not install $wheel and what it needs from $from alone (see above)"
    else
      "$here/pip.sh" "$venv" install >&2 9>&- ||
        die "pip could not install ovsmesh (see above); where no package index is reached, use --from DIR"
    fi
    "$venv/bin/ovsmesh" --version >/dev/null || die "ovsmesh in $venv does not start (see above)"
    sync -f "$venv"
    touch "$venv/whole"
  fi
  changed=1
fi
if [ "$(readlink $link 2>/dev/null)" != "$venv/bin/ovsmesh" ]; then
  run ln -sfn "$venv/bin/ovsmesh" $link.new
  run mv -T $link.new $link
fi

# what the agent is told to do with Docker, by this run or an earlier one
dockered=$docker
[ -n "$dockered" ] || [ ! -f $default ] || dockered=$(sed -n 's/^OVSMESH_AGENT_DOCKER=//p' $default | tail -n 1)
[ -n "$node" ] || [ ! -f $default ] || node=$(sed -n 's/^OVSMESH_AGENT_NODE=//p' $default | tail -n 1)
node=${node:-$(hostname)}
if [ -n "$dry" ] && [ ! -e "$venv/whole" ]; then
  say "would check this host as node $node: ovsmesh bootstrap --check"
else
  say "checking this host as node $node of $source"
  rc=0
  checks=$("$venv/bin/ovsmesh" bootstrap --check --mesh "$source" --node "$node" ${dockered:+--docker "$dockered"} 9>&-) || rc=$?
  # 2: this host is as it should be, and peers do not answer yet
  case $rc in
    0 | 2) printf '%s\n' "$checks" | { grep -E '^(warn|FAIL)' || true; } >&2 ;;
    *)
      printf '%s\n' "$checks" >&2
      die 'this host can not be a node as it is: see each line that begins with FAIL'
      ;;
  esac
fi

if [ -n "$mesh" ] && ! [ "$mesh" -ef $installed_mesh ]; then
  # byte for byte, as its last newline says that it is whole
  put $installed_mesh 644 <"$mesh" || true
fi
settings=$(
  { grep -vE '^OVSMESH_AGENT_(NODE'"${docker:+|DOCKER}"')=' $default 2>/dev/null || true; }
  echo "OVSMESH_AGENT_NODE=$node"
  [ -z "$docker" ] || echo "OVSMESH_AGENT_DOCKER=$docker"
)
if [ -n "$(diff <(sort $default 2>/dev/null) <(sort <<<"$settings") || true)" ]; then
  put $default 644 <<<"$settings" || true
fi

agent="ovsmesh agent --mesh $installed_mesh --node $node${docker:+ --docker $docker}"
if [ -z "$systemd" ]; then
  say "no systemd runs here, so nothing will start the agent; let what supervises this host's services run"
  say "  $agent"
  say 'once Open vSwitch runs, then see `ovsmesh status`'
  exit 1
fi
# The unit lets the agent write these only if they exist: daemon.json, and what has systemd start dockerd after kbr0.
if command -v dockerd >/dev/null; then
  for folder in /etc/docker /etc/systemd/system/docker.service.d; do
    [ -d $folder ] || run mkdir -m 755 $folder
  done
fi
put $unit 644 <"$here/ovsmesh-agent.service" || true
# LoadState too: if systemd has seen the file missing or incomplete, it reports the unit as not loaded, and does not say
# that a reload is needed.
if [ "$(systemctl show --value -p NeedDaemonReload ovsmesh-agent)" != no ] ||
  [ "$(systemctl show --value -p LoadState ovsmesh-agent)" != loaded ]; then
  run systemctl daemon-reload
fi
systemctl -q is-enabled ovsmesh-agent 2>/dev/null || run systemctl -q enable ovsmesh-agent
is_current() { # whether the agent runs, and runs what is installed now
  local pid started
  systemctl -q is-active ovsmesh-agent || return 1
  pid=$(systemctl show --value -p MainPID ovsmesh-agent)
  started=$(systemctl show --value --timestamp=us+utc -p ExecMainStartTimestamp ovsmesh-agent)
  grep -qsF "$venv/" "/proc/$pid/cmdline" || return 1
  [ "$(date -d "$started" +%s%N)" -gt "$(stat -c %.9Y $default | tr -d .)" ] || return 1
  [ "$(date -d "$started" +%s%N)" -gt "$(stat -c %.9Y $unit | tr -d .)" ]
}
is_current || run systemctl restart ovsmesh-agent || die 'the agent does not start: journalctl -u ovsmesh-agent'
if [ -n "$dry" ]; then
  [ -n "$changed" ] || say 'nothing to change'
  exit 0
fi
for old in "$root"/*; do
  [ "$old" = "$venv" ] || { say "removing $old, which nothing uses any more"; rm -rf "$old"; }
done
[ -n "$changed" ] || say 'nothing to change'
say "waiting until the agent has converged ($wait s at most) and peers answer"
rc=0
$link bootstrap --wait "$wait" --mesh $installed_mesh --node "$node" 9>&- || rc=$?
case $rc in
  0) ;;
  2)
    say 'this host is a node and its agent runs, but not every peer answers: see above, and `ovsmesh check`'
    exit 3
    ;;
  *) die 'see above, `ovsmesh status` and journalctl -u ovsmesh-agent; the agent goes on trying' ;;
esac
