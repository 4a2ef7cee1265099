"""Drivers of the Linux kernel: rtnetlink through pyroute2, nftables and iptables, sysctls."""
