"""Follow a packet from one pod, container or address to another, and say at which hop it stops."""
