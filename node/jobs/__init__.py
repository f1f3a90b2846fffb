"""Jobs: work that the swarm does to its end, whoever dies meanwhile. See docs/architecture.md, "Jobs"."""
