"""What peers say: wire formats and state machines, without a socket in them, and the two seams.

`mycel.protocol.network.Network` is the seam below (bytes, clock, entropy), `mycel.protocol.mesh.Mesh`
the seam above (peers, streams, calls). Every other room stands on one of the two.
"""
