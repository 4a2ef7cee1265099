"""Hosts in network namespaces for the demo, the tests and the benches. Drives ovsmesh from outside, as a user does."""
