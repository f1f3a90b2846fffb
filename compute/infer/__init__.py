"""Split inference: routes over the peers that hold layers, the ring of stages, sessions and their failover."""
