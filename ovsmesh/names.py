"""Names that ovsmesh gives to what it makes, shared with code that drives ovsmesh from outside."""

KBR = "kbr0"
"""The Linux bridge that containers plug into."""
OBR = "obr0"
"""The Open vSwitch bridge that holds the tunnel ports."""
ENCAPSULATIONS = ("gre", "vxlan", "geneve")
"""Tunnel protocols that a mesh can use. Each is also the type of an Open vSwitch interface."""
API_VERSION = "ovsmesh.io/v1alpha1"
"""Group and version of the Kubernetes objects; also the `apiVersion` of a mesh file."""
