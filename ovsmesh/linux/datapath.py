"""Ask the kernel for Open vSwitch's datapath."""

from __future__ import annotations

import errno

from ovsmesh.linux import netlink_socket, rtnetlink_encoder
from ovsmesh.linux.netlink_socket import NetlinkError, NetlinkSocket

_FAMILY = "ovs_datapath"
"""The generic netlink family of the kernel datapath (<linux/openvswitch.h>)."""


def kernel_datapath() -> bool:
    """Return whether this kernel has Open vSwitch's datapath. Asking loads its module, if there is one."""
    with NetlinkSocket(netlink_socket.GENERIC) as sock:
        try:
            sock.request(rtnetlink_encoder.get_genl_family(_FAMILY), lambda reply: None)
        except NetlinkError as error:
            return error.errno not in (errno.ENOENT, errno.EOPNOTSUPP)
    return True
