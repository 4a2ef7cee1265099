#!/bin/sh
# node web1 of the mesh in /etc/ovsmesh/mesh.yaml
# The dataplane of one host as plain commands. It does not need ovsmesh.
# You may run it again: it adds and corrects, and removes nothing. Links, routes and filter rules are lost at
# a reboot: run it at each boot, after Open vSwitch has started. `ovsmesh agent` takes over what it made, and
# `ovsmesh cleanup` removes it.
# Note: a note
set -eu
export LC_ALL=C PATH="${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin"


# --- requirements, and what must not be in the way
die() { echo "$0: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die 'run it as root'
for tool in ip bridge sysctl ovs-vsctl ovs-ofctl nft; do
  command -v "$tool" >/dev/null || die "$tool is missing: install iproute2, procps, nftables, openvswitch-switch"
done
exists() { ip link show dev "$1" >/dev/null 2>&1; }
marked() { ip link show dev "$1" | grep -qx ' *alias ovsmesh'; }
if exists kbr0 && ! marked kbr0; then die 'kbr0 is not managed by ovsmesh (no alias ovsmesh): rename or delete it'; fi
if ovs-vsctl --timeout=30 br-exists obr0 && [ -z "$(ovs-vsctl --timeout=30 br-get-external-id obr0 ovsmesh)" ]; then
  die 'obr0 is not managed by ovsmesh (no external_ids:ovsmesh): rename or delete it'
fi

# --- kbr0: the Linux bridge that containers plug into
if ! exists kbr0; then
  # Marked before it has its name, so that one left by an interrupted run counts as managed.
  if exists ovsmesh-new; then ip link del dev ovsmesh-new; fi
  ip link add name ovsmesh-new address 0a:58:0a:61:01:01 mtu 1458 type bridge
  ip link set dev ovsmesh-new alias ovsmesh
  ip link set dev ovsmesh-new name kbr0
fi
ip link show dev kbr0 | grep -q 'link/ether 0a:58:0a:61:01:01 ' || ip link set dev kbr0 address 0a:58:0a:61:01:01
ip link set dev kbr0 mtu 1458 up

# --- forward packets; send and accept no redirects
sysctl -q -w net/ipv4/ip_forward=1
sysctl -q -w net/ipv6/conf/all/forwarding=1
sysctl -q -w net/ipv6/conf/kbr0/forwarding=1
sysctl -q -w net/ipv4/conf/kbr0/forwarding=1
sysctl -q -w net/ipv4/conf/all/send_redirects=0
sysctl -q -w net/ipv4/conf/kbr0/send_redirects=0
sysctl -q -w net/ipv4/conf/kbr0/rp_filter=2
sysctl -q -w net/ipv4/conf/kbr0/accept_redirects=0
sysctl -q -w net/ipv4/conf/kbr0/arp_ignore=0
sysctl -q -w net/ipv6/conf/kbr0/disable_ipv6=0
sysctl -q -w net/ipv6/conf/kbr0/accept_dad=0
sysctl -q -w net/ipv6/conf/kbr0/addr_gen_mode=0
sysctl -q -w net/ipv6/conf/kbr0/accept_ra=0
sysctl -q -w net/ipv6/conf/kbr0/accept_redirects=0

# --- filter rules: tunnel packets from peers only, no spoofed sources, masquerade
nft -f - <<'END'
add table inet ovsmesh
delete table inet ovsmesh
table inet ovsmesh {
  set peers4 { type ipv4_addr; elements = { 192.0.2.12 }; }
  chain postrouting {
    type nat hook postrouting priority 100; policy accept;
    ip saddr { 10.97.1.0/24 } ip daddr != { 10.97.0.0/16, 224.0.0.0/4, 255.255.255.255 } oifname != "kbr0" masquerade fully-random comment "masquerade-v4 049ad25c"
    ip6 saddr { fd00:97:1::/64 } ip6 daddr != { fd00:97::/32, ff00::/8 } oifname != "kbr0" masquerade fully-random comment "masquerade-v6 5d29163e"
  }
  chain input {
    type filter hook input priority -5; policy accept;
    iifname "kbr0" ip daddr 192.0.2.11 @th,0,64 & 0xa000ffffffffffff == 0x2000655800000007 meta l4proto gre drop comment "tunnel-from-pod c0f8ed8b"
    ip daddr 192.0.2.11 @th,0,64 & 0xa000ffffffffffff == 0x2000655800000007 meta l4proto gre ip saddr != @peers4 drop comment "tunnel-not-peer 899647b9"
    iifname "kbr0" ip daddr 192.0.2.11 @th,0,96 & 0xa000ffff00000000ffffffff == 0xa00065580000000000000007 meta l4proto gre drop comment "tunnel-from-pod-2 a1b00c81"
    ip daddr 192.0.2.11 @th,0,96 & 0xa000ffff00000000ffffffff == 0xa00065580000000000000007 meta l4proto gre ip saddr != @peers4 drop comment "tunnel-not-peer-2 ca1c6640"
  }
  chain forward {
    type filter hook forward priority -5; policy accept;
    iifname "kbr0" ip daddr @peers4 @th,0,64 & 0xa000ffffffffffff == 0x2000655800000007 meta l4proto gre drop comment "tunnel-from-pod 6622efa1"
    iifname "kbr0" ip daddr @peers4 @th,0,96 & 0xa000ffff00000000ffffffff == 0xa00065580000000000000007 meta l4proto gre drop comment "tunnel-from-pod-2 89f62246"
  }
}
END
nft -f - <<'END'
add table bridge ovsmesh
delete table bridge ovsmesh
table bridge ovsmesh {
  set peers4 { type ipv4_addr; elements = { 192.0.2.12 }; }
  set ranges4 { type ipv4_addr; flags interval; elements = { 10.97.2.0/24 }; }
  set ranges6 { type ipv6_addr; flags interval; elements = { fd00:97:2::/64 }; }
  chain prerouting {
    type filter hook prerouting priority -300; policy accept;
    iifname "obr0" goto mesh comment "from-mesh 4aaab121"
    meta ibrname "kbr0" goto pods comment "from-pods 4afce2af"
    meta ibrname "kbr0" ether daddr 0a:58:0a:61:01:01 goto pods comment "to-gateway 02aecc9c"
    meta ibrname "kbr0" goto veths comment "from-veths 99556faf"
  }
  chain mesh {
    ether daddr != 0a:58:0a:61:01:01 drop comment "mac ff887a33"
    @ll,96,16 { 0x8100, 0x88a8 } drop comment "tag 52ea890b"
    ip saddr @ranges4 ip daddr { 10.97.1.0/24 } accept comment "range-v4 85275c40"
    ip saddr @peers4 ip daddr { 10.97.1.0/24 } accept comment "tunnel-v4 7fee35d5"
    ip saddr @ranges4 ip daddr @ranges4 icmp type echo-request accept comment "probe-v4 5132b9f5"
    ip6 saddr @ranges6 ip6 daddr { fd00:97:1::/64 } accept comment "range-v6 ca864035"
    ip6 saddr @ranges6 ip6 daddr @ranges6 icmpv6 type echo-request accept comment "probe-v6 c0933a32"
    drop comment "other 70de86e2"
  }
  chain pods {
    @ll,96,16 { 0x8100, 0x88a8 } drop comment "tag a368f0e5"
    @ll,112,40 0xaaaa030000 drop comment "snap 746376d0"
    ether saddr 0a:58:0a:61:01:01 drop comment "mac-own a52efbd0"
    ether saddr { 0a:58:0a:61:00:00-0a:58:0a:61:ff:ff } ether saddr != { 0a:58:0a:61:01:00-0a:58:0a:61:01:ff } drop comment "mac-peer f0caf556"
    udp dport { 68, 546 } drop comment "dhcp-reply 16f3fb30"
    ip daddr 127.0.0.0/8 drop comment "local-v4 eb0ddfa9"
    ip saddr { 10.97.1.1 } drop comment "gateway-v4 3220a6f6"
    ip saddr { 10.97.1.0/24 } accept comment "own-v4 255541b0"
    arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ip { 10.97.1.0/24 } arp saddr ip != { 10.97.1.1 } accept comment "own-arp 67d345ca"
    arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ip 0.0.0.0 accept comment "probe-arp d2f73ddb"
    ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept comment "dhcp 95abd3ac"
    ip saddr 0.0.0.0 ip protocol igmp accept comment "igmp c8c17c31"
    meta protocol { ip, arp } drop comment "other-v4 8662e049"
    icmpv6 type { nd-router-advert, nd-redirect } drop comment "router b47d92a1"
    ip6 saddr { fd00:97:1::1, fe80::858:aff:fe61:101 } drop comment "gateway-v6 4050b705"
    icmpv6 type nd-neighbor-advert @th,64,128 { 0xfd000097000100000000000000000001, 0xfe8000000000000008580afffe610101 } drop comment "gateway-nd 143018fd"
    icmpv6 type nd-neighbor-advert @th,64,128 != { 0xfd000097000100000000000000000000-0xfd00009700010000ffffffffffffffff, 0xfe800000000000000000000000000000-0xfebfffffffffffffffffffffffffffff } drop comment "other-nd ec441e38"
    ip6 saddr { fd00:97:1::/64, fe80::/10 } accept comment "own-v6 60c6dbfb"
    ip6 saddr :: icmpv6 type { 131, 132, 133, 135, 143 } accept comment "unspecified-v6 749c2ec9"
    meta protocol ip6 drop comment "other-v6 ca0c17fd"
  }
  chain veths {
    @ll,96,16 { 0x8100, 0x88a8 } @ll,112,16 & 0x0fff == 0 drop comment "tag 632cb297"
    ip saddr { 10.97.0.0/16 } ip saddr != { 10.97.1.0/24 } drop comment "range-v4 83473082"
    ip saddr { 10.97.1.1 } drop comment "gateway-v4 d59ddacc"
    arp saddr ip { 10.97.0.0/16 } arp saddr ip != { 10.97.1.0/24 } drop comment "range-arp 9fe99c61"
    arp saddr ip { 10.97.1.1 } drop comment "gateway-arp 5d7a3579"
    ip6 saddr { fd00:97::/32 } ip6 saddr != { fd00:97:1::/64 } drop comment "range-v6 809e4360"
    ip6 saddr { fd00:97:1::1 } drop comment "gateway-v6 34d6bf42"
    icmpv6 type nd-neighbor-advert @th,64,128 { 0xfd000097000100000000000000000001 } drop comment "gateway-nd 36d34764"
  }
}
END

# --- obr0: the OVS bridge, with one protected tunnel port for each peer
ovs-vsctl --timeout=30 --may-exist add-br obr0 \
  -- set Bridge obr0 datapath_type=system fail_mode=standalone external_ids:ovsmesh=1 \
  -- set Interface obr0 mtu_request=1458
ovs-vsctl --timeout=60 \
  -- --may-exist add-port obr0 gre-web2 -- set Port gre-web2 protected=true 'external_ids={ovsmesh="web2"}' -- set Interface gre-web2 type=gre 'options={remote_ip="192.0.2.12", local_ip="192.0.2.11", key="7"}'

# --- flows: to each peer by its MAC; from each peer only its own sources; nothing else
ovs-ofctl --bundle add-flows obr0 - <<'END'
cookie=0x6f76736d,priority=0,actions=drop
cookie=0x6f76736d,priority=50,dl_dst=0a:58:0a:61:01:01,icmp,icmp_type=8,nw_dst=10.97.1.1,nw_src=10.97.1.1,actions=mod_dl_dst:01:80:c2:00:00:01,LOCAL
cookie=0x6f76736d,priority=50,dl_dst=0a:58:0a:61:01:01,icmp6,icmp_type=128,ipv6_dst=fd00:97:1::1,ipv6_src=fd00:97:1::1,actions=mod_dl_dst:01:80:c2:00:00:01,LOCAL
cookie=0x6f76736d,priority=100,dl_dst=0a:58:0a:61:02:01,in_port=LOCAL,actions=output:"gre-web2"
cookie=0x6f76736d,priority=100,dl_dst=0a:58:0a:61:01:01,in_port="gre-web2",ip,nw_src=10.97.2.0/24,actions=LOCAL
cookie=0x6f76736d,priority=100,dl_dst=0a:58:0a:61:01:01,in_port="gre-web2",ipv6,ipv6_src=fd00:97:2::/64,actions=LOCAL
cookie=0x6f76736d,priority=100,dl_dst=0a:58:0a:61:01:01,in_port="gre-web2",ip,nw_src=192.0.2.12,actions=LOCAL
END

# --- plug obr0 into kbr0, with no flooding to it
ip link set dev obr0 master kbr0 up
bridge link set dev obr0 learning off flood off mcast_flood off bcast_flood off

# --- addresses; neighbour, FDB entry and route for each peer: no ARP crosses a tunnel
ip -batch - <<'END'
address replace 10.97.1.1/24 dev kbr0
address replace fd00:97:1::1/64 dev kbr0 nodad
neighbour replace 10.97.2.1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111
neighbour replace fd00:97:2::1 lladdr 0a:58:0a:61:02:01 dev kbr0 nud permanent protocol 111
END
bridge -batch - <<'END'
fdb replace 0a:58:0a:61:02:01 dev obr0 master static sticky
END
ip -batch - <<'END'
route replace unreachable 10.97.0.0/16 proto 111 metric 4278198272
route replace unreachable fd00:97::/32 proto 111 metric 4278198272
route replace 10.97.2.0/24 via 10.97.2.1 dev kbr0 onlink proto 111 metric 111 mtu 1458
route replace fd00:97:2::/64 via fd00:97:2::1 dev kbr0 onlink proto 111 metric 111 mtu 1458
END
