"""Training together: DiLoCo among equals, and federated rounds where the data stay home."""
