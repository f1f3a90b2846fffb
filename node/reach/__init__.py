"""How others reach this node, and it them: what NAT it sits behind, relays, hole punches, the LAN."""
