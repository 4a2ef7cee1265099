"""Pure: the dataplane's types, its desired state, plan and report, and the texts made from them."""
