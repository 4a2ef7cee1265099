#!/bin/bash
# PID 1 of the guest. The host's root is mounted as / (hostfs, read-only); `job=` and `out=` come from
# the kernel command line. Puts a tmpfs overlay on top, so that everything can be written and nothing
# reaches the host but what goes to $out; then runs the script $job and writes its exit status to $out/status.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
modules=/usr/lib/uml/modules
kernel=$(uname -r)

stop() { # ends the guest, and says why when it is not the end of the job
  [ -z "${1:-}" ] || echo "guest: $1" >/dev/console
  sync
  # `halt` is not on every machine; either way the guest ends, here by a restart that `noreboot` forbids
  echo b >/proc/sysrq-trigger
}

mount -t proc proc /proc
insmod "$modules/$kernel/kernel/fs/overlayfs/overlay.ko" || stop "the kernel has no overlayfs"
mount -t tmpfs -o size=75% overlay /mnt && mkdir /mnt/upper /mnt/work /mnt/root || stop "no tmpfs"
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root || stop "no overlay"
cd /mnt/root || stop "no overlay"

mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev 2>/dev/null || mount --rbind /dev dev
mkdir -p dev/pts dev/shm dev/net tmp
ln -sfn /proc/self/fd dev/fd
[ -e dev/net/tun ] || mknod dev/net/tun c 10 200
mount -t devpts pts dev/pts
mount -t tmpfs shm dev/shm
mount -t tmpfs run run
mkdir -p run/lock run/netns run/openvswitch var/tmp lib/modules
mount --bind "$modules" lib/modules
mkdir -p ".$out"
mount -t hostfs -o "$out" out ".$out" || stop "can't reach $out"
mkdir -p old_root
pivot_root . old_root && umount -l /old_root && cd / || stop "pivot_root failed"

hostname guest
ip link set lo up
dmesg -n 1
setsid -w /bin/bash "$job" </dev/null >"$out/output" 2>&1
echo $? >"$out/status.new" && mv "$out/status.new" "$out/status"
stop
