"""Packets to peers: whether a peer answers, and whether GRE and ICMP pass on the way."""
