"""Drivers of Open vSwitch: the OVSDB through python-ovs, the flow table through ovs-ofctl."""
