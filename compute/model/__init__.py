"""A language model as stages: loading, running, caching, sampling. The only place that imports torch."""
