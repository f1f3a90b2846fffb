"""Tensors: models cut into stages, and generation over them."""
