"""ovsmesh: one flat network for the pods and containers of many hosts, on Open vSwitch and GRE."""

__version__ = "0.1.0"
