"""Mycel: a peer-to-peer compute network.

The public Python API is what this module names; the rooms below it (`mycel.protocol`, `mycel.dht`,
`mycel.compute`, `mycel.node`, `mycel.simnet`) are described in docs/architecture.md.
"""

__version__ = "0.1.0"
