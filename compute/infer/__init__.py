"""Split inference: routes over peers that hold layers, the ring of stages, sessions and their failover."""
