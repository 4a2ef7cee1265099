"""The agent of one node: its reconcile loop, and what that joins: driver, status, MeshNode, HTTP, systemd, cleanup."""
