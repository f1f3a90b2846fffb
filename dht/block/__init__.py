"""Content blocks: models as manifests of blocks, kept on disk, fetched from many peers at once.

Tensors are cut into blocks named by their hash, so two fine-tunes of one model share what is equal in them, a
peer fetches just the layers that it serves, and nobody has to be believed.
"""
