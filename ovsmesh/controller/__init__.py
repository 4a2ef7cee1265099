"""The controller of a cluster: from Nodes to MeshSlices, pod CIDRs, conditions, garbage collection."""
